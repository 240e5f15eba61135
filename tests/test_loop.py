"""The whole cycle on a world that is learnt in seconds: data flow, every switch, stops and restarts, processes, bad input."""

import io
import json
import random
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path

import micro
import pytest
from conftest import ROOT, last_json, read_rows, run, tiny_checkpoint, write_rows

import data
import gen_prompts
import loop
import train


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> dict[str, str]:
    """M_0, its data and options.json, as loop.py's options."""
    return micro.make(tmp_path_factory.mktemp("micro"), tiny_checkpoint)


@pytest.fixture(scope="session")
def finished(world, tmp_path_factory) -> tuple[Path, str]:
    """A run of two iterations by the command line, nothing in its way: (run directory, standard output)."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    code, text, errors = run(["loop.py", *flags(world, out)])
    assert code == 0, errors
    return out, text


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """A copy of the finished run that a test may go on with."""
    return shutil.copytree(finished[0], tmp_path / "copy")


def flags(world: dict[str, str], out: Path, *more: str) -> list[str]:
    return [
        *(text for name, value in world.items() for text in (f"--{name}", value)),
        "--out",
        str(out),
        *more,
    ]


def call(world: dict[str, str], out: Path, *more: str) -> tuple[int, str, str]:
    """loop.py's command in this process, which is quicker than a new one: (return code, standard output and error)."""
    text, errors, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(text), redirect_stderr(errors):
        patch.setattr(sys, "argv", ["loop.py", *flags(world, out, *more)])
        patch.setattr(data, "processes", nullcontext)  # there is a process group already
        patch.chdir(ROOT)
        try:
            data.command(loop.main, loop.Options, default_config="recipes/demo.json")
        except SystemExit as end:
            code = end.code
    return code, text.getvalue(), errors.getvalue()


def go(world, out: Path, *more: str) -> dict:
    """call() that must succeed; returns its JSON line."""
    code, text, errors = call(world, out, *more)
    assert code == 0, errors
    return last_json(text)


def manifest(path: Path) -> dict:
    return json.loads(data.manifest_path(path).read_text())


def responses(path: Path, field: str = "response") -> dict[str, str]:
    return {row["id"]: row[field] for row in read_rows(path)}


def stamps(out: Path) -> dict[str, int]:
    """When each manifest of a run was written."""
    return {
        str(path.relative_to(out)): path.stat().st_mtime_ns
        for path in out.glob("**/*manifest.json")
    }


# ---------------------------------------------------------------------------------------------- the cycle


def test_the_cycle_runs_from_end_to_end(finished):
    out, text = finished
    result = last_json(text)
    assert len(result["scores"]) == 3 and all(0 <= score <= 1 for score in result["scores"])
    assert result["scores"][1] > result["scores"][0] + 0.1, (
        "one iteration helps in this world, or something is wired wrongly"
    )
    assert result["seconds"] > 0 and Path(result["run_dir"]) == out and result["pairs"] == [16, 16]
    assert [
        json.loads((out / f"iter{t}" / "eval.json").read_text())["score"] for t in range(3)
    ] == pytest.approx(result["scores"], abs=1e-4)
    plan = text[text.index("\nplan:") : text.index("iteration 1\n")]
    for said in (
        "2 iterations from M_0",
        "R_t <- SFT(M_0)",
        "rewrite > M_0's answer",
        "M_t <- DPO(M_0) on D, reference M_0",
    ):
        assert said in plan
    table = text[text.index("\niterations of") :].splitlines()
    assert table[2].split()[0] == "t" and [line.split()[0] for line in table[3:5]] == ["1", "2"]
    config = json.loads((out / "config.json").read_text())
    assert config["iters"] == 2 and config["policy"]["batch"] == micro.OPTIONS["policy"]["batch"]


def test_every_stage_leaves_a_manifest_and_a_line_of_metrics(finished, world):
    out, _ = finished
    every = [
        "prompts.jsonl",
        "seed_answers.jsonl",
        "improver",
        "base_answers.jsonl",
        "rewrites.candidates.jsonl",
        "rewrites.jsonl",
        "pairs.jsonl",
        "policy",
        "heldout_answers.jsonl",
        "heldout_rewrites.candidates.jsonl",
        "heldout_rewrites.jsonl",
        "eval.json",
        "eval_improver.json",
    ]
    wanted = [
        "generator",
        "iter0/heldout_answers.jsonl",
        "iter0/eval.json",
        "iter2/answers.jsonl",
        *(f"iter{t}/{name}" for t in (1, 2) for name in every),
    ]
    assert {str(data.manifest_path(out / name).relative_to(out)) for name in wanted} == stamps(
        out
    ).keys()
    for name in wanted:
        made = manifest(out / name)
        assert (
            made["counts"]["seconds"] >= 0
            and made["processes"] == 1
            and made["options"]["dtype"] == "float32"
        )
        assert bool(made["start_from"]) == ("model" in made["inputs"])
        if name != "iter1/improver" and name != "iter2/improver":  # its weights are gone
            assert made["content"] == data.content_hash(out / name)
    assert manifest(out / "iter2" / "prompts.jsonl")["counts"]["prompts"] == len(
        read_rows(out / "iter2" / "prompts.jsonl")
    )
    lines = read_rows(out / "metrics.jsonl")
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    assert {line["stage"] for line in lines} == {re.sub(r"\.jsonl?$", "", name) for name in wanted}
    assert (
        next(line for line in lines if line["stage"] == "iter2/improver")["start_from"]
        == world["model"]
    )


def test_data_flow_is_the_papers(finished, world):
    """Algorithm 1, by fingerprints of models and by texts."""
    out, _ = finished
    M_0, one, two = data.content_hash(Path(world["model"])), out / "iter1", out / "iter2"
    M_1 = data.content_hash(one / "policy")
    assert M_1 != M_0
    for folder in (
        one,
        two,
    ):  # R_t and M_t start from M_0; the reference and the rejected answers are M_0's
        for name in ("improver", "policy"):
            assert manifest(folder / name)["inputs"]["model"] == M_0
            assert manifest(folder / name)["start_from"] == world["model"]
        assert manifest(folder / "policy")["inputs"]["reference"] == M_0
        assert manifest(folder / "base_answers.jsonl")["inputs"]["model"] == M_0
        assert (
            manifest(folder / "rewrites.jsonl")["inputs"]["model"]
            == manifest(folder / "improver")["content"]
        )
        pairs, asked = (
            read_rows(folder / "pairs.jsonl"),
            responses(folder / "prompts.jsonl", "prompt"),
        )
        base, rewrites = (
            responses(folder / "base_answers.jsonl"),
            responses(folder / "rewrites.jsonl"),
        )
        for pair in pairs:
            assert (pair["prompt"], pair["chosen"], pair["rejected"]) == (
                asked[pair["id"]],
                rewrites[pair["id"]],
                base[pair["id"]],
            )
            assert pair["iteration"] == int(folder.name[-1])
        answers = manifest(folder / "seed_answers.jsonl")["content"]
        assert manifest(folder / "improver")["inputs"]["answers"] == answers
        assert {row["id"] for row in pairs}.isdisjoint(
            row["id"] for row in data.read_jsonl(world["seeds"])
        )
    # R_t reads M_{t-1}'s answers: M_0's own at first, sampled once
    assert not (one / "answers.jsonl").exists()
    assert manifest(one / "seed_answers.jsonl")["inputs"]["model"] == M_0
    assert (
        manifest(two / "seed_answers.jsonl")["inputs"]["model"]
        == M_1
        == manifest(two / "answers.jsonl")["inputs"]["model"]
    )
    assert responses(one / "rewrites.jsonl", "draft") == responses(one / "base_answers.jsonl")
    assert responses(two / "rewrites.jsonl", "draft") == responses(two / "answers.jsonl")
    assert responses(two / "answers.jsonl") != responses(two / "base_answers.jsonl")
    # G is trained once; D is the union
    for folder in (one, two):
        assert (
            manifest(folder / "prompts.jsonl")["inputs"]["model"]
            == manifest(out / "generator")["content"]
        )
    D = {f"pairs{t}": manifest(out / f"iter{t}" / "pairs.jsonl")["content"] for t in (1, 2)}
    assert {k: v for k, v in manifest(one / "policy")["inputs"].items() if k in D} == {
        "pairs1": D["pairs1"]
    }
    assert {k: v for k, v in manifest(two / "policy")["inputs"].items() if k in D} == D
    assert [manifest(folder / "policy")["counts"]["pairs"] for folder in (one, two)] == [16, 32]


def test_prompts_are_new_in_every_iteration(finished, world):
    seen = [
        row["prompt"].lower()
        for name in ("seeds", "heldout")
        for row in read_rows(Path(world[name]))
    ]
    lists = []
    for t in (1, 2):
        rows = read_rows(finished[0] / f"iter{t}" / "prompts.jsonl")
        assert len(rows) > 20
        seen += [row["prompt"].lower() for row in rows]
        lists.append({tuple(row["keywords"]) for row in rows})
    assert len(set(seen)) == len(seen)
    assert lists[0] != lists[1], "fresh keyword lists"
    assert manifest(finished[0] / "iter2" / "prompts.jsonl")["counts"]["repeats_earlier"] > 0, (
        "nothing was there to drop"
    )


def test_an_improvers_weights_go_and_the_reference_cache_stays(finished):
    out, text = finished
    for t in (1, 2):
        assert manifest(out / f"iter{t}" / "improver") and not list(
            (out / f"iter{t}" / "improver").glob("*.safetensors")
        )
        assert list((out / f"iter{t}" / "policy").glob("*.safetensors"))
        assert not (out / f"iter{t}" / "policy" / "checkpoint").exists()
    assert (
        not list(out.glob("**/*.parts"))
        and not list(out.glob("**/*.tmp"))
        and not list(out.glob("**/begun.json"))
    )
    counts = [
        tuple(map(int, found))
        for found in re.findall(r"reference log-probs +(\d+) cached +(\d+) computed", text)
    ]
    (none, first), (cached, second) = counts  # of the iterations; equal texts have one entry
    assert (none, cached) == (0, first) and 0 < second <= 2 * 16
    assert (
        sum(len(read_rows(file)) for file in (out / "reference").glob("*/*.jsonl"))
        == first + second
    )


# ---------------------------------------------------------------------------------------------- the same command again


def test_a_second_call_does_nothing_again(copy, world, finished):
    before, result = stamps(copy), go(world, copy)
    assert stamps(copy) == before
    assert {name: result[name] for name in ("scores", "pairs", "tokens")} == {
        name: last_json(finished[1])[name] for name in ("scores", "pairs", "tokens")
    }
    assert result["seconds"] < last_json(finished[1])["seconds"] / 3


def test_more_iters_extend_a_run(copy, world, finished):
    before, scores = stamps(copy), last_json(finished[1])["scores"]
    result = go(world, copy, "--iters", "3")
    after = stamps(copy)
    assert result["scores"][:3] == scores and len(result["scores"]) == 4
    assert {name: after[name] for name in before} == before
    assert manifest(copy / "iter3" / "policy")["counts"]["pairs"] == 48
    again = data.parse_options(loop.Options, ["--config", str(copy / "config.json")])
    assert again.iters == 3, "config.json is what reproduces the run"


@pytest.mark.parametrize(
    "flag, new, name, old, first",
    [
        ("--policy.lr", "0.25", "lr", "0.0005", "iter1/policy"),
        ("--filter.threshold", "0.5", "threshold", "-3.0", "iter1/pairs.jsonl"),
        ("--seed", "7", "seed", "0", "generator"),
        ("--rejected", "previous", "rejected", "'base'", "iter1/pairs.jsonl"),
        ("--start", "previous", "start", "'base'", "iter1/policy"),
        ("--data", "fresh", "data", "'cumulative'", "iter1/policy"),
    ],
)
def test_a_changed_option_is_an_error(copy, world, flag, new, name, old, first):
    """It names the option, both values, and how many stages it would invalidate."""
    before = stamps(copy)
    code, _, errors = call(world, copy, flag, new)
    message = one_line(code, errors)
    assert (
        re.search(rf"option {name}\w* = {re.escape(old)}, now '?{new}'?;", message)
        and str(copy / first) in message
    )
    times = sorted(json.loads(path.read_text())["time"] for path in copy.glob("**/*manifest.json"))
    later = sum(time > manifest(copy / first)["time"] for time in times)
    assert f"it and {later} stages after it" in message and "--out" in message
    assert stamps(copy) == before


def without_last_policy(run_directory: Path) -> Path:
    """Undo the last iteration's policy and what came after it; returns where it was."""
    for name in ("heldout_answers.jsonl", "eval.json"):
        (run_directory / "iter2" / name).unlink()
        data.manifest_path(run_directory / "iter2" / name).unlink()
    shutil.rmtree(run_directory / "iter2" / "policy")
    return run_directory / "iter2" / "policy"


def test_a_stopped_stage_goes_on_where_it_was(copy, world, finished, monkeypatch):
    """Stopped after five of eight steps: three are left, and the weights are the same to the bit."""
    policy, real, done = without_last_policy(copy), train.train_step, []

    def step(*args):
        if len(done) == 5:
            done.append("stop")
            raise KeyboardInterrupt
        done.append("step")
        return real(*args)

    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(KeyboardInterrupt):
        call(world, copy)
    assert (
        not data.manifest_path(policy).exists() and (policy / "checkpoint" / "5" / "done").is_file()
    )
    go(world, copy)
    assert done == ["step"] * 5 + ["stop"] + ["step"] * 3
    assert (policy / "model.safetensors").read_bytes() == (
        finished[0] / "iter2/policy/model.safetensors"
    ).read_bytes()


def test_a_stopped_stages_checkpoint_is_not_used_with_other_options(copy, world):
    """Half a policy trained at one learning rate must not be finished at another."""
    again = without_last_policy(copy)
    (again / "checkpoint" / "1").mkdir(
        parents=True
    )  # not a readable checkpoint: resuming from it would raise
    (again / "checkpoint" / "1" / "done").touch()
    data.write_text(again / "begun.json", json.dumps({"inputs": {}, "options": {"lr": 123}}))
    go(world, copy)
    assert len(read_rows(again / "metrics.jsonl")) == manifest(again)["counts"]["steps"] == 8


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
root, out, seconds, seed, *argv = sys.argv[1:]
sys.path.insert(0, root)
import data, loop  # once: a fork has it all
pick = random.Random(int(seed))
half = lambda: [str(p) for name in ("begun.json", "*.parts", "checkpoint") for p in Path(out).glob(f"**/{name}")]
# a walk, which does not mind a directory that is removed meanwhile
finished = lambda: sum(name.endswith("manifest.json") for _, _, names in os.walk(out) for name in names)

def start():
    pid = os.fork()
    if pid == 0:
        sys.argv = ["loop.py", *argv]
        data.command(loop.main, loop.Options, default_config="recipes/demo.json")
        os._exit(0)
    return pid

for stages in sorted(pick.sample(range(22), 10)):  # of 26: spread over the run, however fast the machine is
    pid = start()
    while finished() < stages and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.005)
    time.sleep(pick.uniform(0, float(seconds) / 25))
    os.kill(pid, signal.SIGKILL)
    print("KILLED", os.waitpid(pid, 0)[1], half(), flush=True)
print("END", os.waitpid(start(), 0)[1], flush=True)
"""


def test_ten_kills_change_nothing(finished, world, tmp_path):
    """kill -9 at random moments, then the same command again: the same bytes as a run in peace."""
    peace, out = finished[0], tmp_path / "killed"
    seconds = last_json(finished[1])["seconds"]
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(ROOT), str(out), str(seconds), "1", *flags(world, out)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(("KILLED", "END"))]
    assert lines[-1] == "END 0", done.stderr[-2000:]
    kills = [line.split(maxsplit=2)[1:] for line in lines[:-1]]
    assert [status for status, _ in kills] == ["9"] * 10, "it ended before it was killed"
    assert sum(left != "[]" for _, left in kills) >= 3, "none was in the middle of a stage"
    for t in (1, 2):
        for name in (
            "prompts.jsonl",
            "pairs.jsonl",
            "rewrites.jsonl",
            "policy/model.safetensors",
            "heldout_answers.jsonl",
        ):
            assert (out / f"iter{t}" / name).read_bytes() == (
                peace / f"iter{t}" / name
            ).read_bytes(), (t, name)
        assert not list((out / f"iter{t}" / "improver").glob("*.safetensors"))
        strip = lambda rows: [
            {k: row[k] for k in ("step", "loss", "grad_norm", "lr")} for row in rows
        ]  # noqa: E731
        steps = [
            strip(read_rows(where / f"iter{t}" / "policy" / "metrics.jsonl"))
            for where in (out, peace)
        ]
        assert steps[0] == steps[1], "a step that was done again must stand there once"
    assert (out / "generator" / "model.safetensors").read_bytes() == (
        peace / "generator" / "model.safetensors"
    ).read_bytes()
    results = [
        json.loads(text.splitlines()[-1]) for text in (done.stdout.split("\nEND")[0], finished[1])
    ]
    assert results[0]["scores"] == results[1]["scores"]
    assert not list(out.glob("**/checkpoint")) and not list(out.glob("**/*.parts"))


# ---------------------------------------------------------------------------------------------- processes


def test_two_processes_run_the_cycle_and_sample_the_same_bytes(finished, world, tmp_path):
    """From one given generator and one given M_0, two processes write what one process wrote."""
    alone, out = finished[0], tmp_path / "two"
    shutil.copytree(alone / "generator", out / "generator")
    code, text, errors = run(["loop.py", *flags(world, out)], nproc=2)
    assert code == 0, errors[-3000:]
    result = last_json(text)
    assert len(result["scores"]) == 3 and result["scores"][1] > result["scores"][0] + 0.1
    assert re.search(r"generator +done before", text)
    for name in (
        "iter0/heldout_answers.jsonl",
        "iter1/prompts.raw.jsonl",
        "iter1/prompts.jsonl",
        "iter1/seed_answers.jsonl",
        "iter1/base_answers.jsonl",
    ):
        assert (out / name).read_bytes() == (alone / name).read_bytes(), name
        assert manifest(out / name)["processes"] == 2 if "raw" not in name else True
    assert len(read_rows(out / "iter1" / "prompts.raw.jsonl")) > micro.SAMPLING["chunk"], (
        "one chunk would be no test"
    )
    losses = [
        read_rows(where / "iter1" / "improver" / "metrics.jsonl")[0]["loss"]
        for where in (out, alone)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert stamps(out).keys() == stamps(alone).keys()


def test_two_processes_end_with_one_line_on_bad_input(world, tmp_path):
    code, _, errors = run(
        ["loop.py", *flags(world, tmp_path / "out", "--seeds", "nowhere.jsonl")], nproc=2
    )
    assert (
        code != 0 and f'File "{ROOT / "loop.py"}"' not in errors
    )  # torchrun has a traceback of its own
    assert sum(line.startswith("error: ") for line in errors.splitlines()) == 1
    assert "error: nowhere.jsonl: no such file" in errors


# ---------------------------------------------------------------------------------------------- benchmarks


def benchmark_options(tmp_path, world, **more) -> str:
    prompts = write_rows(
        tmp_path / "prompts.jsonl",
        [{"prompt": row["prompt"]} for row in read_rows(world["heldout"])[:4]],
    )
    options = {
        "data": str(prompts),
        "against": world["model"],
        "scorer": "likelihood",
        "max_new_tokens": 8,
        **more,
    }
    (tmp_path / "options.json").write_text(json.dumps({"head_to_head": options}))
    return str(tmp_path / "options.json")


def test_benchmarks_of_every_model(world, copy, tmp_path):
    """--eval on a finished run adds what it names; the same prompts and seeds for every model."""
    flags = "--eval", "head_to_head", "--eval-options", benchmark_options(tmp_path, world)
    go(world, copy, *flags)
    results = [
        json.loads((copy / f"iter{t}/eval/head_to_head/result.json").read_text()) for t in range(3)
    ]
    assert (results[0]["score"], results[0]["draws"], results[0]["prompts"]) == (
        50,
        4,
        4,
    )  # M_0 against itself
    assert all(r["prompts"] == 4 for r in results) and results[1]["words"] != results[0]["words"]
    measured = [
        manifest(copy / f"iter{t}/eval/head_to_head/result.json")["inputs"]["model"]
        for t in range(3)
    ]
    models = world["model"], copy / "iter1/policy", copy / "iter2/policy"
    assert measured == [data.content_hash(Path(path)) for path in models]
    answers = [read_rows(copy / f"iter{t}/eval/head_to_head/against.jsonl") for t in range(3)]
    assert answers[0] == answers[1] == answers[2]
    text = call(world, copy, *flags)[1]
    assert len(re.findall(r"iter\d/eval/head_to_head/result.json +done before", text)) == 3
    assert "head_to_head" in (copy / "report.html").read_text()


def test_options_of_benchmarks(tmp_path):
    from eval.benchmark import check, options_of

    path = tmp_path / "options.json"
    for text, message in (
        ("[1]", "no options by name"),
        ('{"ifeval": 1}', "no options by name"),
        ('{"ifeval": {"model": "m"}}', "ifeval: model is the run's to say; leave it out"),
    ):
        path.write_text(text)
        with pytest.raises(data.InputError, match=message):
            check("ifeval", str(path))
    o = options_of(
        "ifeval", {"seed": 7, "data": "d"}, model="m", **vars(data.Common(seed=1, dtype="float32"))
    )[1]
    assert (o.model, o.data, o.seed, o.dtype) == (
        "m",
        "d",
        7,
        "float32",
    )  # a benchmark's own seed is its own


@pytest.mark.parametrize(
    ("flags", "options", "message"),
    [
        (
            ["--eval", "alpaca"],
            {},
            "--eval alpaca: no benchmark of eval/ has that name; there are alpaca_eval, arena_hard",
        ),
        (["--eval", "judge"], {}, "--eval judge: no benchmark"),
        (["--eval", "benchmark"], {}, "--eval benchmark: no benchmark"),
        (
            ["--eval", "head_to_head"],
            {"against": ""},
            "--eval head_to_head: its option against is missing; give --eval-options",
        ),
        (["--eval", "ifeval,head_to_head"], {}, "--eval ifeval: its option data is missing"),
        (["--eval", "head_to_head"], {"datta": "x"}, "unrecognized arguments: --datta=x"),
        (
            ["--eval", "head_to_head"],
            {"data": "nowhere.jsonl"},
            "head_to_head: no file or directory nowhere.jsonl",
        ),
        (["--eval", "ifeval"], {}, "options for head_to_head, which --eval does not name"),
    ],
)
def test_benchmarks_that_do_not_exist(world, tmp_path, flags, options, message):
    code, _, errors = call(
        world,
        tmp_path / "out",
        *flags,
        "--eval-options",
        benchmark_options(tmp_path, world, **options),
    )
    assert code == 2 and message in errors and not (tmp_path / "out" / "generator").exists()


# ---------------------------------------------------------------------------------------------- switches


def test_switches_of_the_cycle(world, tmp_path, monkeypatch):
    """What the paper left untested, all switched at once; the finished run above is the other side of each."""
    trained, sft = [], gen_prompts.sft
    monkeypatch.setattr(
        gen_prompts,
        "sft",
        lambda model, rows, *rest: trained.extend(rows) or sft(model, rows, *rest),
    )
    out = tmp_path / "switched"
    code, text, errors = call(
        world,
        out,
        "--rejected",
        "previous",
        "--start",
        "previous",
        "--data",
        "fresh",
        "--generator.noise",
        "0",
        "--policy.loss",
        "simpo",
        "--policy.beta",
        "2",
        "--filter.scorer",
        "none",
        "--keep-improvers",
        "--evaluate",
        "",
        "--heldout",
        "",
    )
    assert code == 0, errors
    for said in (
        "rewrite > M_{t-1}'s answer",
        "M_t <- SIMPO(M_{t-1})",
        "pairs    D   =  rewrite",
        "3 own keywords + 0 of",
    ):
        assert said in text
    one, two = out / "iter1", out / "iter2"
    M_0, M_1 = data.content_hash(Path(world["model"])), data.content_hash(one / "policy")
    # --rejected previous
    drafts, base = responses(two / "answers.jsonl"), responses(two / "base_answers.jsonl")
    pairs = read_rows(two / "pairs.jsonl")
    assert all(pair["rejected"] == drafts[pair["id"]] for pair in pairs)
    assert any(drafts[pair["id"]] != base[pair["id"]] for pair in pairs)
    # --start previous; R_t and the reference stay M_0
    assert [manifest(folder / "policy")["inputs"]["model"] for folder in (one, two)] == [M_0, M_1]
    assert [manifest(folder / "policy")["start_from"] for folder in (one, two)] == [
        world["model"],
        str(one / "policy"),
    ]
    assert (
        manifest(two / "policy")["inputs"]["reference"]
        == M_0
        == manifest(two / "improver")["inputs"]["model"]
    )
    # --data fresh
    assert [name for name in manifest(two / "policy")["inputs"] if name.startswith("pairs")] == [
        "pairs2"
    ]
    assert manifest(two / "policy")["counts"]["pairs"] == len(pairs)
    # --generator.noise 0: all three words are of the prompt that is to be written
    assert len(trained) == 80
    for row in trained:
        words = row["prompt"].removeprefix("Ask about: ").removesuffix(".").split(", ")
        assert len(words) == 3 and all(
            word in row["response"].split("</question>")[0] for word in words
        )
    # --policy.loss simpo: no reference, and the first loss is that of margin 1.6 at a small difference, not ln 2
    assert not (out / "reference").exists() and "reference log-probs" not in text
    assert manifest(one / "policy")["options"]["loss"] == "simpo"
    first = read_rows(one / "policy" / "metrics.jsonl")[0]
    assert abs(first["preference_loss"] - 0.693) > 0.1 and first["rewards/margins"] != 0
    # --filter.scorer none
    assert all(pair["score_chosen"] is None and pair["score_rejected"] is None for pair in pairs)
    # --keep-improvers, and no evaluation
    assert list((one / "improver").glob("*.safetensors")) and list(
        (two / "improver").glob("*.safetensors")
    )
    assert last_json(text)["scores"] == [] and not (out / "iter0").exists()


def test_the_noise_keyword_is_there_by_default(world):
    """The other side of --generator.noise 0."""
    o = gen_prompts.GeneratorOptions(**micro.OPTIONS["generator"])
    rows = gen_prompts.training_rows(data.read_jsonl(world["seeds"]), o, 0)
    noise = [
        sum(
            word not in row["response"].split("</question>")[0]
            for word in row["prompt"].removeprefix("Ask about: ").removesuffix(".").split(", ")
        )
        for row in rows
    ]
    assert noise == [1] * len(rows)


def test_one_shot_has_the_whole_budget_in_one_iteration(world, tmp_path):
    out = tmp_path / "shot"
    code, text, errors = call(world, out, "--one-shot", "--policy.epochs", "1")
    assert code == 0, errors
    assert "plan: 1 iteration from M_0" in text and not (out / "iter2").exists()
    made = manifest(out / "iter1" / "prompts.jsonl")
    assert (made["options"]["lists"], made["options"]["prompts"]) == (128, 80) and made["counts"][
        "lists"
    ] == 128
    assert last_json(text)["pairs"] == [32] == [len(read_rows(out / "iter1" / "pairs.jsonl"))]
    assert len(last_json(text)["scores"]) == 2


def test_controls(copy, world, finished):
    """They come on top of a finished run, share its generator and reference cache, and have as many pairs."""
    before = stamps(copy)
    code, text, errors = call(world, copy, "--controls")
    assert code == 0, errors
    after, controls, M_0 = stamps(copy), copy / "controls", data.content_hash(Path(world["model"]))
    assert {name: after[name] for name in before} == before
    assert last_json(text)["scores"] == last_json(finished[1])["scores"]
    for name in ("SFT on the seeds", "pairs from the seeds", "one shot"):
        assert re.search(rf"^ *{name} +0\.\d+", text, re.MULTILINE), "a row of the table"
    for name in ("seed_sft", "seed_pairs", "one_shot/iter1/policy"):
        assert manifest(controls / name)["inputs"]["model"] == M_0
    assert manifest(controls / "seed_sft")["counts"]["examples"] == micro.SEEDS
    # pairs from the seeds: gold over M_0's answer, and as many steps as the last policy had, to the nearest epoch
    seed_pairs = manifest(controls / "seed_pairs")
    assert seed_pairs["counts"]["pairs"] == micro.SEEDS
    assert seed_pairs["options"]["epochs"] == round(2 * 32 / micro.SEEDS)
    # one shot: the same G, and as many pairs as the cycle had
    shot = controls / "one_shot" / "iter1"
    assert (
        manifest(shot / "prompts.jsonl")["inputs"]["model"]
        == manifest(copy / "generator")["content"]
    )
    assert (
        manifest(shot / "policy")["counts"]["pairs"] == 32
        and not (controls / "one_shot" / "reference").exists()
    )
    counts = [
        tuple(map(int, found))
        for found in re.findall(r"reference log-probs +(\d+) cached +(\d+) computed", text)
    ]
    assert all(computed > 0 for _, computed in counts) and len(counts) == 2
    seeds, drafts = (
        data.read_jsonl(world["seeds"]),
        responses(copy / "iter1" / "seed_answers.jsonl"),
    )
    logged = read_rows(controls / "seed_pairs" / "metrics.jsonl")
    assert len(seeds) == len(drafts) and logged[0]["preference_loss"] == pytest.approx(
        0.693147, abs=1e-4
    )
    before = stamps(copy)
    go(world, copy, "--controls")
    assert stamps(copy) == before


def test_seeds_limit_and_heldout_limit(world, tmp_path):
    out = tmp_path / "few"
    result = go(
        world,
        out,
        "--seeds-limit",
        "6",
        "--heldout-limit",
        "3",
        "--iters",
        "1",
        "--improver.drafts",
        "2",
    )
    assert manifest(out / "generator")["counts"]["seeds"] == 6 and len(result["scores"]) == 2
    assert len(read_rows(out / "iter1" / "seed_answers.jsonl")) == 12
    assert manifest(out / "iter1" / "improver")["counts"]["examples"] == 12
    assert len(read_rows(out / "iter1" / "heldout_answers.jsonl")) == 3


# ---------------------------------------------------------------------------------------------- bad input


def one_line(code: int, errors: str) -> str:
    assert code == 2 and errors.startswith("error: ") and errors.count("\n") == 1, errors
    return errors.removeprefix("error: ")


def seeds_with(line: str):
    """The world's seeds with another line in place of the third."""

    def change(world, folder):
        lines = Path(world["seeds"]).read_text().splitlines()
        lines[2] = line
        (folder / "seeds.jsonl").write_text("\n".join(lines) + "\n")
        return ["--seeds", str(folder / "seeds.jsonl")]

    return change


def model_with(change_checkpoint):
    """A copy of M_0 with something wrong."""

    def change(world, folder):
        shutil.copytree(world["model"], folder / "model")
        change_checkpoint(folder / "model")
        return ["--model", str(folder / "model")]

    return change


def without_shard(model: Path):
    from safetensors import safe_open

    names = safe_open(model / "model.safetensors", framework="pt").keys()
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def without_template(model: Path):
    (model / "chat_template.jinja").unlink()
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": None}))


def truncated(model: Path):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def few_seeds(world, folder):
    return ["--seeds", str(write_rows(folder / "one.jsonl", read_rows(Path(world["seeds"]))[:1]))]


def corpus_of(text: str):
    def change(world, folder):
        (folder / "corpus.txt").write_text(text)
        return ["--corpus", str(folder / "corpus.txt")]

    return change


def config_with(**more):
    def change(world, folder):
        (folder / "config.json").write_text(json.dumps({**micro.OPTIONS, **more}))
        return ["--config", str(folder / "config.json")]

    return change


def empty_file(world, folder):
    (folder / "empty.jsonl").touch()
    return ["--seeds", str(folder / "empty.jsonl")]


def latin_1(world, folder):
    (folder / "latin.jsonl").write_bytes(
        b'{"prompt": "a", "response": "b"}\n{"prompt": "caf\xe9", "response": "b"}\n'
    )
    return ["--seeds", str(folder / "latin.jsonl")]


def file_as_out(world, folder):
    (folder / "file").touch()
    return ["--out", str(folder / "file")]


LONG = json.dumps({"prompt": "Show how a red fox can jump. " * 30, "response": "No."})
BAD = {
    "no seeds file": (
        lambda w, f: ["--seeds", "nowhere.jsonl"],
        "nowhere.jsonl: no such file; check the path",
    ),
    "empty seeds file": (empty_file, "empty.jsonl: holds no records; give"),
    "malformed line": (
        seeds_with('{"prompt": "a'),
        "seeds.jsonl: line 3 is not valid JSON .*; mend or remove",
    ),
    "empty prompt": (
        seeds_with('{"prompt": " ", "response": "b"}'),
        "seeds.jsonl: line 3: field 'prompt' is .*; mend",
    ),
    "not UTF-8": (latin_1, "latin.jsonl: line 2 is not UTF-8; "),
    "no response": (
        seeds_with('{"prompt": "a"}'),
        "seeds.jsonl: line 3: field 'response' is missing.*; mend or remove",
    ),
    "not a record": (
        seeds_with('["a", "b"]'),
        "seeds.jsonl: line 3: field 'prompt' is .*; mend or remove",
    ),
    "long prompt": (
        seeds_with(LONG),
        r"seeds.jsonl: line 3: field 'prompt' has \d+ tokens .* context is 128; shorten",
    ),
    "no heldout file": (
        lambda w, f: ["--heldout", "nowhere.jsonl"],
        "nowhere.jsonl: no such file; check the path",
    ),
    "no checkpoint": (
        lambda w, f: ["--model", str(f)],
        r"no tokenizer.json there; check the path, or save",
    ),
    "no directory": (
        lambda w, f: ["--model", str(f / "a" / "b")],
        "a/b: no tokenizer.json there; check the path",
    ),
    "no config": (
        model_with(lambda m: (m / "config.json").unlink()),
        "no config.json, so this is no checkpoint .*; give",
    ),
    "no weights": (
        model_with(lambda m: (m / "model.safetensors").unlink()),
        "model.safetensors: missing; complete",
    ),
    "missing shard": (
        model_with(without_shard),
        "model-00002-of-00002.safetensors: missing; complete",
    ),
    "half a file": (
        model_with(truncated),
        "model.safetensors: not a readable safetensors file .*; download it again",
    ),
    "no template": (
        model_with(without_template),
        "the tokenizer has no chat template; give --chat-template",
    ),
    "too few seeds": (few_seeds, "only 1 of 1 have 2 keywords; give more seeds"),
    "no corpus": (
        lambda w, f: ["--corpus", "nowhere.txt"],
        "nowhere.txt: no such file; check the path",
    ),
    "no keywords": (
        corpus_of("The the of and.\n\nIt is so."),
        "corpus.txt: none of its 2 paragraphs .*; give",
    ),
    "unknown flag": (lambda w, f: ["--polcy.lr", "1"], "--polcy.lr"),
    "wrong type": (lambda w, f: ["--iters", "two"], "--iters.*two"),
    "wrong choice": (lambda w, f: ["--start", "middle"], "--start.*middle"),
    "unknown option": (config_with(polciy={}), "--polciy.*see --help"),
    "unknown option of a section": (config_with(policy={"rate": 1}), "--policy.rate.*see --help"),
    "wrong choice in a config": (config_with(start="middle"), "start.*middle"),
    "no config file": (lambda w, f: ["--config", "nowhere.json"], "nowhere.json: no such file"),
    "no model": (lambda w, f: ["--model", ""], "--model is needed"),
    "a file in the way": (file_as_out, "file: File exists; give another --out"),
    "no iterations": (lambda w, f: ["--iters", "0"], "--iters 0: give 1 or more"),
    "evaluate without heldout": (
        lambda w, f: ["--heldout", ""],
        "--evaluate and --heldout go together",
    ),
    "no such evaluation": (lambda w, f: ["--evaluate", "alpaka"], "alpaka.*no such file"),
    "no such function": (
        lambda w, f: ["--evaluate", "tests/micro.py:judge"],
        "micro.py has no function judge",
    ),
    "loss without its samples": (
        lambda w, f: ["--policy.loss", "selm"],
        "--loss selm reads sample; give dpo.py --samples",
    ),
    "no such scorer": (
        lambda w, f: ["--filter.scorer", "reward-model"],
        "reward-model: no scorer has that name",
    ),
    "no such scorer of improvers": (
        lambda w, f: ["--improver.scorer", "mine.py:score"],
        "mine.py:score: no such file; write",
    ),
    "scorer without a score": (
        lambda w, f: ["--filter.scorer", w["model"]],
        "a scorer needs a sequence-classification",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_before_anything_expensive(case, world, tmp_path):
    change, wanted = BAD[case]
    code, text, errors = call(world, tmp_path / "out", *change(world, tmp_path))
    assert re.search(wanted, one_line(code, errors)), errors
    assert "plan:" not in text and not list(tmp_path.glob("out/*/")), "something was begun"


def test_bad_input_of_a_real_command(world, tmp_path):
    """The same by the command line: standard output has no result, standard error one line, the code is 2."""
    code, text, errors = run(["loop.py", *flags(world, tmp_path / "out", "--model", str(tmp_path))])
    assert str(tmp_path) in one_line(code, errors)
    assert not any(line.startswith('{"scores"') for line in text.splitlines())


def test_seeds_that_changed_are_an_error(copy, world, tmp_path):
    """A run directory that was made with other seeds."""
    few = write_rows(tmp_path / "few.jsonl", read_rows(Path(world["seeds"]))[:10])
    code, _, errors = call(world, copy, "--seeds", str(few))
    message = one_line(code, errors)
    assert (
        re.search(r"generator: made with input seeds = '\w+', now '\w+'", message)
        and "--out" in message
    )


def test_no_pair_left_prints_the_score_gaps(copy, world):
    """Running out of pairs is an error with the distribution, and keeps what was finished."""
    shutil.rmtree(copy / "iter2")
    (copy / "iter1" / "pairs.jsonl").unlink()
    data.manifest_path(copy / "iter1" / "pairs.jsonl").unlink()
    code, _, errors = call(world, copy, "--filter.threshold", "99")
    last = errors.splitlines()[-1].rpartition("\r")[2]
    assert code == 2 and re.search(
        r"pairs.jsonl: no pair of 40 left \(.*small_gap.*\); score gaps( -?\d\S*){5}; lower", last
    )
    assert (copy / "iter1" / "rewrites.jsonl").is_file() and not (
        copy / "iter1" / "pairs.jsonl"
    ).exists()


def test_a_seed_makes_all_the_difference(world, finished, tmp_path):
    """Another --seed draws other keyword lists; the randomness is not fixed in some corner."""
    corpus, o = (
        gen_prompts.read_corpus(world["corpus"]),
        gen_prompts.GeneratorOptions(**micro.OPTIONS["generator"]),
    )
    lists = [
        gen_prompts.keyword_lists(corpus, world["corpus"], o, seed, t)
        for seed, t in ((0, 1), (0, 1), (1, 1), (0, 2))
    ]
    assert lists[0] == lists[1] and lists[0] != lists[2] and lists[0] != lists[3]
    random.seed(123)  # nor does it come from the global generator
    assert gen_prompts.keyword_lists(corpus, world["corpus"], o, 0, 1) == lists[0]

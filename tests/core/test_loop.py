"""The cycle on a world that is learnt in seconds: data flow, switches, restarts, bad input."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import micro
import pytest
from conftest import (
    ROOT,
    last_json,
    read_rows,
    refusal,
    run,
    run_process,
    tiny_checkpoint,
    write_rows,
)
from cycle import (
    cached_and_computed,
    call,
    counts,
    flags,
    go,
    inputs,
    one_line,
    responses,
    stamps,
)
from safetensors import safe_open

import checkpoint
import gen_prompts
import loop
import train
from eval.benchmark import check, options_of
from formats.records import read_jsonl
from plumbing.files import load_json, write_json
from plumbing.options import RunOptions, parse_options
from plumbing.parts import read_part, write_part
from plumbing.stage import content_hash, manifest_path, read_manifest

pytest_plugins = ["cycle"]
pytestmark = pytest.mark.slow

EVERY = [
    "prompts.jsonl",
    "seed_answers.jsonl",
    "improver",
    "base_answers.jsonl",
    "rewrites.jsonl",
    "pairs.jsonl",
    "policy",
    "heldout_answers.jsonl",
    "heldout_rewrites.jsonl",
    "eval.json",
    "heldout_samples.jsonl",
    "eval_improver.json",
    "eval_rewrites.json",
    "eval_samples.json",
]
RESULTS = [
    "generator",
    "iter0/heldout_answers.jsonl",
    "iter0/heldout_samples.jsonl",
    "iter0/eval.json",
    "iter0/eval_samples.json",
    "iter2/answers.jsonl",
    *(f"iter{t}/{name}" for t in (1, 2) for name in EVERY),
]

# ------------------------------------------------------------------------------- the cycle


def test_the_cycle_runs_from_end_to_end(finished, world):
    out, text = finished
    result = last_json(text)
    assert len(result["scores"]) == 3
    assert all(0 <= score <= 1 for score in result["scores"])
    assert result["scores"][1] > result["scores"][0] + 0.1, (
        "one iteration helps in this world, or something is wired wrongly"
    )
    assert result["seconds"] > 0
    assert Path(result["run_dir"]) == out
    assert result["pairs"] == [16, 16]
    scores = [load_json(out / f"iter{t}" / "eval.json")["score"] for t in range(3)]
    assert scores == pytest.approx(result["scores"], abs=1e-4)

    # what is printed: the run first, the table at the end
    assert f"\n2 iterations from M_0 = {world['model']}, run directory {out}\n" in text
    assert "\niteration 1 of 2\n" in text
    assert re.search(r"\niteration 2 of 2, about \d+ min left\n", text)
    table = text[text.index("\niterations of") :].splitlines()
    assert table[2].split()[0] == "t"
    assert [line.split()[0] for line in table[3:5]] == ["1", "2"]


def test_a_run_keeps_its_options_and_its_inputs(finished, world):
    out, _ = finished
    config = load_json(out / "config.json")
    assert config["iters"] == 2
    assert config["policy"]["batch"] == micro.OPTIONS["policy"]["batch"]
    o = parse_options(loop.Options, ["--config", str(out / "config.json")])
    assert o == parse_options(loop.Options, flags(world, out))
    for name in ("seeds", "heldout"):
        assert read_jsonl(out / f"{name}.jsonl") == read_jsonl(world[name])

    # what differs from the defaults, for the report
    changed = {
        name: (value, default) for name, value, default, _ in load_json(out / "changed.json")
    }
    assert changed["policy.nll"] == (0.5, 0.0)
    assert changed["iters"] == (2, 4)
    assert changed["dtype"] == ("float32", "bfloat16")
    assert "policy.beta" not in changed


def test_every_stage_leaves_a_manifest_and_a_line_of_metrics(finished, world):
    out, _ = finished
    wanted = {str(manifest_path(out / name).relative_to(out)) for name in RESULTS}
    assert wanted == stamps(out).keys()
    for name in RESULTS:
        made = read_manifest(out / name)
        assert made["counts"]["seconds"] >= 0
        assert made["processes"] == 1
        assert made["options"]["dtype"] == "float32"
        assert made["paths"]
        if not name.endswith("improver"):  # its weights are gone
            assert made["content"] == content_hash(out / name)
    prompts = out / "iter2" / "prompts.jsonl"
    assert counts(prompts)["prompts"] == len(read_rows(prompts))

    *lines, one, two = read_rows(out / "metrics.jsonl")
    assert [one["stage"], two["stage"]] == ["iter1/diagnostics", "iter2/diagnostics"]
    assert two["uptake"] == two["gain"] / two["gap"] or two["gap"] <= 0
    times = [line["time"] for line in lines]
    assert times == sorted(times)
    stages = {line["stage"]: line for line in lines}
    assert stages.keys() == {re.sub(r"\.jsonl?$", "", name) for name in RESULTS}
    assert stages["iter2/improver"]["paths"]["model"] == world["model"]


def test_data_flow_is_the_papers(finished, world):
    """Algorithm 1, by fingerprints of models and by texts."""
    out, _ = finished
    one, two = out / "iter1", out / "iter2"
    M_0, M_1 = content_hash(Path(world["model"])), content_hash(one / "policy")
    assert M_1 != M_0

    # R_t and M_t start from M_0; the reference and the rejected answers are M_0's
    for folder in (one, two):
        for name in ("improver", "policy"):
            assert inputs(folder / name)["model"] == M_0
            assert read_manifest(folder / name)["paths"]["model"] == world["model"]
        assert inputs(folder / "policy")["reference"] == M_0
        assert inputs(folder / "base_answers.jsonl")["model"] == M_0
        improver = read_manifest(folder / "improver")
        assert inputs(folder / "rewrites.jsonl")["improver"] == improver["content"]
        seed_answers = read_manifest(folder / "seed_answers.jsonl")
        assert improver["inputs"]["answers"] == seed_answers["content"]

    # R_t reads M_{t-1}'s answers: M_0's own at first, sampled once
    assert not (one / "answers.jsonl").exists()
    assert inputs(one / "seed_answers.jsonl")["model"] == M_0
    assert inputs(two / "seed_answers.jsonl")["model"] == M_1
    assert inputs(two / "answers.jsonl")["model"] == M_1
    assert responses(one / "rewrites.jsonl", "draft") == responses(one / "base_answers.jsonl")
    assert responses(two / "rewrites.jsonl", "draft") == responses(two / "answers.jsonl")
    assert responses(two / "answers.jsonl") != responses(two / "base_answers.jsonl")

    # G is trained once; D is the union
    G = read_manifest(out / "generator")["content"]
    assert [inputs(folder / "prompts.jsonl")["generator"] for folder in (one, two)] == [G, G]
    D = [read_manifest(folder / "pairs.jsonl")["content"] for folder in (one, two)]
    assert inputs(one / "policy")["pairs"] == {"0": D[0]}
    assert inputs(two / "policy")["pairs"] == {"0": D[0], "1": D[1]}
    assert [counts(folder / "policy")["pairs"] for folder in (one, two)] == [16, 32]


@pytest.mark.parametrize("t", [1, 2])
def test_pairs_are_rewrites_over_base_answers(finished, world, t):
    folder = finished[0] / f"iter{t}"
    pairs = read_rows(folder / "pairs.jsonl")
    asked = responses(folder / "prompts.jsonl", "prompt")
    base = responses(folder / "base_answers.jsonl")
    rewrites = responses(folder / "rewrites.jsonl")
    for pair in pairs:
        texts = (pair["prompt"], pair["chosen"], pair["rejected"])
        assert texts == (asked[pair["id"]], rewrites[pair["id"]], base[pair["id"]])
        assert pair["iteration"] == t
    seeds = {row["id"] for row in read_jsonl(world["seeds"])}
    assert seeds.isdisjoint(pair["id"] for pair in pairs)


def test_prompts_are_new_in_every_iteration(finished, world):
    seen = []
    for name in ("seeds", "heldout"):
        seen += [row["prompt"].lower() for row in read_rows(world[name])]
    lists = []
    for t in (1, 2):
        rows = read_rows(finished[0] / f"iter{t}" / "prompts.jsonl")
        assert len(rows) > 20
        seen += [row["prompt"].lower() for row in rows]
        lists.append({tuple(row["keywords"]) for row in rows})
    assert len(set(seen)) == len(seen)
    assert lists[0] != lists[1], "fresh keyword lists"
    dropped = counts(finished[0] / "iter2" / "prompts.jsonl")
    assert dropped["repeats_earlier"] > 0, "nothing was there to drop"


def test_an_improvers_weights_go_and_the_reference_cache_stays(finished):
    out, text = finished
    for t in (1, 2):
        improver = out / f"iter{t}" / "improver"
        assert read_manifest(improver)["discarded"]
        assert not list(improver.glob("*.safetensors"))
        assert list((out / f"iter{t}" / "policy").glob("*.safetensors"))
    assert not list(out.glob("**/*.partial"))
    assert not list(out.glob("**/*.tmp"))
    assert not list(out.glob("**/checkpoint"))

    # equal texts have one entry
    (none, first), (cached, second) = cached_and_computed(text)
    assert (none, cached) == (0, first)
    assert 0 < second <= 2 * 16
    blocks = [read_part(file) for file in (out / "reference").glob("*/*.part")]
    assert sum(map(len, blocks)) == first + second


# ------------------------------------------------------------------------------- a second call


def test_a_second_call_does_nothing_again(copy, world, finished, monkeypatch):
    def never(*args):
        raise AssertionError("weights are read")

    monkeypatch.setattr(checkpoint, "load_weights", never)
    monkeypatch.setattr(train, "load_weights", never)
    before = stamps(copy)
    result = go(world, copy)
    assert stamps(copy) == before
    first = last_json(finished[1])
    for name in ("scores", "pairs", "tokens"):
        assert result[name] == first[name]


@pytest.mark.slow
def test_more_iters_extend_a_run(copy, world, finished):
    before = stamps(copy)
    scores = last_json(finished[1])["scores"]
    result = go(world, copy, "--iters", "3")
    after = stamps(copy)
    assert result["scores"][:3] == scores
    assert len(result["scores"]) == 4
    assert {name: after[name] for name in before} == before
    assert counts(copy / "iter3" / "policy")["pairs"] == 48
    again = parse_options(loop.Options, ["--config", str(copy / "config.json")])
    assert again.iters == 3, "config.json is what reproduces the run"


@pytest.mark.parametrize(
    ("flag", "new", "refused", "why", "difference"),
    [
        (
            "--policy.lr",
            "0.25",
            "iter1/policy",
            "option lr = 0.0005, now 0.25",
            "policy.lr 0.0005 -> 0.25",
        ),
        (
            "--policy.beta",
            "0.5",
            "iter1/policy",
            "option loss_parameters = {'beta': 0.1",
            "policy.beta 0.1 -> 0.5",
        ),
        (
            "--pairs.threshold",
            "0.5",
            "iter1/pairs.jsonl",
            "option threshold = -3.0, now 0.5",
            "pairs.threshold -3.0 -> 0.5",
        ),
        (
            "--seed",
            "7",
            "iter0/heldout_answers.jsonl",
            "option seed = 0, now 7",
            "seed 0 -> 7",
        ),
        (
            "--rejected",
            "previous",
            "iter2/pairs.jsonl",
            "input rejected = ",
            "rejected base -> previous",
        ),
        (
            "--start",
            "previous",
            "iter2/policy",
            "input model = ",
            "start base -> previous",
        ),
        (
            "--data",
            "fresh",
            "iter2/policy",
            "input pairs = ",
            "data cumulative -> fresh",
        ),
    ],
)
def test_a_changed_option_is_an_error(copy, world, finished, flag, new, refused, why, difference):
    """It names the result, what changed, and how the options differ from those of the run."""
    before = stamps(copy)
    code, _, errors = call(world, copy, flag, new)
    message = one_line(code, errors)
    assert message.startswith(f"{copy / refused}: made with {why}")
    assert "another --out" in message
    assert f"(options that differ from {copy / 'config.json'}: " in message
    assert difference in message
    assert stamps(copy) == before
    for name in ("config.json", "changed.json"):
        assert load_json(copy / name) == load_json(finished[0] / name), "they are of the run"


def without_last_policy(run_directory: Path) -> Path:
    """Undo the last iteration's policy and what came after it; returns where it was."""
    for name in ("heldout_answers.jsonl", "eval.json"):
        (run_directory / "iter2" / name).unlink()
        manifest_path(run_directory / "iter2" / name).unlink()
    shutil.rmtree(run_directory / "iter2" / "policy")
    return run_directory / "iter2" / "policy"


@pytest.mark.slow
def test_a_stopped_stage_resumes_where_it_was(copy, world, finished, monkeypatch):
    """Stopped after five of eight steps: three are left, and the weights are the same bytes."""
    policy = without_last_policy(copy)
    scratch = policy.with_name("policy.partial")
    real = train.train_step
    done = []

    def step(*args, **how):
        if len(done) == 5:
            done.append("stop")
            raise KeyboardInterrupt
        done.append("step")
        return real(*args, **how)

    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(KeyboardInterrupt):
        call(world, copy)
    assert not manifest_path(policy).exists()
    assert (scratch / "checkpoint" / "5" / "done").is_file()
    go(world, copy)
    assert done == ["step"] * 5 + ["stop"] + ["step"] * 3
    assert not scratch.exists()
    whole = finished[0] / "iter2" / "policy" / "model.safetensors"
    assert (policy / "model.safetensors").read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_a_checkpoint_is_not_resumed_with_other_options(copy, world):
    """Half a policy trained at one learning rate must not be finished at another."""
    policy = without_last_policy(copy)
    scratch = policy.with_name("policy.partial")
    step = scratch / "checkpoint" / "1"
    step.mkdir(parents=True)  # not a readable checkpoint: resuming from it would raise
    write_part(step / "done", {"files": {}, "metrics": ""})
    identity = {"inputs": {}, "options": {"lr": 123}}
    write_part(scratch / "identity.part", {"identity": identity, "machine": {}})
    go(world, copy)
    assert len(read_rows(policy / "metrics.jsonl")) == counts(policy)["steps"] == 8


# Forks loop.py, which sends itself a signal before its n-th event: a file's replacement or removal,
# or a training step. Counting events, not seconds, makes it independent of the machine's speed.
KILLER = """
import os
import shutil
import signal
import sys
from pathlib import Path

signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in `pytest &`
root, out, kills, *argv = sys.argv[1:]
sys.path.insert(0, root)
import loop  # once: a fork has it all
import train
from plumbing.options import cli


def kill_before(module, name, left, number):
    real = getattr(module, name)

    def event(*args, **how):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)
        return real(*args, **how)

    setattr(module, name, event)


def start(n, number=0):
    pid = os.fork()
    if pid == 0:
        left = [n]
        events = (os, "replace"), (os, "unlink"), (shutil, "rmtree"), (train, "train_step")
        for module, name in events:
            kill_before(module, name, left, number)
        sys.argv = ["loop.py", *argv]
        cli(loop.main, default_config="recipes/demo.toml")
        os._exit(0)
    return os.waitpid(pid, 0)[1]


for kill in kills.split(","):
    status = start(*map(int, kill.split(":")))
    print("KILLED", status, [str(path) for path in Path(out).glob("**/*.partial")], flush=True)
print("END", start(0), flush=True)
"""


def run_with_signals(world, out: Path, signals: str) -> tuple[list[str], str, str]:
    """loop.py, started again after each of signals, "EVENT:NUMBER,...": what KILLER says of every
    start, all output, all errors.
    """
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(ROOT), str(out), signals, *flags(world, out)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(("KILLED", "END"))]
    return lines, done.stdout, done.stderr


@pytest.mark.slow
def test_ten_kills_change_nothing(finished, world, tmp_path):
    """kill -9 at random moments, then the same command again: the same bytes as a run in peace."""
    peace, out = finished[0], tmp_path / "killed"
    kills = ",".join(f"{n}:9" for n in random.Random(1).sample(range(5, 40), 10))
    lines, text, errors = run_with_signals(world, out, kills)
    assert lines[-1] == "END 0", errors[-2000:]
    left = [line.split(maxsplit=2)[1:] for line in lines[:-1]]
    assert [status for status, _ in left] == ["9"] * 10, "it ended before it was killed"
    assert sum(folders != "[]" for _, folders in left) >= 5, "few were in the middle of a stage"

    # texts, weights and metrics
    names = ["prompts.jsonl", "pairs.jsonl", "rewrites.jsonl", "heldout_answers.jsonl"]
    for t in (1, 2):
        for name in [*names, "policy/model.safetensors"]:
            whole = peace / f"iter{t}" / name
            assert (out / f"iter{t}" / name).read_bytes() == whole.read_bytes(), (t, name)
        assert not list((out / f"iter{t}" / "improver").glob("*.safetensors"))
        policies = [where / f"iter{t}" / "policy" for where in (out, peace)]
        ours, theirs = (steps_of(policy) for policy in policies)
        assert ours == theirs, "a step that was repeated must stand there once"
    weights = [where / "generator" / "model.safetensors" for where in (out, peace)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    result = last_json(text.split("\nEND")[0])
    assert result["scores"] == last_json(finished[1])["scores"]
    assert stamps(out).keys() == stamps(peace).keys()
    for pattern in ("**/*.partial", "**/*.tmp"):
        assert not list(out.glob(pattern))


@pytest.mark.slow
def test_an_interrupted_run_ends_with_one_line(finished, world, tmp_path):
    """Wherever SIGINT (2) or SIGTERM (15) comes; the same command finishes what is left."""
    peace, out = finished[0], tmp_path / "interrupted"
    lines, _, errors = run_with_signals(world, out, "1:2,2:15,3:15,12:2,25:15")
    exits = [os.waitstatus_to_exitcode(int(line.split()[1])) for line in lines]
    assert exits == [130, 143, 143, 130, 143, 0]
    assert errors == "interrupted; rerun the same command to resume\n" * 5
    name = "iter2/policy/model.safetensors"
    assert (out / name).read_bytes() == (peace / name).read_bytes()


@pytest.mark.slow
@pytest.mark.ranks
def test_interrupted_ranks_leave_one_line_and_nothing_running(world, tmp_path):
    """Ctrl-C to torchrun, which passes it on to its processes as SIGTERM."""
    out = tmp_path / "out"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*torchrun, "loop.py", *flags(world, out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
    )
    for line in process.stdout:
        if "iteration 1 of" in line:
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.is_file():
        process.kill()
        pytest.skip("needs Linux's /proc, to find torchrun's processes")
    ranks = [int(pid) for pid in children.read_text().split()]
    assert len(ranks) == 2
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert errors.count("interrupted; rerun the same command to resume\n") == 1
    assert 'loop.py", line' not in errors, "a rank's traceback"
    for pid in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def steps_of(policy: Path) -> list[dict]:
    names = ("step", "loss", "grad_norm", "lr")
    return [{name: row[name] for name in names} for row in read_rows(policy / "metrics.jsonl")]


# ------------------------------------------------------------------------------- processes


@pytest.mark.ranks
@pytest.mark.slow
def test_two_processes_run_the_cycle_and_sample_the_same_bytes(finished, world, tmp_path):
    """From one given generator and one given M_0, two processes write what one process wrote."""
    alone, out = finished[0], tmp_path / "two"
    shutil.copytree(alone / "generator", out / "generator")
    code, text, errors = run_process(["loop.py", *flags(world, out)], nproc=2)
    assert code == 0, errors[-3000:]
    result = last_json(text)
    assert len(result["scores"]) == 3
    assert result["scores"][1] > result["scores"][0] + 0.1
    assert re.search(r"generator +up to date", text)
    for name in (
        "iter0/heldout_answers.jsonl",
        "iter1/prompts.raw.jsonl",
        "iter1/prompts.jsonl",
        "iter1/seed_answers.jsonl",
        "iter1/base_answers.jsonl",
    ):
        assert (out / name).read_bytes() == (alone / name).read_bytes(), name
        if "raw" not in name:
            assert read_manifest(out / name)["processes"] == 2
    raw = read_rows(out / "iter1" / "prompts.raw.jsonl")
    assert len(raw) > micro.SAMPLING["chunk"], "one chunk would be no test"
    metrics = [where / "iter1" / "improver" / "metrics.jsonl" for where in (out, alone)]
    losses = [read_rows(file)[0]["loss"] for file in metrics]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert stamps(out).keys() == stamps(alone).keys()


@pytest.mark.ranks
@pytest.mark.slow
def test_two_processes_end_with_one_line_on_bad_input(world, tmp_path):
    argv = flags(world, tmp_path / "out", "--seeds", "nowhere.jsonl")
    code, _, errors = run_process(["loop.py", *argv], nproc=2)
    assert code != 0
    assert f'File "{ROOT / "loop.py"}"' not in errors  # torchrun has a traceback of its own
    # by rank 0; a warning of torch's, written piece by piece, may stand before it on its line
    said = re.findall(r"(?<!\[rank 1\] )error: (.*)", errors)
    assert len(said) == 1, errors
    assert said[0].startswith("nowhere.jsonl: no such file")


# ------------------------------------------------------------------------------- benchmarks


def benchmark_options(tmp_path: Path, world, **more) -> str:
    """The file of --eval-options for a comparison of every M_t with M_0; returns its name."""
    rows = [{"prompt": row["prompt"]} for row in read_rows(world["heldout"])[:4]]
    prompts = write_rows(tmp_path / "prompts.jsonl", rows)
    given = {
        "data": str(prompts),
        "against": world["model"],
        "scorer": "likelihood",
        "max_new_tokens": 8,
        **more,
    }
    write_json(tmp_path / "options.json", {"head_to_head": given})
    return str(tmp_path / "options.json")


@pytest.mark.slow
def test_benchmarks_of_every_model(world, copy, tmp_path):
    """--eval on a finished run adds what it names: the same prompts and seeds for every model."""
    more = ["--eval", "head_to_head", "--eval-options", benchmark_options(tmp_path, world)]
    go(world, copy, *more)
    folders = [copy / f"iter{t}" / "eval" / "head_to_head" for t in range(3)]
    results = [load_json(folder / "result.json") for folder in folders]
    first = results[0]  # M_0 against itself
    assert (first["score"], first["draws"], first["prompts"]) == (50, 4, 4)
    assert all(result["prompts"] == 4 for result in results)
    assert results[1]["words"] != results[0]["words"]
    models = [Path(world["model"]), copy / "iter1" / "policy", copy / "iter2" / "policy"]
    measured = [inputs(folder / "result.json")["model"] for folder in folders]
    assert measured == [content_hash(model) for model in models]
    answers = [read_rows(folder / "against.jsonl") for folder in folders]
    assert answers[0] == answers[1] == answers[2]

    text = call(world, copy, *more)[1]
    assert len(re.findall(r"iter\d/eval/head_to_head/result.json +up to date", text)) == 3
    assert "head_to_head" in (copy / "report.html").read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "must hold options by benchmark"),
        ('{"ifeval": 1}', "must hold options by benchmark"),
        ('{"ifeval": {"model": "m"}}', "ifeval: model is set by the run; leave it out"),
    ],
)
def test_wrong_files_of_benchmark_options(tmp_path, text, said):
    path = tmp_path / "options.json"
    path.write_text(text)
    assert said in refusal(check, "ifeval", str(path))


def test_a_benchmarks_own_options_win_over_the_runs():
    of_run = RunOptions(seed=1, dtype="float32")
    o = options_of("ifeval", {"seed": 7, "data": "d"}, of_run, model="m")
    assert (o.model, o.data, o.run.seed, o.run.dtype) == (Path("m"), Path("d"), 7, "float32")


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ("alpaca", {}, "--eval alpaca: no such benchmark; there are alpaca_eval, arena_hard"),
        ("judge", {}, "--eval judge: no such benchmark"),
        ("benchmark", {}, "--eval benchmark: no such benchmark"),
        (
            "head_to_head",
            {"against": ""},
            "--eval head_to_head: its option against is missing; give --eval-options",
        ),
        ("ifeval,head_to_head", {}, "--eval ifeval: its option data is missing"),
        ("head_to_head", {"datta": "x"}, "unrecognized arguments: --datta=x"),
        (
            "head_to_head",
            {"data": "nowhere.jsonl"},
            "head_to_head: no file or directory nowhere.jsonl",
        ),
        ("ifeval", {}, "options for head_to_head, which --eval does not name"),
    ],
)
def test_benchmarks_that_do_not_exist(world, tmp_path, names, options, message):
    given = benchmark_options(tmp_path, world, **options)
    code, _, errors = call(world, tmp_path / "out", "--eval", names, "--eval-options", given)
    assert code == 2
    assert message in errors
    assert not (tmp_path / "out" / "generator").exists()


# ------------------------------------------------------------------------------- switches

SWITCHES = (
    "--rejected previous --start previous --data fresh --generator.noise 0 --policy.loss simpo "
    "--policy.beta 2 --pairs.scorer none --keep-improvers --evaluate= --heldout="
)


@pytest.fixture(scope="module")
def switched(world, tmp_path_factory) -> tuple[Path, str, list[dict]]:
    """A run with all that the paper left untested: (run directory, output, G's training data).

    The finished run is the other side of each switch.
    """
    trained = []
    real = gen_prompts.sft

    def sft(model, rows, *rest):
        trained.extend(rows)
        return real(model, rows, *rest)

    out = tmp_path_factory.mktemp("runs") / "switched"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gen_prompts, "sft", sft)
        code, text, errors = call(world, out, *SWITCHES.split())
    assert code == 0, errors
    return out, text, trained


def test_rejected_previous(switched):
    two = switched[0] / "iter2"
    drafts = responses(two / "answers.jsonl")
    base = responses(two / "base_answers.jsonl")
    pairs = read_rows(two / "pairs.jsonl")
    assert all(pair["rejected"] == drafts[pair["id"]] for pair in pairs)
    assert any(drafts[pair["id"]] != base[pair["id"]] for pair in pairs)


def test_start_previous(switched, world):
    """R_t and the reference stay M_0."""
    one, two = switched[0] / "iter1", switched[0] / "iter2"
    M_0, M_1 = content_hash(Path(world["model"])), content_hash(one / "policy")
    assert [inputs(folder / "policy")["model"] for folder in (one, two)] == [M_0, M_1]
    started = [read_manifest(folder / "policy")["paths"]["model"] for folder in (one, two)]
    assert started == [world["model"], str(one / "policy")]
    assert inputs(two / "policy")["reference"] == M_0
    assert inputs(two / "improver")["model"] == M_0


def test_data_fresh(switched):
    two = switched[0] / "iter2"
    assert inputs(two / "policy")["pairs"] == {"0": content_hash(two / "pairs.jsonl")}
    assert counts(two / "policy")["pairs"] == len(read_rows(two / "pairs.jsonl"))


def words_of(row: dict) -> list[str]:
    """The keywords in a record of G's training data."""
    return row["prompt"].removeprefix("Ask about: ").removesuffix(".").split(", ")


def noise_in(row: dict) -> int:
    """How many keywords are not of the prompt that is to be written."""
    question = row["response"].split("</question>")[0]
    return sum(word not in question for word in words_of(row))


def test_noise_0(switched):
    trained = switched[2]
    assert len(trained) == 80
    assert [len(words_of(row)) for row in trained] == [3] * 80
    assert [noise_in(row) for row in trained] == [0] * 80


def test_the_noise_keyword_is_there_by_default(world):
    o = gen_prompts.GeneratorOptions(**micro.OPTIONS["generator"])
    rows = gen_prompts.training_rows(read_jsonl(world["seeds"]), o)
    assert [noise_in(row) for row in rows] == [1] * len(rows)


def test_simpo_has_no_reference(switched):
    """The first loss is that of margin 1.6 at a small difference, not ln 2."""
    out, text, _ = switched
    assert not (out / "reference").exists()
    assert "reference log-probs" not in text
    policy = out / "iter1" / "policy"
    assert read_manifest(policy)["options"]["loss"] == "simpo"
    assert read_manifest(policy)["options"]["loss_parameters"]["beta"] == 2
    first = read_rows(policy / "metrics.jsonl")[0]
    assert abs(first["preference_loss"] - 0.693) > 0.1
    assert first["rewards/margins"] != 0


def test_no_scorer_no_scores(switched):
    for pair in read_rows(switched[0] / "iter2" / "pairs.jsonl"):
        assert pair["score_chosen"] is None
        assert pair["score_rejected"] is None


def test_kept_improvers_and_no_evaluation(switched):
    out, text, _ = switched
    for t in (1, 2):
        assert list((out / f"iter{t}" / "improver").glob("*.safetensors"))
    assert last_json(text)["scores"] == []
    assert not (out / "iter0").exists()


MORE = """\
from formats.records import read_jsonl
from plumbing.files import write_jsonl


def note(rows):
    return [{"failed": f"{len(row['response'])} letters"} for row in rows]


def more(run, t):
    out = run.iter(t) / "seed_pairs.jsonl"
    rows = []
    for seed in read_jsonl(run.seeds)[:4]:
        rows.append({**seed, "chosen": seed["response"], "rejected": "um"})
    write_jsonl(out, rows)
    return [out]
"""


def test_own_prompts_feedback_and_further_pairs(world, tmp_path):
    """Without a corpus; a prompt's own fields reach its pair."""
    prompts = read_rows(world["seeds"])[:6]
    for i, row in enumerate(prompts):
        prompts[i] = {"prompt": row["prompt"].replace("Show", "Tell"), "kind": i}
    source = write_rows(tmp_path / "own.jsonl", prompts)
    plugin = tmp_path / "mine.py"
    plugin.write_text(MORE)
    own = ["--iters", "1", "--corpus=", "--prompts.source", str(source)]
    own += ["--more-pairs", f"{plugin}:more", "--pairs.threshold", "-9", "--pairs.max-repetition=1"]
    own += ["--improver.feedback", f"{plugin}:note"]
    own += ["--improver.template", "{failed} {draft}\n{prompt}"]
    out = tmp_path / "run"
    go(world, out, *own)
    assert not (out / "generator").exists()
    one = out / "iter1"
    assert [row["prompt"] for row in read_rows(one / "prompts.jsonl")] == [
        row["prompt"] for row in prompts
    ]

    # what R read
    draft = read_rows(one / "base_answers.jsonl")[0]
    request = read_rows(one / "rewrites.candidates.jsonl")[0]["prompt"]
    text = draft["response"]
    assert request == f"{len(text)} letters {text}\n{prompts[0]['prompt']}"

    # the pairs, and those that came from the function
    pairs = read_rows(one / "pairs.jsonl")
    assert pairs and all(row["prompt"] == prompts[row["kind"]]["prompt"] for row in pairs)
    assert counts(one / "policy")["pairs"] == len(pairs) + 4


ALPACA = {"instruction": "Show how a red fox can jump.", "input": "", "output": "It can jump."}


@pytest.mark.slow
def test_three_flags_reach_a_first_iteration(tmp_path):
    """A random Qwen3, seeds in Alpaca's layout, a config; keywords come from the seeds."""
    model = tiny_checkpoint(
        tmp_path / "qwen3", architectures=["Qwen3ForCausalLM"], head_dim=16, hidden_size=16
    )
    rows = []
    for i, (adjective, noun) in enumerate(zip(micro.ADJECTIVES, micro.NOUNS, strict=True)):
        text = f"Show how a {adjective} {noun} can {micro.VERBS[i % 8]}."
        rows.append({**ALPACA, "instruction": text})
    (tmp_path / "seeds.json").write_text(json.dumps(rows, indent=2))
    config = {**micro.OPTIONS, "iters": 1, "evaluate": ""}
    # a random model writes no question
    config["prompts"] = {"source": str(write_rows(tmp_path / "x.jsonl", [{"prompt": "A b c d?"}]))}
    config["pairs"] = {"scorer": "none", "keep_cut_off": True, "max_repetition": 1.0}
    config["rewrites"] = config["answers"] = {"max_new_tokens": 4}
    write_json(tmp_path / "config.json", config)
    three = ["--model", model, "--seeds", tmp_path / "seeds.json"]
    three += ["--config", tmp_path / "config.json"]
    code, text, errors = run(["loop.py", *three, "--out", tmp_path / "out"])
    assert code == 0, errors
    assert (tmp_path / "out" / "iter1" / "policy" / "model.safetensors").is_file()
    assert "iteration 1 of 1" in text


@pytest.mark.slow
def test_without_a_corpus_keywords_come_from_the_seeds(world, tmp_path):
    out = tmp_path / "run"
    go(world, out, "--iters", "1", "--corpus=")
    words = set(re.findall(r"\w+", (out / "seeds.jsonl").read_text()))
    prompts = read_rows(out / "iter1" / "prompts.jsonl")
    assert prompts and all(set(row["keywords"]) <= words for row in prompts)
    _, text, _ = call(world, out, "--iters", "1", "--corpus=")
    assert re.search(r"iter1/prompts.jsonl +up to date", text)


def test_a_model_of_ones_own_turns_the_demos_recipe_off(tiny):
    code, _, errors = run(["loop.py", "--model", tiny])
    assert one_line(code, errors).startswith("--seeds is needed")


@pytest.mark.slow
def test_one_shot_has_the_whole_budget_in_one_iteration(world, tmp_path):
    out = tmp_path / "shot"
    code, text, errors = call(world, out, "--one-shot", "--policy.epochs", "1")
    assert code == 0, errors
    assert "\n1 iterations from M_0" in text
    assert not (out / "iter2").exists()
    made = read_manifest(out / "iter1" / "prompts.jsonl")
    assert (made["options"]["lists"], made["options"]["max_prompts"]) == (128, 80)
    assert made["counts"]["lists"] == 128
    result = last_json(text)
    assert result["pairs"] == [32] == [len(read_rows(out / "iter1" / "pairs.jsonl"))]
    assert len(result["scores"]) == 2


@pytest.mark.slow
def test_seeds_limit_and_heldout_limit(world, tmp_path):
    out = tmp_path / "few"
    limits = ["--seeds-limit", "6", "--heldout-limit", "3"]
    result = go(world, out, *limits, "--iters", "1", "--improver.drafts", "2")
    assert counts(out / "generator")["seeds"] == 6
    assert len(result["scores"]) == 2
    assert len(read_rows(out / "seeds.jsonl")) == 6
    assert len(read_rows(out / "iter1" / "seed_answers.jsonl")) == 12
    assert counts(out / "iter1" / "improver")["examples"] == 12
    assert len(read_rows(out / "iter1" / "heldout_answers.jsonl")) == 3


# ------------------------------------------------------------------------------- bad input


def given(*argv: str):
    """Flags that are wrong in any world."""
    return lambda world, folder: list(argv)


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


def without_config(model: Path) -> None:
    (model / "config.json").unlink()


def without_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def without_shard(model: Path) -> None:
    names = safe_open(model / "model.safetensors", framework="pt").keys()
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    write_json(model / "model.safetensors.index.json", {"weight_map": files})


def without_template(model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    settings = load_json(model / "tokenizer_config.json")
    write_json(model / "tokenizer_config.json", {**settings, "chat_template": None})


def truncated(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def few_seeds(world, folder):
    rows = read_rows(world["seeds"])[:1]
    return ["--seeds", str(write_rows(folder / "one.jsonl", rows))]


def corpus_of(text: str):
    def change(world, folder):
        (folder / "corpus.txt").write_text(text)
        return ["--corpus", str(folder / "corpus.txt")]

    return change


def config_with(**more):
    def change(world, folder):
        write_json(folder / "config.json", {**micro.OPTIONS, **more})
        return ["--config", str(folder / "config.json")]

    return change


def empty_file(world, folder):
    (folder / "empty.jsonl").touch()
    return ["--seeds", str(folder / "empty.jsonl")]


def latin_1(world, folder):
    good = b'{"prompt": "a", "response": "b"}\n'
    (folder / "latin.jsonl").write_bytes(good + b'{"prompt": "caf\xe9", "response": "b"}\n')
    return ["--seeds", str(folder / "latin.jsonl")]


def folder_as_model(world, folder):
    (folder / "model").mkdir()
    return ["--model", str(folder / "model")]


def no_folder_as_model(world, folder):
    return ["--model", str(folder / "a" / "b")]


def file_as_out(world, folder):
    (folder / "file").touch()
    return ["--out", str(folder / "file")]


def copied_model(world, folder):
    shutil.copytree(world["model"], folder / "model")
    return folder / "model"


def model_as_out(world, folder):
    model = copied_model(world, folder)
    return ["--model", str(model), "--out", str(model)]


def out_in_the_model(world, folder):
    model = copied_model(world, folder)
    return ["--model", str(model), "--out", str(model / "run")]


def seeds_in_out(world, folder):
    (folder / "data").mkdir()
    shutil.copy(world["seeds"], folder / "data" / "seeds.jsonl")
    return ["--seeds", str(folder / "data/seeds.jsonl"), "--out", str(folder / "data")]


def files_of_others_in_out(world, folder):
    (folder / "data").mkdir()
    (folder / "data" / "seeds.jsonl").write_text("mine")
    return ["--out", str(folder / "data")]


def files_of_others_where_data_is_made(world, folder):
    (folder / "project" / "data").mkdir(parents=True)
    (folder / "project" / "data" / "seeds.jsonl").write_text("mine")
    return ["--out", str(folder / "project"), "--prepare", "demo/sorting.py:prepare"]


def model_as_scorer(world, folder):
    return ["--pairs.scorer", world["model"]]


def judge_of_rewrites(world, folder):
    return ["--rewrites.scorer", f"judge:{world['model']}"]


def judge_of_improvers(world, folder):
    """Itself no error, so the next one is reported."""
    return ["--improver.scorer", f"judge:{world['model']}", "--rewrites.scorer", "nowhere"]


LONG = json.dumps({"prompt": "Show how a red fox can jump. " * 30, "response": "No."})
BAD = {
    # files
    "no seeds file": (
        given("--seeds", "nowhere.jsonl"),
        "nowhere.jsonl: no such file; check the path",
    ),
    "empty seeds file": (empty_file, "empty.jsonl: no records; give"),
    "malformed line": (
        seeds_with('{"prompt": "a'),
        "seeds.jsonl: line 3 is not valid JSON .*; fix or delete",
    ),
    "empty prompt": (
        seeds_with('{"prompt": " ", "response": "b"}'),
        "seeds.jsonl: line 3: field 'prompt' is .*; fix",
    ),
    "not UTF-8": (latin_1, "latin.jsonl: line 2 is not UTF-8; "),
    "no response": (
        seeds_with('{"prompt": "a"}'),
        "seeds.jsonl: line 3: field 'response' is missing.*; fix or delete",
    ),
    "not a record": (
        seeds_with('["a", "b"]'),
        "seeds.jsonl: line 3: not an object.*; fix or delete",
    ),
    "long prompt": (
        seeds_with(LONG),
        r"seeds.jsonl: line 3: field 'prompt' has \d+ tokens .* 128 positions; shorten",
    ),
    "too few seeds": (few_seeds, "only 1 of 1 have 2 keywords; give more seeds"),
    "no heldout file": (
        given("--heldout", "nowhere.jsonl"),
        "nowhere.jsonl: no such file; check the path",
    ),
    "no corpus": (given("--corpus", "nowhere.txt"), "nowhere.txt: no such file; check the path"),
    "no keywords": (
        corpus_of("The the of and.\n\nIt is so."),
        "corpus.txt: none of its 2 paragraphs .*; give",
    ),
    "a file in the way": (file_as_out, "/file: holds what this program has not made; give"),
    "out is the model": (model_as_out, "model: overlaps with the input .*/model; give"),
    "out within the model": (out_in_the_model, "run: overlaps with the input .*/model; give"),
    "seeds within out": (seeds_in_out, "data: overlaps with the input .*/data/seeds.jsonl; give"),
    "out of others": (files_of_others_in_out, "/data: holds what this program has not made; give"),
    "data of others": (files_of_others_where_data_is_made, "/project: holds what this program has"),
    # the model
    "no model": (given("--model", ""), "--model is needed"),
    "no checkpoint": (folder_as_model, "model.safetensors: missing; complete the checkpoint"),
    "no directory": (no_folder_as_model, "a/b.*: missing; complete the checkpoint"),
    "no config": (
        model_with(without_config),
        r"not a checkpoint directory \(no config.json\); give",
    ),
    "no weights": (model_with(without_weights), "model.safetensors: missing; complete"),
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
    # options
    "unknown flag": (given("--polcy.lr", "1"), "--polcy.lr"),
    "wrong type": (given("--iters", "two"), "--iters.*two"),
    "wrong choice": (given("--start", "middle"), "--start.*middle"),
    "unknown option": (config_with(polciy={"lr": 1}), "--polciy.lr.*see --help"),
    "unknown option of a section": (config_with(policy={"rate": 1}), "--policy.rate.*see --help"),
    "wrong choice in a config": (config_with(start="middle"), "start.*middle"),
    "no config file": (given("--config", "nowhere.json"), "nowhere.json: no such file"),
    "no iterations": (given("--iters", "0"), "--iters: must be a whole number, at least 1, got 0"),
    "evaluate without heldout": (given("--heldout", ""), "--evaluate .* give --heldout"),
    # names
    "no such evaluation": (given("--evaluate", "alpaka"), "alpaka.*no such file"),
    "no such function": (
        given("--evaluate", "tests/core/micro.py:judge"),
        "micro.py has no function judge",
    ),
    "loss without its samples": (
        given("--policy.loss", "selm"),
        "--loss selm reads sample; give --self-samples",
    ),
    "no such scorer": (
        given("--pairs.scorer", "reward-model"),
        "reward-model: not a scorer's name, and not a directory",
    ),
    "no such scorer of improvers": (
        given("--improver.scorer", "mine.py:score"),
        "mine.py:score: no such file; write",
    ),
    "no such scorer of rewrites": (
        given("--rewrites.scorer", "reward-model"),
        "reward-model: not a scorer's name",
    ),
    "settled without a template": (
        given("--pairs.scorer", "settled", "--improver.template="),
        "--scorer settled asks to revise; give --",
    ),
    "no such filter of prompts": (
        given("--prompts.keep", "mine.py:keep"),
        "mine.py:keep: no such file; write",
    ),
    "no such function to filter prompts": (
        given("--prompts.keep", "tests/core/micro.py:keep"),
        "micro.py has no function keep",
    ),
    "no file of prompts": (
        given("--prompts.source", "nowhere.jsonl"),
        "nowhere.jsonl: no such file",
    ),
    "no such held-out pairs": (
        given("--policy.heldout-pairs", "nowhere.jsonl"),
        "nowhere.jsonl: no such file; check the path",
    ),
    "no such feedback": (
        given("--improver.feedback", "mine.py:note"),
        "mine.py:note: no such file; write",
    ),
    "no such function of pairs": (
        given("--more-pairs", "mine.py:more"),
        "mine.py:more: no such file; write",
    ),
    "scorer without a score": (model_as_scorer, "a scorer needs a sequence-classification"),
    "judge of rewrites": (judge_of_rewrites, "compares two answers; name one that scores each"),
    "judge of improvers": (judge_of_improvers, "nowhere: not a scorer's name"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_before_anything_expensive(case, world, tmp_path):
    change, wanted = BAD[case]
    argv = change(world, tmp_path)
    files = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    code, text, errors = call(world, tmp_path / "out", *argv)
    assert re.search(wanted, one_line(code, errors)), errors
    assert "iterations from M_0" not in text
    assert not list(tmp_path.glob("out/*/")), "something was begun"
    assert all(file.read_bytes() == content for file, content in files.items())


def test_a_log_of_the_command_may_lie_in_out(world, tmp_path):
    """A shell makes it before the command starts."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.log").touch()
    _, _, errors = call(world, tmp_path / "out", "--seeds", "nowhere.jsonl")
    assert "nowhere.jsonl: no such file" in errors


def test_a_run_that_has_begun_takes_its_own_copies(finished, world, tmp_path):
    """Also one that was made before runs marked their directories."""
    out = Path(shutil.copytree(finished[0], tmp_path / "copy"))
    (out / "changed.json").unlink()
    config = (out / "config.json").read_bytes()
    code, text, errors = call(
        world, out, "--seeds", str(out / "seeds.jsonl"), "--pairs.threshold", "7"
    )
    assert "iter1/pairs.jsonl: made with option threshold = " in one_line(code, errors)
    assert (out / "config.json").read_bytes() == config
    assert "up to date" in text


@pytest.mark.slow
def test_bad_input_of_a_real_command(world, tmp_path):
    """By the command line: no result on standard output, one line on standard error, code 2."""
    code, text, errors = run(["loop.py", *flags(world, tmp_path / "out", "--model", str(tmp_path))])
    assert str(tmp_path) in one_line(code, errors)
    assert not any(line.startswith('{"scores"') for line in text.splitlines())


def test_seeds_that_changed_are_an_error(copy, world, tmp_path):
    """A run directory that was made with other seeds."""
    few = write_rows(tmp_path / "few.jsonl", read_rows(world["seeds"])[:10])
    code, _, errors = call(world, copy, "--seeds", str(few))
    message = one_line(code, errors)
    assert message.startswith(f"{few}: its records differ from {copy / 'seeds.jsonl'}")
    assert "another --out" in message
    assert read_jsonl(copy / "seeds.jsonl") == read_jsonl(world["seeds"]), "the run keeps its own"
    code, _, errors = call(world, copy, "--heldout-limit", "3")
    assert "heldout.jsonl: its records differ" in one_line(code, errors)


def test_seeds_may_change_before_the_run_has_begun(world, tmp_path):
    """After a call that was refused; this one is refused for another reason."""
    few = write_rows(tmp_path / "few.jsonl", read_rows(world["seeds"])[:10])
    for seeds in (world["seeds"], str(few)):
        argv = ["--seeds", seeds, "--pairs.scorer", "reward-model"]
        code, _, errors = call(world, tmp_path / "out", *argv)
        assert "reward-model" in one_line(code, errors)
    assert len(read_rows(tmp_path / "out" / "seeds.jsonl")) == 10


def test_no_pair_left_prints_the_score_gaps(copy, world):
    """Running out of pairs is an error with the distribution, and keeps what was finished."""
    shutil.rmtree(copy / "iter2")
    pairs = copy / "iter1" / "pairs.jsonl"
    pairs.unlink()
    manifest_path(pairs).unlink()
    code, _, errors = call(world, copy, "--pairs.threshold", "99")
    last = errors.splitlines()[-1].rpartition("\r")[2]
    assert code == 2
    assert re.search(
        r"pairs.jsonl: no pair of 40 left \(.*small_gap.*\); score gaps( -?\d\S*){5}; lower", last
    )
    assert (copy / "iter1" / "rewrites.jsonl").is_file()
    assert not pairs.exists()


def test_another_seed_draws_other_keyword_lists(world):
    """And no random number comes from the global generator."""
    corpus = Path(world["corpus"])
    drawn = []
    for seed, t in ((0, 1), (0, 1), (1, 1), (0, 2)):
        drawn.append(gen_prompts.keyword_lists(corpus, 3, 64, seed, t))
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert drawn[0] != drawn[3]
    random.seed(123)
    assert gen_prompts.keyword_lists(corpus, 3, 64, 0, 1) == drawn[0]


def test_first_model_scores_and_all_models_are_evaluated_alike(finished, world):
    """`likelihood` is under M_0 in every iteration; held-out prompts have the same random numbers,
    and M_0's answers are what every model is compared with.
    """
    out, _ = finished
    M_0 = content_hash(Path(world["model"]))
    for t in (1, 2):
        for name in ("rewrites", "pairs", "heldout_rewrites"):
            assert inputs(out / f"iter{t}" / f"{name}.jsonl")["base"] == M_0
    base_answers = content_hash(out / "iter0" / "heldout_answers.jsonl")
    for t in range(3):
        folder = out / f"iter{t}"
        answers = read_manifest(folder / "heldout_answers.jsonl")
        assert answers["options"]["purpose"] == "heldout"
        evaluated = inputs(folder / "eval.json")
        assert evaluated["answers"] == answers["content"]
        assert evaluated["base_answers"] == base_answers
        assert evaluated["base"] == M_0

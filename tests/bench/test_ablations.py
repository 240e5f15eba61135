"""bench/ablations.py on the tests' own world: what variants share, stops, failures, figures."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from argparse import Namespace
from pathlib import Path

import micro
import pytest
from bench_helpers import bench_command, run_bench
from conftest import ROOT, last_json, run

import loop
from bench import ablations
from plumbing.files import write_json
from plumbing.options import parse_values

pytest_plugins = ["bench_helpers"]
SOME = "start previous,no noise,controls"


def flags(recipe: Path, out: Path, variants: str) -> list[str]:
    fixed = ["--seeds", "0", "--iters", "2", "--workers", "2"]
    given = ["--recipe", str(recipe), "--out", str(out), *fixed]
    return [*given, "--variants", variants] if variants else given


def options(recipe: Path, out: Path, variants: str) -> Namespace:
    return ablations.parse(flags(recipe, out, variants))


@pytest.fixture(scope="session")
def finished(recipe, tmp_path_factory) -> tuple[Path, str]:
    """Some variants by the command line, without a stop: (directory, standard output)."""
    out = tmp_path_factory.mktemp("ablated")
    more = ["--json", out.parent / f"{out.name}.json"]
    code, text, errors = run_bench("ablations", [*flags(recipe, out, SOME), *more], timeout=1500)
    assert code == 0, errors
    return out, text


def score(path: Path) -> float:
    return json.loads(path.read_text())["score"]


def inode(path: Path) -> int:
    return path.stat().st_ino


SAME = (
    "iter1/prompts.jsonl",
    "iter1/rewrites.jsonl",
    "iter1/pairs.jsonl",
    "iter1/policy/model.safetensors",
    "iter2/prompts.jsonl",
    "iter2/base_answers.jsonl",
    "iter2/pairs.jsonl",
    "iter2/policy/model.safetensors",
    "iter2/heldout_answers.jsonl",
    "iter2/eval.json",
)


@pytest.mark.slow
def test_the_command_from_end_to_end(finished):
    out, text = finished
    seed, result = out / "seed0", last_json(text)
    rows = ["M_0", "base", "start previous", "no noise", *ablations.CONTROLS]
    summary = result["summary"]
    assert [*summary] == rows and not result["failed"] and result["iters"] == 2
    for row, evaluated in {
        "M_0": "base/iter0/eval.json",
        "base": "base/iter2/eval.json",
        "start previous": "start_previous/iter2/eval.json",
        "no noise": "no_noise/iter2/eval.json",
        "seeds: SFT": "controls/controls/seed_sft_eval.json",
        "one shot": "controls/controls/one_shot/iter1/eval.json",
    }.items():
        assert summary[row]["M_T"] == [score(seed / evaluated), None], row
    assert summary["no noise"]["M_1"] == [score(seed / "no_noise/iter1/eval.json"), None]
    assert summary["start previous"]["pairs"] == [16, 16] and summary["one shot"]["pairs"] == [32]
    assert summary["seeds: SFT"]["pairs"] == []
    assert summary["seeds: pairs"]["pairs"] == [micro.SEEDS]
    assert json.loads((out / "results.json").read_text())["summary"] == summary
    for count, name in ((1, "base"), (4, "")):
        assert any(f" {count} of 4 " in line and name in line for line in text.splitlines())
    table = text[text.index("\nmean +- ") :].splitlines()[2:]
    assert [line.split("  ")[0] for line in table[1 : 1 + len(rows)]] == rows
    kept = json.loads((out.parent / f"{out.name}.json").read_text())
    assert [row["variant"].strip() for row in kept["figures"]] == rows


@pytest.mark.slow
def test_what_is_linked_is_what_would_be_made(finished, recipe, tmp_path):
    """A variant that shares with the base and loop.py with its flags in an empty directory."""
    out, _ = finished
    shared, alone = out / "seed0/start_previous", tmp_path / "alone"
    base = out / "seed0/base"
    for name in (
        "generator/model.safetensors",
        "iter1/pairs.manifest.json",
        "iter1/rewrites.candidates.jsonl",
        "iter2/base_answers.jsonl",
    ):
        assert inode(shared / name) == inode(base / name), name
    policy = "iter1/policy/model.safetensors"
    assert inode(shared / policy) != inode(base / policy)
    argv = ablations.flags("start previous", 0, options(recipe, out, SOME))
    argv[argv.index("--out") + 1] = str(alone)
    code, _, errors = run(["loop.py", *argv], timeout=1500)
    assert code == 0, errors
    for name in SAME:
        assert (alone / name).read_bytes() == (shared / name).read_bytes(), name
    # and in the first iteration nothing is stale yet
    assert (shared / policy).read_bytes() == (base / policy).read_bytes()
    later = "iter2/policy/model.safetensors"
    assert (shared / later).read_bytes() != (base / later).read_bytes()
    # other keywords: another generator, the same improver, whose weights only the base keeps
    other = out / "seed0/no_noise"
    generator = "generator/model.safetensors"
    assert (other / generator).read_bytes() != (base / generator).read_bytes()
    improver = "iter1/improver/metrics.jsonl"
    assert inode(other / improver) == inode(base / improver)
    manifest = json.loads((base / "iter1/improver/manifest.json").read_text())
    assert "discarded" not in manifest
    assert (base / "iter1/improver/model.safetensors").is_file()
    assert not [*other.glob("iter*/improver/*.safetensors")]


def results_in(out: Path) -> dict[Path, int | bytes]:
    """Time of each file that a stage made, content of each JSON file; a report is written again."""
    files = [path for path in out.glob("seed0/*/**/*") if path.suffix in (".jsonl", ".safetensors")]
    found = {path: path.stat().st_mtime_ns for path in files if path.name != "metrics.jsonl"}
    return found | {path: path.read_bytes() for path in out.glob("seed0/*/**/*.json")}


@pytest.mark.slow
def test_the_same_command_again_makes_nothing(finished, recipe):
    before = results_in(finished[0])
    assert len(before) > 50
    code, text, errors = run_bench("ablations", flags(recipe, finished[0], SOME), timeout=1500)
    assert code == 0, errors
    assert last_json(text)["summary"] == last_json(finished[1])["summary"]
    assert results_in(finished[0]) == before


def start_and_wait_for(argv: list[str], path: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        bench_command("ablations", argv),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        start_new_session=True,
    )
    while not path.exists():
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    return process


@pytest.mark.slow
def test_killed_it_resumes(finished, recipe, tmp_path):
    """Once the command alone, whose child lives on, and once with its children: the same scores."""
    argv, seed = flags(recipe, tmp_path, "start previous"), tmp_path / "seed0"
    alone = start_and_wait_for(argv, seed / "base/generator.partial/identity.part")
    alone.kill()
    alone.wait()
    # so a second base cannot start beside it
    with open(tmp_path / "lock", "w") as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    process = start_and_wait_for(argv, seed / "start_previous/iter1/policy.partial/identity.part")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    code, text, errors = run_bench("ablations", argv, timeout=1500)
    assert code == 0, errors
    whole, again = last_json(finished[1])["summary"], last_json(text)["summary"]
    assert again == {row: whole[row] for row in ("M_0", "base", "start previous")}
    for name in [f"{run_name}/{file}" for run_name in ("base", "start_previous") for file in SAME]:
        assert (seed / name).read_bytes() == (finished[0] / "seed0" / name).read_bytes(), name


def test_a_discarded_improver_is_not_linked_again(tmp_path):
    """A variant that was stopped after it dropped the weights must not get them back."""
    for name in ("iter1/improver/manifest.json", "iter1/improver/model.safetensors"):
        (tmp_path / "base" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "base" / name).write_text(name)
    ablations.link(tmp_path / "base", tmp_path / "run", ablations.IMPROVER)
    weights = tmp_path / "run/iter1/improver/model.safetensors"
    assert inode(weights) == inode(tmp_path / "base/iter1/improver/model.safetensors")
    weights.unlink()
    ablations.link(tmp_path / "base", tmp_path / "run", ablations.IMPROVER)
    assert not weights.exists() and weights.with_name("manifest.json").exists()


@pytest.mark.slow
def test_a_failure_stops_nobody_else(finished, recipe, tmp_path, monkeypatch):
    """A variant that leaves no pair, and one that shares a file it would have made otherwise."""
    variants = {
        "base": ablations.VARIANTS["base"],
        "nothing left": ("--pairs.threshold 99", ablations.REWRITES),
        "shares too much": ("--pairs.threshold -2", ablations.PAIRS),
        "start previous": ablations.VARIANTS["start previous"],
    }
    monkeypatch.setattr(ablations, "VARIANTS", variants)
    out = Path(shutil.copytree(finished[0], tmp_path / "copy"))
    result = ablations.main(options(recipe, out, ""))
    assert [*result["summary"]] == ["M_0", "base", "start previous"] and len(result["failed"]) == 2
    assert "no pair of" in result["failed"]["nothing left, seed 0"]
    said = "pairs.jsonl: made with option threshold = -3.0, now -2.0"
    assert said in result["failed"]["shares too much, seed 0"]
    # other flags are run again: corrected the one, and the other never taken for what it was
    monkeypatch.setitem(variants, "nothing left", ("", ablations.PAIRS))
    monkeypatch.setitem(variants, "start previous", ("", ablations.PAIRS))
    again = ablations.main(options(recipe, out, "nothing left,start previous"))
    assert again["summary"]["nothing left"]["gain"] == [0, None]
    assert [*again["failed"]] == ["start previous, seed 0"]


def figures(first, last, pairs, words) -> dict:
    return {"first": first, "last": last, "pairs": pairs, "words": words}


def test_statistics():
    """By hand: base .5 .6 .7, variant .6 .6 .9: differences .1 0 .2."""
    rows = {
        "M_0": {s: {"last": 0.25, "pairs": [], "words": 4} for s in (0, 1, 2)},
        "base": {
            0: figures(0.4, 0.5, [10, 20], 7),
            1: figures(0.4, 0.6, [10, 22], 8),
            2: figures(0.4, 0.7, [13, 24], 9),
        },
        "other": {
            2: figures(0.1, 0.9, [3, 5], 1),
            0: figures(0.3, 0.6, [2, 4], 3),
            1: figures(0.2, 0.6, [1, 6], 2),
        },
        "late": {1: figures(0.2, 0.5, [4, 4], 2)},
    }
    made = ablations.summarise(rows)
    base, other, late = made["base"], made["other"], made["late"]
    assert base["M_T"] == pytest.approx([0.6, 0.1]) and base["M_1"] == pytest.approx([0.4, 0])
    assert base["gain"] is None and base["pairs"] == [11, 22] and base["words"] == 8
    assert other["M_1"] == pytest.approx([0.2, 0.1])
    assert other["M_T"] == pytest.approx([0.7, 0.03**0.5])
    assert other["gain"] == pytest.approx([0.1, 0.1]) and other["pairs"] == [2, 5]
    assert late["gain"][0] == pytest.approx(-0.1) and late["gain"][1] is None
    assert late["seeds"] == [1]
    assert made["M_0"]["M_1"] is None and made["M_0"]["gain"][0] == pytest.approx(-0.35)
    lines = [list(row.values()) for row in ablations.shown(made)]
    assert [line[0].strip() for line in lines] == ["M_0", "base", "other", "late"]
    assert lines[1][1:] == ["0.400 +- 0.000", "0.600 +- 0.100", "-", 3, "11 22", "8.0"]
    assert lines[2][1:] == ["0.200 +- 0.100", "0.700 +- 0.173", "+0.100 +- 0.100", 3, "2 5", "2.0"]
    assert lines[0][1:] == ["-", "0.250 +- 0.000", "-0.350 +- 0.100", 3, "-", "4.0"]


@pytest.mark.parametrize("name", [name for name in ablations.VARIANTS if name != "controls"])
def test_every_variant_is_flags_of_loop(name, tmp_path):
    """On the demo's recipe, from which a variant differs in what it names and nothing else."""
    made = dict.fromkeys(("model", "seeds", "corpus", "heldout"), "x")
    write_json(tmp_path / "seed7/base/config.json", made)
    o = ablations.parse(["--out", str(tmp_path), "--iters", "5"])
    made = parse_values(loop.main, ablations.flags(name, 7, o))
    plain = parse_values(loop.main, ["--config", "recipes/demo.toml"])
    out = ablations.run_of(name, 7, o)
    assert out.parent == tmp_path / "seed7"
    assert (made["seed"], made["iters"], made["out"]) == (7, 5, out)
    placed = {"config", "seed", "iters", "out"}
    if name != "base":
        placed |= {"prepare", "model", "seeds", "corpus", "heldout"}
        assert made["prepare"] == ""
    words = ablations.VARIANTS[name][0].split()
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    named = {flag[2:].replace("-", "_") for flag in flags}
    common = plain.keys() & made.keys()
    changed = {key for key in common if made[key] != plain[key] and key not in placed}
    # another loss has parameters of its own; the demo's own values are said again for clarity
    alike = {"generator.noise", "policy.gamma", "policy.nll", "policy.lr"}
    assert changed <= named and named - changed <= alike
    assert changed


@pytest.mark.parametrize(
    "flag, value, said",
    [
        ("--variants", "bass", "no variant 'bass'; there are base, "),
        ("--seeds", "0,a", "--seeds: invalid numbers value: '0,a'"),
    ],
)
def test_bad_input(flag, value, said, capsys):
    with pytest.raises(SystemExit) as ended:
        ablations.parse([flag, value])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_seeds_and_variants_are_lists():
    o = ablations.parse([])
    assert o.seeds == [0, 1, 2]
    assert o.variants == list(ablations.VARIANTS)
    o = ablations.parse(["--seeds", "4", "--variants", "controls, no noise"])
    assert o.seeds == [4]
    assert o.variants == ["base", "no noise", "controls"]

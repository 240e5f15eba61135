"""bench/ablations.py on the tests' own world: what variants share, stops, failures, figures."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import micro
import pytest
from conftest import ROOT, command_line, last_json, run, tiny_checkpoint

import data
import loop

sys.path.insert(0, str(ROOT / "bench"))
import ablations

SOME = "data fresh,no noise,controls"


@pytest.fixture(scope="session")
def recipe(tmp_path_factory) -> Path:
    """The options of a micro run, model and data included: what the demo's recipe gets from `prepare`."""
    folder = tmp_path_factory.mktemp("ablations")
    world = micro.make(folder, tiny_checkpoint)
    data.write_text(
        folder / "recipe.json",
        json.dumps({**micro.OPTIONS, **{k: v for k, v in world.items() if k != "config"}}),
    )
    return folder / "recipe.json"


def command(recipe: Path, out: Path, variants: str) -> list:
    return [
        "bench/ablations.py",
        "--recipe",
        recipe,
        "--out",
        out,
        "--seeds",
        "0",
        "--iters",
        "2",
        "--workers",
        "2",
        "--variants",
        variants,
    ]


@pytest.fixture(scope="session")
def finished(recipe, tmp_path_factory) -> tuple[Path, str]:
    """Some variants by the command line, nothing in their way: (directory, standard output)."""
    out = tmp_path_factory.mktemp("ablated")
    code, text, errors = run(command(recipe, out, SOME), timeout=1500)
    assert code == 0, errors
    return out, text


def options(recipe: Path, out: Path, variants: str) -> ablations.Options:
    return ablations.Options(
        recipe=str(recipe), out=str(out), seeds="0", iters=2, workers=2, variants=variants
    )


def score(path: Path) -> float:
    return json.loads(path.read_text())["score"]


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


def test_the_command_from_end_to_end(finished):
    out, text = finished
    seed, result = out / "seed0", last_json(text)
    rows = ["M_0", "base", "data fresh", "no noise", "seeds: SFT", "seeds: pairs", "one shot"]
    assert [*result["summary"]] == rows and not result["failed"] and result["iters"] == 2
    for row, evaluated in {
        "M_0": "base/iter0",
        "base": "base/iter2",
        "data fresh": "data_fresh/iter2",
        "no noise": "no_noise/iter2",
        "one shot": "controls/controls/one_shot/iter1",
    }.items():
        assert result["summary"][row]["M_T"] == [score(seed / evaluated / "eval.json"), None], row
    assert result["summary"]["no noise"]["M_1"] == [score(seed / "no_noise/iter1/eval.json"), None]
    assert result["summary"]["seeds: SFT"]["M_T"] == [
        score(seed / "controls/controls/seed_sft_eval.json"),
        None,
    ]
    assert result["summary"]["data fresh"]["pairs"] == [16, 16] and result["summary"]["one shot"][
        "pairs"
    ] == [32]
    assert result["summary"]["seeds: SFT"]["pairs"] == [] and result["summary"]["seeds: pairs"][
        "pairs"
    ] == [micro.SEEDS]
    assert json.loads((out / "results.json").read_text())["summary"] == result["summary"]
    for count, name in ((1, "base"), (4, "")):
        assert any(f" {count} of 4, about" in line and name in line for line in text.splitlines())
    table = text[text.index("\nmean +- ") :].splitlines()[2:]
    assert [line.split("  ")[0] for line in table[1 : 1 + len(rows)]] == rows


def test_what_is_linked_is_what_would_be_made(finished, recipe, tmp_path):
    """A variant that shares with the base and loop.py with the same flags in an empty directory: the same bytes."""
    out, _ = finished
    shared, alone = out / "seed0/data_fresh", tmp_path / "alone"
    base = out / "seed0/base"
    inode = lambda path: path.stat().st_ino  # noqa: E731
    for name in (
        "generator/model.safetensors",
        "iter1/pairs.manifest.json",
        "iter2/base_answers.jsonl",
    ):
        assert inode(shared / name) == inode(base / name), name
    assert inode(shared / "iter1/policy/model.safetensors") != inode(
        base / "iter1/policy/model.safetensors"
    )
    argv = ablations.flags("data fresh", 0, options(recipe, out, SOME))
    argv[argv.index("--out") + 1] = str(alone)
    code, _, errors = run(["loop.py", *argv], timeout=1500)
    assert code == 0, errors
    for name in SAME:
        assert (alone / name).read_bytes() == (shared / name).read_bytes(), name
    # and in the first iteration nothing is stale yet
    assert (shared / "iter1/policy/model.safetensors").read_bytes() == (
        base / "iter1/policy/model.safetensors"
    ).read_bytes()
    assert (shared / "iter2/policy/model.safetensors").read_bytes() != (
        base / "iter2/policy/model.safetensors"
    ).read_bytes()
    # other keywords: another generator, the same improver, whose weights only the base keeps
    other = out / "seed0/no_noise"
    assert (other / "generator/model.safetensors").read_bytes() != (
        base / "generator/model.safetensors"
    ).read_bytes()
    assert inode(other / "iter1/improver/manifest.json") == inode(
        base / "iter1/improver/manifest.json"
    )
    assert (base / "iter1/improver/model.safetensors").is_file() and not [
        *other.glob("iter*/improver/*.safetensors")
    ]


def test_the_same_command_again_runs_nothing(finished, recipe):
    before = {path: path.stat().st_mtime_ns for path in finished[0].glob("seed0/**/*")}
    code, text, errors = run(command(recipe, finished[0], SOME), timeout=1500)
    assert code == 0, errors
    assert last_json(text)["summary"] == last_json(finished[1])["summary"]
    assert {path: path.stat().st_mtime_ns for path in finished[0].glob("seed0/**/*")} == before


def test_killed_it_goes_on(finished, recipe, tmp_path):
    """Once the command alone, whose child lives on, and once with its children: the same scores as in peace."""
    argv, seed = command(recipe, tmp_path, "data fresh"), tmp_path / "seed0"

    def start_and_wait_for(path: Path) -> subprocess.Popen:
        process = subprocess.Popen(
            command_line(argv),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
            start_new_session=True,
        )
        while not path.exists():
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.01)
        return process

    alone = start_and_wait_for(seed / "base/generator/begun.json")
    alone.kill()
    alone.wait()
    with (
        open(tmp_path / "lock", "w") as lock,
        pytest.raises(BlockingIOError),
    ):  # so a second base cannot start beside it
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    process = start_and_wait_for(seed / "data_fresh/iter1/policy/begun.json")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (seed / "data_fresh.json").exists()
    code, text, errors = run(argv, timeout=1500)
    assert code == 0, errors
    whole, again = last_json(finished[1])["summary"], last_json(text)["summary"]
    assert again == {row: whole[row] for row in ("M_0", "base", "data fresh")}
    for run_name, name in [(r, n) for r in ("base", "data_fresh") for n in SAME]:
        assert (seed / run_name / name).read_bytes() == (
            finished[0] / "seed0" / run_name / name
        ).read_bytes(), name


def test_a_failure_stops_nobody_else(finished, recipe, tmp_path, monkeypatch):
    """A variant that leaves no pair, and one that shares a file which it would have made otherwise."""
    monkeypatch.setattr(
        ablations,
        "VARIANTS",
        {
            "base": ablations.VARIANTS["base"],
            "nothing left": ("--filter.threshold 99", ablations.REWRITES),
            "shares too much": ("--filter.threshold -2", ablations.PAIRS),
            "data fresh": ablations.VARIANTS["data fresh"],
        },
    )
    out = Path(shutil.copytree(finished[0], tmp_path / "copy"))
    result = ablations.main(options(recipe, out, ""))
    assert [*result["summary"]] == ["M_0", "base", "data fresh"] and len(result["failed"]) == 2
    assert "no pair of" in result["failed"]["nothing left, seed 0"]
    assert (
        "pairs.jsonl: made with option threshold = -3.0, now -2.0"
        in result["failed"]["shares too much, seed 0"]
    )
    # other flags are run again: mended the one, and the other never again taken for what it was
    monkeypatch.setitem(ablations.VARIANTS, "nothing left", ("", ablations.PAIRS))
    monkeypatch.setitem(ablations.VARIANTS, "data fresh", ("", ablations.PAIRS))
    again = ablations.main(options(recipe, out, "nothing left,data fresh"))
    assert again["summary"]["nothing left"]["gain"] == [0, None] and [*again["failed"]] == [
        "data fresh, seed 0"
    ]
    assert (
        "made with option data = 'fresh', now 'cumulative'" in again["failed"]["data fresh, seed 0"]
    )


def test_statistics():
    """By hand: base .5 .6 .7, variant .6 .6 .9: differences .1 0 .2."""
    figures = lambda first, last, pairs, words: {
        "first": first,
        "last": last,
        "pairs": pairs,
        "words": words,
    }  # noqa: E731
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
    assert made["base"]["M_T"] == pytest.approx([0.6, 0.1]) and made["base"][
        "M_1"
    ] == pytest.approx([0.4, 0])
    assert (
        made["base"]["gain"] is None
        and made["base"]["pairs"] == [11, 22]
        and made["base"]["words"] == 8
    )
    assert made["other"]["M_1"] == pytest.approx([0.2, 0.1]) and made["other"][
        "M_T"
    ] == pytest.approx([0.7, 0.03**0.5])
    assert made["other"]["gain"] == pytest.approx([0.1, 0.1]) and made["other"]["pairs"] == [2, 5]
    assert (
        made["late"]["gain"][0] == pytest.approx(-0.1)
        and made["late"]["gain"][1] is None
        and made["late"]["seeds"] == [1]
    )
    assert made["M_0"]["M_1"] is None and made["M_0"]["gain"][0] == pytest.approx(-0.35)
    lines = [
        [cell.strip() for cell in line.split("  ") if cell.strip()]
        for line in ablations.show(made).splitlines()
    ]
    assert lines[2] == ["base", "0.400 +- 0.000", "0.600 +- 0.100", "-", "3", "11 22", "8.0"]
    assert lines[3] == [
        "other",
        "0.200 +- 0.100",
        "0.700 +- 0.173",
        "+0.100 +- 0.100",
        "3",
        "2 5",
        "2.0",
    ]
    assert lines[1] == ["M_0", "-", "0.250 +- 0.000", "-0.350 +- 0.100", "3", "-", "4.0"]


def read(argv: list[str]) -> dict:
    """All options of loop.py by dotted name, as a command line sets them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "option_help", cache(data.option_help))  # seconds, over all options
        o = data.parse_options(loop.Options, argv)
    return {name: getattr(owner, field.name) for name, owner, field, _ in data.leaves(o)}


@pytest.mark.parametrize("name", ablations.VARIANTS)
def test_every_variant_is_flags_of_loop(name, tmp_path):
    """On the demo's recipe, from which each variant but the first differs in what it names and nothing else."""
    data.write_text(
        tmp_path / "seed7/base/config.json",
        json.dumps({k: "x" for k in ("model", "seeds", "corpus", "heldout")}),
    )
    o = ablations.Options(out=str(tmp_path), iters=5)
    made, plain = read(ablations.flags(name, 7, o)), read(["--config", "recipes/demo.json"])
    assert (made["seed"], made["iters"], made["out"]) == (
        7,
        5,
        str(tmp_path / "seed7" / ablations.slug(name)),
    )
    placed = {
        "seed",
        "iters",
        "out",
        *(("prepare", "model", "seeds", "corpus", "heldout") if name != "base" else ()),
    }
    named = {
        flag[2:].replace("-", "_")
        for flag in ablations.VARIANTS[name][0].split()
        if flag.startswith("--")
    }
    changed = {
        key for key in plain.keys() & made.keys() if made[key] != plain[key] and key not in placed
    }
    assert (
        changed <= named
        and changed
        and named - changed <= {"generator.noise", "policy.gamma", "policy.nll", "policy.lr"}
    )
    assert name == "base" or made["prepare"] == ""


def test_bad_input(recipe, tmp_path):
    for variants, seeds, said in (
        ("bass", "0", "no variant 'bass'; there are base, "),
        ("", "0,a", "--seeds 0,a: give num"),
    ):
        o = options(recipe, tmp_path / "out", variants)
        o.seeds = seeds
        with pytest.raises(data.InputError, match=said):
            ablations.main(o)
    assert not (tmp_path / "out").exists()

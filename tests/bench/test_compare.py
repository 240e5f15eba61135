"""bench/compare.py: what rows share, their command lines, and figures by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from bench_helpers import run_bench
from conftest import ROOT, last_json

import loop
from bench import compare
from methods import almost, sampling_ranking, sapo, self_rewarding, spin
from plumbing.options import parse_options
from plumbing.records import write_json


pytest_plugins = ["bench_helpers"]
METHODS = {
    "loop.py": loop,
    "methods.spin": spin,
    "methods.sapo": sapo,
    "methods.almost": almost,
    "methods.sampling_ranking": sampling_ranking,
    "methods.self_rewarding": self_rewarding,
}


def figures(scores: list[float], **more) -> dict:
    cost = {"path": 30, "steps": 50, "generated": 12_345, "trained": 2_000, "seconds": 7.4}
    texts = {"words": 9.0, "chosen": 10.0, "rejected": 8.5, "right": 0.75}
    about = {"start": "M_0", "pairs": ["10/12", "9/12"]}
    return {**cost, **texts, **about, "scores": scores, **more}


ROWS = {
    "SynPO": {0: figures([0.3, 0.5, 0.7]), 1: figures([0.3, 0.4, 0.9])},
    "SynPO, one shot": {0: figures([0.3, 0.4]), 1: figures([0.3, 0.5])},
    "SPIN": {1: figures([0.3, 0.5, 0.4], start="M_{t-1}", right=None, chosen=None)},
    "SFT on the seeds": {0: {"scores": [0.3, 0.6]}, 1: {"scores": [0.3, 0.5]}},
}


def test_scores_by_hand():
    synpo, shot, spin, sft = compare.score_rows(ROWS, 2)
    assert synpo["M_0"] == "0.300 +- 0.000"
    assert synpo["M_1"] == "0.450 +- 0.071"
    assert synpo["M_2"] == "0.800 +- 0.141"
    assert synpo["M_T - M_0"] == "+0.500 +- 0.141"
    # paired by random seed: .7 - .6 and .9 - .5
    assert synpo["- SFT on the seeds"] == "+0.250 +- 0.212"
    assert synpo["- SynPO"] == ""
    # what is trained once stands at T
    assert shot["M_1"] == ""
    assert shot["M_2"] == "0.450 +- 0.071"
    assert shot["- SynPO"] == "-0.350 +- 0.071"
    assert spin["M_2"] == "0.400"
    assert spin["seeds"] == 1
    assert spin["- SynPO"] == "-0.500"
    assert sft["- SFT on the seeds"] == ""
    assert sft["- SynPO"] == "-0.250 +- 0.212"


def test_what_methods_cost_by_hand():
    rows = compare.budget_rows(ROWS)
    assert [row["method"].strip() for row in rows] == ["SynPO", "SynPO, one shot", "SPIN"]
    synpo, _, spin = rows
    assert synpo["gold in"] == "R_t"
    assert synpo["words"] == "9.00"
    assert synpo["chosen"] == "10.00"
    assert synpo["right"] == "0.75"
    assert synpo["pairs kept/seen"] == "10/12 9/12"
    assert synpo["steps to M_T"] == 30
    assert synpo["of all"] == 50
    assert synpo["seconds"] == 7
    assert synpo["tokens generated"] == "12k"
    assert synpo["tokens trained"] == "2k"
    assert spin["right"] == spin["chosen"] == "-"
    assert spin["M_t starts from"] == "M_{t-1}"


def test_the_picture_is_the_same_twice(tmp_path):
    for name in ("a", "b"):
        compare.draw(ROWS, 2, tmp_path / f"{name}.svg")
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert text.startswith("<?xml")


@pytest.mark.parametrize("world", compare.RECIPES)
@pytest.mark.parametrize("name", compare.ROWS)
def test_every_row_is_a_command_line(name, world, tmp_path):
    made = dict.fromkeys(("model", "seeds", "corpus", "heldout"), "x")
    write_json(tmp_path / "seed7/SynPO/config.json", made)
    o = compare.parse(["--out", str(tmp_path), "--world", world, "--iters", "5"])
    given = compare.command(name, 7, o)
    place = given.index("--config")
    method = METHODS[given[place - 1]]
    parsed = parse_options(method.Options, given[place:])
    assert parsed.run.seed == 7
    assert parsed.iters == 5
    assert parsed.out == compare.run_of(name, 7, o)
    plain = parse_options(loop.Options, ["--config", str(ROOT / compare.RECIPES[world])])
    assert parsed.evaluate == plain.evaluate
    if name != "SynPO":
        assert parsed.prepare == ""
        assert parsed.model == Path("x")
    # prompts are linked, so what makes them must be the same
    if compare.ROWS[name].shared == compare.PROMPTS:
        plain = replace(plain, run=parsed.run)
        assert parsed.generator == plain.generator
        assert parsed.prompts == plain.prompts


def test_rows_are_names_with_semicolons():
    o = compare.parse(["--rows", "SPIN;SynPO, cumulative"])
    assert o.rows == ["SynPO", "SynPO, cumulative", "SPIN"]
    with pytest.raises(SystemExit):
        compare.parse(["--rows", "SPINE"])


@pytest.mark.slow
def test_the_command_from_end_to_end(recipe, tmp_path):
    out, kept = tmp_path / "out", tmp_path / "kept.json"
    args = ["--recipe", recipe, "--out", out, "--seeds", "0", "--iters", "2", "--workers", "2"]
    args += ["--world", "facts", "--rows", "SPIN;SynPO, one shot", "--json", kept]
    args += ["--svg", tmp_path / "picture.svg"]
    code, text, errors = run_bench("compare", [str(arg) for arg in args], timeout=1500)
    assert code == 0, errors
    assert last_json(text)["failed"] == {}
    scores = json.loads(kept.read_text())["figures"]["scores"]
    names = [row["method"].strip() for row in scores]
    assert names == ["SynPO", "SynPO, one shot", "SPIN", "SFT on the seeds"]
    for row, run in ((0, "SynPO"), (2, "SPIN")):
        for t in (0, 1, 2):
            found = json.loads((out / f"seed0/{run}/iter{t}/eval.json").read_text())
            assert scores[row][f"M_{t}"] == f"{found['score']:.3f}"
    first = out / "seed0/SynPO/iter0/eval.json"
    assert first.stat().st_ino == (out / "seed0/SPIN/iter0/eval.json").stat().st_ino
    assert (tmp_path / "picture.svg").is_file()

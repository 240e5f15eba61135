"""bench/compare.py: what rows share, their command lines, and figures by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT

import loop
from bench import compare
from methods import almost, sampling_ranking, sapo, self_rewarding, spin
from plumbing.files import write_json
from plumbing.options import parse_options
from plumbing.stage import counts_of as counts

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
    cost = {"steps_to_last": 30, "steps": 50, "generated": 12_345, "trained": 2_000, "seconds": 7.4}
    texts = {"words": 9.0, "chosen": 10.0, "rejected": 8.5, "better": 0.75}
    about = {"start": "M_0", "pairs": ["10/12", "9/12"]}
    return {**cost, **texts, **about, "scores": scores, **more}


ROWS = {
    "SynPO": {0: figures([0.3, 0.5, 0.7]), 1: figures([0.3, 0.4, 0.9])},
    "SynPO, one shot": {0: figures([0.3, 0.4]), 1: figures([0.3, 0.5])},
    "SPIN": {1: figures([0.3, 0.5, 0.4], start="M_{t-1}", better=None, chosen=None)},
    "SFT on the seeds": {0: {"scores": [0.3, 0.6]}, 1: {"scores": [0.3, 0.5]}},
}


def test_scores_by_hand():
    synpo, shot, spin, sft = compare.score_rows(ROWS, 2)
    assert synpo["M_0"] == "0.300 +- 0.000"
    assert synpo["M_1"] == "0.450 +- 0.071"
    assert synpo["M_2"] == "0.800 +- 0.141"
    assert synpo["M_T - M_0"] == "+0.500 +- 0.141"
    # paired by random seed: .7 - .6 and .9 - .5
    assert synpo["M_T - SFT on the seeds"] == "+0.250 +- 0.212"
    assert synpo["M_T - SynPO"] == ""
    # what is trained once stands at T
    assert shot["M_1"] == ""
    assert shot["M_2"] == "0.450 +- 0.071"
    assert shot["M_T - SynPO"] == "-0.350 +- 0.071"
    assert spin["M_2"] == "0.400"
    assert spin["seeds"] == "1"
    assert spin["M_T - SynPO"] == "-0.500"
    assert sft["M_T - SFT on the seeds"] == ""
    assert sft["M_T - SynPO"] == "-0.250 +- 0.212"


def test_what_methods_cost_by_hand():
    rows = compare.budget_rows(ROWS)
    assert [row["method"].strip() for row in rows] == ["SynPO", "SynPO, one shot", "SPIN"]
    synpo, _, spin = rows
    assert synpo["gold read by"] == "R_t"
    assert synpo["M_T"] == "9.00"
    assert synpo["chosen"] == "10.00"
    assert synpo["chosen better"] == "0.75"
    assert synpo["pairs kept/seen, seed 0"] == "10/12 9/12"
    assert synpo["steps to M_T"] == 30
    assert synpo["all steps"] == 50
    assert synpo["seconds"] == 7
    assert synpo["tokens generated"] == "12k"
    assert synpo["tokens trained"] == "2k"
    assert spin["chosen better"] == spin["chosen"] == "-"
    assert spin["M_t starts from"] == "M_{t-1}"


def test_the_picture_is_the_same_twice(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install -r requirements-eval.txt")
    for name in ("a", "b"):
        compare.draw(ROWS, 2, tmp_path / f"{name}.svg")
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert text.startswith("<?xml")


@pytest.mark.parametrize("world", compare.RECIPES)
@pytest.mark.parametrize("name", compare.ROWS)
def test_every_row_is_a_command_line(name, world, tmp_path, monkeypatch):
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

    # the method refuses none of it
    def reached(o):
        raise KeyboardInterrupt

    monkeypatch.setattr(method, "prepare", reached)
    with pytest.raises(KeyboardInterrupt):
        method.main(parsed)
    plain = parse_options(loop.Options, ["--config", str(ROOT / compare.RECIPES[world])])
    assert parsed.evaluate == plain.evaluate
    if name != "SynPO":
        assert parsed.prepare == ""
        assert parsed.model == Path("x")
    # prompts are linked, so what makes them must be the same
    if compare.ROWS[name].shared == compare.OF_G:
        plain = replace(plain, run=parsed.run)
        assert parsed.generator == plain.generator
        assert parsed.prompts == plain.prompts


def test_rows_are_names_with_semicolons():
    o = compare.parse(["--rows", "SPIN;SynPO, cumulative"])
    assert o.rows == ["SynPO", "SynPO, cumulative", "SPIN"]
    with pytest.raises(SystemExit):
        compare.parse(["--rows", "SPINE"])


@pytest.mark.slow
def test_rows_from_end_to_end(recipe, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="pip install -r requirements-eval.txt")
    monkeypatch.setitem(compare.RECIPES, "facts", str(recipe))
    monkeypatch.setitem(compare.FLAGS, "facts", {"methods.spin": "--spin.samples 2"})
    out, kept = tmp_path / "out", tmp_path / "kept.json"
    args = ["--world", "facts", "--rows", "SPIN;SynPO, one shot;ALMoST, M_1 by SFT"]
    args += ["--out", out, "--seeds", "0", "--iters", "2", "--workers", "2"]
    args += ["--json", kept, "--svg", tmp_path / "picture.svg"]
    result = compare.main(compare.parse([str(arg) for arg in args]))

    # without assistants of its own ALMoST cannot run: that stops nobody else
    assert [*result["failed"]] == ["ALMoST, M_1 by SFT, seed 0"]
    assert "give at least two" in result["failed"]["ALMoST, M_1 by SFT, seed 0"]
    figures = json.loads(kept.read_text())["figures"]
    names = [row["method"].strip() for row in figures["scores"]]
    assert names == ["SynPO", "SynPO, one shot", "SPIN", "SFT on the seeds"]
    for row, run in ((0, "SynPO"), (2, "SPIN")):
        for t in (0, 1, 2):
            found = json.loads((out / f"seed0/{run}/iter{t}/eval.json").read_text())
            assert figures["scores"][row][f"M_{t}"] == f"{found['score']:.3f}"
    assert len(figures["failed"]) == 1
    assert (tmp_path / "picture.svg").is_file()

    # M_0's evaluation is one file, and counts for none
    first = out / "seed0/SynPO/iter0/eval.json"
    assert first.stat().st_ino == (out / "seed0/SPIN/iter0/eval.json").stat().st_ino
    synpo, run = figures["budget"][0], out / "seed0/SynPO"
    stages = [run / "generator"]
    for t in (1, 2):
        stages += [run / f"iter{t}/improver", run / f"iter{t}/policy"]
    assert synpo["all steps"] == sum(counts(stage)["steps"] for stage in stages)
    assert synpo["steps to M_T"] == counts(run / "iter2/policy")["steps"]


def test_a_seed_without_synpo_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "run_command", lambda command, log, lock: f"{log.name}: lost")
    monkeypatch.setattr(compare, "FLAGS", {"sorting": {}})
    o = compare.parse(["--out", str(tmp_path), "--seeds", "5", "--rows", "SPIN"])
    result = compare.main(o)
    assert result["rows"] == 0
    assert result["failed"] == {
        "SynPO, seed 5": "SynPO.log: lost",
        "SPIN, seed 5": "needs SynPO's run",
    }

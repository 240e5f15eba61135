"""bench/curves.py on made-up results: means over random seeds, paired differences, the picture."""

from pathlib import Path
from xml.etree import ElementTree

import pytest
from bench_helpers import run_bench
from conftest import last_json

from plumbing.files import load_json, write_json

pytest.importorskip("matplotlib", reason="pip install -r requirements-eval.txt")

# model -> scores of two held-out prompts, in two runs
SCORES = {
    "iter0/eval.json": ([0.0, 0.2], [0.2, 0.2]),
    "iter1/eval.json": ([0.4, 0.4], [0.6, 0.4]),
    "iter2/eval.json": ([1.0, 0.6], [0.8, 0.8]),
    "controls/one_shot/iter1/eval.json": ([0.5, 0.5], [0.5, 0.7]),
    "controls/nll/iter1/eval.json": ([0.3, 0.3], [0.3, 0.3]),
    "controls/nll/iter2/eval.json": ([0.5, 0.5], [0.5, 0.5]),
    "controls/repeated/iter2/eval.json": ([0.9, 0.9], [0.9, 0.9]),
}


def make_run(out: Path, seed: int) -> Path:
    write_json(out / "config.json", {"seed": seed, "iters": 2, "heldout_samples": 8})
    for name, runs in SCORES.items():
        scores = runs[seed]
        score = sum(scores) / 2
        write_json(out / name, {"score": score, "scores": scores})
    write_json(out / "iter0/eval_samples.json", {"score": 0.1, "best": 0.3 + seed / 10})
    return out


@pytest.fixture(scope="module")
def curves(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("curves")
    runs = [make_run(folder / f"seed{seed}", seed) for seed in (0, 1)]
    svg = ["--svg", folder / "curves.svg"]
    figures = ["--json", folder / "curves.json"]
    beside = ["--beside", "other", *runs]
    code, text, errors = run_bench("curves", [*runs, *svg, *figures, *beside])
    assert code == 0, errors
    return folder, text


@pytest.mark.slow
def test_means_over_random_seeds_have_their_standard_error(curves):
    rows = load_json(curves[0] / "curves.json")["figures"]["scores"]
    found = {}
    for row in rows:
        name = row["model"].strip()
        found[name] = (row["score"], row["se over seeds"])
    # .8 in both runs; .4 and .5: half their difference
    assert found["M_2"] == pytest.approx((0.8, 0))
    assert found["M_1"] == pytest.approx((0.45, 0.05))
    assert found["best of 8 of M_0"] == pytest.approx((0.35, 0.05))
    assert found["other, M_1"] == found["M_1"]
    assert last_json(curves[1])["M_T"] == pytest.approx(0.8)


@pytest.mark.slow
def test_methods_stand_beside_each_other_by_iteration(curves):
    rows = load_json(curves[0] / "curves.json")["figures"]["methods"]
    found = {row.pop("method"): list(row.values()) for row in rows}
    assert found["SynPO"] == [
        "0.150 (0.050)",
        "0.450 (0.050)",
        "0.800 (0.000)",
    ]
    assert found["NLL alone"][2] == "0.500 (0.000)"
    # R_1 applied once is SynPO's M_1
    repeated = found["R_1 t times, distilled once"]
    assert repeated[1] == found["SynPO"][1]
    assert repeated[2] == "0.900 (0.000)"
    # trained once
    assert found["one shot"] == ["", "", "0.550 (0.050)"]
    assert found["best of 8 of M_0"][2] == "0.350 (0.050)"


@pytest.mark.slow
def test_differences_are_paired_over_prompts(curves):
    first, second = load_json(curves[0] / "curves.json")["figures"]["seeds"]
    # differences of the first run's prompts: .4 and .2; of the second's: .4 and .2
    assert first["M_1 - M_0"] == second["M_1 - M_0"] == "+0.300 (0.100)"
    # .6 and .2
    assert first["M_2 - M_1"] == "+0.400 (0.200)"
    assert second["M_2 - one shot"] == "+0.200 (0.100)"
    assert (first["seed"], second["seed"]) == (0, 1)


@pytest.mark.slow
def test_the_picture_has_a_line_for_every_method(curves):
    path = curves[0] / "curves.svg"
    ElementTree.parse(path)
    text = path.read_text()
    for label in ("SynPO  0.800", "NLL alone  0.500", "one shot", "best of 8 of M_0", "other"):
        assert f"<!-- {label}" in text, label
    assert "<!-- R_1 t times, distilled once  0.900" in text

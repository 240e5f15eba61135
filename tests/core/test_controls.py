"""The controls of a finished run: what they start from, share and are evaluated by."""

import re
import shutil
from pathlib import Path

import micro
import pytest
from conftest import last_json, read_rows, write_rows
from cycle import (
    cached_and_computed,
    command,
    counts,
    go,
    inputs,
    one_line,
    responses,
    stamps,
)

from formats.records import read_jsonl
from methods import controls
from plumbing.files import load_json
from plumbing.options import RunOptions
from plumbing.stage import content_hash, read_manifest

pytest_plugins = ["cycle"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def controlled(finished, tmp_path_factory) -> tuple[Path, str]:
    """A copy of the finished run with its controls: (run directory, output)."""
    out = shutil.copytree(finished[0], tmp_path_factory.mktemp("runs") / "controlled")
    code, text, errors = command(controls.main, ["--run", str(out)])
    assert code == 0, errors
    return out, text


def test_controls_leave_the_run_as_it_was(controlled, finished):
    out, text = controlled
    before, after = stamps(finished[0]), stamps(out)
    assert {name: after[name] for name in before} == before
    assert last_json(text)["scores"] == last_json(finished[1])["scores"]
    for name in ("config.json", "changed.json"):
        assert load_json(out / name) == load_json(finished[0] / name)


def test_some_controls_alone_and_unknown_ones_in_one_line(copy):
    code, text, errors = command(controls.main, ["--run", str(copy), "--only", "seed_sft"])
    assert code == 0, errors
    made = {path.name for path in (copy / "controls").iterdir()}
    assert {"seed_sft", "seed_sft_eval.json"} <= made
    assert not made & {"seed_pairs", "one_shot", "nll", "repeated"}
    assert "SFT on the seeds" in text
    code, _, errors = command(controls.main, ["--run", str(copy), "--only", "seed_sft,nothing"])
    assert "--only nothing: no such control; there are seed_sft" in one_line(code, errors)


def test_controls_are_evaluated_in_the_report(controlled):
    out, text = controlled
    names = ["SFT on the seeds", "pairs from the seeds", "one shot"]
    names += ["NLL alone, M_1", "NLL alone, M_2", "NLL alone, one shot", "2 times R_1, distilled"]
    for name in names:
        assert re.search(rf"^ *{name} +0\.\d+", text, re.MULTILINE), "a row of the table"
        assert name in (out / "report.html").read_text()


def test_controls_start_from_the_first_model(controlled, world):
    controls_of = controlled[0] / "controls"
    M_0 = content_hash(Path(world["model"]))
    policies = ["one_shot/iter1", "nll/iter1", "nll/iter2", "nll_one_shot/iter1", "repeated/iter2"]
    for name in ["seed_sft", "seed_pairs", *(f"{folder}/policy" for folder in policies)]:
        assert inputs(controls_of / name)["model"] == M_0
    assert counts(controls_of / "seed_sft")["examples"] == micro.SEEDS


def test_pairs_from_the_seeds_are_gold_over_the_first_models_answers(controlled, world):
    out, _ = controlled
    gold = responses(out / "seeds.jsonl")
    drafts = responses(out / "iter1" / "seed_answers.jsonl")
    assert gold == {row["id"]: row["response"] for row in read_jsonl(world["seeds"])}
    rows = read_rows(out / "controls" / "seed_pairs.jsonl")
    assert len(rows) == micro.SEEDS
    for row in rows:
        name = row["id"].removesuffix("-0")
        assert (row["chosen"], row["rejected"]) == (gold[name], drafts[name])

    # as many steps as the last policy had, to the nearest epoch
    trained = out / "controls" / "seed_pairs"
    assert counts(trained)["pairs"] == micro.SEEDS
    assert read_manifest(trained)["options"]["epochs"] == round(2 * 32 / micro.SEEDS)
    first = read_rows(trained / "metrics.jsonl")[0]
    assert first["preference_loss"] == pytest.approx(0.693147, abs=1e-4)


def test_one_shot_has_the_same_generator_and_as_many_pairs(controlled):
    out, text = controlled
    shot = out / "controls" / "one_shot"
    G = read_manifest(out / "generator")["content"]
    assert inputs(shot / "iter1" / "prompts.jsonl")["generator"] == G
    assert counts(shot / "iter1" / "prompts.jsonl")["lists"] == 2 * 64
    assert counts(shot / "iter1" / "policy")["pairs"] == 32
    assert not (shot / "iter2").exists()

    # the reference log-probs are in the run's cache; loss sft reads none
    assert not list((out / "controls").glob("**/reference"))
    computed = cached_and_computed(text)
    assert len(computed) == 3, "pairs from the seeds, one shot, repeated"
    assert all(new > 0 for _, new in computed)


def weights(folder: Path) -> bytes:
    return (folder / "policy" / "model.safetensors").read_bytes()


def test_nll_alone_repeats_the_iterations(controlled):
    """As in the run up to the first pairs; from the first policy on, everything is its own."""
    out, _ = controlled
    again = out / "controls" / "nll"
    for t in (1, 2):
        ours, theirs = again / f"iter{t}", out / f"iter{t}"
        options = read_manifest(ours / "policy")["options"]
        assert options["loss"] == "sft"
        assert not options.get("nll")
        assert counts(ours / "policy")["pairs"] == counts(theirs / "policy")["pairs"]
        assert weights(ours) != weights(theirs)
        lines = read_rows(ours / "policy" / "metrics.jsonl")
        assert all(line["preference_loss"] == line["nll/chosen"] for line in lines)
    for name in ("prompts", "seed_answers", "base_answers", "rewrites", "pairs"):
        first = (again / "iter1" / f"{name}.jsonl").read_bytes()
        assert first == (out / "iter1" / f"{name}.jsonl").read_bytes(), name
    M_1 = read_manifest(again / "iter1" / "policy")["content"]
    for name in ("answers", "seed_answers"):
        assert inputs(again / "iter2" / f"{name}.jsonl")["model"] == M_1
    assert not list(again.glob("iter*/improver/*.safetensors"))


def test_nll_alone_in_one_shot_has_the_one_shots_pairs(controlled):
    out, _ = controlled
    ours = out / "controls" / "nll_one_shot" / "iter1"
    theirs = out / "controls" / "one_shot" / "iter1"
    for name in ("prompts.jsonl", "pairs.jsonl"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    assert read_manifest(ours / "policy")["options"]["loss"] == "sft"
    assert counts(ours / "policy")["pairs"] == 32
    assert weights(ours) != weights(theirs)


def test_repeated_revises_with_the_first_improver_and_distils_once(controlled):
    out, _ = controlled
    folder = out / "controls" / "repeated"
    R_1 = read_manifest(out / "iter1" / "improver")
    assert R_1["discarded"]
    again = read_manifest(folder / "improver")
    assert again["content"] == R_1["content"] == content_hash(folder / "improver")

    # M_0's responses to the second iteration's prompts, revised twice
    two = folder / "iter2"
    y_0 = responses(out / "iter2" / "base_answers.jsonl")
    once = responses(two / "rewrites1.jsonl")
    assert responses(two / "rewrites1.jsonl", "draft") == y_0
    assert responses(two / "rewrites2.jsonl", "draft") == once
    for name in ("rewrites1", "rewrites2"):
        assert inputs(two / f"{name}.jsonl")["improver"] == R_1["content"]
    twice = responses(two / "rewrites2.jsonl")
    assert twice != once != y_0
    pairs = read_rows(two / "pairs.jsonl")
    assert len(pairs) == 16
    for pair in pairs:
        texts = (pair["chosen"], pair["rejected"], pair["iteration"])
        assert texts == (twice[pair["id"]], y_0[pair["id"]], 2)
    assert inputs(two / "policy")["pairs"] == {"0": content_hash(two / "pairs.jsonl")}

    # one revision is the run's own first iteration
    assert not (folder / "iter1").exists()
    assert not (two / "rewrites3.jsonl").exists()


def test_controls_have_samples_and_scores_of_each_prompt_too(controlled):
    out, _ = controlled
    folders = ["one_shot/iter1", "nll/iter1", "nll/iter2", "nll_one_shot/iter1", "repeated/iter2"]
    for folder in folders:
        result = load_json(out / "controls" / folder / "eval.json")
        assert len(result["scores"]) == micro.HELDOUT
        several = load_json(out / "controls" / folder / "eval_samples.json")
        assert several["best"] >= several["score"]


def test_a_second_call_does_nothing_again(controlled, tmp_path, world):
    out = shutil.copytree(controlled[0], tmp_path / "again")
    before = stamps(out)
    code, _, errors = command(controls.main, ["--run", str(out)])
    assert code == 0, errors
    assert stamps(out) == before
    go(world, out)
    assert stamps(out) == before


def test_a_directory_without_a_run_is_refused(tmp_path):
    code, _, errors = command(controls.main, ["--run", str(tmp_path)])
    message = one_line(code, errors)
    assert "config.json: no such file" in message
    assert "check the path" in message


def test_gold_pairs_leave_out_empty_drafts_and_number_samples(tmp_path):
    seeds, drafts, out = (tmp_path / f"{name}.jsonl" for name in ("seeds", "drafts", "pairs"))
    write_rows(seeds, [{"id": "a", "prompt": "p", "response": "gold", "topic": 7}])
    texts = ["first", "", "third"]
    answer = {"id": "a", "prompt": "p"}
    write_rows(drafts, [{**answer, "sample": i, "response": y} for i, y in enumerate(texts)])
    controls.gold_pairs(seeds, drafts, out, RunOptions())
    rows = read_rows(out)
    assert [(row["id"], row["rejected"]) for row in rows] == [("a-0", "first"), ("a-2", "third")]
    assert all((row["chosen"], row["topic"]) == ("gold", 7) for row in rows)
    assert counts(out) == {"pairs": 2, "seconds": counts(out)["seconds"]}

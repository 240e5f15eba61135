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

from methods import controls
from plumbing.options import RunOptions
from plumbing.records import load_json, read_jsonl
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


def test_controls_are_evaluated_in_the_report(controlled):
    out, text = controlled
    for name in ("SFT on the seeds", "pairs from the seeds", "one shot"):
        assert re.search(rf"^ *{name} +0\.\d+", text, re.MULTILINE), "a row of the table"
        assert name in (out / "report.html").read_text()


def test_controls_start_from_the_first_model(controlled, world):
    controls_of = controlled[0] / "controls"
    M_0 = content_hash(Path(world["model"]))
    for name in ("seed_sft", "seed_pairs", "one_shot/iter1/policy"):
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

    # the reference log-probs are in the run's cache
    assert not (shot / "reference").exists()
    computed = cached_and_computed(text)
    assert len(computed) == 2
    assert all(new > 0 for _, new in computed)


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
    write_rows(drafts, [{"id": "a", "sample": i, "response": text} for i, text in enumerate(texts)])
    controls.gold_pairs(seeds, drafts, out, RunOptions())
    rows = read_rows(out)
    assert [(row["id"], row["rejected"]) for row in rows] == [("a-0", "first"), ("a-2", "third")]
    assert all((row["chosen"], row["topic"]) == ("gold", 7) for row in rows)
    assert counts(out) == {"pairs": 2, "seconds": counts(out)["seconds"]}

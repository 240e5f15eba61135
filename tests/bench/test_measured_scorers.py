"""bench/scorers.py: the texts that it asks scorers about, and how often they are right."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from bench_helpers import run_bench
from conftest import write_rows

from bench import scorers
from plumbing.files import InputError, write_json

PLUGIN = """
def score(rows):
    return [float(len(row["response"])) for row in rows]
"""


def length(rows: list[dict]) -> list[float]:
    return [float(len(row["response"])) for row in rows]


def make_run(tmp_path: Path, rewrites: int) -> SimpleNamespace:
    """One iteration on two prompts; the exact score of a text is its length."""
    (tmp_path / "plugin.py").write_text(PLUGIN)
    texts = {
        "a": ["long text", "text", "x"],
        "b": ["even", "same", "longest of all"],
    }
    folder = tmp_path / "iter1"
    folder.mkdir()
    written = []
    answers = []
    for name, (*candidates, answer) in texts.items():
        for i, text in enumerate(candidates[:rewrites]):
            row = {"id": name, "sample": i, "prompt": f"Revise {name}", "response": text}
            written.append(row)
        row = {"id": name, "prompt": f"Prompt {name}", "response": answer}
        answers.append(row)
    write_rows(folder / "rewrites.candidates.jsonl", written)
    write_rows(folder / "base_answers.jsonl", answers)
    evaluate = f"{tmp_path / 'plugin.py'}:evaluate"
    o = SimpleNamespace(iters=1, evaluate=evaluate, model=None, run=None)

    def iteration(t: int) -> Path:
        return tmp_path / f"iter{t}"

    return SimpleNamespace(o=o, iter=iteration)


def responses(pairs: list) -> list[tuple[str, str]]:
    return [(better["response"], worse["response"]) for better, worse in pairs]


def test_texts_with_different_exact_scores_are_told_apart(tmp_path):
    found = scorers.tasks(make_run(tmp_path, 2))
    # the two rewrites of b are equally good
    assert responses(found["rewrite or rewrite"]) == [("long text", "text")]
    assert responses(found["rewrite or M_0's"]) == [("long text", "x"), ("longest of all", "even")]
    # scorers read the prompt, not what the improver read
    for pairs in found.values():
        assert all(row["prompt"].startswith("Prompt ") for pair in pairs for row in pair)


def test_one_rewrite_is_compared_with_the_answer_alone(tmp_path):
    found = scorers.tasks(make_run(tmp_path, 1))
    assert list(found) == ["rewrite or M_0's"]


def test_accuracy_is_the_share_of_better_texts_that_score_higher(tmp_path):
    pairs = scorers.tasks(make_run(tmp_path, 2))["rewrite or M_0's"]

    def short(rows: list[dict]) -> list[float]:
        return [-score for score in length(rows)]

    def same(rows: list[dict]) -> list[float]:
        return [0.0 for _ in rows]

    # a tie is half right
    for scorer, share in ((length, "1.000"), (short, "0.000"), (same, "0.500")):
        found = scorers.accuracy(scorer, pairs)
        assert found.startswith(f"{share} ("), found


@pytest.mark.slow
def test_a_run_without_controls_gets_one_line(tmp_path):
    write_json(tmp_path / "config.json", {"model": "m", "iters": 1})
    code, _, errors = run_bench("scorers", ["--run", tmp_path])
    assert code != 0
    assert errors.count("\n") == 1
    assert "run methods.controls" in errors


def test_a_text_that_cannot_be_scored_is_named():
    def short(rows: list[dict]) -> list[float | None]:
        return [None if len(row["response"]) > 4 else 1.0 for row in rows]

    pairs = [({"id": "a", "response": "x"}, {"id": "a", "response": "y"})]
    pairs.append(({"id": "b", "response": "x"}, {"id": "b", "response": "too long"}))
    for several in (pairs, [pair[::-1] for pair in pairs]):
        with pytest.raises(InputError, match="record b: beyond the context of the scorer's model"):
            scorers.accuracy(short, several)

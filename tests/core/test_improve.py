"""The improver: its prompt, what it is trained on, which candidate becomes the rewrite."""

import pytest
from conftest import read_rows, write_rows

import improve
from improve import (
    TEMPLATE,
    ImproverOptions,
    RewriteOptions,
    gold_and_draft,
    main,
    rewrite,
    train_improver,
    training_rows,
)
from plumbing.files import InputError
from plumbing.options import RunOptions, parse_options
from plumbing.stage import counts_of
from scorers.base import Revision

FP32 = RunOptions(dtype="float32")
SHORT = "Q: {prompt}\nA: {draft}\nBetter:"  # a template
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
    return ImproverOptions(**{"run": FP32, "template": SHORT, **changes})


def words(rows: list[dict]) -> list[float]:
    return [float(len(row["response"].split())) for row in rows]


# -------------------------------------------------------------------------------------- the prompt


def asked(row: dict, draft: str, template: str, feedback: str = "") -> str:
    """What R reads for a record and a draft."""
    revision = Revision(template=template, feedback=feedback)
    [text] = revision.prompts([{"id": "r", **row, "response": draft}])
    return text


def test_prompt_holds_question_and_draft():
    assert asked({"prompt": "Why?"}, "So.", SHORT) == "Q: Why?\nA: So.\nBetter:"
    default = asked({"prompt": "Why?"}, "So.", TEMPLATE)
    assert "Given question:\nWhy?\n\nOriginal answer:\nSo.\n\nRewritten answer:" in default
    assert TEMPLATE == ImproverOptions().template


def test_braces_in_texts_stay():
    filled = asked({"prompt": "def f(): {x}"}, "{prompt} {0} {{}} {draft}", SHORT)
    assert filled == "Q: def f(): {x}\nA: {prompt} {0} {{}} {draft}\nBetter:"
    assert asked({"prompt": "a {draft}"}, "D", SHORT) == "Q: a {draft}\nA: D\nBetter:"


def test_earlier_turns_come_before_the_last_question():
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Why?"},
    ]
    filled = asked({"messages": turns}, "So.", SHORT)
    assert filled == "Q: user: Hi\n\nassistant: Hello\n\nuser: Why?\nA: So.\nBetter:"
    assert asked({"messages": turns[2:]}, "So.", SHORT) == "Q: Why?\nA: So.\nBetter:"


def test_any_field_of_the_record_stands_in_the_template():
    record = {"prompt": "Why?", "level": 3, "note": "{draft}"}
    assert asked(record, "So.", "{note} {level} {draft}") == "{draft} 3 So."
    with pytest.raises(
        InputError, match=r"record r: the improver's template reads \{tone\}, which"
    ):
        asked(record, "So.", "{tone} {draft}")


def test_feedback_adds_fields(tmp_path):
    checker = tmp_path / "checker.py"
    checker.write_text(
        "def check(rows):\n"
        "    return [{'failed': f'{len(row[\"response\"])} letters'} for row in rows]\n"
    )
    filled = asked({"prompt": "Why?"}, "So.", "{draft} has {failed}", f"{checker}:check")
    assert filled == "So. has 3 letters"


# ------------------------------------------------------------------------------- training examples


def test_a_seeds_own_draft_takes_the_place_of_sampled_ones():
    seeds = [{**SEEDS[0], "draft": "Because."}, SEEDS[1]]
    rows, _ = training_rows(gold_and_draft(seeds, DRAFTS), None, options())
    assert [(row["prompt"], row["response"]) for row in rows] == [
        ("Q: How?\nA: Like this, I think\nBetter:", "Well."),
        ("Q: Why?\nA: Because.\nBetter:", "Because it is so."),
    ]


def test_seeds_with_drafts_need_no_sampled_ones():
    seeds = [{**seed, "draft": "Because."} for seed in SEEDS]
    assert len(gold_and_draft(seeds, [])) == len(seeds)
    with pytest.raises(InputError, match="no seed has a draft"):
        gold_and_draft(SEEDS, [])


def test_without_scorer_every_draft_with_text_is_an_example():
    rows, _ = training_rows(gold_and_draft(SEEDS, DRAFTS), None, options())
    assert [(row["prompt"], row["response"]) for row in rows] == [
        ("Q: Why?\nA: No idea\nBetter:", "Because it is so."),
        ("Q: How?\nA: Like this, I think\nBetter:", "Well."),
    ]
    more = [*DRAFTS, {**DRAFTS[0], "sample": 2}]
    again, _ = training_rows(gold_and_draft(SEEDS, more), None, options())
    assert len({row["id"] for row in again}) == 3
    assert again[:2] == rows


def test_with_scorer_gold_must_beat_the_draft_by_more_than_the_threshold():
    def kept(threshold: float) -> list[str]:
        rows, _ = training_rows(gold_and_draft(SEEDS, DRAFTS), words, options(threshold=threshold))
        return [row["response"] for row in rows]

    # gaps are 2 and -3
    assert kept(0) == ["Because it is so."]
    assert kept(1.9) == ["Because it is so."]
    assert kept(-3.5) == ["Because it is so.", "Well."]
    gaps = "score gaps -3 -3 -3 2 2"
    problem = rf"improver: .*beats its draft by 2; {gaps}; lower --improver.threshold"
    with pytest.raises(InputError, match=problem):
        kept(2)


def at_most_four_words(rows: list[dict]) -> list[float | None]:
    """A scorer with a small context."""
    return [None if score > 4 else score for score in words(rows)]


def test_an_example_that_the_scorer_cannot_read_is_left_out_and_counted():
    long = {**DRAFTS[0], "response": "I have no idea at all", "sample": 2}
    pairs = gold_and_draft(SEEDS, [*DRAFTS, long])
    rows, not_scored = training_rows(pairs, at_most_four_words, options(threshold=0))
    assert [row["response"] for row in rows] == ["Because it is so."]
    assert "No idea" in rows[0]["prompt"]
    assert not_scored == 1
    # gold, too, may be beyond its context
    gold = [{**SEEDS[0], "response": "Because it is so as it is."}, SEEDS[1]]
    pairs = gold_and_draft(gold, DRAFTS)
    assert training_rows(pairs, at_most_four_words, options(threshold=-9))[1] == 1
    with pytest.raises(InputError, match="beats its draft by 0; score gaps -3 -3 -3 -3 -3"):
        training_rows(pairs, at_most_four_words, options(threshold=0))


def test_a_scorer_that_compares_sees_gold_beside_its_draft():
    """P - (1 - P) of gold against its draft; twice the logit where the scorer gives one."""

    def better(rows: list[dict], others: list[dict]) -> list[float]:
        assert [row["response"] for row in rows] == ["Because it is so.", "Well."]
        assert [row["response"] for row in others] == ["No idea", "Like this, I think"]
        return [0.75, 0.5]

    def kept(threshold: float) -> int:
        pairs = gold_and_draft(SEEDS, DRAFTS)
        rows, _ = training_rows(pairs, better, options(threshold=threshold))
        return len(rows)

    better.pairwise = True
    assert [kept(-0.1), kept(0), kept(0.49)] == [2, 1, 1]
    with pytest.raises(InputError, match=r"beats its draft by 0\.5; score gaps 0 0 0 0\.5 0\.5"):
        kept(0.5)
    better.logits = True
    assert [kept(0.99), kept(1.49)] == [2, 1]


@pytest.mark.parametrize(("scorer", "kept"), [(None, 2), (words, 1)])
def test_stage_counts_drafts_and_examples(tiny, tmp_path, monkeypatch, scorer, kept):
    monkeypatch.setattr(improve, "load_scorer", lambda *_, **__: scorer)
    monkeypatch.setattr(improve, "sft", lambda model, rows, stage, o: {"records": len(rows)})
    monkeypatch.setattr(improve.Stage, "finish", lambda self, **counts: counts)
    seeds = write_rows(tmp_path / "seeds.jsonl", SEEDS)
    drafts = write_rows(tmp_path / "drafts.jsonl", DRAFTS)
    counts = train_improver(tiny, seeds, drafts, tmp_path / "improver", options())
    assert counts == {"drafts": 2, "not_scored": 0, "kept": kept, "records": kept}


# ---------------------------------------------------------------------------------------- rewrites

TURNS = [{"role": "user", "content": "How?"}]
ANSWERS = [
    {"id": "a", "prompt": "Why?", "response": "It is so", "finish_reason": "stop", "tokens": 4},
    {"id": "b", "messages": TURNS, "response": "Do it", "finish_reason": "stop"},
]


class Rewritten:
    """rewrite() of two drafts, with given candidates (response, finish_reason) for each instead of
    a model's.
    """

    def __init__(self, tiny, folder, monkeypatch):
        self.model = tiny
        self.folder = folder
        self.monkeypatch = monkeypatch
        self.calls = 0

    def __call__(self, a: list, b: list, draft_reason: str = "stop", **changes) -> list[dict]:
        """Rows; then self.counts and what the sampler was asked: self.requests, self.purpose."""

        def generate(model, rows, out, o, scratch, purpose):
            assert model == self.model
            self.requests = rows
            self.purpose = purpose
            written = []
            texts = {"a": list(a), "b": list(b)}
            for row in rows:
                text, reason = texts[row["id"]].pop(0)
                written.append({**row, "response": text, "finish_reason": reason})
            write_rows(out, written)
            return {"tokens": 99, "fresh": 99}

        self.monkeypatch.setattr(improve, "generate", generate)
        self.calls += 1
        out = self.folder / f"out{self.calls}.jsonl"
        answers = [{**row, "finish_reason": draft_reason} for row in ANSWERS]
        drafts = write_rows(self.folder / "drafts.jsonl", answers)
        o = RewriteOptions(run=FP32, best_of=len(a), **changes)
        base = self.model / "config.json"  # any path that is not the improver's
        assert rewrite(self.model, drafts, base, out, o, Revision(template=SHORT), t=2) == out
        self.base = base
        self.counts = counts_of(out)
        return read_rows(out)


@pytest.fixture
def rewritten(tiny, tmp_path, monkeypatch):
    return Rewritten(tiny, tmp_path, monkeypatch)


@pytest.fixture
def most_words(monkeypatch):
    """--scorer: the longest text wins; remembers under which model it was asked for."""
    bases = []

    def load(spec, base, *_, **__):
        bases.append(base)
        return words

    monkeypatch.setattr(improve, "load_scorer", load)
    monkeypatch.setattr(improve, "scorer_files", lambda spec: [])
    return bases


def test_drafts_that_do_not_fit_are_left_out(rewritten, monkeypatch):
    """One of 600 tokens, where the model has 512 positions."""
    first, second = ANSWERS
    monkeypatch.setitem(second, "response", "x" * 600)
    rows = rewritten([("one", "stop")], [("two", "stop")])
    assert [row["id"] for row in rows] == [first["id"]]
    assert [row["id"] for row in rewritten.requests] == [first["id"]]
    assert (rewritten.counts["drafts"], rewritten.counts["too_long"]) == (2, 1)
    monkeypatch.setitem(first, "response", "x" * 600)
    with pytest.raises(InputError, match=r"drafts\.jsonl: no prompt leaves room .* 512 tokens"):
        rewritten([("one", "stop")], [("two", "stop")])


def test_one_rewrite_is_taken_as_it_is(rewritten):
    rows = rewritten([("Because it  is", "stop")], [("Do", "length")])
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
            "messages": TURNS,
            "draft": "Do it",
            "response": "Do",
            "finish_reason": "length",
        },
    ]
    expected = {"drafts": 2, "rewrites": 2, "unchanged": 0, "cut_off": 1, "tokens": 99}
    assert expected.items() <= rewritten.counts.items()
    assert rewritten.purpose == "rewrites 2"
    assert rewritten.requests == [
        {"id": "a", "prompt": "Q: Why?\nA: It is so\nBetter:"},
        {"id": "b", "prompt": "Q: How?\nA: Do it\nBetter:"},
    ]


def test_unchanged_drafts_are_counted(rewritten):
    rewritten([("It is\nso ", "stop")], [("Do it now", "stop")])
    assert rewritten.counts["unchanged"] == 1


def test_without_scorer_the_first_finished_text_wins(rewritten):
    a = [("first", "stop"), ("second one", "stop")]
    rows = rewritten(a, [("cut", "length"), ("whole", "stop")])
    assert [row["response"] for row in rows] == ["first", "whole"]
    expected = [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert [(row["id"], row["sample"]) for row in rewritten.requests] == expected
    rows = rewritten([("", "stop"), ("cut off", "length")], [("", "stop"), ("", "length")])
    # a text that is cut off is more than none
    assert [row["response"] for row in rows] == ["cut off", ""]


def test_scorer_decides_among_the_finished(rewritten, most_words):
    a = [("a b", "stop"), ("a b c", "stop"), ("a", "stop")]
    b = [("a b c d e", "length"), ("a b", "stop"), ("a", "stop")]
    rows = rewritten(a, b, scorer="words")
    assert [row["response"] for row in rows] == ["a b c", "a b"]
    # `likelihood` is measured under M_0, not under the improver
    assert most_words == [rewritten.base]


def test_a_rewrite_that_the_scorer_cannot_read_does_not_win(rewritten, most_words, monkeypatch):
    """Unless it can read none of that draft's: then the first is taken, as without a scorer."""
    monkeypatch.setattr(improve, "load_scorer", lambda *_, **__: at_most_four_words)
    long = "one two three four five"
    a = [(long, "stop"), ("one", "stop"), ("one two", "stop")]
    b = [(f"{long} six", "length"), (long, "stop"), (f"{long} seven", "stop")]
    rows = rewritten(a, b, scorer="words")
    assert [row["response"] for row in rows] == ["one two", long]
    assert rewritten.counts["not_scored"] == 4
    # not even in place of a cut-off one
    rows = rewritten([(long, "stop"), ("one", "length")], [("a", "stop"), ("b", "stop")])
    assert [row["response"] for row in rows] == ["one", "a"]
    assert rewritten.counts["not_scored"] == 1


def test_draft_competes_with_its_rewrites(rewritten, most_words):
    def best(a: str, b: str, **more) -> list[str]:
        changes = {"scorer": "words", "draft_competes": True, **more}
        rows = rewritten([(a, "stop")], [(b, "stop")], **changes)
        return [row["response"] for row in rows]

    assert best("Worse", "Do it this way") == ["It is so", "Do it this way"]
    assert rewritten.counts["unchanged"] == 1
    assert best("Worse", "Do", draft_reason="length") == ["Worse", "Do"]
    # where the draft is as good as the rewrite: the rewrite
    assert best("one two three", "") == ["one two three", "Do it"]


# ------------------------------------------------------------------------------------- the command


class Killed(Exception):
    pass


def killed(*_):
    raise Killed


FLAGS = """
--dtype float32 --answers.max-new-tokens 5 --rewrites.max-new-tokens 5
--improver.drafts 2 --improver.epochs 1 --improver.scorer likelihood --improver.threshold -9
--rewrites.best-of 2 --rewrites.scorer likelihood --rewrites.draft-competes
"""


@pytest.mark.slow
def test_stages_from_seeds_to_rewrites(tiny, tmp_path, monkeypatch):
    seeds = write_rows(tmp_path / "seeds.jsonl", SEEDS)
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Number {i}?"} for i in range(3)])
    out = tmp_path / "run"
    files = ["--model", tiny, "--seeds", seeds, "--prompts", prompts, "--out", out]
    arguments = parse_options(main, [*map(str, files), *FLAGS.split()])

    # stopped while candidates were scored
    real = improve.pick
    monkeypatch.setattr(improve, "pick", killed)
    with pytest.raises(Killed):
        main(**arguments)
    monkeypatch.setattr(improve, "pick", real)
    assert not (out / "rewrites.jsonl").exists()
    candidates = read_rows(out / "rewrites.candidates.jsonl")

    # they are not sampled again
    monkeypatch.setattr("sample.Engine", None)
    assert main(**arguments) == out / "rewrites.jsonl"
    assert read_rows(out / "rewrites.candidates.jsonl") == candidates
    assert not (out / "rewrites.jsonl.partial").exists()

    # every rewrite is one of its candidates, or the draft
    rows = read_rows(out / "rewrites.jsonl")
    counts = counts_of(out / "rewrites.jsonl")
    assert counts["drafts"] == counts["rewrites"] == len(rows) == 3
    drafts = read_rows(out / "answers.jsonl")
    assert [row["draft"] for row in rows] == [row["response"] for row in drafts]
    assert len(read_rows(out / "seed_answers.jsonl")) == 4
    assert len(candidates) == 6
    for row, draft in zip(rows, drafts, strict=True):
        own = [c["response"] for c in candidates if c["id"] == row["id"]]
        assert row["response"] in [*own, draft["response"]]
    assert (out / "improver" / "model.safetensors").is_file()

    # done is done
    monkeypatch.setattr(improve, "pick", killed)
    main(**arguments)
    assert counts_of(out / "rewrites.jsonl") == counts

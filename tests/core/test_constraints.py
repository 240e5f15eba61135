"""Instructions with constraints: every kind's check and edit by hand, what counts, and the data."""

import json
import random
import re

import pytest
from conftest import ROOT, read_rows
from cycle import command, counts

import loop
from demo import constraints
from demo.constraint_kinds import KINDS, sentences_of
from demo.constraints import (
    broken_rules,
    draw_constraints,
    edited,
    evaluate,
    guarded,
    kept,
    score,
    with_constraints,
)
from eval.answers import MIN_OWN_WORDS
from plumbing.files import InputError, write_jsonl
from plumbing.options import RunOptions
from sample import SampleOptions

pytest_plugins = ["cycle"]

TEXT = "Trees need light. They grow slowly (as 2 of us know)! Do you like them?"

# kind -> arguments, a text that keeps it, texts that break it, what editing TEXT gives
BY_HAND = {
    "numbered": (
        {"n": 2},
        "1. One.\n\n2. Two.",
        ["1. One.", "1. One.\n3. Two.", "1. One.\n2. Two.\nDone."],
        "1. Trees need light.\n2. They grow slowly (as 2 of us know)!",
    ),
    "dashed": (
        {"n": 2},
        "- One.\n- Two.",
        ["- One.", "- One.\n* Two.", "-One.\n-Two."],
        "- Trees need light.\n- They grow slowly (as 2 of us know)!",
    ),
    "lines": (
        {"n": 2},
        "One\n\nTwo",
        ["One", "One\nTwo\nThree"],
        "Trees need light.\nThey grow slowly (as 2 of us know)!",
    ),
    "line sign": ({"sign": ">"}, "> One\n>Two", ["> One\nTwo", ""], f"> {TEXT}"),
    "one block": ({}, "One. Two.", ["One.\nTwo.", ""], TEXT),
    "labels": (
        {"labels": ["What", "Why"]},
        "What: a tree\nWHY: it is green",
        ["What: a tree", "What and Why: a tree"],
        "What: Trees need light.\nWhy: They grow slowly (as 2 of us know)! Do you like them?",
    ),
    "JSON": (
        {"keys": ["short", "long"]},
        '{"short": "a", "long": "b"}',
        ['{"long": "b", "short": "a"}', '{"short": "a"}', "[1]", "short: a", '"short"'],
        '{"short": "Trees need light.", '
        '"long": "They grow slowly (as 2 of us know)! Do you like them?"}',
    ),
    "enclosed": ({"marks": ["[", "]"]}, "[a]", ["[a", "a]", "[a]."], f"[{TEXT}]"),
    "opening": ({"opening": "In short,"}, "IN SHORT, a", ["a In short,"], f"In short, {TEXT}"),
    "closing": ({"closing": "That is all."}, "a THAT IS ALL.", ["That is all. a"], None),
    "signed": (
        {"name": "Kim"},
        "a\n— kim",
        ["Kim", "a Kim", "a\nKim and Lee"],
        f"{TEXT}\nKim",
    ),
    "hashtags": (
        {"n": 2},
        "a #b #c",
        ["a #b", "#b #c a", "a #b #c #d", "#b a #c"],
        f"{TEXT} #slowly #light",
    ),
    "one question": ({}, "a?", ["a", "a? b?"], None),
    "remark": ({}, "a (by me) b", ["a", "a (b) c", "a ( b"], None),
    "no digits": ({}, "two", ["2", "v2"], TEXT.replace("2", "two")),
    "sentences": (
        {"n": 2},
        "One. Two!",
        ["One.", "One. Two. Three."],
        "Trees need light. They grow slowly (as 2 of us know)!",
    ),
    "few words": ({"n": 10}, "a b", ["a b c d e f g h i j"], "Trees need light."),
    "many words": ({"n": 3}, "a b c", ["a b"], None),
    "word used": ({"word": "time"}, "Time flies.", ["Sometimes.", "timer"], None),
    "word avoided": (
        {"word": "grow"},
        "a growing tree",
        ["Grow up", "we grow."],
        "Trees need light. Do you like them?",
    ),
    "small letters": ({}, "ab 1", ["aB"], TEXT.lower()),
    "capitals": ({}, "AB 1", ["AB c"], TEXT.upper()),
}


def test_every_kind_is_tested():
    assert set(BY_HAND) == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_checks_and_edits_by_hand(name):
    kind = KINDS[name]
    arguments, good, bad, by_edit = BY_HAND[name]
    assert kind.check(good, arguments)
    assert [text for text in bad if kind.check(text, arguments)] == []
    if by_edit is not None:
        assert kind.edit(TEXT, arguments) == by_edit
        assert kind.check(by_edit, arguments)


def test_further_edits_by_hand():
    assert KINDS["closing"].edit("So. ", {"closing": "Good luck!"}) == "So. Good luck!"
    assert KINDS["one question"].edit("Why? So.", {}) == "Why. So. Does that help you?"
    assert KINDS["remark"].edit("One. Two. Three.", {}) == "One. (Two.) Three."
    # spoilers
    assert KINDS["many words"].spoil("One two. Three four. Five six.", {"n": 6}) == (
        "One two. Three four."
    )
    assert KINDS["word used"].spoil("No time. Go on.", {"word": "time"}) == "Go on."
    # what cannot be made
    assert KINDS["numbered"].edit("One.", {"n": 2}) is None
    assert KINDS["labels"].edit("One.", {"labels": ["What", "Why"]}) is None
    assert KINDS["JSON"].edit("One.", {"keys": ["a", "b"]}) is None
    assert KINDS["no digits"].edit("In 1999.", {}) is None
    assert KINDS["hashtags"].edit("a b", {"n": 1}) is None


def test_sentences():
    text = '1. "Stop!" he said. Then 3.5 miles.\n- No end\n\n**Bold** one?'
    assert sentences_of(text) == ['"Stop!"', "he said.", "Then 3.5 miles.", "No end", "Bold one?"]
    assert sentences_of(" \n") == []


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_has_what_its_wordings_name(name):
    kind = KINDS[name]
    assert kind.edit or kind.spoil
    assert len(kind.wordings) == 2
    arguments = kind.draw(random.Random(0))
    for wording in kind.wordings:
        assert "{" not in wording.format(**arguments).replace("{ before", "").replace("{ and", "")
        for name in arguments:
            assert f"{{{name}" in wording


def test_no_wording_is_ifevals(shared_data):
    rows = [json.loads(line) for line in open(shared_data / "ifeval/input_data.jsonl")]
    text = " ".join(" ".join(re.findall(r"\w+", row["prompt"].lower())) for row in rows)
    assert "in your response" in text
    for kind in KINDS.values():
        for wording in kind.wordings:
            words = re.findall(r"\w+", re.sub(r"\{[^}]*\}", " ", wording).lower())
            for i in range(len(words) - 4):
                assert f" {' '.join(words[i : i + 5])} " not in text


# -------------------------------------------------------------------------- constraints of a record


def constraint(kind: str, **arguments) -> dict:
    return {"kind": kind, **arguments, "rule": f"Rule of {kind}."}


def record(response: str, *given: dict, **more) -> dict:
    row = {"id": "a", "prompt": "Tell me about trees.", "response": response}
    return {**row, "constraints": list(given), **more}


LONG = "Tall oaks and small firs grow in every wood that I have ever seen."  # 14 words


def test_two_constraints_never_rule_the_form_of_the_whole():
    drawn = [draw_constraints(random.Random(seed)) for seed in range(400)]
    assert {len(some) for some in drawn} == {1, 2}
    for some in drawn:
        assert sum(KINDS[c["kind"]].layout for c in some) <= 1
        assert len({c["kind"] for c in some}) == len(some)
    assert {c["kind"] for some in drawn for c in some} == set(KINDS)


def test_a_prompt_is_the_instruction_and_its_rules():
    rules = [constraint("capitals"), constraint("remark")]
    assert with_constraints("Go on", rules) == "Go on. Rule of capitals. Rule of remark."
    assert with_constraints("Go on! ", rules[:1]) == "Go on! Rule of capitals."


def test_edited_answers_keep_all_and_drafts_do_not():
    signed, small = constraint("signed", name="Kim"), constraint("small letters")
    # letters come last, so that the name is small too
    assert edited(LONG, [small, signed]) == (f"{LONG.lower()}\nkim", LONG)
    assert edited(LONG.lower(), [small]) is None  # kept as it is, nothing to spoil
    assert edited("One.", [constraint("lines", n=2)]) is None
    many = constraint("many words", n=4)
    assert edited("One two. Three four.", [many]) == ("One two. Three four.", "One two.")


def test_what_counts_by_hand():
    small = constraint("small letters")
    twelve = " ".join(f"w{i}" for i in range(MIN_OWN_WORDS))
    assert guarded(record(twelve))
    assert not guarded(record(twelve.rpartition(" ")[0]))
    assert not guarded(record(f"{twelve.rpartition(' ')[0]} trees"))  # an echo of the prompt
    assert not guarded(record(twelve, finish_reason="length"))
    assert not guarded(record(" ".join(["one two three four"] * 4)))  # 10 of 14 trigrams again

    rows = [
        record(LONG.lower(), small),
        record(LONG, small),
        record("yes", small),
        record(LONG.lower(), small, constraint("one question")),
    ]
    assert [kept(row) for row in rows] == [1, 0, 1, 0.5]
    assert score(rows) == [1, 0, 0, 0]
    broken = [note["broken"] for note in broken_rules(rows)]
    assert broken == ["none", "Rule of small letters.", "none", "Rule of one question."]

    # the constraints are those of the held-out records
    answers = [{"id": "a", "prompt": row["prompt"], "response": row["response"]} for row in rows]
    result = evaluate(answers, rows, answers, None, ROOT, RunOptions())
    assert result["scores"] == [1, 0, 0, 0] and result["score"] == 0.25
    assert result["kept"] == 0.5 and result["guarded"] == 0.75
    assert result["near"] == 0.75  # small letters: 3 of 4
    assert result["far"] == 0  # one question: 0 of 1


# -------------------------------------------------------------------------------------------- data


@pytest.fixture(scope="module")
def data(tmp_path_factory, monkeypatch_module):
    """The command's files, from the answers of a model that is not there."""

    def sample(model, prompts, out, o, samples, purpose):
        rows = [
            {**row, "response": f"{LONG} It is {row['prompt']}\nIs it?", "finish_reason": "stop"}
            for row in read_rows(prompts)
        ]
        write_jsonl(out, rows)
        return out

    monkeypatch_module.setattr(constraints, "sample", sample)
    folder = tmp_path_factory.mktemp("constraints")
    instructions = [{"prompt": f"Name tree {word}."} for word in "abcdefghijklmnopqrst"]
    write_jsonl(folder / "plain.jsonl", [*instructions, {"prompt": "two\nlines"}])
    out = folder / "data"
    constraints.main(ROOT, folder / "plain.jsonl", out, SampleOptions(), 60, 50, 30)
    return out


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_the_data_share_no_instruction(data):
    files = {name: read_rows(data / f"{name}.jsonl") for name in ("seeds", "prompts", "heldout")}
    assert {name: len(rows) for name, rows in files.items()} == {
        "seeds": 60,
        "prompts": 50,
        "heldout": 30,
    }
    names = {name: {row["prompt"][:11] for row in rows} for name, rows in files.items()}
    assert len(names["seeds"]) == 7 and len(names["prompts"]) == 10 and len(names["heldout"]) == 3
    assert not names["seeds"] & names["prompts"]
    assert not names["heldout"] & (names["seeds"] | names["prompts"])
    for row in files["seeds"] + files["heldout"]:
        assert score([row]) == [1]
        assert score([{**row, "response": row["draft"]}]) == [0]
    assert len({row["prompt"] for row in files["prompts"]}) == 50


def test_too_few_answers_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"seeds.jsonl: .* of 60 records made; give more"):
        constraints.write_edited([record("Yes.")], 60, tmp_path / "seeds.jsonl", 0)


def test_the_recipe_runs(data, tiny, tmp_path):
    """One iteration on a random model: its texts keep nothing, so that the filter is off."""
    out = tmp_path / "run"
    files = {"seeds": "seeds", "heldout": "heldout", "prompts.source": "prompts"}
    flags = [f"--{name}={data / file}.jsonl" for name, file in files.items()]
    flags += [f"--{part}.max-new-tokens=8" for part in ("answers", "rewrites")]
    flags += ["--prompts.max-prompts=6", "--seeds-limit=8", "--heldout-limit=4", "--iters=1"]
    flags += ["--pairs.scorer=none", "--pairs.max-repetition=1", "--pairs.keep-cut-off"]
    recipe = str(ROOT / "recipes" / "constraints.toml")
    argv = [f"--config={recipe}", f"--model={tiny}", f"--out={out}", "--dtype=float32", *flags]
    code, _, errors = command(loop.main, argv)
    assert code == 0, errors
    # no seed was answered: each brings its draft, and its constraint goes into what R reads
    assert counts(out / "iter1/seed_answers.jsonl")["answers"] == 0
    assert counts(out / "iter1/improver")["kept"] == 8
    # constraints travel from the prompts to the pairs
    for name in ("prompts", "base_answers", "rewrites", "pairs"):
        assert all("constraints" in row for row in read_rows(out / f"iter1/{name}.jsonl")), name
    result = json.loads((out / "iter1/eval.json").read_text())
    assert len(result["scores"]) == 4 and set(result) >= {"kept", "guarded", "words"}

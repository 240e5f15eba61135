"""What users' files look like: every layout, as a file, comes out in the project's own fields."""

import json
from pathlib import Path

import pytest
from conftest import refusal

from formats.records import read_jsonl, read_paragraphs

QUESTION = {"role": "user", "content": "Why?"}
SYSTEM = {"role": "system", "content": "Be brief."}
GOLD = {"role": "assistant", "content": "Because."}
BAD = {"role": "assistant", "content": "No."}
FIRST = {"role": "assistant", "content": "Hello."}


def read(path: Path, *rows: dict, fields: tuple[str, ...] = ()) -> list[dict]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_jsonl(path, *fields)


# layout, record as users have it, what it says
SFT = [
    ("plain", {"prompt": "Why?", "response": "Because."}),
    ("TRL prompt and completion", {"prompt": "Why?", "completion": "Because."}),
    ("TRL conversational", {"prompt": [QUESTION], "completion": [GOLD]}),
    ("TRL messages", {"messages": [QUESTION, GOLD]}),
    ("UltraChat, no_robots", {"prompt": "Why?", "messages": [QUESTION, GOLD], "prompt_id": "x"}),
    ("Alpaca", {"instruction": "Why?", "input": "", "output": "Because."}),
    (
        "ShareGPT",
        {
            "conversations": [
                {"from": "human", "value": "Why?"},
                {"from": "gpt", "value": "Because."},
            ]
        },
    ),
    (
        "parts",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}, GOLD]},
    ),
]
PAIRS = [
    ("plain", {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}),
    ("TRL explicit prompt", {"prompt": [QUESTION], "chosen": [GOLD], "rejected": [BAD]}),
    ("TRL implicit prompt", {"chosen": [QUESTION, GOLD], "rejected": [QUESTION, BAD]}),
    (
        "UltraFeedback",
        {
            "prompt": "Why?",
            "messages": [QUESTION, GOLD],
            "chosen": [QUESTION, GOLD],
            "rejected": [QUESTION, BAD],
            "score_chosen": 8.0,
        },
    ),
    (
        "ShareGPT preference",
        {
            "conversations": [{"from": "human", "value": "Why?"}],
            "chosen": {"from": "gpt", "value": "Because."},
            "rejected": {"from": "gpt", "value": "No."},
        },
    ),
]


@pytest.mark.parametrize(("layout", "row"), SFT, ids=[layout for layout, _ in SFT])
def test_the_answer_is_the_response_and_never_in_the_prompt(tmp_path, layout, row):
    found = read(tmp_path / "in.jsonl", row, fields=("prompt", "response"))[0]
    assert found["response"] == "Because."
    assert found.get("messages", [QUESTION]) == [QUESTION]
    assert found.get("prompt", "Why?") == "Why?"
    assert ("prompt" in found) != ("messages" in found)
    assert not {"completion", "output", "conversations", "instruction"} & found.keys()
    # the same question has the same id in every layout
    assert found["id"] == read(tmp_path / "plain.jsonl", SFT[0][1])[0]["id"]


@pytest.mark.parametrize(("layout", "row"), PAIRS, ids=[layout for layout, _ in PAIRS])
def test_both_sides_of_a_pair_are_texts_without_the_prompt(tmp_path, layout, row):
    found = read(tmp_path / "in.jsonl", row, fields=("prompt", "chosen", "rejected"))[0]
    assert (found["chosen"], found["rejected"]) == ("Because.", "No.")
    assert found.get("messages", [QUESTION]) == [QUESTION]
    assert found.get("prompt", "Why?") == "Why?"
    assert found.get("score_chosen", 8.0) == 8.0, "other fields stay"
    assert "response" not in found


def test_earlier_turns_stay_in_the_conversation(tmp_path):
    talk = [SYSTEM, QUESTION, FIRST, QUESTION]
    sharegpt = [
        {"from": "human", "value": "Why?"},
        {"from": "gpt", "value": "Hello."},
        {"from": "human", "value": "Why?"},
        {"from": "gpt", "value": "Because."},
    ]
    rows = read(
        tmp_path / "in.jsonl",
        {"messages": [*talk, GOLD]},
        {"prompt": talk, "completion": [GOLD]},
        {"conversations": sharegpt, "system": "Be brief."},
        {
            "instruction": "Why?",
            "output": "Because.",
            "system": "Be brief.",
            "history": [["Why?", "Hello."]],
        },
        {"chosen": [*talk, GOLD], "rejected": [*talk, BAD], "response": "Because."},
        {"prompt": "Why?", "messages": talk, "response": "Because."},
    )
    assert [row["messages"] for row in rows] == [talk] * 6
    assert [row["response"] for row in rows] == ["Because."] * 6


def test_alpacas_input_follows_its_instruction(tmp_path):
    row = {"instruction": "Add.", "input": "1 + 1", "output": "2"}
    assert read(tmp_path / "in.jsonl", row)[0]["prompt"] == "Add.\n\n1 + 1"


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"prompt": "What?", "messages": [QUESTION, GOLD]}, "prompt is not in its messages"),
        ({"messages": [QUESTION, GOLD], "response": "No."}, "another response"),
        ({"chosen": [QUESTION, GOLD], "rejected": [SYSTEM, BAD]}, "conversations differ"),
        ({"prompt": "What?", "chosen": [QUESTION, GOLD], "rejected": "b"}, "not in its messages"),
        ({"prompt": [QUESTION], "chosen": [QUESTION], "rejected": "b"}, "'chosen' must end"),
        ({"prompt": "Why?", "completion": "a", "response": "b"}, "both 'completion'"),
        ({"messages": [{"role": "user"}], "response": "b"}, "'messages' is not text, nor a list"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}], "response": "b"},
            "part of type 'image_url'",
        ),
        ({"question": "Why?", "answer": "Because."}, "it has question, answer"),
        (["a", "b"], "not an object"),
        ({"instruction": "Why?", "output": "b", "history": 5}, "not iterable"),
        ({"prompt": 7, "messages": [QUESTION, GOLD]}, "not in its messages"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused_with_its_line(tmp_path, row, part):
    good = {"prompt": "Why?", "response": "Because."}
    path = tmp_path / "in.jsonl"
    message = refusal(read, path, good, row, fields=("prompt", "response"))
    assert message.startswith(f"{path}: line 2: ")
    assert part in message
    assert "fix or delete" in message


# ------------------------------------------------------------------------------------------- files


GOOD = '{"prompt": "Why?", "response": "Because."}'
OTHER = '{"prompt": "When?", "response": "Now."}'


@pytest.mark.parametrize(
    "text",
    [
        f"{GOOD}\n{OTHER}\n",
        f"\ufeff{GOOD}\n{OTHER}",
        f"{GOOD}\r\n\r\n{OTHER}\r\n",
        f"\n{GOOD}\n   \n\n{OTHER}\n\n",
        f"[{GOOD}, {OTHER}]",
        f"\n[\n{GOOD},\n\n{OTHER}\n]\n",
        json.dumps([json.loads(GOOD), json.loads(OTHER)], indent=2),
    ],
    ids=["lines", "BOM", "CRLF", "blank lines", "array", "array of lines", "pretty"],
)
def test_every_kind_of_file_holds_the_same_records(tmp_path, text):
    path = tmp_path / "in.json"
    path.write_bytes(text.encode())
    rows = read_jsonl(path, "prompt", "response")
    assert [row["prompt"] for row in rows] == ["Why?", "When?"]
    assert [row["response"] for row in rows] == ["Because.", "Now."]
    assert rows[0]["id"] == read(tmp_path / "plain.jsonl", json.loads(GOOD))[0]["id"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f"\n\n{GOOD}\n\n{{}}\n", 5),
        (f"[{GOOD},\n\n{{}}]", 3),
        (json.dumps([json.loads(GOOD), {}], indent=1), 6),
        (f"[{GOOD},\n {GOOD[:-1]}]", 2),
    ],
)
def test_errors_name_the_line_of_the_file(tmp_path, text, line):
    path = tmp_path / "in.json"
    path.write_text(text)
    assert refusal(read_jsonl, path, "prompt").startswith(f"{path}: line {line}")


def test_an_array_without_records_is_refused(tmp_path):
    (tmp_path / "in.json").write_text("[ ]")
    assert "no records" in refusal(read_jsonl, tmp_path / "in.json")


@pytest.mark.parametrize("field", ["prompt", "id", "response"])
def test_half_of_a_surrogate_pair_is_refused_by_line(tmp_path, field):
    path = tmp_path / "in.jsonl"
    bad = {"prompt": "Why?", "response": "b", field: "x\ud83dy"}
    path.write_text(GOOD + "\n" + json.dumps(bad))
    message = refusal(read_jsonl, path, "prompt")
    assert message.startswith(f"{path}: line 2: half of a surrogate pair")
    whole = {"prompt": "\U0001f600", "response": "b"}
    path.write_text(json.dumps(whole))  # as two escapes
    assert read_jsonl(path)[0]["prompt"] == "\U0001f600"


@pytest.mark.parametrize(
    ("text", "paragraphs"),
    [
        ("a\nb\n\n \nc\n", ["a\nb", "c\n"]),
        ("a\nb\n", ["a", "b"]),
        ('{"text": "a\\n\\nb"}\n{"text": "c", "url": "x"}\n', ["a\n\nb", "c"]),
        ('[{"text": "a"}, {"text": "b"}]', ["a", "b"]),
        ("[1] A note.\n\n{b}", ["[1] A note.", "{b}"]),
    ],
    ids=["blank lines", "lines", "JSON lines", "array", "no JSON"],
)
def test_a_corpus_is_paragraphs_lines_or_records(tmp_path, text, paragraphs):
    (tmp_path / "corpus").write_text(text)
    assert read_paragraphs(tmp_path / "corpus") == paragraphs


def test_a_corpus_record_without_a_text_is_refused_by_line(tmp_path):
    (tmp_path / "corpus").write_text('{"text": "a"}\n{"body": "b"}\n')
    message = refusal(read_paragraphs, tmp_path / "corpus")
    assert message.startswith(f"{tmp_path / 'corpus'}: line 2: field 'text'")


def test_ids_are_texts_and_samples_are_named(tmp_path):
    rows = [{"id": 7, "prompt": "a"}, {"id": "7", "prompt": "b"}]
    assert "id '7' was used" in refusal(read, tmp_path / "in.jsonl", *rows)
    several = [{"id": 7, "prompt": "a", "sample": 1}] * 2
    message = refusal(read, tmp_path / "in.jsonl", *several)
    assert "sample 1 of id '7'" in message
    assert "`sample`" in message

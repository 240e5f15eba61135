"""Records: what a user's file may hold, ids, files written whole, tables, the cache folder."""

import json
import os
from pathlib import Path

import pytest
from conftest import refusal

from eval.answers import read_lines
from eval.table import table
from formats.records import conversation_text, last_message, messages_of, read_jsonl
from plumbing.files import cache_folder, digest, load_json, rng, write_json, write_jsonl, write_text

GOOD = '{"prompt": "a", "response": "b"}'
TALK = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]

# ------------------------------------------------------------------------------- a user's file


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (None, ["no such file", "check the path"]),
        ("", ["no records", "give at least one"]),
        (" \n\n", ["no records", "give at least one"]),
        (f'{GOOD}\n{{"prompt": "a"', ["line 2", "not valid JSON", "fix or delete"]),
        (f"{GOOD}\n\n{GOOD}\n{{\n", ["line 4", "not valid JSON"]),
        (
            f'{GOOD}\n{GOOD}\n{{"prompt": "a"}}\n',
            ["line 3", "'response'", "missing", "fix or delete"],
        ),
        ('{"response": "b"}', ["line 1", "'prompt'"]),
        (f'{GOOD}\n{{"prompt": " \\n", "response": "b"}}', ["line 2", "'prompt'", "empty"]),
        (f'{GOOD}\n{{"prompt": 7, "response": "b"}}', ["line 2", "'prompt'", "not text"]),
        (f'{GOOD}\n{{"prompt": "a", "response": ["b"]}}', ["line 2", "'response'", "not text"]),
        (f'{GOOD}\n["a", "b"]', ["line 2", "not an object"]),
        (f'{GOOD}\n{{"messages": [], "response": "b"}}', ["line 2", "'prompt'"]),
        (f'{GOOD}\n{{"messages": "hi", "response": "b"}}', ["line 2", "'messages'"]),
        (
            f'{GOOD}\n{{"messages": [{{"role": "user"}}], "response": "b"}}',
            ["line 2", "'messages'", "{role, content}"],
        ),
        (
            '{"prompt": "a", "response": "b", "id": 7}\n{"prompt": "c", "response": "b", "id": 7}',
            ["line 2", "id '7'", "earlier line"],
        ),
    ],
)
def test_bad_records_are_named_by_file_line_field_and_fix(tmp_path, text, parts):
    path = tmp_path / "in.jsonl"
    if text is not None:
        path.write_text(text)
    message = refusal(read_jsonl, path, "prompt", "response")
    assert message.startswith(f"{path}: ")
    assert all(part in message for part in parts), message


def test_a_file_that_is_not_utf8_is_refused_by_name_and_line(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(GOOD.encode() + b'\n{"prompt": "caf\xe9"}\n')
    message = refusal(read_jsonl, path, "prompt")
    assert message.startswith(f"{path}: line 2")
    assert "UTF-8" in message


def test_bad_json_is_named_by_file_and_line(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text('{"a": 1,\n "b": }')
    message = refusal(load_json, path)
    assert message.startswith(f"{path}: line 2 is not valid JSON")
    assert "no such file" in refusal(load_json, tmp_path / "none.json")


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"prompt": "a"}, "'response'"),
        ({"prompt": "a", "response": None}, "'response'"),
        ({"prompt": "a", "response": 7}, "'response'"),
        ({"response": "b"}, "'prompt'"),
        ({"prompt": "a", "response": "b", "draft": 7}, "'draft'"),
        ({"prompt": "a", "response": "b", "sample": [1]}, "'sample'"),
        ({"prompt": "a", "response": "b", "sample": "1"}, "'sample'"),
    ],
)
def test_answers_have_texts_which_may_be_empty(tmp_path, row, named):
    path = tmp_path / "answers.jsonl"
    write_jsonl(path, [{"prompt": "a", "response": "", "sample": 0}])
    assert read_jsonl(path, answers=True)[0]["response"] == ""
    write_jsonl(path, [{"prompt": "c", "response": ""}, row])
    message = refusal(read_jsonl, path, answers=True)
    assert message.startswith(f"{path}: line 2: field ") and named in message


def test_a_null_is_a_field_that_is_not_there(tmp_path):
    path = tmp_path / "in.jsonl"
    write_jsonl(path, [{"prompt": "a", "response": None, "chosen": None, "sample": None}])
    row = read_jsonl(path, "prompt")[0]
    assert row.keys() == {"prompt", "id"}
    assert "'response' is missing" in refusal(read_jsonl, path, "prompt", "response")


def test_a_record_without_anything_asked_is_read_or_refused(tmp_path):
    path = tmp_path / "in.jsonl"
    write_jsonl(path, [{"messages": [], "response": "b"}])
    assert read_jsonl(path)[0]["id"]
    write_jsonl(path, [{"messages": {"a": 1}}])
    assert "'messages' must be a list" in refusal(read_jsonl, path)


DEEP = "[" * 100_000
HUGE = "1" * 5000


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (DEEP, "too many lists or objects in each other"),
        ("[" * 101 + "]" * 101, "too many lists or objects in each other"),
        ('{"a":' * 500 + "1" + "}" * 500, "too many lists or objects in each other"),
        (HUGE, "is no finite number"),
        (f"-{HUGE}", "is no finite number"),
        ("NaN", "NaN is no finite number"),
        ("-Infinity", "-Infinity is no finite number"),
        ("1e999", "1e999 is no finite number"),
    ],
    ids=["open", "lists", "objects", "digits", "negative", "NaN", "infinity", "1e999"],
)
def test_json_that_python_fails_on_is_refused_by_line(tmp_path, value, said):
    path = tmp_path / "bad.json"
    path.write_text(f'{{"a": 1,\n"b": {value}}}')
    message = refusal(load_json, path)
    assert message.startswith(f"{path}: line ") and "is not valid JSON" in message
    assert said in message
    assert len(message) < len(str(path)) + 200
    path.write_text(f'{GOOD}\n{{"prompt": "a", "extra": {value}}}\n')
    assert refusal(read_jsonl, path).startswith(f"{path}: line 2 is not valid JSON")
    assert refusal(read_lines, path).startswith(f"{path}: line 2 is not valid JSON")


def test_deep_enough_json_and_long_texts_of_brackets_are_read(tmp_path):
    deep = '{"a": ' + "[" * 99 + "]" * 99 + "}"
    text = json.dumps({"b": "[{" * 5000 + '\\"[\\' * 3})
    for part in (deep, text, "-12", "[1, -0, 1.5e3, 12345678901234567890]"):
        (tmp_path / "good.json").write_text(part)
        assert load_json(tmp_path / "good.json") == json.loads(part)


def test_a_number_that_json_cannot_say_is_written_as_null(tmp_path):
    value = {"a": float("nan"), "b": [float("inf"), 1.5, 7]}
    write_json(tmp_path / "a.json", value)
    write_jsonl(tmp_path / "a.jsonl", [value])
    for name in ("a.json", "a.jsonl"):
        assert load_json(tmp_path / name) == {"a": None, "b": [None, 1.5, 7]}


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "folder", "file/inside"])
def test_what_is_no_file_is_refused_in_one_line(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for read in (read_jsonl, load_json):
        message = refusal(read, f"{tmp_path}/{name}")
        assert "not a readable file" in message
        assert "check the path" in message


@pytest.mark.parametrize("char", "\n\r\t\x1b\x07\x7f\x85\u2028\u202e\ud83d")
def test_control_characters_in_an_error_are_escaped(tmp_path, char):
    message = refusal(read_jsonl, f"{tmp_path}/a{char}b é 日本.jsonl")
    assert message.isprintable()
    assert f"a{ascii(char)[1:-1]}b é 日本.jsonl" in message


# ------------------------------------------------------------------------------- ids


def read(tmp_path: Path, *rows: dict) -> list[dict]:
    """Rows, written and read again."""
    write_jsonl(tmp_path / "rows.jsonl", rows)
    return read_jsonl(tmp_path / "rows.jsonl")


def test_ids_follow_from_the_prompt_not_from_the_place(tmp_path):
    a, b, c = read(tmp_path, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c", "id": "mine"})
    later = [{"prompt": "c", "id": "9"}, {"prompt": "b", "keywords": 1}, {"prompt": "a"}]
    c2, b2, a2 = read(tmp_path, *later)
    assert (a["id"], b["id"]) == (a2["id"], b2["id"])
    assert a["id"] != b["id"]
    assert (c["id"], c2["id"]) == ("mine", "9")
    # a change would give every run that exists new random numbers
    assert a["id"] == "e3401daba74577e2"


def test_duplicates_get_ids_of_their_own_and_a_conversation_is_its_prompt(tmp_path):
    talk = [{"role": "user", "content": "a"}]
    rows = read(
        tmp_path,
        {"prompt": "a"},
        {"prompt": "a"},
        {"prompt": "b"},
        {"messages": talk},
        {"prompt": "a"},
    )
    assert len({row["id"] for row in rows}) == 5
    assert rows[0]["id"] == read(tmp_path, {"messages": talk})[0]["id"]
    assert messages_of(rows[3]) == talk == messages_of(rows[0])


def test_samples_of_one_prompt_share_its_id(tmp_path):
    rows = read(tmp_path, *({"id": "a", "prompt": "a", "sample": i} for i in range(3)))
    assert [row["id"] for row in rows] == ["a"] * 3


def test_random_numbers_depend_on_their_names_alone():
    assert rng(0, "keywords").random() == rng(0, "keywords").random()
    assert rng(0, "keywords").random() != rng(1, "keywords").random()
    assert digest("a", 1) == digest("a", 1) != digest("a", 2)
    assert len(digest()) == 16


def test_a_conversation_as_text():
    one = {"prompt": "a"}
    several = {"messages": TALK}
    assert (last_message(one), last_message(several)) == ("a", "c")
    assert conversation_text(one) == "a"
    assert conversation_text(several) == "user: a\n\nassistant: b\n\nuser: c"


# ------------------------------------------------------------------------------- files


def test_records_come_back_as_written(tmp_path):
    rows = [
        {"id": "1", "prompt": 'é 日本 \u2028 \x85 \x0c " \\ \n end'},
        {"id": "2", "prompt": "x"},
    ]
    assert read(tmp_path, *rows) == rows
    text = (tmp_path / "rows.jsonl").read_text("utf-8")
    assert text.count("\n") == 2
    assert "日本" in text


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.json"
    write_text(path, "old")
    assert [f.name for f in path.parent.iterdir()] == ["a.json"]

    def killed(*args):
        raise OSError("killed here")

    monkeypatch.setattr(os, "replace", killed)
    assert "killed here" in refusal(write_text, path, "new text")
    assert path.read_text() == "old"


def test_json_files_come_back_as_written(tmp_path):
    value = {"a": [1, 2.5, None, "é"], "b": {"c": True}}
    write_json(tmp_path / "a.json", value)
    assert load_json(tmp_path / "a.json") == value
    assert (tmp_path / "a.json").read_text().startswith('{\n "a"'), "indented, to be read"


def test_table_is_aligned():
    rows = [{"t": 1, "score": 0.12345, "name": "x"}, {"t": 10, "score": 2.0, "name": "longer"}]
    assert table(rows).splitlines() == [
        " t  score    name",
        " 1  0.123       x",
        "10  2.000  longer",
    ]


def test_cache_folder_is_the_users_or_a_temporary_one(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache" / "synpo"
    assert cache_folder().is_dir()

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "synpo"

    # a file where the folder should be
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    other = cache_folder()
    assert other.is_dir()
    assert os.access(other, os.W_OK)
    other.rmdir()

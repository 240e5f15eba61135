"""Records: JSONL files, or JSON arrays, in any layout of formats/layouts.py -> dicts with ids.

A record has a prompt, or a list of `messages` in its place, and an `id`. Errors name FILE and line.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from formats.layouts import normalise
from plumbing.files import InputError, digest, parse_json, read_text


# Texts wherever they are; a response may be empty unless its reader asks for more.
TEXTS = ("prompt", "response", "chosen", "rejected", "draft")


class Record(dict):
    """A record of a user's file, with the place that errors name."""

    where = ""


def where_of(row: dict) -> str:
    """FILE: line N of a record that was read; of one that was made here, its id."""
    return getattr(row, "where", "") or f"record {row.get('id')}"


def read_jsonl(path: str | Path, *fields: str, answers: bool = False) -> list[Record]:
    """Read records, each with an id. Every field named must be a non-empty string in every record;
    `answers` have a prompt and a response, which may be empty.

    A list of `messages` may stand for `prompt`. A record without an id gets the hash of its prompt,
    so its random numbers do not depend on where it stands in the file. Raises InputError with file
    and line.
    """
    rows = []
    seen = set()
    for number, (line, value) in enumerate(values_of(read_text(path), path), 1):
        row = check_record(value, fields, f"{path}: line {line}", answers)
        # ids: the record's own, as text, else by content; equal ones are told apart by their place
        if row.get("id") is not None:
            row["id"] = str(row["id"])
        else:
            asks = "prompt" in row or row.get("messages")
            row["id"] = digest(messages_of(row) if asks else row)
            if (row["id"], 0) in seen:
                row["id"] = digest(row["id"], number)
        key = (row["id"], row.get("sample", 0))
        if key in seen:
            name = f"sample {key[1]} of id" if "sample" in row else "id"
            fix = "number the responses to one prompt in a field `sample`, or leave ids out"
            raise InputError(f"{row.where}: {name} {key[0]!r} was used in an earlier line; {fix}")
        seen.add(key)
        rows.append(row)
    if not rows:
        raise InputError(f"{path}: no records; give at least one")
    return rows


def values_of(text: str, path: str | Path) -> Iterator[tuple[int, object]]:
    """The JSON values of a file and their lines: one a line, or those of a single array."""
    if not text.lstrip().startswith("["):
        for line, part in enumerate(text.split("\n"), 1):
            if part.strip():
                yield line, parse_json(part, path, line)
        return

    # the whole array first, for errors in it; then one by one, for their lines
    parse_json(text, path)
    line = 1
    counted = 0  # characters whose line ends are in `line`
    place = text.index("[") + 1
    between = re.compile(r"[\s,]*")
    while True:
        place = between.match(text, place).end()
        if text[place] == "]":
            return
        line += text.count("\n", counted, place)
        counted = place
        value, place = json.JSONDecoder().raw_decode(text, place)
        yield line, value


def check_record(value, fields: tuple[str, ...], where: str, answers: bool = False) -> Record:
    """A JSON value as a record of the project's own layout; InputError if it cannot be one."""
    if not isinstance(value, dict):
        raise InputError(f"{where}: not an object, {{...}}; fix or delete the line")
    try:
        row = Record(normalise(value))
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        problem = "half of a surrogate pair in a text, such as \\ud83d"
        raise InputError(f"{where}: {problem}; write the character or delete it") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"{where}: {error}; fix or delete the line") from None
    row.where = where
    for field in (*TEXTS, "sample"):
        if row.get(field) is None:  # tables with empty cells are written so
            row.pop(field, None)
    if answers:
        fields += ("prompt",)
        row.setdefault("response", None)
    for field in fields:
        check_field(row, field)
    check_types(row)
    return row


def check_types(row: Record) -> None:
    """Raise InputError where a field that is there holds another kind of value than it should."""
    wrong = [
        f"{field!r} must be text" for field in TEXTS if not isinstance(row.get(field, ""), str)
    ]
    if row.get("messages") and not is_conversation(row["messages"]):
        wrong.append("'messages' must be a list of {role, content} texts")
    if type(row.get("sample", 0)) is not int:
        wrong.append("'sample' must be a whole number")
    if wrong:
        raise InputError(f"{row.where}: field {wrong[0]}; fix or delete the line")


def check_field(row: Record, field: str) -> None:
    """Raise InputError unless row[field] is usable text; `messages` may stand for `prompt`."""
    if field == "prompt" and row.get("messages"):
        usable = is_conversation(row["messages"])
        expected = "field 'messages' must be a list of {role, content} texts"
    else:
        text = row.get(field)
        usable = isinstance(text, str) and text.strip()
        expected = f"field {field!r} is missing, empty or not text"
    if not usable:
        names = ", ".join(row) or "none"
        fix = "fix or delete the line (docs/data.md lists the layouts that are read)"
        raise InputError(f"{row.where}: {expected}; it has {names}; {fix}")


def read_paragraphs(path: str | Path) -> list[str]:
    """Paragraphs of a text: the records' `text` of JSON lines; else what blank lines divide, or
    lines where there is no blank one.
    """
    text = read_text(path)
    if text.lstrip().startswith(("{", "[{")):
        return [row["text"] for row in read_jsonl(path, "text")]
    blank = r"\n\s*\n"
    parts = re.split(blank if re.search(blank, text.strip()) else r"\n", text)
    return [part for part in parts if part.strip()]


# ----------------------------------------------------------------------------------- conversations


def is_conversation(messages) -> bool:
    """Whether it is a list of {role, content} texts."""
    return isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )


def messages_of(row: dict) -> list[dict]:
    """The conversation up to the response."""
    return row.get("messages") or [{"role": "user", "content": row["prompt"]}]


def last_message(row: dict) -> str:
    """The text of the last turn: what the response responds to."""
    return messages_of(row)[-1]["content"]


def conversation_text(row: dict) -> str:
    """The prompt as plain text; several turns are written as `role: text`, with blank lines
    between.
    """
    turns = messages_of(row)
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)

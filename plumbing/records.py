"""Records: JSON lines, text and JSON files, stable ids, and the one error that a user sees.

A record is a dict with a prompt (or a list of `messages` in its place) and an `id`. Files are
UTF-8, one record a line. A file is written whole or not at all, so neither a reader nor a restart
ever sees half of one.
"""

import hashlib
import json
import os
import random
import tempfile
from pathlib import Path

STOP_WORDS = frozenset((Path(__file__).parents[1] / "stop_words.txt").read_text("utf-8").split())


class InputError(Exception):
    """A user error, reported as one line: file, location, fix."""


# ----------------------------------------------------------------------------------- text and JSON


def read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text("utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path}: line {line} is not UTF-8; save the file as UTF-8") from None


def load_json(path: str | Path):
    return parse_json(read_text(path), path)


def parse_json(text: str, path: str | Path, first_line: int = 1):
    """The value of a text that begins at a line of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}: line {first_line + error.lineno - 1}"
        raise InputError(f"{where} is not valid JSON ({error.msg}); fix or delete it") from None


def write_text(path: str | Path, text: str) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)


def write_json(path: str | Path, value) -> None:
    write_text(path, json.dumps(value, indent=1))


def flatten(value, key: str = "") -> dict:
    """The values in nested dicts and lists, by dotted key."""
    if not isinstance(value, dict | list):
        return {key: value}
    parts = value if isinstance(value, dict) else dict(enumerate(value))
    flat = {}
    for name, part in parts.items():
        flat |= flatten(part, f"{key}.{name}".lstrip("."))
    return flat


# -------------------------------------------------------------------------------------- JSON lines


class JsonlPath(type(Path())):
    """The path of a JSONL file to write."""

    @classmethod
    def from_text(cls, text: str):
        if not text.endswith(".jsonl"):
            raise InputError(f"--out {text}: the name must end in .jsonl")
        return cls(text)


def write_jsonl(path: str | Path, rows: list[dict]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: str | Path, *fields: str) -> list[dict]:
    """Read records, each with an id. Every field named must be a non-empty string in every record.

    A list of `messages` may stand for `prompt`. A record without an id gets the hash of its prompt,
    so its random numbers do not depend on where it stands in the file. Raises InputError with file
    and line.
    """
    text = read_text(path)
    if not text.strip():
        raise InputError(f"{path}: no records; give at least one")
    rows = []
    seen = set()
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        where = f"{path}: line {number}"
        row = parse_json(line, path, number)
        for field in fields:
            check_field(row, field, where)

        # ids: the record's own, else by content; equal prompts are told apart by their line
        if "id" not in row:
            row["id"] = digest(messages_of(row))
            if (row["id"], 0) in seen:
                row["id"] = digest(row["id"], number)
        key = (row["id"], row.get("sample", 0))
        if key in seen:
            raise InputError(
                f"{where}: id {row['id']!r} was used in an earlier line; ids must be unique"
            )
        seen.add(key)
        rows.append(row)
    return rows


def check_field(row, field: str, where: str) -> None:
    """Raise InputError unless row[field] is usable text; `messages` may stand for `prompt`."""
    if field == "prompt" and isinstance(row, dict) and row.get("messages"):
        usable = is_conversation(row["messages"])
        expected = "field 'messages' must be a list of {role, content} texts"
    else:
        text = row.get(field) if isinstance(row, dict) else None
        usable = isinstance(text, str) and text.strip()
        expected = f"field {field!r} is missing, empty or not text"
    if not usable:
        raise InputError(f"{where}: {expected}; fix or delete the line")


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


# -------------------------------------------------------------------------- ids and random numbers


def digest(*parts) -> str:
    """16 hex digits of a hash over the JSON of parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def rng(*parts) -> random.Random:
    """A random generator that depends on its arguments alone."""
    return random.Random(digest(*parts))


# -------------------------------------------------------------------------------- the cache folder


def cache_folder() -> Path:
    """The user's cache folder for this project; a temporary one where none can be made."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "synpo"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # no home directory, or a read-only one
        pass
    return Path(tempfile.mkdtemp(prefix="synpo-"))

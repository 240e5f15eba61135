"""Files and what names them: text, JSON, JSON lines, stable ids, the one error that a user sees.

Files are written in UTF-8. A file is written whole or not at all, so neither a reader nor a restart
ever sees half of one. formats/records.py reads records.
"""

import hashlib
import json
import math
import os
import random
import re
import sys
import tempfile
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

# Every command imports this file before those that lock files and measure memory as Unix does.
if sys.platform == "win32":
    sys.exit("error: this program needs Linux or macOS; on Windows use WSL")

STOP_WORDS = frozenset((Path(__file__).parents[1] / "stop_words.txt").read_text("utf-8").split())


# ends of lines, escapes of a terminal, marks that turn the direction of a text
CONTROL = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")
MAX_DEPTH = 100  # of lists and objects in each other: recursive functions read them


class InputError(Exception):
    """A user error, reported as one line: file, location, fix."""

    def __init__(self, text: str):
        super().__init__(CONTROL.sub(lambda found: ascii(found[0])[1:-1], text))


# ----------------------------------------------------------------------------------- text and JSON


def read_text(path: str | Path) -> str:
    """A file's text, without a byte-order mark and with \\n at the ends of lines."""
    try:
        return Path(path).read_text("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path}: line {line} is not UTF-8; save the file as UTF-8") from None
    except (OSError, ValueError) as error:  # a directory; a name that no file can have
        reason = getattr(error, "strerror", error)
        raise InputError(f"{path}: not a readable file ({reason}); check the path") from None


def load_json(path: str | Path):
    return parse_json(read_text(path), path)


def parse_json(text: str, path: str | Path, first_line: int = 1):
    """The value of a text that begins at a line of a file; every number in it is finite."""

    def number(literal: str) -> int | float:
        if not math.isfinite(float(literal)):
            problem = f"{literal[:20]} is no finite number"
            raise json.JSONDecodeError(problem, text, text.index(literal))
        return json.loads(literal)

    try:
        if depth_of(text) > MAX_DEPTH:
            raise json.JSONDecodeError("too many lists or objects in each other", text, 0)
        return json.loads(text, parse_float=number, parse_int=number, parse_constant=number)
    except json.JSONDecodeError as error:
        where = f"{path}: line {first_line + error.lineno - 1}"
        raise InputError(f"{where} is not valid JSON ({error.msg}); fix or delete it") from None


def depth_of(text: str) -> int:
    """How many brackets of a JSON text are open at once; 0 where there are too few to matter."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return 0
    brackets = re.sub(r'"(?:[^"\\]+|\\.)*+"?|[^][{}"]+', "", text)
    return max(accumulate(1 if mark in "[{" else -1 for mark in brackets), default=0)


def to_json(value, **layout) -> str:
    """JSON of a value, with null for NaN and infinity, for which JSON has no word."""
    try:
        return json.dumps(value, allow_nan=False, **layout)
    except ValueError:
        finite = json.loads(json.dumps(value), parse_constant=lambda name: None)
        return json.dumps(finite, **layout)


def write_text(path: str | Path, text: str) -> None:
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(text, "utf-8")
        os.replace(temporary, path)


@contextmanager
def writing(path: Path, *errors: type[BaseException]):
    """Around what writes a file: InputError for a full disk and the like, and for a library's
    own `errors`, of which torch's say everything but that.
    """
    try:
        yield
    except (OSError, *errors) as error:
        reason = str(error).strip().splitlines()[-1]
        fix = "make room there or check its permissions, and rerun: nothing finished is lost"
        raise InputError(f"{path}: could not be written ({reason}); {fix}") from None


def write_json(path: str | Path, value) -> None:
    write_text(path, to_json(value, indent=1))


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
    write_text(path, "".join(to_json(row, ensure_ascii=False) + "\n" for row in rows))


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

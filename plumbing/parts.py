"""Parts of an unfinished result: JSON with a digest, so that a damaged one is made again."""

import hashlib
import json
from pathlib import Path

from plumbing.files import write_text
from plumbing.ranks import print0


def write_part(path: Path, value) -> None:
    """Write a JSON value, below the digest of its text."""
    text = json.dumps(value)
    write_text(path, f"{digest_of(path, text.encode())}\n{text}")


def read_part(path: Path):
    """The value of a part; None where there is none, or a damaged one, which is deleted."""
    if not path.is_file():
        return None
    digest, _, text = path.read_bytes().partition(b"\n")
    if digest.decode(errors="replace") == digest_of(path, text):
        return json.loads(text)
    print0(f"  {path}: damaged; what it held is made again")
    path.unlink()
    return None


def digest_of(path: Path, content: bytes) -> str:
    """Of its name too, so that one part in another's place is damage."""
    return hashlib.sha256(path.name.encode() + content).hexdigest()

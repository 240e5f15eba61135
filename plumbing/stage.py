"""Stage: one result of a run, and what it follows from.

    stage = Stage(out, o, model=model, prompts=prompts, samples=samples)
    if stage.done:
        return out
    ...                              # half-done work lies in stage.scratch
    return stage.finish(records=17)

The first statement of a stage says all that decides its result: `o`, an options object, and any
other values by name. A Path, or a list or dict of them, is compared by content, every other value
as it is; fields of `o` with compare=False are left out. A manifest beside the result records them,
so the same command skips what is up to date, resumes what is half done, and refuses to mix results
of other inputs or options.

OUT.partial/ holds the identity, the lock and all parts of an unfinished result. It is cleared when
the identity differs, and removed by finish().
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import time
from functools import cache
from pathlib import Path

import torch

from plumbing.files import (
    InputError,
    cache_folder,
    digest,
    flatten,
    load_json,
    write_json,
    write_text,
)
from plumbing.parts import read_part, write_part
from plumbing.ranks import WORLD, gather, on_rank0, print0

FORMAT = 2  # of manifests; others are refused
ROOT = Path(__file__).resolve().parents[1]
# The files of a checkpoint directory, beside weights and templates, that decide what a model says.
DECIDING = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
LARGE = 1 << 30  # bytes; hashes of larger files are kept in the cache folder
LOCKS: dict = {}  # scratch folder -> its open lock file, of this process
CPUINFO = Path("/proc/cpuinfo")  # on Linux
# Functions that find further parts of machine(), by name; ops/cpu.py adds the kernels in use.
MACHINE_PARTS: dict = {}


class Refusal(InputError):
    """A finished result follows from other inputs or options than those given now."""


class Stage:
    """Every rank makes one and calls finish(); rank 0 hashes and writes."""

    def __init__(self, out: str | Path, o=None, *, run=None, **follows_from):
        """o: an options object with a field `run`; without one, run: RunOptions."""
        self.out = Path(out)
        self.options = [run] if o is None else [o, o.run]
        self.follows_from = follows_from
        self.scratch = self.out.with_name(self.out.name + ".partial")
        self.beside: list[Path] = []  # further files of the result, which the manifest lists too
        self.identity, counts = on_rank0(self.open)
        self.done = counts is not None
        self.start = time.time()

    def open(self) -> tuple[dict, dict | None]:
        """(identity, counts of a finished result or None). Takes the lock unless finished."""
        identity = self.find_identity()
        manifest = read_manifest(self.out)
        if not manifest and not self.scratch.exists():
            refuse_foreign(self.out)
        if manifest:
            self.refuse_other(manifest, identity)
            problem = damage(self.out, manifest, verify=self.options[-1].verify)
            if not problem:
                print0(f"  {name_of(self.out):<28} up to date{origin(manifest)}")
                shutil.rmtree(self.scratch, ignore_errors=True)  # of a kill after the manifest
                return identity, manifest["counts"]
            later = "later stages may refuse it, since other hardware gives other bits"
            print0(f"  {name_of(self.out)}: {problem}; making it again ({later})")

        # what is left of an earlier call counts only if it was after the same result
        lock(self.scratch)
        for left in self.out.glob(".tmp*"):  # of a kill while safetensors wrote
            left.unlink()
        begun = self.scratch / "identity.part"
        before = read_part(begun) or {}
        now = {"identity": identity, "machine": machine()}
        if before.get("identity") != identity:
            clear(self.scratch)
        elif before != now:
            print0(f"  {name_of(self.out)}: begun on another machine; its last bits may differ")
        write_part(begun, now)
        return identity, None

    def find_identity(self) -> dict:
        """All that decides the result: {"inputs": name -> hashes, "options": name -> value}."""
        # fields of the options objects, then what was given by name; absent values do not count
        given = {}
        for part in self.options:
            for field in dataclasses.fields(part):
                if field.compare and field.name != "run":
                    given[field.name] = getattr(part, field.name)
        if Path(given["chat_template"]).is_file():
            given["chat_template_file"] = Path(given["chat_template"])
        for name, value in self.follows_from.items():
            assert name not in given, name
            if value not in (None, [], {}):
                given[name] = value

        # paths are compared by content, other values as they are
        inputs = {}
        options = {}
        for name, value in given.items():
            paths = [part for part in flatten(value).values() if isinstance(part, Path)]
            refuse_overlap(self.out, paths)
            if isinstance(value, Path):
                inputs[name] = fingerprint(value)
            elif paths:
                inputs[name] = {key: fingerprint(path) for key, path in flatten(value).items()}
            else:
                options[name] = value
        return json.loads(json.dumps({"inputs": inputs, "options": options}))

    def refuse_other(self, manifest: dict, identity: dict) -> None:
        """Raise Refusal where a finished result follows from other inputs or options."""
        # an option that an older manifest does not know has its default
        defaults = {}
        for part in self.options:
            defaults |= vars(type(part)())
        for part in ("options", "inputs"):  # an option first: it is often why an input differs
            old, new = manifest[part], identity[part]
            for name in sorted(old.keys() | new.keys()):
                before, now = old.get(name, defaults.get(name)), new.get(name)
                if before != now:
                    raise Refusal(
                        f"{self.out}: made with {part[:-1]} {name} = {before!r}, now {now!r}; this "
                        "would invalidate it and all that was made from it: go back to the old "
                        "value, or give another --out"
                    )

    def finish(self, **counts) -> Path:
        """Write the manifest, remove the scratch folder, print one line; returns out.

        counts: "tokens" that a model wrote or trained on, if any, and "fresh", those of this call.
        """
        seconds = time.time() - self.start
        fresh = counts.pop("fresh", 0)
        if fresh:
            counts["tokens_per_second"] = round(fresh / max(seconds, 1e-9), 1)
        counts["seconds"] = round(seconds, 2)
        gather(None)  # all ranks have written what they write
        on_rank0(self.seal, counts)
        shown = [f"{k} {v:,}" if isinstance(v, int) else f"{k} {v}" for k, v in counts.items()]
        print0(f"  {name_of(self.out):<28} {'  '.join(shown)}")
        return self.out

    def seal(self, counts: dict) -> None:
        files = {}  # name -> size, time of the last change, hash
        for file in files_of(self.out) + self.beside:
            status = file.stat()
            name = str(file.relative_to(self.out.parent))
            files[name] = [status.st_size, status.st_mtime_ns, hash_file(file)]
        manifest = {
            "format": FORMAT,
            **self.identity,
            "paths": {k: str(v) for k, v in self.follows_from.items() if isinstance(v, Path)},
            "counts": counts,
            "time": time.time(),
            "processes": WORLD,
            "files": files,
            "content": content_hash(self.out),
            "machine": machine(),
            "code": code_digest(),
            "commit": commit(),
        }
        write_manifest(self.out, manifest)
        shutil.rmtree(self.scratch)
        LOCKS.pop(self.scratch).close()


# ---------------------------------------------------------------------- what a result follows from


def fingerprint(path: str | Path) -> str:
    """A hash of the content of a file or checkpoint directory; it is in a result's manifest."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or directory; check the path")
    manifest = read_manifest(path, refuse=False)  # a user's model may come with one of its own
    if manifest and not damage(path, manifest):
        return manifest["content"]
    return content_hash(path)


def content_hash(path: Path) -> str:
    """16 hex digits over a file, or over the files of a directory that decide what a model says."""
    if not path.is_dir():
        return hash_file(path)
    suffixes = (".safetensors", ".jinja")
    files = [f for f in sorted(path.iterdir()) if f.suffix in suffixes or f.name in DECIDING]
    return digest([(f.name, hash_file(f)) for f in files])


def hash_file(path: Path) -> str:
    status = path.stat()
    return cached_hash(str(path.resolve()), status.st_size, status.st_mtime_ns)


@cache
def cached_hash(path: str, size: int, changed: int) -> str:
    """Remembered by path, size and time of the last change: 16 GB of weights are read only once."""
    kept = cache_folder() / "hashes" / digest(path, size, changed)
    if size > LARGE and kept.is_file():
        return kept.read_text()
    value = hash_content(path)
    if size > LARGE:
        write_text(kept, value)
    return value


def hash_content(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


# --------------------------------------------------------------------------------------- manifests


def manifest_path(out: str | Path) -> Path:
    """DIR/manifest.json of a directory, NAME.manifest.json of NAME.jsonl or NAME.json."""
    out = Path(out)
    if out.suffix in (".jsonl", ".json"):
        return out.with_suffix(".manifest.json")
    return out / "manifest.json"


def read_manifest(out: str | Path, refuse: bool = True) -> dict | None:
    """The manifest of a result, or None; InputError, if `refuse`, where it is a foreign one."""
    path = manifest_path(out)
    if not path.is_file():
        return None
    manifest = load_json(path)
    if isinstance(manifest, dict) and manifest.get("format") == FORMAT:
        known = manifest.pop("digest", None)  # older manifests have none
        if known not in (None, digest(manifest)):
            raise InputError(f"{path}: damaged; delete {out} and {path.name} to make it again")
        return manifest
    if refuse:
        raise InputError(
            f"{path}: written by another version of this program; give another --out, or use that "
            "version"
        )
    return None


def write_manifest(out: Path, manifest: dict) -> None:
    write_json(manifest_path(out), {**manifest, "digest": digest(manifest)})


def counts_of(out: str | Path) -> dict:
    """The counts in the manifest of a result; {} where there is none."""
    return (read_manifest(out) or {}).get("counts", {})


def files_of(out: Path) -> list[Path]:
    """All files of a result but its manifest and its model card, which every report writes."""
    if not out.is_dir():
        return [out]
    others = (manifest_path(out), out / "README.md")
    return [f for f in sorted(out.rglob("*")) if f.is_file() and f not in others]


def damage(out: Path, manifest: dict, verify: bool = False) -> str:
    """How the files of a result differ from its manifest, if they do. They are hashed where sizes
    or times differ; all of them to verify.
    """
    for name, (size, changed, known_hash) in manifest["files"].items():
        path = out.parent / name
        if not path.is_file():
            if manifest.get("discarded") and path.suffix == ".safetensors":
                continue
            return f"{name} is missing"
        status = path.stat()
        touched = (status.st_size, status.st_mtime_ns) != (size, changed)
        read = hash_content if verify else hash_file
        if (touched or verify) and read(path) != known_hash:
            return f"{name} has changed"
    return ""


def discard(out: Path) -> None:
    """Delete the weights of a finished result. It stays finished; its manifest identifies it."""
    manifest = read_manifest(out)
    write_manifest(out, {**manifest, "discarded": True})
    for weights in out.glob("*.safetensors"):
        weights.unlink()


def name_of(out: Path) -> str:
    """iterT/... inside an iteration's folder, else the last part."""
    inside = re.fullmatch(r"(?:.*/)?(iter\d+/.*)", str(out))
    return inside[1] if inside else out.name


# --------------------------------------------------------------------------------- where to write


def refuse_overlap(out: Path, inputs: list[Path]) -> None:
    """Raise InputError where a result would overwrite an input, hold it or lie in it."""
    for path in filter(None, inputs):
        ends = [str(out.resolve()), str(path.resolve())]
        # benchmarks keep a model's results in its folder eval/
        measured = out.resolve().is_relative_to(path.resolve() / "eval")
        if os.path.commonpath(ends) in ends and not measured:
            raise InputError(f"{out}: overlaps with the input {path}; give another --out")


def refuse_foreign(out: Path) -> None:
    """Raise InputError where something lies at `out` already that is no log of this very command
    and not ours (.tmp: a kill cut it short).
    """
    found = list(out.iterdir()) if out.is_dir() else [out]
    others = [path for path in found if path.suffix not in (".tmp", ".log", ".out", ".err")]
    if any(path.exists() and not path.name.startswith(".") for path in others):
        problem = "holds what this program has not made"
        raise InputError(f"{out}: {problem}; give another --out, or delete it")


# -------------------------------------------------------------------------------- scratch and lock


def lock(scratch: Path) -> None:
    """Make the scratch folder, and hold its lock; the kernel releases it with the process."""
    if scratch in LOCKS:
        return
    scratch.mkdir(parents=True, exist_ok=True)
    file = open(scratch / "lock", "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        out = str(scratch).removesuffix(".partial")
        fix = "wait for it, or give another --out"
        raise InputError(f"{out}: process {file.read()} is writing it; {fix}") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    LOCKS[scratch] = file


def clear(scratch: Path) -> None:
    """Empty the scratch folder but for its lock, and for scores: these are addressed by what they
    follow from, so that another threshold scores nothing again.
    """
    for path in scratch.iterdir():
        if path.name in ("lock", "scores"):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


# ------------------------------------------------------------------ what is recorded, not compared


def cpuinfo() -> str:
    """What Linux says of the CPU; empty on other systems."""
    return CPUINFO.read_text() if CPUINFO.is_file() else ""


@cache
def machine() -> dict:
    """What the last bits of a result depend on beside its inputs and options."""
    model = re.search(r"model name\s*: (.*)", cpuinfo())
    return {
        "cpu": model[1] if model else platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **{name: find() for name, find in MACHINE_PARTS.items()},
    }


@cache
def code_digest() -> str:
    """A hash of the code that makes results."""
    patterns = "*.py formats/*.py plumbing/*.py ops/*.py ops/*.c scorers/*.py methods/*.py".split()
    files = [f for pattern in patterns for f in sorted(ROOT.glob(pattern))]
    return digest([f.read_text("utf-8") for f in files])


@cache
def commit() -> str:
    try:
        done = subprocess.run(
            ["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True
        )
        return done.stdout.strip()
    except OSError:  # no git
        return ""


def origin(manifest: dict) -> str:
    """What would differ if a finished result were made now; empty if nothing."""
    before = manifest["machine"]
    differs = [name for name, value in machine().items() if before.get(name) != value]
    if differs:
        return (
            f" (made with another {', '.join(differs)}: what follows may differ in its last bits)"
        )
    if manifest["code"] != code_digest():
        return " (made by other code; delete it to make it again)"
    return ""

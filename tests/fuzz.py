"""Fuzzing: whatever bytes an input file holds, its reader gives a result or one InputError.

    python -m tests.fuzz --inputs 20000 --seed 0
    python -m tests.fuzz --readers records recipe

Half of the inputs are well-formed but odd, half are damaged. Each reader runs in a process of its
own, with a limit of memory; an input that takes more than 10 s is a fault. Prints a row for each
reader; where there is a fault, the first such input is saved and the exit code is 1.
"""

import argparse
import json
import random
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, "tests")
from conftest import TEMPLATE, llama_config, tiny_checkpoint, tokenizer_json

from checkpoint import Weights, load_config
from eval.answers import read_lines
from formats.chat import Chat
from formats.records import conversation_text, read_jsonl, read_paragraphs
from plumbing.files import InputError, load_json
from plumbing.options import parse_options
from sample import SampleOptions

SECONDS = 10
MEMORY = 2 << 30
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ODD = [None, True, False, 0, -1, 1, 7, 2**63, 10**9, 1e-9, 1e308, "", " ", "a", "\0", "\ud83d"]
ODD += ["é\u2028", "x" * 5000, [], {}, [[]], ["a"], {"a": 1}, [None], TALK, "NaN", "../..", "\x1b"]
PARTS = [b"NaN", b"1e999", b"[" * 100_000, b"9" * 5000, b"{", b"}", b'"', b"\\", b"\0", b"\xff"]
PARTS += [b"\n", b"null", b"true", b",", b"\xef\xbb\xbf", b'"\\ud83d"', b"-", b" " * 1000]
ROWS = [
    {"id": 1, "prompt": "a", "response": "b", "chosen": "c", "rejected": "d"},
    {"messages": TALK, "sample": 1},
    {"instruction": "a", "input": "b", "output": "c", "history": [["x", "y"]], "system": "s"},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"prompt": TALK[:1], "chosen": TALK, "rejected": [TALK[1]], "text": "t"},
]


# ------------------------------------------------------------------------------------- the inputs


def odd(value, rng: random.Random):
    """The value with one of its parts replaced, removed or doubled."""
    if isinstance(value, dict | list) and value and rng.random() < 0.9:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        changed = value.copy()
        if rng.random() < 0.2:
            del changed[key]
        else:
            changed[key] = odd(value[key], rng)
        return changed
    return rng.choice(ODD)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Bytes with a piece cut out, doubled, flipped or put in."""
    for _ in range(rng.randint(1, 3)):
        start = rng.randint(0, len(content))
        stop = min(len(content), start + rng.choice([0, 1, 5, 1000]))
        piece = rng.choice([b"", *PARTS, content[start:stop] * 2, bytes([rng.randrange(256)])])
        content = content[:start] + piece + content[stop:]
    return content


def make(base: Callable, rng: random.Random) -> bytes:
    """An input: odd, or damaged."""
    value = base(rng)
    well_formed = rng.random() < 0.5
    if not isinstance(value, bytes):
        for _ in range(rng.randint(0, 3) if well_formed else 0):
            value = odd(value, rng)
        value = as_bytes(value)
    return value if well_formed else damaged(value, rng)


def as_bytes(value) -> bytes:
    return json.dumps(value).encode()


def lines(rng: random.Random) -> bytes:
    rows = [odd(rng.choice(ROWS), rng) for _ in range(rng.randint(1, 3))]
    if rng.random() < 0.2:
        return json.dumps(rows, indent=rng.choice([None, 1])).encode()
    return b"\n".join(map(as_bytes, rows))


def recipe(rng: random.Random) -> bytes:
    """A TOML file of options of sample.py."""
    names = ["temperature", "top_p", "seed", "samples", "dtype", "model", "nonsense", "batch"]
    values = ["0.5", "-1", "nan", "inf", '"a"', "true", "[1, 2]", "{a = 1}", "0xff", "1979-05-27"]
    values += ['"\\u0000"', "''", "9" * 30, "[" * 60 + "]" * 60]
    chosen = rng.sample(names, rng.randint(0, 4))
    return "".join(f"{name} = {rng.choice(values)}\n" for name in chosen).encode()


# ------------------------------------------------------------------------------------ the readers


def read_records(path: Path) -> None:
    """Also against json's own reading, where that takes every line."""
    for fields in ((), ("prompt",), ("prompt", "response"), ("prompt", "chosen", "rejected")):
        try:
            rows = read_jsonl(path, *fields)
        except InputError:
            continue
        for row in rows:
            assert all(isinstance(row[f], str) for f in fields if f != "prompt")
            if "prompt" in fields:
                assert isinstance(conversation_text(row), str)
    try:
        read_paragraphs(path)
    except InputError:
        read_jsonl(path, "prompt")
    read_jsonl(path)


def read_json(path: Path) -> None:
    value = load_json(path)
    assert value == json.loads(path.read_text("utf-8-sig"))


def read_recipe(path: Path) -> None:
    needed = ["--config", str(path), "--model", "m"]
    parse_options(SampleOptions, needed[:2])


def in_checkpoint(name: str, read: Callable) -> Callable:
    """A reader of one file of a checkpoint directory."""

    def reader(path: Path) -> None:
        directory = path.parent / "model"
        if not directory.is_dir():
            tiny_checkpoint(directory)
        (directory / name).write_bytes(path.read_bytes())
        read(directory)

    return reader


def weights(rng: random.Random) -> bytes:
    header = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    text = as_bytes(odd(header, rng))
    return len(text).to_bytes(8, "little") + text + bytes(8)


# reader -> (file's name, inputs, what reads it)
READERS = {
    "records": ("in.jsonl", lines, read_records),
    "lines": ("in.jsonl", lines, read_lines),
    "json": ("in.json", lambda rng: rng.choice(ROWS), read_json),
    "recipe": ("in.toml", recipe, read_recipe),
    "recipe-json": ("in.json", lambda rng: {"temperature": 0.5, "model": "m"}, read_recipe),
    "safetensors": ("in", weights, in_checkpoint("model.safetensors", Weights)),
    "config": ("in", lambda rng: llama_config(), in_checkpoint("config.json", load_config)),
    "tokenizer": (
        "in",
        lambda rng: json.loads(tokenizer_json()),
        in_checkpoint("tokenizer.json", Chat),
    ),
    "tokenizer-config": (
        "in",
        lambda rng: {"eos_token": "<|end|>", "bos_token": {"content": "a"}, "chat_template": "x"},
        in_checkpoint("tokenizer_config.json", Chat),
    ),
    "template": ("in", lambda rng: TEMPLATE.encode(), in_checkpoint("chat_template.jinja", Chat)),
}


class TooSlow(BaseException):
    """An input took more than SECONDS."""


def too_slow(number, frame):
    raise TooSlow


def outcome(reader: str, content: bytes, folder: Path) -> str:
    """accepted, refused, or what went wrong."""
    name, _, read = READERS[reader]
    path = folder / name
    path.write_bytes(content)
    signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(SECONDS)
    try:
        read(path)
        return "accepted"
    except InputError as error:
        return "refused" if str(error).isprintable() or "\n" not in str(error) else "two lines"
    except (BaseException, TooSlow) as error:
        return f"{type(error).__name__}: {error}"[:200]
    finally:
        signal.alarm(0)


def campaign(reader: str, count: int, seed: int, results) -> None:
    """Try inputs in this process, and send how each ended."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    with TemporaryDirectory() as folder:
        for i in range(count):
            content = make(READERS[reader][1], random.Random(f"{seed} {reader} {i}"))
            results.send((i, "started"))
            results.send((i, outcome(reader, content, Path(folder))))
    results.close()


def try_reader(reader: str, count: int, seed: int) -> tuple[Counter, dict[int, str]]:
    """Counts, and the faults by the number of their input."""
    context = get_context("fork")
    results, end = context.Pipe(duplex=False)
    process = context.Process(target=campaign, args=(reader, count, seed, end))
    process.start()
    end.close()
    counts: Counter = Counter()
    faults = {}
    last = (0, "started")
    try:
        while results.poll(3 * SECONDS):
            last = results.recv()
            number, how = last
            if how in ("accepted", "refused"):
                counts[how] += 1
            elif how != "started":
                faults[number] = how
    except EOFError:
        pass
    process.kill()
    process.join()
    if last[1] == "started":  # a crash, or a hang in compiled code
        faults[last[0]] = f"ended with {process.exitcode}, or did not end"
    return counts, faults


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", nargs="+", default=list(READERS), choices=list(READERS))
    o = parser.parse_args(argv)
    saved = []
    print(f"{'reader':<18}{'inputs':>8}{'accepted':>10}{'refused':>9}{'faults':>8}{'seconds':>9}")
    for reader in o.readers:
        start = time.time()
        each = max(1, o.inputs // len(o.readers))
        counts, faults = try_reader(reader, each, o.seed)
        cells = f"{each:>8}{counts['accepted']:>10}{counts['refused']:>9}{len(faults):>8}"
        print(f"{reader:<18}{cells}{time.time() - start:>9.1f}", flush=True)
        for how, times in Counter(faults.values()).most_common(8):
            print(f"    {times} x {how}")
        if faults and not saved:
            content = make(READERS[reader][1], random.Random(f"{o.seed} {reader} {min(faults)}"))
            saved.append(Path(f"fuzz-{reader}.bin").absolute())
            saved[0].write_bytes(content)
            print(f"    the first one is saved: {saved[0]}")
    return int(bool(saved))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Fuzzing: whatever bytes an input file holds, its reader gives a result or one InputError.

    python -m tests.fuzz --inputs 20000 --seed 0
    python -m tests.fuzz --readers records recipe

Half of the inputs are well-formed but odd, half are damaged. Each reader runs in a process of its
own, with a limit of memory; an input that takes more than 10 s is a fault. Prints a row for each
reader; where there is a fault, the first such input is saved and the exit code is 1.
"""

import argparse
import io
import json
import random
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, "tests")
from conftest import TEMPLATE, llama_config, tiny_checkpoint, tokenizer_json

import dpo
import gen_prompts
import improve
import loop
import pairs
import sample
import train
from checkpoint import Weights, load_config
from eval.answers import read_lines
from formats.chat import Chat
from formats.records import conversation_text, read_jsonl, read_paragraphs
from plumbing.files import InputError, load_json
from plumbing.options import REQUIRED, flag_name, flags_of, parse_options
from sample import SampleOptions

# commands whose options are tried
COMMANDS = {
    "loop.py": loop.main,
    "sample.py": sample.sample,
    "sample.py --prompt": sample.ask,
    "train.py": train.finetune,
    "gen_prompts.py": gen_prompts.main,
    "improve.py": improve.main,
    "pairs.py": pairs.make_pairs,
    "dpo.py": dpo.train_policy,
}
TEXTS = ["", "0", "-1", "1", "3", "0.5", "1e9", "nan", "inf", "-inf", "9" * 400, "a", "true", "\0"]
TEXTS += ["é", "[", "{}", "1,2", ".", "/", "a" * 5000, "a.py:f", "\n", "none", "likelihood", "dpo"]
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


@cache
def tiny_weights() -> tuple[dict, bytes]:
    """Header and data of a small model's file."""
    with TemporaryDirectory() as folder:
        content = (tiny_checkpoint(Path(folder)) / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def weights(rng: random.Random) -> bytes:
    header, data = tiny_weights()
    text = as_bytes(odd(header, rng) if rng.random() < 0.7 else header)
    return len(text).to_bytes(8, "little") + text + data


def command_line(rng: random.Random) -> list[str]:
    """A command, and up to four of its flags with odd values."""
    name = rng.choice(list(COMMANDS))
    flags = flags_of(COMMANDS[name], [])
    chosen = [flag_name(flag.name) for flag in rng.choices(flags, k=rng.randint(1, 4))]
    needed = [flag_name(flag.name) for flag in flags if flag.default is REQUIRED]
    return [name, *(f"{flag}=x" for flag in needed), *(f"{f}={rng.choice(TEXTS)}" for f in chosen)]


def read_options(path: Path) -> None:
    """A command line is taken, or refused in one line."""
    try:
        name, *argv = json.loads(path.read_bytes())
        command = COMMANDS[name]
        argv = list(map(str, argv))
    except (ValueError, TypeError, LookupError, RecursionError):
        raise InputError("no command line") from None
    try:
        with redirect_stdout(io.StringIO()):
            parse_options(command, argv)
    except OSError as error:  # also one line, of plumbing.options.cli
        raise InputError(str(error)) from None


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
    "options": ("in.json", command_line, read_options),
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

"""What lies between the stages: options, processes, records, chat templates and manifests.

Every stage is a function from files to files. This file holds what they all need for that and nothing else:
InputError (one line for the user), options (a dataclass per stage is its command line), processes (torchrun or one),
records (JSON lines, ids by content), Chat (a tokenizer and its chat template), and stage() (a manifest beside each
result, so that the same command goes on where it stopped).
"""

import argparse
import dataclasses
import hashlib
import importlib.util
import inspect
import itertools
import json
import os
import random
import re
import shutil
import sys
import time
import typing
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from torch.distributed.distributed_c10d import _get_default_store

ROOT = Path(__file__).resolve().parent


class InputError(Exception):
    """Something the user can mend: one line that names the file, the place in it, and the remedy."""


# ---------------------------------------------------------------------------------------------- options


@dataclasses.dataclass
class Common:
    """Options that every command has."""

    seed: int = 0  # all randomness follows from it
    dtype: typing.Literal["float32", "bfloat16"] = (
        "bfloat16"  # of the computation; trained weights are fp32 masters
    )
    chat_template: str = (
        ""  # for a tokenizer that has none: a jinja file, or "default" for User:/Assistant: turns
    )
    peak_tflops: float = 0.0  # of one process: what its throughput is reported as a share of; 0 measures a large matmul

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@cache
def option_help(options: type) -> dict[str, str]:
    """The comment behind each field, base classes included: the help text of its flag."""
    sources = [
        inspect.getsource(cls)
        for cls in reversed(options.__mro__[:-1])
        if vars(cls).get("in_source", True)
    ]
    return dict(re.findall(r"^    (\w+):.*?  # (.*)$", "\n".join(sources), re.MULTILINE))


def adapted(o, flags: list[str], prefix: str = ""):
    """Options, sections included, with the fields that the value of another option brings: see dpo.PolicyOptions.adapt."""
    for field in dataclasses.fields(o):
        if dataclasses.is_dataclass(section := getattr(o, field.name)):
            setattr(o, field.name, adapted(section, flags, f"{prefix}{field.name}."))
    return o.adapt(flags, prefix) if hasattr(o, "adapt") else o


def leaves(o, prefix: str = ""):
    """(dotted name, dataclass that holds it, field, type) of every option, those of sections included."""
    hints = typing.get_type_hints(type(o))
    for field in dataclasses.fields(o):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from leaves(getattr(o, field.name), f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, o, field, hints[field.name]


def as_flags(values: dict, prefix: str = "--") -> list[str]:
    """A config file's content as the flags that say the same, so that both are checked alike."""
    flags = []
    for name, value in values.items():
        name = name.replace("_", "-")
        if isinstance(value, dict) and value:
            flags += as_flags(value, f"{prefix}{name}.")
        elif isinstance(value, bool):
            flags.append((prefix if value else f"--no-{prefix[2:]}") + name)
        else:
            flags.append(f"{prefix}{name}={value}")
    return flags


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors: its own print the usage of every flag first."""

    def error(self, message):
        raise InputError(f"{message}; see --help for the options")


def parse_options(options: type, argv: list[str], default_config: str = ""):
    """Options from defaults, then the --config JSON file, then flags: --max-new-tokens for max_new_tokens, --policy.lr for
    lr in the section policy. A field without default is required; an unknown name is an error in either place."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument(
        "--config",
        default=default_config,
        help="JSON file of options, '' for none; flags win over it",
    )
    parser = Parser(
        description=sys.modules[options.__module__].__doc__,
        allow_abbrev=False,
        parents=[first],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    missing = dataclasses.MISSING
    o = options(
        **{
            f.name: None
            for f in dataclasses.fields(options)
            if f.default is missing and f.default_factory is missing
        }
    )
    config, known = first.parse_known_args(argv)[0].config, {}
    flags = as_flags(load_json(in_project(config)) if config else {}) + argv
    o = adapted(o, flags)
    for name, owner, field, kind in leaves(o):
        default, known[name] = getattr(owner, field.name), (owner, field.name)
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        if typing.get_origin(kind) is typing.Literal:
            how = {"choices": typing.get_args(kind)}
        text = field.metadata.get("help", option_help(type(owner)).get(field.name, "")).replace(
            "%", "%%"
        )
        parser.add_argument(
            "--" + name.replace("_", "-"),
            dest=name,
            default=default,
            required=default is None,
            **how,
            help=text + ("" if default in (None, "") else " (default: %(default)s)"),
        )
    for name, value in vars(parser.parse_args(flags)).items():
        if name in known:
            setattr(*known[name], value)
    return o


def part(o, options: type) -> dict:
    """The fields of o that belong to one of its dataclasses, by name."""
    return {field.name: getattr(o, field.name) for field in dataclasses.fields(options)}


def deciding(options: dict) -> dict:
    """The options that may change a result."""
    return {
        name: value
        for name, value in options.items()
        if name not in ("checkpoint_every", "recompute", "peak_tflops")
    }


def find_model(spec: str) -> str:
    """A checkpoint directory as given, or a hub id (owner/name) downloaded to the hub's cache."""
    if Path(spec).is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", spec):
        return spec
    try:
        return snapshot_download(spec, allow_patterns=["*.json", "*.safetensors", "*.jinja"])
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{spec}: neither a directory nor a model of the hub that can be had ({reason}); check the name"
        ) from None


def in_project(path: str) -> Path:
    """A path as given, or if nothing is there, the one in this project's directory."""
    return Path(path) if Path(path).exists() else ROOT / path


@cache
def load_function(spec: str):
    """The function named by "FILE.py:FUNCTION": how a run plugs in its own scorer, evaluation or preparation."""
    path, _, name = spec.rpartition(":")
    if not in_project(path).is_file():
        raise InputError(f"{spec}: no such file; write FILE.py:FUNCTION")
    module_name = "plugin_" + Path(path).stem
    module_spec = importlib.util.spec_from_file_location(module_name, in_project(path))
    module = sys.modules[module_name] = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise InputError(f"{spec}: {path} has no function {name}")
    return getattr(module, name)


def plugin(spec: str) -> dict[str, Path]:
    """The file of FILE.py:FUNCTION as an input of a stage's manifest; nothing for a built-in name."""
    return {spec: in_project(spec.rpartition(":")[0])} if ".py:" in spec else {}


# ---------------------------------------------------------------------------------------------- processes

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
DEVICE = (
    torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if torch.cuda.is_available()
    else torch.device("cpu")
)
calls = itertools.count()  # of share()
# By this process in its stage: "flop", "tokens" that models read, tokens "done", seconds "communicating", "waiting for data".
spent: Counter = Counter()


@contextmanager
def processes():
    """A process group around the body: torchrun's, or a world of one that runs the same code and opens no port."""
    torch.set_flush_denormal(
        True
    )  # on a CPU, Adam's moments of rare embedding rows decay into very slow denormals
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
    store = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo",
        timeout=timedelta(hours=6),
        **store,
    )
    try:
        yield
        dist.barrier()  # without it a gloo rank aborts at exit in about every second run
    finally:
        dist.destroy_process_group()


def on_first(work, *args):
    """work(*args) on rank 0 only; every rank gets its value, or its InputError."""
    answer = [None, None]
    if RANK == 0:
        try:
            answer[0] = work(*args)
        except InputError as error:
            answer[1] = error
    with clock("communicating"):
        dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def gather(value) -> list:
    """Every rank's value, by rank, on every rank."""
    values = [None] * WORLD
    with clock("communicating"):
        dist.all_gather_object(values, value)
    return values


def spread(work, items: list, *args) -> list:
    """work(some items, *args) -> one result each, with the items dealt out to the ranks; every rank gets all results."""
    results = [None] * len(items)
    for rank, some in enumerate(gather(work(items[RANK::WORLD], *args))):
        results[rank::WORLD] = some
    return results


def share(items: list):
    """Yield items, each on one rank: the next one goes to whoever asks first, so that no rank waits long for another.

    Every rank must call it, and as often as every other.
    """
    counter = f"share {next(calls)}"
    while (i := _get_default_store().add(counter, 1) - 1) < len(items):
        yield items[i]


@contextmanager
def clock(what: str):
    """Add the seconds that the body takes to `spent`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        spent[what] += time.perf_counter() - start


@cache
def peak_flops(dtype: str, given: float = 0.0) -> float:
    """FLOP/s of this process at best: as given in TFLOP/s, else in a large matmul, the best of a few."""
    if given:
        return given * 1e12
    n = 8192 if DEVICE.type == "cuda" else 2048
    a, seconds = torch.randn(n, n, device=DEVICE).to(getattr(torch, dtype)), []
    while len(seconds) < 2 or sum(seconds) < 0.2:
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # which waits for a GPU
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)


def memory() -> int:
    """Bytes of memory that the machine, or its GPU, has for each of its processes."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_properties(DEVICE).total_memory
    machine, limit = (
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        Path("/sys/fs/cgroup/memory.max"),
    )
    container = limit.read_text().strip() if limit.is_file() else "max"
    return min(machine, int(container) if container != "max" else machine) // int(
        os.environ.get("LOCAL_WORLD_SIZE", 1)
    )


def say(*words) -> None:
    """Print once, not once a rank."""
    if RANK == 0:
        print(*words, flush=True)


def command(main, options: type, default_config: str = "") -> None:
    """Run a stage file: options in, progress bars on standard error, one JSON object as the last line of standard output.

    After an InputError its one line on standard error, and exit code 2.
    """
    with processes():
        try:
            o = parse_options(options, sys.argv[1:], default_config)
            say("options", json.dumps(dataclasses.asdict(o)))
            if getattr(o, "model", "") and not getattr(o, "dry_run", 0):  # which needs no weights
                o.model = on_first(find_model, o.model)
            start = time.perf_counter()
            result = main(o)
            say(json.dumps({**result, "seconds": round(time.perf_counter() - start, 2)}))
        except InputError as error:
            print(
                f"error: {error}" if RANK == 0 else f"[rank {RANK}] error: {error}",
                file=sys.stderr,
                flush=True,
            )
            time.sleep(
                10 if RANK else 0
            )  # torchrun ends all ranks when one has ended: rank 0 shall have said its error before
            sys.exit(2)
    if (
        WORLD > 1
    ):  # a thread of gloo's sometimes aborts the interpreter's own exit, after all is done
        sys.stdout.flush()
        os._exit(0)


# ---------------------------------------------------------------------------------------------- records


def read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text("utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(
            f"{path}: line {line} is not UTF-8; save the file in that encoding"
        ) from None


def load_json(path: str | Path) -> dict:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: line {error.lineno} is not valid JSON ({error.msg}); mend or remove it"
        ) from None


def write_text(path: str | Path, text: str) -> None:
    """Write a file whole or not at all: a reader, or a restart, never sees half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)


def write_jsonl(path: str | Path, rows: list[dict]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: str | Path, *fields: str) -> list[dict]:
    """Records with an id each; every named field must be a non-empty string, a `messages` list may stand for `prompt`.

    A record without id gets the hash of its prompt, so that its random numbers do not depend on where it stands.
    """
    rows, seen, text = [], set(), read_text(path)
    if not text.strip():
        raise InputError(f"{path}: holds no records; give at least one")
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}: line {number} is not valid JSON ({error.msg}); mend or remove it"
            ) from None
        for field in fields:
            if field == "prompt" and isinstance(row, dict) and row.get("messages"):
                if not is_talk(row["messages"]):
                    raise InputError(
                        f"{path}: line {number}: field 'messages' is no list of {{role, content}} texts; "
                        "mend or remove the line"
                    )
                continue
            if (
                not isinstance(row, dict)
                or not isinstance(row.get(field), str)
                or not row[field].strip()
            ):
                raise InputError(
                    f"{path}: line {number}: field {field!r} is missing, empty or no text; "
                    "mend or remove the line"
                )
        if "id" not in row:
            content = digest(messages_of(row))
            row["id"] = content if (content, 0) not in seen else digest(content, number)
        key = (row["id"], row.get("sample", 0))
        if key in seen:
            raise InputError(
                f"{path}: line {number}: field 'id' is {row['id']!r} as in an earlier line; make ids unique"
            )
        seen.add(key)
        rows.append(row)
    return rows


def is_talk(messages) -> bool:
    return isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )


def messages_of(row: dict) -> list[dict]:
    """The conversation up to the answer."""
    return row.get("messages") or [{"role": "user", "content": row["prompt"]}]


def digest(*parts) -> str:
    """16 hex digits of a hash over the JSON of parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def rng(*parts) -> random.Random:
    """A random generator that follows from its arguments alone."""
    return random.Random(digest(*parts))


# ---------------------------------------------------------------------------------------------- tokenizer and chat template

DEFAULT_TEMPLATE = """{% for m in messages %}{{ {'system': 'System', 'user': 'User', 'assistant': 'Assistant'}[m['role']] }}: \
{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}\
{% if add_generation_prompt %}Assistant: {% endif %}"""


def refuse(message):
    """raise_exception() of chat templates."""
    raise TemplateError(message)


class Chat:
    """tokenizer.json and chat template of a checkpoint directory: texts to token ids and back.

    Prompt and response are tokenised apart and their ids concatenated, so that the boundary never moves; no BOS is
    added to what the template writes. `end` is the token that ends an answer, `stops` all that may end one.
    """

    def __init__(self, directory: str | Path, fallback: str = ""):
        """fallback: Common.chat_template. Raises InputError where there is no tokenizer or no template."""
        directory = Path(directory)
        if not (directory / "tokenizer.json").is_file():
            raise InputError(
                f"{directory}: no tokenizer.json there; check the path, or save the tokenizer with the checkpoint"
            )
        try:
            self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
            self.tokenizer.no_truncation()  # trainers leave such settings in the file
            self.tokenizer.no_padding()
        except Exception as error:  # tokenizers raises nothing narrower
            raise InputError(
                f"{directory}/tokenizer.json: not readable ({error}); save it again"
            ) from None
        read = lambda name: load_json(directory / name) if (directory / name).is_file() else {}  # noqa: E731
        config = read("tokenizer_config.json")
        special = {
            name: value["content"] if isinstance(value, dict) else value
            for name in ("bos_token", "eos_token", "unk_token", "pad_token")
            if (value := config.get(name))
        }
        self.template = self._find_template(directory, config.get("chat_template"), fallback)
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals.update(raise_exception=refuse, **special)
        environment.filters["tojson"] = lambda value, **kw: json.dumps(
            value, ensure_ascii=False, **kw
        )
        try:
            self.compiled, self.directory = environment.from_string(self.template), directory
        except TemplateError as error:
            raise InputError(
                f"{directory}: its chat template is no valid jinja: {error.message}"
            ) from None
        self.stops = (
            {self.tokenizer.token_to_id(special["eos_token"])} if "eos_token" in special else set()
        )
        for name in ("config.json", "generation_config.json"):
            ids = read(name).get("eos_token_id")
            self.stops |= set(ids if isinstance(ids, list) else [] if ids is None else [ids])
        # The end of a turn is what the template writes behind an answer: <|eot_id|> or <|im_end|>, often not eos.
        behind = self.render(
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}], False
        )
        ids = self.encode(behind.rpartition("ANSWER")[2].lstrip())
        added = self.tokenizer.get_added_tokens_decoder()
        if not self.stops and not (ids and ids[0] in added):
            raise InputError(
                f"{directory}: no end-of-sequence token in config.json or tokenizer_config.json; add one"
            )
        self.end = ids[0] if ids and (ids[0] in added or ids[0] in self.stops) else min(self.stops)
        self.stops.add(self.end)

    @staticmethod
    def _find_template(directory: Path, inside, fallback: str) -> str:
        if (directory / "chat_template.jinja").is_file():
            return (directory / "chat_template.jinja").read_text()
        if isinstance(inside, list):  # several named ones
            inside = {entry["name"]: entry["template"] for entry in inside}.get("default")
        if inside:
            return inside
        if not fallback:
            raise InputError(
                f"{directory}: the tokenizer has no chat template; give --chat-template FILE.jinja, or "
                "--chat-template default for plain User:/Assistant: turns"
            )
        if fallback != "default" and not Path(fallback).is_file():
            raise InputError(f"--chat-template {fallback}: no such file")
        return DEFAULT_TEMPLATE if fallback == "default" else Path(fallback).read_text()

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def render(self, messages: list[dict], open_answer: bool) -> str:
        try:
            return self.compiled.render(messages=messages, add_generation_prompt=open_answer)
        except (TemplateError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.directory}: chat template refuses {messages[0]}: {error}"
            ) from None

    def prompt_ids(self, row: dict) -> list[int]:
        """A record's conversation and the opening of the answer."""
        return self.encode(self.render(messages_of(row), True))

    def response_ids(self, text: str) -> list[int]:
        """An answer and its end token."""
        return [*self.encode(text), self.end]

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


# ---------------------------------------------------------------------------------------------- manifests


def fingerprint(path: str | Path) -> str:
    """Hash of what a file or checkpoint directory holds; a finished stage's directory has it in its manifest."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or directory; check the path")
    return (
        load_json(path / "manifest.json")["content"]
        if (path / "manifest.json").is_file()
        else content_hash(path)
    )


def content_hash(path: Path) -> str:
    """16 hex digits over a file, or over the files of a checkpoint directory that decide what the model says."""
    if not path.is_dir():
        return hash_file(path, path.stat().st_mtime_ns)
    files = [
        f
        for f in sorted(path.iterdir())
        if f.suffix in (".safetensors", ".jinja")
        or f.name
        in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    ]
    return digest([(f.name, hash_file(f, f.stat().st_mtime_ns)) for f in files])


@cache
def hash_file(path: Path, changed: int) -> str:
    """Cached by the time of the last change: 16 GB of weights are read once a process."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def manifest_path(out: Path) -> Path:
    """DIR/manifest.json for a directory, NAME.manifest.json beside a file NAME.jsonl or NAME.json."""
    return (
        out.with_suffix(".manifest.json")
        if out.suffix in (".jsonl", ".json")
        else out / "manifest.json"
    )


def stage(out: str | Path, inputs: dict, options: dict, work) -> dict:
    """Run work() unless its manifest says that it is done; returns the manifest's counts.

    out: the .jsonl file or the directory that work() writes; inputs: name -> path; options: all else that decides the
    result; work() returns counts (a dict), with `tokens` where it processes text. A manifest with other inputs or
    options raises InputError: results are never mixed, nor thrown away unasked.
    """
    out = Path(out)
    wanted = {
        "inputs": {name: fingerprint(path) for name, path in inputs.items()},
        "options": deciding(options),
    }

    def finished():
        if not (manifest_path(out).is_file() and out.exists()):
            begun = (
                out / "begun.json"
            )  # a checkpoint inside belongs to the inputs and options it was begun with
            if out.suffix not in (".jsonl", ".json") and (
                not begun.is_file() or load_json(begun) != wanted
            ):
                if (out / "checkpoint").is_dir():
                    say(
                        f"  {name_of(out)}: its checkpoint was made with other inputs or options; starting over"
                    )
                    shutil.rmtree(out / "checkpoint")
                write_text(begun, json.dumps(wanted))
            return None
        manifest = load_json(manifest_path(out))
        manifest["options"] = deciding(manifest["options"])
        for part in (
            "options",
            "inputs",
        ):  # an option first: it is often the reason why an input is another
            for name in sorted(manifest[part].keys() | wanted[part].keys()):
                old, new = manifest[part].get(name), wanted[part].get(name)
                if old != new:
                    later = sum(load_json(m)["time"] > manifest["time"] for m in run_manifests(out))
                    raise InputError(
                        f"{out}: made with {part[:-1]} {name} = {old!r}, now {new!r}; this would invalidate "
                        f"it and {later} stages after it: go back to the old value, or give another --out"
                    )
        return manifest["counts"]

    counts = on_first(finished)
    if counts is not None:
        say(f"  {name_of(out):<28} done before")
        return counts
    start = time.time()
    spent.clear()
    counts = work()
    seconds = time.time() - start
    counts |= throughput(counts, seconds, options)

    def seal():
        manifest = {
            **wanted,
            "start_from": str(inputs.get("model", "")),
            "counts": {**counts, "seconds": round(seconds, 2)},
            "time": time.time(),
            "processes": WORLD,
            "content": content_hash(out),
        }
        write_text(manifest_path(out), json.dumps(manifest, indent=1))
        (out / "begun.json").unlink(missing_ok=True) if out.is_dir() else None
        return manifest["counts"]

    counts = on_first(seal)
    shown = "  ".join(
        f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}"
        for key, value in counts.items()
    )
    say(f"  {name_of(out):<28} {shown}")
    return counts


def throughput(counts: dict, seconds: float, options: dict) -> dict:
    """What a stage did with its time: tokens per second, share of peak, seconds that the slowest process waited."""
    flop, tokens, done, data, communication = zip(
        *gather(
            [
                spent[name]
                for name in ("flop", "tokens", "done", "waiting for data", "communicating")
            ]
        ),
        strict=True,
    )
    tokens = counts.get(
        "tokens", sum(tokens)
    )  # those that a stage wrote or trained on; else those that models read
    if not tokens:
        return {}
    now = sum(done) or tokens  # without what an earlier call did
    peak = sum(
        gather(peak_flops(options.get("dtype", Common.dtype), options.get("peak_tflops", 0.0)))
    )
    return {
        "tokens": tokens,
        "tokens_per_second": round(now / max(seconds, 1e-9), 1),
        "share_of_peak": round(sum(flop) / max(seconds, 1e-9) / peak, 4),
        "data_seconds": round(max(data), 3),
        "communication_seconds": round(max(communication), 3),
    }


def run_manifests(out: Path) -> list[Path]:
    """All manifests of the run directory that out lies in, and of its neighbours' iterations."""
    root = out.parent.parent if out.parent.name.startswith("iter") else out.parent
    return [
        *root.glob("*manifest.json"),
        *root.glob("*/*manifest.json"),
        *root.glob("*/*/manifest.json"),
    ]


def name_of(out: Path) -> str:
    """iterT/... below an iteration's folder, else the last part."""
    start = max(
        (i for i, name in enumerate(out.parts) if re.fullmatch(r"iter\d+", name)),
        default=len(out.parts) - 1,
    )
    return "/".join(out.parts[start:])

"""Options: a function's signature and its options dataclasses -> command line and config file.

    @dataclass(frozen=True, kw_only=True)
    class SampleOptions:
        run: RunOptions = RunOptions()
        temperature: float = 0.7  # the comment behind a field is its help text

    def sample(model: Checkpoint, prompts: Path, out: Path, o: SampleOptions) -> Path: ...

    cli(sample)  # --model, --prompts, --out, --temperature, --seed, ...; --config FILE for many

Options named `o` give their fields as they are, `--temperature`; others are a section,
`--answers.temperature`. A config file (TOML or JSON) has a table a section. Flags win over the
config file, which wins over defaults; an unknown name is an error in either place. RunOptions stand
once, and every options object refers to the same ones as `o.run`.
"""

import argparse
import dataclasses
import inspect
import json
import os
import re
import signal
import sys
import time
import tomllib
import typing
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import torch

from plumbing.files import InputError, load_json, read_text, to_json
from plumbing.ranges import EVERY, NotNegative, read_number
from plumbing.ranks import RANK, WORLD, distributed, on_rank0, print0
from plumbing.stage import ROOT, counts_of

REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What all stages of a run share."""

    seed: int = 0  # of all random numbers
    dtype: typing.Literal["float32", "bfloat16"] = "bfloat16"  # of compute; master weights: fp32
    chat_template: str = ""  # a jinja file, or NAME of the tokenizer's; if it has none: default
    chat_template_args: str = ""  # JSON object for the template, such as {"enable_thinking": false}
    chat_template_date: str = ""  # YYYY-MM-DD that a template takes for today; default: a fixed day
    peak_tflops: NotNegative = field(default=0.0, compare=False)  # of a process; for MFU
    verify: bool = field(default=False, compare=False)  # read all files of results that are there

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


# ------------------------------------------------------------------------------------------- flags


@dataclass
class Flag:
    """One option of a command."""

    name: str  # dotted, with underscores: policy.lr
    kind: object  # its type
    default: object
    help: str

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        # how argparse reads a value of this type
        kind, allowed = self.kind, EVERY
        if typing.get_origin(kind) is typing.Annotated:
            kind, allowed = typing.get_args(kind)
        how: dict = {"type": kind}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind) is typing.Literal:
            how = {"choices": typing.get_args(kind)}
        elif typing.get_origin(kind) is list:
            how = {"type": typing.get_args(kind)[0], "nargs": "+"}
        elif kind in (int, float):
            how = {"type": partial(read_number, kind, allowed)}
        elif issubclass(kind, Path):
            how = {"type": partial(read_path, kind)}

        text = self.help.replace("%", "%%")
        if self.default not in (REQUIRED, None, ""):
            text += " (default: %(default)s)"
        how["required"] = self.default is REQUIRED
        how["default"] = self.default
        parser.add_argument(flag_name(self.name), dest=self.name, help=text, **how)


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def read_path(kind: type, text: str) -> Path | None:
    """A path, or what a subclass of Path makes of a text; None for an empty text."""
    if "\0" in text:
        raise argparse.ArgumentTypeError("a path has no NUL character")
    return getattr(kind, "from_text", kind)(text) if text else None


def flags_of(source, argv: list[str], prefix: str = "") -> list[Flag]:
    """The flags of a function's or dataclass's parameters, sections included, RunOptions not."""
    flags = []
    for name, kind, default, defaults_of in parameters(source):
        if dataclasses.is_dataclass(kind):
            flags += flags_of(kind, argv, section(prefix, name))
        elif defaults_of is None:
            text = field_help(source).get(name, "")
            flags.append(Flag(prefix + name, kind, default, text))
        else:
            # options that depend on another one: the parameters of --loss
            chooser, find = defaults_of
            chosen = peek(argv, prefix + chooser, getattr(source, chooser))
            text = f"parameter of {chooser} {chosen}"
            for entry, (kind, value) in find(chosen).items():
                if entry in source.__dataclass_fields__:
                    problem = f"its parameter {entry} has the name of another option; rename it"
                    raise InputError(f"{flag_name(prefix + chooser)} {chosen}: {problem}")
                flags.append(Flag(prefix + entry, kind, value, text))
    return flags


def parameters(source):
    """(name, type, default, entries) of each parameter but RunOptions.

    entries: (another option's name, function from its value to {name: (type, default)}), or None;
    from the metadata of a dataclass's field.
    """
    hints = typing.get_type_hints(source, include_extras=True)
    known = getattr(source, "__dataclass_fields__", {})
    for name, parameter in inspect.signature(source).parameters.items():
        kind = hints[name]
        if type(None) in typing.get_args(kind):  # T | None
            kind = typing.get_args(kind)[0]
        if kind is not RunOptions:
            metadata = known[name].metadata if name in known else {}
            yield name, kind, parameter.default, metadata.get("entries")


def section(prefix: str, name: str) -> str:
    return prefix if name == "o" else f"{prefix}{name}."


@cache
def field_help(source) -> dict[str, str]:
    """The comments behind a dataclass's fields or a function's parameters."""
    parts = [source]
    if inspect.isclass(source):
        parts = [cls for cls in reversed(source.__mro__) if dataclasses.is_dataclass(cls)]
    text = "\n".join(inspect.getsource(part) for part in parts)
    return dict(re.findall(r"^    (\w+):.*?  # (.*)", text, re.MULTILINE))


# ------------------------------------------------------------------------- command lines and files


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors: its own print the usage of every flag first."""

    def error(self, message):
        if "unrecognized" in message:
            message += " (docs/changes.md lists those that were renamed)"
        raise InputError(f"{message}; see --help for the options")


def parse_options(command, argv: list[str], default_config: str = ""):
    """From a command line: the arguments of a function as a dict, or an object of a class."""
    return build(command, parse_values(command, argv, default_config))


def parse_values(command, argv: list[str], default_config: str = "") -> dict:
    """The value of every option, by dotted name."""
    # the config file comes first, so that flags win over it
    config = peek(argv, "config", default_config)
    if config:
        given = read_config(in_project(config))
        # without the parameters of its loss if the command line names another loss
        known = flags_of(command, given + argv)
        for flag in flags_of(command, given):
            if flag not in known:
                given = [text for text in given if not text.startswith(f"{flag_name(flag.name)}=")]
        argv = given + argv

    parser = Parser(
        description=sys.modules[command.__module__].__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    Flag("config", str, default_config, "TOML or JSON file of options; '' for none").add_to(parser)
    for flag in flags_of(RunOptions, argv) + flags_of(command, argv):
        flag.add_to(parser)
    return vars(parser.parse_args(argv))


def peek(argv: list[str], name: str, default: str) -> str:
    """The value of one flag on a command line."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag_name(name), dest="value", default=default)
    return parser.parse_known_args(argv)[0].value


def in_project(path: str | Path) -> Path:
    """A path as given, or, if nothing is there, the one in this project's directory."""
    return Path(path) if Path(path).exists() else ROOT / path


def read_config(path: Path) -> list[str]:
    """A config file's options as flags."""
    try:
        values = tomllib.loads(read_text(path)) if path.suffix == ".toml" else load_json(path)
        if not isinstance(values, dict):
            raise InputError(f'{path}: must hold an object, {{"option": value}}; fix it')
        return as_flags(values)
    except (ValueError, RecursionError) as error:  # also 5,000 digits, 1,000 tables in each other
        raise InputError(f"{path}: not valid TOML ({error}); fix it") from None


def as_flags(values: dict, prefix: str = "") -> list[str]:
    """The content of a config file as the flags that say the same, so both are checked alike."""
    flags = []
    for name, value in values.items():
        flag = flag_name(prefix + name)
        if isinstance(value, dict):
            flags += as_flags(value, f"{prefix}{name}.")
        elif value is True:
            flags.append(flag)
        elif value is False:
            flags.append(flag.replace("--", "--no-"))
        elif isinstance(value, list):
            flags += [flag, *map(str, value)]
        elif value is not None:
            flags.append(f"{flag}={value}")
    return flags


def build(source, values: dict, prefix: str = ""):
    """A dataclass's object, or a function's arguments as a dict, from values by dotted name."""
    made = {}
    for name, kind, _, entries in parameters(source):
        if dataclasses.is_dataclass(kind):
            made[name] = build(kind, values, section(prefix, name))
        elif entries is None:
            made[name] = values[prefix + name]
        else:
            chooser, find = entries
            names = find(values[prefix + chooser])
            made[name] = {name: values[prefix + name] for name in names}
    if not inspect.isclass(source):
        return made
    if source is not RunOptions:
        made["run"] = build(RunOptions, values)
    return source(**made)


def as_dict(o, top: bool = True) -> dict:
    """An options object as a config file says it, RunOptions at the top."""
    values = {}
    for name, value in vars(o).items():
        if name == "run":
            values |= as_dict(value) if top else {}
        elif dataclasses.is_dataclass(value):
            values[name] = as_dict(value, top=False)
        elif isinstance(value, dict):  # a loss's parameters
            values |= value
        else:
            values[name] = str(value) if isinstance(value, Path) else value
    return values


# ------------------------------------------------------------------------------------ the command


def leave(number: int, frame) -> None:
    """On Ctrl-C or SIGTERM, end at once: what is finished lies on disk, the rest is resumed.

    An exception would not do: in a callback of a library it is lost, and the run goes on.
    """
    if RANK == 0:
        line = b"interrupted; rerun the same command to resume\n"
        os.write(2, b"\n" + line if os.isatty(2) else line)  # below a bar
    os._exit(128 + number)


def cli(function, default_config: str = "") -> None:
    """Run a function as a command: options in; the last line of output is one JSON object.

    That is the dict the function returns, or the counts in the manifest of the result it returns.
    After an InputError or OSError: one line on standard error, exit code 2.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as for `command &` in a script
            signal.signal(number, leave)
    with distributed():
        try:
            values = parse_values(function, sys.argv[1:], default_config)
            print0("options", json.dumps(values, default=str))
            start = time.perf_counter()
            result = function(**build(function, values))
            if isinstance(result, Path):
                result = on_rank0(counts_of, result)
            print0(to_json({**result, "seconds": round(time.perf_counter() - start, 2)}))
        except (InputError, OSError) as error:
            rank = f"[rank {RANK}] " if RANK else ""
            fix = "; check the path, or give another one" if isinstance(error, OSError) else ""
            print(f"{rank}error: {error}{fix}", file=sys.stderr, flush=True)
            # torchrun ends all ranks as soon as one has ended: rank 0 must say its error first
            time.sleep(10 if RANK else 0)
            sys.exit(2)
    if WORLD > 1:  # a thread of gloo's sometimes aborts the interpreter's own exit
        sys.stdout.flush()
        os._exit(0)

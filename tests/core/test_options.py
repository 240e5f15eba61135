"""Options: dataclasses and signatures as command lines and config files; how a command ends."""

import contextlib
import json
import os
import subprocess
import sys
import typing
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import pytest
from conftest import ROOT, refusal

import checkpoint
import dpo
import gen_prompts
import improve
import loop
import pairs
import sample
import train
from checkpoint import Checkpoint
from eval import scorer_accuracy
from eval.benchmark import BENCHMARKS
from losses import LOSSES, loss_defaults
from methods import controls
from plumbing import options, ranges
from plumbing.files import InputError, write_json
from plumbing.options import (
    RunOptions,
    as_dict,
    cli,
    flag_name,
    flags_of,
    parse_options,
)
from scorers import classifier


@dataclass(frozen=True, kw_only=True)
class Part:
    run: RunOptions = RunOptions()
    lr: float = 1e-6  # peak learning rate, 100% of it
    epochs: int = 3  # passes


@dataclass(frozen=True, kw_only=True)
class PolicyPart(Part):
    lr: float = 5e-7  # peak learning rate, of the policy
    save_every: int = field(default=0, compare=False)  # steps between checkpoints


@dataclass(frozen=True, kw_only=True)
class Options:
    run: RunOptions = RunOptions()
    model: str  # checkpoint directory
    mode: typing.Literal["fast", "slow"] = "fast"  # how
    top_k: int = 5  # only the first K
    keep: bool = False  # keep all
    note: str = ""  # free text
    policy: PolicyPart = PolicyPart()  # of the policy
    reward: Part = Part()  # of the reward model


def parse(*argv: str) -> Options:
    return parse_options(Options, list(argv))


def config_file(tmp_path: Path, **values) -> str:
    write_json(tmp_path / "o.json", values)
    return str(tmp_path / "o.json")


# ------------------------------------------------------------------------------- flags


def test_options_are_flags_with_their_defaults():
    assert parse("--model", "m") == Options(model="m")
    assert parse("--model", "m").policy.lr == 5e-7
    argv = "--model m --top-k 9 --keep --mode slow --policy.lr 0.1 --reward.epochs=1 --seed=3"
    run = RunOptions(seed=3)
    assert parse(*argv.split()) == Options(
        run=run,
        model="m",
        top_k=9,
        keep=True,
        mode="slow",
        policy=PolicyPart(run=run, lr=0.1),
        reward=Part(run=run, epochs=1),
    )


def help_of(capsys, command) -> str:
    """What --help prints, without spaces: argparse breaks lines where it likes."""
    with pytest.raises(SystemExit) as end:
        parse_options(command, ["--help"])
    assert end.value.code == 0
    return "".join(capsys.readouterr().out.split())


def test_help_is_the_comment_behind_the_field(capsys):
    text = help_of(capsys, Options)
    for words in (
        "dataclasses and signatures as command lines",  # this file's docstring
        "--policy.lr POLICY.LR peak learning rate, of the policy (default: 5e-07)",
        "--reward.lr REWARD.LR peak learning rate, 100% of it (default: 1e-06)",
        "steps between checkpoints (default: 0)",
        "--note NOTE free text",
        "--top-k TOP_K only the first K",
        "--no-keep keep all (default: False)",
        "of all random numbers (default: 0)",
    ):
        assert "".join(words.split()) in text, words


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--model", "m", "--unknown", "1"], "--unknown"),
        (["--model", "m", "--top", "1"], "--top"),
        (["--model", "m", "--mode", "medium"], "--mode"),
        (["--top-k", "1"], "--model"),
        (["--model", "m", "stray"], "stray"),
        (["--model", "m", "--top-k", "many"], "--top-k"),
        (["--model", "m", "--policy.momentum", "1"], "--policy.momentum"),
    ],
)
def test_wrong_flags_are_errors_that_name_them(argv, named):
    assert named in refusal(parse, *argv)


def test_an_unknown_flag_may_be_a_renamed_one():
    message = refusal(parse, "--model", "m", "--unknown", "1")
    assert "--unknown" in message
    assert "docs/changes.md" in message
    assert "docs/changes.md" not in refusal(parse, "--model", "m", "--top-k", "many")


def test_every_section_refers_to_one_run_options():
    o = parse_options(loop.Options, ["--seed", "3"])
    other = replace(o, run=replace(o.run, seed=7))
    for seed, one in ((3, o), (7, other)):
        sections = [getattr(one, f.name) for f in fields(one)]
        sections = [section for section in sections if hasattr(section, "run")]
        assert len(sections) == 8
        assert all(section.run is one.run for section in sections)
        assert one.run.seed == seed


# ------------------------------------------------------------------------------- config files


def test_config_file_gives_options_and_flags_win(tmp_path):
    values = {"policy": {"epochs": 1}, "reward": {"lr": 0.5}}
    config = config_file(tmp_path, model="m", top_k=7, keep=True, **values)
    assert parse("--config", config) == Options(
        model="m", top_k=7, keep=True, policy=PolicyPart(epochs=1), reward=Part(lr=0.5)
    )
    flags = "--top-k 8 --no-keep --reward.lr 0.25 --policy.lr=1"
    assert parse("--config", config, *flags.split()) == Options(
        model="m", top_k=8, policy=PolicyPart(lr=1, epochs=1), reward=Part(lr=0.25)
    )


TOML = """
model = "m"        # a comment
top_k = 7
keep = true
note = '''
two
lines'''

[policy]
epochs = 1
"""


def test_toml_says_the_same_as_json(tmp_path):
    (tmp_path / "o.toml").write_text(TOML)
    values = {"top_k": 7, "keep": True, "note": "two\nlines", "policy": {"epochs": 1}}
    json_file = config_file(tmp_path, model="m", **values)
    toml = parse("--config", str(tmp_path / "o.toml"))
    assert toml == parse("--config", json_file)
    assert toml == Options(
        model="m", top_k=7, keep=True, note="two\nlines", policy=PolicyPart(epochs=1)
    )
    assert parse("--config", str(tmp_path / "o.toml"), "--top-k", "8").top_k == 8


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"modell": 1}, "--modell"),
        ({"policy": {"lrr": 1}}, "--policy.lrr"),
        ({"mode": "medium"}, "--mode"),
        ({"dtype": "float16"}, "--dtype"),
        ({"policy": 5}, "--policy"),
        ({"top_k": 1.5}, "--top-k"),
        ({"keep": "yes"}, "--keep"),
    ],
)
def test_wrong_config_entries_are_errors_that_name_them(tmp_path, values, named):
    assert named in refusal(parse, "--config", config_file(tmp_path, model="m", **values))


def test_config_errors_name_the_file(tmp_path):
    assert "none.json: no such file" in refusal(parse, "--config", str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text('{"model": "m",\n "top_k": }')
    assert "bad.json: line 2" in refusal(parse, "--config", str(tmp_path / "bad.json"))
    (tmp_path / "bad.toml").write_text('model = "m"\ntop_k =\n')
    (tmp_path / "list.json").write_text('[{"model": "m"}]')
    message = refusal(parse, "--config", str(tmp_path / "list.json"))
    assert 'list.json: must hold an object, {"option": value}' in message
    message = refusal(parse, "--config", str(tmp_path / "bad.toml"))
    assert "bad.toml: not valid TOML" in message
    assert "line 2" in message


@pytest.mark.parametrize(
    "text",
    [
        "top_k = " + "[" * 100_000,
        "top_k = " + "1" * 5000,
        "top_k = 0x" + "f" * 5000,
        ".".join("a" * 5000) + " = 1",
        "[" + ".".join("a" * 5000) + "]\nb = 1",
        "top_k = nan",
        "model = '\x00'",
    ],
    ids=["brackets", "digits", "hex digits", "dotted", "tables", "nan", "NUL"],
)
def test_toml_that_python_would_fail_on_is_one_line(tmp_path, text):
    (tmp_path / "bad.toml").write_text(text)
    assert len(refusal(parse, "--config", f"{tmp_path}/bad.toml", "--model", "m")) < 500


def test_a_run_is_reproduced_by_the_options_it_wrote(tmp_path):
    argv = ["--model", "m", "--policy.epochs", "9", "--dtype", "float32", "--policy.save-every=4"]
    o = parse(*argv)
    again = parse("--config", config_file(tmp_path, **as_dict(o)))
    assert again == o
    assert again.policy.save_every == 4, "what == does not compare, too"


LOOP_FLAGS = (
    "--seed 7 --chat-template default --peak-tflops 0.5 --model m --seeds s.jsonl --heldout= "
    "--corpus c.txt --evaluate e.py:f --iters 2 --start previous --keep-improvers "
    "--generator.keywords 2 --generator.template=a\n{keywords} --prompts.stop= "
    "--prompts.lists 8 --answers.temperature 0 --improver.drafts 3 --rewrites.best-of 4 "
    "--rewrites.draft-competes --pairs.threshold=-3.5 --pairs.max-pairs 9 --policy.loss simpo "
    "--policy.beta 2 --policy.gamma 1.6 --policy.nll 0.5 --policy.second-reference r "
    "--policy.save-every 3 --policy.activation-checkpointing --seed-sft.epochs 2"
)


@pytest.mark.parametrize(
    "argv",
    [[], LOOP_FLAGS.split(" "), ["--policy.loss", "ipo-mean"], ["--config", "recipes/demo.toml"]],
)
def test_as_dict_is_what_a_config_file_holds(tmp_path, argv):
    o = parse_options(loop.Options, argv)
    write_json(tmp_path / "config.json", as_dict(o))
    again = parse_options(loop.Options, ["--config", str(tmp_path / "config.json")])
    assert again == o
    assert asdict(again) == asdict(o), "and what == does not compare"


def test_run_options_stand_once_in_a_config_file():
    values = as_dict(parse_options(loop.Options, LOOP_FLAGS.split(" ")))
    assert (values["seed"], values["dtype"], values["peak_tflops"]) == (7, "bfloat16", 0.5)
    assert "run" not in values
    assert values["policy"]["gamma"] == 1.6
    for section in ("generator", "answers", "pairs", "policy"):
        assert not {"run", "seed", "dtype", "loss_parameters"} & values[section].keys()


def test_another_seed_on_top_of_a_runs_config(tmp_path):
    write_json(tmp_path / "config.json", as_dict(parse_options(loop.Options, ["--iters", "2"])))
    o = parse_options(loop.Options, ["--config", str(tmp_path / "config.json"), "--seed", "7"])
    assert (o.iters, o.run.seed, o.answers.run.seed) == (2, 7, 7)


# ------------------------------------------------------------------------------- losses


def policy(*argv: str) -> dpo.PolicyOptions:
    given = ["--model", "m", "--pairs", "p.jsonl", "--out", "out", *argv]
    return parse_options(dpo.train_policy, given)["o"]


def test_a_losss_own_parameters_are_flags(tmp_path):
    assert policy().loss_parameters == {"beta": 0.1, "label_smoothing": 0.0}
    o = policy("--loss", "simpo", "--beta", "2", "--gamma", "1.6")
    assert (o.loss, o.loss_parameters) == ("simpo", {"beta": 2.0, "gamma": 1.6})
    assert policy("--loss=simpo").loss_parameters == loss_defaults("simpo")

    # in a config file they stand beside the loss, and --loss may come from the file
    config = config_file(tmp_path, loss="simpo", beta=2, gamma=1.6)
    assert policy("--config", config) == o
    assert policy("--config", config, "--gamma", "1").loss_parameters["gamma"] == 1


def test_parameters_of_another_loss_are_errors(tmp_path):
    message = refusal(policy, "--loss", "simpo", "--label-smoothing", "0.1")
    assert "--label-smoothing" in message
    assert "--gamma" in refusal(policy, "--gamma", "1.6")
    assert "--beta" in refusal(policy, "--beta", "much")
    assert "simpoo" in refusal(policy, "--loss", "simpoo")
    config = config_file(tmp_path, loss="simpo", gama=1.6)
    assert "--gama" in refusal(policy, "--config", config)


def test_another_loss_on_top_of_a_config_file_has_its_own_parameters(tmp_path):
    config = config_file(tmp_path, loss="simpo", beta=2, gamma=1.6, nll=0.5)
    assert policy("--config", config, "--loss", "dpo") == policy("--nll", "0.5")
    o = policy("--config", config, "--loss", "dpo", "--beta", "3", "--nll", "0")
    assert o == policy("--beta", "3")
    assert "--gamma" in refusal(policy, "--config", config, "--loss", "dpo", "--gamma", "1")

    # in a section too
    write_json(tmp_path / "run.json", {"policy": {"loss": "simpo", "gamma": 1.6}})
    argv = ["--config", str(tmp_path / "run.json"), "--policy.loss", "dpo"]
    assert parse_options(loop.Options, argv) == parse_options(loop.Options, [])


def test_a_section_has_the_parameters_of_its_loss():
    o = parse_options(loop.Options, ["--policy.loss", "simpo", "--policy.gamma", "1.6"])
    assert o.policy.loss_parameters["gamma"] == 1.6
    assert "--policy.gamma" in refusal(parse_options, loop.Options, ["--policy.gamma", "1.6"])


def test_a_users_own_loss_brings_its_flags(tmp_path):
    text = "def mine(p, *, sharpness: float = 3):\n    return p.chosen * sharpness\n"
    (tmp_path / "mine.py").write_text(text)
    spec = f"{tmp_path}/mine.py:mine"
    assert policy("--loss", spec).loss_parameters == {"sharpness": 3.0}
    assert policy("--loss", spec, "--sharpness", "4").loss_parameters == {"sharpness": 4.0}
    (tmp_path / "named.py").write_text("def mine(p, *, lr: float = 3):\n    return p.chosen\n")
    message = refusal(policy, "--loss", f"{tmp_path}/named.py:mine")
    assert "parameter lr has the name of another option; rename it" in message


# ------------------------------------------------------------------------------- paths and models


def test_an_empty_path_is_none_and_several_are_a_list():
    given = ["--model", "m", "--out", "out", "--pairs", "a.jsonl", "b.jsonl"]
    found = parse_options(dpo.train_policy, given)
    assert found["pairs"] == [Path("a.jsonl"), Path("b.jsonl")]
    assert (found["model"], found["out"]) == (Checkpoint("m"), Path("out"))
    assert found["reference"] is None
    found = parse_options(dpo.train_policy, [*given, "--reference", "", "--second-reference="])
    assert found["reference"] is None
    assert found["o"].second_reference is None
    assert parse_options(loop.Options, ["--heldout", "", "--model="]).heldout is None


def test_a_config_file_may_hold_a_list_of_paths(tmp_path):
    config = config_file(tmp_path, model="m", out="out", pairs=["a.jsonl", "b c.jsonl"])
    found = parse_options(dpo.train_policy, ["--config", config])
    assert found["pairs"] == [Path("a.jsonl"), Path("b c.jsonl")]
    found = parse_options(dpo.train_policy, ["--config", config, "--pairs", "other.jsonl"])
    assert found["pairs"] == [Path("other.jsonl")]


@pytest.fixture
def hub(tmp_path, monkeypatch) -> list[str]:
    """The ids that were asked of the Hub; owner/name is there and any other is not."""
    asked = []

    def download(name, **how):
        asked.append(name)
        if name != "owner/name":
            raise OSError("no such repository\nand a page of advice")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    return asked


def test_only_checkpoints_may_be_hub_ids(hub, tmp_path, monkeypatch):
    given = ["--model", "owner/name", "--out", "owner/out", "--pairs", "owner/pairs.jsonl"]
    found = parse_options(dpo.train_policy, [*given, "--cache", "owner/cache"])
    assert found["model"] == tmp_path / "snapshot"
    assert isinstance(found["model"], Checkpoint)
    assert (found["out"], found["pairs"]) == (Path("owner/out"), [Path("owner/pairs.jsonl")])
    assert hub == ["owner/name"]

    # in a section too
    o = parse_options(loop.Options, ["--policy.second-reference", "owner/name"])
    assert o.policy.second_reference == tmp_path / "snapshot"

    # a directory of that name comes first
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert parse_options(dpo.train_policy, given)["model"] == Path("owner/name")
    assert hub == ["owner/name"] * 2


def test_a_model_that_the_hub_does_not_have_is_one_line(hub):
    message = refusal(parse_options, loop.Options, ["--model", "owner/nome"])
    assert message.startswith("owner/nome: not a directory, and not downloadable from the Hub")
    assert "no such repository" in message
    assert "advice" not in message
    assert "check the name" in message


# ------------------------------------------------------------------------------- every command

COMMANDS = {
    "dpo": dpo.train_policy,
    "gen_prompts": gen_prompts.main,
    "improve": improve.main,
    "loop": loop.main,
    "pairs": pairs.make_pairs,
    "sample": sample.sample,
    "train": train.finetune,
    "methods.controls": controls.main,
    "scorers.classifier": classifier.train_reward,
    "eval.scorer_accuracy": scorer_accuracy.scorer_accuracy,
    **{f"eval.{name}": module.main for name, module in BENCHMARKS.items()},
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help_which_shows_its_default(name, capsys):
    command = COMMANDS[name]
    flags = flags_of(RunOptions, []) + flags_of(command, [])
    text = help_of(capsys, command)
    for flag in flags:
        assert flag.help.strip(), f"no comment behind {flag.name}"
        shown = flag_name(flag.name)
        assert shown in text
        if flag.default not in (options.REQUIRED, None, ""):
            help_text = f"{flag.help} (default: {flag.default})"
            assert "".join(help_text.split()) in text, shown


# What takes every finite number: gaps of scores, seeds, and what a loss may set to either sign.
FREE = {"seed", "threshold", "gamma", "alpha"}
OUTSIDE = {
    ranges.Count: ("0", "-1", "1.5", "many", "nan", "9" * 5000),
    ranges.Whole: ("-1", "0.5", "inf"),
    ranges.Positive: ("0", "-1e-9", "nan", "inf"),
    ranges.NotNegative: ("-1e-9", "nan", "inf"),
    ranges.Share: ("-0.1", "1.1", "nan"),
    ranges.Noise: ("-0.1", "0.5", "nan"),
    ranges.Mass: ("0", "1.1", "nan"),
    ranges.Temperature: ("-1", "1e-38", "inf"),
}
INSIDE = {
    ranges.Count: ("1", "1000000"),
    ranges.Whole: ("0",),
    ranges.Positive: ("1e-30",),
    ranges.NotNegative: ("0",),
    ranges.Share: ("0", "1"),
    ranges.Noise: ("0", "0.49"),
    ranges.Mass: ("1e-9", "1"),
    ranges.Temperature: ("0", "0.001", "100"),
}


def parser_of(flag: options.Flag) -> options.Parser:
    parser = options.Parser()
    flag.add_to(parser)
    return parser


@pytest.mark.parametrize("name", COMMANDS)
def test_every_number_has_a_range(name):
    # where below 0 means the official temperatures
    free = FREE | {"temperature"} if name == "eval.mt_bench" else FREE
    for flag in flags_of(COMMANDS[name], []):
        if flag.kind in (int, float):
            assert flag.name.rpartition(".")[2] in free, flag.name
        if flag.kind in OUTSIDE and flag.default is not options.REQUIRED:
            # the default is a value that may be given
            parser_of(flag).parse_args([f"{flag_name(flag.name)}={flag.default}"])


@pytest.mark.parametrize("kind", OUTSIDE, ids=lambda kind: typing.get_args(kind)[1].words)
def test_numbers_outside_their_range_are_refused(kind):
    parser = parser_of(options.Flag("x", kind, 0, ""))
    words = typing.get_args(kind)[1].words
    for text in OUTSIDE[kind]:
        with pytest.raises(InputError, match=f"argument --x: must be .*{words}, got {text[:9]}"):
            parser.parse_args([f"--x={text}"])
    for text in INSIDE[kind]:
        assert parser.parse_args([f"--x={text}"]).x == float(text)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "one"])
def test_any_other_number_must_be_finite(text):
    parser = parser_of(options.Flag("x", float, 0.0, ""))
    with pytest.raises(InputError, match="--x: must be a finite number, got"):
        parser.parse_args([f"--x={text}"])
    assert parser.parse_args(["--x=-3.5"]).x == -3.5


def test_a_whole_number_of_400_digits_is_refused():
    parser = parser_of(options.Flag("x", int, 0, ""))
    with pytest.raises(InputError, match="--x: must be a whole number, a finite number, got 999"):
        parser.parse_args(["--x=" + "9" * 400])


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_has_flags(loss):
    names = {flag.name for flag in flags_of(dpo.PolicyOptions, ["--loss", loss])}
    assert loss_defaults(loss).keys() <= names
    assert policy("--loss", loss).loss_parameters == loss_defaults(loss)


# ------------------------------------------------------------------------------- running a command


def run_command(monkeypatch, capsys, function, *argv: str) -> tuple[int, list[str], str]:
    """cli() in this process, within the session's group: (exit code, lines of output, errors)."""
    monkeypatch.setattr(sys, "argv", ["x", *argv])
    monkeypatch.setattr(options, "distributed", contextlib.nullcontext)
    code = 0
    try:
        cli(function)
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr()
    return code, printed.out.strip().split("\n"), printed.err


def test_a_command_ends_with_json_or_with_one_line(monkeypatch, capsys):
    def succeed(o: Options) -> dict:
        return {"tokens": o.top_k}

    code, lines, _ = run_command(monkeypatch, capsys, succeed, "--model", "m", "--seed", "3")
    assert code == 0
    shown = json.loads(lines[0].removeprefix("options "))
    assert (shown["model"], shown["top_k"], shown["seed"]) == ("m", 5, 3)
    result = json.loads(lines[-1])
    assert result["tokens"] == 5
    assert result["seconds"] >= 0

    def fail(o: Options) -> dict:
        raise InputError("x.jsonl: line 3: fix it")

    code, _, errors = run_command(monkeypatch, capsys, fail, "--model", "m")
    assert (code, errors) == (2, "error: x.jsonl: line 3: fix it\n")


def test_a_file_error_is_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").touch()

    def in_the_way(o: Options) -> dict:
        (tmp_path / "file" / "folder").mkdir(parents=True)

    code, _, errors = run_command(monkeypatch, capsys, in_the_way, "--model", "m")
    assert code == 2
    assert errors.count("\n") == 1
    assert errors.startswith("error: ")
    assert f"'{tmp_path / 'file'}" in errors
    assert "give another one" in errors
    assert "Not a directory" in errors or "File exists" in errors

    def no_space(o: Options) -> dict:
        raise OSError(28, os.strerror(28))  # as write() raises it, without a name

    code, _, errors = run_command(monkeypatch, capsys, no_space, "--model", "m")
    assert code == 2
    assert "No space left on device" in errors
    assert "None" not in errors


def test_a_command_that_returns_a_stages_result_prints_its_counts(monkeypatch, capsys, tmp_path):
    def stage(o: Options) -> Path:
        write_json(tmp_path / "out.manifest.json", {"format": 2, "counts": {"pairs": 3}})
        return tmp_path / "out.jsonl"

    code, lines, _ = run_command(monkeypatch, capsys, stage, "--model", "m")
    assert code == 0
    assert json.loads(lines[-1])["pairs"] == 3


# ------------------------------------------------------------------------------- interruption


LOST = """
import os
import signal
import sys

from plumbing.options import cli

if "ignored" not in sys.argv:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in `pytest &`


class Lost:
    def __del__(self):  # Python prints and forgets what is raised here
        os.kill(os.getpid(), signal.SIGINT)


def work() -> dict:
    Lost()
    return {}


del sys.argv[1:]
cli(work)
"""


def test_an_interrupt_within_a_callback_is_not_lost(tmp_path):
    (tmp_path / "work.py").write_text(LOST)
    done = subprocess.run(
        [sys.executable, tmp_path / "work.py"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 130, done.stdout
    assert done.stderr == "interrupted; rerun the same command to resume\n"


def test_an_interrupt_that_the_caller_ignores_stays_ignored(tmp_path):
    """As a shell does for `command &` in a script."""
    (tmp_path / "work.py").write_text(LOST)
    ignore = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{ignore}; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])",
            tmp_path / "work.py",
            "ignored",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "interrupted" not in done.stderr

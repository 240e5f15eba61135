"""bench/same.py: what counts as a result, what a difference looks like, and that two runs agree."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_helpers import run_bench
from conftest import ROOT
from conftest import run as run_python
from cycle import flags
from safetensors.torch import save_file

from bench import same
from plumbing.files import write_text

pytest_plugins = ["cycle"]


@pytest.fixture
def run(tmp_path) -> Path:
    """A run directory with a file of each kind."""
    run = tmp_path / "run"
    write_text(run / "iter1/prompts.jsonl", '{"id": "a"}\n{"id": "b", "prompt": "Why?"}\n')
    write_text(run / "iter1/eval.json", '{\n "score": 0.5\n}')
    write_text(run / "controls/seed_sft_eval.json", '{\n "score": 0.6\n}')
    write_text(run / "iter1/policy/metrics.jsonl", '{"seconds": 1}\n')
    write_text(run / "iter1/policy/manifest.json", '{"time": 1}')
    write_text(run / "iter1/eval.manifest.json", '{"time": 1}')
    write_text(run / "iter1/eval/ifeval/verdicts.malformed.jsonl", "{}\n")
    write_text(run / "iter1/answers.jsonl.partial/chunk0.part", "{}\n")
    write_text(run / "reference/ab12/1.part", "{}\n")
    save_file({"w": torch.tensor([1.0, 2.0])}, run / "iter1/policy/model.safetensors")
    return run


NAMES = [
    "controls/seed_sft_eval.json",
    "iter1/eval.json",
    "iter1/policy/model.safetensors",
    "iter1/prompts.jsonl",
]


def test_results_are_what_does_not_depend_on_time(run):
    assert sorted(same.results(run)) == NAMES


def test_more_results_are_no_difference(run, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "other")
    write_text(other / "seeds.jsonl", "{}\n")
    assert same.compare(run, other) == 0
    assert "4 of 4 results are the same" in capsys.readouterr().out


def test_each_difference_is_one_line(run, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "other")
    (other / "controls/seed_sft_eval.json").unlink()
    write_text(other / "iter1/prompts.jsonl", '{"id": "a"}\n{"id": "b", "prompt": "Who?"}\n')
    write_text(other / "iter1/eval.json", '{\n "score": 0.5\n}\n1')
    save_file({"w": torch.tensor([1.0, 2.25])}, other / "iter1/policy/model.safetensors")
    assert same.compare(run, other) == 1
    *lines, summary = capsys.readouterr().out.splitlines()
    assert sorted(lines) == [
        "controls/seed_sft_eval.json: missing",
        "iter1/eval.json: 3 lines, now 4",
        "iter1/policy/model.safetensors: the weights differ",
        # from 20 characters before the place on
        'iter1/prompts.jsonl: line 2: \': "b", "prompt": "Why?"}\', '
        'now \': "b", "prompt": "Who?"}\'',
    ]
    assert summary.startswith("0 of 4 results are the same")


def test_nothing_is_not_the_same_as_nothing(tmp_path):
    assert same.compare(tmp_path, tmp_path) == 1


def test_two_runs_by_the_command(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    assert run_bench("same", ["--runs", run, other])[0] == 0
    write_text(other / "iter1/prompts.jsonl", "{}\n")
    assert run_bench("same", ["--runs", run, other])[0] == 1


def test_the_command_needs_a_commit_or_two_runs(run):
    for argv in ([], ["HEAD", "--runs", run, run]):
        code, _, errors = run_bench("same", argv)
        assert code == 2
        assert "--runs" in errors


def test_a_commit_is_unpacked_as_it_was(tmp_path):
    if subprocess.run(["git", "rev-parse"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("needs the git repository")
    tree = same.unpack("HEAD", tmp_path)
    asked = ["git", "show", "HEAD:loop.py"]
    assert (tree / "loop.py").read_bytes() == subprocess.check_output(asked, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.ranks
def test_this_tree_gives_the_same_bytes_twice(world, tmp_path, capsys):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    runs = [tmp_path / "old", tmp_path / "new"]
    for out in runs:
        for command in (
            ["loop.py", *flags(world, out), "--keep-improvers"],
            # without --, torchrun would take --run for a flag of its own
            ["-m", "--", "methods.controls", "--run", out],
        ):
            done = subprocess.run([sys.executable, *launch, *command], cwd=ROOT)
            assert done.returncode == 0
    assert same.compare(*runs) == 0, capsys.readouterr().out


@pytest.mark.slow
def test_a_tree_with_other_numbers_is_told(world, tmp_path, capsys):
    """A higher learning rate of M_t: other policies, and what follows from them."""
    same.make(ROOT, tmp_path / "old")
    out = tmp_path / "new/run"
    argv = flags(world, out, "--keep-improvers", "--iters", "1", "--policy.lr", "1e-3")
    code, _, errors = run_python(["loop.py", *argv])
    assert code == 0, errors

    assert same.compare(tmp_path / "old", tmp_path / "new") == 1
    lines = capsys.readouterr().out.splitlines()[:-1]
    missing = {line.split(":")[0] for line in lines if line.endswith(": missing")}
    changed = {line.split(":")[0] for line in lines} - missing
    assert {"run/iter2/eval.json", "run/controls/seed_sft_eval.json"} <= missing
    assert "run/iter1/policy/model.safetensors" in changed
    assert not {name for name in changed if "pairs.jsonl" in name or "prompts" in name}


def test_a_tree_that_fails_ends_with_its_error(tmp_path):
    with pytest.raises(RuntimeError, match="conftest"):
        same.make(tmp_path, tmp_path / "out")

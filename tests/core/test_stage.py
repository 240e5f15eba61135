"""Stages: what makes a result up to date, what is refused, made again or resumed, and the lock."""

import ast
import builtins
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from conftest import ROOT, TEMPLATE, flip_a_bit, refusal, tiny_checkpoint, write_rows
from safetensors.torch import load_file, save_file

import dpo
import gen_prompts
import improve
import loop
import pairs
import sample
import train
from checkpoint import Checkpoint
from eval import heldout
from methods import almost, controls, online, ranking, rlsf, sapo, self_rewarding
from plumbing import stage
from plumbing.files import digest, write_json, write_jsonl, write_text
from plumbing.options import RunOptions
from plumbing.parts import read_part, write_part
from plumbing.stage import (
    Stage,
    content_hash,
    counts_of,
    discard,
    fingerprint,
    hash_file,
    manifest_path,
    read_manifest,
)
from scorers import classifier


@dataclass(frozen=True, kw_only=True)
class Options:
    run: RunOptions = RunOptions()
    lr: float = 1.0
    name: str = "a"
    limit: int | None = None
    extra: dict = field(default_factory=dict)
    save_every: int = field(default=0, compare=False)


def make(out: Path, o: Options = Options(), text: str = "result", **follows_from) -> bool:
    """A stage that writes one record, or a directory with one; whether it had to."""
    one = Stage(out, o, **follows_from)
    if one.done:
        return False
    file = out if out.suffix == ".jsonl" else out / "model.safetensors"
    write_jsonl(file, [{"text": text}])
    one.finish(records=1)
    return True


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture
def data(tmp_path) -> Path:
    write_text(tmp_path / "in.jsonl", "a")
    return tmp_path / "in.jsonl"


# ------------------------------------------------------------------------------- up to date


def test_a_stage_runs_once(out, data, capsys):
    assert make(out, data=data)
    assert "records 1" in capsys.readouterr().out
    made = manifest_path(out).read_bytes()
    assert not make(out, data=data)
    assert "out.jsonl" in (said := capsys.readouterr().out)
    assert "up to date" in said
    assert manifest_path(out).read_bytes() == made

    manifest = read_manifest(out)
    wanted = {"lr": 1.0, "name": "a", "limit": None, "extra": {}}
    template = {"chat_template": "", "chat_template_args": "", "chat_template_date": ""}
    run = {"seed": 0, "dtype": "bfloat16", **template}
    assert manifest["format"] == 2
    assert manifest["options"] == {**wanted, **run}
    assert manifest["inputs"] == {"data": fingerprint(data)}
    assert manifest["paths"] == {"data": str(data)}
    assert manifest["content"] == fingerprint(out) == content_hash(out)
    assert manifest["counts"] == counts_of(out)
    assert manifest["counts"]["records"] == 1
    assert manifest["counts"]["seconds"] >= 0
    assert manifest["processes"] == 1
    assert manifest["files"].keys() == {"out.jsonl"}
    assert manifest["machine"].keys() == {"cpu", "gpu", "torch", "threads", "kernels"}
    assert counts_of(out.with_name("none.jsonl")) == {}


def test_tokens_per_second_are_of_the_tokens_of_this_call(out):
    one = Stage(out, Options())
    write_jsonl(out, [{}])
    one.finish(tokens=100, fresh=10)
    counts = counts_of(out)
    assert counts["tokens"] == 100
    assert "fresh" not in counts
    assert counts["tokens_per_second"] > 0


def test_a_stage_runs_again_after_a_failure_or_where_its_result_is_gone(out, data, capsys):
    def fail():
        Stage(out, Options(), data=data)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert make(out, data=data)
    out.unlink()
    assert make(out, data=data)
    assert "out.jsonl is missing; making it again" in capsys.readouterr().out
    assert not make(out, data=data)


def test_what_does_not_decide_the_result_is_not_compared(out, data):
    make(out, data=data)
    run = RunOptions(peak_tflops=5)
    assert not make(out, Options(run=run, save_every=3), data=data)
    other = data.with_name("moved.jsonl")
    other.write_bytes(data.read_bytes())
    assert not make(out, data=other), "an input of the same content elsewhere"
    assert not make(out, data=data, nothing=None), "None is absent"
    assert not make(out, data=data, nothing=[])


def test_a_stage_without_options_has_those_of_the_run(out):
    for _ in range(2):
        one = Stage(out, run=RunOptions(), part=1)
        if not one.done:
            write_jsonl(out, [{}])
            one.finish()
    assert one.done
    assert "option seed = 0, now 1" in refusal(Stage, out, run=RunOptions(seed=1), part=1)
    assert "option part = 1, now 2" in refusal(Stage, out, run=RunOptions(), part=2)


# ------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"o": Options(lr=2.0)}, "option lr = 1.0, now 2.0"),
        ({"o": Options(name="b")}, "option name = 'a', now 'b'"),
        ({"o": Options(limit=3)}, "option limit = None, now 3"),
        ({"o": Options(extra={"beta": 2})}, "option extra = {'beta': 1}, now {'beta': 2}"),
        ({"o": Options(run=RunOptions(seed=1))}, "option seed = 0, now 1"),
        (
            {"o": Options(run=RunOptions(dtype="float32"))},
            "option dtype = 'bfloat16', now 'float32'",
        ),
        ({"o": Options(run=RunOptions(chat_template="default"))}, "option chat_template = ''"),
        ({"samples": 2}, "option samples = 1, now 2"),
        ({"samples": None}, "option samples = 1, now None"),
        ({"reads": {"template": "b", "n": 3}}, "option reads = {'template': 'a', 'n': 3}"),
        ({"more": 3}, "option more = None, now 3"),
    ],
)
def test_a_changed_option_is_refused_by_name_and_values(out, now, said):
    before = {"o": Options(extra={"beta": 1}), "samples": 1, "reads": {"template": "a", "n": 3}}
    make(out, **before)
    now = {**before, **now}
    if "extra" not in said:
        now["o"] = replace(now["o"], extra={"beta": 1})
    message = refusal(make, out, **now)
    assert f"{out}: made with {said}" in message
    assert "give another --out" in message
    assert not make(out, **before)


@pytest.mark.parametrize("kind", ["path", "list", "dict of lists", "checkpoint"])
def test_a_changed_input_is_refused_whatever_it_is_given_in(out, data, tmp_path, kind):
    other = write_rows(tmp_path / "other.jsonl", [{}])
    model = tiny_checkpoint(tmp_path / "model", hidden_size=16)
    value = {
        "path": data,
        "list": [other, data],
        "dict of lists": {"seed": [other], "none": [], "earlier": [other, data]},
        "checkpoint": Checkpoint(model),
    }[kind]
    changed = model / "config.json" if kind == "checkpoint" else data
    make(out, given=value)
    assert not make(out, given=value)
    before = changed.read_bytes()
    changed.write_bytes(before + b" ")
    message = refusal(make, out, given=value)
    assert f"{out}: made with input given = " in message
    assert ", now " in message
    changed.write_bytes(before)
    assert not make(out, given=value)


def test_more_or_fewer_inputs_are_refused(out, data, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", [{}])
    make(out, pairs=[data, other], extra_input=data)
    for now in (
        {"pairs": [data], "extra_input": data},
        {"pairs": [other, data], "extra_input": data},
        {"pairs": [data, other, data], "extra_input": data},
        {"pairs": [data, other], "extra_input": None},
        {"pairs": [data, other]},
        {"pairs": None, "extra_input": data},
        {"pairs": [data, other], "extra_input": data, "more": data},
    ):
        assert "made with input " in refusal(make, out, **now)
    assert not make(out, pairs=[data, other], extra_input=data)


def test_a_template_file_is_compared_by_content(out, tmp_path):
    template = tmp_path / "mine.jinja"
    template.write_text("a")
    o = Options(run=RunOptions(chat_template=str(template)))
    make(out, o)
    assert not make(out, o)
    template.write_text("b")
    assert "chat_template" in refusal(make, out, o)


def test_an_option_is_named_before_an_input(out, data):
    """It is often why the input is another."""
    make(out, data=data)
    data.write_text("b")
    assert "option lr" in refusal(make, out, Options(lr=2.0), data=data)


def test_an_option_that_an_older_manifest_does_not_know_has_its_default(out):
    make(out)
    manifest = read_manifest(out)
    for name in ("lr", "limit", "dtype", "extra"):
        del manifest["options"][name]
    write_json(manifest_path(out), manifest)
    assert not make(out)
    assert "option lr = 1.0, now 2.0" in refusal(make, out, Options(lr=2.0))
    assert "option extra = {}, now {'a': 1}" in refusal(make, out, Options(extra={"a": 1}))


def test_a_manifest_of_another_version_is_refused_in_one_line(out):
    write_jsonl(out, [{}])
    write_json(manifest_path(out), {"inputs": {}, "options": {}, "counts": {}, "content": "x"})
    message = refusal(make, out)
    assert "out.manifest.json: written by another version of this program" in message
    assert "give another --out" in message


def test_a_missing_input_is_refused(out, tmp_path):
    assert "none.jsonl: no such file" in refusal(make, out, data=tmp_path / "none.jsonl")
    assert not out.with_name("out.jsonl.partial").exists()


# ------------------------------------------------------------------------------- damaged results


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def edit(file: Path) -> None:
    file.write_text(file.read_text().replace("result", "other text"))


def replace_with_the_same_size(file: Path) -> None:
    file.write_text(file.read_text().replace("result", "RESULT"))


@pytest.mark.parametrize("change", [cut, edit, replace_with_the_same_size])
@pytest.mark.parametrize("name", ["out.jsonl", "model"])
def test_a_damaged_result_is_made_again(tmp_path, capsys, name, change):
    result = tmp_path / name
    make(result)
    file = result if result.suffix else result / "model.safetensors"
    whole = file.read_bytes()
    change(file)
    assert fingerprint(result) == content_hash(result) != read_manifest(result)["content"]
    assert make(result)
    assert "has changed; making it again" in capsys.readouterr().out
    assert file.read_bytes() == whole
    assert not make(result)


def test_an_unchanged_result_is_not_hashed_again(out, monkeypatch):
    make(out)

    def never(*args):
        raise AssertionError("hashed")

    monkeypatch.setattr(stage, "hash_file", never)
    assert not make(out)


@pytest.mark.parametrize("name", ["out.jsonl", "model"])
def test_verify_reads_all_files_of_a_result(tmp_path, capsys, name):
    result = tmp_path / name
    make(result)
    file = result if result.suffix else result / "model.safetensors"
    whole = file.read_bytes()
    flip_a_bit(file)
    assert not make(result)
    verify = Options(run=RunOptions(verify=True))
    assert make(result, verify)
    assert "has changed; making it again" in capsys.readouterr().out
    assert file.read_bytes() == whole
    assert not make(result, verify)


def test_a_damaged_manifest_is_refused(out):
    make(out)
    file = manifest_path(out)
    whole = file.read_text()
    for damaged in (whole[:-9], whole.replace('"lr": 1.0', '"lr": 2.0'), whole.replace("1", "7")):
        assert damaged != whole
        file.write_text(damaged)
        assert str(file) in refusal(make, out)
    file.write_text(whole)
    assert not make(out)


def test_a_manifest_of_before_there_were_digests_counts(out):
    make(out)
    manifest = json.loads(manifest_path(out).read_text())
    del manifest["digest"]
    write_json(manifest_path(out), manifest)
    assert not make(out)


def test_what_safetensors_left_after_a_kill_is_removed(tmp_path):
    """It writes under a name of its own before it renames."""
    write_text(tmp_path / "model.partial" / "identity.part", "")
    write_text(tmp_path / "model" / ".tmpAbC123", "x")
    make(tmp_path / "model")
    assert not list((tmp_path / "model").glob(".tmp*"))


def test_a_touched_result_is_still_up_to_date(out):
    make(out)
    os.utime(out, ns=(1, 1))
    assert not make(out)
    assert fingerprint(out) == read_manifest(out)["content"]


def test_every_file_of_a_directory_is_watched(tmp_path, capsys):
    one = Stage(tmp_path / "model", Options())
    write_text(tmp_path / "model" / "deep" / "metrics.jsonl", "x")
    write_text(tmp_path / "model" / "config.json", "{}")
    one.finish()
    assert read_manifest(tmp_path / "model")["files"].keys() == {
        "model/config.json",
        "model/deep/metrics.jsonl",
    }
    write_text(tmp_path / "model" / "deep" / "metrics.jsonl", "y")
    assert not Stage(tmp_path / "model", Options()).done
    assert "metrics.jsonl has changed" in capsys.readouterr().out


def test_files_beside_a_result_are_watched(out, capsys):
    other = out.with_suffix(".candidates.jsonl")
    one = Stage(out, Options())
    one.beside.append(other)
    for file in (out, other):
        write_text(file, "x")
    one.finish()
    assert Stage(out, Options()).done
    write_text(other, "xy")
    assert not Stage(out, Options()).done
    assert "out.candidates.jsonl has changed; making it again" in capsys.readouterr().out


# ------------------------------------------------------------------------------- discarding weights


def test_a_discarded_result_is_up_to_date(tmp_path, capsys):
    result = tmp_path / "improver"
    make(result)
    write_text(result / "config.json", "{}")
    before = fingerprint(result)
    discard(result)
    assert not (result / "model.safetensors").exists()
    assert (result / "config.json").exists()
    assert not make(result)
    assert "up to date" in capsys.readouterr().out
    assert fingerprint(result) == before == read_manifest(result)["content"]
    discard(result)
    assert not make(result)


def test_weights_are_discarded_after_a_stop_in_the_middle(tmp_path, monkeypatch):
    make(tmp_path / "improver")

    def killed(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        discard(tmp_path / "improver")
    assert not make(tmp_path / "improver")
    discard(tmp_path / "improver")
    assert not list((tmp_path / "improver").glob("*.safetensors"))


def test_other_missing_files_of_a_discarded_result_are_damage(tmp_path):
    one = Stage(tmp_path / "improver", Options())
    write_text(tmp_path / "improver" / "model.safetensors", "x")
    write_text(tmp_path / "improver" / "config.json", "{}")
    one.finish()
    discard(tmp_path / "improver")
    (tmp_path / "improver" / "config.json").unlink()
    assert make(tmp_path / "improver")


# ------------------------------------------------------------------------------- scratch and lock


def begin(out: Path, o: Options = Options()) -> Path:
    """A stage that was stopped half-way; returns its scratch folder."""
    one = Stage(out, o)
    write_text(one.scratch / "part" / "1", "half done")
    return one.scratch


def test_scratch_is_kept_for_the_same_result_and_cleared_for_another(out):
    scratch = begin(out)
    assert scratch == out.with_name("out.jsonl.partial")
    assert not Stage(out, Options(save_every=5)).done
    assert (scratch / "part" / "1").read_text() == "half done"
    write_text(scratch / "scores" / "a.json", "1")
    Stage(out, Options(lr=2.0))
    assert not (scratch / "part").exists()
    assert (scratch / "scores" / "a.json").exists(), "scores are addressed by content"


def test_finish_removes_scratch(out):
    scratch = begin(out)
    make(out)
    assert not scratch.exists()


def test_scratch_of_a_finished_result_is_removed(out):
    """A kill may come between the manifest and the end of finish()."""
    make(out)
    scratch = out.with_name("out.jsonl.partial")
    write_part(scratch / "identity.part", {})
    write_text(scratch / "part", "x")
    assert not make(out)
    assert not scratch.exists()


def test_scratch_whose_identity_is_damaged_is_cleared(out, capsys):
    scratch = begin(out)
    flip_a_bit(scratch / "identity.part")
    make(out)
    assert "identity.part: damaged" in capsys.readouterr().out
    scratch = begin(out.with_name("b.jsonl"))
    flip_a_bit(scratch / "identity.part", 3)
    Stage(out.with_name("b.jsonl"), Options())
    assert not (scratch / "part").exists()


def test_work_begun_on_another_machine_is_used_and_said(out, capsys):
    scratch = begin(out)
    begun = read_part(scratch / "identity.part")
    begun["machine"]["cpu"] = "another"
    write_part(scratch / "identity.part", begun)
    Stage(out, Options())
    assert (scratch / "part" / "1").exists()
    assert "begun on another machine; its last bits may differ" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["equal", "above", "below", "by another name"])
@pytest.mark.parametrize("given", ["path", "list", "option"])
def test_a_result_does_not_overlap_with_what_it_is_made_from(tmp_path, place, given):
    model = tiny_checkpoint(tmp_path / "folder" / "model", hidden_size=16)
    (tmp_path / "link").symlink_to(model)
    out = {
        "equal": model,
        "above": model.parent,
        "below": model / "out.jsonl",
        "by another name": tmp_path / "link" / ".." / "model",
    }[place]
    given = {
        "path": {"model": model},
        "list": {"models": [[], [model]]},
        "option": {"o": Options(name=model)},
    }[given]
    before = contents(tmp_path)
    assert f"{out}: overlaps with the input {model}; give" in refusal(make, out, **given)
    assert contents(tmp_path) == before


def test_neighbours_do_not_overlap(tmp_path):
    """Nor do names that begin alike, nor the results that benchmarks keep beside a model."""
    model = tiny_checkpoint(tmp_path / "model", hidden_size=16)
    assert make(tmp_path / "model2", model=model)
    assert make(tmp_path / "mode", model=model)
    assert make(tmp_path / "model.jsonl", model=model)
    assert make(model / "eval" / "ifeval" / "answers.jsonl", model=model)


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_is_not_ours_is_not_overwritten(tmp_path, kind):
    out = tmp_path / ("out.jsonl" if kind == "file" else "out")
    theirs = out if kind == "file" else out / "notes.txt"
    write_text(theirs, "mine")
    assert f"{out}: holds what this program has not made" in refusal(make, out)
    assert theirs.read_text() == "mine"
    assert not out.with_name(out.name + ".partial").exists()


def test_an_empty_directory_may_be_there(tmp_path):
    (tmp_path / "out").mkdir()
    assert make(tmp_path / "out")


def test_a_half_written_result_is_ours(out):
    """A kill between the result and its manifest."""
    Stage(out, Options())
    write_text(out, "half")
    assert make(out)


def test_a_model_that_a_stage_made_and_that_changed_since_is_noticed(tmp_path):
    """By size or time, then by its hash: its manifest's word does not count any more."""
    model, out = tmp_path / "model", tmp_path / "out.jsonl"
    make(model)
    make(out, model=model)
    assert not make(out, model=model)
    change(model / "model.safetensors")
    assert "made with input model = " in refusal(make, out, model=model)


def test_a_file_in_the_way_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        Stage(tmp_path / "file" / "out.jsonl", Options())


HOLDER = """
import sys
import time
from pathlib import Path

from plumbing.options import RunOptions
from plumbing.parts import read_part, write_part
from plumbing.ranks import distributed
from plumbing.stage import Stage

with distributed():
    stage = Stage(Path(sys.argv[1]), run=RunOptions())
    (stage.scratch / "part").write_text("half done")
    print("holds", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_two_processes_cannot_write_the_same_result(out):
    """The second is refused while the first one lives, and goes on after a kill -9."""
    command = [sys.executable, "-c", HOLDER, str(out)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    try:
        assert holder.stdout.readline() == "holds\n"
        message = refusal(Stage, out, run=RunOptions())
        assert f"{out}: process {holder.pid} is writing it" in message
        assert "wait for it, or give another --out" in message
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    one = Stage(out, run=RunOptions())
    assert not one.done
    assert (one.scratch / "part").read_text() == "half done"
    write_jsonl(out, [{}])
    one.finish()
    assert Stage(out, run=RunOptions()).done


# ------------------------------------------------------------------------------- where it was made


def test_another_machine_or_other_code_is_said(out, capsys):
    make(out)
    manifest = read_manifest(out)
    here = manifest["machine"]
    capsys.readouterr()

    write_json(manifest_path(out), {**manifest, "machine": {**here, "cpu": "X", "threads": 64}})
    assert not make(out)
    differs = "made with another cpu, threads: what follows may differ in its last bits"
    assert f"up to date ({differs})" in capsys.readouterr().out

    write_json(manifest_path(out), {**manifest, "code": "0"})
    assert not make(out)
    assert "up to date (made by other code; delete it to make it again)" in capsys.readouterr().out


def test_the_line_names_an_iterations_results_by_their_folder(tmp_path, capsys):
    make(tmp_path / "run" / "iter2" / "eval" / "out.jsonl")
    make(tmp_path / "run" / "generator")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["iter2/eval/out.jsonl", "generator"]


# ------------------------------------------------------------------------------- fingerprints


def test_fingerprint_follows_the_content_and_nothing_else(tmp_path):
    a, b = (tiny_checkpoint(tmp_path / name, hidden_size=16) for name in "ab")
    before = fingerprint(a)
    assert before == fingerprint(b)
    (a / "README.md").write_text("changes nothing")
    os.utime(a / "config.json", ns=(1, 1))
    assert fingerprint(a) == before
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        held = (a / name).read_bytes()
        (a / name).write_bytes(held[:-1] + b" ")
        assert fingerprint(a) != before, name
        (a / name).write_bytes(held)
        assert fingerprint(a) == before
    for name in ("chat_template.jinja", "model.safetensors.index.json", "generation_config.json"):
        (a / name).write_text("x")
        assert fingerprint(a) != before, name
        (a / name).unlink()


def test_fingerprint_of_nothing_is_refused(tmp_path):
    assert "no such file or directory" in refusal(fingerprint, tmp_path / "none")


def test_a_foreign_manifest_in_an_input_is_no_manifest(tmp_path):
    model = tiny_checkpoint(tmp_path / "model", hidden_size=16)
    before = fingerprint(model)
    for text in ('{"version": 1}', "[1]", '{"content": "x", "inputs": {}}'):
        (model / "manifest.json").write_text(text)
        assert fingerprint(model) == before


def test_hashes_of_large_files_are_kept_between_processes(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setattr(stage, "cache_folder", lambda: folder)
    monkeypatch.setattr(stage, "LARGE", 10)
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"x" * 10)
    large.write_bytes(b"x" * 11)
    first = hash_file(large)
    hash_file(small)
    [kept] = (folder / "hashes").iterdir()
    assert kept.read_text() == first

    # what is kept is used, for this size and time only
    kept.write_text("from the cache")
    stage.cached_hash.cache_clear()
    assert hash_file(large) == "from the cache"
    os.utime(large, ns=(1, 1))
    assert hash_file(large) == first
    stage.cached_hash.cache_clear()


# ------------------------------------------------------------------------------- every stage

PLUGIN = """
from stage_neighbour import FACTOR


def scorer(rows):
    return [FACTOR * len(row["response"]) for row in rows]


def loss(p, *, sharpness: float = 3.0):
    return -FACTOR * sharpness * (p.chosen - p.rejected)


def evaluate(answers, heldout, base_answers, model, base, run):
    return {"score": FACTOR * len(answers)}


def keep(record):
    return FACTOR > 0


def source(t):
    return [{"prompt": f"Question {i} of {t}?"} for i in range(3)]


def feedback(rows):
    return [{"note": FACTOR} for _ in rows]
"""
PROMPTS = ["Why is the sky blue?", "How does a red fox jump?", "Can the green owl sing?"]


def in_two_files(model: Path) -> None:
    """Split the weights of a checkpoint, with an index of what is where."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    files = {}
    for i, some in enumerate((list(tensors)[::2], list(tensors)[1::2])):
        save_file({name: tensors[name] for name in some}, model / f"{i}.safetensors")
        files |= dict.fromkeys(some, f"{i}.safetensors")
    write_json(model / "model.safetensors.index.json", {"weight_map": files})


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """Every kind of input that a stage may have. The checkpoints have no template of their own."""
    folder = tmp_path_factory.mktemp("stages")
    tiny = {"hidden_size": 16, "max_position_embeddings": 2048, "template": None}
    in_two_files(tiny_checkpoint(folder / "model", **tiny))
    (folder / "model" / "generation_config.json").write_text('{"eos_token_id": 0}')
    tiny_checkpoint(folder / "second", seed=1, **tiny)
    tiny_checkpoint(folder / "third", seed=2, **tiny)
    labels = {"id2label": {"0": "reward"}}
    architecture = ["LlamaForSequenceClassification"]
    tiny_checkpoint(folder / "reward", architectures=architecture, **labels, **tiny)
    (folder / "template.jinja").write_text(TEMPLATE)

    good = [{"prompt": prompt, "response": f"{prompt} It does."} for prompt in PROMPTS]
    bad = [{"prompt": prompt, "response": "No.", "finish_reason": "stop"} for prompt in PROMPTS]
    rows = [{"prompt": p, "chosen": f"{p} Yes, it does.", "rejected": "No."} for p in PROMPTS]
    for name in ("seeds", "heldout"):
        write_rows(folder / f"{name}.jsonl", good)
    write_rows(folder / "answers.jsonl", [{**row, "finish_reason": "stop"} for row in good])
    for name in ("prompts", "drafts", "base_answers", "earlier"):
        write_rows(folder / f"{name}.jsonl", bad)
    for name in ("pairs1", "pairs2"):
        write_rows(
            folder / f"{name}.jsonl", [{**row, "id": f"{name} {row['prompt']}"} for row in rows]
        )
    samples = [{**row, "id": f"pairs1 {row['prompt']}"} for row in bad]
    write_rows(folder / "samples.jsonl", samples)
    several = [{**row, "id": row["prompt"], "sample": i} for row in good for i in range(2)]
    several = [{**row, "response": f"{row['response']} {row['sample']}"} for row in several]
    judged = {"finish_reason": "stop", "reward": 0.5}
    write_rows(folder / "several.jsonl", [{**row, **judged} for row in several])
    cut = {"prefix": "", "rest": " It does.", "last": False, "finish_reason": "length"}
    write_rows(folder / "segments.jsonl", [{**row, **cut, "gold": row["response"]} for row in good])
    write_rows(folder / "judged.jsonl", [{**row, "verdict": "Score: 2"} for row in good])
    asked = [digest(row["id"], row["sample"], "judged") for row in several]
    verdicts = [{"id": name, "prompt": "Q", "response": "Score: 3"} for name in asked]
    write_rows(folder / "verdicts.jsonl", verdicts)
    (folder / "corpus.txt").write_text("the quick fox can jump\n\nthe quiet owl can sleep well\n")
    (folder / "plugin.py").write_text(PLUGIN)
    (folder / "stage_neighbour.py").write_text("FACTOR = 1.0\n")
    train_on_pairs(folder, folder / "before", first=True)
    return folder


def settings(f: Path) -> tuple[dict, dict]:
    """Options of training and of sampling that are quick."""
    run = RunOptions(dtype="float32", chat_template=str(f / "template.jinja"))
    return {"run": run, "epochs": 1, "batch": 4, "lr": 1e-3}, {"run": run, "max_new_tokens": 4}


def finetune(f, out):
    o = train.TrainOptions(**settings(f)[0])
    train.finetune(f / "model", f / "seeds.jsonl", out, o)
    return ["model", "seeds.jsonl"]


def answer(f, out):
    o = sample.SampleOptions(**settings(f)[1])
    sample.sample(f / "model", f / "prompts.jsonl", out.with_suffix(".jsonl"), o, samples=2)
    return ["model", "prompts.jsonl"]


def train_generator(f, out):
    o = gen_prompts.GeneratorOptions(**settings(f)[0])
    gen_prompts.train_generator(f / "model", f / "seeds.jsonl", out, o)
    return ["model", "seeds.jsonl"]


SEEN = {"seed": ["seeds.jsonl"], "heldout": ["heldout.jsonl"], "earlier": ["earlier.jsonl"]}


def seen_in(f: Path) -> dict[str, list[Path]]:
    return {label: [f / name for name in names] for label, names in SEEN.items()}


def sample_prompts(f, out, keep="", also=()):
    o = gen_prompts.PromptOptions(**settings(f)[1], lists=3, keep=keep)
    reads = gen_prompts.GeneratorOptions().reads
    prompts = out.with_suffix(".jsonl")
    gen_prompts.sample_prompts(f / "model", f / "corpus.txt", seen_in(f), prompts, o, reads)
    return ["model", "corpus.txt", "seeds.jsonl", "heldout.jsonl", "earlier.jsonl", *also]


def take_prompts(f, out, source="", keep="", also=()):
    own = source or str(f / "prompts.jsonl")
    o = gen_prompts.PromptOptions(**settings(f)[1], source=own, keep=keep)
    seen = seen_in(f) if source else {"seed": []}  # other files hold the same prompts
    gen_prompts.take_prompts(seen, out.with_suffix(".jsonl"), o)
    files = ["seeds.jsonl", "heldout.jsonl", "earlier.jsonl"] if source else ["prompts.jsonl"]
    return [*files, *also]


def train_improver(f, out, scorer="none", feedback="", also=()):
    o = improve.ImproverOptions(**settings(f)[0], scorer=scorer, threshold=-99.0, feedback=feedback)
    improve.train_improver(f / "model", f / "seeds.jsonl", f / "drafts.jsonl", out, o)
    return ["model", "seeds.jsonl", "drafts.jsonl", *also]


def rewrite(f, out, scorer="none", feedback="", also=()):
    o = improve.RewriteOptions(**settings(f)[1], scorer=scorer, best_of=2, draft_competes=True)
    rewrites = out.with_suffix(".jsonl")
    revision = improve.ImproverOptions(feedback=feedback).revision
    improve.rewrite(f / "second", f / "drafts.jsonl", f / "model", rewrites, o, revision)
    return ["second", "drafts.jsonl", "model", *also]


def make_pairs(f, out, scorer="none", feedback="", also=()):
    o = pairs.PairOptions(run=settings(f)[0]["run"], scorer=scorer, threshold=-99.0)
    made = out.with_suffix(".jsonl")
    revision = improve.ImproverOptions(feedback=feedback).revision
    sides = f / "answers.jsonl", f / "base_answers.jsonl"
    pairs.make_pairs(*sides, made, o, base=f / "model", revision=revision)
    return ["answers.jsonl", "base_answers.jsonl", "model", *also]


def rank_pairs(f, out, scorer="likelihood", feedback="", also=()):
    o = pairs.PairOptions(run=settings(f)[0]["run"], scorer=scorer, threshold=-99.0)
    revision = improve.ImproverOptions(feedback=feedback).revision
    samples, made = f / "several.jsonl", out.with_suffix(".jsonl")
    ranking.rank_pairs(samples, made, o, base=f / "model", revision=revision)
    return ["several.jsonl", "model", *also]


def grade(f, out):
    run = settings(f)[0]["run"]
    self_rewarding.grade(f / "seeds.jsonl", f / "drafts.jsonl", out.with_suffix(".jsonl"), run)
    return ["seeds.jsonl", "drafts.jsonl"]


def teach(f, out):
    run = settings(f)[0]["run"]
    made = out.with_suffix(".jsonl")
    self_rewarding.teach(f / "seeds.jsonl", f / "judged.jsonl", made, "{response}", run)
    return ["seeds.jsonl", "judged.jsonl"]


def ask(f, out):
    run = settings(f)[0]["run"]
    self_rewarding.ask(f / "several.jsonl", out.with_suffix(".jsonl"), "{response}", run)
    return ["several.jsonl"]


def mean_scores(f, out):
    run = settings(f)[0]["run"]
    responses, verdicts = f / "several.jsonl", f / "verdicts.jsonl"
    self_rewarding.mean_scores(responses, verdicts, out.with_suffix(".jsonl"), run)
    return ["several.jsonl", "verdicts.jsonl"]


def cut_segments(f, out):
    run = settings(f)[0]["run"]
    o = sapo.SapoOptions(run=run, segment=2), dpo.PolicyOptions(**settings(f)[0])
    sapo.cut_segments(f / "seeds.jsonl", f / "model", out.with_suffix(".jsonl"), *o, (0, 2))
    return ["seeds.jsonl", "model"]


def new_pairs(f, out):
    run = settings(f)[0]["run"]
    sapo.new_pairs(f / "segments.jsonl", out.with_suffix(".jsonl"), run)
    return ["segments.jsonl"]


def join_pairs(f, out):
    files = [f / "pairs1.jsonl", f / "pairs2.jsonl"]
    sapo.join_pairs(files, out.with_suffix(".jsonl"), settings(f)[0]["run"])
    return ["pairs1.jsonl", "pairs2.jsonl"]


def draw(f, out):
    files = [f / "pairs1.jsonl", f / "pairs2.jsonl"]
    o = sapo.SapoOptions(run=settings(f)[0]["run"])
    sapo.draw(files, out.with_suffix(".jsonl"), o, batch=3, steps=(0, 2))
    return ["pairs1.jsonl", "pairs2.jsonl"]


def first_and_second(f, folder) -> list[online.Round]:
    """Two rounds of a step each, the second in the folder."""
    first = online.Round(f / "model", f / "before", None, 0, 1, 2)
    return [first, online.Round(f / "model", folder, first, 1, 2, 2)]


def train_on_pairs(f, out, first=False):
    o = sapo.Options(policy=dpo.PolicyOptions(**{**settings(f)[0], "batch": 3}))
    o = replace(o, run=settings(f)[0]["run"])
    pairs = f / "pairs1.jsonl"
    r = first_and_second(f, out)[0 if first else 1]
    reference = f / ("model" if first else "second")
    sapo.train_on_pairs(r, pairs, reference, o, out.with_name("cache"))
    return ["model", "before/average", "second", "pairs1.jsonl"]


def train_on_answers(f, out):
    o = rlsf.RlsfOptions(**{**settings(f)[0], "batch": 6}, samples=2)
    answers = f / "several.jsonl"
    r = first_and_second(f, out)[1]
    rlsf.train_on_answers(r, answers, f / "second", o, out.with_name("cache"))
    return ["model", "before/average", "second", "several.jsonl"]


def export_policy(f, out):
    o = dpo.PolicyOptions(**settings(f)[0])
    first, _ = first_and_second(f, out)
    online.export_policy(first, [first], out, o)
    return ["model", "before/average"]


def prompts_of_steps(f, out):
    o = rlsf.RlsfOptions(**settings(f)[0], samples=2)
    prompts, asked = f / "prompts.jsonl", out.with_suffix(".jsonl")
    rlsf.prompts_of_steps(prompts, f / "model", asked, o, (0, 2))
    return ["prompts.jsonl", "model"]


def score_answers(f, out):
    o = rlsf.RlsfOptions(**settings(f)[0])
    rlsf.score_answers(f / "several.jsonl", f / "reward", out.with_suffix(".jsonl"), o)
    return ["several.jsonl", "reward"]


def first_seeds(f, out):
    run = settings(f)[0]["run"]
    almost.first_seeds(f / "seeds.jsonl", 2, out.with_suffix(".jsonl"), run)
    return ["seeds.jsonl"]


def compare(f, out):
    o = almost.AlmostOptions(run=settings(f)[0]["run"], plain=True)
    files = [f / "answers.jsonl", f / "base_answers.jsonl"]
    almost.compare(files, [0, 1], out.with_suffix(".jsonl"), o)
    return ["answers.jsonl", "base_answers.jsonl"]


def favourites(f, out):
    o = almost.AlmostOptions(run=settings(f)[0]["run"])
    almost.favourites(f / "several.jsonl", f / "reward", out.with_suffix(".jsonl"), o)
    return ["several.jsonl", "reward"]


def train_policy(f, out, names=("pairs1", "pairs2"), also=(), **how):
    o = dpo.PolicyOptions(**settings(f)[0], **how)
    files = [f / f"{name}.jsonl" for name in names]
    dpo.train_policy(f / "model", files, out, o, reference=f / "second", cache=out / "cache")
    return ["model", "second", *(f"{name}.jsonl" for name in names), *also]


def policy_with_a_second_reference(f, out):
    return train_policy(f, out, also=["third"], loss="mrpo", second_reference=f / "third")


def policy_with_self_samples(f, out):
    samples = {"self_samples": f / "samples.jsonl", "also": ["samples.jsonl"]}
    return train_policy(f, out, ["pairs1"], loss="selm", **samples)


def train_reward(f, out):
    o = classifier.RewardOptions(**settings(f)[0])
    classifier.train_reward(f / "model", f / "pairs1.jsonl", out, o)
    return ["model", "pairs1.jsonl"]


def gold_pairs(f, out):
    run = settings(f)[0]["run"]
    controls.gold_pairs(f / "seeds.jsonl", f / "drafts.jsonl", out.with_suffix(".jsonl"), run)
    return ["seeds.jsonl", "drafts.jsonl"]


def score_heldout(f, out, evaluate="", also=()):
    o = loop.Options(run=settings(f)[0]["run"], evaluate=evaluate)
    answers, base_answers = f / "answers.jsonl", f / "base_answers.jsonl"
    numbers = out.with_suffix(".json")
    gold = f / "heldout.jsonl"
    heldout.score_heldout(answers, numbers, gold, base_answers, f / "model", o, f / "second")
    return ["answers.jsonl", "base_answers.jsonl", "heldout.jsonl", "model", "second", *also]


def with_plugin(function, option: str, name: str):
    """A stage with a function of the user's; the file and its neighbour are inputs, too."""

    def run_stage(f, out):
        files = ["plugin.py", "stage_neighbour.py"]
        return function(f, out, also=files, **{option: f"{f}/plugin.py:{name}"})

    return run_stage


def with_scorer(function, spec: str, also: list[str]):
    """A stage with a scorer; FOLDER in its name is the folder of inputs."""

    def run_stage(f, out, also=also, **more):
        return function(f, out, scorer=spec.replace("FOLDER", str(f)), also=also, **more)

    return run_stage


# Each runs a stage tiny, and returns the names of what it may read besides the template.
STAGES = {
    "finetune": finetune,
    "sample": answer,
    "train_generator": train_generator,
    "sample_prompts": sample_prompts,
    "sample_prompts, keep": with_plugin(sample_prompts, "keep", "keep"),
    "take_prompts": take_prompts,
    "take_prompts, plug-in": with_plugin(take_prompts, "source", "source"),
    "take_prompts, keep": with_plugin(take_prompts, "keep", "keep"),
    "train_improver": train_improver,
    "train_improver, feedback": with_plugin(train_improver, "feedback", "feedback"),
    "train_improver, settled": with_scorer(train_improver, "settled", []),
    "train_improver, reward model": with_scorer(train_improver, "FOLDER/reward", ["reward"]),
    "train_improver, plug-in": with_plugin(train_improver, "scorer", "scorer"),
    "rewrite": rewrite,
    "rewrite, feedback": with_plugin(rewrite, "feedback", "feedback"),
    "rewrite, likelihood": with_scorer(rewrite, "likelihood", []),
    "rewrite, settled": with_scorer(rewrite, "settled", []),
    "rewrite, reward model": with_scorer(rewrite, "FOLDER/reward", ["reward"]),
    "rewrite, plug-in": with_plugin(rewrite, "scorer", "scorer"),
    "make_pairs": make_pairs,
    "make_pairs, likelihood": with_scorer(make_pairs, "likelihood", []),
    "make_pairs, settled": with_scorer(make_pairs, "settled", []),
    "make_pairs, settled with feedback": with_plugin(
        with_scorer(make_pairs, "settled", []), "feedback", "feedback"
    ),
    "make_pairs, reward model": with_scorer(make_pairs, "FOLDER/reward", ["reward"]),
    "make_pairs, judge": with_scorer(make_pairs, "judge:FOLDER/third", ["third"]),
    "make_pairs, plug-in": with_plugin(make_pairs, "scorer", "scorer"),
    "rank_pairs": rank_pairs,
    "rank_pairs, settled with feedback": with_plugin(
        with_scorer(rank_pairs, "settled", []), "feedback", "feedback"
    ),
    "rank_pairs, reward model": with_scorer(rank_pairs, "FOLDER/reward", ["reward"]),
    "rank_pairs, plug-in": with_plugin(rank_pairs, "scorer", "scorer"),
    "train_policy": train_policy,
    "train_policy, second reference": policy_with_a_second_reference,
    "train_policy, self-samples": policy_with_self_samples,
    "train_policy, plug-in": with_plugin(train_policy, "loss", "loss"),
    "train_reward": train_reward,
    "gold_pairs": gold_pairs,
    "grade": grade,
    "teach": teach,
    "ask": ask,
    "mean_scores": mean_scores,
    "cut_segments": cut_segments,
    "new_pairs": new_pairs,
    "join_pairs": join_pairs,
    "draw": draw,
    "train_on_pairs": train_on_pairs,
    "train_on_answers": train_on_answers,
    "export_policy": export_policy,
    "prompts_of_steps": prompts_of_steps,
    "score_answers": score_answers,
    "first_seeds": first_seeds,
    "compare": compare,
    "favourites": favourites,
    "score_heldout": score_heldout,
    "score_heldout, plug-in": with_plugin(score_heldout, "evaluate", "evaluate"),
}


@contextmanager
def opened_files(monkeypatch):
    """The set of files that Python code opens in the body; what is written in Rust is not seen."""
    opened = set()
    real = open

    def note(file, *args, **how):
        opened.add(Path(str(file)))
        return real(file, *args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", note)
        patch.setattr(io, "open", note)
        yield opened


def change(file: Path) -> None:
    content = file.read_bytes()
    if file.suffix == ".safetensors":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        file.write_bytes(content + b" ")


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_not_up_to_date_once_a_file_it_reads_has_changed(
    name, given, tmp_path, monkeypatch, capsys
):
    f = shutil.copytree(given, tmp_path / "in")
    monkeypatch.syspath_prepend(f)
    monkeypatch.delitem(sys.modules, "stage_neighbour", raising=False)
    # what a random model writes is no question
    monkeypatch.setattr(gen_prompts, "parse_question", lambda text: f"What is {digest(text)}?")
    run_stage = STAGES[name]

    # it reads no other file than those that are changed below
    with opened_files(monkeypatch) as opened:
        reads = run_stage(f, tmp_path / "out")
    files = []
    for path in [f / name for name in reads] + [f / "template.jinja"]:
        files += sorted(path.iterdir()) if path.is_dir() else [path]
    # what a round leaves besides its average follows from what the average does
    beside = ("training", "manifest.json", "metrics.jsonl")
    files = [file for file in files if file.name not in beside]
    here = {file for file in opened if f in file.parents and not {*beside} & {*file.parts}}
    assert here <= {*files}
    assert f / "template.jinja" in opened

    capsys.readouterr()
    run_stage(f, tmp_path / "out")
    assert "up to date" in capsys.readouterr().out
    for file in files:
        before = file.read_bytes()
        change(file)
        message = refusal(run_stage, f, tmp_path / "out")
        assert "made with input " in message, file
        assert "up to date" not in capsys.readouterr().out, file
        file.write_bytes(before)
    run_stage(f, tmp_path / "out")
    assert "up to date" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("loop.py", True),
        ("plumbing/stage.py", True),
        ("ops/cpu.c", True),
        ("scorers/load.py", True),
        ("methods/spin.py", True),
        ("eval/report.py", False),
        ("README.md", False),
    ],
)
def test_the_digest_of_the_code_is_of_what_makes_results(file, counts, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "ROOT", tmp_path)
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    digests = []
    for text in ("before", "after"):
        path.write_text(text)
        digests.append(stage.code_digest.__wrapped__())
    assert (digests[0] != digests[1]) == counts


def test_the_table_holds_every_stage_of_the_program():
    files = [*ROOT.glob("*.py"), *ROOT.glob("scorers/*.py"), *ROOT.glob("methods/*.py")]
    found = set()
    for file in [*files, ROOT / "eval" / "heldout.py"]:
        for node in ast.parse(file.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef) and "= Stage(" in ast.unparse(node):
                found.add(node.name)
                first = node.body[1 if ast.get_docstring(node) else 0]
                assert ast.unparse(first).startswith("stage = Stage("), node.name
    assert found == {name.partition(",")[0] for name in STAGES}

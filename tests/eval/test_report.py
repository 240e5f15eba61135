"""The page of a run: what eval/report.py collects for it, and how eval/report.html behaves.

The browser tests need chromium and chromedriver (Debian: chromium, chromium-driver) and the package
selenium.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import ROOT, write_rows

import loop
from checkpoint import Checkpoint
from eval import heldout, report
from plumbing.files import to_json
from plumbing.options import as_dict, parse_options
from plumbing.stage import manifest_path

EVIL = (
    """</script><script>window.hacked = 1</script><!-- <img src=x onerror="window.hacked=2"> """
    """' " & \\ ${x} \u2028|\u2029"""
)
HEBREW = "\u202e\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd\u202c \u200f(1)"
LONG = "w" * 3000

# ------------------------------------------------------------------------------- a run by hand


def seal(result: Path, counts: dict, seconds: float = 1.0) -> None:
    """Write the manifest of a stage that made `result`."""
    path = manifest_path(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    manifest = {
        "format": 2,
        "inputs": {},
        "options": {},
        "paths": {"model": "M"},
        "counts": {**counts, "seconds": seconds},
        "time": 1000.0 + seconds,
        "processes": 2,
        "content": "0",
    }
    path.write_text(json.dumps(manifest))


def train(folder: Path, steps: int, **columns) -> None:
    """A training stage: columns are functions of the step."""
    seal(folder, {"examples": 3, "steps": steps, "tokens": 60 * steps}, 3.0)
    lines = []
    for step in range(1, steps + 1):
        values = {name.replace("__", "/"): f(step) for name, f in columns.items()}
        lines.append(to_json({"step": step, **values}) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))


HELDOUT = [{"id": "h", "prompt": "Held out?", "response": "yes"}]


def pair(t: int, k: int) -> dict:
    """What pair k of iteration t is made of."""
    first = f"first answer {k}"
    return {
        "id": f"id{t}-{k}",
        "prompt": f"Question {k} of iteration {t}?",
        "keywords": ["red", f"key{k}"],
        "base": first,
        "draft": first if t == 1 else f"second answer {k}",
        "chosen": f"a much better answer {k}",
        "rejected": first,
        "score_chosen": -1.0 + k / 10,
        "score_rejected": -2.0,
    }


def write_records(folder: Path, t: int, pairs: list[dict]) -> None:
    """The JSONL files of an iteration, as the page reads them."""
    files = {
        "prompts": {"keywords": "keywords"},
        "base_answers": {"response": "base"},
        "rewrites": {"draft": "draft"},
        "pairs": {name: name for name in ("chosen", "rejected", "score_chosen", "score_rejected")},
    }
    for name, fields in files.items():
        rows = []
        for row in pairs:
            asked = {field: row[field] for field in ("id", "prompt", "messages") if field in row}
            rows.append({**asked, **{new: row[field] for new, field in fields.items()}})
        write_rows(folder / f"{name}.jsonl", rows)


def write_iteration(folder: Path, t: int, pairs: list[dict], scored: bool) -> None:
    """A finished iteration: its records, its manifests, its metrics and evaluations."""
    write_records(folder, t, pairs)
    n = len(pairs)
    prompts = {"lists": n + 7, "malformed": 4, "too_short": 3, "prompts": n, "tokens": 50}
    seal(folder / "prompts.jsonl", {**prompts, "use_a_keyword": 0.5})
    answers = {"records": n, "answers": 4, "tokens": 40, "cut_off": 1}
    seal(folder / "base_answers.jsonl", answers, 2.0)
    rewrites = {"drafts": n, "rewrites": 8, "unchanged": 2, "tokens": 30, "cut_off": 0}
    seal(folder / "rewrites.jsonl", rewrites)
    filtered = {"candidates": n + 3, "identical": 1, "valid": n + 2, "pairs": n, "mean_gap": 1.0}
    seal(folder / "pairs.jsonl", {**filtered, "chosen_words": 5.0, "rejected_words": 3.0})
    train(folder / "improver", 4, loss=lambda i: 2 / i)
    train(folder / "policy", 5, loss=lambda i: 0.7 / i, rewards__margins=float)
    # D holds the pairs of all iterations so far
    seal(folder / "policy", {"pairs": t * n, "examples": 3, "steps": 5, "tokens": 300}, 3.0)
    if scored:
        write_rows(folder / "heldout_answers.jsonl", HELDOUT)
        result = {"score": 0.4 + t / 10, "se": 0.02, "words": 9.0}
        for name in ("eval", "eval_improver"):
            (folder / f"{name}.json").write_text(json.dumps(result))
            seal(folder / f"{name}.json", result, 0.5)


def write_plugin(folder: Path, note: str) -> str:
    """An evaluation of the user's own; returns its name for --evaluate."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"plugin_{folder.parent.name}.py"
    path.write_text(f"NOTE = {note!r}\ndef evaluate(*arguments): ...\n")
    return f"{path}:evaluate"


def make_run(out: Path, pairs: list[list[dict]], scored: bool = True, **changes) -> Path:
    """A finished run directory with these pairs by iteration."""
    seeds = [{"prompt": f"Seed {i} red?", "response": "r"} for i in range(3)]
    write_rows(out / "seeds.jsonl", seeds)
    if scored:
        changes["evaluate"] = write_plugin(out, "What M_0 says.")
        changes["heldout"] = out / "heldout.jsonl"
        write_rows(out / "iter0" / "heldout_answers.jsonl", HELDOUT)
        result = {"score": 0.4, "se": 0.02, "words": 9.0}
        (out / "iter0" / "eval.json").write_text(json.dumps(result))
    given = {"model": Checkpoint("models/zero"), "seeds": Path("gone"), "iters": len(pairs)}
    changes = {**given, **changes}
    o = replace(parse_options(loop.Options, []), out=out, **changes)
    (out / "config.json").write_text(json.dumps(as_dict(o)))
    (out / "changed.json").write_text(json.dumps(report.changed(o)))
    train(out / "generator", 3, loss=lambda i: 3 / i)
    seal(out / "generator", {"seeds": 3, "steps": 3, "tokens": 100}, 4.0)
    for t, some in enumerate(pairs, 1):
        write_iteration(out / f"iter{t}", t, some, scored)
    return out


def make_page(tmp_path: Path, pairs: list[list[dict]], **changes) -> Path:
    """The page of a run by hand."""
    out = make_run(tmp_path / "run", pairs, **changes)
    report.report(out)
    return out / "report.html"


def blocks_of(page: Path) -> tuple[dict, list]:
    """What the page's script elements hold, by Python's JSON: the data, and all texts of pairs."""
    element = r'<script type="application/json" ([^>]*)>(.*?)</script>'
    found = re.findall(element, page.read_text(), re.DOTALL)
    data = [json.loads(text) for attributes, text in found if attributes == 'id="data"']
    assert len(data) == 1
    blocks = [json.loads(text) for attributes, text in found if attributes == 'class="pairs"']
    return data[0], [row for block in blocks for row in block]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two iterations of three pairs, evaluated."""
    pairs = [[pair(t, k) for k in range(3)] for t in (1, 2)]
    out = make_run(tmp_path_factory.mktemp("two") / "run", pairs)
    report.report(out)
    return out


# ------------------------------------------------------------------------------- what is collected


def test_report_still_prints_and_returns_the_summary(two, capsys):
    result = report.report(two)
    assert result["scores"] == [0.4, 0.5, pytest.approx(0.6)]
    assert result["pairs"] == [3, 3]
    assert result["tokens"] == 100 + 2 * (50 + 40 + 30 + 60 * 9)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"iterations of {two}"
    assert lines[2].split()[:3] == ["t", "lists", "prompts"]
    row = dict(zip(re.split(r"\s{2,}", lines[2].strip()), lines[4].split(), strict=True))
    wanted = {"t": "2", "D": "6", "answers": "2", "improver": "3", "rewrites": "2", "policy": "3"}
    wanted |= {"seconds: prompts": "1", "eval": "1"}
    assert {name: row[name] for name in wanted} == wanted
    assert "What M_0 says." in lines
    assert (two / "scores.svg").is_file()


def test_the_page_holds_what_the_files_say(two):
    data, _ = blocks_of(two / "report.html")
    assert (data["run"], data["T"], data["seeds"], data["processes"]) == ("run", 2, 3, 2)
    assert data["config"] == json.loads((two / "config.json").read_text())
    assert [e["name"] for e in data["evaluations"]] == ["M_0", "R_1", "M_1", "R_2", "M_2"]
    assert data["evaluations"][4] == {"name": "M_2", "score": 0.6, "se": 0.02, "words": 9.0}
    assert data["note"] == "What M_0 says."
    prompts = {"total": 10, "kept": 3, "dropped": {"malformed": 4, "too_short": 3}}
    assert data["yields"]["prompts"][0] == prompts
    pairs = {"total": 6, "kept": 3, "dropped": {"identical": 1, "surplus": 2}}
    assert data["yields"]["pairs"][1] == pairs
    assert data["shares"] == {
        "prompts that use one of their keywords": [0.5, 0.5],
        "answers of M_0 cut off": [0.25, 0.25],
        "rewrites that leave the draft as it was": [0.25, 0.25],
        "rewrites cut off at the token limit": [0, 0],
    }
    stages = [("generator", 0, 3), ("improver", 1, 4), ("improver", 2, 4)]
    stages += [("policy", 1, 5), ("policy", 2, 5)]
    found = [(c["stage"], c["t"], len(c["columns"]["step"])) for c in data["curves"]]
    assert found == stages
    assert all(c["width"] == 1 for c in data["curves"])
    margins = [c["columns"]["rewards/margins"] for c in data["curves"] if c["stage"] == "policy"]
    assert margins == [[1, 2, 3, 4, 5]] * 2


def test_the_page_holds_all_pairs(two):
    data, texts = blocks_of(two / "report.html")
    assert data["pairs"] == {
        "t": [1, 1, 1, 2, 2, 2],
        "score_chosen": [-1, -0.9, -0.8] * 2,
        "score_rejected": [-2] * 6,
        "chosen": [5] * 6,
        "rejected": [3] * 6,
        "draft": [3] * 6,
    }
    asked = ["id1-1", "Question 1 of iteration 1?", ["red", "key1"]]
    assert texts[1] == [*asked, 0, "a much better answer 1", "first answer 1", 0]
    asked = ["id2-2", "Question 2 of iteration 2?", ["red", "key2"]]
    answers = ["second answer 2", "a much better answer 2", "first answer 2"]
    assert texts[5] == [*asked, *answers, 0]


def test_scores_are_drawn_in_a_row_for_each_model():
    results = {
        "M_0": {"score": 0.25, "se": 0.05},
        "R_1": {"words": 3.0},
        "M_1": {"score": 0.5},
        "one shot": {"score": 0.7, "se": 0.0},
    }
    root = ElementTree.fromstring(report.score_chart(results))
    svg = "{http://www.w3.org/2000/svg}"
    texts = [element.text for element in root.iter(f"{svg}text")]
    assert texts[1:] == ["M_0", "0.250", "M_1", "0.500", "one shot", "0.700"]
    x = [float(element.get("cx")) for element in root.iter(f"{svg}circle")]
    assert x == pytest.approx([160 + 360 * share / 50 for share in (5, 30, 50)], abs=0.1)
    first = next(root.iter(f"{svg}path")).get("d")
    assert first == "M160.0 40H232.0"


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, []),
        (1, [2]),
        (2, [1, 3]),
        (4, [0, 1, 2, 3]),
        (9, [0, 1, 2, 3]),
    ],
)
def test_examples_are_spread_evenly(tmp_path, capsys, count, shown):
    rows = []
    for i in range(4):
        rows.append({"prompt": f"Question {i}", "response": "One\ntwo"})
    write_rows(tmp_path / "iter0/heldout_answers.jsonl", rows)
    report.show_examples(tmp_path, 0, count)
    out = capsys.readouterr().out
    assert re.findall(r"Question (\d)", out) == [str(i) for i in shown]
    assert out.count(f"  M_0:   One\n{' ' * 9}two\n") == len(shown)


def test_options_that_differ_are_listed_with_their_help(tmp_path):
    def rows(*flags: str) -> dict:
        o = parse_options(loop.Options, [*flags, "--out", "runs/synpo"])
        return {row[0]: row[1:] for row in report.changed(o)}

    found = rows("--iters", "7", "--policy.beta", "0.25")
    assert found["iters"] == [7, 4, "T"]
    assert found["policy.beta"] == [0.25, 0.1, "parameter of loss dpo"]
    assert len(found) == 2
    assert rows("--dtype", "float32")["dtype"][:2] == ["float32", "bfloat16"]
    # a loss is compared with its own defaults
    found = rows("--policy.loss", "simpo", "--policy.gamma", "2", "--policy.beta", "2")
    assert found["policy.loss"][:2] == ["simpo", "dpo"]
    assert found["policy.gamma"][:2] == [2.0, 1.6]
    assert len(found) == 2
    assert rows() == {}

    # the page lists what the run recorded; an older run has no record
    page = make_page(tmp_path, [[pair(1, 0)]], show=2)
    recorded = json.loads((page.parent / "changed.json").read_text())
    assert ["show", 2, 3, "examples to print at the end"] in recorded
    assert blocks_of(page)[0]["options"] == recorded
    (page.parent / "changed.json").unlink()
    report.report(page.parent)
    assert blocks_of(page)[0]["options"] == []


def test_examples_have_the_answers_of_all_models(tmp_path, capsys):
    rows = [{"prompt": "Why?", "response": "Because"}, {"prompt": "How?", "response": "So"}]
    for t, text in enumerate(("first", "second", "third")):
        answers = [{**row, "response": f"{row['response']} {text}"} for row in rows]
        write_rows(tmp_path / f"iter{t}" / "heldout_answers.jsonl", answers)
    report.show_examples(tmp_path, 2, 2)
    assert capsys.readouterr().out.splitlines() == [
        "",
        "prompt:  Why?",
        "  M_0:   Because first",
        "  M_1:   Because second",
        "  M_2:   Because third",
        "",
        "prompt:  How?",
        "  M_0:   So first",
        "  M_1:   So second",
        "  M_2:   So third",
    ]
    # while the run iterates: one line each
    long = [{"prompt": "a\nb " + "c" * 90, "response": "d\n\ne"}]
    report.show_answers(write_rows(tmp_path / "long.jsonl", long), 3)
    assert capsys.readouterr().out == f"    a b {'c' * 66}  ->  d e\n"


def test_differences_to_the_last_model_are_paired_by_prompt(tmp_path, capsys):
    """By hand: M_2 - M_0 is 0.3 and 0.1, M_2 - M_1 is 0.1 twice; rewrites have no `scores`."""
    out = make_run(tmp_path / "run", [[pair(1, 0)], [pair(2, 0)]])
    for t, scores in enumerate(([0.2, 0.6], [0.4, 0.6], [0.5, 0.7])):
        result = {"score": sum(scores) / 2, "se": 0.02, "words": 9.0, "scores": scores}
        (out / f"iter{t}" / "eval.json").write_text(json.dumps(result))
    report.report(out)
    text = capsys.readouterr().out
    lines = text[text.index("\nheld-out prompts, by") :].splitlines()[2:]
    head, rows = lines[0].split(), {}
    for line in lines[1:6]:
        name, *cells = line.split()
        rows[name] = cells
    assert head == ["score", "se", "words", "M_2", "-", "se"]
    assert [*rows] == ["M_0", "R_1", "M_1", "R_2", "M_2"]
    assert rows["M_0"] == ["0.400", "0.020", "9.000", "0.200", "0.100"]
    assert rows["M_1"][3:] == ["0.100", "0.000"]
    assert rows["M_2"][3:] == ["0.000", "0.000"]
    assert rows["R_1"][3:] == ["0.100", "-"]
    # the scores of single answers are in no table and not on the page
    assert "0.700" not in text
    data, _ = blocks_of(out / "report.html")
    assert data["evaluations"][0] == {"name": "M_0", "score": 0.4, "se": 0.02, "words": 9.0}


def test_scratch_of_unfinished_stages_is_ignored(two, tmp_path):
    """A stage that was stopped leaves its parts in OUT.partial/, which may look like results."""
    out = shutil.copytree(two, tmp_path / "run")
    before = [report.report(out), (out / "report.html").read_text()]
    for name in ("iter1/policy", "iter2/answers.jsonl", "iter1/eval/ifeval", "controls/seed_sft"):
        scratch = out / f"{name}.partial"
        train(scratch, 9, loss=float)
        seal(scratch / "part.jsonl", {"tokens": 10**9}, 99.0)
        (scratch / "result.json").write_text('{"score": 1.0}')
    assert [report.report(out), (out / "report.html").read_text()] == before
    assert "partial" not in (out / "metrics.jsonl").read_text()


def test_metrics_name_what_each_stage_read(two):
    lines = [json.loads(line) for line in (two / "metrics.jsonl").read_text().splitlines()]
    *lines, first, second = lines
    assert [first["stage"], second["stage"]] == ["iter1/diagnostics", "iter2/diagnostics"]
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    assert all(line["paths"] == {"model": "M"} for line in lines)
    names = [line["stage"] for line in lines]
    assert names.count("iter1/policy") == 1
    assert "generator" in names
    assert len(names) == 17


def test_long_curves_are_means_over_equally_many_steps(tmp_path):
    odd = {3: float("nan"), 10: None}  # MFU is null where it could not be measured
    train(tmp_path / "policy", 1001, loss=float, odd=lambda i: odd.get(i, 1.0))
    curve = report.curves(tmp_path / "policy", 4)
    columns = curve["columns"]
    assert curve["t"] == 4
    assert curve["width"] == 7
    assert len(columns["loss"]) == 143 == len(columns["step"])
    assert columns["loss"][:2] == [4, 11]
    assert columns["loss"][-1] == pytest.approx(sum(range(995, 1002)) / 7)
    assert report.plain(columns["odd"][:3]) == [None, None, 1], "JSON has no NaN"
    manifest_path(tmp_path / "policy").unlink()
    assert report.curves(tmp_path / "policy", 4) is None, "unfinished"


@pytest.mark.parametrize("damaged", ["", '{"st', "[]\n", '{"loss": "high"}\n', "\0\n"])
def test_damaged_metrics_do_not_end_the_report(tmp_path, capsys, damaged):
    run = make_run(tmp_path / "run", [[pair(1, 1)]])
    metrics = run / "iter1" / "policy" / "metrics.jsonl"
    metrics.write_text(damaged)
    report.report(run)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "no curve of" in line]
    assert str(metrics.parent) in line
    metrics.unlink()
    report.report(run)
    assert f"no curve of {metrics.parent}" in capsys.readouterr().out


def test_times_are_summed_by_iteration_and_kind():
    rows = report.times(
        [
            {"stage": "base", "seconds": 9.0, "steps": 3, "tokens": 7},
            {"stage": "generator", "seconds": 1.0, "steps": 1, "tokens": 5},
            {"stage": "iter0/eval", "seconds": 1.0},
            {"stage": "iter1/answers", "seconds": 2.0, "tokens": 10},
            {"stage": "iter1/base_answers", "seconds": 3.0, "tokens": 20},
            {"stage": "iter1/policy", "seconds": 4.0, "steps": 2},
            {"stage": "iter2/eval/alpaca/answers", "seconds": 5.0},
            {"stage": "controls/one_shot/iter1/policy", "seconds": 6.0},
            {"stage": "controls/seed_sft", "seconds": 7.0, "steps": 1},
            {"stage": "controls/seed_sft_eval", "seconds": 0.5},
            {"stage": "diversity/map", "seconds": 0.25},
        ]
    )
    assert {(row["where"], row["what"]): (row["seconds"], row["tokens"]) for row in rows} == {
        ("once", "training"): (9, 7),
        ("once", "generator"): (1, 5),
        ("once", "other"): (0.25, 0),
        ("iter0", "eval"): (1, 0),
        ("iter1", "answers"): (5, 30),
        ("iter1", "policy"): (4, 0),
        ("iter2", "benchmarks"): (5, 0),
        ("controls", "policy"): (6, 0),
        ("controls", "training"): (7, 0),
        ("controls", "other"): (0.5, 0),
    }


def test_a_benchmark_in_a_run_is_counted_once(tmp_path):
    """The stage around it took the time of its parts, too.

    What was measured of a model outside a run has no such stage.
    """
    folder = tmp_path / "iter1/eval/ifeval"
    seal(folder / "answers.jsonl", {"tokens": 100}, 4.0)
    seal(folder / "scores.jsonl", {}, 1.0)
    seal(folder / "result.json", {"tokens": 30}, 6.0)
    seal(tmp_path / "iter1/policy/eval/ifeval/answers.jsonl", {"tokens": 50}, 3.0)
    seal(tmp_path / "iter1/answers.jsonl", {"tokens": 7}, 2.0)
    stages = report.finished_stages(tmp_path)
    names = [line["stage"].rpartition("/")[2] for line in stages]
    assert names == ["scores", "answers", "answers", "answers", "result"]
    rows = {row["what"]: (row["seconds"], row["tokens"]) for row in report.times(stages)}
    assert rows == {"benchmarks": (9, 150), "answers": (2, 7)}


def test_a_metric_may_be_called_name(two, tmp_path):
    out = shutil.copytree(two, tmp_path / "run")
    (out / "iter0/eval.json").write_text(json.dumps({"score": 0.4, "name": 3.0}))
    report.report(out)
    assert blocks_of(out / "report.html")[0]["evaluations"][0]["name"] == "M_0"


def test_a_training_without_a_step_has_no_curve(tmp_path):
    train(tmp_path / "policy", 0, loss=float)
    assert report.curves(tmp_path / "policy") is None


def test_benchmarks_are_read_where_they_are(tmp_path):
    assert report.benchmarks(tmp_path, 2) == {}
    for t, name, result in (
        (0, "b", {"score": 1, "se": 0.5, "text": "no number"}),
        (2, "b", {"score": 2}),
        (1, "a", {"x": 3.5}),
        (3, "c", {"score": 1}),
    ):
        path = tmp_path / f"iter{t}" / "eval" / name / "result.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(result))
    assert report.benchmarks(tmp_path, 2) == {
        "a": [None, {"x": 3.5}, None],
        "b": [{"score": 1, "se": 0.5}, None, {"score": 2}],
    }


def test_ifeval_is_compared_with_the_first_model(two, tmp_path, capsys):
    out = shutil.copytree(two, tmp_path / "run")
    assert report.ifeval_against_first(out, 2) == []
    for t, followed in ((0, [True, False, False]), (2, [True, True, True])):
        rows = []
        for i, one in enumerate(followed):
            row = {"id": str(i), "instructions": ["a:b"], "guarded": False}
            row |= dict.fromkeys(("prompt_level_strict_acc", "prompt_level_loose_acc"), one)
            row |= {key: [one] for key in ("inst_level_strict_acc", "inst_level_loose_acc")}
            rows.append(row)
        path = out / f"iter{t}" / "eval" / "ifeval" / "scores.jsonl"
        path.parent.mkdir(parents=True)
        write_rows(path, rows)
    report.report(out)
    shown = blocks_of(out / "report.html")[0]["against"]
    assert [row["IFEval"] for row in shown] == list(report.ifeval.METRICS)
    assert {row["model"] for row in shown} == {"M_2 against M_0"}
    assert (shown[0]["won"], shown[0]["lost"], shown[0]["p"]) == (2, 0, 0.5)
    assert "M_2 against M_0" in capsys.readouterr().out


def test_texts_are_on_the_page_once(tmp_path):
    """The draft of iteration 1 is M_0's answer and rejected; later the draft is another text.

    Missing files are no error.
    """
    one = {**pair(2, 0), "draft": "DRAFT", "base": "BASE", "rejected": "REJECTED"}
    out = make_run(tmp_path / "run", [[pair(1, 0)], [one]])
    folders = [out / "iter1", out / "iter2"]
    [(numbers, first), (_, second)] = report.pair_rows(folders)
    assert numbers == [1, -1.0, -2.0, 5, 3, 3]
    assert (first[3], first[5], first[6]) == (0, "first answer 0", 0)
    assert second[3:] == ["DRAFT", "a much better answer 0", "REJECTED", "BASE"]
    report.report(out)
    text = (out / "report.html").read_text()
    for word in ("DRAFT", "BASE", "REJECTED", "first answer 0"):
        assert text.count(f'"{word}"') == 1
    for name in ("prompts", "rewrites", "base_answers"):
        (out / "iter2" / f"{name}.jsonl").unlink()
    [_, (numbers, texts)] = report.pair_rows(folders)
    assert texts[2:4] == [None, None]
    assert texts[6] is None
    assert numbers[5] is None
    assert list(report.pair_rows([])) == []


def test_scores_may_be_missing_and_prompts_may_be_conversations(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    row = {**pair(1, 0), "score_chosen": None, "score_rejected": None, "messages": turns}
    del row["prompt"]
    data, texts = blocks_of(make_page(tmp_path, [[row]]))
    assert data["pairs"]["score_chosen"] == [None]
    assert texts[0][1] == turns


def test_no_text_can_leave_its_script_element():
    value = {EVIL: [EVIL, "<", "\ud800 alone", HEBREW, float("inf")], "x": float("-inf")}
    text = report.script(value, 'id="data"')
    inside = text.removeprefix('<script type="application/json" id="data">').removesuffix(
        "</script>\n"
    )
    assert "<" not in inside
    assert "\u2028" not in inside
    assert "\u2029" not in inside
    inside.encode()  # no lone surrogate, which no file could hold
    assert json.loads(inside) == {EVIL: [EVIL, "<", "\ud800 alone", HEBREW, None], "x": None}


def test_the_page_is_written_whole_and_needs_nothing_else(two):
    text = (two / "report.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#|data:,)""", text)
    for word in ("@import", "url(", "innerHTML", "insertAdjacentHTML", "document.write"):
        assert word not in text
    assert "default-src 'none'" in text
    assert not list(two.glob("*.tmp"))


def test_a_kill_leaves_the_old_page_whole(tmp_path, monkeypatch):
    """Killed when all is written but the last rename: what was there is there still."""
    old = make_page(tmp_path, [[pair(1, 0)]])
    old.write_text("old")
    replace = os.replace

    def kill(source, target):
        if Path(target) == old:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        report.report(old.parent)
    assert old.read_text() == "old"


def test_an_interrupted_run_counts_its_finished_iterations(tmp_path, capsys):
    out = make_run(tmp_path / "run", [[pair(t, 0)] for t in (1, 2)])
    assert report.report(out)["pairs"] == [1, 1]
    (out / "iter2" / "eval.json").unlink()  # the policy is there, its evaluation is not
    assert report.report(out)["pairs"] == [1]
    assert len(blocks_of(out / "report.html")[1]) == 1
    (out / "iter1" / "eval.json").unlink()
    capsys.readouterr()
    result = report.report(out)
    assert result["pairs"] == []
    assert result["scores"] == [0.4]
    assert "none is finished" in capsys.readouterr().out
    data, texts = blocks_of(out / "report.html")
    assert data["T"] == 0
    assert texts == []
    assert data["pairs"] == {}


@pytest.mark.slow
def test_the_command_says_what_it_wants(tmp_path):
    usage = "python -m eval.report"
    missing = f"error: {tmp_path}/config.json: no such file"
    for arguments, said in (([], usage), (["--help"], usage), ([tmp_path], missing)):
        command = [sys.executable, "-m", "eval.report", *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def test_an_evaluation_says_what_its_numbers_show(tmp_path):
    """A module's NOTE goes to the page; that of the built-in evaluation without --evaluate."""
    assert report.note_of("") == heldout.NOTE
    assert report.note_of("demo/facts.py:evaluate").startswith("\nShown: one step")
    (tmp_path / "silent.py").write_text("def evaluate(*arguments): ...\n")
    assert report.note_of(f"{tmp_path}/silent.py:evaluate") == ""
    page = make_page(tmp_path, [[pair(1, 0)]])
    config = json.loads((page.parent / "config.json").read_text())
    (page.parent / "config.json").write_text(json.dumps({**config, "evaluate": ""}))
    report.report(page.parent)
    assert blocks_of(page)[0]["note"] == heldout.NOTE


@pytest.mark.parametrize("evaluate", ["heldout", "gone.py:evaluate", "broken.py:evaluate"])
def test_a_run_whose_evaluation_is_gone_is_reported_all_the_same(two, tmp_path, evaluate):
    if evaluate.startswith("broken"):
        (tmp_path / "broken.py").write_text("import no_such_package")
        evaluate = f"{tmp_path}/{evaluate}"
    out = shutil.copytree(two, tmp_path / "run")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "evaluate": evaluate}))
    assert report.report(out)["pairs"] == report.report(two)["pairs"]


# ------------------------------------------------------------------------------------ in a browser

WIDE = (1280, 900)
NARROW = (360, 740)


@pytest.fixture(scope="module")
def chrome():
    """One headless chromium for all tests, or a skip.

    Selenium is given the driver, or it would look for one elsewhere.
    """
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs the package selenium")
    names = ("chromium", "chromium-browser", "google-chrome")
    binary = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


class Page:
    """A page in the browser, and what its tests ask of it."""

    def __init__(self, chrome, path: Path, size: tuple[int, int] = WIDE, scheme: str = "light"):
        self.chrome = chrome
        for kind in ("browser", "performance"):
            chrome.get_log(kind)  # empties it
        width, height = size
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        self.emulate("", scheme)
        chrome.get(path.as_uri())
        self.settle()

    def emulate(self, media: str, scheme: str) -> None:
        """Show the page on a screen ("") or in print, light or dark."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        told = {"media": media, "features": features}
        self.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", told)

    def js(self, code: str, *arguments):
        return self.chrome.execute_script("return " + code, *arguments)

    def settle(self) -> None:
        """Until charts are drawn and the search is done."""
        self.chrome.set_script_timeout(60)
        self.chrome.execute_async_script("""
            const done = arguments[0];
            const wait = () => document.querySelector("[aria-busy=true]") ? setTimeout(wait, 5)
              : requestAnimationFrame(() => requestAnimationFrame(() => done()));
            wait();""")

    def text(self, selector: str) -> str | None:
        return self.js("document.querySelector(arguments[0])?.textContent", selector)

    def texts(self, selector: str) -> list[str]:
        return self.js(
            "[...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector
        )

    def count(self, selector: str) -> int:
        return self.js("document.querySelectorAll(arguments[0]).length", selector)

    def choose(self, label: str, value: str) -> None:
        self.js(
            """(select => {
                select.value = arguments[1];
                select.dispatchEvent(new Event("change"));
            })(document.querySelector(`select[aria-label="${arguments[0]}"]`))""",
            label,
            value,
        )
        self.settle()

    def press(self, *keys: str) -> None:
        """Keys to whatever has the focus, as a person presses them."""
        from selenium.webdriver.common.action_chains import ActionChains

        for key in keys:
            ActionChains(self.chrome).send_keys(key).perform()
        self.settle()

    def search(self, text: str) -> list[str]:
        """The rows that are shown then."""
        self.js(
            """(input => {
                input.value = arguments[0];
                input.dispatchEvent(new Event("input"));
            })(document.querySelector("input[type=search]"))""",
            text,
        )
        self.settle()
        return self.texts(".row span")

    def troubles(self) -> list:
        """Errors on the console, requests to anywhere, and a sideways scroll."""
        logged = self.chrome.get_log("browser")
        said = [e["message"] for e in logged if e["level"] in ("SEVERE", "WARNING")]
        events = [json.loads(e["message"])["message"] for e in self.chrome.get_log("performance")]
        sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        urls = [one["request"]["url"] for one in sent]
        wide = self.js("""(({scrollWidth, clientWidth}) => scrollWidth <= clientWidth ? []
            : [...document.querySelectorAll("body *")]
              .filter(e => e.getBoundingClientRect().right > innerWidth).slice(0, 3)
              .map(e => "scrolls sideways: " + e.outerHTML.slice(0, 80))
            )(document.documentElement)""")
        return said + [url for url in urls if not url.startswith(("file:", "data:"))] + wide


KEY = SimpleNamespace(
    enter="\ue007", escape="\ue00c", tab="\ue004", down="\ue015", up="\ue013", right="\ue014"
)


@pytest.fixture
def evil(tmp_path) -> Path:
    """A run whose every text is hostile."""
    rows = []
    for t in (1, 2):
        some = []
        for k, text in enumerate((EVIL, HEBREW, LONG)):
            texts = {"base": "base " + text, "draft": "draft " + text, "rejected": "no " + text}
            texts |= {"prompt": f"{text} {t}", "keywords": [text, text[:40]]}
            texts |= {"chosen": text + " chosen", "id": f"{t} {k} {text[:60]}"}
            some.append({**pair(t, k), **texts})
        earlier = {"role": EVIL, "content": f"{LONG} earlier"}
        turns = [earlier, {"role": "user", "content": EVIL}]
        some.append({**pair(t, 9), "messages": turns})
        del some[-1]["prompt"]
        rows.append(some)
    out = make_run(tmp_path / "run <img src=x onerror=hacked=1>", rows)

    # evaluations, benchmarks
    result = json.dumps({"score": 0.5, "se": 0.1, EVIL: 1.0, LONG: 2.0})
    for t in (0, 1, 2):
        (out / f"iter{t}" / "eval" / "x <b>").mkdir(parents=True)
        (out / f"iter{t}" / "eval" / "x <b>" / "result.json").write_text(result)
        (out / f"iter{t}" / "eval.json").write_text(result)

    # options, the note, a reason for dropping prompts
    config = json.loads((out / "config.json").read_text())
    config["model"] = EVIL
    config["policy"]["loss"] = EVIL
    config["pairs"]["scorer"] = LONG
    config["evaluate"] = write_plugin(tmp_path / "evil" / "note", EVIL)
    (out / "config.json").write_text(json.dumps(config))
    (out / "changed.json").write_text(json.dumps([[EVIL, EVIL, None, EVIL], ["x", "", 1, LONG]]))
    seal(out / "iter1" / "prompts.jsonl", {"lists": 9, EVIL: 3, "prompts": 4, "tokens": 5})
    report.report(out)
    return out / "report.html"


@pytest.mark.browser
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_hostile_texts_are_shown_as_texts(chrome, evil, size):
    page = Page(chrome, evil, size)
    page.js("document.querySelectorAll('details').forEach(d => d.open = true)")
    shown = page.texts(".row span")
    assert shown[:3] == [(text + " 1")[:300] for text in (EVIL, HEBREW, LONG)]
    assert shown[3] == EVIL
    for k, text in enumerate((EVIL, HEBREW, LONG)):
        page.js("document.querySelectorAll('.row')[arguments[0]].click()", k)
        if not page.count("#detail"):
            page.js("document.querySelectorAll('.row')[arguments[0]].click()", k)
        assert page.text(".asked") == f"{text} 1"
        assert page.texts(".chip") == [text, text[:40]]
        shown = ["draft " + text, text + " chosen", "no " + text, "base " + text]
        assert page.texts(".texts .words") == shown
        assert not page.troubles()
    page.js("document.querySelectorAll('.row')[3].click()")
    assert page.texts("#detail > .words") == [f"{LONG} earlier", EVIL]
    assert page.texts("#detail > h4") == [EVIL, "user"]
    assert page.js("window.hacked ?? null") is None
    assert page.count("img, b b, iframe, object") == 0
    assert page.count("script") == 3, "data, one block, the page's own"
    for selector in ("#scores thead", "#yields", ".options"):
        assert EVIL in page.text(selector), selector
    assert EVIL.strip() in page.text(".note")
    assert "x <b>" in page.text("#benchmarks")
    assert EVIL.split("/")[-1] in page.text("#facts")
    assert "(empty)" in page.text(".options")
    assert page.text("h1") == "Run “run <img src=x onerror=hacked=1>”"
    assert page.search(EVIL.split(" ")[0]) == [(EVIL + " 1")[:300], EVIL, EVIL + " 2", EVIL]
    assert not page.troubles()


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """40,000 pairs in two iterations."""
    pairs = []
    for t in (1, 2):
        scores = [(k * 7919 % 20_000) / 1e4 for k in range(20_000)]
        pairs.append([{**pair(t, k), "score_chosen": score} for k, score in enumerate(scores)])
    return make_page(tmp_path_factory.mktemp("many"), pairs)


@pytest.mark.slow
@pytest.mark.browser
def test_forty_thousand_pairs_can_be_searched_and_sorted(chrome, many):
    page = Page(chrome, many)
    assert page.text("[role=status]") == "1\u201340 of 40,000"
    assert page.count(".row") == 40
    elements = page.count("*")
    assert elements < 6000
    assert page.js("parsed.filter(Boolean).length") == 1, "of 313 blocks"
    both = [f"Question 13579 of iteration {t}?" for t in (1, 2)]
    assert page.search("key13579") == both
    assert page.search("13579 second") == both[1:], "all words, each in any of its texts"
    assert page.search('"better answer 19999"') == [
        f"Question 19999 of iteration {t}?" for t in (1, 2)
    ]
    assert page.search('"answer better"') == []
    assert page.text(".list") == "No pair matches."
    assert page.count("#detail") == 0
    page.choose("Iteration", "2")
    assert page.search("ID2-4711") == ["Question 4711 of iteration 2?"], "whatever the case"
    page.search("")
    page.choose("Order", "gap -")
    best = next(k for k in range(20_000) if k * 7919 % 20_000 == 19_999)
    assert page.texts(".row span")[0] == f"Question {best} of iteration 2?"
    page.choose("Order", "gap +")
    assert page.texts(".row span")[0] == "Question 0 of iteration 2?"
    for _ in range(3):
        page.js("document.querySelector('.pages button:last-child').click()")
    assert page.text("[role=status]") == "121\u2013160 of 20,000"
    assert page.count(".row") == 40
    assert page.count("*") < elements + 200
    assert not page.troubles()


@pytest.mark.slow
@pytest.mark.browser
def test_a_newer_search_ends_an_older_one(chrome, many):
    """The older one has more to go through, and would write over the newer one's rows."""
    page = Page(chrome, many)
    page.js("""[["answer", ""], ["key13579", "2"]].forEach(([text, iteration]) => {
        document.querySelector("input[type=search]").value = text;
        const select = document.querySelector("select[aria-label=Iteration]");
        select.value = iteration;
        select.dispatchEvent(new Event("change"));
    })""")
    page.settle()
    page.chrome.execute_async_script("setTimeout(arguments[0], 2000)")
    assert page.texts(".row span") == ["Question 13579 of iteration 2?"]


@pytest.fixture(scope="module")
def fifty(tmp_path_factory):
    """Fifty pairs: more than a page of the list."""
    return make_page(tmp_path_factory.mktemp("fifty"), [[pair(1, k) for k in range(50)]])


def focused(page: Page) -> str | None:
    """The row that has the focus, by its prompt; of other elements their type or tag."""
    return page.js("""(e => e.className === "row" ? e.querySelector("span").textContent
        : e.type ?? e.tagName)(document.activeElement)""")


def asked(k: int) -> str:
    return f"Question {k} of iteration 1?"


@pytest.mark.browser
def test_the_keyboard_is_enough(chrome, fifty):
    page = Page(chrome, fifty)
    assert page.text(".asked") == asked(0), "where there is room, a pair is open"
    page.press("/")
    assert focused(page) == "search"
    assert page.js("document.activeElement.value") == ""
    page.press("k", "e", "y", "4", KEY.enter)
    assert focused(page) == asked(4) == page.text(".asked")
    assert page.count(".row") == 11
    page.press("j")
    assert focused(page) == asked(40) == page.text(".asked")
    page.press(KEY.down, KEY.down, KEY.up, "k")
    assert focused(page) == asked(40) == page.text(".asked")
    page.press("k", "k", "k")
    assert focused(page) == asked(4), "the first is the end"
    assert page.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.press("/")
    page.search("")
    page.press(KEY.enter, *"j" * 40)
    assert page.text("[role=status]") == "41\u201350 of 50"
    assert focused(page) == asked(40) == page.text(".asked")
    page.press("k")
    assert page.text("[role=status]") == "1\u201340 of 50"
    assert focused(page) == asked(39) == page.text(".asked")
    page.press("k", KEY.tab)
    assert focused(page) == "submit"
    assert page.text(":focus") == "Next \u203a", "the list is one stop"
    assert not page.troubles()


@pytest.mark.browser
def test_where_there_is_no_room_a_pair_opens_below_its_row(chrome, fifty):
    page = Page(chrome, fifty, NARROW)
    assert page.count("#detail") == 0
    assert page.count(".row") == 12
    page.press("j", KEY.enter)
    assert (
        page.text("li:has(#detail) .row span")
        == page.text(".asked")
        == "Question 1 of iteration 1?"
    )
    assert page.js("document.activeElement.getAttribute('aria-expanded')") == "true"
    page.press("j")
    assert page.text("li:has(#detail) .row span") == "Question 2 of iteration 1?"
    page.press(KEY.escape)
    assert page.count("#detail") == 0
    assert focused(page) == "Question 2 of iteration 1?"
    page.press(KEY.enter, KEY.enter)
    assert page.count("#detail") == 0
    assert not page.troubles()
    boxes = page.js("""[...document.querySelectorAll("figure, .list, .tools > *")]
        .map(e => e.getBoundingClientRect().right)""")
    assert len(boxes) > 10
    assert max(boxes) <= 360


@pytest.mark.browser
def test_tab_reaches_everything_in_the_order_of_the_page(chrome, two):
    page = Page(chrome, two / "report.html")
    places = []
    for _ in range(60):
        page.chrome.switch_to.active_element.send_keys(KEY.tab)
        if page.js("document.activeElement === document.body"):
            break
        places.append(
            page.js("""(e => [e.closest("section, nav, header")?.id || e.tagName, e.tagName,
            e.getAttribute("aria-label") ?? e.textContent])(document.activeElement)""")
        )
    assert places[0][2] == "Skip to the pairs"
    assert [p for p in places if p[1] == "INPUT"]
    names = [place for i, (place, *_) in enumerate(places) if i == 0 or place != places[i - 1][0]]
    sections = ["scores", "pairs", "yields", "training", "time"]
    assert [name for name in names if name in sections] == sections
    assert all(name.strip() for *_, name in places), "each says what it is"


@pytest.mark.browser
def test_charts_are_read_by_arrow_keys_and_pointer(chrome, two):
    page = Page(chrome, two / "report.html")
    tip = "#scores .tip"
    svg = "#scores svg"
    assert page.count("#scores circle.fill") == 5, "points"
    assert page.count("#scores path.line") == 2 + 5, "lines and intervals"
    assert page.js("document.querySelector(arguments[0]).hidden", tip)
    page.js("document.querySelector(arguments[0]).focus()", svg)
    said = []
    for _ in range(5):
        page.press(KEY.right)
        said.append(page.text(tip))
    scores = {"M₀": "0.400", "M₁": "0.500", "M₂": "0.600", "R₁": "0.500", "R₂": "0.600"}
    assert said == [f"{name}: {score} ± 0.039" for name, score in scores.items()]
    label = page.js("document.querySelector(arguments[0]).ariaLabel", svg)
    assert page.text("#live") == said[-1]
    assert all(text in label for text in said)
    page.press(KEY.escape)
    page.js("""(box => document.querySelector("#scores svg").dispatchEvent(
        new PointerEvent("pointermove", {clientX: box.x, clientY: box.y}))
        )(document.querySelector("#scores circle.fill").getBoundingClientRect())""")
    assert page.text(tip) == said[0]
    lines = "#training figure:first-child path"
    assert page.count(lines) == 2
    page.js("document.querySelector('#training .legend button').click()")
    assert page.count(lines) == 1
    assert page.js("document.querySelector('#training .legend button').ariaPressed") == "false"


def lcs(a: list, b: list) -> int:
    """Length of the longest common subsequence, by the textbook."""
    row = [0] * (len(b) + 1)
    for x in a:
        last = row
        row = [0]
        for j, y in enumerate(b):
            row.append(last[j] + 1 if x == y else max(last[j + 1], row[j]))
    return row[-1]


@pytest.mark.browser
def test_differences_are_longest_common_subsequences(chrome, two):
    page = Page(chrome, two / "report.html")
    noise = random.Random(0)
    cases = ["|", "a|", "|b", "a|a", "ab|ba", "xay|a"]
    for _ in range(60):
        sides = ["".join(noise.choices("abcd", k=noise.randrange(9))) for _ in range(2)]
        cases.append("|".join(sides))
    for case in cases:
        a, b = map(list, case.split("|"))
        runs = page.js("difference(arguments[0], arguments[1])", a, b)
        assert ["".join(text for text, _ in side) for side in runs] == ["".join(a), "".join(b)]
        kept = ["".join(text for text, both in side if both) for side in runs]
        assert kept[0] == kept[1]
        assert len(kept[0]) == lcs(a, b)
    words = "One, two's 漢字 ünï—x\n  end."
    parts = ["One", ",", " ", "two's", " ", "漢", "字", " ", "ünï", "—", "x", "\n  ", "end", "."]
    assert page.js("split(arguments[0])", words) == parts
    long = [[str(noise.random()) for _ in range(3000)] for _ in range(2)]
    assert page.js("difference(arguments[0], arguments[1])", *long) is None, "too long to compare"
    runs = [["a b", False], [" ", True], ["  ", False], ["c", True]]
    shown = page.js("marked(arguments[0], 'ins').map(x => x.outerHTML ?? x)", runs)
    assert shown == ["<ins>a b</ins>", " ", "  ", "c"]


@pytest.mark.browser
def test_a_pair_shows_what_its_rewrite_changed(chrome, tmp_path):
    first = "A cat is red."
    one = {**pair(1, 0), "base": first, "draft": first, "rejected": first}
    one["chosen"] = "A cat is a mammal."
    two = {**pair(2, 0), "base": "no", "rejected": "no", "draft": "A dog  barks"}
    two["chosen"] = two["draft"]
    other = {**pair(2, 1), "base": "It is no.", "rejected": "It is no.", "draft": "It is yes."}
    other["chosen"] = "It was yes."
    view = Page(chrome, make_page(tmp_path, [[one], [two, other]]))
    heads = [
        "M₀\u2019s answer: draft, rejected4 words, score -2",
        "R₁\u2019s rewrite: chosen5 words, score -1",
    ]
    assert view.texts(".texts h4") == heads
    assert view.texts("del") == ["red"]
    assert view.texts("ins") == ["a mammal"]
    view.press("j")
    one = "M₁\u2019s answer: draft · R₂\u2019s rewrite: chosen3 words, score -1"
    assert view.texts(".texts h4") == [one, "M₀\u2019s answer: rejected1 word, score -2"]
    assert view.count("ins, del") == 0
    view.press("j")
    assert view.texts(".texts .words") == ["It is yes.", "It was yes.", "It is no."]
    assert (view.texts("del"), view.texts("ins")) == (["is"], ["was"])
    view.choose("Marked differences", "rejected")
    assert (view.texts("del"), view.texts("ins")) == (["is no"], ["was yes"])
    view.choose("Marked differences", "none")
    assert view.count("ins, del") == 0
    assert not view.troubles()


@pytest.mark.browser
def test_a_search_is_marked_in_what_it_found(chrome, fifty):
    page = Page(chrome, fifty)
    assert page.search("BETTER 17")[0] == "Question 17 of iteration 1?"
    found = page.js("[...CSS.highlights.get('found')].map(range => range.toString())")
    assert set(found) == {"better", "17"}
    assert page.search("(") == []
    assert page.search("[7") == []
    assert not page.troubles()


UNSCORED = {"score_chosen": None, "score_rejected": None}
DRAFT = {"rejected": "second answer 0"}
VARIANTS = {
    "one pair, one iteration": {"pairs": [[pair(1, 0)]]},
    "not evaluated": {"pairs": [[pair(1, 0), pair(1, 1)]], "scored": False},
    "no scorer": {"pairs": [[{**pair(1, k), **UNSCORED} for k in range(3)]]},
    "nothing finished": {"pairs": []},
    "nothing finished or evaluated": {"pairs": [], "scored": False},
    "previous rejected": {
        "pairs": [[pair(1, 0)], [{**pair(2, 0), **DRAFT}]],
        "rejected": "previous",
    },
    "equal gaps": {"pairs": [[{**pair(1, k), "score_chosen": 1.0} for k in range(5)]]},
}


@pytest.mark.browser
@pytest.mark.parametrize("name", VARIANTS)
def test_a_page_for_every_run(chrome, tmp_path, name):
    changes = dict(VARIANTS[name])
    pairs = changes.pop("pairs")
    for size in (WIDE, NARROW):
        view = Page(chrome, make_page(tmp_path, pairs, **changes), size)
        text = view.text("body > main")
        assert not view.troubles()
        assert "undefined" not in text
        assert "NaN" not in text
        drawn = view.js("[...document.querySelectorAll('svg')].map(svg => svg.outerHTML).join()")
        assert not re.search("NaN|Infinity|undefined|object", drawn)
        sections = view.js("[...document.querySelectorAll('main > section')].map(s => s.id)")
        T = len(pairs)
        wanted = ["scores"] * changes.get("scored", True) + ["diagnostics"] * bool(T) + ["pairs"]
        wanted += ["yields"] * bool(T) + ["training", "time"]
        assert sections == wanted
        assert view.texts("nav a") == view.texts("h2")
        assert view.count(".row") == sum(map(len, pairs))
        assert view.count("#benchmarks") == 0
    if name == "no scorer":
        assert "no scores" in view.text("#yields")
        assert "gap" not in view.text(".list")
    if name == "previous rejected":
        view.press("j", "j", KEY.enter)
        first, _, third = view.texts(".texts h4")
        assert first.startswith("M₁\u2019s answer: draft, rejected")
        assert third.startswith("M₀\u2019s answer")
    if name.startswith("nothing"):
        assert view.text("#headline") == "No iteration is finished yet."
        assert "No pairs yet" in view.text("#pairs")


def luminance(colour: str) -> float:
    """Relative luminance of rgb(r, g, b), by WCAG 2."""
    parts = [int(v) / 255 for v in re.findall(r"\d+", colour)[:3]]
    linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_from_their_ground(chrome, two, scheme):
    page = Page(chrome, two / "report.html", scheme=scheme)

    def colour(name: str) -> str:
        return page.js(
            """(e => {
                e.style.color = `var(--${arguments[0]})`;
                document.body.append(e);
                const found = getComputedStyle(e).color;
                e.remove();
                return found;
            })(document.createElement("i"))""",
            name,
        )

    assert (luminance(colour("page")) < 0.1) == (scheme == "dark")
    pairs = [
        *product(("ink", "soft"), ("page", "panel", "hover")),
        ("ink", "bar"),
        ("ink", "found"),
    ]
    pairs += [("in-ink", "in"), ("out-ink", "out"), ("M", "panel")]
    for text, ground in pairs:
        dark, bright = sorted(luminance(colour(name)) for name in (text, ground))
        assert (bright + 0.05) / (dark + 0.05) >= 4.5, (text, ground)


@pytest.mark.browser
def test_a_print_leaves_the_controls_out(chrome, fifty):
    page = Page(chrome, fifty, scheme="dark")
    page.emulate("print", "dark")

    def shown(selector: str) -> bool:
        return page.js("document.querySelector(arguments[0]).checkVisibility()", selector)

    assert not any(map(shown, ("nav", ".tools", ".pages")))
    assert all(map(shown, ("h1", "figure", "#detail", "#scores table")))
    ground = page.js("getComputedStyle(document.querySelector('figure')).backgroundColor")
    assert luminance(ground) > 0.9, "paper is white"


def test_an_improvers_score_is_its_own(tmp_path):
    out = make_run(tmp_path / "run", [[pair(1, 0)]])
    rewritten = {"score": 0.45, "words": 9.0}
    (out / "iter1" / "eval_improver.json").write_text(json.dumps(rewritten))
    report.report(out)
    data, _ = blocks_of(out / "report.html")
    scores = [(e["name"], e["score"]) for e in data["evaluations"]]
    assert scores == [("M_0", 0.4), ("R_1", 0.45), ("M_1", 0.5)]

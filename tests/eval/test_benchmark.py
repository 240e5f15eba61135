"""What holds for all benchmarks, their options, and how a run of loop.py calls them."""

import json
import re
from dataclasses import MISSING, fields, replace

import pytest
from conftest import write_rows
from eval_helpers import FP32, alpaca_file, arena_files, mt_files
from eval_helpers import key as key

from eval import alpaca_eval, answers, arena_hard, benchmark, head_to_head, mt_bench
from plumbing.files import InputError
from plumbing.options import RunOptions
from plumbing.stage import fingerprint
from sample import SampleOptions

JUDGED = ["alpaca_eval", "arena_hard", "mt_bench", "head_to_head"]


# ---- judged benchmarks


@pytest.mark.parametrize("name", JUDGED)
def test_everything_is_checked_before_an_answer_is_written(name, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "generate", lambda *args, **kw: pytest.fail("sampled"))
    monkeypatch.setattr(answers, "Stage", lambda *args, **kw: pytest.fail("sampled"))
    questions, baseline = arena_files(tmp_path)
    data = {
        alpaca_eval: alpaca_file(tmp_path),
        arena_hard: questions,
        mt_bench: mt_files(tmp_path),
        head_to_head: questions,
    }
    module = benchmark.BENCHMARKS[name]
    more = {"model": tiny, "out": tmp_path / "out"}
    if module is arena_hard:
        more["baseline"] = baseline
    if module is head_to_head:
        more["against"] = tiny
    judge = {"judge": "x", "base_url": "u"}
    given = {"data": data[module], **judge}
    cases = [
        (judge, "--data: missing; give "),
        ({"data": data[module]}, "--judge"),
        ({**given, "data": tmp_path / "gone"}, "gone: no such file; give"),
    ]
    for changes, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            module.main(module.Options(**more, **changes))
        assert "\n" not in str(caught.value)
    pytest.importorskip("openai", reason="needs openai: pip install -r requirements-eval.txt")
    with pytest.raises(InputError, match="--budget: needs prices"):
        module.main(module.Options(**more, **given, budget=1.0))


@pytest.mark.parametrize("name", JUDGED)
def test_a_benchmark_opens_with_what_its_reader_needs(name):
    text = benchmark.BENCHMARKS[name].__doc__
    assert text.splitlines()[0].endswith(".")
    files = r"^[^\n`]*\.(jsonl|json)\b[^\n]* -> \S"
    assert re.search(files, text, re.MULTILINE), "files in -> files out"
    for command in ("python", "torchrun --nproc-per-node 8"):
        assert re.search(rf"^    {command} -m eval\.{name} --model", text, re.MULTILINE)


def test_a_judged_benchmark_has_the_flags_of_the_sampler():
    """With the defaults of SampleOptions."""
    judged = {field.name: field.default for field in fields(answers.JudgedOptions)}
    sampling = {field.name: field.default for field in fields(SampleOptions)}
    assert sampling.items() <= judged.items() and MISSING not in sampling.values()


def test_data_that_holds_no_objects_is_named(tmp_path):
    path = tmp_path / "lines.jsonl"
    for text, message in (("7", "line 1 is not a JSON object"), ("{}", "line 1: field 'uid' is")):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            answers.read_lines(path, "uid")


# ---- in a run


def test_options_by_name(tmp_path):
    path = tmp_path / "options.json"
    cases = [
        ("[1]", "must hold options by benchmark"),
        ('{"ifeval": 1}', "must hold options by benchmark"),
        ('{"ifeval": {"model": "m"}}', "ifeval: model is set by the run; leave it out"),
    ]
    for text, message in cases:
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            benchmark.check("ifeval", str(path))
    run = RunOptions(seed=1, dtype="float32")
    o = benchmark.options_of("ifeval", {"seed": 7, "data": "d"}, run, model="m", prompts="p")
    assert (str(o.model), str(o.data)) == ("m", "d")
    assert o.run == replace(run, seed=7), "a benchmark's own seed is its own"
    assert benchmark.check("", "") == {}


@pytest.fixture
def options(tiny, tmp_path):
    """Writes an options file for head_to_head; returns its path."""
    prompts = write_rows(tmp_path / "few.jsonl", [{"prompt": f"Question {i}?"} for i in range(4)])

    def write(**changes) -> str:
        given = {"data": str(prompts), "against": str(tiny), "scorer": "likelihood"}
        path = tmp_path / "options.json"
        path.write_text(json.dumps({"head_to_head": {**given, "max_new_tokens": 8, **changes}}))
        return str(path)

    return write


@pytest.mark.parametrize(
    ("evals", "changes", "message"),
    [
        ("alpaca", {}, "--eval alpaca: no such benchmark; there are alpaca_eval, arena_hard"),
        ("judge", {}, "--eval judge: no such benchmark"),
        ("benchmark", {}, "--eval benchmark: no such benchmark"),
        ("head_to_head", {"against": ""}, "head_to_head: its option against is missing; give --ev"),
        ("ifeval,head_to_head", {}, "--eval ifeval: its option data is missing"),
        ("head_to_head", {"datta": "x"}, "unrecognized arguments: --datta=x"),
        ("head_to_head", {"data": "nowhere.jsonl"}, "no file or directory nowhere.jsonl"),
        ("ifeval", {}, "options for head_to_head, which --eval does not name"),
    ],
)
def test_benchmarks_that_do_not_exist(options, evals, changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        benchmark.check(evals, options(**changes))


def test_a_benchmark_on_a_model(options, tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "iter0/eval/head_to_head"
    given = benchmark.check("head_to_head", options())["head_to_head"]
    path = benchmark.run("head_to_head", given, tiny, [], out, FP32)
    result = json.loads(path.read_text())
    assert path == out / "result.json"
    assert (result["score"], result["draws"], result["prompts"]) == (50, 4, 4)  # against itself
    manifest = json.loads((out / "result.manifest.json").read_text())
    assert manifest["inputs"]["model"] == fingerprint(tiny)
    assert manifest["counts"]["score"] == 50

    # once more: nothing is computed; a changed data file is noticed
    monkeypatch.setattr(head_to_head, "main", lambda o: pytest.fail("ran again"))
    assert benchmark.run("head_to_head", given, tiny, [], out, FP32) == path
    assert "iter0/eval/head_to_head/result.json up to date" in capsys.readouterr().out
    write_rows(tmp_path / "few.jsonl", [{"prompt": "Another?"}])
    with pytest.raises(InputError, match="made with input data"):
        benchmark.run("head_to_head", given, tiny, [], out, FP32)


def test_a_benchmark_of_prompts_reads_no_model(tmp_path, monkeypatch):
    def measured(o) -> dict:
        return {"score": 0.123456, "prompts": o.prompts, "limit": o.limit}

    monkeypatch.setattr(benchmark.BENCHMARKS["diversity"], "main", measured)
    out = tmp_path / "iter1/eval/diversity"
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    path = benchmark.run("diversity", {"limit": 7}, tmp_path, [prompts, prompts], out, FP32)
    wanted = {"score": 0.123456, "prompts": f"{prompts},{prompts}", "limit": 7}
    assert json.loads(path.read_text()) == wanted
    counts = json.loads((out / "result.manifest.json").read_text())["counts"]
    assert (counts["score"], counts["limit"]) == (0.1235, 7) and "prompts" not in counts
    # before the first iteration there are no prompts
    path = benchmark.run("diversity", {}, tmp_path, [], tmp_path / "iter0", FP32)
    assert json.loads(path.read_text()) == {}

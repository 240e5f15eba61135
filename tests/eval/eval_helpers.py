"""What tests of benchmarks share: a judge behind the stub, small official files, commands."""

import json
from pathlib import Path

import pytest
from conftest import run, write_rows
from stub import Stub

from plumbing.files import rng
from plumbing.options import RunOptions

FP32 = RunOptions(dtype="float32")
BASELINE_LENGTHS = [
    1,
    9,
    12,
    40,
]  # of Arena-Hard; the tiny model's answers have 11 to 15 characters


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")


def judged_by(stub: Stub) -> dict:
    """Options of a benchmark whose judge is the stub."""
    pytest.importorskip(
        "openai", reason="needs the openai package: pip install -r requirements-eval.txt"
    )
    return {"run": FP32, "max_new_tokens": 12, "judge": "stub", "base_url": stub.url}


def run_module(name: str, args: list, nproc: int = 1) -> tuple[int, str, str]:
    """Run `python -m NAME ARGS`: (return code, standard output, standard error)."""
    return run(["-m", name, *args], nproc=nproc)


def alpaca_file(folder: Path, n: int = 5) -> Path:
    rows = []
    for i in range(n):
        answer = {"output": "x" * (1 + 20 * i), "generator": "g"}
        rows.append({"dataset": "d", "instruction": f"Question {i}?", **answer})
    path = folder / "baseline.json"
    path.write_text(json.dumps(rows))
    return path


def arena_files(folder: Path, n: int = 4) -> tuple[Path, Path]:
    """Questions, and the baseline's answers in another order."""
    questions = []
    answers = []
    for i in range(n):
        question = {"role": "user", "content": f"Question {i}?"}
        answer = {"role": "assistant", "content": {"answer": "x" * BASELINE_LENGTHS[i]}}
        questions.append({"uid": f"u{i}", "cluster": "k", "prompt": f"Question {i}?"})
        row = {"uid": f"u{i}", "ans_id": "x", "model": "b", "messages": [question, answer]}
        answers.insert(0, {**row, "tstamp": 1.0})
    return (
        write_rows(folder / "question.jsonl", questions),
        write_rows(folder / "baseline.jsonl", answers),
    )


def mt_files(folder: Path) -> Path:
    """A directory with four questions, one of them with a reference."""
    data = folder / "mt"
    data.mkdir()
    questions = []
    for i, category in enumerate(["writing", "math", "stem", "extraction"]):
        turns = [f"First {i}?", f"Then {i}?"]
        questions.append({"question_id": 81 + i, "category": category, "turns": turns})
    write_rows(data / "question.jsonl", questions)
    places = {
        "single-v1": "{question}|{answer}",
        "single-math-v1": "{question}|{ref_answer_1}|{answer}",
        "single-v1-multi-turn": "{question_1}|{answer_1}|{question_2}|{answer_2}",
        "single-math-v1-multi-turn": (
            "{question_1}|{ref_answer_1}|{question_2}|{ref_answer_2}|{answer_1}|{answer_2}"
        ),
    }
    prompts = []
    for name, text in places.items():
        prompts.append({"name": name, "system_prompt": "S", "prompt_template": f"{name}: {text}"})
    write_rows(data / "judge_prompts.jsonl", prompts)
    reference = {"question_id": 82, "choices": [{"turns": ["REF1", "REF2"]}]}
    write_rows(data / "reference_answer_gpt-4.jsonl", [reference])
    return data


WORDS = "the sampler writes answers of a list prompts some rows at time finished takes next once"
WORDS = f"{WORDS} trainer reads again".split()


def text(seed, words: int) -> str:
    """Words that follow from the seed."""
    r = rng("words", seed)
    return " ".join(r.choice(WORDS) for _ in range(words))

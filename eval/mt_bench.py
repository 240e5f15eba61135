"""MT-Bench: a judge's mean grade, from 1 to 10, of the model's answers to 80 two-turn questions.

score is the mean over all judged turns; se is that of the mean over questions, as the two turns of one are not independent.
The second turn is generated after the first; math, reasoning and coding are graded against a reference answer. Prompts and
references are the official files; comparable with published grades only where the judge is the same. As officially, a turn
whose verdict has no grade is left out, and counted as malformed. --data holds three files of fastchat/llm_judge/data in the
repository lm-sys/FastChat: mt_bench/question.jsonl, judge_prompts.jsonl, and mt_bench/reference_answer/gpt-4.jsonl under the
name reference_answer_gpt-4.jsonl.

question.jsonl, judge_prompts.jsonl, reference_answer_gpt-4.jsonl in --data -> turn1-T.jsonl, turn2-T.jsonl (T: temperature),
model_answer.jsonl, grades.jsonl, verdicts.jsonl, result.json in --out

    python -m eval.mt_bench --model DIR --data mt_bench --judge gpt-4
    torchrun --nproc-per-node 8 -m eval.mt_bench --model DIR --data mt_bench --judge JUDGE_DIR
"""

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from data import Common, InputError, command, digest, on_first, say, write_jsonl, write_text
from eval.answers import answer, first, need, place, read_lines, words
from eval.judge import Judge, JudgeOptions, Request, fill
from eval.report import table
from eval.stats import standard_error
from sample import SampleOptions

SOURCE = (
    "a directory with question.jsonl, judge_prompts.jsonl and reference_answer_gpt-4.jsonl, from the repository "
    "lm-sys/FastChat, fastchat/llm_judge/data: mt_bench/question.jsonl, judge_prompts.jsonl and "
    "mt_bench/reference_answer/gpt-4.jsonl"
)
NEEDS = ("data", "judge")  # what a run of loop.py must give in --eval-options
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}  # 0 for the others
WITH_REFERENCE = ("math", "reasoning", "coding")


@dataclass(kw_only=True)
class Options(JudgeOptions, SampleOptions, Common):
    model: str  # checkpoint directory
    data: str = (
        ""  # directory with question.jsonl, judge_prompts.jsonl and reference_answer_gpt-4.jsonl
    )
    out: str = ""  # directory to write; empty: eval/mt_bench in the model's
    limit: int = 0  # only so many questions, evenly spread over the categories; 0: all
    temperature: float = -1.0  # of all answers; below 0: by category, as officially
    max_new_tokens: int = 1024  # limit per answer; a record's own max_new_tokens wins
    judge_tokens: int = 2048  # most tokens of a verdict with reasons


def read_data(o: Options) -> tuple[list[dict], dict, dict]:
    """Questions, prompts by name, both turns of reference answers by question."""
    if o.judge_prompt:
        raise InputError("--judge-prompt: MT-Bench's prompts are those of --data; leave it out")
    folder = need(o.data, "--data", SOURCE)
    questions, prompts, references = (
        read_lines(need(str(folder / name), "--data", SOURCE), *fields)
        for name, *fields in (
            ("question.jsonl", "question_id", "category", "turns"),
            ("judge_prompts.jsonl", "name", "system_prompt", "prompt_template"),
            ("reference_answer_gpt-4.jsonl", "question_id", "choices"),
        )
    )
    prompts = {row["name"]: row for row in prompts}
    references = {row["question_id"]: row["choices"][0]["turns"] for row in references}
    if o.limit:
        first(questions, o.limit)
        questions = [
            questions[i * len(questions) // o.limit] for i in range(min(o.limit, len(questions)))
        ]
    for row in questions:
        if len(row["turns"]) != 2:
            raise InputError(
                f"{folder}/question.jsonl: question {row['question_id']}: field 'turns' does not hold two texts"
            )
        if row["category"] in WITH_REFERENCE and len(references.get(row["question_id"], ())) != 2:
            raise InputError(
                f"{folder}/reference_answer_gpt-4.jsonl: no two answers to question {row['question_id']}; its "
                f"category {row['category']} is graded against one"
            )
    for name in (
        "single-v1",
        "single-math-v1",
        "single-v1-multi-turn",
        "single-math-v1-multi-turn",
    ):
        if name not in prompts:
            raise InputError(
                f"{folder}/judge_prompts.jsonl: no prompt {name}; give the official file"
            )
    return questions, prompts, references


def converse(o: Options, questions: list[dict], out: Path) -> dict[int, list[str]]:
    """Both answers to each question, by its id: those of one temperature together, the second turn after the first."""
    groups, answers = defaultdict(list), {}
    for row in questions:
        groups[
            o.temperature if o.temperature >= 0 else TEMPERATURES.get(row["category"], 0.0)
        ].append(row)
    for temperature, rows in sorted(groups.items()):
        talks = [[{"role": "user", "content": row["turns"][0]}] for row in rows]
        for turn in (1, 2):
            said = answer(
                o,
                [
                    {"id": str(row["question_id"]), "messages": talk}
                    for row, talk in zip(rows, talks, strict=True)
                ],
                Path(o.data) / "question.jsonl",
                out / f"turn{turn}-{temperature}.jsonl",
                purpose=f"turn {turn}",
                temperature=temperature,
            )
            for row, talk, reply in zip(rows, talks, said, strict=True):
                answers.setdefault(row["question_id"], []).append(reply["response"])
                talk += [
                    {"role": "assistant", "content": reply["response"]},
                    {"role": "user", "content": row["turns"][1]},
                ]
    return answers


def to_request(
    prompts: dict, row: dict, turn: int, answers: list[str], reference: list[str] | None
) -> Request:
    """The official request to grade a turn (1 or 2): the first alone, the second with the conversation before it."""
    prompt = prompts[
        "single-" + ("math-" if reference else "") + "v1" + ("-multi-turn" if turn == 2 else "")
    ]
    texts = {
        "question": row["turns"][0],
        "answer": answers[0],
        "question_1": row["turns"][0],
        "question_2": row["turns"][1],
        "answer_1": answers[0],
        "answer_2": answers[1],
    }
    if reference:
        texts |= {"ref_answer_1": reference[0], "ref_answer_2": reference[1]}
    return Request(
        [
            {"role": "system", "content": prompt["system_prompt"]},
            {"role": "user", "content": fill(prompt["prompt_template"], texts)},
        ]
    )


def read_grade(reply: dict) -> float | None:
    """The first [[grade]] of the text, or [grade] where there is none; None outside of 1 to 10."""
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", reply["text"]) or re.search(
        r"\[(\d+\.?\d*)\]", reply["text"]
    )
    return float(found[1]) if found and 1 <= float(found[1]) <= 10 else None


def statistics(grades: list[tuple[float | None, float | None]]) -> dict[str, float]:
    """Means of the two turns of each question, without those that have no grade."""
    mean = lambda values: sum(values) / len(values) if values else None  # noqa: E731
    every = [[g for g in pair if g is not None] for pair in grades]
    numbers = {
        "score": mean([g for pair in every for g in pair]),
        "se": standard_error([mean(pair) for pair in every if pair]),
        **{
            f"turn_{t + 1}": mean([pair[t] for pair in grades if pair[t] is not None])
            for t in (0, 1)
        },
    }
    return {name: value for name, value in numbers.items() if value is not None}


def main(o: Options) -> dict:
    out, (questions, prompts, references) = place(o, "mt_bench"), read_data(o)
    judge = Judge(o, o, out)
    answers = converse(o, questions, out)
    on_first(write_official, out, Path(o.model).name, answers)
    requests = [
        to_request(
            prompts,
            row,
            turn,
            answers[row["question_id"]],
            references[row["question_id"]] if row["category"] in WITH_REFERENCE else None,
        )
        for row in questions
        for turn in (1, 2)
    ]
    values = judge.ask(requests, read_grade)
    grades = list(zip(values[::2], values[1::2], strict=True))
    on_first(
        lambda: write_jsonl(
            out / "grades.jsonl",
            [
                {
                    "question_id": row["question_id"],
                    "category": row["category"],
                    "turn_1": a,
                    "turn_2": b,
                }
                for row, (a, b) in zip(questions, grades, strict=True)
            ],
        )
    )
    categories = {
        row["category"]: statistics(
            [
                g
                for other, g in zip(questions, grades, strict=True)
                if other["category"] == row["category"]
            ]
        )
        for row in questions
    }
    total = statistics(grades)
    say(
        table(
            [
                {
                    "MT-Bench": name,
                    **{column: s.get(column, "-") for column in ("turn_1", "turn_2", "score")},
                }
                for name, s in [*categories.items(), (Path(o.model).name, total)]
            ]
        )
    )
    texts = [text for pair in answers.values() for text in pair]
    result = {
        **total,
        **{name: s["score"] for name, s in categories.items() if "score" in s},
        "questions": len(questions),
        "words": words(texts),
        **judge.usage(),
    }
    on_first(lambda: write_text(out / "result.json", json.dumps(result, indent=1)))
    return result


def write_official(out: Path, name: str, answers: dict[int, list[str]]) -> None:
    """The answer file that FastChat's own judging reads; the same bytes for the same answers."""
    write_jsonl(
        out / "model_answer.jsonl",
        [
            {
                "question_id": number,
                "answer_id": digest(name, number, turns),
                "model_id": name,
                "choices": [{"index": 0, "turns": turns}],
                "tstamp": max(path.stat().st_mtime for path in out.glob("turn*.jsonl")),
            }
            for number, turns in sorted(answers.items())
        ],
    )


if __name__ == "__main__":
    command(main, Options)

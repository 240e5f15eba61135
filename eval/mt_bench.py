"""MT-Bench: a judge's mean grade, from 1 to 10, of the model's answers to 80 two-turn questions.

score is the mean over all judged turns; se is that of the mean over questions, as the two turns
of one are not independent. The second turn is generated after the first; math, reasoning and
coding are graded against a reference answer. Prompts and references are the official files;
comparable with published grades only where the judge is the same. As in the official code, a turn
whose verdict has no grade is left out, and counted as malformed.

--data holds three files of fastchat/llm_judge/data in the repository lm-sys/FastChat:
mt_bench/question.jsonl, judge_prompts.jsonl, and mt_bench/reference_answer/gpt-4.jsonl under the
name reference_answer_gpt-4.jsonl.

question.jsonl, judge_prompts.jsonl, reference_answer_gpt-4.jsonl in --data -> turn1-T.jsonl,
turn2-T.jsonl (T: temperature), model_answer.jsonl, grades.jsonl, verdicts.jsonl, result.json in
--out

    python -m eval.mt_bench --model DIR --data mt_bench --judge gpt-4
    torchrun --nproc-per-node 8 -m eval.mt_bench --model DIR --data mt_bench --judge JUDGE_DIR
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from checkpoint import Checkpoint
from eval.answers import JudgedOptions, answer, first, need, place, read_lines, words
from eval.stats import mean, standard_error
from eval.table import table
from plumbing.files import InputError, digest, write_json, write_jsonl
from plumbing.options import cli
from plumbing.ranges import Count, Whole
from plumbing.ranks import on_rank0, print0
from scorers.llm_judge import Judge, Request, fill_in

SOURCE = (
    "a directory with question.jsonl, judge_prompts.jsonl and reference_answer_gpt-4.jsonl, "
    "from the repository lm-sys/FastChat, fastchat/llm_judge/data: mt_bench/question.jsonl, "
    "judge_prompts.jsonl and mt_bench/reference_answer/gpt-4.jsonl"
)
NEEDS = ("data", "judge")  # what a run of loop.py must give in --eval-options
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}  # others: 0
WITH_REFERENCE = ("math", "reasoning", "coding")
PROMPTS = ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn")
# the files of --data, and the fields that they must have
FILES = {
    "question.jsonl": ("question_id", "category", "turns"),
    "judge_prompts.jsonl": ("name", "system_prompt", "prompt_template"),
    "reference_answer_gpt-4.jsonl": ("question_id", "choices"),
}


@dataclass(frozen=True, kw_only=True)
class Options(JudgedOptions):
    model: Checkpoint  # checkpoint directory
    data: Path | None = None  # directory of three official files, see above
    out: Path | None = None  # directory to write; empty: MODEL/eval/mt_bench
    limit: Whole = 0  # use only N questions, evenly spread over the categories; 0: all
    temperature: float = -1.0  # of all answers; below 0: the official one of each category
    max_new_tokens: Count = 1024  # limit per answer
    judge_tokens: Count = 2048  # max tokens of a verdict with reasons

    def __post_init__(self):
        # below 0 is no temperature of the sampler; answer() checks its options once more
        if self.temperature >= 0:
            super().__post_init__()


def read_data(o: Options) -> tuple[list[dict], dict[str, dict]]:
    """Questions, and the judge's prompts by name.

    A question that is graded against a reference gets the field `ref_answer`, two texts.
    """
    if o.judge_prompt:
        raise InputError("--judge-prompt: MT-Bench's prompts are those of --data; leave it out")
    # the three files
    folder = need(o.data, "--data", SOURCE)
    questions, prompts, references = (
        read_lines(need(folder / name, "--data", SOURCE), *fields) for name, fields in FILES.items()
    )
    prompts = {row["name"]: row for row in prompts}
    references = {row["question_id"]: row["choices"][0]["turns"] for row in references}

    # some of the questions, evenly spread
    number = len(first(questions, o.limit))
    questions = [questions[i * len(questions) // number] for i in range(number)]

    # each file must hold what the others refer to
    for row in questions:
        number = row["question_id"]
        if len(row["turns"]) != 2:
            where = f"{folder}/question.jsonl: question {number}"
            raise InputError(f"{where}: field 'turns' must hold two texts")
        if row["category"] in WITH_REFERENCE:
            row["ref_answer"] = references.get(number, ())
            if len(row["ref_answer"]) != 2:
                problem = f"no two answers to question {number}"
                why = f"its category {row['category']} is graded against one"
                raise InputError(f"{folder}/reference_answer_gpt-4.jsonl: {problem}; {why}")
    for name in PROMPTS:
        if name not in prompts:
            problem = f"no prompt {name}; give the official file"
            raise InputError(f"{folder}/judge_prompts.jsonl: {problem}")
    return questions, prompts


def converse(o: Options, questions: list[dict], out: Path) -> dict[int, list[str]]:
    """Both answers to each question, by its id.

    Questions of one temperature are answered together, the second turn after the first.
    """
    groups = defaultdict(list)
    for row in questions:
        official = TEMPERATURES.get(row["category"], 0.0)
        groups[o.temperature if o.temperature >= 0 else official].append(row)

    answers = defaultdict(list)
    for temperature, rows in sorted(groups.items()):
        prompts = [{"id": str(row["question_id"]), "messages": []} for row in rows]
        files = [o.data / "question.jsonl"]
        for turn in (1, 2):
            # the next question of every conversation, and its answer
            for row, prompt in zip(rows, prompts, strict=True):
                question = {"role": "user", "content": row["turns"][turn - 1]}
                prompt["messages"].append(question)
            path = out / f"turn{turn}-{temperature}.jsonl"
            replies = answer(o, prompts, path, files, f"turn {turn}", temperature=temperature)
            files.append(path)
            for row, prompt, reply in zip(rows, prompts, replies, strict=True):
                text = reply["response"]
                prompt["messages"].append({"role": "assistant", "content": text})
                answers[row["question_id"]].append(text)
    return dict(answers)


def to_request(prompts: dict, row: dict, turn: int, answers: list[str]) -> Request:
    """The official request to grade a turn, 1 or 2: the first alone, the second after the first."""
    reference = row.get("ref_answer", ())
    kind = "single-math-v1" if reference else "single-v1"
    prompt = prompts[kind + ("-multi-turn" if turn == 2 else "")]
    # a prompt uses some of these
    texts = {"question": row["turns"][0], "answer": answers[0]}
    by_turn = (("question", row["turns"]), ("answer", answers), ("ref_answer", reference))
    for name, turns in by_turn:
        texts |= {f"{name}_{number}": text for number, text in enumerate(turns, 1)}
    system = {"role": "system", "content": prompt["system_prompt"]}
    user = {"role": "user", "content": fill_in(prompt["prompt_template"], texts)}
    return Request([system, user])


def read_grade(reply: dict) -> float | None:
    """The first [[grade]] of the text, or [grade] where there is none; None outside 1 to 10."""
    text = reply["text"]
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", text) or re.search(r"\[(\d+\.?\d*)\]", text)
    if not found or not 1 <= float(found[1]) <= 10:
        return None
    return float(found[1])


def statistics(grades: list[tuple[float | None, float | None]]) -> dict[str, float]:
    """Means over the two turns of each question, without those that have no grade."""
    pairs = [[grade for grade in pair if grade is not None] for pair in grades]
    numbers = {
        "score": average([grade for pair in pairs for grade in pair]),
        "se": standard_error([mean(pair) for pair in pairs if pair]),
        "turn_1": average([first for first, _ in grades if first is not None]),
        "turn_2": average([second for _, second in grades if second is not None]),
    }
    return {name: value for name, value in numbers.items() if value is not None}


def average(values: list[float]) -> float | None:
    return mean(values) if values else None


def main(o: Options) -> dict:
    # all that can fail comes before the answers
    out = place(o, "mt_bench")
    questions, prompts = read_data(o)
    judge = Judge(o, out)

    # answer both turns, then grade them
    answers = converse(o, questions, out)
    on_rank0(write_official, out, o.model.name, answers)
    requests = [
        to_request(prompts, row, turn, answers[row["question_id"]])
        for row in questions
        for turn in (1, 2)
    ]
    values = judge.ask(requests, read_grade)
    grades = list(zip(values[::2], values[1::2], strict=True))

    # average by category and over all
    rows = []
    by_category = defaultdict(list)
    for row, (a, b) in zip(questions, grades, strict=True):
        question = {"question_id": row["question_id"], "category": row["category"]}
        rows.append({**question, "turn_1": a, "turn_2": b})
        by_category[row["category"]].append((a, b))
    on_rank0(write_jsonl, out / "grades.jsonl", rows)
    categories = {name: statistics(pairs) for name, pairs in by_category.items()}
    total = statistics(grades)
    show({**categories, o.model.name: total})
    result = {
        **total,
        **{name: s["score"] for name, s in categories.items() if "score" in s},
        "questions": len(questions),
        "words": words([text for pair in answers.values() for text in pair]),
        **judge.usage(),
    }
    on_rank0(write_json, out / "result.json", result)
    return result


def show(numbers: dict[str, dict]) -> None:
    """A table of grades by category, the model's own row last."""
    rows = []
    for name, s in numbers.items():
        grades = {key: s.get(key, "-") for key in ("turn_1", "turn_2", "score")}
        rows.append({"MT-Bench": name, **grades})
    print0(table(rows))


def write_official(out: Path, name: str, answers: dict[int, list[str]]) -> None:
    """The answer file that FastChat's own judging reads; equal answers give equal bytes."""
    written = max(path.stat().st_mtime for path in out.glob("turn*.jsonl"))
    rows = []
    for number, turns in sorted(answers.items()):
        official = {
            "question_id": number,
            "answer_id": digest(name, number, turns),
            "model_id": name,
            "choices": [{"index": 0, "turns": turns}],
            "tstamp": written,
        }
        rows.append(official)
    write_jsonl(out / "model_answer.jsonl", rows)


if __name__ == "__main__":
    cli(main)

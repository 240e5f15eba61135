"""Open LLM Leaderboard v1, or any other task of lm-evaluation-harness, from local files.

ARC-challenge with 25 examples, HellaSwag 10, TruthfulQA 0, MMLU 5, Winogrande 5, GSM8K 5: the share of right answers to
multiple-choice questions (TruthfulQA: the probability of the true ones) and to school maths. score is the mean over the tasks
that ran, se its standard error over questions. A task whose data is missing is named and left out: compare scores of the same
tasks only. Preference training hardly moves these numbers; they show what it has cost.

DIR/*.jsonl -> OUT/TASK.json, one a task, kept when the command runs again; OUT/tasks: lm_eval's definitions of the tasks

    python -m eval.leaderboard --model DIR --data DIR
    torchrun --nproc-per-node 8 -m eval.leaderboard --model DIR --data DIR

--data holds JSONL with the fields of the data sets on the hub: arc_challenge_test, hellaswag_validation, truthfulqa_mc,
mmlu_test (each question with its `subject`), winogrande_dev, gsm8k_test; a name may go on, as in mmlu_test_some.jsonl.
Examples come from arc_challenge_train, hellaswag_train, mmlu_dev, winogrande_train and gsm8k_train, or where there is no such
file from the other questions. On the hub they are allenai/ai2_arc (ARC-Challenge), Rowan/hellaswag, truthfulqa/truthful_qa
(multiple_choice), cais/mmlu, allenai/winogrande (winogrande_xl) and openai/gsm8k (main). Without --data, and for tasks that are
not among the six, lm_eval asks the hub.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from data import Common, InputError, command, on_first, part, say, stage, write_jsonl, write_text
from eval.answers import place, read_lines
from eval.optional import optional
from eval.report import table
from eval.stats import mean


@dataclass
class Task:
    shots: int
    metric: str  # as lm_eval names it, and the filter behind it
    stock: str  # lm_eval's own definition, in its folder of tasks
    asked: str  # file of the questions
    shown: str = ""  # file of the examples


TASKS = {
    "arc_challenge": Task(
        25, "acc_norm,none", "arc/arc_challenge.yaml", "arc_challenge_test", "arc_challenge_train"
    ),
    "hellaswag": Task(
        10, "acc_norm,none", "hellaswag/hellaswag.yaml", "hellaswag_validation", "hellaswag_train"
    ),
    "truthfulqa_mc2": Task(0, "acc,none", "truthfulqa/truthfulqa_mc2.yaml", "truthfulqa_mc"),
    "mmlu": Task(
        5, "acc,none", "mmlu/default/mmlu_*.yaml", "mmlu_test", "mmlu_dev"
    ),  # one task of lm_eval's a subject
    "winogrande": Task(
        5, "acc,none", "winogrande/default.yaml", "winogrande_dev", "winogrande_train"
    ),
    "gsm8k": Task(5, "exact_match,strict-match", "gsm8k/gsm8k.yaml", "gsm8k_test", "gsm8k_train"),
}


@dataclass(kw_only=True)
class Options(Common):
    model: str  # checkpoint directory
    data: str = ""  # directory of the tasks' JSONL files; without it lm_eval asks the hub
    out: str = ""  # directory to write; MODEL/eval/leaderboard unless given
    tasks: str = ""  # names joined by commas, lm_eval's others too; all six unless given
    limit: int = 0  # most questions of a task, and of a subject of MMLU; 0 is all
    subjects: int = 0  # most subjects of MMLU; 0 is all
    chat: bool = False  # put the questions into the chat template; the leaderboard does not
    batch_tokens: int = 4096  # of a packed forward pass; what its questions share counts once
    slots: int = 128  # answers written at a time


# ---------------------------------------------------------------------------------------------- data


def find(data: Path, name: str) -> Path | None:
    """NAME.jsonl, or the first NAME*.jsonl."""
    return next(iter([*data.glob(f"{name}.jsonl"), *sorted(data.glob(f"{name}*.jsonl"))]), None)


def files_of(task: Task, o: Options) -> dict[str, Path]:
    """The splits of a task: `test` is asked, `train` shown; empty where there is no file to ask."""
    found = {
        split: find(Path(o.data), name)
        for split, name in (("test", task.asked), ("train", task.shown))
        if name
    }
    return {split: path.resolve() for split, path in found.items() if path} if found["test"] else {}


def define(name: str, files: dict[str, Path], o: Options) -> dict[str, dict]:
    """Name -> definition of lm_eval's tasks that make up one of the six; MMLU's files are cut into subjects."""
    task, stock = TASKS[name], Path(optional("lm_eval.tasks").__file__).parent
    if name != "mmlu":
        return {name: definition(stock / task.stock, name, task.shots, files)}
    folder = Path(o.out) / "tasks" / "mmlu"
    shutil.rmtree(folder, ignore_errors=True)  # of other data, perhaps
    if files:
        for split, path in files.items():
            of = lambda row: row["subject"]  # noqa: E731
            for subject, rows in groupby(sorted(read_lines(path, "subject"), key=of), key=of):
                write_jsonl(folder / f"{subject}_{split}.jsonl", list(rows))
        subjects = sorted(
            path.name.removesuffix("_test.jsonl") for path in folder.glob("*_test.jsonl")
        )
    else:
        subjects = sorted(path.stem.removeprefix("mmlu_") for path in stock.glob(task.stock))
    return {
        f"mmlu_{subject}": definition(
            stock / task.stock.replace("*", subject),
            f"mmlu_{subject}",
            task.shots,
            {split: (folder / f"{subject}_{split}.jsonl").resolve() for split in files},
        )
        for subject in subjects[: o.subjects or None]
    }


def definition(stock: Path, name: str, shots: int, files: dict[str, Path]) -> dict:
    """lm_eval's definition of a task, with examples, on files. The one that is asked is no example: see test_split."""
    if not stock.is_file():
        raise InputError(
            f"{stock}: no such task in this version of lm_eval; pip install -r requirements-eval.txt"
        )
    local = (
        {
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(path) for split, path in files.items()}},
            "training_split": None,
            "validation_split": None,
            "test_split": "test",
            "fewshot_split": "train" if "train" in files else "test",
        }
        if files
        else {}
    )
    return {"include": str(stock), "task": name, "tag": None, "num_fewshot": shots, **local}


# ---------------------------------------------------------------------------------------------- tasks


def measure(name: str, files: dict[str, Path], o: Options, model: Callable) -> dict:
    """Run one task; its results go to OUT/NAME.json. Returns score, se and the number of questions."""
    from eval.harness import evaluate

    def write_definitions():
        defined = define(name, files, o) if name in TASKS else {}
        for task, text in defined.items():
            write_text(
                Path(o.out) / "tasks" / name / f"{task}.yaml", json.dumps(text, indent=1)
            )  # JSON is YAML
        return [*defined]

    names = on_first(write_definitions)
    manager = optional("lm_eval.tasks").TaskManager(
        include_path=str(Path(o.out) / "tasks" / name) if names else None,
        include_defaults=not names,
    )
    if not names and name not in manager.all_tasks:
        raise InputError(f"--tasks {name}: lm_eval has no such task; `lm_eval ls tasks` shows all")
    try:
        found = evaluate(model(), names or [name], manager, o.limit, o.chat)
    except OSError as error:  # of the data's files, or of the hub
        raise InputError(
            f"--tasks {name}: lm_eval cannot have its data ({str(error).splitlines()[0]}); give --data DIR, or "
            "leave the task out"
        ) from None

    def finish():
        write_text(
            Path(o.out) / f"{name}.json",
            json.dumps(
                {key: found[key] for key in ("results", "n-samples", "versions") if key in found},
                indent=1,
                default=str,
            ),
        )
        of = [
            headline(found, task, TASKS[name].metric if names else "") for task in names or [name]
        ]
        questions = sum(n["effective"] for n in found["n-samples"].values())
        return {
            "score": round(mean([value for value, _ in of]), 4),
            "se": round(spread([se for _, se in of]), 4),
            "questions": questions,
        }

    return on_first(finish)


def headline(found: dict, task: str, metric: str) -> tuple[float, float]:
    """Value and standard error of a metric of a task; unless named it is the last one of those that ought to be high."""
    numbers = found["results"].get(task) or found["groups"][task]
    better = found["higher_is_better"].get(task, {})
    high = [
        key
        for key in numbers
        if "," in key and "_stderr" not in key and better.get(key.partition(",")[0])
    ]
    if not (metric or high):
        raise InputError(f"--tasks {task}: lm_eval gives it no metric of which more is better")
    metric = metric or high[-1]
    se = numbers.get(metric.replace(",", "_stderr,"))
    return numbers[metric], se if isinstance(se, float) else 0.0


def spread(errors: list[float]) -> float:
    """Standard error of an average of independent values with these."""
    return sum(se**2 for se in errors) ** 0.5 / len(errors)


def main(o: Options) -> dict:
    from eval.harness import Harness

    o = replace(o, out=str(place(o, "leaderboard")))
    names = [name.strip() for name in o.tasks.split(",") if name.strip()] or [*TASKS]
    if o.data and not Path(o.data).is_dir():
        raise InputError(
            f"--data {o.data}: no such directory; see --help for the files that it holds"
        )
    files = {name: files_of(TASKS[name], o) if o.data and name in TASKS else {} for name in names}
    missing = [name for name in names if o.data and name in TASKS and not files[name]]
    if len(missing) == len(names):
        raise InputError(
            f"--data {o.data}: no file of {', '.join(missing)}; see --help for the files that it holds"
        )
    made = []  # one model for all tasks, and none where all are done

    def model() -> Harness:
        if not made:
            made.append(Harness(o.model, o, o.batch_tokens, o.slots, o.chat))
        return made[0]

    rows, scores = [], {}
    for name in names:
        if name in missing:
            rows.append(
                {
                    "task": name,
                    "score": "-",
                    "se": "-",
                    "questions": 0,
                    "shots": TASKS[name].shots,
                    "examples": f"left out: no {TASKS[name].asked}*.jsonl in --data",
                }
            )
            continue
        options = {**part(o, Common), "limit": o.limit, "subjects": o.subjects, "chat": o.chat}
        done = stage(
            Path(o.out) / f"{name}.json",
            {"model": o.model, **files[name]},
            options,
            lambda name=name: measure(name, files[name], o, model),
        )
        scores[name] = (done["score"], done["se"])
        examples = (
            "its own"
            if name not in TASKS or not o.data
            else files[name].get("train", files[name]["test"]).name
        )
        rows.append(
            {
                "task": name,
                "score": done["score"],
                "se": done["se"],
                "questions": done["questions"],
                "shots": TASKS[name].shots if name in TASKS else "-",
                "examples": examples,
            }
        )
    result = {
        "score": mean([score for score, _ in scores.values()]),
        "se": spread([se for _, se in scores.values()]),
        **{name: score for name, (score, _) in scores.items()},
        "tasks": len(scores),
    }
    say(
        table(
            [
                *rows,
                {
                    "task": f"mean of {len(scores)}",
                    "score": result["score"],
                    "se": result["se"],
                    "questions": sum(row["questions"] for row in rows),
                    "shots": "",
                    "examples": "",
                },
            ]
        )
    )
    return {name: round(value, 4) for name, value in result.items()}


if __name__ == "__main__":
    command(main, Options)

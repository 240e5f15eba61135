"""Open LLM Leaderboard v1, by lm-evaluation-harness (lm_eval), from local files.

ARC-challenge with 25 examples, HellaSwag 10, TruthfulQA 0, MMLU 5, Winogrande 5, GSM8K 5:
accuracy on multiple-choice questions (TruthfulQA: probability of the true answers) and on school
maths. score is the mean over the tasks that ran, se its standard error over questions. A task
whose data is missing is named and left out: compare scores of the same tasks only. Preference
training hardly raises these scores; a drop shows what it has harmed.

DIR/*.jsonl -> OUT/TASK.json, one a task, up to date when the command runs again; OUT/tasks:
lm_eval's definitions of the tasks

    python -m eval.leaderboard --model DIR --data DIR
    torchrun --nproc-per-node 8 -m eval.leaderboard --model DIR --data DIR

--data holds JSONL with the fields of the data sets on the Hub: arc_challenge_test,
hellaswag_validation, truthfulqa_mc, mmlu_test (each question with its `subject`), winogrande_dev,
gsm8k_test; names may have a suffix, as mmlu_test_some.jsonl. Examples come from
arc_challenge_train, hellaswag_train, mmlu_dev, winogrande_train and gsm8k_train, or, without such
a file, from the other questions. On the Hub they are allenai/ai2_arc (ARC-Challenge),
Rowan/hellaswag, truthfulqa/truthful_qa (multiple_choice), cais/mmlu, allenai/winogrande
(winogrande_xl) and openai/gsm8k (main). Without --data, lm_eval downloads them. For other tasks,
and likelihoods of whole texts, use `lm_eval --model hf`: it opens our checkpoints.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from checkpoint import Checkpoint
from eval.answers import place, read_lines
from eval.lm_eval_adapter import Harness, evaluate, optional
from eval.stats import mean
from eval.table import table
from plumbing.files import InputError, write_json, write_jsonl, write_text
from plumbing.options import RunOptions, cli
from plumbing.ranges import Count, Whole
from plumbing.ranks import on_rank0, print0
from plumbing.stage import Stage, counts_of


@dataclass(frozen=True)
class Task:
    shots: int
    metric: str  # lm_eval's name of the metric, and the filter before it
    stock: str  # lm_eval's own definition, in its folder of tasks
    asked: str  # file of questions
    shown: str = ""  # file of examples


TASKS = {
    "arc_challenge": Task(
        25,
        "acc_norm,none",
        "arc/arc_challenge.yaml",
        "arc_challenge_test",
        "arc_challenge_train",
    ),
    "hellaswag": Task(
        10,
        "acc_norm,none",
        "hellaswag/hellaswag.yaml",
        "hellaswag_validation",
        "hellaswag_train",
    ),
    "truthfulqa_mc2": Task(0, "acc,none", "truthfulqa/truthfulqa_mc2.yaml", "truthfulqa_mc"),
    # lm_eval has a task for each subject
    "mmlu": Task(5, "acc,none", "mmlu/default/mmlu_*.yaml", "mmlu_test", "mmlu_dev"),
    "winogrande": Task(
        5, "acc,none", "winogrande/default.yaml", "winogrande_dev", "winogrande_train"
    ),
    "gsm8k": Task(5, "exact_match,strict-match", "gsm8k/gsm8k.yaml", "gsm8k_test", "gsm8k_train"),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    run: RunOptions = RunOptions()
    model: Checkpoint  # checkpoint directory
    data: Path | None = None  # directory of the tasks' JSONL files; empty: lm_eval downloads them
    out: Path | None = None  # directory to write; empty: MODEL/eval/leaderboard
    tasks: str = ""  # names joined by commas; empty: all six
    limit: Whole = 0  # use only the first N questions of a task (MMLU: of a subject); 0: all
    chat: bool = False  # put questions into the chat template; the leaderboard does not
    batch_tokens: Count = 4096  # per packed forward pass
    slots: Count = 128  # max batch size of generation


# ---------------------------------------------------------------------------------- data


def files_of(task: Task, o: Options) -> dict[str, Path]:
    """Files of a task by split: `test` has questions, `train` examples. Empty without questions.

    NAME.jsonl, or else the first NAME*.jsonl.
    """
    files = {}
    for split, name in (("test", task.asked), ("train", task.shown)):
        found = sorted(o.data.glob(f"{name}*.jsonl"), key=lambda path: path.stem)
        if name and found:
            files[split] = found[0].resolve()
    return files if "test" in files else {}


def define(name: str, files: dict[str, Path], o: Options) -> dict[str, dict]:
    """Name -> definition of lm_eval's tasks that make up one of the six."""
    with optional():
        import lm_eval.tasks
    task = TASKS[name]
    stock = Path(lm_eval.tasks.__file__).parent
    if name != "mmlu":
        return {name: definition(stock / task.stock, name, task.shots, files)}

    # files of MMLU's subjects; none of those that lm_eval downloads
    subjects = {path.stem.removeprefix("mmlu_"): {} for path in stock.glob(task.stock)}
    if files:
        subjects = split_subjects(files, o.out / "tasks" / "mmlu")
    definitions = {}
    for subject, own in sorted(subjects.items()):
        yaml = stock / task.stock.replace("*", subject)
        definitions[f"mmlu_{subject}"] = definition(yaml, f"mmlu_{subject}", task.shots, own)
    return definitions


def split_subjects(files: dict[str, Path], folder: Path) -> dict[str, dict[str, Path]]:
    """Write folder/SUBJECT_SPLIT.jsonl; returns the files of every subject with questions."""
    found = defaultdict(dict)
    for split, path in files.items():
        by_subject = defaultdict(list)
        for row in read_lines(path, "subject"):
            by_subject[row["subject"]].append(row)
        for subject, rows in by_subject.items():
            own = folder / f"{subject}_{split}.jsonl"
            write_jsonl(own, rows)
            found[subject][split] = own.resolve()
    return {subject: own for subject, own in found.items() if "test" in own}


def definition(stock: Path, name: str, shots: int, files: dict[str, Path]) -> dict:
    """lm_eval's definition of a task, with examples; on local files if there are any.

    Where examples are taken from the questions, lm_eval leaves out the one being asked.
    """
    if not stock.is_file():
        problem = "this version of lm_eval has no such task"
        raise InputError(f"{stock}: {problem}; pip install -r requirements-eval.txt")
    # lm_eval's own definition, and what differs from it
    task = {"include": str(stock), "task": name, "tag": None, "num_fewshot": shots}
    if not files:
        return task
    return {
        **task,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path) for split, path in files.items()}},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        "fewshot_split": "train" if "train" in files else "test",
    }


# ---------------------------------------------------------------------------------- tasks


def measure(name: str, files: dict[str, Path], o: Options, model: Callable[[], Harness]) -> Path:
    """Stage: run one task. Counts: score, se, and the number of questions."""
    out = o.out / f"{name}.json"
    stage = Stage(
        out,
        run=o.run,
        model=o.model,
        data=files,
        limit=o.limit,
        chat=o.chat,
    )
    if stage.done:
        return out
    with optional():
        from lm_eval.tasks import TaskManager
    # lm_eval reads definitions from files only
    names = on_rank0(write_definitions, name, files, o)
    try:
        manager = TaskManager(include_path=str(o.out / "tasks" / name), include_defaults=False)
        found = evaluate(model(), names, manager, o.limit, o.chat)
    except OSError as error:  # of the data's files, or of the Hub
        problem = f"lm_eval could not load its data ({str(error).splitlines()[0]})"
        fix = "give --data DIR, or leave the task out"
        raise InputError(f"--tasks {name}: {problem}; {fix}") from None
    return stage.finish(**on_rank0(write_results, found, name, names, out))


def write_definitions(name: str, files: dict[str, Path], o: Options) -> list[str]:
    """Write OUT/tasks/NAME/*.yaml; returns the names of its tasks."""
    definitions = define(name, files, o)
    for task, text in definitions.items():
        path = o.out / "tasks" / name / f"{task}.yaml"
        write_json(path, text)  # JSON is YAML
    return list(definitions)


def write_results(found: dict, name: str, names: list[str], out: Path) -> dict:
    """Write what lm_eval found; returns score, se and questions, averaged over MMLU's subjects."""
    kept = {key: found[key] for key in ("results", "n-samples", "versions")}
    write_text(out, json.dumps(kept, indent=1, default=str))
    metric = TASKS[name].metric
    headlines = [headline(found, task, metric) for task in names]
    return {
        "score": round(mean([value for value, _ in headlines]), 4),
        "se": round(spread([se for _, se in headlines]), 4),
        "questions": sum(n["effective"] for n in found["n-samples"].values()),
    }


def headline(found: dict, task: str, metric: str) -> tuple[float, float]:
    """Value and standard error of a task's metric."""
    numbers = found["results"][task]
    se = numbers.get(metric.replace(",", "_stderr,"))
    return numbers[metric], se if isinstance(se, float) else 0.0


def spread(errors: list[float]) -> float:
    """Standard error of the mean of independent values with these standard errors."""
    return math.hypot(*errors) / len(errors)


# ---------------------------------------------------------------------------------- the leaderboard


def find_files(o: Options, names: list[str]) -> dict[str, dict[str, Path]]:
    """Files by split of every task that can run; {} if lm_eval downloads them."""
    if not o.data:
        return {name: {} for name in names}
    fix = "--help lists the files it must hold"
    if not o.data.is_dir():
        raise InputError(f"--data {o.data}: no such directory; {fix}")
    files = {}
    for name in names:
        found = files_of(TASKS[name], o)
        if found:
            files[name] = found
        else:
            print0(f"  {name} left out: no {TASKS[name].asked}*.jsonl in --data")
    if not files:
        raise InputError(f"--data {o.data}: no file of {', '.join(names)}; {fix}")
    return files


def main(o: Options) -> dict:
    o = replace(o, out=place(o, "leaderboard"))
    names = [name.strip() for name in o.tasks.split(",") if name.strip()] or list(TASKS)
    for name in names:
        if name not in TASKS:
            raise InputError(f"--tasks {name}: no such task; there are {', '.join(TASKS)}")
    # one model for all tasks; none is loaded if all are up to date
    model = cache(partial(Harness, o.model, o.run, o.batch_tokens, o.slots, o.chat))

    rows = []
    for name, files in find_files(o, names).items():
        counts = on_rank0(counts_of, measure(name, files, o, model))
        shown = files.get("train", files.get("test", "lm_eval's"))
        row = {
            "task": name,
            "score": counts["score"],
            "se": counts["se"],
            "questions": counts["questions"],
            "shots": TASKS[name].shots,
            "examples": Path(shown).name,
        }
        rows.append(row)
    print0(table(rows))
    result = {
        "score": mean([row["score"] for row in rows]),
        "se": spread([row["se"] for row in rows]),
        **{row["task"]: row["score"] for row in rows},
        "tasks": len(rows),
    }
    return {name: round(value, 4) for name, value in result.items()}


if __name__ == "__main__":
    cli(main)

"""IFEval: how often answers follow instructions that a program can check, such as "no commas".

Four numbers: prompts with all instructions followed, and single instructions, each strictly or
loosely (an answer may first lose its asterisks, or its first or last line). score is the
strictest, prompts with all instructions followed as written; se is its standard error. The
checkers are those of lm-evaluation-harness, with the seed of its language detector fixed, so the
same answers always score the same. As there, answers are greedy, of at most 1,280 tokens, through
the chat template.

input_data.jsonl {key, prompt, instruction_id_list, kwargs} -> OUT/answers.jsonl, OUT/scores.jsonl

    python -m eval.ifeval --model DIR --data input_data.jsonl
    torchrun --nproc-per-node 8 -m eval.ifeval --model DIR --data input_data.jsonl

The file is in google-research/google-research, under instruction_following_eval/data. Two
checkers split text into sentences and words with NLTK's punkt_tab (`python -m nltk.downloader
punkt_tab`); --nltk-data or NLTK_DATA says where it is.
"""

from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from checkpoint import Checkpoint
from eval.answers import answer, first, need, place
from eval.lm_eval_adapter import lm_eval_seeds, optional
from eval.stats import rounded, standard_error
from eval.table import table
from plumbing.options import cli
from plumbing.ranks import on_rank0, print0
from plumbing.records import InputError, read_jsonl, write_jsonl
from plumbing.stage import Stage
from sample import SampleOptions

NEEDS = ("data",)  # what a run of loop.py must give in --eval-options
METRICS = {
    "score": "prompt_level_strict_acc",
    "prompt_loose": "prompt_level_loose_acc",
    "instruction_strict": "inst_level_strict_acc",
    "instruction_loose": "inst_level_loose_acc",
}


@dataclass(frozen=True, kw_only=True)
class Options(SampleOptions):
    model: Checkpoint  # checkpoint directory
    data: Path | None = None  # IFEval's input_data.jsonl
    out: Path | None = None  # directory to write; empty: MODEL/eval/ifeval
    limit: int = 0  # use only the first N prompts; 0: all
    nltk_data: str = ""  # directory of NLTK's data, with tokenizers/punkt_tab; empty: NLTK_DATA
    temperature: float = 0.0  # 0 is greedy
    max_new_tokens: int = 1280  # limit per answer


def read_prompts(path: Path | None, limit: int) -> list[dict]:
    """Records with `id`, `prompt`, `instruction_id_list` and `kwargs`, the lists equally long."""
    need(path, "--data", "IFEval's input_data.jsonl; --help says where it is")
    rows = read_jsonl(path, "prompt")
    # the checkers fail on anything else
    for number, row in enumerate(rows, 1):
        names = row.get("instruction_id_list")
        values = row.get("kwargs")
        are_lists = isinstance(names, list) and isinstance(values, list)
        if not are_lists or not 0 < len(names) == len(values) or "key" not in row:
            raise InputError(
                f"{path}: line {number}: fields 'key', 'instruction_id_list' and 'kwargs' must be "
                "there, the lists equally long; give IFEval's own input_data.jsonl"
            )
    return [{**row, "id": str(row["key"])} for row in first(rows, limit)]


@contextmanager
def checkers(nltk_data: str = ""):
    """lm_eval's process_results(doc, [answer]), made deterministic; restores all global state."""
    with optional():
        import nltk
        from langdetect import DetectorFactory
    # the state to restore
    path = [*nltk.data.path]
    seed = DetectorFactory.seed
    if nltk_data:
        nltk.data.path.insert(0, nltk_data)
    DetectorFactory.seed = 0
    try:
        try:
            nltk.data.find("tokenizers/punkt_tab")  # else lm_eval would download it
        except LookupError:
            download = "python -m nltk.downloader punkt_tab"
            directory = "--nltk-data DIR, where DIR/tokenizers/punkt_tab is"
            raise InputError(
                f"NLTK's punkt_tab was not found: {download}, or {directory}"
            ) from None
        with optional():
            from lm_eval.tasks.ifeval.utils import process_results
        with lm_eval_seeds():  # a checker without arguments samples them
            yield process_results
    finally:
        nltk.data.path[:] = path
        DetectorFactory.seed = seed


def check(prompts: list[dict], answers: list[dict], nltk_data: str = "") -> list[dict]:
    """{id, instructions, four metrics} of each answer.

    A metric is a bool for the prompt, or a list of bools for its instructions.
    """
    scores = []
    with checkers(nltk_data) as process:
        for row, answered in zip(prompts, answers, strict=True):
            metrics = process(row, [answered["response"]])
            names = row["instruction_id_list"]
            scores.append({"id": row["id"], "instructions": names, **metrics})
    return scores


def summary(scores: list[dict]) -> dict:
    """The means of the four metrics, and the standard error of the first."""
    # a metric's values over prompts, or over instructions
    values = {name: np.hstack([row[key] for row in scores]) for name, key in METRICS.items()}
    numbers = {name: float(column.mean()) for name, column in values.items()}
    return {
        "score": numbers["score"],
        "se": standard_error(values["score"]),
        **numbers,
        "prompts": len(scores),
        "instructions": len(values["instruction_strict"]),
    }


def by_kind(scores: list[dict]) -> list[dict]:
    """Rows of a table: instructions followed, by kind (the part of a name before the colon)."""
    # (strictly, loosely) of every instruction
    kinds = defaultdict(list)
    for row in scores:
        metrics = (row[METRICS[name]] for name in ("instruction_strict", "instruction_loose"))
        for name, *followed in zip(row["instructions"], *metrics, strict=True):
            kinds[name.partition(":")[0]].append(followed)

    # their means
    rows = []
    for kind, followed in sorted(kinds.items()):
        strict, loose = np.mean(followed, 0).tolist()
        number = len(followed)
        rows.append({"instructions": kind, "number": number, "strict": strict, "loose": loose})
    return rows


def score_answers(o: Options, prompts: list[dict], answers: Path, out: Path) -> Path:
    """Stage: the verdict on every answer."""
    stage = Stage(out, run=o.run, answers=answers, data=o.data, limit=o.limit)
    if stage.done:
        return out
    scores = on_rank0(check, prompts, read_jsonl(answers, "prompt"), o.nltk_data)
    on_rank0(write_jsonl, out, scores)
    return stage.finish(**rounded(summary(scores)))


def main(o: Options) -> dict:
    # all that can fail comes before the answers, missing packages too
    out = place(o, "ifeval")
    prompts = on_rank0(read_prompts, o.data, o.limit)
    on_rank0(check, [], [], o.nltk_data)

    # answer, then check
    questions = [{"id": row["id"], "prompt": row["prompt"]} for row in prompts]
    answer(o, questions, out / "answers.jsonl", [o.data], purpose="ifeval")
    score_answers(o, prompts, out / "answers.jsonl", out / "scores.jsonl")
    scores = read_jsonl(out / "scores.jsonl")
    result = rounded(summary(scores))
    print0(table(by_kind(scores)))
    print0(table([{name: result[name] for name in ("score", "se", *list(METRICS)[1:])}]))
    return result


if __name__ == "__main__":
    cli(main)

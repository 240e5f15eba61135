"""IFEval: how often answers follow instructions that a program can check, such as "no commas".

Four numbers: prompts with all instructions followed, and single instructions, each strictly or
loosely (an answer may first lose its asterisks, or its first or last line). score is the
strictest, prompts with all instructions followed as written; se is its standard error. The
checkers are those of lm-evaluation-harness, with the seed of its language detector fixed, so the
same answers always score the same. As there, answers are greedy, of at most 1,280 tokens, through
the chat template.

An empty answer breaks no rule about its form. So there is a fifth number of ours, guarded: prompts
strictly followed by an answer that also says something of its own, ended by itself and does not
loop (eval/answers.py).

--against compares with another checkpoint on the same prompts: paired differences with standard
errors (over prompts, as the instructions of one prompt are not independent), won and lost, and
McNemar's exact p; of all numbers, and of every type of instruction. Its answers lie where its own
evaluation would write them, and are used again.

input_data.jsonl {key, prompt, instruction_id_list, kwargs} -> OUT/answers.jsonl, OUT/scores.jsonl

    python -m eval.ifeval --model DIR --data input_data.jsonl
    python -m eval.ifeval --model DIR --data input_data.jsonl --against OTHER_DIR
    torchrun --nproc-per-node 8 -m eval.ifeval --model DIR --data input_data.jsonl

The file is in google-research/google-research, under instruction_following_eval/data. Two
checkers split text into sentences and words with NLTK's punkt_tab (`python -m nltk.downloader
punkt_tab`); --nltk-data or NLTK_DATA says where it is.
"""

from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from checkpoint import Checkpoint
from eval.answers import MAX_REPETITION, MIN_OWN_WORDS, answer, first, guarded, need, place
from eval.lm_eval_adapter import lm_eval_seeds, optional
from eval.stats import mean, paired, rounded, standard_error
from eval.table import table
from formats.records import read_jsonl
from plumbing.files import InputError, write_jsonl
from plumbing.options import cli
from plumbing.ranges import Count, Temperature, Whole
from plumbing.ranks import on_rank0, print0
from plumbing.stage import Stage
from sample import SampleOptions

NEEDS = ("data",)  # what a run of loop.py must give in --eval-options
METRICS = {
    "score": "prompt_level_strict_acc",
    "prompt_loose": "prompt_level_loose_acc",
    "instruction_strict": "inst_level_strict_acc",
    "instruction_loose": "inst_level_loose_acc",
    "guarded": "guarded",
}
PAIRED = ("difference", "se", "won", "lost", "p")  # columns of a comparison
OFFICIAL_LIMIT = 1280  # tokens per answer


@dataclass(frozen=True, kw_only=True)
class Options(SampleOptions):
    model: Checkpoint  # checkpoint directory
    data: Path | None = None  # IFEval's input_data.jsonl
    against: Checkpoint | None = None  # another checkpoint, to compare with
    out: Path | None = None  # directory to write; empty: MODEL/eval/ifeval
    limit: Whole = 0  # use only the first N prompts; 0: all
    nltk_data: str = ""  # directory of NLTK's data, with tokenizers/punkt_tab; empty: NLTK_DATA
    temperature: Temperature = 0.0  # 0 is greedy
    max_new_tokens: Count = OFFICIAL_LIMIT  # limit per answer


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
    """{id, instructions, five metrics, cut_off, words} of each answer.

    A metric is a bool for the prompt, or a list of bools for its instructions.
    """
    scores = []
    with checkers(nltk_data) as process:
        for row, answered in zip(prompts, answers, strict=True):
            metrics = process(row, [answered["response"]])
            row_scores = {"id": row["id"], "instructions": row["instruction_id_list"], **metrics}
            followed = metrics["prompt_level_strict_acc"]
            row_scores["guarded"] = followed and guarded({**row, **answered})
            row_scores["cut_off"] = answered.get("finish_reason") == "length"
            row_scores["words"] = len(answered["response"].split())
            scores.append(row_scores)
    return scores


def summary(scores: list[dict]) -> dict:
    """The means of the metrics, the standard error of the first, and what answers are like."""
    # a metric's values over prompts, or over instructions
    values = {name: np.hstack([row[key] for row in scores]) for name, key in METRICS.items()}
    numbers = {name: float(column.mean()) for name, column in values.items()}
    return {
        "score": numbers["score"],
        "se": standard_error(values["score"]),
        **numbers,
        "prompts": len(scores),
        "instructions": len(values["instruction_strict"]),
        "words": mean([row["words"] for row in scores]),
        "cut_off": sum(row["cut_off"] for row in scores),
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


def compare(ours: list[dict], theirs: list[dict]) -> list[dict]:
    """Rows of a table: our numbers against theirs, then every type of instruction, strictly."""
    # name -> for each side, {(prompt, place in it): followed}
    found = defaultdict(lambda: ({}, {}))
    for side, scores in enumerate((ours, theirs)):
        for row in scores:
            for name, key in METRICS.items():
                for i, followed in enumerate(np.atleast_1d(row[key])):
                    found[name][side][row["id"], i] = followed
            for i, name in enumerate(row["instructions"]):
                found[name][side][row["id"], i] = row[METRICS["instruction_strict"]][i]

    rows = []
    for name in [*METRICS, *sorted(found.keys() - METRICS)]:
        mine, other = found[name]
        if mine.keys() != other.keys():
            raise InputError("the two models' scores are of different prompts; score both again")
        values = list(mine.values())
        others = [other[place] for place in mine]
        shown = {"IFEval": name, "number": len(values), "ours": mean(values)}
        prompts = [prompt for prompt, _ in mine]
        rows.append({**shown, "theirs": mean(others), **paired(values, others, prompts)})
    return rows


def score_answers(o: Options, prompts: list[dict], answers: Path, out: Path) -> Path:
    """Stage: the verdict on every answer."""
    guard = [MIN_OWN_WORDS, MAX_REPETITION]
    stage = Stage(out, run=o.run, answers=answers, data=o.data, limit=o.limit, guard=guard)
    if stage.done:
        return out
    scores = on_rank0(check, prompts, read_jsonl(answers, "prompt"), o.nltk_data)
    on_rank0(write_jsonl, out, scores)
    return stage.finish(**rounded(summary(scores)))


def scores_of(o: Options, prompts: list[dict], out: Path) -> list[dict]:
    """Answer, then check."""
    questions = [{"id": row["id"], "prompt": row["prompt"]} for row in prompts]
    answer(o, questions, out / "answers.jsonl", [o.data], purpose="ifeval")
    score_answers(o, prompts, out / "answers.jsonl", out / "scores.jsonl")
    return read_jsonl(out / "scores.jsonl")


def main(o: Options) -> dict:
    # all that can fail comes before the answers, missing packages too
    out = place(o, "ifeval")
    prompts = on_rank0(read_prompts, o.data, o.limit)
    on_rank0(check, [], [], o.nltk_data)

    scores = scores_of(o, prompts, out)
    result = summary(scores)
    show(scores, result)
    if o.max_new_tokens != OFFICIAL_LIMIT:
        problem = f"warning: answers have at most {o.max_new_tokens} tokens"
        print0(f"{problem}; published figures have {OFFICIAL_LIMIT} and are not comparable")

    if o.against:
        other = replace(o, model=o.against, out=None)
        theirs = scores_of(other, prompts, place(other, "ifeval"))
        rows = compare(scores, theirs)
        print0(f"\n{o.model.name} against {o.against.name}\n{table(rows)}")
        strict = rows[0]
        result |= {f"against_{name}": strict[name] for name in ("theirs", *PAIRED)}
    return rounded(result)


def show(scores: list[dict], result: dict) -> None:
    print0(table(by_kind(scores)))
    numbers = ("score", "se", *list(METRICS)[1:])
    print0(table([{name: result[name] for name in numbers}]))
    print0(f"{result['words']:.0f} words an answer, {result['cut_off']} cut off by the token limit")


if __name__ == "__main__":
    cli(main)

"""Our adapter for lm-evaluation-harness against its own model for transformers: same numbers, less
time.

    python -m bench.lm_eval --model DIR --data DIR

Every task runs on the same questions through the peer (lm_eval's HFLM) and then through us, in one
process. Seconds are those of log-likelihoods and generation, tokenising included. Loading is not
counted, except that of our packed weights before generation, nor is building the requests. For each
task: the largest difference of two log-likelihoods, answers that differ, both scores, both times
and their ratio, of the clock and of the process's own CPU time: read the second where other
programs run beside. --batch is the peer's. Tables on standard output, JSON in the last line.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from bench.command import CLOCKS, finish, parser_of, progress, watch
from bench.tables import write_figures
from eval import leaderboard
from eval.leaderboard import TASKS, files_of, headline, task_manager, write_definitions
from eval.lm_eval_adapter import Harness, evaluate
from eval.stats import mean
from eval.table import table
from plumbing.options import RunOptions
from plumbing.ranks import DEVICE, distributed


@dataclass
class Options:
    model: Path
    data: Path  # files as for eval/leaderboard.py
    out: Path = Path("runs/bench-lm-eval")  # definitions
    tasks: str = "arc_challenge,truthfulqa_mc2,mmlu,winogrande,gsm8k"
    limit: int = 20  # questions a task, and MMLU subject
    subjects: int = 3  # of MMLU
    dtype: str = "float32"
    batch: int = 1  # of the peer; 1 suits a CPU
    generate_batch: int = 8  # the same, of generation
    batch_tokens: int = 4096  # of ours


class Clocked:
    """A model whose own work is timed: seconds by clock."""

    def __init__(self, model):
        self.model = model
        self.seconds: Counter = Counter()
        for method in ("loglikelihood", "generate_until"):
            watch(model, method, lambda seconds, *_: self.seconds.update(seconds))


def responses(found: dict) -> list:
    """What a model gave to every request: (log-likelihood, whether greedy) or a text."""
    given = []
    for task in sorted(found["samples"]):
        for sample in sorted(found["samples"][task], key=lambda sample: sample["doc_id"]):
            if sample["filter"] in ("none", "strict-match"):
                given += [answers[0] for answers in sample["resps"]]
    return given


def difference(theirs: list, ours: list) -> dict:
    pairs = list(zip(theirs, ours, strict=True))
    logps = [(a, b) for a, b in pairs if not isinstance(a, str)]
    return {
        "requests": len(pairs),
        "largest difference": max([abs(a[0] - b[0]) for a, b in logps], default=0.0),
        "greedy differs": sum(a[1] != b[1] for a, b in logps),
        "texts differ": sum(a != b for a, b in pairs if isinstance(a, str)),
    }


def run_task(name: str, peer: Clocked, us: Clocked, o: leaderboard.Options) -> dict:
    """A task through both; returns its row."""
    tasks = write_definitions(name, files_of(TASKS[name], o), o)
    given = []
    scores = []
    for who in (peer, us):
        who.seconds.clear()
        manager = task_manager(name, tasks, o)
        found = evaluate(who.model, tasks, manager, o.limit, samples=True)
        given.append(responses(found))
        values = [float(headline(found, task, TASKS[name].metric)[0]) for task in tasks]
        scores.append(mean(values))
    row = {"task": name, **difference(*given), "score: peer": scores[0], "us": scores[1]}

    # seconds of both, by either clock
    for clock in CLOCKS:
        ratio = "ratio" if clock == "wall" else f"{clock} ratio"
        row[f"{clock} s: peer"] = round(peer.seconds[clock], 1)
        row[f"us, {clock}"] = round(us.seconds[clock], 1)
        row[ratio] = round(peer.seconds[clock] / us.seconds[clock], 2)
    return row


def main(args) -> dict:
    from lm_eval.models.huggingface import HFLM

    run = RunOptions(dtype=args.dtype)
    o = leaderboard.Options(
        run=run,
        model=args.model,
        data=args.data,
        out=args.out,
        limit=args.limit,
        subjects=args.subjects,
    )
    rows = []
    with distributed():
        harness = Harness(args.model, run, args.batch_tokens)
        harness.weights(packed=False)
        us = Clocked(harness)
        peer = Clocked(HFLM(str(args.model), dtype=args.dtype, device=str(DEVICE)))
        for name in args.tasks.split(","):
            batch = args.generate_batch if name == "gsm8k" else args.batch
            peer.model.batch_size_per_gpu = batch
            rows.append(run_task(name, peer, us, o))
            progress(json.dumps(rows[-1]))

    # each task, and the totals
    largest = max(row["largest difference"] for row in rows)
    shown = [{**row, "largest difference": f"{row['largest difference']:.1e}"} for row in rows]
    print(table(shown))
    write_figures(args.json, shown)

    def total(name: str) -> float:
        return sum(row[name] for row in rows)

    return {
        "tasks": len(rows),
        "limit": args.limit,
        "largest_difference": largest,
        "same_scores": sum(abs(row["score: peer"] - row["us"]) < 1e-4 for row in rows),
        "ratio": round(total("wall s: peer") / total("us, wall"), 2),
        "CPU_ratio": round(total("CPU s: peer") / total("us, CPU"), 2),
    }


if __name__ == "__main__":
    finish(main, parser_of(Options).parse_args())

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
import time
from pathlib import Path

from bench.command import finish, make_parser, progress
from bench.tables import add_json_flag, write_figures
from eval.leaderboard import TASKS, Options, files_of, headline, task_manager, write_definitions
from eval.lm_eval_adapter import Harness, evaluate
from eval.stats import mean
from eval.table import table
from plumbing.options import RunOptions
from plumbing.ranks import DEVICE, distributed

CLOCKS = {"wall": time.perf_counter, "CPU": time.process_time}


class Clocked:
    """A model whose own work is timed: seconds by clock since the last reset."""

    def __init__(self, model):
        self.model = model
        self.reset()
        for name in ("loglikelihood", "generate_until"):
            setattr(model, name, self.clocked(getattr(model, name)))

    def reset(self) -> None:
        self.seconds = dict.fromkeys(CLOCKS, 0.0)

    def clocked(self, method):
        def work(*args, **named):
            before = {name: clock() for name, clock in CLOCKS.items()}
            results = method(*args, **named)
            for name, clock in CLOCKS.items():
                self.seconds[name] += clock() - before[name]
            return results

        return work


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


def run_task(name: str, peer: Clocked, us: Clocked, o: Options, batch: int) -> dict:
    """A task through both; returns its row."""
    tasks = write_definitions(name, files_of(TASKS[name], o), o)
    peer.model.batch_size_per_gpu = batch
    metric = TASKS[name].metric
    given = {}
    scores = {}
    for who in (peer, us):
        who.reset()
        manager = task_manager(name, tasks, o)
        found = evaluate(who.model, tasks, manager, o.limit, samples=True)
        given[who] = responses(found)
        scores[who] = mean([float(headline(found, task, metric)[0]) for task in tasks])
    row = {"task": name, **difference(given[peer], given[us])}
    row["score: peer"] = scores[peer]
    row["us"] = scores[us]

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
    o = Options(
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
        theirs = HFLM(
            pretrained=str(args.model),
            dtype=args.dtype,
            device=str(DEVICE),
            batch_size=args.batch,
        )
        peer = Clocked(theirs)
        for name in args.tasks.split(","):
            batch = args.generate_batch if name == "gsm8k" else args.batch
            rows.append(run_task(name, peer, us, o, batch))
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
    parser = make_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="files as for eval/leaderboard.py")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-lm-eval"), help="definitions")
    parser.add_argument("--tasks", default="arc_challenge,truthfulqa_mc2,mmlu,winogrande,gsm8k")
    parser.add_argument("--limit", type=int, default=20, help="questions a task, and MMLU subject")
    parser.add_argument("--subjects", type=int, default=3, help="of MMLU")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=1, help="of the peer; 1 suits a CPU")
    parser.add_argument("--generate-batch", type=int, default=8, help="the same, of generation")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="of ours")
    add_json_flag(parser)
    finish(main, parser.parse_args())

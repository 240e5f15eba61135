"""Our adapter for lm-evaluation-harness against its own model for transformers: the same numbers, and how much sooner.

    python bench/harness.py --model DIR --data DIR

Every task runs on the same questions through the peer (lm_eval's HFLM) and then through us, in one process; the seconds are
those of log-likelihoods and generation, tokenising included, loading (but of our second kind of weights, before generation)
and building the requests not. For each task: the
largest difference of two log-likelihoods, answers that differ, both scores, both times and their ratio, of the clock and of the
process's own CPU time: the second is the one to read where other programs run beside. --batch is the peer's.
Tables on standard output, JSON in the last line.
"""

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def timed(model, spent: dict):
    """Count the seconds of a model's own work."""

    def clocked(method):
        def work(*args, **named):
            start = time.perf_counter(), time.process_time()
            results = method(*args, **named)
            for name, now, before in zip(
                ("wall", "CPU"), (time.perf_counter(), time.process_time()), start, strict=True
            ):
                spent[name] = spent.get(name, 0) + now - before
            return results

        return work

    model.loglikelihood, model.generate_until = (
        clocked(model.loglikelihood),
        clocked(model.generate_until),
    )
    return model


def responses(found: dict) -> list:
    """What a model gave to every request: (log-likelihood, whether greedy) or a text."""
    return [
        of[0]
        for task in sorted(found["samples"])
        for sample in sorted(found["samples"][task], key=lambda s: s["doc_id"])
        if sample["filter"] in ("none", "strict-match")
        for of in sample["resps"]
    ]


def compare(theirs: list, ours: list) -> dict:
    pairs = list(zip(theirs, ours, strict=True))
    logps = [(a, b) for a, b in pairs if not isinstance(a, str)]
    return {
        "requests": len(pairs),
        "largest difference": max([abs(a[0] - b[0]) for a, b in logps], default=0.0),
        "greedy differs": sum(a[1] != b[1] for a, b in logps),
        "texts differ": sum(a != b for a, b in pairs if isinstance(a, str)),
    }


def main(args) -> dict:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from data import DEVICE, processes, write_text
    from eval.harness import Harness, evaluate, load_only
    from eval.leaderboard import TASKS, Options, define, files_of, headline
    from eval.report import table
    from eval.stats import mean

    o = Options(
        model=args.model, data=args.data, out=args.out, dtype=args.dtype, subjects=args.subjects
    )
    spent = {"peer": {}, "us": {}}
    with processes():
        us = Harness(args.model, o, args.batch_tokens)
        peer = timed(
            HFLM(
                pretrained=args.model, dtype=args.dtype, device=str(DEVICE), batch_size=args.batch
            ),
            spent["peer"],
        )
        us.weights(load_only)
        timed(us, spent["us"])
        rows = []
        for name in args.tasks.split(","):
            defined = define(name, files_of(TASKS[name], o), o)
            folder = Path(args.out) / "tasks" / name
            for task, text in defined.items():
                write_text(folder / f"{task}.yaml", json.dumps(text))
            found = {}
            for who, model in (("peer", peer), ("us", us)):
                spent[who].clear()
                peer.batch_size_per_gpu = args.generate_batch if name == "gsm8k" else args.batch
                manager = TaskManager(include_path=str(folder), include_defaults=False)
                found[who] = evaluate(model, [*defined], manager, args.limit, samples=True)
            score = {
                who: mean([float(headline(f, task, TASKS[name].metric)[0]) for task in defined])
                for who, f in found.items()
            }
            rows.append(
                {
                    "task": name,
                    **compare(responses(found["peer"]), responses(found["us"])),
                    "score: peer": score["peer"],
                    "us": score["us"],
                }
            )
            for clock, ratio in (("wall", "ratio"), ("CPU", "CPU ratio")):
                theirs, ours = spent["peer"][clock], spent["us"][clock]
                rows[-1] |= {
                    f"{clock} s: peer": round(theirs, 1),
                    f"us, {clock}": round(ours, 1),
                    ratio: round(theirs / ours, 2),
                }
            print(json.dumps(rows[-1]), flush=True)
    print(
        table([{**row, "largest difference": f"{row['largest difference']:.1e}"} for row in rows])
    )
    total = lambda name: sum(row[name] for row in rows)  # noqa: E731
    return {
        "tasks": len(rows),
        "limit": args.limit,
        "largest_difference": max(row["largest difference"] for row in rows),
        "same_scores": sum(abs(row["score: peer"] - row["us"]) < 1e-4 for row in rows),
        "ratio": round(total("wall s: peer") / total("us, wall"), 2),
        "CPU_ratio": round(total("CPU s: peer") / total("us, CPU"), 2),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--data", required=True, help="the tasks' files, as for eval/leaderboard.py"
    )
    parser.add_argument(
        "--out", default="runs/bench-harness", help="where the tasks' definitions are written"
    )
    parser.add_argument("--tasks", default="arc_challenge,truthfulqa_mc2,mmlu,winogrande,gsm8k")
    parser.add_argument(
        "--limit", type=int, default=20, help="questions a task, and a subject of MMLU"
    )
    parser.add_argument("--subjects", type=int, default=3, help="of MMLU")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--batch",
        type=int,
        default=1,
        help="requests a batch of the peer: 1 suits questions on a CPU",
    )
    parser.add_argument(
        "--generate-batch", type=int, default=8, help="the same, of answers that are written"
    )
    parser.add_argument("--batch-tokens", type=int, default=4096, help="ours")
    print(json.dumps(main(parser.parse_args())))

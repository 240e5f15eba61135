"""What came out of a run, from its files alone: tables over iterations, held-out scores, examples, metrics.jsonl.

    python -m eval.report runs/demo

loop.py calls report() at its end; its return value is the run's summary.
"""
import json
import sys
from pathlib import Path

from data import load_function, load_json, manifest_path, messages_of, read_jsonl, write_text


def counts_of(path: Path) -> dict:
    """The counts in a stage's manifest; empty where the stage did not run."""
    return load_json(manifest_path(path))["counts"] if manifest_path(path).is_file() else {}


def iteration_row(folder: Path, t: int, D: int) -> dict:
    """One line of the first table: yields, gap, mean words, scores, seconds by stage. D: pairs trained on."""
    prompts, pairs, policy, improver = (counts_of(folder / name) for name in (
        "prompts.jsonl", "pairs.jsonl", "eval.json", "eval_improver.json"))
    seconds = lambda *names: round(sum(counts_of(folder / n).get("seconds", 0) for n in names))  # noqa: E731
    return {"t": t, "lists": prompts["lists"], "prompts": prompts["prompts"], "valid": pairs["valid"],
            "pairs": pairs["pairs"], "D": D, "gap": pairs["mean_gap"], "words: chosen": pairs["chosen_words"],
            "rejected": pairs["rejected_words"], "M_t": policy.get("words", "-"), "score: R_t": improver.get("score", "-"),
            "M_t ": policy.get("score", "-"), "seconds: prompts": seconds("prompts.jsonl"),
            "answers": seconds("base_answers.jsonl", "answers.jsonl", "seed_answers.jsonl"),
            "improver": seconds("improver"), "rewrites": seconds("rewrites.jsonl", "pairs.jsonl"),
            "policy": seconds("policy"),
            "eval": seconds("heldout_answers.jsonl", "heldout_rewrites.jsonl", "eval.json", "eval_improver.json")}


def table(rows: list[dict]) -> str:
    """Rows of equal keys as aligned text."""
    cells = [list(rows[0])] + [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def evaluations(run: Path, T: int) -> dict[str, dict]:
    """Name -> result of every evaluated model: M_0, R_1, M_1, ..., and the controls where they were run."""
    files = {"M_0": run / "iter0/eval.json"}
    for t in range(1, T + 1):
        files |= {f"R_{t}": run / f"iter{t}/eval_improver.json", f"M_{t}": run / f"iter{t}/eval.json"}
    controls = run / "controls"
    files |= {"SFT on the seeds": controls / "seed_sft_eval.json", "pairs from the seeds": controls / "seed_pairs_eval.json",
              "one shot": controls / "one_shot/iter1/eval.json"}
    return {name: load_json(path) for name, path in files.items() if path.is_file()}


def show_examples(run: Path, T: int, count: int) -> None:
    """Some held-out prompts, evenly spread, with what the models made of them."""
    files = {"M_0": run / "iter0/heldout_answers.jsonl", f"M_{T - 1}, draft": run / f"iter{T - 1}/heldout_answers.jsonl",
             f"R_{T}, rewrite": run / f"iter{T}/heldout_rewrites.jsonl", f"M_{T}": run / f"iter{T}/heldout_answers.jsonl"}
    answers = {name: read_jsonl(path) for name, path in files.items() if path.is_file()}
    n = len(answers["M_0"])
    for i in [round((k + 0.5) * n / count) for k in range(min(count, n))]:
        print(f"\nprompt:          {messages_of(answers['M_0'][i])[-1]['content']}")
        for name, rows in answers.items():
            print(f"  {name + ':':<15}{rows[i]['response']}".replace("\n", "\n" + " " * 17))


def draw(results: dict[str, dict], T: int) -> str:
    """An SVG of held-out scores with standard errors: M_t and R_t by iteration, controls as dashed lines."""
    shown = {name: r for name, r in results.items() if "score" in r}
    low, high = (f(r["score"] + sign * 2 * r.get("se", 0) for r in shown.values()) for f, sign in ((min, -1), (max, 1)))
    x = lambda t: 60 + 380 * t / max(1, T)  # noqa: E731
    y = lambda score: 230 - 200 * (score - low) / max(1e-9, high - low)  # noqa: E731
    parts = [f'<text x="8" y="{y(v):.0f}">{v:.2f}</text>' for v in (low, (low + high) / 2, high)]
    line = " ".join(f"{x(t):.1f},{y(shown[f'M_{t}']['score']):.1f}" for t in range(T + 1))
    parts.append(f'<polyline points="{line}" fill="none" stroke="#1f6feb" stroke-width="2"/>')
    label = 240.0  # of the lowest control; labels keep apart where scores do not
    for name, r in sorted(shown.items(), key=lambda item: item[1]["score"]):
        if name[:2] in ("M_", "R_"):
            colour, at = ("#1f6feb", x(int(name[2:]))) if name[0] == "M" else ("#d9730d", x(int(name[2:])) - 30)
            top, bottom = (y(r["score"] + sign * r.get("se", 0)) for sign in (1, -1))
            parts.append(f'<line x1="{at}" x2="{at}" y1="{top:.1f}" y2="{bottom:.1f}" stroke="{colour}"/>'
                         f'<circle cx="{at}" cy="{y(r["score"]):.1f}" r="4" fill="{colour}"/>'
                         f'<text x="{at - 10}" y="252">{name}</text>')
        else:
            label = min(label - 14, y(r["score"]) + 4)
            parts.append(f'<line x1="60" x2="440" y1="{y(r["score"]):.1f}" y2="{y(r["score"]):.1f}" stroke="#888" '
                         f'stroke-dasharray="4"/><text x="455" y="{label:.1f}" fill="#666">{name}</text>')
    return ('<svg xmlns="http://www.w3.org/2000/svg" width="600" height="262" font-family="sans-serif" font-size="12">'
            '<rect width="600" height="262" fill="white"/><text x="60" y="16">held-out score, with standard errors</text>'
            + "".join(parts) + "</svg>\n")


def report(run: str | Path) -> dict:
    """Print the tables and examples of a finished run, write its metrics.jsonl; returns the summary."""
    run = Path(run)
    o = load_json(run / "config.json")
    T = 1 if o["one_shot"] else max(t for t in range(1, o["iters"] + 1) if (run / f"iter{t}/policy/manifest.json").is_file())
    sizes = [counts_of(run / f"iter{t}/pairs.jsonl")["pairs"] for t in range(1, T + 1)]
    rows = [iteration_row(run / f"iter{t}", t, sum(sizes[:t]) if o["data"] == "cumulative" else sizes[t - 1])
            for t in range(1, T + 1)]
    print(f"\niterations of {run}\n{table(rows)}")
    results = evaluations(run, T)
    if results:
        print(f"\nheld-out prompts, by {o['evaluate']}\n" + table(
            [{"": name, **{c: r.get(c, "-") for c in results["M_0"]}} for name, r in results.items()]))
        spec = o["evaluate"] if ".py:" in o["evaluate"] else f"eval/{o['evaluate']}.py:evaluate"
        print(load_function(spec).__globals__.get("NOTE", ""))  # what its numbers do and do not show
        write_text(run / "scores.svg", draw(results, T))
        show_examples(run, T, o["show"])
    stages = [{"stage": path.relative_to(run).as_posix().removesuffix("manifest.json").rstrip("./"), **manifest["counts"],
               "start_from": manifest["start_from"], "time": manifest["time"]}
              for path in run.glob("**/*manifest.json") for manifest in [load_json(path)]]
    stages.sort(key=lambda line: line["time"])
    write_text(run / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in stages))
    tokens = sum(line.get("tokens", 0) for line in stages)
    scores = [results[f"M_{t}"].get("score") for t in range(T + 1)] if results else []
    return {"scores": scores, "pairs": sizes, "tokens": tokens,
            "tokens_per_second": round(tokens / max(1e-9, sum(line["seconds"] for line in stages)), 1), "run_dir": str(run)}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(json.dumps(report(sys.argv[1])))

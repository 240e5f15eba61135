"""What came out of a run, from its files alone: tables over iterations, held-out scores, examples, metrics.jsonl, report.html.

    python -m eval.report runs/demo

loop.py calls report() at its end; its return value is the run's summary. report.html is one page that needs no network: curves,
yields, times, and every pair with what the improver changed. Its template eval/report.html draws what page_data() collects.
"""

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from data import (
    InputError,
    adapted,
    leaves,
    load_function,
    load_json,
    manifest_path,
    messages_of,
    option_help,
    read_jsonl,
    read_text,
    rng,
    write_text,
)
from eval.stats import plane

# What the time of an iteration goes to: name -> the results of its stages.
STAGES = {
    "prompts": ["prompts.jsonl"],
    "answers": ["base_answers.jsonl", "answers.jsonl", "seed_answers.jsonl"],
    "improver": ["improver"],
    "rewrites": ["rewrites.candidates.jsonl", "rewrites.jsonl", "pairs.jsonl"],
    "policy": ["policy"],
    "eval": [
        "heldout_answers.jsonl",
        "heldout_rewrites.candidates.jsonl",
        "heldout_rewrites.jsonl",
        "eval.json",
        "eval_improver.json",
    ],
}
BLOCK = 128  # pairs that the page parses at a time
COLUMNS = (
    "t",
    "score_chosen",
    "score_rejected",
    "chosen",
    "rejected",
    "draft",
)  # of all pairs; the last three: words
MAPPED = 2000  # prompts on the map


# ---------------------------------------------------------------------------------------------- what is printed


def counts_of(path: Path) -> dict:
    """The counts in a stage's manifest; empty where the stage did not run."""
    return load_json(manifest_path(path))["counts"] if manifest_path(path).is_file() else {}


def iteration_row(folder: Path, t: int, D: int) -> dict:
    """One line of the first table: yields, gap, mean words, scores, seconds by stage. D: pairs trained on."""
    prompts, pairs, policy, improver = (
        counts_of(folder / name)
        for name in ("prompts.jsonl", "pairs.jsonl", "eval.json", "eval_improver.json")
    )
    seconds = {
        name: round(sum(counts_of(folder / n).get("seconds", 0) for n in some))
        for name, some in STAGES.items()
    }
    return {
        "t": t,
        "lists": prompts["lists"],
        "prompts": prompts["prompts"],
        "valid": pairs["valid"],
        "pairs": pairs["pairs"],
        "D": D,
        "gap": pairs["mean_gap"],
        "words: chosen": pairs["chosen_words"],
        "rejected": pairs["rejected_words"],
        "M_t": policy.get("words", "-"),
        "score: R_t": improver.get("score", "-"),
        "M_t ": policy.get("score", "-"),
        "seconds: prompts": seconds.pop("prompts"),
        **seconds,
    }


def table(rows: list[dict]) -> str:
    """Rows of equal keys as aligned text."""
    cells = [list(rows[0])] + [
        [f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in cells
    )


def evaluations(run: Path, T: int) -> dict[str, dict]:
    """Name -> result of every evaluated model: M_0, R_1, M_1, ..., and the controls where they were run."""
    files = {"M_0": run / "iter0/eval.json"}
    for t in range(1, T + 1):
        files |= {
            f"R_{t}": run / f"iter{t}/eval_improver.json",
            f"M_{t}": run / f"iter{t}/eval.json",
        }
    controls = run / "controls"
    files |= {
        "SFT on the seeds": controls / "seed_sft_eval.json",
        "pairs from the seeds": controls / "seed_pairs_eval.json",
        "one shot": controls / "one_shot/iter1/eval.json",
    }
    return {name: load_json(path) for name, path in files.items() if path.is_file()}


def show_examples(run: Path, T: int, count: int) -> None:
    """Some held-out prompts, evenly spread, with what the models made of them."""
    files = {
        "M_0": run / "iter0/heldout_answers.jsonl",
        f"M_{T - 1}, draft": run / f"iter{T - 1}/heldout_answers.jsonl",
        f"R_{T}, rewrite": run / f"iter{T}/heldout_rewrites.jsonl",
        f"M_{T}": run / f"iter{T}/heldout_answers.jsonl",
    }
    answers = {name: read_jsonl(path) for name, path in files.items() if path.is_file()}
    n = len(answers["M_0"])
    for i in [round((k + 0.5) * n / count) for k in range(min(count, n))]:
        print(f"\nprompt:          {messages_of(answers['M_0'][i])[-1]['content']}")
        for name, rows in answers.items():
            print(f"  {name + ':':<15}{rows[i]['response']}".replace("\n", "\n" + " " * 17))


def draw(results: dict[str, dict], T: int) -> str:
    """An SVG of held-out scores with standard errors: M_t and R_t by iteration, controls as dashed lines."""
    shown = {name: r for name, r in results.items() if "score" in r}
    low, high = (
        f(r["score"] + sign * 2 * r.get("se", 0) for r in shown.values())
        for f, sign in ((min, -1), (max, 1))
    )
    x = lambda t: 60 + 380 * t / max(1, T)  # noqa: E731
    y = lambda score: 230 - 200 * (score - low) / max(1e-9, high - low)  # noqa: E731
    parts = [f'<text x="8" y="{y(v):.0f}">{v:.2f}</text>' for v in (low, (low + high) / 2, high)]
    line = " ".join(f"{x(t):.1f},{y(shown[f'M_{t}']['score']):.1f}" for t in range(T + 1))
    parts.append(f'<polyline points="{line}" fill="none" stroke="#1f6feb" stroke-width="2"/>')
    label = 240.0  # of the lowest control; labels keep apart where scores do not
    for name, r in sorted(shown.items(), key=lambda item: item[1]["score"]):
        if name[:2] in ("M_", "R_"):
            colour, at = (
                ("#1f6feb", x(int(name[2:])))
                if name[0] == "M"
                else ("#d9730d", x(int(name[2:])) - 30)
            )
            top, bottom = (y(r["score"] + sign * r.get("se", 0)) for sign in (1, -1))
            parts.append(
                f'<line x1="{at}" x2="{at}" y1="{top:.1f}" y2="{bottom:.1f}" stroke="{colour}"/>'
                f'<circle cx="{at}" cy="{y(r["score"]):.1f}" r="4" fill="{colour}"/>'
                f'<text x="{at - 10}" y="252">{name}</text>'
            )
        else:
            label = min(label - 14, y(r["score"]) + 4)
            parts.append(
                f'<line x1="60" x2="440" y1="{y(r["score"]):.1f}" y2="{y(r["score"]):.1f}" stroke="#888" '
                f'stroke-dasharray="4"/><text x="455" y="{label:.1f}" fill="#666">{name}</text>'
            )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="600" height="262" font-family="sans-serif" font-size="12">'
        '<rect width="600" height="262" fill="white"/><text x="60" y="16">held-out score, with standard errors</text>'
        + "".join(parts)
        + "</svg>\n"
    )


# ---------------------------------------------------------------------------------------------- report.html


def page_data(run: Path, o: dict, T: int, results: dict, stages: list[dict], note: str) -> dict:
    """All that report.html shows but the texts of the pairs; eval/report.html reads these names."""
    folders = [run / f"iter{t}" for t in range(1, T + 1)]
    made = {
        name: [counts_of(folder / f"{name}.jsonl") for folder in folders]
        for name in ("prompts", "pairs", "rewrites", "base_answers")
    }
    return {
        "run": run.resolve().name,
        "T": T,
        "options": changed_options(o),
        "note": note,
        "config": {
            name: o[name]
            for name in ("model", "iters", "seed", "rejected", "start", "data", "one_shot")
        }
        | {
            "loss": o["policy"]["loss"],
            "scorer": o["filter"]["scorer"],
            "threshold": o["filter"]["threshold"],
        },
        "seeds": counts_of(run / "generator").get("seeds"),
        "processes": max(
            (load_json(path).get("processes", 1) for path in run.glob("**/*manifest.json")),
            default=1,
        ),
        "evaluations": [{**numbers(result), "name": name} for name, result in results.items()],
        "benchmarks": benchmarks(run, T),
        "curves": [
            curve
            for curve in (
                curves(run / "generator"),
                *(
                    curves(folder / name, t)
                    for name in ("improver", "policy")
                    for t, folder in enumerate(folders, 1)
                ),
            )
            if curve
        ],
        "yields": {
            "prompts": [yields(counts, "lists", "prompts") for counts in made["prompts"]],
            "pairs": [yields(counts, "candidates", "valid") for counts in made["pairs"]],
        },
        "shares": shares(made),
        "times": times(stages),
        "map": prompt_map(run, o, folders),
    }


def numbers(result: dict) -> dict:
    return {name: value for name, value in result.items() if isinstance(value, int | float)}


def changed_options(o: dict) -> list[list]:
    """[name, value, default, help] of every option of a run that is not loop.py's default."""
    from loop import Options  # here: loop.py calls this file

    rows, default, loss = [], Options(), o.get("policy", {}).get("loss", "dpo")
    with suppress(InputError):  # a loss of somebody's own may be gone
        default = adapted(default, [f"--policy.loss={loss}"])
        default.policy.loss = Options().policy.loss
    for name, owner, field, _ in leaves(default):
        value = o
        for key in name.split("."):
            value = value.get(key, {})
        if value not in ({}, getattr(owner, field.name)):
            said = field.metadata.get("help") or option_help(type(owner)).get(field.name, "")
            rows.append([name, value, getattr(owner, field.name), said])
    return rows


def benchmarks(run: Path, T: int) -> dict[str, list]:
    """Benchmark -> numbers of M_0 .. M_T, None where a model was not measured."""
    files = {
        (path.parent.name, t): path
        for t in range(T + 1)
        for path in (run / f"iter{t}/eval").glob("*/result.json")
    }
    return {
        name: [
            numbers(load_json(files[name, t])) if (name, t) in files else None for t in range(T + 1)
        ]
        for name in sorted({name for name, _ in files})
    }


def curves(folder: Path, t: int = 0, most: int = 150) -> dict | None:
    """A finished training stage's metrics as columns, of at most so many points: means over as many steps each."""
    if not (folder / "metrics.jsonl").is_file() or not (folder / "manifest.json").is_file():
        return None
    rows = [json.loads(line) for line in read_text(folder / "metrics.jsonl").splitlines()]
    if not rows:  # 0 epochs
        return None
    width = max(1, math.ceil(len(rows) / most))
    parts = [rows[i : i + width] for i in range(0, len(rows), width)]
    columns = {
        name: [sum(row.get(name, math.nan) for row in part) / len(part) for part in parts]
        for name in rows[0]
    }
    return {"stage": folder.name, "t": t, "width": width, "columns": columns}


def yields(counts: dict, total: str, kept: str) -> dict:
    """How many there were, how many were kept, and what the others were dropped for, in a manifest's order."""
    names = list(counts)
    dropped = {name: counts[name] for name in names[names.index(total) + 1 : names.index(kept)]}
    if counts[kept] > counts.get("pairs", counts[kept]):
        dropped["surplus"] = counts[kept] - counts["pairs"]
    return {"total": counts[total], "kept": counts.get("pairs", counts[kept]), "dropped": dropped}


def shares(made: dict[str, list[dict]]) -> dict[str, list]:
    """Shares by iteration that say how well a stage did its work; None where it was not counted."""
    of = lambda name, part, whole: [
        c[part] / c[whole] if c.get(whole) and part in c else None for c in made[name]
    ]  # noqa: E731
    return {
        "prompts that use one of their keywords": [c.get("use_a_keyword") for c in made["prompts"]],
        "rewrites that leave the draft as it was": of("rewrites", "unchanged", "rewrites"),
        "rewrites cut off at the token limit": of("rewrites", "cut_off", "rewrites"),
        "answers of M_0 cut off": of("base_answers", "cut_off", "answers"),
    }


def times(stages: list[dict]) -> list[dict]:
    """Seconds and tokens by iteration (or of the controls, or of what is done once) and by what they were spent on."""
    groups = {"generator": "generator"} | {
        Path(file).stem: name for name, files in STAGES.items() for file in files
    }
    spent: dict[tuple, Counter] = {}
    for line in stages:
        first, _, rest = line["stage"].partition("/")
        where = first if re.fullmatch(r"iter\d+|controls", first) else "once"
        known = groups.get(
            line["stage"].rpartition("/")[2], "training" if "steps" in line else "other"
        )
        what = (
            "benchmarks" if "eval/" in rest else known
        )  # of a model, too: iter1/policy/eval/ifeval
        spent.setdefault((where, what), Counter()).update(
            seconds=line["seconds"], tokens=line.get("tokens", 0)
        )
    return [{"where": where, "what": what, **sums} for (where, what), sums in spent.items()]


def prompt_map(run: Path, o: dict, folders: list[Path]) -> dict:
    """Prompts as points of a plane: those of eval/diversity.py if it was run, else a cheap projection of their words."""
    placed = max(
        run.glob("iter*/eval/diversity/map.json"),
        key=lambda path: int(path.parts[-4][4:]),
        default=None,
    )
    if placed:
        points = [[row["x"], row["y"], row["source"], row["prompt"]] for row in load_json(placed)]
        return {"how": "Placed by eval/diversity.py.", "points": points}
    texts = lambda path: [messages_of(row)[-1]["content"] for row in read_jsonl(path)]  # noqa: E731
    found = [
        (f"iteration {t}", text)
        for t, folder in enumerate(folders, 1)
        for text in texts(folder / "prompts.jsonl")
    ]
    if Path(o["seeds"]).is_file():
        found += [("seeds", text) for text in texts(o["seeds"])[: o["seeds_limit"] or None]]
    total = len(found)
    if total > MAPPED:
        found = [found[i] for i in sorted(rng("map").sample(range(total), MAPPED))]
    points, share = project([text for _, text in found])
    return {
        "how": f"{len(found):,} of {total:,} prompts as TF-IDF vectors of their words, projected on the two directions in "
        f"which they differ most (PCA; {share:.0%} of their variance). Words only, no meaning: prompts lie close where "
        "they share words.",
        "points": [[*xy, *one] for xy, one in zip(points, found, strict=True)],
    }


def project(texts: list[str], most: int = 500) -> tuple[list[list[float]], float]:
    """Texts -> points of a plane, and the share of the variance that it holds: PCA of TF-IDF of the commonest words."""
    bags = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
    found = Counter(word for bag in bags for word in bag)
    words = [
        word for word, n in sorted(found.items(), key=lambda item: (-item[1], item[0])) if n > 1
    ][:most]
    if len(words) < 2:
        return [[0.0, 0.0] for _ in texts], 0.0
    X = np.array(
        [[bag[word] for word in words] for bag in bags], dtype=np.float64
    )  # (texts, words)
    X *= np.log(len(texts) / np.array([found[word] for word in words]))
    X /= np.maximum(np.linalg.norm(X, axis=1, keepdims=True), 1e-12)
    points, share = plane(X)
    return points.tolist(), share


def pair_rows(run: Path, T: int) -> Iterator[tuple[list, list]]:
    """Of every pair: (its numbers, by the names in COLUMNS; its texts: [id, prompt or turns, keywords, draft, chosen, rejected,
    M_0's answer]). 0 stands for a draft or an answer of M_0's that is the rejected text again: each text is there once."""
    for t in range(1, T + 1):
        folder = run / f"iter{t}"
        by_id = lambda name, field: (
            {row["id"]: row.get(field) for row in read_jsonl(folder / name)}
            if (folder / name).is_file()
            else {}
        )  # noqa: B023, E731
        keywords, drafts, base = (
            by_id(f"{name}.jsonl", field)
            for name, field in (
                ("prompts", "keywords"),
                ("rewrites", "draft"),
                ("base_answers", "response"),
            )
        )
        for row in read_jsonl(folder / "pairs.jsonl"):
            draft, chosen, rejected, answer = (
                drafts.get(row["id"]),
                row["chosen"],
                row["rejected"],
                base.get(row["id"]),
            )
            words = [
                None if text is None else len(text.split()) for text in (chosen, rejected, draft)
            ]
            once = lambda text: text if text != rejected else 0  # noqa: B023, E731
            yield (
                [t, row.get("score_chosen"), row.get("score_rejected"), *words],
                [
                    row["id"],
                    row.get("messages") or row["prompt"],
                    keywords.get(row["id"]),
                    once(draft),
                    chosen,
                    rejected,
                    once(answer),
                ],
            )


def plain(value):
    """What JSON has a form for: six digits of a number, None for NaN and infinity, which JSON.parse refuses."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def script(value, attributes: str) -> str:
    """A <script> element that holds a value as JSON. Model text may hold "</script>" or "<!--": no "<" stays as it is."""
    text = re.sub(
        "[<\u2028\u2029\ud800-\udfff]",
        lambda c: f"\\u{ord(c[0]):04x}",
        json.dumps(plain(value), ensure_ascii=False),
    )
    return f'<script type="application/json" {attributes}>{text}</script>\n'


def write_page(run: Path, data: dict) -> None:
    """RUN/report.html: the template with the data in it. The texts of pairs come in blocks, to be parsed when shown."""
    pairs = [*pair_rows(run, data["T"])]
    columns = (
        dict(zip(COLUMNS, zip(*[row for row, _ in pairs], strict=True), strict=True))
        if pairs
        else {}
    )
    blocks = [[texts for _, texts in pairs[i : i + BLOCK]] for i in range(0, len(pairs), BLOCK)]
    head, tail = read_text(Path(__file__).with_suffix(".html")).split("<!-- DATA -->\n")
    write_text(
        run / "report.html",
        "".join(
            [
                head,
                script({**data, "pairs": columns, "block": BLOCK}, 'id="data"'),
                *(script(block, 'class="pairs"') for block in blocks),
                tail,
            ]
        ),
    )


# ---------------------------------------------------------------------------------------------- all of it


def finished(run: Path, o: dict) -> int:
    """How many iterations of a run are done, evaluation included."""
    iters = 1 if o["one_shot"] else o["iters"]
    last = "eval.json" if o["evaluate"] else "policy/manifest.json"
    return max((t for t in range(1, iters + 1) if (run / f"iter{t}" / last).is_file()), default=0)


def finished_stages(run: Path) -> list[dict]:
    """A line for every manifest, oldest first. A benchmark inside a run is a stage of stages: the time of the whole is its
    result's, the tokens are those of the parts."""
    lines, paths = [], sorted(run.glob("**/*manifest.json"))
    whole = {path.parent for path in paths if path.name == "result.manifest.json"}
    for path in paths:
        manifest = load_json(path)
        counts = manifest["counts"] | (
            {"tokens" if path.name == "result.manifest.json" else "seconds": 0}
            if path.parent in whole
            else {}
        )
        lines.append(
            {
                "stage": path.relative_to(run)
                .as_posix()
                .removesuffix("manifest.json")
                .rstrip("./"),
                **counts,
                "start_from": manifest["start_from"],
                "time": manifest["time"],
            }
        )
    return sorted(lines, key=lambda line: line["time"])


def report(run: str | Path) -> dict:
    """Print the tables and examples of a run, write its metrics.jsonl and report.html; returns the summary."""
    run, note = Path(run), ""
    o = load_json(run / "config.json")
    T = finished(run, o)
    sizes = [counts_of(run / f"iter{t}/pairs.jsonl")["pairs"] for t in range(1, T + 1)]
    rows = [
        iteration_row(
            run / f"iter{t}", t, sum(sizes[:t]) if o["data"] == "cumulative" else sizes[t - 1]
        )
        for t in range(1, T + 1)
    ]
    print(f"\niterations of {run}\n{table(rows) if rows else 'none is finished'}")
    results = evaluations(run, T)
    if results:
        print(
            f"\nheld-out prompts, by {o['evaluate']}\n"
            + table(
                [
                    {"": name, **{c: r.get(c, "-") for c in results["M_0"]}}
                    for name, r in results.items()
                ]
            )
        )
        with suppress(
            Exception
        ):  # the file may be gone, or not be imported here: no reason to have no report
            note = load_function(o["evaluate"]).__globals__.get(
                "NOTE", ""
            )  # what its numbers do and do not show
        print(note)
        if "score" in results["M_0"]:
            write_text(run / "scores.svg", draw(results, T))
        show_examples(run, T, o["show"])
    stages = finished_stages(run)
    write_text(run / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in stages))
    write_page(run, page_data(run, o, T, results, stages, note))
    tokens = sum(line.get("tokens", 0) for line in stages)
    scores = [results[f"M_{t}"].get("score") for t in range(T + 1)] if results else []
    return {
        "scores": scores,
        "pairs": sizes,
        "tokens": tokens,
        "tokens_per_second": round(tokens / max(1e-9, sum(line["seconds"] for line in stages)), 1),
        "run_dir": str(run),
    }


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    try:
        print(json.dumps(report(sys.argv[1])))
    except InputError as error:
        sys.exit(f"error: {error}")

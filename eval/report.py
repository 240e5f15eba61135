"""The report of a run, from its files alone: tables, held-out scores, examples, and one page.

    python -m eval.report runs/demo

loop.py calls report() at its end; what it returns is the run's summary. It prints tables over the
iterations, held-out scores and examples, and writes metrics.jsonl, scores.svg and report.html: one
page that needs no network, with curves, yields, times, and every pair with what the improver
changed. The template eval/report.html draws what page_data() collects.
"""

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from eval import heldout
from eval.stats import plane
from eval.table import table
from plumbing.options import load_function
from plumbing.records import (
    InputError,
    last_message,
    load_json,
    read_jsonl,
    read_text,
    rng,
    write_text,
)
from plumbing.stage import counts_of

# What the time of an iteration goes to: name -> the results of its stages.
STAGES = {
    "prompts": ["prompts.jsonl"],
    "answers": ["base_answers.jsonl", "answers.jsonl", "seed_answers.jsonl"],
    "improver": ["improver"],
    "rewrites": ["rewrites.jsonl", "pairs.jsonl"],
    "policy": ["policy"],
    "eval": ["heldout_answers.jsonl", "heldout_rewrites.jsonl", "eval.json", "eval_improver.json"],
}
BLOCK = 128  # pairs that the page parses at a time
# The numbers of a pair on the page; the last three are words of that text.
COLUMNS = ("t", "score_chosen", "score_rejected", "chosen", "rejected", "draft")
MAPPED = 2000  # prompts on the map, at most
POINTS = 150  # of a curve, at most
COMMON_WORDS = 500  # that the map tells prompts apart by

BLUE = "#1f6feb"
ORANGE = "#d9730d"

# -------------------------------------------------------------------------------- files of a run


def finished_files(run: Path, pattern: str) -> list[Path]:
    """The files below a run that match a pattern, sorted, without unfinished stages' scratch."""
    found = sorted(run.glob(pattern))
    return [path for path in found if ".partial/" not in f"{path.relative_to(run)}/"]


def finished(run: Path, o: dict) -> int:
    """The number of iterations that are finished, evaluation included."""
    iters = 1 if o["one_shot"] else o["iters"]
    last = "eval.json" if o["heldout"] else "policy/manifest.json"
    done = [t for t in range(1, iters + 1) if (run / f"iter{t}" / last).is_file()]
    return max(done, default=0)


def finished_stages(run: Path) -> list[dict]:
    """A line for every manifest, oldest first."""
    paths = finished_files(run, "**/*manifest.json")
    measured = {path.parent for path in paths if path.name == "result.manifest.json"}
    lines = []
    for path in paths:
        manifest = load_json(path)
        counts = dict(manifest["counts"])
        # a benchmark's result took the time of its parts, which have the tokens: count each once
        if path.parent in measured:
            counts["tokens" if path.name == "result.manifest.json" else "seconds"] = 0
        name = path.relative_to(run).as_posix().removesuffix("manifest.json").rstrip("./")
        about = {"paths": manifest.get("paths", {}), "time": manifest["time"]}
        lines.append({"stage": name, **counts, **about})
    return sorted(lines, key=lambda line: line["time"])


# -------------------------------------------------------------------------------- what is printed


def iteration_row(folder: Path, t: int, D: int) -> dict:
    """A row of the first table: yields, gap, mean words, scores, seconds. D: pairs trained on."""
    prompts = counts_of(folder / "prompts.jsonl")
    pairs = counts_of(folder / "pairs.jsonl")
    policy = counts_of(folder / "eval.json")
    improver = counts_of(folder / "eval_improver.json")
    # seconds of the stages of each kind
    seconds = {}
    for name, results in STAGES.items():
        spent = sum(counts_of(folder / result).get("seconds", 0) for result in results)
        seconds[name] = round(spent)
    return {
        "t": t,
        "lists": prompts.get("lists", "-"),  # a method may have no generator
        "prompts": prompts.get("prompts", "-"),
        "valid": pairs.get("valid", "-"),
        "pairs": pairs["pairs"],
        "D": D,
        "gap": pairs.get("mean_gap", "-"),
        "words: chosen": pairs.get("chosen_words", "-"),
        "rejected": pairs.get("rejected_words", "-"),
        "M_t": policy.get("words", "-"),
        "score: R_t": improver.get("score", "-"),
        "M_t ": policy.get("score", "-"),
        "seconds: prompts": seconds.pop("prompts"),
        **seconds,
    }


def evaluations(run: Path, T: int) -> dict[str, dict]:
    """Name -> held-out numbers of every evaluated model: M_0, R_1, M_1, ..., and the controls."""
    files = {"M_0": run / "iter0/eval.json"}
    for t in range(1, T + 1):
        files[f"R_{t}"] = run / f"iter{t}/eval_improver.json"
        files[f"M_{t}"] = run / f"iter{t}/eval.json"
    # there only after methods/controls.py
    files["SFT on the seeds"] = run / "controls/seed_sft_eval.json"
    files["pairs from the seeds"] = run / "controls/seed_pairs_eval.json"
    files["one shot"] = run / "controls/one_shot/iter1/eval.json"
    return {name: load_json(path) for name, path in files.items() if path.is_file()}


def note_of(spec: str) -> str:
    """What an evaluation's numbers do and do not show: NOTE of its module, "" if it has none.

    spec: the option --evaluate; without one, the numbers are those of eval/heldout.py.
    """
    if not spec:
        return heldout.NOTE
    # the file may be gone, or not importable here: no reason to have no report
    with suppress(Exception):
        function = load_function(spec)
        return getattr(sys.modules[function.__module__], "NOTE", "")
    return ""


def show_examples(run: Path, T: int, count: int) -> None:
    """Print some held-out prompts, evenly spread, with the answers of the models."""
    files = {
        "M_0": run / "iter0/heldout_answers.jsonl",
        f"M_{T - 1}, draft": run / f"iter{T - 1}/heldout_answers.jsonl",
        f"R_{T}, rewrite": run / f"iter{T}/heldout_rewrites.jsonl",
        f"M_{T}": run / f"iter{T}/heldout_answers.jsonl",
    }
    answers = {name: read_jsonl(path) for name, path in files.items() if path.is_file()}
    # the same records of each file, further lines of an answer indented below its first
    prompts = answers["M_0"]
    n = len(prompts)
    for k in range(min(count, n)):
        i = round((k + 0.5) * n / count)
        print(f"\nprompt:          {last_message(prompts[i])}")
        for name, rows in answers.items():
            line = f"  {name + ':':<15}{rows[i]['response']}"
            print(line.replace("\n", "\n" + " " * 17))


def score_chart(results: dict[str, dict], T: int) -> str:
    """An SVG of held-out scores with standard errors: M_t and R_t by iteration, controls dashed."""
    shown = {name: r for name, r in results.items() if "score" in r}
    low = min(r["score"] - 2 * r.get("se", 0) for r in shown.values())
    high = max(r["score"] + 2 * r.get("se", 0) for r in shown.values())

    def x(t: int) -> float:
        return 60 + 380 * t / max(1, T)

    def y(score: float) -> float:
        return 230 - 200 * (score - low) / max(1e-9, high - low)

    # the axis, and the line from M_0 to M_T
    parts = []
    for value in (low, (low + high) / 2, high):
        parts.append(f'<text x="8" y="{y(value):.0f}">{value:.2f}</text>')
    points = []
    for t in range(T + 1):
        score = shown[f"M_{t}"]["score"]
        points.append(f"{x(t):.1f},{y(score):.1f}")
    line = " ".join(points)
    parts.append(f'<polyline points="{line}" fill="none" stroke="{BLUE}" stroke-width="2"/>')

    # from the lowest score up, so that the labels of controls keep apart where scores do not
    label = 240.0
    for name, r in sorted(shown.items(), key=lambda item: item[1]["score"]):
        if name.startswith("M_"):
            parts += score_point(name, r, x(int(name[2:])), y, BLUE)
        elif name.startswith("R_"):
            parts += score_point(name, r, x(int(name[2:])) - 30, y, ORANGE)
        else:
            label = min(label - 14, y(r["score"]) + 4)
            parts += control_line(name, y(r["score"]), label)
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" width="600" height="262" '
        'font-family="sans-serif" font-size="12"><rect width="600" height="262" fill="white"/>'
        '<text x="60" y="16">held-out score, with standard errors</text>'
    )
    return head + "".join(parts) + "</svg>\n"


def score_point(name: str, r: dict, x: float, y: Callable, colour: str) -> list[str]:
    """A model's score as a point with its standard error, and its name on the axis."""
    top = y(r["score"] + r.get("se", 0))
    bottom = y(r["score"] - r.get("se", 0))
    return [
        f'<line x1="{x}" x2="{x}" y1="{top:.1f}" y2="{bottom:.1f}" stroke="{colour}"/>',
        f'<circle cx="{x}" cy="{y(r["score"]):.1f}" r="4" fill="{colour}"/>',
        f'<text x="{x - 10}" y="252">{name}</text>',
    ]


def control_line(name: str, y: float, label: float) -> list[str]:
    """A control's score as a dashed line; label: the height of its name."""
    return [
        f'<line x1="60" x2="440" y1="{y:.1f}" y2="{y:.1f}" stroke="#888" stroke-dasharray="4"/>',
        f'<text x="455" y="{label:.1f}" fill="#666">{name}</text>',
    ]


# -------------------------------------------------------------------------------- the page's data


def page_data(run: Path, o: dict, T: int, results: dict, stages: list[dict], note: str) -> dict:
    """All that report.html shows but the pairs; eval/report.html reads these names."""
    folders = [run / f"iter{t}" for t in range(1, T + 1)]
    changed = run / "changed.json"
    # counts of stages, a list over iterations each
    made = {
        name: [counts_of(folder / f"{name}.jsonl") for folder in folders]
        for name in ("prompts", "pairs", "rewrites", "base_answers")
    }
    # the run as a whole
    about = ("model", "iters", "seed", "rejected", "start", "data", "one_shot")
    config = {name: o[name] for name in about}
    config["loss"] = o["policy"]["loss"]
    config["scorer"] = o["pairs"]["scorer"]
    config["threshold"] = o["pairs"]["threshold"]
    manifests = [load_json(path) for path in finished_files(run, "**/*manifest.json")]
    return {
        "run": run.resolve().name,
        "T": T,
        "options": load_json(changed) if changed.is_file() else [],
        "note": note,
        "config": config,
        "seeds": counts_of(run / "generator").get("seeds"),
        "processes": max((manifest.get("processes", 1) for manifest in manifests), default=1),
        "evaluations": [{**numbers(result), "name": name} for name, result in results.items()],
        "benchmarks": benchmarks(run, T),
        "curves": all_curves(run, folders),
        "yields": {
            "prompts": [yields(counts, "lists", "prompts") for counts in made["prompts"]],
            "pairs": [yields(counts, "candidates", "valid") for counts in made["pairs"]],
        },
        "shares": shares(made),
        "times": times(stages),
        "map": prompt_map(run, folders),
    }


def numbers(result: dict) -> dict:
    return {name: value for name, value in result.items() if isinstance(value, int | float)}


def benchmarks(run: Path, T: int) -> dict[str, list]:
    """Benchmark -> numbers of M_0 .. M_T, None where a model was not measured."""
    found: dict[str, list] = {}
    for t in range(T + 1):
        for path in finished_files(run, f"iter{t}/eval/*/result.json"):
            results = found.setdefault(path.parent.name, [None] * (T + 1))
            results[t] = numbers(load_json(path))
    return dict(sorted(found.items()))


def all_curves(run: Path, folders: list[Path]) -> list[dict]:
    """The curves of G, then of every R_t, then of every M_t."""
    found = [curves(run / "generator")]
    for name in ("improver", "policy"):
        found += [curves(folder / name, t) for t, folder in enumerate(folders, 1)]
    return [one for one in found if one]


def curves(folder: Path, t: int = 0) -> dict | None:
    """A finished training stage's metrics as columns, averaged over `width` steps for each point.

    None where the stage is not finished or had no step.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file() or not (folder / "manifest.json").is_file():
        return None
    rows = [json.loads(line) for line in read_text(path).splitlines()]
    if not rows:
        return None
    # a value may be missing, or null
    width = max(1, math.ceil(len(rows) / POINTS))
    parts = [rows[i : i + width] for i in range(0, len(rows), width)]
    columns = {}
    for name in rows[0]:
        lists = [[row.get(name) for row in part] for part in parts]
        columns[name] = [math.nan if None in some else sum(some) / len(some) for some in lists]
    return {"stage": folder.name, "t": t, "width": width, "columns": columns}


def yields(counts: dict, total: str, kept: str) -> dict:
    """How many there were, how many were kept, and why the others were dropped.

    A manifest's counts name the reasons between the two, in their order.
    """
    names = list(counts)
    reasons = names[names.index(total) + 1 : names.index(kept)]
    dropped = {name: counts[name] for name in reasons}
    used = counts.get("pairs", counts[kept])
    if counts[kept] > used:
        dropped["surplus"] = counts[kept] - used
    return {"total": counts[total], "kept": used, "dropped": dropped}


def shares(made: dict[str, list[dict]]) -> dict[str, list]:
    """Shares by iteration that say how well a stage did its work; None where it was not counted."""
    rewrites = made["rewrites"]
    answers = made["base_answers"]
    return {
        "prompts that use one of their keywords": [c.get("use_a_keyword") for c in made["prompts"]],
        "rewrites that leave the draft as it was": [
            share(c, "unchanged", "rewrites") for c in rewrites
        ],
        "rewrites cut off at the token limit": [share(c, "cut_off", "rewrites") for c in rewrites],
        "answers of M_0 cut off": [share(c, "cut_off", "answers") for c in answers],
    }


def share(counts: dict, part: str, whole: str) -> float | None:
    return counts[part] / counts[whole] if counts.get(whole) and part in counts else None


def times(stages: list[dict]) -> list[dict]:
    """Seconds and tokens by iteration and kind of stage.

    In place of an iteration: "controls", or "once" for what is done once a run.
    """
    kinds = {"generator": "generator"}
    for kind, results in STAGES.items():
        kinds |= {Path(result).stem: kind for result in results}
    spent: dict[tuple, Counter] = {}
    for line in stages:
        first, _, rest = line["stage"].partition("/")
        where = first if re.fullmatch(r"iter\d+|controls", first) else "once"
        # a benchmark may be of a model that has one of these names: iter1/policy/eval/ifeval
        what = "training" if "steps" in line else "other"
        what = kinds.get(line["stage"].rpartition("/")[2], what)
        if "eval/" in rest:
            what = "benchmarks"
        sums = spent.setdefault((where, what), Counter())
        sums.update(seconds=line["seconds"], tokens=line.get("tokens", 0))
    return [{"where": where, "what": what, **sums} for (where, what), sums in spent.items()]


# -------------------------------------------------------------------------------- the page's map


def prompt_map(run: Path, folders: list[Path]) -> dict:
    """Prompts as points of a plane, from eval/diversity.py where it ran, else by their words."""
    placed = finished_files(run, "iter*/eval/diversity/map.json")
    if placed:
        last = max(placed, key=lambda path: int(path.parts[-4].removeprefix("iter")))
        points = [[row["x"], row["y"], row["source"], row["prompt"]] for row in load_json(last)]
        return {"how": "Placed by eval/diversity.py.", "points": points}

    # (source, text) of the prompts of all iterations and of the seeds
    found = []
    for t, folder in enumerate(folders, 1):
        rows = read_jsonl(folder / "prompts.jsonl")
        found += [(f"iteration {t}", last_message(row)) for row in rows]
    if (run / "seeds.jsonl").is_file():
        found += [("seeds", last_message(row)) for row in read_jsonl(run / "seeds.jsonl")]

    # a sample of them, projected
    total = len(found)
    if total > MAPPED:
        found = [found[i] for i in sorted(rng("map").sample(range(total), MAPPED))]
    points, held = project([text for _, text in found])
    how = (
        f"{len(found):,} of {total:,} prompts as TF-IDF vectors of their words, projected on the "
        f"two directions in which they differ most (PCA; {held:.0%} of their variance). Words "
        "only, no meaning: prompts lie close where they share words."
    )
    return {"how": how, "points": [[*xy, *one] for xy, one in zip(points, found, strict=True)]}


def project(texts: list[str]) -> tuple[list[list[float]], float]:
    """Texts -> points of a plane, and its share of the variance: PCA of TF-IDF of common words."""
    # the commonest words, but none that occurs only once
    bags = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
    found = Counter(word for bag in bags for word in bag)
    words = sorted((word for word, n in found.items() if n > 1), key=lambda w: (-found[w], w))
    words = words[:COMMON_WORDS]
    if len(words) < 2:
        return [[0.0, 0.0] for _ in texts], 0.0
    # TF-IDF, rows of length 1
    X = np.array([[bag[word] for word in words] for bag in bags], float)  # (texts, words)
    X *= np.log(len(texts) / np.array([found[word] for word in words]))
    X /= np.maximum(np.linalg.norm(X, axis=1, keepdims=True), 1e-12)
    points, share = plane(X)
    return points.tolist(), share


# -------------------------------------------------------------------------------- the page


def pair_rows(run: Path, T: int) -> Iterator[tuple[list, list]]:
    """The numbers of every pair, by the names in COLUMNS, and its texts.

    Texts: [id, prompt or turns, keywords, draft, chosen, rejected, M_0's answer]. A draft or an
    answer of M_0's that is the rejected text again is 0, so that each text is there once.
    """
    for t in range(1, T + 1):
        folder = run / f"iter{t}"
        keywords = field_by_id(folder / "prompts.jsonl", "keywords")
        drafts = field_by_id(folder / "rewrites.jsonl", "draft")
        answers = field_by_id(folder / "base_answers.jsonl", "response")
        for row in read_jsonl(folder / "pairs.jsonl"):
            draft = drafts.get(row["id"])
            answer = answers.get(row["id"])
            # the numbers
            texts = (row["chosen"], row["rejected"], draft)
            words = [None if text is None else len(text.split()) for text in texts]
            scores = [row.get("score_chosen"), row.get("score_rejected")]
            # the texts
            rejected = row["rejected"]
            once = [0 if text == rejected else text for text in (draft, answer)]
            asked = row.get("messages") or row["prompt"]
            shown = [row["id"], asked, keywords.get(row["id"]), once[0], row["chosen"], rejected]
            yield [t, *scores, *words], [*shown, once[1]]


def field_by_id(path: Path, field: str) -> dict:
    """id -> a field of the records of a file; {} where there is no file."""
    rows = read_jsonl(path) if path.is_file() else []
    return {row["id"]: row.get(field) for row in rows}


def plain(value):
    """A value as JSON can hold it: six digits of a number; None for NaN and infinity."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def script(value, attributes: str) -> str:
    """A <script> element that holds a value as JSON.

    Text of a model may hold "</script>" or "<!--": no "<" stays as it is.
    """
    text = json.dumps(plain(value), ensure_ascii=False)
    text = re.sub("[<\u2028\u2029\ud800-\udfff]", lambda c: f"\\u{ord(c[0]):04x}", text)
    return f'<script type="application/json" {attributes}>{text}</script>\n'


def write_page(run: Path, data: dict) -> None:
    """Write RUN/report.html: the template with the data in it."""
    pairs = list(pair_rows(run, data["T"]))
    columns = {}
    if pairs:
        columns = dict(zip(COLUMNS, zip(*[row for row, _ in pairs], strict=True), strict=True))
    scripts = [script({**data, "pairs": columns, "block": BLOCK}, 'id="data"')]
    # the texts of pairs come in blocks, to be parsed when shown
    for i in range(0, len(pairs), BLOCK):
        scripts.append(script([texts for _, texts in pairs[i : i + BLOCK]], 'class="pairs"'))
    head, tail = read_text(Path(__file__).with_suffix(".html")).split("<!-- DATA -->\n")
    write_text(run / "report.html", head + "".join(scripts) + tail)


# -------------------------------------------------------------------------------- all of it


def report(run: str | Path) -> dict:
    """Print the tables and examples of a run, write its files; returns the run's summary."""
    run = Path(run)
    o = load_json(run / "config.json")
    T = finished(run, o)
    sizes = [counts_of(run / f"iter{t}/pairs.jsonl")["pairs"] for t in range(1, T + 1)]

    # iterations
    rows = []
    for t in range(1, T + 1):
        D = sum(sizes[:t]) if o["data"] == "cumulative" else sizes[t - 1]
        rows.append(iteration_row(run / f"iter{t}", t, D))
    print(f"\niterations of {run}\n{table(rows) if rows else 'none is finished'}")

    # the held-out evaluation
    results = evaluations(run, T)
    note = ""
    if results:
        names = list(results["M_0"])
        rows = []
        for name, result in results.items():
            rows.append({"": name, **{column: result.get(column, "-") for column in names}})
        note = note_of(o["evaluate"])
        by = o["evaluate"] or "eval/heldout.py:evaluate"
        print(f"\nheld-out prompts, by {by}\n{table(rows)}\n{note}")
        if "score" in results["M_0"]:
            write_text(run / "scores.svg", score_chart(results, T))
        show_examples(run, T, o["show"])

    # files
    stages = finished_stages(run)
    write_text(run / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in stages))
    write_page(run, page_data(run, o, T, results, stages, note))

    # summary
    tokens = sum(line.get("tokens", 0) for line in stages)
    seconds = sum(line["seconds"] for line in stages)
    return {
        "scores": [results[f"M_{t}"].get("score") for t in range(T + 1)] if results else [],
        "pairs": sizes,
        "tokens": tokens,
        "tokens_per_second": round(tokens / max(1e-9, seconds), 1),
        "run_dir": str(run),
    }


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    try:
        print(json.dumps(report(sys.argv[1])))
    except InputError as error:
        sys.exit(f"error: {error}")

"""The report of a run, from its files alone: tables, held-out scores, examples, and one page.

    python -m eval.report runs/demo

loop.py calls report() at its end; what it returns is the run's summary. It prints tables over the
iterations, held-out scores and examples, and writes metrics.jsonl, scores.svg, a model card for
every policy (eval/model_card.py) and report.html: one page that needs no network, with curves,
yields, times, and every pair with what the improver changed. The template eval/report.html draws
what page_data() collects.
"""

import json
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from eval import heldout, ifeval
from eval.answers import read_lines
from eval.diagnostics import diagnose, difference, warnings
from eval.model_card import write_cards
from eval.table import table
from formats.plugins import load_function
from formats.records import last_message, read_jsonl
from plumbing.files import InputError, flatten, load_json, read_text, write_jsonl, write_text
from plumbing.options import RunOptions, as_dict, as_flags, flags_of
from plumbing.stage import counts_of

# Columns of the first table: name -> a result of the iteration, and the count shown.
COLUMNS = {
    "lists": ("prompts.jsonl", "lists"),
    "prompts": ("prompts.jsonl", "prompts"),
    "valid": ("pairs.jsonl", "valid"),
    "pairs": ("pairs.jsonl", "pairs"),
    "D": ("policy", "pairs"),  # --data cumulative: and those of earlier iterations
    "gap": ("pairs.jsonl", "mean_gap"),
    "words: chosen": ("pairs.jsonl", "chosen_words"),
    "rejected": ("pairs.jsonl", "rejected_words"),
    "M_t": ("eval.json", "words"),
    "score: R_t": ("eval_improver.json", "score"),
    "M_t ": ("eval.json", "score"),
}
# Where the time of an iteration goes: stage -> kind.
KINDS = {
    "generator": "generator",
    "prompts": "prompts",
    "base_answers": "answers",
    "samples": "answers",
    "segments": "answers",
    "verdicts": "answers",
    "answers": "answers",
    "seed_answers": "answers",
    "improver": "improver",
    "rewrites": "rewrites",
    "pairs": "rewrites",
    "policy": "policy",
    "average": "policy",
    "heldout_answers": "eval",
    "heldout_rewrites": "eval",
    "eval": "eval",
    "eval_improver": "eval",
    "eval_rewrites": "eval",
    "eval_samples": "eval",
    "heldout_samples": "eval",
}
# Shares on the page: title -> result, part and whole among its counts.
SHARES = {
    "rewrites that leave the draft as it was": ("rewrites.jsonl", "unchanged", "rewrites"),
    "rewrites cut off at the token limit": ("rewrites.jsonl", "cut_off", "rewrites"),
    "answers of M_0 cut off": ("base_answers.jsonl", "cut_off", "answers"),
}
# Numbers of a pair on the page; the last three count words.
NUMBERS = ("t", "score_chosen", "score_rejected", "chosen", "rejected", "draft")
BLOCK = 128  # pairs that the page parses at a time
POINTS = 150  # max points of a curve

COLOURS = {"M_": "#1f6feb", "R_": "#d9730d"}  # of models in scores.svg; controls are grey

# -------------------------------------------------------------------------------- options of a run


def changed(o) -> list[list]:
    """Rows of changed.json: [name, value, default, help] of each option that is not its default."""
    values = flatten(as_dict(o))
    rows = []
    for flag in flags_of(RunOptions, []) + flags_of(type(o), as_flags(as_dict(o))):
        default = str(flag.default) if isinstance(flag.default, Path) else flag.default
        if values[flag.name] != default:
            rows.append([flag.name, values[flag.name], default, flag.help])
    return rows


def option_differences(before: dict, now: dict, config: Path) -> str:
    """How options differ from an earlier call's, to end a refusal with; empty if they do not."""
    old, new = flatten(before), flatten(now)
    changes = [f"{k} {old[k]} -> {new[k]}" for k in new if k in old and old[k] != new[k]]
    return f" (options that differ from {config}: {', '.join(changes)})" if changes else ""


# -------------------------------------------------------------------------------- files of a run


def finished_files(run: Path, pattern: str) -> list[Path]:
    """The files below a run that match a pattern, sorted, without unfinished stages' scratch."""
    found = sorted(run.glob(pattern))
    return [path for path in found if ".partial/" not in f"{path.relative_to(run)}/"]


def finished(run: Path, o: dict) -> int:
    """The number of iterations that are finished, evaluation included."""
    last = "eval.json" if o["heldout"] else "policy/manifest.json"
    done = [t for t in range(1, o["iters"] + 1) if (run / f"iter{t}" / last).is_file()]
    return max(done, default=0)


def finished_stages(run: Path) -> list[dict]:
    """A line for every manifest, oldest first."""
    lines = []
    for path in finished_files(run, "**/*manifest.json"):
        manifest = load_json(path)
        counts = dict(manifest["counts"])
        # a benchmark's result took the time of its parts, which have the tokens: count each once
        if path.with_name("result.manifest.json").is_file():
            counts["tokens" if path.name == "result.manifest.json" else "seconds"] = 0
        name = path.relative_to(run).as_posix().removesuffix("manifest.json").rstrip("./")
        about = {"paths": manifest.get("paths", {}), "time": manifest["time"]}
        lines.append({"stage": name, **counts, **about})
    return sorted(lines, key=lambda line: line["time"])


def times(stages: list[dict]) -> list[dict]:
    """Seconds and tokens by iteration and kind of stage.

    In place of an iteration: "controls", or "once" for what is done once per run.
    """
    spent: dict[tuple, Counter] = defaultdict(Counter)
    for line in stages:
        first, _, rest = line["stage"].partition("/")
        where = first if re.fullmatch(r"iter\d+|controls", first) else "once"
        what = "training" if "steps" in line else "other"
        what = KINDS.get(line["stage"].rpartition("/")[2], what)
        # a benchmark's stages may have one of these names: iter1/policy/eval/ifeval/answers
        if "eval/" in rest:
            what = "benchmarks"
        spent[where, what].update(seconds=line["seconds"], tokens=line.get("tokens", 0))
    return [{"where": where, "what": what, **sums} for (where, what), sums in spent.items()]


# -------------------------------------------------------------------------------- what is printed


def iteration_rows(folders: list[Path], spent: list[dict]) -> list[dict]:
    """Rows of the first table: yields, gap, mean words, scores, seconds. spent: as of times()."""
    seconds = {(line["where"], line["what"]): line["seconds"] for line in spent}
    rows = []
    for t, folder in enumerate(folders, 1):
        row = {"t": t}
        for name, (result, count) in COLUMNS.items():
            row[name] = counts_of(folder / result).get(count, "-")  # a method may lack a stage
        for kind in ("prompts", "answers", "improver", "rewrites", "policy", "eval"):
            name = "seconds: prompts" if kind == "prompts" else kind
            row[name] = round(seconds.get((folder.name, kind), 0))
        rows.append(row)
    return rows


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
    for t in range(1, T + 1):
        files[f"NLL alone, M_{t}"] = run / f"controls/nll/iter{t}/eval.json"
    files["NLL alone, one shot"] = run / "controls/nll_one_shot/iter1/eval.json"
    for t in range(2, T + 1):
        files[f"{t} times R_1, distilled"] = run / f"controls/repeated/iter{t}/eval.json"
    return {name: load_json(path) for name, path in files.items() if path.is_file()}


def score_rows(results: dict[str, dict], T: int) -> list[dict]:
    """Rows of the table of held-out numbers, with the paired difference of M_T to each model."""
    names = list(numbers(results["M_0"]))
    rows = []
    for name, result in results.items():
        row = {"": name, **{column: result.get(column, "-") for column in names}}
        row[f"M_{T} -"], row["se "] = difference(result, results[f"M_{T}"])
        rows.append(row)
    return rows


def note_of(spec: str) -> str:
    """What an evaluation's numbers do and do not show: NOTE of its module, "" if it has none.

    spec: the option --evaluate; without one, the numbers are those of eval/heldout.py.
    """
    if not spec:
        return heldout.NOTE
    # the file may be gone, or not importable here: the report is written all the same
    with suppress(Exception):
        function = load_function(spec)
        return getattr(sys.modules[function.__module__], "NOTE", "")
    return ""


def show_examples(run: Path, T: int, count: int) -> None:
    """Print some held-out prompts with the answers of M_0 .. M_T."""
    files = [run / f"iter{t}/heldout_answers.jsonl" for t in range(T + 1)]
    # the same records of each file
    answers = [examples(path, count) for path in files]
    for rows in zip(*answers, strict=True):
        print(f"\nprompt:  {last_message(rows[0])}")
        for t, row in enumerate(rows):
            # further lines of an answer are indented below its first
            response = row["response"].replace("\n", "\n" + " " * 9)
            print(f"  M_{t}:   {response}")


def show_answers(path: Path, count: int) -> None:
    """Print the beginnings of a few of the answers, one a line."""
    for row in examples(path, count):
        prompt, response = (" ".join(text.split()) for text in (last_message(row), row["response"]))
        print(f"    {prompt[:70]}  ->  {response[:70]}")


def examples(path: Path, count: int) -> list[dict]:
    """At most `count` records of a file, evenly spread."""
    rows = read_jsonl(path)
    count = min(count, len(rows))
    return [rows[int((k + 0.5) * len(rows) / count)] for k in range(count)]


def score_chart(results: dict[str, dict]) -> str:
    """An SVG of held-out scores: a row for each model, with a point and its standard error."""
    shown = {name: r for name, r in results.items() if "score" in r}
    low = min(r["score"] - r.get("se", 0) for r in shown.values())
    high = max(r["score"] + r.get("se", 0) for r in shown.values())
    scale = 360 / max(1e-9, high - low)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="600" height="{40 + 20 * len(shown)}" '
        'font-family="sans-serif" font-size="12" style="background: white">'
        '<text x="160" y="16">held-out score, with standard errors</text>'
    ]
    for i, (name, r) in enumerate(shown.items()):
        x = 160 + scale * (r["score"] - low)
        y = 40 + 20 * i
        bar = scale * r.get("se", 0)
        colour = COLOURS.get(name[:2], "#888")
        parts.append(
            f'<text x="145" y="{y + 4}" text-anchor="end">{name}</text>'
            f'<path d="M{x - bar:.1f} {y}H{x + bar:.1f}" stroke="{colour}"/>'
            f'<circle cx="{x:.1f}" cy="{y}" r="4" fill="{colour}"/>'
            f'<text x="540" y="{y + 4}">{r["score"]:.3f}</text>'
        )
    return "\n".join(parts) + "</svg>\n"


# -------------------------------------------------------------------------------- the page's data


def page_data(run: Path, o: dict, folders: list[Path], results: dict, spent: list[dict]) -> dict:
    """What report.html shows of the run's files; eval/report.html reads these names."""
    T = len(folders)
    changed = run / "changed.json"
    manifests = map(load_json, finished_files(run, "**/*manifest.json"))
    return {
        "run": run.resolve().name,
        "T": T,
        "config": o,
        "options": load_json(changed) if changed.is_file() else [],
        "seeds": counts_of(run / "generator").get("seeds"),
        "processes": max((manifest.get("processes", 1) for manifest in manifests), default=1),
        "evaluations": [{**numbers(result), "name": name} for name, result in results.items()],
        "benchmarks": benchmarks(run, T),
        "against": ifeval_against_first(run, T),
        "curves": all_curves(run, folders),
        "yields": {
            "prompts": all_yields(folders, "prompts.jsonl", "lists", "prompts"),
            "pairs": all_yields(folders, "pairs.jsonl", "candidates", "valid"),
        },
        "shares": shares(folders),
        "times": spent,
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


def ifeval_against_first(run: Path, T: int) -> list[dict]:
    """Rows of a table: IFEval's numbers of M_1 .. M_T against those of M_0."""
    scores = {}
    for t in range(T + 1):
        for path in finished_files(run, f"iter{t}/eval/ifeval/scores.jsonl"):
            scores[t] = read_lines(path)
    rows = []
    for t in range(1, T + 1):
        if t in scores and 0 in scores:
            compared = ifeval.compare(scores[t], scores[0])[: len(ifeval.METRICS)]
            rows += [{"model": f"M_{t} against M_0", **row} for row in compared]
    return rows


def all_curves(run: Path, folders: list[Path]) -> list[dict]:
    """The curves of G, then of every R_t, then of every M_t."""
    found = [curves(run / "generator")]
    for name in ("improver", "policy"):
        found += [curves(folder / name, t) for t, folder in enumerate(folders, 1)]
    return [one for one in found if one]


def curves(folder: Path, t: int = 0) -> dict | None:
    """A training stage's metrics as columns, averaged over `width` steps for each point.

    None where the stage is not finished or had no step.
    """
    if not counts_of(folder).get("steps"):
        return None
    try:
        rows = read_lines(folder / "metrics.jsonl")
        values = np.array([[row.get(name) for name in rows[0]] for row in rows], float)  # null: NaN
    except (InputError, TypeError, ValueError) as error:
        print(f"no curve of {folder}: {error}")
        return None
    width = math.ceil(len(rows) / POINTS)
    points = [values[i : i + width].mean(0) for i in range(0, len(rows), width)]
    columns = dict(zip(rows[0], np.transpose(points).tolist(), strict=True))
    return {"stage": folder.name, "t": t, "width": width, "columns": columns}


def all_yields(folders: list[Path], name: str, total: str, kept: str) -> list[dict]:
    """By iteration; none for a method without such a stage."""
    results = [folder / name for folder in folders]
    return [yields(result, total, kept) for result in results if counts_of(result)]


def yields(result: Path, total: str, kept: str) -> dict:
    """How many there were, how many were kept, and why the others were dropped.

    A manifest's counts name the reasons between the two, in their order.
    """
    counts = counts_of(result)
    names = list(counts)
    reasons = names[names.index(total) + 1 : names.index(kept)]
    dropped = {name: counts[name] for name in reasons}
    used = counts.get("pairs", counts[kept])
    if counts[kept] > used:
        dropped["surplus"] = counts[kept] - used
    return {"total": counts[total], "kept": used, "dropped": dropped}


def shares(folders: list[Path]) -> dict[str, list]:
    """Shares by iteration that say how well a stage did its work; None where it was not counted."""
    prompts = [counts_of(folder / "prompts.jsonl") for folder in folders]
    found = {"prompts that use one of their keywords": [c.get("use_a_keyword") for c in prompts]}
    for title, (result, part, whole) in SHARES.items():
        counts = [counts_of(folder / result) for folder in folders]
        found[title] = [c[part] / c[whole] if c.get(whole) else None for c in counts]
    return found


# -------------------------------------------------------------------------------- the page


def pair_rows(folders: list[Path]) -> Iterator[tuple[list, list]]:
    """The numbers of every pair, in the order of NUMBERS, and its texts.

    Texts: [id, prompt or turns, keywords, draft, chosen, rejected, M_0's answer]. A draft or an
    answer of M_0 that equals the rejected text is 0, so that each text is there once.
    """
    for t, folder in enumerate(folders, 1):
        keywords = field_by_id(folder / "prompts.jsonl", "keywords")
        drafts = field_by_id(folder / "rewrites.jsonl", "draft")
        answers = field_by_id(folder / "base_answers.jsonl", "response")
        # a method may have no pairs in an iteration
        pairs = folder / "pairs.jsonl"
        for row in read_jsonl(pairs) if pairs.is_file() else []:
            name = row["id"]
            chosen = row["chosen"]
            rejected = row["rejected"]
            others = [drafts.get(name), answers.get(name)]
            # the numbers
            texts = [chosen, rejected, others[0]]
            words = [None if text is None else len(text.split()) for text in texts]
            scores = [row.get("score_chosen"), row.get("score_rejected")]
            # the texts
            draft, answer = [0 if text == rejected else text for text in others]
            asked = row.get("messages") or row["prompt"]
            shown = [name, asked, keywords.get(name), draft, chosen, rejected, answer]
            yield [t, *scores, *words], shown


def field_by_id(path: Path, field: str) -> dict:
    """id -> a field of the records of a file; {} where there is no file."""
    rows = read_jsonl(path) if path.is_file() else []
    return {row["id"]: row.get(field) for row in rows}


def plain(value):
    """A value as JSON can hold it: six digits of a number; None for NaN and infinity."""
    return json.loads(json.dumps(value), parse_float=six_digits, parse_constant=lambda name: None)


def six_digits(number: str) -> float:
    return float(f"{float(number):.6g}")


def script(value, attributes: str) -> str:
    """A <script> element that holds a value as JSON.

    Text of a model may hold "</script>" or "<!--": no "<" stays as it is.
    """
    text = json.dumps(plain(value), ensure_ascii=False)
    text = re.sub("[<\u2028\u2029\ud800-\udfff]", lambda c: f"\\u{ord(c[0]):04x}", text)
    return f'<script type="application/json" {attributes}>{text}</script>\n'


def write_page(run: Path, data: dict, pairs: list[tuple[list, list]]) -> None:
    """Write RUN/report.html: the template with the data and the pairs in it."""
    columns = zip(*[row for row, _ in pairs], strict=True)
    data |= {"pairs": dict(zip(NUMBERS, columns, strict=False)), "block": BLOCK}
    scripts = [script(data, 'id="data"')]
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
    folders = [run / f"iter{t}" for t in range(1, T + 1)]
    stages = finished_stages(run)
    diagnoses = diagnose(run, T)
    rows = [{"stage": f"iter{row['t']}/diagnostics", **row} for row in diagnoses]
    write_jsonl(run / "metrics.jsonl", stages + rows)

    # iterations
    spent = times(stages)
    iterations = iteration_rows(folders, spent)
    print(f"\niterations of {run}\n{table(iterations) if iterations else 'none is finished'}")

    # diagnostics
    if diagnoses:
        print(f"\ndiagnostics (eval/diagnostics.py)\n{table(diagnoses)}")
    for warning in warnings(diagnoses):
        print(warning)

    # the held-out evaluation
    results = evaluations(run, T)
    note = ""
    if results:
        note = note_of(o["evaluate"])
        by = o["evaluate"] or "eval/heldout.py:evaluate"
        print(f"\nheld-out prompts, by {by}\n{table(score_rows(results, T))}\n{note}")
        if "score" in results["M_0"]:
            write_text(run / "scores.svg", score_chart(results))
        show_examples(run, T, o["show"])
    data = page_data(run, o, folders, results, spent)
    if data["against"]:
        print(f"\nIFEval, prompt by prompt\n{table(data['against'])}")
    data |= {"note": note, "diagnostics": diagnoses, "warnings": warnings(diagnoses)}
    write_cards(run, data, iterations)
    write_page(run, data, list(pair_rows(folders)))

    # summary
    tokens = sum(line.get("tokens", 0) for line in stages)
    seconds = sum(line["seconds"] for line in stages)
    return {
        "scores": [results[f"M_{t}"].get("score") for t in range(T + 1)] if results else [],
        "pairs": [row["pairs"] for row in iterations],
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

"""The model card of every policy of a run, iterT/policy/README.md, for the Hugging Face Hub.

report() writes it from the run's files, and every report writes it again. It decides nothing: a
stage counts it neither among the files of its result (plumbing/stage.py) nor in a model's hash.
M_0's path is shown as the user gave it; of data only the files' names.
"""

import json
import re
from pathlib import Path
from textwrap import indent

from eval.table import table
from plumbing.files import load_json, write_text
from plumbing.stage import fingerprint, read_manifest

# Methods by the section of options that only they have: see methods/.
METHODS = {
    "spin": "SPIN",
    "rewarding": "Self-Rewarding Language Models",
    "ranking": "Sampling-Ranking",
    "sapo": "SAPO",
    "almost": "ALMoST",
}
TAGS = {"Self-Rewarding Language Models": "self-rewarding", "": "preference-optimization"}
SHOWN_ABOVE = ("out", "model", "seeds", "corpus", "heldout")  # or of no interest: paths
PAIRS = ("t", "prompts", "valid", "pairs", "D", "gap")  # columns of the report's first table

CARD = """---
base_model: {base_model}
license: {license}
library_name: transformers
pipeline_tag: text-generation
tags:
- {tag}
---

# M_{t} of a run of {method}

Iteration {t} of {T}. M_0 is the model that the run started from. Every report of the run writes
this file again: copy it before you change it. The Hub takes only ids of its models as base_model.

## Licence

The licences of M_0 and of the data apply.{known}

## Made from

Content hashes are the first 16 digits of a SHA-256: of a file, or of those files of a model that
decide what it says.

{sources}

## Pairs by iteration

D: pairs that M_t was trained on.

{pairs}
"""


def write_cards(run: Path, data: dict, iterations: list[dict]) -> None:
    """Write the card of every policy. data: as of report.page_data(); iterations: its table."""
    sources = indent(table(source_rows(run, data["config"])), "    ")
    for t in range(1, data["T"] + 1):
        policy = run / f"iter{t}/policy"
        manifest = read_manifest(policy, refuse=False)
        if manifest:
            parts = [opening(run, data, t, sources, iterations), options(data["options"])]
            parts += [scores(data, t), versions(manifest)]
            write_text(policy / "README.md", "\n".join(part for part in parts if part))


def opening(run: Path, data: dict, t: int, sources: str, iterations: list[dict]) -> str:
    """The front matter, and what M_t was made from."""
    o = data["config"]
    method = method_of(run, o)
    license = licence_of(Path(o["model"]))
    rows = [{name: row[name] for name in PAIRS} for row in iterations[:t]]
    return CARD.format(
        base_model=as_given(json.dumps(o["model"])),
        license=license or "other",
        tag=TAGS.get(method, method.lower()),
        t=t,
        T=data["T"],
        method=method or "another method",
        known=f" M_0's is {license}, as it says itself." if license else "",
        sources=sources,
        pairs=indent(table(rows), "    "),
    )


def method_of(run: Path, o: dict) -> str:
    """The method's name; "" of a cycle that is not in this repository."""
    for section, name in METHODS.items():
        if section in o:
            return name
    return "SynPO" if read_manifest(run / "iter1/improver", refuse=False) else ""


def as_given(text: str) -> str:
    """Text, maybe as JSON, in which a path in the Hub's cache is again the id that was given."""
    cached = r'[^"]*/models--([^/]+?)--([^/]+)/snapshots/\w+'
    return re.sub(cached, r"\1/\2", text)


def licence_of(model: Path) -> str:
    """What M_0's own card, or else its config.json, names as its licence; "" if neither does."""
    readme = model / "README.md"
    text = readme.read_text("utf-8-sig", "replace") if readme.is_file() else ""
    front = re.match(r"(?ms)---\n(.*?\n)---$", text)
    named = re.search(r"(?m)^license:(?: *|\n *- *)[\"']?([\w.+-]+)", front[1] if front else "")
    if named:
        return named[1]
    config = model / "config.json"
    values = load_json(config) if config.is_file() else {}
    return values.get("license") or ""


def source_rows(run: Path, o: dict) -> list[dict]:
    """M_0 and the data: name, and content as manifests have it. Seeds and held-out records: the
    run's own copies, which its stages read.
    """
    known = {}
    for path in run.glob("**/*manifest.json"):
        manifest = load_json(path)
        for name, given in manifest.get("paths", {}).items():
            known[given] = manifest["inputs"].get(name)
    sources = {
        "M_0": (as_given(o["model"]), o["model"]),
        "seeds": (o["seeds"], run / "seeds.jsonl"),
        "held-out": (o["heldout"], run / "heldout.jsonl"),
        "corpus": (o["corpus"], o["corpus"]),
    }
    rows = []
    for what, (name, path) in sources.items():
        if name:
            there = Path(path).is_file()
            content = known.get(str(path)) or (fingerprint(path) if there else "-")
            shown = name if what == "M_0" else Path(name).name
            rows.append({"": what, "name": shown, "content": content})
    return rows


def options(changed: list[list]) -> str:
    """Lines of the options that differ from their defaults; "" without a record of them."""
    lines = []
    for name, value, _, _ in changed:
        if name not in SHOWN_ABOVE:
            lines.append(f"    {name} = {json.dumps(value)}\n")
    block = as_given("".join(lines))
    return f"## Options that differ from their defaults\n\n{block}" if lines else ""


def scores(data: dict, t: int) -> str:
    """A table of what the run measured of M_0 .. M_t; "" where it evaluated nothing."""
    measured = {row["name"]: row for row in data["evaluations"]}
    columns = [name for name in measured.get("M_0", {}) if name != "name"]
    rows = []
    for s in range(t + 1):
        row = {"": f"M_{s}"}
        for name in columns:
            row[name] = measured[f"M_{s}"].get(name, "-")
        for name, results in data["benchmarks"].items():
            row[name] = (results[s] or {}).get("score", "-")
        rows.append(row)
    if len(rows[0]) == 1:
        return ""
    by = f"Held-out prompts, by {data['config']['evaluate'] or 'eval/heldout.py:evaluate'}."
    about = f"{by} {data['note']}" if columns else "Benchmarks."
    return f"## Scores\n\n{about}\n\n{indent(table(rows), '    ')}\n"


def versions(manifest: dict) -> str:
    """What made the model, as its manifest says."""
    torch = manifest.get("machine", {}).get("torch", "-")
    return f"## Versions\n\n    commit  {manifest.get('commit') or '-'}\n    torch   {torch}\n"

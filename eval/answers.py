"""What benchmarks share before they judge: where things lie, which prompts, and the answers of the model under test."""

import json
from dataclasses import replace
from pathlib import Path

from data import Common, InputError, part, read_jsonl, read_text, stage
from eval.stats import mean
from sample import SampleOptions, sample


def place(o, name: str) -> Path:
    """The directory of a benchmark's files: --out, or MODEL/eval/NAME."""
    if not o.model:
        raise InputError("--model: give a checkpoint directory")
    return Path(o.out or Path(o.model) / "eval" / name)


def need(path: str, flag: str, what: str) -> Path:
    """A data file or directory that the user must give; says what it is and where it comes from."""
    if not path or not Path(path).exists():
        raise InputError(
            f"{flag}{' ' + path if path else ''}: {'no such file' if path else 'missing'}; give {what}"
        )
    return Path(path)


def read_lines(path: str | Path, *fields: str) -> list[dict]:
    """Objects of a JSONL file that are no prompts, with these fields in each."""
    rows = []
    for number, line in enumerate(read_text(path).removesuffix("\n").split("\n"), 1):
        try:
            rows.append(json.loads(line))
            absent = [name for name in fields if name not in rows[-1]]
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{path}: line {number} is no JSON object ({error}); mend or remove it"
            ) from None
        if absent:
            raise InputError(
                f"{path}: line {number}: field {absent[0]!r} is missing; give the official file"
            )
    return rows


def first(rows: list, limit: int) -> list:
    """The first `limit` rows, all for 0."""
    if limit < 0:
        raise InputError(f"--limit {limit}: give a number of prompts, 0 for all")
    return rows[:limit] if limit else rows


def answer(
    o,
    rows: list[dict],
    source: str | Path,
    out: Path,
    model: str = "",
    purpose: str = "",
    **changes,
) -> list[dict]:
    """Answers to rows {id, prompt | messages}, in their order: records {id, response, finish_reason, tokens, ...}.

    source: the data file, which with the options decides whether `out` is up to date; changes: SampleOptions that differ.
    Every rank calls it.
    """
    model, options = model or o.model, replace(SampleOptions(**part(o, SampleOptions)), **changes)
    stage(
        out,
        {"model": model, "data": source},
        {**part(options, SampleOptions), **part(o, Common), "limit": o.limit, "purpose": purpose},
        lambda: sample(model, rows, out, options, o, purpose, source=source),
    )
    return read_jsonl(out)


def words(texts: list[str]) -> float:
    """Mean number of words."""
    return mean([len(text.split()) for text in texts])

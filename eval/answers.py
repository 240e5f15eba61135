"""What benchmarks share before they judge: options, paths, prompts, the model's answers."""

from dataclasses import dataclass, fields
from pathlib import Path

from eval.stats import mean
from formats.records import read_jsonl
from pairs import own_words, repetition
from plumbing.files import InputError, parse_json, read_text
from plumbing.ranges import Temperature
from plumbing.stage import Stage
from sample import SampleOptions, generate
from scorers.llm_judge import JudgeOptions

# an answer that obeys counts as guarded if it also
MIN_OWN_WORDS = 12  # has at least so many words that its prompt does not have
MAX_REPETITION = 0.5  # repeats a smaller share of its word trigrams


@dataclass(frozen=True, kw_only=True)
class JudgedOptions(SampleOptions, JudgeOptions):
    """Options of a benchmark with a judge: of the sampler that answers, and of the judge."""

    temperature: Temperature = SampleOptions.temperature  # of answers; 0 is greedy


def place(o, name: str) -> Path:
    """The directory of a benchmark's files: --out, or MODEL/eval/NAME."""
    if not o.model:
        raise InputError("--model: give a checkpoint directory")
    return o.out or o.model / "eval" / name


def need(path: Path | None, flag: str, what: str) -> Path:
    """Check a data file or directory that the user must give; `what` says what it is."""
    if path is None:
        raise InputError(f"{flag}: missing; give {what}")
    if not path.exists():
        raise InputError(f"{flag} {path}: no such file; give {what}")
    return path


def read_lines(path: Path, *fields: str) -> list[dict]:
    """Objects of a JSONL file that holds no prompts; each must have the fields."""
    rows = []
    for number, line in enumerate(read_text(path).removesuffix("\n").split("\n"), 1):
        where = f"{path}: line {number}"
        row = parse_json(line, path, number)
        if not isinstance(row, dict):
            raise InputError(f"{where} is not a JSON object, {{...}}; fix or delete it")
        missing = [name for name in fields if name not in row]
        if missing:
            raise InputError(f"{where}: field {missing[0]!r} is missing; give the official file")
        rows.append(row)
    return rows


def first(rows: list, limit: int) -> list:
    """The first `limit` rows; all for 0."""
    return rows[:limit] if limit else rows


def guarded(row: dict) -> bool:
    """Whether a response says something of its own, ended by itself, and does not loop."""
    if row.get("finish_reason", "stop") != "stop":
        return False
    return own_words(row) >= MIN_OWN_WORDS and repetition(row["response"]) < MAX_REPETITION


def answer(
    o,
    rows: list[dict],
    out: Path,
    data: list[Path],
    purpose: str = "",
    model: Path | None = None,
    **changes,
) -> list[dict]:
    """Stage: answers to rows {id, prompt | messages}, in order; records {id, response, ...}.

    o: a benchmark's options, a subclass of SampleOptions; changes win over them. data: the files
    that rows come from. model: o.model unless given.
    """
    # what answers follow from: the options of the sampler, not those of the judge
    sampling = {field.name: getattr(o, field.name) for field in fields(SampleOptions)}
    options = SampleOptions(**sampling | changes)
    model = model or o.model
    stage = Stage(out, options, model=model, data=data, limit=o.limit, purpose=purpose)
    if not stage.done:
        counts = generate(model, rows, out, options, stage.scratch, purpose)
        stage.finish(**counts)
    return read_jsonl(out)


def words(texts: list[str]) -> float:
    """Mean number of words."""
    return mean([len(text.split()) for text in texts])

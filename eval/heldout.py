"""The held-out evaluation: a user's own function, or two numbers that need no judge.

The built-in evaluate() returns
    score     log-prob per token of the gold response under the model, mean over records
    win_rate  how often the model's response is likelier under M_0, per token, than M_0's own
              (a draw counts one half)
Neither measures helpfulness: score falls when a model moves away from the style of the gold
responses, win_rate rises when responses become plainer or more typical.

A user's function may also return `scores`, a score of each response: then differences between
models get paired standard errors, and several responses per prompt give `best` and `distinct`.

answers, base answers, held-out records -> eval.json
"""

from collections import defaultdict
from pathlib import Path

from eval.stats import mean, rounded, standard_error, wins
from formats.plugins import load_function, plugin_files
from formats.records import read_jsonl
from plumbing.files import write_json
from plumbing.options import RunOptions
from plumbing.ranks import on_rank0
from plumbing.stage import Stage
from scorers.base import need_scores
from scorers.load import load_scorer

NOTE = "Neither number is a measure of helpfulness (eval/heldout.py)."


def evaluate(
    answers: list[dict],
    heldout: list[dict],
    base_answers: list[dict],
    model: Path | None,
    base: Path,
    run: RunOptions,
) -> dict[str, float]:
    """score and se (only with a model), win_rate, words. --evaluate names a user's own function.

    answers, base_answers: records {prompt, response}; heldout: {prompt, response = gold}; all
    three in the same order. model: the checkpoint that wrote the answers, None if an improver
    rewrote them.
    """
    if any(a["id"] != b["id"] for a, b in zip(answers, base_answers, strict=True)):
        raise ValueError("answers and base_answers must hold the same records in the same order")
    # both models' responses under M_0
    under_base = load_scorer("likelihood", base, run)
    scores = need_scores(under_base(answers), answers)
    win_rate = mean(wins(scores, under_base(base_answers)))
    words = mean([len(row["response"].split()) for row in answers])
    result = {"win_rate": win_rate, "words": words}

    # the gold responses under the model
    if model:
        gold = need_scores(load_scorer("likelihood", model, run)(heldout), heldout)
        result = {"score": mean(gold), "se": standard_error(gold), **result}
    return result


def score_heldout(
    answers: Path,
    out: Path,
    heldout: Path,
    base_answers: Path,
    base: Path,
    o,
    model: Path | None = None,
) -> Path:
    """Stage: score answers to the held-out prompts with the function o.evaluate.

    o: loop.py's Options, of which `run` and `evaluate` count: FILE.py:FUNCTION, or empty for
    evaluate() above. model: None where an improver rewrote the answers.
    """
    stage = Stage(
        out,
        run=o.run,
        evaluate=o.evaluate,
        function=plugin_files(o.evaluate),
        answers=answers,
        base_answers=base_answers,
        heldout=heldout,
        base=base,
        model=model,
    )
    if stage.done:
        return out
    function = load_function(o.evaluate) if o.evaluate else evaluate
    rows, gold, base_rows = (read_jsonl(path) for path in (answers, heldout, base_answers))
    several = len(rows) > len(gold)
    # each record once for each of its responses; an improver's have the prompt that it read
    gold, base_rows = (by_id(records, rows) for records in (gold, base_rows))
    rows = [{**row, **prompt_of(record)} for row, record in zip(rows, gold, strict=True)]
    result = function(rows, gold, base_rows, model, base, o.run)
    if several and "scores" in result:
        result |= over_samples(rows, result["scores"])
    on_rank0(write_json, out, result)
    shown = {name: value for name, value in result.items() if name != "scores"}
    return stage.finish(**rounded(shown))


def prompt_of(record: dict) -> dict:
    return {name: record[name] for name in ("prompt", "messages") if name in record}


def by_id(records: list[dict], rows: list[dict]) -> list[dict]:
    """The record of each of rows."""
    found = {record["id"]: record for record in records}
    return [found[row["id"]] for row in rows]


def over_samples(rows: list[dict], scores: list[float]) -> dict:
    """Of several responses to each prompt: the mean best score, the share of different texts, and
    the mean score of each prompt as `scores`.
    """
    groups: dict[str, list[float]] = defaultdict(list)
    for row, score in zip(rows, scores, strict=True):
        groups[row["id"]].append(score)
    texts = {(row["id"], row["response"]) for row in rows}
    return {
        "best": mean([max(group) for group in groups.values()]),
        "distinct": len(texts) / len(rows),
        "scores": [mean(group) for group in groups.values()],
    }

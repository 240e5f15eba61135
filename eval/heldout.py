"""Two numbers that need no judge: log-likelihood of held-out gold answers, and likelihood win rate against M_0.

What --heldout alone is scored with. score is the mean over records of the mean log-prob per token of the gold answer under
the model; win_rate is how often the model's own answer is likelier under M_0, per token, than M_0's own answer (a draw counts
one half). Neither is a measure of helpfulness: the first falls when a model moves away from the style of the gold answers,
the second rises when answers become plainer or more typical.
"""

from data import Common
from eval.stats import mean, standard_error
from reward import load_scorer

NOTE = "Neither number is a measure of helpfulness (eval/heldout.py)."


def evaluate(
    answers: list[dict],
    heldout: list[dict],
    base_answers: list[dict],
    model: str | None,
    base: str,
    common: Common,
) -> dict[str, float]:
    """answers and base_answers: records {prompt, response}, joined by position; heldout: {prompt, response = gold}.

    model: the checkpoint that wrote the answers, None where an improver rewrote them. Returns score and se (with a model only),
    win_rate, words.
    """
    if any(a["id"] != b["id"] for a, b in zip(answers, base_answers, strict=True)):
        raise ValueError("answers and base_answers are of different records")
    under_base = load_scorer("likelihood", base, common)
    ours, theirs = under_base(answers), under_base(base_answers)
    wins = [0.5 if a == b else float(a > b) for a, b in zip(ours, theirs, strict=True)]
    result = {
        "win_rate": mean(wins),
        "words": mean([len(row["response"].split()) for row in answers]),
    }
    if model:
        gold = load_scorer("likelihood", model, common)(heldout)
        result = {"score": mean(gold), "se": standard_error(gold), **result}
    return result

"""What to watch while a run iterates: one row of diagnostics per iteration, and warnings.

    gap        score of R_t's rewrites of M_{t-1}'s held-out responses, less that of the responses;
               of any rewrite, not of the picked ones
    gain       score of M_t less that of M_{t-1}
    uptake     gain / gap: how much of what R_t knows better the policy has learned; "-" where the
               gap is within its standard error of 0
    chosen     change of the chosen responses' log-prob per token while M_t trained
    rejected   the same of the rejected responses
    best       mean over prompts of the best score among several responses of M_t
    change     best of M_t less that of M_{t-1}
    distinct   share of different texts among these
    words      of M_t's responses

The score is the held-out evaluation's; where it has none for rewrites, the win rate. Standard
errors are over held-out prompts, paired, for evaluations that score single records.
"""

from pathlib import Path

from eval.answers import read_lines
from eval.stats import mean, standard_error
from plumbing.files import InputError, load_json


def diagnose(run: Path, T: int) -> list[dict]:
    """Rows of the table for iterations 1..T; "-" where the run has no such number."""
    rows = []
    for t in range(1, T + 1):
        before = result_of(run / f"iter{t - 1}/eval.json")
        after = result_of(run / f"iter{t}/eval.json")
        gap, gap_error = difference(before, result_of(run / f"iter{t}/eval_rewrites.json"))
        gain, gain_error = difference(before, after)
        several = result_of(run / f"iter{t}/eval_samples.json")
        best = several.get("best", "-")
        best_before = result_of(run / f"iter{t - 1}/eval_samples.json").get("best", "-")
        chosen, rejected = log_prob_changes(run / f"iter{t}/policy/metrics.jsonl")
        rows.append(
            {
                "t": t,
                "gap": gap,
                "gap se": gap_error,
                "gain": gain,
                "gain se": gain_error,
                "uptake": uptake(gap, gap_error, gain),
                "chosen": chosen,
                "rejected": rejected,
                "best": best,
                "change": "-" if "-" in (best, best_before) else best - best_before,
                "distinct": several.get("distinct", "-"),
                "words": after.get("words", "-"),
            }
        )
    return rows


def result_of(path: Path) -> dict:
    return load_json(path) if path.is_file() else {}


def difference(before: dict, after: dict) -> tuple:
    """after - before and its standard error; "-" for what is missing."""
    name = "score" if "score" in after else "win_rate"
    if name not in before or name not in after:
        return "-", "-"
    error = "-"
    if "scores" in before and "scores" in after:
        pairs = zip(before["scores"], after["scores"], strict=True)
        error = standard_error([new - old for old, new in pairs])
    return after[name] - before[name], error


def uptake(gap, gap_error, gain):
    """gain / gap; "-" where a number is missing, or the gap may be 0."""
    if "-" in (gap, gain):
        return "-"
    at_least = 0 if gap_error == "-" else gap_error
    return gain / gap if gap > at_least else "-"


def log_prob_changes(metrics: Path) -> tuple:
    """Changes of the mean log-prob per token of chosen and rejected responses: from the first step,
    which sees the untrained model, to the mean over the last tenth of steps; "-" where the file
    does not say.
    """
    try:
        steps = read_lines(metrics, "logps/chosen") if metrics.is_file() else []
    except InputError:  # of another loss; where it is damaged, the report's curves say so
        steps = []
    if not steps:
        return "-", "-"
    last = steps[-max(1, len(steps) // 10) :]

    def change(side: str) -> float:
        per_token = [step[f"logps/{side}"] / step[f"tokens/{side}"] for step in [steps[0], *last]]
        return mean(per_token[1:]) - per_token[0]

    return change("chosen"), change("rejected")


def warnings(rows: list[dict]) -> list[str]:
    """What looks unhealthy in the rows of diagnose()."""
    found = []
    for row in rows:
        where = f"warning, iteration {row['t']}:"
        if row["gap"] != "-" and row["gap"] <= 0:
            found.append(
                f"{where} the improver no longer improves (gap {row['gap']:+.3f}): stop, or give "
                "it new information"
            )
        if row["chosen"] != "-" and row["chosen"] < 0:
            found.append(
                f"{where} log-probs of chosen responses fell ({row['chosen']:+.3f} per token): "
                "raise --policy.nll, or lower --policy.lr"
            )
        if row["change"] != "-" and row["change"] < 0:
            found.append(
                f"{where} the best of several responses fell (by {-row['change']:.3f} to "
                f"{row['best']:.3f}): the policy narrows; lower --policy.lr or --policy.epochs"
            )
    return found

"""Accuracy of a scorer: how often it agrees with people, as in RewardBench (arXiv 2403.13787).

--data is LLMBar's JSON list of {input, output_1, output_2, label}, or JSONL of {prompt | messages,
chosen, rejected}.

    python -m eval.scorer_accuracy --scorer REWARD_DIR --data Natural.json
    python -m eval.scorer_accuracy --scorer likelihood --base DIR --data Natural.json
    torchrun --nproc-per-node 8 -m eval.scorer_accuracy --scorer judge:DIR --data pairs.jsonl
"""

from dataclasses import dataclass
from pathlib import Path

from checkpoint import Checkpoint
from eval.stats import mean, rounded, wins
from formats.records import messages_of, read_jsonl
from improve import TEMPLATE
from plumbing.files import InputError, digest, load_json
from plumbing.options import RunOptions, cli
from plumbing.ranks import print0
from scorers.base import Revision, Scorer, need_scores, score_pairs
from scorers.load import load_scorer

LLMBAR = "a list of {input, output_1, output_2, label: 1 or 2}"


@dataclass(frozen=True, kw_only=True)
class AccuracyOptions:
    run: RunOptions = RunOptions()
    scorer: str = "likelihood"  # random, likelihood, DIR, judge:DIR, endpoint:NAME, FILE.py:NAME


def read_labelled(path: Path) -> list[tuple[dict, dict]]:
    """(better, worse) records of LLMBar's JSON or of JSONL with chosen and rejected."""
    if Path(path).suffix == ".jsonl":
        rows = read_jsonl(path, "prompt", "chosen", "rejected")
    else:
        rows = read_llmbar(path)
    pairs = []
    for row in rows:
        texts = (row["chosen"], row["rejected"])
        name = digest(messages_of(row), *texts)
        pairs.append(tuple({**row, "id": name, "response": text} for text in texts))
    return pairs


def read_llmbar(path: Path) -> list[dict]:
    """Records {prompt, chosen, rejected}."""
    rows = []
    try:
        for row in load_json(path):
            chosen, rejected = (row[f"output_{i}"] for i in (row["label"], 3 - row["label"]))
            rows.append({"prompt": row["input"], "chosen": chosen, "rejected": rejected})
        if not rows:
            raise ValueError("it is empty")
    except (ValueError, KeyError, TypeError) as error:
        fix = "fix it, or give JSONL of {prompt, chosen, rejected}"
        raise InputError(f"{path}: must be {LLMBAR} ({error!r}); {fix}") from None
    return rows


def wilson(wins: float, n: int) -> tuple[float, float]:
    """95 % interval of a share that stays inside 0 and 1 for few pairs (Wilson 1927)."""
    z = 1.96
    middle = (wins + z * z / 2) / (n + z * z)
    width = z / (n + z * z) * (wins * (n - wins) / n + z * z / 4) ** 0.5
    return max(0.0, middle - width), min(1.0, middle + width)


def accuracy(data: Path, scorer: Scorer | None) -> dict:
    """Share of labelled pairs whose better answer scores higher, with its 95 % interval.

    A draw counts one half."""
    if scorer is None:
        raise InputError("--scorer none scores nothing; name another")
    pairs = read_labelled(data)
    better, worse = map(list, zip(*pairs, strict=True))
    scores, others = score_pairs(scorer, better, worse)
    right = wins(need_scores(scores, better), others)
    share = mean(right)
    low, high = wilson(sum(right), len(pairs))

    # the control that any scorer must beat: the longer answer
    longer = mean([len(a["response"]) > len(b["response"]) for a, b in pairs])
    print0(
        f"accuracy on {len(pairs)} labelled pairs: {share:.3f}, "
        f"95 % interval {low:.3f} to {high:.3f}\n"
        f"(chance 0.500; always the longer answer {longer:.3f})"
    )
    numbers = {"accuracy": share, "low": low, "high": high, "longer": longer}
    return {"pairs": len(pairs), **rounded(numbers)}


def scorer_accuracy(
    data: Path,  # labelled pairs: LLMBar's JSON, or JSONL of {"prompt", "chosen", "rejected"}
    o: AccuracyOptions,
    base: Checkpoint | None = None,  # the model that `likelihood` and `settled` score under
    template: str = TEMPLATE,  # how `settled` asks to revise, as improve.py does
) -> dict:
    revision = Revision(template=template)
    return accuracy(data, load_scorer(o.scorer, base, o.run, revision=revision))


if __name__ == "__main__":
    cli(scorer_accuracy)

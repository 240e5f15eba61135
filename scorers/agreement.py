"""How often a scorer agrees with people: reward.py --scorer ... --measure FILE."""

import json
from pathlib import Path

from data import InputError, digest, messages_of, read_jsonl, read_text, say
from reward import Scorer, score_pairs


def read_labelled(path: str) -> list[tuple[dict, dict]]:
    """(better, worse) records: LLMBar's JSON list {input, output_1, output_2, label}, or JSONL {prompt, chosen, rejected}."""
    if Path(path).suffix == ".jsonl":
        rows = [
            (row, row["chosen"], row["rejected"])
            for row in read_jsonl(path, "prompt", "chosen", "rejected")
        ]
    else:
        try:
            rows = [
                (
                    {"prompt": row["input"]},
                    *(row[f"output_{i}"] for i in (row["label"], 3 - row["label"])),
                )
                for row in json.loads(read_text(path))
            ]
            if not rows:
                raise ValueError("it is empty")
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: no list of {{input, output_1, output_2, label: 1 or 2}} ({error!r}); mend it, or give "
                "JSONL of {prompt, chosen, rejected}"
            ) from None
    return [
        tuple(
            {**row, "id": digest(messages_of(row), good, bad), "response": text}
            for text in (good, bad)
        )
        for row, good, bad in rows
    ]


def wilson(wins: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share, which stays inside 0 and 1 for few pairs (Wilson 1927)."""
    middle, width = (
        (wins + z * z / 2) / (n + z * z),
        z / (n + z * z) * (wins * (n - wins) / n + z * z / 4) ** 0.5,
    )
    return max(0.0, middle - width), min(1.0, middle + width)


def agreement(path: str, scorer: Scorer | None) -> dict:
    """Share of labelled pairs whose better answer scores higher, a draw one half, with its 95 % interval."""
    if scorer is None:
        raise InputError("--scorer none scores nothing; name another")
    pairs = read_labelled(path)
    good, bad = score_pairs(scorer, *([pair[side] for pair in pairs] for side in (0, 1)))
    wins = sum(0.5 if a == b else float(a > b) for a, b in zip(good, bad, strict=True))
    low, high = wilson(wins, len(pairs))
    longer = sum(len(a["response"]) > len(b["response"]) for a, b in pairs) / len(pairs)
    say(
        f"agreement with {len(pairs)} labelled pairs: {wins / len(pairs):.3f}, 95 % interval {low:.3f} to {high:.3f}\n"
        f"(a coin 0.500; always the longer answer {longer:.3f})"
    )
    return {
        "pairs": len(pairs),
        "agreement": round(wins / len(pairs), 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "longer": round(longer, 4),
    }

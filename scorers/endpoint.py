"""A model behind an OpenAI-compatible address as the judge of two answers: --scorer endpoint:NAME.

OPENAI_API_KEY holds the key, OPENAI_BASE_URL the address where it is not OpenAI's. Both orders are asked for and averaged; see
eval/judge.py for what is asked, how failures are met, and the file of verdicts that nothing is paid for twice with.
"""
import os
from pathlib import Path

from cpu.kernels import cache_folder
from data import Common
from eval.judge import JudgeOptions, compare
from reward import Scorer


def endpoint(name: str, common: Common) -> Scorer:
    """The pairwise scorer of a model by its name there: two lists of records -> P(the first is better), by place."""
    o = JudgeOptions(judge=name, base_url=os.environ.get("OPENAI_BASE_URL", ""))

    def score(rows: list[dict], others: list[dict]) -> list[float]:
        return compare(rows, others, o, common, Path(cache_folder()) / "verdicts")
    score.pairwise = True
    return score

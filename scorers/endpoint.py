"""A model behind an OpenAI-compatible address as the judge of two answers: --scorer endpoint:NAME.

OPENAI_API_KEY holds the key, OPENAI_BASE_URL the address where it is not OpenAI's. Both orders are asked for and averaged; see
eval/judge.py for what is asked, how failures are met, and the file of verdicts that nothing is paid for twice with.
"""
import os

from cpu.kernels import cache_folder
from data import Common
from eval.judge import Judge, JudgeOptions, compare
from reward import Scorer


def endpoint(name: str, common: Common) -> Scorer:
    """The pairwise scorer of a model by its name there: two lists of records -> P(the first is better), by place."""
    o, kept = JudgeOptions(judge=name, base_url=os.environ.get("OPENAI_BASE_URL", "")), cache_folder() / "verdicts"
    Judge(o, common, kept)  # what is missing, a key or the package, is said before anything expensive

    def score(rows: list[dict], others: list[dict]) -> list[float]:
        return compare(rows, others, o, common, kept)
    score.pairwise = True
    return score

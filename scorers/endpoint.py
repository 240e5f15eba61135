"""A model behind an OpenAI-compatible address as the judge of two answers: --scorer endpoint:NAME.

OPENAI_API_KEY holds the key, OPENAI_BASE_URL the address where it is not OpenAI's. Both orders are asked for and averaged; see
eval/judge.py for what is asked and how failures are met. Verdicts are kept in ~/.cache/synpo, so that none is paid for
twice. A filter has no budget: set one where the key comes from.
"""

from cpu.kernels import cache_folder
from data import Common
from eval.endpoint import connect
from eval.judge import JudgeOptions, compare
from reward import Scorer


def endpoint(name: str, common: Common) -> Scorer:
    """The pairwise scorer of a model by its name there: two lists of records -> P(the first is better), by place."""
    o, kept = JudgeOptions(judge=name), cache_folder() / "verdicts"
    connect(
        o
    )  # what is missing, a key or the package, is said before anything expensive; loop.py has rank 0 alone ask

    def score(rows: list[dict], others: list[dict]) -> list[float]:
        return compare(rows, others, o, common, kept)

    score.pairwise = True
    return score

"""A model behind an OpenAI-compatible endpoint compares two answers: --scorer endpoint:NAME.

OPENAI_API_KEY holds the key, OPENAI_BASE_URL the address unless it is OpenAI's. Both orders are
judged and averaged; scorers/llm_judge.py says what is asked and how failures are handled. Replies
are cached in ~/.cache/synpo, so none is paid for twice. There is no --budget here: set one with the
provider.
"""

from formats.records import conversation_text
from plumbing.files import cache_folder
from plumbing.options import RunOptions
from scorers.base import Scorer
from scorers.llm_judge import Judge, JudgeOptions, pairwise
from scorers.openai_api import connect


def endpoint(name: str, run: RunOptions) -> Scorer:
    """The pairwise scorer of a model by its name there."""
    o = JudgeOptions(judge=name, run=run)
    # reports a missing key or package now. No collective: loop.py checks options on rank 0 alone
    connect(o)

    def score(rows, others):
        questions = [conversation_text(row) for row in rows]
        texts = [[row["response"] for row in side] for side in (rows, others)]
        judge = Judge(o, cache_folder() / "verdicts")
        comparisons = pairwise(judge, questions, *texts, "choice")
        # the mean over both orders; a comparison without a verdict counts as a draw
        return [sum(0.5 if p is None else p for p in pair) / 2 for pair in comparisons]

    score.pairwise = True
    return score

"""What a run evaluates while it iterates: M_0, every R_t and every M_t.

Functions take `run`, the Run of loop.py. Prompts and seeds are the same in every iteration.
"""

from pathlib import Path

from eval import benchmark
from eval.heldout import score_heldout
from eval.report import show_answers
from improve import candidates_of, rewrite
from plumbing.ranks import on_rank0
from sample import sample


def evaluate(run, t: int) -> None:
    """Held-out score of M_t, the best of several responses, and benchmarks."""
    o, model = run.o, run.model(t)
    it = run.iter(t)
    if o.heldout:
        answers = run.heldout_answers(t)
        sample(model, run.heldout, answers, o.answers, purpose="heldout")
        score(run, answers, it / "eval.json", model)
        on_rank0(show_answers, answers, o.show)

    # the best of several
    n = o.heldout_samples
    if o.evaluate and n > 1:
        several = it / "heldout_samples.jsonl"
        sample(model, run.heldout, several, o.answers, n, "heldout samples")
        score(run, several, it / "eval_samples.json", model)

    # benchmarks are for the run itself, not for its controls
    if run.is_control:
        return
    prompts = run.every("prompts.jsonl", t)
    for name, given in benchmark.check(o.eval, o.eval_options).items():
        benchmark.run(name, given, model, prompts, it / "eval" / name, o.run)


def evaluate_one(run, model: Path) -> None:
    """Held-out score of a model that is no M_t: MODEL_eval.json beside it."""
    if run.o.heldout:
        answers = model.with_name(f"{model.name}_answers.jsonl")
        sample(model, run.heldout, answers, run.o.answers, purpose="heldout")
        score(run, answers, model.with_name(f"{model.name}_eval.json"), model)


def evaluate_improver(run, R: Path, t: int) -> None:
    """Held-out score of R_t's rewrites of M_{t-1}'s responses; skipped if R_t is discarded."""
    o, it = run.o, run.iter(t)
    out = it / "heldout_rewrites.jsonl"
    if not o.heldout or not on_rank0(can_rewrite, R, out):
        return
    revision = o.improver.revision
    drafts = run.heldout_answers(t - 1)
    rewrite(R, drafts, run.model(0), out, o.rewrites, revision, t)

    # the picked rewrites, and all of them
    score(run, out, it / "eval_improver.json", None)
    score(run, candidates_of(out), it / "eval_rewrites.json", None)


def can_rewrite(R: Path, out: Path) -> bool:
    return out.is_file() or any(R.glob("*.safetensors"))


def score(run, answers: Path, out: Path, model: Path | None) -> None:
    """Score responses to the held-out prompts. model: None where an improver wrote them."""
    base = run.model(0)
    base_answers = run.heldout_answers(0)
    score_heldout(answers, out, run.heldout, base_answers, base, run.o, model)

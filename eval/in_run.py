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
    if o.heldout:
        answers = sample(model, run.heldout, run.heldout_answers(t), o.answers, purpose="heldout")
        score(run, answers, run.iter(t) / "eval.json", model)
        on_rank0(show_answers, answers, o.show)
    if o.evaluate and o.heldout_samples > 1:
        several = run.iter(t) / "heldout_samples.jsonl"
        sample(model, run.heldout, several, o.answers, o.heldout_samples, "heldout samples")
        score(run, several, run.iter(t) / "eval_samples.json", model)
    # benchmarks are for the run itself, not for its controls
    if run.out != run.home:
        return
    for name, given in benchmark.check(o.eval, o.eval_options).items():
        prompts = run.every("prompts.jsonl", t)
        benchmark.run(name, given, model, prompts, run.iter(t) / "eval" / name, o.run)


def evaluate_improver(run, R: Path, t: int) -> None:
    """Held-out score of R_t's rewrites of M_{t-1}'s responses; skipped if R_t is discarded."""
    o, out = run.o, run.iter(t) / "heldout_rewrites.jsonl"
    if o.heldout and on_rank0(can_rewrite, R, out):
        drafts = run.heldout_answers(t - 1)
        rewrite(R, drafts, run.model(0), out, o.rewrites, o.improver.revision, t)
        score(run, out, run.iter(t) / "eval_improver.json", None)
        score(run, candidates_of(out), run.iter(t) / "eval_rewrites.json", None)


def can_rewrite(R: Path, out: Path) -> bool:
    return out.is_file() or any(R.glob("*.safetensors"))


def score(run, answers: Path, out: Path, model: Path | None) -> None:
    base_answers = run.heldout_answers(0)
    score_heldout(answers, out, run.heldout, base_answers, run.model(0), run.o, model)

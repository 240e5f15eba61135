"""What a run is about to do."""

from data import read_jsonl, say


def show_plan(o) -> None:
    """Print what will start from what, before any of it runs; o: loop.py's Options."""
    seeds, T = len(read_jsonl(o.seeds)[: o.seeds_limit or None]), o.iters
    ours = "M_0" if o.start == "base" else "M_{t-1}"
    say(f"""
plan: {T} iteration{"s" * (T > 1)} from M_0 = {o.model}, run directory {o.out}
  generator  G   <- SFT(M_0) on {seeds} seeds x {o.generator.draws}: {o.generator.keywords - o.generator.noise} own keywords \
+ {o.generator.noise} of noise -> prompt
  each iteration t
    prompts  x    ~ G on {o.generator.lists:,} lists of {o.generator.keywords} keywords, at most {o.generator.prompts:,} kept
    improver R_t <- SFT(M_0) on {seeds} seeds x {o.improver.drafts} answers of M_{{t-1}} -> gold, scorer {o.improver.scorer}
    answers       ~ M_0 and M_{{t-1}};  rewrites ~ R_t, {o.improver.rewrites} per draft, pick {o.improver.pick}
    pairs    D   {"+=" if o.data == "cumulative" else "= "} rewrite > {"M_0" if o.rejected == "base" else "M_{t-1}"}'s answer, \
scorer {o.filter.scorer}, gap > {o.filter.threshold}, at most {o.filter.pairs:,} per iteration
    policy   M_t <- {o.policy.loss.upper()}({ours}) on D, reference M_0
""")

r"""The self-boosting cycle of SynPO: a chat model and a few seeds to better models (Algorithm 1).

What differs from the paper
1. Values come from three places. Defaults are the paper's where it states one, but the loss is DPO
   (the paper: SimPO), the scorer of pairs is likelihood with a gap above 0, the improver trains on
   all seeds, and generated prompts are filtered. recipes/llama3-8b.toml and mistral-7b.toml say of
   each value whose it is. Each stage's file lists its own differences.
2. Without --config and --model the demo's recipe applies, which suits a tiny model and differs
   further.
3. What the paper left untested is an option: --rejected, --start, --data, --one-shot,
   --generator.keywords, --generator.noise, --pairs.scorer, --policy.loss.

seeds.jsonl, a checkpoint, corpus.txt -> runs/NAME/iterT/policy: a checkpoint, and all beside it
(without a corpus keywords come from the seeds)

    python loop.py                                             the demo, offline
    torchrun --nproc-per-node 8 loop.py --config recipes/llama3-8b.toml --model DIR \
        --seeds seeds.jsonl --corpus corpus.txt
"""

import shutil
import sys
import time
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

from checkpoint import Checkpoint, Weights
from dpo import PolicyOptions, heldout_pairs, policy_loss, train_policy
from eval import benchmark
from eval.in_run import evaluate, evaluate_improver
from eval.report import changed, option_differences, report
from formats.chat import Chat
from formats.plugins import load_function
from formats.records import last_message, read_jsonl
from gen_prompts import (
    GeneratorOptions,
    PromptOptions,
    keyword_lists,
    sample_prompts,
    source_records,
    take_prompts,
    train_generator,
    training_rows,
)
from improve import ImproverOptions, RewriteOptions, rewrite, train_improver
from ops.meters import time_left
from pairs import PairOptions, make_pairs
from plumbing.files import InputError, load_json, write_json, write_jsonl
from plumbing.options import RunOptions, as_dict, cli, peek
from plumbing.ranges import Count, Whole
from plumbing.ranks import on_rank0, print0
from plumbing.stage import Refusal, discard, refuse_foreign, refuse_overlap
from sample import SampleOptions, make_request, sample
from scorers.load import load_scorer
from train import TrainOptions


@dataclass(frozen=True, kw_only=True)
class Options:
    run: RunOptions = RunOptions()
    out: Path = Path("runs/synpo")  # run directory; rerun the same command to resume
    prepare: str = ""  # FILE.py:FUNCTION that makes model, seeds, corpus and held-out data first
    model: Checkpoint | None = None  # M_0: checkpoint directory or Hub id of a chat model
    seeds: Path | None = None  # JSONL of {"prompt", "response"}
    seeds_limit: Whole = 0  # use only the first N; 0: all
    corpus: Path | None = None  # text for keywords, see docs/data.md; default: the seeds' texts
    heldout: Path | None = None  # JSONL of {"prompt", "response"} to evaluate on
    heldout_limit: Whole = 0  # use only the first N; 0: all
    evaluate: str = ""  # FILE.py:FUNCTION that scores responses to --heldout
    heldout_samples: Count = 8  # with --evaluate: responses per held-out prompt, for the best of n
    eval: str = ""  # benchmarks to run on M_0 and every M_t, such as alpaca_eval,ifeval
    eval_options: str = ""  # JSON file of their options, by name: see eval/benchmark.py
    iters: Count = 4  # T
    rejected: typing.Literal["base", "previous"] = "base"  # whose response: M_0's or M_{t-1}'s
    start: typing.Literal["base", "previous"] = "base"  # what M_t starts from: M_0 or M_{t-1}
    data: typing.Literal["cumulative", "fresh"] = "cumulative"  # pairs of all iterations, or one's
    more_pairs: str = ""  # FILE.py:FUNCTION from (run, t) to a list of further files of pairs
    one_shot: bool = False  # one iteration with the keyword lists, prompts and pairs of all --iters
    keep_improvers: bool = False  # do not delete an improver's weights after use
    show: Whole = 3  # examples to print at the end
    generator: GeneratorOptions = GeneratorOptions()  # G
    prompts: PromptOptions = PromptOptions()  # sampling from G
    answers: SampleOptions = SampleOptions()  # sampling from M_0 and M_{t-1}
    improver: ImproverOptions = ImproverOptions()  # R_t
    rewrites: RewriteOptions = RewriteOptions()  # sampling from R_t
    pairs: PairOptions = PairOptions()  # the filter
    policy: PolicyOptions = PolicyOptions()  # M_t
    seed_sft: TrainOptions = TrainOptions()  # the control SFT on the seeds (methods/controls.py)

    def __post_init__(self):
        """Give every section these RunOptions, also after replace(o, run=...)."""
        for field in fields(self):
            part = getattr(self, field.name)
            if hasattr(part, "run"):
                # as the class is frozen, this is how it sets a field of its own
                object.__setattr__(self, field.name, replace(part, run=self.run))

    def at_once(self) -> "Options":
        """The same budget of keyword lists, prompts and pairs in a single iteration."""
        T = self.iters
        prompts = replace(
            self.prompts, lists=T * self.prompts.lists, max_prompts=T * self.prompts.max_prompts
        )
        pairs = replace(self.pairs, max_pairs=T * self.pairs.max_pairs)
        return replace(self, iters=1, prompts=prompts, pairs=pairs)


@dataclass(frozen=True)
class Run:
    """A run directory and its options.

    A control lies in a directory of its own, but shares `home`: seeds, G, iter0, reference cache.
    """

    o: Options
    out: Path
    home: Path

    @property
    def is_control(self) -> bool:
        return self.out != self.home

    def iter(self, t: int) -> Path:
        return self.out / f"iter{t}"

    def model(self, t: int) -> Path:
        """M_t's checkpoint."""
        return self.iter(t) / "policy" if t else self.o.model

    def heldout_answers(self, t: int) -> Path:
        """M_t's responses to the held-out prompts."""
        folder = self.iter(t) if t else self.home / "iter0"
        return folder / "heldout_answers.jsonl"

    def every(self, name: str, t: int) -> list[Path]:
        """A file of all iterations up to t."""
        return [self.iter(s) / name for s in range(1, t + 1)]

    @property
    def seeds(self) -> Path:
        return self.home / "seeds.jsonl"

    @property
    def heldout(self) -> Path:
        return self.home / "heldout.jsonl"

    @property
    def corpus(self) -> Path:
        return self.o.corpus or self.home / "corpus.jsonl"

    @property
    def needs_generator(self) -> bool:
        return self.o.prompts.source == "generator"

    @property
    def cache(self) -> Path:
        """Reference log-probs, addressed by content, of all iterations."""
        return self.home / "reference"

    def seen(self, t: int) -> dict[str, list[Path]]:
        """Files of prompts that must not come again, by the reason that is counted."""
        return {
            "seed": [self.seeds],
            "heldout": [self.heldout] if self.o.heldout else [],
            "earlier": self.every("prompts.jsonl", t - 1),
        }


# ------------------------------------------------------------------------------------- Algorithm 1


def synpo(run: Run, t: int) -> None:
    """One iteration of Algorithm 1: M_{t-1} -> M_t.

    Every call is a stage: files in, a file or checkpoint out, skipped if that is up to date.
    """
    o, it = run.o, run.iter(t)
    M_0, M_prev = run.model(0), run.model(t - 1)

    # G <- SFT(M_0) on seeds: keywords -> prompt;   x ~ G(. | 3 keywords)
    x = new_prompts(run, t)

    # R_t <- SFT(M_0) on (x*, y' ~ M_{t-1}(. | x*)) -> y*
    drafts = it / "seed_answers.jsonl"
    n = o.improver.drafts  # per seed
    sample(M_prev, run.seeds, drafts, o.answers, samples=n, purpose=f"seeds {t}")
    R = train_improver(M_0, run.seeds, drafts, out=it / "improver", o=o.improver)

    # y_0 ~ M_0(. | x);   y ~ M_{t-1}(. | x);   y^ ~ R_t(. | x, y)
    y_0 = sample(M_0, x, it / "base_answers.jsonl", o.answers, purpose=f"answers {t}")
    y = y_0  # at t = 1, M_{t-1} is M_0
    if t > 1:
        y = sample(M_prev, x, it / "answers.jsonl", o.answers, purpose=f"answers {t}")
    revision = o.improver.revision  # what R reads, and M_0 where the scorer `settled` asks it
    y_hat = rewrite(R, y, M_0, it / "rewrites.jsonl", o.rewrites, revision, t)

    # D += (x, chosen y^, rejected y_0) where the filter agrees
    rejected = y_0 if o.rejected == "base" else y
    make_pairs(y_hat, rejected, it / "pairs.jsonl", o.pairs, M_0, t, revision)
    D = run.every("pairs.jsonl", t) if o.data == "cumulative" else [it / "pairs.jsonl"]
    if o.more_pairs:
        D += load_function(o.more_pairs)(run, t)

    # M_t <- preference optimisation of M_0 on D, reference M_0
    start = M_0 if o.start == "base" else M_prev
    train_policy(start, D, run.model(t), o.policy, reference=M_0, cache=run.cache)

    # R_t's rewrites of M_{t-1}'s held-out responses are scored; then its weights may go
    evaluate_improver(run, R, t)
    if not o.keep_improvers:
        on_rank0(discard, R)


def new_prompts(run: Run, t: int) -> Path:
    """Prompts that are new with respect to everything seen: G's, or the user's own."""
    o, x = run.o, run.iter(t) / "prompts.jsonl"
    if not run.needs_generator:
        return take_prompts(run.seen(t), x, o.prompts, t)

    # G is up to date from t = 2 on
    G = train_generator(run.model(0), run.seeds, out=run.home / "generator", o=o.generator)
    reads = o.generator.reads  # what G reads: its template, and how many keywords that holds
    return sample_prompts(G, run.corpus, run.seen(t), x, o.prompts, reads, t)


def boost(iteration: Callable, run: Run, needs_corpus: bool = True) -> dict:
    """What every self-boosting method shares: check, evaluate M_0, iterate and evaluate, report."""
    changes = on_rank0(check, run, needs_corpus)
    print0(f"{run.o.iters} iterations from M_0 = {run.o.model}, run directory {run.out}")
    begin = time.time()
    try:
        evaluate(run, 0)
        for t in range(1, run.o.iters + 1):
            print0(f"iteration {t} of {run.o.iters}{time_left(begin, t, run.o.iters)}")
            iteration(run, t)
            evaluate(run, t)
    except Refusal as error:
        raise InputError(f"{error}{changes}") from None
    on_rank0(keep_options, run.out, run.o)  # again: --iters may have grown
    return on_rank0(report, run.out)


# -------------------------------------------------------------------------------- before the cycle


def check(run: Run, needs_corpus: bool) -> str:
    """Raise InputError for whatever would stop the run later; write the run's copies of its inputs.

    Checked are files, tokenizer, template, weights, options and disk space. Returns how options
    differ from config.json.
    """
    o = run.o
    for name in ("model", "seeds"):
        if not getattr(o, name):
            raise InputError(
                f"--{name} is needed (see --help; without options loop.py runs the demo)"
            )
    if o.evaluate and not o.heldout:
        raise InputError("--evaluate scores responses to held-out prompts; give --heldout")

    # the model, and every record under its tokenizer and template
    Weights(o.model)
    copy_records(o.seeds, o.seeds_limit, run.seeds, o)
    if o.heldout:
        copy_records(o.heldout, o.heldout_limit, run.heldout, o)

    # what the stages would find out later
    if not run.needs_generator:
        source_records(o.prompts, 1)
    elif needs_corpus:
        seeds = read_jsonl(run.seeds)
        training_rows(seeds, o.generator)
        if not o.corpus:
            write_corpus(run.corpus, seeds)
        keyword_lists(run.corpus, o.generator.keywords, o.prompts.lists, o.run.seed, 1)
    revision = o.improver.revision
    for options in (o.pairs, o.improver, o.rewrites):
        # rewrites of a draft have no counterpart to compare with
        single = options is o.rewrites
        load_scorer(options.scorer, o.model, o.run, None, single, revision)
    for plugin in (o.evaluate, o.prompts.keep, o.improver.feedback, o.more_pairs):
        if plugin:
            load_function(plugin)
    policy_loss(o.policy)
    heldout_pairs(o.policy)
    benchmark.check(o.eval, o.eval_options)
    check_disk(run)

    # options, for the report and for later calls
    config = run.out / "config.json"
    if not (config.is_file() and begun(run.out)):
        keep_options(run.out, o)
    return option_differences(load_json(config), as_dict(o), config)


def begun(out: Path) -> bool:
    """Whether a run has made something, which its options and inputs must go on to suit."""
    return bool([*out.glob("generator/*.json"), *out.glob("iter*/*manifest.json")])


def keep_options(out: Path, o: Options) -> None:
    write_json(out / "changed.json", changed(o))  # first: it marks a run's directory
    write_json(out / "config.json", as_dict(o))


def copy_records(path: Path, limit: int, copy: Path, o: Options) -> None:
    """Check every record of a user's file; copy the first `limit` of them to the run directory."""
    rows = read_jsonl(path, "prompt", "response")
    chat = Chat(o.model, o.run)
    for row in rows:
        make_request(row, chat, o.answers)
    rows = rows[: limit or None]
    # a run that has begun keeps its own, for this call is refused and others are not
    if not (copy.is_file() and begun(copy.parent)):
        write_jsonl(copy, rows)
    elif read_jsonl(copy) != rows:
        problem = f"its records differ from {copy}, which this run was made from"
        raise InputError(f"{path}: {problem}; go back to them, or give another --out")


def write_corpus(path: Path, seeds: list[dict]) -> None:
    """The seeds' texts, for keywords where the user has no corpus."""
    write_jsonl(path, [{"text": f"{last_message(seed)}\n{seed['response']}"} for seed in seeds])


def check_disk(run: Run) -> None:
    """Raise InputError unless there is room for the checkpoints that will be written."""
    o = run.o
    size = sum(f.stat().st_size for f in Path(o.model).glob("*.safetensors"))
    made = sum(f.stat().st_size for f in run.out.glob("**/*.safetensors"))
    # to resume from: fp32 weights and two moments, twice while one replaces another
    resume = 12 * size if o.policy.save_every else 0
    # G, every M_t, and R_t beside them: all of them, or one at a time
    improvers = o.iters if o.keep_improvers else 1
    wanted = size * (1 + o.iters + improvers) + resume - made
    free = shutil.disk_usage(run.out).free
    if wanted > free:
        space = f"{wanted / 1e9:.0f} GB of checkpoints, {free / 1e9:.0f} GB free"
        raise InputError(f"{run.out}: about {space}; give another --out")


# ------------------------------------------------------------------------------------- the command


def claim(o: Options) -> None:
    """Raise InputError where --out overlaps with an input, or holds what no run has made."""
    if begun(o.out):
        return
    if not (o.out / "changed.json").is_file():
        if not o.prepare:
            refuse_overlap(o.out, [o.model, o.seeds, o.corpus, o.heldout])
        refuse_foreign(o.out)
    keep_options(o.out, o)


def prepare(o: Options) -> Options:
    """Options with the model and data that --prepare makes, if any."""
    on_rank0(claim, o)
    if not o.prepare:
        return o
    for name in ("model", "seeds", "corpus"):
        given = getattr(o, name)
        if given and not given.is_relative_to(o.out):
            fix = "give --config another recipe, or --config '' for none"
            raise InputError(f"--{name} {given}: --prepare {o.prepare} makes its own; {fix}")
    made = load_function(o.prepare)(o)
    return replace(o, **{name: Path(path) for name, path in made.items()})


def main(o: Options) -> dict:
    o = prepare(o)
    if o.one_shot:
        o = o.at_once()
    return boost(synpo, Run(o, o.out, o.out))


if __name__ == "__main__":
    cli(main, default_config="" if peek(sys.argv, "model", "") else "recipes/demo.toml")

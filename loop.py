"""The self-boosting cycle of SynPO, from a chat model and a few seeds to better models (Algorithm 1).

What differs from the paper by default: the loss is DPO (the paper's recipes say SimPO), the scorer of pairs is likelihood with
a gap above 0, the improver trains on all seeds, and generated prompts are filtered; each stage's file lists its own. Without
--config the demo's recipe applies, which also samples several drafts and rewrites. What the paper left untested are options:
--rejected, --start, --data, --one-shot, --generator.keywords, --generator.noise, --filter.scorer, --policy.loss.

    G <- SFT(M_0)                                      once: three keywords -> a prompt
    for t = 1 .. T:
        x        ~ G(. | fresh keywords)               new prompts
        R_t     <- SFT(M_0) on (seed, M_{t-1}'s answer) -> gold
        y_{t-1}  ~ M_{t-1}(. | x);  y^ ~ R_t(. | x, y_{t-1});  y_0 ~ M_0(. | x)
        D       += {(x, chosen y^, rejected y_0)}      where the filter agrees
        M_t     <- preference optimisation of M_0 on D

seeds.jsonl, corpus.txt, a checkpoint -> runs/NAME/iterT/policy: a checkpoint; table, manifests and metrics beside it

    python loop.py                                                                  the demo, offline
    torchrun --nproc-per-node 8 loop.py --config recipes/llama3-8b.json --model DIR --seeds seeds.jsonl --corpus corpus.txt
"""

import json
import shutil
import typing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import gen_prompts
import improve
from data import (
    Chat,
    Common,
    InputError,
    command,
    load_function,
    messages_of,
    on_first,
    part,
    plugin,
    read_jsonl,
    say,
    stage,
    write_text,
)
from dpo import PolicyOptions, policy_options, reads, train_policy
from model import Config, Weights
from reward import FilterOptions, load_scorer, make_pairs, scorer_file
from sample import SampleOptions, make_request, sample
from train import TrainOptions


@dataclass(kw_only=True)
class Options(Common):
    out: str = "runs/demo"  # run directory; the same command again goes on where it stopped
    prepare: str = ""  # FILE.py:FUNCTION that makes model, seeds, corpus and held-out data first, as demo/build.py:prepare
    model: str = ""  # M_0: checkpoint directory or hub id of a chat model
    seeds: str = ""  # JSONL of {"prompt", "response"}
    seeds_limit: int = 0  # use only the first so many of them; 0 is all
    corpus: str = ""  # text file for keywords, blank lines between paragraphs
    heldout: str = ""  # JSONL of {"prompt", "response"} to evaluate on
    heldout_limit: int = 0  # use only the first so many of them; 0 is all
    evaluate: str = ""  # how answers to --heldout are scored: FILE.py:FUNCTION, unless given eval/heldout.py:evaluate
    eval: str = ""  # benchmarks to run on M_0 and every M_t: names of files in eval/, such as alpaca_eval,ifeval
    eval_options: str = ""  # JSON file of their options, by name: see eval/benchmark.py
    iters: int = 4  # T
    rejected: typing.Literal["base", "previous"] = (
        "base"  # whose answer is rejected: M_0's or M_{t-1}'s
    )
    start: typing.Literal["base", "previous"] = "base"  # what M_t starts from: M_0 or M_{t-1}
    data: typing.Literal["cumulative", "fresh"] = (
        "cumulative"  # train on the pairs of all iterations or of this one
    )
    one_shot: bool = (
        False  # one iteration with as many keyword lists, prompts and pairs as --iters would have
    )
    controls: bool = (
        False  # also train the controls: SFT on the seeds, pairs from the seeds, one shot
    )
    keep_improvers: bool = False  # do not delete an improver's weights after use
    show: int = 3  # examples to print at the end
    generator: gen_prompts.GeneratorOptions = field(
        default_factory=gen_prompts.GeneratorOptions
    )  # G
    answers: SampleOptions = field(default_factory=SampleOptions)  # sampling from M_0 and M_{t-1}
    improver: improve.ImproverOptions = field(default_factory=improve.ImproverOptions)  # R_t
    filter: FilterOptions = field(default_factory=FilterOptions)  # pairs
    policy: PolicyOptions = field(default_factory=policy_options)  # M_t
    seed_sft: TrainOptions = field(default_factory=TrainOptions)  # the control SFT on the seeds

    def at_once(self) -> "Options":
        """The same budget of keyword lists, prompts and pairs in a single iteration."""
        T, g = self.iters, self.generator
        return replace(
            self,
            iters=1,
            generator=replace(g, lists=T * g.lists, prompts=T * g.prompts),
            filter=replace(self.filter, pairs=T * self.filter.pairs),
        )


# ---------------------------------------------------------------------------------------------- before the cycle


def check(o: Options) -> None:
    """Raise InputError for whatever would stop the run later: files, tokenizer, template, weights, options, disk."""
    for name in ("model", "seeds", "corpus"):
        if not getattr(o, name):
            raise InputError(
                f"--{name} is needed (see --help; without options loop.py runs the demo)"
            )
    if o.iters < 1:
        raise InputError(f"--iters {o.iters}: give 1 or more")
    if o.evaluate and not o.heldout:
        raise InputError("--evaluate and --heldout go together; give the prompts too")
    chat, config = Chat(o.model, o.chat_template), Config.load(o.model)
    Weights(o.model)
    for path in filter(None, (o.seeds, o.heldout)):
        for number, row in enumerate(read_jsonl(path, "prompt", "response"), 1):
            make_request(row, number, 0, chat, config.context, o.answers, 0, path)
    gen_prompts.training_rows(read_jsonl(o.seeds)[: o.seeds_limit or None], o.generator, o.seed)
    gen_prompts.keyword_lists(gen_prompts.read_corpus(o.corpus), o.corpus, o.generator, o.seed, 1)
    for spec, alone in (
        (o.filter.scorer, False),
        (o.improver.scorer, True),
        (o.improver.pick, True),
    ):
        load_scorer(spec, o.model, o, alone=alone)
    reads(o.policy)
    load_function("eval/benchmark.py:check")(o.eval, o.eval_options)
    if o.evaluate:
        load_function(o.evaluate)
    size = sum(f.stat().st_size for f in Path(o.model).glob("*.safetensors"))
    made = sum(f.stat().st_size for f in Path(o.out).glob("**/*.safetensors"))
    resume = (
        12 * size if o.policy.checkpoint_every else 0
    )  # fp32 weights and two moments, twice while one replaces another
    wanted, free = (
        size * (o.iters + 2 + 4 * o.controls) + resume - made,
        shutil.disk_usage(o.out).free,
    )
    if wanted > free:
        raise InputError(
            f"{o.out}: about {wanted / 1e9:.0f} GB of checkpoints, {free / 1e9:.0f} GB free; give another --out"
        )


def make_directory(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: {error.strerror}; give another --out") from None


# ---------------------------------------------------------------------------------------------- the cycle


@dataclass
class Cycle:
    """Algorithm 1 with its files; every method is one step of it and may be called again after a stop."""

    o: Options
    out: Path
    generator: Path
    home: Path  # where iter0 and the reference cache are; a control shares those of the main cycle

    def __post_init__(self):
        limits = {"seeds_limit": self.o.seeds_limit, "heldout_limit": self.o.heldout_limit}
        self.common, self.M_0 = {**part(self.o, Common), **limits}, Path(self.o.model)
        self.benchmarks = load_function("eval/benchmark.py:check")(self.o.eval, self.o.eval_options)
        self.seeds = read_jsonl(self.o.seeds)[: self.o.seeds_limit or None]
        self.heldout = (
            read_jsonl(self.o.heldout)[: self.o.heldout_limit or None] if self.o.heldout else []
        )

    def folder(self, t: int) -> Path:
        return self.out / f"iter{t}"

    def policy(self, t: int) -> Path:
        """M_t's checkpoint."""
        return self.folder(t) / "policy" if t else self.M_0

    def run(self) -> None:
        if self.out == self.home:
            self.evaluate(0)
        for t in range(1, self.o.iters + 1):
            say(f"iteration {t}")
            self.make_prompts(t)
            self.make_improver(t)
            self.make_pairs(t)
            self.make_policy(t)
            self.evaluate(t)

    def make_generator(self) -> None:
        """G <- SFT(M_0), once."""
        o, out = self.o, self.generator
        training = {
            name: v for name, v in asdict(o.generator).items() if name not in ("lists", "prompts")
        }
        stage(
            out,
            {"model": self.M_0, "seeds": o.seeds},
            {**training, **self.common},
            lambda: gen_prompts.train_generator(self.M_0, self.seeds, out, o.generator, o),
        )

    def make_prompts(self, t: int) -> None:
        """x ~ G(. | keywords)."""
        o, out = self.o, self.folder(t) / "prompts.jsonl"
        earlier = {f"iter{s}": self.folder(s) / "prompts.jsonl" for s in range(1, t)}

        def work():
            texts = lambda rows: [messages_of(row)[-1]["content"] for row in rows]  # noqa: E731
            known = {
                "seed": texts(self.seeds),
                "heldout": texts(self.heldout),
                "earlier": [text for path in earlier.values() for text in texts(read_jsonl(path))],
            }
            return gen_prompts.sample_prompts(
                self.generator, o.corpus, known, out, o.generator, o, t
            )

        heldout = {"heldout": o.heldout} if o.heldout else {}
        inputs = {
            "model": self.generator,
            "corpus": o.corpus,
            "seeds": o.seeds,
            **heldout,
            **earlier,
        }
        stage(out, inputs, {**asdict(o.generator), **self.common}, work)

    def answer(
        self,
        model: Path,
        rows_from: Path | str,
        out: Path,
        purpose: str,
        samples: int = 1,
        limit: int = 0,
    ) -> Path:
        """y ~ model(. | x) for the records of a file."""
        stage(
            out,
            {"model": model, "prompts": rows_from},
            {**asdict(self.o.answers), **self.common, "samples": samples},
            lambda: sample(
                model,
                read_jsonl(rows_from)[: limit or None],
                out,
                self.o.answers,
                self.o,
                purpose,
                samples,
                rows_from,
            ),
        )
        return out

    def make_improver(self, t: int) -> None:
        """R_t <- SFT(M_0) on (x*, y'_{t-1}) -> y*."""
        o, out = self.o, self.folder(t) / "improver"
        drafts = self.answer(
            self.policy(t - 1),
            o.seeds,
            self.folder(t) / "seed_answers.jsonl",
            f"seeds {t}",
            o.improver.drafts,
            o.seeds_limit,
        )
        inputs = {
            "model": self.M_0,
            "seeds": o.seeds,
            "answers": drafts,
            **scorer_file(o.improver.scorer),
        }
        stage(
            out,
            inputs,
            {**asdict(o.improver), **self.common},
            lambda: improve.train_improver(
                self.M_0, self.seeds, read_jsonl(drafts), out, o.improver, o
            ),
        )

    def rewrite(self, t: int, answers: Path, out: Path) -> Path:
        """y^ ~ R_t(. | x, y)."""
        improve.rewrite(
            self.M_0,
            self.folder(t) / "improver",
            answers,
            out,
            self.o.improver,
            self.o,
            {**asdict(self.o.improver), **self.common},
            t,
        )
        return out

    def make_pairs(self, t: int) -> None:
        """D += (x, chosen y^_{t-1}, rejected y_0) where the filter agrees. For t = 1, y_{t-1} is y_0, sampled once."""
        o, folder = self.o, self.folder(t)
        y_0 = self.answer(
            self.M_0, folder / "prompts.jsonl", folder / "base_answers.jsonl", f"answers {t}"
        )
        y = (
            y_0
            if t == 1
            else self.answer(
                self.policy(t - 1),
                folder / "prompts.jsonl",
                folder / "answers.jsonl",
                f"answers {t}",
            )
        )
        rewrites = self.rewrite(t, y, folder / "rewrites.jsonl")
        rejected = y_0 if o.rejected == "base" else y
        inputs = {
            "model": self.M_0,
            "chosen": rewrites,
            "rejected": rejected,
            **scorer_file(o.filter.scorer),
        }
        stage(
            folder / "pairs.jsonl",
            inputs,
            {**asdict(o.filter), **self.common, "rejected_from": o.rejected},
            lambda: make_pairs(
                read_jsonl(rewrites),
                read_jsonl(rejected),
                folder / "pairs.jsonl",
                self.M_0,
                o.filter,
                o,
                t,
            ),
        )

    def make_policy(self, t: int) -> None:
        """M_t <- preference optimisation on D, from M_0 with reference M_0."""
        o, out = self.o, self.policy(t)
        start = self.M_0 if o.start == "base" else self.policy(t - 1)
        D = {
            f"pairs{s}": self.folder(s) / "pairs.jsonl"
            for s in (range(1, t + 1) if o.data == "cumulative" else [t])
        }
        stage(
            out,
            {"model": start, "reference": self.M_0, **D, **plugin(o.policy.loss)},
            {**asdict(o.policy), **self.common, "start": o.start, "data": o.data},
            lambda: train_policy(
                start,
                [row for path in D.values() for row in read_jsonl(path)],
                out,
                o.policy,
                o,
                self.M_0,
                self.home / "reference",
            ),
        )

    def evaluate(self, t: int) -> None:
        """Held-out score of M_t, and of R_t's rewrites of M_{t-1}'s held-out answers; then R_t's weights may go."""
        o, folder, name = self.o, self.folder(t), "heldout_answers.jsonl"
        if o.evaluate:
            self.answer(self.policy(t), o.heldout, folder / name, "heldout", limit=o.heldout_limit)
            made, rewrites = folder / "improver", folder / "heldout_rewrites.jsonl"
            if t and (
                rewrites.is_file() or [*made.glob("*.safetensors")]
            ):  # gone if the run was made without --evaluate
                drafts = (self.folder(t - 1) if t > 1 else self.home / "iter0") / name
                self.rewrite(t, drafts, rewrites)
                self.judge(None, rewrites, folder / "eval_improver.json")
            self.judge(self.policy(t), folder / name, folder / "eval.json")
        for name, given in self.benchmarks.items() if self.out == self.home else ():
            self.benchmark(name, given, t)
        if t and not o.keep_improvers:
            on_first(
                lambda: [
                    weights.unlink() for weights in (folder / "improver").glob("*.safetensors")
                ]
            )

    def judge(self, model: Path | None, answers: Path, out: Path) -> None:
        """Run the evaluation function on answers to the held-out prompts; its numbers go to a JSON file."""
        base = self.home / "iter0" / "heldout_answers.jsonl"

        def work():
            rows = read_jsonl(answers), self.heldout, read_jsonl(base)
            result = load_function(self.o.evaluate)(*rows, model, self.M_0, self.o)
            on_first(write_text, out, json.dumps(result, indent=1))
            return {name: round(value, 4) for name, value in result.items()}

        stage(
            out,
            {
                "answers": answers,
                "base": base,
                "heldout": self.o.heldout,
                **({"model": model} if model else {}),
            },
            {"evaluate": self.o.evaluate, **self.common},
            work,
        )

    def benchmark(self, name: str, given: dict, t: int) -> None:
        """A benchmark of eval/ on M_t, the same prompts and seeds in every iteration."""
        out, prompts = (
            self.folder(t) / "eval" / name,
            [self.folder(s) / "prompts.jsonl" for s in range(1, t + 1)],
        )
        run = load_function("eval/benchmark.py:run")
        stage(
            out / "result.json",
            {"model": self.policy(t)},
            {"benchmark": given, **self.common},
            lambda: run(name, given, self.policy(t), prompts, out, self.o),
        )


def main(o: Options) -> dict:
    if o.prepare:
        given = [
            name
            for name in ("model", "seeds", "corpus")
            if getattr(o, name) and not getattr(o, name).startswith(o.out)
        ]
        if given:
            raise InputError(
                f"--{given[0]} {getattr(o, given[0])}: --prepare {o.prepare} makes its own; give --config "
                "another recipe, or --config '' for no recipe"
            )
        o = replace(o, **load_function(o.prepare)(o))
    o.evaluate = o.evaluate or ("eval/heldout.py:evaluate" if o.heldout else "")
    out = Path(o.out)
    on_first(make_directory, out)
    on_first(check, o)
    write_config = partial(write_text, out / "config.json", json.dumps(asdict(o), indent=1))
    on_first(lambda: (out / "config.json").is_file() or write_config())
    if o.one_shot:
        o = o.at_once()
    load_function("eval/plan.py:show_plan")(o)
    cycle = Cycle(o, out, out / "generator", out)
    cycle.make_generator()
    cycle.run()
    on_first(write_config)  # again: --iters may have grown
    if o.controls:
        load_function("bench/controls.py:run_controls")(cycle)
    return on_first(load_function("eval/report.py:report"), out)


if __name__ == "__main__":
    command(main, Options, default_config="recipes/demo.json")

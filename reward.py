"""Scorers of answers, and the filter that turns rewrites and base answers into pairs (SynPO section 3.2, F).

What differs from the paper
1. The paper scores with PairRM or ArmoRM. ArmoRM serves here, as does any Llama-architecture sequence-classification checkpoint
   with one output; `likelihood` needs no model from outside: mean log-prob per token of the answer under M_0.
2. Repetition (measure not stated there) is the share of word trigrams that came before in the same text.
3. A chosen answer that the token limit cut off is dropped (--keep-cut-off keeps it): its end would be taught as one.

A scorer is a function: records {prompt | messages, response} -> one float each, higher is better; or, where its attribute
`pairwise` is true, two lists of them -> P(the first is better). --scorer names one:

    none, random, likelihood    nothing; a control; mean log-prob per token under --model
    DIR                         a reward model: scorers/armorm.py, or ...ForSequenceClassification: scorers/classifier.py
    judge:DIR, endpoint:NAME    a chat model that compares, on this machine or behind an OpenAI-compatible address
    FILE.py:FUNCTION            yours; every rank calls it with all records

rewrites.jsonl, base_answers.jsonl -> pairs.jsonl {id, prompt, chosen, rejected, score_chosen, score_rejected, iteration}

    python reward.py --scorer likelihood --model DIR --chosen rewrites.jsonl --rejected answers.jsonl --out pairs.jsonl
    torchrun --nproc-per-node 8 reward.py --scorer REWARD_DIR --chosen rewrites.jsonl --rejected answers.jsonl --out pairs.jsonl
    python reward.py --scorer REWARD_DIR --measure labelled.json            its agreement with people's choices
    python reward.py train --model DIR --pairs pairs.jsonl --out REWARD_DIR     Bradley-Terry, arXiv 2203.02155 equation 1
"""

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from data import (
    DEVICE,
    Chat,
    Common,
    InputError,
    command,
    digest,
    fingerprint,
    gather,
    load_function,
    load_json,
    on_first,
    part,
    plugin,
    read_jsonl,
    rng,
    share,
    stage,
    write_jsonl,
    write_text,
)
from model import Config, load
from train import TrainOptions, make_sequence, score_sequences

Scorer = Callable[..., list[float]]


@dataclass(kw_only=True)
class FilterOptions:
    scorer: str = "likelihood"  # none, random, likelihood, a reward-model directory, judge:DIR, endpoint:NAME, FILE.py:FUNCTION
    threshold: float = 0.0  # pairs need a gap of scores above this; of judges 2 P - 1 (paper: 0.20 PairRM, 0.02 ArmoRM)
    repetition: float = 0.5  # largest share of repeated word trigrams in either text
    keep_cut_off: bool = False  # keep pairs whose chosen text ended at the token limit
    pairs: int = 10_000  # keep at most so many, at random


# ---------------------------------------------------------------------------------------------- scorers


def load_scorer(
    spec: str, base: str | Path, common: Common, keep: Path | None = None, alone: bool = False
) -> Scorer | None:
    """The scorer that --scorer names; None for "none". base: the checkpoint under which `likelihood` is measured.

    keep: a directory for the scores of finished blocks of records, from which a stopped call goes on. alone: the answers have
    no counterpart, so that a scorer which compares raises InputError.
    """
    own = load_function(spec) if ".py:" in spec else None
    if alone and (spec.startswith(("judge:", "endpoint:")) or getattr(own, "pairwise", False)):
        raise InputError(
            f"scorer {spec} compares two answers; the improver needs one that scores each, such as likelihood"
        )
    if own or spec == "none":
        return own
    kind, _, name = spec.partition(":")
    if kind == "endpoint":
        return load_function("scorers/endpoint.py:endpoint")(name, common)
    if spec == "random":
        return lambda rows: [
            rng(common.seed, "random scorer", row["id"], row["response"]).random() for row in rows
        ]
    if spec == "likelihood":
        score = likelihood(base, common)
    elif kind == "judge":
        score = load_function("scorers/judge.py:judge")(name, common)
    elif not (Path(spec) / "config.json").is_file():
        raise InputError(
            f"--scorer {spec}: no scorer has that name, and no directory of it has a config.json; see --help"
        )
    elif load_json(Path(spec) / "config.json").get("architectures") == [
        "LlamaForRewardModelWithGating"
    ]:
        score = load_function("scorers/armorm.py:armorm")(spec, common)
    else:
        score = load_function("scorers/classifier.py:classifier")(spec, common)
    reads = [base] if spec == "likelihood" else scorer_file(spec).values()
    return blockwise(score, [spec, *map(fingerprint, reads), part(common, Common)], keep)


def scorer_file(*specs: str) -> dict[str, Path]:
    """What a stage with these scorers reads beside its data, as inputs of its manifest."""
    files = {}
    for spec in specs:
        if ".py:" in spec or not (
            spec in ("none", "random", "likelihood") or spec.startswith("endpoint:")
        ):
            files |= plugin(spec) or {spec: Path(spec.removeprefix("judge:"))}
    return {f"scorer {spec}": path for spec, path in files.items()}


def blockwise(score: Scorer, key: list, keep: Path | None, size: int = 128) -> Scorer:
    """A scorer of any number of records from one of some: blocks are dealt out to the ranks, and kept in files if asked."""

    def scorer(*lists: list[dict]) -> list[float]:
        done, blocks = (
            {},
            [[rows[i : i + size] for rows in lists] for i in range(0, len(lists[0]), size)],
        )
        for number in share(list(range(len(blocks)))):
            file = keep / f"{digest(key, blocks[number])}.json" if keep else None
            done[number] = (
                load_json(file)["scores"] if file and file.is_file() else score(*blocks[number])
            )
            if file:
                write_text(file, json.dumps({"scores": done[number]}))
        merged = {number: scores for some in gather(done) for number, scores in some.items()}
        return [one for number in range(len(blocks)) for one in merged[number]]

    scorer.pairwise = getattr(score, "pairwise", False)
    return scorer


def likelihood(model: str | Path, common: Common) -> Scorer:
    """Scorer by the mean log-prob of the response's tokens and its end, given the prompt, in nats per token."""
    chat, o = Chat(model, common.chat_template), TrainOptions(max_length=Config.load(model).context)
    net = cache(lambda: load(model, common.torch_dtype, DEVICE))

    def score(rows: list[dict]) -> list[float]:
        sequences = [make_sequence(chat, row, row["response"], o) for row in rows]
        if None in sequences:
            raise InputError(
                f"record {rows[sequences.index(None)]['id']}: its prompt fills the context of {model}; remove it"
            )
        return [logps.mean().item() for logps in score_sequences(net(), sequences)]

    return score


def repetition(text: str) -> float:
    """Share of word trigrams that came before in the text; 0 for fewer than four words."""
    words = text.lower().split()
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if len(trigrams) > 1 else 0.0


# ---------------------------------------------------------------------------------------------- the filter


def score_pairs(scorer: Scorer | None, good: list[dict], bad: list[dict]) -> tuple[list, list]:
    """Scores of both sides; those of a pairwise scorer are P and 1 - P."""
    if scorer is None:
        return [None] * len(good), [None] * len(bad)
    if getattr(scorer, "pairwise", False):
        better = scorer(good, bad)
        return better, [1 - p for p in better]
    return scorer(good), scorer(bad)


def make_pairs(
    chosen: list[dict],
    rejected: list[dict],
    out: str | Path,
    base: str | Path,
    o: FilterOptions,
    common: Common,
    iteration: int = 1,
) -> dict:
    """Join two lists of answers by id and sample, drop what the filter rejects, write the pairs; returns counts by reason.

    Raises InputError with the distribution of score gaps if nothing is left.
    """
    keep, name = (
        Path(out).with_suffix(".scores"),
        lambda row: digest(row["id"], n) if (n := row.get("sample")) else row["id"],
    )
    other = {name(row): row for row in rejected}
    scorer = load_scorer(o.scorer, base, common, keep)
    joined = [(row, other[name(row)]) for row in chosen if name(row) in other]
    scores = score_pairs(scorer, *([pair[side] for pair in joined] for side in (0, 1)))
    kept, dropped, gaps = (
        [],
        Counter(),
        [a - b for a, b in zip(*scores, strict=True)] if scorer else [],
    )
    for (good, bad), score_good, score_bad in zip(joined, *scores, strict=True):
        if good["response"].split() == bad["response"].split():
            dropped["identical"] += 1
        elif not (good["response"] and bad["response"]):
            dropped["empty"] += 1
        elif good.get("finish_reason") == "length" and not o.keep_cut_off:
            dropped["cut_off"] += 1
        elif max(repetition(good["response"]), repetition(bad["response"])) > o.repetition:
            dropped["repetitive"] += 1
        elif scorer and not score_good - score_bad > o.threshold:
            dropped["small_gap"] += 1
        else:
            known = {field: good[field] for field in ("prompt", "messages") if field in good}
            known |= {"preference": score_good} if getattr(scorer, "pairwise", False) else {}
            kept.append(
                {
                    "id": name(good),
                    **known,
                    "chosen": good["response"],
                    "rejected": bad["response"],
                    "score_chosen": score_good,
                    "score_rejected": score_bad,
                    "iteration": iteration,
                }
            )
    if not kept:
        raise InputError(
            f"{out}: no pair of {len(joined)} left ({dict(dropped)}); score gaps {quantiles(gaps)}; lower "
            "the threshold or make more prompts"
        )
    valid = len(kept)
    if valid > o.pairs:
        kept = [
            kept[i]
            for i in sorted(rng(common.seed, "pairs", iteration).sample(range(valid), o.pairs))
        ]
    on_first(write_jsonl, out, kept)
    on_first(shutil.rmtree, keep, True)
    mean = lambda values: round(sum(values) / max(1, len(values)), 4)  # noqa: E731
    return {
        "candidates": len(joined),
        **dict(dropped),
        "valid": valid,
        "pairs": len(kept),
        "mean_gap": mean(gaps),
        "chosen_words": mean([len(row["chosen"].split()) for row in kept]),
        "rejected_words": mean([len(row["rejected"].split()) for row in kept]),
    }


def quantiles(values: list[float]) -> str:
    """Smallest, quarter, median, three quarters, largest."""
    values = sorted(values)
    return (
        " ".join(f"{values[round(q * (len(values) - 1))]:.3g}" for q in (0, 0.25, 0.5, 0.75, 1))
        if values
        else "none"
    )


@dataclass(kw_only=True)
class Options(FilterOptions, Common):
    model: str = ""  # M_0: the model that `likelihood` scores under
    measure: str = ""  # labelled pairs to measure the scorer on: LLMBar's JSON, or JSONL of {"prompt", "chosen", "rejected"}
    chosen: str = ""  # JSONL of answers {"prompt", "response"}
    rejected: str = ""  # JSONL of answers to the same prompts, joined by id (and sample)
    out: str = ""  # JSONL of pairs to write


def main(o: Options) -> dict:
    if o.scorer == "likelihood" and not o.model:
        raise InputError("--scorer likelihood scores under a model; give --model DIR")
    if o.measure:
        return load_function("scorers/agreement.py:agreement")(
            o.measure, load_scorer(o.scorer, o.model, o)
        )
    if not (o.chosen and o.rejected and o.out.endswith(".jsonl")):
        raise InputError(
            "--chosen, --rejected and --out NAME.jsonl are needed, or --measure; see --help"
        )
    chosen, rejected = (read_jsonl(path, "prompt") for path in (o.chosen, o.rejected))
    inputs = {
        "chosen": o.chosen,
        "rejected": o.rejected,
        **({"model": o.model} if o.model else {}),
        **scorer_file(o.scorer),
    }
    return stage(
        o.out,
        inputs,
        {**part(o, FilterOptions), **part(o, Common)},
        lambda: make_pairs(chosen, rejected, o.out, o.model, o, o),
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        del sys.argv[1]
        load_function("scorers/classifier.py:train_command")()
    else:
        command(main, Options)

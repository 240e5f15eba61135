"""Scorers of answers, and the filter that turns rewrites and base answers into preference pairs (SynPO section 3.2, F).

What differs from the paper
1. The paper scores with PairRM or ArmoRM. Any Llama-architecture sequence-classification checkpoint with one output
   serves here; `likelihood` needs no model from outside: mean log-prob per token of the answer under M_0.
2. Repetition (measure not stated there) is the share of word trigrams that came before in the same text.
3. A chosen answer that the token limit cut off is dropped (--keep-cut-off keeps it): its end would be taught as one.

A scorer is a function: records {prompt | messages, response} -> one float each, higher is better. Every rank calls it
with all records and gets all scores. `FILE.py:FUNCTION` names one of your own.

rewrites.jsonl, base_answers.jsonl -> pairs.jsonl {id, prompt, chosen, rejected, score_chosen, score_rejected, iteration}

    python reward.py --scorer likelihood --model DIR --chosen rewrites.jsonl --rejected answers.jsonl --out pairs.jsonl
    torchrun --nproc-per-node 8 reward.py --scorer REWARD_DIR --chosen rewrites.jsonl --rejected answers.jsonl --out pairs.jsonl
"""
import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from data import (DEVICE, Chat, Common, InputError, command, in_project, load_function, messages_of, on_first, part,
                  read_jsonl, rng, spread, stage, write_jsonl)
from model import Config, Packed, load
from train import TrainOptions, make_sequence, plan, score_sequences

Scorer = Callable[[list[dict]], list[float]]


@dataclass(kw_only=True)
class FilterOptions:
    scorer: str = "likelihood"  # likelihood, none, a reward-model directory, or FILE.py:FUNCTION
    threshold: float = 0.0  # least score of chosen minus rejected (the paper: 0.20 for PairRM, 0.02 for ArmoRM)
    repetition: float = 0.5  # largest share of repeated word trigrams in either text
    keep_cut_off: bool = False  # keep pairs whose chosen text ended at the token limit
    pairs: int = 10_000  # keep at most so many, at random


# ---------------------------------------------------------------------------------------------- scorers

def load_scorer(spec: str, base: str | Path, common: Common) -> Scorer | None:
    """The scorer that --scorer names; None for "none". base: the checkpoint under which `likelihood` is measured."""
    if spec == "none":
        return None
    if spec == "likelihood":
        return lambda rows: spread(likelihood, rows, base, common)
    if ".py:" in spec:
        return load_function(spec)
    if Config.load(spec).labels != 1:
        raise InputError(f"{spec}: a scorer needs a sequence-classification checkpoint with one output (score.weight)")
    return lambda rows: spread(reward, rows, spec, common)


def scorer_file(*specs: str) -> dict[str, Path]:
    """What a stage with these scorers reads beside its data, as inputs of its manifest."""
    return {f"scorer {spec}": in_project(spec.rpartition(":")[0] if ".py:" in spec else spec)
            for spec in specs if spec not in ("none", "likelihood")}


def likelihood(rows: list[dict], model: str | Path, common: Common) -> list[float]:
    """Mean log-prob of the response's tokens and its end, given the prompt, in nats per token."""
    chat, o = Chat(model, common.chat_template), TrainOptions(max_length=Config.load(model).context)
    sequences = [make_sequence(chat, row, row["response"], o) for row in rows]
    if None in sequences:
        raise InputError(f"record {rows[sequences.index(None)]['id']}: its prompt fills the context of {model}; remove it")
    scores = score_sequences(load(model, common.torch_dtype, DEVICE), sequences)
    gc.collect()
    return [logps.mean().item() for logps in scores]


@torch.no_grad()
def reward(rows: list[dict], model: str | Path, common: Common, budget: int = 8192) -> list[float]:
    """Output of a reward model at the last token of the conversation, answer included."""
    chat, config = Chat(model, common.chat_template), Config.load(model)
    ids = [chat.encode(chat.render([*messages_of(row), {"role": "assistant", "content": row["response"]}], False))
           for row in rows]
    for row, one in zip(rows, ids, strict=True):
        if len(one) > config.context:
            raise InputError(f"record {row['id']}: {len(one)} tokens, the context of {model} is {config.context}; remove it")
    net, scores = load(model, common.torch_dtype, DEVICE), [0.0] * len(rows)
    for [micro] in plan([len(one) for one in ids], 1, budget) if ids else ():
        context = Packed([len(ids[i]) for i in micro], DEVICE)
        tokens = torch.tensor([t for i in micro for t in ids[i]], device=DEVICE)
        for i, [score] in zip(micro, net(tokens, context, context.last).float().tolist(), strict=True):
            scores[i] = score
    return scores


def repetition(text: str) -> float:
    """Share of word trigrams that came before in the text; 0 for fewer than four words."""
    words = text.lower().split()
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if len(trigrams) > 1 else 0.0


# ---------------------------------------------------------------------------------------------- the filter

def make_pairs(chosen: list[dict], rejected: list[dict], out: str | Path, scorer: Scorer | None, o: FilterOptions,
               iteration: int = 1, seed: int = 0) -> dict:
    """Join two lists of answers by id, drop what the filter rejects, write the pairs; returns counts by reason.

    Raises InputError with the distribution of score gaps if nothing is left.
    """
    other = {row["id"]: row for row in rejected}
    joined = [(row, other[row["id"]]) for row in chosen if row["id"] in other]
    scores = [scorer([pair[side] for pair in joined]) if scorer else [None] * len(joined) for side in (0, 1)]
    kept, dropped, gaps = [], Counter(), []
    for (good, bad), score_good, score_bad in zip(joined, *scores, strict=True):
        if scorer:
            gaps.append(score_good - score_bad)
        if good["response"].split() == bad["response"].split():
            dropped["identical"] += 1
        elif not (good["response"] and bad["response"]):
            dropped["empty"] += 1
        elif good["finish_reason"] == "length" and not o.keep_cut_off:
            dropped["cut_off"] += 1
        elif max(repetition(good["response"]), repetition(bad["response"])) > o.repetition:
            dropped["repetitive"] += 1
        elif scorer and not score_good - score_bad > o.threshold:
            dropped["small_gap"] += 1
        else:
            asked = {name: good[name] for name in ("prompt", "messages") if name in good}
            kept.append({"id": good["id"], **asked, "chosen": good["response"], "rejected": bad["response"],
                         "score_chosen": score_good, "score_rejected": score_bad, "iteration": iteration})
    if not kept:
        raise InputError(f"{out}: no pair of {len(joined)} left ({dict(dropped)}); score gaps {quantiles(gaps)}; lower "
                         "the threshold or make more prompts")
    valid = len(kept)
    if valid > o.pairs:
        kept = [kept[i] for i in sorted(rng(seed, "pairs", iteration).sample(range(valid), o.pairs))]
    on_first(write_jsonl, out, kept)
    mean = lambda values: round(sum(values) / max(1, len(values)), 4)  # noqa: E731
    return {"candidates": len(joined), **dict(dropped), "valid": valid, "pairs": len(kept), "mean_gap": mean(gaps),
            "chosen_words": mean([len(row["chosen"].split()) for row in kept]),
            "rejected_words": mean([len(row["rejected"].split()) for row in kept])}


def quantiles(values: list[float]) -> str:
    """Smallest, quarter, median, three quarters, largest."""
    values = sorted(values)
    return " ".join(f"{values[round(q * (len(values) - 1))]:.3g}" for q in (0, 0.25, 0.5, 0.75, 1)) if values else "none"


@dataclass(kw_only=True)
class Options(FilterOptions, Common):
    model: str = ""  # M_0: the model that `likelihood` scores under
    chosen: str  # JSONL of answers {"prompt", "response", "finish_reason"}
    rejected: str  # JSONL of answers to the same prompts, joined by id
    out: str  # JSONL of pairs to write


def main(o: Options) -> dict:
    if not o.out.endswith(".jsonl"):
        raise InputError(f"--out {o.out}: give a name that ends in .jsonl")
    chosen, rejected = read_jsonl(o.chosen, "prompt"), read_jsonl(o.rejected, "prompt")
    if o.scorer == "likelihood" and not o.model:
        raise InputError("--scorer likelihood scores under a model; give --model DIR")
    inputs = {"chosen": o.chosen, "rejected": o.rejected, **({"model": o.model} if o.model else {})}
    return stage(o.out, inputs, {**part(o, FilterOptions), **part(o, Common)},
                 lambda: make_pairs(chosen, rejected, o.out, load_scorer(o.scorer, o.model, o), o, seed=o.seed))


if __name__ == "__main__":
    command(main, Options)

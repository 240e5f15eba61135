"""Preference optimisation: what a loss sees, the cache of reference log-probs, the training (SynPO section 3.3, equation 6).

What differs from the paper
1. The paper trains with SimPO and leaves lr, batch, epochs and the chosen beta open; DPO is the default here, the paper's
   recipes use SimPO with gamma 1.6. --loss names any other of losses/published.py, or a function of yours.
2. --nll adds NLL of the chosen answer, a mean over its tokens (off in the paper): it keeps chosen log-probs from falling.
3. The reference is M_0 in every iteration, so a pair's reference log-probs never change: computed once, kept in a cache
   addressed by model and tokens, that all iterations and processes share.

pairs.jsonl {prompt | messages, chosen, rejected} -> DIR: an HF checkpoint, metrics.jsonl, manifest.json

    python dpo.py --model DIR --pairs pairs.jsonl --out DIR --loss dpo --beta 0.1 --lr 5e-7
    torchrun --nproc-per-node 8 dpo.py --model DIR --pairs pairs.jsonl --out DIR --loss simpo --beta 2 --gamma 1.6
"""

import argparse
import gc
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from data import (
    DEVICE,
    RANK,
    WORLD,
    Chat,
    Common,
    InputError,
    command,
    digest,
    fingerprint,
    gather,
    load_function,
    on_first,
    part,
    plugin,
    read_jsonl,
    say,
    stage,
    write_jsonl,
)
from losses.pairs import differences, pair_logps, preference_of
from losses.published import fields_read, find_loss, with_parameters
from model import load
from train import (
    DryRun,
    Example,
    Objective,
    Sequence,
    TrainOptions,
    fit,
    make_batches,
    make_sequence,
    micro_batches,
    response_logps,
)


@dataclass(kw_only=True)
class PolicyOptions(TrainOptions):
    loss: str = "dpo"  # a name in losses/published.py or FILE.py:FUNCTION; its parameters are options: --loss NAME --help
    nll: float = 0.0  # weight of the chosen answer's mean negative log-prob, added to the loss
    lr: float = 5e-7  # peak learning rate
    epochs: int = 1  # passes over the pairs
    batch: int = 128  # pairs per optimizer step, over all processes

    def adapt(self, flags: list[str], prefix: str) -> "PolicyOptions":
        """The same options and those of the loss that the command line chooses."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument(f"--{prefix}loss", dest="loss", default=self.loss)
        chosen = parser.parse_known_args(flags)[0].loss
        bare = next(
            cls for cls in type(self).__mro__ if vars(cls).get("in_source", True)
        )  # without another loss's parameters
        return with_parameters(bare, chosen)(
            **{n: getattr(self, n) for n in bare.__dataclass_fields__} | {"loss": chosen}
        )


def policy_options(loss: str = "dpo", **values) -> PolicyOptions:
    """PolicyOptions for a loss: policy_options("simpo", beta=2.0, gamma=1.6, lr=6e-7)."""
    return with_parameters(PolicyOptions, loss)(loss=loss, **values)


def loss_parameters(o: PolicyOptions) -> dict[str, float]:
    return {name: getattr(o, name, default) for name, default in find_loss(o.loss)[1].items()}


# ---------------------------------------------------------------------------------------------- what a loss sees


def reads(o: PolicyOptions, second: str | Path = "", samples: str | Path = "") -> set[str]:
    """The fields of PairLogps that the loss reads; InputError where what they come from is not given."""
    read = fields_read(o.loss, **loss_parameters(o))
    for flag, given, name in (
        ("second-reference DIR", second, "ref2_chosen"),
        ("samples FILE.jsonl", samples, "sample"),
    ):
        if name in read and not given:
            raise InputError(f"--loss {o.loss} reads {name}; give dpo.py --{flag}")
    return read


def make_example(
    chat: Chat, row: dict, sample: dict | None, read: set[str], o: PolicyOptions
) -> Example | None:
    """A pair as chosen, rejected and, where the loss reads one, a self-sample; None if one of them does not fit."""
    texts = [row["chosen"], row["rejected"], *([sample["response"]] if sample else [])]
    sequences = [make_sequence(chat, row, text, o) for text in texts]
    if None in sequences:
        return None
    extra = {}
    if "preference" in read:
        extra["preference"] = preference_of(row)
    if "chosen_differs" in read or "rejected_differs" in read:
        extra["differs"] = differences(chat, *(ids[start:] for ids, start in sequences[:2]))
    return Example(row["id"], sequences, extra)


def preference_objective(o: PolicyOptions) -> Objective:
    """The objective of train.fit for pairs: sum of losses, and sums of the usual metrics, over a micro-batch."""
    function, parameters = find_loss(o.loss)[0], loss_parameters(o)

    def objective(
        examples: list[Example], logps: list[list[torch.Tensor]]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        p = pair_logps(examples, logps)
        loss, nll = function(p, **parameters), -p.mean_chosen
        referenced = p.ref_chosen is not None  # else the reward is beta times a mean, as in SimPO
        rewards = (
            (p.ratio_chosen, p.ratio_rejected) if referenced else (p.mean_chosen, p.mean_rejected)
        )
        reward_c, reward_r = (parameters.get("beta", 1.0) * x.detach() for x in rewards)
        metrics = {
            "preference_loss": loss,
            "rewards/chosen": reward_c,
            "rewards/rejected": reward_r,
            "rewards/accuracies": (reward_c > reward_r).float(),
            "rewards/margins": reward_c - reward_r,
            "logps/chosen": p.chosen,
            "logps/rejected": p.rejected,
            "nll/chosen": nll,
            "tokens/chosen": p.chosen_tokens.float(),
            "tokens/rejected": p.rejected_tokens.float(),
        }
        if (
            referenced
        ):  # nats per token between policy and reference, of both answers, whatever the sign
            metrics["drift"] = (p.ratio_chosen.abs() + p.ratio_rejected.abs()) / (
                p.chosen_tokens + p.rejected_tokens
            )
        return (loss + o.nll * nll).sum(), {
            name: value.sum().item() for name, value in metrics.items()
        }

    return objective


# ---------------------------------------------------------------------------------------------- reference log-probs


def reference_logps(
    model: str | Path,
    groups: list[list[Sequence]],
    root: str | Path,
    common: Common,
    per_token: bool = False,
    block: int = 16,
) -> dict[str, float | list[float]]:
    """Log-probs by key() of sequences under a frozen model, from the cache below root; what is missing is computed.

    Sums, or lists of the scored tokens' own (per_token).
    groups: what training will put into a forward pass together. A bf16 matmul rounds by the shape of its batch, so that is how
    they are scored, but for what is known already: policy and reference start from the same bits. One file per block of
    groups, so that a restart goes on where it stopped. Addressed by a hash of the model's files, the dtype, the token ids and
    where scoring starts: a changed template or tokenizer never hits.
    """
    folder = Path(root) / digest(
        fingerprint(model), common.dtype, *(["per token"] if per_token else [])
    )

    def known() -> dict[str, float]:
        return {
            row["id"]: row["logp"]
            for file in sorted(folder.glob("*.jsonl"))
            for row in read_jsonl(file)
        }

    cached = on_first(known)
    missing, computed = [], set()
    for group in groups:
        new = {key(s): s for s in group if key(s) not in cached and key(s) not in computed}
        computed |= new.keys()
        missing += [new] if new else []
    if missing:
        net = load(model, common.torch_dtype, DEVICE)
        for some in [missing[i : i + block] for i in range(0, len(missing), block)][RANK::WORLD]:
            with torch.no_grad():
                scores = {
                    name: (one if per_token else one.sum()).tolist()
                    for group in some
                    for name, one in zip(
                        group, response_logps(net, list(group.values())), strict=True
                    )
                }
            write_jsonl(
                folder / f"{digest([*scores])}.jsonl",
                [{"id": name, "logp": logp} for name, logp in scores.items()],
            )
        del net
        gc.collect()
        gather(None)  # wait for all; a broadcast would not
        cached = on_first(known)
    keys = {key(s) for group in groups for s in group}
    wrong = [name for name in keys if not torch.tensor(cached.get(name, math.nan)).isfinite().all()]
    if wrong:
        raise InputError(
            f"{folder}: {len(wrong)} of {len(keys)} reference log-probs are missing or not finite; delete "
            "the directory to compute them again"
        )
    say(
        f"  reference log-probs          {len(keys) - len(computed):,} cached  {len(computed):,} computed"
    )
    return cached


def key(sequence: Sequence) -> str:
    """A sequence's address in the cache."""
    return digest(*sequence)


# ---------------------------------------------------------------------------------------------- training


def train_policy(
    start: str | Path,
    pairs: list[dict],
    out: str | Path,
    o: PolicyOptions,
    common: Common,
    reference: str | Path,
    cache: str | Path,
    second: str | Path = "",
    samples: str | Path = "",
) -> dict:
    """Optimise the checkpoint start on pairs against reference; writes a checkpoint directory, returns counts.

    second: another reference; samples: JSONL of the model's own answers, joined by id. Only what the loss reads is used.
    """
    chat, read = Chat(start, common.chat_template), reads(o, second, samples)
    sampled = read_jsonl(samples, "response") if "sample" in read else []
    own = {row["id"]: row for row in sampled}
    lacking = [row["id"] for row in pairs if own and row["id"] not in own]
    if lacking or len(own) < len(sampled):
        raise InputError(
            f"{samples}: {len(lacking)} pairs have no answer there ({', '.join(lacking[:1]) or 'none'}), "
            f"{len(sampled) - len(own)} have further ones; give one to each pair's prompt (sample.py --samples 1)"
        )
    examples = [e for row in pairs if (e := make_example(chat, row, own.get(row["id"]), read, o))]
    if not examples:
        raise InputError(f"{out}: no pair fits --max-length {o.max_length}; raise it")
    groups = [
        [s for e in micro for s in e.sequences]
        for batch in make_batches(examples, o, common.seed)
        for ranks in micro_batches(batch, o)
        for micro in ranks
    ]
    for name, prefix, model in (("reference", "ref_", reference), ("reference2", "ref2_", second)):
        wanted = [one for one in read if one.startswith(prefix)]
        if wanted:
            if (
                Chat(model, common.chat_template).tokenizer.get_vocab()
                != chat.tokenizer.get_vocab()
            ):
                raise InputError(
                    f"{model}: its tokenizer is not that of {start}, so its log-probs are of other tokens"
                )
            logps = reference_logps(
                model, groups, cache, common, any(one.endswith("token_logp") for one in wanted)
            )
            for example in examples:
                example.extra[name] = [logps[key(s)] for s in example.sequences]
    same = "reference" in examples[0].extra and fingerprint(start) == fingerprint(reference)

    def check(line: dict) -> None:
        """Policy and reference are the same model at step 0: any difference is a fault in how they are scored."""
        known = f" (ln 2 = {math.log(2):.6f})" if o.loss == "dpo" else ""
        say(
            f"  step 0: loss {line['preference_loss']:.6f}{known}, margin {line['rewards/margins']:+.6f}"
        )
        # not 0 in bf16 where an earlier iteration filled the cache: it rounded in other batches
        if line["drift"] > (1e-4 if common.dtype == "float32" else 2e-2):
            raise InputError(
                f"{out}: at step 0 policy and reference, the same model, are {line['drift']:.4f} nats a token "
                f"apart (loss {line['preference_loss']:.4f}{known}); delete the cache {cache}, which does not fit"
            )

    counts = fit(
        start,
        out,
        examples,
        preference_objective(o),
        lambda example: 1,
        o,
        common,
        check if same else None,
    )
    return {"pairs": len(pairs), "too_long": len(pairs) - len(examples), **counts}


@dataclass(kw_only=True)
class Options(PolicyOptions, DryRun, Common):
    model: str  # checkpoint directory to start from
    pairs: str  # JSONL of {"prompt", "chosen", "rejected"}
    out: str  # checkpoint directory to write
    reference: str = ""  # frozen reference checkpoint; default: the one to start from
    cache: str = ""  # directory of reference log-probs, may be shared; default: OUT/reference
    second_reference: str = ""  # another frozen checkpoint with the same tokenizer, for mrpo
    samples: str = (
        ""  # JSONL of the model's own answers to the pairs' prompts, joined by id, for selm and xpo
    )


def main(o: Options) -> dict:
    if o.dry_run:
        return load_function("bench/memory.py:dry_run")(o, sequences=2)
    pairs, read = (
        read_jsonl(o.pairs, "prompt", "chosen", "rejected"),
        reads(o, o.second_reference, o.samples),
    )
    for name, prefix in (
        ("reference", "ref_"),
        ("cache", "ref"),
        ("second_reference", "ref2_"),
        ("samples", "sample"),
    ):
        if getattr(o, name) and not any(one.startswith(prefix) for one in read):
            raise InputError(
                f"--{name.replace('_', '-')}: --loss {o.loss} reads nothing of it; leave it out"
            )
    reference, extra = o.reference or o.model, {"second": o.second_reference, "samples": o.samples}
    return stage(
        o.out,
        {
            "model": o.model,
            "reference": reference,
            "pairs": o.pairs,
            **plugin(o.loss),
            **{name: path for name, path in extra.items() if path},
        },
        {**part(o, with_parameters(PolicyOptions, o.loss)), **part(o, Common)},
        lambda: train_policy(
            o.model, pairs, o.out, o, o, reference, o.cache or Path(o.out) / "reference", **extra
        ),
    )


if __name__ == "__main__":
    command(main, Options)

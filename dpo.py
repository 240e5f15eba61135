"""Preference optimisation: the losses, the cache of reference log-probs, the training (SynPO section 3.3, equation 6).

What differs from the paper
1. The paper trains with SimPO and leaves lr, batch, epochs and the chosen beta open; DPO is the default here, the paper's
   recipes use SimPO with gamma 1.6.
2. --nll adds NLL of the chosen answer, a mean over its tokens (off in the paper): it keeps chosen log-probs from falling.
3. The reference is M_0 in every iteration, so a pair's reference log-probs never change: computed once, kept in a cache
   addressed by model and tokens, that all iterations and processes share.

pairs.jsonl {prompt | messages, chosen, rejected} -> DIR: an HF checkpoint, metrics.jsonl, manifest.json

    python dpo.py --model DIR --pairs pairs.jsonl --out DIR --loss dpo --beta 0.1 --lr 5e-7
    torchrun --nproc-per-node 8 dpo.py --model DIR --pairs pairs.jsonl --out DIR --loss simpo --beta 2 --gamma 1.6
"""
import gc
import math
import typing
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from data import (DEVICE, RANK, WORLD, Chat, Common, InputError, command, digest, fingerprint, gather, load_function,
                  on_first, part, read_jsonl, say, stage, write_jsonl)
from model import load
from train import (DryRun, Example, Objective, Sequence, TrainOptions, fit, make_batches, make_sequence, micro_batches,
                   response_logps)


# ---------------------------------------------------------------------------------------------- losses

@dataclass
class PairLogps:
    """Log-probs of B pairs, summed over response tokens, and how many tokens those are; all (B,)."""
    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor
    ref_chosen: torch.Tensor  # zeros for a loss that needs no reference
    ref_rejected: torch.Tensor


def dpo_loss(p: PairLogps, o: "PolicyOptions") -> torch.Tensor:
    """DPO, arXiv 2305.18290 equation 7: -log sigmoid(beta h), h = (chosen - rejected) - (the same under the reference).

    (B,) each. Trap: only the difference is constrained; both log-probs usually fall.
    """
    return -F.logsigmoid(o.beta * ((p.chosen - p.rejected) - (p.ref_chosen - p.ref_rejected)))


def simpo_loss(p: PairLogps, o: "PolicyOptions") -> torch.Tensor:
    """SimPO, arXiv 2405.14734 equation 6: -log sigmoid(beta (mean chosen - mean rejected) - gamma), no reference.

    (B,) each. Trap: gamma is absolute here, as in SynPO; SimPO's own recipes give the ratio gamma / beta.
    """
    return -F.logsigmoid(o.beta * (p.chosen / p.chosen_tokens - p.rejected / p.rejected_tokens) - o.gamma)


LOSSES = {"dpo": dpo_loss, "simpo": simpo_loss}
NEEDS_REFERENCE = {"dpo"}


@dataclass(kw_only=True)
class PolicyOptions(TrainOptions):
    loss: typing.Literal["dpo", "simpo"] = "dpo"  # which loss
    beta: float = 0.1  # DPO: strength of the reference (0.1); SimPO: scale of mean log-probs (2 to 10)
    gamma: float = 1.6  # SimPO's target margin
    nll: float = 0.0  # weight of the chosen answer's mean negative log-prob
    lr: float = 5e-7  # peak learning rate
    epochs: int = 1  # passes over the pairs
    batch: int = 128  # pairs per optimizer step, over all processes


def preference_objective(o: PolicyOptions) -> Objective:
    """The objective of train.fit for pairs: sum of losses, and sums of the usual metrics, over a micro-batch."""
    def objective(examples: list[Example], logps: list[list[torch.Tensor]]) -> tuple[torch.Tensor, dict[str, float]]:
        chosen, rejected = (torch.stack([one[side].sum() for one in logps]) for side in (0, 1))  # (B,)
        lengths = torch.tensor([[len(c), len(r)] for c, r in logps], device=chosen.device)  # (B, 2)
        ref = torch.tensor([e.extra.get("reference", (0.0, 0.0)) for e in examples], device=chosen.device)  # (B, 2)
        p = PairLogps(chosen, rejected, *lengths.unbind(1), *ref.unbind(1))
        loss, nll = LOSSES[o.loss](p, o), -p.chosen / p.chosen_tokens
        scale = (1, 1) if o.loss in NEEDS_REFERENCE else (p.chosen_tokens, p.rejected_tokens)  # SimPO's reward is a mean
        reward_c, reward_r = (o.beta * x.detach() for x in (
            (p.chosen - p.ref_chosen) / scale[0], (p.rejected - p.ref_rejected) / scale[1]))
        metrics = {"preference_loss": loss, "rewards/chosen": reward_c, "rewards/rejected": reward_r,
                   "rewards/accuracies": (reward_c > reward_r).float(), "rewards/margins": reward_c - reward_r,
                   "logps/chosen": p.chosen, "logps/rejected": p.rejected, "nll/chosen": nll,
                   "tokens/chosen": p.chosen_tokens.float(), "tokens/rejected": p.rejected_tokens.float()}
        if o.loss in NEEDS_REFERENCE:  # nats per token between policy and reference, of both answers, whatever the sign
            metrics["drift"] = ((p.chosen - p.ref_chosen).abs() + (p.rejected - p.ref_rejected).abs()) / lengths.sum(1)
        return (loss + o.nll * nll).sum(), {name: value.sum().item() for name, value in metrics.items()}
    return objective


# ---------------------------------------------------------------------------------------------- reference log-probs

def reference_logps(model: str | Path, groups: list[list[Sequence]], root: str | Path, common: Common,
                    block: int = 16) -> dict[str, float]:
    """Summed log-probs by key() of sequences under a frozen model, from the cache below root; what is missing is computed.

    groups: what training will put into a forward pass together. A bf16 matmul rounds by the shape of its batch, so that is how
    they are scored, but for what is known already: policy and reference start from the same bits. One file per block of
    groups, so that a restart goes on where it stopped. Addressed by a hash of the model's files, the dtype, the token ids and
    where scoring starts: a changed template or tokenizer never hits.
    """
    folder = Path(root) / digest(fingerprint(model), common.dtype)

    def known() -> dict[str, float]:
        return {row["id"]: row["logp"] for file in sorted(folder.glob("*.jsonl")) for row in read_jsonl(file)}

    cached = on_first(known)
    missing, computed = [], set()
    for group in groups:
        new = {key(s): s for s in group if key(s) not in cached and key(s) not in computed}
        computed |= new.keys()
        missing += [new] if new else []
    if missing:
        net = load(model, common.torch_dtype, DEVICE)
        for some in [missing[i:i + block] for i in range(0, len(missing), block)][RANK::WORLD]:
            with torch.no_grad():
                scores = {name: one.sum().item() for group in some
                          for name, one in zip(group, response_logps(net, list(group.values())), strict=True)}
            write_jsonl(folder / f"{digest([*scores])}.jsonl", [{"id": name, "logp": logp} for name, logp in scores.items()])
        del net
        gc.collect()
        gather(None)  # wait for all; a broadcast would not
        cached = on_first(known)
    keys = {key(s) for group in groups for s in group}
    wrong = [name for name in keys if not math.isfinite(cached.get(name, math.nan))]
    if wrong:
        raise InputError(f"{folder}: {len(wrong)} of {len(keys)} reference log-probs are missing or not finite; delete "
                         "the directory to compute them again")
    say(f"  reference log-probs          {len(keys) - len(computed):,} cached  {len(computed):,} computed")
    return cached


def key(sequence: Sequence) -> str:
    """A sequence's address in the cache."""
    return digest(*sequence)


# ---------------------------------------------------------------------------------------------- training

def train_policy(start: str | Path, pairs: list[dict], out: str | Path, o: PolicyOptions, common: Common,
                 reference: str | Path, cache: str | Path) -> dict:
    """Optimise the checkpoint start on pairs against reference; writes a checkpoint directory, returns counts."""
    chat = Chat(start, common.chat_template)
    examples = []
    for row in pairs:
        sequences = [make_sequence(chat, row, row[side], o) for side in ("chosen", "rejected")]
        if None not in sequences:
            examples.append(Example(row["id"], sequences))
    if not examples:
        raise InputError(f"{out}: no pair fits --max-length {o.max_length}; raise it")
    if o.loss in NEEDS_REFERENCE:
        groups = [[s for e in micro for s in e.sequences] for batch in make_batches(examples, o, common.seed)
                  for ranks in micro_batches(batch, o) for micro in ranks]
        logps = reference_logps(reference, groups, cache, common)
        for example in examples:
            example.extra["reference"] = tuple(logps[key(s)] for s in example.sequences)
    same = o.loss == "dpo" and fingerprint(start) == fingerprint(reference)

    def check(line: dict) -> None:
        """Policy and reference are the same model at step 0: any difference is a fault in how they are scored."""
        if not same:
            return
        say(f"  step 0: loss {line['preference_loss']:.6f} (ln 2 = {math.log(2):.6f}), margin {line['rewards/margins']:+.6f}")
        # not 0 in bf16 where an earlier iteration filled the cache: it rounded in other batches
        if line["drift"] > (1e-4 if common.dtype == "float32" else 2e-2):
            raise InputError(f"{out}: DPO's first loss is {line['preference_loss']:.4f}, not ln 2; the cache {cache} does not "
                             f"fit the model {start} ({line['drift']:.4f} nats a token apart); delete it")

    counts = fit(start, out, examples, preference_objective(o), lambda example: 1, o, common, check)
    return {"pairs": len(pairs), "too_long": len(pairs) - len(examples), **counts}


@dataclass(kw_only=True)
class Options(PolicyOptions, DryRun, Common):
    model: str  # checkpoint directory to start from
    pairs: str  # JSONL of {"prompt", "chosen", "rejected"}
    out: str  # checkpoint directory to write
    reference: str = ""  # frozen reference checkpoint; default: the one to start from
    cache: str = ""  # directory of reference log-probs, may be shared; default: OUT/reference


def main(o: Options) -> dict:
    if o.dry_run:
        return load_function("bench/memory.py:dry_run")(o, sequences=2)
    pairs = read_jsonl(o.pairs, "prompt", "chosen", "rejected")
    reference = o.reference or o.model
    return stage(o.out, {"model": o.model, "reference": reference, "pairs": o.pairs},
                 {**part(o, PolicyOptions), **part(o, Common)},
                 lambda: train_policy(o.model, pairs, o.out, o, o, reference, o.cache or Path(o.out) / "reference"))


if __name__ == "__main__":
    command(main, Options)

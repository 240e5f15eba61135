r"""Preference optimisation: reference log-probs and training on pairs (SynPO section 3.3).

What differs from the paper
1. The paper trains with SimPO and leaves lr, batch, epochs and the chosen beta open; DPO is the
   default here, the paper's recipes use SimPO with gamma 1.6. --loss names any other of losses.py,
   or a function of yours.
2. --nll adds the NLL of the chosen response, a mean over its tokens (off in the paper): it keeps
   chosen log-probs from falling.
3. The reference is M_0 in every iteration, so a pair's reference log-probs never change: they are
   computed once and kept in a cache addressed by model and tokens, which all iterations and
   processes share.

pairs.jsonl {prompt | messages, chosen, rejected} -> DIR: an HF checkpoint and its metrics

    python dpo.py --model DIR --pairs pairs.jsonl --out DIR --loss dpo --beta 0.1 --lr 5e-7
    torchrun --nproc-per-node 8 dpo.py --model DIR --pairs pairs.jsonl --out DIR --loss simpo \
        --beta 2 --gamma 1.6
"""

import gc
import math
from collections import ChainMap
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from checkpoint import Checkpoint, load
from formats.chat import Chat
from formats.plugins import plugin_files
from formats.records import read_jsonl
from losses import Loss, differences, loss_flags, pair_logps, preference_of, resolve_loss
from ops.progress import Progress
from plumbing.files import InputError, digest
from plumbing.options import cli
from plumbing.parts import read_part, write_part
from plumbing.ranges import Count, NotNegative, Positive
from plumbing.ranks import DEVICE, RANK, WORLD, gather, on_rank0, print0
from plumbing.stage import Stage, fingerprint
from train import (
    Example,
    LossFn,
    Sequence,
    TrainOptions,
    fit,
    make_batches,
    make_sequence,
    mean_losses,
    micro_batches,
    response_logps,
)


@dataclass(frozen=True, kw_only=True)
class PolicyOptions(TrainOptions):
    loss: str = "dpo"  # a name in losses.py, or FILE.py:FUNCTION; shows its flags with --help
    loss_parameters: dict[str, float] = field(
        default_factory=dict, metadata={"entries": ("loss", loss_flags)}
    )
    nll: NotNegative = 0.0  # weight of the chosen response's mean negative log-prob in the loss
    lr: Positive = 5e-7  # peak learning rate
    epochs: Count = 1  # passes over the pairs
    batch: Count = 128  # pairs per optimizer step, over all processes
    second_reference: Checkpoint | None = None  # for mrpo
    self_samples: Path | None = None  # responses by id, for selm and xpo
    heldout_pairs: Path | None = None  # JSONL of pairs, measured during training
    heldout_every: Count = 10  # steps between two such measurements; the last step is measured too


# -------------------------------------------------------------------------------- what a loss sees


def policy_loss(o: PolicyOptions) -> Loss:
    """The loss with its parameters; InputError if an input that it reads is missing, or if one is
    given that it does not read.
    """
    loss = resolve_loss(o.loss, o.loss_parameters)
    inputs = (
        ("--second-reference DIR", o.second_reference, "ref2_"),
        ("--self-samples FILE.jsonl", o.self_samples, "sample"),
    )
    for flag, given, prefix in inputs:
        needed = any(name.startswith(prefix) for name in loss.reads)
        if needed and not given:
            raise InputError(f"--loss {o.loss} reads {prefix.strip('_')}; give {flag}")
        if given and not needed:
            raise InputError(f"{flag}: --loss {o.loss} does not read it; leave it out")
    return loss


def make_example(
    chat: Chat, row: dict, sample: dict | None, loss: Loss, o: PolicyOptions
) -> Example | None:
    """A pair as chosen, rejected and, where the loss reads one, a self-sample; None if one of them
    does not fit.
    """
    texts = [row["chosen"], row["rejected"]]
    if sample:
        texts.append(sample["response"])
    sequences = [make_sequence(chat, row, text, o) for text in texts]
    if None in sequences:
        return None
    example = Example(row["id"], sequences)
    if "preference" in loss.reads:
        example.extra["preference"] = preference_of(row)
    if loss.reads & {"chosen_differs", "rejected_differs"}:
        chosen, rejected = (ids[start:] for ids, start in sequences[:2])
        example.extra["differs"] = differences(chat, chosen, rejected)
    return example


def preference_loss(loss: Loss, o: PolicyOptions) -> LossFn:
    """The loss_fn of train.fit for pairs: sum of losses, and sums of the usual metrics, over a
    micro-batch.
    """

    def loss_fn(examples: list[Example], logps: list[list[torch.Tensor]]):
        p = pair_logps(examples, logps)
        losses = loss(p)  # (B,)
        nll = -p.mean_chosen  # (B,)

        # a reward is beta times the log-ratio to the reference; without one, as in SimPO, times the
        # mean log-prob
        referenced = p.ref_chosen is not None
        beta = loss.parameters.get("beta", 1.0)
        reward_chosen = beta * (p.ratio_chosen if referenced else p.mean_chosen).detach()
        reward_rejected = beta * (p.ratio_rejected if referenced else p.mean_rejected).detach()
        metrics = {
            "preference_loss": losses,
            "rewards/chosen": reward_chosen,
            "rewards/rejected": reward_rejected,
            "rewards/accuracies": (reward_chosen > reward_rejected).float(),
            "rewards/margins": reward_chosen - reward_rejected,
            "logps/chosen": p.chosen,
            "logps/rejected": p.rejected,
            "nll/chosen": nll,
            "tokens/chosen": p.chosen_tokens.float(),
            "tokens/rejected": p.rejected_tokens.float(),
        }
        if referenced:  # nats per token between policy and reference, whatever the sign
            moved = p.ratio_chosen.abs() + p.ratio_rejected.abs()
            metrics["drift"] = moved / (p.chosen_tokens + p.rejected_tokens)
        sums = {name: value.sum().item() for name, value in metrics.items()}
        return (losses + o.nll * nll).sum(), sums

    return loss_fn


# ----------------------------------------------------------------------------- reference log-probs


def reference_logps(
    model: str | Path,
    groups: list[list[Sequence]],
    cache: Path,
    o: TrainOptions,
    per_token: bool = False,
    block: int = 16,
) -> dict[str, float | list[float]]:
    """Log-probs, by key(), of sequences under a frozen model; those missing in the folder `cache`
    are computed.

    Sums, or lists of the scored tokens' own (per_token). groups: what training will put into one
    forward pass. A bf16 matmul rounds by the shape of its batch, so sequences are scored in these
    very groups, and policy and reference start from the same bits, but for pairs that an earlier
    iteration cached from other groups. One file a block of groups, so a restart resumes. A changed
    template or tokenizer never hits: keys hold model, dtype, token ids and where scoring starts.
    """
    parts = [on_rank0(fingerprint, model), o.run.dtype]
    if per_token:
        parts.append("per token")
    folder = cache / digest(*parts)
    cached = on_rank0(read_cache, folder)

    # what is missing, each sequence once
    known = set(cached)
    missing = []
    for group in groups:
        new = {key(s): s for s in group if key(s) not in known}
        known |= new.keys()
        if new:
            missing.append(new)
    if missing:
        net = load(model, o.run.torch_dtype, DEVICE)
        blocks = [missing[i : i + block] for i in range(0, len(missing), block)]
        write_blocks(folder, net, blocks[RANK::WORLD], per_token)
        del net
        gc.collect()
        gather(None)  # waits for all ranks: all blocks are written
        cached = on_rank0(read_cache, folder)

    # every one is there, and finite; per token or as a sum, a missing one counts as NaN
    keys = {key(s) for group in groups for s in group}
    wrong = [k for k in keys if not torch.tensor(cached.get(k, math.nan)).isfinite().all()]
    if wrong:
        problem = f"{len(wrong)} of {len(keys)} reference log-probs are missing or not finite"
        raise InputError(f"{folder}: {problem}; delete the folder to compute them again")
    computed = sum(map(len, missing))
    print0(f"  reference log-probs          {len(keys) - computed:,} cached  {computed:,} computed")
    return cached


def add_reference_logps(
    name: str,
    frozen: Path,
    batches: list[list[Example]],
    cache: Path,
    o: TrainOptions,
    per_token: bool = False,
) -> None:
    """Give the examples of batches their log-probs under a frozen model, as extra[name]: scored in
    the micro-batches of training.
    """
    groups = []
    for batch in batches:
        for ranks in micro_batches(batch, o):
            groups += [[s for example in micro for s in example.sequences] for micro in ranks]
    logps = reference_logps(frozen, groups, cache, o, per_token)
    for batch in batches:
        for example in batch:
            example.extra[name] = [logps[key(s)] for s in example.sequences]


def read_cache(folder: Path) -> dict[str, float | list[float]]:
    blocks = [read_part(file) for file in sorted(folder.glob("*.part"))]
    return dict(ChainMap(*filter(None, blocks)))


def write_blocks(folder: Path, net, blocks: list, per_token: bool) -> None:
    with Progress("reference log-probs", "block", len(blocks)) as progress:
        for groups in blocks:
            write_block(folder, net, groups, per_token)
            progress.update()


@torch.no_grad()
def write_block(folder: Path, net, groups: list[dict[str, Sequence]], per_token: bool) -> None:
    """Score groups of sequences by key, a forward pass a group, into one file."""
    scores = {}
    for group in groups:
        for name, logps in zip(group, response_logps(net, list(group.values())), strict=True):
            scores[name] = (logps if per_token else logps.sum()).tolist()
    write_part(folder / f"{digest(list(scores))}.part", scores)


def key(sequence: Sequence) -> str:
    """A sequence's address in the cache."""
    return digest(*sequence)


# ---------------------------------------------------------------------------------------- training


def train_policy(
    model: Checkpoint,  # where training starts
    pairs: list[Path],  # JSONL files of {"prompt", "chosen", "rejected"}
    out: Path,  # checkpoint directory to write
    o: PolicyOptions,
    reference: Checkpoint | None = None,  # frozen; only for losses that read one; default: model
    cache: Path | None = None,  # folder of reference log-probs; default: OUT.reference
) -> Path:
    """Optimise a checkpoint on pairs against a frozen reference."""
    # without the cache, which is addressed by content
    stage = Stage(
        out,
        o,
        model=model,
        reference=reference or model,
        pairs=pairs,
        loss_file=plugin_files(o.loss),
    )
    if stage.done:
        return out
    reference = reference or model
    loss = policy_loss(o)
    rows = [row for path in pairs for row in read_jsonl(path, "prompt", "chosen", "rejected")]
    examples, truncated = make_examples(model, rows, loss, stage, o)

    # of what the loss reads: for a field such as ref_chosen under the first reference, for
    # ref2_chosen under the second
    cache = cache or out.with_name(out.name + ".reference")
    batches = make_batches(examples, o)
    heldout = heldout_examples(model, loss, stage, o)
    references = (("reference", "ref_", reference), ("reference2", "ref2_", o.second_reference))
    for name, prefix, frozen in references:
        reads = [field for field in loss.reads if field.startswith(prefix)]
        if reads:
            check_vocabulary(frozen, model, o)
            per_token = any(field.endswith("token_logp") for field in reads)
            add_reference_logps(name, frozen, [*batches, heldout], cache, o, per_token)

    # where training starts from the reference, the two must agree at step 0
    check = None
    same_model = on_rank0(fingerprint, model) == on_rank0(fingerprint, reference)
    if same_model and "reference" in examples[0].extra:
        check = partial(check_start, out=out, cache=cache, o=o)
    loss_fn = preference_loss(loss, o)
    watch_pairs = partial(
        watch, heldout=heldout, loss_fn=loss_fn, last=len(batches), o=o, check=check
    )
    counts = fit(model, examples, loss_fn, stage, o, watch_pairs)
    too_long = len(rows) - len(examples)
    return stage.finish(pairs=len(rows), too_long=too_long, truncated=truncated, **counts)


def make_examples(
    model: Path, rows: list[dict], loss: Loss, stage: Stage, o: PolicyOptions
) -> tuple[list[Example], int]:
    """Examples of the pairs that fit, and how many of them lost an end; InputError if a pair lacks
    its self-sample, or none fits.
    """
    chat = Chat(model, o.run)
    samples = {}
    if "sample" in loss.reads:
        samples = read_self_samples(o.self_samples, rows)
    examples = []
    for row in rows:
        example = make_example(chat, row, samples.get(row["id"]), loss, o)
        if example is not None and not made_equal(example, row):
            examples.append(example)
    if not examples:
        raise InputError(f"{stage.out}: no pair fits --max-length {o.max_length}; raise it")
    truncated = sum(any(ids[-1] != chat.end for ids, _ in e.sequences) for e in examples)
    return examples, truncated


def heldout_pairs(o: PolicyOptions) -> list[dict]:
    """The records of --heldout-pairs, if any."""
    return read_jsonl(o.heldout_pairs, "prompt", "chosen", "rejected") if o.heldout_pairs else []


def heldout_examples(model: Path, loss: Loss, stage: Stage, o: PolicyOptions) -> list[Example]:
    rows = heldout_pairs(o)
    return make_examples(model, rows, loss, stage, o)[0] if rows else []


def watch(
    net: torch.nn.Module,
    line: dict,
    heldout: list[Example],
    loss_fn: LossFn,
    last: int,
    o: PolicyOptions,
    check: Callable[[dict], None] | None,
) -> dict:
    """More metrics of a step, as heldout/...: those of held-out pairs, every --heldout-every steps
    and after the last one.

    check(metrics of the first step) may raise.
    """
    step = line["step"]
    if check and step == 1:
        check(line)
    if not heldout or (step % o.heldout_every and step != last):
        return {}
    with torch.no_grad():
        means = mean_losses(net, heldout, loss_fn, o, backward=False)
    return {f"heldout/{name}": value for name, value in means.items()}


def made_equal(example: Example, row: dict) -> bool:
    """Whether max_length leaves no difference between chosen and rejected."""
    chosen, rejected = example.sequences[:2]
    return chosen == rejected and row["chosen"] != row["rejected"]


def read_self_samples(path: Path, pairs: list[dict]) -> dict[str, dict]:
    """The model's own responses by id; InputError unless there is one for each pair."""
    rows = read_jsonl(path, "response")
    by_id = {row["id"]: row for row in rows}
    lacking = [row["id"] for row in pairs if row["id"] not in by_id]
    surplus = len(rows) - len(by_id)
    if lacking or surplus:
        first = lacking[0] if lacking else "none"
        problem = f"{len(lacking)} pairs have no response there ({first}), {surplus} have several"
        fix = "give one for each pair's prompt (sample.py --samples 1)"
        raise InputError(f"{path}: {problem}; {fix}")
    return by_id


def check_vocabulary(reference: Path, model: Path, o: PolicyOptions) -> None:
    """Raise InputError unless two checkpoints share their tokens."""
    theirs = Chat(reference, o.run)
    ours = Chat(model, o.run)
    if theirs.tokenizer.get_vocab() != ours.tokenizer.get_vocab():
        problem = f"its tokenizer differs from that of {model}, so log-probs are of other tokens"
        raise InputError(f"{reference}: {problem}")


def check_start(metrics: dict, out: Path, cache: Path, o: PolicyOptions) -> None:
    """Raise InputError where policy and reference, the same model, differ at step 0: a fault in how
    they are scored. DPO's loss is then ln 2, to the rounding of the dtype.
    """
    known = f" (ln 2 = {math.log(2):.6f})" if o.loss == "dpo" else ""
    loss = metrics["preference_loss"]
    print0(f"  step 0: loss {loss:.6f}{known}, margin {metrics['rewards/margins']:+.6f}")
    # in bf16 not exactly 0 if an earlier iteration filled the cache, from batches of other shapes
    allowed = 1e-4 if o.run.dtype == "float32" else 2e-2
    if metrics["drift"] > allowed:
        apart = f"are {metrics['drift']:.4f} nats a token apart at step 0"
        problem = f"policy and reference, the same model, {apart}"
        fix = f"delete the cache {cache}, which does not fit"
        raise InputError(f"{out}: {problem} (loss {loss:.4f}{known}); {fix}")


if __name__ == "__main__":
    cli(train_policy)

"""What a loss sees: sums, means or tokens of log-probs, references, lengths, labels. Decided here, for every loss.

Notation: pc, pr are sums of log-probs over the response's tokens, the end token included, of chosen and rejected; rc, rr
the same under the frozen reference; mc, mr means per token; h = (pc - pr) - (rc - rr); uc = pc - rc, ur = pr - rr.
"""

from dataclasses import dataclass
from difflib import SequenceMatcher

import torch

from data import ROOT, Chat, InputError

STOP_WORDS = frozenset((ROOT / "stop_words.txt").read_text().split())


@dataclass
class PairLogps:
    """What a loss may read of B pairs; (B,) each, but for lists of B tensors (T,), T the tokens of that response."""

    chosen: torch.Tensor  # pc: sum over response tokens under the policy
    rejected: torch.Tensor  # pr
    chosen_tokens: torch.Tensor  # how many tokens those sums have
    rejected_tokens: torch.Tensor
    ref_chosen: torch.Tensor | None = None  # rc: the same under the frozen reference
    ref_rejected: torch.Tensor | None = None  # rr
    ref2_chosen: torch.Tensor | None = None  # under --second-reference
    ref2_rejected: torch.Tensor | None = None
    sample: torch.Tensor | None = (
        None  # sum for a response from --samples to the same prompt, policy
    )
    ref_sample: torch.Tensor | None = None  # reference
    preference: torch.Tensor | None = (
        None  # P(chosen is better): the pair's `preference`, else sigmoid of its score gap
    )
    chosen_token_logp: list[torch.Tensor] | None = None  # per token, policy
    rejected_token_logp: list[torch.Tensor] | None = None
    ref_chosen_token_logp: list[torch.Tensor] | None = None  # per token, reference
    ref_rejected_token_logp: list[torch.Tensor] | None = None
    chosen_differs: list[torch.Tensor] | None = (
        None  # bool: tokens that an edit from rejected to chosen puts in
    )
    rejected_differs: list[torch.Tensor] | None = None  # and those it takes away

    @property
    def mean_chosen(self) -> torch.Tensor:  # mc
        return self.chosen / self.chosen_tokens

    @property
    def mean_rejected(self) -> torch.Tensor:  # mr
        return self.rejected / self.rejected_tokens

    @property
    def ratio_chosen(self) -> torch.Tensor:  # uc
        return self.chosen - self.ref_chosen

    @property
    def ratio_rejected(self) -> torch.Tensor:  # ur
        return self.rejected - self.ref_rejected

    @property
    def margin(self) -> torch.Tensor:  # h
        return (self.chosen - self.rejected) - (self.ref_chosen - self.ref_rejected)


def pair_logps(examples: list, logps: list[list[torch.Tensor]]) -> PairLogps:
    """What a loss sees of a micro-batch; logps: by example, per token, of chosen, rejected and perhaps a self-sample."""
    device, seen = logps[0][0].device, {}

    def put(prefix: str, sides: list) -> None:
        for name, tensors in zip(
            ("chosen", "rejected", "sample"), zip(*sides, strict=True), strict=False
        ):
            seen[prefix + name], seen[f"{prefix}{name}_token_logp"] = (
                torch.stack([t.sum() for t in tensors]),
                tensors,
            )

    def extra(name: str) -> list:
        return [
            [torch.tensor(one, device=device) for one in e.extra[name]]
            for e in examples
            if name in e.extra
        ]

    put("", logps)
    put("ref_", extra("reference"))
    put("ref2_", extra("reference2"))
    for i, side in enumerate(("chosen", "rejected")):
        seen[f"{side}_tokens"] = torch.tensor([len(one[i]) for one in logps], device=device)
        seen[f"{side}_differs"] = [one[i] for one in extra("differs")]
    if "preference" in examples[0].extra:
        seen["preference"] = torch.tensor([e.extra["preference"] for e in examples], device=device)
    return PairLogps(
        **{name: value for name, value in seen.items() if name in PairLogps.__dataclass_fields__}
    )


def preference_of(row: dict) -> float:
    """P(chosen is better): the pair's own, or as Bradley and Terry have it of a reward model's scores."""
    if (
        row.get("score_chosen") is not None
        and row.get("score_rejected") is not None
        and "preference" not in row
    ):
        return (
            torch.tensor(row["score_chosen"] - row["score_rejected"], dtype=torch.float64)
            .sigmoid()
            .item()
        )
    if not isinstance(row.get("preference"), int | float) or not 0 <= row["preference"] <= 1:
        raise InputError(
            f"pair {row['id']}: field 'preference': give P(chosen is better), from 0 to 1, or both scores"
        )
    return row["preference"]


def differences(
    chat: Chat, chosen: list[int], rejected: list[int]
) -> tuple[list[bool], list[bool]]:
    """Which tokens an edit from rejected to chosen puts in, and which it takes away; a stop word never counts (BMC)."""
    marks = [False] * len(chosen), [False] * len(rejected)
    for kind, r, r_end, c, c_end in SequenceMatcher(
        None, rejected, chosen, autojunk=False
    ).get_opcodes():
        if kind != "equal":
            marks[0][c:c_end], marks[1][r:r_end] = [True] * (c_end - c), [True] * (r_end - r)
    return tuple(
        [
            mark and chat.text([token]).strip().lower() not in STOP_WORDS
            for mark, token in zip(some, ids, strict=True)
        ]
        for some, ids in zip(marks, (chosen, rejected), strict=True)
    )

"""Answer prompts: a KV-cached, ragged, batched sampler with slot refill (SynPO section 3.1, every y ~ M(. | x)).

What differs from the paper
1. The paper states the temperature (0.7) only; top-p is 1 and the token limit an option here.
2. Nothing is taken from a checkpoint's generation config but its end tokens: what is sampled is what is scored.

Reproducible: one uniform number per (seed, record id, sample, position) inverts the distribution's CDF, so a record's
luck depends on nothing else. Consecutive records form a chunk, the unit that is sampled, written and resumed, and that a
process takes when it is free: the same chunk with the same slots and threads on the same kind of machine gives the same bytes,
whatever the number of processes.

prompts.jsonl {prompt | messages, [id], [max_new_tokens]} -> out.jsonl {id, prompt, response, finish_reason, tokens}

    python sample.py --model DIR --prompts prompts.jsonl --out answers.jsonl
    torchrun --nproc-per-node 8 sample.py --model DIR --prompts prompts.jsonl --out answers.jsonl
"""

import gc
import json
import shutil
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from cpu import kernels
from cpu.pack import pack
from gpu.graph import Graph
from data import (
    DEVICE,
    RANK,
    Chat,
    Common,
    InputError,
    clock,
    command,
    deciding,
    digest,
    fingerprint,
    gather,
    memory,
    on_first,
    part,
    read_jsonl,
    share,
    spent,
    stage,
    write_jsonl,
    write_text,
)
from model import Cache, Config, Decode, Model, Prefill, load


@dataclass(kw_only=True)
class SampleOptions:
    temperature: float = 0.7  # 0 is greedy
    top_p: float = 1.0  # sample from the smallest set of tokens with this much probability; below 1 costs a sort
    max_new_tokens: int = 512  # limit per answer; a record's own max_new_tokens wins
    ignore_eos: bool = False  # go on to the limit
    stop: str = ""  # also end an answer once it contains this text
    slots: int = 128  # answers written at a time, at most: fewer where their KV cache takes more than half of the memory left
    chunk: int = 256  # consecutive records per unit of work
    prefill_tokens: int = 2048  # prompts are read in packed micro-batches of about so many tokens
    cuda_graph: bool = False  # GPU: record a chunk's decode step once and replay it (written from documentation, not measured)


# ---------------------------------------------------------------------------------------------- drawing a token


def uniform(keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One number in [0, 1) per pair of int64 (B,), (B,) -> (B,) float64, by splitmix64: a counter, so no state to keep."""

    def right(x, n):  # logical shift; int64's own is arithmetic
        return (x >> n) & ((1 << (64 - n)) - 1)

    x = keys + (positions + 1) * -0x61C8864680B583EB  # int64 wraps round, as the algorithm wants
    x = (x ^ right(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ right(x, 27)) * -0x6B2FB644ECCEEE15
    return right(x ^ right(x, 31), 11).double() * 2.0**-53


def draw(logits: torch.Tensor, u: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Tokens (B,) from logits (B, V) and uniform numbers u (B,): the first token whose cumulated probability exceeds u."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_p == 1 and kernels.ready(logits, 1):
        return kernels.draw(logits, u, temperature)
    logits = logits.float() / temperature
    weights = (logits - logits.amax(-1, keepdim=True)).exp()  # (B, V)
    if top_p < 1:
        ordered, order = weights.sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        weights = torch.zeros_like(weights).scatter(
            1, order, ordered * (before < top_p * ordered.sum(-1, keepdim=True))
        )
    # Two levels, in float64 where it counts: find the block of 256 tokens first, then the token inside it. A cumulative
    # sum over the whole vocabulary would cost more, and its fp32 rounding would drown rare tokens.
    blocks = F.pad(weights, (0, -weights.shape[1] % 256)).unflatten(
        1, (-1, 256)
    )  # (B, V / 256, 256)
    sums = blocks.sum(-1).double()
    block, left = invert(sums, u * sums.sum(-1))
    inside = blocks[torch.arange(len(block), device=block.device), block].double()  # (B, 256)
    return block * 256 + invert(inside, left)[0]


def invert(weights: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index (B,) of the first of weights (B, n) whose cumulative sum exceeds target (B,), and what is left of target."""
    ends = weights.cumsum(-1)
    target = target.minimum(ends[:, -1] * (1 - 1e-12))[
        :, None
    ]  # rounding must not step past the last positive weight
    index = torch.searchsorted(ends, target, right=True)
    left = target - ends.gather(1, index) + weights.gather(1, index)
    return index[:, 0], left[:, 0].clamp(
        min=0
    )  # rounding must not step before the first positive weight either


# ---------------------------------------------------------------------------------------------- the engine


@dataclass
class Request:
    ids: list[int]  # the prompt
    limit: int  # most tokens to write
    key: int = 0  # of its random numbers, int64
    output: list[int] = field(default_factory=list)
    finish_reason: str = ""  # "stop", or "length" where the limit cut it off


class Engine:
    """Writes the answers of a list of requests, some at a time; when some are finished, others take their places.

    `rows` are the requests being written: rows[i] has row i of the cache, without gaps. A row's last token is the one that
    is not in the cache yet; the next step reads it.
    """

    def __init__(self, model: Model, chat: Chat, o: SampleOptions, progress=None):
        self.model, self.chat, self.o, self.progress = model, chat, o, progress
        weight = next(model.parameters())
        self.dtype, self.device = weight.dtype, weight.device
        self.cache = self.graph = None  # of one run
        self.stops = set() if o.ignore_eos else chat.stops
        # a stop text can only be complete when a token comes that holds its last character, or the last of its bytes
        vocabulary = range(chat.tokenizer.get_vocab_size()) if o.stop else ()
        self.stop_ends = {i for i in vocabulary if {o.stop[-1], "\ufffd"} & set(chat.text([i]))}

    @torch.inference_mode()
    def run(self, requests: list[Request]) -> None:
        """Fill output and finish_reason of every request. Longest first, so that no long answer starts last."""
        config, queue, rows = self.model.config, deque(sorted(requests, key=lambda r: -r.limit)), []
        longest = max(len(r.ids) + r.limit for r in requests)
        left = memory() - sum(p.numel() * p.element_size() for p in self.model.parameters())
        slots = max(
            1,
            min(
                self.o.slots,
                len(requests),
                left // 2 // Cache.row_bytes(config, longest, self.dtype),
            ),
        )
        self.cache = self.graph = None  # of the last run: freed before there is another
        self.cache = Cache(config, slots, longest, self.dtype, self.device)
        while queue or rows:
            free = slots - len(rows)
            if (
                free > slots // 8
            ):  # some may stay free for a while: reading one prompt costs nearly as much as reading many
                while queue and len(rows) < slots:  # again where a first token was the last one
                    self.prefill(rows, queue, slots)
            if rows:
                self.decode(rows)

    def prefill(self, rows: list[Request], queue: deque[Request], slots: int) -> None:
        """Read the prompts of the next requests, as many as one micro-batch and the slots hold; draw their first tokens."""
        first, tokens = len(rows), 0
        while (
            queue
            and len(rows) < slots
            and (not tokens or tokens + len(queue[0].ids) <= self.o.prefill_tokens)
        ):
            rows.append(queue.popleft())
            tokens += len(rows[-1].ids)
        new = rows[first:]
        context = Prefill(
            self.cache, list(range(first, len(rows))), [len(r.ids) for r in new], self.device
        )
        ids = torch.tensor([t for r in new for t in r.ids], device=self.device)  # (N,)
        logits = self.model(ids, context, context.last)
        keys = torch.tensor([r.key for r in new], device=self.device)
        self.accept(rows, first, self.choose(logits, keys, torch.zeros_like(keys)))

    def decode(self, rows: list[Request]) -> None:
        """One more token for every row."""
        state = torch.tensor(
            [
                [r.output[-1] for r in rows],
                [len(r.ids) + len(r.output) - 1 for r in rows],
                [r.key for r in rows],
                [len(r.output) for r in rows],
            ]
        )  # (4, B)
        if self.o.cuda_graph:
            slots, tokens = self.cache.k.shape[1:3]
            state = F.pad(state, (0, slots - len(rows))).to(
                self.device
            )  # a graph has one shape; dead rows write to free slots
            self.graph = self.graph or Graph(lambda state: self.step(state, tokens), state)
            drawn = self.graph(state)[: len(rows)]
        else:
            drawn = self.step(state.to(self.device), max(len(r.ids) + len(r.output) for r in rows))
        self.accept(rows, 0, drawn)

    def step(self, state: torch.Tensor, live: int) -> torch.Tensor:
        """Next tokens (B,) from state (4, B): last tokens, how many are cached before them, keys, how many were written.

        One tensor, so that it is one copy to a GPU and the one input of a graph. live: see Decode.
        """
        ids, lengths, keys, counts = state
        context = Decode(self.cache, lengths, live, self.model.config.sliding_window)
        return self.choose(
            self.model(ids, context, torch.arange(len(ids), device=self.device)), keys, counts
        )

    def choose(self, logits, keys, counts) -> torch.Tensor:
        """Tokens (B,) from logits (B, V), by the random numbers of keys (B,) at positions counts (B,)."""
        return draw(logits, uniform(keys, counts), self.o.temperature, self.o.top_p)

    def accept(self, rows: list[Request], first: int, tokens: torch.Tensor) -> None:
        """Append tokens to rows[first:]; drop the rows that are finished and fill their places with the last ones."""
        for r, token in zip(rows[first:], tokens.tolist(), strict=True):
            r.output.append(token)
            if token in self.stops or (
                token in self.stop_ends
                and self.o.stop in self.chat.text(r.output[-len(self.o.stop.encode()) :])
            ):
                r.finish_reason = "stop"
            elif len(r.output) == r.limit:
                r.finish_reason = "length"
        for i in reversed(
            range(first, len(rows))
        ):  # so the last row is never a finished one, unless it is row i
            if rows[i].finish_reason:
                last = rows.pop()
                if i < len(rows):
                    rows[i] = last
                    self.cache.move_row(len(rows), i, len(last.ids) + len(last.output))
        if self.progress is not None:
            self.progress.update(len(tokens))


# ---------------------------------------------------------------------------------------------- files to files


def sample(
    model: str | Path,
    rows: list[dict],
    out: str | Path,
    o: SampleOptions,
    common: Common,
    purpose: str = "",
    samples: int = 1,
    source: str | Path = "prompts",
) -> dict:
    """Answer every record of rows into the file out; returns counts. Goes on with the chunks that an earlier call left.

    purpose: sets the random numbers of one use of a prompt apart from those of another; source: names rows in errors.
    Every rank calls it. Raises InputError before the weights are read if a prompt does not fit the model's context.
    """
    if o.cuda_graph and DEVICE.type != "cuda":
        raise InputError("--cuda-graph: there is no GPU; leave it out")
    for name, good in (
        ("temperature", o.temperature >= 0),
        ("top-p", 0 < o.top_p <= 1),
        ("slots", o.slots > 0),
        ("chunk", o.chunk > 0),
        ("samples", samples > 0),
    ):
        if not good:
            raise InputError(f"--{name}: the value makes no sense; see --help")
    out = Path(out)
    chat, config = Chat(model, common.chat_template), Config.load(model)
    with clock("waiting for data"):
        requests = [
            make_request(
                row,
                number,
                i,
                chat,
                config.context,
                o,
                digest_key(common.seed, purpose, row["id"], i),
                source,
            )
            for number, row in enumerate(rows, 1)
            for i in range(samples)
        ]
    starts = range(0, len(requests), o.chunk)
    parts = out.with_suffix(".parts")
    file_of = lambda start: parts / f"{start}.jsonl"  # noqa: E731
    key = digest(
        fingerprint(model),
        part(o, SampleOptions),
        deciding(part(common, Common)),
        purpose,
        samples,
        rows,
    )

    def unfinished():
        if not (parts / "key").is_file() or (parts / "key").read_text() != key:
            shutil.rmtree(parts, ignore_errors=True)
            write_text(parts / "key", key)
        return [start for start in starts if not file_of(start).is_file()]

    def merge():
        lines = [json.loads(line) for start in starts for line in open(file_of(start))]
        wanted = [(row["id"], i) for row in rows for i in range(samples)]
        assert [(line["id"], line.get("sample", 0)) for line in lines] == wanted, (
            "every record exactly once"
        )
        write_jsonl(out, lines)
        return {
            "records": len(rows),
            "answers": len(lines),
            "tokens": sum(line["tokens"] for line in lines),
            "cut_off": sum(line["finish_reason"] == "length" for line in lines),
        }

    pending = sorted(
        on_first(unfinished),
        key=lambda start: -sum(r.limit for r in requests[start : start + o.chunk]),
    )
    engine = None
    with tqdm(desc=out.stem, unit=" tok", leave=False, disable=RANK > 0 or not pending) as progress:
        for start in share(pending):  # the dearest chunk first
            engine = engine or Engine(
                pack(load(model, common.torch_dtype, DEVICE)), chat, o, progress
            )
            chunk = requests[start : start + o.chunk]
            engine.run(chunk)
            spent["done"] += sum(len(r.output) for r in chunk)
            write_jsonl(
                file_of(start),
                [
                    answer(rows[(start + i) // samples], (start + i) % samples, samples, r, chat, o)
                    for i, r in enumerate(chunk)
                ],
            )
    del engine
    gc.collect()
    gather(None)  # wait for all; a broadcast would not
    counts = on_first(merge)
    on_first(shutil.rmtree, parts, True)
    return counts


def digest_key(*parts) -> int:
    """64 bits of a hash, as the int64 that uniform() takes."""
    return int.from_bytes(bytes.fromhex(digest(*parts)), "big", signed=True)


def make_request(row, number, i, chat, context, o, key, source) -> Request:
    """Check and tokenise one record; the limit shrinks to what the context has room for."""
    ids, limit = chat.prompt_ids(row), row.get("max_new_tokens", o.max_new_tokens)
    if not isinstance(limit, int) or limit < 1:
        raise InputError(
            f"{source}: line {number}: field 'max_new_tokens' is {limit!r}; make it a positive whole number"
        )
    if not 0 < len(ids) < context:
        raise InputError(
            f"{source}: line {number}: field 'prompt' has {len(ids)} tokens with its template, the model's "
            f"context is {context}; shorten or remove it"
        )
    return Request(ids, min(limit, context - len(ids)), key)


def answer(row, i, samples, request, chat, o) -> dict:
    """The output record; an end token is counted but is no text."""
    kept = {name: row[name] for name in ("id", "prompt", "messages") if name in row}
    numbered = {"sample": i} if samples > 1 else {}
    return {
        **kept,
        **numbered,
        "response": chat.text(request.output).strip(),
        "finish_reason": request.finish_reason,
        "tokens": len(request.output),
    }


@dataclass(kw_only=True)
class Options(SampleOptions, Common):
    model: str  # checkpoint directory
    prompts: str  # JSONL of {"prompt"} or {"messages"}
    out: str  # JSONL to write
    samples: int = 1  # answers per prompt


def main(o: Options) -> dict:
    if not o.out.endswith(".jsonl"):
        raise InputError(f"--out {o.out}: give a name that ends in .jsonl")
    rows = read_jsonl(o.prompts, "prompt")
    options = {**part(o, SampleOptions), **part(o, Common), "samples": o.samples}
    return stage(
        o.out,
        {"model": o.model, "prompts": o.prompts},
        options,
        lambda: sample(o.model, rows, o.out, o, o, samples=o.samples, source=o.prompts),
    )


if __name__ == "__main__":
    command(main, Options)

"""Answer prompts: a KV-cached, ragged, batched sampler with slot refill (SynPO section 3.1).

What differs from the paper
1. The paper states the temperature (0.7) only; top-p is 1 and the token limit an option here.
2. Nothing is taken from a checkpoint's generation config but its end tokens: what is sampled is
   what is scored.

Reproducible: one uniform number per (seed, purpose, record id, sample, position) inverts the
distribution's CDF, so a record's samples depend on nothing else. Consecutive requests form a chunk,
the unit that is sampled, written and resumed, and that a rank takes when it is free. The same chunk
with the same slots and threads on the same kind of CPU gives the same bytes, however many processes
there are.

prompts.jsonl {prompt | messages} -> out.jsonl {id, prompt, response, finish_reason, tokens}
(a prompt may bring its own id and max_new_tokens)

    python sample.py --model DIR --prompt "Why is the sky blue?" --against OTHER_DIR
    python sample.py --model DIR --prompts prompts.jsonl --out answers.jsonl
    torchrun --nproc-per-node 8 sample.py --model DIR --prompts prompts.jsonl --out answers.jsonl
"""

import gc
import sys
from collections import deque
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from checkpoint import Checkpoint, load
from formats.chat import Chat
from formats.records import read_jsonl, where_of
from model import Model
from ops import cpu
from ops.attention import Cache, Decode, Prefill
from ops.cuda_graph import Graph
from ops.pack import pack
from ops.progress import Progress
from plumbing.files import InputError, JsonlPath, digest, write_jsonl
from plumbing.options import RunOptions, cli, peek
from plumbing.parts import read_part, write_part
from plumbing.ranges import Count, Mass, Temperature
from plumbing.ranks import DEVICE, gather, on_rank0, print0, work_queue
from plumbing.stage import Stage, name_of


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    run: RunOptions = RunOptions()
    temperature: Temperature = 0.7  # 0 is greedy
    top_p: Mass = 1.0  # nucleus: the fewest tokens with this probability; below 1 costs a sort
    max_new_tokens: Count = 512  # limit per response; a record's own max_new_tokens wins
    ignore_eos: bool = False  # go on to the limit
    stop: str = ""  # also end a response once it contains this text
    slots: Count = 128  # max batch size; reduced if the KV cache would exceed half of free memory
    chunk: Count = 256  # consecutive requests per unit of work
    prefill_tokens: Count = 2048  # prompts are read in packed micro-batches of about this size
    cuda_graph: bool = False  # GPU: replay the recorded decode step (not yet measured)

    def __post_init__(self):
        if self.cuda_graph and DEVICE.type != "cuda":
            raise InputError("--cuda-graph: there is no GPU; leave it out")


# --------------------------------------------------------------------------------- drawing a token


def uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One number in [0, 1) for each pair of int64 (B,), (B,) -> (B,) float64.

    splitmix64 is a hash of a counter, so there is no state to keep.
    """
    x = seeds + (positions + 1) * -0x61C8864680B583EB  # int64 wraps around, as the algorithm wants
    x = (x ^ shift_right(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ shift_right(x, 27)) * -0x6B2FB644ECCEEE15
    x = x ^ shift_right(x, 31)
    return shift_right(x, 11).double() * 2.0**-53


def shift_right(x: torch.Tensor, n: int) -> torch.Tensor:
    """A logical shift; that of int64 is arithmetic."""
    return (x >> n) & ((1 << (64 - n)) - 1)


@cpu.compiled(cpu.sample_token, multiple=1)
def sample_token(
    logits: torch.Tensor, u: torch.Tensor, temperature: float, top_p: float
) -> torch.Tensor:
    """Tokens (B,) from logits (B, V) and uniform numbers u (B,): the first whose cumulative
    probability exceeds u.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    weights = (logits - logits.amax(-1, keepdim=True)).exp()  # (B, V)
    if top_p < 1:
        ordered, order = weights.sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        kept = before < top_p * ordered.sum(-1, keepdim=True)
        weights = torch.zeros_like(weights).scatter(1, order, ordered * kept)

    # Two levels, in float64 where it counts: find the block of 256 tokens first, then the token
    # inside it. A cumulative sum over the whole vocabulary would cost more, and its fp32 rounding
    # would drown rare tokens.
    blocks = F.pad(weights, (0, -weights.shape[1] % 256)).unflatten(1, (-1, 256))  # (B, V/256, 256)
    sums = blocks.sum(-1).double()
    block, rest = inverse_cdf(sums, u * sums.sum(-1))
    inside = blocks[torch.arange(len(block), device=block.device), block].double()  # (B, 256)
    token, _ = inverse_cdf(inside, rest)
    return block * 256 + token


def inverse_cdf(weights: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index (B,) of the first of weights (B, n) whose cumulative sum exceeds target (B,), and the
    rest of target.
    """
    ends = weights.cumsum(-1)
    # rounding must not step past the last positive weight
    target = target.minimum(ends[:, -1] * (1 - 1e-12))[:, None]
    index = torch.searchsorted(ends, target, right=True)  # (B, 1)
    rest = target - ends.gather(1, index) + weights.gather(1, index)
    # nor step before the first positive weight
    return index[:, 0], rest[:, 0].clamp(min=0)


# -------------------------------------------------------------------------------------- the engine


@dataclass
class Request:
    ids: list[int]  # the prompt
    max_new_tokens: int
    seed: int = 0  # of its random numbers, int64
    output: list[int] = field(default_factory=list)
    finish_reason: str = ""  # "stop", or "length" where the limit cut it off


class Engine:
    """Continuous batching: finished rows are replaced from the queue.

    `rows` are the requests in progress: rows[i] has row i of the cache, without gaps. A row's last
    token is the one not yet in the cache; the next step reads it.
    """

    def __init__(self, model: Model, chat: Chat, o: SampleOptions, progress=None):
        self.model = model
        self.chat = chat
        self.o = o
        self.progress = progress
        self.cache = None  # of one run
        self.graph = None
        self.stop_token_ids = set() if o.ignore_eos else chat.stop_token_ids

    @torch.inference_mode()
    def run(self, requests: list[Request]) -> None:
        """Fill output and finish_reason of every request. Longest first, so that no long response
        starts last.
        """
        queue = deque(sorted(requests, key=lambda r: -r.max_new_tokens))
        rows: list[Request] = []
        slots = self.make_cache(requests)
        while queue or rows:
            # some slots may stay free for a while: one prompt costs nearly as much to read as many
            free = slots - len(rows)
            if free > slots // 8:
                while queue and len(rows) < slots:  # again where a first token was the last one
                    self.prefill(rows, queue, slots)
            if rows:
                self.decode(rows)

    def make_cache(self, requests: list[Request]) -> int:
        """Allocate the KV cache; returns how many rows it has."""
        longest = max(len(r.ids) + r.max_new_tokens for r in requests)
        slots = min(self.o.slots, len(requests), Cache.most_rows(self.model, longest))
        self.cache = None  # that of the last run is freed before there is another
        self.graph = None
        dtype = next(self.model.parameters()).dtype
        self.cache = Cache(self.model.config, slots, longest, dtype, DEVICE)
        return slots

    def prefill(self, rows: list[Request], queue: deque[Request], slots: int) -> None:
        """Read the prompts of the next requests, up to one micro-batch; draw their first tokens."""
        first = len(rows)
        tokens = 0
        while queue and len(rows) < slots:
            if tokens and tokens + len(queue[0].ids) > self.o.prefill_tokens:
                break
            rows.append(queue.popleft())
            tokens += len(rows[-1].ids)
        new = rows[first:]
        lengths = [len(r.ids) for r in new]
        context = Prefill(self.cache, list(range(first, len(rows))), lengths, DEVICE)
        ids = torch.tensor([token for r in new for token in r.ids], device=DEVICE)  # (N,)
        logits = self.model(ids, context, context.last)  # (B, V)
        seeds = torch.tensor([r.seed for r in new], device=DEVICE)
        self.append(rows, first, self.choose(logits, seeds, torch.zeros_like(seeds)))

    def decode(self, rows: list[Request]) -> None:
        """One more token for every row."""
        last = [r.output[-1] for r in rows]
        cached = [len(r.ids) + len(r.output) - 1 for r in rows]
        seeds = [r.seed for r in rows]
        written = [len(r.output) for r in rows]
        state = torch.tensor([last, cached, seeds, written])  # (4, B)
        if not self.o.cuda_graph:
            tokens = self.step(state.to(DEVICE), max(cached) + 1)
        else:
            # a graph has one shape; dead rows write to free slots
            slots, length = self.cache.k.shape[1:3]
            state = F.pad(state, (0, slots - len(rows))).to(DEVICE)
            if self.graph is None:
                self.graph = Graph(lambda state: self.step(state, length), state)
            tokens = self.graph(state)[: len(rows)]
        self.append(rows, 0, tokens)

    def step(self, state: torch.Tensor, live: int) -> torch.Tensor:
        """Next tokens (B,) from state (4, B): last tokens, how many are cached before them, seeds,
        how many are written.

        One tensor, so that it is one copy to a GPU and the one input of a graph. live: see Decode.
        """
        ids, lengths, seeds, written = state
        context = Decode(self.cache, lengths, live, self.model.config.sliding_window)
        logits = self.model(ids, context, torch.arange(len(ids), device=DEVICE))  # (B, V)
        return self.choose(logits, seeds, written)

    def choose(self, logits, seeds, written) -> torch.Tensor:
        """Tokens (B,) from logits (B, V), by the random numbers of seeds (B,) at positions written
        (B,).
        """
        return sample_token(logits, uniform(seeds, written), self.o.temperature, self.o.top_p)

    def append(self, rows: list[Request], first: int, tokens: torch.Tensor) -> None:
        """Append tokens to rows[first:]; drop finished rows, and fill their places with the last
        ones.
        """
        for r, token in zip(rows[first:], tokens.tolist(), strict=True):
            r.output.append(token)
            if token in self.stop_token_ids or self.has_stop(r):
                r.finish_reason = "stop"
            elif len(r.output) == r.max_new_tokens:
                r.finish_reason = "length"

        # from the end, so that the row moved is never a finished one
        for i in reversed(range(first, len(rows))):
            if rows[i].finish_reason:
                last = rows.pop()
                if i < len(rows):
                    rows[i] = last
                    self.cache.move_row(len(rows), i, len(last.ids) + len(last.output))
        if self.progress is not None:
            self.progress.update(len(tokens))

    def has_stop(self, r: Request) -> bool:
        """Whether the stop text is complete; its last tokens, one a byte at most, can tell."""
        stop = self.o.stop
        return stop != "" and stop in self.chat.raw_text(r.output[-len(stop.encode()) :])


# ---------------------------------------------------------------------------------- files to files


def sample(
    model: Checkpoint,  # a chat model
    prompts: Path,  # JSONL of {"prompt"} or {"messages"}
    out: JsonlPath,  # JSONL to write
    o: SampleOptions,
    samples: Count = 1,  # responses per prompt
    purpose: str = "",  # tells the random numbers of this use of a prompt from those of another
) -> Path:
    """Answer every prompt of a file; writes records {id, prompt | messages, response,
    finish_reason, tokens}.

    A record's field `prefix` is the beginning of its response, which the model goes on with.
    Several responses to a prompt are numbered in the field `sample`. Raises InputError before the
    weights are read if a prompt does not fit the model's positions.
    """
    stage = Stage(out, o, model=model, prompts=prompts, samples=samples, purpose=purpose)
    if stage.done:
        return out
    rows = read_jsonl(prompts, "prompt")
    counts = generate(model, repeat(rows, samples), out, o, stage.scratch, purpose)
    return stage.finish(records=len(rows), **counts)


def repeat(rows: list[dict], samples: int) -> list[dict]:
    """Every record once for each of its samples, numbered if there are several."""
    if samples == 1:
        return rows
    repeated = []
    for row in rows:
        for i in range(samples):
            repeated.append(copy(row))  # its place in the file, too
            repeated[-1]["sample"] = i
    return repeated


def generate(
    model: str | Path,
    rows: list[dict],
    out: Path,
    o: SampleOptions,
    scratch: Path,
    purpose: str = "",
) -> dict:
    """Write a response to each of rows into the file out; returns counts for Stage.finish().

    Chunks lie in the folder scratch; those that an earlier call left are kept. Every rank calls it.
    """
    chat = Chat(model, o.run)
    requests = []
    for row in rows:
        request = make_request(row, chat, o)
        request.seed = seed_of(o.run.seed, purpose, row["id"], row.get("sample", 0))
        requests.append(request)

    # a chunk is a file; those that exist are finished, and the longest of the others comes first
    parts = {start: scratch / f"chunk{start}.part" for start in range(0, len(rows), o.chunk)}
    pending = on_rank0(lambda: [start for start, part in parts.items() if not read_part(part)])
    pending.sort(
        key=lambda start: -sum(r.max_new_tokens for r in requests[start : start + o.chunk])
    )
    engine = None
    fresh = 0  # tokens that this call wrote
    with Progress(name_of(out), "token", silent=not pending) as progress:
        for start in work_queue(pending):
            if engine is None:
                engine = Engine(pack(load(model, o.run.torch_dtype, DEVICE)), chat, o, progress)
            chunk = slice(start, start + o.chunk)
            engine.run(requests[chunk])
            fresh += sum(len(r.output) for r in requests[chunk])
            pairs = zip(rows[chunk], requests[chunk], strict=True)
            write_part(parts[start], [make_answer(row, request, chat) for row, request in pairs])
    del engine
    gc.collect()
    fresh = sum(gather(fresh))  # and all chunks are written
    return {**on_rank0(merge, rows, list(parts.values()), out), "fresh": fresh}


def merge(rows: list[dict], parts: list[Path], out: Path) -> dict:
    """Join chunks into one file; returns counts."""
    answers = [answer for part in parts for answer in read_part(part)]
    wanted = [(row["id"], row.get("sample", 0)) for row in rows]
    found = [(answer["id"], answer.get("sample", 0)) for answer in answers]
    assert found == wanted, "every record must come exactly once"
    write_jsonl(out, answers)
    return {
        "answers": len(answers),
        "tokens": sum(answer["tokens"] for answer in answers),
        "cut_off": sum(answer["finish_reason"] == "length" for answer in answers),
    }


def seed_of(*parts) -> int:
    """64 bits of a hash, as the int64 that uniform() takes."""
    return int.from_bytes(bytes.fromhex(digest(*parts)), "big", signed=True)


def make_request(row: dict, chat: Chat, o: SampleOptions) -> Request:
    """Check and tokenise a record; its limit shrinks to the positions that are left."""
    where = where_of(row)
    ids = [*chat.prompt_ids(row), *chat.text_ids(row.get("prefix", ""))]
    limit = row.get("max_new_tokens", o.max_new_tokens)
    if not isinstance(limit, int) or limit < 1:
        problem = f"field 'max_new_tokens' must be a positive integer, got {limit!r}"
        raise InputError(f"{where}: {problem}")
    if not 0 < len(ids) < chat.max_positions:
        problem = f"field 'prompt' has {len(ids)} tokens with its template"
        positions = f"the model has {chat.max_positions} positions"
        raise InputError(f"{where}: {problem}, {positions}; shorten or remove it")
    return Request(ids, min(limit, chat.max_positions - len(ids)))


def fitting(rows: list[dict], chat: Chat, longest: int, source: Path) -> list[dict]:
    """The records whose prompts leave room for a token of a response. longest: tokens of both."""
    usable = [row for row in rows if len(chat.prompt_ids(row)) < longest]
    if not usable:
        raise InputError(
            f"{source}: no prompt leaves room for a response in {longest} tokens; shorten them, or "
            "raise max-length"
        )
    return usable


def make_answer(row: dict, request: Request, chat: Chat) -> dict:
    """The output record: the input's fields and the response. An end token is counted but is no
    text. A `prefix` of the input begins the response, which is then not stripped.
    """
    # decoded with what precedes it: alone, a token may lose the space that it begins with
    prefix = row.get("prefix", "")
    before = chat.text_ids(prefix)
    written_text = chat.text([*before, *request.output])[len(chat.text(before)) :]
    response = prefix + written_text if "prefix" in row else written_text.strip()
    written = ("id", "response", "finish_reason", "tokens")
    kept = {name: value for name, value in row.items() if name not in written}
    return {
        "id": row["id"],
        **kept,
        "response": response,
        "finish_reason": request.finish_reason,
        "tokens": len(request.output),
    }


# ------------------------------------------------------------------------------------- one prompt


def ask(
    model: Checkpoint,  # a chat model
    prompt: str,  # a text
    o: SampleOptions,
    against: Checkpoint | None = None,  # another one, whose response is printed below
) -> dict:
    """Print the response to one prompt; writes no file."""
    answers = {}
    for directory in filter(None, (model, against)):
        chat = Chat(directory, o.run)
        row = {"id": digest(prompt), "prompt": prompt}
        request = make_request(row, chat, o)
        request.seed = seed_of(o.run.seed, "", row["id"], 0)
        Engine(pack(load(directory, o.run.torch_dtype, DEVICE)), chat, o).run([request])
        answer = make_answer(row, request, chat)
        print0(f"\n{directory} ({answer['finish_reason']}):\n{answer['response']}\n")
        answers[str(directory)] = answer
    return answers


if __name__ == "__main__":
    cli(ask if peek(sys.argv, "prompt", "") else sample)

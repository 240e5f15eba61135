"""Our models in lm-evaluation-harness (lm_eval): its numbers by our forward pass and sampler.

Log-likelihoods: many requests share a prefix (a question and its choices, a few-shot prompt and
its questions). So requests are sorted and cut into micro-batches of about --batch-tokens, and a
token that several requests of a micro-batch share is computed once (class Tree). The head runs
only on rows that predict a continuation, its log-softmax in fp32. A text begins and is truncated
as in lm_eval's own model for transformers, so the numbers are the same to rounding.

Text: the sampler of sample.py, greedy unless a task asks for samples, ended by the first of the
task's stop texts.

Every rank builds all requests; micro-batches and chunks are distributed; every rank gets all
results.
"""

import random
from collections import ChainMap, Counter, defaultdict
from contextlib import contextmanager
from itertools import islice, takewhile
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from tqdm import tqdm

from checkpoint import load, load_config
from model import Model
from ops.attention import Packed, flash_attn_varlen_func, use_flash, window_size
from ops.pack import pack
from plumbing.chat import Chat
from plumbing.options import RunOptions
from plumbing.ranks import DEVICE, RANK, gather, work_queue
from plumbing.records import InputError
from sample import Engine, Request, SampleOptions, seed_of

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:  # Harness() reports it
    TemplateLM = object

SHARE = 16  # shorter shared prefixes are computed again: cheaper than separate attention
CHUNK = 512  # rows of logits at a time


# ---------------------------------------------------------------------------------- packages


@contextmanager
def optional():
    """Name a missing package; around imports that only evaluation needs."""
    try:
        yield
    except ImportError as error:
        fix = "pip install -r requirements-eval.txt"
        raise InputError(f"{error.name} is not installed; {fix}") from None


@contextmanager
def lm_eval_seeds():
    """Seed as lm_eval does; restore all random states afterwards."""
    python_state = random.getstate()
    numpy_state = numpy.random.get_state()
    with torch.random.fork_rng():
        random.seed(0)
        numpy.random.seed(1234)
        torch.manual_seed(1234)
        try:
            yield
        finally:
            random.setstate(python_state)
            numpy.random.set_state(numpy_state)


# ---------------------------------------------------------------------------------- shared prefixes


def shared_prefix(a: list[int], b: list[int]) -> int:
    """Number of tokens at the start of both sequences."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    return len(list(same))


class Tree:
    """Causal attention in sequences of which each holds only what the one before it lacks.

    sequences: S of them in lexicographic order, so each shares most with the one before it.
    `tokens` (N,) are all that is computed, `positions` (N,) those in their sequences, for RoPE.
    paths[i] (T_i,) says where the tokens of sequence i are.
    """

    def __init__(self, sequences: list[list[int]], window: int | None, device="cpu"):
        self.paths: list[torch.Tensor] = []
        # of sequences that differ from the one before: number of queries, path, mask
        self.lengths: list[int] = []
        self.keys: list[torch.Tensor] = []
        self.masks: list[torch.Tensor | None] = []
        tokens: list[int] = []
        positions: list[int] = []
        before: list[int] = []
        for ids in sequences:
            shared = shared_prefix(before, ids)
            if shared < min(SHARE, len(ids)):
                shared = 0
            n = len(ids) - shared
            path = torch.arange(len(tokens), len(tokens) + n, device=device)
            if shared:
                path = torch.cat([self.paths[-1][:shared], path])
            self.paths.append(path)
            if n:
                self.lengths.append(n)
                self.keys.append(path)
                self.masks.append(branch_mask(n, len(ids), window, device) if shared else None)
            tokens += ids[shared:]
            positions += range(shared, len(ids))
            before = ids
        self.tokens = torch.tensor(tokens, device=device)  # (N,)
        self.positions = torch.tensor(positions, device=device)  # (N,)

    def attend(self, layer: int, q, k, v, window: int | None):
        """q (N, H, D), k and v (N, Hkv, D) -> (N, H, D)."""
        if use_flash(q):
            return self.attend_flash(q, k, v, window)
        outputs = []
        for own, path, mask in zip(q.split(self.lengths), self.keys, self.masks, strict=True):
            if mask is None:  # shares nothing
                out = Packed([len(own)]).attend(layer, own, k[path], v[path], window)
            else:
                out = attend_branch(own, k[path], v[path], mask)
            outputs.append(out)
        return torch.cat(outputs)

    def attend_flash(self, q, k, v, window: int | None):
        """One call for all: flash-attn's causal mask is aligned to the last query and key."""
        queries = Packed(self.lengths, q.device)
        keys = Packed([len(path) for path in self.keys], q.device)
        path = torch.cat(self.keys)
        return flash_attn_varlen_func(
            q,
            k[path],
            v[path],
            queries.cu_seqlens,
            keys.cu_seqlens,
            max(queries.lengths),
            max(keys.lengths),
            causal=True,
            window_size=window_size(window),
        )


def attend_branch(q, k, v, mask):
    """q (n, H, D), k and v (T, Hkv, D), mask (n, T) -> (n, H, D)."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, H or Hkv, n or T, D)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1)


def branch_mask(n: int, T: int, window: int | None, device) -> torch.Tensor:
    """(n, T): which of T keys each of n queries sees; the last query is at the last key."""
    mask = torch.ones(n, T, dtype=torch.bool, device=device).tril(T - n)
    return mask if window is None else mask.triu(T - n - window + 1)


# ---------------------------------------------------------------------------------- log-likelihoods

# tokens to read, and the tokens that their last rows must predict
Pair = tuple[list[int], list[int]]


def cut(pairs: list[Pair], budget: int) -> list[list[int]]:
    """Indices of pairs, sorted by the tokens they read, in micro-batches of about `budget` tokens.

    Shared tokens count once.
    """
    batches: list[list[int]] = []
    tokens = 0
    limit = 0
    last: list[int] = []
    for i in sorted(range(len(pairs)), key=lambda i: pairs[i]):
        # tokens that it adds to the micro-batch
        ids = pairs[i][0]
        new = len(ids) - shared_prefix(last, ids)
        if not batches or tokens + new > limit:
            batches.append([])
            tokens = 0
            new = len(ids)
            limit = max(budget, 2 * len(ids))  # a long prefix leaves room for its continuations
        batches[-1].append(i)
        tokens += new
        last = ids
    return batches


@torch.inference_mode()
def score(model: Model, pairs: list[Pair]) -> list[tuple[float, bool]]:
    """(log-prob of the targets, whether greedy decoding gives them) of sorted pairs.

    Not by Model.forward(), which materialises all logits, or gives log-probs without the argmax.
    """
    # rows: which tokens of the tree predict the targets
    tree = Tree([ids for ids, _ in pairs], model.config.sliding_window, DEVICE)
    counts = [len(targets) for _, targets in pairs]
    rows = torch.cat([path[-n:] for path, n in zip(tree.paths, counts, strict=True)])  # (M,)
    targets = torch.tensor([t for _, targets in pairs for t in targets], device=DEVICE)  # (M,)

    # one forward pass over the tree
    angles = tree.positions[:, None].float() * model.frequencies.to(DEVICE)  # (N, D/2)
    cos = angles.cos()[:, None]
    sin = angles.sin()[:, None]
    x = model.model(tree.tokens, cos, sin, tree)[rows]  # (M, C)

    # logits of a chunk of rows at a time
    logps = []
    greedy = []
    for hidden, wanted in zip(x.split(CHUNK), targets.split(CHUNK), strict=True):
        logits = F.linear(hidden, model.head.weight).float()  # (chunk, V)
        logps.append(-F.cross_entropy(logits, wanted, reduction="none"))
        greedy.append(logits.argmax(1) == wanted)
    sums = [float(part.sum()) for part in torch.cat(logps).cpu().split(counts)]
    hits = [bool(part.all()) for part in torch.cat(greedy).cpu().split(counts)]
    return list(zip(sums, hits, strict=True))


# ---------------------------------------------------------------------------------- generation


class Until(Engine):
    """The sampler with any number of stop texts."""

    def __init__(self, model: Model, chat: Chat, o: SampleOptions, until: list[str], progress=None):
        super().__init__(model, chat, o, progress)
        # special tokens never show in the text
        named = {chat.tokenizer.token_to_id(text) for text in until}
        special = named & chat.tokenizer.get_added_tokens_decoder().keys()
        self.stop_token_ids = self.stop_token_ids | special
        self.until = until
        # a token has at least one byte
        self.tail = max((len(text.encode()) for text in until), default=1)

    def has_stop(self, r: Request) -> bool:
        tail = self.chat.text(r.output[-self.tail :])
        return any(stop in tail for stop in self.until)


def generation(given: dict, limit: int) -> tuple[list[str], int, float, float]:
    """Stop texts, token limit, temperature and top-p of a task's generation_kwargs.

    Greedy unless the task gives a temperature.
    """
    given = normalize_gen_kwargs(given, limit)
    temperature = float(given.get("temperature") or 0)
    unknown = given.keys() - {"max_gen_toks", "until", "do_sample", "temperature", "top_p"}
    if temperature and unknown:
        name = min(unknown)
        raise InputError(f"a task samples with {name}; only temperature and top_p are supported")
    top_p = float(given.get("top_p") or 1) if temperature else 1.0
    until = [text for text in given["until"] if text]
    return until, given["max_gen_toks"], temperature, top_p


# ---------------------------------------------------------------------------------- the adapter


class Harness(TemplateLM):
    """A checkpoint directory as an lm_eval model, for evaluate() below."""

    # what lm_eval asks for; all but the first are set in __init__()
    max_gen_toks = 256
    eot_token_id = 0
    prefix_token_id = 0
    tokenizer_name = ""

    def __init__(
        self,
        directory: str | Path,
        run: RunOptions,
        batch_tokens: int = 4096,
        slots: int = 128,
        chat: bool = False,
    ):
        """chat: whether tasks will ask for the chat template; only then must there be one."""
        if TemplateLM is object:
            raise InputError("lm_eval is not installed; pip install -r requirements-eval.txt")
        super().__init__()
        self.directory = Path(directory)
        self.run = run
        self.batch_tokens = batch_tokens
        self.slots = slots
        self.max_length = load_config(directory).max_positions
        self.tokenizer_name = str(directory)
        self.chat = Chat(directory, run.chat_template or ("" if chat else "default"))
        self.model = None
        self.packed = False

        # the first token of a text: BOS, else EOS
        bos = self.special_token("bos_token")
        eos = self.special_token("eos_token")
        self.eot_token_id = min(self.chat.stop_token_ids) if eos is None else eos
        self.prefix_token_id = self.eot_token_id if bos is None else bos
        prefix = [self.prefix_token_id]
        self.prefix = self.chat.tokenizer.decode(prefix, skip_special_tokens=False)

    def special_token(self, name: str) -> int | None:
        """The id of a token that tokenizer_config.json names."""
        value = self.chat.settings("tokenizer_config.json").get(name)
        if isinstance(value, dict):
            value = value["content"]
        return self.chat.tokenizer.token_to_id(value) if value else None

    def weights(self, packed: bool) -> Model:
        """The model as it is, for scoring, or packed, for generation; only one is in memory."""
        if self.model is None or self.packed != packed:
            self.model = None
            model = load(self.directory, self.run.torch_dtype, DEVICE)
            self.model = pack(model) if packed else model
            self.packed = packed
        return self.model

    # ---- texts

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs
    ) -> list[int]:
        """Token ids; special ones as the tokenizer adds them, unless the text has a BOS already."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.prefix)
        return self.chat.tokenizer.encode(string, add_special_tokens=add_special_tokens).ids

    def apply_chat_template(
        self, chat_history: list[dict], add_generation_prompt: bool = True
    ) -> str:
        text = self.chat.render(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        # the last message is the start of an answer to be continued: cut off what closes it
        content = chat_history[-1]["content"].lstrip()
        if content not in text:
            content = content.rstrip()
        return text[: text.rindex(content) + len(content)]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.chat.template if chat_template else None

    # ---- requests

    def loglikelihood(self, requests, disable_tqdm: bool = False):
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or RANK > 0)

    def _loglikelihood_tokens(
        self, requests, disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        """lm_eval's hook: requests are (texts, context ids, continuation ids)."""
        pairs = []
        for _, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                problem = f"a continuation has {len(continuation)} tokens"
                limit = f"it must have 1 to {self.max_length}, the model's positions"
                raise InputError(f"{self.directory}: {problem}; {limit}")
            ids = (context + continuation)[-self.max_length - 1 :]  # truncated from the left
            pairs.append((ids[:-1], continuation))

        # each micro-batch on the rank that is free
        results = {}
        batches = cut(pairs, self.batch_tokens)
        bar = {"total": len(batches), "leave": False, "disable": disable_tqdm or RANK > 0}
        for batch in tqdm(work_queue(batches), "log-likelihoods", **bar):
            scores = score(self.weights(packed=False), [pairs[i] for i in batch])
            results.update(zip(batch, scores, strict=True))
        return in_order(results)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of at most max_length tokens.

        Every token is predicted once.
        """
        # windows of all texts, and how many of each
        windows = []
        counts = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            cuts = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            own = [(None, *make_disjoint_window(window)) for window in cuts]
            windows += own
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        return [sum(logp for logp, _ in islice(scores, n)) for n in counts]

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        # requests with the same settings go together
        groups = defaultdict(list)
        jobs = []
        seen: Counter = Counter()
        for i, request in enumerate(requests):
            context, given = request.args
            until, limit, temperature, top_p = generation(given, self.max_gen_toks)
            if limit >= self.max_length:
                problem = f"a task asks for {limit} tokens"
                positions = f"the model has {self.max_length} positions"
                raise InputError(f"{self.directory}: {problem}; {positions}")
            ids = self.tok_encode(context)[limit - self.max_length :]  # truncated from the left
            seed = seed_of(self.run.seed, "lm_eval", context, seen[context])
            seen[context] += 1  # samples of one context differ
            jobs.append(Request(ids, limit, seed))
            groups[(temperature, top_p, *until)].append(i)
        size = 2 * self.slots
        chunks = []
        for settings, members in groups.items():
            chunks += [(settings, members[i : i + size]) for i in range(0, len(members), size)]

        # each chunk on the rank that is free
        texts = {}
        silent = disable_tqdm or RANK > 0
        with tqdm(desc="answers", unit=" tok", leave=False, disable=silent) as progress:
            for (temperature, top_p, *until), chunk in work_queue(chunks):
                o = SampleOptions(temperature=temperature, top_p=top_p, slots=self.slots)
                engine = Until(self.weights(packed=True), self.chat, o, until, progress)
                engine.run([jobs[i] for i in chunk])
                for i in chunk:
                    text = self.chat.text(jobs[i].output)
                    texts[i] = postprocess_generated_text(text, until, None)
        return in_order(texts)


def in_order(results: dict) -> list:
    """Results 0 .. n-1 of all ranks, on every rank."""
    merged = ChainMap(*gather(results))
    return [merged[i] for i in range(len(merged))]


def evaluate(
    model, tasks: list[str], manager, limit: int = 0, chat: bool = False, samples: bool = False
) -> dict:
    """lm_eval's results of tasks that its TaskManager knows, on every rank.

    model: a Harness, or any of lm_eval's models. samples: also what was asked and answered.
    """
    with optional():
        from lm_eval import evaluator
    with lm_eval_seeds():  # few-shot examples and shuffled choices are the same for every model
        loaded = manager.load(tasks)
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=1234)
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
        # simple_evaluate() is this, and a report on the machine that takes seconds
        return evaluator.evaluate(
            model,
            loaded,
            limit=limit or None,
            bootstrap_iters=100,  # for standard errors
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            log_samples=samples,
        )

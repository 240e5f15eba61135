"""Our models in lm-evaluation-harness (lm_eval): its numbers by our forward pass and sampler.

Log-likelihoods: what a request reads is its context and its continuation without the last token.
Inputs go through packed forward passes of about --batch-tokens, equal ones once: those of choices
of one token, such as MMLU's letters. The head runs only on rows that predict a continuation, its
log-softmax in fp32. A text begins and is truncated as in lm_eval's own model for transformers, so
the numbers are the same to rounding.

Text: the sampler of sample.py, greedy, ended by the first of the task's stop texts.

Every rank builds all requests; micro-batches and chunks are distributed; every rank gets all
results.
"""

import random
from collections import ChainMap, defaultdict
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F

from checkpoint import load
from formats.chat import Chat
from model import Model
from ops.attention import Packed
from ops.pack import pack
from ops.progress import Progress
from plumbing.files import InputError
from plumbing.options import RunOptions
from plumbing.ranks import DEVICE, gather, work_queue
from sample import Engine, Request, SampleOptions

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import Collator, normalize_gen_kwargs, postprocess_generated_text
except ImportError:  # eval/leaderboard.py reports it before it makes a Harness
    TemplateLM = object


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


# ---------------------------------------------------------------------------------- log-likelihoods

Input = tuple[int, ...]  # tokens to read: a context and a continuation without the last token


def micro_batches(inputs: Iterable[Input], budget: int) -> list[list[Input]]:
    """Inputs of at most `budget` tokens together, the longest first; a longer one stands alone."""
    batches: list[list[Input]] = []
    room = 0
    for ids in sorted(inputs, key=len, reverse=True):
        if len(ids) > room:
            batches.append([])
            room = budget
        batches[-1].append(ids)
        room -= len(ids)
    return batches


@torch.inference_mode()
def score(
    model: Model, inputs: list[Input], continuations: list[list[list[int]]]
) -> list[tuple[float, bool]]:
    """(log-prob, whether greedy decoding gives it) of each continuation of each input.

    Costs 8 * M * V bytes for M predicted tokens.
    """
    # a continuation is predicted by the last rows of its input
    context = Packed([len(ids) for ids in inputs], DEVICE)
    rows = []
    targets = []
    counts = []
    for end, several in zip(context.starts[1:].tolist(), continuations, strict=True):
        for continuation in several:
            rows += range(end - len(continuation), end)
            targets += continuation
            counts.append(len(continuation))

    # one packed forward pass
    tokens = torch.tensor([token for ids in inputs for token in ids], device=DEVICE)  # (N,)
    rows = torch.tensor(rows, device=DEVICE)  # (M,)
    targets = torch.tensor(targets, device=DEVICE)  # (M,)
    logits = model(tokens, context, rows).float()  # (M, V)
    logps = -F.cross_entropy(logits, targets, reduction="none")  # (M,)
    hits = logits.argmax(-1) == targets  # (M,)
    both = zip(logps.cpu().split(counts), hits.cpu().split(counts), strict=True)
    return [(float(logp.sum()), bool(hit.all())) for logp, hit in both]


# ---------------------------------------------------------------------------------- generation


class Until(Engine):
    """The sampler with any number of stop texts, which may be special tokens."""

    def __init__(self, model: Model, chat: Chat, o: SampleOptions, until: list[str], progress=None):
        super().__init__(model, chat, o, progress)
        self.until = until
        # a token has at least one byte
        self.tail = max((len(text.encode()) for text in until), default=1)

    def has_stop(self, r: Request) -> bool:
        tail = self.chat.tokenizer.decode(r.output[-self.tail :], skip_special_tokens=False)
        return any(stop in tail for stop in self.until)


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
        super().__init__()
        self.batch_tokens = batch_tokens
        self.slots = slots
        self.tokenizer_name = str(directory)
        template = run.chat_template or ("" if chat else "default")
        self.chat = Chat(directory, replace(run, chat_template=template))
        self.model = pack(load(directory, run.torch_dtype, DEVICE))
        self.max_length = self.model.config.max_positions

        # the first token of a text: BOS, else EOS, as the chat template knows them
        special = self.chat.special
        tokenizer = self.chat.tokenizer
        end = special.get("eos_token") or tokenizer.id_to_token(min(self.chat.stop_token_ids))
        self.prefix = special.get("bos_token") or end
        self.eot_token_id = tokenizer.token_to_id(end)
        self.prefix_token_id = tokenizer.token_to_id(self.prefix)

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

    # ---- requests

    def _loglikelihood_tokens(
        self, requests, disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        """lm_eval's hook: requests are (texts, context ids, continuation ids)."""
        # equal inputs are computed once: input -> requests
        asked = defaultdict(list)
        for i, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                problem = f"a continuation has {len(continuation)} tokens, not 1 to the model's"
                raise InputError(f"{self.tokenizer_name}: {problem} {self.max_length} positions")
            ids = (context + continuation)[-self.max_length - 1 : -1]  # truncated from the left
            asked[tuple(ids)].append(i)

        # each micro-batch on the rank that is free
        results = {}
        batches = micro_batches(asked, self.batch_tokens)
        with Progress("log-likelihoods", "batch", len(batches), silent=disable_tqdm) as progress:
            for batch in work_queue(batches):
                members = [asked[ids] for ids in batch]
                continuations = [[requests[i][2] for i in several] for several in members]
                scores = score(self.model, batch, continuations)
                results.update(zip(chain(*members), scores, strict=True))
                progress.update()
        return in_order(results)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        raise InputError("likelihoods of whole texts are not here; use `lm_eval --model hf`")

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        # chunks of requests with the same settings
        asked = [request.args for request in requests]
        ordered = Collator(asked, lambda one: len(one[0]), group_by="gen_kwargs")
        chunks = list(enumerate(ordered.get_batched(2 * self.slots)))

        # each chunk on the rank that is free
        texts = {}
        with Progress("answers", "token", silent=disable_tqdm) as progress:
            for i, chunk in work_queue(chunks):
                texts[i] = self.write([context for context, _ in chunk], chunk[0][1], progress)
        return ordered.get_original(list(chain(*in_order(texts))))

    def write(self, contexts: list[str], given: dict, progress) -> list[str]:
        """Greedy continuations of texts; given: a task's generation_kwargs."""
        given = normalize_gen_kwargs(given, self.max_gen_toks)
        if given.get("temperature"):
            problem = "a task samples its answers, which are greedy here"
            raise InputError(f"{problem}; use `lm_eval --model hf`")
        limit = given["max_gen_toks"]
        room = self.max_length - limit
        if room <= 0:
            problem = f"a task asks for {limit} tokens; the model has {self.max_length} positions"
            raise InputError(f"{self.tokenizer_name}: {problem}")
        # truncated from the left
        jobs = [Request(self.tok_encode(context)[-room:], limit) for context in contexts]
        until = [text for text in given["until"] if text]
        o = SampleOptions(temperature=0.0, slots=self.slots)
        Until(self.model, self.chat, o, until, progress).run(jobs)
        texts = [self.chat.text(job.output) for job in jobs]
        return [postprocess_generated_text(text, until, None) for text in texts]


def in_order(results: dict) -> list:
    """Results 0 .. n-1 of all ranks, on every rank."""
    merged = ChainMap(*gather(results))
    return [merged[i] for i in range(len(merged))]


def evaluate(model, tasks: list[str], manager, limit: int = 0, chat: bool = False) -> dict | None:
    """lm_eval's results of tasks that its TaskManager knows, on each node's first rank.

    model: a Harness, or any of lm_eval's models.
    """
    with optional():
        from lm_eval import simple_evaluate
    with lm_eval_seeds():  # few-shot examples and shuffled choices are the same for every model
        return simple_evaluate(
            model,
            tasks=tasks,
            task_manager=manager,
            limit=limit or None,
            bootstrap_iters=100,  # for standard errors
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )

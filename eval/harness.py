"""Our models in lm-evaluation-harness (pip lm_eval): its numbers through our forward pass and sampler.

Log-likelihoods: many requests begin alike (one question and its choices, one few-shot prompt and its questions), so the
requests are sorted, cut into micro-batches of about --batch-tokens, and every token that requests of a micro-batch share is
computed once: Tree. The head runs on the rows that predict a continuation only, its log-softmax in fp32. Where a text
begins and is cut is decided as by lm_eval's own model for transformers, so the numbers are the same to rounding.
Text: the sampler of sample.py, greedy unless a task asks for samples, cut at the first of the task's stop texts.

Every rank builds all requests, the work is dealt out in micro-batches and chunks, and every rank gets all results.
"""

from collections import Counter, defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from cpu.pack import pack
from data import DEVICE, RANK, Chat, Common, InputError, clock, gather, load_json, share, spent
from eval.optional import optional, own_luck
from model import Config, Model, Packed, flash_attn_varlen_func, load, use_flash, window_size
from sample import Engine, Request, SampleOptions, digest_key

try:
    from lm_eval.api.model import TemplateLM
except ImportError:  # Harness() says so
    TemplateLM = object

SHARE = (
    16  # a beginning of fewer tokens is computed again: that is cheaper than attention of its own
)
CHUNK = 512  # rows of logits at a time
LIMITS = (
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
)  # names for one thing in lm_eval's tasks


# ---------------------------------------------------------------------------------------------- attention over a tree


def common(a: list[int], b: list[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


class Tree:
    """Causal attention in sequences of which each has only those of its tokens that the sequence before it lacks.

    sequences: S different ones in lexicographic order, so that the one before is the one with which most is shared. `tokens`
    (N,) holds roots (sequences that share nothing) first, then branches; paths[i] (T_i,) says where the tokens of sequence i
    are, `positions` (N,) at which place in their sequences they stand.
    """

    def __init__(
        self, sequences: list[list[int]], window: int | None, device: torch.device | str = "cpu"
    ):
        shared = [common(a, b) for a, b in zip([[], *sequences], sequences, strict=False)]
        shared = [n if n >= SHARE else 0 for n in shared]
        own = [len(ids) - n for ids, n in zip(sequences, shared, strict=True)]
        order = sorted(range(len(sequences)), key=lambda i: shared[i] > 0)
        starts = dict(
            zip(order, torch.tensor([0, *(own[i] for i in order)]).cumsum(0).tolist(), strict=False)
        )
        self.paths: list[torch.Tensor] = []
        for i, n in enumerate(shared):
            mine = torch.arange(starts[i], starts[i] + own[i])
            self.paths.append(torch.cat([self.paths[-1][:n], mine]) if n else mine)
        self.tokens = torch.tensor(
            [t for i in order for t in sequences[i][shared[i] :]], device=device
        )  # (N,)
        self.positions = torch.cat([torch.arange(shared[i], len(sequences[i])) for i in order]).to(
            device
        )  # (N,)
        self.roots = Packed([own[i] for i in order if not shared[i]], device)
        branches = [i for i in order if shared[i]]
        self.lengths = [own[i] for i in branches]
        self.keys = [self.paths[i].to(device) for i in branches]
        # a branch's last query is at its last key; (n, T): which keys each query sees
        self.masks = [
            torch.ones(n, len(keys), dtype=torch.bool, device=device).tril(len(keys) - n)
            for n, keys in zip(self.lengths, self.keys, strict=True)
        ]
        if window is not None:
            self.masks = [mask.triu(mask.shape[1] - len(mask) - window + 1) for mask in self.masks]

    def attend(self, layer: int, q, k, v, window: int | None):
        """q (N, H, D), k and v (N, Hkv, D) -> (N, H, D)."""
        R = sum(self.roots.lengths)
        outputs = [self.roots.attend(layer, q[:R], k[:R], v[:R], window)]
        if self.lengths:
            outputs += (
                [self.attend_flash(q[R:], k, v, window)]
                if use_flash(q)
                else self.attend_plain(q[R:], k, v)
            )
        return torch.cat(outputs)

    def attend_plain(self, q, k, v) -> list[torch.Tensor]:
        """One SDPA call a branch: (n, H, D) each."""
        outputs, (Hkv, D) = [], k.shape[1:]
        for q1, keys, mask in zip(q.split(self.lengths), self.keys, self.masks, strict=True):
            G = (
                q1.shape[1] // Hkv
            )  # the heads of a group as G queries of one head: keys are not copied for GQA
            q1 = (
                q1.view(len(q1), Hkv, G, D).transpose(0, 1).reshape(1, Hkv, -1, D)
            )  # (1, Hkv, n * G, D)
            k1, v1 = (x[keys].transpose(0, 1)[None] for x in (k, v))  # (1, Hkv, T, D)
            out = F.scaled_dot_product_attention(q1, k1, v1, attn_mask=mask.repeat_interleave(G, 0))
            outputs.append(out.view(Hkv, -1, G, D).transpose(0, 1).flatten(1, 2))
        return outputs

    def attend_flash(self, q, k, v, window: int | None):
        """One call for all branches: its causal mask is aligned to the last query and key."""
        ends = [
            torch.tensor([0, *sizes]).cumsum(0).to(torch.int32).to(q.device)
            for sizes in (self.lengths, [len(keys) for keys in self.keys])
        ]
        keys = torch.cat(self.keys)
        return flash_attn_varlen_func(
            q,
            k[keys],
            v[keys],
            *ends,
            max(self.lengths),
            max(map(len, self.keys)),
            causal=True,
            window_size=window_size(window),
        )


Pair = tuple[
    list[int], list[int]
]  # what the model reads, and the tokens that its last rows are to predict


def cut(pairs: list[Pair], budget: int) -> list[list[int]]:
    """Indices of pairs, sorted by what is read, in micro-batches of about budget tokens, shared ones counted once."""
    batches, tokens, limit, last = [], 0, 0, []
    for i in sorted(range(len(pairs)), key=lambda i: pairs[i]):
        ids = pairs[i][0]
        new = len(ids) - common(last, ids)
        if not batches or tokens + new > limit:
            batches.append([])
            tokens, new, limit = (
                0,
                len(ids),
                max(budget, 2 * len(ids)),
            )  # room for a long beginning's continuations
        batches[-1].append(i)
        tokens, last = tokens + new, ids
    return batches


@torch.inference_mode()
def score(model: Model, pairs: list[Pair]) -> list[tuple[float, bool]]:
    """Of each of some sorted pairs: the fp32 log-prob of its targets, and whether each was the likeliest token."""
    with clock("waiting for data"):
        sequences = [ids for i, (ids, _) in enumerate(pairs) if not i or ids != pairs[i - 1][0]]
        place = {tuple(ids): i for i, ids in enumerate(sequences)}
        tree = Tree(sequences, model.config.sliding_window, DEVICE)
        counts = [len(targets) for _, targets in pairs]
        rows = torch.cat(
            [tree.paths[place[tuple(ids)]][-n:] for (ids, _), n in zip(pairs, counts, strict=True)]
        )  # (M,)
        rows, back = rows.unique(
            return_inverse=True
        )  # single tokens after one context are predicted by one row
        rows, back = rows.to(DEVICE), back.to(DEVICE)
        targets = torch.tensor([t for _, targets in pairs for t in targets], device=DEVICE)  # (M,)
        angles = tree.positions[:, None].float() * model.frequencies.to(DEVICE)  # (N, D/2)
    spent.update(tokens=len(tree.tokens), flop=model.flop(len(tree.tokens), len(rows)))
    # Model.forward() would hold all logits at once, or give log-probs without the likeliest tokens
    x = model.model(tree.tokens, angles.cos()[:, None], angles.sin()[:, None], tree)[rows]
    logps, likeliest = (
        torch.empty(len(targets), device=DEVICE),
        torch.empty(len(targets), dtype=torch.bool, device=DEVICE),
    )
    for start in range(0, len(rows), CHUNK):
        logits = F.linear(x[start : start + CHUNK], model.head.weight).float()
        here = (back >= start) & (back < start + CHUNK)
        row, wanted = back[here] - start, targets[here]
        logps[here] = logits[row, wanted] - logits.logsumexp(1)[row]
        likeliest[here] = logits.argmax(1)[row] == wanted
    return [
        (float(p.sum()), bool(best.all()))
        for p, best in zip(logps.cpu().split(counts), likeliest.cpu().split(counts), strict=True)
    ]


# ---------------------------------------------------------------------------------------------- generation


class Until(Engine):
    """The sampler with any number of stop texts."""

    def __init__(self, model: Model, chat: Chat, o: SampleOptions, until: list[str], progress=None):
        super().__init__(model, chat, o, progress)
        tokens = {
            chat.tokenizer.token_to_id(text) for text in until
        }  # special ones never show in the text
        self.stops = self.stops | (tokens & chat.tokenizer.get_added_tokens_decoder().keys())
        self.until, self.tail = (
            until,
            max((len(text.encode()) for text in until), default=0),
        )  # a token has a byte or more

    def accept(self, rows, first, tokens):
        for r, token in zip(rows[first:], tokens.tolist(), strict=True):
            text = self.chat.text([*r.output, token][-self.tail :]) if self.tail else ""
            if any(stop in text for stop in self.until):
                r.limit = len(r.output) + 1  # this token is its last one
        super().accept(rows, first, tokens)


# ---------------------------------------------------------------------------------------------- the adapter


class Harness(TemplateLM):
    """A checkpoint directory as an lm_eval model: pass it to evaluate() below."""

    def __init__(
        self,
        directory: str | Path,
        common: Common,
        batch_tokens: int = 4096,
        slots: int = 128,
        chat: bool = False,
    ):
        """chat: whether the tasks will ask for the chat template; only then a checkpoint must have one."""
        if TemplateLM is object:
            optional("lm_eval.api.model")
        super().__init__()
        self.directory, self.common, self.batch_tokens, self.slots = (
            Path(directory),
            common,
            batch_tokens,
            slots,
        )
        self.config = Config.load(directory)
        self.chat = Chat(directory, common.chat_template or ("" if chat else "default"))
        path = self.directory / "tokenizer_config.json"
        settings = load_json(path) if path.is_file() else {}
        named = {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in settings.items()
            if name in ("bos_token", "eos_token")
        }
        token_id = lambda name: (
            self.chat.tokenizer.token_to_id(named[name]) if named.get(name) else None
        )  # noqa: E731
        bos, eos = token_id("bos_token"), token_id("eos_token")
        self._eot_token_id = eos if eos is not None else min(self.chat.stops)
        self._prefix_token_id = bos if bos is not None else self._eot_token_id
        self.prefix = self.chat.tokenizer.decode([self._prefix_token_id], skip_special_tokens=False)
        self.model, self.kind = None, None

    eot_token_id = property(lambda self: self._eot_token_id)
    prefix_token_id = property(lambda self: self._prefix_token_id)
    max_length = property(lambda self: self.config.context)
    max_gen_toks = property(lambda self: 256)
    tokenizer_name = property(lambda self: str(self.directory).replace("/", "__"))

    def weights(self, kind) -> Model:
        """The model, as it is for scoring or packed for generation; never both at a time."""
        if self.kind is not kind:
            self.model = None
            self.model, self.kind = (
                kind(load(self.directory, self.common.torch_dtype, DEVICE)),
                kind,
            )
        return self.model

    # ---- texts

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs
    ) -> list[int]:
        """Token ids; special ones around them as the tokenizer says, unless the text has a BOS already."""
        special = (
            add_special_tokens
            if add_special_tokens is not None
            else not string.startswith(self.prefix)
        )
        return self.chat.tokenizer.encode(string, add_special_tokens=special).ids

    def apply_chat_template(
        self, chat_history: list[dict], add_generation_prompt: bool = True
    ) -> str:
        text = self.chat.render(chat_history, add_generation_prompt)
        if (
            not add_generation_prompt
        ):  # the last message is the beginning of an answer that is to go on
            content = chat_history[-1]["content"].lstrip()
            content = content if content in text else content.rstrip()
            text = text[: text.rindex(content) + len(content)]
        return text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.chat.template if chat_template else None

    # ---- requests

    def loglikelihood(self, requests, disable_tqdm: bool = False):
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or RANK > 0)

    def _loglikelihood_tokens(
        self, requests, disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        pairs = []
        for _, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise InputError(
                    f"{self.directory}: a continuation of {len(continuation)} tokens; the model's context is "
                    f"{self.max_length}"
                )
            ids = (context + continuation)[
                -self.max_length - 1 :
            ]  # what is too long loses its beginning
            pairs.append((ids[:-1], continuation))
        batches, results = cut(pairs, self.batch_tokens), {}
        with tqdm(
            total=len(pairs), desc="log-likelihoods", leave=False, disable=disable_tqdm or RANK > 0
        ) as progress:
            for batch in share(batches):
                results.update(
                    zip(
                        batch,
                        score(self.weights(load_only), [pairs[i] for i in batch]),
                        strict=True,
                    )
                )
                progress.update(len(batch))
        results = {i: result for some in gather(results) for i, result in some.items()}
        return [results[i] for i in range(len(pairs))]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the model's context that do not overlap in what they predict."""
        utils, windows, owner = optional("lm_eval.utils"), [], []
        for i, request in enumerate(requests):
            for window in utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            ):
                windows.append((None, *utils.make_disjoint_window(window)))
                owner.append(i)
        sums = [0.0] * len(requests)
        for i, (logp, _) in zip(
            owner, self._loglikelihood_tokens(windows, disable_tqdm), strict=True
        ):
            sums[i] += logp
        return sums

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        groups, jobs, seen = defaultdict(list), [], Counter()
        for i, (context, given) in enumerate(request.args for request in requests):
            until, limit, temperature, top_p = generation(given, self.max_gen_toks)
            if limit >= self.max_length:
                raise InputError(
                    f"{self.directory}: a task wants {limit} tokens, the model's context is {self.max_length}"
                )
            ids = self.tok_encode(context)[limit - self.max_length :]
            jobs.append(
                Request(ids, limit, digest_key(self.common.seed, "lm_eval", context, seen[context]))
            )
            seen[context] += 1
            groups[(temperature, top_p, *until)].append(i)
        chunks = [
            (how, some[start : start + 2 * self.slots])
            for how, some in groups.items()
            for start in range(0, len(some), 2 * self.slots)
        ]
        texts = {}
        with tqdm(
            desc="answers", unit=" tok", leave=False, disable=disable_tqdm or RANK > 0
        ) as progress:
            for (temperature, top_p, *until), chunk in share(chunks):
                o = SampleOptions(temperature=temperature, top_p=top_p, slots=self.slots)
                Until(self.weights(pack), self.chat, o, until, progress).run(
                    [jobs[i] for i in chunk]
                )
                for i in chunk:
                    texts[i] = self.chat.text(jobs[i].output)
                    for stop in until:
                        texts[i] = texts[i].split(stop)[0]
        texts = {i: text for some in gather(texts) for i, text in some.items()}
        return [texts[i] for i in range(len(requests))]


def load_only(model: Model) -> Model:
    """Weights as they are."""
    return model


def generation(given: dict, limit: int) -> tuple[list[str], int, float, float]:
    """Stop texts, most tokens, temperature and top-p of a task's generation_kwargs."""
    until = given.get("until") or []
    until = [text for text in ([until] if isinstance(until, str) else until) if text]
    limit = next((int(given[name]) for name in LIMITS if given.get(name) is not None), limit)
    temperature = float(given.get("temperature") or 0) if given.get("do_sample", True) else 0.0
    unknown = given.keys() - {*LIMITS, "until", "do_sample", "temperature", "top_p"}
    if temperature and unknown:
        raise InputError(
            f"a task samples with {sorted(unknown)[0]}, which the sampler does not have; temperature and top_p "
            "are all"
        )
    return until, limit, temperature, float(given.get("top_p") or 1) if temperature else 1.0


def evaluate(
    model, tasks: list[str], manager, limit: int = 0, chat: bool = False, samples: bool = False
) -> dict:
    """lm_eval's results of tasks that its TaskManager knows, on every rank. model: a Harness, or any model of lm_eval's."""
    evaluator = optional("lm_eval.evaluator")
    with own_luck():  # few-shot examples and shuffled choices are the same for every model
        loaded = manager.load(tasks)
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=1234)
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
        # simple_evaluate() is this and a report on the machine, which takes seconds; iterations: for standard errors
        return evaluator.evaluate(
            model,
            loaded,
            limit=limit or None,
            bootstrap_iters=100,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            log_samples=samples,
        )

"""The lm_eval adapter: against plain forward passes, and against lm_eval's own model."""

import json
import random
from itertools import pairwise

import pytest
import torch
from conftest import llama_config, random_model, tiny_checkpoint, tokenizer_json
from eval_helpers import FP32, text

from checkpoint import load
from eval import lm_eval_adapter
from eval.lm_eval_adapter import (
    SHARE,
    Harness,
    Tree,
    Until,
    cut,
    generation,
    optional,
    score,
    shared_prefix,
)
from ops.attention import Packed
from plumbing.chat import Chat
from plumbing.records import InputError
from sample import Engine, Request, SampleOptions
from train import response_logps

NEEDS_LM_EVAL = "needs lm_eval: pip install -r requirements-eval.txt"


def sequences(seed: int, count: int = 12) -> list[list[int]]:
    """Random token ids that share prefixes of many lengths, in no order."""
    r = random.Random(seed)

    def tokens(most: int) -> list[int]:
        number = r.randrange(1, most)
        return [r.randrange(3, 300) for _ in range(number)]

    made = [tokens(60)]
    while len(made) < count:
        start = r.choice(made)
        own = tokens(40)
        shared = r.randrange(len(start) + 1)
        made.append(start[:shared] + own)
    return made


def logps_of(scores: list[tuple[float, bool]]) -> list[float]:
    return [logp for logp, _ in scores]


def hits_of(scores: list[tuple[float, bool]]) -> list[bool]:
    return [hit for _, hit in scores]


# ---- log-probs: a tree is the same as each sequence alone


def alone(model, pairs) -> list[tuple[float, bool]]:
    """Each pair in a forward pass of its own."""
    results = []
    for ids, targets in pairs:
        n = len(targets)
        rows = torch.arange(len(ids) - n, len(ids))
        logits = model(torch.tensor(ids), Packed([len(ids)]), rows)
        logps = logits.float().log_softmax(-1)
        logp = float(logps[range(n), targets].sum())
        greedy = logps.argmax(-1).tolist()
        results.append((logp, greedy == targets))
    return results


@pytest.mark.parametrize("window", [None, 7, 40])
@pytest.mark.parametrize("seed", [0, 1, 2])
@torch.inference_mode()
def test_shared_prefixes_change_no_log_prob(seed, window):
    arch = {}
    if window:
        arch = {"architectures": ["MistralForCausalLM"], "sliding_window": window}
    model = random_model(llama_config(**arch), seed, std=0.1)
    r = random.Random(seed)
    pairs = []
    for ids in sequences(seed):
        n = r.randrange(1, len(ids) + 1)
        targets = [*ids[len(ids) - n + 1 :], r.randrange(320)]
        pairs.append((ids, targets))
        other = [*targets[:-1], 5]  # one more that reads the same
        pairs.append((ids, other))
    pairs.sort()
    ours = score(model, pairs)
    theirs = alone(model, pairs)
    assert logps_of(ours) == pytest.approx(logps_of(theirs), abs=1e-3)
    assert hits_of(ours) == hits_of(theirs)


@torch.inference_mode()
def test_greedy_tokens_are_seen_as_such():
    model = random_model(llama_config(), 0, std=0.1)
    ids = sequences(3)[0]
    T = len(ids)
    logits = model(torch.tensor(ids), Packed([T]), torch.arange(T))
    best = logits.argmax(-1).tolist()
    wrong = [best[-2], (best[-1] + 1) % 320]
    pairs = [(ids, targets) for targets in (best[-3:], best[-1:], wrong)]
    pairs.sort()
    found = {}
    for (_, targets), hit in zip(pairs, hits_of(score(model, pairs)), strict=True):
        found[len(targets)] = hit
    assert found == {3: True, 1: True, 2: False}


def test_scoring_agrees_with_the_trainers(tiny):
    model = load(tiny, torch.float32)
    pairs = [(ids, [*ids[1:], 7]) for ids in sequences(4) if len(ids) > 1]
    pairs.sort()
    whole = [([*ids, 7], 1) for ids, _ in pairs]
    wanted = [float(logps.sum()) for logps in response_logps(model, whole)]
    found = logps_of(score(model, pairs))
    assert found == pytest.approx(wanted, abs=1e-3)


def test_more_rows_than_a_chunk_of_logits(tiny, monkeypatch):
    model = load(tiny, torch.float32)
    pairs = sorted((ids, [*ids[1:], 7]) for ids in sequences(5))
    whole = logps_of(score(model, pairs))
    monkeypatch.setattr(lm_eval_adapter, "CHUNK", 7)
    parts = logps_of(score(model, pairs))
    assert parts == pytest.approx(whole, abs=1e-4)


def test_a_shared_token_is_computed_once():
    start = list(range(100, 140))
    whole = [[*start, 1, 2], [*start, 1, 3], [*start, 2]]
    tree = Tree(whole, None)
    assert tree.tokens.tolist() == [*start, 1, 2, 3, 2]
    assert tree.positions.tolist() == [*range(42), 41, 40]
    paths = [tree.tokens[path].tolist() for path in tree.paths]
    assert paths == whole
    few = start[: SHARE - 1]  # not worth an attention of its own
    short = Tree([[*few, 1], [*few, 2]], None)
    assert len(short.tokens) == 2 * SHARE
    assert short.masks == [None, None]


def varlen(q, k, v, starts_q, starts_k, longest_q, longest_k, causal, window_size):
    """flash-attn's function as documented: masks are aligned to the last query and key."""
    assert causal
    for starts, longest in ((starts_q, longest_q), (starts_k, longest_k)):
        assert starts.dtype == torch.int32
        assert longest == int(starts.diff().max())
    outputs = []
    reach = window_size[0]
    attend = torch.nn.functional.scaled_dot_product_attention
    for (a, b), (c, d) in zip(pairwise(starts_q), pairwise(starts_k), strict=True):
        parts = (q[a:b], k[c:d], v[c:d])
        q1, k1, v1 = (x.transpose(0, 1)[None] for x in parts)
        T = d - c
        query = torch.arange(T - (b - a), T)[:, None]
        key = torch.arange(T)
        seen = key <= query
        if reach >= 0:
            seen &= key >= query - reach
        out = attend(q1, k1, v1, attn_mask=seen, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 20])
def test_flash_attention_is_asked_for_the_same(window, monkeypatch):
    raw = llama_config(architectures=["MistralForCausalLM"], sliding_window=window)
    model = random_model(raw, 0, std=0.1)
    pairs = sorted((ids, [5]) for ids in sequences(6))
    plain = logps_of(score(model, pairs))
    monkeypatch.setattr(lm_eval_adapter, "use_flash", lambda x: True)
    monkeypatch.setattr(lm_eval_adapter, "flash_attn_varlen_func", varlen)
    flash = logps_of(score(model, pairs))
    assert flash == pytest.approx(plain, abs=1e-4)


@pytest.mark.parametrize("budget", [1, 50, 300, 10_000])
def test_micro_batches_hold_every_request_once_and_about_the_budget(budget):
    pairs = [(ids, [i]) for i, ids in enumerate(sequences(7, 40) * 2)]
    batches = cut(pairs, budget)
    order = [i for batch in batches for i in batch]
    assert sorted(order) == list(range(80))
    assert [pairs[i] for i in order] == sorted(pairs)
    for batch in batches:
        unique = sorted({tuple(pairs[i][0]) for i in batch})
        tokens = len(unique[0])
        for a, b in pairwise(unique):
            tokens += len(b) - shared_prefix(a, b)
        longest = 2 * len(pairs[batch[0]][0])
        assert tokens <= max(budget, longest)
    assert cut([], budget) == []


# ---- generation


def test_text_ends_at_the_first_of_several_stop_texts(tiny):
    model = load(tiny, torch.float32)
    chat = Chat(tiny)
    o = SampleOptions(temperature=0.0, slots=3)
    prompts = [chat.encode(text(i, 8)) for i in range(6)]
    free = [Request(ids, 40) for ids in prompts]
    Engine(model, chat, o).run(free)
    texts = [chat.text(r.output) for r in free]
    until = [texts[0][5:8], texts[1][9:11], "never to be seen"]
    stopped = [Request(ids, 40) for ids in prompts]
    Until(model, chat, o, until).run(stopped)
    for whole, r in zip(free, stopped, strict=True):
        end = len(whole.output)
        for n in range(end, 0, -1):
            start = chat.text(whole.output[:n])
            if any(stop in start for stop in until):
                end = n
        assert r.output == whole.output[:end]
    assert len(stopped[0].output) < len(free[0].output)


def test_a_special_token_ends_a_text_too(tiny):
    model = load(tiny, torch.float32)
    chat = Chat(tiny)
    o = SampleOptions(temperature=0.0, ignore_eos=True)
    engine = Until(model, chat, o, ["<|user|>", "nothing"])
    user = chat.tokenizer.token_to_id("<|user|>")
    assert engine.stop_token_ids == {user}


def test_what_a_task_asks_of_generation():
    pytest.importorskip("lm_eval", reason=NEEDS_LM_EVAL)
    greedy = {"until": ["a", ""], "do_sample": False, "temperature": 0.7, "max_gen_toks": 9}
    assert generation(greedy, 256) == (["a"], 9, 0.0, 1.0)
    samples = {"until": "a", "temperature": 0.7, "top_p": 0.9}
    assert generation(samples, 256) == (["a"], 256, 0.7, 0.9)
    assert generation({"max_new_tokens": 3}, 256) == ([], 3, 0.0, 1.0)
    assert generation({"do_sample": False, "top_k": 5}, 256)[2] == 0.0
    with pytest.raises(InputError, match="top_k"):
        generation({"do_sample": True, "temperature": 1.0, "top_k": 5}, 256)


def test_a_package_that_is_not_installed_is_named():
    message = r"no_such_package is not installed; pip install -r requirements-eval\.txt"
    with pytest.raises(InputError, match=message), optional():
        import no_such_package

        no_such_package.start()


# ---- against lm_eval's own model


@pytest.fixture(scope="module")
def peers(tiny):
    """(lm_eval's model for transformers, ours), on one checkpoint."""
    return both(tiny)


def both(directory):
    pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("lm_eval", reason=NEEDS_LM_EVAL)
    from lm_eval.models.huggingface import HFLM

    peer = HFLM(pretrained=str(directory), dtype="float32", device="cpu", batch_size=2)
    return peer, Harness(directory, FP32, batch_tokens=300, slots=4)


def requests(kind: str, *arguments) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, 0) for one in arguments]


def test_log_likelihoods_are_those_of_lm_eval(peers):
    peer, us = peers
    long = text(0, 40)
    contexts = [f"{long}\nAnswer:", f"{long} and", text(1, 3), text(2, 600), "", "ends in a space "]
    answers = (" the trainer", " A", " B", " x", " the trainer reads")
    pairs = [(context, answer) for context in contexts for answer in answers]
    asked = requests("loglikelihood", *pairs)
    theirs = peer.loglikelihood(asked, disable_tqdm=True)
    ours = us.loglikelihood(asked, disable_tqdm=True)
    assert logps_of(ours) == pytest.approx(logps_of(theirs), abs=1e-3)
    assert hits_of(ours) == hits_of(theirs)
    different = {round(logp, 2) for logp in logps_of(ours)}
    assert len(different) > 25


def test_rolling_log_likelihoods_are_those_of_lm_eval(peers):
    # the second is longer than the context
    texts = [text(3, 5), text(4, 700), "x"]
    asked = requests("loglikelihood_rolling", *[(one,) for one in texts])
    peer, us = peers
    theirs = peer.loglikelihood_rolling(asked, disable_tqdm=True)
    ours = us.loglikelihood_rolling(asked, disable_tqdm=True)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_greedy_texts_are_those_of_lm_eval(peers):
    # the third is truncated from the left
    contexts = [text(5, 10), text(6, 3), text(7, 500), text(5, 10) + " x"]
    # the peer also looks into the names of special tokens: "a" would stop it
    for until in ([], ["e"], ["zzz", "ri", "\n\n"]):
        given = {"until": until, "do_sample": False, "max_gen_toks": 30}
        pairs = [(context, dict(given)) for context in contexts]
        asked = requests("generate_until", *pairs)
        peer, us = peers
        theirs = peer.generate_until(asked, disable_tqdm=True)
        assert us.generate_until(asked, disable_tqdm=True) == theirs


def test_samples_of_one_context_differ_and_come_again(peers):
    us = peers[1]
    given = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 20}
    asked = requests("generate_until", *[(text(8, 5), given)] * 3)
    first = us.generate_until(asked, disable_tqdm=True)
    assert len({*first}) == 3
    assert us.generate_until(asked, disable_tqdm=True) == first


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bos_token": "<|user|>"},
        {"bos_token": "<|user|>", "add_bos_token": True},
        {"bos_token": "<|user|>", "add_bos_token": False},
    ],
)
@pytest.mark.parametrize("written", [False, True])
def test_texts_begin_as_in_transformers(tmp_path, settings, written):
    """With and without a BOS that tokenizer.json adds; tokenizer_config.json does not matter."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer.from_str(tokenizer_json())
    if written:
        tokenizer.post_processor = TemplateProcessing(
            single="<|user|> $A", special_tokens=[("<|user|>", 1)]
        )
    made = tiny_checkpoint(tmp_path / "model", tokenizer=tokenizer.to_str())
    path = made / "tokenizer_config.json"
    written_there = json.loads(path.read_text())
    path.write_text(json.dumps({**written_there, **settings}))
    peer, us = both(made)
    for sample in ("Hello there", "<|user|>Hello there", " x"):
        assert us.tok_encode(sample) == peer.tok_encode(sample)
        ours = us.tok_encode(sample, add_special_tokens=False)
        assert ours == peer.tok_encode(sample, add_special_tokens=False)
    for name in ("eot_token_id", "prefix_token_id", "max_length"):
        assert getattr(us, name) == getattr(peer, name)


def test_chat_templates_are_rendered_as_by_transformers(peers):
    talk = [
        {"role": "user", "content": " Who reads them? "},
        {"role": "assistant", "content": "The trainer "},
    ]
    peer, us = peers
    for messages, opened in ((talk[:1], True), (talk, False)):
        theirs = peer.apply_chat_template(messages, add_generation_prompt=opened)
        assert us.apply_chat_template(messages, add_generation_prompt=opened) == theirs
    assert us.chat_template(True) == peer.chat_template(True)
    assert us.chat_template(False) is None


def test_a_base_model_needs_no_chat_template(tmp_path):
    pytest.importorskip("lm_eval", reason=NEEDS_LM_EVAL)
    made = tiny_checkpoint(tmp_path / "model", template=None)
    Harness(made, FP32)
    with pytest.raises(InputError, match="no chat template"):
        Harness(made, FP32, chat=True)


def test_the_adapter_loads_one_kind_of_weights_at_a_time(tiny, monkeypatch):
    pytest.importorskip("lm_eval", reason=NEEDS_LM_EVAL)
    loaded = []
    packed = []

    def load_counted(*arguments):
        loaded.append(arguments)
        return load(*arguments)

    def pack_counted(model):
        packed.append(model)
        return model

    monkeypatch.setattr(lm_eval_adapter, "load", load_counted)
    monkeypatch.setattr(lm_eval_adapter, "pack", pack_counted)
    us = Harness(tiny, FP32)
    first = us.weights(packed=False)
    assert us.weights(packed=False) is first
    assert len(loaded) == 1
    assert not packed
    second = us.weights(packed=True)
    assert second is not first
    assert us.weights(packed=True) is second
    assert len(loaded) == 2
    assert packed == [second]

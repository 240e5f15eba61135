"""The lm_eval adapter: against plain forward passes, and against lm_eval's own model."""

import json
import random

import pytest
import torch
from conftest import llama_config, random_model, tiny_checkpoint, tokenizer_json
from eval_helpers import FP32, text

from checkpoint import load
from eval import lm_eval_adapter
from eval.lm_eval_adapter import Harness, Until, micro_batches, optional, score
from formats.chat import Chat
from ops.attention import Packed
from plumbing.files import InputError
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


# ---- log-probs: packed inputs give the same as each request alone


def alone(model, inputs, continuations) -> list[tuple[float, bool]]:
    """Each continuation in a forward pass of its own."""
    results = []
    for ids, several in zip(inputs, continuations, strict=True):
        for targets in several:
            n = len(targets)
            rows = torch.arange(len(ids) - n, len(ids))
            logits = model(torch.tensor(ids), Packed([len(ids)]), rows)
            logps = logits.float().log_softmax(-1)
            logp = float(logps[range(n), targets].sum())
            greedy = logps.argmax(-1).tolist()
            hit = greedy == targets
            results.append((logp, hit))
    return results


@pytest.mark.parametrize("window", [None, 7, 40])
@pytest.mark.parametrize("seed", [0, 1, 2])
@torch.inference_mode()
def test_packing_changes_no_log_prob(seed, window):
    arch = {}
    if window:
        arch = {"architectures": ["MistralForCausalLM"], "sliding_window": window}
    model = random_model(llama_config(**arch), seed, std=0.1)
    r = random.Random(seed)
    inputs = sequences(seed)
    continuations = []
    for ids in inputs:
        n = r.randrange(1, len(ids) + 1)
        targets = [*ids[len(ids) - n + 1 :], r.randrange(320)]
        # some that read the same, of the same length and of another one
        other = [*targets[:-1], 5]
        continuations.append([targets, other, [6]])
    ours = score(model, inputs, continuations)
    theirs = alone(model, inputs, continuations)
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
    scores = score(model, [ids], [[best[-3:], best[-1:], wrong]])
    assert hits_of(scores) == [True, True, False]


def test_scoring_agrees_with_the_trainers(tiny):
    model = load(tiny, torch.float32)
    inputs = [ids for ids in sequences(4) if len(ids) > 1]
    continuations = [[[*ids[1:], 7]] for ids in inputs]
    whole = [([*ids, 7], 1) for ids in inputs]
    wanted = [float(logps.sum()) for logps in response_logps(model, whole)]
    found = score(model, inputs, continuations)
    assert logps_of(found) == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("budget", [1, 50, 300, 10_000])
def test_micro_batches_hold_every_input_once_and_at_most_the_budget(budget):
    inputs = [tuple(ids) for ids in sequences(7, 40)]
    batches = micro_batches(inputs, budget)
    order = [ids for batch in batches for ids in batch]
    assert sorted(order) == sorted(inputs)
    assert [len(ids) for ids in order] == sorted(map(len, inputs), reverse=True)
    for batch in batches:
        assert len(batch) == 1 or sum(map(len, batch)) <= budget
    if budget == 10_000:
        assert len(batches) == 1
    assert micro_batches([], budget) == []


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
    engine = Until(model, chat, SampleOptions(temperature=0.0), ["<|user|>", "nothing"])
    request = Request([5], 9, output=[*chat.encode("Who reads"), 7])
    assert not engine.has_stop(request)
    request.output.append(chat.tokenizer.token_to_id("<|user|>"))
    assert engine.has_stop(request)


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


def test_what_is_not_here_is_named(peers):
    us = peers[1]
    with pytest.raises(InputError, match="lm_eval --model hf"):
        us.loglikelihood_rolling([])
    cases = (
        ({"do_sample": True, "temperature": 1.0}, "samples its answers"),
        ({"max_gen_toks": us.max_length}, f"asks for {us.max_length} tokens"),
    )
    for given, what in cases:
        asked = requests("generate_until", ("x", given))
        with pytest.raises(InputError, match=what):
            us.generate_until(asked)
    empty = (None, [5], [])
    with pytest.raises(InputError, match="a continuation has 0 tokens"):
        us._loglikelihood_tokens([empty])


def test_equal_inputs_are_computed_once(peers, monkeypatch):
    us = peers[1]
    computed = []

    def watched(model, inputs, continuations):
        computed.extend(inputs)
        return score(model, inputs, continuations)

    monkeypatch.setattr(lm_eval_adapter, "score", watched)
    asked = [(None, [5, 6, 7], [choice]) for choice in (10, 11, 12, 13)]
    asked.append((None, [5, 6], [7, 11]))
    found = us._loglikelihood_tokens(asked, disable_tqdm=True)
    assert computed == [(5, 6, 7)]
    assert len({*logps_of(found)}) == 5
    assert found[4][0] < found[1][0]


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


def test_a_base_model_needs_no_chat_template(tmp_path):
    pytest.importorskip("lm_eval", reason=NEEDS_LM_EVAL)
    made = tiny_checkpoint(tmp_path / "model", template=None)
    Harness(made, FP32)
    with pytest.raises(InputError, match="no chat template"):
        Harness(made, FP32, chat=True)

"""The engine against plain forward passes, drawing against softmax, and files that do not depend on
how they were made.

Texts that were computed in different ways are compared up to rounding: see texts.py.
"""

import json
import math
import os
import shutil
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    flip_a_bit,
    last_json,
    llama_config,
    random_model,
    read_rows,
    run,
    tiny_checkpoint,
    write_rows,
)
from texts import assert_same_text, near_cdf

import sample as sample_module
from checkpoint import load, load_config
from formats.chat import Chat
from ops import attention, cpu, cuda_graph
from ops.attention import Cache, Packed
from plumbing import options as options_module
from plumbing import stage
from plumbing.files import InputError, digest
from plumbing.options import RunOptions, cli, parse_options
from plumbing.stage import LOCKS
from sample import (
    Engine,
    Request,
    SampleOptions,
    inverse_cdf,
    make_answer,
    sample,
    sample_token,
    seed_of,
    uniform,
)

MISTRAL = {"architectures": ["MistralForCausalLM"]}
FP32 = RunOptions(dtype="float32")
TEXTS = [
    "Name a river.",
    "Why?",
    "Écris un poème sur la mer, très long, avec une fin.",
    "2 + 2",
    "日本",
]


def prompts(n: int) -> list[dict]:
    return [{"id": i, "prompt": f"{TEXTS[i % 5]} {'so ' * (i % 4)}{i}"} for i in range(n)]


# -------------------------------------------------------------------------------------- the engine


def ragged(n: int, limits: list[int]) -> list[Request]:
    generator = torch.Generator().manual_seed(1)
    lengths = [1, 23, 5, 2, 40, 11, 3, 17]
    requests = []
    for i in range(n):
        ids = torch.randint(3, 320, (lengths[i % 8],), generator=generator).tolist()
        requests.append(Request(ids, limits[i % len(limits)], seed_of("test", i)))
    return requests


@torch.no_grad()
def assert_allowed(model, request: Request, o: SampleOptions, tolerance: float = 1e-3) -> None:
    """Every token is the one that a plain forward pass over all tokens before it chooses, or ties
    with it up to rounding.

    tolerance: of the CDF, or of logits if o.temperature is 0.
    """
    tokens = torch.tensor(request.ids + request.output[:-1])
    select = torch.arange(len(request.ids) - 1, len(tokens))
    logits = model(tokens, Packed([len(tokens)]), select).float()  # (T, V)
    chosen = torch.tensor(request.output)  # (T,)
    if o.temperature == 0:
        gaps = logits.amax(-1) - logits.gather(1, chosen[:, None])[:, 0]
        allowed = gaps <= tolerance
    else:
        u = uniform(torch.full_like(chosen, request.seed), torch.arange(len(chosen)))
        allowed = near_cdf(logits, u, o.temperature, chosen, tolerance)
    assert allowed.all(), f"wrong token at {allowed.tolist().index(False)}"


@pytest.mark.parametrize("temperature", [0, 0.7])
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="GQA"),
        pytest.param({"num_key_value_heads": 4, "tie_word_embeddings": True}, id="MHA, tied"),
        pytest.param({**MISTRAL, "sliding_window": 9}, id="window shorter than the prompts"),
        pytest.param({"head_dim": 32, "num_key_value_heads": 1}, id="one key-value head"),
    ],
)
def test_engine_equals_plain_forward(tiny, changes, temperature):
    """Ragged prompts, more requests than slots, refills while others go on, limits of one, a last
    row that is moved.
    """
    model = random_model(llama_config(**changes))
    chat = Chat(tiny)
    chat.stop_token_ids = {0, *range(50, 62)}  # several, so that responses end at many lengths
    o = SampleOptions(temperature=temperature, slots=4, prefill_tokens=48)
    requests = ragged(15, [12, 1, 30, 7])
    Engine(model, chat, o).run(requests)
    for r in requests:
        assert_allowed(model, r, o)
        assert not chat.stop_token_ids & set(r.output[:-1])
        stopped = r.output[-1] in chat.stop_token_ids
        assert r.finish_reason == ("stop" if stopped else "length")
        assert stopped or len(r.output) == r.max_new_tokens
    reasons = {(r.finish_reason, len(r.output) == r.max_new_tokens) for r in requests}
    assert reasons >= {("stop", False), ("length", True)}
    assert len({tuple(r.output) for r in requests}) > 10


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_engine_with_any_number_of_slots(tiny, slots):
    model = load(tiny, torch.float32)
    o = SampleOptions(temperature=0, slots=slots, ignore_eos=True)
    requests = ragged(7, [9, 1, 15])
    Engine(model, Chat(tiny), o).run(requests)
    for r in requests:
        assert_allowed(model, r, o)
        assert len(r.output) == r.max_new_tokens


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_a_wrong_token_is_noticed(tiny, temperature):
    """So that the comparisons with plain forward passes can tell."""
    model = load(tiny, torch.float32)
    o = SampleOptions(temperature=temperature, ignore_eos=True)
    [request] = ragged(1, [12])
    Engine(model, Chat(tiny), o).run([request])
    request.output[6] = (request.output[6] + 1) % 320
    with pytest.raises(AssertionError, match="wrong token at 6"):
        assert_allowed(model, request, o)


def test_prompts_are_read_some_at_a_time(tiny, monkeypatch):
    """A forward pass over one prompt costs nearly as much as one over many: places are kept free
    until there are some.
    """
    real = sample_module.Prefill.__init__
    sizes = []

    def count(self, cache, rows, *rest):
        sizes.append(len(rows))
        real(self, cache, rows, *rest)

    monkeypatch.setattr(sample_module.Prefill, "__init__", count)
    requests = ragged(48, list(range(30, 6, -1)))
    o = SampleOptions(slots=16, ignore_eos=True)
    Engine(load(tiny, torch.float32), Chat(tiny), o).run(requests)
    assert sizes[0] == 16
    assert min(sizes[1:-1]) > 2
    assert sum(sizes) == 48
    assert all(len(r.output) == r.max_new_tokens for r in requests)


def test_the_longest_response_starts_first(tiny, monkeypatch):
    order = []
    real = Engine.prefill

    def watch(self, rows, queue, slots):
        order.append(queue[0].max_new_tokens)
        real(self, rows, queue, slots)

    monkeypatch.setattr(Engine, "prefill", watch)
    o = SampleOptions(slots=1, ignore_eos=True)
    Engine(load(tiny, torch.float32), Chat(tiny), o).run(ragged(3, [3, 9, 5]))
    assert order == [9, 5, 3]


def test_engine_fills_the_positions_to_the_last_one(tiny):
    model = random_model(llama_config(max_position_embeddings=64))
    o = SampleOptions(temperature=0, slots=2, ignore_eos=True)
    requests = [Request(list(range(3, 3 + n)), 64 - n) for n in (63, 60, 1)]
    Engine(model, Chat(tiny), o).run(requests)
    assert [len(r.output) for r in requests] == [1, 4, 63]
    for r in requests:
        assert_allowed(model, r, o)


class Replayed:
    """What a CUDA graph does, without a GPU: the recorded function over its own input, into its own
    output.
    """

    def __init__(self, function, example):
        self.function = function
        self.input = example.clone()
        self.output = function(example)

    def __call__(self, x):
        self.input.copy_(x)
        return self.output.copy_(self.function(self.input))


@pytest.mark.parametrize("changes", [{}, {**MISTRAL, "sliding_window": 9}])
def test_static_shapes_and_recorded_steps_write_the_same(tiny, monkeypatch, changes):
    """As on a GPU with --cuda-graph: every step has all slots, dead ones too, and reuses its
    tensors.
    """
    shapes = set()
    step = Engine.step

    def watched(self, state, live):
        shapes.add((*state.shape,))
        return step(self, state, live)

    monkeypatch.setattr(sample_module, "Graph", Replayed)
    with monkeypatch.context() as patch:
        patch.setattr(sample_module, "DEVICE", torch.device("cuda"))  # so the option is accepted
        recorded = SampleOptions(slots=6, cuda_graph=True, ignore_eos=True)
    monkeypatch.setattr(Engine, "step", watched)
    model = random_model(llama_config(**changes))
    written = {}
    for static in (False, True):
        shapes.clear()
        o = recorded if static else SampleOptions(slots=6, ignore_eos=True)
        engine = Engine(model, Chat(tiny), o)
        written[static] = []
        # the second run has a cache, and so a graph, of its own
        for requests in (ragged(11, [12, 1, 30, 7]), ragged(9, [40, 5])):
            engine.run(requests)
            written[static] += requests
        assert (shapes == {(4, 6)}) == static
    for usual, recorded in zip(written[False], written[True], strict=True):
        assert_same_text(model, usual, recorded, o)


def test_a_graph_is_recorded_once_and_replayed(monkeypatch):
    """The order of calls that PyTorch's documentation asks for; what a GPU makes of them is not
    tested here.
    """
    calls = []

    def double(x):
        calls.append("run")
        return 2 * x

    class FakeGraph:
        def replay(self):
            calls.append("replay")
            graph.output.copy_(double(graph.input))

    def inside(name):
        @contextmanager
        def manager(_):
            calls.append(name)
            yield
            calls.append(f"end of {name}")

        return manager

    stream = SimpleNamespace(wait_stream=lambda _: calls.append("wait"))
    fakes = {
        "CUDAGraph": FakeGraph,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": inside("side stream"),
        "graph": inside("recording"),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    # recorded: once for warm-up on a side stream, once into the graph
    example = torch.tensor([1, 2])
    graph = cuda_graph.Graph(double, example)
    warm_up = ["wait", "side stream", "run", "end of side stream", "wait"]
    assert calls == [*warm_up, "recording", "run", "end of recording"]

    # replayed: on its own input
    for x in (torch.tensor([3, 4]), torch.tensor([5, 6])):
        assert graph(x).tolist() == (2 * x).tolist()
    assert example.tolist() == [1, 2]
    assert calls[-4:] == ["replay", "run"] * 2


def test_the_number_of_slots_follows_from_memory(tiny, monkeypatch):
    """Half of what the weights leave at most; and never none at all."""
    model = load(tiny, torch.float32)
    one = Cache.row_bytes(model.config, 20, torch.float32)
    cache = Cache(model.config, 1, 20, torch.float32)
    assert one == cache.k.nbytes + cache.v.nbytes
    weights = sum(p.nbytes for p in model.parameters())
    rows = []
    cases = (
        (2 * 5 * one, 8),
        (100 * one, 4),
        (2 * 5 * one + one, 64),
        (one, 8),
        (-weights, 8),
    )
    for left, slots in cases:
        monkeypatch.setattr(attention, "memory", lambda left=left: weights + left)
        engine = Engine(model, Chat(tiny), SampleOptions(slots=slots))
        engine.run([Request([5, 6, 7], 17, i) for i in range(9)])
        rows.append(engine.cache.k.shape[1])
    assert rows == [5, 4, 5, 1, 1]


def assert_generates_alike(directory, requests: list[Request], limit: int, **settings) -> None:
    """Greedy, against transformers' generate()."""
    from transformers import AutoModelForCausalLM

    model = load(directory, torch.float32)
    o = SampleOptions(temperature=0, slots=3)
    Engine(model, Chat(directory), o).run(requests)
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for r in requests:
        ids = torch.tensor([r.ids])
        mask = torch.ones_like(ids)
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        expected = reference.generate(
            ids, attention_mask=mask, max_new_tokens=limit, **greedy, **settings
        )
        theirs = Request(r.ids, limit, r.seed, output=expected[0, len(r.ids) :].tolist())
        assert_same_text(model, r, theirs, o)


@pytest.mark.slow
def test_greedy_equals_transformers_generate(tmp_path):
    """Config and weights through files, end token included; the generation config's temperature is
    not looked at.
    """
    directory = tiny_checkpoint(tmp_path, eos_token_id=[0, 77, 78, 79, 80, 81, 82])
    ignored = {"do_sample": True, "temperature": 9.0, "top_p": 0.1}
    (directory / "generation_config.json").write_text(json.dumps(ignored))
    requests = ragged(8, [25])
    stops = sorted(Chat(directory).stop_token_ids)
    assert_generates_alike(directory, requests, 25, eos_token_id=stops, pad_token_id=0)
    assert len({len(r.output) for r in requests}) > 1


@pytest.mark.slow
@pytest.mark.real_model
def test_greedy_smollm2_says_what_transformers_says(smollm2):
    chat = Chat(smollm2)
    texts = ("What is the capital of France?", "Count to three.")
    requests = [Request(chat.prompt_ids({"prompt": text}), 12) for text in texts]
    assert_generates_alike(smollm2, requests, 12)
    assert "Paris" in chat.text(requests[0].output)


# --------------------------------------------------------------------------------- uniform numbers


def splitmix64(seed: int, count: int) -> list[int]:
    """The published algorithm on Python's integers."""
    mask = (1 << 64) - 1
    outputs = []
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) & mask
        z = ((seed ^ seed >> 30) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
        outputs.append(z ^ z >> 31)
    return outputs


def test_uniform_is_splitmix64():
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert splitmix64(1234567, 3) == published
    positions = torch.arange(40)
    for seed in (0, 1, -1, 1234567, seed_of("a"), seed_of("b"), 2**63 - 1, -(2**63)):
        numbers = uniform(torch.full((40,), seed), positions)
        assert numbers.dtype == torch.float64
        expected = [(z >> 11) * 2.0**-53 for z in splitmix64(seed % 2**64, 40)]
        assert numbers.tolist() == expected


def deviation(counts, expected) -> float:
    """Chi-square in standard deviations from its mean; cells that expect less than 5 are put
    together.
    """
    counts = torch.as_tensor(counts, dtype=torch.float64)
    expected = torch.as_tensor(expected, dtype=torch.float64)
    small = expected < 5
    counts = torch.cat([counts[~small], counts[small].sum()[None]])
    expected = torch.cat([expected[~small], expected[small].sum()[None].clamp(min=1e-9)])
    freedom = len(counts) - 1
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("along", ["seeds", "positions"])
def test_uniform_is_uniform(along):
    n = 200_000
    if along == "seeds":
        seeds = torch.tensor([seed_of("k", i) for i in range(2000)]).repeat_interleave(100)
        u = uniform(seeds, torch.arange(100).repeat(2000))
    else:
        u = uniform(torch.full((n,), 5), torch.arange(n))
    assert u.min() >= 0
    assert u.max() < 1
    gap = (u.sort().values - (torch.arange(n) + 0.5) / n).abs().max().item() * math.sqrt(n)
    assert 0.2 < gap < 1.63  # Kolmogorov-Smirnov at 1 %, and not suspiciously even
    pairs = (u[:-1] * 20).long() * 20 + (u[1:] * 20).long()  # each number against the next
    counts = torch.bincount(pairs, minlength=400)
    assert abs(deviation(counts, torch.full((400,), (n - 1) / 400))) < 4


# --------------------------------------------------------------------------------- drawing a token

N = 50_000


@pytest.fixture(params=[False, True], ids=["PyTorch", "compiled"])
def drawing(request, monkeypatch):
    """By plain PyTorch, and by the compiled function that sampling uses on a CPU."""
    if not request.param:
        monkeypatch.setattr(cpu, "library", lambda *_: None)
    elif cpu.library(torch.float32) is None:
        pytest.skip("no compiled functions: SYNPO_KERNELS=0, or no GCC")
    assert cpu.ready(torch.zeros(1, 32)) == request.param


def test_compiled_drawing_is_tested_where_there_is_a_compiler():
    """The fixture above must not skip because compiling fails."""
    if shutil.which("cc") and os.environ.get("SYNPO_KERNELS") != "0":
        assert cpu.library(torch.float32) is not None


def drawn(logits: torch.Tensor, temperature: float, top_p: float, n: int = N) -> torch.Tensor:
    """How often each token comes, (V,)."""
    seeds = torch.tensor([seed_of(i) for i in range(n // 100)])
    u = uniform(seeds.repeat_interleave(100), torch.arange(100).repeat(n // 100))
    parts = []
    for some in u.split(10_000):
        parts.append(sample_token(logits.repeat(len(some), 1), some, temperature, top_p))
    return torch.bincount(torch.cat(parts), minlength=len(logits))


@pytest.mark.slow
@pytest.mark.usefixtures("drawing")
@pytest.mark.parametrize(
    ("V", "temperature"),
    [
        (3, 1.0),
        (256, 0.5),
        (300, 0.7),
        (300, 1.0),
        (700, 3.0),
    ],
)
def test_frequencies_are_those_of_softmax(V, temperature):
    logits = 2 * torch.randn(V, generator=torch.Generator().manual_seed(V))
    expected = torch.softmax(logits.double() / temperature, -1)
    counts = drawn(logits, temperature, 1.0)
    assert abs(deviation(counts, N * expected)) < 4
    other = torch.softmax(logits.double() / (temperature * 1.1), -1)
    assert deviation(counts, N * other) > 4  # so the test can tell


@pytest.mark.slow
@pytest.mark.usefixtures("drawing")
@pytest.mark.parametrize(("top_p", "temperature"), [(0.9, 1.0), (0.5, 0.7), (0.01, 1.0)])
def test_top_p_draws_from_the_nucleus_only(top_p, temperature):
    logits = 2 * torch.randn(300, generator=torch.Generator().manual_seed(3))
    p, order = torch.softmax(logits.double() / temperature, -1).sort(descending=True)
    size = int((p.cumsum(-1) < top_p).sum()) + 1  # the smallest set with this much probability
    # the last bits of the logits, which depend on the CPU, do not decide what is in the set
    assert (p.cumsum(-1) - top_p).abs().min() > 1e-5
    assert p[size - 1] - p[size] > 1e-5
    expected = torch.zeros(300, dtype=torch.float64)
    expected[order[:size]] = p[:size] / p[:size].sum()
    counts = drawn(logits, temperature, top_p)
    assert not counts[expected == 0].any()
    if size > 1:
        assert abs(deviation(counts, N * expected)) < 4
    else:
        assert counts[order[0]] == N


@pytest.mark.usefixtures("drawing")
@pytest.mark.parametrize("top_p", [1.0, 0.6])
@pytest.mark.parametrize("V", [5, 256, 300, 600])
def test_no_number_draws_a_token_of_probability_zero(V, top_p):
    """Also at both ends, and at every boundary between tokens, where rounding could step over."""
    last = 1 - 2.0**-53
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        logits = 8 * torch.randn(V, generator=generator)
        logits[torch.randperm(V, generator=generator)[: V // 2]] = -math.inf
        logits[[0, -1]] = -math.inf
        p = torch.softmax(logits.double(), -1)
        edges = p.cumsum(-1)
        below = edges.nextafter(torch.tensor(0.0))
        above = edges.nextafter(torch.tensor(1.0))
        u = torch.cat([torch.tensor([0.0, last, 2.0**-53]), edges, below, above])
        u = u.to(torch.float64).clamp(0, last)
        tokens = sample_token(logits.repeat(len(u), 1), u, 1.0, top_p)
        assert tokens.min() >= 0
        assert tokens.max() < V
        assert (p[tokens] > 0).all()


@pytest.mark.usefixtures("drawing")
def test_numbers_at_the_edge_of_a_block_stay_inside_it():
    """A block's start is a rounded sum: what is left of the number there may be a hair below 0."""
    for last in torch.arange(-21, -10, 0.1):
        # 256 ones, then one token behind 44 of probability zero
        logits = torch.full((512,), -math.inf)
        logits[:256] = 0.0
        logits[300] = last
        edge = 256 / (256 + math.exp(last))
        around = edge + torch.arange(-40, 41, dtype=torch.float64) * 2.0**-53
        tokens = sample_token(logits.repeat(81, 1), around, 1.0, 1.0)
        assert set(tokens.tolist()) <= {255, 300}


def test_inverse_cdf_finds_the_token_and_the_rest():
    weights = torch.tensor([[0.0, 2.0, 0.0, 3.0, 0.0]], dtype=torch.float64).expand(5, -1)
    targets = torch.tensor([0.0, 1.5, 2.0, 4.5, 5.0], dtype=torch.float64)
    index, rest = inverse_cdf(weights, targets)
    assert index.tolist() == [1, 1, 3, 3, 3]
    assert rest.tolist() == pytest.approx([0.0, 1.5, 0.0, 2.5, 3.0])


@pytest.mark.usefixtures("drawing")
def test_temperature_zero_is_greedy():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    u = torch.tensor([0.999, 0.999], dtype=torch.float64)
    assert sample_token(logits, u, 0, 1.0).tolist() == [1, 0]


# ------------------------------------------------------------------------------------------- files


def answers(model, rows, path, *, samples: int = 1, purpose: str = "", **options) -> list[dict]:
    """The file that the stage `sample` writes for rows."""
    source = write_rows(path.with_name(f"prompts of {path.name}"), rows)
    o = SampleOptions(**{"run": FP32, "max_new_tokens": 12, **options})
    assert sample(model, source, path, o, samples, purpose) == path
    assert not path.with_name(path.name + ".partial").exists()
    return read_rows(path)


@pytest.fixture
def answered(monkeypatch):
    """The request behind each record that was written, by id and sample."""
    found = {}
    real = sample_module.make_answer

    def remember(row, request, chat):
        found[row["id"], row.get("sample", 0)] = request
        return real(row, request, chat)

    monkeypatch.setattr(sample_module, "make_answer", remember)
    return found


def assert_same_texts(model, some: dict, others: dict) -> None:
    """Of two sets of requests by id; equal up to rounding."""
    net = load(model, torch.float32)
    assert some.keys() == others.keys()
    for name, request in some.items():
        assert_same_text(net, request, others[name], SampleOptions())


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"slots": 1}, {"slots": 7}, {"slots": 5, "chunk": 3}, {"prefill_tokens": 1}],
    ids=str,
)
def test_text_does_not_depend_on_slots_or_chunks(tiny, tmp_path, answered, changes):
    answers(tiny, prompts(40), tmp_path / "a.jsonl", slots=64)
    usual = dict(answered)
    answered.clear()
    answers(tiny, prompts(40), tmp_path / "b.jsonl", **changes)
    assert_same_texts(tiny, usual, answered)


@pytest.mark.slow
def test_a_record_keeps_its_text_wherever_it_stands(tiny, tmp_path, answered):
    rows = prompts(20)
    answers(tiny, rows, tmp_path / "a.jsonl")
    inside = {key: request for key, request in answered.items() if 9 <= int(key[0]) <= 13}
    answered.clear()
    part = answers(tiny, rows[13:8:-1], tmp_path / "b.jsonl")
    assert [row["id"] for row in part] == ["13", "12", "11", "10", "9"]
    assert [row["prompt"] for row in part] == [row["prompt"] for row in rows[13:8:-1]]
    assert_same_texts(tiny, inside, answered)


@pytest.mark.slow
def test_a_text_follows_from_seed_and_purpose(tiny, tmp_path):
    settings = [{}, {"run": RunOptions(seed=1, dtype="float32")}, {"purpose": "rewrite"}, {}]
    texts = []
    for i, changes in enumerate(settings):
        texts.append(answers(tiny, prompts(5), tmp_path / f"{i}.jsonl", **changes))
    assert texts[0] == texts[3]
    assert texts[0] != texts[1]
    assert texts[0] != texts[2]


@pytest.mark.slow
def test_samples_of_a_prompt_differ_from_their_first_token_on(tiny, tmp_path):
    rows = answers(tiny, prompts(6), tmp_path / "a.jsonl", samples=8, temperature=1.0, chunk=5)
    expected = [(str(i), s) for i in range(6) for s in range(8)]
    assert [(row["id"], row["sample"]) for row in rows] == expected
    for i in range(6):
        texts = [row["response"] for row in rows if row["id"] == str(i)]
        assert len(set(texts)) == 8
        assert len({text[:1] for text in texts}) > 1
    assert "sample" not in answers(tiny, prompts(1), tmp_path / "b.jsonl")[0]
    requests = [Request([5, 6, 7], 1, seed_of(0, "", 1, s)) for s in range(30)]
    Engine(load(tiny, torch.float32), Chat(tiny), SampleOptions(temperature=1.0)).run(requests)
    assert len({r.output[0] for r in requests}) > 5


def test_records_keep_their_fields_and_their_own_limits(tiny, tmp_path):
    talk = [{"role": "system", "content": "Brief."}, {"role": "user", "content": "Hi"}]
    rows = [
        {"id": "a", "prompt": "x", "max_new_tokens": 3, "level": 7, "response": "old"},
        {"id": "b", "messages": talk, "max_new_tokens": 1},
        {"id": "c", "prompt": "y"},
    ]
    written = answers(tiny, rows, tmp_path / "a.jsonl", max_new_tokens=6, ignore_eos=True)
    assert [row["tokens"] for row in written] == [3, 1, 6]
    assert {row["finish_reason"] for row in written} == {"length"}
    a, b, _ = written
    assert b["messages"] == talk
    assert "prompt" not in b
    assert a["prompt"] == "x"
    own = {"id", "prompt", "max_new_tokens", "level"}
    assert set(a) == {*own, "response", "finish_reason", "tokens"}
    assert a["level"] == 7
    assert a["response"] != "old"


def test_a_prefix_cut_from_a_greedy_answer_gives_back_that_answer(tiny, tmp_path):
    chat = Chat(tiny)
    rows = []
    whole = {}
    requests = [Request(chat.prompt_ids(row), 12) for row in prompts(12)]
    o = SampleOptions(run=FP32, temperature=0.0, ignore_eos=True)
    Engine(load(tiny, torch.float32), chat, o).run(requests)
    for row, request in zip(prompts(12), requests, strict=True):
        text = chat.text(request.output)
        for cut in range(12):
            before = request.output[:cut]
            prefix = chat.text(before)
            # where a cut goes through a character, or tokens join otherwise, the text is another
            if text.startswith(prefix) and chat.encode(prefix) == before:
                name = f"{row['id']} {cut}"
                whole[name] = text
                rows.append({**row, "id": name, "prefix": prefix, "max_new_tokens": 12 - cut})
    assert sum(row["prefix"] != "" for row in rows) > 5
    how = {"temperature": 0.0, "ignore_eos": True}
    for row in answers(tiny, rows, tmp_path / "rest.jsonl", **how):
        assert row["response"] == whole[row["id"]]

    # spaces at its ends are kept where there is a prefix, if only an empty one
    spaces = [{"prompt": "x", "prefix": "  A ", "max_new_tokens": 1}]
    [kept] = answers(tiny, spaces, tmp_path / "spaces.jsonl", **how)
    assert kept["response"].startswith("  A ")


class WordTokens:
    """A tokenizer whose decoder drops the space that a text begins with, as Llama 2's does."""

    def text_ids(self, text):
        return text.split()

    def text(self, ids):
        return " ".join(ids)


@pytest.mark.parametrize(
    ("prefix", "response"), [({"prefix": "the red"}, "the red fox ran"), ({}, "fox ran")]
)
def test_a_continuation_keeps_the_space_before_it(prefix, response):
    request = Request([1], 2, 0, output=["fox", "ran"], finish_reason="stop")
    written = make_answer({"id": "a", "prompt": "x", **prefix}, request, WordTokens())
    assert written["response"] == response


@pytest.mark.slow
def test_ignore_eos_goes_on_to_the_limit_and_several_tokens_stop(tmp_path):
    model = tiny_checkpoint(tmp_path / "m", eos_token_id=list(range(100)))  # about one in three
    stopped = answers(model, prompts(10), tmp_path / "a.jsonl", max_new_tokens=40)
    assert {row["finish_reason"] for row in stopped} == {"stop"}
    assert len({row["tokens"] for row in stopped}) > 2
    file = tmp_path / "b.jsonl"
    ignored = answers(model, prompts(10), file, max_new_tokens=40, ignore_eos=True)
    assert {(row["finish_reason"], row["tokens"]) for row in ignored} == {("length", 40)}


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("One two.\nUser: three", "\nUser:", "One two.\nUser:"),
        ("the answers, the END of it", "END", "the answers, the END"),
        ("a b c d", "x", "a b c d"),
        ("The sampler writes", "ple", "The sampler"),  # complete inside a token, which stays whole
        ("Voilà 終わり。 more", "終わり。", "Voilà 終わり。"),  # characters of several tokens each
        ("Voilà é more", "é", "Voilà é"),
        ("mine<|user|>yours", "<|user|>", "mine"),  # a special token
    ],
)
def test_stop_text_ends_the_response(tiny, monkeypatch, text, stop, kept):
    """A model that writes a given text, then its end token."""
    chat = Chat(tiny)
    ids = [*chat.encode(text), chat.end]
    request = Request([5, 6], len(ids))
    monkeypatch.setattr(
        sample_module, "sample_token", lambda *_: torch.tensor([ids[len(request.output)]])
    )
    Engine(load(tiny, torch.float32), chat, SampleOptions(stop=stop)).run([request])
    assert chat.text(request.output) == kept
    assert request.finish_reason == "stop"


@pytest.mark.slow
def test_one_prompt_is_answered_on_the_command_line_as_from_a_file(tiny, tmp_path):
    how = ["sample.py", "--model", tiny, "--dtype", "float32", "--max-new-tokens", "5"]
    code, out, errors = run([*how, "--prompt", "Hi", "--against", tiny])
    assert code == 0, errors
    path = write_rows(tmp_path / "in.jsonl", [{"id": digest("Hi"), "prompt": "Hi"}])
    o = SampleOptions(run=FP32, max_new_tokens=5)
    [row] = read_rows(sample(tiny, path, tmp_path / "out.jsonl", o))
    assert out.count(f"{tiny} ({row['finish_reason']}):\n{row['response']}\n") == 2
    assert last_json(out)[str(tiny)] == {name: row[name] for name in last_json(out)[str(tiny)]}
    code, _, errors = run([*how, "--prompt", "x" * 600])
    assert code == 2
    assert "512 positions" in errors


def test_texts_with_line_separators_of_unicode_are_merged(tiny, tmp_path):
    separators = "\u2028\u2029\x85\x0b\x1e"
    rows = [{"id": i, "prompt": f"a{c}b"} for i, c in enumerate(separators)]
    written = answers(tiny, rows, tmp_path / "a.jsonl")
    assert [row["prompt"] for row in written] == [row["prompt"] for row in rows]


# ---------------------------------------------------------------------------------------- resuming


class Killed(Exception):
    pass


@pytest.fixture
def dies(monkeypatch):
    """dies(when): writing a file raises Killed if when(path); dies() undoes that. Returns the names
    of what was written.
    """
    writers = {name: getattr(sample_module, name) for name in ("write_part", "write_jsonl")}

    def install(when=None) -> list[str]:
        names = []

        def write(path, rows, real):
            if when and when(path):
                raise Killed
            names.append(path.name)
            real(path, rows)

        for name, real in writers.items():
            monkeypatch.setattr(sample_module, name, partial(write, real=real))
        return names

    return install


@pytest.mark.slow
@pytest.mark.parametrize("damaged", [False, True])
def test_interrupted_sampling_resumes_with_the_chunks_it_has(
    tiny, tmp_path, monkeypatch, dies, damaged
):
    """To the same bytes: the chunks are the same, and so are CPU and threads."""
    rows = prompts(23)
    options = {"chunk": 5, "slots": 3}
    out = tmp_path / "out.jsonl"
    answers(tiny, rows, tmp_path / "whole.jsonl", **options)
    written = dies(lambda path: len(written) == 2)
    with pytest.raises(Killed):
        answers(tiny, rows, out, **options)
    assert not out.exists()
    assert written == ["chunk0.part", "chunk5.part"]

    # what is left is written, and nothing else
    dies()
    if damaged:
        flip_a_bit(tmp_path / "out.jsonl.partial" / "chunk0.part")
    asked = []
    real_run = Engine.run

    def count(self, requests):
        asked.append(len(requests))
        real_run(self, requests)

    monkeypatch.setattr(Engine, "run", count)
    answers(tiny, rows, out, **options)
    assert asked == [5] * damaged + [5, 5, 3]
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.9},
        {"run": RunOptions(seed=9, dtype="float32")},
        {"rows": prompts(12)[::-1]},
    ],
)
def test_chunks_of_other_options_are_not_used(tiny, tmp_path, dies, change):
    out = tmp_path / "out.jsonl"
    dies(lambda path: path == out)
    with pytest.raises(Killed):
        answers(tiny, prompts(12), out, chunk=5)
    assert len(list((tmp_path / "out.jsonl.partial").glob("chunk*.part"))) == 3
    dies()
    options = {"chunk": 5, **change}
    rows = options.pop("rows", prompts(12))
    expected = answers(tiny, rows, tmp_path / "new.jsonl", **options)
    assert answers(tiny, rows, out, **options) == expected


def test_the_longest_chunk_comes_first(tiny, tmp_path, monkeypatch):
    """So that no rank starts a long chunk when the others are done."""
    rows = [{**row, "max_new_tokens": 1 + i // 4 % 3} for i, row in enumerate(prompts(12))]
    order = []
    real_run = Engine.run

    def watch(self, requests):
        order.append(requests[0].max_new_tokens)
        real_run(self, requests)

    monkeypatch.setattr(Engine, "run", watch)
    answers(tiny, rows, tmp_path / "a.jsonl", chunk=4)
    assert order == [3, 2, 1]


@pytest.mark.slow
@pytest.mark.ranks
def test_two_processes_finish_what_one_began_with_the_same_bytes(tiny, tmp_path, dies):
    """Stopped half-way, then torchrun with two: byte for byte what one process writes in one go."""
    rows = [{"prompt": row["prompt"]} for row in prompts(30)]
    source = write_rows(tmp_path / "in.jsonl", rows)
    common = ["--model", tiny, "--prompts", source, "--dtype", "float32", "--max-new-tokens", 20]
    common += ["--chunk", 4, "--slots", 2, "--samples", 2]
    out = tmp_path / "out.jsonl"
    scratch = tmp_path / "out.jsonl.partial"

    def call(*more):
        sample(**parse_options(sample, list(map(str, [*common, *more]))))

    # stopped after three chunks, one of which is lost, so that the gap is not at the end
    dies(lambda path: len(list(scratch.glob("chunk*.part"))) == 3)
    with pytest.raises(Killed):
        call("--out", out)
    dies()
    (scratch / "chunk0.part").unlink()
    release(scratch)

    # finished by two processes
    code, stdout, stderr = run(["sample.py", *common, "--out", out], nproc=2)
    assert code == 0, stderr
    result = last_json(stdout)
    assert result["answers"] == 60
    assert result["records"] == 30
    assert not scratch.exists()
    assert result["tokens"] == sum(row["tokens"] for row in read_rows(out))
    assert result["seconds"] > 0
    assert result["tokens_per_second"] > 0
    manifest = json.loads((tmp_path / "out.manifest.json").read_text())
    assert manifest["processes"] == 2
    assert manifest["paths"]["model"] == str(tiny)

    # and written by one
    call("--out", tmp_path / "one.jsonl")
    assert (tmp_path / "one.jsonl").read_bytes() == out.read_bytes()


def release(scratch) -> None:
    """Give up the lock of a stage that was interrupted in this process, as its end would."""
    LOCKS.pop(scratch).close()


# ------------------------------------------------------------------------------------------ errors


@pytest.fixture
def command(monkeypatch, capsys):
    """sample.py's command in this process: command(*argv) -> (exit code, standard error)."""
    monkeypatch.setattr(options_module, "distributed", nullcontext)
    unread = "weights were read before the input was checked"
    monkeypatch.setattr(sample_module, "load", lambda *_: pytest.fail(unread))

    def call(*argv) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["sample.py", *map(str, argv)])
        with pytest.raises(SystemExit) as end:
            cli(sample)
        return end.value.code, capsys.readouterr().err

    return call


FINE = {"prompt": "x"}


@pytest.mark.parametrize(
    ("row", "flags", "parts"),
    [
        ({"prompt": "long " * 600}, [], ["'prompt'", "line 2", "512", "shorten"]),
        ({"prompt": "x", "max_new_tokens": 0}, [], ["'max_new_tokens'", "line 2"]),
        ({"prompt": "x", "max_new_tokens": "5"}, [], ["'max_new_tokens'", "line 2"]),
        ({"prompt": "x", "max_new_tokens": 2.5}, [], ["'max_new_tokens'", "line 2"]),
        ({"text": "x"}, [], ["'prompt'", "line 2"]),
        (FINE, ["--slots", "0"], ["--slots", "at least 1", "got 0"]),
        (FINE, ["--chunk", "0"], ["--chunk", "at least 1", "got 0"]),
        (FINE, ["--samples", "0"], ["--samples", "at least 1", "got 0"]),
        (FINE, ["--top-p", "0"], ["--top-p", "above 0 and at most 1", "got 0"]),
        (FINE, ["--temperature", "-1"], ["--temperature", "0 or at least 0.001", "got -1"]),
        (FINE, ["--max-new-tokens", "0"], ["--max-new-tokens", "got 0"]),
        (FINE, ["--cuda-graph"], ["--cuda-graph", "no GPU"]),
        (FINE, ["--out", "answers.txt"], ["answers.txt", ".jsonl"]),
    ],
)
def test_bad_input_ends_with_one_line_before_the_weights_are_read(
    tiny, tmp_path, command, monkeypatch, row, flags, parts
):
    monkeypatch.chdir(tmp_path)
    if flags:
        hashed = "files were hashed before the options were checked"
        monkeypatch.setattr(stage, "hash_file", lambda *_: pytest.fail(hashed))
    path = write_rows(tmp_path / "in.jsonl", [{"prompt": "fine"}, row])
    out = tmp_path / "o.jsonl"
    code, err = command("--model", tiny, "--prompts", path, "--out", out, *flags)
    assert code == 2
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert all(part in err for part in parts), err
    assert flags or str(path) in err


def test_missing_model_ends_with_one_line(tmp_path, command):
    path = write_rows(tmp_path / "in.jsonl", prompts(1))
    missing = tmp_path / "none"
    out = tmp_path / "o.jsonl"
    code, err = command("--model", missing, "--prompts", path, "--out", out)
    assert code == 2
    assert err.count("\n") == 1
    assert str(missing) in err


def test_limit_shrinks_to_the_positions_that_are_left(tiny, tmp_path):
    chat = Chat(tiny)
    positions = load_config(tiny).max_positions
    empty = len(chat.prompt_ids({"prompt": ""}))
    row = {"id": 1, "prompt": "0" * (positions - 1 - empty)}
    assert len(chat.prompt_ids(row)) == positions - 1
    [answer] = answers(tiny, [row], tmp_path / "a.jsonl", ignore_eos=True)
    assert answer["tokens"] == 1
    longer = {**row, "prompt": row["prompt"] + "0"}
    with pytest.raises(InputError, match="positions"):
        answers(tiny, [longer], tmp_path / "b.jsonl")

"""The engine against plain forward passes, drawing against softmax, and files that do not depend on how they were made."""

import json
import math
import shutil
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import (
    last_json,
    llama_config,
    random_model,
    read_rows,
    run,
    tiny_checkpoint,
    write_rows,
)

import data
from cpu import kernels
import sample as sample_module
from data import Chat, Common, InputError
from model import Cache, Config, Packed, load
from sample import (
    Engine,
    Options,
    Request,
    SampleOptions,
    digest_key,
    draw,
    invert,
    main,
    sample,
    uniform,
)

MISTRAL = {"architectures": ["MistralForCausalLM"]}
FP32 = Common(dtype="float32")
TEXTS = [
    "Name a river.",
    "Why?",
    "Écris un poème sur la mer, très long, avec une fin.",
    "2 + 2",
    "日本",
]


def prompts(n: int) -> list[dict]:
    return [{"id": i, "prompt": f"{TEXTS[i % 5]} {'so ' * (i % 4)}{i}"} for i in range(n)]


# ---------------------------------------------------------------------------------------------- the engine


@torch.no_grad()
def plain(model, request: Request, o: SampleOptions, stops: set) -> list[int]:
    """The same answer without cache, packing, slots or batching: one forward pass over everything for each token."""
    ids, output = list(request.ids), []
    while len(output) < request.limit:
        logits = model(torch.tensor(ids), Packed([len(ids)]), torch.tensor([len(ids) - 1]))
        u = uniform(torch.tensor([request.key]), torch.tensor([len(output)]))
        output.append(draw(logits, u, o.temperature, o.top_p).item())
        ids.append(output[-1])
        if output[-1] in stops:
            break
    return output


def ragged(n: int, limits: list[int]) -> list[Request]:
    generator = torch.Generator().manual_seed(1)
    lengths = [1, 23, 5, 2, 40, 11, 3, 17]
    return [
        Request(
            torch.randint(3, 320, (lengths[i % 8],), generator=generator).tolist(),
            limits[i % len(limits)],
            digest_key("test", i),
        )
        for i in range(n)
    ]


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
    """Ragged prompts, more requests than slots, refills while others go on, limits of one, a last row that is moved."""
    model, chat = random_model(llama_config(**changes)), Chat(tiny)
    chat.stops = {0, *range(50, 62)}  # several, so that answers end at many lengths
    o = SampleOptions(temperature=temperature, slots=4, prefill_tokens=48)
    requests = ragged(15, [12, 1, 30, 7])
    Engine(model, chat, o).run(requests)
    for r in requests:
        assert r.output == plain(model, r, o, chat.stops)
        assert r.finish_reason == ("stop" if r.output[-1] in chat.stops else "length")
    reasons = {(r.finish_reason, len(r.output) == r.limit) for r in requests}
    assert len({tuple(r.output) for r in requests}) > 10 and reasons >= {
        ("stop", False),
        ("length", True),
    }


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_engine_with_any_number_of_slots(tiny, slots):
    model, chat, o = (
        load(tiny, torch.float32),
        Chat(tiny),
        SampleOptions(temperature=0, slots=slots),
    )
    requests = ragged(7, [9, 1, 15])
    Engine(model, chat, o).run(requests)
    assert [r.output for r in requests] == [plain(model, r, o, chat.stops) for r in requests]


def test_prompts_are_read_some_at_a_time(tiny, monkeypatch):
    """A forward pass over one prompt costs nearly as much as one over many: places are kept free until there are some."""
    real, sizes = sample_module.Prefill.__init__, []
    monkeypatch.setattr(
        sample_module.Prefill,
        "__init__",
        lambda self, cache, rows, *rest: (sizes.append(len(rows)), real(self, cache, rows, *rest))[
            1
        ],
    )
    requests = ragged(48, list(range(30, 6, -1)))
    Engine(load(tiny, torch.float32), Chat(tiny), SampleOptions(slots=16, ignore_eos=True)).run(
        requests
    )
    assert sizes[0] == 16 and min(sizes[1:-1]) > 2 and sum(sizes) == 48
    assert all(len(r.output) == r.limit for r in requests)


def test_engine_fills_the_context_to_the_last_token(tiny):
    raw = llama_config(max_position_embeddings=64)
    model, chat, o = (
        random_model(raw),
        Chat(tiny),
        SampleOptions(temperature=0, slots=2, ignore_eos=True),
    )
    requests = [Request(list(range(3, 3 + n)), 64 - n) for n in (63, 60, 1)]
    Engine(model, chat, o).run(requests)
    assert [len(r.output) for r in requests] == [1, 4, 63]
    assert [r.output for r in requests] == [plain(model, r, o, set()) for r in requests]


class Replayed:
    """What a CUDA graph does, without a GPU: the recorded function over its own input, into its own output."""

    def __init__(self, function, example):
        self.function, self.input, self.output = function, example.clone(), function(example)

    def __call__(self, x):
        self.input.copy_(x)
        return self.output.copy_(self.function(self.input))


@pytest.mark.parametrize("changes", [{}, {**MISTRAL, "sliding_window": 9}])
def test_static_shapes_and_recorded_steps_write_the_same(tiny, monkeypatch, changes):
    """As on a GPU with --cuda-graph: every step has all slots, dead ones too, and reuses its tensors."""
    model, chat, shapes, texts, step = (
        random_model(llama_config(**changes)),
        Chat(tiny),
        set(),
        {},
        Engine.step,
    )
    monkeypatch.setattr(sample_module, "Graph", Replayed)
    monkeypatch.setattr(
        Engine,
        "step",
        lambda self, state, live: (shapes.add((*state.shape,)), step(self, state, live))[1],
    )
    for static in (False, True):
        shapes.clear()
        engine = Engine(model, chat, SampleOptions(slots=6, cuda_graph=static, ignore_eos=True))
        runs = [
            ragged(11, [12, 1, 30, 7]),
            ragged(9, [40, 5]),
        ]  # the second has a cache, and so a graph, of its own
        for requests in runs:
            engine.run(requests)
        texts[static] = [r.output for requests in runs for r in requests]
        assert (shapes == {(4, 6)}) == static
    assert texts[True] == texts[False]


def test_a_graph_is_recorded_once_and_replayed(monkeypatch):
    """The order of calls that PyTorch's documentation asks for; what a GPU makes of them is not tested here."""
    calls, functions = [], []

    class FakeGraph:
        def replay(self):
            calls.append("replay")
            graph.output.copy_(functions[0](graph.input))

    def inside(name):
        @contextmanager
        def manager(_):
            calls.append(name)
            yield
            calls.append(f"end of {name}")

        return manager

    stream = SimpleNamespace(wait_stream=lambda _: calls.append("wait"))
    for name, fake in (
        ("CUDAGraph", FakeGraph),
        ("Stream", lambda: stream),
        ("current_stream", lambda: stream),
        ("stream", inside("side stream")),
        ("graph", inside("recording")),
    ):
        monkeypatch.setattr(torch.cuda, name, fake)
    functions.append(lambda x: (calls.append("run"), 2 * x)[1])
    example = torch.tensor([1, 2])
    graph = sample_module.Graph(functions[0], example)
    assert calls == [
        "wait",
        "side stream",
        "run",
        "end of side stream",
        "wait",
        "recording",
        "run",
        "end of recording",
    ]
    for x in (torch.tensor([3, 4]), torch.tensor([5, 6])):
        assert graph(x).tolist() == (2 * x).tolist()
    assert example.tolist() == [1, 2] and calls[-4:] == ["replay", "run"] * 2


def test_the_number_of_slots_follows_from_memory(tiny, monkeypatch):
    """Half of what the weights leave at most; and never none at all."""
    model, chat, rows = load(tiny, torch.float32), Chat(tiny), []
    one = Cache.row_bytes(model.config, 20, torch.float32)
    assert one == sum(x.nbytes for x in vars(Cache(model.config, 1, 20, torch.float32)).values())
    weights = sum(p.nbytes for p in model.parameters())
    for bytes_, slots in (
        (2 * 5 * one, 8),
        (100 * one, 4),
        (2 * 5 * one + one, 64),
        (one, 8),
        (-weights, 8),
    ):
        monkeypatch.setattr(sample_module, "memory", lambda bytes_=bytes_: weights + bytes_)
        engine = Engine(model, chat, SampleOptions(slots=slots))
        engine.run([Request([5, 6, 7], 17, i) for i in range(9)])
        rows.append(engine.cache.k.shape[1])
    assert rows == [5, 4, 5, 1, 1]


def test_greedy_equals_transformers_generate(tmp_path):
    """Config and weights through files, end token included; the generation config's temperature is not looked at."""
    directory = tiny_checkpoint(tmp_path, eos_token_id=[0, 77, 78, 79, 80, 81, 82])
    (directory / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 9.0, "top_p": 0.1})
    )
    reference, chat = (
        transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32),
        Chat(directory),
    )
    requests = ragged(8, [25])
    Engine(load(directory, torch.float32), chat, SampleOptions(temperature=0, slots=3)).run(
        requests
    )
    for r in requests:
        ids = torch.tensor([r.ids])
        expected = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=25,
            temperature=None,
            top_p=None,
            eos_token_id=sorted(chat.stops),
            pad_token_id=0,
        )
        assert r.output == expected[0, len(r.ids) :].tolist()
    assert len({len(r.output) for r in requests}) > 1


def test_greedy_smollm2_says_what_transformers_says(smollm2):
    chat, o = Chat(smollm2), SampleOptions(temperature=0)
    requests = [
        Request(chat.prompt_ids({"prompt": p}), 12)
        for p in ("What is the capital of France?", "Count to three.")
    ]
    Engine(load(smollm2, torch.float32), chat, o).run(requests)
    reference = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    for r in requests:
        ids = torch.tensor([r.ids])
        expected = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            temperature=None,
            top_p=None,
            top_k=None,
        )
        assert r.output == expected[0, len(r.ids) :].tolist()
    assert "Paris" in chat.text(requests[0].output)


# ---------------------------------------------------------------------------------------------- uniform numbers


def splitmix64(seed: int, count: int) -> list[int]:
    """The published algorithm on Python's integers."""
    mask, outputs = (1 << 64) - 1, []
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) & mask
        z = ((seed ^ seed >> 30) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
        outputs.append(z ^ z >> 31)
    return outputs


def test_uniform_is_splitmix64():
    assert splitmix64(1234567, 3) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]  # published values
    positions = torch.arange(40)
    for key in (0, 1, -1, 1234567, digest_key("a"), digest_key("b"), 2**63 - 1, -(2**63)):
        drawn = uniform(torch.full((40,), key), positions)
        assert drawn.dtype == torch.float64
        assert drawn.tolist() == [(z >> 11) * 2.0**-53 for z in splitmix64(key % 2**64, 40)]


def deviation(counts, expected) -> float:
    """Chi-square in standard deviations from its mean; cells that expect less than 5 are put together."""
    counts, expected = (
        torch.as_tensor(counts, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
    )
    small = expected < 5
    counts = torch.cat([counts[~small], counts[small].sum()[None]])
    expected = torch.cat([expected[~small], expected[small].sum()[None].clamp(min=1e-9)])
    freedom = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum().item() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("along", ["keys", "positions"])
def test_uniform_is_uniform(along):
    n = 200_000
    keys = torch.tensor([digest_key("k", i) for i in range(2000)]).repeat_interleave(100)
    u = (
        uniform(keys, torch.arange(100).repeat(2000))
        if along == "keys"
        else uniform(torch.full((n,), 5), torch.arange(n))
    )
    assert u.min() >= 0 and u.max() < 1
    gap = (u.sort().values - (torch.arange(n) + 0.5) / n).abs().max().item() * math.sqrt(n)
    assert 0.2 < gap < 1.63  # Kolmogorov-Smirnov at 1 %, and not suspiciously even
    pairs = (u[:-1] * 20).long() * 20 + (u[1:] * 20).long()  # each number against the next
    assert (
        abs(deviation(torch.bincount(pairs, minlength=400), torch.full((400,), (n - 1) / 400))) < 4
    )


# ---------------------------------------------------------------------------------------------- drawing

N = 50_000


@pytest.fixture(params=[False, True], ids=["PyTorch", "compiled"])
def drawing(request, monkeypatch):
    """By plain PyTorch, and by the kernel that generation uses on a CPU."""
    if not request.param:
        monkeypatch.setattr(kernels, "library", lambda *_: None)
    elif not shutil.which("cc"):
        pytest.skip("no C compiler")
    assert kernels.ready(torch.zeros(1, 32)) == request.param


def drawn(logits: torch.Tensor, temperature: float, top_p: float, n: int = N) -> torch.Tensor:
    """How often each token comes, (V,)."""
    keys = torch.tensor([digest_key(i) for i in range(n // 100)])
    u = uniform(keys.repeat_interleave(100), torch.arange(100).repeat(n // 100))
    tokens = torch.cat(
        [draw(logits.repeat(len(some), 1), some, temperature, top_p) for some in u.split(10_000)]
    )
    return torch.bincount(tokens, minlength=len(logits))


@pytest.mark.usefixtures("drawing")
@pytest.mark.parametrize(
    ("V", "temperature"), [(3, 1.0), (256, 0.5), (300, 0.7), (300, 1.0), (700, 3.0)]
)
def test_frequencies_are_those_of_softmax(V, temperature):
    logits = 2 * torch.randn(V, generator=torch.Generator().manual_seed(V))
    expected = torch.softmax(logits.double() / temperature, -1)
    counts = drawn(logits, temperature, 1.0)
    assert abs(deviation(counts, N * expected)) < 4
    other = torch.softmax(logits.double() / (temperature * 1.1), -1)
    assert deviation(counts, N * other) > 4  # so the test can tell


@pytest.mark.usefixtures("drawing")
@pytest.mark.parametrize(("top_p", "temperature"), [(0.9, 1.0), (0.5, 0.7), (0.01, 1.0)])
def test_top_p_draws_from_the_nucleus_only(top_p, temperature):
    logits = 2 * torch.randn(300, generator=torch.Generator().manual_seed(3))
    p, order = torch.softmax(logits.double() / temperature, -1).sort(descending=True)
    size = int((p.cumsum(-1) < top_p).sum()) + 1  # the smallest set with this much probability
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
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        logits = 8 * torch.randn(V, generator=generator)
        logits[torch.randperm(V, generator=generator)[: V // 2]] = -math.inf
        logits[[0, -1]] = -math.inf
        p = torch.softmax(logits.double(), -1)
        edges = p.cumsum(-1)
        u = (
            torch.cat(
                [
                    torch.tensor([0.0, 1 - 2.0**-53, 2.0**-53]),
                    edges,
                    edges.nextafter(torch.tensor(0.0)),
                    edges.nextafter(torch.tensor(1.0)),
                ]
            )
            .to(torch.float64)
            .clamp(0, 1 - 2.0**-53)
        )
        tokens = draw(logits.repeat(len(u), 1), u, 1.0, top_p)
        assert tokens.min() >= 0 and tokens.max() < V and (p[tokens] > 0).all()


@pytest.mark.usefixtures("drawing")
def test_numbers_at_the_edge_of_a_block_stay_inside_it():
    """A block's start is a rounded sum: what is left of the number there may be a hair below zero."""
    for last in torch.arange(-21, -10, 0.1):
        logits = torch.full((512,), -math.inf)
        logits[:256], logits[300] = (
            0.0,
            last,
        )  # 256 ones, then one token behind 44 of probability zero
        edge = 256 / (256 + math.exp(last))
        tokens = draw(
            logits.repeat(81, 1),
            edge + torch.arange(-40, 41, dtype=torch.float64) * 2.0**-53,
            1.0,
            1.0,
        )
        assert set(tokens.tolist()) <= {255, 300}


def test_invert_finds_the_token_and_the_rest():
    weights = torch.tensor([[0.0, 2.0, 0.0, 3.0, 0.0]], dtype=torch.float64).expand(5, -1)
    index, left = invert(weights, torch.tensor([0.0, 1.5, 2.0, 4.5, 5.0], dtype=torch.float64))
    assert index.tolist() == [1, 1, 3, 3, 3]
    assert torch.allclose(left, torch.tensor([0.0, 1.5, 0.0, 2.5, 3.0], dtype=torch.float64))


@pytest.mark.usefixtures("drawing")
def test_temperature_zero_is_greedy():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert draw(logits, torch.tensor([0.999, 0.999], dtype=torch.float64), 0, 1.0).tolist() == [
        1,
        0,
    ]


# ---------------------------------------------------------------------------------------------- files


def answers(
    model, rows, path, *, samples: int = 1, common: Common = FP32, purpose: str = "", **options
) -> list[dict]:
    sample(
        model,
        rows,
        path,
        SampleOptions(**{"max_new_tokens": 12, **options}),
        common,
        purpose,
        samples,
    )
    assert not path.with_suffix(".parts").exists()
    return read_rows(path)


def test_text_does_not_depend_on_slots_or_chunks(tiny, tmp_path):
    texts = [
        answers(tiny, prompts(40), tmp_path / f"{i}.jsonl", **options)
        for i, options in enumerate(
            [
                {"slots": 1},
                {"slots": 7},
                {"slots": 64},
                {"slots": 5, "chunk": 3},
                {"prefill_tokens": 1},
            ]
        )
    ]
    assert all(text == texts[0] for text in texts[1:])


def test_a_record_keeps_its_luck_wherever_it_stands(tiny, tmp_path):
    rows = prompts(20)
    inside = {row["id"]: row for row in answers(tiny, rows, tmp_path / "a.jsonl")}
    assert answers(tiny, rows[13:8:-1], tmp_path / "b.jsonl") == [
        inside[i] for i in range(13, 8, -1)
    ]


def test_luck_follows_from_seed_and_purpose(tiny, tmp_path):
    texts = [
        answers(tiny, prompts(5), tmp_path / f"{i}.jsonl", **kw)
        for i, kw in enumerate(
            [{}, {"common": Common(seed=1, dtype="float32")}, {"purpose": "rewrite"}, {}]
        )
    ]
    assert texts[0] == texts[3] and texts[0] != texts[1] and texts[0] != texts[2]


def test_samples_of_a_prompt_differ_from_their_first_token_on(tiny, tmp_path):
    rows = answers(tiny, prompts(6), tmp_path / "a.jsonl", samples=8, temperature=1.0, chunk=5)
    assert [(row["id"], row["sample"]) for row in rows] == [
        (i, s) for i in range(6) for s in range(8)
    ]
    for i in range(6):
        texts = [row["response"] for row in rows if row["id"] == i]
        assert len(set(texts)) == 8 and len({text[:1] for text in texts}) > 1
    assert "sample" not in answers(tiny, prompts(1), tmp_path / "b.jsonl")[0]
    engine_requests = [Request([5, 6, 7], 1, digest_key(0, "", 1, s)) for s in range(30)]
    Engine(load(tiny, torch.float32), Chat(tiny), SampleOptions(temperature=1.0)).run(
        engine_requests
    )
    assert len({r.output[0] for r in engine_requests}) > 5


def test_records_keep_their_fields_and_their_own_limits(tiny, tmp_path):
    talk = [{"role": "system", "content": "Brief."}, {"role": "user", "content": "Hi"}]
    rows = [
        {"id": "a", "prompt": "x", "max_new_tokens": 3},
        {"id": "b", "messages": talk, "max_new_tokens": 1},
        {"id": "c", "prompt": "y"},
    ]
    a, b, c = answers(tiny, rows, tmp_path / "a.jsonl", max_new_tokens=6, ignore_eos=True)
    assert [row["tokens"] for row in (a, b, c)] == [3, 1, 6] and {
        row["finish_reason"] for row in (a, b, c)
    } == {"length"}
    assert b["messages"] == talk and "prompt" not in b and a["prompt"] == "x"
    assert set(a) == {"id", "prompt", "response", "finish_reason", "tokens"}


def test_ignore_eos_goes_on_to_the_limit_and_several_tokens_stop(tmp_path):
    model = tiny_checkpoint(
        tmp_path / "m", eos_token_id=list(range(100))
    )  # about every third token
    stopped = answers(model, prompts(10), tmp_path / "a.jsonl", max_new_tokens=40)
    assert {row["finish_reason"] for row in stopped} == {"stop"} and len(
        {row["tokens"] for row in stopped}
    ) > 2
    ignored = answers(model, prompts(10), tmp_path / "b.jsonl", max_new_tokens=40, ignore_eos=True)
    assert {(row["finish_reason"], row["tokens"]) for row in ignored} == {("length", 40)}


def scripted(tiny, monkeypatch, text: str, o: SampleOptions) -> Request:
    """What the engine makes of a model that writes this text, then its end token."""
    chat, model = Chat(tiny), load(tiny, torch.float32)
    ids = [*chat.encode(text), chat.end]
    request = Request([5, 6], len(ids))
    monkeypatch.setattr(sample_module, "draw", lambda *_: torch.tensor([ids[len(request.output)]]))
    Engine(model, chat, o).run([request])
    request.text = chat.text(request.output)
    return request


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("One two.\nUser: three", "\nUser:", "One two.\nUser:"),
        ("the answers, the END of it", "END", "the answers, the END"),
        ("a b c d", "x", "a b c d"),
        (
            "The sampler writes",
            "ple",
            "The sampler",
        ),  # complete inside a token: the token is kept whole
        ("Voilà 終わり。 more", "終わり。", "Voilà 終わり。"),  # characters of several tokens each
        ("Voilà é more", "é", "Voilà é"),
    ],
)
def test_stop_text_ends_the_answer(tiny, monkeypatch, text, stop, kept):
    request = scripted(tiny, monkeypatch, text, SampleOptions(stop=stop))
    assert (request.text, request.finish_reason) == (kept, "stop")


def test_answers_with_line_separators_of_unicode_are_merged(tiny, tmp_path):
    rows = [{"id": i, "prompt": f"a{c}b"} for i, c in enumerate("\u2028\u2029\x85\x0b\x1e")]
    assert [row["prompt"] for row in answers(tiny, rows, tmp_path / "a.jsonl")] == [
        row["prompt"] for row in rows
    ]


class Killed(Exception):
    pass


def test_interrupted_sampling_goes_on_with_the_chunks_it_has(tiny, tmp_path, monkeypatch):
    rows, options = prompts(23), {"chunk": 5, "slots": 3}
    answers(tiny, rows, tmp_path / "whole.jsonl", **options)
    written, real_run, real_write, out = (
        [],
        Engine.run,
        sample_module.write_jsonl,
        tmp_path / "out.jsonl",
    )

    def write_or_die(path, lines):
        if len(written) == 2:
            raise Killed
        written.append(path.name)
        real_write(path, lines)

    monkeypatch.setattr(sample_module, "write_jsonl", write_or_die)
    with pytest.raises(Killed):
        answers(tiny, rows, out, **options)
    monkeypatch.setattr(sample_module, "write_jsonl", real_write)
    assert not out.exists() and written == ["0.jsonl", "5.jsonl"]
    asked = []
    monkeypatch.setattr(
        Engine,
        "run",
        lambda self, requests: (asked.append(len(requests)), real_run(self, requests)),
    )
    answers(tiny, rows, out, **options)
    assert asked == [5, 5, 3] and out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.9},
        {"common": Common(seed=9, dtype="float32")},
        {"rows": prompts(12)[::-1]},
    ],
)
def test_chunks_of_other_options_are_not_used(tiny, tmp_path, monkeypatch, change):
    out, real_write = tmp_path / "out.jsonl", sample_module.write_jsonl

    def die_at_the_end(path, lines):
        if path == out:
            raise Killed
        real_write(path, lines)

    monkeypatch.setattr(sample_module, "write_jsonl", die_at_the_end)
    with pytest.raises(Killed):
        answers(tiny, prompts(12), out, chunk=5)
    monkeypatch.setattr(sample_module, "write_jsonl", real_write)
    options = {"chunk": 5, **change}
    rows = options.pop("rows", prompts(12))
    assert answers(tiny, rows, out, **options) == answers(
        tiny, rows, tmp_path / "new.jsonl", **options
    )


def test_the_dearest_chunk_comes_first(tiny, tmp_path, monkeypatch):
    """So that no rank starts a long chunk when the others are done."""
    rows = [{**row, "max_new_tokens": 1 + i // 4 % 3} for i, row in enumerate(prompts(12))]
    order, real_run = [], Engine.run
    monkeypatch.setattr(
        Engine,
        "run",
        lambda self, requests: (order.append(requests[0].limit), real_run(self, requests))[1],
    )
    answers(tiny, rows, tmp_path / "a.jsonl", chunk=4)
    assert order == [3, 2, 1]


def test_two_processes_finish_what_one_began_with_the_same_bytes(tiny, tmp_path, monkeypatch):
    """Stopped in the middle, then torchrun with two: byte for byte what one process writes in one go."""
    rows = write_rows(tmp_path / "in.jsonl", [{"prompt": row["prompt"]} for row in prompts(30)])
    common = [
        "--model",
        tiny,
        "--prompts",
        rows,
        "--dtype",
        "float32",
        "--max-new-tokens",
        "20",
        "--chunk",
        "4",
        "--slots",
        "2",
        "--samples",
        "2",
    ]
    args, parts, real_write = (
        [*common, "--out", tmp_path / "out.jsonl"],
        tmp_path / "out.parts",
        sample_module.write_jsonl,
    )

    def write_or_die(path, lines):
        if len(list(parts.glob("*.jsonl"))) == 3:
            raise Killed
        real_write(path, lines)

    monkeypatch.setattr(sample_module, "write_jsonl", write_or_die)
    with pytest.raises(Killed):
        main(data.parse_options(Options, list(map(str, args))))
    monkeypatch.setattr(sample_module, "write_jsonl", real_write)
    (parts / "0.jsonl").unlink()  # so that the gap is not at the end
    code, out, err = run(["sample.py", *args], nproc=2)
    assert code == 0, err
    result = last_json(out)
    assert result["answers"] == 60 and result["records"] == 30 and not parts.exists()
    assert result["tokens"] == sum(row["tokens"] for row in read_rows(tmp_path / "out.jsonl"))
    assert result["seconds"] > 0 and result["tokens_per_second"] > 0
    manifest = json.loads((tmp_path / "out.manifest.json").read_text())
    assert manifest["processes"] == 2 and manifest["start_from"] == str(tiny)
    main(data.parse_options(Options, list(map(str, [*common, "--out", tmp_path / "one.jsonl"]))))
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()


# ---------------------------------------------------------------------------------------------- errors


def command(monkeypatch, capsys, *argv) -> tuple[int, str, str]:
    """sample.py's command in this process: (exit code, standard output, standard error)."""
    monkeypatch.setattr("sys.argv", ["sample.py", *map(str, argv)])
    monkeypatch.setattr(data, "processes", nullcontext)
    monkeypatch.setattr(
        sample_module,
        "load",
        lambda *_: pytest.fail("weights were read before the input was checked"),
    )
    with pytest.raises(SystemExit) as end:
        data.command(main, Options)
    return end.value.code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("row", "flags", "parts"),
    [
        ({"prompt": "long " * 600}, [], ["'prompt'", "line 2", "512", "shorten"]),
        ({"prompt": "x", "max_new_tokens": 0}, [], ["'max_new_tokens'", "line 2"]),
        ({"prompt": "x", "max_new_tokens": "5"}, [], ["'max_new_tokens'", "line 2"]),
        ({"prompt": "x", "max_new_tokens": 2.5}, [], ["'max_new_tokens'", "line 2"]),
        ({"text": "x"}, [], ["'prompt'", "line 2"]),
        ({"prompt": "x"}, ["--slots", "0"], ["--slots"]),
        ({"prompt": "x"}, ["--chunk", "0"], ["--chunk"]),
        ({"prompt": "x"}, ["--samples", "0"], ["--samples"]),
        ({"prompt": "x"}, ["--top-p", "0"], ["--top-p"]),
        ({"prompt": "x"}, ["--temperature", "-1"], ["--temperature"]),
        ({"prompt": "x"}, ["--max-new-tokens", "0"], ["max_new_tokens"]),
        ({"prompt": "x"}, ["--cuda-graph"], ["--cuda-graph", "no GPU"]),
    ],
)
def test_bad_input_ends_with_one_line_before_the_weights_are_read(
    tiny, tmp_path, monkeypatch, capsys, row, flags, parts
):
    path = write_rows(tmp_path / "in.jsonl", [{"prompt": "fine"}, row])
    code, _, err = command(
        monkeypatch,
        capsys,
        "--model",
        tiny,
        "--prompts",
        path,
        "--out",
        tmp_path / "o.jsonl",
        *flags,
    )
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: ")
    assert all(part in err for part in [*parts, *([] if flags else [str(path)])])


def test_missing_model_ends_with_one_line(tmp_path, monkeypatch, capsys):
    path = write_rows(tmp_path / "in.jsonl", prompts(1))
    code, _, err = command(
        monkeypatch,
        capsys,
        "--model",
        tmp_path / "none",
        "--prompts",
        path,
        "--out",
        tmp_path / "o.jsonl",
    )
    assert code == 2 and err.count("\n") == 1 and str(tmp_path / "none") in err


def test_limit_shrinks_to_what_the_context_has_room_for(tiny, tmp_path):
    chat, context = Chat(tiny), Config.load(tiny).context
    row = {"id": 1, "prompt": "0" * (context - 1 - len(chat.prompt_ids({"prompt": ""})))}
    assert len(chat.prompt_ids(row)) == context - 1
    assert answers(tiny, [row], tmp_path / "a.jsonl", ignore_eos=True)[0]["tokens"] == 1
    with pytest.raises(InputError, match="context"):
        answers(tiny, [{**row, "prompt": row["prompt"] + "0"}], tmp_path / "b.jsonl")

"""Families beside Llama against transformers, every parameter random: their tables, text, training.

transformers starts Qwen2's biases at 0 and Qwen3's norms at 1, where an implementation without
them would pass; random_model() moves both.
"""

import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import (
    llama_config,
    random_model,
    read_rows,
    refusal,
    run,
    tiny_checkpoint,
    write_rows,
)
from safetensors.torch import load_file
from test_model import assert_close, ours, their_logits, theirs, tokens
from test_sample import assert_generates_alike, ragged

from checkpoint import load, parse_config, save
from dpo import PolicyOptions, train_policy
from formats.chat import Chat
from formats.config_json import FAMILIES
from ops.attention import Packed
from plumbing.options import RunOptions

# head dimension 16 is computed by PyTorch, 32 by the compiled functions
QWEN2 = {"architectures": ["Qwen2ForCausalLM"]}
QWEN2_WIDE = {**QWEN2, "hidden_size": 128}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16}
QWEN3_WIDE = {**QWEN3, "head_dim": 32}
NEW = [
    pytest.param(QWEN2, id="Qwen2"),
    pytest.param(QWEN2_WIDE, id="Qwen2 compiled"),
    pytest.param(QWEN3, id="Qwen3"),
    pytest.param(QWEN3_WIDE, id="Qwen3 compiled"),
]
ONE_OF_EACH = [NEW[1], NEW[3]]
WINDOW = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}


def without(directory, ending: str, kept: float) -> torch.Tensor:
    """Logits where all parameters of one name are set to what an implementation without has."""
    model = load(directory, torch.float32)
    found = [p for name, p in model.named_parameters() if name.endswith(ending)]
    assert len(found) == 2  # layers
    for parameter in found:
        assert (parameter - kept).abs().max() > 0.01
        parameter.fill_(kept)
    return ours(model, tokens(40))


# ------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", NEW)
def test_logits_equal_transformers(tmp_path, family, tied):
    directory = tiny_checkpoint(tmp_path, **family, tie_word_embeddings=tied)
    expected = their_logits(directory, tokens(40), family["architectures"][0])
    assert_close(ours(load(directory, torch.float32), tokens(40)), expected)


@pytest.mark.parametrize(
    ("family", "ending", "kept"),
    [
        (QWEN2, "q_proj.bias", 0.0),
        (QWEN2, "k_proj.bias", 0.0),
        (QWEN2, "v_proj.bias", 0.0),
        (QWEN3, "q_norm.weight", 1.0),
        (QWEN3, "k_norm.weight", 1.0),
    ],
)
def test_without_any_of_its_parameters_the_logits_differ(tmp_path, family, ending, kept):
    directory = tiny_checkpoint(tmp_path, **family)
    expected = their_logits(directory, tokens(40), family["architectures"][0])
    assert (without(directory, ending, kept) - expected).abs().max() > 0.01


def test_a_family_has_the_parameters_of_transformers_and_no_others():
    for name in FAMILIES:
        raw = llama_config(architectures=[f"{name}ForCausalLM"], head_dim=16)
        config = transformers.AutoConfig.for_model(**raw)
        with torch.device("meta"):
            expected = transformers.AutoModelForCausalLM.from_config(config)
        shapes = {name: p.shape for name, p in random_model(raw).named_parameters()}
        assert shapes == {name: p.shape for name, p in expected.named_parameters()}


@pytest.mark.parametrize("family", ONE_OF_EACH)
@pytest.mark.parametrize("labels", [1, 3])
def test_reward_head_equals_transformers(tmp_path, family, labels):
    architecture = family["architectures"][0].replace("CausalLM", "SequenceClassification")
    changes = {**family, "architectures": [architecture], "pad_token_id": 0}
    id2label = {str(i): f"LABEL_{i}" for i in range(labels)}
    directory = tiny_checkpoint(tmp_path, **changes, id2label=id2label)
    ids = tokens(17, 319) + 1  # no pad token inside
    context = Packed([17])
    with torch.no_grad():
        scores = load(directory, torch.float32)(ids, context, context.last)  # (1, labels)
        expected = theirs(directory, architecture)(ids[None]).logits
    assert expected.shape == (1, labels)
    assert_close(scores, expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_greedy_text_equals_transformers_generate(tmp_path, family):
    directory = tiny_checkpoint(tmp_path, **family, eos_token_id=[0, 77, 78, 79, 80, 81, 82])
    stops = sorted(Chat(directory).stop_token_ids)
    assert_generates_alike(directory, ragged(4, [25]), 25, eos_token_id=stops, pad_token_id=0)


# ------------------------------------------------------------------------------------- their files


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_saved_model_is_the_same_here_and_in_transformers(tmp_path, family):
    source = tiny_checkpoint(tmp_path / "source", **family)
    out = tmp_path / "out"
    out.mkdir()
    save(load(source, torch.float32), out, source, torch.float32, "", shard_bytes=20_000)
    logits = ours(load(source, torch.float32), tokens(40))
    assert torch.equal(ours(load(out, torch.float32), tokens(40)), logits)
    assert_close(logits, their_logits(out, tokens(40), family["architectures"][0]))
    # and what transformers 5 writes, with all its settings
    again = tmp_path / "again"
    theirs(source, family["architectures"][0]).save_pretrained(again)
    assert "layer_types" in json.loads((again / "config.json").read_text())
    assert torch.equal(ours(load(again, torch.float32), tokens(40)), logits)


@pytest.mark.parametrize("family", [QWEN2, QWEN3])
def test_a_window_of_all_layers_equals_transformers(tmp_path, family):
    directory = tiny_checkpoint(tmp_path, **family, **WINDOW)
    expected = their_logits(directory, tokens(40), family["architectures"][0])
    model = load(directory, torch.float32)
    assert model.config.sliding_window == 7
    assert_close(ours(model, tokens(40)), expected)


FULL = ["full_attention"] * 2
SLIDING = ["sliding_attention"] * 2


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({}, None),
        ({"sliding_window": 7, "max_window_layers": 0}, None),
        ({"use_sliding_window": False, "sliding_window": 7, "max_window_layers": 1}, None),
        ({"use_sliding_window": True}, None),  # from layer 28 on, of two
        ({"use_sliding_window": True, "max_window_layers": 0}, 4096),
        ({**WINDOW, "sliding_window": None}, None),
        ({**WINDOW, "max_window_layers": 2}, None),
        ({**WINDOW, "layer_types": FULL}, None),
        ({**WINDOW, "max_window_layers": 1, "layer_types": SLIDING}, 7),
    ],
)
@pytest.mark.parametrize("family", [QWEN2, QWEN3])
def test_windows_are_those_of_transformers(family, changes, window):
    raw = llama_config(**family, **changes)
    assert parse_config(raw).sliding_window == window
    config = transformers.AutoConfig.for_model(**raw)
    kinds = set(config.layer_types)
    assert len(kinds) == 1
    assert (config.sliding_window if kinds == {"sliding_attention"} else None) == window


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({**QWEN2, **WINDOW, "max_window_layers": 1}, "on some layers only"),
        ({**QWEN3, **WINDOW, "layer_types": [*FULL[:1], *SLIDING[:1]]}, "on some layers only"),
        ({**QWEN3, "attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"architectures": ["MistralForCausalLM"], "use_sliding_window": False}, "use_sliding"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM"),
        ({"architectures": ["SmolLM3ForCausalLM"]}, "SmolLM3ForCausalLM"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(changes, named):
    said = refusal(parse_config, llama_config(**changes), "DIR/config.json")
    assert said.startswith("DIR/config.json: ") and named in said


@pytest.mark.parametrize("name", FAMILIES)
def test_settings_left_out_have_the_defaults_of_transformers(name):
    raw = llama_config(architectures=[f"{name}ForCausalLM"])
    config = transformers.AutoConfig.for_model(**raw)
    ours = parse_config(raw)
    assert ours.head_dim == getattr(config, "head_dim", None) or 16
    assert ours.sliding_window == getattr(config, "sliding_window", None)


def test_a_config_must_say_how_many_positions_there_are():
    """Chat reads the same setting: a default in either place could differ from the other's."""
    said = refusal(parse_config, llama_config(max_position_embeddings=None), "DIR/config.json")
    assert said.startswith("DIR/config.json: max_position_embeddings is missing")


# ------------------------------------------------------------------------------------- training

PAIRS = [
    {"id": "a", "prompt": "Count to 3.", "chosen": "1 2 3", "rejected": "no, never"},
    {"id": "b", "prompt": "And to 2?", "chosen": "1 2", "rejected": "I do not want to"},
]
FP32 = RunOptions(dtype="float32")


@pytest.mark.slow
@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_a_step_of_dpo_equals_plain_torch_on_a_transformers_model(tmp_path, family):
    start = tiny_checkpoint(tmp_path / "start", **family)
    file = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    o = PolicyOptions(
        run=FP32, loss="dpo", loss_parameters={"beta": 0.1}, lr=1e-3, epochs=1, batch=2
    )
    train_policy(start, [file], tmp_path / "out", o)

    # the policy is the reference, so that only the gradient at a margin of 0 counts
    chat = Chat(start)
    reference = theirs(start, family["architectures"][0])
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3, weight_decay=0.0)
    loss = 0.0
    for row in PAIRS:
        logps = []
        for side in ("chosen", "rejected"):
            prompt = chat.prompt_ids(row)
            response = [*chat.encode(row[side]), 0]
            logits = reference(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            logps.append(-F.cross_entropy(logits, torch.tensor(response), reduction="sum"))
        margin = logps[0] - logps[1]
        loss = loss - F.logsigmoid(0.1 * (margin - margin.detach())) / len(PAIRS)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    optimizer.step()

    [line] = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    trained = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(start / "model.safetensors")
    for name, parameter in reference.named_parameters():
        # a tenth of a step, but for the few whose gradient is as small as its rounding
        far = (trained[name] - parameter).abs() > 1e-4
        assert far.double().mean() < 1e-3, name
        assert (trained[name] - before[name]).abs().max() > 9e-4, name


@pytest.mark.slow
@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_the_improver_takes_a_step_and_rewrites(tmp_path, family):
    model = tiny_checkpoint(tmp_path / "model", **family)
    seeds = [{"id": row["id"], "prompt": row["prompt"], "response": row["chosen"]} for row in PAIRS]
    files = {
        "seeds": write_rows(tmp_path / "seeds.jsonl", seeds),
        "prompts": write_rows(tmp_path / "prompts.jsonl", [{"id": "c", "prompt": "To 4?"}]),
    }
    flags = [f"--{name}={path}" for name, path in files.items()]
    flags += ["--dtype=float32", "--improver.epochs=1", "--improver.lr=1e-3"]
    flags += ["--answers.max-new-tokens=8", "--rewrites.max-new-tokens=8"]
    out = tmp_path / "out"
    code, _, err = run(["improve.py", f"--model={model}", f"--out={out}", *flags])
    assert code == 0, err
    assert len(read_rows(out / "rewrites.jsonl")) == 1
    assert_close(
        ours(load(out / "improver", torch.float32), tokens(40)),
        their_logits(out / "improver", tokens(40), family["architectures"][0]),
    )
    trained = load_file(out / "improver" / "model.safetensors")
    before = load_file(model / "model.safetensors")
    assert all((trained[name] - before[name]).abs().max() > 0 for name in before)

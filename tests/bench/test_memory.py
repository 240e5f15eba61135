"""bench/memory.py: estimates against real processes, and of a model that does not fit here."""

import json
from dataclasses import replace

import pytest
from bench_helpers import run_bench
from conftest import last_json, llama_config

from bench import memory
from checkpoint import parse_config
from model import Model
from plumbing.files import InputError, write_json


@pytest.mark.slow
@pytest.mark.ranks
def test_estimated_memory_is_what_training_takes(tmp_path):
    """Fake tensors against two real processes, at a size where Python itself does not matter.

    In fp32: without instructions for bf16 a CPU would take minutes.
    """
    setup = memory.Setup(
        model=memory.random_checkpoint(tmp_path),
        processes=2,
        max_length=256,
        micro_batch_tokens=256,
        activation_checkpointing=True,
        dtype="float32",
    )
    estimated, measured = memory.estimate(setup), memory.measure(setup)
    parts = estimated["parts"]
    assert parts["parameters"] == pytest.approx(4 * 33.5e6 / 2, rel=0.01)
    assert parts["optimizer"] == pytest.approx(2 * parts["parameters"], rel=0.01)
    assert estimated["total"] == pytest.approx(measured["total"], rel=0.15)
    halved = memory.estimate(replace(setup, dtype="bfloat16"))["parts"]
    assert halved["all-gathers"] == pytest.approx(parts["all-gathers"] / 2, rel=0.01)
    assert halved["parameters"] == parts["parameters"]


@pytest.mark.slow
def test_estimate_of_a_model_that_is_not_there(tmp_path):
    """Two layers of an 8B model on 8 GPUs, from the config alone."""
    config = llama_config(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    )
    write_json(tmp_path / "config.json", config)
    flags = ["--model", tmp_path, "--data", "-", "--out", "-", "--activation-checkpointing"]
    flags += ["--micro-batch-tokens", 2048, "--processes", 8, "--json", tmp_path / "figures.json"]
    code, stdout, stderr = run_bench("memory", ["train.py", *flags])
    assert code == 0, stderr
    result = last_json(stdout)
    parts = result["parts"]
    weights = 2 * 128256 * 4096 + 2 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert parts["parameters"] == pytest.approx(4 * weights / 8, rel=0.01)
    assert parts["optimizer"] == pytest.approx(8 * weights / 8, rel=0.01)
    assert sum(parts.values()) == result["total"]
    assert f"{result['total'] / 1e9:.2f} GB per process at peak" in stdout
    rows = json.loads((tmp_path / "figures.json").read_text())["figures"]["parts"]
    assert [row["part"] for row in rows] == [*memory.PARTS, "total at peak"]
    assert result["largest"] >= 2048 and result["largest"] % 2048 == 0


def test_a_command_is_measured_by_its_own_flags(tmp_path, monkeypatch):
    """Micro-batches hold whole examples: a pair has two sequences."""
    asked = []
    monkeypatch.setattr(memory, "show_estimate", lambda *given: asked.append(given) or {})
    rest = ["--out", "-", "--max-length", "100", "--micro-batch-tokens", "1000"]
    sft = ["train.py", "--model", str(tmp_path), "--data", "-", *rest]
    memory.estimate_command([*sft, "--dtype", "float32", "--gpu-gb", "24", "--processes", "16"])
    dpo = ["dpo.py", "--model", str(tmp_path), "--pairs", "-", *rest, "--loss", "simpo"]
    memory.estimate_command([*dpo, "--gamma", "1.6", "--activation-checkpointing"])
    (one, unit, args), (two, pair, _) = asked
    assert (one.micro_batch_tokens, unit, args.gpu_gb, one.dtype) == (1000, 100, 24, "float32")
    assert (one.processes, one.node_gpus, one.device) == (16, 8, "gpu")
    assert not one.activation_checkpointing and two.activation_checkpointing
    assert (two.micro_batch_tokens, pair, two.processes) == (1000, 200, 1)
    assert two.model == tmp_path.resolve()
    memory.estimate_command([*dpo, "--micro-batch-tokens", "50"])  # the least is one pair
    assert asked[-1][0].micro_batch_tokens == 200


@pytest.mark.parametrize(
    "argv, said",
    [
        (["loop.py"], "loop.py: give train.py or dpo.py, and its flags"),
        (["train.py", "--processes", "12"], "--processes must be whole nodes of 8"),
        (["train.py", "--modle", "x"], "unrecognized|required"),
    ],
)
def test_bad_input(argv, said):
    with pytest.raises(InputError, match=said):
        memory.estimate_command(argv)


def test_an_error_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["memory.py", "loop.py"])
    with pytest.raises(SystemExit) as ended:
        memory.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: loop.py: give train.py or dpo.py, and its flags\n"


def test_figures_of_the_comparison(tmp_path, monkeypatch, capsys):
    """A row for each number of processes, without and with activation checkpointing."""
    monkeypatch.setattr(memory, "estimate", lambda setup: {"total": 3e6 / setup.processes})
    monkeypatch.setattr(memory, "measure", lambda setup: {"total": 4e6 / setup.processes})
    monkeypatch.setattr("sys.argv", ["memory.py", "--json", str(tmp_path / "memory.json")])
    memory.main()
    out = capsys.readouterr().out
    assert [one["processes"] for one in json.loads(out.splitlines()[-1])] == [1, 1, 2, 2, 4, 4]
    rows = json.loads((tmp_path / "memory.json").read_text())["figures"]
    assert [row["estimated"] for row in rows] == 2 * ["3 MB"] + 2 * ["2 MB"] + 2 * ["1 MB"]
    assert {row["ratio"] for row in rows} == {"0.75"}
    assert [row["activation checkpointing"] for row in rows] == 3 * [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_estimate_counts_the_parameters_of_every_family(tmp_path, family):
    raw = llama_config(architectures=[f"{family}ForCausalLM"], head_dim=32)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    count = sum(p.numel() for p in Model(parse_config(raw)).parameters())
    for device in ("cpu", "gpu"):
        setup = memory.Setup(tmp_path, max_length=64, micro_batch_tokens=128, device=device)
        parts = memory.estimate(setup)["parts"]
        assert parts["parameters"] == pytest.approx(4 * count, rel=0.01)
        assert parts["optimizer"] == pytest.approx(2 * parts["parameters"], rel=0.01)

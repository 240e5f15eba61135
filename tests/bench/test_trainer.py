"""bench/trainer.py on a tiny model: a comparison runs, and its figures are those of its runs."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from bench_helpers import run_bench
from conftest import ROOT, last_json, read_rows, tiny_checkpoint, write_rows

from bench import peers, trainer
from checkpoint import load_config
from formats.chat import Chat


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> list:
    folder = tmp_path_factory.mktemp("trainer")
    rows = [
        {"prompt": f"Say {i}.", "chosen": f"Good {i}. " * 3, "rejected": f"Bad {i}. " * 2}
        for i in range(16)
    ]
    pairs = write_rows(folder / "pairs.jsonl", rows)
    return ["--model", tiny_checkpoint(folder / "model"), "--pairs", pairs]


@pytest.mark.slow
def test_a_comparison_without_the_peer(given, tmp_path):
    kept = tmp_path / "figures.json"
    more = ["--steps", 2, "--batch", 2, "--max-length", 64, "--json", kept]
    code, out, errors = run_bench("trainer", [*given, "--only", "compare", *more])
    assert code == 0, errors
    rows = last_json(out)["compare"]
    assert [row["training"] for row in rows] == ["dpo: ours", "sft: ours", "dpo, long: ours"]
    assert json.loads(kept.read_text())["figures"] == {"compare": rows}
    for row in rows:
        assert float(row["tokens/s"]) > 0 and float(row["memory GB"]) >= 0
        assert row["mfu"].endswith("%")
        # fp32 masters move at these learning rates
        assert 0 < float(row["moved"].removesuffix("%")) <= 100
    assert rows[1]["reference s"] == "0.0"
    assert "GFLOP/s in a large bf16 matmul" in out


OURS = {
    "peak_gb": 1.0,
    "seconds": 2.0,
    "reference_seconds": 3.0,
    "moved": 0.5,
    "tokens": 100,
    "mfu": 0.4,
    "peak_gflops": 9.0,
    "start_seconds": 1.0,
    "step_seconds": 0.5,
}


@pytest.fixture
def asked(monkeypatch) -> list:
    """(part, arguments) of every run, none of which takes place."""
    calls = []

    def run_part(command, part, arguments):
        assert command[1:] == ["-m", "bench.trainer"]
        calls.append((part, arguments))
        return OURS

    def run_peer(python, part, arguments):
        assert python == "PYTHON"
        calls.append((part, arguments))
        names = ("peak_gb", "seconds", "reference_seconds", "moved")
        peer = {name: OURS[name] for name in names}
        return {**peer, "peak_gb": 4.0, "seconds": 6.0}

    monkeypatch.setattr(trainer, "run_part", run_part)
    monkeypatch.setattr(trainer, "run_peer", run_peer)
    return calls


def options(given: list, **more) -> SimpleNamespace:
    sizes = {"steps": 1, "batch": 2, "max_length": 64, "micro_batch_tokens": 64}
    flags = {"activation_checkpointing": True, **sizes, **more}
    return SimpleNamespace(model=given[1], pairs=given[3], **flags)


def test_ratios_to_the_peer(given, asked, capsys):
    tables = trainer.compare(options(given, trl="PYTHON"))
    assert [row["tokens/s"] for row in tables["compare"]] == ["50", "17"] * 3
    assert [row["mfu"] for row in tables["compare"]] == ["40%", "-"] * 3
    out = capsys.readouterr().out
    assert "dpo: 3.00x TRL, reference pass 1.00x, 0.25 of its memory" in out
    assert "sft: 3.00x TRL, 0.25 of its memory" in out
    assert [part for part, _ in asked] == ["ours", "trl"] * 3
    assert all(one["activation_checkpointing"] for _, one in asked)
    assert asked[4][1]["max_length"] == 256 and asked[4][1]["pairs"] != given[3]


def test_growth(given, asked):
    tables = trainer.growth(options(given))
    assert {name: [row[name] for row in rows] for name, rows in tables.items()} == {
        "length": [256, 1024, 4096],
        "layers": [1, 8, 32],
        "pairs": [100, 1000, 10000],
    }
    assert tables["layers"][0]["s a step"] == "0.500"
    arguments = [one for _, one in asked]
    assert [one["max_length"] for one in arguments[:3]] == [256, 1024, 4096]
    assert [one["steps"] for one in arguments[-3:]] == [50, 500, 5000]
    layers = [load_config(one["model"]).num_hidden_layers for one in arguments[3:7]]
    assert layers == [1, 8, 32, 1]


@pytest.mark.slow
def test_the_peak_is_soon_measured_without_bf16_instructions():
    older = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}
    code = "import time; from bench.trainer import peak_flops; start = time.perf_counter(); "
    code += "print(peak_flops(), time.perf_counter() - start)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, **older},
    )
    peak, seconds = map(float, done.stdout.split())
    assert peak > 1e8 and seconds < 20


def test_long_pairs_are_joined_ones(given):
    rows = read_rows(trainer.long_pairs(given[3], 3))
    assert len(rows) == 5 and rows[1]["prompt"] == "Say 3."
    assert rows[1]["chosen"] == "\n\n".join(f"Good {i}. " * 3 for i in (3, 4, 5))


def test_pairs_come_again_where_a_file_has_fewer(given):
    rows = peers.read_pairs(given[3], 18, 64)
    assert [row["id"] for row in rows] == [str(i) for i in range(18)]
    assert rows[16]["chosen"] == rows[0]["chosen"]
    assert len(peers.read_pairs(given[3], 3, 4)) == 3  # all prompts have less than 8 characters


def test_a_checkpoint_of_another_size(given):
    made = trainer.changed(given[1], num_hidden_layers=1)
    assert load_config(made).num_hidden_layers == 1
    assert Chat(made).template == Chat(given[1]).template

"""bench/sampler.py on a tiny model: every part runs, and its figures are those of its runs."""

import json
from types import SimpleNamespace

import pytest
import torch
from bench_helpers import run_bench
from conftest import last_json, tiny_checkpoint, write_rows

from bench import peers, sampler
from ops import cpu


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> list:
    """A model whose sizes the compiled kernels take, and six requests."""
    folder = tmp_path_factory.mktemp("sampler")
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = tiny_checkpoint(folder / "model", max_position_embeddings=5000, **sizes)
    rows = [{"prompt": f"Say {i}.", "max_new_tokens": 3 + i} for i in range(6)]
    return ["--model", model, "--requests", write_rows(folder / "requests.jsonl", rows)]


def figures(given: list, part: str, tmp_path, *more) -> tuple[dict, str]:
    """(tables of a part, standard output)."""
    kept = tmp_path / "figures.json"
    flags = [*given, "--only", part, "--repeats", 2, "--json", kept, *more]
    code, out, errors = run_bench("sampler", flags)
    assert code == 0, errors
    tables = last_json(out)
    assert json.loads(kept.read_text())["figures"] == tables
    return tables, out


@pytest.mark.slow
def test_a_comparison_without_peers(given, tmp_path):
    tables, out = figures(given, "compare", tmp_path, "--rounds", 2)
    [row] = tables["compare"]
    assert row["sampler"] == "ours" and row["ours is"] == "1.00x"
    assert len(row["tokens/s"].split()) == 2
    assert out.count("6 slots, ") == 2


@pytest.mark.slow
def test_a_step_and_its_limit(given, tmp_path):
    if cpu.library(torch.bfloat16) is None:
        pytest.skip("needs a C compiler")
    tables, out = figures(given, "limit", tmp_path, "--slots", 4)
    assert "4 rows, " in out and "% of the limit" in out
    rows = {row["part"]: float(row["ms"]) for row in tables["limit"]}
    assert [*rows][:6] == [*sampler.PARTS_OF_A_STEP, "step"]
    parts = [rows[name] for name in sampler.PARTS_OF_A_STEP]
    assert sum(parts) == pytest.approx(rows["step"], rel=0.5)
    assert [name.split(" (")[0] for name in [*rows][6:]] == [
        "limit: matmuls alone",
        "limit: KV stream alone",
    ]


@pytest.mark.slow
@pytest.mark.ranks
def test_two_processes_write_the_same(given, tmp_path):
    tables, out = figures(given, "processes", tmp_path)
    assert "the same bytes" in out
    assert [row["processes"] for row in tables["processes"]] == [1, 2]


RUN = {
    "tokens": 33,
    "live_slots": 0.5,
    "peak_bytes": 3e6,
    "weights_and_cache_bytes": 2e6,
    "live_tokens": 1000,
    "slots": 6,
}


@pytest.fixture
def asked(monkeypatch) -> list:
    """(part, arguments) of every run, none of which takes place."""
    calls = []

    def run_part(command, part, arguments):
        assert command[1:] == ["-m", "bench.sampler"]
        calls.append((part, arguments))
        seconds = (arguments["count"] or 50) / 100
        return {**RUN, "seconds": seconds, "step": seconds, "attention": seconds / 2}

    def run_peer(python, part, arguments):
        assert python == "PYTHON" and arguments["batch"] == 7
        calls.append((part, arguments))
        return {"seconds": len(calls)}

    monkeypatch.setattr(sampler, "run_part", run_part)
    monkeypatch.setattr(sampler, "run_peer", run_peer)
    return calls


def options(given: list, **more) -> SimpleNamespace:
    sizes = {"slots": 0, "repeats": 2, "count": 0, "rounds": 2, "batch": 7}
    return SimpleNamespace(model=given[1], requests=given[3], **sizes, **more)


def test_ratios_to_the_peers(given, asked):
    tables = sampler.compare(options(given, transformers="PYTHON", vllm=""))
    tokens = sum(range(3, 9))
    assert [part for part, _ in asked] == ["ours", "transformers"] * 2
    assert tables["compare"] == [
        {"sampler": "ours", "tokens/s": f"{2 * tokens} {2 * tokens}", "ours is": "1.00x"},
        # 2 s and 4 s against our half second
        {"sampler": "transformers", "tokens/s": "16 8", "ours is": "6.00x"},
    ]


def test_growth(given, asked):
    tables = sampler.growth(options(given))
    counts = [(part, arguments["count"]) for part, arguments in asked]
    assert counts[:3] == [("ours", n) for n in (64, 256, 1024)]
    assert counts[3:] == [("context", n) for n in (256, 1024, 4096)]
    assert tables["requests"][0]["tokens/s"] == f"{33 / 0.64:.0f}"
    assert {row["over weights + KV cache"] for row in tables["requests"]} == {"1.50"}
    assert tables["context"][0]["attention ms"] == "1280.0"
    assert tables["context"][0]["ns per live token"] == "1280000"


def test_requests_come_again_where_a_file_has_fewer(given):
    rows = peers.read_requests(given[3], 8)
    assert [row["max_new_tokens"] for row in rows] == [3, 4, 5, 6, 7, 8, 3, 4]
    assert len(peers.read_requests(given[3])) == 6

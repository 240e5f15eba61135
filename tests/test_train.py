"""Training: what is scored, how a batch is cut up, one step against plain torch, processes, stopping and going on."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ROOT,
    last_json,
    llama_config,
    random_model,
    read_rows,
    run,
    tiny_checkpoint,
    write_rows,
)
from safetensors.torch import load_file

import model as model_file
import train
from data import Chat, Common, InputError, load_function, spent, write_text
from model import load
from train import (
    Example,
    TrainOptions,
    make_batches,
    make_sequence,
    plan,
    response_logps,
    schedule,
    sft,
    sft_objective,
)

FP32 = Common(dtype="float32")
ROWS = [
    {
        "id": f"r{i}",
        "prompt": "What comes after " + "and ".join(f"{j} " for j in range(i % 3 + 1)) + "?",
        "response": " ".join(str(j * i) for j in range(1 + 2 * i)),
    }
    for i in range(7)
]  # 2 to 40 tokens to score


def options(**changes) -> TrainOptions:
    return TrainOptions(**{"lr": 1e-3, "epochs": 2, "batch": 3, **changes})


def weights(directory) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def distance(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """The result of the options above in one process without a stop: what other ways must come to."""
    out = tmp_path_factory.mktemp("trained") / "out"
    sft(tiny, ROWS, out, options(), FP32)
    return out


def transformers_model(directory):
    from transformers import AutoModelForCausalLM  # slow to import, so only where it is needed

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


# ---- what is scored ----


def test_scored_tokens_are_the_response_and_its_end(tiny):
    chat, reference = Chat(tiny), transformers_model(tiny)
    sequences = [make_sequence(chat, row, row["response"], options()) for row in ROWS]
    for row, (ids, start) in zip(ROWS, sequences, strict=True):
        assert chat.text(ids[start:-1]) == row["response"] and ids[-1] == chat.end == 0
        assert ids[start - 1] == chat.tokenizer.token_to_id(
            "<|assistant|>"
        )  # the template is not scored
    model = train.shard(tiny, options(), FP32)
    for (ids, start), logps in zip(sequences, response_logps(model, sequences), strict=True):
        with torch.no_grad():
            all_logps = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = torch.stack([all_logps[p - 1, ids[p]] for p in range(start, len(ids))])
        assert logps.dtype == torch.float32
        torch.testing.assert_close(logps.detach(), expected, atol=1e-4, rtol=0)


def test_loss_on_prompt_scores_all_but_the_first_token(tiny):
    ids, start = make_sequence(
        Chat(tiny), ROWS[2], ROWS[2]["response"], options(loss_on_prompt=True)
    )
    assert start == 1 and Example("", [(ids, start)]).scored == len(ids) - 1
    assert ids == make_sequence(Chat(tiny), ROWS[2], ROWS[2]["response"], options())[0]


def test_max_length_cuts_the_end_and_leaves_out_long_prompts(tiny, tmp_path):
    chat, row = Chat(tiny), ROWS[6]
    ids, start = make_sequence(chat, row, row["response"], options())
    assert make_sequence(chat, row, row["response"], options(max_length=len(ids))) == (ids, start)
    assert make_sequence(chat, row, row["response"], options(max_length=start + 2)) == (
        ids[: start + 2],
        start,
    )
    assert make_sequence(chat, row, row["response"], options(max_length=start)) is None
    long = {"id": "long", "prompt": "x" * 100, "response": "y"}
    counts = sft(tiny, [*ROWS, long], tmp_path / "out", options(max_length=80, epochs=1), FP32)
    assert (counts["records"], counts["too_long"], counts["examples"], counts["steps"]) == (
        8,
        1,
        7,
        3,
    )
    with pytest.raises(InputError, match="--max-length 80"):
        sft(tiny, [long], tmp_path / "none", options(max_length=80), FP32)


# ---- how a batch is cut up ----


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_plan_deals_out_every_item_once_within_budget(ranks):
    rng = random.Random(ranks)
    for _ in range(100):
        sizes, budget = (
            [rng.randint(1, 60) for _ in range(rng.randint(1, 40))],
            rng.randint(20, 100),
        )
        rounds = plan(sizes, ranks, budget)
        assert {len(one) for one in rounds} == {ranks}
        micros = [micro for one in rounds for micro in one]
        assert sorted(i for micro in micros for i in micro) == list(range(len(sizes)))
        for micro in micros:
            assert sum(sizes[i] for i in micro) <= budget or len(micro) == 1
        # at half the budget on average a micro-batch could take any item that fits: no more rounds than that needs
        assert len(rounds) <= math.ceil(len(sizes) / ranks) or max(sizes) > budget
        assert (
            len(rounds) <= math.ceil(2 * sum(sizes) / (ranks * budget)) + 1
            or max(sizes) > budget / 2
        )


def test_plan_with_few_or_large_items():
    assert plan([5], 4, 100) == [[[0], [], [], []]]
    assert [1] in [micro for [micro] in plan([3, 9, 4], 1, 7)]  # 9 is over budget and alone
    assert plan([3, 6, 4], 1, 7) == [[[1]], [[2, 0]]]
    assert plan([10, 10], 2, 5) == [[[0], [1]]]


def test_batches_hold_every_example_once_an_epoch():
    batches = make_batches(range(7), options(epochs=3, batch=4), seed=0)
    assert [len(b) for b in batches] == [4, 4, 4, 4, 4, 1]
    order = [i for batch in batches for i in batch]
    epochs = [order[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    again, other = (
        make_batches(range(7), options(epochs=3, batch=4), seed=seed) for seed in (0, 1)
    )
    assert batches == again != other


def test_schedule_rises_then_falls_as_a_cosine():
    shares = [schedule(step, 100, 0.1) for step in range(100)]
    assert shares[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert shares[10] == 1 and shares[55] == pytest.approx(0.5)
    assert shares[10:] == sorted(shares[10:], reverse=True) and 0 < shares[99] < 1e-3
    assert [schedule(step, 2, 0) for step in range(2)] == pytest.approx([1, 0.5])
    assert schedule(0, 1, 0.1) == 1  # a single step is no warm-up to nothing


# ---- one step against plain torch ----


def test_steps_equal_plain_torch_on_a_transformers_model(tiny, trained):
    chat, reference = Chat(tiny), transformers_model(tiny)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3, weight_decay=0.0)
    lines = read_rows(trained / "metrics.jsonl")
    for step, (batch, line) in enumerate(
        zip(make_batches(range(7), options(), 0), lines, strict=True)
    ):
        nll, count = 0.0, 0
        for i in batch:  # one at a time, so that nothing can leak
            prompt, answer = chat.prompt_ids(ROWS[i]), [*chat.encode(ROWS[i]["response"]), 0]
            logits = reference(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            nll, count = (
                nll + F.cross_entropy(logits, torch.tensor(answer), reduction="sum"),
                count + len(answer),
            )
        (nll / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-3 * [1, 1, 0.85355339, 0.5, 0.14644661][step]
        optimizer.step()
        optimizer.zero_grad()
        assert line["loss"] == pytest.approx(
            (nll / count).item(), rel=1e-4
        )  # total nll / total tokens
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert norm > 1  # else clipping is not tested
    assert (
        distance(weights(trained), {name: p.detach() for name, p in reference.named_parameters()})
        < 2e-5
    )


def test_weight_decay_reaches_the_optimizer(tiny, trained, tmp_path):
    sft(tiny, ROWS, tmp_path / "out", options(weight_decay=10.0), FP32)
    norm = lambda out: sum(t.square().sum() for t in weights(out).values())  # noqa: E731
    assert norm(tmp_path / "out") < 0.97 * norm(trained)


@pytest.mark.parametrize("micro_tokens", [20, 60, 150])
def test_micro_batches_change_no_result(tiny, trained, tmp_path, micro_tokens):
    sft(tiny, ROWS, tmp_path / "out", options(micro_tokens=micro_tokens), FP32)
    assert distance(weights(tmp_path / "out"), weights(trained)) < 1e-5
    for a, b in zip(
        read_rows(tmp_path / "out" / "metrics.jsonl"),
        read_rows(trained / "metrics.jsonl"),
        strict=True,
    ):
        assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=1e-4)


def test_recompute_changes_no_result(tiny, trained, tmp_path, monkeypatch):
    calls, block = [], model_file.Block.block
    monkeypatch.setattr(
        model_file.Block, "block", lambda self, *args: calls.append(1) or block(self, *args)
    )
    sft(tiny, ROWS, tmp_path / "out", options(recompute=True), FP32)
    assert len(calls) == 2 * 2 * 5  # 2 layers, forward and again in the backward pass, 5 steps
    assert distance(weights(tmp_path / "out"), weights(trained)) < 1e-6


def test_bf16_computes_on_fp32_masters_that_move_at_lr_1e_6(tiny):
    o = options(lr=1e-6)
    model = train.shard(tiny, o, Common(dtype="bfloat16"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=o.lr, weight_decay=0.0)
    seen = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    chat, before = Chat(tiny), weights(tiny)
    batch = [Example(row["id"], [make_sequence(chat, row, row["response"], o)]) for row in ROWS]
    train.train_step(model, optimizer, batch, sft_objective, lambda example: example.scored, o)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    states = optimizer.state.values()
    assert {state[moment].dtype for state in states for moment in ("exp_avg", "exp_avg_sq")} == {
        torch.float32
    }
    moved = fp32 = bf16 = total = 0
    for name, parameter in model.named_parameters():
        if "layers" not in name:  # every weight of a layer has a gradient
            continue
        old, new = before[name], parameter.full_tensor().detach()
        step = (new - old).bfloat16()
        fp32, bf16 = (
            fp32 + (new != old).sum(),
            bf16 + (old.bfloat16() + step != old.bfloat16()).sum(),
        )
        moved, total = max(moved, (new - old).abs().max().item()), total + old.numel()
    assert fp32 > 0.95 * total and bf16 < 0.01 * total
    assert 0.5e-6 < moved < 1.5e-6


# ---- processes ----


def flags(model, data, out, *more) -> list:
    """The command for what `trained` is, in several micro-batches a step."""
    return [
        "train.py",
        "--model",
        model,
        "--data",
        data,
        "--out",
        out,
        "--dtype",
        "float32",
        "--lr",
        1e-3,
        "--epochs",
        2,
        "--batch",
        3,
        "--micro-tokens",
        60,
        *more,
    ]


@pytest.mark.parametrize("processes", [2, 4])
def test_many_processes_equal_one(tiny, trained, tmp_path, processes):
    """The command, end to end, with several steps of several micro-batches each."""
    out, data = tmp_path / "out", write_rows(tmp_path / "data.jsonl", ROWS)
    code, stdout, stderr = run(flags(tiny, data, out), nproc=processes)
    assert code == 0, stderr
    result = last_json(stdout)
    assert (result["records"], result["too_long"], result["examples"], result["steps"]) == (
        7,
        0,
        7,
        5,
    )
    assert result["tokens"] > 0 and result["seconds"] > 0 and 0 < result["share_of_peak"] < 1
    assert (
        0 < result["data_seconds"] < result["seconds"]
        and 0 < result["communication_seconds"] < result["seconds"]
    )
    assert distance(weights(out), weights(trained)) < 1e-5
    for a, b in zip(
        read_rows(out / "metrics.jsonl"), read_rows(trained / "metrics.jsonl"), strict=True
    ):
        assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=1e-4)
    # what two processes wrote, one process and transformers can read
    sft(out, ROWS, tmp_path / "again", options(epochs=1), FP32)
    again, last = (read_rows(d / "metrics.jsonl") for d in (tmp_path / "again", out))
    assert again[0]["loss"] < last[0]["loss"]
    chat, (ids, start) = (
        Chat(out),
        make_sequence(Chat(out), ROWS[3], ROWS[3]["response"], options()),
    )
    with torch.no_grad():
        logps = transformers_model(out)(torch.tensor([ids])).logits[0].log_softmax(-1)
    [ours] = response_logps(train.shard(out, options(), FP32), [(ids, start)])
    assert logps[range(start - 1, len(ids) - 1), ids[start:]].sum().item() == pytest.approx(
        ours.sum().item(), rel=1e-4
    )
    assert chat.template == Chat(tiny).template


def test_a_process_without_examples_changes_no_step(tiny, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", ROWS[:1])
    code, _, stderr = run(
        [
            "train.py",
            "--model",
            tiny,
            "--data",
            data,
            "--out",
            tmp_path / "two",
            "--dtype",
            "float32",
            "--lr",
            1e-3,
            "--epochs",
            1,
        ],
        nproc=2,
    )
    assert code == 0, stderr
    sft(tiny, ROWS[:1], tmp_path / "one", options(epochs=1), FP32)
    assert distance(weights(tmp_path / "one"), weights(tiny)) > 9e-4
    assert distance(weights(tmp_path / "one"), weights(tmp_path / "two")) < 1e-5
    [one], [two] = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert (one["loss"], one["grad_norm"]) == pytest.approx(
        (two["loss"], two["grad_norm"]), rel=1e-4
    )


DIES_AT_4 = """
import os
import sys
sys.path.insert(0, {root!r})
import data
import train
save = train.save_checkpoint

def save_and_die(*args):
    save(*args)
    if args[-1] == 4:
        data.gather(None)
        os._exit(1)

train.save_checkpoint = save_and_die
data.command(train.main, train.Options)
"""


def test_a_checkpoint_of_four_processes_is_read_by_two_and_by_one(tiny, trained, tmp_path):
    program, data = tmp_path / "dies.py", write_rows(tmp_path / "data.jsonl", ROWS)
    program.write_text(DIES_AT_4.format(root=str(ROOT)))
    begun, more = tmp_path / "begun", ("--checkpoint-every", 2)
    code, _, _ = run([program, *flags(tiny, data, begun, *more)[1:]], nproc=4)
    assert (
        code != 0
        and (begun / "checkpoint" / "4" / "done").is_file()
        and not (begun / "model.safetensors").exists()
    )
    assert len(list((begun / "checkpoint" / "4").glob("*.distcp"))) == 4
    for processes in (2, 1):
        out = tmp_path / f"by{processes}"
        shutil.copytree(begun, out)
        code, _, stderr = run(flags(tiny, data, out, *more), nproc=processes)
        assert code == 0, stderr
        assert distance(weights(out), weights(trained)) < 1e-5
        old, new = ((d / "metrics.jsonl").read_text().splitlines() for d in (begun, out))
        assert new[:4] == old and len(new) == 5  # the first four steps were not repeated


@pytest.fixture
def two_nodes():
    """Two network namespaces joined by a cable: prefixes of commands that run in either, and the address of the first."""
    names, ends = ("synpo-a", "synpo-b"), ("synpo-va", "synpo-vb")

    def ip(*words):
        return subprocess.run(["ip", *words], capture_output=True, text=True)

    try:
        made = [ip("netns", "add", name) for name in names]
        made.append(ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1]))
        if any(done.returncode for done in made):
            pytest.skip(f"needs the right to make network namespaces: {made[-1].stderr.strip()}")
        for i, (name, end) in enumerate(zip(names, ends, strict=True), 1):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", end)
            for device in (end, "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield [
            ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={end}"]
            for name, end in zip(names, ends, strict=True)
        ]
    except FileNotFoundError:
        pytest.skip("needs the command ip (iproute2)")
    finally:
        for name in names if shutil.which("ip") else ():
            ip("netns", "delete", name)


def test_two_nodes_meet_over_the_network_and_equal_one_process(tiny, trained, tmp_path, two_nodes):
    """torchrun's rendezvous and all collectives over a cable; sharded inside a node, replicated over both."""
    out, data = tmp_path / "out", write_rows(tmp_path / "data.jsonl", ROWS)
    _, *options = flags(tiny, data, out)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc-per-node",
        "2",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "10.77.0.1:29477",
    ]
    nodes = [
        subprocess.Popen(
            [
                *prefix,
                *torchrun,
                "--rdzv-conf",
                f"is_host={2 - i}",
                "--local-addr",
                f"10.77.0.{i}",
                str(ROOT / "train.py"),
                *map(str, options),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for i, prefix in enumerate(two_nodes, 1)
    ]
    results = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], (
        results[0][1][-3000:] + results[1][1][-3000:]
    )
    assert sum('"steps": 5' in stdout for stdout, _ in results) == 1  # rank 0 speaks for all
    assert distance(weights(out), weights(trained)) < 1e-5
    assert json.loads((out / "manifest.json").read_text())["processes"] == 4


# ---- memory ----


def test_foretold_memory_is_what_training_takes(tmp_path):
    """The dry run's fake tensors against two real processes, at a size where Python itself is no matter."""
    memory = load_function("bench/memory.py:child")
    args = SimpleNamespace(
        model=load_function("bench/memory.py:random_checkpoint")(str(tmp_path)),
        max_length=256,
        micro_tokens=512,
        prompt_tokens=1,
        dtype="bfloat16",
        device="cpu",
        recompute=True,
        node_gpus=8,
    )
    foretold, measured = (memory(what, args, 2) for what in ("foretell", "measure"))
    assert foretold["parts"]["parameters"] == pytest.approx(4 * 33.5e6 / 2, rel=0.01)
    assert foretold["parts"]["optimizer"] == pytest.approx(
        2 * foretold["parts"]["parameters"], rel=0.01
    )
    assert foretold["total"] == pytest.approx(measured["total"], rel=0.15)


def test_dry_run_of_a_model_that_is_not_there(tmp_path):
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
    write_text(tmp_path / "config.json", json.dumps(config))
    code, stdout, stderr = run(
        [
            "train.py",
            "--dry-run",
            8,
            "--model",
            tmp_path,
            "--data",
            "-",
            "--out",
            "-",
            "--recompute",
            "--micro-tokens",
            2048,
        ]
    )
    assert code == 0, stderr
    result = last_json(stdout)
    parts = result["parts"]
    weights = 2 * 128256 * 4096 + 2 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert parts["parameters"] == pytest.approx(4 * weights / 8, rel=0.01)
    assert parts["optimizer"] == pytest.approx(8 * weights / 8, rel=0.01)
    assert "together" in stdout and result["largest"] >= 2048 and result["largest"] % 2048 == 0


# ---- files ----


def test_result_is_saved_in_the_dtype_of_the_computation(tiny, tmp_path):
    sft(tiny, ROWS, tmp_path / "out", options(epochs=1), Common(dtype="bfloat16"))
    assert {t.dtype for t in weights(tmp_path / "out").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_metrics_lines(trained):
    lines = read_rows(trained / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["lr"] for line in lines] == pytest.approx(
        [1e-3 * schedule(i, 5, 0.1) for i in range(5)], rel=1e-5
    )
    assert all(
        line["tokens_per_second"] > 0 and line["memory_gb"] > 0 and line["seconds"] > 0
        for line in lines
    )


# ---- accounting ----


@pytest.mark.parametrize("tied", [True, False])
def test_flop_are_two_for_each_weight_of_a_matmul_and_token(tied):
    model = random_model(llama_config(tie_word_embeddings=tied))
    layers = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    assert model.flop(7, 3) == 2 * (7 * layers + 3 * model.head.weight.numel())


def test_share_of_peak_counts_three_forward_passes(tiny, tmp_path):
    common = Common(dtype="float32", peak_tflops=1e-3)
    sft(tiny, ROWS[:2], tmp_path / "out", options(epochs=1, recompute=True), common)
    [line] = read_rows(tmp_path / "out" / "metrics.jsonl")
    sequences = [make_sequence(Chat(tiny), row, row["response"], options()) for row in ROWS[:2]]
    flop = load(tiny, torch.float32).flop(
        sum(len(ids) for ids, _ in sequences), sum(len(ids) - n for ids, n in sequences)
    )
    assert line["share_of_peak"] * line["seconds"] * 1e9 == pytest.approx(3 * flop, rel=1e-4)


def test_collectives_of_fsdp_are_timed(tiny):
    model = train.shard(tiny, options(), FP32)
    for module in (model, *model.model.layers):
        [group] = module._get_fsdp_state()._fsdp_param_groups
        assert isinstance(group._all_gather_comm, train.TimedAllGather)
        assert isinstance(group._reduce_scatter_comm, train.TimedReduceScatter)
    before, values, out = spent["communicating"], torch.arange(3.0), torch.empty(3)
    train.TimedAllGather()(
        output_tensor=out, input_tensor=values, group=torch.distributed.group.WORLD
    )
    assert spent["communicating"] > before and torch.equal(out, values)


# ---- stopping and going on ----


class Stop(Exception):
    """As good as a kill: nothing in the code catches it."""


def failing_objective(calls: list, at: int, how=None):
    """sft_objective that fails at its at-th call; one call is one step here."""

    def objective(examples, logps):
        calls.append(1)
        loss, metrics = sft_objective(examples, logps)
        if len(calls) != at:
            return loss, metrics
        if how is None:
            raise Stop
        return how(loss), metrics

    return objective


@pytest.mark.parametrize(("torn", "steps_left"), [(False, 1), (True, 5)])
def test_resumed_run_equals_an_uninterrupted_one(
    tiny, trained, tmp_path, monkeypatch, torn, steps_left
):
    data = write_rows(tmp_path / "data.jsonl", ROWS)
    o = train.Options(
        model=str(tiny),
        data=str(data),
        out=str(tmp_path / "out"),
        dtype="float32",
        lr=1e-3,
        epochs=2,
        batch=3,
        checkpoint_every=2,
    )
    calls, checkpoint = [], tmp_path / "out" / "checkpoint"
    monkeypatch.setattr(train, "sft_objective", failing_objective(calls, 5))
    with pytest.raises(Stop):
        train.main(o)
    assert [d.name for d in checkpoint.iterdir()] == ["4"] and (checkpoint / "4" / "done").is_file()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    if torn:  # killed while it was writing
        (checkpoint / "4" / "done").unlink()
    calls.clear()
    monkeypatch.setattr(train, "sft_objective", failing_objective(calls, 0))
    counts = train.main(o)
    assert len(calls) == steps_left
    trained_now = (
        counts["tokens_per_second"] * counts["seconds"]
    )  # the rate is that of this call's steps
    assert (
        trained_now < counts["tokens"] / 2
        if steps_left == 1
        else trained_now > counts["tokens"] / 2
    )
    assert distance(weights(tmp_path / "out"), weights(trained)) == 0
    lines, expected = (
        read_rows(tmp_path / "out" / "metrics.jsonl"),
        read_rows(trained / "metrics.jsonl"),
    )
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected]
    assert not checkpoint.exists()
    assert train.main(o)["steps"] == 5 and len(calls) == steps_left  # done is done


def test_a_stop_between_logging_and_checkpoint_repeats_no_line(
    tiny, trained, tmp_path, monkeypatch
):
    save, out = train.save_checkpoint, tmp_path / "out"

    def dies_at_4(*args):
        if args[-1] == 4:
            raise Stop
        save(*args)

    monkeypatch.setattr(train, "save_checkpoint", dies_at_4)
    with pytest.raises(Stop):
        sft(tiny, ROWS, out, options(checkpoint_every=2), FP32)
    assert len(read_rows(out / "metrics.jsonl")) == 4
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # half a line
    monkeypatch.undo()
    sft(tiny, ROWS, out, options(checkpoint_every=2), FP32)
    assert [line["step"] for line in read_rows(out / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert distance(weights(out), weights(trained)) == 0


@pytest.mark.parametrize(
    "how",
    [lambda loss: loss * math.nan, lambda loss: loss + (loss - loss.detach()).sqrt()],
    ids=["loss", "gradient"],
)
def test_what_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    tiny, tmp_path, monkeypatch, how
):
    monkeypatch.setattr(train, "sft_objective", failing_objective([], 3, how))
    with pytest.raises(
        InputError,
        match=r"step 3 \(records r\d r\d r\d; last good checkpoint: \S+checkpoint/2\); lower --lr",
    ):
        sft(tiny, ROWS, tmp_path / "out", options(checkpoint_every=1), FP32)
    assert (tmp_path / "out" / "checkpoint" / "2" / "done").is_file()
    assert len(read_rows(tmp_path / "out" / "metrics.jsonl")) == 2
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_training_learns_its_data(tmp_path):
    model = tiny_checkpoint(tmp_path / "model", std=0.05)
    sft(model, ROWS[:2], tmp_path / "out", options(epochs=40, lr=1e-2), FP32)
    losses = [line["loss"] for line in read_rows(tmp_path / "out" / "metrics.jsonl")]
    assert losses[0] > 4 and losses[-1] < 0.1

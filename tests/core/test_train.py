"""Training: what is scored, how a batch is cut up, one step against plain torch, several processes,
stopping and resuming.
"""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ROOT,
    flip_a_bit,
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
from checkpoint import load_config
from formats.chat import Chat
from ops.meters import forward_flop
from ops.micro_batches import pack_micro_batches
from plumbing.files import InputError
from plumbing.options import RunOptions
from plumbing.stage import counts_of
from train import (
    Example,
    TrainOptions,
    finetune,
    lr_schedule,
    make_batches,
    make_sequence,
    response_logps,
    sft_loss,
    train_step,
)

FP32 = RunOptions(dtype="float32")


def make_row(i: int) -> dict:
    """Its response has 2 to 40 tokens to score."""
    asked = "and ".join(f"{j} " for j in range(i % 3 + 1))
    response = " ".join(str(j * i) for j in range(1 + 2 * i))
    return {"id": f"r{i}", "prompt": f"What comes after {asked}?", "response": response}


ROWS = [make_row(i) for i in range(7)]


def options(**changes) -> TrainOptions:
    return TrainOptions(**{"run": FP32, "lr": 1e-3, "epochs": 2, "batch": 3, **changes})


def tune(model, out, rows=ROWS, **changes) -> dict:
    """Run the stage on a file of rows; returns its counts."""
    data = write_rows(out.with_name(f"data of {out.name}.jsonl"), rows)
    finetune(model, data, out, options(**changes))
    return counts_of(out)


def weights(directory) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def distance(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    gaps = []
    for name in a:
        gaps.append((a[name].float() - b[name].float()).abs().max())
    return max(gaps).item()


def metrics(directory) -> list[dict]:
    return read_rows(directory / "metrics.jsonl")


def assert_same_steps(a, b) -> None:
    """Loss and gradient norm of every step of two directories, up to rounding."""
    for one, other in zip(metrics(a), metrics(b), strict=True):
        for name in ("loss", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4)


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """The result of the options above in one process without a stop: what other ways must come
    to.
    """
    out = tmp_path_factory.mktemp("trained") / "out"
    tune(tiny, out)
    return out


def transformers_model(directory):
    from transformers import AutoModelForCausalLM  # slow to import, so only where it is needed

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


# ---------------------------------------------------------------------------------- what is scored


@pytest.mark.slow
def test_scored_tokens_are_the_response_and_its_end(tiny):
    chat = Chat(tiny)
    reference = transformers_model(tiny)
    sequences = [make_sequence(chat, row, row["response"], options()) for row in ROWS]
    for row, (ids, start) in zip(ROWS, sequences, strict=True):
        assert chat.text(ids[start:-1]) == row["response"]
        assert ids[-1] == chat.end == 0
        # the template is not scored
        assert ids[start - 1] == chat.tokenizer.token_to_id("<|assistant|>")
    model = train.shard(tiny, options())
    for (ids, start), logps in zip(sequences, response_logps(model, sequences), strict=True):
        with torch.no_grad():
            all_logps = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = []
        for p in range(start, len(ids)):
            expected.append(all_logps[p - 1, ids[p]].item())
        assert logps.dtype == torch.float32
        assert logps.tolist() == pytest.approx(expected, abs=1e-3, rel=0)


def test_loss_on_prompt_scores_all_but_the_first_token(tiny, tmp_path, monkeypatch):
    row = ROWS[2]
    ids, start = make_sequence(Chat(tiny), row, row["response"], options(loss_on_prompt=True))
    assert start == 1
    usual = make_sequence(Chat(tiny), row, row["response"], options())
    assert ids == usual[0]

    # the loss is a mean over as many tokens as are scored
    weighed = []

    def fit(model, examples, *_):
        weighed.extend(example.weight for example in examples)
        return {}

    monkeypatch.setattr(train, "fit", fit)
    for on_prompt in (True, False):
        stage = SimpleNamespace(out=tmp_path)
        train.sft(tiny, [row], stage, options(loss_on_prompt=on_prompt))
    assert weighed == [len(ids) - 1, len(ids) - usual[1]]


def test_max_length_cuts_the_end_and_leaves_out_long_prompts(tiny, tmp_path):
    chat = Chat(tiny)
    row = ROWS[6]

    def cut(**changes):
        return make_sequence(chat, row, row["response"], options(**changes))

    ids, start = cut()
    assert cut(max_length=len(ids)) == (ids, start)
    assert cut(max_length=start + 2) == (ids[: start + 2], start)
    assert cut(max_length=start) is None
    chat.max_positions = start + 2  # a model with fewer positions than --max-length
    assert cut() == (ids[: start + 2], start)

    # the stage counts what does not fit, and says so if nothing does
    long = {"id": "long", "prompt": "x" * 100, "response": "y"}
    counts = tune(tiny, tmp_path / "out", [*ROWS, long], max_length=80, epochs=1)
    assert (counts["records"], counts["too_long"], counts["truncated"]) == (8, 1, 0)
    assert (counts["examples"], counts["steps"]) == (7, 3)
    with pytest.raises(InputError, match=r"none: .*--max-length 80; raise it"):
        tune(tiny, tmp_path / "none", [long], max_length=80)


# -------------------------------------------------------------------------- how a batch is cut up


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_item_is_packed_once_within_budget(ranks):
    rng = random.Random(ranks)
    for _ in range(100):
        sizes = [rng.randint(1, 60) for _ in range(rng.randint(1, 40))]
        budget = rng.randint(20, 100)
        rounds = pack_micro_batches(sizes, ranks, budget)
        assert {len(one) for one in rounds} == {ranks}
        micros = [micro for one in rounds for micro in one]
        assert sorted(i for micro in micros for i in micro) == list(range(len(sizes)))
        for micro in micros:
            assert sum(sizes[i] for i in micro) <= budget or len(micro) == 1
        # at half the budget on average a micro-batch could take any item that fits: no more rounds
        # than that needs
        one_each = math.ceil(len(sizes) / ranks)
        assert len(rounds) <= one_each or max(sizes) > budget
        half_full = math.ceil(2 * sum(sizes) / (ranks * budget)) + 1
        assert len(rounds) <= half_full or max(sizes) > budget / 2


def test_packing_few_or_large_items():
    packed = pack_micro_batches([5], 4, 100)
    assert packed == [[[0], [], [], []]]
    packed = pack_micro_batches([3, 9, 4], 1, 7)
    assert [[1]] in packed  # 9 is over budget and alone
    packed = pack_micro_batches([3, 6, 4], 1, 7)
    assert packed == [[[1]], [[2, 0]]]
    packed = pack_micro_batches([10, 10], 2, 5)
    assert packed == [[[0], [1]]]


def test_batches_hold_every_example_once_an_epoch():
    def batches(seed: int) -> list[list]:
        run = RunOptions(seed=seed)
        return make_batches(range(7), options(run=run, epochs=3, batch=4))

    assert [len(batch) for batch in batches(0)] == [4, 4, 4, 4, 4, 1]
    order = [i for batch in batches(0) for i in batch]
    epochs = [order[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert batches(0) == batches(0)
    assert batches(0) != batches(1)


def test_learning_rate_rises_then_falls_as_a_cosine():
    shares = [lr_schedule(step, 100, 0.1) for step in range(100)]
    assert shares[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert shares[10] == 1
    assert shares[55] == pytest.approx(0.5)
    assert shares[10:] == sorted(shares[10:], reverse=True)
    assert 0 < shares[99] < 1e-3
    assert [lr_schedule(step, 2, 0) for step in range(2)] == pytest.approx([1, 0.5])
    assert lr_schedule(0, 1, 0.1) == 1  # a single step is no warm-up to nothing


# -------------------------------------------------------------------- one step against plain torch


@pytest.mark.slow
def test_steps_equal_plain_torch_on_a_transformers_model(tiny, trained):
    chat = Chat(tiny)
    reference = transformers_model(tiny)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3, weight_decay=0.0)
    shares = [1, 1, 0.85355339, 0.5, 0.14644661]
    batches = make_batches(range(7), options())
    for share, batch, line in zip(shares, batches, metrics(trained), strict=True):
        nll = 0.0
        count = 0
        for i in batch:  # one at a time, so that nothing can leak
            prompt = chat.prompt_ids(ROWS[i])
            response = [*chat.encode(ROWS[i]["response"]), 0]
            logits = reference(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            nll = nll + F.cross_entropy(logits, torch.tensor(response), reduction="sum")
            count += len(response)
        (nll / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-3 * share
        optimizer.step()
        optimizer.zero_grad()
        assert line["loss"] == pytest.approx((nll / count).item(), rel=1e-4)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert norm > 1  # else clipping is not tested
    expected = {name: p.detach() for name, p in reference.named_parameters()}
    assert distance(weights(trained), expected) < 1e-4  # a tenth of a step


def test_a_norm_of_0_clips_nothing(tiny, tmp_path):
    for name, norm in (("off", 0), ("large", 1e6), ("small", 1e-3)):
        tune(tiny, tmp_path / name, max_grad_norm=norm)
    off, large, small = (weights(tmp_path / name) for name in ("off", "large", "small"))
    assert distance(off, large) == 0
    assert distance(off, small) > 0


def test_weight_decay_reaches_the_optimizer(tiny, trained, tmp_path):
    def norm(out) -> torch.Tensor:
        return sum(t.square().sum() for t in weights(out).values())

    tune(tiny, tmp_path / "out", weight_decay=10.0)
    assert norm(tmp_path / "out") < 0.97 * norm(trained)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch_tokens", [20, 60, 150])
def test_micro_batches_change_no_result(tiny, trained, tmp_path, micro_batch_tokens):
    tune(tiny, tmp_path / "out", micro_batch_tokens=micro_batch_tokens)
    assert distance(weights(tmp_path / "out"), weights(trained)) < 1e-5
    assert_same_steps(tmp_path / "out", trained)


@pytest.mark.slow
def test_activation_checkpointing_changes_no_result(tiny, trained, tmp_path, monkeypatch):
    calls = []
    block = model_file.Block.block

    def counted(self, *args):
        calls.append(1)
        return block(self, *args)

    monkeypatch.setattr(model_file.Block, "block", counted)
    tune(tiny, tmp_path / "out", activation_checkpointing=True)
    assert len(calls) == 2 * 2 * 5  # 2 layers, forward and again in the backward pass, 5 steps
    assert distance(weights(tmp_path / "out"), weights(trained)) < 1e-5


def test_bf16_computes_on_fp32_masters_that_move_at_lr_1e_6(tiny):
    o = options(lr=1e-6, run=RunOptions(dtype="bfloat16"))
    model = train.shard(tiny, o)
    optimizer = torch.optim.AdamW(model.parameters(), lr=o.lr, weight_decay=0.0)
    seen = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    chat = Chat(tiny)
    before = weights(tiny)
    batch = []
    for row in ROWS:
        ids, start = make_sequence(chat, row, row["response"], o)
        batch.append(Example(row["id"], [(ids, start)], weight=len(ids) - start))
    train_step(model, optimizer, batch, o.lr, sft_loss, o)

    # bf16 between the layers, fp32 in all that is kept
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for state in optimizer.state.values():
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32

    # nearly every weight of a layer, which all have a gradient, moves; as bf16 nearly none would
    moved = []
    would_move = []
    for name, parameter in model.named_parameters():
        if "layers" in name:
            old = before[name]
            change = parameter.full_tensor().detach() - old
            moved.append(change.flatten())
            rounded = old.bfloat16() + change.bfloat16()
            would_move.append((rounded != old.bfloat16()).flatten().float())
    moved = torch.cat(moved)
    assert (moved != 0).float().mean() > 0.95
    assert torch.cat(would_move).mean() < 0.01
    assert 0.5e-6 < moved.abs().max() < 1.5e-6


# --------------------------------------------------------------------------------------- processes


def flags(model, data, out, *more) -> list:
    """The command for what `trained` is, in several micro-batches a step."""
    common = "--dtype float32 --lr 1e-3 --epochs 2 --batch 3 --micro-batch-tokens 60"
    files = ["--model", model, "--data", data, "--out", out]
    return ["train.py", *files, *common.split(), *more]


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("processes", [2, 4])
def test_many_processes_equal_one(tiny, trained, tmp_path, processes):
    """The command, end to end, with several steps of several micro-batches each."""
    out = tmp_path / "out"
    data = write_rows(tmp_path / "data.jsonl", ROWS)
    code, stdout, stderr = run(flags(tiny, data, out), nproc=processes)
    assert code == 0, stderr
    result = last_json(stdout)
    assert (result["records"], result["too_long"]) == (7, 0)
    assert (result["examples"], result["steps"]) == (7, 5)
    assert result["tokens"] > 0
    assert result["tokens_per_second"] > 0
    assert result["seconds"] > 0
    assert distance(weights(out), weights(trained)) < 1e-5
    assert_same_steps(out, trained)

    # what several processes wrote, one process can read
    tune(out, tmp_path / "again", epochs=1)
    assert metrics(tmp_path / "again")[0]["loss"] < metrics(out)[0]["loss"]
    assert Chat(out).template == Chat(tiny).template

    # and so can transformers
    sequence = make_sequence(Chat(out), ROWS[3], ROWS[3]["response"], options())
    ids, start = sequence
    with torch.no_grad():
        logps = transformers_model(out)(torch.tensor([ids])).logits[0].log_softmax(-1)
    [ours] = response_logps(train.shard(out, options()), [sequence])
    theirs = logps[range(start - 1, len(ids) - 1), ids[start:]].sum()
    assert theirs.item() == pytest.approx(ours.sum().item(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.ranks
def test_a_process_without_examples_changes_no_step(tiny, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", ROWS[:1])
    out = tmp_path / "two"
    code, _, stderr = run([*flags(tiny, data, out), "--epochs", 1], nproc=2)
    assert code == 0, stderr
    tune(tiny, tmp_path / "one", ROWS[:1], epochs=1)
    assert distance(weights(tmp_path / "one"), weights(tiny)) > 9e-4
    assert distance(weights(tmp_path / "one"), weights(out)) < 1e-5
    assert len(metrics(out)) == 1
    assert_same_steps(tmp_path / "one", out)


DIES_AT_4 = """
import os
import sys
sys.path.insert(0, {root!r})
import train
save = train.save_checkpoint

def save_and_die(*args):
    save(*args)
    if args[-1] == 4:
        train.gather(None)
        os._exit(1)

train.save_checkpoint = save_and_die
train.cli(train.finetune)
"""


@pytest.mark.slow
@pytest.mark.ranks
def test_a_checkpoint_of_four_processes_is_read_by_two_and_by_one(tiny, trained, tmp_path):
    program = tmp_path / "dies.py"
    program.write_text(DIES_AT_4.format(root=str(ROOT)))
    data = write_rows(tmp_path / "data.jsonl", ROWS)
    begun = tmp_path / "begun"
    scratch = tmp_path / "begun.partial"
    more = ("--save-every", 2)
    code, _, _ = run([program, *flags(tiny, data, begun, *more)[1:]], nproc=4)
    assert code != 0
    assert (scratch / "checkpoint" / "4" / "done").is_file()
    assert len(list((scratch / "checkpoint" / "4").glob("*.distcp"))) == 4
    assert not (begun / "model.safetensors").exists()
    for processes in (2, 1):
        out = tmp_path / f"by{processes}"
        shutil.copytree(scratch, tmp_path / f"by{processes}.partial")
        code, _, stderr = run(flags(tiny, data, out, *more), nproc=processes)
        assert code == 0, stderr
        assert distance(weights(out), weights(trained)) < 1e-5
        # the first four steps were not repeated
        old = (scratch / "metrics.jsonl").read_text().splitlines()
        new = (out / "metrics.jsonl").read_text().splitlines()
        assert new[:4] == old
        assert len(new) == 5


NODES = ("synpo-a", "synpo-b")
CABLE = ("synpo-va", "synpo-vb")


def ip(*words) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *words], capture_output=True, text=True)


@pytest.fixture
def two_nodes():
    """Two network namespaces joined by a cable: prefixes of commands that run in either."""
    try:
        made = [ip("netns", "add", name) for name in NODES]
        made.append(ip("link", "add", CABLE[0], "type", "veth", "peer", "name", CABLE[1]))
        if any(done.returncode for done in made):
            reason = made[-1].stderr.strip()
            pytest.skip(f"needs the right to make network namespaces: {reason}")
        for i, (name, end) in enumerate(zip(NODES, CABLE, strict=True), 1):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", end)
            for device in (end, "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield [
            ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={end}"]
            for name, end in zip(NODES, CABLE, strict=True)
        ]
    except FileNotFoundError:
        pytest.skip("needs the command ip (iproute2)")
    finally:
        for name in NODES if shutil.which("ip") else ():
            ip("netns", "delete", name)


@pytest.mark.slow
@pytest.mark.ranks
def test_two_nodes_meet_over_the_network_and_equal_one_process(tiny, trained, tmp_path, two_nodes):
    """torchrun's rendezvous and all collectives over a cable; sharded inside a node, replicated
    over both.
    """
    out = tmp_path / "out"
    data = write_rows(tmp_path / "data.jsonl", ROWS)
    command = [str(ROOT / "train.py"), *map(str, flags(tiny, data, out)[1:])]
    torchrun = [sys.executable, *"-m torch.distributed.run --nnodes 2 --nproc-per-node 2".split()]
    torchrun += "--rdzv-backend c10d --rdzv-endpoint 10.77.0.1:29477".split()
    nodes = []
    for i, prefix in enumerate(two_nodes, 1):
        own = ["--rdzv-conf", f"is_host={2 - i}", "--local-addr", f"10.77.0.{i}"]
        node = subprocess.Popen(
            [*prefix, *torchrun, *own, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        nodes.append(node)
    results = [node.communicate(timeout=300) for node in nodes]
    errors = "".join(stderr[-3000:] for _, stderr in results)
    assert [node.returncode for node in nodes] == [0, 0], errors
    assert sum('"steps": 5' in stdout for stdout, _ in results) == 1  # rank 0 speaks for all
    assert distance(weights(out), weights(trained)) < 1e-5
    assert json.loads((out / "manifest.json").read_text())["processes"] == 4


# ----------------------------------------------------------------------------------- files, metrics


def test_result_is_saved_in_the_dtype_of_the_computation(tiny, tmp_path):
    tune(tiny, tmp_path / "out", epochs=1, run=RunOptions(dtype="bfloat16"))
    assert {t.dtype for t in weights(tmp_path / "out").values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"


def test_metrics_lines(trained):
    lines = metrics(trained)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    rates = [1e-3 * lr_schedule(i, 5, 0.1) for i in range(5)]
    assert [line["lr"] for line in lines] == pytest.approx(rates, rel=1e-5)
    for line in lines:
        assert line["tokens_per_second"] > 0
        assert line["memory_gb"] > 0
        assert line["seconds"] > 0


@pytest.mark.parametrize("tied", [True, False])
def test_flop_are_two_for_each_weight_of_a_matmul_and_token(tied):
    model = random_model(llama_config(tie_word_embeddings=tied))
    layers = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    head = model.head.weight.numel()
    assert forward_flop(model.config, 7, 3) == 2 * (7 * layers + 3 * head)


def test_mfu_counts_three_forward_passes(tiny, tmp_path):
    run = RunOptions(dtype="float32", peak_tflops=1e-3)
    tune(tiny, tmp_path / "out", ROWS[:2], epochs=1, activation_checkpointing=True, run=run)
    [line] = metrics(tmp_path / "out")
    chat = Chat(tiny)
    sequences = [make_sequence(chat, row, row["response"], options()) for row in ROWS[:2]]
    tokens = sum(len(ids) for ids, _ in sequences)
    scored = sum(len(ids) - start for ids, start in sequences)
    flop = forward_flop(load_config(tiny), tokens, scored)
    assert line["mfu"] * line["seconds"] * 1e9 == pytest.approx(3 * flop, rel=1e-4)


# --------------------------------------------------------------------------- stopping and resuming


class Stop(Exception):
    """As good as a kill: nothing in the code catches it."""


def failing_loss(calls: list, at: int, how=None):
    """sft_loss that fails at its at-th call; one call is one step here."""

    def loss_fn(examples, logps):
        calls.append(1)
        loss, more = sft_loss(examples, logps)
        if len(calls) != at:
            return loss, more
        if how is None:
            raise Stop
        return how(loss), more

    return loss_fn


@pytest.mark.slow
@pytest.mark.parametrize(
    ("harm", "name", "steps_left"),
    [
        (Path.exists, "done", 1),
        (Path.unlink, "done", 5),  # killed while it was writing
        (flip_a_bit, "done", 5),
        (flip_a_bit, "__0_0.distcp", 5),
        (Path.unlink, "__0_0.distcp", 5),
        (Path.touch, "__1_0.distcp", 5),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    tiny, trained, tmp_path, monkeypatch, harm, name, steps_left
):
    """To the last bit: the same computation on the same CPU, in the same process."""
    out = tmp_path / "out"
    checkpoint = tmp_path / "out.partial" / "checkpoint"
    calls = []
    monkeypatch.setattr(train, "sft_loss", failing_loss(calls, 5))
    with pytest.raises(Stop):
        tune(tiny, out, save_every=2)
    assert [folder.name for folder in checkpoint.iterdir()] == ["4"]
    assert (checkpoint / "4" / "done").is_file()
    assert not (out / "model.safetensors").exists()
    harm(checkpoint / "4" / name)

    # resumed
    calls.clear()
    monkeypatch.setattr(train, "sft_loss", failing_loss(calls, 0))
    counts = tune(tiny, out, save_every=2)
    assert len(calls) == steps_left
    # the rate is that of this call's steps
    trained_now = counts["tokens_per_second"] * counts["seconds"]
    assert (trained_now < counts["tokens"] / 2) == (steps_left == 1)
    assert distance(weights(out), weights(trained)) == 0
    assert [line["step"] for line in metrics(out)] == [1, 2, 3, 4, 5]
    losses = [line["loss"] for line in metrics(trained)]
    assert [line["loss"] for line in metrics(out)] == losses
    assert not checkpoint.exists()

    # done is done
    assert tune(tiny, out, save_every=2)["steps"] == 5
    assert len(calls) == steps_left


@pytest.mark.slow
def test_a_stop_between_logging_and_checkpoint_repeats_no_line(
    tiny, trained, tmp_path, monkeypatch
):
    save = train.save_checkpoint
    out = tmp_path / "out"
    logged = tmp_path / "out.partial" / "metrics.jsonl"

    def dies_at_4(*args):
        if args[-1] == 4:
            raise Stop
        save(*args)

    monkeypatch.setattr(train, "save_checkpoint", dies_at_4)
    with pytest.raises(Stop):
        tune(tiny, out, save_every=2)
    assert len(read_rows(logged)) == 4
    with open(logged, "a") as file:
        file.write('{"step": 5, "lo')  # half a line
    monkeypatch.undo()
    tune(tiny, out, save_every=2)
    assert [line["step"] for line in metrics(out)] == [1, 2, 3, 4, 5]
    assert distance(weights(out), weights(trained)) == 0


@pytest.mark.parametrize(
    "how",
    [
        lambda loss: loss * math.nan,
        lambda loss: loss + (loss - loss.detach()).sqrt(),
    ],
    ids=["loss", "gradient"],
)
def test_what_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    tiny, tmp_path, monkeypatch, how
):
    monkeypatch.setattr(train, "sft_loss", failing_loss([], 3, how))
    where = r"at step 3 \(records r\d r\d r\d\)"
    with pytest.raises(InputError, match=rf"out: .*{where}; use a lower --lr"):
        tune(tiny, tmp_path / "out", save_every=1)
    scratch = tmp_path / "out.partial"
    assert (scratch / "checkpoint" / "2" / "done").is_file()
    assert len(read_rows(scratch / "metrics.jsonl")) == 2
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.slow
def test_training_learns_its_data(tmp_path):
    model = tiny_checkpoint(tmp_path / "model", std=0.05)
    tune(model, tmp_path / "out", ROWS[:2], epochs=40, lr=1e-2)
    losses = [line["loss"] for line in metrics(tmp_path / "out")]
    assert losses[0] > 4
    assert losses[-1] < 0.1


def test_a_template_given_by_an_option_is_saved(tmp_path):
    model = tiny_checkpoint(tmp_path / "model", template=None)
    given = RunOptions(dtype="float32", chat_template="default")
    tune(model, tmp_path / "out", ROWS[:2], run=given, epochs=1)
    assert Chat(tmp_path / "out").template == Chat(model, given).template

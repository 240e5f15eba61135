"""eval/harness.py and eval/leaderboard.py: against plain forward passes, and against lm_eval's own model for transformers."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    last_json,
    read_rows,
    run,
    random_model,
    llama_config,
    tiny_checkpoint,
    tokenizer_json,
    write_rows,
)

import eval.harness as harness
from data import Chat, Common, InputError, rng
from eval import leaderboard
from eval.harness import SHARE, Tree, Until, common, cut, generation, score
from eval.optional import optional
from model import Packed, load
from sample import Engine, Request, SampleOptions
from train import response_logps

FP32 = Common(dtype="float32")
WORDS = "the sampler writes answers of a list prompts some rows at time finished takes next once trainer reads again".split()


def text(seed, words: int) -> str:
    r = rng("words", seed)
    return " ".join(r.choice(WORDS) for _ in range(words))


def sequences(seed: int, count: int = 12) -> list[list[int]]:
    """Random token ids that share beginnings of many lengths, in no order."""
    r = random.Random(seed)
    made = [[r.randrange(3, 300) for _ in range(r.randrange(1, 60))]]
    while len(made) < count:
        start = r.choice(made)
        made.append(
            start[: r.randrange(len(start) + 1)]
            + [r.randrange(3, 300) for _ in range(r.randrange(1, 40))]
        )
    return made


# ---- log-probs: a tree is the same as each sequence alone ----


def alone(model, pairs) -> list[tuple[float, bool]]:
    """Each pair in a forward pass of its own."""
    results = []
    for ids, targets in pairs:
        rows = torch.arange(len(ids) - len(targets), len(ids))
        logps = model(torch.tensor(ids), Packed([len(ids)]), rows).float().log_softmax(-1)
        results.append(
            (float(logps[range(len(targets)), targets].sum()), logps.argmax(-1).tolist() == targets)
        )
    return results


@pytest.mark.parametrize("window", [None, 7, 40])
@pytest.mark.parametrize("seed", [0, 1, 2])
@torch.inference_mode()
def test_shared_beginnings_change_no_log_prob(seed, window):
    arch = {"architectures": ["MistralForCausalLM"], "sliding_window": window} if window else {}
    model, r = random_model(llama_config(**arch), seed, std=0.1), random.Random(seed)
    pairs = []
    for ids in sequences(seed):
        n = r.randrange(1, len(ids) + 1)
        targets = [*ids[len(ids) - n + 1 :], r.randrange(320)]
        pairs += [(ids, targets), (ids, [*targets[:-1], 5])]  # one more that reads the same
    pairs.sort()
    assert all(
        abs(a[0] - b[0]) < 1e-3 and a[1] == b[1]
        for a, b in zip(score(model, pairs), alone(model, pairs), strict=True)
    )


@torch.inference_mode()
def test_the_likeliest_tokens_are_seen_as_such():
    model, ids = random_model(llama_config(), 0, std=0.1), sequences(3)[0]
    best = model(torch.tensor(ids), Packed([len(ids)]), torch.arange(len(ids))).argmax(-1).tolist()
    pairs = sorted([(ids, best[-3:]), (ids, best[-1:]), (ids, [best[-2], (best[-1] + 1) % 320])])
    assert {
        (len(targets), hit)
        for (_, targets), (_, hit) in zip(pairs, score(model, pairs), strict=True)
    } == {(3, True), (1, True), (2, False)}


def test_scoring_agrees_with_the_trainers(tiny):
    model = load(tiny, torch.float32)
    pairs = sorted((ids, [*ids[1:], 7]) for ids in sequences(4) if len(ids) > 1)
    wanted = [
        float(logps.sum())
        for logps in response_logps(model, [([*ids, targets[-1]], 1) for ids, targets in pairs])
    ]
    assert [logp for logp, _ in score(model, pairs)] == pytest.approx(wanted, abs=1e-3)


def test_more_rows_than_a_chunk_of_logits(tiny, monkeypatch):
    model, pairs = load(tiny, torch.float32), sorted((ids, [*ids[1:], 7]) for ids in sequences(5))
    whole = score(model, pairs)
    monkeypatch.setattr(harness, "CHUNK", 7)
    assert [logp for logp, _ in score(model, pairs)] == pytest.approx(
        [logp for logp, _ in whole], abs=1e-4
    )


def test_a_shared_token_is_computed_once():
    start = list(range(100, 140))
    tree = Tree([[*start, 1, 2], [*start, 1, 3], [*start, 2]], None)
    assert len(tree.tokens) == 42 + 1 + 1 and tree.tokens.tolist() == [*start, 1, 2, 3, 2]
    assert tree.positions.tolist() == [*range(42), 41, 40]
    assert [tree.tokens[path].tolist() for path in tree.paths] == [
        [*start, 1, 2],
        [*start, 1, 3],
        [*start, 2],
    ]
    short = Tree(
        [[*start[: SHARE - 1], 1], [*start[: SHARE - 1], 2]], None
    )  # not worth an attention of its own
    assert len(short.tokens) == 2 * SHARE and not short.lengths


def test_flash_attention_is_asked_for_the_same(tiny, monkeypatch):
    """By a stand-in with the documented meaning: causal masks and windows are aligned to the last query and key."""

    def varlen(q, k, v, starts_q, starts_k, longest_q, longest_k, causal, window_size):
        outputs = []
        assert causal and starts_q.dtype == starts_k.dtype == torch.int32
        assert longest_q == int(starts_q.diff().max()) and longest_k == int(starts_k.diff().max())
        for a, b, c, d in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
            q1, k1, v1 = q[a:b].transpose(0, 1), k[c:d].transpose(0, 1), v[c:d].transpose(0, 1)
            query = torch.arange(d - c - (b - a), d - c)[:, None]
            key = torch.arange(d - c)
            seen = (key <= query) & ((key >= query - window_size[0]) | (window_size[0] < 0))
            outputs.append(
                torch.nn.functional.scaled_dot_product_attention(
                    q1[None], k1[None], v1[None], attn_mask=seen, enable_gqa=True
                )[0].transpose(0, 1)
            )
        return torch.cat(outputs)

    for window in (None, 20):
        raw = llama_config(architectures=["MistralForCausalLM"], sliding_window=window)
        model, pairs = random_model(raw, 0, std=0.1), sorted((ids, [5]) for ids in sequences(6))
        plain = score(model, pairs)
        with monkeypatch.context() as patch:
            patch.setattr(harness, "use_flash", lambda x: True)
            patch.setattr(harness, "flash_attn_varlen_func", varlen)
            assert [logp for logp, _ in score(model, pairs)] == pytest.approx(
                [logp for logp, _ in plain], abs=1e-4
            )


@pytest.mark.parametrize("budget", [1, 50, 300, 10_000])
def test_micro_batches_hold_every_request_once_and_about_the_budget(budget):
    pairs = [(ids, [i]) for i, ids in enumerate(sequences(7, 40) * 2)]
    batches = cut(pairs, budget)
    assert Counter(i for batch in batches for i in batch) == Counter(range(80))
    flat = [pairs[i] for batch in batches for i in batch]
    assert flat == sorted(pairs)
    for batch in batches:
        unique = sorted({tuple(pairs[i][0]) for i in batch})
        tokens = sum(len(b) - common(a, b) for a, b in zip([(), *unique], unique, strict=False))
        assert tokens <= max(budget, 2 * len(pairs[batch[0]][0]))
    assert cut([], budget) == []


# ---- generation ----


def test_text_ends_at_the_first_of_several_stop_texts(tiny):
    model, chat, o = load(tiny, torch.float32), Chat(tiny), SampleOptions(temperature=0.0, slots=3)
    prompts = [chat.encode(text(i, 8)) for i in range(6)]
    free = [Request(ids, 40) for ids in prompts]
    Engine(model, chat, o).run(free)
    texts = [chat.text(r.output) for r in free]
    until = [texts[0][5:8], texts[1][9:11], "never to be seen"]
    stopped = [Request(ids, 40) for ids in prompts]
    Until(model, chat, o, until).run(stopped)
    for whole, r in zip(free, stopped, strict=True):
        ends = [
            n
            for n in range(1, len(whole.output) + 1)
            if any(stop in chat.text(whole.output[:n]) for stop in until)
        ]
        assert r.output == whole.output[: ends[0] if ends else None]
    assert len(stopped[0].output) < len(free[0].output)


def test_a_special_token_ends_a_text_too(tiny):
    model, chat, o = (
        load(tiny, torch.float32),
        Chat(tiny),
        SampleOptions(temperature=0.0, ignore_eos=True),
    )
    assert Until(model, chat, o, ["<|user|>", "nothing"]).stops == {
        chat.tokenizer.token_to_id("<|user|>")
    }


def test_what_a_task_asks_of_generation():
    greedy = {"until": ["a", ""], "do_sample": False, "temperature": 0.7, "max_gen_toks": 9}
    assert generation(greedy, 256) == (["a"], 9, 0.0, 1.0)
    assert generation({"until": "a", "temperature": 0.7, "top_p": 0.9}, 256) == (
        ["a"],
        256,
        0.7,
        0.9,
    )
    assert generation({"max_new_tokens": 3}, 256) == ([], 3, 0.0, 1.0)
    assert generation({"do_sample": False, "top_k": 5}, 256)[2] == 0.0
    with pytest.raises(InputError, match="top_k"):
        generation({"do_sample": True, "temperature": 1.0, "top_k": 5}, 256)


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(
        InputError, match=r"no_such_package is not installed; pip install -r requirements-eval\.txt"
    ):
        optional("no_such_package.inside")


# ---- against lm_eval's own model ----


@pytest.fixture(scope="module")
def peers(tiny):
    """(lm_eval's model for transformers, ours), on one checkpoint."""
    return both(tiny)


def both(directory, **named):
    pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("lm_eval", reason="needs lm_eval: pip install -r requirements-eval.txt")
    from lm_eval.models.huggingface import HFLM

    return (
        HFLM(pretrained=str(directory), dtype="float32", device="cpu", batch_size=2),
        harness.Harness(directory, FP32, **{"batch_tokens": 300, "slots": 4, **named}),
    )


def requests(kind: str, *arguments) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, 0) for one in arguments]


def test_log_likelihoods_are_those_of_lm_eval(peers):
    peer, us = peers
    contexts = [
        text(0, 40) + "\nAnswer:",
        text(0, 40) + " and",
        text(1, 3),
        text(2, 600),
        "",
        "ends with a space ",
    ]
    answers = (" the trainer", " A", " B", " x", " the trainer reads")
    asked = requests(
        "loglikelihood", *[(context, answer) for context in contexts for answer in answers]
    )
    theirs, ours = (
        peer.loglikelihood(asked, disable_tqdm=True),
        us.loglikelihood(asked, disable_tqdm=True),
    )
    assert [logp for logp, _ in ours] == pytest.approx([logp for logp, _ in theirs], abs=1e-3)
    assert [hit for _, hit in ours] == [hit for _, hit in theirs] and len(
        {round(logp, 2) for logp, _ in ours}
    ) > 25


def test_rolling_log_likelihoods_are_those_of_lm_eval(peers):
    asked = requests(
        "loglikelihood_rolling", (text(3, 5),), (text(4, 700),), ("x",)
    )  # the second is longer than the context
    theirs, ours = (model.loglikelihood_rolling(asked, disable_tqdm=True) for model in peers)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_greedy_texts_are_those_of_lm_eval(peers):
    contexts = [
        text(5, 10),
        text(6, 3),
        text(7, 500),
        text(5, 10) + " x",
    ]  # the third is cut from the left
    for until in (
        [],
        ["e"],
        ["zzz", "ri", "\n\n"],
    ):  # the peer also looks into the names of special tokens: "a" would stop it
        given = {"until": until, "do_sample": False, "max_gen_toks": 30}
        asked = requests("generate_until", *[(context, dict(given)) for context in contexts])
        theirs, ours = (model.generate_until(asked, disable_tqdm=True) for model in peers)
        assert ours == theirs


def test_samples_of_one_context_differ_and_come_again(peers):
    us = peers[1]
    asked = requests(
        "generate_until",
        *[(text(8, 5), {"do_sample": True, "temperature": 1.0, "max_gen_toks": 20})] * 3,
    )
    first = us.generate_until(asked, disable_tqdm=True)
    assert len({*first}) == 3 and us.generate_until(asked, disable_tqdm=True) == first


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
    """With and without a BOS token that tokenizer.json adds; what tokenizer_config.json says of that counts for nothing."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer.from_str(tokenizer_json())
    if written:
        tokenizer.post_processor = TemplateProcessing(
            single="<|user|> $A", special_tokens=[("<|user|>", 1)]
        )
    made = tiny_checkpoint(tmp_path / "model", tokenizer=tokenizer.to_str())
    path = made / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    peer, us = both(made)
    for sample in ("Hello there", "<|user|>Hello there", " x"):
        assert us.tok_encode(sample) == peer.tok_encode(sample)
        assert us.tok_encode(sample, add_special_tokens=False) == peer.tok_encode(
            sample, add_special_tokens=False
        )
    assert (us.eot_token_id, us.prefix_token_id, us.max_length) == (
        peer.eot_token_id,
        peer.prefix_token_id,
        peer.max_length,
    )


def test_chat_templates_are_rendered_as_by_transformers(peers):
    talk = [
        {"role": "user", "content": " Who reads them? "},
        {"role": "assistant", "content": "The trainer "},
    ]
    for messages, opened in ((talk[:1], True), (talk, False)):
        theirs, ours = (
            model.apply_chat_template(messages, add_generation_prompt=opened) for model in peers
        )
        assert ours == theirs
    assert (
        peers[1].chat_template(True) == peers[0].chat_template(True)
        and peers[1].chat_template(False) is None
    )


def test_a_base_model_needs_no_chat_template(tmp_path):
    pytest.importorskip("lm_eval")
    made = tiny_checkpoint(tmp_path / "model", template=None)
    harness.Harness(made, FP32)
    with pytest.raises(InputError, match="no chat template"):
        harness.Harness(made, FP32, chat=True)


# ---- the leaderboard ----

LABELS = ["A", "B", "C", "D"]


@pytest.fixture
def tasks(tmp_path) -> Path:
    """Small files of all tasks but HellaSwag, in the layouts of the hub."""
    pytest.importorskip("lm_eval", reason="needs lm_eval: pip install -r requirements-eval.txt")
    folder = tmp_path / "tasks"
    choices = lambda i: [text((i, c), 3) for c in LABELS]  # noqa: E731
    for split, n in (("train", 40), ("test", 5)):
        write_rows(
            folder / f"arc_challenge_{split}.jsonl",
            [
                {
                    "id": f"{split}{i}",
                    "question": text((split, i), 3),
                    "choices": {"text": choices(i), "label": LABELS},
                    "answerKey": LABELS[i % 4],
                }
                for i in range(n)
            ],
        )
    truths = lambda i: {"choices": choices(i), "labels": [1, 0, 1, 0]}  # noqa: E731
    write_rows(
        folder / "truthfulqa_mc.jsonl",
        [
            {"question": text(i, 5), "mc1_targets": truths(i), "mc2_targets": truths(i)}
            for i in range(5)
        ],
    )
    for split, n in (("dev", 5), ("test_few", 3)):
        write_rows(
            folder / f"mmlu_{split}.jsonl",
            [
                {
                    "question": text((split, subject, i), 4),
                    "subject": subject,
                    "choices": choices(i),
                    "answer": i % 4,
                }
                for i in range(n)
                for subject in ("anatomy", "virology")
            ],
        )
    write_rows(
        folder / "winogrande_dev.jsonl",
        [
            {
                "sentence": f"{text(i, 4)} _ {text(-i, 4)}",
                "option1": "row",
                "option2": "list",
                "answer": str(i % 2 + 1),
            }
            for i in range(12)
        ],
    )
    write_rows(
        folder / "gsm8k_test.jsonl",
        [{"question": text(i, 6), "answer": f"{i} rows\n#### {i}"} for i in range(12)],
    )
    return folder


def options(model, files, out, **named) -> leaderboard.Options:
    return leaderboard.Options(
        **{
            "model": str(model),
            "data": str(files),
            "out": str(out),
            "dtype": "float32",
            "limit": 3,
            "batch_tokens": 2000,
            **named,
        }
    )


@pytest.fixture
def roomy(tmp_path) -> Path:
    """A checkpoint with room for 25 examples."""
    return tiny_checkpoint(tmp_path / "roomy", max_position_embeddings=4096)


def test_the_leaderboards_numbers_are_those_of_lm_eval(roomy, tasks, tmp_path, capsys):
    pytest.importorskip("transformers", reason="needs transformers")
    from lm_eval.tasks import TaskManager

    result = leaderboard.main(options(roomy, tasks, tmp_path / "out"))
    table = capsys.readouterr().out
    assert "left out: no hellaswag_validation" in table and "mmlu_dev.jsonl" in table
    names = ["arc_challenge", "truthfulqa_mc2", "mmlu", "winogrande", "gsm8k"]
    assert [*result] == ["score", "se", *names, "tasks"] and result["tasks"] == 5
    assert result["score"] == pytest.approx(sum(result[name] for name in names) / 5, abs=1e-4)
    ours = harness.Harness(roomy, FP32, 2000)
    peer = both(roomy)[0]
    for name in names:
        folder = tmp_path / "out" / "tasks" / name
        parts = sorted(path.stem for path in folder.glob("*.yaml"))
        assert parts == (["mmlu_anatomy", "mmlu_virology"] if name == "mmlu" else [name])
        found = [
            harness.evaluate(
                model,
                parts,
                TaskManager(include_path=str(folder), include_defaults=False),
                3,
                samples=True,
            )
            for model in (peer, ours)
        ]
        scores = [
            leaderboard.headline(found[0], part, leaderboard.TASKS[name].metric)[0]
            for part in parts
        ]
        assert result[name] == pytest.approx(sum(scores) / len(scores), abs=1e-4), name
        for part in parts:
            for theirs, mine in zip(*(f["samples"][part] for f in found), strict=True):
                assert theirs["arguments"] == mine["arguments"]
                for [a], [b] in zip(theirs["resps"], mine["resps"], strict=True):
                    assert (
                        a == b
                        if name == "gsm8k"
                        else (a[0] == pytest.approx(b[0], abs=1e-3) and a[1] == b[1])
                    )
                if name in ("arc_challenge", "mmlu", "gsm8k"):
                    assert (
                        mine["arguments"][0][0].count("Answer:")
                        == leaderboard.TASKS[name].shots + 1
                    )
    questions = [
        line.split() for line in table.splitlines() if line.split()[:1] in (["gsm8k"], ["mmlu"])
    ]
    assert [row[3] for row in questions] == ["6", "3"]


def test_the_question_itself_is_never_an_example(roomy, tasks, tmp_path):
    from lm_eval.tasks import TaskManager

    o = options(roomy, tasks, tmp_path / "out", tasks="gsm8k")
    leaderboard.main(o)
    manager = TaskManager(
        include_path=str(tmp_path / "out" / "tasks" / "gsm8k"), include_defaults=False
    )
    found = harness.evaluate(harness.Harness(roomy, FP32), ["gsm8k"], manager, 12, samples=True)
    prompts = [
        (sample["doc"]["question"], sample["arguments"][0][0])
        for sample in found["samples"]["gsm8k"]
        if sample["filter"] == "strict-match"
    ]
    assert len(prompts) == 12
    assert all(
        prompt.count(f"Question: {question}\n") == 1 and prompt.count("Question:") == 6
        for question, prompt in prompts
    )


def test_hellaswag_runs_on_local_files_too(roomy, tmp_path):
    pytest.importorskip("lm_eval", reason="needs lm_eval: pip install -r requirements-eval.txt")
    from lm_eval.tasks import TaskManager

    for split, n in (("train", 15), ("validation", 4)):
        write_rows(
            tmp_path / f"hellaswag_{split}.jsonl",
            [
                {
                    "activity_label": "Reading",
                    "ctx_a": text((split, i), 4),
                    "ctx_b": text((i, split), 2),
                    "label": str(i % 4),
                    "endings": [text((split, i, c), 3) for c in LABELS],
                }
                for i in range(n)
            ],
        )
    o = options(roomy, tmp_path, tmp_path / "out", tasks="hellaswag")
    assert 0 <= leaderboard.main(o)["hellaswag"] <= 1
    manager = TaskManager(
        include_path=str(tmp_path / "out" / "tasks" / "hellaswag"), include_defaults=False
    )
    found = harness.evaluate(harness.Harness(roomy, FP32), ["hellaswag"], manager, 3, samples=True)
    assert [len(sample["arguments"]) for sample in found["samples"]["hellaswag"]] == [4] * 3
    context = found["samples"]["hellaswag"][0]["arguments"][0][0]
    assert context.count("Reading: ") == 11 and context.split("\n\n")[-1].startswith(
        f"Reading: {text(('validation', 0), 4)}"
    )


def test_a_finished_task_is_not_run_again(roomy, tasks, tmp_path, monkeypatch):
    o = options(roomy, tasks, tmp_path / "out", tasks="winogrande,truthfulqa_mc2")
    evaluate, calls = harness.evaluate, []

    def dies(model, names, *rest):
        calls.append(names)
        if names == ["truthfulqa_mc2"] and len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(model, names, *rest)

    monkeypatch.setattr(harness, "evaluate", dies)
    with pytest.raises(KeyboardInterrupt):
        leaderboard.main(o)
    result = leaderboard.main(o)
    assert calls == [["winogrande"], ["truthfulqa_mc2"], ["truthfulqa_mc2"]]
    assert leaderboard.main(o) == result and len(calls) == 3
    with pytest.raises(InputError, match="limit"):
        leaderboard.main(options(roomy, tasks, tmp_path / "out", tasks="winogrande", limit=2))


def test_random_numbers_go_on_as_if_nothing_had_been(roomy, tasks, tmp_path):
    import numpy

    draw = lambda: (random.random(), float(numpy.random.rand()), float(torch.rand(())))  # noqa: E731
    state = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    wanted = draw()
    random.setstate(state[0]), numpy.random.set_state(state[1]), torch.set_rng_state(state[2])
    leaderboard.main(options(roomy, tasks, tmp_path / "out", tasks="winogrande"))
    assert draw() == wanted


def test_missing_data_and_unknown_tasks_are_named(roomy, tasks, tmp_path):
    for changes, what in (
        ({"data": str(tmp_path / "no")}, "no such directory"),
        ({"tasks": "hellaswag"}, "no file of hellaswag"),
        ({"tasks": "no_such_task"}, "no such task"),
    ):
        with pytest.raises(InputError, match=what):
            leaderboard.main(options(roomy, tasks, tmp_path / "out", **changes))


def test_subjects_of_other_data_are_not_asked(tasks, tmp_path):
    o = options("m", tasks, tmp_path / "out")
    names = lambda: [
        *leaderboard.define("mmlu", leaderboard.files_of(leaderboard.TASKS["mmlu"], o), o)
    ]  # noqa: E731
    assert names() == ["mmlu_anatomy", "mmlu_virology"]
    for path in tasks.glob("mmlu_*.jsonl"):
        write_rows(path, [row for row in read_rows(path) if row["subject"] == "anatomy"])
    assert names() == ["mmlu_anatomy"]
    path.write_text(path.read_text() + "\n\n")
    with pytest.raises(InputError, match=f"{path.name}: line .* is no JSON object"):
        names()


def test_two_processes_give_the_numbers_of_one(roomy, tasks, tmp_path):
    one = leaderboard.main(
        options(
            roomy, tasks, tmp_path / "one", tasks="mmlu,winogrande,gsm8k", batch_tokens=500, slots=1
        )
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "eval.leaderboard",
            "--model",
            roomy,
            "--data",
            tasks,
            "--out",
            tmp_path / "two",
            "--tasks",
            "mmlu,winogrande,gsm8k",
            "--dtype",
            "float32",
            "--limit",
            "3",
            "--batch-tokens",
            "500",
            "--slots",
            "1",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    two = last_json(done.stdout)
    assert {name: two[name] for name in one} == one
    for name in ("mmlu", "winogrande", "gsm8k"):
        a, b = (
            json.loads((tmp_path / out / f"{name}.json").read_text())["results"]
            for out in ("one", "two")
        )
        assert json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def test_the_adapter_loads_one_kind_of_weights_at_a_time(tiny, monkeypatch):
    pytest.importorskip("lm_eval")
    loaded = []
    monkeypatch.setattr(harness, "load", lambda *rest: loaded.append(rest) or load(*rest))
    us = harness.Harness(tiny, FP32)
    first = us.weights(harness.load_only)
    assert us.weights(harness.load_only) is first and len(loaded) == 1
    us.weights(harness.pack)
    assert len(loaded) == 2 and us.kind is harness.pack


def test_the_bench_compares_both_models(roomy, tasks, tmp_path):
    pytest.importorskip("transformers", reason="needs transformers")
    code, out, errors = run(
        [
            "bench/harness.py",
            "--model",
            roomy,
            "--data",
            tasks,
            "--out",
            tmp_path,
            "--limit",
            "2",
            "--subjects",
            "1",
            "--tasks",
            "mmlu,gsm8k",
        ]
    )
    assert code == 0, errors
    result = last_json(out)
    assert (result["tasks"], result["same_scores"]) == (2, 2) and result[
        "largest_difference"
    ] < 1e-3
    rows = [json.loads(line) for line in out.splitlines() if line.startswith('{"task"')]
    assert [row["requests"] for row in rows] == [8, 2]
    assert all(row["greedy differs"] == row["texts differ"] == 0 for row in rows)

"""Scorers against transformers, and the filter: each reason to drop a pair, and what the kept ones look like."""

import json
import math
import random

import pytest
import torch
from conftest import last_json, llama_config, read_rows, run, tiny_checkpoint, write_rows
from safetensors.torch import load_file, save_file

from data import Chat, Common, InputError
import reward as reward_file
from losses.pairs import preference_of
from reward import (
    FilterOptions,
    likelihood,
    load_scorer,
    make_pairs,
    quantiles,
    repetition,
    scorer_file,
)
from scorers.agreement import agreement, read_labelled, wilson
from scorers.armorm import ArmoRM
from scorers.classifier import RewardOptions, classifier, start_reward_model, train_reward
from scorers.judge import TEMPLATE, judge as chat_judge

FP32 = Common(dtype="float32")
ROWS = [
    {
        "id": f"r{i}",
        "prompt": f"Say {i} things.",
        "response": " ".join(f"thing {j}" for j in range(i)),
    }
    for i in range(6)
]
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
TALK = {"id": "talk", "messages": CHAT, "response": "See you"}


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A reward model with random weights."""
    return tiny_checkpoint(
        tmp_path_factory.mktemp("judge") / "model",
        seed=3,
        id2label={"0": "LABEL_0"},
        num_labels=1,
        architectures=["LlamaForSequenceClassification"],
    )


# ---- scorers ----


def test_likelihood_is_the_mean_logp_of_answer_and_end(tiny):
    from transformers import AutoModelForCausalLM

    model, chat = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), Chat(tiny)
    for row, score in zip([*ROWS, TALK], likelihood(tiny, FP32)([*ROWS, TALK]), strict=True):
        prompt, response = chat.prompt_ids(row), [*chat.encode(row["response"]), 0]
        with torch.no_grad():
            logps = (
                model(torch.tensor([prompt + response]))
                .logits[0, len(prompt) - 1 : -1]
                .log_softmax(-1)
            )  # (T, V)
        assert score == pytest.approx(logps[range(len(response)), response].mean().item(), abs=1e-4)
    assert load_scorer("likelihood", tiny, FP32)(ROWS) == pytest.approx(
        likelihood(tiny, FP32)(ROWS), rel=1e-5
    )


def test_reward_is_the_score_of_the_last_token(judge):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(judge, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(judge)
    scores = load_scorer(str(judge), "", FP32)([*ROWS, TALK])
    assert len(set(scores)) == len(scores)
    for row, score in zip([*ROWS, TALK], scores, strict=True):
        turns = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
        ids = tokenizer.apply_chat_template(
            [*turns, {"role": "assistant", "content": row["response"]}], return_dict=False
        )
        with torch.no_grad():
            assert score == pytest.approx(model(torch.tensor([ids])).logits.item(), abs=1e-4)


def test_scores_do_not_depend_on_their_batch(tiny, judge):
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    for score in (likelihood(tiny, FP32), classifier(judge, FP32)):
        scores = dict(zip((row["id"] for row in ROWS), score(ROWS), strict=True))
        assert score(shuffled) == pytest.approx([scores[row["id"]] for row in shuffled], abs=1e-5)
        assert score([]) == []
        in_blocks = reward_file.blockwise(score, [], None, size=2)
        assert in_blocks(ROWS) == pytest.approx(score(ROWS), abs=1e-5) and in_blocks([]) == []


def test_scorer_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def words(rows):\n    return [float(len(r['response'].split())) for r in rows]\n"
    )
    assert load_scorer(f"{tmp_path}/mine.py:words", "", FP32)(ROWS) == [0, 2, 4, 6, 8, 10]
    assert load_scorer("none", "", FP32) is None
    with pytest.raises(InputError, match="has no function letters"):
        load_scorer(f"{tmp_path}/mine.py:letters", "", FP32)
    with pytest.raises(InputError, match="no such file"):
        load_scorer(f"{tmp_path}/yours.py:words", "", FP32)
    with pytest.raises(InputError, match=r"nowhere: no scorer has that name"):
        load_scorer(f"{tmp_path}/nowhere", "", FP32)


def test_scorer_needs_one_output(tiny, tmp_path):
    two = tiny_checkpoint(
        tmp_path / "two",
        id2label={"0": "bad", "1": "good"},
        architectures=["LlamaForSequenceClassification"],
    )
    for model in (two, tiny):
        with pytest.raises(
            InputError, match="needs a sequence-classification checkpoint with one output"
        ):
            load_scorer(str(model), "", FP32)


def test_random_is_the_same_for_the_same_text_and_else_another():
    scores = load_scorer("random", "", FP32)(ROWS)
    assert (
        scores
        == load_scorer("random", "", FP32)(ROWS)
        != load_scorer("random", "", Common(seed=1))(ROWS)
    )
    assert len(set(scores)) == len(ROWS) and 0 <= min(scores) < max(scores) < 1


def test_a_mark_of_the_words_start_is_no_letter(tiny, monkeypatch):
    """Tokenizers of the Llama 2 kind may write "A" as such a mark and the letter."""
    others = [{**row, "response": "no"} for row in ROWS]
    expected, encode = load_scorer(f"judge:{tiny}", "", FP32)(ROWS, others), Chat.encode
    monkeypatch.setattr(
        Chat,
        "encode",
        lambda self, text: [*([5] if text in ("A", "B") else []), *encode(self, text)],
    )
    assert load_scorer(f"judge:{tiny}", "", FP32)(ROWS, others) == expected != [0.5] * len(ROWS)


def test_judge_reads_the_letters_in_both_orders(tiny):
    """Against transformers: probability of A against B at the place of the answer, of two prompts, averaged."""
    from transformers import AutoModelForCausalLM

    model, chat = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), Chat(tiny)
    a, b = chat.encode("A")[0], chat.encode("B")[0]

    def p_first(row, first, second):
        turns = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
        talk = "\n\n".join(f"{m['role']}: {m['content']}" for m in turns)
        ids = chat.prompt_ids({"prompt": TEMPLATE.format(conversation=talk, a=first, b=second)})
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1, [a, b]].softmax(-1)[0].item()

    rows = [*ROWS, TALK]
    others = [{**row, "response": "no {a}"} for row in rows]
    score = load_scorer(f"judge:{tiny}", "", FP32)
    assert score.pairwise
    got = score(rows, others)
    expected = [
        (p_first(r, r["response"], o["response"]) + 1 - p_first(r, o["response"], r["response"]))
        / 2
        for r, o in zip(rows, others, strict=True)
    ]
    assert got == pytest.approx(expected, abs=1e-5) and len({round(p, 4) for p in got}) > 3
    assert score(others, rows) == pytest.approx([1 - p for p in got], abs=1e-5)
    with pytest.raises(InputError, match=r"record long: \d+ tokens to judge, the context of .* is"):
        chat_judge(str(tiny), FP32)(
            [{"id": "long", "prompt": "x" * 999, "response": "y"}], [ROWS[0]]
        )


def test_pairwise_scores_are_p_and_its_complement(tiny, tmp_path):
    chosen, rejected = answers(["a good answer", "yes"]), answers(["bad", "no no"])
    counts, pairs = make(chosen, rejected, tmp_path, scorer=f"judge:{tiny}", threshold=-1)
    assert [row["score_chosen"] + row["score_rejected"] for row in pairs] == pytest.approx(
        [1, 1]
    ) and counts["pairs"] == 2
    expected = load_scorer(f"judge:{tiny}", "", FP32)(chosen, rejected)
    assert [row["score_chosen"] for row in pairs] == pytest.approx(expected)
    assert [preference_of(row) for row in pairs] == pytest.approx(
        expected
    )  # not the sigmoid of P - (1 - P)


def test_scorer_that_compares_cannot_stand_alone(tiny, tmp_path):
    with pytest.raises(
        InputError, match="compares two answers; the improver needs one that scores each"
    ):
        load_scorer(f"judge:{tiny}", tiny, FP32, alone=True)
    (tmp_path / "mine.py").write_text(
        "def better(rows, others): return [1.0]\nbetter.pairwise = True\n"
        "def length(rows): return [1.0]"
    )
    with pytest.raises(InputError, match=r"mine\.py:better compares two answers"):
        load_scorer(f"{tmp_path}/mine.py:better", tiny, FP32, alone=True)
    assert load_scorer(f"{tmp_path}/mine.py:better", tiny, FP32).pairwise
    assert load_scorer(f"{tmp_path}/mine.py:length", tiny, FP32, alone=True)([{}]) == [1.0]


def test_files_that_a_scorer_reads(tmp_path):
    assert scorer_file("none", "random", "likelihood", "endpoint:gpt") == {}
    assert {
        str(path) for path in scorer_file("judge:/j", "/r", "tests/micro.py:evaluate").values()
    } == {"/j", "/r", "tests/micro.py"}


# ---- ArmoRM ----

ARMORM = {
    "architectures": ["LlamaForRewardModelWithGating"],
    "num_objectives": 5,
    "gating_temperature": 3,
    "gating_hidden_dim": 16,
    "gating_n_hidden": 2,
    "id2label": {"0": "LABEL_0"},
}


@pytest.fixture(scope="module")
def armorm(tmp_path_factory):
    """A checkpoint in ArmoRM's layout: names and shapes of its tensors, random numbers."""
    directory = tiny_checkpoint(
        tmp_path_factory.mktemp("armorm") / "model",
        seed=4,
        id2label={"0": "LABEL_0"},
        num_labels=1,
        architectures=["LlamaForSequenceClassification"],
    )
    tensors, g = load_file(directory / "model.safetensors"), torch.Generator().manual_seed(0)
    del tensors["score.weight"]
    shapes = {
        "regression_layer.weight": (5, 64),
        "reward_transform_matrix": (5, 5),
        "gating.logit_scale": (1,),
        "gating.layers.0.weight": (16, 64),
        "gating.layers.0.bias": (16,),
        "gating.layers.1.weight": (16, 16),
        "gating.layers.1.bias": (16,),
        "gating.layers.2.weight": (5, 16),
        "gating.layers.2.bias": (5,),
    }
    tensors |= {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**raw, **ARMORM}))
    return directory


def test_armorm_by_hand(armorm):
    """Hidden states by transformers, the rest in float64 from the published description."""
    from transformers import LlamaConfig, LlamaModel

    t = {name: value.double() for name, value in load_file(armorm / "model.safetensors").items()}
    raw = {
        key: value
        for key, value in json.loads((armorm / "config.json").read_text()).items()
        if key != "architectures"
    }
    body = LlamaModel(LlamaConfig(**raw)).eval()
    body.load_state_dict(
        {
            name.removeprefix("model."): value.float()
            for name, value in t.items()
            if name.startswith("model.")
        }
    )
    chat = Chat(armorm)
    for row, score in zip(
        [*ROWS, TALK], load_scorer(str(armorm), "", FP32)([*ROWS, TALK]), strict=True
    ):
        turns = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
        ids = chat.encode(
            chat.render([*turns, {"role": "assistant", "content": row["response"]}], False)
        )
        end = (
            len(chat.encode(chat.render(turns, False))) - 1
        )  # the end token of the prompt, before the answer's header
        assert ids[end] == 0 and ids[end + 1] == 2
        with torch.no_grad():
            hidden = body(torch.tensor([ids])).last_hidden_state[0].double()
        gate = hidden[end]
        for i in (0, 1):
            gate = (t[f"gating.layers.{i}.weight"] @ gate + t[f"gating.layers.{i}.bias"]).clamp(
                min=0
            )
        gate = ((t["gating.layers.2.weight"] @ gate + t["gating.layers.2.bias"]) / 3).softmax(
            0
        ) * t["gating.logit_scale"]
        rewards = (t["regression_layer.weight"] @ hidden[-1]) @ t["reward_transform_matrix"]
        assert score == pytest.approx((gate * rewards).sum().item(), rel=1e-4, abs=1e-4)


def test_armorm_as_published_has_19_objectives():
    with torch.device("meta"):
        model = ArmoRM(
            {
                **llama_config(),
                **ARMORM,
                "num_objectives": 19,
                "gating_hidden_dim": 1024,
                "gating_n_hidden": 3,
            }
        )
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes["regression_layer.weight"] == (19, 64) and shapes["reward_transform_matrix"] == (
        19,
        19,
    )
    assert shapes["gating.layers.3.weight"] == (19, 1024) and shapes["gating.logit_scale"] == (1,)
    assert not {"lm_head.weight", "score.weight"} & shapes.keys()


# ---- scoring that was stopped ----


def test_scoring_goes_on_where_it_stopped(tmp_path):
    calls = []

    def score(rows):
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return [float(len(row["response"])) for row in rows]

    rows = answers(["x" * i for i in range(1, 10)])
    scorer = reward_file.blockwise(score, ["key"], tmp_path / "keep", size=4)
    with pytest.raises(KeyboardInterrupt):
        scorer(rows)
    assert scorer(rows) == list(range(1, 10)) and calls == [4, 4, 1, 1]
    assert reward_file.blockwise(score, ["another model"], tmp_path / "keep", size=4)(rows) == list(
        range(1, 10)
    )
    assert calls[4:] == [4, 4, 1]


def test_kept_scores_are_of_one_model(tiny, tmp_path):
    other, keep = tiny_checkpoint(tmp_path / "other", seed=1), tmp_path / "keep"
    first = load_scorer("likelihood", tiny, FP32, keep)(ROWS)
    assert (
        load_scorer("likelihood", other, FP32, keep)(ROWS)
        == pytest.approx(likelihood(other, FP32)(ROWS))
        != first
    )
    assert (
        load_scorer("likelihood", tiny, FP32, keep)(ROWS) == first
        and len(list(keep.iterdir())) == 2
    )


# ---- measuring ----


def test_agreement_by_hand(tmp_path, capsys):
    rows = [
        {"input": "q", "output_1": one, "output_2": two, "label": label}
        for one, two, label in (("aa", "b", 1), ("aaa", "b", 2), ("a", "b", 2), ("a", "bbb", 2))
    ]
    path = tmp_path / "labelled.json"
    path.write_text(json.dumps(rows))
    assert [(a["response"], b["response"]) for a, b in read_labelled(str(path))] == [
        ("aa", "b"),
        ("b", "aaa"),
        ("b", "a"),
        ("bbb", "a"),
    ]
    length = lambda rows: [float(len(row["response"])) for row in rows]  # noqa: E731
    result = agreement(str(path), length)  # right, wrong, a draw, right
    assert result["agreement"] == 2.5 / 4 and result["longer"] == 0.5 and result["pairs"] == 4
    assert "agreement with 4 labelled pairs: 0.625" in capsys.readouterr().out
    judge = lambda good, bad: [0.9, 0.4, 0.5, 0.8]  # noqa: E731
    judge.pairwise = True
    assert agreement(str(path), judge)["agreement"] == 2.5 / 4
    # Wilson by hand: 8 of 10 at z 1.96: (.8 + .19208 +- 1.96 sqrt(.016 + .009604)) / 1.38416
    assert wilson(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-5)
    assert wilson(0, 5)[0] == 0 and wilson(5, 5)[1] == 1
    for text in ('[{"input": "q"}]', "[]"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(InputError, match=r"bad.json: no list of \{input, output_1"):
            agreement(str(tmp_path / "bad.json"), length)
    talks = write_rows(
        tmp_path / "talks.jsonl", [{"messages": CHAT, "chosen": "See you", "rejected": "x"}]
    )
    assert agreement(str(talks), length)["agreement"] == 1


def test_measure_command(judge, tmp_path):
    labelled = [{"prompt": f"Say {i}.", "chosen": f"{i}", "rejected": "no"} for i in range(5)]
    pairs = write_rows(tmp_path / "pairs.jsonl", labelled)
    code, out, err = run(
        ["reward.py", "--scorer", judge, "--measure", pairs, "--dtype", "float32"], nproc=2
    )
    assert code == 0, err
    rows = [
        {"id": "x", "prompt": f"Say {i}.", "response": text}
        for i in range(5)
        for text in (f"{i}", "no")
    ]
    scores = classifier(judge, FP32)(rows)
    assert (
        last_json(out)["agreement"]
        == sum(a > b for a, b in zip(scores[::2], scores[1::2], strict=True)) / 5
    )


def test_measure_on_real_labels(shared_data, capsys):
    result = agreement(
        str(shared_data / "llmbar" / "Natural.json"), load_scorer("random", "", FP32)
    )
    assert (
        result["pairs"] == 100
        and 0.3 < result["agreement"] < 0.7
        and 0 < result["low"] < result["high"] < 1
    )


# ---- a reward model from pairs ----

BETTER = [
    {
        "id": f"p{i}",
        "prompt": f"Count to {i}.",
        "chosen": " ".join(map(str, range(i + 1))),
        "rejected": "no " * (i % 3 + 1),
    }
    for i in range(8)
]


@pytest.mark.parametrize("nproc", [1, 2])
def test_reward_model_is_trained_and_transformers_scores_alike(tiny, tmp_path, nproc):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    pairs = write_rows(tmp_path / "pairs.jsonl", BETTER)
    code, out, err = run(
        [
            "reward.py",
            "train",
            "--model",
            tiny,
            "--pairs",
            pairs,
            "--out",
            tmp_path / "rm",
            "--dtype",
            "float32",
            "--lr",
            "3e-4",
            "--epochs",
            "6",
            "--batch",
            "4",
            "--micro-tokens",
            "100",
        ],
        nproc=nproc,
    )
    assert code == 0, err
    lines = read_rows(tmp_path / "rm" / "metrics.jsonl")
    assert (
        last_json(out)["pairs"] == 8
        and len(lines) == 12
        and lines[-1]["loss"] < lines[0]["loss"] - 0.2
    )
    assert lines[-1]["accuracy"] == 1 and lines[-1]["margin"] > 0.2
    assert sorted(path.name for path in (tmp_path / "rm").iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "manifest.json",
        "metrics.jsonl",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm")
    rows = [{**row, "response": row[side]} for row in BETTER for side in ("chosen", "rejected")]
    scores = load_scorer(str(tmp_path / "rm"), "", FP32)(rows)
    assert all(a > b for a, b in zip(scores[::2], scores[1::2], strict=True))
    texts = [
        tokenizer.apply_chat_template(
            [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["response"]},
            ],
            tokenize=False,
        )
        for row in rows
    ]
    assert (
        model.config.pad_token_id != tokenizer.eos_token_id
    )  # transformers looks for the last token that is no padding
    tokenizer.pad_token_id = model.config.pad_token_id
    with torch.no_grad():
        batch = (
            model(**tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False))
            .logits[:, 0]
            .tolist()
        )
    assert batch == pytest.approx(scores, abs=1e-4)


def test_pairs_that_do_not_fit_are_counted(tiny, tmp_path):
    """Neither those over --max-length nor those over the model's context, of 512 tokens, can be scored at their end."""
    long = [{**BETTER[0], "id": f"long{n}", "rejected": "x" * n} for n in (120, 900)]
    for most, fitting in ((100, 8), (2048, 9)):
        counts = train_reward(
            tiny, BETTER + long, tmp_path / f"{most}", RewardOptions(max_length=most, batch=8), FP32
        )
        assert (counts["pairs"], counts["examples"], counts["too_long"]) == (
            10,
            fitting,
            10 - fitting,
        )
    with pytest.raises(InputError, match="no pair fits --max-length 2048 and the model's context"):
        train_reward(tiny, long[1:], tmp_path / "none", RewardOptions(), FP32)
    with pytest.raises(
        InputError, match="--loss-on-prompt: a reward model is scored at the last token only"
    ):
        train_reward(tiny, BETTER, tmp_path / "none", RewardOptions(loss_on_prompt=True), FP32)


def test_first_step_of_bradley_terry_by_hand(tiny, tmp_path):
    """The new output is drawn from the seed, the loss is that of its scores."""
    start_reward_model(tiny, tmp_path / "start", Chat(tiny), 0, 0)
    score = classifier(tmp_path / "start", FP32)
    gaps = [
        a - b
        for a, b in (
            score([{**row, "response": row[s]} for s in ("chosen", "rejected")]) for row in BETTER
        )
    ]
    train_reward(tiny, BETTER, tmp_path / "rm", RewardOptions(lr=1e-9, batch=8), FP32)
    [line] = read_rows(tmp_path / "rm" / "metrics.jsonl")
    assert line["loss"] == pytest.approx(
        sum(math.log1p(math.exp(-gap)) for gap in gaps) / 8, abs=1e-5
    )
    assert (
        line["margin"] == pytest.approx(sum(gaps) / 8, abs=1e-5)
        and line["accuracy"] == sum(gap > 0 for gap in gaps) / 8
    )


def test_texts_beyond_the_context_are_named(tiny, judge):
    long = {"id": "long", "prompt": "x" * 600, "response": "y"}
    with pytest.raises(InputError, match="record long: its prompt fills the context"):
        likelihood(tiny, FP32)([ROWS[0], long])
    with pytest.raises(InputError, match=r"record long: 60\d tokens, the context of .* is 512"):
        classifier(judge, FP32)([ROWS[0], long])


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0),
        ("one two three", 0),
        ("all of these words differ from each other", 0),
        ("a b c a b c", 0.25),
        ("A b  c\na B c", 0.25),
        ("no " * 10, 7 / 8),
        ("so it goes and so it goes", 0.2),
    ],
)
def test_repetition(text, share):
    assert repetition(text) == pytest.approx(share)


# ---- the filter ----


def answers(texts: list[str], **more) -> list[dict]:
    return [
        {"id": f"x{i}", "prompt": f"Prompt {i}?", "response": text, "finish_reason": "stop", **more}
        for i, text in enumerate(texts)
    ]


def length_scorer(rows: list[dict]) -> list[float]:
    """A point for each word, so that gaps are whole numbers."""
    return [float(len(row["response"].split())) for row in rows]


LENGTH = "tests/test_reward.py:length_scorer"


def make(
    chosen, rejected, tmp_path, scorer=LENGTH, common=FP32, iteration=1, **changes
) -> tuple[dict, list[dict]]:
    o = FilterOptions(scorer=scorer, **changes)
    counts = make_pairs(chosen, rejected, tmp_path / "pairs.jsonl", "", o, common, iteration)
    return counts, read_rows(tmp_path / "pairs.jsonl")


def test_each_reason_to_drop_a_pair_is_counted(tmp_path):
    chosen = answers(
        [
            "a good long answer",
            " the  same\n",
            "",
            "cut off in the",
            "again " * 9,
            "fine one here now",
            "short",
        ]
    )
    rejected = answers(["bad", "the same", "text", "no", "yes", "again " * 9, "longer than that"])
    chosen[3]["finish_reason"] = rejected[0]["finish_reason"] = (
        "length"  # of the rejected one it does not matter
    )
    counts, pairs = make(chosen, rejected, tmp_path)
    assert [row["id"] for row in pairs] == ["x0"]
    reasons = {
        name: counts[name] for name in ("identical", "empty", "cut_off", "repetitive", "small_gap")
    }
    assert reasons == {"identical": 1, "empty": 1, "cut_off": 1, "repetitive": 2, "small_gap": 1}
    assert (counts["candidates"], counts["valid"], counts["pairs"]) == (7, 1, 1)
    assert [row["id"] for row in make(chosen, rejected, tmp_path, keep_cut_off=True)[1]] == [
        "x0",
        "x3",
    ]
    assert [row["id"] for row in make(chosen, rejected, tmp_path, threshold=-5)[1]] == ["x0", "x6"]
    assert [row["id"] for row in make(chosen, rejected, tmp_path, repetition=0.9)[1]] == [
        "x0",
        "x4",
    ]
    # without a scorer there is no gap, and all else stays
    counts, pairs = make(chosen, rejected, tmp_path, scorer="none")
    assert [row["id"] for row in pairs] == ["x0", "x6"] and "small_gap" not in counts
    assert pairs[0]["score_chosen"] is pairs[0]["score_rejected"] is None


@pytest.mark.parametrize(("threshold", "kept"), [(0, 3), (0.99, 3), (1, 2), (2, 1), (2.99, 1)])
def test_threshold_itself_is_not_enough(tmp_path, threshold, kept):
    counts, _ = make(
        answers(["a b", "a b c", "a b c d"]), answers(["x"] * 3), tmp_path, threshold=threshold
    )
    assert (counts["valid"], counts.get("small_gap", 0)) == (kept, 3 - kept)


def test_pairs_are_joined_by_id(tmp_path):
    chosen, rejected = answers(["a b", "c d e", "f g"]), answers(["x", "y", "z"])[::-1]
    chosen[2]["id"] = "unknown"
    counts, pairs = make(chosen, rejected, tmp_path)
    assert counts["candidates"] == 2
    assert [(row["chosen"], row["rejected"]) for row in pairs] == [("a b", "x"), ("c d e", "y")]


def test_samples_of_a_prompt_are_joined_one_by_one(tmp_path):
    chosen = [{**row, "id": "a", "sample": i} for i, row in enumerate(answers(["a b", "c d e"]))]
    rejected = [{**row, "id": "a", "sample": i} for i, row in enumerate(answers(["x", "y"]))]
    _, pairs = make(chosen, rejected, tmp_path)
    assert [(row["chosen"], row["rejected"]) for row in pairs] == [("a b", "x"), ("c d e", "y")]
    assert pairs[0]["id"] == "a" != pairs[1]["id"]  # or nobody could read the file


def test_texts_of_another_source_need_no_finish_reason(tmp_path):
    chosen, rejected = (
        [{k: v for k, v in row.items() if k != "finish_reason"} for row in answers(some)]
        for some in (["a b"], ["x"])
    )
    assert make(chosen, rejected, tmp_path)[0]["pairs"] == 1


def test_another_threshold_scores_nothing_again(tiny, tmp_path, monkeypatch):
    """A filter that leaves nothing is told to lower its threshold; what was scored is kept for that."""
    asked, one = [], reward_file.likelihood(tiny, FP32)
    monkeypatch.setattr(
        reward_file, "likelihood", lambda *_: lambda rows: asked.extend(rows) or one(rows)
    )
    given = {"model": str(tiny), "out": str(tmp_path / "pairs.jsonl"), "dtype": "float32"}
    for threshold, least in ((1e3, None), (-1e3, 1)):
        o = reward_file.Options(**given, threshold=threshold, chosen="c", rejected="r")
        try:
            made = make_pairs(answers(["a b"]), answers(["x"]), o.out, tiny, o, o)["pairs"]
        except InputError:
            made = None
        assert (
            made == least
            and len(asked) == 2
            and (tmp_path / "pairs.scores").is_dir() == (made is None)
        )


def test_columns(tmp_path):
    chosen = [{**answers(["much better"])[0], "draft": "d"}, {**TALK, "finish_reason": "stop"}]
    rejected = [*answers(["bad"]), {**TALK, "response": "x"}]
    make(chosen, rejected, tmp_path, iteration=3)
    assert read_rows(tmp_path / "pairs.jsonl") == [
        {
            "id": "x0",
            "prompt": "Prompt 0?",
            "chosen": "much better",
            "rejected": "bad",
            "score_chosen": 2.0,
            "score_rejected": 1.0,
            "iteration": 3,
        },
        {
            "id": "talk",
            "messages": CHAT,
            "chosen": "See you",
            "rejected": "x",
            "score_chosen": 2.0,
            "score_rejected": 1.0,
            "iteration": 3,
        },
    ]


def test_counts_hold_gap_and_lengths(tmp_path):
    counts, _ = make(answers(["a b c", "a b"]), answers(["x", "y z"]), tmp_path)
    assert (counts["mean_gap"], counts["chosen_words"], counts["rejected_words"]) == (
        1.0,
        3.0,
        1.0,
    )  # words: of kept pairs


def test_cap_draws_at_random_and_again_the_same(tmp_path):
    chosen, rejected = answers([f"good answer {i}" for i in range(50)]), answers(["bad"] * 50)
    counts, first = make(chosen, rejected, tmp_path, pairs=10)
    assert (counts["valid"], counts["pairs"], len(first)) == (50, 10, 10)
    numbers = [int(row["id"][1:]) for row in first]
    assert numbers == sorted(set(numbers)) != list(range(10))
    assert make(chosen, rejected, tmp_path, pairs=10)[1] == first
    for changes in ({"common": Common(seed=1)}, {"iteration": 2}):
        make(chosen, rejected, tmp_path, pairs=10, **changes)
        assert [row["id"] for row in read_rows(tmp_path / "pairs.jsonl")] != [
            row["id"] for row in first
        ]
    assert make(chosen, rejected, tmp_path, pairs=50)[0]["pairs"] == 50


def test_nothing_left_says_what_the_gaps_are(tmp_path):
    with pytest.raises(
        InputError, match=r"no pair of 3 left \({'small_gap': 3}\); score gaps 1 1 2 3 3; lower"
    ):
        make(answers(["a b", "a b c", "a b c d"]), answers(["x"] * 3), tmp_path, threshold=3)
    with pytest.raises(InputError, match=r"no pair of 0 left \({}\); score gaps none"):
        make([], answers(["x"]), tmp_path)
    assert not (tmp_path / "pairs.jsonl").exists()
    assert quantiles([5, 1, 2, 4, 3]) == "1 2 3 4 5"


# ---- the command ----


def test_two_processes_score_as_one(tiny, tmp_path):
    chosen = [{**row, "finish_reason": "stop"} for row in ROWS[1:]]
    rejected = [{**row, "response": "No. " + row["prompt"]} for row in chosen]
    files = [
        write_rows(tmp_path / f"{name}.jsonl", rows)
        for name, rows in (("chosen", chosen), ("rejected", rejected))
    ]
    args = [
        "reward.py",
        "--scorer",
        "likelihood",
        "--model",
        tiny,
        "--chosen",
        files[0],
        "--rejected",
        files[1],
        "--out",
        tmp_path / "two.jsonl",
        "--dtype",
        "float32",
        "--threshold",
        -9,
    ]
    code, stdout, stderr = run(args, nproc=2)
    assert code == 0, stderr
    assert (result := last_json(stdout))["pairs"] == 5 and result["seconds"] > 0
    for side, rows in (("chosen", chosen), ("rejected", rejected)):
        scores = [row[f"score_{side}"] for row in read_rows(tmp_path / "two.jsonl")]
        assert scores == pytest.approx(likelihood(tiny, FP32)(rows), abs=1e-5)


def test_command_needs_the_model_of_likelihood(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", answers(["a"]))
    code, _, stderr = run(
        ["reward.py", "--chosen", rows, "--rejected", rows, "--out", tmp_path / "out.jsonl"]
    )
    assert (
        code == 2
        and stderr.splitlines()[-1]
        == "error: --scorer likelihood scores under a model; give --model DIR"
    )

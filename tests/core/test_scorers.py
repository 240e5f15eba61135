"""Scorers against transformers, the table of names, interrupted blocks, training a reward model."""

import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    flip_a_bit,
    last_json,
    llama_config,
    read_rows,
    tiny_checkpoint,
    write_rows,
)
from safetensors.torch import load_file, save_file

from formats.chat import Chat
from formats.plugins import load_function
from plumbing.files import InputError
from plumbing.options import RunOptions
from plumbing.stage import counts_of
from scorers.armorm import ArmoRM
from scorers.base import (
    LocalModel,
    Revision,
    blockwise,
    need_scores,
    quantiles,
    score_gaps,
    score_pairs,
)
from scorers.classifier import (
    RewardOptions,
    classifier,
    conversations,
    start_reward_model,
    train_reward,
)
from scorers.letter_judge import TEMPLATE
from scorers.likelihood import likelihood, settled
from scorers.load import load_scorer, scorer_files

FP32 = RunOptions(dtype="float32")
THINGS = [" ".join(f"thing {j}" for j in range(i)) for i in range(6)]
ROWS = [
    {"id": f"r{i}", "prompt": f"Say {i} things.", "response": things}
    for i, things in enumerate(THINGS)
]
TALK = {
    "id": "talk",
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ],
    "response": "See you",
}
CLASSIFIER = {
    "architectures": ["LlamaForSequenceClassification"],
    "id2label": {"0": "LABEL_0"},
    "num_labels": 1,
}


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """A reward model with random weights."""
    return tiny_checkpoint(tmp_path_factory.mktemp("reward") / "model", seed=3, **CLASSIFIER)


def turns_of(row: dict) -> list[dict]:
    return row.get("messages") or [{"role": "user", "content": row["prompt"]}]


def whole(row: dict) -> list[dict]:
    return [*turns_of(row), {"role": "assistant", "content": row["response"]}]


def length(rows: list[dict]) -> list[float]:
    return [float(len(row["response"])) for row in rows]


def scores_of(spec, *sides: list[dict]) -> list[float]:
    """By the scorer of that name or directory."""
    scorer = load_scorer(str(spec), "", FP32)
    return scorer(*sides)


# ---------------------------------------------------------------------------------- likelihood


def plain_mean_logp(directory, rows: list[dict]) -> list[float]:
    """Mean log-prob of response and end token given the prompt, by transformers, one at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    chat = Chat(directory)
    means = []
    for row in rows:
        prompt = chat.prompt_ids(row)
        response = [*chat.encode(row["response"]), 0]
        with torch.no_grad():
            [logits] = model(torch.tensor([prompt + response])).logits
        before = logits[len(prompt) - 1 : -1]
        logps = before.log_softmax(-1)[range(len(response)), response]  # (T,)
        means.append(logps.mean().item())
    return means


def test_likelihood_is_the_mean_logp_of_response_and_end(tiny):
    rows = [*ROWS, TALK]
    score_all = likelihood(tiny, FP32)
    assert score_all(rows) == pytest.approx(plain_mean_logp(tiny, rows), abs=1e-4)
    loaded = load_scorer("likelihood", tiny, FP32)
    assert loaded(ROWS) == pytest.approx(score_all(ROWS), rel=1e-5)


# ---------------------------------------------------------------------------------- settled

ASK = Revision(template="{prompt}\nDraft: {draft}\nBetter:")


def test_settled_is_the_likelihood_of_leaving_a_draft_as_it_is(tiny):
    """By a plain forward on the template filled in by hand."""
    rows = [*ROWS, TALK]
    texts = [f"{row['prompt']}\nDraft: {row['response']}\nBetter:" for row in ROWS]
    turns = "user: Hi\n\nassistant: Hello\n\nuser: Bye"
    texts.append(f"{turns}\nDraft: See you\nBetter:")
    asked = []
    for row, text in zip(rows, texts, strict=True):
        asked.append({"prompt": text, "response": row["response"]})
    wanted = [math.exp(mean) for mean in plain_mean_logp(tiny, asked)]
    scores = settled(tiny, FP32, ASK)(rows)
    assert scores == pytest.approx(wanted, rel=1e-3)
    assert all(0 < score < 1 for score in scores)
    plain = [math.exp(mean) for mean in likelihood(tiny, FP32)(rows)]
    assert scores != pytest.approx(plain, rel=1e-3)
    loaded = load_scorer("settled", tiny, FP32, single=True, revision=ASK)
    assert loaded(rows) == pytest.approx(scores, rel=1e-5)
    assert loaded([]) == []


def test_settled_asks_with_the_records_fields_and_the_users_feedback(tiny, tmp_path):
    row = {"id": "r", "prompt": "Why?", "level": 7, "response": "So."}
    (tmp_path / "hints.py").write_text(
        "def hints(rows):\n    return [{'hint': row['response'] * 2} for row in rows]\n"
    )
    template = "{level} {hint} {draft}"
    ask = Revision(template=template, feedback=f"{tmp_path}/hints.py:hints")
    by_hand = {"id": "r", "prompt": "7 So.So. So.", "response": "So."}
    [mean] = likelihood(tiny, FP32)([by_hand])
    assert settled(tiny, FP32, ask)([row]) == pytest.approx([math.exp(mean)])
    with pytest.raises(InputError, match=r"record r: .* reads \{hint\}"):
        settled(tiny, FP32, Revision(template=template))([row])


def test_what_does_not_fit_is_not_settled(tiny):
    """Nor does a rewrite of the pipeline's own end the run."""
    long = {"id": "long", "prompt": "x", "response": "y" * 600}  # of 512 positions
    scores = settled(tiny, FP32, ASK)([long, ROWS[0], long])
    assert scores == [None, *settled(tiny, FP32, ASK)(ROWS[:1]), None]


def test_likelihood_reads_the_template_of_the_policy(tiny, tmp_path):
    """--chat-template FILE is for M_0, too, as if it were its own."""
    template = "{% for m in messages %}Q {{ m.content }}<|end|>{% endfor %}A "
    (tmp_path / "mine.jinja").write_text(template)
    given = RunOptions(dtype="float32", chat_template=str(tmp_path / "mine.jinja"))
    copied = shutil.copytree(tiny, tmp_path / "copied")
    (copied / "chat_template.jinja").write_text(template)
    assert likelihood(tiny, given)(ROWS) == likelihood(copied, FP32)(ROWS)
    assert likelihood(tiny, given)(ROWS) != likelihood(tiny, FP32)(ROWS)


# ---------------------------------------------------------------------------------- reward models


def test_reward_is_the_score_of_the_last_token(reward_model):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(reward_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    rows = [*ROWS, TALK]
    scores = scores_of(reward_model, rows)
    assert len(set(scores)) == len(scores)
    for row, score in zip(rows, scores, strict=True):
        ids = tokenizer.apply_chat_template(whole(row), return_dict=False)
        with torch.no_grad():
            reward = model(torch.tensor([ids])).logits.item()
        assert score == pytest.approx(reward, abs=1e-4)


def test_a_reward_model_has_one_output(tiny, tmp_path):
    changes = {**CLASSIFIER, "id2label": {"0": "bad", "1": "good"}, "num_labels": None}
    two = tiny_checkpoint(tmp_path / "two", **changes)
    for model in (two, tiny):
        needed = "needs a sequence-classification checkpoint with one output"
        with pytest.raises(InputError, match=needed):
            load_scorer(str(model), "", FP32)


def test_scores_do_not_depend_on_their_batch(tiny, reward_model):
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    for score in (likelihood(tiny, FP32), classifier(reward_model, FP32)):
        ids = [row["id"] for row in ROWS]
        scores = dict(zip(ids, score(ROWS), strict=True))
        expected = [scores[row["id"]] for row in shuffled]
        assert score(shuffled) == pytest.approx(expected, abs=1e-5)
        assert score([]) == []
        in_blocks = blockwise(score, [], size=2)
        assert in_blocks(ROWS) == pytest.approx(score(ROWS), abs=1e-5)
        assert in_blocks([]) == []


LONG = {"id": "long", "prompt": "x" * 600, "response": "y"}  # where models have 512 positions


@pytest.mark.parametrize("kind", ["likelihood", "reward_model", "armorm"])
def test_a_text_beyond_the_context_has_no_score(kind, tiny, request):
    """Not an error, as the pipeline itself may have written it, unless nothing fits."""
    spec = kind if kind == "likelihood" else request.getfixturevalue(kind)
    score = load_scorer(str(spec), tiny, FP32)
    expected = score(ROWS)
    with_long = score([LONG, *ROWS[:2], LONG, *ROWS[2:]])
    assert (with_long[0], with_long[3]) == (None, None)
    assert with_long[1:3] + with_long[4:] == pytest.approx(expected, abs=1e-5)
    directory = tiny if kind == "likelihood" else spec
    problem = f"none of 2 records fits the context of {directory}; shorten them, or name another"
    with pytest.raises(InputError, match=problem):
        score([LONG, LONG])


def test_the_last_token_of_the_context_is_read(reward_model):
    """512 tokens fit in 512 positions."""
    [ids] = conversations(LocalModel(reward_model, FP32), [{**LONG, "prompt": ""}])
    fits = {**LONG, "prompt": "x" * (512 - len(ids))}
    score = classifier(reward_model, FP32)
    assert score([fits])[0] is not None
    assert score([{**fits, "prompt": fits["prompt"] + "x"}]) == [None]


def test_a_users_record_without_a_score_is_named():
    assert need_scores([1.0, 2.0], ROWS[:2]) == [1.0, 2.0]
    with pytest.raises(
        InputError, match="record r1: beyond the context of the scorer's model; remove it"
    ):
        need_scores([1.0, None], ROWS[:2])


# ---------------------------------------------------------------------------------- ArmoRM

ARMORM = {
    "architectures": ["LlamaForRewardModelWithGating"],
    "num_objectives": 5,
    "gating_temperature": 3,
    "gating_hidden_dim": 16,
    "gating_n_hidden": 2,
    "id2label": {"0": "LABEL_0"},
}
ARMORM_SHAPES = {
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


@pytest.fixture(scope="module")
def armorm(tmp_path_factory):
    """A checkpoint in ArmoRM's layout: names and shapes of its tensors, random numbers."""
    directory = tiny_checkpoint(tmp_path_factory.mktemp("armorm") / "model", seed=4, **CLASSIFIER)
    tensors = load_file(directory / "model.safetensors")
    del tensors["score.weight"]
    generator = torch.Generator().manual_seed(0)
    for name, shape in ARMORM_SHAPES.items():
        tensors[name] = torch.randn(shape, generator=generator)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**raw, **ARMORM}))
    return directory


def test_armorm_by_hand(armorm):
    """Hidden states by transformers, the rest in float64 from the published description."""
    from transformers import LlamaConfig, LlamaModel

    # the body, and the rest of the tensors in float64
    tensors = load_file(armorm / "model.safetensors")
    t = {name: value.double() for name, value in tensors.items()}
    raw = json.loads((armorm / "config.json").read_text())
    del raw["architectures"]
    body = LlamaModel(LlamaConfig(**raw)).eval()
    weights = {}
    for name, value in tensors.items():
        if name.startswith("model."):
            weights[name.removeprefix("model.")] = value
    body.load_state_dict(weights)

    chat = Chat(armorm)
    rows = [*ROWS, TALK]
    for row, score in zip(rows, scores_of(armorm, rows), strict=True):
        # the end token of the prompt, before the header of the answer
        ids = chat.encode(chat.render(whole(row), False))
        end = len(chat.encode(chat.render(turns_of(row), False))) - 1
        assert (ids[end], ids[end + 1]) == (0, 2)
        with torch.no_grad():
            hidden = body(torch.tensor([ids])).last_hidden_state[0].double()
        gate = hidden[end]
        for i in (0, 1):
            gate = t[f"gating.layers.{i}.weight"] @ gate + t[f"gating.layers.{i}.bias"]
            gate = gate.clamp(min=0)
        gate = t["gating.layers.2.weight"] @ gate + t["gating.layers.2.bias"]
        gate = (gate / 3).softmax(0) * t["gating.logit_scale"]
        rewards = (t["regression_layer.weight"] @ hidden[-1]) @ t["reward_transform_matrix"]
        expected = (gate * rewards).sum().item()
        assert score == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_armorm_as_published_has_19_objectives():
    published = {"num_objectives": 19, "gating_hidden_dim": 1024, "gating_n_hidden": 3}
    with torch.device("meta"):
        model = ArmoRM({**llama_config(), **ARMORM, **published})
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes["regression_layer.weight"] == (19, 64)
    assert shapes["reward_transform_matrix"] == (19, 19)
    assert shapes["gating.layers.3.weight"] == (19, 1024)
    assert shapes["gating.logit_scale"] == (1,)
    assert not {"lm_head.weight", "score.weight"} & shapes.keys()


# --------------------------------------------------------------------------------- the letter judge


def other_answers(text: str) -> list[dict]:
    return [{**row, "response": text} for row in (*ROWS, TALK)]


def test_the_letter_judge_reads_both_letters_in_both_orders(tiny):
    """Against transformers: P(A) against P(B) where the answer would start, averaged."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    chat = Chat(tiny)
    letters = [chat.encode(letter)[0] for letter in "AB"]

    def p_first(row, first, second):
        turns = [f"{m['role']}: {m['content']}" for m in turns_of(row)]
        prompt = TEMPLATE.format(
            conversation="\n\n".join(turns),
            a=first["response"],
            b=second["response"],
        )
        ids = chat.prompt_ids({"prompt": prompt})
        with torch.no_grad():
            [logits] = model(torch.tensor([ids])).logits
        return logits[-1, letters].softmax(-1)[0].item()

    rows = [*ROWS, TALK]
    others = other_answers("no {a}")
    score = load_scorer(f"judge:{tiny}", "", FP32)
    assert score.pairwise
    got = score(rows, others)
    expected = []
    for row, other in zip(rows, others, strict=True):
        shown_first = p_first(row, row, other)
        shown_second = 1 - p_first(row, other, row)
        expected.append((shown_first + shown_second) / 2)
    assert got == pytest.approx(expected, abs=1e-5)
    assert len({round(p, 4) for p in got}) > 3
    opposite = [1 - p for p in got]
    assert score(others, rows) == pytest.approx(opposite, abs=1e-5)
    assert score_pairs(score, rows, others) == (got, opposite)


def test_the_letter_judge_cannot_compare_what_it_cannot_read(tiny):
    """Whichever of both responses is too long; it is an error only where every pair is."""
    long = {**ROWS[0], "response": "y" * 600}
    score = load_scorer(f"judge:{tiny}", "", FP32)
    first, second = score(ROWS[:2], other_answers("no")[:2])
    good = [ROWS[0], long, ROWS[0], ROWS[1]]
    bad = [*other_answers("no")[:1], ROWS[0], long, *other_answers("no")[1:2]]
    expected = [first, None, None, second]
    assert score(good, bad) == pytest.approx(expected, abs=1e-5)
    opposite = [1 - first, None, None, 1 - second]
    ours, theirs = score_pairs(score, good, bad)
    assert ours == pytest.approx(expected, abs=1e-5)
    assert theirs == pytest.approx(opposite, abs=1e-5)
    with pytest.raises(InputError, match=f"none of 1 records fits the context of {tiny}"):
        score([long], [ROWS[0]])


def test_a_word_start_marker_is_not_the_letter(tiny, monkeypatch):
    """Tokenizers of the Llama 2 kind may write "A" as such a marker and the letter."""
    rows = [*ROWS, TALK]
    others = other_answers("no")
    expected = scores_of(f"judge:{tiny}", rows, others)
    assert expected != [0.5] * len(rows)
    encode = Chat.encode

    def with_marker(self, text):
        marker = [5] if text in ("A", "B") else []
        return marker + encode(self, text)

    monkeypatch.setattr(Chat, "encode", with_marker)
    assert scores_of(f"judge:{tiny}", rows, others) == expected


# ------------------------------------------------------------------------------- the table of names


def test_a_scorer_of_ones_own(tmp_path):
    code = "def words(rows):\n    return [float(len(row['response'].split())) for row in rows]\n"
    (tmp_path / "mine.py").write_text(code)
    assert scores_of(f"{tmp_path}/mine.py:words", ROWS) == [0, 2, 4, 6, 8, 10]
    assert load_scorer("none", "", FP32) is None
    for spec, message in (
        ("mine.py:letters", "has no function letters"),
        ("yours.py:words", "no such file"),
        ("nowhere", r"nowhere: not a scorer's name, and not a directory with a config\.json"),
    ):
        with pytest.raises(InputError, match=message):
            load_scorer(f"{tmp_path}/{spec}", "", FP32)
    for spec in ("judge", "endpoint", "endpoint:", "judge:"):
        with pytest.raises(InputError, match="not a scorer's name"):
            load_scorer(spec, "", FP32)


def test_likelihood_needs_a_model_to_score_under():
    for base in ("", None):
        message = "^--scorer likelihood scores under a model; give --base DIR$"
        with pytest.raises(InputError, match=message):
            load_scorer("likelihood", base, FP32)


def test_settled_needs_a_model_and_a_way_to_ask(tiny):
    for base in ("", None):
        message = "^--scorer settled scores under a model; give --base DIR$"
        with pytest.raises(InputError, match=message):
            load_scorer("settled", base, FP32, revision=ASK)
    for revision in (None, Revision()):
        message = "^--scorer settled asks to revise; give --revision.template$"
        with pytest.raises(InputError, match=message):
            load_scorer("settled", tiny, FP32, revision=revision)


def test_random_scores_depend_on_text_and_seed_alone():
    scores = scores_of("random", ROWS)
    assert scores == scores_of("random", ROWS)
    assert scores[::-1] == scores_of("random", ROWS[::-1])
    another = load_scorer("random", "", RunOptions(seed=1))
    assert scores != another(ROWS)
    assert len(set(scores)) == len(ROWS)
    assert 0 <= min(scores) < max(scores) < 1


def test_a_scorer_that_compares_cannot_score_a_single_answer(tiny, tmp_path):
    needed = "compares two answers; name one that scores each"
    with pytest.raises(InputError, match=needed):
        load_scorer(f"judge:{tiny}", tiny, FP32, single=True)
    (tmp_path / "mine.py").write_text(
        "def better(rows, others): return [1.0]\n"
        "better.pairwise = True\n"
        "def length(rows): return [1.0]\n"
    )
    with pytest.raises(InputError, match=r"mine\.py:better compares two answers"):
        load_scorer(f"{tmp_path}/mine.py:better", tiny, FP32, single=True)
    assert load_scorer(f"{tmp_path}/mine.py:better", tiny, FP32).pairwise
    single = load_scorer(f"{tmp_path}/mine.py:length", tiny, FP32, single=True)
    assert single([{}]) == [1.0]
    assert load_scorer("none", tiny, FP32, single=True) is None


def test_files_that_a_scorer_reads(tmp_path):
    for spec in ("none", "random", "likelihood", "settled", "endpoint:gpt"):
        assert scorer_files(spec) == []
    assert scorer_files("judge:/j") == [Path("/j")]
    assert scorer_files("/r") == [Path("/r")]
    (tmp_path / "mine.py").write_text("from helper import length\n")
    (tmp_path / "helper.py").write_text("def length(rows): ...\n")
    files = scorer_files(f"{tmp_path}/mine.py:length")
    assert {path.name for path in files} == {"mine.py", "helper.py"}


def test_scores_of_pairs():
    better = [{"response": "long"}, {"response": "a"}]
    worse = [{"response": "x"}, {"response": "bb"}]
    assert score_pairs(length, better, worse) == ([4, 1], [1, 2])
    assert score_pairs(None, better, worse) == ([None, None], [None, None])


def test_a_pair_has_two_scores_or_none():
    def short(rows: list[dict]) -> list[float | None]:
        return [float(len(row["response"])) if len(row["response"]) < 4 else None for row in rows]

    def compare(better: list[dict], worse: list[dict]) -> list[float | None]:
        return [None, 0.75, 2.0]

    good = [{"response": text} for text in ("long", "abc", "a")]
    bad = [{"response": text} for text in ("a", "ab", "too long")]
    scores = score_pairs(short, good, bad)
    assert scores == ([None, 3, None], [None, 2, None])
    assert score_gaps(scores) == [None, 1, None]
    compare.pairwise = True
    assert score_pairs(compare, good, bad) == ([None, 0.75, 2], [None, 0.25, -1])
    compare.logits = True
    assert score_pairs(compare, good, bad) == ([None, 0.75, 2], [None, -0.75, -2])


def test_quantiles():
    assert quantiles([5, 1, None, 2, 4, 3]) == "1 2 3 4 5"
    assert quantiles([]) == quantiles([None]) == "none"


# ------------------------------------------------------------------------------ interrupted scoring


def test_scoring_resumes_where_it_stopped(tmp_path):
    calls = []

    def score(rows):
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return length(rows)

    rows = []
    for i in range(1, 10):
        rows.append({"id": str(i), "prompt": "Prompt?", "response": "x" * i})
    scorer = blockwise(score, ["key"], tmp_path / "scratch", size=4)
    with pytest.raises(KeyboardInterrupt):
        scorer(rows)
    assert scorer(rows) == list(range(1, 10))
    assert calls == [4, 4, 1, 1]
    for file in (tmp_path / "scratch").iterdir():
        flip_a_bit(file)
    assert scorer(rows) == list(range(1, 10))
    assert calls == [4, 4, 1, 1, 4, 4, 1]
    other = blockwise(score, ["another model"], tmp_path / "scratch", size=4)
    assert other(rows) == list(range(1, 10))
    assert calls[7:] == [4, 4, 1]


def test_a_block_without_a_score_is_kept(tmp_path):
    calls = []

    def score(rows):
        calls.append(len(rows))
        return [1.0 if row["response"] == "x" else None for row in rows]

    rows = [{"id": str(i), "response": text} for i, text in enumerate("yyx")]
    for _ in range(2):
        assert blockwise(score, [], tmp_path, size=2)(rows) == [None, None, 1.0]
    assert calls == [2, 1]


def test_cached_scores_are_of_one_model(tiny, tmp_path):
    other = tiny_checkpoint(tmp_path / "other", seed=1)
    scratch = tmp_path / "scratch"
    first = load_scorer("likelihood", tiny, FP32, scratch)(ROWS)
    second = load_scorer("likelihood", other, FP32, scratch)(ROWS)
    assert second == pytest.approx(likelihood(other, FP32)(ROWS)) != first
    assert load_scorer("likelihood", tiny, FP32, scratch)(ROWS) == first
    assert len(list(scratch.iterdir())) == 2


def test_cached_scores_are_of_one_way_to_ask(tiny, tmp_path):
    """Another template or feedback gives other scores in the same folder."""
    scratch = tmp_path / "scratch"
    hints = tmp_path / "hints.py"
    code = "def hints(rows):\n    return [{'hint': '%s'} for row in rows]\n"

    def scores(revision: Revision, folder: Path | None = scratch) -> list[float]:
        return load_scorer("settled", tiny, FP32, folder, revision=revision)(ROWS)

    hints.write_text(code % "shorter")
    hinted = Revision(template="{draft} {hint}", feedback=f"{hints}:hints")
    asked = [ASK, Revision(template="{draft}?"), hinted]
    first = [scores(revision) for revision in asked]
    assert len({tuple(some) for some in first}) == 3
    assert first == [pytest.approx(scores(revision, None), rel=1e-5) for revision in asked]
    assert [scores(revision) for revision in asked] == first
    assert len(list(scratch.iterdir())) == 3

    # a changed file of feedback, in a new process
    hints.write_text(code % "longer")
    load_function.cache_clear()
    changed = scores(hinted)
    assert changed != first[2]
    assert changed == pytest.approx(scores(hinted, None), rel=1e-5)
    # the way to ask is no part of other scorers' scores
    plain = load_scorer("likelihood", tiny, FP32, scratch, revision=ASK)(ROWS)
    files = len(list(scratch.iterdir()))
    again = load_scorer("likelihood", tiny, FP32, scratch, revision=hinted)(ROWS)
    assert again == plain
    assert len(list(scratch.iterdir())) == files


# ------------------------------------------------------------------------ a reward model from pairs

BETTER = [
    {
        "id": f"p{i}",
        "prompt": f"Count to {i}.",
        "chosen": " ".join(map(str, range(i + 1))),
        "rejected": "no " * (i % 3 + 1),
    }
    for i in range(8)
]
SIDES = ("chosen", "rejected")


def train_command(model, pairs, out, nproc: int) -> subprocess.CompletedProcess:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    settings = "--dtype float32 --lr 3e-4 --epochs 6 --batch 4 --micro-batch-tokens 100"
    flags = ["--model", model, "--pairs", pairs, "--out", out, *settings.split()]
    launcher = torchrun if nproc > 1 else []
    command = [sys.executable, *launcher, "-m", "scorers.classifier", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.ranks)])
def test_a_reward_model_is_trained_and_transformers_scores_alike(tiny, tmp_path, nproc):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    out = tmp_path / "rm"
    done = train_command(tiny, write_rows(tmp_path / "pairs.jsonl", BETTER), out, nproc)
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout)["pairs"] == 8

    # the loss falls, and every chosen answer wins
    lines = read_rows(out / "metrics.jsonl")
    assert len(lines) == 12
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.2
    assert lines[-1]["accuracy"] == 1
    assert lines[-1]["margin"] > 0.2
    files = "chat_template.jinja config.json manifest.json metrics.jsonl model.safetensors"
    files += " tokenizer.json tokenizer_config.json"
    assert sorted(path.name for path in out.iterdir()) == files.split()
    rows = [{**row, "response": row[side]} for row in BETTER for side in SIDES]
    scores = scores_of(out, rows)
    for chosen, rejected in zip(scores[::2], scores[1::2], strict=True):
        assert chosen > rejected

    # transformers looks for the last token that is not padding
    model = AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.config.pad_token_id != tokenizer.eos_token_id
    tokenizer.pad_token_id = model.config.pad_token_id
    texts = [tokenizer.apply_chat_template(whole(row), tokenize=False) for row in rows]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        logits = model(**batch).logits  # (B, 1)
    assert logits[:, 0].tolist() == pytest.approx(scores, abs=1e-4)


def train(model, rows: list[dict], folder, **changes) -> dict:
    pairs = write_rows(folder / "pairs.jsonl", rows)
    o = RewardOptions(run=FP32, **changes)
    return counts_of(train_reward(model, pairs, folder / "rm", o))


@pytest.mark.slow
def test_pairs_that_do_not_fit_are_counted(tiny, tmp_path):
    """Longer than --max-length, or than the model's 512 positions: no last token to score."""
    long = [{**BETTER[0], "id": f"long{n}", "rejected": "x" * n} for n in (120, 900)]
    for most, fitting in ((100, 8), (2048, 9)):
        counts = train(tiny, BETTER + long, tmp_path / str(most), max_length=most, batch=8)
        found = (counts["pairs"], counts["examples"], counts["too_long"])
        assert found == (10, fitting, 10 - fitting)
    with pytest.raises(InputError, match="no pair fits --max-length 2048 and the model's context"):
        train(tiny, long[1:], tmp_path / "none")
    message = "--loss-on-prompt: a reward model is scored at the last token only"
    with pytest.raises(InputError, match=message):
        train(tiny, BETTER, tmp_path / "prompt", loss_on_prompt=True)


def test_the_first_step_of_bradley_terry_by_hand(tiny, tmp_path):
    """The new head is drawn from the seed, the loss is that of its scores."""
    start_reward_model(tiny, tmp_path / "start", Chat(tiny), 0, 0)
    score = classifier(tmp_path / "start", FP32)
    gaps = []
    for row in BETTER:
        sides = [{**row, "response": row[side]} for side in SIDES]
        chosen, rejected = score(sides)
        gaps.append(chosen - rejected)
    train(tiny, BETTER, tmp_path, lr=1e-9, batch=8)
    [line] = read_rows(tmp_path / "rm" / "metrics.jsonl")
    loss = sum(math.log1p(math.exp(-gap)) for gap in gaps) / 8
    assert line["loss"] == pytest.approx(loss, abs=1e-5)
    assert line["margin"] == pytest.approx(sum(gaps) / 8, abs=1e-5)
    assert line["accuracy"] == sum(gap > 0 for gap in gaps) / 8


def test_an_interrupted_training_leaves_nothing_in_out(tiny, tmp_path, monkeypatch):
    """Nothing half done lies in --out, and a rerun finishes."""
    monkeypatch.setattr("scorers.classifier.fit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(tiny, BETTER, tmp_path, batch=8)
    assert (tmp_path / "rm.partial" / "start" / "score.safetensors").is_file()
    assert not (tmp_path / "rm").exists()
    monkeypatch.undo()
    assert train(tiny, BETTER, tmp_path, batch=8)["pairs"] == 8
    assert not (tmp_path / "rm.partial").exists()


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_scores_of_several_ranks_are_in_the_order_of_the_records(monkeypatch):
    def two_ranks(done: dict) -> list[dict]:
        parts = [{}, {}]
        for number, scores in done.items():
            parts[1 - number % 2][number] = scores
        return parts

    monkeypatch.setattr("scorers.base.gather", two_ranks)
    rows = [{"id": str(n), "response": "x" * n} for n in range(7)]
    assert blockwise(length, [], size=2)(rows) == list(range(7))


def test_cached_scores_are_of_one_dtype(tiny, tmp_path):
    first = load_scorer("likelihood", tiny, FP32, tmp_path)(ROWS)
    bf16 = load_scorer("likelihood", tiny, RunOptions(dtype="bfloat16"), tmp_path)(ROWS)
    assert bf16 != first
    assert load_scorer("likelihood", tiny, FP32, tmp_path)(ROWS) == first

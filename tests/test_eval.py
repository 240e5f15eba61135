"""The held-out measures, the demo's rubric as an evaluation, and the recipes."""

import json
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, tiny_checkpoint

import loop
import train
from data import Chat, Common, InputError, load_function, parse_options, read_jsonl
from model import Packed, load

COMMON = Common(dtype="float32")
TEXTS = ["red fox", "a blue owl sings", "no", "the end of it", "so it is"]


@pytest.fixture(scope="module")
def heldout():
    return load_function("eval/heldout.py:evaluate")


@pytest.fixture(scope="module")
def another(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("another") / "model", seed=5)


def rows(responses: list[str]) -> list[dict]:
    return [
        {"id": str(i), "prompt": f"Question {i}?", "response": text}
        for i, text in enumerate(responses)
    ]


def by_hand(model, row) -> float:
    """Mean log-prob of answer and end token from whole logits, one sequence."""
    chat, net = Chat(model), load(model, torch.float32)
    prompt, answer = chat.prompt_ids(row), chat.response_ids(row["response"])
    ids = torch.tensor(prompt + answer)
    logits = net(ids, Packed([len(ids)]), torch.arange(len(ids)))
    logps = logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
    return logps[-len(answer) :].mean().item()


# ---- eval/heldout.py ----


def test_win_rate_against_itself_is_one_half(heldout, tiny):
    answers = rows(TEXTS)
    assert heldout(answers, answers, answers, tiny, tiny, COMMON)["win_rate"] == 0.5


def test_win_rate_counts_likelier_answers_under_the_base_model(heldout, tiny, another):
    """By hand; the model that wrote the answers is another one, and does not matter."""
    ours, theirs = (
        rows(TEXTS),
        rows([TEXTS[0], "x", "the", "qz", "and then"]),
    )  # the first is a draw
    wins = [
        0.5 if a == b else float(by_hand(tiny, a) > by_hand(tiny, b))
        for a, b in zip(ours, theirs, strict=True)
    ]
    assert wins.count(0.5) == 1 and 1.0 in wins and 0.0 in wins and sum(wins) != 2.5, (
        "else the test cannot tell sides"
    )
    assert heldout(ours, ours, theirs, another, tiny, COMMON)["win_rate"] == pytest.approx(
        sum(wins) / 5
    )
    assert heldout(theirs, ours, ours, another, tiny, COMMON)["win_rate"] == pytest.approx(
        1 - sum(wins) / 5
    )


def test_score_is_the_likelihood_of_gold_under_the_policy(heldout, tiny, another):
    answers, gold = rows(TEXTS), rows(list(reversed(TEXTS)))
    values = [by_hand(another, row) for row in gold]
    result = heldout(answers, gold, answers, another, tiny, COMMON)
    mean = sum(values) / 5
    assert result["score"] == pytest.approx(mean, abs=1e-5)
    assert result["se"] == pytest.approx(
        (sum((v - mean) ** 2 for v in values) / 4) ** 0.5 / 5**0.5, abs=1e-5
    )
    assert result["score"] != pytest.approx(sum(by_hand(tiny, row) for row in gold) / 5, abs=1e-3)
    assert result["words"] == pytest.approx((2 + 4 + 1 + 4 + 3) / 5)


def test_standard_error_by_hand():
    se = load_function("eval/heldout.py:standard_error")
    assert se([1.0, 2.0, 3.0, 6.0]) == pytest.approx(
        (14 / 3 / 4) ** 0.5
    )  # squared deviations 4 + 1 + 0 + 9
    assert se([3.0]) == 0 and se([2.0, 2.0]) == 0


def test_an_improver_has_no_likelihood_of_its_own(heldout, tiny):
    answers = rows(TEXTS)
    assert heldout(answers, answers, answers, None, tiny, COMMON).keys() == {"win_rate", "words"}


def test_answers_of_different_records_are_an_error(heldout, tiny):
    answers = rows(TEXTS)
    for base in (list(reversed(answers)), answers[:-1]):
        with pytest.raises(ValueError):
            heldout(answers, answers, base, tiny, tiny, COMMON)


# ---- demo/build.py ----


@pytest.fixture(scope="module")
def demo():
    return load_function("demo/build.py:evaluate"), load_function("demo/build.py:score")


def test_demo_evaluation_of_hand_made_answers(demo):
    evaluate, score = demo
    prompts = [
        "Describe a tiger.",
        "Where does a fox live?",
        "Describe a lion.",
        "Describe an owl.",
    ]
    world = evaluate.__globals__["world"]
    gold = [
        {"id": str(i), "prompt": p, "response": world.gold(world.parse(p))}
        for i, p in enumerate(prompts)
    ]
    result = evaluate(gold, gold, gold, None, None, COMMON)
    assert {
        name: result[name] for name in ("score", "coverage", "accuracy", "form", "se")
    } == pytest.approx({"score": 1, "coverage": 1, "accuracy": 1, "form": 1, "se": 0})
    assert result["words"] == sum(len(row["response"].split()) for row in gold) / 4
    half = gold[:2] + [{**row, "response": "um"} for row in gold[2:]]
    marks = [world.rubric(row["prompt"], row["response"])["score"] for row in half]
    result = evaluate(half, gold, gold, None, None, COMMON)
    mean = sum(marks) / 4
    assert marks[:2] == [1, 1] and max(marks[2:]) < 0.3 and result["score"] == pytest.approx(mean)
    assert result["se"] == pytest.approx((sum((m - mean) ** 2 for m in marks) / 3 / 4) ** 0.5)
    assert score(half) == pytest.approx(marks)
    assert score([{"prompt": "Describe a unicorn.", "response": gold[0]["response"]}]) == [0.0]


def test_the_demos_data_keeps_held_out_prompts_out(demo, tmp_path, monkeypatch):
    made = demo[0].__globals__
    for name, few in {
        "WEB": 400,
        "PARAGRAPHS": 20,
        "PRACTICE": 200,
        "ASKING": 40,
        "CORPUS": 50,
    }.items():
        if name in made:
            monkeypatch.setitem(made, name, few)
    made["write_data"](tmp_path, 0)
    texts = {
        name: read_jsonl(tmp_path / f"{name}.jsonl", "prompt", "response")
        for name in ("seeds", "heldout", "base")
    }
    hidden = {row["prompt"] for row in texts["heldout"]}
    assert (
        len(hidden) == len(texts["heldout"]) == 150
        and len(texts["seeds"]) == 100
        and len(texts["base"]) > 500
    )
    assert not hidden & {row["prompt"] for row in texts["seeds"] + texts["base"]}
    asked = [row["response"] for row in texts["base"] if row["prompt"].startswith("Ask something")]
    assert asked and all(
        text.startswith("<question>") and text.endswith("</question>") for text in asked
    )
    assert not hidden & {
        text.removeprefix("<question>").removesuffix("</question>") for text in asked
    }
    world = made["world"]
    assert {world.rubric(row["prompt"], row["response"])["score"] for row in texts["seeds"]} == {
        1.0
    }


# ---- recipes ----


def recipe(name: str) -> loop.Options:
    return parse_options(loop.Options, ["--config", str(ROOT / "recipes" / f"{name}.json")])


def fields(options: dict, prefix: str = "") -> dict:
    """Nested options by dotted name."""
    flat = {}
    for name, value in options.items():
        flat |= (
            fields(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return flat


def test_the_recipes_are_these():
    assert {path.stem for path in (ROOT / "recipes").glob("*")} == {
        "demo",
        "smollm2",
        "mistral-7b",
        "llama3-8b",
    }


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes").glob("*.json")), ids=lambda path: path.stem
)
def test_recipes_hold_known_options_of_the_right_type(path, tmp_path):
    text = json.loads(path.read_text())
    given, parsed = fields(text), fields(asdict(recipe(path.stem)))
    defaults = fields(asdict(loop.Options()))
    assert {name: parsed[name] for name in given} == given
    for name, value in (
        (name, value) for name, value in given.items() if name in defaults
    ):  # not those of a loss
        assert type(value) is type(defaults[name]) or (type(value), type(defaults[name])) == (
            int,
            float,
        ), name
    wrong = tmp_path / "wrong.json"
    for more, name in (({"mistake": 1}, "mistake"), ({"policy": {"mistake": 1}}, "policy.mistake")):
        wrong.write_text(json.dumps({**text, **more}))
        with pytest.raises(InputError, match=f"--{name}=1"):
            parse_options(loop.Options, ["--config", str(wrong)])
    for spec in (text.get("prepare", ""), text.get("evaluate", "")):
        assert not spec or callable(load_function(spec))


PAPER = {
    "iters": 4,
    "rejected": "base",
    "start": "base",
    "data": "cumulative",
    "one_shot": False,
    "dtype": "bfloat16",
    "generator.keywords": 3,
    "generator.noise": 1,
    "generator.lists": 64_000,
    "generator.prompts": 50_000,
    "generator.temperature": 0.7,
    "generator.lr": 1e-6,
    "generator.batch": 32,
    "generator.epochs": 3,
    "generator.warmup": 0.1,
    "generator.max_length": 8000,
    "generator.loss_on_prompt": False,
    "generator.recompute": True,
    "answers.temperature": 0.7,
    "answers.top_p": 1.0,
    "improver.drafts": 1,
    "improver.rewrites": 1,
    "improver.draft_competes": False,
    "improver.pick": "none",
    "improver.temperature": 0.7,
    "improver.lr": 1e-6,
    "improver.batch": 32,
    "improver.epochs": 3,
    "improver.warmup": 0.1,
    "improver.max_length": 6000,
    "improver.loss_on_prompt": False,
    "improver.recompute": True,
    "filter.repetition": 0.5,
    "filter.pairs": 10_000,
    "policy.loss": "simpo",
    "policy.beta": 2.0,
    "policy.gamma": 1.6,
    "policy.nll": 0.0,
    "policy.batch": 128,
    "policy.epochs": 1,
    "policy.warmup": 0.1,
    "policy.recompute": True,
}


@pytest.mark.parametrize(
    "name, lr, max_length", [("mistral-7b", 3e-7, 1024), ("llama3-8b", 6e-7, 2048)]
)
def test_the_papers_recipes_have_the_papers_values(name, lr, max_length):
    """What the paper states, and SimPO's own releases where it does not (policy: lr, batch, epochs, max_length)."""
    parsed = fields(asdict(recipe(name)))
    wanted = {**PAPER, "policy.lr": lr, "policy.max_length": max_length, "out": f"runs/{name}"}
    assert {option: parsed[option] for option in wanted} == wanted
    assert not parsed["prepare"] and not parsed["model"]


# ---- TensorBoard ----


def test_tensorboard_gets_every_metric_and_voids_what_is_repeated(tmp_path, monkeypatch):
    """A stand-in for the package, which is no requirement: what it is told, in which order."""
    told = []

    class Writer:
        def __init__(self, folder, purge_step):
            told.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            told.append((name, value, step))

        def flush(self):
            told.append("flush")

    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer)
    )
    for line in ({"step": 3, "loss": 0.5}, {"step": 4, "loss": 0.25}):
        train.log(tmp_path, line)
    assert told == [
        (str(tmp_path / "tensorboard"), 3),
        ("step", 3, 3),
        ("loss", 0.5, 3),
        "flush",
        ("step", 4, 4),
        ("loss", 0.25, 4),
        "flush",
    ]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # an import now fails
    load_function("eval/tensorboard.py:add")(tmp_path / "other", {"step": 1})
    assert not (tmp_path / "other").exists()

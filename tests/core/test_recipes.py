"""The recipes: known options of the right type, and the paper's values where the paper has some."""

import json
import tomllib

import pytest
from conftest import ROOT

import loop
from formats.plugins import load_function
from plumbing.files import InputError
from plumbing.options import as_dict, parse_options

RECIPES = sorted((ROOT / "recipes").glob("*.toml"))


def recipe(name: str) -> dict:
    """All options of a recipe, defaults included, by dotted name."""
    path = ROOT / "recipes" / f"{name}.toml"
    return flat(as_dict(parse_options(loop.Options, ["--config", str(path)])))


def flat(options: dict, prefix: str = "") -> dict:
    """Nested options by dotted name."""
    found = {}
    for name, value in options.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def test_the_recipes_are_these():
    names = {path.stem for path in (ROOT / "recipes").glob("*.*")}
    assert names == {"demo", "facts", "constraints", "smollm2", "mistral-7b", "llama3-8b"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_hold_known_options_of_the_right_type(path, tmp_path):
    text = tomllib.loads(path.read_text())
    given = flat(text)
    parsed = recipe(path.stem)
    assert {name: parsed[name] for name in given} == given
    defaults = flat(as_dict(loop.Options()))
    for name in given.keys() & defaults.keys():  # the others are parameters of a loss
        types = type(given[name]), type(defaults[name])
        # a path is a text in a recipe, and may have no default
        assert types[0] is types[1] or types in ((int, float), (str, type(None))), name

    # a mistake in any table is an error
    wrong = tmp_path / "wrong.json"
    mistakes = {
        "--mistake=1": {**text, "mistake": 1},
        "--policy.mistake=1": {**text, "policy": {**text["policy"], "mistake": 1}},
    }
    for flag, options in mistakes.items():
        wrong.write_text(json.dumps(options))
        with pytest.raises(InputError, match=flag):
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
    "generator.lr": 1e-6,
    "generator.batch": 32,
    "generator.epochs": 3,
    "generator.warmup_ratio": 0.1,
    "generator.max_length": 8000,
    "generator.loss_on_prompt": False,
    "generator.activation_checkpointing": True,
    "prompts.lists": 64_000,
    "prompts.max_prompts": 50_000,
    "prompts.temperature": 0.7,
    "answers.temperature": 0.7,
    "answers.top_p": 1.0,
    "improver.drafts": 1,
    "improver.lr": 1e-6,
    "improver.batch": 32,
    "improver.epochs": 3,
    "improver.warmup_ratio": 0.1,
    "improver.max_length": 6000,
    "improver.loss_on_prompt": False,
    "improver.activation_checkpointing": True,
    "rewrites.best_of": 1,
    "rewrites.draft_competes": False,
    "rewrites.scorer": "none",
    "rewrites.temperature": 0.7,
    "pairs.max_repetition": 0.5,
    "pairs.max_pairs": 10_000,
    "policy.loss": "simpo",
    "policy.beta": 2.0,
    "policy.gamma": 1.6,
    "policy.nll": 0.0,
    "policy.batch": 128,
    "policy.epochs": 1,
    "policy.warmup_ratio": 0.1,
    "policy.activation_checkpointing": True,
}


def test_mistrals_recipe_has_the_papers_scorer_and_threshold():
    parsed = recipe("mistral-7b")
    for section in ("pairs", "improver"):
        rule = (parsed[f"{section}.scorer"], parsed[f"{section}.threshold"])
        assert rule == ("pairrm", 0.2)


@pytest.mark.parametrize(
    ("name", "lr", "max_length"), [("mistral-7b", 3e-7, 1024), ("llama3-8b", 6e-7, 2048)]
)
def test_the_papers_recipes_have_the_papers_values(name, lr, max_length):
    """What the paper states; else SimPO's releases (policy: lr, batch, epochs, max_length)."""
    parsed = recipe(name)
    own = {"policy.lr": lr, "policy.max_length": max_length, "out": f"runs/{name}"}
    wanted = {**PAPER, **own}
    assert {option: parsed[option] for option in wanted} == wanted
    assert not parsed["prepare"] and not parsed["model"]

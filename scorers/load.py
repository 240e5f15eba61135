"""The table of scorers. --scorer takes one of

    none                no scorer
    random              a control: a random number per text
    likelihood          mean log-prob per token under the base model (likelihood.py)
    DIR                 a reward model: one output (classifier.py) or ArmoRM (armorm.py)
    judge:DIR           a chat model on this machine that compares (letter_judge.py)
    endpoint:NAME       a chat model behind an OpenAI-compatible endpoint (endpoint.py)
    FILE.py:FUNCTION    your own; every rank calls it with all records

docs/scorers.md shows how to write one, and how to measure one.
"""

from pathlib import Path

from plumbing.options import RunOptions, load_function, plugin_files
from plumbing.records import InputError, load_json, rng
from plumbing.stage import fingerprint
from scorers.armorm import armorm
from scorers.base import Scorer, blockwise, is_pairwise
from scorers.classifier import classifier
from scorers.endpoint import endpoint
from scorers.letter_judge import letter_judge
from scorers.likelihood import likelihood

# Reward models by the architecture in their config.json; all others are classifiers.
REWARD_MODELS = {"LlamaForRewardModelWithGating": armorm}


def load_scorer(
    spec: str,
    base: str | Path | None,
    run: RunOptions,
    scratch: Path | None = None,
    single: bool = False,
) -> Scorer | None:
    """The scorer that --scorer names; None for "none". Weights are read when it is first called.

    base: the checkpoint under which `likelihood` is measured. scratch: a folder for the scores of
    finished blocks. single: answers have no counterpart, so a scorer that compares raises
    InputError. A rank may call it alone.
    """
    scorer = make_scorer(spec, base, run, scratch)
    if single and is_pairwise(scorer):
        needed = "the improver needs one that scores each, such as likelihood"
        raise InputError(f"scorer {spec} compares two answers; {needed}")
    return scorer


def make_scorer(spec: str, base, run: RunOptions, scratch: Path | None) -> Scorer | None:
    # scorers that run no model on this machine
    kind, _, name = spec.partition(":")
    if ".py:" in spec:
        return load_function(spec)
    if spec == "none":
        return None
    if spec == "random":
        return random_scorer(run)
    if kind == "endpoint" and name:
        return endpoint(name, run)

    # scorers that run the model of a directory, in blocks
    if spec == "likelihood":
        if not base:
            raise InputError("--scorer likelihood scores under a model; give --base DIR")
        directory = base
        score = likelihood(directory, run)
    elif kind == "judge" and name:
        directory = name
        score = letter_judge(directory, run)
    else:
        directory = spec
        score = reward_model(directory, run)
    key = []
    if scratch:
        template = run.chat_template
        if Path(template).is_file():
            template = fingerprint(template)
        key = [spec, fingerprint(directory), run.dtype, template]
    return blockwise(score, key, scratch)


def reward_model(directory: str, run: RunOptions) -> Scorer:
    path = Path(directory) / "config.json"
    if not path.is_file():
        problem = "not a scorer's name, and not a directory with a config.json"
        raise InputError(f"--scorer {directory}: {problem}; see --help")
    architecture = (load_json(path).get("architectures") or [""])[0]
    return REWARD_MODELS.get(architecture, classifier)(directory, run)


def random_scorer(run: RunOptions) -> Scorer:
    """A number in [0, 1) that depends on seed, record and text alone."""

    def score(rows: list[dict]) -> list[float]:
        keys = [(row["id"], row["response"]) for row in rows]
        return [rng(run.seed, "random scorer", *key).random() for key in keys]

    return score


def scorer_files(spec: str) -> list[Path]:
    """The files and directories that a stage with this scorer reads, beside its base model."""
    if ".py:" in spec:
        return plugin_files(spec)
    if spec in ("none", "random", "likelihood") or spec.startswith("endpoint:"):
        return []
    return [Path(spec.removeprefix("judge:"))]

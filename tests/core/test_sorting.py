"""The sorting world: its lists, its marks by hand, its data, and that no mark steers the loop."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import read_rows
from cycle import command, counts

import loop
from demo import sorting
from demo.sorting import (
    LENGTH,
    WORDS,
    asking,
    evaluate,
    marks,
    passes,
    prompt_of,
    revise,
    revising,
    score,
    slip,
    tau,
    well_formed,
    words_of,
    write_data,
)
from formats.records import read_jsonl
from plumbing.files import flatten, read_text
from plumbing.options import RunOptions, as_dict, parse_options

pytest_plugins = ["cycle"]
FP32 = RunOptions(dtype="float32")


def bubble_sort(words: list[str], k: int) -> list[str]:
    """k plain passes: neighbours in the wrong order change places, from left to right."""
    words = list(words)
    for _ in range(k):
        for i in range(len(words) - 1):
            if words[i] > words[i + 1]:
                words[i], words[i + 1] = words[i + 1], words[i]
    return words


def shuffled(seed: int, length: int = LENGTH) -> list[str]:
    return random.Random(seed).sample(WORDS, length)


# ------------------------------------------------------------------------------------------- lists


def test_there_is_a_word_for_each_letter():
    assert [word[0] for word in WORDS] == [chr(ord("a") + i) for i in range(26)]
    assert sorted(WORDS) == WORDS


@pytest.mark.parametrize("k", [0, 1, 2, 3, 7, 9, 12])
def test_passes_are_those_of_bubble_sort(k):
    for seed in range(50):
        for length in (1, 2, 5, LENGTH):
            words = shuffled(seed, length)
            before = list(words)
            assert passes(words, k) == bubble_sort(words, k)
            assert words == before
    assert passes([], k) == []
    reverse = WORDS[::-1]
    assert passes(reverse, 25) == WORDS
    assert passes(reverse, 24) != WORDS, "one pass too few"


def test_slips_lose_double_and_make_up_words():
    found = Counter()
    for seed in range(3000):
        draft = shuffled(seed)
        before = list(draft)
        changed = slip(draft, random.Random(seed))
        assert draft == before
        kept = list(dict.fromkeys(changed))
        lost = set(draft) - set(changed)
        strange = set(changed) - set(draft)
        doubled = len(changed) - len(kept)
        assert strange <= set(WORDS)
        assert max(len(lost), len(strange), doubled) <= 1
        assert not (strange and doubled)
        found.update(lost=bool(lost), strange=bool(strange), doubled=bool(doubled))
        # what stays is in the draft's order; a made-up word may be the lost one, elsewhere
        if lost:
            common = [word for word in kept if word in draft]
            assert common == [word for word in draft if word in kept]
        if doubled:
            [twice] = [word for word in kept if changed.count(word) == 2]
            first = changed.index(twice)
            gap = changed[first + 1 :].index(twice) + 1
            assert gap in (2, 3, 4) or changed[-1] == twice
    shares = {kind: number / 3000 for kind, number in found.items()}
    # of 0.8 and 0.4, one in seventeen made-up words is the one that was lost
    assert shares["lost"] == pytest.approx(0.8 - 0.8 * 0.4 / 17, abs=0.03)
    assert shares["strange"] == pytest.approx(0.4 - 0.8 * 0.4 / 17, abs=0.03)
    assert shares["doubled"] == pytest.approx(0.4, abs=0.03)


def test_a_revision_puts_lost_words_in_front_and_takes_surplus_ones_out():
    words = ["fig", "apple", "cherry", "date"]
    draft = ["cherry", "apple", "zest", "cherry"]
    assert revise(words, draft, 0) == ["fig", "date", "cherry", "apple"]
    assert revise(words, draft, 1) == ["date", "cherry", "apple", "fig"]
    assert revise(words, draft, 2) == ["cherry", "apple", "date", "fig"]
    assert revise(words, draft, 3) == sorted(words)
    assert revise(words, [], 1) == passes(words, 1)
    for seed in range(50):
        draft = passes(shuffled(seed), 2)
        assert revise(shuffled(seed), draft, 3) == passes(shuffled(seed), 5)


def ill_formed() -> dict[str, str]:
    ten = WORDS[10:20]
    good = prompt_of(ten)
    return {
        "nine words": prompt_of(ten[:9]),
        "eleven words": prompt_of(WORDS[:11]),
        "doubled": prompt_of([*ten[:9], ten[0]]),
        "ten and one doubled": prompt_of([*ten, ten[0]]),
        "unknown": prompt_of([*ten[:9], "tomato"]),
        "capital": prompt_of([*ten[:9], "Apple"]),
        "comma": good.replace(" ", ", ").replace("Sort:,", "Sort:"),
        "other prefix": good.replace("Sort:", "Order:"),
        "small prefix": good.replace("Sort:", "sort:"),
        "no prefix": " ".join(ten),
        "prefix twice": f"Sort: {good}",
        "no space": good.replace("Sort: ", "Sort:"),
        "two spaces": good.replace("Sort: ", "Sort:  "),
        "line break": good.replace("Sort: ", "Sort:\n"),
        "space at the end": f"{good} ",
        "draft": f"{good} Draft: {' '.join(ten)}",
        "nothing": "",
        "no words": "Sort:",
    }


@pytest.mark.parametrize("kind", ill_formed())
def test_ill_formed_prompts(kind):
    assert not well_formed({"prompt": ill_formed()[kind]})


def test_well_formed_prompts():
    for seed in range(20):
        words = shuffled(seed)
        assert well_formed({"prompt": prompt_of(words), "keywords": words[:3]})
        assert words_of(prompt_of(words)) == words


# ------------------------------------------------------------------------------------------- marks

THREE = "Sort: cherry apple banana"
BY_HAND = {
    # answer: (score, order, whole)
    "apple banana cherry": (1, 1, 1),
    " apple  banana\ncherry ": (1, 1, 1),
    "cherry banana apple": (-1, -1, 1),
    "banana apple cherry": (1 / 3, 1 / 3, 1),
    "cherry apple banana": (-1 / 3, -1 / 3, 1),
    # lost, doubled, made up
    "apple cherry": (0, 1, 0),
    "cherry apple": (0, -1, 0),
    "apple banana banana cherry": (0, 0.9, 0),
    "cherry apple banana cherry cherry": (0, -1 / 3 - 0.2, 0),
    "apple zest banana cherry": (0, 0.9, 0),
    "apple banana tomato": (0, 0.9, 0),
    "Apple banana cherry": (0, 0.9, 0),
    # little or nothing
    "banana": (0, 0, 0),
    "zest": (0, -0.1, 0),
    "": (0, 0, 0),
}


@pytest.mark.parametrize("answer", BY_HAND)
def test_marks_by_hand(answer):
    found = marks(THREE, answer)
    assert list(found) == ["score", "order", "whole"]
    assert list(found.values()) == pytest.approx(BY_HAND[answer])
    assert score([{"prompt": THREE, "response": answer}]) == [found["score"]]


def test_tau_by_hand():
    assert tau(WORDS) == 1
    assert tau(WORDS[::-1]) == -1
    assert tau([]) == tau(["fig"]) == 0
    # of six pairs one is wrong, then three
    assert tau(["banana", "apple", "cherry", "date"]) == pytest.approx(4 / 6)
    assert tau(["date", "apple", "banana", "cherry"]) == 0


def test_a_pass_more_never_lowers_the_score():
    for seed in range(50):
        words = shuffled(seed)
        taus = [tau(passes(words, k)) for k in range(LENGTH)]
        assert taus == sorted(taus)
        assert taus[-1] == 1


def test_evaluation_of_hand_made_answers():
    texts = ["apple banana cherry", "cherry banana apple", "banana apple cherry", "apple cherry"]
    rows = []
    for i, text in enumerate(texts):
        rows.append({"id": str(i), "prompt": THREE, "response": text})
    result = evaluate(rows, [], [], None, Path("none"), FP32)
    scores = [1, -1, 1 / 3, 0]
    mean = sum(scores) / 4
    variance = sum((one - mean) ** 2 for one in scores) / 3
    wanted = {"score": mean, "se": (variance / 4) ** 0.5, "whole": 0.75, "words": 11 / 4}
    wanted["order"] = (1 - 1 + 1 / 3 + 1) / 4
    found = {name: result[name] for name in wanted}
    assert found == pytest.approx(wanted)
    assert result["scores"] == pytest.approx(scores)
    assert result.keys() == {*wanted, "scores"}


# -------------------------------------------------------------------------------------------- data

FEW = {"ANSWERS": 300, "REVISIONS": 300, "ASKING": 150, "SEEDS": 20, "HELDOUT": 30, "CORPUS": 40}


@pytest.fixture
def few(monkeypatch):
    for name, number in FEW.items():
        monkeypatch.setattr(sorting, name, number)


@pytest.fixture
def data(few, tmp_path) -> dict[str, list[dict]]:
    write_data(tmp_path, 0)
    names = ("seeds", "heldout", "base")
    return {name: read_jsonl(tmp_path / f"{name}.jsonl", "prompt", "response") for name in names}


def kind_of(row: dict) -> str:
    if row["prompt"].startswith("Ask something about: "):
        return "asking"
    return "revising" if " Draft: " in row["prompt"] else "answering"


def test_gold_prompts_are_nowhere_in_the_base_text(data):
    gold = [row["prompt"] for row in data["seeds"] + data["heldout"]]
    assert len(gold) == len(set(gold)) == FEW["SEEDS"] + FEW["HELDOUT"]
    assert all(well_formed(row) for row in data["seeds"] + data["heldout"])
    texts = [text for row in data["base"] for text in (row["prompt"], row["response"])]
    everything = "\n".join(texts)
    assert everything.count("Sort: ") == len(data["base"])
    for prompt in gold:
        assert prompt not in everything


def test_seeds_and_held_out_records_have_gold_answers(data):
    rows = data["seeds"] + data["heldout"]
    assert score(rows) == [1] * len(rows)


def test_counts_of_the_data(data, tmp_path):
    assert [len(data[name]) for name in ("seeds", "heldout")] == [20, 30]
    found = Counter(kind_of(row) for row in data["base"])
    assert found == {"answering": 300, "revising": 300, "asking": 150}
    paragraphs = read_text(tmp_path / "corpus.txt").split("\n\n")
    assert len(paragraphs) == 40
    for text in paragraphs:
        assert well_formed({"prompt": f"Sort: {text}"})


def test_the_base_text_answers_with_exactly_one_pass(data):
    rows = [row for row in data["base"] if kind_of(row) == "answering"]
    lists = [words_of(row["prompt"]) for row in rows]
    assert [row["response"].split() for row in rows] == [bubble_sort(some, 1) for some in lists]
    assert sum(one == 1 for one in score(rows)) < len(rows) / 20, "hardly any is sorted"


def test_the_base_text_revises_with_up_to_three_passes(data):
    slips = 0
    for row in data["base"]:
        if kind_of(row) == "revising":
            prompt, draft = row["prompt"].split(" Draft: ")
            words = words_of(prompt)
            revisions = [revise(words, draft.split(), k) for k in (1, 2, 3)]
            assert row["response"].split() in revisions
            assert sorted(row["response"].split()) == sorted(words)
            slips += sorted(draft.split()) != sorted(words)
    # one half of them, of which 4 in 100 have neither a lost word nor a surplus one
    assert slips / 300 == pytest.approx(0.48, abs=0.08)


def test_a_draft_has_up_to_seven_passes_and_a_revision_up_to_three_more():
    drafts = Counter()
    further = Counter()
    words = WORDS[:LENGTH][::-1]  # reversed, each pass changes it
    for seed in range(600):
        row = revising(words, random.Random(seed))
        draft = row["prompt"].split(" Draft: ")[1].split()
        done = [k for k in range(LENGTH) if passes(words, k) == draft]
        if done:
            drafts.update(done)
            revised = [k for k in range(1, 4) if passes(draft, k) == row["response"].split()]
            # sorted from nine passes on
            further.update(revised[:1] if done[0] < 7 else [])
    assert {*drafts} == {1, 2, 3, 4, 5, 6, 7}
    total = further.total()
    shares = [further[k] / total for k in (1, 2, 3)]
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.1)


def test_practice_for_the_generator_has_two_or_three_keywords_of_its_list():
    own = Counter()
    for seed in range(400):
        words = shuffled(seed)
        row = asking(words, random.Random(seed))
        keywords = row["prompt"].removeprefix("Ask something about: ").removesuffix(".").split(", ")
        assert len(set(keywords)) == 3
        assert row["response"] == f"<question>{prompt_of(words)}</question>"
        own[sum(word in words for word in keywords)] += 1
    assert {*own} == {2, 3}
    assert own[3] / 400 == pytest.approx(0.5, abs=0.1)


def test_data_follow_from_the_seed(few, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_data(tmp_path / name, seed)
    for name in ("seeds.jsonl", "heldout.jsonl", "base.jsonl", "corpus.txt"):
        first, again, other = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert first == again
        assert first != other


# -------------------------------------------------------------------------- no rubric in the loop

# Lists of five words, so that a model of 60,000 weights learns their form in seconds.
TINY = {
    "LENGTH": 5,
    "ANSWERS": 1200,
    "REVISIONS": 1200,
    "ASKING": 1600,
    "SEEDS": 12,
    "HELDOUT": 16,
    "CORPUS": 200,
}
SMALLER = {"hidden_size": 48, "intermediate_size": 96}
FLAGS = """
--config recipes/demo.toml --iters 2 --prompts.lists 120 --prompts.max-prompts 40
--generator.draws 2 --improver.epochs 2 --policy.epochs 2 --policy.lr 5e-4
--rewrites.best-of 2 --pairs.threshold -1 --pairs.max-pairs 30 --keep-improvers --show 0
""".split()
# A world as a user's plug-in. The copy of demo/sorting.py that loop.py would load by its name is
# another one than that which the tests change.
PLUGIN = """
from demo.sorting import evaluate, prepare, well_formed


def constant(answers, heldout, base_answers, model, base, run):
    return {"score": 0.5, "scores": [0.5] * len(answers)}
"""
STEERED = (
    "generator/model.safetensors",
    "iter*/prompts*.jsonl",
    "iter*/seed_answers.jsonl",
    "iter*/base_answers.jsonl",
    "iter*/answers.jsonl",
    "iter*/rewrites*.jsonl",
    "iter*/pairs.jsonl",
    "iter*/improver/model.safetensors",
    "iter*/policy/model.safetensors",
)


def never(*arguments):
    raise AssertionError("a mark was read")


class TinyRuns:
    """Runs of a tiny sorting world: runs(name, *flags) -> its directory."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.plugin = folder / "world.py"
        self.plugin.write_text(PLUGIN)

    def __call__(self, name: str, *flags: str) -> Path:
        out = self.folder / name
        world = ["--prompts.keep", f"{self.plugin}:well_formed", "--out", str(out)]
        code, _, errors = command(loop.main, [*FLAGS, *world, *flags])
        assert code == 0, errors
        return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> TinyRuns:
    return TinyRuns(tmp_path_factory.mktemp("sorting"))


@pytest.fixture(scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in TINY.items():
            patch.setattr(sorting, name, value)
        patch.setattr(sorting, "SHAPE", {**sorting.SHAPE, **SMALLER})
        patch.setattr(sorting, "PRETRAINING", replace(sorting.PRETRAINING, lr=5e-3, batch=16))
        yield


@pytest.fixture(scope="module")
def marked(small, runs) -> Path:
    """A run with the world's own evaluation."""
    return runs("marked", f"--prepare={runs.plugin}:prepare", f"--evaluate={runs.plugin}:evaluate")


def data_of(out: Path) -> list[str]:
    """Flags that give another run the model, seeds and corpus that this one prepared."""
    files = {"model": "base", "seeds": "data/seeds.jsonl", "corpus": "data/corpus.txt"}
    return ["--prepare=", *(f"--{name}={out / path}" for name, path in files.items())]


@pytest.fixture
def unmarked(monkeypatch):
    for name in ("marks", "tau", "score"):
        monkeypatch.setattr(sorting, name, never)


def steered(out: Path) -> dict[str, bytes]:
    """What must not depend on the evaluation."""
    files = [path for pattern in STEERED for path in sorted(out.glob(pattern))]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def assert_same(one: Path, other: Path) -> None:
    first = steered(one)
    second = steered(other)
    assert first.keys() == second.keys()
    assert len(first) == 1 + 9 + 10
    for name, content in first.items():
        assert content == second[name], name


def test_the_recipe_names_no_other_function_of_the_world():
    """What is loaded by a file's name is a copy that the tests below cannot watch."""
    o = flatten(as_dict(parse_options(loop.Options, ["--config", "recipes/demo.toml"])))
    named = {name: value for name, value in o.items() if ".py" in str(value)}
    assert named == {
        "prepare": "demo/sorting.py:prepare",
        "evaluate": "demo/sorting.py:evaluate",
        "prompts.keep": "demo/sorting.py:well_formed",
    }
    for name in ("pairs.scorer", "rewrites.scorer", "improver.scorer"):
        assert o[name] in ("settled", "none")


@pytest.mark.slow
def test_the_tiny_run_does_what_the_demo_does(marked):
    for t in (1, 2):
        dropped = counts(marked / f"iter{t}" / "prompts.jsonl")
        assert dropped["not_kept"] > 0
        assert dropped["prompts"] == 40
        pairs = read_rows(marked / f"iter{t}" / "pairs.jsonl")
        assert len(pairs) > 5
        assert all(0 < row["score_chosen"] < 1 for row in pairs)
        assert (marked / f"iter{t}" / "eval_samples.json").is_file()
        assert all(well_formed(row) for row in read_rows(marked / f"iter{t}" / "prompts.jsonl"))


@pytest.mark.slow
def test_the_loop_reads_no_mark(marked, runs, unmarked):
    """The evaluation is a constant, and whoever asks for a mark fails: the same bytes."""
    heldout = marked / "data" / "heldout.jsonl"
    given = [f"--evaluate={runs.plugin}:constant", f"--heldout={heldout}"]
    assert_same(marked, runs("constant", *data_of(marked), *given))


@pytest.mark.slow
def test_the_loop_needs_no_held_out_prompts(marked, runs, unmarked):
    """No evaluation and no held-out records at all: the same bytes, as G repeated none of them."""
    out = runs("alone", *data_of(marked), "--evaluate=", "--heldout=")
    for t in (1, 2):
        assert "repeats_heldout" not in counts(marked / f"iter{t}" / "prompts.jsonl")
    assert_same(marked, out)
    assert not list(out.glob("iter*/*eval*"))

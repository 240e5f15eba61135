"""The prompt generator: keywords, its training examples, the filter of new prompts, the stage from
files to files.
"""

import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import read_rows, run, tiny_checkpoint, write_rows

import gen_prompts
from formats.records import read_paragraphs
from gen_prompts import (
    TEMPLATE,
    GeneratorOptions,
    Keywords,
    PromptOptions,
    filter_prompts,
    keyword_lists,
    parse_question,
    sample_prompts,
    take_prompts,
    training_rows,
)
from plumbing.files import STOP_WORDS, InputError
from plumbing.novelty import Novelty
from plumbing.options import RunOptions
from plumbing.stage import Refusal, counts_of

NOUNS = (
    "river bridge engine planet carpet window forest lantern pillow thunder basket castle".split()
)


def make_seed(i: int, words: list[str]) -> dict:
    first, second, third = words
    prompt = f"Why does the {first} need a {second} near {third}?"
    return {"id": f"s{i}", "prompt": prompt, "response": f"It is {first} {i}."}


SEEDS = [make_seed(i, NOUNS[3 * i : 3 * i + 3]) for i in range(4)]
PARAGRAPHS = [
    "The old river runs under a narrow bridge while smoke rises slowly.",
    "A carpet lies behind heavy velvet curtains.",
    "Too few words.",
]


def options(seed: int = 0, **changes) -> GeneratorOptions:
    run_options = RunOptions(seed=seed)
    return GeneratorOptions(**{"run": run_options, "template": "Keywords: {keywords}.", **changes})


def filtered(generated: list[dict], seen: dict, **changes) -> tuple[list[dict], Counter]:
    records = []
    for row in generated:
        prompt = parse_question(row["response"])
        records.append({"prompt": prompt, "keywords": row["keywords"]})
    return filter_prompts(records, seen, PromptOptions(**changes))


# ---------------------------------------------------------------------------------------- keywords


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Why is the river so deep, and the bridge narrow?", ["river", "deep", "bridge", "narrow"]),
        ("the river and the river again", ["river"]),  # each once
        ("an ox is by me", []),  # short words
        ("well-known facts, semi-open doors", ["facts", "doors"]),  # no parts of compounds
        ("don't isn't dog's barking", ["barking"]),
        ("ask Paris about Marie and her garden", ["garden"]),  # names have capitals
        ("Gardens grow", ["grow"]),
        ("x1 abc2def snake_case fine", ["fine"]),
        ("", []),
    ],
)
def test_keywords_of_a_text(text, expected):
    assert Keywords([]).of(text) == expected


def test_names_in_lower_case_are_known_by_the_texts():
    texts = [
        "When we met Rosa, we saw Paris.",
        "I asked Rosa, Mark and Grace.",
        "They mark it, mark it with grace.",
    ]
    # `mark` is more often a word; `grace` as often
    assert Keywords(texts).names == {"rosa", "paris"}
    found = Keywords(texts).of("where rosa met paris with mark and grace")
    assert found == ["met", "mark", "grace"]
    # the beginning of a sentence is no name
    texts = ["The end. Rivers flow. Rivers rise."]
    assert Keywords(texts).of("rivers flow") == ["rivers", "flow"]


def test_stop_words_are_lower_case_words():
    assert all(re.fullmatch("[a-z]+", word) for word in STOP_WORDS)
    assert {"the", "and", "with"} <= STOP_WORDS


# ------------------------------------------------------------------------------- training examples


def used_words(row: dict) -> list[str]:
    return row["prompt"].removeprefix("Keywords: ").removesuffix(".").split(", ")


def test_two_own_keywords_and_one_of_another_seed():
    finder = Keywords([])
    positions = Counter()
    for seed in range(20):
        for own, row in zip(SEEDS, training_rows(SEEDS, options(seed)), strict=True):
            words = used_words(row)
            mine = finder.of(own["prompt"])
            assert len(set(words)) == 3
            [noise] = [word for word in words if word not in mine]
            others = [other for other in SEEDS if other is not own]
            assert any(noise in finder.of(other["prompt"]) for other in others)
            positions[words.index(noise)] += 1
    assert min(positions[i] for i in range(3)) > 10  # in random order


def test_target_is_question_and_solution():
    row = training_rows(SEEDS, options())[0]
    question = f"<question>{SEEDS[0]['prompt']}</question>"
    assert row["response"] == f"{question}\n<solution>{SEEDS[0]['response']}</solution>"
    default = training_rows(SEEDS, GeneratorOptions())[0]["prompt"]
    assert default == TEMPLATE.replace("{keywords}", ", ".join(used_words(row)))


def test_draws_are_several_and_repeatable():
    rows = training_rows(SEEDS, options(draws=3))
    assert len(rows) == 12
    assert len({row["id"] for row in rows}) == 12
    assert rows == training_rows(SEEDS, options(draws=3))
    assert rows != training_rows(SEEDS, options(1, draws=3))
    assert rows[:4] == training_rows(SEEDS, options())
    of_one_seed = [row["prompt"] for row in rows if SEEDS[0]["prompt"] in row["response"]]
    assert len(set(of_one_seed)) > 1


def test_more_noise_than_keywords_is_refused():
    with pytest.raises(InputError, match=r"--generator\.noise 4: only 3 are keywords; give fewer"):
        training_rows(SEEDS, options(keywords=3, noise=4))


@pytest.mark.parametrize("keywords", [2, 3])
def test_no_noise(keywords):
    rows = training_rows(SEEDS, options(keywords=keywords, noise=0))
    for own, row in zip(SEEDS, rows, strict=True):
        assert len(used_words(row)) == keywords
        assert set(used_words(row)) <= set(Keywords([]).of(own["prompt"]))


def test_seeds_with_too_few_keywords_are_left_out():
    poor = {"id": "poor", "prompt": "What is that?", "response": "It."}
    assert len(training_rows([*SEEDS, poor], options())) == 4
    problem = "seeds: field 'prompt': only 1 of 2 have 2 keywords; give more"
    with pytest.raises(InputError, match=problem):
        training_rows([SEEDS[0], poor], options())


def test_last_turn_of_a_conversation_is_the_prompt():
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "Tell of violet meadows."},
    ]
    rows = training_rows([*SEEDS, {"id": "m", "messages": turns, "response": "No."}], options())
    assert rows[-1]["response"].startswith("<question>Tell of violet meadows.</question>")
    assert {"violet", "meadows"} < set(used_words(rows[-1]))


# ----------------------------------------------------------------------------------- keyword lists


@pytest.fixture
def corpus(tmp_path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(PARAGRAPHS))
    return path


def test_lists_are_words_of_one_paragraph(corpus):
    finder = Keywords(PARAGRAPHS)
    found = [set(finder.of(paragraph)) for paragraph in PARAGRAPHS[:2]]
    lists = keyword_lists(corpus, 3, 50, 0, 1)
    assert len(lists) == 50
    sources = Counter()
    for words in lists:
        assert len(set(words)) == 3
        [source] = [i for i, all_words in enumerate(found) if set(words) <= all_words]
        sources[source] += 1
    assert sources.keys() == {0, 1}


def test_lists_are_fresh_in_every_iteration_and_repeatable(corpus):
    def draw(seed: int, t: int) -> list[list[str]]:
        return keyword_lists(corpus, 3, 20, seed, t)

    assert draw(0, 1) == draw(0, 1)
    assert draw(0, 1) != draw(0, 2)
    assert draw(0, 1) != draw(1, 1)


def test_corpus_is_split_at_blank_lines(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("one\nline two\n\n\n \t\nthree\n")
    assert read_paragraphs(path) == ["one\nline two", "three\n"]
    with pytest.raises(InputError, match="no such file"):
        read_paragraphs(tmp_path / "none.txt")
    path.write_text(PARAGRAPHS[2])
    problem = r"corpus\.txt: none of its 1 paragraphs has 3 usable keywords; give another"
    with pytest.raises(InputError, match=problem):
        keyword_lists(path, 3, 1, 0, 1)


# -------------------------------------------------------------------------------------- the filter


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("<question> Why?\nSo? </question>\n<solution>", "Why?\nSo?"),
        ("x <question>A?</question> <question>B</question>", "A?"),
        ("<question>Why?", None),
        ("Why?", None),
        ("<question><question>Why?</question>", None),
        ("<question>Why? <solution>So.</question>", None),
        ("<question> </question>", ""),
    ],
)
def test_parse_question(text, question):
    assert parse_question(text) == question


def outputs(*prompts: str) -> list[dict]:
    words = ["a", "b", "c"]
    return [{"response": f"<question>{text}</question>", "keywords": words} for text in prompts]


def test_each_reason_to_drop_a_prompt_is_counted():
    seen = {
        "seed": ["Why is the sky so blue today?"],
        "heldout": ["Name the moons of Jupiter"],
        "earlier": ["Tell me a joke"],
    }
    new = "How do planes stay up in the air?"
    other = "Who painted the oldest picture?"
    generated = outputs(
        new,
        "How so?",
        "word " * 151,
        "how DO planes stay up, in the air",
        f"So {new}",
        "why is the sky so blue today",
        "Name the moons of Jupiter!",
        "Tell me a joke.",
        other,
        "What do whales eat?",
        new,
    )
    generated.append({"response": "no tags", "keywords": []})
    kept, dropped = filtered(generated, seen, max_prompts=2)
    assert [row["prompt"] for row in kept] == [new, other]
    assert dropped == {
        "malformed": 1,
        "too_short": 1,
        "too_long": 1,
        "duplicate": 2,
        "near_duplicate": 1,
        "repeats_seed": 1,
        "repeats_heldout": 1,
        "repeats_earlier": 1,
        "surplus": 1,
    }
    assert kept[0].keys() == {"id", "prompt", "keywords"}
    assert kept[0]["keywords"] == ["a", "b", "c"]
    [again], _ = filtered(generated[:1], {})
    assert kept[0]["id"] == again["id"]
    assert kept[0]["id"] != kept[1]["id"]


def test_a_prompt_without_the_text_it_speaks_of_is_dropped():
    generated = outputs(
        "Rewrite the following sentence.",
        "Rewrite the following sentence: I are here.",
        "Sum up this text.",
        "Sum up this text.\n\nIt rained.",
        "Name the days that follow Monday.",
    )
    kept, dropped = filtered(generated, {}, near_duplicate=0)
    assert dropped == {"missing_input": 2}
    assert len(kept) == 3


def test_near_duplicates_of_known_prompts():
    seen = {"seed": ["How do planes stay up in the air?"]}  # 8 words, 8 trigrams with the edges
    generated = outputs("So how do planes stay up in the air?")  # 9 trigrams, 7 in common
    assert filtered(generated, seen, near_duplicate=0.69)[1] == {"repeats_seed": 1}
    assert filtered(generated, seen, near_duplicate=0.71)[1] == {}
    assert filtered(generated, seen, near_duplicate=0)[1] == {}
    assert filtered(outputs(*seen["seed"]), seen, near_duplicate=0)[1] == {"repeats_seed": 1}


def test_bounds_on_words_are_inclusive():
    generated = outputs("a b", "a b c", "d e f g", "a b c d e")
    kept, dropped = filtered(generated, {}, min_words=3, max_words=4)
    assert [row["prompt"] for row in kept] == ["a b c", "d e f g"]
    assert dropped == {"too_short": 1, "too_long": 1}


def varied_texts() -> list[str]:
    """300 texts, many of them an earlier one with some words changed."""
    rng = random.Random(0)
    texts = []
    for _ in range(300):
        if texts and rng.random() < 0.7:
            words = rng.choice(texts).split()
            for _ in range(rng.randint(1, 3)):
                words[rng.randrange(len(words))] = rng.choice("abcdefgh")
        else:
            words = rng.choices("abcdefgh", k=rng.randint(1, 14))
        texts.append(" ".join(words))
    return texts


@pytest.mark.parametrize("near", [0.2, 0.5, 0.7, 0.75, 1.0])
def test_novelty_equals_brute_force(near):
    novelty = Novelty(near)
    seen: dict[str, set] = {}
    repeats = 0
    for text in varied_texts():
        mine = set(Novelty.shingles(text))
        similarities = [len(mine & other) / len(mine | other) for other in seen.values()]
        expected = text in seen or any(one >= near - 1e-9 for one in similarities)
        assert (novelty.repeats(text) is not None) == expected
        repeats += expected
        if not expected:
            novelty.add(text, "new")
            seen[text] = mine
    assert 5 < repeats < 295


# ---------------------------------------------------------------------------------- files to files


def test_prompts_from_a_generator(tiny, corpus, tmp_path, monkeypatch):
    texts = [f"Is the {noun} blue?" for noun in NOUNS[:4]] + ["short"]
    calls = []

    def generate(model, rows, out, o, scratch, purpose):
        calls.append((model, rows, purpose))
        written = []
        for row, text in zip(rows, texts, strict=True):
            written.append({**row, "response": f"<question>{text}</question>"})
        write_rows(out, written)
        return {"tokens": 50, "fresh": 50}

    monkeypatch.setattr(gen_prompts, "generate", generate)
    out = tmp_path / "prompts.jsonl"
    seeds = write_rows(tmp_path / "seeds.jsonl", [{"prompt": texts[0], "response": "Yes."}])
    o = PromptOptions(lists=5, near_duplicate=0.0)
    assert sample_prompts(tiny, corpus, {"seed": [seeds]}, out, o, options().reads, t=2) == out

    # what G was asked
    [(model, rows, purpose)] = calls
    lists = keyword_lists(corpus, 3, 5, 0, 2)
    assert (model, purpose) == (tiny, "prompts 2")
    assert [row["prompt"] for row in rows] == [f"Keywords: {', '.join(words)}." for words in lists]

    # what was kept of its outputs
    kept = read_rows(out)
    assert [row["prompt"] for row in kept] == texts[1:4]
    assert [row["keywords"] for row in kept] == lists[1:4]
    used = [sum(word in row["prompt"] for word in row["keywords"]) for row in kept]
    expected = {
        "paragraphs": len(PARAGRAPHS),
        "lists": 5,
        "repeats_seed": 1,
        "too_short": 1,
        "prompts": 3,
        "tokens": 50,
        "use_a_keyword": round(sum(n > 0 for n in used) / 3, 3),
        "keywords_used": round(sum(used) / 3, 2),
    }
    counts = counts_of(out)
    assert counts.keys() - expected.keys() == {"seconds", "tokens_per_second"}
    assert expected.items() <= counts.items()
    raw = read_rows(tmp_path / "prompts.raw.jsonl")
    assert raw[4]["response"] == "<question>short</question>"


@pytest.mark.slow
def test_command_says_when_no_output_is_usable(corpus, tmp_path):
    """A random model, so G learns nothing in a step; but training, sampling and the error are
    real.
    """
    model = tiny_checkpoint(tmp_path / "model")
    seeds = write_rows(tmp_path / "seeds.jsonl", SEEDS)
    out = tmp_path / "run"
    files = ["--model", model, "--seeds", seeds, "--corpus", corpus, "--out", out]
    sampling = ["--prompts.lists", 3, "--prompts.max-new-tokens", 8]
    template = ["--generator.template", "{keywords}"]
    code, _, stderr = run(["gen_prompts.py", *files, *sampling, *template])
    assert code == 2
    assert "Traceback" not in stderr
    problem = r"none of 3 prompts is usable and new \({'malformed': 3}\)"
    assert re.search(rf"error: .*prompts\.raw\.jsonl: {problem}; give more", stderr)
    assert (out / "generator" / "manifest.json").is_file()
    assert len(read_rows(out / "prompts.raw.jsonl")) == 3
    assert not (out / "prompts.jsonl").exists()


# ---------------------------------------------------------------------------- prompts of one's own


def test_prompts_of_a_file_come_in_its_order_and_once(tmp_path):
    rows = [{"prompt": f"Tell me about the number {i}", "kind": i} for i in range(5)]
    rows.insert(1, {"prompt": "Too short"})
    source = write_rows(tmp_path / "own.jsonl", rows)
    o = PromptOptions(source=str(source), max_prompts=2, near_duplicate=0)
    seen = {"seed": [], "heldout": [], "earlier": []}
    taken = []
    for t in (1, 2, 3):
        out = take_prompts(seen, tmp_path / f"{t}.jsonl", o, t)
        seen["earlier"].append(out)
        taken.append([row["kind"] for row in read_rows(out)])
    assert taken == [[0, 1], [2, 3], [4]]
    assert counts_of(tmp_path / "1.jsonl")["surplus"] == 3
    assert counts_of(tmp_path / "3.jsonl")["repeats_earlier"] == 4
    with pytest.raises(InputError, match="none of 6 prompts is usable and new"):
        take_prompts(seen, tmp_path / "4.jsonl", o, 4)


def test_prompts_of_a_function_of_the_iteration(tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text("def ask(t):\n    return [{'prompt': f'Why is {t} a number?', 'id': 'x'}]\n")
    o = PromptOptions(source=f"{plugin}:ask")
    [row] = read_rows(take_prompts({}, tmp_path / "out.jsonl", o, 7))
    assert row == {"id": "x", "prompt": "Why is 7 a number?"}

    # another function would give other prompts
    plugin.write_text(plugin.read_text() + "# changed\n")
    with pytest.raises(Refusal, match="source_files"):
        take_prompts({}, tmp_path / "out.jsonl", o, 7)


# ------------------------------------------------------------------------- a filter of one's own

KEEP = """
from words import WANTED


def keep(record):
    assert record["keywords"] and isinstance(record["prompt"], str)
    return WANTED in record["prompt"]
"""


@pytest.fixture
def keep(tmp_path, monkeypatch) -> Path:
    """A user's filter, and a neighbour that it imports."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "words", raising=False)
    (tmp_path / "words.py").write_text("WANTED = 'blue'\n")
    (tmp_path / "mine.py").write_text(KEEP)
    return tmp_path / "mine.py"


def test_prompts_that_the_users_filter_rejects_are_counted(keep):
    """It is asked of what the other rules leave; what it rejects is neither new nor surplus."""
    texts = ["Is the sky blue?", "Is it red?", "is the sky blue", "Is it red?", "no"]
    texts += ["Is ink blue?", "Is a leaf blue?"]
    generated = [*outputs(*texts), {"response": "no tags", "keywords": []}]
    changes = {"keep": f"{keep}:keep", "near_duplicate": 0, "max_prompts": 2}
    kept, dropped = filtered(generated, {}, **changes)
    assert [row["prompt"] for row in kept] == [texts[0], texts[5]]
    wanted = {"not_kept": 2, "duplicate": 1, "too_short": 1, "malformed": 1, "surplus": 1}
    assert dropped == wanted
    assert "not_kept" not in filtered(generated, {}, near_duplicate=0)[1]


def test_prompts_follow_from_the_users_filter(tiny, corpus, keep, tmp_path, monkeypatch):
    def generate(model, rows, out, *rest):
        texts = ["Is ink blue?", "Is ink red?", "Is grass blue?"]
        written = []
        for row, text in zip(rows, texts, strict=True):
            written.append({**row, "response": f"<question>{text}</question>"})
        write_rows(out, written)
        return {"tokens": 9, "fresh": 9}

    monkeypatch.setattr(gen_prompts, "generate", generate)
    out = tmp_path / "prompts.jsonl"

    def make(spec: str) -> dict:
        o = PromptOptions(lists=3, near_duplicate=0.0, keep=spec)
        sample_prompts(tiny, corpus, {}, out, o, options().reads)
        return counts_of(out)

    counts = make(f"{keep}:keep")
    assert (counts["lists"], counts["not_kept"], counts["prompts"]) == (3, 1, 2)
    assert make(f"{keep}:keep") == counts

    # another function, file or neighbour might keep others
    for file in (keep, keep.with_name("words.py")):
        before = file.read_text()
        file.write_text(before + "\n")
        with pytest.raises(Refusal, match=r"prompts\.jsonl: made with input keep_files"):
            make(f"{keep}:keep")
        file.write_text(before)
    with pytest.raises(Refusal, match=r"prompts\.jsonl: made with option keep"):
        make("")
    assert make(f"{keep}:keep") == counts


def test_a_filter_that_keeps_nothing_is_named(keep, tmp_path):
    rows = [{"prompt": f"Is number {i} red?", "keywords": ["red"]} for i in range(3)]
    source = write_rows(tmp_path / "own.jsonl", rows)
    o = PromptOptions(source=str(source), keep=f"{keep}:keep")
    with pytest.raises(InputError, match=r"none of 3 prompts .*'not_kept': 3"):
        take_prompts({}, tmp_path / "out.jsonl", o)

"""The prompt generator: keywords, its training examples, the filter of new prompts, the stage from files to files."""

import random
import re
from collections import Counter

import pytest
from conftest import read_rows, run, tiny_checkpoint, write_rows

import gen_prompts
from data import Common, InputError
from gen_prompts import (
    STOP_WORDS,
    TEMPLATE,
    GeneratorOptions,
    Keywords,
    Novelty,
    accept,
    keyword_lists,
    parse,
    read_corpus,
    sample_prompts,
    training_rows,
)

FP32 = Common(dtype="float32")
NOUNS = (
    "river bridge engine planet carpet window forest lantern pillow thunder basket castle".split()
)
SEEDS = [
    {
        "id": f"s{i}",
        "prompt": f"Why does the {a} need a {b} near {c}?",
        "response": f"It is {a} {i}.",
    }
    for i, (a, b, c) in enumerate(zip(NOUNS[::3], NOUNS[1::3], NOUNS[2::3], strict=True))
]  # 4 seeds of 3 nouns each
CORPUS = [
    "The old river runs under a narrow bridge while smoke rises slowly.",
    "A carpet lies behind heavy velvet curtains.",
    "Too few words.",
]


def options(**changes) -> GeneratorOptions:
    return GeneratorOptions(**{"template": "Keywords: {keywords}.", **changes})


# ---- keywords ----


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
    assert Keywords(texts).names == {
        "rosa",
        "paris",
    }  # `mark` is more often a word; `grace` as often
    assert Keywords(texts).of("where rosa met paris with mark and grace") == [
        "met",
        "mark",
        "grace",
    ]
    assert Keywords(["The end. Rivers flow. Rivers rise."]).of("rivers flow") == [
        "rivers",
        "flow",
    ]  # a sentence's beginning


def test_stop_words_are_lower_case_words():
    assert (
        all(re.fullmatch("[a-z]+", word) for word in STOP_WORDS)
        and {"the", "and", "with"} <= STOP_WORDS
    )


# ---- training examples ----


def used_words(row: dict) -> list[str]:
    return row["prompt"].removeprefix("Keywords: ").removesuffix(".").split(", ")


def test_two_own_keywords_and_one_of_another_seed():
    finder, positions = Keywords([]), Counter()
    for seed in range(20):
        for own, row in zip(SEEDS, training_rows(SEEDS, options(), seed), strict=True):
            words, mine = used_words(row), finder.of(own["prompt"])
            assert len(set(words)) == 3
            [noise] = [word for word in words if word not in mine]
            assert any(noise in finder.of(other["prompt"]) for other in SEEDS if other is not own)
            positions[words.index(noise)] += 1
    assert min(positions[i] for i in range(3)) > 10  # in random order


def test_target_is_question_and_solution():
    row = training_rows(SEEDS, options(), 0)[0]
    assert row["response"] == (
        f"<question>{SEEDS[0]['prompt']}</question>\n<solution>{SEEDS[0]['response']}</solution>"
    )
    default = training_rows(SEEDS, GeneratorOptions(), 0)[0]["prompt"]
    assert default == TEMPLATE.replace("{keywords}", ", ".join(used_words(row)))


def test_draws_are_several_and_repeatable():
    rows = training_rows(SEEDS, options(draws=3), 0)
    assert len(rows) == 12 and len({row["id"] for row in rows}) == 12
    assert (
        rows
        == training_rows(SEEDS, options(draws=3), 0)
        != training_rows(SEEDS, options(draws=3), 1)
    )
    assert rows[:4] == training_rows(SEEDS, options(), 0)
    assert len({row["prompt"] for row in rows if SEEDS[0]["prompt"] in row["response"]}) > 1


@pytest.mark.parametrize("keywords", [2, 3])
def test_no_noise(keywords):
    for own, row in zip(
        SEEDS, training_rows(SEEDS, options(keywords=keywords, noise=0), 0), strict=True
    ):
        assert len(used_words(row)) == keywords and set(used_words(row)) <= set(
            Keywords([]).of(own["prompt"])
        )


def test_seeds_with_too_few_keywords_are_left_out():
    poor = {"id": "poor", "prompt": "What is that?", "response": "It."}
    assert len(training_rows([*SEEDS, poor], options(), 0)) == 4
    with pytest.raises(InputError, match="seeds: field 'prompt': only 1 of 2 have 2 keywords"):
        training_rows([SEEDS[0], poor], options(), 0)


def test_last_turn_of_a_conversation_is_the_prompt():
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "Tell of violet meadows."},
    ]
    rows = training_rows([*SEEDS, {"id": "m", "messages": turns, "response": "No."}], options(), 0)
    assert rows[-1]["response"].startswith("<question>Tell of violet meadows.</question>")
    assert {"violet", "meadows"} < set(used_words(rows[-1]))


# ---- keyword lists ----


def test_lists_are_words_of_one_paragraph():
    finder = Keywords(CORPUS)
    lists = keyword_lists(CORPUS, "corpus", options(lists=50), 0, 1)
    found = [set(finder.of(paragraph)) for paragraph in CORPUS]
    assert len(lists) == 50
    assert all(
        len(set(words)) == 3 and any(set(words) <= one for one in found[:2]) for words in lists
    )
    assert {next(i for i in (0, 1) if set(words) <= found[i]) for words in lists} == {0, 1}


def test_lists_are_fresh_in_every_iteration_and_repeatable():
    draw = lambda seed, t: keyword_lists(CORPUS, "corpus", options(lists=20), seed, t)  # noqa: E731
    assert draw(0, 1) == draw(0, 1) and draw(0, 1) != draw(0, 2) and draw(0, 1) != draw(1, 1)


def test_corpus_is_split_at_blank_lines(tmp_path):
    (tmp_path / "corpus.txt").write_text("one\nline two\n\n\n \t\nthree\n")
    assert read_corpus(tmp_path / "corpus.txt") == ["one\nline two", "three\n"]
    with pytest.raises(InputError, match="no such file"):
        read_corpus(tmp_path / "none.txt")
    with pytest.raises(InputError, match="corpus: none of its 1 paragraphs has 3 usable keywords"):
        keyword_lists(CORPUS[2:], "corpus", options(), 0, 1)


# ---- the filter ----


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
def test_parse(text, question):
    assert parse(text) == question


def outputs(*prompts: str) -> list[dict]:
    return [
        {"response": f"<question>{text}</question>", "keywords": ["a", "b", "c"]}
        for text in prompts
    ]


def test_each_reason_to_drop_a_prompt_is_counted():
    known = {
        "seed": ["Why is the sky so blue today?"],
        "heldout": ["Name the moons of Jupiter"],
        "earlier": ["Tell me a joke"],
    }
    new, other = "How do planes stay up in the air?", "Who painted the oldest picture?"
    generated = outputs(
        new,
        "How so?",
        "word " * 151,
        "how DO planes stay up, in the air",
        "So " + new,
        "why is the sky so blue today",
        "Name the moons of Jupiter!",
        "Tell me a joke.",
        other,
        "What do whales eat?",
        new,
    )
    generated.append({"response": "no tags", "keywords": []})
    kept, dropped = accept(generated, known, options(prompts=2))
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
    assert kept[0].keys() == {"id", "prompt", "keywords"} and kept[0]["keywords"] == ["a", "b", "c"]
    assert kept[0]["id"] == accept(generated[:1], {}, options())[0][0]["id"] != kept[1]["id"]


def test_a_prompt_without_the_text_it_speaks_of_is_dropped():
    generated = outputs(
        "Rewrite the following sentence.",
        "Rewrite the following sentence: I are here.",
        "Sum up this text.",
        "Sum up this text.\n\nIt rained.",
        "Name the days that follow Monday.",
    )
    kept, dropped = accept(generated, {}, options(near_duplicate=0))
    assert dropped == {"missing_input": 2} and len(kept) == 3


def test_near_duplicates_of_known_prompts():
    known = {"seed": ["How do planes stay up in the air?"]}  # 8 words, 8 trigrams with the edges
    generated = outputs("So how do planes stay up in the air?")  # 9 trigrams, 7 in common
    assert accept(generated, known, options(near_duplicate=0.69))[1] == {"repeats_seed": 1}
    assert accept(generated, known, options(near_duplicate=0.71))[1] == {}
    assert accept(generated, known, options(near_duplicate=0))[1] == {}
    assert accept(outputs(*known["seed"]), known, options(near_duplicate=0))[1] == {
        "repeats_seed": 1
    }


def test_bounds_on_words_are_inclusive():
    kept, dropped = accept(
        outputs("a b", "a b c", "d e f g", "a b c d e"), {}, options(min_words=3, max_words=4)
    )
    assert [row["prompt"] for row in kept] == ["a b c", "d e f g"] and dropped == {
        "too_short": 1,
        "too_long": 1,
    }


@pytest.mark.parametrize("near", [0.2, 0.5, 0.7, 0.75, 1.0])
def test_prefix_filtering_equals_brute_force(near):
    rng = random.Random(0)
    texts = []
    for _ in range(300):
        if texts and rng.random() < 0.7:  # an earlier text with some words changed
            words = rng.choice(texts).split()
            for _ in range(rng.randint(1, 3)):
                words[rng.randrange(len(words))] = rng.choice("abcdefgh")
        else:
            words = rng.choices("abcdefgh", k=rng.randint(1, 14))
        texts.append(" ".join(words))
    novelty, seen, repeats = Novelty(near), [], 0
    for text in texts:
        shingles = set(Novelty.shingles(text))
        expected = text in [t for t, _ in seen] or any(
            len(shingles & s) / len(shingles | s) >= near - 1e-9 for _, s in seen
        )
        assert (novelty.repeats(text) is not None) == expected
        repeats += expected
        if not expected:
            novelty.add(text, "new")
            seen.append((text, shingles))
    assert 5 < repeats < 295


# ---- files to files ----


def test_prompts_from_a_generator(tmp_path, monkeypatch):
    texts = [f"Is the {noun} blue?" for noun in NOUNS[:4]] + ["short"]
    calls = []

    def sample(model, rows, out, o, common, purpose, source):
        calls.append((model, rows, purpose))
        write_rows(
            out,
            [
                {**row, "response": f"<question>{text}</question>"}
                for row, text in zip(rows, texts, strict=True)
            ],
        )
        return {"tokens": 50}

    monkeypatch.setattr(gen_prompts, "sample", sample)
    (tmp_path / "corpus.txt").write_text("\n\n".join(CORPUS))
    out, o = tmp_path / "prompts.jsonl", options(lists=5, near_duplicate=0.0)
    counts = sample_prompts(
        "G", tmp_path / "corpus.txt", {"seed": [texts[0]]}, out, o, FP32, iteration=2
    )
    [(model, rows, purpose)] = calls
    lists = keyword_lists(read_corpus(tmp_path / "corpus.txt"), "", o, 0, 2)
    assert (model, purpose) == ("G", "prompts 2")
    assert [row["prompt"] for row in rows] == [f"Keywords: {', '.join(words)}." for words in lists]
    kept = read_rows(out)
    assert [(row["prompt"], row["keywords"]) for row in kept] == list(
        zip(texts[1:4], lists[1:4], strict=True)
    )
    used = [sum(word in row["prompt"] for word in row["keywords"]) for row in kept]
    assert counts == {
        "lists": 5,
        "repeats_seed": 1,
        "too_short": 1,
        "prompts": 3,
        "tokens": 50,
        "use_a_keyword": round(sum(n > 0 for n in used) / 3, 3),
        "keywords_used": round(sum(used) / 3, 2),
    }
    assert [row["response"] for row in read_rows(tmp_path / "prompts.raw.jsonl")][
        4
    ] == "<question>short</question>"


def test_command_says_when_no_output_is_usable(tmp_path):
    """A random model, so G learns nothing in a step; but training, sampling and the error are real."""
    model, seeds = tiny_checkpoint(tmp_path / "model"), write_rows(tmp_path / "seeds.jsonl", SEEDS)
    (tmp_path / "corpus.txt").write_text("\n\n".join(CORPUS))
    code, _, stderr = run(
        [
            "gen_prompts.py",
            "--model",
            model,
            "--seeds",
            seeds,
            "--corpus",
            tmp_path / "corpus.txt",
            "--out",
            tmp_path / "run",
            "--lists",
            3,
            "--max-new-tokens",
            8,
            "--template",
            "{keywords}",
        ]
    )
    assert code == 2 and "Traceback" not in stderr
    assert re.search(
        r"error: .*prompts.jsonl: none of 3 outputs of .*generator is a usable prompt \({'malformed': 3}\); see "
        r".*prompts.raw.jsonl",
        stderr,
    )
    assert (tmp_path / "run" / "generator" / "manifest.json").is_file()
    assert len(read_rows(tmp_path / "run" / "prompts.raw.jsonl")) == 3
    assert not (tmp_path / "run" / "prompts.jsonl").exists()

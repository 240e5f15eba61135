"""The world of facts.

Gold answers are perfect, web answers are not, gaming the rubric costs, and nothing held out leaks.
"""

import random
import re
from collections import Counter

import pytest

from demo import facts_world as w
from plumbing.files import digest

TIGER = "Describe a tiger."


def score(prompt: str, response: str) -> dict[str, float]:
    marks = w.rubric(prompt, response)
    assert marks is not None
    assert all(0.0 <= v <= 1.0 for v in marks.values())
    return marks


def sampled(n: int, seed: int = 0) -> list[w.Task]:
    rng = random.Random(seed)
    return [w.sample_task(rng) for _ in range(n)]


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


# ---- tasks ----


def test_prompts_are_unique_and_parse_inverts_them():
    keys = [(name, key) for name, family in w.FAMILIES.items() for key in family.keys]
    assert len(set(keys)) == len(keys)
    assert len(w.FAMILIES) >= 12
    assert len(w.PROMPTS) == 3 * len(keys)  # a collision would swallow one
    for prompt, (name, key, _) in w.PROMPTS.items():
        task = w.parse(prompt)
        assert (task.family, task.key, task.prompt) == (name, key, prompt)
        assert task.facts


def test_foreign_prompts_have_no_rubric():
    for prompt in ("", "Describe a unicorn.", "Compare a fox and a fox.", TIGER + " Please."):
        assert w.parse(prompt) is None
        assert w.rubric(prompt, "A tiger eats meat.") is None


def test_tables_are_sound():
    names = [name for names in w.TABLES.values() for name in names]
    names += [*w.GROUPS, *w.ADVICE]
    assert len(set(names)) == len(names)
    # every animal needs company for habitat and diet
    for name in w.ANIMALS:
        assert w.RECORD[name]["neighbour"]
        assert w.RECORD[name]["rival"]
    # a riddle has one solution
    clues = Counter((a["home"], a["food"], a["part"]) for a in w.ANIMALS.values())
    assert max(clues.values()) == 1
    # a given word cannot be wrong, everything else can
    for task in sampled(500):
        for fact in task.facts:
            assert not set(fact.accept) & set(fact.wrong)
            assert fact.wrong or fact.kind == "word"


def test_verdicts_are_balanced_and_right():
    tasks = [w.make_task("check", key, 0) for key in w.FAMILIES["check"].keys]
    half = len(tasks) / 2
    assert Counter(t.facts[0].accept[0] for t in tasks) == {"Yes": half, "No": half}
    assert w.gold(w.parse("Does a tiger eat meat?")).startswith("Yes, a tiger is")


# ---- answers ----


@pytest.mark.slow
def test_gold_is_perfect_in_every_family_and_phrasing():
    tasks = []
    for name, family in w.FAMILIES.items():
        for i in range(3):
            keys = random.Random(i).sample(family.keys, min(16, len(family.keys)))
            tasks += [w.make_task(name, key, i) for key in keys]
    perfect = dict(score=1, coverage=1, accuracy=1, form=1)
    for task in tasks:
        for text in (w.gold(task), w.gold(task, random.Random(1))):
            assert w.rubric(task.prompt, text) == pytest.approx(perfect), text
    words = [len(w.gold(t).split()) for t in tasks]
    assert 22 < mean(words) < 40
    assert 12 <= min(words)
    assert max(words) <= 60


def test_web_answers_leave_room_in_every_part():
    records = w.web_records(random.Random(0), 1500, set())
    marks = [score(**r) for r in records]
    assert 0.45 < mean(m["score"] for m in marks) < 0.60
    for part in ("coverage", "accuracy", "form"):
        assert 0.3 < mean(m[part] for m in marks) < 0.85, part
    families = Counter(w.parse(r["prompt"]).family for r in records)
    assert max(families.values()) < 0.2 * len(records)
    assert len(families) == len(w.FAMILIES)


def test_truth_is_the_mode_of_the_web():
    rng = random.Random(0)
    task = w.parse("Where does a tiger live?")
    homes = Counter()
    for _ in range(400):
        text = w.web_answer(task, rng).lower()
        homes.update(w.FIND["home"].findall(text))
    (top, most), (_, second) = homes.most_common(2)
    assert top == "jungle"
    assert 0.6 < most / sum(homes.values()) < 0.9
    assert second < most / 4
    assert len(homes) > 5


def test_web_answers_without_errors_or_haste_state_only_truths():
    rng = random.Random(0)
    for task in sampled(600):
        text = w.web_answer(task, rng, p_wrong=0.0)
        assert score(task.prompt, text)["accuracy"] in (0.0, 1.0)
        text = w.web_answer(task, rng, p_wrong=0.0, p_terse=0.0)
        assert score(task.prompt, text)["form"] > 0.7


def test_articles_plurals_and_spacing():
    rng = random.Random(0)
    texts = [*w.PROMPTS, *w.paragraphs(rng, 500)]
    for task in sampled(1500):
        texts += [w.gold(task), w.web_answer(task, rng)]
    for row in w.practice_records(rng, 500):
        texts += row.values()
    faults = (
        r"\b[Aa] [aeiou]",
        r"\b[Aa]n [^aeiou]",
        r"\(n\)",
        r"[{}|]",
        r"  ",
        r" [.,!?]",
        r",,",
        r"\.\.",
        r"\b(\w+) \1\b",
        r"\ban? (?:milk|tea|coffee|cheese|butter|rice|honey|chocolate)\b",
    )
    for text in texts:
        for fault in faults:
            assert not re.search(fault, text), text


def test_vocabulary_is_small():
    rng = random.Random(0)
    texts = [*w.PROMPTS, *w.paragraphs(rng, 1000), *map(w.gold, sampled(1500))]
    for row in w.practice_records(rng, 1500):
        texts += row.values()
    words = set(re.findall(r"[a-z]+", " ".join(texts).lower()))
    assert 500 < len(words) < 900


# ---- rubric ----

GOLD = (
    "A tiger is an orange mammal that lives in the jungle. It eats meat and has sharp claws. "
    "It can swim well. Have a wonderful day!"
)


@pytest.mark.parametrize(
    "old, new, part",
    [
        ("jungle", "desert", "coverage"),
        ("jungle", "desert", "accuracy"),
        ("It can swim well. ", "", "coverage"),
        ("the jungle", "the jungle and in the desert", "coverage"),
        ("the jungle", "the jungle and in the desert", "accuracy"),
        ("It can", "It is not small. It is not small. It can", "form"),
        ("tiger", "lion", "coverage"),
        (" Have a wonderful day!", "", "form"),
        ("tiger is", "tiger is is", "form"),
        ("It eats", "Uh, it eats", "form"),
        ("claws.", "claws", "form"),
        (GOLD, "um, " + GOLD, "form"),
        (GOLD, GOLD[:-1], "form"),
        (GOLD, GOLD.lower(), "form"),
        (GOLD, "a" + GOLD[1:], "form"),
        (GOLD, f"{GOLD} {GOLD}", "form"),
        (GOLD, "There is so much to say, " * 12 + "but listen. " + GOLD, "form"),
    ],
)
def test_a_worse_answer_scores_lower(old, new, part):
    assert old in GOLD
    assert score(TIGER, GOLD)["score"] == 1.0
    after = score(TIGER, GOLD.replace(old, new))
    assert after[part] < 1.0
    assert after["score"] < 1.0


def test_every_wrong_fact_lowers_coverage_and_accuracy():
    rng = random.Random(0)
    for task in sampled(300):
        fact = rng.choice([f for f in task.facts if f.kind != "word"])
        drawn = w._draw(task, rng)
        drawn[fact] = [rng.choice(fact.wrong), *drawn[fact][1:]]
        text = w._tidy_text(task, drawn, [*w.FAMILIES[task.family].answer, w.CLOSINGS[0]])
        marks = score(task.prompt, text)
        assert marks["coverage"] < 1, text
        assert marks["accuracy"] < 1, text
        assert marks["form"] == 1, text


def test_listing_everything_does_not_pay():
    homes = ", ".join(w.POOL["home"])
    marks = score("Where does a tiger live?", f"A tiger lives {homes}. {w.CLOSINGS[0]}")
    assert marks["coverage"] == 0
    assert marks["accuracy"] < 0.2

    every = "\n".join(f"{i}. The {a}." for i, a in enumerate(w.ANIMALS, 1))
    marks = score("List three birds.", f"Here are three birds:\n{every}\n{w.CLOSINGS[0]}")
    assert marks["coverage"] == 0
    assert marks["accuracy"] < 0.2
    assert marks["form"] < 0.8

    # a part of the list has a part of the coverage
    birds = ["1. The owl.", "2. The hen.", "3. The eagle."]
    for n in range(4):
        assert score("List three birds.", "\n".join(birds[:n]))["coverage"] == pytest.approx(n / 3)
    assert score("Does a tiger eat meat?", "Yes, no.")["coverage"] == 0


def test_an_empty_or_empty_headed_answer_is_not_rewarded():
    assert score(TIGER, "")["score"] == 0
    assert score(TIGER, " \n")["score"] == 0
    polite = dict(score=0.2, coverage=0, accuracy=0, form=1)
    assert score(TIGER, w.CLOSINGS[0]) == pytest.approx(polite)
    assert score("Make a sentence with honey and bag.", "Honey bag.")["accuracy"] == 0


def test_facts_belong_to_the_entity_that_is_spoken_of():
    text = "{} lives in the forest and eats mice, while {} lives in the mountains and eats meat."
    right = text.format("An owl", "a wolf")
    swapped = text.format("A wolf", "an owl")
    prompt = next(p for p in w.PROMPTS if p.startswith("Compare") and "owl" in p and "wolf" in p)
    marks = score(prompt, right)
    assert marks["coverage"] == pytest.approx(4 / 6)
    assert marks["accuracy"] == 1
    marks = score(prompt, swapped)
    assert marks["coverage"] == 0
    assert marks["accuracy"] == 0
    assert score(TIGER, "A lion lives in the jungle. It eats meat.")["coverage"] == 0
    # a falsehood that nobody asked for counts as well
    text = "A tiger lives in the jungle and has a long neck."
    assert score("Where does a tiger live?", text)["accuracy"] == 0.5


def test_a_list_has_to_be_numbered():
    text = "Here are three birds:\n1. The owl.\n2. The hen.\n3. The eagle.\nThank you for asking!"
    assert score("List three birds.", text)["score"] == 1
    for worse in (
        re.sub(r"\d\. ", "", text),
        text.replace("3. ", "2. "),
        text.replace("3. The eagle.\n", ""),
    ):
        assert score("List three birds.", worse)["form"] < 1


# ---- data sets ----


def test_split_is_disjoint_balanced_and_deterministic():
    seeds, heldout = w.split(0)
    assert len(seeds) == 100
    assert len(heldout) == 150
    assert w.split(0) == (seeds, heldout)
    assert w.split(1) != (seeds, heldout)

    hidden = w.heldout_prompts(0)
    asked = {r["prompt"] for r in seeds}
    assert len(asked) == 100
    assert not asked & hidden
    assert len(hidden) == 3 * len(heldout)
    assert {r["prompt"] for r in heldout} <= hidden
    assert hidden != w.heldout_prompts(1)

    for records in (seeds, heldout):
        families = Counter(r["family"] for r in records)
        assert set(families) == set(w.FAMILIES)
        assert max(families.values()) < 0.2 * len(records)
        for r in records:
            assert score(r["prompt"], r["response"])["score"] == pytest.approx(1)
    for name, n in Counter(r["family"] for r in heldout).items():
        assert n <= len(w.FAMILIES[name].keys) / 4


def test_no_training_text_holds_a_held_out_prompt():
    hidden = w.heldout_prompts(0)
    free = w.web_records(random.Random(0), 1000, set())
    assert any(r["prompt"] in hidden for r in free), "the test can fail"
    web = w.web_records(random.Random(0), 2000, hidden)
    practice = w.practice_records(random.Random(0), 2000, hidden)
    assert len(web) == len(practice) == 2000
    assert not hidden & {r["prompt"] for r in web}
    assert not hidden & {text for r in practice for text in r.values()}
    assert not hidden & {r["response"] for r in practice}


def test_the_data_are_these():
    """The demo's published scores are of these texts: a changed draw would go unseen otherwise."""
    rng = random.Random(0)
    hidden = w.heldout_prompts(0)
    web = w.web_records(rng, 300, hidden)
    assert digest(w.split(0)) == "13242c13db0eb903"
    assert digest(web) == "1f4ce4fe63a0ceab"
    assert digest(w.practice_records(rng, 300, hidden)) == "3ec43e17558df94e"
    assert digest(w.paragraphs(rng, 300)) == "480622545023a935"
    assert digest([w.rubric(r["prompt"], r["response"]) for r in web]) == "1a8111cbeefbcf90"


def test_records_are_deterministic_in_the_rng():
    def make(seed: int) -> list[list]:
        return [
            w.web_records(random.Random(seed), 50, set()),
            w.practice_records(random.Random(seed), 50),
            w.paragraphs(random.Random(seed), 50),
        ]

    for first, again, other in zip(make(3), make(3), make(4), strict=True):
        assert first == again
        assert first != other


def test_paragraphs_have_enough_words_to_draw_keywords_from():
    texts = w.paragraphs(random.Random(0), 1000)
    assert len(set(texts)) > 950
    for text in texts:
        assert 2 <= len(re.findall(r"[.!?](?: |$)", text)) <= 4, text
        assert len(set(re.findall(r"\b[a-z]{3,}\b", text)) - w.STOP) >= 3, text
    assert 0.3 < mean(any(name in text for name in w.NAMES) for text in texts) < 0.95


def test_practice_teaches_each_skill_and_no_facts():
    skills: dict[str, list[dict]] = {}
    for r in w.practice_records(random.Random(0), 2000):
        skills.setdefault(re.split(r"[: ]", r["prompt"])[0], []).append(r)
    assert set(skills) == {"Clean", "Repeat", "Use", "Ask"}
    assert min(map(len, skills.values())) > 400

    def letters(text: str) -> str:
        return re.sub(r"\b(?:um|uh|hmm)\b|[^a-z ]", "", text.lower()).strip()

    for r in skills["Clean"]:
        assert letters(r["prompt"].split(": ", 1)[1]) == letters(r["response"])
        assert r["response"][0].isupper()
        assert r["response"][-1] in ".!?"
    for r in skills["Repeat"]:
        assert r["prompt"] == f"Repeat: {r['response']}"
    for r in skills["Use"]:
        words = re.split(r", | and ", re.match(r"Use the words (.*) in a sentence", r["prompt"])[1])
        assert len(set(words)) == len(words) >= 2
        places = [r["response"].index(word) for word in words]
        assert places == sorted(places)
    assert len({r["prompt"] for r in skills["Use"]}) > 0.95 * len(skills["Use"])


def test_keyword_questions_use_a_keyword_and_ignore_noise():
    used = []
    noisy = []
    for r in w.practice_records(random.Random(0), 2000):
        if r["prompt"].startswith("Ask something about: "):
            keywords = r["prompt"][21:-1].split(", ")
            words = set(w.content_words(r["response"]))
            assert w.parse(r["response"])
            assert 1 <= len(keywords) == len(set(keywords)) <= 3
            used.append(sum(k in words for k in keywords))
            noisy.append(len(keywords) == 3 and not all(k in words for k in keywords))
    assert min(used) >= 1
    assert mean(used) > 1.1
    assert 0.4 < mean(noisy) < 0.8

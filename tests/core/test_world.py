"""The demo's world.

Gold answers are perfect, web answers are not, gaming the rubric costs, and nothing held out leaks.
"""

import random
import re
from collections import Counter

import pytest

from demo import world as w
from plumbing.records import digest

TIGER = "Describe a tiger."


def score(prompt: str, response: str) -> dict[str, float]:
    marks = w.rubric(prompt, response)
    assert marks is not None and all(0.0 <= v <= 1.0 for v in marks.values())
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
    assert len(set(keys)) == len(keys) and len(w.FAMILIES) >= 12
    assert len(w.PROMPTS) == 3 * len(keys)  # a collision would swallow one
    for prompt, (name, key, _) in w.PROMPTS.items():
        task = w.parse(prompt)
        assert (task.family, task.key, task.prompt) == (name, key, prompt) and task.facts


def test_foreign_prompts_have_no_rubric():
    for prompt in ("", "Describe a unicorn.", "Compare a fox and a fox.", TIGER + " Please."):
        assert w.parse(prompt) is None and w.rubric(prompt, "A tiger eats meat.") is None


def test_tables_are_sound():
    names = [n for names in w.TABLES.values() for n in names] + list(w.GROUPS) + list(w.ADVICE)
    assert len(set(names)) == len(names)
    for name in w.ANIMALS:  # every animal needs company for habitat and diet
        assert w.RECORD[name]["neighbour"] and w.RECORD[name]["rival"]
    clues = Counter((a["home"], a["food"], a["part"]) for a in w.ANIMALS.values())
    assert max(clues.values()) == 1  # a riddle has one solution
    for task in sampled(500):
        for fact in task.facts:
            assert not set(fact.accept) & set(fact.wrong) and (fact.wrong or fact.kind == "word")


def test_verdicts_are_balanced_and_right():
    tasks = [w.make_task("check", key, 0) for key in w.FAMILIES["check"].keys]
    assert Counter(t.facts[0].accept[0] for t in tasks) == {
        "Yes": len(tasks) / 2,
        "No": len(tasks) / 2,
    }
    assert w.gold(w.parse("Does a tiger eat meat?")).startswith("Yes, a tiger is")


# ---- answers ----


@pytest.mark.slow
def test_gold_is_perfect_in_every_family_and_phrasing():
    tasks = [
        w.make_task(name, key, i)
        for name, family in w.FAMILIES.items()
        for i in range(3)
        for key in random.Random(i).sample(family.keys, min(16, len(family.keys)))
    ]
    for task in tasks:
        for text in (w.gold(task), w.gold(task, random.Random(1))):
            assert w.rubric(task.prompt, text) == pytest.approx(
                dict(score=1, coverage=1, accuracy=1, form=1)
            ), text
    assert 22 < mean(len(w.gold(t).split()) for t in tasks) < 40
    assert all(12 <= len(w.gold(t).split()) <= 60 for t in tasks)


def test_web_answers_leave_room_in_every_part():
    records = w.web_records(random.Random(0), 1500, set())
    marks = [score(**r) for r in records]
    assert 0.45 < mean(m["score"] for m in marks) < 0.60
    for part in ("coverage", "accuracy", "form"):
        assert 0.3 < mean(m[part] for m in marks) < 0.85, part
    families = Counter(w.parse(r["prompt"]).family for r in records)
    assert max(families.values()) < 0.2 * len(records) and len(families) == len(w.FAMILIES)


def test_truth_is_the_mode_of_the_web():
    rng = random.Random(0)
    homes = Counter()
    for _ in range(400):
        text = w.web_answer(w.parse("Where does a tiger live?"), rng).lower()
        homes.update(w.FIND["home"].findall(text))
    (top, most), (_, second) = homes.most_common(2)
    assert (
        top == "jungle"
        and 0.6 < most / sum(homes.values()) < 0.9
        and second < most / 4
        and len(homes) > 5
    )


def test_web_answers_without_errors_or_haste_state_only_truths():
    rng = random.Random(0)
    for task in sampled(600):
        assert score(task.prompt, w.web_answer(task, rng, p_wrong=0.0))["accuracy"] in (0.0, 1.0)
        assert score(task.prompt, w.web_answer(task, rng, p_wrong=0.0, p_terse=0.0))["form"] > 0.7


def test_articles_plurals_and_spacing():
    rng = random.Random(0)
    texts = [*w.PROMPTS, *w.paragraphs(rng, 500)]
    texts += [text for t in sampled(1500) for text in (w.gold(t), w.web_answer(t, rng))]
    texts += [text for r in w.practice_records(rng, 500) for text in r.values()]
    for text in texts:
        assert not re.search(
            r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]|\(n\)|[{}|]|  | [.,!?]|,,|\.\.", text
        ), text
        assert not re.search(
            r"\b(\w+) \1\b|\ban? (?:milk|tea|coffee|cheese|butter|rice|honey|chocolate)\b", text
        ), text


def test_vocabulary_is_small():
    rng = random.Random(0)
    texts = [*w.PROMPTS, *w.paragraphs(rng, 1000), *map(w.gold, sampled(1500))]
    texts += [text for r in w.practice_records(rng, 1500) for text in r.values()]
    assert 500 < len({word for text in texts for word in re.findall(r"[a-z]+", text.lower())}) < 900


# ---- rubric ----

GOLD = (
    "A tiger is an orange mammal that lives in the jungle. It eats meat and has sharp claws. "
    "It can swim well. Have a wonderful day!"
)


@pytest.mark.parametrize(
    "change, part",
    [
        (lambda g: g.replace("jungle", "desert"), "coverage"),
        (lambda g: g.replace("jungle", "desert"), "accuracy"),
        (lambda g: g.replace("It can swim well. ", ""), "coverage"),
        (lambda g: g.replace("the jungle", "the jungle and in the desert"), "coverage"),
        (lambda g: g.replace("the jungle", "the jungle and in the desert"), "accuracy"),
        (lambda g: g.replace("It can", "It is not small. It is not small. It can"), "form"),
        (lambda g: g.replace("a tiger", "a lion").replace("A tiger", "A lion"), "coverage"),
        (lambda g: g.replace(" Have a wonderful day!", ""), "form"),
        (lambda g: g.replace("tiger is", "tiger is is"), "form"),
        (lambda g: "um, " + g, "form"),
        (lambda g: g.replace("It eats", "Uh, it eats"), "form"),
        (lambda g: g.replace("claws.", "claws"), "form"),
        (lambda g: g[:-1], "form"),
        (str.lower, "form"),
        (lambda g: "a" + g[1:], "form"),
        (lambda g: f"{g} {g}", "form"),
        (lambda g: "There is so much to say, " * 12 + "but listen. " + g, "form"),
    ],
)
def test_a_worse_answer_scores_lower(change, part):
    before = score(TIGER, GOLD)
    after = score(TIGER, change(GOLD))
    assert before["score"] == 1.0
    assert after[part] < 1.0 and after["score"] < 1.0


def test_every_wrong_fact_lowers_coverage_and_accuracy():
    rng = random.Random(0)
    for task in sampled(300):
        fact = rng.choice([f for f in task.facts if f.kind != "word"])
        drawn = w._draw(task, rng)
        drawn[fact] = [rng.choice(fact.wrong), *drawn[fact][1:]]
        text = w._tidy_text(task, drawn, [*w.FAMILIES[task.family].answer, w.CLOSINGS[0]])
        marks = score(task.prompt, text)
        assert marks["coverage"] < 1 and marks["accuracy"] < 1 and marks["form"] == 1, text


def test_listing_everything_does_not_pay():
    homes = ", ".join(w.POOL["home"])
    marks = score("Where does a tiger live?", f"A tiger lives {homes}. {w.CLOSINGS[0]}")
    assert marks["coverage"] == 0 and marks["accuracy"] < 0.2
    every = "\n".join(f"{i}. The {a}." for i, a in enumerate(w.ANIMALS, 1))
    marks = score("List three birds.", f"Here are three birds:\n{every}\n{w.CLOSINGS[0]}")
    assert marks["coverage"] == 0 and marks["accuracy"] < 0.2 and marks["form"] < 0.8
    birds = ["1. The owl.", "2. The hen.", "3. The eagle."]
    for n in range(4):
        assert score("List three birds.", "\n".join(birds[:n]))["coverage"] == pytest.approx(n / 3)
    assert score("Does a tiger eat meat?", "Yes, no.")["coverage"] == 0


def test_an_empty_or_empty_headed_answer_is_not_rewarded():
    assert score(TIGER, "")["score"] == score(TIGER, " \n")["score"] == 0
    assert score(TIGER, w.CLOSINGS[0]) == pytest.approx(
        dict(score=0.2, coverage=0, accuracy=0, form=1)
    )
    assert score("Make a sentence with honey and bag.", "Honey bag.")["accuracy"] == 0


def test_facts_belong_to_the_entity_that_is_spoken_of():
    text = "{} lives in the forest and eats mice, while {} lives in the mountains and eats meat."
    right = text.format("An owl", "a wolf")
    swapped = text.format("A wolf", "an owl")
    prompt = next(p for p in w.PROMPTS if p.startswith("Compare") and "owl" in p and "wolf" in p)
    assert (
        score(prompt, right)["coverage"] == pytest.approx(4 / 6)
        and score(prompt, right)["accuracy"] == 1
    )
    assert score(prompt, swapped)["coverage"] == score(prompt, swapped)["accuracy"] == 0
    assert score(TIGER, "A lion lives in the jungle. It eats meat.")["coverage"] == 0
    # a falsehood that nobody asked for counts as well
    assert (
        score("Where does a tiger live?", "A tiger lives in the jungle and has a long neck.")[
            "accuracy"
        ]
        == 0.5
    )


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
    assert (len(seeds), len(heldout)) == (100, 150)
    assert w.split(0) == (seeds, heldout) and w.split(1) != (seeds, heldout)
    hidden = w.heldout_prompts(0)
    assert len(hidden) == 3 * len(heldout) and {r["prompt"] for r in heldout} <= hidden
    assert not {r["prompt"] for r in seeds} & hidden and hidden != w.heldout_prompts(1)
    assert len({r["prompt"] for r in seeds}) == 100
    for records in (seeds, heldout):
        families = Counter(r["family"] for r in records)
        assert set(families) == set(w.FAMILIES) and max(families.values()) < 0.2 * len(records)
        assert all(
            w.rubric(r["prompt"], r["response"])["score"] == pytest.approx(1) for r in records
        )
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
    for make in (
        lambda rng: w.web_records(rng, 50, set()),
        lambda rng: w.practice_records(rng, 50),
        lambda rng: w.paragraphs(rng, 50),
    ):
        assert make(random.Random(3)) == make(random.Random(3)) != make(random.Random(4))


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
    assert set(skills) == {"Clean", "Repeat", "Use", "Ask"} and min(map(len, skills.values())) > 400

    def letters(text: str) -> str:
        return re.sub(r"\b(?:um|uh|hmm)\b|[^a-z ]", "", text.lower()).strip()

    for r in skills["Clean"]:
        assert letters(r["prompt"].split(": ", 1)[1]) == letters(r["response"])
        assert r["response"][0].isupper() and r["response"][-1] in ".!?"
    for r in skills["Repeat"]:
        assert r["prompt"] == f"Repeat: {r['response']}"
    for r in skills["Use"]:
        words = re.split(r", | and ", re.match(r"Use the words (.*) in a sentence", r["prompt"])[1])
        places = [r["response"].index(word) for word in words]
        assert len(set(words)) == len(words) >= 2 and places == sorted(places)
    assert len({r["prompt"] for r in skills["Use"]}) > 0.95 * len(skills["Use"])


def test_keyword_questions_use_a_keyword_and_ignore_noise():
    used = []
    noisy = []
    for r in w.practice_records(random.Random(0), 2000):
        if r["prompt"].startswith("Ask something about: "):
            keywords = r["prompt"][21:-1].split(", ")
            words = set(w.content_words(r["response"]))
            assert w.parse(r["response"]) and 1 <= len(keywords) == len(set(keywords)) <= 3
            used.append(sum(k in words for k in keywords))
            noisy.append(len(keywords) == 3 and not all(k in words for k in keywords))
    assert min(used) >= 1 and mean(used) > 1.1 and 0.4 < mean(noisy) < 0.8

"""A small closed English world in which the quality of an answer can be measured without a judge.

The world. About 40 animals, 18 foods, 17 jobs (each with its work place and its tool) and 14 advice topics. Every
fact is true, or at least what a children's book would say; every entity has exactly one value of a kind (one home, one
food, ...); nearly every word is short and common, so that about 1,200 byte-level BPE tokens give close to one token a
word.

Families. A task is a family, a key and one of three phrasings: describe, habitat, diet, compare, riddle, check, story
and list are about animals; food, sentence, job, day, coworkers, tool, place and advice about the rest. A row of
`FAMILIES` holds the phrasings, the keys, and the answer as a template. The template's slots (`{x.home}`: the home of
the first key) are the facts that a good answer needs, so gold answers and rubric cannot drift apart. The same fact
serves many families: a tiger's home is needed in seven of them, and is a clue in the riddle.

Gold answers are correct, complete and tidy, with a numbered list where one is asked for and a friendly closing
sentence. Web answers, the training text of M_0, are not: each fact is wrong with p = 0.25, drawn anew every time, so
that the truth is the mode of what M_0 learns and sharpening towards the mode is a real gain; 70 % are terse (about a
third of the facts, lower case, "um,", no closing), 30 % are gold-like, but sentences and items are missing, and half
of them have no closing.

Rubric. score = 0.5 coverage + 0.3 accuracy + 0.2 form, each in 0..1, from the texts of prompt and response alone.
    coverage  share of the needed facts present. Every value of a kind beyond the number asked for cancels a hit, so
              naming two homes is worth as much as naming none.
    accuracy  of all facts stated about the asked entities, needed or not, the share that is right; 0 if none is
              stated. Words that the prompt only asks to be used are no facts.
    form      share of the checks that pass: capitals, punctuation, no fillers, a closing sentence (once, at the end),
              nothing said twice, at most twice as long as gold, a list numbered 1..n where one is asked for.
A statement belongs to the entity that opens its clause: "An owl eats mice" says nothing about the fox asked for.

Split. At most a quarter of the keys of every family is held out, in all phrasings; the seeds are drawn from the other
keys. Both go round the families in turn, so that small ones run out before large ones.

To disclose wherever a figure from this world is shown:
(1) What is held out is a combination, never an entity: M_0's web text holds the facts of a held-out prompt in other
    families, right three times out of four, and the corpus paragraphs hold them without errors.
(2) `practice_records` teaches M_0 skills that a real SFT model brings along: tidying and copying text, using given
    words, asking a question about keywords.
(3) Rubric, gold answers and web text come from the same templates: the rubric rewards this world's idea of a complete
    answer (a habitat without a neighbour is not) and knows no paraphrase of a value.
(4) It is a measure for small honest models, not a reward to optimise: a denied fact counts as stated, and one true
    fact alone has full accuracy.

Preview:  python demo/world.py
"""

import random
import re
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

# ---- facts: one entity a line, its values in the order of the column names ----


def _table(columns: str, rows: str) -> dict[str, dict[str, str]]:
    """'name: value, value' lines -> {name: {column: value}}."""
    pairs = (line.split(": ") for line in rows.strip().splitlines())
    return {
        name: dict(zip(columns.split(), values.split(", "), strict=True)) for name, values in pairs
    }


ANIMALS = _table(
    "class colour home food part skill",
    """
tiger: mammal, orange, in the jungle, meat, sharp claws, swim well
monkey: mammal, brown, in the jungle, fruit, long arms, swing from trees
bat: mammal, black, in the jungle, fruit, thin wings, hang upside down
parrot: bird, green, in the jungle, nuts, a curved beak, copy words
lion: mammal, yellow, on the plains, meat, a thick mane, roar loudly
elephant: mammal, grey, on the plains, leaves, a long trunk, carry logs
giraffe: mammal, yellow, on the plains, leaves, a long neck, see far
zebra: mammal, striped, on the plains, grass, round ears, kick hard
owl: bird, brown, in the forest, mice, big eyes, turn its head
fox: mammal, red, in the forest, mice, a bushy tail, hide well
bear: mammal, brown, in the forest, honey, thick fur, climb trees
squirrel: mammal, red, in the forest, nuts, a fluffy tail, jump far
wolf: mammal, grey, in the mountains, meat, sharp teeth, howl at night
goat: mammal, white, in the mountains, grass, curved horns, climb rocks
eagle: bird, brown, in the mountains, fish, wide wings, fly high
rabbit: mammal, grey, in the garden, leaves, long ears, hop quickly
mole: mammal, black, in the garden, worms, strong paws, dig tunnels
robin: bird, brown, in the garden, worms, a small beak, sing sweetly
bee: insect, yellow, in the garden, honey, a tiny sting, dance in the air
ant: insect, black, in the garden, seeds, six legs, lift heavy things
hedgehog: mammal, brown, in the garden, bugs, sharp spines, roll up
cow: mammal, brown, on the farm, grass, big horns, give milk
horse: mammal, brown, on the farm, grass, strong legs, run fast
sheep: mammal, white, on the farm, grass, soft wool, jump over fences
hen: bird, white, on the farm, seeds, short wings, lay eggs
frog: amphibian, green, in the river, bugs, a sticky tongue, jump far
beaver: mammal, brown, in the river, leaves, a flat tail, build dams
otter: mammal, brown, in the river, fish, webbed feet, float on its back
alligator: reptile, green, in the river, meat, a long snout, wait quietly
whale: mammal, blue, in the sea, fish, a wide mouth, sing songs
dolphin: mammal, grey, in the sea, fish, smooth skin, leap high
turtle: reptile, green, in the sea, grass, a hard shell, dive deep
seal: mammal, grey, in the snow, fish, short flippers, hold its breath
reindeer: mammal, brown, in the snow, grass, wide antlers, pull sleds
hare: mammal, white, in the snow, leaves, large feet, change its colour
camel: mammal, brown, in the desert, grass, a tall hump, walk for days
snake: reptile, brown, in the desert, mice, smooth scales, move silently
lizard: reptile, green, in the desert, bugs, a long tail, climb walls
""",
)
FOODS = _table(
    "group colour taste source",
    """
apple: fruit, red, sweet, a tree
cherry: fruit, red, sweet, a tree
lemon: fruit, yellow, sour, a tree
olive: fruit, green, salty, a tree
banana: fruit, yellow, sweet, a tall plant
grape: fruit, green, sweet, a vine
cucumber: vegetable, green, mild, a vine
carrot: vegetable, orange, sweet, the ground
potato: vegetable, brown, mild, the ground
onion: vegetable, white, sharp, the ground
milk: drink, white, mild, a cow
tea: drink, brown, bitter, dry leaves
coffee: drink, black, bitter, roasted beans
cheese: dairy food, yellow, salty, warm milk
butter: dairy food, yellow, mild, fresh cream
rice: grain, white, mild, wet fields
honey: sweet treat, yellow, sweet, bees
chocolate: sweet treat, brown, sweet, cocoa beans
""",
)
UNCOUNTED = {
    "milk",
    "tea",
    "coffee",
    "cheese",
    "butter",
    "rice",
    "honey",
    "chocolate",
}  # no "a" before these
WORK = _table(
    "place duty tool use material feel thing activity",
    """
baker: bakery, bakes bread, oven, heat dough, metal, warm, fresh rolls, buy cakes
doctor: hospital, helps sick people, thermometer, measure fever, glass, clean, many beds, get well
teacher: school, teaches children, pen, write words, plastic, lively, small desks, learn new things
farmer: farm, grows wheat, tractor, pull heavy loads, metal, peaceful, a big barn, pick apples
fisher: harbour, sells fresh fish, net, catch fish, rope, windy, many boats, watch ships
gardener: park, plants flowers, shovel, dig holes, metal, sunny, tall trees, take walks
carpenter: workshop, makes chairs, hammer, hit nails, metal, dusty, long boards, order furniture
painter: studio, paints pictures, brush, spread paint, wood, bright, large windows, see art
tailor: shop, sews coats, needle, join cloth, metal, tidy, pretty buttons, buy clothes
cook: restaurant, prepares meals, pan, fry eggs, metal, cosy, round tables, have dinner
barber: salon, cuts hair, razor, shave beards, metal, bright, big mirrors, get haircuts
firefighter: fire station, puts out fires, hose, spray water, rubber, busy, a fast truck, report smoke
pilot: airport, flies planes, radio, talk to the tower, plastic, loud, long runways, travel far
courier: post office, brings letters, bag, carry parcels, leather, busy, many stamps, send cards
mechanic: garage, repairs cars, wrench, turn bolts, metal, loud, old tyres, fix engines
musician: theatre, plays music, violin, play songs, wood, dark, soft seats, hear concerts
librarian: library, lends books, stamp, mark dates, rubber, quiet, tall shelves, borrow novels
""",
)
ADVICE = _table(
    "a b c d",
    """
sleep better: go to bed early, keep the room dark, put the phone away, drink less coffee
learn a language: read every day, sing foreign songs, speak with friends, write new words down
save money: cook at home, walk more often, repair old things, compare prices
stay healthy: eat fresh vegetables, drink enough water, run every morning, rest after work
make friends: smile at people, join a club, ask kind questions, help your neighbours
pass a test: make a plan, read your notes, take short breaks, practise with a friend
grow flowers: choose a sunny spot, water the soil, pull out weeds, buy good seeds
keep a room clean: open the windows, put toys in boxes, sweep the floor, wash the sheets
feel calm: breathe slowly, take a quiet walk, listen to soft music, talk to a friend
write a story: choose a hero, describe the place, add a surprise, read it aloud
cook a good soup: use fresh carrots, cut them small, taste it often, add a little salt
pack for a trip: write a list, roll your clothes, bring a jacket, leave some space
care for a dog: walk it daily, brush its fur, fill its bowl, visit the vet
speak in public: know your topic, stand up straight, look at the crowd, pause between ideas
""",
)
COUNT = {"three": 3, "four": 4}
CLOSINGS = (
    "I hope this helps you!",
    "Have a wonderful day!",
    "Thank you for asking!",
    "Feel free to ask me more!",
)
FILLERS = ("um", "uh", "hmm")
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Lena", "Oscar")


def _groups() -> dict[str, list[str]]:
    """Groups that a list can ask for, such as 'animals that eat grass' -> its members (three or more)."""
    groups: dict[str, list[str]] = {}
    for name, animal in ANIMALS.items():
        for group in (
            f"animals that live {animal['home']}",
            f"animals that eat {animal['food']}",
            f"{animal['colour']} animals",
            f"{animal['class']}s",
        ):
            groups.setdefault(group, []).append(name)
    return {group: members for group, members in groups.items() if len(members) >= 3}


GROUPS = _groups()
TABLES = {
    "animal": list(ANIMALS),
    "food": list(FOODS),
    "job": list(WORK),
    "tool": [w["tool"] for w in WORK.values()],
    "place": [w["place"] for w in WORK.values()],
}
TABLE_OF = {name: table for table, names in TABLES.items() for name in names}


def _records() -> dict[str, dict[str, tuple[str, ...]]]:
    """Entity -> kind -> acceptable values; "call" is no fact but the entity with its article."""
    records: dict[str, dict[str, tuple[str, ...]]] = {}
    for name, animal in ANIMALS.items():

        def alike(column: str, name: str = name) -> tuple[str, ...]:
            return tuple(
                a for a in ANIMALS if a != name and ANIMALS[a][column] == ANIMALS[name][column]
            )

        records[name] = {k: (v,) for k, v in animal.items()}
        records[name] |= {
            "call": (f"a(n) {name}",),
            "name": (name,),
            "neighbour": alike("home"),
            "rival": alike("food"),
        }
    for name, food in FOODS.items():
        records[name] = {k: (v,) for k, v in food.items()}
        records[name]["call"] = (name if name in UNCOUNTED else f"a(n) {name}",)
    for job, w in WORK.items():
        rows = {
            job: {
                "call": f"a(n) {job}",
                "place": w["place"],
                "duty": w["duty"],
                "tool": w["tool"],
                "how": w["use"],
            },
            w["tool"]: {
                "call": f"a(n) {w['tool']}",
                "use": w["use"],
                "material": w["material"],
                "user": job,
                "spot": w["place"],
            },
            w["place"]: {
                "call": f"the {w['place']}",
                "feel": w["feel"],
                "thing": w["thing"],
                "worker": job,
                "activity": w["activity"],
            },
        }
        records |= {name: {k: (v,) for k, v in row.items()} for name, row in rows.items()}
    records |= {
        group: {"animal": tuple(f"the {m}" for m in members)} for group, members in GROUPS.items()
    }
    return records | {topic: {"tip": tuple(tips.values())} for topic, tips in ADVICE.items()}


RECORD = _records()
POOL: dict[str, list[str]] = {
    "verdict": ["Yes", "No"]
}  # kind -> all values, right or wrong, that an answer can state
for _record in RECORD.values():
    for _kind, _values in _record.items():
        POOL[_kind] = list(dict.fromkeys([*POOL.get(_kind, []), *_values]))
LISTED = ("animal", "tip")  # kinds of which the prompt asks for several
GLOBAL = (
    "verdict",
    "name",
    "neighbour",
    "rival",
    "word",
    *LISTED,
)  # looked for in all of the text, if needed at all
SAY = {  # a fact as a short clause after the entity: the wording of terse web answers and of the corpus
    "class": "is a(n) {}",
    "colour": "is {}",
    "home": "lives {}",
    "food": "eats {}",
    "part": "has {}",
    "skill": "can {}",
    "name": "is a(n) {}",
    "neighbour": "lives near the {}",
    "rival": "shares its food with the {}",
    "group": "is a(n) {}",
    "taste": "tastes {}",
    "source": "comes from {}",
    "place": "works at the {}",
    "duty": "{}",
    "tool": "uses a(n) {}",
    "how": "knows how to {}",
    "use": "helps to {}",
    "material": "is made of {}",
    "user": "is used by a(n) {}",
    "spot": "is found at the {}",
    "feel": "is a {} place",
    "thing": "has {}",
    "worker": "has a(n) {}",
    "activity": "is the place to {}",
    "verdict": "{},",
}


# ---- families ----


class Family(NamedTuple):
    """phrasings: prompt templates; keys: values of (x, y); answer: gold template, "|" between sentences."""

    phrasings: tuple[str, str, str]
    keys: list[tuple[str, ...]]
    answer: str


def _check_keys() -> list[tuple[str, str]]:
    """Every animal with its food and with one wrong food: "yes" and "no" are equally often right."""
    foods = list(POOL["food"])
    return [
        (a, f)
        for i, a in enumerate(ANIMALS)
        for f in (
            ANIMALS[a]["food"],
            foods[(foods.index(ANIMALS[a]["food"]) + 1 + i % (len(foods) - 1)) % len(foods)],
        )
    ]


def _each(names) -> list[tuple[str]]:
    return [(name,) for name in names]


FAMILIES = {
    "describe": Family(
        ("Describe a(n) {x}.", "Tell me about the {x}.", "What kind of animal is a(n) {x}?"),
        _each(ANIMALS),
        "a(n) {x} is a(n) {x.colour} {x.class} that lives {x.home}.|It eats {x.food} and has {x.part}.|"
        "It can {x.skill}.",
    ),
    "habitat": Family(
        (
            "Where does a(n) {x} live?",
            "What is the home of a(n) {x}?",
            "Where can I find a(n) {x}?",
        ),
        _each(ANIMALS),
        "a(n) {x} is a(n) {x.class} that lives {x.home}.|When it is hungry, it eats {x.food}.|"
        "It shares its home with the {x.neighbour}.",
    ),
    "diet": Family(
        (
            "What does a(n) {x} eat?",
            "What is the favourite food of a(n) {x}?",
            "What should I feed a(n) {x}?",
        ),
        _each(ANIMALS),
        "a(n) {x} likes to eat {x.food}.|This {x.class} lives {x.home}.|The {x.rival} eats {x.food}, too.",
    ),
    "compare": Family(
        (
            "Compare a(n) {x} and a(n) {y}.",
            "What is the difference between a(n) {x} and a(n) {y}?",
            "How is a(n) {x} different from a(n) {y}?",
        ),
        [
            (a, b)
            for a, b in combinations(ANIMALS, 2)  # only animals that do differ
            if all(ANIMALS[a][kind] != ANIMALS[b][kind] for kind in ("home", "food"))
        ],
        "a(n) {x} lives {x.home}, and a(n) {y} lives {y.home}.|The {x} eats {x.food}, while the {y} eats {y.food}.|"
        "The {x} has {x.part}, and the {y} has {y.part}.",
    ),
    "riddle": Family(
        (
            "I live {x.home}, I eat {x.food} and I have {x.part}. Who am I?",
            "Which animal lives {x.home}, eats {x.food} and has {x.part}?",
            "Guess the animal: it has {x.part}, eats {x.food} and lives {x.home}.",
        ),
        _each(ANIMALS),
        "That is a nice riddle, and the answer is a(n) {x.name}.|It is a(n) {x.colour} {x.class}.|"
        "It can {x.skill}.",
    ),
    "check": Family(
        (
            "Does a(n) {x} eat {y}?",
            "Is it true that a(n) {x} eats {y}?",
            "I think that a(n) {x} eats {y}. Am I right?",
        ),
        _check_keys(),
        "{x.verdict}, a(n) {x} is a(n) {x.class} that eats {x.food}.|It lives {x.home} and can {x.skill}.",
    ),
    "story": Family(
        (
            "Tell me a short story about a(n) {x} at the {y}.",
            "Write a short story: a(n) {x} visits the {y}.",
            "What happens when a(n) {x} comes to the {y}?",
        ),
        [
            (a, p) for a in ANIMALS for p in TABLES["place"] if p != "farm"
        ],  # the farm is also an animal's home
        "One day, a(n) {x} came to the {y.word} and met a(n) {y.worker}.|"
        "The {x} had {x.part} and was looking for {x.food}.|They became good friends.|"
        "In the evening, it was back home {x.home}.",
    ),
    "list": Family(
        ("List {y} {x}.", "Can you name {y} {x}?", "Please give me a list of {y} {x}."),
        [(g, n) for g, members in GROUPS.items() for n in COUNT if COUNT[n] <= len(members)],
        "Here are {y} {x}:{x.animal}",
    ),
    "food": Family(
        ("What is {x.call}?", "Describe {x.call} to a child.", "What do you know about {x.call}?"),
        _each(FOODS),
        "{x.call} is a(n) {x.group} and comes from {x.source}.|It is {x.colour} and tastes {x.taste}.|"
        "Many people like it.",
    ),
    "sentence": Family(
        (
            "Write a sentence with the words {x} and {y}.",
            "Make a sentence with {x} and {y}.",
            "Can you use {x} and {y} in one sentence?",
        ),
        [(f, t) for f in FOODS for t in TABLES["tool"]],
        "Here is a sentence with both words.|"
        "At the {y.spot}, the {y.user} cleaned the {y.word} and tasted the {x.taste} {x.word}.",
    ),
    "job": Family(
        (
            "What does a(n) {x} do?",
            "Tell me about the work of a(n) {x}.",
            "Explain the job of a(n) {x}.",
        ),
        _each(WORK),
        "a(n) {x} works at the {x.place} and {x.duty}.|"
        "The {x} uses a(n) {x.tool} and knows how to {x.how}.",
    ),
    "day": Family(
        (
            "Describe a day in the life of a(n) {x}.",
            "How does a(n) {x} spend the day?",
            "What is a day as a(n) {x} like?",
        ),
        [(job, w["place"]) for job, w in WORK.items()],
        "In the morning, a(n) {x} goes to the {x.place}, a {y.feel} place with {y.thing}.|"
        "The {x} {x.duty} and uses a(n) {x.tool}.|In the evening, the {x} is tired but happy.",
    ),
    "coworkers": Family(
        (
            "Compare the work of a(n) {x} and a(n) {y}.",
            "How do a(n) {x} and a(n) {y} differ?",
            "What do a(n) {x} and a(n) {y} do at work?",
        ),
        list(combinations(WORK, 2)),
        "a(n) {x} works at the {x.place}, and a(n) {y} works at the {y.place}.|"
        "The {x} {x.duty}, while the {y} {y.duty}.|The {x} uses a(n) {x.tool}, and the {y} uses a(n) {y.tool}.",
    ),
    "tool": Family(
        (
            "What is a(n) {x} for?",
            "Who uses a(n) {x}, and why?",
            "Explain how people use a(n) {x}.",
        ),
        _each(TABLES["tool"]),
        "a(n) {x} helps people to {x.use}.|It is made of {x.material}.|"
        "A(n) {x.user} uses it every day at the {x.spot}.",
    ),
    "place": Family(
        ("What can I find at the {x}?", "Tell me about the {x}.", "Why do people go to the {x}?"),
        _each(TABLES["place"]),
        "The {x} is a {x.feel} place with {x.thing}.|People go there to {x.activity}.|"
        "A(n) {x.worker} works there and likes to help.",
    ),
    "advice": Family(
        (
            "Give me {y} tips to {x}.",
            "I want to {x}. What are {y} good tips?",
            "How can I {x}? Name {y} tips.",
        ),
        [(topic, n) for topic in ADVICE for n in COUNT],
        "Here are {y} tips to {x}:{x.tip}",
    ),
}


@dataclass(frozen=True)
class Fact:
    """One thing a good answer says: `count` values of a kind about an entity, out of those in `accept`."""

    about: str
    kind: str
    accept: tuple[str, ...]
    count: int = 1

    @property
    def wrong(self) -> list[str]:
        """The values of the same kind that contradict the fact."""
        return [v for v in POOL.get(self.kind, []) if v not in self.accept and v != self.about]


@dataclass(frozen=True)
class Task:
    """An instruction of the world and the facts that its answer needs."""

    family: str
    key: tuple[str, ...]
    prompt: str
    facts: tuple[Fact, ...]


def fill(
    template: str, key: tuple[str, ...], said: dict[tuple[str, str], str] | None = None
) -> str:
    """Template -> text. `said` overrides the true value of (entity, kind); a(n) and capitals are resolved last."""
    names = dict(zip("xy", key, strict=False))

    def slot(match: re.Match) -> str:
        name, kind = names[match[1]], match[2]
        if kind is None or kind == "word":
            return name
        return (said or {}).get((name, kind)) or RECORD[name][kind][0]

    text = re.sub(r"\{([xy])(?:\.(\w+))?\}", slot, template)
    text = re.sub(r"\b([Aa])\(n\)(?= ([aeiou]?))", lambda m: m[1] + ("n" if m[2] else ""), text)
    return re.sub(r"(^|[.!?]\s+)([a-z])", lambda m: m[1] + m[2].upper(), text)


def make_task(family: str, key: tuple[str, ...], phrasing: int) -> Task:
    """The task of a family's key in one of its three phrasings (0, 1, 2)."""
    names, facts = dict(zip("xy", key, strict=False)), []
    for who, kind in dict.fromkeys(re.findall(r"\{([xy])\.(\w+)\}", FAMILIES[family].answer)):
        if kind == "verdict":
            facts.append(
                Fact(names[who], kind, ("Yes" if key[1] in RECORD[key[0]]["food"] else "No",))
            )
        elif kind == "word":
            facts.append(Fact(names[who], kind, (names[who],)))
        elif kind != "call":
            facts.append(
                Fact(
                    names[who],
                    kind,
                    RECORD[names[who]][kind],
                    COUNT[key[1]] if kind in LISTED else 1,
                )
            )
    return Task(family, key, fill(FAMILIES[family].phrasings[phrasing], key), tuple(facts))


PROMPTS = {
    fill(phrasing, key): (name, key, i)
    for name, family in FAMILIES.items()
    for key in family.keys
    for i, phrasing in enumerate(family.phrasings)
}


def parse(prompt: str) -> Task | None:
    """The task behind a prompt, or None if the prompt is not of this world."""
    found = PROMPTS.get(prompt.strip())
    return make_task(*found) if found else None


# ---- answers ----


def _draw(task: Task, rng: random.Random, p_wrong: float = 0.0) -> dict[Fact, list[str]]:
    """Values to state for every fact, each wrong with p_wrong. Given words never are: they are copied, not known."""
    drawn = {}
    for fact in task.facts:
        values, wrong = rng.sample(fact.accept, fact.count), fact.wrong
        bad = rng.sample(wrong, min(fact.count, len(wrong)))
        drawn[fact] = [
            bad[i] if bad and fact.kind != "word" and rng.random() < p_wrong else v
            for i, v in enumerate(values)
        ]
    return drawn


def _tidy_text(task: Task, drawn: dict[Fact, list[str]], sentences: list[str], closing: str) -> str:
    """The answer template's sentences with the drawn values, then the closing (which may be empty)."""
    said, separator = {}, " "
    for fact, values in drawn.items():
        said[fact.about, fact.kind] = values[0]
        if fact.kind in LISTED:
            said[fact.about, fact.kind] = "".join(f"\n{i}. {v}." for i, v in enumerate(values, 1))
            separator = "\n"
    return fill(separator.join([*sentences, closing] if closing else sentences), task.key, said)


def gold(task: Task, rng: random.Random | None = None) -> str:
    """A correct, complete and tidy answer; without an rng, always the same one for a prompt."""
    rng = rng or random.Random(task.prompt)
    return _tidy_text(
        task, _draw(task, rng), FAMILIES[task.family].answer.split("|"), rng.choice(CLOSINGS)
    )


def _terse_text(task: Task, drawn: dict[Fact, list[str]], rng: random.Random) -> str:
    """Some of the facts as lower-case clauses: "um, a tiger eats meat and has sharp claws"."""
    if task.facts[0].kind in LISTED:
        values = next(iter(drawn.values()))
        text = " and ".join(values) if task.family == "advice" else ", ".join(values)
    else:
        known = [
            f for f in task.facts if f.kind != "word"
        ]  # a given word appears when its entity is named
        some = set(rng.sample(known, rng.randint(1, (len(known) + 1) // 2)))
        clauses: dict[str, list[str]] = {}  # by subject, in the order of the gold answer
        for fact in (f for f in known if f in some):
            subject = "it" if task.family == "riddle" else RECORD[fact.about]["call"][0]
            subject = "" if fact.kind == "verdict" else subject
            clauses.setdefault(subject, []).append(SAY[fact.kind].format(drawn[fact][0]))
        text = " and ".join(
            f"{subject} {' and '.join(said)}".strip() for subject, said in clauses.items()
        )
        text = text.replace(", and ", ", ").rstrip(",")
    text = fill(text, ()).lower()
    if rng.random() < 0.5:
        text = f"{rng.choice(FILLERS)}, {text}"
    return text + ("." if rng.random() < 0.3 else "")


def web_answer(task: Task, rng: random.Random, p_wrong: float = 0.25, p_terse: float = 0.7) -> str:
    """An imperfect answer of the kind M_0 is trained on (see the module's docstring)."""
    drawn = {
        f: values[: rng.randint(1, f.count)] for f, values in _draw(task, rng, p_wrong).items()
    }
    if rng.random() < p_terse:
        return _terse_text(task, drawn, rng)
    sentences = FAMILIES[task.family].answer.split("|")
    kept = [s for s in sentences if rng.random() < 0.7] or [rng.choice(sentences)]
    return _tidy_text(task, drawn, kept, rng.choice(CLOSINGS) if rng.random() < 0.5 else "")


# ---- rubric ----


def _core(value: str) -> str:
    """The part of a value that is looked for: "on the farm" -> "farm"."""
    return re.sub(r"^(?:(?:in|on|a|an|the) )+", "", value.lower())


def _any_of(words) -> str:
    return "(" + "|".join(sorted(map(re.escape, words), key=len, reverse=True)) + ")"


FIND = {kind: re.compile(rf"\b{_any_of(map(_core, values))}\b") for kind, values in POOL.items()}
# an entity opens a clause only at its start: "shares its home with the parrot" says nothing about parrots
OPENS = {
    table: re.compile(
        rf"(?:^|[.!?,:]|\b(?:and|but|while|are|is))\s*(?:an? |the )?\b{_any_of(names)}(?:e?s)?\b"
    )
    for table, names in TABLES.items()
}


def _about(text: str, name: str, key: tuple[str, ...]) -> str:
    """The clauses of a lower-case text whose subject is `name`; before any subject it is the first one asked for."""
    table = TABLE_OF.get(name)
    if table is None:
        return text
    parts = OPENS[table].split(text)  # text, name, text, name, text ...
    subjects = [next(k for k in key if TABLE_OF.get(k) == table), *parts[1::2]]
    return " ".join(
        part for subject, part in zip(subjects, parts[::2], strict=True) if subject == name
    )


def _stated(fact: Fact, text: str, key: tuple[str, ...]) -> set[str]:
    """The values of the fact's kind that the text states about its entity."""
    if fact.kind == "word":
        return set(re.findall(rf"\b{re.escape(fact.about)}\b", text))
    where = text if fact.kind in GLOBAL else _about(text, fact.about, key)
    return set(FIND[fact.kind].findall(where)) - (
        {fact.about} if fact.kind in ("neighbour", "rival") else set()
    )


def _form(task: Task, response: str) -> float:
    """Share of the form checks that a response passes, 0..1."""
    lines = [re.sub(r"^\d+\. ", "", line) for line in response.strip().splitlines()]
    sentences = [s for line in lines for s in re.split(r"(?<=[.!?])\s+", line) if s]
    if not sentences:
        return 0.0
    checks = [
        all(s[0].isupper() for s in sentences),
        lines[-1][-1] in ".!?"
        and all(line.endswith((".", "!", "?", ":")) for line in lines)
        and not re.search(
            r"[a-z] [A-Z]", response
        ),  # a capital inside a sentence: the one before it has no end
        not re.search(rf"\b{_any_of(FILLERS)}\b", response.lower()),
        sentences[-1] in CLOSINGS and sum(s in CLOSINGS for s in sentences) == 1,
        len({s.lower() for s in sentences}) == len(sentences)
        and not re.search(r"\b(\w+) \1\b", response.lower()),
        len(response.split()) <= 2 * len(gold(task).split()),
    ]
    asked = [f.count for f in task.facts if f.kind in LISTED]
    if asked:
        checks.append(
            re.findall(r"^(\d+)\. ", response, re.M) == [str(i + 1) for i in range(asked[0])]
        )
    return sum(checks) / len(checks)


def rubric(prompt: str, response: str) -> dict[str, float] | None:
    """Score, coverage, accuracy and form, each 0..1, of a response; None if the prompt is not of this world."""
    task = parse(prompt)
    if task is None:
        return None
    text = re.sub(r"\s*\n(?:\d+\. )?", ". ", response.lower())
    hits = right = stated = 0
    for fact in task.facts:
        said, good = _stated(fact, text, task.key), set(map(_core, fact.accept))
        hits += max(0, min(fact.count, len(said & good)) - max(0, len(said) - fact.count))
        if fact.kind in GLOBAL and fact.kind != "word":
            right, stated = right + len(said & good), stated + len(said)
    for name in {
        f.about for f in task.facts
    }:  # all that the world knows of them: an unasked falsehood counts, too
        for kind in RECORD[name].keys() - {"call", *GLOBAL}:
            fact = Fact(name, kind, RECORD[name][kind])
            said = _stated(fact, text, task.key)
            right, stated = right + len(said & set(map(_core, fact.accept))), stated + len(said)
    coverage = hits / sum(f.count for f in task.facts)
    accuracy, form = right / stated if stated else 0.0, _form(task, response)
    return {
        "score": 0.5 * coverage + 0.3 * accuracy + 0.2 * form,
        "coverage": coverage,
        "accuracy": accuracy,
        "form": form,
    }


# ---- data sets ----


def _held_out(seed: int, n: int) -> list[tuple[str, tuple[str, ...]]]:
    """(family, key) of at most n held-out keys: in turn from every family until a quarter of its keys is used."""
    rng = random.Random(f"held out {seed}")
    pools = {
        name: rng.sample(family.keys, len(family.keys) // 4) for name, family in FAMILIES.items()
    }
    return [(name, pool[i]) for i in range(n) for name, pool in pools.items() if i < len(pool)][:n]


def heldout_prompts(seed: int, n_heldout: int = 150) -> set[str]:
    """All phrasings of all held-out keys: what no training data may contain."""
    return {
        make_task(name, key, i).prompt for name, key in _held_out(seed, n_heldout) for i in range(3)
    }


def split(seed: int, n_seeds: int = 100, n_heldout: int = 150) -> tuple[list[dict], list[dict]]:
    """(seeds, heldout): records of prompt, response (gold) and family; one random phrasing of each key."""
    rng, held = random.Random(f"split {seed}"), _held_out(seed, n_heldout)
    free = {
        name: [k for k in family.keys if (name, k) not in held] for name, family in FAMILIES.items()
    }
    turns = {name: rng.sample(keys, len(keys)) for name, keys in free.items()}
    seeds = [
        (name, keys[i]) for i in range(n_seeds) for name, keys in turns.items() if i < len(keys)
    ][:n_seeds]

    def record(name: str, key: tuple[str, ...]) -> dict:
        task = make_task(name, key, rng.randrange(3))
        return {"prompt": task.prompt, "response": gold(task), "family": name}

    return [record(*s) for s in seeds], [record(*h) for h in held]


def sample_task(rng: random.Random, exclude: set[str] = frozenset()) -> Task:
    """A random task whose prompt is not excluded: uniform over families, then over keys and phrasings."""
    while True:
        name = rng.choice(list(FAMILIES))
        task = make_task(name, rng.choice(FAMILIES[name].keys), rng.randrange(3))
        if task.prompt not in exclude:
            return task


def web_records(rng: random.Random, n: int, exclude: set[str]) -> list[dict]:
    """n records of prompt and web answer: M_0's training data."""
    tasks = [sample_task(rng, exclude) for _ in range(n)]
    return [{"prompt": task.prompt, "response": web_answer(task, rng)} for task in tasks]


SCENES = (
    "{n} the {j} dreamed of a(n) {a} at the {p}.",
    "{n} found a(n) {t} on the way to the {p}.",
    "{n} looked up from the {t} when the {a} came closer.",
    "Yesterday {n} drew a picture of a(n) {a} and a(n) {t}.",
    "After lunch, {n} talked with a(n) {j} about the {a}.",
    "{n} bought {f} and walked slowly to the {p}.",
    "The children asked {n} for {f} and a picture of the {a}.",
    "Next week {n} wants to visit the {j} and see the {a}.",
    "{n} read a book about the {a} and drank some tea.",
    "The {j} showed {n} the {t} and told a story about {f}.",
)


def paragraphs(rng: random.Random, n: int) -> list[str]:
    """n corpus paragraphs of 2-4 correct sentences: an entity, and mostly a scene with a person who has a name."""
    texts = []
    for _ in range(n):
        table = rng.choice(list(TABLES))
        name = rng.choice(TABLES[table])
        said = [
            SAY[k].format(*values)
            for k, values in RECORD[name].items()
            if k in SAY and k not in GLOBAL
        ]
        rng.shuffle(said)
        subject, sentences = RECORD[name]["call"][0], []
        while said and len(sentences) < 3:
            size = rng.randint(1, 2)
            sentences.append(f"{subject} {' and '.join(said[:size])}.")
            said, subject = said[size:], f"the {name}" if table == "job" else "it"
        if rng.random() < 0.7 or len(sentences) < 3:
            scene = rng.choice(SCENES).format(
                n=rng.choice(NAMES),
                **{
                    t[0]: RECORD[other]["call"][0] if t == "food" else other
                    for t in TABLES
                    for other in [name if t == table else rng.choice(TABLES[t])]
                },
            )
            sentences.insert(rng.choice((0, len(sentences))), scene)
        texts.append(fill(" ".join(sentences), ()))
    return texts


USES = (
    (
        "The {} is near the {}.",
        "We saw the {} behind the {}.",
        "You can see the {} next to the {}.",
        "I like the {} more than the {}.",
        "My friend forgot the {} and found the {}.",
        "First we talked about the {}, then about the {}.",
    ),
    (
        "The {} is between the {} and the {}.",
        "I dreamed of the {}, the {} and the {}.",
        "She drew the {}, the {} and then the {}.",
    ),
)
NOUNS = [
    *TABLE_OF,
    "river",
    "lamp",
    "garden",
    "table",
    "window",
    "friend",
    "book",
    "road",
    "house",
    "moon",
    "train",
]
STOP = set(
    """the and for from with are was does what can you where who which why how when that this there about tell
give make use name list write please has have than three four word words sentence between good know guess animal compare
describe explain difference different differ kind like true one both find""".split()
)  # never keywords


def content_words(text: str) -> list[str]:
    """The distinct content words of a text, in lower case."""
    return [w for w in dict.fromkeys(re.findall(r"[a-z]{3,}", text.lower())) if w not in STOP]


def clean(text: str) -> str:
    """A terse text with a capital, a full stop and no filler; its facts stay as they are."""
    text = re.sub(rf"^(?:{_any_of(FILLERS)}, )+", "", text.strip())
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def practice_records(rng: random.Random, n: int, exclude: set[str] = frozenset()) -> list[dict]:
    """n records of prompt and response, of four skills: clean up a text, repeat one, use given words, ask.

    "Clean up" never adds or corrects a fact: completing and correcting are for the improver to learn from the seeds.
    """
    records = []
    for _ in range(n):
        task, skill = sample_task(rng, exclude), rng.randrange(4)
        if skill == 0:
            text = web_answer(task, rng, p_terse=0.9)
            records.append({"prompt": f"Clean up this text: {text}", "response": clean(text)})
        elif skill == 1:
            text = rng.choice((web_answer(task, rng), paragraphs(rng, 1)[0]))
            records.append({"prompt": f"Repeat: {text}", "response": text})
        elif skill == 2:
            count = rng.choice((2, 2, 3))
            words = rng.sample(NOUNS, count)
            given = " and ".join([", ".join(words[:-1]), words[-1]])
            records.append(
                {
                    "prompt": f"Use the words {given} in a sentence.",
                    "response": rng.choice(USES[count - 2]).format(*words),
                }
            )
        else:  # one word of the prompt, one of it or of its subject, and often one that has nothing to do with it
            asked = content_words(task.prompt)
            known = " ".join(
                v
                for f in task.facts
                for k, values in RECORD[f.about].items()
                if k not in GLOBAL
                for v in values
            )
            related = asked + [w for w in content_words(known) if w not in asked]
            words = rng.sample(asked, 1)
            words += [w for w in rng.sample(related, len(related)) if w not in words][:1]
            if rng.random() < 0.6:
                other = content_words(sample_task(rng, exclude).prompt)
                words += [w for w in rng.sample(other, len(other)) if w not in related][:1]
            records.append(
                {
                    "prompt": f"Ask something about: {', '.join(rng.sample(words, len(words)))}.",
                    "response": task.prompt,
                }
            )
    return records


def main() -> None:
    """Print a preview of every family and the statistics of the world."""
    rng = random.Random(0)

    def marks(r: dict) -> str:
        return "  ".join(f"{k} {v:.2f}" for k, v in r.items())

    for name, family in FAMILIES.items():
        task = make_task(name, rng.choice(family.keys), rng.randrange(3))
        print(f"\n== {name}: {len(family.keys)} keys, {3 * len(family.keys)} prompts")
        print(f"{task.prompt}\n  gold: {gold(task)}")
        for _ in range(3):
            text = web_answer(task, rng)
            print(f"   web: {text}\n        [{marks(rubric(task.prompt, text))}]")
    print("\n== corpus paragraphs", *paragraphs(rng, 6), sep="\n  ")
    print("\n== practice")
    for r in practice_records(rng, 12):
        print(f"  {r['prompt']}\n    -> {r['response']}")
    web, tasks = web_records(rng, 4000, set()), [sample_task(rng) for _ in range(4000)]
    scores = [rubric(r["prompt"], r["response"]) for r in web]
    golds, corpus = [gold(t) for t in tasks], paragraphs(rng, 2000)
    words = {
        w
        for text in [
            *PROMPTS,
            *golds,
            *corpus,
            *(r["prompt"] + " " + r["response"] for r in practice_records(rng, 4000) + web),
        ]
        for w in re.findall(r"[a-z]+", text.lower())
    }
    print(
        f"\nprompts {len(PROMPTS)}  distinct words {len(words)}  web rubric: "
        + marks({k: sum(s[k] for s in scores) / len(scores) for k in scores[0]})
    )
    for label, texts in (
        ("gold", golds),
        ("web", [r["response"] for r in web]),
        ("corpus", corpus),
    ):
        print(f"mean words {label}: {sum(len(t.split()) for t in texts) / len(texts):.1f}")


if __name__ == "__main__":
    main()

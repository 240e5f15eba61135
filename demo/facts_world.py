"""A small closed English world in which the quality of an answer can be measured without a judge.

The world. About 40 animals, 18 foods, 17 jobs (each with its work place and its tool) and 14 advice
topics. Every fact is true, or at least what a children's book would say; every entity has exactly
one value of a kind (one home, one food, ...); nearly every word is short and common, so that about
1,200 byte-level BPE tokens give close to one token a word.

Families. A task is a family, a key and one of three phrasings: describe, habitat, diet, compare,
riddle, check, story and list are about animals; food, sentence, job, day, coworkers, tool, place
and advice about the rest. A row of `FAMILIES` holds the phrasings, the keys, and the answer as a
template. The template's slots (`{x.home}`: the home of the first key) are the facts that a good
answer needs, so gold answers and rubric cannot drift apart. The same fact serves many families:
a tiger's home is needed in seven of them, and is a clue in the riddle.

Gold answers are correct, complete and tidy, with a numbered list where one is asked for and a
friendly closing sentence. Web answers, the training text of M_0, are not: each fact is wrong with
p = 0.25, drawn anew every time, so that the truth is the mode of what M_0 learns and sharpening
towards the mode is a real gain; 70 % are terse (about a third of the facts, lower case, "um,", no
closing), 30 % are gold-like, but sentences and items are missing, and half of them have no closing.

Rubric. score = 0.5 coverage + 0.3 accuracy + 0.2 form, each in 0..1, of prompt and response alone.
    coverage  share of the needed facts present. Every value of a kind beyond the number asked for
              cancels a hit, so naming two homes is worth as much as naming none.
    accuracy  of all facts stated about the asked entities, needed or not, the share that is right;
              0 if none is stated. Words that the prompt only asks to be used are no facts.
    form      share of the checks that pass: capitals, punctuation, no fillers, a closing sentence
              (once, at the end), nothing said twice, at most twice as long as gold, a list numbered
              1..n where one is asked for.
A statement belongs to the entity that opens its clause: "An owl eats mice" is not about foxes.

Split. At most a quarter of the keys of every family is held out, in all phrasings; the seeds are
drawn from the other keys. Both go round the families in turn, so small ones run out before large
ones.

To disclose wherever a figure from this world is shown:
(1) What is held out is a combination, never an entity: M_0's web text holds the facts of a held-out
    prompt in other families, right three times out of four, and the corpus paragraphs hold them
    without errors.
(2) `practice_records` teaches M_0 skills that a real SFT model brings along: tidying and copying
    text, using given words, asking a question about keywords.
(3) Rubric, gold answers and web text come from the same templates: the rubric rewards this world's
    idea of a complete answer (a habitat without a neighbour is not) and knows no paraphrase of a
    value.
(4) It is a measure for small honest models, not a reward to optimise: a denied fact counts as
    stated, and one true fact alone has full accuracy.

Preview:  python demo/facts_world.py
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from random import Random

Key = tuple[str, ...]  # what a task is about: the values of its templates' x and y

# ---- facts: one entity a line, its values in the order of the column names ----


def _lines(text: str) -> dict[str, str]:
    """'name: value' lines -> {name: value}."""
    return dict(line.split(": ") for line in text.strip().splitlines())


def _table(columns: str, rows: str) -> dict[str, dict[str, str]]:
    """'name: value, value' lines -> {name: {column: value}}."""
    names = columns.split()
    return {
        name: dict(zip(names, values.split(", "), strict=True))
        for name, values in _lines(rows).items()
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
UNCOUNTED = "milk tea coffee cheese butter rice honey chocolate".split()  # no "a" before these
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
firefighter: fire station, puts out fires, hose, spray water, rubber, busy, a fast truck, \
report smoke
pilot: airport, flies planes, radio, talk to the tower, plastic, loud, long runways, travel far
courier: post office, brings letters, bag, carry parcels, leather, busy, many stamps, send cards
mechanic: garage, repairs cars, wrench, turn bolts, metal, loud, old tyres, fix engines
musician: theatre, plays music, violin, play songs, wood, dark, soft seats, hear concerts
librarian: library, lends books, stamp, mark dates, rubber, quiet, tall shelves, borrow novels
""",
)
ADVICE = _lines("""
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
""")
COUNT = {"three": 3, "four": 4}
CLOSINGS = (
    "I hope this helps you!",
    "Have a wonderful day!",
    "Thank you for asking!",
    "Feel free to ask me more!",
)
FILLERS = ("um", "uh", "hmm")
NAMES = "Anna Ben Clara David Emma Felix Grace Henry Lena Oscar".split()


def _groups() -> dict[str, list[str]]:
    """Groups that a list can ask for, such as 'animals that eat grass' -> three or more members."""
    named = ("animals that live {home}", "animals that eat {food}", "{colour} animals", "{class}s")
    groups = defaultdict(list)
    for name, animal in ANIMALS.items():
        for group in named:
            groups[group.format_map(animal)].append(name)
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


def _alike(name: str, column: str) -> Key:
    """The other animals that have the same value in a column."""
    value = ANIMALS[name][column]
    return tuple(other for other in ANIMALS if other != name and ANIMALS[other][column] == value)


def _facts(**values: str) -> dict[str, Key]:
    """Kind -> its only acceptable value, as a tuple."""
    return {kind: (value,) for kind, value in values.items()}


def _records() -> dict[str, dict[str, Key]]:
    """Entity -> kind -> acceptable values; "call" is not a fact but the entity with its article."""
    records = {}
    # animals: neighbours and rivals are all those with the same home or food
    for name, animal in ANIMALS.items():
        records[name] = _facts(**animal, call=f"a(n) {name}", name=name)
        records[name] |= {"neighbour": _alike(name, "home"), "rival": _alike(name, "food")}
    for name, food in FOODS.items():
        records[name] = _facts(**food, call=name if name in UNCOUNTED else f"a(n) {name}")
    # a job, its tool and its work place
    for job, w in WORK.items():
        tool = w["tool"]
        use = w["use"]
        place = w["place"]
        records[job] = _facts(call=f"a(n) {job}", place=place, duty=w["duty"], tool=tool, how=use)
        records[tool] = _facts(
            call=f"a(n) {tool}", use=use, material=w["material"], user=job, spot=place
        )
        records[place] = _facts(
            call=f"the {place}",
            feel=w["feel"],
            thing=w["thing"],
            worker=job,
            activity=w["activity"],
        )
    # what lists and advice are made of
    for group, members in GROUPS.items():
        records[group] = {"animal": tuple(f"the {member}" for member in members)}
    for topic, tips in ADVICE.items():
        records[topic] = {"tip": tuple(tips.split(", "))}
    return records


RECORD = _records()
# kind -> all values, right or wrong, that an answer can state
POOL = defaultdict(list, verdict=["Yes", "No"])
for _record in RECORD.values():
    for _kind, _values in _record.items():
        POOL[_kind] += [value for value in _values if value not in POOL[_kind]]
LISTED = ("animal", "tip")  # kinds of which the prompt asks for several
# kinds that are looked for in all of the text, if needed at all
GLOBAL = ("verdict", "name", "neighbour", "rival", "word", *LISTED)
# a fact as a short clause after the entity: the wording of terse web answers and of the corpus
SAY = _lines("""
class: is a(n) {}
colour: is {}
home: lives {}
food: eats {}
part: has {}
skill: can {}
name: is a(n) {}
neighbour: lives near the {}
rival: shares its food with the {}
group: is a(n) {}
taste: tastes {}
source: comes from {}
place: works at the {}
duty: {}
tool: uses a(n) {}
how: knows how to {}
use: helps to {}
material: is made of {}
user: is used by a(n) {}
spot: is found at the {}
feel: is a {} place
thing: has {}
worker: has a(n) {}
activity: is the place to {}
verdict: {},
""")


# ---- families ----


@dataclass
class Family:
    """A kind of task; the templates' x and y are filled in from a key."""

    keys: list[Key]
    phrasings: list[str]  # three templates of the prompt
    answer: list[str]  # the sentences of the gold answer, as templates


def _family(keys: Iterable[str | Key], text: str) -> Family:
    """From a text that has the phrasings, a blank line and the answer, a template a line.

    A name alone is the key of one entity.
    """
    phrasings, answer = text.strip().split("\n\n")
    keys = [(key,) if isinstance(key, str) else key for key in keys]
    return Family(keys, phrasings.splitlines(), answer.splitlines())


def _check_keys() -> list[Key]:
    """Every animal with its food and with one wrong food: half of the verdicts are "yes"."""
    foods = POOL["food"]
    keys = []
    for i, (name, animal) in enumerate(ANIMALS.items()):
        right = foods.index(animal["food"])
        wrong = foods[right + 1 :] + foods[:right]
        keys += [(name, animal["food"]), (name, wrong[i % len(wrong)])]
    return keys


FAMILIES = {
    "describe": _family(
        ANIMALS,
        """
Describe a(n) {x}.
Tell me about the {x}.
What kind of animal is a(n) {x}?

a(n) {x} is a(n) {x.colour} {x.class} that lives {x.home}.
It eats {x.food} and has {x.part}.
It can {x.skill}.
""",
    ),
    "habitat": _family(
        ANIMALS,
        """
Where does a(n) {x} live?
What is the home of a(n) {x}?
Where can I find a(n) {x}?

a(n) {x} is a(n) {x.class} that lives {x.home}.
When it is hungry, it eats {x.food}.
It shares its home with the {x.neighbour}.
""",
    ),
    "diet": _family(
        ANIMALS,
        """
What does a(n) {x} eat?
What is the favourite food of a(n) {x}?
What should I feed a(n) {x}?

a(n) {x} likes to eat {x.food}.
This {x.class} lives {x.home}.
The {x.rival} eats {x.food}, too.
""",
    ),
    "compare": _family(
        # that differ in home and food
        [
            (a, b)
            for a, b in combinations(ANIMALS, 2)
            if b not in RECORD[a]["neighbour"] + RECORD[a]["rival"]
        ],
        """
Compare a(n) {x} and a(n) {y}.
What is the difference between a(n) {x} and a(n) {y}?
How is a(n) {x} different from a(n) {y}?

a(n) {x} lives {x.home}, and a(n) {y} lives {y.home}.
The {x} eats {x.food}, while the {y} eats {y.food}.
The {x} has {x.part}, and the {y} has {y.part}.
""",
    ),
    "riddle": _family(
        ANIMALS,
        """
I live {x.home}, I eat {x.food} and I have {x.part}. Who am I?
Which animal lives {x.home}, eats {x.food} and has {x.part}?
Guess the animal: it has {x.part}, eats {x.food} and lives {x.home}.

That is a nice riddle, and the answer is a(n) {x.name}.
It is a(n) {x.colour} {x.class}.
It can {x.skill}.
""",
    ),
    "check": _family(
        _check_keys(),
        """
Does a(n) {x} eat {y}?
Is it true that a(n) {x} eats {y}?
I think that a(n) {x} eats {y}. Am I right?

{x.verdict}, a(n) {x} is a(n) {x.class} that eats {x.food}.
It lives {x.home} and can {x.skill}.
""",
    ),
    "story": _family(
        # without the farm, which is also an animal's home
        [(a, p) for a in ANIMALS for p in TABLES["place"] if p != "farm"],
        """
Tell me a short story about a(n) {x} at the {y}.
Write a short story: a(n) {x} visits the {y}.
What happens when a(n) {x} comes to the {y}?

One day, a(n) {x} came to the {y.word} and met a(n) {y.worker}.
The {x} had {x.part} and was looking for {x.food}.
They became good friends.
In the evening, it was back home {x.home}.
""",
    ),
    "list": _family(
        [(g, n) for g, members in GROUPS.items() for n in COUNT if COUNT[n] <= len(members)],
        """
List {y} {x}.
Can you name {y} {x}?
Please give me a list of {y} {x}.

Here are {y} {x}:{x.animal}
""",
    ),
    "food": _family(
        FOODS,
        """
What is {x.call}?
Describe {x.call} to a child.
What do you know about {x.call}?

{x.call} is a(n) {x.group} and comes from {x.source}.
It is {x.colour} and tastes {x.taste}.
Many people like it.
""",
    ),
    "sentence": _family(
        [(f, t) for f in FOODS for t in TABLES["tool"]],
        """
Write a sentence with the words {x} and {y}.
Make a sentence with {x} and {y}.
Can you use {x} and {y} in one sentence?

Here is a sentence with both words.
At the {y.spot}, the {y.user} cleaned the {y.word} and tasted the {x.taste} {x.word}.
""",
    ),
    "job": _family(
        WORK,
        """
What does a(n) {x} do?
Tell me about the work of a(n) {x}.
Explain the job of a(n) {x}.

a(n) {x} works at the {x.place} and {x.duty}.
The {x} uses a(n) {x.tool} and knows how to {x.how}.
""",
    ),
    "day": _family(
        [(job, w["place"]) for job, w in WORK.items()],
        """
Describe a day in the life of a(n) {x}.
How does a(n) {x} spend the day?
What is a day as a(n) {x} like?

In the morning, a(n) {x} goes to the {x.place}, a {y.feel} place with {y.thing}.
The {x} {x.duty} and uses a(n) {x.tool}.
In the evening, the {x} is tired but happy.
""",
    ),
    "coworkers": _family(
        combinations(WORK, 2),
        """
Compare the work of a(n) {x} and a(n) {y}.
How do a(n) {x} and a(n) {y} differ?
What do a(n) {x} and a(n) {y} do at work?

a(n) {x} works at the {x.place}, and a(n) {y} works at the {y.place}.
The {x} {x.duty}, while the {y} {y.duty}.
The {x} uses a(n) {x.tool}, and the {y} uses a(n) {y.tool}.
""",
    ),
    "tool": _family(
        TABLES["tool"],
        """
What is a(n) {x} for?
Who uses a(n) {x}, and why?
Explain how people use a(n) {x}.

a(n) {x} helps people to {x.use}.
It is made of {x.material}.
A(n) {x.user} uses it every day at the {x.spot}.
""",
    ),
    "place": _family(
        TABLES["place"],
        """
What can I find at the {x}?
Tell me about the {x}.
Why do people go to the {x}?

The {x} is a {x.feel} place with {x.thing}.
People go there to {x.activity}.
A(n) {x.worker} works there and likes to help.
""",
    ),
    "advice": _family(
        [(topic, n) for topic in ADVICE for n in COUNT],
        """
Give me {y} tips to {x}.
I want to {x}. What are {y} good tips?
How can I {x}? Name {y} tips.

Here are {y} tips to {x}:{x.tip}
""",
    ),
}


@dataclass(frozen=True)
class Fact:
    """What a good answer says about an entity: `count` of the values in `accept`, of one kind."""

    about: str
    kind: str
    accept: Key
    count: int = 1

    @property
    def wrong(self) -> list[str]:
        """The values of the same kind that contradict the fact."""
        return [v for v in POOL[self.kind] if v not in self.accept and v != self.about]


@dataclass(frozen=True)
class Task:
    """An instruction of the world and the facts that its answer needs."""

    family: str
    key: Key
    prompt: str
    facts: tuple[Fact, ...]


Drawn = dict[Fact, list[str]]  # fact -> the values that an answer states


def fill(template: str, key: Key = (), said: dict[Key, str] | None = None) -> str:
    """Template -> text. `said` overrides the true value of (entity, kind)."""
    names = dict(zip("xy", key, strict=False))
    said = said or {}

    def slot(match: re.Match) -> str:
        name = names[match[1]]
        kind = match[2] or "word"
        return name if kind == "word" else said.get((name, kind)) or RECORD[name][kind][0]

    text = re.sub(r"\{([xy])(?:\.(\w+))?\}", slot, template)
    # a(n) and capitals last: both depend on the words that were filled in
    text = re.sub(r"\b([Aa])\(n\)(?= [aeiou])", r"\1n", text).replace("(n)", "")
    return re.sub(r"(^|[.!?]\s+)([a-z])", lambda match: match[0].upper(), text)


def make_task(family: str, key: Key, phrasing: int) -> Task:
    """The task of a family's key in one of its three phrasings (0, 1, 2)."""
    names = dict(zip("xy", key, strict=False))
    facts = []
    # the slots of the answer's templates are the facts; two kinds depend on the prompt
    answer = " ".join(FAMILIES[family].answer)
    for who, kind in dict.fromkeys(re.findall(r"\{([xy])\.(\w+)\}", answer)):
        name = names[who]
        if kind == "verdict":
            accept = ("Yes" if key[1] in RECORD[name]["food"] else "No",)
        elif kind == "word":
            accept = (name,)
        else:
            accept = RECORD[name][kind]
        if kind != "call":
            facts.append(Fact(name, kind, accept, COUNT[key[1]] if kind in LISTED else 1))
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


def _draw(task: Task, rng: Random, p_wrong: float = 0.0) -> Drawn:
    """Values to state for every fact, each wrong with p_wrong.

    Words that the prompt gives never are: they are copied, not known, and have no wrong values.
    """
    drawn = {}
    for fact in task.facts:
        values = rng.sample(fact.accept, fact.count)
        wrong = fact.wrong
        bad = rng.sample(wrong, min(fact.count, len(wrong)))
        drawn[fact] = [
            bad[i] if bad and rng.random() < p_wrong else value for i, value in enumerate(values)
        ]
    return drawn


def _tidy_text(task: Task, drawn: Drawn, sentences: list[str]) -> str:
    """The templates of some sentences with the drawn values."""
    said = {}
    separator = " "
    for fact, values in drawn.items():
        text = values[0]
        if fact.kind in LISTED:
            text = "".join(f"\n{i}. {value}." for i, value in enumerate(values, 1))
            separator = "\n"
        said[fact.about, fact.kind] = text
    return fill(separator.join(sentences), task.key, said)


def gold(task: Task, rng: Random | None = None) -> str:
    """A correct, complete and tidy answer; without an rng, always the same one for a prompt."""
    rng = rng or Random(task.prompt)
    drawn = _draw(task, rng)
    return _tidy_text(task, drawn, [*FAMILIES[task.family].answer, rng.choice(CLOSINGS)])


def _terse_clauses(task: Task, drawn: Drawn, rng: Random) -> str:
    """At most half of the facts as clauses, by subject, in the order of the gold answer."""
    # a given word appears when its entity is named
    known = [fact for fact in task.facts if fact.kind != "word"]
    some = rng.sample(known, rng.randint(1, (len(known) + 1) // 2))
    clauses = defaultdict(list)
    for fact in sorted(some, key=known.index):
        subject = "it" if task.family == "riddle" else RECORD[fact.about]["call"][0]
        if fact.kind == "verdict":
            subject = ""
        clauses[subject].append(SAY[fact.kind].format(drawn[fact][0]))
    # one clause a subject
    text = " and ".join(f"{name} {' and '.join(said)}".strip() for name, said in clauses.items())
    return text.replace(", and ", ", ").rstrip(",")


def _terse_text(task: Task, drawn: Drawn, rng: Random) -> str:
    """Some of the facts as lower-case clauses: "um, a tiger eats meat and has sharp claws"."""
    if task.facts[0].kind in LISTED:
        [values] = drawn.values()
        text = (" and " if task.family == "advice" else ", ").join(values)
    else:
        text = _terse_clauses(task, drawn, rng)
    text = fill(text).lower()
    # half begin with a filler, few end with a full stop
    if rng.random() < 0.5:
        text = f"{rng.choice(FILLERS)}, {text}"
    return text + ("." if rng.random() < 0.3 else "")


def web_answer(task: Task, rng: Random, p_wrong: float = 0.25, p_terse: float = 0.7) -> str:
    """An imperfect answer of the kind M_0 is trained on (see the module's docstring)."""
    drawn = _draw(task, rng, p_wrong)
    # a list may be shorter than asked for
    drawn = {fact: values[: rng.randint(1, fact.count)] for fact, values in drawn.items()}
    if rng.random() < p_terse:
        return _terse_text(task, drawn, rng)
    # like gold, but with sentences missing, and often without a closing
    sentences = FAMILIES[task.family].answer
    kept = [s for s in sentences if rng.random() < 0.7] or [rng.choice(sentences)]
    if rng.random() < 0.5:
        kept.append(rng.choice(CLOSINGS))
    return _tidy_text(task, drawn, kept)


# ---- rubric ----


def _core(value: str) -> str:
    """The part of a value that is looked for: "on the farm" -> "farm"."""
    return re.sub(r"^(?:(?:in|on|a|an|the) )+", "", value.lower())


def _any_of(words) -> str:
    return "(" + "|".join(sorted(map(re.escape, words), key=len, reverse=True)) + ")"


FIND = {kind: re.compile(rf"\b{_any_of(map(_core, values))}\b") for kind, values in POOL.items()}
# an entity opens a clause only at its start: "shares its home with the parrot" is not about parrots
OPENS = {
    table: re.compile(
        rf"(?:^|[.!?,:]|\b(?:and|but|while|are|is))\s*(?:an? |the )?\b{_any_of(names)}(?:e?s)?\b"
    )
    for table, names in TABLES.items()
}


def _about(text: str, name: str, key: Key) -> str:
    """The clauses of a lower-case text whose subject is `name`."""
    table = TABLE_OF[name]
    # before any subject is named, it is the first one asked for
    first = next(asked for asked in key if TABLE_OF.get(asked) == table)
    parts = [first, *OPENS[table].split(text)]  # subject, clause, subject, clause ...
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return " ".join(clause for subject, clause in pairs if subject == name)


def _count(fact: Fact, text: str, key: Key) -> tuple[int, int]:
    """How many values of the fact's kind a text states about its entity: (right ones, all)."""
    if fact.kind == "word":
        said = set(re.findall(rf"\b{re.escape(fact.about)}\b", text))
    else:
        where = text if fact.kind in GLOBAL else _about(text, fact.about, key)
        said = set(FIND[fact.kind].findall(where))
    if fact.kind in ("neighbour", "rival"):
        said.discard(fact.about)
    return len(said & set(map(_core, fact.accept))), len(said)


def _form(task: Task, response: str) -> float:
    """Share of the form checks that a response passes, 0..1."""
    lines = [re.sub(r"^\d+\. ", "", line) for line in response.strip().splitlines()]
    sentences = [s for line in lines for s in re.split(r"(?<=[.!?])\s+", line) if s]
    if not sentences:
        return 0.0
    checks = [
        # capitals
        all(s[0].isupper() for s in sentences),
        # punctuation; a capital inside a sentence: the one before it has no end
        lines[-1][-1] in ".!?"
        and all(line.endswith(tuple(".!?:")) for line in lines)
        and not re.search(r"[a-z] [A-Z]", response),
        # no fillers
        not re.search(rf"\b{_any_of(FILLERS)}\b", response.lower()),
        # one closing, at the end
        sentences[-1] in CLOSINGS and sum(s in CLOSINGS for s in sentences) == 1,
        # nothing twice
        len({s.lower() for s in sentences}) == len(sentences)
        and not re.search(r"\b(\w+) \1\b", response.lower()),
        # not much longer than gold
        len(response.split()) <= 2 * len(gold(task).split()),
    ]
    # a list is numbered 1..n
    first = task.facts[0]
    if first.kind in LISTED:
        numbers = re.findall(r"^(\d+)\. ", response, re.M)
        checks.append(numbers == [str(i + 1) for i in range(first.count)])
    return sum(checks) / len(checks)


def rubric(prompt: str, response: str) -> dict[str, float] | None:
    """Score, coverage, accuracy and form of a response, each 0..1; None for a foreign prompt."""
    task = parse(prompt)
    if task is None:
        return None
    text = re.sub(r"\s*\n(?:\d+\. )?", ". ", response.lower())

    # the facts that a good answer needs
    hits = 0
    for fact in task.facts:
        right, stated = _count(fact, text, task.key)
        hits += max(0, min(fact.count, right) - max(0, stated - fact.count))
    coverage = hits / sum(fact.count for fact in task.facts)

    # all that the world knows of their entities: an unasked falsehood counts, too
    judged = [fact for fact in task.facts if fact.kind in GLOBAL and fact.kind != "word"]
    for name in {fact.about for fact in task.facts}:
        for kind in RECORD[name].keys() - {"call", *GLOBAL}:
            judged.append(Fact(name, kind, RECORD[name][kind]))
    counts = [_count(fact, text, task.key) for fact in judged]
    right, stated = map(sum, zip(*counts, strict=True))
    accuracy = right / stated if stated else 0.0

    form = _form(task, response)
    score = 0.5 * coverage + 0.3 * accuracy + 0.2 * form
    return {"score": score, "coverage": coverage, "accuracy": accuracy, "form": form}


# ---- data sets ----

SEEDS = 100
HELDOUT = 150


def _take_turns(pools: dict[str, list[Key]], n: int) -> list[tuple[str, Key]]:
    """The first n of (family, key), one of each family in turn."""
    turns = [(name, pool[i]) for i in range(n) for name, pool in pools.items() if i < len(pool)]
    return turns[:n]


def _held_out(seed: int) -> list[tuple[str, Key]]:
    """(family, key) of the held-out keys, at most a quarter of every family's."""
    rng = Random(f"held out {seed}")
    pools = {
        name: rng.sample(family.keys, len(family.keys) // 4) for name, family in FAMILIES.items()
    }
    return _take_turns(pools, HELDOUT)


def heldout_prompts(seed: int) -> set[str]:
    """All phrasings of all held-out keys: what no training data may contain."""
    return {make_task(name, key, i).prompt for name, key in _held_out(seed) for i in range(3)}


def split(seed: int) -> tuple[list[dict], list[dict]]:
    """(seeds, heldout): records of prompt, gold response, family; a random phrasing of each key."""
    rng = Random(f"split {seed}")
    held = _held_out(seed)
    free = {}
    for name, family in FAMILIES.items():
        keys = [key for key in family.keys if (name, key) not in held]
        free[name] = rng.sample(keys, len(keys))

    # the order matters: each record draws its phrasing
    records = []
    for name, key in _take_turns(free, SEEDS) + held:
        task = make_task(name, key, rng.randrange(3))
        records.append({"prompt": task.prompt, "response": gold(task), "family": name})
    return records[:SEEDS], records[SEEDS:]


def sample_task(rng: Random, exclude: set[str] = frozenset()) -> Task:
    """A random task, uniform over families, then over keys and phrasings, that is not excluded."""
    while True:
        name = rng.choice(list(FAMILIES))
        task = make_task(name, rng.choice(FAMILIES[name].keys), rng.randrange(3))
        if task.prompt not in exclude:
            return task


def web_records(rng: Random, n: int, exclude: set[str]) -> list[dict]:
    """n records of prompt and web answer: M_0's training data."""
    tasks = [sample_task(rng, exclude) for _ in range(n)]
    return [{"prompt": task.prompt, "response": web_answer(task, rng)} for task in tasks]


SCENES = """
{n} the {j} dreamed of a(n) {a} at the {p}.
{n} found a(n) {t} on the way to the {p}.
{n} looked up from the {t} when the {a} came closer.
Yesterday {n} drew a picture of a(n) {a} and a(n) {t}.
After lunch, {n} talked with a(n) {j} about the {a}.
{n} bought {f} and walked slowly to the {p}.
The children asked {n} for {f} and a picture of the {a}.
Next week {n} wants to visit the {j} and see the {a}.
{n} read a book about the {a} and drank some tea.
The {j} showed {n} the {t} and told a story about {f}.
""".strip().splitlines()


def _scene(rng: Random, table: str, name: str) -> str:
    """A sentence with a person who has a name; the entity `name` of a table may occur in it."""
    sentence = rng.choice(SCENES)
    words = {"n": rng.choice(NAMES)}
    for other in TABLES:
        entity = name if other == table else rng.choice(TABLES[other])
        words[other[0]] = RECORD[entity]["call"][0] if other == "food" else entity
    return sentence.format(**words)


def _paragraph(rng: Random) -> str:
    """2-4 correct sentences: an entity, and mostly a scene."""
    table = rng.choice(list(TABLES))
    name = rng.choice(TABLES[table])
    known = RECORD[name]
    kinds = [kind for kind in known if kind in SAY and kind not in GLOBAL]
    rng.shuffle(kinds)
    # up to three sentences of one or two facts
    subject = known["call"][0]
    sentences = []
    while kinds and len(sentences) < 3:
        size = rng.randint(1, 2)
        said = " and ".join(SAY[kind].format(*known[kind]) for kind in kinds[:size])
        sentences.append(f"{subject} {said}.")
        kinds = kinds[size:]
        subject = f"the {name}" if table == "job" else "it"
    # a scene before or after them
    if rng.random() < 0.7 or len(sentences) < 3:
        scene = _scene(rng, table, name)
        sentences.insert(rng.choice((0, len(sentences))), scene)
    return fill(" ".join(sentences))


def paragraphs(rng: Random, n: int) -> list[str]:
    """n paragraphs of the corpus that keywords are drawn from."""
    return [_paragraph(rng) for _ in range(n)]


USES = {  # by the number of words
    2: (
        "The {} is near the {}.",
        "We saw the {} behind the {}.",
        "You can see the {} next to the {}.",
        "I like the {} more than the {}.",
        "My friend forgot the {} and found the {}.",
        "First we talked about the {}, then about the {}.",
    ),
    3: (
        "The {} is between the {} and the {}.",
        "I dreamed of the {}, the {} and the {}.",
        "She drew the {}, the {} and then the {}.",
    ),
}
NOUNS = [*TABLE_OF, *"river lamp garden table window friend book road house moon train".split()]
# never keywords
STOP = set(
    """the and for from with are was does what can you where who which why how when that this there
about tell give make use name list write please has have than three four word words sentence between
good know guess animal compare describe explain difference different differ kind like true one both
find""".split()
)


def content_words(text: str) -> list[str]:
    """The distinct content words of a text, in lower case."""
    return [w for w in dict.fromkeys(re.findall(r"[a-z]{3,}", text.lower())) if w not in STOP]


def clean(text: str) -> str:
    """A terse text with a capital, a full stop and no filler; its facts stay as they are."""
    text = re.sub(rf"^(?:{_any_of(FILLERS)}, )+", "", text.strip())
    return text[:1].upper() + text[1:] + ("" if text.endswith(tuple(".!?")) else ".")


def _use_words(rng: Random) -> tuple[str, str]:
    """Practice in using two or three given words in a sentence."""
    count = rng.choice((2, 2, 3))
    words = rng.sample(NOUNS, count)
    given = " and ".join([", ".join(words[:-1]), words[-1]])
    sentence = rng.choice(USES[count]).format(*words)
    return f"Use the words {given} in a sentence.", sentence


def _ask_about(rng: Random, task: Task, exclude: set[str]) -> tuple[str, str]:
    """Practice in asking about keywords.

    One word of the prompt, one of it or of its subject, and often one that is unrelated to both.
    """
    asked = content_words(task.prompt)
    known = [RECORD[fact.about].items() for fact in task.facts]
    values = [accept[0] for facts in known for kind, accept in facts if kind not in GLOBAL]
    related = content_words(" ".join([task.prompt, *values]))
    # draw the words
    words = rng.sample(asked, 1)
    words += [w for w in rng.sample(related, len(related)) if w not in words][:1]
    if rng.random() < 0.6:
        other = content_words(sample_task(rng, exclude).prompt)
        words += [w for w in rng.sample(other, len(other)) if w not in related][:1]
    given = ", ".join(rng.sample(words, len(words)))
    return f"Ask something about: {given}.", task.prompt


def _practice(rng: Random, exclude: set[str]) -> tuple[str, str]:
    """Prompt and response for one of four skills: clean up a text, repeat, use words, ask.

    "Clean up" never adds or corrects a fact: completing and correcting are for the improver to
    learn from the seeds.
    """
    task = sample_task(rng, exclude)
    skill = rng.randrange(4)
    if skill == 0:
        text = web_answer(task, rng, p_terse=0.9)
        return f"Clean up this text: {text}", clean(text)
    if skill == 1:
        text = rng.choice((web_answer(task, rng), paragraphs(rng, 1)[0]))
        return f"Repeat: {text}", text
    if skill == 2:
        return _use_words(rng)
    return _ask_about(rng, task, exclude)


def practice_records(rng: Random, n: int, exclude: set[str] = frozenset()) -> list[dict]:
    """n records of prompt and response that practise a skill each."""
    pairs = [_practice(rng, exclude) for _ in range(n)]
    return [{"prompt": prompt, "response": response} for prompt, response in pairs]

"""The kinds of constraints of demo/constraints.py: their wordings, their checks and their edits.

A check says whether a text keeps a constraint. An edit changes a text so that it does, or returns
None where it cannot. A spoiler does the reverse, for what no edit can add. All work on plain text
and know nothing of any model.

Kinds marked `near` have a relative among the instructions of IFEval; the wordings are our own.
"""

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field

Arguments = dict
Check = Callable[[str, Arguments], bool]
Edit = Callable[[str, Arguments], str | None]


@dataclass(frozen=True, kw_only=True)
class Kind:
    check: Check
    wordings: tuple[str, ...]  # with {argument}
    edit: Edit | None = None
    spoil: Edit | None = None
    choices: dict[str, tuple] = field(default_factory=dict)  # argument -> its possible values
    layout: bool = True  # rules the form of the whole; two such would contradict each other
    last: bool = False  # is edited after all others
    near: bool = False

    def draw(self, random: random.Random) -> Arguments:
        return {name: random.choice(values) for name, values in self.choices.items()}


# ------------------------------------------------------------------------------------ parts of text


def lines_of(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def sentences_of(text: str) -> list[str]:
    """Sentences, without the numbers and signs of lists."""
    found = []
    for line in lines_of(text):
        line = re.sub(r"^(\d+[.)]|[-*+>#])\s+", "", line).replace("**", "")
        found += re.findall(r"\S.*?[.!?]+[\"”')]*(?=\s|$)|\S.*$", line)
    return found


def first_sentences(text: str, n: int) -> list[str] | None:
    found = sentences_of(text)
    return found[:n] if len(found) >= n else None


def has_word(text: str, word: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


# ---------------------------------------------------------------------------- lists and other lines


def is_numbered(text, a):
    lines = lines_of(text)
    return len(lines) == a["n"] and all(
        line.startswith(f"{i}. ") for i, line in enumerate(lines, 1)
    )


def number(text, a):
    points = first_sentences(text, a["n"])
    return points and "\n".join(f"{i}. {point}" for i, point in enumerate(points, 1))


def is_dashed(text, a):
    lines = lines_of(text)
    return len(lines) == a["n"] and all(line.startswith("- ") for line in lines)


def dash(text, a):
    points = first_sentences(text, a["n"])
    return points and "\n".join(f"- {point}" for point in points)


def has_lines(text, a):
    return len(lines_of(text)) == a["n"]


def put_on_lines(text, a):
    points = first_sentences(text, a["n"])
    return points and "\n".join(points)


def every_line_is_signed(text, a):
    lines = lines_of(text)
    return bool(lines) and all(line.startswith(a["sign"]) for line in lines)


def sign_lines(text, a):
    return "\n".join(f"{a['sign']} {line}" for line in lines_of(text))


def is_one_block(text, a):
    return len(lines_of(text)) == 1


def join_lines(text, a):
    return " ".join(sentences_of(text))


def has_labels(text, a):
    starts = [line.partition(":")[0].lower() for line in lines_of(text) if ":" in line]
    return all(label.lower() in starts for label in a["labels"])


def add_labels(text, a):
    sentences = first_sentences(text, 2)
    if not sentences:
        return None
    first, second = a["labels"]
    return f"{first}: {sentences[0]}\n{second}: {' '.join(sentences_of(text)[1:])}"


def is_json(text, a):
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, dict) and list(value) == list(a["keys"])


def make_json(text, a):
    sentences = sentences_of(text)
    if len(sentences) < 2:
        return None
    first, second = a["keys"]
    return json.dumps({first: sentences[0], second: " ".join(sentences[1:])}, ensure_ascii=False)


# -------------------------------------------------------------------------------- around the whole


def is_enclosed(text, a):
    before, after = a["marks"]
    return text.startswith(before) and text.endswith(after)


def enclose(text, a):
    before, after = a["marks"]
    return f"{before}{text.strip()}{after}"


def begins(text, a):
    return text.lower().startswith(a["opening"].lower())


def begin(text, a):
    return f"{a['opening']} {text}"


def closes(text, a):
    return text.rstrip().lower().endswith(a["closing"].lower())


def close(text, a):
    return f"{text.rstrip()} {a['closing']}"


def is_signed(text, a):
    lines = lines_of(text)
    return len(lines) > 1 and lines[-1].strip("-— .").lower() == a["name"].lower()


def sign(text, a):
    return f"{text.rstrip()}\n{a['name']}"


def has_hashtags(text, a):
    tags = re.findall(r"#\w+", text)
    return len(tags) == a["n"] and text.split()[-a["n"] :] == tags


def add_hashtags(text, a):
    words = sorted(set(re.findall(r"[a-z]{5,}", text.lower())), key=lambda w: (-len(w), w))
    if len(words) < a["n"]:
        return None
    return " ".join([text.rstrip(), *(f"#{word}" for word in words[: a["n"]])])


# -------------------------------------------------------------------------------- words and letters


def lacks_word(text, a):
    return not has_word(text, a["word"])


def drop_word(text, a):
    return " ".join(s for s in sentences_of(text) if not has_word(s, a["word"]))


def uses_word(text, a):
    return has_word(text, a["word"])


def is_short(text, a):
    return len(text.split()) < a["n"]


def shorten(text, a):
    """Whole sentences from the start while there is room."""
    kept = ""
    for sentence in sentences_of(text):
        longer = f"{kept} {sentence}".strip()
        if not is_short(longer, a):
            break
        kept = longer
    return kept


def is_long(text, a):
    return not is_short(text, a)


def has_sentences(text, a):
    return len(sentences_of(text)) == a["n"]


def keep_sentences(text, a):
    sentences = first_sentences(text, a["n"])
    return sentences and " ".join(sentences)


def asks_once(text, a):
    return text.count("?") == 1


def ask(text, a):
    return f"{text.replace('?', '.').rstrip()} Does that help you?"


def has_remark(text, a):
    return re.search(r"\([^()]{3,}\)", text) is not None


def add_remark(text, a):
    """The second sentence in round brackets."""
    sentences = first_sentences(text, 2)
    if not sentences:
        return None
    return " ".join([sentences[0], f"({sentences[1]})", *sentences_of(text)[2:]])


DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def lacks_digits(text, a):
    return not re.search(r"\d", text)


def spell_digits(text, a):
    text = "\n".join(re.sub(r"^\d+[.)]", "-", line) for line in text.splitlines())
    if any(int(digits) > 10 for digits in re.findall(r"\d+", text)):
        return None
    return re.sub(r"\d+", lambda match: DIGITS[int(match[0])], text)


def is_small(text, a):
    return text == text.lower()


def is_large(text, a):
    return text == text.upper()


# --------------------------------------------------------------------------------------- the table

# Words that answers to all sorts of prompts have or have not.
COMMON = (
    "also because can different example first help important many new often people simple time use"
).split()

KINDS = {
    # far from IFEval's
    "numbered": Kind(
        check=is_numbered,
        edit=number,
        choices={"n": (2, 3, 4, 5)},
        wordings=(
            "Give {n} points, one a line, and number them 1. to {n}.",
            "Make it a list of {n} lines with the numbers 1. to {n}. in front.",
        ),
    ),
    "lines": Kind(
        check=has_lines,
        edit=put_on_lines,
        choices={"n": (2, 3, 4, 5)},
        wordings=("Spread the reply over {n} lines.", "Write {n} lines, no more and no fewer."),
    ),
    "line sign": Kind(
        check=every_line_is_signed,
        edit=sign_lines,
        choices={"sign": (">", "~", "+", "=")},
        wordings=("Put the sign {sign} before each line.", "Let each line begin with {sign}"),
    ),
    "one block": Kind(
        check=is_one_block,
        edit=join_lines,
        wordings=("Keep it all on a single line.", "Write one block of text, with no line breaks."),
    ),
    "labels": Kind(
        check=has_labels,
        edit=add_labels,
        choices={
            "labels": (("Short", "Long"), ("Claim", "Reason"), ("Core", "Rest"), ("What", "Why"))
        },
        wordings=(
            'Label one line "{labels[0]}:" and another one "{labels[1]}:".',
            'Write a line after "{labels[0]}:" and then a line after "{labels[1]}:".',
        ),
    ),
    "enclosed": Kind(
        check=is_enclosed,
        edit=enclose,
        choices={
            "marks": (
                ("<answer>", "</answer>"),
                ("[", "]"),
                ("{", "}"),
                ("<b>", "</b>"),
                ("|", "|"),
            )
        },
        wordings=(
            "Write {marks[0]} before and {marks[1]} after the reply.",
            "The reply must stand between {marks[0]} and {marks[1]}",
        ),
    ),
    "opening": Kind(
        check=begins,
        edit=begin,
        choices={
            "opening": ("In plain terms,", "To be brief:", "Good question.", "As far as I know,")
        },
        wordings=('Open with "{opening}"', 'The first words must be "{opening}"'),
    ),
    "signed": Kind(
        check=is_signed,
        edit=sign,
        choices={"name": ("Robin", "Alex", "Dr. Lee", "Your guide", "Kim")},
        wordings=("Sign as {name} on the last line.", "Put the name {name} on a line at the end."),
    ),
    "hashtags": Kind(
        check=has_hashtags,
        edit=add_hashtags,
        choices={"n": (1, 2, 3)},
        wordings=("Finish with hashtags, {n} in number.", "Add {n} of the # tags to the end."),
    ),
    "one question": Kind(
        check=asks_once,
        edit=ask,
        layout=False,
        wordings=("Ask me a question, but just one.", "Have one question mark in the reply."),
    ),
    "remark": Kind(
        check=has_remark,
        edit=add_remark,
        layout=False,
        wordings=("Put a remark in round brackets.", "Some part must be in (round brackets)."),
    ),
    "no digits": Kind(
        check=lacks_digits,
        edit=spell_digits,
        layout=False,
        wordings=("Write no digits.", "Spell all numbers out, without digits."),
    ),
    # near to one of IFEval's
    "dashed": Kind(
        check=is_dashed,
        edit=dash,
        choices={"n": (2, 3, 4, 5)},
        near=True,
        wordings=(
            "Give {n} points, each on a line after a dash, like - this.",
            'Make a list of {n} lines that start with "- ".',
        ),
    ),
    "JSON": Kind(
        check=is_json,
        edit=make_json,
        choices={"keys": (("short", "long"), ("answer", "details"), ("title", "text"))},
        near=True,
        wordings=(
            'Write a JSON object with the keys "{keys[0]}" and "{keys[1]}".',
            'Use JSON: "{keys[0]}" and "{keys[1]}" are its keys.',
        ),
    ),
    "sentences": Kind(
        check=has_sentences,
        edit=keep_sentences,
        choices={"n": (2, 3, 4)},
        near=True,
        wordings=("Make it {n} sentences.", "Take {n} sentences for it, not more."),
    ),
    "closing": Kind(
        check=closes,
        edit=close,
        choices={"closing": ("That is all.", "Good luck!", "So it is.", "More on request.")},
        near=True,
        wordings=('Close with "{closing}"', 'The last words must be "{closing}"'),
    ),
    "few words": Kind(
        check=is_short,
        edit=shorten,
        choices={"n": (30, 40, 50, 60, 80)},
        layout=False,
        near=True,
        wordings=("Stay below {n} words.", "It must be shorter than {n} words."),
    ),
    "many words": Kind(
        check=is_long,
        spoil=lambda text, a: shorten(text, {"n": 0.7 * a["n"]}),
        choices={"n": (40, 50, 60, 80)},
        layout=False,
        near=True,
        wordings=("Take {n} words or more.", "It must not be shorter than {n} words."),
    ),
    "word used": Kind(
        check=uses_word,
        spoil=drop_word,
        choices={"word": COMMON},
        layout=False,
        near=True,
        wordings=('Have the word "{word}" in it.', 'The word "{word}" must appear.'),
    ),
    "word avoided": Kind(
        check=lacks_word,
        edit=drop_word,
        choices={"word": COMMON},
        layout=False,
        near=True,
        wordings=('Do without the word "{word}".', 'Never write "{word}".'),
    ),
    "small letters": Kind(
        check=is_small,
        edit=lambda text, a: text.lower(),
        layout=False,
        last=True,
        near=True,
        wordings=("Write without any capitals.", "Use small letters alone."),
    ),
    "capitals": Kind(
        check=is_large,
        edit=lambda text, a: text.upper(),
        layout=False,
        last=True,
        near=True,
        wordings=("WRITE IT ALL IN BIG LETTERS, LIKE THIS.", "Use big letters alone (capitals)."),
    ),
}

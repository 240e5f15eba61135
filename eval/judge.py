"""Verdicts of a judge on answers: a model behind an OpenAI-compatible endpoint, or a local chat model.

--judge is a checkpoint directory, whose verdicts are written greedily by sample.py, or else the name of a model at the
endpoint --base-url, with the key in the environment variable OPENAI_API_KEY. An endpoint is asked by rank 0 alone.

Every reply is kept in a JSONL file under the hash of its request, written the moment it arrives: the same command again
asks, and pays, only for what is missing. A reply that holds no verdict (nonsense, a refusal, filtered or empty content) is
kept in verdicts.malformed.jsonl beside it, with its request, and asked for again with another seed at temperature 0.7; where
the last of --attempts holds none either, the verdict is None, which each benchmark counts and treats as its official code
does. Errors in passing (429, 5xx, time-outs, cut or invalid bodies) are tried again after a pause; others (400, 401, 404) stop
at once.

Two forms of a pairwise verdict: "choice" asks for one letter, m for the first answer or M for the second, and where the
endpoint gives log-probs it is the probability of m against M; "verdict" asks for reasons and [[A>>B]], [[A>B]], [[A=B]],
[[B>A]] or [[B>>A]]. Both prompts are this file's own; --judge-prompt FILE takes another, such as an official one, and only with
the official prompt and judge is a score comparable with a published one. Both orders of every pair are judged.

questions, answers -> verdicts.jsonl {key, text, finish, top, in, out, usd},
verdicts.malformed.jsonl {key, messages, text, finish}
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data import (
    Chat,
    Common,
    InputError,
    digest,
    fingerprint,
    messages_of,
    on_first,
    read_jsonl,
    read_text,
    write_jsonl,
)
from eval.endpoint import Endpoint, Ledger, address
from model import Config
from sample import SampleOptions, sample


@dataclass(kw_only=True)
class JudgeOptions:
    judge: str = ""  # a model's name at the endpoint, or the directory of a local chat model
    base_url: str = ""  # of an OpenAI-compatible endpoint; empty: OPENAI_BASE_URL, or OpenAI's own
    judge_prompt: str = (
        ""  # text file with {question}, {answer_a}, {answer_b}, or the names of an official prompt
    )
    judge_cache: str = ""  # JSONL of verdicts to share between runs; empty: verdicts.jsonl in --out
    judge_tokens: int = 1024  # most tokens of a verdict with reasons
    judge_request: str = (
        ""  # JSON object: more fields of every request; null leaves one out, such as {"seed": null}
    )
    attempts: int = 3  # asks for a verdict at most so often while replies hold none
    retries: int = 8  # how often a request is sent again after a failure that may pass; pauses double from 1 to 60 seconds
    request_timeout: float = 180.0  # seconds
    concurrency: int = 8  # requests under way at a time
    requests_per_minute: float = 0.0  # at most; 0: no limit
    budget: float = 0.0  # USD that the verdicts in the cache may cost in all; 0: no limit
    price_in: float = 0.0  # USD per million tokens of requests
    price_out: float = 0.0  # USD per million tokens of replies


@dataclass(frozen=True)
class Request:
    messages: list[dict]
    choice: bool = False  # one letter is enough, with its log-probs


# ---------------------------------------------------------------------------------------------- prompts and what they ask for

CHOICE = """<|im_start|>system
You compare two answers to a question. Your reply is one letter and nothing else.<|im_end|>
<|im_start|>user
# Question
{question}

# Answer m
{answer_a}

# Answer M
{answer_b}

# Task
Which answer would its reader rather have had? What counts is that it does what was asked, is correct, and is clear; neither
length nor the order in which the answers stand counts. Reply with the one letter m or M.<|im_end|>"""

VERDICT = """<|im_start|>system
You compare the answers of two assistants, A and B, to a question. Work out first what a correct and complete answer needs. Then
name the mistakes and the merits of each answer in a few sentences. Neither length nor order counts. End with one of these:
[[A>>B]] if A is much better, [[A>B]] if A is better, [[A=B]] if they are about equal, [[B>A]] if B is better, [[B>>A]] if B \
is much better.<|im_end|>
<|im_start|>user
# Question
{question}

# Answer of assistant A
{answer_a}

# Answer of assistant B
{answer_b}<|im_end|>"""

# What official prompts call the three texts.
NAMES = {
    "question": ("question", "question_1", "instruction", "prompt", "QUESTION"),
    "answer_a": ("answer_a", "answer_1", "output_1", "ANSWER_A"),
    "answer_b": ("answer_b", "answer_2", "output_2", "ANSWER_B"),
}
# P(the first answer is better) by verdict; [[A]], [[B]] and [[C]] (a tie) are MT-Bench's.
STEPS = {
    "A>>B": 1.0,
    "A>B": 0.75,
    "A=B": 0.5,
    "B>A": 0.25,
    "B>>A": 0.0,
    "A<B": 0.25,
    "A<<B": 0.0,
    "B=A": 0.5,
    "A": 1.0,
    "B": 0.0,
    "C": 0.5,
}


def fill(template: str, texts: dict[str, str]) -> str:
    """Put texts in the place of {name}s, all at once: a text that holds such a name itself is left alone."""
    return re.sub(r"\{(\w+)\}", lambda match: texts.get(match[1], match[0]), template)


def to_messages(template: str, texts: dict[str, str]) -> list[dict]:
    """A filled template: turns between <|im_start|>ROLE and <|im_end|>, or one turn of the user."""
    turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", template, re.DOTALL) or [
        ("user", template)
    ]
    return [{"role": role, "content": fill(text.strip(), texts)} for role, text in turns]


def load_prompt(o: JudgeOptions, default: str) -> str:
    """The default, or --judge-prompt once it is sure to show the judge all that it must see."""
    if not o.judge_prompt:
        return default
    template = read_text(o.judge_prompt)
    for names in NAMES.values():
        if not any(f"{{{name}}}" in template for name in names):
            raise InputError(
                f"{o.judge_prompt}: has no place {{{names[0]}}}; write it where the judge shall see that text"
            )
    return template


def read_choice(reply: dict) -> float | None:
    """P(m) against M from the log-probs of the first token; else 1 or 0 if the text names one of the two; else None."""
    mass = [
        sum(
            math.exp(logp)
            for token, logp in (reply["top"] or {}).items()
            if token.strip() == letter
        )
        for letter in "mM"
    ]
    if sum(mass):
        return mass[0] / sum(mass)
    named = {*re.findall(r"(?<![\w'])[mM](?![\w'])", reply["text"])}
    return float("m" in named) if len(named) == 1 else None


def read_verdict(reply: dict) -> float | None:
    """P(the first answer is better) by the last [[...]] of the text."""
    found = re.findall(r"\[\[\s*([ABC<>=]+)\s*\]\]", reply["text"])
    return STEPS.get(found[-1]) if found else None


UNSAID = (
    "refusal",
    "content_filter",
    "too_long",
)  # endings of replies whose text is no verdict, whatever it says
FORMS = {"choice": (CHOICE, read_choice), "verdict": (VERDICT, read_verdict)}


def question_of(row: dict) -> str:
    """What a record asks, as a judge reads it: the prompt, or all turns up to the answer."""
    turns = messages_of(row)
    return (
        turns[0]["content"]
        if len(turns) == 1
        else "\n\n".join(f"{m['role']}: {m['content']}" for m in turns)
    )


# ---------------------------------------------------------------------------------------------- the judge


class Judge:
    """Requests in, verdicts out, each paid for once. Every rank makes one and calls it alike; rank 0 keeps the ledger.

    Raises InputError before anything is asked where options, key, package or the local model will not do.
    """

    def __init__(self, o: JudgeOptions, common: Common, out: str | Path):
        check(o)
        self.o, self.common, self.local = o, common, Path(o.judge).is_dir()
        self.path = Path(o.judge_cache or Path(out) / "verdicts.jsonl")
        self.bad_path, self.sampled = (
            self.path.with_suffix(f".{name}.jsonl") for name in ("malformed", "sampled")
        )
        self.used, self.unread = set(), 0  # keys of replies; how many requests never had a verdict
        if self.local:
            Chat(o.judge, common.chat_template), Config.load(o.judge)
        self.name = fingerprint(o.judge) if self.local else o.judge
        self.where = (
            [common.dtype, common.chat_template] if self.local else address(o)
        )  # the same name elsewhere is another
        on_first(self.open)

    def open(self) -> None:
        self.ledger = Ledger(self.path)
        self.endpoint = None if self.local else Endpoint(self.o, self.ledger)

    def body(self, request: Request, attempt: int) -> dict:
        """What is sent, and hashed. A further attempt differs in seed and temperature, or it would end the same."""
        body = {
            "model": self.name,
            "messages": request.messages,
            "temperature": 0.7 if attempt else 0.0,
            "seed": self.common.seed + attempt,
            "max_tokens": self.o.judge_tokens,
        }
        if request.choice:  # a small model likes to say "The better answer is m"
            body |= (
                {"max_tokens": 16}
                if self.local
                else {"max_tokens": 1, "logprobs": True, "top_logprobs": 5}
            )
        changes = json.loads(self.o.judge_request or "{}")
        return {name: value for name, value in {**body, **changes}.items() if value is not None}

    def ask(
        self, requests: list[Request], read: Callable[[dict], float | None]
    ) -> list[float | None]:
        """read(reply) of every request, None where no attempt gave a reply with a verdict in it."""
        values, left = [None] * len(requests), list(range(len(requests)))
        for attempt in range(self.o.attempts):
            bodies, bad = [self.body(requests[i], attempt) for i in left], {}
            for i, body, reply in zip(left, bodies, self.complete(bodies), strict=True):
                if reply["finish"] not in UNSAID:
                    values[i] = read(
                        {
                            **reply,
                            "text": re.sub(r"^.*</think>", "", reply["text"], flags=re.DOTALL),
                        }
                    )
                if values[i] is None:
                    bad[i] = {**reply, "messages": body["messages"]}
            on_first(self.keep_bad, [*bad.values()])
            left = [i for i, reply in bad.items() if reply["finish"] != "too_long"]
        self.unread += values.count(None)
        if requests and values.count(None) == len(requests):
            raise InputError(
                f"--judge {self.o.judge}: no verdict in any of {len(requests)} replies; they are in "
                f"{self.bad_path}; take another judge or another --judge-prompt"
            )
        return values

    def keep_bad(self, rows: list[dict]) -> None:
        bad = {
            row["key"]: row
            for row in (read_jsonl(self.bad_path) if self.bad_path.is_file() else [])
        }
        if any(row["key"] not in bad for row in rows):
            write_jsonl(
                self.bad_path,
                list({**bad, **{row["key"]: {"id": row["key"], **row} for row in rows}}.values()),
            )

    def complete(self, bodies: list[dict]) -> list[dict]:
        """A reply {key, text, finish, top, in, out, usd} for every body, from the ledger where it has one."""
        keys = [digest(body, self.where) for body in bodies]
        self.used |= set(keys)
        missing = on_first(
            lambda: {
                k: body
                for k, body in zip(keys, bodies, strict=True)
                if k not in self.ledger.replies
            }
        )
        if missing and self.local:
            self.generate(missing)
        elif missing:
            on_first(lambda: self.endpoint.fetch(missing, len(set(keys)) - len(missing)))
        return on_first(lambda: [self.ledger.replies[key] for key in keys])

    def generate(self, bodies: dict[str, dict]) -> None:
        """Replies of a local model into the ledger."""
        chat, context = (
            Chat(self.o.judge, self.common.chat_template),
            Config.load(self.o.judge).context,
        )
        done = []
        rows = [{"id": key, "messages": body["messages"]} for key, body in bodies.items()]
        fitting = [row for row in rows if len(chat.prompt_ids(row)) < context]
        if fitting:
            body = next(iter(bodies.values()))  # all are of one attempt
            o = SampleOptions(temperature=body["temperature"], max_new_tokens=body["max_tokens"])
            sample(self.o.judge, fitting, self.sampled, o, self.common, f"judge {body['seed']}")
            done = read_jsonl(self.sampled)

        def keep():
            for row in done:
                self.ledger.record(
                    row["id"], row["response"], row["finish_reason"], None, 0, row["tokens"]
                )
            for key in bodies.keys() - {row["id"] for row in done}:
                self.ledger.record(key, "", "too_long", None, 0, 0)

        on_first(keep)

    def usage(self) -> dict:
        """Of all verdicts asked for, those of earlier runs included: how many could not be had, replies, and their cost."""
        return {
            "malformed": self.unread,
            "judge_replies": len(self.used),
            "judge_usd": on_first(
                lambda: round(sum(self.ledger.replies[key]["usd"] for key in self.used), 6)
            ),
        }


def check(o: JudgeOptions) -> None:
    if not o.judge:
        raise InputError(
            "--judge: name a model of the endpoint --base-url, or the directory of a local chat model"
        )
    for name, good in (
        ("attempts", o.attempts > 0),
        ("retries", o.retries >= 0),
        ("concurrency", o.concurrency > 0),
        ("judge-tokens", o.judge_tokens > 0),
        ("request-timeout", o.request_timeout > 0),
        ("requests-per-minute", o.requests_per_minute >= 0),
        ("budget", o.budget >= 0),
    ):
        if not good:
            raise InputError(f"--{name}: the value makes no sense; see --help")
    if o.budget and not (o.price_in or o.price_out):
        raise InputError("--budget: cannot be kept without prices; give --price-in and --price-out")
    try:
        if not isinstance(json.loads(o.judge_request or "{}"), dict):
            raise ValueError("it is no object")
    except ValueError as error:
        raise InputError(
            f'--judge-request: not a JSON object ({error}); write it like {{"top_p": 0.9}}'
        ) from None
    if o.judge_request and Path(o.judge).is_dir():
        raise InputError("--judge-request: only for an endpoint; leave it out")
    load_prompt(o, "")


# ---------------------------------------------------------------------------------------------- pairs

Games = list[tuple[float | None, float | None]]


def pairwise(judge: Judge, questions: list[str], a: list[str], b: list[str], form: str) -> Games:
    """P(a is better) by two games for each question, a shown first and b shown first; None where no verdict was given.

    Equal answers are a draw that nobody is asked about.
    """
    default, read = FORMS[form]
    template, games = load_prompt(judge.o, default), [(0.5, 0.5)] * len(questions)
    apart = [i for i in range(len(questions)) if a[i].strip() != b[i].strip()]
    requests = []
    for i in apart:
        for shown in ((questions[i], a[i], b[i]), (questions[i], b[i], a[i])):
            texts = {
                name: text
                for names, text in zip(NAMES.values(), shown, strict=True)
                for name in names
            }
            requests.append(Request(to_messages(template, texts), form == "choice"))
    values = judge.ask(requests, read) if requests else []
    for i, first, second in zip(apart, values[::2], values[1::2], strict=True):
        games[i] = first, None if second is None else 1 - second
    return games


def compare(
    rows_a: list[dict], rows_b: list[dict], o: JudgeOptions, common: Common, out: str | Path
) -> list[float]:
    """P(a is better) for each pair of records {prompt | messages, response}, the mean over both orders; higher favours a.

    A game without a verdict counts as a draw. out: the directory of the cache. Every rank calls it with all records.
    """
    a, b = ([row["response"] for row in rows] for rows in (rows_a, rows_b))
    games = pairwise(Judge(o, common, out), [question_of(row) for row in rows_a], a, b, "choice")
    return [sum(0.5 if p is None else p for p in pair) / 2 for pair in games]

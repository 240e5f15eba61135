"""Verdicts on answers by a judge: a model behind an OpenAI-compatible endpoint, or a local one.

--judge is a checkpoint directory, whose verdicts sample.py writes greedily, or the name of a model
at the endpoint --base-url, with the key in the environment variable OPENAI_API_KEY. Only rank 0
asks an endpoint.

Every reply is cached in a JSONL file under the hash of its request as soon as it arrives: rerun the
same command to ask, and pay, only for what is missing. A reply without a verdict (nonsense, a
refusal, filtered or empty content, reasons or thoughts cut off) is kept in
verdicts.malformed.jsonl with its request, and asked for again with another seed at temperature 0.7.
If the last of --attempts has none either, the verdict is None, which each benchmark counts and
treats as its official code does. Transient failures (429, 5xx, time-outs, cut or invalid bodies)
are retried after a pause; others (400, 401, 404) stop at once.

A pairwise verdict has two forms. "choice" asks for one letter, m for the first answer or M for the
second; where the endpoint gives log-probs it is the probability of m against M. "verdict" asks for
reasons and [[A>>B]], [[A>B]], [[A=B]], [[B>A]] or [[B>>A]]. Both prompts are this file's own;
--judge-prompt FILE takes another, such as an official one. Scores are comparable with published
ones only with the official prompt and judge. Both orders of every pair are judged.

questions, answers -> verdicts.jsonl {key, text, finish, top, in, out, usd},
verdicts.malformed.jsonl {key, messages, text, finish}
"""

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from formats.chat import Chat
from formats.records import read_jsonl
from plumbing.files import InputError, digest, read_text, write_jsonl
from plumbing.options import RunOptions
from plumbing.ranges import Count, NotNegative, Positive, Whole
from plumbing.ranks import on_rank0
from plumbing.stage import fingerprint
from sample import SampleOptions, generate
from scorers.openai_api import Endpoint, ReplyCache, base_url


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    run: RunOptions = RunOptions()
    judge: str = ""  # a model's name at the endpoint, or the directory of a local chat model
    base_url: str = ""  # of an OpenAI-compatible endpoint; empty: OPENAI_BASE_URL, or OpenAI's own
    judge_prompt: str = ""  # file with {question}, {answer_a}, {answer_b}, or official names
    judge_cache: str = ""  # JSONL of verdicts to share between runs; empty: verdicts.jsonl in --out
    judge_tokens: Count = 1024  # max tokens of a verdict with reasons
    judge_request: str = ""  # JSON object of more request fields; null removes one: {"seed": null}
    attempts: Count = 3  # max attempts to get a parsable verdict
    retries: Whole = 8  # of a request after transient failures; pauses double from 0.5 to 8 seconds
    request_timeout: Positive = 180.0  # seconds
    concurrency: Count = 8  # max concurrent requests
    requests_per_minute: NotNegative = 0.0  # rate limit; 0: none
    budget: NotNegative = 0.0  # max USD that all verdicts in the cache may cost; 0: no limit
    price_in: NotNegative = 0.0  # USD per million tokens of requests
    price_out: NotNegative = 0.0  # USD per million tokens of replies


@dataclass(frozen=True)
class Request:
    messages: list[dict]
    choice: bool = False  # one letter is enough, with its log-probs


# ----------------------------------------------------------------------------- prompts and verdicts

# Replies are cached by the hash of what is sent: change a word, and all are paid for again.
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
Which answer would its reader rather have had? What counts is that it does what was asked, is \
correct, and is clear; neither
length nor the order in which the answers stand counts. Reply with the one letter m or M.\
<|im_end|>"""

VERDICT = """<|im_start|>system
You compare the answers of two assistants, A and B, to a question. Work out first what a correct \
and complete answer needs. Then
name the mistakes and the merits of each answer in a few sentences. Neither length nor order \
counts. End with one of these:
[[A>>B]] if A is much better, [[A>B]] if A is better, [[A=B]] if they are about equal, [[B>A]] \
if B is better, [[B>>A]] if B is much better.<|im_end|>
<|im_start|>user
# Question
{question}

# Answer of assistant A
{answer_a}

# Answer of assistant B
{answer_b}<|im_end|>"""

# What official prompts call the three texts.
OFFICIAL_NAMES = {
    "question": ("question_1", "instruction", "prompt", "QUESTION"),
    "answer_a": ("answer_1", "output_1", "ANSWER_A"),
    "answer_b": ("answer_2", "output_2", "ANSWER_B"),
}
# P(the first answer is better) by verdict; [[A]], [[B]] and [[C]] (a tie) are MT-Bench's.
VERDICTS = {
    "A>>B": 1.0,
    "A>B": 0.75,
    "A=B": 0.5,
    "B=A": 0.5,
    "B>A": 0.25,
    "A<B": 0.25,
    "B>>A": 0.0,
    "A<<B": 0.0,
    "A": 1.0,
    "B": 0.0,
    "C": 0.5,
}
# Endings of replies whose text is no verdict, whatever it says.
NO_VERDICT = ("refusal", "content_filter", "too_long")


def fill_in(template: str, texts: dict[str, str]) -> str:
    """Replace {name}s by texts, in one pass: a name inside a text is left alone."""
    return re.sub(r"\{(\w+)\}", lambda match: texts.get(match[1], match[0]), template)


def to_messages(template: str, texts: dict[str, str]) -> list[dict]:
    """A filled template: turns between <|im_start|>ROLE and <|im_end|>, else one user turn."""
    turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", template, re.DOTALL)
    return [
        {"role": role, "content": fill_in(text.strip(), texts)}
        for role, text in turns or [("user", template)]
    ]


def load_prompt(o: JudgeOptions, default: str) -> str:
    """The default, or --judge-prompt with our names; it must show the judge all three texts."""
    if not o.judge_prompt:
        return default
    template = read_text(o.judge_prompt)
    for name, others in OFFICIAL_NAMES.items():
        for other in others:
            template = template.replace(f"{{{other}}}", f"{{{name}}}")
        if f"{{{name}}}" not in template:
            fix = "write it where the judge must see that text"
            raise InputError(f"{o.judge_prompt}: has no place {{{name}}}; {fix}")
    return template


def read_choice(reply: dict) -> float | None:
    """P(m) from the first token's log-probs; else 1 or 0 if the text names one; else None."""
    mass = Counter()
    for token, logp in (reply["top"] or {}).items():
        mass[token.strip()] += math.exp(logp)
    total = mass["m"] + mass["M"]
    if total:
        return mass["m"] / total
    named = {*re.findall(r"(?<![\w'])[mM](?![\w'])", reply["text"])}
    return float("m" in named) if len(named) == 1 else None


def read_verdict(reply: dict) -> float | None:
    """P(the first answer is better) by the last [[...]] of the text."""
    found = re.findall(r"\[\[\s*([ABC<>=]+)\s*\]\]", reply["text"])
    return VERDICTS.get(found[-1]) if found else None


def final_text(reply: dict, choice: bool) -> str | None:
    """What a reply says after a reasoning model's thoughts; None where that holds no verdict.

    A verdict inside reasons that were cut off is one that the judge may have been about to change.
    One letter always ends at its limit.
    """
    if reply["finish"] in NO_VERDICT or (reply["finish"] == "length" and not choice):
        return None
    text = re.sub(r"^.*</think>", "", reply["text"], flags=re.DOTALL)
    return None if text.lstrip().startswith("<think>") else text


FORMS = {"choice": (CHOICE, read_choice), "verdict": (VERDICT, read_verdict)}


# ---------------------------------------------------------------------------------- the judge


class Judge:
    """Requests in, verdicts out, each paid for once. Every rank has one; rank 0 has the cache.

    Raises InputError before anything is asked if options, key, package or the local model are
    unusable.
    """

    def __init__(self, o: JudgeOptions, out: str | Path):
        """out: the directory of the cache unless --judge-cache names a file."""
        check_options(o)
        self.o = o
        self.local = Path(o.judge).is_dir()
        self.path = Path(o.judge_cache or Path(out) / "verdicts.jsonl")
        self.malformed_path = self.path.with_suffix(".malformed.jsonl")
        self.used = set()  # keys of all replies asked for
        self.unanswered = 0  # requests that never had a verdict

        # what tells this judge from another of the same name
        self.name = o.judge
        self.place = base_url(o)
        if self.local:
            self.chat = Chat(o.judge, o.run, own_template=True)
            self.name = on_rank0(fingerprint, o.judge)
            self.place = [o.run.dtype, self.chat.template]
        self.malformed = on_rank0(self.open)

    def open(self) -> dict[str, dict]:
        """Returns replies without a verdict and their requests, by key, of earlier runs."""
        self.cache = ReplyCache(self.path)
        if not self.local:
            self.endpoint = Endpoint(self.o, self.cache)
        rows = read_jsonl(self.malformed_path) if self.malformed_path.is_file() else []
        return {row["key"]: row for row in rows}

    def body(self, request: Request, attempt: int) -> dict:
        """What is sent and hashed. Another attempt has another seed, and a temperature."""
        body = {
            "model": self.name,
            "messages": request.messages,
            "temperature": 0.7 if attempt else 0.0,
            "seed": self.o.run.seed + attempt,
            "max_tokens": self.o.judge_tokens,
        }
        if request.choice and self.local:
            body["max_tokens"] = 16  # a small model likes to say "The better answer is m"
        elif request.choice:
            body |= {"max_tokens": 1, "logprobs": True, "top_logprobs": 5}
        body |= json.loads(self.o.judge_request or "{}")
        return {name: value for name, value in body.items() if value is not None}

    def ask(
        self, requests: list[Request], read: Callable[[dict], float | None]
    ) -> list[float | None]:
        """read(reply) of every request; None where no attempt got a reply with a verdict."""
        # ask for all, then again for those without a verdict, unless they are too long
        values = [None] * len(requests)
        left = range(len(requests))
        for attempt in range(self.o.attempts):
            replies = self.complete([self.body(requests[i], attempt) for i in left])
            again = []
            for i, reply in zip(left, replies, strict=True):
                text = final_text(reply, requests[i].choice)
                if text is not None:
                    values[i] = read({**reply, "text": text})
                if values[i] is None:
                    key = reply["key"]
                    self.malformed[key] = {"id": key, **reply, "messages": requests[i].messages}
                    if reply["finish"] != "too_long":
                        again.append(i)
            left = again
            if self.malformed:
                on_rank0(write_jsonl, self.malformed_path, list(self.malformed.values()))

        # a judge that never gives one is not a judge
        self.unanswered += values.count(None)
        if requests and values.count(None) == len(requests):
            problem = f"no verdict in any of {len(requests)} replies"
            fix = "choose another judge or another --judge-prompt"
            raise InputError(
                f"--judge {self.o.judge}: {problem}; they are in {self.malformed_path}; {fix}"
            )
        return values

    def complete(self, bodies: list[dict]) -> list[dict]:
        """A reply {key, text, finish, top, in, out, usd} for every body, cached or new."""
        keys = [digest(body, self.place) for body in bodies]
        self.used.update(keys)
        known = on_rank0(lambda: self.cache.replies.keys() & keys)
        pairs = zip(keys, bodies, strict=True)
        missing = {key: body for key, body in pairs if key not in known}
        if missing and self.local:
            self.sample(missing)
        elif missing:
            on_rank0(lambda: self.endpoint.fetch(missing))
        return on_rank0(lambda: [self.cache.replies[key] for key in keys])

    def sample(self, bodies: dict[str, dict]) -> None:
        """Replies of a local model into the cache; prompts that fill the context get none."""
        rows = [{"id": key, "messages": body["messages"]} for key, body in bodies.items()]
        fitting = [row for row in rows if len(self.chat.prompt_ids(row)) < self.chat.max_positions]
        replies = {key: {"finish": "too_long"} for key in bodies}

        # the folder is named by the requests: chunks of an interrupted call serve no others
        scratch = self.path.with_suffix(f".{digest(*bodies)}.partial")
        if fitting:
            sampled = scratch / "replies.jsonl"
            body = next(iter(bodies.values()))  # all are of one attempt
            o = SampleOptions(
                run=self.o.run, temperature=body["temperature"], max_new_tokens=body["max_tokens"]
            )
            generate(self.o.judge, fitting, sampled, o, scratch, f"judge {body['seed']}")
            for row in read_jsonl(sampled):
                replies[row["id"]] = {
                    "text": row["response"],
                    "finish": row["finish_reason"],
                    "out": row["tokens"],
                }
        on_rank0(lambda: self.cache.add(replies))
        on_rank0(shutil.rmtree, scratch, True)

    def usage(self) -> dict:
        """Of all verdicts asked for, cached ones included: requests without one, replies, cost."""
        cost = on_rank0(lambda: sum(self.cache.replies[key]["usd"] for key in self.used))
        return {
            "malformed": self.unanswered,
            "judge_replies": len(self.used),
            "judge_usd": round(cost, 6),
        }


def check_options(o: JudgeOptions) -> None:
    """Raise InputError on options that cannot work."""
    if not o.judge:
        choice = "a model at the endpoint --base-url, or the directory of a local chat model"
        raise InputError(f"--judge: name {choice}")

    if o.budget and not (o.price_in or o.price_out):
        raise InputError("--budget: needs prices; give --price-in and --price-out")

    # more fields of a request
    try:
        if not isinstance(json.loads(o.judge_request or "{}"), dict):
            raise ValueError("it is another JSON value")
    except ValueError as error:
        fix = 'write it like {"top_p": 0.9}'
        raise InputError(f"--judge-request: not a JSON object ({error}); {fix}") from None
    if o.judge_request and Path(o.judge).is_dir():
        raise InputError("--judge-request: only for an endpoint; leave it out")
    load_prompt(o, "")


# ---------------------------------------------------------------------------------- pairs


def pairwise(
    judge: Judge, questions: list[str], a: list[str], b: list[str], form: str
) -> list[tuple[float | None, float | None]]:
    """P(a is better) by two comparisons per question, a shown first and b shown first.

    None where there is no verdict. Equal answers are a draw that nobody is asked about.
    """
    default, read = FORMS[form]
    template = load_prompt(judge.o, default)
    comparisons = [(0.5, 0.5)] * len(questions)
    differing = [i for i in range(len(questions)) if a[i].strip() != b[i].strip()]

    # two requests for each question, one in each order
    requests = []
    for i in differing:
        for first, second in ((a[i], b[i]), (b[i], a[i])):
            texts = {"question": questions[i], "answer_a": first, "answer_b": second}
            requests.append(Request(to_messages(template, texts), form == "choice"))

    # the second order's verdict is about b
    values = judge.ask(requests, read)
    for i, first, second in zip(differing, values[::2], values[1::2], strict=True):
        comparisons[i] = (first, None if second is None else 1 - second)
    return comparisons

"""Replies of an OpenAI-compatible endpoint, cached as they arrive; what happens on failure.

    cache = ReplyCache("verdicts.jsonl")
    Endpoint(o, cache).fetch({key: body, ...})
    cache.replies[key]  # {key, text, finish, top, in, out, usd}

o: llm_judge.JudgeOptions. Transient failures (429, 408, 5xx, time-outs, dropped connections, bodies
that are not JSON) are retried after a pause that doubles, or as long as the endpoint asks. Any
other (400, 401, 403, 404, an exhausted quota) stops at once. Either way, what was paid for is in
the cache. The budget counts what the endpoint reports; it cannot see a reply that was lost on its
way.
"""

import json
import os
import random
import threading
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from email.utils import parsedate_to_datetime
from pathlib import Path

from tqdm import tqdm

from plumbing.records import InputError

FIELDS = ("key", "text", "finish", "top", "in", "out", "usd")
TRANSIENT = (408, 409, 425, 429)  # and 500 or above


class ReplyCache:
    """Replies by the hash of their request, and their file: one line each, appended at once."""

    def __init__(self, path: Path):
        """Read what earlier runs paid for. A last line that a kill cut in half is dropped."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.replies = {}
        self.lock = threading.Lock()

        # what follows the last newline is half a line
        content = path.read_bytes() if path.is_file() else b""
        whole, newline, half = content.rpartition(b"\n")
        if half:
            os.truncate(path, len(whole + newline))

        for number, line in enumerate(whole.split(b"\n") if whole else (), 1):
            try:
                reply = json.loads(line)
                self.replies[reply["key"]] = {name: reply[name] for name in FIELDS}
            except (ValueError, KeyError, TypeError):
                fix = "delete the line; it will be asked for again"
                raise InputError(f"{path}: line {number} is not a reply; {fix}") from None
        self.usd = sum(reply["usd"] for reply in self.replies.values())

    def add(self, key: str, reply: dict, usd: float = 0.0) -> None:
        """reply: {text, finish, top, in, out} as new_reply() gives it."""
        entry = {"key": key, **reply, "usd": usd}
        # unbuffered, in one write, so nothing is left to flush
        with self.lock, open(self.path, "ab", buffering=0) as file:
            file.write(json.dumps(entry).encode() + b"\n")
            self.replies[key] = entry
            self.usd += usd


def new_reply(
    text: str, finish: str, top: dict | None = None, n_in: int = 0, n_out: int = 0
) -> dict:
    """finish: how it ended; top: log-prob by token for the first token; n_in, n_out: tokens."""
    return {"text": text, "finish": finish, "top": top, "in": n_in, "out": n_out}


# ---------------------------------------------------------------------------------- the connection


def base_url(o) -> str:
    """The address of the endpoint; empty for OpenAI's own."""
    return o.base_url or os.environ.get("OPENAI_BASE_URL", "")


def api_key() -> str:
    # stripped: errors would quote a newline at its end
    return os.environ.get("OPENAI_API_KEY", "").strip()


def one_line(text: str) -> str:
    """The start of a text on one line, without the key, which endpoints like to repeat."""
    if api_key():
        text = text.replace(api_key(), "***")
    return " ".join(text.split())[:200]


def connect(o):
    """(the openai package, a client). Raises InputError without package or key; nothing is sent."""
    # the package is optional
    try:
        import openai
    except ImportError:
        needed = "a judge behind an endpoint needs the openai package"
        fix = "pip install -r requirements-eval.txt"
        raise InputError(f"judge {o.judge}: no such directory, and {needed}: {fix}") from None

    # a key, or an address that may need none
    if not api_key() and not base_url(o):
        fix = (
            "for an endpoint set OPENAI_API_KEY, or give the address of one that needs no key "
            "with OPENAI_BASE_URL or --base-url"
        )
        raise InputError(f"judge {o.judge}: no such directory; {fix}")

    # retries are call()'s, which keeps them to the rate limit
    client = openai.OpenAI(
        api_key=api_key() or "none",
        base_url=base_url(o) or None,
        timeout=o.request_timeout,
        max_retries=0,
    )
    return openai, client


class Endpoint:
    """Sends requests, several at a time, within the rate limit and the budget."""

    def __init__(self, o, cache: ReplyCache):
        self.o = o
        self.cache = cache
        self.openai, self.client = connect(o)
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        self.next_start = 0.0  # when a request may start, by time.monotonic()
        self.problem = ""  # the last failure, for the progress bar

    def fetch(self, bodies: dict[str, dict], known: int = 0) -> None:
        """Get a reply to every body. On an error, replies under way are still awaited and cached.

        known: number of replies that the caller has already, for the progress bar.
        """
        waiting = deque(bodies.items())
        running = {}  # future -> USD that it may cost
        self.stopped.clear()
        bar = tqdm(
            desc=f"judge {self.o.judge}",
            total=known + len(waiting),
            initial=known,
            unit=" replies",
            leave=False,
        )
        with bar, ThreadPoolExecutor(self.o.concurrency) as pool:
            try:
                while running or waiting:
                    self.submit(waiting, running, pool)
                    if not running:
                        raise self.out_of_budget(len(waiting))
                    for future in wait(running, timeout=5, return_when=FIRST_COMPLETED).done:
                        del running[future]
                        future.result()  # raises what stopped it
                        bar.update()
                    bar.set_postfix_str(f"{self.cache.usd:.4f} USD {self.problem[:40]}")
            finally:
                # threads that pause before a retry give up; the pool waits for replies under way
                self.stopped.set()

    def submit(self, waiting: deque, running: dict, pool: ThreadPoolExecutor) -> None:
        """Start as many of the waiting requests as concurrency and budget allow."""
        while waiting and len(running) < self.o.concurrency:
            key, body = waiting[0]
            cost = self.max_cost(body)
            if self.o.budget and self.cache.usd + sum(running.values()) + cost > self.o.budget:
                return
            waiting.popleft()
            running[pool.submit(self.call, key, body)] = cost

    def out_of_budget(self, missing: int) -> InputError:
        spent = f"{self.cache.usd:.4f} USD are spent, and the next reply may exceed it"
        kept = f"{len(self.cache.replies)} replies are in {self.cache.path}"
        fix = "raise it and rerun the same command"
        return InputError(
            f"--budget {self.o.budget:g}: {spent}; {kept}, {missing} are missing: {fix}"
        )

    def max_cost(self, body: dict) -> float:
        """Upper bound of a request's cost in USD: a token of English is about 4 bytes, here 3."""
        n_in = len(json.dumps(body["messages"], ensure_ascii=False).encode()) / 3
        n_out = body.get("max_tokens") or body.get("max_completion_tokens") or self.o.judge_tokens
        return self.price(n_in, n_out)

    def price(self, n_in: float, n_out: float) -> float:
        return (n_in * self.o.price_in + n_out * self.o.price_out) / 1e6

    # ------------------------------------------------------------------ one request, in a thread

    def call(self, key: str, body: dict) -> None:
        """Send one request until it is answered, and cache its reply."""
        fields = {k: value for k, value in body.items() if k not in ("model", "messages")}
        kept = f"replies so far are in {self.cache.path}"
        for trial in range(self.o.retries + 1):
            self.wait_for_turn()
            # jitter: without it, all threads would come back at once
            pause = min(60, 2**trial) * random.uniform(0.5, 1)
            try:
                raw = self.client.chat.completions.with_raw_response.create(
                    model=body["model"], messages=body["messages"], extra_body=fields
                )
                reply = read_reply(json.loads(raw.http_response.text), body)
                self.cache.add(key, reply, self.price(reply["in"], reply["out"]))
                return
            except self.openai.APIStatusError as error:
                message = one_line(str(error.message))
                ending = unanswerable(error.code, message)
                if ending:
                    self.cache.add(key, new_reply(message, ending))
                    return
                self.problem = f"{error.status_code} {message}"
                if is_permanent(error):
                    fix = "check --judge, --base-url, --judge-request and OPENAI_API_KEY"
                    problem = f"the endpoint says {self.problem}"
                    raise InputError(f"--judge {self.o.judge}: {problem}; {fix}; {kept}") from None
                if self.postpone(retry_after(error.response.headers)):
                    pause = 0.0
            except (self.openai.APIConnectionError, ValueError) as error:
                # ValueError: not JSON, or not a chat completion
                self.problem = one_line(f"{type(error).__name__}: {error.__cause__ or error}")
            if trial < self.o.retries:
                self.stopped.wait(pause)
        trials = f"no reply in {self.o.retries + 1} trials, the last failure was {self.problem}"
        raise InputError(f"--judge {self.o.judge}: {trials}; {kept}: rerun the same command later")

    def wait_for_turn(self) -> None:
        """Wait until the rate limit and the endpoint's Retry-After allow another request."""
        with self.lock:
            start = max(self.next_start, time.monotonic())
            self.next_start = start
            if self.o.requests_per_minute:
                self.next_start += 60 / self.o.requests_per_minute
        if self.stopped.wait(max(0.0, start - time.monotonic())):
            raise InputError(f"--judge {self.o.judge}: stopped")

    def postpone(self, seconds: float) -> bool:
        """Let no request start for as long as the endpoint asks; returns whether it asks."""
        if seconds:
            with self.lock:
                self.next_start = max(self.next_start, time.monotonic() + seconds)
        return seconds > 0


# ----------------------------------------------------------------------------- replies and failures


def read_reply(answer, body: dict) -> dict:
    """The reply in a chat completion. Raises ValueError if it is none.

    finish: as reported, or "refusal". Counts of tokens are estimated where the endpoint gives none.
    """
    if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
        raise ValueError(f"not a chat completion: {str(answer)[:200]}")
    choice = (answer["choices"] or [None])[0] or {}
    message = choice.get("message") or {}

    # the text, which some send in parts
    text = message.get("content") or message.get("refusal") or ""
    if isinstance(text, list):
        text = "".join(part.get("text") or "" for part in text if isinstance(part, dict))
    if not isinstance(text, str):
        raise ValueError(f"no text in the reply: {str(text)[:200]}")
    text = writable(text)
    finish = "refusal" if message.get("refusal") else choice.get("finish_reason") or "no choice"

    # log-probs of the first token's alternatives
    tokens = (choice.get("logprobs") or {}).get("content") or [{}]
    top = {}
    for token in tokens[0].get("top_logprobs") or ():
        if isinstance(token["logprob"], int | float):
            top[writable(str(token["token"]))] = token["logprob"]

    usage = answer.get("usage") or {}
    n_in = usage.get("prompt_tokens") or len(json.dumps(body["messages"])) // 4
    n_out = usage.get("completion_tokens") or len(text) // 4
    return new_reply(text, finish, top or None, n_in, n_out)


def writable(text: str) -> str:
    """The text without halves of surrogate pairs, which can be sent but not written."""
    return text.encode(errors="replace").decode()


def is_permanent(error) -> bool:
    """Whether a status error will come again."""
    transient = error.status_code in TRANSIENT or error.status_code >= 500
    return error.code == "insufficient_quota" or not transient


def unanswerable(code, message: str) -> str:
    """How a reply ends that this one request will never get: filtered, or too long; else empty."""
    if code == "content_filter":
        return "content_filter"
    if code == "context_length_exceeded" or "maximum context length" in message:
        return "too_long"
    return ""


def retry_after(headers) -> float:
    """Seconds that the endpoint asks to wait, given as a number or a date; 0 if it does not."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0

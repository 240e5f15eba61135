"""Replies of an OpenAI-compatible endpoint, cached as they arrive; what happens on failure.

    cache = ReplyCache("verdicts.jsonl")
    Endpoint(o, cache).fetch({key: body, ...})
    cache.replies[key]  # {key, text, finish, top, in, out, usd}

o: llm_judge.JudgeOptions. Transient failures (429, 408, 5xx, time-outs, dropped connections, bodies
that are not JSON) are retried after a pause that doubles, or that the endpoint asks for. Any other
failure (400, 401, 403, 404, an exhausted quota) stops at once. Either way, what was paid for is in
the cache. The budget counts what the endpoint reports; it cannot see a reply that was lost in
transit.
"""

import json
import os
import random
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from email.utils import parsedate_to_datetime
from pathlib import Path

from tqdm import tqdm

from plumbing.records import InputError

# A line of the cache. finish: how the reply ended; top: log-prob by token for the first token;
# in, out: numbers of tokens.
EMPTY = {"key": "", "text": "", "finish": "", "top": None, "in": 0, "out": 0, "usd": 0.0}
TRANSIENT = (408, 409, 425, 429)  # and 500 or above


class ReplyCache:
    """Replies by the hash of their request, and their file: one line each, appended at once."""

    def __init__(self, path: Path):
        """Read what earlier runs paid for. A last line that a kill cut in half is dropped."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.replies = {}
        self.usd = 0.0
        self.lock = threading.Lock()

        # what follows the last newline is half a line
        content = path.read_bytes() if path.is_file() else b""
        whole, newline, half = content.rpartition(b"\n")
        if half:
            os.truncate(path, len(whole + newline))

        for number, line in enumerate(whole.splitlines(), 1):
            try:
                reply = json.loads(line)
                self.replies[reply["key"]] = reply
                self.usd += reply["usd"]
            except (ValueError, KeyError, TypeError):
                fix = "delete the line; it will be asked for again"
                raise InputError(f"{path}: line {number} is not a reply; {fix}") from None

    def add(self, replies: dict[str, dict]) -> None:
        """By key, the fields of each reply that differ from EMPTY."""
        for key, reply in replies.items():
            entry = {**EMPTY, "key": key, **reply}
            # unbuffered, in one write, so nothing is left to flush
            with self.lock, open(self.path, "ab", buffering=0) as file:
                file.write(json.dumps(entry).encode() + b"\n")
                self.replies[key] = entry
                self.usd += entry["usd"]


# ---------------------------------------------------------------------------------- the connection


def base_url(o) -> str:
    """The address of the endpoint; empty for OpenAI's own."""
    return o.base_url or os.environ.get("OPENAI_BASE_URL", "")


def api_key() -> str:
    # stripped: errors would quote a newline at its end
    return os.environ.get("OPENAI_API_KEY", "").strip()


def connect(o):
    """A client. Raises InputError without package or key; nothing is sent."""
    # the package is optional
    try:
        from openai import OpenAI
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

    # no retries of its own: call() retries within the rate limit, and invalid bodies too
    return OpenAI(
        api_key=api_key() or "none",
        base_url=base_url(o) or None,
        timeout=o.request_timeout,
        max_retries=0,
    )


class Endpoint:
    """Sends requests, several at a time, within the rate limit and the budget."""

    def __init__(self, o, cache: ReplyCache):
        self.o = o
        self.cache = cache
        self.client = connect(o)
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        self.next_start = 0.0  # when the rate limit allows a request, by time.monotonic()
        self.problem = ""  # the last failure, for the progress bar

    def fetch(self, bodies: dict[str, dict]) -> None:
        """Get a reply to every body. On an error, pending replies are still awaited and cached."""
        budget = self.o.budget or float("inf")
        running = {}  # future -> USD that it may cost
        self.stopped.clear()
        bar = tqdm(total=len(bodies), desc=f"judge {self.o.judge}", unit=" replies", leave=False)
        with bar, ThreadPoolExecutor(self.o.concurrency) as pool:
            try:
                for key, body in bodies.items():
                    cost = self.max_cost(body)
                    while (
                        len(running) == self.o.concurrency
                        or self.cache.usd + sum(running.values()) + cost > budget
                    ):
                        if not running:
                            raise self.out_of_budget(bodies)
                        self.collect(running, bar)
                    running[pool.submit(self.call, key, body)] = cost
                while running:
                    self.collect(running, bar)
            finally:
                # threads that pause before a retry give up; the pool waits for pending replies
                self.stopped.set()

    def collect(self, running: dict, bar: tqdm) -> None:
        """Wait at most 5 seconds for replies, and forget their futures; raises what stopped one."""
        for future in wait(running, 5, FIRST_COMPLETED).done:
            del running[future]
            future.result()
            bar.update()
        bar.set_postfix_str(f"{self.cache.usd:.4f} USD {self.problem[:40]}")

    def max_cost(self, body: dict) -> float:
        """Upper bound of a request's cost in USD: an English token is about 4 bytes, here 3."""
        n_in = len(json.dumps(body["messages"], ensure_ascii=False).encode()) / 3
        n_out = body.get("max_tokens") or body.get("max_completion_tokens") or self.o.judge_tokens
        return self.price(n_in, n_out)

    def price(self, n_in: float, n_out: float) -> float:
        return (n_in * self.o.price_in + n_out * self.o.price_out) / 1e6

    # ------------------------------------------------------------------ one request, in a thread

    def call(self, key: str, body: dict) -> None:
        """Send one request until it is answered, and cache its reply."""
        from openai import APIConnectionError, APIStatusError

        pause = 0.0
        for trial in range(self.o.retries + 1):
            self.wait_for_turn(pause)
            # jitter: without it, all threads would come back at once
            pause = min(60, 2**trial) * random.uniform(0.5, 1)
            try:
                text = self.client.post("/chat/completions", body=body, cast_to=str)
                reply = read_reply(json.loads(text), body)
                reply["usd"] = self.price(reply["in"], reply["out"])
                self.cache.add({key: reply})
                return
            except APIStatusError as error:
                message = one_line(error.message)
                ending = unanswerable(error.code, message)
                if ending:
                    self.cache.add({key: {"text": message, "finish": ending}})
                    return
                self.problem = f"{error.status_code} {message}"
                if is_permanent(error):
                    fix = "check --judge, --base-url, --judge-request and OPENAI_API_KEY"
                    raise self.failure(f"the endpoint says {self.problem}", fix) from None
                pause = retry_after(error.response.headers) or pause
            except (APIConnectionError, ValueError) as error:
                # ValueError: not JSON, or not a chat completion
                self.problem = one_line(f"{type(error).__name__}: {error.__cause__ or error}")
        trials = f"no reply in {self.o.retries + 1} trials, the last failure was {self.problem}"
        raise self.failure(trials, "rerun the same command later")

    def out_of_budget(self, bodies: dict[str, dict]) -> InputError:
        missing = len(bodies.keys() - self.cache.replies.keys())
        spent = f"{self.cache.usd:.4f} USD of --budget {self.o.budget:g} are spent"
        problem = f"{spent}, the next reply may exceed it, and {missing} are missing"
        return self.failure(problem, "raise it and rerun the same command")

    def failure(self, problem: str, fix: str) -> InputError:
        kept = f"replies so far are in {self.cache.path}"
        return InputError(f"--judge {self.o.judge}: {problem}; {kept}; {fix}")

    def wait_for_turn(self, pause: float) -> None:
        """Wait for `pause` seconds, and until the rate limit allows another request."""
        with self.lock:
            start = max(self.next_start, time.monotonic() + pause)
            if self.o.requests_per_minute:
                self.next_start = start + 60 / self.o.requests_per_minute
        if self.stopped.wait(start - time.monotonic()):
            raise InputError(f"--judge {self.o.judge}: stopped")


# ----------------------------------------------------------------------------- replies and failures


def read_reply(answer, body: dict) -> dict:
    """The reply in a chat completion, as of EMPTY. Raises ValueError if it is none.

    finish: as reported, or "refusal". Counts of tokens are estimated where the endpoint gives none.
    """
    if not isinstance(answer, dict) or "choices" not in answer:
        raise ValueError(f"not a chat completion: {str(answer)[:200]}")
    choice = (answer["choices"] or [None])[0] or {}
    message = choice.get("message") or {}

    # the text, which some send in parts
    text = message.get("content") or message.get("refusal") or ""
    if isinstance(text, list):
        text = "".join(part.get("text") or "" for part in text)
    if not isinstance(text, str):
        raise ValueError(f"no text in the reply: {str(text)[:200]}")
    finish = "refusal" if message.get("refusal") else choice.get("finish_reason") or "no choice"

    # log-probs of the first token's alternatives
    tokens = (choice.get("logprobs") or {}).get("content") or [{}]
    top = {}
    for token in tokens[0].get("top_logprobs") or ():
        if token["logprob"] is not None:
            top[writable(token["token"])] = token["logprob"]

    usage = answer.get("usage") or {}
    return {
        "text": writable(text),
        "finish": finish,
        "top": top or None,
        "in": usage.get("prompt_tokens") or len(json.dumps(body["messages"])) // 4,
        "out": usage.get("completion_tokens") or len(text) // 4,
    }


def writable(text: str) -> str:
    """The text without halves of surrogate pairs, which can be sent but not written."""
    return text.encode(errors="replace").decode()


def one_line(text: str) -> str:
    """The start of a text on one line, without the key, which endpoints like to repeat."""
    if api_key():
        text = text.replace(api_key(), "***")
    return " ".join(text.split())[:200]


def is_permanent(error) -> bool:
    """Whether a status error would come again."""
    transient = error.status_code in TRANSIENT or error.status_code >= 500
    return error.code == "insufficient_quota" or not transient


def unanswerable(code, message: str) -> str:
    """How a reply ends that this request will never get: filtered, or too long; else empty."""
    if code == "content_filter":
        return "content_filter"
    if code == "context_length_exceeded" or "maximum context length" in message:
        return "too_long"
    return ""


def retry_after(headers) -> float:
    """Seconds that the endpoint asks to wait, given as a number or a date; 0 if it does not."""
    value = headers.get("retry-after", "")
    try:
        return float(value)
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0

"""Replies of an OpenAI-compatible endpoint, cached as they arrive; what happens on failure.

    cache = ReplyCache("verdicts.jsonl")
    Endpoint(o, cache).fetch({key: body, ...})
    cache.replies[key]  # {key, text, finish, top, in, out, usd}

o: llm_judge.JudgeOptions. The openai package retries transient failures (429, 408, 5xx, time-outs,
dropped connections, bodies that are no chat completion) after a pause that doubles, or that the
endpoint asks for. Any other failure (400, 401, 403, 404, an exhausted quota) stops at once. Either
way, what was paid for is in the cache. The budget counts what the endpoint reports; it cannot see a
reply that was lost in transit.
"""

import json
import os
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

from ops.progress import Progress
from plumbing.files import InputError

# Fields of a reply. finish: how it ended; top: log-prob by token for the first token; in, out:
# numbers of tokens.
EMPTY = {"key": "", "text": "", "finish": "", "top": None, "in": 0, "out": 0, "usd": 0.0}


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


def connect(o, hooks=None):
    """An OpenAI client. Raises InputError without package or key; nothing is sent.

    hooks: functions of httpx that see each request and each response, retries included.
    """
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
    return openai.OpenAI(
        api_key=api_key() or "none",
        base_url=base_url(o) or None,
        timeout=o.request_timeout,
        max_retries=o.retries,
        http_client=openai.DefaultHttpxClient(event_hooks=hooks),
    )


class Endpoint:
    """Sends requests, several at a time, within the rate limit and the budget."""

    def __init__(self, o, cache: ReplyCache):
        self.o = o
        self.cache = cache
        self.client = connect(o, {"request": [self.wait_for_turn], "response": [correct_status]})
        self.lock = threading.Lock()
        self.next_start = 0.0  # when the rate limit allows a request, by time.monotonic()

    def fetch(self, bodies: dict[str, dict]) -> None:
        """Get a reply to every body. On an error, pending replies are still awaited and cached."""
        budget = self.o.budget or float("inf")
        running = {}  # future -> USD that it may cost
        bar = Progress(f"judge {self.o.judge}", "reply", len(bodies))
        with bar, ThreadPoolExecutor(self.o.concurrency) as pool:
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

    def collect(self, running: dict, bar: Progress) -> None:
        """Wait for a reply and remove its future; raises what stopped it."""
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            del running[future]
            future.result()
            bar.update(note=f"{self.cache.usd:.4f} USD")

    def max_cost(self, body: dict) -> float:
        """Upper bound of a request's cost in USD: an English token is about 4 bytes, here 3."""
        n_in = len(json.dumps(body["messages"], ensure_ascii=False).encode()) / 3
        n_out = body.get("max_tokens") or body.get("max_completion_tokens") or self.o.judge_tokens
        return self.price(n_in, n_out)

    def price(self, n_in: float, n_out: float) -> float:
        return (n_in * self.o.price_in + n_out * self.o.price_out) / 1e6

    def out_of_budget(self, bodies: dict[str, dict]) -> InputError:
        missing = len(bodies.keys() - self.cache.replies.keys())
        spent = f"{self.cache.usd:.4f} USD of --budget {self.o.budget:g} are spent"
        problem = f"{spent}, the next reply may exceed it, and {missing} are missing"
        return self.failure(problem, "raise it and rerun the same command")

    def failure(self, problem: str, fix: str) -> InputError:
        kept = f"replies so far are in {self.cache.path}"
        return InputError(f"--judge {self.o.judge}: {problem}; {kept}; {fix}")

    # ------------------------------------------------------------------ one request, in a thread

    def wait_for_turn(self, request) -> None:
        """Wait until the rate limit allows another request."""
        with self.lock:
            time.sleep(max(0.0, self.next_start - time.monotonic()))
            if self.o.requests_per_minute:
                self.next_start = time.monotonic() + 60 / self.o.requests_per_minute

    def call(self, key: str, body: dict) -> None:
        """Send one request and cache its reply."""
        from openai import APIConnectionError, APIStatusError

        try:
            text = self.client.post("/chat/completions", body=body, cast_to=str)
            reply = read_reply(json.loads(text), body)
            reply["usd"] = self.price(reply["in"], reply["out"])
        except APIStatusError as error:
            message = one_line(error.message)
            ending = unanswerable(error.code, message)
            if not ending:
                fix = (
                    "check --judge, --base-url, --judge-request and OPENAI_API_KEY, or rerun the "
                    "same command later"
                )
                problem = f"the endpoint says {error.status_code} {message}"
                raise self.failure(problem, fix) from None
            reply = {"text": message, "finish": ending}
        except APIConnectionError as error:
            last = one_line(f"{type(error).__name__}: {error.__cause__ or error}")
            problem = f"no reply in {self.o.retries + 1} trials, the last failure was {last}"
            raise self.failure(problem, "rerun the same command later") from None
        self.cache.add({key: reply})


# ----------------------------------------------------------------------------- replies and failures


def read_reply(answer, body: dict) -> dict:
    """The fields of EMPTY from a chat completion. Raises ValueError if it is not one.

    finish: as reported, or "refusal". Counts of tokens are estimated where the endpoint gives none.
    """
    if not isinstance(answer, dict) or "choices" not in answer:
        raise ValueError(f"not a chat completion: {str(answer)[:200]}")
    choice = (answer["choices"] or [None])[0] or {}
    message = choice.get("message") or {}

    # the text, which some send in parts
    refusal = message.get("refusal")
    text = message.get("content") or refusal or ""
    if isinstance(text, list):
        text = "".join(part.get("text") or "" for part in text)
    if not isinstance(text, str):
        raise ValueError(f"no text in the reply: {str(text)[:200]}")
    finish = "refusal" if refusal else choice.get("finish_reason") or "no choice"

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
    """The text without unpaired surrogates, which can be sent but not written."""
    return text.encode(errors="replace").decode()


def one_line(text: str) -> str:
    """The start of a text on one line, without the key, which endpoints like to repeat."""
    if api_key():
        text = text.replace(api_key(), "***")
    return " ".join(text.split())[:200]


def correct_status(response) -> None:
    """Correct the status of failures that endpoints send under another: it decides on retries."""
    response.read()
    if response.is_success:
        try:
            read_reply(response.json(), {"messages": []})
        except ValueError:
            response.status_code = 502  # bad gateway
    elif "insufficient_quota" in response.text:
        response.status_code = 402  # payment required


def unanswerable(code, message: str) -> str:
    """Why this request will never get a reply: content_filter, too_long; else empty."""
    if code == "content_filter":
        return "content_filter"
    if code == "context_length_exceeded" or "maximum context length" in message:
        return "too_long"
    return ""

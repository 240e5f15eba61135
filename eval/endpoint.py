"""Replies of an OpenAI-compatible endpoint, each kept the moment it arrives, and what to do when it fails.

    ledger = Ledger("verdicts.jsonl")
    Endpoint(o, ledger).fetch({key: body, ...})  ->  ledger.replies[key] = {key, text, finish, top, in, out, usd}

o: judge.JudgeOptions. Failures in passing (429, 408, 5xx, time-outs, connections cut, bodies that are no JSON) are tried again
after a pause that doubles, or as long as the endpoint asks; any other (400, 401, 403, 404, a quota used up) stops at once.
Either way what was paid for is in the ledger. The budget counts what the endpoint reports; a reply lost on its way is not seen.
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

from data import InputError

FIELDS = ("key", "text", "finish", "top", "in", "out", "usd")


class Ledger:
    """Replies by key, and their file: one line each, appended at once."""

    def __init__(self, path: Path):
        """Read what earlier runs paid for. A last line that a kill cut in half is dropped."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.replies, self.lock = path, {}, threading.Lock()
        whole, newline, half = (path.read_bytes() if path.is_file() else b"").rpartition(b"\n")
        if half:
            os.truncate(path, len(whole + newline))
        for number, line in enumerate(whole.split(b"\n") if whole else (), 1):
            try:
                reply = json.loads(line)
                self.replies[reply["key"]] = {name: reply[name] for name in FIELDS}
            except (ValueError, KeyError, TypeError):
                raise InputError(
                    f"{path}: line {number} is no reply; remove the line, it will be asked for again"
                ) from None
        self.usd = sum(reply["usd"] for reply in self.replies.values())

    def record(
        self,
        key: str,
        text: str,
        finish: str,
        top: dict | None,
        n_in: int,
        n_out: int,
        usd: float = 0.0,
    ) -> None:
        reply = {
            "key": key,
            "text": text,
            "finish": finish,
            "top": top,
            "in": n_in,
            "out": n_out,
            "usd": usd,
        }
        with (
            self.lock,
            open(self.path, "ab", buffering=0) as file,
        ):  # one write, so that nothing is left to flush
            file.write(json.dumps(reply).encode() + b"\n")
            self.replies[key] = reply
            self.usd += usd


def address(o) -> str:
    """Where the endpoint is; empty for OpenAI's own."""
    return o.base_url or os.environ.get("OPENAI_BASE_URL", "")


def api_key() -> str:
    return os.environ.get(
        "OPENAI_API_KEY", ""
    ).strip()  # with a newline at its end, errors would quote it


def hidden(text: str) -> str:
    """A text on one line without the key, which endpoints like to repeat."""
    return " ".join((text.replace(api_key(), "***") if api_key() else text).split())[:200]


def connect(o):
    """(the openai package, a client of it); InputError where package or key is missing. Nothing is asked."""
    try:
        import openai
    except ImportError:
        raise InputError(
            f"judge {o.judge}: no such directory, and a judge behind an endpoint needs the openai package: "
            "pip install -r requirements-eval.txt"
        ) from None
    if not api_key() and not address(o):
        raise InputError(
            f"judge {o.judge}: no such directory; for an endpoint set OPENAI_API_KEY, or with OPENAI_BASE_URL "
            "or --base-url the address of one that wants no key"
        )
    return openai, openai.OpenAI(
        api_key=api_key() or "none",
        base_url=address(o) or None,
        timeout=o.request_timeout,
        max_retries=0,
    )


class Endpoint:
    def __init__(self, o, ledger: Ledger):
        self.o, self.ledger, (self.openai, self.client) = o, ledger, connect(o)
        self.lock, self.stopped = threading.Lock(), threading.Event()
        self.next, self.problem = (
            0.0,
            "",
        )  # when a request may start, by time.monotonic(); the last failure, for the bar

    def fetch(self, bodies: dict[str, dict], known: int = 0) -> None:
        """Ask for every body, some at a time. When something stops that, replies under way are still waited for and kept.

        known: replies that the caller has besides, for the bar.
        """
        waiting, running = deque(bodies.items()), {}
        self.stopped.clear()
        with (
            tqdm(
                desc=f"judge {self.o.judge}",
                total=known + len(waiting),
                initial=known,
                unit=" replies",
                leave=False,
            ) as bar,
            ThreadPoolExecutor(self.o.concurrency) as pool,
        ):
            try:
                while running or waiting:
                    while (
                        waiting
                        and len(running) < self.o.concurrency
                        and self.affords(waiting[0][1], running)
                    ):
                        key, body = waiting.popleft()
                        running[pool.submit(self.call, key, body)] = self.dearest(body)
                    if not running:
                        raise InputError(
                            f"--budget {self.o.budget:g}: {self.ledger.usd:.4f} USD are spent, the next reply may exceed it; "
                            f"{len(self.ledger.replies)} replies are kept in {self.ledger.path}, {len(waiting)} are missing: "
                            "give more, and run the same command again"
                        )
                    for future in wait(running, timeout=5, return_when=FIRST_COMPLETED).done:
                        del running[future]
                        future.result()  # raises what stopped it
                        bar.update()
                    bar.set_postfix_str(f"{self.ledger.usd:.4f} USD {self.problem[:40]}")
            finally:
                self.stopped.set()  # who pauses before another trial gives up; the pool waits for replies under way

    def dearest(self, body: dict) -> float:
        """USD that a request costs at most: of English a token is about 4 bytes, here 3."""
        n_in = len(json.dumps(body["messages"], ensure_ascii=False).encode()) / 3
        return self.price(
            n_in, body.get("max_tokens") or body.get("max_completion_tokens") or self.o.judge_tokens
        )

    def price(self, n_in: float, n_out: float) -> float:
        return (n_in * self.o.price_in + n_out * self.o.price_out) / 1e6

    def affords(self, body: dict, running: dict) -> bool:
        return (
            not self.o.budget
            or self.ledger.usd + sum(running.values()) + self.dearest(body) <= self.o.budget
        )

    def take_turn(self) -> None:
        """Wait until the rate limit, or the endpoint's own wish, lets another request start."""
        with self.lock:
            start = max(self.next, time.monotonic())
            self.next = start + (
                60 / self.o.requests_per_minute if self.o.requests_per_minute else 0
            )
        if self.stopped.wait(max(0.0, start - time.monotonic())):
            raise InputError(f"--judge {self.o.judge}: stopped")

    def call(self, key: str, body: dict) -> None:
        """One request, tried until it is answered, and its reply recorded. Runs in a thread."""
        openai, o, kept = self.openai, self.o, f"what was answered is kept in {self.ledger.path}"
        fields = {name: value for name, value in body.items() if name not in ("model", "messages")}
        for trial in range(o.retries + 1):
            self.take_turn()
            pause = min(60, 2**trial) * random.uniform(
                0.5, 1
            )  # jitter: or all would come back at once
            try:
                raw = self.client.chat.completions.with_raw_response.create(
                    model=body["model"], messages=body["messages"], extra_body=fields
                )
                reply = read_reply(json.loads(raw.http_response.text), body)
                return self.ledger.record(key, *reply, self.price(*reply[-2:]))
            except openai.APIStatusError as error:
                status, said = error.status_code, hidden(str(error.message))
                if unsaid := unanswerable(error.code, said):
                    return self.ledger.record(key, said, unsaid, None, 0, 0)
                self.problem = f"{status} {said}"
                if error.code == "insufficient_quota" or not (
                    status in (408, 409, 425, 429) or status >= 500
                ):
                    raise InputError(
                        f"--judge {o.judge}: the endpoint says {self.problem}; mend --judge, --base-url, "
                        f"--judge-request or OPENAI_API_KEY; {kept}"
                    ) from None
                if asked := retry_after(error.response.headers):
                    pause = 0.0
                    with self.lock:  # it is meant for all requests; take_turn() waits
                        self.next = max(self.next, time.monotonic() + asked)
            except (
                openai.APIConnectionError,
                ValueError,
            ) as error:  # ValueError: no JSON, or no completion
                self.problem = hidden(f"{type(error).__name__}: {error.__cause__ or error}")
            if trial < o.retries:
                self.stopped.wait(pause)
        raise InputError(
            f"--judge {o.judge}: no answer in {o.retries + 1} trials, at last {self.problem}; {kept}: "
            "run the same command again later"
        )


def read_reply(answer, body: dict) -> tuple[str, str, dict | None, int, int]:
    """(text, finish, top, tokens in, tokens out) of a chat completion; ValueError if it is none.

    finish: as reported, or "refusal"; top: log-prob by token, for the first token's alternatives.
    """
    if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
        raise ValueError(f"no chat completion: {str(answer)[:200]}")
    choice = (answer["choices"] or [None])[0] or {}
    message, usage = choice.get("message") or {}, answer.get("usage") or {}
    text = message.get("content") or message.get("refusal") or ""
    if isinstance(text, list):  # of parts
        text = "".join(part.get("text") or "" for part in text if isinstance(part, dict))
    if not isinstance(text, str):
        raise ValueError(f"no text in the reply: {str(text)[:200]}")
    text = text.encode(
        errors="replace"
    ).decode()  # half a surrogate pair can be sent, but not written
    finish = "refusal" if message.get("refusal") else choice.get("finish_reason") or "no choice"
    tokens = (choice.get("logprobs") or {}).get("content") or [{}]
    top = {
        str(t["token"]).encode(errors="replace").decode(): t["logprob"]
        for t in tokens[0].get("top_logprobs") or ()
        if isinstance(t["logprob"], int | float)
    } or None
    size = len(json.dumps(body["messages"])) // 4  # where the endpoint counts nothing
    return (
        text,
        finish,
        top,
        usage.get("prompt_tokens") or size,
        usage.get("completion_tokens") or len(text) // 4,
    )


def unanswerable(code, said: str) -> str:
    """How a reply ends that one request alone will never get: refused by a filter, or too long; else an empty text."""
    if code == "content_filter":
        return "content_filter"
    return (
        "too_long" if code == "context_length_exceeded" or "maximum context length" in said else ""
    )


def retry_after(headers) -> float:
    """Seconds that the endpoint asks to wait, given as a number or as a date; 0 where it does not say."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        try:
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
        except ValueError:
            return 0.0

"""A judge's endpoint for tests: speaks the protocol of /v1/chat/completions, and fails in the ways that real ones do.

with Stub(lambda body: "[[A>B]]", faults=["429", "cut"]) as stub:  # the first two requests fail, all others are answered
    judge = Judge(JudgeOptions(judge="stub", base_url=stub.url), Common(), tmp_path)
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from data import digest

TOKENS_IN, TOKENS_OUT = 100, 10  # that every reply reports


def completion(
    content: str | None = None,
    refusal: str | None = None,
    finish: str = "stop",
    top: dict | None = None,
) -> dict:
    """The body of an answer; top: log-prob by token for the first token."""
    logprobs = (
        {
            "content": [
                {
                    "token": content,
                    "logprob": -0.1,
                    "top_logprobs": [
                        {"token": token, "logprob": logp} for token, logp in top.items()
                    ],
                }
            ]
        }
        if top
        else None
    )
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "stub",
        "choices": [
            {
                "index": 0,
                "finish_reason": finish,
                "logprobs": logprobs,
                "message": {"role": "assistant", "content": content, "refusal": refusal},
            }
        ],
        "usage": {
            "prompt_tokens": TOKENS_IN,
            "completion_tokens": TOKENS_OUT,
            "total_tokens": TOKENS_IN + TOKENS_OUT,
        },
    }


def error(message: str, code: str | None = None) -> dict:
    return {"error": {"message": message, "type": "error", "param": None, "code": code}}


# name -> (status, headers, body); what has no answer at all is in Stub.serve
FAULTS = {
    "429": (429, {}, error("slow down", "rate_limit_exceeded")),
    "429 after 7": (429, {"Retry-After": "7"}, error("slow down", "rate_limit_exceeded")),
    "500": (500, {}, error("oops")),
    "503": (503, {}, b"<html>unavailable</html>"),
    "invalid JSON": (200, {}, b'{"choices": [{"mess'),
    "error with 200": (200, {}, error("upstream failed")),
    "400": (400, {}, error("no such field")),
    "401": (401, {}, error("bad key", "invalid_api_key")),
    "403": (403, {}, error("no access")),
    "404": (404, {}, error("no such model", "model_not_found")),
    "quota": (429, {}, error("you exceeded your quota", "insufficient_quota")),
    "refusal": (200, {}, completion(refusal="I will not say [[A>B]] here.")),
    "content filter": (200, {}, completion("[[A>B", finish="content_filter")),
    "filter with 400": (400, {}, error("filtered", "content_filter")),
    "too long": (
        400,
        {},
        error("This model's maximum context length is 8 tokens.", "context_length_exceeded"),
    ),
    "empty": (200, {}, completion("")),
    "null": (200, {}, completion(None)),
    "no choices": (200, {}, {**completion(), "choices": []}),
    "nonsense": (200, {}, completion("Both are fine.")),
    "null choice": (200, {}, {**completion(), "choices": [None]}),
    "half a pair": (200, {}, completion("Hm \ud83d")),
    "parts": (
        200,
        {},
        completion([{"type": "text", "text": "Both are"}, {"type": "image"}, {"text": " fine."}]),
    ),
    "null usage": (
        200,
        {},
        {**completion("Hm."), "usage": {"prompt_tokens": None, "completion_tokens": None}},
    ),
    "null log-prob": (200, {}, completion("Hm.", top={"\ud83d": -0.1, "m": None})),
    "number": (200, {}, completion(7)),
    "key": (401, {}, error("no key sk-not-to-be-written is known", "invalid_api_key")),
}
IN_PASSING = [
    "429",
    "500",
    "503",
    "invalid JSON",
    "number",
    "error with 200",
    "cut",
    "drop",
    "timeout",
]
FOR_GOOD = ["400", "401", "403", "404", "quota"]
UNREADABLE = [
    "refusal",
    "content filter",
    "filter with 400",
    "empty",
    "null",
    "no choices",
    "nonsense",
    "null choice",
    "half a pair",
    "parts",
    "null usage",
    "null log-prob",
]


class Stub:
    def __init__(
        self,
        reply: Callable[[dict], str | dict] = lambda body: "[[A=B]]",
        faults=(),
        hold_after: int | None = None,
        clock=time.monotonic,
        inside=lambda: None,
    ):
        """reply: body -> text or completion; faults: names, of the first requests, or a function body -> name or "".

        hold_after: requests after so many answers are never answered; inside: called while a request is being answered.
        """
        self.reply, self.hold_after, self.clock, self.inside = reply, hold_after, clock, inside
        self.faults = faults if callable(faults) else iter(list(faults))
        self.bodies, self.times, self.keys = [], [], set()  # of all requests
        self.paid, self.lock, self.closing = Counter(), threading.Lock(), threading.Event()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            log_message = lambda *args: None  # noqa: E731

            def do_POST(self):
                stub.serve(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        return self

    def __exit__(self, *exc):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def serve(self, handler, body: dict) -> None:
        assert handler.path == "/v1/chat/completions", handler.path
        with self.lock:
            self.bodies.append(body)
            self.times.append(self.clock())
            self.keys.add(handler.headers["Authorization"])
            fault = self.faults(body) if callable(self.faults) else next(self.faults, "")
            held = (
                not fault and self.hold_after is not None and self.paid.total() >= self.hold_after
            )
            if not fault and not held:
                self.paid[digest(body)] += 1
        if held or fault == "timeout":
            self.closing.wait()
        if held or fault in ("timeout", "drop"):
            handler.close_connection = True
            return
        self.inside()
        if fault == "429 date":
            status, headers, answer = (
                429,
                {"Retry-After": formatdate(time.time() + 30, usegmt=True)},
                error("slow down"),
            )
        elif fault and fault != "cut":
            status, headers, answer = FAULTS[fault]
        else:
            answer = self.reply(body)
            status, headers, answer = (
                200,
                {},
                completion(answer) if isinstance(answer, str) else answer,
            )
        raw = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        handler.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(raw)),
            **headers,
        }.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(raw[: len(raw) // 2] if fault == "cut" else raw)
        handler.close_connection = handler.close_connection or fault == "cut"


def always_first(body: dict) -> str | dict:
    """The judge that prefers whatever stands first, in either form."""
    return completion("m", top={"m": -0.1, "M": -2.4}) if body.get("logprobs") else "I see. [[A>B]]"


def longer_is_better(body: dict) -> str:
    """The judge that prefers the longer answer, much if it is twice as long."""
    text = body["messages"][-1]["content"]
    marks = (
        ("# Answer m\n", "\n\n# Answer M\n", "\n\n# Task")
        if "# Answer m\n" in text
        else ("# Answer of assistant A\n", "\n\n# Answer of assistant B\n", None)
    )
    a, b = text.split(marks[0])[1].split(marks[1])
    a, b = len(a), len(b.split(marks[2])[0] if marks[2] else b)
    if marks[2]:
        return "m" if a > b else "M"
    return "Longer: " + (
        "[[A=B]]"
        if a == b
        else "[[A>>B]]"
        if a >= 2 * b
        else "[[A>B]]"
        if a > b
        else "[[B>>A]]"
        if b >= 2 * a
        else "[[B>A]]"
    )

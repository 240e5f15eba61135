"""A judge's endpoint for tests: speaks /v1/chat/completions, and fails as real ones do.

Here the first two requests fail, and all others are answered:

    with Stub(lambda body: "[[A>B]]", faults=["429", "cut"]) as stub:
        judge = Judge(JudgeOptions(judge="stub", base_url=stub.url), tmp_path)
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from plumbing.files import digest

TOKENS_IN = 100  # that every reply reports
TOKENS_OUT = 10


def completion(
    content: str | None = None,
    refusal: str | None = None,
    finish: str = "stop",
    top: dict | None = None,
) -> dict:
    """The body of an answer; top: log-prob by token for the first token."""
    logprobs = None
    if top:
        alternatives = [{"token": token, "logprob": logp} for token, logp in top.items()]
        first = {"token": content, "logprob": -0.1, "top_logprobs": alternatives}
        logprobs = {"content": [first]}
    choice = {
        "index": 0,
        "finish_reason": finish,
        "logprobs": logprobs,
        "message": {"role": "assistant", "content": content, "refusal": refusal},
    }
    usage = {
        "prompt_tokens": TOKENS_IN,
        "completion_tokens": TOKENS_OUT,
        "total_tokens": TOKENS_IN + TOKENS_OUT,
    }
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "stub",
        "choices": [choice],
        "usage": usage,
    }


def error(message: str, code: str | None = None) -> dict:
    return {"error": {"message": message, "type": "error", "param": None, "code": code}}


LIMITED = error("slow down", "rate_limit_exceeded")
TOO_LONG = error("This model's maximum context length is 8 tokens.", "context_length_exceeded")
NO_USAGE = {"usage": {"prompt_tokens": None, "completion_tokens": None}}
PARTS = [{"type": "text", "text": "Both are"}, {"type": "image"}, {"text": " fine."}]
# name -> (status, headers, body); what gets no answer at all is in Stub.serve
FAULTS = {
    "429": (429, {}, LIMITED),
    "429 after 7": (429, {"Retry-After": "7"}, LIMITED),
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
    "too long": (400, {}, TOO_LONG),
    "empty": (200, {}, completion("")),
    "null": (200, {}, completion(None)),
    "no choices": (200, {}, {**completion(), "choices": []}),
    "nonsense": (200, {}, completion("Both are fine.")),
    "null choice": (200, {}, {**completion(), "choices": [None]}),
    "half a pair": (200, {}, completion("Hm \ud83d")),
    "parts": (200, {}, completion(PARTS)),
    "null usage": (200, {}, {**completion("Hm."), **NO_USAGE}),
    "null log-prob": (200, {}, completion("Hm.", top={"\ud83d": -0.1, "m": None})),
    "number": (200, {}, completion(7)),
    "key": (401, {}, error("no key sk-not-to-be-written is known", "invalid_api_key")),
}
TRANSIENT = "429,500,503,invalid JSON,number,error with 200,cut,drop,timeout".split(",")
PERMANENT = "400,401,403,404,quota".split(",")
UNREADABLE = (
    "refusal,content filter,filter with 400,empty,null,no choices,nonsense,null choice,"
    "half a pair,parts,null usage,null log-prob"
).split(",")


def draw(body: dict) -> str:
    return "[[A=B]]"


def nothing() -> None:
    pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.stub.serve(self, json.loads(body))


class Stub:
    def __init__(
        self,
        reply: Callable[[dict], str | dict] = draw,
        faults=(),
        hold_after: int | None = None,
        clock=time.monotonic,
        inside=nothing,
    ):
        """reply: body -> text or completion. inside: called while a request is answered.

        faults: names, of the first requests, or a function body -> name or "".
        hold_after: requests after this many answers are never answered.
        """
        self.reply = reply
        self.faults = faults if callable(faults) else iter(list(faults))
        self.hold_after = hold_after
        self.clock = clock
        self.inside = inside

        # of all requests
        self.bodies = []
        self.times = []
        self.keys = set()
        self.paid = Counter()

        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.stub = self
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        often = {"poll_interval": 0.01}
        threading.Thread(target=self.server.serve_forever, kwargs=often, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def serve(self, handler: Handler, body: dict) -> None:
        assert handler.path == "/v1/chat/completions", handler.path
        fault, held = self.record(body, handler.headers["Authorization"])
        if held or fault == "timeout":
            self.closing.wait()
        if held or fault in ("timeout", "drop"):
            handler.close_connection = True
            return
        self.inside()
        self.send(handler, *self.answer(body, fault), fault == "cut")

    def record(self, body: dict, key: str) -> tuple[str, bool]:
        """(the request's fault or "", whether it is never answered)."""
        with self.lock:
            self.bodies.append(body)
            self.times.append(self.clock())
            self.keys.add(key)
            fault = self.faults(body) if callable(self.faults) else next(self.faults, "")
            limited = self.hold_after is not None and self.paid.total() >= self.hold_after
            held = not fault and limited
            if not fault and not held:
                self.paid[digest(body)] += 1
        return fault, held

    def answer(self, body: dict, fault: str) -> tuple[int, dict, dict | bytes]:
        if fault == "429 date":
            later = formatdate(time.time() + 30, usegmt=True)
            return 429, {"Retry-After": later}, error("slow down")
        if fault and fault != "cut":
            return FAULTS[fault]
        answer = self.reply(body)
        if isinstance(answer, str):
            # a reply to a request for one token ends by its limit, as real endpoints say
            answer = completion(answer, finish="length" if body.get("max_tokens") == 1 else "stop")
        return 200, {}, answer

    def send(self, handler: Handler, status: int, headers: dict, answer, cut: bool) -> None:
        raw = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        fixed = {"Content-Type": "application/json", "Content-Length": str(len(raw))}
        handler.send_response(status)
        for name, value in {**fixed, **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(raw[: len(raw) // 2] if cut else raw)
        handler.close_connection = handler.close_connection or cut


# ---------------------------------------------------------------------------------- judges


def always_first(body: dict) -> str | dict:
    """The judge that prefers whatever stands first, in either form."""
    if body.get("logprobs"):
        return completion("m", finish="length", top={"m": -0.1, "M": -2.4})
    return "I see. [[A>B]]"


def longer_is_better(body: dict) -> str:
    """The judge that prefers the longer answer, much if it is twice as long."""
    text = body["messages"][-1]["content"]
    if "# Answer m\n" in text:
        rest = text.split("# Answer m\n")[1].split("\n\n# Task")[0]
        a, b = map(len, rest.split("\n\n# Answer M\n"))
        return "m" if a > b else "M"
    rest = text.split("# Answer of assistant A\n")[1]
    a, b = map(len, rest.split("\n\n# Answer of assistant B\n"))
    if a == b:
        return "Longer: [[A=B]]"
    much = ">>" if max(a, b) >= 2 * min(a, b) else ">"
    return f"Longer: [[A{much}B]]" if a > b else f"Longer: [[B{much}A]]"

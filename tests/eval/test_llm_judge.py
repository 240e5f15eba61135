"""The judge: failures, what is paid for once, both orders, verdicts, the budget, a local model."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch.distributed
from conftest import ROOT, last_json, read_rows, tiny_checkpoint, write_rows
from stub import (
    PERMANENT,
    TOKENS_IN,
    TOKENS_OUT,
    TRANSIENT,
    UNREADABLE,
    Stub,
    always_first,
    completion,
    longer_is_better,
)

from plumbing.files import InputError, digest
from plumbing.options import RunOptions
from sample import SampleOptions, generate
from scorers import llm_judge, openai_api
from scorers.base import score_pairs
from scorers.endpoint import endpoint
from scorers.llm_judge import (
    Judge,
    JudgeOptions,
    Request,
    fill_in,
    load_prompt,
    pairwise,
    read_choice,
    read_verdict,
    to_messages,
)
from scorers.load import load_scorer

pytest.importorskip(
    "openai", reason="needs the openai package: pip install -r requirements-eval.txt"
)
FP32 = RunOptions(dtype="float32")
PRICES = {"price_in": 10.0, "price_out": 30.0}
COST = (TOKENS_IN * 10 + TOKENS_OUT * 30) / 1e6


class Clock:
    """Time that passes only while somebody sleeps: a stand-in for the module `time`."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def time(self):
        return time.time()

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """No real pauses, and a key."""
    clock = Clock()
    monkeypatch.setattr("openai._base_client.time", clock)
    monkeypatch.setattr(openai_api, "time", clock)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-to-be-written")
    return clock


def options(stub: Stub, **changes) -> JudgeOptions:
    defaults = {
        "run": FP32,
        "judge": "stub",
        "base_url": stub.url,
        "concurrency": 1,
        "request_timeout": 60.0,
    }
    return JudgeOptions(**{**defaults, **changes})


def local(model, **changes) -> JudgeOptions:
    return JudgeOptions(**{"run": FP32, "judge": str(model), "judge_tokens": 12, **changes})


def requests(n: int, more: str = "") -> list[Request]:
    return [Request([{"role": "user", "content": f"Question {i}?{more}"}]) for i in range(n)]


def letters(n: int) -> list[Request]:
    """Requests for one letter: what the tiny model writes to its limit may be a verdict."""
    return [replace(request, choice=True) for request in requests(n)]


def ask(stub: Stub, out, n: int = 3, **changes) -> list:
    return Judge(options(stub, **changes), out).ask(requests(n), read_verdict)


def content(body: dict) -> str:
    return body["messages"][-1]["content"]


def numbered(body: dict) -> str:
    """A verdict that tells which request it answers."""
    return ("[[A>>B]]", "[[A>B]]", "[[B>A]]")[int(content(body)[9]) % 3]


NUMBERED = [1.0, 0.75, 0.25]


def only(fault: str, number: int):
    """The fault for one request, by its number."""
    return lambda body: fault if f"{number}?" in content(body) else ""


# ---------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_transient_failure_is_retried_and_the_right_reply_kept(fault, tmp_path):
    limit = 0.5 if fault == "timeout" else 60.0
    with Stub(numbered, faults=["", fault, fault]) as stub:
        assert ask(stub, tmp_path, request_timeout=limit) == NUMBERED
    asked = [content(body)[9] for body in stub.bodies]
    slow = fault == "timeout" and asked.count("1") > 3  # on a slow machine
    assert asked.count("1") == 3 or slow
    assert asked == sorted(asked)
    assert {*asked} == {"0", "1", "2"}
    again = stub.bodies[2:4]
    assert all(body == stub.bodies[1] for body in again), "the same request, not another attempt"


@pytest.mark.parametrize(
    ("fault", "problem"), [("500", "the endpoint says 500"), ("drop", "no reply in 3 trials")]
)
def test_what_fails_for_ever_stops_with_all_replies_kept(fault, problem, tmp_path):
    with Stub(numbered, faults=only(fault, 2)) as stub:
        message = rf"{problem}.*rerun the same command later"
        with pytest.raises(InputError, match=message) as caught:
            ask(stub, tmp_path, retries=2)
        assert "\n" not in str(caught.value)
        assert str(tmp_path / "verdicts.jsonl") in str(caught.value)
        assert len(stub.bodies) == 5
        stub.faults = iter(())
        assert ask(stub, tmp_path) == NUMBERED
    assert len(stub.bodies) == 6
    assert set(stub.paid.values()) == {1}


@pytest.mark.parametrize("fault", PERMANENT)
def test_a_permanent_failure_stops_at_once_with_one_line(fault, tmp_path):
    with Stub(numbered, faults=["", fault]) as stub:
        with pytest.raises(InputError, match=r"the endpoint says 4\d\d") as caught:
            ask(stub, tmp_path)
        assert "\n" not in str(caught.value)
        assert len(stub.bodies) == 2
        assert ask(stub, tmp_path) == NUMBERED
    assert set(stub.paid.values()) == {1}
    assert stub.paid.total() == 3


def test_replies_under_way_at_a_permanent_failure_are_kept(tmp_path):
    """Request 0 fails once the server has the others; they are answered only after that."""
    together = threading.Barrier(3)
    meet = {"inside": lambda: together.wait(60)}
    with Stub(numbered, faults=only("401", 0), **meet) as stub:
        with pytest.raises(InputError, match="401"):
            ask(stub, tmp_path, concurrency=3)
    assert len(read_rows(tmp_path / "verdicts.jsonl")) == 2


def pauses(stub: Stub, out, clock: Clock, **changes) -> list[float]:
    """Seconds between the requests that three right verdicts took, by a clock."""
    stub.clock = clock.monotonic
    judge = Judge(options(stub, **changes), out)
    assert judge.ask(requests(3), read_verdict) == NUMBERED
    return [b - a for a, b in zip(stub.times, stub.times[1:], strict=False)]


@pytest.mark.parametrize(("fault", "least"), [("429 after 7", 7), ("429 date", 28)])
def test_retry_after_is_respected_as_number_and_as_date(fault, least, tmp_path, clock):
    with Stub(numbered, faults=["", fault]) as stub:
        first, second, *_ = pauses(stub, tmp_path, clock)
    assert second >= least > first


def test_if_the_endpoint_says_how_long_there_is_no_other_pause(tmp_path, clock):
    with Stub(numbered, faults=["429 after 7"] * 6) as stub:
        assert pauses(stub, tmp_path, clock)[:6] == [7] * 6


def test_pauses_double(tmp_path, clock):
    with Stub(numbered, faults=["500"] * 8) as stub:
        waited = pauses(stub, tmp_path, clock, retries=8)
    longest = [0.5, 1, 2, 4, 8, 8, 8, 8]
    assert all(0.5 * most <= pause <= most for pause, most in zip(waited, longest, strict=False))


def test_requests_keep_to_the_rate_limit_and_retries_count(tmp_path, clock):
    with Stub(numbered, faults=["", "500"]) as stub:
        waited = pauses(stub, tmp_path, clock, requests_per_minute=12)
    assert waited == pytest.approx([5, 5, 5])


def test_as_many_requests_as_allowed_are_under_way_at_a_time(tmp_path):
    together = threading.Barrier(3)
    lock = threading.Lock()
    now = [0]
    most = [0]

    def inside():
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        together.wait(60)  # breaks, and with it the test, if fewer than three ever meet
        time.sleep(0.2)  # in which a fourth would come
        with lock:
            now[0] -= 1

    with Stub(numbered, inside=inside) as stub:
        assert ask(stub, tmp_path, n=6, concurrency=3) == NUMBERED * 2
    assert most[0] == 3


# ------------------------------------------------------------------------ replies without a verdict


@pytest.mark.parametrize("fault", UNREADABLE)
def test_a_reply_without_a_verdict_is_kept_and_asked_for_again(fault, tmp_path):
    with Stub(numbered, faults=["", fault]) as stub:
        judge = Judge(options(stub), tmp_path)
        assert judge.ask(requests(3), read_verdict) == NUMBERED
    assert judge.usage()["malformed"] == 0
    assert len(stub.bodies) == 4
    first, again = stub.bodies[1], stub.bodies[3]
    assert first["messages"] == again["messages"]
    assert first["seed"] != again["seed"]
    assert first["temperature"] == 0 < again["temperature"]
    [malformed] = read_rows(tmp_path / "verdicts.malformed.jsonl")
    assert malformed["messages"] == first["messages"]
    assert malformed["finish"]
    assert malformed["key"]


@pytest.mark.parametrize("fault", UNREADABLE)
def test_a_verdict_that_never_comes_is_counted_and_none(fault, tmp_path):
    expected = [1.0, None, 0.25]
    malformed = tmp_path / "verdicts.malformed.jsonl"
    with Stub(numbered, faults=only(fault, 1)) as stub:
        judge = Judge(options(stub, attempts=3), tmp_path)
        assert judge.ask(requests(3), read_verdict) == expected
        assert judge.usage()["malformed"] == 1
        assert len(stub.bodies) == 5
        assert len(read_rows(malformed)) == 3

        # the same command again asks nothing, and adds nothing
        again = Judge(options(stub, attempts=3), tmp_path)
        assert again.ask(requests(3), read_verdict) == expected
        assert again.usage() == judge.usage()
        assert len(stub.bodies) == 5
        assert len(read_rows(malformed)) == 3

        more = Judge(options(stub, attempts=4), tmp_path)
        stub.faults = iter(())
        assert more.ask(requests(3), read_verdict) == NUMBERED
        assert len(stub.bodies) == 6


def test_what_is_too_long_is_not_asked_for_again(tmp_path):
    with Stub(numbered, faults=only("too long", 1)) as stub:
        assert ask(stub, tmp_path) == [1.0, None, 0.25]
        assert len(stub.bodies) == 3
    malformed = read_rows(tmp_path / "verdicts.malformed.jsonl")
    assert [row["finish"] for row in malformed] == ["too_long"]


# without a verdict, and with one only among the thoughts
@pytest.mark.parametrize("text", ["Hm.", "<think>[[B>A]]</think>\nNo verdict"])
def test_a_judge_without_a_single_verdict_is_an_error(text, tmp_path):
    with Stub(lambda body: text) as stub:
        with pytest.raises(InputError, match="no verdict in any of 3 replies"):
            ask(stub, tmp_path)


# a verdict among thoughts that were cut off, among reasons that were, and before
@pytest.mark.parametrize(
    ("text", "finish"),
    [
        ("<think>Perhaps [[B>A]], but", "length"),
        ("\n<think>Perhaps [[B>A]], but", "stop"),
        ("Which is [[B>A]] if length counts. As it", "length"),
        ("<think>[[B>A]]</think> Both are", "length"),
    ],
)
def test_a_reply_cut_off_is_no_verdict_and_asked_for_again(text, finish, tmp_path):
    def reply(body: dict) -> str | dict:
        first = "1?" in content(body) and body["temperature"] == 0
        return completion(text, finish=finish) if first else numbered(body)

    with Stub(reply) as stub:
        assert ask(stub, tmp_path) == NUMBERED
    assert [content(body)[9] for body in stub.bodies] == ["0", "1", "2", "1"]
    assert stub.bodies[1]["seed"] != stub.bodies[3]["seed"]
    [malformed] = read_rows(tmp_path / "verdicts.malformed.jsonl")
    assert (malformed["text"], malformed["finish"]) == (text, finish)

    # the last attempt is cut off too: None, and counted
    def cut(body: dict) -> str | dict:
        return completion(text, finish=finish) if "1?" in content(body) else numbered(body)

    with Stub(cut) as stub:
        judge = Judge(options(stub), tmp_path / "cut")
        assert judge.ask(requests(3), read_verdict) == [1.0, None, 0.25]
        assert judge.usage()["malformed"] == 1
        assert len(stub.bodies) == 2 + judge.o.attempts


def test_reasons_may_name_the_tag_of_thoughts(tmp_path):
    with Stub(lambda body: "A has a stray <think>. [[B>A]]") as stub:
        assert ask(stub, tmp_path) == [0.25] * 3
        assert len(stub.bodies) == 3


def test_one_letter_ends_at_its_limit_and_is_a_verdict(tmp_path):
    """As an endpoint replies to a request for one token: it ends by length."""

    def letter(body: dict) -> dict:
        assert body["max_tokens"] == 1
        return completion("m", finish="length", top={"m": math.log(0.9), "M": math.log(0.1)})

    with Stub(letter) as stub:
        values = Judge(options(stub), tmp_path / "a").ask(letters(2), read_choice)
        assert values == pytest.approx([0.9, 0.9])
        assert len(stub.bodies) == 2

    # a reasoning model's only token opens its thoughts: its log-probs say nothing of the letter
    thoughts = {"<think>": -0.01, "m": -9.0}
    with Stub(lambda body: completion("<think>", finish="length", top=thoughts)) as stub:
        with pytest.raises(InputError, match="no verdict in any of 2 replies"):
            Judge(options(stub), tmp_path / "b").ask(letters(2), read_choice)
        assert len(stub.bodies) == 2 * 3


# ---------------------------------------------------------------------------------- paid once


def test_nothing_is_paid_for_twice(tmp_path):
    with Stub(numbered) as stub:
        assert ask(stub, tmp_path, n=3) == NUMBERED
        assert len(stub.bodies) == 3
        assert ask(stub, tmp_path, n=5) == (NUMBERED * 2)[:5]
        assert len(stub.bodies) == 5
        twice = Judge(options(stub), tmp_path).ask(requests(3) * 2, read_verdict)
        assert twice == NUMBERED * 2
        assert len(stub.bodies) == 5

        # the judge, its options and the seed decide too
        for change in ({"judge": "another"}, {"judge_tokens": 7}, {"run": replace(FP32, seed=1)}):
            asked = len(stub.bodies)
            ask(stub, tmp_path, **change)
            assert len(stub.bodies) == asked + 3
    assert stub.keys == {"Bearer sk-not-to-be-written"}
    assert not any("sk-not" in path.read_text() for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("form", "key"), [("choice", "b2b8737930bd1a99"), ("verdict", "39806927ee2f117f")]
)
def test_keys_of_cached_replies_stay_the_same(form, key, tmp_path, monkeypatch):
    """Users have paid for cached verdicts: neither prompt, request nor hash may change."""
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    judge = Judge(JudgeOptions(run=RunOptions(seed=3), judge="gpt-x"), tmp_path)
    asked = []

    def keep(requests, read):
        asked.extend(requests)
        return [None] * len(requests)

    monkeypatch.setattr(judge, "ask", keep)
    pairwise(judge, ["One?"], ["a b"], ["d"], form)
    assert digest(judge.body(asked[0], 0), judge.place) == key


def test_the_key_is_in_no_message(tmp_path, monkeypatch):
    with Stub(numbered, faults=["key"]) as stub:
        with pytest.raises(InputError, match=r"401 .*no key \*\*\* is known") as caught:
            ask(stub, tmp_path)
        assert "sk-not" not in str(caught.value)
        # a key with a newline, as `$(cat key.txt)` in some files leaves it
        monkeypatch.setenv("OPENAI_API_KEY", "sk-not-to-be-written\n")
        assert ask(stub, tmp_path) == NUMBERED
        assert stub.keys == {"Bearer sk-not-to-be-written"}


def test_a_name_at_another_address_is_another_judge(tmp_path):
    for verdict, value in (("[[A>>B]]", 1.0), ("[[B>>A]]", 0.0)):
        with Stub(lambda body, verdict=verdict: verdict) as stub:
            assert ask(stub, tmp_path, n=1) == [value]
            assert len(stub.bodies) == 1


def test_a_log_prob_that_is_null_is_left_out():
    answer = completion("m", top={"m": None, "M": -1.0, "\ud83d": -2.0})
    assert openai_api.read_reply(answer, {"messages": []})["top"] == {"M": -1.0, "?": -2.0}


def test_content_in_parts_is_joined(tmp_path):
    parts = [{"type": "text", "text": "I say [[A"}, {"type": "text", "text": ">B]]"}]
    with Stub(lambda body: completion(parts)) as stub:
        assert ask(stub, tmp_path, n=1) == [0.75]


def test_a_half_written_last_line_is_dropped_and_asked_for_again(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    with Stub(numbered) as stub:
        ask(stub, tmp_path)
        whole = path.read_bytes()
        last = whole.rindex(b"\n", 0, -1) + 2
        for kept in (len(whole) - 1, len(whole) - 9, last, 5):  # with 5 no whole line is left
            path.write_bytes(whole[:kept])
            asked = len(stub.bodies)
            assert ask(stub, tmp_path) == NUMBERED
            assert len(stub.bodies) - asked == (3 if kept == 5 else 1)
            assert len(read_rows(path)) == 3


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    with Stub(numbered) as stub:
        ask(stub, tmp_path)
        lines = path.read_text().splitlines()
        path.write_text("\n".join([lines[0], lines[1][:20], lines[2]]) + "\n")
        with pytest.raises(InputError, match=r"verdicts.jsonl: line 2 is not a reply"):
            ask(stub, tmp_path)


def start(stub: Stub, out) -> subprocess.Popen:
    """A process that asks for 6 verdicts, two at a time."""
    code = f"""
from plumbing.ranks import distributed
from scorers.llm_judge import Judge, JudgeOptions, Request, read_verdict

requests = [Request([{{"role": "user", "content": f"Question {{i}}?"}}]) for i in range(6)]
with distributed():
    o = JudgeOptions(judge="stub", base_url={stub.url!r}, concurrency=2)
    print(Judge(o, {str(out)!r}).ask(requests, read_verdict))
"""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


@pytest.mark.slow
def test_after_a_kill_nothing_answered_is_paid_for_again(tmp_path):
    with Stub(numbered, hold_after=3) as stub:
        process = start(stub, tmp_path)
        # three answered, two under way
        while len(stub.bodies) < 5 or len(read_rows(tmp_path / "verdicts.jsonl")) < 3:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        stub.hold_after = None
        process = start(stub, tmp_path)
        assert process.communicate()[0] == f"{NUMBERED * 2}\n"
        assert stub.paid.total() == 6
        assert set(stub.paid.values()) == {1}
        assert len(stub.bodies) == 8


# ---------------------------------------------------------------------------------- the budget


def test_the_budget_stops_before_it_is_exceeded_and_more_resumes(tmp_path):
    with Stub(numbered) as stub:
        limits = {"judge_tokens": 20, **PRICES}
        max_cost = (len(json.dumps(requests(1)[0].messages)) / 3 * 10 + 20 * 30) / 1e6
        for affordable in (2, 4):
            # the next one might still be paid for, but might cost more
            budget = affordable * COST + max_cost - 1e-9
            with pytest.raises(InputError, match="rerun the same command") as caught:
                ask(stub, tmp_path, n=6, budget=budget, **limits)
            assert "\n" not in str(caught.value)
            assert f"{6 - affordable} are missing" in str(caught.value)
            assert stub.paid.total() == affordable
            assert set(stub.paid.values()) == {1}
            assert affordable * COST <= budget
        judge = Judge(options(stub, budget=1.0, **limits), tmp_path)
        assert judge.ask(requests(6), read_verdict) == NUMBERED * 2
        assert stub.paid.total() == 6
        cost = pytest.approx(6 * COST)
        assert judge.usage() == {"malformed": 0, "judge_replies": 6, "judge_usd": cost}


def test_the_budget_holds_with_many_requests_under_way(tmp_path):
    with Stub(numbered) as stub:
        limits = {"budget": 3.5 * COST, "judge_tokens": TOKENS_OUT, "concurrency": 8, **PRICES}
        judge = Judge(options(stub, **limits), tmp_path)
        with pytest.raises(InputError, match="--budget"):
            # about as many tokens as the stub reports
            judge.ask(requests(6, " word" * 52), read_verdict)
        assert 0 < stub.paid.total() <= 3


# ----------------------------------------------------------------------------- verdicts and prompts


@pytest.mark.parametrize(
    ("text", "p"),
    [
        ("A is fine. [[A>>B]]", 1.0),
        ("[[A>B]]", 0.75),
        ("[[A=B]]", 0.5),
        ("[[B>A]]", 0.25),
        ("[[B>>A]]", 0.0),
        ("[[A<B]]", 0.25),
        ("[[A<<B]]", 0.0),
        ("first [[A>B]], no, [[B>>A]]", 0.0),
        ("[[ A>B ]]", 0.75),
        ("[[A]]", 1.0),
        ("[[B]]", 0.0),
        ("[[C]]", 0.5),
        ("[A>B]", None),
        ("", None),
        ("[[A>C]]", None),
        ("[[A>>>B]]", None),
    ],
)
def test_verdicts(text, p):
    assert read_verdict({"text": text}) == p


@pytest.mark.parametrize(
    ("text", "top", "p"),
    [
        ("m", None, 1.0),
        ("M", None, 0.0),
        (" M.", None, 0.0),
        ("**m**", None, 1.0),
        ("m is better", None, 1.0),
        ("Model m", None, 1.0),
        ("The better one is M!", None, 0.0),
        ("m beats M", None, None),
        ("I'm sure", None, None),
        ("my view", None, None),
        ("m's", None, None),
        ("", None, None),
        ("A", {"A": -0.1}, None),
        ("m", {"m": math.log(0.6), "M": math.log(0.2), "x": -3.0}, 0.75),
        ("M", {" m": math.log(0.1), "M": math.log(0.3)}, 0.25),
        ("m", {"m": -0.1}, 1.0),
        ("x", {"x": -0.1, "M": -5.0}, 0.0),
    ],
)
def test_choices(text, top, p):
    assert read_choice({"text": text, "top": top}) == (p if p is None else pytest.approx(p))


def test_a_text_that_contains_a_name_is_not_filled_in_again():
    texts = {"question": "{answer_a}", "answer_a": "{question}"}
    assert fill_in("{question}|{answer_a}|{x}", texts) == "{answer_a}|{question}|{x}"


def test_official_prompts_are_read_with_their_own_names_and_turns(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text(
        "<|im_start|>system\nBe fair.<|im_end|>\n<|im_start|>user\n"
        '{instruction} {"m": """{output_1}"""} {output_2}\n<|im_end|>\n'
    )
    with Stub(lambda body: "m") as stub:
        o = options(stub, judge_prompt=str(path))
        judge = Judge(o, tmp_path)
        assert pairwise(judge, ["Q"], ["a"], ["b"], "choice") == [(1.0, 0.0)]
    assert stub.bodies[0]["messages"] == [
        {"role": "system", "content": "Be fair."},
        {"role": "user", "content": 'Q {"m": """a"""} b'},
    ]
    path.write_text("{QUESTION} {ANSWER_A}")
    with pytest.raises(InputError, match=r"prompt.txt: has no place \{answer_b\}"):
        load_prompt(o, "")
    turn = {"role": "user", "content": " <|im_start|>x"}
    assert to_messages("{question}", {"question": " <|im_start|>x"}) == [turn]


# ---------------------------------------------------------------------------------- both orders

QUESTIONS = ["One?", "Two?", "Three?"]
LONG = ["a long answer here", "yes indeed", "same"]
SHORT = ["short", "no", "same"]


@pytest.mark.parametrize("form", ["choice", "verdict"])
def test_a_judge_that_prefers_what_stands_first_gives_one_half(form, tmp_path):
    with Stub(always_first) as stub:
        comparisons = pairwise(Judge(options(stub), tmp_path), QUESTIONS, LONG, SHORT, form)
    assert all(sum(pair) / 2 == pytest.approx(0.5) for pair in comparisons)
    assert comparisons[0][0] > 0.5 > comparisons[0][1]


@pytest.mark.parametrize("form", ["choice", "verdict"])
def test_both_orders_are_asked_and_turned_the_right_way(form, tmp_path):
    with Stub(longer_is_better) as stub:
        judge = Judge(options(stub), tmp_path)
        assert pairwise(judge, QUESTIONS, LONG, SHORT, form) == [(1, 1), (1, 1), (0.5, 0.5)]
        assert len(stub.bodies) == 4, "equal answers are a draw that nobody is asked about"
        first, second = (content(body) for body in stub.bodies[:2])
        assert first.index(LONG[0]) < first.index(SHORT[0])
        assert second.index(LONG[0]) > second.index(SHORT[0])
        assert pairwise(judge, QUESTIONS, SHORT, LONG, form) == [(0, 0), (0, 0), (0.5, 0.5)]
        assert len(stub.bodies) == 4, "the same two requests"


def test_a_missing_verdict_is_none_in_its_own_order(tmp_path):
    def one_order(body):
        return "?" if "assistant A\nshort" in content(body) else "[[A>>B]]"

    with Stub(one_order) as stub:
        judge = Judge(options(stub), tmp_path)
        assert pairwise(judge, ["One?"], ["long"], ["short"], "verdict") == [(1.0, None)]
        assert pairwise(judge, ["One?"], ["short"], ["long"], "verdict") == [(None, 0.0)]


def test_a_score_is_the_mean_over_both_orders_and_a_missing_verdict_a_draw(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def rows(texts):
        pairs = zip(QUESTIONS, texts, strict=True)
        return [{"id": question, "prompt": question, "response": text} for question, text in pairs]

    def reply(body):
        if "One?" in content(body):
            top = {"m": math.log(0.9), "M": math.log(0.1)}
            return completion("m", finish="length", top=top)
        return longer_is_better(body)

    with Stub(reply) as stub:
        monkeypatch.setenv("OPENAI_BASE_URL", stub.url)
        score = endpoint("stub", FP32)
        assert score(rows(LONG), rows(SHORT)) == pytest.approx([0.5, 1.0, 0.5])
        assert score(rows(SHORT), rows(LONG)) == pytest.approx([0.5, 0.0, 0.5])
        assert len(stub.bodies) == 4

    # a conversation, and no verdict in one of the orders
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    talk.append({"role": "user", "content": "Well?"})
    a = [{"id": "t", "messages": talk, "response": "short"}]
    b = [{"id": "t", "messages": talk, "response": "longest"}]

    def prefers_longest(body):
        return "M" if "longest" in content(body).split("# Answer M")[1] else "x"

    with Stub(prefers_longest) as stub:
        monkeypatch.setenv("OPENAI_BASE_URL", stub.url)
        assert endpoint("stub", FP32)(a, b) == [0.25]
    assert "user: Hi\n\nassistant: Ho\n\nuser: Well?" in content(stub.bodies[0])


def test_more_fields_of_a_request_are_sent_and_nulls_left_out(tmp_path):
    more = '{"seed": null, "top_p": 0.5, "max_completion_tokens": 9, "max_tokens": null}'
    with Stub(numbered) as stub:
        ask(stub, tmp_path, judge_request=more)
    expected = "model messages temperature top_p max_completion_tokens"
    assert set(stub.bodies[0]) == set(expected.split())


# ---------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge": ""}, "--judge: name"),
        ({"budget": 1.0}, "--budget: needs prices"),
        ({"judge_request": "[1]"}, "--judge-request: not a JSON object"),
        ({"judge_request": "{"}, "--judge-request"),
        ({"judge_prompt": "gone.txt"}, "gone.txt: no such file"),
        ({"base_url": ""}, "set OPENAI_API_KEY, or .* OPENAI_BASE_URL or --base-url"),
    ],
)
def test_wrong_options_are_errors_before_anything_is_asked(changes, message, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with Stub() as stub:
        with pytest.raises(InputError, match=message) as caught:
            Judge(options(stub, **changes), tmp_path)
        assert "\n" not in str(caught.value)
        assert not stub.bodies


def test_fields_of_requests_are_not_for_a_local_judge(tiny, tmp_path):
    with pytest.raises(InputError, match="--judge-request: only for an endpoint"):
        Judge(local(tiny, judge_request='{"top_p": 0.9}'), tmp_path)


def test_a_missing_package_is_named_with_its_fix(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=r"pip install -r requirements-eval.txt"):
        Judge(JudgeOptions(judge="gpt"), tmp_path)
    assert (ROOT / "requirements-eval.txt").is_file()


def test_a_server_without_keys_needs_none(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with Stub(numbered) as stub:
        assert ask(stub, tmp_path) == NUMBERED


# ---------------------------------------------------------------------------------- a local model


def length(reply: dict) -> float | None:
    """A stand-in for a verdict that any text has."""
    return float(len(reply["text"])) if reply["finish"] != "too_long" else None


def test_a_local_judge_writes_greedily_and_only_once(tiny, tmp_path, monkeypatch):
    o = local(tiny)
    values = Judge(o, tmp_path / "a").ask(letters(3), length)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["verdicts.jsonl"]

    # the same texts from the sampler
    rows = [{"id": str(i), "messages": r.messages} for i, r in enumerate(requests(3))]
    greedy = SampleOptions(run=FP32, temperature=0.0, max_new_tokens=16)
    generate(tiny, rows, tmp_path / "direct.jsonl", greedy, tmp_path / "scratch")
    direct = [row["response"] for row in read_rows(tmp_path / "direct.jsonl")]
    assert values == [len(text) for text in direct]
    assert len(set(direct)) > 1

    # a letter needs no more than 16 tokens; reasons, here all cut off, may have --judge-tokens
    assert max(row["out"] for row in read_rows(tmp_path / "a/verdicts.jsonl")) == 16
    with pytest.raises(InputError, match="no verdict in any of 3 replies"):
        Judge(replace(o, judge_tokens=32), tmp_path / "b").ask(requests(3), length)
    assert max(row["out"] for row in read_rows(tmp_path / "b/verdicts.jsonl")) == 32

    monkeypatch.setattr(llm_judge, "generate", lambda *_, **__: pytest.fail("was cached"))
    again = Judge(o, tmp_path / "a")
    assert again.ask(letters(3), length) == values
    assert again.usage() == {"malformed": 0, "judge_replies": 3, "judge_usd": 0}


def test_an_interrupted_local_judge_resumes(tiny, tmp_path, monkeypatch):
    """Its chunks lie beside the cache until its replies are in it, and serve no other requests."""

    def interrupted(*arguments):
        generate(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(llm_judge, "generate", interrupted)
    for n in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            Judge(local(tiny), tmp_path).ask(letters(n), length)
    assert len(list(tmp_path.glob("verdicts.*.partial"))) == 2
    monkeypatch.undo()
    expected = Judge(local(tiny), tmp_path / "other").ask(letters(3), length)
    monkeypatch.setattr("sample.Engine", lambda *_: pytest.fail("was sampled"))
    assert Judge(local(tiny), tmp_path).ask(letters(3), length) == expected


def test_a_changed_local_judge_is_asked_anew(tmp_path):
    cache = tmp_path / "a" / "verdicts.jsonl"
    model = tiny_checkpoint(tmp_path / "model")
    Judge(local(model), tmp_path / "a").ask(letters(2), length)
    tiny_checkpoint(tmp_path / "model", seed=5)
    Judge(local(model), tmp_path / "a").ask(letters(2), length)
    assert len(read_rows(cache)) == 4
    bf16 = RunOptions(dtype="bfloat16")
    Judge(local(model, run=bf16), tmp_path / "a").ask(letters(2), length)
    assert len(read_rows(cache)) == 6


@pytest.mark.parametrize("name", ["judge", "verdicts", "malformed", "sampled", "judge.sampled"])
def test_any_name_will_do_for_the_cache(name, tiny, tmp_path):
    """What is written beside it never takes its place."""
    path = tmp_path / f"{name}.jsonl"
    o = local(tiny, judge_cache=str(path), attempts=1)
    first = ""

    def none_for_the_first(reply):
        return None if reply["key"] == first else 0.5

    for n in (2, 3):
        assert Judge(o, tmp_path).ask(letters(n), none_for_the_first).count(0.5) == 2
        first = first or read_rows(path)[0]["key"]
        assert len(read_rows(path)) == n


def test_what_does_not_fit_a_local_judge_is_malformed_and_the_rest_judged(tiny, tmp_path):
    long = Request([{"role": "user", "content": "word " * 600}], choice=True)
    judge = Judge(local(tiny), tmp_path)
    values = judge.ask([*letters(1), long], length)
    assert values[0] > 0
    assert values[1] is None
    assert judge.usage()["malformed"] == 1
    malformed = read_rows(tmp_path / "verdicts.malformed.jsonl")
    assert [row["finish"] for row in malformed] == ["too_long"]


def test_a_local_judges_nonsense_is_asked_for_again_at_a_temperature(tiny, tmp_path, monkeypatch):
    asked = []

    def sampler(model, rows, out, o, scratch, purpose):
        """A verdict for all but the first, which has one at the third attempt."""
        asked.append((o.temperature, len(rows), purpose))
        answers = []
        for i, row in enumerate(rows):
            text = "[[A>B]]" if len(asked) == 3 or i else "?"
            answer = {"id": row["id"], "response": text, "finish_reason": "stop", "tokens": 1}
            answers.append(answer)
        write_rows(out, answers)

    monkeypatch.setattr(llm_judge, "generate", sampler)
    values = Judge(local(tiny), tmp_path).ask(requests(3), read_verdict)
    assert values == [0.75] * 3
    assert asked == [(0, 3, "judge 0"), (0.7, 1, "judge 1"), (0.7, 1, "judge 2")]


# ---------------------------------------------------------------------------------- many processes


def head_to_head(nproc: int, flags: dict) -> dict:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    launcher = torchrun if nproc > 1 else []
    given = [f"--{name}={value}" for name, value in flags.items()]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "eval.head_to_head", *given],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return last_json(done.stdout)


@pytest.mark.slow
@pytest.mark.ranks
def test_two_ranks_ask_no_more_than_one(tiny, tmp_path):
    questions = [{"prompt": f"Question {i}?"} for i in range(4)]
    flags = {
        "model": tiny,
        "against": tiny_checkpoint(tmp_path / "other", seed=5),
        "data": write_rows(tmp_path / "prompts.jsonl", questions),
        "judge": "stub",
        "max-new-tokens": 12,
        "dtype": "float32",
        "out": tmp_path / "out",
    }
    # what an earlier run kept must not set rank 0 apart from the others
    (tmp_path / "out").mkdir()
    earlier = [{"key": "earlier", "messages": [{"role": "user", "content": "?"}]}]
    write_rows(tmp_path / "out" / "verdicts.malformed.jsonl", earlier)
    results = []
    with Stub(longer_is_better) as stub:
        for nproc in (2, 1):
            result = head_to_head(nproc, {**flags, "base-url": stub.url})
            del result["seconds"]
            results.append(result)
            assert len(stub.bodies) == 8
    assert results[0] == results[1]
    assert results[0]["judge_replies"] == 8


# ---------------------------------------------------------------------------------- as a scorer


def test_an_endpoint_is_a_scorer_that_compares(tmp_path, monkeypatch):
    sides = []
    for text in ("long ", "x"):
        sides.append(
            [
                {"id": str(i), "prompt": f"Question {i}?", "response": text * (i + 1)}
                for i in range(3)
            ]
        )
    good, bad = sides
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with Stub(longer_is_better) as stub:
        monkeypatch.setenv("OPENAI_BASE_URL", stub.url)
        # loop.py checks on rank 0 alone, where nothing may wait for the others
        with monkeypatch.context() as alone:
            alone.setattr(
                torch.distributed,
                "broadcast_object_list",
                lambda *_, **__: pytest.fail("waits for other ranks"),
            )
            scorer = load_scorer("endpoint:stub", "", FP32)
        assert score_pairs(scorer, good, bad) == ([1, 1, 1], [0, 0, 0])
        assert len(stub.bodies) == 6, "both orders"
        again = load_scorer("endpoint:stub", "", FP32)
        assert score_pairs(again, good, bad)[0] == [1, 1, 1]
        assert score_pairs(scorer, bad, good)[0] == [0, 0, 0]
        assert len(stub.bodies) == 6, "the same comparisons"
        with pytest.raises(InputError, match="compares two answers"):
            load_scorer("endpoint:stub", "", FP32, single=True)
    with Stub(always_first) as stub:
        monkeypatch.setenv("OPENAI_BASE_URL", stub.url)
        scorer = load_scorer("endpoint:first", "", FP32)
        assert score_pairs(scorer, good, bad)[0] == pytest.approx([0.5] * 3)


def test_a_missing_key_is_an_error_when_the_scorer_is_named(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(InputError, match="set OPENAI_API_KEY"):
        load_scorer("endpoint:stub", "", FP32)

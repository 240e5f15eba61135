"""The judge: every way an endpoint fails, what is paid for once, both orders, verdicts, the budget, a local model."""

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
from conftest import ROOT, last_json, read_rows, tiny_checkpoint, write_rows

import data
from data import Common, InputError
from eval import endpoint, judge
from eval.judge import (
    Judge,
    JudgeOptions,
    Request,
    compare,
    fill,
    load_prompt,
    pairwise,
    read_choice,
    read_verdict,
    to_messages,
)
from sample import SampleOptions, sample
from stub import (
    FOR_GOOD,
    IN_PASSING,
    TOKENS_IN,
    TOKENS_OUT,
    UNREADABLE,
    Stub,
    always_first,
    completion,
    longer_is_better,
)

pytest.importorskip(
    "openai", reason="needs the openai package: pip install -r requirements-eval.txt"
)
COMMON = Common(dtype="float32")
PRICES = {"price_in": 10.0, "price_out": 30.0}
COST = (TOKENS_IN * 10 + TOKENS_OUT * 30) / 1e6


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Back-offs of milliseconds, and a key."""
    monkeypatch.setattr(endpoint.random, "uniform", lambda low, high: 0.001)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-to-be-written")


def options(stub: Stub, **changes) -> JudgeOptions:
    return JudgeOptions(
        **{
            "judge": "stub",
            "base_url": stub.url,
            "concurrency": 1,
            "request_timeout": 60.0,
            **changes,
        }
    )


def requests(n: int, more: str = "") -> list[Request]:
    return [Request([{"role": "user", "content": f"Question {i}?{more}"}]) for i in range(n)]


def ask(stub: Stub, out, n: int = 3, **changes) -> list:
    return Judge(options(stub, **changes), COMMON, out).ask(requests(n), read_verdict)


def numbered(body: dict) -> str:
    """A verdict that tells which request it answers."""
    return ("[[A>>B]]", "[[A>B]]", "[[B>A]]")[int(body["messages"][0]["content"][9]) % 3]


NUMBERED = [1.0, 0.75, 0.25]


# ---- failures ----


@pytest.mark.parametrize("fault", IN_PASSING)
def test_a_failure_in_passing_is_tried_again_and_the_right_reply_kept(fault, tmp_path):
    with Stub(numbered, faults=["", fault, fault]) as stub:
        assert ask(stub, tmp_path, request_timeout=1.0 if fault == "timeout" else 60.0) == NUMBERED
    asked = [body["messages"][0]["content"][9] for body in stub.bodies]
    assert asked.count("1") == 3 or (
        fault == "timeout" and asked.count("1") > 3
    )  # where the machine is slow
    assert asked == sorted(asked) and {*asked} == {"0", "1", "2"}
    assert all(body == stub.bodies[1] for body in stub.bodies[2:4]), (
        "the same request, not a further attempt"
    )


@pytest.mark.parametrize("fault", ["500", "drop"])
def test_failing_for_ever_stops_with_what_was_answered_kept(fault, tmp_path):
    with Stub(
        numbered, faults=lambda body: fault if "2" in body["messages"][0]["content"] else ""
    ) as stub:
        with pytest.raises(
            InputError, match=r"no answer in 3 trials.*run the same command again"
        ) as caught:
            ask(stub, tmp_path, retries=2)
        assert "\n" not in str(caught.value) and str(tmp_path / "verdicts.jsonl") in str(
            caught.value
        )
        assert len(stub.bodies) == 5
        stub.faults = iter(())
        assert ask(stub, tmp_path) == NUMBERED
    assert len(stub.bodies) == 6 and set(stub.paid.values()) == {1}


@pytest.mark.parametrize("fault", FOR_GOOD)
def test_a_failure_for_good_stops_at_once_with_one_line(fault, tmp_path):
    with Stub(numbered, faults=["", fault]) as stub:
        with pytest.raises(InputError, match=r"the endpoint says 4\d\d") as caught:
            ask(stub, tmp_path)
        assert "\n" not in str(caught.value)
        assert len(stub.bodies) == 2
        assert ask(stub, tmp_path) == NUMBERED
    assert set(stub.paid.values()) == {1} and stub.paid.total() == 3


def test_replies_under_way_when_something_fails_for_good_are_kept(tmp_path):
    """Request 0 fails once the others are in the server's hands; they are answered only after that."""
    together = threading.Barrier(3)
    with Stub(
        numbered,
        faults=lambda body: "401" if "0?" in body["messages"][0]["content"] else "",
        inside=lambda: together.wait(60),
    ) as stub:
        with pytest.raises(InputError, match="401"):
            ask(stub, tmp_path, concurrency=3)
    assert len(read_rows(tmp_path / "verdicts.jsonl")) == 2


class Clock:
    """Time that passes only where somebody waits; stands in for the module time and for an Event."""

    def __init__(self):
        self.now, self.waits = 1000.0, []

    def monotonic(self):
        return self.now

    def time(self):
        return time.time()

    def wait(self, seconds):
        self.waits.append(seconds)
        self.now += seconds
        return False

    def set(self):
        pass

    clear = set


def with_clock(stub: Stub, out, monkeypatch, **changes) -> tuple[list, Clock]:
    """Values of three requests, and the clock that they waited by."""
    stub.clock = lambda: clock.now
    clock, one = Clock(), Judge(options(stub, **changes), COMMON, out)
    monkeypatch.setattr(endpoint, "time", clock)
    one.endpoint.stopped = clock
    return one.ask(requests(3), read_verdict), clock


@pytest.mark.parametrize(("fault", "least"), [("429 after 7", 7), ("429 date", 28)])
def test_retry_after_is_respected_as_number_and_as_date(fault, least, tmp_path, monkeypatch):
    with Stub(numbered, faults=["", fault]) as stub:
        values, _ = with_clock(stub, tmp_path, monkeypatch)
    assert values == NUMBERED
    assert stub.times[2] - stub.times[1] >= least > stub.times[1] - stub.times[0]


def test_where_the_endpoint_says_how_long_there_is_no_other_pause(tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint.random, "uniform", lambda low, high: high)
    with Stub(numbered, faults=["429 after 7"] * 6) as stub:
        values, _ = with_clock(stub, tmp_path, monkeypatch)
    assert (
        values == NUMBERED
        and [b - a for a, b in zip(stub.times, stub.times[1:7], strict=False)] == [7] * 6
    )


def test_pauses_double_up_to_a_minute(tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint.random, "uniform", lambda low, high: high)
    with Stub(numbered, faults=["500"] * 8) as stub:
        values, _ = with_clock(stub, tmp_path, monkeypatch, retries=8)
    assert values == NUMBERED
    assert [b - a for a, b in zip(stub.times, stub.times[1:9], strict=False)] == [
        1,
        2,
        4,
        8,
        16,
        32,
        60,
        60,
    ]


def test_requests_keep_to_the_rate_limit_and_trials_count(tmp_path, monkeypatch):
    with Stub(numbered, faults=["", "500"]) as stub:
        values, _ = with_clock(stub, tmp_path, monkeypatch, requests_per_minute=12)
    assert values == NUMBERED
    assert [b - a for a, b in zip(stub.times, stub.times[1:], strict=False)] == pytest.approx(
        [5, 5, 5]
    )


def test_so_many_requests_are_under_way_at_a_time(tmp_path):
    together, now, most, lock = threading.Barrier(3), [0], [0], threading.Lock()

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


# ---- replies without a verdict ----


@pytest.mark.parametrize("fault", UNREADABLE)
def test_a_reply_without_a_verdict_is_kept_and_asked_for_again_otherwise(fault, tmp_path):
    with Stub(numbered, faults=["", fault]) as stub:
        one = Judge(options(stub), COMMON, tmp_path)
        assert one.ask(requests(3), read_verdict) == NUMBERED
    assert one.usage()["malformed"] == 0
    assert len(stub.bodies) == 4
    first, again = stub.bodies[1], stub.bodies[3]
    assert first["messages"] == again["messages"]
    assert first["seed"] != again["seed"] and first["temperature"] == 0 < again["temperature"]
    [bad] = read_rows(tmp_path / "verdicts.malformed.jsonl")
    assert bad["messages"] == first["messages"] and bad["finish"] and bad["key"]


@pytest.mark.parametrize("fault", UNREADABLE)
def test_a_verdict_that_never_comes_is_counted_and_none(fault, tmp_path):
    with Stub(
        numbered, faults=lambda body: fault if "1?" in body["messages"][0]["content"] else ""
    ) as stub:
        one = Judge(options(stub, attempts=3), COMMON, tmp_path)
        assert one.ask(requests(3), read_verdict) == [1.0, None, 0.25]
        assert one.usage()["malformed"] == 1 and len(stub.bodies) == 5
        assert len(read_rows(tmp_path / "verdicts.malformed.jsonl")) == 3
        again = Judge(options(stub, attempts=3), COMMON, tmp_path)
        assert (
            again.ask(requests(3), read_verdict) == [1.0, None, 0.25]
            and again.usage() == one.usage()
        )
        assert len(stub.bodies) == 5 and len(read_rows(tmp_path / "verdicts.malformed.jsonl")) == 3
        more = Judge(options(stub, attempts=4), COMMON, tmp_path)
        stub.faults = iter(())
        assert more.ask(requests(3), read_verdict) == NUMBERED and len(stub.bodies) == 6


def test_what_is_too_long_is_not_asked_for_again(tmp_path):
    with Stub(
        numbered, faults=lambda body: "too long" if "1?" in body["messages"][0]["content"] else ""
    ) as stub:
        assert ask(stub, tmp_path) == [1.0, None, 0.25]
        assert len(stub.bodies) == 3
    assert [row["finish"] for row in read_rows(tmp_path / "verdicts.malformed.jsonl")] == [
        "too_long"
    ]


def test_a_judge_without_a_single_verdict_is_an_error(tmp_path):
    with (
        Stub(lambda body: "Hm.") as stub,
        pytest.raises(InputError, match="no verdict in any of 3 replies"),
    ):
        ask(stub, tmp_path)


def test_thoughts_before_a_verdict_do_not_count(tmp_path):
    with (
        Stub(lambda body: "<think>[[B>A]]</think>\nNo verdict") as stub,
        pytest.raises(InputError, match="no verdict"),
    ):
        ask(stub, tmp_path)


# ---- paid once ----


def test_nothing_is_paid_for_twice(tmp_path):
    with Stub(numbered) as stub:
        assert ask(stub, tmp_path, n=3) == NUMBERED and len(stub.bodies) == 3
        assert ask(stub, tmp_path, n=5) == (NUMBERED * 2)[:5] and len(stub.bodies) == 5
        twice = Judge(options(stub), COMMON, tmp_path).ask(requests(3) * 2, read_verdict)
        assert twice == NUMBERED * 2 and len(stub.bodies) == 5
        ask(stub, tmp_path, judge="another")  # the judge, the seed and the options decide too
        assert len(stub.bodies) == 8
        ask(stub, tmp_path, judge_tokens=7)
        assert len(stub.bodies) == 11
        Judge(options(stub), replace(COMMON, seed=1), tmp_path).ask(requests(3), read_verdict)
        assert len(stub.bodies) == 14
    assert stub.keys == {"Bearer sk-not-to-be-written"}
    assert not any("sk-not" in path.read_text() for path in tmp_path.iterdir())


def test_the_key_is_in_no_message(tmp_path, monkeypatch):
    with Stub(numbered, faults=["key"]) as stub:
        with pytest.raises(InputError, match=r"401 .*no key \*\*\* is known") as caught:
            ask(stub, tmp_path)
        assert "sk-not" not in str(caught.value)
        monkeypatch.setenv(
            "OPENAI_API_KEY", "sk-not-to-be-written\n"
        )  # as `$(cat key.txt)` in some files leaves it
        assert ask(stub, tmp_path) == NUMBERED and stub.keys == {"Bearer sk-not-to-be-written"}


def test_a_name_at_another_address_is_another_judge(tmp_path):
    for verdict, value in (("[[A>>B]]", 1.0), ("[[B>>A]]", 0.0)):
        with Stub(lambda body, verdict=verdict: verdict) as stub:
            assert ask(stub, tmp_path, n=1) == [value] and len(stub.bodies) == 1


def test_a_log_prob_that_is_null_is_none():
    top = endpoint.read_reply(
        completion("m", top={"m": None, "M": -1.0, "\ud83d": -2.0}), {"messages": []}
    )[2]
    assert top == {"M": -1.0, "?": -2.0}


def test_content_in_parts_is_joined(tmp_path):
    with Stub(
        lambda body: completion(
            [{"type": "text", "text": "I say [[A"}, {"type": "text", "text": ">B]]"}]
        )
    ) as stub:
        assert ask(stub, tmp_path, n=1) == [0.75]


def test_a_half_written_last_line_is_dropped_and_its_reply_asked_for_again(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    with Stub(numbered) as stub:
        ask(stub, tmp_path)
        whole = path.read_bytes()
        for kept in (
            len(whole) - 1,
            len(whole) - 9,
            whole.rindex(b"\n", 0, -1) + 2,
            5,
        ):  # the last: no whole line is left
            path.write_bytes(whole[:kept])
            asked = len(stub.bodies)
            assert ask(stub, tmp_path) == NUMBERED
            assert len(stub.bodies) - asked == (3 if kept == 5 else 1)
            assert len(read_rows(path)) == 3


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    with Stub(numbered) as stub:
        ask(stub, tmp_path)
        lines = (tmp_path / "verdicts.jsonl").read_text().splitlines()
        (tmp_path / "verdicts.jsonl").write_text(
            "\n".join([lines[0], lines[1][:20], lines[2]]) + "\n"
        )
        with pytest.raises(InputError, match=r"verdicts.jsonl: line 2 is no reply"):
            ask(stub, tmp_path)


def start(stub: Stub, out, *more) -> subprocess.Popen:
    """A process that asks for 6 verdicts, one at a time."""
    code = (
        "import sys; from data import *; from eval.judge import *\n"
        "requests = [Request([{'role': 'user', 'content': f'Question {i}?'}]) for i in range(6)]\n"
        "with processes():\n"
        f"    o = JudgeOptions(judge='stub', base_url={stub.url!r}, concurrency=2)\n"
        f"    print(Judge(o, Common(), {str(out)!r}).ask(requests, read_verdict))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def test_killed_half_way_nothing_that_was_answered_is_paid_for_again(tmp_path):
    with Stub(numbered, hold_after=3) as stub:
        process = start(stub, tmp_path)
        while (
            len(stub.bodies) < 5 or len(read_rows(tmp_path / "verdicts.jsonl")) < 3
        ):  # three answered, two under way
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        stub.hold_after = None
        process = start(stub, tmp_path)
        assert process.communicate()[0] == f"{NUMBERED * 2}\n"
        assert stub.paid.total() == 6 and set(stub.paid.values()) == {1}
        assert len(stub.bodies) == 8


def test_the_budget_stops_before_it_is_exceeded_and_more_goes_on(tmp_path):
    with Stub(numbered) as stub:
        dearest = (len(json.dumps(requests(1)[0].messages)) / 3 * 10 + 20 * 30) / 1e6
        for affordable in (2, 4):
            budget = (
                affordable * COST + dearest - 1e-9
            )  # the next one might still be paid for, but might cost more
            with pytest.raises(InputError, match="run the same command again") as caught:
                ask(stub, tmp_path, n=6, budget=budget, judge_tokens=20, **PRICES)
            assert "\n" not in str(caught.value) and f"{6 - affordable} are missing" in str(
                caught.value
            )
            assert stub.paid.total() == affordable and set(stub.paid.values()) == {1}
            assert affordable * COST <= budget
        one = Judge(options(stub, judge_tokens=20, budget=1.0, **PRICES), COMMON, tmp_path)
        assert one.ask(requests(6), read_verdict) == NUMBERED * 2
        assert stub.paid.total() == 6
        assert one.usage() == {
            "malformed": 0,
            "judge_replies": 6,
            "judge_usd": pytest.approx(6 * COST),
        }


def test_the_budget_holds_with_many_requests_under_way(tmp_path):
    with Stub(numbered) as stub:
        one = Judge(
            options(stub, budget=3.5 * COST, judge_tokens=TOKENS_OUT, concurrency=8, **PRICES),
            COMMON,
            tmp_path,
        )
        with pytest.raises(InputError, match="--budget"):
            one.ask(
                requests(6, " word" * 52), read_verdict
            )  # about as many tokens as the stub reports
        assert 0 < stub.paid.total() <= 3


# ---- verdicts and prompts ----


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


def test_a_text_that_holds_a_place_is_not_filled_again():
    texts = {"question": "{answer_a}", "answer_a": "{question}"}
    assert fill("{question}|{answer_a}|{x}", texts) == "{answer_a}|{question}|{x}"


def test_official_prompts_are_read_with_their_own_names_and_turns(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text(
        '<|im_start|>system\nBe fair.<|im_end|>\n<|im_start|>user\n{instruction} {"m": """{output_1}"""} '
        "{output_2}\n<|im_end|>\n"
    )
    with Stub(lambda body: "m") as stub:
        o = options(stub, judge_prompt=str(path))
        assert pairwise(Judge(o, COMMON, tmp_path), ["Q"], ["a"], ["b"], "choice") == [(1.0, 0.0)]
    assert stub.bodies[0]["messages"] == [
        {"role": "system", "content": "Be fair."},
        {"role": "user", "content": 'Q {"m": """a"""} b'},
    ]
    path.write_text("{QUESTION} {ANSWER_A}")
    with pytest.raises(InputError, match=r"prompt.txt: has no place \{answer_b\}"):
        load_prompt(o, "")
    assert to_messages("{question}", {"question": " <|im_start|>x"}) == [
        {"role": "user", "content": " <|im_start|>x"}
    ]


QUESTIONS, LONG, SHORT = (
    ["One?", "Two?", "Three?"],
    ["a long answer here", "yes indeed", "same"],
    ["short", "no", "same"],
)


@pytest.mark.parametrize("form", ["choice", "verdict"])
def test_a_judge_that_prefers_what_stands_first_gives_one_half(form, tmp_path):
    with Stub(always_first) as stub:
        games = pairwise(Judge(options(stub), COMMON, tmp_path), QUESTIONS, LONG, SHORT, form)
    assert (
        all(sum(pair) / 2 == pytest.approx(0.5) for pair in games)
        and games[0][0] > 0.5 > games[0][1]
    )


@pytest.mark.parametrize("form", ["choice", "verdict"])
def test_both_orders_are_asked_and_turned_the_right_way(form, tmp_path):
    with Stub(longer_is_better) as stub:
        one = Judge(options(stub), COMMON, tmp_path)
        games = pairwise(one, QUESTIONS, LONG, SHORT, form)
        assert games == [(1, 1), (1, 1), (0.5, 0.5)] and len(stub.bodies) == 4, (
            "equal answers are a draw nobody is asked about"
        )
        contents = [body["messages"][-1]["content"] for body in stub.bodies]
        assert contents[0].index(LONG[0]) < contents[0].index(SHORT[0])
        assert contents[1].index(LONG[0]) > contents[1].index(SHORT[0])
        assert pairwise(one, QUESTIONS, SHORT, LONG, form) == [(0, 0), (0, 0), (0.5, 0.5)]
        assert len(stub.bodies) == 4, "the same two requests"


def test_a_lost_game_is_none_on_its_own_side(tmp_path):
    with Stub(
        lambda body: "?" if "assistant A\nshort" in body["messages"][-1]["content"] else "[[A>>B]]"
    ) as stub:
        assert pairwise(
            Judge(options(stub), COMMON, tmp_path), ["One?"], ["long"], ["short"], "verdict"
        ) == [(1.0, None)]
        assert pairwise(
            Judge(options(stub), COMMON, tmp_path), ["One?"], ["short"], ["long"], "verdict"
        ) == [(None, 0.0)]


def test_compare_is_the_mean_over_both_orders_and_draws_what_is_lost(tmp_path):
    def rows(texts):
        return [
            {"id": q, "prompt": q, "response": text}
            for q, text in zip(QUESTIONS, texts, strict=True)
        ]

    with Stub(
        lambda body: (
            completion("m", top={"m": math.log(0.9), "M": math.log(0.1)})
            if "One?" in body["messages"][-1]["content"]
            else longer_is_better(body)
        )
    ) as stub:
        assert compare(rows(LONG), rows(SHORT), options(stub), COMMON, tmp_path) == pytest.approx(
            [0.5, 1.0, 0.5]
        )
        assert compare(rows(SHORT), rows(LONG), options(stub), COMMON, tmp_path) == pytest.approx(
            [0.5, 0.0, 0.5]
        )
        assert len(stub.bodies) == 4
    talk = {
        "id": "t",
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Ho"},
            {"role": "user", "content": "Well?"},
        ],
    }
    with Stub(
        lambda body: (
            "M" if "longest" in body["messages"][-1]["content"].split("# Answer M")[1] else "x"
        )
    ) as stub:
        a, b = [{**talk, "response": "short"}], [{**talk, "response": "longest"}]
        assert compare(a, b, options(stub), COMMON, tmp_path) == [0.25]
    assert "user: Hi\n\nassistant: Ho\n\nuser: Well?" in stub.bodies[0]["messages"][-1]["content"]


def test_more_fields_of_a_request_are_sent_and_nulls_left_out(tmp_path):
    with Stub(numbered) as stub:
        ask(
            stub,
            tmp_path,
            judge_request='{"seed": null, "top_p": 0.5, "max_completion_tokens": 9, "max_tokens": null}',
        )
    assert set(stub.bodies[0]) == {
        "model",
        "messages",
        "temperature",
        "top_p",
        "max_completion_tokens",
    }


# ---- options ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge": ""}, "--judge: name"),
        ({"budget": 1.0}, "--budget: cannot be kept without prices"),
        ({"attempts": 0}, "--attempts"),
        ({"concurrency": 0}, "--concurrency"),
        ({"judge_request": "[1]"}, "--judge-request: not a JSON object"),
        ({"judge_request": "{"}, "--judge-request"),
        ({"judge_prompt": "gone.txt"}, "gone.txt: no such file"),
        ({"base_url": ""}, "set OPENAI_API_KEY, or with OPENAI_BASE_URL or --base-url"),
    ],
)
def test_options_that_will_not_do_are_errors_before_anything_is_asked(
    changes, message, tmp_path, monkeypatch
):
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with Stub() as stub:
        with pytest.raises(InputError, match=message) as caught:
            Judge(options(stub, **changes), COMMON, tmp_path)
        assert "\n" not in str(caught.value) and not stub.bodies


def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=r"pip install -r requirements-eval.txt"):
        Judge(JudgeOptions(judge="gpt"), COMMON, tmp_path)
    assert (ROOT / "requirements-eval.txt").is_file()


def test_a_server_without_keys_needs_none(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with Stub(numbered) as stub:
        assert ask(stub, tmp_path) == NUMBERED


# ---- a local model ----


def length(reply: dict) -> float | None:
    """A stand-in for a verdict that any text has."""
    return float(len(reply["text"])) if reply["finish"] != "too_long" else None


def test_a_local_judge_writes_greedily_and_only_once(tiny, tmp_path, monkeypatch):
    o = JudgeOptions(judge=str(tiny), judge_tokens=12)
    values = Judge(o, COMMON, tmp_path / "a").ask(requests(3), length)
    rows = [{"id": str(i), "messages": r.messages} for i, r in enumerate(requests(3))]
    sample(
        tiny,
        rows,
        tmp_path / "direct.jsonl",
        SampleOptions(temperature=0.0, max_new_tokens=12),
        COMMON,
    )
    direct = [row["response"] for row in read_rows(tmp_path / "direct.jsonl")]
    assert values == [len(text) for text in direct] and len(set(direct)) > 1
    Judge(replace(o, judge_tokens=32), COMMON, tmp_path / "b").ask(
        [replace(r, choice=True) for r in requests(3)], length
    )
    assert max(row["out"] for row in read_rows(tmp_path / "b/verdicts.jsonl")) == 16, (
        "a letter needs no more"
    )
    monkeypatch.setattr(judge, "sample", lambda *args, **kw: pytest.fail("was written before"))
    again = Judge(o, COMMON, tmp_path / "a")
    assert again.ask(requests(3), length) == values
    assert again.usage() == {"malformed": 0, "judge_replies": 3, "judge_usd": 0}


def test_a_changed_local_judge_is_asked_anew(tmp_path):
    model = tiny_checkpoint(tmp_path / "model")
    o = JudgeOptions(judge=str(model), judge_tokens=12)
    Judge(o, COMMON, tmp_path / "a").ask(requests(2), length)
    tiny_checkpoint(tmp_path / "model", seed=5)
    Judge(o, COMMON, tmp_path / "a").ask(requests(2), length)
    assert len(read_rows(tmp_path / "a/verdicts.jsonl")) == 4
    Judge(o, replace(COMMON, dtype="bfloat16"), tmp_path / "a").ask(requests(2), length)
    assert len(read_rows(tmp_path / "a/verdicts.jsonl")) == 6


@pytest.mark.parametrize("name", ["judge", "verdicts", "malformed", "sampled", "judge.sampled"])
def test_any_name_will_do_for_the_verdicts(name, tiny, tmp_path):
    """What is written beside them never takes their place."""
    o = JudgeOptions(
        judge=str(tiny), judge_tokens=12, judge_cache=str(tmp_path / f"{name}.jsonl"), attempts=1
    )
    none_for_the_first = lambda reply: None if reply["key"] == first else 0.5  # noqa: E731
    first = ""
    for n in (2, 3):
        assert Judge(o, COMMON, tmp_path).ask(requests(n), none_for_the_first).count(0.5) == 2
        first = first or read_rows(tmp_path / f"{name}.jsonl")[0]["key"]
        assert len(read_rows(tmp_path / f"{name}.jsonl")) == n


def test_what_does_not_fit_a_local_judge_is_malformed_and_the_rest_judged(tiny, tmp_path):
    long = Request([{"role": "user", "content": "word " * 600}])
    one = Judge(JudgeOptions(judge=str(tiny), judge_tokens=12), COMMON, tmp_path)
    values = one.ask([requests(1)[0], long], length)
    assert values[0] > 0 and values[1] is None and one.usage()["malformed"] == 1
    assert [row["finish"] for row in read_rows(tmp_path / "verdicts.malformed.jsonl")] == [
        "too_long"
    ]


def test_a_local_judges_nonsense_is_asked_for_again_at_a_temperature(tiny, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        judge,
        "sample",
        lambda model, rows, out, o, *rest, **kw: (
            asked.append((o.temperature, len(rows), rest[-1])),
            write_rows(
                out,
                [
                    {
                        "id": row["id"],
                        "response": "[[A>B]]" if len(asked) == 3 or i else "?",
                        "finish_reason": "stop",
                        "tokens": 1,
                    }
                    for i, row in enumerate(rows)
                ],
            ),
        ),
    )
    assert (
        Judge(JudgeOptions(judge=str(tiny)), COMMON, tmp_path).ask(requests(3), read_verdict)
        == [0.75] * 3
    )
    assert [(t, n) for t, n, _ in asked] == [(0, 3), (0.7, 1), (0.7, 1)] and len(
        {purpose for *_, purpose in asked}
    ) == 3


# ---- many processes ----


def test_two_processes_ask_no_more_than_one(tiny, tmp_path):
    prompts = write_rows(
        tmp_path / "prompts.jsonl", [{"prompt": f"Question {i}?"} for i in range(4)]
    )
    other = tiny_checkpoint(tmp_path / "other", seed=5)
    results = []
    with Stub(longer_is_better) as stub:
        for nproc, seen in ((2, 8), (1, 8)):
            torchrun = (
                ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
                if nproc == 2
                else []
            )
            flags = {
                "model": tiny,
                "against": other,
                "data": prompts,
                "judge": "stub",
                "base-url": stub.url,
                "max-new-tokens": 12,
                "dtype": "float32",
                "out": tmp_path / "out",
            }
            done = subprocess.run(
                [
                    sys.executable,
                    *torchrun,
                    "-m",
                    "eval.head_to_head",
                    *(f"--{name}={value}" for name, value in flags.items()),
                ],
                cwd=ROOT,
                capture_output=True,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            assert done.returncode == 0, done.stderr
            results.append(last_json(done.stdout))
            assert len(stub.bodies) == seen
    for result in results:
        del result["seconds"]
    assert results[0] == results[1] and results[0]["judge_replies"] == 8


# ---- as a scorer of reward.py ----


def test_an_endpoint_compares_for_reward_py(tmp_path, monkeypatch):
    from reward import load_scorer, score_pairs

    good, bad = (
        [{"id": str(i), "prompt": f"Question {i}?", "response": text * (i + 1)} for i in range(3)]
        for text in ("long ", "x")
    )
    with Stub(longer_is_better) as stub:
        monkeypatch.setenv("OPENAI_BASE_URL", stub.url)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        with (
            monkeypatch.context() as alone
        ):  # loop.py checks on rank 0 alone, where nothing may wait for the others
            alone.setattr(
                data.dist,
                "broadcast_object_list",
                lambda *_, **__: pytest.fail("waits for other ranks"),
            )
            scorer = load_scorer("endpoint:stub", "", COMMON)
        assert score_pairs(scorer, good, bad) == ([1, 1, 1], [0, 0, 0])
        assert len(stub.bodies) == 6  # both orders
        assert (
            score_pairs(load_scorer("endpoint:stub", "", COMMON), good, bad)[0] == [1, 1, 1]
            and len(stub.bodies) == 6
        )
        assert (
            score_pairs(scorer, bad, good)[0] == [0, 0, 0] and len(stub.bodies) == 6
        )  # the same games
    with Stub(always_first) as stub:
        monkeypatch.setenv("OPENAI_BASE_URL", stub.url)
        assert score_pairs(load_scorer("endpoint:first", "", COMMON), good, bad)[
            0
        ] == pytest.approx([0.5] * 3)
    with pytest.raises(InputError, match="compares two answers"):
        load_scorer("endpoint:stub", "", COMMON, alone=True)
    monkeypatch.delenv("OPENAI_BASE_URL")
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(
        InputError, match="set OPENAI_API_KEY"
    ):  # when it is named, not when the first pair is there
        load_scorer("endpoint:stub", "", COMMON)

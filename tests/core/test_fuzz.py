"""A few of tests/fuzz.py's inputs for each reader; SYNPO_FUZZ=N tries N of each."""

import os
import random

import fuzz
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

INPUTS = int(os.environ.get("SYNPO_FUZZ", "60"))
# readers whose every input is known to give a result or one line
HELD = (
    "records",
    "lines",
    "json",
    "recipe",
    "recipe-json",
    "safetensors",
    "config",
    "tokenizer-config",
    "options",
)


@pytest.mark.slow
@pytest.mark.parametrize("reader", HELD)
def test_any_bytes_give_a_result_or_one_line(tmp_path, reader):
    @settings(
        max_examples=INPUTS,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(st.integers(0, 2**32))
    def attempt(number: int):
        content = fuzz.make(fuzz.READERS[reader][1], random.Random(number))
        assert fuzz.outcome(reader, content, tmp_path) in ("accepted", "refused"), content[:500]

    attempt()


def test_a_reader_that_fails_or_never_ends_is_a_fault(monkeypatch):
    def fails(path):
        raise KeyError("a")

    def hangs(path):
        while True:
            pass

    monkeypatch.setattr(fuzz, "SECONDS", 1)
    for read, said in ((fails, "KeyError: 'a'"), (hangs, "TooSlow: ")):
        monkeypatch.setitem(fuzz.READERS, "json", ("a", lambda rng: b"", read))
        counts, faults = fuzz.try_reader("json", 1, 0)
        assert not counts and faults == {0: said}

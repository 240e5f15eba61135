"""Progress: lines on standard output, a bar on a terminal only."""

import io

import pytest

from ops import progress
from ops.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only where a test says so."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "time", lambda: now[0])
    return now


def test_a_line_a_minute_says_what_is_done_and_left(clock, capsys):
    with Progress("iter1/policy", "step", total=100, done=20) as bar:
        for _ in range(40):
            clock[0] += 3.0
            bar.update(note="loss 0.500")
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "  iter1/policy: step 40 of 100, about 180 s left, loss 0.500",
        "  iter1/policy: step 60 of 100, about 120 s left, loss 0.500",
    ]
    assert err == ""


def test_without_a_total_a_line_says_how_fast_it_goes(clock, capsys):
    with Progress("answers", "token") as bar:
        clock[0] += 59
        bar.update(1500)
        clock[0] += 1
        bar.update(1500)
    assert capsys.readouterr().out == "  answers: token 3,000, 50.0 a second\n"


def test_silent_progress_says_nothing(clock, capsys):
    with Progress("answers", "token", silent=True) as bar:
        clock[0] += 100
        bar.update()
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_a_bar_which_is_gone_before_an_error(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", screen)
    with pytest.raises(RuntimeError), Progress("policy", "step", total=3) as bar:
        bar.update(note="loss 0.5")
        raise RuntimeError
    assert "policy" in screen.getvalue()
    # what is left of the bar is an empty line
    assert screen.getvalue().endswith("\r")
    assert not screen.getvalue().split("\r")[-2].strip()

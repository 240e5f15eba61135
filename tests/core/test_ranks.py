"""Ranks: values and exceptions that all ranks get, items split over them, an error's one line."""

import os
import re
import socket
import subprocess
import sys

import pytest
from conftest import ROOT, refusal, run_process
from forked import run_forked

from plumbing.files import InputError
from plumbing.ranks import gather, on_rank0, print0, work_queue

# ------------------------------------------------------------------------------- a world of one


def test_on_rank0_hands_back_the_value_or_the_exception():
    assert on_rank0(lambda a: a + 1, 2) == 3

    def fail():
        raise InputError("one line")

    assert refusal(on_rank0, fail) == "one line"
    with pytest.raises(ZeroDivisionError):
        on_rank0(lambda: 1 / 0)


def test_a_single_process_gathers_and_queues_for_itself(capsys):
    assert gather("a") == ["a"]
    assert list(work_queue([1, 2, 3])) == [1, 2, 3]
    assert list(work_queue([])) == []
    print0("said", 1)
    assert capsys.readouterr().out == "said 1\n"


def test_a_forked_command_has_the_threads_of_its_own_environment(tmp_path):
    script = tmp_path / "threads.py"
    script.write_text("import torch\nprint(torch.get_num_threads())")
    for threads in ("1", "3"):
        env = {**os.environ, "OMP_NUM_THREADS": threads}
        assert run_forked([script], env, tmp_path) == (0, f"{threads}\n", "")


# ------------------------------------------------------------------------------- two processes

TWO = """
import sys

from plumbing.ranks import (
    RANK, STORES, WORLD, distributed, gather, on_rank0, print0, work_queue
)
from plumbing.files import InputError


def raised(error):
    if RANK == 1:
        return "not called here"
    raise error


with distributed():
    assert WORLD == 2
    assert gather(RANK) == [0, 1]
    assert on_rank0(lambda: f"from {RANK}") == "from 0"

    # whatever rank 0 raises, every rank raises, so that none waits for another
    for kind in (InputError, ValueError, AssertionError):
        try:
            on_rank0(raised, kind("of rank 0"))
        except kind as error:
            assert str(error) == "of rank 0"
        else:
            sys.exit("no error")

    # each item once; while rank 0 is busy with its first, rank 1 takes all others
    mine = []
    for item in work_queue(list("abcdefgh")):
        mine.append(item)
        if RANK == 0:
            STORES[-1].wait(["all taken"])
    if RANK == 1:
        STORES[-1].set("all taken", "")
    taken = gather(mine)
    assert sorted(sum(taken, [])) == list("abcdefgh"), taken
    assert len(taken[1]) >= 7, taken
    assert sorted(sum(gather(list(work_queue([1, 2]))), [])) == [1, 2]
    print0("said once")
"""


@pytest.mark.ranks
@pytest.mark.slow
def test_two_processes_split_and_gather_in_order(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    both = []
    for rank in range(2):
        both.append(
            subprocess.Popen(
                [sys.executable, str(tmp_path / "two.py")],
                env={**env, "RANK": str(rank)},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    ends = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], ends
    assert "".join(out for out, _ in ends) == "said once\n"


LATE = """
import time

from plumbing.options import cli
from plumbing.ranks import RANK
from plumbing.files import InputError


def main(model: str = "") -> dict:
    time.sleep(0 if RANK else 2)
    raise InputError("fix it")


cli(main)
"""


@pytest.mark.ranks
@pytest.mark.slow
def test_rank_0_says_its_error_however_late(tmp_path):
    """torchrun ends every rank as soon as one has ended."""
    (tmp_path / "late.py").write_text(LATE)
    code, _, errors = run_process([tmp_path / "late.py"], env={"PYTHONPATH": str(ROOT)}, nproc=2)
    assert code != 0
    assert re.search(r"(?<!\[rank 1\] )error: fix it\n", errors), errors
    assert 'late.py", line' not in errors, "a traceback"


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ({"RANK": "0"}, True),
        ({"WORLD_SIZE": "2"}, True),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}, True),
        ({"MASTER_PORT": "29500"}, False),  # another program's, and harmless
    ],
)
def test_variables_of_another_program_end_with_one_line(given, refused):
    asked = [sys.executable, "-c", "import plumbing.ranks"]
    done = subprocess.run(
        asked, cwd=ROOT, env={**os.environ, **given}, capture_output=True, text=True
    )
    problem = "error: RANK or WORLD_SIZE is set, by another program? unset both, or use torchrun\n"
    assert (done.returncode, done.stderr) == ((1, problem) if refused else (0, ""))

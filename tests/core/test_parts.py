"""Parts of unfinished results: read as written, or made again; and a disk that is full."""

import math

import pytest
from conftest import refusal, run_process
from cycle import flags, go

from bench import same
from plumbing.files import write_text
from plumbing.parts import read_part, write_part

pytest_plugins = ["cycle"]

# Runs the command with no file above a size, as on a full disk.
LIMITED = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an OSError in place of the process's end
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.argv = sys.argv[2:]
sys.path.insert(0, ".")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("value", [{}, [], None, {"a": [1.5, None]}, "süß\n", [math.inf], 0])
def test_a_part_is_read_as_it_was_written(tmp_path, value):
    write_part(tmp_path / "a.part", value)
    assert read_part(tmp_path / "a.part") == value


def test_there_is_no_part(tmp_path):
    assert read_part(tmp_path / "none.part") is None


def test_each_flipped_bit_is_noticed(tmp_path, capsys):
    file = tmp_path / "a.part"
    write_part(file, [0.5])
    whole = file.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            file.write_bytes(damaged)
            assert read_part(file) is None
            assert not file.exists()
            assert f"{file}: damaged; what it held is made again" in capsys.readouterr().out


def test_each_cut_is_noticed(tmp_path):
    file = tmp_path / "a.part"
    write_part(file, [0.5])
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert read_part(file) is None


def test_a_part_in_the_place_of_another_is_noticed(tmp_path):
    write_part(tmp_path / "a.part", [1])
    (tmp_path / "a.part").rename(tmp_path / "b.part")
    assert read_part(tmp_path / "b.part") is None


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "folder").write_text("a file")
    said = refusal(write_text, tmp_path / "folder" / "a.json", "{}")
    assert said.startswith(f"{tmp_path}/folder/a.json: could not be written (")
    assert said.endswith("rerun: nothing finished is lost")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "save_every", "what"),
    [
        (600_000, 1, "checkpoint"),
        (300_000, 0, "model.safetensors"),
    ],
)
def test_a_full_disk_is_one_line_and_loses_nothing(
    world, finished, tmp_path, size, save_every, what
):
    """No file of a run may be larger than `size` bytes; then the same command goes on."""
    out = tmp_path / "run"
    program = tmp_path / "limited.py"
    program.write_text(LIMITED)
    more = [f"--{stage}.save-every={save_every}" for stage in ("generator", "improver", "policy")]
    code, _, errors = run_process([program, size, "loop.py", *flags(world, out, *more)])
    assert code == 2, errors
    [line] = errors.splitlines()
    assert "could not be written (" in line
    assert what in line
    assert "rerun: nothing finished is lost" in line
    before = same.results(out)
    go(world, out)
    assert before.items() <= same.results(out).items()
    assert same.results(out) == same.results(finished[0])

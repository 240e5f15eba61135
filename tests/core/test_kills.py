"""A short campaign of tests/kills.py, and what its comparison must notice."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from kills import VARYING, contents, differences

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")


@pytest.fixture
def two_runs(tmp_path):
    """Two folders that differ in times and in their own paths only."""
    folders = []
    for name, seconds in (("0000", 1.5), ("0001", 2.25)):
        run = tmp_path / name / "run"
        (run / "iter1").mkdir(parents=True)
        (run / "iter1/pairs.jsonl").write_text('{"chosen": "a"}\n')
        (run / "iter1/model.safetensors").write_bytes(bytes(range(256)))
        manifest = {"counts": {"pairs": 6, "seconds": seconds}, "paths": {"x": f"{run}/x.jsonl"}}
        manifest["digest"] = f"{int(seconds * 10**15):016d}"
        manifest["files"] = {"iter1/pairs.jsonl": [16, int(seconds * 10**18), "0a1b"]}
        (run / "iter1/pairs.manifest.json").write_text(json.dumps(manifest, indent=1))
        folders.append(run)
    return folders


def test_times_and_the_runs_own_path_may_differ(two_runs):
    peace, run = two_runs
    assert differences(contents(peace), run) == []
    assert len(VARYING) == 6


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("iter1/pairs.jsonl", b"a", b"b"),
        ("iter1/model.safetensors", b"\x07", b"\x06"),
        ("iter1/pairs.manifest.json", b"0a1b", b"0a1c"),
        ("iter1/pairs.manifest.json", b'"pairs": 6', b'"pairs": 7'),
    ],
)
def test_a_changed_byte_is_named(two_runs, name, old, new):
    peace, run = two_runs
    (run / name).write_bytes((run / name).read_bytes().replace(old, new, 1))
    (line,) = differences(contents(peace), run)
    assert line.startswith(f"{name}: ")


@pytest.mark.parametrize(
    "name", ["iter1/.tmpAb3", "pairs.jsonl.tmp", "iter1/policy.partial/", "reference/a/b.part.tmp"]
)
def test_what_is_left_over_is_named(two_runs, name):
    peace, run = two_runs
    expected = contents(peace)
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    if name.endswith("/"):
        (run / name).mkdir()
    else:
        (run / name).write_text("")
    assert len(differences(expected, run)) == 1


def test_a_lost_file_is_named(two_runs):
    peace, run = two_runs
    (run / "iter1/pairs.jsonl").unlink()
    assert differences(contents(peace), run) == ["iter1/pairs.jsonl: missing"]


def campaign(out, *more: str) -> tuple[int, dict, str]:
    """The command in a process of its own: a fork of this one could not train."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kills", "--seed", "5", "--out", str(out), *more],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stdout


@pytest.mark.slow
def test_a_few_kills_change_nothing(tmp_path):
    code, result, text = campaign(tmp_path, "--kills", "5", "--per-run", "5")
    assert (code, result["wrong"]) == (0, 0), text
    assert result["one_process"]["kills"] == 5
    assert len(result["one_process"]["stages"]) >= 4

"""Windows: every command ends with one line. macOS: what is read elsewhere than on Linux."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from ops import cpu, meters
from plumbing import stage

# Imports every command twice: as it is, so that all foreign modules are there, and once more with
# what Windows lacks gone. Python itself could not be imported here under the name of win32.
COMMANDS_ON_WINDOWS = """
import importlib, json, sys

def ending(name):
    try:
        importlib.import_module(name)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"

root, *names = sys.argv[1:]
before = {name: ending(name) for name in names}
sys.platform = "win32"
after = {}
for name in names:
    for known, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        # a virtual environment may lie inside the checkout
        if file.startswith(root) and "site-packages" not in file:
            del sys.modules[known]
    sys.modules |= {"fcntl": None, "resource": None}
    after[name] = ending(name)
print(json.dumps([before, after]))
"""
FIRST_LINE = "error: this program needs Linux or macOS; on Windows use WSL"


def commands() -> list[str]:
    """Dotted names of the files that run as commands."""
    found = []
    for path in sorted(ROOT.glob("*.py")) + sorted(ROOT.glob("*/*.py")):
        name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        runs = 'if __name__ == "__main__":' in path.read_text("utf-8")
        # bench/peers.py is no command of a user's, bench/same.py needs a git checkout of another
        if runs and not name.startswith("tests.") and name not in ("bench.peers", "bench.same"):
            found.append(name)
    return found


def test_on_windows_every_command_ends_with_one_line():
    names = commands()
    assert {"loop", "train", "eval.report", "methods.controls", "bench.ablations"} <= set(names)
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS_ON_WINDOWS, str(ROOT), *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout.splitlines()[-1])
    # those for which something is not installed say so first
    there = [name for name in names if not before[name]]
    missing = [why for why in before.values() if why]
    assert all(why.startswith("ModuleNotFoundError: ") for why in missing), missing
    assert {"loop", "train", "sample", "dpo", "methods.controls"} <= set(there)
    assert {name: after[name] for name in there} == dict.fromkeys(
        there, f"SystemExit: {FIRST_LINE}"
    )


def test_the_line_stands_alone_on_standard_error():
    code = "import sys; sys.platform = 'win32'; import plumbing.files"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"{FIRST_LINE}\n"


@pytest.mark.parametrize(("system", "unit"), [("linux", 1024), ("darwin", 1)])
def test_peak_memory_is_counted_in_the_units_of_the_system(monkeypatch, system, unit):
    """ru_maxrss: in KiB on Linux, in bytes on macOS."""
    usage = SimpleNamespace(ru_maxrss=3_000_000)
    monkeypatch.setattr(meters.resource, "getrusage", lambda who: usage)
    monkeypatch.setattr(meters.sys, "platform", system)
    monkeypatch.setattr(meters, "DEVICE", torch.device("cpu"))
    assert meters.peak_memory() == pytest.approx(3e6 * unit / 1e9)


def test_without_cpuinfo_the_kernels_are_tried_and_the_machine_has_a_name(tmp_path, monkeypatch):
    asked = []

    def compiler(command, **options):
        asked.append(command)
        raise subprocess.CalledProcessError(1, command, stderr="clang: unsupported '-fopenmp'\n")

    monkeypatch.setattr(stage, "CPUINFO", tmp_path / "no cpuinfo")
    monkeypatch.setattr(stage.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(cpu, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(cpu.subprocess, "run", compiler)
    monkeypatch.setattr(stage, "MACHINE_PARTS", {})  # one would remember that nothing was compiled
    assert stage.machine.__wrapped__()["cpu"] == "arm64"
    assert cpu.library.__wrapped__(torch.float32) is None
    assert asked[0][0] == "cc", "no file of Linux stopped it before"


def test_kernels_in_plain_pytorch_say_why_on_one_line(tmp_path, monkeypatch, capsys):
    def compiler(command, **options):
        raise subprocess.CalledProcessError(1, command, stderr="clang: error: one\nerror: two\n")

    monkeypatch.setattr(stage, "CPUINFO", tmp_path / "none")
    monkeypatch.setattr(cpu, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(cpu.subprocess, "run", compiler)
    assert cpu.library.__wrapped__(torch.float32) is None
    line = "could not compile the CPU kernels; falling back to PyTorch (slower): clang: error: one"
    assert capsys.readouterr().err == f"{line}\n"


@pytest.mark.parametrize(
    ("fast", "dtype", "device", "said"),
    [
        (False, torch.bfloat16, "cpu", True),
        (False, torch.float32, "cpu", False),
        (True, torch.bfloat16, "cpu", False),
        (False, torch.bfloat16, "cuda", False),
    ],
)
def test_a_cpu_without_bf16_is_told_of_float32(monkeypatch, capsys, fast, dtype, device, said):
    monkeypatch.setattr(cpu, "DEVICE", torch.device(device))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: fast)
    cpu.tell_of_slow_bf16.cache_clear()
    cpu.tell_of_slow_bf16(dtype)
    cpu.tell_of_slow_bf16(dtype)
    assert capsys.readouterr().out.count("--dtype float32 is many times faster") == said


def test_a_build_without_onednn_is_not_asked(monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    cpu.tell_of_slow_bf16.cache_clear()
    cpu.tell_of_slow_bf16(torch.bfloat16)
    assert capsys.readouterr().out == ""

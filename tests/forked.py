"""Commands of the project in forked processes, which spares each the time of importing torch.

The children of one server, which has imported the libraries and nothing of the project. What a
process reads as torch is loaded (ATEN_CPU_CAPABILITY ...) is the server's, but for the number of
threads: on some CPUs a matrix product of two threads has other last bits than one of one.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch

LIBRARIES = [
    "numpy",
    "safetensors.torch",
    "tokenizers",
    "torch",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "tqdm",
]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(LIBRARIES)


def command(args: list[str], env: dict, cwd: Path, output: Path) -> None:
    """What a child does: `python ARGS`, with its output in two files."""
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(output / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    if args[0] == "-m":
        sys.argv = args[1:]
        sys.path[0] = str(cwd)
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = args
        sys.path[0] = str(Path(args[0]).parent)
        runpy.run_path(args[0], run_name="__main__")


def run_forked(
    args: list, env: dict, cwd: Path, nproc: int = 1, timeout: float = 300
) -> tuple[int, str, str]:
    """`python ARGS` in as many ranks as asked for: (return code, standard output, standard error).

    Like torchrun, it ends all ranks where one has failed, and then returns 1.
    """
    with tempfile.TemporaryDirectory() as output:
        places = [{}]
        if nproc > 1:
            places = rank_variables(nproc)
        ranks = []
        for place in places:
            given = (list(map(str, args)), {**env, **place}, cwd, Path(output))
            ranks.append(CONTEXT.Process(target=command, args=given, daemon=True))
            ranks[-1].start()
        code = wait(ranks, time.monotonic() + timeout)
        return code, *((Path(output) / name).read_text() for name in ("out", "err"))


def rank_variables(nproc: int) -> list[dict]:
    """What torchrun tells its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared.update(WORLD_SIZE=str(nproc), LOCAL_WORLD_SIZE=str(nproc))
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(nproc)]


def wait(ranks: list, until: float) -> int:
    while any(rank.is_alive() for rank in ranks):
        failed = [rank.exitcode for rank in ranks if rank.exitcode]
        if failed or time.monotonic() > until:
            for rank in ranks:
                rank.terminate()
                rank.join()
            if not failed:
                raise TimeoutError("a command did not end")
            break
        time.sleep(0.01)
    codes = [rank.exitcode for rank in ranks]
    return codes[0] if len(ranks) == 1 else int(any(codes))

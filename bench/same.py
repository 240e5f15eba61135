"""Proves that two versions of the program give the same bytes: texts, scores and weights of a run.

    python -m bench.same 7187c6c                            a commit against this tree, a minute
    python -m bench.same 7187c6c --kernels off --nproc 2    on plain PyTorch, by two processes
    python -m bench.same --runs runs/a runs/b               two runs that exist
    python -m bench.same --hashes runs/demo                 sha256 of each result of a run

Each tree makes the tests' micro world with its own code and runs the loop and the controls on it,
one thread a process. Then every .jsonl, *eval*.json, result.json and .safetensors file of the old
tree must be in the new one, byte for byte. Left out are metrics.jsonl and manifests, which hold
times, and judges' verdicts. Cached reference log-probs are compared as one sorted file, as names of
files there hash other things too. This file imports nothing of what it compares. Exit code 1: the
results differ; 2: a tree could not make them.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors.torch import load

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ("*.jsonl", "*eval*.json", "result.json", "*.safetensors")
NOT_RESULTS = re.compile(r"/(metrics\.jsonl|verdicts[^/]*|[^/]*manifest\.json)$|\.partial/")
WORLD = """
import json, sys
from pathlib import Path
sys.path[:0] = ["tests", "tests/core"]
from conftest import tiny_checkpoint
import micro
try:
    from plumbing.ranks import distributed
except ImportError:  # a tree from before there was plumbing/
    from data import processes as distributed
with distributed():
    print(json.dumps(micro.make(Path(sys.argv[1]), tiny_checkpoint)))
"""


# ------------------------------------------------------------------------------- what a tree makes


def unpack(commit: str, folder: Path) -> Path:
    """The files of a commit. Not a git worktree: a killed command would leave its entry in .git."""
    with tempfile.TemporaryFile() as archive:
        subprocess.run(["git", "archive", commit], cwd=ROOT, stdout=archive, check=True)
        archive.seek(0)
        with tarfile.open(fileobj=archive) as tar:
            tar.extractall(folder, filter="data")
    return folder


def make(tree: Path, out: Path, more: str, args: argparse.Namespace) -> None:
    """Write the micro world, a run of two iterations and its controls, by the code of a tree."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "SYNPO_KERNELS": str(int(args.kernels == "on"))}
    launch = []
    if args.nproc > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.nproc}"]

    def python(*words: str) -> str:
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{tree}: {' '.join(words)}\n{done.stdout[-999:]}\n{done.stderr}")
        return done.stdout

    # the world has options of its own, which the tree's own loop.py knows
    world = json.loads(python("-c", WORLD, str(out / "world")).splitlines()[-1])
    flags = [text for name, value in world.items() for text in (f"--{name}", value)]
    flags += ["--out", str(out / "run"), "--keep-improvers", *more.split()]
    # controls were an option of the loop once
    if (tree / "methods/controls.py").is_file():
        python(*launch, "loop.py", *flags)
        # torchrun would take --run for a flag of its own
        module = ["-m", "--"] if launch else ["-m"]
        python(*launch, *module, "methods.controls", "--run", str(out / "run"))
    else:
        python(*launch, "loop.py", *flags, "--controls")


# ------------------------------------------------------------------------------- what is compared


def results(root: Path) -> dict[str, bytes]:
    """Name below root -> content of each result, sorted; a folder's reference cache is one."""
    found: dict[str, bytes] = {}
    # in the order of their paths, so that a difference is shown where it arises first
    for path in sorted(path for pattern in RESULTS for path in root.rglob(pattern)):
        parts = path.relative_to(root).parts
        if NOT_RESULTS.search(str(path)):
            continue
        content = path.read_bytes()
        if "reference" in parts:
            parts = parts[: parts.index("reference") + 1]
            earlier = found.get("/".join(parts), b"")
            content = b"".join(sorted((earlier + content).splitlines(keepends=True)))
        found["/".join(parts)] = content
    return found


def difference(name: str, old: bytes, new: bytes | None) -> str:
    """Where a result differs, in one line; empty where it does not."""
    if old == new:
        return ""
    if new is None:
        return f"{name}: missing"
    if name.endswith(".safetensors"):
        return f"{name}: {weights_differ(load(old), load(new))}"
    # text: the first line that differs, from shortly before the place on
    lines = old.decode().splitlines()
    others = new.decode().splitlines()
    for number, (was, now) in enumerate(zip(lines, others, strict=False), 1):
        if was != now:
            same = 0
            while was[same : same + 1] == now[same : same + 1]:
                same += 1
            shown = slice(max(0, same - 20), same + 60)
            return f"{name}: line {number}: {was[shown]!r}, now {now[shown]!r}"
    return f"{name}: {len(lines)} lines, now {len(others)}"


def weights_differ(old: dict, new: dict) -> str:
    """By how much tensors differ, if they have the same names and shapes."""
    largest = 0.0
    if old.keys() != new.keys():
        return "other tensors"
    for key, was in old.items():
        now = new[key]
        if (was.shape, was.dtype) != (now.shape, now.dtype):
            return f"{key} has another shape or dtype"
        largest = max(largest, (was.double() - now.double()).abs().max().item())
    return f"weights differ by at most {largest:.3g}"


def compare(old: Path, new: Path) -> int:
    """Print each difference of two directories and a summary; returns the exit code."""
    before = results(old)
    after = results(new)
    different = 0
    for name, content in before.items():
        line = difference(name, content, after.get(name))
        if line:
            print(line)
            different += 1
    print(
        f"{len(before) - different} of {len(before)} results are the same, "
        f"{sum(map(len, before.values())):,} bytes in all; "
        f"{len(after.keys() - before.keys())} are new"
    )
    return int(different > 0 or not before)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit", nargs="?", help="the old tree")
    parser.add_argument("--old", type=Path, help="the old tree, as a directory")
    parser.add_argument("--new", type=Path, default=ROOT, help="the new tree (default: this one)")
    parser.add_argument("--nproc", type=int, choices=(1, 2), default=1, help="processes of a run")
    parser.add_argument("--kernels", choices=("on", "off"), default="on", help="compiled kernels")
    parser.add_argument("--old-flags", default="", help="further flags of the old loop.py")
    parser.add_argument("--new-flags", default="", help="further flags of the new loop.py")
    parser.add_argument("--keep", type=Path, help="empty directory to leave both runs in")
    parser.add_argument("--runs", type=Path, nargs=2, metavar=("OLD", "NEW"))
    parser.add_argument("--hashes", type=Path, metavar="RUN")
    args = parser.parse_args()
    # runs that exist
    if args.hashes:
        for name, content in results(args.hashes).items():
            print(hashlib.sha256(content).hexdigest(), name)
        return
    if args.runs:
        sys.exit(compare(*args.runs))
    if not args.commit and not args.old:
        parser.error("give a commit, --old DIR, --runs OLD NEW or --hashes RUN")
    # runs to be made, both at once
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor() as pool:
        out = (args.keep or Path(scratch)).resolve()
        tree = args.old.resolve() if args.old else unpack(args.commit, Path(scratch) / "tree")
        jobs = [
            pool.submit(make, tree, out / "old", args.old_flags, args),
            pool.submit(make, args.new.resolve(), out / "new", args.new_flags, args),
        ]
        try:
            for job in jobs:
                job.result()
        except RuntimeError as error:
            print(error, file=sys.stderr)
            sys.exit(2)
        sys.exit(compare(out / "old", out / "new"))


if __name__ == "__main__":
    main()

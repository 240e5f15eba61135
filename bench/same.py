"""Compare two versions of the program byte for byte: texts, scores and weights of a run.

    python -m bench.same 7187c6c                 a commit against this tree, a minute
    python -m bench.same --runs runs/a runs/b    two runs that exist

Each tree makes the tests' micro world with its own code and runs the loop and the controls on it,
on one thread; SYNPO_KERNELS=0 compares plain PyTorch. Then every .jsonl, *eval*.json, result.json
and .safetensors file of the old tree must be in the new one, byte for byte. Left out are
metrics.jsonl and manifests, which hold times, judges' verdicts, and parts and caches, which only
save work. Exit code 1: the results differ; 2: a tree could not make them.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.command import ROOT, make_parser

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
    archive = folder.with_suffix(".tar")
    subprocess.run(["git", "archive", "--output", archive, commit], cwd=ROOT, check=True)
    shutil.unpack_archive(archive, folder, filter="data")
    return folder


def make(tree: Path, out: Path) -> None:
    """Write the micro world, a run of two iterations and its controls, by the code of a tree."""

    def python(*words: str) -> str:
        command = [sys.executable, *words]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{tree}: {' '.join(words)}\n{done.stdout[-999:]}\n{done.stderr}")
        return done.stdout

    # the world has options of its own, which the tree's own loop.py knows
    world = json.loads(python("-c", WORLD, str(out / "world")).splitlines()[-1])
    run = str(out / "run")
    loop = ["loop.py", *(f"--{name}={value}" for name, value in world.items())]
    loop += ["--out", run, "--keep-improvers"]
    # controls were an option of the loop once
    if (tree / "methods/controls.py").is_file():
        python(*loop)
        python("-m", "methods.controls", "--run", run)
    else:
        python(*loop, "--controls")


# ------------------------------------------------------------------------------- what is compared


def results(root: Path) -> dict[str, bytes]:
    """Name below root -> content of each result, sorted."""
    found = {}
    # in the order of their paths, so that a difference is shown where it arises first
    for path in sorted(path for pattern in RESULTS for path in root.rglob(pattern)):
        if NOT_RESULTS.search(str(path)):
            continue
        found[path.relative_to(root).as_posix()] = path.read_bytes()
    return found


def difference(name: str, old: bytes, new: bytes | None) -> str:
    """Where a result differs, in one line."""
    if new is None:
        return "missing"
    if name.endswith(".safetensors"):
        return "the weights differ"
    # text: the first line that differs, from shortly before the place on
    lines = old.decode().splitlines()
    others = new.decode().splitlines()
    for number, (was, now) in enumerate(zip(lines, others, strict=False), 1):
        if was != now:
            same = 0
            while was[same : same + 1] == now[same : same + 1]:
                same += 1
            shown = slice(max(0, same - 20), same + 60)
            return f"line {number}: {was[shown]!r}, now {now[shown]!r}"
    return f"{len(lines)} lines, now {len(others)}"


def compare(old: Path, new: Path) -> int:
    """Print each difference of two directories and a summary; returns the exit code."""
    before = results(old)
    after = results(new)
    different = [name for name in before if before[name] != after.get(name)]
    for name in different:
        print(f"{name}: {difference(name, before[name], after.get(name))}")
    print(
        f"{len(before) - len(different)} of {len(before)} results are the same, "
        f"{sum(map(len, before.values())):,} bytes in all; "
        f"{len(after.keys() - before.keys())} are new"
    )
    return int(bool(different) or not before)


def main() -> None:
    parser = make_parser(__doc__)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("commit", nargs="?", help="the old tree")
    given.add_argument("--runs", type=Path, nargs=2, metavar=("OLD", "NEW"))
    args = parser.parse_args()
    if args.runs:
        sys.exit(compare(*args.runs))
    # runs to be made, both at once
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        scratch = Path(folder)
        runs = (scratch / "old", scratch / "new")
        trees = (unpack(args.commit, scratch / "tree"), ROOT)
        try:
            list(pool.map(make, trees, runs))
        except RuntimeError as error:
            print(error, file=sys.stderr)
            sys.exit(2)
        sys.exit(compare(*runs))


if __name__ == "__main__":
    main()

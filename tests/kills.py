"""Kill a tiny run again and again: does a resumed run end with the bytes of an undisturbed one?

    python -m tests.kills --kills 300 --seed 1 --out /tmp/kills
    python -m tests.kills --kills 0 --torchrun 20 --damages 100 --out /tmp/kills

A run of two iterations is made once undisturbed, which shows the file operations of each stage.
Others are killed --per-run times each, at places drawn evenly over the stages, and resumed by the
same command until they finish. Then every file must be the same, no other file may be left, and no
process may be running. Kinds of kill:

    operation   SIGKILL before a file operation: open for writing, rename, unlink, mkdir, ...
    write       the kernel ends the process inside a write, after a part of the bytes
    moment      SIGKILL at a random time between two file operations
    term, int   SIGTERM and SIGINT at such a time: one line of ours, exit code 143 and 130

What may differ (VARYING): times and what is computed from them; memory in use; the repository's
commit; the names of files of cached log-probs, which are compared as one sorted file.

--torchrun M: M kills of two ranks under the real torchrun, of the agent, one rank or both.
--damages D: D files of finished and half-finished runs are damaged (tests/damages.py).

The last line is a JSON object; exit code 1: something differed, and the run is kept in DIR.
"""

import argparse
import ctypes
import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import loop
from bench.same import WORLD, difference
from plumbing.options import cli
from tests.damages import damages
from tests.killed import Plan, install

ROOT = Path(__file__).resolve().parents[1]
SMALL = """--seeds-limit 8 --heldout-limit 4 --heldout-samples 2 --generator.draws 1
--generator.batch 4 --prompts.lists 16 --prompts.max-prompts 8 --prompts.chunk 8 --answers.chunk 4
--rewrites.chunk 4 --answers.max-new-tokens 12 --rewrites.max-new-tokens 12 --improver.epochs 1
--improver.batch 4 --pairs.max-pairs 6 --policy.epochs 1 --policy.batch 4""".split()
SIGNALS = {"moment": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
KINDS = ("operation", "write", *SIGNALS)
RANKS = ("agent", "rank", "both")  # of torchrun: which processes are killed
CODES = {"operation": -9, "write": -25, "moment": -9, "term": 143, "int": 130}
LINE = "interrupted; rerun the same command to resume\n"
PATIENCE = 120  # seconds for a process to end, and for what it has started to end after it
SET_CHILD_SUBREAPER = 36  # of prctl
SET_PIPE_SIZE = 1031  # of fcntl

# Speeds, which a stage does not have if nothing was left to do; times and memory in JSON; times of
# files in manifests, where they have 19 digits; the commit, which may change meanwhile; size and
# hash of the files that hold such numbers.
VARYING = [
    (rb'"tokens_per_second": ?(\[.*?\]|[\d.e+-]+),?\s*', b""),
    (rb'"(time|seconds|memory_gb)": ?(\[.*?\]|[\d.e+-]+)', rb'"\1": 0'),
    (rb"\b\d{19}\b", b"0"),
    (rb"\b[0-9a-f]{40}\b", b"0"),
    (rb'"digest": "\w{16}"', b""),  # of a manifest, times included
    (rb'(/metrics\.jsonl": \[\s+)\d+,\s+0,\s+"\w+"', rb"\1"),
]


# ------------------------------------------------------------------------------- one process


@dataclass
class End:
    """How a process ended."""

    code: int
    output: str
    errors: str
    told: list  # where its plan was carried out: [seconds, stage, operation, path, pid], or nothing
    left: int  # processes that it left running


def adopt_orphans() -> None:
    """Children of a dead process become children of this one, so that none is overlooked."""
    if ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        sys.exit("error: this command needs Linux")


def large_pipe() -> tuple[int, int]:
    """A pipe that holds all that a process prints. Of a file, "cut" would limit the size."""
    ends = os.pipe()
    fcntl.fcntl(ends[1], SET_PIPE_SIZE, 1 << 20)
    os.set_blocking(ends[0], False)
    return ends


def read_all(pipe: int) -> str:
    parts = []
    try:
        while part := os.read(pipe, 1 << 16):
            parts.append(part)
    except BlockingIOError:  # a process that was left still holds the other end
        pass
    os.close(pipe)
    return b"".join(parts).decode(errors="replace")


def children() -> list[int]:
    task = f"/proc/self/task/{os.getpid()}/children"
    return [int(pid) for pid in Path(task).read_text().split()]


def be_run(argv: list[str], plan: Plan, output: int, errors: int) -> None:
    """What a fork does: loop.py as a command. It has imported all already."""
    code = 1
    try:
        os.dup2(output, 1)
        os.dup2(errors, 2)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)  # the first is ignored in `command &`
        sys.argv = ["loop.py", *argv]
        sys.stdout = os.fdopen(1, "w")
        sys.stderr = os.fdopen(2, "w")
        install(plan)
        cli(loop.main, default_config="recipes/demo.toml")
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start_fork(argv: list[str], plan: Plan, output: int, errors: int) -> int:
    pid = os.fork()
    if pid == 0:
        be_run(argv, plan, output, errors)
    return pid


def start_torchrun(argv: list[str], plan: Plan, output: int, errors: int) -> int:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "KILL_PLAN": json.dumps(asdict(plan))}
    return subprocess.Popen(
        [*torchrun, "--nproc-per-node", "2", "-m", "tests.killed", *argv],
        cwd=ROOT,
        env=env,
        stdout=output,
        stderr=errors,
    ).pid


def ended(pid: int) -> int | None:
    """The exit code of a child that has ended."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def carry_out(pid: int, plan: Plan, kind: str, delay: float) -> int:
    """Wait for a process to end; kill it, if that is left to us, after its plan says so."""
    until = time.monotonic() + PATIENCE
    told = Path(plan.told)
    waiting = plan.act == "say" and plan.stage != ""
    while (code := ended(pid)) is None:
        if waiting and told.exists():
            waiting = False
            time.sleep(delay)
            rank = json.loads(told.read_text())[-1]
            targets = {"agent": [pid], "rank": [rank], "both": [pid, rank]}
            for target in targets.get(kind, [pid]):
                os.kill(target, SIGNALS.get(kind, signal.SIGKILL))
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return -1000  # it hung
        time.sleep(0.002)
    return code


def orphans() -> int:
    """How many processes do not end by themselves; they are ended here."""
    until = time.monotonic() + PATIENCE
    while children() and time.monotonic() < until:
        try:
            os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        time.sleep(0.002)
    left = children()
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return len(left)


def run(argv: list[str], plan: Plan, kind: str = "", delay: float = 0, ranks: int = 1) -> End:
    """loop.py in one process, or two under torchrun, to its end or its death."""
    Path(plan.told).unlink(missing_ok=True)
    output, errors = large_pipe(), large_pipe()
    start = start_fork if ranks == 1 else start_torchrun
    pid = start(argv, plan, output[1], errors[1])
    os.close(output[1])
    os.close(errors[1])
    code = carry_out(pid, plan, kind, delay)
    left = orphans()
    told = Path(plan.told)
    where = json.loads(told.read_text()) if told.exists() else []
    return End(code, read_all(output[0]), read_all(errors[0]), where, left)


# ------------------------------------------------------------------------------- what is compared


def normal(root: Path, path: Path) -> bytes:
    """A file's content without what may differ."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        return content
    runs = re.escape(str(root.parents[1])).encode()
    content = re.sub(runs + rb"/\w+/run\b", b"RUN", content)
    for pattern, replacement in VARYING:
        content = re.sub(pattern, replacement, content)
    return content


def contents(root: Path) -> dict[str, bytes]:
    """Name -> content of every file and empty folder of a run."""
    found = {}
    cached = []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if name.startswith("reference/"):
            if path.is_file():
                cached += cached_scores(path)
        elif path.is_file():
            found[name] = normal(root, path)
        elif not any(path.iterdir()):
            found[name + "/"] = b""
    return {**found, "reference": "\n".join(sorted(cached)).encode()}


def cached_scores(path: Path) -> list[str]:
    """The entries of a file of cached log-probs; its name, if it is none."""
    if path.suffix != ".part" or path.name.startswith("."):
        return [f"leftover {path.name}"]
    try:
        value = json.loads(path.read_text().partition("\n")[2])
    except ValueError:
        return [f"damaged {path.name}"]
    entries = value.items() if isinstance(value, dict) else value
    return [json.dumps(entry) for entry in entries]


def differences(peace: dict[str, bytes], run: Path, ordered: bool = True) -> list[str]:
    """How a run differs from the undisturbed one: a line for each file.

    ordered: the report lists stages by their times, so not if some were made again.
    """
    found = contents(run)
    if not ordered:
        peace, found = unordered(peace), unordered(found)
    lines = []
    for name in peace.keys() | found.keys():
        if name not in peace:
            lines.append(f"{name}: left over")
        elif peace[name] != found.get(name):
            lines.append(f"{name}: {describe(name, peace[name], found.get(name))}")
    return sorted(lines)


def unordered(files: dict[str, bytes]) -> dict[str, bytes]:
    """With the parts of the lists of stages sorted."""
    listed = {}
    for name in files.keys() & {"metrics.jsonl", "report.html"}:
        listed[name] = b"\n".join(sorted(re.split(rb"[\n,{}\[\]]+ *", files[name])))
    return {**files, **listed}


def describe(name: str, old: bytes, new: bytes | None) -> str:
    try:
        return difference(name, old, new)
    except UnicodeDecodeError:
        return "not text any more"


# ------------------------------------------------------------------------------- the campaign


@dataclass
class Campaign:
    out: Path
    world: dict[str, str]
    random: random.Random
    ranks: int = 1
    runs: int = 0
    counts: Counter = field(default_factory=Counter)  # (kind, stage, operation) -> kills
    wrong: list[str] = field(default_factory=list)
    slowest: float = 0.0  # seconds from a kill to the end of the last process

    def __post_init__(self):
        self.peace = self.out / "0000" / "run"
        log = self.out / "events.jsonl"
        log.unlink(missing_ok=True)
        end = run(self.argv(self.peace), self.plan(self.peace, log=str(log)), ranks=self.ranks)
        if end.code or end.left:
            sys.exit(f"error: the undisturbed run failed\n{end.output[-999:]}\n{end.errors}")
        self.text = end.output
        self.expected = contents(self.peace)
        self.events = [json.loads(line) for line in log.read_text().splitlines()]
        self.stages = list(dict.fromkeys(event[1] for event in self.events))

    def argv(self, out: Path) -> list[str]:
        named = [text for name, value in self.world.items() for text in (f"--{name}", value)]
        return [*named, *SMALL, "--out", str(out)]

    def plan(self, out: Path, **how) -> Plan:
        return Plan(str(out), stages=getattr(self, "stages", []), told=f"{self.out}/told", **how)

    def start(self, out: Path, plan: Plan, kind: str = "", delay: float = 0, more=()) -> End:
        return run([*self.argv(out), *more], plan, kind, delay, self.ranks)

    def differences(self, out: Path, ordered: bool = True) -> list[str]:
        return differences(self.expected, out, ordered)

    def new_run(self) -> Path:
        self.runs += 1
        return self.out / f"{self.runs:04}" / "run"  # its name is in the report

    def draws(self, out: Path, kills: int, kinds: tuple[str, ...]) -> list[tuple]:
        """Kills of a run, in the order of its stages."""
        planned = Counter()
        for (kind, stage, _), number in self.counts.items():
            planned[short(stage)] += number
            planned[kind] += number
        drawn = []
        for _ in range(kills):
            drawn.append(self.draw(out, kinds, planned))
            planned.update([short(drawn[-1][0].stage), drawn[-1][1]])
        return sorted(drawn, key=lambda kill: (self.stages.index(kill[0].stage), kill[0].event))

    def draw(self, out: Path, kinds: tuple[str, ...], planned: Counter) -> tuple[Plan, str, float]:
        """A kill of a stage that was hit seldom: its plan, its kind, and how long it waits."""
        stage = min(self.stages, key=lambda s: (planned[short(s)], self.random.random()))
        places = [i for i, event in enumerate(self.events) if event[1] == stage]
        kind = min(kinds, key=lambda k: (planned[k], self.random.random()))
        n = self.random.randrange(len(places))
        how = {"stage": stage, "event": n + 1, "act": "say"}
        if kind in ("operation", "write"):
            how["act"] = "kill" if kind == "operation" else "cut"
            how["bytes"] = int(8000 ** self.random.random()) - 1
        # a moment lies between this event and the next one
        after = self.events[min(places[n] + 1, len(self.events) - 1)]
        pause = after[0] - self.events[places[n]][0]
        return self.plan(out, **how), kind, self.random.uniform(0, max(pause, 0.002))

    def one_run(self, kills: int, kinds: tuple[str, ...] = KINDS) -> int:
        """A run that is killed up to so many times; returns how often it was."""
        out = self.new_run()
        done = 0
        story = []
        for plan, kind, delay in self.draws(out, kills, kinds):
            end = self.start(out, plan, kind, delay)
            story.append(f"{kind} {end.told[1:3]} code {end.code}")
            self.check(end, kind, out, story)
            if end.code == 0:  # it was over before
                break
            if end.told:
                self.counts[kind, end.told[1], end.told[2]] += 1
                done += 1
        end = self.start(out, self.plan(out))
        found = self.differences(out) if end.code == 0 else []
        if end.code or end.left:
            found = [f"exit code {end.code}, {end.left} left running: {end.errors[-999:]}"]
        self.keep(out, found, story)
        return done

    def check(self, end: End, kind: str, out: Path, story: list[str]) -> None:
        """How a killed process must end."""
        found = []
        if end.left:
            found.append(f"{end.left} processes left running")
        if self.ranks == 1 and end.code not in (0, CODES[kind]):
            found.append(f"exit code {end.code}: {end.errors[-999:]}")
        elif self.ranks == 1 and kind in ("term", "int") and end.code and end.errors != LINE:
            found.append(f"printed {end.errors[-999:]!r}")
        self.wrong += [f"{out.parent.name}: {line} ({story[-1]})" for line in found]

    def keep(self, out: Path, found: list[str], story: list[str]) -> None:
        """Drop a run that is right; keep another, and say what is wrong with it."""
        if not found:
            shutil.rmtree(out.parent)
            return
        self.wrong += [f"{out.parent.name}: {line}" for line in found[:5]]
        print(f"{out}: DIFFERS after {'; '.join(story)}", *found[:5], sep="\n  ", flush=True)

    def kill(self, kills: int, per_run: int, kinds: tuple[str, ...] = KINDS) -> None:
        begin = time.monotonic()
        left = kills
        while left > 0:
            done = self.one_run(min(per_run, left), kinds)
            left -= done
            passed = time.monotonic() - begin
            print(f"{kills - left} of {kills} kills, {self.runs} runs ({passed:.0f} s)", flush=True)
            if not done and len(self.wrong) > 20:
                break

    def histogram(self) -> dict:
        """Kills by stage, by kind, and by the operation at or after which they came."""
        by_stage, by_kind, by_operation = Counter(), Counter(), Counter()
        for (kind, stage, operation), number in self.counts.items():
            by_stage[short(stage)] += number
            by_kind[kind] += number
            by_operation[operation] += number
        for title, counts in (("stage", by_stage), ("kind", by_kind), ("operation", by_operation)):
            print(f"\nkills by {title}")
            for name, number in counts.most_common():
                print(f"  {name:<20} {number:5}")
        return {"kills": sum(by_kind.values()), "stages": by_stage, "kinds": by_kind}


def short(stage: str) -> str:
    """A stage's name in any iteration."""
    return stage.rpartition("/")[2]


def make_world(folder: Path) -> dict[str, str]:
    """The tests' micro world, made in another process: a fork after a backward pass cannot train.

    One that was made before is used again.
    """
    about = folder / "world.json"
    if not about.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", WORLD, str(folder)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: {done.stderr}")
        about.write_text(done.stdout.splitlines()[-1])
    return json.loads(about.read_text())


def campaign(args, folder: str, seed: str, ranks: int = 1) -> Campaign:
    out = (args.out / folder).resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    world = make_world((args.world or args.out / "world").resolve())
    return Campaign(out, world, random.Random(f"{args.seed} {seed}"), ranks)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--torchrun", type=int, default=0, help="kills of two ranks")
    parser.add_argument("--per-run", type=int, default=10, help="kills of a run, one after another")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--world", type=Path, help="a folder, to make the world in once")
    parser.add_argument("--damages", type=int, default=0, help="damaged files")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    adopt_orphans()
    begin = time.monotonic()

    results = {}
    wrong = []
    if args.kills:
        one = campaign(args, "one", "kills")
        one.kill(args.kills, args.per_run)
        results["one_process"] = one.histogram()
        wrong += one.wrong
    if args.torchrun:
        two = campaign(args, "two", "torchrun", ranks=2)
        two.kill(args.torchrun, min(args.per_run, 5), RANKS)
        results["torchrun"] = two.histogram()
        wrong += two.wrong
    if args.damages:
        hurt = campaign(args, "hurt", "damages")
        results["damages"] = damages(hurt, args.damages)
        wrong += hurt.wrong
    for line in wrong[:20]:
        print(line)
    seconds = round(time.monotonic() - begin, 1)
    print(json.dumps({**results, "wrong": len(wrong), "seconds": seconds}))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

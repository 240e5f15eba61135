"""loop.py with a plan of its own death, for tests/kills.py: `python -m tests.killed --out DIR ...`

The plan is JSON in the environment variable KILL_PLAN. What counts as an event is a file operation
in the run directory that Python's audit hooks tell of, and the writing of weights, which is native
code. The product knows nothing of this.
"""

import json
import os
import re
import resource
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import checkpoint
import loop
from plumbing.options import cli
from plumbing.ranks import RANK

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Audit event -> (its name here, index of the path, index of the folder's descriptor if any).
EVENTS = {
    "os.rename": ("rename", 1, 3),
    "os.remove": ("unlink", 0, 1),
    "os.mkdir": ("mkdir", 0, 2),
    "os.rmdir": ("rmdir", 0, 1),
    "os.truncate": ("truncate", 0, None),
    "shutil.rmtree": ("rmtree", 0, 1),
    "shutil.copyfile": ("copy", 1, None),
}


@dataclass
class Plan:
    """Where a process dies, and how. Without a stage it lives, and may keep a log of its events."""

    out: str  # run directory
    log: str = ""  # file that gets a line [seconds, stage, operation, path] for each event
    stages: list[str] = field(default_factory=list)  # all of a run, in their order
    stage: str = ""  # one of them
    event: int = 1  # the n-th of the stage; if it has fewer, the first event of a later stage
    act: str = "kill"  # or "cut": a write ends after `bytes`; "say": another process kills
    bytes: int = 0
    rank: int = 0
    told: str = ""  # file that says where the plan was carried out, once it was


def place(path: str, out: str) -> str:
    """The stage whose file this is, such as iter1/policy."""
    first, *rest = Path(path).relative_to(out).parts or ("",)
    if rest and rest[-1] == "README.md":
        return "report"  # a model card
    if re.fullmatch(r"iter\d+", first):
        return f"{first}/{rest[0].split('.')[0]}" if rest else "start"
    if first.split(".")[0] in ("generator", "reference"):
        return first.split(".")[0]
    return "report" if first.startswith(("metrics", "scores", "report")) else "start"


class Hook:
    def __init__(self, plan: Plan):
        self.plan = plan
        self.left = plan.event
        self.begin = time.monotonic()
        self.order = {stage: i for i, stage in enumerate(plan.stages)}
        self.busy = RANK != plan.rank  # in the hook itself, or done: nothing more is an event

    def __call__(self, event: str, args: tuple) -> None:
        if event == "open":
            if args[2] & WRITING:
                self.tell("open", args[0], None)
        elif event in EVENTS:
            name, path, folder = EVENTS[event]
            self.tell(name, args[path], args[folder] if folder is not None else None)

    def tell(self, operation: str, path, folder: int | None) -> None:
        if self.busy or not isinstance(path, str | bytes | os.PathLike):
            return
        path = os.fsdecode(path)
        if folder not in (None, -1):
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        path = os.path.abspath(path)
        if not path.startswith(self.plan.out + "/"):
            return
        self.busy = True
        stage = place(path, self.plan.out)
        seen = [round(time.monotonic() - self.begin, 4), stage, operation, path]
        if self.plan.log:
            with open(self.plan.log, "a") as log:
                log.write(json.dumps(seen) + "\n")
        self.busy = self.is_now(stage) and self.act(seen)

    def is_now(self, stage: str) -> bool:
        if not self.plan.stage or stage not in self.order:
            return False
        self.left -= stage == self.plan.stage
        late = self.order[stage] > self.order[self.plan.stage]
        return late or self.left == 0

    def act(self, seen: list) -> bool:
        with open(self.plan.told + ".tmp", "w") as told:
            json.dump([*seen, os.getpid()], told)
        os.rename(self.plan.told + ".tmp", self.plan.told)
        if self.plan.act == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.plan.act == "cut":
            # the kernel ends the process inside the write that reaches this size
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.plan.bytes, self.plan.bytes))
        return True


def install(plan: Plan) -> None:
    """From now on, this process follows a plan."""
    hook = Hook(plan)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    save_file = checkpoint.save_file

    def told_save_file(tensors, path, **how):
        hook.tell("weights", path, None)
        save_file(tensors, path, **how)

    checkpoint.save_file = told_save_file
    sys.addaudithook(hook)


def main() -> None:
    install(Plan(**json.loads(os.environ["KILL_PLAN"])))
    cli(loop.main, default_config="recipes/demo.toml")


if __name__ == "__main__":
    main()

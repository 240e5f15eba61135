"""Damage files of finished and half-finished runs: does the next start notice? For tests/kills.py.

Each time one file is cut, edited, emptied, replaced by another or deleted. Then the same command
must end with the bytes of the undisturbed run (the file was made again, or did not matter), or
refuse in one line that names the file or its result. Of a finished run's file some are edited with
their time kept; then --verify must notice.
"""

import os
import random
import shutil
from collections import Counter
from pathlib import Path

WAYS = ("cut", "edit", "empty", "replace", "delete", "edit, time kept")
NOTICES = ("making it again", "damaged", "begun on another machine")


def damage(path: Path, way: str, others: list[Path], draw: random.Random) -> None:
    """Damage a file in one of WAYS; `others` may replace it."""
    content = path.read_bytes()
    status = path.stat()
    if way == "cut":
        path.write_bytes(content[: draw.randrange(len(content))])
    elif way == "empty":
        path.write_bytes(b"")
    elif way == "delete":
        path.unlink()
    elif way == "replace":
        path.write_bytes(draw.choice(others).read_bytes())
    else:
        place = draw.randrange(len(content))
        changed = content[place] ^ (1 << draw.randrange(8))
        path.write_bytes(content[:place] + bytes([changed]) + content[place + 1 :])
    if way == "edit, time kept":
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def kind_of(path: Path) -> str:
    """What a file is, for the table of outcomes."""
    unfinished = any(part.endswith(".partial") for part in path.parts)
    name = path.name
    if "checkpoint" in path.parts:
        name = "done" if name == "done" else "shard"
    elif name.endswith("manifest.json"):
        name = "manifest"
    elif path.suffix in (".part", ".safetensors", ".jsonl"):
        name = path.suffix[1:]
    elif path.suffix == ".json" and name not in ("config.json", "identity.json"):
        name = "json"
    return f"unfinished {name}" if unfinished else name


def half_finished(campaign, number: int) -> list[Path]:
    """Copies of one run, each made after a kill."""
    out = campaign.new_run()
    copies = []
    draws = campaign.draws(out, number, ("moment", "operation"))
    for i, (plan, kind, delay) in enumerate(draws):
        campaign.start(out, plan, kind, delay)
        copies.append(shutil.copytree(out, out.parent / f"copy{i}" / "run"))
    return copies


def outcome(campaign, out: Path, name: str, way: str) -> str:
    """What the next start made of a damaged run; begins with "WRONG" where that is not right."""
    verify = ["--verify"] if way == "edit, time kept" else []
    end = campaign.start(out, campaign.plan(out), more=verify)
    if end.code == 2:
        one_line = end.errors.startswith("error: ") and end.errors.count("\n") == 1
        named = Path(name).name in end.errors or name.split(".")[0] in end.errors
        return "refused" if one_line and named else f"WRONG refusal: {end.errors[-999:]}"
    if end.code:
        return f"WRONG exit code {end.code}: {end.errors[-999:]}"
    if verify:
        # the run's options name the flag until it is started without
        campaign.start(out, campaign.plan(out))
    # a part of the cache that nothing has read stays damaged: whoever reads it checks its digest
    found = campaign.differences(out, ordered=False)
    found = [line for line in found if not line.startswith("reference:")]
    if found:
        return f"WRONG: {found[0]}" + (f" and {len(found) - 1} more" if found[1:] else "")
    noticed = any(notice in end.output for notice in NOTICES)
    return "made again" if noticed else "no effect"


def choose(files: dict[str, list[Path]], counts: Counter, draw: random.Random) -> Path:
    """A file of the kind that was damaged least often."""
    tried = Counter()
    for (kind, _), times in counts.items():
        tried[kind] += times
    kind = min(files, key=lambda kind: (tried[kind], draw.random()))
    return draw.choice(files[kind])


def damage_one(campaign, source: Path, way: str, counts: Counter) -> None:
    """Damage a file of a copy of a run, start it again, and count what came of it."""
    draw = campaign.random
    out = shutil.copytree(source, campaign.new_run())
    files = [f for f in sorted(out.rglob("*")) if f.is_file() and f.stat().st_size]
    by_kind = {}
    for file in files:
        kind = kind_of(file.relative_to(out))
        by_kind.setdefault(kind, []).append(file)
    path = choose(by_kind, counts, draw)
    name = path.relative_to(out).as_posix()
    kind = kind_of(path.relative_to(out))
    others = [f for f in files if f != path]
    damage(path, way, others, draw)

    # the same command again
    result = outcome(campaign, out, name, way)
    counts[kind, result.split()[0].rstrip(":")] += 1
    if result.startswith("WRONG"):
        campaign.wrong.append(f"{out.parent.name}: {way} {name}: {result}")
        print(campaign.wrong[-1], flush=True)
    shutil.rmtree(out.parent)


def damages(campaign, number: int) -> dict:
    """So many damages; returns counts, and adds what is wrong to the campaign's list."""
    halves = half_finished(campaign, max(2, min(12, number // 8)))
    counts = Counter()
    for i in range(number):
        # the finished run and a half-finished one in turn; --verify is about the former
        if i % 2:
            source = campaign.peace
            ways = WAYS
        else:
            source = campaign.random.choice(halves)
            ways = WAYS[:-1]
        damage_one(campaign, source, ways[i // 2 % len(ways)], counts)

    # what came of them
    print("\ndamages by kind of file")
    for (kind, result), times in sorted(counts.items()):
        print(f"  {kind:<28} {result:<10} {times:5}")
    total = Counter()
    for (_, result), times in counts.items():
        total[result] += times
    return dict(total)

"""Figures of benchmarks, and the tables of README.md and docs/ that show them.

    python -m bench.memory --json docs/figures/memory.json    every benchmark has --json
    python -m bench.tables                                    rewrite the tables of all pages
    python -m bench.tables --check                            exit code 1 if a page is out of date

docs/figures/NAME.json: {commit, command, cpu, torch, threads, figures}, where figures are the rows
of a table, or several tables by name. A page shows one between two markers, each on its own line:

    <!-- table: NAME -->  or  <!-- table: NAME/TABLE -->
    <!-- end -->

So no number of a table is typed by hand, and each says how it was measured.
"""

import argparse
import re
import shlex
import sys
from pathlib import Path

from eval.table import show_cell
from plumbing.files import InputError, load_json, write_json, write_text
from plumbing.options import ROOT
from plumbing.stage import commit, machine

TABLE = re.compile(r"(<!-- table: ([\w-]+)(?:/([\w-]+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")


def write_figures(path: Path | None, figures: list[dict] | dict[str, list[dict]]) -> None:
    """Keep what the running command measured, and how; nothing without a path."""
    if path is None:
        return
    # the command but for --json, and the machine
    module = Path(sys.argv[0]).stem
    flags = re.sub(r" ?--json[ =]\S+", "", shlex.join(sys.argv[1:]))
    about = machine()
    write_json(
        path,
        {
            "commit": commit(),
            "command": f"python -m bench.{module} {flags}".strip(),
            "cpu": about["gpu"] or about["cpu"],
            "torch": about["torch"],
            "threads": about["threads"],
            "figures": figures,
        },
    )


def markdown(rows: list[dict]) -> str:
    """Rows with equal keys as a table; columns of numbers are aligned to the right."""
    names = list(rows[0])
    lines = [[show_cell(value) for value in row.values()] for row in rows]
    columns = zip(*lines, strict=True)
    numeric = [all(re.match(r"[-+]?\d|-?$", cell) for cell in column) for column in columns]
    rule = ["---:" if right else "---" for right in numeric]
    return "".join(f"| {' | '.join(line)} |\n" for line in (names, rule, *lines))


def render(page: str, figures: Path) -> str:
    """The text of a page with every table made from its figures."""

    def fill(match: re.Match) -> str:
        opening, name, table, end = match.groups()
        found = load_json(figures / f"{name}.json")
        rows = found["figures"][table] if table else found["figures"]
        threads = "1 thread" if found["threads"] == 1 else f"{found['threads']} threads"
        source = f"{found['cpu']}, torch {found['torch']}, {threads}"
        source = f"`{found['command']}` at {found['commit'][:7]}; {source}"
        return f"{opening}{markdown(rows)}\n{source}\n{end}"

    return TABLE.sub(fill, page)


def update(root: Path, check: bool) -> list[Path]:
    """The pages that differ from their figures; they are rewritten, unless only checked."""
    stale = []
    # the front page and every page of docs/
    for path in [root / "README.md", *sorted(root.glob("docs/*.md"))]:
        page = path.read_text("utf-8")
        try:
            rendered = render(page, root / "docs/figures")
        except KeyError as error:
            raise InputError(f"{path}: its figures have no table {error}; fix the marker") from None
        if rendered != page:
            stale.append(path)
            if not check:
                write_text(path, rendered)
    return stale


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args()
    # a line for each page
    try:
        stale = update(ROOT, args.check)
    except InputError as error:
        sys.exit(f"error: {error}")
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'out of date' if args.check else 'rewritten'}")
    sys.exit(args.check and bool(stale))


if __name__ == "__main__":
    main()

"""What must stay true of the repository as a whole: size, docstrings, imports, the README's table, no leftovers."""

import ast
import io
import re
import subprocess
import symtable
import tokenize
from pathlib import Path

import pytest
from conftest import ROOT

CORE = sorted(ROOT.glob("*.py"))
STAGES = ("sample", "train", "gen_prompts", "improve", "reward", "dpo", "loop")
CEILING = 2000
# A file may import from files of a lower level only.
LEVEL = {
    "data": 0,
    "model": 1,
    "sample": 2,
    "train": 2,
    "gen_prompts": 3,
    "reward": 3,
    "dpo": 3,
    "improve": 4,
    "loop": 5,
}
OUTSIDE = {
    "eval",
    "scorers",
    "bench",
    "demo",
    "tests",
    "world",
    "build",
    "heldout",
    "micro",
    "conftest",
}


def code_lines(source: str) -> int:
    """Lines that hold anything but comments, docstrings and blanks."""
    documented = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(
            node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        ) and ast.get_docstring(node):
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    nothing = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    )
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in nothing:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - documented)


def c_lines(source: str) -> int:
    """The same of C: lines that hold anything but comments and blanks."""
    return sum(
        bool(line.strip())
        for line in re.sub(r"/\*.*?\*/", "", source, flags=re.DOTALL).splitlines()
    )


def imports(path: Path) -> set[str]:
    """First names of all modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or ".").split(".")[0])
    return found


def shipped() -> list[Path]:
    """Files in git, and new ones that are not ignored."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def test_code_lines_are_counted_as_they_should():
    assert code_lines('"""Doc\nstring."""\n# comment\n\nx = 1  # one\ny = """a\n\nb"""\n') == 4
    assert (
        code_lines(
            'def f():\n    """Doc."""\n\n\nclass A:\n    """Doc\n    two."""\n    z: int = (\n        1)\n'
        )
        == 4
    )


def test_lines_of_c_are_counted_as_they_should():
    assert c_lines("/* Doc\n   string. */\n\nint x = 1;  /* one */\nint y;\n#if 1\n") == 3


def test_the_core_stays_small():
    counts = {path.name: code_lines(path.read_text()) for path in CORE}
    assert {path.stem for path in CORE} == LEVEL.keys()
    assert sum(counts.values()) < CEILING, counts


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_opens_with_what_its_reader_needs(name):
    text = ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text()))
    assert text.splitlines()[0].endswith("."), "one sentence"
    assert "SynPO" in text.split("What differs from the paper")[0], "the paper's section"
    assert re.search(r"^What differs from the paper", text, re.MULTILINE)
    assert re.search(r"^[^\n`]*\.(jsonl|txt)\b[^\n]* -> \S", text, re.MULTILINE), (
        "files in -> files out"
    )
    assert re.search(rf"^    python {name}\.py\b", text, re.MULTILINE)
    assert re.search(rf"^    torchrun --nproc-per-node 8 {name}\.py --", text, re.MULTILINE)


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_imports_point_downwards(path):
    found = imports(path)
    upwards = [other for other in found & LEVEL.keys() if LEVEL[other] >= LEVEL[path.stem]]
    assert not upwards and not found & OUTSIDE


def defined(path: Path) -> set[str]:
    """Names of a file's own level."""
    symbols = symtable.symtable(path.read_text(), str(path), "exec").get_symbols()
    return {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}


def test_every_name_that_is_imported_is_there():
    """Imports inside functions too, which no start of a program tries: those of bench/ above all."""
    asked, absent = 0, []
    for path in (path for path in shipped() if path.suffix == ".py"):
        for node in ast.walk(ast.parse(path.read_text())):
            source = ROOT / f"{(getattr(node, 'module', None) or '-').replace('.', '/')}.py"
            if isinstance(node, ast.ImportFrom) and source.is_file():
                asked += len(node.names)
                absent += [
                    f"{path.name}: {node.module}.{one.name}"
                    for one in node.names
                    if one.name not in defined(source)
                ]
    assert not absent and asked > 300


def test_only_the_demo_and_eval_lie_outside_the_core():
    """Their files import the core, never each other."""
    for path in ROOT.glob("eval/*.py"):
        assert not imports(path) & (OUTSIDE - {"eval"})
    for path in [*ROOT.glob("losses/*.py"), *ROOT.glob("scorers/*.py")]:
        assert not imports(path) & (
            OUTSIDE - {"scorers"} - ({"eval"} if path.stem == "endpoint" else set())
        )
    for path in ROOT.glob("demo/*.py"):
        assert not imports(path) & (OUTSIDE - {"world"})
    assert imports(ROOT / "demo" / "build.py") & LEVEL.keys(), (
        "or this test finds no imports at all"
    )


def test_the_readmes_table_is_the_files():
    row = re.compile(r"^\| \[([\w./-]+\.(?:py|c))\]\(\1\) \| ([\d,]+) \|", re.MULTILINE)
    table = dict(row.findall((ROOT / "README.md").read_text()))
    assert {path.name for path in CORE} | {"cpu/kernels.c", "cpu/kernels.py"} <= table.keys()
    assert {name: int(count.replace(",", "")) for name, count in table.items()} == {
        name: (c_lines if name.endswith(".c") else code_lines)((ROOT / name).read_text())
        for name in table
    }


def test_no_machine_paths_and_no_unfinished_work():
    # in pieces, so that this file does not hold what it looks for
    pattern = re.compile(
        "|".join(
            ["/wor" + "k/", "/roo" + "t/", "/tmp" + "/w", "TO" + "DO", "FIX" + "ME", "XX" + "X"]
        )
    )
    files, found = shipped(), []
    assert len(files) > 20
    for path in files:
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
            for number, line in enumerate(lines, 1)
            if pattern.search(line)
        ]
    assert not found

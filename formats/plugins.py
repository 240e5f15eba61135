"""Plug-ins: functions out of users' own Python files, named FILE.py:FUNCTION."""

import ast
import importlib.util
import inspect
import os
import re
import sys
import traceback
from contextlib import contextmanager
from functools import cache
from itertools import accumulate
from pathlib import Path

from plumbing.files import InputError, read_text
from plumbing.options import in_project


@cache
def load_function(spec: str):
    """The function "FILE.py:FUNCTION": a user's own loss, scorer, evaluation or preparation.

    What goes wrong while its file is read, or when a plain function is called, is an InputError.
    """
    name, path = spec.rpartition(":")[2], plugin_path(spec)
    if not path.is_file():
        raise InputError(f"{spec}: no such file; write FILE.py:FUNCTION")
    module_name = "plugin_" + re.sub(r"\W", "_", str(path))
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module
    sys.path.append(str(path.parent))  # last: for its neighbours
    with one_line(path):
        module_spec.loader.exec_module(module)
    check_neighbours(path, plugin_files(spec))
    if not hasattr(module, name):
        raise InputError(f"{spec}: {path} has no function {name}")
    function = getattr(module, name)
    # an object that can be called has attributes of its own, which a wrapper would hide
    return one_line(path)(function) if inspect.isfunction(function) else function


def check_neighbours(path: Path, files: list[Path]) -> None:
    """Raise InputError where the plug-in imported another file than the one beside it, which
    counts as its input.
    """
    for file in files:
        parts = file.relative_to(path.parent).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        found = getattr(sys.modules.get(name), "__file__", None)
        if found and file != path and not file.samefile(found):
            raise InputError(f"{path}: import {name} finds {found}, not {file}; rename that file")


def plugin_path(spec: str) -> Path:
    return in_project(spec.rpartition(":")[0]).absolute()


@contextmanager
def one_line(path: Path):
    """Turn an exception into an InputError that names the plug-in's file and line."""
    try:
        yield
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        where = f"{path}: line {lines[-1]}" if lines else path
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{where}: {text}; fix it") from error


def plugin_files(spec: str) -> list[Path]:
    """The file of "FILE.py:FUNCTION" and the neighbours it imports; [] for a built-in name."""
    found = []
    waiting = [plugin_path(spec)] if ".py:" in spec else []
    while waiting:
        path = waiting.pop()
        if path.is_file() and path not in found:
            found.append(path)
            for name in sorted(imported_names(path)):
                # of a.b.c: a, a/b and a/b/c, each a module or a package
                for module in accumulate(name.split("."), os.path.join):
                    waiting += [path.parent / f"{module}.py", path.parent / module / "__init__.py"]
    return found


def imported_names(path: Path) -> set[str]:
    """The dotted names in the import statements of a file, without that of its own package."""
    names = set()
    try:
        tree = ast.parse(read_text(path))
    except SyntaxError as error:
        raise InputError(f"{path}: line {error.lineno}: {error.msg}; fix it") from None
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module or ''}.{alias.name}" for alias in node.names}
    return {name.removeprefix(f"{path.parent.name}.") for name in names}

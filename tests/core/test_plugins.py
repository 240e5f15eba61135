"""Plug-ins: which files they are, and that what goes wrong in one is a line that names it."""

import sys

import pytest
from conftest import refusal

from formats.plugins import load_function, plugin_files
from plumbing.files import InputError


def test_load_function_reads_a_function_of_a_file_and_names_what_is_wrong(tmp_path):
    (tmp_path / "mine.py").write_text("def score(x):\n    return x + 1\n")
    assert load_function(f"{tmp_path}/mine.py:score")(1) == 2
    assert "no function other" in refusal(load_function, f"{tmp_path}/mine.py:other")
    assert "FILE.py:FUNCTION" in refusal(load_function, f"{tmp_path}/none.py:score")


def test_plugins_are_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_function("tests/core/micro.py:gold")(("red", "fox", "jump")).startswith("The red")
    assert plugin_files("tests/core/micro.py:gold")[0].name == "micro.py"


def test_plugin_files_are_the_file_and_the_neighbours_it_imports(tmp_path):
    (tmp_path / "mine.py").write_text("import json\nfrom near import f\nimport a, b as c\n")
    (tmp_path / "near.py").write_text("def f():\n    import deeper\n")
    for name in ("a", "b", "deeper", "unrelated"):
        (tmp_path / f"{name}.py").write_text("import mine\n")
    found = plugin_files(f"{tmp_path}/mine.py:score")
    assert sorted(path.name for path in found) == [
        "a.py",
        "b.py",
        "deeper.py",
        "mine.py",
        "near.py",
    ]
    assert plugin_files("likelihood") == plugin_files("") == []


def test_plugin_files_are_in_packages_and_behind_continued_lines_too(tmp_path):
    package = tmp_path / "package"
    (package / "deep").mkdir(parents=True)
    (tmp_path / "mine.py").write_text(
        "from package import (\n    module,\n)\n"
        "from package.deep import below\n"
        "from a import x, \\\n    y\n"
        "if True:\n    import b, \\\n        c\n"
    )
    (package / "module.py").write_text("from package.sibling import x\nfrom . import other\n")
    for name in ("__init__", "sibling", "other", "unrelated", "deep/below"):
        (package / f"{name}.py").touch()
    for name in "abcx":
        (tmp_path / f"{name}.py").touch()
    found = plugin_files(f"{tmp_path}/mine.py:score")
    assert sorted(str(path.relative_to(tmp_path)) for path in found) == [
        "a.py",
        "b.py",
        "c.py",
        "mine.py",
        "package/__init__.py",
        "package/deep/below.py",
        "package/module.py",
        "package/other.py",
        "package/sibling.py",
    ]


def test_a_plugin_that_is_not_python_is_named(tmp_path):
    (tmp_path / "mine.py").write_text("x = 1\ndef score(rows\n")
    assert "mine.py: line 2: '(' was never closed; fix it" in refusal(
        plugin_files, f"{tmp_path}/mine.py:score"
    )


# ------------------------------------------------------------------------------- failures


BROKEN = {  # source -> what the line says
    "missing import": ("import json\nimport nosuchmodule\n", "line 2: ModuleNotFoundError: No mod"),
    "error at import": ("x = {}\ny = x['a']\n", "line 2: KeyError: 'a'; fix it"),
    "syntax": ("x = 1\ndef score(rows\n", "SyntaxError: '(' was never closed (mine.py, line 2)"),
    "exit": ("import sys\n\nsys.exit(3)\n", "line 3: SystemExit: 3; fix it"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_plugin_that_cannot_be_loaded_is_one_line(case, tmp_path):
    source, said = BROKEN[case]
    (tmp_path / "mine.py").write_text(source)
    message = refusal(load_function, f"{tmp_path}/mine.py:score")
    assert message.startswith(f"{tmp_path}/mine.py: ")
    assert said in message
    assert "\n" not in message


def test_a_failing_call_names_the_last_line_of_the_plugin(tmp_path):
    """Also where the failure is in a library that it calls."""
    (tmp_path / "mine.py").write_text(
        "import json\n\ndef score(text):\n    return inner(text)\n\n"
        "def inner(text):\n    return json.loads(text)\n"
    )
    score = load_function(f"{tmp_path}/mine.py:score")
    assert score("1") == 1
    message = refusal(score, "{\n")
    assert f"{tmp_path}/mine.py: line 7: JSONDecodeError: Expecting property name" in message
    assert "\n" not in message
    assert "mine.py: TypeError: score() missing 1 required" in refusal(score)


def test_a_plugins_own_input_error_is_left_as_it_is(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from plumbing.files import InputError\n\ndef score(rows):\n    raise InputError('so')\n"
    )
    with pytest.raises(InputError, match=r"^so$"):
        load_function(f"{tmp_path}/mine.py:score")([])


def test_the_line_is_there_for_a_relative_path_too(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def score(rows):\n    return rows['a']\n")
    monkeypatch.chdir(tmp_path)
    score = load_function("mine.py:score")
    assert f"{tmp_path}/mine.py: line 2: KeyError: 'a'" in refusal(score, {})


def test_an_object_keeps_its_attributes(tmp_path):
    """A scorer that compares says so by one."""
    (tmp_path / "mine.py").write_text(
        "class Judge:\n    pairwise = True\n\n    def __call__(self, rows, others):\n"
        "        return [1]\n\njudge = Judge()\n"
    )
    judge = load_function(f"{tmp_path}/mine.py:judge")
    assert judge.pairwise
    assert judge([], []) == [1]


def test_another_file_than_the_neighbour_is_refused(tmp_path, monkeypatch):
    """The neighbour's content would stand in the manifest, and the other one's would count."""
    monkeypatch.setattr("sys.path", [*sys.path])
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "twice_there.py").write_text(f"NAME = {name!r}\n")
        (tmp_path / name / "mine.py").write_text(
            "from twice_there import NAME\n\ndef score():\n    return NAME\n"
        )
    assert load_function(f"{tmp_path}/one/mine.py:score")() == "one"
    message = refusal(load_function, f"{tmp_path}/two/mine.py:score")
    assert f"import twice_there finds {tmp_path}/one/twice_there.py, not {tmp_path}/two/" in message


def test_a_plugin_imports_its_neighbours_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "neighbour_of_mine.py").write_text("ONE = 1\n")
    (tmp_path / "mine.py").write_text(
        "from neighbour_of_mine import ONE\n\ndef score(x):\n    return x + ONE\n"
    )
    assert load_function(f"{tmp_path}/mine.py:score")(1) == 2


def test_a_neighbour_does_not_hide_a_module_of_this_project(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "pairs.py").write_text("make_pairs = None\n")
    (tmp_path / "mine.py").write_text("import pairs\n\ndef score():\n    return 1\n")
    assert "mine.py: import pairs finds" in refusal(load_function, f"{tmp_path}/mine.py:score")

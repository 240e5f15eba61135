"""The planted faults of faults.py still fit the tree, without running any."""

import ast
import re

import pytest
from faults import FAULTS, ROOT, Fault, choose, failures, try_fault


def test_the_list_covers_the_program():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 30
    files = {fault.file for fault in FAULTS}
    reading_path = "model sample train dpo losses pairs improve gen_prompts loop checkpoint"
    assert {f"{name}.py" for name in reading_path.split()} <= files
    folders = {file.partition("/")[0] for file in files if "/" in file}
    assert folders >= {"ops", "plumbing", "scorers", "eval", "methods", "bench"}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_a_patch_of_this_tree_and_its_tests_are_there(fault):
    text = fault.patched(ROOT)
    if fault.file.endswith(".py"):
        ast.parse(text)
    for test in fault.tests:
        file, _, name = test.partition("::")
        source = (ROOT / "tests" / file).read_text("utf-8")
        assert re.search(rf"^def {name or 'test_'}", source, re.MULTILINE), test


def test_a_patch_that_does_not_fit_is_named(tmp_path):
    fault = FAULTS[0]
    (tmp_path / fault.file).write_text(fault.old * 2)
    with pytest.raises(ValueError, match=f"{fault.name}: .* stands 2 times in {fault.file}"):
        fault.patched(tmp_path)


def test_an_unknown_name_ends_with_one_line():
    with pytest.raises(SystemExit, match="error: no fault nonsense; there are "):
        choose(["nonsense"])
    assert choose([FAULTS[1].name]) == [FAULTS[1]]
    assert choose([]) == FAULTS


@pytest.fixture
def tree(tmp_path):
    """A tree of one function, a test that watches it and others that do not."""
    clean = tmp_path / "clean"
    (clean / "tests").mkdir(parents=True)
    (clean / "double.py").write_text("def double(x):\n    return 2 * x\n")
    test = "from double import double\n\n\ndef test_{}():\n    assert {}\n"
    (clean / "tests" / "test_good.py").write_text(test.format("good", "double(3) == 6"))
    (clean / "tests" / "test_blind.py").write_text(test.format("blind", "double(0) == 0"))
    (clean / "tests" / "test_broken.py").write_text(test.format("broken", "double(3) == 7"))
    return clean


@pytest.mark.slow
def test_a_fault_is_caught_only_by_a_test_that_passes_without_it(tree):
    def attempt(new: str, *tests: str) -> tuple[bool, str]:
        fault = Fault("planted", "double.py", "2 * x", new, tests)
        return try_fault(fault, tree, ["test_broken.py::test_broken"])

    assert failures(tree, ["test_good.py", "test_broken.py"]) == ["test_broken.py::test_broken"]
    assert attempt("3 * x", "test_blind.py", "test_good.py") == (True, "test_good.py::test_good")
    assert attempt("3 * x", "test_blind.py") == (False, "all tests pass")
    without = "test_broken.py::test_broken fails without the fault too"
    assert attempt("3 * x", "test_broken.py") == (False, without)

    # what does not even start is no proof that a test looks at the result
    for new, test in (("2 *", "test_good.py"), ("3 * x", "test_gone.py")):
        caught, why = attempt(new, test)
        assert not caught and why.startswith("the tests did not run: ")
    assert (tree / "double.py").read_text().endswith("2 * x\n")
    assert not tree.with_name("faulty").exists()

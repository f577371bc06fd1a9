"""Tests mirror the package: hooked_mllm/heads/parsing.py is tested in tests/heads/test_parsing.py.

A module with several files of tests has the others named after an aspect: tests/wiring/test_model_gradients.py.
"""

import ast
from pathlib import Path

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "hooked_mllm"
#: folders of tests of something else than modules of the package
OTHERS = {"docs", "examples", "helpers", "data"}
#: modules without a file of tests of their own, and why
ALLOWED = {
    "__main__": "tests/cli/test_parser.py runs it",
    "cli/__main__": "tests/cli/test_parser.py runs it",
    "exports": "tests/test_import_time.py imports the packages that it serves",
    "version": "tests/cli/test_parser.py prints it, and there is no more to it",
}

MODULES = {file.relative_to(PACKAGE).with_suffix("").as_posix() for file in PACKAGE.rglob("*.py")}
MODULES = {module for module in MODULES if not module.endswith("__init__")}
FILES = [file for file in sorted(TESTS.rglob("test_*.py")) if file.relative_to(TESTS).parts[0] not in OTHERS]


def module_of(file):
    """The module that a file of tests is named after, the longest where several fit; None if there is none."""
    folder, words = file.relative_to(TESTS).parent, file.stem.removeprefix("test_").split("_")
    names = [(folder / "_".join(words[:n])).as_posix() for n in range(len(words), 0, -1)]
    return next((name for name in names if name in MODULES), None)


def test_files_in_rooms_are_named_after_a_module():
    strays = [file.relative_to(TESTS).as_posix() for file in FILES if file.parent != TESTS and module_of(file) is None]
    assert not strays, f"the package has no module that these could be named after: {', '.join(strays)}"


def test_every_module_has_a_file_of_tests():
    missing = MODULES - {module_of(file) for file in FILES} - ALLOWED.keys()
    assert not missing, f"modules without a test_<module>.py: {', '.join(sorted(missing))}"


def test_every_file_of_tests_holds_tests():
    for file in sorted(TESTS.rglob("test_*.py")):
        functions = [
            node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)
        ]
        tests = [function for function in functions if function.name.startswith("test_")]
        assert tests, f"{file.name} has no test"
        empty = [test.name for test in tests if not calls(test)]
        assert not empty, f"{file.name} has tests that check nothing: {', '.join(empty)}"


def calls(test):
    """Whether a test calls or asserts anything."""
    return any(isinstance(node, ast.Call | ast.Assert) for line in test.body for node in ast.walk(line))


def test_the_exceptions_are_modules_without_tests_of_their_own():
    assert ALLOWED.keys() <= MODULES and not ALLOWED.keys() & {module_of(file) for file in FILES}
    for reason in ALLOWED.values():
        assert (TESTS.parent / reason.split()[0]).is_file()


def test_a_file_is_named_after_the_longest_module_that_fits():
    assert module_of(TESTS / "wiring" / "test_model_gradients.py") == "wiring/model"
    assert module_of(TESTS / "wiring" / "test_module_sides.py") == "wiring/module_sides"
    assert module_of(TESTS / "metrics" / "causal" / "test_table.py") == "metrics/causal/table"
    assert module_of(TESTS / "wiring" / "test_nothing.py") is None

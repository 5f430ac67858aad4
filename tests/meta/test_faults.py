"""Every fault that was found by using the project has a test that names it: ``test_t3_...`` outside of tests/defects."""

import ast
import re

# Chapter -> numbers of its faults: training, engines, data and command line, reliability. Those of open issues are not here.
FAULTS = {
    "t": [*range(1, 8), *range(10, 23), 24, 25],
    "e": list(range(1, 26)),
    "d": list(range(1, 22)),
    "r": list(range(1, 14)),
}


def faults_named(tests: dict[str, ast.Module]) -> set[str]:
    """Return the ids that names of tests start with, those of the other catalogue left aside."""
    return {
        match[1]
        for path, tree in tests.items()
        if not path.startswith("defects/")
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and (match := re.match(r"test_([tedr]\d+)_[a-z]", node.name))
    }


def test_every_fault_has_a_test(tests):
    every = {f"{chapter}{number}" for chapter, numbers in FAULTS.items() for number in numbers}
    assert sorted(every - faults_named(tests)) == []


def test_faults_named_reads_names_outside_the_catalogue_of_defects():
    tree = ast.parse("def test_t3_a(): ...\ndef test_d9_b(): ...\ndef test_t(): ...")
    assert faults_named({"grpo/test_a.py": tree}) == {"t3", "d9"}
    assert faults_named({"defects/test_a.py": tree}) == set()

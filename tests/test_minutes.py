"""The summary of a test run says how many minutes each group took."""

from minutes import seconds_by_group, table
from pytest import TestReport


def report(nodeid, when, duration):
    return TestReport(nodeid, (nodeid, 0, ""), {}, "passed", None, when, duration=duration)


def test_phases_of_a_folder_and_of_a_file_are_added_up():
    found = seconds_by_group(
        [
            report("tests/nn/test_apply.py::test_a", "setup", 30.0),
            report("tests/nn/test_apply.py::test_a", "call", 60.0),
            report("tests/nn/deeper/test_b.py::test_b[x::y]", "call", 90.0),
            report("tests/test_errors.py::test_c", "call", 6.0),
        ]
    )
    assert found == {"tests/nn": 180.0, "tests/test_errors.py": 6.0}
    lines = [line.split() for line in table(found)]
    assert lines == [["3.0", "tests/nn"], ["0.1", "tests/test_errors.py"], ["3.1", "all"]]

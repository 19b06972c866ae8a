"""How long each group of tests took."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

__all__ = ["seconds_by_group", "table"]


def seconds_by_group(reports: Iterable[pytest.TestReport]) -> Counter[str]:
    """Return the seconds of setup, call and teardown; a group is a folder in tests/ or a file there."""
    seconds: Counter[str] = Counter()
    for report in reports:
        parts = Path(report.nodeid.partition("::")[0]).parts
        depth = parts.index("tests") + 2 if "tests" in parts else 1
        seconds["/".join(parts[:depth])] += report.duration
    return seconds


def table(seconds: Counter[str]) -> list[str]:
    """Return a line for each group, the slowest first, and one for their sum."""
    rows = [*seconds.most_common(), ("all", sum(seconds.values()))]
    return [f"{value / 60:7.1f}  {group}" for group, value in rows]

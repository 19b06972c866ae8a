"""The pages of `docs/`: tests run their blocks of Python."""

import re
from pathlib import Path

__all__ = ["read", "sections"]


def read(name: str) -> str:
    return (Path(__file__).parent.parent / "docs" / name).read_text()


def sections(page: str) -> dict[str, list[str]]:
    """Return the blocks of Python of every section that has some."""
    found = {}
    for part in re.split(r"^## ", page, flags=re.M)[1:]:
        title, _, text = part.partition("\n")
        blocks = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
        if blocks:
            found[title] = blocks
    return found

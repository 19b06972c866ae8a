"""The pages of `docs/` and the README: tests run their blocks.

A page is read from top to bottom: a block of Python goes on where the one before it has stopped. One whose
fence follows a line `<!-- not run: REASON -->` is compiled and not run.
"""

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROOT", "Block", "blocks", "names", "read", "sections"]

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.M | re.S,
)


@dataclass(frozen=True)
class Block:
    """A block of a page."""

    section: str
    language: str
    text: str
    line: int
    reason: str | None
    """Why it is not run; None if it is."""


def names() -> list[str]:
    """Return the pages, relative to the root."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path.relative_to(ROOT).as_posix() for path in found]


def read(name: str) -> str:
    """Return a page of `docs/`, or another by its path from the root."""
    path = ROOT / "docs" / name
    return (path if path.exists() else ROOT / name).read_text()


def blocks(page: str, language: str | None = "python") -> list[Block]:
    """Return the blocks of a page in a language, or in all, in order."""
    titles = [(match.start(), match[1]) for match in re.finditer(r"^#+ (.+)$", page, re.M)]
    found = []
    for match in _BLOCK.finditer(page):
        if language in (None, match["language"]):
            section = next((title for at, title in reversed(titles) if at < match.start()), "")
            line = page.count("\n", 0, match.start("text"))
            block = Block(section, match["language"], match["text"], line, match["reason"])
            found.append(block)
    return found


def sections(page: str) -> dict[str, list[str]]:
    """Return the blocks of Python of every section that has some."""
    found: dict[str, list[str]] = {}
    for block in blocks(page):
        found.setdefault(block.section, []).append(block.text)
    return found

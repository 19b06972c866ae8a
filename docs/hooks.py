"""What the site does beyond its configuration: reports of applications, and roles in docstrings.

MkDocs calls the functions, Griffe the class.
"""

import importlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import griffe

APPLICATIONS = Path(__file__).parent / "applications"
ROLE = re.compile(r":(?:func|class|meth|attr|mod|data):`([^`.][^`]*)`")


def reports() -> list[str]:
    """Return the applications whose report is there."""
    return sorted(path.parent.name for path in APPLICATIONS.glob("*/report.md"))


def on_config(config: Any) -> Any:
    """Put the reports behind the page of all applications."""
    (pages,) = (entry["Applications"] for entry in config.nav if "Applications" in entry)
    pages += [f"applications/{name}/report.md" for name in reports()]
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the mark of a report into a link to it, where it is there."""
    if page.file.src_uri != "applications/index.md":
        return markdown
    for name in reports():
        link = f"[What a run of it found]({name}/report.md)"
        markdown = markdown.replace(f"<!-- report: {name} -->", link)
    return markdown


class Roles(griffe.Extension):
    """Make links of the roles of reStructuredText in docstrings."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Go through all docstrings of a package."""
        for obj in documented(pkg):
            assert obj.docstring is not None
            module = obj.module.path
            obj.docstring.value = ROLE.sub(lambda m, m_=module: link(m[1], m_), obj.docstring.value)


def documented(obj: griffe.Object) -> Iterable[griffe.Object]:
    """Yield an object and what is in it, as far as it has docstrings."""
    if obj.docstring:
        yield obj
    for member in obj.members.values():
        if not member.is_alias:
            yield from documented(member)


def link(target: str, module: str) -> str:
    """Return Markdown for a reference: a link if the target is on some page, else its name alone."""
    found = defined_at(target) or defined_at(f"{module}.{target}") or target
    return f'<autoref identifier="{found}" optional><code>{target}</code></autoref>'


def defined_at(path: str) -> str | None:
    """Return where the object of a path was defined, which is how the pages name it."""
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
            for name in parts[cut:]:
                found = getattr(found, name)
        except (ImportError, AttributeError):
            continue
        if hasattr(found, "__qualname__"):
            return f"{found.__module__}.{found.__qualname__}"
    return None

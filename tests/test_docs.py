"""The documentation: what its pages say runs, and the site is whole and fetches nothing."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pages
import pytest
import their_layers

import spectral_ext
from spectral_ext import plot

os.environ["KERAS_BACKEND"] = "torch"  # before anyone imports Keras

ROOT = pages.ROOT


def run(*command, cwd, **environ):
    """Run this Python; return what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environ}
    words = [sys.executable, *map(str, command)]
    result = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout + result.stderr


# ---- What pages say


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras
@pytest.mark.parametrize("name", pages.names())
def test_the_blocks_and_the_commands_of_a_page_run(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for module_name, module in their_layers.modules().items():
        monkeypatch.setitem(sys.modules, module_name, module)
    page, spaces = pages.read(name), {"__name__": "page"}
    if "import keras" in page:
        pytest.importorskip("keras", reason="the extra `keras` is not installed")
    fences = re.findall(r"^ *(?:```|~~~)", page, re.M)
    assert len(fences) == 2 * len(
        pages.blocks(page, None)
    )  # none is written so that it is not found
    for block in pages.blocks(page, None):
        if block.language == "python":
            code = compile("\n" * block.line + block.text, name, "exec")  # errors name the line
            if block.reason is None:
                exec(code, spaces)
        elif block.language == "console" and block.reason is None:
            for line in block.text.splitlines():
                python, *words = shlex.split(line.removeprefix("$ "))
                assert line.startswith("$ ") and python == "python", line
                assert run(*words, cwd=tmp_path)


def test_only_what_needs_a_device_is_not_run():
    left_out = {name: [b.reason for b in pages.blocks(pages.read(name))] for name in pages.names()}
    found = {name: set(reasons) - {None} for name, reasons in left_out.items()}
    assert {name: reasons for name, reasons in found.items() if reasons} == {
        "docs/gpu.md": {"needs CUDA"}
    }


def test_targets_files_and_tests_that_pages_name_are_there():
    makefile = (ROOT / "Makefile").read_text()
    folders, applications = (
        re.search(rf"^{name} := (.+)$", makefile, re.M)[1].split()
        for name in ("GROUPS", "APPLICATIONS")
    )
    targets = {*re.findall(r"^([a-z-]+):", makefile, re.M), *(f"test-{f}" for f in folders)}
    targets.update(applications)
    files = r"`((?:bench|csrc|docs|examples|spectral_ext|tests)/[\w/.]+)`"
    for name in (*pages.names(), "CONTRIBUTING.md", "CHANGELOG.md"):
        page = pages.read(name)
        assert set(re.findall(r"`make ([a-z][\w-]*)", page)) <= targets, name
        named = {path for path in re.findall(files, page) if "NAME" not in path}
        missing = {path for path in named if not (ROOT / path).exists()}
        assert not missing, name


# ---- The site


class Links(HTMLParser):
    """The anchors of a page, where its links go, and what its reader's browser fetches by itself."""

    def __init__(self, page):
        super().__init__()
        self.anchors, self.links, self.fetched = set(), set(), set()
        self.feed(page.read_text())

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors.add(values.get("id"))
        if tag == "a":
            self.links.add(values.get("href"))
        elif tag == "link" and values.get("rel") not in ("canonical", "prev", "next"):
            self.fetched.add(values["href"])
        self.fetched |= {values[key] for key in ("src", "srcset") if key in values}


@pytest.fixture(scope="module", params=["no report", "all reports"])
def site(request, tmp_path_factory):
    """The site, with and without the reports of applications; built where nothing can be fetched."""
    for module in ("material", "mkdocstrings_handlers.python"):
        pytest.importorskip(module, reason="the extra `docs` is not installed")
    tree = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "docs", tree / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mkdocs.yml", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tree)
    (tree / "spectral_ext").symlink_to(ROOT / "spectral_ext")
    if request.param == "no report":
        for report in (tree / "docs" / "applications").glob("*/"):
            shutil.rmtree(report)
    nowhere = "http://127.0.0.1:9"
    proxies = {f"{kind}_PROXY": nowhere for kind in ("HTTP", "HTTPS", "ALL")}
    command = ("-m", "mkdocs", "build", "--strict", "--site-dir", tree / "site")
    run(*command, cwd=tree, NO_MKDOCS_2_WARNING="1", **proxies)
    folder = tree / "site"
    found = {p.relative_to(folder).as_posix(): Links(p) for p in folder.rglob("*.html")}
    return request.param, folder, found


def test_the_site_fetches_nothing_from_elsewhere(site):
    _, folder, found = site
    assert len(found) > 15
    for name, page in found.items():
        assert page.fetched, name
        elsewhere = {url for url in page.fetched if re.match(r"[a-z]+:|//", url)}
        assert {url for url in elsewhere if not url.startswith("data:")} == set(), name
    styles = [path.read_text() for path in folder.rglob("*.css")]
    assert styles and not re.search(r"url\(['\"]?(https?:)?//|@import", "".join(styles))


def test_reports_have_pages_and_links_once_they_are_there(site):
    which, folder, found = site
    names = [path.parent.name for path in (ROOT / "docs" / "applications").glob("*/report.md")]
    assert len(names) >= 6
    expected = which == "all reports"
    text = (folder / "applications" / "index.html").read_text()
    assert text.count("What a run of it found") == len(names) * expected
    for name in names:
        assert (f"applications/{name}/report/" in found["index.html"].links) == expected
        assert (f"applications/{name}/report/index.html" in found) == expected
    assert not list(folder.rglob("*.py"))


def test_the_site_has_all_of_the_api_and_links_it(site):
    _, folder, found = site
    modules = (spectral_ext, spectral_ext.nn, spectral_ext.functional, spectral_ext.reference)
    public = {name for module in (*modules, spectral_ext.spectrum, plot) for name in module.__all__}
    public -= {"functional", "nn", "reference", "spectrum"}  # modules
    anchors = {a for name, page in found.items() if name.startswith("api/") for a in page.anchors}
    assert {n for n in public if not any(a and a.endswith(f".{n}") for a in anchors)} == set()
    assert "../models/#spectral_ext.nn.fuse.fuse" in found["api/layers/index.html"].links
    for path in (folder / "api").rglob("*.html"):
        assert not re.search(r":(func|class|meth|attr|mod):|<autoref", path.read_text()), path


def test_the_pictures_of_pages_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
    pytest.importorskip("spectral_ext._C", reason="built without a C++ compiler")
    run(ROOT / "docs" / "draw.py", "--out", tmp_path, cwd=tmp_path)
    drawn = {path.name: path.stat().st_size for path in tmp_path.glob("*.svg")}
    assert set(drawn) == {path.name for path in (ROOT / "docs" / "pictures").glob("*.svg")}
    assert min(drawn.values()) > 10_000

"""The pages: their code runs, their links lead somewhere, their lines hold what they say."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest

from bench import equations, walkthrough

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def test_walkthrough_runs(monkeypatch):
    """Every block of the walkthrough runs, and its own checks hold on this machine."""
    monkeypatch.chdir(ROOT)
    parts = walkthrough.read_parts(walkthrough.PAGE.read_text("utf-8"))
    with contextlib.redirect_stderr(io.StringIO()):
        printed = walkthrough.run_code(parts)
    assert "compute_mopd_loss" in printed[-1] and len(printed) == 10


def test_notebook_is_the_page():
    """The notebook holds the page's texts and code in order, and the outputs stored in the page."""
    text = walkthrough.PAGE.read_text("utf-8")
    parts = walkthrough.read_parts(text)
    outputs = [x[1] or "" for x in walkthrough.BLOCK.findall(text)]
    assert walkthrough.write_page(parts, outputs) == text
    stored = json.loads(walkthrough.PAGE.with_suffix(".ipynb").read_text("utf-8"))
    assert stored == json.loads(walkthrough.write_notebook(parts, outputs))


@pytest.mark.parametrize("page", PAGES, ids=lambda x: x.name)
def test_links(page):
    """Files that a page links to exist; a link to a line of code has that line."""
    for _, target in LINK.findall(page.read_text("utf-8")):
        path, _, place = target.partition("#")
        if "://" in target or not path:
            continue
        file = page.parent / path
        assert file.exists(), f"{page.name}: {target}"
        if line := re.fullmatch(r"L(\d+)", place):
            assert int(line[1]) <= len(file.read_text("utf-8").splitlines()), target


def test_equations():
    """Each line that the page of equations links to holds the text beside the link."""
    found = equations.LINK.findall(equations.PAGE.read_text("utf-8"))
    assert len(found) > 20
    for path, number, text in found:
        line = (ROOT / path).read_text("utf-8").splitlines()[int(number) - 1]
        assert text in line, f"{path}:{number}: python -m bench.equations renews the page"

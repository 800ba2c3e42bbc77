"""The pages as a site: every link leads somewhere, every public name is told, and nothing is fetched to look at it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from browser import CHROMIUM, browser

import lowrank
from benchmarks.method_pictures import METHODS

ROOT = Path(__file__).parent.parent
CONSTANTS = {"MODE_ENERGIES", "STORAGES"}
FETCHED = (
    r"""<(?:script|img|iframe|source)[^>]*\ssrc="?(?:https?:)?//|<link[^>]*href="?(?:https?:)?//(?![^>]*canonical)"""
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_COLOR": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_every_page_is_built_and_fetches_nothing(site: Path) -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} | {"index", "RESULTS", "CONTRIBUTING", "CHANGELOG"}
    built = {path.stem: path.read_text() for path in site.glob("*.html")}
    assert pages | {"404"} == set(built)
    for name, page in built.items():
        assert not re.findall(FETCHED, page), name
    assert "fonts.googleapis" not in "".join(built.values())
    assert (site / "figures" / "digits_pareto.png").read_bytes() == (
        ROOT / "figures" / "digits_pareto.png"
    ).read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here; apt-get install chromium")
def test_the_search_works_from_the_disk(site: Path, tmp_path: Path) -> None:
    with browser(tmp_path) as tab:
        tab.size(1400)
        tab.open(site / "index.html")
        tab.until("document.querySelector('.md-search__input')?.offsetParent")
        tab.run("document.querySelector('.md-search__input').focus()")
        tab.call("Input.insertText", text="select_ranks")
        # What was typed before the page listened is seen at the next key.
        typed = "document.querySelector('.md-search__input').dispatchEvent(new KeyboardEvent('keyup'))"
        tab.until(f"{typed} && document.querySelector('.md-search-result__item a')")
        found = "[...document.querySelectorAll('.md-search-result__item a')].map(link => link.href)"
        assert any(f"{(site / 'api.html').as_uri()}?" in link and "select_ranks" in link for link in tab.run(found))
        assert tab.errors == []
        assert {address.partition(":")[0] for address in tab.requested} <= {"file", "about", "data"}


def test_the_reference_has_every_public_name_with_what_its_docstring_says(site: Path) -> None:
    source = re.findall(r"^::: lowrank\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(source) == sorted(set(lowrank.__all__) - CONSTANTS)
    page = (site / "api.html").read_text()
    for name in source:
        assert f'id="lowrank.{name}"' in page, name
    assert 'id="lowrank.lightning.LowRankCallback"' in page
    said = (lowrank.select_ranks.__doc__ or "").partition("\n")[0].partition(":")[0]
    assert said in re.sub("<[^>]+>", "", page)
    example = "<summary>Example</summary>"
    assert page.count(example) == page.count(f'{example}\n  <div class="highlight">') > 0


def test_every_method_has_a_section_a_picture_and_a_row(site: Path) -> None:
    text = (ROOT / "docs" / "methods.md").read_text()
    for name, method in METHODS.items():
        kind = type(method).__name__
        assert text.count(f"\n## {kind}\n") == 1
        section = text.partition(f"\n## {kind}\n")[2].partition("\n## ")[0]
        assert f"(../figures/methods/{name}.png)" in section
        assert "bytes: " in section or "weights: " in section
        assert f"| [`{kind}`](#{kind.lower()}) |" in text


def test_the_papers_are_cited() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    titles = [reference["title"] for reference in cited["references"]]
    text = (ROOT / "docs" / "methods.md").read_text()
    assert len(titles) == 4
    assert all(f"*{title}*" in text for title in titles)
    assert all(reference["authors"] and reference["year"] for reference in cited["references"])

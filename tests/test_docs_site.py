"""The documentation as a site: its pages, links, API names, and the tutorial's code."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
FENCED = re.compile(r"^ *```.*?^ *```$", flags=re.MULTILINE | re.DOTALL)
MKDOCS = ROOT / "mkdocs.yml"


def prose(page: Path) -> str:
    """A page without its code, whose brackets are no links."""
    return re.sub(r"`[^`\n]*`", "code", FENCED.sub("", page.read_text(encoding="utf-8")))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ +(.*)$", FENCED.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_the_navigation_names_every_page_once() -> None:
    named = re.findall(r"^ +- (?:\w+: )?(\S+\.md)$", MKDOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    own = [name for name in named if not name.startswith("repository/") and name != "index.md"]
    assert sorted(own) == sorted(
        path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md") if path.parent.parent.name != "report"
    )
    assert "index.md" in named, "the home page, made of README.md"


def test_the_api_reference_names_what_exists() -> None:
    named = [
        name for page in (DOCS / "api").glob("*.md") for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)
    ]
    assert len(named) >= 15
    for name in named:
        module, _, last = name.rpartition(".")
        found = getattr(importlib.import_module(module), last, None) if last[0].isupper() or last == "attach" else None
        assert found or importlib.import_module(name), name


def test_the_api_reference_has_every_public_name() -> None:
    import openwu

    text = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    assert [name for name in openwu.__all__ if name != "__version__" and f"::: openwu.{name}\n" not in text] == []


def test_the_tutorial_runs_in_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Image.open(ROOT / "photos" / "life_by_aitzol_berasategi.jpg") as image:
        small = image.resize((96, 64))
    small.save(tmp_path / "photo.jpg")
    small.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "other.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "tutorial"}
    monkeypatch.setitem(sys.modules, "tutorial", type(sys)("tutorial"))  # dataclasses look their module up
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / "tutorial.md").read_text(encoding="utf-8"), re.M | re.S)
    for number, block in enumerate(blocks):
        exec(compile(block, f"tutorial.md, block {number}", "exec"), names)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "batch-0.png",
        "batch-1.png",
        "batch-2.png",
        "warm.png",
    ]
    cosines, alone, matched, exchanged = (names[name] for name in ("cosines", "alone", "matched", "exchanged"))
    assert cosines[0, 1] > 0.5 > cosines[0, 2]
    assert matched < alone / 5
    assert matched < exchanged / 5


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Links and anchors as the site has them, and every docstring of the API reference."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings_handlers.python")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    for page in ("index.html", "tutorial/index.html", "api/editing/index.html", "repository/CHANGELOG/index.html"):
        assert (tmp_path / "site" / page).is_file(), page
    home = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "pictures/demo.jpg" in home
    assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?:', home), "expected no file of another host"

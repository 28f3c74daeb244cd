"""docs/architecture.md names the tree as it is."""

from __future__ import annotations

import re
from pathlib import Path

import openwu.registry

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "openwu"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_every_folder_is_described() -> None:
    listed = set(re.findall(r"^  (\w+)/ ", PAGE, flags=re.MULTILINE))
    assert listed == {folder.name for folder in SRC.iterdir() if (folder / "__init__.py").exists()}


def test_every_file_that_it_names_exists() -> None:
    named = [name for name in re.findall(r"`((?:\w+/)+\w*(?:\.py|\.json)?)`", PAGE) if "*" not in name]
    assert len(named) > 20
    for name in named:
        assert (SRC / name).exists() or (ROOT / name).exists(), name


def test_the_walks_are_short() -> None:
    edit, step = (PAGE.split(f"## {title}")[1].split("\n## ")[0] for title in ("One edit", "One training step"))
    assert len(re.findall(r"^\d\. ", edit, flags=re.MULTILINE)) <= 8
    assert len(re.findall(r"^\d\. ", step, flags=re.MULTILINE)) <= 6


def test_every_registry_that_it_names_exists() -> None:
    for name in re.findall(r"`registry\.(\w+)`", PAGE):
        assert getattr(openwu.registry, name)

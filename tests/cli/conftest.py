"""A stand-in for the editor, and a folder with three pictures."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
from cli_cases import FakeAdapter, FakeEditor
from PIL import Image


@pytest.fixture
def editor(monkeypatch: pytest.MonkeyPatch) -> FakeEditor:
    fake = FakeEditor()
    monkeypatch.setitem(sys.modules, "openwu.editor.editor", types.SimpleNamespace(Editor=fake))  # type: ignore[arg-type]
    monkeypatch.setattr("openwu.types.Adapter", FakeAdapter)
    return fake


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, value in (("a.png", 10), ("b.png", 20), ("c.jpg", 30)):
        Image.new("RGB", (16, 12), (value, value, 200)).save(name)
    return tmp_path

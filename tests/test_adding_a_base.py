"""docs/adding-a-base.md: its worked example is put into a file and a line, trained for and edited with."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import base_cases
import pytest
import torch
from safetensors.torch import save_file

import openwu
from openwu.backbones import backbone_class
from openwu.editor.requests import EditRequest
from openwu.registry import BASES
from openwu.types import BaseRequest, SamplingOptions

CPU = openwu.LoadingOptions(device="cpu")
PAGE = (Path(__file__).parents[1] / "docs" / "adding-a-base.md").read_text(encoding="utf-8")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The page's one file, under a name of its own, and its one line."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "patches_of_the_page.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    name, where = re.findall(r'^"(\w+)": "([\w.:]+)",$', PAGE, flags=re.MULTILINE)[0]
    monkeypatch.setitem(BASES, name, f"patches_of_the_page:{where.partition(':')[2]}")
    return importlib.import_module("patches_of_the_page")


def test_the_worked_example_trains_and_edits(module: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(module.Denoiser().state_dict(), tmp_path / "patches.safetensors")
    base = backbone_class("patches").from_pretrained(tmp_path)

    # Trained: the loss of a fixed question falls.
    generator = base_cases.generator(base)
    asked = [BaseRequest((base_cases.picture(i),), text) for i, text in enumerate(("red", "blue"))]
    before, after = base_cases.losses_of_training(base, generator, asked, steps=10)
    assert after < before

    # Edited with, from folders, by its name.
    generator.save_pretrained(tmp_path / "generator")
    editor = openwu.Editor.from_pretrained("patches", base=tmp_path, generator=tmp_path / "generator", loading=CPU)
    requests = [EditRequest([base_cases.picture(i, 60, 90)], text, seed=i) for i, text in enumerate(("red", "blue"))]
    together = editor.edit_batch(requests, sampling=SamplingOptions(steps=2))
    for request, result in zip(requests, together, strict=True):
        alone = editor.edit(request.images, request.instruction, seed=request.seed, sampling=SamplingOptions(steps=2))
        assert result.image.size == (60, 90)
        assert result.image.tobytes() == alone.image.tobytes()
    base_alone = editor.edit(requests[0].images, "red", strength=0.0, sampling=SamplingOptions(steps=2))
    assert base_alone.image.tobytes() != together[0].image.tobytes()

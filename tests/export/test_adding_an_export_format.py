"""docs/adding-an-export-format.md: its worked example is put into a file and a line, and what it writes is added up."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
from exporting_cases import answer, random_adapter
from safetensors.torch import load_file
from torch import nn

from openwu.errors import OpenwuError
from openwu.registry import EXPORT_FORMATS
from openwu.types import Adapter, Target

PAGE = (Path(__file__).parents[2] / "docs" / "adding-an-export-format.md").read_text(encoding="utf-8")


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The page's one file, under a name of its own, and its one line."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "format_of_the_page.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    ((name, where),) = re.findall(r'^"(\w+)": "([\w.:]+)",$', PAGE, flags=re.MULTILINE)
    monkeypatch.setitem(EXPORT_FORMATS, name, f"format_of_the_page:{where.partition(':')[2]}")
    importlib.invalidate_caches()
    return str(name)


def test_the_worked_example_holds_what_is_added_to_the_weights(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.Linear(16, 5)).requires_grad_(False)
    adapter = random_adapter([Target("0", 27, 4), Target("2", 16, 5)])
    x = torch.randn(2, 3, 6, 6)
    live = answer(model, adapter, lambda each: each(x))
    adapter.save_pretrained(tmp_path / "folder", name, model=model)
    (file,) = (tmp_path / "folder").glob("*.safetensors")
    for key, difference in load_file(file).items():
        model.get_submodule(key.removesuffix(".diff")).weight += difference
    torch.testing.assert_close(model(x), live)


def test_the_worked_example_refuses_what_it_cannot_hold(name: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 5))
    lora = random_adapter([Target("0", 4, 5)])
    scale = Adapter((Target("0", 4, 5, operator="scale"),), {"0": {"gain": torch.ones(1, 5)}}, 1.0)
    with pytest.raises(OpenwuError, match="expected the base"):
        lora.save_pretrained(tmp_path / "a", name)
    with pytest.raises(OpenwuError, match=r"difference: the format holds LoRA alone, got 0 \(scale\)"):
        scale.save_pretrained(tmp_path / "a", name, model=model)
    with pytest.raises(OpenwuError, match="component: the format has none"):
        lora.save_pretrained(tmp_path / "a", name, component="unet", model=model)

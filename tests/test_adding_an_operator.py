"""docs/adding-an-operator.md: its example is put into a file and a line, generated, applied, merged and saved."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from openwu.adapters.inject import attach
from openwu.adapters.merge import merged
from openwu.config import GeneratorConfig, LayerGroup, PlainTarget
from openwu.errors import TargetError
from openwu.generator.model import ParameterGenerator
from openwu.registry import OPERATORS
from openwu.types import Adapter, Target

PAGE = (Path(__file__).parents[1] / "docs" / "adding-an-operator.md").read_text(encoding="utf-8")


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The page's one file, under a name of its own, and its one line."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "operator_of_the_page.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    ((name, where),) = re.findall(r'^"(\w+)": "([\w.:]+)",$', PAGE, flags=re.MULTILINE)
    monkeypatch.setitem(OPERATORS, name, f"operator_of_the_page:{where.partition(':')[2]}")
    importlib.invalidate_caches()
    return str(name)


def test_the_worked_example_is_generated_applied_merged_and_saved(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    group = LayerGroup("", 2, (PlainTarget("fc", 6, 6),)).with_operator(name)
    generator = ParameterGenerator(GeneratorConfig(2, 1, 4, 5, 16, 8, 2, 1, (group,)), b_init_std=0.1)
    base = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(6, 6, bias=False)}) for _ in range(2)]).requires_grad_(False)

    def forward(x: torch.Tensor) -> torch.Tensor:
        for layer in base:
            x = layer["fc"](x)
        return x

    condition, x = torch.randn(2, 3, 5), torch.randn(2, 4, 6)
    wanted, losses = torch.randn(2, 4, 6), []
    optimizer = torch.optim.Adam(generator.parameters(), lr=3e-3)
    with attach(base, generator.targets) as handle:
        for _ in range(20):
            with handle.applied(generator(condition)):
                loss = (forward(x) - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]

        adapter = generator(condition).detach()
        with handle.applied(adapter):
            together = forward(x)
        with handle.applied(adapter.scaled(0)):
            assert torch.equal(forward(x), base[1]["fc"](base[0]["fc"](x)))
    for sample in range(2):
        expected = x[sample]
        for layer in range(2):
            gain = adapter.scale * adapter.factors[f"{layer}.fc"]["input_gain"][sample]
            expected = base[layer]["fc"](expected * (1 + gain))
        torch.testing.assert_close(together[sample], expected)
        with merged(base, adapter.select([sample])):
            torch.testing.assert_close(forward(x[sample]), expected)

    adapter.save_pretrained(tmp_path / "adapter")
    back = Adapter.from_pretrained(tmp_path / "adapter")
    assert back.targets == adapter.targets
    assert torch.equal(back.factors["1.fc"]["input_gain"], adapter.factors["1.fc"]["input_gain"])
    with pytest.raises(TargetError, match=r"0: expected an nn\.Linear, got Conv2d"):
        attach(nn.Sequential(nn.Conv2d(4, 5, 1)), [Target("0", 4, 5, operator=name)])

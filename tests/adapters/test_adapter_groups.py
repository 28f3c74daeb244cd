"""`groups_of` lists the layers of any module so that a generator's adapters reach every one of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import openwu
from openwu.adapters.groups import groups_of
from openwu.errors import TargetError


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, width), nn.SiLU(), nn.Linear(width, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.mlp(self.q(x))
        return out


class Model(nn.Module):
    """Two equal blocks, one of another width, a convolution and a depthwise one before them, a head behind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.layers = nn.ModuleList([Block(12), Block(12), Block(16)])
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.stem(x)).flatten(2).mean(2)
        for layer in self.layers:
            x = layer(x)
        out: torch.Tensor = self.head(x)
        return out


def test_equal_items_of_a_list_form_a_group_and_every_layer_is_reached() -> None:
    model = Model().requires_grad_(False)
    groups = groups_of(model)
    assert [(group.num_layers, [target.name for target in group.targets]) for group in groups] == [
        (1, ["stem"]),
        (2, ["q", "mlp.0", "mlp.2"]),
        (1, ["q", "mlp.0", "mlp.2"]),
        (1, ["head"]),
    ]
    config = openwu.GeneratorConfig(
        rank=2, alpha=2, token_dim=8, input_dim=4, d_model=16, head_dim=8, dim_accumulation=1, num_pg_layers=1,
        groups=groups,
    )  # fmt: skip
    generator = openwu.ParameterGenerator(config, b_init_std=0.1)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {target.name for target in generator.targets} == {"stem", *linear}
    adapter = generator(torch.randn(2, 3, 4))
    x = torch.randn(2, 2, 4, 4)
    with openwu.attach(model, adapter.targets).applied(adapter):
        model(x).square().sum().backward()
    assert all(bool(parameter.grad is not None) for parameter in generator.parameters())


def test_names_choose_layers_and_unknown_ones_are_refused() -> None:
    model = Model()
    (group,) = groups_of(model, only=("q",))
    assert (group.num_layers, group.layer_path(2)) == (3, "layers.2.")
    (group,) = groups_of(model, only=("layers.2.mlp",))
    assert [target.name for target in group.targets] == ["mlp.0", "mlp.2"]
    for only in (("q", "w1"), ("depthwise",)):
        with pytest.raises(TargetError, match=rf"only: expected names of linear layers.*'q'.*got \['{only[-1]}'\]"):
            groups_of(model, only=only)
    with pytest.raises(TargetError, match="only: expected names of linear layers"):
        groups_of(nn.Sequential(nn.SiLU()))

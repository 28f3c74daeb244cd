"""Generators of other operators than LoRA: their config, layout, both paths, checkpoints, and training of a base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from openwu.adapters.inject import attach
from openwu.adapters.operators.cost import adapter_cost
from openwu.config import ConfigError, GeneratorConfig, GroupedTarget, LayerGroup, PlainTarget
from openwu.errors import OpenwuError
from openwu.generator.inference.fast import FastGenerator, FastOptions
from openwu.generator.layout import GeneratorLayout
from openwu.generator.model import ParameterGenerator

OPERATORS = ("scale", "offset", "scale_offset")


def config_of(*operators: str) -> GeneratorConfig:
    """Two layers of two linear maps of a base of width 6."""
    targets = tuple(PlainTarget(f"fc{i}", 6, 6, operator) for i, operator in enumerate(operators))
    return GeneratorConfig(4, 4, 8, 5, 16, 8, 2, 2, (LayerGroup("", 2, targets),))


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("0", "1"):
            setattr(self, name, nn.ModuleDict({"fc0": nn.Linear(6, 6), "fc1": nn.Linear(6, 6)}))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.children():
            x = x + block["fc1"](torch.tanh(block["fc0"](x)))
        return x


def generator_of(*operators: str, b_init_std: float = 0.1) -> ParameterGenerator:
    torch.manual_seed(0)
    return ParameterGenerator(config_of(*operators), b_init_std=b_init_std)


def test_json_names_the_operator_and_leaves_loras_as_they_were() -> None:
    config = config_of("lora", "scale_offset")
    written = config.to_dict()
    assert written["pg_mapping"] == {
        "fc0": {"lora_A_dim": 6, "lora_B_dim": 6},
        "fc1": {"operator": "scale_offset", "in_dim": 6, "out_dim": 6},
    }
    assert GeneratorConfig.from_dict(written) == config
    assert [weight.operator for weight in config.groups[0].weights()] == ["lora", "scale_offset"]


def test_a_group_changes_its_operator_but_not_that_of_experts() -> None:
    experts = GroupedTarget("moe", 2, (PlainTarget("w1", 6, 7),))
    group = LayerGroup("", 1, (PlainTarget("fc", 6, 6), experts)).with_operator("scale")
    assert group.targets == (PlainTarget("fc", 6, 6, "scale"), experts)
    some = LayerGroup("", 1, (PlainTarget("fc", 6, 6), PlainTarget("out", 6, 6))).with_operator("lora+offset", ["fc"])
    assert [weight.operator for weight in some.weights()] == ["lora+offset", "lora"]
    with pytest.raises(ConfigError, match=r"only: expected some of the plain targets \['fc'\], got \['moe'\]"):
        group.with_operator("scale", only=["moe"])


def test_vectors_of_a_layer_share_tokens() -> None:
    """One token holds 32 numbers; four vectors of 6 fit in it."""
    (group,) = GeneratorLayout.of(config_of("scale_offset", "scale_offset")).groups
    assert (group.num_tokens_a, group.num_tokens_b, group.adapter_size) == (0, 1, 2 * 4 * 6)
    (group,) = GeneratorLayout.of(config_of("lora", "scale_offset")).groups
    assert (group.tokens_a, group.tokens_b) == ((1,), (1, 1))


def test_a_layer_of_large_maps_takes_the_positions_and_numbers_that_the_page_states() -> None:
    maps = tuple(PlainTarget(f"fc{i}", 4096, 4096) for i in range(11))
    config = GeneratorConfig(16, 16, 1024, 64, 1024, 128, 4, 1, (LayerGroup("", 1, maps),))
    page = (Path(__file__).parents[2] / "docs" / "operators.md").read_text(encoding="utf-8")
    for operator, positions in (("lora", 352), ("scale_offset", 24), ("basis_matrix", 4)):
        changed = replace(config, groups=(config.groups[0].with_operator(operator),))
        (layout,) = GeneratorLayout.of(changed).groups
        assert layout.positions_per_layer == positions
        cost = adapter_cost(layout.targets[:1], 16)
        assert cost.numbers * 11 == layout.adapter_size
        assert cost.bytes_per_request == 2 * cost.numbers
        row = f"| `{operator}` | {5493e-6 * cost.numbers:,.2f} M | {5493e-6 * cost.bytes_per_request:,.1f} MB |"
        assert f"{row} {5493e-6 * cost.shared:,.0f} M |" in page


@pytest.mark.parametrize("operators", [*((each, each) for each in OPERATORS), ("scale_offset", "lora")])
def test_both_paths_write_the_same_and_folders_come_back(operators: tuple[str, str], tmp_path: Path) -> None:
    generator = generator_of(*operators).requires_grad_(False)
    condition = torch.randn(3, 4, 5)
    clear = generator(condition)
    assert [target.operator for target in clear.targets] == list(operators) * 2
    generator.save_pretrained(tmp_path)
    loaded = ParameterGenerator.from_pretrained(tmp_path)
    fast = FastGenerator(generator, FastOptions(chunk_layers=1))(condition)
    for name, part in clear.state_dict().items():
        assert part.std() > 0
        assert torch.equal(loaded(condition).state_dict()[name], part)
        torch.testing.assert_close(fast.state_dict()[name], part)


def test_before_training_the_base_hardly_changes() -> None:
    generator = generator_of("scale_offset", "lora", b_init_std=1e-3).requires_grad_(False)
    base, x = Base().requires_grad_(False), torch.randn(2, 3, 6)
    adapter = generator(torch.randn(2, 4, 5))
    for name in ("0.fc0", "1.fc0"):
        assert 1e-4 < float(adapter.factors[name]["gain"].std()) < 1e-2
    with attach(base, adapter.targets) as handle, handle.applied(adapter):
        changed = base(x)
    assert 0 < float((changed - base(x)).norm() / base(x).norm()) < 0.05


@pytest.mark.parametrize("operators", [*((each, each) for each in OPERATORS), ("scale_offset", "lora")])
def test_a_generator_learns_through_the_base(operators: tuple[str, str]) -> None:
    """Two requests with different adapters in one batch; every parameter that writes something gets a gradient."""
    generator, base = generator_of(*operators), Base().requires_grad_(False)
    condition, x = torch.randn(2, 4, 5), torch.randn(2, 8, 6)
    wanted = base(x) * torch.tensor([0.7, 1.2]).view(2, 1, 1) + 0.3
    optimizer = torch.optim.Adam(generator.parameters(), lr=3e-3)
    losses = []
    with attach(base, generator.targets) as handle:
        for _ in range(30):
            with handle.applied(generator(condition)):
                loss = (base(x) - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    trained = {name: each for name, each in generator.named_parameters() if each.requires_grad}
    assert all(each.grad is not None and each.grad.any() for each in trained.values())
    assert ("groups.layers.proj_out_A.weight" in trained) == ("lora" in operators)


def test_what_a_config_cannot_say_is_refused() -> None:
    fields = config_of("lora", "lora").to_dict()
    for entry, message in (
        ({"operator": "scale", "in_dim": 6}, "fc0: missing field 'out_dim'"),
        ({"operator": "scale", "lora_A_dim": 6, "lora_B_dim": 6}, "fc0: missing field 'in_dim'"),
        ({"operator": "scale", "in_dim": 6, "out_dim": 0}, "fc0: out_dim: expected a whole number above 0, got 0"),
        ({"operator": 3, "in_dim": 6, "out_dim": 6}, "fc0: operator: expected text without dots, got 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            GeneratorConfig.from_dict(fields | {"pg_mapping": {"fc0": entry}})
    with pytest.raises(ConfigError, match="moe: w1: operator: expected 'lora' for the weights of experts, got 'scale'"):
        GroupedTarget("moe", 2, (PlainTarget("w1", 6, 7, "scale"),))
    config = config_of("lora", "lora")
    unknown = replace(config, groups=(config.groups[0].with_operator("twist"),))
    with pytest.raises(OpenwuError, match=r"operator: expected one of lora, .* got 'twist'"):
        ParameterGenerator(unknown)

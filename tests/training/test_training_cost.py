"""The cost of a generator's config is counted before it runs, and the operations are those of a real pass."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from openwu.generator.layout import GeneratorLayout
from openwu.generator.model import ParameterGenerator
from openwu.training.embedded.model import EmbeddedConfig
from openwu.training.memory import PASSES, generator_cost, measured_rate


def test_cost_is_that_of_the_generator_itself(embedded_config: EmbeddedConfig) -> None:
    config = embedded_config.generator
    cost = generator_cost(config, batch=3, tokens=5)
    generator = ParameterGenerator(config)
    # Torch does not count its fused attention on processors.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        adapter = generator(torch.zeros(3, 5, config.input_dim))
    assert cost.flops == PASSES * counter.get_total_flops() > 0
    assert cost.parameters == sum(parameter.numel() for parameter in generator.parameters())
    assert cost.adapter_size == adapter.parameters_per_sample
    assert cost.positions == GeneratorLayout.of(config).num_positions
    assert cost.held == 16 * cost.parameters
    deeper = generator_cost(replace(config, num_pg_layers=2), batch=3, tokens=5)
    assert deeper.flops > cost.flops
    assert deeper.activations == 2 * cost.activations
    assert cost.seconds(rate=cost.flops / 2) == 2
    assert "about 2 s an update" in cost.report(cost.flops / 2)
    assert f"{cost.positions:,} positions" in cost.report()


def test_the_rate_is_that_of_a_machine() -> None:
    assert 1e8 < measured_rate() < 1e14

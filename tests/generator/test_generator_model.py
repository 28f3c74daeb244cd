"""ParameterGenerator: size without memory, groups, masks, gradients, initialisation, dtypes and refused conditions."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openwu.config import RELEASED_GROUP, GeneratorConfig, LayerGroup, PlainTarget
from openwu.generator.model import ParameterGenerator
from openwu.types import Adapter, Condition

RELEASED_PARAMETERS = 8_096_647_168


def update_loss(adapter: Adapter) -> Tensor:
    """A loss that sees the adapter as a base model does, through scale * B A, with a fixed random direction."""
    random = torch.Generator().manual_seed(0)
    losses = []
    for a, b in adapter.pairs.values():
        update = adapter.scale * b.double() @ a.double()
        losses.append((update * torch.randn(update.shape, generator=random, dtype=torch.float64)).sum())
    return torch.stack(losses).sum()


def test_released_size_needs_no_memory(released_fields: dict[str, Any]) -> None:
    with torch.device("meta"):
        generator = ParameterGenerator(GeneratorConfig.from_dict(released_fields))
    assert generator.num_parameters == RELEASED_PARAMETERS
    assert generator.layout.num_positions == 176_512
    assert generator.layout.adapter_size == 722_993_152
    assert generator.scale == 4.0
    assert all(parameter.is_meta for parameter in generator.parameters())


def test_forward_on_the_meta_device_has_all_shapes(groups_config: GeneratorConfig) -> None:
    with torch.device("meta"):
        generator = ParameterGenerator(groups_config)
        mask = torch.ones(2, 3, dtype=torch.bool)
        adapter = generator(Condition(torch.randn(2, 3, groups_config.input_dim), mask))
    assert adapter.batch == 2
    assert adapter.parameters_per_sample == generator.layout.adapter_size


def test_groups_compute_what_each_would_alone(groups_config: GeneratorConfig) -> None:
    torch.manual_seed(0)
    generator = ParameterGenerator(groups_config)
    condition = torch.randn(2, 3, groups_config.input_dim)
    together = generator(condition)
    assert together.targets == generator.targets
    for group in groups_config.groups:
        alone = ParameterGenerator(replace(groups_config, groups=(replace(group, name=RELEASED_GROUP),)))
        of_group, mine = f"groups.{group.name}.", f"groups.{RELEASED_GROUP}."
        weights = {key.replace(of_group, mine): tensor for key, tensor in generator.state_dict().items()}
        alone.load_state_dict({key: weights[key] for key in alone.state_dict()})
        for name, parts in alone(condition).pairs.items():
            assert all(torch.equal(came, part) for came, part in zip(together.pairs[name], parts, strict=True))


def test_one_group_is_the_same_function_under_any_name(tiny_config: GeneratorConfig) -> None:
    one = ParameterGenerator(tiny_config)
    other = ParameterGenerator(replace(tiny_config, groups=(replace(tiny_config.groups[0], name="other"),)))
    other.load_state_dict({key.replace(".layers.", ".other."): tensor for key, tensor in one.state_dict().items()})
    condition = torch.randn(1, 3, tiny_config.input_dim)
    expected = one(condition).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in other(condition).state_dict().items())


@pytest.mark.parametrize(
    "mask",
    [
        [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]],
        [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 1, 1, 1]],
        [[0, 1, 0, 1, 0], [1, 0, 0, 0, 1], [1, 1, 0, 1, 1]],
    ],
    ids=["right", "left", "holes"],
)
def test_masked_batch_equals_every_sample_alone(groups_config: GeneratorConfig, mask: list[list[int]]) -> None:
    generator = ParameterGenerator(groups_config).double()
    mask_bl = torch.tensor(mask, dtype=torch.bool)
    tokens = torch.randn(3, 5, groups_config.input_dim, dtype=torch.float64)
    poisoned = tokens.masked_fill(~mask_bl[..., None], float("nan")).requires_grad_()
    batch = generator(Condition(poisoned, mask_bl))
    for sample in range(3):
        alone = generator(tokens[sample, mask_bl[sample]][None])
        for key, tensor in alone.state_dict().items():
            torch.testing.assert_close(batch.state_dict()[key][sample], tensor[0], rtol=1e-10, atol=1e-14)
    (gradient,) = torch.autograd.grad(update_loss(batch), poisoned)
    assert bool((gradient[~mask_bl] == 0).all())
    assert bool((gradient[mask_bl] != 0).any(-1).all())


def test_full_mask_is_no_mask(tiny_config: GeneratorConfig) -> None:
    generator = ParameterGenerator(tiny_config).double()
    tokens = torch.randn(2, 4, tiny_config.input_dim, dtype=torch.float64)
    without = generator(tokens).state_dict()
    full = generator(Condition(tokens, torch.ones(2, 4, dtype=torch.bool))).state_dict()
    for key, tensor in without.items():
        torch.testing.assert_close(full[key], tensor, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["tiny_config", "groups_config"])
def test_every_parameter_gets_gradient_from_the_first_step(name: str, request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    generator = ParameterGenerator(request.getfixturevalue(name)).double()
    condition = torch.randn(2, 3, generator.config.input_dim, dtype=torch.float64)
    torch.autograd.backward(update_loss(generator(condition)))
    for key, parameter in generator.named_parameters():
        assert parameter.grad is not None, key
        rows = parameter.grad.abs().reshape(len(parameter), -1).amax(dim=1)
        assert float(rows.min()) > 0, f"{key}: rows without gradient"
        # Far above what rounding leaves behind where a gradient is zero by symmetry (about 1e-19 here).
        assert float(rows.max()) > 1e-9, f"{key}: {float(rows.max())}"


def test_a_fresh_adapter_is_nearly_a_no_op_and_shaped_like_lora() -> None:
    torch.manual_seed(0)
    groups = (LayerGroup("layers.", 2, (PlainTarget("proj", 96, 80),)),)
    config = GeneratorConfig(16, 64, 32, 24, 64, 16, 4, 3, groups)
    generator = ParameterGenerator(config)
    with torch.no_grad():
        adapter = generator(torch.randn(4, 6, 24))
    a, b = adapter.pairs["layers.1.proj"]
    assert 0.7 < float(a.std()) * 96**0.5 < 1.4
    assert 0.7 < float(b.std()) / 1e-3 < 1.4
    x, weight = torch.randn(50, 96), torch.randn(80, 96) / 96**0.5
    y = x @ weight.T
    change = adapter.scale * (x @ a.mT) @ b.mT
    assert 0 < float(change.square().mean().sqrt() / y.square().mean().sqrt()) < 0.05
    # All r directions are used, and samples differ because their conditions do.
    assert int(torch.linalg.matrix_rank(a[0])) == 16
    assert float((a[0] - a[1]).norm() / a[0].norm()) > 0.01


def test_initialisation_is_reproducible_and_refuses_zero(tiny_config: GeneratorConfig) -> None:
    torch.manual_seed(3)
    first = ParameterGenerator(tiny_config, b_init_std=0.5).state_dict()
    torch.manual_seed(3)
    again = ParameterGenerator(tiny_config, b_init_std=0.5).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    for std in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="b_init_std: expected a number above 0"):
            ParameterGenerator(tiny_config, b_init_std=std)


@pytest.mark.parametrize("masked", [False, True])
def test_gradient_checkpointing_changes_no_gradient(groups_config: GeneratorConfig, masked: bool) -> None:
    generator = ParameterGenerator(groups_config)
    tokens = torch.randn(2, 4, groups_config.input_dim)
    mask = torch.tensor([[True] * 4, [True, True, False, False]]) if masked else None
    recomputed = copy.deepcopy(generator)
    recomputed.gradient_checkpointing = True
    calls = []
    for block in recomputed.blocks:
        # Before the block: a recomputation stops as soon as it has what the backward needs.
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    losses = [update_loss(each(Condition(tokens, mask))) for each in (generator, recomputed)]
    assert torch.equal(*losses)
    for loss in losses:
        torch.autograd.backward(loss)
    assert len(calls) == 2 * len(recomputed.blocks) * len(groups_config.groups)
    for ours, theirs in zip(generator.parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(_gradient(ours), _gradient(theirs))


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


@pytest.mark.parametrize(
    ("parameters", "autocast", "asked", "residual", "adapter_dtype"),
    [
        (torch.float32, False, None, torch.float32, torch.float32),
        (torch.bfloat16, False, None, torch.float32, torch.bfloat16),
        (torch.float32, True, None, torch.float32, torch.bfloat16),
        (torch.bfloat16, True, None, torch.float32, torch.bfloat16),
        (torch.float32, True, torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, False, torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.bfloat16, False, torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("recompute", [False, True])
def test_residual_and_adapter_dtypes_are_as_documented(
    tiny_config: GeneratorConfig,
    parameters: torch.dtype,
    autocast: bool,
    asked: torch.dtype | None,
    residual: torch.dtype,
    adapter_dtype: torch.dtype,
    recompute: bool,
) -> None:
    torch.manual_seed(0)
    generator = ParameterGenerator(tiny_config).to(parameters)
    tokens = torch.randn(2, 3, tiny_config.input_dim)
    exact = copy.deepcopy(generator).double()(tokens).state_dict()
    generator.residual_dtype, generator.gradient_checkpointing = asked, recompute
    seen: list[torch.dtype] = []
    for block in generator.blocks:
        block.register_forward_hook(lambda _module, inputs, output: seen.extend((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        adapter = generator(tokens)
    assert set(seen) == {residual}
    for key, tensor in adapter.state_dict().items():
        assert tensor.dtype == adapter_dtype
        assert bool((tensor.double() - exact[key]).norm() < 0.05 * exact[key].norm())
    torch.autograd.backward(update_loss(adapter))
    assert all(_gradient(parameter).dtype == parameters for parameter in generator.parameters())


@torch.no_grad()
def test_a_float32_stream_rounds_less_than_one_of_16_bits(tiny_config: GeneratorConfig) -> None:
    generator = ParameterGenerator(replace(tiny_config, num_pg_layers=6)).to(torch.bfloat16)
    tokens = torch.randn(2, 3, tiny_config.input_dim, dtype=torch.bfloat16)
    exact = copy.deepcopy(generator).double()(tokens.double()).state_dict()

    def error(stream: torch.dtype | None) -> float:
        generator.residual_dtype = stream
        return sum(float((each.double() - exact[key]).norm()) for key, each in generator(tokens).state_dict().items())

    assert error(None) == error(torch.float32)
    assert error(None) < 0.8 * error(torch.bfloat16)


def test_a_condition_of_another_float_dtype_is_converted(tiny_config: GeneratorConfig) -> None:
    generator = ParameterGenerator(tiny_config)
    tokens = torch.randn(1, 3, tiny_config.input_dim).bfloat16()
    expected = generator(tokens.float()).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in generator(tokens).state_dict().items())


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (torch.zeros(2, 5), r"condition: expected \[b, L, 5\] .* got \[2, 5\]"),
        (torch.zeros(2, 3, 6), r"condition: expected \[b, L, 5\] .* got \[2, 3, 6\]"),
        (torch.zeros(2, 0, 5), r"condition: expected \[b, L, 5\] with b and L above 0, got \[2, 0, 5\]"),
        (torch.zeros(2, 3, 5, dtype=torch.int64), "expected a floating point dtype .* got torch.int64"),
        (torch.zeros(2, 3, 5, dtype=torch.complex64), "expected a floating point dtype .* got torch.complex64"),
        (torch.zeros(2, 3, 5, device="meta"), "expected on the generator's device cpu, got meta"),
        (Condition(torch.zeros(2, 3, 5), torch.ones(2, 4).bool()), r"mask: expected \[2, 3\] .* got \[2, 4\]"),
        (Condition(torch.zeros(2, 3, 5), torch.ones(2, 3)), "mask: expected .* torch.bool .* got .* torch.float32"),
        (Condition(torch.zeros(2, 3, 5), torch.tensor([[True] * 3, [False] * 3])), "at least one real token"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(
    tiny_config: GeneratorConfig, condition: Condition | Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ParameterGenerator(tiny_config)(condition)

"""Targets <-> tokens: the released counts, the order and padding of numbers, and views instead of copies."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from openwu.config import GeneratorConfig, GroupedTarget, LayerGroup, PlainTarget
from openwu.generator.layout import Factors, GeneratorLayout, GroupLayout

WIDTHS = st.integers(1, 40)


@st.composite
def layouts(draw: st.DrawFn) -> GroupLayout:
    targets: list[PlainTarget | GroupedTarget] = []
    operators = st.sampled_from(["lora", "lora", "scale", "offset", "scale_offset"])
    for number in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            targets.append(PlainTarget(f"t{number}", draw(WIDTHS), draw(WIDTHS), draw(operators)))
        else:
            weights = [PlainTarget(f"w{sub}", draw(WIDTHS), draw(WIDTHS)) for sub in range(draw(st.integers(1, 2)))]
            targets.append(GroupedTarget(f"t{number}", draw(st.integers(1, 3)), tuple(weights)))
    accumulation = draw(st.integers(1, 3))
    config = GeneratorConfig(
        rank=accumulation * draw(st.integers(1, 3)),
        alpha=1,
        token_dim=draw(st.integers(1, 13)),
        input_dim=1,
        d_model=4 * accumulation,
        head_dim=4,
        dim_accumulation=accumulation,
        num_pg_layers=1,
        groups=(LayerGroup("l.", draw(st.integers(1, 3)), tuple(targets)),),
    )
    return GeneratorLayout.of(config).groups[0]


def random_factors(layout: GroupLayout, batch: int) -> dict[str, dict[str, Tensor]]:
    shapes = {target.name: target.shapes(batch, layout.rank) for target in layout.targets}
    return {name: {part: torch.randn(shape) for part, shape in parts.items()} for name, parts in shapes.items()}


def naive_rows(layout: GroupLayout, factors: Factors, sample: int, layer: int, name: str) -> list[float]:
    """The numbers of all tokens of one layer with lora_A, or with lora_B and vectors, written out one by one."""
    numbers: list[float] = []

    def add(part: Tensor) -> None:
        numbers.extend(part[sample].reshape(-1).tolist())

    def fill() -> None:
        while len(numbers) % (layout.rank * layout.token_dim):
            numbers.append(0.0)

    for target in layout.layers[layer]:
        if target.operator == "lora":
            add(factors[target.name][name])
            fill()
    for target in layout.layers[layer] if name == "lora_B" else ():
        for vector in ("gain", "offset"):
            if vector in factors[target.name]:
                add(factors[target.name][vector])
    fill()
    return numbers


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), batch=st.integers(1, 2))
def test_pack_and_unpack_are_inverse_and_ordered(layout: GroupLayout, batch: int) -> None:
    factors = random_factors(layout, batch)
    tokens = layout.pack(factors)
    counts = layout.num_tokens_a, layout.num_tokens_b
    for name, each, count in zip(("lora_A", "lora_B"), tokens, counts, strict=True):
        assert each.shape == (batch, layout.num_layers, count, layout.rank, layout.token_dim)
        for sample in range(batch):
            for layer in range(layout.num_layers):
                expected = naive_rows(layout, factors, sample, layer, name)
                assert each[sample, layer].reshape(-1).tolist() == expected
    unpacked = layout.unpack(*tokens)
    assert list(unpacked) == [target.name for target in layout.targets]
    for name, parts in factors.items():
        assert list(unpacked[name]) == list(parts)
        assert all(torch.equal(unpacked[name][each], part) for each, part in parts.items())


@settings(max_examples=20, deadline=None)
@given(layout=layouts())
def test_unpacked_factors_are_views_and_every_number_gets_its_gradient(layout: GroupLayout) -> None:
    def tokens(count: int) -> Tensor:
        return torch.randn(1, layout.num_layers, count, layout.rank, layout.token_dim, requires_grad=True)

    tokens_a, tokens_b = tokens(layout.num_tokens_a), tokens(layout.num_tokens_b)
    unpacked = layout.unpack(tokens_a, tokens_b)
    for parts in unpacked.values():
        for name, part in parts.items():
            source = tokens_a if name == "lora_A" else tokens_b
            assert part.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
    torch.autograd.backward([part.sum() for parts in unpacked.values() for part in parts.values()])
    gradients = [torch.zeros(0) if each.grad is None else each.grad.flatten() for each in (tokens_a, tokens_b)]
    joined = torch.cat(gradients)
    # One for every number of a factor, zero for every number of padding.
    assert int((joined == 1).sum()) == layout.adapter_size
    assert int((joined == 0).sum()) == tokens_a.numel() + tokens_b.numel() - layout.adapter_size


def test_released_counts(released_fields: dict[str, Any]) -> None:
    layout = GeneratorLayout.of(GeneratorConfig.from_dict(released_fields))
    (group,) = layout.groups
    assert group.tokens_a == (4, 4, 4, 3, 256, 192, 256)
    assert group.tokens_b == (6, 4, 6, 4, 192, 256, 192)
    assert (group.num_tokens_a, group.num_tokens_b, group.num_tokens) == (719, 660, 1379)
    assert (group.positions_per_layer, layout.num_positions) == (5516, 176_512)
    assert layout.adapter_size == 722_993_152
    assert len(layout.targets) == 32 * 7
    assert layout.targets[4].name == "model.layers.0.mlp.experts.w1"
    assert layout.targets[4].experts == 64


def test_groups_keep_their_own_counts(groups_config: GeneratorConfig) -> None:
    layout = GeneratorLayout.of(groups_config)
    names = [target.name for target in layout.targets]
    assert names[:4] == ["down.0.conv", "down.0.experts.w1", "down.0.experts.w2", "down.1.conv"]
    assert names[-3:] == ["up.2.conv", "head.conv1", "head.conv2"]
    assert layout.num_positions == sum(group.num_layers * group.positions_per_layer for group in layout.groups)
    sizes = [prod(shape) for target in layout.targets for shape in target.shapes(1, groups_config.rank).values()]
    assert layout.adapter_size == sum(sizes)

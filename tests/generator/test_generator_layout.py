"""Targets <-> tokens: the released counts, the order and padding of numbers, and views instead of copies."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from openwu.config import GeneratorConfig, GroupedTarget, LayerGroup, PlainTarget
from openwu.generator.layout import GeneratorLayout, GroupLayout, LoraWeights

WIDTHS = st.integers(1, 40)


@st.composite
def layouts(draw: st.DrawFn) -> GroupLayout:
    targets: list[PlainTarget | GroupedTarget] = []
    for number in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            targets.append(PlainTarget(f"t{number}", draw(WIDTHS), draw(WIDTHS)))
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


def random_weights(layout: GroupLayout, batch: int) -> dict[str, tuple[Tensor, Tensor]]:
    weights = {}
    for target in layout.targets:
        shape_a, shape_b = target.shapes(batch, layout.rank)
        weights[target.name] = (torch.randn(shape_a), torch.randn(shape_b))
    return weights


def naive_rows(layout: GroupLayout, weights: LoraWeights, sample: int, layer: int, factor: int) -> list[float]:
    """The numbers of all A (factor 0) or all B (factor 1) tokens of one layer, written out one by one."""
    numbers: list[float] = []
    for target in layout.layers[layer]:
        numbers += weights[target.name][factor][sample].reshape(-1).tolist()
        while len(numbers) % (layout.rank * layout.token_dim):
            numbers.append(0.0)
    return numbers


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), batch=st.integers(1, 2))
def test_pack_and_unpack_are_inverse_and_ordered(layout: GroupLayout, batch: int) -> None:
    weights = random_weights(layout, batch)
    tokens = layout.pack(weights)
    for factor, count in enumerate((layout.num_tokens_a, layout.num_tokens_b)):
        assert tokens[factor].shape == (batch, layout.num_layers, count, layout.rank, layout.token_dim)
        for sample in range(batch):
            for layer in range(layout.num_layers):
                expected = naive_rows(layout, weights, sample, layer, factor)
                assert tokens[factor][sample, layer].reshape(-1).tolist() == expected
    unpacked = layout.unpack(*tokens)
    assert list(unpacked) == [target.name for target in layout.targets]
    for name, parts in weights.items():
        assert all(torch.equal(came, part) for came, part in zip(unpacked[name], parts, strict=True))


@settings(max_examples=20, deadline=None)
@given(layout=layouts())
def test_unpacked_factors_are_views_and_every_number_gets_its_gradient(layout: GroupLayout) -> None:
    def tokens(count: int) -> Tensor:
        return torch.randn(1, layout.num_layers, count, layout.rank, layout.token_dim, requires_grad=True)

    tokens_a, tokens_b = tokens(layout.num_tokens_a), tokens(layout.num_tokens_b)
    unpacked = layout.unpack(tokens_a, tokens_b)
    for a, b in unpacked.values():
        assert a.untyped_storage().data_ptr() == tokens_a.untyped_storage().data_ptr()
        assert b.untyped_storage().data_ptr() == tokens_b.untyped_storage().data_ptr()
    torch.autograd.backward([part.sum() for parts in unpacked.values() for part in parts])
    assert tokens_a.grad is not None
    assert tokens_b.grad is not None
    # One for every number of a factor, zero for every number of padding.
    assert int((tokens_a.grad == 1).sum() + (tokens_b.grad == 1).sum()) == layout.adapter_size
    assert int((tokens_a.grad == 0).sum() + (tokens_b.grad == 0).sum()) == (
        tokens_a.numel() + tokens_b.numel() - layout.adapter_size
    )


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
    sizes = [prod(shape) for target in layout.targets for shape in target.shapes(1, groups_config.rank)]
    assert layout.adapter_size == sum(sizes)

"""The nouns: sums of adapters against the sum of their updates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from openwu.adapters.inject import attach
from openwu.errors import TargetError
from openwu.types import Adapter, Target

TARGETS = (Target("0", 5, 7), Target("1", 7 * 9, 3, kernel=(3, 3)), Target("mlp.up", 4, 6, experts=2))


def adapter(
    rank: int, scale: float, seed: int, batch: int = 2, *, instructions: tuple[tuple[str, ...], ...] = ()
) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    weights = {
        target.name: tuple(
            torch.randn(shape, generator=draw, dtype=torch.float64) for shape in target.shapes(batch, rank).values()
        )
        for target in TARGETS
    }
    return Adapter.from_pairs(TARGETS, weights, scale, instructions)  # type: ignore[arg-type]


def updates(given: Adapter) -> dict[str, Tensor]:
    return {name: given.scale * (b @ a) for name, (a, b) in given.pairs.items()}


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.floats(0.05, 8), st.integers(0, 99)),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 3),
)
def test_a_sum_updates_as_all_of_them_together(parts: list[tuple[int, float, int]], batch: int) -> None:
    """Of any ranks and scales, for plain weights, convolutions and experts."""
    adapters = [adapter(rank, scale, seed, batch) for rank, scale, seed in parts]
    summed = Adapter.sum(adapters)
    assert (summed.batch, summed.rank) == (batch, sum(rank for rank, _, _ in parts))
    assert summed.scale == adapters[0].scale
    for name, update in updates(summed).items():
        expected = torch.stack([updates(each)[name] for each in adapters]).sum(0)
        torch.testing.assert_close(update, expected)


def test_ranks_stand_in_the_order_given() -> None:
    one, other = adapter(1, 2.0, 0), adapter(3, 0.5, 1)
    for name, (a, b) in Adapter.sum([one, other]).pairs.items():
        assert torch.equal(a[..., :1, :], one.pairs[name][0])
        assert torch.equal(a[..., 1:, :], other.pairs[name][0])
        assert torch.equal(b[..., :1], one.pairs[name][1])
        assert torch.equal(b[..., 1:], other.pairs[name][1] / 4)


def test_a_sum_of_one_is_that_one() -> None:
    only = adapter(2, 0.3, 0, instructions=(("warmer",), ("cooler",)))
    summed = Adapter.sum([only])
    assert (summed.scale, summed.instructions) == (0.3, (("warmer",), ("cooler",)))
    for name, (a, b) in summed.pairs.items():
        assert torch.equal(a, only.pairs[name][0])
        assert torch.equal(b, only.pairs[name][1])


def test_instructions_of_a_sum_are_joined_sample_by_sample() -> None:
    one = adapter(1, 1.0, 0, instructions=(("warmer",), ("cooler",)))
    other = adapter(1, 1.0, 1, instructions=(("blur it",), ("sharpen it",)))
    assert Adapter.sum([one, other]).instructions == (("warmer", "blur it"), ("cooler", "sharpen it"))
    assert Adapter.sum([one, adapter(1, 1.0, 2)]).instructions == ()


def test_instructions_are_a_tuple_for_each_sample() -> None:
    with pytest.raises(ValueError, match=r"expected a tuple of texts for each sample, got .'warmer', 'cooler'"):
        adapter(1, 1.0, 0, instructions=("warmer", "cooler"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected none or 2, one per sample, got 1"):
        adapter(1, 1.0, 0, instructions=(("warmer", "cooler"),))


def test_factors_stand_in_the_order_of_the_operator() -> None:
    parts = dict(reversed(adapter(1, 1.0, 0).factors["0"].items()))
    with pytest.raises(TargetError, match=r"expected factors of shapes .* in this order"):
        Adapter(TARGETS[:1], {"0": parts}, 1.0)


def test_only_adapters_for_the_same_weights_and_samples_add_up() -> None:
    one = adapter(1, 1.0, 0)
    fewer = Adapter.from_pairs(TARGETS[:1], {"0": one.pairs["0"]}, 1.0)
    for other in (adapter(1, 1.0, 0, batch=3), fewer):
        with pytest.raises(TargetError, match="same targets and as many samples"):
            Adapter.sum([one, other])
    with pytest.raises(ValueError, match="at least one"):
        Adapter.sum([])


def test_an_applied_sum_is_two_products_side_by_side() -> None:
    """Through the hooks, with gradients that reach every part as they would alone."""
    layer = nn.Sequential(nn.Linear(5, 7)).double()
    target = TARGETS[:1]
    x = torch.randn(2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    parts = []
    for rank, scale, seed in ((2, 0.7, 0), (1, 3.0, 1)):
        a, b = adapter(rank, scale, seed).pairs["0"]
        parts.append(Adapter.from_pairs(target, {"0": (a.requires_grad_(), b.requires_grad_())}, scale))
    leaves = [leaf for part in parts for leaf in part.pairs["0"]]
    handle = attach(layer, target)
    with handle.applied(Adapter.sum(parts)):
        y = layer(x)
    expected = layer(x) + sum(
        part.scale * (x @ part.pairs["0"][0].transpose(1, 2) @ part.pairs["0"][1].transpose(1, 2)) for part in parts
    )
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad(y.square().sum(), leaves)
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@settings(deadline=None, max_examples=40)
@given(st.floats(-3, 3))
def test_strength_scales_every_part_of_a_sum(strength: float) -> None:
    parts = [adapter(1, 1.0, 0), adapter(2, 0.25, 1)]
    before = updates(Adapter.sum([part.scaled(strength) for part in parts]))
    after = updates(Adapter.sum(parts).scaled(strength))
    for name, update in before.items():
        torch.testing.assert_close(update, after[name])


def test_a_target_may_have_a_rank_of_its_own(tmp_path: Path) -> None:
    targets = (Target("0", 5, 7, rank=3), Target("1", 7, 7))
    given = Adapter.from_pairs(
        targets,
        {
            t.name: (torch.randn(2, rank, t.in_dim), torch.randn(2, t.out_dim, rank))
            for t, rank in zip(targets, (3, 4), strict=True)
        },
        1.0,
    )
    assert given.rank == 4
    added = Adapter.sum([given, given])
    assert [added.factors[name]["lora_A"].shape[1] for name in "01"] == [6, 8]
    given.save_pretrained(tmp_path)
    read = Adapter.from_pretrained(tmp_path)
    assert [target.rank for target in read.targets] == [3, None]
    for name, part in given.state_dict().items():
        assert torch.equal(part, read.state_dict()[name])
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 7))
    x = torch.randn(2, 5)
    with torch.no_grad():
        own = model[0](x) + torch.einsum("boi,bi->bo", updates(given)["0"], x)
        expected = model[1](own) + torch.einsum("boi,bi->bo", updates(given)["1"], own)
        with attach(model, targets).applied(given):
            torch.testing.assert_close(model(x), expected)
    with pytest.raises(TargetError, match="expected factors of shapes"):
        Adapter.from_pairs((Target("0", 5, 7, rank=2), targets[1]), given.pairs, 1.0)

"""Variances of updates, against updates that are written out."""

from __future__ import annotations

import pytest
import torch
from adapter_cases import SMALL_TARGETS, random_adapter
from torch import Tensor

from openwu.adapters.updates import inner_products, relative_std, task_variances
from openwu.types import Adapter, Target

TASKS = ("blur", "blur", "fog", "fog", "fog")


def written_out(adapter: Adapter) -> Tensor:
    """scale * B A of every target, flattened: `[b, ...]`"""
    return torch.cat([adapter.scale * (b @ a).flatten(1) for a, b in adapter.pairs.values()], dim=1)


def turned(adapter: Adapter) -> Adapter:
    """Equal updates from other factors."""
    turn = torch.linalg.qr(torch.randn(adapter.rank, adapter.rank, dtype=torch.float64))[0]
    weights = {name: (3 * turn @ a, b @ turn.T / 3) for name, (a, b) in adapter.pairs.items()}
    return Adapter.from_pairs(adapter.targets, weights, adapter.scale)


def test_inner_products_are_those_of_the_updates() -> None:
    adapter = random_adapter(SMALL_TARGETS, 5)
    updates = written_out(adapter)
    torch.testing.assert_close(inner_products(adapter), updates @ updates.T)


def test_variances_are_those_of_the_updates_and_no_factors() -> None:
    adapter = random_adapter(SMALL_TARGETS, 5)
    updates = written_out(adapter)
    size = updates.square().sum(1).mean()
    same = [(0, 1), (2, 3), (2, 4), (3, 4)]
    other = [(i, j) for i in (0, 1) for j in (2, 3, 4)]
    within, across = (
        float(torch.stack([(updates[i] - updates[j]).square().sum() for i, j in pairs]).mean() / 2 / size)
        for pairs in (same, other)
    )
    for one in (adapter, turned(adapter)):
        variances = task_variances(one, TASKS)
        expected = {"within": within, "across": across, "within_over_across": within / across}
        assert variances == pytest.approx(expected, rel=1e-9)
        deviation = (updates - updates.mean(0)).square().sum(1).mean()
        assert relative_std(one) == pytest.approx(float((deviation / size).sqrt()), rel=1e-9)


def test_spread_tells_collapse_from_variety() -> None:
    def adapter(b: Tensor) -> Adapter:
        return Adapter.from_pairs((Target("x", 2, 3),), {"x": (torch.ones(len(b), 1, 2), b)}, 1.0)

    assert relative_std(adapter(torch.ones(4, 3, 1))) == 0
    assert relative_std(adapter(torch.zeros(4, 3, 1))) == 0
    opposite = torch.ones(4, 3, 1) * torch.tensor([1.0, -1, 1, -1])[:, None, None]
    assert relative_std(adapter(opposite)) == pytest.approx(1)
    assert 0 < relative_std(adapter(torch.ones(4, 3, 1) + 0.1 * opposite)) < 0.2


def test_what_a_batch_has_no_pairs_for_is_left_out() -> None:
    adapter = random_adapter(SMALL_TARGETS, 2)
    assert set(task_variances(adapter, ["blur", "fog"])) == {"across"}
    assert set(task_variances(adapter, ["fog", "fog"])) == {"within"}
    assert task_variances(adapter.select([0, 0]), ["blur", "fog"]) == {"across": pytest.approx(0, abs=1e-12)}
    with pytest.raises(ValueError, match="tasks: expected one for each of 2 samples, got 1"):
        task_variances(adapter, ["blur"])

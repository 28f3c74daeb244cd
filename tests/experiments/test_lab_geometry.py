"""Adapters as points, against the updates written out."""

from __future__ import annotations

import torch
from lab_cases import TARGETS, adapter, updates

from openwu.adapters.updates import inner_products
from openwu.evaluation.experiments.geometry import coordinates, cosines, mean_update, nearest_same_task, random_like
from openwu.types import Adapter, Target


def test_inner_products_are_those_of_the_updates() -> None:
    first, second = adapter(3), adapter(4, seed=1, rank=3, scale=2.0)
    torch.testing.assert_close(inner_products(first, second).float(), updates(first) @ updates(second).t())
    rows = torch.nn.functional.normalize(updates(first))
    torch.testing.assert_close(cosines(first).float(), rows @ rows.t())


def test_turning_the_factors_changes_nothing() -> None:
    """B Q and Q^-1 A have the same product; the raw factors are far apart."""
    plain = adapter(2)
    turn = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(3)))[0]
    turned = Adapter.from_pairs(
        plain.targets, {n: (turn.t() @ a, b @ turn) for n, (a, b) in plain.pairs.items()}, plain.scale
    )
    torch.testing.assert_close(cosines(Adapter.stack([plain, turned]))[:2, 2:], cosines(plain))


def test_experts_count_like_targets_of_their_own() -> None:
    target = Target("experts", 5, 4, experts=3)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 2, 5, generator=generator), torch.randn(2, 3, 4, 2, generator=generator)
    flat = (b @ a).flatten(1)
    found = inner_products(Adapter.from_pairs((target,), {"experts": (a, b)}, 1.0))
    torch.testing.assert_close(found.float(), flat @ flat.t())


def test_coordinates_are_principal_components() -> None:
    points = updates(adapter(7))
    found, shares = coordinates((points @ points.t()).double(), 3)
    centred = points - points.mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(found.abs().float(), (u * s)[:, :3].abs(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(shares.float(), s[:3].square() / s.square().sum())


def test_the_mean_update_is_exact_and_fits_the_model() -> None:
    for samples in (1, 2, 9):
        several = adapter(samples)
        mean = mean_update(several)
        assert mean.batch == 1
        assert mean.targets == TARGETS
        torch.testing.assert_close(updates(mean)[0], updates(several).mean(0), atol=1e-5, rtol=1e-4)


def test_random_adapters_are_as_large_target_by_target() -> None:
    real = adapter(3)
    drawn = random_like(real, torch.Generator().manual_seed(5))
    for name, (a, b) in real.pairs.items():
        other_a, other_b = drawn.pairs[name]
        torch.testing.assert_close((other_b @ other_a).flatten(1).norm(dim=1), (b @ a).flatten(1).norm(dim=1))
    assert cosines(Adapter.stack([real, drawn]))[:3, 3:].abs().max() < 0.9
    assert not torch.equal(random_like(real, torch.Generator().manual_seed(1)).pairs["one"][0], drawn.pairs["one"][0])


def test_neighbours_of_the_own_group_do_not_count() -> None:
    similarity = torch.tensor([[1.0, 0.9, 0.5, 0.1], [0.9, 1.0, 0.1, 0.5], [0.5, 0.1, 1.0, 0.9], [0.1, 0.5, 0.9, 1.0]])
    tasks, groups = ["x", "y", "x", "y"], ["first", "first", "second", "second"]
    assert nearest_same_task(similarity, tasks) == [False] * 4
    assert nearest_same_task(similarity, tasks, groups) == [True] * 4

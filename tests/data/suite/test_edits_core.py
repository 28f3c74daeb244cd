"""Every edit of the suite makes a sound pair, at any size and strength, from its scene alone."""

from __future__ import annotations

import pytest
import torch
from edit_cases import FROM_NOISE, REFERENCES, REPAIRS, apart, make, plane
from torch import Tensor

from openwu.backbones.embedded.network import place_planes
from openwu.data.suite import BASE_EDITS, CONTRADICTORY_PAIRS, EDITS, FAMILIES, LITTLE, NORMAL, STRONG, Scene

GRADED = tuple(name for name, edit in EDITS.items() if edit.graded)


def test_the_suite_is_as_large_as_it_says() -> None:
    assert len(EDITS) == sum(len(family) for family in FAMILIES.values()) >= 60
    assert len(REFERENCES) >= 6
    for family, edits in FAMILIES.items():
        assert {edit.family for edit in edits} == {family}
        assert all(EDITS[edit.name] is edit for edit in edits)


def test_opposites_are_mutual() -> None:
    for name, edit in EDITS.items():
        if edit.opposite is not None:
            assert edit.opposite != name
            assert EDITS[edit.opposite].opposite == name
    named = [name for pair in CONTRADICTORY_PAIRS for name in pair]
    assert sorted(named) == sorted(name for name, edit in EDITS.items() if edit.opposite)


def test_the_base_learns_at_most_one_side_of_a_pair() -> None:
    assert set(BASE_EDITS) < set(EDITS)
    assert len(set(BASE_EDITS)) == len(BASE_EDITS)
    assert not set(BASE_EDITS) & set(REFERENCES)  # The base never sees a second picture.
    assert [pair for pair in CONTRADICTORY_PAIRS if set(pair) <= set(BASE_EDITS)] == []


@pytest.mark.parametrize("name", EDITS)
def test_a_pair_is_sound(name: str, coffee: Tensor, flower: Tensor) -> None:
    kept = coffee.clone()
    pair = make(name, coffee, flower[:, :40, :56])
    assert torch.equal(coffee, kept)
    for picture in (pair.picture, pair.target):
        assert picture.shape == coffee.shape
        assert picture.dtype == torch.float32
        assert 0 <= float(picture.min()) <= float(picture.max()) <= 1
    assert apart(pair.picture, pair.target) > 0.004
    if name in REFERENCES:
        assert pair.reference is not None
        assert pair.reference.shape == (3, 40, 56)
        assert 0 <= float(pair.reference.min()) < float(pair.reference.max()) <= 1
    else:
        assert pair.reference is None


@pytest.mark.parametrize("name", EDITS)
def test_a_pair_depends_on_its_scene_alone(name: str, coffee: Tensor, flower: Tensor) -> None:
    state = torch.get_rng_state()
    first, same = (make(name, coffee, flower, seed=1) for _ in range(2))
    assert torch.equal(first.picture, same.picture)
    assert torch.equal(first.target, same.target)
    if name in REFERENCES:
        assert first.reference is not None
        assert same.reference is not None
        assert torch.equal(first.reference, same.reference)
    else:
        assert torch.equal(make(name, coffee, None, seed=1).target, first.target)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("size", [(1, 1), (1, 50), (2, 9), (8, 5), (37, 53)])
def test_any_size(name: str, size: tuple[int, int]) -> None:
    source = 0.1 + 0.8 * torch.rand(3, *size, generator=torch.Generator().manual_seed(3))
    for strength in (LITTLE, EDITS[name].limit):
        pair = make(name, source, strength=strength)
        for picture in (pair.picture, pair.target):
            assert picture.shape == source.shape
            assert bool(((picture >= 0) & (picture <= 1)).all())  # false for NaN too


@pytest.mark.parametrize("name", GRADED)
def test_strengths_come_in_order(name: str, coffee: Tensor) -> None:
    """Half of an edit lies between its input and all of it; what may be exaggerated goes beyond."""
    little, normal = (make(name, coffee, strength=strength) for strength in (LITTLE, NORMAL))
    assert torch.equal(little.picture, normal.picture)
    full = apart(normal.target, normal.picture)
    assert 0 < apart(little.target, little.picture) < 0.95 * full
    assert apart(little.target, normal.target) < 0.95 * full
    limit = EDITS[name].limit
    assert NORMAL <= limit <= STRONG
    if limit > NORMAL:
        assert apart(make(name, coffee, strength=limit).target, normal.picture) > 1.02 * full


@pytest.mark.parametrize("name", EDITS)
def test_nothing_of_an_edit_leaves_its_input(name: str, coffee: Tensor) -> None:
    nothing = make(name, coffee, strength=0.0)
    assert torch.equal(nothing.target, nothing.picture)
    assert torch.equal(nothing.picture, make(name, coffee).picture)


def test_only_what_comes_in_degrees_is_graded() -> None:
    assert set(EDITS) - set(GRADED) == {"invert", *REFERENCES}


@pytest.mark.parametrize("name", EDITS)
def test_the_photograph_is_the_input_and_of_a_repair_the_target(name: str, coffee: Tensor) -> None:
    pair = make(name, coffee)
    if name in REPAIRS:
        torch.testing.assert_close(pair.target, coffee, atol=1e-6, rtol=0)
    elif name == "colourise":
        assert torch.equal(pair.picture[0], pair.picture[2])
        torch.testing.assert_close(pair.target, coffee, atol=1e-6, rtol=0)
    else:
        assert torch.equal(pair.picture, coffee)


@pytest.mark.parametrize("name", REPAIRS)
def test_half_a_repair_stops_half_way_and_none_goes_beyond(name: str, coffee: Tensor) -> None:
    half = make(name, coffee, strength=LITTLE)
    torch.testing.assert_close(half.target, (half.picture + coffee) / 2, atol=1e-6, rtol=0)
    assert torch.equal(make(name, coffee, strength=STRONG).target, make(name, coffee).target)
    assert EDITS[name].limit == NORMAL


@pytest.mark.parametrize("name", REPAIRS)
def test_damage_varies_and_is_nothing_that_the_base_sees(name: str, coffee: Tensor) -> None:
    damaged = [make(name, coffee, seed=seed).picture for seed in range(4)]
    assert any(not torch.equal(damaged[0], other) for other in damaged[1:])
    assert torch.equal(make(name, coffee, noise=plane(64, 64, 1)).picture, damaged[0])


@pytest.mark.parametrize("name", EDITS)
def test_the_noise_that_the_base_sees_decides_where_it_should(name: str, coffee: Tensor, flower: Tensor) -> None:
    first, other = (make(name, coffee, flower, noise=plane(64, 64, seed)) for seed in (0, 1))
    assert torch.equal(first.picture, other.picture)
    assert torch.equal(first.target, other.target) == (name not in FROM_NOISE)
    if name in FROM_NOISE and name not in REFERENCES:  # And nothing else that is random.
        assert torch.equal(make(name, coffee, seed=5).target, first.target)


@pytest.mark.parametrize("name", [name for name, edit in EDITS.items() if edit.exact])
def test_an_exact_edit_looks_at_single_pixels(name: str, coffee: Tensor) -> None:
    order = torch.randperm(64 * 64, generator=torch.Generator().manual_seed(0))
    shuffled, target = (x.flatten(1)[:, order].view_as(x) for x in (coffee, make(name, coffee).target))
    torch.testing.assert_close(make(name, shuffled).target, target, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", REFERENCES)
def test_a_reference_edit_needs_a_second_picture(name: str, coffee: Tensor) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected a scene with a second photograph, got none"):
        EDITS[name].make_pair(Scene(coffee, plane(64, 64), torch.Generator()))


def test_a_scene_knows_its_places_and_draws_its_own_numbers() -> None:
    scene = Scene(torch.zeros(3, 5, 8), plane(5, 8), torch.Generator().manual_seed(1))
    assert torch.equal(scene.place, place_planes(5, 8))
    drawn = torch.tensor([scene.uniform(2, 4) for _ in range(500)])
    assert 2 <= drawn.min() < 2.05
    assert 3.95 < drawn.max() <= 4
    assert float(drawn.mean()) == pytest.approx(3, abs=0.1)
    assert scene.normal_like(scene.noise).shape == (1, 5, 8)

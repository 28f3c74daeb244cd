"""Buckets: every batch is of one shape, every pair has its turn, and a step's pairs depend on its number alone."""

from __future__ import annotations

from collections import Counter

from PIL import Image

from openwu.data.buckets import Buckets
from openwu.data.pairs import Pair, Pairs, picture_size


def pairs(*widths: int) -> Pairs:
    made = []
    for number, width in enumerate(widths):
        image = Image.new("RGB", (width, 8))
        made.append(Pair((image,), ("a", "b"), image, f"task {number % 2}", str(number)))
    return Pairs(tuple(made))


def width(pair: Pair) -> int:
    return picture_size(pair.images[0])[0]


def test_batches_are_of_one_shape_and_pairs_take_turns() -> None:
    buckets = Buckets.of(pairs(*[8] * 8, *[16] * 4), width, 2, seed=1)
    assert [len(group) for group in buckets.groups] == [8, 4]
    steps = [buckets.step(step) for step in range(12)]
    for chosen in steps:
        assert len(chosen) == 2
        assert len({width(pair) for pair, _ in chosen}) == 1
    # A round of six batches has each of the twelve pairs once, in two rounds both.
    assert set(Counter(pair.where for chosen in steps[:6] for pair, _ in chosen).values()) == {1}
    assert set(Counter(pair.where for chosen in steps for pair, _ in chosen).values()) == {2}
    assert [width(chosen[0][0]) for chosen in steps[:6]] != [width(chosen[0][0]) for chosen in steps[6:]]
    again = Buckets.of(pairs(*[8] * 8, *[16] * 4), width, 2, seed=1)
    assert [[pair.where for pair, _ in again.step(step)] for step in (11, 3)] == [
        [pair.where for pair, _ in steps[step]] for step in (11, 3)
    ]


def test_a_small_bucket_fills_a_batch_by_itself() -> None:
    buckets = Buckets.of(pairs(8, 8, 8, 16), width, 3)
    found = [{pair.where for pair, _ in buckets.step(step)} for step in range(2)]
    assert {"3"} in found


def test_one_shape_is_the_pairs_themselves() -> None:
    whole = pairs(8, 8, 8, 8)
    buckets = Buckets.of(whole, width, 2, seed=4)
    rounds = [sorted(pair.where for step in (2 * k, 2 * k + 1) for pair, _ in buckets.step(step)) for k in range(3)]
    assert rounds == [["0", "1", "2", "3"]] * 3
    assert not Buckets.of(Pairs(()), width, 2).groups

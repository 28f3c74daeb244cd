"""Rows of the benchmark: what is measured in turn, and how it is judged."""

from __future__ import annotations

import gc
from contextlib import nullcontext

import pytest

from openwu_bench.measurement import Row, Timing, interleaved


def test_sides_are_run_in_turn_and_warm_up_is_not_counted() -> None:
    order: list[str] = []
    found = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=2, warmup=1)
    assert order == ["a", "b"] * 3
    assert {name: len(timing.seconds) for name, timing in found.items()} == {"a": 2, "b": 2}


def test_a_timing_has_median_and_quartiles() -> None:
    timing = Timing((4.0, 1.0, 3.0, 2.0, 5.0))
    assert (timing.median, timing.quartiles) == (3.0, (2.0, 4.0))
    assert Timing((7.0,)).quartiles == (7.0, 7.0)


@pytest.mark.parametrize(("value", "at_least", "reached"), [(2.0, True, True), (1.9, True, False), (2.1, False, False)])
def test_a_row_is_judged_by_its_goal(value: float, at_least: bool, reached: bool) -> None:
    assert Row("C0", "", value, "x", goal=2.0, at_least=at_least).reached is reached


@pytest.mark.parametrize("fails", [False, True])
def test_no_garbage_is_collected_between_calls_and_it_is_afterwards(fails: bool) -> None:
    """A collection before a call leaves caches cold and threads asleep, which would be timed."""
    collections: list[str] = []
    seen: list[bool] = []

    def side() -> None:
        seen.append(gc.isenabled())
        if fails and len(seen) == 3:
            raise RuntimeError("a side that fails")

    gc.callbacks.append(watch := lambda phase, _: collections.append(f"{phase} after {len(seen)} calls"))
    try:
        with pytest.raises(RuntimeError) if fails else nullcontext():
            interleaved({"one": side, "other": side}, 3)
    finally:
        gc.callbacks.remove(watch)
    assert not any(seen)
    # A collection may come once the calls are over; between them there is none.
    last = f"start after {len(seen)} calls"
    assert {each for each in collections if each.startswith("start")} - {last} == {"start after 0 calls"}
    assert gc.isenabled()

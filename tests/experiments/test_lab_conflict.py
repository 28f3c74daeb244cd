"""Methods on equal terms: what each trains, what it leaves alone, and what is said of the outcome."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openwu.data.suite import BASE_EDITS
from openwu.data.suite.batches import PairSampler
from openwu.data.suite.photographs import Photograph, load_folder
from openwu.errors import OpenwuError
from openwu.evaluation.experiments import methods as module
from openwu.evaluation.experiments.comparisons import conflict as conflict_module
from openwu.evaluation.experiments.comparisons.conflict import (
    MOST_FACTORS,
    ConflictResults,
    Outcome,
    conflict,
    searched,
)
from openwu.evaluation.experiments.methods import (
    METHODS,
    AdapterBank,
    Budget,
    Method,
    fit,
    method_loss,
    new_method,
    sampler,
)
from openwu.evaluation.experiments.results import ResultCache
from openwu.training.embedded.model import EmbeddedModel

TASKS, OLD = ("darken", "fade"), ("warm",)
BUDGET = Budget(steps=3, requests=2, crop=32, wide_rank=6)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SIDE", 64)
    monkeypatch.setattr(conflict_module, "CELL", 16)


@pytest.fixture(scope="session")
def training() -> tuple[list[Photograph], list[Photograph]]:
    photographs = load_folder(Path("photos"), validation=True)
    return photographs[:1], photographs[1:]


@pytest.fixture
def test_pictures() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(3, 32, 48, generator=generator) for name in ("astronaut", "coffee")}


def test_every_method_is_trained_and_judged_on_the_same_requests(
    embedded_model: EmbeddedModel,
    training: tuple[list[Photograph], list[Photograph]],
    test_pictures: dict[str, Tensor],
) -> None:
    before = {name: value.clone() for name, value in embedded_model.state_dict().items()}
    found = conflict(embedded_model, training, test_pictures, TASKS, OLD, BUDGET, (0, 1))
    assert set(found.methods) == {
        *("base", "random", "single", "retrieval", "shared", "shared, wide", "sft", "generated")
    }
    for method in found.methods:
        own = {(o.seed, o.task, o.photograph, o.old) for o in found.outcomes if o.method == method}
        assert len(own) == 2 * 2 * 3
    assert all(torch.equal(before[name], value) for name, value in embedded_model.state_dict().items())
    # What only new tasks were given for leaves the old ones as they were; a changed base does not.
    assert found.lead("single", "base", old=True).value == 0
    assert found.lead("retrieval", "base", old=True).value != 0  # its memory has no key for "none of these"
    assert found.lead("sft", "base", old=True).value != 0
    for method in ("single", "shared", "sft", "generated", "random"):
        assert found.lead(method, "base").value != 0
    assert set(found.cells) == set(TASKS)
    assert set(found.cells["fade"]) == {"input", "target", *found.methods}
    json.dumps(found.to_json())
    parameters = {cost["method"]: cost["parameters"] for cost in found.costs}
    assert parameters["single"] == 2 * parameters["shared"]
    assert parameters["shared, wide"] == 1.5 * parameters["shared"]
    assert parameters["sft"] == sum(p.numel() for p in embedded_model.backbone.parameters())


def test_all_methods_begin_as_the_base_and_learn(
    embedded_model: EmbeddedModel, training: tuple[list[Photograph], list[Photograph]]
) -> None:
    batch = PairSampler(training[0], TASKS, ((4, 32),), 64, 3).batch(0)
    alone = method_loss(new_method(embedded_model, "sft", TASKS, BUDGET, 0), batch, 1e-2)
    for name in METHODS:
        method = new_method(embedded_model, name, TASKS, replace(BUDGET, requests=4), 0)
        began = method_loss(method, batch, 1e-2)
        if method.name != "generated":  # its B is small, not zero
            assert began == pytest.approx(alone, rel=1e-5)
        budget = replace(BUDGET, requests=4)
        fit(method, sampler(training[0], TASKS, budget, 0), budget, 25, method.rates, name)
        assert method_loss(method, batch, 1e-2) < began, name


def test_a_bank_gives_every_request_its_tasks_own_adapter(embedded_model: EmbeddedModel) -> None:
    bank = AdapterBank(embedded_model.generator.targets, 2, TASKS, torch.Generator().manual_seed(0))
    adapter = bank.of(("fade", "darken", "fade"))
    name = adapter.targets[0].name
    assert adapter.batch == 3
    assert torch.equal(adapter.pairs[name][0][0], bank.a[0][1])
    assert torch.equal(adapter.pairs[name][0][1], bank.a[0][0])


@pytest.mark.slow
def test_learning_rates_are_searched_and_recorded(
    embedded_model: EmbeddedModel,
    training: tuple[list[Photograph], list[Photograph]],
    test_pictures: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conflict_module, "MOST_FACTORS", 2)
    budget = replace(BUDGET, steps=1, factors=(1e-6, 1.0), search_steps=8)
    found = conflict(embedded_model, training, test_pictures, TASKS, (), budget, (0,))
    for cost in found.costs:
        best = min(cost["search"], key=lambda each: each["validation_loss"])
        method = new_method(embedded_model, cost["method"], TASKS, budget, 0)
        optimisers = {"AdamW", "Muon"}
        assert {each["optimiser"] for each in cost["search"]} == optimisers
        plain = method.choices[best["optimiser"]]
        assert cost["rates"] == {key: value * best["factor"] for key, value in plain.items()} == best["rates"]
        assert cost["optimiser"] == best["optimiser"]
        for optimiser in optimisers:
            assert {1e-6, 1.0} <= {each["factor"] for each in cost["search"] if each["optimiser"] == optimiser}


def test_a_search_goes_on_beyond_the_edge_that_is_best() -> None:
    """Minimum of (log2 factor - best) squared."""

    def tried(best: float) -> list[float]:
        return list(searched(lambda factor: (math.log2(factor) - best) ** 2, (0.5, 1.0, 2.0)))

    assert tried(0) == [0.5, 1, 2]
    assert tried(3) == [0.5, 1, 2, 4, 8, 16]
    assert tried(-2) == [0.125, 0.25, 0.5, 1, 2]
    assert len(tried(40)) == MOST_FACTORS


def test_equal_time_gives_cheaper_methods_more_steps(
    embedded_model: EmbeddedModel,
    training: tuple[list[Photograph], list[Photograph]],
    test_pictures: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = {"single": 0.1, "shared": 0.1, "shared, wide": 0.2, "sft": 0.4, "generated": 0.2}
    monkeypatch.setattr(conflict_module, "_step_seconds", lambda _, name, *__: seconds[name])
    monkeypatch.setattr(conflict_module, "fit", lambda *_: None)
    budget = replace(BUDGET, steps=6, clock="time")
    found = conflict(embedded_model, training, test_pictures, TASKS, (), budget, (0,))
    steps = {cost["method"]: cost["steps"] for cost in found.costs}
    assert steps == {"single": 12, "shared": 12, "shared, wide": 6, "sft": 3, "generated": 6}
    with pytest.raises(OpenwuError, match="clock: expected one of"):
        conflict(embedded_model, training, test_pictures, TASKS, (), replace(budget, clock="sun"), (0,))


def test_a_stopped_experiment_goes_on_with_the_first_part_that_is_missing(
    embedded_model: EmbeddedModel,
    training: tuple[list[Photograph], list[Photograph]],
    test_pictures: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    budget, kept = replace(BUDGET, steps=1), ResultCache(tmp_path)
    trained: list[str] = []

    def counted(method: Method, *rest: Any) -> None:
        if len(trained) == 7:
            raise KeyboardInterrupt
        trained.append(method.name)
        fit(method, *rest)

    monkeypatch.setattr(conflict_module, "fit", counted)
    run = partial(conflict, embedded_model, training, test_pictures, TASKS, (), budget)
    with pytest.raises(KeyboardInterrupt):
        run((0, 1), kept)
    continued = run((0,), kept)  # nothing of the first seed is trained again
    monkeypatch.setattr(conflict_module, "fit", fit)
    whole = run((0,))
    assert continued.outcomes == whole.outcomes
    torch.testing.assert_close(continued.cells, whole.cells)


def test_a_copy_has_hooks_of_its_own(embedded_model: EmbeddedModel) -> None:
    other = embedded_model.copy()
    with torch.no_grad():
        other.backbone.norm.weight.add_(1)
    assert not torch.equal(other.backbone.norm.weight, embedded_model.backbone.norm.weight)
    assert other.handle is not embedded_model.handle


def test_leads_compare_the_same_request() -> None:
    def outcome(method: str, task: str, psnr: float) -> Outcome:
        return Outcome(method, 0, task, "p", False, psnr, 1.0, 0.0, 1.0)

    found = ConflictResults(
        [outcome("a", "x", 30), outcome("b", "y", 10), outcome("a", "y", 12), outcome("b", "x", 29)]
    )
    assert found.lead("a", "b").value == pytest.approx(1.5)
    assert found.mean("a").value == pytest.approx(21)


def test_known_tasks_are_reported_apart_and_the_table_is_made_again() -> None:
    def outcome(method: str, task: str, psnr: float) -> Outcome:
        return Outcome(method, 0, task, "p", False, psnr, 1.0, 0.0, 1.0)

    known, new = "warm", "blur"
    assert known in BASE_EDITS
    assert new not in BASE_EDITS
    outcomes = [outcome("base", known, 36), outcome("base", new, 17), outcome("generated", known, 35)]
    cost = {"method": "generated", "seed": 0, "parameters": 7, "steps": 6, "seconds": 9.0, "processor_seconds": 8.0}
    found = ConflictResults([*outcomes, outcome("generated", new, 32)], [cost])
    assert (found.tasks(learned=True), found.tasks(learned=False)) == ([known], [new])
    assert found.mean("base", among=[new]).value == 17
    assert found.lead("generated", "base", among=[new]).value == 15
    table = found.table()
    assert table.splitlines()[2].split()[:2] == ["generated", "32.00"]  # sorted by tasks that are new
    assert table.splitlines()[2].split()[-3:] == ["7", "6", "8"]
    stored = json.loads(json.dumps(found.to_json()))
    assert stored["methods"][1]["never_learned_psnr"]["value"] == 32
    assert ConflictResults.from_json(stored).table() == table

"""Groups of tasks one after another: who forgets, and that what is stored is what is used."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from lab_cases import adapter, updates
from torch import Tensor

from openwu.data.suite.batches import PairSampler
from openwu.data.suite.photographs import Photograph, load_folder
from openwu.evaluation.experiments import methods
from openwu.evaluation.experiments.comparisons import continual as module
from openwu.evaluation.experiments.comparisons.continual import (
    STRATEGIES,
    ContinualResults,
    Memory,
    TaskScore,
    continual,
)
from openwu.evaluation.experiments.geometry import update_distances
from openwu.evaluation.experiments.methods import Budget, new_method, sampler
from openwu.training.embedded.model import EmbeddedModel
from openwu.training.embedded.rehearsal import PastSelf

GROUPS = (("darken",), ("fade",), ("warm",))
BUDGET = Budget(steps=3, requests=2, crop=32)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for each in (methods, module):
        monkeypatch.setattr(each, "SIDE", 96)
    monkeypatch.setattr(module, "STORED", 2)


@pytest.fixture(scope="module")
def photographs() -> list[Photograph]:
    return load_folder(Path("photos"), validation=True)


def test_every_way_goes_through_all_groups(embedded_model: EmbeddedModel, photographs: list[Photograph]) -> None:
    generator = torch.Generator().manual_seed(0)
    test = {name: torch.rand(3, 32, 48, generator=generator) for name in ("astronaut", "coffee")}
    before = {name: value.clone() for name, value in embedded_model.state_dict().items()}
    found = continual(embedded_model, photographs, test, GROUPS, BUDGET, (0,))
    assert found.ways == list(STRATEGIES)
    assert len(found.seen) == len(STRATEGIES) * 4 * 3
    begins = {way: [each.psnr for each in found.seen if each.way == way and each.after == 0] for way in STRATEGIES}
    assert all(begun == pytest.approx(begins["shared"], abs=1e-3) for begun in begins.values())
    assert all(torch.equal(before[name], value) for name, value in embedded_model.state_dict().items())
    assert found.stored_bytes["generator"] == found.stored_bytes["sft"] == 0
    assert found.stored_bytes["retrieval"] == 3 * found.stored_bytes["shared"]
    assert found.stored_bytes["generator, distilled"] > 3 * 2 * 3 * 96 * 96
    parts = embedded_model.condition, embedded_model.generator
    own_bytes = sum(parameter.nbytes for part in parts for parameter in part.parameters())
    assert found.stored_bytes["generator, past self"] == own_bytes
    stored = json.loads(json.dumps(found.to_json()))
    assert [each["way"] for each in stored["ways"]] == list(STRATEGIES)


def test_numbers_of_a_known_course() -> None:
    """Two groups: x falls from 30 to 25 when y is learned; y has gained 2 before its turn."""
    table = {("x", 1): (10, 30, 25), ("y", 2): (12, 14, 28)}
    seen = [
        TaskScore("way", 0, after, task, group, value)
        for (task, group), values in table.items()
        for after, value in enumerate(values)
    ]
    course = ContinualResults(seen, {"way": 0})
    assert course.final("way").value == pytest.approx(26.5)
    assert course.forgetting("way").value == pytest.approx(5)
    assert course.transfer("way").value == pytest.approx(2)


def test_distances_are_those_of_the_updates() -> None:
    one, other = adapter(3), adapter(3, seed=1, rank=3, scale=2.0)
    expected = (updates(one) - updates(other)).square().sum(1) / updates(other).square().sum(1)
    torch.testing.assert_close(update_distances(one, other), expected, atol=1e-5, rtol=1e-4)
    assert update_distances(one, one).abs().max() < 1e-5
    a = one.pairs["one"][0].requires_grad_(True)
    torch.autograd.backward(update_distances(one, other).sum())
    assert a.grad is not None


def test_distillation_keeps_what_was_written(
    embedded_model: EmbeddedModel, photographs: list[Photograph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same new group with and without the memory: with it, stored conditions keep their adapters."""
    drifts = []
    for kept in (True, False):
        method = new_method(embedded_model, "generated", ("darken", "fade"), BUDGET, 0)
        memory = module._remember(method, photographs, ("darken",), 0)
        budget, penalty = Budget(30, 2, 32), partial(module._drift, method, memory) if kept else None
        methods.fit(method, sampler(photographs, ("fade",), budget, 2), budget, 30, method.rates, "fade", penalty)
        drifts.append(_drift(method, memory))
    assert drifts[0] < 0.5 * drifts[1]


def test_the_past_self_answers_as_it_did(embedded_model: EmbeddedModel, photographs: list[Photograph]) -> None:
    """The requests are the sampler's; the answers are what was made of them, whatever is learned meanwhile."""
    method = new_method(embedded_model, "generated", ("darken", "fade"), BUDGET, 0)
    requests = PairSampler(photographs, ("darken", "fade"), ((4, 32),), 96, 0)
    past = PastSelf(method.model.copy(), requests)
    asked = requests.batch(3)
    with torch.no_grad():
        text = method.model.instruction(asked.sentences)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        was = method.model.edit(
            asked.picture, asked.planes, text, method.model.adapt(asked.whole, text), raw=True
        ).float()
        for parameter in method.trained.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        now = method.model.edit(
            asked.picture, asked.planes, text, method.model.adapt(asked.whole, text), raw=True
        ).float()
    came = past.batch(3)
    assert torch.equal(came.target, was)
    assert not torch.allclose(came.target, now, atol=1e-2)
    assert not torch.allclose(came.target, asked.target, atol=1e-2)
    assert came.sentences == asked.sentences
    assert torch.equal(came.picture, asked.picture)


@torch.no_grad()
def _drift(method: methods.Method, memory: Memory) -> Tensor:
    text = method.model.instruction(memory.sentences)
    return update_distances(method.model.adapt(memory.pictures.float() / 255, text), memory.adapter).mean()

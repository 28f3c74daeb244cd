"""The map of adapters: neighbours, silhouettes, sums."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from lab_cases import Case, subject
from sklearn.metrics import silhouette_score

from openwu.evaluation.experiments.probes.audit import Subject
from openwu.evaluation.experiments.probes.manifold import manifold, silhouettes

GROUPS = [f"group {i // 3}" for i in range(12)]
"""Every group has every one of three tasks once."""


def test_adapters_of_one_task_lie_together(reading: Subject[Case]) -> None:
    found = manifold(reading, GROUPS)
    assert found.neighbours.value == 1
    assert found.chance == pytest.approx(1 / 3)
    assert sum(found.silhouette) / 12 > 0.5
    assert found.points.shape == (12, 2)
    assert found.shares[0] >= found.shares[1] > 0
    json.dumps(found.to_json())


def test_adapters_of_a_blind_generator_do_not() -> None:
    """Noise in place of what was asked: neighbours are found as often as by chance."""
    noisy = subject(reads=True, tasks=3, each=20, spread=100.0)
    found = manifold(noisy, [f"group {i // 3}" for i in range(60)])
    assert abs(found.neighbours.value - 1 / 3) < 0.25
    assert abs(sum(found.silhouette) / 60) < 0.2


def test_silhouettes_are_rousseeuws() -> None:
    points = torch.nn.functional.normalize(torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    tasks = [str(i % 3) for i in range(12)]
    similarity = (points @ points.t()).double()
    distance = (1 - similarity).clamp(min=0).fill_diagonal_(0)
    expected = silhouette_score(distance.numpy(), tasks, metric="precomputed")
    assert sum(silhouettes(similarity, tasks)) / 12 == pytest.approx(expected)


def test_what_a_group_adds_can_be_moved() -> None:
    """Updates are task + group: then a - b + c is exactly what is wanted, and c alone is not."""
    plain = subject(reads=True, spread=0.0)
    shifts = 3 * torch.randn(4, 4, generator=torch.Generator().manual_seed(2))
    cases = [
        replace(case, wanted=case.wanted + shifts[i // 3], told=case.told + shifts[i // 3])
        for i, case in enumerate(plain.cases)
    ]
    found = manifold(replace(plain, cases=cases), GROUPS)
    assert max(found.arithmetic["a - b + c"]) == pytest.approx(0, abs=1e-5)
    assert min(found.arithmetic["a - b + c"]) == pytest.approx(0, abs=1e-5)
    assert found.lead("a - b + c", "another sample's").positive
    assert found.lead("a - b + c", "matched").value == pytest.approx(0, abs=1e-5)

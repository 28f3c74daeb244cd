"""Fixtures of the lab's tests; what they are made of is in lab_cases.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from lab_cases import Case, subject

from openwu.evaluation.experiments.probes.audit import Subject


@pytest.fixture
def reading() -> Subject[Case]:
    return subject(reads=True)


@pytest.fixture
def blind() -> Subject[Case]:
    return subject(reads=False)


@pytest.fixture(scope="session")
def examples() -> Path:
    return Path(__file__).parents[2] / "examples"

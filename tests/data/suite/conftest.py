"""Real photographs, cut so that light, colour and edges all occur."""

from __future__ import annotations

import pytest
from torch import Tensor

from openwu.data.suite.photographs import load_test_photographs


@pytest.fixture(scope="session")
def photographs() -> dict[str, Tensor]:
    """Name -> `[3, 64, 64]`"""
    return {name: whole[:, 20:84, 60:124].clone() for name, whole in load_test_photographs(192).items()}


@pytest.fixture(scope="session")
def coffee(photographs: dict[str, Tensor]) -> Tensor:
    return photographs["coffee"]


@pytest.fixture(scope="session")
def flower(photographs: dict[str, Tensor]) -> Tensor:
    return photographs["flower"]

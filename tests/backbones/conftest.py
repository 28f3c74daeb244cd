"""Backbones with random weights, one of each kind for a whole run, and requests."""

from __future__ import annotations

from typing import Any

import base_cases
import pytest


@pytest.fixture(params=base_cases.NAMES)
def base(request: pytest.FixtureRequest) -> Any:
    """Every base in turn."""
    return base_cases.backbone(request.param)

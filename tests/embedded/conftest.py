"""The base inside the package, loaded once for all tests of what it understands."""

from __future__ import annotations

import pytest

from openwu.backbones.embedded.base import EmbeddedBase


@pytest.fixture(scope="session")
def base() -> EmbeddedBase:
    folder = EmbeddedBase.bundled_folder()
    assert folder is not None
    return EmbeddedBase.from_pretrained(folder)

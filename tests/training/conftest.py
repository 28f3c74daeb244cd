"""A recipe that trains all four stages in a second."""

from __future__ import annotations

from pathlib import Path

import pytest

from openwu.training.config import StageConfig
from openwu.training.embedded.config import EmbeddedRecipe
from openwu.training.embedded.model import EmbeddedConfig


@pytest.fixture
def recipe(embedded_config: EmbeddedConfig, photo_folder: Path) -> EmbeddedRecipe:
    pictures = StageConfig(steps=5, shapes=((2, 16), (3, 32)), learning_rate=2e-3, warmup=2)
    return EmbeddedRecipe(
        name="tiny",
        model=embedded_config,
        instruction=StageConfig(steps=5, shapes=((6, 0),), learning_rate=2e-3, warmup=2),
        base=pictures,
        generator=pictures,
        shared=pictures,
        base_edits=("brighten", "blur"),
        edits=("brighten", "darken", "blur", "take_palette"),
        photographs=str(photo_folder),
        side=32,
        bf16=False,
        checkpoint_every=2,
        evaluate_every=4,
        log_every=2,
    )

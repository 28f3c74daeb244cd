"""A model that reads examples and has learned nothing, and a pair of pictures that shows an edit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from openwu.training.embedded.model import EmbeddedConfig, EmbeddedModel

Scene = Callable[..., NDArray[np.uint8]]
Pair = tuple[NDArray[Any], NDArray[Any]]


@pytest.fixture(scope="module")
def folder(embedded_config: EmbeddedConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that reads examples, whose generator has not learned anything."""
    folder = tmp_path_factory.mktemp("model") / "untrained"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = EmbeddedModel(embedded_config.with_examples(d_model=32, head_dim=16, dim_accumulation=2, blocks=1))
        model.generator.init_weights(0.1)
        torch.nn.init.normal_(model.backbone.pixels.out.weight, std=0.02)
    model.save_pretrained(folder, torch.float32)
    return folder


@pytest.fixture(scope="module")
def pair(scene: Scene) -> Pair:
    before = scene(60, 48, seed=3)
    return before, (before // 2).astype(np.uint8)

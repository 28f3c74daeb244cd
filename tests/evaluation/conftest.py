"""What the tests of the evaluation share: small photographs, a baseline, a folder with both."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from openwu.training.embedded.model import EmbeddedModel
from openwu.training.stage import TrainableLora
from openwu.types import Adapter


@pytest.fixture
def source() -> torch.Tensor:
    return torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def photographs(scene: Callable[..., NDArray[np.uint8]]) -> dict[str, torch.Tensor]:
    """Two of equal size, and one that stands upright."""
    sizes = {"astronaut": (40, 32), "coffee": (40, 32), "rocket": (28, 36)}
    return {
        name: torch.from_numpy(scene(*size, seed)).permute(2, 0, 1).float() / 255
        for seed, (name, size) in enumerate(sizes.items())
    }


@pytest.fixture
def shared(embedded_model: EmbeddedModel) -> Adapter:
    """A baseline that changes pictures."""
    generator = torch.Generator().manual_seed(0)
    adapter = TrainableLora(embedded_model.generator.targets, 4, generator)
    with torch.no_grad():
        for b in adapter.b:
            b.normal_(std=0.1, generator=generator)
    return adapter().detach()


@pytest.fixture
def model_with_baseline(model_folder: Path, shared: Adapter, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    shared.to(torch.float16).save_pretrained(folder / "shared")
    return folder

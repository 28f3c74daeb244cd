"""What the tests of the embedded path share: an untrained model small enough for milliseconds, and pictures."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from openwu.backbones.embedded.condition import EmbeddedConditionConfig
from openwu.backbones.embedded.config import tiny_layer_groups
from openwu.backbones.embedded.instruction import InstructionConfig
from openwu.backbones.embedded.network import TinyEditorConfig
from openwu.config import GeneratorConfig
from openwu.editor.editor import Editor
from openwu.training.embedded.model import EmbeddedConfig, EmbeddedModel
from openwu.types import LoadingOptions

LABELS = ("brighten", "darken", "blur", "out_of_scope")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Draw the same numbers in every test, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def embedded_config() -> EmbeddedConfig:
    """Windows of 16 pixels, two blocks, so that both kinds of windows occur."""
    backbone = TinyEditorConfig(
        d_model=32,
        num_layers=2,
        head_dim=16,
        ffn_dim=48,
        text_dim=32,
        patch=4,
        window=4,
        pixel_channels=8,
        pixel_layers=2,
    )
    condition = EmbeddedConditionConfig(
        width=24, text_dim=32, num_text_tokens=4, num_layers=1, heads=2, thumbnail=16, patch=8, detail_grid=2, detail=12
    )
    generator = GeneratorConfig(
        rank=4,
        alpha=4,
        token_dim=32,
        input_dim=24,
        d_model=32,
        head_dim=16,
        dim_accumulation=2,
        num_pg_layers=1,
        groups=tiny_layer_groups(backbone),
    )
    instruction = InstructionConfig(
        LABELS, width=32, num_tokens=4, num_layers=1, heads=2, buckets=512, accepted_percent=1
    )
    return EmbeddedConfig(instruction, backbone, condition, generator)


@pytest.fixture
def embedded_model(embedded_config: EmbeddedConfig) -> EmbeddedModel:
    return untrained(embedded_config)


@pytest.fixture(scope="session")
def model_folder(embedded_config: EmbeddedConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The untrained model as a folder, in float32. Tests copy it before they change anything."""
    folder = tmp_path_factory.mktemp("model") / "embedded"
    untrained(embedded_config).save_pretrained(folder, torch.float32)
    return folder


@pytest.fixture
def editor(model_folder: Path) -> Editor:
    return Editor.from_pretrained(model_folder, loading=LoadingOptions(dtype=torch.float32))


def untrained(config: EmbeddedConfig) -> EmbeddedModel:
    """Random weights where training starts from zero, so that base, words and adapters all show in the picture."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = EmbeddedModel(config)
        model.generator.init_weights(0.3)
        torch.nn.init.normal_(model.backbone.pixels.out.weight, std=0.02)
        torch.nn.init.normal_(model.instruction.table.weight)
        with torch.no_grad():
            model.instruction.table.weight[0] = 0
            for block in model.backbone.blocks:
                block.place.normal_(std=0.1)
            # Nothing is out of scope until a test says so.
            model.instruction.classify.bias[config.instruction.labels.index("out_of_scope")] = -100
    return model


@pytest.fixture(scope="session")
def scene() -> Callable[..., NDArray[np.uint8]]:
    """(width, height, seed) -> a picture `[h, w, 3]` with slopes, edges and grain, away from black and white."""

    def paint(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
        random = np.random.default_rng(seed)
        y, x = np.mgrid[0:height, 0:width].astype(np.float32)
        waves = [np.sin(x / (9 + c) + seed) * np.cos(y / (13 - c)) for c in range(3)]
        squares = ((x // 11 + y // 7) % 2)[..., None]
        picture = 128 + 40 * np.stack(waves, axis=-1) + 20 * squares + random.normal(0, 4, (height, width, 3))
        return picture.clip(30, 225).astype(np.uint8)

    return paint


@pytest.fixture
def photo(scene: Callable[..., NDArray[np.uint8]]) -> Image.Image:
    return Image.fromarray(scene(40, 28))


@pytest.fixture(scope="session")
def photo_folder(scene: Callable[..., NDArray[np.uint8]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photographs for training and one of those that are kept back."""
    folder = tmp_path_factory.mktemp("photos")
    for seed, name in enumerate(("a.jpg", "b.jpg", "c.jpg", "life_by_aitzol_berasategi.jpg")):
        Image.fromarray(scene(72, 56, seed)).save(folder / name, quality=95)
    return folder


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one tiny diffusers pipeline for each kind of denoiser; tests are skipped without the library."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("diffusers")
        pytest.importorskip("peft")
        from exporting_cases import PIPELINES

        folder = tmp_path_factory.mktemp("pipelines")
        for component, (build, _, _) in PIPELINES.items():
            build().save_pretrained(folder / component)
    return folder


@pytest.fixture
def embedded_adapter(model_folder: Path, tmp_path: Path) -> Path:
    """A folder with a random adapter for the untrained model's base."""
    from exporting_cases import random_adapter

    random_adapter(EmbeddedModel.from_pretrained(model_folder).generator.targets).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"

"""Photographs: a folder for training, as crops at several scales, and those of scikit-image and scikit-learn for tests.

The split is by photograph: no training sees one of the test's. Hashes of files go into the provenance of weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from openwu.errors import DatasetError
from openwu.files.hashing import of_files

TRAINING_SIDES = (1024, 768, 512, 384)
"""Longest sides at which a photograph is kept for training: the edits are defined in pixels, so scale is variety."""

VALIDATION = ("kleiber_by_lukas_baubkus.jpg", "life_by_aitzol_berasategi.jpg")
"""Files of the training folder that are kept back for validation."""

TEST_PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
}
"""Never seen in any training: name -> (package that carries it, path inside the package)."""


@dataclass(frozen=True)
class Photograph:
    """One photograph at several scales, `[h, w, 3]` uint8 each, largest first."""

    name: str
    scales: tuple[Tensor, ...]


def load_folder(folder: Path, validation: bool = False) -> list[Photograph]:
    """Load the training photographs of a folder, or with `validation` those kept back."""
    files = sorted(file for file in folder.glob("*.jpg") if (file.name in VALIDATION) == validation)
    if not files:
        raise DatasetError(f"photographs: expected JPEG files in {folder}, found none; pass the folder that holds them")
    return [Photograph(file.name, tuple(_read(file, side) for side in TRAINING_SIDES)) for file in files]


def folder_hashes(folder: Path) -> dict[str, str]:
    """Return file name -> SHA-256 of its bytes, for provenance."""
    return {file.name: of_files([file]).hexdigest() for file in sorted(folder.glob("*.jpg"))}


def load_test_photographs(side: int = 512) -> dict[str, Tensor]:
    """Load the test photographs: name -> `[3, h, w]` in 0..1, longest side at most `side`."""
    found: dict[str, Tensor] = {}
    for name, (package, path) in TEST_PHOTOGRAPHS.items():
        try:
            file = resources.files(package).joinpath(path)
        except ModuleNotFoundError as error:
            raise DatasetError(
                f"test photographs: they come with the package {package!r}, which is not installed; "
                "pip install 'openwu[evaluate]'"
            ) from error
        with resources.as_file(file) as local:
            found[name] = load_photograph(local, side)
    return found


def load_photograph(file: Path, side: int) -> Tensor:
    """Load a photograph as `[3, h, w]` in 0..1, longest side at most `side`."""
    return to_unit(_read(file, side))


def to_unit(pixels: Tensor) -> Tensor:
    """Convert `[h, w, 3]` uint8 to `[3, h, w]` float32 in 0..1."""
    return pixels.permute(2, 0, 1).float() / 255


def random_crop(photographs: list[Photograph], size: int, generator: torch.Generator, natural: bool = False) -> Tensor:
    """Draw a square crop `[3, size, size]` in 0..1 at a random scale, mirrored and recoloured at random.

    `natural`: not recoloured.
    """
    photograph = photographs[_draw(generator, len(photographs))]
    wide_enough = [scale for scale in photograph.scales if min(scale.shape[:2]) >= size]
    if not wide_enough:
        raise DatasetError(f"{photograph.name}: expected sides of at least {size} pixels at some scale")
    pixels = wide_enough[_draw(generator, len(wide_enough))]
    top, left = (_draw(generator, side - size + 1) for side in pixels.shape[:2])
    crop = to_unit(pixels[top : top + size, left : left + size])
    if _draw(generator, 2):
        crop = crop.flip(-1)
    if _draw(generator, 4) == 0:
        crop = crop.transpose(-1, -2)
    return crop.contiguous() if natural else recoloured(crop, generator)


def recoloured(x: Tensor, generator: torch.Generator) -> Tensor:
    """Jitter colours against learning the palettes of a few scenes: channel order, gains, gamma, contrast."""
    if _draw(generator, 2) == 0:
        return x
    amount = torch.rand(6, generator=generator) * 2 - 1  # six independent draws in -1..1
    if _draw(generator, 3) == 0:
        x = x[torch.randperm(3, generator=generator)]
    x = x.clamp(min=1e-4) ** float(torch.exp(0.3 * amount[0]))
    x = x * torch.exp(0.15 * amount[1:4]).view(3, 1, 1)
    middle = x.mean()
    return (middle + (x - middle) * float(1 + 0.2 * amount[4]) + 0.05 * float(amount[5])).clamp(0, 1)


def _read(file: Path, side: int) -> Tensor:
    with Image.open(file) as image:
        picture = image.convert("RGB")
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture))


def _draw(generator: torch.Generator, below: int) -> int:
    return int(torch.randint(below, (), generator=generator))

"""Photographs taken again by real cameras' sensors, as darktable's noise profiles describe them.

The profiles (variance of noise per light and without light, by camera, sensitivity and colour) are read where the
package darktable is installed, and never copied. A photograph passes the low-pass filter of a sensor, is spread
over a Bayer pattern, gets the camera's noise there and is put together again bilinearly; its truth went the same way
without noise. It should be as soft as a camera's pictures are at single pixels: where it has detail of one pixel, as
reduced ones have, the pattern alone costs more than noise does.

None of this noise is shared with the damage that trainings use: `data/suite/cameras.py` draws noise without a pattern.

Shapes: h and w the sides of a picture.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from openwu.data.suite.operators import encoded_light, gaussian, linear_light
from openwu.errors import OpenwuError

PROFILES = Path("/usr/share/darktable/noiseprofiles.json")
SENSORS = (
    ("LGE", "Nexus 5X"),
    ("Canon", "PowerShot S110"),
    ("Panasonic", "DMC-LX7"),
    ("Olympus", "E-M5"),
    ("Nikon", "D90"),
    ("Canon", "EOS 5D Mark II"),
    ("Sony", "ILCE-7M3"),
)
"""Maker and model, from a telephone to a large sensor: one for each test photograph."""
MATRIX = ((1.6, -0.5, -0.1), (-0.25, 1.6, -0.35), (0.05, -0.6, 1.55))
"""From a sensor's colours to those of a picture; white stays white. A typical one."""
LOW_PASS = 1.0
"""Standard deviation of the filter in front of the sensor, in pixels."""
BAYER = ((0, 1), (1, 2))
"""Colour of each pixel of a square of four: red, green, green, blue."""


@dataclass(frozen=True)
class Profile:
    """A camera's noise at one sensitivity: variance `light * a + b` of each colour, light from 0 to 1."""

    camera: str
    iso: int
    a: tuple[float, float, float]
    b: tuple[float, float, float]


def read_profiles(file: Path | None = None) -> dict[str, tuple[Profile, ...]]:
    """Read every camera of SENSORS, its profiles by rising sensitivity; None: from PROFILES.

    Raises OpenwuError for what is not such a file.
    """
    file = file or PROFILES
    try:
        makers = json.loads(file.read_text("utf-8"))["noiseprofiles"]
        found = {(maker["maker"], model["model"]): model["profiles"] for maker in makers for model in maker["models"]}
        return {
            camera: tuple(
                Profile(camera, int(each["iso"]), _three(each["a"]), _three(each["b"]))
                for each in sorted(found[maker, camera], key=lambda each: int(each["iso"]))
            )
            for maker, camera in SENSORS
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OpenwuError(
            f"{file}: expected darktable's noise profiles with the cameras {[name for _, name in SENSORS]}, got "
            f"{type(error).__name__}: {error}"
        ) from error


def _three(values: list[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def taken(x: Tensor, profile: Profile | None, seed: int = 0) -> Tensor:
    """Take a photograph `[3, h, w]` in 0..1 again; without a profile, without noise."""
    matrix = x.new_tensor(MATRIX)
    raw = torch.einsum("ij,jhw->ihw", torch.linalg.inv(matrix), gaussian(linear_light(x), LOW_PASS))
    if profile is not None:
        a, b = (x.new_tensor(each)[:, None, None] for each in (profile.a, profile.b))
        draws = torch.Generator().manual_seed(seed)
        raw = raw + (a * raw.clamp(min=0) + b).clamp(min=0).sqrt() * torch.randn(raw.shape, generator=draws)
    return encoded_light(torch.einsum("ij,jhw->ihw", matrix, _demosaiced(raw)))


def _demosaiced(raw: Tensor) -> Tensor:
    """Keep one colour of every pixel `[3, h, w]`, and put the others there from the neighbours, bilinearly."""
    kept = torch.zeros_like(raw)
    for row, colours in enumerate(BAYER):
        for column, colour in enumerate(colours):
            kept[colour, row::2, column::2] = 1
    kernel = raw.new_tensor(((1.0, 2.0, 1.0), (2.0, 4.0, 2.0), (1.0, 2.0, 1.0)))[None, None]
    values, weights = (F.conv2d(F.pad(each[:, None], (1, 1, 1, 1)), kernel)[:, 0] for each in (kept * raw, kept))
    return torch.where(kept > 0, raw, values / weights)

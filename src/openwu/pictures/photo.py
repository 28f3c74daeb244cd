"""A photograph in memory: what a reader found enters, RGB pixels and a PIL image leave.

Shapes: h, w height and width after the EXIF orientation has been applied; pixels `[h, w, 3]`, alpha `[h, w]`.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

Pixels = NDArray[np.uint8] | NDArray[np.uint16]
Floats = NDArray[np.float32]

ROWS_AT_ONCE = 256
"""Rows converted in one go, so that a 50-megapixel photo needs no second full-size float copy."""


@dataclass(frozen=True, eq=False)
class Photo:
    """Upright RGB pixels, and everything else that must survive an edit."""

    pixels: Pixels = field(repr=False)
    """`[h, w, 3]`, uint8, or uint16 from 16-bit greyscale; greyscale repeats one channel three times."""
    alpha: NDArray[np.uint8] | None = field(default=None, repr=False)
    """`[h, w]`, as read; None for a picture without transparency."""
    grey: bool = False
    """True when the file was greyscale (1, 8 or 16 bits): it is written so again while the pixels stay grey."""
    icc: bytes | None = field(default=None, repr=False)
    """The ICC profile that the pixels are in; None means sRGB."""
    exif: bytes | None = field(default=None, repr=False)
    """EXIF without its orientation (already applied) and without what described the old file's layout."""
    dpi: tuple[float, float] | None = None
    """Dots per inch, horizontal and vertical."""
    format: str | None = None
    """Pillow's name of the file format ("JPEG"); None for a picture that came from memory."""
    mode: str = "RGB"
    """Pillow's mode of the file ("CMYK"), before anything was converted."""
    notes: tuple[str, ...] = ()
    """What could not be kept while reading, in words for the user."""

    def __post_init__(self) -> None:
        if self.pixels.ndim != 3 or self.pixels.shape[2] != 3 or self.pixels.dtype not in (np.uint8, np.uint16):
            came = f"{self.pixels.dtype} {self.pixels.shape}"
            raise ValueError(f"pixels: expected uint8 or uint16 [h, w, 3], got {came}")
        if self.alpha is not None and self.alpha.shape != self.pixels.shape[:2]:
            raise ValueError(f"alpha: expected {self.pixels.shape[:2]}, got {self.alpha.shape}")

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), as Pillow orders them."""
        return self.pixels.shape[1], self.pixels.shape[0]

    @property
    def transparent(self) -> bool:
        """True when some pixel is not fully opaque."""
        return self.alpha is not None and bool((self.alpha < 255).any())

    def floats(self) -> Floats:
        """The pixels as float32 `[h, w, 3]` between 0 and 1."""
        return np.divide(self.pixels, np.float32(np.iinfo(self.pixels.dtype).max), dtype=np.float32)

    def with_pixels(self, pixels: Floats | Pixels) -> Photo:
        """The same photo with new pixels of the same size: floats between 0 and 1 (clipped), or integers as read."""
        if pixels.shape != self.pixels.shape:
            raise ValueError(f"pixels: expected {self.pixels.shape}, got {pixels.shape}")
        if np.issubdtype(pixels.dtype, np.floating):
            return replace(self, pixels=_quantise(cast(Floats, pixels), self.pixels.dtype))
        return replace(self, pixels=cast(Pixels, pixels))

    def eight_bit(self) -> Photo:
        """The same photo with 8 bits per channel, rounded."""
        if self.pixels.dtype == np.uint8:
            return self
        return replace(self, pixels=_quantise(self.floats(), np.dtype(np.uint8)))

    def to_image(self) -> Image.Image:
        """A PIL image: L, LA or I;16 for greyscale that stayed grey, RGB or RGBA otherwise; profile, EXIF and DPI in
        `info`, where `read_picture` and `write_picture` find them. Pillow has no 16-bit colour, so that becomes 8-bit.
        """
        stayed_grey = self.grey and _is_grey(self.pixels)
        keeps_16_bits = stayed_grey and self.alpha is None
        pixels = self.pixels if keeps_16_bits else self.eight_bit().pixels
        image = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0]) if stayed_grey else pixels)
        icc = self.icc
        if icc and not stayed_grey and profile_space(icc) == "GRAY":
            image, icc = _grey_profile_to_srgb(image, icc), None
        if self.alpha is not None:
            image.putalpha(Image.fromarray(self.alpha))
        for name, value in (("icc_profile", icc), ("exif", self.exif), ("dpi", self.dpi)):
            if value:
                image.info[name] = value
        return image


def profile_space(icc: bytes) -> str:
    """The colour space that an ICC profile's header names: "RGB", "GRAY", "CMYK", ...; empty for a broken profile."""
    return icc[16:20].decode("ascii", "replace").strip() if len(icc) >= 128 else ""


def _is_grey(pixels: Pixels) -> bool:
    red, green, blue = pixels[:, :, 0], pixels[:, :, 1], pixels[:, :, 2]
    return bool((red == green).all() and (green == blue).all())


def _quantise(pixels: Floats, dtype: np.dtype[np.uint8] | np.dtype[np.uint16]) -> Pixels:
    """Floats between 0 and 1 -> integers of full range, rounded."""
    top = np.iinfo(dtype).max
    whole: Pixels = np.empty(pixels.shape, dtype)
    for start in range(0, len(pixels), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        if not np.isfinite(pixels[rows]).all():
            raise ValueError("pixels: expected finite numbers, got NaN or infinity")
        whole[rows] = np.rint(np.clip(pixels[rows], 0, 1) * np.float32(top))
    return whole


def _grey_profile_to_srgb(image: Image.Image, icc: bytes) -> Image.Image:
    """An RGB image whose three channels each follow a greyscale profile's tone curve -> sRGB.

    A greyscale profile cannot describe a picture that an edit has coloured, so its curve is applied and it is dropped.
    """
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        srgb = ImageCms.createProfile("sRGB")
        curve = ImageCms.profileToProfile(ramp, profile, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return image
    assert curve is not None
    return image.point(np.asarray(curve)[0, :, 0].tolist() * 3)

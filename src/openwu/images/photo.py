"""A photograph in memory: what a reader found enters, RGB pixels and a PIL image leave.

Shapes: h, w height and width after the EXIF orientation has been applied; pixels `[h, w, 3]`, alpha `[h, w]`.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field, replace
from typing import Any, cast

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
    """`[h, w, 3]`, uint8, or uint16 from 16 bits per channel; greyscale repeats one channel three times."""
    alpha: Pixels | None = field(default=None, repr=False)
    """`[h, w]`, as read, of 8 or 16 bits whatever the pixels have; None for a picture without transparency."""
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
        return self.alpha is not None and bool((self.alpha < np.iinfo(self.alpha.dtype).max).any())

    @property
    def stayed_grey(self) -> bool:
        """True when the file was greyscale and an edit has not coloured it."""
        return self.grey and _is_grey(self.pixels)

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
        alpha = None if self.alpha is None else _to_depth(self.alpha, np.dtype(np.uint8))
        if self.pixels.dtype == np.uint8:
            return replace(self, alpha=alpha)
        return replace(self, pixels=_quantise(self.floats(), np.dtype(np.uint8)), alpha=alpha)

    def in_colour(self) -> Photo:
        """The same photo for a file of three channels: a greyscale profile cannot describe them, so it is applied."""
        if not self.icc or profile_space(self.icc) != "GRAY":
            return self
        return replace(self, pixels=_grey_profile_to_srgb(self.pixels, self.icc), icc=None)

    def to_image(self) -> Image.Image:
        """A PIL image: L, LA or I;16 for greyscale that stayed grey, RGB or RGBA otherwise; profile, EXIF and DPI in
        `info`, where `read_picture` and `write_picture` find them. Pillow has no 16-bit colour, so that becomes 8-bit.
        """
        stayed_grey = self.stayed_grey
        photo = self if stayed_grey and self.alpha is None else self.eight_bit()
        if not stayed_grey:
            photo = photo.in_colour()
        image = Image.fromarray(np.ascontiguousarray(photo.pixels[:, :, 0]) if stayed_grey else photo.pixels)
        if photo.alpha is not None:
            image.putalpha(Image.fromarray(photo.alpha))
        for name, value in photo.metadata.items():
            image.info[name] = value
        return image

    def deep_channels(self, *, grey: bool) -> NDArray[np.uint16]:
        """16 bits per channel `[h, w, c]`: one channel of grey or three of colour, then the alpha."""
        pixels = _to_depth(self.pixels[:, :, :1] if grey else self.pixels, np.dtype(np.uint16))
        if self.alpha is None:
            return pixels
        return np.dstack((pixels, _to_depth(self.alpha, np.dtype(np.uint16))))

    @property
    def metadata(self) -> dict[str, Any]:
        """What goes into a file beside the pixels, by Pillow's names."""
        named = (("icc_profile", self.icc), ("exif", self.exif), ("dpi", self.dpi))
        return {name: value for name, value in named if value}


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


def _to_depth(values: Pixels, dtype: np.dtype[Any]) -> NDArray[Any]:
    """8 or 16 bits -> 8 or 16 bits, rounded."""
    if values.dtype == dtype:
        return values
    if dtype == np.uint16:
        return values.astype(np.uint16) * np.uint16(257)
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _grey_profile_to_srgb(pixels: Pixels, icc: bytes) -> Pixels:
    """Pixels whose three channels each follow a greyscale profile's tone curve -> sRGB."""
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        srgb = ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(ramp, profile, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return pixels
    curve, top = np.asarray(image)[0, :, 0], np.iinfo(pixels.dtype).max
    table = np.interp(np.linspace(0, 255, top + 1), np.arange(256), curve) * (top / 255)
    whole: Pixels = np.rint(table).astype(pixels.dtype)[pixels]
    return whole

"""Hold a photograph in memory: upright RGB pixels, and everything else that must survive an edit.

Shapes: h, w height and width after the EXIF orientation has been applied; pixels `[h, w, 3]`, alpha `[h, w]`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from openwu.images.colour import Pixels as Pixels
from openwu.images.colour import grey_profile_to_srgb, profile_space

Floats = NDArray[np.float32]

LUMA = (0.2126, 0.7152, 0.0722)
"""Rec. 709 weights of red, green and blue."""

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
    """The EXIF block as stored, behind the prefix "Exif\\0\\0", without its orientation (already applied), its
    thumbnail and what described the old file's layout; every other byte is where it was."""
    xmp: bytes | None = field(default=None, repr=False)
    """The XMP packet, its orientation set to upright."""
    iptc: bytes | None = field(default=None, repr=False)
    """The IPTC record: captions and keywords of the press."""
    texts: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """(keyword, text) of a PNG file; a JPEG file's comment has the keyword "Comment"."""
    dpi: tuple[float, float] | None = None
    """Dots per inch, horizontal and vertical."""
    format: str | None = None
    """Pillow's name of the file format ("JPEG"); None for a picture from memory."""
    mode: str = "RGB"
    """Pillow's mode of the file ("CMYK"), before anything was converted."""
    lossless: bool = False
    """True for a lossless WebP file, which is written so again."""
    notes: tuple[str, ...] = ()
    """What was converted or could not be kept while reading, in words for the user."""

    def __post_init__(self) -> None:
        if self.pixels.ndim != 3 or self.pixels.shape[2] != 3 or self.pixels.dtype not in (np.uint8, np.uint16):
            got = f"{self.pixels.dtype} {self.pixels.shape}"
            raise ValueError(f"pixels: expected uint8 or uint16 [h, w, 3], got {got}")
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

    def resized(self, pixels: Floats) -> Photo:
        """The same photo with new pixels `[h', w', 3]` between 0 and 1, of another size; transparency is scaled."""
        alpha = self.alpha
        if alpha is not None:
            size = pixels.shape[1], pixels.shape[0]
            scaled = Image.fromarray(alpha.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
            limit = np.iinfo(alpha.dtype).max
            alpha = np.rint(np.asarray(scaled).clip(0, limit)).astype(alpha.dtype)
        return replace(self, pixels=_quantise(pixels, self.pixels.dtype), alpha=alpha)

    def neutral(self) -> Photo:
        """The same photo with its luma in all three channels, exactly grey at its depth, and written so.

        Pixels that are grey already stay bit for bit. A profile of RGB stays true: equal channels are
        neutral in it.
        """
        if _is_grey(self.pixels):
            return replace(self, grey=True)
        luma = np.empty(self.pixels.shape[:2], self.pixels.dtype)
        for start in range(0, len(luma), ROWS_AT_ONCE):
            rows = self.pixels[start : start + ROWS_AT_ONCE]
            luma[start : start + ROWS_AT_ONCE] = np.rint(rows @ np.array(LUMA))
        return replace(self, pixels=cast(Pixels, np.repeat(luma[:, :, None], 3, axis=2)), grey=True)

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
        return replace(self, pixels=grey_profile_to_srgb(self.pixels, self.icc), icc=None)

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

    def channels(self) -> NDArray[Any]:
        """Channels as a file stores them `[h, w, c]`: one of grey that stayed grey or three of colour, then the alpha.

        All have the depth of the deeper of pixels and alpha. A greyscale profile is to be applied first (`in_colour`).
        """
        pixels: NDArray[Any] = self.pixels[:, :, :1] if self.stayed_grey else self.pixels
        if self.alpha is None:
            return pixels
        deep = np.dtype(np.uint16) if np.uint16 in (pixels.dtype, self.alpha.dtype) else np.dtype(np.uint8)
        return np.dstack((_to_depth(pixels, deep), _to_depth(self.alpha, deep)))

    @property
    def metadata(self) -> dict[str, Any]:
        """Profile, EXIF, XMP and DPI by Pillow's names."""
        named = (("icc_profile", self.icc), ("exif", self.exif), ("xmp", self.xmp), ("dpi", self.dpi))
        return {name: value for name, value in named if value}


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

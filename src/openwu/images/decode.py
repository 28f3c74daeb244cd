"""Opened pictures -> Photos: a PIL image enters; upright RGB leaves, with the metadata that stay true of it.

Shapes: h, w the sides of the picture, c its channels as stored.
"""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageOps
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile

from openwu.errors import PictureError
from openwu.images.formats import INSTALL, decode_deep, has_deep_colour
from openwu.images.photo import Photo, Pixels, profile_space

_LAYOUT_TAGS = (
    *range(0x00FE, 0x0104),  # page kind, width, length, bits, compression
    *(0x0106, 0x010A, 0x0111, 0x0112, 0x0115, 0x0116, 0x0117, 0x011C, 0x013D),  # colour model, strips, orientation
    *(0x0140, 0x0142, 0x0143, 0x0144, 0x0145, 0x014A, 0x0152, 0x0153, 0x015B),  # palette, tiles, extra samples
    *(0x0201, 0x0202, 0x0211, 0x0212, 0x0213, 0x0214),  # thumbnail, YCbCr
    *(0x02BC, 0x83BB, 0x8649, 0x8773),  # XMP, IPTC, Photoshop, ICC: whole blocks that Pillow keeps elsewhere
)
"""EXIF tags that describe how the old file stored its pixels; wrong in the new one."""


def decode(image: Image.Image, name: str, file: Path | None = None) -> Photo:
    """The image's current frame. `name` is the picture's in errors; `file`: where it was opened from, for deep colour.

    Raises PictureError.
    """
    notes = list(lost_bits(image, from_file=file is not None))
    mode, kind = image.mode, image.format
    deep = file if is_deep_colour(image) and has_deep_colour() else None
    stored = image.tag_v2.get(ExifTags.Base.Orientation) if isinstance(image, TiffImageFile) else 1
    try:
        image.load()  # turns a TIFF upright and forgets how it lay
        exif, orientation = _read_exif(image, notes)
        turned = max(_orientation(stored), orientation)
        dpi = _read_dpi(image.info.get("dpi"), swapped=turned >= 5)
        icc = image.info.get("icc_profile") or None
        if icc and profile_space(icc) == "CMYK" and mode != "CMYK":  # left behind when somebody else converted it
            icc = None
        if deep:
            values = _upright(decode_deep(deep.read_bytes()), turned)
            pixels, alpha, grey = _split(values, image.has_transparency_data)
        else:
            if orientation > 1:
                image = ImageOps.exif_transpose(image)
            pixels, alpha, grey, icc = _read_pixels(image, icc, name, notes)
    except PictureError:
        raise
    except MemoryError:
        width, height = image.size
        raise PictureError(f"{name}: not enough memory for {width} x {height} pixels; scale it down") from None
    except Exception as error:  # Pillow's decoders raise anything at all on damaged data
        raise PictureError(f"{name}: the picture is damaged or cut short ({error}); get an intact copy") from error
    return Photo(pixels, alpha, grey, icc, exif, dpi, kind, mode, tuple(notes))


def _read_exif(image: Image.Image, notes: list[str]) -> tuple[bytes | None, int]:
    """EXIF that stays true of an upright, edited picture; and how the file has it: 1 upright, 5 to 8 on its side."""
    try:
        exif = image.getexif()
        orientation = _orientation(exif.get(ExifTags.Base.Orientation))
        kept = Image.Exif()
        kept.load(exif.tobytes())
        for tag in _LAYOUT_TAGS:
            kept.pop(tag, None)
        detail = kept.get_ifd(ExifTags.IFD.Exif)
        for tag in (ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight):
            detail.pop(tag, None)
        if not len(kept) and not detail:
            return None, orientation
        return kept.tobytes(), orientation
    except Exception:  # EXIF is written by everything and anything; a broken block must not cost the picture
        notes.append("its EXIF data is damaged and was left out")
        return None, 1


def _orientation(tag: object) -> int:
    return tag if isinstance(tag, int) and 1 <= tag <= 8 else 1


def _read_dpi(dpi: object, *, swapped: bool) -> tuple[float, float] | None:
    if not isinstance(dpi, tuple) or len(dpi) != 2:
        return None
    try:
        across, down = float(dpi[0]), float(dpi[1])
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    if not all(math.isfinite(value) and 1 < value < 1e6 for value in (across, down)):  # 1: Pillow's word for none
        return None
    return (down, across) if swapped else (across, down)


def _read_pixels(
    image: Image.Image, icc: bytes | None, name: str, notes: list[str]
) -> tuple[Pixels, Pixels | None, bool, bytes | None]:
    """(pixels `[h, w, 3]`, alpha `[h, w]` or None, grey, the profile that the pixels are in now)."""
    if image.mode == "F":
        raise PictureError(f"{name}: floating-point pixels have no agreed white; save it with 8 or 16 bits first")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return *_read_16_bit(image, name), True, icc
    if image.mode in ("CMYK", "LAB"):
        return _triple(_to_srgb(image, icc, notes)), None, False, None
    grey = image.mode in ("1", "L", "LA", "La")
    if not image.has_transparency_data:
        return _triple(image), None, grey, icc
    whole = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return _triple(whole), np.array(whole.getchannel("A"), dtype=np.uint8), grey, icc


def _read_16_bit(image: Image.Image, name: str) -> tuple[Pixels, NDArray[np.uint8] | None]:
    """Whole numbers of 16 bits (mode I;16, or I where Pillow chose 32) `[h, w]` -> pixels and alpha."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise PictureError(f"{name}: expected up to 16 bits per pixel, got 32; save it with 8 or 16 bits first")
    clear = image.info.get("transparency")
    alpha = None if clear is None else np.where(values == clear, 0, 255).astype(np.uint8)
    return np.repeat(values.astype(np.uint16)[:, :, None], 3, axis=2), alpha


def _upright(values: NDArray[np.uint16], orientation: int) -> NDArray[np.uint16]:
    """Channels `[h, w, c]` as stored -> as the EXIF orientation wants them seen."""
    if orientation >= 5:
        values = values.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    return values[::-1] if orientation in (3, 4, 7, 8) else values


def _split(values: NDArray[np.uint16], transparent: bool) -> tuple[Pixels, Pixels | None, bool]:
    """16-bit channels `[h, w, c]` -> (pixels `[h, w, 3]`, alpha `[h, w]` or None, grey)."""
    grey = values.shape[2] <= 2
    alpha = values[:, :, -1].copy() if transparent and values.shape[2] in (2, 4) else None
    return np.repeat(values[:, :, :1], 3, axis=2) if grey else values[:, :, :3].copy(), alpha, grey


def _to_srgb(image: Image.Image, icc: bytes | None, notes: list[str]) -> Image.Image:
    """CMYK or Lab -> sRGB through its own profile, or by Pillow's plain formula where there is none."""
    if image.mode == "CMYK" and icc:
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
            converted = ImageCms.profileToProfile(
                image,
                profile,
                ImageCms.createProfile("sRGB"),
                renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
                outputMode="RGB",
                flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
            )
            assert converted is not None
            return converted
        except (ImageCms.PyCMSError, OSError):
            notes.append("its CMYK profile is damaged; converted without it")
    return image.convert("RGB")


def _triple(image: Image.Image) -> NDArray[np.uint8]:
    """`[h, w, 3]` of our own, whatever 8-bit mode comes."""
    return np.array(image.convert("RGB"), dtype=np.uint8)


def lost_bits(image: Image.Image, *, from_file: bool) -> tuple[str, ...]:
    """What reading does with more than 8 bits per channel of colour, where it does not keep them."""
    bits = _colour_bits(image)
    if bits <= 8:
        return ()
    if not is_deep_colour(image):
        return (f"{bits} bits per channel are read as 8",)
    if from_file and has_deep_colour():
        return ()
    cure = "give the file instead" if has_deep_colour() else INSTALL
    return (f"16 bits per channel are read as 8; to keep 16: {cure}",)


def is_deep_colour(image: Image.Image) -> bool:
    """Whether this is a PNG or TIFF file of 16-bit RGB, which Pillow decodes to its upper 8 bits."""
    return image.mode in ("RGB", "RGBA") and image.format in ("PNG", "TIFF") and _colour_bits(image) == 16


def _colour_bits(image: Image.Image) -> int:
    """Bits per channel of the file, as far as it is known to have more than Pillow's 8."""
    if image.mode not in ("RGB", "RGBA", "CMYK"):
        return 8
    if isinstance(image, TiffImageFile):
        return int(np.max(image.tag_v2.get(BITSPERSAMPLE, 8)))
    if image.format == "HEIF":
        return int(image.info.get("bit_depth", 8))
    return 16 if ";16" in str(getattr(image, "tile", None)) else 8  # the raw mode that Pillow chose

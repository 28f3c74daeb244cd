"""Turn opened pictures into Photos: upright RGB, with the metadata that stay true of it.

Shapes: h, w the sides of the picture, c its channels as stored.
"""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile

from openwu.errors import PictureError
from openwu.images import metadata, tiff
from openwu.images.colour import (
    Colour,
    Pixels,
    colour_of_info,
    fitting_profile,
    named,
    print_to_srgb,
    valid_chromaticities,
)
from openwu.images.containers import Declared
from openwu.images.formats import decode_png_16
from openwu.images.photo import Photo
from openwu.images.source import Source
from openwu.images.tiff_pixels import TiffPicture, decode_samples

PREVIEWS = ("Large Thumbnail", "Baseline MP Primary")
"""Kinds of pictures in a camera's multi-picture JPEG that show the photograph again."""


def decode_tiff(picture: TiffPicture) -> Photo:
    """Samples of whole numbers without a codec that knows of pixels. ValueError and the like for damage."""
    page, how, notes = picture.page, picture.layout, picture.notes
    assert how is not None
    photometric = page.number(tiff.PHOTOMETRIC, 1)
    count = {2: 3, 5: 4}.get(photometric, 1)
    if how.samples < count:
        raise ValueError(f"{how.samples} channels for a colour model of {count}")
    channels = decode_samples(picture.file, page, how)
    top = np.iinfo(channels.dtype).max
    turned = _orientation(page.number(tiff.ORIENTATION, 1))
    channels = _upright(channels, turned)
    colours, alpha, entry = channels[:, :, :count], None, page.entries.get(tiff.ICC)
    if picture.has_alpha and how.samples > count and count < 4:
        alpha = channels[:, :, count].copy()
        if page.number(tiff.EXTRA, 0) == 1:
            colours = _unpremultiplied(colours, alpha)
    if photometric == 0:
        colours = top - colours
    icc = fitting_profile(entry.data if entry else None, picture.mode, notes)
    pixels: Pixels
    if count == 4:
        eight = colours if top == 255 else ((colours.astype(np.uint32) + 128) // 257).astype(np.uint8)
        image = Image.fromarray(np.ascontiguousarray(eight), mode="CMYK")
        pixels, icc = np.array(print_to_srgb(image, icc, notes)), None
    else:
        pixels = np.repeat(colours, 3, axis=2) if count == 1 else np.ascontiguousarray(colours)
    photo = Photo(pixels, alpha, count == 1, icc, format="TIFF", mode=picture.mode)
    return replace(_with_tags(photo, picture, turned, notes), notes=tuple(notes))


def decode_image(
    image: Image.Image, facts: Declared, source: Source | None, picture: TiffPicture | None = None
) -> Photo:
    """The image's current frame. `source`: the file it was opened from; None for an image of the caller's.

    `picture`: what is known of a TIFF file. PictureError for pixels that are not supported; whatever Pillow raises for
    damage.
    """
    notes, mode, kind = header_notes(image, facts, source is not None), image.mode, image.format
    deep = source if kind == "PNG" and is_deep_colour(image) else None
    stored = image.tag_v2.get(ExifTags.Base.Orientation) if isinstance(image, TiffImageFile) else 1
    image.load()  # turns a TIFF upright and forgets how it lay
    info = dict(image.info)
    block = None if picture else _exif_block(image, facts, notes)
    try:
        orientation = metadata.exif_orientation(block) if block else 1
    except (ValueError, struct.error):
        block, orientation = None, 1
        notes.append("its EXIF data is damaged and was left out")
    if kind == "AVIF":  # turned by its own box, which Pillow reports as EXIF
        orientation = _orientation(image.getexif().get(ExifTags.Base.Orientation))
    elif kind == "HEIF" or isinstance(image, TiffImageFile):
        orientation = 1
    icc = fitting_profile(info.get("icc_profile") or facts.icc, mode, notes)
    if deep:
        pixels, alpha, grey = _split(_upright(decode_png_16(deep, image), orientation), facts.clear)
    else:
        pixels, alpha, grey, icc = _read_pixels(
            _turned(image, orientation), source.name if source else "picture", icc, notes
        )
    colour = facts.colour or (colour_of_info(info) if source is None else None)
    if colour is None and icc is None and block and mode not in ("CMYK", "LAB"):
        colour = metadata.colour_of_exif(block)
    if colour is not None:
        pixels, icc, note = colour.applied(pixels, grey=grey)
        notes += [note] if note else []
    photo = Photo(pixels, alpha, grey, icc, format=kind, mode=mode, lossless=facts.lossless)
    turned = max(_orientation(stored), orientation)
    photo = _with_tags(photo, picture, turned, notes) if picture else _with_blocks(photo, block, info, turned, notes)
    return replace(photo, notes=tuple(notes))


def header_notes(image: Image.Image, facts: Declared, from_file: bool) -> list[str]:
    """What reading will not keep, as far as the header tells."""
    notes, bits = list(facts.notes), max(_colour_bits(image), facts.bits)
    deep = is_deep_colour(image)
    if bits > 8 and not (deep and from_file):
        notes.append(f"{bits} bits per channel are read as 8" + "; to keep 16: give the file instead" * deep)
    if image.format == "HEIF" and (others := int(getattr(image, "n_frames", 1)) - 1):
        notes.append(f"the primary picture was read; {others} more in the file were left out")
    mpinfo = image.mpinfo.get(0xB002, []) if image.format == "MPO" and hasattr(image, "mpinfo") else []
    kinds = [str(entry["Attribute"]["MPType"]) for entry in mpinfo[1:]]
    if others := sum(not each.startswith(PREVIEWS) for each in kinds):
        notes.append(f"the first picture was read; {others} more in the file (such as a gain map) were left out")
    return notes


def is_deep_colour(image: Image.Image) -> bool:
    """Whether this is a PNG or TIFF file with 16 bits per channel, of which Pillow decodes the upper 8."""
    return image.mode in ("RGB", "RGBA") and image.format in ("PNG", "TIFF") and _colour_bits(image) == 16


def _exif_block(image: Image.Image, facts: Declared, notes: list[str]) -> bytes | None:
    """The EXIF block as stored; as Pillow writes it for images that have none of their own."""
    block = facts.exif or image.info.get("exif") or metadata.raw_profile(image.info, "exif")
    if isinstance(block, bytes) and block:
        return block.removeprefix(metadata.PREFIX).removeprefix(metadata.PREFIX) or None
    try:
        exif = image.getexif()
        return exif.tobytes().removeprefix(metadata.PREFIX) if len(exif) else None
    except Exception:  # EXIF is written by everything and anything; a broken block must not cost the picture
        notes.append("its EXIF data is damaged and was left out")
        return None


def _with_blocks(photo: Photo, block: bytes | None, info: dict[Any, Any], turned: int, notes: list[str]) -> Photo:
    """The photo with the metadata that Pillow found in a file that is no TIFF."""
    xmp = info.get("xmp") or info.get("XML:com.adobe.xmp")
    xmp = xmp.encode() if isinstance(xmp, str) else xmp
    return replace(
        photo,
        exif=_cleaned(block, photo.size, notes),
        xmp=metadata.clean_xmp(xmp, photo.size, notes) if isinstance(xmp, bytes) and xmp else None,
        iptc=metadata.iptc_of(info),
        texts=metadata.texts_of(info, photo.format),
        dpi=_read_dpi(info.get("dpi"), swapped=turned >= 5),
    )


def _with_tags(photo: Photo, picture: TiffPicture, turned: int, notes: list[str]) -> Photo:
    """The photo with a TIFF picture's own metadata, and the colour that its tags declare."""
    page = picture.page
    try:
        block = metadata.exif_of_tiff(picture.file, page)
    except (ValueError, struct.error):
        block = None
        notes.append("its EXIF data is damaged and was left out")
    xmp, unit = page.entries.get(tiff.XMP), {2: 1.0, 3: 2.54}.get(page.number(tiff.RESOLUTION_UNIT, 2))
    dpi = [value * unit for tag in (tiff.X_RESOLUTION, tiff.Y_RESOLUTION) for value in page.rationals(tag)[:1] if unit]
    white, points = page.rationals(0x013E), page.rationals(0x013F)
    if photo.icc is None and photo.mode.startswith("RGB") and valid_chromaticities((*white, *points)):
        chosen = (white[0], white[1], points[0], points[1], points[2], points[3], points[4], points[5])
        colour = Colour("its primaries tag", named(chosen), chosen)
        pixels, icc, note = colour.applied(photo.pixels, grey=photo.grey)
        photo = replace(photo, pixels=pixels, icc=icc)
        notes += [note] if note else []
    return replace(
        photo,
        exif=_cleaned(block, photo.size, notes),
        xmp=metadata.clean_xmp(xmp.data, photo.size, notes) if xmp else None,
        iptc=metadata.iptc_of_tiff(page),
        dpi=_read_dpi(tuple(dpi), swapped=turned >= 5),
    )


def _cleaned(block: bytes | None, size: tuple[int, int], notes: list[str]) -> bytes | None:
    if not block:
        return None
    try:
        kept = metadata.clean_exif(block, size)
    except (ValueError, struct.error):
        notes.append("its EXIF data is damaged and was left out")
        return None
    return None if kept is None else metadata.PREFIX + kept


def _orientation(tag: object) -> int:
    return tag if isinstance(tag, int) and 1 <= tag <= 8 else 1


def _read_dpi(dpi: object, *, swapped: bool) -> tuple[float, float] | None:
    if not isinstance(dpi, tuple) or len(dpi) != 2:
        return None
    try:
        across, down = float(dpi[0]), float(dpi[1])
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    if not all(math.isfinite(value) and 1 < value < 1e5 for value in (across, down)):  # 1: Pillow's word for none
        return None
    return (down, across) if swapped else (across, down)


TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what turns the picture upright."""


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(TRANSPOSES[orientation]) if orientation > 1 else image


def _read_pixels(
    image: Image.Image, name: str, icc: bytes | None, notes: list[str]
) -> tuple[Pixels, Pixels | None, bool, bytes | None]:
    """(pixels `[h, w, 3]`, alpha `[h, w]` or None, grey, the profile that the pixels are in now)."""
    if image.mode == "F":
        raise PictureError(f"{name}: floating-point pixels have no agreed white; save it with 8 or 16 bits first")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return *_read_16_bit(image, name), True, icc
    if image.mode in ("CMYK", "LAB"):
        return _triple(print_to_srgb(image, icc, notes)), None, False, None
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


def _upright(values: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Channels `[h, w, c]` as stored -> as the EXIF orientation wants them seen."""
    if orientation >= 5:
        values = values.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    return values[::-1] if orientation in (3, 4, 7, 8) else values


def _split(values: NDArray[np.uint16], clear: tuple[int, ...] | None) -> tuple[Pixels, Pixels | None, bool]:
    """16-bit channels `[h, w, c]` -> (pixels `[h, w, 3]`, alpha `[h, w]` or None, grey)."""
    count = values.shape[2]
    alpha = values[:, :, -1].copy() if count in (2, 4) else None
    pixels = np.repeat(values[:, :, :1], 3, axis=2) if count == 2 else values[:, :, :3].copy()
    if clear and len(clear) == 3:
        alpha = np.where((pixels == np.array(clear, np.uint16)).all(axis=2), 0, 65535).astype(np.uint16)
    return pixels, alpha, count == 2


def _unpremultiplied(colours: NDArray[Any], alpha: NDArray[Any]) -> NDArray[Any]:
    top = np.iinfo(colours.dtype).max
    whole = colours.astype(np.float64) * top / np.maximum(alpha, 1)[:, :, None]
    unpremultiplied: NDArray[Any] = np.rint(np.minimum(whole, top)).astype(colours.dtype)
    return unpremultiplied


def _triple(image: Image.Image) -> NDArray[np.uint8]:
    """`[h, w, 3]` of our own, whatever 8-bit mode comes."""
    return np.array(image.convert("RGB"), dtype=np.uint8)


def _colour_bits(image: Image.Image) -> int:
    """Bits per channel of the file, as far as it is known to have more than Pillow's 8."""
    if image.mode not in ("RGB", "RGBA", "CMYK"):
        return 8
    if isinstance(image, TiffImageFile):
        return int(np.max(image.tag_v2.get(BITSPERSAMPLE, 8)))
    if image.format == "HEIF":
        return int(image.info.get("bit_depth", 8))
    return 16 if ";16" in str(getattr(image, "tile", None)) else 8  # the raw mode that Pillow chose

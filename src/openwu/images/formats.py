"""What Pillow alone cannot: HEIC, and 16-bit colour. The bytes of a PNG or TIFF file enter as channels of 16 bits
`[h, w, c]`, such channels leave as bytes.

pillow-heif and libvips come with the extra `formats` and are imported when a picture needs them. libvips codes pixels
only; colour profile, EXIF and DPI are written by Pillow, which keeps them as they were.
"""

from __future__ import annotations

import functools
import io
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffTags
from PIL.TiffImagePlugin import STRIPOFFSETS, ImageFileDirectory_v2

INSTALL = "pip install 'openwu[formats]'"
"""What the user is told where a library is missing."""

HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
"""Third word of a HEIC file; the last two may as well begin an AVIF file."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"IHDR", b"IDAT", b"IEND")
_ICC, _RESOLUTION = 0x8773, (0x011A, 0x011B, 0x0128)  # TIFF tags: the profile; across, down, unit


@functools.cache
def has_heif() -> bool:
    """Whether HEIC can be read and written; the first call registers it with Pillow."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


@functools.cache
def _vips() -> Any | None:
    try:
        import pyvips
    except (ImportError, OSError):  # OSError: pyvips without its library
        return None
    return pyvips


def has_deep_colour() -> bool:
    """Whether 16-bit colour can be read and written."""
    return _vips() is not None


def decode_deep(data: bytes) -> NDArray[np.uint16]:
    """A 16-bit PNG or TIFF file -> its channels `[h, w, c]` as stored: grey or colour, then alpha if c is 2 or 4."""
    vips = _vips()
    assert vips is not None
    try:
        image = vips.Image.new_from_buffer(data, "", access="sequential", fail_on="error")
        channels = image.numpy()
    except vips.Error as error:
        raise ValueError(" ".join(str(error).split())) from None
    if channels.ndim != 3 or channels.dtype != np.uint16:
        raise ValueError(f"expected 16-bit channels, got {channels.dtype} {channels.shape}")
    deep: NDArray[np.uint16] = channels
    return deep


def encode_deep(channels: NDArray[np.uint16], format: str, metadata: dict[str, Any]) -> bytes:
    """Channels `[h, w, c]`, and what Pillow would be told to keep (icc_profile, exif, dpi) -> a PNG or TIFF file."""
    vips = _vips()
    assert vips is not None
    height, width, count = channels.shape
    image = vips.Image.new_from_memory(np.ascontiguousarray(channels), width, height, count, "ushort")
    image = image.copy(interpretation="rgb16" if count > 2 else "grey16")
    if format == "PNG":
        return _png(image.pngsave_buffer(compression=4, filter="sub"), metadata)
    return _tiff(image.tiffsave_buffer(compression="deflate", predictor="horizontal"), metadata)


def _png(pixels: bytes, metadata: dict[str, Any]) -> bytes:
    """A PNG file with the metadata's chunks in place of its own."""
    donor = io.BytesIO()
    Image.new("RGB", (1, 1)).save(donor, "PNG", **metadata)
    header, *body = (chunk for name, chunk in _chunks(pixels) if name in _PNG_PIXELS)
    extra = (chunk for name, chunk in _chunks(donor.getvalue()) if name not in _PNG_PIXELS)
    return b"".join((_PNG_SIGNATURE, header, *extra, *body))


def _chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(name, whole chunk) of a well-formed PNG file."""
    place = len(_PNG_SIGNATURE)
    while place < len(png):
        length, name = struct.unpack_from(">I4s", png, place)
        end = place + 12 + length  # length, name and checksum are 12 bytes
        yield name, png[place:end]
        place = end


def _tiff(pixels: bytes, metadata: dict[str, Any]) -> bytes:
    """A TIFF file of one page and strips, behind a new directory that has the metadata's tags."""
    source = io.BytesIO(pixels)
    tags = ImageFileDirectory_v2(source.read(8))
    source.seek(tags.next)
    tags.load(source)
    dict(tags)  # decodes every tag: only those are saved
    for tag in _RESOLUTION:
        tags.pop(tag, None)
    exif = Image.Exif()
    exif.load(metadata.get("exif", b""))
    for tag in exif:
        tags[tag] = exif.get_ifd(tag) if tag in TiffTags.TAGS_V2_GROUPS else exif[tag]
    if "icc_profile" in metadata:
        tags.tagtype[_ICC] = TiffTags.UNDEFINED
        tags[_ICC] = metadata["icc_profile"]
    if "dpi" in metadata:
        for tag, value in zip(_RESOLUTION, (*metadata["dpi"], 2), strict=True):  # 2: per inch
            tags[tag] = value
    tags[STRIPOFFSETS] = tuple(offset - 8 for offset in tags[STRIPOFFSETS])  # from the directory's end: see save
    whole = io.BytesIO()
    tags.save(whole)
    return whole.getvalue() + pixels[8:]

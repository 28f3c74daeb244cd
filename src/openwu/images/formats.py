"""Code what Pillow alone cannot: HEIC, with the extra `formats`, and every bit of 16-bit PNG files.

Shapes: h, w the sides of a picture, c its channels: grey or colour, then alpha if c is 2 or 4.
"""

from __future__ import annotations

import functools
import io
import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from openwu.images.metadata import chunk
from openwu.images.source import PNG_SIGNATURE, Source

INSTALL = "pip install 'openwu[formats]'"
"""Command in messages where an optional library is missing."""

HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
"""Third word of a HEIC file; the last two may as well begin an AVIF file."""

COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
"""Channels -> colour type of a PNG header."""


@functools.cache
def has_heif() -> bool:
    """Whether HEIC can be read and written; the first call registers it with Pillow."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def decode_png_16(source: Source, image: Image.Image) -> NDArray[np.uint16]:
    """The channels `[h, w, c]` of a PNG file of 16-bit colour or 16-bit grey with alpha, of which Pillow keeps 8 bits.

    `image`: what Pillow made of it, which has the upper bytes of colour; another decoding, in the other byte order, has
    the lower ones. Grey with alpha is as many bytes as 8-bit RGBA.
    """
    data = source.everything()
    grey = data[25] == 4
    if grey:
        data = data[:8] + chunk(b"IHDR", data[16:24] + b"\x08\x06" + data[26:29]) + data[33:]
    with Image.open(io.BytesIO(data), formats=["PNG"]) as again:
        if grey:
            return np.array(again).view(">u2").astype(np.uint16)
        again.tile = [again.tile[0]._replace(args=str(again.tile[0].args).replace("16B", "16L"))]
        high = np.array(image, np.uint16)
        high <<= 8
        high |= np.array(again)
        return high


def encode_png_16(channels: NDArray[np.uint16]) -> bytes:
    """Channels `[h, w, c]` -> a PNG file without metadata."""
    height, width, count = channels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, COLOUR_TYPES[count], 0, 0, 0)
    stored = np.ascontiguousarray(channels, ">u2").view(np.uint8).reshape(height, -1)
    rows = np.empty((height, stored.shape[1] + 1), np.uint8)
    rows[:, 0] = 1  # filter "sub": each byte less the one a pixel before
    rows[:, 1:] = stored
    rows[:, 1 + 2 * count :] -= stored[:, : -2 * count]
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.data, 4)) + chunk(b"IEND", b"")
    return PNG_SIGNATURE + body

"""Read and write the pixels of TIFF files of whole numbers, in any layout that is not a codec's own.

Pillow decompresses; what bits and samples mean is decided here, since Pillow's table of pixel layouts knows few and
takes some for others.

Shapes: h, w the sides of a picture, c its samples per pixel, alpha and others included.
"""

from __future__ import annotations

import io
import os
import re
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from openwu.errors import PictureError
from openwu.images.source import Source
from openwu.images.tiff import (
    BITS,
    COMPRESSION,
    EXTRA,
    FILL_ORDER,
    FORMAT,
    HEIGHT,
    LONG,
    MAX_SAMPLES,
    PHOTOMETRIC,
    PLANAR,
    PREDICTOR,
    RATIONAL,
    RESOLUTION_UNIT,
    ROWS,
    SAMPLES,
    STRIP_BYTES,
    STRIPS,
    TILE_BYTES,
    TILE_HEIGHT,
    TILE_WIDTH,
    TILES,
    UNDEFINED,
    WIDTH,
    X_RESOLUTION,
    XMP,
    Y_RESOLUTION,
    Directory,
    Entry,
    Tiff,
    directory_bytes,
    longs,
    shorts,
)

PIXEL_CODECS = frozenset((2, 3, 4, 6, 7, 32771))
"""Compressions of pixels that Pillow reads: fax and JPEG."""

PLAIN_CODECS = frozenset((1, 5, 8, 32946, 32773, 34925, 50000))
"""Compressions that know nothing of pixels: none, LZW, Deflate, PackBits, LZMA, Zstandard."""


@dataclass(frozen=True)
class Layout:
    """How a picture's samples are stored, where they can be read here."""

    bits: int
    samples: int
    planar: bool
    predictor: int
    tile: tuple[int, int] | None
    """(width, height) of a tile; None for strips."""


@dataclass(frozen=True)
class TiffPicture:
    """The picture to read of a TIFF file, and how its samples lie; None where Pillow decodes them."""

    file: Tiff
    page: Directory
    layout: Layout | None

    @property
    def mode(self) -> str:
        """Pillow's name for such pixels."""
        assert self.layout is not None
        colours = {2: "RGB", 5: "CMYK"}.get(self.page.number(PHOTOMETRIC, 1))
        if colours is None:
            bits = self.layout.bits
            colours = "1" if bits == 1 else "L" if bits <= 8 or self.has_alpha else "I;16"
        return colours + "A" * (self.has_alpha and colours in ("L", "RGB"))

    @property
    def has_alpha(self) -> bool:
        """Whether the first of its extra samples is transparency."""
        return self.page.number(EXTRA, 0) in (1, 2)

    @property
    def notes(self) -> list[str]:
        """What reading will not keep."""
        assert self.layout is not None
        notes, colours = [], {2: 3, 5: 4}.get(self.page.number(PHOTOMETRIC, 1), 1)
        if colours == 4 and self.layout.bits > 8:
            notes.append(f"{self.layout.bits} bits per channel are read as 8")
        extra = self.layout.samples - colours - (self.has_alpha and colours < 4)
        if extra > 0:
            notes.append(f"{extra} extra channel{'s' * (extra > 1)} beside colour and transparency were left out")
        return notes


def layout(page: Directory, name: str) -> Layout | None:
    """How the samples lie: None for codecs and colour models that Pillow reads; PictureError for what nobody reads."""
    samples, bits = page.number(SAMPLES, 1), page.numbers(BITS, (1,))
    formats = set(page.numbers(FORMAT, (1,)))
    if 3 in formats:
        raise PictureError(f"{name}: floating-point pixels have no agreed white; save it with 8 or 16 bits first")
    if formats & {5, 6}:
        raise PictureError(f"{name}: expected pixels, got complex numbers; save it with 8 or 16 bits first")
    if 2 in formats and max(bits) <= 16:
        raise PictureError(f"{name}: expected unsigned pixels, got signed ones; save it as unsigned 8 or 16 bits first")
    codec = page.number(COMPRESSION, 1)
    if codec not in PLAIN_CODECS | PIXEL_CODECS:
        raise PictureError(f"{name}: TIFF with the compression {codec} is not supported; save it with Deflate or LZW")
    if max(bits) > 16:
        if samples > 1:
            raise PictureError(
                f"{name}: expected up to 16 bits per channel, got {max(bits)}; save it with 8 or 16 bits first"
            )
        return None
    if page.number(PHOTOMETRIC, 1) not in (0, 1, 2, 5) or codec not in PLAIN_CODECS:
        if page.number(PLANAR, 1) == 2 and samples > 1:
            raise PictureError(
                f"{name}: its channels are stored in planes of a kind that is not supported; save as PNG"
            )
        return None
    if not 1 <= samples <= MAX_SAMPLES or len(set(bits)) != 1 or len(bits) not in (1, samples):
        raise PictureError(f"{name}: expected equal channels, got {samples} with {bits} bits; save it as PNG")
    tile = (page.number(TILE_WIDTH, 0), page.number(TILE_HEIGHT, 0)) if TILES in page.entries else None
    predictor = page.number(PREDICTOR, 1) if codec not in (1, 32773) else 1
    if predictor not in (1, 2) or (predictor == 2 and bits[0] not in (8, 16)):
        raise PictureError(f"{name}: the predictor {predictor} of its {bits[0]} bits is not supported; save it as PNG")
    return Layout(bits[0], samples, page.number(PLANAR, 1) == 2 and samples > 1, predictor, tile)


def decode_samples(tiff: Tiff, page: Directory, how: Layout) -> NDArray[Any]:
    """A picture's samples `[h, w, c]`, of uint8 up to 8 bits and of uint16 above, scaled to the full range.

    Pillow decompresses strips and tiles as if every byte were a pixel of grey, which no table of layouts can get wrong.
    """
    width, height = page.size
    tags = (TILES, TILE_BYTES) if how.tile else (STRIPS, STRIP_BYTES)
    each = 1 if how.planar else how.samples
    across = -(-width // how.tile[0]) if how.tile else 1
    columns = how.tile[0] if how.tile else width
    row = -(-columns * each * how.bits // 8)  # bytes of one row of a tile or strip
    offsets, lengths = (page.numbers(tag) for tag in tags)
    share = len(offsets) // how.samples if how.planar else len(offsets)
    data = tiff.source.everything()
    rows = how.tile[1] if how.tile else min(page.number(ROWS, height), height)
    _check_inside(page, offsets, lengths, row * rows, max(1, share), len(data))
    planes = []
    for plane in range(how.samples if how.planar else 1):
        part = slice(plane * share, (plane + 1) * share)
        entries = {
            WIDTH: longs(tiff.order, row * across),
            HEIGHT: longs(tiff.order, height),
            BITS: shorts(tiff.order, 8),
            COMPRESSION: shorts(tiff.order, page.number(COMPRESSION, 1)),
            PHOTOMETRIC: shorts(tiff.order, 1),
            SAMPLES: shorts(tiff.order, 1),
            FILL_ORDER: shorts(tiff.order, page.number(FILL_ORDER, 1)),
            tags[0]: _offsets(tiff, offsets[part]),
        }
        if len(lengths) == len(offsets):
            entries[tags[1]] = _offsets(tiff, lengths[part])
        if how.tile:
            entries |= {TILE_WIDTH: longs(tiff.order, row), TILE_HEIGHT: longs(tiff.order, how.tile[1])}
        elif ROWS in page.entries:
            entries[ROWS] = longs(tiff.order, min(page.number(ROWS, height), height))
        stored = _bytes_of(data, tiff, entries).reshape(height, across, row)
        values = _unpack(stored, tiff.order, columns * each, how.bits).reshape(height, across, columns, each)
        if how.predictor == 2:
            np.cumsum(values, axis=2, dtype=values.dtype, out=values)
        planes.append(values.reshape(height, across * columns, each)[:, :width])
    return np.concatenate(planes, axis=2) if how.planar else planes[0]


def _check_inside(
    page: Directory, offsets: Sequence[int], lengths: Sequence[int], whole: int, share: int, size: int
) -> None:
    """Refuse strips or tiles that end behind the file: there the directory of `decode_samples` will stand.

    `whole`: bytes of one of them, decompressed; the last of the `share` strips of a plane may have fewer rows.
    """
    if page.number(COMPRESSION, 1) == 1:
        rows = page.number(ROWS, page.size[1])
        rest = 0 if TILES in page.entries else page.size[1] % max(1, rows)
        last = whole // rows * rest if rest else whole
        lengths = [whole if (position + 1) % share else last for position in range(len(offsets))]
    if not offsets or any(start + length > size for start, length in zip(offsets, lengths, strict=False)):
        raise ValueError("its pixels end behind the file")


def _bytes_of(data: bytes, tiff: Tiff, entries: Mapping[int, Entry]) -> NDArray[np.uint8]:
    """Decompressed bytes `[h, bytes of a row]`, by a directory that is written behind the file."""
    whole = bytearray(data + bytes(-len(data) % 8))
    struct.pack_into(tiff.order + ("Q" if tiff.big else "I"), whole, 8 if tiff.big else 4, len(whole))
    whole += directory_bytes(tiff.order, entries, len(whole), big=tiff.big)
    with without_lines(), Image.open(io.BytesIO(bytes(whole)), formats=["TIFF"]) as image:
        return np.array(image)


LINES = re.compile(
    rb"(More samples per pixel|tempfile\.tif|MissingRequired|"
    rb"_?(TIFF|LZW|ZIP|ZSTD|LZMA|PackBits|O?JPEG|Fax|Dump|LogL|Pixar|WebP)\w*): "
)
"""How the lines begin that libtiff, and Pillow's use of it, print."""


@contextmanager
def without_lines() -> Iterator[None]:
    """Take out the lines that libtiff writes to stderr past Python; those of others come a little later."""
    try:
        stderr = os.dup(2)
    except OSError:  # closed
        yield
        return
    with tempfile.TemporaryFile() as taken:
        os.dup2(taken.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            taken.seek(0)
            for line in taken:
                if not LINES.match(line):
                    os.write(2, line)


def _unpack(stored: NDArray[np.uint8], order: str, count: int, bits: int) -> NDArray[Any]:
    """Bytes `[h, across, row]` -> values `[h, across, count]` of the full range of 8 or 16 bits."""
    if bits == 8:
        return stored
    if bits == 16:
        return stored.view(f"{order}u2").astype(np.uint16)
    dtype: Any = np.uint8 if bits < 8 else np.uint16
    values = np.empty((*stored.shape[:2], count), dtype)
    weights, peak = (1 << np.arange(bits - 1, -1, -1)).astype(np.uint32), 2**bits - 1
    for start in range(0, len(stored), 64):  # eight times as large on the way
        chosen = np.unpackbits(stored[start : start + 64], axis=-1, count=count * bits)
        whole = chosen.reshape(*chosen.shape[:2], count, bits) @ weights
        values[start : start + 64] = (whole * np.iinfo(dtype).max + peak // 2) // peak
    return values


def encode_tiff(
    channels: NDArray[Any], block: bytes | None, tags: Mapping[int, bytes], dpi: tuple[float, float] | None
) -> bytes:
    """A TIFF file of channels `[h, w, c]` (grey or colour, then alpha if c is 2 or 4) of 8 or 16 bits.

    `block`: an EXIF block without its prefix. The file begins with it, so that every offset in it stays true, those
    inside maker notes included. `tags`: further tags of bytes (profile, XMP, IPTC).
    """
    order, kept = "<", dict[int, Entry]()
    whole = bytearray(b"II*\0" + bytes(4))
    if block:
        exif = Tiff(Source("exif", io.BytesIO(block)))
        order, kept = exif.order, dict(exif.directory(exif.first).entries)
        whole = bytearray(block) + bytes(len(block) % 2)
    height, width, count = channels.shape
    rows = max(1, 2**18 // (width * count * channels.itemsize))
    stored = channels.dtype.newbyteorder("<" if order == "<" else ">")
    offsets, lengths = [], []
    for start in range(0, height, rows):
        strip = channels[start : start + rows].copy()
        strip[:, 1:] -= channels[start : start + rows, :-1]  # the horizontal predictor
        data = zlib.compress(strip.astype(stored).tobytes(), 4)
        offsets.append(len(whole))
        lengths.append(len(data))
        whole += data + bytes(len(data) % 2)
    entries = kept | {
        WIDTH: longs(order, width),
        HEIGHT: longs(order, height),
        BITS: shorts(order, *[channels.itemsize * 8] * count),
        COMPRESSION: shorts(order, 8),
        PHOTOMETRIC: shorts(order, 2 if count > 2 else 1),
        STRIPS: longs(order, *offsets),
        SAMPLES: shorts(order, count),
        ROWS: longs(order, rows),
        STRIP_BYTES: longs(order, *lengths),
        PLANAR: shorts(order, 1),
        PREDICTOR: shorts(order, 2),
    }
    if count in (2, 4):
        entries[EXTRA] = shorts(order, 2)
    if dpi:
        for tag, value in zip((X_RESOLUTION, Y_RESOLUTION), dpi, strict=True):
            entries[tag] = Entry(RATIONAL, 1, struct.pack(f"{order}II", round(value * 10_000), 10_000))
        entries[RESOLUTION_UNIT] = shorts(order, 2)
    entries |= {tag: Entry(1 if tag == XMP else UNDEFINED, len(data), data) for tag, data in tags.items()}
    whole += bytes(len(whole) % 2)
    struct.pack_into(f"{order}I", whole, 4, len(whole))
    return bytes(whole) + directory_bytes(order, entries, len(whole))


def _offsets(tiff: Tiff, values: Iterable[int]) -> Entry:
    several = tuple(values)
    kind = (16, "Q") if tiff.big else (LONG, "I")
    return Entry(kind[0], len(several), struct.pack(f"{tiff.order}{len(several)}{kind[1]}", *several))

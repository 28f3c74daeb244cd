"""Read and write the TIFF structure: directories of tags, which EXIF blocks have too, and the samples of TIFF files.

Values stay as stored, byte for byte. Pillow decompresses; what bits and samples mean is decided here, since Pillow's
table of pixel layouts knows few and takes some for others.

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
from openwu.images.source import Source, refuse_raw

SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Type of a tag -> bytes of one value."""

SHORT, LONG, UNDEFINED, RATIONAL = 3, 4, 7, 5
NUMBERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}

SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 0x00FE, 0x0100, 0x0101, 0x0102, 0x0103, 0x0106
FILL_ORDER, STRIPS, ORIENTATION, SAMPLES, ROWS, STRIP_BYTES, PLANAR = 0x10A, 0x111, 0x112, 0x115, 0x116, 0x117, 0x11C
PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILES, TILE_BYTES, SUB_IFDS = 0x13D, 0x142, 0x143, 0x144, 0x145, 0x14A
EXTRA, FORMAT, X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT = 0x152, 0x153, 0x11A, 0x11B, 0x128
XMP, IPTC, ICC, EXIF_IFD, GPS_IFD, INTEROP_IFD, DNG_VERSION = 0x02BC, 0x83BB, 0x8773, 0x8769, 0x8825, 0xA005, 0xC612

PLAIN_CODECS = frozenset((1, 5, 8, 32946, 32773, 34925, 50000))
"""Compressions that know nothing of pixels: none, LZW, Deflate, PackBits, LZMA, Zstandard."""

RAW_PHOTOMETRICS, RAW_CODECS = (32803, 34892), (32767, 32769, 34713, 65535)
MAX_DIRECTORIES, MAX_SAMPLES = 4096, 16


@dataclass(frozen=True)
class Entry:
    """A tag's value as stored, in the byte order of its file."""

    type: int
    count: int
    data: bytes


@dataclass(frozen=True)
class Directory:
    """The tags of one picture, or of one group of metadata."""

    offset: int
    entries: Mapping[int, Entry]
    next: int
    """Offset of the next directory, 0 for none."""
    order: str
    """"<" or ">"."""

    def numbers(self, tag: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """A tag's whole numbers, or the default where it is missing or of another type."""
        entry = self.entries.get(tag)
        if entry is None or entry.type not in NUMBERS:
            return default
        return struct.unpack(f"{self.order}{entry.count}{NUMBERS[entry.type]}", entry.data)

    def number(self, tag: int, default: int) -> int:
        """A tag's first whole number, or the default."""
        return next(iter(self.numbers(tag)), default)

    def rationals(self, tag: int) -> tuple[float, ...]:
        """A tag's fractions; empty where it is missing, of another type or has a denominator of zero."""
        entry = self.entries.get(tag)
        if entry is None or entry.type != RATIONAL:
            return ()
        parts = struct.unpack(f"{self.order}{2 * entry.count}I", entry.data)
        return tuple(a / b for a, b in zip(parts[::2], parts[1::2], strict=True)) if all(parts[1::2]) else ()

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)"""
        return self.number(WIDTH, 0), self.number(HEIGHT, 0)

    @property
    def reduced(self) -> bool:
        """Whether this is a thumbnail, a preview or a mask of another picture."""
        return bool(self.number(SUBFILE, 0) & 5)


class Tiff:
    """A TIFF file or EXIF block. ValueError or struct.error for bytes that are none."""

    def __init__(self, source: Source) -> None:
        self.source = source
        head = source.at(0, 16)
        self.order = {b"II": "<", b"MM": ">"}.get(head[:2], "")
        version = struct.unpack(f"{self.order or '<'}H", head[2:4])[0]
        if not self.order or version not in (42, 43):
            raise ValueError("no TIFF header")
        self.big = version == 43
        self.first: int = struct.unpack_from(self.order + ("Q" if self.big else "I"), head, 8 if self.big else 4)[0]

    @property
    def _layout(self) -> tuple[str, str, int, int]:
        """(struct of the count, of an offset, bytes of an entry, bytes that a value may have in place)"""
        return ("Q", "Q", 20, 8) if self.big else ("H", "I", 12, 4)

    def directory(self, offset: int) -> Directory:
        """The directory at an offset; entries of unknown types and those that point out of the file are left out."""
        count_as, offset_as, each, inline = self._layout
        start = offset + struct.calcsize(self.order + count_as)
        count = struct.unpack(self.order + count_as, self.source.at(offset, start - offset))[0]
        if not 0 < count <= 65_535:
            raise ValueError(f"a directory of {count} tags")
        table = self.source.at(start, count * each)
        entries: dict[int, Entry] = {}
        for place in range(0, count * each, each):
            tag, kind, length = struct.unpack_from(f"{self.order}HH{offset_as}", table, place)
            wanted = SIZES.get(kind, 0) * length
            data = table[place + each - inline : place + each][:wanted]
            if wanted > inline:
                where = struct.unpack(self.order + offset_as, data)[0]
                data = self.source.at(where, wanted) if wanted <= self.source.size else b""
            if wanted and len(data) == wanted:
                entries.setdefault(tag, Entry(kind, length, data))
        following = self.source.at(start + count * each, inline)
        after = struct.unpack(self.order + offset_as, following)[0] if len(following) == inline else 0
        return Directory(offset, entries, after, self.order)

    def pages(self) -> Iterator[Directory]:
        """The directories of the main chain."""
        offset, seen = self.first, set[int]()
        while offset and offset not in seen and len(seen) < MAX_DIRECTORIES:
            seen.add(offset)
            page = self.directory(offset)
            yield page
            offset = page.next

    def below(self, page: Directory) -> Iterator[Directory]:
        """The pictures that hang below one: previews, pyramids, or a raw file's photograph."""
        for offset in page.numbers(SUB_IFDS)[:MAX_SAMPLES]:
            try:
                yield self.directory(offset)
            except (ValueError, struct.error):
                continue

    def primary(self) -> Directory:
        """The picture of a file: the only one that is not marked as reduced. PictureError for several, or for raw."""
        name = self.source.name
        pages = list(self.pages())
        if not pages:
            raise ValueError("no directory")
        below = [each for page in pages for each in self.below(page)]
        for page in (*pages, *below):
            if (
                DNG_VERSION in page.entries
                or page.number(PHOTOMETRIC, 0) in RAW_PHOTOMETRICS
                or page.number(COMPRESSION, 1) in RAW_CODECS
            ):
                raise refuse_raw(name, "DNG" if DNG_VERSION in page.entries else "a sensor's own pixels")
        full = [page for page in pages if not page.reduced]
        if not full:
            full = [page for page in below if not page.reduced] or pages[:1]
        if len(full) > 1:
            raise PictureError(f"{name}: expected one picture, got {len(full)} pages; save the one to edit as PNG")
        largest = max(below, key=lambda each: each.size[0] * each.size[1], default=full[0])
        if largest.size[0] * largest.size[1] > full[0].size[0] * full[0].size[1]:
            if largest.reduced:
                raise PictureError(
                    f"{name}: its first picture is smaller than one that is marked as its preview; "
                    "save the one to edit as PNG"
                )
            return largest
        return full[0]

    def alone(self, page: Directory) -> bytes:
        """The file with this picture as its first."""
        data = bytearray(self.source.everything())
        struct.pack_into(self.order + ("Q" if self.big else "I"), data, 8 if self.big else 4, page.offset)
        return bytes(data)


@dataclass(frozen=True)
class Layout:
    """How a picture's samples are stored, where they can be read here."""

    bits: int
    samples: int
    planar: bool
    predictor: int
    tile: tuple[int, int] | None
    """(width, height) of a tile; None for strips."""


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
    if max(bits) > 16:
        if samples > 1:
            raise PictureError(
                f"{name}: expected up to 16 bits per channel, got {max(bits)}; save it with 8 or 16 bits first"
            )
        return None
    if page.number(PHOTOMETRIC, 1) not in (0, 1, 2, 5) or page.number(COMPRESSION, 1) not in PLAIN_CODECS:
        if page.number(PLANAR, 1) == 2 and samples > 1:
            raise PictureError(
                f"{name}: its channels are stored in planes of a kind that is not supported; save as PNG"
            )
        return None
    if not 1 <= samples <= MAX_SAMPLES or len(set(bits)) != 1 or len(bits) not in (1, samples):
        raise PictureError(f"{name}: expected equal channels, got {samples} with {bits} bits; save it as PNG")
    tile = (page.number(TILE_WIDTH, 0), page.number(TILE_HEIGHT, 0)) if TILES in page.entries else None
    predictor = page.number(PREDICTOR, 1) if page.number(COMPRESSION, 1) not in (1, 32773) else 1
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
    _check_inside(
        page, offsets, lengths, row * (how.tile[1] if how.tile else min(page.number(ROWS, height), height)), len(data)
    )
    planes = []
    for plane in range(how.samples if how.planar else 1):
        part = slice(plane * share, (plane + 1) * share)
        entries = {
            WIDTH: _longs(tiff.order, row * across),
            HEIGHT: _longs(tiff.order, height),
            BITS: _shorts(tiff.order, 8),
            COMPRESSION: _shorts(tiff.order, page.number(COMPRESSION, 1)),
            PHOTOMETRIC: _shorts(tiff.order, 1),
            SAMPLES: _shorts(tiff.order, 1),
            FILL_ORDER: _shorts(tiff.order, page.number(FILL_ORDER, 1)),
            tags[0]: _offsets(tiff, offsets[part]),
        }
        if len(lengths) == len(offsets):
            entries[tags[1]] = _offsets(tiff, lengths[part])
        if how.tile:
            entries |= {TILE_WIDTH: _longs(tiff.order, row), TILE_HEIGHT: _longs(tiff.order, how.tile[1])}
        elif ROWS in page.entries:
            entries[ROWS] = _longs(tiff.order, min(page.number(ROWS, height), height))
        stored = _bytes_of(data, tiff, entries).reshape(height, across, row)
        values = _unpack(stored, tiff.order, columns * each, how.bits).reshape(height, across, columns, each)
        if how.predictor == 2:
            np.cumsum(values, axis=2, dtype=values.dtype, out=values)
        planes.append(values.reshape(height, across * columns, each)[:, :width])
    return np.concatenate(planes, axis=2) if how.planar else planes[0]


def _check_inside(page: Directory, offsets: Sequence[int], lengths: Sequence[int], whole: int, size: int) -> None:
    """Refuse strips or tiles that end behind the file: there the directory of `decode_samples` will stand.

    `whole`: bytes of one of them, decompressed; the last strip may have fewer rows.
    """
    if page.number(COMPRESSION, 1) == 1:
        rest = page.size[1] % max(1, page.number(ROWS, page.size[1]))
        last = whole if TILES in page.entries or not rest else whole // page.number(ROWS, 1) * rest
        lengths = [*[whole] * (len(offsets) - 1), last]
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
    rb"(More samples per pixel|tempfile\.tif|MissingRequired|_?(TIFF|LZW|ZIP|ZSTD|LZMA|PackBits|O?JPEG|Fax|Dump|LogL|Pixar|WebP)\w*): "
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


def directory_bytes(order: str, entries: Mapping[int, Entry], offset: int, *, big: bool = False) -> bytes:
    """A directory, and behind it the values that do not fit into its entries, for this offset in a file."""
    count_as, offset_as, each, inline = ("Q", "Q", 20, 8) if big else ("H", "I", 12, 4)
    table = struct.pack(order + count_as, len(entries))
    behind = offset + len(table) + len(entries) * each + inline
    values = b""
    for tag, entry in sorted(entries.items()):
        data = entry.data.ljust(inline, b"\0")
        if len(entry.data) > inline:
            values += bytes((behind + len(values)) % 2)
            data = struct.pack(order + offset_as, behind + len(values))
            values += entry.data
        table += struct.pack(f"{order}HH{offset_as}", tag, entry.type, entry.count) + data
    return table + bytes(inline) + values


def encode(
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
        WIDTH: _longs(order, width),
        HEIGHT: _longs(order, height),
        BITS: _shorts(order, *[channels.itemsize * 8] * count),
        COMPRESSION: _shorts(order, 8),
        PHOTOMETRIC: _shorts(order, 2 if count > 2 else 1),
        STRIPS: _longs(order, *offsets),
        SAMPLES: _shorts(order, count),
        ROWS: _longs(order, rows),
        STRIP_BYTES: _longs(order, *lengths),
        PLANAR: _shorts(order, 1),
        PREDICTOR: _shorts(order, 2),
    }
    if count in (2, 4):
        entries[EXTRA] = _shorts(order, 2)
    if dpi:
        for tag, value in zip((X_RESOLUTION, Y_RESOLUTION), dpi, strict=True):
            entries[tag] = Entry(RATIONAL, 1, struct.pack(f"{order}II", round(value * 10_000), 10_000))
        entries[RESOLUTION_UNIT] = _shorts(order, 2)
    entries |= {tag: Entry(1 if tag == XMP else UNDEFINED, len(data), data) for tag, data in tags.items()}
    whole += bytes(len(whole) % 2)
    struct.pack_into(f"{order}I", whole, 4, len(whole))
    return bytes(whole) + directory_bytes(order, entries, len(whole))


def _shorts(order: str, *values: int) -> Entry:
    return Entry(SHORT, len(values), struct.pack(f"{order}{len(values)}H", *values))


def _longs(order: str, *values: int) -> Entry:
    return Entry(LONG, len(values), struct.pack(f"{order}{len(values)}I", *values))


def _offsets(tiff: Tiff, values: Iterable[int]) -> Entry:
    several = tuple(values)
    kind = (16, "Q") if tiff.big else (LONG, "I")
    return Entry(kind[0], len(several), struct.pack(f"{tiff.order}{len(several)}{kind[1]}", *several))

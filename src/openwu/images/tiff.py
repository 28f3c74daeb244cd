"""Read and write directories of TIFF tags, which EXIF blocks have too; values stay as stored, byte for byte."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

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
        for position in range(0, count * each, each):
            tag, kind, length = struct.unpack_from(f"{self.order}HH{offset_as}", table, position)
            wanted = SIZES.get(kind, 0) * length
            data = table[position + each - inline : position + each][:wanted]
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


def shorts(order: str, *values: int) -> Entry:
    """An entry of 16-bit numbers."""
    return Entry(SHORT, len(values), struct.pack(f"{order}{len(values)}H", *values))


def longs(order: str, *values: int) -> Entry:
    """An entry of 32-bit numbers."""
    return Entry(LONG, len(values), struct.pack(f"{order}{len(values)}I", *values))

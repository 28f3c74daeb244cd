"""Carry EXIF, XMP, IPTC and texts from one file to another: patched where they speak of the old pixels, else as stored.

An EXIF block here begins with its TIFF header; Pillow's prefix is added and removed at the edges.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from openwu.images import tiff
from openwu.images.colour import ADOBE_RGB, Colour
from openwu.images.source import PNG_SIGNATURE, Source
from openwu.images.tiff import Directory, Entry, Tiff

PREFIX = b"Exif\0\0"
"""Stands before the block in JPEG files, and wherever Pillow speaks of EXIF."""

LAYOUT_TAGS = frozenset(
    (
        *range(0x00FE, 0x0104),  # page kind, width, length, bits, compression
        *(0x0106, 0x010A, 0x0111, 0x0112, 0x0115, 0x0116, 0x0117, 0x011C, 0x013D),  # colour model, strips, orientation
        *(0x0140, 0x0142, 0x0143, 0x0144, 0x0145, 0x014A, 0x0152, 0x0153, 0x015B),  # palette, tiles, extra samples
        *(0x0201, 0x0202, 0x0211, 0x0212, 0x0213, 0x0214),  # thumbnail, YCbCr
        *(0x02BC, 0x83BB, 0x8649, 0x8773, 0x935C),  # XMP, IPTC, Photoshop, ICC, layers: blocks that are kept elsewhere
    )
)
"""Tags that describe how the old file stored its pixels; wrong in the new one."""

COLOUR_TAGS = frozenset((0x012D, 0x013E, 0x013F))
"""Transfer function, white point and primaries of a TIFF picture, which become its profile."""

PIXEL_SIZE = (0xA002, 0xA003)
"""Width and height that the Exif directory repeats."""

TEXTS_OF_BLOCKS = ("XML:com.adobe.xmp", "Raw profile type")
"""Keywords of PNG texts that are blocks of metadata in disguise."""

XMP_SEGMENT, IPTC_SEGMENT = b"http://ns.adobe.com/xap/1.0/\0", b"Photoshop 3.0\0"
MAX_SEGMENT = 65_533
"""Bytes that a JPEG segment holds."""


def exif_orientation(block: bytes) -> int:
    """How a block says that its picture lies: 1 upright, 5 to 8 on its side. ValueError or struct.error for damage."""
    found = Tiff(Source("exif", io.BytesIO(block)))
    tag = found.directory(found.first).number(tiff.ORIENTATION, 1)
    return tag if 1 <= tag <= 8 else 1


def clean_exif(block: bytes, size: tuple[int, int]) -> bytes | None:
    """The block for an upright picture of this (width, height); None where nothing is left.

    Entries are taken out and numbers changed in place, so that every other byte and every offset stays: those inside
    maker notes are known to their makers alone. The thumbnail, which shows the old picture, is blanked and unlinked.
    ValueError or struct.error for a damaged block.
    """
    found = Tiff(Source("exif", io.BytesIO(block)))
    if found.big:
        raise ValueError("an EXIF block of BigTIFF")
    data, first = bytearray(block), found.directory(found.first)
    _blank_thumbnail(found, first, data)
    offset = first.number(tiff.EXIF_IFD, 0)
    if _readable(found, offset):
        group = found.directory(offset)
        for name, value in zip(PIXEL_SIZE, size, strict=True):
            if name in group.entries:
                _set_long(data, found.order, offset, name, value)
        if not _readable(found, group.number(tiff.INTEROP_IFD, 0)):
            _drop(data, found.order, offset, [tiff.INTEROP_IFD])
    broken = {tag for tag in (tiff.EXIF_IFD, tiff.GPS_IFD) if not _readable(found, first.number(tag, 0))}
    left = _drop(data, found.order, first.offset, LAYOUT_TAGS | broken)
    struct.pack_into(f"{found.order}I", data, first.offset + 2 + 12 * left, 0)
    return bytes(data) if left else None


def exif_of_tiff(found: Tiff, page: Directory) -> bytes | None:
    """A TIFF picture's own tags as an EXIF block, in the file's byte order; values as stored."""
    order = found.order
    block = {"<": b"II*\0", ">": b"MM\0*"}[order] + bytes(4)
    entries = _portable(page.entries, LAYOUT_TAGS | COLOUR_TAGS)
    for pointer in (tiff.EXIF_IFD, tiff.GPS_IFD):
        offset = page.number(pointer, 0)
        entries.pop(pointer, None)
        if not _readable(found, offset):
            continue
        group = _portable(found.directory(offset).entries, {tiff.INTEROP_IFD, *PIXEL_SIZE})
        inner = found.directory(offset).number(tiff.INTEROP_IFD, 0)
        if _readable(found, inner):
            group[tiff.INTEROP_IFD] = Entry(tiff.LONG, 1, struct.pack(f"{order}I", len(block)))
            block += _even(tiff.directory_bytes(order, _portable(found.directory(inner).entries, set()), len(block)))
        if group:
            entries[pointer] = Entry(tiff.LONG, 1, struct.pack(f"{order}I", len(block)))
            block += _even(tiff.directory_bytes(order, group, len(block)))
    if not entries:
        return None
    start = struct.pack(f"{order}I", len(block))
    return block[:4] + start + block[8:] + tiff.directory_bytes(order, entries, len(block))


def colour_of_exif(block: bytes) -> Colour | None:
    """Adobe RGB where a camera says so in the way of DCF: colour space "uncalibrated", interoperability "R03"."""
    try:
        found = Tiff(Source("exif", io.BytesIO(block)))
        group = found.directory(found.directory(found.first).number(tiff.EXIF_IFD, 0))
        inner = found.directory(group.number(tiff.INTEROP_IFD, 0))
    except (ValueError, struct.error):
        return None
    index = inner.entries.get(1)
    if group.number(0xA001, 1) != 65_535 or index is None or not index.data.startswith(b"R03"):
        return None
    return Colour("its EXIF data", "Adobe RGB", ADOBE_RGB, 563 / 256)


def clean_xmp(xmp: bytes, size: tuple[int, int], notes: list[str]) -> bytes | None:
    """XMP for an upright picture of this size: without orientation, thumbnails, or the parts of a gain map."""
    if b"hdrgm:" in xmp or b"HDRGainMap" in xmp or b"Container:Directory" in xmp:
        notes.append("its HDR gain map was left out, and the XMP that describes it")
        return None
    xmp = re.sub(rb'(tiff:Orientation\s*=\s*["\'])[1-8]', rb"\g<1>1", xmp)
    xmp = re.sub(rb"(<tiff:Orientation>\s*)[1-8]", rb"\g<1>1", xmp)
    xmp = re.sub(rb"<(xmp|xap):Thumbnails>.*?</\1:Thumbnails>", b"", xmp, flags=re.DOTALL)
    xmp = re.sub(rb'\s*xmpNote:HasExtendedXMP\s*=\s*"[^"]*"', b"", xmp)
    for name, value in zip((rb"X", rb"Y"), size, strict=True):
        number = str(value).encode()
        xmp = re.sub(rb"(exif:Pixel" + name + rb'Dimension\s*=\s*["\'])\d+', rb"\g<1>" + number, xmp)
        xmp = re.sub(rb"(<exif:Pixel" + name + rb"Dimension>\s*)\d+", rb"\g<1>" + number, xmp)
    return xmp.rstrip(b"\0") or None


def raw_profile(info: Mapping[Any, Any], kind: str) -> bytes | None:
    """A block that a PNG file holds as hexadecimal text, in the way of ImageMagick."""
    text = info.get(f"Raw profile type {kind}")
    if not isinstance(text, str):
        return None
    try:
        return bytes.fromhex("".join(text.split()[2:])) or None
    except ValueError:
        return None


def iptc_of(info: Mapping[Any, Any]) -> bytes | None:
    """The IPTC record that Pillow found: in a JPEG file's Photoshop segment, or in a PNG text."""
    photoshop = info.get("photoshop")
    if isinstance(photoshop, Mapping) and isinstance(photoshop.get(0x0404), bytes):
        return photoshop[0x0404] or None
    data = raw_profile(info, "iptc")
    return _iptc_of_resources(data) if data and data.startswith(b"8BIM") else data


def iptc_of_tiff(page: Directory) -> bytes | None:
    """The IPTC record of a TIFF picture, from its own tag or from Photoshop's."""
    own, photoshop = page.entries.get(tiff.IPTC), page.entries.get(0x8649)
    if own is not None:
        return own.data.rstrip(b"\0") or None
    return None if photoshop is None else _iptc_of_resources(photoshop.data)


def texts_of(info: Mapping[Any, Any], kind: str | None) -> tuple[tuple[str, str], ...]:
    """A PNG file's texts and a JPEG file's comment, as (keyword, text)."""
    if kind == "PNG":
        texts = [(key, str(value)) for key, value in info.items() if isinstance(key, str) and isinstance(value, str)]
        return tuple(each for each in texts if not each[0].startswith(TEXTS_OF_BLOCKS))
    comment = info.get("comment")
    if not isinstance(comment, bytes) or not comment.strip(b"\0 "):
        return ()
    try:
        return (("Comment", comment.decode()),)
    except UnicodeDecodeError:
        return (("Comment", comment.decode("latin-1")),)


def with_jpeg_segments(jpeg: bytes, xmp: bytes | None, iptc: bytes | None, comment: bytes | None) -> bytes:
    """A JPEG file with these blocks behind its JFIF and EXIF segments."""
    added = b""
    if xmp:
        added += _segment(0xE1, XMP_SEGMENT + xmp)
    if iptc:
        record = b"8BIM\x04\x04\0\0" + struct.pack(">I", len(iptc)) + _even(iptc)
        added += _segment(0xED, IPTC_SEGMENT + record)
    if comment:
        added += _segment(0xFE, comment)
    position = 2
    while jpeg[position + 1] == 0xE0 or (jpeg[position + 1] == 0xE1 and jpeg[position + 4 : position + 10] == PREFIX):
        position += 2 + struct.unpack_from(">H", jpeg, position + 2)[0]
    return jpeg[:position] + added + jpeg[position:]


def with_png_chunks(
    png: bytes,
    icc: bytes | None,
    block: bytes | None,
    dpi: tuple[float, float] | None,
    texts: Iterable[tuple[str, str]],
) -> bytes:
    """A PNG file with these chunks behind its header; XMP comes as one of the texts."""
    added = b""
    if icc:
        added += chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc))
    if dpi:
        across, down = (round(value / 0.0254) for value in dpi)
        added += chunk(b"pHYs", struct.pack(">IIB", across, down, 1))
    for keyword, text in texts:
        key = keyword.encode("latin-1", "replace")[:79]
        try:
            if keyword.startswith("XML:"):
                raise UnicodeError
            added += chunk(b"tEXt", key + b"\0" + text.encode("latin-1"))
        except UnicodeError:
            added += chunk(b"iTXt", key + b"\0\0\0\0\0" + text.encode("utf-8", "replace"))
    if block:
        added += chunk(b"eXIf", block)
    position = len(PNG_SIGNATURE) + 25
    return png[:position] + added + png[position:]


def chunk(name: bytes, data: bytes) -> bytes:
    """A PNG chunk."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _portable(entries: Mapping[int, Entry], without: Iterable[int]) -> dict[int, Entry]:
    """Entries that an EXIF block may have: none of BigTIFF's types."""
    dropped = frozenset(without)
    return {tag: entry for tag, entry in entries.items() if tag not in dropped and entry.type < 16}


def _readable(found: Tiff, offset: int) -> bool:
    try:
        return offset > 0 and bool(found.directory(offset).entries)
    except (ValueError, struct.error):
        return False


def _blank_thumbnail(found: Tiff, first: Directory, data: bytearray) -> None:
    if not first.next or not _readable(found, first.next):
        return
    second = found.directory(first.next)
    starts = second.numbers(0x0201) or second.numbers(tiff.STRIPS)
    lengths = second.numbers(0x0202) or second.numbers(tiff.STRIP_BYTES)
    for start, length in zip(starts, lengths, strict=False):
        end = min(start + length, len(data))
        if 8 <= start < end:
            data[start:end] = bytes(end - start)
            if end == len(data):
                del data[start:]


def _rows(data: bytearray, order: str, offset: int) -> list[bytes]:
    """The entries of a directory, 12 bytes each."""
    count = struct.unpack_from(f"{order}H", data, offset)[0]
    return [bytes(data[offset + 2 + 12 * k : offset + 14 + 12 * k]) for k in range(count)]


def _drop(data: bytearray, order: str, offset: int, tags: Iterable[int]) -> int:
    """Take entries out of a directory in place. Returns how many are left."""
    unwanted = frozenset(tags)
    rows = _rows(data, order, offset)
    kept = [row for row in rows if struct.unpack(f"{order}H", row[:2])[0] not in unwanted]
    end = offset + 2 + 12 * len(rows)
    following = bytes(data[end : end + 4])
    whole = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + following
    data[offset : end + 4] = whole.ljust(end + len(following) - offset, b"\0")
    return len(kept)


def _set_long(data: bytearray, order: str, offset: int, tag: int, value: int) -> None:
    for index, row in enumerate(_rows(data, order, offset)):
        if struct.unpack(f"{order}H", row[:2])[0] == tag:
            struct.pack_into(f"{order}HHII", data, offset + 2 + 12 * index, tag, tiff.LONG, 1, value)


def _iptc_of_resources(data: bytes) -> bytes | None:
    """The IPTC record among Photoshop's image resources."""
    position = 0
    while data[position : position + 4] == b"8BIM" and position + 12 <= len(data):
        kind, name = struct.unpack_from(">HB", data, position + 4)
        position += 6 + (name + 2) // 2 * 2
        if position + 4 > len(data):
            return None
        length = struct.unpack_from(">I", data, position)[0]
        if kind == 0x0404:
            return data[position + 4 : position + 4 + length] or None
        position += 4 + length + length % 2
    return None


def _segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def _even(data: bytes) -> bytes:
    return data + bytes(len(data) % 2)

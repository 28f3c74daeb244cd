"""Read what containers declare beside their pixels: colour, depth, metadata blocks, and frames that are too large.

Pillow drops most of this, or looks only once memory has been given away. TIFF has a file of its own, tiff.py.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from openwu.errors import PictureError
from openwu.images.colour import Colour, from_h273, named, valid_chromaticities
from openwu.images.source import PNG_SIGNATURE, Source

MAX_HEADER = 64_000_000
"""Bytes of metadata that are read at most from one box or chunk."""


@dataclass
class Declared:
    """What a container says beside what Pillow reads of it."""

    colour: Colour | None = None
    """Colour that is declared without an ICC profile."""
    icc: bytes | None = None
    """An ICC profile that Pillow does not look for."""
    bits: int = 8
    """Bits per channel of colour, as far as known to be more than 8."""
    exif: bytes | None = None
    """The EXIF block as stored, where Pillow would write it anew."""
    lossless: bool = False
    """True for a lossless WebP file."""
    clear: tuple[int, ...] | None = None
    """A PNG's transparent colour, at full depth."""
    notes: list[str] = field(default_factory=list)


def declared(source: Source, max_pixels: int) -> Declared:
    """Read the declarations of a file of any container but TIFF. PictureError for what is refused."""
    head = source.at(0, 32)
    try:
        if head.startswith(PNG_SIGNATURE):
            return _png(source)
        if head[:6] in (b"GIF87a", b"GIF89a"):
            _check_gif(source, max_pixels)
        elif head[:4] == b"RIFF" and head[8:12] == b"WEBP":
            return Declared(lossless=_has_chunk(source, b"VP8L"))
        elif head[4:8] == b"ftyp":
            return _heif(source)
        elif head[4:8] == b"jP  ":
            return _jpeg_2000(source)
        elif head[:4] == b"\xff\x4f\xff\x51":
            _check_codestream(source.name, source.at(0, 256))
        elif head[:2] == b"BM":
            return _bmp(source)
        elif head[:1] == b"P" and head[1:2] in b"2356":
            return _netpbm(source.at(0, 1024))
        elif head[:2] == b"\xff\xd8":
            return _jpeg(source)
    except (struct.error, LookupError, ValueError):  # damaged: whoever decodes it says so
        pass
    return Declared()


def png_chunks(source: Source) -> Iterator[tuple[bytes, int, int]]:
    """(name, offset of its data, length) of every chunk of a PNG file."""
    position, end = len(PNG_SIGNATURE), source.size
    while position + 12 <= end:
        length, name = struct.unpack(">I4s", source.at(position, 8))
        yield name, position + 8, length
        position += 12 + length


def _png(source: Source) -> Declared:
    found: dict[bytes, bytes] = {}
    for name, offset, length in png_chunks(source):
        if name in (b"IHDR", b"cICP", b"gAMA", b"cHRM", b"sRGB", b"tRNS"):
            found.setdefault(name, source.at(offset, min(length, 1024)))
        elif name in (b"iCCP", b"IDAT"):
            found.setdefault(name, b"")
            if name == b"IDAT":
                break
    result = Declared()
    depth, kind = found[b"IHDR"][8], found[b"IHDR"][9]
    result.bits = depth if depth == 16 and kind != 0 else 8
    if b"tRNS" in found and kind in (0, 2):
        result.clear = struct.unpack(f">{len(found[b'tRNS']) // 2}H", found[b"tRNS"])
    if b"cICP" in found:
        primaries, transfer, _, full = found[b"cICP"][:4]
        result.colour = from_h273(primaries, transfer, "its cICP chunk", source.name)
        if not full:
            raise PictureError(
                f"{source.name}: its cICP chunk declares narrow-range video levels, which are not supported; "
                "convert it to full range first"
            )
    elif not found.keys() & {b"iCCP", b"sRGB"} and found.keys() & {b"gAMA", b"cHRM"}:
        result.colour = _gamma_and_chromaticities(found)
    return result


def _gamma_and_chromaticities(found: dict[bytes, bytes]) -> Colour | None:
    gamma = struct.unpack(">I", found[b"gAMA"])[0] / 100_000 if b"gAMA" in found else 0
    exponent = 1 / gamma if 0.1 <= gamma <= 10 else None
    names = [name for name in ("gAMA", "cHRM") if name.encode() in found]
    origin = f"its {' and '.join(names)} chunk{'s' * (len(names) > 1)}"
    if b"cHRM" in found:
        x, y, *others = (value / 100_000 for value in struct.unpack(">8I", found[b"cHRM"]))
        points = (x, y, others[0], others[1], others[2], others[3], others[4], others[5])
        if valid_chromaticities(points):
            return Colour(origin, named(points), points, exponent)
    return Colour(origin, gamma=exponent)


def _check_gif(source: Source, max_pixels: int) -> None:
    """Refuse frames that are too large: Pillow allocates every frame that it counts. Like Pillow, skip stray bytes."""
    flags = source.at(10, 1)[0]
    position, end = 13 + (3 << (flags & 7) + 1) * (flags >> 7), source.size
    while position < end:
        kind = source.at(position, 1)
        if kind == b"\x21":
            position += 2
        elif kind == b"\x2c":
            left, top, width, height, flags = struct.unpack("<4HB", source.at(position + 1, 9))
            if (left + width) * (top + height) > max_pixels:
                raise PictureError(
                    f"{source.name}: expected frames of at most {max_pixels / 1e6:g} megapixels, "
                    f"got {(left + width) * (top + height) / 1e6:.0f} ({width} x {height}); scale it down"
                )
            position += 11 + (3 << (flags & 7) + 1) * (flags >> 7)
        elif kind == b";":
            return
        else:
            position += 1
            continue
        while position < end and (length := source.at(position, 1)[0]):
            position += 1 + length
        position += 1


def _has_chunk(source: Source, wanted: bytes) -> bool:
    """Whether a RIFF file has such a chunk among its first."""
    position, end = 12, source.size
    while position + 8 <= end:
        name, length = struct.unpack("<4sI", source.at(position, 8))
        if name == wanted:
            return True
        position += 8 + length + length % 2
    return False


def _netpbm(head: bytes) -> Declared:
    """The third number of a header is the largest value; Pillow reads colour of more than 8 bits as 8."""
    numbers = re.sub(rb"#[^\n]*", b" ", head[2:]).split()
    peak = int(numbers[2])
    return Declared(bits=max(8, math.ceil(math.log2(peak + 1))) if head[1:2] in b"36" else 8)


def _bmp(source: Source) -> Declared:
    """A version 5 header may embed an ICC profile; the primaries that it may declare instead are rarely true."""
    size = struct.unpack("<I", source.at(14, 4))[0]
    if size >= 124:
        header = source.at(14, 124)
        offset, length = struct.unpack("<II", header[112:120])
        if header[56:60] == b"DEBM" and 128 <= length <= MAX_HEADER:  # "MBED", little-endian
            return Declared(icc=source.at(14 + offset, length))
    return Declared()


def _jpeg(source: Source) -> Declared:
    """What Pillow keeps of a JPEG file's segments suffices, but for XMP that goes on in others."""
    result, position = Declared(), 2
    while True:
        marker, length = struct.unpack(">HH", source.at(position, 4))
        if marker >> 4 != 0xFFE and marker not in (0xFFFE, 0xFFDB):
            return result
        if marker == 0xFFE1 and source.at(position + 4, 34) == b"http://ns.adobe.com/xmp/extension/":
            result.notes = ["the part of its XMP that is too long for one block was left out"]
        position += 2 + length


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(name, content) of the boxes in a box of the ISO base media format."""
    position = 0
    while position + 8 <= len(data):
        length, name, header = *struct.unpack_from(">I4s", data, position), 8
        if length == 1:
            length, header = struct.unpack_from(">Q", data, position + 8)[0], 16
        length = length or len(data) - position
        if length < header:
            return
        yield name, data[position + header : position + length]
        position += length


def _top_box(source: Source, wanted: bytes, most: int = MAX_HEADER) -> bytes:
    """The content, or `most` bytes of it, of the first top-level box of this name; empty where there is none."""
    position, end = 0, source.size
    while position + 8 <= end:
        length, name, header = *struct.unpack(">I4s", source.at(position, 8)), 8
        if length == 1:
            length, header = struct.unpack(">Q", source.at(position + 8, 8))[0], 16
        length = length or end - position
        if name == wanted:
            return source.at(position + header, min(length - header, most))
        if length < header:
            break
        position += length
    return b""


def _jpeg_2000(source: Source) -> Declared:
    """JP2's colour box: a profile, or a number for a colour space; Pillow knows sRGB, grey and YCC."""
    result, known = Declared(), {12, 16, 17, 18}
    _check_codestream(source.name, _top_box(source, b"jp2c", 256))
    for name, content in boxes(_top_box(source, b"jp2h")):
        if name == b"colr" and content[0] == 2:
            result.icc = content[3:]
        elif name == b"colr" and content[0] == 1:
            space = struct.unpack_from(">I", content, 3)[0]
            if space not in known:
                raise PictureError(
                    f"{source.name}: its colour box declares the colour space {space}, which is not supported; "
                    "convert it to sRGB first"
                )
    return result


def _check_codestream(name: str, head: bytes) -> None:
    """Refuse JPEG 2000 colour of more than 8 bits: Pillow rounds white beyond 255, to black."""
    count = struct.unpack_from(">H", head, 40)[0]
    bits = max((value & 127) + 1 for value in head[42 : 42 + 3 * count : 3])
    if count > 1 and bits > 8:
        raise PictureError(
            f"{name}: JPEG 2000 with {bits} bits per channel of colour is not supported; convert it to PNG or TIFF"
        )


def _heif(source: Source) -> Declared:
    """AVIF and HEIC: colour, depth and EXIF of the primary picture."""
    meta = _top_box(source, b"meta")[4:]
    top = dict(boxes(meta))
    wide = top[b"pitm"][0] > 0
    primary = struct.unpack_from(">I" if wide else ">H", top[b"pitm"], 4)[0]
    container = dict(boxes(top[b"iprp"]))
    properties = list(boxes(container[b"ipco"]))
    own = [
        properties[position - 1]
        for position in _associated(container[b"ipma"], primary)
        if 0 < position <= len(properties)
    ]
    result = Declared(exif=_heif_exif(source, top))
    profile = any(name == b"colr" and content[:4] in (b"prof", b"rICC") for name, content in own)
    for name, content in own:
        if name == b"colr" and content[:4] == b"nclx" and not profile:
            primaries, transfer = struct.unpack_from(">HH", content, 4)
            result.colour = from_h273(primaries, transfer, "its nclx box", source.name)
        elif name == b"pixi":
            result.bits = max(content[5 : 5 + content[4]], default=8)
        elif name == b"av1C" and content[2] & 0x40:
            result.bits = max(result.bits, 12 if content[2] & 0x20 else 10)
        elif name == b"hvcC":
            result.bits = max(result.bits, 8 + (content[17] & 7))
    if b"hdrgainmap" in meta or b"tmap" in meta:
        result.notes.append("its HDR gain map was left out")
    return result


def _associated(ipma: bytes, item: int) -> list[int]:
    """Numbers of the properties of an item, from 1."""
    wide, long = ipma[0] > 0, ipma[3] & 1
    count, position = struct.unpack_from(">I", ipma, 4)[0], 8
    for _ in range(count):
        number = struct.unpack_from(">I" if wide else ">H", ipma, position)[0]
        position += 4 if wide else 2
        length = ipma[position]
        position += 1
        if number == item:
            if long:
                return [value & 0x7FFF for value in struct.unpack_from(f">{length}H", ipma, position)]
            return [value & 0x7F for value in ipma[position : position + length]]
        position += length * (2 if long else 1)
    return []


def _heif_exif(source: Source, top: dict[bytes, bytes]) -> bytes | None:
    """The EXIF item's block, from its TIFF header on."""
    wide = top[b"iinf"][0] > 0
    for _, entry in boxes(top[b"iinf"][8 if wide else 6 :]):
        if entry[0] < 2:
            continue
        long = entry[0] > 2
        kind = entry[10:14] if long else entry[8:12]
        if kind == b"Exif":
            item = struct.unpack_from(">I" if long else ">H", entry, 4)[0]
            block = _item(source, top, item)
            start = 4 + struct.unpack_from(">I", block)[0] if block else 0
            return block[start:] or None
    return None


def _item(source: Source, top: dict[bytes, bytes], wanted: int) -> bytes:
    """An item's bytes, by the location box."""
    iloc = top[b"iloc"]
    version, sizes, more = iloc[0], iloc[4], iloc[5]
    offset_size, length_size, base_size, index_size = sizes >> 4, sizes & 15, more >> 4, (more & 15) * (version > 0)
    position = 6

    def number(size: int) -> int:
        nonlocal position
        position += size
        return int.from_bytes(iloc[position - size : position], "big")

    for _ in range(number(4 if version == 2 else 2)):
        item = number(4 if version == 2 else 2)
        method = number(2) & 15 if version else 0
        number(2)
        base = number(base_size)
        parts = []
        for _ in range(number(2)):
            number(index_size)
            parts.append((base + number(offset_size), number(length_size)))
        if item == wanted and method < 2 and sum(length for _, length in parts) < MAX_HEADER:
            inside = top.get(b"idat", b"")
            return b"".join(inside[at : at + n] if method else source.at(at, n) for at, n in parts)
    return b""

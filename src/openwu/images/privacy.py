"""Remove the location, or all metadata, from a photo."""

from __future__ import annotations

import io
import re
import struct
from dataclasses import replace

from openwu.images import tiff
from openwu.images.metadata import PREFIX
from openwu.images.photo import Photo
from openwu.images.source import Source
from openwu.images.tiff import Directory, Tiff

_PLACES = re.compile(rb"gps|location|latitude|longitude|geo[:_-]|photoshop:(city|state|country)", re.IGNORECASE)
_IPTC_PLACES = (26, 27, 90, 92, 95, 100, 101)
"""Datasets of record 2: content location, city, sub-location, province, country."""


def without_location(photo: Photo) -> Photo:
    """Return the photo without its GPS data; XMP packets and texts that speak of places are left out as a whole.

    Makers' own notes inside EXIF are left out with it: some hold a position, in forms that only their makers know.
    """
    return replace(
        photo,
        exif=_exif_without_location(photo.exif) if photo.exif else None,
        xmp=None if photo.xmp and _PLACES.search(photo.xmp) else photo.xmp,
        iptc=None if photo.iptc and _names_place(photo.iptc) else photo.iptc,
        texts=tuple(text for text in photo.texts if not _PLACES.search(" ".join(text).encode())),
    )


def without_metadata(photo: Photo) -> Photo:
    """Return the photo with its pixels, transparency and colour profile, and nothing else."""
    return replace(photo, exif=None, xmp=None, iptc=None, texts=(), dpi=None)


def _exif_without_location(exif: bytes) -> bytes | None:
    """Blank the GPS directory and the maker's notes in place, so that all other offsets stay; None where in doubt."""
    block = exif.removeprefix(PREFIX)
    data = bytearray(block)
    try:
        found = Tiff(Source("exif", io.BytesIO(block)))
        first = found.directory(found.first)
        gps = first.number(tiff.GPS_IFD, 0)
        if gps:
            _blank(data, block, found, found.directory(gps), range(0x10000))
        group = first.number(tiff.EXIF_IFD, 0)
        if group:
            _blank(data, block, found, found.directory(group), (MAKER_NOTE, USER_COMMENT))
    except (ValueError, struct.error):
        return None  # a damaged block may hold anything
    return PREFIX + bytes(data)


MAKER_NOTE, USER_COMMENT = 0x927C, 0x9286


def _blank(data: bytearray, block: bytes, found: Tiff, directory: Directory, tags: range | tuple[int, ...]) -> None:
    """Overwrite the values of these entries with zeros, wherever they lie."""
    offset, order = directory.offset, found.order
    count = struct.unpack_from(f"{order}H", block, offset)[0]
    for row in range(offset + 2, offset + 2 + 12 * count, 12):
        tag, kind, number = struct.unpack_from(f"{order}HHI", block, row)
        if tag not in tags:
            continue
        length = number * _SIZES.get(kind, 1)
        start = row + 8 if length <= 4 else struct.unpack_from(f"{order}I", block, row + 8)[0]
        end = min(start + length, len(data))
        if start < end:
            data[start:end] = bytes(end - start)


_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
"""Bytes of a value by TIFF's type."""


def _names_place(iptc: bytes) -> bool:
    return any(b"\x1c\x02" + bytes([number]) in iptc for number in _IPTC_PLACES)

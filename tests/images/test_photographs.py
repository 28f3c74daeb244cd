"""What files hold beside plain pixels: raw data, metadata as stored, declared colour, odd TIFF layouts, traps."""

from __future__ import annotations

import errno
import io
import os
import resource
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms, PngImagePlugin, features

from openwu.errors import PictureError
from openwu.images import Photo, check_output, check_picture, encode_picture, read_picture, write_picture
from openwu.images.colour import ADOBE_RGB, matrix_profile
from openwu.images.read import READABLE
from openwu.images.source import RAW_SUFFIXES, Source
from openwu.images.tiff import EXIF_IFD, GPS_IFD, INTEROP_IFD, Tiff
from openwu.images.tiff_pixels import without_lines
from openwu.images.write import SUFFIXES

WRITTEN = [".jpg", ".png", ".webp", ".tif"] + [".avif"] * features.check("avif")
TEXT = "Zoë Müller 王小明".encode() + b"\0"


def noise(height: int, width: int, channels: int, top: int = 255) -> NDArray[Any]:
    values = np.random.default_rng(3).integers(0, top, (height, width, channels), endpoint=True)
    return values.astype(np.uint8 if top <= 255 else np.uint16)


def refused(picture: Any, words: str) -> None:
    for read in (read_picture, check_picture):
        with pytest.raises(PictureError, match=words):
            read(picture)


# TIFF structure


def ifd(entries: dict[int, tuple[int, Any]], offset: int, order: str = "<") -> bytes:
    """A directory at this offset; entries: tag -> (type, number, several numbers, or bytes)."""
    behind, values, table = offset + 6 + 12 * len(entries), b"", struct.pack(f"{order}H", len(entries))
    for tag, (kind, value) in sorted(entries.items()):
        several = value if isinstance(value, tuple | bytes) else (value,)
        letter = {1: "B", 2: "B", 3: "H", 4: "I", 7: "B"}[kind]
        data = value if isinstance(value, bytes) else struct.pack(f"{order}{len(several)}{letter}", *several)
        table += struct.pack(f"{order}HHI", tag, kind, len(several))
        if len(data) <= 4:
            table += data.ljust(4, b"\0")
        else:
            table += struct.pack(f"{order}I", behind + len(values))
            values += data + bytes(len(data) % 2)
    return table + bytes(4) + values


def tiff(values: NDArray[Any], bits: int, photometric: int, planar: bool = False, **more: tuple[int, Any]) -> bytes:
    """An uncompressed TIFF of samples `[h, w, c]` with so many bits each; `more`: t and a tag in hexadecimal."""
    height, width, count = values.shape
    planes = [values[:, :, k : k + 1] for k in range(count)] if planar else [values]
    strips = []
    for plane in planes:
        digits = np.unpackbits(plane.astype(">u2")[..., None].view(np.uint8), axis=-1)[..., 16 - bits :]
        rows = np.packbits(digits.reshape(height, -1), axis=1)
        strips.append((rows.view(">u2").astype("<u2") if bits == 16 else rows).tobytes())
    offsets = tuple(8 + sum(map(len, strips[:k])) for k in range(len(strips)))
    body = b"".join(strips)
    body += bytes(len(body) % 2)
    entries = {
        0x100: (3, width),
        0x101: (3, height),
        0x102: (3, (bits,) * count),
        0x103: (3, 1),
        0x106: (3, photometric),
    }
    entries |= {0x111: (4, offsets), 0x115: (3, count), 0x116: (3, height), 0x11C: (3, 2 if planar else 1)}
    entries |= {0x117: (4, tuple(map(len, strips)))}
    entries |= {int(name[1:], 16): entry for name, entry in more.items()}
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + ifd(entries, 8 + len(body))


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8, 10, 12, 14, 16])
@pytest.mark.parametrize("photometric", [0, 1], ids=["white is zero", "black is zero"])
def test_grey_tiff_of_any_depth_fills_the_range(bits: int, photometric: int) -> None:
    values = noise(9, 13, 1, 2**bits - 1)
    read = read_picture(tiff(values, bits, photometric))
    top = np.iinfo(read.pixels.dtype).max
    expected = np.rint(values.astype(np.float64) * top / (2**bits - 1))
    assert np.array_equal(read.pixels[:, :, :1], expected if photometric else top - expected)
    assert (read.grey, read.notes, top) == (True, (), 255 if bits <= 8 else 65535)


@pytest.mark.parametrize("planar", [False, True], ids=["chunky", "planar"])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_rgb_tiff_of_any_layout(bits: int, planar: bool) -> None:
    values = noise(7, 5, 3, 2**bits - 1)
    read = read_picture(tiff(values, bits, 2, planar))
    top = np.iinfo(read.pixels.dtype).max
    assert np.array_equal(read.pixels, np.rint(values.astype(np.float64) * top / (2**bits - 1)))


def test_planar_cmyk_is_the_same_as_chunky() -> None:
    values = noise(6, 8, 4)
    expected = np.array(Image.fromarray(values, mode="CMYK").convert("RGB"))
    for planar in (False, True):
        read = read_picture(tiff(values, 8, 5, planar))
        assert np.array_equal(read.pixels, expected)
        assert read.mode == "CMYK"


def test_extra_channels_are_left_out_and_noted() -> None:
    values = noise(6, 8, 6)
    read = read_picture(tiff(values, 8, 2, t152=(3, (2, 0, 0))))
    assert np.array_equal(read.pixels, values[:, :, :3])
    assert np.array_equal(read.alpha, values[:, :, 3])  # type: ignore[arg-type]
    assert read.notes == ("2 extra channels beside colour and transparency were left out",)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (tiff(noise(3, 3, 1, 65535), 16, 1, t153=(3, 2)), "expected unsigned pixels, got signed ones"),
        (tiff(noise(3, 3, 1, 65535), 16, 1, t153=(3, 3)), "floating-point pixels have no agreed white"),
        (tiff(noise(3, 3, 3), 8, 9), r"this kind of TIFF is not supported \(colour model 9"),
        (tiff(noise(3, 3, 1), 8, 1, t142=(4, 65536), t143=(4, 65536), t144=(4, 8)), "tiles are of 4295 megapixels"),
        (tiff(noise(3, 3, 1), 8, 1, t111=(4, 400)), "its pixels end behind the file"),
        (tiff(noise(3, 3, 3), 8, 2, t103=(3, 50001)), "TIFF with the compression 50001 is not supported"),
    ],
    ids=["signed", "floats", "ICC Lab", "tile bomb", "cut", "WebP inside"],
)
def test_tiff_that_would_be_read_wrongly_is_refused(file: bytes, words: str) -> None:
    with pytest.raises(PictureError, match=words):
        read_picture(file)


def with_second(first: dict[int, tuple[int, Any]], second: dict[int, tuple[int, Any]], *, below: bool) -> bytes:
    """Two pictures in one TIFF, the second behind or below the first; grey 4 x 2 and 8 x 6 pixels."""
    small, large = bytes(range(8)), bytes(range(100, 148))
    base = {0x102: (3, 8), 0x103: (3, 1), 0x106: (3, 1), 0x115: (3, 1)}
    two = base | {0x100: (3, 8), 0x101: (3, 6), 0x111: (4, 16), 0x116: (3, 6), 0x117: (4, 48)} | second
    directory = ifd(two, 64)
    start = 64 + len(directory)
    one = base | {0x100: (3, 4), 0x101: (3, 2), 0x111: (4, 8), 0x116: (3, 2), 0x117: (4, 8)} | first
    whole = bytearray(b"II*\0" + struct.pack("<I", start) + small + large + directory)
    if below:
        return bytes(whole) + ifd(one | {0x14A: (4, 64)}, start)
    page = bytearray(ifd(one, start))
    struct.pack_into("<I", page, 2 + 12 * len(one), 64)
    return bytes(whole + page)


@pytest.mark.parametrize("below", [False, True], ids=["next", "sub-IFD"])
def test_the_photograph_is_read_and_not_its_thumbnail(below: bool) -> None:
    file = with_second({0xFE: (4, 1)}, {}, below=below)
    assert check_picture(file).size == read_picture(file).size == (8, 6)
    assert read_picture(file).pixels[0, 0, 0] == 100
    if not below:
        refused(with_second({}, {}, below=False), "expected one picture, got 2 pages; save the one to edit as PNG")
        assert read_picture(with_second({}, {0xFE: (4, 1)}, below=False)).size == (4, 2)


# Camera raw files


@pytest.mark.parametrize(
    "more", [{0x106: (3, 32803)}, {0x106: (3, 34892)}, {0x103: (3, 34713)}], ids=["mosaic", "linear", "Nikon's codec"]
)
@pytest.mark.parametrize("below", [False, True])
def test_raw_files_are_refused_by_their_tags(more: dict[int, tuple[int, Any]], below: bool) -> None:
    refused(with_second({0xFE: (4, 1)}, more, below=below), "got a camera raw file .* export it as TIFF or JPEG")


def test_raw_files_are_refused_by_name_and_by_signature(tmp_path: Path) -> None:
    refused(tiff(noise(3, 3, 1), 8, 1, tC612=(1, b"\x01\x04\0\0")), r"camera raw file \(DNG\)")
    for name in ("a.dng", "a.NEF", "a.arw", "a.cr2"):
        (tmp_path / name).write_bytes(tiff(noise(3, 3, 1), 8, 1))
        refused(tmp_path / name, rf"{name}: expected a developed photograph, got a camera raw file")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.arw", "JPEG")  # only the name is a raw file's
    assert read_picture(tmp_path / "b.arw").size == (4, 4)
    for head in (
        b"IIU\0",
        b"II*\0\x10\0\0\0CR\x02\0",
        b"\0\0\0\x18ftypcrx ",
        b"FUJIFILMCCD-RAW 0201",
        b"IIRS\x08\0\0\0",
    ):
        refused(head + bytes(64), "camera raw file")


# EXIF, XMP, IPTC, texts


def exif_block(order: str, thumbnail: bytes = b"") -> bytes:
    """Artist outside ASCII, orientation 6, an Exif directory with sizes, a maker note with an offset, and "R98"."""
    inner = ifd({1: (2, b"R98\0")}, 400, order)
    maker = b"MAKER" + struct.pack(f"{order}I", 345) + bytes(range(7))
    exif = ifd({0xA002: (4, 64), 0xA003: (4, 48), 0x927C: (7, maker), INTEROP_IFD: (4, 400)}, 200, order)
    gps = ifd({1: (2, b"N\0"), 29: (2, b"2024:01:02\0")}, 300, order)
    first = {0x112: (3, 6), 0x13B: (2, TEXT), EXIF_IFD: (4, 200), GPS_IFD: (4, 300), 0x100: (3, 64)}
    block = bytearray(450)
    start = bytearray(ifd(first, 8, order))
    block[:8] = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8)
    if thumbnail:
        struct.pack_into(f"{order}I", start, 2 + 12 * len(first), 420)
        block[420:450] = ifd({0x201: (4, 450), 0x202: (4, len(thumbnail))}, 420, order)
        block += thumbnail
    block[8 : 8 + len(start)] = start
    for offset, part in ((200, exif), (300, gps), (400, inner)):
        block[offset : offset + len(part)] = part if offset < 400 else part[:20]
    return bytes(block)


def block_in(path: Path) -> bytes:
    """The EXIF block of a file, found by the note that stands in it: TIFF files begin with it."""
    data = path.read_bytes()
    note = data.index(b"MAKER")
    heads = [place for mark in (b"II*\0", b"MM\0*") if (place := data.rfind(mark, 0, note)) >= 0]
    return data[max(heads) :]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("target", WRITTEN)
def test_exif_is_patched_and_not_written_anew(tmp_path: Path, target: str, order: str) -> None:
    block = exif_block(order, b"\xff\xd8 the old picture")
    Image.fromarray(noise(48, 64, 3)).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + block)
    read = read_picture(tmp_path / "a.jpg")
    assert (read.size, read.notes) == ((48, 64), ())
    assert write_picture(read, tmp_path / f"b{target}") == ()
    kept = block_in(tmp_path / f"b{target}")
    assert kept.index(b"MAKER") == block.index(b"MAKER")  # no offset changes
    found = Tiff(Source("exif", io.BytesIO(kept)))
    first = found.directory(found.first)
    assert first.entries[0x13B].data == TEXT
    assert first.number(0x112, 1) == 1
    assert first.next == 0
    assert b"the old picture" not in (tmp_path / f"b{target}").read_bytes()
    exif, gps = (found.directory(first.number(tag, 0)) for tag in (EXIF_IFD, GPS_IFD))
    assert exif.entries[0x927C].data == block[block.index(b"MAKER") :][:16]
    assert (exif.number(0xA002, 0), exif.number(0xA003, 0)) == (48, 64)
    assert gps.entries[29].data == b"2024:01:02\0"
    assert found.directory(exif.number(INTEROP_IFD, 0)).entries[1].data == b"R98\0"
    again = read_picture(tmp_path / f"b{target}")
    assert again.size == read.size
    assert TEXT in (again.exif or b"")
    if target != ".tif":
        assert again.exif == read.exif


def test_directories_without_entries_and_pointers_into_nothing_are_taken_out(tmp_path: Path) -> None:
    block = bytearray(exif_block("<"))
    block[300:302] = b"\0\0"  # a GPS directory of no entries
    block[400:402] = b"\xff\xff"  # an interoperability directory that is none
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + bytes(block))
    write_picture(read_picture(tmp_path / "a.jpg"), tmp_path / "b.tif")
    found = Tiff(Source("b.tif", io.BytesIO((tmp_path / "b.tif").read_bytes())))
    first = found.directory(found.first)
    assert GPS_IFD not in first.entries
    assert INTEROP_IFD not in found.directory(first.number(EXIF_IFD, 0)).entries


@pytest.mark.parametrize("big", [False, True])
def test_tags_of_a_tiff_file_are_kept_as_stored(tmp_path: Path, big: bool) -> None:
    tifffile = pytest.importorskip("tifffile")
    tags = [(0x13B, 2, len(TEXT), TEXT, True)]
    tifffile.imwrite(tmp_path / "a.tif", noise(5, 4, 3), photometric="rgb", bigtiff=big, extratags=tags, metadata=None)
    read = read_picture(tmp_path / "a.tif")
    write_picture(read, tmp_path / "b.jpg")
    assert TEXT in (tmp_path / "b.jpg").read_bytes()
    assert read.notes == ()


XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6" exif:PixelXDimension="64" '
    b'xmp:Rating="5"><xmp:Thumbnails>old</xmp:Thumbnails><dc:subject>holiday \xe7\x8e\x8b</dc:subject>'
    b"</rdf:Description></x:xmpmeta>"
)
IPTC = b"\x1c\x02\x19\x00\x07holiday\x1c\x02\x78\x00\x04Rome"


def jpeg_with_everything(path: Path, xmp: bytes = XMP) -> None:
    buffer = io.BytesIO()
    Image.fromarray(noise(48, 64, 3)).save(buffer, "JPEG", exif=b"Exif\0\0" + exif_block("<"), comment="hi 王")
    data, resources = buffer.getvalue(), b"8BIM\x04\x04\0\0" + struct.pack(">I", len(IPTC)) + IPTC
    added = b""
    for marker, body in ((0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp), (0xED, b"Photoshop 3.0\0" + resources)):
        added += struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body
    path.write_bytes(data[:2] + added + data[2:])


@pytest.mark.parametrize("target", WRITTEN)
def test_xmp_iptc_and_comments_are_kept_or_noted(tmp_path: Path, target: str) -> None:
    jpeg_with_everything(tmp_path / "a.jpg")
    read = read_picture(tmp_path / "a.jpg")
    notes = write_picture(read, tmp_path / f"b{target}")
    assert notes == {
        ".jpg": (),
        ".png": ("its IPTC data was left out; to keep it: use .jpg or .tif",),
        ".tif": ("its texts were left out (Comment); to keep them: use .png",),
    }.get(
        target,
        (
            "its IPTC data was left out; to keep it: use .jpg or .tif",
            "its texts were left out (Comment); to keep them: use .png",
        ),
    )
    back = read_picture(tmp_path / f"b{target}")
    for part in (b'tiff:Orientation="1"', b'exif:PixelXDimension="48"', b'xmp:Rating="5"', "holiday 王".encode()):
        assert part in (back.xmp or b"")
    assert b"Thumbnails" not in (back.xmp or b"")
    assert back.iptc == (IPTC if target in (".jpg", ".tif") else None)
    assert back.texts == ((("Comment", "hi 王"),) if target in (".jpg", ".png") else ())


def test_texts_of_a_png_file_survive(tmp_path: Path) -> None:
    texts = PngImagePlugin.PngInfo()
    texts.add_text("parameters", "a cat, 30 steps")
    texts.add_itxt("Title", "王")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=texts)
    read = read_picture(tmp_path / "a.png")
    assert write_picture(read, tmp_path / "b.png") == ()
    with Image.open(tmp_path / "b.png") as back:
        assert (back.info["parameters"], back.info["Title"]) == ("a cat, 30 steps", "王")
    assert "parameters, Title" in write_picture(read, tmp_path / "b.jpg")[0]


def test_xmp_of_a_gain_map_goes_with_the_gain_map(tmp_path: Path) -> None:
    jpeg_with_everything(tmp_path / "a.jpg", XMP.replace(b"xmp:Rating", b'hdrgm:Version="1.0" xmp:Rating'))
    read = read_picture(tmp_path / "a.jpg")
    assert read.xmp is None
    assert read.notes == ("its HDR gain map was left out, and the XMP that describes it",)


@pytest.mark.parametrize("part", ["icc", "exif"])
def test_blocks_over_a_megabyte_are_read_back_from_png(tmp_path: Path, part: str) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    long = (len(profile) + 1_200_000).to_bytes(4, "big") + profile[4:] + bytes(1_200_000)
    if part == "icc":
        photo = Photo(noise(4, 4, 3), icc=long)
        words = ("its colour profile is longer than 1 MB: programs built on Pillow refuse such a PNG; use .tif",)
    else:
        photo, words = Photo(noise(4, 4, 3), exif=b"Exif\0\0" + exif_block("<") + bytes(1_200_000)), ()
    limit = PngImagePlugin.MAX_TEXT_CHUNK
    assert write_picture(photo, tmp_path / "a.png") == words
    back = read_picture(tmp_path / "a.png")
    assert back.icc == photo.icc
    assert back.exif is None or back.exif[-1_200_000:] == bytes(1_200_000)
    assert limit == PngImagePlugin.MAX_TEXT_CHUNK


# Colour without a profile


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(extra: bytes, kind: int = 2, depth: int = 8, value: bytes = bytes((55, 55, 55))) -> bytes:
    header = struct.pack(">IIBBBBB", 8, 8, depth, kind, 0, 0, 0)
    pixels = zlib.compress((b"\0" + value * 8) * 8)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


P3 = struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
SRGB = struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
PLAIN_GAMMA, LINEAR = chunk(b"gAMA", struct.pack(">I", 45455)), chunk(b"gAMA", struct.pack(">I", 100_000))


def to_srgb(photo: Photo) -> NDArray[np.uint8]:
    """The first pixel as a colour-managed viewer shows it."""
    image = Image.fromarray(photo.eight_bit().pixels)
    if photo.icc:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(photo.icc))
        image = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"))  # type: ignore[assignment]
    return np.asarray(image)[0, 0]


def test_linear_light_gets_the_srgb_curve_at_the_depth_of_the_file() -> None:
    read = read_picture(png(LINEAR))
    assert read.pixels[0, 0].tolist() == [128, 128, 128]
    assert read.notes == ("converted from gamma 1 to sRGB by its gAMA chunk",)
    deep = read_picture(png(LINEAR, depth=16, value=struct.pack(">3H", 1000, 20000, 65535)))
    assert np.abs(deep.pixels[0, 0].astype(int) - [8498, 38561, 65535]).max() <= 2
    grey = read_picture(png(LINEAR, kind=0, value=b"\x37"))
    assert (grey.grey, grey.pixels[0, 0, 0], grey.icc) == (True, 128, None)


def test_chromaticities_become_a_profile_with_the_pixels_untouched(tmp_path: Path) -> None:
    read = read_picture(png(PLAIN_GAMMA + chunk(b"cHRM", P3), value=bytes((200, 60, 60))))
    assert read.pixels[0, 0].tolist() == [200, 60, 60]
    assert read.notes == ("its gAMA and cHRM chunks (Display P3 colours) is kept as an ICC profile",)
    # Display P3 (200, 60, 60) of gamma 2.2 is (219, 37, 49) in sRGB.
    assert np.abs(to_srgb(read).astype(int) - [219, 37, 49]).max() <= 1
    write_picture(read, tmp_path / "a.jpg")
    assert read_picture(tmp_path / "a.jpg").icc == read.icc


def test_cicp_goes_before_all_others() -> None:
    extra = chunk(b"cICP", bytes([12, 13, 0, 1])) + chunk(b"sRGB", b"\0") + LINEAR
    assert read_picture(png(extra)).notes == ("its cICP chunk (Display P3 colours) is kept as an ICC profile",)
    for curve, name in ((16, "PQ"), (18, "HLG")):
        refused(
            png(chunk(b"cICP", bytes([9, curve, 0, 1]))), rf"got HDR \({name}, by its cICP chunk\); convert it to SDR"
        )
    refused(png(chunk(b"cICP", bytes([1, 13, 0, 0]))), "narrow-range video levels")
    refused(png(chunk(b"cICP", bytes([1, 9, 0, 1]))), "transfer characteristics 9, which are not supported")


@pytest.mark.parametrize(
    "extra",
    [
        b"",
        PLAIN_GAMMA,
        PLAIN_GAMMA + chunk(b"cHRM", SRGB),
        chunk(b"sRGB", b"\0") + LINEAR,
        chunk(b"cICP", bytes([1, 13, 0, 1])),
        chunk(b"cHRM", bytes(32)),
    ],
    ids=["nothing", "gamma 2.2", "sRGB's primaries", "sRGB chunk", "cICP", "broken"],
)
def test_what_is_srgb_stays_without_a_word(extra: bytes) -> None:
    read = read_picture(png(extra))
    assert (read.icc, read.notes, read.pixels[0, 0, 0]) == (None, (), 55)


@pytest.mark.parametrize("suffix", [".avif", ".heic"])
def test_colour_of_avif_and_heic_without_a_profile(tmp_path: Path, suffix: str) -> None:
    """The encoders' colour box, patched to declare other colours."""
    if suffix == ".avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    if suffix == ".heic":
        pytest.importorskip("pillow_heif").register_heif_opener()
    options: dict[str, Any] = {} if suffix == ".avif" else {"color_primaries": 1, "transfer_characteristics": 13}
    Image.new("RGB", (64, 64), (200, 60, 60)).save(tmp_path / f"a{suffix}", **options)
    data = (tmp_path / f"a{suffix}").read_bytes()
    place = data.index(b"colrnclx") + 8

    def declaring(primaries: int, transfer: int) -> bytes:
        return data[:place] + struct.pack(">HH", primaries, transfer) + data[place + 4 :]

    assert read_picture(data).icc is None
    read = read_picture(declaring(12, 13))
    assert read.notes == ("its nclx box (Display P3 colours) is kept as an ICC profile",)
    assert (to_srgb(read)[0] - read.pixels[0, 0, 0]) > 10
    refused(declaring(9, 16), r"got HDR \(PQ, by its nclx box\)")
    with Image.open(io.BytesIO(declaring(12, 13))) as opened:
        again = read_picture(opened)
    assert (again.icc == read.icc) == (suffix == ".heic")  # Pillow itself does not report AVIF's


def test_adobe_rgb_of_cameras_becomes_a_profile(tmp_path: Path) -> None:
    block = (
        exif_block("<")
        .replace(b"R98\0", b"R03\0")
        .replace(struct.pack("<HH", 0xA002, 4), struct.pack("<HH", 0xA001, 4))
    )
    block = block.replace(struct.pack("<HHII", 0xA001, 4, 1, 64), struct.pack("<HHII", 0xA001, 4, 1, 65535))
    Image.new("RGB", (8, 8), (200, 60, 60)).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + block, quality=100)
    read = read_picture(tmp_path / "a.jpg")
    assert read.notes == ("its EXIF data (Adobe RGB colours) is kept as an ICC profile",)
    assert read.icc == matrix_profile("Adobe RGB", ADOBE_RGB, 563 / 256)
    assert np.abs(to_srgb(read).astype(int) - [231, 58, 59]).max() <= 4


def test_a_profile_for_other_pixels_is_left_out_and_noted() -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    image = Image.new("RGB", (4, 4))
    image.info["icc_profile"] = lab
    read = read_picture(image)
    assert (read.icc, read.notes) == (None, ("its Lab profile does not fit its pixels and was left out",))


def test_profile_of_a_bmp_file() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    header = struct.pack("<IiiHHIIiiII", 124, 2, 2, 1, 24, 0, 16, 0, 0, 0, 0) + bytes(16) + b"DEBM" + bytes(48)
    header += struct.pack("<IIII", 0, 124 + 16, len(profile), 0)
    data = b"BM" + struct.pack("<IHHI", 14 + 140 + len(profile), 0, 0, 14 + 124) + header + bytes(16) + profile
    assert read_picture(data).icc == profile


def test_profile_of_a_jpeg_2000_file(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(noise(16, 16, 3)).save(tmp_path / "a.jp2")
    data = (tmp_path / "a.jp2").read_bytes()
    header, box = data.index(b"jp2h"), data.index(b"colr")
    length = struct.unpack(">I", data[box - 4 : box])[0]
    assert read_picture(data).icc is None

    def declaring(content: bytes) -> bytes:
        whole = struct.unpack(">I", data[header - 4 : header])[0] + 8 + len(content) - length
        colour = struct.pack(">I", 8 + len(content)) + b"colr" + content
        return (
            data[: header - 4] + struct.pack(">I", whole) + data[header : box - 4] + colour + data[box - 4 + length :]
        )

    assert read_picture(declaring(b"\x02\0\0" + profile)).icc == profile
    refused(declaring(b"\x01\0\0" + struct.pack(">I", 21)), "declares the colour space 21, which is not supported")


@pytest.mark.parametrize("boxed", [True, False], ids=["jp2", "codestream"])
def test_deep_colour_of_jpeg_2000_is_refused(tmp_path: Path, boxed: bool) -> None:
    """Pillow would make white black; the file has 8 bits and says 16, which its header alone is read for."""
    Image.fromarray(noise(16, 16, 3)).save(tmp_path / "a.jp2", no_jp2=not boxed)
    data = bytearray((tmp_path / "a.jp2").read_bytes())
    assert read_picture(bytes(data)).size == (16, 16)
    place = data.index(b"\xff\x4f\xff\x51") + 42
    data[place : place + 9 : 3] = bytes([15] * 3)
    refused(bytes(data), "JPEG 2000 with 16 bits per channel of colour is not supported; convert it to PNG or TIFF")


# Traps, messages, formats


GIF_BOMB = (
    b"GIF89a" + struct.pack("<HHBBB", 10, 10, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff" + b"!\xf9\x04\x08\0\0\0\0"
    b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x02\x44\x01\0;"
)


def test_a_gif_with_a_frame_larger_than_its_screen_costs_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(GIF_BOMB, r"expected frames of at most 100 megapixels, got 4295 \(65535 x 65535\); scale it down")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000 * (
        1024 if sys.platform == "darwin" else 1
    )


def test_messages_blame_what_is_to_blame(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bits = b"BM" + struct.pack("<IHHI", 134, 0, 0, 70) + struct.pack("<IiiHHIIiiII", 56, 4, 4, 1, 16, 3, 32, 0, 0, 0, 0)
    refused(bits + struct.pack("<4I", 0xF00, 0xF0, 0xF, 0xF000) + bytes(64), "is of a kind that is not supported")
    refused(b"\xff\xd8\xff\xe0\0\x10JFIF\0\1", "the picture is damaged or cut short")
    Image.fromarray(noise(64, 64, 3)).save(tmp_path / "a.tif", compression="tiff_lzw")
    data = bytearray((tmp_path / "a.tif").read_bytes())
    data[2000:6000] = b"\xff" * 4000
    with pytest.raises(PictureError, match="damaged or cut short") as caught:
        read_picture(bytes(data))
    assert "\n" not in str(caught.value)
    assert "disk" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_only_lines_of_libtiff_are_taken_out_of_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    with without_lines():
        os.write(2, b"LZWDecode: Not enough data.\nmine\ntempfile.tif: Using code not yet in table.\n")
    assert capfd.readouterr().err == "mine\n"


def test_deep_colour_that_pillow_narrows_is_noted() -> None:
    read = read_picture(b"P6 # a comment\n4 4\n65535\n" + bytes(96))
    assert read.notes == ("16 bits per channel are read as 8",)


@pytest.mark.parametrize("lossless", [True, False])
def test_lossless_webp_stays_lossless(tmp_path: Path, lossless: bool) -> None:
    Image.fromarray(noise(32, 32, 3)).save(tmp_path / "a.webp", lossless=lossless)
    read = read_picture(tmp_path / "a.webp")
    assert read.lossless is lossless
    write_picture(read, tmp_path / "b.webp")
    assert np.array_equal(read_picture(tmp_path / "b.webp").pixels, read.pixels) is lossless


def test_16_bit_colour_needs_no_extra(tmp_path: Path) -> None:
    for count in (1, 2, 3, 4):
        read = read_picture(noise(9, 7, count, 65535))
        for suffix in (".png", ".tif"):
            assert write_picture(read, tmp_path / f"a{suffix}") == ()
            back = read_picture(tmp_path / f"a{suffix}")
            assert np.array_equal(back.pixels, read.pixels)
            assert (back.grey, back.pixels.dtype) == (count < 3, np.uint16)
            assert (back.alpha is None) == (count % 2 == 1)
            if back.alpha is not None:
                assert np.array_equal(back.alpha, read.alpha)  # type: ignore[arg-type]


def test_interlaced_16_bit_png(tmp_path: Path) -> None:
    """Seven passes by hand: Pillow writes none."""
    values, parts = noise(11, 13, 3, 65535), b""
    for top, left, down, across in (
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    ):
        part = values[top::down, left::across]
        parts += b"".join(b"\0" + row.astype(">u2").tobytes() for row in part) if part.size else b""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 13, 11, 16, 2, 0, 0, 1))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(parts)) + chunk(b"IEND", b"")
    assert np.array_equal(read_picture(data).pixels, values)


def test_names_that_the_system_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PictureError, match="cannot be written: File name too long; choose another name"):
        check_output(tmp_path / f"{'y' * 260}.png")

    def denied(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "stat", denied)
    with pytest.raises(PictureError, match="cannot be written: Permission denied; choose another name"):
        check_output(tmp_path / "a.png")


WRITE_AND_WAIT = """
import os, sys, time
import numpy as np
from openwu.images import Photo, write_picture
os.fsync = lambda _: (print("writing", flush=True), [time.sleep(0.05) for _ in range(1200)])
write_picture(Photo(np.zeros((9, 9, 3), np.uint8)), sys.argv[1])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_a_process_that_is_told_to_end_leaves_no_half_file(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITE_AND_WAIT, str(tmp_path / "a.png")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        assert os.listdir(tmp_path)  # noqa: PTH208
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM
    assert time.monotonic() - start < 30
    assert not list(tmp_path.iterdir())


# Grey, and pictures from memory


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_neutral_makes_an_edit_grey_again_at_its_depth(tmp_path: Path, dtype: Any) -> None:
    top = np.iinfo(dtype).max
    grey = read_picture(noise(16, 20, 1, top))
    assert np.array_equal(grey.neutral().pixels, grey.pixels)
    tinted = grey.pixels.copy()
    tinted[:, :, 2] //= 2
    edited = grey.with_pixels(tinted)
    assert not edited.stayed_grey
    neutral = edited.neutral()
    expected = np.rint(tinted.astype(np.float64) @ (0.2126, 0.7152, 0.0722))
    assert np.array_equal(neutral.pixels[:, :, 1], expected)
    for suffix in (".png", ".tif"):
        write_picture(neutral, tmp_path / f"a{suffix}")
        with Image.open(tmp_path / f"a{suffix}") as image:
            assert image.mode == ("L" if top == 255 else "I;16")
            assert np.array_equal(np.asarray(image), expected)
    assert Photo(noise(4, 4, 3)).neutral().stayed_grey  # colour made black and white is one channel, too


def test_arrays_and_tensors() -> None:
    torch = pytest.importorskip("torch")
    colour = noise(5, 7, 3)
    assert np.array_equal(read_picture(colour).pixels, colour)
    assert read_picture(colour[:, :, 0]).grey
    floats = read_picture(colour / 255)
    assert floats.pixels.dtype == np.uint16
    assert np.array_equal(floats.pixels, colour * np.uint16(257))
    assert np.array_equal(read_picture(torch.from_numpy(colour).permute(2, 0, 1)).pixels, colour)
    batch = torch.from_numpy(colour).permute(2, 0, 1)[None] / 255
    assert np.array_equal(read_picture(batch.requires_grad_()).pixels, colour * np.uint16(257))
    copy = read_picture(colour)
    colour[:] = 0
    assert copy.pixels.any()  # the caller's array is not shared


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        (np.zeros((2, 2), np.int64), "expected uint8, uint16 or floats from 0 to 1, got int64"),
        (np.full((2, 2), 255.0), "expected floats from 0 to 1, got 255 to 255; scale them to 0..1"),
        (np.full((2, 2), np.nan), "got nan to nan"),
        (np.zeros((3, 8, 9), np.uint8), r"\[h, w, 1 to 4\], got \(3, 8, 9\); move the channels last"),
        (np.zeros((0, 2), np.uint8), "zero pixels"),
        (np.zeros(4, np.uint8), r"got \(4, 1\)|got \(4,\)"),
        (b"", "expected the bytes of a picture file, got none"),
        (b"hello", "expected JPEG, PNG"),
        (io.StringIO("x"), "expected a file opened in binary mode, got str"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_picture_is_refused(picture: Any, words: str) -> None:
    with pytest.raises(PictureError, match=words):
        read_picture(picture)


def test_tensors_of_other_shapes_are_refused() -> None:
    torch = pytest.importorskip("torch")
    for shape in ((2, 3, 4, 4), (4, 4), (5, 4, 4)):
        with pytest.raises(PictureError, match="expected a tensor"):
            read_picture(torch.zeros(shape))


def test_bytes_and_file_objects_are_files(tmp_path: Path) -> None:
    Image.fromarray(noise(5, 7, 3)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    expected = read_picture(tmp_path / "a.png").pixels
    for picture in (data, bytearray(data), memoryview(data), io.BytesIO(data)):
        assert np.array_equal(read_picture(picture).pixels, expected)
    with (tmp_path / "a.png").open("rb") as file:
        assert np.array_equal(read_picture(file).pixels, expected)
        assert not file.closed
        with pytest.raises(PictureError, match=r"a\.png: expected the bytes of a picture file, got none; rewind"):
            read_picture(file)
    assert check_picture(data).size == (7, 5)


@pytest.mark.parametrize("suffix", WRITTEN)
def test_a_picture_is_encoded_as_it_is_written(tmp_path: Path, suffix: str) -> None:
    photo = read_picture(noise(20, 30, 3, 65535))
    notes = write_picture(photo, tmp_path / f"a{suffix}")
    assert encode_picture(photo, suffix) == ((tmp_path / f"a{suffix}").read_bytes(), notes)
    with pytest.raises(PictureError, match="expected a name that ends in one of"):
        encode_picture(photo, ".xyz")


def test_the_documentation_names_every_format() -> None:
    page = (Path(__file__).parents[2] / "docs" / "pictures.md").read_text(encoding="utf-8")
    formats, rest = page.split("## Formats")[1].split("## What is kept")
    names = {"WEBP": "WebP", "HEIF": "HEIC", "JPEG2000": "JPEG 2000"}
    for name in READABLE:
        assert names.get(name, name) in formats
    for suffix in SUFFIXES:
        assert suffix in formats
    for suffix in ("DNG", "NEF", "CR2", "ARW"):
        assert suffix in rest
        assert f".{suffix.lower()}" in RAW_SUFFIXES

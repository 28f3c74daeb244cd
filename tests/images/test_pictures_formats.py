"""What survives an edit, for every kind of picture, every format it comes in and every format it is written to."""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageFile, features
from PIL.TiffImagePlugin import IFDRational

from openwu.errors import PictureError
from openwu.images import (
    Photo,
    check_output,
    check_picture,
    default_suffix,
    is_picture_suffix,
    read_picture,
    write_picture,
)
from openwu.images import formats as formats_module

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
HEIGHT, WIDTH = 32, 40
NEEDS = {".heic": "pillow_heif", ".avif": "avif"}
LOSSLESS = (".png", ".tif")

SOURCES = {
    "rgb": (".png", ".jpg", ".webp", ".tif", ".avif", ".heic"),
    "rgba": (".png", ".webp", ".tif", ".avif", ".heic"),
    "grey": (".png", ".jpg", ".tif", ".heic"),
    "grey alpha": (".png", ".tif"),
    "grey 16": (".png", ".tif"),
    "grey alpha 16": (".png",),
    "rgb 16": (".png", ".tif"),
    "rgba 16": (".png", ".tif"),
    "palette": (".png", ".tif"),
    "cmyk": (".jpg", ".tif"),
}
"""Kind of picture -> the formats that people have it in."""

TARGETS = (".png", ".jpg", ".webp", ".tif", ".avif", ".heic")
KEEPS_GREY = (".png", ".jpg", ".tif", ".heic")
PAIRS = [(kind, source, target) for kind in SOURCES for source in SOURCES[kind] for target in TARGETS]


def need(*suffixes: str) -> None:
    """Skip where the library that codes a format is not there."""
    for suffix in suffixes:
        if suffix == ".avif" and not features.check("avif"):
            pytest.skip("this Pillow has no AVIF")
        if suffix == ".heic":
            pytest.importorskip("pillow_heif")
            formats_module.has_heif()


def true_channels(kind: str) -> NDArray[np.uint16]:
    """A smooth picture without symmetry `[h, w, c]`, 16 bits per channel; only "16" kinds use the lower 8."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH] / np.array([HEIGHT, WIDTH])[:, None, None]
    planes = [rows * 0.9, columns * 0.8 + 0.1, (rows + columns) / 2, (1 + columns - rows) / 2]
    if "grey" in kind:
        planes = [planes[2], planes[3]]
    count = (1 if "grey" in kind else 3) + ("alpha" in kind or "rgba" in kind)
    return np.rint(np.dstack(planes[:count]) * 65535).astype(np.uint16)


def laid(upright: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Upright -> as a camera that was held so stores it."""
    undo = {1: (0, 0), 3: (1, 1), 6: (0, 1), 5: (0, 0), 8: (1, 0)}[orientation]  # before the sides are exchanged
    flipped = upright[:: -1 if undo[0] else 1, :: -1 if undo[1] else 1]
    return np.ascontiguousarray(flipped.swapaxes(0, 1) if orientation >= 5 else flipped)


def rich_exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "camera", orientation
    exif.get_ifd(0x8769)[0x829A] = IFDRational(1, 60)
    exif.get_ifd(0x8825).update({1: "N", 2: (51.0, 30.0, 0.0)})
    return exif


def make(path: Path, kind: str, orientation: int, icc: bytes | None) -> NDArray[np.uint16]:
    """Write a picture of this kind with nothing of ours. Returns its true channels, upright, 16 bits each."""
    truth = true_channels(kind)
    channels = laid(truth, orientation)
    if kind == "rgb 16" or kind.endswith("a 16"):
        (png_16 if path.suffix == ".png" else tiff_16)(path, channels, orientation, icc)
        return truth
    if kind == "grey 16":
        image = Image.fromarray(np.ascontiguousarray(channels[:, :, 0]))
    else:
        truth = (truth >> 8) * np.uint16(257)
        image = Image.fromarray((channels >> 8).astype(np.uint8).squeeze())
    if kind == "palette":
        image = image.quantize(64)
    if kind == "cmyk":
        image = image.convert("CMYK")
    options: dict[str, Any] = {"exif": rich_exif(orientation).tobytes()}
    if icc:
        options["icc_profile"] = icc
    if path.suffix == ".webp":
        options |= {"lossless": True, "exact": True}
    elif path.suffix == ".heic":
        options |= {"quality": -1}
    elif path.suffix in (".jpg", ".avif"):
        options |= {"quality": 100}
    image.save(path, **options)
    return truth


def chunk(tag: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))


def png_16(path: Path, channels: NDArray[np.uint16], orientation: int, icc: bytes | None, extra: bytes = b"") -> None:
    """A 16-bit PNG file made by hand: Pillow writes none but grey."""
    height, width, count = channels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[count], 0, 0, 0)
    body = chunk(b"iCCP", b"p\0\0" + zlib.compress(icc)) if icc else b""
    body += chunk(b"eXIf", rich_exif(orientation).tobytes().removeprefix(b"Exif\0\0")) + extra
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in channels.astype(">u2")))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def tiff_16(path: Path, channels: NDArray[np.uint16], orientation: int, icc: bytes | None, **options: Any) -> None:
    tifffile = pytest.importorskip("tifffile")
    tags = [(0x0112, "H", 1, orientation, True), (0x010F, "s", 0, "camera", True)]
    options = {"photometric": "rgb", "compression": "zlib", "predictor": True} | options
    if channels.shape[2] == 4:
        options.setdefault("extrasamples", ["unassalpha"])
    tifffile.imwrite(path, channels, iccprofile=icc, extratags=tags, metadata=None, **options)


def eight(values: NDArray[Any]) -> NDArray[np.float64]:
    """Whole numbers of 8 or 16 bits -> 0..255."""
    return values * (255 / np.iinfo(values.dtype).max)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("icc", [None, SRGB], ids=["no profile", "profile"])
@pytest.mark.parametrize(("kind", "source", "target"), PAIRS)
def test_an_edit_keeps_all_but_the_pixels(
    tmp_path: Path, kind: str, source: str, target: str, icc: bytes | None, orientation: int
) -> None:
    need(source, target)
    deep = kind.endswith("16")
    if kind == "cmyk":
        icc = None  # is converted through its profile, which must then be one of CMYK
    truth = make(tmp_path / f"in{source}", kind, orientation, icc)
    transparent = truth.shape[2] in (2, 4)

    read = read_picture(tmp_path / f"in{source}")
    assert read.notes == check_picture(tmp_path / f"in{source}").notes == ()
    assert read.size == (WIDTH, HEIGHT)
    assert read.pixels.dtype == (np.uint16 if deep else np.uint8)
    assert read.grey == ("grey" in kind)
    assert (read.alpha is not None) == transparent
    assert read.icc == icc
    colours = truth[:, :, : truth.shape[2] - transparent]
    if deep or (source != ".jpg" and kind in ("rgb", "rgba", "grey", "grey alpha") and source not in NEEDS):
        assert np.array_equal(read.pixels, (colours if deep else colours >> 8) + np.zeros(3, read.pixels.dtype))
    else:
        assert np.abs(eight(read.pixels) - eight(colours)).mean() < (8 if kind == "palette" else 3)

    edited = read.with_pixels(1 - read.floats())
    if target == ".jpg" and transparent:
        with pytest.raises(PictureError, match="JPEG cannot keep the picture's transparency"):
            write_picture(edited, tmp_path / f"out{target}")
        return
    notes = write_picture(edited, tmp_path / f"out{target}")
    back = read_picture(tmp_path / f"out{target}")
    assert back.size == read.size
    assert back.icc == icc
    stays_deep = deep and target in LOSSLESS
    assert notes == (() if stays_deep or not deep else ("16 bits are written as 8; to keep 16: use .png or .tif",))
    assert back.pixels.dtype == (np.uint16 if stays_deep else np.uint8)
    if target in LOSSLESS and stays_deep == deep:
        assert np.array_equal(back.pixels, edited.pixels)
    else:
        assert np.abs(eight(back.pixels) - eight(edited.pixels)).mean() < (5 if kind == "palette" else 3)
    assert back.grey == (read.grey and target in (LOSSLESS if transparent else KEEPS_GREY))
    if read.alpha is not None:
        assert back.alpha is not None
        assert np.array_equal(back.alpha, read.alpha if stays_deep else read.eight_bit().alpha)  # type: ignore[arg-type]
        assert np.array_equal(read.alpha, truth[:, :, -1] if deep else truth[:, :, -1] >> 8)
    exif = back.to_image().getexif()
    assert exif[0x010F] == "camera"
    assert 0x0112 not in exif or exif[0x0112] == 1
    if not (source == ".tif" and deep and kind != "grey 16"):  # tifffile writes no such block
        assert exif.get_ifd(0x8769)[0x829A] == pytest.approx(1 / 60)
        assert exif.get_ifd(0x8825)[1] == "N"


@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
@pytest.mark.parametrize("kind", ["rgb", "rgb 16"])
@pytest.mark.parametrize("source", TARGETS)
def test_every_format_is_turned_upright(tmp_path: Path, source: str, kind: str, orientation: int) -> None:
    if source not in SOURCES[kind]:
        return
    need(source)
    truth = make(tmp_path / f"a{source}", kind, orientation, None)
    assert np.abs(eight(read_picture(tmp_path / f"a{source}").pixels) - eight(truth)).mean() < 3


# 16-bit colour


def test_every_orientation_of_16_bits_is_that_of_8(tmp_path: Path) -> None:
    channels = true_channels("rgb 16")
    for orientation in range(1, 9):
        png_16(tmp_path / "a.png", channels, orientation, None)
        deep = read_picture(tmp_path / "a.png")
        Image.fromarray((channels >> 8).astype(np.uint8)).save(tmp_path / "b.png", exif=rich_exif(orientation))
        assert np.array_equal(deep.pixels >> 8, read_picture(tmp_path / "b.png").pixels)


def test_dpi_follows_the_rotation_and_survives(tmp_path: Path) -> None:
    for orientation, expected in ((1, (300, 200)), (6, (200, 300))):
        channels = true_channels("rgb 16")
        tiff_16(tmp_path / "a.tif", channels, orientation, None, resolution=(300, 200), resolutionunit=2)
        read = read_picture(tmp_path / "a.tif")
        assert read.dpi == pytest.approx(expected)
        for suffix in LOSSLESS:
            write_picture(read, tmp_path / f"b{suffix}")
            assert read_picture(tmp_path / f"b{suffix}").dpi == pytest.approx(expected, abs=0.1)
    png_16(tmp_path / "c.png", true_channels("rgb 16"), 1, None)
    read = read_picture(tmp_path / "c.png")
    for suffix in LOSSLESS:
        write_picture(read, tmp_path / f"c{suffix}")
        assert read_picture(tmp_path / f"c{suffix}").dpi is None


@pytest.mark.parametrize(
    "options",
    [
        {"compression": None, "predictor": None},
        {"byteorder": ">"},
        {"tile": (16, 16)},
        {"compression": None, "predictor": None, "planarconfig": "separate"},
        {"planarconfig": "separate", "rowsperstrip": 8},
        {"extrasamples": ["unspecified"]},
    ],
    ids=str,
)
def test_layouts_of_16_bit_tiff(tmp_path: Path, options: dict[str, Any]) -> None:
    channels = true_channels("rgba 16" if "extrasamples" in options else "rgb 16")
    stored = np.moveaxis(channels, 2, 0) if "planarconfig" in options else channels
    tiff_16(tmp_path / "a.tif", stored, 1, None, **options)
    read = read_picture(tmp_path / "a.tif")
    assert np.array_equal(read.pixels, channels[:, :, :3])
    assert read.alpha is None


def test_premultiplied_alpha_is_undone(tmp_path: Path) -> None:
    channels = np.array([[[1000, 2000, 3000, 32768], [0, 0, 0, 0]]], np.uint16)
    tiff_16(tmp_path / "a.tif", channels, 1, None, extrasamples=["assocalpha"])
    read = read_picture(tmp_path / "a.tif")
    assert np.abs(read.pixels.astype(int) - [[[2000, 4000, 6000], [0, 0, 0]]]).max() <= 1
    assert read.alpha is not None
    assert read.alpha.tolist() == [[32768, 0]]


def test_transparent_colour_of_16_bits_is_matched_in_all_of_them(tmp_path: Path) -> None:
    channels = np.array([[[1, 2, 3], [257, 2, 3]]], np.uint16)
    png_16(tmp_path / "a.png", channels, 1, None, chunk(b"tRNS", channels[0, 0].astype(">u2").tobytes()))
    read = read_picture(tmp_path / "a.png")
    assert np.array_equal(read.pixels, channels)
    assert read.alpha is not None
    assert read.alpha.tolist() == [[0, 65535]]


def test_grey_16_becomes_16_bit_colour_when_an_edit_colours_it(tmp_path: Path) -> None:
    make(tmp_path / "a.png", "grey 16", 1, SRGB)
    read = read_picture(tmp_path / "a.png")
    tinted = read.floats()
    tinted[:, :, 2] *= 0.5
    edited = read.with_pixels(tinted)
    for suffix in LOSSLESS:
        assert write_picture(edited, tmp_path / f"b{suffix}") == ()
        back = read_picture(tmp_path / f"b{suffix}")
        assert np.array_equal(back.pixels, edited.pixels)
        assert (back.grey, back.icc) == (False, SRGB)


def test_the_same_name_read_twice_is_read_twice(tmp_path: Path) -> None:
    for value in (1000, 2000):
        png_16(tmp_path / "a[1].png", np.full((4, 4, 3), value, np.uint16), 1, None)
        assert read_picture(tmp_path / "a[1].png").pixels.max() == value


@pytest.mark.parametrize("suffix", LOSSLESS)
def test_a_truncated_16_bit_file_is_refused(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH, 3), np.uint16)
    write_picture(Photo(noise), tmp_path / f"a{suffix}")
    data, refusals = (tmp_path / f"a{suffix}").read_bytes(), 0
    for share in (0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        (tmp_path / f"b{suffix}").write_bytes(data[: int(len(data) * share) or 1])
        try:
            assert np.array_equal(read_picture(tmp_path / f"b{suffix}").pixels, noise)
        except PictureError:
            refusals += 1
    assert refusals >= 7


def test_a_huge_16_bit_picture_is_refused_from_the_header(tmp_path: Path) -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 16, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with pytest.raises(PictureError, match="at most 100 megapixels, got 10000 megapixels"):
        read_picture(tmp_path / "a.png")


def test_an_opened_image_has_no_16_bit_colour_and_notes_it(tmp_path: Path) -> None:
    make(tmp_path / "a.png", "rgb 16", 1, None)
    with Image.open(tmp_path / "a.png") as image:
        read = read_picture(image)
    assert read.notes == ("16 bits per channel are read as 8; to keep 16: give the file instead",)
    assert read.pixels.dtype == np.uint8


def test_16_bit_cmyk_says_that_it_is_read_as_8(tmp_path: Path) -> None:
    tiff_16(tmp_path / "a.tif", true_channels("rgba 16"), 1, None, photometric="separated", extrasamples=None)
    read = read_picture(tmp_path / "a.tif")
    assert read.mode == "CMYK"
    assert read.notes == ("16 bits per channel are read as 8",)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([".png", ".tif", ".heic"]),
    st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_damaged_bytes_give_a_photo_or_a_picture_error(
    tmp_path: Path, suffix: str, damage: list[tuple[float, int]]
) -> None:
    need(".heic")
    write_picture(Photo(true_channels("rgb 16")), tmp_path / f"a{suffix}")
    data = bytearray((tmp_path / f"a{suffix}").read_bytes())
    for place, value in damage:
        data[int(place * len(data))] = value
    (tmp_path / f"a{suffix}").write_bytes(data)
    with suppress(PictureError):
        assert read_picture(tmp_path / f"a{suffix}", max_pixels=10_000).pixels.ndim == 3


# HEIC and AVIF


@pytest.mark.parametrize("suffix", [".heic", ".avif"])
@pytest.mark.parametrize("tolerant", [False, True])
def test_a_truncated_file_is_refused(
    tmp_path: Path, suffix: str, tolerant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    need(suffix)
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    write_picture(Photo(noise), tmp_path / f"a{suffix}")
    data, whole = (tmp_path / f"a{suffix}").read_bytes(), read_picture(tmp_path / f"a{suffix}").pixels
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
    refusals = 0
    for share in (0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        (tmp_path / f"b{suffix}").write_bytes(data[: int(len(data) * share) or 1])
        try:
            assert np.array_equal(read_picture(tmp_path / f"b{suffix}").pixels, whole)
        except PictureError:
            refusals += 1
    assert refusals == 8


@pytest.mark.parametrize("primary", [0, 1, 2])
def test_heic_with_several_pictures_gives_the_primary_one_and_notes_it(tmp_path: Path, primary: int) -> None:
    need(".heic")
    frames = [Image.new("RGB", (64, 64), (90 * k, 0, 0)) for k in range(3)]
    frames[0].save(tmp_path / "a.heic", save_all=True, append_images=frames[1:], primary_index=primary)
    read = read_picture(tmp_path / "a.heic")
    assert abs(int(read.pixels[:, :, 0].mean()) - 90 * primary) < 4
    assert read.notes == ("the primary picture was read; 2 more in the file were left out",)
    assert check_picture(tmp_path / "a.heic").notes == read.notes


def test_heic_of_ten_bits_says_that_two_are_lost(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.from_bytes("RGB;16", (WIDTH, HEIGHT), true_channels("rgb").tobytes()).save(tmp_path / "a.heic")
    assert read_picture(tmp_path / "a.heic").notes == ("10 bits per channel are read as 8",)
    assert check_picture(tmp_path / "a.heic").notes == ("10 bits per channel are read as 8",)


def test_a_huge_heic_is_refused(tmp_path: Path) -> None:
    need(".heic")
    write_picture(Photo(np.zeros((64, 64, 3), np.uint8)), tmp_path / "a.heic")
    with pytest.raises(PictureError, match=r"at most 0\.001 megapixels"):
        read_picture(tmp_path / "a.heic", max_pixels=1000)


@pytest.mark.parametrize("suffix", [".heic", ".avif"])
def test_a_general_brand_is_read_by_whoever_can(tmp_path: Path, suffix: str) -> None:
    need(".heic", ".avif")
    write_picture(Photo(np.zeros((64, 64, 3), np.uint8)), tmp_path / f"a{suffix}")
    data = (tmp_path / f"a{suffix}").read_bytes()
    (tmp_path / "b.heic").write_bytes(data[:8] + b"mif1" + data[12:])
    assert read_picture(tmp_path / "b.heic").format == {".heic": "HEIF", ".avif": "AVIF"}[suffix]


@pytest.mark.parametrize("suffix", [".heic", ".avif"])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (7, 5), (3000, 20)])
def test_odd_sizes(tmp_path: Path, suffix: str, width: int, height: int) -> None:
    need(suffix)
    write_picture(Photo(np.full((height, width, 3), 90, np.uint8)), tmp_path / f"a{suffix}")
    read = read_picture(tmp_path / f"a{suffix}")
    assert read.size == (width, height)
    assert np.abs(read.pixels.astype(int) - 90).max() < 4


# Without the extra


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the extra `formats` were not installed."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    formats_module.has_heif.cache_clear()
    yield
    formats_module.has_heif.cache_clear()


def test_heic_names_what_to_install(tmp_path: Path, bare: None) -> None:
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    for read in (read_picture, check_picture):
        with pytest.raises(PictureError, match=r"reading HEIC needs pillow-heif: pip install 'openwu\[formats\]'"):
            read(tmp_path / "a.heic")
    with pytest.raises(PictureError, match=r"writing HEIC needs pillow-heif: pip install 'openwu\[formats\]'"):
        check_output(tmp_path / "b.heic")
    assert not is_picture_suffix(Path("b.HEIC"))
    assert default_suffix(Path("b.heic")) == ".png"


def test_avif_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = features.check
    monkeypatch.setattr(features, "check", lambda name: name != "avif" and check(name))
    Image.init()
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    (tmp_path / "a.avif").write_bytes(b"\0\0\0\x18ftypavif" + bytes(40))
    with pytest.raises(PictureError, match=r"reading AVIF needs Pillow 11\.3 or later: pip install -U pillow"):
        read_picture(tmp_path / "a.avif")
    with pytest.raises(PictureError, match="this Pillow cannot write AVIF: pip install -U pillow"):
        check_output(tmp_path / "b.avif")

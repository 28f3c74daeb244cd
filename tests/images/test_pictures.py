"""Reading: every kind of picture that people have, and every kind of damage. Writing: whole or not at all."""

from __future__ import annotations

import errno
import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile, features
from PIL.TiffImagePlugin import IFDRational

from openwu.errors import PictureError
from openwu.images import (
    Photo,
    check_fits,
    check_output,
    check_picture,
    default_suffix,
    read_picture,
    side_by_side,
    write_picture,
)

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def scene(height: int = 12, width: int = 17, channels: int = 3) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A smooth picture without symmetry `[h, w, channels]`."""
    rows, columns = np.mgrid[0:height, 0:width]
    planes = [(rows * (7 + k) + columns * (3 + 2 * k) + 20 * k) % 256 for k in range(channels)]
    return np.stack(planes, axis=2).astype(np.uint8)


def photo(tmp_path: Path, name: str, image: Image.Image, **options: Any) -> Path:
    path = tmp_path / name
    image.save(path, **options)
    return path


def png(width: int, height: int, depth: int, colour: int, data: bytes, extra: bytes = b"") -> bytes:
    """A PNG file made by hand, for kinds that Pillow does not write."""

    def chunk(tag: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


# Kinds of pictures


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".webp", ".gif", ".ppm"])
def test_exact_formats_give_their_pixels(tmp_path: Path, suffix: str) -> None:
    grey = Image.fromarray(scene(channels=1)[:, :, 0])
    image = grey if suffix == ".gif" else Image.fromarray(scene())
    path = photo(tmp_path, f"a{suffix}", image, **({"lossless": True} if suffix == ".webp" else {}))
    read = read_picture(path)
    assert np.array_equal(read.pixels, np.asarray(image.convert("RGB")))
    assert (read.alpha, read.size) == (None, (17, 12))


def test_a_string_a_path_and_an_image_are_the_same_picture(tmp_path: Path) -> None:
    path = photo(tmp_path, "a.png", Image.fromarray(scene()))
    with Image.open(path) as opened:
        assert np.array_equal(read_picture(opened).pixels, scene())
    assert np.array_equal(read_picture(str(path)).pixels, read_picture(path).pixels)
    with pytest.raises(PictureError, match="an array, a tensor, the bytes of a file or an open file, got int"):
        read_picture(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "RGBA", "RGBa", "RGBX", "YCbCr", "HSV", "PA"])
def test_modes_from_memory(mode: str) -> None:
    image = Image.fromarray(scene(channels=4)).convert(
        "LA" if mode == "La" else "RGBA" if mode in ("RGBa", "PA") else "RGB"
    )
    image = image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)
    read = read_picture(image)
    assert read.pixels.shape == (12, 17, 3)
    assert (read.alpha is not None) == (mode in ("LA", "La", "RGBA", "RGBa", "PA"))
    assert read.grey == (mode in ("1", "L", "LA", "La"))
    assert read.mode == mode


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once_and_dropped(tmp_path: Path, orientation: int) -> None:
    upright = Image.fromarray(scene(16, 24))
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that undoes each orientation
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(inverse[orientation]))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "camera"
    read = read_picture(photo(tmp_path, "a.png", stored, exif=exif, dpi=(100, 200)))
    assert np.array_equal(read.pixels, np.asarray(upright))
    across, down = read.dpi or (0, 0)
    assert (round(across), round(down)) == ((200, 100) if orientation >= 5 else (100, 200))
    again = read_picture(read.to_image())
    assert np.array_equal(again.pixels, read.pixels)
    kept = read.to_image().getexif()
    assert kept[0x010F] == "camera"
    assert 0x0112 not in kept


@pytest.mark.parametrize("orientation", [3, 6])
def test_tiff_orientation(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    read = read_picture(photo(tmp_path, "a.tif", Image.fromarray(scene()), exif=exif))
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270}[orientation]
    assert np.array_equal(read.pixels, np.asarray(Image.fromarray(scene()).transpose(turn)))


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    palette = Image.fromarray(scene()).quantize(8)
    plain = read_picture(photo(tmp_path, "a.png", palette))
    assert np.array_equal(plain.pixels, np.asarray(palette.convert("RGB")))
    assert plain.alpha is None
    clear = read_picture(photo(tmp_path, "b.png", palette, transparency=0))
    assert clear.alpha is not None
    assert np.array_equal(clear.alpha == 0, np.asarray(palette) == 0)


def test_transparent_colour_of_rgb_and_grey_png(tmp_path: Path) -> None:
    colour = scene()
    read = read_picture(photo(tmp_path, "a.png", Image.fromarray(colour), transparency=tuple(map(int, colour[3, 4]))))
    assert read.alpha is not None
    assert read.alpha[3, 4] == 0
    grey = scene(channels=1)[:, :, 0]
    read = read_picture(photo(tmp_path, "b.png", Image.fromarray(grey), transparency=int(grey[2, 2])))
    assert read.alpha is not None
    assert np.array_equal(read.alpha == 0, grey == grey[2, 2])
    assert read.grey


def test_16_bit_grey_keeps_every_bit(tmp_path: Path) -> None:
    values = np.arange(12 * 17, dtype=np.uint16).reshape(12, 17) * 311
    for suffix in (".png", ".tif"):
        read = read_picture(photo(tmp_path, f"a{suffix}", Image.fromarray(values)))
        assert read.pixels.dtype == np.uint16
        assert np.array_equal(read.pixels[:, :, 1], values)
        out = tmp_path / f"out{suffix}"
        assert write_picture(read.with_pixels(read.floats()), out) == ()
        assert np.array_equal(read_picture(out).pixels, read.pixels)
    notes = write_picture(read, tmp_path / "out.jpg")
    assert "16 bits are written as 8" in notes[0]
    with Image.open(tmp_path / "out.jpg") as small:
        assert small.mode == "L"
        assert np.abs(np.asarray(small).astype(float) - values / 257).max() < 4


def test_16_bit_grey_transparent_value_and_big_endian(tmp_path: Path) -> None:
    values = np.array([[0, 300], [65535, 300]], dtype=">u2")
    data = b"".join(b"\0" + row.tobytes() for row in values)
    clear = b"\0\0\0\2tRNS\x01\x2c" + struct.pack(">I", zlib.crc32(b"tRNS\x01\x2c"))
    (tmp_path / "a.png").write_bytes(png(2, 2, 16, 0, data, clear))
    read = read_picture(tmp_path / "a.png")
    assert read.alpha is not None
    assert read.alpha.tolist() == [[255, 0], [255, 0]]
    assert read.pixels[:, :, 0].tolist() == values.tolist()
    assert "16 bits are written as 8" in write_picture(read, tmp_path / "b.webp")[0]
    write_picture(read, tmp_path / "b.png")
    again = read_picture(tmp_path / "b.png")
    assert again.grey
    assert again.alpha is not None
    assert np.array_equal(again.alpha == 0, read.alpha == 0)


def test_32_bit_pixels(tmp_path: Path) -> None:
    small = Image.fromarray(np.array([[0, 40000]], dtype=np.int32))
    assert read_picture(photo(tmp_path, "a.tif", small)).pixels[0, 1, 0] == 40000
    for values in (np.array([[0, 70000]], np.int32), np.array([[-1, 0]], np.int32)):
        with pytest.raises(PictureError, match="expected up to 16 bits per pixel, got 32"):
            read_picture(photo(tmp_path, "b.tif", Image.fromarray(values)))
    with pytest.raises(PictureError, match="floating-point pixels have no agreed white"):
        read_picture(photo(tmp_path, "c.tif", Image.fromarray(np.zeros((2, 2), np.float32))))


def test_cmyk_and_lab(tmp_path: Path) -> None:
    white = Image.new("CMYK", (4, 4), (0, 0, 0, 0))
    for name in ("a.jpg", "a.tif"):
        read = read_picture(photo(tmp_path, name, white))
        assert read.pixels.min() >= 254
        assert read.mode == "CMYK"
    broken = read_picture(photo(tmp_path, "b.tif", white, icc_profile=b"x" * 200))
    assert broken.pixels.min() >= 254
    assert "CMYK profile is damaged" in broken.notes[0]
    assert broken.icc is None
    lab = ImageCms.profileToProfile(
        Image.fromarray(scene()), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert lab is not None
    assert np.abs(read_picture(lab).pixels.astype(int) - scene()).max() < 12


def test_multi_picture_jpeg_gives_the_photograph(tmp_path: Path) -> None:
    image, preview = Image.fromarray(scene(32, 32)), Image.new("RGB", (8, 8))
    path = tmp_path / "a.jpg"
    image.save(path, format="MPO", save_all=True, append_images=[preview], quality=95)
    read = read_picture(path)
    assert (read.size, read.format) == ((32, 32), "MPO")


# What survives


def rich_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x010F], exif[0x0132] = "camera", "2024:05:06 07:08:09"
    exif.get_ifd(0x8769).update(
        {0x829A: IFDRational(1, 60), 0xA002: 999, 0xA003: 999, 0x9286: b"ASCII\0\0\0hi", 0x927C: b"mk"}
    )
    exif.get_ifd(0x8825).update({1: "N", 2: (51.0, 30.0, 0.0)})
    return exif


@pytest.mark.parametrize("source", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("target", [".jpg", ".png", ".webp", ".tif", ".avif"])
def test_metadata_survives_any_pair_of_formats(tmp_path: Path, source: str, target: str) -> None:
    if target == ".avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    image = Image.fromarray(scene(4, 5)).resize((40, 32), Image.Resampling.BICUBIC)
    path = photo(tmp_path, f"a{source}", image, exif=rich_exif().tobytes(), icc_profile=SRGB, dpi=(300, 300))
    read = read_picture(path)
    assert write_picture(read.with_pixels(1 - read.floats()), tmp_path / f"b{target}") == ()
    back = read_picture(tmp_path / f"b{target}")
    assert back.size == read.size
    assert back.icc == SRGB
    assert np.abs(back.pixels.astype(int) - (255 - read.pixels.astype(int))).mean() < 3
    exif = back.to_image().getexif()
    assert (exif[0x010F], exif[0x0132]) == ("camera", "2024:05:06 07:08:09")
    detail = exif.get_ifd(0x8769)
    assert detail[0x829A] == pytest.approx(1 / 60)
    assert (detail.get(0xA002, 40), detail.get(0xA003, 32)) == (40, 32)
    assert exif.get_ifd(0x8825)[1] == "N"
    if source != ".webp" and target not in (".webp", ".avif"):
        assert back.dpi == pytest.approx((300, 300), abs=0.5)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif", ".avif"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_untouched(tmp_path: Path, suffix: str, mode: str) -> None:
    if suffix == ".avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    whole = Image.fromarray(scene(channels=4))
    image = whole.convert(mode)
    image.putalpha(whole.getchannel("A"))
    read = read_picture(photo(tmp_path, "a.png", image))
    write_picture(read.with_pixels(read.floats() * 0.5), tmp_path / f"b{suffix}")
    back = read_picture(tmp_path / f"b{suffix}")
    assert np.array_equal(back.alpha, scene(channels=4)[:, :, 3])  # type: ignore[arg-type]


def test_grey_stays_grey_until_coloured(tmp_path: Path) -> None:
    read = read_picture(photo(tmp_path, "a.png", Image.fromarray(scene(channels=1)[:, :, 0]), icc_profile=SRGB))
    assert read.to_image().mode == "L"
    tinted = read.floats()
    tinted[:, :, 2] *= 0.5
    assert read.with_pixels(tinted).to_image().mode == "RGB"
    write_picture(read, tmp_path / "b.jpg")
    with Image.open(tmp_path / "b.jpg") as back:
        assert back.mode == "L"
        assert back.info["icc_profile"] == SRGB


def grey_profile(gamma: float) -> bytes:
    """A minimal ICC version 2 greyscale profile with one gamma curve."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    white = b"XYZ " + bytes(4) + struct.pack(">iii", 63190, 65536, 54061)
    text = b"desc" + bytes(4) + struct.pack(">I", 2) + b"g\0" + bytes(78)
    blocks = [(b"kTRC", curve), (b"wtpt", white), (b"desc", text)]
    offset, table, body = 128 + 4 + 12 * len(blocks), struct.pack(">I", len(blocks)), b""
    for tag, block in blocks:
        padded = block + bytes(-len(block) % 4)
        table += tag + struct.pack(">II", offset + len(body), len(block))
        body += padded
    head = struct.pack(">I", offset + len(body)) + bytes(4) + struct.pack(">I", 0x02100000) + b"mntrGRAYXYZ "
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    head += struct.pack(">iii", 63190, 65536, 54061)
    return head + bytes(128 - len(head)) + table + body


def test_grey_profile_is_applied_when_the_picture_is_coloured(tmp_path: Path) -> None:
    flat = Image.new("L", (8, 8), 128)
    read = read_picture(photo(tmp_path, "a.png", flat, icc_profile=grey_profile(1.0)))
    assert read.to_image().info["icc_profile"] == grey_profile(1.0)
    tinted = read.floats()
    tinted[0, 0, 2] = 0
    image = read.with_pixels(tinted).to_image()
    assert "icc_profile" not in image.info
    assert image.getpixel((5, 5)) == pytest.approx((188, 188, 188), abs=2)  # linear 0.5 in sRGB
    broken = Photo(np.asarray(image), grey=True, icc=bytes(16) + b"GRAY" + bytes(200))
    assert broken.to_image().getpixel((5, 5)) == image.getpixel((5, 5))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1), st.booleans())
def test_floats_and_back_is_exact(height: int, width: int, seed: int, deep: bool) -> None:
    dtype = np.uint16 if deep else np.uint8
    pixels = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, (height, width, 3), dtype, endpoint=True)
    one = Photo(pixels)
    assert np.array_equal(one.with_pixels(one.floats()).pixels, pixels)
    assert one.with_pixels(one.floats() * 4 - 2).pixels.dtype == dtype
    assert np.array_equal(one.with_pixels(pixels).pixels, pixels)


def test_photo_refuses_what_does_not_fit() -> None:
    one = Photo(scene())
    with pytest.raises(ValueError, match="expected \\(12, 17, 3\\)"):
        one.with_pixels(np.zeros((12, 16, 3), np.float32))
    with pytest.raises(ValueError, match="NaN"):
        one.with_pixels(np.full((12, 17, 3), np.nan, np.float32))
    with pytest.raises(ValueError, match="uint8 or uint16"):
        Photo(np.zeros((2, 2, 3)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="alpha"):
        Photo(scene(), alpha=np.zeros((2, 2), np.uint8))


# What is refused


def refused(path: Path | str, words: str, **options: Any) -> None:
    for read in (read_picture, check_picture):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(PictureError, match=words):
                read(path, **options)


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    refused(tmp_path / "missing.png", "no such file")
    refused(tmp_path / "missing" / "a.png", "no such file")
    refused(tmp_path, "got a folder")
    refused("/dev/null", "got a device or pipe")
    refused("a\0b", "NUL")
    refused("x" * 5000, "cannot be read")
    (tmp_path / "empty.png").touch()
    refused(tmp_path / "empty.png", "the file is empty")
    (tmp_path / "text.jpg").write_text("hello")
    refused(tmp_path / "text.jpg", "expected JPEG, PNG")
    (tmp_path / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    refused(tmp_path / "a.eps", "got something else")


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = photo(tmp_path, "a.png", Image.fromarray(scene()))

    def denied(*args: Any, **options: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    refused(path, "no permission to read it")


def test_zero_sized(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0, 4, 8, 2, b""))
    refused(tmp_path / "a.png", "zero pixels wide or high")
    with pytest.raises(PictureError, match="zero pixels"):
        read_picture(Image.new("RGB", (0, 4)))


def test_decompression_bombs_are_refused_from_the_header(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(100_000, 100_000, 8, 2, b""))
    limit = Image.MAX_IMAGE_PIXELS
    refused(tmp_path / "a.png", r"at most 100 megapixels, got 10000 megapixels \(100000 x 100000\)")
    assert limit == Image.MAX_IMAGE_PIXELS
    (tmp_path / "b.png").write_bytes(png(12_000, 8_000, 8, 2, b""))  # over Pillow's own warning, under our limit
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_picture(tmp_path / "b.png").size == (12_000, 8_000)
    path = photo(tmp_path, "c.png", Image.fromarray(scene()))
    refused(path, "at most 0.0001 megapixels", max_pixels=100)
    with pytest.raises(PictureError, match="megapixels"):
        read_picture(Image.fromarray(scene()), max_pixels=100)


@pytest.mark.parametrize(
    ("suffix", "kind"), [(".gif", "frames"), (".webp", "frames"), (".png", "frames"), (".tif", "pages")]
)
def test_animations_are_refused(tmp_path: Path, suffix: str, kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), (40 * k, 0, 0)) for k in range(3)]
    path = photo(tmp_path, f"a{suffix}", frames[0], save_all=True, append_images=frames[1:])
    refused(path, f"expected one picture, got 3 {kind}; save the one to edit as PNG")


FORMATS = [".jpg", ".png", ".webp", ".tif", ".gif", ".bmp", ".ppm", ".jp2"] + [".avif"] * features.check("avif")


@pytest.mark.parametrize("tolerant", [False, True])
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_truncated_file_is_never_silently_grey(
    tmp_path: Path, suffix: str, tolerant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    whole = photo(tmp_path, f"a{suffix}", Image.fromarray(noise))
    data, pixels = whole.read_bytes(), read_picture(whole).pixels
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
    refusals = 0
    for share in (0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        cut = tmp_path / f"b{suffix}"
        cut.write_bytes(data[: int(len(data) * share) or 1])
        try:
            assert np.array_equal(read_picture(cut).pixels, pixels)
        except PictureError:
            refusals += 1
    assert refusals >= 7
    assert ImageFile.LOAD_TRUNCATED_IMAGES is tolerant


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(FORMATS), st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged_bytes_give_a_photo_or_a_picture_error(
    tmp_path: Path, suffix: str, damage: list[tuple[float, int]]
) -> None:
    buffer = io.BytesIO()
    name = {".jpg": "JPEG", ".tif": "TIFF", ".jp2": "JPEG2000"}.get(suffix, suffix[1:].upper())
    exif = {} if suffix in (".bmp", ".gif", ".ppm", ".jp2") else {"exif": rich_exif().tobytes()}
    Image.fromarray(scene()).save(buffer, name, **exif)
    data = bytearray(buffer.getvalue())
    for place, value in damage:
        data[int(place * len(data))] = value
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(data)
    with suppress(PictureError):
        assert read_picture(path, max_pixels=10_000).pixels.ndim == 3


def test_broken_exif_costs_the_exif_and_not_the_picture(tmp_path: Path) -> None:
    path = photo(tmp_path, "a.jpg", Image.fromarray(scene()), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01" * 40)
    read = read_picture(path)
    assert read.size == (17, 12)
    write_picture(read, tmp_path / "b.jpg")


# Writing


def test_suffix_decides_the_format(tmp_path: Path) -> None:
    kinds = {".jpg": "JPEG", ".JPEG": "JPEG", ".png": "PNG", ".webp": "WEBP", ".TIFF": "TIFF"}
    for suffix, kind in kinds.items():
        write_picture(Photo(scene()), tmp_path / f"a{suffix}")
        with Image.open(tmp_path / f"a{suffix}") as image:
            assert image.format == kind
    assert default_suffix(Path("a.JPG")) == ".JPG"
    assert default_suffix(Path("a.gif")) == ".png"


def test_outputs_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "old.png").touch()
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    cases = {
        "a.xyz": "expected a name that ends in one of",
        "a": "got 'no suffix'",
        "missing/a.png": "does not exist; make it first",
        "file/a.png": "is a file, not a folder",
        "folder.png": "got a folder",
        "loop.png": "cannot be written",
        "pipe.png": "got a device or pipe",
        "a\0.png": "cannot be written",
    }
    for name, words in cases.items():
        with pytest.raises(PictureError, match=words):
            check_output(tmp_path / name)
        with pytest.raises(PictureError, match=words):
            write_picture(Photo(scene()), tmp_path / name)
    check_output(tmp_path / "old.png")
    with pytest.raises(PictureError, match="already exists"):
        check_output(tmp_path / "old.png", overwrite=False)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PictureError, match="no permission to write"):
        check_output(tmp_path / "new.png")


def test_the_output_is_never_an_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = photo(tmp_path, "a.png", Image.fromarray(scene()))
    (tmp_path / "soft.png").symlink_to(source)
    (tmp_path / "hard.png").hardlink_to(source)
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    for output in (source, Path("a.png"), tmp_path / "soft.png", tmp_path / "hard.png", Path("sub/../a.png")):
        with pytest.raises(PictureError, match="the output is the input"):
            check_output(output, [tmp_path / "other.png", source])
    check_output("b.png", [source])


def test_writing_through_a_symlink_keeps_the_link(tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
    write_picture(Photo(scene()), tmp_path / "link.png")
    assert (tmp_path / "link.png").is_symlink()
    assert read_picture(tmp_path / "real.png").size == (17, 12)


def test_jpeg_and_transparency(tmp_path: Path) -> None:
    clear = Photo(scene(), alpha=np.full((12, 17), 128, np.uint8))
    with pytest.raises(PictureError, match=r"JPEG cannot keep the picture's transparency; use \.png or \.webp"):
        write_picture(clear, tmp_path / "a.jpg")
    assert not list(tmp_path.iterdir())
    opaque = Photo(scene(), alpha=np.full((12, 17), 255, np.uint8), icc=SRGB)
    write_picture(opaque, tmp_path / "a.jpg")
    assert read_picture(tmp_path / "a.jpg").icc == SRGB


def test_formats_have_limits(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match="WEBP holds at most 16383 pixels on a side, got 20000"):
        check_fits(tmp_path / "a.webp", (20_000, 10), False)
    check_fits(tmp_path / "a.png", (70_000, 10), True)
    long = Image.Exif()
    long.get_ifd(0x8769)[0x927C] = bytes(70_000)
    notes = write_picture(Photo(scene(), exif=long.tobytes()), tmp_path / "a.jpg")
    assert "too long for JPEG" in notes[0]


def fails_with(code: int) -> Callable[..., Any]:
    def fail(*args: Any, **options: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("place", ["os.fsync", "pathlib.Path.replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.png"
    out.write_bytes(b"old")
    monkeypatch.setattr(place, fails_with(errno.ENOSPC))
    with pytest.raises(PictureError, match="the disk is full"):
        write_picture(Photo(scene()), out)
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
    assert out.read_bytes() == b"old"


@pytest.mark.parametrize("place", ["os.fsync", "pathlib.Path.replace"])
def test_stopping_while_writing_leaves_nothing(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(place, stop)
    with pytest.raises(KeyboardInterrupt):
        write_picture(Photo(scene()), tmp_path / "out.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error", [ValueError("encoder"), OSError("encoder error -2"), SystemError("tile"), KeyboardInterrupt()]
)
def test_a_broken_encoder_leaves_nothing(tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(self: Image.Image, file: Any, *args: Any, **options: Any) -> None:
        file.write(b"half")
        raise error

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else PictureError):
        write_picture(Photo(scene()), tmp_path / "out.png")
    assert not list(tmp_path.iterdir())


WRITE_UNDER_A_LIMIT = """
import resource, signal, sys
import numpy as np
from openwu.errors import PictureError
from openwu.images import Photo, write_picture
noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    write_picture(Photo(noise), sys.argv[1])
except PictureError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_a_write_that_the_system_stops_half_way_leaves_nothing(tmp_path: Path, suffix: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", WRITE_UNDER_A_LIMIT, str(tmp_path / f"a{suffix}")], capture_output=True, text=True
    )
    assert "could not be written" in run.stdout, run.stderr
    assert not list(tmp_path.iterdir())


def test_write_picture_takes_a_pil_image_and_replaces(tmp_path: Path) -> None:
    image = Photo(scene(), icc=SRGB, dpi=(150, 150)).to_image()
    write_picture(image, tmp_path / "a.png")
    write_picture(image.rotate(180), tmp_path / "a.png")
    back = read_picture(tmp_path / "a.png")
    assert np.array_equal(back.pixels, scene()[::-1, ::-1])
    assert back.dpi == pytest.approx((150, 150), abs=0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


# Before / after


def test_side_by_side_shows_both() -> None:
    before = Photo(np.zeros((40, 60, 3), np.uint8), icc=SRGB)
    after = Photo(np.full((40, 60, 3), 65535, np.uint16), grey=True, icc=SRGB)
    sheet = side_by_side(before, after)
    assert sheet.width > 120
    assert sheet.getpixel((30, sheet.height - 10)) == (0, 0, 0)
    assert sheet.getpixel((100, sheet.height - 10)) == (255, 255, 255)
    assert np.asarray(sheet)[: sheet.height - 40].min() < 128  # the labels
    assert sheet.info["icc_profile"] == SRGB


def test_side_by_side_is_white_behind_transparency_and_small() -> None:
    clear = Photo(np.zeros((10, 4000, 3), np.uint8), alpha=np.zeros((10, 4000), np.uint8))
    sheet = side_by_side(clear, clear, ("a", "b"))
    assert sheet.width < 3300
    assert sheet.getpixel((10, sheet.height - 1)) == (255, 255, 255)

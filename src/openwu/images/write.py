"""Write a Photo as a file, whole or not at all, with its metadata; lay two side by side."""

from __future__ import annotations

import errno
import io
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from openwu.errors import PictureError
from openwu.files.writing import atomic_file
from openwu.images import tiff
from openwu.images.colour import profile_space
from openwu.images.formats import INSTALL, encode_png_16, has_heif
from openwu.images.metadata import MAX_SEGMENT, PREFIX, with_jpeg_segments, with_png_chunks
from openwu.images.photo import Photo
from openwu.images.read import read_picture
from openwu.images.tiff_pixels import encode_tiff

SUFFIXES = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".avif": "AVIF",
    ".heic": "HEIF",
    ".heif": "HEIF",
}
"""Suffix of an output file -> Pillow's name of its format."""

PILLOW_PNG_PROFILE = 2**20
"""Bytes of a profile that Pillow reads from a PNG file by default."""

MAX_SIDE = {"JPEG": 65_500, "WEBP": 16_383, "AVIF": 65_536}
"""Longest side that a format can hold, where it has a limit."""


def is_picture_suffix(path: Path) -> bool:
    """Whether a file of this name can be written."""
    return _format_of(path) is not None


def default_suffix(path: Path) -> str:
    """The suffix for an edit of this file: its own where that can be written, .png otherwise."""
    return path.suffix if is_picture_suffix(path) else ".png"


def check_output(path: str | Path, inputs: Iterable[str | Path] = (), *, overwrite: bool = True) -> None:
    """Refuse an output that cannot be written or that would replace an input, before any work is done."""
    path = Path(path)
    if not is_picture_suffix(path):
        _explain_suffix(path)
    try:
        _check_place(path)
        if not path.exists():
            return
        for source in inputs:
            if Path(source).exists() and path.samefile(source):
                raise PictureError(f"{path}: the output is the input {source}; choose another name")
    except (OSError, RuntimeError, ValueError) as error:
        words = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise PictureError(f"{path}: cannot be written: {words}; choose another name") from None
    if path.is_dir():
        raise PictureError(f"{path}: expected a file name, got a folder; name a file in it")
    if not path.is_file():
        raise PictureError(f"{path}: expected a file name, got a device or pipe; choose another name")
    if not overwrite:
        raise PictureError(f"{path}: already exists; choose another name or allow overwriting (--overwrite)")


def check_fits(path: str | Path, size: tuple[int, int], transparent: bool) -> None:
    """Refuse a format that cannot hold the picture: too many pixels on a side, or transparency in JPEG."""
    kind = _format_of(Path(path)) or ""
    limit = MAX_SIDE.get(kind)
    if limit and max(size) > limit:
        raise PictureError(f"{path}: {kind} holds at most {limit} pixels on a side, got {max(size)}; use .png")
    if kind == "JPEG" and transparent:
        raise PictureError(f"{path}: JPEG cannot keep the picture's transparency; use .png or .webp")


def write_picture(picture: Photo | Image.Image, path: str | Path) -> tuple[str, ...]:
    """Write a picture in the format that the suffix names, replacing a file of that name in one step.

    The file appears whole or not at all, and an older one stays in place until then. Returns notes on what the format
    could not keep. The photo's profile, EXIF, XMP, IPTC, texts and DPI are written with it; a PIL image's come from its
    `info`. Raises PictureError.
    """
    path = Path(path)
    check_output(path)
    photo = picture if isinstance(picture, Photo) else read_picture(picture)
    check_fits(path, photo.size, photo.transparent)
    data, notes = _encoded(photo, SUFFIXES[path.suffix.lower()], str(path))
    _write_whole(data, path.resolve())
    return notes


def encode_picture(
    picture: Photo | Image.Image, suffix: str = ".png", *, quality: int | None = None
) -> tuple[bytes, tuple[str, ...]]:
    """Encode a picture as the bytes of a file with this suffix, with notes as of `write_picture`. PictureError.

    `quality`: 0 to 100, of a JPEG or WebP file; None: near-lossless.
    """
    path = Path(f"picture{suffix}")
    if not is_picture_suffix(path):
        _explain_suffix(path)
    photo = picture if isinstance(picture, Photo) else read_picture(picture)
    check_fits(path, photo.size, photo.transparent)
    return _encoded(photo, SUFFIXES[suffix.lower()], str(path), quality)


def _format_of(path: Path) -> str | None:
    kind = SUFFIXES.get(path.suffix.lower())
    if kind in ("WEBP", "AVIF") and not features.check(kind.lower()):
        return None
    return None if kind == "HEIF" and not has_heif() else kind


def _explain_suffix(path: Path) -> NoReturn:
    kind = SUFFIXES.get(path.suffix.lower())
    if kind == "HEIF":
        raise PictureError(f"{path}: writing HEIC needs pillow-heif: {INSTALL}; or use .jpg or .png")
    if kind:
        raise PictureError(f"{path}: this Pillow cannot write {kind}: pip install -U pillow; or use .jpg or .png")
    known = ", ".join(sorted(SUFFIXES))
    raise PictureError(f"{path}: expected a name that ends in one of {known}, got {path.suffix or 'no suffix'!r}")


def _check_place(path: Path) -> None:
    folder = path.resolve().parent
    if not folder.exists():
        raise PictureError(f"{path}: the folder {path.parent} does not exist; make it first")
    if not folder.is_dir():
        raise PictureError(f"{path}: {path.parent} is a file, not a folder; choose another name")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PictureError(f"{path}: no permission to write to {path.parent}; choose another folder")


def _encoded(photo: Photo, format: str, name: str, quality: int | None = None) -> tuple[bytes, tuple[str, ...]]:
    """The bytes of a file, and notes on what they do not hold."""
    notes: list[str] = []
    try:
        if format == "TIFF":
            return _tiff(photo, notes), tuple(notes)
        if format == "PNG":
            return _png(photo, notes), tuple(notes)
        if photo.pixels.dtype.itemsize == 2:
            notes.append("16 bits are written as 8; to keep 16: use .png or .tif")
        image = photo.eight_bit().to_image()
        if format == "JPEG" and photo.alpha is not None:  # opaque everywhere, or check_fits would have refused
            image = _without_alpha(image)
        options = _options(photo, image, format, notes)
        if quality is not None and format in ("JPEG", "WEBP"):
            options |= {"quality": quality} | ({"lossless": False} if format == "WEBP" else {})
        buffer = io.BytesIO()
        image.save(buffer, format, **options)
        if format != "JPEG":
            _note_lost(photo, (), notes)
            return buffer.getvalue(), tuple(notes)
        return _jpeg(photo, buffer.getvalue(), notes), tuple(notes)
    except Exception as error:  # Pillow's encoders raise anything at all
        raise PictureError(f"{name}: {format} could not encode the picture: {error}; try .png") from error


def _tiff(photo: Photo, notes: list[str]) -> bytes:
    plain = photo if photo.stayed_grey else photo.in_colour()
    given = {tiff.ICC: plain.icc, tiff.XMP: photo.xmp, tiff.IPTC: photo.iptc}
    _note_lost(photo, ("iptc",), notes)
    return encode_tiff(plain.channels(), _block(photo), {tag: data for tag, data in given.items() if data}, photo.dpi)


def _png(photo: Photo, notes: list[str]) -> bytes:
    plain = photo if photo.stayed_grey else photo.in_colour()
    channels = plain.channels()
    if channels.dtype == np.uint16:
        data = encode_png_16(channels)
    else:
        buffer, image = io.BytesIO(), plain.to_image()
        image.info.clear()
        image.save(buffer, "PNG", compress_level=4)
        data = buffer.getvalue()
    texts = [*photo.texts]
    if photo.xmp:
        texts.append(("XML:com.adobe.xmp", photo.xmp.decode("utf-8", "replace")))
    if plain.icc and len(plain.icc) > PILLOW_PNG_PROFILE:
        notes.append("its colour profile is longer than 1 MB: programs built on Pillow refuse such a PNG; use .tif")
    _note_lost(photo, ("texts",), notes)
    return with_png_chunks(data, plain.icc, _block(photo), photo.dpi, texts)


def _jpeg(photo: Photo, data: bytes, notes: list[str]) -> bytes:
    comment = dict(photo.texts).get("Comment")
    encoded = comment.encode("utf-8", "replace") if comment else None
    kept = {"xmp": photo.xmp, "iptc": photo.iptc, "comment": encoded}
    for name, limit in (("xmp", 65_502), ("iptc", 65_500), ("comment", MAX_SEGMENT)):
        if len(kept[name] or b"") > limit:
            kept[name] = None
            notes.append(f"its {name.upper() if name != 'comment' else name} is too long for JPEG and was left out")
    _note_lost(photo, ("iptc", "comment"), notes)
    return with_jpeg_segments(data, kept["xmp"], kept["iptc"], kept["comment"])


def _note_lost(photo: Photo, kept: tuple[str, ...], notes: list[str]) -> None:
    """Note the metadata that a format cannot hold."""
    if photo.iptc and "iptc" not in kept:
        notes.append("its IPTC data was left out; to keep it: use .jpg or .tif")
    keys = [key for key, _ in photo.texts if "texts" not in kept and not (key == "Comment" and "comment" in kept)]
    if keys:
        notes.append(f"its texts were left out ({', '.join(keys[:5])}); to keep them: use .png")


def _block(photo: Photo) -> bytes | None:
    return photo.exif.removeprefix(PREFIX) if photo.exif else None


def _without_alpha(image: Image.Image) -> Image.Image:
    plain = image.convert(image.mode.removesuffix("A"))
    plain.info = dict(image.info)
    return plain


def _options(photo: Photo, image: Image.Image, format: str, notes: list[str]) -> dict[str, Any]:
    """Options of Pillow's encoders: near-lossless quality, and the metadata, which they leave out by default."""
    names = ("icc_profile", "exif") if format == "JPEG" else ("icc_profile", "exif", "xmp")
    options: dict[str, Any] = {name: image.info[name] for name in names if name in image.info}
    if format == "JPEG":
        options |= {"quality": 95, "subsampling": "4:4:4"}
        if "dpi" in image.info:
            options["dpi"] = image.info["dpi"]
        if len(options.get("exif", b"")) > MAX_SEGMENT:
            del options["exif"]
            notes.append("its EXIF data is too long for JPEG and was left out")
        image.info.pop("xmp", None)
    elif format == "WEBP":
        options |= {"quality": 95, "exact": True}  # exact: colours under full transparency stay
        if photo.lossless:
            options |= {"lossless": True, "quality": 80}  # quality: how hard to try
    elif format == "AVIF":
        options |= {"quality": 100 if image.mode.endswith("A") else 90, "subsampling": "4:4:4"}  # 100 keeps alpha exact
    elif format == "HEIF":  # 4:2:0 as cameras write it, which opens everywhere; lossless keeps alpha exact
        options |= {"quality": -1 if image.mode.endswith("A") else 95, "enc_params": {"preset": "fast"}}
    return options


def _write_whole(data: bytes, path: Path) -> None:
    try:
        with _ended_in_order(), atomic_file(path) as part:
            part.write_bytes(data)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PictureError(f"{path}: the disk is full; free some space and try again") from error
        raise PictureError(f"{path}: could not be written: {error.strerror or error}; check the disk") from error


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Turn SIGTERM into SystemExit in the main thread, unless somebody handles it, so that half a file is removed."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


COMPARISON_SIDE = 1600
"""Longest side of either half: a comparison is for the eye, the full size is in the output itself."""

LABEL_HEIGHT, GAP, MARGIN = 32, 8, 8


def side_by_side(before: Photo, after: Photo, labels: tuple[str, str] = ("before", "after")) -> Image.Image:
    """The two pictures next to each other under their labels, on white; scaled down where they are large."""
    halves = [_half(before), _half(after)]
    width = sum(half.width for half in halves) + GAP
    sheet = Image.new("RGB", (width, LABEL_HEIGHT + max(half.height for half in halves)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(LABEL_HEIGHT // 2)
    left = 0
    for half, label in zip(halves, labels, strict=True):
        sheet.paste(half, (left, LABEL_HEIGHT))
        draw.text((left + MARGIN, LABEL_HEIGHT // 4), label, fill="black", font=font)
        left += half.width + GAP
    if after.icc and profile_space(after.icc) == "RGB":
        sheet.info["icc_profile"] = after.icc
    return sheet


def _half(photo: Photo) -> Image.Image:
    image = photo.eight_bit().to_image()
    if photo.alpha is not None:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = image.convert("RGB")
    image.thumbnail((COMPARISON_SIDE, COMPARISON_SIDE))
    return image

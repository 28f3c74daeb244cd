"""Before / after: two Photos of one size enter, one labelled picture to look at leaves."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from openwu.errors import PictureError
from openwu.files.writing import whole_file
from openwu.images.formats import INSTALL, encode_deep, has_deep_colour, has_heif
from openwu.images.photo import Photo, profile_space
from openwu.images.read import read_picture

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

MAX_SIDE = {"JPEG": 65_500, "WEBP": 16_383, "AVIF": 65_536}
"""Longest side that a format can hold, where it has a limit."""

DEEP = ("PNG", "TIFF")
"""Formats that hold 16 bits per channel."""

MAX_JPEG_EXIF = 65_533
"""Bytes of EXIF that fit into a JPEG file."""


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
        raise PictureError(f"{path}: cannot be written: {error}; choose another name") from None
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
    could not keep. The photo's profile, EXIF and DPI are written with it; a PIL image's are taken from its `info`.
    """
    path = Path(path)
    check_output(path)
    photo = picture if isinstance(picture, Photo) else read_picture(picture)
    check_fits(path, photo.size, photo.transparent)
    kind = SUFFIXES[path.suffix.lower()]
    if _stays_deep_colour(photo, kind):
        _write_whole(_encode_deep(photo, path, kind), path.resolve())
        return ()
    image, notes = _fit(photo, kind)
    _write_whole(_encode(image, path, kind, _options(image, kind, notes)), path.resolve())
    return tuple(notes)


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


def _fit(photo: Photo, format: str) -> tuple[Image.Image, list[str]]:
    """The image in a mode that the format has, and notes on what that costs."""
    image, notes = photo.to_image(), []
    if image.mode == "I;16" and format not in ("PNG", "TIFF"):
        image = photo.eight_bit().to_image()
    if photo.pixels.dtype.itemsize == 2 and image.mode != "I;16":
        cure = INSTALL if format in DEEP else "use .png or .tif"
        notes.append(f"16 bits are written as 8; to keep 16: {cure}")
    if format == "JPEG" and photo.alpha is not None:  # opaque everywhere, or check_fits would have refused
        image = _without_alpha(image)
    return image, notes


def _stays_deep_colour(photo: Photo, format: str) -> bool:
    """Whether 16 bits are to be written that Pillow cannot: it has 16-bit grey, but no colour and no alpha."""
    if photo.pixels.dtype != np.uint16 or format not in DEEP or not has_deep_colour():
        return False
    return photo.alpha is not None or not photo.stayed_grey


def _encode_deep(photo: Photo, path: Path, format: str) -> bytes:
    grey = photo.stayed_grey and format == "PNG"  # Pillow would not read 16-bit grey with alpha from TIFF
    photo = photo if grey else photo.in_colour()
    try:
        return encode_deep(photo.deep_channels(grey=grey), format, photo.metadata)
    except Exception as error:  # the encoders raise anything at all
        raise PictureError(f"{path}: {format} could not encode the picture: {error}; try .jpg") from error


def _without_alpha(image: Image.Image) -> Image.Image:
    plain = image.convert(image.mode.removesuffix("A"))
    plain.info = dict(image.info)
    return plain


def _options(image: Image.Image, format: str, notes: list[str]) -> dict[str, Any]:
    """What Pillow's encoder is told: near-lossless quality, and the metadata, which it leaves out unless asked."""
    options: dict[str, Any] = {name: image.info[name] for name in ("icc_profile", "exif") if name in image.info}
    if "dpi" in image.info and format in ("JPEG", "PNG", "TIFF"):
        options["dpi"] = image.info["dpi"]
    if format == "JPEG":
        options |= {"quality": 95, "subsampling": "4:4:4"}
        if len(options.get("exif", b"")) > MAX_JPEG_EXIF:
            del options["exif"]
            notes.append("its EXIF data is too long for JPEG and was left out")
    elif format == "PNG":
        options |= {"compress_level": 4}
    elif format == "WEBP":
        options |= {"quality": 95, "exact": True}  # exact: colours under full transparency stay
    elif format == "AVIF":
        options |= {"quality": 100 if image.mode.endswith("A") else 90, "subsampling": "4:4:4"}  # 100 keeps alpha exact
    elif format == "HEIF":  # 4:2:0 as cameras write it, which opens everywhere; lossless keeps alpha exact
        options |= {"quality": -1 if image.mode.endswith("A") else 95, "enc_params": {"preset": "fast"}}
    elif format == "TIFF" and "exif" not in options:  # Pillow can write compression or EXIF blocks, not both
        options |= {"compression": "tiff_adobe_deflate"}
    return options


def _encode(image: Image.Image, path: Path, format: str, options: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    try:
        image.save(buffer, format, **options)
    except Exception as error:  # Pillow's encoders raise anything at all
        raise PictureError(f"{path}: {format} could not encode the picture: {error}; try .png") from error
    return buffer.getvalue()


def _write_whole(data: bytes, path: Path) -> None:
    try:
        with whole_file(path) as part:
            part.write_bytes(data)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PictureError(f"{path}: the disk is full; free some space and try again") from error
        raise PictureError(f"{path}: could not be written: {error.strerror or error}; check the disk") from error


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

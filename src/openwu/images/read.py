"""Files -> Photos: a path or a PIL image enters, a `Photo` leaves, or a `PictureError` that says what to do.

A picture is never guessed at: what is damaged, animated, too large or of an unknown kind is refused. Here a file is
opened and its header checked; `decode.py` makes a `Photo` of what was opened.
"""

from __future__ import annotations

import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from PIL import Image, ImageFile, UnidentifiedImageError, features
from PIL.TiffImagePlugin import TiffImageFile

from openwu.errors import PictureError
from openwu.images.decode import decode, is_deep_colour, lost_bits
from openwu.images.formats import HEIF_BRANDS, INSTALL, has_deep_colour, has_heif
from openwu.images.photo import Photo

MAX_PIXELS = 100_000_000
"""Largest picture that is decoded, in pixels; the header is looked at first."""

READABLE = ("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF", "BMP", "GIF", "PPM", "JPEG2000")
"""Pillow's names of the formats that are read. Others (EPS, PDF, ...) run foreign programs or hold no photograph."""

_READABLE_IN_WORDS = "JPEG, PNG, WebP, TIFF, AVIF, HEIC, BMP, GIF, PPM or JPEG 2000"

_pillow = threading.RLock()


@dataclass(frozen=True)
class PictureHeader:
    """What a file says about itself before its pixels are decoded."""

    size: tuple[int, int]
    """(width, height) as stored, before the EXIF orientation."""
    format: str
    mode: str
    has_alpha: bool
    notes: tuple[str, ...]
    """What reading will not keep, in words for the user."""


def check_picture(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> PictureHeader:
    """Read only the header: cheap, and finds everything but damage to the pixels themselves."""
    with _strict_pillow(), _opened(Path(path), max_pixels) as image:
        notes = lost_bits(image, from_file=True)
        return PictureHeader(image.size, str(image.format), image.mode, image.has_transparency_data, notes)


def read_picture(picture: str | Path | Image.Image | Photo, *, max_pixels: int = MAX_PIXELS) -> Photo:
    """Read a picture upright, as RGB, with what must survive beside it. An opened PIL image gives its current frame.

    A photo that was read or edited before is taken as it is.
    """
    if isinstance(picture, Photo):
        return picture
    if isinstance(picture, Image.Image):
        with _strict_pillow():
            _check_size(picture, "picture", max_pixels)
            return decode(picture, "picture")
    if not isinstance(picture, str | Path):
        raise PictureError(f"picture: expected a path or a PIL image, got {type(picture).__name__}")
    with _strict_pillow(), _opened(Path(picture), max_pixels) as image:
        return decode(image, str(picture), Path(picture))


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Pillow with our size limit in place of its own, no tolerance for truncated files and no warnings on stderr.

    These are settings of the whole process: a lock keeps our threads apart, and the caller's values come back.
    """
    with _pillow, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit, tolerant = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, False
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = limit, tolerant


@contextmanager
def _opened(path: Path, max_pixels: int) -> Iterator[Image.Image]:
    """Open a file, check its header, and close it at the end.

    Pillow gets no name to map into memory: it scrambles an uncompressed TIFF that lies on its side that way.
    """
    with _open_file(path) as file, _identified(file, path) as image:
        _check_size(image, str(path), max_pixels)
        _check_frames(image, path)
        _check_planes(image, path)
        yield image


def _identified(file: BinaryIO, path: Path) -> Image.Image:
    Image.init()  # registers every format; naming one that is not registered yet is an error in Pillow
    head = b""
    try:
        head = file.read(32)
        file.seek(0)
        if _begins_like_heif(head):
            has_heif()
        return Image.open(file, formats=[name for name in READABLE if name in Image.OPEN])
    except UnidentifiedImageError:
        _explain_unidentified(path, head)
    except OSError as error:
        raise PictureError(f"{path}: cannot be read: {error.strerror or error}; check the disk") from error
    except Exception as error:  # Pillow's parsers raise anything at all on damaged headers
        raise PictureError(f"{path}: the picture is damaged ({error}); get an intact copy") from error


def _begins_like_heif(head: bytes) -> bool:
    return head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS


def _open_file(path: Path) -> BinaryIO:
    """Open a file that has something in it."""
    try:
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            raise PictureError(f"{path}: expected a picture, got a folder; name the pictures in it")
        if not stat.S_ISREG(found.st_mode):
            raise PictureError(f"{path}: expected a picture file, got a device or pipe; save it as a file first")
        if found.st_size == 0:
            raise PictureError(f"{path}: the file is empty; get an intact copy")
        return path.open("rb")
    except FileNotFoundError:
        raise PictureError(f"{path}: no such file; check the name and the folder") from None
    except PermissionError:
        raise PictureError(f"{path}: no permission to read it; change its permissions or copy it") from None
    except OSError as error:
        raise PictureError(f"{path}: cannot be read: {error.strerror or error}; check the name") from None
    except ValueError:
        raise PictureError(f"{str(path)!r}: not a file name; check for NUL characters") from None


def _explain_unidentified(path: Path, head: bytes) -> NoReturn:
    """Say why Pillow did not know the file, as far as its first bytes tell."""
    if _begins_like_heif(head) and not has_heif():
        raise PictureError(f"{path}: reading HEIC needs pillow-heif: {INSTALL}; or save it as JPEG, PNG or TIFF")
    if head[4:12] in (b"ftypavif", b"ftypavis") and not features.check("avif"):
        raise PictureError(f"{path}: reading AVIF needs Pillow 11.3 or later: pip install -U pillow")
    if head.startswith(b"\x89PNG\r\n\x1a\n") and len(head) >= 24 and b"\0\0\0\0" in (head[16:20], head[20:24]):
        raise PictureError(f"{path}: the picture is zero pixels wide or high; get an intact copy")
    raise PictureError(f"{path}: expected {_READABLE_IN_WORDS}, got something else or a damaged file; check the file")


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise PictureError(f"{name}: the picture is zero pixels wide or high ({width} x {height}); get an intact copy")
    if width * height > max_pixels:
        millions = f"{width * height / 1e6:.0f} megapixels ({width} x {height})"
        raise PictureError(f"{name}: expected at most {max_pixels / 1e6:g} megapixels, got {millions}; scale it down")


def _check_frames(image: Image.Image, path: Path) -> None:
    if image.format == "MPO":  # a camera's JPEG with previews behind it: the first picture is the photograph
        return
    try:
        frames = getattr(image, "n_frames", 1)
    except Exception as error:  # counting the frames parses the whole file
        raise PictureError(f"{path}: the picture is damaged ({error}); get an intact copy") from error
    if frames > 1:
        kind = "pages" if image.format == "TIFF" else "frames"
        raise PictureError(f"{path}: expected one picture, got {frames} {kind}; save the one to edit as PNG")


def _check_planes(image: Image.Image, path: Path) -> None:
    """Refuse what Pillow would read wrongly: it takes 16-bit colour in separate planes for 8-bit colour."""
    if not isinstance(image, TiffImageFile) or not is_deep_colour(image) or has_deep_colour():
        return
    if image.tile and (image.tile[0][3] or " ")[0] == "R":  # its raw mode
        raise PictureError(f"{path}: reading 16-bit colour that is stored in planes needs pyvips: {INSTALL}")

"""Files -> Photos: a path or a PIL image enters, a `Photo` leaves, or a `PictureError` that says what to do.

A picture is never guessed at: what is damaged, animated, too large or of an unknown kind is refused.
"""

from __future__ import annotations

import io
import math
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageFile, ImageOps, UnidentifiedImageError

from openwu.errors import PictureError
from openwu.pictures.photo import Photo, Pixels, profile_space

MAX_PIXELS = 100_000_000
"""Largest picture that is decoded, in pixels; the header is looked at first."""

READABLE = ("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "BMP", "GIF", "PPM", "JPEG2000")
"""Pillow's names of the formats that are read. Others (EPS, PDF, ...) run foreign programs or hold no photograph."""

_READABLE_IN_WORDS = "JPEG, PNG, WebP, TIFF, AVIF, BMP, GIF, PPM or JPEG 2000"

_LAYOUT_TAGS = (
    *range(0x00FE, 0x0104),  # page kind, width, length, bits, compression
    *(0x0106, 0x010A, 0x0111, 0x0112, 0x0115, 0x0116, 0x0117, 0x011C, 0x013D),  # colour model, strips, orientation
    *(0x0140, 0x0142, 0x0143, 0x0144, 0x0145, 0x014A, 0x0152, 0x0153, 0x015B),  # palette, tiles, extra samples
    *(0x0201, 0x0202, 0x0211, 0x0212, 0x0213, 0x0214),  # thumbnail, YCbCr
    *(0x02BC, 0x83BB, 0x8649, 0x8773),  # XMP, IPTC, Photoshop, ICC: whole blocks that Pillow keeps elsewhere
)
"""EXIF tags that describe how the old file stored its pixels; wrong in the new one."""

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
        return PictureHeader(image.size, str(image.format), image.mode, image.has_transparency_data, _lost_bits(image))


def read_picture(picture: str | Path | Image.Image, *, max_pixels: int = MAX_PIXELS) -> Photo:
    """Read a picture upright, as RGB, with what must survive beside it. An opened PIL image gives its current frame."""
    if isinstance(picture, Image.Image):
        with _strict_pillow():
            _check_size(picture, "picture", max_pixels)
            return _decode(picture, "picture")
    if not isinstance(picture, str | Path):
        raise PictureError(f"picture: expected a path or a PIL image, got {type(picture).__name__}")
    with _strict_pillow(), _opened(Path(picture), max_pixels) as image:
        return _decode(image, str(picture))


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
    """Open a file, check its header, and close it at the end."""
    _check_file(path)
    Image.init()  # registers every format; naming one that is not registered yet is an error in Pillow
    try:
        image = Image.open(path, formats=[name for name in READABLE if name in Image.OPEN])
    except UnidentifiedImageError:
        _explain_unidentified(path)
    except OSError as error:
        raise PictureError(f"{path}: cannot be read: {error.strerror or error}; check the disk") from error
    except Exception as error:  # Pillow's parsers raise anything at all on damaged headers
        raise PictureError(f"{path}: the picture is damaged ({error}); get an intact copy") from error
    with image:
        _check_size(image, str(path), max_pixels)
        _check_frames(image, path)
        yield image


def _check_file(path: Path) -> None:
    try:
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            raise PictureError(f"{path}: expected a picture, got a folder; name the pictures in it")
        if not stat.S_ISREG(found.st_mode):
            raise PictureError(f"{path}: expected a picture file, got a device or pipe; save it as a file first")
        if found.st_size == 0:
            raise PictureError(f"{path}: the file is empty; get an intact copy")
        with path.open("rb"):
            pass
    except FileNotFoundError:
        raise PictureError(f"{path}: no such file; check the name and the folder") from None
    except PermissionError:
        raise PictureError(f"{path}: no permission to read it; change its permissions or copy it") from None
    except OSError as error:
        raise PictureError(f"{path}: cannot be read: {error.strerror or error}; check the name") from None
    except ValueError:
        raise PictureError(f"{str(path)!r}: not a file name; check for NUL characters") from None


def _explain_unidentified(path: Path) -> NoReturn:
    """Say why Pillow did not know the file, as far as its first bytes tell."""
    with path.open("rb") as file:
        head = file.read(32)
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"mif1", b"msf1"):
        raise PictureError(f"{path}: HEIC pictures cannot be read; save it as JPEG, PNG or TIFF first")
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


def _lost_bits(image: Image.Image) -> tuple[str, ...]:
    """Pillow decodes 16-bit colour to its upper 8 bits; the raw mode that it chose tells."""
    tiles = getattr(image, "tile", None) or [()]
    if image.mode in ("RGB", "RGBA") and ";16" in str(tiles[0]):
        return ("16 bits per channel are read as 8: Pillow has no 16-bit colour",)
    return ()


def _decode(image: Image.Image, name: str) -> Photo:
    notes = list(_lost_bits(image))
    mode, kind = image.mode, image.format
    try:
        image.load()
        exif, orientation = _read_exif(image, notes)
        dpi = _read_dpi(image.info.get("dpi"), swapped=orientation >= 5)
        icc = image.info.get("icc_profile") or None
        if orientation > 1:
            image = ImageOps.exif_transpose(image)
        pixels, alpha, grey, icc = _read_pixels(image, icc, name, notes)
    except PictureError:
        raise
    except MemoryError:
        width, height = image.size
        raise PictureError(f"{name}: not enough memory for {width} x {height} pixels; scale it down") from None
    except Exception as error:  # Pillow's decoders raise anything at all on damaged data
        raise PictureError(f"{name}: the picture is damaged or cut short ({error}); get an intact copy") from error
    return Photo(pixels, alpha, grey, icc, exif, dpi, kind, mode, tuple(notes))


def _read_exif(image: Image.Image, notes: list[str]) -> tuple[bytes | None, int]:
    """EXIF that stays true of an upright, edited picture; and how the file has it: 1 upright, 5 to 8 on its side."""
    try:
        exif = image.getexif()
        stored = exif.get(ExifTags.Base.Orientation)
        orientation = stored if isinstance(stored, int) and 1 <= stored <= 8 else 1
        kept = Image.Exif()
        kept.load(exif.tobytes())
        for tag in _LAYOUT_TAGS:
            kept.pop(tag, None)
        detail = kept.get_ifd(ExifTags.IFD.Exif)
        for tag in (ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight):
            detail.pop(tag, None)
        if not len(kept) and not detail:
            return None, orientation
        return kept.tobytes(), orientation
    except Exception:  # EXIF is written by everything and anything; a broken block must not cost the picture
        notes.append("its EXIF data is damaged and was left out")
        return None, 1


def _read_dpi(dpi: object, *, swapped: bool) -> tuple[float, float] | None:
    if not isinstance(dpi, tuple) or len(dpi) != 2:
        return None
    try:
        across, down = float(dpi[0]), float(dpi[1])
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    if not all(math.isfinite(value) and 1 < value < 1e6 for value in (across, down)):  # 1: Pillow's word for none
        return None
    return (down, across) if swapped else (across, down)


def _read_pixels(
    image: Image.Image, icc: bytes | None, name: str, notes: list[str]
) -> tuple[Pixels, NDArray[np.uint8] | None, bool, bytes | None]:
    """(pixels `[h, w, 3]`, alpha `[h, w]` or None, grey, the profile that the pixels are in now)."""
    if image.mode == "F":
        raise PictureError(f"{name}: floating-point pixels have no agreed white; save it with 8 or 16 bits first")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return *_read_16_bit(image, name), True, icc
    if image.mode in ("CMYK", "LAB"):
        return _triple(_to_srgb(image, icc, notes)), None, False, None
    if icc and profile_space(icc) == "CMYK":  # left behind when somebody else converted the picture
        icc = None
    grey = image.mode in ("1", "L", "LA", "La")
    if not image.has_transparency_data:
        return _triple(image), None, grey, icc
    whole = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return _triple(whole), np.array(whole.getchannel("A"), dtype=np.uint8), grey, icc


def _read_16_bit(image: Image.Image, name: str) -> tuple[Pixels, NDArray[np.uint8] | None]:
    """Whole numbers of 16 bits (mode I;16, or I where Pillow chose 32) `[h, w]` -> pixels and alpha."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise PictureError(f"{name}: expected up to 16 bits per pixel, got 32; save it with 8 or 16 bits first")
    clear = image.info.get("transparency")
    alpha = None if clear is None else np.where(values == clear, 0, 255).astype(np.uint8)
    return np.repeat(values.astype(np.uint16)[:, :, None], 3, axis=2), alpha


def _to_srgb(image: Image.Image, icc: bytes | None, notes: list[str]) -> Image.Image:
    """CMYK or Lab -> sRGB through its own profile, or by Pillow's plain formula where there is none."""
    if image.mode == "CMYK" and icc:
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
            converted = ImageCms.profileToProfile(
                image,
                profile,
                ImageCms.createProfile("sRGB"),
                renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
                outputMode="RGB",
                flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
            )
            assert converted is not None
            return converted
        except (ImageCms.PyCMSError, OSError):
            notes.append("its CMYK profile is damaged; converted without it")
    return image.convert("RGB")


def _triple(image: Image.Image) -> NDArray[np.uint8]:
    """`[h, w, 3]` of our own, whatever 8-bit mode comes."""
    return np.array(image.convert("RGB"), dtype=np.uint8)

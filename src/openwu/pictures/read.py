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
from typing import BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageFile, ImageOps, UnidentifiedImageError, features
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile

from openwu.errors import PictureError
from openwu.pictures.formats import HEIF_BRANDS, INSTALL, decode_deep, has_deep_colour, has_heif
from openwu.pictures.photo import Photo, Pixels, profile_space

MAX_PIXELS = 100_000_000
"""Largest picture that is decoded, in pixels; the header is looked at first."""

READABLE = ("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF", "BMP", "GIF", "PPM", "JPEG2000")
"""Pillow's names of the formats that are read. Others (EPS, PDF, ...) run foreign programs or hold no photograph."""

_READABLE_IN_WORDS = "JPEG, PNG, WebP, TIFF, AVIF, HEIC, BMP, GIF, PPM or JPEG 2000"

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
        notes = _lost_bits(image, from_file=True)
        return PictureHeader(image.size, str(image.format), image.mode, image.has_transparency_data, notes)


def read_picture(picture: str | Path | Image.Image, *, max_pixels: int = MAX_PIXELS) -> Photo:
    """Read a picture upright, as RGB, with what must survive beside it. An opened PIL image gives its current frame."""
    if isinstance(picture, Image.Image):
        with _strict_pillow():
            _check_size(picture, "picture", max_pixels)
            return _decode(picture, "picture")
    if not isinstance(picture, str | Path):
        raise PictureError(f"picture: expected a path or a PIL image, got {type(picture).__name__}")
    with _strict_pillow(), _opened(Path(picture), max_pixels) as image:
        return _decode(image, str(picture), Path(picture))


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
    if not isinstance(image, TiffImageFile) or not _is_deep_colour(image) or has_deep_colour():
        return
    if image.tile and (image.tile[0][3] or " ")[0] == "R":  # its raw mode
        raise PictureError(f"{path}: reading 16-bit colour that is stored in planes needs pyvips: {INSTALL}")


def _lost_bits(image: Image.Image, *, from_file: bool) -> tuple[str, ...]:
    """What reading does with more than 8 bits per channel of colour, where it does not keep them."""
    bits = _colour_bits(image)
    if bits <= 8:
        return ()
    if not _is_deep_colour(image):
        return (f"{bits} bits per channel are read as 8",)
    if from_file and has_deep_colour():
        return ()
    cure = "give the file instead" if has_deep_colour() else INSTALL
    return (f"16 bits per channel are read as 8; to keep 16: {cure}",)


def _is_deep_colour(image: Image.Image) -> bool:
    """Whether this is a PNG or TIFF file of 16-bit RGB, which Pillow decodes to its upper 8 bits."""
    return image.mode in ("RGB", "RGBA") and image.format in ("PNG", "TIFF") and _colour_bits(image) == 16


def _colour_bits(image: Image.Image) -> int:
    """Bits per channel of the file, as far as it is known to have more than Pillow's 8."""
    if image.mode not in ("RGB", "RGBA", "CMYK"):
        return 8
    if isinstance(image, TiffImageFile):
        return int(np.max(image.tag_v2.get(BITSPERSAMPLE, 8)))
    if image.format == "HEIF":
        return int(image.info.get("bit_depth", 8))
    return 16 if ";16" in str(getattr(image, "tile", None)) else 8  # the raw mode that Pillow chose


def _decode(image: Image.Image, name: str, file: Path | None = None) -> Photo:
    notes = list(_lost_bits(image, from_file=file is not None))
    mode, kind = image.mode, image.format
    deep = file if _is_deep_colour(image) and has_deep_colour() else None
    stored = image.tag_v2.get(ExifTags.Base.Orientation) if isinstance(image, TiffImageFile) else 1
    try:
        image.load()  # turns a TIFF upright and forgets how it lay
        exif, orientation = _read_exif(image, notes)
        turned = max(_orientation(stored), orientation)
        dpi = _read_dpi(image.info.get("dpi"), swapped=turned >= 5)
        icc = image.info.get("icc_profile") or None
        if icc and profile_space(icc) == "CMYK" and mode != "CMYK":  # left behind when somebody else converted it
            icc = None
        if deep:
            values = _upright(decode_deep(deep.read_bytes()), turned)
            pixels, alpha, grey = _split(values, image.has_transparency_data)
        else:
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
        orientation = _orientation(exif.get(ExifTags.Base.Orientation))
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


def _orientation(tag: object) -> int:
    return tag if isinstance(tag, int) and 1 <= tag <= 8 else 1


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
) -> tuple[Pixels, Pixels | None, bool, bytes | None]:
    """(pixels `[h, w, 3]`, alpha `[h, w]` or None, grey, the profile that the pixels are in now)."""
    if image.mode == "F":
        raise PictureError(f"{name}: floating-point pixels have no agreed white; save it with 8 or 16 bits first")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return *_read_16_bit(image, name), True, icc
    if image.mode in ("CMYK", "LAB"):
        return _triple(_to_srgb(image, icc, notes)), None, False, None
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


def _upright(values: NDArray[np.uint16], orientation: int) -> NDArray[np.uint16]:
    """Channels `[h, w, c]` as stored -> as the EXIF orientation wants them seen."""
    if orientation >= 5:
        values = values.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    return values[::-1] if orientation in (3, 4, 7, 8) else values


def _split(values: NDArray[np.uint16], transparent: bool) -> tuple[Pixels, Pixels | None, bool]:
    """16-bit channels `[h, w, c]` -> (pixels `[h, w, 3]`, alpha `[h, w]` or None, grey)."""
    grey = values.shape[2] <= 2
    alpha = values[:, :, -1].copy() if transparent and values.shape[2] in (2, 4) else None
    return np.repeat(values[:, :, :1], 3, axis=2) if grey else values[:, :, :3].copy(), alpha, grey


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

"""Read pictures: files, bytes, arrays and PIL images become a `Photo`, or a `PictureError` says what to do.

A picture is never guessed at: what is damaged, animated, too large or of an unknown kind is refused. Here a file is
opened and its header checked; `decode.py` makes a `Photo` of what was opened.
"""

from __future__ import annotations

import io
import struct
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from os import PathLike
from typing import IO, TYPE_CHECKING, Any, NoReturn, Union

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, PngImagePlugin, UnidentifiedImageError, features

from openwu.errors import PictureError
from openwu.images.containers import MAX_HEADER, Declared, declared
from openwu.images.decode import decode_image, decode_tiff, header_notes
from openwu.images.formats import HEIF_BRANDS, INSTALL, has_heif
from openwu.images.photo import Photo
from openwu.images.source import PNG_SIGNATURE, Source, opened
from openwu.images.tiff import Tiff
from openwu.images.tiff_pixels import TiffPicture, layout, without_lines

if TYPE_CHECKING:
    from torch import Tensor

File = str | PathLike[str] | bytes | bytearray | memoryview | IO[bytes]
"""A path, the bytes of a picture file, or an open file."""

Readable = Union[File, Image.Image, NDArray[Any], "Tensor", Photo]
"""What `read_picture` takes."""

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


@dataclass(frozen=True)
class _Opened:
    """A file whose header has passed: a TIFF picture, or what Pillow opened, or both."""

    source: Source
    facts: Declared
    image: Image.Image | None = None
    tiff: TiffPicture | None = None

    def header(self) -> PictureHeader:
        if self.image is None:
            assert self.tiff is not None
            size, mode = self.tiff.page.size, self.tiff.mode
            return PictureHeader(size, "TIFF", mode, self.tiff.has_alpha, tuple(self.tiff.notes))
        image, notes = self.image, header_notes(self.image, self.facts, from_file=True)
        return PictureHeader(image.size, str(image.format), image.mode, image.has_transparency_data, tuple(notes))

    def photo(self) -> Photo:
        if self.image is None:
            assert self.tiff is not None
            return decode_tiff(self.tiff)
        return decode_image(self.image, self.facts, self.source, self.tiff)


def check_picture(picture: File, *, max_pixels: int = MAX_PIXELS) -> PictureHeader:
    """Read only the header: cheap, and finds everything but damage to the pixels themselves. Raises PictureError."""
    with _strict_pillow(), _open(picture, max_pixels) as found:
        return found.header()


def read_picture(picture: Readable, *, max_pixels: int = MAX_PIXELS) -> Photo:
    """Read a picture upright, as RGB, with what must survive beside it. Raises PictureError.

    A path, the bytes of a file or a file object; a PIL image (its current frame); an array `[h, w]` or `[h, w, c]` of
    uint8, uint16 or floats in 0..1; a tensor `[c, h, w]` or `[1, c, h, w]` of the same. c: 1 grey, 2 grey and alpha,
    3 RGB, 4 RGB and alpha. Floats become 16 bits. A `Photo` is taken as it is. `photo.notes` says what was
    converted or left out.
    """
    if isinstance(picture, Photo):
        return picture
    if isinstance(picture, np.ndarray):
        return _from_array(picture, max_pixels)
    torch = sys.modules.get("torch")  # who holds a tensor has imported it
    if torch is not None and isinstance(picture, torch.Tensor):
        return _from_tensor(picture, max_pixels)
    if isinstance(picture, Image.Image):
        with _strict_pillow(), _damage_explained("picture", picture.size):
            _check_size(*picture.size, "picture", max_pixels)
            return decode_image(picture, Declared(), None)
    with (
        _strict_pillow(),
        _open(picture, max_pixels) as found,
        _damage_explained(found.source.name, found.header().size),
    ):
        return found.photo()


def _from_array(values: NDArray[Any], max_pixels: int) -> Photo:
    if values.ndim == 2:
        values = values[:, :, None]
    if values.ndim != 3 or not 1 <= values.shape[2] <= 4:
        hint = "; move the channels last" if values.ndim == 3 and values.shape[0] <= 4 else ""
        raise PictureError(f"picture: expected an array [h, w] or [h, w, 1 to 4], got {values.shape}{hint}")
    height, width, count = values.shape
    _check_size(width, height, "picture", max_pixels)
    if np.issubdtype(values.dtype, np.floating):
        low, high = float(values.min()), float(values.max())
        if not (low >= -1e-6 and high <= 1 + 1e-6):  # NaN fails both
            raise PictureError(f"picture: expected floats from 0 to 1, got {low:.4g} to {high:.4g}; scale them to 0..1")
        values = np.rint(np.clip(values.astype(np.float64), 0, 1) * 65535).astype(np.uint16)
    elif values.dtype not in (np.uint8, np.uint16):
        raise PictureError(f"picture: expected uint8, uint16 or floats from 0 to 1, got {values.dtype}; convert it")
    grey, alpha = count <= 2, values[:, :, -1].copy() if count in (2, 4) else None
    colours = np.repeat(values[:, :, :1], 3, axis=2) if grey else values[:, :, :3].copy()
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[count]
    return Photo(colours, alpha, grey, mode="I;16" if mode == "L" and colours.dtype == np.uint16 else mode)


def _from_tensor(picture: Tensor, max_pixels: int) -> Photo:
    shape = tuple(picture.shape)
    if picture.ndim == 4 and shape[0] == 1:
        picture = picture[0]
    if picture.ndim != 3 or not 1 <= picture.shape[0] <= 4:
        raise PictureError(f"picture: expected a tensor [1 to 4, h, w] or [1, 1 to 4, h, w], got {shape}")
    values = picture.detach().permute(1, 2, 0).cpu()
    return _from_array((values.float() if values.is_floating_point() else values).numpy(), max_pixels)


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Pillow with our size limits in place of its own, no tolerance for truncated files and no warnings on stderr.

    These are settings of the whole process: a lock keeps our threads apart, and the caller's values come back.
    """
    wanted: list[tuple[Any, str, Any]] = [
        (Image, "MAX_IMAGE_PIXELS", None),  # decoding starts after a look at every size that a header names
        (ImageFile, "LOAD_TRUNCATED_IMAGES", False),
        (PngImagePlugin, "MAX_TEXT_CHUNK", MAX_HEADER),  # profiles of printers are larger than Pillow's megabyte
        (PngImagePlugin, "MAX_TEXT_MEMORY", 4 * MAX_HEADER),
    ]
    with _pillow, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = [(module, name, getattr(module, name)) for module, name, _ in wanted]
        for module, name, value in wanted:
            setattr(module, name, value)
        try:
            yield
        finally:
            for module, name, value in before:
                setattr(module, name, value)


@contextmanager
def _damage_explained(name: str, size: tuple[int, int]) -> Iterator[None]:
    """What decoders raise -> a PictureError that says what to do."""
    try:
        yield
    except PictureError:
        raise
    except MemoryError:
        width, height = size
        raise PictureError(f"{name}: not enough memory for {width} x {height} pixels; scale it down") from None
    except Exception as error:  # Pillow's decoders raise anything at all on damaged data
        raise _explained(name, error) from error


def _explained(name: str, error: Exception) -> PictureError:
    """An operating system's error names what it is; others are about the contents."""
    if isinstance(error, Image.DecompressionBombError):
        return PictureError(f"{name}: a frame of it is too large ({error}); scale it down")
    words = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    if isinstance(error, OSError) and error.errno:
        return PictureError(f"{name}: cannot be read: {error.strerror or words}; check the disk")
    if "nsupported" in words or "not supported" in words or "nknown" in words:
        return PictureError(f"{name}: is of a kind that is not supported ({words}); save it as PNG or JPEG")
    return PictureError(f"{name}: the picture is damaged or cut short ({words}); get an intact copy")


@contextmanager
def _open(picture: object, max_pixels: int) -> Iterator[_Opened]:
    if not isinstance(picture, str | PathLike | bytes | bytearray | memoryview) and not hasattr(picture, "read"):
        raise PictureError(
            "picture: expected a path or a PIL image, an array, a tensor, the bytes of a file or an open file, "
            f"got {type(picture).__name__}"
        )
    with opened(picture) as source:  # type: ignore[arg-type]  # any object with a method read
        tiff = _tiff(source, max_pixels)
        if tiff is not None and tiff.layout is not None:
            yield _Opened(source, Declared(), tiff=tiff)
            return
        facts = Declared() if tiff else declared(source, max_pixels)
        if source.at(0, 4) == b"GIF8":  # Pillow's own check of every frame, which raises above twice its limit
            Image.MAX_IMAGE_PIXELS = max_pixels // 2
        with without_lines() if tiff else nullcontext(), _identified(source, tiff) as image:
            _check_size(*image.size, source.name, max_pixels)
            _check_frames(image, source.name)
            yield _Opened(source, facts, image, tiff)


def _tiff(source: Source, max_pixels: int) -> TiffPicture | None:
    """The picture of a TIFF file; None for other files. PictureError for what cannot be read of one."""
    if source.at(0, 4) not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return None
    try:
        file = Tiff(source)
        page = file.primary()
        width, height = page.size
        _check_size(width, height, source.name, max_pixels)
        found = TiffPicture(file, page, layout(page, source.name))
    except (ValueError, struct.error, OverflowError, MemoryError) as error:
        raise PictureError(f"{source.name}: the picture is damaged ({error}); get an intact copy") from error
    tile = page.number(0x142, 0) * page.number(0x143, 0)
    if tile > max(max_pixels, 2**20):
        raise PictureError(f"{source.name}: its tiles are of {tile / 1e6:.0f} megapixels; save it as PNG")
    return found


def _identified(source: Source, tiff: TiffPicture | None) -> Image.Image:
    """Let Pillow open the file: a TIFF with its primary picture first."""
    Image.init()  # registers every format; naming one that is not registered yet is an error in Pillow
    head = source.at(0, 32)
    if _begins_like_heif(head):
        has_heif()
    moved = tiff is not None and tiff.page.offset != tiff.file.first
    file = io.BytesIO(tiff.file.alone(tiff.page)) if tiff and moved else source.file
    file.seek(0)
    try:
        return Image.open(file, formats=[name for name in READABLE if name in Image.OPEN])
    except UnidentifiedImageError:
        _explain_unidentified(source.name, head, tiff)
    except Exception as error:  # Pillow's parsers raise anything at all on damaged headers
        raise _explained(source.name, error) from error


def _begins_like_heif(head: bytes) -> bool:
    return head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS


def _explain_unidentified(name: str, head: bytes, tiff: TiffPicture | None) -> NoReturn:
    """Say why Pillow did not know the file, as far as its first bytes tell."""
    if _begins_like_heif(head) and not has_heif():
        raise PictureError(f"{name}: reading HEIC needs pillow-heif: {INSTALL}; or save it as JPEG, PNG or TIFF")
    if head[4:12] in (b"ftypavif", b"ftypavis") and not features.check("avif"):
        raise PictureError(f"{name}: reading AVIF needs Pillow 11.3 or later: pip install -U pillow")
    if head.startswith(PNG_SIGNATURE) and len(head) >= 24 and b"\0\0\0\0" in (head[16:20], head[20:24]):
        raise PictureError(f"{name}: the picture is zero pixels wide or high; get an intact copy")
    if tiff is not None:
        page = tiff.page
        raise PictureError(
            f"{name}: this kind of TIFF is not supported (colour model {page.number(0x106, 1)}, compression "
            f"{page.number(0x103, 1)}, bits {page.numbers(0x102, (1,))}); save it as 8- or 16-bit RGB"
        )
    raise PictureError(f"{name}: expected {_READABLE_IN_WORDS}, got something else or a damaged file; check the file")


def _check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise PictureError(f"{name}: the picture is zero pixels wide or high ({width} x {height}); get an intact copy")
    if width * height > max_pixels:
        millions = f"{width * height / 1e6:.0f} megapixels ({width} x {height})"
        raise PictureError(f"{name}: expected at most {max_pixels / 1e6:g} megapixels, got {millions}; scale it down")


def _check_frames(image: Image.Image, name: str) -> None:
    """Refuse animations; HEIC and a camera's multi-picture JPEG have a primary picture, TIFF was looked at before."""
    if image.format in ("MPO", "HEIF", "TIFF"):
        return
    try:
        frames = int(getattr(image, "n_frames", 1))  # only plugins of formats with frames have it
    except Exception as error:  # counting the frames parses the whole file
        raise _explained(name, error) from error
    if frames > 1:
        raise PictureError(f"{name}: expected one picture, got {frames} frames; save the one to edit as PNG")

"""Open what a caller calls a picture file (a path, bytes or a file object) as a seekable source of bytes.

Refuses what is no picture file, and camera raw files by name: what ordinary decoders find in those is a thumbnail.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

from openwu.errors import PictureError

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

RAW_SIGNATURES = (
    (0, b"IIU\0", "Panasonic"),
    (0, b"IIRO", "Olympus"),
    (0, b"IIRS", "Olympus"),
    (0, b"MMOR", "Olympus"),
    (0, b"FUJIFILMCCD-RAW", "Fujifilm"),
    (0, b"FOVb", "Sigma"),
    (0, b"\0MRM", "Minolta"),
    (0, b"\0MRI", "Minolta"),
    (4, b"ftypcrx ", "Canon"),
    (6, b"HEAPCCDR", "Canon"),
    (8, b"CR\x02\0", "Canon"),
    (8, b"IIII", "Phase One"),
    (8, b"MMMM", "Phase One"),
)
"""(offset, bytes there, maker) of camera raw files; others are recognised by their TIFF tags."""

RAW_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("3fr", "arw", "cr2", "cr3", "crw", "dcr", "dng", "erf", "fff", "iiq", "kdc", "mef", "mos", "mrw", "nef"),
        *("nrw", "orf", "pef", "raf", "raw", "rw2", "rwl", "sr2", "srf", "srw", "x3f"),
    )
)


@dataclass(frozen=True)
class Source:
    """The bytes of one picture file; `name` is the picture's in errors."""

    name: str
    file: BinaryIO

    def at(self, offset: int, length: int) -> bytes:
        """The bytes at an offset, fewer than `length` where the file ends."""
        if offset < 0:
            raise ValueError(f"negative offset {offset}")
        self.file.seek(offset)
        return self.file.read(length)

    def everything(self) -> bytes:
        """The whole file."""
        self.file.seek(0)
        return self.file.read()

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self.file.seek(0, os.SEEK_END)


@contextmanager
def opened(picture: str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes]) -> Iterator[Source]:
    """Open a path, the bytes of a file, or a file object (read from where it stands, and left open)."""
    if isinstance(picture, str | os.PathLike):
        path = Path(picture)
        with _open_path(path) as file:
            yield _checked(Source(str(picture), file), path.suffix)
        return
    name = "picture"
    if isinstance(picture, bytes | bytearray | memoryview):
        data = bytes(picture)
    else:
        given = getattr(picture, "name", None)  # files have one, BytesIO does not
        name = given if isinstance(given, str) else name
        data = _read_all(picture, name)
    if not data:
        raise PictureError(f"{name}: expected the bytes of a picture file, got none; rewind the file object")
    yield _checked(Source(name, io.BytesIO(data)), Path(name).suffix)


def refuse_raw(name: str, maker: str) -> PictureError:
    """The error for a camera raw file."""
    return PictureError(
        f"{name}: expected a developed photograph, got a camera raw file ({maker}); open it in a raw converter "
        "(darktable, RawTherapee, the camera's own) and export it as TIFF or JPEG"
    )


def _checked(source: Source, suffix: str) -> Source:
    head = source.at(0, 32)
    for offset, mark, maker in RAW_SIGNATURES:
        if head[offset : offset + len(mark)] == mark:
            raise refuse_raw(source.name, maker)
    if suffix.lower() in RAW_SUFFIXES and head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        raise refuse_raw(source.name, suffix.lower())
    return source


def _read_all(file: IO[bytes], name: str) -> bytes:
    try:
        data = file.read()
    except (OSError, ValueError) as error:
        raise PictureError(f"{name}: the file object cannot be read ({error}); pass it open and readable") from error
    if not isinstance(data, bytes | bytearray):
        raise PictureError(f"{name}: expected a file opened in binary mode, got {type(data).__name__}; open it as 'rb'")
    return bytes(data)


def _open_path(path: Path) -> BinaryIO:
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

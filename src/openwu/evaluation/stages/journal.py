"""Append-only JSONL that survives being killed at any moment, and the lock that keeps a second process out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openwu.errors import OpenwuError
from openwu.files.locking import take_lock

LOCK = ".lock"


class Journal:
    """A JSONL file that only grows: a line is on the disk as a whole, or it does not count."""

    def __init__(self, path: Path) -> None:
        """`path`: the file; it need not exist."""
        self.path = path

    def lines(self) -> list[dict[str, Any]]:
        """Read all complete lines; an unfinished last one, of a killed process, is left out.

        Raises OpenwuError with the number of a line that is complete and broken.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise OpenwuError(f"{self.path}: cannot be read ({error.strerror or error})") from error
        found = []
        for number, line in enumerate(data.split(b"\n")[:-1], start=1):
            try:
                value = json.loads(line)
                if not isinstance(value, dict):
                    raise ValueError("not an object")
            except ValueError as error:
                raise OpenwuError(
                    f"{self.path}:{number}: expected a JSON object a line, got {line[:60]!r} ({error}); "
                    "remove this line, and its result is computed again"
                ) from error
            found.append(value)
        return found

    def append(self, value: Mapping[str, object]) -> None:
        """Write one line and sync it to the disk.

        Raises OpenwuError where that fails (a full disk, say); the file is then as it was before.
        """
        line = json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"
        try:
            with self.path.open("r+b" if self.path.exists() else "w+b", buffering=0) as file:
                end = _complete_length(file.fileno(), file.seek(0, os.SEEK_END))
                file.truncate(end)
                file.seek(end)
                try:
                    _write_all(file.fileno(), line)
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(end)
                    raise
        except OSError as error:
            raise OpenwuError(
                f"{self.path}: cannot be written ({error.strerror or error}); what was recorded before is kept: make "
                "room and repeat the command to go on"
            ) from error


def _complete_length(descriptor: int, size: int) -> int:
    """Return the length up to and with the last line break."""
    end = size
    while end > 0:
        start = max(0, end - 65536)
        os.lseek(descriptor, start, os.SEEK_SET)
        at = os.read(descriptor, end - start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other process out of a folder; the lock goes with this process, however it ends.

    Raises OpenwuError that names the process where another one holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        if not take_lock(file.fileno()):
            file.seek(0)
            raise OpenwuError(
                f"{folder}: another process ({file.read().strip() or 'unknown'}) works in this folder; wait for it, or "
                "choose another --output"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()}")
        file.flush()
        yield

"""Pictures that another tool made, in a folder with one file for each case, as a system."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from openwu.errors import OpenwuError, PictureError
from openwu.evaluation.cases import Case
from openwu.evaluation.systems import MissingError, System
from openwu.files.hashing import of_files
from openwu.images import read_picture

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LAYOUTS = ("{key}", "fullset/{task}/{language}/{key}", "{task}/{language}/{key}", "{language}/{key}", "{task}/{key}")
"""Where a case's picture may be; the second is GEdit-Bench's. {key} is the benchmark's own key."""


class OutputsFolder(System):
    """Finds `FOLDER/{key}.png`, or GEdit-Bench's `FOLDER/fullset/{task}/{language}/{key}.png`."""

    def __init__(self, folder: str | Path, *, name: str | None = None) -> None:
        """Raises OpenwuError where there is no such folder."""
        self.folder = Path(folder)
        self.name = name or self.folder.resolve().name
        if not self.folder.is_dir():
            raise OpenwuError(f"--outputs: expected a folder of pictures, got {self.folder}")
        self._files = {
            file.relative_to(self.folder).with_suffix("").as_posix(): file
            for suffix in reversed(SUFFIXES)
            for file in sorted(self.folder.rglob(f"*{suffix}"))
        }

    def identity(self) -> dict[str, object]:
        return {"kind": "folder"}

    def identity_of(self, case: Case, /) -> dict[str, object]:
        file = self.file_of(case)
        return {"file": None if file is None else of_files([file]).hexdigest()}

    def edit(self, case: Case) -> Image.Image:
        """Read the case's picture. Raises MissingError where there is none or it cannot be read."""
        file = self.file_of(case)
        if file is None:
            raise MissingError(f"{self.folder}: expected a picture for case {case.key!r}, found none")
        try:
            return read_picture(file).to_image()
        except PictureError as error:
            raise MissingError(str(error)) from error

    def file_of(self, case: Case) -> Path | None:
        """Return the file of a case; None where there is none."""
        key = case.key.rpartition("/")[2]
        names = [case.key, *(each.format(key=key, task=case.task, language=case.language) for each in LAYOUTS)]
        names += [name.replace("/zh/", "/cn/") for name in names if "/zh/" in f"/{name}"]
        return next((self._files[name] for name in names if name in self._files), None)

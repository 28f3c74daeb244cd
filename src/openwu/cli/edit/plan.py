"""Plan what one `openwu edit` writes: a `Job` with every path for each photo, checked before any work."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from openwu.cli.console import UsageError
from openwu.cli.edit.find import PIPE, Found, Input, is_file, is_folder
from openwu.errors import PictureError
from openwu.images import (
    PictureHeader,
    check_fits,
    check_output,
    check_picture,
    default_suffix,
    is_picture_suffix,
    read_picture,
)
from openwu.video.probe import Clip, is_clip, probe
from openwu.video.write import check_clip_output, clip_suffix

Identity = tuple[int, int]
"""Device and inode of a file."""


@dataclass(frozen=True)
class Job:
    """One photo and every path that its edit writes."""

    photo: Input
    output: Path | None
    """None: standard output."""
    comparison: Path | None = None
    adapter_folder: Path | None = None

    @property
    def name(self) -> str:
        """The photo's path, for messages."""
        return str(self.photo.path)

    @property
    def target(self) -> str:
        """The output, for messages."""
        return PIPE if self.output is None else str(self.output)

    @property
    def source(self) -> str | bytes:
        """What the editor reads."""
        return str(self.photo.path) if self.photo.data is None else self.photo.data

    @property
    def pictures(self) -> tuple[Path, ...]:
        return tuple(path for path in (self.output, self.comparison) if path is not None)

    @property
    def writes(self) -> tuple[Path, ...]:
        return self.pictures if self.adapter_folder is None else (*self.pictures, self.adapter_folder)


@dataclass(frozen=True)
class Plan:
    """All jobs of a command line."""

    jobs: tuple[Job, ...]
    inputs: Mapping[Identity, Path]
    """Files that must not be replaced: photos, references, examples and the mask."""
    batch: bool
    overwrite: bool

    def is_done(self, job: Job) -> bool:
        """Whether a run before has written all of a job, so that a batch that goes on can skip it."""
        if not self.batch or self.overwrite or any(self._input_at(path) for path in job.pictures):
            return False
        return all(is_file(path) for path in job.pictures) and (
            job.adapter_folder is None or _holds_files(job.adapter_folder)
        )

    def check(self, job: Job) -> PictureHeader | Clip:
        """Read the file's header and look at the places of all outputs. Raises PictureError for what would fail."""
        header = probe(job.photo.path) if job.photo.is_clip else check_picture(job.source)
        for path in job.pictures:
            if (source := self._input_at(path)) is not None:
                raise PictureError(f"{path}: the output is the input {source}; choose another name")
        if isinstance(header, Clip):
            assert job.output is not None
            if is_folder(job.output.parent):
                check_clip_output(job.output, overwrite=self.overwrite)
            else:
                check_makeable(job.output.parent)
        elif job.output is not None:
            self._check_place(job.output, self.overwrite)
            check_fits(job.output, header.size, transparent=False)
            if header.has_alpha and job.output.suffix.lower() in (".jpg", ".jpeg"):
                check_fits(job.output, header.size, read_picture(job.source).transparent)
        # The output is written last. Where it is missing in a batch, what stands beside it is left of a run that was
        # stopped, and is replaced.
        replaced = self.overwrite or (self.batch and job.output is not None and not os.path.lexists(job.output))
        if job.comparison is not None:
            self._check_place(job.comparison, replaced)
        if job.adapter_folder is not None:
            _check_adapter_folder(job.adapter_folder, replaced)
        return header

    def _input_at(self, path: Path) -> Path | None:
        identity = _identity(path)
        return None if identity is None else self.inputs.get(identity)

    def _check_place(self, path: Path, overwrite: bool) -> None:
        if is_folder(path.parent) or not is_picture_suffix(path):
            check_output(path, overwrite=overwrite)
        else:
            check_makeable(path.parent)


def make_plan(
    found: Found,
    output: str | None,
    *,
    references: Sequence[str],
    compare: bool,
    adapter_folder: str | None,
    overwrite: bool,
) -> Plan:
    """Choose every path. Touches nothing; raises UsageError where two photos would write the same file."""
    folder = _output_folder(found, output)
    to_stdout = _to_stdout(found, output, compare)
    for clip in (each for each in found.photos if each.is_clip):
        if compare or to_stdout:
            refused = "--compare" if compare else "--output -"
            raise UsageError(f"{refused}: expected for photographs alone, and {clip.path} is a clip; leave it out")
    stems = Counter((_folder_of(photo, output, folder), photo.stem.casefold()) for photo in found.photos)
    jobs = []
    for photo in found.photos:
        beside = _folder_of(photo, output, folder)
        # Of two photos of one name, x.jpg and x.gif, the outputs keep the whole name.
        alone = stems[beside, photo.stem.casefold()] == 1
        name = photo.stem if alone or photo.data is not None else photo.path.name
        suffix = clip_suffix(photo.path) if photo.is_clip else default_suffix(photo.path)
        if to_stdout:
            target = None
        elif output is None:
            kept = photo.stem if suffix == photo.path.suffix else name
            target = beside / f"{kept}.edited{suffix}"
        elif folder is None:
            target = Path(output)
        else:
            kept = photo.stem if suffix == photo.path.suffix else name
            target = beside / f"{kept}{suffix}"
        comparison = None
        if compare and target is not None:
            comparison = target.parent / f"{target.stem if alone else target.name}.compare.png"
        adapter = Path(adapter_folder) if adapter_folder else None
        if adapter and found.batch:
            adapter = adapter / photo.inside / name
        jobs.append(Job(photo, target, comparison, adapter))
    _refuse_collisions(jobs)
    paths = [*(photo.path for photo in found.photos if photo.data is None), *map(Path, references)]
    inputs = {identity: path for path in paths if (identity := _identity(path)) is not None}
    return Plan(tuple(jobs), inputs, found.batch, overwrite)


def check_makeable(folder: Path) -> None:
    """Raise PictureError for a folder that does not exist and cannot be made."""
    try:
        folder.lstat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # a name that is too long, a place where nobody may look
        why = error.strerror if isinstance(error, OSError) else error
        raise PictureError(f"{folder}: the folder cannot be made: {why}; choose another") from None
    existing = next((parent for parent in (folder, *folder.absolute().parents) if os.path.lexists(parent)), folder)
    if not is_folder(existing):
        why = "is a file" if is_file(existing) else "cannot be searched"
        raise PictureError(f"{folder}: the folder cannot be made: {existing} {why}; choose another")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PictureError(f"{folder}: the folder cannot be made: no permission to write to {existing}; choose another")


def make_folder(folder: Path) -> None:
    """Make a folder and those around it; PictureError where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PictureError(f"{folder}: the folder cannot be made: {error.strerror or error}; choose another") from error


def _output_folder(found: Found, output: str | None) -> Path | None:
    """The folder that `--output` names; None when it names a file, standard output, or is not given."""
    if output is None or output == PIPE:
        return None
    if not output:
        raise UsageError("--output: expected a file or folder, got nothing; leave it out to write beside each photo")
    path = Path(output)
    if is_folder(path) or output.endswith(("/", os.sep)):
        return path
    if not found.batch:
        return None if path.suffix else path
    if os.path.lexists(path) or is_picture_suffix(path) or is_clip(path):
        many = f"{len(found.photos)} photos" if len(found.photos) > 1 else "any number of photos"
        raise UsageError(f"--output: expected a folder for {many}, got the file {output}; end it with /")
    return path


def _to_stdout(found: Found, output: str | None, compare: bool) -> bool:
    """Whether the one picture goes to standard output; raises UsageError for what cannot go there."""
    from_stdin = any(photo.data is not None for photo in found.photos)
    if output != PIPE and not (output is None and from_stdin):
        return False
    if found.batch:
        raise UsageError(f"--output: expected a folder for several photos, got {PIPE}, which holds one picture")
    if compare:
        raise UsageError("--compare: expected an output file to stand beside; add --output FILE, or leave it out")
    return True


def _folder_of(photo: Input, output: str | None, folder: Path | None) -> Path:
    """Where a photo's output stands."""
    if folder is not None:
        return folder / photo.inside
    return photo.path.parent if output is None else Path(output).parent


def _refuse_collisions(jobs: Sequence[Job]) -> None:
    """File systems may ignore case, so names that differ only in case count as the same."""
    owners: dict[str, Job] = {}
    for job in jobs:
        for path in job.writes:
            key = os.path.realpath(path).casefold()
            if key in owners:
                both = f"{owners[key].name} and {job.name}"
                raise UsageError(f"{both} would both write {path}; rename one, or edit them in separate commands")
            owners[key] = job


def _identity(path: Path) -> Identity | None:
    """What tells a file from all others; None where there is none that can be looked at."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return None if stat.S_ISDIR(found.st_mode) else (found.st_dev, found.st_ino)


def _holds_files(folder: Path) -> bool:
    try:
        return any(folder.iterdir())
    except OSError:
        return False


def _check_adapter_folder(folder: Path, overwrite: bool) -> None:
    if os.path.lexists(folder) and not is_folder(folder):
        raise PictureError(f"{folder}: expected a folder for the adapter, got a file; choose another name")
    if is_folder(folder) and _holds_files(folder) and not overwrite:
        raise PictureError(f"{folder}: already holds files; choose another folder or allow overwriting (--overwrite)")
    check_makeable(folder)

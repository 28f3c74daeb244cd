"""What one `openwu edit` will write: photos and options enter, one `Job` per photo leaves, checked before any work."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from openwu.cli.console import UsageError
from openwu.errors import OpenwuError, PictureError
from openwu.images import check_fits, check_output, check_picture, default_suffix, is_picture_suffix, read_picture


@dataclass(frozen=True)
class Job:
    """One photo and every path that its edit writes."""

    photo: Path
    output: Path
    comparison: Path | None
    adapter_folder: Path | None

    @property
    def pictures(self) -> tuple[Path, ...]:
        return (self.output,) if self.comparison is None else (self.output, self.comparison)

    @property
    def writes(self) -> tuple[Path, ...]:
        return self.pictures if self.adapter_folder is None else (*self.pictures, self.adapter_folder)


def plan(photos: Sequence[str], output: str | None, *, compare: bool, adapter_folder: str | None) -> tuple[Job, ...]:
    """Choose every path, and refuse two photos that would write the same one. Touches nothing."""
    folder = _output_folder(len(photos), output)
    jobs = []
    for photo in map(Path, photos):
        if output is None:
            target = photo.parent / f"{photo.stem}.edited{default_suffix(photo)}"
        else:
            target = folder / f"{photo.stem}{default_suffix(photo)}" if folder else Path(output)
        comparison = target.parent / f"{target.stem}.compare.png" if compare else None
        adapter = Path(adapter_folder) if adapter_folder else None
        if adapter and len(photos) > 1:
            adapter = adapter / photo.stem
        jobs.append(Job(photo, target, comparison, adapter))
    _refuse_collisions(jobs)
    return tuple(jobs)


def check(
    jobs: Sequence[Job],
    output: str | None,
    *,
    overwrite: bool,
    references: Sequence[str] = (),
    dry_run: bool = False,
) -> tuple[list[str], list[OpenwuError]]:
    """Look at every input and output. Returns notes for the user, and what stands in the way of starting.

    Makes the output folder, except in a `dry_run`, which does not look into a folder that is not there yet.
    """
    notes: list[str] = []
    problems: list[OpenwuError] = []
    seconds = [Path(reference) for reference in references]
    for photo in [*(job.photo for job in jobs), *seconds]:
        try:
            notes += [f"{photo}: {text}" for text in check_picture(photo).notes]
        except PictureError as error:
            problems.append(error)
    if problems:  # leave no new folder behind for pictures that cannot be read
        return notes, problems
    folder = _output_folder(len(jobs), output)
    if folder and dry_run and not folder.exists():
        return notes, problems
    if folder:
        _make_folder(folder)
    inputs = [*(job.photo for job in jobs), *seconds]
    for job in jobs:
        problems += _output_problems(job, inputs, overwrite)
    return notes, problems


def _output_folder(photos: int, output: str | None) -> Path | None:
    """The folder that `--output` names; None when it names a file or is not given."""
    if output is None:
        return None
    if not output:
        raise UsageError("--output: expected a file or folder, got nothing; leave it out to write beside each photo")
    path, ends_like_a_folder = Path(output), output.endswith(("/", os.sep))
    if path.is_dir() or ends_like_a_folder:
        return path
    if photos == 1:
        return None
    if path.exists() or is_picture_suffix(path):
        raise UsageError(f"--output: expected a folder for {photos} photos, got the file {output}; end it with /")
    return path


def _refuse_collisions(jobs: Sequence[Job]) -> None:
    """File systems may ignore case, so names that differ only in case count as the same."""
    owners: dict[str, Job] = {}
    for job in jobs:
        for path in job.writes:
            key = os.path.realpath(path).casefold()
            if key in owners:
                both = f"{owners[key].photo} and {job.photo}"
                raise UsageError(f"{both} would both write {path}; rename one, or edit them in separate commands")
            owners[key] = job


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PictureError(f"{folder}: the folder cannot be made: {error.strerror or error}; choose another") from None


def _output_problems(job: Job, inputs: Sequence[Path], overwrite: bool) -> Iterator[OpenwuError]:
    try:
        header = check_picture(job.photo)
        for path in job.pictures:
            check_output(path, inputs, overwrite=overwrite)
        check_fits(job.output, header.size, transparent=False)
        if header.has_alpha and job.output.suffix.lower() in (".jpg", ".jpeg"):
            check_fits(job.output, header.size, read_picture(job.photo).transparent)
        if job.adapter_folder:
            _check_adapter_folder(job.adapter_folder, overwrite)
    except OpenwuError as error:
        yield error


def _check_adapter_folder(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise PictureError(f"{folder}: expected a folder for the adapter, got a file; choose another name")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise PictureError(f"{folder}: already holds files; choose another folder or allow overwriting (--overwrite)")
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise PictureError(f"{folder}: no folder can be made in {existing}; choose another")

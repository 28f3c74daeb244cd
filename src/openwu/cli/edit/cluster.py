"""Edit the photos of a command on the machines of a Ray cluster; what was edited before is skipped as always."""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from openwu.cli.console import disk_is_full, explain
from openwu.cli.edit.photo import Done, PhotoEditor
from openwu.cli.edit.plan import Job
from openwu.cli.edit.progress import Progress
from openwu.cli.edit.report import DISK_FULL, Report
from openwu.cli.stopping import StopRequest
from openwu.errors import OpenwuError
from openwu.files.writing import PARTIAL
from openwu.images import PictureHeader

ABANDONED = 3600.0
"""Seconds without a change after which a file that is being written belongs to nobody."""
PATHS = ("model", "base", "generator", "adapter")
"""Options that may name a folder."""


@dataclass(frozen=True)
class Failed:
    """Why a photo was not edited."""

    text: str
    disk_full: bool = False


class ClusterWorker:
    """What edits photos in a worker process."""

    def __init__(self, arguments: argparse.Namespace, words: tuple[str, ...]) -> None:
        self._photos = PhotoEditor.load(arguments, words).for_series()

    def __call__(self, work: tuple[Job, PictureHeader]) -> Done | Failed:
        """Edit and write a photo; raises nothing."""
        job, header = work
        try:
            return self._photos.edit(job, header, lambda done, parts: None)  # noqa: ARG005
        except Exception as error:  # one photo must not stop the others
            return Failed(str(explain(error)), disk_is_full(error))


def edit_on_cluster(
    ready: Iterable[tuple[Job, PictureHeader]],
    arguments: argparse.Namespace,
    words: tuple[str, ...],
    progress: Progress,
    report: Report,
    stop: StopRequest,
) -> int:
    """Edit photos on a cluster, report each once, and return the exit code."""
    from openwu.serving.bulk import cluster
    from openwu.serving.engines.cluster import ClusterOptions

    progress.stage("checking the photographs")
    jobs = []
    for each in ready:
        stop.check()
        jobs.append(each)
    if not jobs:
        return report.finish()
    if arguments.base is None:  # a large base would be loaded here only to be asked
        photos = PhotoEditor.load(arguments, words)
        understood = photos.understand()
        if understood is not None:
            report.line(str(understood))
        if (reproduced := photos.for_series().reproduced) is not None:
            report.shown(reproduced)
    options = ClusterOptions(address=arguments.ray, replicas=arguments.workers or 1, gpus=arguments.worker_gpus)
    worker = partial(ClusterWorker, _absolute(arguments), words)
    progress.stage("starting the workers")
    with cluster(options) as machines:
        for index, found in machines.spread([(_placed(job), header) for job, header in jobs], worker):
            stop.check()
            job = jobs[index][0]
            progress.photo(sum(report.counts.values()) + 1, report.total, job.photo.path.name)
            if isinstance(found, Done):
                report.done(job, found.seconds, found.understood, found.told(job), found.reproduced)
                continue
            lost = Failed("its worker died every time; it may need more memory than a machine has")
            failed = lost if found is None else found
            report.failed(job.name, OpenwuError(f"{job.name}: {failed.text}" if found is None else failed.text))
            if failed.disk_full:
                return report.finish(because=DISK_FULL)
    _sweep({path.parent for job, _ in jobs for path in job.writes})
    return report.finish()


def _sweep(folders: Iterable[Path]) -> None:
    """Remove what workers that were killed long ago have left half-written."""
    for folder in folders:
        for path in folder.glob(".openwu-*.part"):
            with suppress(OSError):
                if PARTIAL.fullmatch(path.name) and path.is_file() and time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()


def _placed(job: Job) -> Job:
    """Return a job whose paths hold in every working directory."""

    def placed(path: Path | None) -> Path | None:
        return None if path is None else Path(os.path.abspath(path))  # noqa: PTH100  # links stay links

    return replace(
        job,
        photo=replace(job.photo, path=Path(os.path.abspath(job.photo.path))),  # noqa: PTH100
        output=placed(job.output),
        comparison=placed(job.comparison),
        adapter_folder=placed(job.adapter_folder),
    )


def _absolute(arguments: argparse.Namespace) -> argparse.Namespace:
    """Return the arguments with paths that hold in every working directory."""
    found = copy.copy(arguments)
    for name in PATHS:
        value = getattr(arguments, name)
        if value is not None and Path(value).exists():
            setattr(found, name, os.path.abspath(value))  # noqa: PTH100
    found.mask = None if arguments.mask is None else os.path.abspath(arguments.mask)  # noqa: PTH100
    found.reference = [os.path.abspath(path) for path in arguments.reference]  # noqa: PTH100
    found.example = [[os.path.abspath(path) for path in pair] for pair in arguments.example]  # noqa: PTH100
    return found

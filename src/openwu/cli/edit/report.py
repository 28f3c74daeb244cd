"""Report what became of each photo: lines for people, JSON objects on standard output, JSON lines in a file."""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from openwu.cli.console import complain, explain, note, say
from openwu.cli.edit.find import PIPE
from openwu.cli.edit.plan import Job
from openwu.cli.edit.progress import Progress
from openwu.errors import OpenwuError

if TYPE_CHECKING:
    from openwu.editor.shown.reproduction import Reproduction
    from openwu.types import Understood

DISK_FULL = "the disk is full; free some space"
"""Why a batch is ended early."""
NAMED = 20
"""How many failed photos the last lines name."""

_VARYING = re.compile(r"\([^)]*\)|\d+")
"""What differs between two notes of one kind."""

Status = Literal["done", "skipped", "failed", "planned"]


class Report:
    """Counts, prints and records what becomes of the photos of one command."""

    def __init__(
        self,
        progress: Progress,
        *,
        json_lines: bool = False,
        quiet: bool = False,
        verbose: bool = False,
        file: str | None = None,
    ) -> None:
        """`json_lines`: objects on standard output in place of lines. `file`: objects are appended there, too.

        Raises OpenwuError for a file that cannot be written.
        """
        self.progress, self.json_lines, self.quiet, self.verbose = progress, json_lines, quiet, verbose
        self.counts: dict[Status, int] = dict.fromkeys(("done", "skipped", "failed", "planned"), 0)
        self.total, self.batch, self.to_stdout = 0, False, False
        self._failed: list[str] = []
        self._kinds: dict[str, int] = {}
        self._file = None if file is None else LineFile(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def begin(self, total: int, *, batch: bool, to_stdout: bool = False) -> None:
        """Say how many photos there are, and whether a picture goes to standard output, which then holds no lines."""
        self.total, self.batch, self.to_stdout = total, batch, to_stdout

    def shown(self, reproduced: Reproduction, *, untrained: int = 0) -> None:
        """Say how far a command's example is understood. `untrained`: steps of --refine that a dry run leaves out."""
        self._line(str(reproduced))
        if untrained:
            self.note(reproduced.untrained_note(untrained))
        elif reproduced.note is not None:
            self.note(reproduced.note)

    def done(
        self,
        job: Job,
        seconds: Mapping[str, float],
        understood: Understood | None,
        notes: Iterable[tuple[str, str]],
        reproduced: Reproduction | None = None,
    ) -> None:
        """Record an edited photo. `seconds`: stage -> seconds. `notes`: (what each is about, its text)."""
        notes = list(notes)
        for about, text in notes:
            self._note_kind(about, text)
        split = ", ".join(f"{stage} {each:.2f}" for stage, each in seconds.items())
        self._line(f"{job.name} -> {job.target}  {sum(seconds.values()):.2f} s ({split})")
        for path in job.writes:
            if path != job.output:
                self._line(f"{job.name} -> {path}")
        if self.verbose and understood is not None:
            others = ", ".join(f"{name.replace('_', ' ')} ({chance:.0%})" for name, chance in understood.runners_up)
            self._line(f"{job.name}: {understood}" + (f"; next: {others}" if others else ""))
        if self.verbose and reproduced is not None:
            self._line(f"{job.name}: {reproduced}")
        self._record(
            "done",
            job.name,
            output=job.target,
            comparison=_text(job.comparison),
            adapter=_text(job.adapter_folder),
            understood=None if understood is None else asdict(understood),
            reproduced=None if reproduced is None else round(reproduced.share, 3),
            **({} if reproduced is None or reproduced.before is None else {"generated": round(reproduced.before, 3)}),
            seconds={stage: round(each, 3) for stage, each in seconds.items()},
            notes=[f"{about}: {text}" for about, text in notes],
        )

    def skipped(self, job: Job) -> None:
        """Record a photo whose outputs exist."""
        if self.verbose:
            self.note(f"{job.name}: skipped, {job.target} exists")
        self._record("skipped", job.name, output=job.target)

    def planned(self, job: Job, understood: Understood | None) -> None:
        """Record a photo that a dry run leaves alone."""
        for text in map(str, job.writes or (PIPE,)):
            self._line(f"{job.name} -> {text}  (dry run)")
        words = None if understood is None else asdict(understood)
        self._record("planned", job.name, output=job.target, understood=words)

    def failed(self, name: str, error: BaseException) -> None:
        """Record a photo that could not be edited, or an argument that led to none."""
        told = explain(error)
        with self.progress.aside():
            complain(told)
        self._failed.append(name)
        self._record("failed", name, error=str(told))

    def note(self, text: str) -> None:
        """Print something to know, unless the command is quiet."""
        if not self.quiet:
            with self.progress.aside():
                note(text)

    def line(self, text: str) -> None:
        """Print a line about the whole command, where lines are printed."""
        self._line(text)

    def finish(self, *, because: str | None = None) -> int:
        """Print the last lines and return the exit code. `because`: why the batch was ended early."""
        self.progress.end()
        for kind, count in self._kinds.items():
            if count > 1:
                self.note(f"{count - 1} more like it: {kind}")
        if skipped := self.counts["skipped"]:
            self.note(f"{skipped} of {self.total} photos were done already and skipped; --overwrite edits them again")
        if because is not None:
            self._complain(f"{because}; {self._progress_made()}")
        if self._failed and self.batch:
            others = f" and {len(self._failed) - NAMED} more" if len(self._failed) > NAMED else ""
            rest = "" if because is not None else "; the others are done"
            head = f"{len(self._failed)} of {self.total} photos failed{rest}"
            names = [f"{', '.join(self._failed[:NAMED])}{others}"] if self.total > NAMED else []
            self._complain(OpenwuError.listing(head, names))
        broken = self._file is not None and self._file.error is not None
        return 1 if self._failed or because is not None or broken else 0

    def stopped(self) -> None:
        """Say how far a command came that a signal stopped."""
        self.progress.end()
        self._complain(f"stopped; {self._progress_made()}" if self.batch else "stopped")

    def _progress_made(self) -> str:
        done = self.counts["done"] + self.counts["skipped"]
        return f"{done} of {self.total} photos are done, run the same command again to go on"

    def _note_kind(self, about: str, text: str) -> None:
        """Print one note of each kind; the others are counted."""
        kind = _VARYING.sub("", text)
        first = self._kinds.setdefault(kind, 0) == 0
        self._kinds[kind] += not self.verbose
        if first or self.verbose:
            self.note(f"{about}: {text}")

    def _line(self, text: str) -> None:
        if self.quiet or self.json_lines:
            return
        with self.progress.aside():
            if self.to_stdout:
                note(text)
            else:
                say(text)

    def _complain(self, text: str | OpenwuError) -> None:
        with self.progress.aside():
            complain(text)

    def _record(self, status: Status, photo: str, **values: object) -> None:
        self.counts[status] += 1
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record = json.dumps({"photo": photo, "status": status, **values, "time": now})
        if self._file is not None and status != "planned" and (error := self._file.append(record)) is not None:
            self._complain(error)
        if self.json_lines:
            with self.progress.aside():
                say(record)


class LineFile:
    """A file to which whole lines are appended, also by several processes at once."""

    def __init__(self, path: str) -> None:
        """Open or make the file; OpenwuError where that fails."""
        self.path = path
        self.error: OpenwuError | None = None
        try:
            self._number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            # A line that a crash cut short must not swallow the next one.
            size = os.lseek(self._number, 0, os.SEEK_END)
            self._cut = size > 0 and os.lseek(self._number, -1, os.SEEK_END) >= 0 and os.read(self._number, 1) != b"\n"
        except OSError as error:
            raise OpenwuError(
                f"--report: {path} cannot be written: {error.strerror or error}; name a file in a folder that exists"
            ) from None

    def append(self, line: str) -> OpenwuError | None:
        """Append a line in one write. Returns what prevented that, the first time; nothing is appended afterwards."""
        if self.error is not None:
            return None
        data = ("\n" * self._cut + line + "\n").encode()
        try:
            written = os.write(self._number, data)
            if written != len(data):  # a full disk takes a part
                os.ftruncate(self._number, os.fstat(self._number).st_size - written)
                raise OSError("no space left")
        except OSError as error:
            why = error.strerror or error
            self.error = OpenwuError(f"--report: {self.path} cannot be written: {why}; the report ends here")
            return self.error
        self._cut = False
        return None

    def close(self) -> None:
        os.close(self._number)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)

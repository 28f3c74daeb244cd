"""Run ffmpeg, the program that comes with imageio-ffmpeg: arguments in a list, never a shell; pixels through pipes.

Files are opened by the demuxers of video files alone and with no protocol but files: a playlist under a clip's name
could otherwise make the program read other files, or ask servers.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from openwu.errors import OpenwuError, PictureError
from openwu.extras import library

DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,mpegvideo,mxf"
"""The demuxers that a clip may be read with, by ffmpeg's names."""
TAIL = 2**20
"""Bytes of the program's messages that are kept."""

_ADDRESS = re.compile(r" @ 0x[0-9a-f]+")


@dataclass(frozen=True)
class Finished:
    """What the program wrote, and how it ended."""

    code: int
    output: bytes
    messages: str

    @property
    def reason(self) -> str:
        """The last error in its messages, in one line."""
        return reason_in(self.messages)


class Running:
    """The program while it runs: its standard input and output, and its messages so far."""

    def __init__(self, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
        self._process, self._log = process, log

    @property
    def stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def stdout(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def wait(self) -> int:
        """Wait for its end and return its exit code; its standard input is closed first."""
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        return self._process.wait()

    @property
    def messages(self) -> str:
        """The end of what it said so far."""
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - TAIL))
        return self._log.read().decode(errors="replace")


def program() -> str:
    """Return the path of ffmpeg. Raises OpenwuError where imageio-ffmpeg is not installed, or has no program."""
    module = library("imageio_ffmpeg", "video")
    try:
        return str(module.get_ffmpeg_exe())
    except RuntimeError as error:
        raise OpenwuError(f"clips need the program ffmpeg: {error}; pip install 'openwu[video]'") from error


def source(clip: Path, *options: str) -> list[str]:
    """Return the arguments that open a clip as input, with `options` of that input before it."""
    return [*options, "-protocol_whitelist", "file", "-format_whitelist", DEMUXERS, "-i", f"file:{clip.absolute()}"]


def run(arguments: Sequence[str], *, level: str = "level+warning", folder: Path | None = None) -> Finished:
    """Run the program to its end; what it wrote to standard output is held in memory. `folder`: where it runs."""
    with running(arguments, level=level, folder=folder) as process:
        output = process.stdout.read()
        code = process.wait()
        return Finished(code, output, process.messages)


@contextmanager
def running(
    arguments: Sequence[str], *, level: str = "level+warning", folder: Path | None = None, feed: bool = False
) -> Iterator[Running]:
    """Start the program; it is killed where the block ends before it does.

    `level`: ffmpeg's `-v`. `feed`: give it a standard input. Ctrl-C in a terminal reaches this process alone.
    """
    command = [program(), "-hide_banner", "-nostats", "-v", level, *([] if feed else ["-nostdin"]), *arguments]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if feed else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=folder,
            start_new_session=os.name == "posix",
        )
        try:
            yield Running(process, log)
        finally:
            process.kill()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with suppress(OSError):
                        stream.close()
            process.wait()


def reason_in(messages: str) -> str:
    """Return the first error in the program's messages, without addresses; empty where there is none."""
    lines = [_ADDRESS.sub("", line).strip() for line in messages.splitlines()]
    errors = [re.sub(r"\[(error|fatal|panic)\] ", "", line) for line in lines if re.search(r"\[(error|fatal)\]", line)]
    return errors[0] if errors else ""


def failed(clip: Path, finished: Finished, todo: str) -> PictureError:
    """Return the error for a run of the program that failed on a clip."""
    return PictureError(f"{clip}: {finished.reason or f'ffmpeg ended with code {finished.code}'}; {todo}")

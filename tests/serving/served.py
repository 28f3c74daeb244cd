"""A real server process for the acceptance tests, and what its clients share."""

from __future__ import annotations

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from serving_clients import PROMPT

from openwu.editor.editor import Editor
from openwu.images import read_picture


def pixels(data: str | None) -> NDArray[Any]:
    """Decode a picture of an answer; one without colours comes as greyscale."""
    assert data is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def offline(editor: Editor, data: bytes, prompt: str = PROMPT, seed: int = 0) -> NDArray[Any]:
    """What an answer must equal."""
    return editor.edit([read_picture(data)], prompt, seed=seed).photo.pixels


def post(url: str, data: bytes, prompt: str = PROMPT, key: str = "none", **fields: str) -> httpx.Response:
    """Ask for an edit."""
    headers = {"authorization": f"Bearer {key}"}
    form = {"prompt": prompt, **fields}
    return httpx.post(f"{url}/v1/images/edits", files={"image": data}, data=form, headers=headers, timeout=900)


def say(figures: str) -> None:
    """Print figures for docs/serving.md; pytest shows them with -s."""
    sys.stdout.write(f"\n  {figures}\n")


class Served:
    """`openwu serve` on a free port, for the time of a with block."""

    def __init__(self, *options: str, log: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        command = [sys.executable, "-m", "openwu", "serve", "--port", str(self.port), *options]
        self._file = log.open("wb")
        self.process = subprocess.Popen(command, stdout=self._file, stderr=self._file)

    def __enter__(self) -> Served:
        end = time.monotonic() + 900
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise AssertionError(self.log.read_text())
            try:
                if httpx.get(f"{self.url}/health/ready", timeout=60).status_code == 200:
                    return self
            except httpx.TransportError:
                time.sleep(0.2)
        self.__exit__(None, None, None)
        raise AssertionError("never ready")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(120)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._file.close()

    def workers(self) -> list[int]:
        """Process ids of the worker processes."""
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    status = (folder / "stat").read_text()
                    command = (folder / "cmdline").read_bytes()
                except OSError:
                    continue
                if int(status.rpartition(")")[2].split()[1]) == self.process.pid and b"spawn_main" in command:
                    found.append(int(folder.name))
        return found

    def memory(self, of: Literal["app", "workers", "all"] = "all") -> int:
        """Resident bytes of the service and its workers."""
        page = os.sysconf("SC_PAGE_SIZE")
        pids = {"app": [self.process.pid], "workers": self.workers(), "all": [self.process.pid, *self.workers()]}[of]
        return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page for pid in pids)

    def files(self) -> int:
        """Open files and sockets of the service and its workers."""
        return self._entries("fd")

    def threads(self) -> int:
        """Threads of the service and its workers."""
        return self._entries("task")

    def _entries(self, kind: str) -> int:
        folders = [Path(f"/proc/{pid}/{kind}") for pid in (self.process.pid, *self.workers())]
        return sum(len(list(folder.iterdir())) for folder in folders)

    def figure(self, name: str, key: str = "none") -> float:
        """One value of /metrics; labels are added up."""
        headers = {"authorization": f"Bearer {key}"}
        lines = httpx.get(f"{self.url}/metrics", headers=headers, timeout=300).text.splitlines()
        return sum(
            float(line.split()[-1])
            for line in lines
            if line.startswith(("openwu_" + name + " ", "openwu_" + name + "{"))
        )

"""Show on stderr how far a batch is: from the first second in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from openwu.cli.console import one_line

DELAY, INTERVAL = 2.0, 10.0
"""Seconds before a bar appears, and between its updates, where stderr is not a terminal."""
TICK = 0.5
"""Seconds between updates of the clock in a terminal, while nothing else moves the bar."""

WAITING, EDITING = "{desc} {elapsed}", "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
"""What the bar shows before and while photos are edited, as tqdm writes it."""


class Progress:
    """A bar over all photos of a command; `hidden` shows nothing."""

    def __init__(self, *, hidden: bool) -> None:
        self.terminal = sys.stderr is not None and sys.stderr.isatty()
        self.hidden = hidden or sys.stderr is None
        self._start = time.monotonic()
        self._ended = threading.Event()
        self._clock = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Progress:
        self.bar = tqdm(
            total=1,
            leave=False,
            delay=0.0 if self.terminal else DELAY,
            mininterval=0.1 if self.terminal else INTERVAL,
            disable=self.hidden,
            bar_format=WAITING,
            file=sys.stderr,
        )
        if self.terminal and not self.hidden:
            self._clock.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._clock.is_alive():
            self._clock.join()
        self.bar.close()

    def stage(self, text: str) -> None:
        """Say what is done before the first photo: "loading the model"."""
        if not self.hidden:
            self.bar.bar_format = WAITING
            self.bar.set_description_str(text, refresh=self.terminal)

    def photo(self, number: int, total: int, name: str) -> Callable[[int, int], None]:
        """Begin photo `number` (from 1) of `total`. Returns what the editor calls with (parts done, parts in all)."""
        words = one_line(name) if total == 1 else f"{number}/{total} {one_line(name)}"

        def report(done: int, parts: int) -> None:
            self._at(number - 1 + done / max(parts, 1), total, words)

        self._at(number - 1, total, words)
        return report

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Take the bar away while something is printed."""
        if not self._visible():
            yield
            return
        with tqdm.external_write_mode(file=sys.stderr):
            yield

    def _at(self, photos: float, total: int, words: str) -> None:
        if self.hidden:
            return
        self.bar.bar_format = EDITING
        self.bar.total = total
        self.bar.set_description_str(words, refresh=False)
        self.bar.update(photos - self.bar.n)
        if self.terminal:
            self.bar.refresh()

    def _visible(self) -> bool:
        return not self.hidden and (self.terminal or time.monotonic() - self._start > DELAY)

    def _tick(self) -> None:
        while not self._ended.wait(TICK):
            self.bar.refresh()

"""Show on stderr how far a batch is: a bar from the first second in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from openwu.cli.console import note, one_line

DELAY, INTERVAL = 2.0, 30.0
"""Seconds before the first line and between two lines, where stderr is not a terminal."""
TICK = 0.5
"""Seconds between updates of the clock."""

WAITING, EDITING = "{desc} {elapsed}", "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
"""What the bar shows before and while photos are edited, as tqdm writes it."""
CLIP = "{desc} |{bar}| {elapsed}"
"""What it shows of a clip, whose description says what is left."""


class Progress:
    """How far the photos of a command are; `hidden` shows nothing."""

    def __init__(self, *, hidden: bool) -> None:
        self.hidden = hidden or sys.stderr is None
        self.terminal = not self.hidden and sys.stderr.isatty()
        self._words = ""
        self._started = time.monotonic()
        self._next_line = self._started + DELAY
        self._ended = threading.Event()
        self._clock = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Progress:
        self.bar = tqdm(total=1, leave=False, disable=not self.terminal, bar_format=WAITING, file=sys.stderr)
        if not self.hidden:
            self._clock.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Take the bar away for good."""
        self._ended.set()
        if self._clock.is_alive():
            self._clock.join()
        self.bar.close()

    def stage(self, text: str) -> None:
        """Say what is done before the first photo: "loading the model"."""
        self._words = text
        if self.terminal:
            self.bar.set_description_str(text)

    def photo(self, number: int, total: int, name: str) -> Callable[[int, int], None]:
        """Begin photo `number` (from 1) of `total`. Returns what the editor calls with (parts done, parts in all)."""
        words = one_line(name) if total == 1 else f"{number}/{total} {one_line(name)}"
        self.bar.bar_format, self.bar.total = EDITING, total

        def report(done: int, parts: int) -> None:
            share = done / max(parts, 1)
            self._words = f"{words}: {share:.0%}" if share else words
            if self.terminal:
                self.bar.set_description_str(words, refresh=False)
                self.bar.update(number - 1 + share - self.bar.n)
                self.bar.refresh()

        report(0, 1)
        return report

    def training(self, name: str) -> Callable[[int, int], None]:
        """Return what is called with (steps done, steps in all), and shows `name` from its first call on."""
        begun: list[Callable[[int, int], None]] = []

        def report(done: int, steps: int) -> None:
            if not begun:
                begun.append(self.photo(1, 1, name))
            begun[0](done, steps)

        return report

    def clip(self, number: int, total: int, name: str) -> Callable[[int, int], None]:
        """Begin clip `number` of `total`, as `photo` does; frames are counted, and the time that they still take."""
        report = self.photo(number, total, name)
        words = self._words
        first: list[tuple[float, int]] = []

        def count(done: int, frames: int) -> None:
            now = time.monotonic()
            if not first:
                first.append((now, done))
            begun, before = first[0]
            left = (frames - done) * (now - begun) / (done - before) if done > before else None
            clock = "" if left is None else f", {tqdm.format_interval(left)} left"
            report(done, frames)
            self._words = f"{words}: frame {done} of {frames}{clock}"
            if self.terminal:
                self.bar.bar_format = CLIP
                self.bar.set_description_str(self._words)

        return count

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Take the bar away while something is printed."""
        if not self.terminal or self._ended.is_set():
            yield
            return
        with tqdm.external_write_mode(file=sys.stderr):
            yield

    def _tick(self) -> None:
        while not self._ended.wait(TICK):
            now = time.monotonic()
            if self.terminal:
                self.bar.refresh()
            elif now >= self._next_line:
                self._next_line = now + INTERVAL
                note(f"{self._words} ({now - self._started:.0f} s)")

"""Stop in order on SIGINT, SIGTERM and SIGHUP: raise an exception, so that half-written files are removed."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPED = 128 + signal.SIGINT
"""Exit code after Ctrl-C."""
REPEAT = 1.0
"""Seconds in which a second signal is taken for the same one: it must not interrupt the removal of files."""


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end; `code` is the exit code that shells expect then."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.code = 128 + number


class StopRequest:
    """Whether a signal has come. Libraries may swallow the exception, so long loops call `check` as well."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.time = 0.0

    def check(self) -> None:
        """Raise Stopped if a signal has come."""
        if self.number is not None:
            raise Stopped(self.number)

    def _handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.number is not None and now - self.time < REPEAT:
            return
        self.number, self.time = number, now
        raise Stopped(number)


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Raise Stopped in the block when a signal asks the process to end; handlers that somebody set stay.

    Changes nothing outside the main thread, where signals do not arrive.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP"):  # not on Windows
        numbers.append(signal.SIGHUP)
    unhandled = {signal.SIG_DFL, signal.default_int_handler}
    before = {number: handler for number in numbers if (handler := signal.getsignal(number)) in unhandled}
    for number in before:
        signal.signal(number, request._handle)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""The operating system's lock on an open file, which ends with the process that holds it."""

from __future__ import annotations

import sys


def take_lock(descriptor: int) -> bool:
    """Take the lock of an open file; False where another process, or another opening of the file, has it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True

"""Run coarse tasks on a few threads, each of which computes with a single thread of torch inside.

torch's own threads meet at a barrier in every small operation: where another process occupies one core, all wait for
it. Tasks that know nothing of one another wait only at the end.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from contextvars import copy_context
from functools import partial

import torch

Task = Callable[[], None]

_pools: dict[int, ThreadPoolExecutor] = {}
_own = threading.local()
_starting = threading.Lock()


def in_parallel(tasks: Sequence[Task], done: Task | None = None) -> None:
    """Run tasks in inference mode on `torch.get_num_threads()` threads, inside the caller's context variables.

    `done` is called in the caller's thread after each task. The first error, of `done` too, cancels the tasks that
    have not begun and is raised after the others have ended.
    """
    threads = torch.get_num_threads()
    if threads == 1:  # The caller's own thread: several callers, each with one thread, do not wait for one another.
        for task in tasks:
            _in_inference_mode(task)
            if done is not None:
                done()
        return
    pool = _pool(threads)
    futures = [pool.submit(copy_context().run, _in_inference_mode, task) for task in tasks]
    try:
        for future in as_completed(futures):
            future.result()
            if done is not None:
                done()
    except BaseException:
        for future in futures:
            future.cancel()
        wait(futures)
        raise


def worker() -> int:
    """Return the number of this thread among those of its pool, from 1 on; 0 outside of `in_parallel`'s threads."""
    number: int = getattr(_own, "number", 0)
    return number


@torch.inference_mode()
def _in_inference_mode(task: Task) -> None:
    task()


def _pool(threads: int) -> ThreadPoolExecutor:
    """The process's pool of so many threads, shared by all who compute at the same time."""
    with _starting:
        if threads not in _pools:
            pool = ThreadPoolExecutor(threads, "openwu-piece", partial(_begin, itertools.count(1)))
            begun = threading.Barrier(threads + 1)
            for _ in range(threads):  # A pool starts a thread only while none is idle.
                pool.submit(begun.wait)
            begun.wait()
            # Each thread has a number of its own, but the last one that was set is what new threads begin with.
            torch.set_num_threads(threads)
            _pools[threads] = pool
    return _pools[threads]


def _begin(numbers: Iterator[int]) -> None:
    _own.number = next(numbers)
    torch.get_num_threads()  # Otherwise the thread's first operation would set the process's number again.
    torch.set_num_threads(1)


def _forget() -> None:
    """After a fork: the parent's threads do not exist in the child."""
    global _starting
    _starting = threading.Lock()
    _pools.clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget)

"""C9 to C12: embedded edits on one and two threads, with one core busy, of 8 megapixels, and the first after loading.

C9 and C10 want two cores that nothing else occupies. All sides are float32 or bfloat16 as the editor chooses.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from PIL import Image

from openwu.editor.editor import Editor
from openwu.errors import OpenwuError
from openwu.evaluation.machine.measure import sample_picture
from openwu_bench.editor import INSTRUCTION, base_passes
from openwu_bench.measurement import Row, Timing, interleaved

THREADS_GOAL, BUSY_GOAL, SIZE_GOAL, FIRST_GOAL = 1.8, 0.95, 1.1, 1.3
SMALL, LARGE = (1024, 1024), (4096, 2048)
QUICK_SMALL, QUICK_LARGE = (320, 256), (512, 384)
REPETITIONS, QUICK_REPETITIONS = 7, 2
LATER = 4
"""Edits after the first one; their median counts."""

FIRST = f"""
import json, sys, time
from openwu.editor.editor import Editor
from openwu.evaluation.machine.measure import sample_picture
picture = sample_picture(int(sys.argv[1]), int(sys.argv[2]))
editor = Editor.from_pretrained()
seconds = []
for _ in range(1 + {LATER}):
    start = time.perf_counter()
    editor.edit(picture, {INSTRUCTION!r})
    seconds.append(time.perf_counter() - start)
print(json.dumps(seconds))
"""
"""What a process of its own runs: the first edit of this one would be no first one."""


def measure_threads(quick: bool) -> Row:
    """Measure row C9: seconds on one thread / seconds on two."""
    return _one_and_two("C9", "an edit of 1 megapixel on two threads, against one", THREADS_GOAL, quick)


def measure_busy(quick: bool) -> Row:
    """Measure row C10: seconds on one thread / seconds on two, with another process that occupies one core."""
    title = "an edit of 1 megapixel on two threads with one core busy, against one thread"
    with one_core_busy():
        return _one_and_two("C10", title, BUSY_GOAL, quick)


def measure_size(quick: bool) -> Row:
    """Measure row C11: seconds per pixel of a large picture / those of a small one."""
    sizes = (QUICK_SMALL, QUICK_LARGE) if quick else (SMALL, LARGE)
    runs = {f"{w} x {h}": _edit(w, h)[0] for w, h in sizes}
    found = interleaved(runs, QUICK_REPETITIONS if quick else REPETITIONS // 2)
    small, large = (timing.median / (w * h) for timing, (w, h) in zip(found.values(), sizes, strict=True))
    title = "seconds for each megapixel, of 8 against of 1"
    return Row("C11", title, large / small, "x", SIZE_GOAL, at_least=False, sides=found, details={"sizes": sizes})


def measure_first(quick: bool) -> Row:
    """Measure row C12: seconds of the first edit of a process after loading / the median of later ones."""
    width, height = QUICK_SMALL if quick else SMALL
    first, later = [], []
    for _ in range(1 if quick else 3):
        command = [sys.executable, "-c", FIRST, str(width), str(height)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OpenwuError(f"C12: the process that edits ended with {done.returncode}: {done.stderr[-500:]}")
        head, *tail = json.loads(done.stdout)
        first.append(head)
        later += tail
    sides = {"first": Timing(tuple(first)), "later": Timing(tuple(later))}
    ratio = sides["first"].median / sides["later"].median
    title = "the first edit after loading, against later ones"
    return Row("C12", title, ratio, "x", FIRST_GOAL, at_least=False, sides=sides, details={"size": (width, height)})


@contextmanager
def one_core_busy() -> Iterator[None]:
    """Another process occupies one core, a certain one where the system allows it, until the block ends."""
    code = "import os\nif hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    busy = subprocess.Popen([sys.executable, "-c", f"{code}while True: pass"])
    try:
        yield
        if busy.poll() is not None:
            raise OpenwuError(f"C10: the process that occupies a core ended with {busy.returncode}")
    finally:
        busy.kill()
        busy.wait()


def _one_and_two(name: str, title: str, goal: float, quick: bool) -> Row:
    width, height = QUICK_SMALL if quick else SMALL
    run, picture = _edit(width, height)
    before = torch.get_num_threads()

    def on(threads: int) -> np.ndarray:
        torch.set_num_threads(threads)
        return run()

    try:
        error = float(np.abs(on(1).astype(int) - on(2)).max()) / 255
        if error:
            raise OpenwuError(f"{name}: two threads gave other pixels than one, by {error:.3f} of white")
        sides = {f"threads: {number}": partial(on, number) for number in (1, 2)}
        found = interleaved(sides, QUICK_REPETITIONS if quick else REPETITIONS)
    finally:
        torch.set_num_threads(before)
    one, two = (timing.median for timing in found.values())
    details = {"size": picture.size, "cores": os.cpu_count()}
    return Row(name, title, one / two, "x", goal, sides=found, error=error, details=details)


def _edit(width: int, height: int) -> tuple[Callable[[], np.ndarray], Image.Image]:
    """The base's part of an edit: the adapter, which is made once, is no matter of threads."""
    editor, picture = Editor.from_pretrained(), sample_picture(width, height)
    return base_passes(editor, picture, editor.adapt(picture, INSTRUCTION)), picture

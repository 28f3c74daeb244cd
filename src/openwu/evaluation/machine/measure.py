"""Measure what an edit with the embedded model costs on this machine: seconds, memory, and the share of its limits."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from openwu.backbones.embedded.base import EmbeddedBase, native_dtype
from openwu.editor.editor import Editor
from openwu.errors import OpenwuError
from openwu.evaluation.machine.hardware import hardware, units
from openwu.files.origin import origin
from openwu.kernels.memory import free_memory

INSTRUCTION = "make it look like an old photograph"
SIDE, SMALL = 1024, 256
"""Of the picture that is timed (one megapixel), and of the one whose operations are counted."""
SIZES = (12, 24)
"""Megapixels of the photographs whose time is estimated."""
ROUNDS, BUDGET = 3, 40.0
"""Rounds of timed edits at most; no round begins after so many seconds of them."""
PRODUCT, REPEATS, PATIENCE = 1024, 7, 2.0
"""Side of the products, how often each is timed at most, and seconds after which no repeat begins."""

FRESH = """
import json, sys, time
start = time.perf_counter()
from openwu.editor.editor import Editor
from openwu.evaluation.machine.measure import INSTRUCTION, peak_memory, sample_picture
imported = time.perf_counter()
editor = Editor.from_pretrained()
loaded = time.perf_counter()
picture = sample_picture(int(sys.argv[1]), int(sys.argv[1]))
before = time.perf_counter()
editor.edit(picture, INSTRUCTION)
first = time.perf_counter() - before
print(json.dumps({"import": imported - start, "load": loaded - imported, "first": first, "peak": peak_memory()}))
"""
"""What a process of its own runs: the first edit of this one would be no first one."""


@dataclass(frozen=True)
class Edits:
    """Whole edits of a JPEG file of one megapixel, reading and writing included, on some threads."""

    threads: int
    seconds: tuple[float, ...]
    processor_seconds: tuple[float, ...]
    """Of all threads together."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def processor_median(self) -> float:
        return statistics.median(self.processor_seconds)

    @property
    def share_of_cores(self) -> float:
        """The share of its threads' cores that the process got, the waiting for one another included; 1 is all."""
        return sum(self.processor_seconds) / (self.threads * sum(self.seconds))


@dataclass(frozen=True)
class MachineCost:
    """What was measured. Times in seconds, rates in operations a second, memory in bytes."""

    machine: dict[str, Any]
    """See `hardware`; its load is that before the measurement."""
    units: list[str]
    dtype: str
    """In which the editor computes here."""
    origin: dict[str, Any]
    threads: int
    """That torch uses, unless told otherwise."""
    side: int
    """Of the square picture that was edited, in pixels."""
    edits: list[Edits]
    """On one thread and on all, where there are more."""
    import_seconds: float
    load_seconds: float
    first_seconds: float
    """Of a new process's first edit, from pixels to pixels."""
    peak_memory: int | None
    """Of that process; None where the system does not say."""
    free_memory: int | None
    """Before the measurement."""
    product_rates: dict[str, float]
    """"float32, 1", "bfloat16, 1", and the same on all threads: see `product_rates`."""
    edit_operations: float
    """Of the matrix products, convolutions and attention of one edit."""

    @property
    def megapixels(self) -> float:
        return self.side**2 / 1e6

    @property
    def one_thread(self) -> Edits:
        return self.edits[0]

    @property
    def all_threads(self) -> Edits:
        return self.edits[-1]

    @property
    def speedup(self) -> float:
        """Seconds on one thread / seconds on all."""
        return self.one_thread.median / self.all_threads.median

    @property
    def share_of_limit(self) -> float:
        """Rate of an edit on one thread / that of large matrix products of the same dtype, both by processor time."""
        return self.edit_operations / self.one_thread.processor_median / self.product_rates[f"{self.dtype}, 1"]

    @property
    def seconds_per_megapixel(self) -> float:
        """On all threads, the file's reading and writing included."""
        return self.all_threads.median / self.megapixels

    def photographs(self, count: int, megapixels: float) -> float:
        """Estimate the seconds of many photographs in one process: time grows with the pixels, loading comes once."""
        return self.import_seconds + self.load_seconds + count * megapixels * self.seconds_per_megapixel

    def photographs_on_a_free_core(self, count: int, megapixels: float) -> float:
        """Estimate the same from the processor time on one thread, which other programs hardly change."""
        return count * megapixels * self.one_thread.processor_median / self.megapixels

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as plain values, those that follow from others too."""
        derived = {
            "speedup": self.speedup,
            "share_of_limit": self.share_of_limit,
            "seconds_per_megapixel": self.seconds_per_megapixel,
            "seconds_for_100_photographs": {f"{m} MP": self.photographs(100, m) for m in SIZES},
            "processor_seconds_for_100_photographs": {
                f"{m} MP": self.photographs_on_a_free_core(100, m) for m in SIZES
            },
        }
        return {**asdict(self), **derived}


def measure_machine(note: Callable[[str], None] = lambda _: None, side: int = SIDE) -> MachineCost:
    """Measure everything; `note` is told each step's name before it begins.

    Raises OpenwuError where the process of the first edit fails.
    """
    machine, free, threads = hardware(gpu=False), free_memory(torch.device("cpu")), torch.get_num_threads()
    note("loading openwu, and the first edit, in a process of its own")
    fresh = first_edit(side)
    note("matrix products")
    rates = product_rates(threads)
    editor = Editor.from_pretrained()
    note(f"edits of {side} x {side} pixels on 1 thread" + (f" and on {threads}" if threads > 1 else ""))
    edits = time_edits(editor, side, sorted({1, threads}))
    return MachineCost(
        machine=machine,
        units=units(),
        dtype=str(native_dtype()).removeprefix("torch."),
        origin=origin(),
        threads=threads,
        side=side,
        edits=edits,
        import_seconds=fresh["import"],
        load_seconds=fresh["load"],
        first_seconds=fresh["first"],
        peak_memory=fresh["peak"],
        free_memory=free,
        product_rates=rates,
        edit_operations=edit_operations(editor, side),
    )


def first_edit(side: int) -> dict[str, Any]:
    """Seconds of importing, loading and the first edit of a new process, and its peak memory in bytes."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", FRESH, str(side)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OpenwuError(
            f"openwu bench: the process of the first edit ended with {done.returncode}: {done.stderr.strip()[-500:]}; "
            "try `openwu edit` on a photo, which says more"
        )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def product_rates(threads: int) -> dict[str, float]:
    """Operations a second of square products, the best of several: "DTYPE, THREADS" -> rate.

    By processor time on one thread, and on more by the time that passes.
    """
    found = {}
    for count in sorted({1, threads}):
        with torch_threads(count):
            for dtype in (torch.float32, torch.bfloat16):
                # A processor without units for 16 bits takes a hundred times as long, at every size.
                side = PRODUCT if dtype in (torch.float32, native_dtype()) else PRODUCT // 8
                a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
                best = _best(partial(torch.matmul, a, b), time.process_time if count == 1 else time.perf_counter)
                found[f"{str(dtype).removeprefix('torch.')}, {count}"] = 2 * side**3 / best
    return found


def time_edits(editor: Editor, side: int, counts: list[int]) -> list[Edits]:
    """Time whole edits from file to file on so many threads in turn, after one that is not counted."""
    taken: dict[int, list[tuple[float, float]]] = {count: [] for count in counts}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "photo.jpg", Path(folder) / "edited.jpg"
        sample_picture(side, side).save(source, quality=95)

        def edit() -> None:
            editor.edit(source, INSTRUCTION).save(target)

        editor.edit(sample_picture(SMALL, SMALL), INSTRUCTION)
        began = time.perf_counter()
        for round_number in range(ROUNDS):
            if round_number and time.perf_counter() - began > BUDGET:
                break
            for count in counts:
                with torch_threads(count):
                    processor = time.process_time()
                    taken[count].append((_seconds(edit), time.process_time() - processor))
    return [Edits(count, *zip(*each, strict=True)) for count, each in taken.items()]


def edit_operations(editor: Editor, side: int) -> float:
    """Count the operations of an edit: the generator's, and the base's out of those for a small picture."""
    small = sample_picture(SMALL, SMALL)
    once = operations(lambda: editor.adapt(small, INSTRUCTION))
    base = editor.backbone
    if not isinstance(base, EmbeddedBase):
        raise OpenwuError(f"editor: expected one of the embedded model, got one of {editor.name}; pass no model")
    inputs = [torch.zeros(1, 3, SMALL, SMALL, dtype=editor.dtype)] * 2
    text = base.instruction([INSTRUCTION]).to(editor.dtype)
    with torch.inference_mode():
        per_pixel = operations(lambda: base.network(*inputs, text)) / SMALL**2
    return once + per_pixel * side**2


def operations(run: Callable[[], object]) -> float:
    """Count the FLOPs of the matrix products, convolutions and attention of one run."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def sample_picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return a picture of smooth colours with grain, drawn from a seed."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    grain = generator.integers(-12, 13, smooth.shape[:2], dtype=np.int16)[..., None]
    return Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))


def peak_memory() -> int | None:
    """Return the peak memory of the process in bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch computes on so many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _best(run: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of the fastest of several runs, after one that is not counted."""
    run()
    taken, began = [_seconds(run, clock)], time.perf_counter()
    while len(taken) < REPEATS and time.perf_counter() - began < PATIENCE:
        taken.append(_seconds(run, clock))
    return min(taken)


def _seconds(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    run()
    return clock() - start

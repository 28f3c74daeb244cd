"""Fidelity to a known truth: PSNR and SSIM, and where their packages are installed ssimulacra2, FLIP, VMAF and XPSNR.

Higher is better everywhere: FLIP, an error, is shown as 1 - FLIP.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from openwu.evaluation.benchmarks.real import ffmpeg
from openwu.evaluation.cases import image_tensor
from openwu.evaluation.judges import EDITED, FAILED, SCORED, TARGET, Answer, Judge, Question, Respondent, Rubric
from openwu.evaluation.metrics import psnr, ssim
from openwu.evaluation.stages.record import StoredCase
from openwu.extras import library

VERSION = "1"
CAP = 60.0
"""dB, of equal pictures too."""


def _psnr(edited: Image.Image, target: Image.Image) -> float:
    return min(CAP, float(psnr(image_tensor(edited), image_tensor(target))))


def _ssim(edited: Image.Image, target: Image.Image) -> float:
    return ssim(image_tensor(edited), image_tensor(target))


def _ssimulacra2(edited: Image.Image, target: Image.Image) -> float:
    measure = library("ssimulacra2", "measures").compute_ssimulacra2
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("target.png", "edited.png")]
        for file, image in zip(files, (target, edited), strict=True):
            image.save(file)
        return max(-100.0, float(measure(*map(str, files))))


def _flip(edited: Image.Image, target: Image.Image) -> float:
    arrays = [np.asarray(image, np.float32) / 255 for image in (target, edited)]
    with contextlib.redirect_stdout(io.StringIO()):
        _, error, _ = library("flip_evaluator", "measures").evaluate(*arrays, "LDR", applyMagma=False)
    return 1 - float(error)


def _vmaf(edited: Image.Image, target: Image.Image) -> float:
    log = _compared(edited, target, "libvmaf=log_fmt=json:log_path=log.txt")
    return float(json.loads(log)["pooled_metrics"]["vmaf"]["mean"])


def _xpsnr(edited: Image.Image, target: Image.Image) -> float:
    """XPSNR of the luma plane."""
    log = _compared(edited, target, "xpsnr=stats_file=log.txt")
    found = re.search(r"XPSNR y: *(\S+)", log)
    return min(CAP, float(found[1])) if found else math.nan


def _compared(edited: Image.Image, target: Image.Image, measure: str) -> str:
    """Run a filter of ffmpeg that compares two pictures, and return what it wrote to `log.txt`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        edited.save(folder / "edited.png")
        target.save(folder / "target.png")
        graph = f"[0:v]format=yuv420p[a];[1:v]format=yuv420p[b];[a][b]{measure}"
        ffmpeg("-i", "edited.png", "-i", "target.png", "-lavfi", graph, "-f", "null", "-", folder=folder)
        return (folder / "log.txt").read_text(encoding="utf-8")


Measure = Callable[[Image.Image, Image.Image], float]
MEASURES: dict[str, tuple[Measure, tuple[float, float]]] = {
    "PSNR": (_psnr, (0, CAP)),
    "SSIM": (_ssim, (0, 1)),
    "ssimulacra2": (_ssimulacra2, (-100, 100)),
    "1 - FLIP": (_flip, (0, 1)),
    "VMAF": (_vmaf, (0, 100)),
    "XPSNR": (_xpsnr, (0, CAP)),
}
"""Measure -> function (edited, target), and its worst and best value."""
BASIC = ("PSNR", "SSIM")


class Fidelity(Rubric):
    """Measures against the truth; cases without one have no scores, and are counted."""

    headline = "PSNR"

    def __init__(self, measures: Sequence[str] = BASIC) -> None:
        self.name = "fidelity" if tuple(measures) == BASIC else "fidelity-all"
        self.metrics: Mapping[str, tuple[float, float]] = {name: MEASURES[name][1] for name in measures}

    def questions(self, _case: StoredCase, /) -> Sequence[Question]:
        return (Question(self.name, VERSION, "", (EDITED, TARGET), dict.fromkeys(self.metrics, (-100, 100))),)

    def combine(self, answers: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        (scores,) = answers.values()
        return dict(scores)


class Measurer(Respondent):
    """Computes every measure of the question."""

    name = "measures"

    def __init__(self, measures: Sequence[str]) -> None:
        self.measures = tuple(measures)

    def identity(self) -> dict[str, object]:
        return {"measures": list(self.measures), "version": VERSION}

    def check(self) -> None:
        """Raise OpenwuError, with the command to install it, for a measure whose package is missing."""
        packages = {
            "ssimulacra2": "ssimulacra2",
            "1 - FLIP": "flip_evaluator",
            "VMAF": "imageio_ffmpeg",
            "XPSNR": "imageio_ffmpeg",
        }
        for measure in self.measures:
            if measure in packages:
                library(packages[measure], "measures")

    def answer(self, _question: Question, case: StoredCase, pictures: Mapping[str, Image.Image], /) -> Answer:
        if TARGET not in pictures:
            return Answer(FAILED, note=f"case {case.key!r} has no truth to measure against")
        if pictures[EDITED].size != pictures[TARGET].size:
            return Answer(FAILED, note="the truth has another size")
        scores = {name: MEASURES[name][0](pictures[EDITED], pictures[TARGET]) for name in self.measures}
        if not all(map(math.isfinite, scores.values())):
            return Answer(FAILED, note=f"not a number: {scores}")
        return Answer(SCORED, scores)


def fidelity_judge(measures: Sequence[str] = BASIC) -> Judge:
    """Return the judge that measures fidelity."""
    return Judge(Fidelity(measures), Measurer(measures))

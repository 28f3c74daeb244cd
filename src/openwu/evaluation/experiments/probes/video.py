"""One adapter for a clip, against an adapter for each frame and against new noise for each frame.

Clips are made of test photographs at run time: a scene that stands still while a part of another photograph crosses it,
and one that the camera pans and zooms over. Both have a camera's noise, new in every frame.

Shapes: n frames `[3, h, w]` in 0..1.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from openwu.backbones.embedded.network import noise_plane
from openwu.data.suite import EDITS
from openwu.data.suite.core import Scene
from openwu.editor.editor import Editor
from openwu.editor.requests import EditRequest
from openwu.editor.series import make_series
from openwu.evaluation.cases import first_phrase
from openwu.evaluation.experiments.results import columns
from openwu.evaluation.judges.clips import ClipScores, Motion, measure, motions
from openwu.images import Photo

CHOSEN = ("brighten", "warm", "black_and_white", "fog", "vignette", "pencil", "add_noise", "sharpen")
"""Edits that are offered: of colour, of place, of detail, and one that is a function of the noise plane."""
GRAIN = 1.5 / 255
"""Standard deviation of the camera's noise."""
ONE, EACH, NOISE = "one adapter", "adapter per frame", "noise per frame"
SOURCE, TARGET = "source", "target per frame"


@dataclass(frozen=True)
class VideoResults:
    """Scores of every method on every edit, over all clips."""

    scores: Mapping[str, Mapping[str, Sequence[ClipScores]]]
    """Edit -> method -> scores of the clips."""
    rates: Mapping[str, float]
    """"WxH" -> frames per second of one core under one adapter."""

    def mean(self, edit: str, method: str, name: str) -> float | None:
        """Return the mean of a measure over the clips; None where it has no value."""
        values = [getattr(each, name) for each in self.scores[edit][method]]
        return None if None in values else sum(values) / len(values)

    def table(self) -> str:
        """Return flicker and warping error of every method, and dB to the targets, as plain text."""
        methods = (SOURCE, TARGET, ONE, EACH, NOISE)
        head = (
            "edit",
            *(f"{kind}: {method}" for kind in ("flicker", "warping") for method in methods),
            "dB",
            "dB each",
        )
        rows = []
        for edit in self.scores:
            errors = [_shown(self.mean(edit, method, kind)) for kind in ("flicker", "warping") for method in methods]
            rows.append((edit, *errors, *(_shown(self.mean(edit, method, "psnr"), 1) for method in (ONE, EACH))))
        rates = "".join(f"{size}: {rate:.2f} frames per second of one core\n" for size, rate in self.rates.items())
        return columns(head, rows) + rates

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as JSON."""
        scores = {
            edit: {method: [asdict(each) for each in clips] for method, clips in methods.items()}
            for edit, methods in self.scores.items()
        }
        return {"scores": scores, "frames_per_second": dict(self.rates)}


def make_clips(photographs: Mapping[str, Tensor], count: int, seed: int) -> dict[str, list[Tensor]]:
    """Make two clips of `count` frames, as large as the smallest photograph: something crosses, and a camera pans."""
    height, width = (min(photo.shape[side] for photo in photographs.values()) for side in (1, 2))
    height, width = height - height % 2, width - width % 2
    scenes = [photo[:, :height, :width] for photo in photographs.values()]
    draw = torch.Generator().manual_seed(seed)
    crossing, panning = [], []
    small = F.interpolate(scenes[1][None], scale_factor=0.4, mode="bilinear", antialias=True)[0]
    for number in range(count):
        share = number / max(count - 1, 1)
        frame = scenes[0].clone()
        left = round(share * (width - small.shape[2]))
        frame[:, height // 3 : height // 3 + small.shape[1], left : left + small.shape[2]] = small
        crossing.append(_with_grain(frame, draw))
        panning.append(_with_grain(_view(scenes[2 % len(scenes)], share), draw))
    return {"crossing": crossing, "panning": panning}


def video(
    editor: Editor, clips: Mapping[str, Sequence[Tensor]], edits: Sequence[str], seed: int, sizes: Sequence[Tensor] = ()
) -> VideoResults:
    """Edit every clip by every method and measure. `sizes`: pictures whose sizes the speed is measured at."""
    moved = {name: list(motions(frames)) for name, frames in clips.items()}
    scores: dict[str, dict[str, list[ClipScores]]] = {}
    with tqdm(total=len(edits) * len(clips), desc="edits and clips") as bar:
        for edit in edits:
            scores[edit] = {method: [] for method in (SOURCE, TARGET, ONE, EACH, NOISE)}
            for name, frames in clips.items():
                for method, score in _scores(editor, frames, moved[name], edit, seed).items():
                    scores[edit][method].append(score)
                bar.update()
    return VideoResults(scores, {f"{each.shape[2]}x{each.shape[1]}": _rate(editor, each) for each in sizes})


def _scores(
    editor: Editor, frames: Sequence[Tensor], moved: Sequence[Motion], edit: str, seed: int
) -> dict[str, ClipScores]:
    photos = [_photo(frame) for frame in frames]
    words, middle = first_phrase(edit, "en"), len(frames) // 2
    series = make_series(editor, EditRequest(photos[middle], words, seed=seed))
    noise = noise_plane(frames[0].shape[2], frames[0].shape[1], seed).float()
    scene = [Scene(frame, noise, torch.Generator().manual_seed(seed)) for frame in frames]
    targets = [EDITS[edit].make_pair(each).target for each in scene]
    results: dict[str, Callable[[], Sequence[Photo]]] = {
        ONE: lambda: series.edit(photos),
        EACH: lambda: [each.photo for each in editor.edit_batch([EditRequest(p, words, seed=seed) for p in photos])],
        NOISE: lambda: series.edit(photos, [seed + i for i in range(len(photos))]),
    }
    found = {SOURCE: measure(moved, frames), TARGET: measure(moved, targets)}
    for method, run in results.items():
        found[method] = measure(moved, [_frame(photo) for photo in run()], targets)
    return found


def _rate(editor: Editor, picture: Tensor, least: float = 1.0) -> float:
    """Frames per second of one core's time under one adapter, over at least `least` seconds."""
    photo = _photo(picture)
    series = make_series(editor, EditRequest(photo, first_phrase("warm", "en")))
    small = Photo(photo.pixels[:64, :64].copy())
    series.edit([small])  # makes the merged copy
    start, count = time.process_time(), 0
    while not count or time.process_time() - start < least:
        series.edit([photo])
        count += 1
    return count / (time.process_time() - start)


def _view(scene: Tensor, share: float) -> Tensor:
    """The camera's view at a share of its way: zoomed in from 1.3 to 1.45 times, moving to the right and down."""
    zoom = 1 / (1.3 + 0.15 * share)
    space = 1 - zoom
    move = torch.tensor([[zoom, 0, space * (share - 0.5)], [0, zoom, space * 0.5 * (share - 0.5)]])
    grid = F.affine_grid(move[None], [1, *scene.shape], align_corners=False)
    return F.grid_sample(scene[None], grid, mode="bicubic", padding_mode="reflection", align_corners=False)[0]


def _with_grain(frame: Tensor, draw: torch.Generator) -> Tensor:
    noisy = frame + GRAIN * torch.randn(frame.shape, generator=draw)
    return (noisy.clamp(0, 1) * 255).round() / 255


def _photo(frame: Tensor) -> Photo:
    return Photo((frame * 255).round().byte().permute(1, 2, 0).numpy())


def _frame(photo: Photo) -> Tensor:
    return torch.from_numpy(photo.floats()).permute(2, 0, 1)


def _shown(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"

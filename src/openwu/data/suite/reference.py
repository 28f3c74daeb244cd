"""Reference edits: the first picture takes a property of the second.

The base model never sees the second picture: it acts on the base only through the generated adapter.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from openwu.data.suite.core import Edit, Pair, Scene, blend
from openwu.data.suite.operators import gaussian, luma, saturation
from openwu.data.suite.style import STYLES
from openwu.data.suite.tone import sepia


def _second(scene: Scene) -> Tensor:
    assert scene.second is not None
    return scene.second


def _pair(scene: Scene, target: Tensor, reference: Tensor) -> Pair:
    return Pair(scene.source, blend(scene.source, target.clamp(0, 1), scene.strength), reference.clamp(0, 1))


def with_palette(x: Tensor, reference: Tensor) -> Tensor:
    """Match mean and covariance of the colours to the reference's (by the linear map closest to the identity)."""
    mean, theirs = x.mean((1, 2)), reference.mean((1, 2))
    ours, wanted = (_covariance(each) + 1e-3 * torch.eye(3) for each in (x, reference))
    root = _power(ours, 0.5)
    transfer = _power(ours, -0.5) @ _power(root @ wanted @ root, 0.5) @ _power(ours, -0.5)
    return torch.einsum("ij,jhw->ihw", transfer, x - mean.view(3, 1, 1)) + theirs.view(3, 1, 1)


def _covariance(x: Tensor) -> Tensor:
    colours = x.flatten(1)
    return torch.cov(colours, correction=_correction(colours))


def _correction(values: Tensor) -> int:
    """Return the correction of a variance over the last dimension: 1, or 0 for a single pixel."""
    return min(1, values.shape[-1] - 1)


def _power(symmetric: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(symmetric)
    powered: Tensor = vectors @ torch.diag(values.clamp(min=1e-6) ** exponent) @ vectors.t()
    return powered


def with_tone(x: Tensor, reference: Tensor) -> Tensor:
    """Match mean and standard deviation of the luma to the reference's; colours move along."""
    grey, theirs = luma(x), luma(reference)
    spread, wanted = (each.std(correction=_correction(each.flatten())) for each in (grey, theirs))
    gain = ((wanted + 0.02) / (spread + 0.02)).clamp(0.4, 2.5)
    return (x - grey.mean()) * gain + theirs.mean()


def with_light(x: Tensor, reference: Tensor) -> Tensor:
    """Apply the gamma that gives the luma the reference's mean."""
    mean, wanted = (luma(each).mean().clamp(0.05, 0.95) for each in (x, reference))
    return x.clamp(min=1e-4) ** float((wanted.log() / mean.log()).clamp(0.35, 2.8))


def with_cast(x: Tensor, reference: Tensor) -> Tensor:
    """Apply gains that give the channels the reference's ratios; the luma keeps its mean."""
    ours, theirs = x.mean((1, 2)).clamp(min=0.02), reference.mean((1, 2)).clamp(min=0.02)
    gains = ((theirs / theirs.mean()) / (ours / ours.mean())).clamp(0.5, 2.0).view(3, 1, 1)
    changed = x * gains
    return changed * (luma(x).mean() / luma(changed).mean().clamp(min=0.02))


def _lit(scene: Scene) -> Tensor:
    """Brighten or darken the second photograph at random."""
    return _second(scene).clamp(min=1e-4) ** float(torch.exp(torch.tensor(scene.uniform(-0.8, 0.8))))


def _tinted(scene: Scene) -> Tensor:
    gains = torch.exp(torch.tensor([scene.uniform(-0.4, 0.4) for _ in range(3)])).view(3, 1, 1)
    return (_second(scene) * gains).clamp(0, 1)


def _ranged(scene: Scene) -> Tensor:
    second = _second(scene)
    return (0.5 + scene.uniform(0.4, 1.5) * (second - 0.5) + scene.uniform(-0.15, 0.15)).clamp(0, 1)


def _taking(
    statistic: Callable[[Tensor, Tensor], Tensor], prepare: Callable[[Scene], Tensor]
) -> Callable[[Scene], Pair]:
    """Make pairs whose source gets a statistic of the reference, which `prepare` makes of the second photograph."""

    def make(scene: Scene) -> Pair:
        reference = prepare(scene)
        return _pair(scene, statistic(scene.source, reference), reference)

    return make


def _take_grain(scene: Scene) -> Pair:
    sigma, second = scene.uniform(0.03, 0.18), _second(scene)
    grainy = second + sigma * scene.normal_like(second[:1])
    return _pair(scene, scene.source + sigma * scene.noise, grainy)


def _take_sharpness(scene: Scene) -> Pair:
    """Blur or sharpen source and reference alike."""
    amount = scene.uniform(-1, 1)

    def focused(x: Tensor) -> Tensor:
        return gaussian(x, 0.7 + 2.3 * amount) if amount > 0 else x + (0.5 - amount) * (x - gaussian(x, 1.2))

    return _pair(scene, focused(scene.source), focused(_second(scene)))


LOOKS = (*STYLES, sepia, lambda x: saturation(x, 0.0))
"""Styles that a reference picture may have."""


def _take_style(scene: Scene) -> Pair:
    look = LOOKS[min(int(scene.uniform(0, len(LOOKS))), len(LOOKS) - 1)]
    return _pair(scene, look(scene.source), look(_second(scene)))


REFERENCE = tuple(
    Edit(name, "reference", make, graded=False, limit=1.0, needs_reference=True)
    for name, make in (
        ("take_palette", _taking(with_palette, _tinted)),
        ("take_tone", _taking(with_tone, _ranged)),
        ("take_grain", _take_grain),
        ("take_style", _take_style),
        ("take_light", _taking(with_light, _lit)),
        ("take_sharpness", _take_sharpness),
        ("take_cast", _taking(with_cast, _tinted)),
    )
)

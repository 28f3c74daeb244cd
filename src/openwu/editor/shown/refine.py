"""Refine generated adapters on the pairs of their example: a few steps of Adam on the factors, the base frozen.

The generated adapter is the start. What comes back is the best of it and of the steps: on squares of the example that
no step trains on, and then by the check of the example itself (`reproduction`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from openwu.adapters.inject import AdapterHandle, attach
from openwu.backbones.protocol import EditJob, ExampleFit, Progress
from openwu.editor.cache import request_key
from openwu.editor.requests import EditRequest, Task
from openwu.editor.shown.reproduction import Reproduction, reduced, reproduction
from openwu.editor.shown.solve import changed
from openwu.errors import TargetError
from openwu.files.weights import sampled_digest
from openwu.images import Photo
from openwu.types import Adapter

if TYPE_CHECKING:
    from openwu.editor.editor import Editor

LEARNING_RATE = 1e-2
"""Adam's, for factors that were generated; it rises over a fifth of the steps (5 to 20) and falls to 0 over the last
three fifths.
"""
BETAS = (0.9, 0.98)
LARGEST_NORM = 1.0
"""The gradient is scaled down to it."""
CHECKS = 3
"""How often the squares that are held out are looked at, beside the start."""


def refine_adapters(
    editor: Editor,
    jobs: Sequence[EditJob],
    starts: Sequence[Adapter],
    allow_out_of_scope: bool,
    progress: Progress | None = None,
) -> list[Adapter]:
    """Return the adapters (b = 1), each trained on its job's examples where the job says so, or taken from the cache.

    Jobs of one example share an adapter. `progress` is called with (steps done, steps in all) of what is trained, first
    with 0 steps, and never if all adapters come from the cache.
    """
    asked = {place: _key(editor, job, allow_out_of_scope) for place, job in enumerate(jobs) if job.refine}
    found: dict[str, Adapter] = {}
    missing = list(dict.fromkeys(asked.values()))
    if editor.cache is not None:
        found, missing = editor.cache.lookup(missing)
    places = {key: next(place for place, own in asked.items() if own == key) for key in missing}
    done, total = 0, sum(jobs[place].refine for place in places.values())

    def report(step: int, _: int) -> None:
        if progress is not None:
            progress(done + step, total)

    for key, place in places.items():
        report(0, total)
        found[key] = _refined(editor, jobs[place], starts[place], report, checked=not allow_out_of_scope)
        done += jobs[place].refine
        if editor.cache is not None:
            editor.cache.put(key, found[key])
    home = editor.generator.hidden_in.weight
    return [
        replace(found[asked[place]].to(home), instructions=start.instructions) if place in asked else start
        for place, start in enumerate(starts)
    ]


def reproduced_by(editor: Editor, job: EditJob, adapter: Adapter) -> Reproduction:
    """Compare a job's examples with what an adapter (b = 1) makes of their pictures before."""

    def edit(photos: list[Photo]) -> list[Photo]:
        jobs = [replace(job, photos=(photo,), examples=()) for photo in photos]
        tasks = [Task(EditRequest([]), each, None) for each in jobs]
        return editor._apply(tasks, [adapter] * len(tasks), editor.sampling, None)

    return reproduction(job.examples, edit)


@torch.inference_mode(False)  # whatever the caller is in: steps need gradients
def _refined(editor: Editor, job: EditJob, start: Adapter, progress: Progress, *, checked: bool) -> Adapter:
    """Train one adapter; the start itself where no step is better by the check of the example.

    Raises TargetError for an adapter that changes nothing and, `checked`, ExampleError for an example that shows none.
    """
    generated = reproduced_by(editor, job, start)
    if checked:
        generated.check_change()
    trained = changed(start)
    if not trained:
        raise TargetError("refine: expected a generated adapter to start from, got one of zeros; train the generator")
    part = replace(start, targets=trained, factors={target.name: start.factors[target.name] for target in trained})
    pairs = tuple((reduced(before, between=True), reduced(after, between=True)) for before, after in job.examples)
    fit = editor.backbone.fit_example(replace(job, examples=pairs), [target.name for target in trained])
    with attach(fit.denoiser, trained) as handle:
        best = fit_adapter(handle, part, fit, job.refine, progress)
    own = best.to(next(iter(start.state_dict().values()))).factors
    refined = replace(start, factors={**start.factors, **own}, refined=(job.refine,))
    if reproduced_by(editor, job, refined).share < generated.share:
        return replace(start, refined=refined.refined)
    return refined


def _key(editor: Editor, job: EditJob, allow_out_of_scope: bool) -> str:
    """Cache key of a refined adapter: that of the generated one, the steps, the base and the pixels that they see."""
    start = editor.adapter_key(replace(job, refine=0), allow_out_of_scope=allow_out_of_scope)
    base = sampled_digest({"": editor.backbone.denoiser})
    photos = [photo for pair in job.examples for photo in pair]
    shown = [reduced(photo, between=between).pixels for photo in photos for between in (False, True)]
    return request_key(start, shown, "", how=f"refined {job.refine} {base}")


def fit_adapter(
    handle: AdapterHandle,
    start: Adapter,
    fit: ExampleFit,
    steps: int,
    progress: Progress | None = None,
    *,
    learning_rate: float | None = None,
) -> Adapter:
    """Train the factors of an adapter (b = 1) on an example and return the best of it and its steps, in float32.

    `handle`: of `fit.denoiser`, with the adapter's targets. `progress` is called with (steps done, steps).
    `learning_rate`: None for LEARNING_RATE.
    """
    rate = LEARNING_RATE if learning_rate is None else learning_rate
    shared = {target.name: target.rules.shared for target in start.targets}
    factors = {
        name: {part: each.detach().float().clone() for part, each in parts.items()}
        for name, parts in start.factors.items()
    }
    trained = [each for name, parts in factors.items() for part, each in parts.items() if part not in shared[name]]
    dtype = next(fit.denoiser.parameters()).dtype
    adapter = replace(start, factors=factors)
    best, least = _copy(adapter), _held_out(handle, adapter, fit, dtype)
    with torch.enable_grad():
        optimizer = torch.optim.Adam([each.requires_grad_() for each in trained], lr=rate, betas=BETAS)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = rate * _rate(step, steps)
            with handle.applied(adapter.to(dtype)):
                torch.autograd.backward(fit.loss(step, steps))
            nn.utils.clip_grad_norm_(trained, LARGEST_NORM)
            optimizer.step()
            optimizer.zero_grad()
            if progress is not None:
                progress(step + 1, steps)
            if (step + 1) % max(1, steps // CHECKS) == 0 or step + 1 == steps:
                error = _held_out(handle, adapter, fit, dtype)
                if error < least:
                    best, least = _copy(adapter), error
    return best


def _rate(step: int, steps: int) -> float:
    """The share of the learning rate at a step."""
    return min(1.0, (step + 1) / min(20, max(5, steps // 5)), (steps - step) / (0.6 * steps))


@torch.no_grad()
def _held_out(handle: AdapterHandle, adapter: Adapter, fit: ExampleFit, dtype: torch.dtype) -> float:
    with handle.applied(adapter.to(dtype)):
        return fit.held_out()


def _copy(adapter: Adapter) -> Adapter:
    factors = {
        name: {part: each.detach().clone() for part, each in parts.items()} for name, parts in adapter.factors.items()
    }
    return replace(adapter, factors=factors)

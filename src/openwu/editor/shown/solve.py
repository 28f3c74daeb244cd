"""Solve for what of a generated adapter has a closed form, on the pairs of its example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from openwu.adapters.inject import attach
from openwu.backbones.protocol import Backbone, EditJob
from openwu.editor.shown.reproduction import reduced
from openwu.images.colour import Pixels
from openwu.types import Adapter, Target


def solved_adapter(base: Backbone, job: EditJob, adapter: Adapter) -> Adapter:
    """Return a job's adapter (b = 1) as it is where the job has no example, or the base solves nothing."""
    if not job.examples or not base.solves_examples:
        return adapter
    own = changed(adapter)
    if not own:
        return adapter
    part = replace(adapter, targets=own, factors={target.name: adapter.factors[target.name] for target in own})
    pairs = tuple((reduced(before, between=True), reduced(after, between=True)) for before, after in job.examples)
    fit = base.fit_example(replace(job, examples=pairs), [target.name for target in own])
    with attach(fit.denoiser, own) as handle:
        return replace(adapter, factors={**adapter.factors, **fit.solve(handle.applied, part).factors})


def solved_on(base: Backbone, job: EditJob) -> Sequence[Pixels]:
    """Return what is read of a job's examples for that, for its adapter's cache key."""
    if not base.solves_examples:
        return ()
    return [reduced(photo, between=True).pixels for pair in job.examples for photo in pair]


def changed(adapter: Adapter) -> tuple[Target, ...]:
    """Return the targets for which an adapter has numbers other than 0."""
    return tuple(
        target for target in adapter.targets if any(bool(part.any()) for part in adapter.factors[target.name].values())
    )

"""One request for many pictures: understood once, its adapters generated once and merged once, for clips."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from openwu.adapters.inject import AdapterHandle
from openwu.adapters.merge import merged_copy, merging_pays
from openwu.backbones.protocol import Backbone
from openwu.editor.compatibility import AdapterScope
from openwu.editor.generate import adapters_of, try_example
from openwu.editor.requests import EditRequest, Task, job_of
from openwu.editor.shown.reproduction import Reproduction
from openwu.editor.tasks import pass_of, read_photos
from openwu.images import Photo
from openwu.types import Adapter, Understood

if TYPE_CHECKING:
    from openwu.editor.editor import Editor

MANY = 1000
"""Passes of the denoiser over which the cost of a merged copy is spread."""


class SharedScope(AdapterScope):
    """A scope in which all requests have one adapter (b = 1), and share one copy of the denoiser with it merged."""

    def __init__(
        self, backbone: Backbone, handle: AdapterHandle, adapter: Adapter, lock: AbstractContextManager[object]
    ) -> None:
        super().__init__(backbone, handle, [adapter], lock)
        self._merging = threading.Lock()
        self._copy: nn.Module | None = None

    @contextmanager
    def rows(self, owners: Sequence[int]) -> Iterator[None]:
        """Apply the adapter to all rows that belong to a request; see `RequestScope`."""
        with super().rows([min(owner, 0) for owner in owners]):
            yield

    def prefers_module(self, rows: Mapping[str, int]) -> bool:
        adapter = self.adapters[0]
        return merging_pays(self.backbone.denoiser, adapter.targets, adapter.rank, rows, forwards=MANY)

    def module_for(self, owner: int) -> nn.Module:
        del owner
        with self._merging:
            if self._copy is None:
                self._copy = merged_copy(self.backbone.denoiser, self.adapters[0])
            return self._copy


@dataclass(frozen=True)
class SeriesPass:
    """One instruction of a series, with its adapter."""

    editor: Editor
    task: Task
    adapter: Adapter
    scope: SharedScope

    def edit(self, photos: Sequence[Photo], seeds: Sequence[int]) -> list[Photo]:
        """Edit photos in a pass with the one adapter; together, where the base denoises frames of a clip so."""
        if self.editor.backbone.clip_frames is not None:
            with self.editor._turn():
                return self.editor.backbone.edit_frames(photos, self.task.job, self.editor.sampling, self.scope)
        references, words = self.task.job.photos[1:], self.task.job.instructions
        tasks = []
        for photo, seed in zip(photos, seeds, strict=True):
            request = replace(self.task.request, seed=seed)
            job = job_of(self.editor.backbone, request, (photo, *references), words)
            tasks.append(Task(request, job, self.task.understood))
        return self.editor._apply(tasks, [self.adapter] * len(tasks), self.editor.sampling, None, self.scope)


@dataclass(frozen=True)
class Series:
    """What one request does to every picture of a series."""

    passes: tuple[SeriesPass, ...]
    understood: Understood | None
    seed: int
    reproduced: Reproduction | None = None
    """How much of an example's own change the adapter makes; None without an example, or with a stored adapter."""

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """One per pass (b = 1), before strength."""
        return tuple(each.adapter for each in self.passes)

    @torch.no_grad()
    def edit(self, photos: Sequence[Photo], seeds: Sequence[int] | None = None) -> list[Photo]:
        """Edit photos. `seeds`: one per photo, of its noise; None: the request's for all, so that it stands still."""
        for each in self.passes:
            photos = each.edit(photos, seeds or [self.seed] * len(photos))
        return list(photos)


@torch.no_grad()
def make_series(
    editor: Editor,
    request: EditRequest,
    *,
    given: Adapter | None = None,
    stored: Sequence[Adapter] = (),
    allow_out_of_scope: bool = False,
) -> Series:
    """Understand a request and generate its adapters on its picture, the one that stands for the series.

    `given`: an adapter in place of a generated one, as in `Editor.edit`. `stored`: what an earlier call generated for
    this very request, one adapter per pass. Raises OpenwuError as `Editor.edit` does.
    """
    (request,) = editor._checked([request], allow_out_of_scope, editor.sampling)
    task = editor._task(
        request, read_photos(request, editor.backbone, editor.name), given, not allow_out_of_scope and given is None
    )
    count = 1 if given is not None else len(task.job.instructions)
    adapters = list(stored) if given is None else [given]
    passes: list[SeriesPass] = []
    photo, reproduced = task.job.photos[0], None
    for number in range(count):
        part = task
        if count > 1:
            if passes and not stored:
                (photo,) = passes[-1].edit([photo], [task.job.seed])
            part = pass_of(task, number, photo, editor.backbone)
        if number == len(adapters):
            adapters += adapters_of(editor, [part.job], allow_out_of_scope, 1, {})
            reproduced = try_example(editor, part, adapters[-1], allow_out_of_scope, {})
        adapter = adapters[number].to(editor.generator.hidden_in.weight)
        scaled = adapter.scaled(editor._scale(request.strength))
        scope = SharedScope(editor.backbone, editor.handle, scaled, editor._turns)
        passes.append(SeriesPass(editor, part, adapter, scope))
    return Series(tuple(passes), task.summary, task.job.seed, reproduced)

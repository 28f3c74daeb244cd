"""Passes of the embedded base's network: which jobs share one, with an adapter by hooks or in a copy, and running them.

Shapes: K instruction tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from openwu.backbones.embedded.instruction import InstructionEncoder
from openwu.backbones.embedded.network import TinyEditor
from openwu.backbones.embedded.piecewise.pieces import (
    PiecewiseEdit,
    edited_whole,
    is_whole,
    number_of_pieces,
    pictures_per_pass,
)
from openwu.backbones.embedded.words.wishes import Reading
from openwu.backbones.protocol import EditJob, Progress, RequestScope, RowScope
from openwu.images import Photo
from openwu.kernels.threads import in_parallel


@dataclass(frozen=True)
class EmbeddedJob(EditJob):
    """A job with its instructions encoded once: for its scope, its condition and its edit."""

    encoder: InstructionEncoder = field(kw_only=True)
    frame: int = field(default=0, kw_only=True)
    """Pixels at each border of the photo that continue it, see `place_planes`."""

    @cached_property
    def tokens(self) -> Tensor:
        """Instruction tokens `[instructions, K, text_dim]`."""
        tokens: Tensor = self.encoder(self.instructions)
        return tokens

    @cached_property
    def reading(self) -> Reading:
        """What the encoder takes the first instruction for."""
        return self.encoder.readings(self.instructions[:1])[0]


@dataclass
class Pass:
    """A pass of the network for one or several jobs with photos of equal size and frame."""

    network: TinyEditor
    scope: RequestScope
    owners: Sequence[int]
    jobs: Sequence[EmbeddedJob]
    copied: bool
    """Whether the one job's adapter is in a copy of the network; otherwise hooks apply each job's."""
    edited: list[Photo] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.text = torch.stack([job.tokens.flatten(0, 1) for job in self.jobs])

    @property
    def photos(self) -> list[Photo]:
        return [job.photos[0] for job in self.jobs]

    @property
    def frame(self) -> int:
        return self.jobs[0].frame

    @property
    def small(self) -> bool:
        """Whether the photos are one piece."""
        return is_whole(*self.photos[0].size)

    @property
    def pieces(self) -> int:
        return number_of_pieces(self.network.config, *self.photos[0].size)

    def run(self, done: Callable[[], None]) -> None:
        """Edit the photos, piece by piece; `done` is called after each."""
        if self.copied:
            self._run(self._module(), done)
            return
        with self.scope.rows(self.owners):
            self._run(self.network, done)

    def whole(self) -> None:
        """Edit the photos in one piece with a copy of the network."""
        self._edit_whole(self._module())

    def _run(self, network: TinyEditor, done: Callable[[], None]) -> None:
        if self.small:
            in_parallel([partial(self._edit_whole, network)], done)
            return
        job = PiecewiseEdit(network, self.photos, [job.seed for job in self.jobs], self.text, self.frame)
        for stage in job.stages():
            in_parallel(stage, done)
        self.edited = job.edited()

    def _edit_whole(self, network: TinyEditor) -> None:
        self.edited = edited_whole(network, self.photos, [job.seed for job in self.jobs], self.text, self.frame)

    def _module(self) -> TinyEditor:
        module = self.scope.module_for(self.owners[0])
        assert isinstance(module, TinyEditor)
        return module


def passes_of(
    network: TinyEditor,
    jobs: Sequence[EmbeddedJob],
    scope: RequestScope,
    rows: Callable[[int], Mapping[str, int]],
    batch: int,
) -> list[Pass]:
    """Return which jobs share a pass of the network, and whether through hooks or in a copy.

    `rows`: pixels of a photo -> input rows of every module that can carry an adapter.
    """
    groups: dict[tuple[tuple[int, int], int, int], list[int]] = {}
    for index, job in enumerate(jobs):
        groups.setdefault((job.photos[0].size, len(job.instructions), job.frame), []).append(index)
    passes = []
    for (size, *_), members in groups.items():
        copied = scope.prefers_module(rows(size[0] * size[1]))
        count = 1 if copied else min(batch, pictures_per_pass(*size))
        for start in range(0, len(members), count):
            owners = members[start : start + count]
            passes.append(Pass(network, scope, owners, [jobs[owner] for owner in owners], copied))
    return passes


def run_passes(passes: Sequence[Pass], progress: Progress | None) -> list[Photo]:
    """Run passes piece by piece and return the edited photos in the order of the jobs.

    `progress` is called with (pieces done, pieces in all) in the caller's thread.
    """
    total = sum(each.pieces for each in passes)
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    # Small photos with networks of their own fill the threads together, large ones each alone.
    in_parallel([each.whole for each in passes if each.copied and each.small], count)
    for each in passes:
        if not (each.copied and each.small):
            each.run(count)
    edited = {index: photo for each in passes for index, photo in zip(each.owners, each.edited, strict=True)}
    return [edited[index] for index in sorted(edited)]


@dataclass(frozen=True)
class RowsOnly:
    """A scope that has no copies of the network to offer."""

    rows: RowScope

    def prefers_module(self, rows: Mapping[str, int]) -> bool:
        del rows
        return False

    def module_for(self, owner: int) -> nn.Module:
        raise AssertionError(owner)

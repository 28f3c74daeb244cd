"""What a base model must provide to be edited with, and to be trained for: its backbone, and nothing more.

A backbone knows its base's pipeline, but no adapters: it says which request each row of its denoiser's input belongs to
by entering the scope that it is given, and whoever gave it applies adapters there. docs/adding-a-base.md: an example.

Shapes: b requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Self

    import torch
    from torch import Tensor, nn

    from openwu.config import LayerGroup
    from openwu.types import BaseRequest, Condition, LatentBatch, SamplingOptions

RowScope = Callable[[Sequence[int]], AbstractContextManager[None]]
"""Opens the scope of a pass of the denoiser: for every row of its input, the request that the row belongs to (-1 for
none). A base that stacks its guidance rows says so here: `[0, 1, 0, 1, 0, 1]` for two requests in three blocks."""

Routing = tuple[str, Callable[[Any], "Tensor"]]
"""Path of the router from the module that holds the experts, and its output -> indices of the chosen experts [T, k]."""

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""

Prediction = Literal["flow", "epsilon", "v"]
"""What a denoiser says: noise - target on a straight path, the noise of a diffusion, or its velocity."""


@dataclass(frozen=True)
class BaseFacts:
    """What `openwu models` says about a base."""

    weights: str
    """Where its weights are published."""
    licence: str
    """Licence of the weights, in words, with what it excludes."""
    parameters: str
    """Size of the denoiser."""
    extra: str = "diffusers"
    """Extra of our package that it needs: `pip install 'openwu[EXTRA]'`."""


class ConditionEncoder(Protocol):
    """Makes what a generator reads. Every backbone is one; `openwu.conditions` has others that take its place."""

    @property
    def condition_widths(self) -> Mapping[str, int]:
        """Width of the tokens of every segment of a condition; the first is `Condition.tokens`, others `more`."""
        ...

    def condition(self, requests: Sequence[BaseRequest]) -> Condition:
        """What a generator reads of each request."""
        ...


class Backbone(ConditionEncoder, Protocol):
    """A frozen base model."""

    facts: ClassVar[BaseFacts]
    loading_options: ClassVar[frozenset[str]] = frozenset()
    """Further arguments of its `from_pretrained`: of `trust_remote_code`, `quantise`, `offload`, `reserve_bytes`."""
    reasons: ClassVar[bool] = False
    """Whether it writes down its reasoning before it draws, and reads `BaseRequest.reasoning`."""

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        revision: str | None = None,
    ) -> Self:
        """Load a folder, or a hub id at a revision. Raises OpenwuError for what a user can mend."""
        ...

    @classmethod
    def check(cls, folder: str | Path, *, revision: str | None = None, **asked: Any) -> None:
        """Raise for what is wrong with a folder, and with `asked`, those of `loading_options` that were asked for.

        Called before anything else is read, and quick: nothing is loaded or downloaded. A base may do without.
        """

    @property
    def denoiser(self) -> nn.Module:
        """The module that carries the targets: what `openwu.attach` hooks."""
        ...

    @property
    def prediction(self) -> Prediction: ...

    @property
    def alphas_cumprod(self) -> Tensor | None:
        """A diffusion's share of the target's variance at every step [steps]; None for flow matching."""
        ...

    @property
    def routing(self) -> Routing | None:
        """Where a base with experts routes its tokens, needed for several requests at once; None for one without."""
        ...

    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """What receives adapters, read off the model: linear maps of attention and feed-forward, never modulation."""
        ...

    def latent_batch(self, requests: Sequence[BaseRequest], targets: Sequence[Tensor]) -> LatentBatch:
        """A batch for training: `targets` are the wanted pictures [3, h, w] in 0..1, one per request.

        The draws of its noise belong to the objective; this is the same every time, and can be stored.
        """
        ...

    def drop_conditions(self, batch: LatentBatch, generator: torch.Generator) -> LatentBatch:
        """The batch with some of what the base is told taken away at random, where its guidance was trained so."""
        ...

    def predict(self, batch: LatentBatch, given: Tensor, time: Tensor) -> Tensor:
        """What the denoiser says [b, ...] about noisy targets `given` [b, ...] at `time` [b], 0..1 or diffusion steps.

        Only what it says about the noisy part; runs the denoiser once with one row per request.
        """
        ...

    def generate(
        self,
        requests: Sequence[BaseRequest],
        options: SamplingOptions,
        rows: RowScope,
        progress: Progress | None = None,
    ) -> list[Tensor]:
        """The edited pictures [3, h, w] in 0..1, at the size that the base worked on, through its own pipeline."""
        ...

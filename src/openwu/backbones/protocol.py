"""The protocol of base models: `Backbone`, the class that every base inherits from, and what it is handed.

A base knows its pipeline, but no adapters. It is handed a `RequestScope`: around every pass of its denoiser it says
there which request each row of the denoiser's input belongs to, and whoever gave the scope applies adapters. Members
with a body are optional. docs/adding-a-base.md has an example.

Shapes: b requests; h and w the sides of a picture.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, Protocol, Self

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from openwu.config import LayerGroup
from openwu.errors import OpenwuError
from openwu.files.weights import sampled_digest
from openwu.images import Photo
from openwu.images.colour import Pixels
from openwu.images.instruction import check_prompt
from openwu.types import (
    Adapter,
    BaseRequest,
    Condition,
    ConditionEncoder,
    LatentBatch,
    SamplingOptions,
    Understood,
)

RowScope = Callable[[Sequence[int]], AbstractContextManager[None]]
"""Opens the scope of a pass of the denoiser: for every row of its input, the request that the row belongs to (-1 for
none). A base that stacks its guidance rows passes `[0, 1, 0, 1, 0, 1]` for two requests in three blocks."""

Routing = tuple[str, Callable[[Any], Tensor]]
"""Path of the router from the module that holds the experts, and its output -> indices of the chosen experts [T, k]."""

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""

Prediction = Literal["flow", "epsilon", "v"]
"""What a denoiser predicts: noise - target on a straight path, the noise of a diffusion, or its velocity."""


@dataclass(frozen=True)
class BaseFacts:
    """What `openwu models` prints about a base."""

    weights: str
    """Where its weights are published."""
    licence: str
    """Licence of the weights, in words, with what it excludes."""
    parameters: str
    """Size of the denoiser."""
    extra: str = "diffusers"
    """Extra of our package that it needs: `pip install 'openwu[EXTRA]'`; empty for none."""


@dataclass(frozen=True)
class KnownEdit:
    """One edit that a base knows by name."""

    name: str
    examples: Mapping[str, str]
    """Language code -> a sentence that asks for it."""
    reference: bool = False
    """Whether it needs a second picture."""
    withdrawn: bool = False
    """Whether it is refused, since the base does it too badly to offer it; asked for all the same, it is tried."""


@dataclass(frozen=True)
class BundledGenerator:
    """A generator in files of the base's own folder."""

    config: Mapping[str, Any]
    """Fields of its `GeneratorConfig`, as JSON holds them."""
    weights: Path
    """Its safetensors file, with the module's own names."""


@dataclass(frozen=True)
class EditJob:
    """One request with its pictures decoded, as an editor hands it to a base."""

    photos: tuple[Photo, ...]
    """The picture to edit, then references, in the depth in which they were read."""
    instructions: tuple[str, ...]
    """What to do, in order. A pass has one instruction, or those of an adapter that is the sum of several."""
    seed: int = 0
    reasoning: str | None = None
    image_size: str | None = None
    """Size of the result, for bases of `own_sizes`."""
    examples: tuple[tuple[Photo, Photo], ...] = ()
    """Pairs before and after an edit that is shown rather than said; only the condition reads them."""
    per_photo: bool = False
    """With examples: whether the condition reads the photo, too, for an adapter of its own."""
    refine: int = 0
    """With examples: steps on them after the adapter was generated; read by the editor alone."""

    @cached_property
    def pixels(self) -> list[Pixels]:
        """Every picture with 8 bits per channel, `[h, w, 3]`."""
        return [photo.eight_bit().pixels for photo in self.photos]

    @cached_property
    def request(self) -> BaseRequest:
        """The job as large bases take it: pictures of 8 bits, and one text."""
        pictures = tuple(Image.fromarray(pixels) for pixels in self.pixels)
        return BaseRequest(pictures, ". ".join(self.instructions), self.seed, self.reasoning, self.image_size)


class RequestScope(Protocol):
    """What a base enters while its denoiser runs. Requests are numbered as in the jobs that came with the scope."""

    def rows(self, owners: Sequence[int]) -> AbstractContextManager[None]:
        """Open the scope of a pass of the base's own denoiser; see `RowScope`."""
        ...

    def prefers_module(self, rows: Mapping[str, int]) -> bool:
        """Return whether a denoiser of one request's own is cheaper than `rows` of this base's.

        `rows`: how many input rows go through each module of the denoiser in all passes of one request, by its path.
        """
        ...

    def module_for(self, owner: int) -> nn.Module:
        """Return a denoiser of a request's own, to be called as this base's; several threads may do so at once."""
        ...


class ExampleFit(Protocol):
    """The loss of an example's pairs, for adapters that are trained on them; see `Backbone.fit_example`."""

    @property
    def denoiser(self) -> nn.Module:
        """A replica of the base's denoiser that shares its weights and carries no adapters: what is attached to."""
        ...

    def loss(self, step: int, steps: int) -> Tensor:
        """Return the loss of a step under the adapter that is applied; what it reads is drawn by `step` alone."""
        ...

    def held_out(self) -> float:
        """Return the mean squared error, under the adapter that is applied, on what no step trains on."""
        ...

    def solve(self, applied: Callable[[Adapter], AbstractContextManager[None]], adapter: Adapter) -> Adapter:
        """Return the adapter (b = 1) with what has a closed form solved for; see `Backbone.solves_examples`.

        `applied`: the scope in which `denoiser` has an adapter.
        """
        ...


class Backbone(ConditionEncoder):
    """A frozen base model."""

    facts: ClassVar[BaseFacts]
    loading_options: ClassVar[frozenset[str]] = frozenset()
    """Further arguments of `from_pretrained`: of `trust_remote_code`, `quantise`, `offload`, `reserve_bytes`, and
    `before_weights`, which is called with the base on the meta device before any of its weights are read."""
    reasons: ClassVar[bool] = False
    """Whether the base writes down its reasoning before it draws, and reads `BaseRequest.reasoning`."""
    refuses_out_of_scope: ClassVar[bool] = False
    """Whether `understand` refuses instructions that the base does not know."""
    refines_examples: ClassVar[bool] = False
    """Whether adapters can be trained on examples through the base, by `fit_example`."""
    solves_examples: ClassVar[bool] = False
    """Whether part of an adapter that an example generated is solved for on the example, by `fit_example(...).solve`.
    """
    identity_at_zero: ClassVar[bool] = False
    """Whether strength is the share of the edit's change, which `finish` makes of an edit in full, so that 0 is the
    picture as it is; otherwise it is the factor on the adapter, and 0 the base without one."""
    strengths: ClassVar[tuple[float, float]] = (-math.inf, math.inf)
    """The smallest and the largest strength that the base serves."""
    default_seed: ClassVar[int] = 0
    """Seed of requests that name none."""
    own_sizes: ClassVar[bool] = False
    """Whether the base draws at sizes of its own: it then reads `image_size` and `SamplingOptions.fit_to_photo`."""
    concurrent: ClassVar[bool] = False
    """Whether several threads may encode conditions and edit at once; otherwise they take turns."""
    max_pictures: ClassVar[int | None] = None
    """Pictures of a request that the base reads, references included; None: any number."""
    clip_frames: ClassVar[int | None] = None
    """Frames of a clip that the base denoises together, at most; None: each frame is an edit of its own."""
    max_batch: int | None = None
    """Requests that share a call of generator and base, at most; None: as many as `SamplingOptions.batch`."""

    @classmethod
    @abstractmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        revision: str | None = None,
    ) -> Self:
        """Load a folder, or a hub id at a revision. Raises OpenwuError for what a user can mend."""

    @classmethod
    def check(cls, folder: str | Path, *, revision: str | None = None, **options: Any) -> None:
        """Raise OpenwuError for what is wrong with a folder, or with `options`, those of `loading_options` in use.

        Called before anything else is read, and quick: nothing is loaded or downloaded.
        """

    @classmethod
    def default_device(cls) -> torch.device:
        """Where the base computes if nobody says."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @classmethod
    def bundled_folder(cls) -> Path | None:
        """The folder of weights inside this package; None for a base that does not come with it."""
        return None

    @classmethod
    def bundled_generator(cls, folder: Path) -> BundledGenerator | None:
        """The generator that a folder of this base holds; None for bases whose generators are folders of their own."""
        del folder
        return None

    @property
    @abstractmethod
    def denoiser(self) -> nn.Module:
        """The module that carries the targets: what `openwu.attach` hooks."""

    @abstractmethod
    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """What receives adapters, read off the model: linear maps of attention and feed-forward, never modulation."""

    @property
    def prediction(self) -> Prediction:
        return "flow"

    @property
    def reads_examples(self) -> bool:
        """Whether conditions are read off `EditJob.examples`."""
        return False

    @property
    def alphas_cumprod(self) -> Tensor | None:
        """A diffusion's share of the target's variance at every step [steps]; None for flow matching."""
        return None

    @property
    def routing(self) -> Routing | None:
        """Where a base with experts routes its tokens, needed for several requests at once; None for one without."""
        return None

    def example_call(self) -> Callable[[nn.Module], Tensor] | None:
        """A call of the denoiser, or of a copy of it, with fixed random inputs; None where none is known.

        Exports are compared on it as a whole, beside the comparison of every adapted module.
        """
        return None

    def parts(self) -> Mapping[str, Any]:
        """Modules of the base by name, encoders included, for conditions that are read off one of them."""
        return {}

    @cached_property
    def identity(self) -> str:
        """Hash of what conditions depend on, for cache keys: samples of all weights, unless overridden."""
        modules = {name: part for name, part in self.parts().items() if isinstance(part, nn.Module)}
        return f"{type(self).__qualname__} {sampled_digest({**modules, '': self.denoiser})}"

    # Editing

    def check_instruction(self, text: object) -> str:
        """Check an instruction and return it as the base reads it: by default any text, verbatim."""
        return check_prompt(text)

    def read(
        self, photos: tuple[Photo, ...], instructions: tuple[str, ...], seed: int = 0, reasoning: str | None = None
    ) -> EditJob:
        """Make a job of decoded pictures and checked instructions."""
        return EditJob(photos, instructions, seed, reasoning)

    def as_read(self, job: EditJob) -> tuple[Sequence[Pixels], str]:
        """Pixels and words of a job (one instruction) that its condition depends on, for cache keys.

        Spellings that the base does not tell apart have equal words.
        """
        return job.pixels, job.instructions[0]

    def understand(self, job: EditJob, *, checked: bool = True) -> tuple[Understood, ...] | None:
        """Return what each wish in a job's instructions was taken for; None for a base that does not tell edits apart.

        There are more than the job has instructions where one asks for several edits. Raises InstructionError for an
        instruction that the base does not know or could only serve in part, unless `checked` is False.
        """
        del job, checked
        return None

    def edits(self) -> Mapping[str, KnownEdit]:
        """Return the edits that can be asked for by name; empty for a base that reads sentences only."""
        return {}

    def name_edit(self, edit: str) -> str:
        """Return the sentence that asks for an edit of `edits`."""
        return self.edits()[edit].examples["en"]

    def check_strength(self, understood: Sequence[Understood], strength: float) -> None:
        """Raise InstructionError for edits that make no sense at a strength, such as reversed ones."""
        del understood, strength

    def finish(self, photo: Photo, job: EditJob, understood: Sequence[Understood], strength: float) -> Photo:
        """Return an edited photo with what the base guarantees by construction, such as exact neutrality."""
        del job, understood, strength
        return photo

    def check_sampling(self, options: SamplingOptions) -> None:
        """Raise OpenwuError that names an option which the base does not have, before anything is computed."""

    def condition_of(self, jobs: Sequence[EditJob]) -> Condition:
        """Encode what a generator reads of each job (one instruction each)."""
        return self.condition([job.request for job in jobs])

    def edit(
        self,
        jobs: Sequence[EditJob],
        options: SamplingOptions,
        scope: RequestScope,
        progress: Progress | None = None,
    ) -> list[Photo]:
        """Edit every job's first picture, at its own size and depth."""
        pictures = self.generate([job.request for job in jobs], options, scope.rows, progress)
        return [with_picture(job.photos[0], picture) for job, picture in zip(jobs, pictures, strict=True)]

    def edit_frames(
        self, frames: Sequence[Photo], job: EditJob, options: SamplingOptions, scope: RequestScope
    ) -> list[Photo]:
        """Edit at most `clip_frames` frames of one clip together, as the scope's request 0; for bases that denoise so.

        `job`: of the frame that stands for the clip; its instructions and its seed are the clip's.
        """
        del frames, job, options, scope
        raise OpenwuError(
            f"frames: expected a base that denoises clips, got {type(self).__name__}; edit each frame on its own"
        )

    @abstractmethod
    def generate(
        self,
        requests: Sequence[BaseRequest],
        options: SamplingOptions,
        rows: RowScope,
        progress: Progress | None = None,
    ) -> list[Tensor]:
        """Edited pictures [3, h, w] in 0..1, at the size that the base worked on, through its own pipeline."""

    def fit_example(self, job: EditJob, adapted: Collection[str]) -> ExampleFit:
        """Make the loss of a job's examples, for bases with `refines_examples`; the job's photo is not read.

        `adapted`: paths of the denoiser's modules that adapters change: what does not depend on them is computed once.
        """
        del job, adapted
        raise OpenwuError(f"refine: expected a base that is trained through, got {type(self).__name__}; leave it out")

    # Training

    def latent_batch(self, requests: Sequence[BaseRequest], targets: Sequence[Tensor]) -> LatentBatch:
        """Make a batch for training: `targets` are the wanted pictures [3, h, w] in 0..1, one per request.

        The draws of its noise belong to the objective; this is the same every time, and can be stored.
        """
        del requests, targets
        self._no_training()

    def drop_conditions(self, batch: LatentBatch, generator: torch.Generator) -> LatentBatch:
        """Drop some of the base's own conditions at random, where its guidance was trained so (CFG dropout)."""
        del generator
        return batch

    def predict(self, batch: LatentBatch, given: Tensor, time: Tensor) -> Tensor:
        """Predict [b, ...] from noisy targets `given` [b, ...] at `time` [b], 0..1 or diffusion steps.

        Only about the noisy part; runs the denoiser once with one row per request.
        """
        del batch, given, time
        self._no_training()

    def _no_training(self) -> NoReturn:
        raise OpenwuError(
            f"training: expected a base with a loss of its own, got {type(self).__name__}, which has none; train for "
            "another base (`openwu models`)"
        )


def check_image_size(size: object) -> None:
    """Raise OpenwuError unless a size is None, "auto" (as None), HxW such as 1024x768, or a ratio W:H."""
    if size is not None and not (isinstance(size, str) and re.fullmatch(r"auto|[1-9]\d*[x:][1-9]\d*", size)):
        raise OpenwuError(f"image_size: expected auto, HxW such as 1024x1024, or W:H, got {size!r}")


def with_picture(photo: Photo, picture: Tensor) -> Photo:
    """The photo with a picture `[3, h', w']` in 0..1 of another size, scaled to its own."""
    height, width = photo.pixels.shape[:2]
    if picture.shape[1:] != (height, width):
        picture = F.interpolate(picture[None], (height, width), mode="bicubic", antialias=True)[0]
    return photo.with_pixels(picture.clamp(0, 1).permute(1, 2, 0).contiguous().numpy())

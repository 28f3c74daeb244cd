"""The nouns of openwu, as a request meets them: EditRequest -> Condition -> Target -> Adapter -> EditResult.

`BaseRequest`, `SamplingOptions` and `LatentBatch` are what large base models take.

Imports nothing else of ours. Shapes: b samples (requests) in a batch, L condition tokens, r LoRA rank, E experts,
A_dim / B_dim the input and output width of one adapted weight.
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import torch
from PIL import Image
from torch import Tensor, nn

from openwu.errors import OpenwuError, TargetError

if TYPE_CHECKING:
    from openwu.images import Photo

Picture = Union[str, Path, Image.Image, "Photo"]
"""What a user may pass as an image: a path, an opened PIL image, or the photo of an edit's result."""

THEN = "\n"
"""Stands between the instructions of an adapter that is the sum of several; no instruction holds it."""

ADAPTER_WRITERS: dict[str, str] = {
    "openwu": "openwu.export.native:save_native",
    "peft": "openwu.export.peft:save_peft",
    "diffusers": "openwu.export.single_file:save_diffusers",
    "comfyui": "openwu.export.single_file:save_comfyui",
}
"""Format name -> "module:function" that writes an adapter folder. One line adds a format."""

ADAPTER_READER = "openwu.export.read:load_adapter"


@dataclass(frozen=True)
class EditRequest:
    """One edit that somebody asks for."""

    images: Sequence[Picture]
    """The picture to edit, first; reference pictures after it."""
    instruction: str
    """What to do, in English or Chinese."""
    strength: float = 1.0
    """Factor on the adapter: 0 leaves the base alone, negative values reverse, values above 1 exaggerate."""
    seed: int = 0
    """Seed of everything random in this edit: the embedded model's noise plane, a sampling base model's draws."""
    then: Sequence[str] = ()
    """What else to do in the same pass: the low-rank updates of all instructions are added up."""
    reasoning: str | None = None
    """What a base that reasons before it draws shall have thought; None: it writes that itself, "": it does not."""


@dataclass(frozen=True)
class Segment:
    """Condition tokens of another width than the first ones: text states beside tokens of pictures, say."""

    tokens: Tensor
    """[b, l, width]"""
    mask: Tensor | None = None
    """[b, l] bool, True where a token is real; None when every token is."""

    def to(self, *args: Any, **kwargs: Any) -> Segment:
        """Move or cast the tokens, as `torch.Tensor.to` does; the mask only moves."""
        tokens = self.tokens.to(*args, **kwargs)
        return Segment(tokens, None if self.mask is None else self.mask.to(tokens.device))


@dataclass(frozen=True)
class Condition:
    """What the parameter generator reads."""

    tokens: Tensor
    """[b, L, input_dim]"""
    mask: Tensor | None = None
    """[b, L] bool, True where a token is real; None when every token is."""
    more: Mapping[str, Segment] = field(default_factory=dict)
    """Further segments, by the names that the generator's config gives them (`more_inputs`); read after `tokens`."""

    @property
    def batch(self) -> int:
        return self.tokens.shape[0]

    def to(self, *args: Any, **kwargs: Any) -> Condition:
        """Move or cast every token, as `torch.Tensor.to` does."""
        first = Segment(self.tokens, self.mask).to(*args, **kwargs)
        more = {name: segment.to(*args, **kwargs) for name, segment in self.more.items()}
        return Condition(first.tokens, first.mask, more)


@dataclass(frozen=True)
class BaseRequest:
    """What a base model is asked: an `EditRequest` with its pictures read, without what concerns the adapter alone."""

    pictures: tuple[Image.Image, ...]
    """RGB, upright, of any size: the one to edit, then references."""
    instruction: str
    seed: int = 0
    reasoning: str | None = None


class ConditionEncoder(ABC):
    """Makes what a generator reads. Every base is one; `openwu.conditions` has others that replace a base's own."""

    reads_seed: bool = False
    """Whether conditions depend on a request's seed."""
    asks_denoiser: bool = False
    """Whether conditions need a run of the base's denoiser."""

    @property
    def identity(self) -> str:
        """Weights and settings that conditions depend on, for cache keys; those in `weights` need not be in it."""
        return ""

    @property
    @abstractmethod
    def condition_widths(self) -> Mapping[str, int]:
        """Width of the tokens of every segment of a condition; the first is `Condition.tokens`, others `more`."""

    @abstractmethod
    def condition(self, requests: Sequence[BaseRequest]) -> Condition:
        """Encode what a generator reads of each request: `[b, L, width]` for b requests."""

    def weights(self) -> Mapping[str, nn.Module]:
        """Return modules that conditions depend on, by name, if they are small: cache keys hash them whole."""
        return {}


@dataclass(frozen=True)
class LoadingOptions:
    """How a base and its generator are loaded. A base refuses by name what it does not have."""

    device: str | torch.device | None = None
    """Where to compute; None: CUDA where there is one and the base can use it."""
    dtype: torch.dtype | None = None
    """Dtype of the weights; None: what the device computes best in."""
    revision: str | None = None
    """Revision of a hub id."""
    trust_remote_code: bool = False
    """Run the Python code that the base's folder brings."""
    quantise: str | None = None
    """Load the base's linear maps in "8bit" or "4bit", by bitsandbytes."""
    offload: bool = False
    """Keep layers that do not fit on the device in the machine's memory."""


@dataclass(frozen=True)
class SamplingOptions:
    """How a base model makes its pictures. None: what is usual for that base."""

    steps: int | None = None
    """Steps of denoising."""
    guidance: float | None = None
    """Weight of the instruction: classifier-free guidance, or the number that a guidance-distilled base is told."""
    image_guidance: float | None = None
    """Weight of the source picture, where a base has one (InstructPix2Pix)."""
    true_guidance: float | None = None
    """Weight of the instruction against a second call without it, where a base that is told `guidance` has that too."""
    pixels: int | None = None
    """About how many pixels the base works on; the result is scaled back to the photograph's size."""
    batch: int = 4
    """Requests that share one call of the base, at most."""

    def __post_init__(self) -> None:
        for name in ("steps", "pixels", "batch"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise OpenwuError(f"{name}: expected a whole number above 0, got {value!r}")
        for name in ("guidance", "image_guidance", "true_guidance"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and 0 <= value < math.inf):
                raise OpenwuError(f"{name}: expected a number from 0, got {value!r}")


@dataclass(frozen=True)
class LatentBatch:
    """A batch for training as a frozen base's encoders leave it: nothing here depends on the generator."""

    target: Tensor = field(repr=False)
    """Clean latents of the wanted pictures [b, ...], laid out as the denoiser is given noise."""
    inputs: Mapping[str, Tensor] = field(repr=False)
    """What else the denoiser is given, by names that only its backbone knows; samples come first in every tensor."""
    condition: Condition = field(repr=False)
    """What the generator reads."""


@dataclass(frozen=True)
class Target:
    """One weight of the base model that receives a low-rank update. Its module's type decides the arithmetic."""

    name: str
    """Path of the module in the base model; for experts, the path of their container + "." + weight name."""
    in_dim: int
    """A_dim: width of one input row (a convolution's in_channels * kernel height * kernel width)."""
    out_dim: int
    """B_dim: width of one output row (a convolution's out_channels)."""
    experts: int | None = None
    """E for a weight that every expert of a mixture has; None for a plain one."""
    kernel: tuple[int, int] | None = field(default=None, compare=False)
    """Kernel height and width, for file formats that store them; None: unknown, or not a convolution."""

    def shapes(self, batch: int, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A `[b, (E,) r, A_dim]` and B `[b, (E,) B_dim, r]`."""
        lead = (batch,) if self.experts is None else (batch, self.experts)
        return (*lead, rank, self.in_dim), (*lead, self.out_dim, rank)


@dataclass(frozen=True)
class Adapter:
    """A batch of generated LoRA adapters: `y = W x + scale * B (A x)` with each sample's own A and B."""

    targets: tuple[Target, ...]
    weights: Mapping[str, tuple[Tensor, Tensor]] = field(repr=False)
    """Target name -> (A `[b, (E,) r, A_dim]`, B `[b, (E,) B_dim, r]`)."""
    scale: float
    """alpha / rank"""
    instructions: tuple[str, ...] = ()
    """What each sample's adapter was generated for, so that a reused one can ask for the same; empty if not known.
    A sum of adapters has their instructions with THEN between them."""

    def __post_init__(self) -> None:
        names = {target.name for target in self.targets}
        if not names or self.weights.keys() != names:
            missing, unexpected = sorted(names - set(self.weights)), sorted(set(self.weights) - names)
            raise TargetError(f"adapter: weights do not fit targets; missing {missing}, unexpected {unexpected}")
        batch, rank = self.batch, self.rank
        if self.instructions and len(self.instructions) != batch:
            raise ValueError(f"instructions: expected none or {batch}, one per sample, got {len(self.instructions)}")
        for target in self.targets:
            a, b = self.weights[target.name]
            expected = target.shapes(batch, rank)
            if (a.shape, b.shape) != expected:
                came = tuple(a.shape), tuple(b.shape)
                raise TargetError(f"adapter: {target.name}: expected A and B of shapes {expected}, got {came}")

    @property
    def batch(self) -> int:
        """Number of samples b, each with its own A and B."""
        return self.weights[self.targets[0].name][0].shape[0]

    @property
    def rank(self) -> int:
        return self.weights[self.targets[0].name][0].shape[-2]

    @property
    def parameters_per_sample(self) -> int:
        """How many generated numbers one sample's adapter holds."""
        return sum(a[0].numel() + b[0].numel() for a, b in self.weights.values())

    def state_dict(self) -> dict[str, Tensor]:
        """`{target}.lora_A` `[b, (E,) r, A_dim]` and `{target}.lora_B` `[b, (E,) B_dim, r]`, without the scale."""
        flat: dict[str, Tensor] = {}
        for name, (a, b) in self.weights.items():
            flat[f"{name}.lora_A"], flat[f"{name}.lora_B"] = a, b
        return flat

    def scaled(self, strength: float | Sequence[float] | Tensor) -> Adapter:
        """The same adapter at another strength: one factor for all samples, or one for each of the b samples."""
        factor = torch.as_tensor(strength, dtype=torch.float32)
        if factor.ndim > 1 or (factor.ndim == 1 and factor.shape[0] not in (1, self.batch)):
            raise ValueError(f"strength: expected one number or {self.batch}, got shape {tuple(factor.shape)}")
        if not bool(torch.isfinite(factor).all()):
            raise ValueError(f"strength: expected finite numbers, got {strength}")
        return self._map_b(lambda b: b * factor.reshape(-1, *[1] * (b.ndim - 1)).to(b))

    def select(self, samples: Sequence[int] | Tensor) -> Adapter:
        """The adapters of some samples, in the order given (repeats allowed)."""
        index = torch.as_tensor(samples, dtype=torch.long)
        pick = {name: (a[index.to(a.device)], b[index.to(b.device)]) for name, (a, b) in self.weights.items()}
        instructions = tuple(self.instructions[i] for i in index.tolist()) if self.instructions else ()
        return replace(self, weights=pick, instructions=instructions)

    def to(self, *args: Any, **kwargs: Any) -> Adapter:
        """Move or cast every tensor, as `torch.Tensor.to` does."""
        moved = {name: (a.to(*args, **kwargs), b.to(*args, **kwargs)) for name, (a, b) in self.weights.items()}
        return replace(self, weights=moved)

    def detach(self) -> Adapter:
        return replace(self, weights={name: (a.detach(), b.detach()) for name, (a, b) in self.weights.items()})

    def save_pretrained(
        self,
        folder: str | Path,
        format: str = "openwu",
        *,
        component: str | None = None,
        model: nn.Module | None = None,
    ) -> None:
        """Write an adapter folder. `format`: a key of `ADAPTER_WRITERS`; foreign formats hold one sample.

        component: where the base's denoiser stands: for "diffusers" "transformer" (default) or "unet"; for "comfyui"
        also "diffusion_model" (default), for targets with ComfyUI's own names. model: the base; its convolutions'
        kernels and its experts' layout are then known, and targets that it has not raise a TargetError.
        """
        if format not in ADAPTER_WRITERS:
            raise OpenwuError(f"format: expected one of {sorted(ADAPTER_WRITERS)}, got {format!r}")
        _resolve(ADAPTER_WRITERS[format])(self, Path(folder), model, component)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, model: nn.Module | None = None, skip_text_encoders: bool = False
    ) -> Adapter:
        """Read a folder that `save_pretrained` wrote, in any of its formats, or another tool's LoRA folder or file.

        model: the base; it says what names with underscores mean, and must have every target.
        skip_text_encoders: leave out what the file has for text encoders, instead of raising CheckpointError.
        """
        adapter = _resolve(ADAPTER_READER)(Path(path), model, skip_text_encoders)
        assert isinstance(adapter, cls)
        return adapter

    @staticmethod
    def stack(adapters: Sequence[Adapter]) -> Adapter:
        """Join the samples of several adapters (same targets, rank and scale) into one batch."""
        if not adapters:
            raise ValueError("adapters: expected at least one, got none")
        first = adapters[0]
        for other in adapters[1:]:
            if (other.targets, other.rank, other.scale) != (first.targets, first.rank, first.scale):
                raise TargetError("adapters: expected the same targets, rank and scale in every adapter of a batch")
        joined = {
            name: (
                torch.cat([adapter.weights[name][0] for adapter in adapters]),
                torch.cat([adapter.weights[name][1] for adapter in adapters]),
            )
            for name in first.weights
        }
        known = all(adapter.instructions for adapter in adapters)
        instructions = tuple(text for adapter in adapters for text in adapter.instructions) if known else ()
        return replace(first, weights=joined, instructions=instructions)

    @staticmethod
    def sum(adapters: Sequence[Adapter]) -> Adapter:
        """One adapter whose update is the sum of the updates of several (same targets and batch): ranks add up."""
        if not adapters:
            raise ValueError("adapters: expected at least one, got none")
        first = adapters[0]
        for other in adapters[1:]:
            if (other.targets, other.batch) != (first.targets, first.batch):
                raise TargetError("adapters: expected the same targets and as many samples in every adapter of a sum")
        summed = {
            name: (
                torch.cat([adapter.weights[name][0] for adapter in adapters], dim=-2),
                # One scale for all: the others' ratio to it goes into their B.
                torch.cat([adapter.weights[name][1] * (adapter.scale / first.scale) for adapter in adapters], dim=-1),
            )
            for name in first.weights
        }
        known = all(adapter.instructions for adapter in adapters)
        each = zip(*(adapter.instructions for adapter in adapters), strict=True) if known else ()
        return replace(first, weights=summed, instructions=tuple(THEN.join(texts) for texts in each))

    def _map_b(self, change: Any) -> Adapter:
        return replace(self, weights={name: (a, change(b)) for name, (a, b) in self.weights.items()})


@dataclass(frozen=True)
class EditResult:
    """What comes back."""

    photo: Photo
    """The edited pixels in the depth in which they were read, and all else that survives; see `openwu.images`."""
    adapter: Adapter = field(repr=False)
    """The adapter of this request alone (b = 1), before `strength`."""
    timings: Mapping[str, float]
    """Stage -> seconds: read, condition, generate, edit."""

    @cached_property
    def image(self) -> Image.Image:
        """The edited picture for Pillow, which has no 16-bit colour: that becomes 8-bit here, not in `photo`."""
        return self.photo.to_image()


def _resolve(path: str) -> Any:
    """ "module:name" -> the object, imported on first use."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)

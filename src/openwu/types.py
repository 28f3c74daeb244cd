"""The nouns that a request meets on its way: BaseRequest -> Condition -> Target -> Adapter.

`BaseRequest`, `SamplingOptions`, `LatentBatch`: what large bases take. `FactorRules`: what is known of an operator.

Shapes: b samples (requests) in a batch, L condition tokens, r LoRA rank, E experts, A_dim / B_dim widths in and out.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from openwu.errors import OpenwuError, TargetError
from openwu.registry import ADAPTER_READER, EXPORT_FORMATS, OPERATOR_OF, resolve

LORA = "lora"
LORA_A, LORA_B = "lora_A", "lora_B"
"""Factors of the operator `LORA`: A `[b, (E,) r, A_dim]`, B `[b, (E,) B_dim, r]`."""


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
    branch: str = field(default="", metadata={"whole": True})
    """The branch of the generator that reads it, see `GeneratorConfig.branches`; "": the generator itself."""

    @property
    def batch(self) -> int:
        return self.tokens.shape[0]

    def to(self, *args: Any, **kwargs: Any) -> Condition:
        """Move or cast every token, as `torch.Tensor.to` does."""
        own = Segment(self.tokens, self.mask).to(*args, **kwargs)
        return replace(self, **vars(own), more={name: each.to(*args, **kwargs) for name, each in self.more.items()})


@dataclass(frozen=True)
class BaseRequest:
    """What a base model is asked: an `EditRequest` with its pictures read, without what concerns the adapter alone."""

    pictures: tuple[Image.Image, ...]
    """RGB, upright, of any size: the one to edit, then references."""
    instruction: str
    seed: int = 0
    reasoning: str | None = None
    image_size: str | None = None


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
    fit_to_photo: bool = False
    """Stretch the result to the photograph's size, where the base draws at sizes of its own; others always do so."""
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
class Understood:
    """What an instruction was taken for, by a base that tells edits apart."""

    edit: str
    """Name of the edit: "black_and_white"."""
    probability: float
    """Of this edit, 0 to 1, as the base's instruction encoder gives it."""
    degree: str = "normal"
    """What words of strength asked for: "little", "normal" or "strong"."""
    strength: float = 1.0
    """Share of the full edit, from a number in the instruction ("20% brighter"), beside the request's strength."""
    runners_up: tuple[tuple[str, float], ...] = ()
    """(edit, probability) of the next ones, the most probable first."""
    instruction: str = ""
    """The words that the base reads for this edit."""
    then: tuple[Understood, ...] = ()
    """What comes after it, for a request of several edits."""

    def __str__(self) -> str:
        """Return this for people: "brighten (84%) at strength 0.51, then add noise (95%)"."""
        strength = "" if self.strength == 1 else f" at strength {self.strength:.2f}"
        words = f"{self.edit.replace('_', ' ')} ({self.probability:.0%}){strength}"
        return ", then ".join([words, *map(str, self.then)])


@dataclass(frozen=True)
class LatentBatch:
    """A batch for training as a frozen base's encoders leave it: nothing here depends on the generator."""

    target: Tensor = field(repr=False)
    """Clean latents of the wanted pictures [b, ...], laid out as the denoiser is given noise."""
    inputs: Mapping[str, Tensor] = field(repr=False)
    """What else the denoiser is given, by names that only its backbone knows; samples come first in every tensor."""
    condition: Condition = field(repr=False)
    """What the generator reads."""


class Factor(NamedTuple):
    """One tensor that an operator needs for a target."""

    name: str
    shape: tuple[int, ...]
    """Without the batch axis: of LoRA's A `[(E,) r, A_dim]`."""
    kind: Literal["A", "B", "vector", "shared"]
    """How a generator writes it: "A" (elements of variance about 1 / in_dim before any training) and "B" (near zero) in
    whole tokens, "vector" (near zero) in tokens shared with the layer's others; "shared": its own learned parameter."""


class FactorRules(ABC):
    """What an operator says about its factors, without the module that they change. Has no state."""

    linear: tuple[str, ...]
    """The factors that strength multiplies and whose zeros turn the change off; most changes are linear there."""
    shared: tuple[str, ...] = ()
    """Factors that all samples share, `[1, ...]` in an adapter; they come after the others."""
    rank_factor: str | None = None
    """The factor whose last but one axis is the rank, for a low-rank operator."""
    takes_experts: ClassVar[bool] = False
    """Whether a target may have experts."""

    @abstractmethod
    def factors(self, target: Target, rank: int, /) -> tuple[Factor, ...]:
        """The factors of a target, in the order of the generator's tokens; `rank` concerns low-rank operators only."""

    @abstractmethod
    def summed(self, parts: Sequence[Mapping[str, Tensor]], ratios: Sequence[float]) -> dict[str, Tensor]:
        """Factors whose change is the sum of the parts' changes, each times its ratio (its scale / the sum's scale)."""

    @abstractmethod
    def stacked(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The factors of several adapters as one batch; TargetError where shared ones differ."""

    @abstractmethod
    def scaled(self, factors: Mapping[str, Tensor], strength: Tensor) -> dict[str, Tensor]:
        """The factors at another strength, `[1]` or `[b]`."""


@dataclass(frozen=True)
class Target:
    """One module of the base model that receives an update, and the operator that the update is computed with."""

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
    operator: str = LORA
    """A key of `openwu.registry.OPERATORS`."""
    rank: int | None = field(default=None, compare=False)
    """LoRA rank of this target alone, where it is not the adapter's; None: the adapter's."""

    def __post_init__(self) -> None:
        if self.experts is not None and not self.rules.takes_experts:
            raise TargetError(
                f"{self.name}: the operator {self.operator!r} does not work on experts, got {self.experts} of them; "
                f"use operator={LORA!r} for this target"
            )

    @property
    def rules(self) -> FactorRules:
        """What the target's operator says about its factors; OpenwuError for an operator that does not exist."""
        return _rules(self.operator)

    def factors(self, rank: int) -> tuple[Factor, ...]:
        """The tensors that the operator needs for this target at a LoRA rank."""
        return self.rules.factors(self, rank if self.rank is None else self.rank)

    def shapes(self, batch: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Factor name -> shape. LoRA: `lora_A` `[b, (E,) r, A_dim]`, `lora_B` `[b, (E,) B_dim, r]`, in this order."""
        return {each.name: (1 if each.kind == "shared" else batch, *each.shape) for each in self.factors(rank)}


@dataclass(frozen=True)
class Adapter:
    """A batch of generated adapters: named factors for every target, with numbers of its own for every sample.

    LoRA: `y = W x + scale * B (A x)`. What other operators compute is said in `openwu.adapters.operators`. Targets may
    have different operators; a module has one target, so operators on the same module do not combine.
    """

    targets: tuple[Target, ...]
    factors: Mapping[str, Mapping[str, Tensor]] = field(repr=False)
    """Target name -> factor name -> tensor `[b, ...]`, of the shapes and in the order that `Target.shapes` gives."""
    scale: float
    """alpha / rank; multiplies the change of every operator"""
    instructions: tuple[tuple[str, ...], ...] = ()
    """The instructions that each sample's adapter was generated for, so that a reused one can ask for the same: one
    tuple for each sample, with several entries where the adapter is a sum; empty if not known."""
    refined: tuple[int, ...] = ()
    """Optimiser steps on its own example after each sample was generated; empty where none was refined, and of sums."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise TargetError(f"adapter: expected a finite scale, got {self.scale}")
        names = {target.name for target in self.targets}
        if not names or self.factors.keys() != names:
            missing, unexpected = sorted(names - set(self.factors)), sorted(set(self.factors) - names)
            raise TargetError(f"adapter: factors do not fit targets; missing {missing}, unexpected {unexpected}")
        batch, rank = self.batch, self.rank
        for name, each in (("instructions", self.instructions), ("refined", self.refined)):
            if each and len(each) != batch:
                raise ValueError(f"{name}: expected none or {batch}, one per sample, got {len(each)}")
        if any(isinstance(texts, str) for texts in self.instructions):
            raise ValueError(f"instructions: expected a tuple of texts for each sample, got {self.instructions!r}")
        for target in self.targets:
            came = {name: tuple(part.shape) for name, part in self.factors[target.name].items()}
            expected = target.shapes(batch, rank)
            if list(came.items()) != list(expected.items()):
                raise TargetError(
                    f"adapter: {target.name}: expected factors of shapes {expected}, in this order, got {came}"
                )

    @classmethod
    def from_pairs(
        cls,
        targets: Sequence[Target],
        pairs: Mapping[str, tuple[Tensor, Tensor]],
        scale: float,
        instructions: tuple[tuple[str, ...], ...] = (),
    ) -> Adapter:
        """Make a LoRA adapter of pairs, target name -> (A `[b, (E,) r, A_dim]`, B `[b, (E,) B_dim, r]`)."""
        factors = {name: {LORA_A: a, LORA_B: b} for name, (a, b) in pairs.items()}
        return cls(tuple(targets), factors, scale, instructions)

    @property
    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Target name -> LoRA's (A, B), for what works on LoRA alone; TargetError for targets of another operator."""
        if others := [f"{target.name} ({target.operator})" for target in self.targets if target.operator != LORA]:
            raise TargetError(f"adapter: expected LoRA targets only, got {', '.join(others)}")
        return {name: (parts[LORA_A], parts[LORA_B]) for name, parts in self.factors.items()}

    @property
    def batch(self) -> int:
        """Number of samples b, each with its own numbers."""
        return next(iter(self.factors[self.targets[0].name].values())).shape[0]

    @property
    def rank(self) -> int:
        """The LoRA rank r of targets without one of their own; 0 where there are none."""
        named = ((t.name, t.rules.rank_factor) for t in self.targets if t.rank is None)
        return next((self.factors[target][name].shape[-2] for target, name in named if name is not None), 0)

    @property
    def parameters_per_sample(self) -> int:
        """How many generated numbers one sample's adapter holds; those that all samples share are not counted."""
        return sum(math.prod(f.shape) for t in self.targets for f in t.factors(self.rank) if f.kind != "shared")

    def state_dict(self) -> dict[str, Tensor]:
        """`{target}.{factor}` -> tensor, without the scale. LoRA's factors are `lora_A` and `lora_B`."""
        return {f"{name}.{part}": tensor for name, parts in self.factors.items() for part, tensor in parts.items()}

    def scaled(self, strength: float | Sequence[float] | Tensor) -> Adapter:
        """The same adapter at another strength: one factor for all samples, or one for each of the b samples."""
        factor = torch.as_tensor(strength, dtype=torch.float32)
        if factor.ndim > 1 or (factor.ndim == 1 and factor.shape[0] not in (1, self.batch)):
            raise ValueError(f"strength: expected one number or {self.batch}, got shape {tuple(factor.shape)}")
        if not bool(torch.isfinite(factor).all()):
            raise ValueError(f"strength: expected finite numbers, got {strength}")
        return replace(self, factors={t.name: t.rules.scaled(self.factors[t.name], factor) for t in self.targets})

    def select(self, samples: Sequence[int] | Tensor) -> Adapter:
        """The adapters of some samples, in the order given (repeats allowed)."""
        index = torch.as_tensor(samples, dtype=torch.long)
        texts = tuple(self.instructions[i] for i in index.tolist()) if self.instructions else ()
        steps = tuple(self.refined[i] for i in index.tolist()) if self.refined else ()
        chosen = self._each(lambda part: part[index.to(part.device)], shared=False)
        return replace(self, factors=chosen, instructions=texts, refined=steps)

    def to(self, *args: Any, **kwargs: Any) -> Adapter:
        """Move or cast every tensor, as `torch.Tensor.to` does."""
        return replace(self, factors=self._each(lambda part: part.to(*args, **kwargs)))

    def detach(self) -> Adapter:
        return replace(self, factors=self._each(Tensor.detach))

    def save_pretrained(
        self,
        folder: str | Path,
        format: str = "openwu",
        *,
        component: str | None = None,
        model: nn.Module | None = None,
    ) -> None:
        """Write an adapter folder in a `format` of `openwu.registry.EXPORT_FORMATS`; foreign formats hold one sample.

        component: where the base's denoiser stands: for "diffusers" "transformer" (default) or "unet"; for "comfyui"
        also "diffusion_model" (default), for targets with ComfyUI's own names. model: the base; its convolutions'
        kernels and its experts' layout are then known, and targets that it has not raise a TargetError.
        """
        if format not in EXPORT_FORMATS:
            raise OpenwuError(f"format: expected one of {sorted(EXPORT_FORMATS)}, got {format!r}")
        resolve(EXPORT_FORMATS[format])(self, Path(folder), model, component)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, model: nn.Module | None = None, skip_text_encoders: bool = False
    ) -> Adapter:
        """Read a folder that `save_pretrained` wrote, in any of its formats, or another tool's LoRA folder or file.

        model: the base; it says what names with underscores mean, and must have every target.
        skip_text_encoders: leave out what the file has for text encoders, instead of raising CheckpointError.
        """
        adapter = resolve(ADAPTER_READER)(Path(path), model, skip_text_encoders)
        assert isinstance(adapter, cls)
        return adapter

    @staticmethod
    def stack(adapters: Sequence[Adapter]) -> Adapter:
        """Join the samples of several adapters (same targets, rank and scale) into one batch."""
        if not adapters:
            raise ValueError("adapters: expected at least one, got none")
        first = adapters[0]
        if any((o.targets, o.rank, o.scale) != (first.targets, first.rank, first.scale) for o in adapters[1:]):
            raise TargetError("adapters: expected the same targets, rank and scale in every adapter of a batch")
        joined = {t.name: t.rules.stacked([each.factors[t.name] for each in adapters]) for t in first.targets}
        instructions = tuple(chain(*texts)) if all(texts := [each.instructions for each in adapters]) else ()
        steps = tuple(chain(*(adapter.refined or (0,) * adapter.batch for adapter in adapters)))
        return replace(first, factors=joined, instructions=instructions, refined=steps if any(steps) else ())

    @staticmethod
    def sum(adapters: Sequence[Adapter]) -> Adapter:
        """One adapter whose change of every output is the sum of the changes of several (same targets and batch).

        Every change is measured from the frozen base's output, so the order does not matter: LoRA ranks add up, gains
        and offsets add up. Applying one gain after another would multiply them instead: (1 + g1) (1 + g2).
        """
        if not adapters:
            raise ValueError("adapters: expected at least one, got none")
        first = adapters[0]
        if any((other.targets, other.batch) != (first.targets, first.batch) for other in adapters[1:]):
            raise TargetError("adapters: expected the same targets and as many samples in every adapter of a sum")
        # One scale for all: the others' ratio to it goes into their factors.
        ratios = [adapter.scale / first.scale for adapter in adapters]
        summed = {t.name: t.rules.summed([each.factors[t.name] for each in adapters], ratios) for t in first.targets}
        texts = [adapter.instructions for adapter in adapters]
        instructions = tuple(sum(sample, ()) for sample in zip(*texts, strict=True)) if all(texts) else ()
        targets = tuple(replace(t, rank=t.rank and t.rank * len(adapters)) for t in first.targets)
        return Adapter(targets, summed, first.scale, instructions)

    def _each(self, change: Callable[[Tensor], Tensor], shared: bool = True) -> dict[str, dict[str, Tensor]]:
        kept = {target.name: () if shared else target.rules.shared for target in self.targets}
        held = self.factors.items()
        return {name: {f: part if f in kept[name] else change(part) for f, part in own.items()} for name, own in held}


@cache
def _rules(operator: str) -> FactorRules:
    rules: FactorRules = resolve(OPERATOR_OF)(operator)
    return rules

"""HunyuanImage-3.0-Instruct: one mixture of experts reads and draws; the base that the released HY-WU generator is for.

A request enters; four steps: the base writes its reasoning (or the request brings it); one pass over everything that
the base reads of the request, with the reasoning, whose last decoder layer says the condition and whose one token says
the shape of the picture; outside of here a generator writes the adapter; the base draws, adapter applied, shape known.

The condition depends on the request's seed: latents of the source pictures are sampled with it. The base runs the code
of its own folder, see `hunyuan_loading`. It cannot be trained through here.

Shapes: b requests, L tokens that the base reads, d width of the decoder, T tokens of a batch, k experts per token.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self, cast

import torch
from torch import Tensor, nn

from openwu.backbones.diffusers.latents import as_tensor
from openwu.backbones.hunyuan_image_3.dialogue import drawn, inputs_of, ratio_of, reasoning_of
from openwu.backbones.hunyuan_image_3.loading import (
    EXTRA,
    LastLayer,
    RemoteModel,
    check_folder,
    check_trust,
    load_remote,
)
from openwu.backbones.protocol import Backbone, BaseFacts, Prediction, Progress, Routing, RowScope
from openwu.backbones.quantised import Quantise
from openwu.config import GroupedTarget, LayerGroup, PlainTarget
from openwu.errors import OpenwuError, TargetError
from openwu.files.hashing import of_bytes
from openwu.kernels.padding import padded
from openwu.types import BaseRequest, Condition, LatentBatch, SamplingOptions

PLAIN = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.shared_mlp.gate_and_up_proj", "mlp.shared_mlp.down_proj")
EXPERTS = "mlp.experts"
PREFIX = "model.layers."

REMEMBERED = 64
"""Requests whose reasoning and shape are kept, so that drawing does not repeat what the condition has found out."""


@dataclass(frozen=True)
class _Reading:
    """What the base said of a request before any adapter."""

    reasoning: str
    size: str
    """The ratio token, or `auto` where the base did not answer with one."""


class HunyuanImage3(Backbone):
    """A frozen HunyuanImage-3.0-Instruct."""

    facts = BaseFacts(
        weights="tencent/HunyuanImage-3.0-Instruct; its generator: tencent/HY-WU. Download both yourself",
        licence="Tencent's community licences, which do not cover the EU, the UK and South Korea: no use of them there",
        parameters="80 billion, a mixture of 64 experts",
        extra=EXTRA,
    )
    loading_options: ClassVar[frozenset[str]] = frozenset({"trust_remote_code", "quantise", "offload", "reserve_bytes"})
    reasons: ClassVar[bool] = True
    reads_seed = True
    asks_denoiser = True
    transformers_version: ClassVar[str] = "4.57.1"
    """The one release that the folder's code works with. Of the class, so that a model of tests can name another."""
    steps: ClassVar[int] = 50
    reasoning_tokens: int = 2048
    """At most so many tokens of each of the two parts of its reasoning."""
    max_batch: int = 1
    """Requests that share a call, at most. 1: whether the folder's code draws several at once has not been tried, and
    noise that it takes from the global source would be that of the first."""

    def __init__(self, model: RemoteModel) -> None:
        self.model = model
        self.denoiser.requires_grad_(False).eval()
        self._readings: OrderedDict[bytes, _Reading] = OrderedDict()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        quantise: Quantise | None = None,
        offload: bool = False,
        reserve_bytes: int = 0,
    ) -> Self:
        """Load the user's own download. `dtype` None: that of the files. `device` `cuda`: spread over all GPUs.

        `trust_remote_code` must be asked for: the folder brings its model's code. `quantise`: the decoder's linear maps
        in 8 or 4 bits by bitsandbytes. `offload`: layers that do not fit wait in the machine's memory.
        `reserve_bytes`: what must stay free on the first device.

        Raises OpenwuError: no permission, another transformers, too little memory (with the numbers); CheckpointError:
        a folder that is none, has dots in its name, or whose code is not as expected.
        """
        _refuse_revision(revision)
        model = load_remote(
            folder,
            transformers_version=cls.transformers_version,
            device=torch.device(device),
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            quantise=quantise,
            offload=offload,
            reserve_bytes=reserve_bytes,
        )
        return cls(model)

    @classmethod
    def check(
        cls, folder: str | Path, *, revision: str | None = None, trust_remote_code: bool = False, **_: object
    ) -> None:
        """See `protocols.Backbone`."""
        _refuse_revision(revision)
        check_trust(folder, trust_remote_code)
        check_folder(folder)

    @property
    def denoiser(self) -> nn.Module:
        """The whole model: paths of the released generator begin at it."""
        return cast("nn.Module", self.model)

    @property
    def prediction(self) -> Prediction:
        return "flow"

    @property
    def alphas_cumprod(self) -> Tensor | None:
        return None

    @property
    def routing(self) -> Routing | None:
        return "gate", chosen_experts

    @property
    def condition_widths(self) -> Mapping[str, int]:
        return {"hidden": int(self._layers[0].self_attn.qkv_proj.in_features)}  # type: ignore[union-attr, arg-type]

    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """The released mapping, with this model's widths: all layers are alike."""
        found = {_targets_of(layer, index) for index, layer in enumerate(self._layers)}
        if len(found) != 1:
            raise TargetError(f"{PREFIX}: expected layers of equal widths, got {len(found)} kinds")
        return (LayerGroup(PREFIX, len(self._layers), found.pop()),)

    @torch.no_grad()
    def condition(self, requests: Sequence[BaseRequest]) -> Condition:
        """The last decoder layer's output before `ln_f` for all L tokens, padded to the longest of the batch."""
        tokens, mask = padded([self._read(request)[1] for request in requests])
        return Condition(tokens, None if bool(mask.all()) else mask)

    def latent_batch(self, requests: Sequence[BaseRequest], targets: Sequence[Tensor]) -> LatentBatch:  # noqa: ARG002
        """Not supported."""
        _no_training()

    def drop_conditions(self, batch: LatentBatch, generator: torch.Generator) -> LatentBatch:  # noqa: ARG002
        """Not supported."""
        _no_training()

    def predict(self, batch: LatentBatch, given: Tensor, time: Tensor) -> Tensor:  # noqa: ARG002
        """Not supported."""
        _no_training()

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[BaseRequest],
        options: SamplingOptions,
        rows: RowScope,
        progress: Progress | None = None,
    ) -> list[Tensor]:
        """See `protocols.Backbone`: the adapter acts on everything the base reads and on both guidance rows."""
        options = self.options(options)
        readings = [self._known(request) or self._read(request)[0] for request in requests]
        chunks = _chunks(readings, min(options.batch, self.max_batch))
        assert options.steps is not None
        assert options.guidance is not None
        edited: dict[int, Tensor] = {}
        with _counted(self.model.model, options.steps, len(chunks), progress) as begin:
            for chunk in chunks:
                asked = [requests[i] for i in chunk]
                reasoning, size = [readings[i].reasoning for i in chunk], readings[chunk[0]].size
                inputs = inputs_of(self.model, asked, reasoning, None, size)
                begin()
                with rows(chunk * (2 if options.guidance > 1 else 1)):
                    pictures = drawn(self.model, inputs, len(chunk), asked[0].seed, options.steps, options.guidance)
                edited |= {i: as_tensor(each.convert("RGB")) for i, each in zip(chunk, pictures, strict=True)}
        return [edited[i] for i in range(len(requests))]

    def options(self, options: SamplingOptions) -> SamplingOptions:
        """The options with what is usual for this base where they say nothing; refuses what it does not have."""
        for name in ("image_guidance", "true_guidance", "pixels"):
            if getattr(options, name) is not None:
                reason = "which chooses among its own sizes" if name == "pixels" else "which has none"
                raise OpenwuError(f"{name}: expected none for {type(self).__name__}, {reason}; leave it out")
        guidance = options.guidance
        if guidance is None:
            guidance = getattr(self.model.generation_config, "diff_guidance_scale", None)
        if guidance is None:
            raise OpenwuError("guidance: expected a number, since generation_config.json of the base's folder has none")
        return replace(options, steps=options.steps or self.steps, guidance=guidance)

    @property
    def _layers(self) -> nn.ModuleList:
        layers: nn.ModuleList = self.model.model.layers
        return layers

    def _known(self, request: BaseRequest) -> _Reading | None:
        return self._readings.get(_digest(request))

    def _read(self, request: BaseRequest) -> tuple[_Reading, Tensor]:
        """Reasoning and shape of a request, and what the last layer says of its tokens `[L, d]`."""
        known = self._known(request)
        reasoning = request.reasoning
        if reasoning is None:
            reasoning = (
                known.reasoning if known is not None else reasoning_of(self.model, request, self.reasoning_tokens)
            )
        # Deviates: the pass is not left after the last layer. What follows is one token of `lm_head`, and it is the
        # ratio that drawing would need a second prefill for.
        with LastLayer(self.model) as heard:
            reading = _Reading(reasoning, ratio_of(self.model, request, reasoning))
        self._readings[_digest(request)] = reading
        while len(self._readings) > REMEMBERED:
            self._readings.popitem(last=False)
        return reading, heard.states[0]


def chosen_experts(output: Any) -> Tensor:
    """A router's output -> the chosen experts `[T, k]`: the one tensor of whole numbers in it."""
    parts = output if isinstance(output, tuple | list) else (output,)
    found = [part for part in parts if isinstance(part, Tensor) and part.ndim == 2 and part.dtype == torch.int64]
    if len(found) != 1:
        raise TargetError(
            "router: expected one tensor [tokens, k] of expert indices in its output, got "
            f"{[tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]}; "
            "edit one request at a time"
        )
    return found[0]


def _targets_of(layer: Any, index: int) -> tuple[PlainTarget | GroupedTarget, ...]:
    """What one layer adapts, in the order of the released mapping."""
    modules = dict(layer.named_modules())
    experts = modules.get(EXPERTS)
    count = len(experts) if isinstance(experts, nn.ModuleList) else 0
    wanted = [*PLAIN, f"{EXPERTS}.0.gate_and_up_proj", f"{EXPERTS}.0.down_proj"]
    wrong = [path for path in wanted if not isinstance(modules.get(path), nn.Linear)]
    if wrong or not count:
        raise TargetError(
            f"{PREFIX}{index}: expected the linear maps {', '.join(wrong)}, found none; load the base with "
            "moe_impl='eager', and without fused weights"
        )
    widths = {path: (modules[path].in_features, modules[path].out_features) for path in wanted}
    (enter, fused), (hidden, leave) = widths[wanted[-2]], widths[wanted[-1]]
    weights = {"w1": (enter, fused // 2), "w2": (hidden, leave), "w3": (enter, fused // 2)}
    return (
        *(PlainTarget(path, *widths[path]) for path in PLAIN),
        GroupedTarget(EXPERTS, count, tuple(PlainTarget(name, *each) for name, each in weights.items())),
    )


def _refuse_revision(revision: str | None) -> None:
    if revision is not None:
        raise OpenwuError(f"revision: expected none for this base, which is a local folder, got {revision!r}")


def _no_training() -> NoReturn:
    raise OpenwuError(
        "training: not supported through hunyuan-image-3, whose folder's code draws only with its own sampler; "
        "edit with the released generator, or train one for another base (`openwu models`)"
    )


def _digest(request: BaseRequest) -> bytes:
    """Of all that decides what the base says of a request."""
    words = repr((request.instruction, request.seed, request.reasoning)).encode()
    pictures = (repr((each.size, each.mode)).encode() + each.tobytes() for each in request.pictures)
    return of_bytes([words, *pictures]).digest()


def _chunks(readings: Sequence[_Reading], most: int) -> list[list[int]]:
    """Places of requests that share a call: pictures of one shape, with reasoning or without; others go alone."""
    alike: dict[object, list[int]] = {}
    for index, reading in enumerate(readings):
        key = index if reading.size == "auto" else (reading.size, bool(reading.reasoning))
        alike.setdefault(key, []).append(index)
    return [members[start : start + most] for members in alike.values() for start in range(0, len(members), most)]


@contextmanager
def _counted(decoder: nn.Module, steps: int, calls: int, progress: Progress | None) -> Iterator[Any]:
    """Reports every pass of the decoder as a step; yields what begins the next call."""
    begun = passes = 0

    def begin() -> None:
        nonlocal begun, passes
        begun, passes = begun + 1, 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if progress is not None and begun and passes <= steps:
            progress((begun - 1) * steps + passes, steps * calls)

    hook = decoder.register_forward_hook(count)
    try:
        yield begin
    finally:
        hook.remove()

"""HunyuanImage-3.0-Instruct: one mixture of experts reads and draws; the base of the released HY-WU generator.

An edit takes four steps: the base writes its reasoning (unless the request brings it); one pass over everything it
reads gives the condition (the last decoder layer's output) and the number of the picture's ratio; outside of here a
generator writes the adapter; the base draws, with the adapter applied. Settings are those of the released pipeline.

The condition depends on the request's seed, with which latents of the source pictures are sampled. The base runs the
code of its own folder, see loading.py, and cannot be trained through here.

Shapes: L tokens that the base reads, d width of the decoder, T tokens of a batch, k experts per token.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from openwu.backbones.diffusers.latents import as_tensor
from openwu.backbones.hunyuan_image_3.dialogue import AUTO, LastLayer, choose_ratio, draw, inputs_of, write_reasoning
from openwu.backbones.hunyuan_image_3.loading import EXTRA, RemoteModel, check_folder, check_trust, load_remote
from openwu.backbones.protocol import (
    Backbone,
    BaseFacts,
    EditJob,
    Progress,
    RequestScope,
    Routing,
    RowScope,
    check_image_size,
)
from openwu.backbones.quantised import Quantise
from openwu.config import GroupedTarget, LayerGroup, PlainTarget
from openwu.errors import OpenwuError, RequestError, TargetError
from openwu.files.hashing import of_bytes
from openwu.images import Photo
from openwu.kernels.modules import padded
from openwu.types import BaseRequest, Condition, SamplingOptions

PLAIN = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.shared_mlp.gate_and_up_proj", "mlp.shared_mlp.down_proj")
EXPERTS = "mlp.experts"
PREFIX = "model.layers."

READINGS = 64
"""Requests whose reasoning and ratio are kept, so that drawing does not repeat what the condition has found out."""


@dataclass(frozen=True)
class _Reading:
    """What the base wrote about a request before any adapter."""

    reasoning: str
    ratio: int
    """Number of the picture's ratio among those that the base draws."""


class HunyuanImage3(Backbone):
    """A frozen HunyuanImage-3.0-Instruct."""

    facts = BaseFacts(
        weights="tencent/HunyuanImage-3.0-Instruct; its generator: tencent/HY-WU. Download both yourself",
        licence="Tencent's community licences, which do not cover the EU, the UK and South Korea: no use of them there",
        parameters="80 billion, a mixture of 64 experts",
        extra=EXTRA,
    )
    loading_options: ClassVar[frozenset[str]] = frozenset(
        {"trust_remote_code", "quantise", "offload", "reserve_bytes", "before_weights"}
    )
    reasons: ClassVar[bool] = True
    default_seed: ClassVar[int] = 42
    own_sizes: ClassVar[bool] = True
    reads_seed = True
    asks_denoiser = True
    transformers_version: ClassVar[str] = "4.57.1"
    """The one release that the folder's code works with. Of the class, so that a model of tests can name another."""
    needs_gpu: ClassVar[bool] = True
    """Whether the folder's code makes CUDA tensors as it loads. Of the class, for the same reason."""
    reasoning_tokens: int = 2048
    """Maximum number of tokens of the reasoning, both parts together."""
    max_batch: int = 1
    """Requests that share a call: the folder's code fails on several."""

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
        before_weights: Callable[[Backbone], object] | None = None,
    ) -> Self:
        """Load the user's own download. `dtype` None: that of the files. `device` `cuda`: spread over all GPUs.

        `trust_remote_code` must be asked for: the folder brings its model's code. `quantise`: the decoder's linear maps
        in 8 or 4 bits by bitsandbytes. `offload`: layers that do not fit wait in the machine's memory. `reserve_bytes`:
        what must stay free on the first device. `before_weights`: called with the base on the meta device.

        Raises, before weights are read, OpenwuError: no permission, no GPU, another transformers, too little memory
        (with the numbers); CheckpointError: a folder that is none, has dots in its name, or lacks something;
        TargetError: layers that are not as the released generator's.
        """
        _refuse_revision(revision)
        model = load_remote(
            folder,
            transformers_version=cls.transformers_version,
            needs_gpu=cls.needs_gpu,
            device=torch.device(device),
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            quantise=quantise,
            offload=offload,
            reserve_bytes=reserve_bytes,
            check=lambda rehearsed: _check_rehearsed(cls(rehearsed), before_weights),
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

    @cached_property
    def identity(self) -> str:
        """Samples of all weights, and the settings that the condition depends on beside the request."""
        return f"{super().identity} {self.reasoning_tokens}"

    @property
    def routing(self) -> Routing | None:
        return "gate", chosen_experts

    @property
    def condition_widths(self) -> Mapping[str, int]:
        return {"hidden": int(self._layers[0].self_attn.qkv_proj.in_features)}  # type: ignore[union-attr, arg-type]

    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """The released mapping, with this model's widths: all layers are alike."""
        return (_layer_group(self._layers),)

    @torch.no_grad()
    def condition(self, requests: Sequence[BaseRequest]) -> Condition:
        """The last decoder layer's output before `ln_f` for all L tokens, padded to the longest of the batch."""
        tokens, mask = padded([self._read(request)[1] for request in requests])
        return Condition(tokens, None if bool(mask.all()) else mask)

    def check_sampling(self, options: SamplingOptions) -> None:
        self.options(options)

    def edit(
        self,
        jobs: Sequence[EditJob],
        options: SamplingOptions,
        scope: RequestScope,
        progress: Progress | None = None,
    ) -> list[Photo]:
        """Edit every job's first picture; results have the base's own size and aspect unless `options.fit_to_photo`."""
        if options.fit_to_photo:
            return super().edit(jobs, options, scope, progress)
        pictures = self.generate([job.request for job in jobs], options, scope.rows, progress)
        return [
            job.photos[0].resized(picture.clamp(0, 1).permute(1, 2, 0).contiguous().numpy())
            for job, picture in zip(jobs, pictures, strict=True)
        ]

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[BaseRequest],
        options: SamplingOptions,
        rows: RowScope,
        progress: Progress | None = None,
    ) -> list[Tensor]:
        """See `protocol.Backbone`: the adapter acts on everything the base reads and on both guidance rows.

        Requests go one at a time. Pictures have the base's size nearest to the request's `image_size`; without one,
        the base chooses a ratio, and source pictures are resized to a size of the base instead of cropped.
        """
        options = self.options(options)
        assert options.steps is not None
        assert options.guidance is not None
        edited = []
        for index, request in enumerate(requests):
            reading = self._readings.get(self._digest(request)) or self._read(request)[0]
            size = request.image_size or AUTO
            inputs = inputs_of(self.model, request, reading.reasoning, None, image_size=size, ratio=reading.ratio)
            done = index * options.steps
            with (
                _counted(self.model.model, options.steps, done, options.steps * len(requests), progress),
                rows([index] * len(inputs["input_ids"])),
            ):
                image = draw(self.model, inputs, size, request.seed, options.steps, options.guidance)
            edited.append(as_tensor(image.convert("RGB")))
        return edited

    def options(self, options: SamplingOptions) -> SamplingOptions:
        """The options with the folder's steps and guidance where they say nothing; refuses what the base cannot do."""
        for name in ("image_guidance", "true_guidance", "pixels"):
            if getattr(options, name) is not None:
                reason = "which chooses among its own sizes (`image_size`)" if name == "pixels" else "which has none"
                raise RequestError(f"{name}: expected none for {type(self).__name__}, {reason}; leave it out")
        usual = self.model.generation_config
        guidance = usual.diff_guidance_scale if options.guidance is None else options.guidance
        if guidance <= 1:
            raise RequestError(
                f"guidance: expected above 1, since the folder's code always draws both rows, got {guidance}"
            )
        return replace(options, steps=options.steps or usual.diff_infer_steps, guidance=guidance)

    @property
    def _layers(self) -> nn.ModuleList:
        layers: nn.ModuleList = self.model.model.layers
        return layers

    def _read(self, request: BaseRequest) -> tuple[_Reading, Tensor]:
        """Reasoning and ratio of a request, and the last layer's output for its tokens `[L, d]`."""
        check_image_size(request.image_size)
        digest, size = self._digest(request), request.image_size or AUTO
        known, reasoning = self._readings.get(digest), request.reasoning
        if reasoning is None and known is not None:
            reasoning = known.reasoning
        if reasoning is None:
            reasoning = write_reasoning(self.model, request, size, self.reasoning_tokens)
        # Deviates: the pass is not left after the last layer. What follows is one token of `lm_head`, and it is the
        # ratio that drawing would need a second prefill for.
        with LastLayer(self.model) as last:
            reading = _Reading(reasoning, choose_ratio(self.model, request, reasoning, size))
        self._readings[digest] = reading
        while len(self._readings) > READINGS:
            self._readings.popitem(last=False)
        return reading, last.states

    def _digest(self, request: BaseRequest) -> bytes:
        """Hash of everything that the base's answers about a request depend on."""
        size = request.image_size or AUTO
        words = repr((request.instruction, request.seed, request.reasoning, size, self.reasoning_tokens))
        pictures = (repr((each.size, each.mode)).encode() + each.tobytes() for each in request.pictures)
        return of_bytes([words.encode(), *pictures]).digest()


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


def _layer_group(layers: nn.ModuleList) -> LayerGroup:
    found = {_targets_of(layer, index) for index, layer in enumerate(layers)}
    if len(found) != 1:
        raise TargetError(f"{PREFIX}: expected layers of equal widths, got {len(found)} kinds")
    return LayerGroup(PREFIX, len(layers), found.pop())


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


def _check_rehearsed(base: HunyuanImage3, before_weights: Callable[[Backbone], object] | None) -> None:
    """Check widths of layers, and whatever the caller checks, on a base that has no weights yet."""
    base.layer_groups()
    if before_weights is not None:
        before_weights(base)


def _refuse_revision(revision: str | None) -> None:
    if revision is not None:
        raise OpenwuError(f"revision: expected none for this base, which is a local folder, got {revision!r}")


@contextmanager
def _counted(decoder: nn.Module, steps: int, done: int, total: int, progress: Progress | None) -> Iterator[None]:
    """Report every pass of the decoder inside the scope as a step."""
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if progress is not None and passes <= steps:
            progress(done + passes, total)

    hook = decoder.register_forward_hook(count)
    try:
        yield
    finally:
        hook.remove()

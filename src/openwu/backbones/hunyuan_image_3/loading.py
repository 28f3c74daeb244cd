"""HunyuanImage-3.0-Instruct on disk: the user's own folder enters; the model that its code builds leaves, or an error.

The folder brings the code of its model, and transformers runs it: whoever loads it must ask for that. Everything that
can be known without running it is checked first, in this order: permission, folder, versions, memory.

`RemoteModel` is all that is used of that code. Its names were compared with the published interface (see
docs/hunyuan-image-3.md): none of the code is copied here, and none of this has been run against the real folder.
`check_surface` says what is missing.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from openwu.backbones.hunyuan_image_3.memory import LAYER, LINEAR, Room, check_room, gpu_budgets, read_headers
from openwu.backbones.quantised import Quantise, bitsandbytes, check_way, differentiable_, wide_enough
from openwu.errors import CheckpointError, OpenwuError
from openwu.extras import library, quiet
from openwu.files.headers import Headers

if TYPE_CHECKING:
    from PIL import Image

EXTRA = "hunyuan"

USED = 0.9
"""Share of a budget that transformers uses where it quantises; the plan has room for that already."""

Task = Literal["think", "recaption", "img_ratio"]
"""What the base is asked to write."""


class RemoteModel(Protocol):
    """What the backbone uses of the folder's own code, all of it. Rows: b requests."""

    generation_config: Any
    """`diff_guidance_scale`: weight of the instruction that the base is used with; above 1 it draws with two rows."""
    model: Any
    """The decoder: `layers`, each with `self_attn.{qkv_proj, o_proj}`, `mlp.gate`, `mlp.experts.N.{gate_and_up_proj,
    down_proj}` and `mlp.shared_mlp.{gate_and_up_proj, down_proj}`, and `ln_f` behind the last one."""

    _tokenizer: Any
    """`think_token` and `recaption_token`, with which the parts of its reasoning begin."""

    def load_tokenizer(self, tokenizer: str) -> None:
        """Read the tokenizer from the folder; the model keeps it."""

    def prepare_model_inputs(
        self,
        *,
        prompt: Sequence[str],
        image: Sequence[Sequence[Image.Image]],
        cot_text: Sequence[str] | None,
        mode: Literal["gen_text", "gen_image"],
        image_size: str,
        seed: Sequence[int],
        bot_task: Task = ...,
        max_new_tokens: int = ...,
        system_prompt: Sequence[str] = ...,
    ) -> Mapping[str, Any]:
        """Everything that `generate` needs, encoders run: latents of source pictures are sampled with the `seed`s.

        What it returns holds `mode` and `max_new_tokens`, too. `cot_text`: reasoning, one per request and none empty.
        `image_size`: `auto`, or the ratio token such as `<img_ratio_3>`. `bot_task`: of texts alone.
        """

    def generate(self, **inputs: Any) -> Any:
        """What `prepare_model_inputs` returned and, mode `gen_text`: `do_sample`, `decode_text=True` (without it:
        tokens) and perhaps `logits_processor` -> one text; `gen_image`: a `generation_config` with `diff_infer_steps`
        and `diff_guidance_scale`, which it does not read elsewhere -> b PIL pictures."""


SURFACE: Mapping[str, tuple[str, ...]] = {
    "load_tokenizer": (),
    "prepare_model_inputs": (
        *("prompt", "image", "cot_text", "mode", "bot_task", "image_size", "seed"),
        *("max_new_tokens", "system_prompt"),
    ),
    "generate": (),
}
"""Methods of `RemoteModel`, and the arguments that each must take."""


def load_remote(
    folder: str | Path,
    *,
    transformers_version: str,
    device: torch.device,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
    quantise: Quantise | None,
    offload: bool,
    reserve_bytes: int,
) -> RemoteModel:
    """The model on `device` (`cuda`: spread over all GPUs), its tokenizer read. Raises for all that a user can mend."""
    check_trust(folder, trust_remote_code)
    path = check_folder(folder)
    check_version(transformers_version)
    _check_ways(device, quantise, offload)
    room, headers = Room.of(device), read_headers(path)
    if device.type == "cuda" and not room.gpus:
        raise OpenwuError(f"device: expected a machine with a CUDA GPU for {device}, found none; use --device cpu")
    need = check_room(headers, room, quantise=quantise, offload=offload, dtype=dtype, reserve_bytes=reserve_bytes)
    placed: dict[str, Any] = {"device_map": {"": str(device)}}
    if room.gpus and (len(room.gpus) > 1 or offload):
        budgets = gpu_budgets(need, room, offload=offload)
        if quantise is not None:
            budgets = {place: int(size / USED) for place, size in budgets.items()}
        placed = {"device_map": "auto", "max_memory": budgets}
    if device.type == "cpu" and quantise is None:
        placed = {}
    else:
        library("accelerate", EXTRA)
    transformers = library("transformers", EXTRA)
    if quantise is not None:
        placed["quantization_config"] = _quantisation(transformers, quantise, dtype, unquantised(headers, quantise))
    try:
        with quiet(transformers.utils.logging):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                str(path),
                trust_remote_code=True,
                moe_impl="eager",
                dtype=dtype or "auto",
                use_safetensors=True,
                local_files_only=True,
                **placed,
            )
            check_surface(model)
            differentiable_(model)
            model.load_tokenizer(str(path))
    except OpenwuError:
        raise
    except Exception as error:  # foreign code raises what it likes
        raise CheckpointError(f"{folder}: its own code cannot load this model: {error}") from error
    return cast("RemoteModel", model)


def check_trust(folder: str | Path, trust_remote_code: bool) -> None:
    """Raise unless the folder's code may run."""
    if not trust_remote_code:
        raise OpenwuError(
            f"trust_remote_code: {folder} brings Python code of its own, which runs with your rights when loaded; "
            "read it, and if you trust it, ask for it with --trust-remote-code (trust_remote_code=True)"
        )


def check_folder(folder: str | Path) -> Path:
    """The folder, resolved; CheckpointError unless it is a local one of a usable name whose config brings its code."""
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(
            f"{folder}: expected a folder, got a {'file' if path.exists() else 'path that does not exist'}; this base "
            "is not downloaded for you: accept its licence, download it into a folder, and pass that"
        )
    path = path.resolve()
    if "." in path.name:
        raise CheckpointError(
            f"{folder}: expected a folder name without dots, got {path.name!r}: transformers makes a Python module of "
            f"the name, in which a dot would mean a package; rename it, to {path.name.replace('.', '-')!r} for example"
        )
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        brings = config.get("auto_map", {}).get("AutoModelForCausalLM")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder}: expected config.json of HunyuanImage-3.0-Instruct ({error})") from error
    if not brings:
        raise CheckpointError(
            f"{folder}: expected a config.json whose auto_map names the model's own code (AutoModelForCausalLM), got "
            f"auto_map {config.get('auto_map')!r}; is this HunyuanImage-3.0-Instruct?"
        )
    return path


def check_version(required: str) -> None:
    """Raise unless exactly this release of transformers is installed, without importing it."""
    try:
        installed = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        installed = "none"
    if installed != required:
        raise OpenwuError(
            f"transformers: expected {required} for this base, got {installed}; later releases fail in its cache. In "
            f"an environment of its own: pip install 'openwu[{EXTRA}]' 'transformers=={required}'"
        )


def check_surface(model: Any) -> None:
    """Raise with everything that `RemoteModel` names and this folder's code does not have."""
    missing = []
    for name, arguments in SURFACE.items():
        method = getattr(model, name, None)
        if not callable(method):
            missing.append(f"{name}()")
            continue
        taken = inspect.signature(method).parameters.values()
        if any(each.kind is each.VAR_KEYWORD for each in taken):
            continue
        names = {each.name for each in taken}
        missing += [f"{name}({argument}=)" for argument in arguments if argument not in names]
    decoder = getattr(model, "model", None)
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        missing.append("model.layers")
    if not isinstance(getattr(decoder, "ln_f", None), nn.Module):
        missing.append("model.ln_f")
    if missing:
        raise CheckpointError(
            f"{type(model).__name__}: the folder's code does not have {', '.join(missing)}, which openwu calls; use "
            "another revision of the folder, or adapt "
            "openwu.backbones.hunyuan_image_3.loading.RemoteModel and its caller to it"
        )


class LastLayer:
    """Hears what the last decoder layer says in a pass, before `ln_f`: a scope; afterwards `states` `[b, L, d]`."""

    def __init__(self, model: RemoteModel) -> None:
        self._layer: nn.Module = model.model.layers[-1]
        self._heard: list[Any] = []

    def __enter__(self) -> LastLayer:
        self._hook = self._layer.register_forward_hook(lambda _, __, output: self._heard.append(output))
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    @property
    def states(self) -> Tensor:
        if len(self._heard) != 1:
            raise OpenwuError(
                f"condition: expected one pass of the decoder for the ratio of the picture, got {len(self._heard)}; "
                "the folder's code generates more than the one token that it was asked for"
            )
        said = self._heard[0][0] if isinstance(self._heard[0], tuple | list) else self._heard[0]
        if not isinstance(said, Tensor) or said.ndim != 3:
            raise OpenwuError(
                f"condition: expected hidden states [b, L, d] of a decoder layer, got {type(said).__name__}"
            )
        return said


def _check_ways(device: torch.device, quantise: Quantise | None, offload: bool) -> None:
    check_way(quantise)
    if quantise is not None and offload:
        raise OpenwuError("quantise, offload: expected one of them: bitsandbytes keeps its weights on the GPU")
    if device.type == "cpu" and offload:
        raise OpenwuError("offload: expected a GPU (--device cuda), got --device cpu; leave it out")
    if quantise is not None:
        bitsandbytes(EXTRA)


def unquantised(headers: Headers, how: Quantise) -> list[str]:
    """Paths of everything but the linear maps of decoder layers, so that what is loaded is what was estimated.

    Full paths: releases of transformers differ in what else they take a name for (an end, a beginning, a middle).
    """
    kept = set()
    for name, (_, shape) in headers.items():
        parts = name.split(".")
        if parts[0] != "model":
            kept.add(parts[0])
        elif not LAYER.match(name):
            kept.add(".".join(parts[:2]))
        elif not LINEAR.match(name) or not wide_enough(shape, how):
            kept.add(name.rpartition(".")[0])
    return sorted(kept)


def _quantisation(transformers: Any, quantise: Quantise, dtype: torch.dtype | None, kept: list[str]) -> Any:
    if quantise == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype or torch.bfloat16,
        llm_int8_skip_modules=kept,
    )

"""Load HunyuanImage-3.0-Instruct from the user's own folder, after everything checkable without its weights is checked.

The folder brings the code of its model, and transformers runs it: whoever loads it must ask for that. Checks, in this
order: permission, device, folder, versions, memory; then a rehearsal, which runs the folder's code on the meta device
(no weights are read): its packages, names, tokenizer, settings, and every weight's name and shape in the files.

`RemoteModel` is all that is used of that code; none of it is copied here. docs/hunyuan-image-3.md compares both.
"""

from __future__ import annotations

import copy
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import torch
from torch import nn

from openwu.backbones.hunyuan_image_3.memory import LAYER, LINEAR, FreeMemory, check_memory, gpu_budgets, read_headers
from openwu.backbones.quantised import Quantise, bitsandbytes, check_way, differentiable_, wide_enough
from openwu.errors import CheckpointError, OpenwuError
from openwu.extras import library, quiet
from openwu.files.headers import Headers

if TYPE_CHECKING:
    from PIL import Image

EXTRA = "hunyuan"

MODEL_VERSION = "HunyuanImage-3.0-Instruct"
"""`model_version` where the folder's config has none; the code of some revisions reads it with the tokenizer."""

USED = 0.9
"""Share of a budget that transformers uses where it quantises; the plan has room for that already."""

Task = Literal["think", "recaption", "img_ratio"]
"""What the base is asked to write."""

RATIO_PROCESSOR_MAKERS = ("build_img_ratio_slice_logits_proc", "build_img_ratio_slice_logits_processor")
"""Names, by revision, of what makes `image_processor.img_ratio_slice_logits_processor`."""


class RemoteModel(Protocol):
    """What is used of the folder's own code, all of it; one request at a time."""

    config: Any
    generation_config: Any
    """`diff_guidance_scale` and `diff_infer_steps`: with what the base is used; perhaps `drop_think`."""
    model: Any
    """The decoder: `layers`, each with `self_attn.{qkv_proj, o_proj}`, `mlp.gate`, `mlp.experts.N.{gate_and_up_proj,
    down_proj}` and `mlp.shared_mlp.{gate_and_up_proj, down_proj}`, and `ln_f` behind the last one."""
    image_processor: Any
    """`vae_reso_group`, a sequence of sizes; `postprocess_outputs`; and one of `RATIO_PROCESSOR_MAKERS`."""
    _tokenizer: Any
    """`decode`, `think_token`, `end_of_think_token_id` and `recaption_token`."""

    def load_tokenizer(self, tokenizer: str) -> None:
        """Read the tokenizer from the folder; the model keeps it."""

    def prepare_model_inputs(
        self,
        *,
        prompt: str,
        image: list[Image.Image],
        cot_text: str | None,
        system_prompt: str,
        mode: Literal["gen_text", "gen_image"],
        seed: int,
        infer_align_image_size: bool,
        image_size: str = ...,
        bot_task: Task = ...,
        max_new_tokens: int = ...,
        drop_think: bool = ...,
    ) -> Mapping[str, Any]:
        """Everything that `generate` needs, encoders run: latents of source pictures are sampled with `seed`.

        Among it: `input_ids` [rows, L] and `batch_cond_images`. `image_size`: to draw, `HxW`, `W:H` or `<img_ratio_3>`.
        """

    def generate(self, **inputs: Any) -> Any:
        """What `prepare_model_inputs` returned and, mode `gen_text`, perhaps `do_sample` and `logits_processor` ->
        tokens [1, L + new]; `gen_image`: a `generation_config`, for steps and guidance -> a list of one PIL picture."""


SURFACE = (
    *("model.layers", "model.ln_f", "load_tokenizer", "prepare_model_inputs", "generate"),
    *("generation_config.diff_infer_steps", "generation_config.diff_guidance_scale"),
    *("image_processor.vae_reso_group", "image_processor.postprocess_outputs"),
    *("_tokenizer.decode", "_tokenizer.think_token", "_tokenizer.end_of_think_token_id", "_tokenizer.recaption_token"),
)
"""Paths that a model must have. A setting of `generation_config` must not be None either."""


def load_remote(
    folder: str | Path,
    *,
    transformers_version: str,
    needs_gpu: bool,
    device: torch.device,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
    quantise: Quantise | None,
    offload: bool,
    reserve_bytes: int,
    check: Callable[[RemoteModel], object],
) -> RemoteModel:
    """Return the model on `device` (`cuda`: spread over all GPUs), its tokenizer loaded.

    `check`: raises for what is wrong with the model while it has no weights yet. Raises OpenwuError for everything that
    the user can fix, CheckpointError where the folder is at fault.
    """
    check_trust(folder, trust_remote_code)
    _check_ways(device, quantise, offload, needs_gpu)
    path = check_folder(folder)
    check_version(transformers_version)
    headers = read_headers(path)
    placement = _placement(
        headers, device, quantise=quantise, offload=offload, dtype=dtype, reserve_bytes=reserve_bytes
    )
    transformers = library("transformers", EXTRA)
    if quantise is not None:
        placement["quantization_config"] = _quantisation(transformers, quantise, dtype, unquantised(headers, quantise))
    try:
        with quiet(transformers.utils.logging):
            config, rehearsed = rehearse(transformers, path)
            check(rehearsed)
            check_weights(rehearsed, headers)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                str(path),
                config=config,
                trust_remote_code=True,
                dtype=dtype or "auto",
                use_safetensors=True,
                local_files_only=True,
                **placement,
            )
            differentiable_(model)
            model.load_tokenizer(str(path))
    except OpenwuError:
        raise
    except ImportError as error:
        raise OpenwuError(
            f"{folder}: its own code needs more packages: {error}; pip install 'openwu[{EXTRA}]'"
        ) from error
    except Exception as error:  # foreign code raises what it likes
        raise CheckpointError(f"{folder}: its own code cannot load this model: {error}") from error
    return cast("RemoteModel", model)


def rehearse(transformers: Any, path: Path) -> tuple[Any, RemoteModel]:
    """Return the folder's config, with the released pipeline's settings, and its model without weights, checked."""
    config = transformers.AutoConfig.from_pretrained(str(path), trust_remote_code=True, local_files_only=True)
    config.moe_impl, config.moe_drop_tokens = "eager", False
    if not hasattr(config, "model_version"):
        config.model_version = MODEL_VERSION
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=True)
    if (path / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(str(path), local_files_only=True)
    if hasattr(model, "load_tokenizer"):
        model.load_tokenizer(str(path))
    check_surface(model)
    return config, model


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


def check_surface(model: RemoteModel) -> None:
    """Raise with everything that `RemoteModel` names and this folder's code does not have, or the code's revision."""
    missing = [path for path in SURFACE if not _has(model, path)]
    if not any(_has(model, f"image_processor.{name}") for name in RATIO_PROCESSOR_MAKERS):
        missing.append(" or ".join(f"image_processor.{name}" for name in RATIO_PROCESSOR_MAKERS))
    if not hasattr(sys.modules[type(model).__module__], "get_system_prompt"):
        missing.append("get_system_prompt in its module")
    if missing:
        raise CheckpointError(
            f"{type(model).__name__}: the folder's code or generation_config.json does not have {', '.join(missing)}, "
            "which openwu uses; take another revision of the folder, or adapt "
            "openwu.backbones.hunyuan_image_3.loading.RemoteModel and its callers to it"
        )
    mixture = inspect.unwrap(type(model.model.layers[-1].mlp).forward)
    if "dispatch_mask" in mixture.__code__.co_varnames:
        raise CheckpointError(
            f"{type(model).__name__}: expected code from February 2026 on, got the revision of January 2026, whose "
            "mixture of experts takes 45 to 60 GB more per layer at 20,000 tokens; download the folder's code again"
        )


def check_weights(model: RemoteModel, headers: Headers) -> None:
    """Raise where the files lack a weight of the model, or have it in another shape."""
    expected = {name: tuple(weight.shape) for name, weight in cast("nn.Module", model).named_parameters()}
    shapes = {name: shape for name, (_, shape) in headers.items()}
    wrong = [
        f"{name} {shape}, got {shapes.get(name, 'none')}"
        for name, shape in expected.items()
        if shapes.get(name) != shape
    ]
    if wrong:
        raise CheckpointError(
            f"safetensors: expected {len(expected)} weights that the folder's code has, but {len(wrong)} are missing "
            f"or of another shape, first {'; '.join(wrong[:3])}; download the whole folder again, from one revision"
        )


def prompt_function(model: RemoteModel) -> Callable[[str, Task | None, None], str]:
    """Return the folder's own function (name of a system prompt, task, own prompt) -> text."""
    make: Callable[[str, Task | None, None], str] = sys.modules[type(model).__module__].get_system_prompt
    return make


def _check_ways(device: torch.device, quantise: Quantise | None, offload: bool, needs_gpu: bool) -> None:
    check_way(quantise)
    if quantise is not None and offload:
        raise OpenwuError("quantise, offload: expected one of them: bitsandbytes keeps its weights on the GPU")
    if device.type == "cpu" and (offload or needs_gpu):
        reason = "layers wait in memory for a GPU" if offload else "the folder's code puts tensors there as it loads"
        raise OpenwuError(
            f"{'offload' if offload else 'device'}: expected a CUDA GPU, got cpu: {reason}; use --device cuda"
        )
    if quantise is not None:
        bitsandbytes(EXTRA)


def _placement(
    headers: Headers,
    device: torch.device,
    *,
    quantise: Quantise | None,
    offload: bool,
    dtype: torch.dtype | None,
    reserve_bytes: int,
) -> dict[str, Any]:
    """What transformers is told about devices, after the check that the weights fit there."""
    free = FreeMemory.of(device)
    if device.type == "cuda" and not free.gpus:
        raise OpenwuError(f"device: expected a machine with a CUDA GPU for {device}, found none")
    need = check_memory(headers, free, quantise=quantise, offload=offload, dtype=dtype, reserve_bytes=reserve_bytes)
    if device.type == "cpu" and quantise is None:
        return {}
    library("accelerate", EXTRA)
    if len(free.gpus) <= 1 and not offload:
        return {"device_map": {"": str(device)}}
    budgets = gpu_budgets(need, free, offload=offload)
    if quantise is not None:
        budgets = {place: int(size / USED) for place, size in budgets.items()}
    return {"device_map": "auto", "max_memory": budgets}


def _has(model: object, path: str) -> bool:
    """Whether a foreign object has this path, with a value."""
    try:
        return attrgetter(path)(model) is not None
    except AttributeError:
        return False


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

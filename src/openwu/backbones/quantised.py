"""Quantise frozen linear layers to 8 or 4 bits with bitsandbytes, and count the bytes that saves.

8 bits: LLM.int8, a scale for every row; inputs are rounded to 8 bits, too, except columns with large values (Dettmers
et al. 2022). 4 bits: NF4, a scale for every 64 weights (Dettmers et al. 2023); inputs stay as they are. Adapters are
applied by hooks to the output of such layers, in full precision, and gradients flow through. Merging refuses them.

Shapes: weights `[out, in]`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from openwu.config import LayerGroup
from openwu.errors import OpenwuError
from openwu.extras import library
from openwu.files.headers import read_header

Quantise = Literal["8bit", "4bit"]
WAYS: tuple[Quantise, ...] = ("8bit", "4bit")

EXTRA = "quantised"
BLOCK = 64
"""Weights that share a scale in 4 bits."""
CODE = 16
"""Values that a weight of 4 bits can have; every layer keeps its own table of them."""
OUTLIERS = 6.0
"""Columns of an input with a value from here on are computed in full, as in transformers and diffusers."""

_CHATTER = ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops")
"""Loggers that write in every pass of every layer (inputs that are not float16), and on import."""


@dataclass(frozen=True)
class QuantisationPlan:
    """Which weights of a pipeline are quantised, and how."""

    how: Quantise
    part: str
    """Name of the pipeline's part."""
    paths: Callable[[Path], Sequence[str]]
    """The pipeline's folder -> paths of the linear layers in that part."""

    def saved(self, folder: Path, files: Iterable[Path], itemsize: int) -> int:
        """Return the bytes saved against weights of `itemsize` bytes; `files`: safetensors of the part."""
        chosen = {f"{path}.weight" for path in self.paths(folder)}
        shapes = [shape for file in files for name, (_, shape) in read_header(file).items() if name in chosen]
        wide = [shape for shape in shapes if wide_enough(shape, self.how)]
        return sum(math.prod(shape) * itemsize - quantised_bytes(shape, self.how) for shape in wide)


def wide_enough(shape: Sequence[int], how: Quantise) -> bool:
    """Tell whether a weight is quantised: in 4 bits only if its rows are whole blocks, as they are in real bases.

    bitsandbytes 0.50 unpacks other weights wrongly on CPUs with AVX-512: [64, 32] comes back with an error of 40 %
    where 9 % are the rounding's. They stay as they are everywhere, so that a base is the same on all devices.
    """
    return how == "8bit" or shape[-1] % BLOCK == 0


def quantised_bytes(shape: Sequence[int], how: Quantise) -> int:
    """Return the bytes of a quantised weight of this shape with its float32 scales."""
    numbers = math.prod(shape)
    if how == "8bit":
        return numbers + 4 * math.prod(shape[:-1])
    return math.ceil(numbers / 2) + 4 * math.ceil(numbers / BLOCK) + 4 * CODE


def check_way(how: object) -> None:
    """Raise OpenwuError for an unknown way."""
    if how is not None and how not in WAYS:
        raise OpenwuError(f"quantise: expected 8bit, 4bit or nothing, got {how!r}")


def check_quantise(how: object) -> None:
    """Raise OpenwuError for an unknown way, and if bitsandbytes is needed and not installed."""
    check_way(how)
    if how is not None:
        bitsandbytes()


def bitsandbytes(extra: str = EXTRA) -> Any:
    """Import bitsandbytes, with the loggers silenced that write in every pass."""
    for name in _CHATTER:
        logging.getLogger(name).setLevel(logging.ERROR)
    return library("bitsandbytes", extra)


def inner_linear_layers(model: nn.Module, groups: Iterable[LayerGroup]) -> list[str]:
    """List the paths of all `nn.Linear` inside the blocks that receive adapters: not embeddings and output heads."""
    layers = tuple(group.layer_path(layer) for group in groups for layer in range(group.num_layers))
    return [path for path, each in model.named_modules() if type(each) is nn.Linear and path.startswith(layers)]


@torch.no_grad()
def quantise_(model: nn.Module, paths: Iterable[str], how: Quantise, dtype: torch.dtype, device: torch.device) -> None:
    """Replace the linear layers at `paths` that are wide enough by quantised ones on `device`, one by one.

    `dtype`: in which layers of 4 bits compute. The model must be in main memory.
    """
    library_ = bitsandbytes()
    for path in paths:
        linear = model.get_submodule(path)
        if wide_enough(linear.get_parameter("weight").shape, how):
            model.set_submodule(path, _quantised(library_, linear, how, dtype, device))
    differentiable_(model)


def differentiable_(model: nn.Module) -> None:
    """Keep layers of 4 bits in the layout that has a backward pass.

    On CPUs with bfloat16 units bitsandbytes repacks a weight in its first pass without gradients. Products with packed
    weights have no backward, so that later gradients silently end there, and widths that are no multiple of 64 fail.
    Nothing changes on a GPU.
    """
    each: Any
    for each in model.modules():
        if hasattr(each, "support_avx512bf16_for_cpu"):
            each.support_avx512bf16_for_cpu = False


def _quantised(library_: Any, linear: Any, how: Quantise, dtype: torch.dtype, device: torch.device) -> nn.Module:
    widths, bias, weight = (linear.in_features, linear.out_features), linear.bias, linear.weight.data
    with torch.device("meta"):
        if how == "8bit":
            made = library_.nn.Linear8bitLt(*widths, bias is not None, has_fp16_weights=False, threshold=OUTLIERS)
        else:
            made = library_.nn.Linear4bit(*widths, bias is not None, dtype, compress_statistics=False, quant_type="nf4")
    # Quantised on its way to the device.
    if how == "8bit":
        made.weight = library_.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(device)
    else:
        kind = {"blocksize": BLOCK, "compress_statistics": False, "quant_type": "nf4"}
        made.weight = library_.nn.Params4bit(weight, requires_grad=False, module=made, **kind).to(device)
    made.bias = None if bias is None else nn.Parameter(bias.data.to(device), requires_grad=False)
    return made.train(linear.training)  # type: ignore[no-any-return]

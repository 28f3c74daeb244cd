"""Fill a module from a safetensors file, and tell weights apart without reading all of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from openwu.files.hashing import of_bytes

SCALE = ".scale"
"""A matrix of 8-bit numbers has beside it, under its name and this, a factor for each of its rows."""
SAMPLED = 16
"""Numbers at the beginning and at the end of every tensor that `sampled_digest` reads."""


def fill(module: nn.Module, file: Path, dtype: torch.dtype) -> list[str]:
    """Give a module on the meta device the weights of a file, in `dtype`. Returns what does not fit, a line each."""
    try:
        stored = unpacked(load_file(file))
    except (OSError, SafetensorError) as error:
        return [f"{file.name}: cannot be read ({error})"]
    expected = module.state_dict()
    problems = [f"{file.name}: missing {key}" for key in expected if key not in stored]
    problems += [f"{file.name}: unexpected {key}" for key in stored if key not in expected]
    problems += [
        f"{file.name}: {key}: expected shape {list(expected[key].shape)}, got {list(stored[key].shape)}"
        for key in expected
        if key in stored and stored[key].shape != expected[key].shape
    ]
    if not problems:
        module.load_state_dict({key: value.to(dtype) for key, value in stored.items()}, assign=True)
    return problems


def packed(tensors: Mapping[str, Tensor], dtype: torch.dtype, rows: Collection[str]) -> dict[str, Tensor]:
    """Return tensors as a file stores them: those named in `rows`, matrices, by 8-bit rows with a factor each."""
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name not in rows:
            found[name] = value.to(dtype).contiguous()
            continue
        scale = (value.float().abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-6).half()
        found[name] = (value.float() / scale.float()).round().clamp(-127, 127).to(torch.int8)
        found[name + SCALE] = scale[:, 0].contiguous()
    return found


def unpacked(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what `packed` made whole again, in float16, the dtype of the factors."""
    rows = {name for name, value in stored.items() if value.dtype == torch.int8 and name + SCALE in stored}
    scales = {name + SCALE for name in rows}
    return {
        name: (value.float() * stored[name + SCALE].float()[:, None]).half() if name in rows else value
        for name, value in stored.items()
        if name not in scales
    }


def sampled_digest(modules: Mapping[str, nn.Module]) -> str:
    """Hash names and shapes of all tensors of some modules, and the numbers at both ends of each tensor.

    Quick for models of any size; other weights show, since training changes nearly every number. Of tensors on the
    meta device (offloaded ones, say) only names and shapes count.
    """

    def parts() -> Iterator[bytes]:
        for name, module in sorted(modules.items()):
            for key, value in module.state_dict().items():
                if isinstance(value, Tensor):
                    path = f"{name}.{key}" if name else key
                    yield f"{path} {tuple(value.shape)}".encode()
                    if not value.is_meta:
                        flat = value.detach().flatten()
                        yield torch.cat([flat[:SAMPLED], flat[-SAMPLED:]]).cpu().float().numpy().tobytes()

    return of_bytes(parts()).hexdigest()

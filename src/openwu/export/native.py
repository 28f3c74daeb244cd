"""Our own adapter folder: any `Adapter` enters or leaves, bit for bit.

`adapter_config.json` has `format`, `version`, `batch`, `rank`, `scale`, `instructions` and `targets`;
`adapter_model.safetensors` has `{target}.lora_A` `[b, (E,) r, A_dim]` and `{target}.lora_B` `[b, (E,) B_dim, r]`.

Shapes: b samples, E experts, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from openwu.errors import CheckpointError, OpenwuError
from openwu.export.files import CONFIG, WEIGHTS, write
from openwu.export.fit import fitted
from openwu.types import Adapter, Target

FORMAT = "openwu-adapter"
VERSION = 1


def save_native(adapter: Adapter, folder: Path, model: nn.Module | None, component: str | None) -> None:
    """Write any adapter. `model`, where given: must have the targets, and says which kernels its convolutions have."""
    if component is not None:
        raise OpenwuError(f"component: our own format has no component, got {component!r}; leave it out")
    if model is not None:
        adapter = fitted(adapter, model)
    write(folder, WEIGHTS, adapter.state_dict(), native_config(adapter))


def native_config(adapter: Adapter) -> dict[str, Any]:
    """All of an adapter but its tensors, as plain JSON values; `read_native` puts both together again."""
    targets = [
        {"name": t.name, "in_dim": t.in_dim, "out_dim": t.out_dim, "experts": t.experts, "kernel": t.kernel}
        for t in adapter.targets
    ]
    sizes = {"batch": adapter.batch, "rank": adapter.rank, "scale": adapter.scale}
    config = {"format": FORMAT, "version": VERSION, **sizes, "instructions": list(adapter.instructions)}
    return {**config, "targets": targets}


def read_native(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Adapter:
    """What `native_config` and `Adapter.state_dict` gave -> the adapter; CheckpointError where they do not fit."""
    if config.get("version") != VERSION:
        raise CheckpointError(f"expected version {VERSION} of {FORMAT}, got {config.get('version')!r}; update openwu")
    try:
        targets = tuple(_target(entry) for entry in config["targets"])
        scale, sizes = float(config["scale"]), (int(config["batch"]), int(config["rank"]))
        instructions = tuple(str(text) for text in config.get("instructions", ()))
        weights = pairs_of(tensors, [target.name for target in targets], "{name}.lora_{part}")
        adapter = Adapter(targets, weights, scale, instructions)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{CONFIG}: expected batch, rank, scale and targets, got {error!r}") from error
    if (adapter.batch, adapter.rank) != sizes:
        raise CheckpointError(f"expected batch and rank {sizes}, got tensors of {(adapter.batch, adapter.rank)}")
    return adapter


def pairs_of(tensors: Mapping[str, Tensor], names: Sequence[str], key: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (A, B), of tensors that must be exactly these."""
    keys = {name: (key.format(name=name, part="A"), key.format(name=name, part="B")) for name in names}
    expected = {part for pair in keys.values() for part in pair}
    missing, unexpected = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
    if missing or unexpected or not names:
        raise CheckpointError(f"{WEIGHTS}: tensors do not fit {CONFIG}; missing {missing}, unexpected {unexpected}")
    if scalars := [part for part in expected if tensors[part].ndim < 2]:
        raise CheckpointError(f"{WEIGHTS}: expected matrices, got other shapes for {sorted(scalars)}")
    return {name: (tensors[a], tensors[b]) for name, (a, b) in keys.items()}


def _target(entry: Mapping[str, Any]) -> Target:
    kernel = entry["kernel"]
    return Target(
        name=entry["name"],
        in_dim=int(entry["in_dim"]),
        out_dim=int(entry["out_dim"]),
        experts=None if entry["experts"] is None else int(entry["experts"]),
        kernel=None if kernel is None else (int(kernel[0]), int(kernel[1])),
    )

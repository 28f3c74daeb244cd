"""Our own adapter folder: write and read any `Adapter`, bit for bit.

`adapter_config.json` has `format`, `version`, `batch`, `rank`, `scale`, `instructions` (for each sample a text, or a
list of texts where the adapter is a sum), `refined` (for each sample the steps on its example) where any was, and
`targets`, each with its `operator` where that is not LoRA;
`adapter_model.safetensors` has `{target}.{factor}`, of a LoRA `{target}.lora_A` `[b, (E,) r, A_dim]` and
`{target}.lora_B` `[b, (E,) B_dim, r]`.

Shapes: b samples, E experts, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from openwu.errors import CheckpointError, OpenwuError
from openwu.export.files import CONFIG, WEIGHTS, write
from openwu.export.fit import fitted
from openwu.types import LORA, Adapter, Target

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
        | ({} if t.operator == LORA else {"operator": t.operator})
        | ({} if t.rank is None else {"rank": t.rank})
        for t in adapter.targets
    ]
    sizes = {"batch": adapter.batch, "rank": adapter.rank, "scale": adapter.scale}
    instructions = [texts[0] if len(texts) == 1 else list(texts) for texts in adapter.instructions]
    config = {"format": FORMAT, "version": VERSION, **sizes, "instructions": instructions}
    refined = {"refined": list(adapter.refined)} if adapter.refined else {}
    return {**config, **refined, "targets": targets}


def read_native(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Adapter:
    """What `native_config` and `Adapter.state_dict` gave -> the adapter; CheckpointError where they do not fit."""
    if config.get("version") != VERSION:
        raise CheckpointError(f"expected version {VERSION} of {FORMAT}, got {config.get('version')!r}; update openwu")
    try:
        targets = tuple(_target(entry) for entry in config["targets"])
        scale, sizes = float(config["scale"]), (int(config["batch"]), int(config["rank"]))
        instructions = tuple(
            (texts,) if isinstance(texts, str) else tuple(str(text) for text in texts)
            for texts in config.get("instructions", ())
        )
        names = {t.name: {part: f"{t.name}.{part}" for part in t.shapes(*sizes)} for t in targets}
        refined = tuple(int(steps) for steps in config.get("refined", ()))
        adapter = Adapter(targets, tensors_of(tensors, names), scale, instructions, refined)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{CONFIG}: expected batch, rank, scale and targets, got {error!r}") from error
    if (adapter.batch, adapter.rank) != sizes:
        raise CheckpointError(f"expected batch and rank {sizes}, got tensors of {(adapter.batch, adapter.rank)}")
    return adapter


def tensors_of(
    tensors: Mapping[str, Tensor], keys: Mapping[str, Mapping[str, str]], *, dims: int = 2
) -> dict[str, dict[str, Tensor]]:
    """Look up tensors by `keys`, target name -> factor name -> key; CheckpointError unless `tensors` has just these.

    dims: how many axes each has at least.
    """
    expected = {key for parts in keys.values() for key in parts.values()}
    missing, unexpected = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
    if missing or unexpected or not keys:
        raise CheckpointError(f"{WEIGHTS}: tensors do not fit {CONFIG}; missing {missing}, unexpected {unexpected}")
    if scalars := [key for key in expected if tensors[key].ndim < dims]:
        raise CheckpointError(
            f"{WEIGHTS}: expected {'matrices' if dims == 2 else 'vectors'}, got other shapes for {sorted(scalars)}"
        )
    if wrong := [key for key in expected if not tensors[key].is_floating_point()]:
        dtype = tensors[wrong[0]].dtype
        raise CheckpointError(f"{WEIGHTS}: expected floating-point numbers, got {dtype} in {wrong[0]}")
    return {name: {part: tensors[key] for part, key in parts.items()} for name, parts in keys.items()}


def _target(entry: Mapping[str, Any]) -> Target:
    kernel = entry["kernel"]
    return Target(
        name=entry["name"],
        in_dim=int(entry["in_dim"]),
        out_dim=int(entry["out_dim"]),
        experts=None if entry["experts"] is None else int(entry["experts"]),
        kernel=None if kernel is None else (int(kernel[0]), int(kernel[1])),
        operator=str(entry.get("operator", LORA)),
        rank=None if entry.get("rank") is None else int(entry["rank"]),
    )

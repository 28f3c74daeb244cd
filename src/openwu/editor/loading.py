"""Load a base and its generator, by a base's name or from the folder of a model that has both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from openwu.backbones import backbone_class
from openwu.backbones.protocol import Backbone, BundledGenerator
from openwu.config import GeneratorConfig
from openwu.editor.compatibility import check_generator
from openwu.errors import CheckpointError, OpenwuError
from openwu.files.weights import fill
from openwu.generator.checkpoint import generator_bytes
from openwu.generator.model import ParameterGenerator
from openwu.kernels.modules import without_weights
from openwu.registry import BASES, DEFAULT_BASE
from openwu.types import LoadingOptions


def load_pair(
    model: str | Path | None, base: str | Path | None, generator: str | Path | None, loading: LoadingOptions
) -> tuple[str, Backbone, ParameterGenerator]:
    """Return the base's name, the base and the generator; arguments as those of `Editor.from_pretrained`."""
    name, folder = _located(model, base)
    kind = backbone_class(name)
    folder = folder or kind.bundled_folder()
    options = _further_options(kind, name, loading)
    bundled = None if folder is None or generator is not None else kind.bundled_generator(Path(folder))
    if folder is None or (generator is None and bundled is None):
        found = ", ".join(f"{key}={value}" for key, value in (("model", model), ("base", base)))
        raise OpenwuError(
            f"expected base=FOLDER (--base) and generator=FOLDER (--generator) together, got {found}, "
            f"generator={generator}"
        )
    kind.check(folder, revision=loading.revision, **options)
    device = torch.device(loading.device or kind.default_device())
    how: dict[str, Any] = {"device": device, "dtype": loading.dtype, "revision": loading.revision, **options}
    if bundled is not None:
        backbone = kind.from_pretrained(folder, **how)
        return name, backbone, load_bundled(bundled, next(backbone.denoiser.parameters()).dtype)
    assert generator is not None
    # What is wrong with the generator's files, or does not fit the base, is said before the base's weights are read.
    config = ParameterGenerator.outline(generator, dtype=loading.dtype).config
    if "before_weights" in kind.loading_options:
        how["before_weights"] = lambda hollow: check_generator(config, hollow, name)
    if "reserve_bytes" in kind.loading_options:
        how["reserve_bytes"] = generator_bytes(Path(generator), loading.dtype)
    # The base's memory is counted with the generator beside it: planned, or loaded first.
    planned = kind.from_pretrained(folder, **how) if "reserve_bytes" in kind.loading_options else None
    made = ParameterGenerator.from_pretrained(generator, dtype=loading.dtype, device=device)
    return name, planned or kind.from_pretrained(folder, **how), made


def _located(model: str | Path | None, base: str | Path | None) -> tuple[str, str | Path | None]:
    """The base's name, and its folder or hub id; None for the one that comes with the package, if there is one."""
    if model is None or str(model) in BASES:
        return (DEFAULT_BASE if model is None else str(model)), base
    if base is None and Path(model).is_dir():
        return DEFAULT_BASE, model
    raise OpenwuError(
        f"model: expected one of {', '.join(BASES)}, or a folder with config.json and safetensors without base=, "
        f"got {str(model)!r}; `openwu models` describes them"
    )


def load_bundled(bundled: BundledGenerator, dtype: torch.dtype) -> ParameterGenerator:
    """Load the generator that came with a base. Raises CheckpointError with everything that does not fit."""
    config = GeneratorConfig.from_dict(bundled.config)
    with without_weights():
        generator = ParameterGenerator(config)
    if problems := fill(generator, bundled.weights, dtype):
        raise CheckpointError.listing(f"{bundled.weights.parent} does not hold a whole generator:", problems)
    return generator


def _further_options(kind: type[Backbone], name: str, loading: LoadingOptions) -> dict[str, Any]:
    """Loading options beside device, dtype and revision. Raises OpenwuError for one that the base does not have."""
    asked = {key: getattr(loading, key) for key in ("trust_remote_code", "quantise", "offload")}
    if refused := [key for key, value in asked.items() if value and key not in kind.loading_options]:
        raise OpenwuError(f"{', '.join(refused)}: expected none for {name}, which has no such option; leave it out")
    return {key: value for key, value in asked.items() if key in kind.loading_options}

"""Export an adapter and prove that the target library reads it and computes the same.

The export is written beside its place, reloaded there by the library (PEFT, diffusers) or, for ComfyUI, which is no
library, by a resolver that does what ComfyUI does with keys, and by facts about the names that it knows. Every
adapted module then answers the same random input with the reloaded adapter and with live injection. Only what agrees
takes its place.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openwu.adapters.inject import attach, resolve
from openwu.adapters.site import Site
from openwu.backbones import backbone_class
from openwu.backbones.diffusers.loading import INDEX, denoiser_name, load_denoiser, load_lora
from openwu.errors import CheckpointError, ExportError, TargetError
from openwu.export.comfyui_names import family_of
from openwu.export.files import COMFYUI_WEIGHTS, DIFFUSERS_WEIGHTS, PREFIX, WEIGHTS, read_tensors, replaced
from openwu.export.fit import expert_parameter, single
from openwu.registry import DEFAULT_BASE
from openwu.types import LORA_A, LORA_B, Adapter

ROWS = 8
SIDE = 9
"""Rows of a linear module's random input; a convolution's is `[1, c, SIDE, SIDE]`, or larger for larger kernels."""
NOISE = 1e-6
"""Rounding of a module's output in float32, relative to it."""
TOLERANCE = 1e-4
"""How far the reloaded update may be from the live one, relative to it; more where the file rounded the scale."""


@dataclass(frozen=True)
class Outcome:
    """Whether an export was checked, and how."""

    checked: bool
    told: str
    """What was compared and how well it agreed, or why nothing was."""


@dataclass(frozen=True)
class Base:
    """The model that an adapter is for. A check uses it up: the library's layers stay in it."""

    model: nn.Module
    component: str | None = None
    """Where it stands in its diffusers pipeline."""
    pipeline: Any = None
    run: Callable[[nn.Module], Tensor] | None = None
    """The whole model's answer to fixed random inputs, where it is known how to call it."""


@dataclass(frozen=True)
class Live:
    """What the base answers with the adapter injected: the reference of every check."""

    adapter: Adapter
    base: Base
    inputs: Mapping[str, Tensor]
    """Path of an adapted module -> its random input."""
    plain: Mapping[str, Tensor]
    """Path -> output without the adapter; "" is the whole model, where it can be run."""
    adapted: Mapping[str, Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, adapter: Adapter, base: Base) -> Live:
        """Inject the adapter (b = 1) into the base, both in float32, and let every adapted module answer."""
        adapter, model = adapter.to(torch.float32), base.model.float()
        draw = torch.Generator().manual_seed(0)
        injected = [target for target in adapter.targets if expert_parameter(model, target) is None]
        if not injected:
            return cls(adapter, base, {}, {}, {})
        part = Adapter(tuple(injected), {t.name: adapter.factors[t.name] for t in injected}, adapter.scale)
        run = base.run if len(injected) == len(adapter.targets) else None
        with attach(model, injected) as handle:
            sites = list(handle.sites)
            inputs = {site.path: _input(site, draw) for site in sites}
            plain = {site.path: site.module(inputs[site.path]) for site in sites}
            whole = {} if run is None else {"": run(model)}
            with handle.applied(part):
                adapted = {site.path: site.module(inputs[site.path]) for site in sites}
            if run is not None:
                with handle.applied(part):
                    adapted[""] = run(model)
        return cls(adapter, base, inputs, plain | whole, adapted)


def check_peft(live: Live, folder: Path) -> Outcome:
    """`PeftModel.from_pretrained` around the base."""
    import peft

    with _quiet():
        loaded = peft.PeftModel.from_pretrained(live.base.model, str(folder))
    keys = read_tensors(folder / WEIGHTS)[0]
    _same_keys("PEFT", keys, (PREFIX + key for key in _peft_keys(loaded.base_model.model)))
    return Outcome(True, _compare("PEFT", f"PEFT {version('peft')}", live, loaded.base_model.model, keys))


def check_diffusers(live: Live, folder: Path) -> Outcome:
    """`load_lora_weights` of the base's pipeline."""
    component = live.base.component
    assert component is not None
    with _quiet():
        loaded = load_lora(live.base.pipeline, component, folder)
    keys = read_tensors(folder / DIFFUSERS_WEIGHTS)[0]
    _same_keys("diffusers", keys, (f"{component}.{key}" for key in _peft_keys(loaded)))
    return Outcome(True, _compare("diffusers", f"diffusers {version('diffusers')}", live, loaded, keys))


@torch.no_grad()
def check_comfyui(live: Live, folder: Path) -> Outcome:
    """Add the updates to the base's weights as ComfyUI does. Not checked for models whose names ComfyUI translates by
    rules that `comfyui_names` has not: whether it knows them, only its log says."""
    tensors = read_tensors(folder / COMFYUI_WEIGHTS)[0]
    known: dict[str, nn.Parameter] = {}
    for name, weight in live.base.model.named_parameters():
        if name.endswith(".weight"):
            module = name.removesuffix(".weight")
            for stem in (f"diffusion_model.{module}", f"transformer.{module}", f"lora_unet_{module.replace('.', '_')}"):
                known[stem] = weight
    used: set[str] = set()
    for stem, weight in known.items():
        up, down, alpha = (tensors.get(f"{stem}.{end}") for end in ("lora_up.weight", "lora_down.weight", "alpha"))
        if up is None or down is None:
            continue
        scale = 1.0 if alpha is None else float(alpha) / len(down)
        weight.add_(scale * (up.float().flatten(1) @ down.float().flatten(1)).view(weight.shape))
        used |= {f"{stem}.{end}" for end in ("lora_up.weight", "lora_down.weight", "alpha")}
    if unmatched := sorted(set(tensors) - used):
        raise ExportError(f"ComfyUI: {len(unmatched)} keys would not be loaded: {_shown(unmatched)}")
    told = _compare("ComfyUI", "ComfyUI's arithmetic", live, live.base.model, tensors)
    kind = type(live.base.model).__name__
    if family_of(live.base.model) is None:
        return Outcome(False, f"{told}; whether ComfyUI has a model with the module names of {kind} is not known here")
    return Outcome(
        True, f"{told}; ComfyUI's tables have all names of {kind} that are used (ComfyUI itself was not run)"
    )


def check_native(adapter: Adapter, folder: Path) -> str:
    """Our own folder holds the same numbers."""
    came, expected = Adapter.from_pretrained(folder).state_dict(), adapter.state_dict()
    if wrong := [name for name in expected if not torch.equal(came[name], expected[name].cpu())]:
        raise ExportError(f"openwu: other numbers came back for {_shown(wrong)}")
    return f"read back: the same {len(expected)} tensors"


CHECKS: dict[str, Callable[[Live, Path], Outcome]] = {
    "peft": check_peft,
    "diffusers": check_diffusers,
    "comfyui": check_comfyui,
}
"""Foreign format -> its check; a line beside one in `EXPORT_FORMATS`."""

LIBRARIES = {"peft": ("peft",), "diffusers": ("diffusers", "peft")}
"""Format -> the packages that its check needs."""


def _peft_keys(model: nn.Module) -> Iterator[str]:
    """Keys of the tensors that PEFT has put into a model's modules."""
    for name, module in model.named_modules():
        held = dict(module.named_children())
        for part in ("lora_A", "lora_B"):
            layers = held.get(part)
            if isinstance(layers, nn.ModuleDict):
                for layer in layers.values():
                    yield from (f"{name}.{part}.{parameter}" for parameter, _ in layer.named_parameters())
        multipliers = held.get("ia3_l")
        if isinstance(multipliers, nn.ParameterDict) and len(multipliers):
            yield f"{name}.ia3_l"
        if isinstance(magnitude := held.get("lora_magnitude_vector"), nn.ModuleDict) and len(magnitude):
            yield f"{name}.lora_magnitude_vector"
        for part in ("road_theta", "road_alpha"):
            if isinstance(turns := held.get(part), nn.ParameterDict) and len(turns):
                yield f"{name}.{part}"
        norms = held.get("ln_tuning_layers")
        for layer in norms.values() if isinstance(norms, nn.ModuleDict) else ():
            yield from (f"{name}.ln_tuning_layers.{parameter}" for parameter, _ in layer.named_parameters())


def _same_keys(library: str, written: Iterable[str], expected: Iterable[str]) -> None:
    loaded = set(expected)
    ignored, invented = sorted(set(written) - loaded), sorted(loaded - set(written))
    if ignored or invented:
        raise ExportError(
            f"{library}: it loads other modules than were written; not loaded: {_shown(ignored) or 'none'}; "
            f"not written: {_shown(invented) or 'none'}"
        )


@torch.no_grad()
def _compare(library: str, told: str, live: Live, loaded: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """Every module's answer with the reloaded adapter against that with live injection."""
    precisions = [torch.finfo(tensor.dtype).eps for tensor in tensors.values() if tensor.ndim > 1]
    rough = max(precisions, default=TOLERANCE / 2)
    # Only diffusers' files have the scale in B, rounded to its dtype.
    tolerance = max(TOLERANCE, 2 * rough) if library == "diffusers" else TOLERANCE
    answers = {path: loaded.get_submodule(path)(x) for path, x in live.inputs.items()}
    if "" in live.adapted:
        assert live.base.run is not None
        answers[""] = live.base.run(loaded)
    worst, wrong = 0.0, []
    for path, came in answers.items():
        expected = live.adapted[path]
        update, off = float((expected - live.plain[path]).norm()), float((came - expected).norm())
        if not off <= tolerance * update + NOISE * float(expected.norm()):
            wrong.append(f"{path or 'the whole model'} (off by {off:.3g}, the update is {update:.3g})")
        worst = max(worst, off / update if update else 0.0)
    count = len(live.inputs)
    for path, delta, expected in _parameter_deltas(live, loaded):
        off, update, count = float((delta - expected).norm()), float(expected.norm()), count + 1
        if not off <= tolerance * update:
            wrong.append(f"{path} (off by {off:.3g}, the update is {update:.3g})")
        worst = max(worst, off / update if update else 0.0)
    if wrong:
        raise ExportError(f"{library}: {len(wrong)} modules answer otherwise than with live injection: {_shown(wrong)}")
    whole = " and the whole model" if "" in live.adapted else ""
    return f"{told}: {count} modules{whole} answer as with live injection, to {worst:.1e} of the update"


def _parameter_deltas(live: Live, loaded: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Experts held as one parameter are not injected live: PEFT's change of the weight, and ours, `[E, ...]`."""
    for target in live.adapter.targets:
        container, _, name = target.name.rpartition(".")
        wrapper = loaded.get_submodule(container) if target.experts is not None else None
        while wrapper is not None and getattr(wrapper, "parameter_name", name) != name:
            wrapper = wrapper.get_submodule("base_layer")
        if wrapper is None or not hasattr(wrapper, "parameter_name"):
            continue
        factors = live.adapter.factors[target.name]
        delta = live.adapter.scale * factors[LORA_B][0] @ factors[LORA_A][0]
        held: Any = wrapper
        swapped = bool(getattr(held.get_base_layer(), "is_transposed", False))
        yield target.name, held.get_delta_weight("default"), delta.mT if swapped else delta


def _input(site: Site, draw: torch.Generator) -> Tensor:
    module = site.module
    if isinstance(module, nn.Conv2d):
        side = max(SIDE, *((k - 1) * d + 1 for k, d in zip(module.kernel_size, module.dilation, strict=True)))
        return torch.randn(1, module.in_channels, side, side, generator=draw)
    if isinstance(module, nn.GroupNorm):
        return torch.randn(ROWS, module.num_channels, SIDE, SIDE, generator=draw)
    return torch.randn(ROWS, site.targets[0].in_dim, generator=draw)


@contextmanager
def _quiet() -> Iterator[None]:
    """The libraries warn of what is compared afterwards; what they raise is told as ours."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        raise ExportError(f"the library cannot read the export: {type(error).__name__}: {error}") from error


def _shown(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


CONFIG = "config.json"


def find_base(folder: Path | None) -> Base:
    """The base in a folder: a diffusers pipeline or an embedded model; of None, the embedded model inside the package.

    Raises CheckpointError, or ImportError where the folder needs a library that is not there.
    """
    if folder is not None and (folder / INDEX).is_file():
        component = denoiser_name(folder)
        pipeline = load_denoiser(folder, component)
        return Base(getattr(pipeline, component).requires_grad_(False), component, pipeline)
    if folder is not None and not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{folder}: expected a base model's folder with {INDEX} (a diffusers pipeline) or {CONFIG} (an embedded "
            "model); openwu.export.proof.export takes any other base as a module"
        )
    kind = backbone_class(DEFAULT_BASE)
    backbone = kind.from_pretrained(folder or kind.bundled_folder() or "", dtype=torch.float32)
    return Base(backbone.denoiser, run=backbone.example_call())


def fits(adapter: Adapter, base: Base) -> bool:
    """Whether the base has all of the adapter's targets."""
    try:
        sites = resolve(base.model, adapter.targets)
    except TargetError:
        return False
    return not any(site.unreachable for site in sites)


def export(
    adapter: Adapter,
    output: Path,
    format: str,
    *,
    base: Base | None = None,
    component: str | None = None,
    check: bool = True,
    unavailable: str = "",
) -> Outcome:
    """Write one sample's adapter in a format and prove that the library reads it; ExportError where it does not.

    A failure leaves nothing behind and whatever was at `output` as it was. Without `base` nothing is compared, and
    `unavailable` says why there is none.
    """
    if component is None and base is not None and format in ("diffusers", "comfyui"):
        component = base.component
    model = None if base is None else base.model
    with replaced(output.resolve()) as draft:
        adapter.save_pretrained(draft, format, component=component, model=model)
        return _checked(adapter, draft, format, base, check, unavailable)


def _checked(
    adapter: Adapter,
    folder: Path,
    format: str,
    base: Base | None,
    check: bool,
    unavailable: str,
) -> Outcome:
    missing = [name for name in LIBRARIES.get(format, ()) if importlib.util.find_spec(name) is None]
    if not check:
        return Outcome(False, "the check was left out")
    if format == "openwu":
        return Outcome(True, check_native(adapter, folder))
    if missing:
        return Outcome(False, f"{' and '.join(missing)} not installed; pip install 'openwu[diffusers]' has both")
    if base is None:
        return Outcome(False, unavailable or "no base model to compare on; pass --base FOLDER")
    if format == "diffusers" and base.pipeline is None:
        return Outcome(
            False, "diffusers loads LoRA into its pipelines, and the base is none; pass --base PIPELINE_FOLDER"
        )
    live = Live.of(single(adapter, format, base.model), base)
    return CHECKS[format](live, folder)

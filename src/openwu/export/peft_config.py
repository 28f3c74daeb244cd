"""Read what a PEFT `LoraConfig` says, in `adapter_config.json` or in a safetensors header, and refuse the rest by name.

A module's update is `scale * B A`; its scale is alpha / r, or alpha / sqrt(r) with `use_rslora`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any

from openwu.errors import CheckpointError

REFUSED = (
    "use_dora",
    "fan_in_fan_out",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
"""Options of PEFT under which the folder's A and B would mean something else than `W x + scale * B (A x)`."""

KEEPS_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` that leave the base's weights as they are. PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ move
a part of each weight into A and B, so that their adapters fit the changed base only."""

CONFIG_HEADER = "lora_adapter_metadata"
"""Header of diffusers' trainers: a JSON object of `{component}.{field}` of a LoraConfig."""
ALPHAS = ("lora_alpha", "network_alpha", "alpha")
"""Header fields, bare or after a component's name, that hold alpha."""
RANKS = ("r", "rank")
OTHERS = ("use_rslora", "rank_pattern", "alpha_pattern")
KOHYA_ALPHA, KOHYA_RANK = "ss_network_alpha", "ss_network_dim"
"""kohya's training arguments; its files hold alpha in tensors, which alone count there."""


@dataclass(frozen=True)
class LoraSettings:
    """Ranks and alphas of a LoRA's modules, as one config states them."""

    rank: int | None
    """None: the config does not say; the tensors do."""
    alpha: float | None
    rslora: bool
    rank_pattern: Mapping[str, Any]
    alpha_pattern: Mapping[str, Any]
    where: str
    """The file or header, for error messages."""

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str, *, complete: bool = False) -> LoraSettings:
        """Read a `LoraConfig`; CheckpointError for options under which B A is not the update, and for wrong types.

        complete: r and lora_alpha must be there.
        """
        refused = [key for key in REFUSED if config.get(key)]
        if refused or config.get("bias", "none") != "none":
            raise CheckpointError(f"{where}: expected a plain LoRA, got one with {', '.join(refused) or 'bias'}")
        init = config.get("init_lora_weights")
        kind = init.lower() if isinstance(init, str) else init
        if not isinstance(kind, str | bool | None) or kind not in KEEPS_BASE:
            raise CheckpointError(
                f"{where}: init_lora_weights={init!r}: such an initialisation moves a part of the base's weights into "
                "A and B, so the adapter does not fit the original base; convert it to a plain LoRA with PEFT: "
                "save_pretrained(folder, path_initial_model_for_weight_conversion=FOLDER_OF_THE_INITIAL_ADAPTER)"
            )
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if not _is_rank(rank, optional=not complete) or not _is_number(alpha, optional=not complete):
            raise CheckpointError(f"{where}: expected numbers r and lora_alpha, got {rank!r} and {alpha!r}")
        ranks, alphas = (_patterns(config, field, where) for field in ("rank_pattern", "alpha_pattern"))
        return cls(rank, alpha, bool(config.get("use_rslora")), ranks, alphas, where)

    def rank_of(self, name: str) -> int | None:
        """The rank that the config states for a module; patterns fit whole names or their ends, as in PEFT."""
        rank = _match(self.rank_pattern, name, self.rank)
        if not _is_rank(rank, optional=True):
            raise CheckpointError(f"{self.where}: {name}: expected a rank above 0, got {rank!r}")
        return rank if isinstance(rank, int) else None

    def scale(self, name: str, rank: int) -> float:
        """The factor of a module's `B A`; CheckpointError where the config states another rank or no alpha."""
        stated = self.rank_of(name)
        if stated is not None and stated != rank:
            raise CheckpointError(f"{self.where}: {name}: expected rank {stated}, got tensors of rank {rank}")
        alpha = _match(self.alpha_pattern, name, self.alpha)
        if not _is_number(alpha):
            raise CheckpointError(f"{self.where}: expected numbers r and lora_alpha, got {self.rank!r} and {alpha!r}")
        return float(alpha) / (sqrt(rank) if self.rslora else rank)


def header_settings(metadata: Mapping[str, str]) -> dict[str, LoraSettings]:
    """Settings that a safetensors header states, by component ("transformer", "unet"; "" for all of the file), text
    encoders left out.

    Raises CheckpointError for statements that contradict one another or are no numbers.
    """
    stated: dict[str, dict[str, Any]] = {}

    def state(component: str, field: str, value: Any, key: str) -> None:
        known = stated.setdefault(component, {})
        if (first := known.setdefault(field, value)) is not value and first != value:
            raise CheckpointError(f"header {key}: expected {field} {known[field]!r} as stated elsewhere, got {value!r}")

    if CONFIG_HEADER in metadata:
        held = _json(metadata[CONFIG_HEADER], CONFIG_HEADER)
        if not isinstance(held, dict):
            raise CheckpointError(f"header {CONFIG_HEADER}: expected a JSON object, got {type(held).__name__}")
        for key, value in held.items():
            component, _, field = key.rpartition(".")
            state(component, field, value, f"{CONFIG_HEADER}: {key}")
    for key, text in sorted(metadata.items()):  # a header has no order
        component, _, field = key.rpartition(".")
        if field in (*ALPHAS, *RANKS, *OTHERS):
            standard = "lora_alpha" if field in ALPHAS else "r" if field in RANKS else field
            value = text.lower() == "true" if field == "use_rslora" else _json(text, key)
            if standard == "r" and isinstance(value, float) and value.is_integer():
                value = int(value)
            state(component, standard, value, key)
    denoisers = {name: fields for name, fields in stated.items() if not name.startswith("text_encoder")}
    return {component: LoraSettings.of(fields, _where(component)) for component, fields in denoisers.items()}


def kohya_scale(metadata: Mapping[str, str], rank: int) -> float | None:
    """alpha / rank as kohya's training arguments in a header state it; None where they do not, or not as a number."""
    try:
        alpha = float(metadata[KOHYA_ALPHA])
    except (KeyError, ValueError):
        return None
    return alpha / rank if isfinite(alpha) else None


def in_listed_order(stems: list[str], config: Mapping[str, Any]) -> list[str]:
    """Names of modules in the order of `target_modules`, where that lists just these."""
    listed = config.get("target_modules")
    if isinstance(listed, list) and all(isinstance(each, str) for each in listed) and set(listed) == set(stems):
        return list(dict.fromkeys(listed))
    return stems


def _where(component: str) -> str:
    return f"header of {component}" if component else "header"


def _json(text: str, key: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"header {key}: expected JSON, got {text[:80]!r}") from error


def _is_rank(value: object, *, optional: bool = False) -> bool:
    return (value is None and optional) or (isinstance(value, int) and not isinstance(value, bool) and value > 0)


def _is_number(value: object, *, optional: bool = False) -> bool:
    """Whether a value is a number that fits a float."""
    if value is None:
        return optional
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300 and value == value


def _patterns(config: Mapping[str, Any], field: str, where: str) -> Mapping[str, Any]:
    patterns = config.get(field) or {}
    try:
        for key in patterns:
            re.compile(key)
        return dict(patterns)
    except (TypeError, ValueError, re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{where}: {field}: expected pattern -> number, got {patterns!r}") from error


def _match(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that fits a name or an end of it, as PEFT finds it."""
    return next((value for key, value in patterns.items() if re.match(rf"(?:.*\.)?(?:{key})$", name)), default)

"""Files of any content: read as an adapter of finite numbers, or refused with a CheckpointError, and nothing else."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openwu.errors import CheckpointError
from openwu.types import Adapter, Target

ANY = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
STEMS = ["q", "transformer.q", "lora_unet_q", "base_model.model.q", "conv", "module.q", "q._orig_mod", "text_encoder.q"]
ENDS = ["lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight", "alpha", "lora_mid.weight", "diff_b"]
ENDS += ["lora_B.bias", "lora_A.cat.weight", "lora_B.cat.weight", "ia3_l", "lora_A", "lora_B", "gain", "dora_scale"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES += [torch.int64, torch.bool, torch.complex64, torch.uint8]
VALUES = [0.0, 1.0, -2.5, 1e-6, 6e4, 3e38, float("nan"), float("inf")]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 9), st.floats(), st.sampled_from(["", "q", "pissa", "(", "8", "LORA"])
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["q", ".*", "("]), inner)
)
MODEL = nn.ModuleDict({"q": nn.Linear(4, 6), "conv": nn.Conv2d(2, 6, 3)}).requires_grad_(False)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    """Tensors under keys that adapters have, mostly of fitting shapes."""
    found: dict[str, Tensor] = {}
    keys = st.tuples(st.sampled_from(STEMS), st.sampled_from(ENDS))
    for stem, end in draw(st.lists(keys, max_size=6)):
        shapes = {"A": [2, 4], "d": [2, 4], "B": [6, 2], "u": [6, 2], "b": [6]}
        usual = shapes.get(end.partition("_")[2][:1], [])
        shape = draw(st.one_of(st.just(usual), st.lists(st.integers(0, 4), max_size=4)))
        dtype = draw(st.sampled_from(DTYPES))
        found[f"{stem}.{end}"] = torch.full(shape, draw(st.sampled_from(VALUES)), dtype=torch.float64).to(dtype)
    return found


def check(path: Path) -> None:
    for model in (None, MODEL):
        try:
            adapter = Adapter.from_pretrained(path, model=model)
        except CheckpointError:
            continue
        assert all(bool(part.double().isfinite().all()) for part in adapter.state_dict().values())
        assert adapter.scale == adapter.scale


@ANY
@given(
    tensors(), st.dictionaries(st.sampled_from(["alpha", "rank", "transformer.r", "lora_alpha", "use_rslora"]), JSON)
)
def test_lora_files(held: dict[str, Tensor], header: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        metadata = {key: json.dumps(value) for key, value in header.items()}
        metadata["lora_adapter_metadata"] = json.dumps({f"transformer.{key}": value for key, value in header.items()})
        path = Path(folder) / "x.safetensors"
        save_file(held, path, metadata if header else None)
        check(path)


FIELDS = ["format", "version", "batch", "rank", "scale", "targets", "instructions", "peft_type", "r", "lora_alpha"]
FIELDS += ["rank_pattern", "alpha_pattern", "target_modules", "target_parameters", "lora_bias", "feedforward_modules"]
FIELDS += ["init_lora_weights", "use_rslora", "bias"]


def folders() -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """A right folder of every format with a config."""
    found: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {}
    targets = {"lora": Target("q", 4, 6), "scale": Target("q", 4, 6, operator="scale")}
    for name, (format_, operator) in {
        "openwu": ("openwu", "lora"),
        "peft": ("peft", "lora"),
        "ia3": ("peft", "scale"),
    }.items():
        target = targets[operator]
        factors = {"q": {part: torch.ones(shape) for part, shape in target.shapes(1, 2).items()}}
        with tempfile.TemporaryDirectory() as folder:
            Adapter((target,), factors, 0.5).save_pretrained(folder, format_)
            config = json.loads((Path(folder) / "adapter_config.json").read_text())
            found[name] = config, load_file(Path(folder) / "adapter_model.safetensors")
    return found


RIGHT = folders()


@ANY
@given(
    st.sampled_from(list(RIGHT)),
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3),
    st.dictionaries(st.sampled_from(["openwu", "format"]), JSON, max_size=1),
    st.one_of(st.just({}), tensors()),
)
def test_folders(kind: str, changes: dict[str, Any], header: dict[str, Any], more: dict[str, Tensor]) -> None:
    config, held = RIGHT[kind]
    with tempfile.TemporaryDirectory() as folder:
        save_file(
            held | more, Path(folder) / "adapter_model.safetensors", {k: json.dumps(v) for k, v in header.items()}
        )
        (Path(folder) / "adapter_config.json").write_text(json.dumps(config | changes))
        check(Path(folder))


@ANY
@given(st.binary(max_size=200), st.sampled_from(list(RIGHT)), st.integers(0, 400))
def test_damaged_bytes(noise: bytes, kind: str, place: int) -> None:
    config, held = RIGHT[kind]
    with tempfile.TemporaryDirectory() as name:
        weights, told = Path(name) / "adapter_model.safetensors", Path(name) / "adapter_config.json"
        save_file(held, weights)
        told.write_text(json.dumps(config))
        for file in (weights, told):
            whole = file.read_bytes()
            file.write_bytes(whole[:place] + noise + whole[place + len(noise) :])
            check(Path(name))
            file.write_bytes(whole)
        weights.write_bytes(noise)
        check(weights)

"""Outputs that a change of structure must not change: edits, generated adapters, a checkpoint round trip, exports.

`python tests/unchanged/unchanged_cases.py` writes the digests again; do that only where a byte has to change, and say
why in the commit. Digests of floating-point results hold for one kind of processor (`machine`); elsewhere the probes,
a few numbers of every result, are compared instead.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import openwu

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).with_name("unchanged.json")
EDITS = (
    ("life_by_aitzol_berasategi.jpg", "make it look like an old photograph", 1.0),
    ("bee.jpg", "remove the noise", 1.0),
    ("berlin_cathedral.jpg", "让照片更温暖", 0.5),
    ("butterfly.jpg", "make it black and white", 1.0),
    ("camels.jpg", "add fog", 1.0),
    ("calf.jpg", "turn it into a pencil drawing", 1.0),
    ("cabrillo.jpg", "blur it", 1.0),
    ("alpaca.jpg", "brighten the photo a little", 1.3),
    ("arles_amphitheater.jpg", "add film grain", 1.0),
    ("bent_pyramid.jpg", "增加对比度", 1.0),
)
"""(photograph, instruction, strength)"""


@dataclass(frozen=True)
class Output:
    """One result: bytes for the digest, and numbers for other machines."""

    name: str
    data: bytes
    probes: tuple[float, ...] = ()
    """Means over eight parts of the result; empty where the bytes do not come from floating-point arithmetic."""


def machine() -> str:
    """The kind of processor and the PyTorch version that decide floating-point results bit for bit."""
    capabilities = torch.cpu.get_capabilities()
    matrix = [name for name in ("avx512_f", "avx512_bf16", "amx_bf16") if capabilities.get(name)]
    name = capabilities.get("cpu_name", "")
    return f"torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()} {name} {' '.join(matrix)}".strip()


def outputs() -> Iterator[Output]:
    """Every output, computed in float32 on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        editor = openwu.Editor.from_pretrained(loading=openwu.LoadingOptions(dtype=torch.float32))
        yield from _edits(editor)
        adapters = [editor.adapt(_photo(name), instruction) for name, instruction, _ in EDITS[:5]]
        for (name, instruction, _), adapter in zip(EDITS, adapters, strict=False):
            tensors = adapter.state_dict()
            joined = torch.cat([tensors[key].flatten() for key in sorted(tensors)])
            yield Output(f"adapter {name} {instruction}", _bytes(tensors), _means(joined))
        with tempfile.TemporaryDirectory() as folder:
            yield from _checkpoint(Path(folder))
            yield from _exports(Path(folder))
    finally:
        torch.set_num_threads(threads)


def _edits(editor: openwu.Editor) -> Iterator[Output]:
    for name, instruction, strength in EDITS:
        result = editor.edit(_photo(name), instruction, strength=strength, seed=3)
        pixels = np.asarray(result.image)
        yield Output(f"edit {name} {instruction}", pixels.tobytes(), _means(torch.from_numpy(pixels.copy()).float()))


def _checkpoint(folder: Path) -> Iterator[Output]:
    """The golden generator, loaded and saved: config and weights must keep the released names."""
    source = ROOT / "tests" / "golden"
    from safetensors.torch import load_file, save_file

    stored = load_file(source / "generator_experts.safetensors")
    weights = {key.removeprefix("weights/"): value for key, value in stored.items() if key.startswith("weights/")}
    (folder / "in").mkdir()
    save_file(weights, folder / "in" / "model.safetensors", metadata={"format": "pt"})
    (folder / "in" / "config.json").write_bytes((source / "generator_experts.config.json").read_bytes())
    generator = openwu.ParameterGenerator.from_pretrained(folder / "in")
    generator.save_pretrained(folder / "out")
    for file in sorted((folder / "out").iterdir()):
        yield Output(f"checkpoint {file.name}", file.read_bytes())
    with torch.no_grad():
        adapter = generator(openwu.Condition(stored["condition"]))
    tensors = adapter.state_dict()
    yield Output("checkpoint adapter", _bytes(tensors), _means(torch.cat([v.flatten() for v in tensors.values()])))


def _exports(folder: Path) -> Iterator[Output]:
    """Every format, of numbers that no arithmetic made."""
    draw = np.random.default_rng(0)
    targets = (openwu.Target("blocks.0.qkv", 12, 8), openwu.Target("blocks.1.out", 6, 10))
    adapter = openwu.Adapter.from_pairs(
        targets,
        {t.name: tuple(_drawn(draw, shape) for shape in t.shapes(1, 4).values()) for t in targets},  # type: ignore[misc]
        scale=0.5,
        instructions=(("make it warmer",),),
    )
    for style in ("openwu", "peft", "diffusers", "comfyui"):
        adapter.save_pretrained(folder / style, format=style)
        for file in sorted((folder / style).iterdir()):
            yield Output(f"export {style} {file.name}", file.read_bytes())


def _photo(name: str) -> Image.Image:
    """A small RGB picture by nearest-neighbour sampling: no resampling arithmetic of Pillow's takes part."""
    with Image.open(ROOT / "photos" / name) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    step = max(1, max(pixels.shape[:2]) // 200)
    return Image.fromarray(np.ascontiguousarray(pixels[::step, ::step][:160, :200]))


def _drawn(draw: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(draw.integers(-64, 64, shape).astype(np.float32) / 64)


def _bytes(tensors: dict[str, Tensor]) -> bytes:
    named = [(key, tuple(tensors[key].shape), str(tensors[key].dtype)) for key in sorted(tensors)]
    return json.dumps(named).encode() + b"".join(tensors[key].contiguous().numpy().tobytes() for key in sorted(tensors))


def _means(values: Tensor) -> tuple[float, ...]:
    flat = values.flatten().double()
    return (*(round(float(part.mean()), 6) for part in flat.chunk(8)), round(float(flat.std()), 6))


def digest(output: Output) -> str:
    return hashlib.sha256(output.data).hexdigest()


def main() -> None:
    found = {each.name: {"sha256": digest(each), "probes": each.probes} for each in outputs()}
    lines = ",\n".join(f"  {json.dumps(k, ensure_ascii=False)}: {json.dumps(v)}" for k, v in found.items())
    record = f'{{\n "machine": {json.dumps(machine())},\n "outputs": {{\n{lines}\n }}\n}}\n'
    RECORD.write_text(record, encoding="utf-8")


if __name__ == "__main__":
    main()

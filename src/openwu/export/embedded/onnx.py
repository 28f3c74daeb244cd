"""Export the embedded model as ONNX, check the graphs against PyTorch, and write a static page that runs them.

    written = write_page(base, generator, Path("site"), runtime=Path("node_modules/onnxruntime-web/dist"))

The folder holds everything that the page loads: the graphs, the rules for instructions, the page's own files, and
onnxruntime-web's where it is given. Any static host serves it.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from openwu.backbones.embedded.base import EmbeddedBase
from openwu.backbones.embedded.catalogue import known_edits
from openwu.backbones.embedded.condition import CONDITION_SIDE
from openwu.backbones.embedded.sentence import SentenceConfig
from openwu.errors import ExportError
from openwu.export.embedded.graphs import AdapterGraph, EditGraph, SentenceGraph, WordsGraph, factors_of
from openwu.export.embedded.rules import rules
from openwu.export.embedded.tiles import CORE, MARGIN, WHOLE
from openwu.extras import library
from openwu.files.writing import atomic_set
from openwu.generator.model import ParameterGenerator

OPSET = 20
PAGE = Path(__file__).parent / "page"
RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
"""What the page loads of onnxruntime-web's folder `dist`."""
TOLERANCE = 1e-3
"""Largest difference of a graph's output from PyTorch's in float32, relative to the output's largest number."""
MOST_PHRASES = 8192
"""Phrases of a sentence that the graph takes at most; an instruction of 500 characters has fewer."""
MOST_CELLS = 64
"""Largest side of a pass through the base, in cells."""
HALVED_FROM = 1024
"""Weights of at least so many numbers are stored in float16, where that is exact."""


@dataclass(frozen=True)
class Graph:
    """One graph: what is exported, with example inputs by name and the names of its outputs."""

    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    sizes: Mapping[str, Mapping[int, Any]]
    """Input -> axis -> the symbol that stands for its size."""
    outputs: tuple[str, ...]

    def arguments(self, inputs: Mapping[str, Tensor]) -> tuple[Any, ...]:
        """Return inputs as the module takes them: factors, whose names have a dot, as one list at the end."""
        plain = [part for name, part in inputs.items() if "." not in name]
        factors = [part for name, part in inputs.items() if "." in name]
        return (*plain, factors) if factors else tuple(plain)


@dataclass(frozen=True)
class Written:
    """What was written, and how far the graphs are from PyTorch."""

    bytes_to_load: int
    """Of all files together."""
    differences: Mapping[str, float]
    """Graph -> largest relative difference; empty where nothing was compared."""


@torch.no_grad()
def write_page(
    base: EmbeddedBase, generator: ParameterGenerator, output: Path, *, runtime: Path | None = None, check: bool = True
) -> Written:
    """Write graphs, rules and page into the folder `output`; nothing is left of an export that fails.

    `runtime`: the folder `dist` of onnxruntime-web, whose files are copied; None leaves them out, for users of the
    graphs alone. Both parts of the model must be in float32.
    Raises ExportError where a graph differs from PyTorch or the runtime's files are missing, OpenwuError without the
    packages of the extra `onnx`.
    """
    onnx = library("onnx", "onnx")
    library("onnxscript", "onnx")
    missing = [name for name in RUNTIME_FILES if runtime and not (runtime / name).is_file()]
    if runtime and missing:
        raise ExportError(
            f"{runtime}: expected onnxruntime-web's folder dist with {', '.join(missing)}; run "
            "`npm install onnxruntime-web` and name node_modules/onnxruntime-web/dist"
        )
    differences: dict[str, float] = {}
    with atomic_set(output, "index.html") as draft:
        for graph in graphs_of(base, generator):
            path = draft / f"{graph.name}.onnx"
            onnx.save(halved(onnx, exported(graph)), path)
            if check:
                differences[graph.name] = difference(graph, path)
        for file in sorted(PAGE.iterdir()):
            shutil.copyfile(file, draft / file.name)
        for name in RUNTIME_FILES if runtime else ():
            shutil.copyfile(Path(runtime or "") / name, draft / name)
        _write(draft / "rules.json", rules())
        graphs = sum(path.stat().st_size for path in draft.glob("*.onnx"))
        _write(draft / "model.json", description(base) | {"bytes": graphs})
        total = sum(path.stat().st_size for path in draft.iterdir())
    return Written(total, differences)


def graphs_of(base: EmbeddedBase, generator: ParameterGenerator) -> Iterator[Graph]:
    """The graphs of a base and its generator, both in float32; that of the sentence reader where the base has one."""
    sizes = base.config
    if any(part.dtype != torch.float32 for module in (base.network, generator) for part in module.parameters()):
        raise ExportError("model: expected float32; load it with LoadingOptions(dtype=torch.float32)")
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(1, sizes.instruction.buckets, (1, 5, 12), generator=draw)
    phrases = torch.randint(1, sizes.instruction.phrase_buckets, (1, 40), generator=draw)
    words, grams = (
        Dim("words", min=1, max=sizes.instruction.max_words),
        Dim("grams", min=1, max=sizes.instruction.max_grams),
    )
    yield Graph(
        "words",
        WordsGraph(base.instruction).eval(),
        {"rows": rows, "phrases": phrases},
        {"rows": {1: words, 2: grams}, "phrases": {1: Dim("phrases", min=1, max=MOST_PHRASES)}},
        ("tokens", "edits", "degrees"),
    )
    if base.sentences is not None:
        own = base.sentences.config
        grams = Dim("grams", min=1, max=own.max_grams)
        yield Graph(
            "sentence",
            SentenceGraph(base.sentences).eval(),
            {"rows": torch.randint(1, own.buckets, (1, 5, 12), generator=draw)},
            {"rows": {1: Dim("words", min=1, max=own.max_words), 2: grams}},
            ("places",),
        )
    tokens = torch.randn(1, sizes.instruction.num_tokens, sizes.instruction.width, generator=draw)
    side = {"min": sizes.condition.detail, "max": 4 * CONDITION_SIDE}
    request = {
        "picture": torch.rand(1, 3, 200, 312, generator=draw),
        "tokens": tokens,
        "reference": torch.rand(1, 3, 120, 99, generator=draw),
        "present": torch.tensor([True]),
    }
    encoder = AdapterGraph(base.condition_encoder, generator).eval()
    factors = dict(factors_of(generator(base.condition_encoder(*request.values()))))
    yield Graph(
        "adapter",
        encoder,
        request,
        {
            "picture": {2: Dim("height", **side), 3: Dim("width", **side)},
            "reference": {2: Dim("reference_height", **side), 3: Dim("reference_width", **side)},
        },
        tuple(factors),
    )
    cell = sizes.backbone.cell
    shape = (1, 3, 2 * cell, 3 * cell)
    cells = {2: cell * Dim("rows", min=1, max=MOST_CELLS), 3: cell * Dim("columns", min=1, max=MOST_CELLS)}
    yield Graph(
        "edit",
        EditGraph(base.network, generator.targets, generator.config.rank, generator.scale).eval(),
        {
            "picture": torch.rand(shape, generator=draw),
            "planes": torch.randn(shape, generator=draw),
            "tokens": tokens,
            "strength": torch.tensor([0.8]),
            **factors,
        },
        {"picture": cells, "planes": cells},
        ("edited",),
    )


def exported(graph: Graph) -> Any:
    """Return a graph as an `onnx.ModelProto` with the graph's own names of inputs and outputs."""
    symbols = {name: dict(graph.sizes.get(name, {})) for name in graph.inputs}
    with _quiet():
        program = torch.export.export(
            graph.module, graph.arguments(graph.inputs), dynamic_shapes=_nested(symbols), strict=False
        )
        made = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False, optimize=True)
    assert made is not None
    model = made.model
    for value, name in zip(model.graph.inputs, graph.inputs, strict=True):
        value.name = name
    for value, name in zip(model.graph.outputs, graph.outputs, strict=True):
        value.name = name
    return made.model_proto


def halved(onnx: Any, model: Any) -> Any:
    """Store float32 weights in float16 where that loses nothing, with a cast in front of their use."""
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        values = onnx.numpy_helper.to_array(tensor)
        if values.size < HALVED_FROM or np.abs(values).max() > np.finfo(np.float16).max:
            continue
        half = values.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), values):
            continue
        name = tensor.name
        tensor.CopyFrom(onnx.numpy_helper.from_array(half, f"{name}.float16"))
        casts.append(onnx.helper.make_node("Cast", [tensor.name], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def difference(graph: Graph, path: Path) -> float:
    """Return how far onnxruntime's outputs are from PyTorch's, relative to the largest number of each output.

    Raises ExportError above TOLERANCE.
    """
    runtime = library("onnxruntime", "onnx")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = {name: part.numpy() for name, part in graph.inputs.items()}
    answers = dict(zip(graph.outputs, session.run(list(graph.outputs), given), strict=True))
    expected = graph.module(*graph.arguments(graph.inputs))
    parts = [expected] if isinstance(expected, Tensor) else list(expected)
    worst = 0.0
    for name, part in zip(graph.outputs, parts, strict=True):
        found = float((torch.from_numpy(answers[name]) - part).abs().max() / part.abs().max().clamp(min=1e-6))
        if not found <= TOLERANCE:
            raise ExportError(
                f"{graph.name}: {name} differs from PyTorch's by {found:.1e} of its largest number, more than "
                f"{TOLERANCE}; report it with the versions of torch, onnxscript and onnxruntime"
            )
        worst = max(worst, found)
    return worst


def description(base: EmbeddedBase) -> dict[str, object]:
    """Return what the page must know of a model beside its graphs: sizes, labels, threshold and known edits."""
    words = base.config.instruction
    edits = {
        name: dict(each.examples) | {"reference": each.reference, "withdrawn": name in words.withdrawn}
        for name, each in known_edits().items()
        if name in words.labels
    }
    return {
        "instruction": {
            "labels": list(words.labels),
            "buckets": words.buckets,
            "max_words": words.max_words,
            "max_grams": words.max_grams,
            "phrase_buckets": words.phrase_buckets,
        },
        "sentence": None if base.sentences is None else _sizes(base.sentences.config),
        "accepted": words.accepted,
        "condition_side": CONDITION_SIDE,
        "tiles": {"whole": WHOLE, "core": CORE, "margin": MARGIN, "cell": base.config.backbone.cell},
        "edits": edits,
    }


def _sizes(config: SentenceConfig) -> dict[str, int]:
    """What the page must know to look a sentence up in the sentence reader's table."""
    return {name: getattr(config, name) for name in ("buckets", "max_words", "max_grams")}


def _nested(symbols: Mapping[str, Mapping[int, Any]]) -> tuple[Any, ...]:
    """Sizes in the structure of `Graph.arguments`."""
    plain = [sizes for name, sizes in symbols.items() if "." not in name]
    factors = [sizes for name, sizes in symbols.items() if "." in name]
    return (*plain, factors) if factors else tuple(plain)


def _write(path: Path, values: Mapping[str, object]) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence for what the exporter says about itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

"""The graphs before any export: they compute what the model computes, and what cannot be written is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from openwu import Editor
from openwu.adapters.merge import merged_copy, merged_weights
from openwu.backbones.embedded.base import EmbeddedBase
from openwu.backbones.embedded.instruction import DEGREES, hash_phrases, hash_words
from openwu.errors import ExportError
from openwu.export.embedded import onnx as exporting
from openwu.kernels.rotary import apply_rotary, apply_rotary_real
from openwu.types import LoadingOptions


@pytest.fixture(scope="module")
def editor() -> Editor:
    return Editor.from_pretrained(loading=LoadingOptions(dtype=torch.float32))


def graphs(editor: Editor) -> dict[str, exporting.Graph]:
    assert isinstance(editor.backbone, EmbeddedBase)
    with torch.no_grad():
        return {graph.name: graph for graph in exporting.graphs_of(editor.backbone, editor.generator)}


@torch.no_grad()
@pytest.mark.parametrize("sentence", ["make it a bit brighter", "变成黑白", "make me a sandwich"])
def test_words_are_read_by_both_readers(editor: Editor, sentence: str) -> None:
    graph = graphs(editor)["words"]
    encoder = editor.backbone.instruction  # type: ignore[attr-defined]
    rows = {
        "rows": hash_words([sentence], encoder.config),
        "phrases": hash_phrases([sentence], encoder.config),
    }
    tokens, edits, degrees = graph.module(*graph.arguments(rows))
    assert torch.allclose(tokens, encoder([sentence]), atol=1e-5)
    (reading,) = encoder.readings([sentence])
    assert encoder.config.labels[int(edits.argmax())] == reading.edit
    assert DEGREES[int(degrees.argmax())] == reading.degree
    assert float(edits.max()) == pytest.approx(reading.probability, abs=1e-5)
    silent = encoder.log_probabilities(encoder.read_words([sentence])).exp()  # the first reader alone
    assert not torch.allclose(edits, silent, atol=1e-5)


@torch.no_grad()
def test_the_edit_has_the_adapter_as_an_input(editor: Editor) -> None:
    made = graphs(editor)
    edit = made["edit"]
    assert set(made["adapter"].outputs) <= set(edit.inputs)
    picture, planes, tokens, strength, *_ = edit.inputs.values()
    request = made["adapter"].inputs
    encoder = editor.backbone.condition_encoder  # type: ignore[attr-defined]
    adapter = editor.generator(encoder(*request.values())).scaled(strength)
    expected = merged_copy(editor.backbone.denoiser, adapter)(picture, planes, tokens)
    found = edit.module(*edit.arguments(edit.inputs))
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, editor.backbone.denoiser(picture, planes, tokens), atol=1e-2)


@torch.no_grad()
def test_merged_weights_are_those_of_a_merged_copy(editor: Editor) -> None:
    request = graphs(editor)["adapter"].inputs
    adapter = editor.generator(editor.backbone.condition_encoder(*request.values()))  # type: ignore[attr-defined]
    merged = merged_copy(editor.backbone.denoiser, adapter).state_dict()
    weights = merged_weights(editor.backbone.denoiser, adapter)
    assert weights.keys() == {f"{target.name}.weight" for target in adapter.targets}
    assert all(torch.equal(weight, merged[name]) for name, weight in weights.items())


def test_the_real_rotation_is_the_complex_one() -> None:
    x, angles = torch.randn(2, 5, 3, 8), torch.randn(5, 1, 4)
    found = apply_rotary_real(x, angles.cos(), angles.sin())
    assert torch.allclose(found, apply_rotary(x, torch.complex(angles.cos(), angles.sin())), atol=1e-6)


def test_weights_are_halved_only_where_that_is_exact() -> None:
    onnx = pytest.importorskip("onnx")
    exact, other = torch.randn(64, 64).half().float(), torch.randn(64, 64)
    tensors = [onnx.numpy_helper.from_array(part.numpy(), name) for name, part in (("exact", exact), ("other", other))]
    nodes = [onnx.helper.make_node("Add", ["exact", "other"], ["sum"])]
    value = onnx.helper.make_tensor_value_info("sum", onnx.TensorProto.FLOAT, [64, 64])
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [value], tensors))
    halved = exporting.halved(onnx, model)
    kinds = {each.name: each.data_type for each in halved.graph.initializer}
    assert kinds == {"exact.float16": onnx.TensorProto.FLOAT16, "other": onnx.TensorProto.FLOAT}
    onnx.checker.check_model(halved)
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(halved.SerializeToString(), providers=["CPUExecutionProvider"])
    assert torch.equal(torch.from_numpy(session.run(None, {})[0]), exact + other)


def test_what_cannot_be_written_is_refused(editor: Editor, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    assert isinstance(editor.backbone, EmbeddedBase)
    with pytest.raises(ExportError, match=r"expected onnxruntime-web's folder dist with ort\.wasm\.min\.mjs"):
        exporting.write_page(editor.backbone, editor.generator, tmp_path / "site", runtime=tmp_path)
    sixteen = Editor.from_pretrained(loading=LoadingOptions(dtype=torch.bfloat16))
    assert isinstance(sixteen.backbone, EmbeddedBase)
    with pytest.raises(ExportError, match="expected float32"):
        exporting.write_page(sixteen.backbone, sixteen.generator, tmp_path / "site")
    assert not list(tmp_path.iterdir())

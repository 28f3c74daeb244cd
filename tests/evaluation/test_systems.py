"""Editors to compare with, each in its request format, against a server that misbehaves; folders; pipelines."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from stub_server import Reply, error, ok, picture, serving

from openwu.editor.editor import Editor
from openwu.errors import OpenwuError
from openwu.evaluation.cases import Case
from openwu.evaluation.http import Endpoint, EndpointError
from openwu.evaluation.stages.record import DONE, FAILED, REFUSED, RunFolder
from openwu.evaluation.stages.run import plan_run, run_plan
from openwu.evaluation.systems import MissingError, System, SystemOptions
from openwu.evaluation.systems.folder import OutputsFolder
from openwu.evaluation.systems.gemini import Gemini
from openwu.evaluation.systems.local import DiffusersPipeline
from openwu.evaluation.systems.openai_images import OpenAIImages
from openwu.evaluation.systems.own import EditorSystem
from openwu.evaluation.systems.restorers import Restorer
from openwu.evaluation.systems.seedream import Seedream
from openwu.registry import SYSTEMS, resolve

SOURCE = torch.full((3, 12, 16), 0.4)
ONE = Case("add", "add a hat", (SOURCE,), key="k1", language="en")
TWO = Case("add", "take its colours", (SOURCE, SOURCE), key="k2", language="en")


def openai(data: object) -> Reply:
    return ok({"data": [{"b64_json": data}]})


def gemini(*parts: object, **more: object) -> Reply:
    return ok({"candidates": [{"content": {"parts": list(parts)}, **more}]})


def inline(data: str) -> dict[str, object]:
    return {"inlineData": {"mimeType": "image/png", "data": data}}


KINDS: dict[str, tuple[type[Any], Reply, str]] = {
    "openai": (OpenAIImages, openai(picture(9, 7)), "/v1/images/edits"),
    "gemini": (Gemini, gemini({"text": "here"}, inline(picture(9, 7))), "/v1/models/m:generateContent"),
    "seedream": (Seedream, openai(picture(9, 7)), "/v1/images/generations"),
}
CUT = base64.b64encode(base64.b64decode(picture(64, 64))[:60]).decode()
BAD = {
    "openai": [
        *(openai(data) for data in ("", None, "!!!", CUT, base64.b64encode(b"text").decode())),
        ok({"data": []}),
        ok({"data": [{"b64_json": picture()}] * 2}),
        ok({}),
        ok({"data": [{"url": "http://x"}]}),
    ],
    "gemini": [
        gemini(),
        gemini({"text": "I drew it"}),
        gemini(inline(picture()), inline(picture())),
        gemini(inline(CUT)),
        ok({}),
        ok({"candidates": []}),
        ok({"candidates": [{"content": None}]}),
    ],
    "seedream": [openai(""), openai(CUT), ok({"data": [{"b64_json": picture()}] * 2}), ok({"data": None})],
}
DECLINED = {
    "openai": [error(400, "moderation_blocked")],
    "gemini": [ok({"promptFeedback": {"blockReason": "SAFETY"}}), gemini(finishReason="IMAGE_SAFETY")],
    "seedream": [error(400, "InputTextSensitiveContentDetected")],
}


def made(kind: str, url: str) -> System:
    endpoint = Endpoint(url, sleep=lambda _: None)
    system: System = KINDS[kind][0]("theirs", "m", endpoint)
    return system


@pytest.mark.parametrize("kind", KINDS)
def test_each_request_format_sends_pictures_and_instruction_and_reads_one_picture(kind: str) -> None:
    _, reply, path = KINDS[kind]
    with serving(lambda *_: reply) as stub:
        assert made(kind, stub.url).edit(ONE).size == (9, 7)
        assert made(kind, stub.url).edit(TWO).size == (9, 7)
    assert [call[0] for call in stub.calls] == [path, path]
    assert b"add a hat" in stub.calls[0][2]
    pictures = [body.count(b"iVBOR") + body.count(b"\x89PNG") for _, _, body in stub.calls]
    assert pictures == [1, 2]
    if kind == "openai":
        assert stub.calls[1][2].count(b'name="image[]"') == 2
    else:
        json.loads(stub.calls[1][2])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_picture_fails_and_what_is_declined_is_refused(kind: str, tmp_path: Path) -> None:
    replies = [*BAD[kind], *DECLINED[kind], error(500, "x"), (0, {}, b""), KINDS[kind][1]]
    for number, reply in enumerate(replies):
        record = RunFolder(tmp_path / str(number))
        record.begin("b", [ONE])
        with serving(lambda *_, reply=reply: reply) as stub:
            system = made(kind, stub.url)
            counts = run_plan(record, plan_run(record, [ONE], system), system)
        expected = DONE if reply is KINDS[kind][1] else REFUSED if reply in DECLINED[kind] else FAILED
        assert counts == {expected: 1}, (reply, record.outputs())


def test_every_named_system_exists_and_needs_its_key_before_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("OPENAI_API_KEY", "GEMINI_API_KEY", "ARK_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    for name, where in SYSTEMS.items():
        options = SystemOptions(name, url="https://example.org/v1" if name == "openai-compatible" else None)
        system = resolve(where)(options)
        assert system.name == name
        if isinstance(system, DiffusersPipeline | Restorer):
            continue
        assert system.is_paid
        if name != "openai-compatible":
            with pytest.raises(EndpointError, match="environment variable"):
                system.check()
    with pytest.raises(OpenwuError, match="--endpoint"):
        resolve(SYSTEMS["openai-compatible"])(SystemOptions("x"))
    assert not OpenAIImages("x", "m", Endpoint("http://localhost:1/v1")).is_paid


def test_a_folder_is_found_in_any_usual_layout(tmp_path: Path) -> None:
    with pytest.raises(OpenwuError, match="--outputs: expected a folder"):
        OutputsFolder(tmp_path / "none")
    chinese = Case("add", "x", (SOURCE,), key="cn/k7", language="zh")
    for name, case in (
        ("k1.jpg", ONE),
        ("fullset/add/cn/k7.png", chinese),
        ("cn/k7.webp", chinese),
    ):
        file = tmp_path / name.replace("/", "-") / name
        file.parent.mkdir(parents=True)
        Image.new("RGB", (5, 4)).save(file)
        system = OutputsFolder(tmp_path / name.replace("/", "-"))
        assert system.edit(case).size == (5, 4)
        with pytest.raises(MissingError, match="found none"):
            system.edit(Case("add", "x", (SOURCE,), key="other", language="en"))


def test_our_editor_edits_as_the_editor_does_and_refuses_what_it_refuses(editor: Editor, tmp_path: Path) -> None:
    system = EditorSystem(editor)
    case = Case("brighten", "make it brighter", (torch.rand(3, 20, 24),), key="a", language="en")
    once, again = system.edit(case), system.edit(case)
    assert once.tobytes() == again.tobytes()
    alone = EditorSystem(editor, adapter=False).edit(case)
    silent = editor.adapt(case.image(0), case.instruction).scaled(0.0)
    seed = zlib.crc32(case.key.encode())
    expected = editor.edit(case.image(0), case.instruction, adapter=silent, seed=seed).image
    assert alone.tobytes() == expected.tobytes()
    assert alone.tobytes() not in (once.tobytes(), case.image(0).tobytes())
    assert system.edit(case).tobytes() == once.tobytes(), "the editor itself still writes adapters"
    assert EditorSystem(editor, adapter=False).identity() != system.identity()
    record = RunFolder(tmp_path)
    empty = Case("brighten", "  ", (torch.rand(3, 20, 24),), key="b", language="en")
    record.begin("b", [empty])
    assert run_plan(record, plan_run(record, [empty], system), system) == {REFUSED: 1}


@pytest.mark.slow
def test_a_pipeline_is_called_with_its_makers_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    calls: list[dict[str, Any]] = []

    class Pipeline:
        def __call__(self, **arguments: Any) -> Any:
            calls.append(arguments)
            return type("Made", (), {"images": [Image.new("RGB", (5, 5))]})

    for name in ("qwen-image-edit-2511", "flux-kontext"):
        system = resolve(SYSTEMS[name])(SystemOptions(name, steps=3))
        monkeypatch.setitem(system.__dict__, "pipeline", Pipeline())
        system.edit(ONE)
    assert calls[0]["num_inference_steps"] == calls[1]["num_inference_steps"] == 3
    assert calls[0]["true_cfg_scale"] == 4.0
    assert calls[1]["guidance_scale"] == 2.5
    assert calls[0]["generator"].initial_seed() == calls[1]["generator"].initial_seed()
    with pytest.raises(OpenwuError, match="expected one picture, got 2"):
        system.edit(TWO)
    with pytest.raises(OpenwuError, match="expected a diffusers pipeline"):
        DiffusersPipeline(SystemOptions("x"), str(Path(__file__).parent)).check()

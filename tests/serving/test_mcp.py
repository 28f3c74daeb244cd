"""The tools for agents, through the official client in this process."""

from __future__ import annotations

import asyncio
import base64
import io
import zipfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serving_clients import PROMPT, png

from openwu.editor.editor import Editor
from openwu.images import read_picture
from openwu.serving.engines.local import LocalEngine
from openwu.serving.state import Service, Settings

mcp = pytest.importorskip("mcp")


def with_client(editor: Editor, folder: Path, work: Callable[[Any], Awaitable[None]]) -> None:
    """Run `work(client)` against a server that may use `folder`."""
    from openwu.serving.mcp.files import make_server

    async def run() -> None:
        server = make_server(Service(LocalEngine(lambda: editor), Settings()), [folder])
        async with mcp.Client(server) as client:
            await work(client)

    asyncio.run(run())


def test_an_agent_edits_a_photo_and_gets_a_small_preview(editor: Editor, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(png(700, 400))
    heard: list[float] = []

    async def progress(done: float, total: float | None, message: str | None) -> None:
        heard.append(done)

    async def work(client: Any) -> None:
        tools = {tool.name for tool in (await client.list_tools()).tools}
        assert tools == {"edit_photo", "list_edits", "understand", "make_adapter"}
        arguments = {"photo": str(tmp_path / "photo.png"), "instruction": PROMPT, "seed": 3}
        answer = await client.call_tool("edit_photo", arguments, progress_callback=progress)
        assert not answer.is_error, answer.content
        shown = Image.open(io.BytesIO(base64.b64decode(answer.content[1].data)))
        assert (shown.format, max(shown.size)) == ("JPEG", 512)
        assert answer.structured_content["output"] == str(tmp_path / "photo.edited.png")
        again = await client.call_tool("edit_photo", arguments)
        assert again.is_error
        assert "overwrite" in again.content[0].text

    with_client(editor, tmp_path, work)
    expected = editor.edit([read_picture(png(700, 400))], PROMPT, seed=3).photo.pixels
    assert np.array_equal(np.asarray(Image.open(io.BytesIO((tmp_path / "photo.edited.png").read_bytes()))), expected)
    assert heard == sorted(heard)
    assert heard[-1] == 1.0


def test_errors_tell_an_agent_what_to_do_and_nothing_outside_the_folders_is_touched(
    editor: Editor, tmp_path: Path
) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    for folder in (inside, outside):
        (folder / "photo.png").write_bytes(png())
    (inside / "link.png").symlink_to(outside / "photo.png")
    (inside / "text.png").write_text("no picture")
    photo = str(inside / "photo.png")

    async def work(client: Any) -> None:
        async def refusal(**arguments: Any) -> str:
            answer = await client.call_tool("edit_photo", {"photo": photo, "instruction": PROMPT, **arguments})
            assert answer.is_error
            return str(answer.content[0].text)

        for path in (outside / "photo.png", inside / "link.png", inside / ".." / "out" / "photo.png"):
            assert "allowed folders" in await refusal(photo=str(path))
        assert "allowed folders" in await refusal(output=str(outside / "new.png"))
        assert "no such file" in await refusal(photo=str(inside / "none.png"))
        assert "ends with" in await refusal(output=str(inside / "new.exe"))
        assert "another path" in await refusal(output=photo, overwrite=True)
        assert "strength" in await refusal(strength=99)
        assert "image" in await refusal(photo=str(inside / "text.png"))
        assert "list_edits" in await refusal(instruction="write me a poem about tax law")

    with_client(editor, inside, work)
    assert sorted(path.name for path in inside.iterdir()) == ["link.png", "photo.png", "text.png"]
    assert [path.name for path in outside.iterdir()] == ["photo.png"]


def test_an_agent_asks_what_is_known_and_takes_an_adapter_away(editor: Editor, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(png())
    target = tmp_path / "adapter.zip"

    async def work(client: Any) -> None:
        listed = (await client.call_tool("list_edits", {"query": "fog", "limit": 3})).structured_content
        assert len(listed["edits"]) == 3
        known = (await client.call_tool("understand", {"instruction": PROMPT})).structured_content
        assert known["known"]
        unknown = (
            await client.call_tool("understand", {"instruction": "write me a poem about tax law"})
        ).structured_content
        assert not unknown["known"]
        assert unknown["nearest"]
        arguments = {
            "photo": str(tmp_path / "photo.png"),
            "instruction": PROMPT,
            "output": str(target),
            "format": "peft",
        }
        answer = await client.call_tool("make_adapter", arguments)
        assert not answer.is_error, answer.content

    with_client(editor, tmp_path, work)
    assert any(name.endswith("adapter_model.safetensors") for name in zipfile.ZipFile(target).namelist())


def test_an_example_gives_an_adapter_for_a_whole_series(editor: Editor, tmp_path: Path) -> None:
    before = Image.open(io.BytesIO(png(128, 96)))
    before.save(tmp_path / "before.png")
    before.point([min(255, value + 40) for value in range(256)] * 3).save(tmp_path / "after.png")
    pair = {f"example_{name}": str(tmp_path / f"{name}.png") for name in ("before", "after")}

    async def work(client: Any) -> None:
        async def make(name: str, **arguments: Any) -> Any:
            return await client.call_tool("make_adapter", {"output": str(tmp_path / f"{name}.zip"), **arguments})

        found = (await make("series", **pair)).structured_content
        assert found["example"]["reproduced"] > 0.5
        assert (await make("one", photo=pair["example_before"], **pair)).structured_content["edit"] is None
        nonsense = {**pair, "example_after": pair["example_before"]}
        for refused, words in (
            (await make("none", instruction=PROMPT), "image"),
            (await make("half", example_before=pair["example_before"]), "example_after"),
            (await make("format", format="zip", **pair), "comfyui"),
            (await make("same", **nonsense), "example"),
        ):
            assert refused.is_error
            assert words in refused.content[0].text

    with_client(editor, tmp_path, work)
    archives = sorted(path.name for path in tmp_path.glob("*.zip"))
    assert archives == ["one.zip", "series.zip"]
    assert zipfile.ZipFile(tmp_path / "series.zip").namelist()

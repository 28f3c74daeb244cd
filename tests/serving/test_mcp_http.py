"""The tools for agents over HTTP, through the official client and a real connection."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import httpx2
import numpy as np
import pytest
from PIL import Image
from serving_clients import PROMPT, SleepingEngine, listening, png, png_url

from openwu.editor.editor import Editor
from openwu.images import read_picture
from openwu.serving.access import new_key
from openwu.serving.app import create_app
from openwu.serving.engines.local import LocalEngine
from openwu.serving.state import Settings

mcp = pytest.importorskip("mcp")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    path = tmp_path_factory.mktemp("agents") / "keys"
    return path, {name: new_key(path, name) for name in ("ann", "bob")}


@pytest.fixture(scope="module")
def site(editor: Editor, keys: tuple[Path, dict[str, str]]) -> Iterator[str]:
    with listening(create_app(LocalEngine(lambda: editor), Settings(keys=keys[0], agents=True))) as url:
        yield url


def with_client(url: str, key: str, work: Callable[[Any], Awaitable[None]]) -> None:
    """Run `work(client)` with an agent's client under an API key."""

    async def run() -> None:
        headers = {"authorization": f"Bearer {key}"}
        async with httpx2.AsyncClient(headers=headers, timeout=300) as http:
            transport = mcp.client.streamable_http.streamable_http_client(f"{url}/mcp", http_client=http)
            async with mcp.Client(transport) as client:
                await work(client)

    asyncio.run(run())


def test_an_agent_uploads_edits_and_downloads(site: str, keys: tuple[Path, dict[str, str]], editor: Editor) -> None:
    photo = png(700, 400)
    heard: list[float] = []

    async def progress(done: float, total: float | None, message: str | None) -> None:
        heard.append(done)

    async def work(client: Any) -> None:
        tools = {tool.name for tool in (await client.list_tools()).tools}
        assert tools == {"upload_link", "edit_image", "compare", "list_edits", "understand"}
        link = (await client.call_tool("upload_link", {})).structured_content
        assert httpx.put(link["url"], content=photo, timeout=300).status_code == 201
        assert httpx.put(link["url"], content=photo, timeout=300).status_code == 404  # once only
        assert httpx.put(link["url"], content=b"no picture", timeout=300).status_code == 404  # the id comes first
        arguments = {"image": link["image"], "instruction": PROMPT, "seed": 3}
        answer = await client.call_tool("edit_image", arguments, progress_callback=progress)
        assert not answer.is_error, answer.content
        shown = Image.open(io.BytesIO(base64.b64decode(answer.content[1].data)))
        assert (shown.format, max(shown.size)) == ("JPEG", 512)
        about = answer.structured_content
        assert about["url"] == answer.content[2].uri
        assert (about["width"], about["height"], about["edit"]) == (700, 400, "brighten")
        whole = Image.open(io.BytesIO(httpx.get(about["url"], timeout=300).content))
        expected = editor.edit([read_picture(photo)], PROMPT, seed=3).photo.pixels
        assert np.array_equal(np.asarray(whole), expected)

    with_client(site, keys[1]["ann"], work)
    assert heard == sorted(heard)
    assert heard[-1] == 1.0


def test_an_agent_compares_and_asks_what_is_known(site: str, keys: tuple[Path, dict[str, str]]) -> None:
    image = png_url(png())["image_url"]

    async def work(client: Any) -> None:
        answer = await client.call_tool("compare", {"image": image, "first": PROMPT, "second": "blur the photo"})
        assert [each["edit"] for each in answer.structured_content["results"]] == ["brighten", "blur"]
        listed = (await client.call_tool("list_edits", {"query": "fog", "limit": 3})).structured_content
        assert len(listed["edits"]) == 3
        known = (await client.call_tool("understand", {"instruction": PROMPT})).structured_content
        assert (known["known"], known["edit"]) == (True, "brighten")

    with_client(site, keys[1]["ann"], work)


def test_errors_tell_an_agent_what_to_do_and_anothers_upload_is_not_found(
    site: str, keys: tuple[Path, dict[str, str]]
) -> None:
    links: list[dict[str, Any]] = []

    async def upload(client: Any) -> None:
        links.append((await client.call_tool("upload_link", {})).structured_content)

    async def work(client: Any) -> None:
        async def refusal(**arguments: Any) -> str:
            given = {"image": png_url(png())["image_url"], "instruction": PROMPT, **arguments}
            answer = await client.call_tool("edit_image", given)
            assert answer.is_error
            return str(answer.content[0].text)

        assert "id of an upload" in await refusal(image=links[0]["image"])
        assert "id of an upload" in await refusal(image="/etc/passwd")
        assert "fetches no URLs" in await refusal(image="http://169.254.169.254/x.png")
        assert "image" in await refusal(image="data:image/png;base64,AAAA")
        assert "strength" in await refusal(strength=99)
        assert "list_edits" in await refusal(instruction="write me a poem about tax law")

    with_client(site, keys[1]["bob"], upload)
    assert httpx.put(links[0]["url"], content=png(), timeout=300).status_code == 201
    with_client(site, keys[1]["ann"], work)


def test_a_key_is_needed_and_nothing_is_there_unless_asked_for(site: str) -> None:
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    answer = httpx.post(f"{site}/mcp", json=call, timeout=300)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "missing_api_key")
    assert httpx.put(f"{site}/v1/uploads/{'0' * 32}", content=png(), timeout=300).status_code == 404
    with listening(create_app(SleepingEngine())) as url:
        assert httpx.post(f"{url}/mcp", json=call, timeout=300).status_code in (404, 405)


def test_a_call_whose_client_leaves_is_stopped() -> None:
    engine = SleepingEngine(1000.0)

    async def work(client: Any) -> None:
        call = client.call_tool("edit_image", {"image": png_url(png())["image_url"], "instruction": PROMPT})
        waiting = asyncio.ensure_future(call)
        while not engine.batches:
            await asyncio.sleep(0.05)
        waiting.cancel()
        async with asyncio.timeout(120):
            while not engine.stopped:
                await asyncio.sleep(0.05)

    with listening(create_app(engine, Settings(agents=True))) as url:
        with_client(url, "none", work)
    assert engine.stopped == [engine.batches[0][0].id]

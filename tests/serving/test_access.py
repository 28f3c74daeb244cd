"""Keys, foreign pages, tenants, bounded stores, bodies."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serving_clients import PROMPT, SleepingEngine, png, png_url
from starlette.testclient import TestClient

from openwu.errors import OpenwuError
from openwu.serving.access import Keys, new_key
from openwu.serving.app import create_app
from openwu.serving.errors import ServiceError
from openwu.serving.middleware import BodyLimits
from openwu.serving.routes import streams
from openwu.serving.server import Address, measured, serve
from openwu.serving.state import Service, Settings
from openwu.serving.stores import AdapterShelf, PictureStore, StoredAdapter, StoreLimits, UploadStore


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "keys"
    return {name: new_key(path, name, admin=name == "root") for name in ("ann", "bob", "root")}


@pytest.fixture
def client(tmp_path: Path, keys: dict[str, str]) -> Iterator[TestClient]:
    settings = Settings(keys=tmp_path / "keys", body=BodyLimits(bytes=20_000))
    with TestClient(create_app(SleepingEngine(), settings), base_url="http://localhost") as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_keys_are_kept_as_hashes(tmp_path: Path, keys: dict[str, str]) -> None:
    text = (tmp_path / "keys").read_text()
    assert not any(key in text for key in keys.values())
    assert (tmp_path / "keys").stat().st_mode & 0o077 == 0
    assert Keys(tmp_path / "keys").caller(f"Bearer {keys['ann']}").tenant == "ann"
    with pytest.raises(OpenwuError, match="new name"):
        new_key(tmp_path / "keys", "ann")


def test_nothing_is_served_without_a_key(client: TestClient, keys: dict[str, str]) -> None:
    for route in ("/v1/models", "/v1/edits", "/v1/adapters", "/metrics"):
        answer = client.get(route)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "missing_api_key"
        assert client.get(route, headers=bearer("wu-wrong")).json()["error"]["code"] == "invalid_api_key"
    assert client.get("/metrics", headers=bearer(keys["ann"])).status_code == 403
    assert client.get("/metrics", headers=bearer(keys["root"])).status_code == 200
    assert client.get("/health/live").status_code == 200


def test_anothers_adapter_is_not_found(client: TestClient, keys: dict[str, str]) -> None:
    made = client.post("/v1/images/edits", files={"image": png()}, data={"prompt": PROMPT}, headers=bearer(keys["ann"]))
    name = made.json()["openwu"]["adapter_id"]
    assert client.get(f"/v1/adapters/{name}", headers=bearer(keys["ann"])).status_code == 200
    for method, route in (("get", f"/v1/adapters/{name}"), ("delete", f"/v1/adapters/{name}")):
        assert getattr(client, method)(route, headers=bearer(keys["bob"])).status_code == 404
    assert client.get("/v1/adapters", headers=bearer(keys["bob"])).json()["data"] == []
    stolen = client.post(
        "/v1/images/edits", files={"image": png()}, data={"adapter": name}, headers=bearer(keys["bob"])
    )
    assert stolen.status_code == 404


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"host": "evil.example"}, "foreign_host"),
        ({"host": "localhost", "origin": "https://evil.example"}, "foreign_origin"),
        ({"host": "localhost", "origin": "null"}, "foreign_origin"),
    ],
)
def test_foreign_pages_are_refused(client: TestClient, headers: dict[str, str], code: str) -> None:
    answer = client.get("/health/live", headers=headers)
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == code
    assert client.get("/health/live", headers={"origin": "http://localhost"}).status_code == 200


def test_a_body_that_is_too_large_is_refused(client: TestClient, keys: dict[str, str]) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(30):
            yield bytes(1000)

    for content in (bytes(30_000), pieces()):  # declared, and not
        answer = client.post(
            "/v1/images/edits",
            content=content,
            headers={**bearer(keys["ann"]), "content-type": "application/json"},
        )
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"


def scope(method: str, path: str) -> dict[str, object]:
    """An ASGI scope of a JSON request."""
    return {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "root_path": "",
        "query_string": b"", "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        "http_version": "1.1", "scheme": "http", "server": ("localhost", 80), "client": ("127.0.0.1", 1),
    }  # fmt: skip


def test_a_slow_body_is_refused() -> None:
    app = create_app(SleepingEngine(), Settings(body=BodyLimits(seconds=0.05)))
    sent = []

    async def never() -> dict[str, object]:
        await asyncio.sleep(60)
        raise AssertionError

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    asyncio.run(app(scope("POST", "/v1/images/edits"), never, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 408
    assert (b"connection", b"close") in sent[0]["headers"]


@pytest.mark.parametrize(
    ("files", "fields", "param"),
    [
        ({"mask": png()}, {}, "mask"),
        ({}, {"strength": "2"}, "strength"),
        ({}, {"allow_out_of_scope": "true"}, "allow_out_of_scope"),  # this model refuses nothing
        ({"example_before": png(), "example_after": png()}, {}, "example_before"),
    ],
)
def test_nothing_that_an_adapter_does_not_depend_on_is_taken_silently(
    client: TestClient, keys: dict[str, str], files: dict[str, bytes], fields: dict[str, str], param: str
) -> None:
    answer = client.post(
        "/v1/adapters", files={"image": png(), **files}, data={"prompt": PROMPT, **fields}, headers=bearer(keys["ann"])
    )
    assert answer.status_code == 400, answer.text
    assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == ("unsupported_value", param)


def test_a_client_that_leaves_as_its_stream_opens_stops_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "PEEK_SECONDS", 1000.0)
    engine = SleepingEngine(1000.0)
    body = json.dumps({"prompt": PROMPT, "stream": True, "image": png_url(png())}).encode()
    messages = iter([{"type": "http.request", "body": body, "more_body": False}, {"type": "http.disconnect"}])

    async def receive() -> dict[str, object]:
        return next(messages)

    async def send(message: dict[str, object]) -> None: ...

    asyncio.run(create_app(engine)(scope("POST", "/v1/images/edits"), receive, send))  # type: ignore[arg-type]
    assert engine.stopped == [engine.batches[0][0].id]


def test_without_keys_only_this_machine_is_served() -> None:
    with pytest.raises(OpenwuError, match="--keys"):
        serve(SleepingEngine(), Settings(), Address("0.0.0.0"))


def test_a_port_of_its_own_serves_figures_without_a_key_and_nothing_else(tmp_path: Path, keys: dict[str, str]) -> None:
    assert keys
    service = Service(SleepingEngine(), Settings(keys=tmp_path / "keys"))

    async def ask() -> list[httpx.Response]:
        async with measured(service, listener), httpx.AsyncClient(base_url=url, timeout=30) as client:
            return [await client.get(path) for path in ("/metrics", "/v1/models", "/health/ready", "/")]

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        with pytest.raises(OpenwuError, match=rf"127.0.0.1:{port}: cannot listen: .*another --metrics-port"):
            serve(SleepingEngine(), Settings(), Address(port=0), metrics=Address(port=port))
        answers = asyncio.run(ask())
    assert [answer.status_code for answer in answers] == [200, 404, 404, 404]
    assert "openwu_queue_length 0.0" in answers[0].text
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def stored(name: str, tenant: str, size: int = 10) -> StoredAdapter:
    return StoredAdapter(name, tenant, bytes(size), name, "stub", None, 0)


def test_a_flood_of_adapters_pushes_out_its_own() -> None:
    shelf = AdapterShelf(limit=100, per_tenant=50)
    shelf.put(stored("b0", "b"))
    for number in range(100):
        shelf.put(stored(f"a{number}", "a"))
    assert shelf.get("b0", "b")
    assert len(shelf.of("a")) == 9
    with pytest.raises(ServiceError):
        shelf.get("a0", "a")


def test_a_flood_of_upload_links_pushes_out_its_own() -> None:
    store = UploadStore(limit=4 * 2**20)
    first = store.expect("b")
    store.put(first, b"picture")
    old = store.expect("a")
    for _ in range(100):
        store.put(store.expect("a"), bytes(2**20))
    assert store.get(first, "b") == b"picture"
    for name, tenant in ((old, "a"), (first, "a"), ("0" * 32, "b")):
        with pytest.raises(ServiceError, match="id of an upload"):
            store.get(name, tenant)
    with pytest.raises(ServiceError, match="fresh link"):
        store.put(first, b"another")


def test_pictures_behind_links_are_bounded_and_expire() -> None:
    store = PictureStore(limit=100)
    links = [store.put(bytes(30), "image/png") for _ in range(5)]

    def fetched(link: str, store: PictureStore = store) -> int:
        name, _, query = link.removeprefix("/v1/images/").partition("?")
        expires, signature = (part.partition("=")[2] for part in query.split("&"))
        try:
            return len(store.get(name, expires, signature)[0])
        except ServiceError as error:
            return error.failure.status

    assert [fetched(link) for link in links] == [404, 404, 30, 30, 30]
    old = PictureStore(seconds=-1)
    assert fetched(old.put(b"x", "image/png"), old) == 404


def test_an_operator_bounds_what_is_kept() -> None:
    service = Service(SleepingEngine(), Settings(stores=StoreLimits(adapters_per_key=2, store_bytes=100)))
    for number in range(5):
        service.adapters.put(stored(f"a{number}", "a"))
        service.pictures.put(bytes(60), "image/png")
    assert [each.id for each in service.adapters.of("a")] == ["a3", "a4"]
    service.adapters.put(stored("large", "a", 95))
    assert [each.id for each in service.adapters.of("a")] == ["large"]

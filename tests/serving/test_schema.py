"""The schema at /openapi.json holds: no request drawn from it, or bent away from it, makes the app answer 5xx.

schemathesis draws the requests; hypothesis and pictures of our own decide what stands in their pictures.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from serving_clients import SleepingEngine, mask_png, png
from starlette.testclient import TestClient

from openwu.serving.app import create_app

requests = pytest.importorskip("requests")
schemathesis = pytest.importorskip("schemathesis")
from schemathesis.generation import GenerationMode  # noqa: E402

QUICK, ALL = 100, int(os.environ.get("OPENWU_FUZZ_EXAMPLES", "2000"))
FILES = [png(), png(format="JPEG"), png(format="WEBP"), png(format="GIF"), mask_png(), b"", b"x", png()[:99]]
PICTURES = st.sampled_from(FILES) | st.binary(max_size=200)
schemathesis.openapi.format("binary", PICTURES)
schemathesis.openapi.format(
    "uri",
    PICTURES.map(lambda data: "data:image/png;base64," + base64.b64encode(data).decode())
    | st.sampled_from(["https://example.com/a.png", "data:,", "data:image/png;base64,%", ""])
    | st.text(max_size=20),
)


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    app = create_app(SleepingEngine(0.0))
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def adapters(client: TestClient) -> list[str]:
    """Ids of adapters that are there."""
    made = [client.post("/v1/adapters", files={"image": png()}, data={"prompt": "brighter"}) for _ in range(3)]
    return [each.json()["id"] for each in made]


@pytest.fixture(scope="module")
def cases(client: TestClient) -> st.SearchStrategy[Any]:
    """Requests of every operation of the schema, half of them bent away from it."""
    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) == 12
    modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    return st.one_of([each.as_strategy(generation_mode=mode) for each in operations for mode in modes])


def check(client: TestClient, case: Any, adapter: str | None) -> int:
    """Send a request, hold its answer against the schema, and return its status."""
    if adapter is not None and case.operation.path == "/v1/adapters/{id}" and case.method != "DELETE":
        case.path_parameters["id"] = adapter
    # Encoded as `requests` does, for which the cases are made.
    sent = requests.Request(**case.as_transport_kwargs(base_url="http://localhost")).prepare()
    assert sent.method is not None
    assert sent.url is not None
    answer = client.request(sent.method, sent.url, content=sent.body, headers=dict(sent.headers))
    assert answer.status_code < 500, (case, answer.text)
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) >= {"message", "type", "param", "code"}, (case, answer.text)
    return answer.status_code


def run(client: TestClient, cases: st.SearchStrategy[Any], adapters: list[str], count: int) -> dict[int, int]:
    """Send so many requests; return how often each status was answered."""
    seen: dict[int, int] = {}

    @settings(
        max_examples=count,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        phases=[Phase.generate],  # a failing request is shown as it was drawn: shrinking takes minutes
    )
    @given(case=cases, adapter=st.none() | st.sampled_from(adapters))
    def one(case: Any, adapter: str | None) -> None:
        status = check(client, case, adapter)
        seen[status] = seen.get(status, 0) + 1

    one()
    return seen


def test_a_hundred_requests(client: TestClient, cases: st.SearchStrategy[Any], adapters: list[str]) -> None:
    seen = run(client, cases, adapters, QUICK)
    assert seen[200] >= 10
    assert seen[400] >= 10


@pytest.mark.slow
def test_two_thousand_requests(client: TestClient, cases: st.SearchStrategy[Any], adapters: list[str]) -> None:
    seen = run(client, cases, adapters, ALL)
    assert {200, 201, 400, 404} <= set(seen), seen

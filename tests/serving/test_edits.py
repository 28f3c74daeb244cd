"""The edits API through the app itself: what is served equals `Editor.edit`, and what is refused is refused by name."""

from __future__ import annotations

import base64
import gzip
import io
import json
from typing import Any

import numpy as np
import pytest
from httpx2 import Response
from numpy.typing import NDArray
from PIL import Image
from serving_clients import PROMPT, mask_png, png
from starlette.testclient import TestClient

from openwu.editor.editor import Editor
from openwu.images import read_picture


def pixels(data: bytes | str) -> NDArray[Any]:
    raw = base64.b64decode(data) if isinstance(data, str) else data
    return np.asarray(Image.open(io.BytesIO(raw)))


def post(client: TestClient, *, image: bytes | None = None, **fields: Any) -> Response:
    files = {"image": png() if image is None else image}
    if "mask" in fields:
        files["mask"] = fields.pop("mask")
    return client.post("/v1/images/edits", files=files, data={"prompt": PROMPT, **fields})


def served(answer: Response) -> NDArray[Any]:
    assert answer.status_code == 200, answer.text
    return pixels(answer.json()["data"][0]["b64_json"])


@pytest.fixture(scope="module")
def expected(editor: Editor) -> NDArray[Any]:
    return editor.edit([read_picture(png())], PROMPT, seed=3).photo.pixels


def test_multipart_equals_the_editor_and_names_what_was_ignored(client: TestClient, expected: NDArray[Any]) -> None:
    answer = post(client, seed="3", quality="high", partial_images="2", user="me")
    assert np.array_equal(served(answer), expected)
    ours = answer.json()["openwu"]
    assert ours["seeds"] == [3]
    assert ours["ignored"] == ["quality", "partial_images"]
    assert ours["batch"] == 1
    assert answer.json()["size"] == "48x40"
    assert answer.headers["x-request-id"]


def test_json_equals_the_editor(client: TestClient, expected: NDArray[Any]) -> None:
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    answer = client.post("/v1/images/edits", json={"images": [{"image_url": url}], "prompt": PROMPT, "seed": 3})
    assert np.array_equal(served(answer), expected)


def test_a_stream_equals_the_editor(client: TestClient, expected: NDArray[Any]) -> None:
    answer = post(client, seed="3", stream="true")
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = answer.text.splitlines()
    assert "event: image_edit.completed" in lines
    event = json.loads(next(line for line in lines if line.startswith("data: "))[6:])
    assert event["type"] == "image_edit.completed"
    assert event["usage"]["total_tokens"] == 0
    assert np.array_equal(pixels(event["b64_json"]), expected)


def test_n_pictures_have_seeds_in_a_row(client: TestClient, expected: NDArray[Any]) -> None:
    answer = post(client, seed="2", n="2")
    ours = answer.json()["openwu"]
    assert ours["seeds"] == [2, 3]
    assert ours["adapter_ids"][0] == ours["adapter_id"] != ours["adapter_ids"][1]
    for name in ours["adapter_ids"]:
        assert client.get(f"/v1/adapters/{name}").status_code == 200
    assert np.array_equal(pixels(answer.json()["data"][1]["b64_json"]), expected)


def test_outside_a_mask_no_bit_changes(client: TestClient, expected: NDArray[Any]) -> None:
    found, original = served(post(client, seed="3", mask=mask_png())), pixels(png())
    assert np.array_equal(found[:, 24:], original[:, 24:])
    assert np.array_equal(found[:, :24], expected[:, :24])
    assert not np.array_equal(found, original)


def test_an_adapter_is_used_again_downloaded_and_deleted(client: TestClient, expected: NDArray[Any]) -> None:
    made = client.post("/v1/adapters", files={"image": png()}, data={"prompt": PROMPT})
    assert made.status_code == 201, made.text
    name = made.json()["id"]
    again = post(client, seed="3", adapter=name)
    assert np.array_equal(served(again), expected)
    assert again.json()["openwu"]["adapter_id"] == name
    archive = client.get(f"/v1/adapters/{name}?format=peft")
    assert archive.status_code == 200
    assert b"adapter_model.safetensors" in archive.content
    assert name in {each["id"] for each in client.get("/v1/adapters").json()["data"]}
    assert client.delete(f"/v1/adapters/{name}").json()["deleted"] is True
    assert post(client, adapter=name).json()["error"]["code"] == "adapter_not_found"


def test_size_format_and_link(client: TestClient) -> None:
    answer = post(client, size="64x32", output_format="webp", output_compression="50", response_format="url")
    link = answer.json()["data"][0]["url"]
    picture = client.get(link)
    assert picture.headers["content-type"] == "image/webp"
    assert pixels(picture.content).shape == (32, 64, 3)
    assert answer.json()["size"] == "64x32"
    assert client.get(link.replace("signature=", "signature=0")).status_code == 403


def test_places_are_left_out_unless_kept(client: TestClient) -> None:
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    exif.get_ifd(0x8825).update({1: "N", 2: (48.0, 8.0, 15.0), 3: "E", 4: (11.0, 34.0, 30.0)})
    photo = png(format="JPEG", exif=exif.tobytes())

    def position(**fields: str) -> tuple[object, object]:
        answer = post(client, image=photo, output_format="jpeg", **fields)
        kept = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))).getexif()
        return kept.get(0x010F), kept.get_ifd(0x8825).get(2)

    assert position(metadata="keep") == ("Maker", (48.0, 8.0, 15.0))
    maker, place = position()
    assert maker == "Maker"
    assert place != (48.0, 8.0, 15.0)
    assert position(metadata="strip") == (None, None)


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"prompt": "sing me a song about taxes"}, 400, "unknown_instruction", "prompt"),
        ({"prompt": ""}, 400, "missing_parameter", "prompt"),
        ({"prompt": "x" * 600}, 400, "invalid_value", "prompt"),
        ({"image": b"no picture"}, 400, "invalid_image", "image"),
        ({"image": png()[:200]}, 400, "invalid_image", "image"),
        ({"mask": mask_png(40, 48)}, 400, "mask_size_mismatch", "mask"),
        ({"mask": png()}, 400, "invalid_image", "mask"),
        ({"n": "11"}, 400, "invalid_value", "n"),
        ({"n": "1.5"}, 400, "invalid_value", "n"),
        ({"size": "huge"}, 400, "unsupported_value", "size"),
        ({"size": "99999x9"}, 400, "unsupported_value", "size"),
        ({"output_format": "svg"}, 400, "unsupported_value", "output_format"),
        ({"output_format": "png", "output_compression": "50"}, 400, "unsupported_value", "output_compression"),
        ({"background": "transparent"}, 400, "unsupported_value", "background"),
        ({"strength": "nan"}, 400, "invalid_value", "strength"),
        ({"seed": "-1"}, 400, "invalid_value", "seed"),
        ({"frame_count": "3"}, 400, "unsupported_value", "frame_count"),
        ({"stream": "maybe"}, 400, "invalid_value", "stream"),
        ({"model": "gpt-9"}, 404, "model_not_found", "model"),
        ({"adapter": "0" * 32}, 404, "adapter_not_found", "adapter"),
    ],
)
def test_a_refusal_names_what_is_wrong(
    client: TestClient, fields: dict[str, Any], status: int, code: str, param: str
) -> None:
    answer = post(client, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param), answer.text
    assert set(error) >= {"message", "type", "param", "code"}
    assert answer.headers["x-should-retry"] == "false"
    assert code != "unknown_instruction" or len(error["suggestions"]) == 3


@pytest.mark.parametrize("image", ["http://169.254.169.254/x.png", "file:///etc/passwd", "data:image/png;base64,!!", 7])
def test_no_url_is_fetched(client: TestClient, image: object) -> None:
    answer = client.post("/v1/images/edits", json={"images": [{"image_url": image}], "prompt": PROMPT})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] in ("unsupported_value", "invalid_image")


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("text/plain", b"x", 415),
        ("application/json", b"{", 400),
        ("application/json", b"[" * 100_000, 400),
        ("application/json", b"[1]", 400),
        ("application/json", b'{"\\ud800x": 1}', 400),
        ("application/json", b'{"prompt": "\\udfff"}', 400),
        ("multipart/form-data", b"x", 400),
        ("multipart/form-data; boundary=a", b"--a\r\nbroken", 400),
        (
            "multipart/form-data; boundary=a",
            b'--a\r\nContent-Disposition: form-data; name="\xff"\r\n\r\nx\r\n--a--',
            400,
        ),
    ],
)
def test_a_body_that_is_none_is_refused(client: TestClient, kind: str, body: bytes, status: int) -> None:
    for route in ("/v1/images/edits", "/v1/adapters"):
        answer = client.post(route, content=body, headers={"content-type": kind})
        assert answer.status_code == status
        assert set(answer.json()["error"]) >= {"message", "type", "param", "code"}


def test_other_routes_answer_as_clients_expect(client: TestClient) -> None:
    assert client.get("/v1/models").json()["data"][0]["id"] == "embedded"
    assert client.get("/v1/models/none").json()["error"]["code"] == "model_not_found"
    assert client.post("/v1/images/generations", json={}).json()["error"]["code"] == "not_found"
    assert client.post("/v1/images/variations", json={}).status_code == 404
    assert client.get("/v1/images/edits").json()["error"]["code"] == "method_not_allowed"
    assert client.delete("/v1/models").json()["error"]["code"] == "method_not_allowed"
    assert client.get("/v1/edits?q=brighter&lang=en").json()["data"][0]["id"] == "brighten"
    assert client.get("/health/ready").json()["status"] == "ready"
    assert "openwu_requests_total" in client.get("/metrics").text
    assert "/v1/images/edits" in client.get("/openapi.json").json()["paths"]
    assert "default-src 'self'" in client.get("/").headers["content-security-policy"]


def test_head_has_the_headers_of_get_alone(client: TestClient) -> None:
    for route in ("/health/live", "/health/ready", "/v1/models", "/v1/edits", "/", "/openapi.json", "/v1/nothing"):
        whole, head = client.get(route), client.head(route)
        assert (head.status_code, head.content) == (whole.status_code, b"")
        assert head.headers["content-type"] == whole.headers["content-type"]
        assert head.headers["content-length"] == whole.headers["content-length"] == str(len(whole.content))
    assert client.head("/v1/images/edits").status_code == 405


def form(*parts: tuple[str, bytes]) -> bytes:
    """A multipart body without its closing boundary."""
    head = "--XX\r\nContent-Disposition: form-data; {}\r\n\r\n"
    return b"".join(head.format(name).encode() + data + b"\r\n" for name, data in parts)


def test_a_form_that_is_cut_off_is_refused_whatever_is_missing(client: TestClient) -> None:
    """What was lost might have been the mask."""
    whole = form(('name="image"; filename="a"', png()), ('name="prompt"', PROMPT.encode())) + b"--XX"
    kind = {"content-type": "multipart/form-data; boundary=XX"}
    for cut in (b"", b'\r\nContent-Disposition: form-data; name="mask"; filename="m"\r\n\r\n' + mask_png()[:50]):
        answer = client.post("/v1/images/edits", content=whole + cut, headers=kind)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_body")
        assert "cut off" in answer.json()["error"]["message"]
    assert client.post("/v1/images/edits", content=whole + b"--\r\n", headers=kind).status_code == 200


def test_a_body_that_says_one_thing_twice_or_is_packed_is_refused(client: TestClient) -> None:
    kind = {"content-type": "application/json"}
    twice = b'{"prompt": "make it brighter", "prompt": "blur the photo"}'
    answer = client.post("/v1/images/edits", content=twice, headers=kind)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
    packed = client.post("/v1/images/edits", content=gzip.compress(b"{}"), headers={**kind, "content-encoding": "gzip"})
    assert (packed.status_code, packed.json()["error"]["code"]) == (415, "unsupported_media_type")

"""The edits API through the app itself: what is served equals `Editor.edit`, and what is refused is refused by name."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image
from serving_clients import PROMPT, png
from starlette.testclient import TestClient

from openwu.editor.editor import Editor
from openwu.images import read_picture


def pixels(data: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_a_served_edit_equals_the_editors(client: TestClient, editor: Editor) -> None:
    answer = client.post("/v1/images/edits", files={"image": png()}, data={"prompt": PROMPT, "seed": "3"})
    assert answer.status_code == 200, answer.text
    expected = editor.edit([read_picture(png())], PROMPT, seed=3).photo.pixels
    assert np.array_equal(pixels(answer.json()["data"][0]["b64_json"]), expected)

"""Edits that a pair of pictures shows: served as `Editor.edit` makes them, by a model that reads examples."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from serving_clients import PROMPT, png, png_url
from starlette.testclient import TestClient

from openwu.editor.editor import Editor
from openwu.editor.shown import reproduction
from openwu.images import read_picture
from openwu.serving.app import create_app
from openwu.serving.engines import Outcome, Task
from openwu.serving.engines.local import LocalEngine
from openwu.serving.engines.worker import EditWorker
from openwu.training.embedded.model import EmbeddedConfig, EmbeddedModel
from openwu.types import LoadingOptions

BEFORE = png(seed=7)
ROUTE = "/v1/images/edits"


def brighter(data: bytes, amount: int = 30) -> bytes:
    """The same picture, brighter: what the example shows."""
    levels = [max(0, min(255, amount + value)) for value in range(256)]
    picture = Image.open(io.BytesIO(data)).point(levels * 3)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


AFTER = brighter(BEFORE)
PAIR = {"example_before": BEFORE, "example_after": AFTER}


@pytest.fixture(scope="module", autouse=True)
def lenient() -> Iterator[None]:
    """Random weights reproduce nothing; what is refused for it has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduction, "ACCEPTED", -math.inf)
        yield


def tiny(config: EmbeddedConfig, folder: Path) -> Editor:
    """An editor of a tiny model with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = EmbeddedModel(config)
        model.generator.init_weights(0.3)
        torch.nn.init.normal_(model.backbone.pixels.out.weight, std=0.02)
    model.save_pretrained(folder, torch.float32)
    return Editor.from_pretrained(folder, loading=LoadingOptions(dtype=torch.float32))


@pytest.fixture(scope="module")
def shown(embedded_config: EmbeddedConfig, tmp_path_factory: pytest.TempPathFactory) -> Editor:
    """One that reads examples."""
    config = embedded_config.with_examples(d_model=32, head_dim=16, dim_accumulation=2, blocks=1)
    return tiny(config, tmp_path_factory.mktemp("model") / "examples")


@pytest.fixture(scope="module")
def reader(shown: Editor) -> Iterator[TestClient]:
    with TestClient(create_app(LocalEngine(lambda: shown)), base_url="http://localhost") as client:
        yield client


@pytest.fixture(scope="module")
def expected(shown: Editor) -> NDArray[Any]:
    pair = (read_picture(BEFORE), read_picture(AFTER))
    return shown.edit([read_picture(png())], example=[pair], seed=3).photo.pixels


def served(answer: Any) -> NDArray[Any]:
    assert answer.status_code == 200, answer.text
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))))


def test_a_pair_in_parts_and_in_json_equals_the_editor(reader: TestClient, expected: NDArray[Any]) -> None:
    parts = reader.post(ROUTE, files={"image": png(), **PAIR}, data={"seed": "3"})
    assert np.array_equal(served(parts), expected)
    assert parts.json()["openwu"]["edit"] is None
    assert parts.json()["openwu"]["example"]["partly"] is True
    assert "partly understood" in parts.json()["openwu"]["notes"][0]
    fields = {
        "images": [png_url(png())],
        "seed": 3,
        "example_before": png_url(BEFORE),
        "example_after": [png_url(AFTER)],
    }
    assert np.array_equal(served(reader.post(ROUTE, json=fields)), expected)
    other = reader.post(
        ROUTE, files={"image": png(), **PAIR, "example_after": brighter(BEFORE, -30)}, data={"seed": "3"}
    )
    assert not np.array_equal(served(other), expected)


def test_the_adapter_of_a_series_serves_every_photo(reader: TestClient, expected: NDArray[Any]) -> None:
    made = reader.post("/v1/adapters", files=PAIR)
    assert made.status_code == 201, made.text
    assert made.json()["example"]["partly"] is True
    again = reader.post(ROUTE, files={"image": png()}, data={"seed": "3", "adapter": made.json()["id"]})
    assert np.array_equal(served(again), expected)


def test_models_say_whether_they_read_examples(
    reader: TestClient, embedded_config: EmbeddedConfig, tmp_path: Path
) -> None:
    editor = tiny(embedded_config, tmp_path / "words")
    with TestClient(create_app(LocalEngine(lambda: editor)), base_url="http://localhost") as client:
        told = [each.get("/v1/models").json()["data"][0]["reads_examples"] for each in (reader, client)]
        assert told == [True, False]
        answer = client.post(ROUTE, files={"image": png(), **PAIR}, data={"prompt": PROMPT})
    assert answer.status_code == 400
    assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == ("unsupported_value", "example_before")


@pytest.mark.parametrize(
    ("files", "fields", "code", "param"),
    [
        ({"example_before": BEFORE}, {}, "missing_parameter", "example_after"),
        ({"example_after": AFTER}, {}, "missing_parameter", "example_before"),
        ({**PAIR, "example_before": b""}, {}, "invalid_image", "example_before"),
        ({**PAIR, "example_after": b"broken"}, {}, "invalid_image", "example_after"),
        ({**PAIR, "example_after": AFTER[:300]}, {}, "invalid_image", "example_after"),
        ({**PAIR, "example_after": png(90, 40)}, {}, "invalid_image", "example_after"),  # another shape
        ({"example_before": png(9, 9), "example_after": png(9, 9)}, {}, "invalid_image", "example_after"),  # too small
        (PAIR, {"then": "blur"}, "unsupported_value", "then"),
        (PAIR, {"adapter": "0" * 32}, "unsupported_value", "example_before"),
    ],
)
def test_what_shows_nothing_is_refused_by_name(
    reader: TestClient, files: dict[str, bytes], fields: dict[str, str], code: str, param: str
) -> None:
    answer = reader.post(ROUTE, files={"image": png(), **files}, data=fields)
    assert answer.status_code == 400, answer.text
    assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == (code, param), answer.text


def test_an_example_that_is_not_understood_is_refused_and_can_be_tried(
    reader: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduction, "ACCEPTED", 0.99)
    for route, files in ((ROUTE, {"image": png(), **PAIR}), ("/v1/adapters", PAIR)):
        answer = reader.post(route, files=files)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("unknown_example", "example_after")
        assert "tone and colour" in error["message"]
        tried = reader.post(route, files=files, data={"allow_out_of_scope": "true"})
        assert tried.status_code in (200, 201), tried.text


def test_five_pairs_are_too_many(reader: TestClient) -> None:
    files = [("image", png()), *[(name, data) for _ in range(5) for name, data in PAIR.items()]]
    assert reader.post(ROUTE, files=files).json()["error"]["code"] == "too_many_images"


def test_a_batch_mixes_examples_of_several_keys(shown: Editor) -> None:
    worker = EditWorker(shown, batch=2)
    pairs = [((BEFORE, AFTER),), ((BEFORE, brighter(BEFORE, -30)),)]
    tasks = [
        Task(f"t{i}", f"key{i}", images=(png(),), examples=pair, seed=3, batch_key=1) for i, pair in enumerate(pairs)
    ]
    for task, outcome in zip(tasks, worker.run(tasks, lambda *_: None, lambda _: False), strict=True):
        assert isinstance(outcome, Outcome)
        assert outcome.batch == 2
        example = [(read_picture(before), read_picture(after)) for before, after in task.examples]
        alone = shown.edit([read_picture(png())], example=example, seed=3).photo.pixels.astype(int)
        assert np.abs(read_picture(outcome.data).pixels.astype(int) - alone).max() <= 2

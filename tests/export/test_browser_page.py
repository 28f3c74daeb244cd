"""The page in a browser: it edits as the editor does, uploads nothing, and refuses what the editor refuses.

Needs onnxruntime-web (`make browser` fetches it) and Chromium; the export takes minutes.
"""

from __future__ import annotations

import base64
import functools
import io
import os
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openwu import Editor
from openwu.backbones.embedded.base import EmbeddedBase
from openwu.export.embedded.onnx import TOLERANCE, write_page
from openwu.types import LoadingOptions

ROOT = Path(__file__).parents[2]
RUNTIME = ROOT / "build/browser/node_modules/onnxruntime-web/dist"
CHROMIUM = Path("/usr/bin/chromium")
PHOTO = ROOT / "photos/life_by_aitzol_berasategi.jpg"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not RUNTIME.is_dir(), reason="`make browser` fetches onnxruntime-web"),
    pytest.mark.skipif(not CHROMIUM.exists(), reason="no Chromium"),
]


@pytest.fixture(scope="module")
def editor() -> Editor:
    return Editor.from_pretrained(loading=LoadingOptions(dtype=torch.float32))


@pytest.fixture(scope="module")
def site(editor: Editor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported page; OPENWU_BROWSER_SITE names one that `make browser` has written from this tree."""
    if given := os.environ.get("OPENWU_BROWSER_SITE"):
        return Path(given)
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("browser") / "site"
    assert isinstance(editor.backbone, EmbeddedBase)
    written = write_page(editor.backbone, editor.generator, folder, runtime=RUNTIME)
    assert set(written.differences) == {"words", "sentence", "adapter", "edit"}
    assert max(written.differences.values()) <= TOLERANCE
    return folder


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def origin(site: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def page(browser: Any, origin: str) -> Iterator[Any]:
    """The page, ready; whatever it asks for that is not its own folder's is refused and recorded."""
    context = browser.new_context()
    context.set_default_timeout(600_000)
    opened = context.new_page()
    opened.requests = []
    opened.problems = []
    opened.on("request", lambda request: opened.requests.append((request.method, request.url)))
    opened.on("pageerror", lambda error: opened.problems.append(str(error)))
    opened.on("console", lambda message: message.type == "error" and opened.problems.append(message.text))
    opened.goto(f"{origin}/index.html")
    opened.wait_for_selector("#status:has-text('Ready')")
    yield opened
    context.close()


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    with Image.open(PHOTO) as image:
        image.convert("RGB").resize((330, 250)).save(path)
    return path


def edited(
    page: Any, photo: Path, instruction: str, reference: Path | None = None, strength: float = 1.0
) -> tuple[str, np.ndarray]:
    """The page's message and the pixels of the edited picture."""
    page.fill("#strength", str(strength))
    page.set_input_files("#image", str(photo))
    page.set_input_files("#reference", [] if reference is None else str(reference))
    page.fill("#instruction", instruction)
    page.wait_for_selector("#go:not([disabled])")
    page.click("#go")
    page.wait_for_selector("#form[aria-busy=false]")
    data = page.evaluate("document.getElementById('after').toDataURL('image/png')")
    with Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))) as image:
        return page.text_content("#status"), np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(
    ("instruction", "understood"),
    [
        ("make it look like an old photograph", "age"),
        ("20% brighter", "brighten"),
        ("加颗粒", "add noise"),
        ("black and white with grain", "black and white"),
        ("hdr and super saturated", "hdr"),  # by the sentence reader
    ],
)
def test_edits_are_the_editors(page: Any, editor: Editor, photo: Path, instruction: str, understood: str) -> None:
    told, found = edited(page, photo, instruction)
    assert told.startswith(f"Understood: {understood}"), told
    expected = np.asarray(editor.edit(photo, instruction, seed=0).image.convert("RGB"))
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert np.abs(expected.astype(int) - np.asarray(Image.open(photo)).astype(int)).mean() > 2  # something was edited
    assert (difference > 1).mean() < 0.002, difference.mean()
    assert difference.max() <= 8


@pytest.mark.parametrize(("instruction", "strength"), [("black and white", 0.4), ("make it brighter", 1.5)])
def test_the_slider_is_the_strength(page: Any, editor: Editor, photo: Path, instruction: str, strength: float) -> None:
    _, found = edited(page, photo, instruction, strength=strength)
    expected = np.asarray(editor.edit(photo, instruction, strength=strength, seed=0).image.convert("RGB"))
    full = np.asarray(editor.edit(photo, instruction, seed=0).image.convert("RGB"))
    assert np.abs(expected.astype(int) - full.astype(int)).mean() > 2
    # A level of rounding in the full edit is as many times as large as the strength says.
    assert (np.abs(found.astype(int) - expected.astype(int)) > np.ceil(strength)).mean() < 0.002


def test_a_reference_is_read(page: Any, editor: Editor, photo: Path, tmp_path: Path) -> None:
    reference = tmp_path / "reference.png"
    Image.effect_noise((90, 70), 40).convert("RGB").point(lambda value: value // 2).save(reference)
    _, found = edited(page, photo, "take the colours of the other picture", reference)
    expected = np.asarray(
        editor.edit([photo, reference], "take the colours of the other picture", seed=0).image.convert("RGB")
    )
    assert (np.abs(found.astype(int) - expected.astype(int)) > 1).mean() < 0.002


@pytest.mark.parametrize("instruction", ["make me a sandwich", "don't make it darker", "make only the sky darker"])
def test_what_is_not_understood_is_refused(page: Any, photo: Path, instruction: str) -> None:
    told, _ = edited(page, photo, instruction)
    assert "Understood" not in told
    assert "failed" in page.get_attribute("#status", "class")


def test_nothing_is_uploaded(page: Any, origin: str, photo: Path) -> None:
    before = len(page.requests)
    edited(page, photo, "make it warmer")
    assert len(page.requests) == before  # an edit asks for nothing, not even of its own host
    outside = [
        url for method, url in page.requests if method != "GET" or not url.startswith((origin, "blob:", "data:"))
    ]
    assert not outside
    assert not page.problems

"""The page in a real browser: what a person does with mouse, keyboard, paste and drop, and hears from a reader."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serving_clients import PROMPT, listening, png

from openwu.editor.editor import Editor
from openwu.serving.app import create_app
from openwu.serving.engines import Outcome, Report, Task
from openwu.serving.engines.local import LocalEngine
from openwu.serving.errors import Failure

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = Path("/usr/bin/chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs the browser {CHROMIUM}"),
]
PHOTO = {"name": "photo.png", "mimeType": "image/png", "buffer": png(96, 80)}


def darker(data: bytes) -> bytes:
    """The picture at 60% of its light."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").point([value * 6 // 10 for value in range(256)] * 3).save(buffer, "PNG")
    return buffer.getvalue()


class HeldEngine(LocalEngine):
    """An engine that begins nothing while `free` is cleared, and remembers what it was told to stop."""

    def __init__(self) -> None:
        super().__init__(Editor.from_pretrained)
        self.free = threading.Event()
        self.free.set()
        self.cancelled: list[str] = []
        self.tasks: list[Task] = []

    async def submit(self, tasks: Sequence[Task], report: Report) -> list[Outcome | Failure]:
        self.tasks += tasks
        while not self.free.is_set() and not any(task.id in self.cancelled for task in tasks):
            await asyncio.sleep(0.02)
        return await super().submit(tasks, report)

    def cancel(self, task: str) -> None:
        self.cancelled.append(task)
        super().cancel(task)


@dataclass
class Site:
    """The service behind the page."""

    url: str
    engine: HeldEngine


@dataclass
class Tab:
    """A page in the browser, and what went wrong on it."""

    page: Any
    site: Site
    faults: list[str] = field(default_factory=list)

    def edit(self, prompt: str = PROMPT) -> None:
        self.page.set_input_files("#photo", PHOTO)
        self.page.fill("#prompt", prompt)
        self.page.click("#run")

    def cards(self, count: int) -> Any:
        cards = self.page.locator("#results article")
        playwright.expect(cards).to_have_count(count, timeout=30_000)
        return cards


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    engine = HeldEngine()
    with listening(create_app(engine)) as url:
        yield Site(f"{url}/", engine)
        engine.free.set()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as run:
        browser = run.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(site: Site, browser: Any) -> Iterator[Tab]:
    context = browser.new_context(locale="en-GB", viewport={"width": 1100, "height": 900})
    found = Tab(context.new_page(), site)
    found.page.on("pageerror", lambda error: found.faults.append(str(error)))
    found.page.on("console", lambda line: line.type == "error" and found.faults.append(line.text))
    found.page.goto(site.url)
    playwright.expect(found.page.locator("#suggestions button")).to_have_count(6, timeout=10_000)
    yield found
    context.close()
    site.engine.free.set()
    # A refused request is an error on the console; a script that fails or a policy that is broken is one, too.
    assert [text for text in found.faults if "Failed to load resource" not in text] == []


def test_an_edit_shows_downloads_and_keeps_the_servers_own_bytes(tab: Tab) -> None:
    tab.edit()
    card = tab.cards(1).first
    with tab.page.expect_download() as download:
        card.locator(".download").click()
    assert download.value.suggested_filename == "photo.edited.png"
    served = Path(download.value.path()).read_bytes()
    expected = tab.page.request.post(
        tab.site.url + "v1/images/edits",
        multipart={"image": PHOTO, "prompt": PROMPT},
    ).json()
    assert Image.open(io.BytesIO(served)).size == (96, 80)
    assert served == base64.b64decode(expected["data"][0]["b64_json"])
    playwright.expect(tab.page.locator("#status")).to_contain_text("Done")
    playwright.expect(tab.page.locator("#history li")).to_have_count(1)
    tab.page.reload()
    playwright.expect(tab.page.locator("#history li")).to_have_count(1)
    tab.page.locator("#history .open").click()
    playwright.expect(tab.cards(1).first.locator("h3")).to_have_text(PROMPT)
    tab.page.get_by_role("button", name="Use as input").last.click()
    playwright.expect(tab.page.locator("#photo-name")).to_have_text("photo.edited.png")
    tab.page.locator("#history-clear").click()
    playwright.expect(tab.page.locator("#history li")).to_have_count(0)
    assert tab.page.evaluate("document.activeElement.id") == "history-title"


def test_the_slider_obeys_the_keyboard_and_holding_shows_the_original(tab: Tab) -> None:
    tab.edit()
    card = tab.cards(1).first
    at = "document.querySelector('.viewer').style.getPropertyValue('--at')"
    slider = card.get_by_role("slider")
    slider.focus()
    tab.page.keyboard.press("ArrowRight")
    assert tab.page.evaluate(at) == "51%"
    assert slider.get_attribute("aria-valuetext") == "51% original"
    tab.page.keyboard.press("Home")
    assert tab.page.evaluate(at) == "0%"
    card.locator(".hold").focus()
    tab.page.keyboard.down("Space")
    assert tab.page.evaluate(at) == "100%"
    tab.page.keyboard.up("Space")
    assert tab.page.evaluate(at) == "0%"


def test_two_instructions_side_by_side_tell_their_place_in_the_queue(tab: Tab) -> None:
    tab.site.engine.free.clear()
    tab.page.check("#compare")
    tab.page.fill("#second", "add fog")
    tab.site.engine.tasks.clear()
    tab.edit()
    playwright.expect(tab.page.locator("#stop")).to_be_focused()
    playwright.expect(tab.page.locator("#status")).to_contain_text("Editing", timeout=10_000)
    tab.site.engine.free.set()
    cards = tab.cards(2)
    assert [cards.nth(each).locator("h3").inner_text() for each in range(2)] == [PROMPT, "add fog"]
    first, second = (cards.nth(each).bounding_box() for each in range(2))
    assert first["y"] == second["y"]
    assert first["x"] < second["x"]


def test_a_waiting_edit_says_how_many_are_before_it_and_stop_leaves_no_work_behind(tab: Tab, browser: Any) -> None:
    engine = tab.site.engine
    engine.free.clear()
    engine.tasks.clear()
    other = browser.new_context().new_page()
    other.goto(tab.site.url)
    Tab(other, tab.site).edit()
    playwright.expect(other.locator("#status")).to_contain_text("Editing", timeout=10_000)
    tab.edit("add fog")
    playwright.expect(tab.page.locator("#status")).to_have_text("Waiting: 1 before you", timeout=10_000)
    tab.page.click("#stop")
    playwright.expect(tab.page.locator("#status")).to_have_text("Stopped")
    playwright.expect(tab.page.locator("#run")).to_be_focused()
    other.click("#stop")
    playwright.expect(other.locator("#status")).to_have_text("Stopped")
    end = time.monotonic() + 10
    while engine.tasks[0].id not in engine.cancelled and time.monotonic() < end:
        time.sleep(0.05)
    assert [task.instruction for task in engine.tasks] == [PROMPT]  # what waited was never begun
    assert engine.cancelled[-1] == engine.tasks[0].id
    other.context.close()


def test_paste_and_drop_take_pictures_and_refuse_other_files(tab: Tab) -> None:
    script = """([kind, name, type, data]) => {
      const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
      const transfer = new DataTransfer();
      transfer.items.add(new File([bytes], name, { type }));
      const init = { bubbles: true, cancelable: true, clipboardData: transfer, dataTransfer: transfer };
      document.body.dispatchEvent(kind === "paste" ? new ClipboardEvent(kind, init) : new DragEvent(kind, init));
    }"""
    data = base64.b64encode(png()).decode()
    for kind, name in (("paste", "pasted.png"), ("drop", "dropped.png")):
        tab.page.evaluate(script, [kind, name, "image/png", data])
        playwright.expect(tab.page.locator("#photo-name")).to_have_text(name)
        playwright.expect(tab.page.locator("#photo-preview")).to_be_visible()
    tab.page.evaluate(script, ["drop", "notes.txt", "text/plain", data])
    playwright.expect(tab.page.get_by_role("alert")).to_contain_text("notes.txt")
    playwright.expect(tab.page.locator("#photo-name")).to_have_text("dropped.png")


def test_an_unknown_instruction_offers_what_was_meant_and_a_missing_photo_takes_the_focus(tab: Tab) -> None:
    tab.page.fill("#prompt", PROMPT)
    tab.page.keyboard.press("Enter")
    playwright.expect(tab.page.get_by_role("alert")).to_have_text("Choose a photograph first.")
    playwright.expect(tab.page.locator("#photo")).to_be_focused()
    tab.edit("write me a poem about tax law")
    offers = tab.page.locator("#error-actions button")
    playwright.expect(offers.last).to_have_text("Try it anyway", timeout=10_000)
    assert offers.count() > 1
    offers.first.click()
    tab.cards(1)
    playwright.expect(tab.page.get_by_role("alert")).to_be_hidden()


def test_an_example_is_offered_only_where_the_model_reads_examples(tab: Tab) -> None:
    playwright.expect(tab.page.locator("#example")).to_be_visible()
    tab.page.set_input_files("#photo", PHOTO)
    tab.page.set_input_files("#example-before", PHOTO)
    tab.page.click("#run")
    playwright.expect(tab.page.get_by_role("alert")).to_contain_text("both pictures")
    tab.page.set_input_files("#example-after", {**PHOTO, "buffer": darker(PHOTO["buffer"])})
    tab.page.route("**/v1/images/edits", lambda route: route.continue_())  # else the browser keeps the files to itself
    with tab.page.expect_request("**/v1/images/edits") as sent:
        tab.page.click("#run")
    body = sent.value.post_data_buffer
    assert b'name="example_before"' in body
    assert b'name="example_after"' in body
    playwright.expect(tab.cards(1).first.locator(".note")).to_contain_text("% of the example's change is reproduced.")
    model = {"id": "m", "object": "model", "created": 0, "owned_by": "openwu", "reads_examples": False}
    answer = json.dumps({"object": "list", "data": [model]})
    tab.page.route("**/v1/models", lambda route: route.fulfill(body=answer, content_type="application/json"))
    tab.page.reload()
    playwright.expect(tab.page.locator("#example")).to_be_hidden()


def test_an_example_that_is_not_understood_is_said_and_can_be_tried(tab: Tab) -> None:
    tab.page.set_input_files("#photo", PHOTO)
    tab.page.set_input_files("#example-before", PHOTO)
    tab.page.set_input_files("#example-after", PHOTO)  # shows no change
    tab.page.click("#run")
    playwright.expect(tab.page.get_by_role("alert")).to_contain_text("teach tone and colour", timeout=30_000)
    tab.page.locator("#error-actions button").click()
    tab.cards(1)


def test_chinese_phone_width_and_names_for_every_control(site: Site, browser: Any) -> None:
    context = browser.new_context(locale="zh-CN", viewport={"width": 360, "height": 740}, has_touch=True)
    tab = Tab(context.new_page(), site)
    tab.page.goto(site.url)
    playwright.expect(tab.page.locator("html")).to_have_attribute("lang", "zh-Hans")
    playwright.expect(tab.page.locator("#run")).to_have_text("编辑")
    tab.edit("把照片变成黑白")
    card = tab.cards(1).first
    playwright.expect(card.locator(".download")).to_have_text("下载")
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 360
    unnamed = """[...document.querySelectorAll("input, select, button, a")].filter((each) =>
      each.checkVisibility() && !each.textContent.trim() && !each.labels?.length && !each.getAttribute("aria-label"))
      .map((each) => each.outerHTML)"""
    assert tab.page.evaluate(unnamed) == []
    tab.page.click("#language")
    playwright.expect(tab.page.locator("#run")).to_have_text("Edit")
    playwright.expect(card.locator(".download")).to_have_text("Download")
    tab.page.reload()
    playwright.expect(tab.page.locator("#run")).to_have_text("Edit")
    context.close()


def test_nothing_is_asked_of_other_servers(tab: Tab) -> None:
    asked: list[str] = []
    tab.page.on("request", lambda request: asked.append(request.url))
    tab.page.reload()
    tab.edit()
    tab.cards(1)
    assert len(asked) > 5
    assert [url for url in asked if not url.startswith((tab.site.url, f"blob:{tab.site.url}", "data:"))] == []


def test_axe_finds_nothing_serious(site: Site, browser: Any, tmp_path: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    (tmp_path / "package.json").write_text("{}")
    if subprocess.run(
        [npm, "install", "axe-core"], cwd=tmp_path, capture_output=True, timeout=600, check=False
    ).returncode:
        pytest.skip("npm cannot install axe-core here")
    for scheme in ("light", "dark"):
        context = browser.new_context(bypass_csp=True, color_scheme=scheme)
        tab = Tab(context.new_page(), site)
        tab.page.goto(site.url)
        tab.edit()
        tab.cards(1)
        tab.page.add_script_tag(path=str(tmp_path / "node_modules" / "axe-core" / "axe.min.js"))
        found = tab.page.evaluate("axe.run().then((result) => result.violations)")
        serious = [each for each in found if each["impact"] in ("serious", "critical")]
        assert [(each["id"], each["nodes"][0]["html"][:120]) for each in serious] == []
        context.close()

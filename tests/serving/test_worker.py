"""The worker: adapters mixed in one pass, one bad picture among good ones, stopping at the next part."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from serving_clients import PROMPT, png

from openwu.editor.editor import Editor
from openwu.images import read_picture
from openwu.serving.engines import Outcome, Task
from openwu.serving.engines.worker import METADATA_BYTES, WARM_SIDE, EditWorker, covering, failure_of
from openwu.serving.errors import Failure
from openwu.serving.requests.schema import cost_of

PROMPTS = ("make it brighter", "turn it black and white", "blur the photo")


@pytest.fixture(scope="module")
def worker(editor: Editor) -> EditWorker:
    return EditWorker(editor, batch=4)


def quiet(task: str, done: int, total: int) -> None: ...


def nobody(task: str) -> bool:
    return False


def everybody(task: str) -> bool:
    return True


def tasks(*images: bytes) -> list[Task]:
    return [
        Task(f"t{i}", f"key{i}", images=(image,), instruction=PROMPTS[i % 3], seed=i, batch_key=1)
        for i, image in enumerate(images)
    ]


def test_a_mixed_batch_gives_each_its_own_edit(worker: EditWorker, editor: Editor) -> None:
    images = [png(seed=i) for i in range(3)]
    outcomes = worker.run(tasks(*images), quiet, nobody)
    for i, (image, outcome) in enumerate(zip(images, outcomes, strict=True)):
        assert isinstance(outcome, Outcome)
        assert outcome.batch == 3
        alone = editor.edit([read_picture(image)], PROMPTS[i], seed=i).photo.pixels.astype(int)
        found = read_picture(outcome.data).pixels.astype(int)
        assert np.abs(found - alone).max() <= 2  # products of other shapes round otherwise


def test_one_bad_picture_or_prompt_fails_alone(worker: EditWorker) -> None:
    given = tasks(png(), b"broken", png(seed=2))
    given.append(Task("t3", "key3", images=(png(),), instruction="write me a poem about tax law", batch_key=1))
    first, second, third, fourth = worker.run(given, quiet, nobody)
    assert isinstance(first, Outcome)
    assert isinstance(third, Outcome)
    assert isinstance(second, Failure)
    assert second.code == "invalid_image"
    assert isinstance(fourth, Failure)
    assert fourth.code == "unknown_instruction"


def test_work_stops_when_nobody_waits_for_it(worker: EditWorker) -> None:
    given = tasks(png(), png(seed=1))
    outcomes = worker.run(given, quiet, everybody)
    assert all(isinstance(each, Failure) and each.code == "cancelled" for each in outcomes)
    one_left = worker.run(given, quiet, lambda task: task == "t0")
    both = worker.run(given, quiet, nobody)
    assert isinstance(one_left[1], Outcome)
    assert isinstance(both[1], Outcome)
    assert one_left[1].data == both[1].data  # a neighbour that left changes nothing


def test_one_keys_adapters_are_not_in_anothers_cache(worker: EditWorker) -> None:
    def cache(tenant: str) -> str:
        one = Task("x", tenant, images=(png(seed=9),), instruction=PROMPT)
        (outcome,) = worker.run([one], quiet, nobody)
        assert isinstance(outcome, Outcome)
        return outcome.cache

    assert [cache("ann"), cache("ann"), cache("bob")] == ["miss", "hit", "miss"]


def test_memory_that_is_short_for_a_small_picture_is_not_the_clients_fault() -> None:
    torchs = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 102760448 bytes.")
    for error in (MemoryError(), torchs):
        small, large = (failure_of(error, cost_of(side**2)) for side in (WARM_SIDE, 4000))
        assert (small.status, small.retryable) == (503, True)
        assert (large.status, large.code, large.retryable) == (400, "image_too_large", False)


def test_an_answer_names_the_edits_that_were_understood(worker: EditWorker) -> None:
    def edit(**fields: object) -> str | None:
        (outcome,) = worker.run([Task("x", "ann", images=(png(),), instruction=PROMPT, **fields)], quiet, nobody)  # type: ignore[arg-type]
        assert isinstance(outcome, Outcome)
        return outcome.edit

    assert [edit(), edit(kind="adapt"), edit(then=("blur the photo",))] == [
        "brighten",
        "brighten",
        "brighten, then blur",
    ]


def test_a_narrow_picture_is_scaled_to_a_size_without_a_huge_one_in_between() -> None:
    ramp = np.linspace(0, 255, 20_000).astype(np.uint8)
    pixels = np.broadcast_to(ramp[None, :, None], (2, 20_000, 3)).copy()
    thin = read_picture(pixels)
    tracemalloc.start()
    found = covering(replace(thin, alpha=pixels[:, :, 0]), (16, 2048))
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.size == (16, 2048)
    assert found.alpha is not None
    assert found.alpha.shape == (2048, 16)
    assert held < 50e6  # the whole at that height would have 20 million by 2,048 pixels
    assert np.abs(found.pixels.astype(int) - 127).max() <= 1  # the middle of the ramp
    assert np.abs(found.alpha.astype(int) - 127).max() <= 1


def test_covering_is_the_middle_of_the_whole_scaled() -> None:
    photo = read_picture(png(60, 40))
    whole = Image.fromarray(photo.pixels).resize((96, 64), Image.Resampling.LANCZOS)
    expected = np.asarray(whole)[:, 16:80].astype(int)
    assert np.abs(covering(photo, (64, 64)).pixels.astype(int) - expected).max() <= 1


def test_metadata_that_unpacks_to_more_than_a_picture_may_have_is_refused(worker: EditWorker) -> None:
    texts = PngInfo()
    texts.add_text("Comment", "a" * (METADATA_BYTES + 1), zip=True)
    bomb = png(pnginfo=texts)
    assert len(bomb) < 50_000
    (found,) = worker.run([Task("t", "ann", images=(bomb,), instruction=PROMPT)], quiet, nobody)
    assert isinstance(found, Failure)
    assert (found.status, found.code) == (400, "invalid_image")
    assert "16 MiB of profile, EXIF, XMP and texts" in found.message

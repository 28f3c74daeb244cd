"""Rows of latents: kept exactly, found only for what made them, and joined into the batch that the encoders make."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import base_cases
import pytest
import torch

from openwu.data.pairs import Pair
from openwu.errors import DatasetError
from openwu.training.bases.encoded_rows import RowStore, from_tensors, joined, to_device, to_tensors
from openwu.training.micro_batch import take_rows
from openwu.types import BaseRequest, Condition, LatentBatch, Segment

TARGETS = [torch.full((3, 64, 64), 0.2), torch.full((3, 64, 64), 0.9)]
TEXTS = ("blur", "draw it as an oil painting")


def small(length: int, masked: bool = True) -> LatentBatch:
    """A row with a text of some length, and segments with and without masks."""
    draws = torch.Generator().manual_seed(length)
    mask = torch.ones(1, length, dtype=torch.bool)
    text = torch.randn(1, length, 3, generator=draws)
    more = {"pictures": Segment(torch.randn(1, 4, 2, generator=draws).bfloat16())}
    return LatentBatch(
        torch.randn(1, 5, 2, generator=draws),
        {"text": text, "text_mask": mask, "shapes": torch.tensor([[3, 4]])},
        Condition(text * 2, mask if masked else None, more),
    )


def same(one: LatentBatch, other: LatentBatch) -> bool:
    first, second = to_tensors(one), to_tensors(other)
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def pair(seed: int = 0, text: str = "blur") -> Pair:
    image = base_cases.picture(seed)
    return Pair((image,), (text,), image, "", "row 0")


def test_a_row_is_read_as_it_was_written(tmp_path: Path) -> None:
    store = RowStore(tmp_path, "base")
    path = store.path(pair(), "blur")
    assert store.read(path) is None
    row = small(3, masked=False)
    store.write(path, row)
    read = store.read(path)
    assert read is not None
    assert same(read, row)
    assert read.condition.mask is None
    assert read.condition.more["pictures"].tokens.dtype == torch.bfloat16
    assert [each.name for each in path.parent.iterdir()] == [path.name], "nothing half-written stays"


def test_a_row_belongs_to_its_pair_wording_and_base(tmp_path: Path) -> None:
    store = RowStore(tmp_path, "base")
    other_target = replace(pair(), target=base_cases.picture(1))
    two = replace(pair(), images=(base_cases.picture(0), base_cases.picture(0)))
    paths = [store.path(each, "blur") for each in (pair(), pair(1), other_target, two)]
    paths += [store.path(pair(), "warm"), RowStore(tmp_path, "another").path(pair(), "blur")]
    assert len(set(paths)) == len(paths)
    assert store.path(replace(pair(), where="row 9", task="x"), "blur") == paths[0]


@pytest.mark.parametrize("damage", ["cut", "turned", "empty", "another file"])
def test_a_broken_file_is_no_row(damage: str, tmp_path: Path) -> None:
    store = RowStore(tmp_path, "base")
    path = store.path(pair(), "blur")
    store.write(path, small(3))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    broken = {"cut": path.read_bytes()[:-3], "turned": bytes(content), "empty": b"", "another file": b"{}" * 50}
    path.write_bytes(broken[damage])
    assert store.read(path) is None


def test_texts_of_several_lengths_are_padded_and_masked() -> None:
    batch = joined([small(3, masked=False), small(5, masked=False)])
    assert batch.inputs["text"].shape == (2, 5, 3)
    assert batch.inputs["text_mask"].tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert batch.condition.mask is not None
    assert batch.condition.mask.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert torch.equal(batch.inputs["text"][0, :3], small(3).inputs["text"][0])
    assert float(batch.inputs["text"][0, 3:].abs().sum()) == 0
    assert batch.inputs["shapes"].tolist() == [[3, 4]] * 2
    for i in range(2):
        part = take_rows(batch, slice(i, i + 1))
        assert isinstance(part, LatentBatch)
        assert torch.equal(part.condition.more["pictures"].tokens, batch.condition.more["pictures"].tokens[i : i + 1])


def test_what_cannot_be_padded_is_refused() -> None:
    wide = replace(small(3), target=torch.zeros(1, 6, 2))
    with pytest.raises(DatasetError, match=r"expected target of one shape in a batch, got \[\(5, 2\), \(6, 2\)\]"):
        joined([small(3), wide])
    without = replace(small(3), inputs={"text": torch.zeros(1, 3, 3)})
    with pytest.raises(DatasetError, match="different tensors"):
        joined([small(3), without])


def test_rows_of_a_batch_with_and_without_masks() -> None:
    """What micro-batches and several processes take of a latent batch."""
    for masked in (True, False):
        whole = from_tensors({name: torch.cat([value] * 3) for name, value in to_tensors(small(3, masked)).items()})
        part = take_rows(whole, slice(1, 3))
        assert {len(value) for value in to_tensors(part).values()} == {2}
        assert to_tensors(part).keys() == to_tensors(whole).keys()


@pytest.mark.parametrize(
    "name", ["flux-kontext", "flux2-klein", "qwen-image-edit", "instruct-pix2pix", "instruct-pix2pix-xl"]
)
def test_joined_rows_are_the_batch_of_the_encoders(name: str) -> None:
    """What denoiser and generator make of rows, against a batch that was encoded together."""
    base = base_cases.backbone(name)
    requests = [BaseRequest((base_cases.picture(i),), text) for i, text in enumerate(TEXTS)]
    together = base.latent_batch(requests, TARGETS)
    rows = [base.latent_batch([request], [target]) for request, target in zip(requests, TARGETS, strict=True)]
    batch = to_device(joined(rows), torch.device("cpu"))
    noise = torch.randn(together.target.shape, generator=torch.Generator().manual_seed(0))
    time = torch.tensor([0.3, 0.8]) if base.prediction == "flow" else torch.tensor([100, 700])
    torch.testing.assert_close(
        base.predict(batch, noise, time), base.predict(together, noise, time), rtol=1e-4, atol=1e-5
    )
    generator = base_cases.generator(base)
    one, other = generator(batch.condition), generator(together.condition)
    for key, (a, b) in one.pairs.items():
        torch.testing.assert_close(a, other.pairs[key][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(b, other.pairs[key][1], rtol=1e-4, atol=1e-5)

"""Photographs: split by picture, cropped within bounds, and none of the test set in training."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from openwu.data.suite.photographs import (
    TEST_PHOTOGRAPHS,
    VALIDATION,
    Photograph,
    folder_hashes,
    load_folder,
    load_test_photographs,
    random_crop,
    recoloured,
)
from openwu.errors import DatasetError

PHOTOS = Path(__file__).parents[2] / "photos"


def test_training_and_validation_share_no_picture(photo_folder: Path) -> None:
    training = {photograph.name for photograph in load_folder(photo_folder)}
    validation = {photograph.name for photograph in load_folder(photo_folder, validation=True)}
    assert training == {"a.jpg", "b.jpg", "c.jpg"}
    assert validation == {"life_by_aitzol_berasategi.jpg"}


def test_the_kept_back_files_are_there() -> None:
    assert {name for name in VALIDATION if not (PHOTOS / name).is_file()} == set()


def test_no_test_photograph_is_in_the_training_folder() -> None:
    """Neither as a file nor, scaled down, as a picture."""
    trained = folder_hashes(PHOTOS)
    assert (
        trained["sunset_by_aitzol_berasategi.jpg"]
        == hashlib.sha256((PHOTOS / "sunset_by_aitzol_berasategi.jpg").read_bytes()).hexdigest()
    )
    tested = [resources.files(package).joinpath(path).read_bytes() for package, path in TEST_PHOTOGRAPHS.values()]
    assert not {hashlib.sha256(data).hexdigest() for data in tested} & set(trained.values())
    thumbnails = {name: _thumbnail(file) for file in sorted(PHOTOS.glob("*.jpg")) for name in [file.name]}
    for name, picture in load_test_photographs(64).items():
        image = Image.fromarray((picture * 255).byte().permute(1, 2, 0).numpy())
        small = np.asarray(image.resize((12, 12))).astype(float)
        for trained_name, thumbnail in thumbnails.items():
            assert np.abs(small - thumbnail).mean() > 12, (name, trained_name)


def _thumbnail(file: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    with Image.open(file) as image:
        image.draft("RGB", (64, 64))
        return np.asarray(image.convert("RGB").resize((12, 12))).astype(np.float64)


def test_test_photographs_are_within_the_side() -> None:
    found = load_test_photographs(40)
    assert set(found) == set(TEST_PHOTOGRAPHS)
    for picture in found.values():
        assert picture.shape[0] == 3
        assert max(picture.shape) == 40
        assert 0 <= float(picture.min()) < float(picture.max()) <= 1


def test_a_missing_or_empty_folder(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DatasetError, match="expected JPEG files"):
            load_folder(folder)


def test_crops_depend_on_the_generator_alone_and_vary(photo_folder: Path) -> None:
    photographs = load_folder(photo_folder)
    crops = [random_crop(photographs, 24, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2, 3)]
    assert torch.equal(crops[0], crops[1])
    assert not torch.equal(crops[0], crops[2])
    assert all(crop.shape == (3, 24, 24) and 0 <= crop.min() < crop.max() <= 1 for crop in crops)


def test_a_photograph_that_is_too_small(photo_folder: Path) -> None:
    with pytest.raises(DatasetError, match=r"a\.jpg|b\.jpg|c\.jpg"):
        random_crop(load_folder(photo_folder), 64, torch.Generator().manual_seed(0))


def test_the_scale_is_drawn_among_those_that_are_large_enough() -> None:
    scales = tuple(torch.full((side, side, 3), side * 10, dtype=torch.uint8) for side in (9, 6, 4))
    generators = [torch.Generator().manual_seed(seed) for seed in range(60)]
    crops = [random_crop([Photograph("x", scales)], 5, generator) for generator in generators]
    assert {crop.shape for crop in crops} == {(3, 5, 5)}
    assert {90, 60} <= {round(float(crop.mean()) * 255) for crop in crops}  # those that are not recoloured


def test_colour_jitter_leaves_half_of_the_crops_alone() -> None:
    x = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    results = [recoloured(x, torch.Generator().manual_seed(seed)) for seed in range(100)]
    unchanged = sum(torch.equal(result, x) for result in results)
    assert 30 < unchanged < 70
    assert all(result.min() >= 0 and result.max() <= 1 for result in results)


def test_every_photograph_has_its_credits() -> None:
    lines = (PHOTOS / "CREDITS.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if ".jpg |" in line]
    assert sorted(row[0] for row in rows) == sorted(file.name for file in PHOTOS.glob("*.jpg"))
    free = ("CC0", "CC-BY-", "public domain")
    assert [row[:3] for row in rows if not row[1] or not row[2].startswith(free)] == []


def test_natural_crops_keep_their_colours(photo_folder: Path) -> None:
    """Mirrored or turned, a natural crop has the colours of the photograph; others do not always."""
    photographs = load_folder(photo_folder)
    known = {tuple(colour) for each in photographs for s in each.scales for colour in s.flatten(0, 1).tolist()}

    def strange(natural: bool) -> int:
        crops = [
            random_crop(photographs, 16, torch.Generator().manual_seed(seed), natural=natural) for seed in range(12)
        ]
        rounded = [(255 * crop).round().int().flatten(1).t().tolist() for crop in crops]
        return sum(any(tuple(colour) not in known for colour in colours) for colours in rounded)

    assert strange(natural=True) == 0
    assert strange(natural=False) > 0

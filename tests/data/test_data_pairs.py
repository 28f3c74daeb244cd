"""Training pairs of one's own: every problem is named, nothing is skipped, steps are balanced and repeatable."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openwu.data.pairs import SHOWN, Pairs, load_picture, pairs_of_dataset, read_pairs
from openwu.errors import DatasetError


def picture(size: tuple[int, int] = (6, 4), value: int = 0) -> Image.Image:
    return Image.fromarray(np.full((size[1], size[0], 3), value, dtype=np.uint8))


def write(folder: Path, lines: Sequence[Any]) -> Path:
    file = folder / "mine.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    file.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(4):
        picture(value=10 * i).save(tmp_path / f"{i}.png")
    return tmp_path


def line(a: int = 0, b: int = 1, **more: Any) -> dict[str, Any]:
    return {"images": [f"{a}.png"], "instruction": "brighter", "target": f"{b}.png", **more}


def test_lines_become_pairs(folder: Path) -> None:
    two = {"images": ["2.png", "3.png"], "instruction": "像第二张", "target": "0.png", "task": "reference"}
    pairs = read_pairs(write(folder, [line(), "", two]))
    assert len(pairs) == 2
    assert pairs.tasks == ("", "reference")
    images, target = pairs.pairs[1].load()
    assert [float(image[0, 0, 0] * 255) for image in images] == pytest.approx([20, 30])
    assert target.shape == (3, 4, 6)
    assert pairs.pairs[1].instructions == ("像第二张",)
    assert pairs.pairs[1].where == "mine.jsonl:3"


def test_every_problem_is_named_with_its_line(folder: Path) -> None:
    picture((4, 6)).save(folder / "upright.png")
    (folder / "text.png").write_text("no picture")
    file = write(
        folder,
        [
            line(),
            "{broken",
            [1, 2],
            line(instructon="typo"),
            {"images": [], "instruction": "x", "target": "1.png"},
            {"images": "0.png", "instruction": "x", "target": "1.png"},
            {"images": ["0.png"], "instruction": " ", "target": "1.png"},
            {"images": ["0.png"], "instruction": "x"},
            line(task=3),
            line(a=9),
            {**line(), "target": "upright.png"},
            {**line(), "target": "text.png"},
        ],
    )
    with pytest.raises(DatasetError) as caught:
        read_pairs(file)
    said = str(caught.value).splitlines()
    assert said[0] == "11 problems with the training pairs; nothing was trained:"
    expected = {
        2: "expected a JSON object on one line",
        3: "expected an object with fields, got list",
        4: "expected fields ['images', 'instruction', 'target', 'task'], got ['instructon']",
        5: "images: expected a list of at least one path, got []",
        6: "images: expected a list of at least one path, got '0.png'",
        7: "instruction: expected text, or a list of wordings, got ' '",
        8: "target: expected text, got None",
        9: "task: expected text, got 3",
        10: "images: expected a picture at",
        11: "target: expected the first picture's size 6x4, got 4x6",
        12: "target: expected a picture that Pillow reads",
    }
    for number, text in expected.items():
        (found,) = [each for each in said if each.strip().startswith(f"mine.jsonl:{number}: ")]
        assert text in found
    assert not any("mine.jsonl:1:" in each for each in said)


def test_many_problems_are_counted(folder: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        read_pairs(write(folder, ["?"] * (SHOWN + 7)))
    assert str(caught.value).endswith("and 7 more")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_no_pairs_are_refused(folder: Path, content: str) -> None:
    file = folder / "empty.jsonl"
    file.write_text(content)
    with pytest.raises(DatasetError, match="expected at least one, got none"):
        read_pairs(file)
    with pytest.raises(DatasetError, match="expected a JSONL file or a folder"):
        read_pairs(folder / "missing.jsonl")


def test_sizes_are_those_that_a_viewer_shows(folder: Path) -> None:
    """A photograph stored lying with "turn me" in its EXIF, and a target stored upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture((6, 4)).save(folder / "turned.jpg", exif=exif)
    picture((4, 6)).save(folder / "upright.png")
    entry = {"images": ["turned.jpg"], "instruction": "x", "target": "upright.png"}
    images, target = read_pairs(write(folder, [entry])).pairs[0].load()
    assert images[0].shape == target.shape == (3, 6, 4)
    with pytest.raises(DatasetError, match="size 4x6, got 6x4"):
        read_pairs(write(folder, [{**entry, "target": "0.png"}]))


def test_any_mode_becomes_three_channels_on_white() -> None:
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert torch.equal(load_picture(clear), torch.ones(3, 2, 2))
    palette = Image.new("P", (2, 2), 0)
    assert load_picture(palette).shape == (3, 2, 2)
    assert load_picture(Image.new("L", (2, 3), 255)).shape == (3, 3, 2)


def test_a_folder_for_each_task(tmp_path: Path) -> None:
    for task, names in (("invert", ("a", "b")), ("fog", ("a",))):
        for part in ("input", "target"):
            (tmp_path / task / part).mkdir(parents=True)
            for name in names:
                picture().save(tmp_path / task / part / f"{name}.{'png' if part == 'input' else 'webp'}")
        (tmp_path / task / "instructions.txt").write_text(f"{task} it\nplease {task}\n\n")
    pairs = read_pairs(tmp_path)
    assert pairs.tasks == ("fog", "invert")
    assert len(pairs) == 3
    assert pairs.pairs[0].instructions == ("fog it", "please fog")
    (tmp_path / "invert" / "target" / "b.webp").unlink()
    (tmp_path / "fog" / "instructions.txt").write_text("\n")
    with pytest.raises(DatasetError) as caught:
        read_pairs(tmp_path)
    assert "invert/input/b.png: no target of this name" in str(caught.value)
    assert "fog/instructions.txt: expected at least one instruction" in str(caught.value)


def test_an_empty_folder_and_one_with_a_listing(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(DatasetError, match=r"expected pairs\.jsonl, or a folder for each task; found neither"):
        read_pairs(tmp_path_factory.mktemp("empty"))
    write(folder, [line()]).rename(folder / "pairs.jsonl")
    assert len(read_pairs(folder)) == 1


def test_rows_of_a_data_set() -> None:
    rows = [{"before": picture(), "words": "invert", "after": picture(value=255), "kind": "colour"}] * 2
    pairs = pairs_of_dataset(rows, images="before", instruction="words", target="after", task="kind")
    assert pairs.tasks == ("colour",)
    assert float(pairs.pairs[0].load()[1].min()) == 1
    with pytest.raises(DatasetError, match=r"row 0: expected columns .* got nothing in \['worts'\]"):
        pairs_of_dataset(rows, images="before", instruction="worts", target="after")
    with pytest.raises(DatasetError, match=r"row 0: expected pictures in \['words', 'after'\], got \['str', 'Image'\]"):
        pairs_of_dataset(rows, images="words", instruction="words", target="after")


def many(counts: dict[str, int]) -> Pairs:
    rows = [
        {"i": picture(), "w": f"{task} {n}", "t": picture(), "k": task} for task, c in counts.items() for n in range(c)
    ]
    return pairs_of_dataset(rows, images="i", instruction="w", target="t", task="k")


def test_steps_are_balanced_over_tasks_and_walk_through_all_pairs() -> None:
    pairs = many({"large": 8, "small": 2})
    drawn = [pair for step in range(16) for pair, _ in pairs.step(step, 4)]
    assert Counter(pair.task for pair in drawn) == {"large": 32, "small": 32}
    assert set(Counter(pair.where for pair in drawn if pair.task == "large").values()) == {4}
    assert set(Counter(pair.where for pair in drawn if pair.task == "small").values()) == {16}


def test_a_step_depends_on_its_number_and_the_seed_alone() -> None:
    pairs = many({"a": 5, "b": 3, "c": 4})
    names = [[words for _, words in pairs.step(step, 6, seed)] for step, seed in ((7, 0), (8, 0), (7, 1))]
    assert names[0] != names[1] != names[2] != names[0]
    assert [words for _, words in many({"a": 5, "b": 3, "c": 4}).step(7, 6)] == names[0]

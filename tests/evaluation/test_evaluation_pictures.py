"""Pictures and tables of results."""

from __future__ import annotations

import numpy as np
import torch

from openwu.data.suite import FAMILIES
from openwu.evaluation.pictures import HEAD, LABEL, grid, middle, to_image
from openwu.evaluation.suite import METHODS, Report, Score
from openwu.evaluation.tables import families_table, suite_table
from openwu.files.markdown import table


def flat(value: float, height: int, width: int) -> torch.Tensor:
    return torch.full((3, height, width), value)


def test_a_grid_has_a_row_per_name_and_a_cell_per_title() -> None:
    rows = {"one": [flat(0.0, 20, 30), flat(0.2, 20, 30)], "two": [flat(0.4, 20, 30)]}
    sheet = grid(rows, ["input", "output"])
    assert sheet.size == (LABEL + 2 * 30, HEAD + 2 * 20)
    for row, column, value in ((0, 0, 0), (0, 1, 51), (1, 0, 102), (1, 1, 255)):  # a missing cell stays white
        cell = sheet.crop((LABEL + column * 30, HEAD + row * 20, LABEL + (column + 1) * 30, HEAD + (row + 1) * 20))
        assert cell.getextrema() == ((value, value),) * 3


def test_cells_of_several_sizes_do_not_overlap() -> None:
    sheet = np.asarray(grid({"wide": [flat(0, 10, 40)] * 2, "high": [flat(0, 30, 20)] * 2}, ["a", "b"]))
    assert (sheet[HEAD:, LABEL:] == 0).all(-1).sum() == 2 * 10 * 40 + 2 * 30 * 20


def test_pictures_are_clipped_and_rounded() -> None:
    assert to_image(torch.tensor([-1.0, 0.5, 7.0]).view(3, 1, 1)).getpixel((0, 0)) == (0, 128, 255)


def test_the_middle_is_a_square_where_there_is_room() -> None:
    x = torch.arange(60).view(1, 6, 10).expand(3, -1, -1)
    assert torch.equal(middle(x, 4), x[:, 1:5, 3:7])
    assert torch.equal(middle(x, 8), x[:, :, 1:9])
    assert torch.equal(middle(x, 99), x)


def test_tables_have_a_row_per_sub_task_and_per_family() -> None:
    assert table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n\n"
    scores = [
        Score(edit, "coffee", method, 0, "en", "train", psnr + i, (20 + i) / 100)
        for edit, psnr in (("blur", 20), ("soften", 30), ("fog", 20))
        for i, method in enumerate(METHODS)
    ]
    rows = suite_table(Report(scores), [0, 1], ["coffee"]).splitlines()
    assert "| family | sub-task | input | base | shared | generated | shuffled |" in rows
    assert "| sharpness | blur | 20.0 / 0.200 | 21.0 / 0.210 | 22.0 / 0.220 | 23.0 / 0.230 | 24.0 / 0.240 |" in rows
    assert any(row.startswith("| weather | fog | ") for row in rows)
    assert "| generated minus shared | 1.00 |" in rows
    families = families_table(Report(scores)).splitlines()
    assert "| sharpness | 2 | 25.0 | 26.0 | 27.0 | 28.0 | 29.0 |" in families
    assert "| weather | 1 | 20.0 | 21.0 | 22.0 | 23.0 | 24.0 |" in families
    assert not any(
        row.startswith(f"| {name} ") for name in FAMILIES if name not in ("sharpness", "weather") for row in families
    )

"""`openwu bench`: what is measured on this machine, what the page says of it, and in which forms it comes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openwu import cli
from openwu.cli.console import USAGE
from openwu.errors import OpenwuError
from openwu.evaluation.machine import measure, page
from openwu.evaluation.machine.measure import Edits, MachineCost, measure_machine

QUIET = MachineCost(
    machine={"processor": "A | B", "cores": 2, "memory": 24 * 2**30, "system": "Linux 6", "load": 0.1},
    units=["AVX-512 (bfloat16)"],
    dtype="bfloat16",
    origin={"openwu": "0.1.0", "torch": "2.13.0"},
    threads=2,
    side=1000,
    edits=[Edits(1, (2.0, 2.2, 1.8), (1.96, 2.2, 1.8)), Edits(2, (1.1, 1.0, 1.2), (2.2, 2.0, 2.4))],
    import_seconds=2.0,
    load_seconds=1.0,
    first_seconds=1.3,
    peak_memory=2**30,
    free_memory=20 * 2**30,
    product_rates={"float32, 1": 5e10, "bfloat16, 1": 1e11, "float32, 2": 1e11, "bfloat16, 2": 2e11},
    edit_operations=1.4e11,
)


def limits(cost: MachineCost) -> list[str]:
    return [each.limit for each in page.findings(cost)]


def busy() -> MachineCost:
    """Another program takes half of one core: threads wait, and there are no units for 16 bits."""
    edits = [Edits(1, (4.0,), (2.0,)), Edits(2, (3.8,), (2.4,))]
    machine = {**QUIET.machine, "load": 3.2}
    rates = {**QUIET.product_rates, "bfloat16, 1": 1e10}
    return replace(QUIET, edits=edits, machine=machine, dtype="float32", product_rates=rates)


def test_what_follows_from_the_numbers() -> None:
    assert QUIET.speedup == pytest.approx(2.0 / 1.1)
    assert QUIET.share_of_limit == pytest.approx(1.4e11 / 1.96 / 1e11)
    assert QUIET.photographs(100, 12) == pytest.approx(3 + 100 * 12 * 1.1)
    assert QUIET.all_threads.share_of_cores == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("cost", "expected"),
    [
        (QUIET, ["arithmetic"]),
        (replace(QUIET, edit_operations=1e10), ["moving data, and small operations"]),
        (replace(QUIET, machine={**QUIET.machine, "load": 0.6}), ["other programs", "arithmetic"]),
        (replace(QUIET, threads=1, edits=QUIET.edits[:1]), ["threads", "arithmetic"]),
        (replace(QUIET, peak_memory=30 * 2**30), ["memory", "arithmetic"]),
        (replace(QUIET, edits=[QUIET.edits[0], Edits(2, (1.9,), (3.8,))]), ["cores that are not free", "arithmetic"]),
        (
            busy(),
            [
                "other programs",
                "cores that are not free",
                "no bfloat16 units",
                "arithmetic",
            ],
        ),
    ],
)
def test_what_limits_an_edit_is_named_in_order(cost: MachineCost, expected: list[str]) -> None:
    assert limits(cost) == expected


def test_the_text_begins_with_the_warning_and_fits_a_screen() -> None:
    text = page.as_text(busy())
    first, _, second, *_ = text.splitlines()
    assert first == "What an edit costs on this machine"
    assert second.startswith("WARNING: Measured on a busy machine: one thread got 50 % of a core; the load was 3.2")
    assert re.search(r"100 photos of 12 megapixels \(estimated\) +76 min as measured; 40 min on one free core\n", text)
    assert re.search(r"one photo of 1 megapixel, 2 threads +3\.8 s\n", text)
    assert len(text.splitlines()) < 50
    assert "WARNING" not in page.as_text(QUIET)


def test_files_hold_the_same_in_three_forms(tmp_path: Path) -> None:
    for suffix in page.WRITERS:
        page.write_page(busy(), tmp_path / "new" / f"page{suffix}")
    written = {file.suffix: file.read_text(encoding="utf-8") for file in (tmp_path / "new").iterdir()}
    assert set(written) == set(page.WRITERS)
    assert '<p class="scope">Measured on a busy machine' in written[".html"]
    assert "<td>A | B, 2 cores, 24 GiB</td>" in written[".html"]
    assert "| processor | A \\| B, 2 cores, 24 GiB |" in written[".md"]
    stored = json.loads(written[".json"])
    assert [each["limit"] for each in stored["limits"]] == limits(busy())
    assert stored["seconds_for_100_photographs"]["12 MP"] == pytest.approx(3 + 1200 * 3.8)
    with pytest.raises(OpenwuError, match=r"--output: expected a file that ends in .html, .md, .json, got page.txt"):
        page.write_page(QUIET, Path("page.txt"))


def test_the_command_measures_and_prints_json_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "PRODUCT", 64)
    monkeypatch.setattr(measure, "ROUNDS", 1)
    monkeypatch.setattr(
        measure, "first_edit", lambda _: {"import": 1.0, "load": 1.0, "first": 1.0, "peak": measure.peak_memory()}
    )
    threads = torch.get_num_threads()
    monkeypatch.setattr("openwu.evaluation.machine.measure.measure_machine", lambda note: measure_machine(note, 64))
    assert cli.main(["bench", "--json", "--output", str(tmp_path / "page.md")]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert torch.get_num_threads() == threads
    assert [each["threads"] for each in found["edits"]] == sorted({1, threads})
    assert all(second > 0 for each in found["edits"] for second in each["seconds"])
    assert found["share_of_limit"] > 0
    assert 1e8 < found["edit_operations"] < 1e11
    assert "matrix products" in captured.err
    assert (tmp_path / "page.md").read_text(encoding="utf-8").startswith("# What an edit costs on this machine")


def test_the_first_edit_is_that_of_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measure.first_edit(32)
    assert set(found) == {"import", "load", "first", "peak"}
    assert all(found[name] > 0 for name in ("import", "load", "first"))
    monkeypatch.setattr(measure, "FRESH", "raise SystemExit('no such model')")
    with pytest.raises(OpenwuError, match="the process of the first edit ended with 1: no such model"):
        measure.first_edit(32)


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["--output", "page.pdf"], "expected a file that ends in .html", cli.FAILED),
        (["--json", "C1"], "--json: the page of this machine has it", USAGE),
    ],
)
def test_bad_options_are_refused_before_anything_is_measured(
    words: list[str], message: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *words]) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out

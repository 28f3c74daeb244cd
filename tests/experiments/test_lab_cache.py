"""Finished trials of long experiments: found again, run again where they are missing, broken or of other settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from openwu.cli import main
from openwu.errors import OpenwuError
from openwu.evaluation.experiments import runs
from openwu.evaluation.experiments.results import UNCACHED, ResultCache, TrialResult
from openwu.training.embedded.model import EmbeddedModel

RESULT = TrialResult({"scores": [1.5, 2.0], "name": "雨"}, {"task/input": torch.rand(3, 2, 2)})


def never() -> TrialResult:
    raise AssertionError("run again")


def test_a_trial_is_run_once_and_its_result_found_as_it_was(tmp_path: Path) -> None:
    ResultCache(tmp_path / "new").get("shared, wide, seed 0", lambda: RESULT)
    found = ResultCache(tmp_path / "new").get("shared, wide, seed 0", never)
    assert found.values == RESULT.values
    torch.testing.assert_close(dict(found.tensors), dict(RESULT.tensors))


def test_without_a_folder_every_trial_is_run() -> None:
    assert UNCACHED.get("one", lambda: RESULT) is RESULT
    with pytest.raises(AssertionError, match="run again"):
        UNCACHED.get("one", never)


def test_a_trial_that_fails_leaves_nothing_and_another_name_is_another_trial(tmp_path: Path) -> None:
    cache = ResultCache(tmp_path)
    with pytest.raises(AssertionError, match="run again"):
        cache.get("one", never)
    assert list(tmp_path.iterdir()) == []
    cache.get("one", lambda: RESULT)
    with pytest.raises(AssertionError, match="run again"):
        cache.get("two", never)


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_a_broken_result_is_made_again(tmp_path: Path, suffix: str) -> None:
    cache = ResultCache(tmp_path)
    cache.get("one", lambda: RESULT)
    file = tmp_path / f"one.{suffix}"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert cache.get("one", lambda: TrialResult({"new": 1})).values == {"new": 1}
    assert cache.get("one", never).values == {"new": 1}


def test_trials_on_other_photographs_stand_elsewhere(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quick run tests on fewer photographs, also where edits and steps are those of a full one."""
    folders: list[Path] = []

    def stop(*arguments: object) -> None:
        cache = arguments[-1]
        assert isinstance(cache, ResultCache)
        assert cache.folder is not None
        folders.append(cache.folder)
        raise OpenwuError("enough")

    monkeypatch.setattr(runs, "continual", stop)
    monkeypatch.setattr(runs, "load_folder", lambda _: [])
    monkeypatch.setattr(runs, "load_test_photographs", lambda _: dict.fromkeys(runs.QUICK_PHOTOGRAPHS))
    photos = tmp_path / "photos"
    photos.mkdir()
    words = ["--model", str(model_folder), "--output", str(tmp_path), "--photos", str(photos), "--steps", "9"]
    words += ["--edit", "warm", "--edit", "cool"]
    for more in ([], [], ["--quick"]):
        assert main(["lab", "continual", *words, *more]) == 1
    (photos / "new.jpg").write_bytes(b"another")
    assert main(["lab", "continual", *words]) == 1
    full, again, quick, photographed = folders
    assert full == again
    assert len({full, quick, photographed}) == 3


@pytest.mark.parametrize("part", ["instruction", "backbone", "condition", "generator"])
def test_trials_of_another_model_stand_elsewhere(
    model_folder: Path, tmp_path: Path, part: str, embedded_model: EmbeddedModel
) -> None:
    """Also where what changed is the generator alone, whose adapters some methods serve."""
    photos = tmp_path / "photos"
    photos.mkdir()
    settings = runs.LabSettings(output=str(tmp_path), photos=str(photos))
    model = embedded_model.copy()
    before = settings.cache("shown", model).folder
    assert settings.cache("shown", embedded_model).folder == before
    changed = next(iter(getattr(model, part).parameters()))
    with torch.no_grad():
        changed += 1
    assert settings.cache("shown", model).folder != before

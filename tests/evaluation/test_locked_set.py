"""The locked test set: used by nothing else, looked at once per release, and every look is recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from openwu.cli import main
from openwu.data.suite import EDITS
from openwu.data.suite import locked as locked_set
from openwu.data.suite.locked import locked_digest, locked_photographs, locked_sentences
from openwu.data.suite.photographs import TEST_PHOTOGRAPHS, folder_hashes
from openwu.data.suite.phrases import letters, load_phrases
from openwu.errors import DatasetError, OpenwuError
from openwu.evaluation.benchmarks import locked
from openwu.evaluation.benchmarks.locked import LockedScores, locked_scores, look, read_record
from openwu.evaluation.experiments.geometry import Mean
from openwu.training.embedded.model import EmbeddedModel

ROOT = Path(__file__).parents[2]
SCORES = LockedScores({"new sub-tasks": {"input": Mean(15, 14, 16), "generated": Mean(30, 29, 31)}}, 0.9)


def test_every_sub_task_has_sentences_that_are_used_nowhere_else() -> None:
    used = {
        letters(sentence)
        for languages in load_phrases().values()
        for splits in languages.values()
        for sentences in splits.values()
        for sentence in sentences
    }
    assert set(locked_sentences()) == set(EDITS)
    own = [letters(sentence) for each in locked_sentences().values() for sentence in each.values()]
    assert not used & set(own)
    assert len(set(own)) == len(own) == 2 * len(EDITS)


def test_its_photographs_are_in_no_training_and_no_other_test(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = json.loads((ROOT / "src/openwu/data/suite/locked.json").read_text(encoding="utf-8"))["photographs"]
    assert not {each["path"] for each in stored.values()} & {path for _, path in TEST_PHOTOGRAPHS.values()}
    assert not {each["sha256"] for each in stored.values()} & set(folder_hashes(ROOT / "photos").values())
    assert all(each["licence"] for each in stored.values())
    found = locked_photographs(32)
    assert [max(picture.shape) for picture in found.values()] == [32] * 4
    assert all(picture.std(0).max() > 0.01 for picture in found.values())  # in colour
    other = {name: {**entry, "sha256": "0"} for name, entry in stored.items()}
    monkeypatch.setattr(locked_set, "_stored", lambda: {"photographs": other})
    with pytest.raises(DatasetError, match=r"expected matplotlib/.*grace_hopper\.jpg with SHA-256 0, got"):
        locked_photographs(32)


def test_the_record_of_the_tree_is_about_this_set() -> None:
    """Whoever changes the set has to begin a new record, which shows."""
    assert read_record(ROOT / locked.RECORD)["set"] == locked_digest()


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty record; measuring is replaced, and the tree has no uncommitted changes."""
    monkeypatch.setattr(locked, "locked_scores", lambda *_: SCORES)
    monkeypatch.setattr(locked, "locked_photographs", lambda _: {})
    monkeypatch.setattr(locked, "uncommitted", lambda: False)
    path = tmp_path / "locked.json"
    path.write_text(json.dumps({"set": locked_digest(), "looks": []}))
    return path


def released(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(locked, "origin", lambda: {"openwu": version, "date": "2030-01-02", "commit": "abc"})


def test_a_release_is_looked_at_once(
    record: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    released(monkeypatch, "1.0.0")
    assert main(["eval", "locked", "--record", str(record)]) == 0
    assert "understood: 90%" in capsys.readouterr().out
    before = record.read_bytes()
    with pytest.raises(OpenwuError, match=r"release 1\.0\.0 was looked at on 2030-01-02"):
        look(record)
    assert record.read_bytes() == before
    released(monkeypatch, "1.1.0")
    look(record)
    looks = read_record(record)["looks"]
    assert [each["origin"]["openwu"] for each in looks] == ["1.0.0", "1.1.0"]
    assert looks[0]["means"]["new sub-tasks"]["generated"]["value"] == 30
    assert len(looks[0]["weights"]) == 64


def test_looks_cannot_be_taken_out_or_changed(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("1.0.0", "1.1.0", "1.2.0"):
        released(monkeypatch, version)
        look(record)
    stored = json.loads(record.read_text())
    for looks in (stored["looks"][1:], [{**stored["looks"][0], "understood": 1.0}, *stored["looks"][1:]]):
        record.write_text(json.dumps({**stored, "looks": looks}))
        with pytest.raises(OpenwuError, match=r"looks before number [12] in .* were changed or taken out"):
            look(record)


def test_uncommitted_changes_another_set_and_a_missing_record_are_refused(
    record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released(monkeypatch, "1.0.0")
    monkeypatch.setattr(locked, "uncommitted", lambda: True)
    with pytest.raises(OpenwuError, match="expected a repository without uncommitted changes"):
        look(record)
    with pytest.raises(OpenwuError, match=r"expected the record of all looks at .*nowhere"):
        look(record.with_name("nowhere"))
    record.write_text(json.dumps({"set": "0", "looks": []}))
    with pytest.raises(OpenwuError, match="a changed set is another set"):
        look(record)


def test_scores_are_means_of_groups_alone(embedded_model: EmbeddedModel) -> None:
    photographs = {
        name: torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("ab")
    }
    found = locked_scores(embedded_model, photographs, ("blur", "darken", "fog"))
    stored = json.dumps(found.to_json())
    assert set(found.means) == {"new sub-tasks", "known ones"}
    assert all(set(methods) == {"input", "base", "generated"} for methods in found.means.values())
    assert not any(name in stored for name in ("blur", "darken", "fog"))
    assert found.table().startswith("locked set")

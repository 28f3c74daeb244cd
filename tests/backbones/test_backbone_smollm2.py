"""The packaged language model is converted once and kept; what is kept is what was read."""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from language_cases import language_model
from openwu.backbones.causal_lm import loading

Reads = list[Path]


@pytest.fixture
def reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reads:
    """The GGUF files that were read; a tiny model stands for each."""
    package, found = tmp_path / "package", list[Path]()
    package.mkdir()
    (package / "model.gguf").write_bytes(b"weights")
    spec = ModuleSpec(loading.SMOLLM2, None, is_package=True)
    spec.submodule_search_locations = [str(package)]

    def read(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        found.append(file)
        base = language_model()
        return base.model, base.tokenizer

    monkeypatch.setattr(loading, "find_spec", lambda _: spec)
    monkeypatch.setattr(loading, "_from_gguf", read)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return found


def test_the_second_load_reads_what_the_first_has_kept(reads: Reads) -> None:
    (first, words), (second, same) = loading.load_smollm2(), loading.load_smollm2()
    assert len(reads) == 1
    own, kept = first.state_dict(), second.state_dict()
    assert own.keys() == kept.keys()
    assert all(torch.equal(own[name], kept[name]) for name in own)
    assert words.get_vocab() == same.get_vocab()
    assert not second.training


@pytest.mark.parametrize("damaged", ["config.json", "model.safetensors"])
def test_a_damaged_copy_is_made_anew(damaged: str, reads: Reads, tmp_path: Path) -> None:
    loading.load_smollm2()
    (kept,) = (tmp_path / "cache" / "openwu").iterdir()
    (kept / damaged).write_bytes(b"{")
    loading.load_smollm2()
    assert len(reads) == 2
    loading.load_smollm2()
    assert len(reads) == 2


def test_another_file_is_another_copy(reads: Reads) -> None:
    loading.load_smollm2()
    reads[0].write_bytes(b"other weights")
    loading.load_smollm2()
    assert len(reads) == 2


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(reads: Reads, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    loading.load_smollm2()
    loading.load_smollm2()
    assert len(reads) == 2

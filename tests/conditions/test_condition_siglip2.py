"""SigLIP 2 with random weights, on disk: what it reads, and as the condition of a generator."""

from __future__ import annotations

from pathlib import Path

import base_cases
import pytest
import tiny_pipelines
import torch

from openwu.conditions.siglip2 import PICTURES, Siglip2
from openwu.editor.compatibility import encoder_for, generator_config
from openwu.errors import CheckpointError, InstructionError
from openwu.generator.model import ParameterGenerator
from openwu.types import BaseRequest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.siglip2(tmp_path_factory.mktemp("siglip2") / "tiny")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Siglip2:
    return Siglip2(base_cases.backbone("flux-kontext"), str(folder))


def test_it_reads_text_and_all_pictures_and_a_batch_is_its_samples(encoder: Siglip2) -> None:
    one, two = base_cases.requests(2)
    two = BaseRequest((*two.pictures, base_cases.picture(5, 96, 48)), two.instruction)
    together = encoder.condition([one, two])
    widths = encoder.condition_widths
    assert together.tokens.shape == (2, 32, widths["text"])
    assert together.more[PICTURES].tokens.shape[2] == widths[PICTURES] == 25
    mask = together.more[PICTURES].mask
    assert mask is not None
    counts = mask.sum(1).tolist()
    assert 0 < counts[0] <= 256 < counts[1] <= 512, "256 patches at most for each picture"
    assert set(together.more[PICTURES].tokens[1][mask[1]][:, -1].tolist()) == {0.0, 1.0}
    for i, request in enumerate((one, two)):
        alone = encoder.condition([request])
        torch.testing.assert_close(alone.tokens[0], together.tokens[i], rtol=1e-4, atol=1e-5)
        own = together.more[PICTURES].tokens[i][mask[i]]
        torch.testing.assert_close(alone.more[PICTURES].tokens[0], own, rtol=1e-4, atol=1e-5)


def test_other_words_and_other_pictures_read_differently(encoder: Siglip2) -> None:
    one, two = base_cases.requests(2)
    first = encoder.condition([one])
    other = encoder.condition([BaseRequest(two.pictures, one.instruction)])
    assert torch.equal(first.tokens, other.tokens)
    assert not torch.allclose(first.more[PICTURES].tokens, other.more[PICTURES].tokens)
    assert not torch.allclose(first.tokens, encoder.condition([BaseRequest(one.pictures, two.instruction)]).tokens)


def test_a_generator_s_config_finds_it_again(encoder: Siglip2, folder: Path, tmp_path: Path) -> None:
    base = base_cases.backbone("flux-kontext")
    config = generator_config(
        base, encoder=encoder, rank=4, alpha=4, token_dim=32, d_model=32, head_dim=16, dim_accumulation=2,
        num_pg_layers=1,
    )  # fmt: skip
    ParameterGenerator(config).save_pretrained(tmp_path / "generator")
    loaded = ParameterGenerator.from_pretrained(tmp_path / "generator")
    again = encoder_for(loaded.config, base, "flux-kontext")
    assert isinstance(again, Siglip2)
    request = base_cases.requests(1)
    assert torch.equal(again.condition(request).tokens, encoder.condition(request).tokens)
    assert loaded(again.condition(request)).batch == 1


def test_what_cannot_be_read(encoder: Siglip2, tmp_path: Path) -> None:
    with pytest.raises(InstructionError, match="expected at most 32 tokens for SigLIP 2"):
        encoder.condition([BaseRequest((base_cases.picture(1),), "letters " * 20)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="expected a SigLIP 2 model"):
        Siglip2(base_cases.backbone("flux-kontext"), str(tmp_path / "empty"))

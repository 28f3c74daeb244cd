"""Digests that stand in files which outlive the code that wrote them: provenance, names of cached rows, checkpoints.

The numbers were written down once. A change of one of them makes every such file a stranger's: a training would not go
on, encoded pairs would be encoded again, a base would no longer be the one that a generator was trained on.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from openwu.backbones.embedded.config import WEIGHTS
from openwu.data.pairs import Pair, Pairs, pairs_hashes
from openwu.data.suite import phrases
from openwu.data.suite.photographs import folder_hashes
from openwu.editor.compatibility import fingerprint
from openwu.training.bases.encoded_rows import RowStore

ROW = "8c70cbea961550c91b7e6c1be661d004ea2eb83094fa44c231b7a8b15515457a"
PHOTOS = Path(__file__).parents[1] / "photos"


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """Bytes of files that no decoder looks at, and one picture in memory."""
    (tmp_path / "a.png").write_bytes(b"first")
    (tmp_path / "b.png").write_bytes(b"second")
    drawn = Image.frombytes("RGB", (2, 1), bytes(range(6)))
    return Pair((tmp_path / "a.png", drawn), ("make it é", "or so"), tmp_path / "b.png", "age", "pairs.jsonl:1")


def test_photographs_are_those_of_the_shipped_weights() -> None:
    provenance = json.loads((WEIGHTS / "provenance.json").read_text(encoding="utf-8"))
    assert folder_hashes(PHOTOS) == provenance["photographs"]


def test_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phrases, "_FILE", tmp_path / "phrases.json")
    (tmp_path / "phrases.json").write_bytes(b'{"edits": {}}\n')
    (tmp_path / "two_wishes.json").write_bytes(b'{"people": {}}\n')
    assert phrases.phrases_hash() == "e078bc443929624e1a8cd2970e3940aed0c81bdfd9dcc3b6d4f20868752574ee"


def test_pairs(pair: Pair) -> None:
    expected = "6154cc56dfa51af941062f8ebe86ae17a033f8e8f98a64c513b8ff345fe5d8b7"
    assert pairs_hashes(Pairs((pair,))) == {"pairs.jsonl:1": expected}


def test_names_of_encoded_rows(pair: Pair, tmp_path: Path) -> None:
    path = RowStore(tmp_path / "rows", "a base at 512").path(pair, "make it é")
    assert path.parent.parent == tmp_path / "rows"
    assert (path.parent.name, path.name) == ("8c", f"{ROW}.safetensors")


def test_seeds_of_conditions_that_read_noise(pair: Pair) -> None:
    from openwu.training.bases.encoded_rows import _seed_of

    assert _seed_of(pair, "make it é") == 871957628


def test_what_a_training_of_a_large_base_depends_on() -> None:
    from openwu.training.bases.pipelines import _description
    from openwu.training.config import PipelineRun, StageConfig

    depends = json.loads(
        _description(
            PipelineRun(name="a", model="flux2-klein", generator=StageConfig(1, ((1, 0),), 1e-3, 0)),
            {"pairs.jsonl:1": "ab"},
            "base",
        )
    )
    assert depends["pairs"] == "09648c51a01fceb1570f043aeeac9a6cb9de7969e25adb8343aa362dfd95b861"


def test_folders_of_large_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from openwu.backbones.diffusers import loading

    monkeypatch.setattr(loading, "_SAMPLES", 3)
    monkeypatch.setattr(loading, "_SAMPLE", 4)
    for name, content in (
        ("vae/config.json", b"{}"),
        ("denoiser/model.safetensors", bytes(range(40))),
        ("denoiser/notes.md", b"not read"),
        ("model_index.json", b"not read either"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert loading.pipeline_fingerprint(tmp_path) == "d554dad010c1686dea38b303118ffe4964e9ee64204a87269915dbd302dcb615"


def test_weights_of_siglip2() -> None:
    from openwu.files.weights import sampled_digest

    module = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)).requires_grad_(False)
    for number, value in enumerate(module.state_dict().values()):
        value.copy_(torch.arange(value.numel()).view_as(value) + number / 4)
    assert sampled_digest({"": module}) == "7b5392b0d8bae0de8b955b21cc7458ea83cb902c0d19763ce683c3a6db696b0c"


def test_adapted_weights_of_a_base() -> None:
    assert fingerprint({"b": (3, 4, None), "a": (1, 2, 8)}) == "50df229aed85"

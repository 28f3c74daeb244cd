"""Two edits in one pass against two passes, written out for one combination."""

from __future__ import annotations

import pytest
import torch

from openwu.data.suite import EDITS
from openwu.data.suite.core import Scene
from openwu.data.suite.phrases import load_phrases
from openwu.evaluation import composition
from openwu.evaluation.cases import Case, edit
from openwu.evaluation.composition import COMBINATIONS, Composed, evaluate_composition, mean_gap
from openwu.evaluation.metrics import psnr
from openwu.evaluation.tables import composition_table
from openwu.training.embedded.model import EmbeddedModel
from openwu.types import Adapter


def test_combinations_are_of_two_edits_of_one_picture() -> None:
    assert len(set(COMBINATIONS)) == len(COMBINATIONS) >= 20
    for pair in COMBINATIONS:
        assert set(pair) <= set(EDITS)
        assert pair[0] != pair[1]
        assert not any(EDITS[name].needs_reference for name in pair)


@torch.inference_mode()
def test_both_ways_are_what_they_say(
    embedded_model: EmbeddedModel, photographs: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """("warm", "vignette") is a function of the picture alone, so that the target can be made again."""
    model, seen = embedded_model, list[Case]()

    def watch(model: EmbeddedModel, cases: list[Case], *rest: object) -> list[torch.Tensor]:
        seen.extend(cases)
        return edit(model, cases, *rest)

    monkeypatch.setattr(composition, "edit", watch)
    found, cells = evaluate_composition(model, photographs, ("vignette", "warm", "sepia"))
    assert [(each.first, each.second) for each in found] == [("warm", "vignette"), ("sepia", "vignette")]
    assert list(cells) == ["warm + vignette", "sepia + vignette"]
    picture, one_pass, two_passes, target = cells["warm + vignette"]
    planes = seen[0].planes[None]
    assert torch.equal(picture, photographs["astronaut"])
    assert all(torch.equal(case.planes[None], planes) for case in seen[:3])

    def made(name: str, source: torch.Tensor) -> torch.Tensor:
        return EDITS[name].make_pair(Scene(source, planes[0, :1], torch.Generator())).target

    assert torch.equal(target, made("vignette", made("warm", picture)))
    text = [model.instruction([load_phrases()[name]["en"]["train"][0]]) for name in ("warm", "vignette")]
    adapters = [model.adapt(picture[None], tokens) for tokens in text]
    summed = model.edit(picture[None], planes, torch.cat(text, dim=1), Adapter.sum(adapters))[0]
    torch.testing.assert_close(one_pass, summed, atol=1e-4, rtol=0)
    first = model.edit(picture[None], planes, text[0], adapters[0]).clamp(0, 1)
    second = model.edit(first, planes, text[1], model.adapt(first, text[1]))[0]
    torch.testing.assert_close(two_passes, second, atol=1e-3, rtol=0)
    assert float((one_pass - two_passes).abs().max()) > 0.01
    scores = (found[0].input, found[0].first_only, found[0].one_pass, found[0].two_passes)
    shown = (picture, first[0], one_pass, two_passes)
    assert scores == pytest.approx([float(psnr(each, target)) for each in shown], abs=0.01)


def test_no_combination_is_known(embedded_model: EmbeddedModel, photographs: dict[str, torch.Tensor]) -> None:
    assert evaluate_composition(embedded_model, photographs, ("brighten", "darken", "blur")) == ([], {})
    assert composition_table([]) == "The model knows both edits of none of the combinations.\n\n"


def test_the_table_counts_where_one_pass_helps() -> None:
    found = [
        Composed("warm", "vignette", input=20, first_only=22, one_pass=30, two_passes=31),
        Composed("fog", "cool", input=20, first_only=25, one_pass=24, two_passes=26),
    ]
    assert mean_gap(found) == pytest.approx(-1.5)
    text = composition_table(found)
    assert "| warm, then vignette | 20.0 | 22.0 | 30.0 | 31.0 |" in text
    assert "in 1 of 2 combinations; on average it is -1.5 dB against two passes" in text

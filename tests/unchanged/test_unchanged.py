"""Edits, adapters, a checkpoint round trip and exports are what they were when `unchanged.json` was written."""

from __future__ import annotations

import json

import pytest
from unchanged_cases import RECORD, Output, digest, machine, outputs

RECORDED = json.loads(RECORD.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def found() -> dict[str, Output]:
    return {output.name: output for output in outputs()}


def test_every_recorded_output_is_made(found: dict[str, Output]) -> None:
    assert list(found) == list(RECORDED["outputs"])


@pytest.mark.parametrize("name", RECORDED["outputs"])
def test_output(found: dict[str, Output], name: str) -> None:
    recorded, output = RECORDED["outputs"][name], found[name]
    if not recorded["probes"] or machine() == RECORDED["machine"]:
        assert digest(output) == recorded["sha256"]
    # Other processors round otherwise: an edited picture may differ by a grey level, a generated number by 1e-4.
    assert output.probes == pytest.approx(recorded["probes"], rel=1e-3, abs=0.05 if name.startswith("edit") else 1e-4)

"""docs/exports.md: its commands and Python lines, run word for word in their order."""

from __future__ import annotations

import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting_cases import PIPELINES, adapter_of, answer, relative_error
from PIL import Image

from openwu import cli
from openwu.export.files import COMFYUI_WEIGHTS
from openwu.registry import EXPORT_FORMATS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "exports.md").read_text(encoding="utf-8")


def test_the_page_works(
    pipelines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    diffusers = pytest.importorskip("diffusers")
    with Image.open(ROOT / "photos" / "life_by_aitzol_berasategi.jpg") as image:
        image.resize((96, 64)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    # The page's pipeline is a tiny one of its kind, without the text encoders that `from_pretrained` would want.
    Path("FLUX.1-Kontext-dev").symlink_to(pipelines / "transformer")
    build, run, _ = PIPELINES["transformer"]
    adapter = adapter_of(pipelines, "transformer")
    adapter.save_pretrained("kontext-adapter")
    adapter.save_pretrained("lora", "comfyui", component="transformer")
    (Path("lora") / COMFYUI_WEIGHTS).rename("some_lora.safetensors")
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert [language for language, _ in blocks] == ["bash", "python", "bash", "python", "python"]
    for language, text in blocks:
        if language == "bash":
            for command in text.splitlines():
                assert cli.main(shlex.split(command)[1:]) == 0, (command, capsys.readouterr().err)
            continue
        with monkeypatch.context() as patch, warnings.catch_warnings():
            # PEFT warns of `proj_out`, which is also another module's last name.
            warnings.simplefilter("ignore")
            patch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda _: build())
            exec(compile(text, "exports.md", "exec"), names)
            if "kontext-lora" in text:
                with torch.no_grad():
                    loaded = run(names["pipeline"].transformer)
    printed = capsys.readouterr()
    assert printed.out.count("checked: ") == 2
    assert printed.err.count("fog-comfyui: written, but not checked: ComfyUI's arithmetic") == 1
    assert names["model"].peft_config
    expected = answer(build().transformer, adapter, run)
    assert relative_error(loaded, expected) < 1e-5
    with torch.no_grad(), names["handle"].applied(names["adapter"]):
        assert relative_error(run(names["pipeline"].transformer), expected) < 1e-5


def test_the_page_names_every_format() -> None:
    row = next(line for line in PAGE.splitlines() if line.startswith("| | `openwu`"))
    assert re.findall(r"`(\w+)`", row) == list(EXPORT_FORMATS)

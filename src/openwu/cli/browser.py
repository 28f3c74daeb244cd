"""Run `openwu browser`: write the embedded model as a static page that edits in the browser."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from openwu.backbones.embedded.base import EmbeddedBase
from openwu.cli.console import UsageError, note, say
from openwu.editor import editor as editors
from openwu.export.embedded.onnx import write_page
from openwu.types import LoadingOptions


def run(arguments: argparse.Namespace) -> int:
    editor = editors.Editor.from_pretrained(arguments.model, loading=LoadingOptions(dtype=torch.float32))
    base = editor.backbone
    if not isinstance(base, EmbeddedBase):
        raise UsageError(f"--model: expected an embedded model, got {editor.name}; leave it out for the package's")
    runtime = None if arguments.runtime is None else Path(arguments.runtime)
    output = Path(arguments.output)
    note("exporting three graphs, which takes a few minutes of one processor core")
    written = write_page(base, editor.generator, output, runtime=runtime, check=not arguments.no_check)
    say(f"{output}: {written.bytes_to_load / 1e6:.1f} MB")
    for name, found in written.differences.items():
        say(f"checked: {name}.onnx differs from PyTorch by at most {found:.1e} of its largest number")
    if runtime is None:
        note(f"{output}: without onnxruntime-web the page does not run; name its folder with --runtime FOLDER")
    else:
        say(f"try it: python -m http.server --directory {output}")
    return 0

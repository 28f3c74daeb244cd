"""Run `openwu export`, an adapter for another library, and `openwu browser`, the embedded model for browsers."""

from __future__ import annotations

import argparse
from pathlib import Path

from openwu.cli.console import UsageError, note, say
from openwu.errors import CheckpointError, OpenwuError
from openwu.export.proof import Base, export, find_base, fits
from openwu.types import Adapter


def run(arguments: argparse.Namespace) -> int:
    output = Path(arguments.output)
    if output.is_dir() and any(output.iterdir()) and not arguments.overwrite:
        raise OpenwuError(f"{output}: already holds files; choose another folder or allow overwriting (--overwrite)")
    if arguments.component is not None and arguments.format not in ("diffusers", "comfyui"):
        raise UsageError(f"--component: {arguments.format} has none; leave it out")
    base, unavailable = _base(arguments.base)
    adapter = Adapter.from_pretrained(
        arguments.adapter,
        model=None if base is None else base.model,
        skip_text_encoders=arguments.skip_text_encoders,
    )
    if arguments.sample is not None:
        if arguments.sample >= adapter.batch:
            raise OpenwuError(f"--sample: expected a number below {adapter.batch}, got {arguments.sample}")
        adapter = adapter.select([arguments.sample])
    if arguments.base is None:
        base, unavailable = _embedded(adapter)
    outcome = export(
        adapter,
        output,
        arguments.format,
        base=base,
        component=arguments.component,
        check=not arguments.no_check,
        unavailable=unavailable,
    )
    say(f"{arguments.adapter} -> {output}")
    if outcome.checked:
        say(f"checked: {outcome.told}")
    else:
        note(f"{output}: written, but not checked: {outcome.told}")
    return 0


def run_browser(arguments: argparse.Namespace) -> int:
    """Run `openwu browser`: write the embedded model as a static page that edits in the browser."""
    import torch

    from openwu.backbones.embedded.base import EmbeddedBase
    from openwu.editor.editor import Editor
    from openwu.export.embedded.onnx import write_page
    from openwu.types import LoadingOptions

    editor = Editor.from_pretrained(arguments.model, loading=LoadingOptions(dtype=torch.float32))
    base = editor.backbone
    if not isinstance(base, EmbeddedBase):
        raise UsageError(f"--model: expected an embedded model, got {editor.name}; leave it out for the package's")
    runtime = None if arguments.runtime is None else Path(arguments.runtime)
    output = Path(arguments.output)
    note("exporting the graphs, which takes a few minutes of one processor core")
    written = write_page(base, editor.generator, output, runtime=runtime, check=not arguments.no_check)
    say(f"{output}: {written.bytes_to_load / 1e6:.1f} MB")
    for name, found in written.differences.items():
        say(f"checked: {name}.onnx differs from PyTorch by at most {found:.1e} of its largest number")
    if runtime is None:
        note(f"{output}: without onnxruntime-web the page does not run; name its folder with --runtime FOLDER")
    else:
        say(f"try it: python -m http.server --directory {output}")
    return 0


def _embedded(adapter: Adapter) -> tuple[Base | None, str]:
    """The base inside the package, for adapters that fit it."""
    try:
        base = find_base(None)
    except CheckpointError as error:
        return None, f"no base model to compare on ({error}); name one with --base FOLDER"
    if fits(adapter, base):
        return base, ""
    return None, "the adapter does not fit the embedded base model; name its own with --base FOLDER"


def _base(folder: str | None) -> tuple[Base | None, str]:
    """The base that the user names; None and the reason where it needs a library that is not installed."""
    if folder is None:
        return None, ""
    try:
        return find_base(Path(folder)), ""
    except ImportError as error:
        return None, f"{folder} needs {error.name or error}, which is not installed; pip install 'openwu[diffusers]'"

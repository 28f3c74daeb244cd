"""Our own editor as a system: the embedded model, or a large base with its generator."""

from __future__ import annotations

import zlib

from PIL import Image

from openwu.editor.editor import Editor
from openwu.errors import InstructionError
from openwu.evaluation.cases import Case
from openwu.evaluation.systems import RefusedError, System
from openwu.files.fingerprint import code_digest
from openwu.types import SamplingOptions


class EditorSystem(System):
    """Edits every case with an adapter of its own."""

    def __init__(self, editor: Editor, *, name: str = "openwu", strength: float = 1.0, adapter: bool = True) -> None:
        """`adapter`: False leaves the frozen base alone, as the baseline (strength 0)."""
        self.editor, self.name = editor, name
        self.strength = strength if adapter else 0.0

    def identity(self) -> dict[str, object]:
        return {
            "kind": "openwu",
            "base": str(self.editor.backbone.identity),
            "generator": self._generator_digest(),
            "code": code_digest("openwu.editor.editor", type(self.editor.backbone).__module__),
            "strength": self.strength,
            "sampling": repr(SamplingOptions() if self.editor.sampling is None else self.editor.sampling),
        }

    def _generator_digest(self) -> str:
        from openwu.files.weights import sampled_digest

        return sampled_digest({"generator": self.editor.generator})

    def edit(self, case: Case) -> Image.Image:
        """Edit one case; noise is drawn with the case's key as seed, so that it is that of `Case.noise`."""
        images = [case.image(i) for i in range(len(case.pictures))]
        seed = zlib.crc32(case.key.encode())
        try:
            return self.editor.edit(images, case.instruction, strength=self.strength, seed=seed).image
        except InstructionError as error:
            raise RefusedError(str(error)) from error

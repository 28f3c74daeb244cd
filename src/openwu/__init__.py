"""openwu: functional memory for frozen foundation models. A generator reads a request and writes a LoRA adapter for it.

The public names are imported on first use, so that `import openwu` and `openwu --help` stay instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from openwu.version import __version__

if TYPE_CHECKING:
    from openwu.adapters.inject import AdapterHandle, attach
    from openwu.config import GeneratorConfig
    from openwu.editor.cache import AdapterCache
    from openwu.editor.editor import Editor
    from openwu.editor.requests import EditRequest, EditResult
    from openwu.errors import OpenwuError
    from openwu.generator.associative import AssociativeGenerator
    from openwu.generator.model import ParameterGenerator
    from openwu.memory.language import LanguageMemory
    from openwu.memory.store import MemoryStore
    from openwu.types import Adapter, Condition, LoadingOptions, SamplingOptions, Target

_WHERE = {
    "Adapter": "openwu.types",
    "AdapterCache": "openwu.editor.cache",
    "AdapterHandle": "openwu.adapters.inject",
    "AssociativeGenerator": "openwu.generator.associative",
    "Condition": "openwu.types",
    "EditRequest": "openwu.editor.requests",
    "EditResult": "openwu.editor.requests",
    "Editor": "openwu.editor.editor",
    "GeneratorConfig": "openwu.config",
    "LanguageMemory": "openwu.memory.language",
    "LoadingOptions": "openwu.types",
    "MemoryStore": "openwu.memory.store",
    "OpenwuError": "openwu.errors",
    "ParameterGenerator": "openwu.generator.model",
    "SamplingOptions": "openwu.types",
    "Target": "openwu.types",
    "attach": "openwu.adapters.inject",
}

__all__ = [
    "Adapter",
    "AdapterCache",
    "AdapterHandle",
    "AssociativeGenerator",
    "Condition",
    "EditRequest",
    "EditResult",
    "Editor",
    "GeneratorConfig",
    "LanguageMemory",
    "LoadingOptions",
    "MemoryStore",
    "OpenwuError",
    "ParameterGenerator",
    "SamplingOptions",
    "Target",
    "__version__",
    "attach",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'openwu' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

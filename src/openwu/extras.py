"""Import optional libraries, or raise an error with the command that installs them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from openwu.errors import OpenwuError


def library(name: str, extra: str = "diffusers") -> Any:
    """The imported module `name`, or an error with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise OpenwuError(
            f"this needs the Python package {error.name or name!r} ({error}); pip install 'openwu[{extra}]'"
        ) from error


@contextmanager
def quiet(*loggings: Any) -> Iterator[None]:
    """Silence for what diffusers and transformers print while they load: bars, and hints about optional packages.

    `loggings`: their modules `utils.logging`; what they were set to comes back.
    """
    before = [(logging, logging.get_verbosity(), logging.is_progress_bar_enabled()) for logging in loggings]
    try:
        for logging in loggings:
            logging.set_verbosity_error()
            logging.disable_progress_bar()
        yield
    finally:
        for logging, verbosity, bar in before:
            logging.set_verbosity(verbosity)
            if bar:
                logging.enable_progress_bar()

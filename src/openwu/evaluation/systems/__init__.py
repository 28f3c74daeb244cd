"""Systems that edit pictures: ours, other people's models on this machine, and those behind an API, each one file.

A system turns a case into one picture, or says why there is none: refused, missing or failed. None of that is a score.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from PIL import Image

from openwu.errors import OpenwuError
from openwu.evaluation.cases import Case


class RefusedError(OpenwuError):
    """A system that declines a case; recorded as `refused`."""


class MissingError(OpenwuError):
    """A picture that should be there and is not; recorded as `missing`."""


@dataclass(frozen=True)
class SystemOptions:
    """What a user chooses about a system."""

    name: str
    model: str | None = None
    """Name of the model at the endpoint, or a local model's folder; None: the system's own."""
    url: str | None = None
    key_variable: str | None = None
    timeout: float = 300.0
    workers: int = 1
    steps: int | None = None
    guidance: float | None = None
    device: str | None = None


class System(ABC):
    """An editor under evaluation."""

    name: str
    """Name in the record and in reports."""
    is_paid: bool = False
    """Whether a call may cost money: then the number of calls is shown and confirmed first."""
    workers: int = 1
    """Cases edited at once."""

    @abstractmethod
    def identity(self) -> dict[str, object]:
        """Return everything that the pictures depend on beside the case: model, settings, version; never a key."""

    def identity_of(self, _case: Case, /) -> dict[str, object]:
        """Return what the picture of one case depends on beside the case and `identity`."""
        return {}

    @abstractmethod
    def edit(self, case: Case) -> Image.Image:
        """Edit one case.

        Raises RefusedError, MissingError, EndpointError where no case can succeed, or another OpenwuError for this
        case alone.
        """

    def check(self) -> None:
        """Raise OpenwuError where nothing can be edited, before the first case."""
        return

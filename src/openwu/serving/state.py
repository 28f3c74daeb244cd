"""What the routes of one app share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request

from openwu.serving.access import LOCAL_HOSTS, Caller, Keys
from openwu.serving.engines import Engine
from openwu.serving.errors import refused
from openwu.serving.metrics import Metrics
from openwu.serving.middleware import BodyLimits
from openwu.serving.queue import Limits, Scheduler
from openwu.serving.stores import AdapterShelf, PictureStore, StoreLimits, UploadStore


@dataclass(frozen=True)
class Settings:
    """What an operator sets."""

    keys: Path | None = None
    """File of API keys; None: no keys, and only this machine is served."""
    hosts: tuple[str, ...] = LOCAL_HOSTS
    """Names under which the service may be called; "*": any."""
    aliases: tuple[str, ...] = ()
    """Further names of the model, for clients that insist on one, such as "gpt-image-1"."""
    max_pixels: int = 50_000_000
    """Of one picture."""
    agents: bool = False
    """Whether `/mcp` offers tools to agents."""
    limits: Limits = field(default_factory=Limits)
    body: BodyLimits = field(default_factory=BodyLimits)
    stores: StoreLimits = field(default_factory=StoreLimits)


class Service:
    """The engine, the queue in front of it, and the stores."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self.metrics = Metrics()
        self.keys = Keys(settings.keys)
        self.scheduler = Scheduler(engine, settings.limits, self.metrics)
        self.adapters = AdapterShelf(settings.stores.store_bytes, settings.stores.adapters_per_key)
        self.pictures = PictureStore(settings.stores.store_bytes)
        self.uploads = UploadStore(settings.stores.store_bytes)
        self._started = False

    async def start(self) -> None:
        """Start the engine, once. Raises OpenwuError where the model cannot be loaded."""
        if not self._started:
            await self.engine.start()
            self.scheduler.seconds_per_unit = self.engine.info.seconds_per_unit
            self._started = True

    @property
    def max_pixels(self) -> int:
        return self.settings.max_pixels

    @property
    def models(self) -> Sequence[str]:
        """The names under which the model is served."""
        return (self.engine.info.name, *self.settings.aliases)

    def check_model(self, name: str | None) -> None:
        """Raise ServiceError (404) for a model that is not served here."""
        if name and name not in self.models:
            message = f"model: expected one of {', '.join(self.models)}, got {name[:80]!r}; leave it out"
            raise refused(404, "model_not_found", message, "model")


def caller_of(request: Request) -> Caller:
    """Say who sent a request. Raises ServiceError (401)."""
    service: Service = request.app.state.service
    found = service.keys.caller(request.headers.get("authorization"))
    request.state.tenant = found.tenant
    return found


Known = Annotated[Caller, Depends(caller_of)]
"""The caller, as a parameter of a route."""

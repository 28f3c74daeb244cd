"""The whole service inside Ray Serve, for `serve deploy` and KubeRay: the app as ingress, the editors behind it.

`openwu serve --ray` is the other way: the app in a process of its own, and only the editors on the cluster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from openwu.errors import OpenwuError
from openwu.extras import library
from openwu.serving.access import LOCAL_HOSTS
from openwu.serving.app import create_app
from openwu.serving.engines import ModelSource
from openwu.serving.engines.cluster import ClusterOptions, RayEngine, deployment
from openwu.serving.queue import Limits
from openwu.serving.state import Settings
from openwu.serving.stores import StoreLimits

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve.handle import DeploymentHandle

T = TypeVar("T")
FRONT = ("keys", "hosts", "aliases", "max_pixels", "agents")
"""Fields of `Settings` that a configuration file may have."""


def application(arguments: Mapping[str, Any]) -> Any:
    """Return the application of Ray Serve, from the `args` of a configuration file.

    They are fields of `ModelSource`, `ClusterOptions`, `Limits`, `StoreLimits` and `Settings`. Raises OpenwuError for
    others, and without `keys`, a file of API keys that is there on every node: Ray's proxies listen to everybody.
    """
    serve = library("ray.serve", "ray")
    cluster = {each.name for each in fields(ClusterOptions)} - {"address"}
    known = {*FRONT, *cluster, *(each.name for kind in (ModelSource, Limits, StoreLimits) for each in fields(kind))}
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise OpenwuError(f"args: expected some of {', '.join(sorted(known))}; got {', '.join(unknown)}")
    if not arguments.get("keys"):
        raise OpenwuError(
            "args: expected keys, a file of API keys (`openwu serve --keys FILE --new-key NAME` makes one)"
        )
    settings = Settings(
        keys=Path(arguments["keys"]),
        hosts=(*LOCAL_HOSTS, *arguments.get("hosts", ())),
        aliases=tuple(arguments.get("aliases", ())),
        max_pixels=int(arguments.get("max_pixels", Settings.max_pixels)),
        agents=bool(arguments.get("agents", False)),
        limits=_of(Limits, arguments),
        stores=_of(StoreLimits, arguments),
    )
    editors = deployment(_of(ModelSource, arguments), _of(ClusterOptions, arguments))
    # One replica: it holds the fair queue, the adapters and the pictures behind links.
    front = serve.deployment(serve.ingress()(Front)).options(
        name="front", num_replicas=1, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}
    )
    return front.bind(editors, settings)


class Front:
    """The ingress: the app over the replicas' handle."""

    def __init__(self, editors: DeploymentHandle, settings: Settings) -> None:
        self._editors, self._settings = editors, settings

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the app; Ray Serve calls this once, and starts and stops the engine with it."""
        from ray import serve

        engine = RayEngine(lambda: self._editors, lambda: None, serve.get_replica_context().app_name)
        return create_app(engine, self._settings)


def _of(kind: type[T], arguments: Mapping[str, Any]) -> T:
    """Make a dataclass of those arguments that are fields of it."""
    names = [each.name for each in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: arguments[name] for name in names if name in arguments})

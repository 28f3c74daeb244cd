"""A Ray cluster of several nodes on this machine, for the tests of the service and of bulk work."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PATIENCE = {
    "RAY_raylet_start_wait_time_s": "400",
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_agent_register_timeout_ms": "600000",
    "RAY_gcs_server_request_timeout_seconds": "300",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "600",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "600",
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
}
"""Of Ray's own processes: the machine may have a lot to do."""


class Nodes:
    """The nodes of a cluster; the head runs nothing of ours."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(shutdown_at_exit=False)
        self._cluster.add_node(wait=False, num_cpus=0, include_dashboard=False, **_ports())
        self.address: str = self._cluster.address

    def add(self, cpus: int = 1) -> Any:
        """Start a node."""
        return self._cluster.add_node(wait=False, num_cpus=cpus, **_ports())

    def kill(self, node: Any) -> None:
        """Kill a node with all that runs on it."""
        self._cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        self._cluster.shutdown()


@contextmanager
def nodes(cpus: list[int]) -> Iterator[tuple[Nodes, list[Any]]]:
    """A head and further nodes for the time of a block."""
    os.environ.update(PATIENCE)
    made = Nodes()
    try:
        yield made, [made.add(each) for each in cpus]
    finally:
        made.close()


def _ports() -> dict[str, int]:
    """Ports of a node's helpers, so that it need not wait until they have chosen their own."""
    names = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
    held = [socket.create_server(("127.0.0.1", 0)) for _ in names]
    try:
        return {name: each.getsockname()[1] for name, each in zip(names, held, strict=True)}
    finally:
        for each in held:
            each.close()


def processes(title: str) -> list[int]:
    """Process ids of Ray's workers whose title has this in it."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if command.startswith(b"ray::") and title.encode() in command:
                found.append(int(folder.name))
    return found


def kill_one(title: str) -> None:
    """Kill the first of Ray's workers whose title has this in it."""
    os.kill(processes(title)[0], signal.SIGKILL)

"""Figures for Prometheus; no label ever holds what a user wrote."""

from __future__ import annotations

from typing import Any

from openwu.extras import library


class Metrics:
    """All figures of one app, in a registry of its own."""

    def __init__(self) -> None:
        """Raises OpenwuError where prometheus-client is not installed."""
        prometheus = self._prometheus = library("prometheus_client", "serve")
        self.registry = prometheus.CollectorRegistry()

        def made(kind: str, name: str, text: str, labels: tuple[str, ...] = (), **more: Any) -> Any:
            return getattr(prometheus, kind)(f"openwu_{name}", text, labels, registry=self.registry, **more)

        seconds = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
        self.requests = made("Counter", "requests_total", "Answers", ("endpoint", "status"))
        self.queue_length = made("Gauge", "queue_length", "Jobs that wait")
        self.queued_seconds = made("Gauge", "queued_seconds", "Seconds of work that wait")
        self.queue_wait = made("Histogram", "queue_wait_seconds", "Time that jobs waited", buckets=seconds)
        self.stages = made("Histogram", "stage_seconds", "Time of a stage", ("stage",), buckets=seconds)
        self.batch_size = made("Histogram", "batch_size", "Jobs of one pass", buckets=(1, 2, 4, 8, 16, 32))
        self.cancelled = made("Counter", "cancelled_total", "Jobs whose client left")
        self.rejected = made("Counter", "rejected_total", "Requests refused for load", ("reason",))
        self.retried = made("Counter", "retried_total", "Jobs run again because their worker died")
        self.cache = made("Counter", "adapter_cache_total", "Adapters by where they came from", ("found",))
        self.restarts = made("Gauge", "worker_restarts", "Workers that were started again")

    def text(self) -> bytes:
        """Return the figures in Prometheus' text format."""
        text: bytes = self._prometheus.generate_latest(self.registry)
        return text

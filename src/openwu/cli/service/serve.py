"""Run `openwu serve`: check the arguments, then serve until a signal ends it."""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from openwu.cli.console import UsageError, note, say

if TYPE_CHECKING:
    from openwu.serving.engines import Engine, ModelSource


def run(arguments: argparse.Namespace) -> int:
    """Serve, or with --new-key add a key to the file and print it."""
    from openwu.serving.access import LOCAL_HOSTS, new_key
    from openwu.serving.middleware import BodyLimits
    from openwu.serving.queue import Limits
    from openwu.serving.server import Address, serve
    from openwu.serving.state import Settings
    from openwu.serving.stores import StoreLimits

    keys = Path(arguments.keys) if arguments.keys else None
    if arguments.new_key:
        if keys is None:
            raise UsageError("--new-key: expected with --keys FILE, where its hash is kept; add that")
        say(new_key(keys, arguments.new_key, admin=arguments.admin))
        return 0
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it describes bodies byte by byte
    logging.getLogger("openwu.serving").setLevel(logging.WARNING if arguments.quiet else logging.INFO)
    settings = Settings(
        keys=keys,
        hosts=(*LOCAL_HOSTS, *arguments.allow_host),
        aliases=tuple(arguments.alias),
        agents=arguments.mcp,
        max_pixels=round(arguments.max_megapixels * 1e6),
        limits=Limits(arguments.queue_seconds, arguments.key_seconds, request_seconds=arguments.request_seconds),
        body=BodyLimits(round(arguments.max_body_mb * 2**20)),
        stores=StoreLimits(arguments.adapters_per_key, round(arguments.store_mb * 2**20)),
    )
    certificate, key = (Path(path) if path else None for path in (arguments.tls_certificate, arguments.tls_key))
    address = Address(arguments.host, arguments.port, certificate, key)
    metrics = None if arguments.metrics_port is None else Address(arguments.metrics_host, arguments.metrics_port)
    engine = _engine(arguments)
    if not arguments.quiet:
        note(f"loading the model; then http://{arguments.host}:{arguments.port}/ is the page, /v1 the API")
    serve(engine, settings, address, metrics=metrics, drain_seconds=arguments.drain_seconds)
    return 0


def _engine(arguments: argparse.Namespace) -> Engine:
    source = model_source(arguments)
    memory = round(arguments.memory_gb * 2**30) if arguments.memory_gb else None
    cache = round(arguments.cache_mb * 2**20)
    if arguments.ray is not None:
        from openwu.serving.engines.cluster import ClusterOptions, cluster_engine

        options = ClusterOptions(
            address=arguments.ray,
            replicas=max(1, arguments.workers),
            max_replicas=arguments.max_workers,
            idle_seconds=arguments.idle_seconds,
            threads=arguments.threads or 1,
            gpus=arguments.worker_gpus,
            batch=arguments.batch,
            memory_bytes=memory,
            cache_bytes=cache,
        )
        return cluster_engine(source, options)
    if arguments.max_workers is not None or arguments.worker_gpus:
        raise UsageError("--max-workers, --worker-gpus: expected with --ray; add that, or leave them out")
    if arguments.workers == 0:
        from openwu.serving.engines.local import LocalEngine

        return LocalEngine(source, batch=arguments.batch, cache_bytes=cache)
    from openwu.serving.engines.processes import ProcessEngine

    return ProcessEngine(
        source,
        workers=arguments.workers,
        batch=arguments.batch,
        memory_bytes=memory,
        threads=arguments.threads,
        cache_bytes=cache,
    )


def model_source(arguments: argparse.Namespace) -> ModelSource:
    """Return the model that the options name."""
    from openwu.serving.engines import ModelSource

    return ModelSource(**{each.name: getattr(arguments, each.name) for each in fields(ModelSource)})


def add_arguments(serve: argparse.ArgumentParser) -> None:
    """Add the options that are the service's own; those of large bases are added where `edit` gets them."""
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    serve.add_argument("--port", type=_port, default=8000, help="default: 8000")
    serve.add_argument("--model", metavar="M", help="as of `openwu edit` (default: the model inside the package)")
    serve.add_argument("--workers", type=_count, default=1, help="processes, each with its own model (default: 1)")
    serve.add_argument(
        "--ray",
        nargs="?",
        const="auto",
        metavar="ADDRESS",
        help="run the workers on a Ray cluster (default address: the cluster of this machine, or a new one)",
    )
    serve.add_argument("--max-workers", type=positive_count, help="with --ray: start up to so many under load")
    serve.add_argument(
        "--idle-seconds",
        type=amount,
        default=600.0,
        help="with --max-workers: seconds until a worker that is not needed is taken back (default: 600)",
    )
    serve.add_argument("--worker-gpus", type=amount, default=0.0, help="with --ray: GPUs of a worker, such as 1 or 0.5")
    serve.add_argument("--threads", type=positive_count, help="threads of a worker (default: its share of the cores)")
    serve.add_argument("--batch", type=positive_count, help="requests that share a pass (default: 8; 1 on a CPU)")
    serve.add_argument(
        "--memory-gb", type=amount, default=4.0, help="for a worker's requests; 0: no limit (default: 4)"
    )
    serve.add_argument("--keys", metavar="FILE", help="API keys, one a line: NAME SHA256 [admin]")
    serve.add_argument("--new-key", metavar="NAME", help="add a key to --keys, print it once, and end")
    serve.add_argument("--admin", action="store_true", help="with --new-key: the key may read /metrics")
    serve.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="serve under this name, too")
    serve.add_argument("--alias", action="append", default=[], metavar="NAME", help="another name of the model")
    serve.add_argument("--mcp", action="store_true", help="offer tools to agents at /mcp, too")
    serve.add_argument(
        "--metrics-port", type=_port, metavar="PORT", help="serve /metrics on this port, too, without a key"
    )
    serve.add_argument("--metrics-host", default="127.0.0.1", help="address of that port (default: this machine alone)")
    serve.add_argument("--tls-certificate", metavar="FILE", help="serve HTTPS with this certificate")
    serve.add_argument("--tls-key", metavar="FILE", help="its key (default: in the same file)")
    serve.add_argument("--quiet", action="store_true", help="log nothing but faults")
    _add_limits(serve)
    serve.set_defaults(run="openwu.cli.service.serve:run")


def _add_limits(serve: argparse.ArgumentParser) -> None:
    """Add the limits of time, size and memory."""
    serve.add_argument("--queue-seconds", type=amount, default=60.0, help="work that may wait in all (default: 60)")
    serve.add_argument("--key-seconds", type=amount, default=30.0, help="work of one key that may wait (default: 30)")
    serve.add_argument("--request-seconds", type=amount, default=300.0, help="longest time to answer (default: 300)")
    serve.add_argument("--drain-seconds", type=amount, default=60.0, help="to finish work at shutdown (default: 60)")
    serve.add_argument("--max-megapixels", type=amount, default=50.0, help="of one picture (default: 50)")
    serve.add_argument("--max-body-mb", type=amount, default=64.0, help="of one request (default: 64)")
    serve.add_argument(
        "--adapters-per-key",
        type=positive_count,
        default=64,
        metavar="N",
        help="adapters that are kept by id (default: 64)",
    )
    serve.add_argument(
        "--store-mb",
        type=amount,
        default=256.0,
        help="for the adapters of all keys, the pictures behind links, the uploads: each (default: 256)",
    )
    serve.add_argument(
        "--cache-mb", type=amount, default=32.0, help="for each key's adapter cache in each worker (default: 32)"
    )


def _port(text: str) -> int:
    number = _count(text)
    if number > 65_535:
        raise argparse.ArgumentTypeError(f"expected 0 to 65535, got {text}")
    return number


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, got {text!r}")
    return int(text)


def positive_count(text: str) -> int:
    """Read a whole number from 1."""
    number = _count(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return number


def amount(text: str) -> float:
    """Read a number from 0."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1e9:
        raise argparse.ArgumentTypeError(f"expected a number from 0, got {text!r}")
    return number

"""API keys, kept as SHA-256 in a file; without a file, the service is for this machine alone."""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from openwu.errors import OpenwuError
from openwu.files.hashing import of_bytes
from openwu.files.writing import atomic_file
from openwu.serving.errors import refused

_LINE = re.compile(r"([\w.-]{1,64}) ([0-9a-f]{64})( admin)?", re.ASCII)
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]", "::1")


@dataclass(frozen=True)
class Caller:
    """Whose request it is."""

    tenant: str
    admin: bool = False


LOCAL = Caller("local", admin=True)
"""Whoever asks a service without keys, which only this machine reaches."""


@dataclass(frozen=True)
class _Key:
    name: str
    digest: str
    admin: bool


class Keys:
    """The API keys that are served."""

    def __init__(self, path: Path | None = None) -> None:
        """Read lines `NAME SHA256 [admin]`; None: no keys. Raises OpenwuError for a file that is no such list."""
        self._keys: tuple[_Key, ...] | None = None if path is None else _read(path)

    @property
    def required(self) -> bool:
        return self._keys is not None

    def caller(self, authorization: str | None) -> Caller:
        """Return who sent a request, from its Authorization header. Raises ServiceError (401)."""
        if self._keys is None:
            return LOCAL
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise refused(401, "missing_api_key", "expected the header Authorization: Bearer KEY, got none")
        digest = of_bytes([key.strip().encode("utf-8", "replace")]).hexdigest()
        found = [each for each in self._keys if hmac.compare_digest(each.digest, digest)]
        if not found:
            raise refused(401, "invalid_api_key", "the API key is not one of this service's")
        return Caller(found[0].name, found[0].admin)


def new_key(path: Path, name: str, *, admin: bool = False) -> str:
    """Add a key to the file and return it; only its hash is kept. Raises OpenwuError for a name that is taken."""
    known = _read(path) if path.exists() else ()
    if any(key.name == name for key in known):
        raise OpenwuError(f"{path}: expected a new name, got {name!r}, which is there; take its line out first")
    key = f"wu-{secrets.token_urlsafe(32)}"
    line = f"{name} {of_bytes([key.encode()]).hexdigest()}{' admin' if admin else ''}"
    if not _LINE.fullmatch(line):
        raise OpenwuError(f"name: expected letters, digits, '.', '-' or '_', at most 64, got {name!r}")
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    with atomic_file(path) as part:
        part.write_text(f"{before}{line}\n", encoding="utf-8")
    path.chmod(0o600)
    return key


def check_local(host: str | None, origin: str | None, hosts: Sequence[str]) -> None:
    """Refuse foreign pages: those that made a browser resolve their name to this machine, or that call from elsewhere.

    `hosts`: names under which the service is reached. Raises ServiceError (403).
    """
    name = _host_of(host or "")
    if "*" not in hosts and name not in hosts:
        raise refused(403, "foreign_host", f"expected a Host of {', '.join(hosts)}, got {name[:80]!r} (--allow-host)")
    if origin is not None and origin != "null":
        own = _host_of(origin.partition("://")[2])
        if own != name or "://" not in origin:
            raise refused(403, "foreign_origin", f"expected no Origin but this service's own, got {origin[:80]!r}")
    elif origin == "null":
        raise refused(403, "foreign_origin", "expected no Origin but this service's own, got 'null'")


def _host_of(netloc: str) -> str:
    return re.sub(r":[0-9]*$", "", netloc.strip().lower()) if not netloc.startswith("::") else netloc


def _read(path: Path) -> tuple[_Key, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OpenwuError(f"{path}: expected a file of API keys: {error}") from error
    keys = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip())
        if found is None:
            raise OpenwuError(f"{path}:{number}: expected NAME SHA256 [admin]; `openwu serve --new-key NAME` adds one")
        keys.append(_Key(found[1], found[2], bool(found[3])))
    return tuple(keys)

"""What the service keeps between requests, in bounded memory: adapters by id, pictures behind links, uploads."""

from __future__ import annotations

import hmac
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from openwu.serving.errors import refused

STORE_BYTES, PICTURE_SECONDS = 256 * 2**20, 3600.0
UPLOAD_SECONDS, UPLOAD_BYTES = 600.0, 256 * 2**10


@dataclass(frozen=True)
class StoreLimits:
    """How much is kept between requests; what was used longest ago makes room."""

    adapters_per_key: int = 64
    """Generated adapters of one API key."""
    store_bytes: int = STORE_BYTES
    """Of the adapters of all keys, of the pictures behind links, and of uploads: each of the three."""


@dataclass(frozen=True)
class StoredAdapter:
    """A generated adapter of one API key."""

    id: str
    tenant: str
    data: bytes = field(repr=False)
    """As `openwu.editor.store.encode` wrote it, under `key`."""
    key: str
    model: str
    instruction: str | None
    created: int

    @property
    def described(self) -> dict[str, object]:
        """The JSON object of the API."""
        return {
            "id": self.id,
            "object": "adapter",
            "created": self.created,
            "model": self.model,
            "instruction": self.instruction,
            "bytes": len(self.data),
        }


class AdapterShelf:
    """Adapters by id, each bound to the key that generated it; the oldest make room."""

    def __init__(self, limit: int = STORE_BYTES, per_tenant: int = StoreLimits.adapters_per_key) -> None:
        self._limit, self._per_tenant = limit, per_tenant
        self._held: OrderedDict[str, StoredAdapter] = OrderedDict()
        self._bytes = 0

    def put(self, adapter: StoredAdapter) -> None:
        """Keep an adapter; one key's never push out another's before its own have gone down to its share."""
        if len(adapter.data) > self._limit:
            return
        self._held[adapter.id] = adapter
        self._bytes += len(adapter.data)
        own = self.of(adapter.tenant)
        for old in own[: max(0, len(own) - self._per_tenant)]:
            self._drop(old.id)
        while self._bytes > self._limit:
            self._drop(self._largest_holder().id)

    def get(self, id: str, tenant: str) -> StoredAdapter:
        """Return an adapter of this key. Raises ServiceError (404) for any other, in the same words."""
        found = self._held.get(id)
        if found is None or found.tenant != tenant:
            raise refused(404, "adapter_not_found", f"adapter: expected an id of yours, got {id[:64]!r}", "adapter")
        self._held.move_to_end(id)
        return found

    def delete(self, id: str, tenant: str) -> None:
        """Forget an adapter of this key. Raises ServiceError (404) for any other."""
        self._drop(self.get(id, tenant).id)

    def of(self, tenant: str) -> list[StoredAdapter]:
        """Return a key's adapters, the longest unused first."""
        return [each for each in self._held.values() if each.tenant == tenant]

    def _largest_holder(self) -> StoredAdapter:
        """The longest unused adapter of the key that holds the most bytes."""
        totals: dict[str, int] = {}
        for each in self._held.values():
            totals[each.tenant] = totals.get(each.tenant, 0) + len(each.data)
        return self.of(max(totals, key=lambda tenant: totals[tenant]))[0]

    def _drop(self, id: str) -> None:
        self._bytes -= len(self._held.pop(id).data)


class PictureStore:
    """Results behind signed links that expire; the oldest make room."""

    def __init__(self, limit: int = STORE_BYTES, seconds: float = PICTURE_SECONDS) -> None:
        self._limit, self._seconds = limit, seconds
        self._secret = secrets.token_bytes(32)
        self._held: OrderedDict[str, tuple[float, bytes, str]] = OrderedDict()
        self._bytes = 0

    def put(self, data: bytes, media_type: str) -> str:
        """Keep a picture; return the path and query of its link."""
        name, expires = secrets.token_hex(16), time.time() + self._seconds
        self._held[name] = expires, data, media_type
        self._bytes += len(data)
        while self._held and (self._bytes > self._limit or next(iter(self._held.values()))[0] < time.time()):
            _, (_, old, _) = self._held.popitem(last=False)
            self._bytes -= len(old)
        return f"/v1/images/{name}?expires={int(expires)}&signature={self._sign(name, int(expires))}"

    def get(self, id: str, expires: str, signature: str) -> tuple[bytes, str]:
        """Return a picture and its media type. Raises ServiceError: 403 for a wrong signature, 404 for an old link."""
        whole = int(expires) if expires.isascii() and expires.isdigit() and len(expires) < 16 else 0
        if not hmac.compare_digest(self._sign(id, whole).encode(), signature.encode()):
            raise refused(403, "invalid_signature", "the link is not one of this service's")
        if id not in self._held or time.time() > whole:
            raise refused(404, "image_not_found", "the picture is not kept any more; make it again")
        _, data, media_type = self._held[id]
        return data, media_type

    def _sign(self, id: str, expires: int) -> str:
        return hmac.new(self._secret, f"{id} {expires}".encode(), "sha256").hexdigest()


@dataclass
class _Upload:
    tenant: str
    expires: float
    data: bytes = b""

    @property
    def size(self) -> int:
        """What it counts for: its bytes, and as much as bounds the number of links that wait for theirs."""
        return UPLOAD_BYTES + len(self.data)


class UploadStore:
    """Pictures that agents send ahead, each to an id that was given out before; the oldest of one key make room."""

    def __init__(self, limit: int = STORE_BYTES) -> None:
        self._limit = limit
        self._held: OrderedDict[str, _Upload] = OrderedDict()

    def expect(self, tenant: str) -> str:
        """Give out the id of one upload, 128 random bits, which is all that a sender must know."""
        name = secrets.token_hex(16)
        self._held[name] = _Upload(tenant, time.time() + UPLOAD_SECONDS)
        self._make_room()
        return name

    def check(self, id: str) -> None:
        """Raise ServiceError (404) for an id that was not given out, or that has a picture already."""
        found = self._held.get(id)
        if found is None or found.data or found.expires < time.time():
            raise refused(404, "upload_not_found", "upload: expected the id of a fresh link, call upload_link again")

    def put(self, id: str, data: bytes) -> None:
        """Keep a picture. Raises ServiceError as `check` does."""
        self.check(id)
        found = self._held[id]
        found.data, found.expires = data, time.time() + PICTURE_SECONDS
        self._make_room()

    def get(self, id: str, tenant: str) -> bytes:
        """Return an uploaded picture of this key. Raises ServiceError (404)."""
        found = self._held.get(id)
        if found is None or found.tenant != tenant or found.expires < time.time():
            raise refused(404, "upload_not_found", f"image: expected the id of an upload, got {id[:40]!r}", "image")
        if not found.data:
            raise refused(
                404, "upload_not_found", "image: nothing was uploaded; PUT the file to the link first", "image"
            )
        return found.data

    def _make_room(self) -> None:
        now = time.time()
        for name in [name for name, each in self._held.items() if each.expires < now]:
            del self._held[name]
        while sum(each.size for each in self._held.values()) > self._limit:
            totals: dict[str, int] = {}
            for each in self._held.values():
                totals[each.tenant] = totals.get(each.tenant, 0) + each.size
            largest = max(totals, key=lambda tenant: totals[tenant])
            del self._held[next(name for name, each in self._held.items() if each.tenant == largest)]

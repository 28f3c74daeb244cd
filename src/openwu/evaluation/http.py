"""HTTP calls to judges and editors: bounded retries, bounded replies, and keys that never show.

A key is read from an environment variable when a call is made, is sent in one header, and is in no file, log or error.
"""

from __future__ import annotations

import json
import os
import random
import time
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from openwu.errors import OpenwuError
from openwu.extras import library

ATTEMPTS = 5
"""Most calls for one answer, where the server is busy or cannot be reached."""
LONGEST_WAIT = 60.0
"""Seconds between two attempts, whatever the server asks for."""
MAX_REPLY = 64 * 2**20
"""Bytes of a reply that are read."""
BUSY = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""Status codes after which the same call may succeed."""
SHOWN = 300
"""Characters of a server's error that are shown."""


class EndpointError(OpenwuError):
    """An endpoint that will not answer any call: wrong address, wrong key, unknown model. The stage stops."""


class CallError(OpenwuError):
    """One call that failed for good, after its retries; other calls may succeed."""


class CallRefusedError(OpenwuError):
    """A call that the server answered with a refusal of its content."""


@dataclass(frozen=True)
class Endpoint:
    """A server, and how it wants to be told who calls."""

    url: str
    """Base address, such as https://example.org/v1"""
    key_variable: str | None = None
    """Environment variable that holds the key; None: no key is sent."""
    key_header: str = "Authorization"
    key_prefix: str = "Bearer "
    timeout: float = 120.0
    """Seconds for one attempt."""
    attempts: int = ATTEMPTS
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise OpenwuError(f"endpoint: expected an address such as https://example.org/v1, got {self.public_url!r}")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise OpenwuError(
                f"endpoint: expected an address without user, password or query, got {self.public_url!r}; keys come "
                "from an environment variable alone"
            )
        if parts.scheme == "http" and self.key_variable and not self.is_local:
            raise OpenwuError(f"endpoint: expected https for a server that gets a key, got {self.public_url!r}")

    @property
    def is_local(self) -> bool:
        """Whether the server runs on this machine, and so costs nothing."""
        return urllib.parse.urlsplit(self.url).hostname in ("localhost", "127.0.0.1", "::1")

    @property
    def public_url(self) -> str:
        """The address without user, password and query, for records and messages."""
        parts = urllib.parse.urlsplit(self.url)
        return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))

    def key(self) -> str:
        """Read the key from the environment. Raises EndpointError that names the variable where it is not set."""
        if self.key_variable is None:
            return ""
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            raise EndpointError(f"{self.public_url}: expected a key in the environment variable {self.key_variable}")
        if not key.isascii() or not key.isprintable():
            raise EndpointError(f"{self.key_variable}: expected printable ASCII without line breaks")
        return key

    def post(self, path: str, *, body: Mapping[str, Any] | None = None, form: Form | None = None) -> dict[str, Any]:
        """Post JSON or a multipart form and return the JSON object of the answer.

        Raises EndpointError where no call can succeed, CallRefusedError for refused content, CallError otherwise.
        """
        problem = ""
        for attempt in range(self.attempts):
            wait = min(LONGEST_WAIT, 2.0**attempt) * random.uniform(0.5, 1.0)
            try:
                status, headers, data = self._send(path, body, form)
            except _UnreachableError as error:
                problem = str(error)
            else:
                if status == 200:
                    return self._object(data)
                problem = f"status {status}: {self._hidden(_message(data))}"
                if _is_refusal(status, data):
                    raise CallRefusedError(f"{self.public_url}: refused ({problem})")
                if status in (401, 403, 404):
                    raise EndpointError(f"{self.public_url}{path}: {problem}; check address, model and key")
                if status == 429 and "insufficient_quota" in data.decode("utf-8", "replace"):
                    raise EndpointError(f"{self.public_url}{path}: {problem}; the account has no credit left")
                if status not in BUSY:
                    raise CallError(f"{self.public_url}{path}: {problem}")
                wait = max(wait, min(LONGEST_WAIT, _retry_after(headers)))
            if attempt + 1 < self.attempts:
                self.sleep(wait)
        raise CallError(f"{self.public_url}{path}: no answer in {self.attempts} attempts; the last: {problem}")

    def _send(
        self, path: str, body: Mapping[str, Any] | None, form: Form | None
    ) -> tuple[int, Mapping[str, str], bytes]:
        httpx = library("httpx", "judge")
        headers = {"Accept": "application/json"}
        if self.key_variable is not None:
            headers[self.key_header] = self.key_prefix + self.key()
        content: dict[str, Any] = {"json": body} if form is None else {"data": dict(form.fields), "files": form.files}
        deadline = time.monotonic() + self.timeout
        try:
            # Redirects are not followed: the key would go to another server.
            with (
                httpx.Client(timeout=self.timeout, follow_redirects=False) as client,
                client.stream("POST", self.url.rstrip("/") + path, headers=headers, **content) as response,
            ):
                data = bytearray()
                for piece in response.iter_bytes():
                    data += piece
                    if len(data) > MAX_REPLY:
                        raise CallError(f"{self.public_url}{path}: expected at most {MAX_REPLY} bytes, got more")
                    if time.monotonic() > deadline:
                        raise _UnreachableError(f"no complete answer in {self.timeout:g} s")
                return int(response.status_code), response.headers, bytes(data)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _UnreachableError(self._hidden(f"{type(error).__name__}: {error}")) from None

    def _object(self, data: bytes) -> dict[str, Any]:
        try:
            found = json.loads(self._hidden(data.decode("utf-8")))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise CallError(f"{self.public_url}: expected a JSON object, got {self._hidden(_shortened(data))!r}")
        return found

    def _hidden(self, text: str) -> str:
        """The text without the key, should a server send it back."""
        key = os.environ.get(self.key_variable, "").strip() if self.key_variable else ""
        return text.replace(key, "[key]") if key else text


@dataclass(frozen=True)
class Form:
    """A multipart form."""

    fields: Mapping[str, str]
    files: list[tuple[str, tuple[str, bytes, str]]]
    """(field, (file name, bytes, media type))"""


class _UnreachableError(Exception):
    """No answer this time."""


def _retry_after(headers: Mapping[str, str]) -> float:
    try:
        return max(0.0, float(headers.get("retry-after", "0")))
    except ValueError:
        return 0.0


def _message(data: bytes) -> str:
    try:
        error = json.loads(data)["error"]
        return _shortened(str(error["message"] if isinstance(error, dict) else error).encode())
    except (ValueError, KeyError, TypeError):
        return _shortened(data)


def _shortened(data: bytes) -> str:
    return data[: 4 * SHOWN].decode("utf-8", "replace")[:SHOWN]


def _is_refusal(status: int, data: bytes) -> bool:
    """Whether an error is a refusal of the content, as OpenAI, Google and ByteDance name it."""
    words = (b"moderation_blocked", b"content_policy", b"content_filter", b"SensitiveContent", b"PROHIBITED_CONTENT")
    return status in (400, 403, 422) and any(word in data for word in words)

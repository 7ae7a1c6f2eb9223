"""Keys of clients: which may ask, and which may also change documents.

Only digests are kept. Without keys a service listens on a loopback address alone, see `cli/serve.py`.
"""

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import ApiError
from .limits import refuse

KEYS, READ_KEYS = "CLARA_API_KEYS", "CLARA_READ_KEYS"  # environment: keys with commas between them
LEAST = 16  # characters of a key
OPEN_PATHS = ("/health", "/health/live", "/health/ready")


class Keys:
    """Keys that may do everything, and keys that may do everything but change documents.

    Args:
        api_keys: at least 16 characters each.
        read_keys: likewise.
    """

    def __init__(self, api_keys: Iterable[str] = (), read_keys: Iterable[str] = ()):
        self._may_write: dict[bytes, bool] = {}
        for keys, may_write in ((read_keys, False), (api_keys, True)):
            for key in keys:
                if len(key) < LEAST or not key.isascii() or any(map(str.isspace, key)):
                    raise ValueError(
                        f"an API key must be ASCII text of at least {LEAST} characters without blanks, got one of "
                        f"{len(key)}. Make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
                    )
                self._may_write[_digest(key)] = may_write

    def __bool__(self) -> bool:
        return bool(self._may_write)

    def may_write(self, key: str) -> bool | None:
        """Whether a key may change documents; None if it is none. Takes as long for any key."""
        given, found = _digest(key), None
        for digest, may_write in self._may_write.items():
            if hmac.compare_digest(digest, given):
                found = may_write
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def read_keys(variable: str, file: str | os.PathLike | None = None) -> list[str]:
    """The keys of an environment variable and of a file, one a line; blank lines and those with # are left out."""
    lines = Path(file).read_text(encoding="utf-8-sig").splitlines() if file is not None else []
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if file is not None and not keys:
        raise ValueError(f"the file of keys must have one key a line, {file} has none. Add one.")
    return keys + [key.strip() for key in os.environ.get(variable, "").split(",") if key.strip()]


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class RequireKey:
    """ASGI middleware: refuses requests without a key before their body is read.

    `hosts` are what the Host header may name, if not everything. A service of this machine without keys names its own:
    a page of the web that lets its name lead here names another one.
    """

    def __init__(self, app: ASGIApp, keys: Keys, read_only: bool = False, hosts: Collection[str] | None = None):
        self.app, self.keys, self.read_only, self.hosts = app, keys, read_only, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._refusal(scope) if scope["type"] == "http" else None
        if error is None:
            await self.app(scope, receive, send)
        else:
            await refuse(error, scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        if self.hosts is not None and _host(scope) not in self.hosts:
            return ApiError(421, "the Host header must name this machine. Ask it by its address.", code="wrong_host")
        is_write = scope["path"].startswith("/documents") and scope["method"] in ("POST", "PUT", "DELETE")
        if self.keys and scope["path"] not in OPEN_PATHS and scope["method"] != "OPTIONS":
            kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            may_write = self.keys.may_write(key.strip()) if kind.lower() == "bearer" else None
            if may_write is None:
                wrong = "got none" if not key else "got one that is not known"
                message = f"an API key must be given as `Authorization: Bearer KEY`, {wrong}. Ask for one."
                return ApiError(401, message, code="invalid_api_key")
            if is_write and not may_write:
                return ApiError(403, "this key may not change documents. Use one that may.", code="read_only_key")
        if is_write and self.read_only:
            return ApiError(403, "documents cannot be changed: the service was started read-only.", code="read_only")
        return None


def _host(scope: Scope) -> str | None:
    """The name in the Host header, without the port."""
    try:
        return urlsplit(f"//{Headers(scope=scope).get('host', '')}").hostname
    except ValueError:
        return None

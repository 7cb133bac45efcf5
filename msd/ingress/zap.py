"""Who may connect, and as which tenant: the answers of the ZAP handler (RFC 27), without its socket.

libzmq asks once per connection, inside the handshake. What it is told travels as the `User-Id` of every frame of that
connection; a peer cannot set that property itself, since libzmq keeps the handler's. It outlives the key that it was
given for, so it names the key, not the tenant: whose it is is asked again whenever that matters.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import structlog

from msd.config import TenantConfig
from msd.errors import ConfigError

DOMAIN: Final = b"msd"
LOCAL_TENANT: Final = "local"
KEY_CHARS: Final = 40
MAX_KEY_FILE_CHARS: Final = 256
MAX_KEYS: Final = 10_000
MAX_FAILED_READS: Final = 30
"""A folder that cannot be read for want of descriptors or the like keeps its keys for so many looks, then none."""

_KEY: Final = "key:"
_TENANT: Final = "tenant:"
_GONE: Final = (FileNotFoundError, NotADirectoryError, PermissionError)
_VERSION: Final = b"1.0"
_LOOPBACK: Final = ("127.", "::1", "::ffff:127.")

_log = structlog.get_logger()


def is_loopback(address: str) -> bool:
    """Whether a numeric address, or `localhost`, cannot leave this machine."""
    return address == "localhost" or address.strip("[]").startswith(_LOOPBACK)


class Keyring:
    """CURVE public keys of clients: file `NAME.key` in the folder gives tenant `NAME`. Read again when it changes.

    A file that holds no key gives nobody access and costs nobody else theirs. A folder that is gone or closed holds no
    keys: what an operator took away must not stay valid because it cannot be looked at.
    """

    def __init__(self, folder: str, decode_z85: Callable[[str], bytes]) -> None:
        self._folder = Path(folder) if folder else None
        self._decode_z85 = decode_z85
        self._tenants: dict[bytes, str] = {}
        self._seen: tuple[tuple[str, int, int], ...] | None = None
        self._num_failed = 0
        self.revision = 0
        """Grows whenever the set of keys may have changed."""

    def refresh(self) -> None:
        """Read the folder if it changed. Raises ConfigError when it cannot be read; the keys are up to date then, too.

        Only a failure that says nothing of the folder (no descriptor left, say) keeps them for MAX_FAILED_READS looks.
        """
        if self._folder is None:
            return
        try:
            with os.scandir(self._folder) as found:
                entries = sorted((entry for entry in found if entry.name.endswith(".key")), key=_name)[:MAX_KEYS]
            seen = tuple(_stamp(entry) for entry in entries)
            if seen != self._seen:
                tenants = {key: entry.name.removesuffix(".key") for entry in entries if (key := self._read(entry.path))}
                self._hold(tenants, seen)
            self._num_failed = 0
        except OSError as error:
            self._num_failed += 1
            if isinstance(error, _GONE) or self._num_failed >= MAX_FAILED_READS:
                self._hold({}, None)
            raise ConfigError(
                f"cannot read the CURVE keys of clients: {error}", remedy="see ingress.zmq.curve_keys_dir"
            ) from error

    def tenant_of(self, key: bytes) -> str | None:
        """Tenant of a public key (32 bytes)."""
        return self._tenants.get(key)

    def _hold(self, tenants: dict[bytes, str], seen: tuple[tuple[str, int, int], ...] | None) -> None:
        if tenants != self._tenants:
            self.revision += 1
        self._tenants, self._seen = tenants, seen

    def _read(self, path: str) -> bytes | None:
        """The key in a file; None, and a line in the log, when there is none."""
        try:
            with open(path, encoding="ascii", errors="replace") as file:
                text = file.read(MAX_KEY_FILE_CHARS).strip()
            if len(text) != KEY_CHARS:
                raise ValueError(f"expected {KEY_CHARS} characters of Z85, got {len(text)}")
            return self._decode_z85(text)
        except (*_GONE, IsADirectoryError, ValueError) as error:
            _log.error("curve_key_skipped", path=path, error=str(error), remedy="write the public key alone into it")
            return None


class Doorkeeper:
    """Answers ZAP requests. An ipc peer whose uid is nobody's connects as no tenant, so that it can be told why."""

    def __init__(self, tenants: Sequence[TenantConfig], keyring: Keyring, *, allow_insecure_tcp: bool) -> None:
        self._has_tenants = bool(tenants)
        self._tenant_of_uid: Mapping[int, str] = {uid: tenant.name for tenant in tenants for uid in tenant.uids}
        self._keyring = keyring
        self._allow_insecure_tcp = allow_insecure_tcp
        self.num_refused = 0

    def answer(self, frames: Sequence[bytes]) -> list[bytes]:
        """Reply frames to request frames [version, id, domain, address, identity, mechanism, credentials..]."""
        if len(frames) < 6 or frames[0] != _VERSION:
            return self._refuse(frames[1] if len(frames) > 1 else b"", b"500", b"bad ZAP request")
        _, request_id, domain, address, _, mechanism, *credentials = frames
        if domain != DOMAIN:
            return self._refuse(request_id, b"400", b"unknown domain")
        user_id: str | None = None
        if mechanism == b"NULL":
            tenant = self._tenant_by_address(address.decode("ascii", "replace"))
            user_id = None if tenant is None else _TENANT + tenant
        elif mechanism == b"CURVE" and len(credentials) == 1 and self._keyring.tenant_of(credentials[0]) is not None:
            user_id = _KEY + credentials[0].hex()
        if user_id is None:
            return self._refuse(request_id, b"400", b"unauthenticated")
        return [_VERSION, request_id, b"200", b"OK", user_id.encode(), b""]

    def tenant_of(self, user_id: str) -> str:
        """Whose a connection is, as of now, by the `User-Id` that `answer` gave it; "" = nobody's (any more)."""
        if user_id.startswith(_KEY):
            return self._keyring.tenant_of(bytes.fromhex(user_id.removeprefix(_KEY))) or ""
        return user_id.removeprefix(_TENANT)

    def _tenant_by_address(self, address: str) -> str | None:
        """Tenant of a peer that shows no key; "" = connected, but nobody's; None = refused.

        For ipc the kernel's word comes as `localhost:UID:GID:PID`; for tcp it is a numeric address.
        """
        name, _, rest = address.partition(":")
        if name == "localhost" and rest:
            uid = rest.split(":", 1)[0]
            if not self._has_tenants:
                return LOCAL_TENANT
            return self._tenant_of_uid.get(int(uid), "") if uid.isdecimal() else ""
        return LOCAL_TENANT if self._allow_insecure_tcp and is_loopback(address) else None

    def _refuse(self, request_id: bytes, status: bytes, text: bytes) -> list[bytes]:
        self.num_refused += 1
        return [_VERSION, request_id, status, text, b"", b""]


def _name(entry: os.DirEntry[str]) -> str:
    return entry.name


def _stamp(entry: os.DirEntry[str]) -> tuple[str, int, int]:
    """What differs when the file does, its permissions included. One that leads nowhere is a file without a key."""
    try:
        stat = entry.stat()
    except _GONE:
        return entry.name, 0, 0
    return entry.name, stat.st_ctime_ns, stat.st_ino

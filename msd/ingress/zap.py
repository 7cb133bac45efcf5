"""Who may connect, and as which tenant: the answers of the ZAP handler (RFC 27), without its socket.

libzmq asks once per connection, inside the handshake. The tenant it is told travels as the `User-Id` of every frame of
that connection; a peer cannot set that property itself, since libzmq keeps the handler's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from msd.config import TenantConfig
from msd.errors import ConfigError

DOMAIN: Final = b"msd"
LOCAL_TENANT: Final = "local"
KEY_CHARS: Final = 40
MAX_KEYS: Final = 10_000

_VERSION: Final = b"1.0"
_LOOPBACK: Final = ("127.", "::1", "::ffff:127.")


def is_loopback(address: str) -> bool:
    """Whether a numeric address, or `localhost`, cannot leave this machine."""
    return address == "localhost" or address.strip("[]").startswith(_LOOPBACK)


class Keyring:
    """CURVE public keys of clients: file `NAME.key` in the folder gives tenant `NAME`. Read again when it changes."""

    def __init__(self, folder: str, decode_z85: Callable[[str], bytes]) -> None:
        self._folder = Path(folder) if folder else None
        self._decode_z85 = decode_z85
        self._tenants: dict[bytes, str] = {}
        self._seen: tuple[tuple[str, int, int], ...] = ()

    def refresh(self) -> frozenset[str]:
        """Read the folder if it changed; return the tenants that lost a key. Raises ConfigError."""
        if self._folder is None:
            return frozenset()
        try:
            entries = sorted((entry for entry in os.scandir(self._folder) if entry.name.endswith(".key")), key=_name)
            seen = tuple((entry.name, entry.stat().st_mtime_ns, entry.stat().st_ino) for entry in entries[:MAX_KEYS])
            if seen == self._seen:
                return frozenset()
            tenants = {self._read(entry.path): entry.name.removesuffix(".key") for entry in entries[:MAX_KEYS]}
        except OSError as error:
            raise ConfigError(
                f"cannot read the CURVE keys of clients: {error}", remedy="see ingress.zmq.curve_keys_dir"
            ) from error
        revoked = frozenset(tenant for key, tenant in self._tenants.items() if tenants.get(key) != tenant)
        self._tenants, self._seen = tenants, seen
        return revoked

    def tenant_of(self, key: bytes) -> str | None:
        """Tenant of a public key (32 bytes)."""
        return self._tenants.get(key)

    def _read(self, path: str) -> bytes:
        text = Path(path).read_text(encoding="ascii", errors="replace").strip()
        try:
            if len(text) != KEY_CHARS:
                raise ValueError(f"{len(text)} characters")
            return self._decode_z85(text)
        except (ValueError, KeyError) as error:
            raise ConfigError(
                f"{path}: expected a CURVE public key of {KEY_CHARS} characters (Z85): {error}",
                remedy="write the client's public key alone into the file",
            ) from error


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
        if mechanism == b"NULL":
            tenant = self._tenant_by_address(address.decode("ascii", "replace"))
        elif mechanism == b"CURVE" and len(credentials) == 1:
            tenant = self._keyring.tenant_of(credentials[0])
        else:
            tenant = None
        if tenant is None:
            return self._refuse(request_id, b"400", b"unauthenticated")
        return [_VERSION, request_id, b"200", b"OK", tenant.encode(), b""]

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

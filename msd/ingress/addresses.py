"""Which addresses the ZeroMQ ingress may be bound to, and how: checked before any socket exists."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Literal

from msgspec import Struct

from msd import endpoint as default_endpoint
from msd.config import ZmqIngressConfig
from msd.errors import ConfigError, IngressError
from msd.ingress.zap import KEY_CHARS, is_loopback

SOCKET_UMASK: Final = 0o117
"""Owner and group may connect (0660)."""
FOLDER_MODE: Final = 0o750
MAX_PATH_BYTES: Final = 107
"""sun_path of Linux, less its terminator."""
PROBE_TIMEOUT_S: Final = 1.0


class Address(Struct, frozen=True):
    """One endpoint to bind, with the mechanism that guards it: file permissions, a CURVE key, or only loopback."""

    endpoint: str
    guard: Literal["file", "loopback", "curve"]

    @property
    def path(self) -> str:
        """Of the socket file, for ipc."""
        return self.endpoint.removeprefix("ipc://")


def plan(config: ZmqIngressConfig) -> tuple[Address, ...]:
    """Addresses to bind, those without CURVE first. Raises ConfigError, or IngressError when no default is usable."""
    addresses = tuple(_address(endpoint, config) for endpoint in config.endpoints)
    return tuple(sorted(addresses, key=lambda address: address.guard == "curve"))


def _address(endpoint: str, config: ZmqIngressConfig) -> Address:
    resolved = default_endpoint.for_daemon(endpoint)
    if resolved is None:
        raise IngressError(
            f"there is no place for the default socket: {' and '.join(default_endpoint.socket_paths())} cannot be made",
            remedy="set $MSD_ENDPOINT, or ingress.zmq.endpoints to a path that this user may write",
        )
    scheme, _, rest = resolved.partition("://")
    match scheme:
        case "ipc":
            if not rest.startswith("/") or len(os.fsencode(rest)) > MAX_PATH_BYTES:
                raise ConfigError(
                    f"{resolved}: expected an absolute path of at most {MAX_PATH_BYTES} bytes after ipc://",
                    remedy="choose a shorter one below /run",
                )
            return Address(resolved, "file")
        case "tcp":
            host, _, port = rest.rpartition(":")
            # libzmq would take 99999 for 34463.
            if port != "*" and not (port.isdecimal() and int(port) < 65_536):
                raise ConfigError(f"{resolved}: expected tcp://host:port", remedy="a port is 0 to 65535, or *")
            if config.curve_secret_key_file:
                if not config.curve_keys_dir:
                    raise ConfigError(
                        f"{resolved}: CURVE without the keys of clients lets nobody in",
                        remedy="set ingress.zmq.curve_keys_dir",
                    )
                return Address(resolved, "curve")
            if config.insecure_tcp and is_loopback(host):
                return Address(resolved, "loopback")
            raise ConfigError(
                f"{resolved}: tcp needs CURVE keys, or a loopback address with insecure_tcp = true",
                remedy="set ingress.zmq.curve_secret_key_file and curve_keys_dir, or use ipc",
            )
        case _:
            raise ConfigError(
                f"{resolved}: expected ipc:///path or tcp://host:port", remedy="see ingress.zmq.endpoints"
            )


def read_secret_key(path: str) -> str:
    """The server's CURVE secret key (Z85). Raises ConfigError, also when others may read it."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            mode = os.fstat(file.fileno()).st_mode
            key = file.read(4_096).strip()
    except OSError as error:
        raise ConfigError(
            f"cannot read the CURVE secret key: {error}", remedy="see ingress.zmq.curve_secret_key_file"
        ) from error
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigError(f"{path}: others than its owner may read the CURVE secret key", remedy=f"chmod 600 {path}")
    if len(key) != KEY_CHARS:
        raise ConfigError(
            f"{path}: expected a CURVE secret key of {KEY_CHARS} characters (Z85), got {len(key)}",
            remedy="write the secret key alone into the file",
        )
    return key


def make_room(address: Address) -> None:
    """Make the socket's folder, and remove the socket file of a daemon that is dead. Raises IngressError."""
    if address.guard != "file":
        return
    path = address.path
    folder = os.path.dirname(path)
    try:
        if not os.path.isdir(folder):
            os.mkdir(folder)  # not its parents: a mistyped path must not grow folders at the root
            os.chmod(folder, FOLDER_MODE)
        if not os.path.lexists(path):
            return
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise IngressError(f"{path} exists and is no socket", remedy="move it away, or choose another endpoint")
        if _is_live(path):
            raise IngressError(
                f"another daemon listens on {path}", remedy="stop it, or give this one another ingress.zmq.endpoints"
            )
        os.unlink(path)
    except OSError as error:
        raise IngressError(f"cannot prepare {path}: {error}", remedy="check its folder's permissions") from error


def remove_socket(path: str, inode: int) -> None:
    """Remove a socket file of our own; another daemon's, made since, stays."""
    try:
        if os.stat(path).st_ino == inode:
            os.unlink(path)
    except FileNotFoundError:
        # Somebody tidied up before us.
        pass


def _is_live(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(PROBE_TIMEOUT_S)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except (TimeoutError, BlockingIOError):
            # Somebody listens there and is too busy to accept.
            return True
    return True


@contextmanager
def socket_umask() -> Iterator[None]:
    """The umask under which an ipc socket is bound; process-wide, so bind before threads that create files start."""
    before = os.umask(SOCKET_UMASK)
    try:
        yield
    finally:
        os.umask(before)

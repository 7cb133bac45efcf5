"""systemd's notification protocol (sd_notify(3)): one datagram per message to `$NOTIFY_SOCKET`; nothing without it."""

from __future__ import annotations

import os
import socket


class Notifier:
    """Tells the service manager how the daemon stands. A manager that went away is no reason to stop serving."""

    def __init__(self) -> None:
        address = os.environ.get("NOTIFY_SOCKET", "")
        self._socket: socket.socket | None = None
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)
            self._address = "\0" + address[1:] if address.startswith("@") else address

    def tell(self, *lines: str) -> bool:
        """Send `KEY=value` lines as one message; False when nobody listens."""
        if self._socket is None:
            return False
        try:
            self._socket.sendto("\n".join(lines).encode(), self._address)
        except OSError:
            return False
        return True

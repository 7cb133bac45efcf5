"""The client's socket: one DEALER with its monitor, never blocking. libzmq reconnects; the monitor says when."""

from __future__ import annotations

import os
import random
from enum import Enum
from typing import Final

import zmq
from zmq.utils.monitor import recv_monitor_message

from msd import endpoint as default_endpoint
from msd.client.failures import ForkedClientError
from msd.errors import ConfigError
from msd.wire import VERSION

LINGER_MS: Final = 1_000
RECONNECT_MS: Final = (75, 150)
"""First pause before a reconnect, drawn per client so that a thousand do not come back at once; it doubles."""
RECONNECT_MAX_MS: Final = 5_000
HEARTBEAT_MS: Final = 2_000
HEARTBEAT_TIMEOUT_MS: Final = 6_000
SEND_PIPE_MESSAGES: Final = 1_000

_NOBLOCK: Final = int(zmq.NOBLOCK)
_MORE: Final = int(zmq.NOBLOCK | zmq.SNDMORE)
_EVENTS: Final = int(zmq.EVENTS)


class Change(Enum):
    """What happened to the connection."""

    OPENED = "opened"
    LOST = "lost"
    REFUSED = "refused"


_CHANGES: Final = {
    int(zmq.EVENT_HANDSHAKE_SUCCEEDED): Change.OPENED,
    int(zmq.EVENT_DISCONNECTED): Change.LOST,
    int(zmq.EVENT_HANDSHAKE_FAILED_AUTH): Change.REFUSED,
}


class CurveKeys:
    """Keys for tcp: the server's public key and this client's secret one, in Z85."""

    def __init__(self, server_public: str, client_secret: str) -> None:
        self.server_public = server_public.encode()
        self.client_secret = client_secret.encode()


class Connection:
    """Sends and receives msd1 messages on one endpoint. Raises ConfigError when the endpoint cannot be used."""

    def __init__(self, endpoint: str | None, curve: CurveKeys | None) -> None:
        self.endpoint = default_endpoint.for_client(endpoint)
        self._pid = os.getpid()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._monitor: zmq.Socket[bytes] | None = None
        try:
            for option, value in (
                (zmq.LINGER, LINGER_MS),
                # Nothing is queued for a connection that is not there: unsent messages stay with the state machine.
                (zmq.IMMEDIATE, 1),
                (zmq.SNDHWM, SEND_PIPE_MESSAGES),
                (zmq.RECONNECT_IVL, random.randint(*RECONNECT_MS)),
                (zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS),
                (zmq.HEARTBEAT_IVL, HEARTBEAT_MS),
                (zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS),
                (zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS),
            ):
                self._socket.setsockopt(option, value)
            if curve is not None:
                self._socket.curve_serverkey = curve.server_public
                self._socket.curve_publickey = zmq.curve_public(curve.client_secret)
                self._socket.curve_secretkey = curve.client_secret
            self._monitor = self._socket.get_monitor_socket(sum(_CHANGES))
            self._socket.connect(self.endpoint)
        except (zmq.ZMQError, ValueError) as error:
            self.close()
            raise ConfigError(
                f"cannot use the endpoint {self.endpoint}: {error}", remedy="expected ipc:///path or tcp://host:port"
            ) from error
        self.socket_fd = int(self._socket.FD)
        self.monitor_fd = int(self._monitor.FD)

    def check_process(self) -> None:
        """Raise ForkedClientError in a forked child."""
        if os.getpid() != self._pid:
            raise ForkedClientError("this client was made before the fork", remedy="make a new one in the child")

    def send(self, payload: bytes) -> bool:
        """Send one message. False: no room, or nobody is connected; try again when the socket is ready."""
        try:
            self._socket.send(VERSION, _MORE)
            self._socket.send(payload, _NOBLOCK)
        except zmq.Again:
            return False
        return True

    def receive(self) -> bytes | None:
        """The next message, or None. What is not of this protocol's version is left out."""
        while True:
            try:
                frames = self._socket.recv_multipart(_NOBLOCK)
            except zmq.Again:
                return None
            if len(frames) == 2 and frames[0] == VERSION:
                return frames[1]

    def changes(self) -> list[Change]:
        """What happened to the connection since the last call, oldest first."""
        found = []
        while self._monitor is not None and int(self._monitor.getsockopt(_EVENTS)) & zmq.POLLIN:
            event = int(recv_monitor_message(self._monitor, _NOBLOCK)["event"])
            if event in _CHANGES:
                found.append(_CHANGES[event])
        return found

    def is_ready(self, *, for_output: bool) -> bool:
        """Whether something can be received, or sent. Reading this, like sending, consumes the descriptor's edge."""
        events = int(self._socket.getsockopt(_EVENTS))
        return bool(events & (zmq.POLLIN | zmq.POLLOUT if for_output else zmq.POLLIN))

    def close(self) -> None:
        """Close; waits for what is unsent at most LINGER_MS. Nothing in a forked child, where it is not ours."""
        if os.getpid() != self._pid:
            return
        if self._monitor is not None:
            self._socket.disable_monitor()
            self._monitor.close(0)
            self._monitor = None
        self._socket.close()
        self._context.term()

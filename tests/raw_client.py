"""A bare producer for tests: a DEALER and the wire's messages, nothing that retries, acknowledges or hides."""

from __future__ import annotations

from types import TracebackType
from typing import Self, TypeVar

import zmq

from msd import wire

M = TypeVar("M", bound=wire.ServerMessage)
PATIENCE_MS = 10_000


class RawClient:
    """`with RawClient(endpoint) as raw:` - connected and welcomed when entered."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(endpoint)

    def __enter__(self) -> Self:
        self.send(wire.Hello(client="raw"))
        self.receive(wire.Welcome)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._socket.close()
        self._context.term()

    def send(self, message: wire.ClientMessage) -> None:
        """Send one message."""
        self._socket.send_multipart([wire.VERSION, wire.encode(message)])

    def submit(self, client_request_id: str, *, max_tokens: int) -> None:
        """Submit a request whose answer comes whole."""
        self.send(wire.Submit(client_request_id=client_request_id, prompt="hello", max_tokens=max_tokens, stream=False))

    def receive(self, kind: type[M]) -> M:
        """The next message of this kind; others before it are dropped. Raises AssertionError after 10 s."""
        while True:
            assert self._socket.poll(PATIENCE_MS), f"no {kind.__name__} came"
            message = wire.decode_server(self._socket.recv_multipart()[1])
            if isinstance(message, kind):
                return message

    def answer_to(self, client_request_id: str) -> wire.Done | wire.Error:
        """The terminal message of a request."""
        while True:
            assert self._socket.poll(PATIENCE_MS), f"no answer to {client_request_id} came"
            message = wire.decode_server(self._socket.recv_multipart()[1])
            if isinstance(message, wire.Done | wire.Error) and message.client_request_id == client_request_id:
                return message

"""One connected client: its credits, its outbox, and whether it is still there. No socket here, only a Link to one."""

from __future__ import annotations

from collections import deque
from enum import Enum
from typing import Protocol

from msd.wire import Ack, Delta, Done, Error, ServerMessage, encode

RETRY_MIN_S = 0.000_5
RETRY_MAX_S = 0.1
"""A full peer is tried again after RETRY_MIN_S, doubling up to RETRY_MAX_S while nothing gets through."""
MAX_OUTBOX_BYTES = 16 * 1024 * 1024
"""The outbox is bounded by messages; this bounds it when they are answers of many megabytes."""
BURST_FACTOR = 16
"""One turn of the loop can answer hundreds of requests, faster than libzmq's thread takes them: while messages get
through, the outbox may hold this many times its bound. Of a client that reads nothing for a tenth of a second it may
not."""


class Delivery(Enum):
    """What became of a message: in the peer's pipe; no room in it; or there is no such peer."""

    SENT = "sent"
    FULL = "full"
    GONE = "gone"


class Link(Protocol):
    """What a session needs of the socket that it lives on."""

    def transmit(self, identity: bytes, payload: bytes) -> Delivery:
        """Try to send, never wait."""
        ...

    def await_room(self, session: ClientSession) -> None:
        """Call `session.flush` when the peer may have room again."""
        ...

    def ended(self, session: ClientSession, reason: str) -> None:
        """The session closed itself; forget it."""
        ...


class ClientSession:
    """The Session of one ZeroMQ connection (`msd.ports.Session`). Equal only to itself.

    Control messages that find no room wait in the outbox, in order; when more than `max_outbox` of them wait and none
    gets through any more, the session is closed.
    Deltas never wait here: `send_delta` says no, and egress coalesces until it is resumed.
    """

    __slots__ = (
        "_blocked",
        "_delta_credit",
        "_link",
        "_max_outbox",
        "_max_unfinished",
        "_num_outbox_bytes",
        "_num_submits",
        "_num_unfinished",
        "_outbox",
        "_unfinished",
        "closed",
        "descriptor",
        "greeted",
        "identity",
        "last_heard_s",
        "last_probed_s",
        "own_tenant",
        "peer",
        "retry_at_s",
        "retry_s",
        "tenant",
        "told_version",
        "user_id",
        "wants_room",
    )

    def __init__(
        self,
        link: Link,
        identity: bytes,
        user_id: str,
        tenant: str,
        peer: str,
        *,
        max_outbox: int,
        max_unfinished: int,
        now_s: float,
    ) -> None:
        """`user_id`: what the connection authenticated as; `tenant`: whose that was then."""
        self._link = link
        self.identity = identity
        self.user_id = user_id
        self.own_tenant = tenant
        self.tenant = tenant
        self.peer = peer
        self.closed = False
        self.descriptor: tuple[int, int] | None = None
        self.greeted = False
        self.told_version = False
        self.wants_room = False
        self.last_heard_s = now_s
        self.last_probed_s = now_s
        self.retry_s = RETRY_MIN_S
        self.retry_at_s = 0.0
        self._outbox: deque[bytes] = deque()
        self._num_outbox_bytes = 0
        self._max_outbox = max_outbox
        self._max_unfinished = max_unfinished
        self._num_submits = 0
        self._num_unfinished = 0
        self._unfinished: dict[str, int] = {}
        """How many submits of each client_request_id this connection has spent credit on and not got back."""
        self._delta_credit = 0
        self._blocked = False

    # --- what the client is allowed ----------------------------------------------------------------------------------

    @property
    def submit_credit(self) -> int:
        """Cumulative number of submits that this connection may have made, by now."""
        return self._num_submits - self._num_unfinished + self._max_unfinished

    def count_submit(self, client_request_id: str) -> bool:
        """A submit came. False: it is one too many, and its refusal must end it."""
        self._num_submits += 1
        self._num_unfinished += 1
        self._unfinished[client_request_id] = self._unfinished.get(client_request_id, 0) + 1
        return self._num_unfinished <= self._max_unfinished

    def greet(self, delta_credit: int, *, at_most: int) -> bool:
        """The client said hello (again): it takes `delta_credit` Deltas at least. True: as `grant`."""
        self.greeted = True
        return self.grant(max(0, delta_credit - self._delta_credit), at_most=at_most)

    def grant(self, num_deltas: int, *, at_most: int) -> bool:
        """More Deltas may be sent, `at_most` in all. True: a Delta was refused before, so egress must be resumed."""
        self._delta_credit = min(self._delta_credit + num_deltas, at_most)
        return self._take_blocked()

    # --- Session -----------------------------------------------------------------------------------------------------

    def send(self, message: ServerMessage) -> None:
        """Send a control message, or put it in the outbox."""
        if self.closed:
            return
        # Not isinstance of a union: that costs ten times as much, on every message.
        if type(message) is Done or type(message) is Error or type(message) is Ack:
            self._count_answer(message)
        payload = encode(message)
        if not self._outbox:
            match self._link.transmit(self.identity, payload):
                case Delivery.SENT:
                    return
                case Delivery.GONE:
                    self.close("gone")
                    return
                case Delivery.FULL:
                    pass
        max_outbox = self._max_outbox if self.retry_s >= RETRY_MAX_S else self._max_outbox * BURST_FACTOR
        if len(self._outbox) >= max_outbox or self._num_outbox_bytes + len(payload) > MAX_OUTBOX_BYTES:
            self.close("outbox_full")
            return
        self._outbox.append(payload)
        self._num_outbox_bytes += len(payload)
        self._link.await_room(self)

    def send_delta(self, delta: Delta) -> bool:
        """Send tokens; False = no credit or no room, and `Intake.resume` follows when there is some again."""
        if self.closed:
            return False
        if self._delta_credit > 0 and not self._outbox:
            match self._link.transmit(self.identity, encode(delta)):
                case Delivery.SENT:
                    self._delta_credit -= 1
                    return True
                case Delivery.GONE:
                    self.close("gone")
                    return False
                case Delivery.FULL:
                    self._link.await_room(self)
        self._blocked = True
        return False

    # --- for the socket ----------------------------------------------------------------------------------------------

    def flush(self) -> bool:
        """Send from the outbox what finds room. True: a Delta was refused before and may be tried again."""
        while self._outbox and not self.closed:
            match self._link.transmit(self.identity, self._outbox[0]):
                case Delivery.SENT:
                    self._num_outbox_bytes -= len(self._outbox.popleft())
                case Delivery.GONE:
                    self.close("gone")
                case Delivery.FULL:
                    return False
        return self._delta_credit > 0 and self._take_blocked()

    @property
    def last_contact_s(self) -> float:
        """When the peer was last heard or asked for."""
        return max(self.last_heard_s, self.last_probed_s)

    @property
    def num_queued(self) -> int:
        """Control messages in the outbox."""
        return len(self._outbox)

    def close(self, reason: str) -> None:
        """Nothing is sent any more. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._outbox.clear()
        self._num_outbox_bytes = 0
        self._link.ended(self, reason)

    def _count_answer(self, message: Done | Error | Ack) -> None:
        """Give back the credit of the submit that this ends, if it was spent on this connection.

        A Done or an Error ends a submit, a duplicate Ack began none; `not_found` answers something else.
        """
        name = message.client_request_id
        if name is None or name not in self._unfinished:
            return
        if (type(message) is Ack and not message.duplicate) or (type(message) is Error and message.code == "not_found"):
            return
        self._num_unfinished -= 1
        left = self._unfinished.pop(name) - 1
        if left:
            self._unfinished[name] = left

    def _take_blocked(self) -> bool:
        blocked, self._blocked = self._blocked, False
        return blocked and not self.closed

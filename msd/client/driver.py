"""Connection and state machine put together: what both clients do each time something happens."""

from __future__ import annotations

import time
from random import Random
from typing import Final, assert_never

from msd.client.connection import Change, Connection, CurveKeys
from msd.client.failures import RequestError
from msd.client.state import ClientState
from msd.errors import DaemonUnreachableError

RECEIVE_AT_ONCE: Final = 256
"""Messages taken in before the application has its turn."""

SAFETY_S: Final = 0.5
"""Longest wait while something is under way: a net under the edges, as the daemon has one."""


class Driver:
    """One client's socket and requests. Its owner calls `work` when a descriptor is readable or a time is due."""

    def __init__(
        self,
        endpoint: str | None,
        *,
        name: str,
        tenant: str | None,
        curve: CurveKeys | None,
        delta_credit: int,
        retry_s: float,
        give_up_s: float,
    ) -> None:
        self.connection = Connection(endpoint, curve)
        self.state = ClientState(
            name,
            tenant=tenant,
            delta_credit=delta_credit,
            retry_s=retry_s,
            give_up_s=give_up_s,
            random=Random(),
            now_s=time.monotonic(),
        )

    @property
    def has_word(self) -> bool:
        """Whether the daemon has answered hello, one way or the other."""
        return self.state.welcome is not None or self.state.refusal is not None

    def work(self, now_s: float) -> bool:
        """Do everything that can be done without waiting. True: there is more already, call again soon."""
        for change in self.connection.changes():
            match change:
                case Change.OPENED:
                    self.state.opened(now_s)
                case Change.LOST:
                    self.state.lost(now_s)
                case Change.REFUSED:
                    text = "the daemon does not know this client's key or user"
                    self.state.refused(RequestError("unauthenticated", text))
                case _:
                    assert_never(change)
        for _ in range(RECEIVE_AT_ONCE):
            payload = self.connection.receive()
            if payload is None:
                break
            self.state.receive(payload, now_s)
        self.state.advance(now_s)
        self.flush()
        # The descriptor is edge-triggered: look again after receiving and sending, before anybody waits on it.
        return self.connection.is_ready(for_output=bool(self.state.outgoing))

    def wait_s(self, now_s: float) -> float | None:
        """How long its owner may wait for a descriptor before it calls `work` again; None: for ever."""
        due_s = self.state.next_due_s()
        if due_s is None:
            return None
        return min(max(0.0, due_s - now_s), SAFETY_S)

    def flush(self) -> None:
        """Send what the socket takes."""
        outgoing = self.state.outgoing
        while outgoing and self.connection.send(outgoing[0]):
            outgoing.popleft()

    def unreachable(self, waited_s: float) -> DaemonUnreachableError:
        """Nobody answered in time."""
        return DaemonUnreachableError(
            f"no daemon answered at {self.connection.endpoint} within {waited_s:g} s",
            remedy="start it with `msd serve`, or name the right endpoint",
        )

"""Targets: what is loaded. Each sends without waiting and tells the record what comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from msgspec import Struct

from loadgen.plan import PlannedRequest
from loadgen.prompts import Content
from loadgen.record import Record
from loadgen.spec import ClassSpec


class TargetDeadError(Exception):
    """Nobody answers at the target, or it went away. Recoverable: start it, or name the right one."""


class ServerFacts(Struct, frozen=True, kw_only=True):
    """What the target said of itself."""

    server: str
    epoch: str
    durable: bool


class Target(Protocol):
    """Something that answers requests. All but `open` and `close` return at once."""

    url: str

    def encode(self, index: int, row: PlannedRequest, traffic: ClassSpec, content: Content) -> bytes:
        """Return the payload of request `index`, built before the run so that sending costs nothing."""
        ...

    async def open(self, tenants: frozenset[str | None]) -> ServerFacts:
        """Connect as each tenant. Raises TargetDeadError."""
        ...

    def start(self, record: Record, now_us: Callable[[], int]) -> None:
        """From now on `record` hears what comes back, on the clock of `now_us`."""
        ...

    def send(self, index: int, tenant: str | None, payload: bytes) -> bool:
        """Send request `index`; False when it cannot leave now."""
        ...

    def cancel(self, index: int, tenant: str | None) -> None:
        """Ask the server to end request `index`, if it can be asked now."""
        ...

    def death(self) -> str | None:
        """Say why the target is dead; None while it lives. Called some 20 times a second."""
        ...

    async def close(self) -> None:
        """Disconnect within a bounded time. Idempotent."""
        ...

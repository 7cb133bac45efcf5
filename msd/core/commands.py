"""Commands: what the world must do next, in the imperative. `dispatch` performs each in the order given."""

from __future__ import annotations

from msgspec import Struct

from msd.domain import Decision, Energy, Outcome
from msd.wire import ErrorCode


class Reject(Struct, frozen=True):
    """Refuse a submit at the door; nothing was stored and no idempotency key is held."""

    request_id: str
    error_code: ErrorCode
    message: str
    retry_after_ms: int | None = None


class Append(Struct, frozen=True):
    """Store the request; answer Appended."""

    request_id: str


class Ack(Struct, frozen=True):
    """Tell the producer that its request is accepted."""

    request_id: str
    seq: int


class AckDuplicate(Struct, frozen=True):
    """Tell the producer that `existing_id` is its request already, and give it that one's answer."""

    request_id: str
    existing_id: str
    state: str


class Dispatch(Struct, frozen=True):
    """Run the request on the decision's mode."""

    request_id: str
    attempt: int
    decision: Decision
    waited_us: int


class Restart(Struct, frozen=True):
    """Tell the producer to forget the Deltas of earlier attempts."""

    request_id: str
    attempt: int
    reason: str


class Abort(Struct, frozen=True):
    """End the running attempt in its engine; answer Finished or Failed."""

    request_id: str
    attempt: int


class Complete(Struct, frozen=True):
    """Store the terminal state; answer Completed."""

    outcome: Outcome


class Deliver(Struct, frozen=True):
    """Send the stored answer."""

    request_id: str
    seq: int


class Settle(Struct, frozen=True):
    """The request's energy is known for good: update the stored result."""

    request_id: str
    energy: Energy


Command = Reject | Append | Ack | AckDuplicate | Dispatch | Restart | Abort | Complete | Deliver | Settle

"""Commands: what the world must do next, in the imperative. `dispatch` performs each in the order given."""

from __future__ import annotations

from msgspec import Struct

from msd.domain import Decision, Energy, Observation, Outcome, Residence
from msd.gate import Withdrawal
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


class Observe(Struct, frozen=True):
    """Tell the decision log what came of a decision; once per decision that ended in an answer."""

    decision: Decision
    observation: Observation


class Shadow(Struct, frozen=True):
    """Run a finished request once more on the reference mode, compare the answers; answer QualityJudged.

    Comes before the request's Complete, while its prompt can still be read. Costs the producer nothing.
    """

    shadow_id: str
    request_id: str
    mode: str
    """The mode that served it, and is on trial."""
    reference_mode: str
    reference_engine: str
    task: str
    max_tokens: int


class Withdraw(Struct, frozen=True):
    """Tell the operator that a mode lost its certificate for a task, and keep that beyond the process."""

    withdrawal: Withdrawal


class Transit(Struct, frozen=True):
    """Bring an engine to another residence; answered by EngineUp, EngineAsleep or EngineLost."""

    engine: str
    to: Residence


Command = (
    Reject
    | Append
    | Ack
    | AckDuplicate
    | Dispatch
    | Restart
    | Abort
    | Complete
    | Deliver
    | Settle
    | Observe
    | Shadow
    | Withdraw
    | Transit
)

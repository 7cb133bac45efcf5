"""What a producer may have to catch. All are `msd.errors.MsdError`; `DaemonUnreachableError` comes from there."""

from __future__ import annotations

from typing import Final

from msd.errors import MsdError
from msd.wire import RETRYABLE, Error

_REMEDIES: Final[dict[str, str]] = {
    "malformed": "the client and the daemon do not agree on the protocol: use the same version of msd",
    "unsupported_version": "use a client of the daemon's version",
    "invalid_field": "mend the named field",
    "too_large": "send less in one request",
    "unauthenticated": "ask the operator for a [[tenant]] with your user id, or for a CURVE key",
    "forbidden": "ask the operator for `may_act_as`, or leave the tenant out",
    "idempotency_conflict": "use a new client_request_id for a new request",
    "context_overflow": "shorten the prompt or lower max_tokens",
    "mode_unavailable": "leave the mode to msd, or name one that `msd status` lists",
    "quality_unreachable": "lower quality_floor (0 takes any mode)",
    "queue_full": "send later",
    "rate_limited": "send later",
    "no_credit": "wait for answers before sending more",
    "deadline_infeasible": "allow more time, or shorten the request",
    "deadline_exceeded": "allow more time",
    "draining": "send again when the daemon is back",
    "journal_unavailable": "send later; the operator should look at the journal's disk",
    "engine_unavailable": "send later; `msd status` shows the engines",
    "dead_letter": "the request lost its engine each time it ran: the operator should look at it",
    "internal": "report it, with the daemon's log",
    "not_found": "the id is wrong, another tenant's, or past retention",
}


class RequestError(MsdError):
    """The daemon refused a request, or could not finish it. Recoverable where `retryable` says so: send it again."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        request_id: str | None = None,
        client_request_id: str | None = None,
        retry_after_ms: int | None = None,
    ) -> None:
        super().__init__(f"{code}: {message}", remedy=_REMEDIES.get(code, ""))
        self.code = code
        self.request_id = request_id
        self.client_request_id = client_request_id
        self.retryable = code in RETRYABLE
        self.retry_after_ms = retry_after_ms

    @classmethod
    def of(cls, error: Error) -> RequestError:
        """The exception for a wire Error."""
        return cls(
            error.code,
            error.message,
            request_id=error.request_id,
            client_request_id=error.client_request_id,
            retry_after_ms=error.retry_after_ms,
        )


class AnswerTimeoutError(MsdError, TimeoutError):
    """No answer within the given time. Recoverable: the request goes on, wait again or fetch its result later."""


class ClientClosedError(MsdError):
    """The client was closed under a request. Recoverable: the result can be fetched by another client."""


class ClientFaultError(MsdError):
    """A fault inside the client ended it; `__cause__` says which. Not recoverable: make a new client, report the fault.

    Requests that were under way go on in the daemon: their results can be fetched by the new client.
    """


class ForkedClientError(MsdError):
    """A client was used in a forked child; its socket and thread live in the parent. Make a new one in the child."""

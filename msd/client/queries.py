"""Questions that are not submits, and which message is the reply to which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from msd import wire
from msd.client.failures import RequestError
from msd.errors import MsdError

Question = wire.Cancel | wire.Status | wire.Fetch | wire.Ping
Reply = wire.Done | wire.Error | wire.State | wire.Results | wire.Pong

MAX_ACKED_IDS: Final = 256


class Query:
    """A question that is not a submit, with its one reply. The reply also says that `after` was taken in before."""

    __slots__ = ("after", "failure", "message", "on_change", "reply", "sent")

    def __init__(self, message: Question, after: wire.Acked | None = None) -> None:
        self.message = message
        self.after = after
        self.sent = False
        self.reply: Reply | None = None
        self.failure: MsdError | None = None
        self.on_change: Callable[[], None] | None = None

    @property
    def is_finished(self) -> bool:
        """It has its reply, or never will."""
        return self.reply is not None or self.failure is not None

    def finish(self, reply: Reply | None, failure: MsdError | None = None) -> None:
        """Settle, and tell whoever waits."""
        self.reply = reply
        self.failure = failure
        if self.on_change is not None:
            self.on_change()

    def is_answered_by(self, reply: Reply) -> bool:
        """Whether a message is the reply to this question."""
        match self.message, reply:
            case wire.Ping(n=n), wire.Pong():
                return reply.n == n
            case wire.Fetch(), wire.Results():
                return True
            case wire.Status(request_id=None, client_request_id=None), wire.State():
                return reply.daemon is not None
            case wire.Status() as asked, wire.State() as answer:
                return _names(asked, answer)
            case wire.Status() as asked, wire.Error() as error:
                return error.code == "not_found" and _names(asked, error)
            case wire.Cancel() as asked, (wire.Done() | wire.Error()) as end:
                return _names(asked, end)
            case _:
                return False


def _names(asked: wire.Status | wire.Cancel, reply: wire.State | wire.Done | wire.Error) -> bool:
    if asked.request_id is not None:
        return reply.request_id == asked.request_id
    return asked.client_request_id is not None and reply.client_request_id == asked.client_request_id


def acknowledgements(request_ids: Sequence[str]) -> list[wire.Acked]:
    """`request_ids` in messages of as many as one may name. Raises RequestError (`invalid_field`)."""
    messages = [
        wire.Acked(request_ids=tuple(request_ids[first : first + MAX_ACKED_IDS]))
        for first in range(0, len(request_ids), MAX_ACKED_IDS)
    ]
    for message in messages:
        check(message)
    return messages


def check(message: Question | wire.Acked) -> None:
    """Refuse here what the daemon would. Raises RequestError (`invalid_field`)."""
    try:
        wire.decode_client(wire.encode(message))
    except (*wire.DECODE_ERRORS, wire.FieldError, TypeError, OverflowError) as error:
        raise RequestError("invalid_field", str(error)) from error


def reply_of(query: Query) -> Reply:
    """The reply to a finished question. Raises its failure, or RequestError when the reply is an Error."""
    if query.failure is not None:
        raise query.failure
    assert query.reply is not None, "finished"
    if isinstance(query.reply, wire.Error):
        raise RequestError.of(query.reply)
    return query.reply

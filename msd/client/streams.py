"""One request as its client sees it: joins Deltas into a stream without gap or repeat, and keeps its end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Final

import msgspec

from msd.client.failures import RequestError
from msd.errors import MsdError
from msd.wire import Delta, Done, Submit

MAX_QUEUED_DELTAS: Final = 64
"""Of one request, unread by the application; further ones are joined to the last."""


class Phase(Enum):
    """Where a request stands between this client and the daemon."""

    QUEUED = "queued"
    SENT = "sent"
    ACKED = "acked"
    RETRYING = "retrying"
    FETCHING = "fetching"
    FINISHED = "finished"


class Stream:
    """State of one request. Written by `ClientState` only; handles read it and wait for `on_change`."""

    __slots__ = (
        "_texts",
        "attempt",
        "cancelled",
        "deadline_s",
        "deltas",
        "done",
        "durable",
        "epoch",
        "failure",
        "has_gap",
        "mode",
        "num_tries",
        "on_change",
        "payload",
        "phase",
        "request_id",
        "retry_until_s",
        "submit",
        "token_ids",
    )

    def __init__(self, submit: Submit, payload: bytes, deadline_s: float | None) -> None:
        self.submit = submit
        self.payload = payload
        self.deadline_s = deadline_s
        self.phase = Phase.QUEUED
        self.request_id: str | None = None
        self.epoch = ""
        self.durable = False
        self.mode = ""
        self.attempt = 0
        self.token_ids: list[int] = []
        self.deltas: deque[Delta] = deque()
        self.has_gap = False
        self.cancelled = False
        self.num_tries = 0
        self.retry_until_s: float | None = None
        self.done: Done | None = None
        self.failure: MsdError | None = None
        self.on_change: Callable[[], None] | None = None
        self._texts: list[str] = []

    @property
    def client_request_id(self) -> str:
        """The idempotency key."""
        return self.submit.client_request_id

    @property
    def text(self) -> str:
        """Text of the current attempt so far."""
        return "".join(self._texts)

    @property
    def is_finished(self) -> bool:
        """It has its one answer."""
        return self.phase is Phase.FINISHED

    def begin_attempt(self, attempt: int) -> None:
        """Forget the tokens of earlier attempts."""
        self.attempt = attempt
        self.token_ids.clear()
        self._texts.clear()
        self.deltas.clear()
        self.has_gap = False

    def requeue(self) -> None:
        """The daemon that knew the request is no more: submit it again as if for the first time."""
        self.begin_attempt(0)
        self.request_id = None
        self.mode = ""
        self.phase = Phase.QUEUED

    def take(self, delta: Delta) -> None:
        """Join a Delta. One of an older attempt, or one already seen, is dropped; a gap waits for the whole text."""
        if self.is_finished or delta.attempt < self.attempt:
            return
        if delta.attempt > self.attempt:
            self.begin_attempt(delta.attempt)
        num_tokens = len(self.token_ids)
        if delta.index != num_tokens or self.has_gap:
            # Text cannot be cut at a token: what does not join exactly is taken from the whole text at the end.
            self.has_gap = self.has_gap or delta.index + len(delta.token_ids) > num_tokens
            return
        self._append(delta)

    def finish(self, done: Done) -> None:
        """The end, with the whole text: what the application has not seen of it comes as a last Delta."""
        if done.text is not None:
            if done.attempt != self.attempt:
                self.begin_attempt(done.attempt)
            seen = self.text
            if done.text != seen and done.text.startswith(seen) and self.submit.stream:
                rest = tuple(done.token_ids or ())[len(self.token_ids) :]
                self._append(
                    Delta(
                        request_id=done.request_id,
                        attempt=done.attempt,
                        index=len(self.token_ids),
                        token_ids=rest,
                        text=done.text[len(seen) :],
                    )
                )
            self._texts = [done.text]
            self.token_ids = list(done.token_ids or ())
        self.done = msgspec.structs.replace(done, text=self.text, token_ids=tuple(self.token_ids))
        self.mode = done.mode
        self._end()

    def fail(self, failure: MsdError) -> None:
        """The end, without an answer."""
        if isinstance(failure, RequestError) and failure.request_id is None:
            failure.request_id = self.request_id
        self.failure = failure
        self._end()

    def changed(self) -> None:
        """Tell whoever waits."""
        if self.on_change is not None:
            self.on_change()

    def _end(self) -> None:
        self.phase = Phase.FINISHED
        self.payload = b""
        self.changed()

    def _append(self, delta: Delta) -> None:
        self._texts.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        if len(self.deltas) >= MAX_QUEUED_DELTAS:
            last = self.deltas.pop()
            delta = msgspec.structs.replace(
                last, token_ids=last.token_ids + delta.token_ids, text=last.text + delta.text
            )
        self.deltas.append(delta)
        self.changed()


class RequestView:
    """What a handle shows of its request without waiting."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    @property
    def client_request_id(self) -> str:
        """The idempotency key: submit again with it to attach to the same request."""
        return self._stream.client_request_id

    @property
    def request_id(self) -> str | None:
        """The daemon's own id; None until the request is acknowledged."""
        return self._stream.request_id

    @property
    def durable(self) -> bool:
        """Whether the daemon promised to keep the request over a restart."""
        return self._stream.durable

    @property
    def mode(self) -> str:
        """The mode that runs it; "" until it runs."""
        return self._stream.mode

    @property
    def text(self) -> str:
        """Text so far, of the current attempt."""
        return self._stream.text

    @property
    def done(self) -> bool:
        """Whether it has its answer."""
        return self._stream.is_finished

    def _raise_failure(self) -> None:
        if self._stream.failure is not None:
            raise self._stream.failure

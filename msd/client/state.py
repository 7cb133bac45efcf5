"""The protocol as a client plays it: a state machine without socket, thread or clock.

Messages and times go in, bytes to send and changed streams come out. `Client` and `AsyncClient` drive the same one.
What it guarantees: an unacknowledged submit is sent again with the same id after a reconnect; an acknowledged one is
resumed where its stream stopped; a daemon that forgot it (new epoch, journal in memory) gets it once more; only
retryable refusals are tried again, not past the deadline.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Iterable
from random import Random
from typing import Final, assert_never

from msd import wire
from msd.client.failures import ClientClosedError, RequestError
from msd.client.queries import Query, Question, Reply
from msd.client.streams import Phase, Stream
from msd.client.submits import with_time_left
from msd.errors import DaemonUnreachableError, MsdError

MAX_OUTSTANDING: Final = 65_536
MAX_QUERIES: Final = 1_024
ACK_AT_ONCE: Final = 256
ACK_AFTER_S: Final = 0.1
PING_AFTER_S: Final = 2.0
HELLO_AGAIN_S: Final = 2.0
SCAN_EVERY_S: Final = 0.1
BACKOFF_MIN_S: Final = 0.1
BACKOFF_MAX_S: Final = 5.0
MAX_RESUMES: Final = 1_024
MAX_FETCH_IDS: Final = 256


class ClientState:
    """All requests of one client. Not thread-safe by itself; times are monotonic seconds."""

    def __init__(
        self,
        name: str,
        *,
        tenant: str | None,
        delta_credit: int,
        retry_s: float,
        give_up_s: float,
        random: Random,
        now_s: float,
    ) -> None:
        self._name = name
        self._tenant = tenant
        self._delta_credit = delta_credit
        self._retry_s = retry_s
        self._give_up_s = give_up_s
        self._random = random
        self.outgoing: deque[bytes] = deque()
        """Encoded messages for the connection, oldest first; the driver takes them away as the socket does."""
        self.welcome: wire.Welcome | None = None
        """The session's Welcome; None while there is no session."""
        self.refusal: RequestError | None = None
        """Why the daemon does not take this client at all."""
        self.epoch = ""
        self.is_draining = False
        self.max_frame_bytes = wire.MAX_FRAME_BYTES
        self._lost_s = now_s
        self._streams: dict[str, Stream] = {}
        self._by_request: dict[str, Stream] = {}
        self._unsent: deque[Stream] = deque()
        self._num_submits = 0
        self._submit_credit = 0
        self._unfinished: dict[str, int] = {}
        """Submits of each id that credit of this connection was spent on; the daemon keeps the same account."""
        self._queries: list[Query] = []
        self._to_fetch: dict[str, Stream] = {}
        self._fetching: dict[str, Stream] = {}
        self._own_fetch: Query | None = None
        self._num_deltas_taken = 0
        self._to_ack: list[str] = []
        self._ack_due_s: float | None = None
        self._last_heard_s = now_s
        self._pinged_s = now_s
        self._hello_due_s: float | None = None
        self._retries: list[tuple[float, int, Stream]] = []
        self._next_scan_s = now_s
        self._serial = itertools.count(1)

    # --- what the application wants ----------------------------------------------------------------------------------

    def submit(self, submit: wire.Submit, payload: bytes, now_s: float) -> Stream:
        """Take on a request. Raises RequestError for what this client must not even send."""
        if len(payload) > self.max_frame_bytes:
            text = f"the request has {len(payload)} bytes, the daemon takes {self.max_frame_bytes}"
            raise RequestError("too_large", text, client_request_id=submit.client_request_id)
        if len(self._streams) >= MAX_OUTSTANDING:
            raise RequestError("no_credit", f"{MAX_OUTSTANDING} requests of this client are unfinished")
        if submit.client_request_id in self._streams:
            text = "a request of this id is under way in this client: wait for its handle"
            raise RequestError("idempotency_conflict", text, client_request_id=submit.client_request_id)
        deadline_ms = submit.slo.deadline_ms
        stream = Stream(submit, payload, None if deadline_ms is None else now_s + deadline_ms / 1_000)
        if self.refusal is not None:
            stream.fail(self.refusal)
            return stream
        self._streams[stream.client_request_id] = stream
        self._unsent.append(stream)
        self._pump(now_s)
        return stream

    def cancel(self, stream: Stream) -> None:
        """Ask to end a request; its stream ends with what became of it."""
        if stream.is_finished or stream.cancelled:
            return
        stream.cancelled = True
        if stream.phase in (Phase.QUEUED, Phase.RETRYING):
            self._drop(stream)
            stream.finish(_aborted_before_sending(stream))
        elif self.welcome is not None:
            self._send(_cancel_of(stream))

    def ask(self, message: Question, now_s: float, after: wire.Acked | None = None) -> Query:
        """Put a question; sent at once, or when there is a session. `after`: what is sent right before it."""
        if len(self._queries) >= MAX_QUERIES:
            raise RequestError("no_credit", f"{MAX_QUERIES} questions of this client are unanswered")
        query = Query(message, after)
        if self.refusal is not None:
            query.finish(None, self.refusal)
            return query
        self._queries.append(query)
        self._pump(now_s)
        return query

    def forget(self, query: Query) -> None:
        """Nobody waits for the reply any more."""
        if query in self._queries:
            self._queries.remove(query)

    def new_ping(self) -> wire.Ping:
        """A Ping whose Pong can be told from others."""
        return wire.Ping(n=next(self._serial))

    def close(self) -> None:
        """End everything that is under way; acknowledge what was received."""
        self._send_acks()
        self._fail_all(ClientClosedError("the client was closed", remedy="fetch the result with another client"))

    def fail(self, failure: MsdError) -> None:
        """End everything that is under way: this client is no more."""
        self._fail_all(failure)

    # --- what happens on the connection ------------------------------------------------------------------------------

    def opened(self, now_s: float) -> None:
        """A connection is there: say hello on it."""
        self.refusal = None
        self._last_heard_s = now_s
        self._attach(now_s)

    def lost(self, now_s: float) -> None:
        """The connection is gone; the driver makes another."""
        if self.welcome is not None:
            self.welcome = None
            self._lost_s = now_s
        self._hello_due_s = None
        self.outgoing.clear()

    def refused(self, failure: RequestError) -> None:
        """The daemon does not take this client: nothing that is under way will be answered."""
        self.refusal = failure
        self.welcome = None
        self._fail_all(failure)

    def receive(self, payload: bytes, now_s: float) -> None:
        """Take in one message. What cannot be decoded is of a newer protocol and is left out."""
        self._last_heard_s = now_s
        try:
            message = wire.decode_server(payload)
        except wire.DECODE_ERRORS:
            return
        match message:
            case wire.Delta():
                self._on_delta(message)
            case wire.Ack():
                self._on_ack(message, now_s)
            case wire.Done():
                self._on_done(message, now_s)
            case wire.Error():
                self._on_error(message, now_s)
            case wire.Started():
                stream = self._by_request.get(message.request_id)
                if stream is not None and message.attempt >= stream.attempt:
                    if message.attempt > stream.attempt:
                        stream.begin_attempt(message.attempt)
                    stream.mode = message.mode
                    stream.changed()
            case wire.Restarted():
                stream = self._by_request.get(message.request_id)
                if stream is not None:
                    stream.begin_attempt(message.attempt)
                    stream.changed()
            case wire.Welcome():
                self._on_welcome(message, now_s)
            case wire.Pong():
                if self.welcome is not None and message.epoch != self.epoch:
                    self._attach(now_s)
                self._answer(message)
            case wire.State():
                self._answer(message)
            case wire.Results():
                self._on_results(message, now_s)
            case wire.Draining():
                self.is_draining = True
            case _:
                assert_never(message)

    # --- time --------------------------------------------------------------------------------------------------------

    def advance(self, now_s: float) -> None:
        """Do what is due: retries, deadlines, acknowledgements, a sign of life."""
        if self._hello_due_s is not None and now_s >= self._hello_due_s:
            self._attach(now_s)
        while self._retries and self._retries[0][0] <= now_s:
            stream = heapq.heappop(self._retries)[2]
            if stream.phase is Phase.RETRYING:
                stream.phase = Phase.QUEUED
                self._unsent.append(stream)
        if now_s >= self._next_scan_s:
            self._next_scan_s = now_s + SCAN_EVERY_S
            self._fail_expired(now_s)
        if self._ack_due_s is not None and now_s >= self._ack_due_s:
            self._send_acks()
        if self.welcome is not None:
            # A session that the daemon closed looks alive from here; its answer to a Ping tells.
            if self._is_waiting and now_s - max(self._last_heard_s, self._pinged_s) >= PING_AFTER_S:
                self._pinged_s = now_s
                self._send(self.new_ping())
        elif now_s - self._lost_s >= self._give_up_s:
            self._fail_all(
                DaemonUnreachableError(
                    f"no daemon answered for {self._give_up_s:g} s", remedy="start it, or name the right endpoint"
                )
            )
        self._pump(now_s)

    def next_due_s(self) -> float | None:
        """When `advance` has something to do; None = only when something else happens."""
        due = [time_s for time_s in (self._ack_due_s, self._hello_due_s) if time_s is not None]
        if self._retries:
            due.append(self._retries[0][0])
        if self._is_waiting:
            if self.welcome is None:
                due.append(self._lost_s + self._give_up_s)
            else:
                due.append(max(self._last_heard_s, self._pinged_s) + PING_AFTER_S)
            if self._unsent or self._retries or self.welcome is None:
                due.append(self._next_scan_s)
        return min(due, default=None)

    @property
    def num_outstanding(self) -> int:
        """Requests without an answer."""
        return len(self._streams)

    @property
    def _is_waiting(self) -> bool:
        return bool(self._streams or self._queries)

    # --- messages ----------------------------------------------------------------------------------------------------

    def _on_welcome(self, welcome: wire.Welcome, now_s: float) -> None:
        first_of_session = self.welcome is None
        self.welcome = welcome
        self._hello_due_s = None
        self.epoch = welcome.epoch
        self.is_draining = False
        self._submit_credit = welcome.submit_credit
        self.max_frame_bytes = welcome.limits.get("max_frame_bytes", wire.MAX_FRAME_BYTES)
        if first_of_session:
            for stream in self._streams.values():
                if stream.cancelled and stream.phase is Phase.ACKED:
                    self._send(_cancel_of(stream))
        self._pump(now_s)

    def _on_ack(self, ack: wire.Ack, now_s: float) -> None:
        self._submit_credit = ack.submit_credit
        if ack.duplicate:
            # The Ack was made before it counted itself.
            self._count_answer(ack.client_request_id)
        stream = self._streams.get(ack.client_request_id)
        if stream is not None and not stream.is_finished:
            stream.phase = Phase.ACKED
            stream.epoch = self.epoch
            stream.durable = ack.durable
            if stream.cancelled:
                # The first may have come before the daemon knew the request.
                self._send(wire.Cancel(request_id=ack.request_id))
            if stream.request_id != ack.request_id:
                self._bind(stream, ack.request_id)
            stream.changed()
        self._pump(now_s)

    def _on_delta(self, delta: wire.Delta) -> None:
        stream = self._by_request.get(delta.request_id)
        if stream is not None:
            stream.take(delta)
        self._num_deltas_taken += 1
        # Taken means read into this process: a client that hangs as a whole stops granting, and the daemon coalesces.
        if self._num_deltas_taken * 2 >= self._delta_credit and self.welcome is not None:
            self._send(wire.Credit(add=self._num_deltas_taken))
            self._num_deltas_taken = 0

    def _on_done(self, done: wire.Done, now_s: float) -> None:
        self._count_answer(done.client_request_id)
        self._answer(done)
        stream = self._find(done.request_id, done.client_request_id)
        if stream is not None:
            self._conclude(stream, done, now_s)
        self._pump(now_s)

    def _on_error(self, error: wire.Error, now_s: float) -> None:
        if error.message.startswith(wire.HELLO_FIRST):
            # One per message that was under way; the first is enough.
            if self.welcome is not None:
                self._attach(now_s)
            return
        if error.request_id is None and error.client_request_id is None:
            self._on_unaddressed(error, now_s)
            return
        if error.client_request_id is not None and error.code != "not_found":
            self._count_answer(error.client_request_id)
        if not self._answer(error):
            stream = self._find(error.request_id, error.client_request_id)
            if stream is not None:
                self._on_stream_error(stream, error, now_s)
        self._pump(now_s)

    def _on_unaddressed(self, error: wire.Error, now_s: float) -> None:
        """An Error about the connection or a fetch, not about a request."""
        if error.code == "unauthenticated":
            # Also in the middle of a session: its key was revoked.
            self.refused(RequestError.of(error))
        elif self.welcome is None:
            if error.retryable:
                self._hello_due_s = now_s + (error.retry_after_ms or 1_000) / 1_000
            elif error.code != "malformed":
                self.refused(RequestError.of(error))
        elif self._own_fetch is not None:
            fetched, self._fetching, self._own_fetch = self._fetching, {}, None
            for stream in fetched.values():
                self._drop(stream)
                stream.fail(RequestError.of(error))
        else:
            for query in self._queries:
                if query.sent and isinstance(query.message, wire.Fetch):
                    self._queries.remove(query)
                    query.finish(error)
                    return

    def _on_stream_error(self, stream: Stream, error: wire.Error, now_s: float) -> None:
        if error.code == "not_found" and stream.phase is Phase.ACKED and stream.epoch != self.epoch:
            # Another daemon, which does not know it: its journal was memory. Executing twice is allowed, losing is not.
            self._submit_anew(stream)
            return
        if error.code == "not_found" and stream.phase is not Phase.ACKED:
            # That was the answer to a Cancel which came before the request was known.
            return
        failure = RequestError.of(error)
        if not error.retryable or stream.cancelled or not self._retry_later(stream, error, now_s):
            if stream.request_id is not None:
                self._ack(stream.request_id, now_s)
            self._drop(stream)
            stream.fail(failure)

    def _submit_anew(self, stream: Stream) -> None:
        self._forget_request_id(stream)
        stream.requeue()
        self._unsent.append(stream)

    def _retry_later(self, stream: Stream, error: wire.Error, now_s: float) -> bool:
        """Plan another try of a refused request. False: there is no time for one, or no sense in it."""
        if stream.phase is Phase.ACKED and error.code != "draining":
            # Its id is bound to this answer. Only the next daemon may see it differently.
            return False
        if stream.retry_until_s is None:
            stream.retry_until_s = min(now_s + self._retry_s, stream.deadline_s or math.inf)
        backoff_s = min(BACKOFF_MIN_S * 2**stream.num_tries, BACKOFF_MAX_S)
        due_s = now_s + max(backoff_s, (error.retry_after_ms or 0) / 1_000) * self._random.uniform(1.0, 1.25)
        if due_s >= stream.retry_until_s:
            return False
        stream.num_tries += 1
        self._forget_request_id(stream)
        stream.requeue()
        stream.phase = Phase.RETRYING
        heapq.heappush(self._retries, (due_s, next(self._serial), stream))
        return True

    def _on_results(self, results: wire.Results, now_s: float) -> None:
        if self._own_fetch is None:
            self._answer(results)
            self._pump(now_s)
            return
        self._own_fetch = None
        fetched, self._fetching = self._fetching, {}
        for item in results.items:
            stream = fetched.pop(item.request_id or "", None)
            if stream is None:
                continue
            if isinstance(item, wire.Done):
                self._conclude(stream, item, now_s)
            else:
                self._drop(stream)
                stream.fail(RequestError.of(item))
        for request_id, stream in fetched.items():
            if results.more and results.items:
                self._to_fetch[request_id] = stream
            elif stream.epoch != self.epoch:
                self._submit_anew(stream)
            else:
                self._drop(stream)
                stream.fail(RequestError("not_found", "its result is stored no more", request_id=request_id))
        self._pump(now_s)

    def _conclude(self, stream: Stream, done: wire.Done, now_s: float) -> None:
        if stream.is_finished:
            return
        needs_text = (done.detached or stream.has_gap or done.attempt != stream.attempt) and done.usage.completion > 0
        if done.text is None and needs_text:
            stream.phase = Phase.FETCHING
            if stream.request_id != done.request_id:
                self._bind(stream, done.request_id)
            if done.request_id not in self._fetching:
                self._to_fetch[done.request_id] = stream
            return
        self._ack(done.request_id, now_s)
        self._drop(stream)
        stream.finish(done)

    # --- sending -----------------------------------------------------------------------------------------------------

    def _attach(self, now_s: float) -> None:
        """Say hello on a connection without a session, and take up again everything that is under way."""
        if self.welcome is not None:
            self.welcome = None
            self._lost_s = now_s
        self._hello_due_s = now_s + HELLO_AGAIN_S
        self.outgoing.clear()
        self._num_submits = 0
        self._unfinished.clear()
        self._num_deltas_taken = 0
        resumes: list[wire.Resume] = []
        again: list[Stream] = []
        for stream in self._streams.values():
            match stream.phase:
                case Phase.SENT:
                    stream.phase = Phase.QUEUED
                    again.append(stream)
                case Phase.ACKED:
                    assert stream.request_id is not None, "an Ack named it"
                    resumes.append(
                        wire.Resume(request_id=stream.request_id, attempt=stream.attempt, index=len(stream.token_ids))
                    )
                case Phase.QUEUED | Phase.RETRYING | Phase.FETCHING | Phase.FINISHED:
                    pass
                case _:
                    assert_never(stream.phase)
        self._unsent.extendleft(reversed(again))
        self._to_fetch.update(self._fetching)
        self._fetching = {}
        self._own_fetch = None
        for query in self._queries:
            query.sent = False
        for first in range(0, max(len(resumes), 1), MAX_RESUMES):
            self._send(
                wire.Hello(
                    client=self._name,
                    tenant=self._tenant,
                    delta_credit=self._delta_credit,
                    resume=tuple(resumes[first : first + MAX_RESUMES]),
                )
            )

    def _pump(self, now_s: float) -> None:
        """Send what may be sent now: questions, fetches, submits as far as credit goes."""
        if self.welcome is None:
            return
        for query in self._queries:
            is_fetch = isinstance(query.message, wire.Fetch)
            # Results name no question: one fetch at a time.
            if not query.sent and not (is_fetch and self._is_fetching):
                query.sent = True
                if query.after is not None:
                    self._send(query.after)
                self._send(query.message)
        if self._to_fetch and not self._is_fetching:
            request_ids = tuple(itertools.islice(self._to_fetch, MAX_FETCH_IDS))
            self._fetching = {request_id: self._to_fetch.pop(request_id) for request_id in request_ids}
            self._own_fetch = Query(wire.Fetch(request_ids=request_ids))
            self._send(self._own_fetch.message)
        while self._unsent and self._num_submits < self._submit_credit:
            stream = self._unsent.popleft()
            if stream.phase is not Phase.QUEUED:
                continue
            if stream.deadline_s is not None and now_s >= stream.deadline_s:
                self._expire(stream)
                continue
            self._num_submits += 1
            name = stream.client_request_id
            self._unfinished[name] = self._unfinished.get(name, 0) + 1
            stream.phase = Phase.SENT
            self.outgoing.append(self._payload_now(stream, now_s))
            if stream.cancelled:
                self._send(_cancel_of(stream))

    def _payload_now(self, stream: Stream, now_s: float) -> bytes:
        deadline_ms = stream.submit.slo.deadline_ms
        if deadline_ms is None or stream.deadline_s is None:
            return stream.payload
        left_ms = (stream.deadline_s - now_s) * 1_000
        # Not worth another encoding unless it has waited here.
        return stream.payload if deadline_ms - left_ms < 1.0 else wire.encode(with_time_left(stream.submit, left_ms))

    def _send(self, message: wire.ClientMessage) -> None:
        self.outgoing.append(wire.encode(message))

    def _ack(self, request_id: str, now_s: float) -> None:
        self._to_ack.append(request_id)
        if len(self._to_ack) >= ACK_AT_ONCE:
            self._send_acks()
        elif self._ack_due_s is None:
            self._ack_due_s = now_s + ACK_AFTER_S

    def _send_acks(self) -> None:
        self._ack_due_s = None
        if self._to_ack and self.welcome is not None:
            self._send(wire.Acked(request_ids=tuple(self._to_ack)))
        # Unsent ones are no loss: results that nobody acknowledges are kept until their retention ends.
        self._to_ack.clear()

    # --- inside ------------------------------------------------------------------------------------------------------

    @property
    def _is_fetching(self) -> bool:
        return self._own_fetch is not None or any(
            query.sent and isinstance(query.message, wire.Fetch) for query in self._queries
        )

    def _answer(self, reply: Reply) -> bool:
        """Give a reply to the question it answers. False: to none."""
        for query in self._queries:
            if query.sent and query.is_answered_by(reply):
                self._queries.remove(query)
                query.finish(reply)
                return True
        return False

    def _find(self, request_id: str | None, client_request_id: str | None) -> Stream | None:
        stream = self._by_request.get(request_id or "")
        return stream if stream is not None else self._streams.get(client_request_id or "")

    def _fail_expired(self, now_s: float) -> None:
        """Give up what the daemon cannot answer for: past its deadline and still, or again, on this side."""
        for stream in list(self._streams.values()):
            is_here = self.welcome is None or stream.phase in (Phase.QUEUED, Phase.RETRYING)
            if is_here and stream.deadline_s is not None and now_s >= stream.deadline_s:
                self._expire(stream)

    def _expire(self, stream: Stream) -> None:
        self._drop(stream)
        text = "its deadline passed before the daemon took it"
        stream.fail(RequestError("deadline_exceeded", text, client_request_id=stream.client_request_id))

    def _count_answer(self, client_request_id: str) -> None:
        """A submit ended; its credit is back if it was spent on this connection."""
        num_unfinished = self._unfinished.pop(client_request_id, 0)
        if num_unfinished:
            self._submit_credit += 1
        if num_unfinished > 1:
            self._unfinished[client_request_id] = num_unfinished - 1

    def _bind(self, stream: Stream, request_id: str) -> None:
        self._forget_request_id(stream)
        stream.request_id = request_id
        self._by_request[request_id] = stream

    def _forget_request_id(self, stream: Stream) -> None:
        if stream.request_id is not None:
            self._by_request.pop(stream.request_id, None)
            self._to_fetch.pop(stream.request_id, None)
            self._fetching.pop(stream.request_id, None)

    def _drop(self, stream: Stream) -> None:
        self._streams.pop(stream.client_request_id, None)
        self._forget_request_id(stream)

    def _fail_all(self, failure: MsdError) -> None:
        streams: Iterable[Stream] = list(self._streams.values())
        self._streams.clear()
        self._by_request.clear()
        self._unsent.clear()
        self._to_fetch.clear()
        self._fetching.clear()
        self._own_fetch = None
        self._retries.clear()
        for stream in streams:
            stream.fail(failure)
        queries, self._queries = self._queries, []
        for query in queries:
            query.finish(None, failure)


def _cancel_of(stream: Stream) -> wire.Cancel:
    if stream.request_id is not None:
        return wire.Cancel(request_id=stream.request_id)
    return wire.Cancel(client_request_id=stream.client_request_id)


def _aborted_before_sending(stream: Stream) -> wire.Done:
    return wire.Done(
        request_id="",
        client_request_id=stream.client_request_id,
        attempt=0,
        finish_reason="abort",
        mode="",
        decision_id="",
        usage=wire.Usage(prompt=0, cached=0, completion=0),
        timings=wire.TimingFields(queue_ms=0, ttft_ms=0, tpot_ms=0, engine_ms=0, e2e_ms=0),
        reason="cancelled before it was sent",
        text="",
        token_ids=(),
    )

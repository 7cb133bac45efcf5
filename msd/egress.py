"""OUT: answers take shape here and leave through Session ports.

Per open request: what was generated so far, and who reads it. A reader's position is an index into that one list, so
"the pending Delta" of a slow reader costs no copy: it is whatever lies between the position and the end. Nothing here
waits; a reader that falls too far behind is detached and gets the whole text with its Done.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Final, Protocol, cast

from msd.config import LimitsConfig
from msd.domain import Chunk, Request, Result
from msd.ports import Session
from msd.wire import (
    RETRYABLE,
    Ack,
    Delta,
    Done,
    EnergyFields,
    Error,
    ErrorCode,
    Restarted,
    Results,
    Started,
    TimingFields,
    Usage,
    refusal,
)

COALESCE_S: Final = 0.020
"""Longest time that a token after the first may wait for company."""
COALESCE_S_PER_STREAM: Final = 0.000_5
"""One Delta costs some 11 us wherever it goes: with many streams they wait a little, so that each carries more."""
TOKEN_BYTES: Final = 5
"""A token id in msgpack, at most (uint32); its text is counted as UTF-8."""
MAX_READERS: Final = 8
"""Of one request (reconnects, repeats of the same submit); the oldest makes room."""


class Timers(Protocol):
    """The two calls of an event loop that egress needs; real and virtual loops have them."""

    def call_soon(self, callback: Callable[[], None]) -> object:
        """Call in this loop's next turn."""
        ...

    def call_later(self, delay: float, callback: Callable[[], None]) -> object:
        """Call after `delay` seconds."""
        ...


class _Reader:
    """Who reads an answer, how far they are (index of the next piece), and what is not sent yet, in bytes."""

    __slots__ = ("detached", "next_piece", "num_pending_bytes", "session")

    def __init__(self, session: Session) -> None:
        self.session = session
        self.next_piece = 0
        self.num_pending_bytes = 0
        self.detached = False


class _Answer:
    """What one open request has generated, in the pieces its engine gave, and its readers."""

    __slots__ = ("attempt", "readers", "request", "result", "sizes", "started", "starts", "texts", "token_ids")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.attempt = 0
        self.started: Started | None = None
        self.result: Result | None = None
        self.readers: list[_Reader] = []
        self.texts: list[str] = []
        self.starts: list[int] = []
        self.sizes: list[int] = []
        self.token_ids: list[int] = []

    @property
    def is_streaming(self) -> bool:
        return self.request.stream and bool(self.texts)

    def forget_pieces(self) -> None:
        self.texts, self.starts, self.sizes, self.token_ids = [], [], [], []
        for reader in self.readers:
            reader.next_piece = 0
            reader.num_pending_bytes = 0
            reader.detached = False


class _Account:
    """Of one session: the answers it reads, how much of them waits for it (bytes), whether it refused a Delta, and
    which of its reads wait for it to resume, in the order in which they began to."""

    __slots__ = ("blocked", "num_pending_bytes", "reads", "waiting")

    def __init__(self) -> None:
        self.blocked = False
        self.num_pending_bytes = 0
        self.reads: dict[str, tuple[_Answer, _Reader]] = {}
        self.waiting: dict[str, tuple[_Answer, _Reader]] = {}


class Egress:
    """Sends what becomes of requests to the sessions that read them. Called on the loop only; never blocks."""

    def __init__(self, timers: Timers, limits: LimitsConfig) -> None:
        self._timers = timers
        self._max_pending_bytes = limits.pending_delta_bytes
        self._max_session_bytes = limits.session_delta_bytes
        self._answers: dict[str, _Answer] = {}
        self._accounts: dict[Session, _Account] = {}
        self._dirty: dict[str, _Answer] = {}
        self._flush_scheduled = False
        self._num_streaming = 0
        self.num_deltas = 0
        self.num_detached = 0

    # --- life of a request -------------------------------------------------------------------------------------------

    def register(self, request: Request, session: Session | None) -> None:
        """A request begins; `session` reads it. None: nobody is there (recovered from the journal)."""
        answer = _Answer(request)
        self._answers[request.request_id] = answer
        if session is not None:
            self._attach(answer, session)

    def reject(self, request_id: str, code: str, message: str, retry_after_ms: int | None = None) -> None:
        """Refuse a registered request: Error to its readers, and it is forgotten. `code` is a wire.ErrorCode."""
        answer = self._answers.get(request_id)
        if answer is None:
            return
        error = refusal(
            cast(ErrorCode, code),
            message,
            request_id=request_id,
            client_request_id=answer.request.client_request_id,
            retry_after_ms=retry_after_ms,
        )
        for reader in self._forget(answer):
            reader.session.send(error)

    def ack(self, request_id: str, seq: int, durable: bool) -> None:
        """The request is stored: tell its readers."""
        answer = self._answers.get(request_id)
        if answer is not None:
            for reader in answer.readers:
                _send_ack(reader.session, answer.request, request_id, seq, False, "waiting", durable)

    def ack_duplicate(self, request_id: str, existing_id: str, state: str, durable: bool) -> Session | None:
        """`request_id` repeats `existing_id`: its reader reads that one, from the first token.

        Returns the session when the existing answer is not here (finished and delivered): the caller then sends the
        stored result with `send_result`.
        """
        answer = self._answers.get(request_id)
        if answer is None:
            return None
        readers = self._forget(answer)
        session = readers[-1].session if readers else None
        if session is None:
            return None
        _send_ack(session, answer.request, existing_id, 0, True, state, durable)
        return None if self.follow(session, existing_id, 0, 0) else session

    def started(self, request_id: str, mode: str, decision_id: str, attempt: int, waited_us: int) -> None:
        """An attempt begins."""
        answer = self._answers.get(request_id)
        if answer is None:
            return
        answer.attempt = attempt
        answer.started = Started(
            request_id=request_id, mode=mode, decision_id=decision_id, attempt=attempt, waited_ms=waited_us / 1_000
        )
        for reader in answer.readers:
            reader.session.send(answer.started)

    def chunk(self, request_id: str, attempt: int, chunk: Chunk) -> bool:
        """Tokens came. The first go out at once, later ones with this turn's flush. True: they were the first."""
        answer = self._answers.get(request_id)
        if answer is None or attempt != answer.attempt or not (chunk.token_ids or chunk.text):
            return False
        text = chunk.text
        size = len(chunk.token_ids) * TOKEN_BYTES + (len(text) if text.isascii() else len(text.encode()))
        is_first = not answer.texts
        answer.texts.append(text)
        answer.starts.append(len(answer.token_ids))
        answer.sizes.append(size)
        answer.token_ids.extend(chunk.token_ids)
        if not answer.request.stream:
            return is_first
        if is_first:
            self._num_streaming += 1
        for reader in answer.readers:
            if reader.detached or reader.session.closed:
                continue
            account = self._accounts[reader.session]
            reader.num_pending_bytes += size
            account.num_pending_bytes += size
            if is_first:
                self._send_pending(answer, reader, account)
            if (
                reader.num_pending_bytes > self._max_pending_bytes
                or account.num_pending_bytes > self._max_session_bytes
            ) and not self._send_pending(answer, reader, account):
                self._detach(answer, reader, account)
        if not is_first:
            self._dirty[request_id] = answer
            self._schedule_flush()
        return is_first

    def restart(self, request_id: str, attempt: int, reason: str) -> None:
        """The attempt was lost, `attempt` is the next: forget its tokens; readers that saw some are told."""
        answer = self._answers.get(request_id)
        if answer is None:
            return
        if answer.is_streaming:
            self._num_streaming -= 1
        told = Restarted(request_id=request_id, attempt=attempt, reason=reason)
        for reader in answer.readers:
            if answer.request.stream and reader.next_piece > 0:
                reader.session.send(told)
            self._accounts[reader.session].num_pending_bytes -= reader.num_pending_bytes
        answer.forget_pieces()
        answer.attempt = attempt
        answer.started = None
        self._dirty.pop(request_id, None)

    def output(self, request_id: str) -> tuple[str, tuple[int, ...]]:
        """Text and token ids generated so far."""
        answer = self._answers.get(request_id)
        return ("", ()) if answer is None else ("".join(answer.texts), tuple(answer.token_ids))

    def num_tokens(self, request_id: str) -> int:
        """How many tokens were generated so far."""
        answer = self._answers.get(request_id)
        return 0 if answer is None else len(answer.token_ids)

    def ended(self, result: Result) -> None:
        """This is the result; it goes out with `deliver`, once it is stored."""
        answer = self._answers.get(result.outcome.request_id)
        if answer is not None:
            answer.result = result

    def deliver(self, request_id: str, seq: int) -> None:
        """The result is stored as number `seq`: Done or Error to the readers, and the request is forgotten."""
        answer = self._answers.get(request_id)
        if answer is None:
            return
        result = answer.result
        assert result is not None, "delivered a request that has not ended"
        for reader in answer.readers:
            if not answer.request.stream:
                reader.session.send(message_of(result, with_text=True))
                continue
            # What a slow reader has not seen yet comes with its Done: the last Delta may not wait for credit.
            if not reader.detached and not self._send_pending(answer, reader, self._accounts[reader.session]):
                self._detach(answer, reader, self._accounts[reader.session])
            reader.session.send(message_of(result, with_text=reader.detached, detached=reader.detached))
        self._forget(answer)

    # --- readers that come and go ------------------------------------------------------------------------------------

    def follow(self, session: Session, request_id: str, attempt: int, index: int) -> bool:
        """`session` reads an open request of its tenant, from token `index` of `attempt` on. False: there is none.

        An index of an older attempt begins anew; one inside a piece begins with that piece.
        """
        answer = self._answers.get(request_id)
        if answer is None or answer.request.tenant != session.tenant:
            return False
        reader = self._attach(answer, session)
        account = self._accounts[session]
        num_tokens = len(answer.token_ids)
        if (attempt and attempt != answer.attempt) or index > num_tokens:
            session.send(Restarted(request_id=request_id, attempt=answer.attempt, reason="resumed"))
        elif index:
            # The last piece that begins at or before the index; past all of them when nothing is left.
            reader.next_piece = bisect_right(answer.starts, index) - 1 if index < num_tokens else len(answer.starts)
        if answer.started is not None:
            session.send(answer.started)
        if answer.request.stream:
            reader.num_pending_bytes = sum(answer.sizes[reader.next_piece :])
            account.num_pending_bytes += reader.num_pending_bytes
            # Too much for this session's bound is still sent when it takes it at once.
            if not self._send_pending(answer, reader, account) and (
                reader.num_pending_bytes > self._max_pending_bytes
                or account.num_pending_bytes > self._max_session_bytes
            ):
                self._detach(answer, reader, account)
        return True

    def resume(self, session: Session) -> None:
        """The session has credit and room again: send what waits for it, until it has none."""
        account = self._accounts.get(session)
        if account is None:
            return
        account.blocked = False
        # The one that has waited longest comes first, so that little credit still goes round.
        while account.waiting:
            request_id = next(iter(account.waiting))
            answer, reader = account.waiting[request_id]
            if not self._send_pending(answer, reader, account):
                return
            account.waiting.pop(request_id, None)

    def gone(self, session: Session) -> None:
        """Nobody reads there any more; the requests go on."""
        account = self._accounts.pop(session, None)
        if account is not None:
            for answer, reader in account.reads.values():
                answer.readers.remove(reader)

    def send_result(self, session: Session, result: Result) -> None:
        """A stored result to one session: for repeats, resumes and cancels that came too late."""
        session.send(message_of(result, with_text=True))

    def send_results(self, session: Session, results: Iterable[Result], next_seq: int, more: bool) -> None:
        """Answer a Fetch."""
        items = tuple(message_of(result, with_text=True) for result in results)
        session.send(Results(items=items, next_seq=next_seq, more=more))

    @property
    def num_open(self) -> int:
        """Requests that have begun and not been delivered."""
        return len(self._answers)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _attach(self, answer: _Answer, session: Session) -> _Reader:
        request_id = answer.request.request_id
        account = self._accounts.get(session)
        if account is None:
            account = self._accounts[session] = _Account()
        elif request_id in account.reads:
            self._release(account.reads[request_id][1], answer)
        if len(answer.readers) >= MAX_READERS:
            self._release(answer.readers[0], answer)
        reader = _Reader(session)
        answer.readers.append(reader)
        # Releasing the session's only other reader may have closed its account.
        self._accounts.setdefault(session, account).reads[request_id] = (answer, reader)
        return reader

    def _release(self, reader: _Reader, answer: _Answer) -> None:
        answer.readers.remove(reader)
        self._settle_account(reader, answer)

    def _settle_account(self, reader: _Reader, answer: _Answer) -> None:
        account = self._accounts[reader.session]
        account.num_pending_bytes -= reader.num_pending_bytes
        del account.reads[answer.request.request_id]
        account.waiting.pop(answer.request.request_id, None)
        if not account.reads:
            del self._accounts[reader.session]

    def _forget(self, answer: _Answer) -> list[_Reader]:
        """Drop the answer; return who read it."""
        request_id = answer.request.request_id
        del self._answers[request_id]
        self._dirty.pop(request_id, None)
        if answer.is_streaming:
            self._num_streaming -= 1
        for reader in answer.readers:
            self._settle_account(reader, answer)
        return answer.readers

    def _send_pending(self, answer: _Answer, reader: _Reader, account: _Account) -> bool:
        """Send everything from the reader's position on as one Delta. False: no credit or no room, it stays pending."""
        at = reader.next_piece
        num_pieces = len(answer.texts)
        if at == num_pieces:
            return True
        request_id = answer.request.request_id
        if account.blocked:
            account.waiting[request_id] = answer, reader
            return False
        start = answer.starts[at]
        last_only = at == num_pieces - 1
        delta = Delta(
            request_id=request_id,
            attempt=answer.attempt,
            index=start,
            token_ids=tuple(answer.token_ids[start:]),
            text=answer.texts[at] if last_only else "".join(answer.texts[at:]),
        )
        if not reader.session.send_delta(delta):
            account.blocked = True
            account.waiting[request_id] = answer, reader
            return False
        account.waiting.pop(request_id, None)
        reader.next_piece = num_pieces
        account.num_pending_bytes -= reader.num_pending_bytes
        reader.num_pending_bytes = 0
        self.num_deltas += 1
        return True

    def _detach(self, answer: _Answer, reader: _Reader, account: _Account) -> None:
        reader.detached = True
        account.waiting.pop(answer.request.request_id, None)
        account.num_pending_bytes -= reader.num_pending_bytes
        reader.num_pending_bytes = 0
        self.num_detached += 1

    def _schedule_flush(self) -> None:
        if self._flush_scheduled:
            return
        self._flush_scheduled = True
        delay_s = min(COALESCE_S, (self._num_streaming - 1) * COALESCE_S_PER_STREAM)
        if delay_s > 0:
            self._timers.call_later(delay_s, self._flush)
        else:
            self._timers.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_scheduled = False
        dirty, self._dirty = self._dirty, {}
        for answer in dirty.values():
            for reader in answer.readers:
                if reader.num_pending_bytes and not reader.session.closed:
                    self._send_pending(answer, reader, self._accounts[reader.session])


def message_of(result: Result, *, with_text: bool, detached: bool = False) -> Done | Error:
    """The terminal message of a result: Done, or Error when it has no finish reason."""
    outcome = result.outcome
    if outcome.finish_reason is None:
        return Error(
            code=outcome.error_code,
            message=outcome.message,
            retryable=outcome.error_code in RETRYABLE,
            request_id=outcome.request_id,
            client_request_id=result.client_request_id,
        )
    timings, energy = outcome.timings, outcome.energy
    return Done(
        request_id=outcome.request_id,
        client_request_id=result.client_request_id,
        attempt=outcome.attempt,
        finish_reason=outcome.finish_reason,
        mode=outcome.mode,
        decision_id=outcome.decision_id,
        reason=outcome.reason[:256],
        usage=Usage(
            prompt=outcome.num_prompt_tokens,
            cached=outcome.num_cached_tokens,
            completion=outcome.num_completion_tokens,
        ),
        timings=TimingFields(
            queue_ms=timings.queue_ms,
            ttft_ms=timings.ttft_ms,
            tpot_ms=timings.tpot_ms,
            engine_ms=timings.engine_ms,
            e2e_ms=timings.e2e_ms,
        ),
        text=result.text if with_text else None,
        token_ids=result.token_ids if with_text else None,
        detached=detached,
        energy=None
        if energy is None
        else EnergyFields(
            energy_mj=energy.energy_mj,
            dynamic_mj=energy.dynamic_mj,
            static_mj=energy.static_mj,
            source=energy.source,
            settled=energy.settled,
        ),
    )


def _send_ack(
    session: Session, request: Request, request_id: str, seq: int, duplicate: bool, state: str, durable: bool
) -> None:
    session.send(
        Ack(
            client_request_id=request.client_request_id,
            request_id=request_id,
            seq=seq,
            duplicate=duplicate,
            state=state,
            durable=durable,
            submit_credit=session.submit_credit,
        )
    )

"""The one place where events meet the world: calls `Scheduler.handle` and performs the commands it returns.

Everything runs on the loop. `post` is synchronous: an event that arrives while another is being handled waits in a
deque behind it, so the scheduler never sees a half-performed step. What needs to await (long prompts, stored results)
lives in child tasks of the daemon's TaskGroup.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import assert_never

import structlog

from msd.core import commands as c
from msd.core import events as e
from msd.core.entry import Phase
from msd.core.scheduler import Scheduler
from msd.core.shadow import ATTEMPT as SHADOW_ATTEMPT
from msd.domain import Chunk, EngineInfo, EngineLoad, ExitKind, FinishReason, Prompt, Request, Residence, Result
from msd.egress import TOKEN_BYTES, Egress
from msd.engine.pool import Pool
from msd.gate import Withdrawal
from msd.ingress.accept import Acceptor, RefusedSubmitError
from msd.journal.decision_log import DecisionLog
from msd.learning.shadow_runs import ShadowRuns
from msd.ports import Clock, Journal, Session
from msd.telemetry.metrics import Metrics
from msd.wire import ErrorCode, State, Submit, refusal

_LONG_PROMPTS_AT_ONCE = 64
_log = structlog.get_logger(__name__)


def _forget(withdrawal: Withdrawal) -> None:
    """Keep nothing beyond the process."""


class Dispatcher:
    """Performs commands. It is the Intake of every ingress, the sink of the engines, the listener of the journal."""

    def __init__(
        self,
        scheduler: Scheduler,
        journal: Journal,
        egress: Egress,
        acceptor: Acceptor,
        clock: Clock,
        tasks: asyncio.TaskGroup,
        describe: Callable[[], dict[str, object]],
        *,
        on_withdrawn: Callable[[Withdrawal], None] = _forget,
        decision_log: DecisionLog | None = None,
    ) -> None:
        """`on_withdrawn`: keeps what must outlive the process."""
        self.scheduler = scheduler
        self.metrics = Metrics()
        self.journal = journal
        self.egress = egress
        self._acceptor = acceptor
        self._clock = clock
        self._tasks = tasks
        self._pool: Pool | None = None
        self._events: deque[e.Event] = deque()
        self._handling = False
        self._describe = describe
        self._decision_log = decision_log
        self._staged: dict[str, tuple[Request, Prompt]] = {}
        """Bodies on their way into the journal."""
        self._prompts: dict[str, Prompt] = {}
        """Bodies of what runs: a shadow begins when its request is over and may be gone from the journal."""
        self._shadows = ShadowRuns()
        self._on_withdrawn = on_withdrawn
        self._num_long = 0
        self.idle = asyncio.Event()
        """Set while no request is open; the drain waits for it."""
        self.idle.set()
        self._is_idle = True

    def attach(self, pool: Pool) -> None:
        """The pool needs this object as its sink, so it comes after."""
        self._pool = pool

    @property
    def pool(self) -> Pool:
        """The engines."""
        assert self._pool is not None, "attach the pool first"
        return self._pool

    # --- the loop of events and commands -------------------------------------------------------------------------

    def post(self, event: e.Event) -> None:
        """Hand an event to the scheduler and perform what it commands, in order."""
        self._events.append(event)
        if self._handling:
            return
        self._handling = True
        try:
            while self._events:
                for command in self.scheduler.handle(self._events.popleft()):
                    self._perform(command)
        finally:
            self._handling = False
        self._note_idle()

    def _note_idle(self) -> None:
        is_idle = not (self.scheduler.num_pending or self._num_long)
        if is_idle is not self._is_idle:
            self._is_idle = is_idle
            if is_idle:
                self.idle.set()
            else:
                self.idle.clear()

    def _perform(self, command: c.Command) -> None:
        match command:
            case c.Append():
                request, prompt = self._staged.pop(command.request_id)
                self.journal.append(request, prompt)
            case c.Ack():
                self.egress.ack(command.request_id, command.seq, self.journal.durable)
            case c.Dispatch():
                decision = command.decision
                entry = self.scheduler.entry(command.request_id)
                assert entry is not None, "dispatched a request that is not open"
                self.journal.attempted(command.request_id, command.attempt)
                self.egress.started(
                    command.request_id, decision.mode, decision.decision_id, command.attempt, command.waited_us
                )
                request = entry.request
                if self._decision_log is not None:
                    self._decision_log.decided(request, decision)
                self.pool.submit(
                    command.request_id, command.attempt, decision.engine, request.max_tokens, request.priority
                )
            case c.Complete():
                self._complete(command)
            case c.Deliver():
                self.egress.deliver(command.request_id, command.seq)
            case c.Settle():
                self.journal.settle(command.request_id, command.energy)
            case c.Observe():
                self.metrics.observed(command.decision, command.observation)
                if self._decision_log is not None:
                    self._decision_log.observed(command.decision, command.observation)
            case c.Shadow():
                self._shadow(command)
            case c.Withdraw():
                gone = command.withdrawal
                _log.warning(
                    "certificate_withdrawn",
                    mode=gone.mode,
                    task=gone.task,
                    num_pairs=gone.num_pairs,
                    difference=round(gone.difference, 4),
                    capital=round(gone.capital, 1),
                    remedy="it serves this task again when `msd gate` has certified it anew",
                )
                self._on_withdrawn(gone)
            case c.Transit():
                self.pool.transit(command.engine, command.to)
            case c.Reject():
                self._staged.pop(command.request_id, None)
                self.egress.reject(command.request_id, command.error_code, command.message, command.retry_after_ms)
            case c.AckDuplicate():
                self._staged.pop(command.request_id, None)
                self._ack_duplicate(command)
            case c.Restart():
                self.egress.restart(command.request_id, command.attempt, command.reason)
            case c.Abort():
                self.pool.abort(command.request_id, command.attempt)
            case _:
                assert_never(command)

    def _complete(self, command: c.Complete) -> None:
        outcome = command.outcome
        entry = self.scheduler.entry(outcome.request_id)
        assert entry is not None, "completed a request that is not open"
        text, token_ids = self.egress.output(outcome.request_id)
        result = Result(
            outcome=outcome,
            client_request_id=entry.request.client_request_id,
            tenant=entry.request.tenant,
            text=text,
            token_ids=token_ids,
        )
        self.metrics.completed(outcome, entry.request.tenant)
        self.egress.ended(result)
        self._prompts.pop(outcome.request_id, None)
        self.journal.complete(result)

    async def read_prompt(self, request_id: str) -> Prompt:
        """The body of what an engine is to run: a pending request or a shadow. Raises JournalError."""
        if request_id in self._shadows:
            return self._shadows.prompt(request_id)
        prompt = self._prompts[request_id] = await self.journal.read_prompt(request_id)
        return prompt

    def _shadow(self, command: c.Shadow) -> None:
        """Ask the reference mode what a request has just been answered; comes before the request's Complete."""
        entry = self.scheduler.entry(command.request_id)
        prompt = self._prompts.get(command.request_id)
        assert entry is not None, "shadowed a request that is not open"
        text, token_ids = self.egress.output(command.request_id)
        decode = partial(self._acceptor.text_of, entry.request.model)
        if prompt is not None and self._shadows.begin(command.shadow_id, prompt, text, token_ids, decode):
            engine, priority = command.reference_engine, entry.request.priority
            self.pool.submit(command.shadow_id, SHADOW_ATTEMPT, engine, command.max_tokens, priority)
            return
        now_us = self._clock.now_us()
        self.post(e.QualityJudged(now_us, command.shadow_id, command.mode, command.task, None))

    def _shadow_ended(self, shadow_id: str, *, is_whole: bool) -> None:
        told = self._shadows.end(shadow_id, is_whole=is_whole)
        now_us = self._clock.now_us()
        self.post(e.QualityJudged(now_us, shadow_id, "", "", told.difference, told.num_tokens, told.agrees))

    def _ack_duplicate(self, command: c.AckDuplicate) -> None:
        session = self.egress.ack_duplicate(
            command.request_id, command.existing_id, command.state, self.journal.durable
        )
        if session is not None:
            self._spawn(self._answer_stored(session, command.existing_id, None))

    # --- Intake --------------------------------------------------------------------------------------------------

    def submit(self, submit: Submit, session: Session) -> None:
        """Build the request and post it; a long prompt is tokenised off the loop first."""
        now_us = self._clock.now_us()
        if not self._acceptor.is_long(submit):
            try:
                request, prompt = self._acceptor.accept(submit, session.tenant, now_us)
            except RefusedSubmitError as error:
                self._refuse(submit, session, error.code, str(error))
                return
            self._submitted(request, prompt, session)
        elif self._num_long >= _LONG_PROMPTS_AT_ONCE:
            self._refuse(submit, session, "queue_full", "too many long prompts at once", retry_after_ms=100)
        else:
            self._num_long += 1
            self._note_idle()
            self._spawn(self._submit_long(submit, session, now_us))

    async def _submit_long(self, submit: Submit, session: Session, received_us: int) -> None:
        try:
            request, prompt = await self._acceptor.accept_off_loop(submit, session.tenant, received_us)
        except RefusedSubmitError as error:
            self._refuse(submit, session, error.code, str(error))
            return
        finally:
            self._num_long -= 1
            self._note_idle()
        self._submitted(request, prompt, session)

    def _submitted(self, request: Request, prompt: Prompt, session: Session) -> None:
        self._staged[request.request_id] = request, prompt
        self.egress.register(request, session)
        is_full = self.journal.is_full(request.tenant, request.client_request_id)
        self.post(e.Submitted(self._clock.now_us(), request, is_full))

    def _refuse(
        self, submit: Submit, session: Session, code: ErrorCode, message: str, retry_after_ms: int | None = None
    ) -> None:
        self.post(e.Refused(self._clock.now_us(), code))
        session.send(refusal(code, message, client_request_id=submit.client_request_id, retry_after_ms=retry_after_ms))

    def cancel(self, session: Session, request_id: str | None, client_request_id: str | None) -> None:
        """Cancel an open request of the session's tenant; a finished one is answered with its result."""
        entry = (
            self.scheduler.entry(request_id)
            if request_id is not None
            else self.scheduler.find(session.tenant, client_request_id or "")
        )
        if entry is not None and entry.request.tenant == session.tenant:
            self.post(e.Cancelled(self._clock.now_us(), entry.request.request_id))
        else:
            self._spawn(self._answer_stored(session, request_id, client_request_id))

    def status(self, session: Session, request_id: str | None, client_request_id: str | None) -> None:
        """Where a request stands, or the daemon."""
        if request_id is None and client_request_id is None:
            session.send(State(daemon=self._describe()))
            return
        entry = (
            self.scheduler.entry(request_id)
            if request_id is not None
            else self.scheduler.find(session.tenant, client_request_id or "")
        )
        if entry is None or entry.request.tenant != session.tenant:
            self._spawn(self._answer_state(session, request_id, client_request_id))
            return
        session.send(
            State(
                request_id=entry.request.request_id,
                client_request_id=entry.request.client_request_id,
                state="waiting" if entry.phase in (Phase.APPENDING, Phase.WAITING) else "running",
                attempt=entry.attempt,
                mode=entry.decision.mode if entry.decision is not None else "",
            )
        )

    def fetch(self, session: Session, request_ids: Sequence[str] | None, since_seq: int | None, max_bytes: int) -> None:
        """Stored results of the session's tenant."""
        self._spawn(self._answer_fetch(session, request_ids, since_seq, max_bytes))

    def acknowledge(self, session: Session, request_ids: Sequence[str]) -> None:
        """The tenant has these results."""
        self.journal.acknowledge(session.tenant, request_ids)

    def follow(self, session: Session, request_id: str, attempt: int, index: int) -> None:
        """Take up a stream again after a reconnect."""
        entry = self.scheduler.entry(request_id)
        if entry is not None and entry.request.tenant == session.tenant:
            self.egress.follow(session, request_id, attempt, index)
        else:
            self._spawn(self._answer_stored(session, request_id, None))

    def resume(self, session: Session) -> None:
        """The session can take Deltas again."""
        self.egress.resume(session)

    def gone(self, session: Session) -> None:
        """Nobody reads there any more; requests go on."""
        self.egress.gone(session)

    # --- JournalListener -----------------------------------------------------------------------------------------

    def on_appended(self, request_id: str, seq: int) -> None:
        """Stored: the request may be acknowledged."""
        self.post(e.Appended(self._clock.now_us(), request_id, seq))

    def on_append_duplicate(self, request_id: str, existing_id: str, content_hash: bytes) -> None:
        """The key names a finished request."""
        self.post(e.AppendDuplicated(self._clock.now_us(), request_id, existing_id, content_hash))

    def on_append_failed(self, request_id: str, message: str) -> None:
        """Nothing may be promised."""
        self.post(e.AppendFailed(self._clock.now_us(), request_id, message))

    def on_completed(self, request_id: str, seq: int) -> None:
        """Stored: the answer may go out."""
        self.post(e.Completed(self._clock.now_us(), request_id, seq))

    # --- EngineSink ----------------------------------------------------------------------------------------------

    def on_chunk(self, request_id: str, attempt: int, chunk: Chunk) -> None:
        """Tokens go straight to egress; only the first of an attempt is an event."""
        if self._shadows and request_id in self._shadows:
            is_first = self._shadows.chunk(request_id, chunk)
        else:
            is_first = self.egress.chunk(request_id, attempt, chunk)
        if is_first:
            self.post(e.FirstToken(self._clock.now_us(), request_id, attempt, chunk.num_cached_tokens))

    def on_finished(self, request_id: str, attempt: int, finish_reason: FinishReason) -> None:
        """The attempt has ended and its slot is free."""
        if self._shadows and request_id in self._shadows:
            self._shadow_ended(request_id, is_whole=finish_reason != "abort")
            return
        num_tokens = self.egress.num_tokens(request_id)
        self.post(e.Finished(self._clock.now_us(), request_id, attempt, finish_reason, num_tokens))

    def on_failed(self, request_id: str, attempt: int, error_code: str, message: str, lost: bool) -> None:
        """The attempt has ended without an answer."""
        if self._shadows and request_id in self._shadows:
            self._shadow_ended(request_id, is_whole=False)
            return
        self.post(e.Failed(self._clock.now_us(), request_id, attempt, error_code, message, lost))

    def on_engine_starting(self, engine: str) -> None:
        """An engine loads."""
        self.post(e.EngineStarting(self._clock.now_us(), engine))

    def on_engine_up(self, info: EngineInfo) -> None:
        """Another engine takes requests."""
        self.post(e.EngineUp(self._clock.now_us(), info))

    def on_engine_lost(self, engine: str, kind: ExitKind, reason: str) -> None:
        """An engine is gone."""
        self.post(e.EngineLost(self._clock.now_us(), engine, kind, reason))

    def on_engine_asleep(self, engine: str, residence: Residence, took_s: float) -> None:
        """An engine left the GPU as it was told to."""
        self.post(e.EngineAsleep(self._clock.now_us(), engine, residence, took_s))

    def on_engine_stepped(self, engine: str, load: EngineLoad, progress: tuple[tuple[str, int], ...]) -> None:
        """Gauges and progress of one engine."""
        self.post(e.EngineStepped(self._clock.now_us(), engine, load, progress))

    # --- answers that must await ---------------------------------------------------------------------------------

    def _spawn(self, answer: Coroutine[None, None, None]) -> None:
        self._tasks.create_task(answer)

    async def _find(self, session: Session, request_id: str | None, client_request_id: str | None) -> Result | None:
        result = await self.journal.find(session.tenant, request_id, client_request_id)
        if result is None and not session.closed:
            wanted = request_id or client_request_id
            message = f"no request {wanted!r} of tenant {session.tenant!r} is open or stored"
            session.send(refusal("not_found", message, request_id=request_id, client_request_id=client_request_id))
        return result

    async def _answer_stored(self, session: Session, request_id: str | None, client_request_id: str | None) -> None:
        result = await self._find(session, request_id, client_request_id)
        if result is not None:
            self.egress.send_result(session, result)

    async def _answer_state(self, session: Session, request_id: str | None, client_request_id: str | None) -> None:
        result = await self._find(session, request_id, client_request_id)
        if result is not None:
            outcome = result.outcome
            session.send(
                State(
                    request_id=outcome.request_id,
                    client_request_id=result.client_request_id,
                    state="finished",
                    attempt=outcome.attempt,
                    mode=outcome.mode,
                )
            )

    async def _answer_fetch(
        self, session: Session, request_ids: Sequence[str] | None, since_seq: int | None, max_bytes: int
    ) -> None:
        results: list[Result] = []
        next_seq, more = 0, False
        if request_ids is None:
            results, next_seq, more = await self.journal.fetch(session.tenant, since_seq or 0, max_bytes)
        else:
            num_bytes = 0
            for request_id in dict.fromkeys(request_ids):
                result = await self.journal.find(session.tenant, request_id)
                if result is None:
                    continue
                num_bytes += len(result.text.encode()) + TOKEN_BYTES * len(result.token_ids)
                if results and num_bytes > max_bytes:
                    more = True
                    break
                results.append(result)
        self.egress.send_results(session, results, next_seq, more)

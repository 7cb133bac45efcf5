"""The engines and what runs on them: starts, health, restarts with backoff, one task per request, drain.

All state is written on the loop, by the pool's own tasks. The pool knows no vLLM: an engine is what a factory makes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import aclosing
from enum import Enum
from random import Random
from typing import Literal

import structlog
from msgspec import Struct

from msd.domain import EngineInfo, EngineLoad, ExitKind, Prompt, Residence, Sampling
from msd.errors import (
    EngineError,
    EngineLostError,
    EngineStartError,
    JournalError,
    MsdError,
    RequestRefusedByEngineError,
)
from msd.ports import Clock, Engine, EngineSink

EngineState = Literal["starting", "up", "asleep", "cold", "backoff", "failed", "stopped"]

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 30.0
"""An engine's own stop is bounded; this is the bound on that bound."""
BACKOFF_FIRST_S = 1.0
BACKOFF_MOST_S = 60.0
BACKOFF_JITTER = 0.2
HEALTHY_AFTER_S = 60.0
BREAKER_DEATHS = 5
BREAKER_WINDOW_S = 600.0
BREAKER_PROBE_S = 300.0
STEPPED_INTERVAL_US = 50_000
TRANSITION_TIMEOUT_S = 120.0
"""A sleep or a wake (with its canary) that takes longer has failed."""
CANARY_PROMPT = Prompt(
    token_ids=tuple(5 + index % 40 for index in range(24)), sampling=Sampling(temperature=0.0, ignore_eos=True)
)
CANARY_TOKENS = 16
"""After a wake an engine must say of CANARY_PROMPT what it said after its start: some have woken to talk gibberish."""

log = structlog.get_logger(__name__)


class EngineStatus(Struct, frozen=True, kw_only=True):
    """What the pool knows of one engine. `failed`: it died too often and is only probed every few minutes.

    `asleep` and `cold` (not running): it was told to leave the GPU.
    """

    engine: str
    state: EngineState
    load: EngineLoad = EngineLoad()
    pids: tuple[int, ...] = ()
    last_error: str = ""
    num_starts: int = 0
    state_since_us: int = 0


class _End(Enum):
    """Who ended an attempt before the engine did."""

    NOBODY = 0
    ABORT = 1
    LOST = 2


class _Attempt:
    """One run of one request: its task and how many tokens came."""

    __slots__ = ("begun", "end", "num_tokens", "number", "request_id", "task")

    def __init__(self, request_id: str, number: int) -> None:
        self.request_id = request_id
        self.number = number
        self.num_tokens = 0
        self.begun = False
        self.end = _End.NOBODY
        self.task: asyncio.Task[None] | None = None


class _Slot:
    """One configured engine: the live object, if any, and its history."""

    __slots__ = (
        "attempts", "breaker_open", "canary", "deaths_us", "engine", "factory", "info", "last_error", "may_move",
        "name", "num_failures", "num_finished", "num_starts", "owes_answer", "state", "state_since_us", "stepped_timer",
        "stepped_us", "task", "trouble", "up_us", "wanted", "wish",
    )  # fmt: skip

    def __init__(self, name: str, factory: Callable[[], Engine], *, may_move: bool) -> None:
        self.name = name
        self.factory = factory
        self.may_move = may_move
        self.wanted: Residence = "cold" if may_move else "resident"
        self.wish = asyncio.Event()
        """Set when `wanted` changes."""
        self.owes_answer = False
        """It was told to leave, and has not said yet that it is gone."""
        self.canary: tuple[int, ...] = ()
        self.state: EngineState = "starting"
        self.state_since_us = 0
        self.engine: Engine | None = None
        self.info: EngineInfo | None = None
        self.attempts: dict[tuple[str, int], _Attempt] = {}
        self.num_starts = 0
        self.num_failures = 0
        self.num_finished = 0
        self.up_us: int | None = None
        self.deaths_us: list[int] = []
        self.breaker_open = False
        self.last_error = ""
        self.trouble: asyncio.Future[str] | None = None
        self.stepped_us = -STEPPED_INTERVAL_US
        self.stepped_timer: asyncio.TimerHandle | None = None
        self.task: asyncio.Task[None] | None = None


class Pool:
    """Keeps every configured engine alive and runs requests on them; reports to an `EngineSink`."""

    def __init__(
        self,
        factories: Mapping[str, Callable[[], Engine]],
        sink: EngineSink,
        read_prompt: Callable[[str], Awaitable[Prompt]],
        rng: Random,
        clock: Clock,
        *,
        start_timeout_s: Mapping[str, float] | None = None,
        may_move: Collection[str] = (),
        sleep_level: int = 1,
    ) -> None:
        """`factories` make a new engine object per start, in the order in which engines start.

        `may_move`: engines that start, sleep, wake and stop when `transit` says so; the others start at once and stay.
        """
        self._slots = {name: _Slot(name, factory, may_move=name in may_move) for name, factory in factories.items()}
        self._sleep_level = sleep_level
        self._sink = sink
        self._read_prompt = read_prompt
        self._rng = rng
        self._clock = clock
        self._start_timeout_s = dict(start_timeout_s or {})
        self._transition = asyncio.Lock()
        """Held around start, stop, sleep and wake: two engines that size their memory at once both get it wrong."""
        self._group: asyncio.TaskGroup | None = None
        self._stopping = False
        self._ended = asyncio.Event()

    # --- life ------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Start all engines, one after another, and keep them; returns after `stop`."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                for slot in self._slots.values():
                    slot.task = group.create_task(self._keep(slot), name=f"engine {slot.name}")
        finally:
            self._group = None
            for slot in self._slots.values():
                self._enter(slot, "stopped")
            self._ended.set()

    async def stop(self, timeout_s: float) -> bool:
        """Abort what still runs, stop all engines; False when that took longer than `timeout_s`."""
        self._stopping = True
        for slot in self._slots.values():
            for attempt in tuple(slot.attempts.values()):
                self._interrupt(attempt, _End.ABORT)
            if slot.task is not None:
                slot.task.cancel()
        if self._group is None:
            return True
        try:
            async with asyncio.timeout(timeout_s):
                await self._ended.wait()
        except TimeoutError:
            return False
        return True

    def transit(self, engine: str, to: Residence) -> None:
        """Bring an engine elsewhere that may move: `on_engine_up`, `on_engine_asleep` or `on_engine_lost` follows.

        What cannot sleep is stopped instead, and reported `cold`.
        """
        slot = self._slots[engine]
        assert slot.may_move, f"engine {engine} was not to move"
        slot.wanted = to
        slot.owes_answer = to != "resident"
        slot.wish.set()

    def status(self) -> list[EngineStatus]:
        """One entry per configured engine, in their order."""
        return [
            EngineStatus(
                engine=slot.name,
                state=slot.state,
                load=slot.engine.load() if slot.engine is not None and slot.state == "up" else EngineLoad(),
                pids=slot.info.pids if slot.info is not None else (),
                last_error=slot.last_error,
                num_starts=slot.num_starts,
                state_since_us=slot.state_since_us,
            )
            for slot in self._slots.values()
        ]

    # --- requests --------------------------------------------------------------------------------------------------

    def submit(self, request_id: str, attempt: int, engine: str, max_tokens: int, priority: int) -> None:
        """Run a request on an engine; everything that comes of it is reported to the sink, never from this call."""
        assert self._group is not None, "submit() outside run()"
        slot = self._slots[engine]
        entry = _Attempt(request_id, attempt)
        assert (request_id, attempt) not in slot.attempts, f"{request_id} attempt {attempt} runs already"
        slot.attempts[request_id, attempt] = entry
        entry.task = self._group.create_task(self._attend(slot, entry, max_tokens, priority))

    def abort(self, request_id: str, attempt: int) -> None:
        """End a running attempt: `on_finished(..., "abort")` follows, unless it ended by itself. Unknown: nothing."""
        for slot in self._slots.values():
            entry = slot.attempts.get((request_id, attempt))
            if entry is not None:
                self._interrupt(entry, _End.ABORT)
                return

    def _interrupt(self, entry: _Attempt, end: _End) -> None:
        if entry.end is not _End.NOBODY:
            return
        entry.end = end
        # A task that is cancelled before its first step never runs at all, and could report nothing.
        if entry.begun and entry.task is not None:
            entry.task.cancel()

    async def _attend(self, slot: _Slot, entry: _Attempt, max_tokens: int, priority: int) -> None:
        """Read the prompt, stream its answer to the sink, report the one end of the attempt."""
        entry.begun = True
        request_id, number, sink = entry.request_id, entry.number, self._sink
        finish_reason = None
        error: MsdError | None = None
        engine = slot.engine
        try:
            if entry.end is _End.NOBODY:
                if engine is None or slot.state != "up":
                    raise EngineLostError(f"engine {slot.name} is not up")
                prompt = await self._read_prompt(request_id)
                async with aclosing(engine.generate(request_id, prompt, max_tokens, priority)) as chunks:
                    async for chunk in chunks:
                        entry.num_tokens += len(chunk.token_ids)
                        finish_reason = chunk.finish_reason
                        sink.on_chunk(request_id, number, chunk)
                        self._report_step(slot)
        except asyncio.CancelledError:
            if entry.end is _End.NOBODY:
                raise
        except MsdError as caught:
            error = caught
            if isinstance(caught, EngineLostError) and engine is slot.engine:
                self._tell_keeper(slot, str(caught))
        finally:
            del slot.attempts[request_id, number]
        if finish_reason is not None:
            slot.num_finished += 1
            sink.on_finished(request_id, number, finish_reason)
        elif entry.end is _End.ABORT:
            sink.on_finished(request_id, number, "abort")
        elif entry.end is _End.LOST:
            sink.on_failed(request_id, number, "engine_unavailable", f"engine {slot.name} was lost", True)
        elif error is None:
            sink.on_failed(request_id, number, "internal", f"engine {slot.name} ended without a finish reason", False)
        else:
            code, lost = _error_code(error)
            sink.on_failed(request_id, number, code, str(error), lost)
        if not slot.attempts:
            self._report_step(slot)

    def _tell_keeper(self, slot: _Slot, reason: str) -> None:
        """A request found its engine dead, perhaps before the engine's own watch did."""
        if slot.trouble is not None and not slot.trouble.done():
            slot.trouble.set_result(reason)

    def _report_step(self, slot: _Slot) -> None:
        """Report gauges and progress now, or once the interval since the last report is over."""
        now_us = self._clock.now_us()
        due_us = slot.stepped_us + STEPPED_INTERVAL_US
        if now_us < due_us:
            if slot.stepped_timer is None and not slot.attempts:
                loop = asyncio.get_running_loop()
                slot.stepped_timer = loop.call_later((due_us - now_us) / 1e6, self._report_late, slot)
            return
        slot.stepped_us = now_us
        if slot.engine is not None and slot.state == "up":
            progress = tuple([(entry.request_id, entry.num_tokens) for entry in slot.attempts.values()])
            self._sink.on_engine_stepped(slot.name, slot.engine.load(), progress)

    def _report_late(self, slot: _Slot) -> None:
        slot.stepped_timer = None
        self._report_step(slot)

    def _enter(self, slot: _Slot, state: EngineState) -> None:
        if state != slot.state or not slot.state_since_us:
            slot.state, slot.state_since_us = state, self._clock.now_us()

    # --- engines ---------------------------------------------------------------------------------------------------

    async def _keep(self, slot: _Slot) -> None:
        """Start the engine, wait until it dies, start it again after a while; until cancelled by `stop`."""
        try:
            while not self._stopping:
                if slot.wanted != "resident":
                    await self._stay_away(slot)
                    continue
                slot.wish.clear()
                started = await self._start(slot)
                if started is not None:
                    loss = await self._serve(slot, started)
                    if loss is None:
                        continue
                    await self._lose(slot, *loss)
                if slot.wanted != "resident":
                    continue
                delay_s = self._backoff_s(slot)
                log.info("engine_restarts_later", engine=slot.name, state=slot.state, delay_s=round(delay_s, 2))
                await self._pause(slot, delay_s)
        finally:
            engine, slot.engine = slot.engine, None
            self._enter(slot, "stopped")
            if slot.stepped_timer is not None:
                slot.stepped_timer.cancel()
                slot.stepped_timer = None
            if engine is not None:
                await self._put_down(engine)
                log.info("engine_stopped", engine=slot.name)

    async def _pause(self, slot: _Slot, delay_s: float) -> None:
        """Wait before the next start, unless the engine is not to come back."""
        if not slot.may_move:
            await asyncio.sleep(delay_s)
            return
        try:
            async with asyncio.timeout(delay_s):
                await self._wished(slot)
        except TimeoutError:
            pass

    async def _wished(self, slot: _Slot) -> None:
        await slot.wish.wait()
        slot.wish.clear()

    async def _stay_away(self, slot: _Slot) -> None:
        """There is no engine, and none is wanted, until one is."""
        self._enter(slot, "cold")
        self._tell_gone(slot, "cold", 0.0)
        await self._wished(slot)

    def _tell_gone(self, slot: _Slot, residence: Residence, took_s: float) -> None:
        if slot.owes_answer:
            slot.owes_answer = False
            self._sink.on_engine_asleep(slot.name, residence, took_s)

    async def _serve(self, slot: _Slot, engine: Engine) -> tuple[ExitKind, str] | None:
        """While the engine lives, put it to sleep and wake it as wanted. None: it was stopped, as wanted."""
        while True:
            loss = await self._until_lost(slot, engine)
            if loss is not None:
                return loss
            error = ""
            if slot.wanted == "resident":
                if slot.state == "asleep":
                    error = await self._wake(slot, engine)
                elif slot.info is not None:
                    self._sink.on_engine_up(slot.info)
            elif slot.wanted == "asleep" and slot.info is not None and slot.info.can_sleep:
                if slot.state == "asleep":
                    self._tell_gone(slot, "asleep", 0.0)
                else:
                    error = await self._put_to_sleep(slot, engine)
            else:
                await self._send_away(slot)
                return None
            if error:
                return ExitKind.DIED, error

    async def _put_to_sleep(self, slot: _Slot, engine: Engine) -> str:
        """Returns why it failed; the engine is then replaced."""
        async with self._transition:
            self._enter(slot, "asleep")
            await self._end_attempts(slot)
            began_us = self._clock.now_us()
            try:
                async with asyncio.timeout(TRANSITION_TIMEOUT_S):
                    await engine.sleep(self._sleep_level)
            except (MsdError, TimeoutError) as error:
                return f"engine {slot.name} did not go to sleep: {str(error) or 'timeout'}"
            took_s = (self._clock.now_us() - began_us) / 1e6
        log.info("engine_asleep", engine=slot.name, took_s=round(took_s, 3))
        self._tell_gone(slot, "asleep", took_s)
        return ""

    async def _wake(self, slot: _Slot, engine: Engine) -> str:
        """Returns why it failed; the engine is then replaced."""
        assert slot.info is not None, "woken before it was up"
        async with self._transition:
            began_us = self._clock.now_us()
            try:
                async with asyncio.timeout(TRANSITION_TIMEOUT_S):
                    await engine.wake()
                    said = await self._say_canary(slot, engine)
            except (MsdError, TimeoutError) as error:
                return f"engine {slot.name} did not wake: {str(error) or 'timeout'}"
            if said[: len(slot.canary)] != slot.canary:
                return f"engine {slot.name} talks gibberish since it woke: the canary's tokens differ"
            took_s = (self._clock.now_us() - began_us) / 1e6
            self._enter(slot, "up")
        log.info("engine_awake", engine=slot.name, took_s=round(took_s, 3))
        self._sink.on_engine_up(slot.info)
        return ""

    async def _send_away(self, slot: _Slot) -> None:
        """Stop an engine that is not wanted on the GPU."""
        why = "wanted cold" if slot.wanted == "cold" else "it cannot sleep"
        async with self._transition:
            self._enter(slot, "cold")
            await self._end_attempts(slot)
            began_us = self._clock.now_us()
            await self._discard(slot)
            took_s = (self._clock.now_us() - began_us) / 1e6
        log.info("engine_cold", engine=slot.name, why=why, took_s=round(took_s, 3))
        self._tell_gone(slot, "cold", took_s)

    async def _say_canary(self, slot: _Slot, engine: Engine) -> tuple[int, ...]:
        said: list[int] = []
        name = f"canary {slot.name}"
        async with aclosing(engine.generate(name, CANARY_PROMPT, CANARY_TOKENS, 0)) as chunks:
            async for chunk in chunks:
                said.extend(chunk.token_ids)
        return tuple(said)

    async def _learn_canary(self, slot: _Slot, engine: Engine) -> None:
        """Tokens on which two runs agree: kernels that add in another order each time may part late in an answer."""
        first, second = await self._say_canary(slot, engine), await self._say_canary(slot, engine)
        same = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(first))
        slot.canary = first[:same]

    async def _start(self, slot: _Slot) -> Engine | None:
        """Bring a new engine up under the transition lock; None, with `last_error` set, when it did not come."""
        limit_s = self._start_timeout_s.get(slot.name, START_TIMEOUT_S)
        self._enter(slot, "starting")
        async with self._transition:
            slot.num_starts += 1
            slot.num_finished = 0
            slot.up_us = None
            log.info("engine_starts", engine=slot.name, num_starts=slot.num_starts)
            self._sink.on_engine_starting(slot.name)
            try:
                engine = slot.engine = slot.factory()
                async with asyncio.timeout(limit_s):
                    info = await engine.start()
                    if slot.may_move:
                        await self._learn_canary(slot, engine)
            except EngineStartError as error:
                slot.last_error = "\n".join((str(error), *error.last_lines))
            except MsdError as error:
                slot.last_error = str(error)
            except TimeoutError:
                slot.last_error = f"engine {slot.name} did not start within {limit_s:g} s"
            else:
                slot.info = info
                self._enter(slot, "up")
                slot.up_us = self._clock.now_us()
                log.info("engine_up", engine=slot.name, start_s=round(info.start_s, 2), pids=info.pids)
                if slot.wanted == "resident":  # else it was told to leave meanwhile, and says so once it has
                    self._sink.on_engine_up(info)
                return engine
            log.error("engine_start_failed", engine=slot.name, error=slot.last_error)
            self._sink.on_engine_lost(slot.name, ExitKind.DIED, slot.last_error)
            await self._discard(slot)
        return None

    async def _until_lost(self, slot: _Slot, engine: Engine) -> tuple[ExitKind, str] | None:
        """Wait until the engine says that it is lost, or one of its requests found out first; None: a wish came."""
        trouble = slot.trouble = asyncio.get_running_loop().create_future()
        lost = asyncio.ensure_future(engine.lost())
        wished = asyncio.ensure_future(self._wished(slot)) if slot.may_move else None
        try:
            waits = (lost, trouble) if wished is None else (lost, trouble, wished)
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if lost.done():
                return lost.result()
            return (ExitKind.DIED, trouble.result()) if trouble.done() else None
        finally:
            slot.trouble = None
            lost.cancel()
            if wished is not None:
                if wished.done() and (lost.done() or trouble.done()):
                    slot.wish.set()  # it is still to be heard
                wished.cancel()

    async def _lose(self, slot: _Slot, kind: ExitKind, reason: str) -> None:
        """Report a dead engine's attempts, then the engine; free what it left."""
        self._enter(slot, "backoff")
        slot.last_error = reason
        log.error("engine_lost", engine=slot.name, reason=reason, num_attempts=len(slot.attempts))
        await self._end_attempts(slot)
        self._sink.on_engine_lost(slot.name, kind, reason)
        async with self._transition:
            await self._discard(slot)

    async def _end_attempts(self, slot: _Slot) -> None:
        while slot.attempts:  # one may come while these end: the core has not heard of the loss yet
            entries = tuple(slot.attempts.values())
            for entry in entries:
                self._interrupt(entry, _End.LOST)
            await asyncio.wait([entry.task for entry in entries if entry.task is not None])

    async def _discard(self, slot: _Slot) -> None:
        engine, slot.engine, slot.info = slot.engine, None, None
        if engine is not None:
            await self._put_down(engine)

    async def _put_down(self, engine: Engine) -> None:
        """Stop an engine to the end, whoever cancels us meanwhile: half a stop leaves processes behind."""
        stop = asyncio.ensure_future(self._stop_within_limit(engine))
        cancelled: asyncio.CancelledError | None = None
        while not stop.done():
            try:
                await asyncio.shield(stop)
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled

    async def _stop_within_limit(self, engine: Engine) -> None:
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await engine.stop()
        except (TimeoutError, EngineError) as error:
            log.error("engine_stop_failed", engine=engine.name, error=str(error) or "timeout")

    def _backoff_s(self, slot: _Slot) -> float:
        """How long to wait before the next start; opens the breaker after too many deaths soon after starts."""
        now_us = self._clock.now_us()
        healthy = slot.up_us is not None and now_us - slot.up_us >= HEALTHY_AFTER_S * 1e6 and slot.num_finished > 0
        if healthy:
            slot.num_failures = 0
            slot.deaths_us.clear()
            slot.breaker_open = False
        else:
            slot.deaths_us = [us for us in slot.deaths_us if now_us - us <= BREAKER_WINDOW_S * 1e6]
            slot.deaths_us.append(now_us)
            slot.num_failures += 1
            slot.breaker_open = slot.breaker_open or len(slot.deaths_us) >= BREAKER_DEATHS
        if slot.breaker_open:
            self._enter(slot, "failed")
            return BREAKER_PROBE_S
        self._enter(slot, "backoff")
        delay_s = min(BACKOFF_MOST_S, BACKOFF_FIRST_S * 2.0 ** min(max(slot.num_failures - 1, 0), 16))
        return delay_s * self._rng.uniform(1 - BACKOFF_JITTER, 1 + BACKOFF_JITTER)


def _error_code(error: MsdError) -> tuple[str, bool]:
    """The wire's code for an attempt's error, and whether the attempt was lost with its engine."""
    match error:
        case EngineLostError():
            return "engine_unavailable", True
        case RequestRefusedByEngineError():
            return error.error_code, False
        case JournalError():
            return "journal_unavailable", False
        case _:
            return "internal", False

"""An asyncio event loop in virtual time: nothing waits, time jumps to the next timer, and a seed decides every order.

uvloop and the selector loops cannot be virtualised, so this is a BaseEventLoop without a selector (the approach of
FoundationDB's and TigerBeetle's simulators). Sources of chance that it closes: time, the order of ready callbacks
(shuffled from the seed: FIFO would explore one interleaving only), the hash order of tasks and futures (asyncio keeps
them in sets, TaskGroup cancels in that order), and finalisers of async generators (they must be closed by hand).
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from heapq import heapify, heappop, heappush
from random import Random
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

START_S = 1_000.0
"""Not 0: a time that is tested for truth would go unnoticed."""
MAX_STEPS = 10_000_000
MAX_STEPS_PER_INSTANT = 100_000
CANCELLED_TIMERS_ALLOWED = 100


class LivelockError(AssertionError):
    """The simulation goes on and on without getting anywhere."""


class StalledError(AssertionError):
    """Everything waits, no timer is set: in real time this would hang for ever."""


class ForbiddenError(AssertionError):
    """Something that a deterministic world cannot have: a thread, a socket, a generator left to the collector."""


class SimFuture(asyncio.Future[Any]):
    """A future whose hash is a number: how many were hashed before it. Most are never put into a set."""

    _birth = 0
    _loop: SimLoop

    def __hash__(self) -> int:
        if not self._birth:
            self._birth = self._loop.next_birth()
        return self._birth


class SimTask(asyncio.Task[Any]):
    """A task whose hash is its birth number: asyncio puts it into a set while it is made."""

    _birth = 0
    _loop: SimLoop

    def __hash__(self) -> int:
        if not self._birth:
            self._birth = self._loop.next_birth()
        return self._birth


class _Handle(asyncio.Handle):
    """A handle with only what this loop looks at: there is one for every step."""

    __slots__ = ()

    _repr = None
    _source_traceback = None

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...], context: Context | None) -> None:
        self._callback = callback
        self._args = args
        self._context = context if context is not None else copy_context()
        self._cancelled = False

    def cancel(self) -> None:
        """Never call it."""
        self._cancelled = True


class _TimerHandle(asyncio.TimerHandle):
    """The same for a timer."""

    __slots__ = ()

    _repr = None
    _source_traceback = None

    def __init__(
        self,
        when: float,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        loop: SimLoop,
        context: Context | None,
    ) -> None:
        self._callback = callback
        self._args = args
        self._context = context if context is not None else copy_context()
        self._loop = loop
        self._cancelled = False
        self._when = when
        self._scheduled = True

    def cancel(self) -> None:
        """Never call it."""
        if not self._cancelled:
            self._cancelled = True
            if self._scheduled:
                self._loop.timer_cancelled()


class SimLoop(asyncio.BaseEventLoop):
    """Runs callbacks one by one in this thread. `rng` decides which of those that are ready comes next."""

    _ready: deque[Any]
    _stopping: bool

    def __init__(self, rng: Random, max_steps: int = MAX_STEPS) -> None:
        super().__init__()
        self._rng = rng
        self._now_s = START_S
        self._now_us = int(START_S * 1e6)
        self._max_steps = max_steps
        self._num_births = 0
        self._thread = threading.get_ident()
        self._failure: BaseException | None = None
        self._timers: list[tuple[float, int, Any]] = []
        """Heap by time, then by order of being set."""
        self._num_timers = 0
        self._num_cancelled = 0
        self._most_steps = min(max_steps, MAX_STEPS_PER_INSTANT)
        """More mean a livelock: too many in all, or since time last moved."""
        self.num_steps = 0

    # --- time --------------------------------------------------------------------------------------------------------

    def time(self) -> float:
        """Virtual seconds."""
        return self._now_s

    def now_us(self) -> int:
        """The Clock port."""
        return self._now_us

    def next_birth(self) -> int:
        """A number for a new task or future."""
        self._num_births += 1
        return self._num_births

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        """Call at this instant, in an order that the seed decides."""
        handle = _Handle(callback, args, context)
        self._ready.append(handle)
        return handle

    def call_later(
        self, delay: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """Call after `delay` virtual seconds."""
        when = self._now_s + delay
        timer = _TimerHandle(when, callback, args, self, context)
        self._num_timers += 1
        heappush(self._timers, (when, self._num_timers, timer))
        return timer

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """Call at a virtual time; one in the past is now."""
        timer = _TimerHandle(when, callback, args, self, context)
        self._num_timers += 1
        heappush(self._timers, (when, self._num_timers, timer))
        return timer

    def timer_cancelled(self) -> None:
        """A timer that is set was cancelled; once they are many they are dropped."""
        self._num_cancelled += 1
        if self._num_cancelled > CANCELLED_TIMERS_ALLOWED and 2 * self._num_cancelled > len(self._timers):
            self._timers[:] = [item for item in self._timers if not item[2].cancelled()]
            heapify(self._timers)
            self._num_cancelled = 0

    def get_debug(self) -> bool:
        """Never: asyncio asks for each task and future."""
        return False

    def _run_once(self) -> None:
        """Turn after turn until the end: what is ready now runs in a random order, what it makes ready runs next."""
        ready, timers, random = self._ready, self._timers, self._rng.random
        while not self._stopping:
            if not ready:
                self._jump()
            elif timers and timers[0][0] <= self._now_s:
                self._take_due_timers()
            left = len(ready)
            self.num_steps += left
            while left:
                if left > 1:
                    chosen = int(random() * left)
                    ready[0], ready[chosen] = ready[chosen], ready[0]
                handle = ready.popleft()
                left -= 1
                if not handle._cancelled:
                    # Not Handle._run: it would hand an exception to call_exception_handler, and here it ends the world.
                    handle._context.run(handle._callback, *handle._args)
                    if self._failure is not None:
                        raise self._failure
            if self.num_steps > self._most_steps:
                self._break_livelock()

    def _jump(self) -> None:
        """Nothing is ready: let time jump to the next timer, and make that one ready and others of the instant."""
        timers = self._timers
        while timers:
            when, _, timer = heappop(timers)
            if timer._cancelled:
                self._num_cancelled -= 1
                continue
            timer._scheduled = False
            self._ready.append(timer)
            if when > self._now_s:
                self._now_s = when
                self._now_us = int(when * 1e6)
                self._most_steps = min(self._max_steps, self.num_steps + MAX_STEPS_PER_INSTANT)
            if timers and timers[0][0] <= when:
                self._take_due_timers()
            return
        raise StalledError("every task waits and no timer is set")

    def _take_due_timers(self) -> None:
        timers, now_s = self._timers, self._now_s
        while timers and timers[0][0] <= now_s:
            timer = heappop(timers)[2]
            if timer._cancelled:
                self._num_cancelled -= 1
            else:
                timer._scheduled = False
                self._ready.append(timer)

    def _break_livelock(self) -> None:
        if self.num_steps > self._max_steps:
            raise LivelockError(f"more than {self._max_steps} steps")
        stuck = f"more than {MAX_STEPS_PER_INSTANT} steps at {self._now_s:.6f} s"
        raise LivelockError(f"{stuck}: time does not move")

    # --- life --------------------------------------------------------------------------------------------------------

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run `main` to its end, then close the loop. The first exception of any callback is raised here."""
        try:
            result = self.run_until_complete(main)
            if self._failure is not None:
                raise self._failure
            return result
        finally:
            self._bury()
            self.close()

    def _bury(self) -> None:
        """End what a failure left behind, so that nothing is collected while it waits."""
        left = sorted((task for task in asyncio.all_tasks(self) if isinstance(task, SimTask)), key=hash)
        for task in left:
            task.cancel()
        for _ in range(MAX_STEPS_PER_INSTANT):
            if not self._ready:
                break
            handle = self._ready.popleft()
            if not handle.cancelled():
                handle._run()

    # --- what asyncio asks of a loop ---------------------------------------------------------------------------------

    def create_future(self) -> asyncio.Future[Any]:
        """A future with a birth number."""
        return SimFuture(loop=self)

    def create_task(  # type: ignore[override]  # typeshed writes `coro: object`, which no implementation takes
        self, coro: Any, *, name: str | None = None, context: Context | None = None
    ) -> asyncio.Task[Any]:
        """A task with a birth number."""
        return SimTask(coro, loop=self, name=name, context=context)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """An error that production would log and survive ends the simulation."""
        if self._failure is None:
            self._failure = context.get("exception") or ForbiddenError(str(context.get("message")))

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        """As `call_soon`: there is only one thread here."""
        if threading.get_ident() != self._thread:
            raise ForbiddenError("a second thread reached into the simulation")
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(self, executor: Any, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        """Refused: use the Offload port."""
        raise ForbiddenError("threads are not simulated; use the Offload port")

    def _asyncgen_firstiter_hook(self, agen: Any) -> None:
        pass

    def _asyncgen_finalizer_hook(self, agen: Any) -> None:
        self.call_exception_handler({"message": f"async generator {agen.__qualname__} was left to the collector"})

    def _process_events(self, event_list: Any) -> None:
        raise ForbiddenError("there is no selector")

    def _write_to_self(self) -> None:
        """Nobody sleeps."""

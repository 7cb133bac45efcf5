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
from contextvars import Context
from heapq import heapify, heappop
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
    """A future whose hash is its birth number."""

    def __init__(self, loop: SimLoop) -> None:
        self._birth = loop.next_birth()
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self._birth


class SimTask(asyncio.Task[Any]):
    """A task whose hash is its birth number."""

    def __init__(
        self, coro: Coroutine[Any, Any, Any], loop: SimLoop, name: str | None, context: Context | None
    ) -> None:
        self._birth = loop.next_birth()  # first: asyncio puts the task into a set while it is made
        super().__init__(coro, loop=loop, name=name or f"sim-{self._birth}", context=context)

    def __hash__(self) -> int:
        return self._birth


class SimLoop(asyncio.BaseEventLoop):
    """Runs callbacks one by one in this thread. `rng` decides which of those that are ready comes next."""

    _ready: deque[Any]
    _scheduled: list[Any]
    _stopping: bool
    _timer_cancelled_count: int

    def __init__(self, rng: Random, max_steps: int = MAX_STEPS) -> None:
        super().__init__()
        self._rng = rng
        self._now_s = START_S
        self._max_steps = max_steps
        self._num_births = 0
        self._thread = threading.get_ident()
        self._failure: BaseException | None = None
        self._instant_step = 0
        self.num_steps = 0

    # --- time --------------------------------------------------------------------------------------------------------

    def time(self) -> float:
        """Virtual seconds."""
        return self._now_s

    def now_us(self) -> int:
        """The Clock port."""
        return int(self._now_s * 1e6)

    def next_birth(self) -> int:
        """A number for a new task or future."""
        self._num_births += 1
        return self._num_births

    def _run_once(self) -> None:
        ready, scheduled = self._ready, self._scheduled
        while scheduled and scheduled[0]._cancelled:
            self._timer_cancelled_count -= 1
            heappop(scheduled)._scheduled = False
        if self._timer_cancelled_count > CANCELLED_TIMERS_ALLOWED and 2 * self._timer_cancelled_count > len(scheduled):
            self._drop_cancelled()
            scheduled = self._scheduled
        if not ready:
            if self._stopping:
                return
            if not scheduled:
                raise StalledError("every task waits and no timer is set")
            self._now_s = max(self._now_s, scheduled[0]._when)
            self._instant_step = self.num_steps
        now_s = self._now_s
        while scheduled and scheduled[0]._when <= now_s:
            handle = heappop(scheduled)
            handle._scheduled = False
            if handle._cancelled:
                self._timer_cancelled_count -= 1
            else:
                ready.append(handle)
        random = self._rng.random
        for left in range(len(ready), 0, -1):
            if left > 1:
                chosen = int(random() * left)
                ready[0], ready[chosen] = ready[chosen], ready[0]
            handle = ready.popleft()
            if not handle._cancelled:
                self.num_steps += 1
                handle._run()
                if self._failure is not None:
                    raise self._failure
        if self.num_steps > self._max_steps:
            raise LivelockError(f"more than {self._max_steps} steps")
        if self.num_steps - self._instant_step > MAX_STEPS_PER_INSTANT:
            raise LivelockError(f"more than {MAX_STEPS_PER_INSTANT} steps at {now_s:.6f} s: time does not move")

    def _drop_cancelled(self) -> None:
        kept = []
        for handle in self._scheduled:
            if handle._cancelled:
                handle._scheduled = False
            else:
                kept.append(handle)
        heapify(kept)
        self._scheduled = kept
        self._timer_cancelled_count = 0

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
            if not handle._cancelled:
                handle._run()

    # --- what asyncio asks of a loop ---------------------------------------------------------------------------------

    def create_future(self) -> asyncio.Future[Any]:
        """A future with a birth number."""
        return SimFuture(self)

    def create_task(  # type: ignore[override]  # typeshed writes `coro: object`, which no implementation takes
        self, coro: Any, *, name: str | None = None, context: Context | None = None
    ) -> asyncio.Task[Any]:
        """A task with a birth number."""
        return SimTask(coro, self, name, context)

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

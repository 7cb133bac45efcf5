"""One simulated GPU: time, memory and energy. Pure: the time is passed in, and randomness is seeded.

The model, which every figure that comes from here is labelled with (`simulated`):

- **Compute** is shared equally by the engines that are busy (processor sharing, as time-slicing between processes does
  it): with k busy engines each works at 1/k of its speed alone. Shares sum to 1 while anything is busy, exactly.
- **Memory** is a book of weights per engine; what does not fit is refused. A sleeping engine has none there. Somebody
  else may take memory too (`squeeze`): whatever is free, until they have what they want.
- **Power** is `idle_w` plus what the work in hand draws: an engine states the energy (mJ) of a piece of work, which is
  spent evenly over that work. Ramps and sensor lag are not modelled.
- **The counter** shows whole mJ and steps every 20 to 100 ms, period and phase drawn from the seed, as NVML's does.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, exp, inf
from random import Random

from msd.domain import CounterReading, GpuView

DOMAIN = "sim:0"
COUNTER_PERIOD_US = (20_000, 100_000)
AVERAGE_TAU_US = 1_000_000
"""Time constant of the averages in a view; NVML averages power over one second too."""


class _Work:
    """What an engine has in hand: from `start_v` to `target_v` on the shared work clock."""

    __slots__ = ("mj_per_us", "num_sharers", "start_v", "target_v")

    def __init__(self, start_v: float, target_v: float, mj_per_us: float) -> None:
        self.start_v = start_v
        self.target_v = target_v
        self.mj_per_us = mj_per_us
        self.num_sharers = 0


class SimGpu:
    """The state of the simulated GPU. Its engines are its only writers; the probe reads `view` and `counter`.

    The work clock `v` counts the microseconds of work that each busy engine has been given: it runs at 1/k with k busy
    engines, so a piece of work of w us that starts at v ends when the clock shows v + w, whoever comes and goes.
    """

    def __init__(self, *, memory_bytes: int, idle_w: float, rng: Random, now_us: int = 0) -> None:
        self.memory_bytes = memory_bytes
        self.idle_w = idle_w
        self._weights: dict[str, int] = {}
        self._others_bytes = 0
        self._others_want_bytes = 0
        self._listeners: dict[str, Callable[[], None]] = {}
        self._busy: dict[str, _Work] = {}
        self._now_us = float(now_us)
        self._v = 0.0
        # Both follow from `_busy`, and are computed when it changes: this is asked far more often than it changes.
        self._first_v = inf
        self._power_w = idle_w
        self._energy_mj = 0.0
        self._power_average_w = idle_w
        self._busy_average = 0.0
        self._counter_mj = 0
        self._period_us = rng.randint(*COUNTER_PERIOD_US)
        self._tick_us = now_us + rng.randint(1, self._period_us)

    @property
    def memory_used_bytes(self) -> int:
        """Weights of all attached engines, and what somebody else took."""
        return sum(self._weights.values()) + self._others_bytes

    def squeeze(self, wanted_bytes: int) -> None:
        """Somebody else wants this much from now on; what engines hold they get when it is freed. 0: they leave."""
        self._others_want_bytes = wanted_bytes
        self._let_others_take()

    def _let_others_take(self) -> None:
        free = self.memory_bytes - sum(self._weights.values())
        self._others_bytes = min(self._others_want_bytes, free)

    def attach(self, engine: str, weights_bytes: int, on_share_changed: Callable[[], None]) -> bool:
        """Book an engine's weights; False when they do not fit. The callback: its work is due at another time now."""
        assert engine not in self._weights, f"engine {engine} is on the GPU already"
        if self.memory_used_bytes + weights_bytes > self.memory_bytes:
            return False
        self._weights[engine] = weights_bytes
        self._listeners[engine] = on_share_changed
        return True

    def detach(self, engine: str, now_us: int) -> None:
        """Drop an engine's work and free its memory. Idempotent."""
        self.end_work(engine, now_us)
        self._weights.pop(engine, None)
        self._let_others_take()
        self._listeners.pop(engine, None)

    def start_work(self, engine: str, work_us: float, energy_mj: float, now_us: int) -> int:
        """Put a piece of work in hand, which alone on the GPU would take `work_us`, in place of what is done.

        Returns when it will be done, as `due_us` does.
        """
        assert engine in self._weights, f"engine {engine} is not on the GPU"
        assert work_us > 0, "a piece of work takes time"
        if self._now_us < now_us:
            self._advance(now_us)
        self._busy[engine] = _Work(self._v, self._v + work_us, energy_mj / work_us)
        self._busy_changed()
        self._tell_sharers(engine)
        return self.due_us(engine, now_us)

    def shorten_work(self, engine: str, work_us: float, now_us: int) -> None:
        """Let the work in hand end after `work_us` in all; what is done already stays done."""
        self._advance(now_us)
        work = self._busy.get(engine)
        if work is not None:
            work.target_v = max(self._v, min(work.target_v, work.start_v + work_us))
            self._busy_changed()

    def end_work(self, engine: str, now_us: int) -> None:
        """The engine is idle from now on. Idempotent."""
        self._advance(now_us)
        if self._busy.pop(engine, None) is not None:
            self._busy_changed()
        # Also when the work had ended by itself: only now it is known that no next one follows at once.
        self._tell_sharers(engine)

    def done_us(self, engine: str, now_us: int) -> float | None:
        """How much of the work in hand has been done; None when all of it is."""
        self._advance(now_us)
        work = self._busy.get(engine)
        return None if work is None else self._v - work.start_v

    def due_us(self, engine: str, now_us: int) -> int:
        """When the work in hand will be done if the shares stay as they are; now, when it is done."""
        if self._now_us < now_us:
            self._advance(now_us)
        work = self._busy.get(engine)
        if work is None:
            return now_us
        work.num_sharers = len(self._busy)
        return now_us + ceil((work.target_v - self._v) * work.num_sharers)

    def num_busy(self) -> int:
        """Engines with work in hand, as of the last call that carried a time."""
        return len(self._busy)

    def view(self, now_us: int) -> GpuView:
        """A snapshot; `sm_util` is the share of time (0..1) with work in hand, over the last second or so."""
        self._advance(now_us)
        used = self.memory_used_bytes
        return GpuView(
            source="simulated",
            uuid=DOMAIN,
            name="simulated GPU",
            t_us=int(self._now_us),
            memory_total_bytes=self.memory_bytes,
            memory_used_bytes=used,
            memory_free_bytes=self.memory_bytes - used,
            memory_reserved_bytes=0,
            power_instant_w=self._power_w,
            power_average_w=self._power_average_w,
            sm_util=self._busy_average,
            energy_mj=self._counter_mj,
        )

    def counter(self, now_us: int) -> CounterReading:
        """Read the energy counter."""
        self._advance(now_us)
        return CounterReading(
            domain=DOMAIN, t_us=int(self._now_us), energy_mj=self._counter_mj, source="simulated", idle_w=self.idle_w
        )

    def true_energy_mj(self, now_us: int) -> float:
        """What the counter would show without steps and rounding: for tests and for judging the ledger."""
        self._advance(now_us)
        return self._energy_mj

    def _busy_changed(self) -> None:
        busy = self._busy
        if not busy:
            self._first_v, self._power_w = inf, self.idle_w
            return
        first_v, drawn_mj_per_us = inf, 0.0
        for work in busy.values():
            drawn_mj_per_us += work.mj_per_us
            if work.target_v < first_v:
                first_v = work.target_v
        self._first_v = first_v
        self._power_w = self.idle_w + drawn_mj_per_us / len(busy) * 1_000  # mJ/us = kW

    def _tell_sharers(self, cause: str) -> None:
        num_sharers = len(self._busy)
        if num_sharers == 1 and cause in self._busy:
            return
        # A copy: a listener asks `due_us`, which may find further work done.
        for engine, work in tuple(self._busy.items()):
            if engine != cause and work.num_sharers != num_sharers:
                self._listeners[engine]()

    def _advance(self, now_us: int) -> None:
        """Bring all books to `now_us`, stopping at each end of work on the way; a time in the past is now."""
        since_us = self._now_us
        while since_us < now_us:
            until_us = float(now_us)
            num_busy = len(self._busy)
            if num_busy:
                first_us = since_us + (self._first_v - self._v) * num_busy
                if first_us < until_us:
                    until_us = first_us
            span_us = until_us - since_us
            power_w = self._power_w
            mj_per_us = power_w / 1_000
            if until_us >= self._tick_us:
                last_tick_us = self._tick_us + int((until_us - self._tick_us) // self._period_us) * self._period_us
                self._counter_mj = int(self._energy_mj + mj_per_us * (last_tick_us - since_us))
                self._tick_us = last_tick_us + self._period_us
            self._energy_mj += mj_per_us * span_us
            weight = 1.0 - exp(-span_us / AVERAGE_TAU_US)
            self._power_average_w += (power_w - self._power_average_w) * weight
            self._busy_average += ((1.0 if num_busy else 0.0) - self._busy_average) * weight
            since_us = self._now_us = until_us
            if num_busy:
                self._v += span_us / num_busy
                if self._first_v <= self._v + 1e-6:
                    self._end_what_is_done()

    def _end_what_is_done(self) -> None:
        reached_v = self._v + 1e-6
        for engine in [engine for engine, work in self._busy.items() if work.target_v <= reached_v]:
            del self._busy[engine]
        self._busy_changed()

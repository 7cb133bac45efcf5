"""Ports of a world in which things go wrong: a journal that is slow or fails, a GPU probe that lies or is silent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random
from typing import TypeVar

from msgspec import structs

from msd.config import JournalConfig
from msd.domain import CounterReading, GpuView, Prompt, Request, Result
from msd.journal.memory import MemoryJournal
from msd.ports import Clock, GpuProbe

T = TypeVar("T")


class InlineOffload:
    """Runs heavy functions at once: there are no threads here, and time does not pass while they run."""

    async def run(self, function: Callable[[], T]) -> T:
        """The function's result, one turn of the loop later."""
        await asyncio.sleep(0)
        return function()


class SimJournal(MemoryJournal):
    """The memory journal behind a disk: answers come later, out of order between requests, and some appends fail."""

    def __init__(
        self, config: JournalConfig, clock: Clock, rng: Random, latency_ms: float, failure_share: float
    ) -> None:
        super().__init__(config, clock)
        self._rng = rng
        self._latency_s = latency_ms / 1_000
        self._failure_share = failure_share

    def append(self, request: Request, prompt: Prompt) -> None:
        """Store after a while, or say that it could not."""
        if self._failure_share and self._rng.random() < self._failure_share:
            self._later(self._fail, request.request_id)
        elif self._latency_s:
            self._later(super().append, request, prompt)
        else:
            super().append(request, prompt)

    def _fail(self, request_id: str) -> None:
        assert self._listener is not None, "append before start"
        self._listener.on_append_failed(request_id, "the simulated disk is full")

    def complete(self, result: Result) -> None:
        """Store after a while."""
        if self._latency_s:
            self._later(super().complete, result)
        else:
            super().complete(result)

    def _later(self, function: Callable[..., None], *args: object) -> None:
        asyncio.get_running_loop().call_later(self._rng.uniform(0.0, 2 * self._latency_s), function, *args)


class FaultyProbe:
    """A probe whose counter is reset and stalls and whose view goes missing, each in given windows of time (us)."""

    def __init__(
        self, probe: GpuProbe, resets_us: list[int], stalls: list[tuple[int, int]], outages: list[tuple[int, int]]
    ) -> None:
        self._probe = probe
        self._resets_us = sorted(resets_us)
        self._stalls = stalls
        self._outages = outages
        self._base_mj = 0
        self._epoch = 0
        self._stalled_mj: int | None = None
        self._view: GpuView | None = None

    def start(self) -> None:
        """Begin."""
        self._probe.start()

    def latest(self) -> GpuView | None:
        """The view, or the one from before the outage."""
        view = self._probe.latest()
        if view is None or not any(start <= view.t_us < end for start, end in self._outages):
            self._view = view
        return self._view

    def readings(self) -> list[CounterReading]:
        """The readings, as the faults show them."""
        return [self._distort(reading) for reading in self._probe.readings()]

    def _distort(self, reading: CounterReading) -> CounterReading:
        while self._resets_us and reading.t_us >= self._resets_us[0]:
            del self._resets_us[0]
            self._base_mj, self._epoch = reading.energy_mj, self._epoch + 1
            self._stalled_mj = None
        if not self._epoch and not self._stalls:
            return reading
        energy_mj = reading.energy_mj - self._base_mj
        if any(start <= reading.t_us < end for start, end in self._stalls):
            energy_mj = self._stalled_mj = energy_mj if self._stalled_mj is None else self._stalled_mj
        else:
            self._stalled_mj = None
        return structs.replace(reading, energy_mj=energy_mj, epoch=self._epoch)

    def stop(self) -> None:
        """End."""
        self._probe.stop()

"""The probe of the simulated GPU: read at the moment of asking, no thread, so that virtual time can drive it."""

from __future__ import annotations

from msd.domain import CounterReading, GpuView
from msd.ports import Clock
from msd.simgpu import SimGpu


class SimProbe:
    """Everything it shows is labelled simulated."""

    def __init__(self, gpu: SimGpu, clock: Clock) -> None:
        self._gpu = gpu
        self._clock = clock
        self._started = False

    def start(self) -> None:
        """Begin to answer."""
        self._started = True

    def latest(self) -> GpuView | None:
        """The GPU as of now."""
        return self._gpu.view(self._clock.now_us()) if self._started else None

    def readings(self) -> list[CounterReading]:
        """One reading, as of now."""
        return [self._gpu.counter(self._clock.now_us())] if self._started else []

    def stop(self) -> None:
        """Show nothing from now on."""
        self._started = False

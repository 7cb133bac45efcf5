"""No GPU to read: every field None, and the reason why."""

from __future__ import annotations

from msd.domain import CounterReading, GpuView


class NullProbe:
    """Stands in where nothing can be measured; energy stays absent, never 0."""

    def __init__(self, error: str = "") -> None:
        self._view = GpuView(source="none", error=error)

    def start(self) -> None:
        """Nothing to begin."""

    def latest(self) -> GpuView | None:
        """A view of nothing; its time is 0, so it is always too old to be trusted."""
        return self._view

    def readings(self) -> list[CounterReading]:
        """None, ever."""
        return []

    def stop(self) -> None:
        """Nothing to end."""

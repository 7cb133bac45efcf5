"""The machine's clock, for whoever runs engines outside the simulation."""

from __future__ import annotations

import time


class MonotonicClock:
    """The machine's monotonic clock."""

    def now_us(self) -> int:
        """Microseconds since an arbitrary start."""
        return time.monotonic_ns() // 1_000

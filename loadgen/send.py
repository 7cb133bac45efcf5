"""The clocked sender: an absolute schedule that nothing moves.

Wake, send *everything* that is due, sleep until the next. Behind schedule it catches up and the intended times stay; it
never skips an arrival and never waits for an answer, so a server that stalls cannot take load away (coordinated
omission).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

MIN_SLEEP_US = 1_000
"""Shorter sleeps buy nothing: event loops count whole milliseconds, and uvloop would spin (measured: 10 x the CPU)."""

MAX_BURST = 256
"""Sends before the loop gets a turn to receive, so that catching up does not make answers look late."""


async def send_on_schedule(due_us: Sequence[int], send: Callable[[int], None], now_us: Callable[[], int]) -> None:
    """Call `send(index)` for each due time (sorted, on the clock of `now_us`), at it or as soon after as can be."""
    index, count = 0, len(due_us)
    while index < count:
        now = now_us()
        stop = min(index + MAX_BURST, count)
        while index < stop and due_us[index] <= now:
            send(index)
            index += 1
        if index < count:
            delay_us = due_us[index] - now_us()
            await asyncio.sleep(max(delay_us, MIN_SLEEP_US) / 1e6 if delay_us > 0 or index < stop else 0)

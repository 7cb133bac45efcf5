"""Event loop lag, sampled on an absolute schedule; as a command, the lag of an idle loop beside what is measured.

`python -m tests.bench.lag FILE` samples until SIGTERM: what an idle loop suffers is the machine's doing.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from pathlib import Path

import msgspec
import uvloop

SLOT_US = 5_000
MAX_SLOTS = 1_000_000


class LagSampler:
    """Wakes on an absolute schedule; a slot that was slept through counts with its own lag, not as nothing."""

    def __init__(self) -> None:
        self.samples: list[tuple[int, int]] = []
        """(slot, lag) in monotonic us."""

    async def run(self) -> None:
        """Sample until cancelled."""
        slot_us = time.monotonic_ns() // 1_000
        while len(self.samples) < MAX_SLOTS:
            slot_us += SLOT_US
            now_us = time.monotonic_ns() // 1_000
            if now_us < slot_us:
                await asyncio.sleep((slot_us - now_us) / 1e6)
                now_us = time.monotonic_ns() // 1_000
            self.samples.append((slot_us, max(0, now_us - slot_us)))


def write(file: Path, samples: list[tuple[int, int]]) -> None:
    """Keep samples."""
    file.write_bytes(msgspec.json.encode(samples))


def read(file: Path) -> list[tuple[int, int]]:
    """Read them back."""
    return msgspec.json.decode(file.read_bytes(), type=list[tuple[int, int]])


async def _idle() -> list[tuple[int, int]]:
    sampler = LagSampler()
    sampling = asyncio.create_task(sampler.run())
    over = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
    await over.wait()
    sampling.cancel()
    return sampler.samples


if __name__ == "__main__":
    write(Path(sys.argv[1]), uvloop.run(_idle()))

"""Does the daemon grow? Resident memory after 200,000 no-op requests against after the first 20,000.

The client acknowledges results and stored results are bound to 1 MiB, so what grows is a leak or an unbounded table.
"""

from __future__ import annotations

import time

from tests.bench import producers
from tests.bench.harness import Options, Row, row, rss_bytes, say
from tests.bench.producers import Work
from tests.bench.zmq_path import NOOP, WINDOW, daemon_of

TARGET = "soak"
FIRST, LAST = 20_000, 200_000
BAR_MIB = 5.0
MIB = 1024 * 1024
SETTLE_S = 1.0
MAX_REPEATS = 3
ACK_BATCH = 32
"""Stored results are bound to 1 MiB: results wait for their acknowledgement not much longer than for their reader."""
BOUND = """
[journal]
max_result_bytes = 1_048_576
"""


def measure(options: Options) -> list[Row]:
    """Rows of the soak."""
    first, last = int(options.scaled(FIRST, 2_000)), int(options.scaled(LAST, 10_000))
    early_mib: list[float] = []
    growth_mib: list[float] = []
    repeats = min(options.repeats, MAX_REPEATS)
    for repeat in range(repeats):
        say(f"{TARGET}: repeat {repeat + 1} of {repeats}")
        with daemon_of(NOOP.format(num_chunks=1) + BOUND) as daemon:
            producers.run("raw", daemon.endpoint, Work(num_requests=first, window=WINDOW, ack_batch=ACK_BATCH))
            time.sleep(SETTLE_S)
            early = rss_bytes(daemon.process.pid)
            producers.run("raw", daemon.endpoint, Work(num_requests=last - first, window=WINDOW, ack_batch=ACK_BATCH))
            time.sleep(SETTLE_S)
            early_mib.append(early / MIB)
            growth_mib.append((rss_bytes(daemon.process.pid) - early) / MIB)
    return [
        row(f"RSS after {last:,} requests less that after {first:,}", "MiB", growth_mib, target=TARGET, bar=BAR_MIB),
        row(f"RSS after {first:,} requests", "MiB", early_mib, target=TARGET),
    ]

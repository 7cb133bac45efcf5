"""How long the daemon's event loop is held up while real engines run, and while one starts beside a running one.

An engine's start lasts from the instant at which the daemon begins it to the one at which it is warm, both noted in the
daemon; load comes upon the engine that is up within half a second of that. The worst lag is that of all repeats. An
idle loop in a process of its own is sampled at the same time: its lag is what the machine does to anybody.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.bench import lag, producers
from tests.bench.harness import ROOT, CannotMeasureError, Options, Row, row, say
from tests.bench.host import Host
from tests.bench.producers import Work
from tests.bench.vllm_engines import engines

TARGET = "loop_lag"
NUM_STREAMS = 16
MAX_TOKENS = 128
BAR_P99_MS, BAR_MAX_MS = 5.0, 50.0
MAX_REPEATS = 3
PHASES = ("engines run", "an engine starts beside a running one")
IDLE = "an idle loop meanwhile, {}"


def measure(options: Options) -> list[Row]:
    """Rows of the loop's lag: one start of two engines gives both phases."""
    repeats = min(options.repeats, MAX_REPEATS)
    lags_ms: dict[str, list[NDArray[np.float64]]] = {}
    for repeat in range(repeats):
        say(f"{TARGET}: repeat {repeat + 1} of {repeats}")
        for name, values in _run(options.scaled(15, 5)).items():
            lags_ms.setdefault(name, []).append(values)
    rows = []
    for name, runs in lags_ms.items():
        barred = name in PHASES
        p99_ms = [float(np.quantile(run, 0.99)) for run in runs]
        worst_ms = [float(run.max()) for run in runs]
        rows.append(row(f"{name}: lag p99", "ms", p99_ms, target=TARGET, bar=BAR_P99_MS if barred else None))
        bar = BAR_MAX_MS if barred else None
        rows.append(row(f"{name}: lag max, over all repeats", "ms", worst_ms, target=TARGET, bar=bar, of_repeats=max))
    return rows


def _run(seconds: float) -> dict[str, NDArray[np.float64]]:
    """Start two engines with load on what is warm; return the lags of each phase, and of the idle loop, in ms."""
    with (
        tempfile.TemporaryDirectory(prefix="msd-bench-") as folder,
        Host(Path(folder), engines(2), samples_lag=True) as host,
    ):
        with _idle_loop(Path(folder) / "idle.json"):
            host.wait_up(1)
            over = threading.Event()
            with ThreadPoolExecutor(1) as threads:
                load = threads.submit(_keep_busy, host.endpoint, over)
                try:
                    host.wait_up(2)
                    time.sleep(seconds)
                    end_us = time.monotonic_ns() // 1_000
                finally:
                    over.set()
                load.result()
        watched = host.stop()
        slots = {"": watched.lags, IDLE: lag.read(Path(folder) / "idle.json")}
    if len(watched.starts) != 2:
        raise CannotMeasureError(f"{len(watched.starts)} starts of two engines: one was lost meanwhile")
    second_begin_us, second_up_us = watched.starts[1]
    windows = dict(zip(PHASES, ((second_up_us, end_us), (second_begin_us, second_up_us)), strict=True))
    return {
        loop.format(phase) if loop else phase: _lags_ms(samples, *window)
        for loop, samples in slots.items()
        for phase, window in windows.items()
    }


def _lags_ms(samples: list[tuple[int, int]], begin_us: int, end_us: int) -> NDArray[np.float64]:
    lags_ms = np.array([lag_us for slot_us, lag_us in samples if begin_us <= slot_us < end_us], dtype=np.float64) / 1e3
    if len(lags_ms) == 0:
        raise CannotMeasureError("a phase was too short for a sample")
    return lags_ms


@contextmanager
def _idle_loop(file: Path) -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-m", "tests.bench.lag", str(file)], cwd=ROOT)
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


def _keep_busy(endpoint: str, over: threading.Event) -> None:
    """Stream, some requests at a time, until told that it is over."""
    while not over.is_set():
        producers.run(
            "raw", endpoint, Work(num_requests=4 * NUM_STREAMS, window=NUM_STREAMS, max_tokens=MAX_TOKENS, stream=True)
        )

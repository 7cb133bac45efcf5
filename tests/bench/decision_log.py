"""The decision log: what it costs the loop per request, while its thread writes, and how much the thread can take.

The loop's part is two calls of `DecisionLog` per request, over decisions of eight modes at a steady pace, so that the
thread works beside them as it does in the daemon. Between them the loop does other work (busy), or sleeps (idle), after
which each call finds its caches cold. What reading the clock costs there is taken off.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from msd import decisions
from msd.domain import Candidate, Decision, Energy, Features, GpuView, Mode, Observation, Request, Slo
from msd.journal.decision_log import DecisionLog
from tests.bench.harness import Options, Row, row

TARGET = "decision_log"
NUM_MODES = 8
REQUESTS_PER_S = 1_000
BAR_US = 2.0


def measure(options: Options) -> list[Row]:
    """Cost in the loop, with and without a thread that writes; then records a second."""
    num = int(options.scaled(2_000, 500))
    busy = [_steady(num, _other_work) for _ in range(options.repeats)]
    idle = [_steady(num, partial(time.sleep, 0.5 / REQUESTS_PER_S)) for _ in range(options.repeats)]
    written = [_written_per_s(num) for _ in range(options.repeats)]
    bytes_each = [each for _, each in written]
    return [
        row("cost to a busy loop per request, p50", "us", [p50 for p50, _ in busy], target=TARGET, bar=BAR_US),
        row("the same, p99", "us", [p99 for _, p99 in busy], target=TARGET),
        row("cost to an idle loop per request, p50", "us", [p50 for p50, _ in idle], target=TARGET),
        row("records that the thread writes", "/s", [rate for rate, _ in written], target=TARGET, op=">="),
        row("a decision and its observation, 8 modes", "bytes", bytes_each, target=TARGET),
        row("records read back", "/s", [_read_per_s(num) for _ in range(options.repeats)], target=TARGET, op=">="),
    ]


def _steady(num: int, pause: Callable[[], object]) -> tuple[float, float]:
    """p50 and p99 of the two calls, in us, at about 1,000 requests a second, less the p50 of reading the clock."""
    request, decision, observation = _request(), _decision(), _observation()
    with tempfile.TemporaryDirectory() as folder:
        log = _log(Path(folder))
        log.start()
        times, clocks = [], []
        for _ in range(num):
            began = time.perf_counter()
            clocks.append((time.perf_counter() - began) * 1e6)
            pause()
            began = time.perf_counter()
            log.decided(request, decision)
            log.observed(decision, observation)
            ended = time.perf_counter()
            times.append((ended - began) * 1e6)
            pause()
        log.close()
        assert not log.num_dropped, "a log that drops does not cost what it should"
    times.sort()
    clock_us = statistics.median(clocks)
    return statistics.median(times) - clock_us, times[int(0.99 * (num - 1))] - clock_us


def _other_work() -> None:
    """Half a millisecond of what a loop does: frames in and out."""
    frame = _decision()
    until = time.perf_counter() + 0.5 / REQUESTS_PER_S
    while time.perf_counter() < until:
        msgspec.json.decode(msgspec.json.encode(frame))


def _written_per_s(num: int) -> tuple[float, float]:
    """Records a second that the thread encodes and writes when it has nothing to wait for; bytes of a request."""
    request, decision, observation = _request(), _decision(), _observation()
    with tempfile.TemporaryDirectory() as folder:
        log = _log(Path(folder))
        for _ in range(num):
            log.decided(request, decision)
            log.observed(decision, observation)
        began = time.perf_counter()
        log.start()
        log.close()
        wall_s = time.perf_counter() - began
        num_bytes = sum(file.stat().st_size for file in decisions.files(log.folder))
        assert log.num_written == 2 * num, "not all was written"
    return 2 * num / wall_s, num_bytes / num


def _read_per_s(num: int) -> float:
    request, decision, observation = _request(), _decision(), _observation()
    with tempfile.TemporaryDirectory() as folder:
        log = _log(Path(folder))
        for _ in range(num):
            log.decided(request, decision)
            log.observed(decision, observation)
        log.start()
        log.close()
        began = time.perf_counter()
        found = sum(1 for _ in decisions.read(log.folder))
        return found / (time.perf_counter() - began)


def _log(folder: Path) -> DecisionLog:
    modes = [Mode(name=f"m{i}", engine=f"m{i}", model="toy") for i in range(NUM_MODES)]
    return DecisionLog(folder, 10**9, server="bench", policy="cost", modes=modes)


def _request() -> Request:
    return Request(
        request_id="0123abcd-1f", client_request_id="client-17", tenant="local", content_hash=b"0" * 16,
        received_us=1_000_000, num_prompt_tokens=1_400, max_tokens=256, slo=Slo(ttft_ms=200.0, deadline_ms=5_000.0),
    )  # fmt: skip


def _decision() -> Decision:
    candidates = tuple(
        Candidate(f"mode_{i}", 0, 31.234567 + i, 7.654321, 987.123456 + i, 61_234 + i, 3, 13, 0.0, 12.345678, 1_024)
        for i in range(NUM_MODES)
    )
    features = Features(
        1_400, 128, 256, True, "summary", "interactive", 11, 3, 1.234567, 0.4321, 1_234, 4_321_000, 17_000, 240,
        123.456789, 312.5, 200.0, None, 2,
    )  # fmt: skip
    view = GpuView(
        source="nvml", uuid="GPU-00000000-0000-0000-0000-000000000000", name="a GPU", t_us=999_000,
        memory_total_bytes=150_000_000_000, memory_used_bytes=120_000_000_000, memory_free_bytes=30_000_000_000,
        power_instant_w=387.123, power_average_w=391.5, power_limit_w=700.0, sm_util=0.87, mem_util=0.55,
        sm_clock_mhz=1_980, temperature_c=61, energy_mj=123_456_789,
    )  # fmt: skip
    return Decision(
        decision_id="0123abcd-1f.1", request_id="0123abcd-1f", attempt=1, t_us=1_001_234, policy="cost", mode="mode_2",
        engine="mode_2", reason="costs least", propensity=1.0, features=features, candidates=candidates, view=view,
    )  # fmt: skip


def _observation() -> Observation:
    return Observation(
        decision_id="0123abcd-1f.1", mode="mode_2", finish_reason="stop", ttft_ms=35.123, tpot_ms=7.9, e2el_ms=1_001.5,
        num_completion_tokens=123, slo_met=True, num_cached_tokens=1_024,
        energy=Energy(energy_mj=81_234, dynamic_mj=60_123, static_mj=21_111, source="counter", settled=True),
    )  # fmt: skip

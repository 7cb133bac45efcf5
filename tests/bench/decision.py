"""How long a decision takes in the live daemon: from a request's Features to its Decision, with 8 and with 64 modes.

`python -m tests.bench.decision CONFIG TIMES` is the daemon (uvloop, ZeroMQ, journal, ledger, simulated engines that
stream tokens), with a stopwatch around `Extractor.features` and from `Router.candidates` to the end of `Router.decide`.
A producer in another process keeps it busy. The policy is `cost`; every engine is up, and half of them run something.
Extraction is once per request and a row of its own; `tests.bench.features` has it for long prompts and part by part.

Judged is the CPU time of the daemon's thread, as in `tests.bench.learned`: what other processes took of the two cores
meanwhile is not the decision's. Garbage collections within it are. The same by the wall clock is told beside it. With
64 modes a decision may take 4 times as long: judged against the bars for 8, and as a ratio of what was measured.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import uvloop
from msgspec import Struct

from msd import config as settings
from msd import logs
from msd.client import Client
from msd.core.features import Extractor
from msd.core.router import Router
from msd.daemon import Daemon
from msd.wire import DaemonStatus
from tests.bench import producers
from tests.bench.harness import ROOT, CannotMeasureError, Options, Row, row, say
from tests.bench.producers import Work

TARGET = "decision"
NUM_MODES, MANY_MODES = 8, 64
SLOTS = 16
WINDOW_PER_MODE = 4
MAX_TOKENS = 24
BAR_P50_US, BAR_P99_US, BAR_GROWTH = 20.0, 50.0, 4.0
START_S, STOP_S = 60.0, 30.0
WARM_UP = 500
"""Decisions at the beginning that are not counted: the producer connects, tables fill."""


class Times(Struct, frozen=True):
    """What the daemon's process measured, in us: CPU time of its thread, and the wall clock."""

    extractions: list[float]
    decisions: list[float]
    wall: list[float]


def measure(options: Options) -> list[Row]:
    """Rows of the decision."""
    num_requests = int(options.scaled(8_000, 2_500))
    found: dict[int, list[Times]] = {NUM_MODES: [], MANY_MODES: []}
    for repeat in range(options.repeats):
        say(f"{TARGET}: repeat {repeat + 1} of {options.repeats}")
        for num_modes, runs in found.items():
            runs.append(_run(num_modes, num_requests))

    def figures(num_modes: int, what: str, quantile: float) -> list[float]:
        return [float(np.quantile(getattr(times, what), quantile)) for times in found[num_modes]]

    p50, p99 = figures(NUM_MODES, "decisions", 0.5), figures(NUM_MODES, "decisions", 0.99)
    many_p50, many_p99 = figures(MANY_MODES, "decisions", 0.5), figures(MANY_MODES, "decisions", 0.99)
    cpu, wall = (
        "Features to Decision, live daemon, cost, {} modes: CPU time, {}",
        "the same by the wall clock, {} modes: {}",
    )
    bar = BAR_GROWTH
    of_wall = [
        row(wall.format(num_modes, told), "us", figures(num_modes, "wall", quantile), target=TARGET)
        for num_modes in (NUM_MODES, MANY_MODES)
        for told, quantile in (("p50", 0.5), ("p99", 0.99))
    ]
    return [
        row(cpu.format(NUM_MODES, "p50"), "us", p50, target=TARGET, bar=BAR_P50_US),
        row(cpu.format(NUM_MODES, "p99"), "us", p99, target=TARGET, bar=BAR_P99_US),
        row(cpu.format(MANY_MODES, "p50"), "us", many_p50, target=TARGET, bar=bar * BAR_P50_US),
        row(cpu.format(MANY_MODES, "p99"), "us", many_p99, target=TARGET, bar=bar * BAR_P99_US),
        row(f"p50 with {MANY_MODES} modes against {NUM_MODES}", "x", _ratios(many_p50, p50), target=TARGET, bar=bar),
        row(f"p99 with {MANY_MODES} modes against {NUM_MODES}", "x", _ratios(many_p99, p99), target=TARGET, bar=bar),
        *of_wall,
        row(
            f"features of a short prompt, {NUM_MODES} modes: p50",
            "us",
            figures(NUM_MODES, "extractions", 0.5),
            target=TARGET,
        ),
        row("the same: p99", "us", figures(NUM_MODES, "extractions", 0.99), target=TARGET),
    ]


def _ratios(figures: list[float], base: list[float]) -> list[float]:
    return [figure / against for figure, against in zip(figures, base, strict=True)]


def _run(num_modes: int, num_requests: int) -> Times:
    """One daemon, one producer."""
    with tempfile.TemporaryDirectory(prefix="msd-bench-") as folder:
        config, times, log = (Path(folder) / name for name in ("config.toml", "times.json", "daemon.log"))
        endpoint = f"ipc://{folder}/msd.sock"
        config.write_text(_config(folder, endpoint, num_modes))
        command = [sys.executable, "-m", "tests.bench.decision", str(config), str(times)]
        with log.open("wb") as file:
            daemon = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
        try:
            _wait_up(endpoint, daemon, num_modes, log)
            work = Work(
                num_requests=num_requests, window=WINDOW_PER_MODE * num_modes, max_tokens=MAX_TOKENS, stream=True
            )
            producers.run("raw", endpoint, work)
            daemon.terminate()
            if daemon.wait(STOP_S) != 0:
                raise CannotMeasureError(f"the daemon failed: {log.read_text()[-500:]}")
        finally:
            if daemon.poll() is None:
                daemon.kill()
                daemon.wait()
        return msgspec.json.decode(times.read_bytes(), type=Times)


def _config(folder: str, endpoint: str, num_modes: int) -> str:
    body = (
        f'[daemon]\ndrain_s = 5\nrun_dir = "{folder}/run"\nstate_dir = "{folder}/state"\n'
        f'[ingress.zmq]\nendpoints = ["{endpoint}"]\n[[model]]\nname = "toy"\n[policy]\nname = "cost"\n'
        '[quality]\nungated = "allow"\n'
    )
    for number in range(num_modes):
        precision = ("bf16", "fp8", "int8", "int4")[number % 4]
        body += (
            f'[[engine]]\nname = "m{number}"\nmodel = "toy"\nkind = "sim"\nprecision = "{precision}"\n'
            f"max_num_seqs = {SLOTS}\nprefix_caching = {str(number % 2 == 0).lower()}\n"
            "[engine.sim]\nstart_s = 0.05\nweights_bytes = 1_000_000_000\n"
            f"step_ms = {0.5 + 0.01 * number}\ndecode_ms_per_request = 0.01\n"
        )
    return body


def _wait_up(endpoint: str, daemon: subprocess.Popen[bytes], num_modes: int, log: Path) -> None:
    until_s = time.monotonic() + START_S
    while not Path(endpoint.removeprefix("ipc://")).exists():
        if daemon.poll() is not None or time.monotonic() > until_s:
            raise CannotMeasureError(f"the daemon did not start: {log.read_text()[-500:]}")
        time.sleep(0.05)
    with Client(endpoint, timeout_s=START_S) as client:
        while time.monotonic() < until_s:
            status = msgspec.convert(client.status(), DaemonStatus)
            if sum(engine.state == "up" for engine in status.engines) == num_modes:
                return
            time.sleep(0.1)
    raise CannotMeasureError(f"{num_modes} simulated engines were not up within {START_S:g} s")


# --- in the daemon's process -----------------------------------------------------------------------------------------


def _watch() -> Times:
    """Put the stopwatch in; the lists fill while the daemon runs."""
    times = Times([], [], [])
    clock, wall_clock = time.thread_time_ns, time.perf_counter_ns
    features: Callable[..., Any] = Extractor.features
    candidates: Callable[..., Any] = Router.candidates
    decide: Callable[..., Any] = Router.decide
    began_ns = began_wall_ns = 0

    def watched_features(*args: object) -> object:
        before_ns = clock()
        made = features(*args)
        times.extractions.append((clock() - before_ns) / 1e3)
        return made

    def watched_candidates(*args: object) -> object:
        nonlocal began_ns, began_wall_ns
        began_wall_ns = wall_clock()
        began_ns = clock()
        return candidates(*args)

    def watched_decide(*args: object) -> object:
        made = decide(*args)
        times.decisions.append((clock() - began_ns) / 1e3)
        times.wall.append((wall_clock() - began_wall_ns) / 1e3)
        return made

    Extractor.features = watched_features  # type: ignore[method-assign,assignment]
    Router.candidates = watched_candidates  # type: ignore[method-assign,assignment]
    Router.decide = watched_decide  # type: ignore[method-assign,assignment]
    return times


def main() -> None:
    """Be the daemon."""
    config_file, file = map(Path, sys.argv[1:])
    config = settings.load(config_file)
    logs.configure(config.daemon)
    times = _watch()
    uvloop.run(Daemon(config, config_file.parent).run())
    lists = (times.extractions, times.decisions, times.wall)
    file.write_bytes(msgspec.json.encode(Times(*(taken[WARM_UP:] for taken in lists))))


if __name__ == "__main__":
    main()

"""How much faster than real time the virtual world runs: 50 requests a second of 64 tokens each, all checks on.

Only the time in which requests arrive counts as virtual, not the quiet end in which the ledger settles.
"""

from __future__ import annotations

import subprocess
import sys
import time

import msgspec

from msd.sim.weather import STEADY
from msd.sim.world import run_world
from tests.bench.harness import ROOT, CannotMeasureError, Options, Row, row, say

TARGET = "sim_speed"
BAR_SPEED = 100.0
TIMEOUT_S = 300.0


def measure(options: Options) -> list[Row]:
    """Rows of the simulation."""
    num_requests = int(options.scaled(15_000, 2_000))
    speeds: list[float] = []
    cpu_speeds: list[float] = []
    for repeat in range(options.repeats):
        say(f"{TARGET}: repeat {repeat + 1} of {options.repeats}")
        # A process of its own: the world's log and its memory stay out of the other targets.
        command = [sys.executable, "-m", "tests.bench.sim_speed", str(repeat + 1), str(num_requests)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
        if done.returncode != 0:
            raise CannotMeasureError(f"the world broke: {(done.stdout + done.stderr)[-500:]}")
        speed, cpu_speed = msgspec.json.decode(done.stdout.splitlines()[-1], type=tuple[float, float])
        speeds.append(speed)
        cpu_speeds.append(cpu_speed)
    delta_ms = STEADY.emit_interval_ms
    name = f"virtual seconds per second, 50 req/s of 64 tokens, streamed in Deltas of {delta_ms:g} ms, all checks on"
    return [
        row(name, "x", speeds, target=TARGET, op=">=", bar=BAR_SPEED),
        row("the same per second of CPU (a busy machine gives less of it)", "x", cpu_speeds, target=TARGET, op=">="),
    ]


def main() -> int:
    """Run one world and print its speed."""
    seed, num_requests = int(sys.argv[1]), int(sys.argv[2])
    began = time.process_time()
    report = run_world(seed, num_requests, weather=STEADY)
    spent_s = time.process_time() - began
    virtual_s = num_requests / STEADY.rate_per_s
    print(msgspec.json.encode((virtual_s / report.wall_s, virtual_s / spent_s)).decode())
    return 0 if report.is_ok else 1


if __name__ == "__main__":
    sys.exit(main())

"""`python -m tests.bench [TARGET ..]`: measure the figures that have a bar (`make bench`).

Exit codes: 0 measured (a missed bar is a result), 1 a target could not measure, 2 usage.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from pathlib import Path

from rich.console import Console

from tests.bench import page
from tests.bench.harness import (
    DEFAULT_REPEATS,
    RESULTS,
    ROOT,
    CannotMeasureError,
    Options,
    Surroundings,
    Target,
    finish,
    load,
    look_around,
    say,
)

SUITES = {
    "spine": ("core", "zmq_path", "sim_speed", "soak", "loop_lag", "vllm_path"),
    "modeswitch": (
        "replay", "learned", "decision", "features", "decision_log", "gate", "residency", "energy", "bursts",
        "estimator", "cpu_modes",
    ),
}  # fmt: skip
"""From the quickest to the slowest. Each is a module here with a function `measure(Options) -> list[Row]`."""

TARGETS = tuple(name for suite in SUITES.values() for name in suite)

PLAIN_WIDTH = 150


def main() -> int:
    """Run the named targets, all without names; or write the page."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)} (default: the suite)")
    parser.add_argument("--suite", choices=sorted(SUITES), default="spine", help="default: spine")
    parser.add_argument(
        "--repeats", type=int, default=DEFAULT_REPEATS, help=f"of each figure (default {DEFAULT_REPEATS})"
    )
    parser.add_argument(
        "--quick", action="store_true", help="short repeats, to try a target out; results go to build/bench/quick"
    )
    parser.add_argument(
        "--write-docs", type=Path, metavar="FILE", help="write the page from build/bench, measure nothing"
    )
    arguments = parser.parse_args()
    unknown = [name for name in arguments.targets if name not in TARGETS]
    if unknown:
        parser.error(f"no target {', '.join(unknown)} (of {', '.join(TARGETS)})")
    if arguments.write_docs is not None:
        return _write_docs(arguments.write_docs, arguments.suite)
    options = Options(repeats=arguments.repeats, quick=arguments.quick)
    console = Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH)
    failed = False
    began = time.monotonic()
    for name in arguments.targets or SUITES[arguments.suite]:
        failed = not _measure(name, options, console) or failed
    say(f"{time.monotonic() - began:.0f} s in all")
    return int(failed)


def _measure(name: str, options: Options, console: Console) -> bool:
    """Measure one target, print and write it. False: it could not be measured."""
    surroundings = look_around()
    say(f"{name}: {options.repeats} repeats{' (quick)' if options.quick else ''}; {_machine(surroundings)}")
    began = time.monotonic()
    try:
        measure: Target = importlib.import_module(f"tests.bench.{name}").measure
        rows = measure(options)
    except CannotMeasureError as error:
        say(f"{name}: COULD NOT MEASURE: {error} ({time.monotonic() - began:.0f} s)")
        return False
    result = finish(name, rows, options, surroundings, time.monotonic() - began)
    page.show(result, console)
    num_misses = sum(row.holds is False for row in result.rows)
    say(f"{name}: {num_misses} misses; {result.meta.wall_s:.0f} s; {options.folder.relative_to(ROOT) / f'{name}.json'}")
    return True


def _machine(surroundings: Surroundings) -> str:
    loads = " ".join(f"{load:.1f}" for load in surroundings.load_averages)
    return f"others keep {surroundings.busy_cores:.1f} of {os.cpu_count()} cores busy, load average {loads}"


def _write_docs(file: Path, suite: str) -> int:
    """Write the page from what `make bench` left; refuse where a result is none, or a quick one."""
    known = [RESULTS / f"{name}.json" for name in SUITES[suite]]
    try:
        results = [load(path) for path in known if path.is_file()]
    except CannotMeasureError as error:
        say(f"{error}; measure again")
        return 1
    if quick := [result.meta.target for result in results if result.meta.quick]:
        say(f"quick results are not figures to keep: measure {', '.join(quick)} without --quick")
        return 1
    if not results:
        say(f"nothing in {RESULTS}: measure first")
        return 1
    file.write_text(page.render(results, suite), encoding="utf-8")
    say(f"{file}: {len(results)} targets")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m tests.bench [TARGET ..]`: measure the figures that have a bar (`make bench`).

Exit codes: 0 measured (a missed bar is a result), 1 a target could not measure, 2 usage.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from rich.console import Console

from tests.bench import page
from tests.bench.harness import RESULTS, CannotMeasureError, Options, Target, finish, load, say

TARGETS = ("core", "zmq_path", "sim_speed", "soak", "loop_lag", "vllm_path")
"""From the quickest to the slowest. Each is a module here with a function `measure(Options) -> list[Row]`."""

PLAIN_WIDTH = 150


def main() -> int:
    """Run the named targets, all without names; or write the page."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)} (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="of each figure (default 5)")
    parser.add_argument("--quick", action="store_true", help="short repeats, to try a target out")
    parser.add_argument(
        "--write-docs", type=Path, metavar="FILE", help="write the page from build/bench, measure nothing"
    )
    arguments = parser.parse_args()
    unknown = [name for name in arguments.targets if name not in TARGETS]
    if unknown:
        parser.error(f"no target {', '.join(unknown)} (of {', '.join(TARGETS)})")
    if arguments.write_docs is not None:
        return _write_docs(arguments.write_docs)
    options = Options(repeats=arguments.repeats, quick=arguments.quick)
    console = Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH)
    failed = False
    for name in arguments.targets or TARGETS:
        say(f"{name}: {options.repeats} repeats")
        measure: Target = importlib.import_module(f"tests.bench.{name}").measure
        try:
            result = finish(name, measure(options))
        except CannotMeasureError as error:
            failed = True
            say(f"{name}: COULD NOT MEASURE: {error}")
        else:
            page.show(result, console)
            say(f"{name}: {sum(row.holds is False for row in result.rows)} misses; {RESULTS / f'{name}.json'}")
    return int(failed)


def _write_docs(file: Path) -> int:
    known = [RESULTS / f"{name}.json" for name in TARGETS]
    results = [load(path) for path in known if path.is_file()]
    if not results:
        say(f"nothing in {RESULTS}: measure first")
        return 1
    file.write_text(page.render(results), encoding="utf-8")
    say(f"{file}: {len(results)} targets")
    return 0


if __name__ == "__main__":
    sys.exit(main())

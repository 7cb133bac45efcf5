"""The command line: `loadgen plan | run | presets`.

Exit codes: 0 ok, 2 bad spec or usage, 3 target dead, 4 report invalid, 130 / 143 stopped by SIGINT / SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from loadgen import plan as plans
from loadgen import report as reports
from loadgen import spec_reader, table
from loadgen.plan import Plan
from loadgen.progress import Progress
from loadgen.run import Run, execute
from loadgen.targets.zmq import SCHEMES, ZmqTarget
from msd import endpoint

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_DEAD = 3
EXIT_INVALID = 4
SIGNAL_BASE = 128
PLAIN_WIDTH = 120


class UsageError(Exception):
    """The command cannot be carried out as given. Recoverable by the user."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        match arguments.command:
            case "plan":
                return _plan(arguments)
            case "run":
                return _run(arguments)
            case _:
                return _presets(arguments)
    except (UsageError, spec_reader.SpecError, plans.PlanError) as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return SIGNAL_BASE + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loadgen", description="Open-loop load with honest timing.")
    commands = parser.add_subparsers(dest="command", required=True)

    def add_overrides(command: argparse.ArgumentParser) -> None:
        command.add_argument("--seed", type=int, help="another seed than the spec's")
        command.add_argument("--duration-s", type=float, help="another duration")
        command.add_argument("--rate", type=float, help="another mean rate, in requests/s")

    plan = commands.add_parser("plan", help="draw a plan and keep it")
    plan.add_argument("spec", metavar="SPEC", help="a spec (TOML) or a preset")
    plan.add_argument("-o", "--output", type=Path, required=True, metavar="PLAN", help="plan.jsonl or plan.jsonl.gz")
    add_overrides(plan)

    run = commands.add_parser("run", help="send a plan, a spec or a preset, and report")
    run.add_argument("what", metavar="PLAN|SPEC|PRESET")
    run.add_argument(
        "--target",
        default="msd+" + endpoint.for_client(),
        help="msd+ipc:///path or msd+tcp://host:port (default: %(default)s)",
    )
    add_overrides(run)
    run.add_argument("--json-out", type=Path, metavar="FILE", help="write the report there")
    run.add_argument("--json", action="store_true", help="print the report as JSON instead of tables")
    run.add_argument("--quiet", action="store_true", help="no progress on stderr")

    presets = commands.add_parser("presets", help="list the specs that ship with loadgen")
    presets.add_argument("--show", metavar="NAME", help="print one of them")
    return parser


def _plan(arguments: argparse.Namespace) -> int:
    plan = plans.make(spec_reader.load(arguments.spec, _overrides(arguments)))
    try:
        plans.save(plan, arguments.output)
    except OSError as error:
        raise UsageError(f"{arguments.output}: cannot be written: {error}") from error
    statistics = plan.header.statistics
    print(f"{arguments.output}: plan {plan.digest()}, seed {plan.header.seed}")
    print(f"  requests  {statistics.num_requests}: mean {statistics.rate_mean_rps:g}/s, "
          f"fullest second {statistics.rate_peak_rps}")  # fmt: skip
    print("  burstiness  " + ", ".join(
        f"index of dispersion {'-' if value is None else value} at {window.replace('_', ' ')}"
        for window, value in statistics.idc.items()
    ))  # fmt: skip
    print(f"  tokens  made-up prompts {statistics.input_tokens}, answers up to {statistics.output_tokens}")
    print("  classes  " + ", ".join(f"{name} {count}" for name, count in statistics.requests_per_class.items()))
    return EXIT_OK


def _run(arguments: argparse.Namespace) -> int:
    if not arguments.target.startswith(SCHEMES):
        raise UsageError(f"--target {arguments.target}: must start with {' or '.join(SCHEMES)}")
    plan = _plan_of(arguments)
    if not plan.requests:
        raise UsageError(f"{arguments.what}: the plan has no requests: raise the rate or the duration")
    if arguments.json_out is not None and not arguments.json_out.resolve().parent.is_dir():
        raise UsageError(f"--json-out {arguments.json_out}: its folder does not exist")
    target = ZmqTarget(arguments.target, plan.header.spec.run.max_in_flight)
    progress = Progress(plan.header.spec.plan.duration_s, quiet=arguments.quiet)
    run = asyncio.run(execute(plan, target, progress))
    encoded = reports.encode(run.report)
    if arguments.json_out is not None:
        try:
            arguments.json_out.write_bytes(encoded)
        except OSError as error:
            print(f"--json-out {arguments.json_out}: {error}", file=sys.stderr)
    if arguments.json:
        sys.stdout.write(encoded.decode())
    else:
        table.show(run.report, Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH))
    if run.death is not None:
        print(f"loadgen: target dead: {run.death}", file=sys.stderr)
    return _exit_code(run)


def _exit_code(run: Run) -> int:
    if run.stop_signal is not None:
        return SIGNAL_BASE + run.stop_signal
    if run.death is not None:
        return EXIT_DEAD
    return EXIT_OK if run.report.valid else EXIT_INVALID


def _presets(arguments: argparse.Namespace) -> int:
    if arguments.show is not None:
        if arguments.show not in spec_reader.presets():
            raise UsageError(f"no preset {arguments.show!r} (presets: {', '.join(spec_reader.presets())})")
        sys.stdout.write((spec_reader.PRESETS / f"{arguments.show}.toml").read_text(encoding="utf-8"))
        return EXIT_OK
    for name in spec_reader.presets():
        print(f"{name:12}{spec_reader.load(name).title}")
    return EXIT_OK


def _overrides(arguments: argparse.Namespace) -> dict[str, object]:
    given = {
        "plan.seed": arguments.seed,
        "plan.duration_s": arguments.duration_s,
        "arrivals.rate_rps": arguments.rate,
    }
    return {field: value for field, value in given.items() if value is not None}


def _plan_of(arguments: argparse.Namespace) -> Plan:
    path = Path(arguments.what)
    if not plans.is_plan(path):
        return plans.make(spec_reader.load(arguments.what, _overrides(arguments)))
    if overrides := _overrides(arguments):
        raise UsageError(f"{path} is a plan, and a plan is run as it is; {', '.join(overrides)} belong to its spec")
    return plans.load(path)

"""`msd sim`: one seeded world in virtual time: the daemon's own code on simulated engines, checked after each step."""

from __future__ import annotations

import argparse
import json
import logging
from random import Random
from typing import TYPE_CHECKING

import msgspec
from msgspec import structs

from msd.cli import terminal
from msd.cli.options import Commands, add_json, count, natural
from msd.cli.terminal import DASH, number, table
from msd.errors import EXIT_NO, EXIT_OK

if TYPE_CHECKING:
    from msd.sim.report import Report, Spread


def add_to(commands: Commands) -> None:
    """Add `sim` to the command line."""
    parser = commands.add_parser(
        "sim",
        help="run one seeded world in virtual time and check its invariants",
        description="Run the daemon's own code in a virtual world: simulated engines, GPU and time. One seed gives one "
        "digest, always. Exit 1 when an invariant is broken.",
    )
    parser.add_argument("--seed", type=natural, default=1, metavar="N", help="of everything (default 1)")
    parser.add_argument("--requests", type=count, default=2_000, metavar="N", help="how many (default 2000)")
    parser.add_argument("--policy", metavar="NAME", help="who decides (default: what the seed draws)")
    add_json(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the world; exit 1 when a check failed."""
    # Late: the simulation brings the whole daemon, and the other commands should start at once.
    import structlog

    from msd.config import POLICY_NAMES
    from msd.errors import ConfigError
    from msd.sim.weather import draw
    from msd.sim.world import run_world

    weather = draw(Random(options.seed), options.requests)
    if options.policy:
        if options.policy not in POLICY_NAMES:
            raise ConfigError(f"no policy {options.policy!r}", remedy=f"one of {', '.join(POLICY_NAMES)}")
        weather = structs.replace(weather, policy=options.policy)

    # A world's engines die by the dozen, on purpose; the report says what matters.
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        report = run_world(options.seed, options.requests, weather=weather)
    finally:
        structlog.configure(**before)
    if options.json:
        print(json.dumps({"ok": report.is_ok, **msgspec.to_builtins(report)}))
    else:
        print("\n".join(render(report)))
    return EXIT_OK if report.is_ok else EXIT_NO


def render(report: Report) -> list[str]:
    """The report as lines for a person."""
    lines = [
        f"SIMULATED world, seed {report.seed}: {report.num_requests:,} requests in {report.virtual_s:,.1f} virtual s, "
        f"{report.wall_s:,.2f} s here ({report.speed:,.0f} times real time)",
        f"requests: {report.submitted:,} submitted = {report.delivered:,} delivered + {report.rejected:,} rejected + "
        f"{report.aborted:,} aborted + {report.failed:,} failed + {report.duplicates:,} duplicates + "
        f"{report.pending:,} pending; {report.restarts:,} restarts after {report.num_engine_deaths:,} engine deaths",
        f"tokens: {report.num_prompt_tokens:,} read, {report.num_completion_tokens:,} written, "
        f"{report.tokens_per_s:,.0f} a second, {number(report.mj_per_token, 'mJ')} each",
        f"energy: {', '.join(f'{name} {energy_mj / 1000:,.1f} J' for name, energy_mj in report.energy_mj.items())}",
        "",
        *table(
            ["ms, simulated", "p50", "p95", "p99"],
            [_spread("TTFT", report.ttft_ms), _spread("TPOT", report.tpot_ms), _spread("E2EL", report.e2el_ms)],
        ),
        "",
        *table(["decisions", ""], [[name, f"{times:,}"] for name, times in report.by_mode.items()]),
        "",
        *table(["reasons", ""], [[name, f"{times:,}"] for name, times in report.by_reason.items()]),
        "",
        *table(
            ["check", "looked at", "broken"],
            [[check.name, f"{check.num_checked:,}", f"{check.num_violations:,}"] for check in report.checks],
        ),
    ]
    if report.error_codes:
        lines.append("errors: " + ", ".join(f"{code} {times:,}" for code, times in report.error_codes.items()))
    for check in report.checks:
        lines += [f"{check.name}: {violation}" for violation in check.violations]
    lines += [f"  {event}" for event in report.last_events]
    verdict = terminal.paint("all checks hold", "green") if report.is_ok else terminal.paint("CHECKS BROKEN", "red")
    return [*lines, "", f"{verdict}, digest {report.digest}"]


def _spread(name: str, spread: Spread) -> list[str]:
    return [name, *(DASH if value is None else f"{value:,.1f}" for value in (spread.p50, spread.p95, spread.p99))]

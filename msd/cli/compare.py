"""`msd compare`: the simulated contest of every policy against every fixed mode, as tables and as a page."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from msd.cli import terminal
from msd.cli.options import Commands, add_json, count, natural
from msd.cli.terminal import DASH, table
from msd.errors import EXIT_NO, EXIT_OK, ConfigError

if TYPE_CHECKING:
    from msd.sim.contest import Contest, Point


def add_to(commands: Commands) -> None:
    """Add `compare` to the command line."""
    parser = commands.add_parser(
        "compare",
        help="every policy against every fixed mode, under the same bursty traffic, simulated",
        description="Run the contest in virtual time: every policy and every fixed mode on the same seeded bursts, "
        "on one simulated GPU that its engines share. Prints the whole curve and writes a page with plots. Everything "
        "is simulated, and says so. Exit 1 when a bar is missed.",
    )
    parser.add_argument("--sim", action="store_true", help="simulated engines (default, and all there is)")
    parser.add_argument("--quick", action="store_true", help="few seeds and short runs: to try it out")
    parser.add_argument(
        "--seed", type=natural, default=1_001, metavar="N", help="first seed that judges (default 1001)"
    )
    parser.add_argument("--seeds", type=count, metavar="N", help="how many seeds judge (default 4)")
    parser.add_argument("--card", choices=("40", "80"), default="80", help="GPU memory in GB (default 80)")
    parser.add_argument("--learned", metavar="FILE", help="a trained router that takes part, too")
    parser.add_argument(
        "--jobs", type=count, default=os.cpu_count() or 1, metavar="N", help="processes (default: cores)"
    )
    parser.add_argument("--out", metavar="PAGE", default="compare.html", help="the page (default compare.html)")
    add_json(parser, "all figures as one JSON object on stdout, progress on stderr")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the contest, print it and write the page; exit 1 when a bar is missed."""
    from msgspec import structs

    # Late: the simulation brings the whole daemon.
    from msd.sim.contest import QUICK, Effort, run_contest

    if options.seed < 1_000:
        raise ConfigError("--seed: seeds below 1000 are for tuning, not for judging", remedy="name one from 1000 on")
    if options.learned and not Path(options.learned).is_file():
        raise ConfigError(f"--learned: there is no {options.learned}", remedy="`msd train-router` writes one")
    out = Path(options.out)
    if not out.parent.is_dir():
        raise ConfigError(f"--out: there is no folder {out.parent}", remedy="name another, or make it")
    effort = QUICK if options.quick else Effort()
    if options.seeds:
        effort = structs.replace(effort, num_seeds=options.seeds)
    progress = _Progress()
    try:
        contest = run_contest(
            effort,
            card=options.card,
            first_seed=options.seed,
            jobs=options.jobs,
            learned=str(Path(options.learned).resolve()) if options.learned else "",
            on_step=progress.step,
        )
    finally:
        progress.end()
    # Late: matplotlib takes a second.
    from msd.sim.contest_page import page

    content = page(contest)
    try:
        out.write_text(content)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}", remedy="name another with --out") from error
    is_ok = all(verdict.holds for verdict in contest.verdicts)
    if options.json:
        print(json.dumps({"ok": is_ok, "page": str(out), **msgspec.to_builtins(contest, str_keys=True)}))
    else:
        print("\n".join(render(contest)))
        print(f"\nwritten to {out}: {len(content) / 1024:.0f} KiB, opens in any browser")
    return EXIT_OK if is_ok else EXIT_NO


def render(contest: Contest) -> list[str]:
    """The contest as lines for a person."""
    lines = [
        f"SIMULATED contest on one {contest.card} GB GPU, seeds {contest.seeds[0]} to {contest.seeds[-1]}, "
        f"{contest.duration_s:g} virtual s each; what engines can do: msd/sim/truth.py",
        f"best fixed mode: {contest.best_fixed}; its capacity, {contest.capacity_per_s:g} requests a second, is load "
        "1; SLOs are twice its idle TTFT and TPOT per family",
    ]
    for shape in dict.fromkeys(point.shape for point in contest.points):
        points = [point for point in contest.points if point.shape == shape]
        lines += ["", terminal.paint(f"{shape}: goodput is answers a second that met all SLOs", "bold")]
        lines += table(
            ["who", "modes", "load", "goodput/s", "good", "refused", "TTFT p50", "p99 ms", "TPOT p50", "p99 ms",
             "J/token", "J/good token", "mode mix"],
            [_row(point) for point in sorted(points, key=lambda point: (point.load, -point.goodput_per_s))],
            left=(0, 1, 12),
        )  # fmt: skip
    lines += [""]
    lines += table(
        ["simulated", "value", "bar", "", ""],
        [
            [v.name, f"{v.value:.2f}", f"{v.op} {v.bar:g}", "holds" if v.holds else "MISSED", v.note]
            for v in contest.verdicts
        ],
        left=(0, 3, 4),
    )
    return lines


def _row(point: Point) -> list[str]:
    quality_ignored = " (quality ignored)" if point.kind.startswith("fixed,") else ""
    kind = "fixed on " if point.kind.startswith("fixed") else ""
    mix = ", ".join(f"{mode} {share:.0%}" for mode, share in sorted(point.mix.items(), key=lambda pair: -pair[1]))
    return [
        f"{kind}{point.contestant}{quality_ignored}",
        "+".join(point.modes),
        f"{point.load:g}",
        f"{point.goodput_per_s:.2f}",
        f"{point.good_share:.0%}",
        f"{point.refused_share:.0%}",
        f"{point.ttft_ms[0]:,.0f}",
        f"{point.ttft_ms[1]:,.0f}",
        f"{point.tpot_ms[0]:.1f}",
        f"{point.tpot_ms[1]:.1f}",
        f"{point.joules_per_token:.2f}",
        f"{point.joules_per_good_token:.2f}" if point.goodput_per_s else DASH,
        mix,
    ]


class _Progress:
    """A bar on a terminal; else a line at the beginning of each part. On stderr."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._what = ""

    def step(self, done: int, total: int, what: str) -> None:
        if not terminal.redraws(sys.stderr):
            if what != self._what:
                print(f"{what}: {total} matches", file=sys.stderr, flush=True)
            self._what = what
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
        if what != self._what:
            self._what = what
            self._task = self._bar.add_task(what, total=total)
        self._bar.update(self._task, completed=done, total=total)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()

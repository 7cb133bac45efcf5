"""What the demo ends with: a table that a person can read, what it means, where the files are, what to try next."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import Struct

from msd.cli.status import energy_lines
from msd.cli.terminal import DASH, number, paint, table
from msd.wire import DaemonStatus

if TYPE_CHECKING:
    from loadgen.metrics import EnergySum, Latencies, Quantiles
    from loadgen.report import Report

SIMULATED: Final = (
    "SIMULATED: the engines and the GPU follow a stated model; latencies, tokens and joules are not those of a machine"
)


class Result(Struct, frozen=True, kw_only=True):
    """What the demo came to: loadgen's report, the daemon's last status, and where the files lie."""

    report: Report
    status: DaemonStatus
    config: str
    folder: str


def decode(content: bytes) -> Report:
    """The report that loadgen wrote."""
    # Late: it brings numpy.
    from loadgen.report import Report

    return msgspec.json.decode(content, type=Report)


def num_finished(result: Result) -> int:
    """Requests that were answered."""
    return result.report.total.by_status.get("finished", 0)


def render(result: Result) -> list[str]:
    """The whole ending, as lines."""
    report, status = result.report, result.status
    lines = [
        f"{report.total.num_offered:,} requests in {report.plan.duration_s:g} s over ZeroMQ, {num_finished(result):,} "
        f"answered, by {len(status.engines)} {'SIMULATED' if status.simulated else 'live vLLM'} engines in one process "
        f"(policy {status.policy})"
    ]
    if status.simulated:
        lines.append(paint(SIMULATED, "yellow"))
    lines += ["", *_figures(result), "", *_reasons(result), "", *_footnotes(result), ""]
    return lines + _what_next(result)


def _figures(result: Result) -> list[str]:
    report, simulated = result.report, result.status.simulated
    span_s = report.throughput.span_s
    # As the daemon lists them, so that this table and the next one read alike.
    order = {mode.mode: index for index, mode in enumerate(result.status.modes)}
    rows = [
        _row(
            use.mode,
            use.num_requests,
            use.request_share,
            use.accuracy,
            use.latencies,
            use.output_tokens,
            span_s,
            use.energy,
        )
        for use in sorted(report.modes, key=lambda use: order.get(use.mode, len(order)))
    ]
    total = report.total
    if len(rows) > 1:
        share = num_finished(result) / total.num_offered if total.num_offered else 0.0
        rows.append(
            _row(
                "all",
                num_finished(result),
                share,
                total.accuracy,
                total.latencies,
                total.output_tokens,
                span_s,
                total.energy,
            )
        )
    if simulated:
        # A simulated engine answers with filler: grading that would say nothing.
        rows = [[*row[:3], DASH, *row[4:]] for row in rows]
    head = ["mode", "requests", "share", "right", "TTFT ms", "TPOT ms", "E2EL ms", "tokens/s", "energy"]
    notes = ["latencies are p50 / p95, counted from the intended send time"]
    if any(use.latencies.tpot_ms is not None and use.latencies.tpot_ms.p50 == 0 for use in report.modes):
        notes.append("TPOT 0.0: most answers were so short that they came whole, in one message")
    return [*table(head, rows), *(paint(note, "dim") for note in notes)]


def _row(
    name: str,
    num_requests: int,
    share: float,
    accuracy: float | None,
    latencies: Latencies,
    output_tokens: int,
    span_s: float,
    energy: tuple[EnergySum, ...],
) -> list[str]:
    return [
        name,
        f"{num_requests:,}",
        f"{share:.0%}",
        DASH if accuracy is None else f"{accuracy:.0%}",
        _pair(latencies.ttft_intended_ms),
        _pair(latencies.tpot_ms, digits=1),
        _pair(latencies.e2el_intended_ms),
        number(output_tokens / span_s if span_s else None, digits=0),
        ", ".join(f"{part.energy_j:,.1f} J {part.source}" for part in energy) or DASH,
    ]


def _pair(values: Quantiles | None, digits: int = 0) -> str:
    return DASH if values is None else f"{values.p50:,.{digits}f} / {values.p95:,.{digits}f}"


def _reasons(result: Result) -> list[str]:
    rows = [
        [mode.mode if index == 0 else "", f"{count:,}", reason]
        for mode in result.status.modes
        for index, (reason, count) in enumerate(mode.reasons)
    ]
    return table(["why", "times", "reason that the policy gave"], rows, left=(0, 2))


def _footnotes(result: Result) -> list[str]:
    report, status = result.report, result.status
    errors = ", ".join(f"{code} {count:,}" for code, count in report.total.errors.items())
    other = ", ".join(
        f"{name.replace('_', ' ')} {count:,}"
        for name, count in report.total.by_status.items()
        if count and name not in ("finished", "rejected", "failed")
    )
    lines = [f"errors: {'; '.join(part for part in (errors, other) if part) or 'none'}"]
    if report.total.accuracy is not None and not status.simulated:
        lines.append(
            f"right: answers to exact-answer tasks that were exactly right; {report.total.num_graded:,} were graded"
        )
    if report.num_energy_unsettled:
        lines.append(
            f"energy by mode is what the answers said; {report.num_energy_unsettled:,} left before theirs was settled. "
            "Settled:"
        )
    if status.energy:
        for ledger in status.energy:
            lines += energy_lines(ledger)
    else:
        lines.append(
            f"energy: {DASH}  nothing measured it: msd found no energy counter that it may read on this machine"
        )
    if not report.valid:
        lines.append(paint(f"do not quote these latencies: {'; '.join(report.reasons)}", "yellow"))
        lines.append(
            "  The load generator found no free core in time, so its own lateness is in the figures; nothing is wrong\n"
            "  with the answers. Run the demo with less beside it, or with a lower --rate."
        )
    return lines


def _what_next(result: Result) -> list[str]:
    # As the reader typed it: `msd` alone is on the path only inside an activated environment.
    msd = sys.argv[0] if Path(sys.argv[0]).name == "msd" else f"{sys.executable} -m msd"
    return [
        paint("Files", "bold") + f"  {result.folder}: report.json, daemon.log, loadgen.log, the engines' logs",
        f"       configuration {result.config}",
        paint("Next", "bold")
        + f"   {msd} demo --rate 40                  more load: queueing, and another share of modes",
        f"       {msd} serve --config config.toml      a daemon of your own; then, in another terminal:",
        f"       {msd} status --watch                  its engines, queue and energy",
        f'       {msd} send "sort kdwa="               one answer, streamed',
        "       docs/tutorial.md                    from here to a producer script of your own",
        "       docs/glossary.md                    TTFT, TPOT, E2EL and the other words",
    ]

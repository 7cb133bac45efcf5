"""The report as tables for a terminal."""

from __future__ import annotations

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table

from loadgen.metrics import EnergySum, ModeUse, Quantiles
from loadgen.metrics import Group as Figures
from loadgen.report import Report
from loadgen.spec import SloSpec

DASH = "-"
SHOWN_ERRORS = 8


def show(report: Report, console: Console) -> None:
    """Print the report; an invalid one says so first."""
    if not report.valid:
        text = "\n".join(f"- {reason}" for reason in report.reasons)
        console.print(Panel(text, title="INVALID: do not quote these figures", border_style="red", expand=False))
    for warning in report.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False)
    console.print(_headline(report), markup=False, highlight=False)
    console.print(Group(_classes(report), _modes(report)))
    console.print(_footer(report), markup=False, highlight=False)


def _headline(report: Report) -> str:
    plan, throughput = report.plan, report.throughput
    idc = ", ".join(
        f"{DASH if v is None else f'{v:.1f}'} at {w.replace('_', ' ')}" for w, v in plan.statistics.idc.items()
    )
    server = f" ({report.server.server})" if report.server else ""
    return (
        f"{plan.title or 'load'}: {report.total.num_offered} requests offered to {report.target}{server}\n"
        f"plan {plan.hash}, seed {plan.seed}, {plan.duration_s:g} s: mean {plan.statistics.rate_mean_rps:.1f}/s, "
        f"fullest second {plan.statistics.rate_peak_rps}, index of dispersion {idc} (1 = Poisson)\n"
        f"answered {throughput.requests_per_s:.1f} requests/s, {throughput.output_tokens_per_s:.0f} tokens/s"
    )


def _classes(report: Report) -> Table:
    table = Table(title="Classes: latencies from the intended send time, p50 / p95 in ms", title_justify="left")
    for name in ("class", "SLO", "offered", "good", "TTFT", "TPOT", "E2EL", "right", "not finished"):
        table.add_column(name, justify="left" if name in ("class", "SLO", "not finished") else "right")
    for figures in (*report.classes, report.total):
        if figures is report.total:
            table.add_section()
        late = figures.latencies
        table.add_row(
            figures.name,
            _slo(figures.slo),
            str(figures.num_offered),
            _percent(figures.goodput_share),
            _pair(late.ttft_intended_ms),
            _pair(late.tpot_ms, digits=1),
            _pair(late.e2el_intended_ms),
            _percent(figures.accuracy),
            _unfinished(figures),
        )
    return table


def _modes(report: Report) -> Table:
    table = Table(title="Modes: who served, and why", title_justify="left")
    for name in ("mode", "requests", "tokens", "TTFT", "TPOT", "E2EL", "right", "energy", "commonest reasons"):
        table.add_column(name, justify="left" if name in ("mode", "commonest reasons") else "right")
    for use in report.modes:
        late = use.latencies
        table.add_row(
            use.mode,
            f"{use.num_requests} ({use.request_share:.0%})",
            _percent(use.token_share),
            _pair(late.ttft_intended_ms),
            _pair(late.tpot_ms, digits=1),
            _pair(late.e2el_intended_ms),
            _percent(use.accuracy),
            _energy(use.energy),
            _reasons(use),
        )
    return table


def _footer(report: Report) -> str:
    certificate, total = report.certificate, report.total
    late = certificate.lateness_ms
    lines = [
        "sent late by "
        + (DASH if late is None else f"p50 {late.p50:.2f}, p99 {late.p99:.2f}, at most {late.max:.2f} ms")
        + f" (p99 allowed: {certificate.max_lateness_p99_ms:g}); offered {certificate.offered_rps:g}/s, "
        f"sent {certificate.achieved_rps:g}/s, shed {certificate.num_shed}, generator used "
        f"{certificate.cpu_share:.0%} of a core",
        f"energy: {_energy(total.energy)}" + ("" if total.energy else " (nothing measured it)"),
    ]
    if total.itl_ms is not None:
        itl = total.itl_ms
        lines.append(
            f"gap between messages p50 {itl.p50:.1f}, p99 {itl.p99:.1f} ms; {itl.tokens_per_message:.2f} tokens each"
        )
    if total.errors:
        shown = sorted(total.errors.items(), key=lambda item: -item[1])[:SHOWN_ERRORS]
        lines.append("errors: " + ", ".join(f"{code} {count}" for code, count in shown))
    return "\n".join(lines)


def _slo(slo: SloSpec) -> str:
    bounds = (("TTFT", slo.ttft_ms), ("TPOT", slo.tpot_ms), ("ITL p99", slo.itl_p99_ms), ("E2EL", slo.e2el_ms))
    return ", ".join(f"{name} <= {bound:g}" for name, bound in bounds if bound is not None) or DASH


def _pair(values: Quantiles | None, digits: int = 0) -> str:
    return DASH if values is None else f"{values.p50:.{digits}f} / {values.p95:.{digits}f}"


def _percent(share: float | None) -> str:
    return DASH if share is None else f"{share:.1%}"


def _energy(sums: tuple[EnergySum, ...]) -> str:
    return ", ".join(f"{entry.energy_j:.1f} J ({entry.source})" for entry in sums) or DASH


def _reasons(use: ModeUse) -> str:
    return "\n".join(f"{reason or DASH} ({count})" for reason, count in use.reasons.items())


def _unfinished(figures: Figures) -> str:
    shown = [f"{name.replace('_', ' ')} {count}" for name, count in figures.by_status.items() if count]
    return ", ".join(entry for entry in shown if not entry.startswith("finished")) or DASH

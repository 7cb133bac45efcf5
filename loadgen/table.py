"""The report as tables for a terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from loadgen.metrics import EnergySum, Group, Quantiles
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
    parts = (_headline, _classes, _goods, _modes, _reasons, _footer)
    for part in parts:
        console.print(part(report), markup=False, highlight=False)


def _headline(report: Report) -> str:
    plan, throughput = report.plan, report.throughput
    dispersion = ", ".join(
        f"{DASH if value is None else f'{value:.1f}'} at {window.replace('_', ' ')}"
        for window, value in plan.statistics.idc.items()
    )
    server = f" ({report.server.server})" if report.server else ""
    return (
        f"{plan.title or 'load'}\n"
        f"  {report.total.num_offered} requests offered to {report.target}{server}; "
        f"plan {plan.hash}, seed {plan.seed}\n"
        f"  {plan.duration_s:g} s, mean {plan.statistics.rate_mean_rps:.1f}/s, fullest second "
        f"{plan.statistics.rate_peak_rps}, index of dispersion {dispersion} (1 = Poisson)\n"
        f"  answered {throughput.requests_per_s:.1f} requests/s, {throughput.output_tokens_per_s:.0f} tokens/s\n"
    )


def _grid(title: str, first: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _classes(report: Report) -> Table:
    columns = ("offered", "good", "TTFT ms", "TPOT ms", "E2EL ms", "right", "energy", "not finished")
    table = _grid("Classes (p50 / p95, counted from the intended send time)", "class", columns)
    for figures in (*report.classes, report.total):
        if figures is report.total:
            table.add_section()
        late = figures.latencies
        table.add_row(
            figures.name,
            str(figures.num_offered),
            _percent(figures.goodput_share),
            _pair(late.ttft_intended_ms),
            _pair(late.tpot_ms, digits=1),
            _pair(late.e2el_intended_ms),
            _percent(figures.accuracy),
            _energy(figures.energy),
            _unfinished(figures),
        )
    return table


def _goods(report: Report) -> str:
    """What `good` asks for, per class."""
    return "\n".join(f"  good {group.name}: finished, {_slo(group.slo)}" for group in report.classes) + "\n"


def _modes(report: Report) -> Table:
    columns = ("requests", "share", "tokens", "TTFT ms", "TPOT ms", "E2EL ms", "right", "energy")
    table = _grid("Modes (who served)", "mode", columns)
    for use in report.modes:
        late = use.latencies
        table.add_row(
            use.mode,
            str(use.num_requests),
            _percent(use.request_share),
            str(use.output_tokens),
            _pair(late.ttft_intended_ms),
            _pair(late.tpot_ms, digits=1),
            _pair(late.e2el_intended_ms),
            _percent(use.accuracy),
            _energy(use.energy),
        )
    return table


def _reasons(report: Report) -> str:
    """Why each mode served, the commonest reasons first."""
    lines = [
        f"  why {use.mode}: "
        + "; ".join(f"{count} x {reason or '(no reason)'}" for reason, count in use.reasons.items())
        for use in report.modes
    ]
    return "\n".join(lines) + "\n"


def _footer(report: Report) -> str:
    certificate, total = report.certificate, report.total
    late = certificate.lateness_ms
    lateness = DASH if late is None else f"p50 {late.p50:.2f}, p99 {late.p99:.2f}, max {late.max:.2f} ms"
    lines = [
        f"sent late by {lateness} (allowed: p99 {certificate.max_lateness_p99_ms:g} ms)",
        f"offered {certificate.offered_rps:g}/s, sent {certificate.achieved_rps:g}/s, shed {certificate.num_shed}; "
        f"the generator used {certificate.cpu_share:.0%} of a core",
        f"energy: {_energy(total.energy)}" + ("" if total.energy else " (nothing measured it)"),
    ]
    if total.itl_ms is not None:
        itl = total.itl_ms
        lines.append(
            f"messages: {itl.tokens_per_message:.2f} tokens each, gaps p50 {itl.p50:.1f}, p99 {itl.p99:.1f} ms"
        )
    if total.errors:
        shown = sorted(total.errors.items(), key=lambda item: -item[1])[:SHOWN_ERRORS]
        lines.append("errors: " + ", ".join(f"{code} {count}" for code, count in shown))
    return "\n".join(lines)


def _slo(slo: SloSpec) -> str:
    bounds = (("TTFT", slo.ttft_ms), ("TPOT", slo.tpot_ms), ("ITL p99", slo.itl_p99_ms), ("E2EL", slo.e2el_ms))
    return ", ".join(f"{name} <= {bound:g} ms" for name, bound in bounds if bound is not None) or "no SLO"


def _pair(values: Quantiles | None, digits: int = 0) -> str:
    return DASH if values is None else f"{values.p50:.{digits}f} / {values.p95:.{digits}f}"


def _percent(share: float | None) -> str:
    return DASH if share is None else f"{share:.1%}"


def _energy(sums: tuple[EnergySum, ...]) -> str:
    return ", ".join(f"{entry.energy_j:.1f} J {entry.source}" for entry in sums) or DASH


def _unfinished(figures: Group) -> str:
    shown = [f"{name.replace('_', ' ')} {count}" for name, count in figures.by_status.items() if count]
    return ", ".join(entry for entry in shown if not entry.startswith("finished")) or DASH

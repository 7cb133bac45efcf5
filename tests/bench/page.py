"""Results for people: a table on the terminal, and docs/reference/performance.md from the JSON files."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from tests.bench.harness import Result, Row

DASH = "-"


def show(result: Result, console: Console) -> None:
    """Print one target's rows."""
    meta = result.meta
    title = f"{meta.target}  ({meta.host}, {meta.cores} cores, Python {meta.python}, {meta.commit})"
    if meta.quick:
        title += "  QUICK: not figures to keep"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, justify in (("what", "left"), ("value", "right"), ("bar", "right"), ("", "left"), ("repeats", "left")):
        table.add_column(name, justify="right" if justify == "right" else "left", overflow="fold")
    for row in result.rows:
        repeats = ", ".join(f"{repeat:g}" for repeat in row.repeats)
        peer = f"\n{_peer(row)}" if row.peer is not None else ""
        style = {True: "green", False: "red", None: "dim"}[row.holds]
        table.add_row(row.name + peer, _value(row), _bar(row), f"[{style}]{_verdict(row)}[/]", row.skipped or repeats)
    console.print(table)


INTROS = {
    "spine": [
        "# Performance",
        "",
        "`make bench` measures these figures into `build/bench/*.json`, and `make docs` writes this page from there.",
    ],
    "modeswitch": [
        "# The mode switch, measured",
        "",
        "`make bench-modeswitch` measures these figures into `build/bench/*.json`, and `make docs` writes this page",
        "from there. `replay` and `learned` replay published figures of one A100 (attribution: msd/data/modeswitch);",
        "`gate`, `residency`, `energy` and `bursts` are simulated; `decision`, `estimator`, `cpu_modes` run here,",
        "on CPU engines with tiny models where they run engines at all. Nothing on this page was measured on a GPU:",
        "`make gpu` does that, where there is one.",
    ],
}


def render(results: list[Result], suite: str = "spine") -> str:
    """Return the page of a suite."""
    lines = [
        *INTROS[suite],
        "Each is the median of its repeats unless its name says otherwise, with their interquartile range beside it; a",
        "missed bar stands as a miss. Figures depend on what else the machine did: what others kept busy just before a",
        "target began is named with it.",
        "Absolute figures belong to the machine that is named; ratios travel better. What was tried about the misses,",
        "and where the time goes: [misses.md](../explanation/misses.md).",
        "",
    ]
    for result in results:
        meta = result.meta
        lines += [
            f"## {meta.target}",
            "",
            f"{meta.host}, {meta.cores} cores, Python {meta.python}, commit {meta.commit}, {meta.date}; "
            f"{meta.wall_s:.0f} s. Before it began: {meta.busy_cores:.2g} cores busy with other work, load average "
            f"{meta.load_average:.1f}.",
            "",
            "```sh",
            *sorted({row.command for row in result.rows}),
            "```",
            "",
            "| what | value | spread | bar | |",
            "|---|---|---|---|---|",
            *(_line(row) for row in result.rows),
            "",
        ]
    return "\n".join(lines)


def _line(row: Row) -> str:
    name = row.name + (f" ({_peer(row)})" if row.peer is not None else "")
    spread = DASH if row.iqr is None else f"{row.iqr:g}"
    verdict = row.skipped if row.skipped is not None else _verdict(row)
    return f"| {name} | {_value(row)} | {spread} | {_bar(row)} | {verdict} |"


def _peer(row: Row) -> str:
    assert row.peer is not None
    value = "" if row.peer.value is None else f": {row.peer.value:.4g}"
    return f"{row.peer.name} {row.peer.version}{value}"


def _value(row: Row) -> str:
    return DASH if row.value is None else f"{row.value:g} {row.unit}"


def _bar(row: Row) -> str:
    return DASH if row.bar is None else f"{row.op} {row.bar:g}"


def _verdict(row: Row) -> str:
    if row.skipped is not None:
        return "skipped"
    return {True: "holds", False: "MISS", None: ""}[row.holds]

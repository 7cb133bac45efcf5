"""Tables and plots of what `make gpu` has measured: results/summary.json, summary.md and, with matplotlib, SVG plots.

Ratios are means over families of each family's ratio of medians (the paper's mean of ratios); a bar is judged only when
every family of the condition was measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from tests.gpu.plan import Plan

if TYPE_CHECKING:
    from tests.gpu.deployment import Call, Turn


class Cell(Struct, frozen=True, kw_only=True):
    """One condition in one family: medians over its requests, energy over all of its turns."""

    condition: str
    family: str
    num_requests: int
    ttft_ms: float
    e2el_ms: float
    j_per_token: float | None
    modes: dict[str, int]


class Bar(Struct, frozen=True, kw_only=True):
    """One figure of the issue, and whether it is reached. None: not measured."""

    name: str
    value: float | None
    bar: float
    holds: bool | None


class Summary(Struct, frozen=True, kw_only=True):
    """All that was measured."""

    title: str
    calls: list[dict[str, object]]
    cells: list[Cell]
    bars: list[Bar]


def write(results: Path) -> int:
    """Write everything that can be written from `results`; exit code 1 when there is nothing."""
    from tests.gpu.deployment import Call, read_turns

    plan_file, calls_file = results / "plan.json", results / "calls.jsonl"
    turns = read_turns(results)
    if not plan_file.is_file() or not turns:
        print(f"gpu: no turns in {results} yet")
        return 0
    plan = msgspec.json.decode(plan_file.read_bytes(), type=Plan)
    calls = [msgspec.json.decode(line, type=Call) for line in calls_file.read_bytes().splitlines()]
    cells = cells_of(plan, turns)
    summary = Summary(
        title=plan.title, calls=[msgspec.to_builtins(call) for call in calls], cells=cells, bars=bars_of(plan, cells)
    )
    (results / "summary.json").write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=2))
    text = markdown(plan, calls, cells, summary.bars)
    (results / "summary.md").write_text(text)
    print(text)
    try:
        plot(plan, cells, results / "families.svg")
    except ModuleNotFoundError:
        print("gpu: no matplotlib here: draw the plots elsewhere with --report")
    return 0


def cells_of(plan: Plan, turns: Sequence[Turn]) -> list[Cell]:
    """Every condition in every family (and the burst) that was measured."""
    cells = []
    for family in [*(family.name for family in plan.families), "burst"]:
        for condition in plan.conditions:
            own = [turn for turn in turns if (turn.condition, turn.family) == (condition.name, family)]
            if not own:
                continue
            metered = [turn for turn in own if turn.energy_mj is not None]
            modes = [mode for turn in own for mode in turn.modes]
            num_tokens = sum(turn.num_tokens for turn in metered)
            cells.append(
                Cell(
                    condition=condition.name,
                    family=family,
                    num_requests=len(modes),
                    ttft_ms=statistics.median(x for turn in own for x in turn.ttft_ms),
                    e2el_ms=statistics.median(x for turn in own for x in turn.e2el_ms),
                    j_per_token=sum(turn.energy_mj or 0 for turn in metered) / 1_000 / num_tokens
                    if num_tokens
                    else None,
                    modes={mode: modes.count(mode) for mode in sorted(set(modes))},
                )
            )
    return cells


def ratio(
    plan: Plan, cells: Sequence[Cell], condition: str, base: str, figure: str, *, least: bool = False
) -> float | None:
    """Mean over families of base / condition (latency) or condition / base (energy); `least`: the worst family."""
    ratios = []
    for family in plan.families:
        found = {cell.condition: cell for cell in cells if cell.family == family.name}
        if condition not in found or base not in found:
            return None
        own, other = found[condition], found[base]
        if figure == "latency":
            ratios.append(other.e2el_ms / own.e2el_ms)
        elif own.j_per_token is None or not other.j_per_token:
            return None
        else:
            ratios.append(own.j_per_token / other.j_per_token)
    return min(ratios) if least else statistics.fmean(ratios)


def bars_of(plan: Plan, cells: Sequence[Cell]) -> list[Bar]:
    """The bars of the issue; against the best quality-safe fixed mode, the least latency over all families counts."""
    safe = {name: ratio(plan, cells, name, plan.eager, "latency") for name in plan.safe}
    best = max((name for name, value in safe.items() if value is not None), key=lambda n: safe[n] or 0.0, default="")
    cautious = "cost_no_gptq" if any(c.name == "cost_no_gptq" for c in plan.conditions) else "cost"
    eager = ratio(plan, cells, "cost", plan.eager, "latency")
    energy = ratio(plan, cells, "cost", plan.eager, "energy")
    graphs = ratio(plan, cells, "cost", plan.graphs, "latency")
    each = ratio(plan, cells, cautious, best, "latency", least=True)
    over_all = ratio(plan, cells, cautious, best, "latency")
    rows = (
        ("cost against eager FP16, latency", eager, 2.51, True),
        ("cost against eager FP16, energy per token", energy, 0.414, False),
        ("cost against FP16 + graphs, latency", graphs, 1.77, True),
        (f"{cautious} against the best quality-safe fixed mode ({best}), worst family", each, 0.98, True),
        (f"{cautious} against the best quality-safe fixed mode ({best}), over all", over_all, 1.0, True),
    )
    return [
        Bar(
            name=name,
            value=value,
            bar=bar,
            holds=None if value is None else (value >= bar if more_is_better else value < bar),
        )
        for name, value, bar, more_is_better in rows
    ]


def markdown(plan: Plan, calls: Sequence[Call], cells: Sequence[Cell], bars: Sequence[Bar]) -> str:
    """The committed page."""
    lines = [f"# {plan.title}", ""]
    for call in calls:
        about = ", ".join(f"{name} {version}" for name, version in call.versions.items())
        lines.append(f"- call {call.number}, {call.date}: `{call.command}` on {call.device}; {about}")
        lines += [
            f"  - not measured, did not start: {name}: {why.splitlines()[0]}" for name, why in call.failed.items()
        ]
    lines += ["", "Speculation runs at a forced acceptance; the weights are dummies; the gate file is stated.", ""]
    lines += ["| what | measured | bar | |", "|---|---:|---:|---|"]
    for bar in bars:
        value = "not measured" if bar.value is None else f"{bar.value:.3f}"
        verdict = "" if bar.holds is None else "holds" if bar.holds else "MISS"
        lines.append(f"| {bar.name} | {value} | {bar.bar:g} | {verdict} |")
    for family in [*(family.name for family in plan.families), "burst"]:
        rows = [cell for cell in cells if cell.family == family]
        lines += ["", f"## {family}", ""]
        lines += ["| condition | requests | TTFT ms | E2EL ms | J/token | modes |", "|---|---:|---:|---:|---:|---|"]
        for cell in rows:
            energy = "-" if cell.j_per_token is None else f"{cell.j_per_token:.3f}"
            modes = ", ".join(f"{mode} {count}" for mode, count in cell.modes.items())
            times = f"{cell.ttft_ms:.1f} | {cell.e2el_ms:.1f}"
            lines.append(f"| {cell.condition} | {cell.num_requests} | {times} | {energy} | {modes} |")
    return "\n".join(lines) + "\n"


def plot(plan: Plan, cells: Sequence[Cell], file: Path) -> None:
    """E2EL and J/token by family and condition."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    families = [*(family.name for family in plan.families), "burst"]
    conditions = [condition.name for condition in plan.conditions]
    figure, axes = pyplot.subplots(2, 1, figsize=(12, 8), layout="constrained")
    for axis, title, attribute in (
        (axes[0], "E2EL, ms (median)", "e2el_ms"),
        (axes[1], "J per generated token", "j_per_token"),
    ):
        width = 0.8 / len(conditions)
        for i, name in enumerate(conditions):
            found = {cell.family: getattr(cell, attribute) or 0.0 for cell in cells if cell.condition == name}
            places = [j + i * width for j in range(len(families))]
            axis.bar(places, [found.get(family, 0.0) for family in families], width, label=name)
        axis.set_xticks([j + 0.4 for j in range(len(families))], families)
        axis.set_title(title)
    axes[0].legend(ncols=4, fontsize="small")
    figure.suptitle(plan.title)
    figure.savefig(file)
    pyplot.close(figure)

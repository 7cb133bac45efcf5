"""The contest as one HTML page: figures as inline SVG, the whole curve as a table, nothing from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape
from io import StringIO
from typing import Any

from msd.sim.contest import FIXED, UNJUDGED, Contest, Point
from msd.sim.match import BUCKET_S, WARM_UP_S, Match
from msd.sim.plan import FAMILIES

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")
SIZE_IN = (6.4, 3.8)
WIDE_IN = (13.0, 3.4)
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto; max-width: 76rem;
  padding: 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 1.5rem 0 .25rem; }
p { margin: .25rem 0 .5rem; max-width: 52rem; } .quiet { color: #555; font-size: .9rem; }
.label { background: #fff3cd; border: 1px solid #d9b84a; border-radius: .4rem; padding: .5rem .75rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem 2rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .5rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child, .left { text-align: left; } .missed { color: #a30000; font-weight: 600; }
"""


def page(contest: Contest) -> str:
    """The whole page."""
    title = "Policies and fixed modes under the same bursts (simulated)"
    bursts = [point for point in contest.points if point.shape == "bursts"]
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        '<p class="label"><strong>Simulated.</strong> Engines, GPU, time and traffic follow stated models '
        "(<code>msd/sim/truth.py</code>, <code>plan.py</code>); the decisions are the daemon's own code. No figure "
        "here was measured on a GPU.</p>",
        f"<p>One {escape(contest.card)} GB GPU. Best fixed mode: <strong>{escape(contest.best_fixed)}</strong>; its "
        f"capacity of {contest.capacity_per_s:g} requests a second is load 1; SLOs are twice its idle TTFT and TPOT "
        f"per family. Seeds {contest.seeds[0]} to {contest.seeds[-1]}, {contest.duration_s:g} virtual seconds each, "
        "the same requests for everybody. Goodput: answers a second that met all SLOs, by a mode certified for "
        "them.</p>",
        '<div class="figures">',
    ]
    parts += [_figure(*figure) for figure in _figures(contest, bursts)]
    parts.append("</div>")
    parts += [_figure(*figure) for figure in _timelines(contest)]
    parts += [_verdicts(contest), *_tables(contest), _families(bursts), "</body></html>\n"]
    return "\n".join(parts)


def _figure(heading: str, sentence: str, svg: str) -> str:
    return f'<figure><h2>{escape(heading)}</h2><p class="quiet">{escape(sentence)}</p>{svg}</figure>'


def _svg(draw: Callable[[Any], None], x: str, y: str, size: tuple[float, float] = SIZE_IN) -> str:
    """One figure. matplotlib's object interface: no window system, no global state."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "msd", "font.size": 11, "font.family": "sans-serif"}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        buffer = StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _figures(contest: Contest, bursts: Sequence[Point]) -> Iterator[tuple[str, str, str]]:
    """(heading, sentence, SVG) of the curves."""
    yield (
        "Goodput over load (simulated)",
        "Bursts, four times the rate in between, 20 s each on average. Grey: the other fixed modes.",
        _svg(lambda axes: _draw_curves(axes, contest, bursts, "goodput_per_s"), "load", "good answers/s"),
    )
    yield (
        "Energy per token of a good answer (simulated)",
        "Joules of the whole GPU over the tokens of answers that met their SLOs. Who is not shown is above the frame.",
        _svg(
            lambda axes: _draw_curves(axes, contest, bursts, "joules_per_good_token", top=4.0), "load", "J/good token"
        ),
    )
    yield (
        "Energy per token (simulated)",
        "The same over all tokens, in time or not.",
        _svg(lambda axes: _draw_curves(axes, contest, bursts, "joules_per_token"), "load", "J/token"),
    )
    yield (
        "Who serves (simulated)",
        "Share of the answers per mode, bursts, by policy and load.",
        _svg(lambda axes: _draw_mix(axes, bursts), "share of the answers", ""),
    )


def _curves(bursts: Sequence[Point]) -> dict[tuple[str, str], list[Point]]:
    curves: dict[tuple[str, str], list[Point]] = {}
    for point in sorted(bursts, key=lambda point: point.load):
        curves.setdefault((point.kind, point.contestant), []).append(point)
    return curves


def _draw_curves(axes: Any, contest: Contest, bursts: Sequence[Point], name: str, top: float | None = None) -> None:
    colours = iter(COLOURS)
    for (kind, who), points in _curves(bursts).items():
        xs, ys = [point.load for point in points], [getattr(point, name) for point in points]
        if kind == UNJUDGED:
            continue
        if kind == FIXED and who != contest.best_fixed:
            axes.plot(xs, ys, color="#bbbbbb", linewidth=1, zorder=1)
            continue
        label = f"fixed on {who}" if kind == FIXED else who
        width = 2.6 if who in ("cost", contest.best_fixed) else 1.4
        axes.plot(xs, ys, color=next(colours), linewidth=width, marker="o", markersize=4, label=label)
    axes.set_ylim(bottom=0, top=top)
    axes.legend(frameon=False, fontsize=9, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _draw_mix(axes: Any, bursts: Sequence[Point]) -> None:
    points = [point for point in bursts if point.kind == "policy" and len(point.modes) > 1]
    points.sort(key=lambda point: (point.contestant, point.load))
    modes = sorted({mode for point in points for mode in point.mix})
    lefts = [0.0] * len(points)
    for mode, colour in zip(modes, COLOURS, strict=False):
        widths = [point.mix.get(mode, 0.0) for point in points]
        axes.barh(range(len(points)), widths, left=lefts, color=colour, label=mode, height=0.8)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    axes.set_yticks(range(len(points)), [f"{point.contestant} {point.load:g}" for point in points], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.legend(frameon=False, fontsize=9, ncols=len(modes), loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _timelines(contest: Contest) -> Iterator[tuple[str, str, str]]:
    modes = sorted({mode for match in contest.timelines for bucket in match.mix for mode in bucket})
    for match in contest.timelines:
        yield (
            f"Over time: {match.contestant} (simulated)",
            f"Bursts at load {match.rate_per_s / contest.capacity_per_s:g}, seed {match.seed}: requests by arrival and "
            f"the mode that answered them; the line is how many were good (the first {WARM_UP_S:g} s are not judged).",
            _svg(lambda axes, match=match: _draw_time(axes, match, modes), "s", "requests/s", WIDE_IN),  # type: ignore[misc]
        )


def _draw_time(axes: Any, match: Match, modes: Sequence[str]) -> None:
    xs = [BUCKET_S * i for i in range(len(match.mix))]
    bottoms = [0.0] * len(xs)
    for mode, colour in zip(modes, COLOURS, strict=False):
        heights = [bucket.get(mode, 0) / BUCKET_S for bucket in match.mix]
        if any(heights):
            axes.bar(xs, heights, BUCKET_S * 0.9, bottom=bottoms, align="edge", color=colour, alpha=0.55, label=mode)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.step(xs, [good / BUCKET_S for good in match.goods], where="post", color="#111111", label="good")
    axes.set_xlim(0, xs[-1] + BUCKET_S)
    axes.legend(frameon=False, fontsize=9, ncols=len(modes) + 1)


def _verdicts(contest: Contest) -> str:
    rows = [
        f"<tr><td>{escape(v.name)}</td><td>{v.value:.2f}</td><td>{escape(v.op)} {v.bar:g}</td>"
        f"<td class='left{'' if v.holds else ' missed'}'>{'holds' if v.holds else 'missed'}</td>"
        f"<td class='left'>{escape(v.note)}</td></tr>"
        for v in contest.verdicts
    ]
    return _table("Bars (simulated)", ("", "value", "bar", "", "by load"), rows)


def _tables(contest: Contest) -> Iterator[str]:
    head = (
        "who", "modes", "slots", "load", "goodput/s", "good", "refused", "late TTFT", "late TPOT", "TTFT p50", "p99 ms",
        "TPOT p50", "p99 ms", "E2EL p50", "p99 ms", "J/token", "J/good token",
    )  # fmt: skip
    for shape in dict.fromkeys(point.shape for point in contest.points):
        points = [point for point in contest.points if point.shape == shape]
        points.sort(key=lambda point: (point.load, -point.goodput_per_s))
        rows = []
        for p in points:
            name = f"{'fixed on ' if p.kind != 'policy' else ''}{p.contestant}"
            if p.kind == UNJUDGED:
                name += " (quality ignored)"
            cells = (
                f"{'+'.join(p.modes)}", f"{p.slots}", f"{p.load:g}", f"{p.goodput_per_s:.2f}", f"{p.good_share:.0%}",
                f"{p.refused_share:.0%}", f"{p.late_ttft_share:.0%}", f"{p.late_tpot_share:.0%}",
                f"{p.ttft_ms[0]:,.0f}", f"{p.ttft_ms[1]:,.0f}", f"{p.tpot_ms[0]:.1f}", f"{p.tpot_ms[1]:.1f}",
                f"{p.e2el_ms[0]:,.0f}", f"{p.e2el_ms[1]:,.0f}", f"{p.joules_per_token:.2f}",
                f"{p.joules_per_good_token:.2f}" if p.goodput_per_s else "-",
            )  # fmt: skip
            rows.append(f"<tr><td>{escape(name)}</td>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
        yield _table(f"The whole curve: {shape} (simulated)", head, rows)


def _families(bursts: Sequence[Point]) -> str:
    """Who gains and who pays: a policy may reach its goodput by letting one kind of request wait."""
    points = [point for point in bursts if point.kind == "policy" or point.kind == FIXED]
    points.sort(key=lambda point: (point.load, -point.goodput_per_s))
    rows = [
        f"<tr><td>{escape(point.contestant)} at {point.load:g}</td>"
        + "".join(f"<td>{point.good_by_family[family.name]:.0%}</td>" for family in FAMILIES)
        + "</tr>"
        for point in points
    ]
    return _table("Share of good answers by family, bursts (simulated)", ("", *(f.name for f in FAMILIES)), rows)


def _table(heading: str, head: Sequence[str], rows: Sequence[str]) -> str:
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return (
        f'<h2>{escape(heading)}</h2><div class="wide"><table><thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )

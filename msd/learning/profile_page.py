"""A profile as one HTML page: figures as inline SVG, tables beside them, readable on a phone and without a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape
from io import StringIO
from typing import Any

from msd.learning.fitting import mean_error, tpot_at, ttft_at
from msd.profile import Measured, ModeProfile, Profile

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")
MARKERS = "os^Dvp*Xh<"
SIZE_IN = (6.4, 3.8)
NUM_POINTS = 60

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto; max-width: 72rem;
  padding: 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 1.5rem 0 .25rem; }
p { margin: .25rem 0 .5rem; max-width: 46rem; } .quiet { color: #555; font-size: .9rem; }
.label { background: #fff3cd; border: 1px solid #d9b84a; border-radius: .4rem; padding: .5rem .75rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem 2rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } code { font-size: .9em; overflow-wrap: anywhere; }
"""


def page(profile: Profile) -> str:
    """The whole page."""
    simulated = profile.source == "simulated"
    title = f"Modes on {profile.device}"
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">{escape(profile.engine_version)}, {escape(profile.created)}, '
        f"<code>{escape(profile.command)}</code></p>",
    ]
    if simulated:
        parts.append(
            '<p class="label"><strong>Simulated.</strong> The engines and the GPU follow a stated model; latencies, '
            "tokens and joules are not those of a machine.</p>"
        )
    parts.append('<div class="figures">')
    parts += [_section(*section) for section in _figures(profile)]
    parts.append("</div>")
    parts += [_lines_table(profile), _memory_table(profile), _cells_table(profile), "</body></html>\n"]
    return "\n".join(parts)


def _figures(profile: Profile) -> Iterator[tuple[str, str, str]]:
    """(heading, sentence, SVG) of each figure that the profile has data for."""
    modes = profile.modes
    if any(cell.batch_size == 1 for mode in modes for cell in mode.cells):
        yield (
            "TTFT by prompt",
            "Time to the first token of a request alone. Points: measured. Lines: what msd starts to predict with.",
            _svg(lambda axes: _draw_ttft(axes, modes), "prompt tokens to compute", "TTFT, ms"),
        )
    if any(cell.tpot_ms > 0 for mode in modes for cell in mode.cells):
        yield (
            "TPOT by batch",
            "Time per further token while the whole batch decodes, mean over the families.",
            _svg(lambda axes: _draw_tpot(axes, modes), "requests at once", "TPOT, ms"),
        )
        yield (
            "Throughput by batch",
            "Generated tokens a second over whole batches, prefill included: the best family of each size.",
            _svg(lambda axes: _draw_throughput(axes, modes), "requests at once", "tokens/s"),
        )
    if any(cell.mj_per_token is not None for mode in modes for cell in mode.cells):
        yield (
            "Energy by batch",
            "Energy per generated token, idle power included, mean over the families. Modes were measured one after "
            "another, not interleaved.",
            _svg(lambda axes: _draw_energy(axes, modes), "requests at once", "mJ per token"),
        )
    yield (
        "Start, sleep, wake",
        "Seconds until an engine takes requests, until it has left the GPU, and until it is back.",
        _svg(lambda axes: _draw_transitions(axes, modes), "seconds", ""),
    )


def _section(heading: str, sentence: str, svg: str) -> str:
    return f'<figure><h2>{escape(heading)}</h2><p class="quiet">{escape(sentence)}</p>{svg}</figure>'


def _svg(draw: Callable[[Any], None], x: str, y: str) -> str:
    """One figure. matplotlib's object interface: no window system, no global state."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "msd", "font.size": 11, "font.family": "sans-serif"}):
        figure = Figure(figsize=SIZE_IN, layout="constrained")
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


def _draw_ttft(axes: Any, modes: Sequence[ModeProfile]) -> None:
    for index, mode in enumerate(modes):
        alone = [cell for cell in mode.cells if cell.batch_size == 1]
        if not alone:
            continue
        news = [cell.num_prompt_tokens - cell.num_cached_tokens for cell in alone]
        axes.plot(news, [cell.ttft_ms for cell in alone], **_point(index))
        most = max(news)
        xs = [most * step / NUM_POINTS for step in range(NUM_POINTS + 1)]
        axes.plot(xs, [ttft_at(mode, round(x)) for x in xs], color=_colour(index), label=mode.mode)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _draw_tpot(axes: Any, modes: Sequence[ModeProfile]) -> None:
    _draw_by_batch(axes, modes, lambda cells: _mean([cell.tpot_ms for cell in cells if cell.tpot_ms > 0]))


def _draw_throughput(axes: Any, modes: Sequence[ModeProfile]) -> None:
    _draw_by_batch(axes, modes, lambda cells: max(cell.tokens_per_s for cell in cells))


def _draw_energy(axes: Any, modes: Sequence[ModeProfile]) -> None:
    _draw_by_batch(axes, modes, lambda cells: _mean([c.mj_per_token for c in cells if c.mj_per_token is not None]))


def _draw_by_batch(axes: Any, modes: Sequence[ModeProfile], of: Callable[[Sequence[Measured]], float | None]) -> None:
    sizes = sorted({cell.batch_size for mode in modes for cell in mode.cells})
    for index, mode in enumerate(modes):
        points = []
        for size in sizes:
            # Answers of one token have neither TPOT nor a throughput that says anything.
            cells = [cell for cell in mode.cells if cell.batch_size == size and cell.num_output_tokens > 1]
            value = of(cells) if cells else None
            if value is not None:
                points.append((size, value))
        if points:
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, **(_point(index) | {"linestyle": "-"}), label=mode.mode)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _draw_transitions(axes: Any, modes: Sequence[ModeProfile]) -> None:
    bars: tuple[tuple[str, Callable[[ModeProfile], float | None]], ...] = (
        ("start", lambda mode: mode.start_s),
        ("sleep", lambda mode: mode.sleep_s),
        ("wake", lambda mode: mode.wake_s),
    )
    bars = tuple(bar for bar in bars if any(bar[1](mode) is not None for mode in modes))
    height = 0.8 / len(bars)
    for row, (name, of) in enumerate(bars):
        found = [(index, value) for index, mode in enumerate(modes) if (value := of(mode)) is not None]
        ys = [index + (row - (len(bars) - 1) / 2) * height for index, _ in found]
        drawn = axes.barh(ys, [value for _, value in found], height, color=COLOURS[row], label=name)
        axes.bar_label(drawn, fmt="%.2f", padding=3, fontsize=9)
    axes.set_yticks(range(len(modes)), [mode.mode for mode in modes])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.legend(frameon=False)


def _point(index: int) -> dict[str, object]:
    return {
        "color": _colour(index),
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": "none",
        "markersize": 5,
        "alpha": 0.85,
    }


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _lines_table(profile: Profile) -> str:
    rows = []
    for mode in profile.modes:
        alone = [cell for cell in mode.cells if cell.batch_size == 1]
        decoding = [cell for cell in mode.cells if cell.tpot_ms > 0]
        a0, a1, a2 = mode.ttft_ms
        c0, c1, c2 = mode.tpot_ms
        ttft_error = _error(
            [ttft_at(mode, cell.num_prompt_tokens, cell.num_cached_tokens) for cell in alone],
            [cell.ttft_ms for cell in alone],
        )
        tpot_error = _error([tpot_at(mode, cell) for cell in decoding], [cell.tpot_ms for cell in decoding])
        rows.append(
            (mode.mode, f"{a0:.2f} + {a1:.4f} n" + (f" + {a2:.3f} nP/10^6" if a2 else ""), ttft_error,
             f"{c0:.2f} + {c1:.3f} b" + (f" + {c2:.6f} T" if c2 else ""), tpot_error, f"{mode.eos_step_ms:.2f}",
             _figure(mode.step_mj, 1), _figure(mode.prefill_mj_per_token, 2), _figure(mode.decode_mj_per_token, 2))
        )  # fmt: skip
    head = ("mode", "TTFT ms", "error", "TPOT ms", "error", "end ms", "mJ/step", "mJ/prompt token", "mJ/answer token")
    return (
        "<h2>What msd starts to predict with</h2><p class='quiet'>n: prompt tokens to compute, P: prompt tokens, b: "
        "other requests in the batch, T: their tokens. Error: mean relative error over the cells of the fit. "
        "Energy is above idle"
        + (f" ({profile.idle_w:.0f} W)" if profile.idle_w is not None else "; no counter measured it")
        + ".</p>" + _table(head, rows)
    )  # fmt: skip


def _memory_table(profile: Profile) -> str:
    rows = [
        (
            mode.mode,
            _figure(mode.gpu_bytes / 1e9 if mode.gpu_bytes else None, 2),
            _figure(mode.asleep_bytes / 1e9 if mode.sleep_s is not None else None, 2),
            f"{mode.start_s:.1f}",
            _figure(mode.sleep_s, 2),
            _figure(mode.wake_s, 2),
        )
        for mode in profile.modes
    ]
    head = ("mode", "GPU memory, GB", "asleep, GB", "start s", "sleep s", "wake s")
    note = "A dash: nothing measured it, or the engine cannot."
    return f"<h2>Memory and transitions</h2><p class='quiet'>{note}</p>{_table(head, rows)}"


def _cells_table(profile: Profile) -> str:
    rows = [
        (mode.mode, cell.family, f"{cell.num_prompt_tokens} / {cell.num_output_tokens}", str(cell.num_cached_tokens),
         str(cell.batch_size), str(cell.num_repeats), f"{cell.ttft_ms:.1f}", _figure(cell.tpot_ms or None, 2),
         f"{cell.e2el_ms:.0f}", f"{cell.tokens_per_s:.0f}", _figure(cell.mj_per_token, 0))
        for mode in profile.modes for cell in mode.cells
    ]  # fmt: skip
    head = ("mode", "family", "prompt / answer", "cached", "at once", "repeats", "TTFT ms", "TPOT ms", "E2EL ms",
            "tokens/s", "mJ/token")  # fmt: skip
    return f"<details><summary>All {len(rows)} cells</summary>{_table(head, rows)}</details>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _error(predicted: Sequence[float], measured: Sequence[float]) -> str:
    return f"{mean_error(predicted, measured):.1%}" if measured else "-"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None

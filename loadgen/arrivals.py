"""When requests come: exact, vectorised sampling of arrival times, without a time step.

Constant intensity, square waves and on/off sources are all piecewise constant in time, so their sum is too: merge the
breakpoints, cumulate to Lambda(t), draw N ~ Poisson(Lambda(T)), sort N uniforms on [0, Lambda(T)] and invert linearly.

A Poisson process split by independent marks gives independent Poisson processes. So each class draws its own points
from its share of the common intensity and from its own stream: the burst is shared, and a class that is added or
changed moves no row of another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import assert_never

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from loadgen.spec import ArrivalSpec, Constant, OnOff, OnOffSource, Poisson, Square

Streams = Callable[[str], np.random.Generator]
"""Gives the random stream of a named purpose."""

MICROSECONDS = 1_000_000


class Intensity(Struct, frozen=True):
    """A piecewise constant rate: `rates[i]` requests/s from `edges[i]` to `edges[i + 1]` seconds."""

    edges: NDArray[np.float64]
    rates: NDArray[np.float64]

    def sample(self, share: float, rng: np.random.Generator) -> NDArray[np.float64]:
        """Draw the arrival times (s, sorted) of a Poisson process with `share` of this intensity."""
        cumulated = np.concatenate(([0.0], np.cumsum(self.rates * np.diff(self.edges))))
        total = cumulated[-1]
        marks = np.sort(rng.random(rng.poisson(share * total))) * total
        # A stretch of rate 0 is flat in `cumulated`; np.interp puts a mark there with probability 0.
        times: NDArray[np.float64] = np.interp(marks, cumulated, self.edges)
        return times

    def peak_rps(self) -> float:
        """The highest rate."""
        return float(self.rates.max())


def sample(
    arrivals: ArrivalSpec, shares: Sequence[tuple[str, float]], duration_s: float, streams: Streams
) -> dict[str, NDArray[np.int64]]:
    """Draw the arrival times of each class, in us from the start: {class: sorted int64[n]}."""
    if isinstance(arrivals.process, Constant):
        return _constant(arrivals.rate_rps, shares, duration_s, streams)
    shape = intensity(arrivals, duration_s, streams)
    return {
        name: (shape.sample(share, streams(f"arrivals/class/{name}")) * MICROSECONDS).astype(np.int64)
        for name, share in shares
    }


def intensity(arrivals: ArrivalSpec, duration_s: float, streams: Streams) -> Intensity:
    """Return the rate over time that all classes share; for on/off sources, one draw of it."""
    match arrivals.process:
        case Constant() | Poisson():
            return Intensity(np.array([0.0, duration_s]), np.array([arrivals.rate_rps]))
        case Square() as square:
            return _square(square, arrivals.rate_rps, duration_s)
        case OnOff() as process:
            parts = [Intensity(np.array([0.0, duration_s]), np.array([process.base_rps(arrivals.rate_rps)]))]
            for index, source in enumerate(process.sources):
                parts.append(_on_off(source, arrivals.rate_rps, duration_s, streams(f"arrivals/source/{index}")))
            return superpose(parts)
        case _:
            assert_never(arrivals.process)


def superpose(parts: Sequence[Intensity]) -> Intensity:
    """Return the sum of intensities over the same time, with all their breakpoints."""
    edges = np.unique(np.concatenate([part.edges for part in parts]))
    rates = np.zeros(len(edges) - 1)
    for part in parts:
        rates += part.rates[np.searchsorted(part.edges, edges[:-1], side="right") - 1]
    return Intensity(edges, rates)


def _constant(
    rate_rps: float, shares: Sequence[tuple[str, float]], duration_s: float, streams: Streams
) -> dict[str, NDArray[np.int64]]:
    """Equal gaps over all classes together; which class a tick belongs to is drawn."""
    times = (np.arange(math.floor(duration_s * rate_rps)) / rate_rps * MICROSECONDS).astype(np.int64)
    bounds = np.cumsum([share for _, share in shares])
    bounds[-1] = 1.0
    owner = np.searchsorted(bounds, streams("arrivals/marks").random(len(times)), side="right")
    return {name: times[owner == index] for index, (name, _) in enumerate(shares)}


def _square(square: Square, rate_rps: float, duration_s: float) -> Intensity:
    mean = square.duty * square.high + (1.0 - square.duty) * square.low
    num_periods = math.ceil(duration_s / square.period_s)
    starts = np.arange(num_periods) * square.period_s
    edges = np.column_stack((starts, starts + square.duty * square.period_s)).ravel()
    rates = np.tile(np.array([square.high, square.low]) * (rate_rps / mean), num_periods)
    inside = edges < duration_s
    return Intensity(np.append(edges[inside], duration_s), rates[inside])


def _on_off(source: OnOffSource, rate_rps: float, duration_s: float, rng: np.random.Generator) -> Intensity:
    """One path of an alternating source; it starts in its stationary state, on with probability p."""
    on_mean_s, off_mean_s = source.tau_s / (1.0 - source.p), source.tau_s / source.p
    on_rps, _ = source.rates(rate_rps)
    on_first = bool(rng.random() < source.p)
    expected = 2.0 * duration_s / (on_mean_s + off_mean_s)
    batch = 2 * math.ceil((expected + 6.0 * math.sqrt(expected) + 10.0) / 2.0)
    means = np.tile([on_mean_s, off_mean_s] if on_first else [off_mean_s, on_mean_s], batch // 2)
    switches = np.zeros(0)
    while len(switches) == 0 or switches[-1] < duration_s:
        start = switches[-1] if len(switches) else 0.0
        # `batch` is even, so every batch begins in the same state.
        switches = np.concatenate((switches, start + np.cumsum(rng.standard_exponential(batch) * means)))
    inside = switches[switches < duration_s]
    edges = np.concatenate(([0.0], inside, [duration_s]))
    phase = np.arange(len(edges) - 1) % 2
    return Intensity(edges, np.where((phase == 0) == on_first, on_rps, 0.0))

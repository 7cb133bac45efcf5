"""What a set of resident modes is worth: V(S), the cost of serving the present traffic with it, per second.

    V(S) = sum over modes of v_lat * (requests in service + requests in queue) + v_joule * watts
         + what finds no mode in S * UNSERVED_S

By Little's law requests in service are the sum of rate x latency, so that the latency term is request-seconds a second
(modeswitch spec, section 7). A mode's batch follows from its own traffic:

    b = slow * (A + c0 * T) / (1 - slow * c1 * T)      A = sum of rate * TTFT, T = sum of rate * (output tokens - 1)

`slow` is what the other busy engines of the GPU cost. Beyond its slots, or beyond what its KV cache holds (starvation),
a mode's queue grows without bound; that costs OVERLOAD_S per request over. Classes go to the mode where they add least,
largest first; a set is worth what its best subset is, since the router may leave an engine idle. Where the rate
swings, V is the mean of V above and below: what a queue costs is not linear in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp, sqrt

from msgspec import Struct

from msd.core.demand import Class

UNSERVED_S = 60.0
OVERLOAD_S = 30.0
_BUSIEST = 0.97
_NOT_LEARNT = 0.5
"""Of what prefills cost others, the share that a learnt TPOT lacks: with all of it V was 10 % above that of the true
times (simulated, seeds 11-13), with none of it 7 % below."""
_CROWD = 1e9

Rated = tuple[float, float, int, tuple[float, ...], tuple[float, ...], float]
"""A class: requests a second, output tokens - 1, modes allowed, TTFT (s) and energy cost per mode, its tokens."""


class Curve(Struct, frozen=True):
    """One mode alone on the GPU, in seconds: TTFT = a0 + a1 * n + a2 * n^2, TPOT = c0 + c1 * b + c2 * tokens of b."""

    ttft_s: tuple[float, float, float]
    tpot_s: tuple[float, float, float]
    num_slots: int
    kv_capacity_tokens: int
    mj_per_token: float = 0.0
    """0: not known, and then of no weight."""
    is_learnt: bool = False
    """From requests of live traffic, so that TPOT holds much of the prefills of others already."""


class Worth:
    """V of any set of modes, for one mix of traffic. Made anew for each plan."""

    def __init__(
        self,
        curves: Sequence[Curve | None],
        classes: Sequence[Class],
        slowdown: Callable[[float], float],
        *,
        fast: bool,
        latency_weight: float,
        energy_weight: float,
        waiting: Sequence[int] = (),
        swing: float = 0.0,
    ) -> None:
        """`curves[i]` None: nothing is known of mode i. `slowdown(busy others)`: the factor that they cost.

        `waiting`: requests of each class that wait for a mode which is not there. `swing`: how far the rates go above
        and below their means, as a share.
        """
        self._curves = curves
        self._slowdown = slowdown
        self._latency_weight = latency_weight
        known = [curve.mj_per_token for curve in curves if curve is not None and curve.mj_per_token > 0]
        mean_mj = sum(known) / len(known) if known else 0.0
        joules = [
            energy_weight * 1e-6 * (mean_mj if curve is None or curve.mj_per_token <= 0 else curve.mj_per_token)
            for curve in curves
        ]
        self._classes: list[Rated] = []
        self._waiting: list[int] = []
        # Flat floats: this is looped over for each set, class and mode.
        self._tpot = [(0.0, 0.0, 0.0) if curve is None else curve.tpot_s for curve in curves]
        self._first = [0.0 if curve is None else curve.ttft_s[0] for curve in curves]
        self._known = [i for i, curve in enumerate(curves) if curve is not None]
        self._bits = [1 << i for i in self._known]
        for i, traffic in enumerate(classes):
            rate = traffic.fast_per_s if fast else traffic.slow_per_s
            num_waiting = waiting[i] if i < len(waiting) else 0
            if rate <= 0 and not num_waiting:
                continue
            n = traffic.num_prompt_tokens
            tokens = n + traffic.num_output_tokens
            ttft = tuple(0.0 if c is None else c.ttft_s[0] + c.ttft_s[1] * n + c.ttft_s[2] * n * n for c in curves)
            self._classes.append(
                (
                    rate,
                    max(0.0, traffic.num_output_tokens - 1.0),
                    traffic.eligible,
                    ttft,
                    tuple(rate * tokens * joule for joule in joules),
                    tokens,
                )
            )
            self._waiting.append(num_waiting)
        self._points = [self._classes]
        if swing:
            self._points = [_scaled(self._classes, 1.0 + swing), _scaled(self._classes, 1.0 - swing)]
        self._memo: dict[int, float] = {}

    @property
    def is_idle(self) -> bool:
        """Whether there is no traffic to plan for."""
        return not self._classes

    def unserved_per_s(self, modes: int) -> float:
        """Requests a second that none of these modes may serve."""
        return sum(rated[0] for rated in self._classes if not rated[2] & modes)

    def starving(self, modes: int) -> int:
        """Requests that wait and, with these modes, would go on waiting."""
        return sum(num for rated, num in zip(self._classes, self._waiting, strict=True) if num and not rated[2] & modes)

    def served_of(self, modes: int) -> float:
        """V without what finds no mode."""
        unserved = 0.0
        for rated, num_waiting in zip(self._classes, self._waiting, strict=True):
            if not rated[2] & modes:
                unserved += rated[0] * UNSERVED_S + num_waiting
        return self.of(modes) - self._latency_weight * unserved

    def of(self, modes: int) -> float:
        """V when exactly these modes (a bit set) share the traffic."""
        known = self._memo.get(modes)
        if known is None:
            points = self._points
            known = self._memo[modes] = sum(self._evaluate(modes, point) for point in points) / len(points)
        return known

    def least_of(self, modes: int) -> float:
        """V when the traffic may leave some of these modes idle: they are dropped one by one while that costs less."""
        least = self.of(modes)
        while True:
            parts = [modes ^ bit for bit in self._bits if modes & bit and modes != bit]
            part = min(parts, key=self.of, default=0)
            if not part or self.of(part) >= least:
                return least
            modes, least = part, self.of(part)

    def _evaluate(self, modes: int, classes: list[Rated]) -> float:
        curves = self._curves
        members = [(i, 1 << i, *self._tpot[i]) for i in self._known if modes >> i & 1]
        weight = self._latency_weight
        ready = [0.0] * len(curves)  # A
        reading = [0.0] * len(curves)  # of A, what grows with the prompt: the rest is a step that others share
        steps = [0.0] * len(curves)  # T
        batch = [0.0] * len(curves)
        rates = [0.0] * len(curves)
        tokens_in = [0.0] * len(curves)
        total = 0.0
        for (rate, length, eligible, ttft, energy, tokens), num_waiting in zip(classes, self._waiting, strict=True):
            best, least, best_batch = -1, 0.0, 0.0
            more = rate * length
            for i, bit, c0, c1, c2 in members:
                if not eligible & bit:
                    continue
                t = steps[i] + more
                left = 1.0 - (c1 + c2 * tokens) * t
                b = (ready[i] + rate * ttft[i] + c0 * t) / left if left > 0.02 else _CROWD
                cost = weight * (b - batch[i]) + energy[i]
                if best < 0 or cost < least:
                    best, least, best_batch = i, cost, b
            if best < 0:  # also when its only modes are unknown: they are no mode yet
                total += weight * (rate * UNSERVED_S + num_waiting)
                continue
            ready[best] += rate * ttft[best]
            reading[best] += rate * (ttft[best] - self._first[best])
            steps[best] += more
            rates[best] += rate
            tokens_in[best] += rate * tokens
            batch[best] = best_batch
            total += energy[best]
        used = [member[0] for member in members if rates[member[0]] > 0.0]
        busy = [1.0 - exp(-batch[i]) if batch[i] < 50.0 else 1.0 for i in used]
        num_busy = sum(busy)
        if len(used) > 1:
            # Company makes each busier than it would be alone. Without this two engines that share the GPU looked 9 %
            # faster than they are in simulation; with it, 0.4 %.
            crowded = []
            for i, share in zip(used, busy, strict=True):
                c0, c1, c2 = self._tpot[i]
                slow = self._slowdown(num_busy - share)
                left = 1.0 - slow * (c1 + c2 * tokens_in[i] / rates[i]) * steps[i]
                b = slow * (ready[i] + c0 * steps[i]) / left if left > 0.02 else _CROWD
                crowded.append(1.0 - exp(-b) if b < 50.0 else 1.0)
            busy = crowded
            num_busy = sum(busy)
        for i, share in zip(used, busy, strict=True):
            curve = curves[i]
            assert curve is not None
            slow = self._slowdown(num_busy - share)
            total += weight * _crowd(curve, slow, ready[i], reading[i], steps[i], rates[i], tokens_in[i] / rates[i])
        return total


def _scaled(classes: list[Rated], factor: float) -> list[Rated]:
    """The same traffic at another rate."""
    return [
        (rate * factor, length, eligible, ttft, tuple(cost * factor for cost in energy), tokens)
        for rate, length, eligible, ttft, energy, tokens in classes
    ]


def _crowd(curve: Curve, slow: float, ready: float, reading: float, steps: float, rate: float, tokens: float) -> float:
    """Requests in service and in queue at one mode; what is beyond its capacity counts OVERLOAD_S each."""
    c0, c1, c2 = curve.tpot_s
    # Prefills of others hold up the decoding: they take their share of the engine's time. Of a mode's TTFT only what
    # grows with the prompt does so; the rest is a step that decodes for all.
    prefill = min(0.8, slow * (_NOT_LEARNT * reading if curve.is_learnt else reading))
    c0, c1 = slow * c0 / (1.0 - prefill), slow * (c1 + c2 * tokens) / (1.0 - prefill)
    ready *= slow
    slots = min(float(curve.num_slots), curve.kv_capacity_tokens / max(1.0, tokens))
    slots = max(1.0, slots)
    left = 1.0 - c1 * steps
    b = (ready + c0 * steps) / left if left > 1e-3 else _CROWD
    most = ready + (c0 + c1 * slots) * steps
    load = most / slots
    in_service = b if b < slots else slots
    if load >= _BUSIEST:
        over = rate * (1.0 - _BUSIEST / load) * OVERLOAD_S
        load = _BUSIEST
    else:
        over = 0.0
    # Sakasegawa's approximation of the queue of M/M/c.
    queued: float = load ** sqrt(2.0 * (slots + 1.0)) / (1.0 - load)
    return in_service + over + queued

"""TTFT and TPOT per mode, learnt from what was measured.

    TTFT [ms] = a0 + a1 * (prompt tokens not cached) / 1000        TPOT [ms] = c0 + c1 * (other requests running)

Each line is fitted by recursive least squares with forgetting (lambda 0.995) on rows divided by the prediction, so that
the error is relative (modeswitch spec, section 6); so P is in squares of the prediction, or an engine that needs 500 ms
would hold on to its prior for hundreds of requests. The first prior is the engine's own warm-up. Guards: P is capped,
one observation moves a prediction by at most a factor, coefficients stay non-negative.
"""

from __future__ import annotations

from msd.domain import EngineInfo

_LAMBDA = 0.995
_FORGET = 1.0 / _LAMBDA
_SPREAD = 100.0
"""P of a prior, and at most, relative to the square of the prediction: a prior counts a hundredth of an observation."""
_FACTOR_MAX = 4.0
_FLOOR_MS = 0.01
_ENERGY_ALPHA = 0.05


class Line:
    """y = a + b * x by recursive least squares in scalars; x is scaled to O(1) by the caller."""

    __slots__ = ("a", "b", "n", "p00", "p01", "p11")

    def __init__(self, a: float, b: float) -> None:
        self.a = a
        self.b = b
        self.n = 0
        self.p00 = self.p11 = _SPREAD * max(a, _FLOOR_MS) ** 2
        self.p01 = 0.0

    def at(self, x: float) -> float:
        y = self.a + self.b * x
        return y if y > _FLOOR_MS else _FLOOR_MS

    def learn(self, x: float, y: float) -> None:
        a, b, p00, p01, p11 = self.a, self.b, self.p00, self.p01, self.p11
        predicted = a + b * x
        if predicted < _FLOOR_MS:
            predicted = _FLOOR_MS
        # Before the first observation the prior is only a guess; afterwards one outlier must not tear the line away.
        if self.n:
            if y > predicted * _FACTOR_MAX:
                y = predicted * _FACTOR_MAX
            elif y < predicted / _FACTOR_MAX:
                y = predicted / _FACTOR_MAX
        h0 = 1.0 / predicted
        h1 = x * h0
        g0 = p00 * h0 + p01 * h1
        g1 = p01 * h0 + p11 * h1
        inverse = 1.0 / (_LAMBDA + h0 * g0 + h1 * g1)
        k0, k1 = g0 * inverse, g1 * inverse
        error = (y - a - b * x) * h0
        a += k0 * error
        b += k1 * error
        self.a = a if a > 0.0 else 0.0
        self.b = b if b > 0.0 else 0.0
        most = _SPREAD * predicted * predicted
        p00 = (p00 - k0 * g0) * _FORGET
        p01 = (p01 - k0 * g1) * _FORGET
        p11 = (p11 - k1 * g1) * _FORGET
        p00 = p00 if p00 < most else most
        p11 = p11 if p11 < most else most
        self.p00, self.p11 = p00, p11
        self.p01 = p01 if p01 * p01 <= p00 * p11 else 0.0
        self.n += 1


class ModeEstimate:
    """What the core expects of one mode. Predictions in ms and mJ; energy is None until some was measured."""

    __slots__ = ("mj_per_token", "service_ms", "tpot", "ttft")

    def __init__(self) -> None:
        self.ttft = Line(1.0, 0.0)
        self.tpot = Line(1.0, 0.0)
        self.mj_per_token: float | None = None
        """Energy over the tokens computed and generated; None until a request was settled."""
        self.service_ms = 0.0

    def seed(self, info: EngineInfo) -> None:
        """Take the engine's warm-up as the prior, unless requests have taught better already."""
        if self.ttft.n == 0 and info.idle_ttft_ms > 0:
            self.ttft = Line(info.idle_ttft_ms, 0.0)
        if self.tpot.n == 0 and info.idle_tpot_ms > 0:
            self.tpot = Line(info.idle_tpot_ms, 0.0)

    def ttft_ms(self, num_new_tokens: int) -> float:
        """Time from dispatch to the first token for a prompt with this many tokens to compute."""
        return self.ttft.at(num_new_tokens * 0.001)

    def tpot_ms(self, num_running: int) -> float:
        """Time per further token beside this many other requests."""
        return self.tpot.at(float(num_running))

    def wait_ms(self, num_ahead: int, num_slots: int) -> float:
        """Expected wait for a slot when `num_ahead` requests are served before, on `num_slots` slots."""
        return self.service_ms * num_ahead / max(1, num_slots)

    def learn_times(
        self, num_new_tokens: int, ttft_ms: float, tpot_ms: float, num_running: int, service_ms: float
    ) -> None:
        """A finished attempt: times from its dispatch; `tpot_ms` 0 when it had a single token."""
        self.ttft.learn(num_new_tokens * 0.001, ttft_ms)
        if tpot_ms > 0:
            self.tpot.learn(float(num_running), tpot_ms)
        self.service_ms = service_ms if not self.service_ms else 0.95 * self.service_ms + 0.05 * service_ms

    def learn_energy(self, energy_mj: int, num_tokens: int) -> None:
        """A settled request: its energy over the tokens that it computed and generated."""
        rate = energy_mj / max(1, num_tokens)
        old = self.mj_per_token
        self.mj_per_token = rate if old is None else old + _ENERGY_ALPHA * (rate - old)

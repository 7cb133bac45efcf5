"""TTFT, TPOT and energy per mode, learnt from what was measured (modeswitch spec, section 6).

    TTFT [ms] = slow * (offset + a0 + a1 * (n + ahead) / 1000 + a2 * n * P / 1e6)
    TPOT [ms] = slow * (c0 + c1 * b + c2 * T / 10000)

P prompt tokens, n those of them that are not cached, `ahead` prompt tokens of others that the engine still has to read,
b other running requests, T their tokens, `slow` what other busy engines of the same GPU cost (`Sharing`). The offset is
the step under way on a busy engine. Each line is fitted by recursive least squares (`Fit`); what lines cannot say is
corrected per cell of prompt size and batch (`Corrections`).
"""

from __future__ import annotations

from math import exp, inf, log

from msd.core.energy_domain import Coefficients
from msd.domain import EngineInfo
from msd.profile import ModeProfile

_LAMBDA = 0.995
_FORGET = 1.0 / _LAMBDA
_SPREAD = 100.0
"""P of a prior, and at most, relative to the square of the prediction: a prior counts a hundredth of an observation."""
_PROFILE_SPREAD = 0.25**2
"""P of a profile's coefficients, relative to their squares: they were measured, elsewhere or another day."""
_FACTOR_MAX = 4.0
_LEAST_SPREAD, _NEAR_ZERO = 0.1, 0.01
"""Of the size of a profile's prediction: what no coefficient is known better than, and what a fit's zero looks like."""
FLOOR_MS = 0.01
_MAD_FIRST, _MAD_LEAST, _MAD_STEP = 0.3, 0.04, 0.05
_MADS = 5.0
_JUDGED_FROM = 8
_IN_A_ROW = 4
"""So many outliers one after another are no outliers: the engine has changed."""
_LOOSER = 20.0
"""P grows by this then: at lambda 0.995 the old engine would be believed for 200 more requests."""
_FROZEN = 3
"""Requests after a start that teach no times: graphs and caches warm up."""
_SETTLED = 50
_LEARN_EVERY_US = 25_000
"""A mode that has seen so many learns times at most so often: learning is a fifth of what a request costs the core."""
_ENERGY_ALPHA = 0.05
_SHARING_ALPHA = 0.05
_SHARERS_MOST = 16
_ALONE = 0.05
"""Less company than this on average teaches nothing about company."""
_CELL_ALPHA = 0.06
_CELL_SHRINK = 8.0
_CELL_MOST = log(3.0)
PROMPT_CELLS, _BATCH_CELLS = 5, 4
_NOT_NEGATIVE = ((0.0, inf),) * 3


class Fit:
    """y = a + b * x1 + c * x2 by recursive least squares in scalars; x1 and x2 are scaled to O(1) by the caller.

    Rows are divided by what is predicted or measured, so that the error is relative; so P is in squares of that, or an
    engine that needs 500 ms would hold on to its prior for hundreds of requests.
    """

    __slots__ = (
        "_bounds", "_mad", "_streak", "a", "b", "c", "n", "num_outliers", "p00", "p01", "p02", "p11", "p12", "p22",
    )  # fmt: skip

    def __init__(self, a: float, b: float = 0.0, c: float = 0.0, *, trusted: bool = False) -> None:
        """`trusted`: the coefficients were measured, and none may leave [1/4, 4] of what it was.

        A coefficient of (nearly) 0 is what a fit without negative ones says of what it could not tell apart: it may
        grow to 4 times the whole prediction.
        """
        self.a, self.b, self.c = a, b, c
        self.n = 0
        """Observations taken."""
        self.num_outliers = 0
        self._mad = _MAD_FIRST
        self._streak = 0
        self._bounds: tuple[tuple[float, float], ...] | None = None
        p = _SPREAD * max(a, FLOOR_MS) ** 2
        self.p00, self.p11, self.p22 = p, p, p
        if trusted:
            size = max(a + b + c, FLOOR_MS)
            reach = [x if x > _NEAR_ZERO * size else size for x in (a, b, c)]
            self.p00, self.p11, self.p22 = (_PROFILE_SPREAD * max(x, _LEAST_SPREAD * size) ** 2 for x in reach)
            self._bounds = tuple((x / _FACTOR_MAX, far * _FACTOR_MAX) for x, far in zip((a, b, c), reach, strict=True))
        self.p01 = self.p02 = self.p12 = 0.0

    @property
    def is_trusted(self) -> bool:
        """Whether it began with measured coefficients."""
        return self._bounds is not None

    def at(self, x1: float, x2: float = 0.0) -> float:
        y = self.a + self.b * x1 + self.c * x2
        return y if y > FLOOR_MS else FLOOR_MS

    def learn(self, x1: float, x2: float, y: float, weight: float = 1.0) -> None:
        a, b, c = self.a, self.b, self.c
        predicted = a + b * x1 + c * x2
        if predicted < FLOOR_MS:
            predicted = FLOOR_MS
        if self.n >= _JUDGED_FROM and self._is_outlier((y - predicted) / predicted):
            return
        # Before the first observation the prior may be a mere guess; later one outlier must not tear the line away.
        if self.n:
            if y > predicted * _FACTOR_MAX:
                y = predicted * _FACTOR_MAX
            elif y < predicted / _FACTOR_MAX:
                y = predicted / _FACTOR_MAX
        elif self._bounds is None and y > predicted:
            self.p00 = self.p11 = self.p22 = _SPREAD * y * y
        p00, p01, p02, p11, p12, p22 = self.p00, self.p01, self.p02, self.p11, self.p12, self.p22
        # Not by the prediction alone: a prior far too low would make of the first rows certainties, for 500 more.
        scale = y if y > predicted else predicted
        h0 = 1.0 / scale
        h1 = x1 * h0
        h2 = x2 * h0
        g0 = p00 * h0 + p01 * h1 + p02 * h2
        g1 = p01 * h0 + p11 * h1 + p12 * h2
        g2 = p02 * h0 + p12 * h1 + p22 * h2
        inverse = weight / (_LAMBDA + weight * (h0 * g0 + h1 * g1 + h2 * g2))
        k0, k1, k2 = g0 * inverse, g1 * inverse, g2 * inverse
        error = (y - predicted) * h0
        a += k0 * error
        b += k1 * error
        c += k2 * error
        p00 = (p00 - k0 * g0) * _FORGET
        p11 = (p11 - k1 * g1) * _FORGET
        p22 = (p22 - k2 * g2) * _FORGET
        most = _SPREAD * scale * scale
        if p00 > most or p11 > most or p22 > most:
            # What is never excited is forgotten more and more: bounded, and what it was tied to with it.
            self.p00 = p00 if p00 < most else most
            self.p11 = p11 if p11 < most else most
            self.p22 = p22 if p22 < most else most
            self.p01 = self.p02 = self.p12 = 0.0
        else:
            self.p00, self.p11, self.p22 = p00, p11, p22
            self.p01 = (p01 - k0 * g1) * _FORGET
            self.p02 = (p02 - k0 * g2) * _FORGET
            self.p12 = (p12 - k1 * g2) * _FORGET
        self.a, self.b, self.c = a, b, c
        self.n += 1
        if self._bounds or a < 0.0 or b < 0.0 or c < 0.0:
            self._project()

    def _project(self) -> None:
        """Bring each coefficient into its bounds, and move the others with it as P says they belong together.

        Clipping alone runs away: the others go on answering for what the clipped one is not let to take.
        """
        (a0, a1), (b0, b1), (c0, c1) = self._bounds or _NOT_NEGATIVE
        if not a0 <= self.a <= a1:
            off = ((a0 if self.a < a0 else a1) - self.a) / self.p00
            self.a += off * self.p00
            self.b += off * self.p01
            self.c += off * self.p02
        if not b0 <= self.b <= b1:
            off = ((b0 if self.b < b0 else b1) - self.b) / self.p11
            self.a += off * self.p01
            self.b += off * self.p11
            self.c += off * self.p12
        if not c0 <= self.c <= c1:
            off = ((c0 if self.c < c0 else c1) - self.c) / self.p22
            self.a += off * self.p02
            self.b += off * self.p12
            self.c += off * self.p22
        self.a = min(max(self.a, a0), a1)
        self.b = min(max(self.b, b0), b1)
        self.c = min(max(self.c, c0), c1)

    def _loosen(self) -> None:
        """Believe the past less: what is known of the relations between the coefficients stays."""
        self.p00, self.p01, self.p02 = self.p00 * _LOOSER, self.p01 * _LOOSER, self.p02 * _LOOSER
        self.p11, self.p12, self.p22 = self.p11 * _LOOSER, self.p12 * _LOOSER, self.p22 * _LOOSER

    def _is_outlier(self, error: float) -> bool:
        """More than 5 median absolute deviations off; the median is tracked by steps up and down."""
        size = error if error >= 0.0 else -error
        mad = self._mad
        is_far = size > _MADS * mad
        mad += mad * (_MAD_STEP if size > mad else -_MAD_STEP)
        self._mad = mad if mad > _MAD_LEAST else _MAD_LEAST
        if not is_far:
            self._streak = 0
            return False
        self._streak += 1
        if self._streak >= _IN_A_ROW:
            if self._streak % _IN_A_ROW == 0:
                self._loosen()
            return False
        self.num_outliers += 1
        return True


class Corrections:
    """What is left over, as factors per cell: 5 sizes of prompt (log2) by 4 of the batch (log2); 1 until seen.

    A cell keeps the EWMA of the log of measured over predicted, shrunk by n / (n + 8). `rows[batch][prompt]`.
    """

    __slots__ = ("_logs", "_nums", "rows")

    def __init__(self) -> None:
        self.rows = [[1.0] * PROMPT_CELLS for _ in range(_BATCH_CELLS)]
        self._logs = [[0.0] * PROMPT_CELLS for _ in range(_BATCH_CELLS)]
        self._nums = [[0.0] * PROMPT_CELLS for _ in range(_BATCH_CELLS)]

    def learn(self, batch: int, prompt: int, ratio: float, weight: float = 1.0) -> None:
        """`ratio`: measured over predicted without this correction."""
        nums, logs = self._nums[batch], self._logs[batch]
        n = nums[prompt] = nums[prompt] + weight
        alpha = 1.0 / n if n * _CELL_ALPHA < 1.0 else _CELL_ALPHA
        step = log(ratio) if ratio > 1e-3 else -_CELL_MOST
        step = _CELL_MOST if step > _CELL_MOST else -_CELL_MOST if step < -_CELL_MOST else step
        logs[prompt] += alpha * weight * (step - logs[prompt])
        self.rows[batch][prompt] = exp(logs[prompt] * n / (n + _CELL_SHRINK))


def prompt_cell(num_prompt_tokens: int) -> int:
    """Cell of a prompt's size: below 32, 128, 512, 2048, and the rest."""
    cell = (num_prompt_tokens.bit_length() - 4) >> 1
    return 0 if cell < 0 else cell if cell < PROMPT_CELLS else PROMPT_CELLS - 1


def batch_cell(num_running: int) -> int:
    """Cell of a batch: nobody else, up to 3 others, up to 15, more."""
    cell = (num_running.bit_length() + 1) >> 1
    return cell if cell < _BATCH_CELLS else _BATCH_CELLS - 1


class Sharing:
    """How much slower engines of one GPU work while others are busy: a factor per number of busy others, learnt.

    Between whole numbers it is interpolated, since an average over a request's life lies there. `factors[0]` is 1.
    """

    __slots__ = ("_between", "_most", "_nums", "factors")

    def __init__(self) -> None:
        self._between: dict[int, tuple[float, float, float, float]] = {}
        self.factors = [1.0] * (_SHARERS_MOST + 1)
        self._nums = [0.0] * (_SHARERS_MOST + 1)
        self._most = 0
        """So many others were seen; more are taken to be no better."""

    def at(self, num_others: float) -> float:
        """The factor beside this many busy engines."""
        if num_others <= 0.0:
            return 1.0
        if num_others >= self._most:
            return self.factors[self._most]
        low = int(num_others)
        return self.factors[low] + (num_others - low) * (self.factors[low + 1] - self.factors[low])

    def between(self, num_busy: int) -> tuple[float, float, float, float]:
        """With so many busy engines: the factor of one more and of one of them, and the shares of speed that are lost.

        Lost: by those that are busy if one more engine is, and by the others while one of them stays busy.
        """
        known = self._between.get(num_busy)
        if known is None:
            more, now, fewer = self.at(num_busy), self.at(num_busy - 1), self.at(num_busy - 2)
            known = self._between[num_busy] = more, now, 1.0 - now / more, 1.0 - fewer / now
        return known

    def learn(self, num_others: float, ratio: float, weight: float = 1.0) -> None:
        """`ratio`: measured over what the mode alone would take."""
        if num_others < _ALONE:
            return
        self._between.clear()
        low = int(num_others)
        part = num_others - low
        if low >= _SHARERS_MOST:
            low, part = _SHARERS_MOST - 1, 1.0
        error = (ratio if ratio < _FACTOR_MAX else _FACTOR_MAX) - self.at(num_others)
        if low:
            self._move(low, 1.0 - part, weight, error)
        self._move(low + 1, part, weight, error)

    def _move(self, i: int, part: float, weight: float, error: float) -> None:
        factors = self.factors
        if i > self._most:
            if part < 0.5:
                return
            self._most = i
            factors[i] = factors[i - 1]
        weight *= part
        if not weight:
            return
        num = self._nums[i] = self._nums[i] + weight
        gain = 0.5 / num
        factor = factors[i] + weight * (gain if gain > _SHARING_ALPHA else _SHARING_ALPHA) * error
        factors[i] = 1.0 if factor < 1.0 else factor


class ModeEstimate:
    """What the core expects of one mode. Predictions in ms and mJ; energy is None until some was measured."""

    __slots__ = (
        "costs", "due_us", "energy_cells", "eos_step_ms", "mj_per_token", "num_frozen", "service_ms", "tpot",
        "tpot_cells", "ttft", "ttft_cells",
    )  # fmt: skip

    def __init__(self) -> None:
        self.ttft = Fit(1.0)
        self.tpot = Fit(1.0)
        self.eos_step_ms = 0.0
        """An uncounted last step of answers that end by themselves."""
        self.ttft_cells = Corrections()
        self.tpot_cells = Corrections()
        self.energy_cells = Corrections()
        self.costs: Coefficients | None = None
        """Energy of steps, prompt and output, fitted by the ledger's readings or profiled."""
        self.mj_per_token: float | None = None
        """Until then: dynamic energy over the tokens computed and generated; None until a request was settled."""
        self.service_ms = 0.0
        self.num_frozen = 0
        self.due_us = 0

    def seed(self, info: EngineInfo) -> None:
        """The engine came up. Its warm-up is the prior, unless a profile or requests have taught better already."""
        self.num_frozen = _FROZEN
        if self.ttft.n == 0 and info.idle_ttft_ms > 0 and not self.ttft.is_trusted:
            self.ttft = Fit(info.idle_ttft_ms)
        if self.tpot.n == 0 and info.idle_tpot_ms > 0 and not self.tpot.is_trusted:
            self.tpot = Fit(info.idle_tpot_ms)

    def seed_profile(self, profile: ModeProfile) -> None:
        """Take what `msd profile` measured on this host."""
        a0, a1, a2 = profile.ttft_ms
        c0, c1, c2 = profile.tpot_ms
        self.ttft = Fit(a0, a1 * 1e3, a2, trusted=True)
        if c0 > 0.0:
            self.tpot = Fit(c0, c1, c2 * 1e4, trusted=True)
        self.eos_step_ms = profile.eos_step_ms
        step, prefill, decode = profile.step_mj, profile.prefill_mj_per_token, profile.decode_mj_per_token
        if step is not None and prefill is not None and decode is not None:
            self.costs = Coefficients(step, prefill, decode)

    def ttft_ms(self, num_new_tokens: int) -> float:
        """Time from dispatch to the first token, alone, for a prompt with this many tokens to compute."""
        return self.ttft.at(num_new_tokens * 0.001, num_new_tokens * num_new_tokens * 1e-6)

    def tpot_ms(self, num_running: float, num_tokens: float = 0.0) -> float:
        """Time per further token beside this many other requests with this many tokens, nothing else on the GPU."""
        return self.tpot.at(num_running, num_tokens * 1e-4)

    def offset_ms(self, num_running: int, num_tokens: int) -> float:
        """What a busy engine adds to TTFT: half of the step under way, and the others' decoding in its own step."""
        if not num_running:
            return 0.0
        step_ms = self.tpot_ms(num_running, num_tokens)
        return 1.5 * step_ms - self.tpot.at(0.0)

    def wait_ms(self, num_ahead: int, num_slots: int) -> float:
        """Expected wait for a slot when `num_ahead` requests are served before, on `num_slots` slots."""
        return self.service_ms * num_ahead / max(1, num_slots)

    def is_due(self, t_us: int) -> bool:
        """Whether an attempt that ended now teaches times: not right after a start, nor more often than needed."""
        if self.num_frozen:
            self.num_frozen -= 1
            return False
        if t_us < self.due_us and self.ttft.n >= _SETTLED:
            return False
        self.due_us = t_us + _LEARN_EVERY_US
        return True

    def learn_service(self, service_ms: float) -> None:
        """How long an attempt held its slot."""
        self.service_ms = service_ms if not self.service_ms else 0.95 * self.service_ms + 0.05 * service_ms

    def learn_energy(self, energy_mj: int, num_tokens: int) -> None:
        """A settled request: its energy over the tokens that it computed and generated."""
        rate = energy_mj / max(1, num_tokens)
        old = self.mj_per_token
        self.mj_per_token = rate if old is None else old + _ENERGY_ALPHA * (rate - old)

"""One physical energy counter, split exactly: intervals between its changes, shares of what ran in them."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Mapping

from msgspec import Struct, field

from msd.core.apportion import apportion
from msd.core.idle_power import SETTLING_US, IdlePower
from msd.domain import CounterReading

WEIGHT_SCALE = 1 << 20
NANOJOULES_PER_MJ = 1_000_000
LATE_US = 5_000_000
"""An interval waits this long for the reports of what ran in it; then it is split by what is known."""
MAX_OPEN_INTERVALS = 256
SETTLE_AT_ONCE = 4
"""Intervals split per reading, so that a burst of late reports does not stall the core."""
MAX_KNOTS = 256
OWNER_POWER_W = 60.0
"""What loading or warming an engine is taken to draw above idle, beside requests that run meanwhile."""
FOREIGN_MARGIN_MW = 15_000


class Coefficients(Struct, frozen=True):
    """Energy of one engine step: fixed part, per prompt token computed, per decode position (mJ).

    The defaults only say how the parts of one mode relate; `learning/energy_model.py` will fit them per mode.
    """

    step_mj: float = 2_000.0
    prefill_mj_per_token: float = 10.0
    decode_mj_per_token: float = 95.0


class Run(Struct, eq=False):
    """One attempt of a request, or an owner's work: when it was active and how far it had come, as reported.

    `times` and `tokens` are knots of a piecewise linear progress: 0 at the start, 1 at the first token (which the
    prefill produces), then the tokens generated. Work is spread over the time it took, not booked where it arrived.
    """

    request_id: str
    mode: str
    start_us: int
    prefill_tokens: int
    is_owner: bool
    times: list[int]
    tokens: list[int]
    reported_us: int
    end_us: int | None = None
    account: str = ""
    reason: str = ""
    tenant: str = ""
    serial: int = 0
    num_unsettled: int = 0
    settled: list[tuple[Domain, int, int, int]] = field(default_factory=list)
    """(domain, dynamic mJ, static mJ, part of both that was estimated), one per domain."""

    def report(self, t_us: int, num_tokens: int) -> None:
        """The engine was looked at: so many tokens so far."""
        self.reported_us = t_us
        if num_tokens > 0:
            times, tokens = self.times, self.tokens
            if t_us <= times[-1]:
                tokens[-1] = max(tokens[-1], num_tokens)
                return
            times.append(t_us)
            tokens.append(max(tokens[-1], num_tokens))
            if len(times) > MAX_KNOTS:  # coarser, but still the same work in all
                del times[1:-1:2], tokens[1:-1:2]

    def position(self, t_us: int) -> float:
        """Progress at `t_us`, interpolated; flat after the last report."""
        times = self.times
        if t_us >= times[-1]:
            return self.tokens[-1]
        i = bisect_left(times, t_us)
        if i == 0:
            return self.tokens[0]
        before, tokens = times[i - 1], self.tokens
        return tokens[i - 1] + (tokens[i] - tokens[i - 1]) * (t_us - before) / (times[i] - before)


class Share(Struct, eq=False):
    """What one domain has given to one run so far."""

    run: Run
    position: float
    dynamic_mj: int = 0
    static_mj: int = 0
    estimated_mj: int = 0


class _Interval(Struct, frozen=True):
    start_us: int
    end_us: int
    energy_mj: int
    is_estimated: bool
    idle_w: float | None


class Domain:
    """The books of one counter. Integers in mJ; each interval is split once and nothing is recomputed, only moved."""

    def __init__(
        self, first: CounterReading, idle_mw: int, shares_static: bool, coefficients: Mapping[str, Coefficients]
    ) -> None:
        self.name = first.domain
        self.is_simulated = first.source == "simulated"
        self.source = first.source
        self.counter_mj = 0
        self.estimated_mj = 0
        self.idle_mj = 0
        self.unattributed_mj: dict[str, int] = {}
        self.running_mj = 0
        self.final_mj = 0
        self.settled_us = first.t_us
        self.power_mw = 0 if first.power_w is None else int(first.power_w * 1000)
        self.live: dict[int, Share] = {}
        """By serial number, thereby in order of start: running, or ended and not settled."""
        self._coefficients = coefficients
        self._shares_static = shares_static
        self._idle = IdlePower(idle_mw)
        self._last = first
        self._open: deque[_Interval] = deque()
        self._open_mj = 0
        self._carry = 0
        self._blind_until_us = first.t_us
        """Intervals that start before this belong in part to runs that were given up."""
        self._active_until_us: int | None = None
        """None: nothing ran since the first reading."""

    @property
    def changed_us(self) -> int:
        """When the counter last moved."""
        return self._last.t_us

    @property
    def open_mj(self) -> int:
        """Energy of intervals that are closed but wait for late reports."""
        return self._open_mj

    @property
    def residue_mj(self) -> int:
        """What the accounts lack to the counter; always 0."""
        booked = self.final_mj + self.running_mj + self.idle_mj + sum(self.unattributed_mj.values())
        return self.counter_mj + self.estimated_mj - booked - self._open_mj

    def idle_mw(self, resident: frozenset[str], stated_w: float | None = None) -> int:
        """Idle power in use for these resident modes."""
        return self._idle.current_mw(resident, self._last.idle_w if stated_w is None else stated_w)

    def read(self, reading: CounterReading, resident: frozenset[str]) -> list[tuple[int, Share]]:
        """Take a reading; split what has become ripe. Returns (serial, share) of ended runs that are settled."""
        assert (reading.source == "simulated") == self.is_simulated, "simulated and real energy in one domain"
        last = self._last
        if reading.power_w is not None:
            self.power_mw = int(reading.power_w * 1000)
        is_reset = reading.epoch != last.epoch or reading.energy_mj < last.energy_mj
        # An unchanged counter closes nothing: it moves slower than it is read (10-120 ms), or it is stuck.
        if reading.t_us > last.t_us and (is_reset or reading.energy_mj != last.energy_mj):
            self._close(reading, is_reset)
        finished: list[tuple[int, Share]] = []
        for _ in range(SETTLE_AT_ONCE):
            if not self._open or not self._is_ripe(self._open[0], reading.t_us):
                break
            finished += self._settle(self._open.popleft(), reading.t_us, resident)
        return finished

    def _close(self, reading: CounterReading, is_reset: bool) -> None:
        """The interval from the counter's previous change to this one is complete."""
        last = self._last
        duration_us = reading.t_us - last.t_us
        energy_mj = reading.energy_mj - last.energy_mj
        if is_reset:
            energy_mj = self._trapezoid_mj(last, reading, duration_us)
        is_estimated = is_reset or reading.source == "estimated"
        if is_estimated:
            self.estimated_mj += energy_mj
        else:
            self.counter_mj += energy_mj
        if reading.limit_w is not None:
            most_mj = int(2 * reading.limit_w * duration_us) // 1_000
            if energy_mj > most_mj:
                self._unattribute("glitch", energy_mj - most_mj)
                energy_mj = most_mj
        self._open_mj += energy_mj
        self._open.append(_Interval(last.t_us, reading.t_us, energy_mj, is_estimated, reading.idle_w))
        self.source = reading.source
        self._last = reading
        if reading.power_w is None:
            self.power_mw = energy_mj * NANOJOULES_PER_MJ // duration_us

    def _trapezoid_mj(self, last: CounterReading, reading: CounterReading, duration_us: int) -> int:
        """Energy across a reset, from the power at both ends; without it, at the last known power."""
        ends_mw = [int(r.power_w * 1000) for r in (last, reading) if r.power_w is not None] or [self.power_mw]
        return sum(ends_mw) * duration_us // (len(ends_mw) * NANOJOULES_PER_MJ)

    def _is_ripe(self, interval: _Interval, now_us: int) -> bool:
        if now_us - interval.end_us > LATE_US or len(self._open) > MAX_OPEN_INTERVALS:
            return True
        end_us = interval.end_us
        for share in self.live.values():
            run = share.run
            if run.start_us >= end_us:
                break
            if run.reported_us < end_us and run.end_us is None and not run.is_owner:
                return False
        return True

    def _settle(self, interval: _Interval, now_us: int, resident: frozenset[str]) -> list[tuple[int, Share]]:
        end_us = interval.end_us
        self._open_mj -= interval.energy_mj
        active: list[Share] = []
        finished: list[tuple[int, Share]] = []
        for serial, share in self.live.items():
            run = share.run
            if run.start_us >= end_us:
                break
            active.append(share)
            if run.end_us is not None and run.end_us <= end_us:
                finished.append((serial, share))
        if active:
            self._split(interval, active, now_us, resident)
            self._active_until_us = end_us
        else:
            self._rest(interval, resident)
        self.settled_us = end_us
        for serial, _ in finished:
            self._release(serial)
        assert self.residue_mj == 0, f"the ledger of {self.name} lacks {self.residue_mj} mJ"
        return finished

    def _release(self, serial: int) -> Share:
        share = self.live.pop(serial)
        moved_mj = share.dynamic_mj + share.static_mj
        self.running_mj -= moved_mj
        self.final_mj += moved_mj
        return share

    def give_up(self, serial: int, t_us: int) -> Share | None:
        """Release an ended run that the counter did not settle in time; None when it was settled here.

        Its part of the interval that is still open can never be told: that interval stays unattributed.
        """
        if serial not in self.live:
            return None
        self._blind_until_us = t_us
        return self._release(serial)

    def _rest(self, interval: _Interval, resident: frozenset[str]) -> None:
        """Nothing of msd's ran: idle, and what exceeds idle power is somebody else's."""
        energy_mj = interval.energy_mj
        if interval.start_us < self._blind_until_us:
            self._unattribute("stuck", energy_mj)
            return
        duration_us = interval.end_us - interval.start_us
        calm = self._active_until_us is None or interval.start_us - self._active_until_us >= SETTLING_US
        if calm:
            idle_mw = self._idle.current_mw(resident, interval.idle_w)
            self._idle.observe(resident, energy_mj, duration_us)
            if idle_mw and energy_mj * NANOJOULES_PER_MJ > (idle_mw + FOREIGN_MARGIN_MW) * duration_us:
                foreign_mj = energy_mj - idle_mw * duration_us // NANOJOULES_PER_MJ
                self._unattribute("foreign", foreign_mj)
                energy_mj -= foreign_mj
        self.idle_mj += energy_mj

    def _split(self, interval: _Interval, active: list[Share], now_us: int, resident: frozenset[str]) -> None:
        start_us, end_us = interval.start_us, interval.end_us
        if start_us < self._blind_until_us:
            self._unattribute("stuck", interval.energy_mj)
            for share in active:
                share.position = share.run.position(end_us)
            return
        duration_us = end_us - start_us
        idle_mw = self._idle.current_mw(resident, interval.idle_w)
        static_mj, self._carry = divmod(idle_mw * duration_us + self._carry, NANOJOULES_PER_MJ)
        static_mj = min(interval.energy_mj, static_mj)
        dynamic_mj = interval.energy_mj - static_mj
        ids: list[str] = []
        overlaps: list[int] = []
        concurrency: dict[str, int] = {}
        for share in active:
            run = share.run
            from_us = run.start_us if run.start_us > start_us else start_us
            until_us = end_us if run.end_us is None or run.end_us > end_us else run.end_us
            overlap = max(1, until_us - from_us)
            ids.append(run.request_id)
            overlaps.append(overlap)
            concurrency[run.mode] = concurrency.get(run.mode, 0) + overlap
        step_mj = {
            mode: self._of(mode).step_mj * min(1.0, duration_us / busy_us) for mode, busy_us in concurrency.items()
        }
        weights = self._weights(active, overlaps, step_mj, end_us, now_us)
        dynamics = apportion(dynamic_mj, weights, ids)
        if self._shares_static:
            statics = apportion(static_mj, overlaps, ids)
        else:
            self.idle_mj += static_mj
            statics = [0] * len(active)
        for share, dynamic, static in zip(active, dynamics, statics, strict=True):
            share.dynamic_mj += dynamic
            share.static_mj += static
            if interval.is_estimated:
                share.estimated_mj += dynamic + static
        self.running_mj += sum(dynamics) + sum(statics)
        if dynamic_mj and not any(weights):
            self._unattribute("unweighted", dynamic_mj)

    def _of(self, mode: str) -> Coefficients:
        return self._coefficients.get(mode, _DEFAULT)

    def _weights(
        self, active: list[Share], overlaps: list[int], step_mj: dict[str, float], end_us: int, now_us: int
    ) -> list[int]:
        """Modelled energy of each run in the interval: its part of the steps, plus prefill, plus decode; scaled.

        `step_mj` is a mode's fixed cost of a step, already divided by the requests that share it on average.
        """
        weights: list[int] = []
        for share, overlap in zip(active, overlaps, strict=True):
            run = share.run
            if run.is_owner:
                weights.append(int(OWNER_POWER_W * overlap * WEIGHT_SCALE) // 1_000)
                continue
            before = share.position
            after = run.position(end_us)
            if run.tokens[-1] == 0:  # still in its prefill when the interval had to be split: spread it until now
                after = (end_us - run.start_us) / (now_us - run.start_us)
            if after <= before:
                weights.append(0)
                continue
            share.position = after
            costs = self._of(run.mode)
            weight = step_mj[run.mode] * (after - before)
            if before < 1.0:
                weight += costs.prefill_mj_per_token * run.prefill_tokens * (min(1.0, after) - before)
                before = 1.0
            if after > before:
                weight += costs.decode_mj_per_token * (after - before)
            weights.append(int(weight * WEIGHT_SCALE))
        return weights

    def _unattribute(self, reason: str, energy_mj: int) -> None:
        self.unattributed_mj[reason] = self.unattributed_mj.get(reason, 0) + energy_mj


_DEFAULT = Coefficients()

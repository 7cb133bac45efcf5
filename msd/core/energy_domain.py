"""One physical energy counter, split exactly: intervals between its changes, shares of what ran in them."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from msgspec import Struct

from msd.core.apportion import apportion
from msd.core.energy_run import Run
from msd.core.idle_power import SAMPLE_US, SETTLING_US, IdleFacts, IdlePower
from msd.domain import CounterReading

WEIGHT_TOTAL = 1 << 29
"""Weights become integers that sum to about this: one digit of Python's, which halves the cost of dividing by it."""
NANOJOULES_PER_MJ = 1_000_000
LATE_US = 5_000_000
"""An interval waits this long for the reports of what ran in it; then it is split by what is known."""
MAX_OPEN_INTERVALS = 256
SETTLE_AT_ONCE = 4
"""Intervals split per reading, so that a burst of late reports does not stall the core."""
MAX_EQUATIONS = 4_096
OWNER_POWER_W = 60.0
"""What loading or warming an engine is taken to draw above idle, beside requests that run meanwhile."""
FOREIGN_MARGIN_MW = 15_000


class Coefficients(Struct, frozen=True):
    """Energy of one engine step: fixed part, per prompt token computed, per decode position (mJ).

    The defaults only say how the parts of one mode relate; `learning/energy_model.py` fits them per mode.
    """

    step_mj: float = 2_000.0
    prefill_mj_per_token: float = 10.0
    decode_mj_per_token: float = 95.0


_DEFAULT = Coefficients()


class Equation(Struct, frozen=True):
    """What one interval tells about the coefficients: energy above idle = the sum over modes of what they did.

    `terms`: (mode, steps, prompt tokens computed, decode positions). `clock_band`: which clocks it ran at, since
    coefficients hold for one band; 0 where the clock is unknown.
    """

    t_us: int
    energy_mj: int
    clock_band: int
    terms: tuple[tuple[str, float, float, float], ...]


class Tally:
    """What the runs of one mode did in the interval that is being split.

    Requests of one engine advance in the same steps, so the steps are the positions gained, divided by how many ran at
    once on average: `busy_us / union_us`, of the time in which any ran.
    """

    __slots__ = (
        "busy_us",
        "costs",
        "covered_us",
        "end_us",
        "mode",
        "num_positions",
        "num_prefill_tokens",
        "num_prefills",
        "num_whole",
        "rate",
        "start_us",
        "union_us",
    )

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.costs = _DEFAULT
        self.rate = 1.0
        self.open(-1, -1, _DEFAULT)

    def open(self, start_us: int, end_us: int, costs: Coefficients) -> None:
        """Begin an interval."""
        self.end_us = end_us
        self.costs = costs
        self.busy_us = self.union_us = 0
        self.num_whole = 0
        self.start_us = self.covered_us = start_us
        self.num_positions = self.num_prefills = self.num_prefill_tokens = 0.0

    def add(self, from_us: int, until_us: int) -> int:
        """A run was active for this part of the interval; parts come in order of their start. Returns its length."""
        if until_us > self.covered_us:
            self.union_us += until_us - (from_us if from_us > self.covered_us else self.covered_us)
            self.covered_us = until_us
        overlap = until_us - from_us if until_us > from_us else 1
        self.busy_us += overlap
        return overlap

    def close(self) -> float:
        """All runs were seen: find the cost of a position. Returns the modelled energy of all that they did (mJ)."""
        costs = self.costs
        if self.num_whole:
            self.union_us = self.end_us - self.start_us
            self.busy_us += self.num_whole * self.union_us
        self.rate = costs.step_mj * self.union_us / self.busy_us + costs.decode_mj_per_token
        prefills_mj = (
            costs.prefill_mj_per_token * self.num_prefill_tokens - costs.decode_mj_per_token * self.num_prefills
        )
        return self.rate * self.num_positions + prefills_mj

    def term(self) -> tuple[str, float, float, float]:
        """Its part of an equation: the mode, its steps, prompt tokens and decode positions."""
        num_steps = self.num_positions * self.union_us / self.busy_us
        return self.mode, num_steps, self.num_prefill_tokens, self.num_positions - self.num_prefills


class Share(Struct, eq=False):
    """What one domain has given to one run so far."""

    run: Run
    position: float
    tally: Tally
    dynamic_mj: int = 0
    static_mj: int = 0
    estimated_mj: int = 0


class _Active:
    """What ran in one interval. `advances` are in positions of the run's mode; an owner's are in mJ."""

    __slots__ = ("advances", "finished", "has_owner", "overlaps", "scale", "shares", "tallies")

    def __init__(self) -> None:
        self.shares: list[Share] = []
        self.overlaps: list[int] = []
        self.advances: list[float] = []
        self.finished: list[tuple[int, Share]] = []
        """With its serial number: what ended in the interval."""
        self.tallies: list[Tally] = []
        self.has_owner = False
        self.scale = 0.0

    def weights(self) -> list[int]:
        """Modelled energy of each, scaled to integers."""
        scale = self.scale
        if len(self.tallies) == 1 and not self.has_owner:
            scale *= self.tallies[0].rate
            return [int(advance * scale) for advance in self.advances]
        return [
            int(advance * share.tally.rate * scale) for advance, share in zip(self.advances, self.shares, strict=True)
        ]


class _Ids:
    """Request ids of shares, looked up only where a tie is broken by them."""

    __slots__ = ("_shares",)

    def __init__(self, shares: list[Share]) -> None:
        self._shares = shares

    def __getitem__(self, i: int) -> str:
        return self._shares[i].run.request_id


class _Interval(Struct, frozen=True):
    start_us: int
    end_us: int
    energy_mj: int
    is_estimated: bool
    idle_w: float | None
    clock_band: int
    """-1: nothing can be learnt from it (a glitch, throttled clocks, an estimate)."""


class Domain:
    """The books of one counter. Integers in mJ; each interval is split once and nothing is recomputed, only moved.

    Every account has two columns: in all, and what of it was estimated and not counted.
    """

    def __init__(
        self, first: CounterReading, idle_mw: int, shares_static: bool, coefficients: Mapping[str, Coefficients]
    ) -> None:
        self.name = first.domain
        self.is_simulated = first.source == "simulated"
        self.source = first.source
        self.counter_mj = 0
        self.estimated_mj = 0
        self.idle_mj = self.idle_estimated_mj = 0
        self.unattributed_mj: dict[str, int] = {}
        self.unattributed_estimated_mj: dict[str, int] = {}
        self.running_mj = self.running_estimated_mj = 0
        self.final_mj = self.final_estimated_mj = 0
        self.settled_us = first.t_us
        self.power_mw = 0 if first.power_w is None else int(first.power_w * 1000)
        self.live: dict[int, Share] = {}
        """By serial number, thereby in order of start: running, or ended and not settled."""
        self.equations: deque[Equation] = deque(maxlen=MAX_EQUATIONS)
        """What the intervals since the last fit tell about the coefficients; the oldest go first."""
        self.clock_band = 0
        self.throttled_until_us = 0
        self._coefficients = coefficients
        self._shares_static = shares_static
        self._idle = IdlePower(idle_mw)
        self._last = first
        self._open: deque[_Interval] = deque()
        self._open_mj = self._open_estimated_mj = 0
        self._unattributed_sum_mj = 0
        self._carry = 0
        self._calm_mj = self._calm_us = 0
        """Idle intervals on the way to a sample of idle power."""
        self._tallies: dict[str, Tally] = {}
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
    def open_estimated_mj(self) -> int:
        """What of it was estimated."""
        return self._open_estimated_mj

    @property
    def residue_mj(self) -> int:
        """What the accounts lack to the counter; always 0."""
        booked = self.final_mj + self.running_mj + self.idle_mj + self._unattributed_sum_mj
        return self.counter_mj + self.estimated_mj - booked - self._open_mj

    @property
    def residue_estimated_mj(self) -> int:
        """The same for the column of estimates; always 0."""
        booked = self.final_estimated_mj + self.running_estimated_mj + self.idle_estimated_mj
        booked += sum(self.unattributed_estimated_mj.values())
        return self.estimated_mj - booked - self._open_estimated_mj

    def begin(self, run: Run) -> None:
        """A run has started."""
        tally = _OWNERS
        if not run.is_owner:
            known = self._tallies.get(run.mode)
            if known is None:
                known = self._tallies[run.mode] = Tally(run.mode)
            tally = known
        self.live[run.serial] = Share(run, 0.0, tally)
        run.num_unsettled += 1

    def join(self, run: Run) -> None:
        """The counter appeared while the run was under way: charge it from here on."""
        self.begin(run)
        self.live[run.serial].position = run.position(self.settled_us)

    def idle_mw(self, resident: frozenset[str], stated_w: float | None = None) -> int:
        """Idle power in use for these resident modes."""
        return self._idle.current_mw(resident, self._last.idle_w if stated_w is None else stated_w)

    def idle_facts(self, resident: frozenset[str]) -> IdleFacts:
        """The same with where it comes from, for people."""
        return self._idle.facts(resident, self._last.idle_w)

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
        clock_band = -1 if is_estimated or last.t_us < self.throttled_until_us else self.clock_band
        if reading.limit_w is not None:
            most_mj = int(2 * reading.limit_w * duration_us) // 1_000
            if energy_mj > most_mj:
                self._unattribute("glitch", energy_mj - most_mj, is_estimated)
                energy_mj = most_mj
                clock_band = -1
        self._open_mj += energy_mj
        if is_estimated:
            self._open_estimated_mj += energy_mj
        self._open.append(_Interval(last.t_us, reading.t_us, energy_mj, is_estimated, reading.idle_w, clock_band))
        self.source = reading.source
        self._last = reading
        if reading.power_w is None:
            self.power_mw = energy_mj * NANOJOULES_PER_MJ // duration_us

    def _trapezoid_mj(self, last: CounterReading, reading: CounterReading, duration_us: int) -> int:
        """Energy across a reset, from the power at both ends; without it, at the last known power."""
        ends_mw = [int(r.power_w * 1000) for r in (last, reading) if r.power_w is not None] or [self.power_mw]
        return sum(ends_mw) * duration_us // (len(ends_mw) * NANOJOULES_PER_MJ)

    def _is_ripe(self, interval: _Interval, now_us: int) -> bool:
        """Whether everything that ran in it has been heard of since, or it has waited long enough."""
        end_us = interval.end_us
        if now_us - end_us > LATE_US or len(self._open) > MAX_OPEN_INTERVALS:
            return True
        for share in self.live.values():
            run = share.run
            if run.reported_us < end_us and run.end_us is None and not run.is_owner:
                if run.start_us >= end_us:
                    break
                return False
        return True

    def _settle(self, interval: _Interval, now_us: int, resident: frozenset[str]) -> list[tuple[int, Share]]:
        end_us = interval.end_us
        self._open_mj -= interval.energy_mj
        if interval.is_estimated:
            self._open_estimated_mj -= interval.energy_mj
        active = self._weigh(interval, now_us)
        if active.shares:
            self._split(interval, active, now_us, resident)
            self._active_until_us = end_us
            self._calm_mj = self._calm_us = 0
        else:
            self._rest(interval, resident)
        finished = active.finished
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
        self.running_estimated_mj -= share.estimated_mj
        self.final_estimated_mj += share.estimated_mj
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
            self._unattribute("stuck", energy_mj, interval.is_estimated)
            return
        duration_us = interval.end_us - interval.start_us
        calm = self._active_until_us is None or interval.start_us - self._active_until_us >= SETTLING_US
        if calm:
            idle_mw = self._idle.current_mw(resident, interval.idle_w)
            self._calm_mj += energy_mj
            self._calm_us += duration_us
            if self._calm_us >= SAMPLE_US:
                self._idle.observe(resident, self._calm_mj, self._calm_us, interval.end_us)
                self._calm_mj = self._calm_us = 0
            if idle_mw and energy_mj * NANOJOULES_PER_MJ > (idle_mw + FOREIGN_MARGIN_MW) * duration_us:
                foreign_mj = energy_mj - idle_mw * duration_us // NANOJOULES_PER_MJ
                self._unattribute("foreign", foreign_mj, interval.is_estimated)
                energy_mj -= foreign_mj
        self._rests(energy_mj, interval.is_estimated)

    def _rests(self, energy_mj: int, is_estimated: bool) -> None:
        self.idle_mj += energy_mj
        if is_estimated:
            self.idle_estimated_mj += energy_mj

    def _weigh(self, interval: _Interval, now_us: int) -> _Active:
        """What ran in the interval, for how long, and the energy that it should have taken, as integer weights."""
        start_us, end_us = interval.start_us, interval.end_us
        duration_us = end_us - start_us
        active = _Active()
        shares, overlaps, advances, finished = active.shares, active.overlaps, active.advances, active.finished
        prefills: list[tuple[int, float]] = []
        total = 0.0
        # This loop is most of the cost of an interval, at 0.3 to 0.5 us a run: nothing is called in it as a rule.
        for serial, share in self.live.items():
            run = share.run
            from_us, until_us = run.start_us, run.end_us
            if from_us >= end_us:
                break
            tally = share.tally
            if tally.end_us != end_us and tally is not _OWNERS:
                tally.open(start_us, end_us, self._coefficients.get(tally.mode, _DEFAULT))
                active.tallies.append(tally)
            shares.append(share)
            if from_us <= start_us and (until_us is None or until_us > end_us):
                overlap = duration_us
                tally.num_whole += 1
            else:
                if until_us is None or until_us > end_us:
                    until_us = end_us
                else:
                    finished.append((serial, share))
                overlap = tally.add(from_us if from_us > start_us else start_us, until_us)
            overlaps.append(overlap)
            if tally is _OWNERS:
                active.has_owner = True
                advances.append(OWNER_POWER_W * overlap / 1_000)
                total += advances[-1]
                continue
            times = run.times
            last_us = times[-1]
            after: float
            if end_us >= last_us:
                after = run.tokens[-1]
                if not after:  # still in its prefill when the interval had to be split: spread it until now
                    after = (end_us - run.start_us) / (now_us - run.start_us)
            else:
                before_us = times[-2]
                if end_us >= before_us:
                    tokens = run.tokens
                    after = tokens[-2] + (tokens[-1] - tokens[-2]) * (end_us - before_us) / (last_us - before_us)
                else:
                    after = run.position(end_us)
            before = share.position
            advance = after - before
            if advance <= 0.0:
                advances.append(0.0)
                continue
            share.position = after
            if before < 1.0:
                part = (after if after < 1.0 else 1.0) - before
                prefills.append((len(advances), part))
                tally.num_prefills += part
                tally.num_prefill_tokens += part * run.prefill_tokens
            advances.append(advance)
            tally.num_positions += advance
        for tally in active.tallies:
            total += tally.close()
        active.scale = WEIGHT_TOTAL / total if total > 0.0 else 0.0
        for i, part in prefills:
            tally, num_tokens = shares[i].tally, shares[i].run.prefill_tokens
            # In positions, like the rest: a prompt is worth so many of them.
            worth = tally.costs.prefill_mj_per_token * num_tokens - tally.costs.decode_mj_per_token
            if tally.rate > 0.0:
                advances[i] += part * worth / tally.rate
        return active

    def _split(self, interval: _Interval, active: _Active, now_us: int, resident: frozenset[str]) -> None:
        """Share an interval among what ran in it: the static part by time, the dynamic part by modelled work."""
        if interval.start_us < self._blind_until_us:
            self._unattribute("stuck", interval.energy_mj, interval.is_estimated)
            return
        duration_us = interval.end_us - interval.start_us
        shares, overlaps = active.shares, active.overlaps
        spans_all = overlaps.count(duration_us) == len(overlaps)
        idle_mw = self._idle.current_mw(resident, interval.idle_w)
        static_mj, self._carry = divmod(idle_mw * duration_us + self._carry, NANOJOULES_PER_MJ)
        if spans_all and self._shares_static:
            # The same whole millijoules for everyone, and the rest is carried on: no need to look for whom it favours.
            rest_mj = static_mj % len(shares)
            static_mj -= rest_mj
            self._carry += rest_mj * NANOJOULES_PER_MJ
        static_mj = min(interval.energy_mj, static_mj)
        given_mj = dynamic_mj = interval.energy_mj - static_mj
        weights = active.weights()
        ids = _Ids(shares)
        dynamics = apportion(dynamic_mj, weights, ids)
        if self._shares_static:
            each_mj, rest_mj = divmod(static_mj, len(shares))
            statics = [each_mj] * len(shares) if spans_all and not rest_mj else apportion(static_mj, overlaps, ids)
            given_mj += static_mj
        else:
            statics = [0] * len(shares)
            self._rests(static_mj, interval.is_estimated)
        for share, dynamic, static in zip(shares, dynamics, statics, strict=True):
            share.dynamic_mj += dynamic
            share.static_mj += static
        if dynamic_mj and not any(weights):
            self._unattribute("unweighted", dynamic_mj, interval.is_estimated)
            given_mj -= dynamic_mj
        self.running_mj += given_mj
        if interval.is_estimated:
            self.running_estimated_mj += given_mj
            for share, dynamic, static in zip(shares, dynamics, statics, strict=True):
                share.estimated_mj += dynamic + static
        # Nothing can be learnt from work of owners, with the idle power unknown, or of what was never reported.
        if interval.clock_band >= 0 and idle_mw and not active.has_owner and now_us - interval.end_us <= LATE_US:
            terms = tuple([tally.term() for tally in active.tallies])
            self.equations.append(Equation(interval.end_us, dynamic_mj, interval.clock_band, terms))

    def _unattribute(self, reason: str, energy_mj: int, is_estimated: bool) -> None:
        self._unattributed_sum_mj += energy_mj
        self.unattributed_mj[reason] = self.unattributed_mj.get(reason, 0) + energy_mj
        if is_estimated:
            self.unattributed_estimated_mj[reason] = self.unattributed_estimated_mj.get(reason, 0) + energy_mj


_OWNERS = Tally("")
"""Work that no request asked for has no steps: its weight is a power, at a rate of 1."""

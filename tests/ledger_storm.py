"""A world of nothing but ledger events, with all that goes wrong with counters; its own books beside the ledger's.

Churn, retries, aborts, engine starts, silent requests, resets, glitches, a stuck counter. Its rises are summed
here too, so that closing is judged from outside.
"""

from __future__ import annotations

from random import Random

from msd.config import EnergyConfig
from msd.core.energy_domain import Coefficients
from msd.core.ledger import Ledger
from msd.domain import CounterReading, GpuView

DOMAIN = "gpu:0"
LIMIT_W, POWER_W = 700.0, 300.0
MAX_RUNNING = 12
READ_US = 50_000


class Storm:
    """Feeds one ledger interval after interval; `residue_mj` is what its accounts lack to the counter."""

    def __init__(self, seed: int) -> None:
        self._rng = Random(seed)
        self.ledger = Ledger(EnergyConfig(idle_w=70.0))
        self._t_us = 0
        self._counter_mj = self._rng.randrange(10**9)
        self._epoch = 0
        self._running: dict[str, int] = {}
        self._owners: list[str] = []
        self._num_made = 0
        self.counted_mj = 0
        """Rises of the counter, resets left out: what the ledger must have in its column of the counter."""
        self.num_intervals = 0
        self.num_resets = 0
        self.num_restarts = 0
        self.num_glitches = 0
        self._read()

    def run(self, num_intervals: int) -> None:
        """Go on until so many intervals have been closed in all."""
        rng = self._rng
        while self.num_intervals < num_intervals:
            self._t_us += READ_US
            self._churn()
            what = rng.random()
            if what < 0.001:
                self._counter_mj = rng.randrange(1_000)
                self._epoch += rng.randrange(2)
                self.num_resets += 1
            elif what < 0.002:
                self._rise(10**8)
                self.num_glitches += 1
            elif what < 0.003:
                self._t_us += rng.randrange(40_000_000)
                self._rise(rng.randrange(10**6))
            else:
                self._rise(rng.randrange(1, 30_000))
            self._read()
            self.num_intervals += 1
            if rng.random() < 0.05:
                self.ledger.expire(self._t_us)
            if rng.random() < 0.001:
                costs = Coefficients(*(rng.choice((0.0, 1.0, 5_000.0)) for _ in range(3)))
                self.ledger.fitted({f"m{rng.randrange(3)}": costs})
                self.ledger.viewed(GpuView(t_us=self._t_us, throttle_reasons=rng.choice(((), ("power_cap",)))))

    def _rise(self, energy_mj: int) -> None:
        self._counter_mj += energy_mj
        self.counted_mj += energy_mj

    def _read(self) -> None:
        self.ledger.counter(
            CounterReading(
                domain=DOMAIN,
                t_us=self._t_us,
                energy_mj=self._counter_mj,
                epoch=self._epoch,
                power_w=POWER_W,
                limit_w=LIMIT_W,
            )
        )

    def _churn(self) -> None:
        rng, ledger, running, t_us = self._rng, self.ledger, self._running, self._t_us
        if rng.random() < 0.25 and len(running) < MAX_RUNNING:
            self._num_made += 1
            self._start(f"r{self._num_made}")
        for request_id in list(running):
            luck = rng.random()
            if luck < 0.7:
                if not running[request_id]:
                    ledger.first_token(t_us - rng.randrange(READ_US), request_id, rng.choice((0, 0, 64)))
                running[request_id] += rng.randrange(1, 4)
                ledger.progress(t_us, request_id, running[request_id])
            elif luck < 0.73:
                num_tokens = running.pop(request_id)
                end = rng.random()
                if end < 0.1:
                    ledger.ended(t_us, request_id, "wasted", "restarted", "t", num_tokens)
                    self.num_restarts += 1
                    self._start(request_id)
                elif end < 0.2:
                    ledger.ended(t_us, request_id, "wasted", rng.choice(("aborted", "failed")), "t", num_tokens)
                else:
                    ledger.ended(t_us, request_id, "requests", "", f"t{rng.randrange(5)}", num_tokens + 1)
        if rng.random() < 0.002:
            if self._owners:
                ledger.ended(t_us, self._owners.pop(), "wasted", rng.choice(("warmup", "switch")))
            else:
                self._owners.append("start of m0")
                ledger.work_started(t_us, self._owners[-1], "m0")
        if rng.random() < 0.01:
            ledger.resident(rng.sample(("m0", "m1", "m2"), rng.randrange(4)))

    def _start(self, request_id: str) -> None:
        self.ledger.started(self._t_us, request_id, f"m{self._rng.randrange(3)}", self._rng.randrange(2_000))
        self._running[request_id] = 0

    def residue_mj(self) -> int:
        """The worst of: the sum of all accounts against the counter, either column, and the ledger's own opinion."""
        (accounts,) = self.ledger.accounts()
        booked_mj = accounts.requests_mj + accounts.idle_mj + accounts.running_mj + accounts.open_mj
        booked_mj += sum(accounts.wasted_mj.values()) + sum(accounts.unattributed_mj.values())
        return max(
            abs(self.counted_mj + accounts.estimated_mj - booked_mj),
            abs(self.counted_mj - accounts.counter_mj),
            abs(accounts.estimated_mj - sum(accounts.estimated_of.values())),
            abs(accounts.residue_mj),
        )

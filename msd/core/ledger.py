"""The energy ledger: every millijoule of a counter goes to a request, to waste, to idle, or is left unattributed.

Pure, integers, no clock of its own. Fed by what the scheduler knows anyway; a request's energy is settled some
intervals after its answer went out. Each counter is a domain of its own and closes to itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Literal

from msgspec import Struct

from msd.config import EnergyConfig
from msd.core.energy_domain import Coefficients, Domain, Equation, Share
from msd.core.energy_run import Run
from msd.core.idle_power import IdleFacts
from msd.domain import CounterReading, Energy, EnergySource, GpuView
from msd.profile import Profile

Account = Literal["requests", "wasted"]
WasteReason = Literal["aborted", "failed", "restarted", "shadow", "warmup", "switch"]
MAX_DOMAINS = 16
MAX_TENANTS = 1_024
"""Further tenants are booked as `other`."""
GIVE_UP_US = 30_000_000
"""A counter that does not move for this long keeps no ended request waiting."""
MAX_UNSETTLED = 65_536
THROTTLING = frozenset({"power_cap", "hw_slowdown", "sync_boost", "sw_thermal", "hw_thermal", "power_brake"})
"""Reasons for lower clocks (NVML's 0x4 to 0x80) under which a mode's energy is not its own."""
THROTTLED_AFTER_US = 1_000_000
"""Throttle reasons are read once a second: an interval that soon after one may still be throttled."""
MAX_VIEW_GAP_US = 2_000_000
CLOCK_BAND_MHZ = 300


class Booked(Struct, frozen=True):
    """Energy of finished work under one heading; `reason` is empty for requests. Tokens of requests and of waste."""

    account: Account
    reason: str
    mode: str
    tenant: str
    energy_mj: int
    estimated_mj: int
    """What of `energy_mj` was estimated and not counted."""
    static_mj: int
    """What of it is the share of the idle power: a fast mode may win by this part alone."""
    num_tokens: int


class Accounts(Struct, frozen=True, kw_only=True):
    """One domain as a table that adds up: the accounts, what runs, what waits = the counter's delta (mJ).

    In two columns: each account in all, and in `estimated_of` what of it was estimated, by the account's name
    (`requests`, `wasted: failed`, `idle`, ...), where that is not 0.
    """

    domain: str
    source: EnergySource
    requests_mj: int
    wasted_mj: dict[str, int]
    idle_mj: int
    unattributed_mj: dict[str, int]
    running_mj: int
    open_mj: int
    counter_mj: int
    estimated_mj: int
    residue_mj: int
    estimated_of: dict[str, int]
    idle: IdleFacts
    changed_us: int

    @property
    def idle_w(self) -> float:
        """Idle power in use."""
        return self.idle.power_mw / 1000


_Heading = tuple[str, Account, str, str, str]


class Ledger:
    """All domains. `started`, `first_token`, `progress` and `ended` cost about a microsecond each."""

    def __init__(
        self,
        config: EnergyConfig,
        coefficients: Mapping[str, Coefficients] | None = None,
    ) -> None:
        self._config = config
        self._coefficients = dict(coefficients or {})
        self._domains: dict[str, Domain] = {}
        self._counting: tuple[Domain, ...] = ()
        """The domains that "the energy of a request" means: the GPUs, or the CPU where no GPU is metered."""
        self._running: dict[str, Run] = {}
        self._unsettled: deque[Run] = deque()
        self._resident: frozenset[str] = frozenset()
        self._booked: dict[_Heading, list[int]] = {}
        """By (domain, account, reason, mode, tenant): energy, what of it is estimated, what of it is static, tokens."""
        self._throttling: tuple[str, ...] = ()
        self._viewed_us = 0
        self.throttled_us: dict[str, int] = {}
        """How long clocks were held down, by reason."""
        self._tenants: set[str] = set()
        self._next_serial = 0

    # --- what happens to work ----------------------------------------------------------------------------------------

    def started(self, t_us: int, request_id: str, mode: str, num_prefill_tokens: int) -> None:
        """An attempt went to its engine."""
        self._begin(Run(request_id, mode, t_us, num_prefill_tokens, False, [t_us], [0], t_us))

    def work_started(self, t_us: int, owner: str, mode: str) -> None:
        """Work that no request asked for: an engine loads, warms up or switches."""
        self._begin(Run(owner, mode, t_us, 0, True, [t_us], [0], t_us))

    def _begin(self, run: Run) -> None:
        assert run.request_id not in self._running, f"{run.request_id} is running already"
        self._running[run.request_id] = run
        run.serial = self._next_serial
        self._next_serial += 1
        for domain in self._domains.values():
            domain.begin(run)

    def first_token(self, t_us: int, request_id: str, num_cached_tokens: int) -> None:
        """The prefill is done; tokens from the prefix cache cost nothing."""
        run = self._running.get(request_id)
        if run is not None and run.tokens[-1] == 0:
            run.prefill_tokens = max(0, run.prefill_tokens - num_cached_tokens)
            run.report(t_us, 1)

    def progress(self, t_us: int, request_id: str, num_tokens: int) -> None:
        """So many tokens generated so far. Unknown ids are late news of ended attempts."""
        run = self._running.get(request_id)
        if run is not None:
            run.report(t_us, num_tokens)

    def ended(
        self,
        t_us: int,
        request_id: str,
        account: Account,
        reason: WasteReason | Literal[""] = "",
        tenant: str = "",
        num_tokens: int = 0,
    ) -> Energy | None:
        """The attempt (or the owner's work) is over. Returns its provisional energy, `settled=False`.

        None: no counter, nothing will follow. Else `counter` or `expire` returns the final figure exactly once, except
        for an attempt that is `restarted`, a shadow and owners: their energy concerns nobody but the books.
        """
        run = self._running.pop(request_id, None)
        if run is None:
            return None
        # A prefill in flight is a step that the engine finishes: an attempt aborted in it has cost all of it.
        run.report(t_us, max(num_tokens, 0 if run.is_owner else 1))
        num_active = len(self._running) + 1
        run.end_us = t_us
        run.account = account
        run.reason = reason
        if tenant not in self._tenants:
            if len(self._tenants) < MAX_TENANTS:
                self._tenants.add(tenant)
            else:
                tenant = "other"
        run.tenant = tenant
        if not run.num_unsettled:
            return None
        self._unsettled.append(run)
        return self._provisional(run, t_us, num_active)

    def _provisional(self, run: Run, t_us: int, num_active: int) -> Energy | None:
        """The settled part, and an equal share of the present power for the rest."""
        if not self._counting:
            return None
        dynamic_mj = static_mj = 0
        is_estimated = False
        for domain in self._counting:
            share = domain.live.get(run.serial)
            if share is None:
                continue
            rest_us = max(0, t_us - max(run.start_us, domain.settled_us))
            rest_mj = domain.power_mw * rest_us // (1_000_000 * num_active)
            rest_static_mj = 0
            if self._config.static_share == "share":
                rest_static_mj = min(rest_mj, domain.idle_mw(self._resident) * rest_us // (1_000_000 * num_active))
            dynamic_mj += share.dynamic_mj + rest_mj - rest_static_mj
            static_mj += share.static_mj + rest_static_mj
            is_estimated = is_estimated or share.estimated_mj > 0
        return self._energy(dynamic_mj, static_mj, is_estimated, settled=False)

    def _energy(self, dynamic_mj: int, static_mj: int, is_estimated: bool, settled: bool) -> Energy:
        first = self._counting[0]
        return Energy(
            energy_mj=dynamic_mj + static_mj,
            dynamic_mj=dynamic_mj,
            static_mj=static_mj,
            source="simulated" if first.is_simulated else "estimated" if is_estimated else "counter",
            settled=settled,
        )

    # --- what the world tells ----------------------------------------------------------------------------------------

    def resident(self, modes: Iterable[str]) -> None:
        """Which modes are in memory now: idle power is learnt per set of them."""
        self._resident = frozenset(modes)

    def counter(self, reading: CounterReading) -> list[tuple[str, Energy]]:
        """Take a counter reading; returns (request_id, energy) of what became settled by it."""
        domain = self._domains.get(reading.domain)
        if domain is None:
            self._open_domain(reading)
            return []
        answers: list[tuple[str, Energy]] = []
        for _, share in domain.read(reading, self._resident):
            self._book(domain, share, answers, settled=True)
        unsettled = self._unsettled
        while unsettled and not unsettled[0].num_unsettled:
            unsettled.popleft()
        return answers

    def viewed(self, view: GpuView) -> None:
        """Take the GPU's clocks: coefficients hold for one band of them, and nothing is learnt from throttled ones."""
        since_us, self._viewed_us = self._viewed_us, view.t_us
        for reason in self._throttling:
            gap_us = min(MAX_VIEW_GAP_US, max(0, view.t_us - since_us))
            self.throttled_us[reason] = self.throttled_us.get(reason, 0) + gap_us
        reasons = view.throttle_reasons
        self._throttling = tuple([reason for reason in reasons if reason in THROTTLING]) if reasons else ()
        clock_band = (view.sm_clock_mhz or 0) // CLOCK_BAND_MHZ
        for domain in self._counting:
            domain.clock_band = clock_band
            if self._throttling:
                domain.throttled_until_us = view.t_us + THROTTLED_AFTER_US

    def take_equations(self) -> list[Equation]:
        """What the intervals settled since the last call tell about the coefficients; for `learning/energy_model.py`.

        Of the first domain that counts: coefficients are those of one device.
        """
        if not self._counting:
            return []
        equations = self._counting[0].equations
        taken = list(equations)
        equations.clear()
        return taken

    @property
    def coefficients(self) -> dict[str, Coefficients]:
        """What intervals are split by."""
        return self._coefficients

    def fitted(self, coefficients: Mapping[str, Coefficients]) -> None:
        """The energy model was fitted anew: intervals split from now on go by it."""
        self._coefficients.update(coefficients)

    def expire(self, t_us: int) -> list[tuple[str, Energy]]:
        """Give up ended requests whose counter is stuck or gone; theirs stays `settled=False`. Call each second."""
        answers: list[tuple[str, Energy]] = []
        unsettled = self._unsettled
        while unsettled:
            run = unsettled[0]
            assert run.end_us is not None
            if run.num_unsettled and t_us - run.end_us < GIVE_UP_US and len(unsettled) <= MAX_UNSETTLED:
                break
            unsettled.popleft()
            for domain in self._domains.values():
                share = domain.give_up(run.serial, t_us) if run.num_unsettled else None
                if share is not None:
                    self._book(domain, share, answers, settled=False)
        return answers

    def _open_domain(self, reading: CounterReading) -> None:
        assert len(self._domains) < MAX_DOMAINS, "more energy counters than one box has"
        idle_mw = int(self._config.idle_w * 1000)
        domain = Domain(reading, idle_mw, self._config.static_share == "share", self._coefficients)
        self._domains[reading.domain] = domain
        gpus = tuple(d for d in self._domains.values() if not d.name.startswith("cpu:"))
        counting = gpus or tuple(self._domains.values())
        # Simulated and measured energy are never summed: the first domain says which of them is meant.
        self._counting = tuple(d for d in counting if d.is_simulated == counting[0].is_simulated)
        for run in self._running.values():
            domain.join(run)

    def _book(self, domain: Domain, share: Share, answers: list[tuple[str, Energy]], settled: bool) -> None:
        """Move a final balance to its account; the last domain of a run completes its answer."""
        run = share.run
        account: Account = "requests" if run.account == "requests" else "wasted"
        heading = (domain.name, account, run.reason, run.mode, run.tenant)
        sums = self._booked.get(heading)
        if sums is None:
            sums = self._booked[heading] = [0, 0, 0, 0]
        sums[0] += share.dynamic_mj + share.static_mj
        sums[1] += share.estimated_mj
        sums[2] += share.static_mj
        sums[3] += run.tokens[-1]
        run.num_unsettled -= 1
        if run.is_owner or run.reason in _UNANSWERED:
            return
        counting = self._counting
        if domain is counting[0] and len(counting) == 1 and not run.num_unsettled:
            dynamic_mj, static_mj, estimated_mj = share.dynamic_mj, share.static_mj, share.estimated_mj
        else:
            if run.counted is None:
                run.counted = []
            if domain in counting:
                run.counted.append((share.dynamic_mj, share.static_mj, share.estimated_mj))
            if run.num_unsettled:
                return
            dynamic_mj = sum(given[0] for given in run.counted)
            static_mj = sum(given[1] for given in run.counted)
            estimated_mj = sum(given[2] for given in run.counted)
        answers.append((run.request_id, self._energy(dynamic_mj, static_mj, estimated_mj > 0, settled)))

    # --- the books ---------------------------------------------------------------------------------------------------

    def accounts(self) -> tuple[Accounts, ...]:
        """Every domain's table."""
        return tuple(self._accounts_of(domain) for domain in self._domains.values())

    def _accounts_of(self, domain: Domain) -> Accounts:
        requests_mj = 0
        wasted_mj: dict[str, int] = {}
        estimated_of = {
            "idle": domain.idle_estimated_mj,
            "running": domain.running_estimated_mj,
            "open": domain.open_estimated_mj,
        }
        for reason, estimated_mj in domain.unattributed_estimated_mj.items():
            estimated_of[f"unattributed: {reason}"] = estimated_mj
        for (name, account, reason, *_), (energy_mj, estimated_mj, *_) in self._booked.items():
            if name != domain.name:
                continue
            row = "requests" if account == "requests" else f"wasted: {reason}"
            if account == "requests":
                requests_mj += energy_mj
            else:
                wasted_mj[reason] = wasted_mj.get(reason, 0) + energy_mj
            estimated_of[row] = estimated_of.get(row, 0) + estimated_mj
        booked_mj = requests_mj + sum(wasted_mj.values())
        return Accounts(
            domain=domain.name,
            source="simulated" if domain.is_simulated else domain.source,
            requests_mj=requests_mj,
            wasted_mj=wasted_mj,
            idle_mj=domain.idle_mj,
            unattributed_mj=dict(domain.unattributed_mj),
            running_mj=domain.running_mj,
            open_mj=domain.open_mj,
            counter_mj=domain.counter_mj,
            estimated_mj=domain.estimated_mj,
            residue_mj=domain.residue_mj + domain.final_mj - booked_mj,
            estimated_of={row: energy_mj for row, energy_mj in estimated_of.items() if energy_mj},
            idle=domain.idle_facts(self._resident),
            changed_us=domain.changed_us,
        )

    def booked(self, domain: str) -> tuple[Booked, ...]:
        """What finished work used, by account, reason, mode and tenant; the tokens beside it give J/token."""
        return tuple(
            Booked(account, reason, mode, tenant, *sums)
            for (name, account, reason, mode, tenant), sums in self._booked.items()
            if name == domain
        )


def coefficients_of(profile: Profile) -> dict[str, Coefficients]:
    """First coefficients of the modes that a profile has measured."""
    return {
        mode.mode: Coefficients(mode.step_mj, mode.prefill_mj_per_token, mode.decode_mj_per_token)
        for mode in profile.modes
        if mode.step_mj is not None and mode.prefill_mj_per_token is not None and mode.decode_mj_per_token is not None
    }


_UNANSWERED = frozenset({"restarted", "shadow"})
"""Waste that nobody asked for: no answer carries its energy."""

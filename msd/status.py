"""The daemon's own status, gathered from whoever knows each part; read-only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from msgspec import structs

from msd import __version__
from msd.config import Config
from msd.core.energy_domain import Coefficients
from msd.core.ledger import Accounts, Booked, Ledger
from msd.core.scheduler import Scheduler
from msd.engine.pool import EngineStatus
from msd.learning.energy_model import Fit
from msd.ports import Journal
from msd.wire import (
    CertificateReport,
    CoefficientReport,
    DaemonStatus,
    EngineReport,
    LedgerReport,
    ModeReport,
    UsageReport,
)

_REASONS_SHOWN = 8
_USERS_SHOWN = 50


class Identity:
    """What does not change while the daemon runs."""

    def __init__(self, config: Config, epoch: str, pid: int, started_us: int) -> None:
        self.server = f"msd/{__version__}"
        self.epoch = epoch
        self.pid = pid
        self.started_us = started_us
        self.models = {engine.name: engine.model for engine in config.engine}
        self.simulated = {engine.name: engine.kind != "vllm" for engine in config.engine}


def gather(
    identity: Identity,
    scheduler: Scheduler,
    engines: Sequence[EngineStatus],
    journal: Journal,
    *,
    draining: bool,
    num_sessions: int,
    now_us: int,
    fit: Fit | None = None,
) -> DaemonStatus:
    """One consistent picture of this instant."""
    counts = scheduler.counts
    view = scheduler.view
    gpu: dict[str, object] | None = None
    if view is not None:
        gpu = {name: value for name, value in structs.asdict(view).items() if value not in (None, "")}
        gpu["age_s"] = (now_us - view.t_us) / 1e6
    return DaemonStatus(
        server=identity.server,
        epoch=identity.epoch,
        pid=identity.pid,
        state="draining" if draining else "serving" if scheduler.fleet.up else "starting",
        uptime_s=(now_us - identity.started_us) / 1e6,
        durable=journal.durable,
        simulated=any(identity.simulated.values()),
        policy=scheduler.policy_name,
        requests={
            "submitted": counts.submitted,
            "delivered": counts.delivered,
            "rejected": counts.rejected,
            "aborted": counts.aborted,
            "failed": counts.failed,
            "duplicates": counts.duplicates,
            "pending": scheduler.num_pending,
            "restarts": counts.restarts,
        },
        errors=dict(scheduler.errors),
        num_waiting=scheduler.queue.num_waiting,
        num_waiting_tokens=scheduler.admission.reserved_tokens,
        num_running=scheduler.fleet.num_running,
        num_sessions=num_sessions,
        idle_with_backlog_s=scheduler.idle_with_backlog_us / 1e6,
        engines=tuple(_engine(identity, scheduler, engine, now_us) for engine in engines),
        modes=_modes(scheduler),
        residency={} if scheduler.residency is None else structs.asdict(scheduler.residency.figures()),
        gpu=gpu,
        energy=tuple(_ledger(scheduler.ledger, accounts, now_us) for accounts in scheduler.ledger.accounts()),
        coefficients=_coefficients(scheduler, fit),
        throttled_s={reason: us / 1e6 for reason, us in scheduler.ledger.throttled_us.items()},
    )


def _engine(identity: Identity, scheduler: Scheduler, engine: EngineStatus, now_us: int) -> EngineReport:
    books = [book for book in scheduler.fleet.books if book.mode.engine == engine.engine]
    info = books[0].info
    residency, residence = "always", "resident"
    if scheduler.residency is not None and scheduler.residency.may_move(engine.engine):
        residency = "auto"
        residence, moving = scheduler.residency.residence_of(engine.engine)
        residence += f" ({moving})" if moving else ""
    return EngineReport(
        engine=engine.engine,
        model=identity.models[engine.engine],
        state=engine.state,
        state_s=(now_us - engine.state_since_us) / 1e6,
        simulated=identity.simulated[engine.engine],
        num_slots=books[0].num_slots,
        num_running=sum(book.num_running for book in books),
        num_waiting=engine.load.num_waiting,
        kv_usage=engine.load.kv_usage,
        start_s=info.start_s if info is not None else None,
        num_starts=engine.num_starts,
        pids=engine.pids,
        last_error=engine.last_error,
        residency=residency,
        residence=residence,
    )


def _modes(scheduler: Scheduler) -> tuple[ModeReport, ...]:
    reasons: defaultdict[str, list[tuple[str, int]]] = defaultdict(list)
    for (mode, reason), count in scheduler.reasons.most_common():
        if len(reasons[mode]) < _REASONS_SHOWN:
            reasons[mode].append((reason, count))
    return tuple(
        ModeReport(
            mode=book.mode.name,
            engine=book.mode.engine,
            num_decisions=book.num_decisions,
            reasons=tuple(reasons[book.mode.name]),
            ttft_ms=book.estimate.ttft_ms(0) if book.info is not None else None,
            tpot_ms=book.estimate.tpot_ms(book.num_running) if book.info is not None else None,
            quality=book.mode.quality,
            serves=scheduler.certificates.summary(arm).serves,
            standing=scheduler.certificates.summary(arm).text,
            certificates=_certificates(scheduler, arm),
        )
        for arm, book in enumerate(scheduler.fleet.books)
    )


def _certificates(scheduler: Scheduler, arm: int) -> tuple[CertificateReport, ...]:
    reports = []
    for task, certificate in scheduler.certificates.describe(arm):
        row, trial = certificate.row, scheduler.shadows.trial(arm, task)
        reports.append(
            CertificateReport(
                task=task,
                standing=certificate.standing,
                reason=certificate.reason,
                accuracy=None if row is None else row.accuracy,
                accuracy_low=None if row is None else row.accuracy_low,
                accuracy_high=None if row is None else row.accuracy_high,
                num_pairs=0 if row is None else row.num_pairs,
                num_live_pairs=0 if trial is None else trial.num_scored,
                live_difference=None if not (trial and trial.num_scored) else trial.sum_difference / trial.num_scored,
                live_evidence=None if not (trial and trial.num_scored) else trial.capital,
                num_live_unscored=0 if trial is None else trial.num_unscored,
                live_agreement=None if not (trial and trial.num_unscored) else trial.agreement,
            )
        )
    return tuple(reports)


def _ledger(ledger: Ledger, accounts: Accounts, now_us: int) -> LedgerReport:
    booked = ledger.booked(accounts.domain)
    idle = accounts.idle
    return LedgerReport(
        domain=accounts.domain,
        source=accounts.source,
        counter_mj=accounts.counter_mj,
        estimated_mj=accounts.estimated_mj,
        requests_mj=accounts.requests_mj,
        wasted_mj=accounts.wasted_mj,
        idle_mj=accounts.idle_mj,
        unattributed_mj=accounts.unattributed_mj,
        running_mj=accounts.running_mj,
        open_mj=accounts.open_mj,
        residue_mj=accounts.residue_mj,
        idle_w=accounts.idle_w if idle.origin != "unknown" else None,
        idle_origin=idle.origin,
        idle_spread_w=None if idle.spread_mw is None else idle.spread_mw / 1000,
        idle_age_s=None if idle.learnt_us is None else (now_us - idle.learnt_us) / 1e6,
        estimated_of=accounts.estimated_of,
        modes=_usage(booked, lambda row: row.mode),
        tenants=_usage([row for row in booked if row.tenant], lambda row: row.tenant),
    )


def _usage(booked: Sequence[Booked], name_of: Callable[[Booked], str]) -> tuple[UsageReport, ...]:
    """Sums by name, the largest first; beyond the first fifty they are one row."""
    sums: defaultdict[str, list[int]] = defaultdict(lambda: [0] * 5)
    for row in booked:
        entry = sums[name_of(row)]
        if row.account == "requests":
            for i, value in enumerate((row.energy_mj, row.estimated_mj, row.static_mj, row.num_tokens)):
                entry[i] += value
        else:
            entry[4] += row.energy_mj
    ordered = sorted(sums.items(), key=lambda item: (-item[1][0] - item[1][4], item[0]))
    rows = ordered[:_USERS_SHOWN]
    if rest := [entry for _, entry in ordered[_USERS_SHOWN:]]:
        rows.append(("other", [sum(values) for values in zip(*rest, strict=True)]))
    return tuple(
        UsageReport(
            name=name,
            energy_mj=entry[0],
            estimated_mj=entry[1],
            static_mj=entry[2],
            num_tokens=entry[3],
            wasted_mj=entry[4],
        )
        for name, entry in rows
    )


def _coefficients(scheduler: Scheduler, fit: Fit | None) -> tuple[CoefficientReport, ...]:
    """By mode: as fitted, else as it began. None of them where nothing is metered."""
    if not scheduler.ledger.accounts():
        return ()
    fits = {one.mode: one for one in fit.modes} if fit is not None else {}
    reports = []
    for book in scheduler.fleet.books:
        one = fits.get(book.name)
        costs = scheduler.ledger.coefficients.get(book.name, Coefficients())
        report = CoefficientReport(
            mode=book.name,
            step_mj=costs.step_mj,
            prefill_mj_per_token=costs.prefill_mj_per_token,
            decode_mj_per_token=costs.decode_mj_per_token,
        )
        if one is not None:
            report = structs.replace(
                report,
                step_error_mj=one.standard_errors.step_mj,
                prefill_error_mj=one.standard_errors.prefill_mj_per_token,
                decode_error_mj=one.standard_errors.decode_mj_per_token,
                relative_error=one.relative_error,
                num_intervals=one.num_intervals,
                confidence=one.confidence,
            )
        reports.append(report)
    return tuple(reports)

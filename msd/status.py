"""The daemon's own status, gathered from whoever knows each part; read-only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from msgspec import structs

from msd import __version__
from msd.config import Config
from msd.core.scheduler import Scheduler
from msd.core.shadow import loss
from msd.engine.pool import EngineStatus
from msd.ports import Journal
from msd.wire import CertificateReport, DaemonStatus, EngineReport, LedgerReport, ModeReport

_REASONS_SHOWN = 8


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
        gpu=gpu,
        energy=tuple(
            LedgerReport(
                domain=a.domain,
                source=a.source,
                counter_mj=a.counter_mj,
                estimated_mj=a.estimated_mj,
                requests_mj=a.requests_mj,
                wasted_mj=a.wasted_mj,
                idle_mj=a.idle_mj,
                unattributed_mj=a.unattributed_mj,
                running_mj=a.running_mj,
                open_mj=a.open_mj,
                residue_mj=a.residue_mj,
                idle_w=a.idle_w,
            )
            for a in scheduler.ledger.accounts()
        ),
    )


def _engine(identity: Identity, scheduler: Scheduler, engine: EngineStatus, now_us: int) -> EngineReport:
    books = [book for book in scheduler.fleet.books if book.mode.engine == engine.engine]
    info = books[0].info
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
                num_live_pairs=0 if trial is None else trial.num_pairs,
                live_difference=None if trial is None else loss(trial),
                live_evidence=None if trial is None else trial.capital,
            )
        )
    return tuple(reports)

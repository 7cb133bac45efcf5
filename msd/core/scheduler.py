"""The scheduler: the only place where request state changes. `handle(event) -> list[Command]`, synchronous and pure.

A request goes APPENDING -> WAITING -> RUNNING -> COMPLETING -> closed, and each arrow is one method below. Time comes
on events, randomness from the seeded generator given at construction; there is no clock, no socket and no asyncio here.
After every event that frees a slot or adds work, `_fill` gives free slots to waiting requests in fair order.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from heapq import heapify, heappop, heappush
from random import Random
from typing import Literal, assert_never

from msd.config import Config, EnergyConfig, LimitsConfig, QualityConfig
from msd.core import commands as c
from msd.core import events as e
from msd.core.admission import Admission, Static, overflow_message
from msd.core.certificates import Certificates
from msd.core.commands import Command
from msd.core.entry import YIELDING, Entry, Phase
from msd.core.events import Event
from msd.core.features import Extractor
from msd.core.feedback import Feedback
from msd.core.fleet import Fleet, longest_context, mode_of
from msd.core.ledger import Account, Ledger, WasteReason, coefficients_of
from msd.core.lengths import overrun
from msd.core.queue import FairQueue
from msd.core.residency import Residency
from msd.core.router import Router
from msd.core.shadow import Shadows
from msd.domain import (
    YIELD,
    Candidate,
    Choice,
    Decision,
    Energy,
    FinishReason,
    GpuView,
    Mask,
    Mode,
    Outcome,
    Request,
    Timings,
    reasons_against,
)
from msd.gate import GateFile, Withdrawal
from msd.policy import make_policy
from msd.ports import Policy
from msd.profile import Profile
from msd.wire import ErrorCode

_DECISIONS_PER_EVENT = 64
_HELD_PER_EVENT = 4
_YIELDING_PER_EVENT = 8
_PASSED_AT_MOST = 16
"""Changes of the fleet during which others may pass a request that memory holds back; then they wait behind it."""
_EXPIRED_PER_EVENT = 1_000
_REVIEWS_PER_TICK = 32
_REVIEW_SLACK_US = 100_000
_REVIEW_MOST_US = 5_000_000
"""A parked request is asked again after its predicted wait, a quarter more and the slack, but at most after so long."""
_STALE_REVIEWS_ALLOWED = 1_024
_DUPLICATES_PER_REQUEST = 64
_STALE_DEADLINES_ALLOWED = 1_024
_STORE_FULL = "results of this tenant that nobody has fetched fill journal.max_result_bytes; fetch and acknowledge them"
_DRAINING = "the daemon is stopping; submit again when it is back"


class Counts:
    """Conservation: submitted = delivered + rejected + aborted + failed + duplicates + pending, at every step."""

    __slots__ = ("aborted", "delivered", "duplicates", "failed", "rejected", "restarts", "submitted")

    def __init__(self) -> None:
        self.submitted = 0
        self.delivered = 0
        self.rejected = 0
        self.aborted = 0
        self.failed = 0
        self.duplicates = 0
        self.restarts = 0


class Scheduler:
    """State of all open requests, and what to do next about them."""

    def __init__(
        self,
        modes: Sequence[tuple[Mode, int, int | None]],
        make_policy: Callable[[Sequence[Mode]], Policy],
        limits: LimitsConfig,
        energy: EnergyConfig,
        tenant_weights: dict[str, int],
        rng: Random,
        quality: QualityConfig | None = None,
        certificates: Certificates | None = None,
    ) -> None:
        """`modes`: each with its slots and, where already known, the longest context of its engine."""
        quality = quality or QualityConfig()
        self._limits = limits
        self.counts = Counts()
        self.certificates = certificates or Certificates([mode for mode, _, _ in modes], quality)
        known = self.certificates.modes
        self.fleet = Fleet([(known[arm], slots, longest) for arm, (_, slots, longest) in enumerate(modes)])
        self.ledger = Ledger(energy)
        self.queue = FairQueue(limits.class_weights, tenant_weights)
        self.admission = Admission(limits, self.fleet, self.certificates, quality.all_masked == "reference")
        self.shadows = Shadows(quality, self.certificates, self.fleet)
        self.decisions: deque[Decision] = deque(maxlen=limits.decisions_kept)
        self.reasons: Counter[tuple[str, str]] = Counter()
        """How often each (mode, reason) was decided; reasons are the policies' own, so they are few."""
        self.errors: Counter[str] = Counter()
        """Refusals and failures by error code."""
        self.idle_with_backlog_us = 0
        self._router = Router(self.fleet, make_policy(known), rng)
        self._feedback = Feedback(self.fleet, self._router)
        self._extractor = Extractor(self.fleet)
        self.residency: Residency | None = None
        """Only where an engine may move."""
        self._view: GpuView | None = None
        self._open: dict[str, Entry] = {}
        self._by_key: dict[tuple[str, str], Entry] = {}
        self._deadlines: list[tuple[int, int, Entry]] = []
        self._reviews: list[tuple[int, int, Entry]] = []
        """When those that are parked are asked again; an item whose entry says another time is stale."""
        self._vacant = 0
        """Bit set of the modes that have become idle since slots were last given."""
        self._num_repeats = 0
        self._next_seq = 1
        self._drain_until_us: int | None = None
        self._idle_since_us = -1
        self._out: list[Command] = []

    @classmethod
    def from_config(
        cls,
        config: Config,
        rng: Random,
        *,
        gate: GateFile | None = None,
        recipes: Mapping[str, str] | None = None,
        withdrawn: Sequence[Withdrawal] = (),
        profile: Profile | None = None,
        estimated_bytes: Mapping[str, int] | None = None,
    ) -> Scheduler:
        """A scheduler over the engines of `config`, each a mode. Raises ConfigError for an unknown policy or mode.

        `recipes`: hash of each engine's recipe (`msd.recipe.recipe_hashes`), by which `gate` knows them; `withdrawn`:
        what earlier runs of the daemon took away from it; `estimated_bytes`: GPU memory of each engine by its files.
        """
        modes = [(mode_of(engine), engine.max_num_seqs, longest_context(engine)) for engine in config.engine]
        weights = {tenant.name: tenant.weight for tenant in config.tenant}
        certificates = Certificates([mode for mode, _, _ in modes], config.quality, gate, recipes, withdrawn)
        made = cls(
            modes,
            partial(make_policy, config.policy),
            config.limits,
            config.energy,
            weights,
            rng,
            config.quality,
            certificates,
        )
        if profile is not None:
            made.fleet.profiled(profile)
            made.ledger.fitted(coefficients_of(profile))
        if any(engine.residency == "auto" for engine in config.engine):
            made._plan_residency(config, profile, estimated_bytes)
        return made

    def _plan_residency(
        self, config: Config, profile: Profile | None, estimated_bytes: Mapping[str, int] | None
    ) -> None:
        """Have the engines that may move brought and sent away by plan."""
        simulated = any(engine.kind == "sim" for engine in config.engine)
        self.residency = Residency(
            config.residency,
            config.policy.cost,
            config.engine,
            self.fleet,
            self._safe_modes,
            self._evict,
            lambda: (entry.eligible for entry in self.queue.entries()),
            profile=profile,
            total_bytes=config.telemetry.sim_memory_bytes if simulated else None,
            estimated_bytes=estimated_bytes,
        )

    # --- what others may look at ---------------------------------------------------------------------------------

    @property
    def num_pending(self) -> int:
        """Requests that were submitted and have no delivered terminal state yet, and repeats that await their ack."""
        return len(self._open) + self._num_repeats

    @property
    def policy_name(self) -> str:
        """The policy that decides."""
        return self._router.policy.name

    @property
    def view(self) -> GpuView | None:
        """The newest GPU view."""
        return self._view

    def entry(self, request_id: str) -> Entry | None:
        """The open request of that id, for reading only."""
        return self._open.get(request_id)

    def find(self, tenant: str, client_request_id: str) -> Entry | None:
        """The open request of that idempotency key, for reading only."""
        return self._by_key.get((tenant, client_request_id))

    def entries(self) -> list[Entry]:
        """All open requests, for the invariant checks."""
        return list(self._open.values())

    # --- the one entrance ----------------------------------------------------------------------------------------

    def handle(self, event: Event) -> list[Command]:
        """Take one event; return what the world must do next, in order."""
        out: list[Command] = []
        self._out = out
        match event:
            case e.Submitted():
                self._on_submitted(event)
            case e.Appended():
                self._on_appended(event)
            case e.FirstToken():
                self._on_first_token(event)
            case e.Finished():
                self._on_finished(event)
            case e.Completed():
                self._on_completed(event)
            case e.EngineStepped():
                self.fleet.stepped(event.t_us, event.engine, event.load, event.progress)
                for request_id, num_tokens in event.progress:
                    self.ledger.progress(event.t_us, request_id, num_tokens)
                    entry = self._open.get(request_id)
                    if entry is not None and num_tokens > entry.expected_p90_tokens:
                        self._on_overrun(entry, num_tokens)
            case e.CounterRead():
                self._settle(self.ledger.counter(event.reading))
            case e.ViewTaken():
                self._view = event.view
                self.ledger.viewed(event.view)
            case e.Tick():
                self._on_tick(event.t_us)
            case e.Cancelled():
                self._on_cancelled(event)
            case e.Failed():
                self._on_failed(event)
            case e.EngineStarting():
                self.ledger.work_started(event.t_us, _start_of(event.engine), event.engine)
            case e.EngineUp():
                self._on_engine_settled(event.t_us, event.info.engine)
                self.fleet.engine_up(event.info)
                if self.residency is not None:
                    self.residency.engine_up(event.t_us, event.info)
                self._extractor.engine_up(event.info)
                self.ledger.resident(self.fleet.resident())
                self._vacant |= self.fleet.modes_of(event.info.engine)
                self._fill(event.t_us)
            case e.EngineLost():
                self._on_engine_settled(event.t_us, event.engine)
                self.fleet.engine_lost(event.engine)
                if self.residency is not None:
                    self.residency.engine_lost(event.t_us, event.engine)
                self._extractor.engine_lost(event.engine)
                self.ledger.resident(self.fleet.resident())
                self._fill(event.t_us)
            case e.Refused():
                self.counts.submitted += 1
                self.counts.rejected += 1
                self.errors[event.error_code] += 1
            case e.AppendDuplicated():
                self._on_append_duplicated(event)
            case e.AppendFailed():
                self._on_append_failed(event)
            case e.Recovered():
                self._on_recovered(event)
            case e.CoefficientsFitted():
                self.ledger.fitted(event.coefficients)
                self.fleet.fitted(event.coefficients)
            case e.QualityJudged():
                self._on_quality_judged(event)
            case e.EngineAsleep():
                self._on_engine_settled(event.t_us, event.engine)
                if self.residency is not None:
                    self.residency.engine_left(event.t_us, event.engine, event.residence, event.took_s)
                self._extractor.engine_lost(event.engine)
                self.ledger.resident(self.fleet.resident())
                self._fill(event.t_us)
            case e.ConfigChanged():
                modes = [book.mode for book in self.fleet.books]
                self._router.policy = make_policy(event.policy, modes)
                self._unpark([entry for entry in self.queue.entries() if entry.parked != -1])
                self._fill(event.t_us)
            case e.Draining():
                self._drain_until_us = event.until_us
                self._on_tick(event.t_us)
            case _:
                assert_never(event)
        return out

    # --- in ------------------------------------------------------------------------------------------------------

    def _on_submitted(self, event: e.Submitted) -> None:
        request = event.request
        self.counts.submitted += 1
        self._extractor.arrivals.note(event.t_us)
        existing = self._by_key.get((request.tenant, request.client_request_id))
        if existing is not None:
            # Also while draining: the first one was accepted, and its answer is still to come.
            self._on_repeated(request, existing)
            return
        if self._drain_until_us is not None:
            left_ms = max(1, (self._drain_until_us - event.t_us) // 1000)
            self._reject(request.request_id, "draining", _DRAINING, left_ms)
            return
        if event.store_is_full:
            self._reject(request.request_id, "queue_full", _STORE_FULL, 1_000)
            return
        static = self.admission.masks(request)
        refusal = self.admission.refuse(request, static, self.queue.num_waiting)
        if refusal is not None:
            self._reject(request.request_id, refusal.error_code, refusal.message, refusal.retry_after_ms)
            return
        entry = self._admit(request, static)
        self._out.append(c.Append(entry.request.request_id))

    def _on_repeated(self, request: Request, existing: Entry) -> None:
        existing_id = existing.request.request_id
        if existing.request.content_hash != request.content_hash:
            self._reject(
                request.request_id,
                "idempotency_conflict",
                f"client_request_id {request.client_request_id!r} is in use by a request with another body",
            )
        elif existing.phase is not Phase.APPENDING:
            self.counts.duplicates += 1
            state = "waiting" if existing.phase is Phase.WAITING else "running"
            self._out.append(c.AckDuplicate(request.request_id, existing_id, state))
        elif len(existing.duplicates) < _DUPLICATES_PER_REQUEST:
            # The first one is not stored yet: a repeat must not be promised what the original was not.
            existing.duplicates.append(request.request_id)
            self._num_repeats += 1
        else:
            self._reject(request.request_id, "queue_full", "too many repeats of one request at once", 100)

    def _admit(self, request: Request, static: Static) -> Entry:
        entry = Entry(request, static.masks, static.eligible)
        entry.falls_back = static.falls_back
        self._feedback.expect_length(entry)
        self._open[request.request_id] = entry
        self._by_key[(request.tenant, request.client_request_id)] = entry
        self.admission.reserve(entry)
        if self.residency is not None:
            self.residency.arrived(request.num_prompt_tokens, entry.expected_tokens, entry.eligible)
        return entry

    def _on_recovered(self, event: e.Recovered) -> None:
        request = event.request
        self.counts.submitted += 1
        static = self.admission.masks(request)
        entry = self._admit(request, static)
        if not static.eligible:
            refusal = self.admission.unreachable(request, static.masks)
            self._end(entry, event.t_us, refusal.error_code, refusal.message)
        elif self._drain_until_us is not None:
            self._end(entry, event.t_us, "draining", _DRAINING)
        else:
            self._enqueue(entry, event.t_us)
            self._fill(event.t_us)

    def _on_appended(self, event: e.Appended) -> None:
        entry = self._open[event.request_id]
        self._out.append(c.Ack(event.request_id, event.seq))
        self._ack_repeats(entry)
        if entry.abort_reason == "cancel":
            self._end_unrun(entry, event.t_us)
        elif self._drain_until_us is not None:
            self._end(entry, event.t_us, "draining", _DRAINING)
        else:
            self._enqueue(entry, event.t_us)
            self._fill(event.t_us)

    def _ack_repeats(self, entry: Entry) -> None:
        for repeat_id in entry.duplicates:
            self.counts.duplicates += 1
            self._out.append(c.AckDuplicate(repeat_id, entry.request.request_id, "waiting"))
        self._num_repeats -= len(entry.duplicates)
        entry.duplicates.clear()

    def _on_append_duplicated(self, event: e.AppendDuplicated) -> None:
        entry = self._open[event.request_id]
        for request_id in (event.request_id, *entry.duplicates):
            if entry.request.content_hash == event.content_hash:
                self.counts.duplicates += 1
                self._out.append(c.AckDuplicate(request_id, event.existing_id, "finished"))
            else:
                key = entry.request.client_request_id
                message = f"client_request_id {key!r} is in use by a finished request with another body"
                self._reject(request_id, "idempotency_conflict", message)
        self._forget(entry)

    def _on_append_failed(self, event: e.AppendFailed) -> None:
        entry = self._open[event.request_id]
        for request_id in (event.request_id, *entry.duplicates):
            self._reject(request_id, "journal_unavailable", f"{event.message}; submit again with the same id", 1_000)
        self._forget(entry)

    def _forget(self, entry: Entry) -> None:
        """An entry that was never accepted leaves the books."""
        entry.phase = Phase.CLOSED
        self._num_repeats -= len(entry.duplicates)
        self.admission.release(entry)
        del self._open[entry.request.request_id]
        del self._by_key[(entry.request.tenant, entry.request.client_request_id)]

    def _reject(self, request_id: str, code: ErrorCode, message: str, retry_after_ms: int | None = None) -> None:
        self.counts.rejected += 1
        self.errors[code] += 1
        self._out.append(c.Reject(request_id, code, message, retry_after_ms))

    # --- waiting -------------------------------------------------------------------------------------------------

    def _enqueue(self, entry: Entry, t_us: int) -> None:
        if not entry.eligible:
            # The last mode that might serve it lost its certificate while it was stored, waited or ran.
            entry.phase = Phase.APPENDING
            refusal = self.admission.unreachable(entry.request, entry.static_masks)
            self._end(entry, t_us, refusal.error_code, refusal.message)
            return
        entry.phase = Phase.WAITING
        if not entry.seq:
            entry.seq = self._next_seq
            self._next_seq += 1
        if entry.request.deadline_us is not None:
            # Also for a retry: its first item may have surfaced, unheeded, while it ran.
            heappush(self._deadlines, (entry.request.deadline_us, entry.seq, entry))
        self.queue.push(entry)

    def _review(self, t_us: int) -> None:
        """Those whose mode has not come in the time that was predicted are open to all modes again."""
        reviews = self._reviews
        due: list[Entry] = []
        for _ in range(_EXPIRED_PER_EVENT):
            if not reviews or reviews[0][0] > t_us or len(due) >= _REVIEWS_PER_TICK:
                break
            review_us, seq, entry = heappop(reviews)
            if entry.phase is not Phase.WAITING or entry.parked < 0 or entry.review_us != review_us:
                continue
            if entry.eligible & self.fleet.up & ~(1 << entry.parked):
                entry.review_us = 0
                due.append(entry)
            else:
                # There is no other mode.
                entry.review_us = t_us + _REVIEW_MOST_US
                heappush(reviews, (entry.review_us, seq, entry))
        if due:
            self._unpark(due)
        if len(reviews) > 2 * self.queue.num_waiting + _STALE_REVIEWS_ALLOWED:
            self._reviews = [
                item for item in reviews if item[2].phase is Phase.WAITING and item[2].review_us == item[0]
            ]
            heapify(self._reviews)

    def _unpark(self, parked: list[Entry]) -> None:
        """What made these wait for one mode is no longer true: all modes are open to them again."""
        for entry in parked:
            entry.phase = Phase.APPENDING
        self.queue.withdraw(parked)
        for entry in parked:
            if entry.parked >= 0:
                self.fleet.unpark(entry.parked)
            entry.parked = entry.held_at = -1
            entry.phase = Phase.WAITING
            self.queue.push(entry)

    def _fill(self, t_us: int) -> None:
        """Give free slots to waiting requests, in fair order, until none is left that a free mode may serve."""
        fleet, queue = self.fleet, self.queue
        held: list[Entry] = []
        closed = 0
        for _ in range(_DECISIONS_PER_EVENT if self._drain_until_us is None else 0):
            free = fleet.free & ~closed
            if not free or not queue.num_waiting:
                break
            entry = queue.pop(free, fleet.up) or queue.pop(free, fleet.up, yielding=True)
            is_asked_again = entry is None
            if entry is None and self._vacant & free:
                # Perhaps one that waits for a busy mode would now take an idle one: as if all busy ones were down.
                entry = queue.pop(self._vacant & free, 0)
            if entry is None:
                break
            yielding = entry.parked == YIELDING
            moment = fleet.num_changes + fleet.num_first_tokens if yielding else fleet.num_changes
            if entry.held_at != moment and self._route(entry, t_us):
                if is_asked_again and entry.phase is Phase.WAITING:
                    # It would not, and so would hardly those behind it.
                    self._vacant = 0
                continue
            if yielding:
                held.append(entry)
                if len(held) >= _YIELDING_PER_EVENT:
                    break
                continue
            # Memory holds it back: it stays first in line, and a few behind it that fit may pass, for a while.
            held.append(entry)
            if entry.held_at != fleet.num_changes:
                entry.held_at = fleet.num_changes
                entry.num_held += 1
            if len(held) >= _HELD_PER_EVENT or entry.num_held > _PASSED_AT_MOST:
                closed |= entry.eligible
        for entry in held:
            queue.push(entry)
        self._vacant = 0
        if self.shadows.num_running:
            self._out += self.shadows.make_way(queue.num_waiting, at_once=self._drain_until_us is not None)
        self._note_idleness(t_us)

    def _route(self, entry: Entry, t_us: int) -> bool:
        """Decide one request that was just taken from the queue. False: no room for it at this moment."""
        if entry.parked >= 0:
            self.fleet.unpark(entry.parked)
        entry.parked = -1
        deadline_us = entry.request.deadline_us
        if deadline_us is not None and deadline_us <= t_us:
            # The tick that looks at deadlines comes later; no slot for an answer that is late already.
            self._withdraw(entry)
            self._expire(entry, t_us)
            return True
        features = self._extractor.features(entry, t_us, self.queue.num_waiting, self._view)
        candidates = self._router.candidates(entry, features)
        choice = self._router.choose(features, candidates, entry.request.mode_hint)
        if choice is None:
            return self._set_aside(entry, t_us, candidates)
        arm = choice.arm
        if arm == YIELD:
            # Asked again when something has changed, after those that have not yielded.
            entry.parked = YIELDING
            entry.held_at = self.fleet.num_changes + self.fleet.num_first_tokens
            self.queue.push(entry)
            return True
        if entry.falls_back:
            choice = Choice(arm, 1.0, "the reference mode: quality forbids every other")
        if candidates[arm].mask:
            # The policy would rather wait for a busy mode. It is asked again when that mode has a slot, when another
            # becomes idle, or when the wait was longer than it thought.
            entry.parked = arm
            wait_us = candidates[arm].queue_ms * 1_250.0 + _REVIEW_SLACK_US
            entry.review_us = t_us + int(min(wait_us, _REVIEW_MOST_US))
            heappush(self._reviews, (entry.review_us, entry.seq, entry))
            self.fleet.park(arm)
            self.queue.push(entry)
            return True
        decision = self._router.decide(entry, t_us, features, candidates, choice, self._view)
        self.queue.charge(entry)
        self._dispatch(entry, t_us, arm, decision)
        return True

    def _set_aside(self, entry: Entry, t_us: int, candidates: list[Candidate]) -> bool:
        """Every mode is masked. A context too short is for good: such modes no longer count as able to serve it."""
        for i, candidate in enumerate(candidates):
            if candidate.mask & Mask.CONTEXT:
                entry.eligible &= ~(1 << i)
        if not entry.eligible:
            self._withdraw(entry)
            self._end(entry, t_us, "context_overflow", overflow_message(entry.request, self.fleet))
            return True
        if entry.eligible & self.fleet.free:
            return False
        self.queue.push(entry)
        return True

    def _dispatch(self, entry: Entry, t_us: int, arm: int, decision: Decision) -> None:
        request = entry.request
        entry.phase = Phase.RUNNING
        entry.parked = arm
        entry.attempt = decision.attempt
        entry.decision = decision
        entry.dispatched_us = t_us
        entry.first_token_us = 0
        entry.num_cached_tokens = 0
        entry.reserved_tokens = request.num_prompt_tokens + entry.expected_p90_tokens
        self.admission.release(entry)
        expected = decision.candidates[arm]
        self.fleet.dispatched(arm, entry, t_us, expected.e2el_ms, expected.ttft_ms, expected.prompt_ms)
        self._extractor.dispatched(entry, arm)
        self.ledger.started(t_us, request.request_id, decision.mode, request.num_prompt_tokens)
        self.decisions.append(decision)
        self.reasons[(decision.mode, decision.reason)] += 1
        self._out.append(c.Dispatch(request.request_id, decision.attempt, decision, t_us - entry.waiting_since_us))

    # --- running -------------------------------------------------------------------------------------------------

    def _current(self, request_id: str, attempt: int) -> Entry | None:
        """The running entry that an engine's report is about; None when the report is of an older attempt."""
        entry = self._open.get(request_id)
        if entry is None or entry.phase is not Phase.RUNNING or entry.attempt != attempt:
            return None
        return entry

    def _on_first_token(self, event: e.FirstToken) -> None:
        entry = self._current(event.request_id, event.attempt)
        if entry is None:
            if self.shadows.knows(event.request_id):
                self.ledger.first_token(event.t_us, event.request_id, event.num_cached_tokens)
        else:
            entry.first_token_us = event.t_us
            entry.num_cached_tokens = event.num_cached_tokens
            self._extractor.first_token(entry, event.num_cached_tokens)
            self.fleet.first_token(entry, event.t_us)
            self.ledger.first_token(event.t_us, event.request_id, event.num_cached_tokens)
            if self.queue.num_waiting:
                # A prompt less to read: what yielded to it may be asked again.
                self._fill(event.t_us)

    def _on_overrun(self, entry: Entry, num_tokens: int) -> None:
        """It has generated more than nine of ten of its class do: expect more, and reserve memory for it."""
        expected = overrun(num_tokens, entry.request.max_tokens)
        num_more = expected - entry.expected_p90_tokens
        if entry.phase is Phase.RUNNING and num_more > 0:
            self.fleet.reserve(entry.parked, num_more)
            entry.reserved_tokens += num_more
            entry.expected_tokens = entry.expected_p90_tokens = expected

    def _on_finished(self, event: e.Finished) -> None:
        entry = self._current(event.request_id, event.attempt)
        if entry is None:
            return
        t_us, num_tokens = event.t_us, event.num_completion_tokens
        if event.finish_reason != "abort":
            energy = self._vacate(entry, t_us, num_tokens)
            self._shadow(entry, t_us)
            self._complete(entry, t_us, event.finish_reason, num_tokens, energy)
            self._feedback.finished(entry, t_us, event.finish_reason, num_tokens, energy is not None, self._out)
        else:
            is_moved = entry.abort_reason == "move"
            goes_on = is_moved and self._drain_until_us is None
            energy = self._vacate(entry, t_us, num_tokens, wasted="restarted" if goes_on else "aborted")
            self._feedback.aborted(entry, num_tokens)
            if goes_on:
                entry.num_moves += 1
                self._restart(entry, t_us, "engine_left")
            elif is_moved:
                self._end(entry, t_us, "draining", "its engine had to leave while the daemon was stopping", energy)
            elif entry.abort_reason in ("", "cancel"):
                self._complete(entry, t_us, "abort", num_tokens, energy)
            else:
                message = "aborted: the daemon stopped before the request finished"
                self._end(entry, t_us, entry.abort_reason, message, energy)
        self._fill(t_us)

    def _on_failed(self, event: e.Failed) -> None:
        entry = self._current(event.request_id, event.attempt)
        if entry is None:
            return
        t_us = event.t_us
        is_cancelled = entry.abort_reason == "cancel"
        is_given_up = entry.attempt - entry.num_moves >= self._limits.max_attempts
        goes_on = event.lost and not is_cancelled and not is_given_up and self._drain_until_us is None
        wasted: WasteReason = "restarted" if goes_on else "aborted" if event.lost and is_cancelled else "failed"
        energy = self._vacate(entry, t_us, 0, wasted=wasted)
        if event.lost and entry.decision is not None:
            # The pool reports EngineLost only after all of its attempts: nothing may be sent there meanwhile.
            self.fleet.engine_lost(entry.decision.engine)
        if goes_on:
            self._restart(entry, t_us, "engine_lost")
        elif not event.lost:
            self._end(entry, t_us, event.error_code, event.message, energy)
        elif is_cancelled:
            self._end_unrun(entry, t_us, energy)
        elif is_given_up:
            message = f"its engine died in each of {entry.attempt} attempts; the last: {event.message}"
            self._end(entry, t_us, "dead_letter", message, energy)
        else:
            self._end(entry, t_us, "draining", "its engine was lost while the daemon was stopping", energy)
        self._fill(t_us)

    def _vacate(
        self, entry: Entry, t_us: int, num_tokens: int, *, wasted: WasteReason | Literal[""] = ""
    ) -> Energy | None:
        """The attempt left its engine; `wasted` says why nobody receives its work. Returns its provisional energy."""
        self.fleet.vacated(entry, t_us)
        if not self.fleet.books[entry.parked].num_running:
            self._vacant |= 1 << entry.parked
        self._extractor.ended(entry.parked, num_tokens)
        request = entry.request
        account: Account = "wasted" if wasted else "requests"
        return self.ledger.ended(t_us, request.request_id, account, wasted, request.tenant, num_tokens)

    def _settle(self, settled: list[tuple[str, Energy]]) -> None:
        for request_id, energy in settled:
            self._feedback.settled(request_id, energy, self._out)
            self._out.append(c.Settle(request_id, energy))

    # --- quality in production -----------------------------------------------------------------------------------

    def _shadow(self, entry: Entry, t_us: int) -> None:
        """The entry has its answer: perhaps the reference mode answers it too. Before its Complete."""
        if self._drain_until_us is not None:
            return
        shadow = self.shadows.begin(entry, self.queue.num_waiting)
        if shadow is not None:
            self.ledger.started(t_us, shadow.shadow_id, shadow.reference_mode, entry.request.num_prompt_tokens)
            self._out.append(shadow)

    def _on_quality_judged(self, event: e.QualityJudged) -> None:
        if self.shadows.knows(event.shadow_id):
            self.ledger.ended(event.t_us, event.shadow_id, "wasted", "shadow", num_tokens=event.num_tokens)
        withdrawal = self.shadows.judged(event)
        if withdrawal is not None:
            self._out.append(c.Withdraw(withdrawal))
            self._remask(event.t_us)
            self._fill(event.t_us)

    def _remask(self, t_us: int) -> None:
        """A mode lost a certificate: nobody who still waits is sent there. Rare, so all open requests are looked at."""
        self.admission.forget_masks()
        changed = [
            (entry, static)
            for entry in self._open.values()
            if (static := self.admission.masks(entry.request)).masks != entry.static_masks
        ]
        waiting = [entry for entry, _ in changed if entry.phase is Phase.WAITING]
        for entry in waiting:
            entry.phase = Phase.APPENDING
        self.queue.withdraw(waiting)
        for entry, static in changed:
            entry.static_masks, entry.eligible, entry.falls_back = static.masks, static.eligible, static.falls_back
        for entry in waiting:
            if entry.parked >= 0:
                self.fleet.unpark(entry.parked)
                entry.parked = -1
            self._enqueue(entry, t_us)

    # --- out -----------------------------------------------------------------------------------------------------

    def _complete(
        self, entry: Entry, t_us: int, finish_reason: FinishReason, num_tokens: int, energy: Energy | None
    ) -> None:
        """The request ran and has an answer (or was aborted while running): store it."""
        request, decision = entry.request, entry.decision
        assert decision is not None
        received_us, first_us = request.received_us, entry.first_token_us
        outcome = Outcome(
            request_id=request.request_id,
            attempt=entry.attempt,
            finish_reason=finish_reason,
            mode=decision.mode,
            decision_id=decision.decision_id,
            reason=decision.reason,
            num_prompt_tokens=request.num_prompt_tokens,
            num_cached_tokens=entry.num_cached_tokens,
            num_completion_tokens=num_tokens,
            timings=Timings(
                queue_ms=(entry.dispatched_us - received_us) * 0.001,
                ttft_ms=(first_us - received_us) * 0.001 if first_us else 0.0,
                tpot_ms=(t_us - first_us) * 0.001 / (num_tokens - 1) if first_us and num_tokens > 1 else 0.0,
                engine_ms=(t_us - entry.dispatched_us) * 0.001,
                e2e_ms=(t_us - received_us) * 0.001,
            ),
            energy=energy,
        )
        self._store(entry, outcome, "aborted" if finish_reason == "abort" else "delivered")

    def _end_unrun(self, entry: Entry, t_us: int, energy: Energy | None = None) -> None:
        """A cancelled request that does not run: an abort without tokens."""
        request = entry.request
        waited_ms = (t_us - request.received_us) * 0.001
        reason = "cancelled after its engine was lost" if entry.attempt else "cancelled before it ran"
        outcome = Outcome(
            request_id=request.request_id,
            attempt=entry.attempt,
            finish_reason="abort",
            reason=reason,
            num_prompt_tokens=request.num_prompt_tokens,
            timings=Timings(queue_ms=waited_ms, e2e_ms=waited_ms),
            energy=energy,
        )
        self._store(entry, outcome, "aborted")

    def _end(self, entry: Entry, t_us: int, code: str, message: str, energy: Energy | None = None) -> None:
        """The request failed for good; `energy`: what its last attempt used."""
        self.errors[code] += 1
        outcome = Outcome(
            request_id=entry.request.request_id,
            attempt=entry.attempt,
            finish_reason=None,
            error_code=code,
            message=message,
            num_prompt_tokens=entry.request.num_prompt_tokens,
            timings=Timings(e2e_ms=(t_us - entry.request.received_us) * 0.001),
            energy=energy,
        )
        self._store(entry, outcome, "failed")

    def _expire(self, entry: Entry, t_us: int) -> None:
        waited_ms = (t_us - entry.request.received_us) * 0.001
        message = f"waited {waited_ms:.0f} ms, past its deadline"
        masks = self._router.masks(entry)
        if all(masks):
            modes = zip(self.fleet.books, masks, strict=True)
            why = ", ".join(f"{book.name} ({'; '.join(reasons_against(mask))})" for book, mask in modes)
            message = f"{message}; no mode could take it: {why}"
        self._end(entry, t_us, "deadline_exceeded", message)

    def _withdraw(self, entry: Entry) -> None:
        """The entry waits no more, and will not run: its place in the bounds is free."""
        entry.phase = Phase.COMPLETING
        self.admission.release(entry)

    def _store(self, entry: Entry, outcome: Outcome, kind: str) -> None:
        if entry.phase is Phase.WAITING:
            self._withdraw(entry)
            self.queue.discard(entry)
            if entry.parked >= 0:
                self.fleet.unpark(entry.parked)
        elif entry.phase is Phase.APPENDING:
            self._withdraw(entry)
        entry.phase = Phase.COMPLETING
        entry.outcome_kind = kind
        self._out.append(c.Complete(outcome))

    def _on_completed(self, event: e.Completed) -> None:
        entry = self._open.pop(event.request_id)
        assert entry.phase is Phase.COMPLETING, "stored a terminal state that was not asked for"
        entry.phase = Phase.CLOSED
        del self._by_key[(entry.request.tenant, entry.request.client_request_id)]
        match entry.outcome_kind:
            case "delivered":
                self.counts.delivered += 1
            case "aborted":
                self.counts.aborted += 1
            case _:
                self.counts.failed += 1
        self._out.append(c.Deliver(event.request_id, event.seq))
        if len(self._deadlines) > 2 * len(self._open) + _STALE_DEADLINES_ALLOWED:
            self._deadlines = [item for item in self._deadlines if item[2].phase is Phase.WAITING]
            heapify(self._deadlines)

    # --- ends from outside ---------------------------------------------------------------------------------------

    def _on_cancelled(self, event: e.Cancelled) -> None:
        entry = self._open.get(event.request_id)
        if entry is None or entry.abort_reason not in ("", "move"):
            return
        is_aborted = entry.abort_reason == "move"
        entry.abort_reason = "cancel"
        if entry.phase is Phase.WAITING:
            self._end_unrun(entry, event.t_us)
            self._note_idleness(event.t_us)
        elif entry.phase is Phase.RUNNING and not is_aborted:
            self._out.append(c.Abort(event.request_id, entry.attempt))

    def _on_tick(self, t_us: int) -> None:
        deadlines = self._deadlines
        for _ in range(_EXPIRED_PER_EVENT):
            if not deadlines or deadlines[0][0] > t_us:
                break
            entry = heappop(deadlines)[2]
            if entry.phase is Phase.WAITING:
                self._expire(entry, t_us)
        if self._drain_until_us is not None:
            self._drain(t_us)
        else:
            self._review(t_us)
            if self.residency is not None:
                for command in self.residency.tick(t_us, self._view):
                    self._on_transit(t_us, command)
        self._settle(self.ledger.expire(t_us))
        self._fill(t_us)

    def _safe_modes(self, model: str) -> int:
        """Bit set of the modes that may serve a request of this model whose task is not known."""
        probe = Request(
            request_id="", client_request_id="", tenant="", content_hash=b"", received_us=0, num_prompt_tokens=1,
            max_tokens=1, model=model,
        )  # fmt: skip
        return self.admission.masks(probe).eligible

    # --- engines that come and go --------------------------------------------------------------------------------

    def _on_transit(self, t_us: int, command: c.Transit) -> None:
        """An engine moves: work that no request asked for. A start books itself."""
        assert self.residency is not None, "an engine moves without a plan"
        if command.to != "resident" or self.residency.residence_of(command.engine)[0] == "asleep":
            self.ledger.work_started(t_us, _switch_of(command.engine), command.engine)
        self._out.append(command)

    def _on_engine_settled(self, t_us: int, engine: str) -> None:
        """What an engine did on nobody's behalf is over."""
        by_plan = self.residency is not None and self.residency.is_switching(engine)
        self.ledger.ended(t_us, _start_of(engine), "wasted", "switch" if by_plan else "warmup")
        self.ledger.ended(t_us, _switch_of(engine), "wasted", "switch")

    def _evict(self, engine: str) -> int:
        """Abort what runs on an engine that has to leave; it goes back to the queue."""
        num = 0
        for entry in self._open.values():
            decision = entry.decision
            if decision is None or decision.engine != engine or entry.phase is not Phase.RUNNING:
                continue
            if not entry.abort_reason:
                entry.abort_reason = "move"
                num += 1
                self._out.append(c.Abort(entry.request.request_id, entry.attempt))
        return num

    def _restart(self, entry: Entry, t_us: int, reason: str) -> None:
        """The attempt came to nothing, and not by the request: it waits again."""
        self.counts.restarts += 1
        entry.parked = -1
        entry.abort_reason = ""
        entry.waiting_since_us = t_us
        self.admission.reserve(entry)
        self._out.append(c.Restart(entry.request.request_id, entry.attempt + 1, reason))
        self._enqueue(entry, t_us)

    def _drain(self, t_us: int) -> None:
        """What waits is answered; what runs may go on until the limit, then it is aborted. Once per request."""
        assert self._drain_until_us is not None
        waiting = []
        for entry in self.queue.entries():
            waiting.append(entry)
            if len(waiting) >= _EXPIRED_PER_EVENT:
                break
        for entry in waiting:
            self._end(entry, t_us, "draining", "the daemon stopped before the request ran; submit it again")
        if t_us >= self._drain_until_us:
            for entry in self._open.values():
                if entry.phase is Phase.RUNNING and entry.abort_reason in ("", "move"):
                    entry.abort_reason = "draining"
                    self._out.append(c.Abort(entry.request.request_id, entry.attempt))

    # --- figures -------------------------------------------------------------------------------------------------

    def _note_idleness(self, t_us: int) -> None:
        """Add up the time in which requests wait although an engine is up and nothing runs (it must stay near 0).

        While draining what waits is not to run; there it would only measure how long the drain takes.
        """
        if self._idle_since_us >= 0:
            self.idle_with_backlog_us += t_us - self._idle_since_us
            self._idle_since_us = -1
        if not self.fleet.num_running and self.queue.num_waiting and self.fleet.up and self._drain_until_us is None:
            self._idle_since_us = t_us


def _switch_of(engine: str) -> str:
    """The ledger's owner of an engine's way to sleep and back."""
    return f"switch of {engine}"


def _start_of(engine: str) -> str:
    """The ledger's owner of an engine's start."""
    return f"start of {engine}"

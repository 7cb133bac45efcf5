"""The scheduler under arbitrary interleavings: whatever happens in whatever order, its books add up.

Hypothesis plays producers, journal, engines and counters, each answering when it likes; after every step the
scheduler's own books are compared with a recount from its open entries and from what the world has seen.
"""

from __future__ import annotations

import os
from collections import Counter

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from msd.config import PolicyConfig
from msd.core import commands as c
from msd.core import events as e
from msd.core.energy_domain import Coefficients
from msd.core.entry import YIELDING, Entry, Phase
from msd.domain import CounterReading, EngineLoad, ExitKind, Request
from msd.gate import ALL_TASKS
from tests.unit.core_world import CoreWorld, gate_of, make_config

TENANTS = ("anna", "ben", "carla")
CLASSES = ("interactive", "standard", "batch")
QUALITIES = (None, 0.5, 0.9)
CONTEXTS = (64, 200)
POLICIES = ("cost", "fixed", "random", "round_robin", "rules")
WEIGHTS_BYTES = 10**9
MOST_ROUNDS = 300

submits = st.fixed_dictionaries(
    {
        "tenant": st.sampled_from(TENANTS),
        "service_class": st.sampled_from(CLASSES),
        "priority": st.integers(0, 2),
        "num_prompt_tokens": st.integers(1, 150),
        "max_tokens": st.integers(1, 60),
    },
    optional={
        "deadline_ms": st.integers(1, 200),
        "model": st.sampled_from(("toy", "other", "nonesuch")),
        "mode_hint": st.sampled_from(("m0", "m1", "m9")),
        "mode_strict": st.booleans(),
        "quality_floor": st.sampled_from((0.0, 0.6, 0.95)),
        "task": st.sampled_from(("gsm8k", "gpqa")),
        "session_id": st.just("s"),
        "ignore_eos": st.booleans(),
    },
)


class SchedulerMachine(RuleBasedStateMachine):
    """Rules are what may happen; invariants are what must hold."""

    @initialize(
        modes=st.integers(1, 4),
        slots=st.integers(1, 3),
        policy=st.sampled_from(POLICIES),
        kv_capacity_tokens=st.sampled_from((120, 300, 100_000)),
        traits=st.lists(
            st.tuples(
                st.sampled_from(QUALITIES), st.sampled_from(CONTEXTS), st.booleans(), st.sampled_from(("int4", "bf16"))
            ),
            min_size=4,
            max_size=4,
        ),
        contexts_known=st.booleans(),
        memory_for=st.sampled_from((0, 0, 1, 2)),
        is_gated=st.booleans(),
    )
    def begin(
        self,
        modes: int,
        slots: int,
        policy: str,
        kv_capacity_tokens: int,
        traits: list[tuple[float | None, int, bool, str]],
        contexts_known: bool,
        memory_for: int,
        is_gated: bool,
    ) -> None:
        """`memory_for`: so many engines are up at once, by plan; 0: they stay. `is_gated`: with certificates."""
        self.memory_for = memory_for
        self.contexts = {f"m{i}": context for i, (_, context, _, _) in enumerate(traits)}
        self.qualities = {f"m{i}": quality for i, (quality, _, _, _) in enumerate(traits)}
        self.models = {f"m{i}": "other" if other else "toy" for i, (_, _, other, _) in enumerate(traits)}
        engines: dict[str, dict[str, object]] = {
            f"m{i}": {
                "model": self.models[f"m{i}"],
                "quality": quality,
                "precision": precision,
                "sim": {"max_model_len": context, "weights_bytes": WEIGHTS_BYTES},
                "residency": "auto" if memory_for else "always",
            }
            for i, (quality, context, _, precision) in enumerate(traits)
        }
        if not contexts_known and not memory_for:
            for engine in engines.values():
                engine["kind"] = "noop"
        limits = {"max_waiting": 12, "max_waiting_tokens": 1_500, "max_waiting_per_tenant": 8, "max_attempts": 2}
        config = make_config(
            modes=modes,
            slots=slots,
            policy=policy,
            engines=engines,
            limits=limits,
            quality={"shadow_share": 1.0},
            residency={"plan_interval_s": 0.05, "min_dwell_s": 0.1, "drain_s": 0.05, "reserve_bytes": 0},
            telemetry={"sim_memory_bytes": memory_for * WEIGHTS_BYTES if memory_for else 80 * 10**9},
        )
        gate = None
        self.is_gated = is_gated
        if is_gated:
            gate = gate_of({f"m{i}": {"*": "certified", "gsm8k": "certified", "gpqa": "undecided"} for i in (1, 2, 3)})
        self.world = CoreWorld(config, up=False, kv_capacity_tokens=kv_capacity_tokens, gate=gate)
        self.world.hold_appends = self.world.hold_completes = self.world.hold_aborts = True
        self.scheduler = self.world.scheduler
        self.slots = slots
        self.names = set(self.contexts) & {engine.name for engine in config.engine}
        self.down = set() if memory_for else set(self.names)
        self.transits: dict[str, c.Transit] = {}
        self.shadows: dict[str, c.Shadow] = {}
        self.withdrawn: set[tuple[str, str]] = set()
        self.up: set[str] = set()
        self.dying: set[str] = set()
        self.old_attempts: list[tuple[str, int]] = []
        self.counter_mj = 0
        self.counted_us = 0
        self.num_seen = 0
        self.restarts: Counter[str] = Counter()
        self.moves: Counter[str] = Counter()
        self.aborts: Counter[tuple[str, int]] = Counter()
        self.acked: set[str] = set()
        self.repeated: set[str] = set()
        self.submitted: set[str] = set()
        self.is_draining = False

    # --- producers -----------------------------------------------------------------------------------------------

    @rule(fields=submits)
    def submit(self, fields: dict[str, object]) -> None:
        self.submitted.add(self.world.submit(**fields))

    @precondition(lambda self: self.world.requests)
    @rule(data=st.data(), other_body=st.booleans())
    def repeat(self, data: st.DataObject, other_body: bool) -> None:
        first = self.world.requests[data.draw(st.sampled_from(sorted(self.world.requests)))]
        again = self.world.submit(
            tenant=first.tenant,
            client_request_id=first.client_request_id,
            content_hash=b"other" if other_body else first.content_hash,
        )
        self.submitted.add(again)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.world.cancel(data.draw(st.sampled_from([*sorted(self.world.requests), "unknown"])))

    @rule(fields=submits)
    def recover(self, fields: dict[str, object]) -> None:
        self.submitted.add(self.world.recover(**fields))

    @rule(fields=submits, num=st.integers(1, 4))
    def serve(self, fields: dict[str, object], num: int) -> None:
        """Whole lives at once: chance alone seldom takes a request to its end."""
        for _ in range(num):
            request_id = self.world.submit(**fields)
            self.submitted.add(request_id)
            if request_id in self.world.appending:
                self.world.appended(request_id)
            if request_id in self.world.running and request_id not in self.world.aborting:
                self.world.t_us += 20_000
                self.world.first_token(request_id)
                self.world.finish(request_id, "stop", 3)
            # Before its terminal state is stored, as in `commands_were_allowed`.
            self.commands_were_allowed()
            if request_id in self.world.completing:
                self.world.completed(request_id)

    # --- the journal ---------------------------------------------------------------------------------------------

    @precondition(lambda self: self.world.appending)
    @rule(data=st.data(), how=st.sampled_from(("stored", "stored", "stored", "failed", "duplicate", "conflict")))
    def answer_append(self, data: st.DataObject, how: str) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.world.appending)))
        if how == "stored":
            self.world.appended(request_id)
        elif how == "failed":
            self.world.append_failed(request_id)
        else:
            hashed = self.world.requests[request_id].content_hash
            self.world.append_duplicated(request_id, "finished-before", hashed if how == "duplicate" else b"else")

    @precondition(lambda self: self.world.completing)
    @rule(data=st.data())
    def answer_complete(self, data: st.DataObject) -> None:
        self.world.completed(data.draw(st.sampled_from(sorted(self.world.completing))))

    # --- engines -------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.world.running)
    @rule(data=st.data())
    def first_token(self, data: st.DataObject) -> None:
        self.world.first_token(data.draw(st.sampled_from(sorted(self.world.running))))

    @precondition(lambda self: self.world.running)
    @rule(data=st.data(), num_tokens=st.integers(1, 60))
    def finish(self, data: st.DataObject, num_tokens: int) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.world.running)))
        self.world.finish(request_id, "stop", num_tokens)

    @precondition(lambda self: self.world.aborting)
    @rule(data=st.data())
    def answer_abort(self, data: st.DataObject) -> None:
        self.world.finish(data.draw(st.sampled_from(sorted(self.world.aborting))), "abort", 1)

    @precondition(lambda self: self.world.running)
    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        self.world.fail(data.draw(st.sampled_from(sorted(self.world.running))), "invalid_field")

    @precondition(lambda self: self.old_attempts)
    @rule(data=st.data())
    def late_report(self, data: st.DataObject) -> None:
        request_id, attempt = data.draw(st.sampled_from(self.old_attempts))
        t_us = self.world.t_us
        self.world.post(e.FirstToken(t_us, request_id, attempt, 0))
        assert not self.world.post(e.Finished(t_us, request_id, attempt, "stop", 3))
        assert not self.world.post(e.Failed(t_us, request_id, attempt, "internal", "late", True))

    @precondition(lambda self: self.down)
    @rule(data=st.data())
    def engine_up(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.down)))
        self.down.remove(name)
        self.up.add(name)
        self.world.engine_up(name, max_model_len=self.contexts[name])

    @precondition(lambda self: self.transits)
    @rule(is_lost=st.booleans())
    def answer_transit(self, is_lost: bool) -> None:
        """An engine that was to come may fail to; it is then started anew."""
        self._answer_transit(is_lost=is_lost)

    def _answer_transit(self, *, is_lost: bool) -> None:
        name, transit = self.transits.popitem()
        t_us = self.world.t_us
        if transit.to != "resident":
            self.up.discard(name)  # a restart that was on the way may have ended since
            self.down.discard(name)
            self.world.post(e.EngineAsleep(t_us, name, transit.to, 0.01))
        elif is_lost:
            self.down.add(name)
            self.world.post(e.EngineLost(t_us, name, ExitKind.DIED, "did not come"))
        else:
            self.up.add(name)
            self.world.engine_up(name, max_model_len=self.contexts[name])

    @precondition(lambda self: self.up - self.dying - set(self.transits))
    @rule(data=st.data())
    def engine_dies(self, data: st.DataObject) -> None:
        """Its attempts are reported one by one; other things may happen before the engine itself is."""
        name = data.draw(st.sampled_from(sorted(self.up - self.dying - set(self.transits))))
        running = [id_ for id_, dispatch in self.world.running.items() if dispatch.decision.engine == name]
        self.dying.add(name)
        for request_id in running:
            self.old_attempts.append((request_id, self.world.running[request_id].attempt))
            self.world.fail(request_id, "engine_unavailable", lost=True)
        if running:
            self.up.remove(name)

    @precondition(lambda self: self.dying)
    @rule(data=st.data())
    def engine_lost(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.dying)))
        self.world.lose(name)
        self.up.discard(name)
        self.dying.remove(name)
        self.down.add(name)

    @precondition(lambda self: self.up)
    @rule(data=st.data(), kv_usage=st.floats(0, 1))
    def stepped(self, data: st.DataObject, kv_usage: float) -> None:
        name = data.draw(st.sampled_from(sorted(self.up)))
        progress = tuple((id_, 2) for id_, d in self.world.running.items() if d.decision.engine == name)
        load = EngineLoad(num_running=len(progress), kv_usage=kv_usage)
        self.world.post(e.EngineStepped(self.world.t_us, name, load, (*progress, ("unknown", 3))))

    # --- what is learnt, and what changes ------------------------------------------------------------------------

    @precondition(lambda self: self.shadows)
    @rule(data=st.data(), agrees=st.sampled_from((True, False, False, False, None)), num_tokens=st.integers(0, 20))
    def judge(self, data: st.DataObject, agrees: bool | None, num_tokens: int) -> None:
        shadow_id = data.draw(st.sampled_from(sorted(self.shadows)))
        if num_tokens:
            self.world.post(e.FirstToken(self.world.t_us, shadow_id, 1, 0))
        self._judge(shadow_id, agrees, num_tokens)

    def _judge(self, shadow_id: str, agrees: bool | None, num_tokens: int) -> None:
        shadow = self.shadows.pop(shadow_id)
        difference = None if agrees is None else -1.0 + agrees
        event = e.QualityJudged(self.world.t_us, shadow_id, shadow.mode, shadow.task, difference, num_tokens, agrees)
        self.world.post(event)
        assert not self.world.post(event), "judged twice"

    @rule(policy=st.sampled_from(POLICIES))
    def change_policy(self, policy: str) -> None:
        self.world.post(e.ConfigChanged(self.world.t_us, PolicyConfig(name=policy)))
        assert self.scheduler.policy_name == policy

    @rule(data=st.data(), step_mj=st.floats(0, 10_000), token_mj=st.floats(0, 1_000))
    def fit(self, data: st.DataObject, step_mj: float, token_mj: float) -> None:
        name = data.draw(st.sampled_from(sorted(self.names)))
        fitted = Coefficients(prefill_mj_per_token=token_mj, decode_mj_per_token=token_mj, step_mj=step_mj)
        self.world.post(e.CoefficientsFitted(self.world.t_us, {name: fitted}))

    # --- time, counters, the end ---------------------------------------------------------------------------------

    @rule(ms=st.integers(0, 100))
    def time_passes(self, ms: int) -> None:
        """Without a tick: deadlines may be over unnoticed for a while."""
        self.world.t_us += ms * 1_000

    @rule(ms=st.integers(0, 100))
    def tick(self, ms: int) -> None:
        """Nobody waits past a deadline without an answer."""
        self.world.wait(ms)
        for entry in self.scheduler.entries():
            deadline_us = entry.request.deadline_us
            assert entry.phase is not Phase.WAITING or deadline_us is None or deadline_us > self.world.t_us

    @rule(energy_mj=st.integers(0, 100_000), ms=st.integers(1, 200))
    def read_counter(self, energy_mj: int, ms: int) -> None:
        self.world.t_us += ms * 1_000
        self.counter_mj += energy_mj
        reading = CounterReading(domain="gpu:0", t_us=self.world.t_us, energy_mj=self.counter_mj, power_w=90.0)
        self.world.post(e.CounterRead(self.world.t_us, reading))

    @rule(ms=st.sampled_from((0, 50)), surely=st.integers(0, 9))
    def drain(self, ms: int, surely: int) -> None:
        if surely == 0:
            self.world.drain(ms)
            self.is_draining = True

    # --- what must hold ------------------------------------------------------------------------------------------

    @invariant()
    def commands_were_allowed(self) -> None:
        commands = self.world.log[self.num_seen :]
        self.num_seen = len(self.world.log)
        for command in commands:
            match command:
                case c.Dispatch():
                    self._check_dispatch(command)
                case c.Restart():
                    self.restarts[command.request_id] += 1
                    self.moves[command.request_id] += command.reason == "engine_left"
                    num = self.restarts[command.request_id] - self.moves[command.request_id]
                    assert num < 2, "more attempts than limits.max_attempts"
                case c.Abort():
                    self.aborts[command.request_id, command.attempt] += 1
                    assert self.aborts[command.request_id, command.attempt] == 1, "told twice to abort"
                case c.Transit():
                    assert not self.transits, "two engines move at once"
                    running = [d for d in self.world.running.values() if d.decision.engine == command.engine]
                    assert not running, "it leaves with requests"
                    self.transits[command.engine] = command
                    self.up.discard(command.engine)
                case c.Shadow():
                    assert command.shadow_id not in self.shadows
                    assert command.request_id in self.world.completing
                    self.shadows[command.shadow_id] = command
                case c.Withdraw():
                    gone = command.withdrawal
                    assert (gone.mode, gone.task) not in self.withdrawn
                    self.withdrawn |= {(gone.mode, gone.task), (gone.mode, ALL_TASKS)}
                case c.Ack():
                    assert command.request_id not in self.acked
                    self.acked.add(command.request_id)
                case c.AckDuplicate():
                    assert command.request_id not in self.repeated
                    self.repeated.add(command.request_id)
                case _:
                    pass

    def _check_dispatch(self, command: c.Dispatch) -> None:
        request = self.world.requests[command.request_id]
        decision = command.decision
        name = decision.mode
        chosen = next(candidate for candidate in decision.candidates if candidate.mode == name)
        assert not self.is_draining, "dispatched during the drain"
        assert chosen.mask == 0, "dispatched to a masked mode"
        assert name in self.up, "dispatched to an engine that is down"
        assert chosen.num_running < self.slots, "dispatched to a full mode"
        assert request.model in (None, self.models[name])
        assert not request.mode_strict or request.mode_hint in (None, name)
        arm = self.scheduler.fleet.by_name[name]
        accuracy = self.scheduler.certificates.accuracy(arm, request.task) or 0.0
        # What a gate has measured counts before what the configuration states.
        assert self.is_gated or self.qualities[name] is None or accuracy == self.qualities[name]
        assert not request.quality_floor or accuracy >= request.quality_floor
        assert request.num_prompt_tokens + request.max_tokens <= self.contexts[name]
        assert request.deadline_us is None or request.deadline_us > decision.t_us, "dispatched past its deadline"
        assert 0 < decision.propensity <= 1
        assert decision.reason
        assert command.attempt == self.restarts[command.request_id] + 1

    @invariant()
    def every_request_is_in_one_place(self) -> None:
        scheduler, world = self.scheduler, self.world
        assert world.conserved()
        open_ids = {entry.request.request_id for entry in scheduler.entries()}
        repeats = {id_ for entry in scheduler.entries() for id_ in entry.duplicates}
        places = (open_ids, repeats, set(world.delivered), set(world.rejected), self.repeated)
        assert Counter(id_ for place in places for id_ in place) == Counter(self.submitted)
        assert scheduler.num_pending == len(open_ids) + len(repeats)
        counts = scheduler.counts
        assert counts.delivered + counts.aborted + counts.failed == len(world.delivered)
        assert counts.rejected == len(world.rejected)
        assert counts.duplicates == len(self.repeated)
        phases = {entry.request.request_id: entry.phase for entry in scheduler.entries()}
        assert {id_ for id_, phase in phases.items() if phase is Phase.APPENDING} == world.appending
        assert {id_ for id_, phase in phases.items() if phase is Phase.RUNNING} == set(world.running)
        assert {id_ for id_, phase in phases.items() if phase is Phase.COMPLETING} == world.completing
        for entry in scheduler.entries():
            key = (entry.request.tenant, entry.request.client_request_id)
            assert scheduler.find(*key) is entry
            assert entry.phase is Phase.APPENDING or not entry.duplicates

    @invariant()
    def books_equal_a_recount(self) -> None:
        scheduler, fleet = self.scheduler, self.scheduler.fleet
        waiting = [entry for entry in scheduler.entries() if entry.phase is Phase.WAITING]
        assert Counter(id(entry) for entry in scheduler.queue.entries()) == Counter(id(entry) for entry in waiting)
        assert len(scheduler.queue) == len(waiting)
        reserved = [entry for entry in scheduler.entries() if entry.phase in (Phase.APPENDING, Phase.WAITING)]
        assert scheduler.admission.num_reserved == len(reserved)
        assert scheduler.admission.reserved_tokens == sum(entry.weight_tokens for entry in reserved)
        for i, book in enumerate(fleet.books):
            running = [x for x in scheduler.entries() if x.phase is Phase.RUNNING and x.parked == i]
            assert book.num_running == len(running) <= self.slots
            assert book.reserved_tokens == sum(entry.reserved_tokens for entry in running)
            assert book.num_parked == sum(entry.parked == i for entry in waiting)
            assert len(running) < 2 or book.reserved_tokens <= book.kv_capacity_tokens
            planner = scheduler.residency
            is_leaving = planner is not None and planner.is_leaving(book.mode.engine)
            assert book.up == (book.mode.engine in self.up and not is_leaving)
            assert fleet.up >> i & 1 == book.up
            assert fleet.free >> i & 1 == (book.up and book.num_running < book.num_slots)
        assert fleet.num_running == sum(book.num_running for book in fleet.books)

    @invariant()
    def nobody_waits_beside_a_free_mode(self) -> None:
        """Except for the policy's choice (parked), or behind one whose turn it is and which needs the memory."""
        if self.is_draining:
            assert not any(entry.phase is Phase.WAITING for entry in self.scheduler.entries())
            return
        waiting = [entry for entry in self.scheduler.entries() if entry.phase is Phase.WAITING]
        for i, book in enumerate(self.scheduler.fleet.books):
            if not book.up or book.num_running >= book.num_slots:
                continue
            wanting = [entry for entry in waiting if self._may_use(entry, i)]
            assert not wanting or not all(self._fits(entry, i) for entry in wanting)
            # Memory is the only reason; so something runs there.
            assert not wanting or book.num_running

    def _may_use(self, entry: Entry, i: int) -> bool:
        book = self.scheduler.fleet.books[i]
        if entry.static_masks[i] or self._total(entry.request) > (book.max_model_len or 0):
            return False
        parked = entry.parked
        if parked == YIELDING:
            assert self.scheduler.fleet.num_running, "waits for nothing"
            return False
        return parked in (-1, i) or not self.scheduler.fleet.books[parked].up

    def _fits(self, entry: Entry, i: int) -> bool:
        book = self.scheduler.fleet.books[i]
        need = entry.request.num_prompt_tokens + entry.expected_p90_tokens
        return not book.num_running or book.reserved_tokens + need <= book.kv_capacity_tokens

    @staticmethod
    def _total(request: Request) -> int:
        return request.num_prompt_tokens + request.max_tokens

    @invariant()
    def shadows_are_all_known(self) -> None:
        assert self.scheduler.shadows.num_running == len(self.shadows)

    @invariant()
    def the_ledger_closes(self) -> None:
        for accounts in self.scheduler.ledger.accounts():
            assert accounts.residue_mj == 0
            assert accounts.counter_mj <= self.counter_mj

    # --- the end of the world ------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Whatever state it is in: once everybody answers, every request comes to its end."""
        if not hasattr(self, "world"):
            return
        world = self.world
        for name in sorted(self.dying):
            self.down.add(name)
            world.lose(name)
        for request_id in sorted(world.appending):
            world.appended(request_id)
        for _ in range(MOST_ROUNDS if self.scheduler.residency is not None else len(world.requests) + 1):
            for name in sorted(self.down):
                self.down.remove(name)
                self.up.add(name)
                world.engine_up(name, max_model_len=self.contexts[name])
            for request_id in sorted(world.running):
                world.finish(request_id, "abort" if request_id in world.aborting else "stop", 3)
            for request_id in sorted(world.completing):
                world.completed(request_id)
            self.commands_were_allowed()
            if not self.scheduler.entries():
                break
            if self.scheduler.residency is not None:
                if self.transits:
                    self._answer_transit(is_lost=False)
                world.wait(100)
                self.commands_were_allowed()
        for shadow_id in sorted(self.shadows):
            self._judge(shadow_id, None, 0)
        assert self.scheduler.shadows.num_running == 0
        stuck = [entry for entry in self.scheduler.entries() if self._may_come(entry)]
        assert not stuck, "a request that never ends"
        if self.scheduler.entries():
            assert world.conserved()
            return
        assert self.scheduler.num_pending == 0
        assert world.conserved()
        assert self.scheduler.admission.num_reserved == self.scheduler.admission.reserved_tokens == 0
        assert all(book.num_running == book.reserved_tokens == 0 for book in self.scheduler.fleet.books)
        for request_id, outcome in world.delivered.items():
            assert outcome.request_id == request_id
            assert (outcome.finish_reason is None) == bool(outcome.error_code)

    def _may_come(self, entry: Entry) -> bool:
        """Whether a set that fits, and keeps a safe mode of each model if any does, holds a mode for the request."""
        planner = self.scheduler.residency
        if planner is None:
            return True
        fitting = [s for s in range(1 << len(self.names)) if s.bit_count() <= self.memory_for]
        safe = [s for s in fitting if planner._is_safe(s)] or fitting
        return any(s & entry.eligible for s in safe)


SchedulerMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("MSD_EXAMPLES", "60")),
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestScheduler = SchedulerMachine.TestCase

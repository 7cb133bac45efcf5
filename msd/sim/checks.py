"""Invariants of the daemon, held against its scheduler from outside: cheap ones at each event, the rest each second.

The checks keep books of their own, made from events and commands only, and compare them with the scheduler's. They
report; they never stop the world, so that one broken rule does not hide another.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

from msd.config import Config
from msd.core import commands as c
from msd.core import events as e
from msd.core.commands import Command
from msd.core.entry import Entry, Phase
from msd.core.events import Event
from msd.core.residency import UNSERVED_BACKOFF_MOST, Move
from msd.core.scheduler import Scheduler
from msd.core.worth import UNSERVED_S
from msd.domain import CounterReading, Outcome, Request
from msd.gate import ALL_TASKS
from msd.sim.report import Check

SHOWN = 5
STORY_EVENTS = 50
DEADLINE_GRACE_US = 250_000
"""Deadlines are looked at on ticks, a thousand at a time."""
SURVEY_PERIOD_US = 1_000_000

_SUBMITTED, _APPENDING, _WAITING, _RUNNING, _COMPLETING = range(5)
_NOBODY = Request(
    request_id="",
    client_request_id="",
    tenant="",
    content_hash=b"",
    received_us=0,
    num_prompt_tokens=0,
    max_tokens=0,
)


class _Known:
    """One request as events and commands tell it."""

    __slots__ = ("attempt", "engine", "request", "state")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.state = _SUBMITTED
        self.attempt = 0
        self.engine = ""


class Checks:
    """All invariants of one world."""

    NAMES = (
        "conservation",
        "one_terminal_state",
        "order_of_states",
        "masks",
        "bounds",
        "deadlines",
        "energy_closes",
        "energy_settled",
        "no_idle_with_backlog",
        "answers",
        "liveness",
        "time",
        "no_crash",
        "residency",
        "certificates",
    )

    def __init__(self, config: Config, scheduler: Scheduler) -> None:
        self._config = config
        self._scheduler = scheduler
        self._modes = {book.mode.name: (i, book) for i, book in enumerate(scheduler.fleet.books)}
        self._slots = {engine.name: engine.max_num_seqs for engine in config.engine}
        self._looked = dict.fromkeys(self.NAMES, 0)
        self._broken: Counter[str] = Counter()
        self._shown: dict[str, list[str]] = {name: [] for name in self.NAMES}
        self._known: dict[str, _Known] = {}
        """Those that have not ended; the ended are only remembered by name."""
        self._ended: set[str] = set()
        self._up: set[str] = set()
        self._running: Counter[str] = Counter()
        self._deadlines: list[tuple[int, str]] = []
        self._now_us = 0
        self._num_told = 0
        self._num_samples = 0
        self._surveyed_us = 0
        self._counter: dict[str, tuple[int, int, int]] = {}
        """(epoch, mJ, sum of its rises) per energy counter."""
        self._settled_mj = 0
        self._settled: set[str] = set()
        self._num_given_up = 0
        self.outcomes: list[Outcome] = []
        """Of all that were completed, for the report."""
        self.story: deque[Event] = deque(maxlen=STORY_EVENTS)
        self.told: tuple[Event, ...] = ()
        """The events up to the first violation."""
        # By type, what an event or command changes in these books; the others change nothing.
        self._on_event: dict[type, Callable[[Any], None]] = {
            e.Submitted: self._on_submitted,
            e.Finished: self._on_attempt_ended,
            e.Failed: self._on_attempt_ended,
            e.Appended: self._on_appended,
            e.EngineUp: self._on_engine_up,
            e.EngineLost: self._on_engine_lost,
            e.EngineAsleep: self._on_engine_asleep,
            e.QualityJudged: self._on_judged,
        }
        self._on_command: dict[type, Callable[[Any], None]] = {
            c.Append: self._on_append,
            c.Reject: self._on_refused,
            c.AckDuplicate: self._on_refused,
            c.Dispatch: self._on_dispatch,
            c.Complete: self._on_complete,
            c.Deliver: self._on_deliver,
            c.Settle: self._on_settle,
            c.Transit: self._on_transit,
            c.Shadow: self._on_shadow,
            c.Withdraw: self._on_withdraw,
        }
        self._shadows: set[str] = set()
        self._barred: set[tuple[str, str]] = set()
        """(mode, task or `*`) that production took away."""
        self._autos = {engine.name: engine for engine in config.engine if engine.residency == "auto"}
        self._moving, self._to = "", ""
        self._moved_us: dict[str, int] = {}
        """When a plan last moved each engine."""
        self._idle_since_us = -1
        """Since when nothing runs or moves although somebody waits for an engine that is away."""
        self._turn_us = round(_longest_turn_s(config) * 1e6)
        self._moves_seen = 0
        self._arrived_us = 0

    def expect(self, name: str, holds: bool, message: str, *told: object) -> None:
        """Count one look at an invariant; `message` is formatted only when it does not hold."""
        self._looked[name] += 1
        if not holds:
            self._break(name, message, told)

    def _break(self, name: str, message: str, told: tuple[object, ...]) -> None:
        if not self.told:
            self.told = tuple(self.story)
        self._broken[name] += 1
        if len(self._shown[name]) < SHOWN:
            self._shown[name].append(f"at {self._now_us} us: {message.format(*told)}")

    def results(self) -> tuple[Check, ...]:
        """One entry per invariant."""
        looked = Counter(self._looked)
        looked["conservation"] += self._num_told  # at each event, which is why it is not counted there
        looked["time"] += self._num_told - self._num_samples
        return tuple(
            Check(
                name=name,
                num_checked=looked[name],
                num_violations=self._broken[name],
                violations=tuple(self._shown[name]),
            )
            for name in self.NAMES
        )

    # --- after each event --------------------------------------------------------------------------------------------

    def after(self, event: Event, commands: list[Command]) -> None:
        """Look at one step of the scheduler."""
        self.story.append(event)
        self._num_told += 1
        kind = type(event)
        if isinstance(event, e.CounterRead):
            # Its time is that of the sample, which was taken a little earlier than it is told.
            self._num_samples += 1
            self._read_counter(event.reading)
        else:
            t_us = event.t_us
            if t_us < self._now_us:
                self._break("time", "time went back to {}", (t_us,))
            self._now_us = t_us
            on = self._on_event.get(kind)
            if on is not None:
                on(event)
        on_command = self._on_command
        for command in commands:
            on = on_command.get(type(command))
            if on is not None:
                on(command)
        if kind is e.Tick:
            self._on_tick(event.t_us)
        scheduler = self._scheduler
        counts = scheduler.counts
        ended = counts.delivered + counts.rejected + counts.aborted + counts.failed + counts.duplicates
        pending = scheduler.num_pending
        if counts.submitted != ended + pending:
            told = (counts.submitted, ended, pending)
            self._break("conservation", "{} submitted, {} ended, {} pending", told)

    def _on_submitted(self, event: e.Submitted) -> None:
        self._known[event.request.request_id] = _Known(event.request)

    def _on_attempt_ended(self, event: e.Finished | e.Failed) -> None:
        known = self._known.get(event.request_id)
        if known is not None and known.state == _RUNNING and known.attempt == event.attempt:
            known.state = _WAITING
            self._running[known.engine] -= 1

    def _on_appended(self, event: e.Appended) -> None:
        self._known[event.request_id].state = _WAITING

    def _on_engine_up(self, event: e.EngineUp) -> None:
        self._up.add(event.info.engine)
        self._arrive(event.t_us, event.info.engine)

    def _on_engine_lost(self, event: e.EngineLost) -> None:
        self._up.discard(event.engine)
        if event.engine == self._moving and self._to == "resident":
            self._moving = ""

    def _on_transit(self, command: c.Transit) -> None:
        """One at a time, never what runs something, never into the reserve, and no way back within two dwells."""
        engine, planner, config = command.engine, self._scheduler.residency, self._config
        assert planner is not None, "an engine moves without a plan"
        self.expect("residency", not self._moving, "{} moves while {} does", engine, self._moving)
        self._moving, self._to = engine, command.to
        if command.to != "resident":
            num = self._running[engine]
            self.expect("residency", num == 0, "{} leaves with {} requests", engine, num)
        else:
            needed = sum(
                other.gpu_bytes or other.sim.weights_bytes
                for other in config.engine
                if other.name in (self._up - {engine}) | {engine}
            )
            most = config.telemetry.sim_memory_bytes - config.residency.reserve_bytes
            self.expect("residency", needed <= most, "{} bytes with {}, of {}", needed, engine, most)
        if planner.history and planner.figures().num_switches > self._moves_seen:
            self._moves_seen = planner.figures().num_switches
            self._look_at_switch(planner.history[-1])

    def _look_at_switch(self, move: Move) -> None:
        """A switch for gain comes after a dwell, and moves nobody who moved within two; its set keeps a safe mode."""
        dwell_us = self._config.residency.min_dwell_s * 1e6
        qualities = {engine.name: engine.quality or 0.0 for engine in self._config.engine}
        kept = [name for name in qualities if name in move.after or name not in self._autos]
        self.expect("residency", bool(kept), "{} leaves no mode", move)
        if move.reason != "gain":
            return
        age_us = move.t_us - self._arrived_us
        self.expect("residency", age_us >= dwell_us, "{} came after {} us", move, age_us)
        for name in set(move.before) ^ set(move.after):
            since_us = move.t_us - self._moved_us.get(name, -(1 << 60))
            self.expect("residency", since_us >= 2 * dwell_us, "{} moves again after {} us", name, since_us)

    def _on_engine_asleep(self, event: e.EngineAsleep) -> None:
        self._up.discard(event.engine)
        self._arrive(event.t_us, event.engine)

    def _arrive(self, t_us: int, engine: str) -> None:
        if engine == self._moving:
            self._moving = ""
            self._arrived_us = t_us
            if self._moves_seen:
                self._moved_us[engine] = t_us

    def _on_tick(self, t_us: int) -> None:
        """Commands of the tick are in the books already: what it expired does not wait any more."""
        if self._deadlines:
            self._look_at_deadlines(t_us)
        if t_us - self._surveyed_us >= SURVEY_PERIOD_US:
            self._surveyed_us = t_us
            self.survey()

    def _on_append(self, command: c.Append) -> None:
        known = self._step(command.request_id, _SUBMITTED, _APPENDING, "Append")
        if known.request.deadline_us is not None:
            heappush(self._deadlines, (known.request.deadline_us + DEADLINE_GRACE_US, command.request_id))

    def _on_refused(self, command: c.Reject | c.AckDuplicate) -> None:
        known = self._find(command.request_id, "refused")
        is_early = known.state in (_SUBMITTED, _APPENDING)
        self.expect("order_of_states", is_early, "{} refused in state {}", command.request_id, known.state)
        self._end(command.request_id)

    def _on_complete(self, command: c.Complete) -> None:
        outcome = command.outcome
        request_id = outcome.request_id
        self.outcomes.append(outcome)
        known = self._known.get(request_id) or self._find(request_id, "completed")
        self._looked["one_terminal_state"] += 1
        if known.state >= _COMPLETING:
            self._break("one_terminal_state", "{} got a second terminal state", (request_id,))
        known.state = _COMPLETING

    def _on_deliver(self, command: c.Deliver) -> None:
        self._step(command.request_id, _COMPLETING, _COMPLETING, "Deliver")
        self._end(command.request_id)

    def _on_settle(self, command: c.Settle) -> None:
        request_id, energy = command.request_id, command.energy
        energy_mj = energy.energy_mj
        self._looked["energy_settled"] += 2
        if energy_mj != energy.dynamic_mj + energy.static_mj or energy_mj < 0:
            self._break("energy_settled", "{}: {}", (request_id, energy))
        if request_id in self._settled:
            self._break("energy_settled", "{} settled twice", (request_id,))
        self._settled.add(request_id)
        if energy.settled:
            self._settled_mj += energy_mj
        else:
            self._num_given_up += 1

    def _find(self, request_id: str, what: str) -> _Known:
        """The open request; one that has ended already may not be heard of again."""
        known = self._known.get(request_id)
        if known is not None:
            return known
        ended = request_id in self._ended
        self.expect("one_terminal_state", False, "{} {} after its end" if ended else "{} {} unknown", request_id, what)
        return _Known(_NOBODY)

    def _step(self, request_id: str, was: int, becomes: int, what: str) -> _Known:
        known = self._known.get(request_id) or self._find(request_id, what)
        self._looked["order_of_states"] += 1
        if known.state != was:
            self._break("order_of_states", "{} of {} in state {}", (what, request_id, known.state))
        known.state = becomes
        return known

    def _end(self, request_id: str) -> None:
        self._known.pop(request_id, None)
        self._ended.add(request_id)

    def _on_dispatch(self, command: c.Dispatch) -> None:
        request_id, decision, looked = command.request_id, command.decision, self._looked
        known = self._known.get(request_id) or self._find(request_id, "dispatched")
        request, engine = known.request, decision.engine
        looked["order_of_states"] += 1
        if known.state != _WAITING or command.attempt != known.attempt + 1:
            self._break("order_of_states", "{} dispatched in state {}", (request_id, known.state))
        arm, book = self._modes[decision.mode]
        mode = book.mode
        looked["masks"] += 2
        mask = decision.candidates[arm].mask
        if mask:
            self._break("masks", "{} went to {}, masked {}", (request_id, decision.mode, mask))
        fits = (
            engine in self._up
            and (request.model is None or mode.model == request.model)
            and (not request.mode_strict or request.mode_hint == mode.name)
            and (
                not request.quality_floor
                or (self._scheduler.certificates.accuracy(arm, request.task) or 0.0) >= request.quality_floor
            )
            and request.num_prompt_tokens + request.max_tokens <= (book.max_model_len or 0)
        )
        if not fits:
            self._break("masks", "{} must not run on {} (up: {})", (request_id, decision.mode, self._up))
        if self._barred and request.quality_floor != 0:
            barred = (decision.mode, request.task or ALL_TASKS) in self._barred
            self.expect("certificates", not barred, "{} went to {}, withdrawn", request_id, decision.mode)
        num_running = self._running[engine] = self._running[engine] + 1
        entry = self._scheduler.entry(request_id)
        moves = entry.num_moves if entry is not None else 0
        looked["bounds"] += 1
        if num_running > self._slots[engine] or command.attempt > self._config.limits.max_attempts + moves:
            self._break("bounds", "{} is one too many on {}", (request_id, engine))
        known.state, known.attempt, known.engine = _RUNNING, command.attempt, engine

    def _on_shadow(self, command: c.Shadow) -> None:
        """Nobody's request, of one whose answer is not stored yet; never twice of the same."""
        known, shadow_id = self._known.get(command.request_id), command.shadow_id
        is_fresh = known is not None and known.state < _COMPLETING and shadow_id not in self._shadows
        self.expect("certificates", is_fresh, "{} begins after {} ended", shadow_id, command.request_id)
        barred = (command.mode, command.task) in self._barred
        self.expect("certificates", not barred, "{} tries what is withdrawn already", command)
        self._shadows.add(shadow_id)

    def _on_judged(self, event: e.QualityJudged) -> None:
        self.expect("certificates", event.shadow_id in self._shadows, "{} was judged twice", event.shadow_id)
        self._shadows.discard(event.shadow_id)

    def _on_withdraw(self, command: c.Withdraw) -> None:
        mode, task = command.withdrawal.mode, command.withdrawal.task
        self.expect("certificates", (mode, task) not in self._barred, "{} is withdrawn twice for {}", mode, task)
        # Found worse anywhere, it is not good overall.
        self._barred |= {(mode, task), (mode, ALL_TASKS)}

    def _look_at_deadlines(self, t_us: int) -> None:
        while self._deadlines and self._deadlines[0][0] <= t_us:
            _, request_id = heappop(self._deadlines)
            known = self._known.get(request_id)
            waits = known is not None and known.state == _WAITING
            self.expect("deadlines", not waits, "{} still waits past its deadline", request_id)

    def _read_counter(self, reading: CounterReading) -> None:
        epoch, energy_mj, risen_mj = self._counter.get(reading.domain, (reading.epoch, reading.energy_mj, 0))
        if reading.epoch == epoch and reading.energy_mj > energy_mj:
            risen_mj += reading.energy_mj - energy_mj
        self._counter[reading.domain] = (reading.epoch, reading.energy_mj, risen_mj)

    # --- each second, and at the end ---------------------------------------------------------------------------------

    def survey(self) -> None:
        """Compare all books."""
        scheduler, limits = self._scheduler, self._config.limits
        queue, admission, fleet = scheduler.queue, scheduler.admission, scheduler.fleet
        entries = scheduler.entries()
        phases = Counter(entry.phase for entry in entries)
        states = Counter(known.state for known in self._known.values())
        agree = (
            phases[Phase.WAITING] == states[_WAITING]
            and phases[Phase.RUNNING] == states[_RUNNING] == fleet.num_running
            and phases[Phase.COMPLETING] == states[_COMPLETING]
            and queue.num_waiting == phases[Phase.WAITING]
        )
        self.expect("conservation", agree, "the books differ: {} and {}", phases, states)
        places = phases[Phase.WAITING] + phases[Phase.APPENDING]
        self.expect("bounds", admission.num_reserved == places, "{} places for {}", admission.num_reserved, places)
        # What lost its engine comes back to the queue, whether it is full or not: slots and bounds add up.
        room = sum(self._slots.values())
        self.expect("bounds", places <= limits.max_waiting + room, "{} requests wait", places)
        idle = fleet.num_running == 0 and any(
            entry.phase is Phase.WAITING and entry.eligible & fleet.free for entry in entries
        )
        self.expect("no_idle_with_backlog", not idle, "{} wait and nothing runs", queue.num_waiting)
        if self._autos:
            self._look_at_absent(entries)
        for accounts in scheduler.ledger.accounts():
            booked_mj = accounts.requests_mj + accounts.idle_mj + accounts.running_mj + accounts.open_mj
            booked_mj += sum(accounts.wasted_mj.values()) + sum(accounts.unattributed_mj.values())
            closes = accounts.residue_mj == 0 and booked_mj == accounts.counter_mj + accounts.estimated_mj
            self.expect("energy_closes", closes, "{}", accounts)
            risen_mj = self._counter[accounts.domain][2]
            self.expect("energy_closes", accounts.counter_mj == risen_mj, "counter rose {}: {}", risen_mj, accounts)

    def _look_at_absent(self, entries: list[Entry]) -> None:
        """A GPU on which nothing runs or moves brings who is waited for, once the others have had their turn."""
        fleet = self._scheduler.fleet
        away = sum(1 << i for i, book in enumerate(fleet.books) if book.residence != "resident")
        calls = not fleet.num_running and not self._moving
        calls = calls and any(
            entry.phase is Phase.WAITING and entry.eligible and not entry.eligible & ~away for entry in entries
        )
        if not calls:
            self._idle_since_us = -1
            return
        if self._idle_since_us < 0:
            self._idle_since_us = self._now_us
        idle_us = self._now_us - self._idle_since_us
        self.expect("no_idle_with_backlog", idle_us <= self._turn_us, "nothing comes for {} us", idle_us)

    def at_end(self) -> None:
        """The world is over: everything has ended, and its energy is where it belongs."""
        self.survey()
        pending = self._scheduler.num_pending
        self.expect("liveness", pending == 0, "{} requests never ended", pending)
        self.expect("liveness", not self._shadows, "shadows never ended: {}", sorted(self._shadows))
        num_open = self._scheduler.shadows.num_running
        self.expect("liveness", num_open == 0, "{} shadows in the scheduler's books", num_open)
        for accounts in self._scheduler.ledger.accounts():
            self.expect("energy_settled", accounts.running_mj == 0, "{} mJ never settled", accounts.running_mj)
            if not self._num_given_up:
                due_mj = (
                    accounts.requests_mj + accounts.wasted_mj.get("aborted", 0) + accounts.wasted_mj.get("failed", 0)
                )
                told = self._settled_mj
                self.expect("energy_settled", told == due_mj, "answers hold {} mJ, the books {}", told, due_mj)


def _longest_turn_s(config: Config) -> float:
    """How long requests for an engine that is away may wait while nothing runs: turns, plans and starts that fail."""
    moves = [engine.sim.start_s + engine.sim.sleep_s for engine in config.engine if engine.kind == "sim"]
    return UNSERVED_S + 3 * config.residency.plan_interval_s + UNSERVED_BACKOFF_MOST * sum(sorted(moves)[-2:])

"""Which engines with `residency = "auto"` are on the GPU, asleep or cold: the plan, and the way from one to the next.

A plan is made every few seconds, off the path of requests. It looks at each set of engines that fits into memory and
keeps a quality-safe mode of every model, and moves from S to S' only if, on the averages of 30 s and of 300 s alike,

    H * (V(S) - V(S')) > h * K(S -> S')

V is the cost of serving the present traffic (`core/worth.py`); H is the horizon, or how long a mix has lasted so far;
K is what the move costs: requests that wait for it, the detour of the others, and the copying. A set stays for a dwell,
no engine goes back where it came from within two, and h doubles whenever that was wanted (modeswitch spec, section 7).
A mode that was revoked, or memory that somebody else took, need no gain and no dwell. For an engine that died another
comes without a dwell, if it earns what it costs before the dead one is back. Requests that wait for a mode which is not
there need no dwell either, only that the others have had their turn: as long as the move takes. The one transition at
a time holds for all. The lost prefix cache and idle watts are not in K: neither is known here.

At first, engines that are not chosen are started too where there is room, and put to sleep: a start is not on the
path of a later switch.

An engine leaves in three steps: nothing is routed to it, its requests end (or are moved after `drain_s`), it goes. By
choice it does not leave while a request runs there that was moved before and has not had its time since.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, islice
from math import ceil, sqrt

from msgspec import Struct

from msd.config import CostConfig, EngineConfig, ResidencyConfig
from msd.core.commands import Transit
from msd.core.demand import Class, Demand, hushed
from msd.core.fleet import Fleet, ModeBook
from msd.core.memory import Budget, Need, budget_of, maximal_sets, need_of, put_away
from msd.core.worth import Curve, Worth
from msd.domain import EngineInfo, GpuView, Residence
from msd.profile import ModeProfile, Profile

ENUMERATED = 10
"""Up to this many engines all sets are looked at; beyond, neighbours of the present one."""
MAX_EVALUATIONS = 48
"""Sets judged per plan, which is most of its cost."""
MAX_WEIGHED = 12
"""Of the best ones, whose transition is priced."""
NOISE = 0.03
"""A gain below this share of V(S) is within the model's error."""
COPY_SHARE = 0.1
"""Assumed: what a transition takes from the engines that go on, as a share of their work."""
MIX_LEAST_S, MIX_REMEMBERED_US = 10.0, 3_600_000_000
CALM_US = 600_000_000
BACKOFF_MOST = 16.0
COST_ALPHA = 0.3
FIRST_SLEEP_S, FIRST_WAKE_S, FIRST_START_S = 1.0, 1.0, 60.0
"""Until measured or profiled."""
COLD_DWELLS = 10.0
"""A set that came by a cold start stays this many times as long as the start took."""
EVIDENCE_S = 30.0
"""So long traffic must have been seen before a move is for gain: the fast average's own time."""
LEARNT = 3
"""Requests after which an estimate is worth more than the profile."""
VIEW_WAIT_US = 1_000_000
"""How long the first plan waits for a view of the GPU."""
ROOM_WAIT_US = 2_000_000
"""How long an engine that was to come waits until the view shows room for it; then the plan is dropped."""
MAX_WAITING_LOOKED_AT = 1_000
SPARED = 4.0
"""Who was moved n times may run for drain_s * SPARED^n before its engine leaves by choice: each attempt has longer than
the one before, so that every request comes to its end, and none holds an engine for much longer than it runs."""
UNSERVED_BACKOFF_MOST = 4.0
"""Requests that no present mode may serve wait for at most so many times the way back and forth."""
UNKNOWN_TOKENS = (256.0, 128.0)
"""Prompt and output of traffic of which nothing is known yet."""


class _Auto:
    """One engine that may move: where it is, what its transitions took, when it last moved."""

    __slots__ = (
        "can_sleep", "changed_us", "config", "is_known_to_sleep", "modes", "name", "need", "profile", "residence",
        "sleep_s", "start_s", "wake_s",
    )  # fmt: skip

    def __init__(self, config: EngineConfig, modes: int, profile: ModeProfile | None) -> None:
        self.config = config
        self.name = config.name
        self.modes = modes
        self.need = Need(0)
        self.residence: Residence = "cold"
        self.can_sleep = True
        self.profile = profile
        self.changed_us: int | None = None
        """Last time that a plan moved it; None: never."""
        self.start_s = profile.start_s if profile is not None and profile.start_s else FIRST_START_S
        self.sleep_s = FIRST_SLEEP_S if profile is None or profile.sleep_s is None else profile.sleep_s
        self.wake_s = FIRST_WAKE_S if profile is None or profile.wake_s is None else profile.wake_s
        self.is_known_to_sleep = config.kind == "sim" or (profile is not None and profile.sleep_s is not None)
        if config.kind == "sim":
            self.start_s = config.sim.start_s
        elif profile is not None and profile.sleep_s is None:
            self.can_sleep = False

    @property
    def enter_s(self) -> float:
        """How long it takes to come from where it is."""
        return self.wake_s if self.residence == "asleep" else self.start_s


class Move(Struct, frozen=True):
    """One planned switch, for status and tests."""

    t_us: int
    before: tuple[str, ...]
    after: tuple[str, ...]
    reason: str
    gain_per_s: float
    cost: float


class ResidencyFigures(Struct, frozen=True, kw_only=True):
    """What the planner has done so far."""

    num_switches: int = 0
    num_emergencies: int = 0
    num_moved_requests: int = 0
    """Requests that were moved to another engine because theirs had to leave."""
    num_dropped_plans: int = 0
    """Given up because the GPU had no room after all, or an engine did not come."""
    transition_s: float = 0.0
    backoff: float = 1.0


class Residency:
    """Plans, and takes one engine at a time where the plan wants it. Told of time and events, returns commands."""

    def __init__(
        self,
        config: ResidencyConfig,
        cost: CostConfig,
        engines: Sequence[EngineConfig],
        fleet: Fleet,
        safe_modes: Callable[[str], int],
        evict: Callable[[str], int],
        waiting: Callable[[], Iterator[int]],
        *,
        profile: Profile | None = None,
        total_bytes: int | None = None,
        estimated_bytes: Mapping[str, int] | None = None,
    ) -> None:
        """`safe_modes(model)`: bit set of the modes that may serve a request of unknown task.

        `evict(engine)`: abort what runs there and send it elsewhere; returns how many. `waiting`: the modes allowed
        (bit sets) of each request that waits. `total_bytes`: the GPU's memory, where it is known without a view.
        `estimated_bytes`: what each engine takes there by its files, where that is known.
        """
        self._config = config
        self._cost = cost
        self._fleet = fleet
        self._safe_modes = safe_modes
        self._evict = evict
        self._waiting = waiting
        self._total_bytes = total_bytes
        self._estimated_bytes = estimated_bytes or {}
        self._profile = profile
        self._engines = engines
        self._autos: list[_Auto] = []
        self._always = 0
        for engine in engines:
            modes = fleet.modes_of(engine.name)
            if engine.residency == "auto":
                self._autos.append(_Auto(engine, modes, profile.of(engine.name) if profile is not None else None))
                fleet.engine_left(engine.name, "cold")
            else:
                self._always |= modes
        self._index = {auto.name: i for i, auto in enumerate(self._autos)}
        self._models = tuple(dict.fromkeys(engine.model for engine in engines))
        self._demand = Demand()
        self._moves: deque[tuple[int, Residence]] = deque()
        self._tour = 0
        """Bit set of the engines that are started only to be put to sleep."""
        self._moving = -1
        self._to: Residence = "resident"
        self._told = False
        """The command for the engine under way was given."""
        self._evicted = False
        self._since_us = 0
        self._drain_until_us = 0
        self._room_until_us = 0
        self._began_us = -1
        self._planned = False
        self._plan_us = 0
        self._settled_us = 0
        """When the present set was complete."""
        self._adopted_us = 0
        self._left_us = -1
        """When the last engine left the GPU: an older view does not show its room."""
        self._dwell_us = round(config.min_dwell_s * 1e6)
        self._backoff = 1.0
        self._doubled_us = 0
        self._regretted_us = -1
        self._favourite = -1
        self._favoured_us: deque[int] = deque(maxlen=256)
        self._maximal: tuple[tuple[int, ...], int | None, list[int]] = ((), None, [])
        self.history: deque[Move] = deque(maxlen=256)
        self.first: tuple[str, ...] = ()
        """What the first plan chose."""
        self._num_plans = 0
        self._num_switches = self._num_emergencies = self._num_moved = self._num_dropped = 0
        self._transition_us = 0

    # --- what others tell it -----------------------------------------------------------------------------------------

    def arrived(self, num_prompt_tokens: int, num_output_tokens: int, eligible: int) -> None:
        """A request was admitted."""
        self._demand.note(num_prompt_tokens, num_output_tokens, eligible)

    def is_leaving(self, engine: str) -> bool:
        """Whether nothing may be routed there any more."""
        return self._moving >= 0 and self._autos[self._moving].name == engine and self._to != "resident"

    def may_move(self, engine: str) -> bool:
        """Whether the engine is one of those planned for."""
        return engine in self._index

    def is_switching(self, engine: str) -> bool:
        """Whether the engine is on its way by a plan."""
        return self._planned and self._moving >= 0 and self._autos[self._moving].name == engine

    def engine_up(self, t_us: int, info: EngineInfo) -> None:
        """An engine is warm: it was started or woken, by a plan or after its death."""
        i = self._index.get(info.engine, -1)
        if i < 0:
            return
        auto = self._autos[i]
        auto.can_sleep = info.can_sleep
        if self.is_leaving(info.engine):
            # It had died, and its restart was on the way before it was sent off: what is sent there now would be lost.
            self._fleet.engine_left(info.engine, self._to)
        elif self._moving == i:
            took_s = (t_us - self._since_us) * 1e-6
            if auto.residence == "asleep":
                auto.wake_s += COST_ALPHA * (took_s - auto.wake_s)
            else:
                auto.start_s = info.start_s or took_s
            auto.residence = "resident"
            self._arrive(t_us)
        else:
            auto.residence = "resident"

    def engine_left(self, t_us: int, engine: str, residence: Residence, took_s: float) -> None:
        """An engine is asleep or cold."""
        i = self._index.get(engine, -1)
        if i < 0:
            return
        auto = self._autos[i]
        if self._moving == i and self._to == "asleep":
            auto.can_sleep = residence == "asleep"
        if auto.residence == "resident":
            auto.sleep_s += COST_ALPHA * (took_s - auto.sleep_s)
        auto.residence = residence
        self._left_us = t_us
        self._fleet.engine_left(engine, residence)
        if self._moving == i:
            self._arrive(t_us)

    def engine_lost(self, t_us: int, engine: str) -> None:
        """An engine died, or did not come. The pool starts it anew; what was planned beside it is dropped."""
        i = self._index.get(engine, -1)
        if i < 0:
            return
        auto = self._autos[i]
        if auto.residence == "asleep" and self._moving != i:
            auto.residence = "cold"
            self._fleet.engine_left(engine, "cold")
            return
        if self._moving == i and self._to == "resident":
            # It is wanted there: to come back is the pool's work from now on.
            auto.residence = "resident"
            self._fleet.wanted(engine)
            if not self._tour >> i & 1:
                self._drop()
            self._arrive(t_us)

    # --- time --------------------------------------------------------------------------------------------------------

    def tick(self, t_us: int, view: GpuView | None) -> list[Transit]:
        """Go on with what is under way, or make a plan when one is due."""
        if self._began_us < 0:
            self._began_us = self._settled_us = t_us
        if self._moving >= 0:
            return self._go_on(t_us)
        if self._moves:
            return self._begin(t_us, view)
        if not self._planned:
            if view is None and t_us - self._began_us < VIEW_WAIT_US and self._total_bytes is None:
                return []
            self._first_plan(t_us, view)
        elif t_us >= self._plan_us:
            self._plan(t_us, view)
        else:
            return []
        self._plan_us = t_us + round(self._config.plan_interval_s * 1e6)
        return self._begin(t_us, view) if self._moves else []

    def _begin(self, t_us: int, view: GpuView | None) -> list[Transit]:
        """Take the next engine of the plan on its way."""
        i, to = self._moves[0]
        auto = self._autos[i]
        if to == auto.residence:
            self._moves.popleft()
            self._finish_plan(t_us)
            return []
        if self._tour >> i & 1 and to == "resident" and self._is_pressed():
            self._skip(i)
            self._finish_plan(t_us)
            return self._begin(t_us, view) if self._moves else []
        if to == "resident" and not self._has_room(auto, t_us, view):
            if not self._room_until_us:
                self._room_until_us = t_us + ROOM_WAIT_US
            elif t_us >= self._room_until_us:
                if self._tour >> i & 1:
                    self._skip(i)
                else:
                    self._drop()
                    self._plan_us = t_us  # with the memory that there is now
                self._finish_plan(t_us)
            return []
        self._moves.popleft()
        self._room_until_us = 0
        self._moving, self._to, self._since_us = i, to, t_us
        self._told = self._evicted = False
        if to != "resident":
            self._fleet.engine_left(auto.name, to)
            self._drain_until_us = t_us + round(self._config.drain_s * 1e6)
        return self._go_on(t_us)

    def _has_room(self, auto: _Auto, t_us: int, view: GpuView | None) -> bool:
        """Whether the newest view shows that the reserve stays free; where there is no view, the budget has said so."""
        if view is None or view.memory_free_bytes is None:
            return True
        if view.t_us <= self._left_us:
            return False  # from before the last engine left
        left = view.memory_free_bytes - (auto.need.gpu_bytes - self._left_on_gpu(auto))
        return left >= self._config.reserve_bytes

    def _left_on_gpu(self, auto: _Auto) -> int:
        return auto.need.asleep_gpu_bytes if auto.residence == "asleep" else 0

    def _go_on(self, t_us: int) -> list[Transit]:
        if self._told:
            return []
        auto = self._autos[self._moving]
        if self._to != "resident" and self._fleet.num_running_on(auto.name):
            if t_us >= self._drain_until_us and not self._evicted:
                self._evicted = True
                self._num_moved += self._evict(auto.name)
            return []
        self._told = True
        self._since_us = t_us
        return [Transit(auto.name, self._to)]

    def _arrive(self, t_us: int) -> None:
        """The engine under way is where it should be, or will not come."""
        self._autos[self._moving].changed_us = t_us if self._num_plans > 1 else None
        self._moving = -1
        self._finish_plan(t_us)

    def _finish_plan(self, t_us: int) -> None:
        if not self._moves and self._moving < 0:
            self._settled_us = t_us
            self._tour = 0
            if self._num_plans > 1:
                self._transition_us += t_us - self._adopted_us

    def _is_pressed(self) -> bool:
        """Whether somebody waits for what is not there: no time to start an engine only to put it to sleep."""
        up = self._fleet.up
        looked_at = islice(self._waiting(), MAX_WAITING_LOOKED_AT)
        return bool(up) and (any(not eligible & up for eligible in looked_at) or bool(self._dead()))

    def _skip(self, i: int) -> None:
        """This engine stays cold."""
        self._moves = deque(move for move in self._moves if move[0] != i)
        self._room_until_us = 0

    def _drop(self) -> None:
        """What was planned beside this does not come about."""
        self._num_dropped += 1
        self._moves.clear()
        self._room_until_us = 0

    # --- plans -------------------------------------------------------------------------------------------------------

    def _first_plan(self, t_us: int, view: GpuView | None) -> None:
        """As many as fit: the best by what is known of them, then in the order of the configuration."""
        self._planned = True
        budget = self._budget(view, counted=False)
        chosen = 0
        everything = (1 << len(self._autos)) - 1
        if budget.available_bytes is None:
            chosen = everything
        else:
            worth = self._worth(self._expected_classes(), fast=True)
            best: tuple[bool, float, int, float, int] | None = None
            for subset in self._sets(budget, 0):
                modes = self._modes(subset)
                key = (
                    not self._is_safe(modes),
                    round(worth.least_of(modes), 6),
                    -subset.bit_count(),
                    round(worth.of(modes), 6),
                    _order(subset, len(self._autos)),
                )
                if best is None or key < best:
                    best, chosen = key, subset
        self._adopt(t_us, budget, chosen, "first", 0.0, 0.0)

    def _expected_classes(self) -> list[Class]:
        """Traffic to begin with, when none has come: of each model, some for any mode and some for its best."""
        classes = []
        for model in self._models:
            safe = self._safe_modes(model)
            books = [(i, book) for i, book in enumerate(self._fleet.books) if book.mode.model == model]
            highest = max((book.mode.quality or 0.0 for _, book in books), default=0.0)
            best = sum(1 << i for i, book in books if (book.mode.quality or 0.0) >= highest)
            classes += [Class(1.0, 1.0, *UNKNOWN_TOKENS, safe), Class(0.2, 0.2, *UNKNOWN_TOKENS, best & safe or safe)]
        return [one for one in classes if one.eligible]

    def _plan(self, t_us: int, view: GpuView | None) -> None:
        """Look whether another set is worth the move."""
        classes = self._demand.fold(t_us)
        budget = self._budget(view, counted=True)
        present, dead = self._present(), self._dead()
        serving = self._modes(present & ~dead)
        is_over = not budget.fits(self._gpu_bytes(present))
        is_unsafe = not self._is_safe(serving) and any(
            self._is_safe(self._modes(subset & ~dead)) for subset in self._sets(budget, present)
        )
        urgency = "memory" if is_over else "quality" if is_unsafe else "engine lost" if dead else ""
        waiting = self._waiting_by(classes)
        if any(waiting) and not self._fleet.num_running:
            classes = hushed(classes, serving)
        fast = self._worth(classes, fast=True, waiting=waiting, dead=dead)
        if fast.is_idle and not (is_over or is_unsafe):
            return
        slow = self._worth(classes, fast=False, waiting=waiting, dead=dead)
        now_costs, starving = fast.least_of(serving), fast.starving(serving)
        sets = self._ranked(fast, budget, present)
        self._note_favourite(t_us, sets, fast, budget)
        life_s = self._mix_life_s(t_us)
        slow_costs = slow.least_of(serving)
        doubt = NOISE + 1.0 / sqrt(1.0 + self._demand.num_known)  # few requests say little of a mix
        is_early = self._demand.age_s(t_us) < EVIDENCE_S
        stays = urgency == "memory" and any(
            not subset & ~present
            and not fast.starving(self._modes(subset))
            and not fast.unserved_per_s(self._modes(subset))
            for _, subset in sets
        )
        best: tuple[float, int, str, float, float] | None = None
        is_regretted = False
        for costs, subset in sets if stays else sets[:MAX_WEIGHED]:
            if stays and subset & ~present:
                continue  # who took memory may take what is given up as well: nobody comes while all can be served
            after = self._kept(subset, present, budget)
            modes = self._modes(after & ~dead)
            if after == present or subset & dead or (is_unsafe and not self._is_safe(modes)):
                continue
            reason = urgency or ("unserved" if starving > fast.starving(modes) else "gain")
            gain = now_costs - costs
            if not urgency and gain < NOISE * now_costs:
                continue
            price = self._price(present & ~dead, after, fast, budget)
            net = self._net(reason, gain, price, life_s, dead)
            if reason == "engine lost" and net <= 0:
                continue
            if not urgency:
                if net <= 0:
                    continue
                slow_gain = slow_costs - slow.least_of(modes)
                if reason == "gain" and (
                    slow_gain < doubt * slow_costs or self._net(reason, slow_gain, price, life_s, 0) <= 0
                ):
                    continue
                if self._goes_back(after ^ present, t_us):
                    is_regretted = True
                    if reason == "gain" or not self._may_return(present, after, t_us):
                        continue
                if any(self._is_spared(i, t_us) for i in _members(present & ~after)):
                    continue
                if reason == "gain" and (is_early or t_us - self._settled_us < self._dwell_needed_us(present, after)):
                    continue
            if best is None or net > best[0]:
                best = net, after, reason, gain, price
        self._note_regret(t_us, is_regretted)
        if best is not None:
            _, after, reason, gain, price = best
            self._num_emergencies += reason != "gain"
            self._adopt(t_us, budget, after, reason, gain, price)

    def _net(self, reason: str, gain: float, price: float, life_s: float, dead: int) -> float:
        """What a move earns over what it costs, by as much as its reason asks for."""
        match reason:
            case "gain":
                return life_s * gain - self._config.hysteresis * self._backoff * price
            case "engine lost":
                # What died comes back by itself: longer than that nothing is gained.
                back_s = max(self._autos[i].start_s for i in _members(dead)) * 2 + 1.0
                return min(life_s, back_s) * gain - price
            case _:
                # What goes unserved does so for as long as nothing is done.
                return self._config.horizon_s * gain - price

    def _adopt(self, t_us: int, budget: Budget, after: int, reason: str, gain: float, price: float) -> None:
        """Line up the moves: who fits comes first, then who has to go. One at a time; sleepers in the way first."""
        autos = self._autos
        before = self._present()
        self._num_plans += 1
        self._adopted_us = t_us
        leavers = sorted(_members(before & ~after), key=lambda i: autos[i].need.gpu_bytes)
        enterers = list(_members(after & ~before))
        asleep = [i for i, auto in enumerate(autos) if auto.residence == "asleep" and not after >> i & 1]
        room = None if budget.available_bytes is None else budget.available_bytes - self._awake_bytes(after)
        away = put_away(
            [*(i for i in leavers if autos[i].can_sleep), *asleep],
            [auto.need for auto in autos],
            room,
            self._config.max_asleep_bytes,
        )
        moves: list[tuple[int, Residence]] = [(i, "cold") for i in asleep if not away >> i & 1]
        taken = self._gpu_bytes(before)
        leaving = list(leavers)
        cold = 0.0
        for i in enterers:
            auto = autos[i]
            more = auto.need.gpu_bytes - self._left_on_gpu(auto)
            while leaving and not budget.fits(taken + more):
                goes = leaving.pop()
                moves.append((goes, "asleep" if away >> goes & 1 else "cold"))
                taken -= autos[goes].need.gpu_bytes
            moves.append((i, "resident"))
            taken += more
            if auto.residence == "cold":
                cold = max(cold, auto.start_s)
        moves.extend((i, "asleep" if away >> i & 1 else "cold") for i in leaving)
        if reason == "first":
            moves = self._with_tour(moves, after, budget)
        self._moves.extend(moves)
        if reason == "first":
            self.first = tuple(autos[i].name for i in _members(after))
        else:
            self._num_switches += 1
            self._dwell_us = round(max(self._config.min_dwell_s, COLD_DWELLS * cold) * 1e6)
            self._room_until_us = 0
            names = [auto.name for auto in autos]
            self.history.append(
                Move(
                    t_us,
                    tuple(names[i] for i in _members(before)),
                    tuple(names[i] for i in _members(after)),
                    reason,
                    gain,
                    price,
                )
            )

    def _with_tour(
        self, moves: list[tuple[int, Residence]], chosen: int, budget: Budget
    ) -> list[tuple[int, Residence]]:
        """Once the first engine serves, start those that are not chosen and put them to sleep, while there is room.

        A start takes as long as fifty wakes: who was started once is there within a second when it is wanted.
        """
        if len(moves) < 2:
            return moves
        autos = self._autos
        rest = [i for i in range(len(autos)) if not chosen >> i & 1 and autos[i].is_known_to_sleep]
        room = None if budget.available_bytes is None else budget.available_bytes - self._awake_bytes(chosen)
        away = put_away(rest, [auto.need for auto in autos], room, self._config.max_asleep_bytes)
        moves.sort(key=lambda move: (not self._is_safe(autos[move[0]].modes), autos[move[0]].need.gpu_bytes))
        taken = autos[moves[0][0]].need.gpu_bytes
        tour: list[tuple[int, Residence]] = []
        for i in _members(away):
            if budget.fits(taken + autos[i].need.gpu_bytes):
                tour += [(i, "resident"), (i, "asleep")]
                taken += autos[i].need.asleep_gpu_bytes
                self._tour |= 1 << i
        return [moves[0], *tour, *moves[1:]]

    # --- what a set is worth -----------------------------------------------------------------------------------------

    def _worth(self, classes: list[Class], *, fast: bool, waiting: Sequence[int] = (), dead: int = 0) -> Worth:
        """`dead`: engines that should be there and are not: their modes serve nothing."""
        gone = self._modes(dead) & ~self._always
        known = [self._curve(book) for book in self._fleet.books]
        curves = [curve for curve in known if curve is not None]
        unknown = _guess(curves)
        return Worth(
            [None if gone >> i & 1 else curve or unknown for i, curve in enumerate(known)],
            classes,
            self._slowdown,
            fast=fast,
            latency_weight=self._cost.latency_weight,
            energy_weight=self._cost.energy_weight,
            waiting=waiting,
            swing=self._demand.swing,
        )

    def _slowdown(self, num_others: float) -> float:
        """What other busy engines cost: as learnt, or equal shares of the GPU until that is known."""
        sharing = self._fleet.sharing
        if sharing.factors[min(len(sharing.factors) - 1, ceil(num_others))] > 1.0:
            return sharing.at(num_others)
        return 1.0 + num_others

    def _curve(self, book: ModeBook) -> Curve | None:
        """What is known of a mode: from its requests, else from the profile, else from its warm-up."""
        estimate = book.estimate
        profile = self._profile.of(book.name) if self._profile is not None else None
        if book.info is None and profile is None:
            return None
        ttft, tpot = estimate.ttft, estimate.tpot
        kv_tokens = book.kv_capacity_tokens or 1 << 40
        is_learnt = profile is None or ttft.n >= LEARNT or bool(ttft.b)
        if profile is not None and not is_learnt:
            a0, a1, a2 = profile.ttft_ms
            c0, c1, c2 = profile.tpot_ms
            ttft_s = (a0 * 1e-3, a1 * 1e-3, a2 * 1e-9)
            tpot_s = (c0 * 1e-3, c1 * 1e-3, c2 * 1e-3)
        else:
            ttft_s = (ttft.a * 1e-3, ttft.b * 1e-6, ttft.c * 1e-9)
            tpot_s = (tpot.a * 1e-3, tpot.b * 1e-3, tpot.c * 1e-7)
        return Curve(ttft_s, tpot_s, book.num_slots, kv_tokens, estimate.mj_per_token or 0.0, is_learnt)

    def _sets(self, budget: Budget, present: int) -> Iterator[int]:
        """Sets that fit, at most MAX_EVALUATIONS: the present one, all small ones, those that are full, the rest.

        Beyond ENUMERATED engines: the present one and its neighbours by one engine added, dropped or swapped.
        """
        num = len(self._autos)
        seen: set[int] = set()

        def fresh(subset: int) -> bool:
            if subset in seen or len(seen) >= MAX_EVALUATIONS or not budget.fits(self._gpu_bytes(subset)):
                return False
            seen.add(subset)
            return True

        if fresh(present):
            yield present
        if num > ENUMERATED:
            yield from filter(fresh, _neighbours(present, num))
            return
        for size in (1, 2):
            for members in combinations(range(num), size):
                if fresh(sum(1 << i for i in members)):
                    yield sum(1 << i for i in members)
        sizes = tuple(self._gpu_bytes(1 << i) for i in range(num))
        if self._maximal[:2] != (sizes, budget.available_bytes):
            self._maximal = sizes, budget.available_bytes, maximal_sets(sizes, budget.available_bytes)
        yield from filter(fresh, self._maximal[2])
        yield from filter(fresh, range(1 << num))

    def _ranked(self, worth: Worth, budget: Budget, present: int) -> list[tuple[float, int]]:
        """The sets by what they cost, cheapest first. A larger one may only be worth what a part of it is."""
        sets = [(worth.of(self._modes(subset)), subset) for subset in self._sets(budget, present)]
        sets = [(costs, subset) for costs, subset in sets if self._is_safe(self._modes(subset))] or sets
        sets.sort()
        return sets

    def _kept(self, subset: int, present: int, budget: Budget) -> int:
        """The set, with those of the present ones that fit beside it: nobody leaves without need."""
        for i in sorted(_members(present & ~subset), key=lambda i: self._autos[i].need.gpu_bytes):
            if budget.fits(self._gpu_bytes(subset | 1 << i)):
                subset |= 1 << i
        return subset

    def _price(self, before: int, after: int, worth: Worth, budget: Budget) -> float:
        """K: what the way from one set to the other costs, in the unit of V times seconds."""
        autos = self._autos
        enter_s = sum(autos[i].enter_s for i in _members(after & ~before))
        leave_s = sum(autos[i].sleep_s for i in _members(before & ~after))
        now_costs = worth.least_of(self._modes(before))
        copying = COPY_SHARE * now_costs * (enter_s + leave_s)
        if budget.fits(self._gpu_bytes(before | after)):
            return copying  # who comes does so beside the others
        stays = self._modes(before & after)
        rate = worth.unserved_per_s(stays) - worth.unserved_per_s(self._modes(before))
        stall_s = enter_s + leave_s
        stalled = max(0.0, rate) * stall_s * stall_s / 2 / (1.0 - self._load())
        detour = max(0.0, worth.served_of(stays) - now_costs) * stall_s if stays else 0.0
        return copying + self._cost.latency_weight * stalled + detour

    def _load(self) -> float:
        """Share of the slots in use, at most 0.9."""
        slots = running = 0
        for book in self._fleet.books:
            if book.up:
                slots += book.num_slots
                running += book.num_running
        return min(0.9, running / slots) if slots else 0.9

    # --- reluctance --------------------------------------------------------------------------------------------------

    def _dwell_needed_us(self, before: int, after: int) -> int:
        """How old the present set must be: it may have come by a cold start, or have to go by one."""
        cold_s = max(
            (self._autos[i].start_s for i in _members(after & ~before) if self._autos[i].residence == "cold"),
            default=0.0,
        )
        return max(self._dwell_us, round(COLD_DWELLS * cold_s * 1e6))

    def _goes_back(self, changed: int, t_us: int) -> bool:
        """Whether an engine would return to where it was less than two dwells ago."""
        within_us = 2 * self._dwell_us
        moved = [self._autos[i].changed_us for i in _members(changed)]
        return any(when is not None and t_us - when < within_us for when in moved)

    def _may_return(self, before: int, after: int, t_us: int) -> bool:
        """Whether requests that only these modes may serve have waited for their turn.

        The others have theirs first: as long as the move takes, and up to four times that where both are wanted again
        and again, but never longer than a move for gain would have to wait.
        """
        autos, changed = self._autos, before ^ after
        move_s = sum(autos[i].enter_s for i in _members(after & ~before))
        move_s += sum(autos[i].sleep_s for i in _members(before & ~after))
        turn_us = min(2 * self._dwell_us, round(min(self._backoff, UNSERVED_BACKOFF_MOST) * move_s * 1e6))
        moved = [autos[i].changed_us for i in _members(changed)]
        return all(when is None or t_us - when >= turn_us for when in moved)

    def _is_spared(self, i: int, t_us: int) -> bool:
        """Whether something runs there that was moved before, and has not had its time since."""
        drain_us = self._config.drain_s * 1e6
        return any(
            entry.num_moves and t_us - entry.dispatched_us < drain_us * SPARED**entry.num_moves
            for mode in _members(self._autos[i].modes)
            for entry in self._fleet.books[mode].running.entries()
        )

    def _note_regret(self, t_us: int, is_regretted: bool) -> None:
        """Who wants back within two dwells doubles h, once per switch; calm halves it."""
        if is_regretted and self._regretted_us != self._settled_us:
            self._regretted_us = self._settled_us
            self._backoff = min(BACKOFF_MOST, 2 * self._backoff)
            self._doubled_us = t_us
        elif self._backoff > 1.0 and t_us - self._doubled_us >= CALM_US:
            self._backoff /= 2
            self._doubled_us = t_us

    def _note_favourite(self, t_us: int, sets: list[tuple[float, int]], worth: Worth, budget: Budget) -> None:
        """Remember when another set became the best one: that is how long a mix lasts."""
        if not sets:
            return
        costs, subset = sets[0]
        if self._favourite < 0 or not budget.fits(self._gpu_bytes(self._favourite)):
            self._favourite = subset
        elif subset != self._favourite and costs < (1 - NOISE) * worth.of(self._modes(self._favourite)):
            self._favourite = subset
            self._favoured_us.append(t_us)

    def _mix_life_s(self, t_us: int) -> float:
        """Mean time between changes of the best set over the last hour; the horizon while there was none."""
        favoured = self._favoured_us
        while favoured and favoured[0] < t_us - MIX_REMEMBERED_US:
            favoured.popleft()
        if len(favoured) < 2:
            return self._config.horizon_s
        life_s = (favoured[-1] - favoured[0]) * 1e-6 / (len(favoured) - 1)
        return min(self._config.horizon_s, max(MIX_LEAST_S, life_s))

    # --- small things ------------------------------------------------------------------------------------------------

    def _present(self) -> int:
        return sum(1 << i for i, auto in enumerate(self._autos) if auto.residence == "resident")

    def _dead(self) -> int:
        """Those that should be on the GPU and are not up."""
        up = self._fleet.up
        return sum(1 << i for i, auto in enumerate(self._autos) if auto.residence == "resident" and not auto.modes & up)

    def _modes(self, subset: int) -> int:
        modes = self._always
        for i in _members(subset):
            modes |= self._autos[i].modes
        return modes

    def _awake_bytes(self, subset: int) -> int:
        return sum(self._autos[i].need.gpu_bytes for i in _members(subset))

    def _gpu_bytes(self, subset: int) -> int:
        """Of the set and of what sleeping engines beside it leave on the GPU."""
        return self._awake_bytes(subset) + sum(
            auto.need.asleep_gpu_bytes
            for i, auto in enumerate(self._autos)
            if auto.residence == "asleep" and not subset >> i & 1
        )

    def _is_safe(self, modes: int) -> bool:
        """Whether each model keeps a mode for requests of unknown task, where it has one at all."""
        return all(not (safe := self._safe_modes(model)) or safe & modes for model in self._models)

    def _budget(self, view: GpuView | None, *, counted: bool) -> Budget:
        """As of this view. `counted`: the engines of the present set are on the GPU, so that the view shows them."""
        total_bytes = self._total_bytes
        if view is not None and view.memory_total_bytes is not None:
            total_bytes = view.memory_total_bytes
        for auto in self._autos:
            auto.need = self._need(auto.config, auto.profile, total_bytes)
        always_bytes = 0
        for engine in self._engines:
            if engine.residency == "always":
                profile = self._profile.of(engine.name) if self._profile is not None else None
                always_bytes += self._need(engine, profile, total_bytes).gpu_bytes
        booked = self._gpu_bytes(self._present() & ~self._dead()) if counted else 0
        settled = view is not None and counted and view.t_us > max(self._settled_us, self._left_us) and not self._dead()
        return budget_of(
            view, total_bytes, self._config.reserve_bytes, self._config.max_asleep_bytes, booked, always_bytes, settled
        )

    def _need(self, engine: EngineConfig, profile: ModeProfile | None, total_bytes: int | None) -> Need:
        return need_of(
            engine,
            profile,
            total_bytes,
            self._config.sleep_level,
            reserve_bytes=self._config.reserve_bytes,
            estimated_bytes=self._estimated_bytes.get(engine.name, 0),
        )

    def _waiting_by(self, classes: list[Class]) -> list[int]:
        """Of each class, how many wait although no mode that they may use is up. Adds classes that only wait."""
        counts = [0] * len(classes)
        up = self._fleet.up
        numbers = {traffic.eligible: i for i, traffic in enumerate(classes)}
        for number, eligible in enumerate(self._waiting()):
            if number >= MAX_WAITING_LOOKED_AT:
                break
            if eligible & up:
                continue
            if eligible not in numbers:  # so long ago that its class is forgotten
                numbers[eligible] = len(classes)
                classes.append(Class(0.0, 0.0, *UNKNOWN_TOKENS, eligible))
                counts.append(0)
            counts[numbers[eligible]] += 1
        return counts

    def residence_of(self, engine: str) -> tuple[Residence, str]:
        """Where an engine is, and whether it is on its way: `leaving`, `coming` or nothing."""
        i = self._index.get(engine, -1)
        if i < 0:
            return "resident", ""
        moving = "" if self._moving != i else "coming" if self._to == "resident" else "leaving"
        return self._autos[i].residence, moving

    def figures(self) -> ResidencyFigures:
        """What it has done so far."""
        return ResidencyFigures(
            num_switches=self._num_switches,
            num_emergencies=self._num_emergencies,
            num_moved_requests=self._num_moved,
            num_dropped_plans=self._num_dropped,
            transition_s=self._transition_us * 1e-6,
            backoff=self._backoff,
        )


def _guess(known: Sequence[Curve]) -> Curve:
    """A mode of which nothing is known: twice as slow as the slowest, so that it comes only where nothing else may."""
    if not known:
        return Curve((1.0, 0.0, 0.0), (0.1, 0.0, 0.0), 1, 1 << 40)
    a0, a1, a2 = (2 * max(curve.ttft_s[i] for curve in known) for i in range(3))
    c0, c1, c2 = (2 * max(curve.tpot_s[i] for curve in known) for i in range(3))
    return Curve((a0, a1, a2), (c0, c1, c2), min(curve.num_slots for curve in known), 1 << 40)


def _members(subset: int) -> Iterator[int]:
    """Indices of the bits, ascending."""
    while subset:
        low = subset & -subset
        yield low.bit_length() - 1
        subset ^= low


def _order(subset: int, num: int) -> int:
    """Less for sets that hold the first engines of the configuration."""
    return -sum(1 << (num - 1 - i) for i in _members(subset))


def _neighbours(present: int, num: int) -> Iterator[int]:
    """Sets that differ by one engine added, dropped or swapped."""
    for i in range(num):
        yield present ^ 1 << i
    for goes in _members(present):
        for comes in range(num):
            if not present >> comes & 1:
                yield present ^ 1 << goes ^ 1 << comes

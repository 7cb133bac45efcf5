"""Shadows: a small share of what a certified mode has served runs once more on the reference, and the two are compared.

Only idle capacity is used: a shadow begins when nothing waits and at least half of the reference's slots are free, and
is broken off when work waits or when its slots are wanted. It is nobody's request: no place in the bounds, no count in
the conservation, its energy is waste. The share is kept per mode and task by counting, not by chance.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from msd.config import QualityConfig
from msd.core import commands as c
from msd.core.certificates import Certificates
from msd.core.entry import Entry
from msd.core.events import QualityJudged
from msd.core.fleet import Fleet
from msd.core.trial import Trial
from msd.gate import ALL_TASKS, GateRow, Tried, Withdrawal

AT_ONCE = 4
CREDIT_MOST = 2.0
"""Shadows that a busy time may leave to be made up for."""
ATTEMPT = 1
DOUBT_PAIRS = 100
"""Unscored pairs from which on somebody is told that few of them agree."""


class Doubt(Struct, frozen=True):
    """Something to look at: live answers that cannot be scored agree less than the gate's did. Shares 0..1."""

    mode: str
    task: str
    num_pairs: int
    agreement: float
    gate_agreement: float


class _Shadow:
    __slots__ = ("aborted", "arm", "task")

    def __init__(self, arm: int, task: str) -> None:
        self.arm = arm
        self.task = task
        self.aborted = False


class Shadows:
    """Which requests are shadowed, and what the pairs say of each (mode, task)."""

    def __init__(self, config: QualityConfig, certificates: Certificates, fleet: Fleet) -> None:
        self._config = config
        self._certificates = certificates
        self._fleet = fleet
        self._running: dict[str, _Shadow] = {}
        self._credit: dict[tuple[int, str], float] = {}
        self._trials: dict[tuple[int, str], Trial] = {}
        self._doubts: list[Doubt] = []
        self._doubted: set[tuple[int, str]] = set()
        self._next = 1
        self.num_begun = 0
        self.num_came_to_nothing = 0
        """Broken off, failed, or of a sampled answer, which differs by chance."""

    @property
    def num_running(self) -> int:
        """Shadows that occupy the reference mode's engine."""
        return len(self._running)

    def trial(self, arm: int, task: str) -> Trial | None:
        """The live pairs of a mode on a task (`*`: no task), if there were any."""
        return self._trials.get((arm, task))

    def begin(self, entry: Entry, num_waiting: int) -> c.Shadow | None:
        """A request got its answer from a mode: whether it is shadowed. Call before its slot is given away."""
        share, arm, request = self._config.shadow_share, entry.parked, entry.request
        if not share or self._certificates.on_trial(arm, request.task) is None:
            return None
        task = request.task or ALL_TASKS
        reference = self._certificates.reference
        book = self._fleet.books[arm]
        if reference < 0 or self._fleet.books[reference].mode.model != book.mode.model:
            # Another model need not mean the same by these token ids.
            return None
        key = (arm, task)
        credit = self._credit[key] = min(self._credit.get(key, 0.0) + share, CREDIT_MOST)
        at = self._fleet.books[reference]
        busy = at.num_running + len(self._running)
        if credit < 1 - 1e-9 or num_waiting or not at.up or 2 * busy >= at.num_slots or len(self._running) >= AT_ONCE:
            return None
        total = request.num_prompt_tokens + request.max_tokens
        if total > (at.max_model_len or 0) or at.reserved_tokens + total > at.kv_capacity_tokens:
            return None
        self._credit[key] = credit - 1
        shadow_id = f"shadow-{self._next}"
        self._next += 1
        self.num_begun += 1
        self._running[shadow_id] = _Shadow(arm, task)
        return c.Shadow(
            shadow_id=shadow_id,
            request_id=request.request_id,
            mode=book.name,
            reference_mode=at.name,
            reference_engine=at.mode.engine,
            task=task,
            max_tokens=request.max_tokens,
        )

    def make_way(self, num_waiting: int, *, at_once: bool = False) -> list[c.Abort]:
        """Break off what is in the way of requests: something waits, or the reference's slots are wanted."""
        if not self._running:
            return []
        at = self._fleet.books[self._certificates.reference]
        if not (at_once or num_waiting or at.num_running + len(self._running) > at.num_slots):
            return []
        aborts = []
        for shadow_id, shadow in self._running.items():
            if not shadow.aborted:
                shadow.aborted = True
                aborts.append(c.Abort(shadow_id, ATTEMPT))
        return aborts

    def knows(self, shadow_id: str) -> bool:
        """Whether this is a shadow under way."""
        return shadow_id in self._running

    def judged(self, event: QualityJudged) -> Withdrawal | None:
        """A shadow ended. What it takes from the mode, if that was one pair too many."""
        shadow = self._running.pop(event.shadow_id, None)
        if shadow is None:
            return None
        arm, task = shadow.arm, shadow.task
        row = self._certificates.on_trial(arm, None if task == ALL_TASKS else task)
        if event.agrees is None or row is None:
            self.num_came_to_nothing += 1
            return None
        trial = self._trials.get((arm, task))
        if trial is None:
            trial = self._trials[arm, task] = Trial(self._config.delta, self._config.alpha)
        if event.difference is None:
            trial.count(event.agrees)
            self._doubt(arm, task, trial, row)
            return None
        if not trial.add(event.difference):
            return None
        difference = trial.sum_difference / trial.num_scored
        return self._certificates.withdraw(arm, task, trial.num_scored, difference, trial.capital)

    def dump(self) -> tuple[Tried, ...]:
        """Every trial, for another process to go on with."""
        recipes = self._certificates.recipes
        return tuple(
            trial.dump(self._fleet.books[arm].name, recipes[arm], task) for (arm, task), trial in self._trials.items()
        )

    def load(self, tried: Sequence[Tried]) -> None:
        """Go on with the trials of an earlier process: of the mode of that name, if it has that recipe still."""
        recipes = self._certificates.recipes
        arms = {(book.name, recipes[arm]): arm for arm, book in enumerate(self._fleet.books)}
        for one in tried:
            arm = arms.get((one.mode, one.recipe))
            if arm is not None:
                trial = self._trials[arm, one.task] = Trial(self._config.delta, self._config.alpha)
                trial.load(one)

    def take_doubts(self) -> list[Doubt]:
        """Modes that agree less than at the gate where nothing can be scored; of each mode and task once."""
        doubts, self._doubts = self._doubts, []
        return doubts

    def _doubt(self, arm: int, task: str, trial: Trial, row: GateRow) -> None:
        if trial.num_unscored < DOUBT_PAIRS or (arm, task) in self._doubted:
            return
        if trial.agreement < row.agreement - self._config.delta:
            self._doubted.add((arm, task))
            name = self._fleet.books[arm].name
            self._doubts.append(Doubt(name, task, trial.num_unscored, trial.agreement, row.agreement))

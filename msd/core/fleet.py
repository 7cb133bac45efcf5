"""The books of the engines: which are up, how many slots and KV tokens each has left. One mode, one entry.

Slots and KV reservations are counted here from dispatches and ends, never asked of an engine: a decision needs them
now, and an engine's gauges trail by a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msd.config import EngineConfig
from msd.core.energy_domain import Coefficients
from msd.core.entry import Entry
from msd.core.estimator import FLOOR_MS, PROMPT_CELLS, ModeEstimate, Sharing, batch_cell
from msd.core.running import Running
from msd.domain import EngineInfo, EngineLoad, Mask, Mode, Residence
from msd.profile import Profile
from msd.recipe import is_lossless

_NO_BOUND = 1 << 62
_HEALTH = int(Mask.HEALTH)
_ASLEEP = int(Mask.ASLEEP)
_SLOTS = int(Mask.SLOTS)

_NO_CORRECTION = [1.0] * PROMPT_CELLS

Folded = tuple[
    str, int, int, int, int, int, float, float, float, float, float, float, float, float, float, list[float],
    list[float], list[float], int, int, list[float],
]  # fmt: skip
"""What a decision needs of one mode, as `ModeBook.fold` puts it together."""


class ModeBook:
    """One mode: its engine's limits, what runs there, and what the core expects of it."""

    __slots__ = (
        "estimate",
        "folded",
        "info",
        "kv_capacity_tokens",
        "load",
        "max_model_len",
        "mode",
        "name",
        "num_decisions",
        "num_parked",
        "num_running",
        "num_slots",
        "reserved_tokens",
        "residence",
        "running",
        "spares_ms",
        "stale",
        "up",
    )

    def __init__(self, mode: Mode, num_slots: int, max_model_len: int | None) -> None:
        self.mode = mode
        self.name = mode.name
        self.num_slots = num_slots
        self.max_model_len = max_model_len
        """Longest prompt plus output; None until the engine has told it."""
        self.kv_capacity_tokens = 0
        self.up = False
        self.residence: Residence = "resident"
        """Where its weights are, or are about to be when it leaves; only engines of residency `auto` move."""
        self.info: EngineInfo | None = None
        self.load = EngineLoad()
        self.num_running = 0
        self.num_parked = 0
        """Requests that wait for this mode by the policy's choice."""
        self.reserved_tokens = 0
        self.num_decisions = 0
        self.estimate = ModeEstimate()
        self.running = Running()
        self.stale = True
        """The books or the estimate changed since `folded` was made."""
        self.spares_ms: list[float] = []
        """As `Running.spares_ms` said when `folded` was made."""
        self.folded: Folded = self.fold()

    def fold(self) -> Folded:
        """Put together what holds for every request until the books change: a decision computes the rest."""
        estimate, running, num_running = self.estimate, self.running, self.num_running
        mask = free = 0
        max_len = room = _NO_BOUND
        if self.up:
            free = self.num_slots - num_running
            if free <= 0:
                mask = _SLOTS
            if self.max_model_len is not None:
                max_len = self.max_model_len
            if num_running:
                room = self.kv_capacity_tokens - self.reserved_tokens
        else:
            mask = _HEALTH if self.residence == "resident" else _ASLEEP
        ttft, tpot = estimate.ttft, estimate.tpot
        read_ms = ttft.b * 0.001
        tpot_ms = tpot.a
        base_ms = ttft.a
        cell = 0
        if num_running:
            tpot_ms += tpot.b * num_running + tpot.c * 1e-4 * running.num_tokens
            base_ms += read_ms * running.unread_tokens + 1.5 * tpot_ms - tpot.a
            cell = batch_cell(num_running)
        costs = estimate.costs
        energy_row = _NO_CORRECTION
        prompt_mj = output_mj = -1.0
        if costs is not None:
            prompt_mj = costs.prefill_mj_per_token
            output_mj = costs.step_mj / (num_running + 1) + costs.decode_mj_per_token
            energy_row = estimate.energy_cells.rows[cell]
        elif estimate.mj_per_token is not None:
            prompt_mj = output_mj = estimate.mj_per_token
        self.stale = False
        self.spares_ms = running.spares_ms() if num_running else []
        ends = running.ends
        self.folded = folded = (
            self.name,
            mask,
            num_running,
            free,
            max_len,
            room,
            base_ms,
            read_ms,
            ttft.c * 1e-6,
            tpot.a,
            tpot_ms if tpot_ms > FLOOR_MS else FLOOR_MS,
            tpot.b,
            estimate.eos_step_ms,
            prompt_mj,
            output_mj,
            estimate.ttft_cells.rows[cell],
            estimate.tpot_cells.rows[cell],
            energy_row,
            running.end_us,
            ends[-1] if ends else 0,
            self.spares_ms,
        )
        return folded

    def wait_ms(self, t_us: int) -> float:
        """Expected wait for a slot of a full mode: until all that wait for it have one, and one more is free."""
        ends, num_ahead = self.running.ends, self.num_parked
        if num_ahead < len(ends):
            left_us = ends[num_ahead] - t_us
            if left_us > 0:
                return left_us * 0.001
        return self._long_wait_ms(num_ahead, t_us)

    def _long_wait_ms(self, num_ahead: int, t_us: int) -> float:
        ends, service_ms = self.running.ends, self.estimate.service_ms
        if not ends:
            return service_ms * (num_ahead + 1) / self.num_slots
        rounds, index = divmod(num_ahead, len(ends))
        left_ms = (ends[index] - t_us) * 0.001
        if left_ms <= 0.0:
            # Overdue: as long as it takes in the mean for so many to end; who is later than that is as late again.
            left_ms = max(0.5 * service_ms * (index + 1) / self.num_slots, -left_ms)
        return left_ms + rounds * service_ms


class Fleet:
    """All modes in their fixed order; bit i of a bit set is mode i."""

    def __init__(self, modes: Sequence[tuple[Mode, int, int | None]]) -> None:
        self.books = [ModeBook(mode, slots, max_len) for mode, slots, max_len in modes]
        self.by_name = {book.mode.name: i for i, book in enumerate(self.books)}
        self._by_engine: dict[str, list[int]] = {}
        for i, book in enumerate(self.books):
            self._by_engine.setdefault(book.mode.engine, []).append(i)
        self.free = 0
        """Bit set of modes that are up and have a slot."""
        self.up = 0
        self.num_running = 0
        self.num_busy = 0
        """Modes that run something."""
        self.sharing = Sharing()
        self.end_us = 0
        """Sum of the predicted ends of all that runs."""
        self._busy_us = 0
        self._busy_at_us = 0
        self.num_changes = 0
        """Counts what may make room: ends of requests, engines that come and go."""
        self.num_first_tokens = 0
        self.shortest_context = min((book.max_model_len or 0 for book in self.books), default=0)
        """The context that every mode has; 0 while some engine has not told its own."""

    def engine_up(self, info: EngineInfo) -> None:
        """The engine is warm: its modes can be chosen."""
        self.num_changes += 1
        for i in self._by_engine[info.engine]:
            book = self.books[i]
            book.info = info
            book.max_model_len = info.max_model_len
            book.kv_capacity_tokens = info.kv_capacity_tokens
            book.num_slots = info.max_num_seqs
            book.estimate.seed(info)
            book.residence = "resident"
            book.up = True
            self.up |= 1 << i
            self._refresh(i)
        self.shortest_context = min((book.max_model_len or 0 for book in self.books), default=0)

    def engine_left(self, engine: str, residence: Residence) -> None:
        """The engine leaves, or has left, the GPU on purpose: nothing is routed there until it is up again."""
        self.engine_lost(engine)
        for i in self._by_engine[engine]:
            self.books[i].residence = residence
            self._refresh(i)

    def wanted(self, engine: str) -> None:
        """The engine is not up, but should be: it is no longer away on purpose."""
        for i in self._by_engine[engine]:
            self.books[i].residence = "resident"
            self._refresh(i)

    def modes_of(self, engine: str) -> int:
        """Bit set of the engine's modes."""
        return sum(1 << i for i in self._by_engine[engine])

    def num_running_on(self, engine: str) -> int:
        """Requests that run on the engine."""
        return sum(self.books[i].num_running for i in self._by_engine[engine])

    def engine_lost(self, engine: str) -> None:
        """Nothing may be sent there any more."""
        self.num_changes += 1
        for i in self._by_engine[engine]:
            self.books[i].up = False
            self.books[i].load = EngineLoad()
            self.up &= ~(1 << i)
            self._refresh(i)

    def stepped(self, t_us: int, engine: str, load: EngineLoad, progress: Sequence[tuple[str, int]]) -> None:
        """Take the engine's gauges, and how far its requests have come."""
        for i in self._by_engine[engine]:
            book = self.books[i]
            book.load = load
            running = book.running
            if running.num:
                before_us = running.end_us
                tpot_ms = book.estimate.tpot_ms(running.num - 1, running.num_tokens)
                running.progress(t_us, progress, tpot_ms * self.sharing.at(self.num_busy - 1))
                self.end_us += running.end_us - before_us
                book.stale = True

    def profiled(self, profile: Profile) -> None:
        """Take what was measured of the modes on this host."""
        for book in self.books:
            known = profile.of(book.name)
            if known is not None:
                book.estimate.seed_profile(known)
                book.stale = True

    def fitted(self, coefficients: Mapping[str, Coefficients]) -> None:
        """The energy model was fitted anew."""
        for mode, costs in coefficients.items():
            i = self.by_name.get(mode)
            if i is not None:
                self.books[i].estimate.costs = costs
                self.books[i].stale = True

    def dispatched(
        self, i: int, entry: Entry, t_us: int, e2el_ms: float, ttft_ms: float = 0.0, prompt_ms: float = 0.0
    ) -> None:
        """The request runs on mode i from now on, and is likely to take so long."""
        running = self.books[i].running
        self._add_busy(t_us)
        before_us = running.end_us
        running.join(entry, t_us, e2el_ms, ttft_ms, prompt_ms)
        entry.num_busy = self.num_busy
        if running.num == 1:
            self.num_busy += 1
        else:
            entry.num_busy -= 1
        self.end_us += running.end_us - before_us
        self.occupy(i, entry.reserved_tokens)

    def first_token(self, entry: Entry, t_us: int) -> None:
        """The running request has its first token."""
        self._add_busy(t_us)
        self.num_first_tokens += 1
        book = self.books[entry.parked]
        book.running.first_token(entry, t_us, self._busy_us)
        book.stale = True

    def vacated(self, entry: Entry, t_us: int) -> None:
        """The request runs no more."""
        i = entry.parked
        running = self.books[i].running
        self._add_busy(t_us)
        running.leave(entry, t_us, self._busy_us)
        self.end_us -= entry.end_us
        if not running.num:
            self.num_busy -= 1
        self.release(i, entry.reserved_tokens)

    def _add_busy(self, t_us: int) -> None:
        span_us = t_us - self._busy_at_us
        if span_us > 0:
            self._busy_us += self.num_busy * span_us
            self._busy_at_us = t_us

    def occupy(self, i: int, reserved_tokens: int) -> None:
        """A request was dispatched to mode i."""
        book = self.books[i]
        book.num_running += 1
        book.reserved_tokens += reserved_tokens
        book.num_decisions += 1
        self.num_running += 1
        self._refresh(i)

    def reserve(self, i: int, num_tokens: int) -> None:
        """A request that runs on mode i needs so many KV tokens more than was thought."""
        self.books[i].reserved_tokens += num_tokens
        self._refresh(i)

    def release(self, i: int, reserved_tokens: int) -> None:
        """A request left mode i."""
        self.num_changes += 1
        book = self.books[i]
        book.num_running -= 1
        book.reserved_tokens -= reserved_tokens
        self.num_running -= 1
        assert book.num_running >= 0, "more requests left the mode than came"
        assert book.reserved_tokens >= 0, "more tokens released than reserved"
        self._refresh(i)

    def park(self, i: int) -> None:
        """A waiting request is to wait for mode i."""
        self.books[i].num_parked += 1

    def unpark(self, i: int) -> None:
        """It waits for mode i no more."""
        self.books[i].num_parked -= 1
        assert self.books[i].num_parked >= 0, "more requests unparked than parked"

    def resident(self) -> list[str]:
        """Names of the modes that are up."""
        return [book.mode.name for book in self.books if book.up]

    def memory_pressure(self) -> float:
        """Largest share of KV memory in use, by the engines' gauges or by our reservations."""
        worst = 0.0
        for book in self.books:
            if book.up:
                usage = book.load.kv_usage
                if usage > worst:
                    worst = usage
                if book.reserved_tokens > worst * book.kv_capacity_tokens:
                    worst = book.reserved_tokens / max(1, book.kv_capacity_tokens)
        return worst

    def _refresh(self, i: int) -> None:
        book = self.books[i]
        book.stale = True
        if book.up and book.num_running < book.num_slots:
            self.free |= 1 << i
        else:
            self.free &= ~(1 << i)


def mode_of(engine: EngineConfig) -> Mode:
    """The mode that an engine of one variant is."""
    return Mode(
        name=engine.name,
        engine=engine.name,
        model=engine.model,
        precision=engine.precision,
        speculation=engine.speculation,
        prefix_caching=engine.prefix_caching,
        simulated=engine.kind != "vllm",
        quality=engine.quality,
        lossless=is_lossless(engine),
    )


def longest_context(engine: EngineConfig) -> int | None:
    """Longest prompt plus output, where the configuration tells it before the engine does."""
    if engine.kind == "sim":
        return engine.sim.max_model_len
    stated = engine.args.get("max_model_len")
    return stated if isinstance(stated, int) else None

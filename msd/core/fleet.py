"""The books of the engines: which are up, how many slots and KV tokens each has left. One mode, one entry.

Slots and KV reservations are counted here from dispatches and ends, never asked of an engine: a decision needs them
now, and an engine's gauges trail by a step.
"""

from __future__ import annotations

from collections.abc import Sequence

from msd.config import EngineConfig
from msd.core.estimator import ModeEstimate
from msd.domain import EngineInfo, EngineLoad, Mode


class ModeBook:
    """One mode: its engine's limits, what runs there, and what the core expects of it."""

    __slots__ = (
        "estimate",
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
        self.info: EngineInfo | None = None
        self.load = EngineLoad()
        self.num_running = 0
        self.num_parked = 0
        """Requests that wait for this mode by the policy's choice."""
        self.reserved_tokens = 0
        self.num_decisions = 0
        self.estimate = ModeEstimate()


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
        self.num_changes = 0
        """Counts what may make room: ends of requests, engines that come and go."""
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
            book.up = True
            self.up |= 1 << i
            self._refresh(i)
        self.shortest_context = min((book.max_model_len or 0 for book in self.books), default=0)

    def engine_lost(self, engine: str) -> None:
        """Nothing may be sent there any more."""
        self.num_changes += 1
        for i in self._by_engine[engine]:
            self.books[i].up = False
            self.books[i].load = EngineLoad()
            self.up &= ~(1 << i)
            self._refresh(i)

    def stepped(self, engine: str, load: EngineLoad) -> None:
        """Take the engine's gauges."""
        for i in self._by_engine[engine]:
            self.books[i].load = load

    def occupy(self, i: int, reserved_tokens: int) -> None:
        """A request was dispatched to mode i."""
        book = self.books[i]
        book.num_running += 1
        book.reserved_tokens += reserved_tokens
        book.num_decisions += 1
        self.num_running += 1
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
    )


def longest_context(engine: EngineConfig) -> int | None:
    """Longest prompt plus output, where the configuration tells it before the engine does."""
    if engine.kind == "sim":
        return engine.sim.max_model_len
    stated = engine.args.get("max_model_len")
    return stated if isinstance(stated, int) else None

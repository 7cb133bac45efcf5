"""The fingerprint of a run: BLAKE2 over integers and ids of what happened (times in us, energies in mJ, engines)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any, get_args

import msgspec

from msd.core import commands as c
from msd.core import events as e
from msd.core.commands import Command
from msd.core.events import Event

_BUFFERED = 8_192
_Look = Callable[[Any], tuple[int | str, ...]]
_LOOKS: dict[type, _Look] = {
    e.Finished: attrgetter("request_id", "attempt", "num_completion_tokens"),
    e.Failed: attrgetter("request_id", "attempt"),
    e.CounterRead: attrgetter("reading.epoch", "reading.energy_mj"),
}
_EVENTS: dict[type, tuple[int, _Look | None]] = {
    event: (number, _LOOKS.get(event)) for number, event in enumerate(get_args(Event))
}
_COMMANDS: dict[type, _Look] = {
    c.Dispatch: attrgetter("request_id", "attempt", "decision.engine"),
    c.Complete: attrgetter("outcome.request_id", "outcome.num_completion_tokens"),
    c.Settle: attrgetter("request_id", "energy.dynamic_mj", "energy.static_mj"),
    c.Reject: attrgetter("request_id", "error_code"),
    c.Deliver: attrgetter("request_id", "seq"),
    c.Abort: attrgetter("request_id", "attempt"),
    c.Observe: attrgetter("decision.decision_id"),
    c.Shadow: attrgetter("shadow_id", "request_id"),
    c.Withdraw: attrgetter("withdrawal.mode", "withdrawal.task"),
    c.Transit: attrgetter("engine", "to"),
}


class Digest:
    """Equal for two runs that did the same things at the same times; no floats, no hashes, no addresses go in."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._items: list[int | str] = []

    def add(self, event: Event, commands: Sequence[Command]) -> None:
        """Take in one step of the scheduler."""
        items = self._items
        number, look = _EVENTS[type(event)]
        items += (number, event.t_us)
        if look is not None:
            items += look(event)
        for command in commands:
            look = _COMMANDS.get(type(command))
            if look is not None:
                items += look(command)
        if len(items) >= _BUFFERED:
            self._take()

    def add_numbers(self, numbers: Iterable[int]) -> None:
        """Take in what else a run came to."""
        self._items += numbers

    def _take(self) -> None:
        self._hash.update(msgspec.msgpack.encode(self._items))
        self._items.clear()

    def hexdigest(self) -> str:
        """The fingerprint of everything added so far."""
        self._take()
        return self._hash.hexdigest()

"""A loop for unit tests whose time jumps to the next timer: seconds of backoff cost no seconds of testing."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualClock:
    """The `Clock` port over virtual time."""

    def __init__(self) -> None:
        self.time_s = 0.0

    def now_us(self) -> int:
        return int(self.time_s * 1e6)


class _JumpingSelector(selectors.BaseSelector):
    """Waits by moving the clock instead of sleeping."""

    def __init__(self, clock: VirtualClock) -> None:
        self._real = selectors.DefaultSelector()
        self._clock = clock

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("everything waits, and no timer is set: this would hang for ever")
        self._clock.time_s += max(0.0, timeout)
        return self._real.select(0)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._real.get_map()

    def close(self) -> None:
        self._real.close()


def run_virtual(main: Coroutine[Any, Any, T], clock: VirtualClock) -> T:
    """`asyncio.run` in virtual time."""

    def make_loop() -> asyncio.AbstractEventLoop:
        loop = asyncio.SelectorEventLoop(_JumpingSelector(clock))
        loop.time = lambda: clock.time_s  # type: ignore[method-assign]
        return loop

    with asyncio.Runner(loop_factory=make_loop) as runner:
        return runner.run(main)

"""What happened to each request: preallocated numpy columns, written once per event, bounded from the start.

Times are integer microseconds from the start of the run; -1 = it did not happen.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from loadgen.prompts import is_right
from msd.wire import Done

ABSENT = -1
MAX_WORDS = 4_096
RECENT_TTFTS = 256
OTHER = "(other)"


class Status(IntEnum):
    """How a request ended. UNSENT and UNFINISHED are what a stopped run leaves."""

    UNSENT = 0
    UNFINISHED = 1
    FINISHED = 2
    REJECTED = 3
    FAILED = 4
    ABORTED = 5
    TIMED_OUT = 6
    SHED_CLIENT = 7


class GapSketch:
    """Quantiles of gaps between token messages in bounded memory: log-spaced bins, relative error <= 1 %."""

    RATIO = 1.02
    NUM_BINS = 1_100
    """1.02 ** 1,100 us is 48 minutes, more than a request may take."""

    def __init__(self) -> None:
        self._counts: NDArray[np.int64] = np.zeros(self.NUM_BINS, dtype=np.int64)
        self._scale = 1.0 / math.log(self.RATIO)

    @classmethod
    def merged(cls, sketches: Iterable[GapSketch]) -> GapSketch:
        """Return one sketch of all their gaps."""
        result = cls()
        for sketch in sketches:
            result._counts += sketch._counts
        return result

    @property
    def count(self) -> int:
        """How many gaps there were."""
        return int(self._counts.sum())

    def add(self, gap_us: int) -> None:
        """Count one gap."""
        bin_ = int(math.log(gap_us) * self._scale) if gap_us > 1 else 0
        self._counts[min(bin_, self.NUM_BINS - 1)] += 1

    def quantile_us(self, q: float) -> float | None:
        """Return the q-quantile in us; None without gaps."""
        cumulated = np.cumsum(self._counts)
        total = int(cumulated[-1])
        if total == 0:
            return None
        bin_ = int(np.searchsorted(cumulated, max(1, math.ceil(q * total)), side="left"))
        return float(self.RATIO ** (bin_ + 0.5))


class Words:
    """Numbers for the words that a column holds (modes, error codes, ..); bounded, the overflow shares one number."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, word: str) -> int:
        """Return the word's number, the same each time."""
        number = self._numbers.get(word)
        if number is None:
            if len(self._numbers) >= MAX_WORDS:
                word = OTHER
            number = self._numbers.setdefault(word, len(self._numbers))
        return number

    def list(self) -> list[str]:
        """Return the words by number."""
        return list(self._numbers)


class _InFlight:
    """What must be remembered of a request only until it ends."""

    __slots__ = ("gaps_us", "last_us", "num_tokens", "parts", "sent_us")

    def __init__(self, sent_us: int, keeps_text: bool, keeps_gaps: bool) -> None:
        self.sent_us = sent_us
        self.last_us = ABSENT
        self.num_tokens = 0
        self.parts: list[str] | None = [] if keeps_text else None
        self.gaps_us: list[int] | None = [] if keeps_gaps else None


class Record:
    """The columns of a run, n long, and the few tables beside them. The sender and the target write; nobody else."""

    def __init__(
        self,
        intended_us: NDArray[np.int64],
        class_index: NDArray[np.int16],
        num_classes: int,
        answers: Sequence[str | None],
        keeps_gaps: Sequence[bool],
    ) -> None:
        n = len(intended_us)

        def times() -> NDArray[np.int64]:
            return np.full(n, ABSENT, dtype=np.int64)

        self.intended_us = intended_us
        self.class_index = class_index
        self.sent_us, self.acked_us, self.first_us, self.last_us, self.done_us = (times() for _ in range(5))
        self.status: NDArray[np.int8] = np.zeros(n, dtype=np.int8)
        self.num_tokens: NDArray[np.int32] = np.zeros(n, dtype=np.int32)
        self.num_prompt_tokens: NDArray[np.int32] = np.zeros(n, dtype=np.int32)
        self.num_cached_tokens: NDArray[np.int32] = np.zeros(n, dtype=np.int32)
        self.num_chunks: NDArray[np.int32] = np.zeros(n, dtype=np.int32)
        self.itl_p99_us = times()
        self.queue_us, self.engine_us, self.energy_mj = (times() for _ in range(3))
        self.mode: NDArray[np.int16] = np.full(n, ABSENT, dtype=np.int16)
        self.reason: NDArray[np.int16] = np.full(n, ABSENT, dtype=np.int16)
        self.error: NDArray[np.int16] = np.full(n, ABSENT, dtype=np.int16)
        self.energy_source: NDArray[np.int16] = np.full(n, ABSENT, dtype=np.int16)
        self.right: NDArray[np.int8] = np.full(n, ABSENT, dtype=np.int8)
        self.num_restarts = self.num_switched = self.num_late_answers = self.num_unsettled = 0
        self.modes, self.errors, self.energy_sources, self.reasons = Words(), Words(), Words(), Words()
        self.gaps = [GapSketch() for _ in range(num_classes)]
        self.recent_ttft_us: deque[int] = deque(maxlen=RECENT_TTFTS)
        self.num_sent = self.num_finished = self.num_bad = 0
        self._answers = answers
        self._keeps_gaps = keeps_gaps
        self._in_flight: dict[int, _InFlight] = {}

    # --- the sender

    @property
    def num_in_flight(self) -> int:
        """Requests sent and not ended."""
        return len(self._in_flight)

    def sent(self, index: int, t_us: int) -> None:
        """The request left."""
        self.sent_us[index] = t_us
        self.status[index] = Status.UNFINISHED
        keeps_gaps = self._keeps_gaps[self.class_index[index]]
        self._in_flight[index] = _InFlight(t_us, self._answers[index] is not None, keeps_gaps)
        self.num_sent += 1

    def shed(self, index: int) -> None:
        """The request could not leave: the bound of what may be in flight is reached, or the socket is full."""
        self.status[index] = Status.SHED_CLIENT
        self.num_bad += 1

    def time_out(self, t_us: int, timeout_us: int) -> list[int]:
        """End what was sent more than `timeout_us` before; return it."""
        late: list[int] = []
        # Ordered by sending, so the first that is young ends the search.
        for index, flight in self._in_flight.items():
            if t_us - flight.sent_us <= timeout_us:
                break
            late.append(index)
        for index in late:
            self._end(index, Status.TIMED_OUT, t_us)
        return late

    def in_flight(self) -> list[int]:
        """Return what has not ended, in the order of sending."""
        return list(self._in_flight)

    # --- the target

    def acked(self, index: int, t_us: int) -> None:
        """The server accepted the request."""
        self.acked_us[index] = t_us

    def tokens(self, index: int, t_us: int, count: int, text: str) -> None:
        """A message of `count` > 0 tokens came."""
        flight = self._in_flight.get(index)
        if flight is None:
            return  # timed out before; counted when its end comes
        if flight.last_us == ABSENT:
            self.first_us[index] = t_us
            self.recent_ttft_us.append(t_us - flight.sent_us)
        else:
            gap_us = t_us - flight.last_us
            self.gaps[self.class_index[index]].add(gap_us)
            if flight.gaps_us is not None:
                flight.gaps_us.append(gap_us)
        flight.last_us = t_us
        flight.num_tokens += count
        self.num_chunks[index] += 1
        if flight.parts is not None:
            flight.parts.append(text)

    def restarted(self, index: int) -> None:
        """What came so far is void: the first token is that of the new attempt."""
        flight = self._in_flight.get(index)
        if flight is None:
            return
        self.num_restarts += 1
        self.first_us[index] = flight.last_us = ABSENT
        flight.num_tokens = 0
        self.num_chunks[index] = 0
        if flight.parts is not None:
            flight.parts.clear()
        if flight.gaps_us is not None:
            flight.gaps_us.clear()

    def finished(self, index: int, t_us: int, done: Done) -> None:
        """The terminal answer came."""
        flight = self._in_flight.get(index)
        if flight is None:
            self.num_late_answers += 1
            return
        usage = done.usage
        if flight.last_us == ABSENT:
            # Nothing was streamed (not asked for, detached, or no token): the answer is its own first token.
            self.first_us[index] = flight.last_us = t_us
        self.last_us[index] = flight.last_us
        self.num_tokens[index] = usage.completion
        self.num_prompt_tokens[index] = usage.prompt
        self.num_cached_tokens[index] = usage.cached
        self.queue_us[index] = round(done.timings.queue_ms * 1_000)
        self.engine_us[index] = round(done.timings.engine_ms * 1_000)
        self.mode[index] = self.modes.number(done.mode)
        self.reason[index] = self.reasons.number(done.reason)
        self.num_switched += done.switched
        if done.energy is not None:
            self.energy_mj[index] = done.energy.energy_mj
            self.energy_source[index] = self.energy_sources.number(done.energy.source)
            self.num_unsettled += not done.energy.settled
        if flight.gaps_us:
            flight.gaps_us.sort()
            self.itl_p99_us[index] = flight.gaps_us[math.ceil(0.99 * len(flight.gaps_us)) - 1]
        aborted = done.finish_reason == "abort"
        answer = self._answers[index]
        if answer is not None and not aborted:
            text = done.text if done.text is not None else "".join(flight.parts or ())
            self.right[index] = is_right(answer, text)
        self._end(index, Status.ABORTED if aborted else Status.FINISHED, t_us)

    def refused(self, index: int, t_us: int, code: str) -> None:
        """An error ended the request: before its acknowledgement it was rejected, afterwards it failed."""
        if index not in self._in_flight:
            self.num_late_answers += 1
            return
        self.error[index] = self.errors.number(code)
        self._end(index, Status.REJECTED if self.acked_us[index] == ABSENT else Status.FAILED, t_us)

    def _end(self, index: int, status: Status, t_us: int) -> None:
        del self._in_flight[index]
        self.status[index] = status
        self.done_us[index] = t_us
        if status is Status.FINISHED:
            self.num_finished += 1
        else:
            self.num_bad += 1

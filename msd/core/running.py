"""What runs on one mode, for estimates: how much, until when, and on average over a request's life.

A request's TPOT is explained by who ran beside it while it decoded, not by who did when it ended: so the books add up
requests, tokens and prompts over time, and a request takes the difference between its first token and its end.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

from msd.core.entry import Entry

_NO_BOUND = 1 << 62


class Running:
    """Books of one mode. Times in integer microseconds; ends are predictions, made new with each progress report."""

    __slots__ = (
        "_by_id", "_last_us", "_read_tokens", "_request_us", "_strict", "_token_us", "end_us", "ends", "num",
        "num_tokens", "unread_tokens",
    )  # fmt: skip

    def __init__(self) -> None:
        self.num = 0
        self.num_tokens = 0
        """Of the requests that run: prompts, and half of what they are likely to generate."""
        self.unread_tokens = 0
        """Prompt tokens of requests that have no first token yet."""
        self.ends: list[int] = []
        """When each is likely to end, soonest first."""
        self.end_us = 0
        """Sum of `ends`."""
        self._by_id: dict[str, Entry] = {}
        self._strict: dict[str, Entry] = {}
        """Those with an SLO or a deadline."""
        self._last_us = 0
        self._request_us = 0
        self._token_us = 0
        self._read_tokens = 0

    def entries(self) -> Iterable[Entry]:
        """What runs."""
        return self._by_id.values()

    def spares_ms(self) -> list[float]:
        """By how much each request that keeps its SLOs so far may be delayed before it misses one, least first."""
        spares = []
        for entry in self._strict.values():
            request = entry.request
            slo, end_us = request.slo, entry.end_us
            least_us = _NO_BOUND
            if slo.ttft_ms is not None:
                due_us = request.received_us + int(slo.ttft_ms * 1e3)
                if entry.first_token_us:
                    if entry.first_token_us > due_us:
                        continue
                else:
                    least_us = due_us - entry.first_due_us
            if slo.tpot_ms is not None and entry.first_token_us:
                spare_us = entry.first_token_us + int(slo.tpot_ms * 1e3) * (entry.expected_tokens - 1) - end_us
                least_us = min(least_us, spare_us)
            if request.deadline_us is not None:
                least_us = min(least_us, request.deadline_us - end_us)
            if 0 <= least_us < _NO_BOUND:
                spares.append(least_us * 1e-3)
        spares.sort()
        return spares

    def join(self, entry: Entry, t_us: int, e2el_ms: float, ttft_ms: float = 0.0, prompt_ms: float = 0.0) -> None:
        """A request was dispatched, and is likely to take so long; the others wait while its prompt is read."""
        self._advance(t_us)
        delay_us = int(prompt_ms * 1e3)
        if delay_us and self.num:
            for other in self._by_id.values():
                other.end_us += delay_us
                other.first_due_us += delay_us
            self.ends = [end_us + delay_us for end_us in self.ends]
            self.end_us += delay_us * self.num
        entry.first_due_us = t_us + int(ttft_ms * 1e3)
        request = entry.request
        entry.beside = self.num, self.num_tokens, self.unread_tokens
        entry.marks = None
        entry.averages = None
        entry.run_tokens = request.num_prompt_tokens + (entry.expected_tokens >> 1)
        end_us = entry.end_us = t_us + int(e2el_ms * 1e3)
        insort(self.ends, end_us)
        self.end_us += end_us
        self.num += 1
        self.num_tokens += entry.run_tokens
        self.unread_tokens += request.num_prompt_tokens
        self._by_id[request.request_id] = entry
        slo = request.slo
        if slo.ttft_ms is not None or slo.tpot_ms is not None or request.deadline_us is not None:
            self._strict[request.request_id] = entry

    def first_token(self, entry: Entry, t_us: int, busy_us: int) -> None:
        """The engine has read its prompt. `busy_us`: busy engines of the GPU, added up over time."""
        self._advance(t_us)
        num_read = entry.request.num_prompt_tokens
        self.unread_tokens -= num_read
        self._read_tokens += num_read - entry.num_cached_tokens
        entry.marks = t_us, self._request_us, self._token_us, self._read_tokens, busy_us

    def leave(self, entry: Entry, t_us: int, busy_us: int) -> None:
        """The attempt is over: `entry.averages` says what ran beside it since its first token."""
        self._advance(t_us)
        marks = entry.marks
        if marks is None:
            self.unread_tokens -= entry.request.num_prompt_tokens
        elif t_us > marks[0]:
            per_us = 1.0 / (t_us - marks[0])
            entry.averages = (
                (self._request_us - marks[1]) * per_us - 1.0,
                (self._token_us - marks[2]) * per_us - entry.run_tokens,
                self._read_tokens - marks[3],
                (busy_us - marks[4]) * per_us - 1.0,
            )
        self.num -= 1
        self.num_tokens -= entry.run_tokens
        del self._by_id[entry.request.request_id]
        self._strict.pop(entry.request.request_id, None)
        ends = self.ends
        del ends[bisect_left(ends, entry.end_us)]
        self.end_us -= entry.end_us

    def progress(self, t_us: int, progress: Sequence[tuple[str, int]], tpot_ms: float) -> None:
        """Predict the ends anew from (request_id, tokens so far); who is past its expected length gets half more."""
        by_id = self._by_id
        tpot_us = tpot_ms * 1e3
        for request_id, num_tokens in progress:
            entry = by_id.get(request_id)
            if entry is not None and num_tokens:
                left = entry.expected_tokens - num_tokens
                if left <= 0:
                    left = min(num_tokens >> 1, entry.request.max_tokens - num_tokens)
                entry.end_us = t_us + int(left * tpot_us)
        self.ends = sorted([entry.end_us for entry in by_id.values()])
        self.end_us = sum(self.ends)

    def _advance(self, t_us: int) -> None:
        span_us = t_us - self._last_us
        if span_us > 0:
            self._request_us += self.num * span_us
            self._token_us += self.num_tokens * span_us
            self._last_us = t_us

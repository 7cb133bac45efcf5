"""One attempt of a request as the energy ledger knows it: when it was active, and how far it had come by when."""

from __future__ import annotations

from bisect import bisect_left

from msgspec import Struct

MAX_KNOTS = 256


class Run(Struct, eq=False):
    """One attempt of a request, or an owner's work: when it was active and how far it had come, as reported.

    `times` and `tokens` are knots of a piecewise linear progress: 0 at the start, 1 at the first token (which the
    prefill produces), then the tokens generated. Work is spread over the time it took, not booked where it arrived.
    """

    request_id: str
    mode: str
    start_us: int
    prefill_tokens: int
    is_owner: bool
    times: list[int]
    tokens: list[int]
    reported_us: int
    end_us: int | None = None
    account: str = ""
    reason: str = ""
    tenant: str = ""
    serial: int = 0
    num_unsettled: int = 0
    counted: list[tuple[int, int, int]] | None = None
    """What the counting domains that are done with it gave: (dynamic, static, estimated part of both) in mJ."""

    def report(self, t_us: int, num_tokens: int) -> None:
        """The engine was looked at: so many tokens so far."""
        self.reported_us = t_us
        if num_tokens > 0:
            times, tokens = self.times, self.tokens
            if t_us <= times[-1]:
                if num_tokens > tokens[-1]:
                    tokens[-1] = num_tokens
                return
            times.append(t_us)
            tokens.append(num_tokens if num_tokens > tokens[-1] else tokens[-1])
            if len(times) > MAX_KNOTS:  # coarser, but still the same work in all
                del times[1:-1:2], tokens[1:-1:2]

    def position(self, t_us: int) -> float:
        """Progress at `t_us`, interpolated; flat after the last report."""
        times = self.times
        if t_us >= times[-1]:
            return self.tokens[-1]
        i = len(times) - 1
        if t_us < times[i - 1]:  # mostly it is between the last two
            i = bisect_left(times, t_us)
            if i == 0:
                return self.tokens[0]
        before, tokens = times[i - 1], self.tokens
        return tokens[i - 1] + (tokens[i] - tokens[i - 1]) * (t_us - before) / (times[i] - before)

"""One open request, as the scheduler's books hold it. Mutable, and never leaves the core."""

from __future__ import annotations

from enum import IntEnum

from msd.domain import Decision, Request

YIELDING = -2
"""In place of the mode that a request is parked for: it lets others go first, as the policy wants it."""


class Phase(IntEnum):
    """Where a request stands. Each open request is in exactly one of them."""

    APPENDING = 0
    WAITING = 1
    RUNNING = 2
    COMPLETING = 3
    """Its terminal state is being stored."""
    CLOSED = 4


class Entry:
    """Books of one open request; only the scheduler and its parts write here."""

    __slots__ = (
        "abort_reason",
        "attempt",
        "averages",
        "beside",
        "cached_tokens",
        "decision",
        "dispatched_us",
        "duplicates",
        "eligible",
        "end_us",
        "expected_p90_tokens",
        "expected_tokens",
        "falls_back",
        "first_due_us",
        "first_token_us",
        "held_at",
        "length_class",
        "marks",
        "num_busy",
        "num_cached_tokens",
        "num_held",
        "num_moves",
        "outcome_kind",
        "parked",
        "phase",
        "request",
        "reserved_tokens",
        "review_us",
        "run_tokens",
        "seq",
        "static_masks",
        "waiting_since_us",
        "weight_tokens",
    )

    def __init__(self, request: Request, static_masks: tuple[int, ...], eligible: int) -> None:
        self.request = request
        self.phase = Phase.APPENDING
        self.seq = 0
        self.attempt = 0
        self.static_masks = static_masks
        """Per mode, the reasons that do not change while the request waits (model, hint, quality)."""
        self.eligible = eligible
        """Bit set of modes whose static mask is 0, less those whose context turned out too short."""
        self.falls_back = False
        """Quality forbids every mode, and the configuration has the reference serve it all the same."""
        self.parked = -1
        """Mode that the policy chose although it was full, or that it runs on; -1 = undecided; YIELDING."""
        self.review_us = 0
        """When it is asked again whether it still waits for the mode that it is parked for."""
        self.held_at = -1
        """`Fleet.num_changes` when memory last held it back: until that moves there is no need to ask again."""
        self.num_held = 0
        """How often memory held it back."""
        self.num_moves = 0
        """Attempts that ended because their engine had to leave the GPU: no strike against the request."""
        self.expected_tokens = 0
        """Output: the median of its length class; more once it has generated more than nine of ten do."""
        self.expected_p90_tokens = 0
        """As many as nine of ten do generate; its memory is reserved for so many."""
        self.length_class: tuple[str, str, int, int] = ("", "", 0, 0)
        self.weight_tokens = request.num_prompt_tokens + request.max_tokens
        self.reserved_tokens = 0
        self.waiting_since_us = request.received_us
        """Since when it is in the queue this time; its user has waited since `request.received_us`."""
        self.dispatched_us = 0
        self.first_token_us = 0
        self.num_cached_tokens = 0
        self.cached_tokens: tuple[int, ...] | None = None
        """Per mode, of the prompt's tokens those that are likely in its prefix cache; None: none anywhere."""
        self.beside: tuple[int, int, int] = (0, 0, 0)
        """At its dispatch, on its mode: other requests, their tokens, prompt tokens that still had to be read."""
        self.num_busy = 0
        """At its dispatch: other modes that ran something."""
        self.marks: tuple[int, int, int, int, int] | None = None
        """At its first token: the time, and the sums of `core/running.py`."""
        self.averages: tuple[float, float, int, float] | None = None
        """From its first token to its end: other requests, their tokens, prompt tokens read, other busy modes."""
        self.end_us = 0
        """When it is likely to end, once it runs."""
        self.first_due_us = 0
        """When its first token is likely to come."""
        self.run_tokens = 0
        self.decision: Decision | None = None
        self.abort_reason = ""
        """Why a running attempt is being aborted: an error code, "cancel", "move", or "" when it is not."""
        self.duplicates: list[str] = []
        self.outcome_kind = ""
        """delivered, aborted or failed, once the terminal state is known."""

"""One open request, as the scheduler's books hold it. Mutable, and never leaves the core."""

from __future__ import annotations

from enum import IntEnum

from msd.domain import Decision, Request


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
        "decision",
        "dispatched_us",
        "duplicates",
        "eligible",
        "expected_tokens",
        "first_token_us",
        "held_at",
        "length_class",
        "num_cached_tokens",
        "num_held",
        "outcome_kind",
        "parked",
        "phase",
        "request",
        "reserved_tokens",
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
        self.parked = -1
        """Mode that the policy chose although it was full, or that it runs on; -1 = undecided."""
        self.held_at = -1
        """`Fleet.num_changes` when memory last held it back: until that moves there is no need to ask again."""
        self.num_held = 0
        """How often memory held it back."""
        self.expected_tokens = 0
        self.length_class: tuple[str, str, int, int] = ("", "", 0, 0)
        self.weight_tokens = request.num_prompt_tokens + request.max_tokens
        self.reserved_tokens = 0
        self.waiting_since_us = request.received_us
        self.dispatched_us = 0
        self.first_token_us = 0
        self.num_cached_tokens = 0
        self.decision: Decision | None = None
        self.abort_reason = ""
        """Why a running attempt is being aborted: an error code, "cancel", or "" when it is not."""
        self.duplicates: list[str] = []
        self.outcome_kind = ""
        """delivered, aborted or failed, once the terminal state is known."""

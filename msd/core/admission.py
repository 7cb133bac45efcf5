"""Admission: what is refused at the door, and why. Bounds, deadline feasibility, and masks that never change.

A refusal costs no fsync and holds no idempotency key. Everything accepted here has a place reserved in the bounds.
"""

from __future__ import annotations

import difflib

from msgspec import Struct

from msd.config import LimitsConfig
from msd.core.certificates import Certificates
from msd.core.entry import Entry
from msd.core.fleet import Fleet
from msd.domain import Mask, Request
from msd.wire import ErrorCode

_MAX_RETRY_MS = 30_000
_MIN_RETRY_MS = 50
_MAX_KEYS = 4_096


class Refusal(Struct, frozen=True):
    """Why a submit is refused: a code of the wire, and a message that says what to do."""

    error_code: ErrorCode
    message: str
    retry_after_ms: int | None = None


class Static(Struct, frozen=True):
    """What does not change while a request waits, unless a certificate is withdrawn."""

    masks: tuple[int, ...]
    eligible: int
    """Bit set of the modes that are not masked."""
    falls_back: bool
    """Only the reference mode is left, and only because the configuration says so."""


class Admission:
    """Counts what is open, per tenant and in tokens, and answers the door."""

    def __init__(self, limits: LimitsConfig, fleet: Fleet, certificates: Certificates, falls_back: bool) -> None:
        """`falls_back`: the reference mode serves what quality forbids everywhere (quality.all_masked)."""
        self._limits = limits
        self._fleet = fleet
        self._certificates = certificates
        self._falls_back = falls_back
        self._models = frozenset(book.mode.model for book in fleet.books)
        self._masks: dict[tuple[str | None, str | None, float | None, str | None], Static] = {}
        self.num_reserved = 0
        """Requests that were admitted and do not run yet."""
        self.reserved_tokens = 0
        self._per_tenant: dict[str, int] = {}

    def refuse(self, request: Request, static: Static, num_waiting: int) -> Refusal | None:
        """A reason not to take the request, or None. `static` comes from `masks`."""
        limits = self._limits
        eligible = static.eligible
        if not eligible:
            return self.unreachable(request, static.masks)
        tokens = request.num_prompt_tokens + request.max_tokens
        if tokens > self._fleet.shortest_context:
            refusal = self._too_long(request, eligible)
            if refusal is not None:
                return refusal
        if request.slo.deadline_ms is not None:
            least_ms = self._least_ms(request, eligible)
            if least_ms is not None and least_ms > request.slo.deadline_ms:
                return Refusal(
                    "deadline_infeasible",
                    f"the fastest allowed mode needs {least_ms:.1f} ms to a first token, idle; "
                    f"slo.deadline_ms is {request.slo.deadline_ms:g}",
                )
        if self.num_reserved >= limits.max_waiting:
            full = f"limits.max_waiting = {limits.max_waiting} requests wait"
        elif self.reserved_tokens + tokens > limits.max_waiting_tokens:
            full = f"limits.max_waiting_tokens = {limits.max_waiting_tokens} tokens wait"
        elif self._per_tenant.get(request.tenant, 0) >= limits.max_waiting_per_tenant:
            full = f"limits.max_waiting_per_tenant = {limits.max_waiting_per_tenant} requests of this tenant wait"
        else:
            return None
        retry_ms = int(min(max(self._expected_wait_ms(num_waiting), _MIN_RETRY_MS), _MAX_RETRY_MS))
        return Refusal("queue_full", f"the queue is full: {full}", retry_ms)

    def reserve(self, entry: Entry) -> None:
        """The entry takes a place among what waits."""
        self.num_reserved += 1
        self.reserved_tokens += entry.weight_tokens
        tenant = entry.request.tenant
        self._per_tenant[tenant] = self._per_tenant.get(tenant, 0) + 1

    def release(self, entry: Entry) -> None:
        """The entry waits no more."""
        self.num_reserved -= 1
        self.reserved_tokens -= entry.weight_tokens
        tenant = entry.request.tenant
        left = self._per_tenant[tenant] - 1
        if left:
            self._per_tenant[tenant] = left
        else:
            del self._per_tenant[tenant]

    def masks(self, request: Request) -> Static:
        """Per mode the reasons that hold while the request waits, and the bit set of modes without any."""
        strict = request.mode_hint if request.mode_strict else None
        key = (request.model, strict, request.quality_floor, request.task)
        known = self._masks.get(key)
        if known is not None:
            return known
        masks = []
        for arm, book in enumerate(self._fleet.books):
            mode = book.mode
            mask = 0
            if request.model is not None and mode.model != request.model:
                mask |= Mask.MODEL
            if strict is not None and mode.name != strict:
                mask |= Mask.HINT
            if self._certificates.refusal(arm, request):
                mask |= Mask.QUALITY
            masks.append(int(mask))
        falls_back = False
        if self._falls_back and all(masks):
            arm = self._certificates.reference_for(request)
            if arm >= 0 and masks[arm] == Mask.QUALITY:
                falls_back, masks[arm] = True, 0
        made = Static(tuple(masks), sum(1 << i for i, mask in enumerate(masks) if not mask), falls_back)
        if len(self._masks) >= _MAX_KEYS:
            self._masks.clear()
        self._masks[key] = made
        return made

    def forget_masks(self) -> None:
        """A certificate was withdrawn: who asks from now on gets masks made anew."""
        self._masks.clear()

    def _expected_wait_ms(self, num_waiting: int) -> float:
        """How long the queue needs, served by all engines that are up; a second when none is."""
        up = [book for book in self._fleet.books if book.up]
        num_slots = sum(book.num_slots for book in up)
        return min((book.estimate.wait_ms(num_waiting, num_slots) for book in up), default=1_000.0)

    def unreachable(self, request: Request, masks: tuple[int, ...]) -> Refusal:
        """Why no mode at all may serve the request."""
        modes = list(self._fleet.by_name)
        if request.model is not None and request.model not in self._models:
            return Refusal(
                "mode_unavailable", f"no such model {request.model!r}{_nearest(request.model, self._models)}"
            )
        if request.mode_strict and request.mode_hint not in self._fleet.by_name:
            hint = request.mode_hint or ""
            return Refusal("mode_unavailable", f"no such mode {hint!r}{_nearest(hint, modes)}")
        if any(not mask & ~Mask.QUALITY for mask in masks):
            known = [
                f"{book.name} {self._certificates.refusal(arm, request)}"
                for arm, book in enumerate(self._fleet.books)
                if not masks[arm] & ~Mask.QUALITY
            ]
            why = "no mode is certified" if request.task is None else f"no mode is certified for task {request.task!r}"
            if request.quality_floor is not None:
                why = f"quality_floor {request.quality_floor:g} is above every allowed mode"
            return Refusal("quality_unreachable", f"{why} ({'; '.join(known)})")
        return Refusal("mode_unavailable", f"mode {request.mode_hint!r} does not serve model {request.model!r}")

    def _too_long(self, request: Request, eligible: int) -> Refusal | None:
        longest = 0
        for i, book in enumerate(self._fleet.books):
            if eligible >> i & 1:
                if book.max_model_len is None:
                    return None
                longest = max(longest, book.max_model_len)
        if request.num_prompt_tokens + request.max_tokens <= longest:
            return None
        return Refusal(
            "context_overflow",
            f"the prompt has {request.num_prompt_tokens} tokens and max_tokens is {request.max_tokens}: together "
            f"{request.num_prompt_tokens + request.max_tokens}, the longest context allowed is {longest}",
        )

    def _least_ms(self, request: Request, eligible: int) -> float | None:
        """TTFT of the fastest eligible mode if it were idle; None while an eligible engine is not up."""
        least: float | None = None
        for i, book in enumerate(self._fleet.books):
            if eligible >> i & 1:
                if not book.up:
                    return None
                ttft_ms = book.estimate.ttft_ms(0)
                least = ttft_ms if least is None else min(least, ttft_ms)
        return least


def overflow_message(request: Request, fleet: Fleet) -> str:
    lengths = ", ".join(f"{book.mode.name} {book.max_model_len}" for book in fleet.books if book.max_model_len)
    return (
        f"the prompt has {request.num_prompt_tokens} tokens and max_tokens is {request.max_tokens}: together "
        f"{request.num_prompt_tokens + request.max_tokens}; longest contexts: {lengths}"
    )


def _nearest(name: str, names: frozenset[str] | list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(names))}"

"""The decision: fold estimates into candidates, mask the infeasible, ask the policy, keep why.

Every mode becomes a candidate, also a masked one: the decision shows what was not chosen and the reasons.
"""

from __future__ import annotations

from bisect import bisect_left
from random import Random

from msgspec import structs

from msd.core.entry import Entry
from msd.core.estimator import prompt_cell
from msd.core.fleet import Fleet, ModeBook
from msd.domain import YIELD, Candidate, Choice, Decision, Features, GpuView, Mask
from msd.ports import Policy

_CONTEXT = int(Mask.CONTEXT)
_MEMORY = int(Mask.MEMORY)
_SLOTS = int(Mask.SLOTS)
_NOT_SLOTS = ~_SLOTS
_DEADLINE = int(Mask.DEADLINE)
_OVERDUE_MS = 5.0
_NOBODY: tuple[ModeBook | None, float, float, list[float]] = (None, 0.0, 0.0, [])


class Router:
    """Turns one waiting request into a Decision; holds no state of requests."""

    def __init__(self, fleet: Fleet, policy: Policy, rng: Random) -> None:
        self._fleet = fleet
        self._rng = rng
        self._none_cached = (0,) * len(fleet.books)
        self.policy = policy

    def candidates(self, entry: Entry, features: Features) -> list[Candidate]:
        """All modes with predictions from now (ms) and the reasons not to choose them.

        What does not depend on the request is folded per mode when its books change (`ModeBook.fold`).
        """
        request, fleet = entry.request, self._fleet
        prompt, expected = request.num_prompt_tokens, entry.expected_tokens
        total = prompt + request.max_tokens
        need = prompt + entry.expected_p90_tokens
        t_us = request.received_us + features.waited_us
        slack_ms = None if features.slack_us is None else features.slack_us * 0.001
        steps = expected - 1
        ends_itself = not request.ignore_eos and expected < request.max_tokens
        cell = prompt_cell(prompt)
        # What sharing the GPU costs: this request, and those that run on other engines.
        num_all = fleet.num_running
        slow_idle, slow_busy, lost_idle, lost_busy = fleet.sharing.between(fleet.num_busy)
        left_ms = (fleet.end_us - num_all * t_us) * 0.001
        longest, longest_ms, second_ms, spares_ms = self._busy(t_us) if num_all else _NOBODY
        made = []
        some_in_time = False
        for book, static, hit in zip(
            fleet.books, entry.static_masks, entry.cached_tokens or self._none_cached, strict=True
        ):
            (
                name, closed, running, free, max_len, room, base_ms, read_ms, square_ms, step_ms, tpot_ms, beside_ms,
                eos_ms, prompt_mj, output_mj, ttft_row, tpot_row, energy_row, end_us, last_us, spares_beside_ms,
            ) = book.fold() if book.stale else book.folded  # fmt: skip
            mask = static | closed
            if total > max_len:
                mask |= _CONTEXT
            if need > room:
                mask |= _MEMORY
            new = prompt - hit
            own_ms = new * (read_ms + square_ms * prompt)
            queue_ms = delay_ms = shared_ms = 0.0
            num_harmed = 0
            if running:
                ttft_ms = (base_ms + own_ms) * slow_busy * ttft_row[cell]
                tpot_ms *= slow_busy * tpot_row[cell]
                e2el_ms = ttft_ms + tpot_ms * steps
                # Its neighbours wait while its prompt is read, and each of their steps is longer while both run.
                beside_left_ms = (end_us - running * t_us) * 0.001
                delay_ms = own_ms * running
                if beside_left_ms > 0.0:
                    steps_beside = beside_left_ms / tpot_ms
                    delay_ms += beside_ms * (steps_beside if steps_beside < running * expected else running * expected)
                delay_ms *= slow_busy
                if spares_beside_ms:
                    num_harmed = bisect_left(spares_beside_ms, own_ms * slow_busy)
                if free > 0:
                    if lost_busy > 0.0:
                        # The other engines share the GPU with this one for longer, if it outlasts what runs here.
                        longer_ms = e2el_ms - (last_us - t_us) * 0.001
                        if longer_ms > 0.0:
                            others = num_all - running
                            others_left_ms = left_ms - beside_left_ms - others * (e2el_ms - longer_ms)
                            delay_ms += _lost_ms(others * longer_ms, others_left_ms, lost_busy)
                else:
                    # As in `ModeBook.wait_ms`, which knows the rest: nobody waits for it, and somebody is about to end.
                    ends = book.running.ends
                    queue_ms = 0.0 if book.num_parked or not ends else (ends[0] - t_us) * 0.001
                    if queue_ms <= 0.0:
                        queue_ms = book.wait_ms(t_us)
                    ttft_ms += queue_ms
                    e2el_ms += queue_ms
            else:
                ttft_ms = (base_ms + own_ms) * slow_idle * ttft_row[cell]
                tpot_ms *= slow_idle * tpot_row[cell]
                e2el_ms = ttft_ms + tpot_ms * steps
                if lost_idle > 0.0:
                    delay_ms = _lost_ms(num_all * e2el_ms, left_ms, lost_idle)
            if num_all > running:
                # Only time counts in which this engine would not be busy anyway; sharing halves the others' speed.
                shared_ms = second_ms if book is longest else longest_ms
                if e2el_ms < shared_ms:
                    shared_ms = e2el_ms
                if last_us:
                    shared_ms -= (last_us - t_us) * 0.001
                if shared_ms > 0.0:
                    if spares_ms:
                        num_harmed += bisect_left(spares_ms, 0.5 * shared_ms)
                        if spares_beside_ms:
                            num_harmed -= bisect_left(spares_beside_ms, 0.5 * shared_ms)
                else:
                    shared_ms = 0.0
            if ends_itself:
                e2el_ms += eos_ms
            if slack_ms is not None:
                if e2el_ms > slack_ms:
                    mask |= _DEADLINE
                elif not mask & _NOT_SLOTS:
                    some_in_time = True
            energy_mj = None if output_mj < 0.0 else int((prompt_mj * new + output_mj * expected) * energy_row[cell])
            made.append(
                Candidate(
                    name, mask, ttft_ms, tpot_ms, e2el_ms, energy_mj, running, free, queue_ms, delay_ms, hit,
                    num_harmed, own_ms, shared_ms, own_ms + expected * (step_ms / (num_all + 1) + beside_ms),
                )
            )  # fmt: skip
        if slack_ms is not None and not some_in_time:
            # If the deadline alone masks all, late beats never: the policy chooses among them.
            made = [_lift_deadline(c) for c in made]
        return made

    def masks(self, entry: Entry) -> list[int]:
        """Per mode the reasons against it now, as in `candidates`; without those of the request's deadline."""
        request = entry.request
        total = request.num_prompt_tokens + request.max_tokens
        need = request.num_prompt_tokens + entry.expected_p90_tokens
        made = []
        for book, static in zip(self._fleet.books, entry.static_masks, strict=True):
            _, closed, _, _, max_len, room, *_ = book.fold() if book.stale else book.folded
            made.append(static | closed | (_CONTEXT if total > max_len else 0) | (_MEMORY if need > room else 0))
        return made

    def _busy(self, t_us: int) -> tuple[ModeBook | None, float, float, list[float]]:
        """The mode that is busy for longest, for how long (ms), the same of all others, and what all can spare (ms)."""
        longest, longest_ms, second_ms = None, 0.0, 0.0
        spares_ms: list[float] = []
        for book in self._fleet.books:
            ends = book.running.ends
            if not ends:
                continue
            left_ms = (ends[-1] - t_us) * 0.001
            # Overdue: it is about to end, nobody knows when.
            if left_ms < _OVERDUE_MS:
                left_ms = _OVERDUE_MS
            if left_ms > longest_ms:
                longest, longest_ms, second_ms = book, left_ms, longest_ms
            elif left_ms > second_ms:
                second_ms = left_ms
            if book.stale:
                book.fold()
            spares_ms = spares_ms + book.spares_ms if spares_ms else book.spares_ms
        if second_ms:
            spares_ms.sort()
        return longest, longest_ms, second_ms, spares_ms

    def choose(self, features: Features, candidates: list[Candidate], hint: str | None) -> Choice | None:
        """The producer's wish if it can be had now, else the policy's choice; None when every candidate is masked."""
        if hint is not None:
            arm = self._fleet.by_name.get(hint, -1)
            if arm >= 0 and candidates[arm].mask == 0:
                return Choice(arm, 1.0, "asked for by the producer")
        for candidate in candidates:
            if not candidate.mask & ~_SLOTS:
                break
        else:
            return None
        choice = self.policy.choose(features, candidates, self._rng)
        if choice.arm == YIELD:
            assert features.num_running, f"{self.policy.name} lets a request wait for nothing"
            return choice
        assert not candidates[choice.arm].mask & ~_SLOTS, f"{self.policy.name} chose a masked mode"
        return choice

    def decide(
        self,
        entry: Entry,
        t_us: int,
        features: Features,
        candidates: list[Candidate],
        choice: Choice,
        view: GpuView | None,
    ) -> Decision:
        """The record of a choice whose mode has a slot."""
        request_id = entry.request.request_id
        attempt = entry.attempt + 1
        mode = self._fleet.books[choice.arm].mode
        return Decision(
            decision_id=f"{request_id}.{attempt}",
            request_id=request_id,
            attempt=attempt,
            t_us=t_us,
            policy=self.policy.name,
            mode=mode.name,
            engine=mode.engine,
            reason=choice.reason,
            propensity=choice.propensity,
            features=features,
            candidates=tuple(candidates),
            view=view,
        )


def _lost_ms(shared_ms: float, left_ms: float, lost: float) -> float:
    """What others lose who lose this share of their speed: for `shared_ms`, or until they are done."""
    if left_ms <= 0.0:
        return 0.0
    while_shared, until_done = shared_ms * lost, left_ms * lost / (1.0 - lost)
    return while_shared if while_shared < until_done else until_done


def _lift_deadline(c: Candidate) -> Candidate:
    return structs.replace(c, mask=c.mask & ~_DEADLINE) if c.mask & _DEADLINE else c

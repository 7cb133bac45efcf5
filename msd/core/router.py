"""The decision: fold estimates into candidates, mask the infeasible, ask the policy, keep why.

Every mode becomes a candidate, also a masked one: the decision shows what was not chosen and the reasons.
"""

from __future__ import annotations

from random import Random

from msd.core.entry import Entry
from msd.core.fleet import Fleet
from msd.domain import Candidate, Choice, Decision, Features, GpuView, Mask
from msd.ports import Policy

_CONTEXT = int(Mask.CONTEXT)
_HEALTH = int(Mask.HEALTH)
_MEMORY = int(Mask.MEMORY)
_SLOTS = int(Mask.SLOTS)
_DEADLINE = int(Mask.DEADLINE)


class Router:
    """Turns one waiting request into a Decision; holds no state of requests."""

    def __init__(self, fleet: Fleet, policy: Policy, rng: Random) -> None:
        self._fleet = fleet
        self._rng = rng
        self.policy = policy

    def candidates(self, entry: Entry, features: Features) -> list[Candidate]:
        """All modes with predictions from now (ms) and the reasons not to choose them."""
        request = entry.request
        prompt, expected = request.num_prompt_tokens, entry.expected_tokens
        total = prompt + request.max_tokens
        need = prompt + expected
        slack_ms = None if features.slack_us is None else features.slack_us * 0.001
        made = []
        some_in_time = False
        x_prompt = prompt * 0.001
        for book, static in zip(self._fleet.books, entry.static_masks, strict=True):
            mask = static
            running = book.num_running
            estimate = book.estimate
            ttft = estimate.ttft
            # The estimator's lines written out: this loop is the hot path of every decision.
            ttft_ms = ttft.a + ttft.b * x_prompt
            if book.up:
                free = book.num_slots - running
                if book.max_model_len is not None and total > book.max_model_len:
                    mask |= _CONTEXT
                if running and book.reserved_tokens + need > book.kv_capacity_tokens:
                    mask |= _MEMORY
                if free <= 0:
                    mask |= _SLOTS
                    ttft_ms += estimate.service_ms * (book.num_parked + 1) / book.num_slots
            else:
                mask |= _HEALTH
                free = 0
            tpot = estimate.tpot
            tpot_ms = tpot.a + tpot.b * running
            e2el_ms = ttft_ms + tpot_ms * (expected - 1)
            if slack_ms is not None:
                if e2el_ms > slack_ms:
                    mask |= _DEADLINE
                elif not mask & ~_SLOTS:
                    some_in_time = True
            rate = estimate.mj_per_token
            energy_mj = None if rate is None else int(rate * need)
            made.append(Candidate(book.name, mask, ttft_ms, tpot_ms, e2el_ms, energy_mj, running, free))
        if slack_ms is not None and not some_in_time:
            # If the deadline alone masks all, late beats never: the policy chooses among them.
            made = [_lift_deadline(c) for c in made]
        return made

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
        assert choice.arm >= 0, f"{self.policy.name} chose nothing"
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


def _lift_deadline(c: Candidate) -> Candidate:
    if not c.mask & _DEADLINE:
        return c
    return Candidate(
        c.mode, c.mask & ~_DEADLINE, c.ttft_ms, c.tpot_ms, c.e2el_ms, c.energy_mj, c.num_running, c.num_free_slots
    )

"""What is learnt from an attempt that ended: the estimates, the output lengths, and the policy.

Times are learnt at once. A policy hears of its decision when the energy is settled, or at once where none is metered;
either way exactly once, and `Observe` tells the decision log the same.
"""

from __future__ import annotations

from msgspec import structs

from msd.core import commands as c
from msd.core.commands import Command
from msd.core.entry import Entry
from msd.core.fleet import Fleet
from msd.core.lengths import LengthLearner
from msd.core.reward import slo_met
from msd.core.router import Router
from msd.domain import Decision, Energy, FinishReason, Observation

UNSETTLED_KEPT = 4_096


class Feedback:
    """Teaches; holds the observations whose energy is still to come."""

    def __init__(self, fleet: Fleet, router: Router) -> None:
        self._fleet = fleet
        self._router = router
        self._lengths = LengthLearner()
        self._unsettled: dict[str, tuple[Decision, Observation, int]] = {}

    def expect_length(self, entry: Entry) -> None:
        """Note the request's length class and how many tokens it is likely to generate."""
        entry.length_class = self._lengths.classify(entry.request)
        entry.expected_tokens = self._lengths.expect(entry.request, entry.length_class)

    def finished(
        self,
        entry: Entry,
        t_us: int,
        finish_reason: FinishReason,
        num_tokens: int,
        energy_follows: bool,
        out: list[Command],
    ) -> None:
        """An attempt ended with an answer. Its slot is free already."""
        request, decision = entry.request, entry.decision
        assert decision is not None
        first_us = entry.first_token_us or t_us
        tpot_ms = (t_us - first_us) * 0.001 / (num_tokens - 1) if num_tokens > 1 else 0.0
        ttft_ms = (first_us - entry.dispatched_us) * 0.001
        book = self._fleet.books[entry.parked]
        num_new = request.num_prompt_tokens - entry.num_cached_tokens
        book.estimate.learn_times(num_new, ttft_ms, tpot_ms, book.num_running, (t_us - entry.dispatched_us) * 0.001)
        if not request.ignore_eos:
            self._lengths.learn(entry.length_class, num_tokens)
        e2el_ms = (t_us - request.received_us) * 0.001
        user_ttft_ms = (first_us - request.received_us) * 0.001
        observation = Observation(
            decision_id=decision.decision_id,
            mode=decision.mode,
            finish_reason=finish_reason,
            ttft_ms=user_ttft_ms,
            tpot_ms=tpot_ms,
            e2el_ms=e2el_ms,
            num_completion_tokens=num_tokens,
            num_cached_tokens=entry.num_cached_tokens,
            energy=None,
            slo_met=slo_met(request, user_ttft_ms, tpot_ms, e2el_ms),
        )
        if not energy_follows:
            self._observe(decision, observation, out)
            return
        if len(self._unsettled) >= UNSETTLED_KEPT:
            self.settled(next(iter(self._unsettled)), None, out)
        self._unsettled[request.request_id] = (decision, observation, request.num_prompt_tokens + num_tokens)

    def settled(self, request_id: str, energy: Energy | None, out: list[Command]) -> None:
        """The request's energy is known, or will never be (None)."""
        known = self._unsettled.pop(request_id, None)
        if known is None:
            return
        decision, observation, num_tokens = known
        if energy is not None:
            self._fleet.books[self._fleet.by_name[decision.mode]].estimate.learn_energy(energy.energy_mj, num_tokens)
            observation = structs.replace(observation, energy=energy)
        self._observe(decision, observation, out)

    def _observe(self, decision: Decision, observation: Observation, out: list[Command]) -> None:
        self._router.policy.update(decision, observation)
        out.append(c.Observe(decision, observation))

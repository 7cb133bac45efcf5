"""What is learnt from an attempt that ended: the estimates, the output lengths, and the policy.

Times are learnt at once. A policy hears of its decision when the energy is settled, or at once where none is metered;
either way exactly once, and `Observe` tells the decision log the same. What the ledger gave up (a stuck counter) is a
part of the energy, nobody knows which: that teaches nothing, and is told as no energy.
"""

from __future__ import annotations

from msgspec import structs

from msd.core import commands as c
from msd.core.commands import Command
from msd.core.entry import Entry
from msd.core.estimator import batch_cell, prompt_cell
from msd.core.fleet import Fleet
from msd.core.lengths import LengthLearner
from msd.core.reward import slo_met
from msd.core.router import Router
from msd.domain import Decision, Energy, FinishReason, Observation

UNSETTLED_KEPT = 4_096
_EOS_ALPHA = 0.1
_WEIGHT_PER_TOKEN = 1 / 16


class Feedback:
    """Teaches; holds the observations whose energy is still to come."""

    def __init__(self, fleet: Fleet, router: Router) -> None:
        self._fleet = fleet
        self._router = router
        self._lengths = LengthLearner()
        self._unsettled: dict[str, tuple[Decision, Observation]] = {}

    def expect_length(self, entry: Entry) -> None:
        """Note the request's length class and how many tokens it is likely to generate."""
        entry.length_class = self._lengths.classify(entry.request)
        entry.expected_tokens, entry.expected_p90_tokens = self._lengths.expect(entry.request, entry.length_class)

    def aborted(self, entry: Entry, num_tokens: int) -> None:
        """An attempt was aborted when it had `num_tokens`: all that is learnt is that it would not have had fewer."""
        if num_tokens and not entry.request.ignore_eos:
            self._lengths.learn_at_least(entry.length_class, num_tokens)

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
        self._learn_times(entry, t_us, finish_reason, num_tokens, ttft_ms, tpot_ms)
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
        self._unsettled[request.request_id] = decision, observation

    def _learn_times(
        self, entry: Entry, t_us: int, finish_reason: FinishReason, num_tokens: int, ttft_ms: float, tpot_ms: float
    ) -> None:
        """Lines learn from what ran beside the request; cells from what was predicted when it was dispatched."""
        request, book, sharing = entry.request, self._fleet.books[entry.parked], self._fleet.sharing
        estimate = book.estimate
        estimate.learn_service((t_us - entry.dispatched_us) * 0.001)
        if not estimate.is_due(t_us):
            return
        book.stale = True
        prompt = request.num_prompt_tokens
        num_new = prompt - entry.num_cached_tokens
        num_beside, tokens_beside, ahead = entry.beside
        row, cell = batch_cell(num_beside), prompt_cell(prompt)
        slow = sharing.at(entry.num_busy)
        offset_ms = estimate.offset_ms(num_beside, tokens_beside)
        x1, x2 = (num_new + ahead) * 0.001, num_new * prompt * 1e-6
        estimate.ttft_cells.learn(row, cell, ttft_ms / ((estimate.ttft.at(x1, x2) + offset_ms) * slow))
        alone_ms = ttft_ms / slow
        estimate.ttft.learn(x1, x2, max(alone_ms - offset_ms, 0.1 * alone_ms))
        if num_tokens == 1 and finish_reason == "stop":
            eos_ms = (t_us - (entry.first_token_us or t_us)) * 0.001
            estimate.eos_step_ms += _EOS_ALPHA * (eos_ms - estimate.eos_step_ms)
        if entry.averages is None or tpot_ms <= 0.0:
            return
        if finish_reason == "stop":
            tpot_ms = max(tpot_ms - estimate.eos_step_ms / (num_tokens - 1), 0.1 * tpot_ms)
        predicted_ms = estimate.tpot_ms(num_beside, tokens_beside) * slow
        # Of few tokens it is little but noise; with speculation both of two may come in one step, in no time.
        weight = (num_tokens - 1) * _WEIGHT_PER_TOKEN if num_tokens <= 1.0 / _WEIGHT_PER_TOKEN else 1.0
        estimate.tpot_cells.learn(row, cell, tpot_ms / predicted_ms, weight)
        num_beside_mean, tokens_mean, _, num_busy_mean = entry.averages
        sharing.learn(num_busy_mean, tpot_ms / estimate.tpot_ms(num_beside_mean, tokens_mean), weight)
        estimate.tpot.learn(num_beside_mean, tokens_mean * 1e-4, tpot_ms / sharing.at(num_busy_mean), weight)

    def settled(self, request_id: str, energy: Energy | None, out: list[Command]) -> None:
        """The request's energy is known, was given up, or will never be known (None)."""
        known = self._unsettled.pop(request_id, None)
        if known is None:
            return
        decision, observation = known
        if energy is not None and energy.settled:
            self._learn_energy(decision, energy, observation)
            observation = structs.replace(observation, energy=energy)
        self._observe(decision, observation, out)

    def _learn_energy(self, decision: Decision, energy: Energy, observation: Observation) -> None:
        """Only the dynamic part: idle power is drawn whatever is chosen."""
        arm = self._fleet.by_name[decision.mode]
        book = self._fleet.books[arm]
        estimate = book.estimate
        prompt, num_tokens = decision.features.num_prompt_tokens, observation.num_completion_tokens
        num_new = prompt - observation.num_cached_tokens
        estimate.learn_energy(energy.dynamic_mj, num_new + num_tokens)
        book.stale = True
        costs = estimate.costs
        if costs is not None:
            num_beside = decision.candidates[arm].num_running
            output_mj = costs.step_mj / (num_beside + 1) + costs.decode_mj_per_token
            predicted_mj = costs.prefill_mj_per_token * num_new + output_mj * num_tokens
            if predicted_mj > 0.0:
                ratio = energy.dynamic_mj / predicted_mj
                estimate.energy_cells.learn(batch_cell(num_beside), prompt_cell(prompt), ratio)

    def _observe(self, decision: Decision, observation: Observation, out: list[Command]) -> None:
        self._router.policy.update(decision, observation)
        out.append(c.Observe(decision, observation))

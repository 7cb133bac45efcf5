"""`cost`: the mode whose predicted latency, energy and SLO misses cost least, for this request and those beside it.

    cost = latency_weight * (e2el + delay) + energy_weight * energy + slo_weight * (overrun of TTFT, TPOT, deadline)

in seconds and kilojoules (modeswitch spec, section 6). Predictions come with the candidates; quality, memory and health
are masks by then. A busy mode is a candidate with its queue in `ttft_ms`: waiting for it can cost least.

`energy_ratio_max` bounds a mode's predicted energy by that of the model's reference mode (its first of full precision
that does not speculate). A bound that leaves nothing is lifted: it is a wish about joules, not about right answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from msd.config import PolicyConfig
from msd.domain import Candidate, Choice, Decision, Features, Mask, Mode, Observation

_WAITS = int(Mask.SLOTS)


class Cost:
    """Scores every feasible candidate in one loop; deterministic, learns nothing itself."""

    name = "cost"

    def __init__(self, config: PolicyConfig, modes: Sequence[Mode]) -> None:
        cost = config.cost
        self._per_ms = cost.latency_weight * 1e-3
        self._per_mj = cost.energy_weight * 1e-6
        self._per_late_ms = cost.slo_weight * 1e-3
        self._tie = 1.0 + cost.tie
        self._energy_max = cost.energy_ratio_max
        self._reference = reference_arms(modes)

    def choose(self, features: Features, candidates: Sequence[Candidate], rng: Random) -> Choice:
        """The cheapest arm; within the tie, the session's own mode, then the emptier engine."""
        per_ms, per_mj, per_late = self._per_ms, self._per_mj, self._per_late_ms
        waited_ms = features.waited_us * 1e-3
        slack_us = features.slack_us
        ttft_left = None if features.slo_ttft_ms is None else features.slo_ttft_ms - waited_ms
        tpot_most = features.slo_tpot_ms
        steps = features.num_expected_tokens - 1
        over = self._over_the_bound(candidates) if self._energy_max else ()
        best, least = -1, 0.0
        costs = []
        for arm, c in enumerate(candidates):
            if c.mask & ~_WAITS or arm in over:
                costs.append(-1.0)
                continue
            cost = per_ms * (c.e2el_ms + c.delay_ms)
            if c.energy_mj is not None:
                cost += per_mj * c.energy_mj
            if ttft_left is not None and c.ttft_ms > ttft_left:
                cost += per_late * (c.ttft_ms - ttft_left)
            if tpot_most is not None and c.tpot_ms > tpot_most:
                cost += per_late * (c.tpot_ms - tpot_most) * steps
            if slack_us is not None and c.e2el_ms * 1e3 > slack_us:
                cost += per_late * (c.e2el_ms - slack_us * 1e-3)
            costs.append(cost)
            if best < 0 or cost < least:
                best, least = arm, cost
        equal = least * self._tie
        own = features.session_arm
        if own >= 0 and own != best and 0.0 <= costs[own] <= equal and not candidates[own].mask:
            return Choice(own, 1.0, "as cheap as any, and has the session's cache")
        chosen = candidates[best]
        for arm, cost in enumerate(costs):
            if arm != best and 0.0 <= cost <= equal and candidates[arm].num_running < chosen.num_running:
                best, chosen = arm, candidates[arm]
        return Choice(best, 1.0, "costs least" if not chosen.mask else "costs least, although it waits")

    def _over_the_bound(self, candidates: Sequence[Candidate]) -> Sequence[int]:
        """The arms that take too much energy, unless they are all that is left. Unknown energy is not too much."""
        over = []
        some_left = False
        for arm, c in enumerate(candidates):
            if c.mask & ~_WAITS:
                continue
            base = candidates[self._reference[arm]].energy_mj
            if base is not None and c.energy_mj is not None and c.energy_mj > base * self._energy_max:
                over.append(arm)
            else:
                some_left = True
        return over if some_left else ()

    def update(self, decision: Decision, observation: Observation) -> None:
        """The core's estimators learn; the policy has nothing of its own."""

    def dump(self) -> dict[str, object]:
        """No state."""
        return {}

    def load(self, state: dict[str, object]) -> None:
        """No state."""


def reference_arms(modes: Sequence[Mode]) -> tuple[int, ...]:
    """Per arm the reference mode of its model; itself where the model has none."""
    first: dict[str, int] = {}
    for arm, mode in enumerate(modes):
        if mode.precision in ("fp32", "bf16", "fp16") and mode.speculation == "none":
            first.setdefault(mode.model, arm)
    return tuple(first.get(mode.model, arm) for arm, mode in enumerate(modes))

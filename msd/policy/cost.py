"""`cost`: the mode whose predicted latency, energy and SLO misses cost least, for this request and all others.

    cost = latency_weight * (e2el + delay) + energy_weight * energy + slo_weight * (overrun of TTFT, TPOT, deadline)
         + miss_weight * (misses its own SLO + others' misses)

in seconds and kilojoules (modeswitch spec, section 6). Predictions come with the candidates; quality, memory and health
are masks by then. A busy mode is a candidate with its queue in `ttft_ms`: waiting for it can cost least.

Engines of one GPU share it: each pays for reading its own weights, so that two at work are slower than one that does
the work of both. Hence the view beyond the request, in *others' misses*:

- requests that run now, keep their SLOs so far and would probably miss one (`num_harmed`);
- requests yet to come, at the present rate of arrivals: whoever arrives while the prompt is read waits for that, who
  arrives while two engines share the GPU gets half of it. And the GPU has a *home*: the mode that does recent traffic
  in the least GPU time, counting what it may not serve; a request elsewhere keeps arrivals from a GPU of their own.

A request may *yield*: wait, behind all that have not yielded, while something runs. It does so when it would make
others miss more SLOs than it can keep; so one that is late already goes when it is in nobody's way. By each
`patience_s` that it has waited it may harm one more, so that nobody waits for ever. Traffic without SLOs never yields.

`energy_ratio_max` bounds a mode's predicted energy by that of the model's reference mode. A bound that
leaves nothing is lifted: it is a wish about joules, not about right answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from msd.config import PolicyConfig
from msd.domain import YIELD, Candidate, Choice, Decision, Features, Mask, Mode, Observation

_WAITS = int(Mask.SLOTS)
_NEVER = int(Mask.MODEL | Mask.HINT | Mask.CONTEXT | Mask.QUALITY)
_CERTAINTY = 1.3
"""A prediction must be this far beyond an SLO before the SLO counts as lost: predictions are off by so much."""
_OWN_SLO = 1.5
"""Others' misses for which a request that can keep its own SLO goes ahead: theirs are less sure than its own."""
_AWAY = 0.3
"""Share of the arrivals during a request away from home that it makes miss."""
_LATE_DELAY = 0.3
"""Misses that count for each second by which a late request delays others: some of them it would make late."""
_ALPHA = 0.02
_NOT_SERVED = 2.0
"""A request that a mode may not serve counts as this many times the best mode's work: another engine must run too."""

_ONLY = "the only mode that may serve it now"
_FASTEST = "costs least: the fastest"
_GENTLEST = "costs least: slows others least"
_SAVES = "costs least: takes least energy"
_BALANCE = "costs least: best on balance"
_QUEUES = "costs least, although it waits"
_EMPTIER = "as cheap as any, and emptier"
_CACHED = "as cheap as any, and has the session's cache"
_LATE = Choice(YIELD, 1.0, "late already: lets others go first")
_HARMS = Choice(YIELD, 1.0, "would make others late: lets them go first")


class Cost:
    """Scores every feasible candidate in one loop; deterministic. Learns which mode is the GPU's home."""

    name = "cost"

    def __init__(self, config: PolicyConfig, modes: Sequence[Mode]) -> None:
        cost = config.cost
        self._per_ms = cost.latency_weight * 1e-3
        self._per_mj = cost.energy_weight * 1e-6
        self._per_late_ms = cost.slo_weight * 1e-3
        self._per_miss = cost.miss_weight
        self._harm_per_ms = 1e-3 / cost.patience_s
        self._tie = 1.0 + cost.tie
        self._energy_max = cost.energy_ratio_max
        self._reference = reference_arms(modes)
        self._names = [mode.name for mode in modes]
        self._work_ms = [0.0] * len(modes)
        """GPU time of recent requests in each mode (EWMA)."""
        self._home = -1
        self._strict = 0.0
        """Share of recent requests that have SLOs (EWMA)."""

    def choose(self, features: Features, candidates: Sequence[Candidate], rng: Random) -> Choice:
        """The cheapest arm; within the tie, the session's own mode, then the emptier engine. Or it yields."""
        per_ms, per_mj, per_late, per_miss = self._per_ms, self._per_mj, self._per_late_ms, self._per_miss
        waited_ms = features.waited_us * 1e-3
        slack_ms = None if features.slack_us is None else features.slack_us * 1e-3
        ttft_left = None if features.slo_ttft_ms is None else features.slo_ttft_ms - waited_ms
        tpot_most = features.slo_tpot_ms
        steps = features.num_expected_tokens - 1
        home = self._home
        arrivals = self._strict * features.arrivals_per_s * 1e-3
        away = arrivals * _AWAY
        over = self._over_the_bound(candidates) if self._energy_max else ()
        best, least, harm, is_late = -1, 0.0, 0.0, False
        costs = []
        for arm, c in enumerate(candidates):
            if c.mask & ~_WAITS or arm in over:
                costs.append(-1.0)
                continue
            cost = per_ms * (c.e2el_ms + c.delay_ms)
            if c.energy_mj is not None:
                cost += per_mj * c.energy_mj
            late = False
            if ttft_left is not None and c.ttft_ms > ttft_left:
                cost += per_late * (c.ttft_ms - ttft_left)
                late = c.ttft_ms > _CERTAINTY * ttft_left
            if tpot_most is not None and c.tpot_ms > tpot_most and steps > 0:
                cost += per_late * (c.tpot_ms - tpot_most) * steps
                late = late or c.tpot_ms > _CERTAINTY * tpot_most
            if slack_ms is not None and c.e2el_ms > slack_ms:
                cost += per_late * (c.e2el_ms - slack_ms)
                late = late or c.e2el_ms > _CERTAINTY * slack_ms
            harmed = c.num_harmed + arrivals * (c.prompt_ms + c.shared_ms)
            if arm != home:
                harmed += away * c.e2el_ms
            cost += per_miss * (harmed + 1.0 if late else harmed)
            costs.append(cost)
            if best < 0 or cost < least:
                best, least, harm, is_late = arm, cost, harmed, late
        chosen = candidates[best]
        if features.num_running and not chosen.mask:
            allowed = self._harm_per_ms * waited_ms
            if is_late:
                if harm + _LATE_DELAY * self._strict * 1e-3 * chosen.delay_ms > allowed:
                    return _LATE
            elif harm > _OWN_SLO + allowed:
                return _HARMS
        equal = least * self._tie
        own = features.session_arm
        if own >= 0 and own != best and 0.0 <= costs[own] <= equal and not candidates[own].mask:
            return Choice(own, 1.0, _CACHED)
        cheapest = best
        for arm, cost in enumerate(costs):
            if arm != best and 0.0 <= cost <= equal and candidates[arm].num_running < chosen.num_running:
                best, chosen = arm, candidates[arm]
        if best != cheapest and not chosen.mask:
            return Choice(best, 1.0, _EMPTIER)
        return Choice(best, 1.0, _QUEUES if chosen.mask else _why(chosen, candidates, costs))

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
        """What came, and what it would have cost in each mode: the core's estimators learn all else."""
        f, candidates, work = decision.features, decision.candidates, self._work_ms
        has_slo = f.slo_ttft_ms is not None or f.slo_tpot_ms is not None or f.slack_us is not None
        self._strict += _ALPHA * (has_slo - self._strict)
        if len(candidates) != len(work):
            return
        not_served = _NOT_SERVED * min(c.work_ms for c in candidates)
        first = self._home < 0
        for arm, c in enumerate(candidates):
            work_ms = not_served if c.mask & _NEVER else c.work_ms
            work[arm] = work_ms if first else work[arm] + _ALPHA * (work_ms - work[arm])
        self._home = work.index(min(work))

    def dump(self) -> dict[str, object]:
        """The recent traffic, by the modes' names."""
        return {"work_ms": dict(zip(self._names, self._work_ms, strict=True)), "strict": self._strict}

    def load(self, state: dict[str, object]) -> None:
        """Take the traffic up, if it is about the same modes."""
        work, strict = state.get("work_ms"), state.get("strict")
        if not isinstance(work, dict) or set(work) != set(self._names) or not isinstance(strict, float):
            return
        self._work_ms = [float(work[name]) for name in self._names]
        self._home = self._work_ms.index(min(self._work_ms)) if any(self._work_ms) else -1
        self._strict = strict


def _why(chosen: Candidate, candidates: Sequence[Candidate], costs: Sequence[float]) -> str:
    """What the choice has before all others, for people who read `msd status`."""
    is_only = is_fastest = is_gentlest = is_thriftiest = True
    energy_mj = chosen.energy_mj
    for c, cost in zip(candidates, costs, strict=True):
        if cost < 0.0 or c is chosen:
            continue
        is_only = False
        is_fastest = is_fastest and chosen.e2el_ms <= c.e2el_ms
        is_gentlest = is_gentlest and chosen.delay_ms <= c.delay_ms
        is_thriftiest = is_thriftiest and energy_mj is not None and (c.energy_mj is None or energy_mj <= c.energy_mj)
    if is_only:
        return _ONLY
    if is_fastest:
        return _FASTEST
    return _GENTLEST if is_gentlest else _SAVES if is_thriftiest else _BALANCE


def reference_arms(modes: Sequence[Mode]) -> tuple[int, ...]:
    """Per arm the reference mode of its model; itself where the model has none."""
    of_model = {mode.model: arm for arm, mode in enumerate(modes) if mode.reference}
    return tuple(of_model.get(mode.model, arm) for arm, mode in enumerate(modes))

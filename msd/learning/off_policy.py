"""What another policy would have done with the decisions in the log, and how sure one may be of it.

Two kinds of figures, told apart everywhere. *Predicted*: by the estimates that each logged candidate carries, for every
decision; as good as the estimator. *Estimated from what was measured*: only decisions on which both policies agree
count, weighted by 1 / propensity of the one that logged (inverse propensity scoring, IPS; self-normalised, SNIPS).
That needs a logging policy that draws. Where it did not, nothing can be said of the decisions that differ: then only
the share of those that agree is reported, since which they are is no accident.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from random import Random
from statistics import fmean
from typing import Final

from msgspec import Struct

from msd.decisions import Decided, Observed, Opened, Record
from msd.domain import Candidate, Decision, Mask, Mode, Observation
from msd.errors import ConfigError
from msd.policy.cost import reference_arms
from msd.ports import Policy

HINTED: Final = "asked for by the producer"
"""Reason of a decision that no policy made; another policy would not have made it either."""
LOGGED: Final = "logged"
_WAITS = int(Mask.SLOTS)
_CERTAIN = 1.0 - 1e-9


class Trial(Struct, frozen=True):
    """One logged decision over `modes`, and what was measured of it, in ms from the decision."""

    modes: tuple[Mode, ...]
    decision: Decision
    observation: Observation | None
    since_receipt_ms: float

    @property
    def arm(self) -> int:
        """What was chosen."""
        return next(arm for arm, c in enumerate(self.decision.candidates) if c.mode == self.decision.mode)

    @property
    def e2el_ms(self) -> float | None:
        """Measured, from the decision to the last token; None for what did not end by itself."""
        seen = self.observation
        if seen is None or seen.finish_reason in (None, "abort"):
            return None
        return max(0.0, seen.e2el_ms - self.since_receipt_ms)


class Estimate(Struct, frozen=True, kw_only=True):
    """The mean of one measured figure if the other policy had decided."""

    ips: float
    snips: float
    effective_samples: float
    """(sum of weights)^2 / sum of their squares: so many unweighted samples would be as telling."""


class LogScore(Struct, frozen=True, kw_only=True):
    """One policy on the log."""

    name: str
    num_decisions: int
    share_of_modes: dict[str, float]
    speedup: float | None
    """Predicted; mean of ratios against the reference mode of each model."""
    energy_ratio: float | None
    """Predicted, likewise; None where the estimator knew no energy."""
    regret: float
    """Predicted E2EL / the least that was allowed, less 1; mean."""
    oracle_match: float
    """Share of decisions for a mode of the least predicted E2EL."""
    num_energy_violations: int
    """Decisions predicted to take more energy than the reference mode."""
    num_slo_violations: int
    """Decisions predicted to miss an SLO or deadline that another allowed mode would keep."""
    matched_share: float
    """Decisions, of those that were observed, on which it agrees with what was done."""
    mean_weight: float | None = None
    """1 if the logging policy might have done all that this one does; what is missing to 1, nobody tried."""
    e2el_ms: Estimate | None = None
    energy_mj: Estimate | None = None
    slo_met: Estimate | None = None


class LogSummary(Struct, frozen=True, kw_only=True):
    """What the log holds."""

    num_decisions: int
    num_observed: int
    num_hinted: int
    """Left out: producers asked for the mode."""
    policies: tuple[str, ...]
    modes: tuple[str, ...]
    drawing: tuple[str, ...]
    """Of the policies those that draw: only on their decisions can an estimate from measured outcomes rest."""
    simulated: bool


def trials(records: Iterable[Record]) -> Iterator[Trial]:
    """Decisions of the log in their order, with what was measured. Raises ConfigError where none says its modes."""
    modes: tuple[Mode, ...] = ()
    decided: list[tuple[tuple[Mode, ...], Decided]] = []
    observed: dict[str, Observation] = {}
    for record in records:
        match record:
            case Opened():
                modes = record.modes
            case Decided():
                names = tuple(c.mode for c in record.decision.candidates)
                if names != tuple(mode.name for mode in modes):
                    raise ConfigError(
                        f"decision {record.decision.decision_id} chose from {', '.join(names)}; its file says "
                        f"{', '.join(mode.name for mode in modes) or 'nothing of modes'}",
                        remedy="leave that file out",
                    )
                decided.append((modes, record))
            case Observed():
                observed[record.observation.decision_id] = record.observation
    for known, it in decided:
        yield Trial(known, it.decision, observed.get(it.decision.decision_id), it.since_receipt_us * 1e-3)


def summarise(log: Sequence[Trial]) -> LogSummary:
    """What there is to go by."""
    free = [trial for trial in log if trial.decision.reason != HINTED]
    return LogSummary(
        num_decisions=len(log),
        num_observed=sum(trial.e2el_ms is not None for trial in log),
        num_hinted=len(log) - len(free),
        policies=tuple(dict.fromkeys(trial.decision.policy for trial in log)),
        modes=tuple(dict.fromkeys(mode.name for trial in log for mode in trial.modes)),
        drawing=drawing_policies(free),
        simulated=any(mode.simulated for trial in log for mode in trial.modes),
    )


def drawing_policies(log: Sequence[Trial]) -> tuple[str, ...]:
    """The policies in the log that were ever less than certain of a choice."""
    return tuple(
        dict.fromkeys(
            trial.decision.policy
            for trial in log
            if trial.decision.propensity < _CERTAIN and trial.decision.reason != HINTED
        )
    )


def evaluate(
    name: str, make: Callable[[Sequence[Mode]], Policy] | None, log: Sequence[Trial], seed: int = 0
) -> LogScore:
    """Let a policy decide again. `make` None: the choices as they were logged. Raises ConfigError: nothing to judge.

    A policy that learns is told of the decisions on which it agrees: of the others it would know nothing.
    """
    free = [trial for trial in log if trial.decision.reason != HINTED]
    if not free:
        raise ConfigError("the log holds no decision of a policy", remedy="let the daemon serve some requests first")
    policies: dict[tuple[Mode, ...], Policy] = {}
    rng = Random(seed)
    arms: list[int] = []
    for trial in free:
        if make is None:
            arms.append(trial.arm)
            continue
        policy = policies.get(trial.modes)
        if policy is None:
            policy = policies[trial.modes] = make(trial.modes)
        arm = policy.choose(trial.decision.features, trial.decision.candidates, rng).arm
        arms.append(arm)
        if arm == trial.arm and trial.observation is not None:
            policy.update(trial.decision, trial.observation)
    return _score(name, free, arms, is_logged=make is None)


def _score(name: str, log: Sequence[Trial], arms: Sequence[int], *, is_logged: bool) -> LogScore:
    speedups, energies, regrets = [], [], []
    num_best = num_energy = num_slo = 0
    chosen: dict[str, int] = {}
    references = {modes: reference_arms(modes) for modes in dict.fromkeys(trial.modes for trial in log)}
    for trial, arm in zip(log, arms, strict=True):
        candidates = trial.decision.candidates
        it = candidates[arm]
        chosen[it.mode] = chosen.get(it.mode, 0) + 1
        base = candidates[references[trial.modes][arm]]
        allowed = [c for c in candidates if not c.mask & ~_WAITS] or [it]
        least_ms = min(c.e2el_ms for c in allowed)
        if it.e2el_ms > 0 and least_ms > 0:
            speedups.append(base.e2el_ms / it.e2el_ms)
            regrets.append(it.e2el_ms / least_ms - 1.0)
            num_best += it.e2el_ms == least_ms
        if it.energy_mj and base.energy_mj:
            energies.append(it.energy_mj / base.energy_mj)
            num_energy += it.energy_mj > base.energy_mj
        if _misses(trial, it) and not all(_misses(trial, c) for c in allowed):
            num_slo += 1
    observed = [(trial, arm) for trial, arm in zip(log, arms, strict=True) if trial.e2el_ms is not None]
    agrees = [arm == trial.arm for trial, arm in observed]
    # Only what policies that draw have logged: of the others' decisions no weight makes up for what they never try.
    drawing = drawing_policies(log)
    weighed = [
        (trial, (1.0 if is_logged else 1.0 / trial.decision.propensity) if same else 0.0)
        for (trial, _), same in zip(observed, agrees, strict=True)
        if trial.decision.policy in drawing
    ]
    seen = [trial for trial, _ in weighed]
    weights = [weight for _, weight in weighed]
    return LogScore(
        name=name,
        num_decisions=len(log),
        share_of_modes={mode: count / len(log) for mode, count in sorted(chosen.items())},
        speedup=fmean(speedups) if speedups else None,
        energy_ratio=fmean(energies) if energies else None,
        regret=fmean(regrets) if regrets else 0.0,
        oracle_match=num_best / len(log),
        num_energy_violations=num_energy,
        num_slo_violations=num_slo,
        matched_share=fmean(agrees) if agrees else 0.0,
        mean_weight=fmean(weights) if weights else None,
        e2el_ms=_estimate([t.e2el_ms for t in seen], weights),
        energy_mj=_estimate([_energy(t) for t in seen], weights),
        slo_met=_estimate([_kept(t) for t in seen], weights),
    )


def _estimate(figures: Sequence[float | None], weights: Sequence[float]) -> Estimate | None:
    """None where nothing was measured of the decisions on which both agree."""
    known = [(figure, weight) for figure, weight in zip(figures, weights, strict=True) if figure is not None]
    total = sum(weight for _, weight in known)
    if not total:
        return None
    weighted = sum(figure * weight for figure, weight in known)
    return Estimate(
        ips=weighted / len(known),
        snips=weighted / total,
        effective_samples=total**2 / sum(weight**2 for _, weight in known),
    )


def _energy(trial: Trial) -> float | None:
    energy = trial.observation.energy if trial.observation else None
    return None if energy is None else float(energy.energy_mj)


def _kept(trial: Trial) -> float | None:
    met = trial.observation.slo_met if trial.observation else None
    return None if met is None else float(met)


def _misses(trial: Trial, c: Candidate) -> bool:
    """Whether an SLO or deadline is predicted to be missed."""
    f = trial.decision.features
    return (
        (f.slo_ttft_ms is not None and c.ttft_ms > f.slo_ttft_ms - f.waited_us * 1e-3)
        or (f.slo_tpot_ms is not None and c.tpot_ms > f.slo_tpot_ms)
        or (f.slack_us is not None and c.e2el_ms > f.slack_us * 1e-3)
    )

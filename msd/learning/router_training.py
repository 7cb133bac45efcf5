"""Trains the routers that `learned` runs: logistic regression, decision tree, random forest, gradient boosting.

What is learnt is how much each mode gains over the reference mode on a request: log(reference latency / latency), less
a penalty where it breaks the energy constraint. So a wrong choice costs a router what it would cost a request (its
regret), and every router ranks all modes, so that a mask takes nothing away but the masked.

The logistic router is a Bradley-Terry model: P(mode i beats mode j) = sigmoid((w_i - w_j) x), pairs weighted by what
is at stake. The others are regressions of the gain, one per mode.

Eleven families are few. So beside their rows a router learns from requests of drawn shapes, labelled by the lines
fitted to the same rows (`lines`); the rows themselves count more. A family that is held out is in neither.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from math import log
from random import Random
from statistics import fmean
from typing import Any, Final, TypeVar

import msgspec
import numpy as np
from msgspec import Struct, structs

from msd.domain import Features, Mask, Mode
from msd.errors import ConfigError
from msd.learning.lines import ModeLines
from msd.learning.matrix import ENERGY_RATIO_MAX, MODES, REFERENCE, Matrix, Score
from msd.learning.off_policy import Trial, evaluate
from msd.learning.replay import Gate, candidates_of, choose, features_of, fitted
from msd.policy.cost import reference_arms
from msd.policy.learned import FEATURES, Learned, vector
from msd.router_file import SCHEMA, HeldOut, Kind, ModeScorer, Router, Tree

T = TypeVar("T")

PENALTY: Final = 1.0
"""Gain that a mode loses where it takes more energy than the reference: as if it were 2.7 times slower."""
NUM_DRAWN: Final = 300
ROW_WEIGHT: Final = 10.0
"""A measured family against a drawn request."""
SEED: Final = 0

# Small on purpose: each tree of each mode costs a decision 0.15 us, and trees that do not fit the caches cost the 99th
# percentile far more.
FOREST_TREES: Final = 6
BOOSTING_TREES: Final = 10
BOOSTING_RATE: Final = 0.4
LOGISTIC_CELLS: Final = 20_000_000
"""Size of the matrix of pairs, at most: with many modes fewer examples do."""


class Example(Struct, frozen=True):
    """One request: what was known of it, and each mode's gain where it is known."""

    features: Features
    gains: Mapping[str, float]
    weight: float = 1.0


def gain(latency_ms: float, reference_ms: float, energy_ratio: float | None) -> float:
    """What choosing a mode gains; see above."""
    over = energy_ratio is not None and energy_ratio > ENERGY_RATIO_MAX
    return log(reference_ms / latency_ms) - (PENALTY if over else 0.0)


# --- the published matrix ---------------------------------------------------------------------------------------------


def matrix_examples(
    matrix: Matrix, families: Sequence[str], *, num_drawn: int = NUM_DRAWN, seed: int = SEED
) -> list[Example]:
    """The rows of these families, and requests drawn around the lines that were fitted to them."""
    rows = [
        Example(
            features_of(matrix, family),
            {
                mode: gain(
                    matrix.cells[family, mode].latency_ms,
                    matrix.cells[family, REFERENCE].latency_ms,
                    matrix.energy_ratio(family, mode),
                )
                for mode in matrix.measured(family)
            },
            ROW_WEIGHT,
        )
        for family in families
    ]
    if not num_drawn:
        return rows
    lines = fitted(matrix, families)
    rng = Random(seed)
    plain = rows[0].features
    return [*rows, *(_drawn(plain, lines, rng) for _ in range(num_drawn))]


def _drawn(plain: Features, lines: Mapping[str, ModeLines], rng: Random) -> Example:
    """A request of a shape that nobody measured: prompt 64 to 4,096, output to 512, a quarter with a shared prefix."""
    prompt, cap = round(2 ** rng.uniform(6, 12)), round(2 ** rng.uniform(0, 9))
    ends_by_eos = rng.random() < 0.5
    output = max(1, round(cap * rng.uniform(0.1, 1.0))) if ends_by_eos else cap
    shared = rng.random() < 0.25
    cached = round(prompt * rng.uniform(0.5, 1.0)) if shared else 0
    told = {
        mode: line.predict(prompt, cached if MODES[mode].prefix_caching else 0, output, ends_by_eos=ends_by_eos)
        for mode, line in lines.items()
    }
    base = told[REFERENCE]
    features = structs.replace(
        plain, num_prompt_tokens=prompt, num_expected_tokens=output, max_tokens=cap, shared_prefix=shared
    )
    return Example(
        features,
        {mode: gain(it.e2el_ms, base.e2el_ms, it.energy_mj / base.energy_mj) for mode, it in told.items()},
    )


def held_out_matrix(
    matrix: Matrix,
    kind: Kind,
    *,
    gate: Gate = "measured",
    num_drawn: int = NUM_DRAWN,
    seed: int = SEED,
    on_family: Callable[[str], None] = lambda without: None,
) -> Score:
    """Leave one family out: a router for each, trained on the others, judged behind the mask of the gate."""
    chosen = {}
    for family in matrix.families:
        on_family(family)
        others = [other for other in matrix.families if other != family]
        scorers = train(kind, matrix_examples(matrix, others, num_drawn=num_drawn, seed=seed), list(MODES.values()))
        features = features_of(matrix, family)
        candidates = candidates_of(matrix, family, features, gate=gate)
        chosen[family] = choose(_policy(kind, scorers, list(MODES.values())), features, candidates)
    note = f"{num_drawn} drawn requests beside the families, seed {seed}" if num_drawn else "the families alone"
    return matrix.score(
        kind + (", no GPTQ" if gate == "no_gptq" else ""),
        chosen,
        without="gptq" if gate == "no_gptq" else "",
        note=note,
    )


def held_out(score: Score) -> HeldOut:
    """A score of all families, as router files carry it."""
    means = score.means
    assert means.f11_speedup is not None, "a family is missing"
    assert score.regret is not None, "an unjudged score"
    assert score.oracle_match is not None, "an unjudged score"
    return HeldOut(
        unit="families",
        num_judged=len(score.modes),
        speedup=means.f11_speedup,
        energy_ratio=means.f11_energy,
        regret=score.regret,
        oracle_match=score.oracle_match,
        num_violations=len(score.violations or ()),
    )


def matrix_router(
    matrix: Matrix, kind: Kind, reached: HeldOut, *, created: str, command: str, versions: dict[str, str]
) -> Router:
    """The router to serve with: trained on all families. `reached`: by its kind, on families held out."""
    examples = matrix_examples(matrix, matrix.families)
    return Router(
        schema=SCHEMA,
        kind=kind,
        created=created,
        command=command,
        versions=versions,
        source="published matrix run_20260508: NVIDIA A100, vLLM 0.6.6; not measured here",
        data_hash=matrix.digest,
        num_examples=len(examples),
        features=FEATURES,
        modes=train(kind, examples, list(MODES.values())),
        held_out=reached,
    )


# --- our own decision log ---------------------------------------------------------------------------------------------

LEAST_TRIALS: Final = 20
"""Fewer decisions cannot be halved into something to learn from and something to judge by."""
MOST_TRIALS: Final = 5_000
"""Of a longer log so many are learnt from, evenly spread over it: more change a small router no more."""


def log_examples(log: Sequence[Trial]) -> list[Example]:
    """Every decision: of the mode that served what was measured, of the others what was predicted without their queues.

    Modes that were masked for good are left out: nobody knows what they would have gained.
    """
    made = []
    references = {modes: reference_arms(modes) for modes in dict.fromkeys(trial.modes for trial in log)}
    for trial in log:
        candidates, gains = trial.decision.candidates, {}
        times = [c.e2el_ms - c.queue_ms for c in candidates]
        if (measured_ms := trial.e2el_ms) is not None:
            times[trial.arm] = measured_ms
        for arm, (c, e2el_ms) in enumerate(zip(candidates, times, strict=True)):
            base_arm = references[trial.modes][arm]
            base, base_ms = candidates[base_arm], times[base_arm]
            if c.mask & ~int(Mask.SLOTS) or e2el_ms <= 0 or base_ms <= 0:
                continue
            ratio = c.energy_mj / base.energy_mj if c.energy_mj and base.energy_mj else None
            gains[c.mode] = gain(e2el_ms, base_ms, ratio)
        if gains:
            made.append(Example(trial.decision.features, gains))
    return made


def held_out_log(log: Sequence[Trial], kind: Kind) -> HeldOut:
    """Train on the earlier half, judge on the later one. Raises ConfigError: too little, or nothing to learn."""
    if len(log) < LEAST_TRIALS:
        raise ConfigError(
            f"the log holds {len(log)} decisions; a router needs {LEAST_TRIALS} at least",
            remedy="let the daemon serve more requests, or train on the published matrix: `msd train-router --matrix`",
        )
    half = len(log) // 2
    scorers = _train_on_log(log[:half], kind)
    later = log[half:]
    score = evaluate(kind, lambda modes: _policy(kind, scorers, modes), later)
    return HeldOut(
        unit="decisions",
        num_judged=len(later),
        speedup=score.speedup or 1.0,
        energy_ratio=score.energy_ratio,
        regret=score.regret,
        oracle_match=score.oracle_match,
        num_violations=score.num_energy_violations,
    )


def log_router(
    log: Sequence[Trial], kind: Kind, reached: HeldOut, *, created: str, command: str, versions: dict[str, str]
) -> Router:
    """The router to serve with: trained on the whole log."""
    simulated = any(mode.simulated for trial in log for mode in trial.modes)
    return Router(
        schema=SCHEMA,
        kind=kind,
        created=created,
        command=command,
        versions=versions,
        source="decision log of this daemon" + (", SIMULATED engines" if simulated else ""),
        data_hash=_digest(log),
        num_examples=min(len(log), MOST_TRIALS),
        features=FEATURES,
        modes=_train_on_log(log, kind),
        held_out=reached,
    )


def _train_on_log(log: Sequence[Trial], kind: Kind) -> tuple[ModeScorer, ...]:
    modes = list({mode.name: mode for trial in log for mode in trial.modes}.values())
    scorers = train(kind, log_examples(_spread(log, MOST_TRIALS)), modes)
    if not scorers:
        raise ConfigError("the log holds no prediction of any mode", remedy="let the daemon serve some requests first")
    return scorers


def _spread(items: Sequence[T], most: int) -> Sequence[T]:
    """At most so many of them, evenly spaced."""
    if len(items) <= most:
        return items
    return [items[number * len(items) // most] for number in range(most)]


def _digest(log: Sequence[Trial]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for trial in log:
        digest.update(msgspec.json.encode((trial.decision, trial.observation)))
    return digest.hexdigest()


def _policy(kind: Kind, scorers: tuple[ModeScorer, ...], modes: Sequence[Mode]) -> Learned:
    """The scorers as the policy that will serve with them: training and serving run the same arithmetic."""
    nothing = HeldOut(
        unit="", num_judged=0, speedup=0.0, energy_ratio=None, regret=0.0, oracle_match=0.0, num_violations=0
    )
    router = Router(
        schema=SCHEMA,
        kind=kind,
        created="",
        command="",
        versions={},
        source="",
        data_hash="",
        num_examples=0,
        features=FEATURES,
        modes=scorers,
        held_out=nothing,
    )
    return Learned.of(router, modes)


# --- the learners -----------------------------------------------------------------------------------------------------


def train(kind: Kind, examples: Sequence[Example], modes: Sequence[Mode]) -> tuple[ModeScorer, ...]:
    """A scorer for each mode that some example knows the gain of."""
    known = [mode for mode in modes if any(mode.name in example.gains for example in examples)]
    if kind == "logistic":
        return _logistic(examples, known)
    return tuple(_regression(kind, examples, mode) for mode in known)


def _logistic(examples: Sequence[Example], modes: Sequence[Mode]) -> tuple[ModeScorer, ...]:
    from sklearn.linear_model import LogisticRegression

    width = len(FEATURES) + 1
    per_example = len(modes) * (len(modes) - 1) // 2 * len(modes) * width
    examples = _spread(examples, max(LEAST_TRIALS, LOGISTIC_CELLS // max(1, per_example)))
    rows: list[Any] = []
    wins: list[bool] = []
    weights: list[float] = []
    for example in examples:
        x = np.array([1.0, *vector(example.features)])
        present = [(index, example.gains[m.name]) for index, m in enumerate(modes) if m.name in example.gains]
        for place, (i, gain_i) in enumerate(present):
            for j, gain_j in present[place + 1 :]:
                stake = gain_i - gain_j
                if not stake:
                    continue
                row = np.zeros((len(modes), width))
                row[i], row[j] = x, -x
                # Every other pair the other way round: the model has no intercept, and so no side that it prefers.
                flipped = len(rows) % 2 == 1
                rows.append(-row.ravel() if flipped else row.ravel())
                wins.append((stake > 0) is not flipped)
                weights.append(2.0 * example.weight * abs(stake))
    if len(set(wins)) < 2:
        # One pair at most: there is nothing to fit, and the mean gains rank.
        return tuple(_scorer(mode, base=_mean_gain(examples, mode)) for mode in modes)
    model = LogisticRegression(C=10.0, fit_intercept=False, max_iter=5_000)
    model.fit(np.array(rows), np.array(wins), sample_weight=np.array(weights))
    learnt = model.coef_.reshape(len(modes), width)
    return tuple(
        _scorer(mode, base=float(w[0]), weights=tuple(map(float, w[1:]))) for mode, w in zip(modes, learnt, strict=True)
    )


def _mean_gain(examples: Sequence[Example], mode: Mode) -> float:
    return fmean(example.gains[mode.name] for example in examples if mode.name in example.gains)


def _regression(kind: Kind, examples: Sequence[Example], mode: Mode) -> ModeScorer:
    from sklearn.ensemble import GradientBoostingRegressor, RandomForestRegressor
    from sklearn.tree import DecisionTreeRegressor

    known = [example for example in examples if mode.name in example.gains]
    x = np.array([vector(example.features) for example in known])
    y = np.array([example.gains[mode.name] for example in known])
    weights = np.array([example.weight for example in known])
    model: Any
    if kind == "tree":
        model = DecisionTreeRegressor(max_depth=6, random_state=SEED).fit(x, y, sample_weight=weights)
        return _scorer(mode, base=0.0, trees=(_tree(model.tree_, 1.0),))
    if kind == "forest":
        model = RandomForestRegressor(FOREST_TREES, max_depth=6, min_samples_leaf=3, random_state=SEED).fit(
            x, y, sample_weight=weights
        )
        return _scorer(mode, base=0.0, trees=tuple(_tree(e.tree_, 1 / FOREST_TREES) for e in model.estimators_))
    model = GradientBoostingRegressor(
        n_estimators=BOOSTING_TREES, max_depth=4, learning_rate=BOOSTING_RATE, random_state=SEED
    ).fit(x, y, sample_weight=weights)
    return _scorer(
        mode,
        base=float(np.average(y, weights=weights)),
        trees=tuple(_tree(e.tree_, BOOSTING_RATE) for e in model.estimators_[:, 0]),
    )


def _tree(fitted_tree: Any, scale: float) -> Tree:
    """A tree of scikit-learn as arrays; its leaves take the ensemble's factor."""
    is_leaf = fitted_tree.children_left < 0
    return Tree(
        feature=tuple(int(f) if not leaf else -1 for f, leaf in zip(fitted_tree.feature, is_leaf, strict=True)),
        # scikit-learn compares features as 32-bit floats: a threshold half-way between two of them is exact in both.
        threshold=tuple(0.0 if leaf else float(t) for t, leaf in zip(fitted_tree.threshold, is_leaf, strict=True)),
        left=tuple(int(child) for child in fitted_tree.children_left),
        right=tuple(int(child) for child in fitted_tree.children_right),
        value=tuple(float(v) * scale for v in fitted_tree.value[:, 0, 0]),
    )


def _scorer(mode: Mode, *, base: float, weights: tuple[float, ...] = (), trees: tuple[Tree, ...] = ()) -> ModeScorer:
    return ModeScorer(
        mode=mode.name,
        precision=mode.precision,
        speculation=mode.speculation,
        prefix_caching=mode.prefix_caching,
        base=base,
        weights=weights,
        trees=trees,
    )

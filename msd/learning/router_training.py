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

from collections.abc import Callable, Mapping, Sequence
from math import log
from random import Random
from typing import Any, Final

import numpy as np
from msgspec import Struct, structs

from msd.domain import Features, Mode
from msd.learning.lines import ModeLines
from msd.learning.matrix import ENERGY_RATIO_MAX, MODES, REFERENCE, Matrix, Score
from msd.learning.replay import Gate, candidates_of, choose, features_of, fitted
from msd.policy.learned import FEATURES, Learned, vector
from msd.router_file import SCHEMA, HeldOut, Kind, ModeScorer, Router, Tree

PENALTY: Final = 1.0
"""Gain that a mode loses where it takes more energy than the reference: as if it were 2.7 times slower."""
NUM_DRAWN: Final = 300
ROW_WEIGHT: Final = 10.0
"""A measured family against a drawn request."""
SEED: Final = 0

FOREST_TREES: Final = 8
BOOSTING_TREES: Final = 20
BOOSTING_RATE: Final = 0.3

Progress = Callable[[int, int, str], None]
"""Told (done, total, what is next)."""


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
    on_family: Callable[[str], None] = lambda family: None,
) -> Score:
    """Leave one family out: a router for each, trained on the others, judged behind the mask of the gate."""
    chosen = {}
    for family in matrix.families:
        on_family(family)
        others = [other for other in matrix.families if other != family]
        scorers = train(kind, matrix_examples(matrix, others, num_drawn=num_drawn, seed=seed), list(MODES.values()))
        features = features_of(matrix, family)
        candidates = candidates_of(matrix, family, features, gate=gate)
        chosen[family] = choose(_policy(kind, scorers), features, candidates)
    note = f"{num_drawn} drawn requests beside the families, seed {seed}" if num_drawn else "the families alone"
    return matrix.score(kind, chosen, without="gptq" if gate == "no_gptq" else "", note=note)


def matrix_router(
    matrix: Matrix, kind: Kind, score: Score, *, created: str, command: str, versions: dict[str, str]
) -> Router:
    """The router to serve with: trained on all families. `score`: what its kind reached on those held out."""
    examples = matrix_examples(matrix, matrix.families)
    means = score.means
    assert means.f11_speedup is not None
    assert score.regret is not None
    assert score.oracle_match is not None
    assert score.violations is not None
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
        held_out=HeldOut(
            unit="families",
            num_judged=len(matrix.families),
            speedup=means.f11_speedup,
            energy_ratio=means.f11_energy,
            regret=score.regret,
            oracle_match=score.oracle_match,
            num_violations=len(score.violations),
        ),
    )


def _policy(kind: Kind, scorers: tuple[ModeScorer, ...]) -> Learned:
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
    return Learned.of(router, list(MODES.values()))


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
    rows, wins, weights = [], [], []
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
                # Both ways round: the model has no side that it prefers, and no intercept to prefer it with.
                rows += [row.ravel(), -row.ravel()]
                wins += [stake > 0, stake < 0]
                weights += [example.weight * abs(stake)] * 2
    if not rows:
        return tuple(_scorer(mode, base=0.0) for mode in modes)
    model = LogisticRegression(C=10.0, fit_intercept=False, max_iter=5_000)
    model.fit(np.array(rows), np.array(wins), sample_weight=np.array(weights))
    learnt = model.coef_.reshape(len(modes), width)
    return tuple(
        _scorer(mode, base=float(w[0]), weights=tuple(map(float, w[1:]))) for mode, w in zip(modes, learnt, strict=True)
    )


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
        model = RandomForestRegressor(FOREST_TREES, max_depth=6, random_state=SEED).fit(x, y, sample_weight=weights)
        return _scorer(mode, base=0.0, trees=tuple(_tree(e.tree_, 1 / FOREST_TREES) for e in model.estimators_))
    model = GradientBoostingRegressor(
        n_estimators=BOOSTING_TREES, max_depth=3, learning_rate=BOOSTING_RATE, random_state=SEED
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

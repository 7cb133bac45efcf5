"""Replays policies over the published matrix: the paper's own table, and `cost` by a protocol that hides the answers.

The protocol (modeswitch spec, section 4): leave one family out. Latency, TTFT and energy of the family that is judged
are never used to fit; its measured quality cells are given to every policy as its gate file, since quality does not
follow from the shape of a request. So quality violations test the plumbing, energy violations the estimator.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Final, Literal

from msgspec import structs

from msd.config import CostConfig, PolicyConfig
from msd.domain import Candidate, Features, Mask
from msd.learning.lines import ModeLines, Shape, fit, reveal
from msd.learning.matrix import CACHED_TOKENS, MODES, REFERENCE, SHARED_PREFIX, Matrix, Score
from msd.policy import make_policy
from msd.policy.published_rules import Workload, rule
from msd.ports import Policy

Gate = Literal["measured", "no_gptq"]
"""Which modes have passed: as the measured cells say, or those without any that GPTQ quantised."""
_WITHOUT: Final[dict[Gate, str]] = {"measured": "", "no_gptq": "gptq"}
_SUFFIX: Final[dict[Gate, str]] = {"measured": "", "no_gptq": ", no GPTQ"}
_DEFAULT: Final = CostConfig()
_TAGS: Final = {
    "mmlu_pro_eval": "mmlu_pro",
    "gsm8k_eval": "gsm8k",
    "truthfulqa_eval": "truthfulqa",
    "gpqa_eval": "gpqa",
    "mlu_eval": "mlu",
}
_PRESSED: Final = "memory_pressure_long_context"
_SMALL: Final = "not measured on the question sets"
_BATCHED: Final = "not comparable: 4 requests at once"


def table(matrix: Matrix) -> list[Score]:
    """The published comparison: fixed modes, the rules in four versions, oracles, and the rules behind the mask."""
    oracle = {family: matrix.oracle(family, constrained=False) for family in matrix.families}
    constrained = {family: matrix.oracle(family) for family in matrix.families}
    without = {family: matrix.oracle(family, without="gptq") for family in matrix.families}
    rules = {family: rule(workload(matrix, family)).mode for family in matrix.families}
    hidden = {family: rule(workload(matrix, family, named=False)).mode for family in matrix.families}
    bare = {
        family: rule(workload(matrix, family, named=False, tagged=False, counted=True)).mode
        for family in matrix.families
    }
    return [
        *(_fixed(matrix, mode) for mode in (*MODES, "int8_plus_continuous_batching", "continuous_batching")),
        matrix.score("rules", rules),
        matrix.score("rules, names hidden", hidden),
        matrix.score("rules, real token counts, no names, no tags", bare),
        _live(matrix),
        matrix.score("oracle, no constraints", oracle, judged=False),
        matrix.score("oracle, constraints", constrained),
        matrix.score("oracle, constraints, no GPTQ", without, without="gptq"),
        *behind_the_mask(matrix),
    ]


def behind_the_mask(matrix: Matrix, gate: Gate = "measured") -> list[Score]:
    """What `cost` must beat: the best fixed mode and the rules, with eager FP16 where their mode breaks a constraint.

    Their mask is made of measured figures, energy included, which favours them.
    """
    without = _WITHOUT[gate]

    def masked(family: str, mode: str) -> str:
        barred = without and mode.startswith(without)
        return mode if (family, mode) in matrix.cells and not barred and not matrix.faults(family, mode) else REFERENCE

    fixed = [
        matrix.score(
            f"best fixed mode + mask ({mode}){_SUFFIX[gate]}",
            {family: masked(family, mode) for family in matrix.families},
            without=without,
        )
        for mode in MODES
    ]
    best = max(fixed, key=lambda score: score.means.f11_speedup or 0.0)
    rules = {family: masked(family, rule(workload(matrix, family)).mode) for family in matrix.families}
    return [best, matrix.score(f"rules + mask{_SUFFIX[gate]}", rules, without=without)]


def cost(
    matrix: Matrix,
    *,
    gate: Gate = "measured",
    config: CostConfig = _DEFAULT,
    known_lengths: bool = True,
    revealed: bool = False,
) -> Score:
    """`cost` with estimates of families that it has not seen. `revealed`: after one row per family and mode.

    `known_lengths` False: the request's length class is unseen too, and half its cap is expected.
    """
    by = make_policy(PolicyConfig(name="cost", cost=config), list(MODES.values()))
    modes = {}
    for family in matrix.families:
        features = features_of(matrix, family, known_lengths=known_lengths)
        candidates = candidates_of(matrix, family, features, gate=gate, revealed=revealed)
        modes[family] = choose(by, features, candidates)
    notes = [
        f"latency_weight {config.latency_weight:g}, energy_weight {config.energy_weight:g}, "
        f"energy_ratio_max {config.energy_ratio_max:g}"
    ]
    name = "cost"
    if not known_lengths:
        name += ", length class unseen"
    if revealed:
        name += ", one row revealed"
    return matrix.score(name + _SUFFIX[gate], modes, without=_WITHOUT[gate], note="; ".join(notes))


def policy(matrix: Matrix, name: str, by: Policy, gate: Gate = "measured", *, trained_on_these: bool = False) -> Score:
    """Any policy over MODES, with candidates predicted from the other families. `trained_on_these`: not held out."""
    modes = {}
    for family in matrix.families:
        features = features_of(matrix, family)
        modes[family] = choose(by, features, candidates_of(matrix, family, features, gate=gate))
    note = "trained on these families: NOT held out" if trained_on_these else ""
    return matrix.score(name + _SUFFIX[gate], modes, without=_WITHOUT[gate], note=note)


def choose(by: Policy, features: Features, candidates: Sequence[Candidate]) -> str:
    """The name of the mode that a policy picks of the candidates, which are in the order of MODES."""
    return candidates[by.choose(features, candidates, Random(0)).arm].mode


def features_of(matrix: Matrix, family: str, *, known_lengths: bool = True) -> Features:
    """What the daemon would know of this family's requests: counts of tokens and the shared prefix, no names.

    No memory pressure: the paper's filled the GPU after the KV cache was allotted, which msd's signals do not show.
    """
    cell = matrix.cells[family, REFERENCE]
    expected = round(cell.num_output_tokens) if known_lengths else max(1, cell.max_tokens // 2)
    return Features(
        num_prompt_tokens=cell.num_prompt_tokens,
        num_expected_tokens=min(expected, cell.max_tokens),
        max_tokens=cell.max_tokens,
        shared_prefix=family == SHARED_PREFIX,
        task=None,
        service_class="standard",
        num_running=0,
        num_waiting=0,
        arrival_cv=0.0,
        memory_pressure=0.0,
        waited_us=0,
        slack_us=None,
        view_age_us=None,
    )


def candidates_of(
    matrix: Matrix, family: str, features: Features, *, gate: Gate = "measured", revealed: bool = False
) -> list[Candidate]:
    """Every mode, idle, with figures predicted from the *other* families. A mode without a row here is masked."""
    lines = fitted(matrix, [other for other in matrix.families if other != family])
    made = []
    for mode in MODES:
        mask = 0
        if (family, mode) not in matrix.cells:
            mask = int(Mask.HEALTH)
        elif matrix.quality_fault(family, mode) or (_WITHOUT[gate] and mode.startswith(_WITHOUT[gate])):
            mask = int(Mask.QUALITY)
        line = lines[mode]
        if revealed and not mask & Mask.HEALTH:
            line = reveal(line, _shape(matrix, family, mode))
        num_cached = CACHED_TOKENS if features.shared_prefix and MODES[mode].prefix_caching else 0
        figures = line.predict(
            features.num_prompt_tokens,
            num_cached,
            features.num_expected_tokens,
            ends_by_eos=features.num_expected_tokens < features.max_tokens,
        )
        made.append(
            Candidate(
                mode=mode,
                mask=mask,
                ttft_ms=figures.ttft_ms,
                tpot_ms=line.tpot_ms,
                e2el_ms=figures.e2el_ms,
                energy_mj=round(figures.energy_mj),
                num_running=0,
                num_free_slots=1,
                num_cached_tokens=num_cached,
            )
        )
    return made


def fitted(matrix: Matrix, families: Sequence[str]) -> dict[str, ModeLines]:
    """The lines of every mode, fitted on these families."""
    return {
        mode: fit([_shape(matrix, family, mode) for family in families if (family, mode) in matrix.cells])
        for mode in MODES
    }


def _shape(matrix: Matrix, family: str, mode: str) -> Shape:
    cell = matrix.cells[family, mode]
    # A mean of 0.98 of the cap is the cap: throughput x latency is a ratio of means, good to a few per cent.
    ends_by_eos = cell.num_output_tokens < 0.95 * cell.max_tokens
    return Shape(
        num_prompt_tokens=cell.num_prompt_tokens,
        num_cached_tokens=CACHED_TOKENS if family == SHARED_PREFIX and MODES[mode].prefix_caching else 0,
        num_output_tokens=cell.num_output_tokens,
        ends_by_eos=ends_by_eos,
        ttft_ms=cell.ttft_ms,
        latency_ms=cell.latency_ms,
        energy_mj=cell.energy_per_token_j * cell.num_output_tokens * 1e3,
    )


def workload(
    matrix: Matrix, family: str, *, named: bool = True, tagged: bool = True, counted: bool = False
) -> Workload:
    """The family as the published controller sees it; `counted`: with the real length of its prompt."""
    cell = matrix.cells[family, REFERENCE]
    return Workload(
        name=family if named else "",
        tag=_TAGS.get(family, family) if tagged else "",
        num_prompt_tokens=cell.num_prompt_tokens if counted else cell.num_nominal_tokens,
        num_output_tokens=cell.max_tokens,
        shared_prefix=family == SHARED_PREFIX,
        memory_pressure=family == _PRESSED,
    )


def _fixed(matrix: Matrix, mode: str) -> Score:
    modes = {family: mode for family in matrix.families if (family, mode) in matrix.cells}
    if mode not in MODES:
        return matrix.score(mode, modes, judged=False, note=_BATCHED)
    return matrix.score(mode, modes, note="" if len(modes) == len(matrix.families) else _SMALL)


def _live(matrix: Matrix) -> Score:
    """The published controller's live run: its own latencies and energies, not the matrix's."""
    judged = matrix.score("", {row.family: row.mode for row in matrix.live})
    return structs.replace(
        judged,
        name="rules, live run",
        means=matrix.means(
            {row.family: row.speedup for row in matrix.live}, {row.family: row.energy_ratio for row in matrix.live}
        ),
        violations=tuple(
            f"{row.family}: accuracy {row.accuracy_pct - row.reference_accuracy_pct:+.0f}"
            for row in matrix.live
            if row.accuracy_pct is not None
            and row.reference_accuracy_pct is not None
            and row.reference_accuracy_pct - row.accuracy_pct > 1.5
        ),
        least_of_oracle=None,
        regret=None,
    )

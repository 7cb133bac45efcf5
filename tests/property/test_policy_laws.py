"""Laws of every policy: what it picks may be picked, its propensity is a probability, its state survives."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import get_args

import msgspec
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from msd.config import POLICY_NAMES, LearnedConfig, PolicyConfig
from msd.domain import (
    SERVICE_CLASSES,
    Candidate,
    Choice,
    Decision,
    Features,
    Mask,
    Mode,
    Observation,
    Precision,
    Speculation,
)
from msd.policy import make_policy

FREE = (0, int(Mask.SLOTS))
ROUTER = Path(__file__).resolve().parents[1] / "data" / "router.json"


def config_of(name: str) -> PolicyConfig:
    return PolicyConfig(name=name, learned=LearnedConfig(file=str(ROUTER)))


modes_of = st.lists(
    st.tuples(st.sampled_from(get_args(Precision)), st.sampled_from(get_args(Speculation)), st.booleans()),
    min_size=1,
    max_size=8,
).map(
    lambda traits: tuple(
        Mode(
            name=f"m{i}", engine=f"m{i}", model="m", precision=precision, speculation=speculation, prefix_caching=cached
        )
        for i, (precision, speculation, cached) in enumerate(traits)
    )
)
features_of = st.builds(
    Features,
    num_prompt_tokens=st.integers(0, 131_072),
    num_expected_tokens=st.integers(0, 131_072),
    max_tokens=st.integers(1, 131_072),
    shared_prefix=st.booleans(),
    task=st.none() | st.sampled_from(("gsm8k", "gpqa", "mt_bench", "alpacaeval_v2")) | st.text(max_size=8),
    service_class=st.sampled_from(SERVICE_CLASSES),
    num_running=st.integers(0, 1_000),
    num_waiting=st.integers(0, 100_000),
    arrival_cv=st.floats(0, 100),
    memory_pressure=st.floats(0, 1),
    waited_us=st.integers(0, 10**9),
    slack_us=st.none() | st.integers(-(10**9), 10**9),
    view_age_us=st.none() | st.integers(0, 10**9),
)
# Mostly open, so that a choice exists.
masks_of = st.sampled_from((0, 0, 0, int(Mask.SLOTS), int(Mask.SLOTS))) | st.integers(0, sum(Mask))
times_of = st.tuples(st.floats(0, 1e7), st.floats(0, 1e7), st.floats(0, 1e7))


def candidates_of(data: st.DataObject, modes: tuple[Mode, ...]) -> list[Candidate]:
    made = []
    for mode in modes:
        mask = data.draw(masks_of)
        free = 0 if mask & Mask.SLOTS else data.draw(st.integers(1, 64))
        ttft_ms, tpot_ms, e2el_ms = data.draw(times_of)
        energy_mj = data.draw(st.none() | st.integers(0, 10**9))
        running = data.draw(st.integers(0, 64))
        made.append(Candidate(mode.name, mask, ttft_ms, tpot_ms, e2el_ms, energy_mj, running, free))
    return made


def observe(
    decision_mode: str, features: Features, choice: Choice, candidates: list[Candidate]
) -> tuple[Decision, Observation]:
    decision = Decision(
        decision_id="d",
        request_id="r",
        attempt=1,
        t_us=0,
        policy="p",
        mode=decision_mode,
        engine=decision_mode,
        reason=choice.reason,
        propensity=choice.propensity,
        features=features,
        candidates=tuple(candidates),
        view=None,
    )
    observation = Observation(
        decision_id="d",
        mode=decision_mode,
        finish_reason="stop",
        ttft_ms=1.0,
        tpot_ms=0.0,
        e2el_ms=1.0,
        num_completion_tokens=1,
        energy=None,
        slo_met=None,
    )
    return decision, observation


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(POLICY_NAMES), modes=modes_of, seed=st.integers(0, 2**32), data=st.data())
def test_a_policy_picks_what_may_be_picked(name: str, modes: tuple[Mode, ...], seed: int, data: st.DataObject) -> None:
    policy = make_policy(config_of(name), modes)
    rng = Random(seed)
    for _ in range(4):
        features, candidates = data.draw(features_of), candidates_of(data, modes)
        if not any(candidate.mask in FREE for candidate in candidates):
            continue
        choice = policy.choose(features, candidates, rng)
        assert 0 <= choice.arm < len(modes)
        assert candidates[choice.arm].mask in FREE
        assert 0 < choice.propensity <= 1
        assert 0 < len(choice.reason) <= 200
        assert "\n" not in choice.reason
        policy.update(*observe(modes[choice.arm].name, features, choice, candidates))


@settings(max_examples=50, deadline=None)
@given(name=st.sampled_from(POLICY_NAMES), modes=modes_of, seed=st.integers(0, 2**32), data=st.data())
def test_one_seed_and_one_state_give_one_choice(
    name: str, modes: tuple[Mode, ...], seed: int, data: st.DataObject
) -> None:
    """Replay: neither the clock nor hash order nor hidden state may have a say."""
    features, candidates = data.draw(features_of), candidates_of(data, modes)
    assume(any(candidate.mask in FREE for candidate in candidates))
    first = make_policy(config_of(name), modes)
    first.choose(features, candidates, Random(seed))
    second = make_policy(config_of(name), modes)
    second.load(msgspec.json.decode(msgspec.json.encode(first.dump())))
    assert first.choose(features, candidates, Random(seed)) == second.choose(features, candidates, Random(seed))


@settings(max_examples=50, deadline=None)
@given(name=st.sampled_from(("round_robin", "rules")), modes=modes_of, features=features_of, data=st.data())
def test_only_fixed_waits_for_a_busy_mode_beside_a_free_one(
    name: str, modes: tuple[Mode, ...], features: Features, data: st.DataObject
) -> None:
    candidates = candidates_of(data, modes)
    assume(any(candidate.mask == 0 for candidate in candidates))
    choice = make_policy(config_of(name), modes).choose(features, candidates, Random(0))
    assert candidates[choice.arm].mask == 0

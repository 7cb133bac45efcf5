"""`cost`: what it weighs, when it lets a request yield, and which mode it takes for the GPU's home."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

import msgspec
import pytest

from msd.config import CostConfig, PolicyConfig
from msd.domain import YIELD, Candidate, Choice, Decision, Energy, Features, Mask, Mode, Observation
from msd.policy.cost import Cost

MODES = (
    Mode(name="fp16", engine="fp16", model="m", precision="fp16"),
    Mode(name="int8", engine="int8", model="m", precision="int8"),
    Mode(name="int4", engine="int4", model="m", precision="int4"),
)
SLOTS = int(Mask.SLOTS)
QUALITY = int(Mask.QUALITY)


def made(**cost: float) -> Cost:
    return Cost(PolicyConfig(cost=CostConfig(**cost)), MODES)


def candidate(mode: str, **changed: object) -> Candidate:
    plain = Candidate(mode, 0, 20.0, 10.0, 1_000.0, None, 0, 8, work_ms=100.0)
    return msgspec.structs.replace(plain, **changed)


def features(**changed: object) -> Features:
    plain = Features(
        num_prompt_tokens=500,
        num_expected_tokens=100,
        max_tokens=200,
        shared_prefix=False,
        task=None,
        service_class="standard",
        num_running=4,
        num_waiting=2,
        arrival_cv=1.0,
        memory_pressure=0.0,
        waited_us=0,
        slack_us=None,
        view_age_us=None,
        arrivals_per_s=2.0,
        slo_ttft_ms=50.0,
        slo_tpot_ms=20.0,
    )
    return msgspec.structs.replace(plain, **changed)


def choose(policy: Cost, candidates: list[Candidate], f: Features | None = None) -> Choice:
    return policy.choose(f or features(), candidates, Random(1))


def three(**by_mode: Mapping[str, object]) -> list[Candidate]:
    return [candidate(mode.name, **by_mode.get(mode.name, {})) for mode in MODES]


def observe(policy: Cost, candidates: list[Candidate], f: Features | None = None, times: int = 1) -> None:
    decision = Decision(
        decision_id="d",
        request_id="r",
        attempt=1,
        t_us=0,
        policy="cost",
        mode="int8",
        engine="int8",
        reason="",
        propensity=1.0,
        features=f or features(),
        candidates=tuple(candidates),
        view=None,
    )
    observation = Observation(
        decision_id="d",
        mode="int8",
        finish_reason="stop",
        ttft_ms=1.0,
        tpot_ms=1.0,
        e2el_ms=1.0,
        num_completion_tokens=10,
        energy=Energy(energy_mj=1, dynamic_mj=1, static_mj=0, source="simulated", settled=True),
        slo_met=True,
    )
    for _ in range(times):
        policy.update(decision, observation)


# --- what it weighs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({"e2el_ms": 900.0}, {}),
        ({}, {"delay_ms": 200.0}),
        ({"energy_mj": 10_000}, {"energy_mj": 500_000}),
        ({}, {"ttft_ms": 51.0}),
        ({}, {"tpot_ms": 21.0}),
        ({}, {"num_harmed": 1}),
        ({}, {"ttft_ms": 90.0, "e2el_ms": 500.0}),
    ],
    ids=["latency", "delay of others", "energy", "TTFT", "TPOT", "harm to others", "an SLO beats half a second"],
)
def test_what_costs_less_is_chosen(better: dict[str, object], worse: dict[str, object]) -> None:
    for order in ((better, worse), (worse, better)):
        arms = three(fp16=order[0], int8=order[1], int4={"mask": QUALITY})
        assert choose(made(), arms).arm == order.index(better)


def test_a_deadline_counts_as_an_slo() -> None:
    arms = three(fp16={"e2el_ms": 990.0, "delay_ms": 500.0}, int8={"e2el_ms": 1_300.0}, int4={"mask": QUALITY})
    assert choose(made(), arms).arm == 1
    assert choose(made(), arms, features(slack_us=1_000_000)).arm == 0


def test_waiting_for_a_full_mode_may_cost_least() -> None:
    arms = three(fp16={"e2el_ms": 5_000.0}, int8={"mask": SLOTS, "queue_ms": 10.0}, int4={"mask": QUALITY})
    choice = choose(made(), arms)
    assert choice.arm == 1
    assert "waits" in choice.reason


def test_within_the_tie_the_sessions_own_mode_serves() -> None:
    arms = three(int4={"e2el_ms": 1_005.0})
    assert choose(made(), arms, features(session_arm=2)).arm == 2
    assert choose(made(tie=0.001), arms, features(session_arm=2)).arm == 0


# --- yielding --------------------------------------------------------------------------------------------------------


LATE: dict[str, object] = {"ttft_ms": 200.0, "num_harmed": 1}


def test_who_is_late_already_yields_to_those_it_would_make_late() -> None:
    arms = three(fp16=LATE, int8=LATE, int4=LATE)
    choice = choose(made(), arms)
    assert (choice.arm, choice.propensity) == (YIELD, 1.0)
    assert "late" in choice.reason


def test_who_is_late_goes_when_it_is_in_nobodys_way() -> None:
    arms = three(**{mode.name: LATE | {"num_harmed": 0} for mode in MODES})
    assert choose(made(), arms).arm >= 0


def test_nothing_yields_while_nothing_runs() -> None:
    arms = three(fp16=LATE, int8=LATE, int4=LATE)
    assert choose(made(), arms, features(num_running=0)).arm >= 0


def test_patience_ends() -> None:
    arms = three(fp16=LATE, int8=LATE, int4=LATE)
    assert choose(made(patience_s=30.0), arms, features(waited_us=29_000_000)).arm == YIELD
    assert choose(made(patience_s=30.0), arms, features(waited_us=31_000_000)).arm >= 0


def test_who_keeps_its_own_slo_may_harm_one_but_not_many() -> None:
    assert choose(made(), three(**{mode.name: {"num_harmed": 1} for mode in MODES})).arm >= 0
    choice = choose(made(), three(**{mode.name: {"num_harmed": 2} for mode in MODES}))
    assert choice.arm == YIELD
    assert "others" in choice.reason


def test_arrivals_are_expected_to_be_harmed_once_traffic_has_slos() -> None:
    arms = three(**{mode.name: {"shared_ms": 1_000.0, "num_running": 1} for mode in MODES})
    policy = made()
    assert choose(policy, arms).arm >= 0, "nobody is known to have SLOs"
    observe(policy, arms, times=400)
    assert choose(policy, arms).arm == YIELD
    assert choose(policy, arms, features(arrivals_per_s=0.5)).arm >= 0


def test_traffic_without_slos_never_yields() -> None:
    bare = features(slo_ttft_ms=None, slo_tpot_ms=None, arrivals_per_s=100.0)
    arms = three(**{mode.name: {"shared_ms": 9_000.0, "prompt_ms": 900.0, "delay_ms": 9_000.0} for mode in MODES})
    policy = made()
    observe(policy, arms, bare, times=400)
    assert choose(policy, arms, bare).arm >= 0


def test_who_would_wait_for_a_slot_parks_and_does_not_yield() -> None:
    arms = three(fp16=LATE | {"mask": SLOTS}, int8={"mask": QUALITY}, int4={"mask": QUALITY})
    assert choose(made(), arms).arm == 0


# --- home ------------------------------------------------------------------------------------------------------------


def test_the_gpu_has_a_home_and_others_keep_arrivals_from_it() -> None:
    policy = made()
    observe(policy, three(fp16={"work_ms": 180.0}, int8={"work_ms": 100.0}, int4={"work_ms": 150.0}), times=400)
    # Faster for this request, but who comes meanwhile would share the GPU.
    arms = three(int4={"e2el_ms": 800.0}, fp16={"e2el_ms": 1_500.0})
    assert choose(policy, arms, features(num_running=0, arrivals_per_s=5.0)).arm == 1
    assert choose(policy, arms, features(num_running=0, arrivals_per_s=0.02)).arm == 2


def test_what_a_mode_may_not_serve_counts_against_it_as_a_home() -> None:
    policy = made()
    served = three(fp16={"work_ms": 180.0}, int8={"work_ms": 100.0}, int4={"work_ms": 90.0})
    refused = three(fp16={"work_ms": 180.0}, int8={"work_ms": 100.0}, int4={"work_ms": 90.0, "mask": QUALITY})
    for _ in range(400):
        observe(policy, served)
        observe(policy, refused)
    arms = three(int4={"e2el_ms": 980.0}, fp16={"e2el_ms": 1_500.0})
    assert choose(policy, arms, features(num_running=0, arrivals_per_s=5.0)).arm == 1


def test_its_state_survives_and_is_dropped_for_other_modes() -> None:
    policy, heir = made(), made()
    observe(policy, three(fp16={"work_ms": 300.0}, int8={"work_ms": 100.0}, int4={"work_ms": 200.0}), times=50)
    state = msgspec.json.decode(msgspec.json.encode(policy.dump()))
    heir.load(state)
    assert heir.dump() == policy.dump()
    stranger = Cost(PolicyConfig(), MODES[:2])
    before = stranger.dump()
    stranger.load(state)
    assert stranger.dump() == before

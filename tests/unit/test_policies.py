"""The policies on synthetic features: every rule fires where the published table says so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import get_args

import msgspec
import pytest

from msd.config import POLICY_NAMES, PolicyConfig
from msd.domain import Candidate, Choice, Features, Mask, Mode, Precision, Speculation
from msd.errors import ConfigError
from msd.policy import POLICIES, make_policy
from msd.policy.least_loaded import least_loaded
from msd.policy.rules import prefill_score
from msd.ports import Policy

ROUTER = Path(__file__).resolve().parents[1] / "data" / "router.json"


def mode(name: str, precision: Precision = "bf16", speculation: Speculation = "none", cached: bool = False) -> Mode:
    return Mode(name=name, engine=name, model="m", precision=precision, speculation=speculation, prefix_caching=cached)


FLEET = (
    mode("plain"),
    mode("cached", cached=True),
    mode("int8", "int8"),
    mode("int4", "int4"),
    mode("int4c", "int4", cached=True),
    mode("spec", speculation="draft"),
)


def candidates(modes: Sequence[Mode] = FLEET, *, masks: dict[str, int] | None = None) -> list[Candidate]:
    """All idle with four free slots, but for `masks`. Fewer free slots later in the list keep ties out."""
    told = masks or {}
    return [Candidate(m.name, told.get(m.name, 0), 10.0, 2.0, 30.0, None, i, 9 - i) for i, m in enumerate(modes)]


def features(**changed: object) -> Features:
    plain = Features(
        num_prompt_tokens=500,
        num_expected_tokens=100,
        max_tokens=200,
        shared_prefix=False,
        task=None,
        service_class="standard",
        num_running=0,
        num_waiting=0,
        arrival_cv=1.0,
        memory_pressure=0.0,
        waited_us=0,
        slack_us=None,
        view_age_us=None,
    )
    return msgspec.structs.replace(plain, **changed)


def policy(name: str, modes: Sequence[Mode] = FLEET, **config: object) -> Policy:
    if name == "learned":
        config.setdefault("learned", {"file": str(ROUTER)})
    return make_policy(msgspec.convert({"name": name, **config}, PolicyConfig), modes)


def choose(
    by: Policy, saw: Features | None = None, *, modes: Sequence[Mode] = FLEET, masks: dict[str, int] | None = None
) -> tuple[str, Choice]:
    choice = by.choose(saw or features(), candidates(modes, masks=masks), Random(1))
    return modes[choice.arm].name, choice


# --- the registry ----------------------------------------------------------------------------------------------------


def test_the_two_lists_of_policies_are_one() -> None:
    assert set(POLICY_NAMES) == set(POLICIES)
    for name in POLICIES:
        assert policy(name).name == name


def test_an_unknown_policy_is_named_with_its_nearest() -> None:
    with pytest.raises(ConfigError, match="'ruels' is not a policy") as caught:
        policy("ruels")
    assert "did you mean 'rules'?" in str(caught.value)
    with pytest.raises(ConfigError, match=r"one of cost, fixed, .*round_robin, rules"):
        policy("zzz")


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_a_dumped_state_can_be_taken_up(name: str) -> None:
    first = policy(name)
    for _ in range(3):
        choose(first)
    second = policy(name)
    second.load(msgspec.json.decode(msgspec.json.encode(first.dump())))
    assert choose(first) == choose(second)


# --- fixed, round_robin, least_loaded --------------------------------------------------------------------------------


def test_fixed_takes_its_mode_and_waits_for_it() -> None:
    by = policy("fixed", mode="int8")
    assert choose(by)[0] == "int8"
    name, choice = choose(by, masks={"int8": int(Mask.SLOTS)})
    assert (name, choice.propensity, choice.reason) == ("int8", 1.0, "fixed on int8")


@pytest.mark.parametrize("mask", [Mask.MODEL, Mask.HEALTH, Mask.MEMORY, Mask.HEALTH | Mask.SLOTS])
def test_fixed_goes_elsewhere_only_when_its_mode_must_not_serve(mask: Mask) -> None:
    name, choice = choose(policy("fixed", mode="int8"), masks={"int8": int(mask)})
    assert name == "plain"
    assert str(mask.name).split("|")[0] in choice.reason


def test_fixed_is_on_the_first_mode_unless_told() -> None:
    assert choose(policy("fixed"))[0] == "plain"
    with pytest.raises(ConfigError, match=r"'int9' is not a mode.*plain, cached, int8"):
        policy("fixed", mode="int9")


def test_round_robin_takes_turns_over_what_is_feasible() -> None:
    by = policy("round_robin")
    masks = {"cached": int(Mask.SLOTS), "int4": int(Mask.HEALTH)}
    turns = [choose(by, masks=masks)[0] for _ in range(8)]
    assert turns == ["plain", "int8", "int4c", "spec"] * 2


def test_round_robin_waits_for_the_next_in_turn_when_all_are_full() -> None:
    by = policy("round_robin")
    choose(by)
    masks = {m.name: int(Mask.SLOTS) for m in FLEET} | {"cached": int(Mask.HEALTH)}
    name, choice = choose(by, masks=masks)
    assert (name, choice.reason) == ("int8", "next in turn, all are full")


def test_least_loaded_prefers_free_slots_then_few_running_then_order() -> None:
    def made(*loads: tuple[int, int, int]) -> list[Candidate]:
        return [Candidate(f"m{i}", mask, 1.0, 1.0, 1.0, None, run, free) for i, (mask, free, run) in enumerate(loads)]

    assert least_loaded(made((0, 1, 0), (0, 2, 5), (0, 2, 3)), range(3)) == 2
    assert least_loaded(made((0, 1, 1), (0, 1, 1)), range(2)) == 0
    assert least_loaded(made((int(Mask.SLOTS), 0, 0), (0, 1, 9)), range(2)) == 1
    assert least_loaded(made((int(Mask.SLOTS), 0, 4), (int(Mask.SLOTS), 0, 2)), range(2)) == 1
    assert least_loaded(made((int(Mask.HEALTH), 5, 0)), range(1)) == -1
    assert least_loaded(made((int(Mask.SLOTS | Mask.DEADLINE), 5, 0)), range(1)) == -1
    assert least_loaded([], ()) == -1


# --- rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "output", "pressed", "score"),
    [
        (512, 8, False, 65),
        (1024, 32, False, 35),
        (1024, 128, False, 0),
        (0, 8, False, 50),  # the ratio of an empty prompt is 0
        (383, 20, False, 0),
        (384, 20, False, 15),  # 20/384 is above 0.05
        (400, 20, False, 25),
        (768, 16, False, 55),  # 16/768 is above 0.02
        (800, 16, False, 65),
        (2_048, 63, False, 35),
        (2_048, 64, False, 15),
        (512, 8, True, 70),
        (4_096, 1, True, 80),
    ],
)
def test_prefill_score_is_the_published_one(prompt: int, output: int, pressed: bool, score: int) -> None:
    assert prefill_score(prompt, output, pressed) == score


def test_prefill_score_stays_within_its_bounds() -> None:
    scores = [
        prefill_score(p, o, m) for p in range(0, 5_000, 97) for o in (0, 1, 8, 16, 64, 128) for m in (False, True)
    ]
    assert min(scores) == 0
    assert max(scores) <= 100


RULES: list[tuple[str, str, dict[str, object]]] = [
    ("rule 1: high batch pressure", "int8", {"num_running": 2, "num_waiting": 2}),
    ("rule 2: shared prefix", "int4c", {"shared_prefix": True}),
    ("rule 3: memory pressure", "int4", {"memory_pressure": 0.9}),
    ("rule 5: reasoning task", "spec", {"task": "gsm8k"}),
    ("rule 6: multiple choice", "int8", {"task": "mmlu_pro"}),
    ("rule 6: multiple choice", "int8", {"task": "truthfulqa"}),
    ("rule 6: multiple choice", "int8", {"task": "gpqa"}),
    ("rule 6: multiple choice", "int8", {"task": "mlu"}),
    ("rule 6: multiple choice", "int8", {"task": "tam"}),
    ("rule 7: short prompt, short output", "spec", {"num_prompt_tokens": 384, "num_expected_tokens": 64}),
    ("rule 8: long output", "spec", {"task": "mt_bench"}),
    ("rule 8: long output", "spec", {"task": "alpacaeval_v2"}),
    ("rule 8: long output", "spec", {"num_expected_tokens": 128}),
    ("rule 9: prompt dominates", "int8", {"num_prompt_tokens": 768, "num_expected_tokens": 100}),
    ("rule 9: prompt dominates", "int8", {"num_prompt_tokens": 512, "num_expected_tokens": 8}),
    ("rule 10: default", "int8", {}),
    ("rule 10: default", "int8", {"num_prompt_tokens": 385, "num_expected_tokens": 64}),
    ("rule 10: default", "int8", {"num_prompt_tokens": 767, "num_expected_tokens": 127}),
]


@pytest.mark.parametrize(("label", "target", "changed"), RULES)
def test_each_rule_fires_for_its_features(label: str, target: str, changed: dict[str, object]) -> None:
    name, choice = choose(policy("rules"), features(**changed))
    assert (name, choice.reason, choice.propensity) == (target, label, 1.0)


def test_the_first_rule_that_matches_wins() -> None:
    """Features that match all rules at once, taken away one after another."""
    everything: dict[str, object] = {
        "num_running": 9,
        "shared_prefix": True,
        "memory_pressure": 0.95,
        "task": "gsm8k",
        "num_prompt_tokens": 100,
        "num_expected_tokens": 10,
    }
    fired = []
    for change in (
        {},
        {"num_running": 0},
        {"shared_prefix": False},
        {"memory_pressure": 0.0},
        {"task": "gpqa"},
        {"task": "mt_bench"},
        {"num_prompt_tokens": 500},
        {"task": None, "num_prompt_tokens": 900},
        {"num_prompt_tokens": 400, "num_expected_tokens": 60},
    ):
        everything |= change
        fired.append(choose(policy("rules"), features(**everything))[1].reason.split(":")[0])
    assert fired == [f"rule {n}" for n in (1, 2, 3, 5, 6, 7, 8, 9, 10)]


@pytest.mark.parametrize(
    ("threshold", "value", "changed", "before", "after"),
    [
        ("batch_pressure_high", 8, {"num_waiting": 7}, "rule 1", "rule 10"),
        ("memory_pressure", 0.5, {"memory_pressure": 0.6}, "rule 10", "rule 3"),
        ("short_prompt_tokens", 64, {"num_prompt_tokens": 100, "num_expected_tokens": 50}, "rule 7", "rule 10"),
        ("short_output_tokens", 8, {"num_prompt_tokens": 100, "num_expected_tokens": 50}, "rule 7", "rule 10"),
        ("long_output_tokens", 101, {"num_expected_tokens": 128, "num_prompt_tokens": 500}, "rule 8", "rule 8"),
        ("long_output_tokens", 200, {"num_expected_tokens": 128}, "rule 8", "rule 10"),
        ("long_prompt_tokens", 400, {"num_prompt_tokens": 500}, "rule 10", "rule 9"),
    ],
)
def test_thresholds_come_from_the_configuration(
    threshold: str, value: float, changed: dict[str, object], before: str, after: str
) -> None:
    saw = features(**changed)
    assert choose(policy("rules"), saw)[1].reason.split(":")[0] == before
    assert choose(policy("rules", rules={threshold: value}), saw)[1].reason.split(":")[0] == after


FULL = int(Mask.SLOTS)
DOWN = int(Mask.HEALTH)


@pytest.mark.parametrize(
    ("changed", "masks", "target"),
    [
        # rule 1: any 8-bit mode, else any quantised one, else anything
        ({"num_running": 4}, {"int8": FULL}, "int4"),
        ({"num_running": 4}, {"int8": DOWN, "int4": FULL, "int4c": FULL}, "plain"),
        # rule 2: INT4 with caching, else any that caches
        ({"shared_prefix": True}, {"int4c": FULL}, "cached"),
        ({"shared_prefix": True}, {"int4c": FULL, "cached": FULL}, "plain"),
        # rule 3: INT4, else any quantised
        ({"memory_pressure": 1.0}, {"int4": FULL, "int4c": DOWN}, "int8"),
        # rules 5 and 7: speculation, else anything
        ({"task": "gsm8k"}, {"spec": FULL}, "plain"),
        # rule 6 and 10: 8 bit, else quantised
        ({"task": "gpqa"}, {"int8": int(Mask.MEMORY)}, "int4"),
    ],
)
def test_rules_overflow_to_the_next_kind_instead_of_waiting(
    changed: dict[str, object], masks: dict[str, int], target: str
) -> None:
    name, choice = choose(policy("rules"), features(**changed), masks=masks)
    assert name == target
    assert choice.reason.endswith("; best kind full or absent")


def test_rules_wait_for_the_best_kind_when_all_are_full() -> None:
    masks = {m.name: FULL for m in FLEET}
    assert choose(policy("rules"), features(task="gsm8k"), masks=masks)[0] == "spec"
    masks["spec"] = DOWN
    name, choice = choose(policy("rules"), features(task="gsm8k"), masks=masks)
    assert name == "plain"
    assert choice.reason == "rule 5: reasoning task; all full, waits"


def test_rules_own_up_to_a_stand_in_where_the_box_lacks_the_kind() -> None:
    plain = (mode("a"), mode("b"))
    name, choice = choose(policy("rules", plain), features(task="gsm8k"), modes=plain)
    assert (name, choice.reason) == ("a", "rule 5: reasoning task; best kind full or absent")


@pytest.mark.parametrize("precision", get_args(Precision))
def test_rules_serve_with_any_single_mode(precision: Precision) -> None:
    only = (mode("only", precision),)
    for _, _, changed in RULES:
        assert choose(policy("rules", only), features(**changed), modes=only)[0] == "only"


def test_fp8_counts_as_eight_bit_and_ngram_as_speculation() -> None:
    fleet = (mode("plain"), mode("fp8", "fp8"), mode("ngram", speculation="ngram"))
    assert choose(policy("rules", fleet), features(task="gpqa"), modes=fleet)[0] == "fp8"
    assert choose(policy("rules", fleet), features(task="gsm8k"), modes=fleet)[0] == "ngram"

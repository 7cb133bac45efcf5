"""The simulated contest: fair by construction, repeatable, and its parts say what they claim."""

from __future__ import annotations

from collections import Counter

import pytest
from msgspec import structs

from msd.cli.compare import render
from msd.sim.contest import FIXED, JUDGED_LOADS, UNJUDGED, Contest, _at, _fits, _point, _verdicts
from msd.sim.contest_page import page
from msd.sim.match import Contestant, Match, Rules, config_of, play
from msd.sim.plan import FAMILIES, SHAPES, Bounds, idle_plan, make_plan
from msd.sim.truth import BY_NAME, CARDS, DRIFT, KV_BYTES_PER_TOKEN, MODES, OVERHEAD_GB

LOOSE = tuple(Bounds(ttft_ms=400.0, tpot_ms=40.0 if family.output_tokens > 1 else None) for family in FAMILIES)
PAIR = ("fp16", "int8_pc")


def fixed(mode: str) -> Contestant:
    return Contestant(name=mode, policy="fixed", modes=(mode,))


# --- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_a_plan_is_a_function_of_its_seed_and_has_the_rate_it_says(shape: str) -> None:
    plans = [make_plan(seed, shape, 8.0, 400.0) for seed in range(8)]  # type: ignore[arg-type]
    assert plans[3] == make_plan(3, shape, 8.0, 400.0)  # type: ignore[arg-type]
    assert len({plan.requests for plan in plans}) == len(plans)
    rate = sum(len(plan.requests) for plan in plans) / (8 * 400.0)
    assert rate == pytest.approx(8.0, rel=0.08)


def test_bursts_are_four_times_the_calm() -> None:
    counts = Counter(int(request.t_s) for request in make_plan(5, "bursts", 30.0, 600.0).requests)
    per_s = sorted(counts[second] for second in range(600))
    calm, burst = sum(per_s[:240]) / 240, sum(per_s[-240:]) / 240
    assert burst / calm == pytest.approx(4.0, rel=0.2)


def test_the_mix_flips() -> None:
    requests = make_plan(1, "flip", 20.0, 100.0).requests
    halves = [{FAMILIES[r.family].long for r in requests if int(r.t_s / 25) == i} for i in range(4)]
    assert halves == [{False}, {True}, {False}, {True}]


# --- truths ----------------------------------------------------------------------------------------------------------


def test_drift_is_bounded_hidden_and_the_same_for_all() -> None:
    for mode in MODES:
        drifted = [mode.drifted(seed) for seed in range(50)]
        ratios = [made.step_ms / mode.step_ms for made in drifted]
        assert all(1 - DRIFT <= ratio <= 1 + DRIFT for ratio in ratios)
        assert max(ratios) - min(ratios) > DRIFT
        assert drifted[7] == mode.drifted(7)
    # A cache changes no kernel.
    assert BY_NAME["int8"].drifted(4).step_ms == BY_NAME["int8_pc"].drifted(4).step_ms


def test_weight_only_int4_is_best_alone_and_int8_in_a_batch() -> None:
    """As measured: 7.0 against 10.8 ms alone; and prefill is INT8's."""

    def step_ms(name: str, batch: int) -> float:
        return BY_NAME[name].step_ms + batch * BY_NAME[name].decode_ms_per_request

    assert step_ms("int4", 1) < step_ms("int8", 1) < step_ms("fp16", 1)
    assert step_ms("int8", 32) < step_ms("fp16", 32) < step_ms("int4", 32)
    assert BY_NAME["int8"].prefill_ms_per_token < BY_NAME["fp16"].prefill_ms_per_token


def test_memory_is_shared_by_resident_modes_and_a_fixed_one_has_it_all() -> None:
    card = CARDS["40"]
    alone, beside = card.kv_tokens(("int8_pc",)), card.kv_tokens(("int8_pc", "int4_pc"))
    left_gb = 36.0 - 9.1 - OVERHEAD_GB
    assert alone == int(left_gb * 1e9 / KV_BYTES_PER_TOKEN)
    assert beside * 2 < alone
    assert not _fits(("fp16", "int8_pc", "int4_pc"), "40"), "the spec: not all three on 40 GB"
    assert _fits(("fp16", "int8_pc", "int4_pc"), "80")
    assert not _fits(("int8_pc", "int4_pc"), "80"), "no mode is certified for every family"


# --- matches ---------------------------------------------------------------------------------------------------------


def test_a_match_is_repeatable_and_breaks_no_invariant() -> None:
    plan = make_plan(9, "bursts", 5.0, 50.0)
    contestant = Contestant(name="cost", policy="cost", modes=PAIR)
    first, second = (play(contestant, plan, Rules(bounds=LOOSE), timeline=True) for _ in range(2))
    assert first == second
    assert not first.broken
    assert first.num_judged == sum(request.t_s >= 20.0 for request in plan.requests)
    assert first.num_answered == first.num_judged, "fp16 is certified for everything"
    assert first.num_good + first.late_ttft + first.late_tpot + first.num_refused == first.num_judged
    assert sum(good for good, _ in first.good_by_family.values()) == first.num_good == sum(first.goods)
    assert sum(sum(bucket.values()) for bucket in first.mix) == len(plan.requests)
    assert first.violations == 0


def test_a_fixed_mode_serves_only_what_it_is_certified_for() -> None:
    plan = idle_plan(1, num_each=2, gap_s=2.0)
    match = play(fixed("int8_pc"), plan, Rules(bounds=LOOSE, drifts=False, warm_up_s=0.0))
    assert match.num_refused == 2, "two of gpqa"
    assert match.good_by_family["gpqa"] == (0, 2)
    lax = play(fixed("int8_pc"), plan, Rules(bounds=LOOSE, drifts=False, judged=False, warm_up_s=0.0))
    assert lax.num_refused == 0
    assert lax.good_by_family["gpqa"] == (2, 2)


@pytest.mark.parametrize("name", ["fp16", "int8", "int4_pc"])
def test_idle_figures_are_the_truths_own(name: str) -> None:
    truth = BY_NAME[name]
    match = play(fixed(name), idle_plan(2, num_each=3), Rules(drifts=False, judged=False, warm_up_s=0.0))
    assert match.tpot_by_family_ms["short_long"] == pytest.approx(truth.step_ms + truth.decode_ms_per_request, rel=0.02)
    shared, alike = match.ttft_by_family_ms["shared_prefix"], match.ttft_by_family_ms["long_long"]
    assert (shared < 0.5 * alike) is truth.prefix_caching


def test_one_gpu_does_not_get_faster_by_a_second_engine() -> None:
    """No free lunch: flooded, two engines of the same truth finish no more than one."""
    plan = make_plan(3, "steady", 30.0, 30.0)
    alone = play(fixed("int8"), plan, Rules(judged=False, warm_up_s=0.0))
    both = play(
        Contestant(name="two", policy="least_loaded", modes=("int8", "int8_pc")),
        plan,
        Rules(judged=False, warm_up_s=0.0),
    )
    assert both.finished_per_s < 1.15 * alone.finished_per_s, "the second one has a prefix cache, no more"


def test_everybody_has_the_same_truths_and_none_is_told() -> None:
    one = config_of(Contestant(name="a", policy="cost", modes=PAIR), 5, Rules())
    other = config_of(Contestant(name="b", policy="rules", modes=PAIR), 5, Rules())
    assert one.engine == other.engine
    assert one.engine[0].sim.step_ms != BY_NAME["fp16"].step_ms


def test_a_curve_is_read_between_its_points() -> None:
    curve = [(1.0, 4.0), (2.0, 2.0), (4.0, 1.0)]
    assert [_at(curve, x) for x in (0.5, 1.5, 3.0, 9.0)] == [4.0, 3.0, 1.5, 1.0]


@pytest.fixture(scope="module")
def small() -> Contest:
    """A contest of one short match per contestant, shown at every load."""
    rules = Rules(bounds=LOOSE, warm_up_s=2.0)
    plan = make_plan(4, "bursts", 4.0, 24.0)
    entries = [
        (FIXED, fixed("int8_pc"), rules),
        (UNJUDGED, fixed("int8_pc"), structs.replace(rules, judged=False)),
        *(
            ("policy", Contestant(name=name, policy=name, modes=PAIR), rules)
            for name in ("cost", "rules", "least_loaded")
        ),
    ]
    matches = [play(contestant, plan, held, timeline=True) for _, contestant, held in entries]
    points = tuple(
        _point(kind, contestant, load, [match])
        for (kind, contestant, _), match in zip(entries, matches, strict=True)
        for load in JUDGED_LOADS
    )
    return Contest(
        card="80",
        best_fixed="int8_pc",
        capacity_per_s=6.0,
        bounds=LOOSE,
        capacities={"int8_pc": (12.0, 11.0)},
        rates={6.0: 4.0},
        sets={"cost": PAIR},
        seeds=(4,),
        duration_s=24.0,
        points=points,
        verdicts=tuple(_verdicts(points, "int8_pc")),
        timelines=(matches[0], matches[2]),
    )


def test_the_page_stands_alone_and_says_that_it_is_simulated(small: Contest) -> None:
    html = page(small)
    assert html.count("<svg") == 6
    assert html.count("simulated") >= 8
    assert all(outside not in html for outside in ("<script", "src=", "<link"))


def test_the_table_shows_the_whole_curve(small: Contest) -> None:
    text = "\n".join(render(small))
    assert "SIMULATED" in text
    assert all(f"{load:g}" in text for load in JUDGED_LOADS)
    assert text.count("fixed on int8_pc (quality ignored)") == 3


def test_the_bars_are_those_of_the_points(small: Contest) -> None:
    by_name = {verdict.name: verdict for verdict in small.verdicts}
    cost, best = (
        next(p for p in small.points if (p.kind, p.contestant) == key)
        for key in (("policy", "cost"), (FIXED, "int8_pc"))
    )
    verdict = by_name["goodput, cost / best fixed mode, best of the loads"]
    assert verdict.value == pytest.approx(cost.goodput_per_s / best.goodput_per_s)
    assert verdict.holds is (verdict.value >= 1.2)
    assert by_name["invariants of the daemon that broke"].holds
    assert by_name["answers of a mode that is not certified for them"].holds


def test_goodput_counts_only_judged_time() -> None:
    plan = make_plan(2, "steady", 3.0, 40.0)
    match: Match = play(fixed("fp16"), plan, Rules(bounds=LOOSE))
    assert match.goodput_per_s == match.num_good / 20.0
    late = structs.replace(plan, requests=tuple(r for r in plan.requests if r.t_s < 20.0))
    assert play(fixed("fp16"), late, Rules(bounds=LOOSE)).num_judged == 0

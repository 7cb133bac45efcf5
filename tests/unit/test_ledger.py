"""The ledger on known loads: where each millijoule goes, and that none is lost."""

from __future__ import annotations

import time

import pytest

from msd.config import EnergyConfig
from msd.core.apportion import apportion
from msd.core.energy_domain import Coefficients
from msd.core.idle_power import MIN_SAMPLES, IdleFacts, IdlePower
from msd.core.ledger import GIVE_UP_US, Accounts, Ledger
from msd.domain import CounterReading, Energy, EnergySource, GpuView
from tests.ledger_storm import Storm

MS = 1_000
S = 1_000_000
GPU = "gpu:0"


def reading(
    t_us: int,
    energy_mj: int,
    *,
    domain: str = GPU,
    epoch: int = 0,
    source: EnergySource = "counter",
    idle_w: float | None = 100.0,
    power_w: float | None = None,
    limit_w: float | None = None,
) -> CounterReading:
    return CounterReading(
        domain=domain,
        t_us=t_us,
        energy_mj=energy_mj,
        epoch=epoch,
        source=source,
        idle_w=idle_w,
        power_w=power_w,
        limit_w=limit_w,
    )


def make_ledger(**config: object) -> Ledger:
    return Ledger(EnergyConfig(**config), {"a": Coefficients(1000.0, 10.0, 100.0)})  # type: ignore[arg-type]


def only(ledger: Ledger) -> Accounts:
    (accounts,) = ledger.accounts()
    assert accounts.residue_mj == 0
    return accounts


def test_apportion_gives_the_missing_units_to_the_largest_remainders_and_then_to_the_smaller_id() -> None:
    assert apportion(10, [1, 1, 1], ["c", "b", "a"]) == [3, 3, 4]
    assert apportion(11, [1, 1, 1], ["c", "b", "a"]) == [3, 4, 4]
    assert apportion(5, [6, 3, 1], ["a", "b", "c"]) == [3, 2, 0]  # remainders 0, .5, .5: b before c
    assert apportion(7, [0, 0], ["a", "b"]) == [0, 0]
    assert apportion(0, [3, 4], ["a", "b"]) == [0, 0]
    assert apportion(5, [], []) == []


def test_nothing_runs_all_is_idle() -> None:
    ledger = make_ledger()
    ledger.counter(reading(0, 5_000))
    ledger.counter(reading(100 * MS, 15_000))
    accounts = only(ledger)
    assert (accounts.idle_mj, accounts.counter_mj) == (10_000, 10_000)


def test_one_request_gets_the_interval_static_and_dynamic() -> None:
    ledger = make_ledger()
    ledger.counter(reading(0, 0))
    ledger.started(0, "r", "a", 10)
    ledger.first_token(20 * MS, "r", 0)
    provisional = ledger.ended(100 * MS, "r", "requests", tenant="t", num_tokens=5)
    assert provisional is not None
    assert not provisional.settled
    [(request_id, energy)] = ledger.counter(reading(100 * MS, 30_000))
    assert request_id == "r"
    # 100 W idle over 100 ms = 10 J
    assert energy == Energy(energy_mj=30_000, dynamic_mj=20_000, static_mj=10_000, source="counter", settled=True)
    assert only(ledger).requests_mj == 30_000
    [booked] = ledger.booked(GPU)
    assert (booked.mode, booked.tenant, booked.energy_mj, booked.num_tokens) == ("a", "t", 30_000, 5)


def test_box_policy_keeps_static_energy_with_the_box() -> None:
    ledger = make_ledger(static_share="box")
    ledger.counter(reading(0, 0))
    ledger.started(0, "r", "a", 10)
    ledger.ended(100 * MS, "r", "requests", num_tokens=5)
    [(_, energy)] = ledger.counter(reading(100 * MS, 30_000))
    assert (energy.dynamic_mj, energy.static_mj) == (20_000, 0)
    assert only(ledger).idle_mj == 10_000


def test_an_interval_closes_only_when_the_counter_changes() -> None:
    ledger = make_ledger()
    ledger.counter(reading(0, 0))
    ledger.started(0, "r", "a", 10)
    ledger.ended(30 * MS, "r", "requests", num_tokens=2)
    assert ledger.counter(reading(50 * MS, 0)) == []
    assert only(ledger).counter_mj == 0
    [(_, energy)] = ledger.counter(reading(100 * MS, 40_000))
    assert energy.energy_mj == 40_000


def test_a_prefill_is_charged_to_the_intervals_it_took_though_known_later() -> None:
    """Late knowledge: both intervals wait for the first token of `slow`, then split."""
    ledger = make_ledger()
    ledger.counter(reading(0, 0, idle_w=0.0))
    ledger.started(0, "slow", "a", 1_000)
    assert ledger.counter(reading(100 * MS, 50_000, idle_w=0.0)) == []
    accounts = only(ledger)
    assert (accounts.open_mj, accounts.running_mj) == (50_000, 0)
    ledger.counter(reading(200 * MS, 60_000, idle_w=0.0))
    ledger.first_token(200 * MS, "slow", 0)
    ledger.counter(reading(200 * MS, 60_000, idle_w=0.0))
    assert only(ledger).running_mj == 60_000


def test_a_silent_request_does_not_hold_the_books_for_longer_than_five_seconds() -> None:
    ledger = make_ledger()
    ledger.counter(reading(0, 0))
    ledger.started(0, "r", "a", 1_000)
    ledger.counter(reading(1 * S, 200_000))
    ledger.counter(reading(5 * S, 1_000_000))
    assert only(ledger).running_mj == 0
    ledger.counter(reading(6 * S + 1, 1_200_000))
    accounts = only(ledger)
    assert (accounts.running_mj, accounts.open_mj) == (200_000, 1_000_000)


def test_weights_follow_prefill_decode_and_the_shared_step() -> None:
    """Two requests, same time; the one with a 200-token prompt beside one cached whole: 10 mJ a token more."""
    ledger = make_ledger()
    ledger.counter(reading(0, 0, idle_w=0.0))
    for request_id in ("x", "y"):
        ledger.started(0, request_id, "a", 200)
    ledger.first_token(50 * MS, "x", 0)
    ledger.first_token(50 * MS, "y", 200)
    for request_id in ("x", "y"):
        ledger.ended(100 * MS, request_id, "requests", num_tokens=6)
    # per request 6 steps shared by two = 3000, 5 decodes = 500; x computes 2000 of prefill
    energies = dict(ledger.counter(reading(100 * MS, 9_000, idle_w=0.0)))
    assert energies["x"].energy_mj == 5_500
    assert energies["y"].energy_mj == 3_500


def test_a_lost_attempt_is_wasted_and_not_in_the_figure_of_the_answer() -> None:
    ledger = make_ledger()
    ledger.counter(reading(0, 0))
    ledger.started(0, "r", "a", 10)
    ledger.ended(100 * MS, "r", "wasted", "restarted", num_tokens=3)
    ledger.started(100 * MS, "r", "a", 10)
    assert ledger.counter(reading(100 * MS, 50_000)) == []
    ledger.ended(200 * MS, "r", "requests", num_tokens=4)
    [(_, energy)] = ledger.counter(reading(200 * MS, 70_000))
    assert energy.energy_mj == 20_000
    accounts = only(ledger)
    assert (accounts.requests_mj, accounts.wasted_mj) == (20_000, {"restarted": 50_000})


def test_an_aborted_request_hears_of_its_energy_too() -> None:
    ledger = make_ledger()
    ledger.counter(reading(0, 0))
    ledger.started(0, "r", "a", 10)
    ledger.ended(100 * MS, "r", "wasted", "aborted")
    [(request_id, energy)] = ledger.counter(reading(100 * MS, 50_000))
    assert (request_id, energy.energy_mj) == ("r", 50_000)
    assert only(ledger).wasted_mj == {"aborted": 50_000}


def test_engine_start_is_wasted_as_warmup() -> None:
    ledger = make_ledger()
    ledger.counter(reading(0, 0))
    ledger.work_started(0, "engine:a", "a")
    ledger.counter(reading(100 * MS, 20_000))
    ledger.ended(150 * MS, "engine:a", "wasted", "warmup")
    assert ledger.counter(reading(200 * MS, 40_000)) == []
    assert only(ledger).wasted_mj == {"warmup": 40_000}


def test_no_counter_no_figure() -> None:
    ledger = make_ledger()
    ledger.started(0, "r", "a", 10)
    assert ledger.ended(100 * MS, "r", "requests", num_tokens=2) is None
    assert ledger.accounts() == ()


def test_a_counter_that_appears_late_charges_only_from_then_on() -> None:
    ledger = make_ledger()
    ledger.started(0, "r", "a", 10)
    ledger.first_token(10 * MS, "r", 0)
    ledger.counter(reading(50 * MS, 7_000))
    ledger.ended(100 * MS, "r", "requests", num_tokens=9)
    [(_, energy)] = ledger.counter(reading(100 * MS, 17_000))
    assert energy.energy_mj == 10_000


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_reset_is_bridged_from_the_power_at_both_ends_and_labelled(epoch: int) -> None:
    ledger = make_ledger()
    ledger.counter(reading(0, 1_000_000, power_w=200.0))
    ledger.started(0, "r", "a", 10)
    ledger.ended(100 * MS, "r", "requests", num_tokens=2)
    [(_, energy)] = ledger.counter(reading(100 * MS, 12, epoch=epoch, power_w=400.0))
    assert (energy.energy_mj, energy.source) == (30_000, "estimated")
    accounts = only(ledger)
    assert (accounts.counter_mj, accounts.estimated_mj) == (0, 30_000)
    ledger.counter(reading(200 * MS, 10_012, epoch=epoch, power_w=100.0))
    assert only(ledger).counter_mj == 10_000


def test_a_glitch_is_cut_at_twice_the_power_limit() -> None:
    ledger = make_ledger()
    ledger.counter(reading(0, 0))
    ledger.started(0, "r", "a", 10)
    ledger.ended(100 * MS, "r", "requests", num_tokens=2)
    [(_, energy)] = ledger.counter(reading(100 * MS, 10**9, limit_w=700.0))
    assert energy.energy_mj == 140_000
    assert only(ledger).unattributed_mj == {"glitch": 10**9 - 140_000}


def test_energy_above_idle_while_nothing_runs_is_foreign() -> None:
    ledger = make_ledger()
    ledger.counter(reading(0, 0))
    ledger.counter(reading(1 * S, 250_000))
    accounts = only(ledger)
    assert (accounts.idle_mj, accounts.unattributed_mj) == (100_000, {"foreign": 150_000})


def test_power_that_decays_after_load_is_not_taken_for_foreign() -> None:
    ledger = make_ledger()
    ledger.counter(reading(0, 0))
    ledger.started(0, "r", "a", 10)
    ledger.ended(1 * S, "r", "requests", num_tokens=2)
    ledger.counter(reading(1 * S, 300_000))
    ledger.counter(reading(2 * S, 500_000))
    assert only(ledger).idle_mj == 200_000


def test_a_stuck_counter_settles_exactly_when_it_moves() -> None:
    ledger = make_ledger()
    ledger.counter(reading(0, 0))
    ledger.started(0, "r", "a", 10)
    ledger.ended(1 * S, "r", "requests", num_tokens=2)
    for t in range(1, 10):
        assert ledger.counter(reading(t * S, 0)) == []
    [(_, energy)] = ledger.counter(reading(10 * S, 2_000_000))
    assert energy.energy_mj == 2_000_000
    assert ledger.expire(60 * S) == []


def test_a_dead_counter_gives_up_its_requests_and_owns_up_when_it_comes_back() -> None:
    ledger = make_ledger()
    ledger.counter(reading(0, 0, power_w=300.0))
    ledger.started(0, "r", "a", 10)
    ledger.ended(1 * S, "r", "requests", num_tokens=2)
    assert ledger.expire(1 * S + GIVE_UP_US - 1) == []
    [(request_id, energy)] = ledger.expire(1 * S + GIVE_UP_US)
    assert (request_id, energy.settled) == ("r", False)
    assert ledger.expire(90 * S) == []
    assert ledger.counter(reading(60 * S, 6_000_000)) == []
    accounts = only(ledger)
    assert accounts.unattributed_mj == {"stuck": 6_000_000}
    ledger.counter(reading(61 * S, 6_100_000))
    assert only(ledger).idle_mj == 100_000


def test_simulated_stays_simulated() -> None:
    ledger = make_ledger()
    ledger.counter(reading(0, 0, source="simulated"))
    ledger.started(0, "r", "a", 10)
    provisional = ledger.ended(100 * MS, "r", "requests", num_tokens=2)
    assert provisional is not None
    assert provisional.source == "simulated"
    [(_, energy)] = ledger.counter(reading(100 * MS, 100, source="simulated"))
    assert energy.source == "simulated"
    assert only(ledger).source == "simulated"
    with pytest.raises(AssertionError, match="simulated and real"):
        ledger.counter(reading(200 * MS, 200))


def test_domains_close_to_their_own_counter_and_a_request_means_the_gpu() -> None:
    ledger = make_ledger()
    ledger.counter(reading(0, 0, domain="cpu:package-0", idle_w=None))
    ledger.counter(reading(0, 0))
    ledger.started(0, "r", "a", 10)
    ledger.ended(100 * MS, "r", "requests", num_tokens=2)
    assert ledger.counter(reading(100 * MS, 9_000, domain="cpu:package-0", idle_w=None)) == []
    [(_, energy)] = ledger.counter(reading(100 * MS, 30_000))
    assert energy.energy_mj == 30_000
    assert {a.domain: (a.requests_mj, a.residue_mj) for a in ledger.accounts()} == {
        "cpu:package-0": (9_000, 0),
        GPU: (30_000, 0),
    }


def test_two_gpus_add_up() -> None:
    ledger = make_ledger()
    for domain in ("gpu:0", "gpu:1"):
        ledger.counter(reading(0, 0, domain=domain))
    ledger.started(0, "r", "a", 10)
    ledger.ended(100 * MS, "r", "requests", num_tokens=2)
    assert ledger.counter(reading(100 * MS, 30_000, domain="gpu:0")) == []
    [(_, energy)] = ledger.counter(reading(110 * MS, 20_000, domain="gpu:1"))
    assert energy.energy_mj == 50_000


def test_idle_power_is_the_low_percentile_of_calm_intervals_per_resident_set() -> None:
    idle = IdlePower(50_000)
    both, one = frozenset({"a", "b"}), frozenset({"a"})
    for watts in range(100, 100 + MIN_SAMPLES - 1):
        idle.observe(both, watts * 1_000, S)
    assert idle.facts(both, None) == IdleFacts(50_000, "configured")
    for watts in range(200, 216 - MIN_SAMPLES + 1):
        idle.observe(both, watts * 1_000, S, 7 * S)
    assert idle.current_mw(both, None) == 103_000
    assert idle.facts(both, None) == IdleFacts(103_000, "learnt", 105_000, 7 * S)
    assert idle.facts(both, 75.5).origin == "stated"
    assert IdlePower(0).facts(both, None).origin == "unknown"
    assert idle.current_mw(one, None) == 50_000
    assert idle.current_mw(both, 75.5) == 75_500


def test_idle_power_is_learnt_from_the_counter_and_used() -> None:
    ledger = make_ledger()
    energy_mj = 0
    ledger.counter(reading(0, 0, idle_w=None))
    for second in range(1, MIN_SAMPLES + 2):
        energy_mj += 80_000
        ledger.counter(reading(second * S, energy_mj, idle_w=None))
    start = (MIN_SAMPLES + 1) * S
    ledger.started(start, "r", "a", 10)
    ledger.ended(start + S, "r", "requests", num_tokens=2)
    [(_, energy)] = ledger.counter(reading(start + S, energy_mj + 100_000, idle_w=None))
    assert (energy.static_mj, energy.dynamic_mj) == (80_000, 20_000)


def test_closing_an_interval_with_64_requests_is_quick() -> None:
    """The bar is 100 us p99 (make bench-energy); here the median, with room for a busy machine."""
    ledger = make_ledger()
    ledger.counter(reading(0, 0))
    for i in range(64):
        ledger.started(0, f"r{i:03}", "a", 100)
        ledger.first_token(5 * MS, f"r{i:03}", 0)
    costs = []
    for step in range(1, 301):
        t = step * 50 * MS
        for i in range(64):
            ledger.progress(t, f"r{i:03}", step * 3 + i % 5)
        before = time.perf_counter_ns()
        ledger.counter(reading(t, step * 17_777))
        costs.append(time.perf_counter_ns() - before)
    assert only(ledger).running_mj == 300 * 17_777
    assert sorted(costs)[150] < 300_000
    print(f"interval close, 64 active: median {sorted(costs)[150] / 1e3:.0f} us, p99 {sorted(costs)[297] / 1e3:.0f} us")


# --- what intervals teach --------------------------------------------------------------------------------------------


def serve(ledger: Ledger, start_us: int, energy_mj: int, **fields: float) -> None:
    """One request for 100 ms, whose interval takes so much above the idle 100 W."""
    request_id = f"r{start_us}"
    ledger.started(start_us, request_id, "a", 10)
    ledger.first_token(start_us + 20 * MS, request_id, 0)
    ledger.ended(start_us + 100 * MS, request_id, "requests", num_tokens=5)
    ledger.counter(reading(start_us + 100 * MS, energy_mj, **fields))  # type: ignore[arg-type]


def test_an_interval_is_one_equation_of_steps_prompt_tokens_and_positions() -> None:
    ledger = make_ledger()
    ledger.counter(reading(0, 0))
    for request_id, num_tokens in (("x", 5), ("y", 5)):
        ledger.started(0, request_id, "a", 100)
        ledger.first_token(20 * MS, request_id, 40)
        ledger.ended(100 * MS, request_id, "requests", num_tokens=num_tokens)
    ledger.counter(reading(100 * MS, 25_000))
    [equation] = ledger.take_equations()
    assert (equation.t_us, equation.energy_mj) == (100 * MS, 15_000)
    # Two requests in the same five steps: one prefill of 60 tokens each, four decode positions each.
    assert equation.terms == (("a", 5.0, 120.0, 8.0),)
    assert ledger.take_equations() == []


def test_steps_are_counted_over_the_time_in_which_any_ran() -> None:
    ledger = make_ledger()
    ledger.counter(reading(0, 0))
    for i, start_ms in enumerate((0, 60)):  # one after the other, never together: ten steps
        ledger.started(start_ms * MS, f"r{i}", "a", 0)
        ledger.first_token((start_ms + 10) * MS, f"r{i}", 0)
        ledger.ended((start_ms + 40) * MS, f"r{i}", "requests", num_tokens=5)
    ledger.counter(reading(100 * MS, 25_000))
    [equation] = ledger.take_equations()
    assert equation.terms[0][1] == pytest.approx(10.0)


def test_nothing_is_learnt_from_estimates_glitches_engine_starts_or_with_the_idle_power_unknown() -> None:
    ledger = make_ledger()
    ledger.counter(reading(0, 50_000, power_w=300.0))
    serve(ledger, 0, 10, power_w=300.0)  # a reset: estimated
    serve(ledger, 100 * MS, 10**9, limit_w=700.0)  # a glitch
    ledger.work_started(200 * MS, "start", "b")
    serve(ledger, 200 * MS, 10**9 + 30_000)
    ledger.ended(300 * MS, "start", "wasted", "warmup")
    serve(ledger, 300 * MS, 10**9 + 60_000, idle_w=None)  # type: ignore[arg-type]
    assert ledger.take_equations() == []
    serve(ledger, 400 * MS, 10**9 + 90_000)
    assert len(ledger.take_equations()) == 1
    assert only(ledger).requests_mj > 0


def test_throttled_intervals_are_charged_and_not_learnt_from() -> None:
    ledger = make_ledger()
    ledger.counter(reading(0, 0))
    ledger.viewed(GpuView(t_us=0, throttle_reasons=("idle",)))
    serve(ledger, 0, 30_000)
    assert len(ledger.take_equations()) == 1
    ledger.viewed(GpuView(t_us=100 * MS, throttle_reasons=("power_cap", "0x1000")))
    serve(ledger, 100 * MS, 60_000)
    ledger.viewed(GpuView(t_us=1_100 * MS, throttle_reasons=()))
    serve(ledger, 1_000 * MS, 600_000)
    assert ledger.take_equations() == []
    assert ledger.throttled_us == {"power_cap": 1 * S}
    serve(ledger, 2_200 * MS, 900_000)
    assert len(ledger.take_equations()) == 1
    assert only(ledger).residue_mj == 0


def test_equations_carry_the_band_of_the_clock() -> None:
    ledger = make_ledger()
    ledger.counter(reading(0, 0))
    ledger.viewed(GpuView(t_us=0, sm_clock_mhz=1_980))
    serve(ledger, 0, 30_000)
    ledger.viewed(GpuView(t_us=100 * MS, sm_clock_mhz=1_410))
    serve(ledger, 100 * MS, 60_000)
    assert [equation.clock_band for equation in ledger.take_equations()] == [6, 4]


def test_fitted_coefficients_split_the_intervals_from_then_on() -> None:
    shares = []
    for costs in (None, {"b": Coefficients(500.0, 5.0, 50.0)}):
        ledger = Ledger(
            EnergyConfig(), {"a": Coefficients(1000.0, 10.0, 100.0), "b": Coefficients(1000.0, 10.0, 100.0)}
        )
        ledger.counter(reading(0, 0, idle_w=0.0))
        if costs is not None:
            ledger.fitted(costs)
        for mode in ("a", "b"):
            ledger.started(0, mode, mode, 100)
            ledger.ended(100 * MS, mode, "requests", num_tokens=5)
        energies = dict(ledger.counter(reading(100 * MS, 30_000, idle_w=0.0)))
        shares.append(energies["a"].dynamic_mj / energies["b"].dynamic_mj)
    assert shares == [1.0, 2.0]


def test_estimated_energy_is_a_column_of_its_own_in_every_account() -> None:
    ledger = make_ledger()
    ledger.counter(reading(0, 1_000, power_w=200.0, source="estimated"))
    serve(ledger, 0, 31_000, source="estimated")  # type: ignore[arg-type]
    ledger.counter(reading(200 * MS, 41_000, source="estimated"))
    ledger.started(200 * MS, "late", "a", 10)
    ledger.counter(reading(300 * MS, 61_000, source="estimated"))
    accounts = only(ledger)
    assert accounts.estimated_of == {"requests": 30_000, "idle": 10_000, "open": 20_000}
    assert accounts.estimated_mj == 60_000
    [booked] = ledger.booked(GPU)
    assert (booked.energy_mj, booked.estimated_mj, booked.static_mj) == (30_000, 30_000, 10_000)


def test_a_counter_in_steps_shorter_than_its_readings_does_not_lower_the_idle_power() -> None:
    """Steps of 20 ms read every 50 ms show 40 and 60 ms of energy in turn: samples of a second see through it."""
    ledger = make_ledger()
    for t in range(0, 12_000, 50):
        ledger.counter(reading(t * MS, (t // 20) * 20 * 80, idle_w=None))
    assert only(ledger).idle_w == pytest.approx(80.0, rel=0.03)
    assert only(ledger).idle.origin == "learnt"


def test_a_storm_of_faults_closes() -> None:
    """The short form of `make bench-energy`, which runs 1,000,000 intervals."""
    storm = Storm(1)
    storm.run(10_000)
    assert storm.num_resets
    assert storm.num_restarts
    assert storm.num_glitches
    assert storm.residue_mj() == 0

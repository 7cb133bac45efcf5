"""The router: what a candidate says, which masks hold, and what is recorded."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import msgspec
import pytest

from msd.core.energy_domain import Coefficients
from msd.core.entry import Entry
from msd.core.estimator import Fit
from msd.core.features import Arrivals, extract
from msd.core.fleet import Fleet
from msd.core.router import Router
from msd.domain import (
    Candidate,
    Choice,
    Decision,
    EngineInfo,
    EngineLoad,
    Features,
    GpuView,
    Mask,
    Mode,
    Observation,
    Request,
)


class Pick:
    """A policy that takes the arm it is told, and keeps what it was shown."""

    name = "pick"

    def __init__(self, arm: int) -> None:
        self.arm = arm
        self.shown: list[Sequence[Candidate]] = []

    def choose(self, features: Features, candidates: Sequence[Candidate], rng: Random) -> Choice:
        self.shown.append(candidates)
        return Choice(self.arm, 0.25, "told so")

    def update(self, decision: Decision, observation: Observation) -> None: ...

    def dump(self) -> dict[str, object]:
        return {}

    def load(self, state: dict[str, object]) -> None: ...


def make_fleet(*, up: Sequence[bool] = (True, True), slots: int = 2, context: int = 1_000, kv: int = 500) -> Fleet:
    modes = [(Mode(name=f"m{i}", engine=f"m{i}", model="toy"), slots, None) for i in range(len(up))]
    fleet = Fleet(modes)
    for i, is_up in enumerate(up):
        if is_up:
            fleet.engine_up(
                EngineInfo(
                    engine=f"m{i}",
                    max_model_len=context,
                    max_num_seqs=slots,
                    kv_capacity_tokens=kv,
                    idle_ttft_ms=10.0 * (i + 1),
                    idle_tpot_ms=2.0,
                )
            )
    return fleet


def make_entry(
    fleet: Fleet, *, prompt: int = 100, expected: int = 11, static: Sequence[int] = (), **more: str | int
) -> Entry:
    known: dict[str, object] = {
        "request_id": "r",
        "client_request_id": "r",
        "tenant": "t",
        "content_hash": b"",
        "received_us": 0,
        "num_prompt_tokens": prompt,
        "max_tokens": 20,
    }
    request = Request(**{**known, **more})  # type: ignore[arg-type]
    masks = tuple(static) or (0,) * len(fleet.books)
    entry = Entry(request, masks, sum(1 << i for i, mask in enumerate(masks) if not mask))
    entry.expected_tokens = entry.expected_p90_tokens = expected
    return entry


def run(fleet: Fleet, arm: int, entry: Entry, *, t_us: int = 0, e2el_ms: float = 100.0) -> None:
    """Dispatch an entry as the scheduler does."""
    entry.parked = arm
    entry.reserved_tokens = entry.request.num_prompt_tokens + entry.expected_p90_tokens
    fleet.dispatched(arm, entry, t_us, e2el_ms)


def candidates_of(fleet: Fleet, entry: Entry, t_us: int = 0) -> list[Candidate]:
    return Router(fleet, Pick(0), Random(1)).candidates(entry, extract(entry, t_us, fleet, 0, 1.0, None))


def masks_of(fleet: Fleet, entry: Entry, t_us: int = 0) -> list[int]:
    return [candidate.mask for candidate in candidates_of(fleet, entry, t_us)]


def test_a_candidate_carries_its_predictions() -> None:
    fleet = make_fleet()
    fleet.books[1].estimate.mj_per_token = 3.0
    fleet.books[0].estimate.ttft = Fit(10.0, 50.0, 100.0)
    fleet.books[0].estimate.tpot = Fit(2.0, 0.5)
    for book in fleet.books:
        book.stale = True
    first, second = candidates_of(fleet, make_entry(fleet))
    assert (first.mode, first.mask, first.num_running, first.num_free_slots) == ("m0", 0, 0, 2)
    assert first.ttft_ms == pytest.approx(10.0 + 50.0 * 0.1 + 100.0 * 0.01)
    assert first.tpot_ms == pytest.approx(2.0)
    assert first.e2el_ms == pytest.approx(16.0 + 2.0 * 10)
    assert (first.queue_ms, first.delay_ms, first.energy_mj) == (0.0, 0.0, None)
    assert second.energy_mj == 3 * 111


def test_a_busy_mode_is_slower_and_its_neighbours_are_delayed() -> None:
    """One runs with 10 tokens left of 2.5 ms each; a newcomer of 11 tokens adds 0.5 ms to each, and its prompt."""
    fleet = make_fleet()
    estimate = fleet.books[0].estimate
    estimate.ttft, estimate.tpot = Fit(10.0, 50.0), Fit(2.0, 0.5)
    beside = make_entry(fleet, request_id="a")
    run(fleet, 0, beside, e2el_ms=25.0)
    candidate = candidates_of(fleet, make_entry(fleet))[0]
    assert candidate.tpot_ms == pytest.approx(2.5)
    unread_ms = 50.0 * 0.1
    assert candidate.ttft_ms == pytest.approx(10.0 + 50.0 * 0.1 + unread_ms + 0.5 * 2.5 + 0.5)
    assert candidate.delay_ms == pytest.approx(50.0 * 0.1 + 0.5 * 10)
    fleet.first_token(beside, 0)
    assert candidates_of(fleet, make_entry(fleet))[0].ttft_ms == pytest.approx(candidate.ttft_ms - unread_ms)


def test_waking_a_second_engine_slows_the_first_by_what_sharing_costs() -> None:
    """m1 beside m0: both at 1 / 1.5 of their speed, until m1's request is done or what runs on m0 is."""
    fleet = make_fleet()
    for _ in range(200):
        fleet.sharing.learn(1.0, 1.5)
    run(fleet, 0, make_entry(fleet, request_id="a"), e2el_ms=1_000.0)
    beside = candidates_of(fleet, make_entry(fleet))[1]
    assert beside.ttft_ms == pytest.approx(1.5 * 20.0, rel=1e-4)
    assert beside.e2el_ms == pytest.approx(1.5 * (20.0 + 2.0 * 10), rel=1e-4)
    assert beside.delay_ms == pytest.approx(60.0 / 3, rel=1e-4)
    nearly_done = candidates_of(fleet, make_entry(fleet, received_us=990_000), t_us=990_000)[1]
    assert nearly_done.delay_ms == pytest.approx(10.0 / 2, rel=1e-4)


def test_cached_tokens_need_no_reading() -> None:
    fleet = make_fleet()
    for book in fleet.books:
        book.estimate.ttft = Fit(10.0, 50.0)
        book.estimate.mj_per_token = 3.0
        book.stale = True
    entry = make_entry(fleet)
    entry.cached_tokens = (0, 80)
    cold, warm = candidates_of(fleet, entry)
    assert (cold.num_cached_tokens, warm.num_cached_tokens) == (0, 80)
    assert (cold.ttft_ms, warm.ttft_ms) == pytest.approx((15.0, 11.0))
    assert (cold.energy_mj, warm.energy_mj) == (3 * 111, 3 * 31)


def test_fitted_energy_is_marginal_a_step_is_shared() -> None:
    fleet = make_fleet()
    fleet.fitted({"m0": Coefficients(2_000.0, 10.0, 95.0), "unknown": Coefficients()})
    assert candidates_of(fleet, make_entry(fleet))[0].energy_mj == 10 * 100 + (2_000 + 95) * 11
    run(fleet, 0, make_entry(fleet, request_id="a"))
    alone_no_more, never_fitted = candidates_of(fleet, make_entry(fleet))
    assert alone_no_more.energy_mj == 10 * 100 + (1_000 + 95) * 11
    assert never_fitted.energy_mj is None


def test_an_answer_that_ends_by_itself_needs_one_more_step() -> None:
    fleet = make_fleet()
    fleet.books[0].estimate.eos_step_ms = 7.0
    fleet.books[0].stale = True
    ends = candidates_of(fleet, make_entry(fleet))[0].e2el_ms
    assert ends == pytest.approx(10.0 + 2.0 * 10 + 7.0)
    assert candidates_of(fleet, make_entry(fleet, ignore_eos=True))[0].e2el_ms == pytest.approx(30.0)
    assert candidates_of(fleet, make_entry(fleet, expected=20))[0].e2el_ms == pytest.approx(10.0 + 2.0 * 19)


def test_corrections_are_applied_by_size_of_prompt_and_batch() -> None:
    fleet = make_fleet()
    estimate = fleet.books[0].estimate
    estimate.ttft_cells.rows[0][1], estimate.tpot_cells.rows[0][1] = 2.0, 3.0
    candidate = candidates_of(fleet, make_entry(fleet))[0]
    assert (candidate.ttft_ms, candidate.tpot_ms) == pytest.approx((20.0, 6.0))
    assert candidates_of(fleet, make_entry(fleet, prompt=200))[0].ttft_ms == pytest.approx(10.0)


def test_what_is_folded_follows_the_books() -> None:
    """The loop reads folded figures; after any change they must be the estimator's own."""
    fleet = make_fleet(slots=4)
    estimate = fleet.books[0].estimate
    rng = Random(1)
    entries = []
    for i in range(2):
        entry = make_entry(fleet, request_id=f"r{i}", prompt=rng.randint(10, 300))
        run(fleet, 0, entry, t_us=i)
        entries.append(entry)
        estimate.ttft.learn(rng.random(), 0.1, 20.0)
        estimate.tpot.learn(rng.random(), 0.1, 3.0)
        fleet.books[0].stale = True
        running = fleet.books[0].running
        candidate = candidates_of(fleet, make_entry(fleet, prompt=321))[0]
        expected_ms = estimate.ttft.at((321 + running.unread_tokens) * 0.001, 321 * 321 * 1e-6)
        assert candidate.ttft_ms == pytest.approx(expected_ms + estimate.offset_ms(i + 1, running.num_tokens))
        assert candidate.tpot_ms == pytest.approx(estimate.tpot_ms(i + 1, running.num_tokens))
    for entry in entries:
        fleet.vacated(entry, 10)
    assert candidates_of(fleet, make_entry(fleet))[0].tpot_ms == pytest.approx(estimate.tpot_ms(0))


def test_static_masks_are_kept() -> None:
    fleet = make_fleet()
    assert masks_of(fleet, make_entry(fleet, static=(int(Mask.MODEL | Mask.QUALITY), 0))) == [9, 0]


def test_what_is_down_is_masked_whatever_else() -> None:
    fleet = make_fleet(up=(True, False))
    candidate = candidates_of(fleet, make_entry(fleet))[1]
    assert (candidate.mask, candidate.num_free_slots) == (Mask.HEALTH, 0)


@pytest.mark.parametrize(("prompt", "mask"), [(979, 0), (980, 0), (981, Mask.CONTEXT)])
def test_context_mask(prompt: int, mask: int) -> None:
    fleet = make_fleet(context=1_000, kv=10_000)
    assert masks_of(fleet, make_entry(fleet, prompt=prompt)) == [mask, mask]


@pytest.mark.parametrize(("reserved", "mask"), [(388, 0), (389, 0), (390, Mask.MEMORY)])
def test_memory_mask_counts_prompt_and_expected_output(reserved: int, mask: int) -> None:
    fleet = make_fleet(kv=500)
    fleet.occupy(0, reserved)
    assert masks_of(fleet, make_entry(fleet)) == [mask, 0]


def test_an_idle_mode_is_never_masked_for_memory() -> None:
    fleet = make_fleet(kv=10)
    assert masks_of(fleet, make_entry(fleet)) == [0, 0]


def test_a_full_mode_costs_the_wait_until_enough_have_ended() -> None:
    fleet = make_fleet(slots=2)
    fleet.books[0].estimate.service_ms = 80.0
    run(fleet, 0, make_entry(fleet, request_id="a"), e2el_ms=50.0)
    assert candidates_of(fleet, make_entry(fleet))[0].queue_ms == 0.0
    run(fleet, 0, make_entry(fleet, request_id="b"), e2el_ms=30.0)
    full = candidates_of(fleet, make_entry(fleet))[0]
    assert (full.mask, full.queue_ms) == (Mask.SLOTS, 30.0)
    assert full.ttft_ms > 30.0
    assert full.e2el_ms == pytest.approx(full.ttft_ms + full.tpot_ms * 10)
    assert candidates_of(fleet, make_entry(fleet), t_us=20_000)[0].queue_ms == pytest.approx(10.0)
    for queue_ms in (50.0, 30.0 + 80.0, 50.0 + 80.0):
        fleet.park(0)
        assert candidates_of(fleet, make_entry(fleet))[0].queue_ms == pytest.approx(queue_ms)


def test_the_wait_for_what_is_overdue_goes_by_the_mean_service() -> None:
    fleet = make_fleet(slots=2)
    fleet.books[0].estimate.service_ms = 80.0
    for name in "ab":
        run(fleet, 0, make_entry(fleet, request_id=name), e2el_ms=30.0)
    assert candidates_of(fleet, make_entry(fleet), t_us=40_000)[0].queue_ms == pytest.approx(0.5 * 80.0 / 2)


def test_what_is_long_overdue_is_expected_to_take_as_long_again() -> None:
    fleet = make_fleet(slots=1)
    fleet.books[0].estimate.service_ms = 80.0
    run(fleet, 0, make_entry(fleet), e2el_ms=30.0)
    assert candidates_of(fleet, make_entry(fleet), t_us=9_030_000)[0].queue_ms == pytest.approx(9_000.0)


def test_progress_moves_the_predicted_ends() -> None:
    """Of 11 expected tokens 6 are there: 5 more at 2 ms. Who is past them is taken to need half as many again."""
    fleet = make_fleet(slots=2)
    for name in "ab":
        run(fleet, 0, make_entry(fleet, request_id=name), e2el_ms=1_000.0)
    fleet.stepped(100_000, "m0", EngineLoad(), (("a", 6), ("b", 12), ("unknown", 3)))
    running = fleet.books[0].running
    assert running.ends == [110_000, 112_000]
    assert fleet.end_us == running.end_us == sum(running.ends)
    assert candidates_of(fleet, make_entry(fleet), t_us=100_000)[0].queue_ms == pytest.approx(10.0)


def test_books_of_what_runs_come_back_to_nothing() -> None:
    rng = Random(3)
    fleet = make_fleet(slots=9)
    entries = [make_entry(fleet, request_id=f"r{i}", prompt=rng.randint(1, 900)) for i in range(12)]
    for i, entry in enumerate(entries):
        run(fleet, i % 2, entry, t_us=i * 1_000, e2el_ms=rng.uniform(1.0, 90.0))
        if i % 3:
            fleet.first_token(entry, i * 1_000 + 500)
    assert (fleet.num_busy, fleet.num_running) == (2, 12)
    rng.shuffle(entries)
    for i, entry in enumerate(entries):
        fleet.vacated(entry, 20_000 + i)
    assert (fleet.num_busy, fleet.num_running, fleet.end_us) == (0, 0, 0)
    for book in fleet.books:
        running = book.running
        assert (running.num, running.num_tokens, running.unread_tokens, running.ends) == (0, 0, 0, [])


def test_averages_are_of_the_time_from_the_first_token_to_the_end() -> None:
    """Beside it on its engine: one for half of the time, with 100 + 5 tokens; another engine busy for a quarter."""
    fleet = make_fleet(slots=4)
    entry, beside, elsewhere = (make_entry(fleet, request_id=name) for name in "abc")
    run(fleet, 0, entry, t_us=0)
    fleet.first_token(entry, 1_000)
    run(fleet, 0, beside, t_us=3_000)
    fleet.first_token(beside, 4_000)
    run(fleet, 1, elsewhere, t_us=4_000)
    fleet.vacated(elsewhere, 5_000)
    fleet.vacated(entry, 5_000)
    assert entry.averages == pytest.approx((0.5, 52.5, 100, 0.25))
    assert elsewhere.averages is None


def test_deadline_mask_is_for_the_last_token_at_the_present_moment() -> None:
    """m0 needs 30 ms and m1 40 ms to the last of 11 tokens."""
    fleet = make_fleet()
    entry = make_entry(fleet, deadline_us=45_000)
    assert masks_of(fleet, entry, t_us=0) == [0, 0]
    assert masks_of(fleet, entry, t_us=10_000) == [0, Mask.DEADLINE]


def test_when_the_deadline_alone_masks_all_it_is_lifted() -> None:
    fleet = make_fleet(up=(True, True, False))
    entry = make_entry(fleet, deadline_us=45_000, static=(0, int(Mask.QUALITY), 0))
    assert masks_of(fleet, entry, t_us=40_000) == [0, Mask.QUALITY, Mask.HEALTH]


def test_a_deadline_is_not_lifted_for_the_sake_of_a_mode_that_is_masked_anyway() -> None:
    fleet = make_fleet()
    entry = make_entry(fleet, deadline_us=35_000, static=(0, int(Mask.QUALITY)))
    assert masks_of(fleet, entry) == [0, Mask.QUALITY | Mask.DEADLINE]


def test_a_full_mode_in_time_counts_as_in_time() -> None:
    fleet = make_fleet(slots=1)
    fleet.occupy(0, 1)
    assert masks_of(fleet, make_entry(fleet, deadline_us=35_000)) == [Mask.SLOTS, Mask.DEADLINE]


# --- choosing --------------------------------------------------------------------------------------------------------


def chosen(fleet: Fleet, entry: Entry, policy: Pick, hint: str | None = None) -> Choice | None:
    router = Router(fleet, policy, Random(1))
    features = extract(entry, 0, fleet, 0, 1.0, None)
    return router.choose(features, router.candidates(entry, features), hint)


def test_nothing_to_choose_when_all_are_masked() -> None:
    fleet = make_fleet(up=(False, False))
    policy = Pick(0)
    assert chosen(fleet, make_entry(fleet), policy) is None
    assert not policy.shown


def test_the_policy_sees_all_modes_in_order() -> None:
    fleet = make_fleet(up=(True, False))
    policy = Pick(0)
    assert chosen(fleet, make_entry(fleet), policy) == Choice(0, 0.25, "told so")
    assert [[candidate.mode for candidate in shown] for shown in policy.shown] == [["m0", "m1"]]


@pytest.mark.parametrize(("hint", "arm"), [("m1", 1), ("m0", 0), ("nonesuch", 0), (None, 0)])
def test_a_hint_goes_before_the_policy(hint: str | None, arm: int) -> None:
    fleet = make_fleet()
    choice = chosen(fleet, make_entry(fleet), Pick(0), hint)
    assert choice is not None
    assert choice.arm == arm


def test_a_hint_that_cannot_be_had_now_leaves_the_choice_to_the_policy() -> None:
    fleet = make_fleet(slots=1)
    fleet.occupy(1, 1)
    choice = chosen(fleet, make_entry(fleet), Pick(0), "m1")
    assert choice is not None
    assert (choice.arm, choice.reason) == (0, "told so")


@pytest.mark.parametrize("arm", [1, -1])
def test_a_policy_that_breaks_its_law_is_a_programmers_error(arm: int) -> None:
    fleet = make_fleet(up=(True, False))
    with pytest.raises(AssertionError, match=r"pick (chose a masked mode|lets a request wait)"):
        chosen(fleet, make_entry(fleet), Pick(arm))


def test_a_decision_can_be_explained() -> None:
    fleet = make_fleet()
    entry = make_entry(fleet)
    entry.attempt = 2
    router = Router(fleet, Pick(1), Random(1))
    view = GpuView(t_us=500)
    features = extract(entry, 1_500, fleet, 7, 0.5, view)
    candidates = router.candidates(entry, features)
    decision = router.decide(entry, 1_500, features, candidates, Choice(1, 0.25, "told so"), view)
    assert (decision.decision_id, decision.request_id, decision.attempt) == ("r.3", "r", 3)
    assert (decision.mode, decision.engine, decision.policy) == ("m1", "m1", "pick")
    assert (decision.reason, decision.propensity, decision.view) == ("told so", 0.25, view)
    assert decision.candidates == tuple(candidates)
    assert (decision.features.view_age_us, decision.features.num_waiting) == (1_000, 7)


# --- features --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("named", "shared"), [("task", False), ("prefix_id", True), ("session_id", True)])
def test_a_shared_prefix_is_what_the_producer_names(named: str, shared: bool) -> None:
    fleet = make_fleet()
    entry = make_entry(fleet)
    entry.request = msgspec.structs.replace(entry.request, **{named: "x"})
    assert extract(entry, 0, fleet, 0, 1.0, None).shared_prefix is shared


def test_time_in_features_is_from_now() -> None:
    fleet = make_fleet()
    entry = make_entry(fleet, received_us=100, deadline_us=5_000)
    seen = extract(entry, 1_100, fleet, 0, 1.0, None)
    assert (seen.waited_us, seen.slack_us, seen.view_age_us) == (1_000, 3_900, None)
    assert extract(make_entry(fleet), 0, fleet, 0, 1.0, None).slack_us is None


def test_arrival_cv_tells_steady_poisson_and_bursts_apart() -> None:
    def cv(gaps: list[float]) -> float:
        arrivals, t_us = Arrivals(), 0
        assert arrivals.cv == 0.0
        seen = []
        for gap in gaps:
            t_us += int(gap * 1_000)
            arrivals.note(t_us)
            seen.append(arrivals.cv)
        return sum(seen[-2_000:]) / min(len(seen), 2_000)

    rng = Random(2)
    assert cv([10.0] * 4_000) < 0.1
    assert cv([rng.expovariate(0.1) for _ in range(4_000)]) == pytest.approx(1.0, abs=0.2)
    assert cv([rng.choice((0.1, 0.1, 0.1, 0.1, 100.0)) for _ in range(4_000)]) > 1.4

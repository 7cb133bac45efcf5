"""Requests that let others go first: the queue, the scheduler, and whom a candidate says that it harms."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest

from msd.core import events as e
from msd.core.entry import YIELDING, Entry, Phase
from msd.core.estimator import Fit
from msd.core.features import extract
from msd.core.fleet import Fleet
from msd.core.queue import FairQueue
from msd.core.router import Router
from msd.domain import YIELD, Candidate, Choice, EngineInfo, EngineLoad, Features, Mode, Request, Slo
from msd.policy.fixed import Fixed
from tests.unit.core_world import CoreWorld, make_config

ALL = 0b11


class Says(Fixed):
    """A policy whose answers the test gives, by prompt length; else its configured mode."""

    def __init__(self, answers: dict[int, int]) -> None:
        self.answers = answers
        self.asked: list[int] = []

    def choose(self, features: Features, candidates: Sequence[Candidate], rng: Random) -> Choice:
        self.asked.append(features.num_prompt_tokens)
        arm = self.answers.get(features.num_prompt_tokens, 0)
        if arm == YIELD and not features.num_running:
            arm = 0
        return Choice(arm, 1.0, "said")


def world_of(answers: dict[int, int], *, slots: int = 4) -> tuple[CoreWorld, Says]:
    world = CoreWorld(make_config(modes=1, slots=slots))
    policy = Says(answers)
    world.scheduler._router.policy = policy
    return world, policy


# --- the queue -------------------------------------------------------------------------------------------------------


def test_who_yields_is_taken_only_by_calls_that_ask_for_it() -> None:
    queue = FairQueue({}, {})
    entries = []
    for seq, parked in enumerate((YIELDING, -1, YIELDING), start=1):
        request = Request(
            request_id=f"r{seq}", client_request_id="", tenant="t", content_hash=b"", received_us=0,
            num_prompt_tokens=1, max_tokens=1,
        )  # fmt: skip
        entry = Entry(request, (0, 0), ALL)
        entry.seq, entry.parked, entry.phase = seq, parked, Phase.WAITING
        queue.push(entry)
        entries.append(entry)
    assert queue.num_waiting == 3
    assert queue.pop(ALL, ALL) is entries[1]
    assert queue.pop(ALL, ALL) is None
    assert queue.pop(ALL, ALL, yielding=True) is entries[0]
    entries[2].phase = Phase.COMPLETING
    queue.discard(entries[2])
    assert queue.num_waiting == 0
    assert queue.pop(ALL, ALL, yielding=True) is None


# --- the scheduler ---------------------------------------------------------------------------------------------------


def test_a_request_that_yields_waits_behind_those_that_come_after_it() -> None:
    world, _ = world_of({99: YIELD})
    first = world.submit()
    patient = world.submit(num_prompt_tokens=99)
    later = world.submit()
    assert set(world.running) == {first, later}
    assert world.scheduler.entry(patient).parked == YIELDING  # type: ignore[union-attr]
    world.finish(first)
    assert patient not in world.running, "something runs: it still yields"
    world.finish(later)
    assert patient in world.running, "nothing runs: the GPU does not idle while somebody waits"


def test_it_is_asked_again_when_something_has_changed_and_not_before() -> None:
    world, policy = world_of({99: YIELD})
    first = world.submit()
    patient = world.submit(num_prompt_tokens=99)
    asked = policy.asked.count(99)
    for _ in range(5):
        world.wait(10)
    assert policy.asked.count(99) == asked, "ticks change nothing"
    world.post(e.FirstToken(world.t_us, first, 1, 0))
    assert policy.asked.count(99) == asked + 1, "a prompt less to read"
    policy.answers[99] = 0
    world.submit()
    assert patient in world.running or policy.asked.count(99) == asked + 1
    world.finish(first)
    assert patient in world.running


def test_a_yielding_crowd_does_not_hide_others_nor_costs_a_decision_each() -> None:
    world, policy = world_of({99: YIELD}, slots=8)
    first = world.submit()
    for _ in range(40):
        world.submit(num_prompt_tokens=99)
    policy.asked.clear()
    other = world.submit()
    assert other in world.running
    world.finish(other)
    assert len(policy.asked) <= 1 + 2 * 8
    world.finish(first)
    assert len(world.running) == 1, "one goes, and the others yield to it"


@pytest.mark.parametrize("how", ["cancel", "deadline", "drain"])
def test_a_yielding_request_that_ends_leaves_the_books(how: str) -> None:
    world, _ = world_of({99: YIELD})
    world.submit()
    patient = world.submit(num_prompt_tokens=99, deadline_ms=1_000)
    {
        "cancel": lambda: world.cancel(patient),
        "deadline": lambda: world.wait(1_000),
        "drain": lambda: world.drain(100),
    }[how]()
    assert patient in world.delivered
    assert len(world.scheduler.queue) == 0


def test_it_survives_the_loss_of_the_engine() -> None:
    world, _ = world_of({99: YIELD})
    first = world.submit()
    patient = world.submit(num_prompt_tokens=99)
    world.lose("m0")
    world.engine_up("m0")
    assert {first, patient} & set(world.running)
    for request_id in (first, patient):
        if request_id in world.running:
            world.finish(request_id)
    assert {first, patient} <= set(world.delivered) | set(world.running)


def test_a_policy_must_not_let_a_request_wait_for_nothing() -> None:
    class Stubborn(Says):
        def choose(self, features: Features, candidates: Sequence[Candidate], rng: Random) -> Choice:
            return Choice(YIELD, 1.0, "never")

    world = CoreWorld(make_config(modes=1))
    world.scheduler._router.policy = Stubborn({})
    with pytest.raises(AssertionError, match="wait for nothing"):
        world.submit()


# --- whom a candidate harms ------------------------------------------------------------------------------------------


def make_fleet(num_modes: int = 2) -> Fleet:
    """TTFT is 10 ms + 50 ms per 1,000 tokens, TPOT 2 ms + 0.5 ms per neighbour."""
    fleet = Fleet([(Mode(name=f"m{i}", engine=f"m{i}", model="m"), 8, 4_096) for i in range(num_modes)])
    for i, book in enumerate(fleet.books):
        fleet.engine_up(EngineInfo(engine=f"m{i}", max_model_len=4_096, max_num_seqs=8, kv_capacity_tokens=100_000))
        book.estimate.ttft, book.estimate.tpot = Fit(10.0, 50.0), Fit(2.0, 0.5)
        book.stale = True
    return fleet


def make_entry(name: str, slo: Slo, *, prompt: int = 100, expected: int = 11, deadline_us: int | None = None) -> Entry:
    request = Request(
        request_id=name, client_request_id=name, tenant="t", content_hash=b"", received_us=0,
        num_prompt_tokens=prompt, max_tokens=20, slo=slo, deadline_us=deadline_us,
    )  # fmt: skip
    entry = Entry(request, (0, 0), ALL)
    entry.expected_tokens = expected
    return entry


def run(fleet: Fleet, arm: int, entry: Entry, *, e2el_ms: float = 35.0, ttft_ms: float = 15.0) -> None:
    entry.parked = arm
    entry.reserved_tokens = 111
    fleet.dispatched(arm, entry, 0, e2el_ms, ttft_ms, 5.0)


def harmed(fleet: Fleet, *, prompt: int = 100) -> list[int]:
    newcomer = make_entry("new", Slo(), prompt=prompt)
    newcomer.static_masks = (0,) * len(fleet.books)
    features = extract(newcomer, 0, fleet, 0, 1.0, None)
    return [c.num_harmed for c in Router(fleet, Says({}), Random(1)).candidates(newcomer, features)]


def test_a_prompt_to_read_harms_who_cannot_wait_so_long() -> None:
    """The newcomer's 100 tokens take 5 ms to read, 1,000 take 50: the neighbour has 20 ms to spare."""
    fleet = make_fleet(1)
    run(fleet, 0, make_entry("a", Slo(ttft_ms=35.0)))
    assert harmed(fleet) == [0]
    assert harmed(fleet, prompt=1_000) == [1]


def test_who_decodes_is_harmed_by_its_tpot() -> None:
    """First token at 15 ms, ten more by 35: 2 ms each. An SLO of 4 ms leaves 20 ms to spare."""
    fleet = make_fleet(1)
    entry = make_entry("a", Slo(ttft_ms=16.0, tpot_ms=4.0))
    run(fleet, 0, entry)
    entry.first_token_us = 15_000
    fleet.first_token(entry, 15_000)
    assert harmed(fleet) == [0]
    assert harmed(fleet, prompt=1_000) == [1]


@pytest.mark.parametrize(
    ("slo", "first_token_us"),
    [(Slo(), 0), (Slo(ttft_ms=10.0), 0), (Slo(ttft_ms=10.0, tpot_ms=4.0), 15_000), (Slo(tpot_ms=1.0), 15_000)],
    ids=["no SLO", "will be late anyway", "was late", "too slow anyway"],
)
def test_who_has_nothing_to_lose_is_not_harmed(slo: Slo, first_token_us: int) -> None:
    fleet = make_fleet(1)
    entry = make_entry("a", slo)
    run(fleet, 0, entry)
    if first_token_us:
        entry.first_token_us = first_token_us
        fleet.first_token(entry, first_token_us)
    assert harmed(fleet, prompt=3_000) == [0]


def test_a_deadline_can_be_harmed() -> None:
    fleet = make_fleet(1)
    run(fleet, 0, make_entry("a", Slo(deadline_ms=45.0), deadline_us=45_000))
    assert harmed(fleet) == [0]
    assert harmed(fleet, prompt=1_000) == [1]


def test_another_engine_harms_by_sharing_the_gpu() -> None:
    """On m1 the newcomer would run for 35 ms beside m0, which is busy for as long: half of that is lost there."""
    fleet = make_fleet(2)
    run(fleet, 0, make_entry("a", Slo(ttft_ms=25.0)))
    assert harmed(fleet) == [0, 1]
    (here, there) = Router(fleet, Says({}), Random(1)).candidates(
        make_entry("new", Slo()), extract(make_entry("new", Slo()), 0, fleet, 0, 1.0, None)
    )
    assert here.shared_ms == 0.0
    assert there.shared_ms == pytest.approx(35.0)
    assert here.prompt_ms == there.prompt_ms == pytest.approx(5.0)
    # The work of one token is half a step of the two that would run, and what a neighbour adds.
    assert there.work_ms == pytest.approx(5.0 + 11 * (2.0 / 2 + 0.5))


def test_neighbours_are_pushed_back_when_a_prompt_joins() -> None:
    fleet = make_fleet(1)
    first, second = make_entry("a", Slo(ttft_ms=35.0)), make_entry("b", Slo())
    run(fleet, 0, first)
    run(fleet, 0, second)
    assert (first.first_due_us, first.end_us) == (20_000, 40_000)
    assert (second.first_due_us, second.end_us) == (15_000, 35_000)
    assert fleet.end_us == 75_000 == fleet.books[0].running.end_us
    fleet.vacated(first, 50_000)
    fleet.vacated(second, 50_000)
    assert fleet.end_us == 0
    assert not fleet.books[0].running.ends


def test_progress_makes_what_is_to_spare_anew() -> None:
    fleet = make_fleet(1)
    entry = make_entry("a", Slo(tpot_ms=4.0))
    run(fleet, 0, entry)
    entry.first_token_us = 15_000
    fleet.first_token(entry, 15_000)
    assert harmed(fleet, prompt=300) == [0]
    # Two tokens by 40 ms: it is behind, and has less to spare.
    fleet.stepped(40_000, "m0", EngineLoad(), (("a", 7),))
    assert harmed(fleet, prompt=300) == [1]


def test_a_scheduler_without_slos_never_builds_spares() -> None:
    fleet = make_fleet(1)
    for i in range(5):
        run(fleet, 0, make_entry(f"r{i}", Slo()))
    assert fleet.books[0].running.spares_ms() == []

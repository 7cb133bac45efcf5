"""A request that waits for a busy mode by the policy's choice: when it is asked again, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest

from msd.config import PolicyConfig
from msd.core.estimator import Fit
from msd.core.scheduler import _REVIEWS_PER_TICK
from msd.domain import Candidate, Choice, Features
from msd.policy.round_robin import RoundRobin
from tests.unit.core_world import CoreWorld, make_config


class Wants(RoundRobin):
    """Wants one arm for all, busy or not; counts how often it is asked."""

    def __init__(self, arm: int) -> None:
        super().__init__(PolicyConfig(), [])
        self.arm = arm
        self.num_asked = 0

    def choose(self, features: Features, candidates: Sequence[Candidate], rng: Random) -> Choice:
        self.num_asked += 1
        return Choice(self.arm, 1.0, "test")


def a_world(*, slots: int = 1, beside: int = 0) -> tuple[CoreWorld, Wants]:
    """m0 has one slot, in which r1 runs; `beside` requests run on m1, which has `slots`. All others want m0."""
    engines: dict[str, dict[str, object]] = {"m0": {"max_num_seqs": 1}, "m1": {"max_num_seqs": slots}}
    world = CoreWorld(make_config(modes=2, engines=engines))
    policy = Wants(0)
    world.scheduler._router.policy = policy
    assert world.mode_of(world.submit()) == "m0"
    policy.arm = 1
    for _ in range(beside):
        assert world.mode_of(world.submit()) == "m1"
    policy.arm, policy.num_asked = 0, 0
    return world, policy


def assert_books_agree(world: CoreWorld) -> None:
    queue, fleet = world.scheduler.queue, world.scheduler.fleet
    waiting = list(queue.entries())
    assert len({id(entry) for entry in waiting}) == len(waiting) == len(queue)
    for arm, book in enumerate(fleet.books):
        assert book.num_parked == sum(entry.parked == arm for entry in waiting)


def wait_until_running(world: CoreWorld, request_id: str, most_ms: int) -> float:
    """Ticks as the daemon makes them; returns the ms that it took."""
    since_us = world.t_us
    while request_id not in world.running:
        assert world.t_us - since_us < most_ms * 1_000, "still waits"
        world.wait(100)
    return (world.t_us - since_us) * 1e-3


def test_who_waits_for_a_request_that_overruns_goes_to_the_idle_mode_in_the_end() -> None:
    world = CoreWorld(make_config(modes=2, slots=1, policy="cost"))
    slow = world.scheduler.fleet.books[1]
    slow.estimate.tpot, slow.stale = Fit(8.0, 0.0, 0.0), True
    first = world.submit(max_tokens=200)
    expected_ms = world.running[first].decision.candidates[0].e2el_ms
    world.wait(150)
    second = world.submit(max_tokens=200, deadline_ms=60_000)
    assert second not in world.running
    assert world.scheduler.fleet.books[0].num_parked == 1
    assert wait_until_running(world, second, 5_000) > expected_ms - 150
    assert world.mode_of(second) == "m1"
    assert world.mode_of(first) == "m0"
    assert_books_agree(world)


def test_it_takes_a_mode_that_becomes_idle_at_once() -> None:
    world, policy = a_world(slots=2, beside=1)
    parked = world.submit()
    assert parked not in world.running
    policy.arm = 1
    world.finish("r2")
    assert world.mode_of(parked) == "m1"
    assert_books_agree(world)


def test_it_takes_a_mode_that_comes_up_at_once() -> None:
    world, policy = a_world()
    world.lose("m1")
    parked = [world.submit(), world.submit()]
    policy.arm = 1
    world.engine_up("m1")
    assert [request_id in world.running for request_id in parked] == [True, False]
    assert_books_agree(world)


def test_an_idle_mode_costs_one_decision_when_the_policy_still_waits() -> None:
    world, policy = a_world(slots=2, beside=1)
    parked = [world.submit() for _ in range(20)]
    policy.num_asked = 0
    world.finish("r2")
    assert policy.num_asked == 1
    assert not set(parked) & set(world.running)
    assert_books_agree(world)


def test_who_has_not_been_decided_goes_before_those_that_wait_by_choice() -> None:
    world, policy = a_world(slots=1, beside=0)
    parked = world.submit()
    assert parked not in world.running
    policy.arm = 1
    beside = world.submit()
    assert world.mode_of(beside) == "m1"
    undecided = world.submit()
    world.finish(beside)
    assert world.mode_of(undecided) == "m1", "it waits for anything; the other one has its wish"


def test_reviews_keep_the_order_of_arrival_and_cost_no_turn() -> None:
    world, policy = a_world(slots=1)
    parked = [world.submit(), world.submit(), world.submit()]
    world.wait(10_000)
    assert not set(parked) & set(world.running)
    policy.arm = 1
    world.wait(10_000)
    for request_id in parked:
        assert set(world.running) == {"r1", request_id}
        world.finish(request_id)
    assert_books_agree(world)


def test_reviews_of_a_tick_are_bounded() -> None:
    world, policy = a_world()
    parked = [world.submit() for _ in range(4 * _REVIEWS_PER_TICK)]
    policy.num_asked = 0
    world.wait(60_000)
    assert policy.num_asked == _REVIEWS_PER_TICK
    assert not set(parked) & set(world.running)
    assert_books_agree(world)
    for _ in range(3):
        world.wait(1)
    assert policy.num_asked == 4 * _REVIEWS_PER_TICK, "each once: those that were asked are not due again"


def test_who_may_go_nowhere_else_is_not_asked() -> None:
    world, policy = a_world()
    strict = world.submit(mode_hint="m0", mode_strict=True)
    world.lose("m1")
    other = world.submit()
    policy.num_asked = 0
    for _ in range(100):
        world.wait(1_000)
    assert policy.num_asked == 0
    world.finish("r1")
    assert strict in world.running
    assert other not in world.running


@pytest.mark.parametrize("how", ["cancelled", "expired", "drained", "decided"])
def test_a_review_of_one_that_has_left_does_nothing(how: str) -> None:
    world, policy = a_world()
    parked = world.submit(deadline_ms=50)
    assert parked not in world.running
    if how == "cancelled":
        world.cancel(parked)
    elif how == "expired":
        world.wait(50)
    elif how == "drained":
        world.drain(1_000_000)
    else:
        policy.arm = 1
        world.finish("r1")
        world.scheduler._router.policy = policy
    num_commands = len(world.log)
    world.wait(60_000)
    assert len(world.log) == num_commands
    assert_books_agree(world)


def test_old_reviews_do_not_pile_up() -> None:
    world, _ = a_world()
    for number in range(5_000):
        world.cancel(world.submit())
        if number % 100 == 0:
            world.wait(1)
    assert len(world.scheduler._reviews) <= 1_200

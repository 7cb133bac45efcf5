"""ConfigChanged: another policy takes over without losing what waits or runs."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest

from msd.config import PolicyConfig
from msd.core import events as e
from msd.domain import YIELD, Candidate, Choice, Features
from msd.policy.round_robin import RoundRobin
from tests.unit.core_world import CoreWorld, make_config


class YieldsWhileAnythingRuns(RoundRobin):
    def choose(self, features: Features, candidates: Sequence[Candidate], rng: Random) -> Choice:
        if features.num_running:
            return Choice(YIELD, 1.0, "lets others go first")
        return super().choose(features, candidates, rng)


def test_what_waits_is_decided_by_the_new_policy_and_what_runs_goes_on() -> None:
    world = CoreWorld(make_config(modes=2, slots=1, policy={"name": "fixed", "mode": "m0"}))
    first, second = world.submit(), world.submit()
    assert world.running[first].decision.mode == "m0"
    assert second not in world.running  # it waits for m0 although m1 is free
    world.post(e.ConfigChanged(world.t_us, PolicyConfig(name="fixed", mode="m1")))
    assert world.scheduler.policy_name == "fixed"
    assert world.running[second].decision.mode == "m1"
    world.finish(first)
    world.finish(second)
    assert {first, second} == set(world.delivered)


def test_each_that_waited_for_a_busy_mode_is_in_the_queue_once_afterwards() -> None:
    """They once stayed in line for the old mode too: counted out twice when one ran, and others never (seeds 3, 19)."""
    world = CoreWorld(make_config(modes=2, slots=1, policy={"name": "fixed", "mode": "m0"}))
    ids = [world.submit() for _ in range(5)]
    queue = world.scheduler.queue
    for mode in ("m1", "m0", "m1"):
        world.post(e.ConfigChanged(world.t_us, PolicyConfig(name="fixed", mode=mode)))
        assert len({entry.seq for entry in queue.entries()}) == len(list(queue.entries())) == len(queue) == 3
    for _ in ids:
        for request_id in sorted(world.running):
            world.finish(request_id)
    assert set(world.delivered) == set(ids)
    assert len(queue) == 0
    assert all(book.num_parked == 0 for book in world.scheduler.fleet.books)


@pytest.mark.parametrize("modes", [("m0", "m0"), ("m1", "m1"), ("m1", "m0")])
def test_what_waits_is_answered_once_when_a_drain_follows_two_changes(modes: tuple[str, str]) -> None:
    world = CoreWorld(make_config(modes=2, slots=1, policy={"name": "fixed", "mode": "m0"}))
    ids = [world.submit() for _ in range(6)]
    for mode in modes:
        world.post(e.ConfigChanged(world.t_us, PolicyConfig(name="fixed", mode=mode)))
    queue = world.scheduler.queue
    seqs = [entry.seq for entry in queue.entries()]
    assert len(seqs) == len(set(seqs)) == len(queue)
    world.drain(1_000)
    assert len(queue) == 0
    assert {world.outcomes[id_].error_code for id_ in ids if id_ not in world.running} == {"draining"}
    for request_id in sorted(world.running):
        world.finish(request_id)
    assert set(world.delivered) == set(ids)
    assert world.conserved()


def test_who_let_others_go_first_is_asked_again_by_the_new_policy() -> None:
    world = CoreWorld(make_config(modes=2, slots=1))
    first = world.submit()
    yielding = YieldsWhileAnythingRuns(PolicyConfig(), [])
    world.scheduler._router.policy = yielding
    second = world.submit()
    assert set(world.running) == {first}
    world.post(e.ConfigChanged(world.t_us, PolicyConfig(name="round_robin")))
    assert set(world.running) == {first, second}

"""ConfigChanged: another policy takes over without losing what waits or runs."""

from __future__ import annotations

from msd.config import PolicyConfig
from msd.core import events as e
from tests.unit.core_world import CoreWorld, make_config


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

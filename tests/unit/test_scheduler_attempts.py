"""An attempt that ends without an answer: what of it the request keeps, and where its energy is booked."""

from __future__ import annotations

import pytest

from msd.core import commands as c
from msd.core import events as e
from msd.core.entry import Entry
from msd.domain import CounterReading
from tests.unit.core_world import CoreWorld, make_config
from tests.unit.test_residency import World


def read_counter(world: CoreWorld, energy_mj: int) -> list[c.Command]:
    reading = CounterReading(domain="gpu:0", t_us=world.t_us, energy_mj=energy_mj, idle_w=10.0, power_w=90.0)
    return world.post(e.CounterRead(world.t_us, reading))


def wasted_mj(world: CoreWorld) -> dict[str, int]:
    (accounts,) = world.scheduler.ledger.accounts()
    return accounts.wasted_mj


def metered(**limits: object) -> tuple[CoreWorld, str]:
    """One mode with a counter, and a request that has run for a second."""
    world = CoreWorld(make_config(modes=1, limits=limits))
    read_counter(world, 0)
    request_id = world.submit()
    world.t_us += 1_000_000
    return world, request_id


def settles(world: CoreWorld) -> list[str]:
    """The next readings of the counter come; ids of the answers that get their settled energy by them."""
    for energy_mj in (90_000, 180_000):
        world.t_us += 500_000
        read_counter(world, energy_mj)
    return [command.request_id for command in world.of(c.Settle) if command.energy.settled]


# --- a move that ends with the engine's death -------------------------------------------------------------------------


def moved_and_lost() -> tuple[World, Entry]:
    """A request was told to leave its engine, which died of it; it runs again, on the other engine."""
    world = World(10.0, 12.0, memory=15, drain_s=2.0)
    world.hold_aborts = True
    world.wait(10)
    world.obey()
    present = world.resident()[0]
    absent = "m1" if present == "m0" else "m0"
    running = world.submit()
    for _ in range(14):
        world.submit(mode_hint=absent, mode_strict=True)
        world.wait(1_000)
    assert running in world.aborting
    world.lose(present)
    for _ in range(20):
        if running in world.running:
            break
        world.wait(1_000)
        world.obey()
    assert world.running[running].attempt == 2
    entry = world.scheduler.entry(running)
    assert entry is not None
    return world, entry


def test_a_cancel_is_heard_by_the_attempt_after_a_move_that_the_engine_did_not_survive() -> None:
    world, entry = moved_and_lost()
    request_id = entry.request.request_id
    aborts = [command for command in world.cancel(request_id) if isinstance(command, c.Abort)]
    assert [(command.request_id, command.attempt) for command in aborts] == [(request_id, 2)]
    world.finish(request_id, "abort", 0)
    assert world.outcomes[request_id].finish_reason == "abort"


def test_it_may_be_moved_again() -> None:
    _, entry = moved_and_lost()
    assert (entry.abort_reason, entry.num_moves) == ("", 0)


# --- how long its user has waited -------------------------------------------------------------------------------------


def test_a_policy_sees_the_wait_since_receipt_also_of_a_second_attempt() -> None:
    world = CoreWorld(make_config(modes=2, slots=1))
    request_id = world.submit()
    world.t_us += 300_000
    world.lose("m0")
    dispatch = world.running[request_id]
    assert dispatch.attempt == 2
    assert dispatch.decision.features.waited_us == 300_000
    assert dispatch.waited_us == 0, "in the queue, this time"


def test_estimates_of_a_second_attempt_are_from_now_on() -> None:
    """The router knows the moment from the wait: a busy mode's queue is as long as it is."""
    world = CoreWorld(make_config(modes=2, slots=1))
    retried, beside = world.submit(), world.submit()
    assert (world.mode_of(retried), world.mode_of(beside)) == ("m0", "m1")
    end_us = world.scheduler.fleet.books[1].running.ends[0]
    world.t_us += 5_000
    assert world.t_us < end_us
    world.lose("m0")
    world.engine_up("m0")
    queue_ms = world.running[retried].decision.candidates[1].queue_ms
    assert queue_ms == pytest.approx((end_us - world.t_us) * 1e-3)


# --- what it used -----------------------------------------------------------------------------------------------------


def test_a_restarted_attempt_is_booked_as_such_and_settles_nothing() -> None:
    world, request_id = metered()
    world.lose("m0")
    assert settles(world) == []
    assert set(wasted_mj(world)) == {"restarted"}
    assert request_id not in world.delivered


def test_the_last_attempt_of_a_dead_letter_failed() -> None:
    world, request_id = metered(max_attempts=1)
    world.lose("m0")
    outcome = world.delivered[request_id]
    assert outcome.error_code == "dead_letter"
    assert outcome.energy is not None
    assert not outcome.energy.settled
    assert settles(world) == [request_id]
    assert set(wasted_mj(world)) == {"failed"}


def test_an_attempt_whose_engine_dies_after_its_cancel_was_aborted() -> None:
    world, request_id = metered()
    world.hold_aborts = True
    world.cancel(request_id)
    world.lose("m0")
    outcome = world.delivered[request_id]
    assert (outcome.finish_reason, outcome.reason) == ("abort", "cancelled after its engine was lost")
    assert outcome.energy is not None
    assert settles(world) == [request_id]
    assert set(wasted_mj(world)) == {"aborted"}


def test_an_attempt_whose_engine_dies_in_the_drain_failed() -> None:
    world, request_id = metered()
    world.drain(10_000)
    world.lose("m0")
    assert world.delivered[request_id].error_code == "draining"
    assert settles(world) == [request_id]
    assert set(wasted_mj(world)) == {"failed"}


def test_an_attempt_that_is_moved_in_the_drain_was_aborted() -> None:
    world, request_id = metered()
    entry = world.scheduler.entry(request_id)
    assert entry is not None
    world.drain(10_000)
    entry.abort_reason = "move"
    world.finish(request_id, "abort", 2)
    assert world.delivered[request_id].error_code == "draining"
    assert settles(world) == [request_id]
    assert set(wasted_mj(world)) == {"aborted"}

"""What an attempt that ended teaches: only what was measured whole."""

from __future__ import annotations

import pytest

from msd.core import commands as c
from msd.core import events as e
from msd.domain import CounterReading, Decision, EnergySource, Observation
from tests.unit.core_world import CoreWorld, make_config

POWER_W = 110.0
IDLE_W = 10.0
REQUEST_MS = 200.0
PROMPT_TOKENS, OUTPUT_TOKENS = 80, 20


class MeteredWorld:
    """One mode, requests one after another, and a counter that moves, or is stuck while the power goes on."""

    def __init__(self, source: EnergySource = "counter") -> None:
        self.world = CoreWorld(make_config(modes=1))
        self.source: EnergySource = source
        self.energy_mj = 0
        self.is_stuck = False
        self.heard: list[Observation] = []
        policy = self.world.scheduler._router.policy
        update = policy.update

        def heard(decision: Decision, observation: Observation) -> None:
            self.heard.append(observation)
            update(decision, observation)

        policy.update = heard  # type: ignore[method-assign]
        self.read()

    def read(self) -> None:
        world = self.world
        world.post(
            e.CounterRead(
                world.t_us,
                CounterReading(
                    domain="gpu:0",
                    t_us=world.t_us,
                    energy_mj=self.energy_mj,
                    source=self.source,
                    idle_w=IDLE_W,
                    power_w=POWER_W,
                ),
            )
        )

    def wait(self, ms: float, power_w: float = IDLE_W) -> None:
        for _ in range(round(ms / 50)):
            if not self.is_stuck:
                self.energy_mj += int(power_w * 50)
            self.world.wait(50)
            self.read()

    def serve(self) -> str:
        world = self.world
        request_id = world.submit(num_prompt_tokens=PROMPT_TOKENS, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
        world.first_token(request_id)
        self.wait(REQUEST_MS, POWER_W)
        world.finish(request_id, "length", OUTPUT_TOKENS)
        return request_id

    def mj_per_token(self) -> float | None:
        return self.world.scheduler.fleet.books[0].estimate.mj_per_token

    def logged(self) -> list[Observation]:
        return [command.observation for command in self.world.of(c.Observe)]


def test_a_stuck_counter_does_not_teach_that_energy_is_free() -> None:
    metered = MeteredWorld()
    for _ in range(10):
        metered.serve()
        metered.wait(200)
    due_mj = (POWER_W - IDLE_W) * REQUEST_MS / (PROMPT_TOKENS + OUTPUT_TOKENS)
    before = metered.mj_per_token()
    assert before == pytest.approx(due_mj, rel=0.2)
    num_settled = len(metered.heard)
    assert all(observation.energy is not None for observation in metered.heard)
    # It gets stuck within a request: of that one, the ledger knows a part.
    metered.world.submit(num_prompt_tokens=PROMPT_TOKENS, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    request_id = next(iter(metered.world.running))
    metered.world.first_token(request_id)
    metered.wait(50, POWER_W)
    metered.is_stuck = True
    metered.wait(150)
    metered.world.finish(request_id, "length", OUTPUT_TOKENS)
    for _ in range(100):
        metered.serve()
    metered.wait(45_000)
    given_up = metered.heard[num_settled:]
    assert len(given_up) >= 100, "they are not heard of at all"
    assert [observation.energy for observation in given_up] == [None] * len(given_up)
    assert metered.mj_per_token() == before
    assert metered.logged() == metered.heard


def test_given_up_energy_is_told_to_the_producer_as_provisional() -> None:
    """What is not learnt from is not hidden either: the answer carries the part that is known, as not settled."""
    metered = MeteredWorld()
    metered.is_stuck = True
    request_id = metered.serve()
    metered.wait(45_000)
    told = [command.energy.settled for command in metered.world.of(c.Settle) if command.request_id == request_id]
    assert told == [False]


def test_settled_estimates_teach_and_keep_their_label() -> None:
    metered = MeteredWorld("estimated")
    for _ in range(5):
        metered.serve()
        metered.wait(200)
    metered.wait(1_000)
    labels = {observation.energy.source for observation in metered.heard if observation.energy is not None}
    assert (labels, len(metered.heard)) == ({"estimated"}, 5)
    assert metered.mj_per_token() is not None

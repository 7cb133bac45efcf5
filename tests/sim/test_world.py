"""Whole simulated worlds: one seed is one digest, every invariant holds, and each check can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random

import pytest
import structlog
from msgspec import structs

from msd.config import Config
from msd.core import commands as c
from msd.core import events as e
from msd.core.commands import Command
from msd.core.events import Event
from msd.core.residency import Residency
from msd.core.scheduler import Scheduler
from msd.domain import Candidate
from msd.sim.report import Report
from msd.sim.weather import POLICIES, STEADY, Weather, draw, recipes_of, stated_gate
from msd.sim.world import run_world

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_REQUESTS = 500

STORM = Weather(
    rate_per_s=8.0,
    burst_factor=5.0,
    utilisation=1.1,
    num_slots=4,
    deadline_share=0.5,
    cancel_share=0.1,
    repeat_share=0.05,
    odd_share=0.05,
    slow_share=0.3,
    vanish_per_s=0.05,
    num_engine_deaths=4,
    num_counter_resets=1,
    num_counter_stalls=1,
    num_view_outages=1,
    journal_latency_ms=5.0,
    journal_failure_share=0.01,
    policy="cost",
    memory_for=2,
    prefix_share=0.5,
    shadow_share=1.0,
    num_drifts=2,
    num_policy_changes=1,
)
"""Everything goes wrong at once."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Engines die here by the dozen; their log lines carry the real time."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    yield
    structlog.reset_defaults()


def broken(report: Report) -> dict[str, tuple[str, ...]]:
    return {check.name: check.violations for check in report.checks if check.num_violations}


def test_one_seed_is_one_digest_and_another_seed_another() -> None:
    first, again = run_world(11, NUM_REQUESTS), run_world(11, NUM_REQUESTS)
    assert structs.replace(first, wall_s=0.0, speed=0.0) == structs.replace(again, wall_s=0.0, speed=0.0)
    assert run_world(12, NUM_REQUESTS).digest != first.digest


def test_the_digest_does_not_depend_on_the_hash_seed() -> None:
    script = "from msd.sim.world import run_world; print(run_world(11, 500).digest)"

    def digest(hash_seed: str) -> str:
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]

    assert digest("1") == digest("4242") == run_world(11, 500).digest


@pytest.mark.parametrize("seed", range(20))
def test_all_checks_hold(seed: int) -> None:
    report = run_world(seed, NUM_REQUESTS)
    assert broken(report) == {}, f"msd sim --seed {seed} --requests {NUM_REQUESTS}"
    assert report.virtual_s >= 120
    assert report.submitted == report.delivered + report.rejected + report.aborted + report.failed + report.duplicates
    assert report.delivered > 0


def test_the_storm_reaches_what_it_is_for() -> None:
    """A world in which nothing is cancelled, lost or late would prove little."""
    report = run_world(4, 1_000, weather=STORM)
    assert broken(report) == {}
    assert report.restarts > 0
    assert report.aborted > 0
    assert report.duplicates > 0
    for code in ("deadline_exceeded", "journal_unavailable", "quality_unreachable"):
        assert report.error_codes.get(code, 0) > 0, f"nothing ended with {code}"
    assert report.energy_mj["wasted"] > 0
    assert report.energy_mj["estimated"] > 0
    looked = {check.name: check.num_checked for check in report.checks}
    assert all(looked.values()), f"a check looked at nothing: {looked}"


def test_seeds_draw_every_policy_and_every_kind_of_world() -> None:
    drawn = [draw(Random(seed), NUM_REQUESTS) for seed in range(100)]
    assert {weather.policy for weather in drawn} == set(POLICIES)
    assert sum(weather.policy == "cost" for weather in drawn) > 30
    for name in ("memory_for", "prefix_share", "shadow_share", "num_drifts", "num_policy_changes"):
        assert len({getattr(weather, name) for weather in drawn}) > 1, name


def test_drain_answers_everything_in_time() -> None:
    report = run_world(5, NUM_REQUESTS, weather=structs.replace(STORM, drain_early=True, drain_s=1.0))
    assert broken(report) == {}
    assert report.error_codes.get("draining", 0) > 0


def test_a_steady_world_is_served_whole() -> None:
    report = run_world(1, 1_000, weather=STEADY)
    assert broken(report) == {}
    assert report.failed == report.aborted == 0
    assert report.num_completion_tokens == 64 * report.delivered
    energy = report.energy_mj
    assert energy["counter"] == energy["requests"] + energy["wasted"] + energy["idle"] + energy["unattributed"]


# --- mutants: each check is proven able to fail ----------------------------------------------------------------------


class CountsAnAnswerTwice(Scheduler):
    def handle(self, event: Event) -> list[Command]:
        commands = super().handle(event)
        self.counts.delivered += isinstance(event, e.Completed)
        return commands


class CompletesTwice(Scheduler):
    def handle(self, event: Event) -> list[Command]:
        return [again for command in super().handle(event) for again in (command, command)[: 1 + _completes(command)]]


class NeverLooksAtDeadlines(Scheduler):
    def _on_tick(self, t_us: int) -> None:
        self._deadlines.clear()
        super()._on_tick(t_us)


class LosesWhatItsEngineLost(Scheduler):
    def handle(self, event: Event) -> list[Command]:
        return [] if isinstance(event, e.Failed) and event.lost else super().handle(event)


class RunsAnywhere(Scheduler):
    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._router.candidates = partial(_unmasked, self._router.candidates)  # type: ignore[method-assign]


class ReadsItsCounterWrong(Scheduler):
    def handle(self, event: Event) -> list[Command]:
        if isinstance(event, e.CounterRead):
            reading = structs.replace(event.reading, energy_mj=event.reading.energy_mj * 1001 // 1000)
            event = e.CounterRead(event.t_us, reading)
        return super().handle(event)


class RunsOneTooMany(Scheduler):
    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.fleet.engine_up = partial(_one_more_slot, self.fleet.engine_up)  # type: ignore[method-assign]


class MovesAnEngineTwice(Scheduler):
    def handle(self, event: Event) -> list[Command]:
        commands = super().handle(event)
        return [*commands, *(command for command in commands if isinstance(command, c.Transit))]


MUTANT_REQUESTS = 800
"""Enough for a mode to be withdrawn, and for requests after it."""


class ForgetsWhatWasWithdrawn(Scheduler):
    def _remask(self, t_us: int) -> None:
        """Go on as before."""


class Crashes(Scheduler):
    def handle(self, event: Event) -> list[Command]:
        if isinstance(event, e.FirstToken) and event.request_id.endswith("7"):
            raise ValueError("a mutant")
        return super().handle(event)


def _completes(command: Command) -> bool:
    return isinstance(command, c.Complete)


def _unmasked(candidates: object, *args: object) -> list[Candidate]:
    return [structs.replace(candidate, mask=0) for candidate in candidates(*args)]  # type: ignore[operator]


def _one_more_slot(engine_up: object, info: object) -> None:
    engine_up(structs.replace(info, max_num_seqs=info.max_num_seqs + 1))  # type: ignore[operator, attr-defined, type-var]


def make(mutant: type[Scheduler], config: Config, rng: Random) -> Scheduler:
    return mutant.from_config(config, rng, gate=stated_gate(config), recipes=recipes_of(config))


@pytest.mark.parametrize(
    ("mutant", "caught_by"),
    [
        (CountsAnAnswerTwice, "conservation"),
        (CompletesTwice, "one_terminal_state"),
        (NeverLooksAtDeadlines, "deadlines"),
        (LosesWhatItsEngineLost, "liveness"),
        (RunsAnywhere, "masks"),
        (ReadsItsCounterWrong, "energy_closes"),
        (RunsOneTooMany, "bounds"),
        (MovesAnEngineTwice, "residency"),
        (ForgetsWhatWasWithdrawn, "certificates"),
        (Crashes, "no_crash"),
    ],
)
def test_a_mutant_is_caught(mutant: type[Scheduler], caught_by: str) -> None:
    report = run_world(6, MUTANT_REQUESTS, weather=STORM, make_scheduler=partial(make, mutant))
    assert caught_by in broken(report), broken(report)
    assert report.last_events, "the story before the violation is missing"
    assert broken(run_world(6, MUTANT_REQUESTS, weather=STORM)) == {}, "the world breaks without the mutant too"


@pytest.mark.parametrize("seed", [3, 19, 84])
def test_another_policy_takes_over_and_nobody_waits_twice(seed: int) -> None:
    """Who waited for a busy mode once stood in line twice from then on: run twice, or never (seed 19)."""
    weather = draw(Random(seed), 1_000)
    assert weather.num_policy_changes
    assert broken(run_world(seed, 1_000, weather=weather)) == {}


@pytest.mark.parametrize("seed", [0, 2, 4])
def test_engines_that_take_turns_for_memory_lose_no_request(seed: int) -> None:
    """Memory for one of three: seed 0 once left a request to a mode nobody knew, seed 2 moved one without end."""
    weather = structs.replace(draw(Random(seed), 300), memory_for=1)
    report = run_world(seed, 300, weather=weather)
    assert report.is_ok, [check for check in report.checks if check.num_violations]
    assert next(check for check in report.checks if check.name == "residency").num_checked > 0


def test_a_planner_that_is_deaf_to_who_waits_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    weather = structs.replace(draw(Random(0), 300), memory_for=1)
    assert broken(run_world(0, 300, weather=weather)) == {}
    monkeypatch.setattr(Residency, "_waiting_by", lambda _, classes: [0] * len(classes))
    assert "no_idle_with_backlog" in broken(run_world(0, 300, weather=weather))

"""The planner of residency, events in and commands out: what comes first, when a switch pays, how an engine leaves."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from random import Random

import pytest

from msd.core import commands as c
from msd.core import events as e
from msd.core.demand import FAST_S, MAX_CLASSES, Class, Demand, hushed
from msd.core.residency import Move, Residency
from msd.core.scheduler import Scheduler
from msd.core.worth import UNSERVED_S, Curve, Worth
from msd.domain import EngineInfo, ExitKind, GpuView, Residence
from msd.profile import SCHEMA, ModeProfile, Profile
from tests.bench.residency import judged
from tests.unit.core_world import CoreWorld, make_config

GB = 10**9
SECOND_US = 1_000_000


class World(CoreWorld):
    """A core world whose engines move as they are told, a second later; `m0`, `m1`, ... are `tpots` ms a token."""

    def __init__(
        self,
        *tpots: float,
        sizes: Sequence[int] = (),
        memory: int = 25,
        qualities: Sequence[float] = (),
        always: Sequence[str] = (),
        slots: int = 8,
        models: Sequence[str] = (),
        **residency: object,
    ) -> None:
        self.tpots = tpots
        engines: dict[str, dict[str, object]] = {}
        for i in range(len(tpots)):
            engines[f"m{i}"] = {
                "residency": "always" if f"m{i}" in always else "auto",
                "quality": qualities[i] if qualities else 0.9,
                "model": models[i] if models else "toy",
                "gpu_bytes": (sizes[i] if sizes else 10) * GB,
                "sim": {"max_model_len": 4096, "start_s": 2.0},
            }
        config = make_config(
            modes=len(tpots),
            slots=slots,
            policy="cost",
            engines=engines,
            residency={"reserve_bytes": GB, **residency},
            telemetry={"sim_memory_bytes": memory * GB},
        )
        self.transits: list[tuple[str, Residence]] = []
        self.fails: set[str] = set()
        super().__init__(config, up=False)
        self.scheduler = Scheduler.from_config(config, Random(1), profile=self.profile())

    def profile(self) -> Profile:
        modes = tuple(
            ModeProfile(
                mode=f"m{i}",
                recipe="",
                ttft_ms=(10.0, 0.01, 0.0),
                tpot_ms=(tpot, 0.1, 0.0),
                eos_step_ms=0.0,
                start_s=2.0,
                sleep_s=0.3,
                wake_s=0.5,
            )
            for i, tpot in enumerate(self.tpots)
        )
        return Profile(
            schema=SCHEMA, created="", command="", device="simulated", engine_version="", source="simulated",
            idle_w=None, modes=modes,
        )  # fmt: skip

    @property
    def planner(self) -> Residency:
        assert self.scheduler.residency is not None, "nothing may move"
        return self.scheduler.residency

    def _perform(self, command: c.Command) -> None:
        if isinstance(command, c.Transit):
            self.transits.append((command.engine, command.to))
        super()._perform(command)

    def obey(self) -> None:
        """Do what was told, one after another, a tick apart."""
        for _ in range(60):
            told, self.transits = self.transits, []
            for engine, to in told:
                self.t_us += SECOND_US
                if engine in self.fails:
                    self.post(e.EngineLost(self.t_us, engine, ExitKind.DIED, "it did not come"))
                elif to == "resident":
                    i = int(engine[1:])
                    info = EngineInfo(
                        engine=engine, max_model_len=4096, max_num_seqs=8, kv_capacity_tokens=100_000,
                        idle_ttft_ms=10.0, idle_tpot_ms=self.tpots[i], start_s=2.0,
                    )  # fmt: skip
                    self.post(e.EngineUp(self.t_us, info))
                else:
                    self.post(e.EngineAsleep(self.t_us, engine, to, 0.4))
            self.wait(20)
            if not self.transits:
                return
        raise AssertionError("the transitions do not end")

    def load(self, seconds: float, per_s: int = 2, **fields: object) -> None:
        """Requests that are answered at once, second by second."""
        for _ in range(round(seconds)):
            for _ in range(per_s):
                request_id = self.submit(num_prompt_tokens=100, max_tokens=100, **fields)
                if request_id in self.running:
                    self.finish(request_id, num_tokens=100)
            self.wait(1_000)
            self.obey()

    def resident(self) -> list[str]:
        return sorted(
            engine.name
            for engine in self.config.engine
            if engine.residency == "auto" and self.planner.residence_of(engine.name)[0] == "resident"
        )


# --- traffic and worth ------------------------------------------------------------------------------------------------


def test_rates_are_right_from_the_first_fold_on_and_forget_at_two_speeds() -> None:
    demand = Demand()
    classes = demand.fold(0)
    for second in range(1, 61):
        for _ in range(3):
            demand.note(100, 50, 1)
        if second % 5 == 0:
            classes = demand.fold(second * SECOND_US)
            assert classes[0].fast_per_s == pytest.approx(3.0)
            assert classes[0].slow_per_s == pytest.approx(3.0)
    assert classes[0].num_prompt_tokens == pytest.approx(100)
    assert classes[0].num_output_tokens == pytest.approx(50)
    after = demand.fold((60 + int(FAST_S)) * SECOND_US)[0]
    assert after.fast_per_s < 1.5 < after.slow_per_s


def test_what_has_stopped_is_rare_by_as_much_as_it_is_silent() -> None:
    demand = Demand()
    demand.fold(0)
    for second in range(1, 31):
        demand.note(100, 50, 0b01)
        demand.note(100, 50, 0b10)
        demand.fold(second * SECOND_US)
    classes = demand.fold(50 * SECOND_US)
    assert {traffic.silent_s for traffic in classes} == {20.0}
    quiet = {traffic.eligible: traffic.fast_per_s for traffic in hushed(classes, 0b01)}
    assert quiet[0b01] == pytest.approx(1 / 20)
    assert quiet[0b10] > 0.3, "not asked for"
    demand.note(100, 50, 0b01)
    classes = demand.fold(51 * SECOND_US)
    assert hushed(classes, 0b01) == classes


def test_classes_are_bounded_and_their_rates_are_kept() -> None:
    demand = Demand()
    demand.fold(0)
    for size in range(1, 40):
        demand.note(2 ** (size % 12), 2 ** (size % 10), 0b11)
    classes = demand.fold(10 * SECOND_US)
    assert len(classes) <= MAX_CLASSES
    assert sum(one.fast_per_s for one in classes) == pytest.approx(3.9)


def make_worth(curves: Sequence[Curve | None], classes: Sequence[Class], waiting: Sequence[int] = ()) -> Worth:
    return Worth(curves, classes, lambda x: 1.0 + x, fast=True, latency_weight=1.0, energy_weight=0.0, waiting=waiting)


def curve(ttft_s: float, tpot_s: float, slots: int = 32, kv: int = 1_000_000) -> Curve:
    return Curve((ttft_s, 0.0, 0.0), (tpot_s, 0.0, 0.0), slots, kv)


def test_worth_is_requests_in_service_by_littles_law() -> None:
    traffic = [Class(0.5, 0.5, 10.0, 91.0, 1)]
    reads = Curve((0.0, 0.01, 0.0), (0.01, 0.0, 0.0), 32, 1_000_000)
    # Half a request a second, a second each, a tenth of which is prefill that slows down decoding by 1 / (1 - 0.05).
    assert make_worth([reads], traffic).of(1) == pytest.approx(0.05 + 0.45 / 0.95, abs=0.005)
    # What does not grow with the prompt is a step that decodes for the others too.
    assert make_worth([curve(0.1, 0.01)], traffic).of(1) == pytest.approx(0.5, abs=0.005)


def test_worth_of_rates_that_swing_and_of_modes_that_may_idle() -> None:
    traffic = [Class(2.0, 2.0, 10.0, 100.0, 0b11)]
    curves = [curve(0.1, 0.01, slots=4), curve(0.1, 0.2)]

    def worth(swing: float) -> Worth:
        return Worth(
            curves, traffic, lambda x: 1.0 + x, fast=True, latency_weight=1.0, energy_weight=0.0, swing=swing
        )  # fmt: skip

    assert worth(0.9).of(0b01) > 1.5 * worth(0.0).of(0b01), "a burst overloads four slots"
    shared = make_worth([curve(0.1, 0.02), curve(0.1, 0.02)], [Class(1.0, 1.0, 10.0, 100.0, 0b11)] * 2)
    assert shared.least_of(0b11) <= min(shared.of(0b01), shared.of(0b10), shared.of(0b11))


def test_bursts_are_a_swing_and_steady_arrivals_are_none() -> None:
    steady, bursts = Demand(), Demand()
    rng = Random(1)
    for second in range(5, 600, 5):
        for demand, rate in ((steady, 3.0), (bursts, 4.8 if second // 20 % 2 else 1.2)):
            for _ in range(sum(rng.random() < rate / 100 for _ in range(500))):
                demand.note(100, 50, 1)
            demand.fold(second * SECOND_US)
    assert steady.swing < 0.2
    assert bursts.swing == pytest.approx(0.6, abs=0.2)


def test_worth_of_what_nobody_may_serve_and_of_overload() -> None:
    classes = [Class(1.0, 1.0, 10.0, 100.0, 0b01), Class(2.0, 2.0, 10.0, 100.0, 0b10)]
    worth = make_worth([curve(0.01, 0.001), curve(0.01, 0.001)], classes, waiting=(0, 5))
    assert worth.unserved_per_s(0b01) == 2.0
    assert worth.starving(0b01) == 5
    assert worth.starving(0b11) == 0
    assert worth.of(0b01) > 2.0 * UNSERVED_S + 5
    assert worth.of(0b01) - worth.served_of(0b01) == pytest.approx(2.0 * UNSERVED_S + 5)
    slow = make_worth([curve(0.1, 0.1, slots=2)], [Class(1.0, 1.0, 10.0, 100.0, 1)])
    starved = make_worth([curve(0.1, 0.1, slots=32, kv=150)], [Class(1.0, 1.0, 10.0, 100.0, 1)])
    enough = make_worth([curve(0.1, 0.1, slots=32)], [Class(1.0, 1.0, 10.0, 100.0, 1)])
    assert slow.of(1) > 2 * enough.of(1)
    assert starved.of(1) > slow.of(1), "a KV cache for one request is worth less than two slots"


def test_a_mode_of_which_nothing_is_known_serves_nothing() -> None:
    worth = make_worth([None, curve(0.1, 0.01)], [Class(1.0, 1.0, 10.0, 100.0, 0b11)])
    assert worth.of(0b01) >= UNSERVED_S
    assert worth.of(0b11) == worth.of(0b10)


# --- the first plan ---------------------------------------------------------------------------------------------------


def test_the_first_plan_brings_what_fits_the_best_first_and_leaves_the_reserve() -> None:
    world = World(20.0, 5.0, 10.0, sizes=(10, 10, 10), memory=21)
    assert all(book.residence == "cold" for book in world.scheduler.fleet.books)
    world.wait(10)
    assert world.transits[0][1] == "resident"
    world.obey()
    # 20 GB beside the reserve of 1 GB: exactly two, and the fast one among them.
    assert len(world.resident()) == 2
    assert "m1" in world.resident()
    assert world.planner.figures().num_switches == 0


def test_who_is_not_chosen_at_first_is_started_once_and_sleeps() -> None:
    world = World(20.0, 5.0, 10.0, sizes=(10, 10, 10), memory=21)
    world.wait(10)
    world.obey()
    assert [book.residence for book in world.scheduler.fleet.books].count("asleep") == 1
    assert "cold" not in [book.residence for book in world.scheduler.fleet.books]
    assert world.planner.figures().num_switches == 0


def test_nobody_is_started_only_to_sleep_while_a_request_waits() -> None:
    world = World(20.0, 5.0, 10.0, sizes=(10, 10, 10), memory=21)
    world.wait(10)
    first = world.transits[0][0]
    absent = next(name for name in ("m0", "m1", "m2") if name != first)
    world.submit(mode_hint=absent, mode_strict=True)
    world.obey()
    assert len(world.resident()) == 2
    assert [book.residence for book in world.scheduler.fleet.books].count("cold") == 1


def test_who_sheds_memory_takes_nobody_in_while_all_can_be_served() -> None:
    world = World(10.0, 12.0, 11.0, sizes=(10, 10, 8), memory=21)
    world.wait(10)
    world.obey()
    present = world.resident()
    assert len(present) == 2
    world.load(3)
    view = GpuView(
        t_us=world.t_us + SECOND_US, memory_total_bytes=21 * GB, memory_used_bytes=21 * GB, memory_free_bytes=0
    )
    world.post(e.ViewTaken(world.t_us, view))
    world.load(6)
    assert world.planner.history[0].reason == "memory"
    assert set(world.planner.history[0].after) < set(present)


def test_engines_whose_size_their_files_tell_share_the_gpu() -> None:
    engines: dict[str, dict[str, object]] = {
        f"m{i}": {"kind": "vllm", "residency": "auto", "args": {"kv_cache_memory_bytes": GB}} for i in range(2)
    }
    config = make_config(policy="cost", engines=engines)

    def first(estimated_bytes: dict[str, int]) -> tuple[str, ...]:
        scheduler = Scheduler.from_config(config, Random(1), estimated_bytes=estimated_bytes)
        assert scheduler.residency is not None
        view = GpuView(t_us=1, memory_total_bytes=80 * GB, memory_used_bytes=0, memory_free_bytes=80 * GB)
        scheduler.handle(e.ViewTaken(1, view))
        scheduler.handle(e.Tick(2))
        return scheduler.residency.first

    assert first({"m0": 10 * GB, "m1": 10 * GB}) == ("m0", "m1")
    assert len(first({})) == 1, "else each is taken for nearly the whole"


def test_the_first_plan_holds_a_mode_of_the_best_quality() -> None:
    world = World(5.0, 6.0, 30.0, qualities=(0.5, 0.5, 0.95))
    world.wait(10)
    world.obey()
    assert "m2" in world.resident()


def test_engines_that_stay_are_not_planned_and_their_memory_is_taken() -> None:
    world = World(5.0, 6.0, 7.0, always=("m0",), memory=25)
    world.wait(10)
    world.obey()
    assert len(world.resident()) == 1
    assert world.planner.residence_of("m0") == ("resident", "")
    assert not world.planner.may_move("m0")


def test_without_engines_that_may_move_there_is_no_planner() -> None:
    assert CoreWorld(make_config()).scheduler.residency is None


# --- switches ---------------------------------------------------------------------------------------------------------


def settled() -> World:
    """One engine fits: m0, which serves everything; m1 has the better quality and is slower."""
    world = World(10.0, 40.0, qualities=(0.9, 0.9), memory=15)
    world.wait(10)
    world.obey()
    assert world.resident() == ["m0"]
    return world


def test_a_mix_that_stays_moves_nothing() -> None:
    world = settled()
    world.load(120)
    assert world.planner.figures().num_switches == 0


def test_requests_that_no_resident_mode_may_serve_bring_theirs_and_are_answered() -> None:
    world = World(10.0, 12.0, qualities=(0.9, 0.9), memory=15)
    world.wait(10)
    world.obey()
    present = world.resident()[0]
    absent = "m1" if present == "m0" else "m0"
    waiting = world.submit(mode_hint=absent, mode_strict=True)
    assert waiting not in world.running
    world.load(12, per_s=1, mode_hint=absent, mode_strict=True)
    assert world.resident() == [absent]
    assert world.planner.history[-1].reason == "unserved"
    assert waiting in world.running
    assert world.conserved()


def test_nothing_is_routed_to_an_engine_that_leaves_and_what_runs_may_finish() -> None:
    world = World(10.0, 12.0, memory=15, drain_s=20.0)
    world.wait(10)
    world.obey()
    present = world.resident()[0]
    absent = "m1" if present == "m0" else "m0"
    running = world.submit()
    assert world.mode_of(running) == present
    for _ in range(12):
        world.submit(mode_hint=absent, mode_strict=True)
        world.wait(1_000)
    assert world.planner.residence_of(present) == ("resident", "leaving")
    assert world.transits == [], "it is not told to go while something runs"
    later = world.submit(mode_hint=present, mode_strict=True)
    assert later not in world.running
    world.finish(running)
    world.wait(20)
    assert world.transits == [(present, "asleep")]


def test_nothing_is_routed_to_an_engine_whose_restart_ends_after_it_was_sent_off() -> None:
    world = World(10.0, 12.0, memory=15)
    world.wait(10)
    world.obey()
    present = world.resident()[0]
    absent = "m1" if present == "m0" else "m0"
    world.load(6)
    for _ in range(12):
        world.submit(mode_hint=absent, mode_strict=True)
        world.wait(1_000)
        if world.transits:
            break
    assert world.transits == [(present, "asleep")]
    later = world.submit(mode_hint=present, mode_strict=True)
    world.engine_up(present)
    assert later not in world.running
    assert world.scheduler.fleet.resident() == []
    assert world.planner.residence_of(present) == ("resident", "leaving")
    world.obey()
    assert world.resident() == [absent]


def test_after_the_drain_requests_are_moved_without_a_strike() -> None:
    world = World(10.0, 12.0, memory=15, drain_s=2.0)
    world.wait(10)
    world.obey()
    present = world.resident()[0]
    absent = "m1" if present == "m0" else "m0"
    running = world.submit()
    for _ in range(14):
        world.submit(mode_hint=absent, mode_strict=True)
        world.wait(1_000)
    entry = world.scheduler.entry(running)
    assert entry is not None
    restarts = [command for command in world.of(c.Restart) if command.request_id == running]
    assert [command.reason for command in restarts] == ["engine_left"]
    assert entry.num_moves == 1
    assert entry.abort_reason == ""
    assert world.planner.figures().num_moved_requests == 1
    world.obey()
    assert world.mode_of(running) == absent
    world.finish(running)
    assert running in world.delivered
    assert world.conserved()


def moved_once() -> tuple[World, str, str]:
    """A long request that was moved runs on m1 or m0 (returned), and nothing else does."""
    world = World(10.0, 12.0, memory=15, drain_s=2.0)
    world.wait(10)
    world.obey()
    absent = "m1" if world.resident()[0] == "m0" else "m0"
    running = world.submit()
    called = world.submit(mode_hint=absent, mode_strict=True)
    for _ in range(20):
        world.wait(1_000)
        world.obey()
    assert world.mode_of(running) == world.mode_of(called) == absent
    world.finish(called)
    entry = world.scheduler.entry(running)
    assert entry is not None
    assert entry.num_moves == 1
    return world, running, absent


def test_who_was_moved_has_its_time_and_then_holds_no_engine_any_longer() -> None:
    world, running, present = moved_once()
    absent = "m1" if present == "m0" else "m0"
    entry = world.scheduler.entry(running)
    assert entry is not None
    since_us = entry.dispatched_us
    called = world.submit(mode_hint=absent, mode_strict=True)
    while world.t_us < since_us + 7 * SECOND_US:
        world.wait(500)
        world.obey()
        assert world.mode_of(running) == present
        assert not world.planner.is_leaving(present), "closed for a leave that cannot go on"
    for _ in range(30):
        world.wait(1_000)
        world.obey()
    assert called in world.running
    assert entry.num_moves == 2
    assert world.conserved()


def test_an_emergency_waits_for_nobody_who_was_moved() -> None:
    world, running, present = moved_once()
    world.lose("m1" if present == "m0" else "m0")
    view = GpuView(
        t_us=world.t_us + SECOND_US, memory_total_bytes=15 * GB, memory_used_bytes=15 * GB, memory_free_bytes=0
    )
    world.post(e.ViewTaken(world.t_us, view))
    for _ in range(8):  # one plan, drain_s
        world.wait(1_000)
    assert world.transits == [(present, "asleep")]
    assert running not in world.running


def test_a_lone_request_for_an_absent_mode_is_served_soon_after_the_last_switch() -> None:
    world = settled()
    for i in range(1, 7):
        wanted = f"m{i % 2}"
        since_us = world.t_us
        request = world.submit(mode_hint=wanted, mode_strict=True)
        while request not in world.running:
            world.wait(500)
            world.obey()
            assert world.t_us < since_us + 25 * SECOND_US, (i, world.planner.figures())
        world.finish(request)


def test_a_stream_that_has_stopped_keeps_no_idle_gpu_from_who_waits() -> None:
    world = settled()
    world.load(60, per_s=5, mode_hint="m0", mode_strict=True)
    since_us = world.t_us
    request = world.submit(mode_hint="m1", mode_strict=True)
    while request not in world.running:
        world.wait(500)
        world.obey()
        assert world.t_us < since_us + (UNSERVED_S + 15) * SECOND_US


def test_two_modes_that_are_both_called_for_take_turns_and_not_at_every_plan() -> None:
    world = settled()
    for _ in range(600):
        for mode in ("m0", "m1"):
            world.submit(mode_hint=mode, mode_strict=True, deadline_ms=60_000)
        for request in sorted(world.running):
            world.finish(request)
        world.wait(1_000)
        world.obey()
    switches = [move.t_us for move in world.planner.history if move.reason == "unserved"]
    gaps_us = [later - sooner for sooner, later in pairwise(switches)]
    assert gaps_us[-1] > gaps_us[0]
    assert world.planner.figures().transition_s < 0.3 * 600
    assert world.planner.figures().backoff > 1.0


def test_models_that_do_not_fit_together_take_turns() -> None:
    world = World(10.0, 10.0, memory=15, models=("toy", "other"))
    world.wait(10)
    world.obey()
    for model in ("other", "toy", "other"):
        request = world.submit(model=model)
        for _ in range(60):
            world.wait(500)
            world.obey()
        assert request in world.running, model
        world.finish(request)


def test_a_cancel_of_a_request_that_is_being_moved_is_heard() -> None:
    world = World(10.0, 12.0, memory=15, drain_s=2.0)
    world.hold_aborts = True
    world.wait(10)
    world.obey()
    absent = "m1" if world.resident()[0] == "m0" else "m0"
    running = world.submit()
    for _ in range(14):
        world.submit(mode_hint=absent, mode_strict=True)
        world.wait(1_000)
    assert running in world.aborting
    world.cancel(running)
    assert len([command for command in world.of(c.Abort) if command.request_id == running]) == 1
    world.finish(running, "abort", 0)
    assert world.outcomes[running].finish_reason == "abort"
    assert world.conserved()


def test_an_engine_that_does_not_come_leaves_its_recovery_to_the_pool_and_the_plan_goes_on() -> None:
    world = World(10.0, 12.0, memory=25)
    world.fails.add("m1")
    world.wait(10)
    world.obey()
    assert world.resident() == ["m0", "m1"], "it is wanted there"
    assert world.scheduler.fleet.resident() == ["m0"]
    request = world.submit()
    assert world.mode_of(request) == "m0"


def test_a_dead_engine_is_replaced_by_a_sleeping_one_before_any_dwell() -> None:
    world = World(10.0, 12.0, memory=15)
    world.wait(10)
    world.obey()
    present = world.resident()[0]
    absent = "m1" if present == "m0" else "m0"
    world.load(6)
    world.lose(present)
    world.load(12)
    assert world.resident() == [absent]
    assert world.planner.history[-1].reason in ("engine lost", "quality")


def test_memory_that_others_take_is_given_up_at_once_and_the_reserve_with_it() -> None:
    world = World(10.0, 12.0, memory=25)
    world.wait(10)
    world.obey()
    assert len(world.resident()) == 2
    world.load(3)
    view = GpuView(
        t_us=world.t_us + SECOND_US, memory_total_bytes=25 * GB, memory_used_bytes=25 * GB, memory_free_bytes=0
    )
    world.post(e.ViewTaken(world.t_us, view))
    world.load(6)
    assert len(world.resident()) == 1
    assert world.planner.history[0].reason == "memory"


def test_an_engine_waits_for_a_view_that_shows_room_for_it_and_else_the_plan_is_dropped() -> None:
    world = World(10.0, 12.0, memory=15)
    world.wait(10)
    world.obey()
    absent = "m1" if world.resident()[0] == "m0" else "m0"
    full = GpuView(t_us=world.t_us, memory_total_bytes=15 * GB, memory_used_bytes=10 * GB, memory_free_bytes=5 * GB)
    world.post(e.ViewTaken(world.t_us, full))
    # The view never changes: whether the one that left has freed its memory cannot be seen.
    for _ in range(30):
        world.submit(mode_hint=absent, mode_strict=True)
        world.wait(1_000)
        told, world.transits = world.transits, []
        assert ("resident") not in [to for _, to in told]
        for engine, to in told:
            world.post(e.EngineAsleep(world.t_us, engine, to, 0.4))
    assert world.planner.figures().num_dropped_plans >= 1


def test_no_switch_for_gain_inside_a_dwell_and_no_way_back_inside_two() -> None:
    world = World(10.0, 11.0, 10.5, memory=15, min_dwell_s=30.0)
    world.wait(10)
    world.obey()
    for flip in range(24):
        wanted = "m1" if flip % 2 else "m2"
        world.load(25, per_s=1, mode_hint=wanted, mode_strict=True, deadline_ms=500)
    moves: list[Move] = [move for move in world.planner.history if move.reason != "memory"]
    for i, move in enumerate(moves):
        for earlier in moves[:i]:
            if earlier.before == move.after:
                assert move.t_us - earlier.t_us >= 60 * SECOND_US, (earlier, move)


def test_the_benchmark_judges_what_was_performed() -> None:
    gain = Move(100 * SECOND_US, ("a",), ("b",), "gain", 1.0, 1.0)
    back = Move(120 * SECOND_US, ("b",), ("a",), "gain", 1.0, 1.0)
    forced = Move(120 * SECOND_US, ("b",), ("a",), "memory", 1.0, 1.0)
    first = [(101 * SECOND_US, "a"), (102 * SECOND_US, "b")]
    again = [(121 * SECOND_US, "b"), (122 * SECOND_US, "a")]
    assert judged(first, [gain]) == ([], {})
    found, exempt = judged(first + again, [gain, back])
    assert [text.split(":")[0] for text in found] == ["dwell", "back", "back"]
    assert exempt == {}
    assert judged(first + again, [gain, forced]) == ([], {"memory": 3})
    assert judged([(101 * SECOND_US, "c")], [gain])[0][0].startswith("unplanned")


def test_a_draining_daemon_plans_no_more() -> None:
    world = World(10.0, 12.0, memory=15)
    world.wait(10)
    world.obey()
    absent = "m1" if world.resident()[0] == "m0" else "m0"
    world.submit(mode_hint=absent, mode_strict=True)
    world.drain(60_000)
    for _ in range(30):
        world.wait(1_000)
    assert world.transits == []


def test_what_transitions_cost_is_learnt() -> None:
    world = World(10.0, 12.0, memory=15)
    world.wait(10)
    world.obey()
    present = world.resident()[0]
    absent = "m1" if present == "m0" else "m0"
    world.load(12, per_s=1, mode_hint=absent, mode_strict=True)
    sleeper = next(auto for auto in world.planner._autos if auto.name == present)
    assert sleeper.sleep_s == pytest.approx(0.3 + 0.3 * (0.4 - 0.3))
    assert world.planner.figures().transition_s > 0

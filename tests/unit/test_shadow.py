"""Shadows in the scheduler: which requests, when, at whose expense, and what a withdrawal does to those who wait."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs

from msd.core import commands as c
from msd.core import events as e
from msd.domain import CounterReading
from msd.gate import keep_trials, load_trials
from tests.unit.core_world import CoreWorld, gate_of, make_config

PASSED = gate_of({"m1": {"copy": "certified", "sort": "certified", "*": "certified"}})
LOSSY: dict[str, object] = {"precision": "int8"}


def world_of(*, share: float = 1.0, slots: int = 4, modes: int = 2, **quality: object) -> CoreWorld:
    """m0 is the reference, m1 is lossy and certified, m2 lossless."""
    told = {"shadow_share": share, **quality}
    return CoreWorld(make_config(modes=modes, slots=slots, engines={"m1": LOSSY}, quality=told), gate=PASSED)


def serve(world: CoreWorld, mode: str = "m1", **fields: object) -> str:
    """Run one request on that mode to its end."""
    request_id = world.submit(**{"task": "copy", "mode_hint": mode, "mode_strict": True, **fields})
    world.finish(request_id)
    return request_id


def judge(world: CoreWorld, shadow: c.Shadow, difference: float | None, *, agrees: bool | None = None) -> None:
    told = difference == 0 if agrees is None and difference is not None else agrees
    world.post(e.QualityJudged(world.t_us, shadow.shadow_id, shadow.mode, shadow.task, difference, 4, told))


def withdraw(world: CoreWorld, task: str = "copy") -> c.Withdraw:
    """Let pair after pair go wrong until the mode is withdrawn."""
    for _ in range(200):
        serve(world, task=task)
        judge(world, world.of(c.Shadow)[-1], -1.0)
        if found := world.of(c.Withdraw):
            return found[-1]
    raise AssertionError("200 wrong answers took nothing away")


# --- which requests --------------------------------------------------------------------------------------------------


def test_a_certified_mode_is_shadowed_before_its_answer_is_stored() -> None:
    world = world_of()
    request_id = serve(world)
    shadow = world.of(c.Shadow)[0]
    assert (shadow.request_id, shadow.mode, shadow.reference_mode, shadow.task) == (request_id, "m1", "m0", "copy")
    kinds = [type(command) for command in world.log if isinstance(command, c.Shadow | c.Complete)]
    assert kinds == [c.Shadow, c.Complete]


def test_neither_the_reference_nor_a_lossless_mode_is_shadowed() -> None:
    world = world_of(modes=3)
    serve(world, "m0")
    serve(world, "m2")
    assert not world.of(c.Shadow)


def test_a_mode_that_no_floor_kept_away_is_not_on_trial() -> None:
    world = world_of()
    serve(world, task="unheard of", quality_floor=0.0)
    assert not world.of(c.Shadow)


@pytest.mark.parametrize(("share", "num"), [(0.0, 0), (0.1, 4), (0.25, 10), (1.0, 40)])
def test_the_share_is_kept(share: float, num: int) -> None:
    world = world_of(share=share)
    for _ in range(40):
        serve(world)
        for shadow in world.of(c.Shadow):
            judge(world, shadow, 0.0)
    assert len(world.of(c.Shadow)) == num


def test_every_task_has_its_share() -> None:
    world = world_of(share=0.5)
    for task in ("copy", "sort") * 4:
        serve(world, task=task)
        for shadow in world.of(c.Shadow):
            judge(world, shadow, 0.0)
    assert sorted(shadow.task for shadow in world.of(c.Shadow)) == ["copy", "copy", "sort", "sort"]


# --- idle capacity only ----------------------------------------------------------------------------------------------


def test_no_shadow_while_something_waits() -> None:
    world = world_of(slots=1)
    first = world.submit(task="copy", mode_hint="m1", mode_strict=True)
    world.submit(task="copy", mode_hint="m1", mode_strict=True)
    world.finish(first)
    assert not world.of(c.Shadow)


def test_no_shadow_while_the_reference_has_its_hands_full() -> None:
    world = world_of(slots=4)
    for _ in range(2):
        world.submit(mode_hint="m0", mode_strict=True)
    serve(world)
    assert not world.of(c.Shadow)


def test_no_shadow_while_the_reference_is_down() -> None:
    world = world_of()
    world.lose("m0")
    serve(world)
    assert not world.of(c.Shadow)


def test_shadows_make_way_when_work_waits() -> None:
    world = world_of(slots=1)
    serve(world)
    # The slot of the reference looks free to requests: a shadow never delays them.
    request_id = world.submit(mode_hint="m0", mode_strict=True)
    assert world.mode_of(request_id) == "m0"
    assert [abort.request_id for abort in world.of(c.Abort)] == [world.of(c.Shadow)[0].shadow_id]


def test_draining_ends_shadows_and_begins_none() -> None:
    world = world_of()
    running = world.submit(task="copy", mode_hint="m1", mode_strict=True)
    serve(world)
    world.drain(1_000)
    assert len(world.of(c.Abort)) == 1
    world.finish(running)
    assert len(world.of(c.Shadow)) == 1


# --- whose expense ---------------------------------------------------------------------------------------------------


def test_a_shadow_is_nobodys_request_and_its_energy_is_waste() -> None:
    world = world_of()
    world.scheduler.handle(e.CounterRead(world.t_us, reading(world, 0)))
    request_id = serve(world)
    assert world.scheduler.num_pending == 0
    assert world.conserved()
    world.t_us += 1_000_000
    judge(world, world.of(c.Shadow)[0], 0.0)
    settled = []
    for mj in (5_000, 9_000, 12_000):
        world.t_us += 6_000_000
        settled += world.post(e.CounterRead(world.t_us, reading(world, mj)))
    account = world.scheduler.ledger.accounts()[0]
    assert account.wasted_mj.get("shadow", 0) > 0
    assert account.residue_mj == 0
    assert {command.request_id for command in settled if isinstance(command, c.Settle)} <= {request_id}


def reading(world: CoreWorld, energy_mj: int) -> CounterReading:
    return CounterReading(domain="gpu:0", t_us=world.t_us, energy_mj=energy_mj)


# --- verdicts --------------------------------------------------------------------------------------------------------


def test_enough_wrong_answers_withdraw_the_mode_for_that_task() -> None:
    world = world_of()
    told = withdraw(world).withdrawal
    assert (told.mode, told.recipe, told.task, told.gate) == ("m1", "m1", "copy", "c")
    assert told.capital >= 20
    assert told.difference == -1.0
    assert told.num_pairs < 60
    world.submit(task="copy", mode_hint="m1", mode_strict=True)
    refused = list(world.rejected.values())[-1]
    assert refused.error_code == "quality_unreachable"
    assert "m1 withdrawn in production on copy" in refused.message
    assert world.mode_of(world.submit(task="sort", mode_hint="m1", mode_strict=True)) == "m1"


def test_a_shadow_that_came_to_nothing_says_nothing() -> None:
    world = world_of()
    for _ in range(100):
        serve(world)
        judge(world, world.of(c.Shadow)[-1], None)
    assert not world.of(c.Withdraw)
    assert world.scheduler.shadows.num_came_to_nothing == 100
    assert world.scheduler.shadows.num_running == 0


def test_an_equal_mode_keeps_its_certificate_on_free_text() -> None:
    """Its words differ from the reference's more often than on the gate's short answers; somebody is told, once."""
    world = world_of()
    for number in range(1_000):
        serve(world, task="copy")
        judge(world, world.of(c.Shadow)[-1], None, agrees=number % 33 != 0)
    assert not world.of(c.Withdraw)
    trial = world.scheduler.shadows.trial(1, "copy")
    assert trial is not None
    assert (trial.num_scored, trial.num_unscored, trial.num_disagree, trial.capital) == (0, 1_000, 31, 1.0)
    assert [(doubt.mode, doubt.task, doubt.gate_agreement) for doubt in world.scheduler.shadows.take_doubts()] == [
        ("m1", "copy", 1.0)
    ]
    assert not world.scheduler.shadows.take_doubts(), "it is said once"


def test_a_trial_goes_on_in_another_process_where_it_stopped(tmp_path: Path) -> None:
    def losing(world: CoreWorld, num: int) -> int:
        """Pairs of which each fifth is lost, until the mode is withdrawn."""
        for number in range(num):
            serve(world)
            judge(world, world.of(c.Shadow)[-1], -1.0 if number % 5 == 0 else 0.0)
            if world.of(c.Withdraw):
                return number + 1
        return num

    whole = losing(world_of(), 500)
    assert 20 < whole < 500
    first, second = world_of(), world_of()
    losing(first, 20)
    keep_trials(tmp_path / "state" / "trials.json", PASSED, 0.015, first.scheduler.shadows.dump())
    second.scheduler.shadows.load(load_trials(tmp_path / "state" / "trials.json", PASSED, 0.015))
    assert second.scheduler.shadows.dump() == first.scheduler.shadows.dump()
    assert losing(second, 500) == whole - 20
    told = second.of(c.Withdraw)[0].withdrawal
    assert told.num_pairs == whole


def test_a_trial_of_another_recipe_is_not_taken_up() -> None:
    first, second = world_of(), world_of()
    serve(first)
    judge(first, first.of(c.Shadow)[-1], -1.0)
    (tried,) = first.scheduler.shadows.dump()
    second.scheduler.shadows.load([msgspec.structs.replace(tried, recipe="changed")])
    assert second.scheduler.shadows.trial(1, "copy") is None


def test_a_torn_or_foreign_file_of_trials_is_ignored_with_a_warning(tmp_path: Path) -> None:
    file = tmp_path / "trials.json"
    assert load_trials(file, PASSED, 0.015) == ()
    keep_trials(file, PASSED, 0.015, [])
    whole = file.read_bytes()
    other = msgspec.structs.replace(PASSED, checksum="measured again")
    for content, gate, delta in ((whole[:-9], PASSED, 0.015), (b"\xff", PASSED, 0.015), (whole, other, 0.015),
                                 (whole, PASSED, 0.03)):  # fmt: skip
        file.write_bytes(content)
        with capture_logs() as logged:
            assert load_trials(file, gate, delta) == ()
        assert [line["event"] for line in logged] == ["trials_ignored"]


def test_no_doubt_where_answers_agree_as_at_the_gate() -> None:
    world = world_of()
    for number in range(300):
        serve(world, task="copy")
        judge(world, world.of(c.Shadow)[-1], None, agrees=number % 100 != 99)
    assert not world.scheduler.shadows.take_doubts()


def test_who_waits_for_a_withdrawn_mode_goes_elsewhere_or_gets_the_error() -> None:
    world = world_of(slots=1)
    serve(world)
    shadow = world.of(c.Shadow)[-1]
    trial = world.scheduler.shadows
    judge(world, shadow, -1.0)
    made = trial.trial(1, "copy")
    assert made is not None
    while made.capital * 0.05 < 0.9:
        made.add(-1.0)
    serve(world)
    last = world.of(c.Shadow)[-1]
    busy = world.submit(task="copy", mode_hint="m1", mode_strict=True)
    reference = world.submit(task="copy", mode_hint="m0", mode_strict=True)
    strict = world.submit(task="copy", mode_hint="m1", mode_strict=True)
    either = world.submit(task="copy")
    sort = world.submit(task="sort", mode_hint="m1", mode_strict=True)
    assert world.scheduler.queue.num_waiting == 3
    judge(world, last, -1.0)
    assert world.of(c.Withdraw)
    assert world.outcomes[strict].error_code == "quality_unreachable"
    assert "withdrawn" in world.outcomes[strict].message
    assert world.scheduler.queue.num_waiting == 2
    world.finish(busy)
    assert world.mode_of(sort) == "m1"
    assert either not in world.running
    world.finish(reference)
    assert world.mode_of(either) == "m0"
    world.finish(either)
    world.finish(sort)
    assert world.conserved()
    assert world.scheduler.num_pending == 0


def test_a_request_that_is_being_stored_when_its_mode_is_withdrawn_gets_the_error() -> None:
    world = world_of()
    world.hold_appends = True
    request_id = world.submit(task="copy", mode_hint="m1", mode_strict=True)
    world.scheduler.certificates.withdraw(1, "copy", 1, -1.0, 20.0)
    world.scheduler._remask(world.t_us)
    world.appended(request_id)
    assert world.outcomes[request_id].error_code == "quality_unreachable"
    assert world.conserved()


# --- all masked ------------------------------------------------------------------------------------------------------


def test_all_masked_is_an_error_that_lists_every_reason() -> None:
    world = world_of()
    world.submit(task="copy", mode_hint="m1", mode_strict=True, quality_floor=0.95)
    told = world.rejected["r1"]
    assert (told.error_code, told.message) == (
        "quality_unreachable",
        "quality_floor 0.95 is above every allowed mode (m1 0.9)",
    )
    world.submit(task="copy", quality_floor=0.99)
    assert "m0 0.97; m1 0.9" in world.rejected["r2"].message


def test_all_masked_goes_to_the_reference_where_the_configuration_says_so() -> None:
    world = world_of(all_masked="reference")
    request_id = world.submit(task="copy", quality_floor=0.99)
    decision = world.running[request_id].decision
    assert (decision.mode, decision.reason) == ("m0", "the reference mode: quality forbids every other")
    world.submit(task="copy", quality_floor=0.99, mode_hint="m1", mode_strict=True)
    assert world.rejected["r2"].error_code == "quality_unreachable", "a strict hint is not overruled"

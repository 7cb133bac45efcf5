"""The scheduler, path by path: an event in, commands out."""

from __future__ import annotations

import pytest

from msd.core import commands as c
from msd.core import events as e
from msd.core.entry import Phase
from msd.domain import CounterReading, EngineLoad, ExitKind, GpuView, Mask, Slo
from tests.unit.core_world import MAX_MODEL_LEN, CoreWorld, make_config


def kinds(commands: list[c.Command]) -> list[str]:
    return [type(command).__name__ for command in commands]


def full_world(**options: object) -> CoreWorld:
    """One mode with one slot, and a request (r1) in it."""
    world = CoreWorld(make_config(modes=1, slots=1, **options))  # type: ignore[arg-type]
    assert world.submit() in world.running
    return world


# --- a whole life -----------------------------------------------------------------------------------------------------


def test_a_request_is_stored_acked_dispatched_stored_again_and_delivered() -> None:
    world = CoreWorld(make_config(modes=1))
    request_id = world.submit(num_prompt_tokens=16, max_tokens=8)
    world.t_us += 5_000
    world.first_token(request_id)
    world.t_us += 9_000
    world.finish(request_id, "length", 4)
    assert kinds(world.log) == ["Append", "Ack", "Dispatch", "Complete", "Observe", "Deliver"]
    outcome = world.delivered[request_id]
    assert (outcome.finish_reason, outcome.attempt, outcome.mode) == ("length", 1, "m0")
    assert (outcome.num_prompt_tokens, outcome.num_completion_tokens) == (16, 4)
    timings = outcome.timings
    assert (timings.queue_ms, timings.ttft_ms, timings.tpot_ms) == (0.0, 5.0, 3.0)
    assert timings.engine_ms == timings.e2e_ms == 14.0
    assert outcome.energy is None
    assert world.conserved()
    assert world.scheduler.counts.delivered == 1


def test_nothing_is_promised_before_it_is_stored() -> None:
    world = CoreWorld(make_config(modes=1))
    world.hold_appends = world.hold_completes = True
    request_id = world.submit()
    assert kinds(world.log) == ["Append"]
    assert kinds(world.appended(request_id)) == ["Ack", "Dispatch"]
    assert kinds(world.finish(request_id)) == ["Complete", "Observe"]
    assert world.scheduler.num_pending == 1
    assert kinds(world.completed(request_id)) == ["Deliver"]
    assert world.scheduler.num_pending == 0


def test_a_decision_says_what_it_saw() -> None:
    world = CoreWorld(make_config(modes=2))
    view = GpuView(t_us=world.t_us, source="simulated", memory_used_bytes=5)
    world.post(e.ViewTaken(world.t_us, view))
    world.t_us += 3_000
    request_id = world.submit(task="gsm8k", deadline_ms=1_000)
    decision = world.running[request_id].decision
    assert decision.view == view
    assert decision.features.view_age_us == 3_000
    assert decision.features.slack_us == 1_000_000
    assert decision.features.task == "gsm8k"
    assert [candidate.mode for candidate in decision.candidates] == ["m0", "m1"]
    assert decision.candidates[0].ttft_ms == pytest.approx(10.0)
    assert (decision.decision_id, decision.attempt) == (f"{request_id}.1", 1)
    assert world.scheduler.decisions[-1] is decision
    assert world.scheduler.reasons[decision.mode, decision.reason] == 1


def test_energy_settles_after_delivery_and_teaches_the_estimate() -> None:
    world = CoreWorld(make_config(modes=1))
    estimate = world.scheduler.fleet.books[0].estimate

    def read(energy_mj: int) -> list[c.Command]:
        world.t_us += 100_000
        reading = CounterReading(domain="gpu:0", t_us=world.t_us, energy_mj=energy_mj, idle_w=10.0, power_w=90.0)
        return world.post(e.CounterRead(world.t_us, reading))

    read(0)
    request_id = world.submit(num_prompt_tokens=16)
    world.t_us += 50_000
    world.first_token(request_id)
    world.t_us += 40_000
    world.finish(request_id, "stop", 4)
    provisional = world.delivered[request_id].energy
    assert provisional is not None
    assert not provisional.settled
    assert estimate.mj_per_token is None
    settled = [command for mj in (9_000, 18_000) for command in read(mj) if isinstance(command, c.Settle)]
    assert [(command.request_id, command.energy.settled) for command in settled] == [(request_id, True)]
    assert estimate.mj_per_token == pytest.approx(settled[0].energy.dynamic_mj / 20)
    assert [accounts.residue_mj for accounts in world.scheduler.ledger.accounts()] == [0]


@pytest.mark.parametrize(
    ("slo", "met"),
    [
        (Slo(), None),
        (Slo(ttft_ms=6.0), True),
        (Slo(ttft_ms=4.0), False),
        (Slo(tpot_ms=2.9), False),
        (Slo(ttft_ms=6.0, tpot_ms=3.1, deadline_ms=14.5), True),
        (Slo(deadline_ms=13.0), False),
    ],
)
def test_the_policy_hears_whether_the_slo_was_met(slo: Slo, met: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    world = CoreWorld(make_config(modes=1))
    heard = []
    policy = world.scheduler._router.policy
    monkeypatch.setattr(policy, "update", lambda decision, observation: heard.append((decision, observation)))
    request_id = world.submit(slo=slo)
    decision = world.running[request_id].decision
    world.t_us += 5_000
    world.first_token(request_id)
    world.t_us += 9_000
    world.finish(request_id, "stop", 4)
    assert [(told, observation.slo_met) for told, observation in heard] == [(decision, met)]


# --- refusals at the door ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"model": "toi"}, "mode_unavailable", ["'toi'", "did you mean 'toy'?"]),
        ({"model": "zzzz"}, "mode_unavailable", ["'zzzz'", "known: toy"]),
        ({"mode_hint": "m00", "mode_strict": True}, "mode_unavailable", ["'m00'", "did you mean 'm0'?"]),
        ({"quality_floor": 0.95}, "quality_unreachable", ["0.95", "m0 0.9", "m1 unknown"]),
        ({"num_prompt_tokens": 4_000, "max_tokens": 97}, "context_overflow", ["4000", "97", "4097", "4096"]),
        ({"deadline_ms": 1}, "deadline_infeasible", ["10.0 ms", "deadline_ms is 1"]),
    ],
)
def test_a_refusal_names_its_reason_and_holds_no_key(fields: dict[str, object], code: str, words: list[str]) -> None:
    world = CoreWorld(make_config(engines={"m0": {"quality": 0.9}}))
    request_id = world.submit(client_request_id="mine", **fields)
    refusal = world.rejected[request_id]
    assert refusal.error_code == code
    for word in words:
        assert word in refusal.message
    assert kinds(world.log) == ["Reject"]
    assert world.scheduler.errors[code] == 1
    assert world.conserved()
    again = world.submit(client_request_id="mine")
    assert again in world.running


def test_a_strict_hint_for_a_mode_of_another_model_is_refused() -> None:
    world = CoreWorld(make_config(engines={"m1": {"model": "other"}}))
    request_id = world.submit(model="toy", mode_hint="m1", mode_strict=True)
    assert world.rejected[request_id].error_code == "mode_unavailable"
    assert "'m1' does not serve model 'toy'" in world.rejected[request_id].message


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"max_waiting": 2}, "max_waiting = 2"),
        ({"max_waiting_tokens": 60}, "max_waiting_tokens = 60"),
        ({"max_waiting_per_tenant": 2}, "max_waiting_per_tenant = 2"),
    ],
)
def test_a_full_queue_refuses_and_says_when_to_come_back(limits: dict[str, object], words: str) -> None:
    world = full_world(limits=limits)
    assert [world.submit() in world.rejected for _ in range(3)] == [False, False, True]
    refusal = world.rejected["r4"]
    assert (refusal.error_code, words in refusal.message) == ("queue_full", True)
    assert refusal.retry_after_ms is not None
    assert 50 <= refusal.retry_after_ms <= 30_000
    world.finish("r1")
    assert world.submit() not in world.rejected


def test_the_tenant_bound_is_each_tenants_own() -> None:
    world = full_world(limits={"max_waiting_per_tenant": 1})
    assert world.submit(tenant="a") not in world.rejected
    assert world.submit(tenant="a") in world.rejected
    assert world.submit(tenant="b") not in world.rejected


def test_the_time_to_come_back_grows_with_the_queue() -> None:
    world = full_world(limits={"max_waiting": 40})
    for _ in range(40):
        world.submit()
    world.t_us += 400_000
    world.finish("r1")
    world.submit()
    refusal = world.rejected[world.submit()]
    assert refusal.retry_after_ms == 40 * 400


def test_what_is_being_stored_counts_as_waiting() -> None:
    world = CoreWorld(make_config(modes=1, limits={"max_waiting": 2}))
    world.hold_appends = True
    assert [world.submit() in world.rejected for _ in range(3)] == [False, False, True]


@pytest.mark.parametrize(("total", "refused"), [(MAX_MODEL_LEN - 1, 0), (MAX_MODEL_LEN, 0), (MAX_MODEL_LEN + 1, 1)])
def test_the_context_limit_is_exact(total: int, refused: int) -> None:
    world = CoreWorld(make_config(modes=1))
    world.submit(num_prompt_tokens=total - 10, max_tokens=10)
    assert (len(world.rejected), len(world.running)) == (refused, 1 - refused)


def test_a_long_request_goes_to_the_mode_with_the_long_context_only() -> None:
    world = CoreWorld(make_config(slots=1, engines={"m1": {"sim": {"max_model_len": 9_000}}}), up=False)
    world.engine_up("m0")
    world.engine_up("m1", max_model_len=9_000)
    request_id = world.submit(num_prompt_tokens=5_000)
    assert world.mode_of(request_id) == "m1"
    assert world.running[request_id].decision.candidates[0].mask == Mask.CONTEXT
    refused = world.submit(num_prompt_tokens=9_000)
    assert "9000" in world.rejected[refused].message


def test_a_context_known_late_ends_the_request_and_hides_nobody() -> None:
    engines: dict[str, dict[str, object]] = {name: {"kind": "noop"} for name in ("m0", "m1")}
    world = CoreWorld(make_config(slots=1, engines=engines), up=False)
    long = [world.submit(num_prompt_tokens=5_000) for _ in range(10)]
    short = world.submit()
    assert not world.rejected
    world.engine_up("m0")
    # m1 may have a longer context: they wait for it. The short one must not wait behind them.
    assert list(world.running) == [short]
    assert not world.outcomes
    world.engine_up("m1", max_model_len=MAX_MODEL_LEN + 1)
    assert {world.outcomes[request_id].error_code for request_id in long} == {"context_overflow"}
    assert "m0 4096, m1 4097" in world.outcomes[long[0]].message
    assert world.scheduler.admission.num_reserved == 0
    assert world.conserved()


def test_ten_long_requests_for_a_mode_that_is_down_hide_nobody() -> None:
    world = CoreWorld(make_config(slots=1, engines={"m1": {"sim": {"max_model_len": 9_000}}}), up=False)
    world.engine_up("m0")
    long = [world.submit(num_prompt_tokens=5_000) for _ in range(10)]
    short = world.submit()
    assert list(world.running) == [short]
    world.engine_up("m1", max_model_len=9_000)
    assert world.mode_of(long[0]) == "m1"


# --- hints, quality ---------------------------------------------------------------------------------------------------


def test_a_soft_hint_is_followed_while_it_can_be() -> None:
    world = CoreWorld(make_config(slots=1))
    first = world.submit(mode_hint="m1")
    assert world.mode_of(first) == "m1"
    assert world.running[first].decision.reason == "asked for by the producer"
    assert world.mode_of(world.submit(mode_hint="m1")) == "m0"
    world.finish(first)
    assert world.mode_of(world.submit(mode_hint="nonesuch")) == "m1"


def test_a_strict_hint_waits_for_its_mode_and_hides_nobody() -> None:
    world = CoreWorld(make_config(slots=1))
    first, second = (world.submit(mode_hint="m1", mode_strict=True) for _ in range(2))
    other = world.submit()
    assert world.mode_of(other) == "m0"
    assert second not in world.running
    world.finish(first)
    assert world.mode_of(second) == "m1"


def test_a_strict_hint_waits_for_a_mode_that_is_down() -> None:
    world = CoreWorld(make_config(), up=False)
    world.engine_up("m0")
    request_id = world.submit(mode_hint="m1", mode_strict=True)
    assert not world.running
    world.engine_up("m1")
    assert world.mode_of(request_id) == "m1"


@pytest.mark.parametrize(("floor", "modes"), [(None, {"m0", "m1"}), (0.0, {"m0", "m1"}), (0.5, {"m1"}), (0.9, {"m1"})])
def test_the_quality_floor_masks(floor: float | None, modes: set[str]) -> None:
    world = CoreWorld(make_config(engines={"m1": {"quality": 0.9}}, slots=8))
    assert {world.mode_of(world.submit(quality_floor=floor)) for _ in range(4)} == modes


# --- repeats ----------------------------------------------------------------------------------------------------------


def test_a_repeat_while_the_first_is_being_stored_is_answered_after_it() -> None:
    world = full_world()
    world.hold_appends = True
    first = world.submit(client_request_id="k")
    second = world.submit(client_request_id="k")
    assert kinds(world.log[-1:]) == ["Append"]
    assert world.scheduler.num_pending == 3
    assert world.conserved()
    commands = world.appended(first)
    assert commands == [c.Ack(first, commands[0].seq), c.AckDuplicate(second, first, "waiting")]  # type: ignore[union-attr]
    assert world.conserved()


def test_a_repeat_is_told_where_the_first_one_stands() -> None:
    world = full_world()
    world.hold_completes = True
    waiting = world.submit(client_request_id="k")
    states = [world.submit(client_request_id="k")]
    world.finish("r1")
    states.append(world.submit(client_request_id="k"))
    world.finish(waiting)
    states.append(world.submit(client_request_id="k"))
    world.completed("r1")
    world.completed(waiting)
    told = world.of(c.AckDuplicate)
    assert [(command.request_id, command.state) for command in told] == list(
        zip(states, ("waiting", "running", "running"), strict=True)
    )
    assert {command.existing_id for command in told} == {waiting}
    assert world.scheduler.counts.duplicates == 3
    assert world.conserved()


@pytest.mark.parametrize("held", [True, False])
def test_the_same_key_with_another_body_is_a_conflict(held: bool) -> None:
    world = CoreWorld(make_config())
    world.hold_appends = held
    world.submit(client_request_id="k")
    second = world.submit(client_request_id="k", content_hash=b"other")
    assert world.rejected[second].error_code == "idempotency_conflict"
    assert "'k'" in world.rejected[second].message
    assert world.submit(client_request_id="k", tenant="someone else") not in world.rejected
    assert world.conserved()


def test_repeats_of_one_request_are_bounded() -> None:
    world = CoreWorld(make_config())
    world.hold_appends = True
    first = world.submit(client_request_id="k")
    repeats = [world.submit(client_request_id="k") for _ in range(65)]
    assert list(world.rejected) == [repeats[-1]]
    assert world.rejected[repeats[-1]].error_code == "queue_full"
    world.appended(first)
    assert len(world.of(c.AckDuplicate)) == 64
    assert world.conserved()


def test_a_key_of_a_finished_request_is_known_to_the_journal() -> None:
    world = CoreWorld(make_config())
    world.hold_appends = True
    first = world.submit(client_request_id="k")
    repeat = world.submit(client_request_id="k")
    commands = world.append_duplicated(first, "old", b"h")
    assert commands == [c.AckDuplicate(first, "old", "finished"), c.AckDuplicate(repeat, "old", "finished")]
    conflicting = world.submit(client_request_id="k")
    world.append_duplicated(conflicting, "old", b"other")
    assert world.rejected[conflicting].error_code == "idempotency_conflict"
    assert (world.scheduler.num_pending, world.scheduler.admission.num_reserved) == (0, 0)
    assert world.conserved()


def test_a_journal_that_cannot_store_promises_nothing() -> None:
    world = CoreWorld(make_config())
    world.hold_appends = True
    first = world.submit(client_request_id="k")
    repeat = world.submit(client_request_id="k")
    world.append_failed(first)
    assert [world.rejected[id_].error_code for id_ in (first, repeat)] == ["journal_unavailable"] * 2
    assert world.rejected[first].retry_after_ms == 1_000
    assert (world.scheduler.num_pending, world.scheduler.admission.num_reserved) == (0, 0)
    assert world.conserved()
    world.hold_appends = False
    assert world.submit(client_request_id="k") in world.running


# --- cancel -----------------------------------------------------------------------------------------------------------


def test_cancel_while_it_is_being_stored() -> None:
    world = CoreWorld(make_config())
    world.hold_appends = True
    request_id = world.submit()
    assert world.cancel(request_id) == []
    assert kinds(world.appended(request_id)) == ["Ack", "Complete", "Deliver"]
    assert world.delivered[request_id].finish_reason == "abort"
    assert world.scheduler.counts.aborted == 1
    assert world.scheduler.admission.num_reserved == 0


def test_cancel_while_it_waits() -> None:
    world = full_world()
    request_id = world.submit()
    world.t_us += 7_000
    assert kinds(world.cancel(request_id)) == ["Complete", "Deliver"]
    outcome = world.delivered[request_id]
    assert (outcome.finish_reason, outcome.attempt, outcome.reason) == ("abort", 0, "cancelled before it ran")
    assert outcome.timings.queue_ms == 7.0
    assert len(world.scheduler.queue) == 0
    world.finish("r1")
    assert not world.running


def test_cancel_while_it_runs_frees_the_slot_for_the_next() -> None:
    world = full_world()
    world.hold_aborts = True
    waiting = world.submit()
    assert world.cancel("r1") == [c.Abort("r1", 1)]
    assert world.cancel("r1") == []
    assert waiting not in world.running
    assert kinds(world.finish("r1", "abort", 2)) == ["Complete", "Dispatch", "Deliver"]
    outcome = world.delivered["r1"]
    assert (outcome.finish_reason, outcome.num_completion_tokens, outcome.mode) == ("abort", 2, "m0")
    assert waiting in world.running
    assert world.conserved()


def test_a_finish_may_win_against_cancel() -> None:
    world = full_world()
    world.hold_aborts = True
    world.cancel("r1")
    world.finish("r1", "stop", 3)
    assert world.delivered["r1"].finish_reason == "stop"
    assert world.scheduler.counts.delivered == 1


def test_cancel_after_the_end_changes_nothing() -> None:
    world = full_world()
    world.hold_completes = True
    world.finish("r1")
    assert world.scheduler.entry("r1") is not None
    assert world.cancel("r1") == []
    assert kinds(world.completed("r1")) == ["Deliver"]
    assert world.cancel("r1") == []
    assert world.cancel("unknown") == []
    assert world.delivered["r1"].finish_reason == "stop"


def test_a_cancelled_request_is_not_attempted_again() -> None:
    world = full_world()
    world.hold_aborts = True
    world.cancel("r1")
    world.lose("m0")
    outcome = world.delivered["r1"]
    assert (outcome.finish_reason, outcome.reason) == ("abort", "cancelled after its engine was lost")
    assert not world.of(c.Restart)
    assert world.conserved()


# --- deadlines --------------------------------------------------------------------------------------------------------


def test_a_deadline_is_infeasible_only_if_every_eligible_engine_says_so() -> None:
    world = CoreWorld(make_config(), up=False)
    world.engine_up("m0")
    assert world.submit(deadline_ms=1) not in world.rejected, "m1 is not up: nobody knows how fast it is"
    assert world.submit(deadline_ms=1, mode_hint="m0", mode_strict=True) in world.rejected
    world.engine_up("m1")
    assert world.submit(deadline_ms=1) in world.rejected
    assert world.submit(deadline_ms=11) not in world.rejected


def test_what_waits_past_its_deadline_is_answered_at_the_tick() -> None:
    world = full_world()
    request_id = world.submit(deadline_ms=100)
    later = world.submit(deadline_ms=101)
    world.wait(99.9)
    assert not world.outcomes
    assert kinds(world.wait(0.1)) == ["Complete", "Deliver"]
    outcome = world.delivered[request_id]
    assert (outcome.finish_reason, outcome.error_code) == (None, "deadline_exceeded")
    assert "waited 100 ms" in outcome.message
    world.wait(1)
    assert world.delivered[later].error_code == "deadline_exceeded"
    assert world.scheduler.errors["deadline_exceeded"] == 2
    assert world.scheduler.counts.failed == 2
    assert world.conserved()


def test_the_deadline_error_names_what_kept_each_mode_from_it() -> None:
    world = CoreWorld(make_config(modes=3, slots=2, engines={"m2": {"model": "other"}}), kv_capacity_tokens=200)
    only_m0: dict[str, object] = {"mode_hint": "m0", "mode_strict": True, "ignore_eos": True}
    world.submit(num_prompt_tokens=100, max_tokens=50, **only_m0)
    world.post(e.EngineLost(world.t_us, "m1", ExitKind.DIED, "died"))
    request_id = world.submit(num_prompt_tokens=100, max_tokens=50, model="toy", deadline_ms=100)
    assert request_id not in world.running
    world.wait(100)
    assert world.delivered[request_id].message == (
        "waited 100 ms, past its deadline; no mode could take it: m0 (no KV memory left for it now), "
        "m1 (its engine is not up), m2 (serves another model)"
    )


def test_the_deadline_error_of_what_waited_by_choice_blames_no_mode() -> None:
    world = CoreWorld(make_config(modes=2, slots=1, policy={"name": "fixed", "mode": "m0"}))
    world.submit()
    request_id = world.submit(deadline_ms=100)
    world.wait(100)
    assert world.delivered[request_id].message == "waited 100 ms, past its deadline"


def test_no_slot_for_what_is_late_already_between_two_ticks() -> None:
    world = full_world()
    late = world.submit(deadline_ms=100)
    patient = world.submit()
    world.t_us += 100_000
    world.finish("r1")
    assert world.delivered[late].error_code == "deadline_exceeded"
    assert list(world.running) == [patient]
    assert world.scheduler.admission.num_reserved == 0
    assert world.conserved()


def test_a_running_request_may_be_late() -> None:
    world = CoreWorld(make_config())
    request_id = world.submit(deadline_ms=50)
    world.wait(100)
    assert not world.outcomes
    world.finish(request_id)
    assert world.delivered[request_id].finish_reason == "stop"


def test_a_retry_keeps_its_deadline() -> None:
    world = CoreWorld(make_config(modes=1))
    request_id = world.submit(deadline_ms=50)
    world.wait(20)
    world.lose("m0")
    assert world.scheduler.entry(request_id) is not None
    world.wait(30)
    assert world.delivered[request_id].error_code == "deadline_exceeded"
    assert "waited 50 ms" in world.delivered[request_id].message


def test_a_retry_whose_deadline_passed_while_it_ran_is_answered_too() -> None:
    world = CoreWorld(make_config(modes=1))
    request_id = world.submit(deadline_ms=50)
    world.wait(60)
    world.lose("m0")
    assert not world.outcomes
    world.wait(0)
    assert world.delivered[request_id].error_code == "deadline_exceeded"


def test_many_expiries_are_spread_over_ticks_and_none_is_dispatched_meanwhile() -> None:
    world = CoreWorld(make_config(modes=1, slots=1, limits={"max_waiting": 3_000}), up=False)
    for _ in range(2_500):
        world.submit(deadline_ms=10)
    world.wait(10)
    assert len(world.outcomes) == 1_000
    world.engine_up("m0")
    assert not world.running
    for _ in range(2):
        world.wait(0)
    assert len(world.delivered) == 2_500
    assert world.scheduler.counts.failed == 2_500
    assert not world.running


def test_when_only_a_full_mode_is_in_time_the_request_waits_for_it() -> None:
    world = CoreWorld(make_config(slots=1), up=False)
    slow = world.scheduler.fleet.books[1].estimate
    world.engine_up("m0")
    world.engine_up("m1")
    slow.ttft.a = 500.0
    assert world.mode_of(world.submit(mode_hint="m0")) == "m0"
    request_id = world.submit(deadline_ms=100)
    entry = world.scheduler.entry(request_id)
    assert entry is not None
    assert (entry.phase, entry.parked) == (Phase.WAITING, 0)
    assert world.scheduler.fleet.books[0].num_parked == 1
    world.finish("r1")
    assert world.mode_of(request_id) == "m0"
    assert world.scheduler.fleet.books[0].num_parked == 0
    assert world.running[request_id].decision.candidates[1].mask == Mask.DEADLINE


def test_a_full_mode_is_in_time_for_so_many_only() -> None:
    """Each that waits for it makes the wait of the next longer; at last late beats never."""
    world = CoreWorld(make_config(slots=1))
    fast, slow = (book.estimate for book in world.scheduler.fleet.books)
    fast.service_ms = 40.0
    slow.ttft.a = 500.0
    world.submit(mode_hint="m0")
    parked = [world.submit(deadline_ms=150) for _ in range(4)]
    assert world.scheduler.fleet.books[0].num_parked == 3
    assert [id_ for id_ in parked if id_ in world.running] == [parked[-1]]
    assert world.mode_of(parked[-1]) == "m1"
    assert not any(candidate.mask & Mask.DEADLINE for candidate in world.running[parked[-1]].decision.candidates)


# --- engines that die -------------------------------------------------------------------------------------------------


def test_a_lost_engines_request_runs_elsewhere() -> None:
    world = CoreWorld(make_config(policy={"name": "fixed", "mode": "m0"}))
    request_id = world.submit()
    world.t_us += 10_000
    log = world.fail(request_id, lost=True)
    assert kinds(log) == ["Restart", "Dispatch"]
    assert log[0] == c.Restart(request_id, 2, "engine_lost")
    dispatch = world.running[request_id]
    assert (dispatch.attempt, dispatch.decision.mode, dispatch.waited_us) == (2, "m1", 0)
    assert dispatch.decision.candidates[0].mask == Mask.HEALTH
    world.finish(request_id)
    assert world.delivered[request_id].attempt == 2
    assert world.scheduler.counts.restarts == 1


def test_nothing_is_sent_to_an_engine_whose_requests_died_before_it_is_reported() -> None:
    world = CoreWorld(make_config(modes=1, slots=2))
    first = world.submit()
    world.fail(first, lost=True)
    assert not world.running
    second = world.submit()
    assert not world.running
    world.lose("m0")
    world.engine_up("m0")
    assert set(world.running) == {first, second}


def test_a_request_whose_engines_all_die_is_given_up() -> None:
    world = CoreWorld(make_config(modes=1, limits={"max_attempts": 3}))
    request_id = world.submit()
    for _ in range(2):
        world.lose("m0")
        world.engine_up("m0")
        assert request_id in world.running
    world.lose("m0")
    outcome = world.delivered[request_id]
    assert (outcome.error_code, outcome.attempt) == ("dead_letter", 3)
    assert "3 attempts" in outcome.message
    assert world.conserved()


def test_a_retry_goes_before_what_came_later() -> None:
    world = full_world()
    later = world.submit()
    world.lose("m0")
    world.engine_up("m0")
    assert list(world.running) == ["r1"]
    world.finish("r1")
    assert list(world.running) == [later]


def test_a_request_that_its_engine_refuses_is_not_attempted_again() -> None:
    world = full_world()
    world.fail("r1", "context_overflow")
    outcome = world.delivered["r1"]
    assert (outcome.error_code, outcome.message, outcome.attempt) == ("context_overflow", "it broke", 1)
    assert world.submit() in world.running, "the engine is as well as before"


def test_late_reports_of_older_attempts_are_nothing() -> None:
    world = CoreWorld(make_config())
    request_id = world.submit()
    world.fail(request_id, lost=True)
    assert world.running[request_id].attempt == 2
    for event in (
        e.FirstToken(world.t_us, request_id, 1, 0),
        e.Finished(world.t_us, request_id, 1, "stop", 9),
        e.Failed(world.t_us, request_id, 1, "internal", "late", True),
        e.Finished(world.t_us, "unknown", 1, "stop", 9),
    ):
        assert world.post(event) == []
    entry = world.scheduler.entry(request_id)
    assert entry is not None
    assert (entry.phase, entry.first_token_us) == (Phase.RUNNING, 0)
    assert len([book for book in world.scheduler.fleet.books if book.up]) == 1
    world.finish(request_id, "stop", 2)
    assert world.delivered[request_id].num_completion_tokens == 2


def test_with_every_engine_down_requests_wait() -> None:
    world = CoreWorld(make_config(), up=False)
    request_id = world.submit()
    world.wait(60_000)
    assert not world.outcomes
    world.engine_up("m1")
    assert world.mode_of(request_id) == "m1"


# --- parked -----------------------------------------------------------------------------------------------------------


def fixed_world() -> CoreWorld:
    """Policy `fixed` on m0, which is full with r1; r2 waits for it although m1 is free."""
    world = CoreWorld(make_config(slots=1, policy={"name": "fixed", "mode": "m0"}))
    world.submit()
    world.submit()
    assert list(world.running) == ["r1"]
    return world


def test_a_parked_request_waits_for_the_mode_that_the_policy_chose() -> None:
    world = fixed_world()
    hinted = world.submit(mode_hint="m1")
    assert world.mode_of(hinted) == "m1", "a parked request hides nobody"
    world.finish(hinted)
    assert "r2" not in world.running
    world.finish("r1")
    assert world.mode_of("r2") == "m0"


def test_parking_ends_when_the_mode_goes_down() -> None:
    world = fixed_world()
    world.lose("m0")
    # r1, the retry, has the one slot of m1; r2 is next there.
    assert world.mode_of("r1") == "m1"
    world.finish("r1")
    assert world.mode_of("r2") == "m1"
    assert world.scheduler.fleet.books[0].num_parked == 0


def test_parking_holds_again_when_the_mode_comes_back_in_time() -> None:
    world = fixed_world()
    world.lose("m0")
    world.engine_up("m0")
    assert (world.mode_of("r1"), world.mode_of("r2")) == ("m1", "m0")
    world.submit()
    world.finish("r1")
    assert "r3" not in world.running
    world.finish("r2")
    assert world.mode_of("r3") == "m0"


@pytest.mark.parametrize("how", ["cancel", "deadline", "drain"])
def test_a_parked_request_that_ends_leaves_the_books(how: str) -> None:
    world = CoreWorld(make_config(slots=1, policy={"name": "fixed", "mode": "m0"}))
    world.submit()
    request_id = world.submit(deadline_ms=1_000)
    assert world.scheduler.fleet.books[0].num_parked == 1
    if how == "cancel":
        world.cancel(request_id)
    elif how == "deadline":
        world.wait(1_000)
    else:
        world.drain(100)
    assert request_id in world.delivered
    assert world.scheduler.fleet.books[0].num_parked == 0
    assert len(world.scheduler.queue) == 0


# --- memory -----------------------------------------------------------------------------------------------------------


def memory_world(**options: object) -> CoreWorld:
    """One mode with four slots and 200 KV tokens, of which r1 has 150 (`ignore_eos`: the output is known)."""
    world = CoreWorld(make_config(**{"modes": 1, "slots": 4, **options}), kv_capacity_tokens=200)  # type: ignore[arg-type]
    assert world.submit(num_prompt_tokens=100, max_tokens=50, ignore_eos=True) in world.running
    return world


def test_the_memory_mask_holds_back_what_does_not_fit() -> None:
    world = memory_world()
    big = world.submit(num_prompt_tokens=50, max_tokens=1, ignore_eos=True)
    assert big not in world.running
    world.finish("r1")
    assert big in world.running


def test_memory_counts_to_the_token() -> None:
    world = memory_world()
    assert world.submit(num_prompt_tokens=49, max_tokens=1, ignore_eos=True) in world.running
    assert world.submit(num_prompt_tokens=1, max_tokens=1, ignore_eos=True) not in world.running


def test_memory_is_reserved_for_as_many_tokens_as_nine_of_ten_generate() -> None:
    world = CoreWorld(make_config(modes=1, slots=4), kv_capacity_tokens=200)
    for num_tokens in (8, 8, 8, 8, 8, 8, 64, 64):
        world.finish(world.submit(num_prompt_tokens=40, max_tokens=100), num_tokens=num_tokens)
    request_id = world.submit(num_prompt_tokens=40, max_tokens=100)
    entry, book = world.scheduler.entry(request_id), world.scheduler.fleet.books[0]
    assert entry is not None
    assert (entry.expected_tokens, entry.expected_p90_tokens) == (8, 64)
    assert book.reserved_tokens == 40 + 64
    assert world.submit(num_prompt_tokens=40, max_tokens=100) not in world.running, "104 more are beyond 200"
    assert world.submit(num_prompt_tokens=86, max_tokens=10, ignore_eos=True) in world.running


def test_memory_is_reserved_for_the_bound_while_nobody_knows_how_long_answers_are() -> None:
    world = CoreWorld(make_config(modes=1, slots=4), kv_capacity_tokens=200)
    first, second = world.submit(max_tokens=100), world.submit(max_tokens=100)
    assert world.scheduler.fleet.books[0].reserved_tokens == 16 + 100
    assert second not in world.running
    world.finish(first)
    assert second in world.running
    world.finish(second)
    assert world.submit(max_tokens=4_000) in world.running, "an empty mode takes what is larger than its memory"


def test_an_empty_mode_takes_what_is_larger_than_its_memory() -> None:
    world = memory_world()
    world.finish("r1")
    assert world.submit(num_prompt_tokens=300, max_tokens=10) in world.running


def test_small_requests_may_pass_one_that_memory_holds_back_but_not_for_ever() -> None:
    world = memory_world()
    big = world.submit(num_prompt_tokens=150, max_tokens=10, ignore_eos=True)
    passed = 0
    for _ in range(100):
        small = world.submit(num_prompt_tokens=10, max_tokens=10, ignore_eos=True)
        if small not in world.running:
            break
        passed += 1
        world.finish(small)
    assert 5 <= passed <= 20
    world.finish("r1")
    assert big in world.running


def test_what_memory_holds_back_on_one_mode_hides_nobody_from_another() -> None:
    world = CoreWorld(make_config(slots=8), kv_capacity_tokens=200)
    only_m0: dict[str, object] = {"mode_hint": "m0", "mode_strict": True, "max_tokens": 50, "ignore_eos": True}
    world.submit(num_prompt_tokens=100, **only_m0)
    held = [world.submit(num_prompt_tokens=100, **only_m0) for _ in range(10)]
    free = world.submit(mode_hint="m1", mode_strict=True)
    assert world.mode_of(free) == "m1"
    assert not set(held) & set(world.running)


def test_being_held_back_costs_no_turn() -> None:
    """Looking is free: a tenant whose request does not fit yet keeps its place before the others."""
    world = memory_world()
    big = world.submit(tenant="poor", num_prompt_tokens=150, max_tokens=10, ignore_eos=True)
    for _ in range(5):
        world.wait(10)
        world.finish(world.submit(tenant="rich", num_prompt_tokens=10, max_tokens=10, ignore_eos=True))
    rich = world.submit(tenant="rich", num_prompt_tokens=150, max_tokens=10, ignore_eos=True)
    world.finish("r1")
    assert big in world.running
    assert rich not in world.running


def test_an_engine_that_tells_no_kv_capacity_breaks_nothing() -> None:
    world = CoreWorld(make_config(modes=1), up=False)
    world.engine_up("m0", kv_capacity_tokens=0)
    first, second = world.submit(), world.submit()
    assert first in world.running
    world.finish(first)
    assert second in world.running


def test_memory_pressure_is_the_worst_of_gauges_and_reservations() -> None:
    world = memory_world(modes=2)
    world.submit(num_prompt_tokens=10, max_tokens=10)
    assert world.scheduler.decisions[-1].features.memory_pressure == pytest.approx(0.75)
    world.post(e.EngineStepped(world.t_us, "m1", EngineLoad(num_running=1, kv_usage=0.9), ()))
    world.submit(num_prompt_tokens=10, max_tokens=10)
    assert world.scheduler.decisions[-1].features.memory_pressure == pytest.approx(0.9)


# --- drain ------------------------------------------------------------------------------------------------------------


def test_a_drain_answers_what_waits_and_lets_run_what_runs() -> None:
    world = full_world()
    waiting = world.submit()
    world.drain(1_000)
    assert world.delivered[waiting].error_code == "draining"
    assert "r1" in world.running
    refused = world.submit()
    assert world.rejected[refused].error_code == "draining"
    assert world.rejected[refused].retry_after_ms == 1_000
    world.wait(999)
    assert not world.of(c.Abort)
    world.finish("r1")
    assert world.delivered["r1"].finish_reason == "stop"
    assert world.scheduler.num_pending == 0
    assert world.conserved()


def test_at_the_limit_of_a_drain_what_runs_is_aborted_once() -> None:
    world = full_world()
    world.hold_aborts = True
    world.drain(1_000)
    world.wait(1_000)
    world.wait(50)
    assert world.of(c.Abort) == [c.Abort("r1", 1)]
    world.finish("r1", "abort", 2)
    assert world.delivered["r1"].error_code == "draining"
    assert world.scheduler.counts.failed == 1


def test_a_second_drain_aborts_at_once() -> None:
    world = full_world()
    world.hold_aborts = True
    world.drain(60_000)
    assert world.drain(0) == [c.Abort("r1", 1)]


def test_a_request_cancelled_before_the_limit_stays_cancelled() -> None:
    world = full_world()
    world.hold_aborts = True
    world.cancel("r1")
    assert world.drain(0) == []
    world.finish("r1", "abort", 1)
    assert world.delivered["r1"].finish_reason == "abort"


def test_a_repeat_during_the_drain_gets_the_answer_of_the_first() -> None:
    world = full_world()
    world.drain(1_000)
    repeat = world.submit(client_request_id="r1")
    assert world.of(c.AckDuplicate) == [c.AckDuplicate(repeat, "r1", "running")]


def test_what_is_stored_or_recovered_during_the_drain_is_answered() -> None:
    world = CoreWorld(make_config())
    world.hold_appends = True
    appending = world.submit()
    world.drain(1_000)
    assert kinds(world.appended(appending)) == ["Ack", "Complete", "Deliver"]
    recovered = world.recover()
    assert {world.delivered[id_].error_code for id_ in (appending, recovered)} == {"draining"}
    assert not world.running


def test_an_engine_lost_during_the_drain_is_not_tried_again() -> None:
    world = CoreWorld(make_config())
    request_id = world.submit()
    world.drain(1_000)
    world.lose("m0")
    assert world.delivered[request_id].error_code == "draining"


def test_a_long_queue_is_drained_over_ticks_and_nothing_starts_meanwhile() -> None:
    world = full_world(limits={"max_waiting": 3_000})
    for _ in range(2_500):
        world.submit()
    world.drain(60_000)
    assert len(world.delivered) == 1_000
    world.finish("r1")
    assert not world.running
    world.wait(50)
    world.wait(50)
    assert len(world.delivered) == 2_501
    assert not world.running
    assert world.scheduler.num_pending == 0
    assert world.scheduler.idle_with_backlog_us == 0


# --- recovery ---------------------------------------------------------------------------------------------------------


def test_recovered_requests_run_without_append_or_ack_and_beyond_the_bound() -> None:
    world = CoreWorld(make_config(modes=1, slots=1, limits={"max_waiting": 2}), up=False)
    recovered = [world.recover() for _ in range(4)]
    assert not world.log
    assert world.submit() in world.rejected
    world.engine_up("m0")
    for request_id in recovered:
        assert list(world.running) == [request_id]
        world.finish(request_id)
    assert list(world.delivered) == recovered
    assert world.conserved()


def test_a_recovered_request_that_no_mode_may_serve_any_more_is_answered() -> None:
    world = CoreWorld(make_config())
    request_id = world.recover(model="gone")
    assert world.delivered[request_id].error_code == "mode_unavailable"
    assert world.scheduler.admission.num_reserved == 0
    assert world.conserved()


def test_a_repeat_of_a_recovered_request_finds_it() -> None:
    world = CoreWorld(make_config(), up=False)
    recovered = world.recover(client_request_id="k")
    repeat = world.submit(client_request_id="k")
    assert world.of(c.AckDuplicate) == [c.AckDuplicate(repeat, recovered, "waiting")]


# --- many -------------------------------------------------------------------------------------------------------------


def test_an_engine_that_comes_up_is_filled_within_few_events() -> None:
    world = CoreWorld(make_config(modes=1, slots=200), up=False)
    for _ in range(200):
        world.submit()
    world.engine_up("m0")
    assert len(world.running) == 64, "decisions per event are bounded"
    for _ in range(3):
        world.wait(0)
    assert len(world.running) == 200


def test_idle_with_backlog_is_measured() -> None:
    world = CoreWorld(make_config(modes=1, slots=200), up=False)
    scheduler = world.scheduler
    for _ in range(3):
        world.submit()
    world.wait(1_000)
    assert scheduler.idle_with_backlog_us == 0, "no engine is up: nothing idles"
    # Nothing in the core lets an engine idle beside a backlog, so the test stops it from filling.
    scheduler.fleet.books[0].num_slots = 0
    scheduler.fleet.up = 1
    world.wait(0)
    world.wait(250)
    assert scheduler.idle_with_backlog_us == 250_000
    for request_id in ("r1", "r2", "r3"):
        world.cancel(request_id)
    world.wait(1_000)
    assert scheduler.idle_with_backlog_us == 250_000


def test_old_deadlines_do_not_pile_up() -> None:
    world = CoreWorld(make_config(modes=1, slots=1))
    for _ in range(5_000):
        world.finish(world.submit(deadline_ms=86_400_000))
    assert len(world.scheduler._deadlines) <= 1_100


def test_unsettled_observations_are_bounded() -> None:
    world = CoreWorld(make_config(modes=1, slots=1))
    world.post(e.CounterRead(world.t_us, CounterReading(domain="gpu:0", t_us=world.t_us, energy_mj=0, power_w=50.0)))
    for _ in range(4_200):
        world.finish(world.submit())
    assert len(world.scheduler._feedback._unsettled) == 4_096

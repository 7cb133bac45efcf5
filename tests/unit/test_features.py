"""What the core notices of requests and engines before it decides, through the scheduler as it happens."""

from __future__ import annotations

from random import Random

import pytest

from msd.core import events as e
from msd.core.features import _MAX_SESSIONS, VIEW_STALE_US, Arrivals, Sessions
from msd.core.prefixes import hash_blocks
from msd.domain import Decision, EngineLoad, ExitKind, GpuView, Slo
from tests.unit.core_world import CoreWorld, make_config

PROMPT = tuple(range(1_000, 1_400))
CACHING = {"m0": {"prefix_caching": True}, "m1": {"prefix_caching": True}}


def a_world(**more: object) -> CoreWorld:
    return CoreWorld(make_config(policy="round_robin", slots=8, **more))  # type: ignore[arg-type]


def decided(world: CoreWorld, request_id: str) -> Decision:
    return world.running[request_id].decision


def ask(world: CoreWorld, token_ids: tuple[int, ...] = PROMPT, **fields: object) -> str:
    return world.submit(num_prompt_tokens=len(token_ids), prefix_hashes=hash_blocks(token_ids), **fields)


def first_token(world: CoreWorld, request_id: str, num_cached_tokens: int = 0) -> None:
    world.post(e.FirstToken(world.t_us, request_id, world.running[request_id].attempt, num_cached_tokens))


# --- shared prefixes -------------------------------------------------------------------------------------------------


def test_a_prefix_is_shared_once_some_engine_has_computed_it() -> None:
    world = a_world(engines=CACHING)
    first = ask(world)
    assert not decided(world, first).features.shared_prefix
    again = ask(world, PROMPT[:200] + (5,) * 50)
    assert not decided(world, again).features.shared_prefix, "the first has not been prefilled yet"
    first_token(world, first)
    entry_id = ask(world, PROMPT[:200] + (6,) * 50)
    assert decided(world, entry_id).features.shared_prefix
    entry = world.scheduler.entry(entry_id)
    assert entry is not None
    assert entry.cached_tokens == (192, 0)


def test_engines_without_a_prefix_cache_share_nothing() -> None:
    world = a_world()
    first_token(world, ask(world))
    assert not decided(world, ask(world)).features.shared_prefix


@pytest.mark.parametrize("gone", ["lost", "restarted"])
def test_a_lost_engine_has_forgotten_its_prefixes(gone: str) -> None:
    world = a_world(engines=CACHING)
    first_token(world, ask(world))
    world.post(e.EngineLost(world.t_us, "m0", ExitKind.STOPPED, "test"))
    if gone == "restarted":
        world.engine_up("m0")
    assert not decided(world, ask(world)).features.shared_prefix


# --- sessions --------------------------------------------------------------------------------------------------------


def test_a_session_remembers_the_mode_that_served_it_last() -> None:
    world = a_world()
    arms = [decided(world, world.submit(session_id="s")).features.session_arm for _ in range(3)]
    assert arms == [-1, 0, 1], "round robin"
    assert decided(world, world.submit(session_id="s", tenant="other")).features.session_arm == -1
    assert decided(world, world.submit()).features.session_arm == -1
    world.post(e.EngineLost(world.t_us, "m0", ExitKind.STOPPED, "test"))
    assert decided(world, world.submit(session_id="s")).features.session_arm == -1, "its cache went with its engine"


def test_sessions_are_bounded() -> None:
    sessions = Sessions()
    for number in range(_MAX_SESSIONS + 10):
        sessions.served("t", str(number), 1)
        sessions.served("t", "kept", 2)
    assert sessions.arm("t", "kept") == 2
    assert sessions.arm("t", "0") == -1
    assert sessions.arm("t", str(_MAX_SESSIONS + 9)) == 1


# --- lengths ---------------------------------------------------------------------------------------------------------


def test_expected_lengths_are_in_the_features() -> None:
    world = a_world()
    features = decided(world, world.submit(max_tokens=100)).features
    assert (features.num_expected_tokens, features.num_expected_tokens_p90) == (50, 100)


def test_a_request_past_its_90th_percentile_is_expected_to_go_on_and_reserves_for_it() -> None:
    world = a_world(modes=1)
    for _ in range(5):
        world.finish(world.submit(max_tokens=500), num_tokens=10)
    request_id = world.submit(max_tokens=500)
    entry, book = world.scheduler.entry(request_id), world.scheduler.fleet.books[0]
    assert entry is not None
    expected, p90, before = entry.expected_tokens, entry.expected_p90_tokens, book.reserved_tokens
    assert expected < 15

    def step(num_tokens: int) -> None:
        world.post(e.EngineStepped(world.t_us, "m0", EngineLoad(), ((request_id, num_tokens),)))

    step(5)
    assert entry.expected_tokens == expected
    step(100)
    assert (entry.expected_tokens, entry.expected_p90_tokens) == (150, 150)
    assert book.reserved_tokens == before + 150 - p90
    step(140)
    assert entry.expected_tokens == 150
    step(490)
    assert entry.expected_tokens == 500
    world.finish(request_id, num_tokens=500)
    assert book.reserved_tokens == 0


def test_an_aborted_request_is_a_lower_bound_of_its_class() -> None:
    world = a_world(modes=1)
    for _ in range(5):
        world.finish(world.submit(max_tokens=500), num_tokens=10)
    before = decided(world, world.submit(max_tokens=500)).features.num_expected_tokens
    world.hold_aborts = True
    for _ in range(40):
        request_id = world.submit(max_tokens=500)
        world.post(e.Cancelled(world.t_us, request_id))
        attempt = world.running.pop(request_id).attempt
        world.post(e.Finished(world.t_us, request_id, attempt, "abort", 200))
    after = decided(world, world.submit(max_tokens=500)).features.num_expected_tokens
    assert before < 15
    assert 150 < after < 270


# --- the moment ------------------------------------------------------------------------------------------------------


def test_slos_and_arrivals_are_in_the_features() -> None:
    world = a_world(modes=1)
    for _ in range(50):
        world.finish(world.submit(), num_tokens=1)
        world.t_us += 20_000
    features = decided(world, world.submit(slo=Slo(ttft_ms=80.0, tpot_ms=9.0))).features
    assert (features.slo_ttft_ms, features.slo_tpot_ms) == (80.0, 9.0)
    assert features.arrivals_per_s == pytest.approx(50.0)


def test_the_rate_of_arrivals_falls_while_none_come() -> None:
    arrivals, rng, t_us = Arrivals(), Random(1), 0
    assert arrivals.per_s(0) == 0.0
    arrivals.note(0)
    assert arrivals.per_s(5) == 0.0
    for _ in range(300):
        t_us += int(rng.expovariate(100) * 1e6)
        arrivals.note(t_us)
    assert arrivals.per_s(t_us) == pytest.approx(100.0, rel=0.5)
    assert arrivals.per_s(t_us + 10_000_000) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("view", "headroom_w"),
    [
        (None, None),
        (GpuView(t_us=1_000_000, power_limit_w=700.0, power_instant_w=240.0), 460.0),
        (GpuView(t_us=1_000_000, power_limit_w=700.0), None),
        (GpuView(t_us=1_000_000, power_instant_w=240.0), None),
        (GpuView(t_us=1_000_000 - VIEW_STALE_US - 1, power_limit_w=700.0, power_instant_w=240.0), None),
    ],
)
def test_power_headroom_is_known_only_from_a_fresh_view(view: GpuView | None, headroom_w: float | None) -> None:
    world = a_world()
    if view is not None:
        world.post(e.ViewTaken(world.t_us, view))
    assert decided(world, world.submit()).features.power_headroom_w == headroom_w

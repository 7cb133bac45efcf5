"""Specs are refused whole, plans are the same bytes for a seed, and one class does not move another."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from loadgen import arrivals, lengths, plan, prompts, spec_reader
from loadgen.idc import index_of_dispersion
from loadgen.spec import ArrivalSpec, Constant, Fixed, Lognormal, OnOff, OnOffSource, Poisson, Process, Spec, Square
from loadgen.spec import Uniform as UniformLength
from msd import tasks

SPEC = """
title = "two classes"
plan = { seed = 3, duration_s = 60 }

[[class]]
name = "a"
share = 0.5
tasks = [{ task = "copy", levels = [1, 2] }, { task = "add", levels = [3] }]
prefix = { kind = "shots", num_shots = 2, groups = 3, fraction = 0.5, zipf = 1.0 }

[[class]]
name = "b"
share = 0.5
input = { kind = "lognormal", p50 = 60, p95 = 200, max = 500 }
output = { kind = "uniform", low = 4, high = 40 }
prefix = { kind = "groups", tokens = 32, groups = 4 }

[arrivals]
rate_rps = 20
process = { kind = "onoff", sources = [{ tau_s = 1.5, c = 15, p = 0.15 }] }
"""


def parse(text: str = SPEC, **overrides: object) -> Spec:
    return spec_reader.parse(text, "spec.toml", {name.replace("__", "."): value for name, value in overrides.items()})


def problems_of(text: str) -> list[str]:
    with pytest.raises(spec_reader.SpecError) as caught:
        parse(text)
    return str(caught.value).splitlines()


def rows_without_id(made: plan.Plan, name: str) -> list[plan.PlannedRequest]:
    return [msgspec.structs.replace(row, id=0) for row in made.requests if row.traffic_class == name]


# --- spec ------------------------------------------------------------------------------------------------------------


def test_every_error_is_told_at_once_with_its_line_field_and_nearest_word() -> None:
    text = (
        SPEC.replace("seed = 3", "sed = 3")
        .replace('name = "b"\nshare = 0.5', 'name = "b"\nshare = 0.6')
        .replace('kind = "uniform"', 'kind = "unifrm"')
        .replace("levels = [3]", "levels = [7]")
        .replace("c = 15", "c = nan")
        .replace("rate_rps = 20", "rate_rps = -20")
    )
    assert problems_of(text) == [
        "spec.toml:5: class: shares sum to 1.1, must sum to 1",
        "spec.toml:3: plan.sed: unknown field, did you mean seed?",
        "spec.toml:8: class[0].tasks[1]: task 'add' has no level 7: the nearest is 4 (levels: 1-4)",
        "spec.toml:15: class[1].output.kind: 'unifrm', did you mean uniform? (one of fixed, uniform, lognormal)",
        "spec.toml:19: arrivals.rate_rps: Expected `float` > 0.0, got -20",
        "spec.toml:20: arrivals.process.sources[0].c: Expected `float` > 0.0, got nan",
    ]


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("c = 15", "c = 900", "arrivals.process.sources"),
        ("p = 0.15", "p = 1.0", "arrivals.process.sources[0].p"),
        ("p95 = 200", "p95 = 20", "class[1].input.p95"),
        ("p50 = 60, p95 = 200", "p50 = 60", "class[1].input"),
        ("p50 = 60, p95", "mean = 40, p95", "class[1].input.p95"),
        ("max = 500", "max = 20", "class[1].prefix.tokens"),
        ("low = 4", "low = 41", "class[1].output.low"),
        ('"groups", tokens = 32,', '"shots", num_shots = 2,', "class[1].prefix.kind"),
        ('name = "b"', 'name = "a"', "class[1].name"),
        ("duration_s = 60", "duration_s = 1e8", "arrivals.rate_rps"),
        ("duration_s = 60 }", "duration_s = 60 }\nrun = { warmup_s = 60 }", "run.warmup_s"),
        ("duration_s = 60 }", "duration_s = 60 }\ncontent = { token_low = 96 }", "content.token_low"),
        ("levels = [1, 2]", "levels = []", "class[0].tasks[0].levels"),
        ("duration_s = 60", "duration_s = inf", "plan.duration_s"),
        ('kind = "uniform", ', "", "class[1].output.kind"),
        (", duration_s = 60", "", "plan.duration_s"),
    ],
)
def test_a_bad_value_names_its_field(old: str, new: str, field: str) -> None:
    assert old in SPEC
    (problem,) = problems_of(SPEC.replace(old, new))
    assert f" {field}: " in problem


def test_no_spec_at_all_lists_the_presets() -> None:
    with pytest.raises(spec_reader.SpecError, match=r"presets: demo, smoke, square, steady"):
        spec_reader.load("no-such-spec")


def test_what_is_not_toml_is_said_to_be_so() -> None:
    (problem,) = problems_of("plan = [")
    assert "not TOML" in problem


@pytest.mark.parametrize("name", spec_reader.presets())
def test_presets_can_be_planned(name: str) -> None:
    made = plan.make(spec_reader.load(name))
    assert made.requests
    for row in made.requests[:50]:
        assert 1 <= prompts.build(row, made.header.spec.content).max_tokens <= 64


# --- plan ------------------------------------------------------------------------------------------------------------


def test_one_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    first, again = tmp_path / "first.jsonl.gz", tmp_path / "again.jsonl.gz"
    plan.save(plan.make(parse()), first)
    plan.save(plan.make(parse()), again)
    assert first.read_bytes() == again.read_bytes()
    assert plan.make(parse()).digest() != plan.make(parse(plan__seed=4)).digest()


@pytest.mark.parametrize("name", ["plan.jsonl", "plan.jsonl.gz"])
def test_a_plan_comes_back_as_it_was_saved(tmp_path: Path, name: str) -> None:
    made = plan.make(parse())
    plan.save(made, tmp_path / name)
    loaded = plan.load(tmp_path / name)
    assert loaded == made
    assert loaded.digest() == made.digest()
    assert plan.is_plan(tmp_path / name)


def test_what_is_no_plan_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    lines = list(plan.make(parse()).lines())
    for data in (b"{}", b"\x1f\x8bnot gzip", b"".join([lines[0], lines[-1], lines[1]]), lines[0] + b"{"):
        broken.write_bytes(data)
        with pytest.raises(plan.PlanError):
            plan.load(broken)


def test_splitting_a_class_leaves_the_rows_of_the_others() -> None:
    halved = SPEC.replace('name = "b"\nshare = 0.5', 'name = "b"\nshare = 0.25')
    third = '[[class]]\nname = "c"\nshare = 0.25\ntasks = [{ task = "get", levels = [1] }]\n'
    before, after = plan.make(parse()), plan.make(parse(halved.replace("[arrivals]", third + "[arrivals]")))
    assert rows_without_id(after, "a") == rows_without_id(before, "a")
    assert rows_without_id(after, "c")


def test_adding_a_class_on_top_leaves_the_rows_of_the_others() -> None:
    poisson = SPEC.replace(SPEC[SPEC.index("process =") :], "")
    added = poisson.replace("share = 0.5", "share = 0.25").replace("rate_rps = 20", "rate_rps = 40")
    more = '[[class]]\nname = "c"\nshare = 0.5\ntasks = [{ task = "get", levels = [1] }]\n'
    before, after = plan.make(parse(poisson)), plan.make(parse(added.replace("[arrivals]", more + "[arrivals]")))
    for name in ("a", "b"):
        assert rows_without_id(after, name) == rows_without_id(before, name)


def test_rows_are_in_time_order_and_numbered() -> None:
    made = plan.make(parse())
    times = made.times_us()
    assert (np.diff(times) >= 0).all()
    assert times[0] >= 0
    assert times[-1] < 60_000_000
    assert [row.id for row in made.requests] == list(range(len(made.requests)))


def test_prompts_are_those_of_the_tasks_and_groups_share_their_prefix() -> None:
    made = plan.make(parse())
    content = made.header.spec.content
    shared: dict[str, set[object]] = {}
    for row in made.requests:
        built = prompts.build(row, content)
        if row.task is not None:
            assert built.text is not None
            assert built.text.endswith("=")
            assert built.answer is not None
            assert prompts.is_right(built.answer, f" {built.answer}\n")
            assert len(built.answer) < built.max_tokens
            if row.prefix_id is not None:
                assert row.num_shots == 2
                shared.setdefault(row.prefix_id, set()).add(built.text.rpartition(tasks.SHOT_SEPARATOR)[0])
        else:
            assert built.token_ids is not None
            assert len(built.token_ids) == row.input_tokens > row.prefix_tokens == 32
            assert min(built.token_ids) >= content.token_low
            assert max(built.token_ids) < content.token_high
            assert row.prefix_id is not None
            shared.setdefault(row.prefix_id, set()).add(built.token_ids[:32])
    assert {len(prefixes) for prefixes in shared.values()} == {1}
    assert len({prefix for prefixes in shared.values() for prefix in prefixes}) == len(shared) > 8


# --- arrivals --------------------------------------------------------------------------------------------------------


def times_s(
    process: Process, rate_rps: float, duration_s: float, seed: int
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    drawn = arrivals.sample(
        ArrivalSpec(rate_rps=rate_rps, process=process),
        [("a", 0.3), ("b", 0.7)],
        duration_s,
        lambda purpose: plan.stream(seed, purpose),
    )
    result: np.ndarray[tuple[int], np.dtype[np.float64]] = np.sort(np.concatenate([drawn["a"], drawn["b"]])) / 1e6
    return result


def test_constant_arrivals_are_evenly_spaced_over_all_classes() -> None:
    times = times_s(Constant(), 10, 20, 0)
    assert len(times) == 200
    assert np.allclose(np.diff(times), 0.1, atol=2e-6)


def test_the_index_of_dispersion_of_a_split_poisson_process_is_one() -> None:
    values = [index_of_dispersion(times_s(Poisson(), 50, 400, seed), 400, 2) for seed in range(20)]
    assert 0.9 < np.mean([value for value in values if value is not None]) < 1.1


def test_on_off_keeps_the_mean_rate_and_has_the_stated_dispersion() -> None:
    source = OnOffSource(tau_s=2.0, c=8.0, p=0.2)
    rates, at_1, at_20 = [], [], []
    for seed in range(40):
        times = times_s(OnOff(sources=(source,)), 20, 600, seed)
        rates.append(len(times) / 600)
        at_1.append(index_of_dispersion(times, 600, 1))
        at_20.append(index_of_dispersion(times, 600, 20))
    assert np.mean(rates) == pytest.approx(20, rel=0.03)
    # I(w) = 1 + c B(w / tau), B(x) = 1 - (1 - exp(-x)) / x: 2.70 at 1 s, 8.20 at 20 s.
    for window, values in ((1, at_1), (20, at_20)):
        ratio = window / source.tau_s
        expected = 1 + source.c * (1 - (1 - np.exp(-ratio)) / ratio)
        assert np.mean([value for value in values if value is not None]) == pytest.approx(expected, rel=0.15)
    assert np.mean([value for value in at_20 if value is not None]) > 3  # a Poisson process has 1


def test_a_square_wave_has_its_levels_and_its_mean() -> None:
    times = times_s(Square(low=1, high=3, period_s=10, duty=0.5), 40, 1_000, 1)
    high = times[times % 10 < 5]
    assert len(times) / 1_000 == pytest.approx(40, rel=0.03)
    assert len(high) / len(times) == pytest.approx(0.75, rel=0.03)


def test_dispersion_by_hand() -> None:
    # Windows of 1 s: two arrivals in each of 10 seconds, evenly: no variance at all.
    assert index_of_dispersion(np.linspace(0, 9.5, 20), 10, 1) == pytest.approx(0.0)
    assert index_of_dispersion(np.zeros(0), 10, 1) is None
    assert index_of_dispersion(np.linspace(0, 2, 3), 3, 3) is None


# --- lengths ---------------------------------------------------------------------------------------------------------


def test_lengths_have_their_quantiles_and_bounds() -> None:
    rng = np.random.default_rng(0)
    lognormal = lengths.sample(Lognormal(p50=100, p95=400, max=1_000), 100_000, rng, minimum=20)
    assert np.median(lognormal) == pytest.approx(100, rel=0.02)
    assert np.quantile(lognormal, 0.95) == pytest.approx(400, rel=0.03)
    assert (lognormal.min(), lognormal.max()) == (20, 1_000)
    uniform = lengths.sample(UniformLength(low=3, high=5), 1_000, rng)
    assert sorted(set(uniform.tolist())) == [3, 4, 5]
    assert set(lengths.sample(Fixed(tokens=7), 3, rng).tolist()) == {7}


@pytest.mark.parametrize("given", [{"mean": 150.0, "p95": 400.0}, {"mean": 150.0, "p50": 100.0}])
def test_any_two_figures_fix_a_lognormal(given: dict[str, float]) -> None:
    drawn = lengths.sample(Lognormal(**given), 200_000, np.random.default_rng(0))  # type: ignore[arg-type]
    for name, value in given.items():
        found = {"mean": drawn.mean(), "p50": np.median(drawn), "p95": np.quantile(drawn, 0.95)}[name]
        assert found == pytest.approx(value, rel=0.02)

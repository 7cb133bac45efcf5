"""Other policies over the decision log: estimates that meet a known truth, and honesty where there is none."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from statistics import fmean

import pytest
from msgspec import structs

from msd import cli, router_file
from msd.config import PolicyConfig
from msd.decisions import FOLDER, Decided, Observed, Opened, Record, encode, name_of, read
from msd.domain import Candidate, Choice, Decision, Energy, Features, Mask, Mode, Observation, Slo
from msd.errors import EXIT_CONFIG, EXIT_JOURNAL, EXIT_OK, ConfigError
from msd.learning import off_policy
from msd.learning import router_training as training
from msd.learning.off_policy import HINTED, Trial
from msd.policy import make_policy
from msd.policy.oracle import Oracle
from msd.ports import Policy

MODES = (
    Mode(name="bf16", engine="bf16", model="m", precision="bf16", reference=True),
    Mode(name="int8", engine="int8", model="m", precision="int8"),
    Mode(name="int4", engine="int4", model="m", precision="int4"),
)
PROPENSITIES = (0.2, 0.3, 0.5)
WAIT_US = 40_000


def truth(arm: int, features: Features) -> tuple[float, int]:
    """E2EL (ms from the decision) and mJ of a request: INT8 is best on long prompts, INT4 on long answers."""
    prompt, output = features.num_prompt_tokens, features.num_expected_tokens
    e2el_ms = (
        20.0 + 0.06 * prompt + 20.0 * output,
        20.0 + 0.02 * prompt + 14.0 * output,
        60.0 + 0.06 * prompt + 7 * output,
    )
    return e2el_ms[arm], round(e2el_ms[arm] * (200.0, 150.0, 210.0)[arm])


class Skewed:
    """Draws an arm with PROPENSITIES, whatever it sees."""

    name = "skewed"

    def choose(self, features: Features, candidates: Sequence[Candidate], rng: Random) -> Choice:
        arm = rng.choices(range(3), PROPENSITIES)[0]
        return Choice(arm, PROPENSITIES[arm], "drawn")


def records(num: int, *, draws: bool = True, seed: int = 1, hinted: int = 0, bias: float = 1.0) -> list[Record]:
    """A log of `num` requests; predictions are the truth times `bias`."""
    rng = Random(seed)
    made: list[Record] = [Opened(t_unix_us=1, server="msd/test", policy="skewed", modes=MODES)]
    for number in range(num):
        features = Features(
            rng.randrange(16, 4_000), rng.randrange(1, 100), 128, False, None, "standard", 0, 0, 1.0, 0.0, 0, None, None
        )
        told = [truth(arm, features) for arm in range(3)]
        candidates = tuple(
            Candidate(mode.name, 0, 10.0, 5.0, e2el_ms * bias, mj, 0, 4)
            for mode, (e2el_ms, mj) in zip(MODES, told, strict=True)
        )
        choice = Skewed().choose(features, candidates, rng) if draws else Choice(1, 1.0, "fixed on int8")
        if number < hinted:
            choice = Choice(0, 1.0, HINTED)
        decision = Decision(
            decision_id=f"r{number}.1", request_id=f"r{number}", attempt=1, t_us=number, policy="skewed",
            mode=MODES[choice.arm].name, engine=MODES[choice.arm].name, reason=choice.reason,
            propensity=choice.propensity, features=features, candidates=candidates, view=None,
        )  # fmt: skip
        e2el_ms, mj = told[choice.arm]
        seen = Observation(
            decision_id=decision.decision_id, mode=decision.mode, finish_reason="stop", ttft_ms=WAIT_US / 1e3 + 10.0,
            tpot_ms=5.0, e2el_ms=e2el_ms + WAIT_US / 1e3, num_completion_tokens=features.num_expected_tokens,
            energy=Energy(energy_mj=mj, dynamic_mj=mj, static_mj=0, source="counter", settled=True),
            slo_met=e2el_ms < 800.0,
        )  # fmt: skip
        made += [
            Decided(
                t_unix_us=number, tenant="t", client_request_id=f"c{number}", since_receipt_us=WAIT_US, slo=Slo(),
                decision=decision,
            ),
            Observed(t_unix_us=number, request_id=decision.request_id, observation=seen),
        ]  # fmt: skip
    return made


def log(num: int, **how: object) -> list[Trial]:
    return list(off_policy.trials(records(num, **how)))  # type: ignore[arg-type]


def fixed(mode: str) -> Callable[[Sequence[Mode]], Policy]:
    return lambda modes: make_policy(PolicyConfig(name="fixed", mode=mode), modes)


def named(name: str) -> Callable[[Sequence[Mode]], Policy]:
    return lambda modes: make_policy(PolicyConfig(name=name), modes)


# --- estimates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", range(3))
def test_estimates_meet_the_truth_of_a_policy_that_never_ran(arm: int) -> None:
    seen = log(4_000)
    score = off_policy.evaluate("", fixed(MODES[arm].name), seen)
    e2el_ms = fmean(truth(arm, trial.decision.features)[0] for trial in seen)
    mj = fmean(truth(arm, trial.decision.features)[1] for trial in seen)
    kept = fmean(truth(arm, trial.decision.features)[0] < 800.0 for trial in seen)
    assert score.e2el_ms is not None
    assert score.energy_mj is not None
    assert score.slo_met is not None
    assert score.e2el_ms.snips == pytest.approx(e2el_ms, rel=0.05)
    assert score.e2el_ms.ips == pytest.approx(e2el_ms, rel=0.08)
    assert score.energy_mj.snips == pytest.approx(mj, rel=0.05)
    assert score.slo_met.snips == pytest.approx(kept, abs=0.04)
    # What the wait before the decision took is not the mode's: it is taken off.
    assert score.mean_weight == pytest.approx(1.0, abs=0.08)
    assert score.matched_share == pytest.approx(PROPENSITIES[arm], abs=0.03)
    # Equal weights: as many samples as agree.
    assert score.e2el_ms.effective_samples == pytest.approx(score.matched_share * len(seen))


def test_estimates_rest_on_what_was_measured_and_predictions_on_what_was_predicted() -> None:
    true, biased = log(2_000), log(2_000, bias=3.0)
    one, other = (off_policy.evaluate("", fixed("int4"), seen) for seen in (true, biased))
    assert one.e2el_ms == other.e2el_ms
    assert one.speedup == pytest.approx(other.speedup)


def test_an_unequal_choice_counts_fewer_effective_samples_than_it_matches() -> None:
    score = off_policy.evaluate("", named("cost"), log(4_000))
    assert score.e2el_ms is not None
    assert len(score.share_of_modes) > 1
    assert score.e2el_ms.effective_samples < score.matched_share * 4_000


def test_the_log_itself_is_its_plain_mean() -> None:
    seen = log(500)
    score = off_policy.evaluate("logged", None, seen)
    assert off_policy.summarise(seen).drawing == ("skewed",)
    assert score.e2el_ms is not None
    assert score.e2el_ms.ips == pytest.approx(fmean(trial.e2el_ms or 0.0 for trial in seen))
    assert (score.matched_share, score.mean_weight, score.e2el_ms.effective_samples) == (1.0, 1.0, 500.0)


def test_a_log_without_draws_gives_no_estimate_but_the_share_that_agrees() -> None:
    seen = log(300, draws=False)
    assert off_policy.summarise(seen).drawing == ()
    for policy, share in (("int8", 1.0), ("int4", 0.0)):
        score = off_policy.evaluate("", fixed(policy), seen)
        assert (score.matched_share, score.mean_weight) == (share, None)
        assert (score.e2el_ms, score.energy_mj, score.slo_met) == (None, None, None)
        assert score.speedup is not None


def test_estimates_rest_only_on_what_a_policy_that_draws_has_logged() -> None:
    drawn, sure = log(400), log(400, draws=False, seed=2)
    sure = [Trial(t.modes, structs.replace(t.decision, policy="sure"), t.observation, t.since_receipt_ms) for t in sure]
    alone, mixed = (off_policy.evaluate("", fixed("int8"), seen) for seen in (drawn, [*drawn, *sure]))
    assert (mixed.e2el_ms, mixed.mean_weight) == (alone.e2el_ms, alone.mean_weight)
    assert mixed.matched_share > alone.matched_share


# --- predictions -----------------------------------------------------------------------------------------------------


def test_speedup_energy_regret_and_shares_follow_the_predictions() -> None:
    seen = log(400)
    score = off_policy.evaluate("", fixed("int4"), seen)
    figures = [[truth(arm, trial.decision.features) for arm in range(3)] for trial in seen]
    assert score.speedup == pytest.approx(fmean(row[0][0] / row[2][0] for row in figures))
    assert score.energy_ratio == pytest.approx(fmean(row[2][1] / row[0][1] for row in figures))
    assert score.regret == pytest.approx(fmean(row[2][0] / min(r[0] for r in row) - 1 for row in figures))
    assert score.num_energy_violations == sum(row[2][1] > row[0][1] for row in figures) > 0
    assert score.share_of_modes == {"int4": 1.0}
    best = off_policy.evaluate("", lambda modes: Oracle(PolicyConfig(), modes), seen)
    assert (best.regret, best.oracle_match) == (0.0, 1.0)


def test_a_missed_slo_counts_only_where_another_mode_would_keep_it() -> None:
    (trial,) = log(1)
    times = sorted((c.e2el_ms, c.mode) for c in trial.decision.candidates)

    def missed(slack_ms: float, mode: str) -> int:
        features = structs.replace(trial.decision.features, slack_us=int(slack_ms * 1e3))
        changed = Trial(MODES, structs.replace(trial.decision, features=features), None, 0.0)
        return off_policy.evaluate("", fixed(mode), [changed]).num_slo_violations

    between = (times[0][0] + times[1][0]) / 2
    assert missed(between, times[2][1]) == 1
    assert missed(between, times[0][1]) == 0
    assert missed(times[0][0] / 2, times[2][1]) == 0


def test_what_producers_asked_for_is_left_out() -> None:
    seen = log(100, draws=False, hinted=30)
    assert off_policy.summarise(seen).num_hinted == 30
    assert off_policy.evaluate("", fixed("int8"), seen).num_decisions == 70
    with pytest.raises(ConfigError, match="no decision of a policy"):
        off_policy.evaluate("", fixed("int8"), log(5, hinted=5))


def test_a_learning_policy_is_told_only_of_what_it_would_have_seen() -> None:
    told: list[str] = []

    class Pupil(Skewed):
        def choose(self, features: Features, candidates: Sequence[Candidate], rng: Random) -> Choice:
            return Choice(2, 1.0, "")

        def update(self, decision: Decision, observation: Observation) -> None:
            assert decision.decision_id == observation.decision_id
            told.append(decision.mode)

    off_policy.evaluate("", lambda modes: Pupil(), log(200))  # type: ignore[arg-type,return-value]
    assert set(told) == {"int4"}


def test_answers_that_failed_or_never_came_are_not_measurements() -> None:
    made = records(3)
    assert isinstance(made[2], Observed)
    made[2] = structs.replace(made[2], observation=structs.replace(made[2].observation, finish_reason="abort"))
    seen = list(off_policy.trials(made[:-1]))
    assert [trial.e2el_ms is not None for trial in seen] == [False, True, False]
    assert off_policy.summarise(seen).num_observed == 1


def test_decisions_over_other_modes_than_their_file_says_are_refused() -> None:
    with pytest.raises(ConfigError, match="its file says nothing of modes"):
        list(off_policy.trials(records(2)[1:]))


# --- training on the log ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", router_file.KINDS)
def test_a_router_trained_on_the_log_beats_every_fixed_mode_on_the_later_half(kind: router_file.Kind) -> None:
    seen = log(600)
    held_out = training.held_out_log(seen, kind)
    least = min(off_policy.evaluate("", fixed(mode.name), seen[300:]).regret for mode in MODES)
    assert (held_out.unit, held_out.num_judged) == ("decisions", 300)
    assert held_out.regret < 0.7 * least


def test_what_was_measured_replaces_what_was_predicted_and_masked_modes_are_left_out() -> None:
    (trial,) = log(1, bias=2.0)
    masked = tuple(
        structs.replace(c, mask=int(Mask.QUALITY)) if c.mode == "int4" and trial.decision.mode != "int4" else c
        for c in trial.decision.candidates
    )
    trial = structs.replace(trial, decision=structs.replace(trial.decision, candidates=masked))
    (example,) = training.log_examples([trial])
    arm = trial.arm
    true_ms, mj = truth(arm, trial.decision.features)
    base_ms, base_mj = truth(0, trial.decision.features)
    expected = training.gain(true_ms, base_ms * (1.0 if arm == 0 else 2.0), mj / base_mj)
    assert example.gains[trial.decision.mode] == pytest.approx(expected)
    assert "int4" not in example.gains or arm == 2


def test_too_short_a_log_is_said_so() -> None:
    with pytest.raises(ConfigError, match="holds 5 decisions; a router needs 20"):
        training.held_out_log(log(5), "tree")


# --- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    folder = tmp_path / FOLDER
    folder.mkdir()
    (folder / name_of(1)).write_bytes(b"".join(encode(record) for record in records(200)))
    return tmp_path


def test_replay_of_a_log_by_its_state_folder(state_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sum(1 for _ in read(state_dir / FOLDER)) == 401
    assert cli.main(["replay", "--log", str(state_dir), "--json"]) == EXIT_OK
    answer = json.loads(capsys.readouterr().out)
    assert answer["log"]["num_decisions"] == 200
    assert [row["name"] for row in answer["rows"]] == [
        "logged", "fixed on bf16", "fixed on int8", "fixed on int4", "random", "round_robin", "rules", "cost", "oracle",
    ]  # fmt: skip
    assert cli.main(["replay", "--log", str(state_dir / FOLDER), "--policy", "cost"]) == EXIT_OK
    out = capsys.readouterr().out
    assert "weighted by 1 / propensity" in out
    assert cli.main(["replay", "--log", str(state_dir), "--policy", "cots"]) == EXIT_CONFIG
    assert "no policy 'cots'" in capsys.readouterr().err


def test_replay_says_when_nothing_can_be_estimated(state_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = b"".join(encode(record) for record in records(50, draws=False))
    (state_dir / FOLDER / name_of(1)).write_bytes(lines)
    assert cli.main(["replay", "--log", str(state_dir)]) == EXIT_OK
    out = capsys.readouterr().out
    assert "does not draw (propensity 1)" in out
    assert "SNIPS" not in out


def test_a_corrupt_log_is_a_typed_error_with_file_and_line(state_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = state_dir / FOLDER / name_of(1)
    lines = file.read_bytes().splitlines(keepends=True)
    lines[7] = lines[7].replace(b'"mode":"', b'"mode":"x', 1)
    file.write_bytes(b"".join(lines))
    for command in (["replay"], ["train-router", "--kind", "tree", "--out", str(state_dir / "r.json")]):
        assert cli.main([*command, "--log", str(state_dir)]) == EXIT_JOURNAL
        error = capsys.readouterr().err
        assert f"{file}:8:" in error
        assert "--skip-corrupt" in error
        assert cli.main([*command, "--log", str(state_dir), "--skip-corrupt"]) == EXIT_OK
        assert "1 lines of" in capsys.readouterr().err


def test_no_log_is_an_error_with_its_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["replay", "--log", str(tmp_path)]) == EXIT_CONFIG
    assert "there is no decision log in" in capsys.readouterr().err


def test_a_router_is_trained_on_a_log_and_replayed_over_it(state_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = state_dir / "router.json"
    assert cli.main(["train-router", "--log", str(state_dir), "--kind", "boosting", "--out", str(file)]) == EXIT_OK
    assert "the later half" in capsys.readouterr().out
    known = router_file.load(file)
    assert known.source == "decision log of this daemon"
    assert [it.mode for it in known.modes] == ["bf16", "int8", "int4"]
    command = ["replay", "--log", str(state_dir), "--policy", "learned", "--router", str(file), "--json"]
    assert cli.main(command) == EXIT_OK
    logged, learned = json.loads(capsys.readouterr().out)["rows"]
    assert learned["regret"] < 0.2 * logged["regret"]

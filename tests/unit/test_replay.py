"""The published comparison, cell by cell; `cost` on families that it has not seen; and the traps of the data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random
from statistics import fmean

import pytest

from msd import cli
from msd.config import CostConfig, PolicyConfig
from msd.domain import Candidate, Features, Mask, Mode
from msd.errors import EXIT_CONFIG, EXIT_NO, EXIT_OK, ConfigError
from msd.learning import matrix as published
from msd.learning import replay
from msd.learning.lines import Shape, fit
from msd.learning.matrix import MODES, REFERENCE, Cell, Matrix
from msd.policy import make_policy
from msd.policy.oracle import Oracle
from msd.policy.published_rules import Workload, batch_pressure, rule

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "tests" / "data" / "replay_table.json"
SHARED = ROOT.parent / "shared" / "data" / "modeswitch"

SS, SL = "short_prompt_short_output", "short_prompt_long_output"
LS, LL = "long_prompt_short_output", "long_prompt_long_output"
SP, MP = "shared_prefix_chat", "memory_pressure_long_context"
MULTIPLE_CHOICE = ("mmlu_pro_eval", "truthfulqa_eval", "gpqa_eval", "mlu_eval")
GSM8K = "gsm8k_eval"


@pytest.fixture(scope="module")
def matrix() -> Matrix:
    return published.load()


def means(score: published.Score) -> tuple[float, float]:
    """F11 speedup and energy."""
    assert score.means.f11_speedup is not None
    assert score.means.f11_energy is not None
    return score.means.f11_speedup, score.means.f11_energy


# --- the table -------------------------------------------------------------------------------------------------------


def test_the_command_rebuilds_every_cell(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["replay", "--matrix", "--expect", str(TABLE)]) == EXIT_OK
    out = capsys.readouterr().out
    assert "MOVED" not in out
    assert out.startswith("PUBLISHED DATA, REPLAYED: one NVIDIA A100")
    assert "nothing here was measured by msd or on this host" in out


def test_a_cell_that_moves_is_named_and_exit_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = json.loads(TABLE.read_text())
    moved["rules"]["w605_speedup"] = "2.3807"
    moved["int8_quant"]["violations"] = []
    moved["a new row"] = {}
    file = tmp_path / "moved.json"
    file.write_text(json.dumps(moved))
    assert cli.main(["replay", "--expect", str(file), "--json"]) == EXIT_NO
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is False
    assert sorted(answer["moved"]) == [
        "a new row: no such row",
        "int8_quant: violations in ['gpqa_eval'], not []",
        "rules: w605_speedup is 2.3806, not 2.3807",
    ]


@pytest.mark.parametrize("content", [None, "[]", '{"rules": {"d6_speedup": "x"}}', "{"])
def test_figures_that_cannot_be_read_are_a_typed_error(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "expected.json"
    if content is not None:
        file.write_text(content)
    assert cli.main(["replay", "--expect", str(file)]) == EXIT_CONFIG
    assert str(file) in capsys.readouterr().err


def test_the_published_rules_have_their_published_speedup(matrix: Matrix) -> None:
    row = next(row for row in replay.table(matrix) if row.name == "rules")
    assert row.means.w605_speedup == pytest.approx(2.3806, rel=0.01)
    assert row.means.w605_speedup == pytest.approx(2.3806, abs=5e-5)


def test_oracles_pick_what_the_specification_lists(matrix: Matrix) -> None:
    assert {family: matrix.oracle(family) for family in matrix.families} == {
        SL: "gptq_4bit", LS: "gptq_4bit", LL: "gptq_4bit", MP: "gptq_4bit",
        SS: "gptq_plus_prefix_caching", SP: "gptq_plus_prefix_caching",
        GSM8K: "speculative_decoding",
        "mmlu_pro_eval": "int8_quant", "truthfulqa_eval": "int8_quant", "mlu_eval": "int8_quant",
        "gpqa_eval": REFERENCE,
    }  # fmt: skip
    assert matrix.oracle(GSM8K, constrained=False) == "gptq_4bit"
    assert matrix.oracle("gpqa_eval", constrained=False) == "int8_quant"


def test_the_policy_oracle_is_the_tables_when_it_knows_the_figures(matrix: Matrix) -> None:
    by = Oracle(PolicyConfig(), list(MODES.values()))
    for family in matrix.families:
        features = replay.features_of(matrix, family)
        candidates = []
        for mode in MODES:
            cell = matrix.cells.get((family, mode))
            mask = int(Mask.HEALTH) if cell is None else int(Mask.QUALITY) if matrix.faults(family, mode) else 0
            latency_ms = cell.latency_ms if cell else 0.0
            candidates.append(Candidate(mode, mask, 1.0, 1.0, latency_ms, None, 0, 1))
        assert replay.choose(by, features, candidates) == matrix.oracle(family)


# --- cost ------------------------------------------------------------------------------------------------------------


def test_cost_reaches_its_bars_on_families_that_it_has_not_seen(matrix: Matrix) -> None:
    score = replay.cost(matrix)
    assert means(score)[0] >= 1.975
    assert score.least_of_oracle is not None
    assert score.least_of_oracle >= 0.97
    assert score.violations == ()
    for rival in replay.behind_the_mask(matrix):
        assert means(score)[0] > means(rival)[0]


def test_cost_without_gptq_cold_and_after_one_row(matrix: Matrix) -> None:
    cold, warm = replay.cost(matrix, gate="no_gptq"), replay.cost(matrix, gate="no_gptq", revealed=True)
    assert means(cold)[0] >= 1.506
    assert means(warm)[0] >= 1.586
    assert (cold.violations, warm.violations) == ((), ())
    assert not any(mode.startswith("gptq") for score in (cold, warm) for mode in score.modes.values())


def test_an_unseen_length_class_costs_what_the_specification_says(matrix: Matrix) -> None:
    """With half its cap expected of an answer of one letter, gpqa breaks the energy constraint (no names help)."""
    score = replay.cost(matrix, known_lengths=False)
    assert {violation.split(":")[0] for violation in score.violations or ()} == {"gpqa_eval"}


def slower(matrix: Matrix, family: str, factor: float) -> Matrix:
    """The same matrix, with other latencies and energies of one family."""
    cells = [
        Cell(
            **{
                **{name: getattr(cell, name) for name in Cell.__struct_fields__},
                "latency_ms": cell.latency_ms * factor,
                "ttft_ms": cell.ttft_ms * factor,
                "energy_per_token_j": cell.energy_per_token_j * factor,
            }
        )
        if cell.family == family
        else cell
        for cell in matrix.cells.values()
    ]
    return Matrix(cells, matrix.live, matrix.digest)


@pytest.mark.parametrize("family", [SS, SP, GSM8K, "gpqa_eval"])
def test_the_judged_family_has_no_part_in_its_own_predictions(matrix: Matrix, family: str) -> None:
    features = replay.features_of(matrix, family)
    told = replay.candidates_of(matrix, family, features)
    assert replay.candidates_of(slower(matrix, family, 10.0), family, features) == told
    other = SL if family != SL else SS
    assert replay.candidates_of(slower(matrix, other, 10.0), family, features) != told


def test_features_hold_no_names(matrix: Matrix) -> None:
    for family in matrix.families:
        features = replay.features_of(matrix, family)
        assert (features.task, features.memory_pressure) == (None, 0.0)
        assert features.num_prompt_tokens == matrix.cells[family, REFERENCE].num_prompt_tokens
        assert features.shared_prefix == (family == SP)


def test_lines_meet_the_specifications_coefficients(matrix: Matrix) -> None:
    """Section 6's table of priors, fitted there on the same rows."""
    lines = replay.fitted(matrix, matrix.families)
    for mode, base, slope, tpot in (
        (REFERENCE, 13.8, 0.0667, 20.0),
        ("prefix_caching", 28.1, 0.0634, 14.6),
        ("int8_quant", 25.2, 0.0432, 10.8),
        ("gptq_4bit", 36.1, 0.0643, 7.0),
        ("gptq_plus_prefix_caching", 32.5, 0.0672, 7.2),
        ("speculative_decoding", 22.1, 0.0752, 10.3),
    ):
        line = lines[mode]
        assert line.ttft_base_ms == pytest.approx(base, rel=0.08)
        assert line.ttft_ms_per_token == pytest.approx(slope, rel=0.05)
        assert line.tpot_ms == pytest.approx(tpot, rel=0.06)
        assert line.eos_step_ms == pytest.approx(34.6 if mode == "speculative_decoding" else line.tpot_ms, rel=0.02)


def test_a_coefficient_that_would_be_negative_is_nothing() -> None:
    def shape(prompt: int, ttft_ms: float) -> Shape:
        return Shape(
            num_prompt_tokens=prompt, num_cached_tokens=0, num_output_tokens=11, ends_by_eos=False,
            ttft_ms=ttft_ms, latency_ms=ttft_ms + 100.0, energy_mj=1e4,
        )  # fmt: skip

    line = fit([shape(100, 20.0), shape(200, 19.0), shape(400, 18.0)])
    assert line.ttft_ms_per_token == 0.0
    assert line.tpot_ms == pytest.approx(10.0)
    assert 18.0 <= line.ttft_base_ms <= 20.0


# --- the bound on energy, in the policy itself ------------------------------------------------------------------------

FLEET = tuple(MODES[name] for name in (REFERENCE, "int8_quant", "gptq_4bit"))


def decide(figures: list[tuple[int, float, int | None]], ratio: float, modes: tuple[Mode, ...] = FLEET) -> str:
    """`cost` over (mask, E2EL ms, mJ) per mode."""
    by = make_policy(PolicyConfig(name="cost", cost=CostConfig(energy_weight=0.0, energy_ratio_max=ratio)), modes)
    candidates = [
        Candidate(mode.name, mask, 1.0, 1.0, e2el_ms, mj, 0, 1)
        for mode, (mask, e2el_ms, mj) in zip(modes, figures, strict=True)
    ]
    features = Features(100, 10, 10, False, None, "standard", 0, 0, 0.0, 0.0, 0, None, None)
    return modes[by.choose(features, candidates, Random(1)).arm].name


def test_cost_keeps_to_the_references_energy() -> None:
    fast_and_hungry: list[tuple[int, float, int | None]] = [(0, 100.0, 50), (0, 80.0, 50), (0, 10.0, 51)]
    assert decide(fast_and_hungry, 0.0) == "gptq_4bit"
    assert decide(fast_and_hungry, 1.0) == "int8_quant"
    assert decide(fast_and_hungry, 1.03) == "gptq_4bit"
    # The reference counts also where it must not serve; unknown energy is not too much.
    assert decide([(int(Mask.QUALITY), 1.0, 50), (0, 80.0, 50), (0, 10.0, 51)], 1.0) == "int8_quant"
    assert decide([(0, 100.0, 50), (0, 80.0, 50), (0, 10.0, None)], 1.0) == "gptq_4bit"
    assert decide([(0, 100.0, None), (0, 80.0, 50), (0, 10.0, 51)], 1.0) == "gptq_4bit"


def test_a_bound_that_leaves_nothing_is_lifted() -> None:
    down = int(Mask.HEALTH)
    assert decide([(down, 100.0, 50), (0, 80.0, 60), (0, 10.0, 90)], 1.0) == "gptq_4bit"


def test_each_model_has_a_reference_of_its_own() -> None:
    def mode(name: str, model: str, *, reference: bool = True) -> Mode:
        return Mode(name=name, engine=name, model=model, reference=reference)

    modes = (mode("spec", "big", reference=False), mode("big", "big"), mode("small", "small"))
    # 40 mJ is over big's 30 and under small's 100.
    assert decide([(0, 10.0, 40), (0, 50.0, 30), (0, 100.0, 100)], 1.0, modes) == "big"


# --- the published rules ---------------------------------------------------------------------------------------------


def test_on_the_matrix_only_rules_2_to_6_fire_when_names_are_given(matrix: Matrix) -> None:
    fired = {rule(replay.workload(matrix, family)).rule for family in matrix.families}
    assert fired == {2, 3, 4, 5, 6}
    hidden = {rule(replay.workload(matrix, family, named=False)).rule for family in matrix.families}
    assert {7, 8, 9} <= hidden


PLAIN = Workload(num_prompt_tokens=500, num_output_tokens=100)


@pytest.mark.parametrize(
    ("number", "mode", "score", "changed"),
    [
        (1, "int8_plus_continuous_batching", 0, {"batch_pressure": "high", "num_output_tokens": 8}),
        (2, "gptq_plus_prefix_caching", 0, {"shared_prefix": True, "batch_pressure": "medium", "num_output_tokens": 8}),
        (3, "gptq_4bit", 0, {"memory_pressure": True, "name": SL}),
        (4, "speculative_decoding", 0, {"name": SL, "tag": "mlu"}),
        (4, "gptq_4bit", 0, {"name": LS}),
        (5, "speculative_decoding", 0, {"tag": "gsm8k"}),
        (6, "int8_quant", 65, {"tag": "tam", "num_prompt_tokens": 512, "num_output_tokens": 8}),
        (7, "speculative_decoding", 0, {"num_prompt_tokens": 384, "num_output_tokens": 64}),
        (8, "speculative_decoding", 0, {"tag": "mt_bench"}),
        (8, "speculative_decoding", 0, {"tag": "alpacaeval_2"}),
        (8, "speculative_decoding", 0, {"num_output_tokens": 128}),
        (9, "int8_quant", 65, {"num_prompt_tokens": 512, "num_output_tokens": 8}),
        (9, "int8_quant", 35, {"num_prompt_tokens": 1024, "num_output_tokens": 32}),
        (10, "int8_quant", 0, {"num_prompt_tokens": 400, "num_output_tokens": 65}),
    ],
)
def test_each_published_rule_fires_on_synthetic_features(
    number: int, mode: str, score: int, changed: dict[str, object]
) -> None:
    fields = {name: getattr(PLAIN, name) for name in Workload.__struct_fields__}
    ruling = rule(Workload(**{**fields, **changed}))
    assert (ruling.rule, ruling.mode, ruling.score) == (number, mode, score)


def test_batches_are_named_as_the_controller_names_them() -> None:
    assert [batch_pressure(n) for n in (1, 2, 3, 4, 9)] == ["low", "medium", "medium", "high", "high"]


# --- traps of the data -----------------------------------------------------------------------------------------------


def test_ratios_are_averaged_not_latencies(matrix: Matrix) -> None:
    def of_means(modes: dict[str, str]) -> float:
        slow = sum(matrix.cells[family, REFERENCE].latency_ms for family in modes)
        return slow / sum(matrix.cells[family, mode].latency_ms for family, mode in modes.items())

    def everywhere(mode: str) -> dict[str, str]:
        return dict.fromkeys(matrix.deployment, mode)

    rules = {family: rule(replay.workload(matrix, family)).mode for family in matrix.deployment}
    assert of_means(rules) == pytest.approx(2.366, abs=5e-4)
    assert of_means(everywhere("gptq_plus_prefix_caching")) == pytest.approx(2.550, abs=5e-4)
    assert of_means(everywhere("int8_quant")) == pytest.approx(1.797, abs=5e-4)
    assert matrix.score("", rules, judged=False).means.d6_speedup == pytest.approx(2.389, abs=5e-4)


def test_the_notebooks_figure_sent_the_question_sets_to_fp16(matrix: Matrix) -> None:
    modes = {
        family: rule(replay.workload(matrix, family)).mode if family in matrix.deployment else REFERENCE
        for family in matrix.families
    }
    assert matrix.score("", modes).means.w605_speedup == pytest.approx(2.3775, abs=5e-5)


def test_batches_of_four_are_never_ranked(matrix: Matrix) -> None:
    batched = {mode for (_, mode), cell in matrix.cells.items() if cell.batch_size != 1}
    assert batched == {"continuous_batching", "int8_plus_continuous_batching"}
    assert not batched & set(MODES)
    for family in matrix.families:
        assert not batched & set(matrix.measured(family))


def test_one_token_has_no_tpot_and_its_rest_is_the_step_of_the_mode(matrix: Matrix) -> None:
    for family in MULTIPLE_CHOICE:
        for mode in matrix.measured(family):
            cell = matrix.cells[family, mode]
            assert 7.0 - 0.3 <= cell.latency_ms - cell.ttft_ms <= 35.0
    # Without those rows nothing changes in what a token takes.
    with_them = replay.fitted(matrix, matrix.families)["gptq_4bit"].tpot_ms
    without = replay.fitted(matrix, [*matrix.deployment])["gptq_4bit"].tpot_ms
    assert with_them == pytest.approx(without, rel=0.02)


def test_on_multiple_choice_gptq_and_speculation_lose_and_int8_hardly_gains(matrix: Matrix) -> None:
    for family in MULTIPLE_CHOICE:
        for mode in ("gptq_4bit", "speculative_decoding"):
            assert 0.65 <= matrix.speedup(family, mode) <= 0.88
        assert 1.01 <= matrix.speedup(family, "int8_quant") <= 1.15


def test_an_oracle_of_latency_hides_energy_and_the_pareto_set_shows_it(matrix: Matrix) -> None:
    assert matrix.oracle(LL) == "gptq_4bit"
    assert matrix.pareto(LL) == ("gptq_4bit", "gptq_plus_prefix_caching")
    assert all(matrix.oracle(family) in matrix.pareto(family) for family in matrix.families)
    assert fmean(len(matrix.pareto(family)) for family in matrix.families) > 1


def test_memory_says_nothing_and_missing_quality_counts_as_safe(matrix: Matrix) -> None:
    for family in matrix.families:
        for mode in matrix.measured(family):
            assert not any("memory" in fault for fault in matrix.faults(family, mode))
    assert matrix.cells[SP, "gptq_4bit"].rouge_l is None
    assert matrix.quality_fault(SP, "gptq_4bit") == ""


def test_the_held_out_run_is_nowhere() -> None:
    """The paper's headline run stays out of data and code; the attribution alone says that it exists."""
    held_out = "2026" + "0506"
    for file in sorted((ROOT / "msd").rglob("*")):
        if file.suffix in (".py", ".csv", ".json", ".toml"):
            assert held_out not in file.read_text(encoding="utf-8"), file
    assert sorted(file.name for file in published.FOLDER.iterdir()) == [
        "README.md", "family_mode_matrix__run_20260508.csv", "online_controller__run_20260508.csv",
    ]  # fmt: skip
    assert "Apache License 2.0" in (published.FOLDER / "README.md").read_text()


def test_the_data_is_what_it_was_copied_from() -> None:
    if not SHARED.is_dir():
        pytest.skip("the folder that the data was copied from is not beside this checkout")
    for name in (published.MATRIX_FILE, published.ONLINE_FILE):
        assert (published.FOLDER / name).read_bytes() == (SHARED / name).read_bytes()


@pytest.mark.parametrize("damage", ["missing", "cut", "column", "binary"])
def test_damaged_data_is_a_typed_error(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(published.FOLDER, folder)
    file = folder / published.MATRIX_FILE
    match damage:
        case "missing":
            file.unlink()
        case "cut":
            file.write_text(file.read_text()[:3_000])
        case "column":
            file.write_text(file.read_text().replace("latency_ms", "latency", 1))
        case _:
            file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="install msd again"):
        published.load(folder)


# --- the command -----------------------------------------------------------------------------------------------------


def test_replay_json_of_one_policy(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["replay", "--policy", "cost", "--gate", "no_gptq", "--json"]) == EXIT_OK
    answer = json.loads(capsys.readouterr().out)
    names = [row["name"] for row in answer["rows"]]
    assert names[:3] == [
        "cost, no GPTQ",
        "cost, one row revealed, no GPTQ",
        "cost, length class unseen, no GPTQ",
    ]
    assert answer["rows"][0]["note"] == "latency_weight 1, energy_weight 0.2, energy_ratio_max 0"
    assert "A100" in answer["data"]
    assert set(answer["pareto"]) == set(answer["rows"][0]["modes"])


def test_replay_takes_weights_from_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "msd.toml"
    file.write_text(
        '[[model]]\nname = "m"\n[[engine]]\nname = "a"\nmodel = "m"\nkind = "sim"\n'
        "[policy.cost]\nlatency_weight = 0.0\nenergy_weight = 1.0\n"
    )
    assert cli.main(["replay", "--policy", "cost", "--gate", "measured", "--config", str(file), "--json"]) == EXIT_OK
    row = json.loads(capsys.readouterr().out)["rows"][0]
    assert row["note"] == "latency_weight 0, energy_weight 1, energy_ratio_max 0"
    assert row["means"]["d6_energy"] < 0.43


def test_a_policy_that_the_matrix_cannot_replay_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["replay", "--policy", "round_robin"]) == EXIT_CONFIG
    assert "one of cost, learned, rules, fixed, oracle" in capsys.readouterr().err

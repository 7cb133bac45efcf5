"""`make gpu`, as far as it goes without a GPU: the plan is loadable, resumes, and its report judges what it should."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from msd import gate
from msd.config import parse
from msd.engine.tokens import load_tokenizer
from tests.gpu import plan as plans
from tests.gpu import report, shapes
from tests.gpu.deployment import Turn, append, missing, read_turns, write_stated_gate


def make_plan(folder: Path) -> plans.Plan:
    (folder / "config").mkdir()
    return plans.gpu(folder, frozenset({"synthetic_acceptance_length"}))


def turn(condition: str, family: str, number: int, e2el_ms: float, energy_mj: int | None = 1_000) -> Turn:
    return Turn(
        call=1,
        round=number,
        condition=condition,
        family=family,
        modes=[condition],
        reasons=["x"],
        ttft_ms=[10.0],
        e2el_ms=[e2el_ms],
        num_tokens=100,
        energy_mj=energy_mj,
        wall_s=1.0,
    )


def test_the_gpu_configuration_is_valid_and_its_gate_file_intact(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    file = tmp_path / "config" / "config.toml"
    write_stated_gate(file, plan)
    config = parse(plan.config, file=str(file), base_dir=file.parent)
    assert tuple(engine.name for engine in config.engine) == plan.engines
    stated = gate.load(tmp_path / "config" / "gate.json")
    verdicts = {(row.mode, row.task): row.verdict for row in stated.rows}
    assert verdicts["gptq", plans.ALL] == "certified"
    assert verdicts["gptq", plans.NO_GPTQ] == "revoked"
    assert verdicts["int8", plans.NO_GPTQ] == "certified"
    assert stated.stated


def test_the_shape_is_a_model_folder_whose_tokens_are_words(tmp_path: Path) -> None:
    shapes.make(tmp_path / "tiny", shapes.LLAMA_8B | {"vocab_size": 130_000})
    tokenizer = load_tokenizer(tmp_path / "tiny")
    assert tokenizer.encode("w7 w128000 w7") == (7, 128_000, 7)
    assert json.loads((tmp_path / "tiny/config.json").read_text())["num_hidden_layers"] == 32


def test_a_second_call_takes_only_the_turns_that_are_missing(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    everything = missing(plan, [], rounds=2)
    assert len(everything) == 2 * len(plan.conditions) * (len(plan.families) + 1)
    number, condition, family = everything[0]
    assert family is not None
    append(tmp_path / "turns.jsonl", msgspec.json.encode(turn(condition.name, family.name, number, 5.0)))
    with (tmp_path / "turns.jsonl").open("ab") as file:
        file.write(b'{"call": 1, "rou')  # torn by a kill
    left = missing(plan, read_turns(tmp_path), rounds=2)
    assert left == everything[1:]


def test_ratios_are_means_over_families_and_bars_need_every_family(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    turns = []
    for i, family in enumerate(plan.families):
        turns += [
            turn("fp16_eager", family.name, 0, 1_000.0, 4_000),
            turn("fp16", family.name, 0, 800.0, 3_000),
            turn("int8", family.name, 0, 500.0, 2_000),
            turn("cost", family.name, 0, 250.0 if i else 500.0, 1_000),
            turn("cost_no_gptq", family.name, 0, 495.0 if i else 520.0, 2_000),
        ]
    bars = {bar.name: bar for bar in report.bars_of(plan, report.cells_of(plan, turns))}
    against_eager = bars["cost against eager FP16, latency"]
    assert against_eager.value == (2.0 + 5 * 4.0) / 6
    assert against_eager.holds
    assert bars["cost against eager FP16, energy per token"].value == 0.25
    worst = bars["cost_no_gptq against the best quality-safe fixed mode (int8), worst family"]
    assert worst.value is not None
    assert abs(worst.value - 500 / 520) < 1e-9
    assert worst.holds is False
    partial = [t for t in turns if t.family != plan.families[0].name]
    bars = {bar.name: bar for bar in report.bars_of(plan, report.cells_of(plan, partial))}
    assert bars["cost against eager FP16, latency"].value is None
    assert bars["cost against eager FP16, latency"].holds is None

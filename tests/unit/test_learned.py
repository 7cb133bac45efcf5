"""Trained routers: what scikit-learn learnt is what runs; held-out families; files that cannot be trusted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

import msgspec
import numpy as np
import pytest
from msgspec import structs

from msd import cli, router_file
from msd.config import InvalidConfigError, LearnedConfig, PolicyConfig, parse
from msd.core.scheduler import Scheduler
from msd.domain import Candidate, Features, Mask, Mode, Precision, Speculation
from msd.errors import EXIT_CONFIG, EXIT_OK, ConfigError
from msd.learning import matrix as published
from msd.learning import router_training as training
from msd.learning.matrix import MODES, Matrix
from msd.policy.learned import FEATURES, Learned, vector
from msd.router_file import KINDS, Kind, ModeScorer, Router, Tree

ROOT = Path(__file__).resolve().parents[2]
ROUTER = ROOT / "tests" / "data" / "router.json"
RULES_BEHIND_THE_MASK = 1.917
SIM = '[[model]]\nname = "m"\n[[engine]]\nname = "a"\nmodel = "m"\nkind = "sim"\n'


@pytest.fixture(scope="module")
def matrix() -> Matrix:
    return published.load()


def mode(name: str, precision: Precision = "bf16", speculation: Speculation = "none", cached: bool = False) -> Mode:
    return Mode(name=name, engine=name, model="m", precision=precision, speculation=speculation, prefix_caching=cached)


def request(prompt: int = 500, output: int = 100, cap: int = 200, shared: bool = False) -> Features:
    return Features(prompt, output, cap, shared, None, "standard", 0, 0, 0.0, 0.0, 0, None, None)


def scorer(name: str, base: float, **changed: object) -> ModeScorer:
    plain = ModeScorer(mode=name, precision="bf16", speculation="none", prefix_caching=False, base=base)
    return structs.replace(plain, **changed)


def router(*scorers: ModeScorer, kind: Kind = "tree") -> Router:
    return structs.replace(router_file.load(ROUTER), kind=kind, modes=scorers)


def choose(
    by: Learned, masks: Sequence[int], saw: Features | None = None, running: Sequence[int] = ()
) -> tuple[int, str]:
    candidates = [
        Candidate(f"m{arm}", mask, 1.0, 1.0, 1.0, None, running[arm] if running else 0, 0 if mask else 1)
        for arm, mask in enumerate(masks)
    ]
    choice = by.choose(saw or request(), candidates, Random(0))
    return choice.arm, choice.reason


# --- what was learnt is what runs ------------------------------------------------------------------------------------


def drawn(seed: int, num: int) -> list[Features]:
    rng = Random(seed)
    return [
        structs.replace(
            request(rng.randrange(5_000), rng.randrange(600), rng.randrange(1, 600), rng.random() < 0.5),
            num_running=rng.randrange(50),
            memory_pressure=rng.random(),
        )
        for _ in range(num)
    ]


@pytest.mark.parametrize("kind", ["tree", "forest", "boosting"])
def test_exported_trees_score_as_scikit_learn_predicts(
    kind: Kind, matrix: Matrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The models are caught as they are fitted; their predictions are compared with what `learned` computes."""
    import sklearn.ensemble
    import sklearn.tree

    models: list[object] = []
    owner, name = {
        "tree": (sklearn.tree, "DecisionTreeRegressor"),
        "forest": (sklearn.ensemble, "RandomForestRegressor"),
        "boosting": (sklearn.ensemble, "GradientBoostingRegressor"),
    }[kind]
    made = getattr(owner, name)

    def caught(*args: object, **kwargs: object) -> object:
        models.append(made(*args, **kwargs))
        return models[-1]

    monkeypatch.setattr(owner, name, caught)
    modes = list(MODES.values())
    scorers = training.train(kind, training.matrix_examples(matrix, matrix.families), modes)
    assert len(models) == len(modes)
    by = Learned.of(router(*scorers, kind=kind), modes)
    saw = drawn(1, 200)
    # scikit-learn looks at 32-bit floats.
    x = np.array([vector(features) for features in saw], dtype=np.float32)
    for arm, model in enumerate(models):
        predicted = model.predict(x)  # type: ignore[attr-defined]
        scores = [by._score(arm, tuple(map(float, row))) for row in x]
        assert scores == pytest.approx(list(predicted), abs=1e-9)


def test_the_logistic_router_is_fitted_to_win_pairs(matrix: Matrix) -> None:
    """Where one mode is better everywhere, it scores better everywhere; the stake decides between contrary pairs."""
    modes = [mode("good"), mode("bad", "int8")]
    examples = [training.Example(features, {"good": 0.5, "bad": 0.0}) for features in drawn(2, 40)]
    good, bad = training.train("logistic", examples, modes)
    by = Learned.of(router(good, bad), modes)
    assert all(choose(by, [0, 0], features)[0] == 0 for features in drawn(3, 40))
    same = request()
    contrary = [training.Example(same, {"good": 0.1, "bad": 0.0})] * 9 + [
        training.Example(same, {"good": 0.0, "bad": 2.0})
    ]
    by = Learned.of(router(*training.train("logistic", contrary, modes)), modes)
    assert choose(by, [0, 0], same)[0] == 1


def test_a_mode_that_breaks_the_energy_constraint_gains_less_than_the_reference() -> None:
    assert training.gain(50.0, 100.0, 1.01) < 0.0 < training.gain(50.0, 100.0, 1.0)
    assert training.gain(50.0, 100.0, None) == training.gain(50.0, 100.0, 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_families_are_routed_at_least_as_well_as_by_the_rules(kind: Kind, matrix: Matrix) -> None:
    score = training.held_out_matrix(matrix, kind)
    assert score.means.f11_speedup is not None
    assert score.means.f11_speedup >= RULES_BEHIND_THE_MASK
    assert score.violations == ()
    assert score.regret is not None
    assert score.oracle_match is not None
    assert 0 <= score.regret < 0.05


def test_a_family_that_is_held_out_is_in_neither_rows_nor_drawn_requests(matrix: Matrix) -> None:
    family = "gsm8k_eval"
    others = [other for other in matrix.families if other != family]
    changed = Matrix(
        [
            structs.replace(cell, latency_ms=9.0, ttft_ms=1.0) if cell.family == family else cell
            for cell in matrix.cells.values()
        ],
        matrix.live,
        matrix.digest,
    )
    assert training.matrix_examples(changed, others) == training.matrix_examples(matrix, others)
    assert training.matrix_examples(changed, matrix.families) != training.matrix_examples(matrix, matrix.families)
    examples = training.matrix_examples(matrix, others)
    assert len(examples) == 10 + training.NUM_DRAWN
    assert all(example.features.task is None for example in examples)


# --- the policy ------------------------------------------------------------------------------------------------------


STUMP = Tree(
    feature=(0, -1, -1), threshold=(0.5, 0.0, 0.0), left=(1, -1, -1), right=(2, -1, -1), value=(0.0, 1.0, -1.0)
)
FLEET = (mode("m0"), mode("m1", "int8"), mode("m2", "int4"))
THREE = (scorer("m0", 0.0), scorer("m1", 2.0, precision="int8"), scorer("m2", 1.0, precision="int4"))
FULL, DOWN = int(Mask.SLOTS), int(Mask.HEALTH)


def test_the_best_that_may_serve_is_taken() -> None:
    by = Learned.of(router(*THREE), FLEET)
    assert choose(by, [0, 0, 0]) == (1, "ranked first by the trained router (tree)")
    assert choose(by, [0, int(Mask.QUALITY), 0])[0] == 2
    assert choose(by, [0, DOWN, DOWN])[0] == 0


def test_a_free_slot_goes_before_a_better_rank_and_full_modes_are_waited_for_by_rank() -> None:
    by = Learned.of(router(*THREE), FLEET)
    assert choose(by, [0, FULL, FULL])[0] == 0
    assert choose(by, [FULL, FULL, FULL]) == (1, "ranked first by the trained router (tree); all full, waits")
    assert choose(by, [FULL, DOWN | FULL, FULL])[0] == 2


def test_modes_of_one_kind_share_a_score_and_the_emptier_goes_first() -> None:
    by = Learned.of(router(*THREE), (mode("a", "int8"), mode("b", "fp8"), mode("c")))
    assert choose(by, [0, 0, 0], running=[3, 1, 0])[0] == 1
    assert choose(by, [0, 0, 0], running=[1, 1, 0])[0] == 0


def test_modes_are_matched_by_name_then_by_what_they_have_in_common() -> None:
    known = (
        scorer("x", 1.0, precision="int4"),
        scorer("y", 2.0, precision="int4", prefix_caching=True),
        scorer("z", 3.0, precision="int4", speculation="ngram"),
        scorer("base", 0.0),
    )
    assert choose(Learned.of(router(*known), (mode("x", "int4", cached=True), mode("q"))), [0, 0])[0] == 0
    by = Learned.of(
        router(*known), (mode("i4", "int4"), mode("i4c", "int4", cached=True), mode("i4s", "int4", "draft"))
    )
    assert [by._score(by._which[arm], vector(request())) for arm in range(3)] == [1.0, 2.0, 3.0]
    assert by._which == (0, 1, 2)


def test_a_mode_that_the_router_has_not_met_serves_only_when_no_other_may() -> None:
    by = Learned.of(router(scorer("m0", -5.0)), (mode("new", "int4"), mode("m0")))
    assert choose(by, [0, 0])[0] == 1
    assert choose(by, [0, DOWN]) == (0, "not known to the trained router, but none of those that are may serve")


def test_trees_and_weights_are_followed() -> None:
    known = (
        scorer("m0", 0.25, trees=(STUMP, STUMP)),
        scorer("m1", 0.0, precision="int8", weights=(0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0)),
    )
    by = Learned.of(router(*known), FLEET[:2])
    short, long = request(prompt=3), request(prompt=4_000)
    assert (by._score(0, vector(short)), by._score(0, vector(long))) == (2.25, -1.75)
    assert [choose(by, [0, 0], saw)[0] for saw in (short, long, structs.replace(short, shared_prefix=True))] == [
        0,
        1,
        0,
    ]


def test_features_are_finite_and_as_many_as_named() -> None:
    for saw in (request(0, 0, 1), request(131_072, 131_072, 131_072, True)):
        values = vector(saw)
        assert len(values) == len(FEATURES)
        assert all(-2.0 <= value <= 2.0 for value in values)


# --- files -----------------------------------------------------------------------------------------------------------


def policy_of(file: Path, modes: Sequence[Mode] = FLEET) -> Learned:
    return Learned(PolicyConfig(name="learned", learned=LearnedConfig(file=str(file))), modes)


def test_a_router_survives_its_file(tmp_path: Path) -> None:
    file = tmp_path / "router.json"
    router_file.write(file, router(*THREE))
    assert structs.replace(router_file.load(file), checksum="") == structs.replace(router(*THREE), checksum="")
    assert choose(policy_of(file), [0, 0, 0])[0] == 1


def test_no_file_is_an_error_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs a trained router \(`msd train-router --out FILE` writes one\)"):
        Learned(PolicyConfig(name="learned"), FLEET)
    with pytest.raises(ConfigError, match="No such file"):
        policy_of(tmp_path / "none.json")


def edited(**changed: object) -> bytes:
    document = json.loads(ROUTER.read_bytes())
    document.update(changed)
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xff", "is no router"),
        (b"[]", "is no router"),
        (edited(schema=9), "has schema 9, not 1"),
        (edited(kind="oracle"), "is no router"),
        (edited(unknown=1), "is no router"),
        (edited(num_examples=1), "is damaged: its checksum does not match"),
    ],
)
def test_a_file_that_is_no_router_is_refused(content: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / "router.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=says) as caught:
        policy_of(file)
    assert "train-router" in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"trees": (structs.replace(STUMP, left=(0, -1, -1)),)}, "points nowhere"),
        ({"trees": (structs.replace(STUMP, right=(3, -1, -1)),)}, "points nowhere"),
        ({"trees": (structs.replace(STUMP, feature=(7, -1, -1)),)}, "points nowhere"),
        ({"trees": (structs.replace(STUMP, value=(1.0,)),)}, "differ in length"),
        ({"trees": (Tree(feature=(), threshold=(), left=(), right=(), value=()),)}, "differ in length"),
        (
            {
                "trees": (
                    Tree(
                        feature=(*([0] * 40), -1), threshold=(0.0,) * 41, left=tuple(range(1, 42)),
                        right=tuple(range(1, 42)), value=(0.0,) * 41,
                    ),
                )
            },
            "deeper than 32",
        ),
        ({"weights": (1.0,)}, "1 weights for 7 features"),
    ],
)  # fmt: skip
def test_a_signed_router_with_broken_arrays_is_refused(changed: dict[str, object], says: str, tmp_path: Path) -> None:
    file = tmp_path / "router.json"
    router_file.write(file, router(scorer("m0", 0.0, **changed)))
    with pytest.raises(ConfigError, match=says):
        policy_of(file)


def test_a_router_of_other_features_or_other_modes_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "router.json"
    router_file.write(file, structs.replace(router(*THREE), features=("phase_of_the_moon",)))
    with pytest.raises(ConfigError, match="goes by phase_of_the_moon"):
        policy_of(file)
    router_file.write(file, router(THREE[1]))
    with pytest.raises(ConfigError, match="knows none of the modes"):
        policy_of(file, FLEET[:1])


def test_configuration_wants_the_file_and_finds_it_beside_itself(tmp_path: Path) -> None:
    def read(text: str) -> str:
        with pytest.raises(InvalidConfigError) as caught:
            parse(SIM + text, file="c", base_dir=tmp_path)
        return str(caught.value)

    assert "policy.learned.file: missing: `learned` runs a trained router" in read('[policy]\nname = "learned"\n')
    named = '[policy]\nname = "learned"\n[policy.learned]\nfile = "r.json"\n'
    assert f"there is no file {tmp_path / 'r.json'}" in read(named)
    (tmp_path / "r.json").write_bytes(ROUTER.read_bytes())
    config = router_file.anchored(parse(SIM + named, file="c", base_dir=tmp_path), tmp_path)
    assert config.policy.learned.file == str(tmp_path / "r.json")
    assert Scheduler.from_config(config, Random(1)).policy_name == "learned"


# --- the command -----------------------------------------------------------------------------------------------------


def test_train_router_writes_what_it_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "router.json"
    assert cli.main(["train-router", "--kind", "tree", "--out", str(file), "--json"]) == EXIT_OK
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    known = router_file.load(file)
    assert known.held_out == msgspec.convert(answer["scores"]["tree"], router_file.HeldOut)
    assert (known.kind, known.data_hash, known.num_examples) == ("tree", published.load().digest, 311)
    assert known.features == FEATURES
    assert [it.mode for it in known.modes] == list(MODES)
    assert "of 11: tree, short_prompt_short_output" in captured.err
    assert choose(policy_of(file, list(MODES.values())), [0] * 6, request(1_380, 128, 128))[0] in (4, 5)
    # The same again is the same file but for its time: nothing is drawn without a seed.
    again = tmp_path / "again.json"
    cli.main(["train-router", "--kind", "tree", "--out", str(again)])
    told = capsys.readouterr().out
    assert "A100" in told
    assert "held out: each family left out once" in told
    assert router_file.load(again).modes == known.modes


def test_train_router_says_where_it_cannot_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train-router", "--out", str(tmp_path / "no" / "router.json")]) == EXIT_CONFIG
    assert "there is no folder" in capsys.readouterr().err


def test_a_router_trained_on_all_families_is_not_passed_off_as_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        cli.main(["replay", "--policy", "learned", "--router", str(ROUTER), "--gate", "measured", "--json"]) == EXIT_OK
    )
    row = json.loads(capsys.readouterr().out)["rows"][0]
    assert row["name"] == "learned: logistic"
    assert row["note"] == "trained on these families: NOT held out"

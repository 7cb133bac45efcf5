"""The gate file: intact or refused by name; recipes; what production took away, beyond the process."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from structlog.testing import capture_logs

from msd import gate, profile, router_file
from msd.config import Config, InvalidConfigError, load, parse
from msd.daemon import Daemon
from msd.errors import ConfigError
from msd.gate import Withdrawal
from msd.recipe import fingerprint, is_lossless, recipe_hash, recipe_hashes
from tests.unit.core_world import gate_of

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
[[model]]
name = "toy"
[[engine]]
name = "m0"
model = "toy"
kind = "sim"
[quality]
gate = "gate.json"
"""
WITHDRAWAL = Withdrawal(mode="m1", recipe="m1", task="copy", gate="c", num_pairs=9, difference=-0.1, capital=21.0)


# --- the file -------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read(tmp_path: Path) -> None:
    made = gate_of({"m1": {"copy": "certified"}})
    gate.write(tmp_path / "gate.json", made)
    read = gate.load(tmp_path / "gate.json")
    assert msgspec.structs.replace(read, checksum="") == msgspec.structs.replace(made, checksum="")
    assert read.checksum == gate.checksum(made)


def write_gate(file: Path) -> None:
    gate.write(file, gate_of({}))


def write_profile(file: Path) -> None:
    made = {"schema": 1, "created": "", "command": "", "device": "", "engine_version": "", "source": "simulated"}
    profile.write(file, msgspec.convert({**made, "idle_w": None, "modes": []}, profile.Profile))


def write_router(file: Path) -> None:
    scores = dict.fromkeys(("num_judged", "num_violations"), 0) | dict.fromkeys(
        ("speedup", "energy_ratio", "regret", "oracle_match"), 0.0
    )
    made = {"schema": 1, "kind": "tree", "num_examples": 0, "features": [], "modes": [], "versions": {}}
    words = dict.fromkeys(("created", "command", "source", "data_hash"), "")
    held_out = {"unit": "families", **scores}
    router_file.write(file, msgspec.convert({**made, **words, "held_out": held_out}, router_file.Router))


@pytest.mark.parametrize("write", [write_gate, write_profile, write_router])
def test_a_crash_while_it_is_written_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    """The disk is full before the last byte is safe: the old file stands, and nothing lies beside it."""
    file = tmp_path / "measured.json"
    write(file)
    file.write_text("measured for hours")

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("msd.files.os.fsync", full)
        with pytest.raises(ConfigError, match="No space left on device"):
            write(file)
    assert file.read_text() == "measured for hours"
    assert list(tmp_path.iterdir()) == [file]


def edited(file: Path) -> None:
    document = json.loads(file.read_bytes())
    document["rows"][0]["verdict"] = "revoked"
    file.write_text(json.dumps(document))


def of_another_schema(file: Path) -> None:
    gate.write(file, msgspec.structs.replace(gate_of({}), schema=99))


BROKEN = [
    (Path.unlink, "No such file or directory", "`msd gate` writes one"),
    (edited, "was changed after it was measured: its checksum does not match", 'quality.ungated = "allow"'),
    (of_another_schema, "has schema 99, not 1", "run `msd gate` again"),
    (lambda file: file.write_text("{"), "cannot be read", "run `msd gate` again"),
    (lambda file: file.write_text('{"rows": 3}'), "cannot be read", "run `msd gate` again"),
]


@pytest.mark.parametrize(("harm", "why", "remedy"), BROKEN)
def test_a_broken_file_is_refused_with_why_and_what_to_do(tmp_path: Path, harm, why: str, remedy: str) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "gate.json"
    gate.write(file, gate_of({}))
    harm(file)
    with pytest.raises(ConfigError) as caught:
        gate.load(file)
    assert why in str(caught.value)
    assert remedy in str(caught.value)


@pytest.mark.parametrize(("harm", "why", "remedy"), BROKEN)
def test_the_configuration_is_refused_with_it(tmp_path: Path, harm, why: str, remedy: str) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "gate.json"
    (tmp_path / "config.toml").write_text(CONFIG)
    gate.write(file, gate_of({}))
    load(tmp_path / "config.toml")
    harm(file)
    with pytest.raises(InvalidConfigError) as caught:
        load(tmp_path / "config.toml")
    assert [problem.field for problem in caught.value.problems] == ["quality.gate"]
    assert why in str(caught.value)
    assert "config.toml:9" in str(caught.value)
    load(tmp_path / "config.toml", look_at_gate=False)


def test_the_reference_must_be_an_engine(tmp_path: Path) -> None:
    gate.write(tmp_path / "gate.json", gate_of({}))
    (tmp_path / "config.toml").write_text(CONFIG + 'reference = "m9"\n')
    with pytest.raises(InvalidConfigError, match="has this name; there is only `m0`"):
        load(tmp_path / "config.toml")


def test_the_testbeds_gate_file_is_intact_and_fits_its_models() -> None:
    """The reference's recipe is that of this checkout's weights, on any machine."""
    measured = gate.load(ROOT / "testbed" / "gate.json")
    assert not measured.stated
    config = load(ROOT / "config.toml")
    reference = next(engine for engine in config.engine if engine.name == measured.reference)
    assert recipe_hash(reference, config, ROOT) == measured.reference_recipe
    verdicts = {(row.mode, row.task): row.verdict for row in measured.rows}
    assert verdicts["int8", "*"] == "certified"
    assert verdicts["small", "get"] == "revoked"
    int8 = ROOT / "build" / "testbed" / "tiny-large-int8"
    if int8.is_dir():
        demo = load(ROOT / "testbed" / "demo.toml")
        engine = next(engine for engine in demo.engine if engine.name == "int8")
        rows = {row.recipe for row in measured.rows if row.mode == "int8"}
        assert rows == {recipe_hash(engine, demo, ROOT / "testbed")}, "the derivation of INT8 weights has changed"


# --- recipes --------------------------------------------------------------------------------------------------------


def config_of(**engine: object) -> Config:
    own = {"name": "a", "model": "toy", **engine}
    return msgspec.convert({"model": [{"name": "toy", "path": "model"}], "engine": [own]}, Config)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(bytes(3 << 20))
    return tmp_path


def hash_of(folder: Path, **engine: object) -> str:
    fingerprint.cache_clear()
    config = config_of(**engine)
    return recipe_hash(config.engine[0], config, folder)


@pytest.mark.parametrize(
    "engine",
    [
        {"max_num_seqs": 7},
        {"prefix_caching": True},
        {"args": {"enforce_eager": True, "max_model_len": 128, "gpu_memory_utilization": 0.5}},
        {"env": {"A": "b"}},
        {"name": "another"},
    ],
)
def test_what_only_changes_how_fast_keeps_the_hash(folder: Path, engine: dict[str, object]) -> None:
    assert hash_of(folder, **engine) == hash_of(folder)


@pytest.mark.parametrize(
    "engine", [{"precision": "fp16"}, {"args": {"kv_cache_dtype": "fp8"}}, {"args": {"quantization": "fp8"}}]
)
def test_what_changes_the_answers_changes_the_hash(folder: Path, engine: dict[str, object]) -> None:
    assert hash_of(folder, **engine) != hash_of(folder)


@pytest.mark.parametrize("at", [0, 1 << 20, 3 << 19, (3 << 20) - 1])
def test_one_changed_byte_of_the_weights_changes_the_hash(folder: Path, at: int) -> None:
    before = hash_of(folder)
    weights = bytearray((folder / "model" / "model.safetensors").read_bytes())
    weights[at] ^= 1
    (folder / "model" / "model.safetensors").write_bytes(weights)
    assert hash_of(folder) != before


def test_a_simulated_engine_is_known_without_its_files(folder: Path) -> None:
    before = hash_of(folder, kind="sim")
    (folder / "model" / "config.json").write_text('{"changed": 1}')
    assert hash_of(folder, kind="sim") == before
    assert hash_of(folder, kind="noop") != before


@pytest.mark.parametrize(
    ("engine", "lossless"),
    [
        ({}, True),
        ({"speculation": "ngram", "args": {"speculative_config": {"method": "ngram"}}}, True),
        ({"precision": "int8"}, False),
        ({"weights": "elsewhere"}, False),
        ({"args": {"kv_cache_dtype": "fp8"}}, False),
        ({"args": {"quantization": "fp8"}}, False),
        ({"args": {"enforce_eager": True, "block_size": 32, "compilation_config": {"level": 3}}}, True),
        ({"args": {"kv_cache_dtype": "auto", "dtype": "bfloat16"}}, True),
        ({"precision": "fp16", "args": {"dtype": "half"}}, True),
        ({"precision": "fp16", "args": {"dtype": "bfloat16"}}, False),
        ({"args": {"dtype": "auto"}}, False),
        ({"args": {"hf_overrides": {"num_hidden_layers": 2}}}, False),
        ({"args": {"enable_lora": True}}, False),
        ({"args": {"load_format": "dummy"}}, False),
        ({"args": {"an_argument_of_next_year": 1}}, False),
        ({"args": {"speculative_config": {"method": "ngram", "rejection_sample_method": "standard"}}}, True),
        ({"args": {"speculative_config": {"method": "ngram", "rejection_sample_method": "synthetic"}}}, False),
        ({"args": {"speculative_config": {"method": "ngram", "synthetic_acceptance_length": 2}}}, False),
        ({"args": {"speculative_config": {"method": "medusa"}}}, False),
        ({"args": {"speculative_config": "ngram"}}, False),
    ],
)
def test_what_is_lossless(engine: dict[str, object], lossless: bool) -> None:
    assert is_lossless(config_of(**engine).engine[0]) is lossless


# --- withdrawals ----------------------------------------------------------------------------------------------------


def test_withdrawals_are_kept_and_read_again(tmp_path: Path) -> None:
    file = tmp_path / "state" / "withdrawn.jsonl"
    assert gate.load_withdrawals(file) == ()
    gate.keep_withdrawals(file, [WITHDRAWAL])
    gate.keep_withdrawals(file, [msgspec.structs.replace(WITHDRAWAL, task="sort")])
    assert [one.task for one in gate.load_withdrawals(file)] == ["copy", "sort"]


@pytest.mark.parametrize("rest", [b'{"mode": "m1"', b'"\xff', bytes(20)])
def test_a_torn_last_line_is_skipped_with_a_warning_and_leaves_no_trace(tmp_path: Path, rest: bytes) -> None:
    file = tmp_path / "withdrawn.jsonl"
    gate.keep_withdrawals(file, [WITHDRAWAL])
    with file.open("ab") as stream:
        stream.write(rest)
    with capture_logs() as logged:
        assert gate.load_withdrawals(file) == (WITHDRAWAL,)
    assert [(line["event"], line["num_bytes"]) for line in logged] == [("torn_line_skipped", len(rest))]
    sort = msgspec.structs.replace(WITHDRAWAL, task="sort")
    gate.keep_withdrawals(file, [sort])
    with capture_logs() as logged:
        assert gate.load_withdrawals(file) == (WITHDRAWAL, sort)
    assert not logged


def test_a_last_line_without_its_newline_counts_and_stays_a_line(tmp_path: Path) -> None:
    file = tmp_path / "withdrawn.jsonl"
    file.write_bytes(msgspec.json.encode(WITHDRAWAL))
    assert gate.load_withdrawals(file) == (WITHDRAWAL,)
    gate.keep_withdrawals(file, [WITHDRAWAL])
    assert gate.load_withdrawals(file) == (WITHDRAWAL, WITHDRAWAL)


def test_a_broken_line_before_the_last_is_refused(tmp_path: Path) -> None:
    """No crash does that; starting without it would send requests to a mode that was found worse."""
    file = tmp_path / "withdrawn.jsonl"
    file.write_bytes(b'{"mode": "m1"\n' + msgspec.json.encode(WITHDRAWAL) + b"\n")
    with pytest.raises(ConfigError, match="found worse in production"):
        gate.load_withdrawals(file)


def test_a_withdrawal_is_on_the_disk_before_it_counts_as_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr("msd.gate.fsync", lambda number: synced.append(os.fstat(number).st_size))
    gate.keep_withdrawals(tmp_path / "withdrawn.jsonl", [WITHDRAWAL])
    assert synced == [len(msgspec.json.encode(WITHDRAWAL)) + 1]


# --- the daemon -----------------------------------------------------------------------------------------------------

REAL = """
[daemon]
state_dir = "state"
[[model]]
name = "toy"
path = "model"
[[engine]]
name = "m0"
model = "toy"
[[engine]]
name = "m1"
model = "toy"
precision = "int8"
"""


def test_the_daemon_says_at_its_start_which_modes_are_kept_back_and_why(folder: Path) -> None:
    daemon = Daemon(parse(REAL, file="config.toml", base_dir=folder), folder)
    with capture_logs() as logged:
        scheduler = daemon._scheduler(None)
    assert [(line["mode"], line["quality"], line["log_level"]) for line in logged] == [
        ("m0", "reference", "info"),
        ("m1", "not measured: there is no gate file (run `msd gate`)", "warning"),
    ]
    assert daemon._gated == "kept back by quality: m1"
    assert scheduler.certificates.reference == 0


def test_the_daemon_keeps_what_live_pairs_found_and_takes_it_up(folder: Path) -> None:
    fingerprint.cache_clear()
    config = parse(REAL + '[quality]\ngate = "gate.json"\n', file="config.toml", base_dir=folder, look_at_gate=False)
    recipe = recipe_hashes(config, folder)["m1"]
    signed = gate.write(folder / "gate.json", gate_of({}))
    tried = gate.Tried(
        mode="m1", recipe=recipe, task="copy", capital=3.5, mean=0.48, variance=0.01, weight=520.0, num_scored=20,
        sum_difference=-2.0, num_unscored=7, num_disagree=1,
    )  # fmt: skip
    gate.keep_trials(folder / "state" / "trials.json", signed, config.quality.delta, [tried])

    async def live() -> Daemon:
        daemon = Daemon(config, folder)
        scheduler = daemon._scheduler(None)
        assert scheduler.shadows.dump() == (tried,)
        trial = scheduler.shadows.trial(1, "copy")
        assert trial is not None
        trial.add(-1.0)
        daemon._dispatcher = SimpleNamespace(scheduler=scheduler)  # type: ignore[assignment]
        keeping = asyncio.create_task(daemon._keep_evidence())
        daemon._on_withdrawn(msgspec.structs.replace(WITHDRAWAL, recipe=recipe, gate=signed.checksum))
        assert not (folder / "state" / "withdrawn.jsonl").exists(), "written off the loop"
        daemon._keeps = False
        await asyncio.wait_for(keeping, 10)
        return daemon

    asyncio.run(live())
    assert [gone.task for gone in gate.load_withdrawals(folder / "state" / "withdrawn.jsonl")] == ["copy"]
    (kept,) = Daemon(config, folder)._scheduler(None).shadows.dump()
    assert (kept.num_scored, kept.sum_difference) == (21, -3.0)
    assert kept.capital > 3.5


def test_the_daemon_remembers_what_it_withdrew(folder: Path) -> None:
    fingerprint.cache_clear()
    config = parse(REAL + '[quality]\ngate = "gate.json"\n', file="config.toml", base_dir=folder, look_at_gate=False)
    recipes = recipe_hashes(config, folder)
    made = gate_of({"m1": {"copy": "certified", "*": "certified"}}, reference_recipe=recipes["m0"])
    rows = tuple(msgspec.structs.replace(row, recipe=recipes[row.mode]) for row in made.rows)
    signed = gate.write(folder / "gate.json", msgspec.structs.replace(made, rows=rows))
    assert Daemon(config, folder)._scheduler(None).certificates.summary(1).text == "certified"
    gone = msgspec.structs.replace(WITHDRAWAL, recipe=recipes["m1"], gate=signed.checksum)
    gate.keep_withdrawals(folder / "state" / "withdrawn.jsonl", [gone])
    again = Daemon(config, folder)
    text = again._scheduler(None).certificates.summary(1).text
    assert text == "withdrawn in production on copy after 9 pairs (-10.0 points)"
    assert again._gated == "kept back by quality: m1"

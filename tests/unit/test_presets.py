"""The mode catalogue: what a preset becomes, what stands beside it, what is refused, what a host can run."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from msd import cli
from msd.cli import check
from msd.cli.check import as_toml, plain
from msd.config import Config, EngineConfig, InvalidConfigError, parse
from msd.config.presets import PRESETS, Preset
from msd.domain import InstalledGpu, Precision, Speculation
from msd.engine import host
from msd.engine.host import Host, remark, why_not
from msd.engine.vllm_arguments import build_arguments, known_arguments
from msd.errors import EXIT_CONFIG, EXIT_OK, ConfigError
from msd.recipe import is_lossless

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = 'weights = "w"\ndraft = "d"\n'


def read(engine: str, *, kind: str = "vllm") -> Config:
    text = f'[[model]]\nname = "m"\npath = "p"\n[[engine]]\nname = "a"\nmodel = "m"\nkind = "{kind}"\n{engine}'
    return parse(text, file="config.toml", base_dir=Path(), look_at_files=False)


def engine_of(engine: str, *, kind: str = "vllm") -> EngineConfig:
    return read(engine, kind=kind).engine[0]


def needed(preset: Preset) -> str:
    lines = f'preset = "{preset.name}"\n'
    return lines + ('weights = "w"\n' if preset.weights else "") + ('draft = "d"\n' if preset.draft else "")


def why(engine: str) -> str:
    with pytest.raises(InvalidConfigError) as caught:
        read(engine)
    return str(caught.value)


# --- expansion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_every_preset_is_a_whole_engine_with_what_it_asks_for(preset: Preset) -> None:
    engine = engine_of(needed(preset))
    assert engine.precision == (preset.precision or "bf16")
    assert engine.speculation == preset.speculation
    assert engine.prefix_caching == preset.prefix_caching
    assert engine.max_num_seqs == (preset.max_num_seqs or 32)
    assert engine.precision in get_args(Precision)
    assert engine.speculation in get_args(Speculation)
    assert is_lossless(engine) == preset.lossless, "the catalogue and the recipe disagree on who needs the gate"
    arguments = build_arguments(engine, "folder", is_cpu=False, base_dir=Path("base"))
    assert known_arguments() >= arguments.keys() or not known_arguments()
    if preset.draft:
        assert arguments["speculative_config"] == {**preset.args["speculative_config"], "model": "base/d"}  # type: ignore[dict-item]


def test_the_catalogue_has_what_the_issue_names() -> None:
    assert PRESETS.keys() >= {
        "fp16", "bf16", "fp16_eager", "fp8_per_tensor", "fp8_per_channel", "int8_w8a8", "int4_gptq", "int4_awq",
        "draft_speculation", "ngram_speculation", "prefix_caching", "gptq_plus_prefix_caching",
        "int8_plus_continuous_batching", "fp8_kv",
    }  # fmt: skip
    for name in ("int4_gptq", "int4_awq", "gptq_plus_prefix_caching"):
        assert "quantization" not in PRESETS[name].args, "naming it picks the slow kernels"


def test_what_stands_beside_a_preset_wins_at_every_depth() -> None:
    engine = engine_of(
        'preset = "ngram_speculation"\nprecision = "fp16"\nmax_num_seqs = 7\n'
        "[engine.args]\nmax_model_len = 99\nspeculative_config = { num_speculative_tokens = 9 }\n"
    )
    assert (engine.precision, engine.speculation, engine.max_num_seqs) == ("fp16", "ngram", 7)
    assert engine.args == {
        "max_model_len": 99,
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 9, "prompt_lookup_max": 4},
    }
    assert PRESETS["ngram_speculation"].args["speculative_config"] == {
        "method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4,
    }, "expansion must not write into the catalogue"  # fmt: skip


def test_a_preset_can_be_unsaid() -> None:
    assert not engine_of('preset = "prefix_caching"\nprefix_caching = false\n').prefix_caching


def test_simulated_engines_take_the_traits_and_need_no_weights() -> None:
    engine = engine_of('preset = "int8_w8a8"\n', kind="sim")
    assert engine.precision == "int8"


def test_the_resolved_configuration_reads_back_as_itself() -> None:
    config = read('preset = "draft_speculation"\ndraft = "d"\n[engine.args]\nmax_model_len = 99\n')
    again = parse(as_toml(plain(config)), file="again.toml", base_dir=Path(), look_at_files=False)
    assert again == config


def test_a_users_own_mode_is_a_table_of_arguments() -> None:
    engine = engine_of('precision = "fp8"\n[engine.args]\nquantization = "fp8_per_block"\n')
    assert build_arguments(engine, "f", is_cpu=False)["quantization"] == "fp8_per_block"


# --- refusals --------------------------------------------------------------------------------------------------------


def test_an_unknown_preset_is_refused_with_the_nearest_and_its_line() -> None:
    message = why('preset = "int8_w8a"\n')
    assert message == (
        'config.toml:8: engine[0].preset = "int8_w8a": there is no such preset; did you mean `int8_w8a8`? '
        "(`msd modes` lists them)"
    )


@pytest.mark.parametrize("value", ["5", '["fp16"]', "{ a = 1 }"])
def test_a_preset_that_is_no_word_is_refused(value: str) -> None:
    assert "engine[0].preset" in why(f"preset = {value}\n")


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ('preset = "int8_w8a8"\n', "engine[0].weights: preset `int8_w8a8` needs a W8A8 checkpoint"),
        ('preset = "draft_speculation"\n', "speculation by `draft_model` needs a draft model with the same vocabulary"),
        ('preset = "fp16"\ndraft = "d"\n', "nothing would use it: args.speculative_config is missing"),
        (
            'preset = "draft_speculation"\ndraft = "d"\n[engine.args.speculative_config]\nmodel = "x"\n',
            "args.speculative_config.model names one too",
        ),
        ('preset = "fp16"\nargs = 5\n', "engine[0].args = 5"),
    ],
)
def test_what_a_preset_lacks_or_cannot_use_is_said(engine: str, message: str) -> None:
    assert message in why(engine)


def test_a_draft_folder_that_is_missing_is_found_at_check(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "config.json").write_text("{}")
    text = '[[model]]\nname = "m"\npath = "p"\n[[engine]]\nname = "a"\nmodel = "m"\npreset = "draft_speculation"\n'
    with pytest.raises(InvalidConfigError, match=r"engine\[0\].draft = \"d\": there is no folder"):
        parse(f'{text}draft = "d"\n', file="c", base_dir=tmp_path)


# --- arguments by platform -------------------------------------------------------------------------------------------


def test_arguments_that_one_platform_has_are_resolved_when_they_are_built() -> None:
    engine = engine_of('preset = "int8_plus_continuous_batching"\nweights = "w"\nresidency = "auto"\n')
    on_gpu = build_arguments(engine, "f", is_cpu=False)
    assert on_gpu["max_num_batched_tokens"] == 8_192
    assert on_gpu["enable_sleep_mode"] is True
    on_cpu = build_arguments(engine, "f", is_cpu=True)
    assert not {"max_num_batched_tokens", "enable_sleep_mode"} & on_cpu.keys()
    own = msgspec.structs.replace(engine, args={"max_num_batched_tokens": 64})
    assert build_arguments(own, "f", is_cpu=False)["max_num_batched_tokens"] == 64


def test_fp8_on_a_cpu_is_refused_unless_it_is_emulated() -> None:
    with pytest.raises(ConfigError, match="no FP8 kernels"):
        build_arguments(engine_of('preset = "fp8_per_tensor"\n'), "f", is_cpu=True)
    emulated = build_arguments(engine_of('preset = "fp8_per_channel"\n'), "f", is_cpu=True)
    assert emulated["quantization"] == "fp8_per_channel"


def test_vllm_knows_every_method_of_quantisation_in_the_catalogue() -> None:
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    source = Path(spec.submodule_search_locations[0]) / "model_executor/layers/quantization/__init__.py"
    words = {node.value for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Constant)}
    used = {preset.args["quantization"] for preset in PRESETS.values() if "quantization" in preset.args}
    assert used
    assert used <= words


# --- what a host can run ---------------------------------------------------------------------------------------------


def on(capability: tuple[int, int] | None, **fields: Any) -> Host:
    gpus = (InstalledGpu(index=0, uuid="GPU-1", name="Card", compute_capability=capability),) if capability else ()
    made = Host(cpu="c", num_cores=2, memory_bytes=1, vllm="1", platform="gpu", gpus=gpus)
    return msgspec.structs.replace(made, **fields)


def test_a_host_says_why_not() -> None:
    fp8, int8, fp16 = PRESETS["fp8_per_tensor"], PRESETS["int8_w8a8"], PRESETS["fp16"]
    assert why_not(fp8, on((9, 0))) == ()
    assert why_not(fp8, on((8, 6))) == ("needs compute capability 8.9, Card has 8.6",)
    assert why_not(int8, on((8, 0))) == ()
    assert why_not(int8, on((10, 0))) == ("vLLM has no such kernels from compute capability 10.0 on, Card has 10.0",)
    assert why_not(fp16, on(None, no_gpu="NVML says so")) == ("no GPU 0: NVML says so",)
    assert why_not(fp16, on((9, 0)), "1") == ("no GPU 1: the driver lists 1",)
    assert why_not(fp16, on((9, 0)), "GPU-1") == ()
    assert why_not(fp16, on(None, platform="none", vllm="")) == ("vLLM is not installed",)
    on_cpu = on(None, platform="cpu")
    assert "no such kernels" in why_not(fp8, on_cpu)[0]
    assert why_not(PRESETS["fp8_kv"], on_cpu) == ()
    assert "untried" in remark(PRESETS["int4_gptq"], on_cpu)
    assert remark(PRESETS["int4_gptq"], on((9, 0))) == ""


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_what_does_not_run_on_a_cpu_says_why(preset: Preset) -> None:
    if preset.cpu in ("none", "slow"):
        assert preset.cpu_note


def test_this_host_is_found_out_without_torch() -> None:
    code = (
        "import sys; from msd.cli import main; code = main(['modes', '--json']); "
        "assert not {'torch', 'vllm'} & sys.modules.keys(); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == EXIT_OK, done.stderr
    told = json.loads(done.stdout)
    assert [item["preset"] for item in told["presets"]] == list(PRESETS)
    assert told["host"]["num_cores"] >= 1
    assert told["modes"] is None
    assert all(item["runs_here"] == (not item["why_not"]) for item in told["presets"])


def test_modes_of_a_configuration_are_listed_with_their_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "config.json").write_text("{}")
    file = tmp_path / "c.toml"
    file.write_text(
        '[[model]]\nname = "m"\npath = "p"\n[[engine]]\nname = "guess"\nmodel = "m"\npreset = "ngram_speculation"\n'
        '[[engine]]\nname = "made_up"\nmodel = "m"\nkind = "sim"\npreset = "int4_gptq"\n'
    )
    assert cli.main(["modes", "--config", str(file)]) == EXIT_OK
    text = capsys.readouterr().out
    assert "guess  vllm, bf16, preset ngram_speculation, ngram speculation, 32 slots, lossless" in text
    assert '"method": "ngram"' in text
    assert "made_up  sim, int4, preset int4_gptq, 32 slots, needs the gate" in text


# --- memory that cannot fit ------------------------------------------------------------------------------------------


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """A model whose weights are 8 GB of nothing (a sparse file)."""
    folder = tmp_path / "p"
    folder.mkdir()
    (folder / "config.json").write_text(
        '{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096, '
        '"max_position_embeddings": 8192}'
    )
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(8_000_000_000)
    return tmp_path


def card(monkeypatch: pytest.MonkeyPatch, gigabytes: int) -> None:
    gpu = InstalledGpu(index=0, uuid="G", name="Card", memory_total_bytes=gigabytes * 10**9, compute_capability=(9, 0))
    monkeypatch.setattr("msd.telemetry.nvml.installed_gpus", lambda: ((gpu,), ""))
    monkeypatch.setattr(host, "_installed_vllm", lambda: ("1.0", False))


def checked(folder: Path, *engines: str) -> tuple[int, Path]:
    file = folder / "c.toml"
    head = '[[model]]\nname = "m"\npath = "p"\n'
    file.write_text(head + "".join(f'[[engine]]\nname = "e{n}"\nmodel = "m"\n{text}' for n, text in enumerate(engines)))
    return cli.main(["check", str(file)]), file


def test_a_mode_that_cannot_fit_is_refused_with_the_numbers(
    big: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card(monkeypatch, 10)
    code, _ = checked(big, "args = { kv_cache_memory_bytes = 1_000_000_000 }\n")
    assert code == EXIT_CONFIG
    error = capsys.readouterr().err
    assert "engine[0] = e0: it cannot fit: it needs e0 10.5 GB" in error
    assert "weights 8.0 GB, KV cache 1.0 GB, overhead 1.5 GB" in error
    assert "Card has 10.0 GB, of which 1.0 GB stay free (residency.reserve_bytes)" in error


def test_modes_that_fit_alone_but_not_together(
    big: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card(monkeypatch, 20)
    small = "args = { kv_cache_memory_bytes = 1_000_000_000 }\n"
    code, _ = checked(big, small, small)
    assert code == EXIT_CONFIG
    error = capsys.readouterr().err
    assert "engine[1] = e1: it cannot fit beside what always stays: e1 10.5 GB" in error
    assert "+ e0 10.5 GB is 2.0 GB too much" in error
    assert checked(big, 'residency = "auto"\n' + small, 'residency = "auto"\n' + small)[0] == EXIT_OK
    assert checked(big, "gpu_bytes = 9_000_000_000\n" + small, "gpu_bytes = 9_500_000_000\n" + small)[0] == EXIT_OK


def test_an_engine_without_a_bound_on_its_cache_fills_the_gpu(
    big: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card(monkeypatch, 80)
    assert checked(big, "")[0] == EXIT_OK
    assert checked(big, "", "")[0] == EXIT_CONFIG
    assert "args.kv_cache_memory_bytes would bound it" in capsys.readouterr().err


def test_weights_that_are_halved_while_they_are_loaded_count_half(
    big: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card(monkeypatch, 8)
    assert checked(big, 'preset = "fp8_per_tensor"\nargs = { max_model_len = 1024 }\n')[0] == EXIT_OK
    assert checked(big, 'preset = "bf16"\nargs = { max_model_len = 1024 }\n')[0] == EXIT_CONFIG


def test_simulated_engines_that_take_turns_need_not_fit_together() -> None:
    engines = "".join(
        f'[[engine]]\nname = "e{n}"\nmodel = "m"\nkind = "sim"\nresidency = "{{}}"\nsim.weights_bytes = 60\n'
        for n in range(2)
    )
    text = '[telemetry]\nsim_memory_bytes = 100\n[residency]\nreserve_bytes = 0\n[[model]]\nname = "m"\n' + engines
    assert len(parse(text.format("auto", "auto"), file="c", base_dir=Path()).engine) == 2
    with pytest.raises(InvalidConfigError, match=r"e0 60 \+ e1 60\), 20 more than there is"):
        parse(text.format("always", "always"), file="c", base_dir=Path())


def test_check_looks_at_the_host_only_where_it_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> Any:
        raise AssertionError("asked the driver for a simulated configuration")

    monkeypatch.setattr("msd.telemetry.nvml.installed_gpus", never)
    check.check_host(read("", kind="sim"), Path("c.toml"))


def test_the_page_of_modes_is_the_catalogue() -> None:
    text = (ROOT / "docs/reference/modes.md").read_text()
    rows = {
        cells[1].strip("` "): [cell.strip() for cell in cells[2:-1]]
        for line in text.splitlines()
        if line.startswith("| `") and len(cells := line.split("|")) == 8
    }
    assert list(rows) == list(PRESETS)
    on_cpu = {"none": "no"}
    for name, (_, bring, gate, gpu, cpu) in rows.items():
        preset = PRESETS[name]
        assert gate == ("lossless" if preset.lossless else "needed"), name
        assert gpu.split()[0] == "{}.{}".format(*preset.min_capability), name
        assert gpu.endswith("9.x") == (preset.max_capability == (10, 0)), name
        assert cpu == on_cpu.get(preset.cpu, preset.cpu), name
        assert (bring == "-") == (not preset.weights and not preset.draft), name

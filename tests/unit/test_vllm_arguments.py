"""Arguments of vLLM engines: checked against the installed version's source, without importing it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from msd.config import EngineConfig
from msd.engine import vllm_arguments
from msd.engine.vllm_arguments import build_arguments, check_arguments, known_arguments
from msd.errors import ConfigError

KNOWN = frozenset(
    {"model", "dtype", "max_num_seqs", "enable_prefix_caching", "disable_log_stats", "max_model_len", "quantization",
     "speculative_config", "enforce_eager", "kv_cache_memory_bytes", "cpu_offload_gb", "max_num_queued_reqs"}
)  # fmt: skip
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "installed" not in request.keywords and "installed" not in request.node.name:
        monkeypatch.setattr(vllm_arguments, "known_arguments", lambda: KNOWN)


def engine(**fields: Any) -> EngineConfig:
    return EngineConfig(name="fast", model="m", **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"args": {"max_modle_len": 5}}, "no argument `max_modle_len` .did you mean `max_model_len`"),
        ({"args": {"zzz": 5}}, "no argument `zzz`"),
        ({"args": {"max_num_seqs": 5}}, "args.max_num_seqs is set elsewhere .use `max_num_seqs` of the engine"),
        ({"args": {"enable_prefix_caching": True}}, "use `prefix_caching` of the engine"),
        ({"args": {"model": "x"}}, "set elsewhere"),
        ({"speculation": "ngram"}, "needs args.speculative_config"),
        ({"args": {"speculative_config": NGRAM}}, 'speculation says "none"'),
        ({"args": {"speculative_config": {"model": "draft"}}}, 'says "draft_model"'),
        ({"args": {"speculative_config": "ngram"}}, "not a table"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_what_could(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_arguments(engine(**fields))
    assert "engine fast" in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"args": {"cpu_offload_gb": 4}}, "ignored by vLLM's CPU"), ({"precision": "fp8"}, "no FP8 kernels")],
)
def test_what_a_cpu_engine_cannot_do_is_refused_there_only(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_arguments(engine(**fields), "folder", is_cpu=True)
    assert build_arguments(engine(**fields), "folder", is_cpu=False)["model"] == "folder"


def test_fields_of_the_engine_become_arguments_and_args_win() -> None:
    arguments = build_arguments(
        engine(max_num_seqs=8, prefix_caching=True, args={"max_model_len": 512}), "folder", is_cpu=True
    )
    assert arguments == {
        "model": "folder",
        "dtype": "bfloat16",
        "max_num_seqs": 8,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "max_num_queued_reqs": 16,
        "max_model_len": 512,
    }
    assert build_arguments(engine(args={"dtype": "float32"}), "folder", is_cpu=True)["dtype"] == "float32"


@pytest.mark.parametrize(
    ("fields", "dtype", "quantization"),
    [
        ({"precision": "fp32"}, "float32", None),
        ({"precision": "fp16"}, "float16", None),
        ({"precision": "int8", "weights": "w"}, "auto", None),
        ({"precision": "fp8"}, "auto", "fp8"),
        ({"precision": "fp8", "weights": "w"}, "auto", None),
        ({"precision": "fp8", "args": {"quantization": "fp8_per_channel"}}, "auto", "fp8_per_channel"),
    ],
)
def test_precision_says_dtype_and_quantization(fields: dict[str, Any], dtype: str, quantization: str | None) -> None:
    arguments = build_arguments(engine(**fields), "folder", is_cpu=False)
    assert arguments["dtype"] == dtype
    assert arguments.get("quantization") == quantization


def test_names_come_from_the_installed_vllm_without_importing_it() -> None:
    if not known_arguments():
        pytest.skip("vLLM is not installed")
    script = (
        "import sys; from msd.engine.vllm_arguments import known_arguments as known; "
        "assert {'model', 'max_num_seqs', 'enforce_eager', 'enable_log_requests'} <= known(), known(); "
        "assert not {'vllm', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)

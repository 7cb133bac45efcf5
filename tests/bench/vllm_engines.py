"""Real engines for the benches: the testbed's model in bf16, the same arguments for msd and for `vllm serve`."""

from __future__ import annotations

import importlib.util
import json

from tests.bench.harness import ROOT, CannotMeasureError

MODEL_NAME = "tiny-large"
MODEL = ROOT / "testbed" / "models" / MODEL_NAME
MAX_MODEL_LEN = 2_048
MAX_NUM_SEQS = 32
# One OpenMP thread per engine and no pinning: on few cores the threads of several engines fight otherwise.
ENVIRON = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
}


def require_vllm() -> None:
    """Raise CannotMeasureError where vLLM or the model is missing."""
    if importlib.util.find_spec("vllm") is None:
        raise CannotMeasureError("vLLM is not installed: make setup")
    if not (MODEL / "model.safetensors").is_file():
        raise CannotMeasureError(f"{MODEL} has no weights")


def engines(count: int) -> str:
    """The part of a configuration that names `count` equal engines."""
    require_vllm()
    environ = ", ".join(f"{name} = {json.dumps(value)}" for name, value in ENVIRON.items())
    body = f'[[model]]\nname = "{MODEL_NAME}"\npath = {json.dumps(str(MODEL))}\n'
    for number in range(count):
        body += (
            f'[[engine]]\nname = "bf16-{number}"\nmodel = "{MODEL_NAME}"\nprecision = "bf16"\n'
            f"max_num_seqs = {MAX_NUM_SEQS}\nenv = {{ {environ} }}\n"
            f"args = {{ max_model_len = {MAX_MODEL_LEN}, enforce_eager = true }}\n"
        )
    return body + '[policy]\nname = "round_robin"\n[telemetry]\nprobe = "none"\n'

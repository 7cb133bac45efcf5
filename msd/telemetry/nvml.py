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

from msd.domain import CounterReading, EnergySource, GpuView
from msd.errors import ProbeError
from msd.ports import Clock

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

FIELD_ENERGY, FIELD_POWER_AVERAGE, FIELD_POWER_INSTANT, FIELD_POWER_LIMIT = 83, 185, 186, 190
SCOPE_GPU, SCOPE_MODULE = 0, 1

INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION, DRIVER_NOT_LOADED, LIBRARY_MISSING, FUNCTION_MISSING = (
    2,
    3,
    4,
    9,
    12,
    13,
)
GPU_IS_LOST, RESET_REQUIRED, VERSION_MISMATCH = 15, 16, 18
_NEVER_THERE = frozenset({NOT_SUPPORTED, NO_PERMISSION, FUNCTION_MISSING})
_REOPEN = frozenset({1, GPU_IS_LOST, RESET_REQUIRED})
_REMEDIES = {
    NO_PERMISSION: "give the service user access to /dev/nvidia*",
    DRIVER_NOT_LOADED: "load the NVIDIA driver, or set telemetry.probe = 'none'",
    LIBRARY_MISSING: "install the NVIDIA driver, or set telemetry.probe = 'none'",
    VERSION_MISMATCH: "the driver was replaced under a running process: restart msd, or reboot",
}
THROTTLE_REASONS = {
    0x1: "idle",
    0x2: "application_clocks",
    0x4: "power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal",
    0x40: "hw_thermal",
    0x80: "power_brake",
    0x100: "display_clocks",
}


def throttle_names(bits: int) -> tuple[str, ...]:
    """Names of the set bits, lowest first; a bit without a name shows as hex."""
    names = [name for bit, name in THROTTLE_REASONS.items() if bits & bit]
    unknown = bits & ~sum(THROTTLE_REASONS)
    return (*names, hex(unknown)) if unknown else tuple(names)


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


class NvmlFailureError(ProbeError):
    """A call into NVML failed with `code`. Recoverable by opening the device again, except 18."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"NVML error {code}: {message}", remedy=_REMEDIES.get(code, ""))
        self.code = code


class _Device:
    """One open NVML session on one GPU; used by the sampler thread only."""

    def __init__(self, nvml: Any, wanted: str) -> None:
        self._nvml = nvml
        self._absent: set[str] = set()
        """Fields that this GPU or driver does not have: not asked for again."""
        self._call(nvml.nvmlInit)
        self._handle: Any = self._call(
            nvml.nvmlDeviceGetHandleByIndex if wanted.isdecimal() else nvml.nvmlDeviceGetHandleByUUID,
            int(wanted) if wanted.isdecimal() else wanted,
        )
        self.uuid = _text(self._call(nvml.nvmlDeviceGetUUID, self._handle))
        self.name = _text(self._optional("name", nvml.nvmlDeviceGetName, self._handle) or "")
        self.index = int(self._optional("index", nvml.nvmlDeviceGetIndex, self._handle) or 0)
        self.scope = SCOPE_GPU
        power = self.fields((FIELD_POWER_INSTANT, SCOPE_GPU))[0]
        # Grace-Hopper class modules refuse the GPU's scope and give the module's, CPU included.
        if power is None and self.fields((FIELD_POWER_INSTANT, SCOPE_MODULE))[0] is not None:
            self.scope = SCOPE_MODULE

    def close(self) -> None:
        """End the session; a lost GPU may refuse even that."""
        try:
            self._call(self._nvml.nvmlShutdown)
        except NvmlFailureError as error:
            log.debug("nvml_shutdown_failed", code=error.code)

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(*args)
        except self._nvml.NVMLError as error:
            raise NvmlFailureError(int(error.value), str(error)) from error

    def _optional(self, field: str, function: Callable[..., Any] | None, *args: Any) -> Any:
        """The result, or None for ever once the driver says that it has no such thing."""
        if function is None or field in self._absent:
            return None
        try:
            return self._call(function, *args)
        except NvmlFailureError as error:
            if error.code not in _NEVER_THERE:
                raise
            self._absent.add(field)
            log.info("nvml_field_absent", field=field, code=error.code, gpu=self.uuid if field != "name" else "")
            return None

    def fields(self, *wanted: tuple[int, int]) -> list[int | None]:
        """Values of (field id, scope) in one call; None where the entry's own return code says no."""
        entries = self._optional("fields", self._nvml.nvmlDeviceGetFieldValues, self._handle, list(wanted))
        if entries is None:
            return [None] * len(wanted)
        return [self._value(entry) for entry in entries]

    def _value(self, entry: Any) -> int | None:
        code = int(entry.nvmlReturn)
        if (
            code in _NEVER_THERE or code == INVALID_ARGUMENT
        ):  # a field id younger than the driver is an invalid argument
            return None
        if code != 0:  # not "no counter": an estimate must not take its place for one bad tick
            raise NvmlFailureError(code, f"field {int(entry.fieldId)}: {self._nvml.NVMLError(code)}")
        # Energy is a 64-bit member and power a 32-bit one: the union is read as its entry says.
        members = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")
        kind = int(entry.valueType)
        return int(getattr(entry.value, members[kind])) if kind < len(members) else None

    def memory(self) -> dict[str, int | None]:
        """Bytes. NVIDIA's pages disagree on whether `used` includes `reserved`: rely on `free`."""
        nvml = self._nvml
        memory = self._optional("memory", nvml.nvmlDeviceGetMemoryInfo, self._handle, nvml.nvmlMemory_v2)
        if memory is None:
            memory = self._optional("memory_v1", nvml.nvmlDeviceGetMemoryInfo, self._handle)
        if memory is None:
            return {}
        reserved = getattr(memory, "reserved", None)
        return {
            "memory_total_bytes": int(memory.total),
            "memory_free_bytes": int(memory.free),
            "memory_used_bytes": int(memory.used),
            "memory_reserved_bytes": None if reserved is None else int(reserved),
        }

    def slow_fields(self) -> dict[str, Any]:
        """Utilisation (0..1), SM clock, temperature, throttle reasons."""
        nvml, handle = self._nvml, self._handle
        use = self._optional("utilisation", nvml.nvmlDeviceGetUtilizationRates, handle)
        clock = self._optional("clock", nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM)
        heat = self._optional("temperature", nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)
        events = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        bits = self._optional("clock_events", events, handle)
        if bits is None:  # the name before driver 535
            bits = self._optional("throttle", nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
        return {
            "sm_util": None if use is None else use.gpu / 100,
            "mem_util": None if use is None else use.memory / 100,
            "sm_clock_mhz": clock,
            "temperature_c": heat,
            "throttle_reasons": throttle_names(bits or 0),
        }


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
            device = _Device(self._nvml, self._wanted)
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

    def _calibrate(self, device: _Device) -> None:
        """Lower the rate until sampling costs at most half a per cent of a core with this driver."""
        before = thread_time()
        for _ in range(CALIBRATION_TICKS):
            self._sample(device, everything=False)
        cost_s = (thread_time() - before) / CALIBRATION_TICKS
        self._period_s = max(self._period_s, cost_s / MAX_LOAD)
        log.info("nvml_started", gpu=device.uuid, cost_us=round(cost_s * 1e6), hz=round(1 / self._period_s, 1))

    def _sample_until_failure(self, device: _Device) -> NvmlFailureError | None:
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
                    updates |= _limit(device)
                    last_limit = now
                self._tick(device, updates)
                backoff_s = SLOW_PERIOD_S
            except NvmlFailureError as error:
                self._show_error(error)
                if error.code in _REOPEN or error.code == VERSION_MISMATCH:
                    return error
                log.warning("nvml_read_failed", gpu=device.uuid, code=error.code, retry_s=backoff_s)
                due = monotonic() + backoff_s
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
        return None

    def _sample(self, device: _Device, everything: bool) -> None:
        updates = device.memory() | device.slow_fields() | _limit(device) if everything else {}
        self._tick(device, updates)

    def _tick(self, device: _Device, updates: dict[str, Any]) -> None:
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
        self, device: _Device, t_us: int, energy_mj: int | None, power_mw: int | None, limit_w: float | None
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

    def _reopen(self, failure: NvmlFailureError) -> _Device | None:
        """Try again every 10 s; None when the probe is stopped, or when only a new process can help."""
        log.error("nvml_device_lost", code=failure.code, error=str(failure), retry_s=REOPEN_S)
        while failure.code != VERSION_MISMATCH and not self._stopping.wait(REOPEN_S):
            try:
                device = _Device(self._nvml, self._wanted)
                log.info("nvml_device_back", gpu=device.uuid)
                return device
            except NvmlFailureError as error:
                failure = error
                self._show_error(error)
        return None


def _limit(device: _Device) -> dict[str, Any]:
    (limit_mw,) = device.fields((FIELD_POWER_LIMIT, SCOPE_GPU))
    return {"power_limit_w": None if limit_mw is None else limit_mw / 1000}


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value

"""One NVML session on one GPU: calls, fields, error codes. Used by the sampler thread only; it is handed pynvml."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import structlog

from msd.errors import ProbeError

log = structlog.get_logger(__name__)

FIELD_ENERGY, FIELD_POWER_AVERAGE, FIELD_POWER_INSTANT, FIELD_POWER_LIMIT = 83, 185, 186, 190
SCOPE_GPU, SCOPE_MODULE = 0, 1

UNINITIALIZED, INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION = 1, 2, 3, 4
DRIVER_NOT_LOADED, LIBRARY_MISSING, FUNCTION_MISSING = 9, 12, 13
GPU_IS_LOST, RESET_REQUIRED, VERSION_MISMATCH = 15, 16, 18
_NEVER_THERE = frozenset({NOT_SUPPORTED, NO_PERMISSION, FUNCTION_MISSING})
REOPEN_CODES = frozenset({UNINITIALIZED, GPU_IS_LOST, RESET_REQUIRED})
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


class NvmlFailureError(ProbeError):
    """A call into NVML failed with `code`. Recoverable by opening the device again, except 18."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"NVML error {code}: {message}", remedy=_REMEDIES.get(code, ""))
        self.code = code


class Device:
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
        self.uuid = text_of(self._call(nvml.nvmlDeviceGetUUID, self._handle))
        self.name = text_of(self._optional("name", nvml.nvmlDeviceGetName, self._handle) or "")
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

    def power_limit(self) -> dict[str, float | None]:
        """The enforced limit in W."""
        (limit_mw,) = self.fields((FIELD_POWER_LIMIT, SCOPE_GPU))
        return {"power_limit_w": None if limit_mw is None else limit_mw / 1000}


def text_of(value: str | bytes) -> str:
    """What pynvml gives as either."""
    return value.decode() if isinstance(value, bytes) else value

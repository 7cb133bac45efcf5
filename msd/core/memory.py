"""The memory budget: what each engine takes on the GPU, what it leaves there while it sleeps, and which sets fit.

Everything in bytes. The GPU's total comes from its view (a simulated GPU's from the configuration). Where neither is
known, as on a host without a GPU, there is no budget and every set fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from msgspec import Struct

from msd.config import EngineConfig
from msd.domain import GpuView
from msd.profile import ModeProfile

UTILISATION = 0.92
"""Share of a GPU that a vLLM engine takes unless its arguments say otherwise (`gpu_memory_utilization`, vLLM 0.32)."""


Origin = Literal["gpu_bytes", "profile", "sim.weights_bytes", "estimate", "utilisation", "none"]
"""Where a figure comes from: the configuration, `msd profile`, its files, the share of the GPU that vLLM fills."""


class Need(Struct, frozen=True):
    """What one engine takes: on the GPU while it is resident, and on the GPU and in host memory while it sleeps."""

    gpu_bytes: int
    asleep_gpu_bytes: int = 0
    asleep_host_bytes: int = 0


class Budget(Struct, frozen=True):
    """What all engines together may take. `total_bytes` None: nothing is known, so nothing is bounded."""

    total_bytes: int | None
    reserve_bytes: int
    max_asleep_bytes: int
    others_bytes: int = 0
    """Taken by somebody else on the same GPU."""

    @property
    def available_bytes(self) -> int | None:
        """For engines; None where there is no budget. May be negative."""
        if self.total_bytes is None:
            return None
        return self.total_bytes - self.reserve_bytes - self.others_bytes

    def fits(self, gpu_bytes: int) -> bool:
        """Whether engines that take this much leave the reserve free."""
        available = self.available_bytes
        return available is None or gpu_bytes <= available


def gpu_bytes_of(
    engine: EngineConfig,
    profile: ModeProfile | None,
    total_bytes: int | None,
    reserve_bytes: int = 0,
    estimated_bytes: int = 0,
) -> tuple[int, Origin]:
    """What an engine takes on the GPU while it is resident, for the planner and for `msd check` alike.

    As configured, else as profiled, else what its kind takes by itself. `estimated_bytes`: by its files, 0 = unknown.
    """
    if engine.gpu_bytes:
        return engine.gpu_bytes, "gpu_bytes"
    if profile is not None and profile.gpu_bytes:
        return profile.gpu_bytes, "profile"
    if engine.kind == "sim":
        return engine.sim.weights_bytes, "sim.weights_bytes"
    if engine.kind != "vllm":
        return 0, "none"
    is_bounded = bool(estimated_bytes) and "kv_cache_memory_bytes" in engine.args
    if total_bytes is not None and not is_bounded:
        # Without a size for its KV cache, vLLM fills a share of the whole memory. Not more than there is room: the
        # reserve alone is no reason to refuse an engine that has the GPU to itself.
        filled_bytes = min(total_bytes - reserve_bytes, int(total_bytes * utilisation(engine)))
        if filled_bytes > estimated_bytes:
            return filled_bytes, "utilisation"
    return estimated_bytes, "estimate" if estimated_bytes else "none"


def utilisation(engine: EngineConfig) -> float:
    """Share of the GPU that a vLLM engine fills."""
    told = engine.args.get("gpu_memory_utilization", UTILISATION)
    return told if isinstance(told, float | int) else UTILISATION


def need_of(
    engine: EngineConfig,
    profile: ModeProfile | None,
    total_bytes: int | None,
    sleep_level: int = 1,
    *,
    reserve_bytes: int = 0,
    estimated_bytes: int = 0,
) -> Need:
    """An engine's need, awake and asleep.

    A sleeping engine's weights lie in host memory at level 1: all that is not KV cache, where that is known.
    """
    gpu_bytes, _ = gpu_bytes_of(engine, profile, total_bytes, reserve_bytes, estimated_bytes)
    if engine.kind == "sim":
        return Need(gpu_bytes, 0, engine.sim.weights_bytes if sleep_level == 1 else 0)
    if engine.kind != "vllm":
        return Need(gpu_bytes)
    asleep_gpu_bytes = min(gpu_bytes, profile.asleep_bytes if profile is not None else 0)
    kv_bytes = engine.args.get("kv_cache_memory_bytes", 0)
    host_bytes = gpu_bytes - asleep_gpu_bytes - (kv_bytes if isinstance(kv_bytes, int) else 0)
    return Need(gpu_bytes, asleep_gpu_bytes, max(0, host_bytes) if sleep_level == 1 else 0)


def budget_of(
    view: GpuView | None,
    total_bytes: int | None,
    reserve_bytes: int,
    max_asleep_bytes: int,
    booked_bytes: int,
    always_bytes: int,
    shows_booked: bool,
) -> Budget:
    """The budget of the engines that may move.

    `booked_bytes`: what those take that are on the GPU; `always_bytes`: what the engines take that stay there.
    `shows_booked`: the view is of now, so that what it shows beyond `booked_bytes` is taken by others.
    """
    others_bytes = always_bytes
    if shows_booked and view is not None and view.memory_used_bytes is not None:
        others_bytes = max(always_bytes, view.memory_used_bytes - booked_bytes)
    return Budget(total_bytes, reserve_bytes, max_asleep_bytes, others_bytes)


def maximal_sets(gpu_bytes: Sequence[int], available_bytes: int | None) -> list[int]:
    """Bit sets of engines that fit and to which none can be added. At most 2^n: for n <= 10."""
    num = len(gpu_bytes)
    everything = (1 << num) - 1
    if available_bytes is None:
        return [everything]
    sums = [0] * (1 << num)
    for subset in range(1, 1 << num):
        low = subset & -subset
        sums[subset] = sums[subset ^ low] + gpu_bytes[low.bit_length() - 1]
    return [
        subset
        for subset in range(everything, -1, -1)
        if sums[subset] <= available_bytes
        and not any(not subset >> i & 1 and sums[subset] + gpu_bytes[i] <= available_bytes for i in range(num))
    ]


def put_away(leavers: Iterable[int], needs: Sequence[Need], room_gpu_bytes: int | None, max_asleep_bytes: int) -> int:
    """Bit set of the engines, of those that leave (most wanted first), for which there is room to sleep."""
    asleep = host_bytes = gpu_bytes = 0
    for i in leavers:
        need = needs[i]
        fits_host = host_bytes + need.asleep_host_bytes <= max_asleep_bytes
        if fits_host and (room_gpu_bytes is None or gpu_bytes + need.asleep_gpu_bytes <= room_gpu_bytes):
            asleep |= 1 << i
            host_bytes += need.asleep_host_bytes
            gpu_bytes += need.asleep_gpu_bytes
    return asleep

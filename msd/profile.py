"""The profile of a host: what `msd profile` measured of every mode. Seeds the estimator, the planner and `msd check`.

It holds for one GPU, one vLLM and the recipes in it; `load` refuses it elsewhere and says what differs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from msd.errors import ConfigError

SCHEMA = 1


class Measured(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One cell: a workload family at a batch size, medians over its repeats (ms; None: not measured)."""

    family: str
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    batch_size: int
    num_repeats: int
    ttft_ms: float
    tpot_ms: float
    e2el_ms: float
    tokens_per_s: float
    mj_per_token: float | None = None


class ModeProfile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One mode: its lines (modeswitch spec, section 6), its memory, the cost of its transitions."""

    mode: str
    recipe: str
    ttft_ms: tuple[float, float, float]
    """a0 + a1 * n + a2 * n * P / 1e6, n = prompt tokens not cached, P = prompt tokens."""
    tpot_ms: tuple[float, float, float]
    """c0 + c1 * b + c2 * T, b = other requests running, T = their tokens."""
    eos_step_ms: float
    """The uncounted decode step of an answer that ends by itself."""
    step_mj: float | None = None
    prefill_mj_per_token: float | None = None
    decode_mj_per_token: float | None = None
    gpu_bytes: int = 0
    asleep_bytes: int = 0
    start_s: float = 0.0
    sleep_s: float | None = None
    wake_s: float | None = None
    cells: tuple[Measured, ...] = ()


class Profile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All modes of one host."""

    schema: int
    created: str
    command: str
    device: str
    """Name of the GPU, or of the CPU where there is none; `simulated` for simulated engines."""
    engine_version: str
    """`vllm 0.32.0`, or `simulated`."""
    source: Literal["measured", "simulated"]
    idle_w: float | None
    modes: tuple[ModeProfile, ...]

    def of(self, mode: str) -> ModeProfile | None:
        """The mode of that name."""
        return next((profile for profile in self.modes if profile.mode == mode), None)


def load(file: Path) -> Profile:
    """Read a profile. Raises ConfigError: missing, not one, or of another schema."""
    try:
        profile = msgspec.json.decode(file.read_bytes(), type=Profile)
    except OSError as error:
        raise ConfigError(f"profile {file}: {error.strerror}", remedy="`msd profile` writes one") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"profile {file} cannot be read: {error}", remedy="run `msd profile` again") from error
    if profile.schema != SCHEMA:
        raise ConfigError(f"profile {file} has schema {profile.schema}, not {SCHEMA}", remedy="run `msd profile` again")
    return profile


def write(file: Path, profile: Profile) -> None:
    """Write the profile."""
    file.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=2) + b"\n")

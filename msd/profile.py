"""The profile of a host: what `msd profile` measured of every mode. Seeds the estimator, the planner and `msd check`.

It holds for one GPU, one vLLM and the recipes in it; `load` refuses it elsewhere and says what differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from msd.config import Config, EngineConfig
from msd.errors import ConfigError
from msd.files import write_whole
from msd.recipe import recipe_hash

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
    """GPU memory that it still holds while it sleeps."""
    start_s: float = 0.0
    sleep_s: float | None = None
    wake_s: float | None = None
    cells: tuple[Measured, ...] = ()
    settings: dict[str, object] = {}
    """What else its speed hangs on (`settings_of`), as it was when this was measured."""


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


def load_for(config: Config, base_dir: Path, device: str, engine_version: str) -> Profile | None:
    """The profile that the configuration names, if any. Raises ConfigError when it does not hold here."""
    if not config.policy.profile:
        return None
    file = base_dir / config.policy.profile
    profile = load(file)
    found = list(differences(profile, config, base_dir, device, engine_version))
    if found:
        raise ConfigError(
            f"profile {file} does not hold here: {'; '.join(found)}",
            remedy="run `msd profile` again, or empty policy.profile",
        )
    return profile


def differences(profile: Profile, config: Config, base_dir: Path, device: str, engine_version: str) -> Iterator[str]:
    """In what the profile was measured otherwise than the configuration would run here. Modes it lacks are no fault."""
    if profile.device != device:
        yield f"it was measured on {profile.device}, this is {device}"
    if profile.engine_version != engine_version:
        yield f"it was measured with {profile.engine_version}, this is {engine_version}"
    for engine in config.engine:
        measured = profile.of(engine.name)
        if measured is None:
            continue
        then, now = measured.settings, settings_of(engine)
        changed = [name for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)]
        for name in changed:
            yield f"mode {engine.name}: {name} was {_shown(then.get(name))}, now {_shown(now.get(name))}"
        if not changed and measured.recipe != recipe_hash(engine, config, base_dir):
            yield f"mode {engine.name}: the model's files or its recipe have changed"


ROOM_ONLY = frozenset({"kv_cache_memory_bytes", "gpu_memory_utilization", "max_model_len"})
"""Arguments that say how much fits, not how fast it goes."""


def settings_of(engine: EngineConfig) -> dict[str, object]:
    """Settings of an engine that its speed hangs on, flat; of a simulated engine also its truth."""
    settings: dict[str, object] = {
        "precision": engine.precision,
        "speculation": engine.speculation,
        "prefix_caching": engine.prefix_caching,
    }
    if engine.kind == "sim":
        settings |= {f"sim.{name}": value for name, value in msgspec.to_builtins(engine.sim).items()}
    else:
        settings |= {f"args.{name}": value for name, value in engine.args.items() if name not in ROOM_ONLY}
    return settings


def _shown(value: object) -> str:
    return "not set" if value is None else msgspec.json.encode(value).decode()


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
    """Write the profile, whole or not at all. Raises ConfigError."""
    write_whole(file, msgspec.json.format(msgspec.json.encode(profile), indent=2) + b"\n", "profile")

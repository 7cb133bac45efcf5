"""The engines of a configuration, ready to be started: by the daemon's pool, by `msd profile` and by `msd gate`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random

from msd.config import Config, EngineConfig
from msd.engine import tokens
from msd.engine.noop import NoopEngine
from msd.engine.sim import SimEngine
from msd.errors import ConfigError
from msd.ports import Clock, Engine, Tokenizer
from msd.simgpu import SimGpu


def simulated_gpu(config: Config, clock: Clock) -> SimGpu | None:
    """The GPU that all simulated engines of the configuration share; None when it has none."""
    if not any(engine.kind == "sim" for engine in config.engine):
        return None
    return SimGpu(
        memory_bytes=config.telemetry.sim_memory_bytes,
        idle_w=config.telemetry.sim_idle_w,
        rng=Random(config.daemon.seed),
        now_us=clock.now_us(),
    )


def engine_factory(
    engine: EngineConfig, config: Config, base_dir: Path, clock: Clock, gpu: SimGpu | None, logs_folder: Path | None
) -> Callable[[], Engine]:
    """Makes the engine anew each time it is called. vLLM has to be imported before (`msd.engine.vllm.import_vllm`).

    `base_dir`: what relative paths count from. `logs_folder`: for vLLM engines; `run_dir` finds one.
    """
    match engine.kind:
        case "noop":
            return lambda: NoopEngine(engine)
        case "sim":
            assert gpu is not None, "a simulated engine needs the simulated GPU"
            # A generator of its own: it draws at the pace of wall time, and decisions must not depend on that.
            rng = Random(f"{config.daemon.seed} {engine.name}")
            return lambda: SimEngine(engine, gpu, clock, rng)
        case "vllm":
            from msd.engine.vllm import VllmEngine

            assert logs_folder is not None, "a vLLM engine needs a folder for its log"
            model = next(model for model in config.model if model.name == engine.model)
            return lambda: VllmEngine(engine, base_dir / model.path, base_dir, logs_folder)


def load_tokenizers(config: Config, base_dir: Path) -> dict[str, Tokenizer]:
    """The tokenizer of every model, by its name. Raises ConfigError."""
    found: dict[str, Tokenizer] = {}
    for model in config.model:
        folder = model.tokenizer or model.path
        found[model.name] = tokens.load_tokenizer(base_dir / folder) if folder else tokens.SimTokenizer()
    return found


def run_dir(config: Config) -> Path:
    """Folder of engine logs: the configured one, systemd's, the user's, else a new one that is nobody else's.

    Raises ConfigError when it cannot be made.
    """
    named = config.daemon.run_dir or os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
    if not named and os.environ.get("XDG_RUNTIME_DIR"):
        named = os.path.join(os.environ["XDG_RUNTIME_DIR"], "msd")
    try:
        if not named:
            # Never a name that somebody else could have made before us.
            return Path(tempfile.mkdtemp(prefix="msd-"))
        folder = Path(named)
        folder.mkdir(mode=0o750, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"no folder for engine logs: {error}", remedy="set daemon.run_dir") from error
    return folder

"""`msd check`: the resolved configuration, or every error in it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import msgspec

from msd import config as settings
from msd.cli import terminal
from msd.cli.options import Commands, add_config, add_json, load_config
from msd.errors import EXIT_OK, ConfigError


def add_to(commands: Commands) -> None:
    """Add `check` to the command line."""
    parser = commands.add_parser(
        "check",
        help="print the resolved configuration, or every error in it",
        description="Print the resolved configuration, defaults included, as TOML that msd would read back; or every "
        "error at once, each with file, line and what to write instead. Loads neither torch nor vLLM.",
    )
    parser.add_argument("file", nargs="?", metavar="CONFIG", help="the same as --config CONFIG")
    add_config(parser)
    add_json(parser, "one JSON object on stdout, for errors too")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the configuration; exit 78 when it is wrong."""
    try:
        file = settings.find(options.file or options.config)
        config = load_config(file)
        check_host(config, file)
    except ConfigError as error:
        if options.json:
            print(json.dumps({"ok": False, "problems": problems(error)}, ensure_ascii=False))
            return error.exit_code
        if not isinstance(error, settings.InvalidConfigError):
            raise
        # Without the program's name in front: editors and terminals make links of `file:line:`.
        print(error, file=sys.stderr)
        count = len(error.problems)
        terminal.complain(f"{count} error{'s' if count > 1 else ''} in {error.file}")
        return error.exit_code
    resolved = plain(config)
    if options.json:
        print(json.dumps({"ok": True, "file": str(file), "config": resolved}, ensure_ascii=False))
    else:
        print(f"# {file}: no errors. All settings with their defaults; relative paths count from {folder(file)}")
        for line in quality_notes(config, folder(file)):
            print(f"# {line}")
        print(as_toml(resolved), end="")
    return EXIT_OK


def quality_notes(config: settings.Config, base_dir: Path) -> list[str]:
    """How every mode stands with the gate file, and which of its rows speak of no mode here."""
    from msd import gate
    from msd.core.certificates import Certificates
    from msd.core.fleet import mode_of
    from msd.recipe import recipe_hashes

    modes = [mode_of(engine) for engine in config.engine]
    gate_file = gate.load(base_dir / config.quality.gate) if config.quality.gate else None
    certificates = Certificates(modes, config.quality, gate_file, recipe_hashes(config, base_dir))
    notes = [f"mode {mode.name}: {certificates.summary(arm).text}" for arm, mode in enumerate(modes)]
    return [*notes, *(f"gate file: {note}" for note in certificates.strangers())]


def check_host(config: settings.Config, file: Path) -> None:
    """What only this host can say: the profile holds here, and every mode fits its GPU. Raises ConfigError."""
    real = any(engine.kind == "vllm" for engine in config.engine)
    if not real and not config.policy.profile:
        return
    # Late: they look at the driver and at what is installed.
    from msd.engine.host import identity, look
    from msd.engine.memory import unfit
    from msd.profile import load_for
    from msd.telemetry.nvml import installed_gpus

    host = look(*installed_gpus())
    where = identity(config, host)
    found: list[settings.Problem] = []
    profile = None
    try:
        profile = load_for(config, file.parent, where.device, where.engine_version)
    except ConfigError as error:
        found.append(settings.Problem(field="policy.profile", value=config.policy.profile, message=str(error)))
    gpu = host.gpu(config.telemetry.device) if real and host.platform == "gpu" else None
    if gpu is not None and gpu.memory_total_bytes is not None:
        found += [
            settings.Problem(field=f"engine[{one.index}]", value=config.engine[one.index].name, message=one.message)
            for one in unfit(config, file.parent, gpu.memory_total_bytes, gpu.name, profile)
        ]
    if found:
        raise settings.InvalidConfigError(str(file), found)


def problems(error: ConfigError) -> list[object]:
    """Every problem as plain data; one without a place when the file could not be read at all."""
    if isinstance(error, settings.InvalidConfigError):
        return [{"file": error.file, **msgspec.to_builtins(problem)} for problem in error.problems]
    return [{"file": None, "field": "", "message": str(error), "value": "", "line": None}]


def plain(config: settings.Config) -> dict[str, object]:
    """The configuration as plain data, without what does not apply: TOML has no word for `not set`."""
    data: dict[str, object] = msgspec.to_builtins(config)
    data["engine"] = [
        {
            key: value
            for key, value in msgspec.to_builtins(engine).items()
            if value is not None and (key != "sim" or engine.kind == "sim")
        }
        for engine in config.engine
    ]
    return data


def as_toml(data: dict[str, object]) -> str:
    """Plain data as a TOML document."""
    import tomlkit

    return tomlkit.dumps(data)


def folder(file: Path) -> Path:
    """The folder that a file's relative paths count from."""
    return file.resolve().parent

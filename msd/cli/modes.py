"""`msd modes`: the mode catalogue, with what this host can run and why not; and a configuration's modes, resolved."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from msd import config as settings
from msd.cli import terminal
from msd.cli.options import Commands, add_json, load_config
from msd.config.presets import PRESETS, Preset
from msd.errors import EXIT_OK, ConfigError

if TYPE_CHECKING:
    from msd.engine.host import Host


def add_to(commands: Commands) -> None:
    """Add `modes` to the command line."""
    parser = commands.add_parser(
        "modes",
        help="list the recipes by name: what they are for, and what this host can run",
        description="List the presets that `preset` of an [[engine]] may name: what each is for, what it needs, and "
        "whether this host can run it, or why not. With --config, also the configuration's own modes with the "
        "arguments that vLLM would get. Loads neither torch nor vLLM.",
    )
    parser.add_argument("--config", metavar="FILE", help="also list the modes that this configuration makes")
    add_json(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the catalogue."""
    # Late: they look at the driver and at what is installed.
    from msd.engine.host import look
    from msd.telemetry.nvml import installed_gpus

    host = look(*installed_gpus())
    file = settings.find(options.config) if options.config else None
    config = load_config(file) if file else None
    device = config.telemetry.device if config else "0"
    listed = [entry(preset, host, device) for preset in PRESETS.values()]
    modes = configured(config, host, file.parent) if config and file else None
    if options.json:
        plain = {"host": host, "presets": listed, "modes": modes}
        print(json.dumps(msgspec.to_builtins(plain), ensure_ascii=False))
        return EXIT_OK
    print("\n".join([*describe(host), "", *catalogue(listed)]))
    if modes is not None:
        print("\n".join(["", terminal.paint(f"modes of {file}", "bold"), *own_modes(modes)]))
    return EXIT_OK


class Entry(Struct, frozen=True, kw_only=True):
    """One preset, with what this host makes of it."""

    preset: str
    what: str
    when: str
    source: str
    lossless: bool
    precision: str
    speculation: str
    prefix_caching: bool
    args: dict[str, object]
    gpu_args: dict[str, object]
    needs: tuple[str, ...]
    runs_here: bool
    why_not: tuple[str, ...]
    remark: str


class OwnMode(Struct, frozen=True, kw_only=True):
    """One mode of a configuration: its traits, and vLLM's arguments or why there are none."""

    mode: str
    kind: str
    preset: str
    precision: str
    speculation: str
    prefix_caching: bool
    max_num_seqs: int
    lossless: bool
    recipe: str
    arguments: dict[str, object] | None = None
    why_not: str = ""


def entry(preset: Preset, host: Host, device: str) -> Entry:
    """One preset, as this host sees it."""
    from msd.engine.host import remark, why_not

    obstacles = why_not(preset, host, device)
    return Entry(
        preset=preset.name,
        what=preset.what,
        when=preset.when,
        source=preset.source,
        lossless=preset.lossless,
        precision=preset.precision or "as the model",
        speculation=preset.speculation,
        prefix_caching=preset.prefix_caching,
        args=dict(preset.args),
        gpu_args=dict(preset.gpu_args),
        needs=tuple(need for need in (preset.weights, preset.draft) if need),
        runs_here=not obstacles,
        why_not=obstacles,
        remark=remark(preset, host),
    )


def configured(config: settings.Config, host: Host, base_dir: Path) -> list[OwnMode]:
    """The configuration's modes, as this host would start them."""
    return [_configured(engine, config, host, base_dir) for engine in config.engine]


def _configured(engine: settings.EngineConfig, config: settings.Config, host: Host, base_dir: Path) -> OwnMode:
    from msd.engine.vllm_arguments import build_arguments
    from msd.recipe import is_lossless, recipe_hash

    arguments, why_not = None, ""
    if engine.kind == "vllm":
        model = next(model for model in config.model if model.name == engine.model)
        folder = base_dir / (engine.weights or model.path)
        try:
            arguments = build_arguments(engine, str(folder), is_cpu=host.platform != "gpu", base_dir=base_dir)
        except ConfigError as error:
            why_not = str(error)
    return OwnMode(
        mode=engine.name,
        kind=engine.kind,
        preset=engine.preset,
        precision=engine.precision,
        speculation=engine.speculation,
        prefix_caching=engine.prefix_caching,
        max_num_seqs=engine.max_num_seqs,
        lossless=is_lossless(engine),
        recipe=recipe_hash(engine, config, base_dir),
        arguments=arguments,
        why_not=why_not,
    )


def describe(host: Host) -> list[str]:
    """The host in a line or two."""
    vllm = f"vLLM {host.vllm} ({host.platform} build)" if host.vllm else "vLLM is not installed"
    lines = [f"{host.cpu}, {host.memory_bytes / 1e9:.0f} GB; {vllm}"]
    for gpu in host.gpus:
        line = f"GPU {gpu.index}: {gpu.name}, {terminal.number((gpu.memory_total_bytes or 0) / 1e9)} GB"
        if gpu.compute_capability is not None:
            line += ", compute capability {}.{}".format(*gpu.compute_capability)
        lines.append(line)
    return lines if host.gpus else [*lines, f"no GPU: {host.no_gpu or 'the driver lists none'}"]


def catalogue(listed: list[Entry]) -> list[str]:
    """The presets: a line each, and below it what it is and what stands in the way."""
    width = max(60, shutil.get_terminal_size((120, 24)).columns - 1)
    lines = []
    for item in listed:
        state = terminal.paint("runs", "green") if item.runs_here else terminal.paint("no  ", "red")
        kept = "lossless" if item.lossless else "needs the gate"
        lines.append(f"{state}  {terminal.paint(item.preset, 'bold')}  ({kept})")
        details = [f"{item.what}. For: {item.when}. From: {item.source}"]
        details += [f"You bring: {need}" for need in item.needs]
        details += [f"Why not: {reason}" for reason in item.why_not]
        details += [f"Here: {item.remark}"] if item.remark else []
        for detail in details:
            lines += textwrap.wrap(detail, width, initial_indent=" " * 6, subsequent_indent=" " * 8)
    return lines


def own_modes(modes: list[OwnMode]) -> list[str]:
    """The configuration's modes, with the arguments that vLLM would get."""
    lines = []
    for mode in modes:
        traits = [mode.kind, mode.precision]
        traits += [f"preset {mode.preset}"] if mode.preset else []
        traits += [f"{mode.speculation} speculation"] if mode.speculation != "none" else []
        traits += ["prefix caching"] if mode.prefix_caching else []
        traits += [f"{mode.max_num_seqs} slots", "lossless" if mode.lossless else "needs the gate"]
        lines.append(f"{terminal.paint(mode.mode, 'bold')}  {', '.join(traits)}, recipe {mode.recipe}")
        if mode.why_not:
            lines.append(terminal.paint(f"      cannot run here: {mode.why_not}", "red"))
        lines += [f"      {name} = {json.dumps(value, default=str)}" for name, value in (mode.arguments or {}).items()]
    return lines

"""`msd demo`: four modes on four live engines, a burst of requests over ZeroMQ, and a table that explains itself."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final

import msgspec

from msd import config as settings
from msd.cli import demo_report, terminal
from msd.cli.children import Child, Children
from msd.cli.live import Live
from msd.cli.options import Commands, add_json, load_config, positive
from msd.cli.status import read
from msd.errors import (
    EXIT_NO,
    EXIT_OK,
    EXIT_TERMINATED,
    ConfigError,
    DaemonUnreachableError,
    EngineStartError,
    MsdError,
)
from msd.wire import DaemonStatus, EngineReport

if TYPE_CHECKING:
    from msd.client import Client

LOOK_S: Final = 0.5
"""Between two looks at the daemon."""
ENGINES_S: Final = 900.0
"""All engines together may take this long; three took 60-90 s on 2 cores."""
LOADGEN_GRACE_S: Final = 120.0
"""Beyond its duration, loadgen may take this long: its own start, and answers that are still out."""
LOADGEN_INVALID: Final = 4
STOP_GRACE_S: Final = 5.0
SOCKET: Final = "msd.sock"
SETTLE_S: Final = 0.5
"""The ledger shares out the last interval of the energy counter some moments after the last answer."""


def add_to(commands: Commands) -> None:
    """Add `demo` to the command line."""
    parser = commands.add_parser(
        "demo",
        help="start four engines, fire a burst of requests, show what became of them",
        description="Start a daemon of its own with four modes on four live vLLM engines, fire bursty load at it "
        "over ZeroMQ, show progress, and end with a table. Ctrl-C stops everything. Needs the repository's testbed "
        "models (make testbed).",
    )
    parser.add_argument("--sim", action="store_true", help="simulated engines: no vLLM, no GPU, ready in seconds")
    parser.add_argument("--duration-s", type=positive, default=30.0, metavar="S", help="of the load (default 30)")
    parser.add_argument("--rate", type=positive, metavar="RPS", help="mean requests a second (default: the load's own)")
    parser.add_argument("--config", metavar="FILE", help="another configuration than the testbed's")
    parser.add_argument("--load", default="demo", metavar="SPEC", help="a loadgen preset or spec (default: demo)")
    add_json(parser, "the result as one JSON object on stdout, progress on stderr")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the demo; exit 1 when no request was answered."""
    file, config = _configuration(options)
    folder = Path(tempfile.mkdtemp(prefix="msd-demo-"))
    live = Live(sys.stderr if options.json else sys.stdout)
    _sigterm_ends_the_demo()
    try:
        result = _perform(options, live, file, config, folder)
    except KeyboardInterrupt:
        live.say(f"   interrupted; all that was started is stopped, the logs stay in {folder}")
        raise
    if options.json:
        print(json.dumps({"simulated": result.status.simulated, **msgspec.to_builtins(result)}, ensure_ascii=False))
    else:
        print("\n".join(["", *demo_report.render(result)]))
    return EXIT_OK if demo_report.num_finished(result) else EXIT_NO


def _perform(
    options: argparse.Namespace, live: Live, file: Path, config: settings.Config, folder: Path
) -> demo_report.Result:
    """The four steps; every child process is gone afterwards, however they end."""
    # Late: `msd check` and `msd version` need no socket.
    from msd.client import Client

    endpoint = f"ipc://{folder}/{SOCKET}"
    # The configuration names none: a private socket, log folder and decision log, whatever else runs on this machine.
    private = {"MSD_ENDPOINT": endpoint, "RUNTIME_DIRECTORY": str(folder), "STATE_DIRECTORY": str(folder)}
    environ = {**os.environ, **private}
    report_file = folder / "report.json"
    plan = _draw_plan(options, folder)
    if any(engine.kind != "vllm" for engine in config.engine):
        live.say(terminal.paint(demo_report.SIMULATED, "yellow"))
    with Children() as children:
        live.say(f"1. starting the daemon: msd serve --config {file}; logs in {folder}")
        serve = ["-m", "msd", "serve", "--config", str(file)]
        daemon = children.start("daemon", serve, folder / "daemon.log", environ, tied=True)
        _await_socket(live, daemon, folder / SOCKET, config)
        with Client(endpoint) as client:
            live.say(f"2. starting {len(config.engine)} engines, one after another")
            _await_engines(live, daemon, client)
            live.say(f"3. firing {options.duration_s:g} s of bursty load over ZeroMQ: loadgen {options.load}")
            fire = ["-m", "loadgen", "run", str(plan), "--target", f"msd+{endpoint}", "--json-out", str(report_file)]
            load = children.start("load generator", fire, folder / "loadgen.log", environ)
            _await_load(live, daemon, load, client, options.duration_s)
            time.sleep(SETTLE_S)
            status = _ask(daemon, client)
        live.say("4. stopping the daemon")
        daemon.stop(config.daemon.drain_s + STOP_GRACE_S)
    report = demo_report.decode(report_file.read_bytes())
    return demo_report.Result(report=report, status=status, config=str(file), folder=str(folder))


def _draw_plan(options: argparse.Namespace, folder: Path) -> Path:
    """The load, drawn before anything starts: a mistake in it is told at once. Raises ConfigError."""
    plan = folder / "plan.jsonl.gz"
    draw = [sys.executable, "-m", "loadgen", "plan", options.load, "-o", str(plan)]
    draw += ["--duration-s", str(options.duration_s)]
    if options.rate is not None:
        draw += ["--rate", str(options.rate)]
    drawn = subprocess.run(draw, capture_output=True, text=True, check=False)
    if drawn.returncode:
        raise ConfigError(f"the load cannot be planned: {drawn.stderr.strip()}", remedy="loadgen presets lists some")
    return plan


def _configuration(options: argparse.Namespace) -> tuple[Path, settings.Config]:
    """The configuration file and what it says, so that a mistake in it is told before anything starts."""
    if options.config:
        file = settings.find(options.config)
        config = load_config(file)
        if "ipc://" not in config.ingress.zmq.endpoints:
            raise ConfigError(f"{file}: the demo brings a socket of its own", remedy='add "ipc://" to the endpoints')
        return file, config
    testbed = importlib.util.find_spec("testbed")
    file = Path(testbed.origin or "").parent / ("demo-sim.toml" if options.sim else "demo.toml") if testbed else Path()
    file = _short(file)
    if not file.is_file():
        raise ConfigError("the demo needs the repository's testbed", remedy="run it in a checkout, or name a --config")
    try:
        return file, load_config(file)
    except ConfigError as error:
        raise ConfigError(str(error), remedy="`make testbed` makes the models of the demo") from error


def _short(file: Path) -> Path:
    """The path as a person would type it here."""
    return file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file


def _sigterm_ends_the_demo() -> None:
    """Turn SIGTERM and a closed terminal into an exception, so that the children are stopped on the way out."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(EXIT_TERMINATED)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGHUP, end)


def _await_socket(live: Live, daemon: Child, socket: Path, config: settings.Config) -> None:
    doing = "importing vLLM" if any(engine.kind == "vllm" for engine in config.engine) else "binding its socket"
    began = time.monotonic()
    while not socket.exists():
        daemon.check()
        elapsed_s = time.monotonic() - began
        if elapsed_s > ENGINES_S:
            raise MsdError(f"the daemon bound no socket within {ENGINES_S:g} s", remedy=f"see {daemon.log}")
        line = f"   the daemon is {doing}: {elapsed_s:.0f} s"
        live.draw([line], line, doing)
        time.sleep(0.1)


def _ask(daemon: Child, client: Client) -> DaemonStatus:
    """The daemon's status; when it does not answer because it has ended, say that."""
    from msd.client import AnswerTimeoutError

    try:
        return read(client.status())
    except (DaemonUnreachableError, AnswerTimeoutError):
        daemon.check()
        raise


class _Starts:
    """When each engine was first seen starting: the daemon itself counts from its own start."""

    def __init__(self) -> None:
        self._seen: dict[str, float] = {}

    def line(self, engine: EngineReport) -> str:
        """What the engine is doing, for a person."""
        if engine.state == "up":
            return f"{terminal.paint('warm', 'green')}, started in {engine.start_s or 0.0:.1f} s"
        if engine.num_starts == 0:
            return "waits for its turn"
        began = self._seen.setdefault(engine.engine, time.monotonic())
        if engine.state == "starting" and engine.num_starts == 1:
            return f"loads and warms up: {time.monotonic() - began:.0f} s"
        return (
            f"{engine.state}, start {engine.num_starts}: {(engine.last_error.splitlines() or ['no reason given'])[0]}"
        )


def _await_engines(live: Live, daemon: Child, client: Client) -> None:
    """Wait until every engine is warm or has failed to start; raise when none is warm."""
    starts = _Starts()
    deadline = time.monotonic() + ENGINES_S
    while True:
        daemon.check()
        status = _ask(daemon, client)
        width = max(len(engine.engine) for engine in status.engines)
        lines = [f"   {engine.engine:{width}}  {starts.line(engine)}" for engine in status.engines]
        step = " ".join(f"{engine.state}{engine.num_starts}" for engine in status.engines)
        live.draw(lines, "   " + "; ".join(line.strip() for line in lines), step)
        down = [engine for engine in status.engines if engine.state != "up"]
        lost = [engine for engine in down if engine.last_error]
        if not down or len(down) == len(lost) or time.monotonic() > deadline:
            break
        time.sleep(LOOK_S)
    if len(down) == len(status.engines):
        raise EngineStartError("no engine is warm: " + "; ".join(starts.line(engine) for engine in down))
    for engine in down:
        live.say(terminal.paint(f"   going on without {engine.engine}: {starts.line(engine)}", "yellow"))


def _await_load(live: Live, daemon: Child, load: Child, client: Client, duration_s: float) -> None:
    """Show how the load goes until loadgen ends; raise when it could not do its work."""
    began = then = time.monotonic()
    submitted = 0
    while load.exit_code() is None:
        if time.monotonic() - began > duration_s + LOADGEN_GRACE_S:
            raise MsdError(f"loadgen did not end {LOADGEN_GRACE_S:g} s after its time", remedy=f"see {load.log}")
        daemon.check()
        time.sleep(LOOK_S)
        status = _ask(daemon, client)
        now = time.monotonic()
        counts = status.requests
        rate = (counts.get("submitted", 0) - submitted) / (now - then)
        then, submitted = now, counts.get("submitted", 0)
        not_done = sum(counts.get(name, 0) for name in ("rejected", "aborted", "failed"))
        when = f"{now - began:3.0f} of {duration_s:g} s" if now - began <= duration_s else "last answers"
        in_flight = status.num_waiting + status.num_running
        line = (
            f"   {when}  {rate:5.1f} requests/s  in flight {in_flight:3}  "
            f"answered {counts.get('delivered', 0):4}  not answered {not_done}"
        )
        modes = ", ".join(f"{mode.mode} {mode.num_decisions}" for mode in status.modes)
        live.draw([line, f"          sent to {modes}"], f"{line}  sent to {modes}", "load")
    if load.exit_code() not in (EXIT_OK, LOADGEN_INVALID):
        load.check()

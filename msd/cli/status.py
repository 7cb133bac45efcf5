"""`msd status`: what the running daemon says of itself."""

from __future__ import annotations

import argparse
import json
import sys
import time

import msgspec

from msd.cli import terminal
from msd.cli.options import Commands, add_endpoint, add_json, positive
from msd.cli.terminal import DASH, number, paint, table
from msd.errors import EXIT_OK, DaemonUnreachableError
from msd.wire import DaemonStatus, EngineReport, LedgerReport, ModeReport

MAX_REASONS = 3
COLOUR_OF_STATE = {"up": "green", "serving": "green", "failed": "red", "backoff": "yellow", "draining": "yellow"}


def add_to(commands: Commands) -> None:
    """Add `status` to the command line."""
    parser = commands.add_parser(
        "status",
        help="engines, queue, modes and energy of the running daemon",
        description="Ask the running daemon for engines, queue, modes and energy ledger. Exit 69 when none answers.",
    )
    add_endpoint(parser)
    add_json(parser, "one JSON object on stdout (with --watch, one per line)")
    parser.add_argument("--watch", action="store_true", help="again and again, until Ctrl-C")
    parser.add_argument("--interval-s", type=positive, default=1.0, metavar="S", help="between two looks (default 1)")
    parser.add_argument("--timeout-s", type=positive, default=5.0, metavar="S", help="for one answer (default 5)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the status, once or until Ctrl-C."""
    # Late: `msd check` and `msd version` need no socket.
    from msd.client import AnswerTimeoutError, Client

    with Client(options.endpoint, timeout_s=options.timeout_s) as client:
        while True:
            try:
                data = client.status()
            except AnswerTimeoutError as error:
                raise DaemonUnreachableError(error.message, remedy=error.remedy) from error
            show(data, options)
            if not options.watch:
                return EXIT_OK
            time.sleep(options.interval_s)


def show(data: dict[str, object], options: argparse.Namespace) -> None:
    """Print one status."""
    if options.json:
        print(json.dumps(data, ensure_ascii=False), flush=True)
        return
    lines = render(read(data))
    if options.watch:
        # Over the last one where that can be, else below it.
        lines.insert(0, "\x1b[H\x1b[2J" if terminal.redraws(sys.stdout) else "")
    print("\n".join(lines), flush=True)


def read(data: dict[str, object]) -> DaemonStatus:
    """The status as a Struct. Raises DaemonUnreachableError when what answers is no msd of this protocol."""
    try:
        return msgspec.convert(data, DaemonStatus)
    except msgspec.ValidationError as error:
        raise DaemonUnreachableError(
            f"what answers gives a status that this msd cannot read: {error}", remedy="run the daemon's own `msd`"
        ) from error


def render(status: DaemonStatus) -> list[str]:
    """The status as lines for a person."""
    lines = [_headline(status)]
    if status.simulated:
        lines.append(paint("SIMULATED: the figures below come from a stated model, not from a machine", "yellow"))
    lines += ["", *_engines(status.engines), "", *_requests(status)]
    if any(mode.num_decisions for mode in status.modes):
        lines += ["", *_modes(status.modes)]
    lines += _quality(status.modes)
    lines += ["", _gpu(status.gpu)]
    for ledger in status.energy:
        lines += ["", *energy_lines(ledger)]
    if not status.energy:
        lines.append("energy: not measured, no counter here")
    return lines


def _headline(status: DaemonStatus) -> str:
    parts = [
        paint(status.server, "bold"),
        f"{_state(status.state)} for {duration(status.uptime_s)}",
        f"policy {status.policy or DASH}",
        f"pid {status.pid}" if status.pid else "",
        "" if status.durable else "journal in memory only",
    ]
    return ", ".join(part for part in parts if part)


def _state(word: str, seconds: float | None = None) -> str:
    text = f"{word} {duration(seconds)}" if seconds else word
    return paint(text, COLOUR_OF_STATE[word]) if word in COLOUR_OF_STATE else text


def _engines(engines: tuple[EngineReport, ...]) -> list[str]:
    rows = [
        [
            f"{engine.engine} (simulated)" if engine.simulated else engine.engine,
            f"{engine.state} {duration(engine.state_s)}",
            f"{engine.num_running}/{engine.num_slots}",
            str(engine.num_waiting),
            f"{engine.kv_usage:.0%}",
            number(engine.start_s, "s"),
            str(engine.num_starts),
        ]
        for engine in engines
    ]
    lines = table(["engine", "state", "running", "waiting inside", "KV used", "start", "starts"], rows, left=(0, 1))
    lines += [f"{engine.engine}: {engine.last_error}" for engine in engines if engine.last_error]
    return lines


def _requests(status: DaemonStatus) -> list[str]:
    counts = status.requests
    ends = [
        f"{counts.get(name, 0):,} {name}"
        for name in ("delivered", "rejected", "aborted", "failed", "duplicates", "pending")
        if name in counts
    ]
    lines = [f"requests: {counts.get('submitted', 0):,} submitted = {' + '.join(ends)}"] if counts else []
    lines.append(
        f"now: {status.num_waiting:,} waiting ({status.num_waiting_tokens:,} tokens), {status.num_running:,} running, "
        f"{status.num_sessions:,} sessions"
    )
    if status.errors:
        lines.append("errors: " + ", ".join(f"{code} {count:,}" for code, count in status.errors.items()))
    return lines


def _modes(modes: tuple[ModeReport, ...]) -> list[str]:
    total = sum(mode.num_decisions for mode in modes)
    rows = [
        [
            mode.mode,
            f"{mode.num_decisions:,}",
            f"{mode.num_decisions / total:.0%}",
            number(mode.ttft_ms, "ms"),
            number(mode.tpot_ms, "ms"),
            "; ".join(f"{reason} ({count:,})" for reason, count in mode.reasons[:MAX_REASONS]),
        ]
        for mode in modes
    ]
    return table(["mode", "decisions", "share", "TTFT expected", "TPOT expected", "why"], rows, left=(0, 5))


def _quality(modes: tuple[ModeReport, ...]) -> list[str]:
    """How every mode stands, and per task what the gate and production say of it."""
    told = [mode for mode in modes if mode.standing]
    if not told:
        return []
    lines = ["", "quality:"]
    lines += [f"  {mode.mode}: {mode.standing if mode.serves else paint(mode.standing, 'yellow')}" for mode in told]
    rows = [
        [
            mode.mode,
            "no task named" if certificate.task == "*" else certificate.task,
            certificate.standing,
            _share(certificate.accuracy),
            f"{_share(certificate.accuracy_low)} - {_share(certificate.accuracy_high)}",
            f"{certificate.num_pairs:,}",
            f"{certificate.num_live_pairs:,}",
            DASH if certificate.live_difference is None else f"{certificate.live_difference * 100:+.2f}",
            DASH if certificate.live_evidence is None else f"{certificate.live_evidence:.2g}",
        ]
        for mode in told
        for certificate in mode.certificates
        if certificate.accuracy is not None
    ]
    if rows:
        head = ["mode", "task", "standing", "right", "95 %", "pairs", "live pairs", "difference", "evidence"]
        lines += ["", *table(head, rows, left=(0, 1, 2))]
    return lines


def _share(value: float | None) -> str:
    return DASH if value is None else f"{value:.1%}"


def _gpu(gpu: dict[str, object] | None) -> str:
    if gpu is None or gpu.get("source") == "none":
        return "GPU: none seen"
    used, total = gpu.get("memory_used_bytes"), gpu.get("memory_total_bytes")
    parts = [
        f"GPU: {gpu.get('name') or gpu.get('uuid') or gpu.get('source')}",
        f"{gibibytes(used)} of {gibibytes(total)} GiB used",
        number(gpu.get("power_instant_w"), "W"),
        f"view {number(gpu.get('age_s'), 's')} old",
        str(gpu.get("error") or ""),
    ]
    return ", ".join(part for part in parts if part)


def energy_lines(ledger: LedgerReport) -> list[str]:
    """The ledger of one counter as a table whose rows sum to its last one."""
    parts = [("requests", ledger.requests_mj)]
    parts += [(f"wasted: {reason}", energy_mj) for reason, energy_mj in ledger.wasted_mj.items()]
    parts += [("idle", ledger.idle_mj)]
    parts += [(f"unattributed: {reason}", energy_mj) for reason, energy_mj in ledger.unattributed_mj.items()]
    parts += [("under way, starts too", ledger.running_mj), ("not shared out yet", ledger.open_mj)]
    if ledger.residue_mj:
        parts.append(("lost in the ledger", ledger.residue_mj))
    total_mj = ledger.counter_mj + ledger.estimated_mj
    rows = [[f"  {name}", joules(energy_mj)] for name, energy_mj in parts]
    rows.append(["  = the counter", joules(total_mj)])
    lines = table([f"energy of {ledger.domain} ({ledger.source})", ""], rows)
    if (difference_mj := total_mj - sum(energy_mj for _, energy_mj in parts)) != 0:
        lines.append(paint(f"  the parts do not add up: {joules(difference_mj)} differ", "red"))
    return lines


def joules(energy_mj: int) -> str:
    """Millijoules as joules, none of them lost."""
    return f"{energy_mj / 1000:,.3f} J"


def gibibytes(value: object) -> str:
    """Bytes as GiB, or a dash."""
    return f"{value / 2**30:,.1f}" if isinstance(value, int) else DASH


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    whole = int(seconds)
    if whole < 60:
        return f"{seconds:.0f} s"
    if whole < 3_600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3_600} h {whole % 3_600 // 60} min"

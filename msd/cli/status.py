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
from msd.wire import CoefficientReport, DaemonStatus, EngineReport, LedgerReport, ModeReport

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
    lines += ["", *_engines(status.engines), *_switches(status.residency), "", *_requests(status)]
    if any(mode.num_decisions for mode in status.modes):
        lines += ["", *_modes(status.modes)]
    lines += _quality(status.modes)
    lines += ["", _gpu(status.gpu)]
    for ledger in status.energy:
        lines += ["", *energy_lines(ledger), *usage_lines(ledger)]
    lines += coefficient_lines(status.coefficients)
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
    head = ["engine", "state", "running", "waiting inside", "KV used", "start", "starts"]
    left: tuple[int, ...] = (0, 1)
    if any(engine.residency == "auto" for engine in engines):
        head.insert(2, "residence")
        left = (0, 1, 2)
        for row, engine in zip(rows, engines, strict=True):
            row.insert(2, engine.residence if engine.residency == "auto" else f"{engine.residence} (always)")
    lines = table(head, rows, left=left)
    lines += [f"{engine.engine}: {engine.last_error}" for engine in engines if engine.last_error]
    return lines


def _switches(residency: dict[str, float]) -> list[str]:
    """What was done to keep the right engines resident; nothing where all of them stay."""
    if not residency:
        return []
    names = ("switches", "emergencies", "moved_requests", "dropped_plans")
    counts = {name: int(residency.get(f"num_{name}", 0)) for name in names}
    parts = [
        f"{counts['switches']:,} ({counts['emergencies']:,} of them emergencies)",
        f"{duration(residency.get('transition_s', 0.0))} in transition",
        f"{counts['moved_requests']:,} requests moved",
        f"{counts['dropped_plans']:,} plans dropped" if counts["dropped_plans"] else "",
    ]
    return ["switches: " + ", ".join(part for part in parts if part)]


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
            f"{certificate.num_live_unscored:,}",
            _share(certificate.live_agreement),
        ]
        for mode in told
        for certificate in mode.certificates
        if certificate.accuracy is not None and certificate.standing != "lossless"
    ]
    if rows:
        head = ["mode", "task", "standing", "right", "95 %", "pairs", "live pairs", "difference", "evidence"]
        head += ["unscored", "agree"]
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
    estimated = [ledger.estimated_of.get(_ACCOUNTS.get(name, name), 0) for name, _ in parts]
    rows = [[f"  {name}", joules(energy_mj)] for name, energy_mj in parts]
    rows.append(["  = the counter", joules(total_mj)])
    head = [f"energy of {ledger.domain} ({ledger.source})", ""]
    if ledger.estimated_mj:
        # Counted and estimated energy stay two columns; each adds up for itself.
        for row, energy_mj, estimated_mj in zip(
            rows, [*(e for _, e in parts), total_mj], [*estimated, ledger.estimated_mj], strict=True
        ):
            row[1:] = [joules(energy_mj - estimated_mj), joules(estimated_mj)]
        head[1:] = [_counted(ledger), "estimated"]
    lines = table(head, rows)
    if (difference_mj := total_mj - sum(energy_mj for _, energy_mj in parts)) != 0:
        lines.append(paint(f"  the parts do not add up: {joules(difference_mj)} differ", "red"))
    if ledger.estimated_mj and (difference_mj := ledger.estimated_mj - sum(estimated)) != 0:
        lines.append(paint(f"  the estimates do not add up: {joules(difference_mj)} differ", "red"))
    if ledger.idle_origin:
        lines.append(f"  idle power {_idle_power(ledger)}")
    return lines


_ACCOUNTS = {"under way, starts too": "running", "not shared out yet": "open"}
"""Rows of the table by the ledger's own name, where it is another."""


def _counted(ledger: LedgerReport) -> str:
    """Of a simulated counter nothing was counted."""
    return "simulated" if ledger.source == "simulated" else "counted"


def _idle_power(ledger: LedgerReport) -> str:
    """Where the largest single source of error comes from."""
    if ledger.idle_w is None:
        return "unknown: all energy counts as dynamic"
    spread = "" if ledger.idle_spread_w is None else f", scatter {ledger.idle_spread_w:.1f} W"
    age = "" if ledger.idle_age_s is None else f", {duration(ledger.idle_age_s)} ago"
    return f"{ledger.idle_w:.1f} W, {ledger.idle_origin}{spread}{age}"


def usage_lines(ledger: LedgerReport) -> list[str]:
    """What answered requests took, by mode and by tenant; J per generated token, its static part apart."""
    lines: list[str] = []
    for word, users in (("mode", ledger.modes), ("tenant", ledger.tenants)):
        rows = [
            [
                f"  {user.name}",
                f"{user.num_tokens:,}",
                joules(user.energy_mj - user.estimated_mj),
                joules(user.estimated_mj) if user.estimated_mj else DASH,
                per_token(user.energy_mj, user.num_tokens),
                per_token(user.static_mj, user.num_tokens),
                joules(user.wasted_mj) if user.wasted_mj else DASH,
            ]
            for user in users
        ]
        if rows:
            head = [
                f"energy by {word}",
                "tokens",
                _counted(ledger),
                "estimated",
                "J/token",
                "of it static",
                "wasted beside",
            ]
            lines += ["", *table(head, rows)]
    return lines


def coefficient_lines(coefficients: tuple[CoefficientReport, ...]) -> list[str]:
    """What energy is split by; a figure that is not known better than itself is a dash."""

    def known(value_mj: float, error_mj: float, confidence: str) -> str:
        if confidence == "prior":
            return f"{value_mj / 1000:.3f}"
        return f"{value_mj / 1000:.3f} ± {error_mj / 1000:.3f}" if error_mj < value_mj else DASH

    rows = [
        [
            f"  {c.mode}",
            known(c.step_mj, c.step_error_mj, c.confidence),
            known(c.prefill_mj_per_token, c.prefill_error_mj, c.confidence),
            known(c.decode_mj_per_token, c.decode_error_mj, c.confidence),
            f"{c.num_intervals:,}",
            c.confidence,
        ]
        for c in coefficients
    ]
    if not rows:
        return []
    head = ["energy split by (J)", "a step", "prompt token", "decode position", "intervals", "confidence"]
    return ["", *table(head, rows, left=(0, 5))]


def per_token(energy_mj: int, num_tokens: int) -> str:
    """J per generated token, or a dash."""
    return f"{energy_mj / 1000 / num_tokens:,.3f}" if num_tokens else DASH


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

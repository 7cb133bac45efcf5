"""`msd decisions`: what was decided lately, what came of it, and how well it was predicted. Reads the log itself."""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from msd import config as settings
from msd import decisions
from msd.cli import terminal
from msd.cli.options import Commands, add_config, add_json, count
from msd.cli.terminal import DASH, number, table
from msd.decisions import CorruptDecisionLogError, Episode, Record
from msd.errors import EXIT_NO, EXIT_OK, ConfigError, MsdError

LAST: Final = 40
_UNITS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_CORRUPT_SHOWN: Final = 3


class NotInLogError(MsdError):
    """Nothing of that kind is in the log. Recoverable: look elsewhere, or wait until it is written."""

    exit_code = EXIT_NO


class Prediction(Struct, frozen=True, kw_only=True):
    """One figure as it was predicted at the decision and as it was measured, both from the decision on."""

    name: str
    unit: str
    predicted: float | None
    measured: float | None
    error: float | None
    """(predicted - measured) / measured."""


def add_to(commands: Commands) -> None:
    """Add `decisions` to the command line."""
    parser = commands.add_parser(
        "decisions",
        help="what was decided lately, with predictions and what was measured",
        description="List decisions from the decision log, the newest last, and how well each mode was predicted. The "
        "daemon need not run. Exit 1 when there are none.",
    )
    parser.add_argument("--since", type=seconds, default=3_600.0, metavar="TIME", help="30s, 15m, 1h, 2d (default 1h)")
    parser.add_argument("--mode", metavar="NAME", help="only decisions for this mode")
    parser.add_argument("--last", type=count, default=LAST, metavar="N", help=f"rows of the table (default {LAST})")
    add_log(parser)
    add_json(parser, "one JSON object per decision, on a line each, in the order in which its outcome was known")
    parser.set_defaults(run=run)


def add_log(parser: argparse.ArgumentParser) -> None:
    """Add what says where the log is and how to take what is damaged."""
    add_config(parser)
    parser.add_argument(
        "--log", metavar="DIR", type=Path, help="folder of the log (default: as the configuration says)"
    )
    parser.add_argument("--skip-corrupt", action="store_true", help="leave out lines that are damaged, and count them")


def seconds(text: str) -> float:
    """A span of time such as 30s, 15m, 1h or 2d, as argparse's `type`."""
    unit = _UNITS.get(text[-1:])
    try:
        value = float(text[:-1] if unit else text) * (unit or 1)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 30s, 15m, 1h or 2d")
    return value


def run(options: argparse.Namespace) -> int:
    """Print the decisions; exit 1 when there are none."""
    log = Log(options)
    found = 0
    newest: deque[Episode] = deque(maxlen=options.last)
    by_mode: dict[str, _Tally] = defaultdict(_Tally)
    for episode in decisions.episodes(log.read(since=time.time() - options.since)):
        mode = episode.decided.decision.mode
        if options.mode not in (None, mode):
            continue
        found += 1
        if options.json:
            sys.stdout.write(msgspec.json.encode(episode).decode() + "\n")
        else:
            newest.append(episode)
            by_mode[mode].add(episode)
    log.tell_skipped()
    if not found:
        what = f"decision for mode {options.mode!r}" if options.mode else "decision"
        raise NotInLogError(
            f"no {what} of the last {options.since:g} s in {log.folder}", remedy="see --since and --log"
        )
    if not options.json:
        rows = sorted(newest, key=lambda episode: episode.decided.t_unix_us)
        print("\n".join([*_listing(rows), "", *_summary(by_mode)]))
        if found > len(rows):
            print(f"the newest {len(rows):,} of {found:,} decisions; --last N shows more")
    return EXIT_OK


# --- where the log is ------------------------------------------------------------------------------------------------


class Log:
    """The log that the options mean. Raises NotInLogError, with every place looked at, when there is none."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._skip_corrupt: bool = options.skip_corrupt
        self._corrupt: list[CorruptDecisionLogError] = []
        places = _places(options.config, options.log)
        self.folder = next((place for place in places if decisions.files(place)), places[0])
        if not decisions.files(self.folder):
            raise NotInLogError(
                f"no decision log: looked in {', '.join(map(str, places))}",
                remedy="name its folder with --log, or the daemon's configuration with --config; a log begins with the "
                "first decision, if telemetry.decision_log is on",
            )

    def read(self, since: float | None = None, containing: bytes = b"") -> Iterator[Record]:
        """Its records; damaged lines are an error, or are counted with --skip-corrupt."""
        on_corrupt = self._corrupt.append if self._skip_corrupt else None
        return decisions.read(self.folder, since, containing=containing, on_corrupt=on_corrupt)

    def tell_skipped(self) -> None:
        """Say on stderr what was left out."""
        for error in self._corrupt[:_CORRUPT_SHOWN]:
            terminal.complain(error.message)
        if self._corrupt:
            plural = "s" if len(self._corrupt) > 1 else ""
            terminal.complain(f"{len(self._corrupt)} damaged line{plural} left out")


def _places(config_file: str | None, log: Path | None) -> list[Path]:
    """Folders in which the log may be, likeliest first."""
    if log is not None:
        return [log, log / decisions.FOLDER]
    configured, base_dir = "", Path()
    try:
        file = settings.find(config_file)
    except ConfigError:
        if config_file is not None:
            raise
    else:
        configured, base_dir = settings.load(file).daemon.state_dir, file.parent
    places = [decisions.state_dir(configured, base_dir) / decisions.FOLDER]
    if not configured:
        places.append(decisions.SYSTEM_STATE_DIR / decisions.FOLDER)
    return places


# --- figures ---------------------------------------------------------------------------------------------------------


def predictions(episode: Episode) -> list[Prediction]:
    """TTFT, TPOT, E2EL, tokens and energy of the chosen mode: predicted, and measured where it was."""
    decision, observed = episode.decided.decision, episode.observed
    chosen = next(c for c in decision.candidates if c.mode == decision.mode)
    before_ms = episode.decided.since_receipt_us * 1e-3
    seen = None if observed is None else observed.observation
    energy = None if seen is None else seen.energy
    return [
        _prediction("TTFT", "ms", chosen.ttft_ms, None if seen is None else seen.ttft_ms - before_ms),
        # One token has no time between tokens.
        _prediction("TPOT", "ms", chosen.tpot_ms, None if seen is None else seen.tpot_ms or None),
        _prediction("E2EL", "ms", chosen.e2el_ms, None if seen is None else seen.e2el_ms - before_ms),
        _prediction(
            "output", "tokens", decision.features.num_expected_tokens,
            None if seen is None else seen.num_completion_tokens,
        ),
        _prediction("cached", "tokens", chosen.num_cached_tokens, None if seen is None else seen.num_cached_tokens),
        _prediction(
            "energy", "J", None if chosen.energy_mj is None else chosen.energy_mj * 1e-3,
            None if energy is None else energy.dynamic_mj * 1e-3,
        ),
    ]  # fmt: skip


def _prediction(name: str, unit: str, predicted: float | None, measured: float | None) -> Prediction:
    error = None
    if predicted is not None and measured is not None and measured > 0:
        error = (predicted - measured) / measured
    return Prediction(name=name, unit=unit, predicted=predicted, measured=measured, error=error)


def signed(error: float | None) -> str:
    """An error as a person reads it."""
    return DASH if error is None else f"{error:+.0%}"


def when(t_unix_us: int, *, date: bool = False) -> str:
    """Wall-clock time, local."""
    moment = datetime.datetime.fromtimestamp(t_unix_us * 1e-6).astimezone()
    return moment.isoformat(sep=" ", timespec="milliseconds") if date else moment.strftime("%H:%M:%S")


def _listing(episodes: list[Episode]) -> list[str]:
    rows = []
    for episode in episodes:
        decided, seen = episode.decided, None if episode.observed is None else episode.observed.observation
        figures = {figure.name: figure for figure in predictions(episode)}
        ttft, e2el, energy = figures["TTFT"], figures["E2EL"], figures["energy"]
        met = None if seen is None else seen.slo_met
        rows.append(
            [
                when(decided.t_unix_us),
                decided.decision.request_id,
                decided.decision.mode,
                number(ttft.measured), signed(ttft.error),
                number(e2el.measured), signed(e2el.error),
                number(energy.measured, digits=2), signed(energy.error),
                DASH if met is None else "kept" if met else "missed",
                decided.decision.reason,
            ]
        )  # fmt: skip
    head = ["time", "request", "mode", "TTFT ms", "off", "E2EL ms", "off", "J", "off", "SLO", "why"]
    return table(head, rows, left=(0, 1, 2, 10))


class _Tally:
    """Figures of one mode; the episodes themselves would not fit into memory for a whole log."""

    def __init__(self) -> None:
        self.num = self.num_measured = self.num_bound = self.num_kept = 0
        self.errors: dict[str, list[float]] = defaultdict(list)

    def add(self, episode: Episode) -> None:
        self.num += 1
        if episode.observed is None:
            return
        self.num_measured += 1
        for figure in predictions(episode):
            if figure.error is not None:
                self.errors[figure.name].append(abs(figure.error))
        met = episode.observed.observation.slo_met
        self.num_bound += met is not None
        self.num_kept += met is True


def _summary(by_mode: dict[str, _Tally]) -> list[str]:
    import statistics  # late: it brings fractions and decimal, and `msd send` reads this file too

    total = sum(tally.num for tally in by_mode.values())
    rows = []
    for mode, tally in sorted(by_mode.items()):
        off = [
            f"{statistics.median(tally.errors[name]):.0%}" if tally.errors[name] else DASH
            for name in ("TTFT", "TPOT", "E2EL", "energy")
        ]
        kept = f"{tally.num_kept / tally.num_bound:.0%}" if tally.num_bound else DASH
        rows.append([mode, f"{tally.num:,}", f"{tally.num / total:.0%}", f"{tally.num_measured:,}", *off, kept])
    head = ["mode", "decisions", "share", "measured", "TTFT off", "TPOT off", "E2EL off", "J off", "SLO kept"]
    return [
        *table(head, rows),
        "off: prediction against measurement, from the decision on; by mode, the median of its size",
    ]

"""The live line on stderr: in place on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import statistics
import sys
from typing import TextIO

from loadgen.record import Record

TERMINAL_INTERVAL_US = 250_000
PLAIN_INTERVAL_US = 5_000_000
CLEAR_LINE = "\r\x1b[2K"


class Progress:
    """Says how the run goes: rates, requests in flight, errors, lateness, TTFT of the last few hundred."""

    def __init__(self, duration_s: float, stream: TextIO | None = None, quiet: bool = False) -> None:
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._interval_us = TERMINAL_INTERVAL_US if self._terminal else PLAIN_INTERVAL_US
        self._duration_s = duration_s
        self._quiet = quiet
        self._shown_us = 0
        self._sent = self._due = 0
        self._in_place = False

    def say(self, text: str) -> None:
        """Print one line."""
        if not self._quiet:
            self._stream.write(f"loadgen: {text}\n")
            self._stream.flush()

    def update(self, record: Record, now_us: int) -> None:
        """Show where the run stands, if the last line is old enough."""
        elapsed_us = now_us - self._shown_us
        if self._quiet or elapsed_us < self._interval_us:
            return
        line = self._line(record, now_us, elapsed_us / 1e6)
        self._shown_us = now_us
        if self._terminal:
            self._stream.write(CLEAR_LINE + line)
            self._in_place = True
        else:
            self._stream.write(f"loadgen: {line}\n")
        self._stream.flush()

    def end(self) -> None:
        """Leave the line."""
        if self._in_place:
            self._stream.write("\n")
            self._stream.flush()
            self._in_place = False

    def _line(self, record: Record, now_us: int, elapsed_s: float) -> str:
        due = int(record.intended_us.searchsorted(now_us, side="right"))
        newly_due, newly_sent = due - self._due, record.num_sent - self._sent
        fresh = slice(self._due, due)
        sent = record.sent_us[fresh] >= 0
        late_us = (record.sent_us[fresh] - record.intended_us[fresh])[sent]
        late = f"{late_us.max() / 1e3:.1f} ms" if len(late_us) else "-"
        ttft_us = record.recent_ttft_us
        ttft = f"{statistics.median(ttft_us) / 1e3:.0f} ms" if ttft_us else "-"
        self._due, self._sent = due, record.num_sent
        return (
            f"{now_us / 1e6:5.1f} / {self._duration_s:g} s  "
            f"offered {newly_due / elapsed_s:.1f}/s  sent {newly_sent / elapsed_s:.1f}/s  "
            f"in flight {record.num_in_flight}  done {record.num_finished}  not done {record.num_bad}  "
            f"late <= {late}  TTFT p50 {ttft}"
        )

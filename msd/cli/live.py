"""Says what a long step is doing: lines redrawn in place on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from typing import Final, TextIO

from msd.cli import terminal

PLAIN_INTERVAL_S: Final = 5.0
"""Between two lines where they cannot be redrawn (a log of CI), unless the step itself changes."""


class Live:
    """The current lines of a long step on `stream`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._redraws = terminal.redraws(stream)
        self._num_drawn = 0
        self._step = ""
        self._printed_at = 0.0

    def say(self, text: str = "") -> None:
        """Print a line that stays; what was drawn so far stays too."""
        self._num_drawn = 0
        self._step = ""
        self._stream.write(text + "\n")
        self._stream.flush()

    def draw(self, lines: Sequence[str], plain: str, step: str) -> None:
        """Redraw `lines` in place. Where that cannot be, print `plain` when `step` changed or it is due again."""
        if self._redraws:
            width = shutil.get_terminal_size().columns
            up = f"\x1b[{self._num_drawn}A" if self._num_drawn else ""
            body = "".join(f"{line[: width - 1]}\n" for line in lines)
            self._stream.write(f"{up}\x1b[J{body}")
            self._stream.flush()
            self._num_drawn = len(lines)
            return
        now = time.monotonic()
        if step != self._step or now - self._printed_at >= PLAIN_INTERVAL_S:
            self._step, self._printed_at = step, now
            self._stream.write(f"{plain}\n")
            self._stream.flush()

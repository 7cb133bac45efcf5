"""The form that every benchmark shares: medians, bars, misses that stay visible, and a page written from the files."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from tests.bench import page
from tests.bench.harness import (
    ROOT,
    CannotMeasureError,
    Peer,
    Row,
    cpu_s,
    finish,
    load,
    row,
    rss_bytes,
    skipped,
)


def rows() -> list[Row]:
    peer = Peer(name="other", version="1.2", value=7.0)
    return [
        row("fast enough", "us", [3.0, 1.0, 2.0], target="t", bar=2.0),
        row("too slow", "us", [3.0, 3.0, 9.0], target="t", bar=2.0),
        row("enough of it", "req/s", [11.0], target="t", op=">=", bar=10.0, peer=peer),
        row("for the record", "MiB", [1.23456], target="t"),
        skipped("needs a GPU", "x", "no GPU here", target="t", op=">=", bar=1.0),
    ]


def test_a_row_is_the_median_of_its_repeats_against_its_bar() -> None:
    fast, slow, enough, record, absent = rows()
    assert (fast.value, fast.holds, fast.iqr, fast.repeats) == (2.0, True, 1.0, [3.0, 1.0, 2.0])
    assert (slow.value, slow.holds) == (3.0, False)
    assert (enough.value, enough.holds, enough.iqr) == (11.0, True, 0.0)
    assert (record.value, record.holds, record.bar) == (1.235, None, None)
    assert (absent.value, absent.holds, absent.skipped) == (None, None, "no GPU here")
    with pytest.raises(CannotMeasureError):
        row("nothing", "us", [], target="t")


def test_the_file_has_the_stated_form_and_comes_back(tmp_path: Path) -> None:
    written = finish("t", rows(), tmp_path)
    found = json.loads((tmp_path / "t.json").read_text())
    assert {"commit", "date", "host", "cores", "python"} <= found["meta"].keys()
    for entry in found["rows"]:
        form = ("name", "value", "unit", "op", "bar", "holds", "repeats", "iqr", "command", "peer", "skipped")
        assert tuple(entry) == form
    assert found["rows"][2]["peer"] == {"name": "other", "version": "1.2", "value": 7.0}
    assert load(tmp_path / "t.json") == written
    with pytest.raises(CannotMeasureError):
        load(tmp_path / "none.json")


def test_misses_stand_in_the_table_and_on_the_page(tmp_path: Path) -> None:
    result = finish("t", rows(), tmp_path)
    text = io.StringIO()
    page.show(result, Console(file=text, width=150))
    slow = next(line for line in text.getvalue().splitlines() if "too slow" in line)
    assert "MISS" in slow
    assert "<= 2" in slow
    assert "no GPU here" in text.getvalue()
    written = page.render([result])
    assert "| too slow | 3 us | 3 | <= 2 | MISS |" in written
    assert "| enough of it (other 1.2: 7) | 11 req/s | 0 | >= 10 | holds |" in written
    assert "| needs a GPU | - | - | >= 1 | no GPU here |" in written


def test_cpu_and_memory_of_a_process_are_read_from_proc() -> None:
    before = cpu_s(os.getpid())
    until = time.process_time() + 0.1
    while time.process_time() < until:
        pass
    assert 0.05 <= cpu_s(os.getpid()) - before <= 5
    assert rss_bytes(os.getpid()) > 10 * 1024 * 1024


def test_an_unknown_target_is_refused_with_the_list() -> None:
    command = [sys.executable, "-m", "tests.bench", "no_such_target"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "zmq_path" in done.stderr

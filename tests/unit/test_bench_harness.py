"""The form that every benchmark shares: medians, bars, misses that stay visible, and a page written from the files."""

from __future__ import annotations

import importlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from tests.bench import __main__ as bench
from tests.bench import page
from tests.bench.core import Script
from tests.bench.harness import (
    QUICK_RESULTS,
    RESULTS,
    ROOT,
    CannotMeasureError,
    Options,
    Peer,
    Result,
    Row,
    Surroundings,
    cpu_s,
    finish,
    load,
    look_around,
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
        skipped("needs a GPU", "x", "no GPU here", op=">=", bar=1.0),
        row("the worst of all", "ms", [3.0, 9.0, 1.0], target="t", bar=5.0, of_repeats=max),
    ]


def written(folder: Path, options: Options | None = None, target: str = "t") -> Result:
    surroundings = Surroundings(load_averages=(1.5, 0.5, 0.25), busy_cores=0.75)
    return finish(target, rows(), options or Options(), surroundings, 61.4, folder)


def test_a_row_is_the_median_of_its_repeats_against_its_bar() -> None:
    fast, slow, enough, record, absent, worst = rows()
    assert (fast.value, fast.holds, fast.iqr, fast.repeats) == (2.0, True, 1.0, [3.0, 1.0, 2.0])
    assert (slow.value, slow.holds) == (3.0, False)
    assert (enough.value, enough.holds, enough.iqr) == (11.0, True, 0.0)
    assert (record.value, record.holds, record.bar) == (1.235, None, None)
    assert (absent.value, absent.holds, absent.skipped) == (None, None, "no GPU here")
    assert (worst.value, worst.holds) == (9.0, False)
    with pytest.raises(CannotMeasureError):
        row("nothing", "us", [], target="t")


def test_the_file_has_the_stated_form_and_comes_back(tmp_path: Path) -> None:
    result = written(tmp_path)
    found = json.loads((tmp_path / "t.json").read_text())
    assert {"commit", "date", "host", "cores", "python"} <= found["meta"].keys()
    assert found["meta"]["quick"] is False
    assert [found["meta"][name] for name in ("load_average", "busy_cores", "wall_s")] == [1.5, 0.75, 61.4]
    for entry in found["rows"]:
        form = ("name", "value", "unit", "op", "bar", "holds", "repeats", "iqr", "command", "peer", "skipped")
        assert tuple(entry) == form
    assert found["rows"][2]["peer"] == {"name": "other", "version": "1.2", "value": 7.0}
    assert load(tmp_path / "t.json") == result
    with pytest.raises(CannotMeasureError):
        load(tmp_path / "none.json")


def test_misses_stand_in_the_table_and_on_the_page(tmp_path: Path) -> None:
    result = written(tmp_path)
    text = io.StringIO()
    page.show(result, Console(file=text, width=150))
    slow = next(line for line in text.getvalue().splitlines() if "too slow" in line)
    assert "MISS" in slow
    assert "<= 2" in slow
    assert "no GPU here" in text.getvalue()
    assert "QUICK" not in text.getvalue()
    rendered = page.render([result])
    assert "| too slow | 3 us | 3 | <= 2 | MISS |" in rendered
    assert "| enough of it (other 1.2: 7) | 11 req/s | 0 | >= 10 | holds |" in rendered
    assert "| needs a GPU | - | - | >= 1 | no GPU here |" in rendered
    assert "0.75 cores busy with other work" in rendered


@pytest.mark.parametrize(
    ("options", "command"),
    [
        (Options(), "make bench ARGS='t'"),
        (Options(repeats=3), "make bench ARGS='t --repeats 3'"),
        (Options(repeats=2, quick=True), "make bench ARGS='t --repeats 2 --quick'"),
    ],
)
def test_every_row_says_how_to_measure_it_again(options: Options, command: str, tmp_path: Path) -> None:
    assert {row.command for row in written(tmp_path, options).rows} == {command}


def test_quick_results_are_marked_lie_apart_and_are_never_written_to_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = Options(quick=True)
    assert (Options().folder, quick.folder) == (RESULTS, QUICK_RESULTS)
    assert QUICK_RESULTS != RESULTS
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    document = tmp_path / "performance.md"
    written(tmp_path, target="core")
    assert bench._write_docs(document, "spine") == 0
    assert "## core" in document.read_text()
    document.unlink()
    result = written(tmp_path, quick, "soak")
    assert result.meta.quick
    assert bench._write_docs(document, "spine") == 1
    assert "soak" in capsys.readouterr().err
    assert not document.exists()
    text = io.StringIO()
    page.show(result, Console(file=text, width=150))
    assert "QUICK" in text.getvalue()


def test_a_file_of_another_form_is_refused_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    (tmp_path / "core.json").write_text('{"meta": {"target": "core"}, "rows": []}')
    assert bench._write_docs(tmp_path / "performance.md", "spine") == 1
    assert not (tmp_path / "performance.md").exists()


def test_what_else_the_machine_does_is_seen() -> None:
    spinning = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.3)
        surroundings = look_around()
    finally:
        spinning.kill()
        spinning.wait()
    assert 0.2 <= surroundings.busy_cores <= (os.cpu_count() or 1) + 0.5
    assert len(surroundings.load_averages) == 3


def test_the_long_script_of_the_core_has_cancels_and_expiries_within_its_timed_part() -> None:
    script = Script(2_000, 600, mixed=True)
    assert script.num_requests - script.num_answered > 60
    assert 0.05 <= script.share_cancelled <= 0.2
    assert 0.05 <= script.share_expired <= 0.2
    assert script.replay() > 0  # it counts the expiries of the replay, too
    plain = Script(100, 200)
    assert (plain.share_cancelled, plain.share_expired, plain.num_answered) == (0, 0, plain.num_requests)


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


@pytest.mark.parametrize("name", bench.TARGETS)
def test_every_target_can_be_imported_and_measures(name: str) -> None:
    assert callable(importlib.import_module(f"tests.bench.{name}").measure)

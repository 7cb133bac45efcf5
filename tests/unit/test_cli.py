"""The command line: what it prints, how it exits, and that light commands stay light."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import msgspec
import pytest

from msd import cli
from msd.cli import check, live, status, terminal
from msd.cli.children import Child, ChildFailedError, Children
from msd.config import parse
from msd.errors import (
    EXIT_CONFIG,
    EXIT_INTERNAL,
    EXIT_INTERRUPTED,
    EXIT_NO,
    EXIT_OK,
    DaemonUnreachableError,
)
from msd.sim.report import Check
from msd.sim.world import run_world
from msd.wire import DaemonStatus, EngineReport, LedgerReport, ModeReport

ROOT = Path(__file__).resolve().parents[2]
GOOD = '[[model]]\nname = "m"\n[[engine]]\nname = "a"\nmodel = "m"\nkind = "sim"\n'


def msd(*arguments: str, environ: dict[str, str] | None = None, code: str = "") -> subprocess.CompletedProcess[str]:
    """Run msd as a person would; `code` runs before it, in the same process."""
    command = ["-c", f"{code}\nimport sys\nfrom msd.cli import main\nsys.exit(main())"] if code else ["-m", "msd"]
    return subprocess.run(
        [sys.executable, *command, *arguments],
        capture_output=True, text=True, timeout=60, cwd=ROOT, env={**os.environ, **(environ or {})},
    )  # fmt: skip


@pytest.fixture
def good(tmp_path: Path) -> Path:
    file = tmp_path / "good.toml"
    file.write_text(GOOD)
    return file


# --- check -----------------------------------------------------------------------------------------------------------


def test_check_prints_what_it_would_read_back(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(good)]) == EXIT_OK
    printed = capsys.readouterr().out
    assert "drain_s = 60.0" in printed
    again = parse(printed, file="printed", base_dir=good.parent)
    assert again == parse(GOOD, file="good", base_dir=good.parent)


def test_check_json(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--config", str(good), "--json"]) == EXIT_OK
    answer = json.loads(capsys.readouterr().out)
    assert (answer["ok"], answer["config"]["engine"][0]["name"]) == (True, "a")


def test_check_prints_every_error_as_a_link_and_exits_78(good: Path) -> None:
    good.write_text(GOOD + "[limits]\nmax_wating = 5\n[daemon]\ndrain_s = -1\n")
    done = msd("check", str(good))
    assert (done.returncode, done.stdout) == (EXIT_CONFIG, "")
    assert done.stderr.splitlines() == [
        f"{good}:8: limits.max_wating = 5: unknown key; did you mean `max_waiting`?",
        f"{good}:10: daemon.drain_s = -1: must be a number above 0, at most 86,400",
        f"msd: 2 errors in {good}",
    ]


def test_check_json_has_the_errors_on_stdout(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good.write_text(GOOD + "[limits]\nmax_wating = 5\n")
    assert cli.main(["check", str(good), "--json"]) == EXIT_CONFIG
    answer = json.loads(capsys.readouterr().out)
    assert answer["problems"] == [
        {
            "file": str(good), "line": 8, "field": "limits.max_wating", "value": "5",
            "message": "unknown key; did you mean `max_waiting`?",
        }
    ]  # fmt: skip
    assert cli.main(["check", "nowhere.toml", "--json"]) == EXIT_CONFIG
    assert json.loads(capsys.readouterr().out)["problems"][0]["line"] is None


def test_check_of_a_missing_file_says_who_named_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "nowhere.toml"]) == EXIT_CONFIG
    assert capsys.readouterr().err == "msd: nowhere.toml: there is no such file (it was named by --config)\n"


def test_serve_refuses_a_wrong_file_before_anything_starts(good: Path) -> None:
    good.write_text(GOOD + "[limits]\nmax_wating = 5\n")
    done = msd("serve", "--config", str(good))
    assert done.returncode == EXIT_CONFIG
    assert "did you mean `max_waiting`?" in done.stderr


def test_tables_of_engines_that_are_not_simulated_hold_no_simulation() -> None:
    config = parse(GOOD.replace('"sim"', '"noop"'), file="x", base_dir=Path())
    assert "[engine.sim]" not in check.as_toml(check.plain(config))


# --- light commands stay light ---------------------------------------------------------------------------------------

HEAVY = ("torch", "vllm", "transformers", "numpy", "rich", "zmq", "uvloop", "structlog", "msd.daemon", "loadgen")


def test_importing_the_command_line_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys, msd.cli; print(*sys.modules)"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    loaded = set(done.stdout.split())
    assert "msd.cli.demo" in loaded
    assert not loaded & set(HEAVY)


@pytest.mark.parametrize("command", [["version"], ["check", "config.toml"]])
def test_commands_that_must_not_load_torch_or_vllm(command: list[str]) -> None:
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('loaded:', *(m for m in ('torch', 'vllm', 'numpy') if m in sys.modules)))"
    )
    done = msd(*command, code=code)
    assert done.returncode == EXIT_OK, done.stderr
    assert done.stdout.splitlines()[-1].strip() == "loaded:"


PRODUCER_ONLY = (
    "import sys\n"
    "for name in ('tomlkit', 'rich', 'structlog', 'uvloop', 'numpy', 'aiohttp', 'tokenizers', 'vllm', 'torch'):\n"
    "    sys.modules[name] = None"
)


def test_a_producers_packages_are_enough_for_version() -> None:
    assert msd("version", code=PRODUCER_ONLY).returncode == EXIT_OK


def test_a_missing_package_is_named_with_its_remedy(good: Path) -> None:
    done = msd("check", str(good), code=PRODUCER_ONLY)
    assert done.returncode == EXIT_INTERNAL
    assert done.stderr == "msd: this command needs the package tomlkit: pip install '.[serve]' in msd's checkout\n"


def test_version_knows_vllm_without_importing_it() -> None:
    versions = json.loads(msd("version", "--json").stdout)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert versions["msd"] == project["version"]
    assert set(versions) == {"msd", "python", "msgspec", "pyzmq", "uvloop", "vllm", "torch"}


# --- behaviour that all commands share -------------------------------------------------------------------------------


def test_no_command_is_a_usage_error() -> None:
    done = msd()
    assert done.returncode == 2
    assert "serve" in done.stderr


def test_a_reader_that_has_seen_enough_is_no_error(good: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m msd check {good} | true; echo ${{PIPESTATUS[0]}}"],
        capture_output=True, text=True, timeout=60, cwd=ROOT,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_a_bug_is_a_traceback_and_exit_70(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> dict[str, str | None]:
        raise ZeroDivisionError

    monkeypatch.setattr("msd.cli.version.versions", broken)
    assert cli.main(["version"]) == EXIT_INTERNAL
    error = capsys.readouterr().err
    assert "ZeroDivisionError" in error
    assert "bug in msd" in error


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> dict[str, str | None]:
        raise KeyboardInterrupt

    monkeypatch.setattr("msd.cli.version.versions", interrupted)
    assert cli.main(["version"]) == EXIT_INTERRUPTED


def subparsers() -> dict[str, argparse.ArgumentParser]:
    (action,) = [a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(action.choices)


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """Its long options, and those of the words below it (`msd report profile`)."""
    options = {o for action in parser._actions for o in action.option_strings if o.startswith("--")} - {"--help"}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                options |= options_of(inner)
    return options


def test_the_reference_page_names_every_command_and_option_and_no_other() -> None:
    page = (ROOT / "docs" / "reference" / "cli.md").read_text()
    parts = re.split(r"^## msd ([\w-]+)$", page, flags=re.MULTILINE)
    documented = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert set(documented) == set(subparsers())
    for name, parser in subparsers().items():
        options = options_of(parser)
        assert set(re.findall(r"^\| `(--[a-z-]+)", documented[name], re.MULTILINE)) == options, name


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "x", ""])
def test_numbers_that_are_not_above_zero_are_usage_errors(value: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["sim", f"--requests={value}"])
    assert caught.value.code == 2


# --- sim -------------------------------------------------------------------------------------------------------------


def test_sim_gives_one_digest_under_any_hash_seed() -> None:
    runs = [
        msd("sim", "--seed", "3", "--requests", "150", "--json", environ={"PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    ]
    reports = [json.loads(run.stdout) for run in runs]
    assert [run.returncode for run in runs] == [EXIT_OK, EXIT_OK], runs[0].stderr
    assert (reports[0]["ok"], reports[0]["seed"], reports[0]["num_requests"]) == (True, 3, 150)
    for report in reports:
        # What the wall clock says is not part of the world.
        del report["wall_s"], report["speed"]
    assert reports[0] == reports[1]


def test_sim_for_a_person_ends_with_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sim", "--seed", "3", "--requests", "60"]) == EXIT_OK
    out = capsys.readouterr().out
    assert out.startswith("SIMULATED world, seed 3: 60 requests")
    assert re.search(r"^all checks hold, digest [0-9a-f]+$", out.splitlines()[-1])


def test_a_broken_check_is_exit_1_and_tells_the_story(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run_world(3, 20)
    broken = Check(name="conservation", num_checked=5, num_violations=1, violations=("one request is missing",))
    monkeypatch.setattr(
        "msd.sim.world.run_world",
        lambda seed, requests, weather: msgspec.structs.replace(
            report, checks=(broken,), last_events=("Submitted r1",)
        ),
    )
    assert cli.main(["sim"]) == EXIT_NO
    out = capsys.readouterr().out
    assert "CHECKS BROKEN" in out
    assert "conservation: one request is missing" in out
    assert "Submitted r1" in out


# --- terminal --------------------------------------------------------------------------------------------------------


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environ", "coloured"),
    [
        (Tty(), {"TERM": "xterm"}, True),
        (Tty(), {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (Tty(), {"TERM": "dumb"}, False),
        (io.StringIO(), {"TERM": "xterm"}, False),
    ],
)
def test_colours_only_where_they_are_wanted(stream: io.StringIO, environ: dict[str, str], coloured: bool) -> None:
    assert terminal.colours(stream, environ) is coloured


def test_tables_align_and_a_missing_figure_is_a_dash() -> None:
    lines = terminal.table(
        ["mode", "TTFT", "why"],
        [["bf16", terminal.number(12.34, "ms"), "x"], ["a", terminal.number(None, "ms"), ""]],
        left=(0, 2),
    )
    assert lines == ["mode     TTFT  why", "bf16  12.3 ms  x", "a           -"]


def test_a_step_is_redrawn_on_a_terminal_and_told_sparsely_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    tty, plain = Tty(), io.StringIO()
    for stream in (tty, plain):
        shown = live.Live(stream)
        for second in range(3):
            shown.draw([f"a {second} s", "b"], f"a {second} s; b", step="a")
        shown.draw(["done", "b"], "done; b", step="done")
    assert tty.getvalue().count("\x1b[2A\x1b[J") == 3
    assert plain.getvalue() == "a 0 s; b\ndone; b\n"


# --- status ----------------------------------------------------------------------------------------------------------

STATUS = DaemonStatus(
    server="msd/0.1.0",
    epoch="7f",
    pid=12,
    state="serving",
    uptime_s=75.0,
    simulated=True,
    policy="rules",
    requests={"submitted": 10, "delivered": 7, "rejected": 1, "aborted": 0, "failed": 0, "duplicates": 0, "pending": 2},
    errors={"queue_full": 1},
    num_waiting=1,
    num_running=1,
    engines=(
        EngineReport(engine="bf16", state="up", state_s=60, simulated=True, num_slots=16, num_running=1, start_s=2.0),
        EngineReport(engine="int8", state="backoff", state_s=3, last_error="it died\nlast line", num_starts=2),
    ),
    modes=(
        ModeReport(mode="bf16", num_decisions=8, reasons=(("rule 2: shared prefix", 5), ("rule 10: default", 3))),
        ModeReport(mode="int8"),
    ),
    energy=(
        LedgerReport(
            domain="sim:0", source="simulated", counter_mj=1_500, requests_mj=1_000, wasted_mj={"aborted": 200},
            idle_mj=250, unattributed_mj={"start": 10}, running_mj=30, open_mj=10,
        ),
    ),
)  # fmt: skip


def test_status_says_what_a_person_asks() -> None:
    text = "\n".join(status.render(STATUS))
    assert "SIMULATED" in text
    assert "serving for 1 min 15 s" in text
    assert "10 submitted = 7 delivered + 1 rejected + 0 aborted + 0 failed + 0 duplicates + 2 pending" in text
    assert "rule 2: shared prefix (5); rule 10: default (3)" in text
    assert "errors: queue_full 1" in text
    assert "int8: it died" in text
    assert "journal in memory only" in text


def test_status_says_where_engines_are_that_may_move() -> None:
    assert "residence" not in "\n".join(status.render(STATUS))
    engines = (
        EngineReport(engine="bf16", state="up", residence="resident"),
        EngineReport(engine="int8", state="up", residency="auto", residence="resident (leaving)"),
        EngineReport(engine="int4", state="asleep", residency="auto", residence="asleep"),
    )
    figures = {"num_switches": 3, "num_emergencies": 1, "num_moved_requests": 2, "transition_s": 4.4}
    lines = status.render(msgspec.structs.replace(STATUS, engines=engines, residency=figures))
    text = "\n".join(lines)
    assert next(line for line in lines if line.startswith("bf16")).count("resident (always)") == 1
    assert "resident (leaving)" in next(line for line in lines if line.startswith("int8"))
    assert "switches: 3 (1 of them emergencies), 4 s in transition, 2 requests moved" in text


def test_the_ledger_on_the_screen_adds_up_or_says_that_it_does_not() -> None:
    lines = status.energy_lines(STATUS.energy[0])
    joules = [float(match[1]) for line in lines if (match := re.search(r"([\d.]+) J$", line))]
    assert sum(joules[:-1]) == pytest.approx(joules[-1])
    assert joules[-1] == 1.5
    broken = LedgerReport(domain="gpu", source="counter", counter_mj=5, requests_mj=3)
    assert "do not add up" in status.energy_lines(broken)[-1]


def test_a_status_of_little_is_no_error() -> None:
    text = "\n".join(status.render(status.read({"server": "msd/9", "novelty": 1})))
    assert "energy: not measured" in text
    with pytest.raises(DaemonUnreachableError, match="cannot read"):
        status.read({"server": 5})


# --- children --------------------------------------------------------------------------------------------------------

SLEEPER = "import time; print('up', flush=True); time.sleep(60)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


def started(children: Children, tmp_path: Path, code: str) -> Child:
    child = children.start("child", ["-c", code], tmp_path / "log", os.environ)
    deadline = time.monotonic() + 20
    while child.last_lines() != ["up"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return child


def test_children_end_with_the_block(tmp_path: Path) -> None:
    with Children() as children:
        child = started(children, tmp_path, SLEEPER)
        assert child.exit_code() is None
    assert child.exit_code() == -signal.SIGTERM


def test_a_stubborn_child_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msd.cli.children.SECOND_SIGTERM_S", 0.1)
    monkeypatch.setattr("msd.cli.children.KILL_S", 0.1)
    with Children() as children:
        child = started(children, tmp_path, STUBBORN)
    assert child.exit_code() == -signal.SIGKILL


def test_a_child_that_ended_is_told_with_its_last_lines(tmp_path: Path) -> None:
    with Children() as children:
        child = children.start(
            "daemon", ["-c", "print('no such device'); raise SystemExit(75)"], tmp_path / "l", os.environ
        )
        while child.exit_code() is None:
            time.sleep(0.02)
        with pytest.raises(ChildFailedError, match=r"(?s)the daemon ended with exit code 75.*no such device"):
            child.check()


def test_a_child_outlives_not_even_a_killed_parent(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\nfrom pathlib import Path\nfrom msd.cli.children import Children\n"
        f"child = Children().start('c', ['-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'],"
        f" Path({str(tmp_path / 'log')!r}), os.environ, tied=True)\n"
        "while not child.last_lines(): time.sleep(0.02)\n"
        "print(child.last_lines()[0], flush=True)\ntime.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait(10)
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"

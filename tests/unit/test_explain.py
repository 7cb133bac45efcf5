"""`msd explain` and `msd decisions`: what they say, where they look, and what they make of a log that is damaged."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from msd import cli, decisions
from msd.cli.decisions import predictions, seconds
from msd.decisions import Decided, Episode, Observed, Opened, Record, encode
from msd.domain import MASK_WORDS, Mask, Slo, reasons_against
from msd.errors import EXIT_CONFIG, EXIT_JOURNAL, EXIT_NO, EXIT_OK
from tests.unit.test_decision_log import MODES, a_decision, an_observation

NOW_US = time.time_ns() // 1_000


def decided(number: int, *, age_s: float = 60.0, client_request_id: str = "c", **decision: Any) -> Decided:
    return Decided(
        t_unix_us=NOW_US - int(age_s * 1e6),
        tenant="t",
        client_request_id=client_request_id,
        since_receipt_us=4_000,
        slo=Slo(),
        decision=a_decision(number, **decision),
    )


def observed(number: int, **observation: Any) -> Observed:
    seen = structs.replace(an_observation(number), **observation)
    return Observed(t_unix_us=NOW_US, request_id=f"r{number}", observation=seen)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A log: r1 and r2 were answered, r2 in its second attempt, r3 was not; r4 is a day old."""
    made = tmp_path / "decisions"
    made.mkdir()
    second = a_decision(2, decision_id="r2.2", attempt=2, mode="slow")
    records: list[Record] = [
        Opened(t_unix_us=NOW_US - 90_000_000_000, server="s", policy="cost", modes=MODES),
        decided(4, age_s=86_000),
        decided(1, client_request_id="order 17"),
        observed(1),
        decided(2),
        structs.replace(decided(2), decision=second),
        observed(2, decision_id="r2.2"),
        decided(3, propensity=0.25),
    ]
    (made / "decisions-00000001.jsonl").write_bytes(b"".join(encode(record) for record in records))
    return made


def run(*arguments: str) -> int:
    return cli.main(arguments)


# --- explain ---------------------------------------------------------------------------------------------------------


def test_explain_shows_what_was_known_the_candidates_the_choice_and_the_errors(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("explain", "r1", "--log", str(folder)) == EXIT_OK
    said = capsys.readouterr().out
    for words in (
        "request r1, attempt 1 (client's id order 17, tenant t)",
        "by policy cost, 4.0 ms after receipt",
        "100 tokens, likely shares a prefix",
        "32 tokens expected",
        "no deadline, waited 4.0 ms",
        "view 20 ms old",
        "300 W below its limit",
        "not certified for this task, or below the quality floor; no KV memory left for it now",
        "chosen: fast, because: costs least",
        "propensity 1: not drawn",
        "it ended with stop after 104.0 ms from receipt to the last token; its SLOs were kept",
        "energy 9.00 J = 4.00 J of its own",
    ):
        assert words in said, said
    rows = {line.split(",")[0].strip(): line.split()[-3:] for line in said.splitlines() if line.endswith("%")}
    # Measured from receipt: 4 ms had passed at the decision, from which predictions count.
    assert rows["TTFT"] == ["10.00", "20.00", "-50%"]
    assert rows["E2EL"] == ["72.00", "100.00", "-28%"]
    assert rows["TPOT"] == ["2.00", "2.50", "-20%"]
    assert rows["energy"] == ["5.00", "4.00", "+25%"]
    assert rows["cached"] == ["96", "80", "+20%"]


def test_explain_takes_the_clients_id_and_shows_every_attempt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("explain", "order 17", "--log", str(folder)) == EXIT_OK
    assert "its SLOs were kept" in capsys.readouterr().out
    assert run("explain", "r2", "--log", str(folder)) == EXIT_OK
    first, second = capsys.readouterr().out.split("request r2, attempt ")[1:]
    assert "nothing was measured" in first
    assert "chosen: slow" in second
    assert "SLOs were kept" in second


def test_explain_says_what_was_drawn_and_what_was_not_measured(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("explain", "r3", "--log", str(folder)) == EXIT_OK
    said = capsys.readouterr().out
    assert "propensity 0.25: drawn with this probability" in said
    assert "nothing was measured: it has not ended" in said


def test_explain_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("explain", "r1", "--json", "--log", str(folder)) == EXIT_OK
    [attempt] = json.loads(capsys.readouterr().out)["attempts"]
    assert attempt["decided"]["decision"]["features"]["num_prompt_tokens"] == 100
    assert attempt["observed"]["observation"]["energy"]["energy_mj"] == 9_000
    assert attempt["why_not"] == {"slow": [MASK_WORDS[Mask.QUALITY], MASK_WORDS[Mask.MEMORY]]}
    errors = {p["name"]: p["error"] for p in attempt["predictions"]}
    assert errors["TTFT"] == pytest.approx(-0.5)


def test_a_request_that_the_log_does_not_know(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("explain", "r9", "--log", str(folder)) == EXIT_NO
    said = capsys.readouterr().err
    assert f"no decision about request 'r9' in {folder}" in said
    # A part of an id, or of another field, is not the request.
    assert run("explain", "cost", "--log", str(folder)) == EXIT_NO


def test_every_mask_has_its_words() -> None:
    assert set(MASK_WORDS) == set(Mask)
    assert reasons_against(0) == []
    assert len(reasons_against(sum(Mask))) == len(Mask)


def test_nothing_predicted_and_nothing_measured_has_no_error() -> None:
    figures = predictions(Episode(decided=decided(1, mode="slow"), observed=observed(1, tpot_ms=0.0, energy=None)))
    by_name = {figure.name: figure for figure in figures}
    assert (by_name["TPOT"].measured, by_name["TPOT"].error) == (None, None), "one token has no time between tokens"
    assert (by_name["energy"].predicted, by_name["energy"].measured, by_name["energy"].error) == (None, None, None)


# --- decisions -------------------------------------------------------------------------------------------------------


def test_decisions_lists_what_is_recent_and_sums_up_by_mode(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("decisions", "--log", str(folder)) == EXIT_OK
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines()]
    listed = [line[1] for line in lines if len(line) > 1 and line[1].startswith("r") and line[1][1:].isdigit()]
    assert sorted(listed) == ["r1", "r2", "r2", "r3"]
    fast = next(line for line in lines if line and line[0] == "fast")
    assert fast[1:4] == ["3", "75%", "1"]
    assert fast[4] == "50%"
    assert run("decisions", "--since", "2d", "--log", str(folder)) == EXIT_OK
    assert " r4 " in capsys.readouterr().out
    assert run("decisions", "--last", "2", "--log", str(folder)) == EXIT_OK
    assert "the newest 2 of 4 decisions" in capsys.readouterr().out


def test_decisions_of_one_mode_as_json_lines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("decisions", "--mode", "slow", "--json", "--log", str(folder)) == EXIT_OK
    [line] = capsys.readouterr().out.splitlines()
    episode = json.loads(line)
    assert episode["decided"]["decision"]["decision_id"] == "r2.2"
    assert episode["observed"]["observation"]["ttft_ms"] == 24.0
    assert run("decisions", "--mode", "none", "--log", str(folder)) == EXIT_NO
    assert "no decision for mode 'none'" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "value"), [("30", 30), ("30s", 30), ("15m", 900), ("1h", 3_600), ("1.5d", 129_600)])
def test_spans_of_time(text: str, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "h", "1w", "nan", "0", "inf"])
def test_what_is_no_span_of_time_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("decisions", "--since", text)
    assert "is not a time such as 30s, 15m, 1h or 2d" in capsys.readouterr().err


# --- where the log is, and whether it holds --------------------------------------------------------------------------


def test_the_log_is_where_the_configuration_says(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config.toml"
    engine = '[[model]]\nname = "m"\n[[engine]]\nname = "fast"\nmodel = "m"\nkind = "sim"\n'
    config.write_text(f'{engine}[daemon]\nstate_dir = "."\n')
    assert run("explain", "r1", "--config", str(config)) == EXIT_OK
    assert run("decisions", "--log", str(tmp_path)) == EXIT_OK, "the folder above it will do"
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path))
    config.write_text(engine)
    assert run("explain", "r1", "--config", str(config)) == EXIT_OK
    capsys.readouterr()


def test_where_there_is_no_log_every_place_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MSD_CONFIG", raising=False)
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(decisions, "SYSTEM_STATE_DIR", tmp_path / "system")
    assert run("decisions") == EXIT_NO
    said = capsys.readouterr().err
    assert f"looked in {tmp_path}/state/msd/decisions, {tmp_path}/system/decisions" in said
    assert "--log" in said
    assert run("explain", "r1", "--config", "nowhere.toml") == EXIT_CONFIG


def test_a_damaged_line_stops_unless_it_is_to_be_skipped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "decisions-00000001.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"order 17"', b'"order 18"'))
    for command in (("explain", "r3"), ("decisions",)):
        assert run(*command, "--log", str(folder)) == EXIT_JOURNAL
        assert f"{file}:3: its checksum does not fit" in capsys.readouterr().err
        assert run(*command, "--log", str(folder), "--skip-corrupt") == EXIT_OK
        said = capsys.readouterr()
        assert "1 damaged line left out" in said.err
        assert "r3" in said.out

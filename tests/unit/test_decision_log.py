"""The decision log: what is written is read back; crashes, damage, full disks, rotation, and what it costs the loop."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from msgspec import structs

from msd import decisions
from msd.decisions import (
    CorruptDecisionLogError,
    Decided,
    Observed,
    Opened,
    Record,
    UnreadableDecisionLogError,
    encode,
    episodes,
    files,
    read,
)
from msd.domain import (
    Candidate,
    Decision,
    Energy,
    Features,
    GpuView,
    Mode,
    Observation,
    Request,
    Slo,
)
from msd.journal import decision_log
from msd.journal.decision_log import DecisionLog

MODES = (Mode(name="fast", engine="fast", model="toy"), Mode(name="slow", engine="slow", model="toy"))


def a_request(number: int = 1, client_request_id: str = "c") -> Request:
    return Request(
        request_id=f"r{number}",
        client_request_id=client_request_id,
        tenant="t",
        content_hash=b"h",
        received_us=1_000,
        num_prompt_tokens=100,
        max_tokens=64,
        slo=Slo(ttft_ms=50.0),
    )


def a_decision(number: int = 1, *, mode: str = "fast", num_modes: int = 2, **more: Any) -> Decision:
    features = Features(100, 32, 64, True, "sort", "standard", 1, 2, 1.5, 0.25, 4_000, None, 20_000, 50, 12.5, 300.0)
    candidates = [
        Candidate("fast", 0, 10.0, 2.0, 72.0, 5_000, 1, 3, 0.0, 1.5, 96),
        *[Candidate(f"slow{i or ''}", 32 | 8, 20.0, 4.0, 144.0, None, 0, 4) for i in range(num_modes - 1)],
    ]
    fields: dict[str, Any] = {
        "decision_id": f"r{number}.1", "request_id": f"r{number}", "attempt": 1, "t_us": 5_000, "policy": "cost",
        "mode": mode, "engine": mode, "reason": "costs least", "propensity": 1.0, "features": features,
        "candidates": tuple(candidates), "view": GpuView(source="nvml", t_us=4_000, power_instant_w=400.0),
    }  # fmt: skip
    return Decision(**(fields | more))


def an_observation(number: int = 1) -> Observation:
    energy = Energy(energy_mj=9_000, dynamic_mj=4_000, static_mj=5_000, source="counter", settled=True)
    return Observation(
        decision_id=f"r{number}.1", mode="fast", finish_reason="stop", ttft_ms=24.0, tpot_ms=2.5, e2el_ms=104.0,
        num_completion_tokens=33, energy=energy, slo_met=True, num_cached_tokens=80,
    )  # fmt: skip


def a_log(folder: Path, max_bytes: int = 10**8) -> DecisionLog:
    return DecisionLog(folder, max_bytes, server="msd/test", policy="cost", modes=MODES)


def write(folder: Path, num: int, *, max_bytes: int = 10**8, first: int = 0) -> DecisionLog:
    """One run of a daemon that decides and observes `num` times."""
    log = a_log(folder, max_bytes)
    log.start()
    for number in range(first, first + num):
        log.decided(a_request(number), a_decision(number))
        log.observed(a_decision(number), an_observation(number))
    log.close()
    return log


def ids(records: list[Record]) -> list[str]:
    return [record.decision.request_id for record in records if isinstance(record, Decided)]


# --- what is written is read back ------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_whole(tmp_path: Path) -> None:
    log = a_log(tmp_path)
    log.start()
    now_us = time.monotonic_ns() // 1_000
    decision = a_decision(0, t_us=now_us)
    log.decided(structs.replace(a_request(0), received_us=now_us - 4_000), decision)
    log.observed(decision, an_observation(0))
    log.close()
    assert (log.num_written, log.num_dropped) == (2, 0)
    opened, decided, observed = read(tmp_path / "decisions")
    assert isinstance(opened, Opened)
    assert (opened.server, opened.policy, opened.modes) == ("msd/test", "cost", MODES)
    assert isinstance(decided, Decided)
    assert decided.decision == decision
    assert (decided.tenant, decided.client_request_id, decided.slo) == ("t", "c", Slo(ttft_ms=50.0))
    assert decided.since_receipt_us == 4_000
    assert decided.t_unix_us == pytest.approx(time.time_ns() // 1_000, abs=2e6)
    assert isinstance(observed, Observed)
    assert (observed.request_id, observed.observation) == ("r0", an_observation(0))


def test_a_later_run_writes_a_file_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, 2)
    write(tmp_path, 2, first=2)
    assert [file.name for file in files(tmp_path / "decisions")] == [
        "decisions-00000001.jsonl", "decisions-00000002.jsonl",
    ]  # fmt: skip
    assert ids(list(read(tmp_path / "decisions"))) == ["r0", "r1", "r2", "r3"]


def test_two_daemons_may_keep_their_logs_in_one_folder(tmp_path: Path) -> None:
    logs = [a_log(tmp_path), a_log(tmp_path)]
    for log in logs:
        log.start()
    for number in range(20):
        logs[number % 2].decided(a_request(number), a_decision(number))
        time.sleep(0.005)
    for log in logs:
        log.close()
    assert sorted(ids(list(read(tmp_path / "decisions")))) == sorted(f"r{number}" for number in range(20))


def test_no_records_older_than_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "decisions"
    folder.mkdir()
    old = Decided(
        t_unix_us=1_000_000, tenant="t", client_request_id="c", since_receipt_us=0, slo=Slo(), decision=a_decision(1)
    )
    new = structs.replace(old, t_unix_us=9_000_000, decision=a_decision(2))
    opened = Opened(t_unix_us=1, server="s", policy="p", modes=MODES)
    file = folder / "decisions-00000001.jsonl"
    file.write_bytes(b"".join(encode(record) for record in (opened, old, new)))
    assert list(read(folder, since=5.0)) == [opened, new], "a file's head is always given"
    os.utime(file, (4.0, 4.0))
    assert list(read(folder, since=5.0)) == [], "nothing was written to it since then"


def test_decisions_are_joined_with_what_came_of_them(tmp_path: Path) -> None:
    log = a_log(tmp_path)
    log.start()
    for number in (1, 2, 3):
        log.decided(a_request(number), a_decision(number))
    for number in (3, 1, 9):
        log.observed(a_decision(number), an_observation(number))
    log.close()
    joined = list(episodes(read(tmp_path / "decisions")))
    assert [(e.decided.decision.request_id, e.observed is not None) for e in joined] == [
        ("r3", True), ("r1", True), ("r2", False),
    ]  # fmt: skip


def test_lines_without_what_is_looked_for_are_left_out(tmp_path: Path) -> None:
    log = a_log(tmp_path)
    log.start()
    odd = 'a "quoted" ü\\name'
    log.decided(a_request(1, odd), a_decision(1))
    log.decided(a_request(2), a_decision(2))
    log.close()
    assert ids(list(read(tmp_path / "decisions", containing=decisions.needle(odd)))) == ["r1"]


# --- crashes and damage ----------------------------------------------------------------------------------------------


def test_a_last_line_torn_by_a_crash_is_skipped(tmp_path: Path) -> None:
    write(tmp_path, 3)
    [file] = files(tmp_path / "decisions")
    whole = file.read_bytes()
    assert len(ids(list(read(file.parent)))) == 3
    for cut in range(1, len(whole.splitlines()[-1]) + 1, 7):
        file.write_bytes(whole[:-cut])
        assert len(list(read(file.parent))) == 6
    write(tmp_path, 1, first=7)
    assert ids(list(read(file.parent)))[-1] == "r7"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda line: line.replace(b'"fast"', b'"slow"'), "checksum"),
        (lambda line: line.replace(b'"crc":"', b'"crc":"0', 1), "not a line"),
        (lambda line: b"\n", "not a line"),
        (lambda line: b"\x00" * 20 + b"\n", "not a line"),
        (lambda line: line[:300] + b"\n", "not a line"),
        (lambda line: line.replace(b'{"v":1', b'{"v":2'), "version 2; this msd reads version 1"),
        (lambda line: b'{"v":1,"crc":"%08x","record":{"type":"eaten"}}\n' % 0xC8C0B5BE, "checksum"),
    ],
)  # fmt: skip
def test_a_damaged_line_is_an_error_that_says_where(tmp_path: Path, damage: Any, reason: str) -> None:
    write(tmp_path, 3)
    [file] = files(tmp_path / "decisions")
    lines = file.read_bytes().splitlines(keepends=True)
    lines[3] = damage(lines[3])
    file.write_bytes(b"".join(lines))
    with pytest.raises(CorruptDecisionLogError, match=reason) as caught:
        list(read(file.parent))
    assert (caught.value.file, caught.value.line) == (file, 4)
    assert str(caught.value).startswith(f"{file}:4: ")
    assert "--skip-corrupt" in str(caught.value)
    skipped: list[CorruptDecisionLogError] = []
    assert len(list(read(file.parent, on_corrupt=skipped.append))) == 6
    assert [error.line for error in skipped] == [4]


def test_a_record_of_a_kind_that_nobody_knows_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "decisions"
    folder.mkdir()
    body = b'{"type":"eaten"}'
    line = b'{"v":1,"crc":"%08x","record":%s}\n' % (crc32(body), body)
    (folder / "decisions-00000001.jsonl").write_bytes(line)
    with pytest.raises(CorruptDecisionLogError, match=r"not a record of this log.*eaten"):
        list(read(folder))


def test_no_folder_is_an_empty_log_and_other_files_are_not_looked_at(tmp_path: Path) -> None:
    assert list(read(tmp_path / "nowhere")) == []
    write(tmp_path, 1)
    (tmp_path / "decisions" / "notes.txt").write_text("mine")
    assert len(list(read(tmp_path / "decisions"))) == 3


def test_a_file_that_cannot_be_read_is_an_error_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "decisions" / "decisions-00000001.jsonl").mkdir(parents=True)
    with pytest.raises(UnreadableDecisionLogError, match=r"decisions-00000001\.jsonl: cannot be read"):
        list(read(tmp_path / "decisions"))


# --- bounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_bytes", [65_536, 200_000, 2_000_000])
def test_the_log_never_outgrows_its_bound_and_keeps_the_newest(tmp_path: Path, max_bytes: int) -> None:
    num = max_bytes // 500
    log = a_log(tmp_path, max_bytes)
    log.start()
    most = 0
    for number in range(num):
        log.decided(a_request(number), a_decision(number))
        if number % 100 == 0:
            time.sleep(0.01)
            most = max(most, sum(file.stat().st_size for file in files(log.folder)))
    log.close()
    total = sum(file.stat().st_size for file in files(log.folder))
    assert max(most, total) <= max_bytes
    assert total > max_bytes // 2
    found = list(read(log.folder))
    assert ids(found) == [f"r{number}" for number in range(num - len(ids(found)), num)]
    heads = [record for record in found if isinstance(record, Opened)]
    assert len(heads) == len(files(log.folder)), "each file can be read alone"


def test_a_record_larger_than_a_file_is_written_all_the_same(tmp_path: Path) -> None:
    log = a_log(tmp_path, 65_536)
    log.start()
    for number in range(10):
        log.decided(a_request(number), a_decision(number, num_modes=64))
    log.close()
    assert ids(list(read(log.folder)))[-1] == "r9"
    assert sum(file.stat().st_size for file in files(log.folder)) <= 65_536


def test_a_queue_that_is_full_drops_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision_log, "MAX_QUEUED", 10)
    log = a_log(tmp_path)  # its thread does not run yet
    for number in range(15):
        log.decided(a_request(number), a_decision(number))
        log.observed(a_decision(number), an_observation(number))
    assert log.num_dropped == 20
    log.start()
    log.close()
    assert ids(list(read(log.folder))) == ["r0", "r1", "r2", "r3", "r4"]


# --- disks that fail -------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made_is_no_failure_of_the_daemon(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "state").write_text("a file is in the way")
    log = write(tmp_path / "state", 50)
    assert (log.num_written, log.num_dropped) == (0, 100)
    said = capsys.readouterr()
    assert (said.out + said.err).count("decision_log_not_written") == 1


def test_a_full_disk_drops_whole_lines_and_the_log_goes_on_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The limit on file sizes makes the kernel take half a write and refuse the rest, as a full disk does."""
    log = a_log(tmp_path)
    log.start()
    log.decided(a_request(1), a_decision(1))
    while not log.num_written:
        time.sleep(0.01)
    [file] = files(log.folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 700, limits[1]))
    try:
        for number in range(2, 50):
            log.decided(a_request(number), a_decision(number))
        while log.num_dropped < 48:
            time.sleep(0.01)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.decided(a_request(50), a_decision(50))
    log.close()
    assert ids(list(read(log.folder))) == ["r1", "r50"]
    assert (log.num_written, log.num_dropped) == (2, 48)
    said = capsys.readouterr()
    assert (said.out + said.err).count("decision_log_not_written") == 1
    assert (said.out + said.err).count("decision_log_written_again") == 1


def test_a_disk_that_hangs_keeps_neither_the_loop_nor_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision_log, "CLOSE_LIMIT_S", 0.2)
    real_write, hangs = os.write, [True]

    def write_slowly(fd: int, data: bytes) -> int:
        while hangs[0]:
            time.sleep(0.01)
        return real_write(fd, data)

    monkeypatch.setattr(os, "write", write_slowly)
    log = a_log(tmp_path)
    log.start()
    decided = [(a_request(number), a_decision(number)) for number in range(1_000)]
    began = time.monotonic()
    for request, decision in decided:
        log.decided(request, decision)
    assert time.monotonic() - began < 0.2
    log.close()
    assert time.monotonic() - began < 1.0
    hangs[0] = False
    log._thread.join(5)

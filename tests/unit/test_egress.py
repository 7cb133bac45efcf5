"""Egress without sockets or loops: who is sent what, when, and what a slow reader costs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from msd import wire
from msd.config import LimitsConfig
from msd.domain import Chunk, Energy, FinishReason, Outcome, Request, Result
from msd.egress import COALESCE_S, MAX_READERS, Egress


class Turns:
    """Timers whose turns the test takes."""

    def __init__(self) -> None:
        self.due: list[tuple[float, Callable[[], None]]] = []

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.due.append((0.0, callback))

    def call_later(self, delay: float, callback: Callable[[], None]) -> None:
        self.due.append((delay, callback))

    def take(self) -> None:
        due, self.due = self.due, []
        for _, callback in due:
            callback()


class Reader:
    """A session with `credit` Deltas; None: any number."""

    def __init__(self, credit: int | None = None, tenant: str = "t") -> None:
        self.tenant = tenant
        self.closed = False
        self.submit_credit = 100
        self.credit = credit
        self.received: list[wire.ServerMessage] = []
        self.num_refused = 0

    def send(self, message: wire.ServerMessage) -> None:
        if not self.closed:
            self.received.append(message)

    def send_delta(self, delta: wire.Delta) -> bool:
        if self.closed or self.credit == 0:
            self.num_refused += 1
            return False
        if self.credit is not None:
            self.credit -= 1
        self.received.append(delta)
        return True

    @property
    def deltas(self) -> list[wire.Delta]:
        return [message for message in self.received if isinstance(message, wire.Delta)]

    @property
    def text(self) -> str:
        """What a client that follows the rules has joined."""
        joined: list[str] = []
        num_tokens = 0
        for message in self.received:
            match message:
                case wire.Restarted():
                    joined, num_tokens = [], 0
                case wire.Delta():
                    assert message.index == num_tokens, "a gap or a repeat"
                    joined.append(message.text)
                    num_tokens += len(message.token_ids)
                case wire.Done(text=str() as text):
                    joined = [text]
                case _:
                    pass
        return "".join(joined)

    def kinds(self) -> list[str]:
        return [type(message).__name__ for message in self.received]


def a_request(request_id: str = "r1", *, stream: bool = True, tenant: str = "t") -> Request:
    return Request(
        request_id=request_id,
        client_request_id=f"c-{request_id}",
        tenant=tenant,
        content_hash=b"",
        received_us=0,
        num_prompt_tokens=3,
        max_tokens=64,
        stream=stream,
    )


def a_result(
    egress: Egress,
    request: Request,
    *,
    attempt: int = 1,
    finish_reason: FinishReason | None = "stop",
    error_code: str = "",
) -> Result:
    text, token_ids = egress.output(request.request_id)
    outcome = Outcome(
        request_id=request.request_id,
        attempt=attempt,
        finish_reason=finish_reason,
        error_code=error_code,
        message="why" if error_code else "",
        mode="m",
        num_completion_tokens=len(token_ids),
    )
    return Result(
        outcome=outcome,
        client_request_id=request.client_request_id,
        tenant=request.tenant,
        text=text,
        token_ids=token_ids,
    )


def finish(egress: Egress, request: Request, *, attempt: int = 1) -> None:
    egress.ended(a_result(egress, request, attempt=attempt))
    egress.deliver(request.request_id, 1)


def tokens(*ids: int) -> Chunk:
    return Chunk(token_ids=ids, text="".join(f"{i} " for i in ids))


def opened(
    limits: LimitsConfig | None = None, *, stream: bool = True, credit: int | None = None
) -> tuple[Egress, Turns, Reader, Request]:
    """An egress with one running request and its reader."""
    turns = Turns()
    egress = Egress(turns, limits or LimitsConfig())
    reader = Reader(credit)
    request = a_request(stream=stream)
    egress.register(request, reader)
    egress.ack("r1", 1, False)
    egress.started("r1", "m", "d", 1, 1_500)
    return egress, turns, reader, request


def test_the_first_token_goes_out_at_once_and_later_ones_with_the_turn() -> None:
    egress, turns, reader, request = opened()
    assert egress.chunk("r1", 1, tokens(0))
    assert [delta.token_ids for delta in reader.deltas] == [(0,)]
    assert not egress.chunk("r1", 1, tokens(1))
    assert not egress.chunk("r1", 1, tokens(2, 3))
    assert len(reader.deltas) == 1
    assert len(turns.due) == 1, "one flush for all"
    turns.take()
    assert reader.deltas[1] == wire.Delta(request_id="r1", attempt=1, index=1, token_ids=(1, 2, 3), text="1 2 3 ")
    egress.chunk("r1", 1, tokens(4))
    finish(egress, request)
    assert reader.text == "0 1 2 3 4 "
    assert reader.kinds() == ["Ack", "Started", "Delta", "Delta", "Delta", "Done"]
    turns.take()
    assert egress.num_open == 0


def test_done_says_what_the_result_says() -> None:
    egress, _, reader, request = opened()
    egress.chunk("r1", 1, tokens(0))
    result = a_result(egress, request)
    energy = Energy(energy_mj=5, dynamic_mj=3, static_mj=2, source="simulated", settled=False)
    outcome = structs.replace(result.outcome, energy=energy, num_prompt_tokens=3)
    egress.ended(Result(outcome=outcome, client_request_id="c-r1", tenant="t", text=result.text))
    egress.deliver("r1", 1)
    done = reader.received[-1]
    assert isinstance(done, wire.Done)
    assert (done.text, done.token_ids, done.detached) == (None, None, False)
    assert done.energy == wire.EnergyFields(energy_mj=5, dynamic_mj=3, static_mj=2, source="simulated", settled=False)
    assert done.usage == wire.Usage(prompt=3, cached=0, completion=1)
    assert isinstance(reader.received[1], wire.Started)
    assert reader.received[1].waited_ms == 1.5


def test_a_request_without_stream_gets_its_text_with_done_and_nothing_before() -> None:
    egress, turns, reader, request = opened(stream=False)
    egress.chunk("r1", 1, tokens(0))
    egress.chunk("r1", 1, tokens(1))
    assert not turns.due
    finish(egress, request)
    assert reader.kinds() == ["Ack", "Started", "Done"]
    assert reader.text == "0 1 "
    assert not reader.received[-1].detached  # type: ignore[union-attr]


def test_without_credit_tokens_wait_in_one_pending_delta() -> None:
    egress, turns, reader, _ = opened(credit=1)
    for i in range(10):
        egress.chunk("r1", 1, tokens(i))
        turns.take()
    assert [delta.token_ids for delta in reader.deltas] == [(0,)]
    assert reader.num_refused == 1, "it is asked again only when it resumes"
    reader.credit = 1
    egress.resume(reader)
    assert reader.deltas[1].token_ids == tuple(range(1, 10))
    assert reader.deltas[1].text == "".join(f"{i} " for i in range(1, 10))


def test_little_credit_goes_round() -> None:
    turns = Turns()
    egress = Egress(turns, LimitsConfig())
    reader = Reader(credit=0)
    for name in "abc":
        egress.register(a_request(name), reader)
        egress.started(name, "m", "d", 1, 0)
        egress.chunk(name, 1, tokens(0))
    for n in range(1, 7):
        for name in "abc":
            egress.chunk(name, 1, tokens(n))
        turns.take()
        reader.credit = 1
        egress.resume(reader)
    assert [delta.request_id for delta in reader.deltas] == ["a", "b", "c"] * 2


def test_done_does_not_wait_for_credit() -> None:
    egress, turns, reader, request = opened(credit=1)
    for i in range(3):
        egress.chunk("r1", 1, tokens(i))
        turns.take()
    finish(egress, request)
    done = reader.received[-1]
    assert isinstance(done, wire.Done)
    assert (done.detached, done.text, done.token_ids) == (True, "0 1 2 ", (0, 1, 2))


def test_a_reader_too_far_behind_is_detached_and_costs_nothing_more() -> None:
    egress, turns, reader, request = opened(LimitsConfig(pending_delta_bytes=100), credit=1)
    egress.chunk("r1", 1, tokens(0))
    for i in range(1, 50):
        egress.chunk("r1", 1, tokens(i))
        turns.take()
    assert egress.num_detached == 1
    reader.credit = 100
    egress.resume(reader)
    assert len(reader.deltas) == 1
    finish(egress, request)
    assert reader.text == "".join(f"{i} " for i in range(50))
    assert reader.received[-1].detached  # type: ignore[union-attr]


def test_a_chunk_above_the_bound_is_still_sent_to_a_reader_that_takes_it() -> None:
    egress, _, reader, request = opened(LimitsConfig(pending_delta_bytes=100))
    egress.chunk("r1", 1, tokens(*range(100)))
    egress.chunk("r1", 1, tokens(*range(100, 200)))
    assert egress.num_detached == 0
    finish(egress, request)
    assert reader.text == "".join(f"{i} " for i in range(200))


def test_the_bound_of_a_session_counts_all_its_streams() -> None:
    turns = Turns()
    egress = Egress(turns, LimitsConfig(session_delta_bytes=200))
    reader = Reader(credit=0)
    for n in range(10):
        egress.register(a_request(f"r{n}"), reader)
        egress.started(f"r{n}", "m", "d", 1, 0)
        egress.chunk(f"r{n}", 1, tokens(*range(5)))
    assert 0 < egress.num_detached < 10


def test_a_restart_forgets_what_was_generated_and_tells_those_who_saw_it() -> None:
    egress, turns, reader, request = opened()
    blind = Reader(credit=0)
    egress.follow(blind, "r1", 0, 0)
    egress.chunk("r1", 1, tokens(7, 8))
    egress.restart("r1", 2, "engine_lost")
    assert egress.output("r1") == ("", ())
    egress.chunk("r1", 1, tokens(9))
    assert egress.output("r1") == ("", ()), "a late chunk of the lost attempt"
    egress.started("r1", "m", "d2", 2, 0)
    egress.chunk("r1", 2, tokens(1))
    turns.take()
    finish(egress, request, attempt=2)
    assert reader.kinds() == ["Ack", "Started", "Delta", "Restarted", "Started", "Delta", "Done"]
    assert reader.text == "1 "
    assert "Restarted" not in blind.kinds()
    assert blind.text == "1 "


def test_a_rejected_request_is_answered_and_forgotten() -> None:
    egress, _, reader, _ = opened()
    egress.reject("r1", "queue_full", "too many", 250)
    error = reader.received[-1]
    assert error == wire.Error(
        code="queue_full",
        message="too many",
        retryable=True,
        request_id="r1",
        client_request_id="c-r1",
        retry_after_ms=250,
    )
    assert egress.num_open == 0


def test_a_failed_request_ends_with_an_error() -> None:
    egress, _, reader, request = opened()
    egress.chunk("r1", 1, tokens(0))
    egress.ended(a_result(egress, request, finish_reason=None, error_code="dead_letter"))
    egress.deliver("r1", 1)
    error = reader.received[-1]
    assert isinstance(error, wire.Error)
    assert (error.code, error.retryable, error.client_request_id) == ("dead_letter", False, "c-r1")


def test_a_repeat_reads_the_first_one_from_its_first_token() -> None:
    egress, turns, reader, request = opened()
    egress.chunk("r1", 1, tokens(0, 1))
    egress.chunk("r1", 1, tokens(2))
    again = Reader()
    egress.register(a_request("r2"), again)
    assert egress.ack_duplicate("r2", "r1", "running", False) is None
    assert again.kinds() == ["Ack", "Started", "Delta"]
    ack = again.received[0]
    assert isinstance(ack, wire.Ack)
    assert (ack.request_id, ack.duplicate, ack.state) == ("r1", True, "running")
    turns.take()
    egress.chunk("r1", 1, tokens(3))
    turns.take()
    finish(egress, request)
    assert reader.text == again.text == "0 1 2 3 "
    assert egress.num_open == 0


def test_a_repeat_of_a_finished_request_is_the_callers_to_answer() -> None:
    egress, _, _, request = opened()
    result = a_result(egress, request)
    finish(egress, request)
    again = Reader()
    egress.register(a_request("r2"), again)
    assert egress.ack_duplicate("r2", "r1", "finished", True) is again
    egress.send_result(again, result)
    assert again.kinds() == ["Ack", "Done"]
    assert again.received[-1].text == ""  # type: ignore[union-attr]


@pytest.mark.parametrize(("attempt", "index", "expected"), [(1, 3, "3 4 "), (1, 5, ""), (1, 0, "0 1 2 3 4 ")])
def test_a_follower_goes_on_where_it_was(attempt: int, index: int, expected: str) -> None:
    egress, turns, _, _ = opened()
    for chunk in (tokens(0), tokens(1, 2), tokens(3, 4)):
        egress.chunk("r1", 1, chunk)
    turns.take()
    back = Reader()
    assert egress.follow(back, "r1", attempt, index)
    assert "".join(delta.text for delta in back.deltas) == expected
    assert [delta.index for delta in back.deltas] == ([index] if expected else [])
    egress.chunk("r1", 1, tokens(5))
    turns.take()
    assert back.deltas[-1].index == 5


@pytest.mark.parametrize(("attempt", "index"), [(3, 2), (1, 9), (3, 0)])
def test_a_follower_of_another_attempt_begins_anew(attempt: int, index: int) -> None:
    egress, turns, _, _ = opened()
    egress.chunk("r1", 1, tokens(0, 1, 2))
    turns.take()
    back = Reader()
    egress.follow(back, "r1", attempt, index)
    assert back.kinds() == ["Restarted", "Started", "Delta"]
    assert back.deltas[0].index == 0


def test_nobody_follows_another_tenants_request() -> None:
    egress, _, _, _ = opened()
    assert not egress.follow(Reader(tenant="other"), "r1", 0, 0)
    assert not egress.follow(Reader(), "r9", 0, 0)


def test_a_reader_that_is_gone_costs_nothing_and_the_request_goes_on() -> None:
    egress, turns, reader, request = opened()
    egress.chunk("r1", 1, tokens(0))
    egress.chunk("r1", 1, tokens(1))
    reader.closed = True
    egress.gone(reader)
    turns.take()
    egress.chunk("r1", 1, tokens(2))
    turns.take()
    back = Reader()
    egress.follow(back, "r1", 1, 1)
    finish(egress, request)
    assert "".join(delta.text for delta in back.deltas) == "1 2 "


def test_one_request_has_a_bounded_number_of_readers() -> None:
    egress, _, reader, request = opened()
    others = [Reader() for _ in range(MAX_READERS)]
    for other in others:
        egress.follow(other, "r1", 0, 0)
    finish(egress, request)
    assert "Done" not in reader.kinds(), "the oldest made room"
    assert all(other.kinds()[-1] == "Done" for other in others)


def test_the_same_session_reads_a_request_once() -> None:
    egress, _, reader, request = opened()
    egress.follow(reader, "r1", 0, 0)
    egress.chunk("r1", 1, tokens(0))
    finish(egress, request)
    assert reader.kinds().count("Delta") == reader.kinds().count("Done") == 1


def test_many_streams_share_a_flush_that_is_never_later_than_the_bound() -> None:
    turns = Turns()
    egress = Egress(turns, LimitsConfig())
    delays = set()
    for n in range(100):
        egress.register(a_request(f"r{n}"), Reader())
        egress.started(f"r{n}", "m", "d", 1, 0)
        egress.chunk(f"r{n}", 1, tokens(0))
        egress.chunk(f"r{n}", 1, tokens(1))
        assert len(turns.due) == 1
        delays.add(turns.due[0][0])
        turns.take()
    assert min(delays) == 0.0
    assert max(delays) == COALESCE_S


@given(st.lists(st.sampled_from(["chunk", "turn", "credit", "resume", "restart", "follow"]), max_size=60), st.data())
def test_every_reader_ends_with_the_whole_text(steps: list[str], data: st.DataObject) -> None:
    """Whatever the order of tokens, turns, credit and reconnects: no gap, no repeat, the same text at the end."""
    egress, turns, first, request = opened(LimitsConfig(pending_delta_bytes=120), credit=2)
    readers = [first]
    attempt, next_token = 1, 0
    for step in steps:
        match step:
            case "chunk":
                num_new = data.draw(st.integers(1, 3))
                egress.chunk("r1", attempt, tokens(*range(next_token, next_token + num_new)))
                next_token += num_new
            case "turn":
                turns.take()
            case "credit":
                readers[-1].credit = (readers[-1].credit or 0) + 1
            case "resume":
                egress.resume(readers[-1])
            case "restart":
                attempt, next_token = attempt + 1, 0
                egress.restart("r1", attempt, "engine_lost")
                egress.started("r1", "m", "d", attempt, 0)
            case _:
                readers.append(Reader(credit=1))
                egress.follow(readers[-1], "r1", 0, 0)
    finish(egress, request, attempt=attempt)
    turns.take()
    for reader in readers[-MAX_READERS:]:
        assert reader.text == "".join(f"{i} " for i in range(next_token))
        assert reader.kinds().count("Done") == 1
    assert egress.num_open == 0

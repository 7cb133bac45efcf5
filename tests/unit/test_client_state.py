"""The client's state machine without socket or clock: what it sends, and what its streams become."""

from __future__ import annotations

from random import Random
from typing import Unpack

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msd import wire
from msd.client.failures import RequestError
from msd.client.queries import acknowledgements
from msd.client.state import ACK_AFTER_S, ACK_AT_ONCE, MAX_RESUMES, PING_AFTER_S, ClientState
from msd.client.streams import MAX_QUEUED_DELTAS, Phase, Stream
from msd.client.submits import SubmitFields, build_submit, new_request_id
from msd.errors import DaemonUnreachableError, MsdError


class World:
    """A state machine with a test in the daemon's place. Times are seconds."""

    def __init__(self, *, retry_s: float = 60.0, delta_credit: int = 8) -> None:
        self.now_s = 100.0
        self.state = ClientState(
            "test",
            tenant=None,
            delta_credit=delta_credit,
            retry_s=retry_s,
            give_up_s=30.0,
            random=Random(1),
            now_s=self.now_s,
        )

    def sent(self) -> list[wire.ClientMessage]:
        """What it wants to send, taken away."""
        messages = [wire.decode_client(payload) for payload in self.state.outgoing]
        self.state.outgoing.clear()
        return messages

    def hear(self, *messages: wire.ServerMessage) -> None:
        for message in messages:
            self.state.receive(wire.encode(message), self.now_s)

    def wait(self, pause_s: float) -> None:
        self.now_s += pause_s
        self.state.advance(self.now_s)

    def greet(self, *, epoch: str = "e1", credit: int = 100) -> list[wire.ClientMessage]:
        """A connection with its session; what was sent meanwhile."""
        self.state.opened(self.now_s)
        messages = self.sent()
        self.hear(welcome(epoch=epoch, credit=credit))
        return messages

    def submit(self, name: str = "a", **fields: Unpack[SubmitFields]) -> Stream:
        message, payload = build_submit("hi", 8, {"client_request_id": name, **fields})
        return self.state.submit(message, payload, self.now_s)

    def running(self, name: str = "a", **fields: Unpack[SubmitFields]) -> Stream:
        """A request that is acknowledged and runs as r-NAME."""
        stream = self.submit(name, **fields)
        self.hear(ack(name), started(name))
        self.sent()
        return stream


def welcome(*, epoch: str = "e1", credit: int = 100) -> wire.Welcome:
    return wire.Welcome(
        server="msd", epoch=epoch, tenant="t", limits={"max_frame_bytes": 10_000}, durable=False, submit_credit=credit
    )


def ack(name: str, *, credit: int = 100, duplicate: bool = False, request_id: str = "") -> wire.Ack:
    return wire.Ack(
        client_request_id=name,
        request_id=request_id or f"r-{name}",
        seq=1,
        duplicate=duplicate,
        state="waiting",
        durable=False,
        submit_credit=credit,
    )


def started(name: str, attempt: int = 1) -> wire.Started:
    return wire.Started(request_id=f"r-{name}", mode="m", decision_id="d", attempt=attempt, waited_ms=0)


def delta(name: str, index: int, *ids: int, attempt: int = 1) -> wire.Delta:
    return wire.Delta(
        request_id=f"r-{name}", attempt=attempt, index=index, token_ids=ids, text="".join(f"{i} " for i in ids)
    )


def done(
    name: str, *, attempt: int = 1, text: str | None = None, detached: bool = False, completion: int = 0
) -> wire.Done:
    ids = None if text is None else tuple(int(word) for word in text.split())
    return wire.Done(
        request_id=f"r-{name}",
        client_request_id=name,
        attempt=attempt,
        finish_reason="stop",
        mode="m",
        decision_id="d",
        usage=wire.Usage(prompt=1, cached=0, completion=completion or len(ids or ())),
        timings=wire.TimingFields(queue_ms=0, ttft_ms=0, tpot_ms=0, engine_ms=0, e2e_ms=0),
        text=text,
        token_ids=ids,
        detached=detached,
    )


def failure_of(stream: Stream) -> MsdError:
    assert stream.failure is not None
    return stream.failure


def code_of(stream: Stream) -> str:
    failure = failure_of(stream)
    assert isinstance(failure, RequestError)
    return failure.code


def text_of(stream: Stream) -> str:
    assert stream.done is not None
    assert stream.done.text is not None
    return stream.done.text


def test_it_says_hello_and_waits_for_the_welcome() -> None:
    world = World()
    world.submit()
    assert world.sent() == []
    world.state.opened(world.now_s)
    assert world.sent() == [wire.Hello(client="test", delta_credit=8)]
    world.hear(welcome())
    assert [type(message) for message in world.sent()] == [wire.Submit]


def test_a_stream_is_joined_and_its_result_acknowledged() -> None:
    world = World()
    world.greet()
    stream = world.running()
    world.hear(delta("a", 0, 0), delta("a", 1, 1, 2), done("a", completion=3))
    assert [queued.index for queued in stream.deltas] == [0, 1]
    assert text_of(stream) == "0 1 2 "
    assert stream.done is not None
    assert stream.done.token_ids == (0, 1, 2)
    assert world.sent() == []
    world.wait(ACK_AFTER_S)
    assert world.sent() == [wire.Acked(request_ids=("r-a",))]
    assert world.state.num_outstanding == 0


def test_many_results_are_acknowledged_together() -> None:
    world = World()
    world.greet(credit=10_000)
    for n in range(ACK_AT_ONCE + 1):
        world.submit(f"x{n}")
        world.hear(ack(f"x{n}", credit=10_000), done(f"x{n}", text="1"))
    acked = [message for message in world.sent() if isinstance(message, wire.Acked)]
    assert [len(message.request_ids) for message in acked] == [ACK_AT_ONCE]


def test_old_attempts_and_repeats_are_dropped() -> None:
    world = World()
    world.greet()
    stream = world.running()
    world.hear(delta("a", 0, 0), delta("a", 1, 1))
    world.hear(wire.Restarted(request_id="r-a", attempt=2, reason="engine_lost"))
    world.hear(delta("a", 2, 2, attempt=1))
    assert not stream.deltas, "what is not read yet of a lost attempt is dropped too"
    world.hear(
        started("a", 2), delta("a", 0, 5, attempt=2), delta("a", 0, 5, attempt=2), done("a", attempt=2, completion=1)
    )
    assert text_of(stream) == "5 "


def test_a_gap_is_closed_with_the_stored_text() -> None:
    world = World()
    world.greet()
    stream = world.running()
    world.hear(delta("a", 0, 0), delta("a", 2, 2), delta("a", 3, 3), done("a", completion=4))
    assert not stream.is_finished
    assert world.sent() == [wire.Fetch(request_ids=("r-a",))]
    world.hear(wire.Results(items=(done("a", text="0 1 2 3 "),), next_seq=0, more=False))
    assert text_of(stream) == "0 1 2 3 "
    assert [(queued.index, queued.text) for queued in stream.deltas] == [(0, "0 "), (1, "1 2 3 ")]


def test_a_detached_stream_ends_with_what_was_not_streamed() -> None:
    world = World()
    world.greet()
    stream = world.running()
    world.hear(delta("a", 0, 0), done("a", text="0 1 2 ", detached=True))
    assert "".join(queued.text for queued in stream.deltas) == text_of(stream) == "0 1 2 "
    assert world.sent() == []


def test_a_detached_stream_without_text_is_fetched_and_a_lost_result_is_an_error() -> None:
    world = World()
    world.greet()
    stream = world.running()
    world.hear(done("a", detached=True, completion=3))
    assert world.sent() == [wire.Fetch(request_ids=("r-a",))]
    world.hear(wire.Results(items=(), next_seq=0, more=False))
    assert code_of(stream) == "not_found"


def test_a_stream_ends_once_whichever_answer_is_first() -> None:
    world = World()
    world.greet()
    stream, other = world.running("a"), world.running("b")
    world.hear(done("a", detached=True, completion=3), done("b", detached=True, completion=3))
    assert world.sent() == [wire.Fetch(request_ids=("r-a",))]
    # A cancel is answered with the whole result, and that of the fetch is still to come.
    world.state.cancel(stream)
    world.hear(done("a", text="1 2 3 "))
    world.state.cancel(other)
    world.hear(done("b", text="4 5 6 "))
    assert not any(isinstance(message, wire.Fetch) for message in world.sent())
    deltas = [list(one.deltas) for one in (stream, other)]
    world.hear(wire.Results(items=(done("a", text="1 2 3 4 "),), next_seq=1, more=False))
    assert [list(one.deltas) for one in (stream, other)] == deltas
    assert (text_of(stream), text_of(other)) == ("1 2 3 ", "4 5 6 ")
    assert world.sent() == [], "nothing is fetched for the second"
    world.hear(done("a", text="1 2 3 4 5 "), wire.refusal("internal", "no", client_request_id="b"))
    assert stream.failure is None
    assert text_of(stream) == "1 2 3 "


def test_a_fetching_stream_that_is_given_up_is_not_found_missing_later() -> None:
    world = World()
    world.greet()
    stream = world.running("a", slo={"deadline_ms": 500.0})
    world.hear(done("a", detached=True, completion=3))
    world.state.lost(world.now_s)
    world.wait(1.0)
    assert code_of(stream) == "deadline_exceeded"
    world.greet()
    assert not any(isinstance(message, wire.Fetch) for message in world.sent())


def test_credit_is_given_back_when_half_of_it_is_used() -> None:
    world = World(delta_credit=8)
    world.greet()
    world.running()
    for n in range(4):
        world.hear(delta("a", n, n))
    assert world.sent() == [wire.Credit(add=4)]


def test_unread_deltas_of_an_idle_application_are_joined() -> None:
    world = World()
    world.greet()
    stream = world.running()
    for n in range(3 * MAX_QUEUED_DELTAS):
        world.hear(delta("a", n, n))
    assert len(stream.deltas) == MAX_QUEUED_DELTAS
    assert "".join(queued.text for queued in stream.deltas) == stream.text


def test_submits_wait_for_credit_and_get_it_with_answers() -> None:
    world = World()
    world.greet(credit=2)
    for name in "abcd":
        world.submit(name)
    assert len(world.sent()) == 2
    world.hear(ack("a", credit=2))
    assert world.sent() == []
    world.hear(done("a", text="1"))
    assert len(world.sent()) == 1
    world.hear(wire.refusal("invalid_field", "no", client_request_id="b"))
    assert len(world.sent()) == 1


def test_only_answers_to_submits_of_this_connection_give_credit_back() -> None:
    world = World()
    world.greet(credit=2)
    resumed = world.running("old")
    world.state.lost(world.now_s)
    world.greet(credit=2)
    for name in "abcd":
        world.submit(name)
    assert len(world.sent()) == 2
    world.hear(done("old", text="1"))
    assert resumed.is_finished
    world.hear(done("elsewhere", text="1"), wire.refusal("dead_letter", "of a cancel", client_request_id="elsewhere"))
    assert world.sent() == []
    # A repeat of what another connection began: its Ack ends the submit, its Done ends nothing more.
    world.hear(ack("a", credit=2, duplicate=True))
    assert [message.client_request_id for message in world.sent() if isinstance(message, wire.Submit)] == ["c"]
    world.hear(done("a", text="1"))
    assert world.sent() == []
    world.hear(done("b", text="1"))
    world.hear(done("b", text="1"))
    assert [message.client_request_id for message in world.sent() if isinstance(message, wire.Submit)] == ["d"]
    world.submit("e")
    assert world.sent() == []


def test_a_submit_whose_deadline_passed_before_there_was_credit_is_not_sent() -> None:
    world = World()
    world.greet(credit=1)
    world.submit("a")
    late = world.submit("b", slo={"deadline_ms": 50.0})
    world.submit("c")
    world.sent()
    world.now_s += 0.06
    world.hear(done("a", text="1"))
    assert [message.client_request_id for message in world.sent() if isinstance(message, wire.Submit)] == ["c"]
    assert code_of(late) == "deadline_exceeded"


def test_an_unacknowledged_submit_is_sent_again_after_a_reconnect_with_its_id() -> None:
    world = World()
    world.greet()
    world.submit("a")
    world.submit("b")
    first = world.sent()
    world.state.lost(world.now_s)
    world.greet()
    assert world.sent() == first


def test_an_acknowledged_request_is_resumed_where_it_was() -> None:
    world = World()
    world.greet()
    stream = world.running()
    world.hear(delta("a", 0, 0, 1))
    world.state.lost(world.now_s)
    (hello,) = world.greet()
    assert isinstance(hello, wire.Hello)
    assert hello.resume == (wire.Resume(request_id="r-a", attempt=1, index=2),)
    assert world.sent() == []
    world.hear(started("a"), delta("a", 2, 2), done("a", completion=3))
    assert text_of(stream) == "0 1 2 "


def test_more_requests_than_one_hello_may_name_take_several() -> None:
    world = World()
    world.greet(credit=10_000)
    for n in range(MAX_RESUMES + 5):
        world.running(f"x{n}")
    world.state.lost(world.now_s)
    hellos = world.greet()
    assert [len(hello.resume) for hello in hellos if isinstance(hello, wire.Hello)] == [MAX_RESUMES, 5]


def test_a_daemon_that_forgot_a_request_gets_it_once_more() -> None:
    world = World()
    world.greet(epoch="e1")
    stream = world.running()
    world.hear(delta("a", 0, 0))
    world.state.lost(world.now_s)
    world.greet(epoch="e2")
    assert world.sent() == []
    world.hear(wire.refusal("not_found", "never heard of it", request_id="r-a"))
    (again,) = world.sent()
    assert isinstance(again, wire.Submit)
    assert again.client_request_id == "a"
    world.hear(ack("a", request_id="r-a2"))
    world.hear(wire.Delta(request_id="r-a2", attempt=1, index=0, token_ids=(7,), text="7 "))
    assert [queued.text for queued in stream.deltas] == ["7 "]
    world.hear(msgspec.structs.replace(done("a", completion=1), request_id="r-a2"))
    assert text_of(stream) == "7 "


def test_the_same_daemon_that_does_not_know_a_request_is_believed() -> None:
    world = World()
    world.greet()
    stream = world.running()
    world.state.lost(world.now_s)
    world.greet()
    world.hear(wire.refusal("not_found", "past retention", request_id="r-a"))
    assert code_of(stream) == "not_found"


def test_a_session_that_the_daemon_closed_is_opened_again() -> None:
    world = World()
    world.greet()
    world.running("a")
    world.submit("b")
    world.sent()
    for _ in range(3):
        world.hear(wire.refusal("invalid_field", f"{wire.HELLO_FIRST}: no session", client_request_id="b"))
    hello, *rest = world.sent()
    assert isinstance(hello, wire.Hello)
    assert not rest, "once, however many messages were under way"
    assert [resume.request_id for resume in hello.resume] == ["r-a"]
    world.hear(welcome())
    (again,) = world.sent()
    assert isinstance(again, wire.Submit)
    assert again.client_request_id == "b"


def test_silence_is_questioned_and_a_new_epoch_re_attaches() -> None:
    world = World()
    world.greet()
    world.running()
    world.wait(PING_AFTER_S / 2)
    assert world.sent() == []
    world.wait(PING_AFTER_S)
    (ping,) = world.sent()
    assert isinstance(ping, wire.Ping)
    world.hear(wire.Pong(n=ping.n, epoch="e1"))
    assert world.sent() == []
    world.hear(wire.Pong(n=0, epoch="e2"))
    (hello,) = world.sent()
    assert isinstance(hello, wire.Hello)


def test_an_idle_client_sends_nothing() -> None:
    world = World()
    world.greet()
    world.wait(3_600)
    assert world.sent() == []
    assert world.state.next_due_s() is None


def test_a_hello_without_welcome_is_said_again() -> None:
    world = World()
    world.submit()
    world.state.opened(world.now_s)
    world.sent()
    world.wait(5)
    assert [type(message) for message in world.sent()] == [wire.Hello]


@pytest.mark.parametrize("code", sorted(wire.RETRYABLE))
def test_a_retryable_refusal_is_tried_again_after_its_pause(code: wire.ErrorCode) -> None:
    world = World()
    world.greet()
    stream = world.submit()
    first = world.sent()
    world.hear(wire.refusal(code, "later", client_request_id="a", retry_after_ms=500))
    world.wait(0.49)
    assert world.sent() == []
    world.wait(0.2)
    assert world.sent() == first
    assert not stream.is_finished


def test_retries_back_off_and_end() -> None:
    world = World(retry_s=10)
    world.greet()
    stream = world.submit()
    pauses = []
    while not stream.is_finished:
        assert world.sent()
        asked_s = world.now_s
        world.hear(wire.refusal("queue_full", "later", client_request_id="a"))
        while stream.phase is Phase.RETRYING:
            world.wait(0.02)
        pauses.append(world.now_s - asked_s)
    assert code_of(stream) == "queue_full"
    assert 4 <= len(pauses) <= 12
    assert pauses[0] < 0.2
    assert 1.0 < pauses[-2] < 7.0


def test_a_retry_is_given_up_at_the_deadline_and_counts_from_then() -> None:
    world = World()
    world.greet()
    stream = world.submit(slo={"deadline_ms": 1_000.0})
    world.sent()
    world.hear(wire.refusal("queue_full", "later", client_request_id="a", retry_after_ms=400))
    world.wait(0.6)
    (again,) = world.sent()
    assert isinstance(again, wire.Submit)
    assert again.slo.deadline_ms == pytest.approx(400, abs=1)
    world.hear(wire.refusal("queue_full", "later", client_request_id="a", retry_after_ms=600))
    assert code_of(stream) == "queue_full"


@pytest.mark.parametrize("code", ["malformed", "context_overflow", "deadline_infeasible", "idempotency_conflict"])
def test_other_refusals_end_the_request(code: wire.ErrorCode) -> None:
    world = World()
    world.greet()
    stream = world.submit()
    world.hear(wire.refusal(code, "never", client_request_id="a"))
    failure = failure_of(stream)
    assert isinstance(failure, RequestError)
    assert (failure.code, failure.retryable, failure.client_request_id) == (code, False, "a")
    assert failure.remedy


def test_no_retry_where_none_is_wanted() -> None:
    world = World(retry_s=0)
    world.greet()
    stream = world.submit()
    world.hear(wire.refusal("queue_full", "later", client_request_id="a"))
    assert code_of(stream) == "queue_full"


def test_an_id_that_is_bound_to_its_answer_is_not_tried_again_but_a_drained_one_is() -> None:
    world = World()
    world.greet()
    lost, drained = world.running("a"), world.running("b")
    world.hear(wire.refusal("engine_unavailable", "gone", request_id="r-a", client_request_id="a"))
    world.hear(wire.refusal("draining", "bye", request_id="r-b", client_request_id="b"))
    assert code_of(lost) == "engine_unavailable"
    assert not drained.is_finished
    world.wait(1)
    assert [message.client_request_id for message in world.sent() if isinstance(message, wire.Submit)] == ["b"]


def test_cancel_goes_by_the_best_known_id_and_the_answer_is_the_end() -> None:
    world = World()
    world.greet()
    unsent_world = World()
    unsent = unsent_world.submit()
    unsent_world.state.cancel(unsent)
    assert unsent.done is not None
    assert unsent.done.finish_reason == "abort"

    sent = world.submit("a")
    world.sent()
    world.state.cancel(sent)
    assert world.sent() == [wire.Cancel(client_request_id="a")]
    world.hear(wire.refusal("not_found", "too early", client_request_id="a"))
    assert not sent.is_finished
    world.hear(ack("a"))
    assert world.sent() == [wire.Cancel(request_id="r-a")]
    world.hear(msgspec.structs.replace(done("a"), finish_reason="abort"))
    assert sent.done is not None
    assert sent.done.finish_reason == "abort"


def test_a_cancel_survives_a_reconnect() -> None:
    world = World()
    world.greet()
    acked, unacked = world.running("a"), world.submit("b")
    world.state.cancel(acked)
    world.state.cancel(unacked)
    world.sent()
    world.state.lost(world.now_s)
    world.greet()
    cancels = [message for message in world.sent() if isinstance(message, wire.Cancel)]
    assert cancels == [wire.Cancel(request_id="r-a"), wire.Cancel(client_request_id="b")]


def test_a_daemon_that_does_not_come_back_fails_everything() -> None:
    world = World()
    world.greet()
    stream = world.running()
    query = world.state.ask(wire.Status(), world.now_s)
    world.state.lost(world.now_s)
    world.wait(29)
    assert not stream.is_finished
    world.wait(2)
    assert isinstance(failure_of(stream), DaemonUnreachableError)
    assert isinstance(query.failure, DaemonUnreachableError)


def test_a_deadline_passes_also_without_a_daemon() -> None:
    world = World()
    stream = world.submit(slo={"deadline_ms": 500.0})
    due_s = world.state.next_due_s()
    assert due_s is not None
    assert due_s <= world.now_s + 0.2
    world.wait(0.4)
    assert not stream.is_finished
    world.wait(0.2)
    assert code_of(stream) == "deadline_exceeded"


def test_a_client_that_is_not_taken_fails_at_once() -> None:
    world = World()
    stream = world.submit()
    world.state.opened(world.now_s)
    world.hear(wire.refusal("unauthenticated", "nobody"))
    assert code_of(stream) == "unauthenticated"
    assert code_of(world.submit("b")) == "unauthenticated"


def test_a_full_house_is_asked_again() -> None:
    world = World()
    world.submit()
    world.state.opened(world.now_s)
    world.sent()
    world.hear(wire.refusal("queue_full", "4096 clients", retry_after_ms=1_000))
    world.wait(1.1)
    assert [type(message) for message in world.sent()] == [wire.Hello]


def test_what_is_too_large_is_refused_here() -> None:
    world = World()
    world.greet()
    message, payload = build_submit("x" * 20_000, 8, {})
    with pytest.raises(RequestError, match="too_large") as caught:
        world.state.submit(message, payload, world.now_s)
    assert caught.value.code == "too_large"


def test_an_id_under_way_is_refused_here() -> None:
    world = World()
    world.greet()
    world.submit("a")
    with pytest.raises(RequestError, match="idempotency_conflict"):
        world.submit("a")


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"sampling": {"temperature": 3.0}}, "$.sampling.temperature"),
        ({"slo": {"deadline_ms": 0.0}}, "$.slo.deadline_ms"),
        ({"bogus": 1}, "bogus"),
        ({"priority": "high"}, "$.priority"),
        ({"prompt_token_ids": [1]}, "$.prompt"),
        ({"tags": {"a": object()}}, ""),
    ],
)
def test_what_the_daemon_would_not_decode_is_refused_here(fields: SubmitFields, path: str) -> None:
    with pytest.raises(RequestError) as caught:
        build_submit("hi", 8, fields)
    assert caught.value.code == "invalid_field"
    assert path in str(caught.value)


def test_replies_find_their_questions() -> None:
    world = World()
    world.greet()
    state, now_s = world.state, world.now_s
    daemon, one, cancel, fetch, second = (
        state.ask(question, now_s)
        for question in (
            wire.Status(),
            wire.Status(request_id="r1"),
            wire.Cancel(client_request_id="c2"),
            wire.Fetch(since_seq=0),
            wire.Fetch(since_seq=5),
        )
    )
    assert sum(isinstance(message, wire.Fetch) for message in world.sent()) == 1, "results name no question"
    world.hear(wire.refusal("not_found", "no", request_id="r1"))
    world.hear(wire.State(daemon={"up": True}))
    world.hear(msgspec.structs.replace(done("c2"), client_request_id="c2"))
    world.hear(wire.Results(items=(), next_seq=5, more=True))
    assert isinstance(one.reply, wire.Error)
    assert isinstance(daemon.reply, wire.State)
    assert isinstance(cancel.reply, wire.Done)
    assert isinstance(fetch.reply, wire.Results)
    assert world.sent() == [wire.Fetch(since_seq=5)]
    assert not second.is_finished
    world.hear(wire.refusal("journal_unavailable", "broken"))
    assert isinstance(second.reply, wire.Error)


def test_an_acknowledgement_is_followed_by_a_question_and_put_again_with_it() -> None:
    world = World()
    world.greet()
    acked = wire.Acked(request_ids=("r1", "r2"))
    query = world.state.ask(wire.Ping(n=5), world.now_s, acked)
    assert world.sent() == [acked, wire.Ping(n=5)]
    world.state.lost(world.now_s)
    world.greet()
    assert world.sent() == [acked, wire.Ping(n=5)]
    world.hear(wire.Pong(n=5, epoch="e1"))
    assert query.is_finished


def test_acknowledgements_are_cut_to_what_one_message_names_and_checked() -> None:
    ids = [f"r{n}" for n in range(600)]
    messages = acknowledgements(ids)
    assert [len(message.request_ids) for message in messages] == [256, 256, 88]
    assert [name for message in messages for name in message.request_ids] == ids
    assert acknowledgements([]) == []
    with pytest.raises(RequestError, match="invalid_field"):
        acknowledgements(["x" * 129])


def test_a_client_whose_key_is_revoked_hears_it_in_the_middle_of_a_session() -> None:
    world = World()
    world.greet()
    stream = world.running()
    world.hear(wire.refusal("unauthenticated", "revoked"))
    assert code_of(stream) == "unauthenticated"
    assert code_of(world.submit("b")) == "unauthenticated"


def test_questions_are_put_again_after_a_reconnect() -> None:
    world = World()
    world.greet()
    world.state.ask(wire.Fetch(since_seq=0), world.now_s)
    world.sent()
    world.state.lost(world.now_s)
    world.greet()
    assert world.sent() == [wire.Fetch(since_seq=0)]


def test_bytes_that_do_not_decode_are_left_out() -> None:
    world = World()
    world.greet()
    for payload in (b"", b"\xc1", b"\x81\xa1t\xa3new", b"\x81\xa1\xff\xa1x"):
        world.state.receive(payload, world.now_s)


def test_ids_are_unique_and_ordered() -> None:
    ids = [new_request_id() for _ in range(2_000)]
    assert len(set(ids)) == len(ids)
    assert all(len(name) == 36 and name[14] == "7" and name[19] in "89ab" for name in ids)
    assert [name[:13] for name in ids] == sorted(name[:13] for name in ids)


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=12),
    st.lists(st.sampled_from(["deliver", "lose", "restart"]), max_size=25),
)
def test_the_joined_stream_is_the_answer_whatever_happens_to_the_connection(sizes: list[int], steps: list[str]) -> None:
    """A daemon that keeps to the protocol, over a connection that drops: what was read is the text, in order, once."""
    world = World(delta_credit=1_000)
    world.greet()
    stream = world.running()
    pieces: list[wire.Delta] = []
    index = 0
    for size in sizes:
        pieces.append(delta("a", index, *range(index, index + size)))
        index += size
    attempt, position = 1, 0
    read: list[str] = []
    for step in steps:
        match step:
            case "deliver" if position < len(pieces):
                world.hear(msgspec.structs.replace(pieces[position], attempt=attempt))
                position += 1
            case "lose":
                world.state.lost(world.now_s)
                (hello,) = world.greet()
                assert isinstance(hello, wire.Hello)
                (resume,) = hello.resume
                assert resume.attempt == attempt
                position = next((n for n, piece in enumerate(pieces) if piece.index == resume.index), len(pieces))
            case "restart":
                attempt, position, read = attempt + 1, 0, []
                world.hear(wire.Restarted(request_id="r-a", attempt=attempt, reason="x"), started("a", attempt))
            case _:
                pass
        while stream.deltas:
            read.append(stream.deltas.popleft().text)
    for piece in pieces[position:]:
        world.hear(msgspec.structs.replace(piece, attempt=attempt))
    world.hear(done("a", attempt=attempt, completion=index))
    read += [queued.text for queued in stream.deltas]
    assert "".join(read) == text_of(stream) == "".join(piece.text for piece in pieces)

"""The wire: what decodes, what is refused and how, and that the reference page says the same."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from msd import wire

REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "protocol.md"
SUBMIT: dict[str, object] = {"t": "submit", "client_request_id": "a", "max_tokens": 4, "prompt": "hi"}


def pack(**fields: object) -> bytes:
    """A submit with these fields changed; None removes one."""
    return msgspec.msgpack.encode({name: value for name, value in (SUBMIT | fields).items() if value is not None})


def refused(data: bytes) -> str:
    with pytest.raises((*wire.DECODE_ERRORS, wire.FieldError)) as caught:
        wire.decode_client(data)
    return str(caught.value)


def test_a_submit_decodes_with_the_documented_defaults() -> None:
    submit = wire.decode_client(pack())
    assert isinstance(submit, wire.Submit)
    assert (submit.stream, submit.service_class, submit.priority) == (True, "standard", 0)
    assert submit.quality_floor is None
    assert submit.slo is wire.NO_SLO


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"max_tokens": 0}, "$.max_tokens"),
        ({"max_tokens": -1}, "$.max_tokens"),
        ({"max_tokens": 2**64 - 1}, "$.max_tokens"),
        ({"max_tokens": "4"}, "$.max_tokens"),
        ({"max_tokens": 1.5}, "$.max_tokens"),
        ({"sampling": {"temperature": math.nan}}, "$.sampling.temperature"),
        ({"sampling": {"temperature": math.inf}}, "$.sampling.temperature"),
        ({"sampling": {"top_p": 0.0}}, "$.sampling.top_p"),
        ({"sampling": {"seed": 2**63}}, "$.sampling.seed"),
        ({"sampling": {"presence_penalty": math.nan}}, "$.sampling.presence_penalty"),
        ({"sampling": {"repetition_penalty": math.inf}}, "$.sampling.repetition_penalty"),
        ({"sampling": {"stop": ["x"] * 17}}, "$.sampling.stop"),
        ({"sampling": {"stop": [""]}}, "$.sampling.stop"),
        ({"slo": {"deadline_ms": 0}}, "$.slo.deadline_ms"),
        ({"slo": {"deadline_ms": -5}}, "$.slo.deadline_ms"),
        ({"slo": {"deadline_ms": math.inf}}, "$.slo.deadline_ms"),
        ({"slo": {"ttft_ms": math.nan}}, "$.slo.ttft_ms"),
        ({"slo": {"ttft_ms": 100, "deadline_ms": 100}}, "$.slo.deadline_ms"),
        ({"priority": 8}, "$.priority"),
        ({"quality_floor": 1.01}, "$.quality_floor"),
        ({"class": "urgent"}, "$.class"),
        ({"client_request_id": ""}, "$.client_request_id"),
        ({"client_request_id": "x" * 129}, "$.client_request_id"),
        ({"prompt": ""}, "$.prompt"),
        ({"prompt": None}, "$.prompt"),
        ({"prompt_token_ids": [1]}, "$.prompt"),
        ({"prompt": None, "prompt_token_ids": []}, "$.prompt_token_ids"),
        ({"prompt": None, "prompt_token_ids": [-1]}, "$.prompt_token_ids"),
        ({"prompt": None, "prompt_token_ids": [2**31]}, "$.prompt_token_ids"),
        ({"prompt": None, "messages": []}, "$.messages"),
        ({"prompt": "é" * (wire.MAX_PROMPT_BYTES // 2 + 1)}, "$.prompt"),
        ({"tags": {"k" * 33: "v"}}, "$.tags"),
        ({"tags": {str(n): "v" for n in range(9)}}, "$.tags"),
        ({"temprature": 1}, "temprature"),
        ({"sampling": {"temprature": 1}}, "temprature"),
        ({"t": "submitt"}, "$.t"),
    ],
)
def test_a_field_out_of_its_limits_is_named(fields: dict[str, object], path: str) -> None:
    assert path in refused(pack(**fields))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x93",
        pack()[:-3],
        pack() + b"\x00",
        b"\x05",
        b"\x90",
        b"\x80",
        b"\xc7\x03\x05abc",
        # a key, then a value, that are not UTF-8
        b"\x81\xa1\xff\xa1x",
        b"\x81\xa1t\xa4\xff\xff\xff\xff",
        # array headers that claim 2^32-1 items
        b"\xdd\xff\xff\xff\xff",
        msgspec.msgpack.encode(SUBMIT | {"prompt": None})[:-1] + b"\xdd\xff\xff\xff\xff",
        # nested without end, at the top and in an unknown field
        b"\x91" * 100_000,
        b"\x82\xa1t\xa6submit\xa1x" + b"\x91" * 100_000 + b"\xc0",
    ],
    ids=range(15),
)
def test_bytes_that_are_no_message_raise_only_the_named_errors(data: bytes) -> None:
    refused(data)
    assert wire.client_request_id_of(data) in (None, "a")


@pytest.mark.parametrize(
    "message",
    [
        {"t": "cancel"},
        {"t": "cancel", "request_id": "a", "client_request_id": "b"},
        {"t": "status", "request_id": "a", "client_request_id": "b"},
        {"t": "fetch"},
        {"t": "fetch", "request_ids": ["a"], "since_seq": 1},
        {"t": "fetch", "since_seq": 2**62 + 1},
        {"t": "credit", "add": 0},
        {"t": "credit", "add": 65_537},
        {"t": "acked", "request_ids": ["x"] * 257},
        {"t": "ping", "n": 2**53 + 1},
        {"t": "hello", "client": "x" * 65},
        {"t": "hello", "client": "x", "delta_credit": -1},
        {"t": "feedback", "request_id": "a", "score": math.nan},
    ],
)
def test_other_messages_keep_their_limits(message: dict[str, object]) -> None:
    refused(msgspec.msgpack.encode(message))


def test_an_id_can_be_read_from_a_submit_that_was_refused() -> None:
    assert wire.client_request_id_of(pack(max_tokens=-1)) == "a"
    assert wire.client_request_id_of(pack(client_request_id=5)) is None


def test_an_id_longer_than_one_may_be_is_not_echoed() -> None:
    assert wire.client_request_id_of(pack(client_request_id="x" * 128, max_tokens=-1)) == "x" * 128
    assert wire.client_request_id_of(pack(client_request_id="x" * 129)) is None
    assert wire.client_request_id_of(pack(client_request_id="")) is None


@given(st.binary(max_size=200))
@example(b"\xd9\x01\xff")
def test_random_bytes_raise_only_the_named_errors(data: bytes) -> None:
    try:
        wire.decode_client(data)
    except (*wire.DECODE_ERRORS, wire.FieldError):
        pass
    wire.client_request_id_of(data)


@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_submit_with_one_byte_changed_decodes_or_raises_the_named_errors(at: int, value: int) -> None:
    data = bytearray(pack(sampling={"temperature": 0.5}, slo={"deadline_ms": 5.0}, tags={"a": "b"}))
    data[at % len(data)] = value
    try:
        wire.decode_client(bytes(data))
    except (*wire.DECODE_ERRORS, wire.FieldError):
        pass


def test_the_content_hash_sees_the_request_but_not_its_tags_and_slo() -> None:
    def hash_of(**fields: object) -> bytes:
        submit = wire.decode_client(pack(**fields))
        assert isinstance(submit, wire.Submit)
        return wire.content_hash(submit)

    assert hash_of() == hash_of(tags={"a": "b"}) == hash_of(slo={"deadline_ms": 10.0}) == hash_of(priority=0)
    different = [hash_of(), hash_of(prompt="ho"), hash_of(max_tokens=5), hash_of(sampling={"temperature": 0.5})]
    assert len(set(different)) == len(different)


def test_the_client_ignores_fields_that_it_does_not_know() -> None:
    pong = wire.decode_server(msgspec.msgpack.encode({"t": "pong", "n": 1, "epoch": "e", "new": [1, {"a": 2}]}))
    assert pong == wire.Pong(n=1, epoch="e")


def test_every_server_message_survives_the_wire() -> None:
    usage, timings = (
        wire.Usage(prompt=1, cached=0, completion=2),
        wire.TimingFields(queue_ms=1, ttft_ms=2, tpot_ms=3, engine_ms=4, e2e_ms=5),
    )
    done = wire.Done(
        request_id="r", attempt=1, finish_reason="stop", mode="m", decision_id="d", usage=usage, timings=timings
    )
    for message in (
        done,
        wire.refusal("queue_full", "x" * 600, retry_after_ms=5),
        wire.Results(items=(done, wire.refusal("internal", "x")), next_seq=3, more=True),
        wire.Delta(request_id="r", attempt=1, index=0, token_ids=(1, 2**31 - 1), text="é"),
    ):
        assert wire.decode_server(wire.encode(message)) == message


def test_a_refusal_keeps_its_bound_and_knows_whether_it_is_retryable() -> None:
    assert len(wire.refusal("queue_full", "x" * 600).message) == wire.MAX_MESSAGE_CHARS
    assert wire.refusal("queue_full", "").retryable
    assert not wire.refusal("malformed", "").retryable


def test_the_reference_page_lists_exactly_the_error_codes() -> None:
    table = REFERENCE.read_text().split("## Error codes", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| `(\w+)` \| (yes|no) \|", table, re.MULTILINE)
    assert [code for code, _ in rows] == list(get_args(wire.ErrorCode))
    assert {code for code, retryable in rows if retryable == "yes"} == wire.RETRYABLE


def test_the_reference_page_names_every_field_of_every_message() -> None:
    page = REFERENCE.read_text()
    for message in (*get_args(wire.ClientMessage), *get_args(wire.ServerMessage)):
        info = msgspec.inspect.type_info(message)
        assert isinstance(info, msgspec.inspect.StructType)
        row = re.search(rf"^\| `{info.tag}` \| (.*)$", page, re.MULTILINE)
        assert row, f"docs/reference/protocol.md has no row for {info.tag}"
        where = row[1] if "below" not in row[1] else page
        missing = [field.encode_name for field in info.fields if f"`{field.encode_name}`" not in where]
        assert not missing, f"{info.tag}: {missing}"

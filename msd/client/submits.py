"""Making a Submit from what a producer writes, checked locally with the daemon's own decoder."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import TypedDict

import msgspec

from msd import wire
from msd.client.failures import RequestError


class SubmitFields(TypedDict, total=False):
    """Optional fields of a submit; meaning and limits: docs/reference/protocol.md."""

    client_request_id: str
    messages: Sequence[wire.ChatMessage | Mapping[str, str]]
    prompt_token_ids: Sequence[int]
    model: str
    sampling: wire.SamplingFields | Mapping[str, object]
    slo: wire.SloFields | Mapping[str, object]
    service_class: str
    priority: int
    quality_floor: float
    task: str
    session_id: str
    mode_hint: wire.ModeHint | str
    stream: bool
    prefix_id: str
    tags: Mapping[str, str]


def new_request_id() -> str:
    """A UUIDv7: time-ordered, so that logs and journals stay readable."""
    milliseconds = time.time_ns() // 1_000_000
    tail = int.from_bytes(os.urandom(10), "big")
    high = f"{milliseconds:012x}"
    low = f"{0x8000 | tail >> 64 & 0x3FFF:04x}"
    return f"{high[:8]}-{high[8:]}-7{tail >> 52 & 0xFFF:03x}-{low}-{tail & 0xFFFF_FFFF_FFFF:012x}"


def build_submit(prompt: str | None, max_tokens: int, fields: SubmitFields) -> tuple[wire.Submit, bytes]:
    """The message and its encoding. Raises RequestError (`invalid_field`) as the daemon would."""
    given: dict[str, object] = dict(fields)
    client_request_id = given.setdefault("client_request_id", new_request_id())
    if "service_class" in given:
        given["class"] = given.pop("service_class")
    if isinstance(hint := given.get("mode_hint"), str):
        given["mode_hint"] = {"mode": hint}
    try:
        payload = wire.encode({"t": "submit", "prompt": prompt, "max_tokens": max_tokens, **given})
        message = wire.decode_client(payload)
    except (*wire.DECODE_ERRORS, wire.FieldError, TypeError, OverflowError) as error:
        raise RequestError("invalid_field", str(error), client_request_id=str(client_request_id)) from error
    assert isinstance(message, wire.Submit), "tagged as one"
    return message, wire.encode(message)


def with_time_left(submit: wire.Submit, deadline_ms: float) -> wire.Submit:
    """The same request with its deadline counted from now: it is sent again, and deadlines count from receipt."""
    slo = submit.slo
    ttft_ms = None if slo.ttft_ms is None or slo.ttft_ms >= deadline_ms else slo.ttft_ms
    return msgspec.structs.replace(
        submit, slo=wire.SloFields(ttft_ms=ttft_ms, tpot_ms=slo.tpot_ms, deadline_ms=deadline_ms)
    )

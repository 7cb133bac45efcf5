"""A Submit becomes a Request: ids, tokens, hashes, deadlines, models, and what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

import pytest

from msd import wire
from msd.domain import Sampling, Slo
from msd.ingress.accept import INLINE_PROMPT_CHARS, INLINE_PROMPT_IDS, Acceptor, RefusedSubmitError

T = TypeVar("T")


class Words:
    """One token per word; a template only if `has_template`."""

    vocab_size = 100_000

    def __init__(self, fingerprint: str = "words", *, has_template: bool = False) -> None:
        self.fingerprint = fingerprint
        self.has_template = has_template

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(range(len(text.split())))

    def encode_chat(self, messages: Sequence[wire.ChatMessage]) -> tuple[int, ...]:
        if not self.has_template:
            raise ValueError("the model has no chat template")
        return self.encode(" ".join(message.content for message in messages))

    def decode(self, token_ids: Sequence[int]) -> str:
        return ""


class Counting:
    """An Offload that counts."""

    def __init__(self) -> None:
        self.num_runs = 0

    async def run(self, function: Callable[[], T]) -> T:
        self.num_runs += 1
        return function()


def an_acceptor(**models: Words) -> Acceptor:
    return Acceptor(epoch="e", models=models or {"tiny": Words()}, offload=Counting())


def a_submit(**fields: object) -> wire.Submit:
    message = wire.decode_client(
        wire.encode({"t": "submit", "client_request_id": "c", "max_tokens": 4, "prompt": "one two", **fields})
    )
    assert isinstance(message, wire.Submit)
    return message


def test_every_field_of_the_submit_reaches_the_request() -> None:
    submit = a_submit(
        model="tiny",
        slo={"ttft_ms": 50.0, "deadline_ms": 1_500.5},
        priority=-2,
        quality_floor=0.5,
        task="sort",
        session_id="s",
        prefix_id="p",
        stream=False,
        mode_hint={"mode": "fast", "strict": True},
        sampling={"temperature": 0.5, "stop": ["x"], "ignore_eos": True},
        tags={"a": "b"},
        **{"class": "batch"},
    )
    request, prompt = an_acceptor().accept(submit, "tenant", 1_000_000)
    assert (request.tenant, request.client_request_id, request.received_us) == ("tenant", "c", 1_000_000)
    assert request.deadline_us == 1_000_000 + 1_500_500
    assert request.slo == Slo(ttft_ms=50.0, deadline_ms=1_500.5)
    assert (request.model, request.mode_hint, request.mode_strict) == ("tiny", "fast", True)
    assert (request.service_class, request.priority, request.quality_floor) == ("batch", -2, 0.5)
    assert (request.task, request.session_id, request.prefix_id) == ("sort", "s", "p")
    assert (request.stream, request.ignore_eos, request.num_prompt_tokens, request.max_tokens) == (False, True, 2, 4)
    assert request.content_hash == wire.content_hash(submit)
    assert prompt.token_ids == (0, 1)
    assert prompt.sampling == Sampling(temperature=0.5, stop=("x",), ignore_eos=True)
    assert prompt.tags == {"a": "b"}


def test_ids_are_the_epoch_and_a_counter() -> None:
    acceptor = an_acceptor()
    ids = [acceptor.accept(a_submit(), "t", 0)[0].request_id for _ in range(17)]
    assert ids[0] == "e-1"
    assert ids[16] == "e-11"


def test_token_ids_are_taken_as_they_are() -> None:
    request, prompt = an_acceptor().accept(a_submit(prompt=None, prompt_token_ids=[7, 8, 9]), "t", 0)
    assert prompt.token_ids == (7, 8, 9)
    assert request.num_prompt_tokens == 3


@pytest.mark.parametrize(
    ("fields", "code", "says"),
    [
        ({"model": "tinny"}, "mode_unavailable", "'tiny'"),
        ({"prompt": "   "}, "invalid_field", "$.prompt"),
        ({"prompt": None, "prompt_token_ids": [5, 100_000, 7]}, "invalid_field", "$.prompt_token_ids"),
        ({"prompt": None, "prompt_token_ids": [5, 2**31 - 1]}, "invalid_field", "below 100000"),
        ({"prompt": None, "messages": [{"role": "user", "content": "x"}]}, "invalid_field", "$.messages"),
    ],
)
def test_what_cannot_be_taken_is_refused_by_name(fields: dict[str, object], code: str, says: str) -> None:
    with pytest.raises(RefusedSubmitError) as caught:
        an_acceptor().accept(a_submit(**fields), "t", 0)
    assert caught.value.code == code
    assert says in str(caught.value)


def test_a_request_without_a_model_is_bound_only_where_token_ids_differ() -> None:
    alike = an_acceptor(a=Words(), b=Words())
    different = an_acceptor(a=Words("x"), b=Words("y"))
    assert alike.accept(a_submit(), "t", 0)[0].model is None
    assert different.accept(a_submit(), "t", 0)[0].model == "a"
    assert different.accept(a_submit(model="b"), "t", 0)[0].model == "b"


def test_the_highest_token_id_is_one_below_the_size_of_the_vocabulary() -> None:
    _, prompt = an_acceptor().accept(a_submit(prompt=None, prompt_token_ids=[99_999, 0]), "t", 0)
    assert prompt.token_ids == (99_999, 0)


def test_long_prompts_are_tokenised_off_the_loop() -> None:
    offload = Counting()
    acceptor = Acceptor(epoch="e", models={"tiny": Words(has_template=True)}, offload=offload)
    long = "word " * INLINE_PROMPT_CHARS
    assert not acceptor.is_long(a_submit())
    assert not acceptor.is_long(a_submit(prompt=None, prompt_token_ids=[1] * INLINE_PROMPT_IDS))
    assert acceptor.is_long(a_submit(prompt=None, prompt_token_ids=[1] * (INLINE_PROMPT_IDS + 1)))
    assert acceptor.is_long(a_submit(prompt=None, messages=[{"role": "user", "content": long}]))
    submit = a_submit(prompt=long)
    assert acceptor.is_long(submit)
    request, _ = asyncio.run(acceptor.accept_off_loop(submit, "t", 5))
    assert (request.num_prompt_tokens, request.received_us) == (INLINE_PROMPT_CHARS, 5)
    assert offload.num_runs == 1

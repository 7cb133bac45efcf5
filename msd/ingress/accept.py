"""A decoded Submit of an authenticated tenant -> Request and Prompt: hashed, tokenised, named. No I/O."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from msd import wire
from msd.core.prefixes import hash_blocks
from msd.domain import Prompt, Request, Sampling, Slo
from msd.errors import MsdError
from msd.ports import Offload, Tokenizer

INLINE_PROMPT_CHARS = 8 * 1024
"""Longer prompts are tokenised off the loop; at a few MB/s this bounds one tokenisation on it to some ms."""

INLINE_PROMPT_IDS = 16 * 1024
"""More token ids than these are looked through off the loop; so many take half a millisecond on a busy machine."""

_NO_SLO = Slo()
_NO_SAMPLING = Sampling()
_DEFAULT_SAMPLING = wire.SamplingFields()


class RefusedSubmitError(MsdError):
    """This request cannot be taken. Not recoverable for it as it is; `code` is the wire's word for it."""

    def __init__(self, code: wire.ErrorCode, message: str, *, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.code = code


class Acceptor:
    """Makes requests out of submits. `models` maps what producers may put in `model` to its tokenizer.

    Ids are `EPOCH-COUNTER`, unique over restarts as `epoch` is. A request that names no model may run on any of them
    when all tokenizers give equal ids; otherwise it is bound to the first model, since its token ids mean that one's.
    """

    def __init__(self, *, epoch: str, models: Mapping[str, Tokenizer], offload: Offload) -> None:
        assert models, "a daemon without a model has nothing to accept requests for"
        self._prefix = f"{epoch}-"
        self._num_accepted = 0
        self._models = dict(models)
        self._offload = offload
        default_model, self._default_tokenizer = next(iter(self._models.items()))
        alike = len({tokenizer.fingerprint for tokenizer in self._models.values()}) == 1
        self._model_of_unnamed = None if alike else default_model

    def is_long(self, submit: wire.Submit) -> bool:
        """Whether `accept` would hold the loop for too long, so that `accept_off_loop` is the one to use."""
        if submit.prompt is not None:
            return len(submit.prompt) > INLINE_PROMPT_CHARS
        if submit.messages is not None:
            return sum(len(message.content) for message in submit.messages) > INLINE_PROMPT_CHARS
        return submit.prompt_token_ids is not None and len(submit.prompt_token_ids) > INLINE_PROMPT_IDS

    def text_of(self, model: str | None, token_ids: Sequence[int]) -> str:
        """What the ids say, by the tokenizer that a request of this model was read with."""
        tokenizer = self._default_tokenizer if model is None else self._models[model]
        return tokenizer.decode(token_ids)

    def accept(self, submit: wire.Submit, tenant: str, received_us: int) -> tuple[Request, Prompt]:
        """Build the request; `received_us` is when it came. Raises RefusedSubmitError."""
        model, tokenizer = self._resolve(submit)
        token_ids = _token_ids(submit, tokenizer)
        return self._build(submit, tenant, received_us, model, token_ids, hash_blocks(token_ids))

    async def accept_off_loop(self, submit: wire.Submit, tenant: str, received_us: int) -> tuple[Request, Prompt]:
        """The same with the tokenising done through the Offload port. Raises RefusedSubmitError."""
        model, tokenizer = self._resolve(submit)
        token_ids, prefix_hashes = await self._offload.run(lambda: _hashed_token_ids(submit, tokenizer))
        return self._build(submit, tenant, received_us, model, token_ids, prefix_hashes)

    def _resolve(self, submit: wire.Submit) -> tuple[str | None, Tokenizer]:
        if submit.model is None:
            return self._model_of_unnamed, self._default_tokenizer
        tokenizer = self._models.get(submit.model)
        if tokenizer is None:
            near = difflib.get_close_matches(submit.model, self._models, n=1, cutoff=0.0)
            raise RefusedSubmitError(
                "mode_unavailable", f"no model is named {submit.model!r}", remedy=f"the nearest is {near[0]!r}"
            )
        return submit.model, tokenizer

    def _build(
        self,
        submit: wire.Submit,
        tenant: str,
        received_us: int,
        model: str | None,
        token_ids: tuple[int, ...],
        prefix_hashes: tuple[int, ...],
    ) -> tuple[Request, Prompt]:
        self._num_accepted += 1
        slo, hint, sampling = submit.slo, submit.mode_hint, submit.sampling
        deadline_ms = slo.deadline_ms
        request = Request(
            request_id=f"{self._prefix}{self._num_accepted:x}",
            client_request_id=submit.client_request_id,
            tenant=tenant,
            content_hash=wire.content_hash(submit),
            received_us=received_us,
            num_prompt_tokens=len(token_ids),
            max_tokens=submit.max_tokens,
            service_class=submit.service_class,
            priority=submit.priority,
            deadline_us=None if deadline_ms is None else received_us + int(deadline_ms * 1_000),
            slo=_NO_SLO
            if slo is wire.NO_SLO
            else Slo(ttft_ms=slo.ttft_ms, tpot_ms=slo.tpot_ms, deadline_ms=deadline_ms),
            model=model,
            mode_hint=None if hint is None else hint.mode,
            mode_strict=hint is not None and hint.strict,
            quality_floor=submit.quality_floor,
            task=submit.task,
            session_id=submit.session_id,
            prefix_id=submit.prefix_id,
            ignore_eos=sampling.ignore_eos,
            stream=submit.stream,
            prefix_hashes=prefix_hashes,
        )
        return request, Prompt(token_ids=token_ids, sampling=_sampling(sampling), tags=submit.tags)


def _token_ids(submit: wire.Submit, tokenizer: Tokenizer) -> tuple[int, ...]:
    if submit.prompt_token_ids is not None:
        # An engine would fail on them, or not even that.
        if (highest := max(submit.prompt_token_ids)) >= tokenizer.vocab_size:
            raise RefusedSubmitError(
                "invalid_field",
                f"Expected token ids below {tokenizer.vocab_size}, the size of the vocabulary, got {highest}"
                " - at `$.prompt_token_ids`",
            )
        return submit.prompt_token_ids
    if submit.messages is not None:
        try:
            token_ids = tokenizer.encode_chat(submit.messages)
        except ValueError as error:
            raise RefusedSubmitError(
                "invalid_field", f"{error} - at `$.messages`", remedy="send `prompt` instead"
            ) from error
    else:
        assert submit.prompt is not None, "wire.check_fields lets exactly one form through"
        token_ids = tokenizer.encode(submit.prompt)
    if not token_ids:
        raise RefusedSubmitError("invalid_field", "Expected a prompt of at least one token - at `$.prompt`")
    return token_ids


def _hashed_token_ids(submit: wire.Submit, tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    token_ids = _token_ids(submit, tokenizer)
    return token_ids, hash_blocks(token_ids)


def _sampling(fields: wire.SamplingFields) -> Sampling:
    if fields == _DEFAULT_SAMPLING:
        return _NO_SAMPLING
    return Sampling(
        temperature=fields.temperature,
        top_p=fields.top_p,
        top_k=fields.top_k,
        min_p=fields.min_p,
        seed=fields.seed,
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        repetition_penalty=fields.repetition_penalty,
        stop=fields.stop,
        ignore_eos=fields.ignore_eos,
    )

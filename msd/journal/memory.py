"""A journal in memory: the contract of the durable one without its promise.

Results are kept for `retention_s`, per tenant within `max_result_bytes` and over all tenants within
`max_total_result_bytes`. When a tenant is over its bound its oldest *acknowledged* results go first; unacknowledged
ones stay until their retention ends: `is_full` then makes admission refuse new submits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import msgspec

from msd.config import JournalConfig
from msd.domain import Energy, Prompt, Request, Result
from msd.errors import JournalError
from msd.ports import Clock, JournalListener

_RESULT_OVERHEAD_BYTES = 2_000
_TOKEN_ID_BYTES = 36
"""An int object and its place in the tuple."""


class _Stored:
    __slots__ = ("acked", "content_hash", "num_bytes", "result", "stored_us")

    def __init__(self, result: Result, content_hash: bytes, stored_us: int) -> None:
        self.result = result
        self.content_hash = content_hash
        self.stored_us = stored_us
        text = result.text
        num_text_bytes = len(text) if text.isascii() else len(text.encode())
        self.num_bytes = _RESULT_OVERHEAD_BYTES + num_text_bytes + _TOKEN_ID_BYTES * len(result.token_ids)
        self.acked = False


class _TenantResults:
    __slots__ = ("acked", "by_client_id", "by_id", "num_bytes")

    def __init__(self) -> None:
        self.by_id: OrderedDict[str, _Stored] = OrderedDict()
        self.by_client_id: dict[str, str] = {}
        self.acked: OrderedDict[str, None] = OrderedDict()
        self.num_bytes = 0


class MemoryJournal:
    """Pending requests with their bodies, and the results of finished ones."""

    durable = False

    def __init__(self, config: JournalConfig, clock: Clock) -> None:
        self._clock = clock
        self._max_bytes = config.max_result_bytes
        self._max_total_bytes = config.max_total_result_bytes
        self._retention_us = int(config.retention_s * 1e6)
        self._num_bytes = 0
        self._pending: dict[str, tuple[Request, Prompt]] = {}
        self._tenants: dict[str, _TenantResults] = {}
        self._stored: dict[str, _Stored] = {}
        self._listener: JournalListener | None = None
        self._next_seq = 1
        self.num_repeated_completions = 0

    async def start(self, listener: JournalListener) -> list[Request]:
        """Nothing survived."""
        self._listener = listener
        return []

    def append(self, request: Request, prompt: Prompt) -> None:
        """Keep the request, unless its key names a stored result."""
        assert self._listener is not None, "append before start"
        tenant = self._tenants.get(request.tenant)
        if tenant is not None:
            existing = tenant.by_client_id.get(request.client_request_id)
            if existing is not None:
                stored = tenant.by_id[existing]
                self._listener.on_append_duplicate(request.request_id, existing, stored.content_hash)
                return
        self._pending[request.request_id] = (request, prompt)
        self._listener.on_appended(request.request_id, self._take_seq())

    def attempted(self, request_id: str, attempt: int) -> None:
        """Attempts need no memory here: they end with the process."""

    async def read_prompt(self, request_id: str) -> Prompt:
        """The body of a pending request."""
        pending = self._pending.get(request_id)
        if pending is None:
            raise JournalError(f"request {request_id} is not pending")
        return pending[1]

    def complete(self, result: Result) -> None:
        """Replace the pending request by its result."""
        assert self._listener is not None, "complete before start"
        request_id = result.outcome.request_id
        pending = self._pending.pop(request_id, None)
        if pending is None:
            self.num_repeated_completions += 1
            return
        seq = self._take_seq()
        now_us = self._clock.now_us()
        stored = _Stored(msgspec.structs.replace(result, seq=seq), pending[0].content_hash, now_us)
        tenant = self._tenants.get(result.tenant)
        if tenant is None:
            tenant = self._tenants[result.tenant] = _TenantResults()
        tenant.by_id[request_id] = self._stored[request_id] = stored
        tenant.by_client_id[result.client_request_id] = request_id
        tenant.num_bytes += stored.num_bytes
        self._num_bytes += stored.num_bytes
        self._expire(tenant, now_us)
        while self._is_over(tenant) and tenant.acked:
            self._drop(tenant, next(iter(tenant.acked)))
        self._listener.on_completed(request_id, seq)

    def settle(self, request_id: str, energy: Energy) -> None:
        """Put the settled energy into the stored result, if it is still there."""
        stored = self._stored.get(request_id)
        if stored is not None:
            outcome = msgspec.structs.replace(stored.result.outcome, energy=energy)
            stored.result = msgspec.structs.replace(stored.result, outcome=outcome)

    def is_full(self, tenant: str, client_request_id: str) -> bool:
        """Whether unacknowledged results fill the tenant's bound, or everybody's."""
        results = self._tenants.get(tenant)
        if results is None:
            return self._num_bytes > self._max_total_bytes
        if not self._is_over(results) or results.acked:
            return False
        self._expire(results, self._clock.now_us())
        return self._is_over(results) and client_request_id not in results.by_client_id

    async def find(
        self, tenant: str, request_id: str | None = None, client_request_id: str | None = None
    ) -> Result | None:
        """One stored result of this tenant."""
        results = self._tenants.get(tenant)
        if results is None:
            return None
        if request_id is None:
            request_id = results.by_client_id.get(client_request_id or "")
        stored = results.by_id.get(request_id) if request_id is not None else None
        return None if stored is None else stored.result

    async def fetch(self, tenant: str, since_seq: int, max_bytes: int) -> tuple[list[Result], int, bool]:
        """Stored results after `since_seq`, at least one if there is any, up to `max_bytes`."""
        results = self._tenants.get(tenant)
        found: list[Result] = []
        num_bytes, next_seq = 0, since_seq
        if results is not None:
            for stored in results.by_id.values():
                if stored.result.seq <= since_seq:
                    continue
                if found and num_bytes + stored.num_bytes > max_bytes:
                    return found, next_seq, True
                found.append(stored.result)
                num_bytes += stored.num_bytes
                next_seq = stored.result.seq
        return found, next_seq, False

    def acknowledge(self, tenant: str, request_ids: Sequence[str]) -> None:
        """These may go when room is needed."""
        results = self._tenants.get(tenant)
        if results is None:
            return
        for request_id in request_ids:
            stored = results.by_id.get(request_id)
            if stored is not None and not stored.acked:
                stored.acked = True
                results.acked[request_id] = None
        while self._is_over(results) and results.acked:
            self._drop(results, next(iter(results.acked)))

    async def stop(self) -> None:
        """Nothing to flush."""

    def _take_seq(self) -> int:
        seq = self._next_seq
        self._next_seq += 1
        return seq

    def _is_over(self, results: _TenantResults) -> bool:
        return results.num_bytes > self._max_bytes or self._num_bytes > self._max_total_bytes

    def _expire(self, results: _TenantResults, now_us: int) -> None:
        """Drop what is past its retention; the oldest stand first."""
        while results.by_id:
            request_id, oldest = next(iter(results.by_id.items()))
            if now_us - oldest.stored_us < self._retention_us:
                break
            self._drop(results, request_id)

    def _drop(self, results: _TenantResults, request_id: str) -> None:
        results.acked.pop(request_id, None)
        del self._stored[request_id]
        stored = results.by_id.pop(request_id)
        del results.by_client_id[stored.result.client_request_id]
        results.num_bytes -= stored.num_bytes
        self._num_bytes -= stored.num_bytes

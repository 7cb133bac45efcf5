"""`AsyncClient`: the same for asyncio; everything happens on the loop that opened it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Unpack

from msd import wire
from msd.client.connection import CurveKeys
from msd.client.driver import Driver
from msd.client.failures import AnswerTimeoutError, ClientClosedError, ClientFaultError
from msd.client.queries import Question, Reply, acknowledgements, check, reply_of
from msd.client.streams import RequestView, Stream
from msd.client.submits import SubmitFields, build_submit


class _Signal:
    """Wakes every task that waits for something to have changed."""

    __slots__ = ("_waiters",)

    def __init__(self) -> None:
        self._waiters: list[asyncio.Future[None]] = []

    def __call__(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def until(self, is_there: Callable[[], bool]) -> None:
        while not is_there():
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            finally:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)


class AsyncHandle(RequestView):
    """One request under way: `async for` over it for its Deltas, or `await handle.result()`."""

    def __init__(self, client: AsyncClient, stream: Stream) -> None:
        super().__init__(stream)
        self._client = client
        self._changed = _Signal()
        stream.on_change = self._changed

    def __aiter__(self) -> AsyncIterator[wire.Delta]:
        return self.deltas()

    async def deltas(self, timeout_s: float | None = None) -> AsyncIterator[wire.Delta]:
        """Deltas as they come, at most `timeout_s` apart. One with `index` 0 begins anew (the first engine was lost).

        Raises RequestError when the request fails, AnswerTimeoutError when nothing comes in time.
        """
        while True:
            if not self._stream.deltas:
                await self._wait(lambda: bool(self._stream.deltas) or self._stream.is_finished, timeout_s)
            if not self._stream.deltas:
                self._raise_failure()
                return
            yield self._stream.deltas.popleft()

    async def result(self, timeout_s: float | None = None) -> wire.Done:
        """The answer, with its whole text and token ids. Raises as `deltas` does."""
        await self._wait(lambda: self._stream.is_finished, timeout_s)
        self._raise_failure()
        assert self._stream.done is not None, "finished without failure"
        return self._stream.done

    def cancel(self) -> None:
        """Ask to end it; `result` then says what became of it (finish_reason `abort`, or an answer that was faster)."""
        self._client._cancel(self._stream)

    async def _wait(self, is_there: Callable[[], bool], timeout_s: float | None) -> None:
        self._client._check_process()
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.until(is_there)
        except TimeoutError as error:
            raise AnswerTimeoutError(
                f"no answer to {self.client_request_id} within {timeout_s:g} s", remedy="wait again, or cancel it"
            ) from error


class AsyncClient:
    """A connection to the daemon, for asyncio. Arguments as for `Client`; open it with `async with` or `connect`.

    `submit` and `cancel` do not wait and are plain calls. Of no use in a forked child (ForkedClientError).
    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        name: str = "msd.client",
        tenant: str | None = None,
        curve: CurveKeys | None = None,
        delta_credit: int = 256,
        timeout_s: float = 10.0,
        retry_s: float = 60.0,
        give_up_s: float = 60.0,
    ) -> None:
        self.timeout_s = timeout_s
        self._driver = Driver(
            endpoint,
            name=name,
            tenant=tenant,
            curve=curve,
            delta_credit=delta_credit,
            retry_s=retry_s,
            give_up_s=give_up_s,
        )
        self._connection = self._driver.connection
        self._state = self._driver.state
        self._changed = _Signal()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due_s = 0.0
        self._work_scheduled = False
        self._closed = False
        self._fault: ClientFaultError | None = None

    async def __aenter__(self) -> AsyncClient:
        try:
            await self.connect()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # --- requests ----------------------------------------------------------------------------------------------------

    def submit(self, prompt: str | None = None, *, max_tokens: int, **fields: Unpack[SubmitFields]) -> AsyncHandle:
        """Send a request; returns at once. Fields: docs/reference/protocol.md (`service_class` is the wire's `class`).

        Raises RequestError for what the daemon would refuse unread: `invalid_field`, `too_large`.
        """
        self._check_open()
        submit, payload = build_submit(prompt, max_tokens, fields)
        stream = self._state.submit(submit, payload, time.monotonic())
        self._schedule_work()
        return AsyncHandle(self, stream)

    async def fetch(
        self, request_ids: Sequence[str] | None = None, *, since_seq: int | None = None, max_bytes: int = 1024 * 1024
    ) -> wire.Results:
        """Stored results: of these ids, or everything after `since_seq` (go on with `next_seq` while `more`).

        Fetched results stay in the daemon, and use up this tenant's room there, until they are given to `acknowledge`.
        """
        ids = None if request_ids is None else tuple(request_ids)
        reply = await self._ask(wire.Fetch(request_ids=ids, since_seq=since_seq, max_bytes=max_bytes))
        assert isinstance(reply, wire.Results), "only Results answer a Fetch"
        return reply

    async def acknowledge(self, request_ids: Sequence[str]) -> None:
        """These results were received, by `fetch` say, and may be purged. Returns when the daemon has taken that in.

        The results of handles acknowledge themselves. Ids that it does not know are ignored.
        """
        for acked in acknowledgements(request_ids):
            await self._ask(self._state.new_ping(), after=acked)

    async def status(self) -> dict[str, object]:
        """What the daemon says of itself."""
        reply = await self._ask(wire.Status())
        assert isinstance(reply, wire.State), "only a State answers"
        return reply.daemon or {}

    async def state_of(self, request_id: str | None = None, client_request_id: str | None = None) -> wire.State:
        """Where one request of this tenant stands."""
        reply = await self._ask(wire.Status(request_id=request_id, client_request_id=client_request_id))
        assert isinstance(reply, wire.State), "only a State answers"
        return reply

    async def cancel(self, request_id: str | None = None, client_request_id: str | None = None) -> wire.Done:
        """End a request that another client of this tenant may have sent; returns what became of it."""
        reply = await self._ask(wire.Cancel(request_id=request_id, client_request_id=client_request_id))
        assert isinstance(reply, wire.Done), "an Error was raised"
        return reply

    async def ping(self) -> float:
        """Seconds to the daemon and back."""
        began_s = time.monotonic()
        await self._ask(self._state.new_ping())
        return time.monotonic() - began_s

    # --- connection --------------------------------------------------------------------------------------------------

    @property
    def endpoint(self) -> str:
        """Where it connects to."""
        return self._connection.endpoint

    @property
    def welcome(self) -> wire.Welcome | None:
        """What the daemon said in answer to hello (tenant, limits, `durable`); None without a session."""
        return self._state.welcome

    async def connect(self, timeout_s: float | None = None) -> wire.Welcome:
        """Wait for the daemon's welcome. Raises DaemonUnreachableError, or RequestError when it refuses this client."""
        self._check_open(opening=True)
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._connection.socket_fd, self._work)
            self._loop.add_reader(self._connection.monitor_fd, self._work)
            self._schedule_work()
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        state = self._state
        try:
            async with asyncio.timeout(limit_s):
                await self._changed.until(lambda: self._driver.has_word or self._fault is not None)
        except TimeoutError as error:
            raise self._driver.unreachable(limit_s) from error
        self._check_open()
        if state.refusal is not None:
            raise state.refusal
        assert state.welcome is not None, "waited for"
        return state.welcome

    async def close(self) -> None:
        """Acknowledge what was received and close; unfinished requests go on in the daemon. Idempotent."""
        self._check_process()
        if self._closed:
            return
        self._closed = True
        if self._fault is None:
            self._state.close()
            self._driver.flush()
        self._stop_looking()
        # Waits for the linger at most.
        await asyncio.to_thread(self._connection.close)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _check_process(self) -> None:
        self._connection.check_process()

    def _stop_looking(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._loop is not None:
            self._loop.remove_reader(self._connection.socket_fd)
            self._loop.remove_reader(self._connection.monitor_fd)

    def _check_open(self, *, opening: bool = False) -> None:
        self._connection.check_process()
        if self._fault is not None:
            raise self._fault
        if self._closed:
            raise ClientClosedError("the client is closed", remedy="make a new one")
        if self._loop is None and not opening:
            raise ClientClosedError("the client is not open", remedy="use it in `async with`, or await connect() first")

    def _cancel(self, stream: Stream) -> None:
        self._check_process()
        if not self._closed:
            self._state.cancel(stream)
            self._schedule_work()

    async def _ask(self, question: Question, after: wire.Acked | None = None) -> Reply:
        self._check_open()
        check(question)
        query = self._state.ask(question, time.monotonic(), after)
        signal = _Signal()
        query.on_change = signal
        self._schedule_work()
        try:
            async with asyncio.timeout(self.timeout_s):
                await signal.until(lambda: query.is_finished)
        except TimeoutError as error:
            if self._state.welcome is None:
                raise self._driver.unreachable(self.timeout_s) from error
            raise AnswerTimeoutError(
                f"no answer within {self.timeout_s:g} s", remedy="is the daemon overloaded?"
            ) from error
        finally:
            self._state.forget(query)
        return reply_of(query)

    def _schedule_work(self) -> None:
        """Send in the loop's next turn, together with what else is submitted in this one."""
        if not self._work_scheduled and self._loop is not None:
            self._work_scheduled = True
            self._loop.call_soon(self._work)

    def _work(self) -> None:
        """Everything that can be done without waiting. Reader callback, timer and next-turn call in one."""
        self._work_scheduled = False
        if self._closed or self._fault is not None:
            return
        had_word = self._driver.has_word
        try:
            is_more = self._driver.work(time.monotonic())
        except BaseException as error:
            self._fault = ClientFaultError("a fault ended the client", remedy="make a new client")
            self._fault.__cause__ = error
            self._stop_looking()
            self._state.fail(self._fault)
            self._changed()
            raise
        if self._driver.has_word and not had_word:
            self._changed()
        if is_more:
            self._schedule_work()
        self._set_timer()

    def _set_timer(self) -> None:
        now_s = time.monotonic()
        wait_s = self._driver.wait_s(now_s)
        if self._timer is not None:
            if wait_s is not None and now_s < self._timer_due_s <= now_s + wait_s:
                # It will look again when it fires.
                return
            self._timer.cancel()
            self._timer = None
        if wait_s is not None and self._loop is not None:
            self._timer_due_s = now_s + wait_s
            self._timer = self._loop.call_later(wait_s, self._work)

"""`Client`: blocking calls from any thread; one background thread owns the socket."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Unpack

import zmq

from msd import wire
from msd.client.connection import CurveKeys
from msd.client.driver import Driver
from msd.client.failures import AnswerTimeoutError, ClientClosedError, ClientFaultError
from msd.client.queries import Question, Reply, acknowledgements, check, reply_of
from msd.client.streams import RequestView, Stream
from msd.client.submits import SubmitFields, build_submit


class Handle(RequestView):
    """One request under way: iterate over it for its Deltas, or wait for its `result`. Usable from any thread."""

    def __init__(self, client: Client, stream: Stream, changed: threading.Condition) -> None:
        super().__init__(stream)
        self._client = client
        self._changed = changed

    def __iter__(self) -> Iterator[wire.Delta]:
        return self.deltas()

    def deltas(self, timeout_s: float | None = None) -> Iterator[wire.Delta]:
        """Deltas as they come, at most `timeout_s` apart. One with `index` 0 begins anew (the first engine was lost).

        Raises RequestError when the request fails, AnswerTimeoutError when nothing comes in time.
        """
        while True:
            with self._changed:
                self._wait(lambda: bool(self._stream.deltas) or self._stream.is_finished, timeout_s)
                if not self._stream.deltas:
                    self._raise_failure()
                    return
                delta = self._stream.deltas.popleft()
            yield delta

    def result(self, timeout_s: float | None = None) -> wire.Done:
        """The answer, with its whole text and token ids. Raises as `deltas` does."""
        with self._changed:
            self._wait(lambda: self._stream.is_finished, timeout_s)
            self._raise_failure()
            assert self._stream.done is not None, "finished without failure"
            return self._stream.done

    def cancel(self) -> None:
        """Ask to end it; `result` then says what became of it (finish_reason `abort`, or an answer that was faster)."""
        self._client._cancel(self._stream)

    def _wait(self, is_there: Callable[[], bool], timeout_s: float | None) -> None:
        self._client._connection.check_process()
        if not self._changed.wait_for(is_there, timeout_s):
            raise AnswerTimeoutError(
                f"no answer to {self.client_request_id} within {timeout_s:g} s",
                remedy="wait again, or cancel it",
            )


class Client:
    """A connection to the daemon, for code that blocks.

    `endpoint`: `ipc:///path` or `tcp://host:port`; without one `$MSD_ENDPOINT`, else the default socket. As a context
    manager it waits until the daemon has answered, at most `timeout_s`, which is also the limit of `fetch`, `status`
    and `ping`. `retry_s`: how long retryable refusals are tried again (0: never). `give_up_s`: how long a lost daemon
    is waited for before requests fail with DaemonUnreachableError.

    Threads may share one client and its handles. It is of no use in a forked child (ForkedClientError).
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
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._closing = False
        self._fault: ClientFaultError | None = None
        self._is_woken = False
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        self._thread = threading.Thread(target=self._run, name="msd.client", daemon=True)
        self._thread.start()

    def __enter__(self) -> Client:
        try:
            self.connect()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- requests ----------------------------------------------------------------------------------------------------

    def submit(self, prompt: str | None = None, *, max_tokens: int, **fields: Unpack[SubmitFields]) -> Handle:
        """Send a request; returns at once. Fields: docs/reference/protocol.md (`service_class` is the wire's `class`).

        Raises RequestError for what the daemon would refuse unread: `invalid_field`, `too_large`.
        """
        self._connection.check_process()
        submit, payload = build_submit(prompt, max_tokens, fields)
        changed = threading.Condition(self._lock)
        with self._lock:
            self._check_open()
            stream = self._state.submit(submit, payload, time.monotonic())
            stream.on_change = changed.notify_all
            self._wake()
        return Handle(self, stream, changed)

    def fetch(
        self, request_ids: Sequence[str] | None = None, *, since_seq: int | None = None, max_bytes: int = 1024 * 1024
    ) -> wire.Results:
        """Stored results: of these ids, or everything after `since_seq` (go on with `next_seq` while `more`).

        Fetched results stay in the daemon, and use up this tenant's room there, until they are given to `acknowledge`.
        """
        ids = None if request_ids is None else tuple(request_ids)
        reply = self._ask(wire.Fetch(request_ids=ids, since_seq=since_seq, max_bytes=max_bytes))
        assert isinstance(reply, wire.Results), "only Results answer a Fetch"
        return reply

    def acknowledge(self, request_ids: Sequence[str]) -> None:
        """These results were received, by `fetch` say, and may be purged. Returns when the daemon has taken that in.

        The results of handles acknowledge themselves. Ids that it does not know are ignored.
        """
        for acked in acknowledgements(request_ids):
            with self._lock:
                ping = self._state.new_ping()
            self._ask(ping, after=acked)

    def status(self) -> dict[str, object]:
        """What the daemon says of itself."""
        reply = self._ask(wire.Status())
        assert isinstance(reply, wire.State), "only a State answers"
        return reply.daemon or {}

    def state_of(self, request_id: str | None = None, client_request_id: str | None = None) -> wire.State:
        """Where one request of this tenant stands."""
        reply = self._ask(wire.Status(request_id=request_id, client_request_id=client_request_id))
        assert isinstance(reply, wire.State), "only a State answers"
        return reply

    def cancel(self, request_id: str | None = None, client_request_id: str | None = None) -> wire.Done:
        """End a request that another client of this tenant may have sent; returns what became of it."""
        reply = self._ask(wire.Cancel(request_id=request_id, client_request_id=client_request_id))
        assert isinstance(reply, wire.Done), "an Error was raised"
        return reply

    def ping(self) -> float:
        """Seconds to the daemon and back."""
        began_s = time.monotonic()
        with self._lock:
            ping = self._state.new_ping()
        self._ask(ping)
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

    def connect(self, timeout_s: float | None = None) -> wire.Welcome:
        """Wait for the daemon's welcome. Raises DaemonUnreachableError, or RequestError when it refuses this client."""
        self._connection.check_process()
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        with self._lock:
            self._check_open()
            self._changed.wait_for(lambda: self._driver.has_word or self._fault is not None, limit_s)
            self._check_open()
            if self._state.refusal is not None:
                raise self._state.refusal
            if self._state.welcome is None:
                raise self._driver.unreachable(limit_s)
            return self._state.welcome

    def close(self) -> None:
        """Acknowledge what was received and close; unfinished requests go on in the daemon. Idempotent."""
        self._connection.check_process()
        with self._lock:
            if self._closing:
                return
            self._closing = True
            self._wake()
        self._thread.join()
        os.close(self._wake_read)
        os.close(self._wake_write)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _cancel(self, stream: Stream) -> None:
        self._connection.check_process()
        with self._lock:
            if not self._closing:
                self._state.cancel(stream)
                self._wake()

    def _ask(self, question: Question, after: wire.Acked | None = None) -> Reply:
        self._connection.check_process()
        check(question)
        changed = threading.Condition(self._lock)
        with self._lock:
            self._check_open()
            query = self._state.ask(question, time.monotonic(), after)
            query.on_change = changed.notify_all
            self._wake()
            if not changed.wait_for(lambda: query.is_finished, self.timeout_s):
                self._state.forget(query)
                if self._state.welcome is None:
                    raise self._driver.unreachable(self.timeout_s)
                raise AnswerTimeoutError(f"no answer within {self.timeout_s:g} s", remedy="is the daemon overloaded?")
        return reply_of(query)

    def _check_open(self) -> None:
        if self._fault is not None:
            raise self._fault
        if self._closing:
            raise ClientClosedError("the client is closed", remedy="make a new one")

    def _wake(self) -> None:
        """Make the thread look at what is to be sent; with the lock held."""
        if not self._is_woken:
            self._is_woken = True
            os.write(self._wake_write, b"\0")

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            with self._lock:
                self._fault = ClientFaultError("the client's thread ended by a fault", remedy="make a new client")
                self._fault.__cause__ = error
                self._state.fail(self._fault)
                self._changed.notify_all()
            raise
        finally:
            self._connection.close()

    def _serve(self) -> None:
        poller = zmq.Poller()
        for fd in (self._connection.socket_fd, self._connection.monitor_fd, self._wake_read):
            poller.register(fd, zmq.POLLIN)
        timeout_s: float | None = 0.0
        while True:
            poller.poll(None if timeout_s is None else math.ceil(timeout_s * 1_000))
            with self._lock:
                if self._is_woken:
                    os.read(self._wake_read, 64)
                    self._is_woken = False
                had_word = self._driver.has_word
                is_more = self._driver.work(time.monotonic())
                if self._driver.has_word and not had_word:
                    self._changed.notify_all()
                if self._closing:
                    break
                timeout_s = 0.0 if is_more else self._driver.wait_s(time.monotonic())
        with self._lock:
            self._state.close()
            self._driver.flush()

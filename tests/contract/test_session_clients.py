"""msd.client against a real front door: both clients, reconnects, refusals, threads, forks."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import zmq

from msd import wire
from msd.client import (
    AnswerTimeoutError,
    AsyncClient,
    Client,
    ClientClosedError,
    ClientFaultError,
    CurveKeys,
    DaemonUnreachableError,
    ForkedClientError,
    RequestError,
)
from msd.config import TenantConfig, ZmqIngressConfig
from msd.errors import ConfigError, MsdError
from tests.contract.front_door import TIMEOUT_S, Producer, open_door


@pytest.fixture
def config(tmp_path: Path) -> ZmqIngressConfig:
    return ZmqIngressConfig(endpoints=(f"ipc://{tmp_path}/msd.sock",))


def until(is_so: Callable[[], bool]) -> None:
    until_s = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert time.monotonic() < until_s, "did not happen in time"
        time.sleep(0.01)


def run_async(config: ZmqIngressConfig, scenario: Callable[[AsyncClient], Awaitable[None]]) -> None:
    """Run `scenario` with an open AsyncClient on a door of its own."""

    async def main(endpoint: str) -> None:
        async with asyncio.timeout(TIMEOUT_S), AsyncClient(endpoint) as client:
            await scenario(client)

    with open_door(config) as door:
        door.house.num_tokens, door.house.pause_s = 10, 0.005
        asyncio.run(main(door.endpoint))


# --- requests --------------------------------------------------------------------------------------------------------


def test_a_stream_is_read_and_acknowledged(config: ZmqIngressConfig) -> None:
    with open_door(config) as door:
        door.house.num_tokens, door.house.pause_s = 10, 0.005
        with Client(door.endpoint) as client:
            handle = client.submit("hello", max_tokens=10)
            deltas = list(handle)
            result = handle.result()
            assert [delta.index for delta in deltas] == sorted(delta.index for delta in deltas)
            assert "".join(delta.text for delta in deltas) == result.text == handle.text
            assert result.token_ids == tuple(range(10))
            assert (handle.mode, handle.done, handle.durable) == ("noop", True, False)
            until(lambda: door.house.acknowledged == [handle.request_id])
            assert client.welcome is not None
            assert not client.welcome.durable


def test_asyncio_reads_a_stream(config: ZmqIngressConfig) -> None:
    async def scenario(client: AsyncClient) -> None:
        handle = client.submit("hello", max_tokens=10)
        text = "".join([delta.text async for delta in handle])
        assert (await handle.result()).text == text
        assert await client.ping() < 5
        assert await client.status() == {"tenant": "local"}

    run_async(config, scenario)


def test_asyncio_runs_many_at_once(config: ZmqIngressConfig) -> None:
    async def scenario(client: AsyncClient) -> None:
        handles = [client.submit(f"{n}", max_tokens=10, stream=n % 2 == 0) for n in range(1_000)]
        results = [await handle.result() for handle in handles]
        assert len({result.request_id for result in results}) == 1_000
        assert {result.text for result in results} == {"".join(f"{n} " for n in range(10))}

    run_async(config, scenario)


def test_threads_share_a_client(config: ZmqIngressConfig) -> None:
    with open_door(config) as door, Client(door.endpoint) as client:
        texts: list[str | None] = []

        def work() -> None:
            for _ in range(50):
                texts.append(client.submit("hello", max_tokens=1).result(TIMEOUT_S).text)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT_S)
        assert texts == ["0 "] * 400


def test_cancel_ends_a_stream_and_a_waiting_request(config: ZmqIngressConfig) -> None:
    with open_door(config) as door, Client(door.endpoint) as client:
        door.house.num_tokens, door.house.pause_s = 10_000, 0.005
        running = client.submit("hello", max_tokens=10)
        next(iter(running))
        running.cancel()
        assert running.result(TIMEOUT_S).finish_reason == "abort"
        door.house.hold = True
        waiting = client.submit("hello", max_tokens=10)
        until(lambda: waiting.request_id is not None)
        assert client.cancel(request_id=waiting.request_id).finish_reason == "abort"
        assert waiting.result(TIMEOUT_S).finish_reason == "abort"
        with pytest.raises(RequestError, match="not_found") as caught:
            client.cancel(client_request_id="never")
        assert caught.value.code == "not_found"


def test_asyncio_cancels_and_asks(config: ZmqIngressConfig) -> None:
    async def scenario(client: AsyncClient) -> None:
        handle = client.submit("hello", max_tokens=10)
        handle.cancel()
        result = await handle.result()
        assert result.finish_reason in ("abort", "length")
        if result.request_id:
            page = await client.fetch([result.request_id])
            assert [item.request_id for item in page.items] == [result.request_id]
        with pytest.raises(RequestError, match="not_found"):
            await client.cancel(request_id="never")
        with pytest.raises(RequestError, match="invalid_field"):
            await client.fetch()

    run_async(config, scenario)


def test_results_are_fetched_by_id_and_in_order(config: ZmqIngressConfig) -> None:
    with open_door(config) as door, Client(door.endpoint) as client:
        done = [client.submit("hello", max_tokens=1).result(TIMEOUT_S) for _ in range(5)]
        by_id = client.fetch([done[3].request_id])
        assert [item.request_id for item in by_id.items] == [done[3].request_id]
        page = client.fetch(since_seq=2)
        assert [item.request_id for item in page.items] == [result.request_id for result in done[2:]]
        first = client.fetch(since_seq=0, max_bytes=1)
        assert (len(first.items), first.more) == (1, True)


def test_fetched_results_are_acknowledged_only_on_demand(config: ZmqIngressConfig) -> None:
    with open_door(config) as door, Producer(door.endpoint) as producer, Client(door.endpoint) as client:
        for n in range(300):
            producer.send(wire.Submit(client_request_id=f"{n}", max_tokens=1, prompt="hello", stream=False))
        ids = [producer.until(wire.Done).request_id for _ in range(300)]
        fetched = [item.request_id or "" for item in client.fetch(since_seq=0).items]
        assert sorted(fetched) == sorted(ids)
        client.ping()
        assert door.house.acknowledged == []
        client.acknowledge(fetched)
        assert door.house.acknowledged == fetched, "the daemon has them when the call returns"
        with pytest.raises(RequestError, match="invalid_field"):
            client.acknowledge(["x" * 200])


def test_asyncio_acknowledges_what_it_fetched(config: ZmqIngressConfig) -> None:
    async def main(endpoint: str) -> None:
        async with AsyncClient(endpoint) as client:
            await client.acknowledge([])
            await client.acknowledge(["r1", "r2"])

    with open_door(config) as door:
        asyncio.run(main(door.endpoint))
        assert door.house.acknowledged == ["r1", "r2"]


def test_a_retryable_refusal_is_waited_out(config: ZmqIngressConfig) -> None:
    with open_door(config) as door, Client(door.endpoint) as client:
        door.house.refuse_next.extend([("queue_full", 50), ("engine_unavailable", None)])
        assert client.submit("hello", max_tokens=1).result(TIMEOUT_S).text == "0 "
        door.house.refuse_next.append(("context_overflow", None))
        with pytest.raises(RequestError, match="context_overflow") as caught:
            client.submit("hello", max_tokens=1).result(TIMEOUT_S)
        assert not caught.value.retryable


def test_a_time_limit_ends_the_wait_and_not_the_request(config: ZmqIngressConfig) -> None:
    with open_door(config) as door, Client(door.endpoint) as client:
        door.house.hold = True
        handle = client.submit("hello", max_tokens=1)
        with pytest.raises(AnswerTimeoutError):
            handle.result(0.05)
        with pytest.raises(TimeoutError):
            next(handle.deltas(0.05))
        until(lambda: bool(door.house.held))
        door.call(door.house.release)
        assert handle.result(TIMEOUT_S).text == "0 "


def test_what_no_daemon_would_take_is_refused_here(config: ZmqIngressConfig) -> None:
    with open_door(config) as door, Client(door.endpoint) as client:
        for code, fields in (
            ("invalid_field", {"prompt": "x" * (wire.MAX_PROMPT_BYTES + 1)}),
            ("invalid_field", {"prompt": ""}),
            ("too_large", {"messages": [{"role": "user", "content": "x" * 1_000_000}] * 5}),
        ):
            with pytest.raises(RequestError) as caught:
                client.submit(max_tokens=1, **fields)
            assert caught.value.code == code
        assert door.stats()["num_received"] == 1


# --- connections -----------------------------------------------------------------------------------------------------


def test_a_restarted_daemon_gets_what_it_forgot_once_more(config: ZmqIngressConfig) -> None:
    with open_door(config, epoch="e1") as door:
        client = Client(door.endpoint)
        client.connect()
        door.house.num_tokens, door.house.pause_s = 1_000, 0.01
        running = client.submit("runs", max_tokens=10)
        next(iter(running))
        door.house.hold = True
        waiting = client.submit("waits", max_tokens=10)
        until(lambda: waiting.request_id is not None)
        old_ids = {running.request_id, waiting.request_id}
    with open_door(config, epoch="e2") as door, client:
        results = [running.result(TIMEOUT_S), waiting.result(TIMEOUT_S)]
        assert {result.text for result in results} == {"0 "}, (
            "the second daemon's answer, without the first one's tokens"
        )
        assert not old_ids & {result.request_id for result in results}
        assert client.connect().epoch == "e2"


def test_asyncio_comes_back_to_a_restarted_daemon(config: ZmqIngressConfig) -> None:
    async def first(endpoint: str) -> AsyncClient:
        client = AsyncClient(endpoint)
        await client.connect()
        return client

    async def main() -> None:
        loop = asyncio.get_running_loop()
        door_context = open_door(config, epoch="e1")
        door = await loop.run_in_executor(None, door_context.__enter__)
        door.house.hold = True
        client = await first(door.endpoint)
        handle = client.submit("waits", max_tokens=10)
        await loop.run_in_executor(None, until, lambda: handle.request_id is not None)
        await loop.run_in_executor(None, door_context.__exit__, None, None, None)
        door_context = open_door(config, epoch="e2")
        await loop.run_in_executor(None, door_context.__enter__)
        try:
            assert (await handle.result(TIMEOUT_S)).text == "0 "
            await client.close()
        finally:
            await loop.run_in_executor(None, door_context.__exit__, None, None, None)

    asyncio.run(main())


def test_a_closed_session_is_taken_up_again_without_a_gap(config: ZmqIngressConfig) -> None:
    with open_door(config) as door, Client(door.endpoint) as client:
        door.house.num_tokens, door.house.pause_s = 60, 0.01
        handle = client.submit("hello", max_tokens=60)
        deltas = handle.deltas(TIMEOUT_S)
        first = next(deltas)
        door.call(lambda: next(iter(door.ingress._desk.sessions.values())).close("test"))
        client.ping()
        rest = list(deltas)
        assert first.text + "".join(delta.text for delta in rest) == "".join(f"{n} " for n in range(60))
        assert handle.result().finish_reason == "length"
        assert door.house.num_executions == 1


def test_nobody_there_is_said_in_time() -> None:
    began_s = time.monotonic()
    with pytest.raises(DaemonUnreachableError, match="msd serve"), Client("ipc:///nowhere/msd.sock", timeout_s=0.2):
        pass
    client = Client("ipc:///nowhere/msd.sock", timeout_s=0.2, give_up_s=0.3)
    with pytest.raises(DaemonUnreachableError):
        client.submit("hello", max_tokens=1).result(TIMEOUT_S)
    with pytest.raises(DaemonUnreachableError):
        client.status()
    client.close()
    assert time.monotonic() - began_s < 5


def test_a_user_without_a_tenant_hears_so(config: ZmqIngressConfig) -> None:
    others = (TenantConfig(name="others", uids=(4_000_000_000,)),)
    with (
        open_door(config, tenants=others) as door,
        pytest.raises(RequestError, match="unauthenticated") as caught,
        Client(door.endpoint),
    ):
        pass
    assert caught.value.code == "unauthenticated"
    assert caught.value.remedy


def test_keys_open_tcp_and_a_strangers_do_not(tmp_path: Path) -> None:
    (server_public, server_secret), (public, secret), (_, stranger) = (zmq.curve_keypair() for _ in range(3))
    keys = tmp_path / "keys"
    keys.mkdir()
    (keys / "team.key").write_bytes(public)
    secret_file = tmp_path / "secret"
    secret_file.write_bytes(server_secret)
    secret_file.chmod(0o600)
    config = ZmqIngressConfig(
        endpoints=("tcp://127.0.0.1:*",), curve_secret_key_file=str(secret_file), curve_keys_dir=str(keys)
    )
    with open_door(config) as door:
        with Client(door.endpoint, curve=CurveKeys(server_public.decode(), secret.decode())) as client:
            assert client.welcome is not None
            assert client.welcome.tenant == "team"
            assert client.submit("hello", max_tokens=1).result(TIMEOUT_S).text == "0 "
        keys_of_stranger = CurveKeys(server_public.decode(), stranger.decode())
        with pytest.raises(RequestError, match="unauthenticated"), Client(door.endpoint, curve=keys_of_stranger):
            pass


def test_a_revoked_key_ends_the_requests_of_its_client(tmp_path: Path) -> None:
    (server_public, server_secret), (public, secret) = (zmq.curve_keypair() for _ in range(2))
    keys = tmp_path / "keys"
    keys.mkdir()
    (keys / "team.key").write_bytes(public)
    secret_file = tmp_path / "secret"
    secret_file.write_bytes(server_secret)
    secret_file.chmod(0o600)
    config = ZmqIngressConfig(
        endpoints=("tcp://127.0.0.1:*",), curve_secret_key_file=str(secret_file), curve_keys_dir=str(keys)
    )
    with (
        open_door(config) as door,
        Client(door.endpoint, curve=CurveKeys(server_public.decode(), secret.decode())) as client,
    ):
        door.house.hold = True
        waiting = client.submit("hello", max_tokens=1)
        until(lambda: bool(door.house.held))
        (keys / "team.key").unlink()
        with pytest.raises(RequestError, match="unauthenticated"):
            waiting.result(TIMEOUT_S)
        door.call(door.house.release)
        with pytest.raises(RequestError, match="unauthenticated"):
            client.submit("hello", max_tokens=1).result(TIMEOUT_S)
        with pytest.raises(RequestError, match="unauthenticated"):
            client.fetch(since_seq=0)
        assert door.house.num_executions == 1


def test_an_endpoint_that_is_none_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="endpoint"):
        Client("nonsense")


# --- life ------------------------------------------------------------------------------------------------------------


def test_a_closed_client_ends_its_handles_and_refuses_more(config: ZmqIngressConfig) -> None:
    with open_door(config) as door:
        door.house.hold = True
        client = Client(door.endpoint)
        client.connect()
        handle = client.submit("hello", max_tokens=1)
        client.close()
        client.close()
        with pytest.raises(ClientClosedError):
            handle.result(1)
        with pytest.raises(ClientClosedError):
            client.submit("hello", max_tokens=1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_in_the_clients_thread_ends_all_waits(
    config: ZmqIngressConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_door(config) as door, Client(door.endpoint, timeout_s=TIMEOUT_S) as client:
        door.house.hold = True
        handle = client.submit("hello", max_tokens=1)
        until(lambda: handle.request_id is not None)
        failures: list[MsdError] = []

        def wait_for(ask: Callable[[], object]) -> None:
            try:
                ask()
            except MsdError as failure:
                failures.append(failure)

        def fail() -> None:
            raise RuntimeError("a fault")

        thread = threading.Thread(target=wait_for, args=(handle.result,))
        thread.start()
        monkeypatch.setattr(client._connection, "receive", fail)
        # Without the fix both of these hang: nobody answers the one, nobody looks at the other.
        wait_for(client.status)
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
        assert [type(failure) for failure in failures] == [ClientFaultError] * 2
        assert isinstance(failures[0].__cause__, RuntimeError)
        for use in (client.connect, client.ping, lambda: client.submit("hello", max_tokens=1)):
            with pytest.raises(ClientFaultError):
                use()


def test_a_fault_in_asyncios_callback_ends_all_waits(config: ZmqIngressConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(endpoint: str) -> None:
        seen: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: seen.append(context.get("exception")))
        async with asyncio.timeout(TIMEOUT_S), AsyncClient(endpoint, timeout_s=TIMEOUT_S) as client:

            def fail() -> None:
                raise RuntimeError("a fault")

            handle = client.submit("hello", max_tokens=1)
            monkeypatch.setattr(client._connection, "receive", fail)
            for wait in (handle.result(), client.status()):
                with pytest.raises(ClientFaultError):
                    await wait
            with pytest.raises(ClientFaultError):
                client.submit("hello", max_tokens=1)
            with pytest.raises(ClientFaultError):
                await client.connect()
        assert [type(error) for error in seen] == [RuntimeError], "raised once, to the loop's handler"

    with open_door(config) as door:
        door.house.hold = True
        asyncio.run(main(door.endpoint))


def test_asyncio_refuses_use_before_it_is_open_and_after_it_is_closed(config: ZmqIngressConfig) -> None:
    async def main() -> None:
        client = AsyncClient("ipc:///nowhere/msd.sock")
        with pytest.raises(ClientClosedError):
            client.submit("hello", max_tokens=1)
        await client.close()
        with pytest.raises(ClientClosedError):
            await client.connect()

    asyncio.run(main())


def test_a_client_leaves_no_thread_and_no_descriptor_behind(config: ZmqIngressConfig) -> None:
    def num_descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    with open_door(config) as door:
        for _ in range(2):
            with Client(door.endpoint) as client:
                client.ping()
        before = threading.active_count()
        until(lambda: door.stats()["num_sessions"] >= 0)
        num_before = num_descriptors()
        for _ in range(5):
            with Client(door.endpoint) as client:
                client.ping()
        assert threading.active_count() == before
        # The door's side of a connection is closed by libzmq's thread, a moment later.
        until(lambda: num_descriptors() <= num_before)


FORK = """
import os, sys, warnings
warnings.simplefilter("ignore")
from msd.client import Client, ForkedClientError
client = Client("ipc:///nowhere/msd.sock")
child = os.fork()
if child == 0:
    try:
        client.submit("hello", max_tokens=1)
    except ForkedClientError:
        os._exit(42)
    os._exit(1)
_, status = os.waitpid(child, 0)
client.close()
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_forked_child_is_refused() -> None:
    assert issubclass(ForkedClientError, Exception)
    done = subprocess.run([sys.executable, "-c", FORK], timeout=60, capture_output=True, text=True)
    assert done.returncode == 42, done.stderr


IMPORTS = """
import sys
import msd.client
optional = {"typing_extensions", "cython_runtime"}  # pyzmq takes them when they are there
allowed = {"msd", "zmq", "msgspec"} | optional | set(sys.stdlib_module_names) | set(sys.builtin_module_names)
names = {name.partition(".")[0] for name in sys.modules}
strangers = sorted(name for name in names - allowed if not name.startswith(("_", "__")))
print(*strangers)
"""


def test_importing_the_client_needs_pyzmq_and_msgspec_only() -> None:
    # -S: no site packages' start-up files, which import what they like.
    packages = [path for path in sys.path if path.endswith("site-packages")]
    env = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *packages])}
    done = subprocess.run(
        [sys.executable, "-S", "-c", IMPORTS], timeout=60, capture_output=True, text=True, env=env, check=True
    )
    assert done.stdout.strip() == ""

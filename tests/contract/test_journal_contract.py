"""What every journal promises to the daemon; the same suite runs on each implementation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from msd.config import JournalConfig
from msd.domain import Energy, Outcome, Prompt, Request, Result
from msd.errors import JournalError
from msd.journal.memory import MemoryJournal
from msd.ports import Journal


class HandClock:
    """Moved by the test."""

    t_us = 0

    def now_us(self) -> int:
        return HandClock.t_us


RETENTION_S = 100.0
JOURNALS: dict[str, Callable[[int], Journal]] = {
    "memory": lambda max_bytes: MemoryJournal(
        JournalConfig(max_result_bytes=max_bytes, max_total_result_bytes=2 * max_bytes, retention_s=RETENTION_S),
        HandClock(),
    ),
}


class Listener:
    def __init__(self) -> None:
        self.heard: list[tuple[object, ...]] = []

    def on_appended(self, request_id: str, seq: int) -> None:
        self.heard.append(("appended", request_id, seq))

    def on_append_duplicate(self, request_id: str, existing_id: str, content_hash: bytes) -> None:
        self.heard.append(("duplicate", request_id, existing_id, content_hash))

    def on_append_failed(self, request_id: str, message: str) -> None:
        self.heard.append(("failed", request_id, message))

    def on_completed(self, request_id: str, seq: int) -> None:
        self.heard.append(("completed", request_id, seq))

    def kinds(self) -> list[tuple[object, object]]:
        return [(event[0], event[1]) for event in self.heard]


@pytest.fixture(params=sorted(JOURNALS))
def make(request: pytest.FixtureRequest) -> Callable[[int], Journal]:
    return JOURNALS[request.param]


def a_request(request_id: str, client_request_id: str = "", tenant: str = "t") -> Request:
    return Request(
        request_id=request_id,
        client_request_id=client_request_id or request_id,
        tenant=tenant,
        content_hash=b"hash of " + (client_request_id or request_id).encode(),
        received_us=1,
        num_prompt_tokens=2,
        max_tokens=4,
    )


def a_result(request: Request, text: str = "text") -> Result:
    outcome = Outcome(request_id=request.request_id, attempt=1, finish_reason="stop")
    return Result(outcome=outcome, client_request_id=request.client_request_id, tenant=request.tenant, text=text)


PROMPT = Prompt(token_ids=(5, 6))


def run(make: Callable[[int], Journal], body: Callable[[Journal, Listener], object], max_bytes: int = 1 << 20) -> None:
    async def main() -> None:
        journal, listener = make(max_bytes), Listener()
        assert await journal.start(listener) == []
        await body(journal, listener)  # type: ignore[misc]
        await journal.stop()

    asyncio.run(main())


def test_a_request_is_kept_until_it_is_complete(make: Callable[[int], Journal]) -> None:
    async def body(journal: Journal, listener: Listener) -> None:
        request = a_request("r1")
        journal.append(request, PROMPT)
        assert await journal.read_prompt("r1") == PROMPT
        assert await journal.find("t", "r1") is None
        journal.attempted("r1", 1)
        journal.complete(a_result(request))
        assert listener.kinds() == [("appended", "r1"), ("completed", "r1")]
        with pytest.raises(JournalError):
            await journal.read_prompt("r1")
        found = await journal.find("t", "r1")
        assert found is not None
        assert (found.text, found.seq) == ("text", listener.heard[-1][2])
        assert await journal.find("t", client_request_id="r1") == found

    run(make, body)


def test_a_second_terminal_state_changes_nothing(make: Callable[[int], Journal]) -> None:
    async def body(journal: Journal, listener: Listener) -> None:
        request = a_request("r1")
        journal.append(request, PROMPT)
        journal.complete(a_result(request, "first"))
        journal.complete(a_result(request, "second"))
        found = await journal.find("t", "r1")
        assert found is not None
        assert found.text == "first"
        assert listener.kinds().count(("completed", "r1")) == 1

    run(make, body)


def test_a_finished_key_is_answered_with_the_first_request(make: Callable[[int], Journal]) -> None:
    async def body(journal: Journal, listener: Listener) -> None:
        first = a_request("r1", "key")
        journal.append(first, PROMPT)
        journal.complete(a_result(first))
        journal.append(a_request("r2", "key"), PROMPT)
        assert listener.heard[-1] == ("duplicate", "r2", "r1", first.content_hash)
        journal.append(a_request("r3", "key", tenant="other"), PROMPT)
        assert listener.heard[-1][:2] == ("appended", "r3"), "another tenant's key is another key"

    run(make, body)


def test_results_are_another_tenants_secret(make: Callable[[int], Journal]) -> None:
    async def body(journal: Journal, listener: Listener) -> None:
        request = a_request("r1")
        journal.append(request, PROMPT)
        journal.complete(a_result(request))
        assert await journal.find("other", "r1") is None
        assert await journal.find("other", client_request_id="r1") is None
        assert (await journal.fetch("other", 0, 1 << 20))[0] == []

    run(make, body)


def test_fetch_pages_through_everything_in_order(make: Callable[[int], Journal]) -> None:
    async def body(journal: Journal, listener: Listener) -> None:
        for number in range(20):
            request = a_request(f"r{number}")
            journal.append(request, PROMPT)
            journal.complete(a_result(request, "x" * 100))
        seen, since, pages, more = [], 0, 0, True
        while more:
            results, since, more = await journal.fetch("t", since, 3_000)
            assert results
            seen += [result.outcome.request_id for result in results]
            pages += 1
        assert seen == [f"r{number}" for number in range(20)]
        assert pages > 1
        one, _, _ = await journal.fetch("t", 0, 1)
        assert len(one) == 1, "a result larger than the bound still comes, alone"

    run(make, body)


def test_only_acknowledged_results_make_room(make: Callable[[int], Journal]) -> None:
    async def body(journal: Journal, listener: Listener) -> None:
        requests = [a_request(f"r{number}") for number in range(8)]
        for request in requests[:4]:
            journal.append(request, PROMPT)
            journal.complete(a_result(request, "x" * 2_000))
        assert journal.is_full("t", "new")
        assert not journal.is_full("t", "r1"), "a repeat needs no room: it has its result"
        assert not journal.is_full("other", "new")
        assert await journal.find("t", "r0") is not None, "nobody has acknowledged it: it stays beyond the bound"
        journal.acknowledge("t", ["r0", "r1", "unknown"])
        journal.acknowledge("other", ["r2"])
        assert await journal.find("t", "r0") is None
        assert await journal.find("t", "r2") is not None
        for request in requests[4:]:
            journal.append(request, PROMPT)
            journal.complete(a_result(request, ""))
        assert await journal.find("t", "r7") is not None

    run(make, body, max_bytes=10_000)


def test_settled_energy_replaces_the_provisional(make: Callable[[int], Journal]) -> None:
    async def body(journal: Journal, listener: Listener) -> None:
        request = a_request("r1")
        journal.append(request, PROMPT)
        journal.complete(a_result(request))
        energy = Energy(energy_mj=7, dynamic_mj=5, static_mj=2, source="simulated", settled=True)
        journal.settle("r1", energy)
        journal.settle("never was", energy)
        found = await journal.find("t", "r1")
        assert found is not None
        assert found.outcome.energy == energy

    run(make, body)


def test_retention_ends_what_nobody_fetches(make: Callable[[int], Journal]) -> None:
    async def body(journal: Journal, listener: Listener) -> None:
        for number in range(4):
            journal.append(a_request(f"r{number}"), PROMPT)
            journal.complete(a_result(a_request(f"r{number}"), "x" * 2_000))
        assert journal.is_full("t", "new")
        HandClock.t_us += int(RETENTION_S * 1e6) + 1
        assert not journal.is_full("t", "new")
        assert await journal.find("t", "r0") is None
        journal.append(a_request("again", "r0"), PROMPT)
        assert listener.heard[-1][:2] == ("appended", "again"), "its key is free again"

    run(make, body, max_bytes=10_000)


def test_all_tenants_together_are_bounded(make: Callable[[int], Journal]) -> None:
    async def body(journal: Journal, listener: Listener) -> None:
        for tenant in ("a", "b", "c"):
            for number in range(2):
                request = a_request(f"{tenant}{number}", tenant=tenant)
                journal.append(request, PROMPT)
                journal.complete(a_result(request, "x" * 2_000))
        assert journal.is_full("d", "new"), "each is within its bound, all together are not"

    run(make, body, max_bytes=10_000)

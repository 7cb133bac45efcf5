"""An engine that answers at once with fixed tokens: what is left in a bench is the daemon's own cost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from msd.config import EngineConfig
from msd.domain import Chunk, EngineInfo, EngineLoad, ExitKind, Prompt
from msd.engine.tokens import SIM_WORDS
from msd.errors import ConfigError, RequestRefusedByEngineError

MAX_MODEL_LEN = 262_144
KV_CAPACITY_TOKENS = 1_000_000_000
_TOKEN_ID = 42


class NoopEngine:
    """Gives every request `max_tokens` times the same token, in `args.num_chunks` chunks (1), without waiting."""

    simulated = True

    def __init__(self, config: EngineConfig) -> None:
        """Raises ConfigError on arguments other than `num_chunks`."""
        num_chunks = config.args.get("num_chunks", 1)
        if set(config.args) - {"num_chunks"} or not isinstance(num_chunks, int) or num_chunks < 1:
            raise ConfigError(f"engine {config.name}: a noop engine takes args.num_chunks >= 1 and nothing else")
        self.name = config.name
        self._max_num_seqs = config.max_num_seqs
        self._num_chunks = num_chunks
        self._num_running = 0

    async def start(self) -> EngineInfo:
        """Nothing to do."""
        return EngineInfo(
            engine=self.name,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=self._max_num_seqs,
            kv_capacity_tokens=KV_CAPACITY_TOKENS,
            version="noop",
        )

    async def generate(self, request_id: str, prompt: Prompt, max_tokens: int, priority: int) -> AsyncGenerator[Chunk]:
        """Stream the fixed tokens; the loop runs once between two chunks."""
        room = MAX_MODEL_LEN - len(prompt.token_ids)
        if room < 1:
            raise RequestRefusedByEngineError(
                f"the prompt has {len(prompt.token_ids)} tokens, the engine takes {MAX_MODEL_LEN - 1}",
                error_code="context_overflow",
            )
        num_tokens = min(max_tokens, room)
        num_chunks = min(self._num_chunks, num_tokens)
        self._num_running += 1
        try:
            for index in range(num_chunks):
                if index:
                    await asyncio.sleep(0)
                size = num_tokens * (index + 1) // num_chunks - num_tokens * index // num_chunks
                last = index + 1 == num_chunks
                yield Chunk((_TOKEN_ID,) * size, SIM_WORDS[_TOKEN_ID] * size, "length" if last else None)
        finally:
            self._num_running -= 1

    def load(self) -> EngineLoad:
        """Requests whose generators are open."""
        return EngineLoad(num_running=self._num_running)

    async def sleep(self, level: int) -> None:
        """Nothing to free."""

    async def wake(self) -> None:
        """Nothing to load."""

    async def lost(self) -> tuple[ExitKind, str]:
        """Never returns: there is nothing that could die."""
        never: asyncio.Future[tuple[ExitKind, str]] = asyncio.get_running_loop().create_future()
        return await never

    async def stop(self) -> None:
        """Nothing to free."""

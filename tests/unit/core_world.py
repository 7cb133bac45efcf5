"""A tiny driver of the scheduler for tests: a clock that the test moves, and the world's obvious answers."""

from __future__ import annotations

from random import Random

import msgspec

from msd.config import Config
from msd.core import commands as c
from msd.core import events as e
from msd.core.scheduler import Scheduler
from msd.domain import EngineInfo, ExitKind, FinishReason, Request


def make_config(*, modes: int = 2, slots: int = 2, policy: str = "round_robin", **sections: object) -> Config:
    """`modes` simulated engines m0, m1, ... of `slots` slots each."""
    engines = [
        {"name": f"m{i}", "model": "toy", "kind": "sim", "max_num_seqs": slots, "sim": {"max_model_len": 4096}}
        for i in range(modes)
    ]
    document = {"model": [{"name": "toy"}], "engine": engines, "policy": {"name": policy}, **sections}
    return msgspec.convert(document, Config)


class CoreWorld:
    """Answers Append and Complete at once; engines run until the test says that they are done."""

    def __init__(self, config: Config, *, up: bool = True) -> None:
        self.config = config
        self.scheduler = Scheduler.from_config(config, Random(1))
        self.t_us = 1_000_000
        self.num_requests = 0
        self.log: list[c.Command] = []
        self.running: dict[str, c.Dispatch] = {}
        self.outcomes: dict[str, c.Complete] = {}
        self.rejected: dict[str, c.Reject] = {}
        if up:
            for engine in config.engine:
                self.engine_up(engine.name)

    def engine_up(self, name: str) -> None:
        slots = next(engine.max_num_seqs for engine in self.config.engine if engine.name == name)
        info = EngineInfo(
            engine=name,
            max_model_len=4096,
            max_num_seqs=slots,
            kv_capacity_tokens=100_000,
            idle_ttft_ms=10.0,
            idle_tpot_ms=2.0,
        )
        self.post(e.EngineUp(self.t_us, info))

    def post(self, event: e.Event) -> list[c.Command]:
        commands = self.scheduler.handle(event)
        for command in commands:
            self.log.append(command)
            match command:
                case c.Append():
                    self.post(e.Appended(self.t_us, command.request_id, len(self.log)))
                case c.Dispatch():
                    self.running[command.request_id] = command
                case c.Complete():
                    self.outcomes[command.outcome.request_id] = command
                    self.post(e.Completed(self.t_us, command.outcome.request_id, len(self.log)))
                case c.Reject():
                    self.rejected[command.request_id] = command
                case c.Abort():
                    self.finish(command.request_id, "abort")
        return commands

    def submit(self, **fields: object) -> str:
        self.num_requests += 1
        request_id = f"r{self.num_requests}"
        known: dict[str, object] = {
            "request_id": request_id,
            "client_request_id": request_id,
            "tenant": "local",
            "content_hash": b"h",
            "received_us": self.t_us,
            "num_prompt_tokens": 16,
            "max_tokens": 8,
        }
        self.post(e.Submitted(self.t_us, Request(**{**known, **fields})))  # type: ignore[arg-type]
        return request_id

    def first_token(self, request_id: str) -> None:
        dispatch = self.running[request_id]
        self.post(e.FirstToken(self.t_us, request_id, dispatch.attempt, 0))

    def finish(self, request_id: str, reason: FinishReason = "stop", num_tokens: int = 4) -> None:
        dispatch = self.running.pop(request_id)
        self.post(e.Finished(self.t_us, request_id, dispatch.attempt, reason, num_tokens))

    def lose(self, engine: str) -> None:
        for request_id, dispatch in list(self.running.items()):
            if dispatch.decision.engine == engine:
                del self.running[request_id]
                failed = e.Failed(self.t_us, request_id, dispatch.attempt, "engine_unavailable", "died", True)
                self.post(failed)
        self.post(e.EngineLost(self.t_us, engine, ExitKind.DIED, "died"))

    def wait(self, ms: float) -> None:
        self.t_us += int(ms * 1000)
        self.post(e.Tick(self.t_us))

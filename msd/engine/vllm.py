"""A real engine: one vLLM `AsyncLLM` per object, its EngineCore and workers in processes of their own.

vLLM is imported by `import_vllm`, which the daemon calls before it binds its sockets; starts run on one thread that
lives as long as the process (an engine dies with the thread that forked it), one after another; everything else runs on
the loop. No exception of vLLM's leaves this file.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from functools import lru_cache
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from msd.config import EngineConfig
from msd.domain import Chunk, EngineInfo, EngineLoad, ExitKind, Prompt, Sampling
from msd.engine import processes
from msd.engine.processes import ProcessId
from msd.engine.vllm_arguments import build_arguments
from msd.engine.vllm_plugin import FORK_VARIABLE, LOG_VARIABLE, NICE_VARIABLE, PARENT_VARIABLE, process_identity
from msd.errors import ConfigError, EngineError, EngineLostError, EngineStartError, RequestRefusedByEngineError

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

ENVIRONMENT = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
}
"""Set before vLLM is imported unless the operator has set them: nothing phones home or listens beyond loopback."""
CPU_KV_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
CPU_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    CPU_KV_VARIABLE: "1",
    "VLLM_USE_AOT_COMPILE": "0",
    NICE_VARIABLE: "5",
}
"""On a CPU: engines with two spinning OpenMP threads each made four engines 3 times slower on 2 cores. Numba counts
too: ngram speculation starts its OpenMP layer, which raises torch's threads to the number of cores; on busy cores a
token then took 21-80 ms instead of 1.4. vLLM 0.32 cannot load its ahead-of-time compilations on a CPU and compiles
anew at each start; without them inductor's own cache works (a second start in 10 s instead of 15). Engines that compute
on the cores that the daemon's loop runs on are nicer than it, so that its turn comes first; a gain in loop lag was not
shown (p99 2-5 ms either way, within the noise of a busy machine)."""
WATCH_INTERVAL_S = 0.2
WARM_UP_ROUNDS = 3
WARM_UP_PROMPT_TOKENS = 32
WARM_UP_TOKENS = 16
INTERRUPT_S = 15.0
"""How long `stop` tries to break off a start: its processes are killed, then vLLM has to notice."""
SHUT_DOWN_S = 10.0
STOP_GRACE_S = 5.0
KILL_S = 5.0
NUM_LAST_LINES = 10
MAX_ERROR_LINES = 20
EXCEPTION_LINE = re.compile(r"(?:^|\] )((?:\w+\.)*\w*(?:Error|Exception|Interrupt): .*)")
MAX_TAIL_BYTES = 64 * 1024
SAMPLING_PARAMS_CACHED = 256

log = structlog.get_logger(__name__)
_starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine-starter")


def import_vllm() -> str:
    """Import vLLM, which takes seconds and would hold a running loop; return its version. Raises ConfigError."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # the daemon has threads and sockets: it must not fork
    # Before any engine's environment is set: the tracker is the daemon's own, and lives as long as it.
    resource_tracker.ensure_running()
    # Engines write to logs of their own. In this process its chatter would land between the lines of the daemon, and
    # its tracebacks say nothing that its exceptions do not.
    logging.getLogger("vllm").setLevel(logging.CRITICAL)
    try:
        import vllm
        from vllm.v1.engine import async_llm  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"vLLM cannot be imported: {error}", remedy="run `make setup`") from error
    _quieten()
    return str(vllm.__version__)


class VllmEngine:
    """One AsyncLLM with its processes. Gauges come from its scheduler, through a stat logger of ours."""

    simulated = False

    def __init__(self, config: EngineConfig, model_folder: Path, base_folder: Path, log_folder: Path) -> None:
        """`base_folder`: what `weights` is relative to. The engine's output goes to `log_folder/NAME.log`."""
        self.name = config.name
        self._config = config
        self._model_folder = base_folder / config.weights if config.weights else model_folder
        self._base_folder = base_folder
        self._log_path = log_folder / f"{config.name}.log"
        self._llm: AsyncLLM | None = None
        self._starting: asyncio.Future[AsyncLLM] | None = None
        self._children_before: frozenset[ProcessId] | None = None
        self._cores: frozenset[ProcessId] = frozenset()  # our own children; their workers are below them
        self._processes: frozenset[ProcessId] = frozenset()
        self._max_model_len = 0
        self._num_open = 0
        self._gauges = EngineLoad()
        self._sleep_level = 0  # 0: it is awake
        self._stopped = False

    # --- life ------------------------------------------------------------------------------------------------------

    async def start(self) -> EngineInfo:
        """Load, warm up and measure. Raises EngineStartError with the engine's last lines, or ConfigError."""
        began = time.monotonic()
        arguments = build_arguments(self._config, str(self._model_folder), is_cpu=_is_cpu(), base_dir=self._base_folder)
        self._starting = asyncio.get_running_loop().run_in_executor(_starter, self._build, arguments)
        try:
            # Shielded: the thread cannot be cancelled. `stop` kills what it started, and waits for it.
            llm = await asyncio.shield(self._starting)
            self._llm = llm
            self._max_model_len = int(llm.vllm_config.model_config.max_model_len)
            ttft_ms, tpot_ms = await self._warm_up(llm)
        except Exception as error:  # as in `generate`: an engine that fails in any way must not take the daemon along
            text = str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
            raise EngineStartError(
                f"engine {self.name} did not start: {text}", last_lines=self._last_lines()
            ) from error
        return EngineInfo(
            engine=self.name,
            max_model_len=self._max_model_len,
            max_num_seqs=self._config.max_num_seqs,
            kv_capacity_tokens=_kv_capacity_tokens(llm),
            pids=tuple(sorted(process.pid for process in self._processes)),
            version=_version(),
            idle_ttft_ms=ttft_ms,
            idle_tpot_ms=tpot_ms,
            start_s=time.monotonic() - began,
            can_sleep=self._config.residency == "auto" and not _is_cpu(),
        )

    async def sleep(self, level: int) -> None:
        """Drop the KV cache and, at level 2, the weights too. On a CPU vLLM has no sleep."""
        llm = self._llm
        if llm is None or self._stopped:
            raise EngineLostError(f"engine {self.name} is not up")
        if _is_cpu():
            raise EngineError(f"engine {self.name} cannot sleep", remedy="vLLM has no sleep mode on a CPU")
        self._sleep_level = level
        try:
            await llm.sleep(level)
        except Exception as error:  # as in `generate`
            raise self._translate(error) from error

    async def wake(self) -> None:
        """Bring everything back; at level 2 the weights are loaded again. What the prefix cache held is gone."""
        llm = self._llm
        if llm is None or self._stopped:
            raise EngineLostError(f"engine {self.name} is not up")
        try:
            if self._sleep_level == 2:
                # Memory for the weights, the weights, and only then the KV cache: both at once need not fit.
                await llm.wake_up(["weights"])
                await llm.collective_rpc("reload_weights")
                await llm.wake_up(["kv_cache"])
            else:
                await llm.wake_up()
            await llm.reset_prefix_cache()
        except Exception as error:  # as in `generate`
            raise self._translate(error) from error
        self._sleep_level = 0

    async def lost(self) -> tuple[ExitKind, str]:
        """Wait for the end of the EngineCore, or for vLLM to give it up; noticed within half a second."""
        while not (reason := self._why_lost()):  # noqa: ASYNC110 - a process's death sets no event
            await asyncio.sleep(WATCH_INTERVAL_S)
        return ExitKind.DIED, f"engine {self.name} is lost: {reason}"

    async def stop(self) -> None:
        """End the engine and its processes, also while it starts. Idempotent. Raises EngineError if one survives."""
        if self._stopped:
            return
        self._stopped = True
        loop = asyncio.get_running_loop()
        if self._starting is not None:
            self._llm = await self._break_off_start(self._starting)
        llm, self._llm = self._llm, None
        if llm is not None:
            # Asked again: an engine may have started further processes since it came up.
            self._processes |= await loop.run_in_executor(None, processes.tree_of, self._cores)
            shut_down = loop.run_in_executor(None, self._shut_down, llm)
            await asyncio.wait((shut_down,), timeout=SHUT_DOWN_S)
            if not shut_down.done():
                # It waits for processes that do not answer: they are killed, and then it has nothing to wait for.
                log.warning("vllm_shutdown_hangs", engine=self.name, after_s=SHUT_DOWN_S)
                await loop.run_in_executor(None, processes.end, self._processes, 0.0, KILL_S)
                await asyncio.wait((shut_down,), timeout=KILL_S)
            await asyncio.sleep(0)  # vLLM has its sockets closed by a callback of the loop
            await loop.run_in_executor(None, _destroy_context, llm)
        left = await loop.run_in_executor(None, processes.end, self._processes, STOP_GRACE_S, KILL_S)
        if left:
            pids = sorted(process.pid for process in left)
            raise EngineError(f"processes of engine {self.name} do not end: {pids}", remedy="a driver may hold them")

    # --- requests --------------------------------------------------------------------------------------------------

    async def generate(self, request_id: str, prompt: Prompt, max_tokens: int, priority: int) -> AsyncGenerator[Chunk]:
        """Stream vLLM's deltas. The prompt's ids are handed on as they are: nothing is tokenised twice."""
        llm = self._llm
        if llm is None or self._stopped or self._sleep_level:
            raise EngineLostError(f"engine {self.name} is not up")
        num_prompt_tokens = len(prompt.token_ids)
        if num_prompt_tokens >= self._max_model_len:
            raise RequestRefusedByEngineError(
                f"the prompt has {num_prompt_tokens} tokens, engine {self.name} takes {self._max_model_len - 1}",
                error_code="context_overflow",
            )
        self._num_open += 1
        try:
            params = _sampling_params(prompt.sampling, max_tokens)
            # A dict with a type is an input that vLLM takes as rendered; a TokensPrompt would go through its renderer's
            # thread, for nothing.
            rendered = {"type": "token", "prompt_token_ids": list(prompt.token_ids)}
            async with aclosing(llm.generate(rendered, params, request_id, priority=priority)) as outputs:
                async for output in outputs:
                    completion = output.outputs[0]
                    finish_reason = completion.finish_reason
                    if finish_reason not in (None, "stop", "length", "abort"):
                        raise EngineError(f"engine {self.name} ended {request_id} with {finish_reason!r}")
                    yield Chunk(
                        tuple(completion.token_ids), completion.text, finish_reason, output.num_cached_tokens or 0
                    )
        except EngineError:
            raise
        except Exception as error:  # vLLM raises what it likes: nothing of it may travel further
            raise self._translate(error) from error
        finally:
            self._num_open -= 1

    def load(self) -> EngineLoad:
        """The scheduler's gauges as of its last step, but never more than there are streams open."""
        if not self._num_open:
            return EngineLoad()  # an engine that idles reports nothing any more
        gauges = self._gauges
        num_running = min(gauges.num_running, self._num_open)
        return EngineLoad(
            num_running=num_running,
            num_waiting=min(gauges.num_waiting, self._num_open - num_running),
            kv_usage=gauges.kv_usage,
        )

    # --- inside ----------------------------------------------------------------------------------------------------

    def _build(self, arguments: dict[str, object]) -> AsyncLLM:
        """Start the engine's processes, on the starter thread; returns when the EngineCore is ready."""
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        if self._stopped:
            raise EngineError("it was stopped before it began to start")
        me = os.getpid()
        before = self._children_before = processes.children_of(me)
        try:
            self._turn_log()
            with _environment(self._child_environment()):
                llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), stat_loggers=[self._make_stat_logger])
                # The gauges come from the EngineCore's scheduler. vLLM's own statistics of each token, which nobody
                # reads here, took a quarter of this process's CPU per token (19.6 -> 14.9 us at 32 streams).
                llm.log_stats = llm.output_processor.log_stats = False
                return llm
        except Exception as error:  # as in `generate`
            raise EngineError(f"{type(error).__name__}: {error}") from error
        finally:
            self._cores = processes.children_of(me) - before
            self._processes = processes.tree_of(self._cores)

    def _child_environment(self) -> dict[str, str | None]:
        environment: dict[str, str | None] = {
            PARENT_VARIABLE: process_identity(os.getpid()),
            LOG_VARIABLE: str(self._log_path),
        }
        if _is_cpu():
            environment |= {name: os.environ.get(name, value) for name, value in CPU_ENVIRONMENT.items()}
            if "kv_cache_memory_bytes" in self._config.args:
                environment[CPU_KV_VARIABLE] = None  # it would win over the argument
        environment |= self._config.env
        if _is_cpu() and environment["OMP_NUM_THREADS"] == "1":
            environment[FORK_VARIABLE] = "1"
        return environment

    def _turn_log(self) -> None:
        """Keep the log of the start before this one, and no more."""
        if self._log_path.exists():
            self._log_path.replace(self._log_path.with_suffix(".log.1"))

    def _last_lines(self) -> tuple[str, ...]:
        try:
            with self._log_path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - MAX_TAIL_BYTES))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError as error:
            return (f"no engine log: {error}",)
        # The cause is an exception of a worker's, pages above: its last line is worth more than the tail.
        causes = dict.fromkeys(match[1] for line in lines if (match := EXCEPTION_LINE.search(line)))
        return (*causes, *lines[-NUM_LAST_LINES:])[:MAX_ERROR_LINES]

    async def _warm_up(self, llm: AsyncLLM) -> tuple[float, float]:
        """Run a few requests alone: the first ones compile. Best TTFT and TPOT in ms."""
        vocabulary = int(llm.vllm_config.model_config.get_vocab_size())
        num_prompt_tokens = min(WARM_UP_PROMPT_TOKENS, self._max_model_len // 2)
        num_tokens = min(WARM_UP_TOKENS, self._max_model_len - num_prompt_tokens)
        measured: list[tuple[float, float]] = []
        for number in range(WARM_UP_ROUNDS):
            # Another prompt each time, or the prefix cache would answer; periodic, so that ngram speculation compiles.
            ids = tuple((7 * (index % 8) + 31 * number) % vocabulary for index in range(num_prompt_tokens))
            prompt = Prompt(token_ids=ids, sampling=Sampling(temperature=0.0, ignore_eos=True))
            began, first, count = time.monotonic(), 0.0, 0
            async with aclosing(self.generate(f"warm-up-{number}", prompt, num_tokens, 0)) as chunks:
                async for chunk in chunks:
                    first = first or time.monotonic()
                    count += len(chunk.token_ids)
            tpot_s = (time.monotonic() - first) / max(1, count - 1)
            measured.append(((first - began) * 1e3, tpot_s * 1e3))
        return min(ttft for ttft, _ in measured), min(tpot for _, tpot in measured)

    def _make_stat_logger(self, vllm_config: Any, engine_index: int = 0) -> Any:
        from vllm.v1.metrics.loggers import StatLoggerBase

        engine = self

        class Gauges(StatLoggerBase):
            """Takes the scheduler's figures of each step; vLLM keeps running without its own loggers."""

            def __init__(self) -> None:
                pass

            def record(self, scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
                if scheduler_stats is not None:
                    engine._gauges = EngineLoad(
                        num_running=scheduler_stats.num_running_reqs,
                        num_waiting=scheduler_stats.num_waiting_reqs,
                        kv_usage=scheduler_stats.kv_cache_usage,
                    )

            def log_engine_initialized(self) -> None:
                pass

        return Gauges()

    def _why_lost(self) -> str:
        """Why the engine is dead; empty while it lives, and after a stop."""
        llm = self._llm
        if self._stopped or llm is None:
            return ""
        for process in self._cores:
            if not processes.is_running(process):
                return f"its EngineCore (pid {process.pid}) ended; see {self._log_path}"
        return f"vLLM gave it up; see {self._log_path}" if llm.errored else ""

    def _translate(self, error: Exception) -> EngineError:
        from vllm import exceptions
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        if isinstance(error, EngineDeadError) or self._why_lost():
            return EngineLostError(f"engine {self.name} is lost: {self._why_lost() or error}")
        if isinstance(error, EngineGenerateError) and isinstance(error.__cause__, Exception):
            error = error.__cause__
        # By name: not every vLLM that we run on has all of them.
        overflow = [getattr(exceptions, name, None) for name in ("QueueOverflowError", "MaxQueuedTokensError")]
        if type(error) in overflow:
            return RequestRefusedByEngineError(f"engine {self.name} holds as many as it may", error_code="queue_full")
        client_error = getattr(exceptions, "VLLMClientError", ValueError)
        if isinstance(error, (ValueError, client_error)):
            return RequestRefusedByEngineError(f"engine {self.name} refuses the request: {error}")
        return EngineError(f"engine {self.name}: {type(error).__name__}: {error}")

    async def _break_off_start(self, starting: asyncio.Future[AsyncLLM]) -> AsyncLLM | None:
        """Kill what a start has started until its thread gives up; the engine, if it came up nevertheless."""
        loop = asyncio.get_running_loop()
        deadline = time.monotonic() + INTERRUPT_S
        while not starting.done() and time.monotonic() < deadline:
            await loop.run_in_executor(None, self._kill_newcomers)
            await asyncio.wait((starting,), timeout=WATCH_INTERVAL_S)
        if not starting.done():
            raise EngineError(f"the start of engine {self.name} cannot be broken off", remedy="stop the daemon")
        return starting.result() if starting.exception() is None else None

    def _kill_newcomers(self) -> None:
        if self._children_before is None:
            return  # it waits for the starter thread; all children there are belong to others
        newcomers = processes.children_of(os.getpid()) - self._children_before
        processes.end(processes.tree_of(newcomers), 0.0, KILL_S)

    def _shut_down(self, llm: AsyncLLM) -> None:
        try:
            llm.shutdown()
        except Exception as error:  # what it leaves is killed next, by pid
            log.warning("vllm_shutdown_failed", engine=self.name, error=str(error), kind=type(error).__name__)


def _quieten() -> None:
    """Let vLLM configure its logging now, once, so that no start does it again; then silence it."""
    from vllm import logger

    configure = getattr(logger, "configure_logging_if_needed", None)
    if configure is not None:  # older ones configure when they are imported
        from vllm.config.logging import LoggingConfig

        configure(LoggingConfig())
    logging.getLogger("vllm").setLevel(logging.CRITICAL)


@contextmanager
def _environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Set variables (None: unset) for the processes that are started inside; only the starter thread does."""
    before = {name: os.environ.get(name) for name in values}
    _set_variables(values)
    try:
        yield
    finally:
        _set_variables(before)


def _set_variables(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@lru_cache(maxsize=SAMPLING_PARAMS_CACHED)
def _sampling_params(sampling: Sampling, max_tokens: int) -> SamplingParams:
    """Our parameters as vLLM's; None is its own default. It copies them before it changes any."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    given = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "seed": sampling.seed,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "stop": list(sampling.stop) or None,
    }
    return SamplingParams(
        max_tokens=max_tokens,
        ignore_eos=sampling.ignore_eos,
        output_kind=RequestOutputKind.DELTA,
        **{name: value for name, value in given.items() if value is not None},
    )


def _destroy_context(llm: AsyncLLM) -> None:
    """End the ZeroMQ context that vLLM leaves to the garbage collector, with two threads of its own."""
    context = getattr(getattr(llm.engine_core, "resources", None), "ctx", None)
    if context is not None:
        context.destroy(linger=0)


def _is_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _version() -> str:
    import vllm

    return f"vllm {vllm.__version__}"


def _kv_capacity_tokens(llm: AsyncLLM) -> int:
    """Tokens that the engine's KV cache holds, as it sized it."""
    cache = llm.vllm_config.cache_config
    return int(getattr(cache, "kv_cache_size_tokens", None) or (cache.num_gpu_blocks or 0) * cache.block_size)

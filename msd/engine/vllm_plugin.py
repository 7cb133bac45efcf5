"""Runs inside vLLM's own processes: an engine must not outlive the daemon that started it.

vLLM loads general plug-ins in every process, also in the parent and in any `vllm serve` on the machine. So `register`
acts only in a process whose environment names an ancestor of it as the daemon (`MSD_ENGINE_PARENT=pid:starttime`).
os and ctypes only: this module is imported while vLLM starts, in every one of its processes.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PARENT_VARIABLE = "MSD_ENGINE_PARENT"
LOG_VARIABLE = "MSD_ENGINE_LOG"
FORK_VARIABLE = "MSD_ENGINE_FORK_WORKERS"
NICE_VARIABLE = "MSD_ENGINE_NICE"
PR_SET_PDEATHSIG = 1
MAX_ANCESTORS = 64

_libc = ctypes.CDLL(None, use_errno=True)


def process_identity(pid: int) -> str:
    """`pid:starttime` (clock ticks since boot): names one process for ever, where a pid is given out again."""
    _, start_time, _ = read_stat(pid)
    return f"{pid}:{start_time}"


def read_stat(pid: int) -> tuple[int, int, str]:
    """Parent's pid, start time and state letter from /proc. Raises OSError when there is no such process."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        # The name, in parentheses, may hold blanks and parentheses of its own.
        fields = file.read().rpartition(b")")[2].split()
    return int(fields[1]), int(fields[19]), fields[0].decode()


def register() -> None:
    """Tie this process's life to its parent's and send its output to the engine's log, if it is an engine of msd's."""
    identity = os.environ.get(PARENT_VARIABLE, "")
    if not identity or identity == _identity_or_empty(os.getpid()):
        return
    if not _is_descendant_of(identity):
        if _is_orphan():
            _die()  # its parent died while this process was still importing vLLM
        return
    log_path = os.environ.get(LOG_VARIABLE, "")
    if log_path:
        _redirect_output(log_path)
    # Out of the terminal's foreground group: Ctrl-C is for the daemon, which drains while its engines still work.
    os.setpgid(0, 0)
    nice = os.environ.get(NICE_VARIABLE, "")
    if nice:
        # Absolute, not added: a worker that loads this again stays as nice as its EngineCore. Never below one's own.
        os.setpriority(os.PRIO_PROCESS, 0, max(int(nice), os.getpriority(os.PRIO_PROCESS, 0)))
    _die_with_parent(identity)
    if os.environ.get(FORK_VARIABLE) == "1" and _identity_or_empty(os.getppid()) == identity:
        # This is the EngineCore, which has imported most of what its workers need: forked, they start in a second
        # instead of ten. vLLM forks workers by default on GPUs; on CPUs it spawns because of OpenMP's thread pool,
        # which FORK_VARIABLE says is not there (one thread). Plug-ins are not loaded again after a fork.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
        os.register_at_fork(after_in_child=lambda: _die_with_parent(identity))


def _die_with_parent(identity: str) -> None:
    parent = os.getppid()
    # The signal follows the thread that forked us, and is not inherited: each worker sets its own.
    if _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed: this engine could outlive the daemon")
    # The parent may have died before prctl; then nobody would ever send the signal.
    if os.getppid() != parent or not _is_descendant_of(identity):
        _die()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _is_orphan() -> bool:
    """Whether multiprocessing spawned this process and its spawner is gone."""
    module = sys.modules.get("multiprocessing.process")
    parent = module.parent_process() if module is not None else None
    return parent is not None and parent.pid != os.getppid()


def _is_descendant_of(identity: str) -> bool:
    """Whether `identity` names a living ancestor of this process, itself not counted."""
    pid = os.getppid()
    for _ in range(MAX_ANCESTORS):
        if pid <= 1:
            # In a container the daemon may be process 1 itself.
            return pid == 1 and _identity_or_empty(1) == identity
        if _identity_or_empty(pid) == identity:
            return True
        try:
            pid, _, _ = read_stat(pid)
        except (OSError, ValueError):
            return False
    return False


def _identity_or_empty(pid: int) -> str:
    try:
        return process_identity(pid)
    except (OSError, ValueError):
        return ""


def _redirect_output(path: str) -> None:
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)

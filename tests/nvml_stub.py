"""A stand-in for libnvidia-ml.so.1, built from C: the real pynvml runs over it in a child process, errors included.

`NVML_STUB_DIR` names a folder whose files say how it behaves, looked at on each call: `energy_mj`, `power_mw` and
`code.NAME` hold a number (NAME: init, energy, power, memory, util), `hang` makes calls block while it exists. Built
with `-DQUIET` it looks at nothing and costs nothing, for timings.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
UUID = "GPU-5tub0000-0000-4000-8000-000000000001"
SOURCE = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
typedef struct {
  unsigned field, scope; long long stamp, latency; unsigned type, ret;
  union { unsigned u; unsigned long long q; } v;
} field_t;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_t;
static char path[4096];
#ifdef QUIET
static unsigned long long number(const char *name, unsigned long long otherwise) { return otherwise; }
static int code(const char *name) { return 0; }
#else
static const char *in(const char *name) {
  snprintf(path, sizeof path, "%s/%s", getenv("NVML_STUB_DIR"), name); return path; }
static unsigned long long number(const char *name, unsigned long long otherwise) {
  FILE *f = fopen(in(name), "r"); if (!f) return otherwise;
  unsigned long long n = otherwise; if (fscanf(f, "%llu", &n) != 1) n = otherwise; fclose(f); return n; }
static int code(const char *name) {
  FILE *f = fopen(in("calls"), "a"); if (f) { fprintf(f, "%s\n", name); fclose(f); }
  while (access(in("hang"), F_OK) == 0) usleep(10000);
  char file[64]; snprintf(file, sizeof file, "code.%s", name); return (int)number(file, 0); }
#endif
static int value(int r, unsigned *out, unsigned v) { *out = v; return r; }
int nvmlInitWithFlags(unsigned f) { return code("init"); }
int nvmlShutdown(void) { return code("shutdown"); }
const char *nvmlErrorString(int r) { return "stub error"; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **h) { *h = (void *)1; return i ? 6 : code("handle"); }
int nvmlDeviceGetHandleByUUID(const char *u, void **h) { *h = (void *)1; return strcmp(u, STUB_UUID) ? 6 : 0; }
int nvmlDeviceGetUUID(void *h, char *out, unsigned n) { snprintf(out, n, "%s", STUB_UUID); return 0; }
int nvmlDeviceGetName(void *h, char *out, unsigned n) { snprintf(out, n, "Stub GPU"); return 0; }
int nvmlDeviceGetIndex(void *h, unsigned *out) { return value(0, out, 0); }
int nvmlDeviceGetFieldValues(void *h, int n, field_t *f) {
  for (int i = 0; i < n; i++) {
    f[i].type = 1;
    if (f[i].field == 83) { f[i].type = 3; f[i].ret = code("energy"); f[i].v.q = number("energy_mj", 0); }
    else if (f[i].field == 190) { f[i].ret = code("limit"); f[i].v.u = 700000; }
    else if (f[i].scope != number("scope", 0)) f[i].ret = 3;
    else { f[i].ret = code("power"); f[i].v.u = number("power_mw", 300000); } }
  return 0; }
#ifndef NO_MEMORY
int nvmlDeviceGetMemoryInfo_v2(void *h, memory_t *m) {
  if (m->version != 0x02000028) return 25;
  m->total = 80000; m->reserved = 500; m->free = 50000; m->used = 29500; return code("memory"); }
#endif
#ifndef NO_MEMORY
int nvmlDeviceGetMemoryInfo(void *h, unsigned long long *m) {
  m[0] = 80000; m[1] = 50000; m[2] = 30000; return code("memory"); }
#endif
int nvmlDeviceGetCount_v2(unsigned *out) { return value(code("count"), out, 1); }
int nvmlDeviceGetCudaComputeCapability(void *h, int *major, int *minor) {
  *major = 9; *minor = 0; return code("capability"); }
int nvmlDeviceGetUtilizationRates(void *h, unsigned *u) { u[0] = 87; u[1] = 40; return code("util"); }
int nvmlDeviceGetClockInfo(void *h, int type, unsigned *out) { return value(type == 1 ? 0 : 2, out, 1980); }
int nvmlDeviceGetTemperature(void *h, int sensor, unsigned *out) { return value(0, out, 61); }
int nvmlDeviceGetCurrentClocksThrottleReasons(void *h, unsigned long long *out) {
  *out = 0x1044; return code("reasons"); }
"""


class NvmlStub:
    """The built library and the folder that steers it."""

    def __init__(self, folder: Path, *flags: str) -> None:
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("no C compiler to build the NVML stub with")
        self.folder = folder
        source = folder / "stub.c"
        source.write_text(SOURCE)
        library = folder / "lib" / "libnvidia-ml.so.1"
        library.parent.mkdir()
        command = [compiler, "-shared", "-fPIC", f'-DSTUB_UUID="{UUID}"', *flags, "-o", str(library), str(source)]
        subprocess.run(command, check=True, timeout=60)

    def set(self, name: str, number: int = 0) -> None:
        """Write a behaviour file whole: the stub may be reading it."""
        fresh = self.folder / f"{name}.new"
        fresh.write_text(str(number))
        fresh.rename(self.folder / name)

    def env(self) -> dict[str, str]:
        """Environment of a child in which pynvml finds the stub."""
        return {
            **os.environ,
            "LD_LIBRARY_PATH": str(self.folder / "lib"),
            "NVML_STUB_DIR": str(self.folder),
            "PYTHONPATH": str(REPOSITORY),
        }

    def run(self, script: str) -> Any:
        """Run `script` in a child; its last line of output is JSON."""
        command = [sys.executable, "-W", "error", "-c", PRELUDE + script]
        done = subprocess.run(command, env=self.env(), capture_output=True, text=True, timeout=60, cwd=self.folder)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])


PRELUDE = r"""
import json, os, time
import msgspec
from pathlib import Path
from msd.errors import ProbeError
from msd.telemetry import nvml
from msd.telemetry.nvml import NvmlProbe

class Clock:
    def now_us(self): return time.monotonic_ns() // 1000

folder = Path(os.environ["NVML_STUB_DIR"])

def put(name, number=0):
    (folder / (name + ".new")).write_text(str(number))
    (folder / (name + ".new")).rename(folder / name)

def drop(name): (folder / name).unlink()

def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)

nvml.MAX_LOAD = 1.0  # the stub reads files: its cost says nothing, and the rate must hold
probe = NvmlProbe("0", 50.0, Clock())

def tell(**figures): print(json.dumps(figures))
"""

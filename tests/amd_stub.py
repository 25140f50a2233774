"""A machine with made-up AMD cards: a stub of libamd_smi.so, behind the real Python binding (amdsmi).

The binding looks up every function of the library when it is imported, so the stub has them all; those that messcli
calls answer from a file, all others "not supported". It needs a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent

_ANSWERED = r"""
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The world: one line per card, "uuid hip_id accumulator resolution status", read at every call. */
static int world(int number, char *uuid, unsigned *hip, unsigned long long *count, float *step, int *status) {
    FILE *file = fopen(getenv("AMD_STUB"), "r");
    int n = -1;
    if (!file) return 0;
    while (n < number && fscanf(file, "%255s %u %llu %f %d", uuid, hip, count, step, status) == 5) n++;
    fclose(file);
    return n == number;
}
static int cards(void) {
    char uuid[256]; unsigned hip; unsigned long long count; float step; int status, n = 0;
    while (world(n, uuid, &hip, &count, &step, &status)) n++;
    return n;
}
#define CARD(handle) ((int)(uintptr_t)(handle) - 1)
int amdsmi_init(uint64_t flags) { return cards() ? 0 : 34; }
int amdsmi_shut_down(void) { return 0; }
int amdsmi_get_socket_handles(uint32_t *count, void **handles) {
    if (handles) for (uint32_t n = 0; n < *count; n++) handles[n] = (void *)(uintptr_t)(n + 1);
    *count = cards();
    return 0;
}
int amdsmi_get_processor_handles(void *socket, uint32_t *count, void **handles) {
    if (handles) handles[0] = socket;
    *count = 1;
    return 0;
}
int amdsmi_get_gpu_device_uuid(void *handle, unsigned *length, char *out) {
    unsigned hip; unsigned long long count; float step; int status;
    return world(CARD(handle), out, &hip, &count, &step, &status) ? 0 : 2;
}
int amdsmi_get_gpu_enumeration_info(void *handle, uint32_t *info) {
    char uuid[256]; unsigned long long count; float step; int status;
    return world(CARD(handle), uuid, info + 3, &count, &step, &status) ? 0 : 2;
}
int amdsmi_get_energy_count(void *handle, uint64_t *energy, float *resolution, uint64_t *timestamp) {
    char uuid[256]; unsigned hip; unsigned long long count; int status = 2;
    if (!world(CARD(handle), uuid, &hip, &count, resolution, &status) || status) return status;
    *energy = count;
    *timestamp = 0;
    return 0;
}
"""


def build(folder: Path) -> Path:
    """Compile the stub into `folder`. Skips the test where there is no binding or no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    found = importlib.util.find_spec("amdsmi")  # finds it without importing it
    if compiler is None or found is None or found.origin is None:
        pytest.skip("no C compiler, or amdsmi isn't installed: pip install 'messcli[amd]'")
    wrapper = (Path(found.origin).parent / "amdsmi_wrapper.py").read_text(encoding="utf-8")
    names = set(re.findall(r"_libraries\['libamd_smi\.so'\]\.(\w+)", wrapper))
    others = "".join(
        f"int {name}(void) {{ return 2; }}\n" for name in sorted(names) if f"int {name}(" not in _ANSWERED
    )
    source = folder / "amd_stub.c"
    source.write_text(_ANSWERED + others, encoding="utf-8")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-w", str(source), "-o", str(folder / "libamd_smi.so")], check=True
    )
    return folder


def run(folder: Path, code: str, *cards: str, **variables: str) -> Any:
    """Run `code` on a machine with `cards`, given as lines of the stub's world; its last line, as JSON."""
    (folder / "world").write_text("".join(f"{card}\n" for card in cards), encoding="utf-8")
    hidden = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ROCM_HOME", "ROCM_PATH")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {
        "LD_LIBRARY_PATH": str(folder),
        "AMD_STUB": str(folder / "world"),
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
        **variables,
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])

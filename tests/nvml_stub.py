"""A machine with made-up NVIDIA cards: a stub of the driver's library, behind the real Python binding.

The stub is told its world by a file, which it reads at every call. It needs a process of its own: the library is
found when the process starts.
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

HERE = Path(__file__).parent


def build(folder: Path) -> Path:
    """Compile the stub into `folder`, which is returned. Skips the test where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler: the NVML stub can't be built")
    library = folder / "libnvidia-ml.so.1"
    stub = [compiler, "-O1", "-shared", "-fPIC", str(HERE / "nvml_stub.c"), "-o", str(library), "-lm"]
    subprocess.run(stub, check=True)
    return folder


def run(folder: Path, world: str, code: str) -> Any:
    """Run `code` on the stub in `folder`, whose world is the file `world` there; what its last line says, as JSON."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_")}
    environment |= {
        "LD_LIBRARY_PATH": str(folder),
        "NVML_STUB": str(folder / world),
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def control(*lines: str) -> None:
    """Change the stub's world, from within; atomically, for it reads the file at every call."""
    file = Path(os.environ["NVML_STUB"])
    fresh = file.with_suffix(".new")
    fresh.write_text("\n".join(lines) + "\n")
    fresh.replace(file)

"""Settings that all tests share."""

from __future__ import annotations

import os

# One thread per process: the suite runs a process per core, and numbers don't depend on the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests need no network

from hypothesis import settings

# Examples are drawn anew each time, but not in CI; their time isn't judged: these machines are shared.
settings.register_profile("messcli", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("messcli")

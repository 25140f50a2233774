"""How long until something shows: `messcli --help`, and the first output line on the bundled zoo.

    python tools/bench/startup.py [REPEATS]

The best of the repeats counts: what else the machine does is no property of the program. CPU seconds, which
a busy machine inflates less, are shown beside.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SAMPLES = Path(__file__).parent.parent.parent / "samples" / "requests.jsonl"
COMMAND = [sys.executable, "-c", "from messcli.cli import main; main(prog_name='messcli')"]


def first_byte(*arguments: str) -> tuple[float, float]:
    """Wall seconds until stdout has something, and CPU seconds of the whole process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    with subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ}
    ) as process:
        assert process.stdout is not None
        assert os.read(process.stdout.fileno(), 1)
        wall = time.perf_counter() - started
        process.stdout.read()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(repeats: int) -> int:
    met = True
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # no ./zoo.toml
        for what, limit, arguments in (
            ("messcli --help", 0.3, ["--help"]),
            ("first output line, bundled zoo", 4.0, ["route", str(SAMPLES), "-o", "-", "--limit", "1"]),
        ):
            measured = [first_byte(*arguments) for _ in range(repeats)]
            wall, cpu = min(wall for wall, _ in measured), min(cpu for _, cpu in measured)
            load = os.getloadavg()[0] / (os.cpu_count() or 1)
            print(
                f"{'ok  ' if wall < limit else 'MISS'}  {what}: {wall:.2f} s, {cpu:.2f} CPU s "
                f"(expected under {limit} s; load {load:.1f} per core)"
            )
            met &= wall < limit
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 5))

"""Runs `messcli` in forked children, so that hundreds of runs that end badly take seconds, not hours.

One process imports everything once. For each line of JSON on standard input it forks a child that runs the
command, ends it as the line says, and answers with what became of it. Tests talk to it through `Server`.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from messcli.errors import ModelUnavailable
from messcli.models.backend import InBatches


@dataclass(frozen=True)
class Ended:
    status: int  # exit code; negative: the signal it died of
    stdout: bytes
    stderr: str
    calls: str  # those that changed a file, a letter each (see fault_shim.c); "" without the shim, or killed
    seconds: float


class Server:
    """The tests' end: starts the process, sends jobs, reads answers."""

    def __init__(self, folder: Path, shim: Path | None) -> None:
        self.folder = folder
        self.shim = shim
        here = Path(__file__).parent
        environment = {**os.environ, "PYTHONPATH": f"{here.parent}{os.pathsep}{here}"}
        environment.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
        if shim:
            environment["LD_PRELOAD"] = str(shim)
        self._process = subprocess.Popen(
            [sys.executable, str(here / "fault_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )

    def start(self, args: Sequence[str], cwd: Path, **how: Any) -> None:
        assert self._process.stdin is not None
        job = {"args": list(args), "cwd": str(cwd), "folder": str(self.folder), **how}
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()

    def answer(self) -> Ended:
        assert self._process.stdout is not None
        plain = json.loads(self._process.stdout.readline())
        stdout, stderr = Path(plain["stdout"]).read_bytes(), Path(plain["stderr"]).read_bytes()
        return Ended(
            plain["status"], stdout, stderr.decode("utf-8", "replace"), plain["calls"], plain["seconds"]
        )

    def run(self, args: Sequence[str], cwd: Path, **how: Any) -> Ended:
        """Run `messcli ARGS` in `cwd`.

        Args:
            how: kill_after: seconds until SIGKILL; signals: [(seconds, number), ...]; kill_at: at which call
                that changes a file (shim); torn: after half of it; synced: a folder for copies as of the
                last fsync; room: bytes that fit on the disk; environment; stdin: a file.
        """
        self.start(args, cwd, **how)
        return self.answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


class ToyBackend(InBatches):
    """Answers at once, as a hash of the prompt says: right, half right or wrong. For faults only."""

    def __init__(self, spec: Any, *, batch_size: int | None) -> None:
        self.spec = spec
        self.loaded = self.occupies_memory = False
        self.devices = ("cpu",)
        self.context_length = spec.max_prompt_tokens

    def load(self) -> None:
        if not self.loaded and (delay := os.environ.get(f"TOY_LOAD_{self.spec.name}")):
            time.sleep(float(delay))
        self.loaded = True

    def unload(self) -> None:
        self.loaded = False

    def prompt_tokens(self, request: Any) -> int:
        return len(request.prompt.split())

    def plan(self, requests: Sequence[Any]) -> list[list[int]]:
        return [list(range(start, min(start + 5, len(requests)))) for start in range(0, len(requests), 5)]

    def generate(self, batch: Sequence[Any]) -> list[Any]:
        crash = os.environ.get("TOY_CRASH", "")  # how:calls
        if crash:
            _count["generate"] = _count.get("generate", 0) + 1
            how, _, calls = crash.partition(":")
            if _count["generate"] == int(calls):
                _end(how)
        if delay := os.environ.get("TOY_SECONDS"):
            time.sleep(float(delay))
        if log := os.environ.get("TOY_LOG"):  # who answered what, for good
            with Path(log).open("a") as file:
                file.writelines(f"{self.spec.name} {request.id}\n" for request in batch)
        while_there = os.environ.get("TOY_AWAY_WHILE")
        if self.spec.name in os.environ.get("TOY_AWAY", "").split() or (
            while_there and Path(while_there).exists()
        ):
            raise ModelUnavailable(f'model "{self.spec.name}": its server is gone. Start it')
        return [self._answer(request) for request in batch]

    def _answer(self, request: Any) -> Any:
        from messcli.records import Generation

        for fault, word in (("request", "refuses"), ("model", "stumbles")):
            if f"{self.spec.name} {word}" in request.prompt:
                return Generation(None, 3, 0, error=f"{self.spec.name} {word}", fault=fault)
        stumbles_on = os.environ.get("TOY_STUMBLES_ON")
        if os.environ.get("TOY_STUMBLES") or (stumbles_on and stumbles_on in request.prompt):
            return Generation(None, 3, 0, error="HTTP 500", fault="model")

        luck = sum(map(ord, f"{self.spec.name}{request.prompt}")) % (2 if self.spec.name == "small" else 5)
        words = (request.references[0] if request.references else request.prompt).split()
        words = words if luck else words[: len(words) // 2] or ["?"]
        if "fails" in request.prompt:
            return Generation(None, 1, 0, error="this one fails")
        return Generation(" ".join(words), len(request.prompt.split()), len(words))


_count: dict[str, int] = {}


def _end(how: str) -> None:
    if how == "raise":
        raise ValueError("an exception that nobody expects")
    if how == "exit":
        os._exit(9)
    if how == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)


def metric(output: str, references: Sequence[str]) -> float:
    """A user's own metric; METRIC_CRASH makes it end badly at a call."""
    crash = os.environ.get("METRIC_CRASH", "")
    if crash:
        _count["metric"] = _count.get("metric", 0) + 1
        how, _, calls = crash.partition(":")
        if _count["metric"] == int(calls):
            _end(how)
    words, expected = output.split(), references[0].split()
    return sum(word in expected for word in words) / max(len(words), len(expected))


def _child(job: dict[str, Any], shim: ctypes.CDLL | None, scratch: str) -> None:
    from messcli.cli import main

    os.chdir(job["cwd"])
    os.environ.update(job.get("environment", {}))
    stdout = job.get("stdout", f"{scratch}.out")
    for number, name in ((0, job.get("stdin", os.devnull)), (1, stdout), (2, f"{scratch}.err")):
        opened = os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(opened, number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115  # the process ends with them
    if shim:
        folder, synced = job["folder"].encode(), job.get("synced", "").encode()
        room = job.get("room", -1)
        shim.shim_arm(folder, synced, job.get("kill_at", 0), job.get("torn", False), room)
    code: Any = 1
    try:
        main(job["args"], prog_name="messcli")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        if shim:
            Path(f"{scratch}.calls").write_bytes(shim.shim_calls())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    import messcli.jobs.route
    from messcli.metrics import load_metric
    from messcli.registry import BACKENDS

    load_metric("bleu1")("a b", ["a b"])
    BACKENDS["toy"] = "fault_server:ToyBackend"
    shim = ctypes.CDLL(os.environ["LD_PRELOAD"]) if "LD_PRELOAD" in os.environ else None
    if shim:
        shim.shim_calls.restype = ctypes.c_char_p
        shim.shim_arm.argtypes = [
            ctypes.c_char_p,
            ctypes.c_char_p,
            ctypes.c_long,
            ctypes.c_int,
            ctypes.c_long,
        ]
    if os.environ.get("WARM_TRANSFORMERS"):
        import torch
        import transformers  # noqa: F401

        import messcli.models.transformers

        torch.set_num_threads(1)
    assert messcli.jobs.route
    for line in sys.stdin:
        job = json.loads(line)
        scratch = str(Path(job["folder"]).parent / f"scratch-{os.getpid()}")
        Path(f"{scratch}.calls").unlink(missing_ok=True)
        started = time.monotonic()
        child = os.fork()
        if not child:
            _child(job, shim, scratch)
        for seconds, number in [*job.get("signals", []), *_kill(job)]:
            if _wait(child, started + seconds) is None:
                os.kill(child, number)
        status = _wait(child, None)
        assert status is not None
        calls = Path(f"{scratch}.calls")
        reply = {
            "status": os.waitstatus_to_exitcode(status),
            "calls": calls.read_text() if calls.exists() else "",
            "stdout": job.get("stdout", f"{scratch}.out"),
            "stderr": f"{scratch}.err",
            "seconds": time.monotonic() - started,
        }
        print(json.dumps(reply), flush=True)
        _ended.clear()


def _kill(job: dict[str, Any]) -> list[tuple[float, int]]:
    return [(job["kill_after"], signal.SIGKILL)] if job.get("kill_after") is not None else []


_ended: dict[int, int] = {}


def _wait(child: int, until: float | None) -> int | None:
    if child in _ended:
        return _ended[child]
    while True:
        pid, status = os.waitpid(child, 0 if until is None else os.WNOHANG)
        if pid:
            _ended[child] = status
            return status
        if until is not None and time.monotonic() >= until:
            return None
        time.sleep(0.001)


if __name__ == "__main__":
    sys.modules["fault_server"] = sys.modules["__main__"]
    _serve()

"""Chat templates are programs out of a checkpoint: they run in a process of their own, with limits.

Jinja's sandbox keeps a template from touching anything; it doesn't keep it from computing for ever or from filling
the memory. The process has both limits, renders with transformers' own code, and loads no torch (0.5 s, 60 MB).
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

CPU_SECONDS = 2.0  # of one rendering; the slowest templates of the hub take milliseconds
WALL_SECONDS = 60.0  # of one rendering on a busy machine, and of the process's start
MEMORY_BYTES = 2 * 2**30  # of address space
_TEXT_BYTES = 4 * 2**20  # that a template may add to ten times its messages


class TemplateRefused(Exception):
    """What a template, or its limits, said of the messages. `limit`: it was stopped."""

    def __init__(self, why: str, *, limit: bool = False) -> None:
        super().__init__(why)
        self.limit = limit


class Renderer:
    """One process that renders; started when it is needed, and again when it was stopped. For any thread."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def render(self, template: str, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
        """The text of a chat. Raises TemplateRefused."""
        job = {"template": template, "messages": list(messages), "options": dict(options)}
        line = json.dumps(job, default=str).encode() + b"\n"
        with self._lock:
            try:
                answer = json.loads(self._ask(line))
            except BaseException:  # a signal too: what comes later would be the answer to another question
                self._stop()
                raise
        if "text" in answer:
            return str(answer["text"])
        raise TemplateRefused(answer["error"], limit=answer["limit"])

    def _ask(self, line: bytes) -> bytes:
        process = self._start()
        assert process.stdin is not None  # noqa: S101  # both are pipes
        assert process.stdout is not None  # noqa: S101
        answer, until = b"", time.monotonic() + WALL_SECONDS
        try:
            process.stdin.write(line)
            process.stdin.flush()
            while not answer.endswith(b"\n"):
                if not select.select([process.stdout], [], [], max(0.0, until - time.monotonic()))[0]:
                    raise TemplateRefused(f"not done within {WALL_SECONDS:.0f} s", limit=True)
                part = os.read(process.stdout.fileno(), 2**20)
                if not part:
                    raise BrokenPipeError
                answer += part
        except BrokenPipeError:
            raise TemplateRefused(
                f"stopped at {CPU_SECONDS:.0f} s or {MEMORY_BYTES // 2**30} GiB", limit=True
            ) from None
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._stop()
            code = f"import sys; sys.path[:0] = {sys.path!r}; from messcli.models.templates import serve; serve()"
            self._process = subprocess.Popen(  # noqa: S603  # our own interpreter
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the run
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "USE_TORCH": "0"},
            )
        return self._process

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


@functools.cache
def renderer() -> Renderer:
    """The one of this process; it ends with it."""
    made = Renderer()
    atexit.register(made.close)
    return made


# --- the process ---


class _OutOfTime(BaseException):
    """The CPU seconds of a rendering are over. No template can catch it."""


def serve() -> None:
    """Render what comes on standard input, a JSON document a line, until it ends."""
    import jinja2  # noqa: F401  # before there are limits
    from transformers.utils import chat_template_utils

    def out_of_time(number: int, frame: FrameType | None) -> None:
        raise _OutOfTime

    signal.signal(signal.SIGVTALRM, out_of_time)
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        most = resource.getrlimit(kind)[1]
        wanted = MEMORY_BYTES if most == resource.RLIM_INFINITY else min(MEMORY_BYTES, most)
        try:
            resource.setrlimit(kind, (wanted, most))
        except (ValueError, OSError):  # macOS refuses
            continue
    for line in sys.stdin.buffer:
        sys.stdout.write(json.dumps(_answer(chat_template_utils, json.loads(line), len(line))) + "\n")
        sys.stdout.flush()


def _answer(library: Any, job: Mapping[str, Any], size: int) -> dict[str, Any]:
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
        try:
            text = _rendered(library, job["template"], job["messages"], job["options"])
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
    except _OutOfTime:
        return {"error": f"takes more than {CPU_SECONDS:.0f} s", "limit": True}
    except (MemoryError, OverflowError):
        return {"error": f"takes more than {MEMORY_BYTES // 2**30} GiB", "limit": True}
    except Exception as error:  # a template raises what it likes
        line = next((part.strip() for part in str(error).splitlines() if part.strip()), "")
        return {"error": f"{type(error).__name__}: {line[:500]}".rstrip(".: "), "limit": False}
    if len(text) > _TEXT_BYTES + 10 * size:
        return {"error": f"makes {len(text)} characters of {size} bytes of messages", "limit": True}
    return {"text": text}


def _rendered(library: Any, template: str, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> str:
    if hasattr(library, "render_jinja_template"):
        texts, _ = library.render_jinja_template(
            conversations=[messages], chat_template=template, add_generation_prompt=True, **options
        )
        return str(texts[0])
    # before transformers 4.52
    compiled = library._compile_jinja_template(template)
    return str(compiled.render(messages=messages, add_generation_prompt=True, **options))

"""CPU seconds of other processes that work for us: a server on this host, an engine's workers.

Knows processes; not what they compute.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import psutil  # type: ignore[import-untyped]  # carries no types

from messcli.errors import MeterError


class ProcessClock:
    """CPU seconds of processes and their descendants since the first look. Never falls.

    What a process does between the last look at it and its end is lost.

    Args:
        roots: finds the processes; asked each time, for a server may be restarted. May raise MeterError.
    """

    def __init__(self, roots: Callable[[], Iterable[Any]]) -> None:
        self._roots = roots
        self._since = time.time()
        self._last: dict[tuple[int, float], float] = {}
        self._seconds = 0.0

    def seconds(self) -> float:
        """CPU seconds so far. Raises what `roots` raises."""
        for process in self._tree():
            try:
                with process.oneshot():
                    started = process.create_time()
                    times = process.cpu_times()
            except psutil.Error:
                continue  # it has just ended
            used = times.user + times.system
            before = self._last.get((process.pid, started), 0.0 if started >= self._since else used)
            self._seconds += max(0.0, used - before)
            self._last[process.pid, started] = used
        return self._seconds

    def _tree(self) -> list[Any]:
        found: dict[int, Any] = {}
        for root in self._roots():
            try:
                for process in (root, *root.children(recursive=True)):
                    found[process.pid] = process
            except psutil.Error:  # noqa: PERF203  # each may end at any time
                continue
        return list(found.values())


def listeners(port: int, who: str) -> list[Any]:
    """The processes that listen on a TCP port of this host.

    Raises MeterError where there is none, or where this user can't see which it is.
    """
    cure = "Meter it by --meter rapl or nvml, or give its prices in [models.joules]"
    try:
        pids = {
            connection.pid
            for connection in psutil.net_connections(kind="tcp")
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        }
    except psutil.AccessDenied:
        pids = {None}
    if not pids:
        raise MeterError(f"{who}: nothing listens on port {port} of this host. Start the server")
    if None in pids:
        raise MeterError(
            f"{who}: the server belongs to another user or container, so its CPU seconds can't be read. {cure}"
        )
    try:
        return [psutil.Process(pid) for pid in pids]
    except psutil.NoSuchProcess:
        return []


def child_pids() -> set[int]:
    """The processes that this one has started and that still run."""
    return {process.pid for process in psutil.Process().children()}


def all_alive(pids: Iterable[int]) -> bool:
    """Whether each of these processes is there and hasn't ended."""
    for pid in pids:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return False
        except psutil.NoSuchProcess:  # noqa: PERF203  # each may end at any time
            return False
    return True


def live_seconds(pids: Iterable[int]) -> float:
    """CPU seconds of children of this process and their descendants, while they live.

    When one has ended and was waited for, its seconds are in this process's own count of ended children
    instead (`messcli.energy.cpu.cpu_seconds`): the sum of both goes on without a break.
    """
    seconds = 0.0
    for pid in pids:
        try:
            root = psutil.Process(pid)
            for process in (root, *root.children(recursive=True)):
                times = process.cpu_times()
                seconds += times.user + times.system + times.children_user + times.children_system
        except psutil.Error:  # noqa: PERF203  # each may end at any time
            continue
    return seconds

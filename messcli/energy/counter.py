"""What a counter of energy is, and what counters are built with. Knows no hardware."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from messcli.errors import MeterError


class CounterReset(MeterError):
    """A counter fell or leapt, as after a driver reload: the energy since its last reading is unknown.

    Raised once; the counter has re-based itself, and its next reading goes on from its last one.
    """


class Counter(Protocol):
    """Cumulative joules of one source of energy."""

    @property
    def kind(self) -> str:
        """nvml | rapl | estimate: what a row's `meter` says."""
        ...

    @property
    def provenance(self) -> str:
        """What is read and how, in one line."""
        ...

    @property
    def period(self) -> float:
        """Seconds between two updates of the counter: shorter spans may read 0."""
        ...

    @property
    def partitioned(self) -> bool:
        """Whether the device is a slice of what the counter covers (MIG)."""
        ...

    def read(self) -> float:
        """Joules since opening; never less than the reading before.

        Raises CounterReset once where energy was lost from sight, MeterError where the counter can't
        be read any more.
        """
        ...

    def warnings(self) -> list[str]:
        """What makes the reading mean more than this run's energy, one line each; [] is the good case."""
        ...

    def close(self) -> None:
        """Give the counter back; closing twice is harmless."""
        ...


@dataclass(frozen=True, slots=True)
class MeterOptions:
    """What a meter may want to know besides the device."""

    cpu_watts: float | None = None  # per busy core, for the estimate ([energy] cpu_watts); None: the default
    others: Sequence[Callable[[], float]] = ()  # each tells CPU seconds of other processes that run models
    command: Sequence[str] = ()  # [energy] command: prints cumulative joules of the host
    command_seconds: float | None = None  # between two updates of what it prints


@dataclass(frozen=True, slots=True)
class MeterKind:
    """What stands behind a name of `--meter`."""

    open: Callable[
        [str, MeterOptions], Counter
    ]  # of a device, by torch's name; raises MeterError with the cure
    devices: tuple[str, ...]  # what `auto` takes it for, by the part of the device's name before ":"
    host: bool = False  # one counter stands for every device that is given to it
    measures: bool = True  # False: reckoned, not read; `auto` takes it last
    there: Callable[[], bool] = lambda: True  # whether this machine may have one; `auto` asks no other


class Heartbeat:
    """Calls `beat` every `seconds` in a daemon thread, until stopped or until it raises MeterError.

    The error is kept in `error`: whoever owns the counter raises it at the next reading.
    """

    def __init__(self, beat: Callable[[], object], seconds: float) -> None:
        self.error: MeterError | None = None
        self._beat = beat
        self._seconds = seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="messcli-energy", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stopped.wait(self._seconds):
                self._beat()
        except MeterError as error:
            self.error = error

    def stop(self) -> None:
        """End the thread, once the beat in hand is done."""
        self._stopped.set()
        self._thread.join()

"""The CPU's energy: RAPL counters from sysfs, or CPU seconds times watts as an estimate.

Linux only (powercap, https://docs.kernel.org/power/powercap/powercap.html). AMD processors appear
under the same names.
"""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

from messcli.energy.counter import CounterReset, Heartbeat, MeterKind, MeterOptions
from messcli.errors import MeterError

POWERCAP = Path("/sys/class/powercap")
RAPL_PERIOD_SECONDS = 0.001  # Intel SDM vol. 3B, 16.10.2: the status registers update about every millisecond
# More than any package draws: a counter read this often can't wrap twice unseen, and one that seems to
# have gained more has been reset, not wrapped.
_MOST_WATTS = 2000.0
_SLACK_SECONDS = 1.0  # for readings close together

# Desktop and server processors under load draw 4 to 15 W per busy core, memory and uncore included.
DEFAULT_CPU_WATTS = 10.0


class _Domain:
    """One RAPL domain: an energy counter in µJ that wraps at `range_uj`."""

    def __init__(self, folder: Path) -> None:
        self.name = _read(folder / "name")
        self._energy = folder / "energy_uj"
        self.range_uj = _read_int(folder / "max_energy_range_uj")
        if self.range_uj <= 0:
            raise MeterError(f"{folder / 'max_energy_range_uj'} says {self.range_uj}. Take --meter estimate")
        self._last_uj = _read_int(self._energy)

    def advance_uj(self) -> int:
        """µJ since the last call."""
        now_uj = _read_int(self._energy)
        gained = now_uj - self._last_uj
        self._last_uj = now_uj
        return gained if gained >= 0 else gained + self.range_uj


class RaplCounter:
    """All CPU packages, and their memory where it has a counter of its own. Reads under `root`.

    Core and uncore lie inside the package and psys around it, so they are left out. A package's counter
    covers everything that runs on it, other processes included. Raises MeterError where there is no
    domain or no permission.
    """

    kind = "rapl"
    period = RAPL_PERIOD_SECONDS
    partitioned = False

    def __init__(self, root: Path = POWERCAP) -> None:
        folders = sorted(path for path in root.glob("intel-rapl:*") if path.name.count(":") == 1)
        packages = [folder for folder in folders if _read(folder / "name").startswith("package-")]
        # the kernel lists children beside their parents as well as inside them; take the flat list
        drams = [
            child
            for package in packages
            for child in sorted(root.glob(f"{package.name}:*"))
            if re.fullmatch(r"dram(-.*)?", _read(child / "name"))
        ]
        if not packages:
            raise MeterError(
                f"no RAPL package counter under {root} (virtual machines and containers mostly hide it). "
                "Take --meter estimate"
            )
        self._domains = [_Domain(folder) for folder in packages + drams]
        self._microjoules = 0
        self._fell: str | None = None  # the domain that was reset since the last reading
        self._seconds = time.monotonic()
        self._lock = threading.Lock()
        names = ", ".join(domain.name for domain in self._domains)
        self.provenance = f"RAPL energy counters of {names} ({root}), all that runs on them included"
        least_joules = min(domain.range_uj for domain in self._domains) / 1e6
        self._heartbeat = Heartbeat(self._advance, least_joules / _MOST_WATTS)

    def read(self) -> float:
        """Joules since opening, summed over packages and memory. Raises CounterReset, MeterError."""
        if self._heartbeat.error is not None:
            raise self._heartbeat.error
        self._advance()
        with self._lock:
            fell, self._fell = self._fell, None
            joules = self._microjoules / 1e6
        if fell is not None:
            raise CounterReset(
                f"the RAPL counter of {fell} went backwards, further than a wrap explains: joules of the calls "
                "in between are unknown and left null"
            )
        return joules

    def _advance(self) -> None:
        with self._lock:
            now = time.monotonic()
            most_uj = (now - self._seconds + _SLACK_SECONDS) * _MOST_WATTS * 1e6
            self._seconds = now
            gains_uj = [(domain.name, domain.advance_uj()) for domain in self._domains]
            self._fell = next((name for name, gain in gains_uj if gain > most_uj), self._fell)
            self._microjoules += sum(gain for _, gain in gains_uj if gain <= most_uj)

    @property
    def seen_joules(self) -> float:
        """What `read` would say if the counters stood still since the last beat."""
        with self._lock:
            return self._microjoules / 1e6

    def warnings(self) -> list[str]:
        return []

    def close(self) -> None:
        self._heartbeat.stop()


def cpu_seconds() -> float:
    """CPU seconds of this process, all threads, and of its children that have ended."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


class EstimateCounter:
    """CPU seconds times watts per busy core: no measurement, and always labelled so.

    `watts` None is the default. `seconds` tells CPU seconds so far; work in other live processes is not
    in the default's. Raises MeterError for watts that are no positive number.
    """

    kind = "estimate"
    partitioned = False

    def __init__(self, watts: float | None = None, seconds: Callable[[], float] = cpu_seconds) -> None:
        if watts is not None and not 0 < watts < math.inf:
            raise MeterError(f"[energy] cpu_watts = {watts}: give the watts of one busy core, more than 0")
        self.watts = DEFAULT_CPU_WATTS if watts is None else float(watts)
        setting = "[energy] cpu_watts in zoo.toml"
        source = f"default; set {setting}" if watts is None else setting
        self.provenance = f"CPU seconds of this process x {self.watts:g} W per busy core ({source})"
        self.period = time.get_clock_info("process_time").resolution
        self._seconds = seconds
        self._start_seconds = seconds()

    def read(self) -> float:
        """Estimated joules since opening."""
        return (self._seconds() - self._start_seconds) * self.watts

    def warnings(self) -> list[str]:
        return []

    def close(self) -> None:
        return


def _open_estimate(device: str, options: MeterOptions) -> EstimateCounter:
    cpu_watts, others = options.cpu_watts, options.others
    if not others:
        return EstimateCounter(cpu_watts)
    latest = 0.0

    def seconds() -> float:
        nonlocal latest
        # a worker's seconds are nowhere for the moment between its end and the wait for it
        latest = max(latest, cpu_seconds() + sum(other() for other in others))
        return latest

    counter = EstimateCounter(cpu_watts, seconds)
    counter.provenance = counter.provenance.replace("this process", "this process and its models' servers")
    return counter


RAPL = MeterKind(lambda device, options: RaplCounter(), devices=("cpu",))
ESTIMATE = MeterKind(_open_estimate, devices=("cpu",), host=True, measures=False)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except PermissionError as error:
        raise MeterError(
            f"no permission to read {path}. Run as root, or "
            f"`sudo chmod a+r {path.parent.parent}/*/energy_uj` (a udev rule makes it last), "
            "or take --meter estimate"
        ) from error
    except OSError as error:
        raise MeterError(f"RAPL: {path}: {error.strerror}. Take --meter estimate") from error


def _read_int(path: Path) -> int:
    text = _read(path)
    try:
        return int(text)
    except ValueError:
        raise MeterError(f"RAPL: {path} holds {text!r}, not a number. Take --meter estimate") from None

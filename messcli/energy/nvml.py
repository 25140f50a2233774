"""NVIDIA cards: NVML's total energy counter, or instantaneous power integrated by a thread.

Uses nvidia-ml-py (`import pynvml`) and neither needs nor starts CUDA: which card stands behind "cuda:0"
is worked out from CUDA_VISIBLE_DEVICES and compared with torch's own answer once torch has one.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from messcli.energy.counter import CounterReset, Heartbeat, MeterKind
from messcli.errors import MeterError

COUNTER_PERIOD_SECONDS = 0.1  # how often cards since Volta update the counter
# More than any card draws; a counter that gains more shows garbage.
_MOST_WATTS = 20_000.0
_SLACK_SECONDS = 1.0  # for readings close together
SAMPLE_SECONDS = 0.02  # between two samples of power, where there is no counter

_RERUN = "run the same command again (what is finished stays)"
_ESTIMATE = "or take --meter estimate"
_GO_ON = f"check `nvidia-smi`, then {_RERUN}, {_ESTIMATE}"
_CURES = {
    "LIBRARY_NOT_FOUND": f"install the NVIDIA driver (containers need its `utility` capability), {_ESTIMATE}",
    "DRIVER_NOT_LOADED": f"load the driver (`modprobe nvidia`), {_ESTIMATE}",
    "NO_PERMISSION": f"run as a user who may open /dev/nvidia*, {_ESTIMATE}",
    "LIB_RM_VERSION_MISMATCH": f"the driver was updated while loaded: reload it or reboot, {_ESTIMATE}",
    "FUNCTION_NOT_FOUND": f"update the NVIDIA driver, {_ESTIMATE}",
    "NOT_SUPPORTED": "this card tells no energy: take --meter estimate",
    "GPU_IS_LOST": f"reset the card or reboot, then {_RERUN}",
    "RESET_REQUIRED": f"reset the card (`nvidia-smi -r`), then {_RERUN}",
}
# What a card or driver without the counter answers; anything else is a fault to report.
_REFUSED = ("NOT_SUPPORTED", "FUNCTION_NOT_FOUND", "DEPRECATED")


@dataclass(frozen=True, slots=True)
class Card:
    """One card as NVML lists it."""

    uuid: str
    name: str


def _binding() -> Any:
    """nvidia-ml-py. Raises MeterError where it is missing or shadowed by the retired package."""
    try:
        import pynvml
    except ImportError as error:
        raise MeterError("nvidia-ml-py isn't installed: pip install nvidia-ml-py") from error
    if not hasattr(pynvml, "_nvmlGetFunctionPointer"):
        raise MeterError(
            "the installed pynvml is a retired package that shadows nvidia-ml-py: "
            "pip uninstall -y pynvml && pip install --force-reinstall nvidia-ml-py"
        )
    return pynvml


def _fault(nvml: Any, error: Any, what: str) -> MeterError:
    code = error.value
    name = _code_name(nvml, code)
    return MeterError(f"NVML: {what}: {error} (NVML_ERROR_{name}, {code}): {_CURES.get(name, _GO_ON)}")


def _code_name(nvml: Any, code: int) -> str:
    names = (name for name in dir(nvml) if name.startswith("NVML_ERROR_") and getattr(nvml, name) == code)
    return next(names, "NVML_ERROR_UNLISTED").removeprefix("NVML_ERROR_")


def visible(cards: Sequence[Card], value: str | None) -> list[Card]:
    """The cards that CUDA shows under CUDA_VISIBLE_DEVICES=`value`, in CUDA's order; None is unset.

    Indices or UUIDs, which may be abbreviated to a prefix that fits one card. As CUDA does: the first entry
    that fits no card (such as -1) hides itself and the rest, an entry that comes again hides all, and so does
    an empty value. MIG slices raise MeterError.
    https://docs.nvidia.com/cuda/cuda-c-programming-guide/#cuda-environment-variables
    """
    if value is None:
        return list(cards)
    by_uuid = value.strip().startswith("GPU-")
    chosen: list[Card] = []
    for entry in map(str.strip, value.split(",")):
        if entry.startswith("MIG-"):
            raise MeterError(
                f"CUDA_VISIBLE_DEVICES={value} names a MIG slice, which has no energy counter of its own. "
                "Take a whole card, or --meter estimate"
            )
        if by_uuid:
            fitting = [card for card in cards if entry.startswith("GPU-") and card.uuid.startswith(entry)]
        else:
            # CUDA reads leading digits, as strtol does
            digits = re.match(r"\+?(\d+)", entry)
            index = int(digits[1]) if digits else len(cards)
            fitting = list(cards[index : index + 1])
        if len(fitting) != 1:
            break
        if fitting[0] in chosen:
            return []
        chosen.append(fitting[0])
    return chosen


def _cards(nvml: Any) -> list[Card]:
    """All cards that this process may use, in NVML's order, which is that of their PCI addresses."""
    cards = []
    try:
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
            except nvml.NVMLError_NoPermission:
                continue  # counted, but kept from this process (cgroups), and from CUDA as well
            cards.append(Card(nvml.nvmlDeviceGetUUID(handle), nvml.nvmlDeviceGetName(handle)))
    except nvml.NVMLError as error:
        raise _fault(nvml, error, "listing the cards") from error
    return cards


def _start(nvml: Any) -> None:
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise _fault(nvml, error, "starting") from error


def _stop(nvml: Any) -> None:
    try:
        nvml.nvmlShutdown()
    except nvml.NVMLError:
        return  # the driver is gone, and with it what there was to give back


def visible_cards() -> list[Card]:
    """The cards that this process sees: index N is torch's "cuda:N". Raises MeterError."""
    nvml = _binding()
    _start(nvml)
    try:
        return visible(_cards(nvml), os.environ.get("CUDA_VISIBLE_DEVICES"))
    finally:
        _stop(nvml)


def free_memory() -> dict[str, tuple[int, int]]:
    """Free and total bytes of each card that this process sees, by torch's name. Raises MeterError."""
    nvml = _binding()
    _start(nvml)
    try:
        found = {}
        for index, card in enumerate(visible(_cards(nvml), os.environ.get("CUDA_VISIBLE_DEVICES"))):
            memory = nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByUUID(card.uuid))
            found[f"cuda:{index}"] = int(memory.free), int(memory.total)
        return found
    except nvml.NVMLError as error:
        raise _fault(nvml, error, "asking for free memory") from error
    finally:
        _stop(nvml)


def visible_devices() -> list[str]:
    """torch's names of the cards that this process sees, such as ["cuda:0", "cuda:1"]. Raises MeterError."""
    return [f"cuda:{index}" for index in range(len(visible_cards()))]


def driver_version() -> str | None:
    """The NVIDIA driver's; None where there is none."""
    try:
        nvml = _binding()
        _start(nvml)
    except MeterError:
        return None
    try:
        return str(nvml.nvmlSystemGetDriverVersion())
    except nvml.NVMLError:
        return None
    finally:
        _stop(nvml)


def _torch_uuid(index: int) -> str | None:
    """torch's UUID of its card `index`, where CUDA already runs in this process; it is never started here."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized() or index >= torch.cuda.device_count():
        return None
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)  # absent before torch 2.5
    return None if uuid is None else f"GPU-{uuid}"


def _card_of(nvml: Any, device: str, index: int) -> Card:
    """The card behind torch's `device`. Raises MeterError where there is none, or no telling which."""
    cards = _cards(nvml)
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = visible(cards, value)
    known = _torch_uuid(index)
    if known is not None:
        for card in cards:
            if card.uuid == known:
                return card
        raise MeterError(f"{device} is {known} to torch, and NVML lists no such card: {_GO_ON}")
    if index >= len(shown):
        setting = "" if value is None else f" under CUDA_VISIBLE_DEVICES={value}"
        raise MeterError(
            f"{device} isn't there: {len(shown)} of {len(cards)} NVIDIA cards are visible{setting}. Change "
            "the device in zoo.toml or CUDA_VISIBLE_DEVICES"
        )
    by_index = value is None or not value.strip().startswith("GPU-")
    by_pci = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    if by_index and not by_pci and len({card.name for card in cards}) > 1:
        raise MeterError(
            f"which card {device} is can't be told: the cards differ, and CUDA numbers the fastest first. "
            "Set CUDA_DEVICE_ORDER=PCI_BUS_ID, or name UUIDs in CUDA_VISIBLE_DEVICES (see `nvidia-smi -L`)"
        )
    return shown[index]


class NvmlCounter:
    """One card's joules, from its energy counter where it has one, else from sampled power.

    `device` is torch's name ("cuda:0"). Raises MeterError naming NVML's error code and the cure.
    """

    kind = "nvml"
    period = COUNTER_PERIOD_SECONDS

    def __init__(self, device: str, *, sample_seconds: float = SAMPLE_SECONDS) -> None:
        prefix, _, number = device.partition(":")
        if prefix != "cuda" or not number.isdigit():
            raise MeterError(f"NVML can't read device {device}. Name it cuda:N in zoo.toml, {_ESTIMATE}")
        self._nvml = nvml = _binding()
        self._device = device
        self._index = int(number)
        self._agreed_with_torch = False
        self._heartbeat: Heartbeat | None = None
        self._closed = False
        _start(nvml)
        try:
            self.card = _card_of(nvml, device, self._index)
            label = f"{self.card.uuid} ({self.card.name})"
            self._handle = self._ask(nvml.nvmlDeviceGetHandleByUUID, self.card.uuid)
            self.partitioned = self._mig()
            self._pids_at_opening = frozenset(self._pids())
            try:
                self._last_mj = nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
            except nvml.NVMLError as refusal:
                if _code_name(nvml, refusal.value) not in _REFUSED:
                    raise _fault(nvml, refusal, f"the energy counter of {label}") from refusal
                power, source = self._power_source()
                self._integral = _Integral(power)
                self._heartbeat = Heartbeat(self._integral.read, sample_seconds)
                self.provenance = (
                    f"NVML {source} of {label}, sampled every {sample_seconds * 1000:g} ms "
                    f"(energy counter: {refusal})"
                )
            else:
                self._joules = 0.0
                self._seconds = time.monotonic()
                self.provenance = f"NVML total energy counter of {label}"
        except MeterError:
            self.close()
            raise

    def read(self) -> float:
        """Joules since opening. Raises CounterReset where the counter fell, MeterError where NVML failed."""
        self._agree_with_torch()
        if self._heartbeat is not None:
            if self._heartbeat.error is not None:
                raise self._heartbeat.error
            return self._integral.read()
        now_mj = self._ask(self._nvml.nvmlDeviceGetTotalEnergyConsumption, self._handle)
        before_mj, self._last_mj = self._last_mj, now_mj
        now = time.monotonic()
        most_mj = (now - self._seconds + _SLACK_SECONDS) * _MOST_WATTS * 1000
        self._seconds = now
        if not 0 <= now_mj - before_mj <= most_mj:
            how = "went backwards" if now_mj < before_mj else "leapt"
            raise CounterReset(
                f"the energy counter of {self.card.uuid} {how}, from {before_mj} to {now_mj} mJ (was the "
                "driver reloaded?): joules of the calls in between are unknown and left null"
            )
        self._joules += (now_mj - before_mj) / 1000
        return self._joules

    def warnings(self) -> list[str]:
        """A card in slices, and other processes that compute on it: the counter covers them too."""
        lines = []
        if self.partitioned:
            lines.append(
                f"{self._device}: MIG is on for {self.card.uuid}: its counter covers the whole card, so "
                "the joules include other slices' work"
            )
        if others := self._other_pids():
            lines.append(
                f"{self._device}: other processes compute on {self.card.uuid} (pid "
                f"{', '.join(map(str, others))}): the joules include their work. "
                "Stop them, or choose another card by CUDA_VISIBLE_DEVICES"
            )
        return lines

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._heartbeat is not None:
            self._heartbeat.stop()
        _stop(self._nvml)

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except self._nvml.NVMLError as error:
            raise _fault(self._nvml, error, f"{function.__name__} of {self.card.uuid}") from error

    def _agree_with_torch(self) -> None:
        """A wrong card's joules must not pass as measured, so torch has the last word on which card it is."""
        if self._agreed_with_torch or (known := _torch_uuid(self._index)) is None:
            return
        if known != self.card.uuid:
            raise MeterError(
                f"{self._device} is {known} to torch, but {self.card.uuid} was metered: set "
                "CUDA_DEVICE_ORDER=PCI_BUS_ID and run the same command again"
            )
        self._agreed_with_torch = True

    def _mig(self) -> bool:
        try:
            current, _ = self._nvml.nvmlDeviceGetMigMode(self._handle)
        except self._nvml.NVMLError as error:
            if _code_name(self._nvml, error.value) in _REFUSED:
                return False  # cards without MIG say so by an error
            raise _fault(self._nvml, error, f"the MIG mode of {self.card.uuid}") from error
        return bool(current == self._nvml.NVML_DEVICE_MIG_ENABLE)

    def _pids(self) -> list[int]:
        try:
            return [process.pid for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)]
        except self._nvml.NVMLError:
            return []  # only a warning hangs on it, and a lost card is told by the next reading

    def _other_pids(self) -> list[int]:
        pids = self._pids()
        others = [pid for pid in pids if not _ours(pid)]
        if len(others) == len(pids):
            # In a container NVML tells pids of the host: one that has come since the opening and is unknown
            # here is this process.
            new = [pid for pid in others if pid not in self._pids_at_opening]
            unknown_here = [pid for pid in new if not Path(f"/proc/{pid}").exists()]
            if unknown_here:
                others.remove(unknown_here[0])
        return others

    def _power_source(self) -> tuple[Callable[[], float], str]:
        """A function that reads watts, and its name. Raises MeterError where there is none."""
        nvml, handle = self._nvml, self._handle

        def instant() -> float:
            # the binding's name for it is younger than the field
            value = self._ask(nvml.nvmlDeviceGetFieldValues, handle, [186])[0]
            if value.nvmlReturn != nvml.NVML_SUCCESS:
                raise _fault(nvml, nvml.NVMLError(value.nvmlReturn), f"the power of {self.card.uuid}")
            return int(value.value.uiVal) / 1000

        def usage() -> float:
            return int(self._ask(nvml.nvmlDeviceGetPowerUsage, handle)) / 1000

        try:
            instant()
        except MeterError:
            usage()
            return usage, "power (on recent cards an average over a second)"
        return instant, "instantaneous power"


class _Integral:
    """Joules from samples of watts, by the trapezoid rule. Safe to read from two threads."""

    def __init__(self, power: Callable[[], float], clock: Callable[[], float] = time.monotonic) -> None:
        self._power = power
        self._clock = clock
        self._lock = threading.Lock()
        self._joules = 0.0
        self._watts = power()
        self._seconds = clock()

    def read(self) -> float:
        """Samples now, and returns joules since the first sample."""
        with self._lock:
            watts = self._power()
            now = self._clock()
            self._joules += (now - self._seconds) * (watts + self._watts) / 2
            self._watts, self._seconds = watts, now
            return self._joules


def _ours(pid: int) -> bool:
    """Whether `pid` is this process or descends from it (a backend's workers)."""
    while pid > 1:
        if pid == os.getpid():
            return True
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return False  # gone, or of another pid namespace
        pid = int(stat.rpartition(")")[2].split()[1])  # the name before it may hold spaces and parentheses
    return pid == os.getpid()


NVML = MeterKind(lambda device, _: NvmlCounter(device), devices=("cuda",))

"""AMD cards: the energy accumulator that amd-smi reads.

Uses the package amdsmi, whose library comes with ROCm. torch calls AMD's cards "cuda:0", ... as it calls NVIDIA's. The
accumulator counts since the driver was loaded, in steps that the card states (15.3 µJ on MI200 and MI300).
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

from messcli.energy.counter import CounterReset, MeterKind, MeterOptions
from messcli.energy.nvml import Card, visible
from messcli.errors import MeterError, first_line

PERIOD_SECONDS = 0.1  # two readings closer together may be equal: amd-smi's own cache is of that order
_DRIVER = Path("/dev/kfd")  # the kernel's door to AMD's compute cards
_MOST_WATTS = 20_000.0  # more than any card draws; a counter that gains more shows garbage
_SLACK_SECONDS = 1.0
_ESTIMATE = "or take --meter estimate"


def _binding() -> Any:
    try:
        with contextlib.redirect_stdout(sys.stderr):  # without its library, amdsmi prints before it fails
            import amdsmi
    except ImportError as error:
        raise MeterError(f"amdsmi isn't installed: pip install 'messcli[amd]', {_ESTIMATE}") from error
    except Exception as error:  # amdsmi fails in its own ways where libamd_smi.so is missing
        raise MeterError(
            f"amdsmi finds no libamd_smi.so ({first_line(error)}): install amd-smi-lib of ROCm, {_ESTIMATE}"
        ) from error
    return amdsmi


class AmdCounter:
    """One card's accumulator. Raises MeterError where there is no such card or nothing to read."""

    kind = "amd"
    period = PERIOD_SECONDS
    partitioned = False

    def __init__(self, device: str) -> None:
        self._amdsmi = _binding()
        self._call(self._amdsmi.amdsmi_init)
        self._open = True
        try:
            self._handle, uuid = self._find(device)
            self._last, step = self._count()
        except MeterError:
            self.close()
            raise
        self._joules = 0.0
        self._seconds = time.monotonic()
        self._device = device
        self.provenance = f"amd-smi energy accumulator of {uuid}, in steps of {step * 1e6:.3g} µJ"

    def read(self) -> float:
        """Joules since opening. Raises CounterReset where the accumulator fell or leapt, MeterError where it failed."""
        now, step = self._count()
        gained = (now - self._last) * step
        self._last = now
        seconds, self._seconds = self._seconds, time.monotonic()
        if not 0 <= gained <= (self._seconds - seconds + _SLACK_SECONDS) * _MOST_WATTS:
            raise CounterReset(
                f"the energy accumulator of {self._device} gained {gained:.4g} J (was the driver reloaded?): joules of "
                "the calls in between are unknown and left null"
            )
        self._joules += gained
        return self._joules

    def warnings(self) -> list[str]:
        return []

    def close(self) -> None:
        if self._open:
            self._open = False
            with contextlib.suppress(
                MeterError
            ):  # the driver is gone, and with it what there was to give back
                self._call(self._amdsmi.amdsmi_shut_down)

    def _count(self) -> tuple[int, float]:
        """The accumulator, and joules per count."""
        found = self._call(self._amdsmi.amdsmi_get_energy_count, self._handle)
        step = found["counter_resolution"] * 1e-6
        if not step > 0:
            raise MeterError(f"amd-smi states no resolution of its energy counter: take {_ESTIMATE[8:]}")
        return found["energy_accumulator"], step

    def _find(self, device: str) -> tuple[Any, str]:
        """The handle of torch's `device`, and its name. HIP counts what ROCR_VISIBLE_DEVICES leaves over."""
        handles: dict[str, Any] = {}
        for handle in self._call(self._amdsmi.amdsmi_get_processor_handles):
            handles[self._call(self._amdsmi.amdsmi_get_gpu_device_uuid, handle)] = handle
        cards = [Card(uuid, "AMD") for uuid in sorted(handles, key=lambda uuid: self._hip_id(handles[uuid]))]
        cards = visible(cards, os.environ.get("ROCR_VISIBLE_DEVICES"))
        asked = os.environ.get("HIP_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES"))
        cards = visible(cards, asked)
        number = int(device.partition(":")[2] or 0)
        if number >= len(cards):
            raise MeterError(f"amd-smi sees {len(cards)} cards that this process may use, and no {device}")
        return handles[cards[number].uuid], cards[number].uuid

    def _hip_id(self, handle: Any) -> int:
        """HIP's number of a card where this amdsmi tells it (7.0); else they stay in amd-smi's order."""
        ask = getattr(self._amdsmi, "amdsmi_get_gpu_enumeration_info", None)
        with contextlib.suppress(MeterError, TypeError, ValueError, KeyError):
            if ask is not None:
                return int(self._call(ask, handle)["hip_id"])
        return 0

    def _call(self, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except self._amdsmi.AmdSmiException as error:
            raise MeterError(
                f"amd-smi: {function.__name__}: {first_line(error)}: check `amd-smi monitor`, {_ESTIMATE}"
            ) from error


def _opened(device: str, options: MeterOptions) -> AmdCounter:
    return AmdCounter(device)


AMD = MeterKind(_opened, devices=("cuda",), there=_DRIVER.exists)

"""Apple silicon: cumulative energy of processor, memory and GPU, as zeus-apple-silicon reads it from IOReport."""

from __future__ import annotations

import sys
from typing import Any

from messcli.energy.counter import MeterKind, MeterOptions
from messcli.errors import MeterError, first_line

PERIOD_SECONDS = 0.1  # IOReport's channels are updated at least this often under load
# What belongs to which of torch's devices, in mJ; a chip without one leaves it None. Nothing is counted twice.
_PARTS = {"cpu": ("cpu_total_mj", "dram_mj"), "mps": ("gpu_mj", "gpu_sram_mj", "ane_mj")}


class AppleCounter:
    """One part of the chip. Raises MeterError where it can't be read."""

    kind = "apple"
    period = PERIOD_SECONDS
    partitioned = False

    def __init__(self, device: str) -> None:
        try:
            from zeus_apple_silicon import AppleEnergyMonitor
        except ImportError as error:
            raise MeterError(
                "zeus-apple-silicon isn't installed (Macs with Apple silicon): pip install 'messcli[apple]', or take "
                "--meter estimate"
            ) from error
        self._parts = _PARTS[device.partition(":")[0]]
        try:
            self._monitor = AppleEnergyMonitor()
        except RuntimeError as error:  # what its constructor raises where IOReport can't be asked
            raise MeterError(
                f"IOReport tells no energy: {first_line(error)}. Take --meter estimate"
            ) from error
        metrics = self._ask()
        found = [part for part in self._parts if getattr(metrics, part, None) is not None]
        if not found:
            raise MeterError(f"this chip tells no energy of {device}. Take --meter estimate")
        self._start_mj = self._sum_mj(metrics)
        names = ", ".join(part.removesuffix("_mj") for part in found)
        self.provenance = f"IOReport energy of {names}, all that runs on them included"

    def read(self) -> float:
        """Joules since opening. Raises MeterError."""
        return (self._sum_mj(self._ask()) - self._start_mj) / 1000

    def warnings(self) -> list[str]:
        return []

    def close(self) -> None:
        return

    def _ask(self) -> Any:
        try:
            return self._monitor.get_cumulative_energy()
        except RuntimeError as error:
            raise MeterError(f"IOReport: {first_line(error)}. Take --meter estimate") from error

    def _sum_mj(self, metrics: Any) -> float:
        return float(sum(getattr(metrics, part, None) or 0 for part in self._parts))


def _opened(device: str, options: MeterOptions) -> AppleCounter:
    return AppleCounter(device)


APPLE = MeterKind(_opened, devices=tuple(_PARTS), there=lambda: sys.platform == "darwin")

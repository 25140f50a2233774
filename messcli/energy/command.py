"""A meter that is a program of the user's: it prints the joules of the whole host since whenever it likes.

For what no library reads: a wall plug, a rack's power unit, IPMI. One counter stands for all devices of the zoo.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Sequence

from messcli.energy.counter import CounterReset, MeterKind, MeterOptions
from messcli.errors import MeterError, shown

DEFAULT_SECONDS = 1.0  # between two updates of the counter: wall plugs and baseboard controllers
TIMEOUT_SECONDS = 30.0


class CommandCounter:
    """What `command` prints, in joules, since opening.

    Args:
        command: program and arguments; no shell reads them.
        seconds: between two updates of what it prints.
    """

    kind = "command"
    partitioned = False

    def __init__(self, command: Sequence[str], seconds: float) -> None:
        self._command = tuple(command)
        self.period = seconds
        self.provenance = f"whole host, by {shown(' '.join(command))}, updated every {seconds:g} s"
        self._joules = 0.0
        self._last = self._ask()

    def read(self) -> float:
        """Joules since opening. Raises CounterReset where the number fell, MeterError where there is none."""
        now = self._ask()
        before, self._last = self._last, now
        if now < before:
            raise CounterReset(
                f"[energy] command printed {now:.12g} after {before:.12g}: joules of the calls in between are "
                "unknown and left null"
            )
        self._joules += now - before
        return self._joules

    def warnings(self) -> list[str]:
        return []

    def close(self) -> None:
        return

    def _ask(self) -> float:
        name = f"[energy] command {shown(' '.join(self._command))}"
        try:
            done = subprocess.run(  # noqa: S603  # the user's own command, as the zoo file has it
                self._command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise MeterError(f"{name}: no answer in {TIMEOUT_SECONDS:g} s. Run it by hand") from None
        except OSError as error:
            raise MeterError(f"{name}: {error.strerror}. Give program and arguments, or a path") from None
        if done.returncode != 0:
            said = (done.stderr.strip().splitlines() or ["nothing on standard error"])[-1]
            raise MeterError(f"{name}: exit {done.returncode}: {shown(said)}. Run it by hand")
        try:
            joules = float(done.stdout)
        except ValueError:
            joules = math.nan
        if not math.isfinite(joules):
            raise MeterError(f"{name} printed {shown(done.stdout)}: print cumulative joules, one number")
        return joules


def _opened(device: str, options: MeterOptions) -> CommandCounter:
    if not options.command:
        raise MeterError(
            "--meter command needs a program that prints cumulative joules: set command under [energy] in zoo.toml"
        )
    return CommandCounter(options.command, options.command_seconds or DEFAULT_SECONDS)


COMMAND = MeterKind(_opened, devices=(), host=True)

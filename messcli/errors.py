"""Errors a user can act on, how their messages quote things, and the exit codes. Knows nothing else of messcli.

Every `MessError` is printed by the command line as one line, `Error: <what>. <cure>`; anything
else that escapes is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_SLA_MISSED = 3
EXIT_ROWS_WITH_ERRORS = 4
EXIT_UNAVAILABLE = 69  # EX_UNAVAILABLE of sysexits.h: the same command goes on later
EXIT_STATE_BUSY = 75  # EX_TEMPFAIL of sysexits.h: try again later
EXIT_SIGINT = 130
EXIT_SIGTERM = 143


class MessError(Exception):
    """An error that the user can cure; its message says how."""

    exit_code = EXIT_ERROR


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM, to be obeyed at once. What was committed stays."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


class UsageError(MessError):
    """Options that contradict each other or name something unknown."""

    exit_code = EXIT_USAGE


class InputError(MessError):
    """A line of an input file that is not a request; `--on-error stop` raises it."""


class ZooError(MessError):
    """A zoo file that can't be read or contradicts itself."""


class ModelError(MessError):
    """A model that can't be loaded or can't answer; names the model, its path and the cure."""


class ModelTooLarge(ModelError):
    """A model for which there is no memory now; there may be when another one has left it."""


class ModelUnavailable(ModelError):
    """A model or its server that isn't there now, or whose quota is used up; the same command goes on later."""

    exit_code = EXIT_UNAVAILABLE


class MetricError(MessError):
    """A metric that is unknown, can't be loaded or returned something that is no score."""


class MeterError(MessError):
    """A meter that can't be had or whose reading can't be trusted."""


class CalibrationError(MessError):
    """A calibration that can't be made, can't be read, or doesn't fit the zoo, the devices or the versions."""


class EnginesError(MessError):
    """An engines file that can't be read, or names no engine for a model."""


class StateError(MessError):
    """A state file that can't be used as it is."""


class StateBusy(StateError):
    """Another process holds the state."""

    exit_code = EXIT_STATE_BUSY


class OutcomesError(MessError):
    """An outcomes table that is malformed or lacks an outcome that was asked for."""


def first_line(error: BaseException) -> str:
    """What a library raised, in one line without its last stop."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}".rstrip(".: ")


def shown(value: object) -> str:
    """A value as a message quotes it: not all of a long one."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

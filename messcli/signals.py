"""SIGINT and SIGTERM: end the work in hand cleanly, or at once when told twice. Knows nothing of the work."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from messcli.errors import Interrupted

WORKERS = (
    "messcli-worker"  # what the names of threads begin with that may still compute when the process ends
)


class Stop:
    """What the signals have said so far, and what they need to know of the work."""

    signal: int | None = None  # the first one that came
    in_hand: bool | None = None  # something is being worked on; None before the first of it
    halted: bool = False  # the work itself wants to end
    is_loading: bool = False  # a model is, in the main thread: nothing is lost by ending that

    @contextmanager
    def loading(self) -> Iterator[None]:
        """The first signal that comes meanwhile raises LoadingStopped."""
        self.is_loading = True
        try:
            yield
        finally:
            self.is_loading = False

    def halt(self) -> None:
        """End the work in hand as the first signal does."""
        self.halted = True

    @property
    def is_set(self) -> bool:
        """Whether the work in hand is to end."""
        return self.halted or self.signal is not None


class NothingInHand(BaseException):
    """A signal came while input was being waited for, maybe for ever: nothing is lost by stopping there."""


class LoadingStopped(BaseException):
    """A signal came while a model was loading, which may take minutes: what was answered is kept."""


@contextmanager
def stop_signals(tell: Callable[[str], None], work: str) -> Iterator[Stop]:
    """SIGINT and SIGTERM end a run after the `work` in hand, which sees `Stop.signal`.

    Raises (in the main thread, wherever it is):
        Interrupted: on a second signal, or before there was anything in hand.
        NothingInHand: on the first signal, where `in_hand` is False.
        LoadingStopped: on the first signal, while `loading`.
    """
    stop = Stop()

    def on_signal(number: int, _: FrameType | None) -> None:
        if stop.signal is not None or stop.in_hand is None:
            raise Interrupted(number)
        stop.signal = number
        if not stop.in_hand:
            raise NothingInHand
        if stop.is_loading:
            raise LoadingStopped
        with suppress(RuntimeError):  # the signal came in the middle of a line to the terminal
            tell(f"stopping after the {work} in hand (again: stop now)")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

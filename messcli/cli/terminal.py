"""The terminal: every line that a person reads goes through here, and every byte of data for standard output.

Text from outside (file names, plans, models, servers) is shown, never obeyed: an escape sequence appears as `\\x1b`.
Standard error may be closed, full or gone; that never decides a run.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from messcli.files.standard import write_data

if TYPE_CHECKING:
    from messcli.calibration import CalibrateProgress
    from messcli.jobs.tally import Progress
    from messcli.jobs.watch import Activity

# C0 and C1 controls but the tab, what turns the direction of text, line separators, halves of surrogate pairs (bytes of
# file names that are no UTF-8)
_CONTROLS = re.compile(
    "[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)


def visible(text: str) -> str:
    """`text` as one line of plain text: what a terminal would obey is written out."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def say(*lines: str) -> None:
    """Lines for the user's eyes."""
    if sys.stderr is not None:
        sys.stderr.write("".join(f"{visible(line)}\n" for line in lines))
        sys.stderr.flush()


def show(lines: Iterable[str]) -> None:
    """Lines for people that were asked for: they are what the command prints."""
    put("".join(f"{visible(line)}\n" for line in lines))


def put(text: str) -> None:
    """Data, as it is. Raises what `write_data` raises."""
    write_data(text.encode("utf-8", "backslashreplace"))


class Deaf:
    """A stream that may be closed or full: what can't be written is lost, and nothing is raised."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what can be written."""
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def steady_streams() -> None:
    """Make the standard streams such that no file of ours takes a closed one's place, and none of them raises.

    A program started with `2>&-` would get descriptor 2 for the first file it opens, and C libraries would write
    their messages into it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # noqa: PERF203  # three of them
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115  # for as long as the process lives
    if not isinstance(sys.stderr, Deaf):
        sys.stderr = Deaf(sys.stderr)


@contextmanager
def obeyed_sigterm(interrupt: Callable[[int], BaseException]) -> Iterator[None]:
    """SIGTERM raises `interrupt(number)`, as Ctrl-C raises KeyboardInterrupt.

    Commands that have a clean end take it over.
    """

    def on_signal(number: int, _: Any) -> None:
        raise interrupt(number)

    try:
        before = signal.signal(signal.SIGTERM, on_signal)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- bars ----------------------------------------------------------------------------------------

Tell = Callable[[str], None]


@contextmanager
def _bar(name: str, quiet: bool, **how: Any) -> Iterator[tuple[Any, Tell]]:
    """A bar on a terminal, nothing in a pipe; and a way to print lines without breaking it."""
    from tqdm import tqdm

    with tqdm(desc=name, file=sys.stderr, disable=True if quiet else None, dynamic_ncols=True, **how) as bar:

        def tell(line: str) -> None:
            if not quiet or line.startswith("warning"):
                bar.write(visible(line), file=sys.stderr)

        yield bar, tell


@contextmanager
def request_bar(name: str, quiet: bool) -> Iterator[tuple[Callable[[Progress], None] | None, Tell]]:
    """Over requests; where none is shown, nobody need count the input's lines."""
    with _bar(name, quiet, unit="req") as (bar, tell):

        def on_progress(progress: Progress) -> None:
            bar.total = progress.total
            if bar.n == 0:
                bar.initial = progress.finished  # what earlier runs did is no speed of this one
            notes = list(_activity(progress.activity))
            notes.append(f"{progress.joules:.4g} J")
            if progress.accuracy is not None:
                promised = "" if progress.alpha is None else f" (alpha {progress.alpha:g})"
                notes.append(f"accuracy {progress.accuracy:.4f}{promised}")
            if progress.explorations_left is not None:
                notes.append(f"~{progress.explorations_left:.0f} explorations left")
            bar.set_postfix_str(", ".join(notes), refresh=False)
            bar.update(progress.finished - bar.n)

        yield None if bar.disable else on_progress, tell


def _activity(activity: Activity) -> Iterator[str]:
    """What the engines are doing, where a window takes long enough to tell."""
    yield f"{activity.answers} answers"
    if activity.tokens_per_second is not None:
        yield f"{activity.tokens_per_second:.3g} tokens/s"
    if activity.running:
        yield "running " + " ".join(f"{visible(name)} {count}" for name, count in activity.running.items())


@contextmanager
def time_bar(name: str, quiet: bool) -> Iterator[tuple[Callable[[CalibrateProgress], None], Tell]]:
    """Over the expected seconds."""
    with _bar(name, quiet, bar_format="{desc} |{bar}| {postfix}") as (bar, tell):

        def on_progress(progress: CalibrateProgress) -> None:
            bar.total = progress.seconds + progress.seconds_left
            bar.n = progress.seconds
            bar.set_postfix_str(
                f"{progress.converged}/{progress.cells} cells converged, {progress.readings} readings, "
                f"about {progress.seconds_left:.0f} s left"
            )

        yield on_progress, tell


@contextmanager
def counting_bar(name: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Over runs of simulations, of which there may be several rounds."""
    with _bar(name, quiet, unit="run") as (bar, _):

        def on_progress(done: int, total: int) -> None:
            if done < bar.n:
                bar.reset()
            bar.total = total
            bar.update(done - bar.n)

        yield on_progress

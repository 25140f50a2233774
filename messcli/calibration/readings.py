"""What a calibration has read so far, on disk as soon as it is read, for a run that is taken up again.

Knows readings and what they depend on; measures nothing.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from messcli.amounts import is_amount
from messcli.calibration.file import Cell, OwnPrompts, load_calibration, save
from messcli.errors import CalibrationError, StateBusy
from messcli.files.sinks import STDOUT
from messcli.jsonl import BadLine, decoded, values


class Key(NamedTuple):
    """A cell: a model, lengths in tokens, and how many requests run at a time."""

    model: str
    prompt_tokens: int
    output_tokens: int
    batch_size: int


Readings = dict[Key, list[tuple[float, float]]]  # joules and seconds, per request


def cell_of(key: Key, readings: Readings) -> Cell:
    """The cell with what was read of it so far."""
    pairs = readings.get(key, [])
    return Cell(
        key.prompt_tokens,
        key.output_tokens,
        tuple(joules for joules, _ in pairs),
        tuple(seconds for _, seconds in pairs),
        key.batch_size,
    )


def cells_of(name: str, readings: Readings) -> list[Cell]:
    """Those of one model."""
    return [cell_of(key, readings) for key in readings if key.model == name]


class Measured(Protocol):
    """A model as readings depend on it."""

    @property
    def name(self) -> str: ...
    @property
    def signature(self) -> Mapping[str, Any]: ...
    @property
    def device(self) -> str: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def meter(self) -> str: ...


def setup_of(
    models: Sequence[Measured],
    library_versions: Mapping[str, str],
    devices: Mapping[str, str],
    cpu_watts: float | None,
) -> dict[str, Any]:
    """What readings depend on, as JSON gives it back."""
    setup = {
        "models": [[m.name, m.signature, m.device, m.batch_size, m.meter] for m in models],
        "versions": library_versions,
        "hardware": devices,
        "cpu_watts": cpu_watts,
    }
    loaded: dict[str, Any] = json.loads(json.dumps(setup, sort_keys=True))
    return loaded


class Kept:
    """The readings, on disk as soon as they are made: `<output>.partial`, one JSON line each.

    The first line says what they were made on; readings of another setup are not mixed in.
    """

    def __init__(self, output: str, handle: IO[bytes] | None) -> None:
        self.readings: Readings = {}
        self.own_prompts: Mapping[str, OwnPrompts | None] = {}
        self._output = output
        self._handle = handle

    @classmethod
    @contextmanager
    def open(cls, output: str) -> Iterator[Kept]:
        """Raises StateBusy where another calibration writes the same file."""
        if output == STDOUT:
            yield cls(output, None)
            return
        _refuse_other_file(Path(output))
        path = _partial(output)
        try:
            handle = path.open("a+b")
        except OSError as error:
            raise CalibrationError(f"{path}: can't be written: {error.strerror}. Name another -o") from error
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StateBusy(
                    f"{path}: another calibration writes it. Wait until it has ended, or name another -o"
                ) from None
            try:
                yield cls(output, handle)
            finally:
                if path.is_file() and path.stat().st_size == 0:
                    path.unlink()

    def start(self, setup: Mapping[str, Any], *, fresh: bool, tell: Callable[[str], None]) -> None:
        """Take over what an earlier run measured on the same setup."""
        if self._handle is None:
            return
        self._handle.seek(0)
        whole, _, torn = self._handle.read().rpartition(b"\n")  # a crash tears the last line
        found = [value for _, value in values(io.BytesIO(whole))]
        if (whole or torn) and not _begins_like(setup, found, torn):
            raise CalibrationError(
                f"{_partial(self._output)}: is there, and holds no readings of a calibration. Move it away, or name "
                "another -o"
            )
        if found and not fresh and found[0] == setup:
            self._take(found[1:], {name: size for name, _, _, size, _ in setup["models"]})
            os.truncate(self._handle.fileno(), len(whole) + 1)
        else:
            if found and not fresh:
                tell(f"{_partial(self._output)}: was measured on another setup; starting anew")
            elif not fresh:
                self._take_finished(setup)
            self._handle.truncate(0)
            self._write(setup)
            for key, pairs in self.readings.items():
                for pair in pairs:
                    self._write([*key, *pair])
            self._sync()
        if self.readings:
            tell(f"going on from {sum(map(len, self.readings.values()))} readings of an earlier run")

    def _take(self, found: Sequence[Any], batch_sizes: Mapping[str, int]) -> None:
        for number, value in enumerate(found, 2):
            try:
                key, pair = _reading(value, batch_sizes)
            except (ValueError, TypeError, KeyError):
                raise CalibrationError(
                    f"{_partial(self._output)}:{number}: is no reading that was kept there. Remove the file; "
                    "what it held is measured anew"
                ) from None
            self.readings.setdefault(key, []).append(pair)

    def _take_finished(self, setup: Mapping[str, Any]) -> None:
        with suppress(CalibrationError):  # there is none, or it is another version's: measured anew
            before = load_calibration(Path(self._output))
            if setup_of(before.models, before.versions, before.hardware, before.meter["cpu_watts"]) != setup:
                return
            self.own_prompts = {model.name: model.own_prompts for model in before.models}
            for model in before.models:
                for cell in (*model.cells, *model.load_cells):
                    key = Key(model.name, cell.prompt_tokens, cell.output_tokens, cell.batch_size)
                    self.readings[key] = list(zip(cell.joules, cell.seconds, strict=True))

    def add(self, key: Key, joules: float, seconds: float) -> None:
        """Keep one reading, joules and seconds per request; it is on disk when this returns."""
        self.readings.setdefault(key, []).append((joules, seconds))
        if self._handle is not None:
            self._write([*key, joules, seconds])
            self._sync()

    def _write(self, value: object) -> None:
        if self._handle is not None:
            self._handle.write(_line(value))

    def _sync(self) -> None:
        if self._handle is not None:
            self._handle.flush()
            os.fsync(self._handle.fileno())

    def finish(self, text: str) -> None:
        """Everything is in the calibration: write it, and forget the rest."""
        if self._output == STDOUT:
            return  # its caller has standard output
        save(Path(self._output), text)
        _partial(self._output).unlink(missing_ok=True)


def _refuse_other_file(path: Path) -> None:
    """Raise CalibrationError where somebody else's file would be written over."""
    if not path.is_file() or not path.stat().st_size:
        return
    with suppress(OSError, ValueError):
        document = decoded(path.read_bytes())
        if isinstance(document, dict) and "models" in document:
            return
    raise CalibrationError(f"{path}: is there, and is no calibration. Name another -o")


def _begins_like(setup: Mapping[str, Any], found: Sequence[Any], torn: bytes) -> bool:
    """Whether a file of kept readings begins so; with a setup of any version, or the torn one of this."""
    if found:
        return isinstance(found[0], dict) and "models" in found[0]
    return _line(setup).startswith(torn)


def _line(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode() + b"\n"


def _partial(output: str) -> Path:
    return Path(output + ".partial")


def _reading(value: Any, batch_sizes: Mapping[str, int]) -> tuple[Key, tuple[float, float]]:
    """A line's cell, and its joules and seconds. Raises ValueError, TypeError or KeyError where it is none."""
    if isinstance(value, BadLine):
        raise ValueError(value)
    name, prompt_tokens, output_tokens, *batch_size, joules, seconds = value
    # lines of 0.1 name no batch size: there was one per model
    (size,) = batch_size or (batch_sizes[name],)
    counts = (prompt_tokens, output_tokens, size)
    if name not in batch_sizes or any(type(count) is not int or count < 0 for count in counts):
        raise ValueError(value)
    if not (is_amount(joules) and is_amount(seconds)):
        raise ValueError(value)
    return Key(name, *counts), (joules, seconds)

"""Joules and seconds as an earlier run recorded them: runs that can be compared byte by byte.

Reads what `record` and `route` write; meters nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from messcli.amounts import is_amount
from messcli.errors import MeterError, shown
from messcli.jsonl import BadLine, TornFile, objects, unpacked
from messcli.records import check_id


class Replay:
    """(request id, model) -> (joules, seconds), from an outcomes table or a `route` output, plain, .gz or .zst.

    An id that occurs again keeps its first numbers, so that a lookup never depends on what was looked
    up before. Raises MeterError naming file and line where the file is no such table.
    """

    kind = "replay"

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._numbers: dict[tuple[str, str], tuple[float | None, float | None]] = {}
        self.has_checks = False  # the table says what checks took
        try:
            with self._path.open("rb") as handle:
                for number, row in objects(unpacked(handle, str(path))):
                    self._add(row, number)
        except TornFile as error:
            raise self._unreadable(error.number, error) from error
        except BadLine as error:
            raise self._malformed(error.number, f"{error}") from error
        except OSError as error:
            raise self._unreadable(0, error) from error
        self.provenance = f"replay of {len(self._numbers)} outcomes recorded in {self._path}; nothing is read"

    def lookup(self, request_id: str, model: str) -> tuple[float | None, float | None]:
        """(joules, seconds); joules are None only where the recorded request had failed."""
        try:
            return self._numbers[request_id, model]
        except KeyError:
            raise MeterError(
                f'--meter replay: {self._path} has no joules of model "{model}" for request "{request_id}". '
                "Record it again with `messcli record`, which runs every model on every request"
            ) from None

    def _add(self, row: dict[str, Any], number: int) -> None:
        if "id" not in row:
            raise self._malformed(number, 'no "id"')
        models = row.get("models")
        if isinstance(models, dict):
            for model, outcome in models.items():
                if not isinstance(outcome, dict):
                    raise self._malformed(number, f'"models"."{model}" is no object')
                self._keep(str(row["id"]), model, outcome, number)
        elif isinstance(row.get("model"), str):
            self._keep(str(row["id"]), row["model"], row, number)
        elif row.get("error") is None:  # a failed row names no model, and no lookup asks for it
            raise self._malformed(number, 'neither "models" nor "model"')

    def _keep(self, request_id: str, model: str, outcome: dict[str, Any], number: int) -> None:
        joules = self._number(outcome, "joules", number)
        if joules is None and outcome.get("error") is None:
            return  # unknown then, unknown now: looking it up is an error
        self._numbers.setdefault((request_id, model), (joules, self._number(outcome, "seconds", number)))
        checks = outcome.get("check_joules")
        if isinstance(checks, dict):
            self.has_checks = True
            for reader in checks:
                took = self._number(checks, reader, number)
                self._numbers.setdefault((check_id(request_id, model), reader), (took, None))

    def _number(self, outcome: dict[str, Any], name: str, number: int) -> float | None:
        value = outcome.get(name)
        if value is None:
            return None
        if not is_amount(value):
            raise self._malformed(number, f'"{name}" is {shown(value)}, not a number of {name}')
        return float(value)

    def _unreadable(self, number: int, error: Exception) -> MeterError:
        return MeterError(
            f"--meter replay: {self._path} can't be read after line {number}: {error}. Name a file that "
            "`messcli record` or `messcli route` wrote"
        )

    def _malformed(self, number: int, what: str) -> MeterError:
        return MeterError(
            f"--meter replay: {self._path}:{number}: {what}. "
            "Name a file that `messcli record` or `messcli route` wrote"
        )

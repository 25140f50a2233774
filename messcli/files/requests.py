"""Reading requests: JSON lines from a file, a gzip or zstd file, or standard input, one at a time.

Knows the input format and its errors; knows nothing of what becomes of a request. Memory stays flat
however long the input is: which ids were seen is kept in a private temporary database on disk.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import sqlite3
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import jsonlines

from messcli.errors import InputError
from messcli.records import Rejected, Request

STDIN = "-"
LONGEST_LINE = 64 << 20  # bytes; a longer line is no request, and must not fill the memory
_DEEPEST = 100  # levels of nesting; Python's own limit depends on its version and on who calls


@dataclass(frozen=True, slots=True)
class InputFields:
    """What the input calls its fields (`--prompt-field`, `--reference-field`, `--id-field`)."""

    prompt: str = "prompt"
    reference: str = "reference"
    id: str = "id"


@contextmanager
def open_input(path: str) -> Iterator[IO[bytes]]:
    """Open `path` ("-" is standard input; .gz and .zst are unpacked) for reading bytes.

    Raises:
        InputError: the file is missing, is a folder, can't be read, or needs a library that isn't there.
    """
    if path == STDIN:
        if sys.stdin is None:  # `<&-`
            raise InputError("standard input is closed. Give it something to read, or name a file")
        yield sys.stdin.buffer
        return
    try:
        handle: IO[bytes] = Path(path).open("rb")  # noqa: SIM115  # closed by the `with` below
    except FileNotFoundError:
        raise InputError(f"{path}: no such file. Check the path, or use - for standard input") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder. Name a JSONL file in it") from None
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror}") from None
    with handle:
        if path.endswith(".gz"):
            yield gzip.GzipFile(fileobj=handle)  # type: ignore[misc]  # reads as IO[bytes], isn't declared so
        elif path.endswith(".zst"):
            yield _zstd(handle, path)
        else:
            yield handle


def _zstd(handle: IO[bytes], path: str) -> IO[bytes]:
    try:
        import zstandard
    except ImportError:
        raise InputError(
            f"{path}: reading .zst needs the zstandard package. pip install zstandard, "
            f"or: zstdcat {path} | messcli ... -"
        ) from None

    class Frames(io.RawIOBase):  # its errors as everybody else's
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            try:
                return int(stream.readinto(buffer))
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from None

    stream = zstandard.ZstdDecompressor().stream_reader(handle, read_across_frames=True)
    reader: IO[bytes] = io.BufferedReader(Frames())
    return reader


def count_lines(path: str) -> int | None:
    """How many non-empty lines a file has; None where it can be read only once (a pipe) or is damaged."""
    if path == STDIN or not Path(path).is_file():
        return None
    try:
        with open_input(path) as handle:
            return sum(1 for line in _Lines(handle, path) if line.rstrip())
    except InputError:  # is told when reading gets there: the lines before it are good
        return None


class Occurrences:
    """Counts how often each key was seen in one pass over an input, in constant memory.

    The latest keys are in memory, all earlier ones on disk: an input of usual length never gets there.
    """

    IN_MEMORY = 1 << 15  # keys; a quarter of a kilobyte each

    def __init__(self) -> None:
        self._latest: dict[bytes, tuple[int, int]] = {}
        self._earlier: sqlite3.Connection | None = None

    def add(self, key: bytes, line: int) -> tuple[int, int]:
        """Count `key`; return how often it was seen, this time included, and the line it was first on."""
        known = self._latest.get(key)
        try:
            if known is None and self._earlier is not None:
                known = self._earlier.execute("SELECT n, line FROM seen WHERE key = ?", (key,)).fetchone()
            count, first = known or (0, line)
            self._latest[key] = count + 1, first
            if len(self._latest) > self.IN_MEMORY:
                self._move_to_disk()
        except sqlite3.OperationalError as error:
            raise InputError(
                f"the ids seen so far can't be kept in the temporary folder: {error}. What was routed is kept; "
                "make room or set SQLITE_TMPDIR to another folder, and run the same command again"
            ) from None
        return count + 1, first

    def _move_to_disk(self) -> None:
        if self._earlier is None:
            # The empty name is SQLite's private temporary database: on disk, deleted with the connection.
            self._earlier = sqlite3.connect("", isolation_level=None)
            self._earlier.execute("PRAGMA journal_mode = OFF")
            self._earlier.execute("PRAGMA cache_size = -16000")
            self._earlier.execute("CREATE TABLE seen (key BLOB PRIMARY KEY, n INT, line INT) WITHOUT ROWID")
            self._earlier.execute("BEGIN")
        self._earlier.executemany(
            "INSERT OR REPLACE INTO seen VALUES (?, ?, ?)",
            ((key, count, first) for key, (count, first) in sorted(self._latest.items())),
        )
        self._latest.clear()

    def close(self) -> None:
        if self._earlier is not None:
            self._earlier.close()


class _Lines:
    """Iterates over a handle's lines; remembers which one is in hand and whether it is whole."""

    def __init__(self, handle: IO[bytes], name: str) -> None:
        self._handle = handle
        self._name = name
        self.number = 0
        self.too_long = False
        self.ended = True  # by a line end: the last line of a file that is being written isn't

    def __iter__(self) -> Iterator[bytes]:
        while line := self._read():
            self.number += 1
            self.ended = line.endswith(b"\n")
            self.too_long = not self.ended and len(line) > LONGEST_LINE
            yield line[:1000] if self.too_long else line
            while self.too_long and line and not line.endswith(b"\n"):
                line = self._read()

    def _read(self) -> bytes:
        try:
            return self._handle.readline(LONGEST_LINE + 1)
        except (OSError, EOFError, zlib.error) as error:  # a damaged archive shows in the middle of reading
            raise InputError(
                f"{self._name}: after line {self.number}: can't be read on: {error}. "
                "What was routed so far is kept; repair the file and run the same command again"
            ) from None


def read_requests(
    handle: IO[bytes], source: str, fields: InputFields | None = None
) -> Iterator[Request | Rejected]:
    """Yield what each non-empty line of `handle` is: a request, or why it is none.

    Requests without an id get one derived from their content and from which occurrence of it they are.
    A second line with the same id is rejected. `source` names the input in messages.

    Raises:
        InputError: the handle can't be read on (a damaged archive).
    """
    fields = fields or InputFields()
    name = "standard input" if source == STDIN else source
    lines = _Lines(handle, name)
    reader = jsonlines.Reader(lines, loads=_loads)
    occurrences = Occurrences()
    try:
        while True:
            try:
                value = reader.read(skip_empty=True, allow_none=True)
            except EOFError:
                return
            except jsonlines.InvalidLineError as error:
                raw = error.line if isinstance(error.line, bytes) else error.line.encode("utf-8", "replace")
                what = _why_invalid(error.__cause__, lines)
                yield _reject(occurrences, lines.number, f"{name}:{lines.number}: {what}", content=raw)
                continue
            yield _parse(value, name, lines.number, fields, occurrences)
    finally:
        occurrences.close()


def _why_invalid(cause: BaseException | None, lines: _Lines) -> str:
    if lines.too_long:
        return f"longer than {LONGEST_LINE >> 20} MB. Is the file JSON lines, one object per line?"
    if isinstance(cause, UnicodeDecodeError):
        return f"not valid UTF-8 (byte {cause.start + 1}). Convert it, for example with iconv"
    what = f"{cause.msg} at column {cause.colno}" if isinstance(cause, json.JSONDecodeError) else str(cause)
    growing = "" if lines.ended else ". The line has no end: was the file still being written?"
    return f"not valid JSON: {what}{growing}"


class _Invalid(Exception):  # never leaves this module: it carries the message of a Rejected
    pass


def _parse(
    value: Any, name: str, line: int, fields: InputFields, occurrences: Occurrences
) -> Request | Rejected:
    where = f"{name}:{line}"
    if not isinstance(value, dict):
        kind = _JSON_NAMES.get(type(value), "value")
        message = f'{where}: expected an object such as {{"{fields.prompt}": "..."}}, found a {kind}'
        return _reject(occurrences, line, message, content=_canonical(value))
    known = {fields.id, fields.prompt, fields.reference, "messages"}
    extra = {key: item for key, item in value.items() if key not in known}
    given_id = value.get(fields.id)
    usable_id = given_id if isinstance(given_id, str | int) and not isinstance(given_id, bool) else None
    try:
        if given_id is not None and usable_id is None:
            raise _Invalid(f'field "{fields.id}": expected a string or an integer, found {_named(given_id)}')
        prompt, messages = _prompt_of(value, fields)
        references = _references_of(value, fields)
        plan = value.get("plan")
        if plan is not None and not isinstance(plan, str):
            raise _Invalid(f'field "plan": expected a string, found {_named(plan)}')
    except _Invalid as error:
        return _reject(occurrences, line, f"{where}: {error}", usable_id, extra, _canonical(value))
    digest = _hash(b"[%b, %b]" % (_canonical(prompt), _canonical(messages)))
    if usable_id is None:
        count, _ = occurrences.add(b"content" + digest, line)
        usable_id = f"{digest.hex()[:16]}" + (f"-{count}" if count > 1 else "")
        key = _hash(b"content" + digest + str(count).encode())
    else:
        key = _hash(b"id" + _canonical(usable_id))
        count, first = occurrences.add(key, line)
        if count > 1:
            message = (
                f'{where}: field "{fields.id}": {usable_id!r} stands on line {first} already. Ids must differ'
            )
            return _reject(occurrences, line, message, usable_id, extra, _canonical(value))
    names = (fields.prompt, "messages", fields.reference)
    given = {key: value[key] for key in names if value.get(key) is not None}
    return Request(
        usable_id,
        prompt,
        messages,
        references,
        extra,
        given,
        plan,
        line=line,
        key=key,
        digest=digest,
        source=name,
    )


def _prompt_of(
    value: Mapping[str, Any], fields: InputFields
) -> tuple[str, tuple[Mapping[str, str], ...] | None]:
    prompt, messages = value.get(fields.prompt), value.get("messages")
    if prompt is not None and messages is not None:
        raise _Invalid(f'has both "{fields.prompt}" and "messages". Keep one of them')
    if messages is not None:
        return _chat_of(messages)
    if prompt is None:
        hint = (
            f". It has {', '.join(map(json.dumps, list(value)[:6]))}; name one with --prompt-field"
            if value
            else ""
        )
        raise _Invalid(f'field "{fields.prompt}" is missing{hint}')
    if not isinstance(prompt, str):
        raise _Invalid(f'field "{fields.prompt}": expected a string, found {_named(prompt)}')
    if not prompt.strip():
        raise _Invalid(f'field "{fields.prompt}" is empty')
    return _encodable(prompt, fields.prompt), None


def _chat_of(messages: Any) -> tuple[str, tuple[Mapping[str, str], ...]]:
    if not isinstance(messages, list) or not messages:
        raise _Invalid('field "messages": expected a non-empty list of {"role", "content"} objects')
    for index, message in enumerate(messages):
        if not (
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
        ):
            raise _Invalid(
                f'field "messages"[{index}]: expected {{"role": "...", "content": "..."}} with strings'
            )
    text = "\n".join(message["content"] for message in messages)
    if not text.strip():
        raise _Invalid('field "messages": every content is empty')
    for message in messages:
        _encodable(message["role"], "messages")
    return _encodable(text, "messages"), tuple(messages)


def _references_of(value: Mapping[str, Any], fields: InputFields) -> tuple[str, ...]:
    references = value.get(fields.reference)
    if references is None:
        return ()
    if isinstance(references, str):
        references = [references]
    if not isinstance(references, list) or not all(isinstance(item, str) for item in references):
        found = _named(references)
        raise _Invalid(f'field "{fields.reference}": expected a string or a list of strings, found {found}')
    if not references or not all(item.strip() for item in references):
        raise _Invalid(f'field "{fields.reference}" is empty. Leave it out where there is none')
    return tuple(_encodable(item, fields.reference) for item in references)


def _encodable(text: str, field: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _Invalid(
            f'field "{field}": half a surrogate pair (\\ud800 to \\udfff) is no character'
        ) from None
    return text


def _reject(
    occurrences: Occurrences,
    line: int,
    message: str,
    identity: str | int | None = None,
    extra: Mapping[str, Any] | None = None,
    content: bytes = b"",
) -> Rejected:
    # Known by content, not by id: the line that a user mends under the same id is a new request.
    digest = _hash(content)
    count, _ = occurrences.add(b"rejected" + digest, line)
    key = _hash(b"rejected" + digest + str(count).encode())
    return Rejected(identity, message, extra or {}, line, key, digest)


_JSON_NAMES = {
    dict: "object", list: "list", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null",
}  # fmt: skip


def _named(value: Any) -> str:
    kind = _JSON_NAMES[type(value)]
    return kind if value is None else f"a{'n' if kind == 'object' else ''} {kind}"


_SORTED = json.JSONEncoder(sort_keys=True)


def _canonical(value: Any) -> bytes:
    # An encoder is quick with a string; for anything else it sets itself up anew.
    if value is None:
        return b"null"
    if type(value) is int:
        return b"%d" % value
    return _SORTED.encode(value).encode()


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _loads(text: str | bytes) -> Any:
    """json.loads that takes no NaN and no infinity (no JSON), and reports deep nesting as an error."""
    try:
        value = _DECODER.decode(text if isinstance(text, str) else text.decode())
    except RecursionError:
        raise ValueError("nested too deeply") from None
    brackets = text.count("[") + text.count("{") if isinstance(text, str) else _DEEPEST
    if brackets >= _DEEPEST and _depth(value) > _DEEPEST:
        raise ValueError(f"nested more than {_DEEPEST} levels deep")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON; write null")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:20]} is too large a number")
    return number


# made once: it is called for every line
_DECODER = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        level = inner
    return depth

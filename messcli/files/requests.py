"""Reading requests: JSON lines from a file, a gzip or zstd file, or standard input, one at a time.

Knows the input format and its errors; knows nothing of what becomes of a request. Memory stays flat
however long the input is: which ids were seen is kept in a private temporary database on disk.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import re
import sqlite3
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import jsonlines

from messcli.errors import InputError
from messcli.files.dialects import OWN, Dialect, guess, load_dialect
from messcli.files.parquet import parquet_lines, parquet_rows
from messcli.jsonl import unpacked
from messcli.records import Rejected, Request

STDIN = "-"
LONGEST_LINE = 64 << 20  # bytes; a longer line is no request, and must not fill the memory
_DEEPEST = 100  # levels of nesting; Python's own limit depends on its version and on who calls


@dataclass(frozen=True, slots=True)
class InputFields:
    """What the input calls its fields (`--prompt-field` and so on). A dot leads into an object: data.question."""

    prompt: str = "prompt"
    reference: str = "reference"
    id: str = "id"
    plan_field: str = "plan"


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
        yield _unpacked(handle, path)


def _unpacked(handle: IO[bytes], path: str) -> IO[bytes]:
    """The lines in a file, told by its first bytes rather than by its name."""
    try:
        head = handle.read(4)
        handle.seek(0)
    except OSError:  # a pipe: its name is all there is to go by
        head = b""
    if head == b"PAR1":
        return parquet_lines(handle, path)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{path}: is UTF-16. Make it UTF-8: iconv -f UTF-16 -t UTF-8 {path} > lines.jsonl")
    return unpacked(handle, path)


def count_lines(path: str) -> int | None:
    """How many non-empty lines a file has; None where it can be read only once (a pipe) or is damaged."""
    if path == STDIN or not Path(path).is_file():
        return None
    if (rows := parquet_rows(path)) is not None:
        return rows
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
    handle: IO[bytes],
    source: str,
    fields: InputFields | None = None,
    dialect: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[Request | Rejected]:
    """Yield what each non-empty line of `handle` is: a request, or why it is none.

    Requests without an id get one derived from their content and from which occurrence of it they are.
    A second line with the same id is rejected.

    Args:
        source: names the input in messages.
        dialect: what the lines are written in; None: guessed from the first one, unless `fields` are named.
        tell: takes a line for the user that says what was guessed.

    Raises:
        InputError: the handle can't be read on (a damaged archive), or its content is no lines at all.
    """
    name = "standard input" if source == STDIN else source
    named = fields is not None and replace(fields, plan_field="plan") != InputFields()
    parser = _Parser(name, fields or InputFields(), OWN if named and dialect is None else dialect, tell)
    lines = _Lines(handle, name)
    reader = jsonlines.Reader(lines, loads=_loads)
    try:
        while True:
            try:
                value = reader.read(skip_empty=True, allow_none=True)
            except EOFError:
                return
            except jsonlines.InvalidLineError as error:
                raw = error.line if isinstance(error.line, bytes) else error.line.encode("utf-8", "replace")
                if lines.number == 1:
                    _refuse_other_files(raw if lines.ended else raw + b"...", name)
                yield parser.invalid(raw, _why_invalid(error.__cause__, lines), lines.number)
                continue
            if isinstance(value, list) and lines.number == 1 and isinstance(next(iter(value), None), dict):
                _refuse_other_files(b"[{", name)
            yield parser.parse(value, lines.number)
    finally:
        parser.close()


def _refuse_other_files(first: bytes, name: str) -> None:
    """Raise InputError where the first line shows that the file is no JSON lines at all."""
    first = first.strip()
    if re.match(rb"\[\s*(\{|$)", first):
        raise InputError(f"{name}: is a JSON array, not a line per request. Make lines: jq -c '.[]' {name}")
    if first == b"{":
        raise InputError(f"{name}: its objects take several lines each. Make it a line each: jq -c . {name}")
    if first.startswith(b"\x1f\x8b"):
        raise InputError(f"{name}: is gzip. Unpack it on the way: gunzip -c | messcli ... -")
    if first.startswith(b"PAR1"):
        raise InputError(f"{name}: is Parquet, which can't be read from a pipe. Name the file")
    if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{name}: is UTF-16. Make it UTF-8: iconv -f UTF-16 -t UTF-8")


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


class _Parser:
    """Makes requests of one input's values, one after another."""

    def __init__(
        self, name: str, fields: InputFields, dialect: str | None, tell: Callable[[str], None]
    ) -> None:
        self._name = name
        self._fields = fields
        self._dialect: Dialect | None = None if dialect is None else load_dialect(dialect)
        self._tell = tell
        self._occurrences = Occurrences()

    def invalid(self, raw: bytes, what: str, line: int) -> Rejected:
        """A line that holds no JSON value."""
        return _reject(self._occurrences, line, f"{self._name}:{line}: {what}", content=raw)

    def parse(self, value: Any, line: int) -> Request | Rejected:
        """A line that holds one."""
        where = f"{self._name}:{line}"
        if not isinstance(value, dict):
            kind = _JSON_NAMES.get(type(value), "value")
            example = f'{{"{self._fields.prompt}": "..."}}'
            message = f"{where}: expected an object such as {example}, found a {kind}"
            return _reject(self._occurrences, line, message, content=_canonical(value))
        if self._dialect is None:
            self._dialect = self._guessed(value)
        fields, given = self._fields, value
        if self._dialect is not _OWN_DIALECT:
            fields = InputFields(plan_field=fields.plan_field)
            try:
                given = dict(self._dialect.read(value))
            except ValueError as error:
                return _reject(
                    self._occurrences, line, f"{where}: {error}", _id_of(value), {}, _canonical(value)
                )
        return _parse(given, self._name, line, fields, self._occurrences)

    def _guessed(self, first: Mapping[str, Any]) -> Dialect:
        if _at(first, self._fields.prompt) is not None or "messages" in first:
            return _OWN_DIALECT
        name = guess(first)
        if name != OWN:
            title = load_dialect(name).title
            self._tell(f"input: {self._name} holds {title} (--format {name}, guessed from its first line)")
        return load_dialect(name)

    def close(self) -> None:
        """Let go of the ids that were seen."""
        self._occurrences.close()


_OWN_DIALECT = load_dialect(OWN)


def _id_of(value: Mapping[str, Any]) -> str | int | None:
    found = value.get("id", value.get("custom_id"))
    return found if isinstance(found, str | int) and not isinstance(found, bool) else None


def _at(value: Any, name: str) -> Any:
    """The field called `name`, or where its dots lead: into objects, and by number into lists. None: not there."""
    if isinstance(value, dict) and name in value:
        return value[name]
    head, dot, rest = name.partition(".")
    inner = value.get(head) if isinstance(value, dict) and dot else None
    if (
        isinstance(value, list)
        and head.isascii()
        and head.isdecimal()
        and len(head) < 10
        and int(head) < len(value)
    ):
        inner = value[int(head)]
    return _at(inner, rest) if dot else inner


def _parse(
    value: dict[str, Any], name: str, line: int, fields: InputFields, occurrences: Occurrences
) -> Request | Rejected:
    where = f"{name}:{line}"
    known = {fields.id, fields.prompt, fields.reference, "messages"}
    extra = {key: item for key, item in value.items() if key not in known}
    given_id = _at(value, fields.id)
    usable_id = given_id if isinstance(given_id, str | int) and not isinstance(given_id, bool) else None
    try:
        if given_id is not None and usable_id is None:
            raise _Invalid(
                f'field "{fields.id}": expected a string or a whole number, found {_named(given_id)}. '
                f"Write it as a string{_quoted(given_id)}"
            )
        if isinstance(usable_id, str):
            _encodable(usable_id, fields.id)
        prompt, messages = _prompt_of(value, fields)
        references = _references_of(value, fields)
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
    given = {key: item for key in names if (item := _at(value, key)) is not None}
    plan = _at(value, fields.plan_field)
    return Request(
        usable_id,
        prompt,
        messages,
        references,
        extra,
        given,
        plan if plan is None or isinstance(plan, str) else json.dumps(plan),  # no plan of a zoo is called so
        line=line,
        key=key,
        digest=digest,
        source=name,
    )


def _prompt_of(
    value: Mapping[str, Any], fields: InputFields
) -> tuple[str, tuple[Mapping[str, str], ...] | None]:
    prompt = _at(value, fields.prompt)
    messages = None if fields.prompt == "messages" else value.get("messages")
    if prompt is not None and messages is not None:
        raise _Invalid(
            f'has both "{fields.prompt}" and "messages". Keep one of them, or take the chat with '
            "--prompt-field messages"
        )
    if messages is not None:
        return _chat_of(messages, "messages")
    if isinstance(prompt, list):
        return _chat_of(prompt, fields.prompt)
    if prompt is None:
        raise _Invalid(f'field "{fields.prompt}" is missing{_hint(value)}')
    if not isinstance(prompt, str):
        raise _Invalid(f'field "{fields.prompt}": expected a string, found {_named(prompt)}')
    if not prompt.strip():
        raise _Invalid(f'field "{fields.prompt}" is empty')
    return _encodable(prompt, fields.prompt), None


def _hint(value: Mapping[str, Any]) -> str:
    """What could be meant by the prompt, for an object that has none: its texts, also those inside objects."""
    texts = [name for name, item in value.items() if isinstance(item, str | list)]
    texts += [
        f"{name}.{inner}"
        for name, item in value.items()
        if isinstance(item, dict)
        for inner, one in item.items()
        if isinstance(one, str | list)
    ]
    if not texts:
        return ". Requests of another program? --help lists what --format knows"
    return f". It has {', '.join(map(json.dumps, texts[:6]))}; name one with --prompt-field"


def _chat_of(messages: Any, name: str) -> tuple[str, tuple[Mapping[str, str], ...]]:
    if not isinstance(messages, list) or not messages:
        raise _Invalid(f'field "{name}": expected a non-empty list of {{"role", "content"}} objects')
    chat = tuple(_message_of(message, f'field "{name}"[{index}]') for index, message in enumerate(messages))
    text = "\n".join(message["content"] for message in chat)
    if not text.strip():
        raise _Invalid(f'field "{name}": every content is empty')
    for message in chat:
        _encodable(message["role"], name)
    return _encodable(text, name), chat


def _message_of(message: Any, where: str) -> Mapping[str, str]:
    """A message whose content is one text: parts of type text are joined, as servers join them."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise _Invalid(f'{where}: expected {{"role": "...", "content": "..."}} with strings')
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if (
                not isinstance(part, dict)
                or part.get("type") != "text"
                or not isinstance(part.get("text"), str)
            ):
                kind = part.get("type") if isinstance(part, dict) else None
                found = f'of type "{kind}"' if isinstance(kind, str) else "without a type"
                raise _Invalid(
                    f"{where}: a part of the content is {found}. The zoo's models read parts of type text"
                )
        return {**message, "content": "\n".join(part["text"] for part in content)}
    if not isinstance(content, str):
        raise _Invalid(f'{where}: expected {{"role": "...", "content": "..."}} with strings')
    return message


def _references_of(value: Mapping[str, Any], fields: InputFields) -> tuple[str, ...]:
    """Texts; a number counts as its text, and what is empty or null as not there."""
    found = _at(value, fields.reference)
    references = found if isinstance(found, list) else [found]
    texts = []
    for item in references:
        if isinstance(item, bool) or not (item is None or isinstance(item, str | int | float)):
            inside = f"{fields.reference}.{next(iter(item))}" if isinstance(item, dict) and item else None
            raise _Invalid(
                f'field "{fields.reference}": expected a string, a number or a list of them, found {_named(item)}. '
                + (
                    "Write it as a string"
                    if inside is None
                    else f"Name what is in it: --reference-field {inside}"
                )
            )
        text = "" if item is None else item if isinstance(item, str) else json.dumps(item)
        if text.strip():
            texts.append(_encodable(text, fields.reference))
    return tuple(texts)


def _quoted(value: Any) -> str:
    return f': "{json.dumps(value)}"' if isinstance(value, int | float) else ""


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

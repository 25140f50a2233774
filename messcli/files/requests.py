"""Reading requests: JSON lines from a file, a gzip or zstd file, or standard input, one at a time.

Knows the input format and its errors; knows nothing of what becomes of a request. Memory stays flat
however long the input is: which ids were seen is kept in a private temporary database on disk.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
import sqlite3
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from messcli.errors import InputError
from messcli.files.dialects import OWN, Dialect, guess, load_dialect
from messcli.files.parquet import parquet_lines, parquet_rows
from messcli.jsonl import BadLine, Lines, TornFile, unpacked, values
from messcli.records import Rejected, Request

STDIN = "-"


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
            return sum(1 for line in Lines(handle) if line.rstrip())
    except (InputError, TornFile):  # is told when reading gets there: the lines before it are good
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
    try:
        for number, value in values(handle):
            if isinstance(value, BadLine):
                if number == 1:
                    _refuse_other_files(value.raw if value.ended else value.raw + b"...", name)
                growing = "" if value.ended else ". The line has no end: was the file still being written?"
                yield parser.invalid(value.raw, f"{value}{growing * (not value.too_long)}", number)
                continue
            if number == 1 and isinstance(value, list) and isinstance(next(iter(value), None), dict):
                _refuse_other_files(b"[{", name)
            yield parser.parse(value, number)
    except TornFile as error:
        raise InputError(
            f"{name}: after line {error.number}: can't be read on: {error}. "
            "What was routed so far is kept; repair the file and run the same command again"
        ) from None
    finally:
        parser.close()


_PACKED = (  # how a file begins that is unpacked by other programs
    (b"BZh", "bzip2", "bzip2 -dc"),
    (b"\xfd7zXZ", "xz", "xz -dc"),
    (b"PK\x03\x04", "a zip archive", "unzip -p"),
    (b"(\xb5/\xfd", "zstd", "zstd -dc"),
)
# Two names or more, as the head of a table has them
_TABLE = re.compile(rb"(\xef\xbb\xbf)?(\w[\w .-]*|\"\w[\w .-]*\")([,;\t](\w[\w .-]*|\"\w[\w .-]*\"))+")


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
    if first.startswith(b"<"):
        raise InputError(f"{name}: is HTML or XML, not JSON lines. Name a file with a request per line")
    for start, kind, cure in _PACKED:
        if first.startswith(start):
            raise InputError(f"{name}: is {kind}. Unpack it on the way: {cure} | messcli ... -")
    if _TABLE.fullmatch(first):
        columns = "import csv, json, sys; [print(json.dumps(row)) for row in csv.DictReader(sys.stdin)]"
        raise InputError(
            f"{name}: is a table of columns (CSV), not JSON lines. Make lines, and name their column of prompts with "
            f"--prompt-field: python3 -c '{columns}' < {name}"
        )


_TEXT_PARTS = ("text", "input_text", "output_text")  # of OpenAI's chats, and of its responses


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
        has_own_id=given_id is not None,
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
    if content is None and (message.get("tool_calls") or message.get("function_call")):
        raise _Invalid(f"{where}: a tool call without text. The zoo's models are given texts only")
    if isinstance(content, list):
        for part in content:
            if (
                not isinstance(part, dict)
                or part.get("type") not in _TEXT_PARTS
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
    for place, item in enumerate(references):
        if isinstance(item, bool) or not (item is None or isinstance(item, str | int | float)):
            at = f"{fields.reference}.{place}" if isinstance(found, list) else fields.reference
            inside = f"{at}.{next(iter(item))}" if isinstance(item, dict) and item else None
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
    return Rejected(identity, message, extra or {}, line, key, digest, has_own_id=identity is not None)


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

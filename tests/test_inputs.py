"""Any bytes are an input: each line becomes a request or a rejection that says where and why, and none is lost."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from messcli import jsonl
from messcli.errors import InputError
from messcli.files.requests import InputFields, Occurrences, count_lines, open_input, read_requests
from messcli.records import Rejected, Request


def read(data: bytes | str, **fields: str) -> list[Request | Rejected]:
    raw = data.encode() if isinstance(data, str) else data
    return list(read_requests(io.BytesIO(raw), "in.jsonl", InputFields(**fields)))


def one(data: bytes | str, **fields: str) -> Request:
    (line,) = read(data, **fields)
    assert isinstance(line, Request), line
    return line


def rejection(data: bytes | str) -> str:
    (line,) = read(data)
    assert isinstance(line, Rejected), line
    return line.error


def test_a_request_with_everything() -> None:
    line = (
        '{"id": 7, "prompt": "Hello", "reference": ["Hallo", "Servus"], "level": [1, null], "plan": "gold"}'
    )
    request = one(line)
    assert (request.id, request.prompt, request.references) == (7, "Hello", ("Hallo", "Servus"))
    assert request.extra == {"level": [1, None], "plan": "gold"}
    assert request.plan == "gold"
    assert request.line == 1


def test_fields_can_have_other_names() -> None:
    request = one(
        '{"key": "a", "input_text": "Hello", "label": "x", "prompt": 3, "id": 9}',
        prompt="input_text",
        reference="label",
        id="key",
    )
    assert (request.id, request.prompt, request.references) == ("a", "Hello", ("x",))
    assert request.extra == {"prompt": 3, "id": 9}


def test_messages() -> None:
    request = one(
        '{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]}'
    )
    assert request.prompt == "Be brief.\nHi"
    assert request.messages is not None
    assert len(request.messages) == 2


GOOD = b'{"prompt": "a"}'


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbf" + GOOD + b"\n",  # byte order mark
        GOOD + b"\r\n",
        GOOD,  # no line end
        b"\n\n  \n" + GOOD + b"\n \t \n",  # empty lines
        b"\x1e" + GOOD + b"\n",  # RFC 7464
    ],
)
def test_variants_of_good_lines(data: bytes) -> None:
    assert one(data).prompt == "a"


def test_an_empty_input() -> None:
    assert read(b"") == []
    assert read(b"\n\n") == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"prompt": "\xff"}', "not valid UTF-8 (byte 13). Convert it, for example with iconv"),
        ("{", "not valid JSON: Expecting property name enclosed in double quotes at column 2"),
        ('{"prompt": "cut he', "The line has no end: was the file still being written?"),
        ('{"prompt": "a", "x": NaN}\n', "NaN is no JSON; write null"),
        ('{"prompt": "a", "x": -Infinity}\n', "-Infinity is no JSON"),
        ('{"prompt": "a", "x": 1e999}\n', "1e999 is too large a number"),
        (f'{{"prompt": "a", "x": {"9" * 5000}}}\n', "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"prompt": "a", "x": ' + "[" * 150 + "]" * 150 + "}\n", "nested more than 100 levels deep"),
        ("[1]", 'expected an object such as {"prompt": "..."}, found a list'),
        ("null", "found a null"),
        ('"text"', "found a string"),
        ("{}", 'field "prompt" is missing'),
        ('{"text": "a"}', 'field "prompt" is missing. It has "text"; name one with --prompt-field'),
        ('{"prompt": null}', 'field "prompt" is missing'),
        ('{"prompt": 3}', 'field "prompt": expected a string, found a number'),
        ('{"prompt": " \\n"}', 'field "prompt" is empty'),
        ('{"prompt": "\\ud800"}', 'field "prompt": half a surrogate pair'),
        ('{"prompt": "a", "messages": []}', 'has both "prompt" and "messages". Keep one of them'),
        ('{"messages": []}', 'field "messages": expected a non-empty list'),
        ('{"messages": [{"role": "user"}]}', 'field "messages"[0]: expected'),
        ('{"messages": [{"role": "user", "content": ""}]}', 'field "messages": every content is empty'),
        ('{"messages": [{"role": "\\udfff", "content": "a"}]}', "half a surrogate pair"),
        (
            '{"prompt": "a", "reference": true}',
            'field "reference": expected a string, a number or a list of them, found a boolean. Write it as a string',
        ),
        (
            '{"prompt": "a", "reference": {"text": ["b"]}}',
            "Name what is in it: --reference-field reference.text",
        ),
        (
            '{"prompt": "a", "reference": ["b", {"text": "c"}]}',
            "Name what is in it: --reference-field reference.1.text",
        ),
        ('{"prompt": "a", "reference": ["b", []]}', "found a list. Write it as a string"),
        (
            '{"prompt": "a", "id": 5.0}',
            'field "id": expected a string or a whole number, found a number. Write it as a string: "5.0"',
        ),
        ('{"prompt": "a", "id": true}', 'field "id": expected a string or a whole number, found a boolean'),
        ('{"prompt": "a", "id": {}}', 'field "id": expected a string or a whole number, found an object'),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "--prompt-field messages"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}',
            'field "messages"[0]: a part of the content is of type "image_url"',
        ),
        ('{"data": {"question": "a"}}', 'It has "data.question"; name one with --prompt-field'),
        ('{"n": 1}', "--help lists what --format knows"),
    ],
)
def test_a_bad_line_is_told_with_file_line_and_field(line: bytes | str, expected: str) -> None:
    error = rejection(line)
    assert error.startswith("in.jsonl:1: ")
    assert expected in error


@pytest.mark.parametrize(
    ("written", "references"),
    [
        ('""', ()),
        ("null", ()),
        ("[]", ()),
        ("4", ("4",)),
        ("4.50", ("4.5",)),
        ('[4, "four", " ", null]', ("4", "four")),
        ('["a", "b"]', ("a", "b")),
    ],
)
def test_a_reference_is_taken_for_what_it_plainly_means(written: str, references: tuple[str, ...]) -> None:
    assert one(f'{{"prompt": "a", "reference": {written}}}').references == references


def test_a_tool_call_is_told_as_one() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [{}]}]
    (rejected,) = read(json.dumps({"messages": turns}))
    assert isinstance(rejected, Rejected)
    assert 'field "messages"[1]: a tool call without text' in rejected.error


def test_parts_of_other_apis_are_texts_too() -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b"}]
    assert one(json.dumps({"messages": [{"role": "user", "content": parts}]})).prompt == "a\nb"


def test_parts_of_type_text_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = one(json.dumps({"messages": [{"role": "user", "content": parts}]}))
    assert request.prompt == "a\nb"
    assert request.messages == ({"role": "user", "content": "a\nb"},)


def test_names_may_lead_into_objects() -> None:
    line = {"data": {"question": "a", "answers": {"text": ["b", "c"]}}, "meta": [{"key": 7}]}
    request = one(json.dumps(line), prompt="data.question", reference="data.answers.text", id="meta.0.key")
    assert (request.id, request.prompt, request.references) == (7, "a", ("b", "c"))
    assert request.extra == line  # what a name leads into passes through whole
    assert one('{"data.question": "a", "data": {"question": "b"}}', prompt="data.question").prompt == "a"


def test_a_chat_can_be_the_prompt() -> None:
    line = {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}
    assert one(json.dumps(line), prompt="messages").prompt == "b"
    assert one(json.dumps({"chat": line["messages"]}), prompt="chat").messages is not None


def test_files_that_are_no_lines_are_told_as_what_they_are(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    for data, expected in (
        (json.dumps(rows).encode(), r"is a JSON array.*jq -c '\.\[\]'"),
        (json.dumps(rows, indent=2).encode(), r"is a JSON array.*jq -c '\.\[\]'"),
        (json.dumps(rows[0], indent=2).encode(), r"take several lines each.*jq -c \."),
        (json.dumps(rows[0]).encode("utf-16"), r"is UTF-16\. .*iconv -f UTF-16"),
        (b"id,prompt\n1,hello\n", r"is a table of columns \(CSV\).*csv\.DictReader"),
        (b'\xef\xbb\xbf"the id"\t"prompt"\n1\thello\n', r"is a table of columns \(CSV\)"),
        (b"<!doctype html>\n", "is HTML or XML"),
        (bz2.compress(b"{}"), r"is bzip2\. .*bzip2 -dc"),
        (lzma.compress(b"{}"), r"is xz\. .*xz -dc"),
        (b"PK\x03\x04\x14\x00\n", r"is a zip archive\. .*unzip -p"),
    ):
        (tmp_path / "in.jsonl").write_bytes(data)
        with (
            pytest.raises(InputError, match=expected),
            open_input(str(tmp_path / "in.jsonl")) as handle,
        ):
            list(read_requests(handle, "in.jsonl"))


@pytest.mark.parametrize("first", [b"hello", b"hello, world", b'{"prompt": "a",', b"1,2,\xff", b'"a"', b","])
def test_a_first_line_that_is_damaged_is_that_lines_trouble(first: bytes) -> None:
    broken, good = read(first + b"\n" + GOOD + b"\n")
    assert isinstance(broken, Rejected)
    assert isinstance(good, Request)


def test_what_is_packed_is_read_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(gzip.compress(GOOD + b"\n"))
    with open_input(str(tmp_path / "in.jsonl")) as handle:
        assert [line.prompt for line in read_requests(handle, "in.jsonl") if isinstance(line, Request)] == [
            "a"
        ]
    assert count_lines(str(tmp_path / "in.jsonl")) == 1
    with pytest.raises(InputError, match=r"is gzip.*gunzip -c"):  # a pipe can't be looked into first
        read(gzip.compress(GOOD + b"\n"))


def test_a_repeated_id_is_rejected_and_says_where_it_was() -> None:
    first, second, third = read(
        '{"id": "a", "prompt": "x"}\n\n{"id": "a", "prompt": "y"}\n{"id": "b", "prompt": "x"}\n'
    )
    assert isinstance(first, Request)
    assert isinstance(second, Rejected)
    assert second.id == "a"
    assert second.error == "in.jsonl:3: field \"id\": 'a' stands on line 1 already. Ids must differ"
    assert isinstance(third, Request)


@given(st.lists(st.integers(0, 30), max_size=200), st.integers(1, 8))
def test_keys_are_counted_alike_in_memory_and_on_disk(numbers: list[int], in_memory: int) -> None:
    seen = Occurrences()
    seen.IN_MEMORY = in_memory
    first: dict[int, int] = {}
    counts: Counter[int] = Counter()
    for line, number in enumerate(numbers, start=1):
        counts[number] += 1
        assert seen.add(b"%d" % number, line) == (counts[number], first.setdefault(number, line))
    seen.close()


def test_ids_of_different_types_differ() -> None:
    assert len({line.key for line in read('{"id": 1, "prompt": "x"}\n{"id": "1", "prompt": "x"}\n')}) == 2


def test_without_an_id_it_comes_from_content_and_occurrence() -> None:
    text = '{"prompt": "x"}\n{"prompt": "y"}\n{"prompt": "x", "reference": "z"}\n'
    lines = read(text)
    assert len({line.key for line in lines}) == 3
    assert lines[2].id == f"{lines[0].id}-2"
    assert [line.key for line in read(text)] == [line.key for line in lines]
    moved = read('{"prompt": "y"}\n{"prompt": "x"}\n')
    assert [line.key for line in moved] == [lines[1].key, lines[0].key]


def test_a_known_id_with_another_prompt_has_the_same_key_and_another_digest() -> None:
    before, after = one('{"id": "a", "prompt": "x"}'), one('{"id": "a", "prompt": "y"}')
    assert before.key == after.key
    assert before.digest != after.digest


def test_bad_lines_are_known_by_content() -> None:
    lines = read("{bad\n{bad\n{worse\n")
    assert len({line.key for line in lines}) == 3
    assert [line.key for line in read("\n{bad\n{worse\n")] == [lines[0].key, lines[2].key]


def test_a_line_without_end_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "LONGEST_LINE", 1 << 20)
    data = GOOD + b"\n" + b'{"prompt": "' + b"a" * (3 << 20) + b'"}\n' + GOOD + b"\n"
    good, long, last = read(data)
    assert isinstance(good, Request)
    assert isinstance(long, Rejected)
    assert long.error == "in.jsonl:2: longer than 1 MB. Is the file JSON lines, one object per line?"
    assert isinstance(last, Request)
    assert last.line == 3


@given(st.binary(max_size=400))
def test_any_bytes(data: bytes) -> None:
    try:
        lines = read(data)
    except InputError:  # another kind of file, by its first line
        packed = rb"\x1f\x8b|BZh|\xfd7zXZ|PK\x03\x04|\x28\xb5\x2f\xfd"
        table = rb"(\xef\xbb\xbf)?[\w\"][\w .\"-]*[,;\t]"
        known = rb"\[|<|\{\s*\n|PAR1|\xff\xfe|\xfe\xff|" + packed + b"|" + table
        assert re.match(rb"\s*(" + known + rb")", data)
        return
    assert len(lines) == sum(1 for line in data.split(b"\n") if line.rstrip())
    assert len({line.key for line in lines}) == len(lines)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELD = st.sampled_from(["id", "prompt", "reference", "messages", "plan", "x"])


@given(st.lists(st.dictionaries(FIELD, JSON, max_size=5) | JSON, max_size=8), st.sampled_from(["\n", "\r\n"]))
def test_any_json(values: list[object], end: str) -> None:
    data = "".join(json.dumps(value) + end for value in values)
    if values and isinstance(values[0], list) and values[0] and isinstance(values[0][0], dict):
        with pytest.raises(InputError, match="is a JSON array"):
            read(data)
        return
    lines = read(data)
    assert [line.line for line in lines] == list(range(1, len(values) + 1))
    assert len({line.key for line in lines}) == len(lines)
    assert [line.key for line in read(data)] == [line.key for line in lines]
    for line in lines:
        assert isinstance(line, Request) or re.match(r"in\.jsonl:\d+: .", line.error)


@given(st.binary(min_size=20, max_size=60), st.integers(0, 200))
def test_any_gzip(noise: bytes, cut: int) -> None:
    whole = gzip.compress(GOOD + b"\n" + noise.replace(b"\n", b"") + b"\n")
    with (
        gzip.GzipFile(fileobj=io.BytesIO(whole[:cut])) as handle,
        suppress(InputError),
    ):  # anything else is a bug
        list(read_requests(handle, "in.jsonl.gz"))


def test_a_damaged_archive_gives_the_lines_before_the_damage(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl.gz"
    lines = b"".join(b'{"prompt": "%d"}\n' % number for number in range(50_000))
    path.write_bytes(gzip.compress(lines)[:-1000])
    found = []
    with (
        open_input(str(path)) as handle,
        pytest.raises(InputError, match=r"after line \d+: can't be read on"),
    ):
        found.extend(read_requests(handle, str(path)))  # keeps what came before the error
    assert len(found) > 1000
    assert count_lines(str(path)) is None


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    for path, expected in ((tmp_path / "none", "no such file"), (tmp_path, "is a folder")):
        with pytest.raises(InputError, match=expected), open_input(str(path)):
            pass
    (tmp_path / "no.gz").write_bytes(GOOD)
    with (
        open_input(str(tmp_path / "no.gz")) as handle,
        pytest.raises(InputError, match="after line 0: can't be read on: Not a gzipped file"),
    ):
        list(read_requests(handle, "no.gz"))


def test_count_lines(tmp_path: Path) -> None:
    for name, data in (("a", GOOD + b"\n\n" + GOOD), ("a.gz", gzip.compress(GOOD + b"\n"))):
        (tmp_path / name).write_bytes(data)
    assert count_lines(str(tmp_path / "a")) == 2
    assert count_lines(str(tmp_path / "a.gz")) == 1
    assert count_lines("-") is None


def test_a_control_character_is_told_with_its_column() -> None:
    (broken,) = read(b'{"prompt": "a\tb"}\n')
    assert isinstance(broken, Rejected)
    assert broken.error.endswith("not valid JSON: Invalid control character at column 14")

"""Sinks: what is written, what is safe, and what is never cut off."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from messcli.errors import MessError, UsageError
from messcli.files.sinks import GzipSink, open_sink
from messcli.records import ROW_FIELDS, STAGE_FIELDS, Rejected, Request, rejected_row, row_of


def test_rows_are_in_the_file_when_write_returns(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    sink = open_sink(str(path), 0, torn=False)
    sink.write(["a", "ü"])
    assert path.read_text(encoding="utf-8") == "a\nü\n"
    assert sink.sync()[:2] == (5, 2)
    sink.close()


def test_a_torn_tail_is_cut_and_the_file_continued(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("a\nb\nto")
    sink = open_sink(str(path), 4, torn=True)
    sink.write(["c"])
    assert sink.sync()[:2] == (6, 1)
    sink.close()
    assert path.read_text() == "a\nb\nc\n"


@pytest.mark.parametrize(
    ("content", "keep", "expected"),
    [
        ("a\nb\nmine\n", 4, "was changed since messcli closed it: 9 bytes instead of 4"),
        ("a\n", 4, "has 2 bytes, and 4 bytes of finished rows should be here"),
        ("axxb", 3, "was changed"),
        (None, 4, "the file is gone"),
    ],
)
def test_a_file_that_somebody_changed_is_left_alone(
    tmp_path: Path, content: str | None, keep: int, expected: str
) -> None:
    path = tmp_path / "out.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(MessError, match=expected):
        open_sink(str(path), keep, torn=False)
    assert (path.read_text() if path.exists() else None) == content


def test_a_file_that_was_edited_in_the_middle_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("abc\ndef\n")
    with pytest.raises(MessError, match="no row ends at byte 6, where one did"):
        open_sink(str(path), 6, torn=True)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name, expected in (("folder", "no regular file"), ("a.zst", "zst isn't written")):
        with pytest.raises(UsageError, match=expected):
            open_sink(str(tmp_path / name), 0, torn=False)
    with pytest.raises(UsageError, match="-o - > /dev/null"):
        open_sink("/dev/null", 0, torn=False)
    with pytest.raises(MessError, match="can't be written"):
        open_sink(str(tmp_path / "none" / "a"), 0, torn=False)


@given(st.lists(st.integers(0, 700), max_size=6))
def test_gzip_members_do_not_depend_on_how_rows_arrive(
    tmp_path_factory: pytest.TempPathFactory, batches: list[int]
) -> None:
    rows = [f"row {n}" for n in range(sum(batches))]
    path = tmp_path_factory.mktemp("gz") / "out.gz"
    sink = open_sink(str(path), 0, torn=False)
    start = 0
    for size in batches:
        sink.write(rows[start : start + size])
        start += size
        size_now, safe, _ = sink.sync()
        assert safe == start // GzipSink.MEMBER * GzipSink.MEMBER
        assert path.stat().st_size == size_now
        assert gzip.decompress(path.read_bytes()).decode().splitlines() == rows[:safe]
    sink.finish()
    assert sink.sync()[1] == len(rows)
    sink.close()
    whole = path.with_name("whole.gz")
    sink = open_sink(str(whole), 0, torn=False)
    sink.write(rows)
    sink.finish()
    sink.close()
    assert whole.read_bytes() == path.read_bytes()


# ---- an input's own fields ------------------------------------------------------------------------

FIELD = st.sampled_from(
    ["output", "input_output", "input_input_output", "error", "plan", "model", "mine", "answer"]
)


@given(
    st.dictionaries(FIELD, st.integers()),
    st.dictionaries(st.sampled_from(["output", "model"]), st.sampled_from(["answer", "served"]), max_size=1),
    st.booleans(),
)
def test_every_value_of_the_input_survives(own: dict[str, int], names: dict[str, str], failed: bool) -> None:
    row = row_of(
        Request("a", "p", extra=own), "m", {"output": "text"}, error="why" if failed else None, names=names
    )
    columns = [names.get(name, name) for name in ROW_FIELDS]
    assert [name for name in row if name in columns] == columns
    assert (row[names.get("output", "output")], row[names.get("model", "model")]) == ("text", "m")
    kept = {name: value for name, value in row.items() if name not in {*columns, "id"}}
    if failed:
        assert kept.pop("error") == "why"
    assert sorted(kept.values()) == sorted(own.values())
    for name, value in own.items():
        assert value in [kept.get("input_" * times + name) for times in range(5)]
    rejected = rejected_row(Rejected("a", "why", own), names)
    assert sorted(value for name, value in rejected.items() if isinstance(value, int)) == sorted(own.values())


def test_a_field_of_the_input_has_one_name_in_all_rows() -> None:
    own: dict[str, object] = dict.fromkeys(STAGE_FIELDS, "mine")
    for values in ({}, dict.fromkeys(STAGE_FIELDS, "ours")):
        row = row_of(Request("a", "p", extra=own), "m", values)
        assert all(row[f"input_{name}"] == "mine" and row.get(name) != "mine" for name in STAGE_FIELDS)


def test_a_field_that_is_not_taken_keeps_its_name() -> None:
    own = {"output": "gold", "input_output": "second"}
    row = row_of(Request("a", "p", extra=own), "m", {"output": "text"})
    assert (row["output"], row["input_output"], row["input_input_output"]) == ("text", "second", "gold")
    renamed = row_of(Request("a", "p", extra=own), "m", {"output": "text"}, names={"output": "answer"})
    assert (renamed["answer"], renamed["output"], renamed["input_output"]) == ("text", "gold", "second")

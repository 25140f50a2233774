"""Outcome tables: both formats, what is missing is named, and nothing is guessed."""

from __future__ import annotations

import gzip
import json

import pytest

from messcli.errors import InputError, MessError, OutcomesError
from messcli.metrics import load_metric
from messcli.simulation.table import read_table


def row(identity="a", **models):
    models = models or {"small": {"accuracy": 0.5, "joules": 1.0}, "large": {"accuracy": 1.0, "joules": 9.0}}
    return {"id": identity, "prompt": f"prompt of {identity}", "models": models}


def write(path, rows):
    text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_reads_json_lines(tmp_path, name):
    table = read_table(write(tmp_path / name, [row("a"), "", row(7)]))
    assert table.names == ("small", "large")
    assert [request.id for request in table.requests] == ["a", 7]
    assert all(request.references for request in table.requests)  # the loop may learn from them
    assert table.accuracies.tolist() == [[0.5, 1.0], [0.5, 1.0]]
    assert table.joules.tolist() == [[1.0, 9.0], [1.0, 9.0]]
    assert table.seconds is None
    ((answer,),) = table.source.answers([(table.requests[0], (1,))])
    assert answer[:2] == (0, 1)
    assert answer[2].joules == 9.0


def test_a_table_in_which_nothing_costs_anything_compares_nothing(tmp_path):
    free = {"accuracy": 1.0, "joules": 0}
    with pytest.raises(OutcomesError, match=r"t\.jsonl: every outcome took 0 J: .* Record it with a meter"):
        read_table(write(tmp_path / "t.jsonl", [row(small=free, large=free)]))


def test_the_zoo_can_be_put_in_another_order_or_cut(tmp_path):
    path = write(tmp_path / "t.jsonl", [row()])
    assert read_table(path, models=("large", "small")).names == ("large", "small")
    assert read_table(path, models=("large",)).accuracies.tolist() == [[1.0]]
    with pytest.raises(OutcomesError, match=r't\.jsonl:1: no outcome of model "huge" for request \'a\''):
        read_table(path, models=("small", "huge"))


def test_outputs_are_scored_by_the_metric(tmp_path):
    models = {"small": {"output": "a dog", "joules": 1}, "large": {"output": "a cat", "joules": 2}}
    path = write(tmp_path / "t.jsonl", [{**row(**models), "reference": ["the cat", "a cat"]}])
    assert read_table(path, scorer=lambda: load_metric("exact")).accuracies.tolist() == [[0.0, 1.0]]
    with pytest.raises(OutcomesError, match=r"Score the outputs with --metric"):
        read_table(path)


GAPS = {
    "a missing model": ({"small": {"accuracy": 1, "joules": 1}}, 'no outcome of model "large"'),
    "a failed model": (
        {"small": {"accuracy": 1, "joules": 1}, "large": {"joules": None, "error": "out of memory"}},
        r'model "large" failed on request \'b\': out of memory',
    ),
    "unknown joules": (
        {"small": {"accuracy": 1, "joules": None}, "large": {"accuracy": 1, "joules": 1}},
        r'joules of model "small" for request \'b\' aren\'t known',
    ),
    "no score": (
        {"small": {"joules": 1}, "large": {"accuracy": 1, "joules": 1}},
        "has neither accuracy nor output",
    ),
}


@pytest.mark.parametrize(("models", "message"), GAPS.values(), ids=GAPS)
def test_a_missing_outcome_is_named_or_left_out_when_asked(tmp_path, models, message):
    path = write(tmp_path / "t.jsonl", [row("a"), row("b", **models), row("c")])
    with pytest.raises(OutcomesError, match=r"t\.jsonl:2: .*" + message):
        read_table(path)
    table = read_table(path, complete_only=True)
    assert [request.id for request in table.requests] == ["a", "c"]
    assert table.left_out == 1


def test_a_line_that_record_could_not_take_is_incomplete(tmp_path):
    path = write(tmp_path / "t.jsonl", [row("a"), {"id": None, "error": "in.jsonl:2: not valid JSON"}])
    with pytest.raises(OutcomesError, match="not valid JSON"):
        read_table(path)
    assert read_table(path, complete_only=True).left_out == 1


BAD = {
    "no JSON": ("{", "not valid JSON"),
    "no object": ("[]", "expected an object"),
    "a route output": ('{"id": "a", "model": "small", "output": "x"}', "`record` asks them all"),
    "no id": ('{"prompt": "p", "models": {"m": {}}}', 'field "id"'),
    "no prompt": ('{"id": 1, "models": {"m": {}}}', 'field "prompt"'),
    "no outcome object": ('{"id": 1, "prompt": "p", "models": {"m": 3}}', 'model "m": expected an object'),
    "accuracy beyond 1": (
        '{"id": 1, "prompt": "p", "models": {"m": {"accuracy": 1.5, "joules": 1}}}',
        '"accuracy" is 1.5',
    ),
    "negative joules": (
        '{"id": 1, "prompt": "p", "models": {"m": {"accuracy": 1, "joules": -1}}}',
        '"joules" is -1',
    ),
    "empty": ("", "is empty"),
}


@pytest.mark.parametrize(("line", "message"), BAD.values(), ids=BAD)
def test_malformed_tables_are_told_in_one_line(tmp_path, line, message):
    with pytest.raises(MessError, match=message) as caught:
        read_table(write(tmp_path / "t.jsonl", [line]))
    assert "\n" not in str(caught.value)


def test_ids_must_differ(tmp_path):
    with pytest.raises(OutcomesError, match=r":2: id 'a' stands in the table twice"):
        read_table(write(tmp_path / "t.jsonl", [row("a"), row("a")]))


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_table(str(tmp_path / "none.jsonl"))
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(row()).encode())[:-12])
    with pytest.raises(InputError, match="can't be read"):
        read_table(str(path))


HEADER = (
    "doc_id,input_text,benchmark_name,label_s,acc_norm_s,energy_consumption_s,inference_time_s,"
    "label_l,acc_norm_l,energy_consumption_l,inference_time_l"
)


def test_reads_the_csv_of_the_authors(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(
        f'{HEADER}\n0,"first, of\ntwo lines",arc,1,0.25,10.5,0.1,1,1.0,90.25,0.7\n'
        "0,second,boolq,0,,11,0.2,1,0.5,91,0.8\n0,third,boolq,1,1,12,0.3,1,1,92,0.9\n"
    )
    table = read_table(str(path))
    assert table.names == ("s", "l")
    assert [request.id for request in table.requests] == ["arc/0", "boolq/0", "boolq/0-2"]
    assert table.requests[0].prompt == "first, of\ntwo lines"
    assert table.accuracies.tolist() == [[0.25, 1.0], [0.0, 0.5], [1.0, 1.0]]  # label where acc_norm is empty
    assert table.joules.tolist() == [[10.5, 90.25], [11.0, 91.0], [12.0, 92.0]]
    assert table.seconds.tolist() == [[0.1, 0.7], [0.2, 0.8], [0.3, 0.9]]


def test_csv_gaps_and_errors_are_named(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(f"{HEADER}\n0,x,arc,1,1,,0.1,1,1,90,0.7\n")
    with pytest.raises(OutcomesError, match=r'joules of model "s" for request \'arc/0\''):
        read_table(str(path))
    path.write_text(f"{HEADER}\n0,x,arc,1,1,many,0.1,1,1,90,0.7\n")
    with pytest.raises(OutcomesError, match=r"t\.csv:2: column energy_consumption_s: 'many'"):
        read_table(str(path))
    path.write_text("a,b\n1,2\n")
    with pytest.raises(OutcomesError, match=r"expected the columns doc_id, input_text"):
        read_table(str(path))

"""Other programs' formats: what each line means, what is said of it, and OpenAI's answers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fake_models import requests, write_zoo

from messcli.cli import main
from messcli.errors import InputError
from messcli.files.dialects import guess, load_dialect
from messcli.files.requests import InputFields, count_lines, open_input, read_requests
from messcli.records import Rejected, Request
from messcli.registry import DIALECTS
from messcli.zoo import BUNDLED_ZOO

CHAT = [{"role": "user", "content": "our ugly letter"}]
BATCH = {
    "custom_id": "r1",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"model": "m", "messages": CHAT, "max_tokens": 9},
}
SHARED = {
    "id": "s1",
    "system": "Be short.",
    "conversations": [
        {"from": "human", "value": "Hello"},
        {"from": "gpt", "value": "Hi"},
        {"from": "human", "value": "And?"},
        {"from": "gpt", "value": "Nothing"},
    ],
}
ALPACA = {"instruction": "Translate.", "input": "a wheel", "output": "ein Rad", "level": 3}
SAMPLE = {
    "doc_id": 4,
    "doc": {"question": "2 + 2?"},
    "target": "4",
    "arguments": {"gen_args_0": {"arg_0": "Question: 2 + 2?\nAnswer:", "arg_1": {"until": ["\n"]}}},
    "resps": [["5"]],
    "filter": "none",
}
OPTIONS = {
    "doc_id": 5,
    "doc": {},
    "target": 1,
    "arguments": [["The sky is", " green"], ["The sky is", " blue"]],
}
EXAMPLES: dict[str, dict[str, Any]] = {
    "openai-batch": BATCH,
    "sharegpt": SHARED,
    "alpaca": ALPACA,
    "lm-eval": SAMPLE,
    "jsonl": {"prompt": "a"},
}


def read(*lines: Any, dialect: str | None = None, **fields: str) -> list[Request | Rejected]:
    said: list[str] = []
    text = "".join(json.dumps(line) + "\n" for line in lines)
    return list(
        read_requests(io.BytesIO(text.encode()), "in.jsonl", InputFields(**fields), dialect, said.append)
    )


def one(line: Any, dialect: str | None = None) -> Request:
    [found] = read(line, dialect=dialect)
    assert isinstance(found, Request), found
    return found


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_dialect_is_guessed_from_the_first_line_and_said(name: str) -> None:
    said: list[str] = []
    text = json.dumps(EXAMPLES[name]) + "\n"
    [request] = read_requests(io.BytesIO(text.encode()), "in.jsonl", tell=said.append)
    assert isinstance(request, Request)
    assert guess(EXAMPLES[name]) == name
    assert [f"--format {name}, guessed" in line for line in said] == ([] if name == "jsonl" else [True])


def test_every_dialect_has_an_example() -> None:
    assert set(EXAMPLES) == set(DIALECTS)


@pytest.mark.parametrize(
    ("line", "identity", "prompt", "chat", "references", "extra"),
    [
        (BATCH, "r1", "our ugly letter", CHAT, (), {}),
        (
            SHARED,
            "s1",
            "Be short.\nHello\nHi\nAnd?",
            [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Hi"},
                {"role": "user", "content": "And?"},
            ],
            ("Nothing",),
            {},
        ),
        (ALPACA, None, "Translate.\n\na wheel", None, ("ein Rad",), {"level": 3}),
        (SAMPLE, 4, "Question: 2 + 2?\nAnswer:", None, ("4",), {"doc": {"question": "2 + 2?"}}),
        (OPTIONS, 5, "The sky is", None, ("blue",), {"doc": {}}),
    ],
)
def test_what_a_line_means(
    line: Any, identity: Any, prompt: str, chat: Any, references: tuple[str, ...], extra: Any
) -> None:
    request = one(line)
    assert (request.prompt, request.references, request.extra) == (prompt, references, extra)
    assert (None if request.messages is None else list(request.messages)) == chat
    assert request.id == identity or identity is None


@pytest.mark.parametrize(
    ("dialect", "line", "expected"),
    [
        (
            "openai-batch",
            {"custom_id": "a", "url": "/v1/embeddings", "body": {}},
            "only /v1/chat/completions",
        ),
        ("openai-batch", {"custom_id": "a", "body": {"model": "m"}}, 'neither "messages" nor "prompt"'),
        ("openai-batch", {"custom_id": "a"}, 'field "body": expected an object'),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": "x"}]}, 'no turn is from "human"'),
        ("sharegpt", {"conversations": [{"from": "tool", "value": "x"}]}, "Leave turns of tools out"),
        ("sharegpt", {"conversations": {}}, "expected a list of turns"),
        ("alpaca", {"instruction": 3, "output": "x"}, 'field "instruction": expected a string'),
        ("lm-eval", {"doc_id": 1, "doc": {}, "arguments": {}}, "lm_eval --log_samples"),
    ],
)
def test_a_line_that_is_none_of_the_dialects_is_told_with_the_cure(
    dialect: str, line: Any, expected: str
) -> None:
    [found] = read(line, dialect=dialect)
    assert isinstance(found, Rejected)
    assert found.error.startswith("in.jsonl:1: ")
    assert expected in found.error
    assert found.id == line.get("custom_id")


def test_a_served_chat_of_lm_eval_is_a_chat() -> None:
    line = {**SAMPLE, "arguments": [[json.dumps(CHAT), {}]]}
    assert one(line).messages == tuple(CHAT)


def test_named_fields_are_ours() -> None:
    said: list[str] = []
    text = json.dumps(ALPACA) + "\n"
    lines = read_requests(
        io.BytesIO(text.encode()), "in.jsonl", InputFields("instruction"), None, said.append
    )
    [request] = lines
    assert isinstance(request, Request)
    assert (request.prompt, said) == ("Translate.", [])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_zoo(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def route(*arguments: str) -> Any:
    done = CliRunner().invoke(main, ["route", *arguments, "--meter", "estimate"])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def batch_of(rows: list[dict[str, Any]]) -> str:
    lines = [
        {
            "custom_id": row["id"],
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"messages": [{"role": "user", "content": row["prompt"]}]},
        }
        for row in rows
    ]
    return "".join(json.dumps(line) + "\n" for line in [*lines, {"custom_id": "bad", "body": {}}])


def test_a_batch_in_is_a_batch_out(folder: Path) -> None:
    (folder / "batch.jsonl").write_text(batch_of(requests(12)))
    done = route("batch.jsonl", "-o", "out.jsonl", "--format", "openai-batch")
    assert done.exit_code == 4
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [line["custom_id"] for line in lines] == [*(f"r{n}" for n in range(12)), "bad"]
    for line in lines[:-1]:
        assert set(line) == {"id", "custom_id", "response", "error", "messcli"}
        body = line["response"]["body"]
        [choice] = body["choices"]
        assert (line["error"], line["response"]["status_code"], choice["message"]["role"]) == (
            None,
            200,
            "assistant",
        )
        assert (
            body["usage"]["total_tokens"]
            == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]
        )
        assert isinstance(choice["message"]["content"], str)
        assert line["messcli"]["model"] == body["model"]
        assert line["messcli"]["billed_joules"] >= 0
    assert {line["response"]["body"]["choices"][0]["finish_reason"] for line in lines[:-1]} == {"stop"}
    assert lines[-1]["response"] is None
    assert 'neither "messages" nor "prompt"' in lines[-1]["error"]["message"]
    assert len({line["id"] for line in lines}) == 13
    assert (
        route("batch.jsonl", "-o", "out.jsonl", "--format", "openai-batch", "--fields", "id").exit_code == 2
    )


def test_openais_client_reads_the_answers(folder: Path) -> None:
    chat = pytest.importorskip("openai.types.chat")
    (folder / "batch.jsonl").write_text(batch_of(requests(3)))
    route("batch.jsonl", "-o", "out.jsonl", "--format", "openai-batch")
    for line in (folder / "out.jsonl").read_text().splitlines()[:3]:
        body = json.loads(line)["response"]["body"]
        answer = chat.ChatCompletion.model_validate(body, strict=True)
        assert answer.choices[0].message.content


def test_a_guessed_batch_gives_rows_of_ours(folder: Path) -> None:
    (folder / "batch.jsonl").write_text(batch_of(requests(3)))
    done = route("batch.jsonl", "-o", "out.jsonl")
    assert (
        "batch.jsonl holds OpenAI batch requests (--format openai-batch, guessed from its first line)"
        in done.stderr
    )
    row = json.loads((folder / "out.jsonl").read_text().splitlines()[0])
    assert (row["id"], "model" in row) == ("r0", True)


def test_parquet_is_read_as_lines(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"prompt": f"p{n}", "reference": ["a", "b"], "score": float("nan"), "image": b"\xff", "n": n}
        for n in range(700)
    ]
    path = str(tmp_path / "in.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert count_lines(path) == 700
    with open_input(path) as handle:
        found = [line for line in read_requests(handle, path) if isinstance(line, Request)]
    assert [request.prompt for request in found] == [f"p{n}" for n in range(700)]
    assert found[9].references == ("a", "b")
    assert found[9].extra == {"score": None, "image": "/w==", "n": 9}
    assert found[9].line == 10
    data = Path(path).read_bytes()
    (tmp_path / "torn.parquet").write_bytes(data[:-100])
    with (
        pytest.raises(InputError, match=r"is damaged Parquet.*write it again"),
        open_input(str(tmp_path / "torn.parquet")),
    ):
        pass
    with pytest.raises(InputError, match="can't be read from a pipe"):
        list(read_requests(io.BytesIO(data), "-"))


def test_a_conversation_in_parquet_is_guessed_too(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = str(tmp_path / "chats")
    parquet.write_table(pyarrow.Table.from_pylist([SHARED]), path)
    with open_input(path) as handle:
        [request] = read_requests(handle, path)
    assert isinstance(request, Request)
    assert request.references == ("Nothing",)


def test_a_field_called_plan_is_the_users_own_without_plans(folder: Path) -> None:
    rows = [{**row, "plan": plan} for row, plan in zip(requests(2), ("free tier", 3), strict=True)]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert route("in.jsonl", "-o", "out.jsonl").exit_code == 0
    found = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [row["plan"] for row in found] == ["free tier", 3]
    zoo = (folder / "zoo.toml").read_text()
    (folder / "zoo.toml").write_text(f"[plans]\ngold = 0.5\n{zoo}")
    (folder / "in.jsonl").write_text("".join(json.dumps({**row, "tier": "gold"}) + "\n" for row in rows))
    assert route("in.jsonl", "-o", "other.jsonl").exit_code == 4  # now it names plans that there aren't
    assert route("in.jsonl", "-o", "third.jsonl", "--plan-field", "tier").exit_code == 0


def test_columns_may_be_fields_of_the_input(folder: Path) -> None:
    (folder / "in.jsonl").write_text('{"id": 1, "question": "apple", "answer": "apple", "output": "x"}\n')
    names = ["--prompt-field", "question", "--reference-field", "answer"]
    route("in.jsonl", "-o", "out.jsonl", *names, "--fields", "id,question,answer,output,input_output")
    assert json.loads((folder / "out.jsonl").read_text()) == {
        "id": 1,
        "question": "apple",
        "answer": "apple",
        "output": "apple",
        "input_output": "x",
    }
    route("in.jsonl", "-o", "b.jsonl", *names, "--rename", "output=said", "--fields", "id,said,output")
    assert json.loads((folder / "b.jsonl").read_text()) == {"id": 1, "said": "apple", "output": "x"}
    done = route("in.jsonl", "-o", "c.jsonl", *names, "--rename", "outptu=said")
    assert (done.exit_code, "no column outptu" in done.stderr) == (2, True)
    for names_ in ("output=model", "output=id", "output=failed", "output=a,model=a", "error=queue"):
        done = route("in.jsonl", "-o", "c.jsonl", *names, "--rename", names_)
        assert (done.exit_code, "another column is called" in done.stderr) == (2, True)
    swapped = route("in.jsonl", "-o", "d.jsonl", *names, "--rename", "output=model,model=output")
    assert swapped.exit_code == 0
    assert json.loads((folder / "d.jsonl").read_text())["model"] == "apple"


def test_an_empty_reasoning_part_leaves_no_trace_in_the_output(folder: Path) -> None:
    (folder / "in.jsonl").write_text('{"id": 1, "prompt": "<think></think>apple"}\n')
    route("in.jsonl", "-o", "out.jsonl")
    row = json.loads((folder / "out.jsonl").read_text())
    assert (row["output"], "reasoning" in row) == ("apple", False)


def test_titles_are_plural_nouns() -> None:
    assert all(load_dialect(name).title[-1] == "s" or " of " in load_dialect(name).title for name in DIALECTS)


def test_an_answer_that_was_cut_off_says_so(folder: Path) -> None:
    """Real models that may write three tokens: rows, the batch's shape and the summary tell."""
    text = BUNDLED_ZOO.read_text().replace('path = "./', f'path = "{BUNDLED_ZOO.parent}/')
    (folder / "zoo.toml").write_text(text.replace("max_new_tokens = 24", "max_new_tokens = 3"))
    prompts = [
        "the round mill",
        "a giant fears a proud ghost behind the cave",
        "our hero washes an ugly poet",
    ]
    lines = [{"custom_id": str(n), "body": {"messages": [{"role": "user", "content": text}]}}
             for n, text in enumerate(prompts)]  # fmt: skip
    (folder / "batch.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = route("batch.jsonl", "-o", "out.jsonl", "--format", "openai-batch", "--policy", "smallest")
    assert done.exit_code == 0, done.stderr
    written = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert {line["response"]["body"]["choices"][0]["finish_reason"] for line in written} == {"length"}
    assert {line["messcli"]["finish"] for line in written} == {"length"}
    assert "cut off" in done.stderr
    kept = CliRunner().invoke(main, ["record", "batch.jsonl", "-o", "table.jsonl", "--meter", "estimate"])
    assert kept.exit_code == 0, kept.stderr
    assert kept.stderr.count("3 answers cut at the limit of tokens") == 3
    table = [json.loads(line)["models"] for line in (folder / "table.jsonl").read_text().splitlines()]
    assert {outcome["finish"] for models in table for outcome in models.values()} == {"length"}
    assert "3 answers, at the limit of tokens (small 3). Raise max_new_tokens" in done.stderr


def test_a_chat_that_is_nested_too_deeply_is_a_text() -> None:
    text = '[{"role":' + "[" * 100_000
    line = {"doc": {}, "target": "a", "arguments": [[text]]}
    assert load_dialect("lm-eval").read(line)["prompt"] == text

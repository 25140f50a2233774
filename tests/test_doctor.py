"""`messcli doctor`: what works here is said to work, what would stop a run is marked, and nothing is changed."""

from __future__ import annotations

import json
import socket
import sqlite3
from pathlib import Path
from typing import Any

import nvml_stub
import pytest
from click.testing import CliRunner
from fake_models import requests, write_joules, write_zoo

from messcli.cli import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_zoo(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def doctor(*arguments: str) -> tuple[int, dict[tuple[str, str], dict[str, Any]]]:
    done = CliRunner().invoke(main, ["doctor", "--json", *arguments])
    assert isinstance(done.exception, SystemExit) or done.exception is None, done.exception
    found = json.loads(done.stdout)
    assert found["ready"] is (done.exit_code == 0)
    return done.exit_code, {(finding["topic"], finding["name"]): finding for finding in found["findings"]}


def test_what_works_here(folder: Path) -> None:
    code, found = doctor()
    assert code == 0
    assert {"program", "packages", "machine", "meters", "zoo", "calibration"} == {topic for topic, _ in found}
    assert found["packages", "torch"]["status"] == "ok"
    assert found["meters", "estimate"]["status"] == "ok"
    assert found["zoo", "--meter auto"]["status"] == "ok"
    assert "calibrate` gives it a start" in found["calibration", "file"]["text"]
    text = CliRunner().invoke(main, ["doctor"]).stdout
    assert text.splitlines()[-1] == "`messcli route` can run here."
    assert list(folder.iterdir()) == [folder / "zoo.toml"]  # nothing is left behind


def test_what_would_stop_a_run_is_marked(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    (folder / "zoo.toml").write_text(
        '[[models]]\nname = "gone"\npath = "./nowhere"\n'
        f'[[models]]\nname = "down"\npath = "m"\nbackend = "openai"\nbase_url = "http://127.0.0.1:{port}/v1"\n'
        "joules = {request = 1.0}\n"
    )
    code, found = doctor("--meter", "command")
    assert code == 1
    assert "no such folder" in found["zoo", "gone"]["text"]
    assert "can't be reached" in found["zoo", "down"]["text"]
    assert found["meters", "command"]["status"] == "!!"
    assert "set command under [energy]" in found["meters", "command"]["text"]
    told = CliRunner().invoke(main, ["doctor"]).stdout
    assert "to mend before `messcli route` can run here; they are marked !!" in told


def test_a_zoo_that_cannot_be_read_is_a_finding(folder: Path) -> None:
    (folder / "zoo.toml").write_text("[[models]\n")
    code, found = doctor()
    assert (code, found["zoo", "zoo.toml"]["status"]) == (1, "!!")


def test_a_calibration_that_does_not_fit_is_a_finding(folder: Path) -> None:
    (folder / "calibration.json").write_text("{}")
    code, found = doctor()
    assert (code, found["calibration", "file"]["status"]) == (1, "!!")


def test_a_state_is_looked_at(folder: Path) -> None:
    rows = requests(5)
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = CliRunner().invoke(
        main, ["route", "in.jsonl", "-o", "out.jsonl", "--meter", write_joules(folder, rows)]
    )
    assert done.exit_code == 0
    before = (folder / "out.jsonl.state").read_bytes()
    code, found = doctor("--state", "out.jsonl.state")
    assert (code, found["state", "out.jsonl.state"]["status"]) == (0, "ok")
    assert found["state", "out.jsonl.state"]["text"].startswith("5 lines finished, schema ")
    assert (folder / "out.jsonl.state").read_bytes() == before
    sqlite3.connect("other.db").execute("CREATE TABLE t (x)").connection.close()
    for name, expected in (
        ("other.db", "no state of messcli"),
        ("none", "no such file"),
        ("in.jsonl", "not a database"),
    ):
        code, found = doctor("--state", name)
        assert (code, found["state", name]["status"]) == (1, "!!")
        assert expected in found["state", name]["text"]


def test_cards_are_listed(tmp_path: Path) -> None:
    stub = nvml_stub.build(tmp_path)
    (stub / "world").write_text("cards 2\n")
    code = (
        "import json\nfrom messcli.jobs.doctor import _machine\n"
        "print(json.dumps([[f.name, f.status, f.text] for f in _machine()]))"
    )
    found = nvml_stub.run(stub, "world", code)
    cards = [(name, status) for name, status, _ in found if name.startswith("cuda:")]
    assert cards == [("cuda:0", "ok"), ("cuda:1", "ok")]

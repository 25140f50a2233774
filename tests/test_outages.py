"""Servers that refuse, are busy, die in the middle or were never there, and the exit codes that come of them."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fault_server import Server
from marks import slow
from toy_job import PLAIN, requests, write_job
from transformers import AutoConfig, GenerationMixin

from messcli.errors import EXIT_UNAVAILABLE, ModelError, ModelUnavailable
from messcli.jobs.config import RouteConfig
from messcli.jobs.route import route
from messcli.jobs.summary import Summary
from messcli.state.state import State
from messcli.zoo import BUNDLED_ZOO, load_zoo

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "samples" / "requests.jsonl"
Reply = tuple[int, dict[str, Any]]
Says = Callable[[str, str, int], Reply | None]  # model, prompt, how many requests before; None: an answer

BUSY: Reply = (429, {"error": {"message": "Rate limit reached"}})
QUOTA: Reply = (429, {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}})
DOWN: Reply = (503, {"error": {"message": "Service Unavailable"}})
CRASHED: Reply = (500, {"error": {"message": "Internal error"}})
FLAGGED: Reply = (200, {"error": {"message": "This content was flagged", "code": 502}})
TOO_LONG: Reply = (400, {"error": {"message": "This model's maximum context length is 40 characters."}})
NO_KEY: Reply = (401, {"error": {"message": "Incorrect API key provided"}})


class Zoo:
    """Two models behind one server that answers with the prompt, unless `says` says otherwise."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.says: Says = lambda model, prompt, before: None
        self.asked: Counter[str] = Counter()
        zoo = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def send(self, status: int, body: dict[str, Any]) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Retry-After", "0")  # tests needn't wait
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                self.send(200, {"object": "list", "data": []})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                model, prompt = body["model"], body["messages"][-1]["content"]
                reply = zoo.says(model, prompt, zoo.asked[model])
                zoo.asked[model] += 1
                if reply is None:
                    message = {"role": "assistant", "content": prompt}
                    choice = {"index": 0, "finish_reason": "stop", "message": message}
                    usage = {"prompt_tokens": 7, "completion_tokens": 3}
                    reply = 200, {"choices": [choice], "usage": usage}
                self.send(*reply)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.write({"small": self.url, "large": self.url})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def write(self, urls: dict[str, str]) -> None:
        models = "".join(
            f'[[models]]\nname = "{name}"\nbackend = "openai"\nbase_url = "{url}"\npath = "{name}"\n'
            f"[models.joules]\nrequest = {cost}\noutput_token = {cost / 10}\n"
            for (name, url), cost in zip(urls.items(), (1.0, 5.0), strict=True)
        )
        (self.folder / "zoo.toml").write_text(f'[sla]\nalpha = 0.5\nmetric = "exact"\n{models}')

    def input(self, count: int) -> None:
        lines = []
        for n in range(count):
            prompt = f"{'long ' * 12 if n % 2 else ''}question {n}"
            lines.append(json.dumps({"id": n, "prompt": prompt, "reference": prompt}))
        (self.folder / "in.jsonl").write_text("\n".join(lines) + "\n")

    def route(self, **options: Any) -> Summary:
        options = {"patience": 0.2, "window": 16, "zoo": str(self.folder / "zoo.toml"), **options}
        return route(RouteConfig.of(str(self.folder / "in.jsonl"), str(self.folder / "out.jsonl"), **options))

    def rows(self) -> list[dict[str, Any]]:
        file = self.folder / "out.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def zoo(tmp_path: Path) -> Iterator[Zoo]:
    zoo = Zoo(tmp_path)
    yield zoo
    zoo.close()


WINDOWS = pytest.mark.parametrize(
    "window", [pytest.param(1, marks=pytest.mark.slow), 16, pytest.param(4096, marks=pytest.mark.slow)]
)


@WINDOWS
@pytest.mark.parametrize("dead", ["small", "large"])
@pytest.mark.slow
def test_one_server_that_was_never_there_loses_no_row(zoo: Zoo, window: int, dead: str) -> None:
    other = {"small": "large", "large": "small"}[dead]
    zoo.input(120)
    urls = {name: "http://127.0.0.1:9/v1" if name == dead else zoo.url for name in ("small", "large")}
    zoo.write(urls)
    summary = zoo.route(window=window)
    assert (summary.requests.routed, summary.requests.failed) == (120, 0)
    assert {row["model"] for row in zoo.rows()} == {other}
    assert all(row["billed_joules"] == row["joules"] for row in zoo.rows())


@WINDOWS
@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(DOWN, id="down"),
        slow(CRASHED, name="crashed"),
        slow(BUSY, name="busy"),
        slow(QUOTA, name="quota"),
        pytest.param(FLAGGED, id="flagged"),
    ],
)
@pytest.mark.slow
def test_a_server_that_dies_in_the_middle_loses_no_row(zoo: Zoo, window: int, reply: Reply) -> None:
    zoo.input(200 if window > 1 else 60)
    count = 200 if window > 1 else 60
    zoo.says = lambda model, prompt, before: reply if model == "small" and before >= 20 else None
    summary = zoo.route(window=window)
    assert (summary.requests.routed, summary.requests.failed) == (count, 0)
    assert [row["id"] for row in zoo.rows()] == list(range(count))
    assert {row["model"] for row in zoo.rows()[-20:]} == {"large"}
    if window > 1:  # six attempts each; a window of 4,096 has 32 of them under way
        assert zoo.asked["small"] <= 20 + 6 * 32 * 4


@WINDOWS
@pytest.mark.parametrize(
    "reply", [FLAGGED, TOO_LONG, (451, {"error": "not here"})], ids=["flagged", "length", "legal"]
)
@pytest.mark.slow
def test_what_one_model_refuses_is_answered_by_the_other(zoo: Zoo, window: int, reply: Reply) -> None:
    zoo.input(80)
    zoo.says = lambda model, prompt, before: reply if model == "small" and "long" in prompt else None
    summary = zoo.route(window=window)
    assert (summary.requests.routed, summary.requests.failed) == (80, 0)
    for row in zoo.rows():
        assert row["accuracy"] == 1.0
        if row["id"] % 2:
            assert row["model"] == "large"
        if row.get("failed"):
            assert row["asked"] in (["small", "large"],)
            assert list(row["failed"]) == ["small"]


@WINDOWS
@pytest.mark.parametrize(
    "reply", [slow(DOWN, name="down"), slow(BUSY, name="busy"), pytest.param(QUOTA, id="quota")]
)
@pytest.mark.slow
def test_an_outage_of_all_stops_the_run_and_the_same_command_ends_it(
    zoo: Zoo, window: int, reply: Reply
) -> None:
    zoo.input(60)
    zoo.says = lambda model, prompt, before: reply if sum(zoo.asked.values()) >= 30 else None
    with pytest.raises(ModelUnavailable, match="no model answers"):
        zoo.route(window=window)
    assert not any("error" in row for row in zoo.rows())
    with pytest.raises(ModelUnavailable):
        zoo.route(window=window)
    zoo.says = lambda model, prompt, before: None
    zoo.route(window=window)
    assert [row["id"] for row in zoo.rows()] == list(range(60))
    assert not any("error" in row for row in zoo.rows())


def test_a_wrong_key_is_the_runs_trouble(zoo: Zoo) -> None:
    zoo.input(60)
    zoo.says = lambda model, prompt, before: NO_KEY if sum(zoo.asked.values()) >= 30 else None
    with pytest.raises(ModelError, match="Incorrect API key") as failure:
        zoo.route()
    assert failure.value.exit_code == 1
    assert not any("error" in row for row in zoo.rows())


@pytest.mark.slow
def test_an_odd_status_after_answers_is_that_requests_trouble(zoo: Zoo) -> None:
    zoo.input(60)
    gone: Reply = (404, {"error": {"message": "no such page"}})
    zoo.says = lambda model, prompt, before: gone if prompt.endswith("question 33") else None
    summary = zoo.route(window=1)
    assert (summary.requests.routed, summary.requests.failed) == (60, 1)
    zoo.says = lambda model, prompt, before: None
    assert zoo.route(window=1).requests.retried == 1
    assert not any("error" in row for row in zoo.rows())


# ---- exit codes -----------------------------------------------------------------------------------


def codes_of_the_page() -> set[int]:
    page = (ROOT / "docs" / "exit-codes.md").read_text(encoding="utf-8")
    return {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.M)}


BAD = {"id": "bad", "prompt": "small refuses large refuses", "reference": "w"}
CASES: dict[int, tuple[list[dict[str, Any]], tuple[str, ...], dict[str, Any]]] = {
    0: (requests(10), (), {}),
    1: (requests(10), ("--state", "/dev/null/state"), {}),
    2: (requests(10), ("--alpha", "7"), {}),
    3: ([*requests(2), *[dict(BAD, id=n) for n in range(9)]], ("--check-sla",), {}),
    4: ([*requests(10), BAD], ("--check-sla", "--alpha", "0.1"), {}),
    69: (requests(10), ("--patience", "0"), {"environment": {"TOY_AWAY": "small large"}}),
    75: (requests(10), (), {}),
    130: (requests(40), (), {"environment": {"TOY_SECONDS": "0.5"}, "signals": [(1.5, signal.SIGINT)]}),
    143: (requests(40), (), {"environment": {"TOY_SECONDS": "0.5"}, "signals": [(1.5, signal.SIGTERM)]}),
}


def test_the_page_names_every_code() -> None:
    assert codes_of_the_page() == CASES.keys()


@pytest.mark.parametrize("code", CASES)
@pytest.mark.slow
def test_each_cause_has_its_code(tmp_path: Path, code: int) -> None:
    lines, options, how = CASES[code]
    folder = tmp_path / "work"
    folder.mkdir()
    write_job(folder, lines)
    server = Server(folder, None)
    try:
        args = ["route", "in.jsonl", "-o", "out.jsonl", *PLAIN, "--window", "8", *options]
        if code == 75:
            with State(folder / "out.jsonl.state"):
                ended = server.run(args, folder, **how)
        else:
            ended = server.run(args, folder, **how)
    finally:
        server.close()
    assert ended.status == code, ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == b""


@pytest.mark.parametrize("broken", [("small",), ("small", "medium", "large")])
def test_a_model_of_this_process_that_breaks_passes_its_requests_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: tuple[str, ...]
) -> None:
    widths = {
        AutoConfig.from_pretrained(spec.path).hidden_size
        for spec in load_zoo(BUNDLED_ZOO).models
        if spec.name in broken
    }
    generate = GenerationMixin.generate

    def breaks(self: Any, **options: Any) -> Any:
        warming_up = options["input_ids"].numel() == 1
        if self.config.hidden_size in widths and not warming_up:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more lines")
        return generate(self, **options)

    monkeypatch.setattr(GenerationMixin, "generate", breaks)
    output = tmp_path / "out.jsonl"
    config = RouteConfig.of(str(SAMPLES), str(output), limit=24, patience=0.0)
    if len(broken) == 3:
        with pytest.raises(ModelUnavailable, match="illegal memory access") as caught:
            route(config)
        assert caught.value.exit_code == EXIT_UNAVAILABLE
        assert "\n" not in str(caught.value)
        assert not output.exists() or not output.read_text()
        monkeypatch.undo()
    summary = route(config)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 24
    assert all(row["output"] is not None for row in rows)
    if len(broken) == 1:
        assert summary.requests.passed_on["small"] > 0
        assert "small" not in {row["model"] for row in rows}

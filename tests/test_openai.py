"""The openai backend: against a server that misbehaves on purpose, and against a real one (`transformers serve`)."""

from __future__ import annotations

import gzip
import heapq
import importlib.util
import json
import math
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from messcli.energy import open_meter
from messcli.errors import MeterError, ModelError, ModelUnavailable, ZooError
from messcli.jobs.config import Running
from messcli.jobs.fleet import open_live
from messcli.metrics import load_metric
from messcli.models.client import Concurrency
from messcli.models.client import Reply as HttpReply
from messcli.models.openai import ATTEMPTS, OpenAIBackend
from messcli.models.transformers import TransformersBackend
from messcli.records import Generation, Request
from messcli.zoo import BUNDLED_ZOO, load_zoo, model_spec
from messcli.zoo_values import BadValue
from messcli.zoo_values import request as request_options

SAMPLES = Path(__file__).parent.parent / "samples" / "requests.jsonl"
LARGE = load_zoo(BUNDLED_ZOO).models[-1]
KEY = "sk-a-secret"

Reply = tuple[int, dict[str, str], Any]  # status, headers, body: JSON-able or bytes


class _Quiet(ThreadingHTTPServer):
    request_queue_size = 1024  # of 5, the default, 200 connections at once wait for minutes
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        return  # a client that has gone is what some tests are about


class Server:
    """A server of the API on loopback. `reply` makes each answer; what came in is kept."""

    def __init__(self) -> None:
        self.reply: Callable[[str, dict[str, Any]], Reply] = lambda path, body: self.answer(body)
        self.seen: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.most_at_once = self.at_once = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.respond((200, {}, {"data": []}) if outer.open else (401, {}, {"detail": "who are you?"}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.seen.append((self.path, body, dict(self.headers)))
                    outer.at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer.at_once)
                reply = outer.reply(self.path, body)
                with outer._lock:
                    outer.at_once -= 1
                self.respond(reply)

            def respond(self, reply: Reply) -> None:
                status, headers, body = reply
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments: Any) -> None:
                return

        self.open = True
        self._server = _Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def answer(self, body: dict[str, Any]) -> Reply:
        """The prompt in capitals, with as many tokens as words."""
        text = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        usage = {"prompt_tokens": len(text.split()), "completion_tokens": len(text.split()) + 1}
        choice = {"text": text.upper()} if "prompt" in body else {"message": {"content": text.upper()}}
        return 200, {}, {"choices": [choice], "usage": usage}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server():
    made = Server()
    yield made
    made.close()


def backend(server: Server, *, pauses: list[float] | None = None, **fields: Any) -> OpenAIBackend:
    defaults: dict[str, Any] = {"base_url": server.url, "device": "cpu", "max_new_tokens": 12, "timeout": 5.0}
    spec = model_spec(name="m", path="org/model", backend="openai", **{**defaults, **fields})

    async def sleep(seconds: float) -> None:
        if pauses is not None:
            pauses.append(seconds)

    made = OpenAIBackend(spec, batch_size=None, sleep=sleep, jitter=lambda: 1.0)
    OPENED.append(made)
    return made


OPENED: list[OpenAIBackend] = []


@pytest.fixture(autouse=True)
def _closed():
    yield
    while OPENED:
        OPENED.pop().unload()


def requests(count: int) -> list[Request]:
    return [Request(id=f"r{number}", prompt=" ".join(["word"] * (number + 1))) for number in range(count)]


# --- what is sent ---


def test_answers_come_back_in_order_whatever_the_timing(server):
    def slow_first(path: str, body: dict[str, Any]) -> Reply:
        time.sleep(0.1 if len(body["prompt"]) < 20 else 0.0)
        return server.answer(body)

    server.reply = slow_first
    asked = requests(12)
    answers = backend(server, concurrency=4, chat_template=False).generate(asked)
    assert answers == [Generation(r.prompt.upper(), n + 1, n + 2) for n, r in enumerate(asked)]
    assert 2 <= server.most_at_once <= 4


def test_what_is_asked_for(server):
    chat = ({"role": "user", "content": "a"},)
    fields = {
        "system_prompt": "S",
        "chat_options": {"enable_thinking": False},
        "generation": {"stop_strings": ["x"]},
    }
    backend(server, **fields).generate([Request(id=1, prompt="p")])
    path, body, headers = server.seen.pop()
    assert path == "/v1/chat/completions"
    assert body == {
        "model": "org/model",
        "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "p"}],
        "max_tokens": 12,
        "temperature": 0,
        "logprobs": True,
        "stop": ["x"],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert "Authorization" not in headers
    for made, path, key in [
        (backend(server, prompt_template="T: {prompt}"), "/v1/completions", "prompt"),
        (backend(server, chat_template=False), "/v1/completions", "prompt"),
        (
            backend(server, prompt_template="T: {prompt}", chat_template=True),
            "/v1/chat/completions",
            "messages",
        ),
        (backend(server), "/v1/chat/completions", "messages"),
    ]:
        made.generate([Request(id=1, prompt="p")])
        assert server.seen[-1][0] == path
        assert key in server.seen[-1][1]
    backend(server, prompt_template="T: {prompt}").generate([Request(id=1, prompt="a", messages=chat)])
    assert server.seen[-1][1]["messages"] == list(chat)


def test_sampling_is_seeded_by_the_request(server):
    sampling = backend(server, generation={"do_sample": True, "temperature": 0.7, "top_p": 0.9})
    sampling.generate([Request(id="a", prompt="p"), Request(id="b", prompt="p"), Request(id="a", prompt="p")])
    bodies = [body for _, body, _ in server.seen]
    assert all(body["temperature"] == 0.7 and body["top_p"] == 0.9 for body in bodies)
    assert len({body["seed"] for body in bodies}) == 2


def test_the_key_comes_from_the_environment_and_shows_nowhere(server, monkeypatch):
    made = backend(server, api_key_env="MY_KEY")
    with pytest.raises(ModelError, match=r"the environment has no MY_KEY\. Set it to the server's API key"):
        made.load()
    monkeypatch.setenv("MY_KEY", KEY)
    made.generate(requests(1))
    assert server.seen[0][2]["Authorization"] == f"Bearer {KEY}"
    server.reply = lambda path, body: (403, {}, {"error": {"message": "no"}})
    with pytest.raises(ModelError) as caught:
        made.generate(requests(1))
    assert str(caught.value).endswith(": HTTP 403: no. Correct the key in MY_KEY")
    assert KEY not in str(caught.value)
    assert KEY not in repr(vars(made))


@pytest.mark.parametrize(
    ("generation", "told"),
    [
        ({"num_beams": 2}, "generation.num_beams: a server of the OpenAI API has no such option. Known are"),
        ({"temperature": 1.0}, "generation.temperature has no effect without sampling. Add do_sample = true"),
    ],
)
def test_options_that_a_server_cannot_have(server, generation, told):
    with pytest.raises(ModelError, match=told):
        backend(server, generation=generation)


# --- what goes wrong ---


def failing(server: Server, times: int, reply: Reply) -> None:
    """`reply` so many times for each prompt, then the answer."""
    left: dict[str, int] = {}

    def some(path: str, body: dict[str, Any]) -> Reply:
        key = json.dumps(body, sort_keys=True)
        left[key] = left.get(key, times) - 1
        return server.answer(body) if left[key] < 0 else reply

    server.reply = some


@pytest.mark.parametrize("status", [408, 429, 500, 503, 507, 522])
def test_passing_trouble_is_waited_out(server, status):
    pauses: list[float] = []
    failing(server, ATTEMPTS - 1, (status, {}, {"detail": "busy"}))
    answers = backend(server, pauses=pauses, chat_template=False).generate(requests(3))
    assert [answer.output for answer in answers] == [r.prompt.upper() for r in requests(3)]
    assert sorted(pauses) == sorted([0.5, 1.0, 2.0, 4.0, 8.0] * 3)


def test_a_servers_wish_to_wait_is_respected_up_to_a_point(server):
    pauses: list[float] = []
    failing(server, 1, (429, {"Retry-After": "7"}, {}))
    backend(server, pauses=pauses).generate(requests(1))
    assert pauses == [7.0]
    failing(server, 1, (429, {"Retry-After": "3600"}, {"error": {"message": "quota"}}))
    with pytest.raises(
        ModelError, match=r"asks to wait for 3600 s \(HTTP 429: quota\)\. Run the same command"
    ):
        backend(server, pauses=pauses).generate(requests(1))


def test_what_never_works_is_that_requests_error(server):
    def one(path: str, body: dict[str, Any]) -> Reply:
        return server.answer(body) if " " in body["prompt"] else (500, {}, b"<html>oh\nno</html>")

    server.reply = one
    bad, good = backend(server, chat_template=False).generate(requests(2))
    assert bad.error == f'model "m": HTTP 500: <html>oh no</html>; gave up after {ATTEMPTS} attempts'
    assert good.output == "WORD WORD"
    server.reply = lambda path, body: (400, {}, {"error": {"message": "This model's context is 8 tokens"}})
    (answer,) = backend(server).generate(requests(1))
    assert answer == Generation(
        None,
        0,
        0,
        error='model "m": the server refuses it: This model\'s context is 8 tokens',
        fault="request",
    )


def test_no_answer_in_time_is_that_requests_error(server):
    released = threading.Event()
    server.reply = lambda path, body: (released.wait(10), server.answer(body))[1]  # type: ignore[func-returns-value]
    try:
        (answer,) = backend(server, timeout=0.05).generate(requests(1))
    finally:
        released.set()
    assert answer.error == f'model "m": no whole answer within 0.05 s; gave up after {ATTEMPTS} attempts'


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (
            (404, {}, {"message": "no model"}),
            "HTTP 404: no model. Correct path, the model's name on the server",
        ),
        ((200, {}, b"<html>"), "the server's answer is no JSON (<html>). Check that base_url ends where"),
        (
            (429, {}, {"error": {"message": "pay", "code": "insufficient_quota"}}),
            "the account's quota is used up (pay). Raise it, and run the same command again",
        ),
        (
            (400, {}, {"error": {"message": "only 1 is supported", "param": "temperature"}}),
            "the server refuses the option temperature: only 1 is supported. Set it in [models.request], or leave "
            'it out by omit = ["temperature"]',
        ),
        ((501, {}, {"message": "no such thing"}), "HTTP 501: no such thing. Check base_url"),
        ((302, {"Location": "http://127.0.0.1:9/"}, {}), "HTTP 302: {}. Check base_url and the server's log"),
    ],
)
def test_what_is_wrong_with_the_model_ends_the_run(server, reply, told):
    server.reply = lambda path, body: reply
    with pytest.raises(ModelError) as caught:
        backend(server).generate(requests(4))
    assert str(caught.value).startswith(f'model "m" ({server.url}): {told}')
    assert "\n" not in str(caught.value)


def test_a_server_that_is_not_there_or_refuses_is_told(server):
    server.open = False
    with pytest.raises(
        ModelError, match=r"HTTP 401: who are you\?\. Set api_key_env in zoo\.toml to the name"
    ):
        backend(server).load()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        gone = backend(server, base_url=f"http://127.0.0.1:{closed.getsockname()[1]}/v1")
        with pytest.raises(
            ModelError, match=r"the server can't be reached \(.*\)\. Start it, or correct base_url"
        ):
            gone.load()
        with pytest.raises(MeterError, match=r"nothing listens on port \d+ of this host\. Start the server"):
            open_meter("estimate", ["cpu"], None, [gone.cpu_seconds])


# --- odd answers ---


def body_of(content: Any, finish: Any = "stop", usage: Any = None, **message: Any) -> dict[str, Any]:
    choice = {"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
    return {"choices": [choice], "usage": usage or {"prompt_tokens": 7, "completion_tokens": 3}}


COUNTED = {"prompt_tokens": "7", "completion_tokens": 3.0}
ODD: list[tuple[Any, tuple[Any, Any, Any], str]] = [  # body; output, fault, finish; what the error says
    (body_of("a"), ("a", None, "stop"), ""),
    (body_of("a", "length"), ("a", None, "length"), ""),
    (body_of("a", "whatever"), ("a", None, None), ""),
    (body_of("a", ["stop"], COUNTED), ("a", None, None), ""),
    (body_of([{"type": "text", "text": "a "}, {"type": "text", "text": "b"}, 3]), ("a b", None, "stop"), ""),
    (body_of("", "stop"), ("", None, "stop"), ""),
    (body_of("half \ud83d pair"), ("half ? pair", None, "stop"), ""),
    (body_of("a", reasoning_content="think"), ("a", None, "stop"), ""),
    (body_of(None, reasoning_content="think"), (None, "model", "stop"), "answered with reasoning only"),
    (body_of(None, "length", reasoning_content="t"), (None, "model", "length"), "Raise max_new_tokens"),
    (body_of(None), (None, "model", "stop"), "the answer holds no text"),
    ({"choices": [{}]}, (None, "model", None), "the answer holds no text"),
    (body_of([{"type": "output_audio"}]), (None, "model", "stop"), "the answer holds no text"),
    (body_of(None, refusal="I can't"), (None, "request", "stop"), 'it refuses to answer: "I can\'t"'),
    (
        body_of([{"type": "refusal", "refusal": "No."}]),
        (None, "request", "stop"),
        "it refuses to answer: 'No.'",
    ),
    (body_of([{"type": "reasoning", "text": "hm"}, {"type": "text", "text": "a"}]), ("a", None, "stop"), ""),
    (body_of(None, "content_filter"), (None, "request", "filtered"), "the server's filter took the answer"),
    (body_of(None, "tool_calls", tool_calls=[{}]), (None, "model", "tool_calls"), "a tool call and no text"),
    (body_of("a " * 40_000), (None, "model", "stop"), "the answer has more than 65,536 characters"),
    (body_of("a", reasoning_content="b" * 80_000), (None, "model", "stop"), "more than 65,536 characters"),
    ({"choices": []}, (None, "model", None), "the answer holds no choices"),
    ({"choices": {"0": 1}}, (None, "model", None), "the answer holds no choices"),
    ({"choices": ["a"]}, (None, "model", None), "the answer holds no choices"),
    ({"ok": True}, (None, "model", None), "the answer holds no choices"),
    (
        {"error": {"message": "flagged", "code": 502}},
        (None, "model", None),
        "answered with an error: flagged",
    ),
    ({"error": "no\x1b[2J"}, (None, "model", None), "answered with an error: no [2J"),
    ({"error": {"message": "Rate limit exceeded", "code": 429}}, (None, "model", None), "gave up after 6"),
]


@pytest.mark.parametrize(("body", "expected", "told"), ODD)
def test_one_odd_answer_is_that_answers_trouble(server, body, expected, told):
    server.reply = lambda path, sent: (200, {}, body)
    (answer,) = backend(server).generate(requests(1))
    assert (answer.output, answer.fault, answer.finish) == expected
    assert (told in answer.error) if told else (answer.error is None)
    if isinstance(body.get("usage"), dict):
        assert (answer.prompt_tokens, answer.output_tokens) == (7, 3)  # it has cost that, used or not


@pytest.mark.parametrize(
    "message",
    [
        {"content": "a", "reasoning_content": "hm"},
        {"content": "a", "reasoning": "hm"},
        {"content": "a", "reasoning_details": [{"type": "reasoning.text", "text": "hm"}]},
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
                {"type": "text", "text": "a"},
            ]
        },
    ],
)
def test_what_a_server_sends_of_its_reasoning_is_kept(server, message):
    server.reply = lambda path, sent: (200, {}, {"choices": [{"message": message}], "usage": COUNTED})
    (answer,) = backend(server).generate(requests(1))
    assert (answer.output, answer.reasoning, answer.error) == ("a", "hm", None)


def test_a_prompt_that_a_gateway_forbids_is_that_requests_trouble(server):
    replies = [
        server.answer,
        lambda sent: (403, {}, {"error": {"message": "your input was flagged"}}),
        server.answer,
    ]
    server.reply = lambda path, sent: replies.pop(0)(sent)
    made = backend(server, concurrency=1)
    answers = made.generate(requests(3))
    assert [answer.fault for answer in answers] == [None, "request", None]
    assert "refuses it: your input was flagged" in answers[1].error


@pytest.mark.parametrize(
    "count", [-5, 10**30, 1e308, float("nan"), float("inf"), True, [], "x", "9" * 5000, 2.5]
)
def test_counts_that_cannot_be_are_guessed_and_told(server, count):
    usage = {"prompt_tokens": count, "completion_tokens": count}
    server.reply = lambda path, sent: (200, {}, json.dumps(body_of("twelve chars", "stop", usage)).encode())
    made = backend(server)
    (answer,) = made.generate(requests(1))
    assert (answer.output, answer.prompt_tokens, answer.output_tokens) == ("twelve chars", 0, 3)
    assert made.take_warnings() == [
        'model "m": the server counts no tokens; they are guessed, at 4 characters each'
    ]
    made.generate(requests(2))
    assert made.take_warnings() == []  # told once


@pytest.mark.parametrize(
    ("options", "taken"),
    [({}, False), ({"max_completion_tokens": 8}, False), ({"max_completion_tokens": 500}, True),
     ({"omit": ["max_tokens"]}, True)],
)  # fmt: skip
def test_an_answer_may_be_as_long_as_was_asked_for(server, options, taken):
    server.reply = lambda path, sent: (200, {}, body_of("a" * 100_000))
    (answer,) = backend(server, request=options).generate(requests(1))
    assert (answer.output is not None) == taken


@pytest.mark.parametrize("number", [10**400, -(10**400), float("nan"), float("-inf"), True, "1", None, {}])
def test_a_log_probability_that_is_none_tells_nothing(server, number):
    likeliest = [{"token": "a", "logprob": number}]
    held = {"content": [{"token": "a", "logprob": number, "top_logprobs": likeliest}]}
    body = body_of("a")
    body["choices"][0]["logprobs"] = held
    server.reply = lambda path, sent: (200, {}, json.dumps(body).encode())
    (answer,) = backend(server).generate(requests(1))
    assert (answer.output, answer.confidence) == ("a", None)
    (weighed,) = backend(server).generate([replace(requests(1)[0], options=("a", "b"))])
    assert weighed.weights is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(-(10**400)),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["choices", "message", "content", "text", "usage", "prompt_tokens", "completion_tokens", "error",
             "finish_reason", "logprobs", "token_logprobs", "logprob", "tool_calls", "code", "type", "param"]
        ),
        inner,
        max_size=5,
    ),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    body=JSON | st.fixed_dictionaries({"choices": st.lists(JSON, max_size=2), "usage": JSON}),
    status=st.sampled_from([200, 400, 429, 500]),
)
def test_no_answer_of_a_server_is_a_traceback(body, status):
    reply = HttpReply(status, {}, json.dumps(body).encode())
    made = OpenAIBackend(
        model_spec(name="m", path="x", backend="openai", base_url="http://h/v1"), batch_size=None
    )
    read: Any = None
    with suppress(ModelError):
        read = made.read(reply, {"temperature": 0})
    if isinstance(read, Generation):
        assert 0 <= read.prompt_tokens <= 10**7
        assert 0 <= read.output_tokens <= 10**7
        assert (read.output is None) == (read.error is not None) == (read.fault is not None)
        assert "\n" not in (read.error or "")


@pytest.mark.parametrize(
    ("headers", "body", "told"),
    [
        ({}, b" " * (17 * 2**20), "the answer has more than 16 MiB"),
        (
            {"Content-Encoding": "gzip"},
            gzip.compress(b" " * (200 * 2**20)),
            "the answer has more than 16 MiB",
        ),
        ({"Content-Encoding": "gzip"}, b"no gzip", "the answer can't be unpacked"),
        ({"Content-Encoding": "br"}, b"x", "the answer is packed in a way that wasn't asked for"),
    ],
)
def test_a_body_has_a_largest_size_packed_or_not(server, headers, body, told):
    server.reply = lambda path, sent: (200, headers, body)
    before = psutil.Process().memory_info().rss
    (answer,) = backend(server).generate(requests(1))
    assert answer.error == f'model "m": {told}; gave up after {ATTEMPTS} attempts'
    assert psutil.Process().memory_info().rss - before < 250 * 2**20


def test_a_packed_answer_is_unpacked(server):
    server.reply = lambda path, sent: (
        200, {"Content-Encoding": "gzip"}, gzip.compress(json.dumps(body_of("packed")).encode())
    )  # fmt: skip
    assert backend(server).generate(requests(1))[0].output == "packed"


def test_a_body_that_trickles_has_a_deadline():
    """One byte every tenth of a second: each is a sign of life, and the whole answer would take minutes."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        over = threading.Event()

        def trickle() -> None:
            while not over.is_set():
                with suppress(OSError):
                    connection, _ = listening.accept()
                    with connection:
                        connection.recv(65536)
                        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n")
                        while not over.wait(0.1):
                            connection.sendall(b" ")

        listening.settimeout(0.2)
        thread = threading.Thread(target=trickle)
        thread.start()
        made = OpenAIBackend(
            model_spec(name="m", path="x", backend="openai", base_url=f"http://127.0.0.1:{listening.getsockname()[1]}/v1",
                      timeout=0.5),
            batch_size=None,
        )  # fmt: skip
        started = time.monotonic()
        try:
            with pytest.raises(ModelUnavailable, match=r"can't be reached \(no whole answer within 0.5 s\)"):
                made.load()
        finally:
            over.set()
            thread.join()
        assert time.monotonic() - started < 5


def test_a_key_that_comes_back_is_not_passed_on(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    made = backend(server, api_key_env="MY_KEY")
    server.reply = lambda path, sent: (200, {}, body_of(f"your key is {KEY}!"))
    assert made.generate(requests(1))[0].output == "your key is [key]!"
    server.reply = lambda path, sent: (400, {}, {"error": {"message": f"bad request by {KEY}"}})
    assert made.generate(requests(1))[0].error == 'model "m": the server refuses it: bad request by [key]'
    for odd in ("two\nlines-of-key", "schlüssel-schlüssel"):
        monkeypatch.setenv("MY_KEY", odd)
        with pytest.raises(ModelError, match="MY_KEY holds characters that no HTTP header takes") as caught:
            backend(server, api_key_env="MY_KEY").load()
        assert odd not in str(caught.value)


# --- options that servers differ in ---


def test_a_server_that_wants_max_completion_tokens_gets_it(server):
    def modern(path: str, sent: dict[str, Any]) -> Reply:
        if "max_tokens" in sent:
            told = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
            return 400, {}, {"error": {"message": told, "param": "max_tokens"}}
        return server.answer(sent)

    server.reply = modern
    answers = backend(server, concurrency=8).generate(requests(20))
    assert [answer.error for answer in answers] == [None] * 20
    assert server.seen[-1][1]["max_completion_tokens"] == 12


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        ({"messages": []}, "must not hold messages: messcli sets it itself"),
        ({"echo": True}, "must not hold echo: messcli sets it itself"),
        (
            {"api_key": "sk-x"},
            "must not hold api_key: files are copied. Name the key's variable in api_key_env",
        ),
        ({"Authorization": "x"}, "must not hold Authorization: files are copied"),
        ({"omit": ["temperature", "messages"]}, "holds omit: nothing can be asked without messages"),
    ],
)
def test_what_messcli_sets_and_keys_have_no_place_in_a_request(request_, told):
    with pytest.raises(BadValue) as caught:
        request_options(request_)
    assert told in str(caught.value)


def test_options_pass_through_and_can_be_left_out(server):
    more = {"max_completion_tokens": 99, "service_tier": "flex", "omit": ["temperature", "logprobs", "seed"]}
    backend(server, request=more).generate(requests(1))
    assert server.seen[-1][1] == {
        "model": "org/model",
        "messages": [{"role": "user", "content": "word"}],
        "max_completion_tokens": 99,
        "service_tier": "flex",
    }


def test_a_server_without_log_probabilities_is_asked_for_none(server):
    def plain(path: str, sent: dict[str, Any]) -> Reply:
        if "logprobs" in sent:
            return 422, {}, {"detail": "Unsupported fields in the request: {'logprobs'}"}
        return server.answer(sent)

    server.reply = plain
    answers = backend(server).generate(requests(3))
    assert [(answer.error, answer.confidence) for answer in answers] == [(None, None)] * 3
    server.reply = lambda path, sent: (
        200, {}, {"choices": [{"text": "x", "logprobs": {"token_logprobs": [-0.5, -1.5]}}], "usage": COUNTED}
    )  # fmt: skip
    (answer,) = backend(server, chat_template=False).generate(requests(1))
    assert server.seen[-1][1]["logprobs"] == 1
    assert answer.confidence == {"mean": -1.0, "least": -1.5, "p10": -1.5, "p50": -1.5, "tokens": 2}


def likeliest(sent: dict[str, Any], known: dict[str, float]) -> Reply:
    """An answer of one token, and the log-probabilities of the likeliest ones as either endpoint sends them."""
    if "prompt" in sent:
        told: dict[str, Any] = {"token_logprobs": [-1.0], "top_logprobs": [known]}
        return 200, {}, {"choices": [{"text": "yes", "logprobs": told}], "usage": COUNTED}
    top = [{"token": token, "logprob": value} for token, value in known.items()]
    told = {"content": [{"token": "yes", "logprob": -1.0, "top_logprobs": top}]}
    return 200, {}, {"choices": [{"message": {"content": "yes"}, "logprobs": told}], "usage": COUNTED}


@pytest.mark.parametrize("chat", [True, False])
def test_options_are_weighed_by_the_likeliest_first_tokens(server, chat):
    known = {"Yes": -1.0, " yes": -2.0, "NO": -3.0, "maybe": -0.1}
    server.reply = lambda path, sent: likeliest(sent, known)
    made = backend(server, chat_template=chat)
    (answer,) = made.generate([Request(id=1, prompt="p", options=("yes", "no"))])
    assert answer.weights == pytest.approx((math.exp(-1) + math.exp(-2), math.exp(-3)))
    sent = server.seen[-1][1]
    assert (sent["max_tokens"], sent["temperature"]) == (1, 0)
    assert sent["top_logprobs" if chat else "logprobs"] == 20
    assert made.generate([Request(id=1, prompt="p")])[0].weights is None
    assert "top_logprobs" not in server.seen[-1][1]


@pytest.mark.parametrize("chat", [True, False])
def test_a_server_that_tells_fewer_likely_tokens_is_asked_for_fewer(server, chat):
    name = "top_logprobs" if chat else "logprobs"

    def few(path: str, sent: dict[str, Any]) -> Reply:
        if int(sent.get(name, 0)) > 5:
            return 400, {}, {"error": {"message": f"Invalid '{name}': at most 5", "param": name}}
        return likeliest(sent, {"yes": -0.5})

    server.reply = few
    made = backend(server, chat_template=chat)
    asked = [Request(id=n, prompt="p", options=("yes", "no")) for n in range(3)]
    assert [answer.weights for answer in made.generate(asked)] == [(pytest.approx(math.exp(-0.5)), 0.0)] * 3
    assert server.seen[-1][1][name] == 5
    assert "logprobs" in made._body  # confidences of ordinary answers go on


def test_a_server_that_tells_no_likely_tokens_is_told_of(server):
    made = backend(server)
    (answer,) = made.generate([Request(id=1, prompt="3", options=("1", "2", "3"))])
    assert (answer.output, answer.weights) == ("3", None)  # a judge's reply is still a text
    assert "sends no log-probabilities of the likeliest tokens" in made.take_warnings()[0]


# --- many under way ---


@pytest.mark.parametrize(("room", "found"), [(1, 32), (48, 64), (100, 128), (256, 256), (5000, 1024)])
def test_the_number_under_way_is_found(room, found):
    """A clock and a queue in place of a server that answers `room` at a time in 0.2 to 0.4 s, first come first."""
    numbers, now = random.Random(1), 0.0
    concurrency = Concurrency(None, clock=lambda: now)
    queued, answering = 0, []
    for _ in range(40_000):
        queued += concurrency.limit - queued - len(answering)
        while queued > 0 and len(answering) < room:
            queued -= 1
            heapq.heappush(answering, now + numbers.uniform(0.2, 0.4))
        now = heapq.heappop(answering)
        concurrency.answered()
    assert concurrency.limit in (found, found // 2)


def test_many_are_under_way_from_one_thread(server):
    full = threading.Event()

    def wait_for_200(path: str, sent: dict[str, Any]) -> Reply:
        if server.at_once == 200:
            full.set()
        assert full.wait(60)
        return server.answer(sent)

    server.reply = wait_for_200
    groups = backend(server, concurrency=200, timeout=90.0).stream(requests(1) * 400)
    next(group for group in groups if group.finished)
    assert len([thread for thread in threading.enumerate() if thread.name == "messcli-http"]) == 1
    assert sum(len(group.finished) for group in groups) > 300
    assert server.most_at_once == 200


def test_a_server_that_is_busy_gets_fewer():
    now = 1.0
    concurrency = Concurrency(64, clock=lambda: now)
    sent, now = now, 2.0
    concurrency.refused(sent)
    assert concurrency.limit == 32
    for _ in range(20):  # those that were under way then say nothing new
        concurrency.refused(sent)
    assert concurrency.limit == 32
    concurrency.refused(2.0)
    assert concurrency.limit == 16
    for _ in range(1000):
        now += 0.001
        concurrency.answered()
    assert concurrency.limit == 16  # what a server refused isn't tried again


def test_a_stream_gives_answers_before_the_last_one_and_ends_when_it_is_closed(server):
    released = threading.Event()

    def slow(path: str, sent: dict[str, Any]) -> Reply:
        if len(sent["messages"][0]["content"]) > 100:
            released.wait(20)
        return server.answer(sent)

    server.reply = slow
    groups = backend(server).stream(requests(30))
    try:
        first = next(group for group in groups if group.finished)  # empty ones come every second
        assert len(first.finished) < 30
        assert {index for index, _ in first.finished} == first.work.keys()
        started = time.monotonic()
        groups.close()
        assert time.monotonic() - started < 2
    finally:
        released.set()


# --- whose joules ---


def zoo(tmp_path: Path, url: str, more: str = "") -> Any:
    file = tmp_path / "zoo.toml"
    file.write_text(
        f'[[models]]\nname = "m"\npath = "x"\nbackend = "openai"\ndevice = "cpu"\nbase_url = "{url}"\n{more}\n'
    )
    return load_zoo(file)


def ask(of: Any, meter: str = "estimate") -> Any:
    live = open_live(Running(meter), of, load_metric("exact"), lambda line: None)
    try:
        groups = live.answers([(request, [0]) for request in requests(3)])
        answers = {position: outcome for group in groups for position, _, outcome in group}
        return [answers[position] for position in range(3)]
    finally:
        live.close()


def test_prices_are_billed_and_labelled(server, tmp_path):
    priced = zoo(tmp_path, server.url, "[models.joules]\nrequest = 1\nprompt_token = 0.5\noutput_token = 2")
    outcomes = ask(priced)
    assert [outcome.joules for outcome in outcomes] == [1 + 0.5 * n + 2 * (n + 1) for n in (1, 2, 3)]
    assert {outcome.meter for outcome in outcomes} == {"stated"}
    failing(server, 99, (400, {}, {"detail": "no"}))
    assert {outcome.joules for outcome in ask(priced)} == {0.0}  # nothing has run


def test_a_server_elsewhere_needs_prices(tmp_path):
    with pytest.raises(
        ZooError, match=r'model "m": its server \(https://h\.example/v1\) runs elsewhere, and nothing'
    ):
        ask(zoo(tmp_path, "https://h.example/v1"))
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(Exception, match=r"c\.json: has format None"):
        ask(zoo(tmp_path, "https://h.example/v1", 'calibration = "c.json"'))


def test_a_server_on_this_host_is_metered_like_any_model(server, tmp_path):
    outcomes = ask(zoo(tmp_path, server.url))
    assert {outcome.meter for outcome in outcomes} == {"estimate"}
    assert sum(outcome.joules for outcome in outcomes) > 0


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (
            'api_key_env = "sk-abc"',
            "api_key_env: must be the name of an environment variable. The key itself",
        ),
        ('base_url = "localhost:8000"', "base_url: must be a URL such as http://localhost:8000/v1"),
        ('base_url = "http://user:pw@h/v1"', "base_url: must be a URL such as"),
        ("joules = { watt = 1 }", "joules: holds watt: known are request, prompt_token, output_token"),
        ("joules = { request = 0 }", "joules: must have a number above 0"),
        ("timeout = 0", "timeout: must be a number of seconds above 0"),
    ],
)
def test_zoo_files_that_cannot_be_meant(tmp_path, more, told):
    lines = {"base_url": 'base_url = "http://localhost:1/v1"'}
    lines[more.split(" ")[0]] = more
    file = tmp_path / "zoo.toml"
    file.write_text('[[models]]\nname = "m"\npath = "x"\nbackend = "openai"\n' + "\n".join(lines.values()))
    with pytest.raises(ZooError) as caught:
        load_zoo(file)
    assert told in str(caught.value)


def test_served_fields_belong_to_served_models(tmp_path):
    file = tmp_path / "zoo.toml"
    file.write_text('[[models]]\nname = "m"\npath = "x"\ntimeout = 3')
    with pytest.raises(ZooError, match=r'timeout: only a model with backend = "openai" has one\. Remove it'):
        load_zoo(file)
    file.write_text('[[models]]\nname = "m"\npath = "x"\nbackend = "openai"')
    with pytest.raises(ZooError, match=r"base_url: missing\. Say where the server is"):
        load_zoo(file)


# --- a real server ---


@pytest.fixture(scope="module")
def serving():
    """`transformers serve` with the bundled zoo's large model."""
    if importlib.util.find_spec("uvicorn") is None or importlib.util.find_spec("fastapi") is None:
        pytest.skip("transformers serve needs fastapi and uvicorn: pip install 'messcli[test]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).parent / "transformers"
    process = subprocess.Popen(
        [program, "serve", LARGE.path, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu",
         "--dtype", "float32"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()  # noqa: S310  # loopback
                break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.2)
        yield f"{url}/v1"
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.slow
def test_transformers_serve_answers_as_the_model_does_here(serving, tmp_path):
    text = BUNDLED_ZOO.read_text()
    served = text.replace(
        'path = "./large"', f'path = "{LARGE.path}"\nbackend = "openai"\nbase_url = "{serving}"'
    )
    served = "\n".join(  # the large model is the last: what is here for its weights goes
        line
        for place, line in enumerate(served.splitlines())
        if place < served[: served.index("base_url")].count("\n") or not line.startswith(("dtype", "threads"))
    )
    for name in ("small", "medium"):
        served = served.replace(f'path = "./{name}"', f'path = "{BUNDLED_ZOO.parent / name}"')
    file = tmp_path / "zoo.toml"
    file.write_text(served)
    asked = [
        Request(id=n, prompt=json.loads(line)["prompt"])
        for n, line in enumerate(SAMPLES.read_text().splitlines()[:12])
    ]
    made = OpenAIBackend(load_zoo(file).models[-1], batch_size=None)
    assert made.generate(asked) == TransformersBackend(LARGE, batch_size=None).generate(asked)
    before = made.cpu_seconds()
    made.generate(asked[:2])
    assert made.cpu_seconds() > before
    made.unload()

    code = "from messcli.cli import main; main(prog_name='messcli')"
    done = subprocess.run(
        [sys.executable, "-c", code, "route", SAMPLES, "-o", tmp_path / "out.jsonl", "--zoo", file, "--limit", "24"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "CPU seconds of this process and its models' servers" in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    assert all(row["joules"] > 0 for row in rows)
    assert "large" in {row["model"] for row in rows}

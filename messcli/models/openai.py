"""A model behind an HTTP server that speaks the OpenAI API: vLLM, llama.cpp, Ollama, `transformers serve`, ...

Knows the two endpoints, chat/completions and completions; loads nothing. Requests go out several at a time
and come back in whatever order: which answer belongs to which request never depends on it.

Whose joules? A server on this host (a loopback base_url) draws on this host's devices, so its calls are
metered like any other; anything else is reckoned from prices (`messcli.models.priced`).
"""

from __future__ import annotations

import email.utils
import hashlib
import ipaddress
import json
import os
import random
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import urllib3

from messcli.errors import ModelError
from messcli.models.backend import InBatches
from messcli.models.processes import ProcessClock, listeners
from messcli.records import Generation, Request
from messcli.zoo import ModelSpec

ATTEMPTS = 6
_FIRST_PAUSE_SECONDS = 0.5  # doubled with each attempt, and jittered
_LONGEST_PAUSE_SECONDS = 30.0
_PATIENCE_SECONDS = 120.0  # a server that asks for more by Retry-After is told to the user instead
_CONNECT_SECONDS = 10.0
_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_THIS_REQUEST = frozenset({400, 413, 422})  # the server took offence at the prompt, or at its length
_CHARACTERS_PER_TOKEN = 4

# name in [models.generation] -> name in the request's body. The second group is understood by vLLM, llama.cpp
# and others, and isn't OpenAI's.
_OPTIONS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "stop_strings": "stop",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "logit_bias": "logit_bias",
    "reasoning_effort": "reasoning_effort",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "min_new_tokens": "min_tokens",
}
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")


class OpenAIBackend(InBatches):
    """One model of a server. See `messcli.models.backend.Backend` for the protocol.

    Args:
        batch_size: requests per call of the meter; None: the whole share of a window. How many are under way
            at a time is spec.concurrency.
        sleep, jitter: for the pauses between attempts; jitter is drawn from [0, 1).
    """

    occupies_memory = False

    def __init__(
        self,
        spec: ModelSpec,
        *,
        batch_size: int | None,
        sleep: Callable[[float], None] = time.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.spec = spec
        self._batch_size = batch_size if batch_size is not None else spec.batch_size
        self._sleep = sleep
        self._jitter = jitter
        self._url = (spec.base_url or "").rstrip("/")
        self._body = self._options()
        self._pool: urllib3.PoolManager | None = None
        self._clock: ProcessClock | None = None

    # --- the server ---

    @property
    def devices(self) -> tuple[str, ...]:
        """What the server computes on, as zoo.toml says: nothing here can tell."""
        return (self.spec.device,)

    @property
    def local(self) -> bool:
        """Whether the server runs on this host. A tunnel looks as if it did: give such a model prices."""
        host = urllib.parse.urlsplit(self._url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost" or host.endswith(".localhost")

    @property
    def loaded(self) -> bool:
        return self._pool is not None

    def load(self) -> None:
        """Make sure that the server is there and takes the key. Raises ModelError with the cure."""
        if self._pool is not None:
            return
        self._pool = self._open()
        try:
            status, _, body = self._send("GET", "/models", None)
        except urllib3.exceptions.HTTPError as error:
            self._pool = None
            raise self._unreachable(error) from error
        if status in (401, 403):
            self._pool = None
            raise self._refused(status, body)

    def unload(self) -> None:
        """Close the connections; the server keeps what it has loaded."""
        if self._pool is not None:
            self._pool.clear()
            self._pool = None

    def cpu_seconds(self) -> float:
        """CPU seconds of the server on this host. Raises MeterError where its process can't be seen."""
        if not self.local:
            return 0.0
        if self._clock is None:
            parts = urllib.parse.urlsplit(self._url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
            self._clock = ProcessClock(lambda: listeners(port, f'model "{self.spec.name}" ({self._url})'))
        return self._clock.seconds()

    def _open(self) -> urllib3.PoolManager:
        options: dict[str, Any] = {"maxsize": self.spec.concurrency, "block": True, "retries": False}
        options["timeout"] = urllib3.Timeout(connect=_CONNECT_SECONDS, read=self.spec.timeout)
        parts = urllib.parse.urlsplit(self._url)
        proxy = urllib.request.getproxies().get(parts.scheme)
        if proxy and not self.local and not urllib.request.proxy_bypass(parts.hostname or ""):
            return urllib3.ProxyManager(proxy, **options)
        return urllib3.PoolManager(**options)

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.spec.api_key_env is not None:
            key = os.environ.get(self.spec.api_key_env, "").strip()
            if not key:
                raise self._error(
                    f"the environment has no {self.spec.api_key_env}", "Set it to the server's API key"
                )
            headers["Authorization"] = f"Bearer {key}"
        return headers

    # --- prompts ---

    @property
    def context_length(self) -> int | None:
        """max_prompt_tokens of zoo.toml: a server does not say, and refuses what is too long."""
        return self.spec.max_prompt_tokens

    def prompt_tokens(self, request: Request) -> int:
        """A guess at 4 characters per token: the tokenizer is the server's. `usage` tells the true count."""
        return -(-len(self.spec.fill_template(request.prompt)) // _CHARACTERS_PER_TOKEN)

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        """All at once: the server makes its own batches."""
        size = self._batch_size or max(1, len(requests))
        return [list(range(at, min(at + size, len(requests)))) for at in range(0, len(requests), size)]

    def _endpoint(self, request: Request) -> tuple[str, dict[str, Any]]:
        """Path and prompt of the body. Without a word in zoo.toml, a chat where `transformers` would have one."""
        spec = self.spec
        as_chat = spec.chat_template
        if as_chat is None:
            as_chat = request.messages is not None or spec.prompt_template is None
        if not as_chat:
            text = spec.fill_template(request.prompt)
            return "/completions", {
                "prompt": f"{spec.system_prompt}\n\n{text}" if spec.system_prompt else text
            }
        if request.messages is not None:
            chat = [dict(turn) for turn in request.messages]
        else:
            chat = [{"role": "user", "content": spec.fill_template(request.prompt)}]
        if spec.system_prompt and not any(turn.get("role") == "system" for turn in chat):
            chat.insert(0, {"role": "system", "content": spec.system_prompt})
        body: dict[str, Any] = {"messages": chat}
        if spec.chat_options:
            body["chat_template_kwargs"] = dict(spec.chat_options)
        return "/chat/completions", body

    def _options(self) -> dict[str, Any]:
        """The body's options that every request shares; greedy unless zoo.toml says do_sample."""
        options = dict(self.spec.generation)
        sampling = options.pop("do_sample", False)
        useless = [key for key in _SAMPLING if options.get(key)]
        if useless and not sampling:
            raise self._error(
                f"generation.{useless[0]} has no effect without sampling",
                "Add do_sample = true to [models.generation], or remove it",
            )
        body: dict[str, Any] = {"model": self.spec.path, "max_tokens": self.spec.max_new_tokens}
        for name, value in options.items():
            if name not in _OPTIONS:
                raise self._error(
                    f"generation.{name}: a server of the OpenAI API has no such option",
                    f"Known are do_sample, {', '.join(_OPTIONS)}",
                )
            body[_OPTIONS[name]] = value
        if not sampling:
            body["temperature"] = 0
        return body

    # --- answering ---

    def generate(self, batch: Sequence[Request]) -> list[Generation]:
        """Answer `batch`, in order.

        A prompt that the server refuses, and one that it fails to answer in `ATTEMPTS` attempts, is that
        request's error. Raises ModelError where the server can't be reached, refuses the key, doesn't know
        the model or doesn't speak the API.
        """
        self.load()
        if not batch:
            return []
        with ThreadPoolExecutor(min(len(batch), self.spec.concurrency), "messcli-openai") as pool:
            futures = [pool.submit(self._answer, request) for request in batch]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _answer(self, request: Request) -> Generation:
        path, body = self._endpoint(request)
        body.update(self._body)
        if body.get("temperature", 1) != 0:
            digest = hashlib.blake2b(request.key or str(request.id).encode("utf-8", "replace"), digest_size=4)
            body["seed"] = int.from_bytes(digest.digest(), "big") >> 1
        for attempt in range(ATTEMPTS):
            final = attempt + 1 == ATTEMPTS
            asked: float | None = None
            try:
                status, headers, data = self._send("POST", path, body)
            except urllib3.exceptions.ReadTimeoutError:
                trouble = f"no answer within {self.spec.timeout:g} s"
            except urllib3.exceptions.HTTPError as error:
                if final and isinstance(error, urllib3.exceptions.NewConnectionError):
                    raise self._unreachable(error) from error
                trouble = f"the connection failed ({type(error).__name__})"
            else:
                if status == 200:
                    return self._parse(data)
                if status not in _AGAIN:
                    return self._refusal(status, data)
                trouble = f"HTTP {status}: {_message(data)}"
                asked = _retry_after(headers)
            if asked is not None and asked > _PATIENCE_SECONDS:
                raise self._error(
                    f"the server asks to wait for {asked:.0f} s ({trouble})",
                    "Run the same command again then",
                )
            if not final:
                self._sleep(self._pause(attempt) if asked is None else asked)
        return Generation(
            None, 0, 0, error=f'model "{self.spec.name}": {trouble}; gave up after {ATTEMPTS} attempts'
        )

    def _pause(self, attempt: int) -> float:
        longest = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2.0**attempt)
        return longest * (0.5 + 0.5 * self._jitter())

    def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> tuple[int, Mapping[str, str], bytes]:
        if self._pool is None:
            self._pool = self._open()
        data = None if body is None else json.dumps(body).encode()
        # a redirect could carry the key to another host, and a POST must not be turned into a GET
        answer = self._pool.request(
            method, self._url + path, body=data, headers=self._headers(), redirect=False
        )
        return answer.status, answer.headers, answer.data

    def _parse(self, data: bytes) -> Generation:
        try:
            document = json.loads(data)
            choice = document["choices"][0]
            text = choice["message"]["content"] if "message" in choice else choice["text"]
            usage = document["usage"]
            prompt, output = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise self._error(
                f"the server's answer lacks choices or usage ({type(error).__name__}: {error})",
                "Check that base_url ends where /chat/completions begins (often in /v1)",
            ) from error
        # a chat whose answer is empty, or all reasoning, has content null
        return Generation((text or "").strip(), prompt, output)

    def _refusal(self, status: int, data: bytes) -> Generation:
        """An answer that won't get better by asking again."""
        if status in _THIS_REQUEST:
            return Generation(
                None, 0, 0, error=f'model "{self.spec.name}": the server refuses it: {_message(data)}'
            )
        raise self._refused(status, data)

    # --- errors ---

    def _refused(self, status: int, data: bytes) -> ModelError:
        if status in (401, 403):
            cure = (
                "Set api_key_env in zoo.toml to the name of the variable that holds the key"
                if self.spec.api_key_env is None
                else f"Correct the key in {self.spec.api_key_env}"
            )
        elif status == 404:
            cure = "Correct path, the model's name on the server, or base_url, which often ends in /v1"
        else:
            cure = "Check base_url and the server's log"
        return self._error(f"HTTP {status}: {_message(data)}", cure)

    def _unreachable(self, error: urllib3.exceptions.HTTPError) -> ModelError:
        return self._error(
            f"the server can't be reached ({type(error).__name__})",
            "Start it, or correct base_url in zoo.toml",
        )

    def _error(self, what: str, cure: str) -> ModelError:
        return ModelError(f'model "{self.spec.name}" ({self._url}): {what.rstrip(".")}. {cure}')


def _message(data: bytes) -> str:
    """What a server says is wrong, in one line. The forms are OpenAI's, FastAPI's and plain text."""
    text = data.decode("utf-8", "replace")
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    if isinstance(document, dict):
        error = document.get("error", document.get("detail", document.get("message", text)))
        text = str(error.get("message", text) if isinstance(error, dict) else error)
    line = " ".join(text.split())
    return (line if len(line) <= 200 else line[:197] + "...") or "no reason given"


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait: a number, or a date (RFC 9110, 10.2.3)."""
    value = headers.get("Retry-After", "").strip()
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None

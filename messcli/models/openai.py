"""A model behind an HTTP server that speaks the OpenAI API: vLLM, llama.cpp, Ollama, `transformers serve`, ...

Knows the two endpoints, chat/completions and completions; loads nothing. Hundreds of requests are under way and
come back in whatever order: which answer belongs to which request never depends on it.

What a server sends is data. Counts and numbers are checked, and one odd answer is that answer's trouble: only a
server that isn't there, refuses the key or knows no such model ends the run.

Whose joules? A server on this host (a loopback base_url) draws on this host's devices, so its calls are
metered like any other; anything else is reckoned from prices (`messcli.models.priced`).
"""

from __future__ import annotations

import asyncio
import email.utils
import ipaddress
import json
import math
import os
import random
import re
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

from messcli.amounts import finite
from messcli.errors import ModelError, ModelUnavailable, shown
from messcli.models.backend import Group, confidence_of, group_of, seed_of
from messcli.models.client import Client, Concurrency, NoReply, Reply
from messcli.models.processes import ProcessClock, listeners
from messcli.records import Fault, Generation, Request
from messcli.zoo import ModelSpec, ServerOptions

ATTEMPTS = 6
_FIRST_PAUSE_SECONDS = 0.5  # doubled with each attempt, and jittered
_LONGEST_PAUSE_SECONDS = 30.0
_PATIENCE_SECONDS = 120.0  # a server that asks for more by Retry-After is told to the user instead
_AGAIN = frozenset({408, 409, 425, 429})  # and what a server or a gateway says of itself: 500 to 599
_NEVER = frozenset({501, 505})  # not this server
_BUSY = frozenset({429, 503, 529})
_NO_CREDIT = 402
_KEY = frozenset({401, 403})  # that no request gets past
# ... but what gateways say with 403 to a single prompt
_FLAGGED = re.compile(r"\bflagged\b|\bmoderat|\bcontent.(?:policy|filter)|\bsafety\b", re.IGNORECASE)
_THIS_REQUEST = frozenset({400, 413, 422, 451})  # the server took offence at the prompt, or at its length
_CHARACTERS_PER_TOKEN = 4
_SHORTEST_KEY = 8  # characters; a shorter one would be found in ordinary text
_MOST_TOKENS = 10**7  # a count above it is no count
# Characters of an answer: a token of blanks can have a hundred, and some servers overrun max_new_tokens
_LONGEST_TOKEN, _ALWAYS_TAKEN = 256, 2**16
_TOO_LONG = re.compile(r"context (size|length|window)|too many tokens", re.IGNORECASE)
_FINISHES = {
    "stop": "stop",
    "length": "length",
    "content_filter": "filtered",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
}

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
_LIKELIEST = (20, 5)  # top_logprobs: OpenAI's limit, and the least that servers take
_REASONING = (
    "reasoning_content",
    "reasoning",
    "thinking",
    "reasoning_details",
)  # of vLLM, OpenRouter, Ollama
_THOUGHT = ("thinking", "reasoning")  # types of a content's parts
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
OMIT = "omit"  # in [models.request]: names of options that aren't sent


class OpenAIBackend:
    """One model of a server. See `messcli.models.backend.Backend` for the protocol.

    Args:
        batch_size: the requests under way, where self._own.concurrency doesn't say; None: found by doubling.
        sleep, jitter: for the pauses between attempts; jitter is drawn from [0, 1).
    """

    occupies_memory = False

    def __init__(
        self,
        spec: ModelSpec,
        *,
        batch_size: int | None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.spec = spec
        self._own = spec.own(ServerOptions)
        self._sleep = sleep
        self._jitter = jitter
        self._url = (self._own.base_url or "").rstrip("/")
        self._body = self._options()
        self.concurrency = Concurrency(self._own.concurrency or batch_size or spec.batch_size)
        self._client: Client | None = None
        self._clock: ProcessClock | None = None
        self._draining = False
        self._likeliest = _LIKELIEST[
            0
        ]  # tokens whose log-probabilities are asked for where options are weighed
        self._answered = False  # with something that was an answer
        self._warnings: dict[str, None] = {}  # in the order in which they came
        self._told: set[str] = set()

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
        return self._client is not None

    def load(self) -> None:
        """Make sure that the server is there and takes the key. Raises ModelError with the cure."""
        if self._client is not None:
            return
        headers = self._headers()
        client = Client(self._url, self._own.timeout, proxies=not self.local)
        try:
            reply = client.wait(client.send("GET", "/models", headers))
            if reply.status in (401, 403):
                raise self._refused(reply)
        except NoReply as error:
            client.close()
            raise self._unreachable(error) from None
        except BaseException:
            client.close()
            raise
        self._client = client

    def unload(self) -> None:
        """Close the connections; the server keeps what it has loaded."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def suspend(self) -> None:
        self.unload()

    def resume(self) -> None:
        self.load()

    def take_warnings(self) -> list[str]:
        """What the user should know of since last taken, one line each and each once."""
        taken, self._warnings = list(self._warnings), {}
        return taken

    def _warn(self, what: str) -> None:
        if what not in self._told:
            self._told.add(what)
            self._warnings[f'model "{self.spec.name}": {what}'] = None

    def cpu_seconds(self) -> float:
        """CPU seconds of the server on this host. Raises MeterError where its process can't be seen."""
        if not self.local:
            return 0.0
        if self._clock is None:
            parts = urllib.parse.urlsplit(self._url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
            self._clock = ProcessClock(lambda: listeners(port, f'model "{self.spec.name}" ({self._url})'))
        return self._clock.seconds()

    def _headers(self) -> dict[str, str]:
        headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            "Accept-Encoding": "identity",
        }
        if self._own.api_key_env is not None:
            key = os.environ.get(self._own.api_key_env, "").strip()
            if not key:
                raise self._error(
                    f"the environment has no {self._own.api_key_env}", "Set it to the server's API key"
                )
            if not (key.isascii() and key.isprintable()):
                raise self._error(
                    f"{self._own.api_key_env} holds characters that no HTTP header takes", "Correct the key"
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
        return [list(range(len(requests)))] if requests else []

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
                    f"Known are do_sample, {', '.join(_OPTIONS)}; what else a server takes goes to "
                    "[models.request]",
                )
            body[_OPTIONS[name]] = value
        if not sampling:
            body["temperature"] = 0
        body["logprobs"] = True
        extra = dict(self._own.request)
        if "max_completion_tokens" in extra:
            del body["max_tokens"]
        omitted = extra.pop(OMIT, ())
        body.update(extra)
        for name in omitted:
            body.pop(name, None)
        return body

    # --- answering ---

    def stream(self, requests: Sequence[Request]) -> Iterator[Group]:
        """See `messcli.models.backend.Backend`. A group's work is that of the answers that it holds.

        A prompt that the server refuses, and one that it fails to answer in `ATTEMPTS` attempts, is that
        request's error. Raises ModelError where the server refuses the key, doesn't know the model or doesn't
        speak the API, and ModelUnavailable where it can't be reached or the quota is used up.
        """
        if not requests:
            return
        self.load()
        self._draining = False
        assert self._client is not None  # noqa: S101  # load has made it

        headers = self._headers()  # kept nowhere, for they hold the key

        async def ask(index: int) -> Generation:
            return await self._answer(requests[index], headers)

        answers = self._client.stream(len(requests), ask, self.concurrency, lambda: self._draining)
        for group in answers:
            yield group_of(dict(group))

    def drain(self) -> None:
        """See `messcli.models.backend.Draining`."""
        self._draining = True

    def generate(self, batch: Sequence[Request]) -> list[Generation]:
        """Answer `batch`, in order, as `stream` does."""
        answers = {index: answer for group in self.stream(batch) for index, answer in group.finished}
        return [answers[index] for index in range(len(batch))]

    async def _answer(self, request: Request, headers: Mapping[str, str]) -> Generation:
        """Ask until there is an answer, or no more is to be hoped for."""
        path, prompt = self._endpoint(request)
        for attempt in range(ATTEMPTS):
            asked: float | None = None
            fault: Fault = "model"
            sent = time.monotonic()
            body = {**prompt, **self._body_for(path, request)}
            try:
                reply = await self._send(path, headers, body)
            except NoReply as error:
                if error.unreachable and attempt + 1 == ATTEMPTS:
                    raise self._unreachable(error) from None
                trouble = str(error)
            else:
                read = self.read(reply, body, request.options)
                if isinstance(read, Generation):
                    self.concurrency.answered()
                    return read
                if read is None:  # an option was changed: the same once more
                    continue
                trouble = read
                if reply.status in _BUSY:
                    fault = "away"  # it says nothing of this request
                    self.concurrency.refused(sent)
                asked = _retry_after(reply.headers)
            if asked is not None and asked > _PATIENCE_SECONDS:
                raise self._error(
                    f"the server asks to wait for {asked:.0f} s ({trouble})",
                    "Run the same command again then",
                    ModelUnavailable,
                )
            if attempt + 1 < ATTEMPTS:
                await self._sleep(self._pause(attempt) if asked is None else asked)
        return self._failed(f"{trouble}; gave up after {ATTEMPTS} attempts", fault)

    def _pause(self, attempt: int) -> float:
        longest = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2.0**attempt)
        return longest * (0.5 + 0.5 * self._jitter())

    async def _send(self, path: str, headers: Mapping[str, str], body: Mapping[str, Any]) -> Reply:
        if self._client is None:
            raise NoReply("the connection was closed")
        return await self._client.send("POST", path, headers, json.dumps(body).encode())

    def _body_for(self, path: str, request: Request) -> dict[str, Any]:
        body = dict(self._body)
        if body.get("logprobs") is True and path == "/completions":
            body["logprobs"] = 1  # there a number: of the likeliest tokens
        if request.options:
            self._ask_options(body, path, request.options)
        if body.get("temperature", 1) != 0 and "seed" not in self._own.request.get(OMIT, ()):
            body.setdefault("seed", seed_of(request))
        return body

    def _ask_options(self, body: dict[str, Any], path: str, options: Sequence[str]) -> None:
        """Ask for one token, and the log-probabilities of the likeliest ones; digits of a score may be a token each."""
        limit = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
        numbers = [option for option in options if option.isdigit()]
        body[limit] = max(map(len, numbers), default=1)
        body["temperature"] = 0
        body.pop("stop", None)
        if "logprobs" not in body or not self._likeliest:
            return
        if path == "/completions":
            body["logprobs"] = self._likeliest
        else:
            body["top_logprobs"] = self._likeliest

    # --- reading an answer ---

    def read(
        self, reply: Reply, sent: Mapping[str, Any], options: Sequence[str] = ()
    ) -> Generation | str | None:
        """The answer; or why it must be asked for again, None: at once, with other options. Raises ModelError."""
        document = _document(reply.body)
        if reply.status == 200 and isinstance(document, dict) and not document.get("error"):
            self._answered = True
            return self._parsed(document, options)
        message = self._message(document, reply.body)
        code = _error_code(document)
        if code in ("insufficient_quota", "billing_hard_limit_reached") or reply.status == _NO_CREDIT:
            raise self._error(
                f"the account's quota is used up ({message})",
                "Raise it, and run the same command again to go on",
                ModelUnavailable,
            )
        if reply.status == 200 and not isinstance(document, dict):
            if self._answered:
                return "the answer is no JSON"
            raise self._error(
                f"the server's answer is no JSON ({message})",
                "Check that base_url ends where /chat/completions begins (often in /v1)",
            )
        if reply.status == 200:  # an error in the place of an answer
            self._answered = True
            if code in ("429", "rate_limit_exceeded") or "rate limit" in message.lower():
                return message
            return self._failed(f"answered with an error: {message}", "model")
        if _TOO_LONG.search(message) and reply.status != 429:
            return self._failed(f"the server refuses it: {message}", "request")
        if reply.status in _AGAIN or (500 <= reply.status < 600 and reply.status not in _NEVER):
            return f"HTTP {reply.status}: {message}"
        if reply.status in _THIS_REQUEST:
            if (option := self._refused_option(document, message, sent)) is not None:
                if self._do_without(option, message, sent):
                    return None
                raise self._error(
                    f"the server refuses the option {option}: {message}",
                    f'Set it in [models.request], or leave it out by {OMIT} = ["{option}"] there',
                )
            return self._failed(f"the server refuses it: {message}", "request")
        if reply.status == 403 and _FLAGGED.search(message):
            return self._failed(f"the server refuses it: {message}", "request")
        if self._answered and reply.status not in _KEY:  # others were answered: this is one odd answer
            return self._failed(f"HTTP {reply.status}: {message}", "model")
        raise self._refused(reply)

    def _parsed(self, document: Mapping[str, Any], options: Sequence[str] = ()) -> Generation:
        choices = document.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        usage = document.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        prompt, output = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
        if not isinstance(choice, dict):
            return self._failed("the answer holds no choices", "model", prompt or 0, output or 0)
        message = choice.get("message")
        message = message if isinstance(message, dict) else {}
        text = _text(message["content"] if message.get("content") is not None else choice.get("text"))
        reason = choice.get("finish_reason")
        finish = _FINISHES.get(reason) if isinstance(reason, str) else None
        reasoning = _reasoning(message)
        if output is None:
            self._warn("the server counts no tokens; they are guessed, at 4 characters each")
            written = f"{text or ''}{reasoning}"
            output = -(-len(written) // _CHARACTERS_PER_TOKEN)
        prompt = prompt or 0
        longest = self._longest
        if len(text or "") > longest or len(reasoning) > longest:  # a window of such would fill the memory
            why = f"the answer has more than {longest:,.0f} characters, too many for the tokens it may have"
            return self._failed(why, "model", prompt, output, finish)
        weights = _weights(choice, options) if options else None
        if options and weights is None:
            self._warn(
                "the server sends no log-probabilities of the likeliest tokens (top_logprobs): it can't check answers, "
                "and as a judge its reply is read as text"
            )
        if not text and weights is None:
            if finish == "filtered":
                return self._failed("the server's filter took the answer", "request", prompt, output, finish)
            if message.get("tool_calls") or message.get("function_call"):
                return self._failed(
                    "answered with a tool call and no text", "model", prompt, output, "tool_calls"
                )
            if finish == "length" and (reasoning or text is None):
                return self._failed(
                    "the answer was cut off before its text began. Raise max_new_tokens",
                    "model", prompt, output, finish,
                )  # fmt: skip
            if reasoning:
                return self._failed("answered with reasoning only", "model", prompt, output, finish)
            if (refusal := _refusal(message)) is not None:
                why = f"it refuses to answer: {shown(self._without_key(refusal))}"
                return self._failed(why, "request", prompt, output, finish)
            if text is None:
                return self._failed("the answer holds no text", "model", prompt, output, finish)
        text = self._without_key(text or "")
        for stop in _listed(self._body.get("stop")):
            head, found, _ = text.partition(stop)
            text, finish = (head, "stop") if found else (text, finish)
        return Generation(
            text.strip(),
            prompt,
            output,
            finish=finish,
            confidence=confidence_of(_log_probabilities(choice)),
            weights=weights,
            reasoning=self._without_key(reasoning).strip() or None,
        )

    @property
    def _longest(self) -> float:
        """Characters that an answer or its reasoning may have; inf where no limit of tokens is sent."""
        tokens = finite(self._body.get("max_completion_tokens", self._body.get("max_tokens")))
        return math.inf if tokens is None else max(_ALWAYS_TAKEN, _LONGEST_TOKEN * tokens)

    def _failed(
        self, why: str, fault: Fault, prompt: int = 0, output: int = 0, finish: str | None = None
    ) -> Generation:
        return Generation(
            None, prompt, output, error=f'model "{self.spec.name}": {why}', fault=fault, finish=finish
        )

    @staticmethod
    def _refused_option(document: Any, message: str, sent: Mapping[str, Any]) -> str | None:
        """Which option of ours a refusal names: in `param`, as OpenAI does, or in quotes."""
        error = document.get("error") if isinstance(document, dict) else None
        named = error.get("param") if isinstance(error, dict) else None
        candidates = [named, *re.findall(r"['\"`](\w{1,40})['\"`]", message)]
        if re.search(r"unsupported|unexpected|unrecognized|unknown|not (supported|permitted)", message, re.I):
            candidates += re.findall(r"\w{1,40}", message)
        own = sent.keys() - {"model", "messages", "prompt"}
        return next((name for name in candidates if isinstance(name, str) and name in own), None)

    def _do_without(self, option: str, message: str, sent: Mapping[str, Any]) -> bool:
        """Whether the server can be asked the same in another way."""
        if option == "max_tokens" and "max_completion_tokens" in message:
            if "max_tokens" in self._body:
                self._body["max_completion_tokens"] = self._body.pop("max_tokens")
            return True
        weighing = option == "top_logprobs" or (option == "logprobs" and sent["logprobs"] not in (True, 1))
        if weighing and option not in self._own.request:
            fewer = [number for number in _LIKELIEST if number < int(sent[option])]
            self._likeliest = min(
                self._likeliest, fewer[0] if fewer else 0
            )  # several may be refused at a time
            return True
        if option == "logprobs" and "logprobs" not in self._own.request:
            self._body.pop("logprobs", None)
            return True
        return False

    # --- errors ---

    def _refused(self, reply: Reply) -> ModelError:
        if reply.status in (401, 403):
            cure = (
                "Set api_key_env in zoo.toml to the name of the variable that holds the key"
                if self._own.api_key_env is None
                else f"Correct the key in {self._own.api_key_env}"
            )
        elif reply.status == 404:
            cure = "Correct path, the model's name on the server, or base_url, which often ends in /v1"
        else:
            cure = "Check base_url and the server's log"
        message = self._message(_document(reply.body), reply.body)
        return self._error(f"HTTP {reply.status}: {message}", cure)

    def _unreachable(self, error: NoReply) -> ModelError:
        return self._error(
            f"the server can't be reached ({error})",
            "Start it, or correct base_url in zoo.toml",
            ModelUnavailable,
        )

    def _error(self, what: str, cure: str, kind: type[ModelError] = ModelError) -> ModelError:
        return kind(f'model "{self.spec.name}" ({self._url}): {what.rstrip(".")}. {cure}')

    def _message(self, document: Any, body: bytes) -> str:
        """What a server says is wrong, in one line. The forms are OpenAI's, FastAPI's and plain text."""
        text = body[:10_000].decode("utf-8", "replace")
        if isinstance(document, dict):
            error = document.get("error") or document.get("detail") or document.get("message") or text
            text = str(error.get("message") or text) if isinstance(error, dict) else str(error)
        line = "".join(c if c.isprintable() else " " for c in self._without_key(text[:10_000]))
        line = " ".join(line.split())
        return (line if len(line) <= 200 else line[:197] + "...") or "no reason given"

    def _without_key(self, text: str) -> str:
        """`text` with the key taken out, should a server send it back."""
        key = os.environ.get(self._own.api_key_env or "", "").strip()
        return text.replace(key, "[key]") if len(key) >= _SHORTEST_KEY else text


def _document(body: bytes) -> Any:
    """What JSON a body is; None where it is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _error_code(document: Any) -> str | None:
    error = document.get("error") if isinstance(document, dict) else None
    code = (error.get("code") or error.get("type")) if isinstance(error, dict) else None
    return str(code)[:100] if isinstance(code, (str, int)) else None


def _count(value: object) -> int | None:
    """A number of tokens, however it is written; None where it can't be one."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 8:
        value = int(value)
    number = finite(value)
    if number is None or not 0 <= number <= _MOST_TOKENS or not number.is_integer():
        return None
    return int(number)


def _text(content: object) -> str | None:
    """The text of an answer's content: a string, or its parts of type text."""
    if isinstance(content, str):
        return content.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair is no text
    if isinstance(content, list):
        kept = [part for part in content if isinstance(part, dict) and part.get("type") not in _THOUGHT]
        texts = [part["text"] for part in kept if isinstance(part.get("text"), str)]
        return _text("".join(texts)) if texts else None
    return None


def _reasoning(message: Mapping[str, Any]) -> str:
    """What a server sends of a model's reasoning, beside the content or in a part of it; "" where it sends none."""
    beside = next((message[name] for name in _REASONING if message.get(name)), None)
    parts = [part for part in _list(message.get("content")) if isinstance(part, dict)]
    inside = [part.get("thinking") or part.get("text") for part in parts if part.get("type") in _THOUGHT]
    return "".join(_text(found) or "" for found in (beside, *inside))


def _refusal(message: Mapping[str, Any]) -> str | None:
    """Why a model says that it won't answer, as OpenAI's do; None where it doesn't say so."""
    parts = [part for part in _list(message.get("content")) if isinstance(part, dict)]
    found = (part.get("refusal") for part in (message, *parts))
    return next((one for one in found if isinstance(one, str) and one), None)


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _listed(value: object) -> list[str]:
    values = [value] if isinstance(value, str) else _list(value)
    return [item for item in values if isinstance(item, str) and item]


def _log_probabilities(choice: Mapping[str, Any]) -> list[float]:
    """Of an answer's tokens, from either endpoint; [] where the server sends none, or what can't be any."""
    held = choice.get("logprobs")
    if not isinstance(held, dict):
        return []
    content = held.get("content")
    if isinstance(content, list):
        values = [token.get("logprob") if isinstance(token, dict) else None for token in content]
    else:
        values = _list(held.get("token_logprobs"))
    known = [number for value in values if (number := finite(value)) is not None]
    return known if len(known) == len(values) and all(-1e5 < value <= 1e-3 for value in known) else []


def _weights(choice: Mapping[str, Any], options: Sequence[str]) -> tuple[float, ...] | None:
    """How likely each of `options` is as the answer's first token, however it is spelled; None where nothing tells.

    One that isn't among the likeliest tokens counts 0.
    """
    held = choice.get("logprobs")
    content = held.get("content") if isinstance(held, dict) else None
    first: object = content[0] if isinstance(content, list) and content else None
    pairs: list[tuple[object, object]] = []
    if isinstance(first, dict):  # of a chat
        pairs = [
            (one.get("token"), one.get("logprob"))
            for one in _list(first.get("top_logprobs"))
            if isinstance(one, dict)
        ]
    elif isinstance(held, dict):  # of a completion
        likeliest = _list(held.get("top_logprobs"))
        pairs = list(likeliest[0].items()) if likeliest and isinstance(likeliest[0], dict) else []
    known: dict[str, float] = dict.fromkeys(map(str.lower, options), 0.0)
    for token, value in pairs:
        spelled = token.strip().lower() if isinstance(token, str) else ""
        number = finite(value)
        if spelled in known and number is not None and number <= 1e-3:
            known[spelled] += math.exp(number)
    return tuple(known[option.lower()] for option in options) if any(known.values()) else None


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait: a number, or a date (RFC 9110, 10.2.3)."""
    for name, unit in (("retry-after-ms", 1e-3), ("Retry-After", 1.0)):
        value = headers.get(name, "").strip()
        try:
            seconds = float(value) * unit
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
            except (ValueError, OverflowError):
                continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None

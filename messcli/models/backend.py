"""What runs a model: the Backend protocol.

A backend knows one model. It knows nothing of metrics or routing, and of energy only where its model's
work isn't done in this process: it plans batches, answers them, and says how long a prompt is to its model.
"""

from __future__ import annotations

import gc
import hashlib
import math
import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

from messcli.errors import ZooError
from messcli.records import Generation, Request
from messcli.registry import BACKENDS
from messcli.zoo import ModelSpec


@dataclass(frozen=True, slots=True)
class Group:
    """Answers that are ready, and what the device has worked on since the group before.

    A device's joules between two groups are split over `work`: it names every request that ran meanwhile,
    finished or not. A request's numbers add up to its prompt's and its answer's tokens over all groups.
    """

    finished: Sequence[tuple[int, Generation]]  # index into the requests, answer
    work: Mapping[int, tuple[int, int]]  # index -> (prompt tokens read, output tokens written)


class Backend(Protocol):
    """One model. Construction is cheap; `load` does the work and may be called again after `unload`."""

    spec: ModelSpec

    @property
    def occupies_memory(self) -> bool:
        """Whether `load` takes memory of this machine, so that --max-loaded counts it."""
        ...

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices whose energy this model's calls are billed for, such as ("cuda:0",) or ("cpu",)."""
        ...

    @property
    def loaded(self) -> bool:
        """Whether it can answer without loading."""
        ...

    def load(self) -> None:
        """Load weights and tokenizer. Raises ModelError naming model, path and cure."""
        ...

    def unload(self) -> None:
        """Give the memory back."""
        ...

    def suspend(self) -> None:
        """Give the device's memory back in the way that `resume` undoes fastest. `loaded` is then False."""
        ...

    def resume(self) -> None:
        """Be loaded again after `suspend`; `load` does the same. Raises what `load` raises."""
        ...

    def prompt_tokens(self, request: Request) -> int:
        """Length of the rendered prompt in this model's tokens (the tokenizer loads on first use)."""
        ...

    @property
    def context_length(self) -> int | None:
        """The most prompt tokens that leave room for an answer; None where the model states no limit."""
        ...

    def stream(self, requests: Sequence[Request]) -> Iterator[Group]:
        """Answer a model's whole share of a window, in whatever order keeps the device full.

        Groups come as answers do: about once a second or every 64 answers, a batch at a time where a model
        runs batches. Each request finishes once. Every device has finished with a group's work when it is
        yielded, so that a meter can be read. Closing the iterator ends within seconds what still runs.
        Loads the model if need be. One request's failure is a Generation with `error`. ModelUnavailable means that
        the model isn't there any more, or has broken: others go on with what it hasn't answered. Any other ModelError
        ends the run. What was yielded stands.
        """
        ...

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        """Indices of `requests` in batches, each to be passed to `generate`; every index exactly once."""
        ...

    def generate(self, batch: Sequence[Request]) -> list[Generation]:
        """Answer one batch, in order. Loads the model if need be.

        One request's failure is a Generation with `error`; ModelError means that the model itself can't
        answer. Returns only when every device has finished, so that a meter can be read right after.
        """
        ...


class InBatches:
    """`stream`, `suspend` and `resume` for a backend that plans batches and answers them one by one."""

    def stream(self: Backend, requests: Sequence[Request]) -> Iterator[Group]:
        """Each batch of `plan` is a group."""
        for batch in self.plan(requests):
            answers = self.generate([requests[index] for index in batch])
            yield group_of(dict(zip(batch, answers, strict=True)))

    def suspend(self: Backend) -> None:
        """Nothing is faster here than unloading."""
        self.unload()

    def resume(self: Backend) -> None:
        self.load()


def group_of(answers: Mapping[int, Generation]) -> Group:
    """The group of answers whose whole work was done since the group before."""
    ran = {
        index: (answer.prompt_tokens, answer.output_tokens)
        for index, answer in answers.items()
        if answer.error is None or answer.output_tokens  # an answer that can't be used was worked on, too
    }
    return Group(tuple(answers.items()), ran)


def seed_of(request: Request) -> int:
    """What sampling starts from: 31 bits, a function of the request alone."""
    key = request.key or str(request.id).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big") >> 1


def confidence_of(log_probabilities: Sequence[float]) -> dict[str, float] | None:
    """What an answer's token log-probabilities say of it, to 0.001 nats; None where they aren't known."""
    if not log_probabilities or not all(map(math.isfinite, log_probabilities)):
        return None
    ordered = sorted(log_probabilities)
    count = len(ordered)
    numbers = {
        "mean": math.fsum(ordered) / count,
        "least": ordered[0],
        "p10": ordered[(count - 1) // 10],
        "p50": ordered[(count - 1) // 2],
    }
    return {**{name: round(value, 3) for name, value in numbers.items()}, "tokens": count}


@dataclass(frozen=True, slots=True)
class Billed:
    """One answer with its bill. None: unknown, never a guess."""

    generation: Generation
    joules: float | None
    seconds: float | None
    meter: str  # for the row's `meter`; "": nothing has run
    running: float | None = None  # requests at a time, itself included; None: not known


@runtime_checkable
class SelfMetered(Protocol):
    """A Backend whose joules no counter of this process can read: it is metered where it runs, or reckoned.

    It shares its requests out by itself, and overlaps with anything.
    """

    def fitting(self, requests: Sequence[Request]) -> list[bool]:
        """Which of `requests` the model can take now."""
        ...

    def answer(self, requests: Sequence[Request]) -> list[Billed]:
        """Answer `requests`, in order, at whatever pace. Errors are those of `Backend.generate`."""
        ...

    def stream_billed(self, requests: Sequence[Request]) -> Iterator[Sequence[tuple[int, Billed]]]:
        """Answers with their bills as they come: (index into `requests`, bill). Otherwise as `stream`."""
        ...

    def take_overhead(self) -> Mapping[str, float]:
        """Joules since last taken that belong to no request, by meter."""
        ...

    def take_warnings(self) -> list[str]:
        """What the user should know of since last taken, one line each."""
        ...


@runtime_checkable
class Warns(Protocol):
    """A Backend that learns while it answers what the user should know of."""

    def take_warnings(self) -> list[str]:
        """One line each, since last taken."""
        ...


@runtime_checkable
class Weighs(Protocol):
    """A Backend that knows before it is asked whether it can say how likely options are as the next token."""

    def cannot_weigh(self, options: Sequence[str]) -> str | None:
        """Why it can't; None: it can. Loads a tokenizer at most."""
        ...


@runtime_checkable
class Cancels(Protocol):
    """A Backend whose stream another thread can end while it waits for a device."""

    def cancel(self) -> None:
        """End the stream that runs, within seconds; what isn't finished stays unanswered."""
        ...


@runtime_checkable
class Draining(Protocol):
    """A Backend that has much of a stream under way at a time, and can be told to ask nothing more of it."""

    def drain(self) -> None:
        """End the stream that is open, from another thread: it yields what is under way, and nothing else."""
        ...


@runtime_checkable
class SharesWeights(Protocol):
    """A Backend that can run on weights which another one of its kind has loaded."""

    @property
    def weights(self) -> Hashable:
        """Models with equal ones can run on the same weights. They don't run at the same time."""
        ...

    def share(self, other: Any) -> None:
        """Run on the weights of `other`, a backend with equal `weights`; before either is loaded.

        `load` and `unload` of each stay as they are: the first that loads reads the weights, and the last that unloads
        lets them go. `suspend` suspends all of them.
        """
        ...


def weights_of(backends: Sequence[Backend]) -> list[list[int]]:
    """The backends by the weights that they run on: indices, in the order of `backends`."""
    groups: dict[Hashable, list[int]] = {}
    for index, backend in enumerate(backends):
        key = ("shared", backend.weights) if isinstance(backend, SharesWeights) else ("own", index)
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def share_weights(backends: Sequence[Backend]) -> None:
    """Let backends whose weights are the same have them in memory once."""
    for first, *others in weights_of(backends):
        for index in others:
            cast(SharesWeights, backends[index]).share(backends[first])


@runtime_checkable
class OtherProcesses(Protocol):
    """A Backend whose model computes in other processes of this machine."""

    def cpu_seconds(self) -> float:
        """CPU seconds that aren't in this process's count, so far. Raises MeterError where they can't be seen."""
        ...


def fitting(backend: Backend, requests: Sequence[Request]) -> list[bool]:
    """Which of `requests` leave room for an answer in the model's context."""
    if isinstance(backend, SelfMetered):
        return backend.fitting(requests)
    limit = backend.context_length
    if limit is None:
        return [True] * len(requests)
    return [backend.prompt_tokens(request) <= limit for request in requests]


@runtime_checkable
class Exact(Protocol):
    """A backend that can be made to work on exact lengths: what `messcli calibrate` needs."""

    def generate_exactly(
        self, prompt_tokens: int, output_tokens: int, batch_size: int
    ) -> Sequence[Generation]:
        """Answer `batch_size` made-up prompts of `prompt_tokens` tokens with exactly `output_tokens` each.

        The work is that of `generate`: the same batch, decoding and synchronisation. Raises ModelError.
        """
        ...


@contextmanager
def collector_paused(*, for_good: bool = False) -> Iterator[None]:
    """No garbage collection: it would walk again and again over what importing or loading has just made.

    `for_good`: nor later, for what was made stays until the process ends (modules do, models don't).
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if for_good:
            gc.freeze()
        if enabled:
            gc.enable()


def create(spec: ModelSpec, *, batch_size: int | None) -> Backend:
    """The backend that `spec.backend` names. `batch_size` None means chosen by memory."""
    if spec.backend not in BACKENDS:
        raise ZooError(f'model "{spec.name}": {BACKENDS.unknown(spec.backend)}')
    module = str(BACKENDS[spec.backend]).partition(":")[0]
    with collector_paused(for_good=module not in sys.modules):
        kind = BACKENDS.load(spec.backend)
    return cast(Backend, kind(spec, batch_size=batch_size))

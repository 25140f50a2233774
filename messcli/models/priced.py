"""A model whose joules no meter here can read: its answers are billed from prices per token.

Prices come from zoo.toml's [models.joules], or from a calibration made where the model runs. They are
labelled: `stated` and `calibration` are no measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from messcli.models.backend import Backend, Billed, Draining, Group, Warns, fitting
from messcli.records import Generation, Request
from messcli.zoo import ModelSpec

Price = Callable[[int, int], float]  # (prompt tokens, output tokens) -> joules
STATED = "stated"
CALIBRATION = "calibration"


def stated_price(joules: Mapping[str, float]) -> Price:
    """The price that [models.joules] states: per request, per prompt token, per output token."""
    request, prompt, output = (joules.get(name, 0.0) for name in ("request", "prompt_token", "output_token"))
    return lambda prompt_tokens, output_tokens: request + prompt * prompt_tokens + output * output_tokens


class Priced:
    """`backend` as a `SelfMetered` one. `kind` is what its rows say in `meter`."""

    occupies_memory = False

    def __init__(self, backend: Backend, price: Price, kind: str) -> None:
        self.spec: ModelSpec = backend.spec
        self._backend = backend
        self._price = price
        self._kind = kind

    @property
    def devices(self) -> tuple[str, ...]:
        return (f"{self.spec.name} elsewhere",)

    @property
    def loaded(self) -> bool:
        return self._backend.loaded

    @property
    def context_length(self) -> int | None:
        return self._backend.context_length

    def load(self) -> None:
        self._backend.load()

    def unload(self) -> None:
        self._backend.unload()

    def suspend(self) -> None:
        self._backend.suspend()

    def resume(self) -> None:
        self._backend.resume()

    def prompt_tokens(self, request: Request) -> int:
        return self._backend.prompt_tokens(request)

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        return self._backend.plan(requests)

    def generate(self, batch: Sequence[Request]) -> list[Generation]:
        return self._backend.generate(batch)

    def stream(self, requests: Sequence[Request]) -> Iterator[Group]:
        return self._backend.stream(requests)

    def stream_billed(self, requests: Sequence[Request]) -> Iterator[Sequence[tuple[int, Billed]]]:
        """Seconds are unknown: the server's own are not ours to see, and the wait is shared with others."""
        for group in self.stream(requests):
            yield [(index, self._billed(generation)) for index, generation in group.finished]

    def drain(self) -> None:
        """See `messcli.models.backend.Draining`."""
        if isinstance(self._backend, Draining):
            self._backend.drain()

    def fitting(self, requests: Sequence[Request]) -> list[bool]:
        return fitting(self._backend, requests)

    def answer(self, requests: Sequence[Request]) -> list[Billed]:
        return [self._billed(generation) for generation in self.generate(requests)]

    def _billed(self, generation: Generation) -> Billed:
        """A failure is billed where the server counted tokens of it: what it counts none of, it hasn't run."""
        ran = generation.error is None or generation.output_tokens > 0
        joules = self._price(generation.prompt_tokens, generation.output_tokens) if ran else 0.0
        return Billed(generation, joules, None, self._kind)

    def take_overhead(self) -> Mapping[str, float]:
        return {}

    def take_warnings(self) -> list[str]:
        return self._backend.take_warnings() if isinstance(self._backend, Warns) else []

"""What runs a model: the Backend protocol, and the table of backends.

A backend knows one loaded model. It knows nothing of energy, metrics or routing: it plans batches,
answers them, and says how long a prompt is to its model.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Protocol, cast

from messcli.errors import ZooError
from messcli.records import Generation, Request
from messcli.zoo import ModelSpec


class Backend(Protocol):
    """One model. Construction is cheap; `load` does the work and may be called again after `unload`."""

    spec: ModelSpec

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices whose energy this model's calls are billed for, such as ("cuda:0",) or ("cpu",)."""
        ...

    @property
    def loaded(self) -> bool: ...

    def load(self) -> None:
        """Load weights and tokenizer. Raises ModelError naming model, path and cure."""
        ...

    def unload(self) -> None:
        """Give the memory back."""
        ...

    def prompt_tokens(self, request: Request) -> int:
        """Length of the rendered prompt in this model's tokens (the tokenizer loads on first use)."""
        ...

    @property
    def context_length(self) -> int | None:
        """The most prompt tokens that leave room for an answer; None where the model states no limit."""
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


# name in zoo.toml -> module:class; heavy libraries load only with the backend that needs them
BACKENDS = {
    "transformers": "messcli.backends.transformers:TransformersBackend",
}


def create(spec: ModelSpec, *, batch_size: int | None) -> Backend:
    """The backend that `spec.backend` names. `batch_size` None means chosen by memory."""
    try:
        module, _, name = BACKENDS[spec.backend].partition(":")
    except KeyError:
        raise ZooError(
            f'model "{spec.name}": unknown backend "{spec.backend}"; known are {", ".join(sorted(BACKENDS))}'
        ) from None
    return cast(Backend, getattr(import_module(module), name)(spec, batch_size=batch_size))

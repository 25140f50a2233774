"""Where outcomes come from: live models, or a recorded table. The loop can't tell the difference.

A source knows how to get (output, accuracy, joules) for a request and a model. It knows nothing of which
model should be asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from messcli.backends import Backend
from messcli.energy import Bill, Call, EnergyLedger
from messcli.errors import MetricError, OutcomesError
from messcli.metrics import Metric
from messcli.records import Generation, Outcome, Request

Asked = Sequence[tuple[Request, Sequence[int]]]  # the models that each request is put to


class OutcomeSource(Protocol):
    """Answers requests with the models of a zoo, given as indices into `names`."""

    names: tuple[str, ...]

    def allowed(self, requests: Sequence[Request]) -> list[tuple[int, ...]]:
        """For each request, the models that can take its prompt, ascending; may be empty."""
        ...

    def query(self, asked: Asked) -> list[dict[int, Outcome]]:
        """For each request, the outcome of every model it was put to."""
        ...

    def take_overhead(self) -> Mapping[str, float]:
        """Joules since last taken that belong to no request, by meter."""
        ...

    def take_warnings(self) -> list[str]:
        """What the user should know of since last taken, one line each."""
        ...

    def close(self) -> None: ...


class Live:
    """Real models: a backend each, one energy ledger, one metric.

    Args:
        backends: one per model, in zoo order.
        ledger: bills the backends' calls.
        metric: scores outputs of requests with a reference.
    """

    def __init__(self, backends: Sequence[Backend], ledger: EnergyLedger, metric: Metric) -> None:
        self.names = tuple(backend.spec.name for backend in backends)
        self._backends = backends
        self._ledger = ledger
        self._metric = metric

    def load(self) -> None:
        """Load every model now instead of on first use."""
        for backend in self._backends:
            backend.load()

    def allowed(self, requests: Sequence[Request]) -> list[tuple[int, ...]]:
        return [
            tuple(m for m, backend in enumerate(self._backends) if self._fits(backend, request))
            for request in requests
        ]

    @staticmethod
    def _fits(backend: Backend, request: Request) -> bool:
        limit = backend.context_length
        return limit is None or backend.prompt_tokens(request) <= limit

    def query(self, asked: Asked) -> list[dict[int, Outcome]]:
        answers: list[dict[int, Outcome]] = [{} for _ in asked]
        shares: list[list[int]] = [[] for _ in self._backends]  # per model, positions in `asked`
        for position, (_, models) in enumerate(asked):
            for m in models:
                shares[m].append(position)
        calls = []
        with self._ledger.window():
            for m, share in enumerate(shares):
                for batch in self._batches(m, [asked[position][0] for position in share]):
                    positions = [share[index] for index in batch]
                    calls.append((m, positions, self._call(m, [asked[p][0] for p in positions])))
        for m, positions, call in calls:
            for position, generation, bill in zip(positions, call.generations, call.bills(), strict=True):
                request = asked[position][0]
                answers[position][m] = self._outcome(request, generation, bill, call.kind)
        return answers

    def _batches(self, m: int, requests: Sequence[Request]) -> list[list[int]]:
        if not requests:
            return []
        if not self._backends[m].loaded:
            self._backends[m].load()  # outside of any call: loading is overhead
        return self._backends[m].plan(requests)

    def _call(self, m: int, batch: Sequence[Request]) -> Call:
        backend = self._backends[m]
        with self._ledger.call(backend.spec.name, [str(r.id) for r in batch], backend.devices) as call:
            call.generations = backend.generate(batch)
        return call

    def _outcome(self, request: Request, generation: Generation, bill: Bill, meter: str) -> Outcome:
        accuracy, error = None, generation.error
        if generation.output is not None and error is None and request.references:
            try:
                accuracy = self._metric(generation.output, request.references)
            except MetricError as failure:
                error = f"request {request.id!r}: {failure}"
        return Outcome(
            output=generation.output,
            accuracy=accuracy,
            joules=bill.joules,
            prompt_tokens=generation.prompt_tokens,
            output_tokens=generation.output_tokens,
            seconds=bill.seconds,
            meter=meter,
            error=error,
        )

    def take_overhead(self) -> Mapping[str, float]:
        return self._ledger.take_overhead()

    def take_warnings(self) -> list[str]:
        return self._ledger.take_warnings()

    def close(self) -> None:
        for backend in self._backends:
            backend.unload()


class Recorded:
    """Outcomes that were measured before, by request id: a drop-in replacement for models and meters."""

    def __init__(self, names: Sequence[str], outcomes: Mapping[str | int, Mapping[str, Outcome]]) -> None:
        self.names = tuple(names)
        self._outcomes = outcomes

    def allowed(self, requests: Sequence[Request]) -> list[tuple[int, ...]]:
        return [tuple(range(len(self.names)))] * len(requests)

    def query(self, asked: Asked) -> list[dict[int, Outcome]]:
        return [{m: self._outcome(request, self.names[m]) for m in models} for request, models in asked]

    def _outcome(self, request: Request, name: str) -> Outcome:
        try:
            return self._outcomes[request.id][name]
        except KeyError:
            raise OutcomesError(
                f'no outcome of model "{name}" for request {request.id!r} was recorded. Record the input again'
            ) from None

    def take_overhead(self) -> Mapping[str, float]:
        return {}

    def take_warnings(self) -> list[str]:
        return []

    def close(self) -> None:
        pass

"""A zoo's live models as one source of outcomes: loaded, asked, metered and scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from messcli.energy import Call, EnergyLedger, Weight, token_weight
from messcli.errors import MeterError, MetricError, ModelTooLarge
from messcli.metrics import Metric
from messcli.models.backend import Backend, Billed, SelfMetered, fitting
from messcli.records import Outcome, Request


class Live:
    """Real models: a backend each, one energy ledger, one metric.

    A window's models run in rounds. The models of a round are in memory together, and those that share
    neither a device nor a counter run at the same time. Loading happens between rounds, never beside a
    model that answers: libraries change process-wide settings while they load.

    Args:
        backends: one per model, in zoo order.
        ledger: bills the calls of backends that aren't metered elsewhere.
        metric: scores outputs of requests with a reference.
        max_loaded: models in memory at a time; None: as many as there is memory for.
        weights: model -> how its batches' joules are split; by tokens where it isn't said.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        ledger: EnergyLedger,
        metric: Metric,
        *,
        max_loaded: int | None = None,
        weights: Mapping[str, Weight] | None = None,
    ) -> None:
        self.names = tuple(backend.spec.name for backend in backends)
        self._backends = backends
        self._ledger = ledger
        self._metric = metric
        self._max_loaded = max_loaded
        self._weights = weights or {}
        self._last_used = dict.fromkeys(range(len(backends)), 0)  # model -> the round, counted from 1
        self._rounds = 0

    def load(self) -> None:
        """Load models now instead of on first use: the first ones, as far as they may be loaded together."""
        count = len(self._backends) if self._max_loaded is None else self._max_loaded
        for backend in self._backends[:count]:
            backend.load()

    def allowed(self, requests: Sequence[Request]) -> list[tuple[int, ...]]:
        fits = [fitting(backend, requests) for backend in self._backends]
        return [
            tuple(m for m in range(len(self._backends)) if fits[m][index]) for index in range(len(requests))
        ]

    def query(self, asked: Sequence[tuple[Request, Sequence[int]]]) -> list[dict[int, Outcome]]:
        shares: dict[int, list[int]] = {}  # per model, positions in `asked`
        for position, (_, models) in enumerate(asked):
            for m in models:
                shares.setdefault(m, []).append(position)
        requests = [request for request, _ in asked]
        billed: dict[int, list[Billed]] = {}
        with self._ledger.window():
            calls: dict[int, _Calls] = {}
            todo = sorted(shares)
            while todo:
                together = self._load_round(todo)
                todo = [m for m in todo if m not in together]
                for m, answers in self._run({m: [requests[p] for p in shares[m]] for m in together}):
                    if isinstance(answers, _Calls):
                        calls[m] = answers
                    else:
                        billed[m] = answers
        # joules of our own calls are known when the window has closed
        for m, made in calls.items():
            billed[m] = made.bills(self._weights.get(self.names[m], token_weight))
        outcomes: list[dict[int, Outcome]] = [{} for _ in asked]
        for m in sorted(shares):
            for position, answer in zip(shares[m], billed[m], strict=True):
                outcomes[position][m] = self._outcome(requests[position], answer)
        return outcomes

    # --- loading ---

    def _load_round(self, todo: Sequence[int]) -> list[int]:
        """Load as many of `todo` as may be in memory together; which these are, ascending.

        Loaded ones come first, so that the round that ends a window starts the next one.
        """
        resident = [m for m in todo if self._backends[m].occupies_memory]
        elsewhere = [m for m in todo if not self._backends[m].occupies_memory]
        resident.sort(key=lambda m: (not self._backends[m].loaded, m))
        together: list[int] = []
        for m in resident[: self._max_loaded]:
            try:
                self._make_room(keep=[*resident[: self._max_loaded]])
                self._load(m, keep=together)
            except ModelTooLarge:
                if not together:
                    raise
                # it gets a round of its own, and no later window tries again
                self._max_loaded = len(together)
                break
            together.append(m)
        for m in elsewhere:
            self._backends[m].load()
        self._rounds += 1
        self._last_used.update(dict.fromkeys(together, self._rounds))
        return sorted([*together, *elsewhere])

    def _load(self, m: int, keep: Sequence[int]) -> None:
        """Load `m`; where memory is short, in place of models that aren't in `keep`."""
        while not self._backends[m].loaded:
            try:
                self._backends[m].load()
            except ModelTooLarge:  # noqa: PERF203  # each turn frees memory and tries again
                if not self._unload_one(keep):
                    raise
                self._max_loaded = len(self._in_memory()) + 1

    def _make_room(self, keep: Sequence[int]) -> None:
        """Keep to --max-loaded with one more model, or with one of `keep` that is loaded already."""
        if self._max_loaded is None:
            return
        needed = sum(1 for m in keep if not self._backends[m].loaded)
        while len(self._in_memory()) + needed > self._max_loaded and self._unload_one(keep):
            pass

    def _in_memory(self) -> list[int]:
        return [m for m, backend in enumerate(self._backends) if backend.occupies_memory and backend.loaded]

    def _unload_one(self, keep: Sequence[int]) -> bool:
        """Unload the least recently used model that isn't in `keep`; False where there is none."""
        idle = [m for m in self._in_memory() if m not in keep]
        if not idle:
            return False
        self._backends[min(idle, key=lambda m: (self._last_used[m], m))].unload()
        return True

    # --- answering ---

    def _run(self, shares: Mapping[int, Sequence[Request]]) -> list[tuple[int, _Calls | list[Billed]]]:
        """Every model's answers to its share. Models that share a device or a counter take turns."""
        groups = self._groups(list(shares))

        def run_group(group: Sequence[int]) -> list[tuple[int, _Calls | list[Billed]]]:
            return [(m, self._ask(self._backends[m], shares[m])) for m in group]

        if len(groups) == 1:
            return run_group(groups[0])
        pool = ThreadPoolExecutor(len(groups), thread_name_prefix="messcli-device")
        try:
            futures = [pool.submit(run_group, group) for group in groups]
            # the first group's error is told, whichever came first
            return [answer for future in futures for answer in future.result()]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _groups(self, models: Sequence[int]) -> list[list[int]]:
        """`models` in groups that may overlap in time: no two share a device or a counter."""
        groups: list[tuple[set[str], list[int]]] = []
        for m in models:
            backend = self._backends[m]
            own = {f"model {m}"}
            if not isinstance(backend, SelfMetered):
                own.update(backend.devices, self._ledger.sources(backend.devices))
            touching = [group for group in groups if group[0] & own]
            groups = [group for group in groups if not group[0] & own]
            members = sorted([m, *(other for _, others in touching for other in others)])
            groups.append((own.union(*(names for names, _ in touching)), members))
        return sorted(members for _, members in groups)

    def _ask(self, backend: Backend, requests: Sequence[Request]) -> _Calls | list[Billed]:
        if isinstance(backend, SelfMetered) and not self._ledger.replays:
            return backend.answer(requests)
        calls = _Calls(len(requests))
        for batch in backend.plan(requests):
            part = [requests[index] for index in batch]
            with self._ledger.call(backend.spec.name, [str(r.id) for r in part], backend.devices) as call:
                call.generations = backend.generate(part)
            calls.add(batch, call)
        return calls

    def _outcome(self, request: Request, answer: Billed) -> Outcome:
        generation = answer.generation
        accuracy, error = None, generation.error
        if generation.output is not None and error is None and request.references:
            try:
                accuracy = self._metric(generation.output, request.references)
            except MetricError as failure:
                error = f"request {request.id!r}: {failure}"
        return Outcome(
            output=generation.output,
            accuracy=accuracy,
            joules=answer.joules,
            prompt_tokens=generation.prompt_tokens,
            output_tokens=generation.output_tokens,
            seconds=answer.seconds,
            meter=answer.meter,
            error=error,
        )

    # --- what belongs to no request ---

    @property
    def fault(self) -> MeterError | None:
        """Why a counter can't be read any more; the next window would raise it."""
        return self._ledger.fault

    def take_overhead(self) -> Mapping[str, float]:
        overhead = Counter(self._ledger.take_overhead())
        for backend in self._backends:
            if isinstance(backend, SelfMetered) and not self._ledger.replays:
                overhead.update(backend.take_overhead())
        return overhead

    def take_warnings(self) -> list[str]:
        warnings = self._ledger.take_warnings()
        for backend in self._backends:
            if isinstance(backend, SelfMetered):
                warnings.extend(backend.take_warnings())
        return warnings

    def close(self) -> None:
        for backend in self._backends:
            backend.unload()


class _Calls:
    """The calls that answered one model's share of a window, batch by batch."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._calls: list[tuple[Sequence[int], Call]] = []

    def add(self, indices: Sequence[int], call: Call) -> None:
        self._calls.append((indices, call))

    def bills(self, weight: Weight) -> list[Billed]:
        """Per request of the share, in order, once the ledger's window has closed."""
        billed: dict[int, Billed] = {}
        for indices, call in self._calls:
            for index, generation, bill in zip(indices, call.generations, call.bills(weight), strict=True):
                billed[index] = Billed(generation, bill.joules, bill.seconds, call.kind)
        return [billed[index] for index in range(self._size)]

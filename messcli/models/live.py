"""A zoo's live models as one source of outcomes: loaded, asked side by side, metered and scored."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import cached_property
from queue import Empty, SimpleQueue

from messcli.energy import EnergyLedger, Weight
from messcli.energy.ledger import LOADING
from messcli.errors import MeterError, ModelError
from messcli.metrics import Metric
from messcli.models.backend import (
    Backend,
    Billed,
    Cancels,
    Draining,
    SelfMetered,
    Warns,
    Weighs,
    fitting,
    weights_of,
)
from messcli.models.billing import Billing, Loads
from messcli.models.check import OPTIONS
from messcli.models.residency import Residency
from messcli.models.scoring import score
from messcli.records import Answer, Asked, Outcome, Request
from messcli.signals import WORKERS, LoadingStopped
from messcli.tariff import FREE, Tariff

GRACE_SECONDS = 5.0  # that answers which are being made get, when the run is told to stop
_TICK_SECONDS = 0.2  # how often a wait for answers looks whether it is


class Live:
    """Real models: a backend each, one energy ledger, one metric.

    A window's models run in rounds. The models of a round are in memory together, and those that share
    neither a device nor a counter run at the same time. So do those that share one where all of them are to
    run beside each other and are calibrated: what is read meanwhile is split by the cost of their steps.
    Loading happens between rounds, never beside a
    model that answers: libraries change process-wide settings while they load.

    Args:
        backends: one per model, in zoo order.
        ledger: bills the calls of backends that aren't metered elsewhere.
        metric: scores outputs of requests with a reference.
        max_loaded: models in memory at a time, those on the same weights as one; None: as many as there is memory for.
        weights: model -> how its batches' joules are split; by tokens where it isn't said.
        stopping: whether the run was told to stop.
        loading: within it, a signal raises LoadingStopped.
        tariff: what joules and tokens cost.
        checkers: model -> the larger one that reads its answers.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        ledger: EnergyLedger,
        metric: Metric,
        *,
        max_loaded: int | None = None,
        weights: Mapping[str, Weight] | None = None,
        stopping: Callable[[], bool] = lambda: False,
        loading: Callable[[], AbstractContextManager[None]] = nullcontext,
        tariff: Tariff = FREE,
        checkers: Mapping[int, int] | None = None,
    ) -> None:
        self._tariff = tariff
        self.names = tuple(backend.spec.name for backend in backends)
        self._backends = backends
        self._ledger = ledger
        self._metric = metric
        self._stopping = stopping
        self._loading = loading
        self._residency = Residency(backends, max_loaded)
        weights = weights or {}
        beside = [m for m, backend in enumerate(backends) if backend.spec.beside]
        self._beside = frozenset(m for m in beside if self.names[m] in weights)
        self._billing = Billing(backends, ledger, weights, self._beside)
        self._warnings: list[str] = []
        if len(beside) > 1 and len(self._beside) < len(beside) and not ledger.replays:
            self._warnings.append(
                "beside = true: the models aren't calibrated, and what they read together couldn't be split. They take "
                "turns. Run `messcli calibrate`"
            )
        self._checkers: Mapping[int, int] = checkers or {}
        self.left_behind = False  # threads that didn't end in time still use the models

    def load(self) -> None:
        """Load models now instead of on first use: the first ones, as far as they may be loaded together."""
        with self._ledger.overhead_of(LOADING):
            self._residency.preload()

    @cached_property
    def checkers(self) -> Mapping[int, int]:
        """Model -> the larger one that reads its answers. Larger ones that are known to tell nothing are left out."""
        mute = {}
        for m in sorted(set(self._checkers.values())):
            backend = self._backends[m]
            if isinstance(backend, Weighs) and (why := backend.cannot_weigh(OPTIONS)) is not None:
                mute[m] = why
                self._warnings.append(f"{why}. It checks no answers")
        return {m: reader for m, reader in self._checkers.items() if reader not in mute}

    def allowed(self, requests: Sequence[Request]) -> list[tuple[int, ...]]:
        fits = [fitting(backend, requests) for backend in self._backends]
        return [
            tuple(m for m in range(len(self._backends)) if fits[m][index]) for index in range(len(requests))
        ]

    def _scored(self, m: int, request: Request, answer: Billed) -> Outcome:
        if answer.generation.fault == "run":  # no request of it can be answered, by whatever model
            raise ModelError(answer.generation.error)
        return score(self._metric, request, answer, model=self.names[m], tariff=self._tariff)

    def answers(self, asked: Asked) -> Iterator[Sequence[Answer]]:
        waiting: dict[int, list[int]] = {}  # per model that is still to run, positions in `asked`
        taken = 0

        def collect() -> None:
            nonlocal taken
            for position in range(taken, len(asked)):
                for m in asked[position][1]:
                    waiting.setdefault(m, []).append(position)
            taken = len(asked)

        collect()
        first = True
        while waiting and not self._stopping():
            yield from self._answers(asked, waiting, goes_on=not first)
            first = False
            collect()

    def _answers(
        self, asked: Asked, waiting: dict[int, list[int]], *, goes_on: bool
    ) -> Iterator[Sequence[Answer]]:
        """Run the models of one round, which are taken out of `waiting`. `goes_on`: it is the same window as before."""
        shares: dict[int, list[int]] = {}

        def scored(m: int, answers: Sequence[tuple[int, Billed]]) -> list[Answer]:
            made = []
            for index, answer in answers:
                position = shares[m][index]
                made.append((position, m, self._scored(m, asked[position][0], answer)))
            return made

        failure: Exception | None = None
        whole = False
        try:
            with self._ledger.window(eager=True, goes_on=goes_on):
                try:
                    with self._ledger.overhead_of(LOADING), self._loading():
                        together = self._next(self._residency.load_round(sorted(waiting)))
                except LoadingStopped:  # half a model is in memory, and the process ends
                    self.left_behind = True
                    together = []
                shares.update((m, waiting.pop(m)) for m in together)
                requests = {m: [asked[position][0] for position in shares[m]] for m in together}
                with closing(self._run(requests)) as arriving:
                    for m, answers in arriving:
                        yield scored(m, answers)
            whole = True
        except Exception as error:  # told below: what was answered comes first
            failure, whole = error, True
        finally:
            rest, lost = self._billing.close_window(wanted=whole)
            if lost:
                self._warnings.append(lost)
        for m, answers in rest.items():
            yield scored(m, answers)
        if failure is not None:
            raise failure

    def _next(self, loaded: Sequence[int]) -> Sequence[int]:
        """The models of a round. Where all would take turns, the first one has a round of its own: what larger ones are
        asked because of its answers is then part of their shares."""
        lanes = self._lanes(list(loaded))
        if len(lanes) != 1:
            return loaded
        first, *_ = self._turns(lanes[0])
        return [m for models in first for m in models]

    def _run(
        self, requests: Mapping[int, Sequence[Request]]
    ) -> Generator[tuple[int, Sequence[tuple[int, Billed]]], None, None]:
        """Every model's answers to its share, as they come."""
        arrived: SimpleQueue[tuple[int, int, Sequence[tuple[int, Billed]] | BaseException | None]] = (
            SimpleQueue()
        )
        ending = threading.Event()  # nothing more is to be asked
        over = threading.Event()  # nothing more is wanted

        broken = set[int]()  # lanes that go no further

        def answer(number: int, models: Sequence[int]) -> None:
            m = models[0]
            try:
                for m in models:
                    if ending.is_set():
                        return
                    with closing(self._billing.stream(m, requests[m])) as stream:
                        for answers in stream:
                            arrived.put((number, m, answers))
                            drains = isinstance(self._backends[m], Draining)
                            if over.is_set() or (ending.is_set() and not drains):
                                return
            except BaseException as error:  # told in the thread that asked
                broken.add(number)
                arrived.put((number, m, error))

        def serve(number: int, turns: Sequence[Sequence[Sequence[int]]]) -> None:
            try:
                for first, *others in turns:
                    if number in broken:
                        return
                    threads = [
                        threading.Thread(
                            target=answer, args=(number, models), name=f"{WORKERS}-{number}", daemon=True
                        )
                        for models in others
                    ]
                    for thread in threads:
                        thread.start()
                    answer(number, first)
                    for thread in threads:
                        thread.join()
            finally:
                arrived.put((number, 0, None))

        lanes = [self._turns(lane) for lane in self._lanes(list(requests))]
        running = {
            number: threading.Thread(
                target=serve, args=(number, lane), name=f"{WORKERS}-{number}", daemon=True
            )
            for number, lane in enumerate(lanes)
        }
        failures: dict[tuple[int, int], BaseException] = {}
        grace = GRACE_SECONDS  # what is left of it
        try:
            for thread in running.values():
                thread.start()
            while running and grace > 0:
                since = time.monotonic()
                try:
                    number, m, item = arrived.get(timeout=_TICK_SECONDS)
                except Empty:
                    yield 0, ()
                else:
                    if item is None:
                        running.pop(number).join()
                    elif isinstance(item, BaseException):
                        failures[number, m] = item
                    else:
                        yield m, [*item, *self._billing.take(m)]
                if (failures or self._stopping()) and not ending.is_set():
                    ending.set()
                    self._drain()
                if failures or (self._stopping() and grace < GRACE_SECONDS / 2):
                    self._cancel()
                if self._stopping():
                    grace -= time.monotonic() - since
        except GeneratorExit:
            ending.set()
            over.set()
            self._cancel()
            for thread in running.values():
                thread.join(GRACE_SECONDS)
            raise
        finally:
            ending.set()
            over.set()
            self.left_behind |= any(thread.is_alive() for thread in running.values())
        if failures:
            raise failures[min(failures)]  # the first lane's error is told, whichever came first

    def _drain(self) -> None:
        """Ask nothing more: what is under way comes as long as there is time."""
        for backend in self._backends:
            if isinstance(backend, Draining):
                backend.drain()

    def _cancel(self) -> None:
        """End what runs on a device, where a backend can: its thread waits for a batch."""
        for backend in self._backends:
            if isinstance(backend, Cancels):
                backend.cancel()

    def _turns(self, lane: Sequence[int]) -> list[list[list[int]]]:
        """A lane's models in turns. Those of a turn run beside each other: in sequences, one per set of weights."""
        beside = [m for m in lane if m in self._beside]
        groups = weights_of([self._backends[m] for m in beside])
        together = [[beside[index] for index in group] for group in groups]
        alone = [[[m]] for m in lane if m not in self._beside]
        return sorted([*([together] if together else []), *alone])

    def _lanes(self, models: Sequence[int]) -> list[list[int]]:
        """`models` in lanes that may overlap in time: no two share a device or a counter."""
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

    # --- what belongs to no request ---

    @property
    def fault(self) -> MeterError | None:
        """Why a counter can't be read any more; the next window would raise it."""
        return self._ledger.fault

    @property
    def named_overhead(self) -> Mapping[str, float]:
        """Parts of the overhead so far by what it was for: `EnergyLedger.named`."""
        return self._ledger.named

    @property
    def loads(self) -> Loads:
        """What was read so far, by how many requests a model ran at a time."""
        return self._billing.loads

    def take_overhead(self) -> Mapping[str, float]:
        overhead = Counter(self._ledger.take_overhead())
        for backend in self._backends:
            if isinstance(backend, SelfMetered) and not self._ledger.replays:
                overhead.update(backend.take_overhead())
        return overhead

    def running_joules(self) -> Mapping[str, float]:
        return self._billing.running_joules()

    def take_warnings(self) -> list[str]:
        warnings, self._warnings = [*self._ledger.take_warnings(), *self._warnings], []
        for backend in self._backends:
            if isinstance(backend, Warns):
                warnings.extend(backend.take_warnings())
        return warnings

    def close(self) -> None:
        if self.left_behind:  # a model that is in use can't be unloaded; the process ends
            return
        for backend in self._backends:
            backend.unload()

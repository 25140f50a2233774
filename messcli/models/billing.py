"""Answers with their bills: what the counters read between two groups of a model's answers is split over the
requests that ran meanwhile. Knows the ledger and the backends' streams; nothing of memory, metrics or routing.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cached_property
from typing import TypeVar

from messcli.energy import Bill, Call, EnergyLedger, Weight, token_weight
from messcli.errors import ModelUnavailable
from messcli.models.backend import Backend, Billed, Group, SelfMetered
from messcli.records import IN_A_ROW, Generation, Request

Item = TypeVar("Item")
# model -> requests running, down to a power of two -> joules, tokens written, tokens written times requests running
Loads = Mapping[str, Mapping[int, tuple[float, int, int]]]
Answers = Sequence[tuple[int, Billed]]  # index into the requests of a model's share, answer and bill


class Billing:
    """Streams models' answers through the ledger, a window at a time.

    Args:
        backends: one per model, in zoo order.
        weights: model -> how an interval's joules are split; by tokens where it isn't said.
        beside: models that may run while others of them do, on the same counter. Their weights are joules, calibrated.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        ledger: EnergyLedger,
        weights: Mapping[str, Weight],
        beside: Collection[int] = (),
    ) -> None:
        self._beside = beside
        self._backends = backends
        self._ledger = ledger
        self._weights = weights
        self._shares: dict[int, _Share] = {}  # by model, of the window in hand
        self._loads: dict[str, dict[int, tuple[float, int, int]]] = {}

    def stream(self, m: int, requests: Sequence[Request]) -> Generator[Answers, None, None]:
        """Answer a model's share of a window, in a thread of its own.

        It yields answers that are billed already, and an empty group where `take` may have some. A model that isn't
        there, or fails on request after request, answers no more: what is left has failed with fault "away".
        """
        patience = _Patience(self._backends[m].spec.name, len(requests))
        with closing(self._stream(m, requests, patience)) as stream:
            try:
                for answers in stream:
                    yield answers
                    if patience.is_over:
                        break
                why = patience.why
            except ModelUnavailable as error:
                why = str(error)
        if why is not None:
            yield [(index, _away(why)) for index in sorted(patience.left)]

    def _stream(
        self, m: int, requests: Sequence[Request], patience: _Patience
    ) -> Generator[Answers, None, None]:
        backend = self._backends[m]
        if isinstance(backend, SelfMetered) and not self._ledger.replays:
            with closing(_closable(backend.stream_billed(requests))) as billed:
                for answers in billed:
                    patience.saw((index, answer.generation) for index, answer in answers)
                    yield answers
            return
        name, devices = backend.spec.name, backend.devices
        ids = [str(request.id) for request in requests]
        kind = self._ledger.check(name, ids, devices)
        with closing(_closable(backend.stream(requests))) as groups:
            if self._ledger.replays:
                for played in groups:
                    patience.saw(played.finished)
                    yield self._replayed(name, ids, kind, played)
                return
            weight = self._weights.get(name, token_weight)
            share = self._shares[m] = _Share(self._ledger, weight, kind, self._loads.setdefault(name, {}))
            while True:
                with self._ledger.call(name, (), devices, beside=m in self._beside) as call:
                    group = next(groups, None)
                    if group is None or not group.work:
                        call.drop()
                    else:
                        call.work = list(group.work.values())
                        call.expected = math.fsum(weight(*tokens) for tokens in call.work)
                if group is None:
                    return
                patience.saw(group.finished)
                share.add(group, call)
                yield ()

    def _replayed(self, name: str, ids: Sequence[str], kind: str, group: Group) -> Answers:
        bills = self._ledger.replay(name, [ids[index] for index, _ in group.finished]) or ()
        return [
            (index, Billed(generation, bill.joules, bill.seconds, kind))
            for (index, generation), bill in zip(group.finished, bills, strict=True)
        ]

    def take(self, m: int) -> Answers:
        """The answers of a model whose bills have become final."""
        share = self._shares.get(m)
        return () if share is None else share.take()

    def close_window(self, *, wanted: bool) -> tuple[dict[int, Answers], str | None]:
        """Once the ledger's window is closed: the answers that are still to come, by model; and what was lost.

        Args:
            wanted: whether somebody still takes answers.

        What was read for requests that were never answered is overhead from now on.
        """
        shares, self._shares = self._shares, {}
        answers = {m: share.take() for m, share in shares.items() if wanted}
        lost = [share.forgo() for share in shares.values()]
        requests = sum(count for count, _ in lost)
        if not requests:
            return answers, None
        joules = math.fsum(read for _, read in lost)
        return answers, (
            f"{requests} requests were being answered when the run was stopped: {joules:.4g} J that were read "
            "for them are overhead"
        )

    @property
    def loads(self) -> Loads:
        """What was read so far, by how many requests ran."""
        return {name: dict(loads) for name, loads in self._loads.items() if loads}

    def running_joules(self) -> dict[str, float]:
        """Joules read so far for requests that aren't answered, by meter."""
        running: dict[str, float] = {}
        for share in list(self._shares.values()):
            if joules := share.running_joules():
                running[share.kind] = running.get(share.kind, 0.0) + joules
        return running


def _closable(groups: Iterator[Item]) -> Generator[Item, None, None]:
    """Closing it closes a backend's stream, which ends what still runs."""
    yield from groups


class _Patience:
    """How long a model is asked that fails: until `IN_A_ROW` requests in a row have, in the order of coming."""

    def __init__(self, name: str, requests: int) -> None:
        self.left = set(range(requests))  # those that aren't finished
        self._name = name
        self._in_a_row = 0
        self._failure = ""

    def saw(self, finished: Iterable[tuple[int, Generation]]) -> None:
        for index, generation in finished:
            self.left.discard(index)
            if generation.error is None or generation.fault == "request":
                self._in_a_row = 0
            else:
                self._in_a_row += 1
                self._failure = generation.error

    @property
    def is_over(self) -> bool:
        return self._in_a_row >= IN_A_ROW

    @property
    def why(self) -> str | None:
        """Why nothing more is asked of it; None: all is answered, or it was told to stop."""
        if not self.is_over:
            return None
        return (
            f'model "{self._name}": {self._in_a_row} requests in a row have failed. The last: {self._failure}'
        )


def _away(why: str) -> Billed:
    """Of a request that nothing has run for."""
    return Billed(Generation(None, 0, 0, error=why, fault="away"), 0.0, 0.0, "")


class _Stretch:
    """What ran between two groups."""

    def __init__(self, call: Call, weight: Weight) -> None:
        self.call = call
        self._weight = weight

    @cached_property
    def bills(self) -> list[Bill]:
        """Of the requests that ran, in the order of the call's work; once the call is settled."""
        return self.call.bills(self._weight)


class _Share:
    """One model's share of a window: the stretches that each of its requests ran in."""

    def __init__(
        self, ledger: EnergyLedger, weight: Weight, kind: str, loads: dict[int, tuple[float, int, int]]
    ) -> None:
        self.kind = kind
        self._loads = loads
        self._unread: list[Call] = []  # that `_loads` lacks
        self._ledger = ledger
        self._weight = weight
        self._lock = threading.Lock()  # answers come in a thread of their own
        self._stretches: dict[
            int, list[tuple[_Stretch, int]]
        ] = {}  # by request: and its place in the stretch
        self._finished: dict[int, Generation] = {}  # that weren't taken yet

    def add(self, group: Group, call: Call) -> None:
        with self._lock:
            stretch = _Stretch(call, self._weight)
            self._unread.append(call)
            for place, index in enumerate(group.work):
                self._stretches.setdefault(index, []).append((stretch, place))
            self._finished.update(group.finished)

    def take(self) -> Answers:
        """The finished requests whose joules are final."""
        with self._lock:
            self._note_loads()
            ready = [
                index
                for index in self._finished
                if all(stretch.call.settled for stretch, _ in self._stretches.get(index, ()))
            ]
            return [(index, self._billed(index)) for index in ready]

    def _note_loads(self) -> None:
        for call in [call for call in self._unread if call.settled]:
            self._unread.remove(call)
            running, written = len(call.tokens), sum(tokens for _, tokens in call.tokens)
            if call.joules is not None and written:
                about = 1 << (running.bit_length() - 1)
                joules, tokens, times = self._loads.get(about, (0.0, 0, 0))
                self._loads[about] = joules + call.joules, tokens + written, times + written * running

    def _billed(self, index: int) -> Billed:
        stretches = self._stretches.pop(index, ())
        bills = [stretch.bills[place] for stretch, place in stretches]
        joules = [bill.joules for bill in bills if bill.joules is not None]
        return Billed(
            self._finished.pop(index),
            math.fsum(joules) if len(joules) == len(bills) else None,
            math.fsum(bill.seconds or 0.0 for bill in bills),
            self.kind,
            mean_running(
                [(stretch.call.tokens[place][1], len(stretch.call.tokens)) for stretch, place in stretches]
            ),
        )

    def running_joules(self) -> float:
        """Joules read for requests that aren't finished, as far as they are final."""
        with self._lock:
            return math.fsum(
                stretch.bills[place].joules or 0.0
                for index, stretches in self._stretches.items()
                if index not in self._finished
                for stretch, place in stretches
                if stretch.call.settled
            )

    def forgo(self) -> tuple[int, float]:
        """Give up what isn't finished: how many requests, and the joules that are overhead now."""
        with self._lock:
            joules = 0.0
            for stretches in self._stretches.values():
                for stretch, place in stretches:
                    whole = stretch.call.joules if stretch.call.settled else None
                    if whole:
                        joules += self._ledger.forgo(
                            stretch.call, (stretch.bills[place].joules or 0.0) / whole
                        )
            return len(self._stretches), joules


def mean_running(stretches: Sequence[tuple[int, int]]) -> float | None:
    """Requests at a time over an answer, from the tokens written and the requests running in each of its stretches:
    the harmonic mean, since each token takes its part of a step."""
    written = sum(tokens for tokens, _ in stretches)
    if not written:
        return None
    return written / math.fsum(tokens / running for tokens, running in stretches)

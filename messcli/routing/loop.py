"""The loop: a window of requests is decided, asked, and folded in. Live, recorded and simulated runs share it.

A window's decisions stand before any of it runs, so its lines are finished in input order as answers come. What
the loop yields is all that a journal needs to take the run up again at that place: the same lines, the same
decisions, and only what wasn't answered is asked. Knows the controller and a source of outcomes; knows nothing
of files, states or terminals.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

from messcli.records import Outcome, Rejected, Request
from messcli.routing.asking import Asking, Pauses, no_pause
from messcli.routing.controller import Controller
from messcli.routing.failures import Contact
from messcli.routing.line import Chunk, Line, Look, Planned, Reader, Unfinished
from messcli.routing.sla import DEFAULT_PLAN
from messcli.routing.source import OutcomeSource


def chunks(
    lines: Iterable[Line | None],
    controller: Controller,
    source: OutcomeSource,
    *,
    unfinished: Unfinished | None = None,
    linger: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
    look: Look | None = None,
    readers: Sequence[Reader] = (),
    pause: Pauses = no_pause,
    halt: Callable[[], None] | None = None,
) -> Iterator[Chunk]:
    """Algorithm 1, a window at a time: decide in order, ask the models, fold in order, close the window.

    The first chunk of a window carries nothing but what was decided, the last one ends it. When the source ends
    early, so does the loop.

    Args:
        lines: None says that no line came for a moment (a pipe).
        unfinished: is taken up first, with those of its lines that the input still has.
        linger: seconds from a window's first line after which it closes with what has come.
        look: finds accuracies that the source doesn't know.
        readers: have answers read.
        pause: waits while no model is there.
        halt: makes the source end early, with what is under way. It is called at the first request that no model
            answers or whose answer isn't scored, which counts as not asked then; None: such a request is finished.

    Raises:
        ModelUnavailable: no model is there, and `pause` gave up. What was finished and answered stands.
        MessError: what `halt` was called for, once the source has ended.
    """
    iterator = iter(lines)
    contact = Contact()

    def window(planned: Sequence[Planned], known: Mapping[int, Mapping[int, Outcome]]) -> Asking:
        return Asking(planned, controller, source, clock, look, readers, contact, pause, halt, known)

    if unfinished is not None:
        planned, others = _taken_up(iterator, unfinished)
        if (
            not planned and not others
        ):  # the input has nothing to do: the window waits for one that has its lines
            return
        iterator = chain(others, iterator)
        known = {
            place: kept
            for place, item in enumerate(planned)
            if (kept := _known(item.line, unfinished, controller.models))
        }
        yield Chunk(
            planned, ahead=[(place, m, one) for place, kept in known.items() for m, one in kept.items()]
        )
        work = window(planned, known)
        yield from work.run()
        if not work.ended:
            return
    while batch := _batch(iterator, controller.window(), linger, clock):
        planned = _decide(batch, controller, source)
        yield Chunk(planned)
        work = window(planned, {})
        yield from work.run()
        if not work.ended:
            return


def _known(line: Line, unfinished: Unfinished, models: int) -> dict[int, Outcome]:
    """What is kept of a line of an unfinished window. That a model wasn't there counts where another one answered:
    else it is asked again."""
    kept = {m: one for m in range(models) if (one := unfinished.answers.get((line.key, m))) is not None}
    answered = any(one.error is None for one in kept.values())
    return {m: one for m, one in kept.items() if answered or one.fault != "away"}


def _batch(lines: Iterator[Line | None], size: int, linger: float, clock: Callable[[], float]) -> list[Line]:
    batch: list[Line] = []
    closes = math.inf
    for line in lines:
        if line is not None:
            if not batch and linger < math.inf:
                closes = clock() + linger
            batch.append(line)
        if len(batch) == size or (batch and closes < math.inf and clock() >= closes):
            break
    return batch


def _taken_up(
    lines: Iterator[Line | None], unfinished: Unfinished
) -> tuple[list[Planned], list[Line | None]]:
    """The lines of the window as the input has them now, in the window's order; and others that were read meanwhile.

    An input that is as it was has nothing else before them. Where it was changed, the search ends after as many
    other lines as the window had: those that weren't found by then are decided anew when they come.
    """
    found: dict[tuple[bytes, bytes], Line] = {}
    others: list[Line | None] = []
    wanted = unfinished.decisions
    while len(found) < len(wanted) and len(others) <= len(wanted):
        try:
            line = next(lines)
        except StopIteration:
            break
        if line is None:
            continue
        identity = (line.key, line.digest)
        if identity in wanted:
            found[identity] = line
        else:
            others.append(line)
    planned = []
    for identity, decision in wanted.items():
        if identity in found:
            line = found[identity]
            if decision is None and isinstance(line, Request):
                line = _too_long(line)
            planned.append(Planned(line, decision))
    return planned, others


def _decide(batch: Sequence[Line], controller: Controller, source: OutcomeSource) -> list[Planned]:
    """Decide a window; requests that fit no model's context are rejected."""
    requests = [line for line in batch if isinstance(line, Request)]
    allowed = source.allowed(requests)
    fitting = [request for request, models in zip(requests, allowed, strict=True) if models]
    checkers = source.checkers if controller.has_answers_read else {}
    decisions = iter(controller.decide(fitting, [models for models in allowed if models], checkers))
    can = iter(allowed)
    return [
        Planned(line, None)
        if isinstance(line, Rejected)
        else Planned(line, next(decisions))
        if next(can)
        else Planned(_too_long(line), None)
        for line in batch
    ]


def _too_long(request: Request) -> Rejected:
    why = "the prompt is longer than every model's context. Shorten it"
    plan = request.plan or DEFAULT_PLAN
    return replace(request.reject(why), key=request.key, digest=request.digest, plan=plan)

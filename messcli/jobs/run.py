"""A job over the requests of an input, of whatever kind: `route` and `record` are two.

Puts a brief, a state, a controller, models and the loop together, in order; knows nothing of what is in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from messcli.jobs.beginning import begin, open_state
from messcli.jobs.brief import brief_of
from messcli.jobs.config import RouteConfig
from messcli.jobs.ending import sum_up
from messcli.jobs.fleet import LazyLive
from messcli.jobs.input import Input
from messcli.jobs.resume import CreateController, unfinished_window
from messcli.jobs.session import MakeRow, Patience, RowText, Session
from messcli.jobs.summary import Summary
from messcli.jobs.tally import Progress, Tally
from messcli.jobs.watch import Watched
from messcli.signals import stop_signals


@dataclass(frozen=True, slots=True)
class Job:
    """What differs between the commands that share the loop, the state and the output."""

    controller: CreateController
    row: MakeRow
    audits: bool = False  # it may do without references
    scores: bool = False  # a row that the metric failed on has `error`


def run_job(
    config: RouteConfig,
    job: Job,
    on_progress: Callable[[Progress], None] | None,
    tell: Callable[[str], None],
) -> Summary:
    """Work `config.input` off into `config.output`, going on where an earlier run stopped.

    Args:
        on_progress: called after every window. With one, the input's lines are counted first.
        tell: takes lines for the user's eyes (what the meter is, what went wrong and was survived).

    Raises:
        MessError: with what the user can do; all finished windows are kept.
    """
    brief = brief_of(config, may_audit=job.audits)
    zoo, truth, calibration = brief.zoo, brief.truth, brief.calibration
    source = Input(config.input, config.reading)
    with ExitStack() as stack:
        stop = stack.enter_context(stop_signals(tell, "answers"))
        state = stack.enter_context(open_state(config, tell))
        terms, controller = begin(state, config, brief, source, job.controller, tell)
        total = source.total if on_progress else None
        lines = truth.of(stack.enter_context(source.lines(tell)))
        feed = source.feed(lines, config.promise.plan, brief.alphas, state, stop)
        live = stack.enter_context(
            LazyLive(config.running, zoo, truth.scored, calibration, tell, stop, truth.judge)
        )
        readers = brief.readers(terms.setup.seed)
        if config.running.preload:
            live.open().load()
        tally = Tally(zoo.names, controller, calibration, zoo.tariff)
        watched = Watched(live, lambda: on_chunk())
        session = Session(
            state=state,
            controller=controller,
            source=watched,
            feed=feed,
            text=RowText(job.row, zoo.names, config.writing.columns),
            tally=tally,
            period=terms.period,
            stop=stop,
            tell=tell,
            look=truth.look(len(zoo.models)),
            readers=readers,
            linger=math.inf if config.reading.linger is None else config.reading.linger,
            scores=job.scores,
            pause=Patience(config.running.patience, stop, tell),
            halt=stop.halt if config.reading.on_error == "stop" else None,
        )

        def on_chunk() -> None:
            if on_progress:
                on_progress(tally.progress(feed.already_done, total, watched.activity))

        ended = session.run(on_chunk, unfinished=unfinished_window(state))
        for reader in readers:
            for line in reader.notes():
                tell(line)
        summary = sum_up(state, brief, terms, tally, feed, live, None if ended else stop.signal)
        # that of the models is of the last window: a later one would have met it
        failure = feed.failure or live.fault
        if ended and failure is not None:
            raise failure
        return summary

"""`route`: requests in, rows out, every window committed.

Knows what a row of it looks like, and which controller decides; all else is as in every job: `run.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from messcli.files.dialects import load_dialect
from messcli.jobs.config import RouteConfig
from messcli.jobs.row import routed_row
from messcli.jobs.run import Job, run_job
from messcli.jobs.summary import Summary
from messcli.jobs.tally import Progress
from messcli.routing.setup import create_controller


def route(
    config: RouteConfig,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Summary:
    """Route `config.input` to `config.output`, going on where an earlier run stopped.

    Args:
        on_progress: called after every window. With one, the input's lines are counted first.
        tell: takes lines for the user's eyes (what the meter is, what went wrong and was survived).

    Raises:
        MessError: with what the user can do; all finished windows are kept.
    """
    make = partial(routed_row, writing=config.writing)
    write = None if config.reading.format is None else load_dialect(config.reading.format).write
    row = make if write is None else lambda line, names: write(make(line, names))
    return run_job(config, Job(create_controller, row, audits=True, scores=True), on_progress, tell)

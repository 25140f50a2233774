"""What `route` and `record` are asked to do: one object per heading of `--help`, with its options as fields.

None means: as the zoo file says, or the default. `gathered` fills nested objects from flat options.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from messcli.files.requests import InputFields
from messcli.routing.setup import Setup

LOCAL, RAY = "local", "ray"

Config = TypeVar("Config")


def gathered(kind: type[Config], options: Mapping[str, Any]) -> Config:
    """A config object from options by their names, however deep their fields lie.

    A name that occurs at several depths is the outermost field's; at one depth, the first one's.
    Raises TypeError for a name that no field has.
    """
    left = dict(options)
    members = fields(kind)  # type: ignore[arg-type]  # it is a dataclass
    values = {one.name: left.pop(one.name) for one in members if one.name in left}
    for one in members:
        if one.name not in values and one.default_factory is not MISSING:
            values[one.name] = _with(one.default_factory(), left)
    if left:
        raise TypeError(f"{kind.__name__} has no field {', '.join(left)}")
    return kind(**values)


def _with(group: Any, options: dict[str, Any]) -> Any:
    """`group` with the options that are fields of it or of what it holds; they are taken out of `options`."""
    if not is_dataclass(group) or isinstance(group, type):
        return group
    names = [one.name for one in fields(group)]
    values = {name: options.pop(name) for name in names if name in options}
    values.update({name: _with(getattr(group, name), options) for name in names if name not in values})
    return replace(group, **values)


@dataclass(frozen=True, slots=True)
class Promise:
    """What is promised, and to whom."""

    alpha: float | None = None  # mean accuracy, in [0, 1]
    metric: str | None = None
    against: str | None = None  # "references" or "largest": what answers are compared with
    sure: bool = False  # the bound on the mean is to meet alpha, not the estimate alone
    plan: str | None = None  # of requests that name none
    period: str | None = None  # contract period; None: the one that is open
    horizon: int | None = None  # requests that the period will have; None: as said before


@dataclass(frozen=True, slots=True)
class Running:
    """How and where models run, and who meters them. Nothing here changes what a model answers."""

    meter: str = "auto"
    calibration: Path | None = None  # None: calibration.json beside the zoo file, or in the working folder
    no_calibration: bool = False  # without one, even if it is there
    batch_size: int | None = None
    preload: bool = False
    max_loaded: int | None = (
        None  # models in memory at a time, those on the same weights as one; None: as many as there is memory for
    )
    engine: str = LOCAL
    address: str | None = None  # of the Ray cluster; None: $RAY_ADDRESS, else a cluster of this machine alone
    patience: float = 60.0  # seconds that a run waits while no model answers


@dataclass(frozen=True, slots=True)
class Keeping:
    """Where what is learnt and done is kept."""

    learn_from: str | None = None  # what an earlier job taught: its state, or a table of outcomes
    state: Path | None = None  # None: beside the output; with standard output, nothing is kept
    wait_seconds: float = 0.0  # for another process that holds the state


@dataclass(frozen=True, slots=True)
class Reading:
    """How the input is read."""

    format: str | None = None  # the dialect; None: guessed from the first line
    limit: int | None = None  # lines
    on_error: str = "skip"
    retry: str = "failed"  # which failed requests are asked again: failed, all or none
    linger: float | None = (
        None  # seconds from a window's first line, after which it closes with what has come
    )
    fields: InputFields = field(default_factory=InputFields)


@dataclass(frozen=True, slots=True)
class Writing:
    """What stands in the rows."""

    include_prompt: bool = False
    columns: tuple[str, ...] = ()  # empty: all
    rename: Mapping[str, str] = field(default_factory=dict)  # our name of a column -> the one to write


@dataclass(frozen=True, slots=True)
class RouteConfig:
    """What `messcli route` was asked to do."""

    input: str
    output: str
    zoo: str | None = None
    promise: Promise = field(default_factory=Promise)
    setup: Setup = field(default_factory=lambda: Setup(window=None))
    running: Running = field(default_factory=Running)
    keeping: Keeping = field(default_factory=Keeping)
    reading: Reading = field(default_factory=Reading)
    writing: Writing = field(default_factory=Writing)

    @classmethod
    def of(cls, input: str, output: str, **options: Any) -> RouteConfig:  # noqa: A002  # the field's name
        """From options by their names, as the command line has them: RouteConfig.of("in.jsonl", "-", alpha=0.7)."""
        return gathered(cls, {"input": input, "output": output, **options})

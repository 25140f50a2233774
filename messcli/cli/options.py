"""Every option of every command, declared once, in groups: a group is a heading of `--help-all` and, mostly, one object
of a configuration whose fields have the options' names.

Knows click; knows nothing of what a command does with a value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import click.shell_completion

from messcli.errors import EXIT_SLA_MISSED
from messcli.registry import DIALECTS, METERS, METRICS, POLICIES, PREDICTORS, Registry

MOST = 10**12  # of anything that is counted; what is larger is a slip, and overflows somewhere
LONGEST_SECONDS = 1e9  # 30 years


# ---- kinds of values -----------------------------------------------------------------------------


class WindowSize(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.2 only
    """A number of requests, or `auto`: None."""

    name = "window"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return None if value == "auto" else COUNT.convert(value, param, ctx)


class Name(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.2 only
    """A name of a registry, looked up when it is asked for: names of installed packages are among them."""

    name = "name"

    def __init__(self, registry: Registry, *others: str, open_ended: bool = False) -> None:
        self._registry = registry
        self._others = others  # further choices
        self._open_ended = open_ended  # what is no name is looked at by whoever takes the value

    @property
    def choices(self) -> tuple[str, ...]:
        """All that `--help` lists."""
        return (*self._registry, *self._others)

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str | None:
        return None if self._open_ended else f"[{'|'.join(self.choices)}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not self._open_ended and value not in self.choices:
            self.fail(self._registry.unknown(value, *self._others), param, ctx)
        return value

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        return [
            click.shell_completion.CompletionItem(name)
            for name in self.choices
            if name.startswith(incomplete)
        ]


class Number(click.FloatRange):
    """A finite number in a range: `nan` is in every range, and `inf` in every open one."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no number: write a finite one.", param, ctx)
        return number


COUNT, SEED = click.IntRange(1, MOST), click.IntRange(0, 2**63 - 1)
SECONDS = Number(0, LONGEST_SECONDS)
PATH = click.Path(path_type=Path, dir_okay=False)


def names(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Names with commas between them: a click callback."""
    return tuple(name.strip() for name in value.split(",")) if value else ()


def numbers(within: Number, default: tuple[None, ...] = ()) -> Callable[..., Any]:
    """Numbers with commas between them, such as 0.01,0.1,1: makes a click callback."""

    def read(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float | None, ...]:
        if value is None:
            return default
        return tuple(within.convert(part.strip(), param, ctx) for part in value.split(","))

    return read


def lengths(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    """Lengths with commas between them, such as 16,64,256: a click callback."""
    parts = [part.strip() for part in value.split(",")] if value else []
    if not all(part.isascii() and part.isdecimal() and len(part) < 10 and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{value!r}: give whole numbers above 0, such as 16,64,256")
    return tuple(map(int, parts))


def renames(ctx: click.Context, param: click.Parameter, value: str | None) -> dict[str, str]:
    """New names with commas between them, such as output=answer,model=served: a click callback."""
    pairs = [part.split("=") for part in value.split(",")] if value else []
    if not all(len(pair) == 2 and all(name.strip() for name in pair) for pair in pairs):
        raise click.BadParameter(f"{value!r}: write it as output=answer,model=served")
    return {old.strip(): new.strip() for old, new in pairs}


# ---- options -------------------------------------------------------------------------------------


class Option(click.Option):
    """An option whose help lists the names of its registry, where it says {names}."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        record = super().get_help_record(ctx)
        if record is None:
            return None
        # click shows ranges as 1<=x<=1000000000000; a value outside of one is told with it
        text = re.sub(r"(; |  \[)[^];]*x[<>][^];]*(?=[];])", r"\1", record[1])
        text = re.sub(r"(; )+(?=\])|  \[\]", "", text).replace("  [; ", "  [")
        if isinstance(self.type, Name):
            text = text.replace("{names}", ", ".join(self.type.choices))
        return record[0], text


def option(*declared: str, **settings: Any) -> Option:
    """As `click.option` takes it."""
    return Option(list(declared), **settings)


@dataclass(frozen=True)
class Group:
    """Options under one heading."""

    heading: str
    options: Sequence[Option]

    def only(self, *wanted: str) -> Group:
        """Those whose values have these names."""
        known = {one.name: one for one in self.options}
        return Group(self.heading, [known[name] for name in wanted])

    def also(self, *more: Option) -> Group:
        """With further ones before its own."""
        return Group(self.heading, [*more, *self.options])

    def copies(self) -> list[click.Parameter]:
        """For one command: what is set on them there (the variable's name) concerns no other."""
        return [copy(one) for one in self.options]


QUIET = option(
    "-q", "--quiet", is_flag=True, help="Warnings and errors only: no summary and no progress bar."
)

READING = Group(
    "Input and output",
    [
        option(
            "--format",
            type=Name(DIALECTS),
            metavar="NAME",
            help="The format of INPUT. {names}: guessed from its first line, and said. "
            "Given, openai-batch is the output's format too.",
        ),
        option(
            "--prompt-field",
            "prompt",
            default="prompt",
            show_default=True,
            metavar="NAME",
            help="The input's name for the prompt; a dot leads into objects (data.question).",
        ),
        option(
            "--reference-field",
            "reference",
            default="reference",
            show_default=True,
            metavar="NAME",
            help="... for the reference.",
        ),
        option("--id-field", "id", default="id", show_default=True, metavar="NAME", help="... for the id."),
        option("--plan-field", default="plan", show_default=True, metavar="NAME", help="... for the plan."),
        option(
            "--limit", type=click.IntRange(0, MOST), metavar="N", help="Only the first N lines of the input."
        ),
        option(
            "--linger",
            type=SECONDS,
            metavar="SECONDS",
            help="On a pipe that is slower than the models: close a window so long after its first line, with what has "
            "come. Without: a window waits until it is full.",
        ),
        option(
            "--on-error",
            type=click.Choice(["skip", "stop"]),
            default="skip",
            show_default=True,
            help="A bad line or failed request becomes a row with `error`, or ends the run.",
        ),
        option(
            "--retry",
            type=click.Choice(["failed", "all", "none"]),
            default="failed",
            show_default=True,
            help="Which requests with an error row are asked again: those that failed and might not the next time "
            "(3 tries each), all, or none.",
        ),
    ],
)

OUTPUT = option(
    "-o",
    "--output",
    required=True,
    metavar="FILE",
    help="Where the rows go, in input order. .gz compresses, - is standard output.",
)

WRITING = Group(
    "Input and output",
    [
        option("--include-prompt", is_flag=True, help="Copy prompt and reference to the rows."),
        option("--fields", "columns", callback=names, metavar="A,B,...", help="Only these columns."),
        option(
            "--rename",
            callback=renames,
            metavar="A=B,...",
            help="Call our column A by the name B, where the input has a field A of its own.",
        ),
        QUIET,
    ],
)

PROMISE = Group(
    "What is promised",
    [
        option(
            "--alpha",
            type=float,
            metavar="A",
            help="Promised mean accuracy, 0 to 1. Else alpha of the zoo file.",
        ),
        option(
            "--metric",
            type=Name(METRICS, open_ended=True),
            metavar="NAME",
            help="How an answer is scored. {names}, or your own module:function.",
        ),
        option(
            "--against",
            type=click.Choice(["references", "largest"]),
            help="What answers are compared with. `largest`: with that model's own answers, where a coin has it answer "
            "as well; references aren't needed. Default: as [sla] of the zoo file says, else references.",
        ),
        option(
            "--sure",
            is_flag=True,
            help="With --against largest: aim so that the bound on the mean meets alpha, not the estimate alone.",
        ),
        option(
            "--check-sla",
            is_flag=True,
            help=f"Exit {EXIT_SLA_MISSED} when the promise isn't kept. Failed requests count 0, see --ignore-failures.",
        ),
        option("--ignore-failures", is_flag=True, help="With --check-sla: leave failed requests out."),
        option(
            "--plan", metavar="NAME", help="The plan ([plans] in the zoo file) of requests that name none."
        ),
        option(
            "--period",
            metavar="NAME",
            help="The contract period, such as 2026-12: each has its own queue and ledger, and all share what is "
            "learnt. Default: the one that is open.",
        ),
        option(
            "--horizon",
            type=COUNT,
            metavar="T",
            help="How many requests the period will have, where that is known.",
        ),
    ],
)

RUNNING = Group(
    "How models run",
    [
        option(
            "--zoo",
            metavar="FILE",
            help="The models. Else ./zoo.toml, else $MESSCLI_ZOO, else the bundled zoo.",
        ),
        option(
            "--window",
            type=WindowSize(),
            default="auto",
            show_default=True,
            metavar="N|auto",
            help="Requests decided together. They are batched, too; 1 is the paper's loop, auto as many as is known "
            "enough for.",
        ),
        option(
            "--meter",
            type=Name(METERS, open_ended=True),
            default="auto",
            show_default=True,
            metavar="KIND",
            help="What reads the joules. auto, {names}, or replay:FILE.",
        ),
        option(
            "--calibration",
            type=PATH,
            metavar="FILE",
            help="What `messcli calibrate` measured. Default: calibration.json beside the zoo file, else in this "
            "folder.",
        ),
        option(
            "--no-calibration",
            is_flag=True,
            help="Learn what models cost from this run alone, calibrated or not.",
        ),
        option(
            "--batch-size",
            type=COUNT,
            metavar="N",
            help="Requests per model call. Default: as memory allows.",
        ),
        option("--preload", is_flag=True, help="Load every model up front instead of on first use."),
        option(
            "--max-loaded",
            type=COUNT,
            metavar="N",
            help="Checkpoints in memory at a time; the least recently used makes room. Default: as memory allows.",
        ),
        option(
            "--patience",
            type=SECONDS,
            default=60.0,
            show_default=True,
            metavar="SECONDS",
            help="Wait so long in all while no model answers; then exit 69, and the same command goes on later.",
        ),
        option(
            "--engine",
            type=click.Choice(["local", "ray"]),
            default="local",
            show_default=True,
            help="Where models run: in this process, or as actors of a Ray cluster.",
        ),
        option(
            "--address",
            metavar="HOST:PORT",
            help="The Ray cluster. Default: $RAY_ADDRESS, else this machine.",
        ),
    ],
)

KEEPING = Group(
    "What is kept",
    [
        option(
            "--state",
            type=PATH,
            metavar="FILE",
            help="What is learnt and done, to go on with. Default: OUTPUT.state; none for standard output.",
        ),
        option(
            "--wait",
            "wait_seconds",
            type=SECONDS,
            default=0.0,
            metavar="SECONDS",
            help="Wait so long for another process that holds the state.",
        ),
    ],
)

LEARN_FROM = option(
    "--learn-from",
    metavar="STATE|TABLE",
    help="Begin with what an earlier job of the same models taught: its state, or a table of `messcli record`. It "
    "fades as answers come.",
)

PAPER = Group(
    "The paper's algorithm",
    [
        option(
            "--policy",
            type=Name(POLICIES),
            default="mess+",
            show_default=True,
            help="How a model is chosen.",
        ),
        option(
            "--predictor",
            type=Name(PREDICTORS),
            default="ridge",
            show_default=True,
            help="How accuracy is predicted from a prompt.",
        ),
        option(
            "--v",
            type=Number(0, min_open=True),
            metavar="V",
            help="Weight of energy against the SLA (equation 3). Default: found by the program.",
        ),
        option(
            "--c",
            type=Number(0),
            metavar="C",
            help="Exploration: p_t = min(1, C / cube root of t). Default: 3 with --v, else 0.05 after some "
            "in a row, and less where the whole zoo is dear.",
        ),
        option(
            "--learn",
            type=click.Choice(["all", "explored"]),
            default="all",
            show_default=True,
            help="Learn from every request with a reference, or from explorations only (the paper).",
        ),
        option(
            "--serve",
            type=click.Choice(["largest", "best"]),
            default="largest",
            show_default=True,
            help="What an exploration serves. `best` picks by the reference, so the reported accuracy flatters.",
        ),
        option(
            "--no-look",
            is_flag=True,
            help="Serve answers as they are. Default: a larger model is asked as well where an answer's token "
            "probabilities make that worth its joules. Never with --v.",
        ),
        option(
            "--seed", type=SEED, default=0, show_default=True, help="Decides which requests are explored."
        ),
    ],
)

# ---- record --------------------------------------------------------------------------------------

RECORDING = Group(
    "What is recorded",
    [
        option(
            "--checks",
            is_flag=True,
            help="The largest model also reads the others' answers, and says how likely each is right ([look] of the "
            "zoo file).",
        ),
    ],
)

# ---- calibrate -----------------------------------------------------------------------------------

MEASURING = Group(
    "What is measured",
    [
        option("--quick", is_flag=True, help="A first look: few cells, 40 seconds."),
        option(
            "--budget",
            "budget_seconds",
            type=Number(0, LONGEST_SECONDS, min_open=True),
            metavar="SECONDS",
            help="Measure no longer than that, but every cell once. Default: 600.",
        ),
        option("--prompt-tokens", callback=lengths, metavar="N,M,...", help="The grid's prompt lengths."),
        option("--output-tokens", callback=lengths, metavar="N,M,...", help="... and its output lengths."),
        option(
            "--window",
            type=COUNT,
            default=64,
            show_default=True,
            metavar="N",
            help="Requests that `route` will have under way at a time, over all models: the load that is measured.",
        ),
        option("--net", is_flag=True, help="Show joules net of idling; the file has both."),
        option("--seed", type=SEED, default=0, show_default=True, help="Shuffles the order of the cells."),
        option("--fresh", is_flag=True, help="Forget what an earlier run measured."),
    ],
)

# ---- simulate ------------------------------------------------------------------------------------

COMPARING = Group(
    "What is compared",
    [
        option(
            "--alpha",
            "alphas",
            callback=numbers(Number(0, 1)),
            metavar="A,B,...",
            help="Promised mean accuracies.",
        ),
        option(
            "--alpha-at",
            callback=numbers(Number(0, 1)),
            metavar="F,G,...",
            help="... as parts of the way from the smallest model's mean accuracy to the best one's.",
        ),
        option(
            "--policy",
            "policies",
            type=Name(POLICIES, "oracle"),
            multiple=True,
            metavar="NAME",
            help="Only this policy; may be repeated. {names}. Default: all.",
        ),
        option(
            "--order-seeds",
            "orders",
            type=COUNT,
            metavar="N",
            help="Try N shuffled request orders. Default: the table's own order.",
        ),
        option(
            "--seed", type=SEED, default=0, show_default=True, help="Of the first order and its explorations."
        ),
        option(
            "--window",
            type=WindowSize(),
            default=1,
            show_default=True,
            metavar="N|auto",
            help="As of `route`.",
        ),
        option(
            "--best",
            is_flag=True,
            help="Name the V and c that meet alpha for the least energy, and check them.",
        ),
        option("--jobs", type=COUNT, metavar="N", help="Processes. Default: one per core."),
    ],
)

SWEEPING = Group(
    "The paper's algorithm",
    [
        option(
            "--v",
            callback=numbers(Number(0, min_open=True), default=(None,)),
            metavar="V,W,...",
            help="Weights of energy to try. Without: found by the program.",
        ),
        option(
            "--c",
            callback=numbers(Number(0), default=(None,)),
            metavar="C,D,...",
            help="Exploration constants to try.",
        ),
        *PAPER.only("learn", "predictor", "no_look").options,
        option(
            "--paper", metavar="DIR", help="Regenerate the paper's tables and figures on this table in DIR."
        ),
    ],
)

TABLE = Group(
    "The table",
    [
        option(
            "--metric",
            type=Name(METRICS, open_ended=True),
            metavar="NAME",
            help="Scores outputs that have no accuracy, by the requests' references. {names}, or your own "
            "module:function.",
        ),
        option(
            "--models",
            callback=names,
            metavar="A,B,...",
            help="The zoo, smallest to largest. Default: as in the table's first line.",
        ),
        option("--complete-only", is_flag=True, help="Leave out requests that lack an outcome."),
    ],
)

AUDITING = Group(
    "Without references",
    [
        option(
            "--audit",
            is_flag=True,
            help="Hide the accuracies but where an audit finds them: a coin with a known probability asks the largest "
            "model as well.",
        ),
        option(
            "--against",
            type=click.Choice(["largest"]),
            help="Score outputs by --metric against the largest model's own.",
        ),
        option("--sure", is_flag=True, help="With --audit: aim so that the bound on the mean meets alpha."),
    ],
)

IN_LOAD = Group(
    "Engines in load",
    [
        option(
            "--engines",
            metavar="FILE",
            help="Play the runs through engines in load: measured joules and seconds per step, by requests running.",
        ),
        option(
            "--engine",
            multiple=True,
            metavar="MODEL=ENTRY",
            help="The entry of --engines that a model runs on; may be repeated. Default: by name, else guessed and "
            "said.",
        ),
    ],
)

RESULTS = Group(
    "Output",
    [
        option("--out", metavar="FILE", help="One JSON line per policy, setting and order."),
        option("--plot", metavar="DIR", help="Draw the comparison into DIR, as SVG."),
        option(
            "--trace",
            metavar="FILE",
            help="Who was asked for each request, and when: one JSON line each, of one run.",
        ),
        QUIET,
    ],
)

"""The command line: parse, call one function, print. The only module that knows click and the terminal.

Nothing heavy is imported here: `messcli --help` answers at once.
"""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import click.shell_completion

from messcli import __version__
from messcli.errors import EXIT_ROWS_WITH_ERRORS, EXIT_SIGINT, EXIT_SLA_MISSED, Interrupted, MessError
from messcli.registry import DIALECTS, METERS, METRICS, POLICIES, PREDICTORS, Registry

if TYPE_CHECKING:
    from messcli.calibration import CalibrateProgress
    from messcli.jobs.summary import Progress


class _Group(click.Group):
    """Prints a MessError as one line and exits with its code; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MessError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)
        except BrokenPipeError:
            # The reader has gone (`| head -1`). Python would complain again when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)
        except KeyboardInterrupt as stopped:
            click.echo("stopped at once; run the same command again to go on", err=True)
            ctx.exit(128 + stopped.signal if isinstance(stopped, Interrupted) else EXIT_SIGINT)


CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(cls=_Group, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="messcli")
def main() -> None:
    """Route a batch of prompts over a zoo of language models: the promised mean accuracy, for few joules.

    \b
    Start with:
      messcli route samples/requests.jsonl -o out.jsonl

    stdout carries data only; everything else goes to stderr.
    """
    # The predictors' matrices are small: numpy's threads would only spin. (Models run on torch's own.)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


# ---- what options have in common -----------------------------------------------------------------


def _with_options_of(source: click.Command, *names: str) -> Callable[[click.Command], click.Command]:
    """Options that mean the same are defined once, by `source`."""

    def add(command: click.Command) -> click.Command:
        command.params.extend(copy(param) for param in source.params if param.name in names)
        return command

    return add


def _names(text: str | None) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(name.strip() for name in text.split(",")) if text else ()


def _numbers(
    low: float, high: float = float("inf"), *, low_open: bool = False, default: tuple[None, ...] = ()
) -> Callable[..., Any]:
    """Reads numbers with commas between them, such as 0.01,0.1,1: a click callback."""
    within = click.FloatRange(low, high, min_open=low_open)

    def read(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float | None, ...]:
        if value is None:
            return default
        return tuple(within.convert(float_of(part), param, ctx) for part in value.split(","))

    def float_of(part: str) -> float:
        try:
            number = float(part)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise click.BadParameter(f"{part.strip()!r} is no number; write them as 0.1,1,10")
        return number

    return read


def _renames(ctx: click.Context, param: click.Parameter, value: str | None) -> dict[str, str]:
    """Reads new names with commas between them, such as output=answer,model=served: a click callback."""
    pairs = [part.split("=") for part in value.split(",")] if value else []
    if not all(len(pair) == 2 and all(name.strip() for name in pair) for pair in pairs):
        raise click.BadParameter(f"{value!r}: write it as output=answer,model=served")
    return {old.strip(): new.strip() for old, new in pairs}


def _lengths(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    """Reads lengths with commas between them, such as 16,64,256: a click callback."""
    parts = [part.strip() for part in value.split(",")] if value else []
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{value!r}: give whole numbers above 0, such as 16,64,256")
    return tuple(map(int, parts))


class _Name(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.2 only
    """A name of a registry, looked up when it is asked for: names of installed packages are among them."""

    name = "name"

    def __init__(self, registry: Registry, *others: str, open_ended: bool = False) -> None:
        self._registry = registry
        self._others = others  # further choices
        self._open_ended = open_ended  # what is no name is looked at by whoever takes the value

    @property
    def choices(self) -> tuple[str, ...]:
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


class _Option(click.Option):
    """An option whose help lists the names of its registry, where it says {names}."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        record = super().get_help_record(ctx)
        if record is None or not isinstance(self.type, _Name):
            return record
        return record[0], record[1].replace("{names}", ", ".join(self.type.choices))


# ---- commands ------------------------------------------------------------------------------------


@main.command(short_help="Route a file of prompts: the main job.")
@click.argument("input", metavar="INPUT")
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="FILE",
    help="Where the rows go, one JSON line per request, in input order; .gz compresses, - is standard output.",
)
@click.option(
    "--zoo", metavar="FILE", help="The models. Else ./zoo.toml, else $MESSCLI_ZOO, else the bundled zoo."
)
@click.option(
    "--alpha", type=float, metavar="A", help="Promised mean accuracy, 0 to 1. Else alpha of the zoo file."
)
@click.option(
    "--metric",
    cls=_Option,
    type=_Name(METRICS, open_ended=True),
    metavar="NAME",
    help="{names}, or your own module:function.",
)
@click.option(
    "--policy",
    type=_Name(POLICIES),
    default="mess+",
    show_default=True,
    help="How a model is chosen.",
)
@click.option(
    "--v",
    type=click.FloatRange(min=0, min_open=True),
    metavar="V",
    help="Weight of energy against the SLA (equation 3). Default: found by the program.",
)
@click.option(
    "--c",
    type=click.FloatRange(min=0),
    metavar="C",
    help="Exploration: p_t = min(1, C / cube root of t). Default: 3 with --v, else 0.05 after some "
    "in a row, and less where the whole zoo is dear.",
)
@click.option(
    "--learn",
    type=click.Choice(["all", "explored"]),
    default="all",
    show_default=True,
    help="Learn from every request with a reference, or from explorations only (the paper).",
)
@click.option(
    "--predictor",
    type=_Name(PREDICTORS),
    default="ridge",
    show_default=True,
    help="How accuracy is predicted from a prompt.",
)
@click.option(
    "--serve",
    type=click.Choice(["largest", "best"]),
    default="largest",
    show_default=True,
    help="What an exploration serves. `best` picks by the reference, so the reported accuracy flatters.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Decides which requests are explored.")
@click.option(
    "--window",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Requests decided together, then batched; 1 is the paper's loop.",
)
@click.option("--limit", type=click.IntRange(min=0), metavar="N", help="Only the first N lines of the input.")
@click.option(
    "--state",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="What is learnt and done, to go on with. Default: OUTPUT.state; none for standard output.",
)
@click.option(
    "--wait",
    "wait_seconds",
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="SECONDS",
    help="Wait so long for another process that holds the state.",
)
@click.option("--plan", metavar="NAME", help="The plan ([plans] in the zoo file) of requests that name none.")
@click.option(
    "--period",
    metavar="NAME",
    help="The contract period, such as 2026-12: each has its own queue and ledger, and all share what is learnt. "
    "Default: the one that is open.",
)
@click.option(
    "--horizon",
    type=click.IntRange(min=1),
    metavar="T",
    help="How many requests the period will have, where that is known.",
)
@click.option(
    "--on-error",
    type=click.Choice(["skip", "stop"]),
    default="skip",
    show_default=True,
    help="A bad line or failed request becomes a row with `error`, or ends the run.",
)
@click.option(
    "--meter",
    cls=_Option,
    type=_Name(METERS, open_ended=True),
    default="auto",
    show_default=True,
    metavar="KIND",
    help="auto, {names}, or replay:FILE.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="What `messcli calibrate` measured. Default: calibration.json beside the zoo file, else in this folder.",
)
@click.option(
    "--no-calibration", is_flag=True, help="Learn what models cost from this run alone, calibrated or not."
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Requests per model call. Default: as memory allows.",
)
@click.option("--preload", is_flag=True, help="Load every model up front instead of on first use.")
@click.option(
    "--max-loaded",
    type=click.IntRange(min=1),
    metavar="N",
    help="Models in memory at a time; the least recently used one makes room. Default: as memory allows.",
)
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Where models run: in this process, or as actors of a Ray cluster.",
)
@click.option(
    "--address", metavar="HOST:PORT", help="The Ray cluster. Default: $RAY_ADDRESS, else this machine."
)
@click.option(
    "--format",
    type=_Name(DIALECTS),
    help="What the input is written in; guessed from its first line and said. "
    "Given, openai-batch is the output's format too.",
)
@click.option(
    "--prompt-field",
    "prompt",
    default="prompt",
    show_default=True,
    metavar="NAME",
    help="The input's name for the prompt.",
)
@click.option(
    "--reference-field",
    "reference",
    default="reference",
    show_default=True,
    metavar="NAME",
    help="... for the reference.",
)
@click.option("--id-field", "id", default="id", show_default=True, metavar="NAME", help="... for the id.")
@click.option(
    "--plan-field", "plan_field", default="plan", show_default=True, metavar="NAME", help="... for the plan."
)
@click.option(
    "--rename",
    callback=_renames,
    metavar="A=B,...",
    help="Call our column A by the name B, where the input has a field A of its own.",
)
@click.option("--include-prompt", is_flag=True, help="Copy prompt and reference to the rows.")
@click.option("--fields", "columns", metavar="A,B,...", help="Only these columns.")
@click.option(
    "--check-sla",
    is_flag=True,
    help=f"Exit {EXIT_SLA_MISSED} when the observed mean accuracy is below alpha.",
)
@click.option("-q", "--quiet", is_flag=True, help="No summary and no progress bar; warnings and errors only.")
def route(columns: str | None, check_sla: bool, quiet: bool, **options: Any) -> None:
    """Route every request of INPUT (JSON lines; .gz too, - is standard input) to one model of the zoo.

    A line is {"prompt": "...", "reference": "..."} or {"messages": [...]}; id and reference are optional,
    other fields pass through. What was finished is never done again: after a crash, a signal or a power
    cut, run the same command to go on.

    \b
    messcli route in.jsonl -o out.jsonl --zoo zoo.toml --alpha 0.7
    zcat in.jsonl.gz | messcli route - -o - --state my.state | jq .output
    """
    from messcli.jobs.config import RouteConfig
    from messcli.jobs.route import route

    config = RouteConfig.of(columns=_names(columns), **options)
    with _request_bar("route", quiet) as (on_progress, tell):
        summary = route(config, on_progress=on_progress, tell=tell)
    if not quiet:
        _show(summary.text())
    _exit_if_stopped(summary.stopped_by)
    if check_sla and summary.sla_missed:
        if quiet:  # cron mails what is printed
            _show(summary.missed())
        sys.exit(EXIT_SLA_MISSED)
    if summary.failed:
        sys.exit(EXIT_ROWS_WITH_ERRORS)


@_with_options_of(
    route,
    "output", "zoo", "metric", "window", "limit", "state", "wait_seconds", "on_error", "meter", "calibration",
    "no_calibration", "batch_size", "preload", "max_loaded", "engine", "address", "format", "prompt", "reference",
    "id", "quiet",
)  # fmt: skip
@main.command(short_help="Ask every model everything: an outcomes table for `simulate`.")
@click.argument("input", metavar="INPUT")
def record(quiet: bool, **options: Any) -> None:
    """Put every request of INPUT to every model of the zoo, and keep what each answered, scored and took.

    The table that comes of it is what `messcli simulate` judges policies on. Stopping and going on work as
    for `route`.

    \b
    messcli record in.jsonl -o outcomes.jsonl --zoo zoo.toml
    messcli simulate outcomes.jsonl --alpha 0.7
    """
    from messcli.jobs.config import RouteConfig
    from messcli.jobs.record import record

    config = RouteConfig.of(**options)
    with _request_bar("record", quiet) as (on_progress, tell):
        summary = record(config, on_progress=on_progress, tell=tell)
    if not quiet:
        _show(summary.text())
    _exit_if_stopped(summary.run.stopped_by)
    if summary.incomplete or summary.run.failed:
        sys.exit(EXIT_ROWS_WITH_ERRORS)


@_with_options_of(
    route, "zoo", "meter", "batch_size", "window", "format", "prompt", "reference", "id", "quiet"
)
@main.command(short_help="Measure what each model costs, by prompt and output length.")
@click.argument("prompts", required=False, metavar="[PROMPTS]")
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    help="Default: calibration.json beside the zoo file, in this folder for the bundled zoo; - is standard output.",
)
@click.option("--quick", is_flag=True, help="A first look: few cells, 40 seconds.")
@click.option(
    "--budget",
    "budget_seconds",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Measure no longer than that, but every cell once. Default: 600.",
)
@click.option("--prompt-tokens", callback=_lengths, metavar="N,M,...", help="The grid's prompt lengths.")
@click.option("--output-tokens", callback=_lengths, metavar="N,M,...", help="... and its output lengths.")
@click.option("--net", is_flag=True, help="Show joules net of idling; the file has both.")
@click.option("--seed", type=int, default=0, show_default=True, help="Shuffles the order of the cells.")
@click.option("--fresh", is_flag=True, help="Forget what an earlier run measured.")
def calibrate(net: bool, quiet: bool, **options: Any) -> None:
    """Measure joules per request of every model on a grid of lengths, and write calibration.json for `route`.

    With PROMPTS, a file of requests, the grid takes their lengths, and a sample of them is answered to learn how
    long answers are. Each cell is measured until its mean is known to 5 %, or the time is up. What is measured
    is kept: after a signal or a crash, and where not all has converged, run the same command to go on.

    \b
    messcli calibrate --quick
    messcli calibrate requests.jsonl --zoo zoo.toml --budget 1800
    """
    from messcli.calibration import CalibrateConfig, calibrate
    from messcli.jobs.config import gathered

    config = gathered(CalibrateConfig, options)
    with _time_bar("calibrate", quiet) as (on_progress, tell):
        summary = calibrate(config, on_progress=on_progress, tell=tell)
    _exit_if_stopped(summary.stopped_by)
    if not quiet:
        _show(summary.text(net=net))
    if summary.output == "-" and summary.calibration is not None:
        click.echo(summary.calibration.dumps(), nl=False)


@main.command(short_help="Compare policies on an outcomes table; no model runs.")
@click.argument("table", metavar="OUTCOMES")
@click.option(
    "--alpha", "alphas", callback=_numbers(0, 1), metavar="A,B,...", help="Promised mean accuracies."
)
@click.option(
    "--alpha-at",
    callback=_numbers(0, 1),
    metavar="F,G,...",
    help="... as parts of the way from the smallest model's mean accuracy to the best one's.",
)
@click.option(
    "--v",
    callback=_numbers(0, low_open=True, default=(None,)),
    metavar="V,W,...",
    help="Weights of energy to try. Without: found by the program.",
)
@click.option(
    "--c", callback=_numbers(0, default=(None,)), metavar="C,D,...", help="Exploration constants to try."
)
@click.option(
    "--policy",
    "policies",
    type=_Name(POLICIES, "oracle"),
    multiple=True,
    help="Only this policy; may be repeated. Default: all.",
)
@click.option(
    "--order-seeds",
    "orders",
    type=click.IntRange(min=1),
    metavar="N",
    help="Try N shuffled request orders. Default: the table's own order.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Of the first order and its explorations."
)
@click.option("--window", type=click.IntRange(min=1), default=1, show_default=True, help="As of `route`.")
@click.option(
    "--metric",
    type=_Name(METRICS, open_ended=True),
    metavar="NAME",
    help="Scores outputs that have no accuracy, by the requests' references.",
)
@click.option(
    "--models", metavar="A,B,...", help="The zoo, smallest to largest. Default: as in the table's first line."
)
@click.option("--complete-only", is_flag=True, help="Leave out requests that lack an outcome.")
@click.option("--jobs", type=click.IntRange(min=1), metavar="N", help="Processes. Default: one per core.")
@click.option(
    "--engines",
    metavar="FILE",
    help="Play the runs through engines in load: measured joules and seconds per step, by requests running.",
)
@click.option(
    "--engine",
    multiple=True,
    metavar="MODEL=ENTRY",
    help="The entry of --engines that a model runs on; may be repeated. Default: by name, else guessed and said.",
)
@click.option(
    "--trace",
    metavar="FILE",
    help="Who was asked for each request, and when: one JSON line each, of one run.",
)
@click.option("--out", metavar="FILE", help="One JSON line per policy, setting and order.")
@click.option("--plot", metavar="DIR", help="Draw the comparison into DIR, as SVG.")
@click.option(
    "--best", is_flag=True, help="Name the V and c that meet alpha for the least energy, and check them."
)
@click.option(
    "--paper", metavar="DIR", help="Regenerate the paper's tables and figures on this table in DIR."
)
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
def simulate(models: str | None, quiet: bool, **options: Any) -> None:
    """Run policies over OUTCOMES: a table of `record`, or the CSV of the MESS+ authors' simulator.

    Shows accuracy, joules per request with everything billed and as the paper counts them, and how often alpha
    was met over request orders. The loop is the one of `route`, with recorded outcomes in place of models.

    \b
    messcli simulate outcomes.jsonl --alpha 0.6,0.7 --order-seeds 20
    messcli simulate outcomes.jsonl --alpha 0.7 --v 0.01,0.1,1 --c 1,3 --out results.jsonl --plot plots
    messcli simulate outcomes.jsonl --alpha 0.7 --best
    messcli simulate outcomes.jsonl --alpha 0.7 --window 4096 --engines engines.json --trace trace.jsonl
    """
    from messcli.jobs.config import gathered
    from messcli.jobs.simulate import JudgeConfig, judge

    config = gathered(JudgeConfig, {"models": _names(models), **options})
    with _counting_bar("simulate", quiet) as on_progress:
        text = judge(config, on_progress)
    for line in text:
        click.echo(line)


_with_options_of(route, "learn", "predictor")(simulate)


@main.command(short_help="Is the promise kept, and what was saved?")
@click.argument("path", metavar="STATE|OUT")
@click.option(
    "--alpha",
    type=click.FloatRange(0, 1),
    metavar="A",
    help="The target, for an output file; a state knows it.",
)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option("--html", "html_path", metavar="FILE", help="Also write one self-contained page.")
@click.option(
    "--beside",
    metavar="STATE",
    help="Of the same input's run with --policy largest: compare with what it took.",
)
def report(path: str, alpha: float | None, as_json: bool, html_path: str | None, beside: str | None) -> None:
    """Report on a state (even while a run goes on) or on an output file of `route`.

    \b
    messcli report out.jsonl.state
    messcli report out.jsonl.state --html report.html
    messcli report out.jsonl --alpha 0.7 --json | jq .savings
    """
    import json

    from messcli.report import make_report
    from messcli.report.text import report_lines

    found = make_report(path, alpha, beside)
    if html_path is not None:
        from messcli.files.sinks import write_text
        from messcli.report.page import page

        write_text(Path(html_path), page(found), "--html")
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=2))
        return
    for line in report_lines(found):
        click.echo(line)


@_with_options_of(route, "wait_seconds")
@main.command(short_help="Print rows that a state keeps.")
@click.argument("state_path", metavar="STATE", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    default="-",
    show_default=True,
    metavar="FILE",
    help="The output whose rows are printed: of standard output the state keeps all, of a file those not yet on disk.",
)
def rows(state_path: Path, output: str, wait_seconds: float) -> None:
    """Print the rows again that `route -o - --state STATE` printed, for a reader that lost some.

    \b
    messcli rows my.state | sort -u
    """
    from messcli.state.database import print_rows

    print_rows(state_path, output, wait_seconds=wait_seconds)


# ---- the terminal --------------------------------------------------------------------------------


def _show(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(line, err=True)


def _exit_if_stopped(number: int | None) -> None:
    if number is not None:
        name = signal.Signals(number).name
        click.echo(f"stopped by {name}; run the same command again to go on", err=True)
        sys.exit(128 + number)


@contextmanager
def _bar(name: str, quiet: bool, **how: Any) -> Iterator[tuple[Any, Callable[[str], None]]]:
    """A bar on a terminal, nothing in a pipe; and a way to print lines without breaking it."""
    from tqdm import tqdm

    with tqdm(desc=name, file=sys.stderr, disable=True if quiet else None, dynamic_ncols=True, **how) as bar:

        def tell(line: str) -> None:
            if not quiet or line.startswith("warning"):
                bar.write(line, file=sys.stderr)

        yield bar, tell


@contextmanager
def _request_bar(
    name: str, quiet: bool
) -> Iterator[tuple[Callable[[Progress], None] | None, Callable[[str], None]]]:
    """Over requests; where none is shown, nobody need count the input's lines."""
    with _bar(name, quiet, unit="req") as (bar, tell):

        def on_progress(progress: Progress) -> None:
            bar.total = progress.total
            if bar.n == 0:
                bar.initial = progress.finished  # what earlier runs did is no speed of this one
            notes = [f"{progress.joules:.4g} J"]
            if progress.accuracy is not None:
                promised = "" if progress.alpha is None else f" (alpha {progress.alpha:g})"
                notes.append(f"accuracy {progress.accuracy:.4f}{promised}")
            if progress.explorations_left is not None:
                notes.append(f"~{progress.explorations_left:.0f} explorations left")
            bar.set_postfix_str(", ".join(notes), refresh=False)
            bar.update(progress.finished - bar.n)

        yield None if bar.disable else on_progress, tell


@contextmanager
def _time_bar(
    name: str, quiet: bool
) -> Iterator[tuple[Callable[[CalibrateProgress], None], Callable[[str], None]]]:
    """Over the expected seconds."""
    with _bar(name, quiet, bar_format="{desc} |{bar}| {postfix}") as (bar, tell):

        def on_progress(progress: CalibrateProgress) -> None:
            bar.total = progress.seconds + progress.seconds_left
            bar.n = progress.seconds
            bar.set_postfix_str(
                f"{progress.converged}/{progress.cells} cells converged, {progress.readings} readings, "
                f"about {progress.seconds_left:.0f} s left"
            )

        yield on_progress, tell


@contextmanager
def _counting_bar(name: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Over runs of simulations, of which there may be several rounds."""
    with _bar(name, quiet, unit="run") as (bar, _):

        def on_progress(done: int, total: int) -> None:
            if done < bar.n:
                bar.reset()
            bar.total = total
            bar.update(done - bar.n)

        yield on_progress


for command in main.commands.values():
    for option in command.params:
        if isinstance(option, click.Option):  # click's own way names them after the functions' parameters
            long = max(option.opts, key=len).removeprefix("--")
            option.envvar = f"messcli_{command.name}_{long}".upper().replace("-", "_")

"""The commands: each builds one configuration, calls one function and prints what came of it.

Nothing heavy is imported here: `messcli --help` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import click

from messcli import __version__
from messcli.cli.command import Program
from messcli.cli.options import (
    AUDITING,
    COMPARING,
    IN_LOAD,
    KEEPING,
    LEARN_FROM,
    MEASURING,
    OUTPUT,
    PAPER,
    PROMISE,
    QUIET,
    READING,
    RECORDING,
    RESULTS,
    RUNNING,
    SWEEPING,
    TABLE,
    WRITING,
    Group,
    Number,
    option,
)
from messcli.cli.terminal import counting_bar, put, request_bar, say, show, time_bar
from messcli.errors import EXIT_ERROR, EXIT_ROWS_WITH_ERRORS, EXIT_SLA_MISSED

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(cls=Program, context_settings=CONTEXT)
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


@main.command(
    short_help="Route a file of prompts: the main job.",
    groups=[READING.only("format").also(OUTPUT), PROMISE, RUNNING, KEEPING.also(LEARN_FROM), PAPER,
            READING.only("prompt", "reference", "id", "plan_field", "limit", "linger", "on_error", "retry"), WRITING],
    common=["output", "zoo", "alpha", "metric", "format", "window", "limit", "state", "meter", "check_sla", "quiet"],
)  # fmt: skip
@click.argument("input", metavar="INPUT")
def route(check_sla: bool, ignore_failures: bool, quiet: bool, **options: Any) -> None:
    """Route every request of INPUT (JSON lines; - is standard input) to one model.

    A line is {"prompt": "...", "reference": "..."} or {"messages": [...]}; id and
    reference are optional. After a crash, the same command goes on.

    \b
    messcli route in.jsonl -o out.jsonl --zoo zoo.toml --alpha 0.7
    zcat in.jsonl.gz | messcli route - -o - --state my.state | jq .output
    """
    from messcli.jobs.config import RouteConfig
    from messcli.jobs.route import route

    config = RouteConfig.of(**options)
    with request_bar("route", quiet) as (on_progress, tell):
        summary = route(config, on_progress=on_progress, tell=tell)
    if not quiet:
        say(*summary.text())
    _exit_if_stopped(summary.stopped_by)
    if quiet:  # cron mails what is printed
        say(*summary.requests.failures())
    missed = summary.promises.missed(failures=not ignore_failures)
    if check_sla and missed:
        if quiet:
            say(*missed)
        sys.exit(EXIT_SLA_MISSED)
    if summary.requests.failures():
        sys.exit(EXIT_ROWS_WITH_ERRORS)


@main.command(
    short_help="Ask every model everything: an outcomes table for `simulate`.",
    groups=[READING.also(OUTPUT), PROMISE.only("metric"),
            RECORDING, RUNNING, KEEPING, Group("Input and output", [QUIET])],
    common=["output", "zoo", "metric", "format", "window", "limit", "checks", "state", "meter", "quiet"],
)  # fmt: skip
@click.argument("input", metavar="INPUT")
def record(quiet: bool, checks: bool, **options: Any) -> None:
    """Put every request of INPUT to every model of the zoo, and keep what came of it.

    The table that comes of it is what `messcli simulate` judges policies on. Stopping
    and going on work as for `route`.

    \b
    messcli record in.jsonl -o outcomes.jsonl --zoo zoo.toml
    messcli simulate outcomes.jsonl --alpha 0.7
    """
    from messcli.jobs.config import RouteConfig
    from messcli.jobs.record import record

    config = RouteConfig.of(**options)
    with request_bar("record", quiet) as (on_progress, tell):
        summary = record(config, checks=checks, on_progress=on_progress, tell=tell)
    if not quiet:
        say(*summary.text())
    _exit_if_stopped(summary.run.stopped_by)
    if quiet:
        say(*summary.run.requests.failures())
    if summary.incomplete or summary.run.requests.failed or summary.run.requests.standing:
        sys.exit(EXIT_ROWS_WITH_ERRORS)


@main.command(
    short_help="Measure what each model costs, by prompt and output length.",
    groups=[
        MEASURING.also(
            option(
                "-o",
                "--output",
                metavar="FILE",
                help="Where the calibration goes. Default: calibration.json beside the zoo file, in this folder for "
                "the bundled zoo; - is standard output.",
            )
        ),
        RUNNING.only("zoo", "meter", "batch_size"),
        READING.only("format", "prompt", "reference", "id"),
        Group("Input and output", [QUIET]),
    ],
    common=["output", "zoo", "quick", "budget_seconds", "fresh", "meter", "format", "quiet"],
)
@click.argument("prompts", required=False, metavar="[PROMPTS]")
def calibrate(net: bool, quiet: bool, **options: Any) -> None:
    """Measure joules per request of every model, and write calibration.json for `route`.

    With PROMPTS, a file of requests, the grid takes their lengths, and a sample of them
    is answered to learn how long answers are. Each cell is measured until its mean is known
    to 5 %, or the time is up; run the same command to go on.

    \b
    messcli calibrate --quick
    messcli calibrate requests.jsonl --zoo zoo.toml --budget 1800
    """
    from messcli.calibration import CalibrateConfig, calibrate
    from messcli.jobs.config import gathered

    config = gathered(CalibrateConfig, options)
    with time_bar("calibrate", quiet) as (on_progress, tell):
        summary = calibrate(config, on_progress=on_progress, tell=tell)
    _exit_if_stopped(summary.stopped_by)
    if not quiet:
        say(*summary.text(net=net))
    if summary.output == "-" and summary.calibration is not None:
        put(summary.calibration.dumps())


@main.command(
    short_help="Compare policies on an outcomes table; no model runs.",
    groups=[COMPARING.also(LEARN_FROM), SWEEPING, TABLE, AUDITING, IN_LOAD, RESULTS],
    common=["alphas", "alpha_at", "policies", "orders", "window", "metric", "complete_only", "engines", "out", "plot",
            "best", "quiet"],
)  # fmt: skip
@click.argument("table", metavar="OUTCOMES")
def simulate(quiet: bool, **options: Any) -> None:
    """Run policies over OUTCOMES: a table of `record`, or the MESS+ authors' CSV.

    Shows accuracy, joules per request, and how often alpha was met over request orders.
    The loop is the one of `route`, with recorded outcomes in place of models.

    \b
    messcli simulate outcomes.jsonl --alpha 0.6,0.7 --order-seeds 20
    messcli simulate outcomes.jsonl --alpha 0.7 --v 0.01,0.1,1 --c 1,3 --out results.jsonl --plot plots
    messcli simulate outcomes.jsonl --alpha 0.7 --best
    messcli simulate outcomes.jsonl --alpha 0.7 --window 4096 --engines engines.json --trace trace.jsonl
    """
    from messcli.jobs.config import gathered
    from messcli.jobs.simulate import JudgeConfig, judge

    config = gathered(JudgeConfig, options)
    with counting_bar("simulate", quiet) as on_progress:
        text = judge(config, on_progress)
    show(text)


@main.command(
    short_help="Is the promise kept, and what was saved?",
    groups=[
        Group(
            "Options",
            [
                option(
                    "--alpha",
                    type=Number(0, 1),
                    metavar="A",
                    help="The target, for an output file; a state knows it.",
                ),
                option("--json", "as_json", is_flag=True, help="As JSON."),
                option("--html", "html_path", metavar="FILE", help="Also write one self-contained page."),
                option(
                    "--beside",
                    metavar="STATE",
                    help="Of the same input's run with --policy largest: compare with what it took.",
                ),
            ],
        )
    ],
)
@click.argument("path", metavar="STATE|OUT")
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

        write_text(Path(html_path), page(found), "--html", read=(path, beside))
    if as_json:
        put(json.dumps(found.as_json(), indent=2) + "\n")
    else:
        show(report_lines(found))


@main.command(
    short_help="Print rows that a state keeps.",
    groups=[
        Group(
            "Options",
            [
                option(
                    "-o",
                    "--output",
                    default="-",
                    show_default=True,
                    metavar="FILE",
                    help="The output whose rows are printed: of standard output the state keeps all, of a file those "
                    "not yet on disk.",
                ),
                *KEEPING.only("wait_seconds").options,
            ],
        )
    ],
)
@click.argument("state_path", metavar="STATE", type=click.Path(path_type=Path))
def rows(state_path: Path, output: str, wait_seconds: float) -> None:
    """Print the rows again that `route -o - --state STATE` printed, for a reader that lost some.

    \b
    messcli rows my.state | sort -u
    """
    from messcli.state.state import print_rows

    files = print_rows(state_path, output, wait_seconds=wait_seconds)
    if files:
        say(f"nothing to print: its rows stand in {', '.join(files)}")


@main.command(
    short_help="What works on this machine, and what would not.",
    groups=[
        RUNNING.only("zoo", "meter", "calibration"),
        KEEPING.only("state"),
        Group("Output", [option("--json", "as_json", is_flag=True, help="As JSON.")]),
    ],
)
def doctor(as_json: bool, **options: Any) -> None:
    """Look at versions, packages, cards, meters, free memory, zoo, calibration and state.

    Loads no model and changes nothing. Exits 1 when `route` could not run here.

    \b
    messcli doctor
    messcli doctor --zoo zoo.toml --state out.jsonl.state --json | jq .findings
    """
    import json

    from messcli.jobs.doctor import BAD, DoctorConfig, examine, lines
    from messcli.jobs.doctor import as_json as plain

    found = examine(DoctorConfig(**options))
    ready = all(finding.status != BAD for finding in found)
    if as_json:
        put(json.dumps({"ready": ready, "findings": plain(found)}, indent=2) + "\n")
    else:
        show(lines(found))
    if not ready:
        sys.exit(EXIT_ERROR)


def _exit_if_stopped(number: int | None) -> None:
    if number is not None:
        say(f"stopped by {signal.Signals(number).name}; run the same command again to go on")
        sys.exit(128 + number)

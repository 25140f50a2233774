"""The command line: parse, call one function, print. The only module that knows click and the terminal.

Nothing heavy is imported here: `messcli --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from messcli import __version__
from messcli.errors import EXIT_ROWS_WITH_ERRORS, EXIT_SIGINT, EXIT_SLA_MISSED, MessError

if TYPE_CHECKING:
    from messcli.run import Progress, Summary


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
        except KeyboardInterrupt:
            click.echo("stopped; run the same command again to go on", err=True)
            ctx.exit(EXIT_SIGINT)


CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100, "auto_envvar_prefix": "MESSCLI"}


@click.group(cls=_Group, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="messcli")
def main() -> None:
    """Route a batch of prompts over a zoo of language models: the promised mean accuracy, for few joules.

    \b
    Start with:
      messcli route samples/requests.jsonl -o out.jsonl

    stdout carries data only; everything else goes to stderr.
    """


@main.command(short_help="Route a file of prompts: the main job.")
@click.argument("input_path", metavar="INPUT")
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
    metavar="NAME",
    help="bleu1, rouge1, rougeL, chrf, exact, choice, or your own module:function.",
)
@click.option(
    "--policy",
    type=click.Choice(["mess+", "smallest", "largest", "random"]),
    default="mess+",
    show_default=True,
    help="How a model is chosen.",
)
@click.option(
    "--v",
    type=click.FloatRange(min=0, min_open=True),
    metavar="V",
    help="Weight of energy against the SLA (equation 3).",
)
@click.option(
    "--c", type=click.FloatRange(min=0), metavar="C", help="Exploration: p_t = min(1, C / cube root of t)."
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
    type=click.Choice(["ridge", "linear", "fasttext", "mean"]),
    default="ridge",
    show_default=True,
    help="How accuracy is predicted from a prompt.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Decides which requests are explored.")
@click.option(
    "--window",
    type=click.IntRange(min=1),
    default=32,
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
    "--on-error",
    type=click.Choice(["skip", "stop"]),
    default="skip",
    show_default=True,
    help="A bad line or failed request becomes a row with `error`, or ends the run.",
)
@click.option(
    "--meter",
    default="auto",
    show_default=True,
    metavar="KIND",
    help="auto, nvml, rapl, estimate, or replay:FILE.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Requests per model call. Default: as memory allows.",
)
@click.option("--preload", is_flag=True, help="Load every model up front instead of on first use.")
@click.option(
    "--prompt-field",
    default="prompt",
    show_default=True,
    metavar="NAME",
    help="The input's name for the prompt.",
)
@click.option(
    "--reference-field", default="reference", show_default=True, metavar="NAME", help="... for the reference."
)
@click.option("--id-field", default="id", show_default=True, metavar="NAME", help="... for the id.")
@click.option("--include-prompt", is_flag=True, help="Copy prompt and reference to the rows.")
@click.option("--fields", "columns", metavar="A,B,...", help="Only these columns.")
@click.option(
    "--check-sla",
    is_flag=True,
    help=f"Exit {EXIT_SLA_MISSED} when the observed mean accuracy is below alpha.",
)
@click.option("-q", "--quiet", is_flag=True, help="No summary and no progress bar; warnings and errors only.")
def route(
    input_path: str,
    columns: str | None,
    prompt_field: str,
    reference_field: str,
    id_field: str,
    check_sla: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Route every request of INPUT (JSON lines; .gz too, - is standard input) to one model of the zoo.

    A line is {"prompt": "...", "reference": "..."} or {"messages": [...]}; id and reference are optional,
    other fields pass through. What was finished is never done again: after a crash, a signal or a power
    cut, run the same command to go on.

    \b
    messcli route in.jsonl -o out.jsonl --zoo zoo.toml --alpha 0.7
    zcat in.jsonl.gz | messcli route - -o - --state my.state | jq .output
    """
    from messcli.inputs import InputFields
    from messcli.run import RouteConfig, route

    config = RouteConfig(
        input=input_path,
        input_fields=InputFields(prompt_field, reference_field, id_field),
        columns=tuple(name.strip() for name in columns.split(",")) if columns else (),
        **options,
    )
    with _progress_bar("route", quiet) as (on_progress, tell):
        summary = route(config, on_progress=on_progress, tell=tell)
    if not quiet:
        _print_summary(summary)
    if summary.stopped_by is not None:
        click.echo(f"stopped by signal {summary.stopped_by}; run the same command again to go on", err=True)
        sys.exit(128 + summary.stopped_by)
    if check_sla and summary.sla_missed:
        sys.exit(EXIT_SLA_MISSED)
    if summary.failed:
        sys.exit(EXIT_ROWS_WITH_ERRORS)


@contextmanager
def _progress_bar(
    name: str, quiet: bool
) -> Iterator[tuple[Callable[[Progress], None], Callable[[str], None]]]:
    """A bar on a terminal, nothing in a pipe; and a way to print lines without breaking the bar."""
    from tqdm import tqdm

    with tqdm(
        desc=name, unit="req", file=sys.stderr, disable=True if quiet else None, dynamic_ncols=True
    ) as bar:

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

        def tell(line: str) -> None:
            if not quiet or line.startswith("warning"):
                bar.write(line, file=sys.stderr)

        yield on_progress, tell


def _print_summary(summary: Summary) -> None:
    for line in summary_lines(summary):
        click.echo(line, err=True)


def summary_lines(summary: Summary) -> list[str]:
    """The closing summary, for people."""
    rows = []
    failed = f", {summary.failed} failed" if summary.failed else ""
    done = f" ({summary.already_done} were done before)" if summary.already_done else ""
    rows.append(("requests", f"{summary.routed} routed{done}{failed}, {summary.explored} explored"))
    if not summary.routed:
        rows.append(("nothing to do", "every line of the input is finished"))
    share = {model: count / max(summary.routed, 1) for model, count in summary.served.items()}
    rows.append(("served by", ", ".join(f"{m} {n} ({share[m]:.0%})" for m, n in summary.served.items())))
    for plan, account in summary.accounts.items():
        rows.append((f"accuracy {plan}".strip(), _sla_line(summary, plan, account)))
    rows.extend(_energy_rows(summary))
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows if value]


def _sla_line(summary: Summary, plan: str, account: Any) -> str:
    alpha, mean = summary.alphas[plan], account.observed_mean
    parts = []
    if mean is not None:
        verdict = "kept" if mean >= alpha else "MISSED"
        parts.append(f"{mean:.4f} observed over {account.observed} requests, alpha {alpha:g}: SLA {verdict}")
    if account.estimated:
        parts.append(
            f"{account.estimated_sum / account.estimated:.4f} estimated over {account.estimated} without reference"
        )
    if plan in summary.unreachable:
        parts.append("alpha is above what this zoo reaches")
    return "; ".join(parts)


def _energy_rows(summary: Summary) -> list[tuple[str, str]]:
    if not summary.routed:
        return []
    meters = "/".join(summary.meters) or "no meter"
    per_request = summary.billed_joules / summary.routed
    rows = [
        (
            "energy",
            f"{summary.billed_joules:.4g} J billed ({meters}), {per_request:.4g} J per request, "
            f"explorations included; {summary.overhead_joules:.4g} J overhead",
        )
    ]
    if summary.largest_joules:
        ratio = per_request / summary.largest_joules
        rows.append(
            (
                "against",
                f"{summary.largest_joules:.4g} J per request if {summary.largest} answered all "
                f"(estimated from its mean): {ratio:.0%} of that",
            )
        )
    if summary.unmetered:
        rows.append(("unmetered", f"{summary.unmetered} requests whose joules aren't known"))
    return rows

"""Manual pages from the commands' own definitions: `python -m messcli.cli.man man` writes them again.

What `--help` says stands in a page word for word; what it has no room for (exit status, files, environment)
is added here. Knows the shape of click's commands and roff; knows nothing of what a command does.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from messcli import __version__
from messcli.cli import main
from messcli.cli.command import Command
from messcli.errors import (
    EXIT_ERROR,
    EXIT_OK,
    EXIT_ROWS_WITH_ERRORS,
    EXIT_SIGINT,
    EXIT_SIGTERM,
    EXIT_SLA_MISSED,
    EXIT_STATE_BUSY,
    EXIT_UNAVAILABLE,
    EXIT_USAGE,
)

_ALL = ("route", "calibrate", "record", "simulate", "report", "rows", "doctor")
# exit status -> (what it means, the commands that have it)
EXIT_STATUS: dict[int, tuple[str, tuple[str, ...]]] = {
    EXIT_OK: ("Done.", _ALL),
    EXIT_ERROR: ("An error, told in one line on standard error with what to do about it.", _ALL),
    EXIT_USAGE: ("Wrong usage: an unknown option, a value out of range, options that contradict.", _ALL),
    EXIT_SLA_MISSED: (
        "Done, but the mean accuracy is below alpha, or would be with 0 for failed requests (with --check-sla).",
        ("route",),
    ),
    EXIT_ROWS_WITH_ERRORS: ("Done, but some rows have `error`.", ("route", "record")),
    EXIT_UNAVAILABLE: (
        "No model is there (servers down, quotas used up) for --patience seconds; the same command goes on later.",
        ("route", "record"),
    ),
    EXIT_STATE_BUSY: (
        "Another process holds the state; try again later, or with --wait.",
        ("route", "record", "rows"),
    ),
    EXIT_SIGINT: (
        "Stopped by SIGINT after a clean commit; the same command goes on.",
        ("route", "calibrate", "record", "simulate"),
    ),
    EXIT_SIGTERM: (
        "Stopped by SIGTERM after a clean commit; the same command goes on.",
        ("route", "calibrate", "record"),
    ),
}
FILES: dict[str, tuple[str, tuple[str, ...]]] = {
    "zoo.toml": ("The models, smallest first, and what is promised.", ("route", "calibrate", "record")),
    "OUTPUT.state": ("What is learnt and done, a SQLite database; kept to go on.", ("route", "record")),
    "calibration.json": (
        "What a request costs with each model, beside the zoo file; written by messcli-calibrate(1).",
        ("route", "calibrate", "record"),
    ),
    "OUTPUT.partial": ("What a calibration has measured so far, to go on with.", ("calibrate",)),
}
ENVIRONMENT: dict[str, tuple[str, tuple[str, ...]]] = {
    "MESSCLI_ZOO": (
        "The zoo file where neither --zoo nor ./zoo.toml is there.",
        ("route", "calibrate", "record"),
    ),
    "MESSCLI_COMMAND_OPTION": (
        "Any option's default, upper case with underscores: MESSCLI_ROUTE_ALPHA=0.7.",
        _ALL,
    ),
    "RAY_ADDRESS": ("The Ray cluster of --engine ray.", ("route", "record")),
    "HF_HOME, HF_HUB_OFFLINE, HF_TOKEN": (
        "Where downloaded models are kept, whether any may be downloaded, and the key to gated ones.",
        ("route", "calibrate", "record"),
    ),
    "PYTHONPATH": ("Where a metric of your own (module:function) is found.", ("route", "record", "simulate")),
    "SQLITE_TMPDIR": ("Where the ids of a long input are kept while it is read.", ("route", "record")),
    "_MESSCLI_COMPLETE": ("bash_source, zsh_source or fish_source print that shell's completion.", ("",)),
}


def pages() -> dict[str, str]:
    """File name -> text of every page, such as "messcli-route.1"."""
    with click.Context(main, info_name="messcli", **main.context_settings) as context:
        found = {"messcli.1": _page(main, context, "")}
        for name in main.list_commands(context):
            command = main.commands[name]
            with click.Context(command, info_name=name, parent=context) as inner:
                found[f"messcli-{name}.1"] = _page(command, inner, name)
    return found


def _page(command: click.Command, context: click.Context, name: str) -> str:
    return "\n".join(_lines(command, context, name)) + "\n"


def _lines(command: click.Command, context: click.Context, name: str) -> Iterator[str]:
    title = f"messcli-{name}" if name else "messcli"
    text, examples = _split(command.help or "")
    short = command.short_help or text[0]
    yield '.\\" Made by `python -m messcli.cli.man man` from the command definitions; change those.'
    # no date: the version says of when it is, and a date would be one more thing to keep
    yield f'.TH {title.upper()} 1 "" "messcli {__version__}" "messcli manual"'
    yield from (".SH NAME", f"{_text(title)} \\- {_text(short.rstrip('.'))}")
    yield from (".SH SYNOPSIS", f"\\fB{_text(context.command_path)}\\fR")
    yield _text(" ".join(command.collect_usage_pieces(context)))
    yield ".SH DESCRIPTION"
    for number, paragraph in enumerate(text):
        yield from ([".PP"] if number else [])
        yield _text(paragraph)
    if isinstance(command, click.Group):
        yield ".SH COMMANDS"
        for sub in command.list_commands(context):
            yield from (".TP", f"\\fBmesscli\\-{sub}\\fR(1)", _text(command.commands[sub].short_help or ""))
    yield ".SH OPTIONS"
    headings = command.headings if isinstance(command, Command) else {}
    grouped = {id(param) for ones in headings.values() for param in ones}
    ungrouped = [param for param in command.get_params(context) if id(param) not in grouped]
    for heading, params in {**headings, "Help": ungrouped}.items():
        yield from ([f".SS {_text(heading)}"] if headings else [])
        for param in params:
            record = param.get_help_record(context)
            if record is not None and isinstance(param, click.Option):
                yield from (".TP", f"\\fB{_text(record[0])}\\fR", _text(record[1]))
    yield from _table("EXIT STATUS", {str(code): entry for code, entry in EXIT_STATUS.items()}, name)
    yield from _table("FILES", FILES, name)
    yield from _table("ENVIRONMENT", ENVIRONMENT, name)
    if examples:
        yield from (".SH EXAMPLES", ".nf", *map(_text, examples), ".fi")
    others = ["messcli", *(f"messcli-{other}" for other in main.list_commands(context))]
    yield ".SH SEE ALSO"
    yield ",\n".join(f"\\fB{_text(other)}\\fR(1)" for other in others if other != title)


def _split(help_text: str) -> tuple[list[str], list[str]]:
    """A docstring's paragraphs, each on one line, and the lines of its \\b block: the examples."""
    text: list[str] = []
    examples: list[str] = []
    for block in re.split(r"\n\s*\n", help_text):
        lines = block.strip("\n").split("\n")
        if lines[0].strip() == "\b":
            examples = [line.strip() for line in lines[1:] if line.strip() and not line.endswith(":")]
        else:
            text.append(" ".join(line.strip() for line in lines).strip())
    return text, examples


def _table(title: str, entries: dict[str, tuple[str, tuple[str, ...]]], name: str) -> Iterator[str]:
    """The entries of this command; of `messcli` itself, all."""
    mine = {key: text for key, (text, commands) in entries.items() if not name or name in commands}
    if mine:
        yield f".SH {title}"
        for key, text in mine.items():
            yield from (".TP", f"\\fB{_text(key)}\\fR", _text(text))


def _text(text: str) -> str:
    """Text as roff takes it: what would be a command or an ornament is spelled out."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("~", "\\(ti").replace("^", "\\(ha")
    text = text.replace("`", "\\(ga").replace("'", "\\(aq")
    return re.sub(r"^\.", r"\\\&.", text)


def write(folder: Path) -> None:
    """Write every page into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "man"))

"""What every command does alike: help on one screen, streams, signals, errors as one line.

Knows click; knows nothing of any one command.
"""

from __future__ import annotations

import io
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import click

from messcli.cli.options import Group, Option
from messcli.cli.terminal import obeyed_sigterm, say, steady_streams
from messcli.errors import EXIT_OK, EXIT_SIGINT, Interrupted, MessError
from messcli.files.standard import reserved_output
from messcli.signals import WORKERS


class Command(click.Command):
    """A command whose options stand under headings.

    Args:
        groups: its options.
        common: the names of those that `--help` shows, in this order; () shows all. `--help-all` shows all.
    """

    def __init__(
        self,
        name: str | None,
        *,
        params: list[click.Parameter] | None = None,
        groups: Sequence[Group] = (),
        common: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        made = [(group.heading, group.copies()) for group in groups]
        super().__init__(
            name, params=[*(params or []), *(one for _, ones in made for one in ones)], **settings
        )
        self.headings: dict[str, list[click.Parameter]] = {}
        for heading, ones in made:
            self.headings.setdefault(heading, []).extend(ones)
        self.common = tuple(common)
        for one in self.params:
            if isinstance(one, click.Option):  # click's own way names them after the functions' parameters
                long = max(one.opts, key=len).removeprefix("--")
                one.envvar = f"messcli_{self.name}_{long}".upper().replace("-", "_")

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*super().get_params(ctx), *([_HELP_ALL] if self.common else [])]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for before, value in zip(["", *args], args, strict=False):
            option, _, given = value.partition("=")
            if not value:
                option = before if before.startswith("-") else ""
            elif not option.startswith("--") or "=" not in value or given:
                continue
            if option != "--period":  # "" is the period of runs that name none
                what = option or "an argument"
                raise click.UsageError(f"{what} is empty: perhaps a variable of the shell isn't set", ctx)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with obeyed_sigterm(Interrupted), reserved_output():
            return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        everything = ctx.meta.get(_HELP_ALL.name, not self.common)
        if everything:
            for heading, ones in self.headings.items():
                with formatter.section(heading):
                    formatter.write_dl(list(_records(ones, ctx)))
            with formatter.section("Help"):
                formatter.write_dl(list(_records(self.get_params(ctx)[-2 if self.common else -1 :], ctx)))
            return
        known = {one.name: one for one in self.params}
        with formatter.section("Options"):
            formatter.write_dl(
                [_short(record) for record in _records([known[name] for name in self.common], ctx)]
            )
        rest = sum(1 for ones in self.headings.values() for _ in ones) - len(self.common)
        formatter.write(f"\n{rest} more: {ctx.command_path} --help-all\n")


def _records(ones: Sequence[click.Parameter], ctx: click.Context) -> Iterator[tuple[str, str]]:
    for one in ones:
        record = one.get_help_record(ctx)
        if record is not None:
            yield record


def _short(record: tuple[str, str]) -> tuple[str, str]:
    """The first sentence of an option's help: it fits a line."""
    sentence = re.split(r"(?<=[^.])\. | +\[", record[1].rstrip("."))[0]
    return record[0], sentence.rstrip(".")


def _show_all(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[_HELP_ALL.name] = True
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()


_HELP_ALL = Option(
    ["--help-all"], is_flag=True, is_eager=True, expose_value=False, callback=_show_all, help="Every option."
)


class Program(click.Group):
    """Prints what went wrong as one line and exits with its code; anything else is a bug and keeps its traceback."""

    command_class = Command

    def main(self, *args: Any, **settings: Any) -> Any:
        standalone = settings.get("standalone_mode", True)
        steady_streams()
        try:
            status = super().main(*args, **{**settings, "standalone_mode": False})
        except click.Abort:  # Ctrl-C before a command had begun
            status = _interrupted(KeyboardInterrupt())
        except click.ClickException as error:
            shown = io.StringIO()
            error.show(file=shown)
            say(*shown.getvalue().splitlines())
            status = error.exit_code
        status = status if isinstance(status, int) else EXIT_OK
        if standalone:
            if sys.stdout is sys.__stdout__ and _threads_that_stay():  # a model that didn't end in time
                os._exit(status)
            sys.exit(status)
        return status

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MessError as error:
            say(f"Error: {error}")
            ctx.exit(error.exit_code)
        except BrokenPipeError:  # the reader has gone (`| head -1`)
            ctx.exit(EXIT_OK)
        except KeyboardInterrupt as stopped:
            status = _interrupted(stopped)
            if (
                sys.stdout is sys.__stdout__ and _threads_that_stay()
            ):  # no server that is waited for holds us up
                os._exit(status)
            ctx.exit(status)


def _threads_that_stay() -> bool:
    """Whether threads are left, a second later, that Python would wait for at its exit, or tear a model away from."""
    others = [one for one in threading.enumerate() if one is not threading.main_thread()]
    own = [one for one in others if not one.daemon or one.name.startswith(WORKERS)]
    deadline = time.monotonic() + 1.0
    for one in own:
        one.join(max(0.0, deadline - time.monotonic()))
    return any(one.is_alive() for one in own)


def _interrupted(stopped: KeyboardInterrupt) -> int:
    say("stopped at once; run the same command again to go on")
    return 128 + stopped.signal if isinstance(stopped, Interrupted) else EXIT_SIGINT

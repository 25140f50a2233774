"""The command line: the only place that knows click and the terminal.

app        the commands
options    their options, in groups
command    what all commands do alike: help, streams, signals, errors
terminal   what is written to the terminal, and the bars
man        the manual pages, made from the commands
"""

from messcli.cli.app import main

__all__ = ["main"]

"""The command line: the only place that knows click and the terminal.

app        the commands
man        their manual pages, made from them
"""

from messcli.cli.app import main

__all__ = ["main"]

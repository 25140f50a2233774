"""Dialects: how files of other programs say what a request is. One file each, and a line of `messcli/registry.py`.

A dialect turns one object of theirs into one of ours (docs/formats.md) and, where their programs read answers too, a
row of ours into one of theirs. Which one a file speaks is guessed from its first line, or said by `--format`.
Knows objects; knows nothing of files, lines or ids.
"""

from __future__ import annotations

from messcli.files.dialects.dialect import OWN, Dialect, guess, load_dialect, row_in

__all__ = ["OWN", "Dialect", "guess", "load_dialect", "row_in"]

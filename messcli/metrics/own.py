"""A user's own metric, written as "module:function". Runs code of the user's."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from messcli.errors import MetricError, first_line
from messcli.metrics.base import Metric


def own(name: str) -> Metric:
    """The function that `name` ("module:function") names. What it prints goes to standard error.

    Raises:
        MetricError: there is no such module or function, or importing it failed.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise MetricError(f'metric "{name}": write it as module:function')
    try:
        with contextlib.redirect_stdout(sys.stderr):
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise MetricError(
                f'metric "{name}": Python finds no module "{error.name}". Add its folder to PYTHONPATH'
            ) from None
        raise MetricError(f'metric "{name}": importing it failed: {first_line(error)}') from error
    except (Exception, SystemExit) as error:  # the user's module may raise anything
        raise MetricError(f'metric "{name}": importing it failed: {first_line(error)}') from error
    function = getattr(module, function_name, None)
    if not callable(function):
        close = difflib.get_close_matches(function_name, vars(module), n=1)
        hint = f'. Did you mean "{close[0]}"?' if close else ""
        raise MetricError(f'metric "{name}": the module has no function "{function_name}"{hint}')

    def score(output: str, references: Sequence[str]) -> float:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for rows
            return function(output, list(references))  # type: ignore[no-any-return]  # `Metric` checks it

    return Metric(name, f"{name}|source:{_source_digest(module)}", score)


def _source_digest(module: Any) -> str:
    """A changed function is another metric, whatever its name."""
    file = inspect.getsourcefile(module) if getattr(module, "__file__", None) else None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12] if file else "unknown"

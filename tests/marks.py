"""Marks that tests of several files share."""

from typing import Any

import pytest


def slow(*values: Any, name: str | None = None) -> Any:
    """A case, called `name`, that only the slow suite runs: its like is among the fast ones."""
    return pytest.param(*values, id=name, marks=pytest.mark.slow)

"""Alpaca: `instruction`, `input` and `output`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from messcli.files.dialects.dialect import Dialect, without


def _looks_like(line: Mapping[str, Any]) -> bool:
    return "instruction" in line and ("output" in line or "input" in line)


def _read(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """The instruction, and after an empty line its input, as the prompt; the output as the reference."""
    instruction, given = line.get("instruction"), line.get("input")
    if not isinstance(instruction, str):
        raise ValueError('field "instruction": expected a string. Is this Alpaca?')
    if given is not None and not isinstance(given, str):
        raise ValueError('field "input": expected a string. Leave it out where there is none')
    prompt = f"{instruction}\n\n{given}" if given and given.strip() else instruction
    ours = {**without(line, "instruction", "input", "output", "messages"), "prompt": prompt}
    if "reference" not in ours:
        ours["reference"] = line.get("output")
    return ours


ALPACA = Dialect("Alpaca instructions", _looks_like, _read)

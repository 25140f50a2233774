"""What a part of the program has learnt, as named, versioned fields that a state can keep.

A part refuses what it doesn't know (a field too many, one too few, another shape or type, a newer version): it never
goes on with a number that means something else. Knows arrays and JSON; knows nothing of what they say.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from messcli.errors import StateError

_TREE = "parts"  # the array that holds names, versions and values as JSON; every other one is PATH/FIELD
_CURE = "Go on with the messcli that wrote it, or start anew with another --state and output"


@dataclass(frozen=True, slots=True)
class Part:
    """The fields of one part, and the parts that it is made of."""

    name: str
    version: int = 1
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)  # JSON
    parts: Mapping[str, Part] = field(default_factory=dict)
    tuning: str = ""  # digest of the numbers it was learnt under; "": there are none

    def check(self, own: Part, *, free: Sequence[str] = (), any_parts: bool = False) -> None:
        """Refuse to be loaded into a part whose present state is `own`.

        Args:
            free: arrays whose first dimension may be another one.
            any_parts: the parts' names are data.

        Raises:
            StateError: naming the first thing that isn't known.
        """
        if self.name != own.name:
            raise self._refusal(f'is of "{self.name}", and "{own.name}" is to go on')
        if self.version > own.version:
            raise self._refusal(f"has version {self.version}, and this messcli knows {own.version}")
        kinds = (("field", self.arrays, own.arrays), ("field", self.values, own.values))
        for kind, kept, known in (*kinds, *([] if any_parts else [("part", self.parts, own.parts)])):
            for name in known:
                if name not in kept:
                    raise self._refusal(f"lacks the {kind} {name}")
            for name in kept:
                if name not in known:
                    raise self._refusal(f"has an unknown {kind} {name}")
        for name, array in own.arrays.items():
            kept_array, first = self.arrays[name], 1 if name in free else 0
            if (kept_array.shape[first:], kept_array.ndim) != (array.shape[first:], array.ndim):
                raise self._refusal(f"has {name} of shape {kept_array.shape} instead of {array.shape}")
            if kept_array.dtype != array.dtype:
                raise self._refusal(f"has {name} of {kept_array.dtype} instead of {array.dtype}")
        for name, value in own.values.items():
            if _kind(self.values[name]) is not _kind(value):
                raise self._refusal(f"has {name} = {json.dumps(self.values[name])[:60]}")

    def find(self, name: str, *, like: Part) -> Part | None:
        """The part called `name`, to be loaded into one whose state is `like`; None where that one is to learn anew,
        because the numbers that it was learnt under have changed.
        """
        part = self.parts[name]
        return None if part.name == like.name and part.tuning != like.tuning else part

    def _refusal(self, why: str) -> StateError:
        return StateError(f'what was learnt of "{self.name}" {why}. {_CURE}')

    def flat(self, path: str = "") -> Iterator[tuple[str, Any]]:
        """Every field of every part, by its path."""
        yield f"{path}@", (self.name, self.version, self.tuning)
        for name, value in (*self.arrays.items(), *self.values.items()):
            yield path + name, value
        for name, part in self.parts.items():
            yield from part.flat(f"{path}{name}/")

    def dumps(self) -> bytes:
        """As safetensors."""
        arrays: dict[str, NDArray[Any]] = {}
        tree = json.dumps(self._tree("", arrays)).encode()
        arrays[_TREE] = np.frombuffer(tree, np.uint8)
        return bytes(safetensors.numpy.save(arrays))

    def _tree(self, path: str, arrays: dict[str, NDArray[Any]]) -> dict[str, Any]:
        arrays.update({f"{path}/{name}": np.ascontiguousarray(array) for name, array in self.arrays.items()})
        return {
            "name": self.name,
            "version": self.version,
            "tuning": self.tuning,
            "arrays": list(self.arrays),
            "values": dict(self.values),
            "parts": {name: part._tree(f"{path}/{name}", arrays) for name, part in self.parts.items()},
        }

    @classmethod
    def loads(cls, data: bytes) -> Part:
        """Of what `dumps` wrote.

        Raises:
            StateError: it didn't.
        """
        try:
            arrays = safetensors.numpy.load(data)
            return cls._of(json.loads(arrays[_TREE].tobytes()), "", arrays)
        except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
            raise StateError(
                f"what was learnt can't be read ({type(error).__name__}: {error}). {_CURE}"
            ) from None

    @classmethod
    def _of(cls, tree: Mapping[str, Any], path: str, arrays: Mapping[str, NDArray[Any]]) -> Part:
        return cls(
            name=tree["name"],
            version=tree["version"],
            arrays={name: arrays[f"{path}/{name}"] for name in tree["arrays"]},
            values=tree["values"],
            parts={name: cls._of(part, f"{path}/{name}", arrays) for name, part in tree["parts"].items()},
            tuning=tree["tuning"],
        )


def _kind(value: Any) -> type:
    """Of a JSON value; all numbers are of one kind."""
    return float if isinstance(value, int) and not isinstance(value, bool) else type(value)

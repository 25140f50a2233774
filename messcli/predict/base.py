"""What a predictor is: what accuracy each model will reach on a prompt, learnt from the accuracies that were seen.

Knows texts and numbers; knows nothing of queues, SLAs or which model was chosen why. All models of a zoo
share one predictor object, so that a prompt is turned into features once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from messcli.predict.latent import LatentSpace, Move
from messcli.predict.tuning import Levels
from messcli.registry import PREDICTORS
from messcli.snapshots import Part

Accuracies = NDArray[np.float64]  # one per model, in zoo order; NaN where it wasn't observed
Sparse = tuple[NDArray[np.intp], NDArray[np.float64]]  # distinct indices, and their values


class Predictor(Protocol):
    """Â_m for every model m of a zoo (section 2.3). Deterministic: same calls, same numbers."""

    name: str

    def encode(self, text: str) -> Any:
        """The features of a text, to be given to the methods below. Pure."""
        ...

    def encode_many(self, texts: Sequence[str]) -> Sequence[Any]:
        """`encode` of each; faster together than one by one."""
        ...

    def predict_one(self, features: Any) -> Accuracies | None:
        """Â of every model, in [0, 1]; None while nothing is learnt. Pure."""
        ...

    def predict_many(self, features: Sequence[Any]) -> Accuracies | None:
        """`predict_one` of each: (requests, models); faster together than one by one."""
        ...

    def learn_one(self, features: Any, accuracies: Accuracies) -> None:
        """Take one learning step on the accuracies that were observed (NaN: that model wasn't)."""
        ...

    @property
    def samples(self) -> Accuracies:
        """How many accuracies each model's estimate rests on."""
        ...

    @property
    def version(self) -> int:
        """Changes when earlier estimates are worth making anew."""
        ...

    def state(self) -> Part:
        """Everything learnt, as named fields: `load` of it continues exactly. The part's name is the predictor's."""
        ...

    def load(self, part: Part) -> None:
        """Go on from `part`.

        Raises:
            StateError: it isn't what `state` gives.
        """
        ...


@runtime_checkable
class Begins(Protocol):
    """A predictor that says something of every model before it has learnt anything."""

    def begin(self, prior: Levels) -> None: ...


@runtime_checkable
class InSpace(Protocol):
    """A predictor that looks at where prompts lie, and can do so in a space that others share."""

    def join(self, space: LatentSpace) -> None:
        """Place texts in `space` from now on. Nothing was learnt yet."""
        ...

    def learn_again(self, texts: Sequence[str]) -> None:
        """The space was fitted: what was learnt is to be learnt anew in it.

        Args:
            texts: that it has seen.
        """
        ...

    def move(self, move: Move) -> None:
        """The space was fitted anew for other traffic: what was learnt is to be carried over."""
        ...


@runtime_checkable
class Fades(Protocol):
    """A predictor whose earlier knowledge can count for less than what comes."""

    def discount(self, most: float) -> None:
        """Let what is known of each model count as at most `most` answers."""
        ...


class OneByOne(ABC):
    """What predictors share that have no faster way to encode or predict many."""

    version = 0

    @abstractmethod
    def encode(self, text: str) -> Any: ...

    def encode_many(self, texts: Sequence[str]) -> Sequence[Any]:
        return [self.encode(text) for text in texts]

    @abstractmethod
    def predict_one(self, features: Any) -> Accuracies | None: ...

    def predict_many(self, features: Sequence[Any]) -> Accuracies | None:
        rows = [row for one in features if (row := self.predict_one(one)) is not None]
        return np.array(rows) if rows else None


def create_predictor(name: str, models: int) -> Predictor:
    """The predictor called `name` for a zoo of so many models. It takes no seed: it is a function of what it is taught.

    Raises:
        UsageError: no predictor has that name.
    """
    predictor: Predictor = PREDICTORS.load(name)(models)
    return predictor

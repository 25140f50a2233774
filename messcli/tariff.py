"""What joules cost in money and in carbon, as the zoo file states it, and what hosted models cost per token.

Knows numbers and hours; knows no meter and no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

JOULES_PER_KWH = 3.6e6
HOURS = 24
JOULES, MONEY, GRAMS = "joules", "money", "grams"


@dataclass(frozen=True, slots=True)
class Tariff:
    """Prices of a kilowatt-hour. One number holds all day; 24 are for the hours of the local day, 0 to 1 o'clock first.

    `per_token` has the models whose provider is paid by `request`, `prompt_token` and `output_token` instead: their
    electricity is in that price.
    """

    price_per_kwh: tuple[float, ...] = ()  # in `currency`; (): not stated
    grams_per_kwh: tuple[float, ...] = ()  # of CO2 equivalents
    currency: str = ""
    as_of: str = ""  # the date of these numbers
    minimize: str = JOULES  # what decisions save: joules, money or grams
    per_token: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # model -> price

    def __bool__(self) -> bool:
        return bool(self.price_per_kwh or self.grams_per_kwh or self.per_token)

    def worth(self, model: str, prompt_tokens: int, output_tokens: int) -> float | None:
        """What decisions take an answer for, in joules, where that isn't its own joules.

        To save money is to save joules where electricity is what is paid for. A model that is paid by the token is
        taken for the joules that its price would buy here, over the mean of the day. Grams follow joules: one mix of
        power plants is stated for all models.
        """
        if self.minimize != MONEY or model not in self.per_token:
            return None
        paid = _paid(self.per_token[model], prompt_tokens, output_tokens)
        here = sum(self.price_per_kwh) / len(self.price_per_kwh) if self.price_per_kwh else 1.0
        return paid / here * JOULES_PER_KWH

    @property
    def basis(self) -> str:
        """What the numbers rest on, for people."""
        parts = []
        if self.price_per_kwh:
            parts.append(f"{_range(self.price_per_kwh)} {self.currency} per kWh")
        if self.grams_per_kwh:
            parts.append(f"{_range(self.grams_per_kwh)} g per kWh")
        if self.per_token:
            parts.append(f"{', '.join(self.per_token)} by the token")
        return ", ".join(parts) + (f", as of {self.as_of}" if self.as_of else ", undated")


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}, by hour,"


FREE = Tariff()  # nothing is stated


@dataclass(slots=True)
class Spent:
    """Money and grams of CO2 equivalents, summed up. What nobody stated stays None."""

    joules: float = 0.0  # that the sums cover
    money: float | None = None
    grams: float | None = None

    def add(
        self,
        tariff: Tariff,
        joules: float,
        hour: int,
        *,
        model: str | None = None,
        prompt_tokens: int = 0,
        output_tokens: int = 0,
    ) -> None:
        """Book joules of an answer of `model`, or of no model, metered in an hour of the local day."""
        self.joules += joules
        kwh = joules / JOULES_PER_KWH
        price = tariff.per_token.get(model) if model is not None else None
        if price is not None:
            self.money = (self.money or 0.0) + _paid(price, prompt_tokens, output_tokens)
        elif tariff.price_per_kwh:
            self.money = (self.money or 0.0) + kwh * _at(tariff.price_per_kwh, hour)
        if tariff.grams_per_kwh:
            self.grams = (self.grams or 0.0) + kwh * _at(tariff.grams_per_kwh, hour)

    def plus(self, other: Spent) -> Spent:
        """Both together."""
        return Spent(self.joules + other.joules, _sum(self.money, other.money), _sum(self.grams, other.grams))

    def words(self, currency: str) -> str:
        """For people: "0.0123 EUR, 4.56 g CO2e"."""
        parts = []
        if self.money is not None:
            parts.append(f"{self.money:.4g} {currency}".strip())
        if self.grams is not None:
            weight = f"{self.grams / 1000:.4g} kg" if self.grams >= 1000 else f"{self.grams:.4g} g"
            parts.append(f"{weight} CO2e")
        return ", ".join(parts)

    def as_json(self) -> dict[str, Any]:
        """As a state keeps it; `Spent(**found)` reads it back."""
        return {"joules": self.joules, "money": self.money, "grams": self.grams}


def _paid(price: Mapping[str, float], prompt_tokens: int, output_tokens: int) -> float:
    tokens = {"request": 1, "prompt_token": prompt_tokens, "output_token": output_tokens}
    return sum(price.get(name, 0.0) * count for name, count in tokens.items())


def _at(values: Sequence[float], hour: int) -> float:
    return values[hour] if len(values) == HOURS else values[0]


def _sum(a: float | None, b: float | None) -> float | None:
    return None if a is None and b is None else (a or 0.0) + (b or 0.0)

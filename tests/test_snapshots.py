"""What a state keeps of a controller: every part goes on exactly, or refuses what it doesn't know."""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_policy import table

from messcli.errors import StateError
from messcli.predict.base import create_predictor
from messcli.predict.joules import JoulesPredictor
from messcli.predict.ridge import RidgePredictor
from messcli.predict.tuning import RIDGE
from messcli.registry import PREDICTORS
from messcli.routing.auto import Auto
from messcli.routing.controller import Controller
from messcli.routing.deciding import Settings
from messcli.routing.loop import chunks
from messcli.routing.older import ALL_TUNING, read_snapshot
from messcli.routing.sla import DEFAULT_PLAN
from messcli.routing.tuning import TUNING, Price, Tuning
from messcli.snapshots import Part

HERE = Path(__file__).parent


def controller(predictor: str, tuning: Tuning = TUNING) -> Controller:
    settings = Settings(alphas={DEFAULT_PLAN: 0.6}, window=8)
    learner = create_predictor(predictor, 3)
    return Controller(3, Auto(150, tuning=tuning), learner, JoulesPredictor(3), settings, tuning)


@cache
def learnt(predictor: str) -> Part:
    """Of a controller that has seen 150 requests: directions fitted twice, the price solved."""
    control = controller(predictor)
    requests, source = table(150)
    for _ in chunks(requests, control, source):
        pass
    return control.state()


def paths(part: Part, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, inner in part.parts.items():
        yield from paths(inner, (*path, name))


def at(part: Part, path: tuple[str, ...]) -> Part:
    return at(part.parts[path[0]], path[1:]) if path else part


def changed(part: Part, path: tuple[str, ...], change: Callable[[Part], Part]) -> Part:
    if not path:
        return change(part)
    inner = changed(part.parts[path[0]], path[1:], change)
    return replace(part, parts={**part.parts, path[0]: inner})


def without(fields: Any, name: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key != name}


def refused(predictor: str, kept: Part, why: str) -> None:
    with pytest.raises(StateError, match=why) as caught:
        controller(predictor).load(Part.loads(kept.dumps()))
    assert "another --state" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("predictor", sorted(PREDICTORS))
def test_every_part_goes_on_exactly(predictor: str) -> None:
    kept = learnt(predictor)
    again = controller(predictor)
    assert again.load(Part.loads(kept.dumps())) == []
    for (path, value), (same, other) in zip(kept.flat(), again.state().flat(), strict=True):
        assert path == same
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, other)
        else:
            assert value == other


@pytest.mark.parametrize("predictor", sorted(PREDICTORS))
def test_a_field_that_is_renamed_or_dropped_is_refused_in_every_part(predictor: str) -> None:
    kept = learnt(predictor)
    tried = 0
    for path in paths(kept):
        if predictor != "ridge" and path[:1] != ("predictor",):
            continue  # the same parts whatever predicts
        part = at(kept, path)
        for name in part.arrays:
            one = changed(kept, path, lambda p, n=name: replace(p, arrays=without(p.arrays, n)))
            refused(predictor, one, f"lacks the field {name}")
            other = changed(
                kept, path, lambda p, n=name: replace(p, arrays={**without(p.arrays, n), "x": p.arrays[n]})
            )
            refused(predictor, other, f"lacks the field {name}")
            longer = changed(
                kept, path, lambda p, n=name: replace(p, arrays={**p.arrays, n: p.arrays[n][..., None]})
            )
            refused(predictor, longer, f"{name} of shape")
        for name, value in part.values.items():
            one = changed(kept, path, lambda p, n=name: replace(p, values=without(p.values, n)))
            refused(predictor, one, f"lacks the field {name}")
            odd = [value] if not isinstance(value, list) else "text"
            other = changed(kept, path, lambda p, n=name, v=odd: replace(p, values={**p.values, n: v}))
            refused(predictor, other, f"has {name} = ")
        more = changed(kept, path, lambda p: replace(p, values={**p.values, "x": 1}))
        refused(predictor, more, "has an unknown field x")
        newer = changed(kept, path, lambda p: replace(p, version=p.version + 1))
        refused(predictor, newer, f"has version {part.version + 1}, and this messcli knows {part.version}")
        tried += len(part.arrays) + len(part.values)
        for name in part.parts:
            if part.name in ("accounts", "auto"):  # the names of their parts are plans
                continue
            one = changed(kept, path, lambda p, n=name: replace(p, parts=without(p.parts, n)))
            refused(predictor, one, f"lacks the part {name}")
    assert tried > (40 if predictor == "ridge" else 1)


def test_another_predictor_s_part_is_refused() -> None:
    part = replace(
        learnt("ridge"), parts={**learnt("ridge").parts, "predictor": learnt("mean").parts["predictor"]}
    )
    refused("ridge", part, 'is of "mean", and "ridge" is to go on')


@pytest.mark.parametrize("data", [b"", b"{}", b"\x08\0\0\0\0\0\0\0{}      ", None])
def test_what_is_no_snapshot_is_refused(data: bytes | None) -> None:
    data = learnt("mean").dumps()[:-40] if data is None else data
    with pytest.raises(StateError, match="what was learnt can't be read"):
        read_snapshot(data, "mean", {})


def test_under_other_tuned_numbers_a_predictor_learns_anew_and_the_rest_goes_on() -> None:
    kept = learnt("ridge")
    control = controller("ridge")
    control.learnt.predictor = RidgePredictor(3, replace(RIDGE, temper=2.0))
    assert control.load(kept) == ["predictor", "recent"]
    assert not control.learnt.predictor.samples.any()
    assert control.t == 150
    assert control.accounts[DEFAULT_PLAN].settled == 150
    assert control.learnt.joules.samples.all()
    other = controller("ridge", Tuning(price=Price(recent=500)))
    assert other.load(kept) == ["recent"]
    assert other.tuning.digest != TUNING.digest


def test_a_snapshot_of_messcli_0_1_is_read() -> None:
    """Written by that version (see the file); it had folded in 20 lines, 19 of them requests."""
    db = sqlite3.connect(":memory:")
    db.executescript((HERE / "data" / "state-3.sql").read_text(encoding="utf-8"))
    ((data,),) = db.execute("SELECT data FROM snapshot")
    db.close()
    alphas = {"": 0.7, "silver": 0.6, "gold": 0.8}
    settings = Settings(alphas=alphas, window=8)
    control = Controller(2, Auto(60), create_predictor("ridge", 2), JoulesPredictor(2), settings)
    part = read_snapshot(zlib.decompress(data), "ridge", alphas)
    anew = control.load(part)
    assert TUNING.digest == ALL_TUNING or anew
    account = control.accounts[""]
    assert control.t == 19
    assert account.settled == account.observed + account.unknown
    assert account.surplus == pytest.approx(account.observed_sum - 0.7 * account.observed)
    assert control.learnt.joules.samples.all() == ("joules" not in anew)

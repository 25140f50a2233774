"""The cost of a request in load: the line through measured steps, and the files that hold it."""

from __future__ import annotations

import json
import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from messcli.energy.load import (
    StepPoint,
    fitted,
    line,
    read_engines,
)
from messcli.errors import EnginesError


def cost(a=3.2, k=0.064, loads=(1, 8, 64, 512), **options):
    """An engine whose steps are exactly a + k b joules, and a tenth of that in seconds."""
    points = [StepPoint(b, a + k * b, (a + k * b) / 10) for b in loads]
    return fitted(points, **{"joules_per_prompt_token": 0.02, **options})


def test_a_line_is_found_again_and_has_no_error() -> None:
    found = cost()
    assert (found.joules_per_step, found.joules_per_running_step) == pytest.approx((3.2, 0.064))
    assert (found.seconds_per_step, found.seconds_per_running_step) == pytest.approx((0.32, 0.0064))
    assert found.error == pytest.approx(0.0, abs=1e-12)


def test_the_error_is_that_of_points_left_out() -> None:
    running, joules = np.array([1.0, 2.0, 4.0]), np.array([2.0, 3.0, 10.0])
    found = fitted(
        [StepPoint(b, j, j) for b, j in zip(running, joules, strict=True)], joules_per_prompt_token=0
    )
    errors = []
    for left_out in range(3):
        (x0, y0), (x1, y1) = [(running[i], joules[i]) for i in range(3) if i != left_out]
        k = (y1 - y0) / (x1 - x0)
        a = y0 - k * x0
        if a < 0:  # the best line without a negative part goes through the origin
            r0, r1 = x0 / y0, x1 / y1
            a, k = 0.0, (r0 + r1) / (r0 * r0 + r1 * r1)
        errors.append(abs((a + k * running[left_out]) / joules[left_out] - 1))
    assert found.error == pytest.approx(np.mean(errors))


@given(st.lists(st.floats(0.1, 1e4), min_size=1, max_size=6))
def test_the_line_is_never_negative_and_beats_a_grid(values: list[float]) -> None:
    running, joules = np.arange(1.0, len(values) + 1) ** 2, np.array(values)
    a, k = line(running, joules)
    assert a >= 0
    assert k >= 0

    def loss(a: float, k: float) -> float:
        return float((((a + k * running) / joules - 1) ** 2).sum())

    nearby = (0.0, 0.5, 0.9, 1.0, 1.1, 2.0)
    assert loss(a, k) <= min(loss(a * x, k * y) for x, y in product(nearby, nearby)) + 1e-9


def test_between_points_log_log_outside_as_the_nearest() -> None:
    found = fitted([StepPoint(8, 4.0, 0.1), StepPoint(32, 16.0, 0.1)], joules_per_prompt_token=0.0)
    assert found.step_joules(16) == pytest.approx(8.0)
    assert found.step_joules(2) == 4.0  # below the first point: the same per step
    assert found.step_joules(64) == pytest.approx(32.0)  # above the last: the same per token
    assert found.step_seconds(16) == pytest.approx(0.1)
    assert found.full_joules == pytest.approx(0.5)


def test_average_falls_with_load() -> None:
    found = cost(most_running=512)
    averages = [found.joules(0, 100, b) for b in (1, 8, 64, 512)]
    assert averages == sorted(averages, reverse=True)
    assert averages[0] / averages[-1] > 20


# ---- files ------------------------------------------------------------------------------------------

ENTRY = {
    "model": "maker/Model-8B",
    "gpu": "H100",
    "task": "chat",
    "gpus": 2,
    "active_parameters_billions": 8,
    "points": [
        {"max_running": 8, "mean_running": 7.5, "joules_per_output_token": 0.4, "output_tokens_per_second": 1000},
        {"max_running": 64, "mean_running": 60, "joules_per_output_token": 0.1, "output_tokens_per_second": 5000},
        {"max_running": 1024, "mean_running": 900, "joules_per_output_token": 0.09, "output_tokens_per_second": 9000},
    ],
}  # fmt: skip


def written(tmp_path, entry):
    path = tmp_path / "engines.json"
    path.write_text(json.dumps({"engines": [entry]}))
    return path


def test_an_entry_is_read_and_what_it_does_not_say_is_reckoned(tmp_path) -> None:
    (engine,) = read_engines(written(tmp_path, ENTRY))
    assert engine.label == "maker/Model-8B,H100,chat"
    assert engine.cost.points == (
        StepPoint(7.5, 3.0, 0.0075),
        StepPoint(60, 6.0, 0.012),
    )  # 1,024 is above 512
    assert engine.cost.joules_per_prompt_token == pytest.approx(2 * 8e9 / 4e14 * 600)
    assert (engine.cost.idle_watts, engine.cost.most_running) == (150.0, 512)
    (engine,) = read_engines(
        written(tmp_path, {**ENTRY, "most_running": 2048, "joules_per_prompt_token": 0.5, "idle_watts": 0})
    )
    assert len(engine.cost.points) == 3
    assert (engine.cost.joules_per_prompt_token, engine.cost.idle_watts) == (0.5, 0.0)


def broken(**changes):
    point = dict(ENTRY["points"][1])
    point.update({name: value for name, value in changes.items() if name in point})
    rest = {name: value for name, value in changes.items() if name not in point}
    return {**ENTRY, "points": [ENTRY["points"][0], point], **rest}


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        (broken(joules_per_output_token=0), 'points 2: field "joules_per_output_token"'),
        (broken(joules_per_output_token=math.nan), 'points 2: field "joules_per_output_token"'),
        (broken(output_tokens_per_second=math.inf), 'points 2: field "output_tokens_per_second"'),
        (broken(output_tokens_per_second=-3), 'points 2: field "output_tokens_per_second"'),
        (broken(mean_running="64"), 'points 2: field "mean_running"'),
        (broken(mean_running=True), 'points 2: field "mean_running"'),
        (broken(mean_running=7.5), 'field "points": "mean_running" must rise'),
        (broken(points=[]), 'field "points"'),
        (broken(points=[3]), "points 1: expected an object"),
        (broken(points=[ENTRY["points"][2]]), 'field "points": none has at most 512'),
        (broken(active_parameters_billions=None), "what a prompt costs isn't known"),
        (broken(active_parameters_billions=-8), 'field "active_parameters_billions"'),
        (broken(idle_watts=-1), 'field "idle_watts"'),
        (broken(gpus=0), 'field "gpus"'),
        (broken(model=3), 'field "model"'),
        ("text", "expected an object"),
    ],
)
def test_a_fault_names_file_entry_and_field(tmp_path, entry, named) -> None:
    path = written(tmp_path, entry)
    with pytest.raises(EnginesError) as caught:
        read_engines(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: entry 1")
    assert named in message
    assert "\n" not in message


def test_engines_that_are_nested_too_deeply_are_told(tmp_path) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(EnginesError, match="not valid JSON: nested too deeply"):
        read_engines(tmp_path / "deep.json")


def test_what_is_no_engines_file_is_told(tmp_path) -> None:
    path = tmp_path / "other.json"
    for text, told in [("{", "not valid JSON"), ("[1]", 'no "engines"'), ('{"engines": []}', 'no "engines"')]:
        path.write_text(text)
        with pytest.raises(EnginesError, match=told):
            read_engines(path)
    with pytest.raises(EnginesError, match="can't be read"):
        read_engines(tmp_path / "none.json")
    path.write_text(json.dumps({"engines": [ENTRY, ENTRY]}))
    with pytest.raises(EnginesError, match="stands there twice"):
        read_engines(path)

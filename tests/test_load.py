"""The cost of a request in load: the line through measured steps, what a window takes, and who is worth waking."""

from __future__ import annotations

import json
import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from messcli.energy.load import (
    Share,
    StepPoint,
    fitted,
    line,
    read_engines,
    share_of,
    worth_waking,
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


def test_average_falls_with_load_and_marginal_does_not() -> None:
    found = cost(most_running=512)
    averages = [found.joules(0, 100, b) for b in (1, 8, 64, 512)]
    assert averages == sorted(averages, reverse=True)
    assert averages[0] / averages[-1] > 20
    assert (
        found.marginal(0, 100, 8) == pytest.approx(100 * 0.064) == pytest.approx(found.marginal(0, 100, 511))
    )
    assert found.marginal(0, 100, 512) == pytest.approx(averages[-1])  # it waits, and adds steps
    assert found.marginal(50, 0, 8) == pytest.approx(1.0)


@pytest.mark.parametrize("requests", [1, 7, 64])
def test_a_share_that_fits_takes_as_many_steps_as_its_longest_answer(requests: int) -> None:
    found = cost()
    share = Share(requests, 0.0, 50.0, 50.0)
    assert found.steps(share) == 50
    assert found.window_joules(share) == pytest.approx(50 * found.step_joules(requests))
    assert found.in_load(share) == pytest.approx(found.joules(0, 50, requests))


def test_a_share_that_does_not_fit_is_answered_in_full_steps() -> None:
    found = cost(most_running=16)
    share = Share(160, 10.0, 50.0, 60.0)
    assert found.steps(share) == 500
    assert found.load(share) == 16
    assert found.in_load(share) == pytest.approx(found.joules(10, 50, 16))
    assert found.window_seconds(share) == pytest.approx(500 * found.step_seconds(16))


def test_nothing_costs_nothing_and_one_alone_costs_whole_steps() -> None:
    found, nothing = cost(), Share(0.0, 0.0, 100.0, 100.0)
    assert found.window_joules(nothing) == found.window_seconds(nothing) == 0.0
    assert found.in_load(nothing) == pytest.approx(100 * found.step_joules(1))


# ---- who is worth waking ------------------------------------------------------------------------------


def window(requests: int, models: int, output: float = 100.0):
    return np.full((requests, models), 20.0), np.full((requests, models), output)


def test_a_model_with_a_handful_of_requests_is_left_out() -> None:
    costs = [cost(), cost(a=30.0, k=0.4)]
    prompts, outputs = window(500, 2)
    values = np.tile([0.0, 0.0], (500, 1))
    values[:3, 1] = 500.0  # three requests are worth 500 J more there; waking it takes 100 steps of 30 J
    woken = worth_waking(costs, prompts, outputs, values)
    assert woken.models == (0,)
    values[:50, 1] = 500.0
    woken = worth_waking(costs, prompts, outputs, values)
    assert woken.models == (0, 1)
    assert (woken.choice[:50] == 1).all()
    assert (woken.choice[50:] == 0).all()


def test_its_joules_are_those_of_the_shares_and_of_waiting() -> None:
    costs = [cost(idle_watts=70.0), cost(a=30.0, k=0.4, idle_watts=300.0)]
    prompts, outputs = window(400, 2)
    values = np.zeros((400, 2))
    values[:200, 1] = 1000.0
    woken = worth_waking(costs, prompts, outputs, values)
    shares = [share_of(prompts[woken.choice == m, m], outputs[woken.choice == m, m]) for m in range(2)]
    seconds = [c.window_seconds(s) for c, s in zip(costs, shares, strict=True)]
    idle = sum(c.idle_watts * (max(seconds) - s) for c, s in zip(costs, seconds, strict=True))
    assert woken.joules == pytest.approx(
        idle + sum(c.window_joules(s) for c, s in zip(costs, shares, strict=True))
    )
    assert woken.models == (0, 1)


def test_who_must_stay_awake_does_and_who_cannot_take_a_request_gets_none() -> None:
    costs = [cost(), cost(a=30.0, k=0.4)]
    prompts, outputs = window(50, 2)
    values = np.zeros((50, 2))
    values[7, 0] = -math.inf  # too long for the small one
    woken = worth_waking(costs, prompts, outputs, values)
    assert woken.choice[7] == 1
    kept = worth_waking(costs, prompts, outputs, np.zeros((50, 2)), keep=(1,))
    assert kept.models == (0, 1)
    with pytest.raises(ValueError, match="no model"):
        worth_waking(costs, prompts, outputs, np.full((50, 2), -math.inf))


def test_it_is_the_best_of_all_assignments_of_a_small_window() -> None:
    """Every assignment of 7 requests to 3 models, by hand: subsets lose nothing that matters."""
    rng = np.random.default_rng(3)
    costs = [cost(), cost(a=6.0, k=0.3), cost(a=30.0, k=1.2)]
    prompts, outputs = np.full((7, 3), 10.0), rng.integers(20, 80, (7, 1)).repeat(3, axis=1).astype(float)
    values = rng.uniform(0, 1, (7, 3)) * np.array([200.0, 800.0, 1500.0])

    def worth(choice: np.ndarray) -> float:
        shares = [share_of(prompts[choice == m, m], outputs[choice == m, m]) for m in range(3)]
        joules = sum(c.window_joules(s) for c, s in zip(costs, shares, strict=True))
        return joules - float(values[np.arange(7), choice].sum())

    best = min(worth(np.array(choice)) for choice in product(range(3), repeat=7))
    found = worth(worth_waking(costs, prompts, outputs, values).choice)
    assert found <= best + 0.02 * abs(best)


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

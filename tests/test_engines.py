"""`simulate --engines`: a run played through engines in load, beside an independent player, and the command."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from messcli.cli import main
from messcli.energy.load import CostModel, StepPoint, fitted
from messcli.errors import EnginesError, OutcomesError, UsageError
from messcli.routing.setup import Setup
from messcli.simulation import SimulateConfig, simulate
from messcli.simulation.advice import advise
from messcli.simulation.engines import Asked, at_full_load, engines_of, in_one_go, play
from messcli.simulation.lane import together
from messcli.simulation.results import lines
from messcli.simulation.table import read_table

NAMES = ("small", "medium", "large")
CAP = 8


def cost(scale: float, idle_watts: float = 20.0, **options: float) -> CostModel:
    points = [StepPoint(b, scale * (2 + 0.3 * b**0.9), 0.01 * scale**0.5 * (1 + 0.05 * b)) for b in (2, 4, 8)]
    return fitted(
        points, joules_per_prompt_token=0.01 * scale, idle_watts=idle_watts, most_running=CAP, **options
    )


COSTS = [cost(1.0), cost(2.5, 30.0), cost(9.0, 90.0)]


def brute_force(trace, tokens, costs, slice_of_a_step=0.01):
    """Time in small slices: in each, every running answer grows by slice / step seconds of a token. No events, no heap.

    Returns joules, seconds and mean running, as `play`.
    """
    slice_seconds = slice_of_a_step * min(point.seconds for c in costs for point in c.points)
    need = [[[] for _ in line.stages] for line in trace]  # (model, tokens still to write)
    waiting, running = [[] for _ in costs], [[] for _ in costs]  # of [line, stage, tokens still to write]
    for place, asked in enumerate(trace):
        need[place] = [len(stage) for stage in asked.stages]
    joules, now, busy, work = 0.0, 0.0, [0.0] * len(costs), [0.0] * len(costs)
    admitted, settled = 0, 0

    def ask(place, stage):
        asked = trace[place]
        for m in asked.stages[stage]:
            waiting[m].append([place, stage, float(max(1, tokens[asked.request][m][1]))])
        if stage == min(1, len(asked.stages) - 1):
            first = asked.stages[0][0]
            return sum(
                costs[m].joules_per_prompt_token * sum(tokens[asked.request][first]) for m in asked.checks
            )
        return 0.0

    while settled < len(trace):
        while admitted < len(trace) and trace[admitted].settled <= settled:
            joules += ask(admitted, 0)
            admitted += 1
        for m, c in enumerate(costs):
            while waiting[m] and len(running[m]) < c.most_running:
                answer = waiting[m].pop(0)
                joules += tokens[trace[answer[0]].request][m][0] * c.joules_per_prompt_token
                running[m].append(answer)
        for m, c in enumerate(costs):
            b = len(running[m])
            if not b:
                joules += c.idle_watts * slice_seconds
                continue
            part = slice_seconds / c.step_seconds(b)
            joules += part * c.step_joules(b)
            busy[m] += slice_seconds
            work[m] += b * slice_seconds
            for answer in running[m]:
                answer[2] -= part
        now += slice_seconds
        for m in range(len(costs)):
            for answer in [a for a in running[m] if a[2] <= 1e-9]:
                running[m].remove(answer)
                place, stage, _ = answer
                need[place][stage] -= 1
                if need[place][stage] == 0 and stage + 1 < len(need[place]):
                    joules += ask(place, stage + 1)
        while settled < admitted and not any(need[settled]):
            settled += 1
    return joules, now, [w / t if t else 0.0 for w, t in zip(work, busy, strict=True)]


def made_run(window: int, seed: int = 0, requests: int = 60):
    draw = random.Random(seed)
    tokens = [[(draw.randint(3, 60), draw.randint(0, 40)) for _ in NAMES] for _ in range(requests)]
    trace = []
    for request in range(requests):
        kind = draw.random()
        first = draw.choices(range(3), (6, 3, 1))[0]
        if kind < 0.1:
            stages, checks = ((0, 1, 2),), ()
        elif kind < 0.3:
            stages, checks = ((first,), (2,)), (2,)
        elif kind < 0.5:
            stages, checks = ((first,),), (2,)
        else:
            stages, checks = ((first,),), ()
        trace.append(Asked(request, request // window * window, stages, checks, 2))
    return trace, tokens


@pytest.mark.parametrize(("window", "seed"), [(1, 0), (7, 1), (30, 2), (60, 3)])
def test_it_agrees_with_a_player_that_goes_slice_by_slice(window: int, seed: int) -> None:
    trace, tokens = made_run(window, seed)
    played = play(trace, tokens, COSTS)
    joules, seconds, running = brute_force(trace, tokens, COSTS)
    assert played.joules == pytest.approx(joules, rel=0.01)
    assert played.seconds == pytest.approx(seconds, rel=0.01)
    assert played.running == pytest.approx(running, rel=0.02)


def test_by_hand() -> None:
    """Two answers of 10 and 30 tokens side by side, then one of 5 that waited for both; a second engine idles."""
    tokens = [[(100, 10), (0, 1)], [(100, 30), (0, 1)], [(100, 5), (0, 1)]]
    trace = [Asked(0, 0, ((0,),)), Asked(1, 0, ((0,),)), Asked(2, 2, ((0,),))]
    one, two = (StepPoint(1, 4.0, 0.1), StepPoint(2, 5.0, 0.2))
    first = fitted([one, two], joules_per_prompt_token=0.01, idle_watts=50.0)
    played = play(trace, tokens, [first, cost(1.0, idle_watts=7.0)])
    assert played.seconds == pytest.approx(10 * 0.2 + 20 * 0.1 + 5 * 0.1)
    assert played.joules == pytest.approx(3 * 1.0 + 10 * 5 + 20 * 4 + 5 * 4 + 7.0 * 4.5)
    assert played.running == pytest.approx(((2 * 2.0 + 2.5) / 4.5, 0.0))


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40)), min_size=1, max_size=40),
    st.sampled_from(COSTS),
)
def test_what_answers_take_adds_up_to_what_the_engine_takes(
    tokens: list[tuple[int, int]], cost: CostModel
) -> None:
    took = together(cost, tokens)
    played = play(in_one_go([0] * len(tokens)), [[pair] for pair in tokens], [replace(cost, idle_watts=0.0)])
    assert math.fsum(one.joules for one in took) == pytest.approx(played.joules)
    assert all(1.0 - 1e-9 <= one.running <= min(CAP, len(tokens)) + 1e-9 for one in took)


def test_what_each_answer_takes_by_hand() -> None:
    """10 and 30 tokens side by side: the second one is alone for 20 of its steps."""
    one, two = (StepPoint(1, 4.0, 0.1), StepPoint(2, 5.0, 0.2))
    first, second = together(fitted([one, two], joules_per_prompt_token=0.01), [(100, 10), (0, 30)])
    assert first.joules == pytest.approx(1.0 + 10 * 5 / 2)
    assert first.running == pytest.approx(2.0)
    assert second.joules == pytest.approx(10 * 5 / 2 + 20 * 4)
    assert second.running == pytest.approx(30 / (10 / 2 + 20 / 1))


def test_reading_prompts_holds_the_steps_up() -> None:
    tokens = [[(100, 10)], [(50, 10)]]
    point = StepPoint(1, 4.0, 0.1)
    slow = fitted([point], joules_per_prompt_token=0.0, seconds_per_prompt_token=0.01, most_running=1)
    played = play(in_one_go([0, 0]), tokens, [slow])
    assert played.seconds == pytest.approx(1.0 + 0.5 + 20 * 0.1)
    assert played.joules == pytest.approx(20 * 4)


def test_a_request_that_waits_for_itself_is_told() -> None:
    with pytest.raises(ValueError, match="waits for itself"):
        play([Asked(0, 1, ((0,),))], [[(1, 1)]], [cost(1.0)])


def test_larger_windows_take_fewer_joules() -> None:
    rng = random.Random(5)
    tokens = [[(20, 30)] * 3 for _ in range(200)]
    choice = rng.choices(range(3), (6, 3, 1), k=200)
    joules = [
        play([Asked(r, r // window * window, ((m,),)) for r, m in enumerate(choice)], tokens, COSTS).joules
        for window in (4, 40, 200)
    ]
    assert joules == sorted(joules, reverse=True)
    assert joules[0] > 1.5 * joules[-1]
    assert joules[-1] == play(in_one_go(choice), tokens, COSTS).joules


# ---- a table and its engines ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tables") / "outcomes.jsonl"
    draw = random.Random(1)
    with path.open("w") as handle:
        for n in range(150):
            models = {
                name: {
                    "accuracy": float(draw.random() < skill),
                    "joules": joules,
                    "prompt_tokens": 20,
                    "output_tokens": draw.randint(5, 30),
                }
                for name, skill, joules in zip(NAMES, (0.5, 0.7, 0.9), (1.0, 2.0, 9.0), strict=True)
            }
            handle.write(json.dumps({"id": f"r{n}", "prompt": f"word{n % 7}", "models": models}) + "\n")
    return path


def entry(name: str, scale: float, **more: object) -> dict[str, object]:
    points = [
        {
            "mean_running": b,
            "joules_per_output_token": scale * (4 / b + 0.1),
            "output_tokens_per_second": 50 * b,
        }
        for b in (1, 8, 64)
    ]
    return {"model": name, "points": points, "active_parameters_billions": scale, "gpu": "H100", **more}


def engines_file(folder: Path, *entries: dict[str, object]) -> Path:
    path = folder / "engines.json"
    path.write_text(json.dumps({"engines": entries}))
    return path


def test_entries_are_found_by_name_by_order_or_as_said(table_path: Path, tmp_path: Path) -> None:
    table = read_table(str(table_path))

    def labels(path: Path, **pairs: str) -> list[str]:
        said = engines_of(table, path, pairs).said[0]
        return [pair.split(" = ")[1] for pair in said.split(": ", 1)[-1].rsplit(": ", 1)[-1].split(", ")]

    by_name = engines_file(tmp_path, entry("maker/Large", 9), entry("SMALL", 1), entry("medium", 2))
    assert labels(by_name) == ["SMALL,H100", "medium,H100", "maker/Large,H100"]
    assert "guessed" not in engines_of(table, by_name, {}).said[0]
    by_order = engines_file(tmp_path, entry("a", 1), entry("b", 2), entry("c", 9))
    assert labels(by_order) == ["a,H100", "b,H100", "c,H100"]
    assert "guessed" in engines_of(table, by_order, {}).said[0]
    more = engines_file(
        tmp_path, entry("a", 1), entry("b", 2), entry("c", 9), entry("d", 80), entry("e", 1.5, gpu="B200")
    )
    assert labels(more) == ["a,H100", "b,H100", "c,H100"]  # their joules differ most like the table's
    assert labels(more, small="b", medium="e,B200", large="d") == ["b,H100", "e,B200", "d,H100"]


def test_entries_that_cannot_be_found_are_told_with_the_cure(table_path: Path, tmp_path: Path) -> None:
    table = read_table(str(table_path))
    path = engines_file(tmp_path, entry("a", 1), entry("a", 2, gpu="B200"), entry("b", 2))
    with pytest.raises(EnginesError, match=r'2 entries are "a".*card and task'):
        engines_of(table, path, {"small": "a"})
    with pytest.raises(EnginesError, match=r'no entry is "x".*entries are a,H100; a,B200; b,H100'):
        engines_of(table, path, {"small": "x"})
    with pytest.raises(EnginesError, match=r'which entry is model "medium".*--engine "medium=ENTRY"'):
        engines_of(table, path, {"small": "b"})
    with pytest.raises(UsageError, match='no model "tiny"'):
        engines_of(table, path, {"tiny": "b"})
    with pytest.raises(EnginesError, match="2 entries alike for 3 models"):
        engines_of(table, engines_file(tmp_path, entry("a", 1), entry("b", 2)), {})


def test_a_table_without_tokens_is_told(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.jsonl"
    models = {name: {"accuracy": 1.0, "joules": 1.0} for name in NAMES}
    path.write_text(json.dumps({"id": "a", "prompt": "x", "models": models}) + "\n")
    with pytest.raises(OutcomesError, match=r'no "prompt_tokens" and "output_tokens" of model "small"'):
        engines_of(read_table(str(path)), engines_file(tmp_path, *(entry(name, 1) for name in NAMES)), {})


# ---- the command --------------------------------------------------------------------------------------


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, ["simulate", *map(str, arguments), "--jobs", "1", "--quiet"])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_plays_its_own_trace(table_path: Path, tmp_path: Path) -> None:
    path = engines_file(tmp_path, *(entry(name, 3.0**n) for n, name in enumerate(NAMES)))
    trace, out = tmp_path / "trace.jsonl", tmp_path / "out.jsonl"
    printed = run(
        table_path, "--alpha", 0.7, "--window", 32, "--engines", path, "--trace", trace, "--out", out,
        "--order-seeds", 1,
    )  # fmt: skip
    (row,) = map(json.loads, out.read_text().splitlines())
    rows = [json.loads(line) for line in trace.read_text().splitlines()]
    assert len(rows) == 150
    assert list(rows[0]) == ["id", "settled", "stages", "checks", "model"]
    starts = sorted({row["settled"] for row in rows})
    assert starts[0] == 0
    assert all(later - before <= 32 for before, later in zip(starts, [*starts[1:], 150], strict=True))
    assert all(row["settled"] <= place for place, row in enumerate(rows))
    table = read_table(str(table_path))
    served = {name: sum(row["model"] == name for row in rows) for name in NAMES}
    assert served == row["served"]
    # the same run, by the other player
    engines = engines_of(table, path, {})
    where = {request.id: n for n, request in enumerate(table.requests)}
    asked = [
        Asked(where[r["id"]], r["settled"], tuple(tuple(map(NAMES.index, stage)) for stage in r["stages"]))
        for r in rows
    ]
    joules, seconds, _ = brute_force(asked, engines.tokens, engines.costs, slice_of_a_step=0.05)
    assert row["in_load"]["joules"] == pytest.approx(joules / 150, rel=0.02)
    assert row["in_load"]["seconds"] == pytest.approx(seconds, rel=0.02)
    largest = brute_force(in_one_go([2] * 150), engines.tokens, engines.costs, slice_of_a_step=0.05)[0]
    assert row["in_load"]["of_largest"] == pytest.approx(joules / largest, rel=0.02)
    assert "in load:" in printed
    assert "all large, in one go" in printed


def test_joules_are_those_of_full_engines(table_path: Path, tmp_path: Path) -> None:
    path = engines_file(tmp_path, *(entry(name, 3.0**n) for n, name in enumerate(NAMES)))
    out = tmp_path / "out.jsonl"
    run(table_path, "--alpha", 0.7, "--policy", "largest", "--engines", path, "--out", out)
    (row,) = map(json.loads, out.read_text().splitlines())
    table = read_table(str(table_path))
    tokens = [table.outcomes[request.id]["large"].output_tokens for request in table.requests]
    full = sum(tokens) / 150 * 9 * (4 / 64 + 0.1) + 20 * 2e9 * 9 * 600 / 4e14
    assert row["billed_joules"] == pytest.approx(full)
    assert row["in_load"]["joules"] > full  # window 1: one at a time


def test_a_run_decides_by_what_was_read_in_load(table_path: Path, tmp_path: Path) -> None:
    table = read_table(str(table_path))
    engines = engines_of(
        table, engines_file(tmp_path, entry("small", 1), entry("medium", 2), entry("large", 9)), {}
    )
    priced = at_full_load(table, engines)
    requests = priced.requests[:9]
    (answers,) = priced.source.answers([(request, (0,)) for request in requests])
    outcomes = [outcome for _, _, outcome in answers]
    assert [one.joules for one in outcomes] == [priced.outcomes[r.id]["small"].joules for r in requests]
    took = together(engines.costs[0], [(one.prompt_tokens, one.output_tokens) for one in outcomes])
    assert [(one.worth, one.running) for one in outcomes] == [(one.joules, one.running) for one in took]


def test_a_trace_is_of_one_run(table_path: Path, tmp_path: Path) -> None:
    for more in (
        ["--alpha", "0.6,0.7"],
        ["--alpha", "0.7", "--order-seeds", "2"],
        ["--alpha", "0.7", "--v", "1,2"],
    ):
        result = CliRunner().invoke(
            main, ["simulate", str(table_path), *more, "--trace", str(tmp_path / "t"), "--quiet"]
        )
        assert result.exit_code == 2
        assert "--trace is of one run" in result.output
    result = CliRunner().invoke(main, ["simulate", str(table_path), "--alpha", "0.7", "--engine", "a=b"])
    assert result.exit_code == 2
    assert "Give --engines FILE too" in result.output


@pytest.mark.slow
def test_advice_is_what_takes_least_in_load(table_path: Path, tmp_path: Path) -> None:
    path = engines_file(tmp_path, *(entry(name, 3.0**n) for n, name in enumerate(NAMES)))
    options = [
        "--alpha",
        0.6,
        "--best",
        "--order-seeds",
        2,
        "--predictor",
        "mean",
        "--c",
        "0.1,3",
        "--v",
        "0.01,0.1",
    ]
    text = run(table_path, *options, "--engines", path, "--window", 16)
    assert "engines: small = small,H100" in text
    assert "J per request: " in text
    assert "of the blind mix, both in one go" in text
    table = read_table(str(table_path))
    engines = engines_of(table, path, {})
    table = at_full_load(table, engines)
    config = SimulateConfig(
        (0.6,), v=(0.01, 0.1), c=(0.1, 3.0), orders=2, setup=Setup(predictor="mean", window=16)
    )
    (advice,) = advise(table, config, engines=engines)
    everything = lines(simulate(table, replace(config, policies=("mess+",)), engines=engines))
    good = [line for line in everything if line.meets == 2]
    assert advice.chosen is not None
    assert advice.chosen.in_load == min((line.in_load for line in good), key=lambda load: load.joules)  # type: ignore[union-attr]
    # windows of 16 starve engines, whatever the length: one model alone takes less
    assert advice.lengths is not None
    assert advice.lengths.enough is None
    assert "too short to route: with all 150 requests it takes" in text
    assert f"Use {advice.lengths.model}" in text
    refused = CliRunner().invoke(
        main, ["simulate", str(table_path), "--alpha", "0.6", "--best", "--trace", str(tmp_path / "t")]
    )
    assert refused.exit_code == 2


def test_without_engines_nothing_changes(table_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    printed = run(table_path, "--alpha", 0.7, "--policy", "mess+", "--out", out)
    assert "in load" not in printed
    assert "in_load" not in json.loads(out.read_text())
    assert math.isclose(sum(json.loads(out.read_text())["served"].values()), 150)

"""`simulate`: the loop over a table, the yardsticks in hindsight, advice, evidence and the command."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from messcli.cli import main
from messcli.errors import MessError
from messcli.records import Outcome, Request
from messcli.routing.loop import chunks
from messcli.routing.setup import Setup, create_controller
from messcli.routing.sla import DEFAULT_PLAN
from messcli.simulation import SimulateConfig, simulate
from messcli.simulation.advice import Lengths, advice_lines, advise
from messcli.simulation.hindsight import cheapest_assignment, oracle, static_mix
from messcli.simulation.results import lines
from messcli.simulation.runs import Task, alphas_at, each, run_task
from messcli.simulation.table import OutcomeTable, read_table

NAMES = ("small", "medium", "large")
FIELDS = [
    "policy", "alpha", "v", "c", "seed", "requests", "accuracy", "billed_joules", "paper_joules", "explorations",
    "served", "meets_alpha",
]  # fmt: skip


def make_table(rows=300, seed=0) -> OutcomeTable:
    """Requests whose words tell how hard they are: small models get the easy ones right."""
    draw = random.Random(seed)
    words = [f"word{n}" for n in range(40)]
    made, outcomes = [], {}
    for n in range(rows):
        chosen = draw.choices(words, k=draw.randint(2, 9))
        hardness = sum(int(word[4:]) for word in chosen) / (40 * len(chosen))
        made.append(Request(f"r{n}", " ".join(chosen), references=("recorded",)))
        outcomes[f"r{n}"] = {
            name: Outcome(
                output=None,
                accuracy=float(draw.random() < skill - 1.2 * (1 - skill) * hardness),
                joules=cost * (1 + 0.1 * len(chosen)),
                seconds=cost / 10,
            )
            for name, skill, cost in zip(NAMES, (0.6, 0.75, 0.95), (1.0, 3.0, 12.0), strict=True)
        }
    return OutcomeTable(NAMES, tuple(made), outcomes)


TABLE = make_table()


@pytest.fixture(scope="module")
def table_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tables") / "outcomes.jsonl"
    with path.open("w") as handle:
        for request in TABLE.requests:
            models = {
                name: {"accuracy": o.accuracy, "joules": o.joules, "seconds": o.seconds}
                for name, o in TABLE.outcomes[request.id].items()
            }
            handle.write(json.dumps({"id": request.id, "prompt": request.prompt, "models": models}) + "\n")
    return str(path)


def task(policy="mess+", v=0.1, c=3.0, alpha=0.7, shuffled=False, seed=0, **setup) -> Task:
    return Task(Setup(policy, v, c, seed=seed, **{"predictor": "linear", **setup}), alpha, shuffled)


# ---- one run ----------------------------------------------------------------------------------------


def test_a_run_is_the_loop_of_route_over_the_table():
    own = task(learn="explored")
    controller = create_controller(
        replace(own.setup, horizon=len(TABLE.requests)), 3, {DEFAULT_PLAN: own.alpha}
    )
    settled = [line for chunk in chunks(TABLE.requests, controller, TABLE.source) for line in chunk.lines]
    result = run_task(TABLE, own)
    served = [line.outcomes[line.served] for line in settled]
    assert result.accuracy == pytest.approx(np.mean([o.accuracy for o in served]))
    assert result.paper_joules == pytest.approx(np.mean([o.joules for o in served]))
    assert result.billed_joules == pytest.approx(np.mean([line.billed_joules for line in settled]))
    assert result.explorations == sum(line.decision.explored for line in settled) > 0
    assert sum(result.served.values()) == result.requests == len(TABLE.requests)


def test_every_exploration_is_billed_in_full():
    result = run_task(TABLE, task(c=1e9))  # explores always
    assert result.explorations == len(TABLE.requests)
    assert result.served == {"small": 0, "medium": 0, "large": len(TABLE.requests)}
    assert result.billed_joules == pytest.approx(TABLE.joules.sum(axis=1).mean())
    assert result.paper_joules == pytest.approx(TABLE.joules[:, -1].mean())


@pytest.mark.parametrize("predictor", ["linear", "ridge", "fasttext", "mean"])
@pytest.mark.slow
def test_a_run_says_the_same_when_its_features_are_known(predictor):
    table = make_table(90)
    own = task(predictor=predictor, learn="all", shuffled=True, seed=3)
    assert run_task(table, own) == run_task(table, own)


def test_orders_differ_and_are_reproducible():
    results = [run_task(TABLE, task(shuffled=True, seed=seed)) for seed in (0, 1, 0)]
    assert results[0] == results[2] != results[1]


@pytest.mark.slow
def test_processes_give_what_one_process_gives():
    config = SimulateConfig((0.65, 0.75), v=(0.1, 1.0), c=(1.0,), orders=2, setup=Setup(predictor="linear"))
    assert simulate(TABLE, replace(config, jobs=2)) == simulate(TABLE, config)


def _die(table, item):
    os._exit(9)


def test_a_killed_process_is_told():
    with pytest.raises(MessError, match="Run with --jobs 1"):
        each(_die, [1, 2], TABLE, 2)


def test_a_result_per_policy_setting_and_order():
    seen = []
    config = SimulateConfig(
        (0.6, 0.7), v=(0.1, 1.0), c=(1.0, 3.0), orders=3, setup=Setup(seed=5, predictor="linear")
    )
    results = simulate(TABLE, config, lambda done, total: seen.append((done, total)))
    cells = [(r.policy, r.alpha, r.v, r.c, r.seed) for r in results]
    assert len(cells) == len(set(cells)) == 2 * 3 * (4 + 4)  # four settings of mess+, four other policies
    assert {r.seed for r in results} == {5, 6, 7}
    assert seen[-1][0] == seen[-1][1] == len(seen)
    blind = [r for r in results if r.policy == "largest"]
    assert {r.accuracy for r in blind} == {float(TABLE.accuracies[:, -1].mean())}
    assert len(seen) == 2 + 2 * 3 * (4 + 1)  # smallest and largest run once for all alphas and orders
    for result in results:
        assert result.meets_alpha == (result.accuracy >= result.alpha - 1e-9)
    summed = lines(results)
    assert [line.orders for line in summed] == [3] * 16


# ---- hindsight --------------------------------------------------------------------------------------

# The solver takes what is below its tolerance, 1e-7, for 0.
unit = st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.floats(0, 1).map(lambda value: round(value, 6))
cells = st.tuples(unit, st.floats(0.1, 100))


@st.composite
def small_tables(draw):
    models = draw(st.integers(1, 4))
    rows = draw(st.lists(st.lists(cells, min_size=models, max_size=models), min_size=1, max_size=7))
    array = np.array(rows, float)
    return array[:, :, 0], array[:, :, 1]


@given(small_tables(), unit)
def test_the_oracle_is_the_linear_programme_rounded_up(table, alpha):
    accuracies, joules = table
    count, models = accuracies.shape
    choice = cheapest_assignment(accuracies, joules, alpha)
    rows = np.arange(count)
    reached, spent = accuracies[rows, choice].sum(), joules[rows, choice].sum()
    if accuracies.max(axis=1).mean() < alpha:
        assert reached == pytest.approx(accuracies.max(axis=1).sum())
        return
    solved = linprog(
        joules.ravel(),
        A_ub=[-accuracies.ravel()],
        b_ub=[-alpha * count],
        A_eq=np.kron(np.eye(count), np.ones(models)),
        b_eq=np.ones(count),
    )
    if solved.status != 0:  # on the very edge of what is feasible the solver may give up
        return
    assert reached >= alpha * count - 1e-6
    assert spent >= solved.fun - 1e-6 * (1 + abs(solved.fun))
    # at most one request is rounded, by at most the dearest step there is
    assert spent <= solved.fun + (joules.max(axis=1) - joules.min(axis=1)).max() + 1e-6 * (1 + solved.fun)


@pytest.mark.parametrize("at", [0.1, 0.5, 0.9])
def test_yardsticks_on_a_table(at):
    (alpha,) = alphas_at(TABLE, (at,))
    static, known = static_mix(TABLE, alpha), oracle(TABLE, alpha)
    means, joules = TABLE.accuracies.mean(axis=0), TABLE.joules.mean(axis=0)
    solved = linprog(joules, A_ub=[-means], b_ub=[-alpha], A_eq=[[1, 1, 1]], b_eq=[1])
    assert static.billed_joules == pytest.approx(solved.fun)
    assert static.accuracy >= alpha - 1e-9
    assert known.accuracy >= alpha - 1e-9
    assert known.billed_joules < static.billed_joules
    assert sum(known.served.values()) == len(TABLE.requests)


def test_alphas_lie_between_the_smallest_and_the_best_model():
    low, high = TABLE.accuracies[:, 0].mean(), TABLE.accuracies.mean(axis=0).max()
    assert alphas_at(TABLE, (0, 0.5, 1)) == pytest.approx((low, 0.5 * (low + high), high))


# ---- advice -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_advice_is_the_cheapest_setting_that_keeps_the_promise():
    table = make_table(150)
    config = SimulateConfig(
        (0.66, 0.8, 0.999), v=(0.001, 0.1, 1000.0), c=(0.3,), orders=4, setup=Setup(predictor="linear")
    )
    easy, fair, never = advise(table, config)
    everything = lines(simulate(table, replace(config, alphas=(0.66,), policies=("mess+",))))
    good = [line for line in everything if line.meets == line.orders]
    assert easy.chosen in good
    assert easy.chosen.billed_joules == min(line.billed_joules for line in good)
    assert easy.check.orders == 4
    assert easy.tried == 3
    assert fair.best_model == "large"
    assert never.chosen is None
    assert never.nearest is not None
    assert "out of reach" in advice_lines(table, never)[1]
    text = "\n".join(advice_lines(table, easy))
    assert "orders not used for choosing" in text
    assert f"messcli route --alpha 0.66 --v {easy.chosen.v:g} --c 0.3" in text


@pytest.mark.parametrize(
    ("tried", "enough", "told"),
    [
        (((64, 1.4), (128, 0.9), (256, 0.5)), 128, "under 128 requests: use large (with 64 routing takes 1.40 of it"),
        (((64, 0.9), (128, 1.1), (256, 0.5)), 256, "under 256 requests: use large"),
        (((64, 0.9), (128, 0.8)), 64, "long enough: with 64 requests"),
        (((64, 0.9), (128, 1.01)), None, "too short to route: with all 128 requests it takes 1.01 of large alone"),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_a_job_may_be_too_short_to_route(tried, enough, told):
    table = make_table(150)
    config = SimulateConfig((0.66,), v=(0.1,), c=(0.3,), orders=2, setup=Setup(predictor="linear"))
    (advice,) = advise(table, config)
    lengths = Lengths("large", tried)
    assert lengths.enough == enough
    assert told in "\n".join(advice_lines(table, replace(advice, lengths=lengths)))


@pytest.mark.parametrize(
    ("alpha", "command"), [(0.66, "messcli route --policy largest"), (0.01, "--policy smallest")]
)
def test_where_one_model_takes_less_its_command_is_advised(alpha, command):
    """The large model costs little more than the others here, so that explorations never pay."""
    table = make_table(150)
    cheap = {"small": 1.0, "medium": 1.01, "large": 1.02}
    outcomes = {
        key: {name: replace(one, joules=cheap[name]) for name, one in known.items()}
        for key, known in table.outcomes.items()
    }
    table = replace(table, outcomes=outcomes)
    if alpha > 0.5:  # the middle one can't keep it
        low = {"small": 0.0, "medium": 0.0, "large": 1.0}
        outcomes = {
            key: {name: replace(one, accuracy=low[name]) for name, one in known.items()}
            for key, known in outcomes.items()
        }
        table = replace(table, outcomes=outcomes)
    config = SimulateConfig((alpha,), v=(0.001,), c=(3.0,), orders=2, setup=Setup(predictor="mean"))
    (advice,) = advise(table, config)
    assert advice.lengths.enough is None
    assert advice.command.endswith(command)
    assert f"Use {advice.lengths.model}" in "\n".join(advice_lines(table, advice))


@pytest.mark.slow
def test_shorter_jobs_are_run_and_compared_with_one_model_alone():
    table = make_table(300)
    config = SimulateConfig((0.66,), v=(0.001,), c=(0.3,), orders=3, setup=Setup(predictor="linear"))
    (advice,) = advise(table, config)
    means = table.accuracies.mean(axis=0)
    able = [m for m in range(3) if means[m] >= 0.66]
    alone = min(able, key=lambda m: table.joules[:, m].mean())
    assert advice.lengths.model == NAMES[alone]
    assert [requests for requests, _ in advice.lengths.tried] == [75, 150, 300]
    setup = Setup("mess+", 0.001, 0.3, predictor="linear")
    ratios = []
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(300)[:75]
        result = run_task(table, Task(replace(setup, seed=seed), 0.66, shuffled=True, limit=75))
        assert result.requests == 75
        ratios.append(result.billed_joules * 75 / table.joules[order, alone].sum())
    assert advice.lengths.tried[0][1] == pytest.approx(np.mean(ratios))


# ---- the command ------------------------------------------------------------------------------------


def invoke(*arguments):
    return CliRunner().invoke(main, ["simulate", "-q", "--jobs", "1", *arguments])


def test_the_table_on_the_terminal(table_file):
    result = invoke(
        table_file, "--alpha", "0.7", "--order-seeds", "2", "--predictor", "linear", "--v", "0.1,1"
    )
    assert result.exit_code == 0
    block = [line.split() for line in result.stdout.splitlines() if line.startswith("  ")]
    assert [row[0] for row in block] == [
        "policy", "smallest", "largest", "random", "mess+", "mess+", "oracle", "static",
    ]  # fmt: skip
    assert "alpha 0.7000" in result.stdout


def test_out_has_exactly_the_promised_fields(table_file, tmp_path):
    out = tmp_path / "results.jsonl"
    result = invoke(
        table_file, "--alpha", "0.6,0.7", "--out", str(out), "--policy", "mess+", "--policy", "oracle"
    )
    assert result.exit_code == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["policy"], row["alpha"]) for row in rows] == [
        ("mess+", 0.6), ("oracle", 0.6), ("mess+", 0.7), ("oracle", 0.7),
    ]  # fmt: skip
    assert all(list(row) == FIELDS for row in rows)


def test_plots_are_drawings_that_need_nothing_else(table_file, tmp_path):
    folder = tmp_path / "plots"
    result = invoke(
        table_file, "--alpha-at", "0.5", "--plot", str(folder), "--v", "0.1,1,10", "--predictor", "mean"
    )
    assert result.exit_code == 0
    names = {"tradeoff.svg", "accuracy_by_v.svg", "energy_by_v.svg"}
    assert {path.name for path in folder.iterdir()} == names
    for name in names:
        text = (folder / name).read_text()
        assert ElementTree.fromstring(text).tag.endswith("svg")  # noqa: S314  # our own file
        assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
        assert "nan" not in text


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "no target accuracy. Give --alpha, or --alpha-at 0.5"),
        (("--alpha", "1.5"), 2, "--alpha"),
        (("--alpha", "much"), 2, "'much' is not a valid number"),
        (("--alpha", "0.7", "--v", "0"), 2, "--v"),
        (("--alpha", "0.7", "--models", "small,huge"), 1, 'no outcome of model "huge"'),
        (("--alpha", "0.7", "--out", "/dev/null/out"), 1, "Give a writable place with --out"),
    ],
)
def test_mistakes_are_told_in_one_line(table_file, arguments, code, message):
    result = invoke(table_file, "--policy", "smallest", *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stdout == ""


@pytest.mark.slow
def test_the_papers_evidence_is_one_command(table_file, tmp_path, monkeypatch):
    monkeypatch.setattr("tools.research.evidence.SWEPT_V", (0.1, 10.0))
    folder = tmp_path / "evidence"
    result = invoke(table_file, "--paper", str(folder), "--order-seeds", "1")
    assert result.exit_code == 0, result.output
    text = (folder / "results.md").read_text()
    for heading in ("Table 1", "Figure 1", "Figure 2", "Table 2", "Claims"):
        assert f"## {heading}" in text
    numbers = json.loads((folder / "numbers.json").read_text())
    assert {run["c"] for run in numbers["learning"]} == {float(c) for c in range(1, 11)}
    assert {line["policy"] for line in numbers["lines"]} == {
        "smallest",
        "largest",
        "random",
        "mess+",
        "oracle",
    }
    by_c = {run["c"]: run["seconds"] for run in numbers["learning"]}
    assert by_c[1.0] < by_c[3.0] < by_c[10.0]  # the table has seconds, and exploring takes longer
    for image in ("figure_1_accuracy_by_v", "figure_1_energy_by_v", "figure_2_loss"):
        assert f"({image}.svg)" in text
        assert (folder / f"{image}.svg").is_file()


def test_reads_what_record_writes_and_best_names_a_setting(table_file):
    assert read_table(table_file).accuracies.tolist() == TABLE.accuracies.tolist()
    result = invoke(
        table_file, "--alpha", "0.66", "--best", "--order-seeds", "2", "--v", "0.1", "--predictor", "mean"
    )
    assert result.exit_code == 0
    assert "best of 3 settings" in result.stdout or "none of 3 settings" in result.stdout


# ---- without references --------------------------------------------------------------------------


def test_audit_hides_accuracies_and_bills_what_finds_them() -> None:
    config = SimulateConfig(alphas=(0.8,), policies=("largest", "mess+"), orders=2, audit=True)
    largest, _, first, second = simulate(make_table(rows=400), config)
    assert largest.audited is None
    for result in (first, second):
        found = result.audited
        assert found is not None
        assert 0 < found.share < 1
        assert found.later == 0
        assert 0 < found.joules < result.billed_joules
        assert found.bound < found.estimate
        assert found.holds == 1
        assert abs(found.estimate - result.accuracy) < 0.2
        assert result.row()["audited"]["bound"] == found.bound
    assert "audited" not in largest.row()


def test_against_largest_scores_outputs_by_its_own(tmp_path) -> None:
    rows = [
        {
            "id": n,
            "prompt": f"question {n}",
            "models": {
                "small": {"output": "yes" if n % 4 else "no", "accuracy": 0.0, "joules": 1.0},
                "large": {"output": "yes", "accuracy": 0.5, "joules": 10.0},
            },
        }
        for n in range(120)
    ]
    table = tmp_path / "table.jsonl"
    table.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    options = [
        "--alpha",
        "0.9",
        "--policy",
        "mess+",
        "--against",
        "largest",
        "--metric",
        "exact",
        "--jobs",
        "1",
    ]
    shown = CliRunner().invoke(main, ["simulate", str(table), *options, "--audit"])
    assert shown.exit_code == 0, shown.output
    assert "small 0.750 at 1 J, large 1.000 at 10 J" in shown.output
    assert "audits:" in shown.output
    without = CliRunner().invoke(main, ["simulate", str(table), *options])
    assert "audits:" not in without.output


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        (["--against", "largest"], "Record it with outputs, or give --audit alone"),
        (["--sure"], "Give --audit too"),
        (["--audit", "--best"], "Give --audit without them"),
    ],
)
def test_what_audits_can_not_do_is_said(options, cure, tmp_path) -> None:
    table = tmp_path / "table.jsonl"
    models = {"small": {"accuracy": 0.5, "joules": 1.0}, "large": {"accuracy": 0.9, "joules": 9.0}}
    table.write_text(json.dumps({"id": 1, "prompt": "a", "models": models}) + "\n")
    shown = CliRunner().invoke(main, ["simulate", str(table), "--alpha", "0.8", *options])
    assert shown.exit_code in (1, 2)
    assert cure in shown.output

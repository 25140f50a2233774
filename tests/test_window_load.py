"""Joules by what ran beside: the line of each model, windows that leave models out, and where a run goes on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_policy import NAMES, Table, table

from messcli.errors import StateError
from messcli.models.billing import mean_running
from messcli.predict.base import create_predictor
from messcli.predict.joules import JoulesPredictor
from messcli.records import Answer, Asked, Decision, Outcome
from messcli.routing import load
from messcli.routing.auto import Auto
from messcli.routing.controller import Controller
from messcli.routing.deciding import Settings, at_their_loads
from messcli.routing.knowledge import Knowledge
from messcli.routing.line import Chunk, Settled
from messcli.routing.load import Share
from messcli.routing.loop import chunks
from messcli.routing.sla import DEFAULT_PLAN
from messcli.routing.tuning import TUNING
from messcli.snapshots import Part

STEPS, OWN = (40.0, 80.0, 200.0), (0.2, 1.0, 6.0)  # joules of a batch, and of each request in it
ROWS = 1200


FEW = int(TUNING.loads.few)


def loads_of(models: int) -> load.Loads:
    return load.Loads(models, TUNING.loads)


def read(loads: load.Loads, m: int, models: int, running: float, joules: float, times: int = FEW) -> None:
    for _ in range(times):
        row = [math.nan] * models
        row[m] = joules
        loads.settle(row, [running if n == m else math.nan for n in range(models)], [1.0] * models)


amounts = st.floats(0.01, 1e4)


def test_the_lines_error_is_known_from_three_loads_on() -> None:
    loads = loads_of(1)
    for b, factor in ((4, 1.0), (32, 1.0)):
        read(loads, 0, 1, b, factor * (100.0 / b + 1.0))
    loads.close_window()
    assert loads.shares is not None
    assert math.isnan(loads.shares[0].error)
    read(loads, 0, 1, 200, 100.0 / 200 + 1.0)
    loads.close_window()
    assert loads.shares[0].error == pytest.approx(0.0, abs=1e-9)
    read(loads, 0, 1, 8, 5.0 * (100.0 / 8 + 1.0))
    loads.close_window()
    assert loads.shares[0].error > 0.2


@given(amounts, amounts, st.sampled_from([(1, 4), (3, 200), (16, 256)]))
def test_two_loads_tell_the_line(steps: float, own: float, running: tuple[int, int]) -> None:
    loads = loads_of(1)
    for b in running:
        read(loads, 0, 1, b, steps / b + own)
    loads.close_window()
    assert loads.shares is not None
    (share,) = loads.shares
    assert share.full == pytest.approx(steps / running[1] + own, rel=1e-6)
    assert loads.waking == pytest.approx(share.steps)
    alone = loads.settle([steps + own], [1.0], [1.0])
    assert alone == pytest.approx([share.full / (steps + own)], rel=1e-6)


@given(st.lists(st.integers(1, 2000), min_size=2 * FEW, max_size=200), st.integers(1, 9))
def test_long_answers_that_run_alone_do_not_bend_the_line(tokens: list[int], last: int) -> None:
    """As at the end of a window: the longest answers run beside few others."""
    loads = loads_of(1)
    for place, written in enumerate(sorted(tokens)):
        running = 1.0 + max(0, len(tokens) - place - last)
        loads.settle([written * (30.0 / running + 0.5)], [running], [written])
    loads.close_window()
    assert loads.shares is not None
    (share,) = loads.shares
    mean = sum(tokens) / len(tokens)
    assert share.steps == pytest.approx(30.0 * mean, rel=1e-3)
    assert share.own == pytest.approx(0.5 * mean, rel=1e-2)


def test_tokens_that_nobody_told_are_those_of_a_mean_answer() -> None:
    loads = loads_of(1)
    for b in (4, 64) * FEW:
        loads.settle([20 * (100.0 / b + 1.0)], [b], [20.0])
        loads.settle([20 * (100.0 / b + 1.0)], [b], [math.nan])
    loads.close_window()
    assert loads.shares is not None
    assert loads.shares[0].steps == pytest.approx(2000.0)


def test_nothing_is_said_before_one_was_read_at_two_loads() -> None:
    loads = loads_of(2)
    read(loads, 0, 2, 4, 10.0)
    read(loads, 1, 2, 8, 30.0)
    loads.close_window()
    assert loads.shares is None
    assert loads.settle([10.0, 30.0], [4.0, 8.0], [1.0, 1.0]).tolist() == [1.0, 1.0]
    assert loads.waking == 0.0
    read(loads, 0, 2, 64, 1.0)
    loads.close_window()
    assert loads.shares is not None


def test_a_model_of_one_load_is_taken_for_the_one_whose_steps_weigh_least() -> None:
    loads = loads_of(3)
    for m, (steps, own) in enumerate([(100.0, 0.1), (100.0, 10.0)]):
        for b in (4, 64):
            read(loads, m, 3, b, steps / b + own)
    read(loads, 2, 3, 16, 25.0)
    loads.close_window()
    assert loads.shares is not None
    last = loads.shares[2]
    assert last.steps / last.own == pytest.approx(10.0)
    assert last.steps / 16 + last.own == pytest.approx(25.0)


def test_of_a_model_that_was_never_read_nothing_is_concluded() -> None:
    loads = loads_of(2)
    for b in (4, 64):
        read(loads, 0, 2, b, 100.0 / b + 1.0)
    loads.close_window()
    assert loads.shares is not None
    assert loads.shares[1].steps == loads.shares[1].idle(3) == 0.0


def test_an_engine_that_had_more_to_do_than_it_ran_is_full() -> None:
    loads = loads_of(2)
    for b in (4, 32):
        read(loads, 0, 2, b, 100.0 / b + 1.0, times=32)  # 64 in the window, never more than 32 at a time
        read(loads, 1, 2, b, 100.0 / b + 1.0)
    read(loads, 1, 2, 128, 100.0 / 128 + 1.0, times=100)
    loads.close_window()
    assert loads.shares is not None
    assert [share.room for share in loads.shares] == pytest.approx([32.0, 128.0])


def test_a_share_pays_whole_steps() -> None:
    share = Share(steps=100.0, own=2.0, room=50.0)
    assert share.of(1) == 102.0
    assert share.of(50) == share.full == 4.0
    assert share.of(51) * 51 == pytest.approx(200 + 51 * 2)
    assert share.of(0) == share.full
    assert [share.idle(n) for n in (0, 25, 50, 100)] == pytest.approx([0.0, 50.0, 0.0, 0.0])


def test_what_is_kept_goes_on() -> None:
    loads, again = loads_of(2), loads_of(2)
    for m, b in ((0, 4), (0, 64), (1, 8)):
        read(loads, m, 2, b, 100.0 / b + 1.0)
    loads.close_window()
    read(loads, 1, 2, 64, 3.0, times=3)
    again.load(Part.loads(loads.state().dumps()))
    for one in (loads, again):
        one.close_window()
    assert again.shares == loads.shares
    assert again.state().dumps() == loads.state().dumps()


def test_running_is_the_harmonic_mean_over_an_answers_tokens() -> None:
    assert mean_running([(10, 4)]) == 4.0
    assert mean_running([(10, 4), (30, 12)]) == pytest.approx(40 / (10 / 4 + 30 / 12))
    assert mean_running([]) is None
    assert mean_running([(0, 3)]) is None


def test_an_outcome_keeps_what_ran_beside_it() -> None:
    outcome = Outcome("a", 1.0, 2.0, running=12.5)
    assert Outcome.loads(outcome.dumps()) == outcome
    older = outcome.dumps().replace(b'"running":12.5,', b"")
    assert Outcome.loads(older) == replace(outcome, running=None)


class Batches(Table):
    """A table whose models run what they are given at once: its joules are those of steps and of each request.

    `tells`: it says how many ran.
    """

    def __init__(self, source: Table, *, tells: bool = True) -> None:
        super().__init__(source.names, source.outcomes)
        self.joules = 0.0
        self.most = 256
        self._tells = tells

    def answers(self, asked: Asked) -> Iterator[Sequence[Answer]]:
        by_model: dict[int, list[int]] = {}
        for position, (_, models) in enumerate(asked):
            for m in models:
                by_model.setdefault(m, []).append(position)
        for m, positions in sorted(by_model.items()):
            for start in range(0, len(positions), self.most):
                batch = positions[start : start + self.most]
                each = STEPS[m] / len(batch) + OWN[m]
                self.joules += each * len(batch)
                running = float(len(batch)) if self._tells else None
                yield [
                    (
                        place,
                        m,
                        replace(self.outcomes[asked[place][0].id][NAMES[m]], joules=each, running=running),
                    )
                    for place in batch
                ]


def controller(rows: int = ROWS) -> Controller:
    settings = Settings(alphas={DEFAULT_PLAN: 0.5}, window=None, horizon=rows)
    return Controller(3, Auto(rows), create_predictor("ridge", 3), JoulesPredictor(3), settings)


def served(chunk: Chunk) -> list[tuple[Settled, Outcome]]:
    """Its finished requests, with what was served."""
    lines = [line for line in chunk.lines if isinstance(line, Settled) and line.served is not None]
    return [(line, line.outcomes[line.served]) for line in lines if line.served is not None]


def job(seed: int, *, unaware: bool = False) -> tuple[float, float, list[list[int]]]:
    """Joules, mean accuracy, and by window the models that were asked."""
    requests, recorded = table(ROWS, seed)
    source, control = Batches(recorded, tells=not unaware), controller()
    accuracy, windows = 0.0, []
    for chunk in chunks(requests, control, source):
        if chunk.opened is not None:
            asked = Counter(m for item in chunk.opened if item.decision for m in item.decision.asked)
            windows.append(sorted(asked))
        accuracy += sum(outcome.accuracy or 0.0 for _, outcome in served(chunk))
    return source.joules, accuracy / ROWS, windows


@pytest.mark.slow
def test_windows_leave_models_out_and_the_job_takes_less() -> None:
    aware = [job(seed) for seed in range(4)]
    unaware = [job(seed, unaware=True) for seed in range(4)]
    assert sum(joules for joules, _, _ in aware) < 0.9 * sum(joules for joules, _, _ in unaware)
    assert min(accuracy for _, accuracy, _ in aware) > 0.49
    assert any(len(asked) < 3 for _, _, windows in aware for asked in windows[3:])


@pytest.mark.slow
def test_a_run_that_goes_on_decides_as_one_that_was_never_stopped() -> None:
    requests, recorded = table(ROWS, 5)
    whole = controller()
    for _ in chunks(requests, whole, Batches(recorded)):
        pass
    first = controller()
    stopped = 0
    for chunk in chunks(requests, first, Batches(recorded)):
        stopped += len(chunk.lines)
        if chunk.ends_window and stopped >= ROWS // 4:
            break
    kept = first.state()
    assert "loads" in kept.parts
    second = controller()
    second.load(Part.loads(kept.dumps()))
    for _ in chunks(requests[stopped:], second, Batches(recorded)):
        pass
    assert second.state().dumps() == whole.state().dumps()


def test_joules_are_told_as_the_share_will_pay_them() -> None:
    requests, recorded = table(ROWS, 1)
    source, control = Batches(recorded), controller()
    told, read_joules = [], []
    for chunk in chunks(requests, control, source):
        for line, outcome in served(chunk):
            expected = line.decision.joules_predicted
            if line.decision.t > ROWS // 2 and expected is not None and line.served is not None:
                told.append(expected[line.served])
                read_joules.append(outcome.joules or 0.0)
    assert len(told) > ROWS // 4
    assert sum(told) == pytest.approx(sum(read_joules), rel=0.2)


def test_a_larger_model_is_looked_for_at_the_joules_that_prices_were_solved_with() -> None:
    """At the load of the few requests that it is given at first, no answer would ever be worth asking it."""
    shares = [Share(steps=100.0, own=1.0, room=100.0), Share(steps=1000.0, own=10.0, room=100.0)]
    small = Decision(
        1,
        0,
        (0,),
        explored=False,
        estimates=(0.5, 0.9),
        joules_predicted=(2.0, 20.0),
        owed=False,
        larger=(1,),
    )
    both = replace(small, asked=(0, 1), model=1)
    told = [decision.joules_predicted for decision in at_their_loads([*[small] * 49, both], shares)]
    assert told[0] == pytest.approx((2.0 * 3.0 / 2.0, 20.0))
    assert told[-1] == pytest.approx((2.0 * 3.0 / 2.0, 20.0 * 1010.0 / 20.0))


def test_a_table_without_loads_decides_as_ever() -> None:
    requests, recorded = table(300, 2)
    control = controller(300)
    for _ in chunks(requests, control, recorded):
        pass
    assert "loads" not in control.state().parts


def test_a_meter_that_reads_nothing_tells_no_line() -> None:
    loads = loads_of(2)
    for b in (4, 64):
        read(loads, 0, 2, b, 0.0)
        read(loads, 1, 2, b, 100.0 / b + 1.0)
    loads.close_window()
    assert loads.shares is not None
    assert loads.shares[0].steps == 0.0
    assert np.isfinite(loads.settle([0.0, 1.0], [4.0, 4.0], [1.0, 1.0])).all()


def learnt_state() -> Part:
    """Of a controller that has finished a job."""
    requests, recorded = table(ROWS, 6)
    control = controller()
    for _ in chunks(requests, control, Batches(recorded)):
        pass
    return control.state()


def test_knowledge_brings_the_loads_that_its_joules_were_read_at() -> None:
    state = learnt_state()
    control = controller()
    control.learnt.take_over(Knowledge.of("earlier", "digest", state))
    control.begin()
    assert control.learnt.loads.state().dumps() == state.parts["loads"].dumps()


@pytest.mark.slow
def test_joules_that_were_read_at_loads_of_an_earlier_version_are_read_anew() -> None:
    """They were learnt as they were read, and predicted for full engines by numbers that aren't kept any more."""
    state = learnt_state()
    earlier = replace(state, parts={**state.parts, "loads": replace(state.parts["loads"], tuning="earlier")})
    control = controller()
    assert control.load(earlier) == ["joules", "recent"]
    assert not control.learnt.joules.samples.any()
    control = controller()
    control.learnt.take_over(Knowledge.of("earlier", "digest", earlier))
    assert control.learnt.predictor.samples.any()
    assert not control.learnt.joules.samples.any()


def test_joules_that_are_learnt_anew_forget_their_loads() -> None:
    state = learnt_state()
    other = replace(state.parts["joules"], tuning="another")
    control = controller()
    assert "joules" in control.load(replace(state, parts={**state.parts, "joules": other}))
    assert "loads" not in control.state().parts


@pytest.mark.parametrize("field", sorted(loads_of(2).state().arrays))
def test_loads_that_lack_a_field_are_refused(field: str) -> None:
    state = loads_of(2).state()
    arrays = {name: kept for name, kept in state.arrays.items() if name != field}
    with pytest.raises(StateError):
        loads_of(2).load(replace(state, arrays=arrays))
    renamed = {**arrays, f"{field}_": state.arrays[field]}
    with pytest.raises(StateError):
        loads_of(2).load(replace(state, arrays=renamed))

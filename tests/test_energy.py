"""Meters and the ledger: conformance of every meter, conservation over any schedule, every fault.

The NVML tests drive the real nvidia-ml-py through `nvml_stub.c`, in processes of their own, since the
binding loads its library once per process: a `scenario_*` function runs there and prints JSON.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import nvml_stub
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nvml_stub import control

from messcli import conformance
from messcli.energy import CounterReset, EnergyLedger, Meter, MeterKind, open_meter, split, token_weight
from messcli.energy.cpu import EstimateCounter, RaplCounter, cpu_seconds
from messcli.energy.ledger import LOADING, STARTING, THINKING
from messcli.energy.nvml import Card, NvmlCounter, visible
from messcli.energy.replay import Replay
from messcli.errors import MeterError, UsageError
from messcli.records import Generation
from messcli.registry import METERS

HERE = Path(__file__).parent
TEN_TOKENS = [Generation("out", 5, 10)]

# ---------------------------------------------------------------- a world with a clock and counters


class World:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def clock(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


class FakeCounter:
    """A counter of known watts that updates every `period`, as hardware does."""

    kind = "nvml"
    provenance = "a counter of known watts"
    partitioned = False

    def __init__(self, world: World, watts: float = 100.0, period: float = 0.1) -> None:
        self.world, self.watts, self.period = world, watts, period
        self.error: MeterError | None = None
        self.frozen = False
        self.closed = 0
        self._last = 0.0

    def read(self) -> float:
        if self.error is not None:
            error, self.error = self.error, self.error if not isinstance(self.error, CounterReset) else None
            raise error
        if not self.frozen:
            self._last = max(
                self._last, self.watts * math.floor(self.world.seconds / self.period) * self.period
            )
        return self._last

    def warnings(self) -> list[str]:
        return []

    def close(self) -> None:
        self.closed += 1


def fake_meter(**counters: FakeCounter) -> Meter:
    """Named a, b, ... for the devices of that name."""
    return Meter(counters, {name: (name,) for name in counters})


def fake_ledger(world: World, **counters: FakeCounter) -> EnergyLedger:
    return EnergyLedger(fake_meter(**counters), clock=world.clock, sleep=world.sleep)


def run_calls(
    ledger: EnergyLedger, world: World, calls: Sequence[tuple[str, float]], gap: float = 0.0
) -> list[Any]:
    """One window of calls, each (devices, seconds), `gap` seconds apart."""
    done = []
    with ledger.window():
        for devices, seconds in calls:
            with ledger.call("m", ["r"], tuple(devices)) as call:
                world.sleep(seconds)
                call.generations = TEN_TOKENS
            done.append(call)
            world.sleep(gap)
    return done


# ---------------------------------------------------------------- conformance: every counter and meter


def test_conformance_estimate() -> None:
    conformance.check(conformance.METER, EstimateCounter(), conformance.burn)


def test_conformance_rapl(tmp_path: Path) -> None:
    package = domain(tmp_path, "intel-rapl:0", "package-0", 0)
    conformance.check(conformance.METER, RaplCounter(tmp_path), lambda: add_uj(package, 5_000))


def test_conformance_fake() -> None:
    world = World()
    conformance.check(conformance.METER, FakeCounter(world), lambda: world.sleep(0.5))


# ---------------------------------------------------------------- RAPL


def domain(root: Path, folder: str, name: str, uj: int, range_uj: int = 262_143_328_850) -> Path:
    path = root / folder
    path.mkdir(parents=True)
    (path / "name").write_text(name + "\n")
    (path / "energy_uj").write_text(f"{uj}\n")
    (path / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return path


def add_uj(path: Path, uj: int) -> None:
    file = path / "energy_uj"
    limit = int((path / "max_energy_range_uj").read_text())
    fresh = path / "fresh"
    fresh.write_text(f"{(int(file.read_text()) + uj) % limit}\n")
    fresh.replace(file)  # as sysfs, where no reader meets a half-written number


def test_rapl_sums_packages_and_dram_only(tmp_path: Path) -> None:
    counted = [
        domain(tmp_path, "intel-rapl:0", "package-0", 100),
        domain(tmp_path, "intel-rapl:0:1", "dram", 200),
        domain(tmp_path, "intel-rapl:1", "package-1", 300),
        domain(tmp_path, "intel-rapl:1:0", "dram", 400),
        domain(tmp_path, "intel-rapl:10", "package-2-die-0", 0),
    ]
    left_out = [
        domain(tmp_path, "intel-rapl:0:0", "core", 500),
        domain(tmp_path, "intel-rapl:0:2", "uncore", 500),
        domain(tmp_path, "intel-rapl:2", "psys", 600),
        domain(tmp_path, "intel-rapl-mmio:0", "package-0", 600),
    ]
    (tmp_path / "intel-rapl").mkdir()  # the control type itself
    with contextlib.closing(RaplCounter(tmp_path)) as counter:
        for number, path in enumerate(counted):
            add_uj(path, 10**6 * 2**number)
        for path in left_out:
            add_uj(path, 77 * 10**6)
        assert counter.read() == 31.0
        for name in ("package-0", "package-1", "package-2-die-0", "dram"):
            assert name in counter.provenance


def test_rapl_wraps(tmp_path: Path) -> None:
    package = domain(tmp_path, "intel-rapl:0", "package-0", 65_532_000_000, range_uj=65_532_610_987)
    with contextlib.closing(RaplCounter(tmp_path)) as counter:
        add_uj(package, 1_500_000)  # past the range
        assert int((package / "energy_uj").read_text()) < 1_500_000
        assert counter.read() == 1.5
        add_uj(package, 500_000)
        assert counter.read() == 2.0


def test_rapl_reads_often_enough_to_see_every_wrap(tmp_path: Path) -> None:
    # 20 J of range at 2000 W is one reading every 10 ms, without anyone calling read()
    package = domain(tmp_path, "intel-rapl:0", "package-0", 0, range_uj=20_000_000)
    with contextlib.closing(RaplCounter(tmp_path)) as counter:
        before = counter.seen_joules
        add_uj(package, 15_000_000)
        deadline = time.monotonic() + 5
        while counter.seen_joules == before and time.monotonic() < deadline:
            time.sleep(0.005)
        add_uj(package, 15_000_000)
        assert counter.read() == 30.0


def test_rapl_tells_a_reset_from_a_wrap(tmp_path: Path) -> None:
    package = domain(tmp_path, "intel-rapl:0", "package-0", 100_000_000_000)
    with contextlib.closing(RaplCounter(tmp_path)) as counter:
        add_uj(package, 1_000_000)
        assert counter.read() == 1.0
        (package / "energy_uj").write_text("0\n")
        with pytest.raises(CounterReset, match="package-0 went backwards"):
            counter.read()
        add_uj(package, 2_000_000)
        assert counter.read() == 3.0


def test_rapl_without_domains_names_the_cure(tmp_path: Path) -> None:
    domain(tmp_path, "intel-rapl:0", "psys", 0)
    with pytest.raises(MeterError, match=r"no RAPL package counter under .*--meter estimate"):
        RaplCounter(tmp_path)


def test_rapl_permission_names_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the tests may run as root, whom no file mode stops: the system's answer is put in its place
    domain(tmp_path, "intel-rapl:0", "package-0", 0)
    real = Path.read_text

    def read_text(path: Path, *args: Any, **kwargs: Any) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read_text)
    with pytest.raises(MeterError, match=r"no permission to read .*energy_uj.*chmod a\+r .*--meter estimate"):
        RaplCounter(tmp_path)


@pytest.mark.parametrize(
    ("text", "match"), [(None, "No such file"), ("\n", "not a number"), ("x", "not a number")]
)
def test_rapl_fault_mid_run(tmp_path: Path, text: str | None, match: str) -> None:
    package = domain(tmp_path, "intel-rapl:0", "package-0", 0)
    with contextlib.closing(RaplCounter(tmp_path)) as counter:
        if text is None:
            (package / "energy_uj").unlink()
        else:
            (package / "energy_uj").write_text(text)
        with pytest.raises(MeterError, match=match):
            counter.read()


# ---------------------------------------------------------------- the estimate


def test_estimate_is_cpu_seconds_times_watts() -> None:
    seconds = iter([100.0, 103.0])
    counter = EstimateCounter(7.0, lambda: next(seconds))
    assert counter.read() == 21.0
    assert (
        counter.provenance
        == "CPU seconds of this process x 7 W per busy core ([energy] cpu_watts in zoo.toml)"
    )


def test_estimate_states_its_default() -> None:
    assert "10 W per busy core (default; set [energy] cpu_watts in zoo.toml)" in EstimateCounter().provenance


@pytest.mark.parametrize("watts", [0.0, -1.0, math.nan, math.inf])
def test_estimate_refuses_watts_that_are_none(watts: float) -> None:
    with pytest.raises(MeterError, match="more than 0"):
        EstimateCounter(watts)


def test_cpu_seconds_counts_ended_children() -> None:
    before = cpu_seconds()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.15: pass"], check=True)
    assert cpu_seconds() - before > 0.1


# ---------------------------------------------------------------- replay


OUTCOMES = [
    {"id": "a", "prompt": "x", "models": {"s": {"joules": 1.5, "seconds": 0.25}, "l": {"joules": 6}}},
    {"id": "b", "prompt": "y", "models": {"s": {"joules": None, "error": "too long"}, "l": {"joules": None}}},
]
ROWS = [
    {"id": "a", "model": "s", "joules": 1.5, "seconds": 0.25, "meter": "nvml"},
    {"id": "a", "model": "s", "joules": 9.0, "seconds": 9.0, "meter": "nvml"},
    {"id": "c", "model": None, "joules": None, "seconds": None, "error": "no prompt"},
]


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".zst":
        path.write_bytes(pytest.importorskip("zstandard").compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["outcomes.jsonl", "outcomes.jsonl.gz", "outcomes.jsonl.zst"])
def test_replay_looks_up_an_outcomes_table(tmp_path: Path, name: str) -> None:
    replay = Replay(write_rows(tmp_path / name, OUTCOMES))
    assert replay.lookup("a", "s") == (1.5, 0.25)
    assert replay.lookup("a", "l") == (6.0, None)
    assert replay.lookup("b", "s") == (None, None)  # failed then
    for request_id, model in (("b", "l"), ("c", "s"), ("a", "m")):
        with pytest.raises(MeterError) as missing:
            replay.lookup(request_id, model)
        assert all(text in str(missing.value) for text in (f'"{request_id}"', f'"{model}"', name))


def test_replay_looks_up_route_rows(tmp_path: Path) -> None:
    replay = Replay(write_rows(tmp_path / "out.jsonl", ROWS))
    assert replay.lookup("a", "s") == (1.5, 0.25)  # the first of a repeated id


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"id": "a", "model": "s", "joules": 1}\n{"id": ', r"f\.jsonl:2: not valid JSON"),
        ('{"model": "s", "joules": 1}', r'f\.jsonl:1: no "id"'),
        ("[1]", r"f\.jsonl:1: expected an object"),
        ('{"id": "a", "prompt": "x"}', r'f\.jsonl:1: neither "models" nor "model"'),
        ('{"id": "a", "models": {"s": 3}}', r'"models"."s" is no object'),
        ('{"id": "a", "model": "s", "joules": -1}', r'f\.jsonl:1: "joules" is -1'),
        ('{"id": "a", "model": "s", "joules": NaN}', r"f\.jsonl:1: not valid JSON: NaN is no JSON"),
        ('{"id": "a", "model": "s", "joules": true}', r'"joules" is True'),
        ('{"id": "a", "model": "s", "joules": 1, "seconds": "2"}', r'"seconds" is \'2\''),
    ],
)
def test_replay_names_file_and_line_of_what_is_malformed(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(text)
    with pytest.raises(MeterError, match=match):
        Replay(path)


def test_replay_of_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(MeterError, match=r"nowhere\.jsonl can't be read"):
        Replay(tmp_path / "nowhere.jsonl")
    (tmp_path / "torn.gz").write_bytes(gzip.compress(b'{"id": "a", "model": "s"}\n' * 100)[:-12])
    with pytest.raises(MeterError, match="can't be read"):
        Replay(tmp_path / "torn.gz")


def test_replayed_bills_are_the_recorded_ones_and_have_no_overhead(tmp_path: Path) -> None:
    meter = open_meter(f"replay:{write_rows(tmp_path / 'o.jsonl', OUTCOMES)}", ["cuda:7"])
    assert meter.kind(["cuda:7"]) == "replay"
    assert "replay of 3 outcomes" in meter.describe()[0]
    ledger = EnergyLedger(meter)
    with ledger.window():
        with ledger.call("s", ["a", "b"], ["cuda:7"]) as call:
            call.generations = TEN_TOKENS * 2
        with (
            pytest.raises(MeterError, match='no joules of model "l" for request "b"'),
            ledger.call("l", ["b"], []),
        ):
            pytest.fail("the model must not run")
    assert [(bill.joules, bill.seconds) for bill in call.bills()] == [(1.5, 0.25), (None, None)]
    assert (call.joules, call.seconds, call.kind) == (1.5, 0.25, "replay")
    assert (ledger.total, ledger.attributed, ledger.overhead, ledger.take_overhead()) == (1.5, 1.5, 0.0, {})
    meter.close()


# ---------------------------------------------------------------- open_meter


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The table of meters with RAPL's sysfs under a folder of the test's (empty at first)."""
    monkeypatch.setitem(
        METERS, "rapl", MeterKind(lambda device, options: RaplCounter(tmp_path), devices=("cpu",))
    )
    return tmp_path


def test_auto_takes_the_estimate_without_rapl_and_says_so(kinds: Path) -> None:
    meter = open_meter("auto", ["cpu", "cpu:0", "cpu"], 12.0)
    assert meter.kind(["cpu"]) == "estimate"
    text = "\n".join(meter.describe())
    assert "cpu: estimate: CPU seconds of this process x 12 W" in text
    assert "cpu: not rapl: no RAPL package counter" in text
    assert len(meter.read()) == 1
    meter.close()
    meter.close()


def test_auto_prefers_rapl(kinds: Path) -> None:
    domain(kinds, "intel-rapl:0", "package-0", 0)
    meter = open_meter("auto", ["cpu"])
    assert meter.kind(["cpu"]) == "rapl"
    assert len(meter.describe()) == 1
    meter.close()


def test_a_named_meter_is_never_downgraded(kinds: Path) -> None:
    with pytest.raises(MeterError, match="no RAPL package counter"):
        open_meter("rapl", ["cpu"])
    with pytest.raises(MeterError, match=r"--meter nvml can't read device cpu .*Take --meter auto"):
        open_meter("nvml", ["cpu"])
    domain(kinds, "intel-rapl:0", "package-0", 0)
    with pytest.raises(MeterError, match=r"--meter rapl can't read device cuda:0"):
        open_meter("rapl", ["cpu", "cuda:0"])
    with pytest.raises(MeterError, match=r"no meter reads device mps\. Take --meter estimate"):
        open_meter("auto", ["mps"])
    with pytest.raises(
        UsageError, match=r'unknown meter "watts": Known are nvml, .*estimate, auto, replay:FILE'
    ):
        open_meter("watts", ["cpu"])


def test_estimate_counts_the_cpu_once_for_any_devices() -> None:
    meter = open_meter("estimate", ["cuda:0", "cuda:1", "cpu", "auto"])
    assert meter.sources(["cuda:0", "cuda:1", "cpu", "auto"]) == ("cpu",)
    assert meter.kind(["cuda:1"]) == "estimate"
    assert any("not what cuda:1 itself draws" in line for line in meter.describe())


def test_a_device_without_a_meter_is_an_error_before_anything_runs() -> None:
    world = World()
    ledger = fake_ledger(world, a=FakeCounter(world))
    with (
        ledger.window(),
        pytest.raises(MeterError, match=r"nothing meters device b.*--meter auto covers a"),
        ledger.call("m", ["r"], ["a", "b"]),
    ):
        pytest.fail("the model must not run")


def test_the_least_direct_kind_labels_a_row_of_several_devices() -> None:
    world = World()
    meter = Meter(
        {"cuda:0": FakeCounter(world), "cpu": EstimateCounter()}, {"cuda:0": ("cuda:0",), "cpu": ("cpu",)}
    )
    assert meter.kind(["cuda:0"]) == "nvml"
    assert meter.kind(["cuda:0", "cpu"]) == "estimate"


# ---------------------------------------------------------------- the ledger


STEPS = st.one_of(
    st.tuples(
        st.just("call"), st.sets(st.sampled_from("abc"), min_size=1), st.floats(0, 3), st.integers(0, 50)
    ),
    st.tuples(st.just("crash"), st.sets(st.sampled_from("abc"), min_size=1), st.floats(0, 3), st.just(0)),
    st.tuples(st.just("idle"), st.just(frozenset()), st.floats(0, 5), st.just(0)),
    st.tuples(
        st.sampled_from(["window", "take", "take now", "nothing"]),
        st.just(frozenset()),
        st.just(0.0),
        st.just(0),
    ),
)
DEVICES = st.tuples(st.floats(0.5, 900), st.sampled_from([1e-9, 0.001, 0.1, 0.7]))


@given(st.lists(STEPS, max_size=40), st.tuples(DEVICES, DEVICES, DEVICES), st.floats(0, 100), st.booleans())
def test_bills_and_overhead_sum_to_the_counters_over_any_schedule(
    steps: list[Any], devices: tuple[tuple[float, float], ...], loading: float, eager: bool
) -> None:
    """Also where overhead is taken within a window, and where a part of a call's answers never came."""
    world = World()
    counters = {name: FakeCounter(world, *numbers) for name, numbers in zip("abc", devices, strict=True)}
    ledger = fake_ledger(world, **counters)
    world.sleep(loading)
    billed, taken = [], [ledger.take_overhead()]
    calls: list[Any] = []

    def book() -> None:
        """The second answer of every third call never came."""
        for number, call in enumerate(calls):
            first, second = call.bills()
            lost = number % 3 == 2
            billed.extend(bill.joules for bill in ((first,) if lost else (first, second)))
            if lost and call.joules > 0:
                assert ledger.forgo(call, second.joules / call.joules) == pytest.approx(second.joules)
        calls.clear()

    with contextlib.ExitStack() as stack:
        stack.enter_context(ledger.window(eager=eager))
        for what, names, seconds, tokens in steps:
            if what == "call":
                with ledger.call("m", ["r", "s"], sorted(names)) as call:
                    world.sleep(seconds)
                    call.work = [(3, tokens), (tokens, 0)]
                calls.append(call)
            elif what == "crash":
                with contextlib.suppress(ValueError), ledger.call("m", ["r"], sorted(names)):
                    world.sleep(seconds)
                    raise ValueError
            elif what == "nothing":
                with ledger.call("m", [], "abc") as call:
                    call.drop()
            elif what == "idle":
                world.sleep(seconds)
            elif what == "take now":
                taken.append(ledger.take_overhead())
                settled = sum(call.joules for call in calls if call.settled) + sum(billed)
                assert settled + sum(sum(kinds.values()) for kinds in taken) <= ledger.total * (1 + 1e-9)
            else:
                stack.close()
                book()
                if what == "take":
                    taken.append(ledger.take_overhead())
                stack.enter_context(ledger.window(eager=eager))
    book()
    taken.append(ledger.take_overhead())

    assert ledger.fault is None
    truth = sum(counter.read() for counter in counters.values())
    assert all(joules >= 0 for joules in billed)
    assert ledger.total == pytest.approx(truth, rel=1e-12)
    assert math.isclose(sum(billed) + ledger.overhead, truth, rel_tol=1e-9, abs_tol=1e-9)
    overhead = sum(joules for kinds_taken in taken for joules in kinds_taken.values())
    assert math.isclose(sum(billed) + overhead, truth, rel_tol=1e-9, abs_tol=1e-9)
    assert ledger.overhead >= -1e-9 * truth


class Consumers(FakeCounter):
    """A counter of what its consumers draw: idle watts, and each one's from when to when."""

    def __init__(self, world: World, idle: float, period: float) -> None:
        super().__init__(world, period=period)
        self.idle, self.consumers = idle, list[tuple[float, float, float]]()  # watts, from, to

    def read(self) -> float:
        now = math.floor(self.world.seconds / self.period + 1e-9) * self.period
        drawn = (watts * max(0.0, min(now, to) - since) for watts, since, to in self.consumers)
        self._last = max(self._last, self.idle * now + math.fsum(drawn))
        return self._last


def beside_each_other(
    calls: Sequence[tuple[float, float, float]], *, idle: float = 0.0, period: float = 1e-6, gaps: float = 0.0
) -> tuple[EnergyLedger, list[Any], list[float]]:
    """Calls of (from, seconds, watts) on one counter, each expected to take its watts; with how they were settled."""
    world = World()
    counter = Consumers(world, idle, period)
    counter.consumers = [(watts, since, since + seconds) for since, seconds, watts in calls]
    ledger = fake_ledger(world, a=counter)
    moments = sorted(
        [(since, 1, n) for n, (since, _, _) in enumerate(calls)]
        + [(since + seconds, 0, n) for n, (since, seconds, _) in enumerate(calls)]
    )
    open_, made, settled = {}, {}, []
    with ledger.window(eager=True):
        for when, starts, n in moments:
            world.seconds = max(world.seconds, when)
            if starts:
                open_[n] = ledger.call(f"m{n}", ["r"], ["a"], beside=True)
                made[n] = open_[n].__enter__()
            else:
                made[n].work, made[n].expected = [(1, 10)], calls[n][1] * calls[n][2]
                open_[n].__exit__(None, None, None)
                settled.append(sum(call.settled for call in made.values()))
        world.sleep(gaps)
    return ledger, [made[n] for n in range(len(calls))], settled


def test_calls_beside_each_other_are_billed_what_each_of_them_drew() -> None:
    """Known watts, expected in their proportion: what one drew alone is its own, what both drew is split."""
    calls = [(0.0, 3.0, 30.0), (1.0, 3.0, 10.0), (3.0, 2.0, 30.0), (9.0, 1.0, 5.0)]
    ledger, made, settled = beside_each_other(calls)
    assert [call.joules for call in made] == pytest.approx([90.0, 30.0, 60.0, 5.0], rel=1e-5)
    assert ledger.overhead == pytest.approx(0.0, abs=1e-3)
    assert settled == [
        0,
        1,
        3,
        4,
    ]  # none waits for the window's end, only for those that began before its own end


def test_what_the_card_draws_anyway_is_shared_and_idle_time_is_overhead() -> None:
    ledger, made, _ = beside_each_other([(0.0, 2.0, 30.0), (0.0, 2.0, 10.0), (6.0, 1.0, 10.0)], idle=8.0)
    assert [call.joules for call in made] == pytest.approx([60 + 12, 20 + 4, 10 + 8], rel=1e-5)
    assert ledger.overhead == pytest.approx(4 * 8.0, rel=1e-5)


def test_calls_beside_each_other_are_shorter_than_the_counter_can_tell() -> None:
    calls = [(n * 0.04, 0.09, 50.0) for n in range(40)]
    ledger, made, _ = beside_each_other(calls, period=0.1, gaps=1.0)
    assert all(call.joules > 0 for call in made)
    billed = math.fsum(call.joules for call in made)
    assert math.isclose(billed + ledger.overhead, ledger.total, rel_tol=1e-9)
    assert billed == pytest.approx(40 * 0.09 * 50.0, rel=0.1)  # a period is 5 % of the whole


@given(
    st.lists(st.tuples(st.floats(0, 20), st.floats(0.01, 5), st.floats(0, 300)), min_size=1, max_size=25),
    st.floats(0, 80),
    st.sampled_from([1e-9, 0.001, 0.1, 0.7]),
)
def test_bills_of_calls_beside_each_other_and_overhead_sum_to_the_counter(
    calls: list[tuple[float, float, float]], idle: float, period: float
) -> None:
    ledger, made, _ = beside_each_other(calls, idle=idle, period=period)
    assert all(call.settled for call in made)
    billed = math.fsum(call.joules or 0.0 for call in made if call.fault is None)
    assert all((call.joules or 0.0) >= 0 for call in made)
    assert math.isclose(billed + ledger.overhead, ledger.total, rel_tol=1e-9, abs_tol=1e-9)
    assert ledger.overhead >= -1e-9 * max(1.0, ledger.total)


def test_only_calls_that_are_all_beside_may_overlap() -> None:
    world = World()
    ledger = fake_ledger(world, a=FakeCounter(world))
    for first, second in ((False, True), (True, False)):
        with ledger.window(), ledger.call("m", [], ["a"], beside=first) as call:
            call.drop()
            with pytest.raises(RuntimeError, match="two calls at once on a"):
                ledger.call("n", [], ["a"], beside=second).__enter__()


def test_overhead_has_names_and_they_sum_to_it() -> None:
    world = World()
    ledger = fake_ledger(world, a=FakeCounter(world, 100), b=FakeCounter(world, 7))
    world.sleep(4)  # opening
    with ledger.overhead_of(LOADING):  # as --preload does
        world.sleep(2)
    world.sleep(1)
    with ledger.window():
        with ledger.overhead_of(LOADING):
            world.sleep(3)
        with ledger.call("m", ["r"], ["a"]) as call:
            world.sleep(5)
            call.generations = TEN_TOKENS
        world.sleep(0.5)  # waiting
    world.sleep(6)  # learning
    ledger.take_overhead()
    with ledger.window(), ledger.call("m", ["r"], ["a"]) as call:
        world.sleep(5)
        call.generations = TEN_TOKENS
    world.sleep(7)
    ledger.take_overhead()
    watts = 107
    assert ledger.named == {
        STARTING: pytest.approx(5 * watts),
        LOADING: pytest.approx(5 * watts),
        THINKING: pytest.approx(13 * watts),
    }
    waiting = 0.5 * watts + 10 * 7  # b idles in a's calls
    assert sum(ledger.named.values()) + waiting == pytest.approx(ledger.overhead)


def test_long_calls_are_billed_what_was_read_and_the_rest_is_overhead() -> None:
    world = World()
    ledger = fake_ledger(world, a=FakeCounter(world, 100), b=FakeCounter(world, 7))
    world.sleep(4)  # loading
    first, second = run_calls(ledger, world, [("a", 2.0), ("ab", 3.0)], gap=1.0)
    assert first.joules == pytest.approx(200)
    assert second.joules == pytest.approx(321)
    assert sum(ledger.take_overhead().values()) == pytest.approx(
        4 * 107 + 2 * 7 + 2 * 107
    )  # b idles in a's call
    assert ledger.take_overhead() == {"nvml": 0.0}


def test_short_calls_share_one_reading_by_seconds() -> None:
    world = World()
    ledger = fake_ledger(world, a=FakeCounter(world, 100))
    calls = run_calls(ledger, world, [("a", 0.02), ("a", 0.06), ("a", 0.04)] * 10)
    joules = [call.joules for call in calls]
    assert sum(joules) == pytest.approx(120, rel=0.1)
    assert all(value > 0 for value in joules)
    assert joules[1] == pytest.approx(3 * joules[0])
    assert joules[2] == pytest.approx(2 * joules[0])


def test_a_long_call_is_not_blended_with_what_the_counter_can_tell_apart() -> None:
    world = World()
    counter = FakeCounter(world, 100)
    ledger = fake_ledger(world, a=counter)
    with ledger.window():
        with ledger.call("small", ["r"], ["a"]) as small:
            world.sleep(0.5)
        with ledger.call("large", ["r"], ["a"]) as large:
            world.sleep(5)
    assert (small.joules, large.joules) == (pytest.approx(50), pytest.approx(500))


@pytest.mark.parametrize("order", ["short first", "short last"])
def test_a_call_too_short_to_be_read_joins_its_neighbour(order: str) -> None:
    world = World()
    ledger = fake_ledger(world, a=FakeCounter(world, 100))
    calls = [("a", 0.01), ("a", 1.99)]
    done = run_calls(ledger, world, calls if order == "short first" else calls[::-1])
    assert world.seconds == pytest.approx(2.0)  # nobody waited
    assert sorted(call.joules for call in done) == [pytest.approx(1), pytest.approx(199)]


def test_a_long_gap_before_a_neighbour_stays_overhead() -> None:
    world = World()
    ledger = fake_ledger(world, a=FakeCounter(world, 100))
    first, second = run_calls(ledger, world, [("a", 0.1), ("a", 0.1)], gap=9.8)
    assert first.joules == pytest.approx(10)
    assert second.joules == pytest.approx(10)


def test_a_lonely_short_call_waits_for_the_tick_and_reads_no_zero() -> None:
    world = World()
    ledger = fake_ledger(world, a=FakeCounter(world, 100))
    world.sleep(0.53)
    ledger.take_overhead()
    (call,) = run_calls(ledger, world, [("a", 0.02)])
    assert call.joules == pytest.approx(10)  # a whole tick: never understated
    assert 0.55 < world.seconds <= 0.65


def test_a_window_that_ends_by_an_exception_still_settles() -> None:
    world = World()
    ledger = fake_ledger(world, a=FakeCounter(world, 100))

    def interrupted() -> None:
        with ledger.window():
            with ledger.call("m", ["r"], ["a"]) as call:
                world.sleep(2)
            calls.append(call)
            raise KeyboardInterrupt

    calls: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    (call,) = calls
    assert call.joules == pytest.approx(200)


def test_misuse_is_a_bug_and_says_so() -> None:
    world = World()
    ledger = fake_ledger(world, a=FakeCounter(world))
    with pytest.raises(RuntimeError, match="open window"), ledger.call("m", ["r"], ["a"]):
        pass
    with ledger.window():
        with pytest.raises(RuntimeError, match="open already"), ledger.window():
            pass
        with ledger.call("m", ["r"], ["a"]) as call:
            with pytest.raises(RuntimeError, match="two calls at once on a"), ledger.call("m", ["r"], ["a"]):
                pass
            world.sleep(1)
        with pytest.raises(RuntimeError, match="when its window closes"):
            call.bills()
    with pytest.raises(RuntimeError, match="0 generations for 1 requests"):
        call.bills()


# ---------------------------------------------------------------- splitting a batch


@given(
    st.floats(0, 1e9),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 10_000)), min_size=1, max_size=64),
)
def test_split_sums_to_the_batch(joules: float, tokens: list[tuple[int, int]]) -> None:
    parts = split(joules, [Generation("o", *pair) for pair in tokens])
    assert math.isclose(sum(parts), joules, rel_tol=1e-9, abs_tol=1e-12)
    assert all(part >= 0 for part in parts)


def test_split_weighs_tokens() -> None:
    batch = [Generation("o", 100, 0), Generation("o", 0, 10), Generation(None, 0, 0, "failed")]
    assert split(8.0, batch) == [4.0, 4.0, 0.0]
    assert split(8.0, batch, lambda prompt, output: 0.3 * prompt + output) == [6.0, 2.0, 0.0]
    assert split(9.0, [Generation(None, 0, 0)] * 3) == [3.0, 3.0, 3.0]
    assert split(9.0, []) == []
    assert token_weight(10, 1) == 2.0


def test_bills_split_joules_and_seconds() -> None:
    world = World()
    ledger = fake_ledger(world, a=FakeCounter(world, 100))
    with ledger.window(), ledger.call("m", ["r", "s"], ["a"]) as call:
        world.sleep(4)
        call.generations = [Generation("o", 0, 3), Generation("o", 0, 1)]
    bills = call.bills()
    assert [bill.joules for bill in bills] == [pytest.approx(300), pytest.approx(100)]
    assert [bill.seconds for bill in bills] == [pytest.approx(3), pytest.approx(1)]


# ---------------------------------------------------------------- faults


def test_driver_gone_keeps_the_window_and_stops_the_next() -> None:
    world = World()
    counter = FakeCounter(world, 100)
    ledger = fake_ledger(world, a=counter, b=FakeCounter(world, 10))
    gone = MeterError("NVML: gone")
    with ledger.window():
        with ledger.call("m", ["r"], ["a"]) as before:
            world.sleep(2)
            before.generations = TEN_TOKENS
        with ledger.call("m", ["r"], ["a"]) as during:
            world.sleep(2)
            during.generations = TEN_TOKENS
            counter.error = gone
        with ledger.call("m", ["r"], ["a"]) as after:
            world.sleep(2)
            after.generations = TEN_TOKENS
        with ledger.call("m", ["r"], ["b"]) as elsewhere:
            world.sleep(2)
            elsewhere.generations = TEN_TOKENS
    assert before.joules == pytest.approx(200)
    assert elsewhere.joules == pytest.approx(20)
    for call in (during, after):
        assert call.joules is None
        assert call.fault == "NVML: gone"
        assert [bill.joules for bill in call.bills()] == [None]
    ledger.take_overhead()  # what is finished can be committed
    assert ledger.attributed + ledger.overhead == pytest.approx(ledger.total, rel=1e-12)
    with pytest.raises(MeterError, match="NVML: gone"), ledger.window():
        pytest.fail("nothing may run unmetered")


def test_a_counter_that_fell_leaves_only_its_calls_unknown() -> None:
    world = World()
    counter = FakeCounter(world, 100)
    ledger = fake_ledger(world, a=counter, b=FakeCounter(world, 10))
    with ledger.window():
        for what in ("good", "bad", "good again"):
            with ledger.call(what, ["r"], ["a", "b"]) as call:
                world.sleep(2)
                call.generations = TEN_TOKENS
                if what == "bad":
                    counter.error = CounterReset("went backwards")
            if what == "bad":
                bad = call
    assert call.joules == pytest.approx(220)
    assert bad.joules is None
    assert "fell" in str(bad.fault)
    assert ledger.take_warnings() == ["a: went backwards"]
    assert ledger.take_warnings() == []
    assert ledger.attributed + ledger.overhead == pytest.approx(ledger.total, rel=1e-12)
    assert run_calls(ledger, world, [("ab", 1.0)])[0].joules == pytest.approx(110)


@pytest.mark.parametrize("seconds", [0.01, 0.5, 30.0])
def test_a_stuck_counter_is_no_measurement(seconds: float) -> None:
    world = World()
    counter = FakeCounter(world, 100)
    ledger = fake_ledger(world, a=counter, b=FakeCounter(world, 10))
    world.sleep(1)
    ledger.take_overhead()
    counter.frozen = True
    (call,) = run_calls(ledger, world, [("ab", seconds)])
    assert call.joules is None
    with (
        pytest.raises(
            MeterError, match=r"nvml counter of a stood still over .* 10 tokens .*--meter estimate"
        ),
        ledger.window(),
    ):
        pass
    assert ledger.attributed + ledger.overhead == pytest.approx(ledger.total, rel=1e-12)


def test_zero_joules_without_tokens_are_just_zero() -> None:
    world = World()
    counter = FakeCounter(world, 100)
    counter.frozen = True
    ledger = fake_ledger(world, a=counter)
    with ledger.window(), ledger.call("m", ["r"], ["a"]) as call:
        world.sleep(1)
        call.generations = [Generation(None, 4, 0, "too long")]
    assert call.joules == 0.0
    assert ledger.fault is None


# ---------------------------------------------------------------- which card is cuda:N


CARDS = [Card(f"GPU-{text}", "H100") for text in ("aa11", "aa22", "bb33", "cc44")]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "0123"),
        ("", ""),
        ("0", "0"),
        ("2,0", "20"),
        (" 3 , 1 ", "31"),
        ("-1", ""),
        ("1,-1,0", "1"),
        ("1,9,0", "1"),
        ("1,x,0", "1"),
        ("1,,0", "1"),
        ("1gpu,2", "12"),
        ("1,1", ""),
        ("0,2,0", ""),
        ("NoDevFiles", ""),
        ("GPU-bb33", "2"),
        ("GPU-cc,GPU-aa11", "30"),
        ("GPU-b", "2"),
        ("GPU-bb33,GPU-aa,GPU-cc44", "2"),  # a prefix of two cards fits none
        ("GPU-ffff", ""),
        ("GPU-bb33,GPU-bb", ""),
        ("GPU-bb33,0", "2"),
        ("0,GPU-bb33", "0"),
    ],
)
def test_cuda_visible_devices_in_all_its_forms(value: str | None, shown: str) -> None:
    assert visible(CARDS, value) == [CARDS[int(index)] for index in shown]


@pytest.mark.parametrize("value", ["MIG-5c89", "MIG-GPU-aa11/1/0", "GPU-aa11,MIG-5c89"])
def test_mig_slices_are_refused(value: str) -> None:
    with pytest.raises(MeterError, match=r"MIG slice.*--meter estimate"):
        visible(CARDS, value)


def test_the_retired_pynvml_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", ModuleType("pynvml"))
    with pytest.raises(MeterError, match="retired package that shadows nvidia-ml-py: pip uninstall"):
        open_meter("nvml", ["cuda:0"])


def test_without_nvidia_ml_py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(MeterError, match="pip install nvidia-ml-py"):
        open_meter("auto", ["cuda:0"])


# ---------------------------------------------------------------- NVML, through the real binding


def uuid_of(card: int) -> str:
    return f"GPU-{str(card) * 4}0000-1111-2222-3333-44444444444{card}"


def scenario_conformance() -> Any:
    control("cards 1", "tick 0.001")
    conformance.check(conformance.METER, NvmlCounter("cuda:0"), lambda: time.sleep(0.01))
    control("cards 1", "error nvmlDeviceGetTotalEnergyConsumption 3")
    conformance.check(conformance.METER, NvmlCounter("cuda:0"), lambda: time.sleep(0.01))
    return "passed"


def true_joules(mean: float, swing: float, cycle: float, start: float, end: float) -> float:
    """The integral of the stub's watts, in closed form."""
    omega = 2 * math.pi / cycle
    return mean * (end - start) - swing / omega * (math.cos(omega * end) - math.cos(omega * start))


def scenario_known_watts() -> Any:
    """Joules read of two cards against the integral of their watts: counter, and both kinds of sampling."""
    shapes = [(320.0, 80.0, 0.4), (75.0, 15.0, 0.3)]
    world = ["cards 2", "tick 0.001", *(f"watts {n} {m} {s} {c}" for n, (m, s, c) in enumerate(shapes))]
    refused = "error nvmlDeviceGetTotalEnergyConsumption 3"
    found = []

    def measure(ledger: EnergyLedger, card: int) -> tuple[Any, float, float]:
        outer = time.monotonic()
        with ledger.call("m", ["r"], [f"cuda:{card}"]) as call:
            inner = time.monotonic()
            time.sleep(0.6)
            least = true_joules(*shapes[card], inner, time.monotonic())
            call.generations = TEN_TOKENS
        return call, least, true_joules(*shapes[card], outer, time.monotonic())

    for extra in ([], [refused], [refused, "field_error 3"], [refused, "error nvmlDeviceGetFieldValues 13"]):
        control(*world, *extra)
        meter = open_meter("nvml", ["cuda:0", "cuda:1"])
        ledger = EnergyLedger(meter, clock=time.monotonic)
        with ThreadPoolExecutor() as pool, ledger.window():
            measured = list(pool.map(measure, [ledger] * 2, range(2)))
        lines = meter.describe()
        found += [
            (call.joules, least, most, call.kind, line)
            for (call, least, most), line in zip(measured, lines, strict=True)
        ]
        ledger.take_overhead()
        assert math.isclose(ledger.attributed + ledger.overhead, ledger.total, rel_tol=1e-9)
        meter.close()
    return found


def scenario_short_calls() -> Any:
    """Calls far shorter than the counter's 100 ms, as one window: their sum against the truth."""
    control("cards 1", "watts 0 300 0 1", "tick 0.1")
    ledger = EnergyLedger(open_meter("auto", ["cuda:0"]), clock=time.monotonic)
    calls = []
    before = time.monotonic()
    with ledger.window():
        for _ in range(60):
            with ledger.call("m", ["r"], ["cuda:0"]) as call:
                time.sleep(0.02)
                call.generations = TEN_TOKENS
            calls.append(call)
        after = time.monotonic()
    joules = [call.joules for call in calls]
    assert all(value is not None and value > 0 for value in joules)
    return joules, 300 * (after - before)


def scenario_visible() -> Any:
    """Which card each setting meters, seen in what it reads: card N draws 10^(N + 2) W."""
    lines = ["cards 3", "tick 0.001", *(f"watts {card} {10 ** (card + 2)} 0 1" for card in range(3))]
    control(*lines)
    found: list[Any] = []
    settings = [",".join(map(str, order)) for order in itertools.permutations(range(3))]
    settings += [
        ",".join(uuid_of(card)[:9] for card in order) for order in itertools.permutations(range(3), 2)
    ]
    for value in [None, *settings]:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        if value is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = value
        meter = open_meter("auto", ["auto"])
        cards = [name for name in meter.counters if name != "cpu"]
        start, begin = meter.read(), time.monotonic()
        time.sleep(0.03)
        end, seconds = meter.read(), time.monotonic() - begin
        found.append((value, [round(math.log10((end[name] - start[name]) / seconds)) - 2 for name in cards]))
        meter.close()
    messages = {}
    for value in ("", "-1", "MIG-1", "0"):
        os.environ["CUDA_VISIBLE_DEVICES"] = value
        messages[value] = message_of(lambda: open_meter("auto", ["cuda:1"]))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    messages["auto"] = "; ".join(open_meter("auto", ["auto"]).describe())
    messages["nvml"] = message_of(lambda: open_meter("nvml", ["auto"]))
    # cards that differ: CUDA's order is not NVML's unless it is told to be
    os.environ["CUDA_VISIBLE_DEVICES"] = "1"
    control(*lines, "name 1 Other")
    messages["differ"] = message_of(lambda: open_meter("auto", ["cuda:0"]))
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    messages["by pci"] = open_meter("auto", ["cuda:0"]).describe()[0]
    del os.environ["CUDA_DEVICE_ORDER"]
    # torch, once CUDA runs, knows
    messages["torch first"] = with_torch(uuid_of(2), lambda: open_meter("auto", ["cuda:0"]).describe()[0])
    control(*lines)
    meter = open_meter("auto", ["cuda:0"])
    messages["torch agrees"] = with_torch(uuid_of(1), lambda: message_of(meter.read))
    meter = open_meter("auto", ["cuda:0"])
    messages["torch differs"] = with_torch(uuid_of(2), lambda: message_of(meter.read))
    messages["torch unknown"] = with_torch(
        "GPU-zz", lambda: message_of(lambda: open_meter("auto", ["cuda:0"]))
    )
    return found, messages


def with_torch(uuid: str, body: Callable[[], Any]) -> Any:
    """`body` in a process where torch runs CUDA on one card."""
    properties = SimpleNamespace(uuid=uuid.removeprefix("GPU-"))
    cuda = SimpleNamespace(
        is_initialized=lambda: True, device_count=lambda: 1, get_device_properties=lambda index: properties
    )
    sys.modules["torch"] = SimpleNamespace(cuda=cuda)  # type: ignore[assignment]
    try:
        return body()
    finally:
        del sys.modules["torch"]


def message_of(body: Callable[[], Any]) -> str:
    try:
        body()
    except MeterError as error:
        return str(error)
    return "no error"


AT_OPENING = (
    "nvmlInitWithFlags",
    "nvmlDeviceGetCount_v2",
    "nvmlDeviceGetHandleByIndex_v2",
    "nvmlDeviceGetHandleByUUID",
    "nvmlDeviceGetUUID",
    "nvmlDeviceGetName",
    "nvmlDeviceGetTotalEnergyConsumption",
    "nvmlDeviceGetMigMode",
)


def scenario_errors() -> Any:
    """The message of every code from every function, at opening and in the middle of a run."""
    found = {}
    for name, code in error_codes():
        messages = {}
        for function in AT_OPENING:
            control("cards 1", "tick 0.001", f"error {function} {code}")
            messages[function] = message_of(lambda: open_meter("nvml", ["cuda:0"]).close())
        control("cards 1", "tick 0.001")
        counter = NvmlCounter("cuda:0")
        control("cards 1", f"error nvmlDeviceGetTotalEnergyConsumption {code}", "error nvmlShutdown 1")
        messages["mid-run"] = message_of(counter.read)
        counter.close()
        control(
            "cards 1",
            "error nvmlDeviceGetTotalEnergyConsumption 3",
            f"field_error {code}",
            f"error nvmlDeviceGetPowerUsage {code}",
        )
        messages["no power"] = message_of(lambda: NvmlCounter("cuda:0"))
        found[name] = messages
    return found


def error_codes() -> list[tuple[str, int]]:
    """Every code of the binding, and one that a driver of tomorrow may return."""
    import pynvml

    names = [name for name in dir(pynvml) if name.startswith("NVML_ERROR_")]
    return [(name, getattr(pynvml, name)) for name in names] + [("NVML_ERROR_UNLISTED", 77)]


def scenario_faults() -> Any:
    """Faults of a card under a running ledger."""
    good = ["cards 1", "tick 0.001", "watts 0 200 0 1"]
    found: dict[str, Any] = {}
    changes = {
        "backwards": [*good, "offset 0 1000000000"],
        "leap": [*good, "offset 0 90000000000000"],
        "stuck": [*good, "frozen 0 {now}"],
        "lost": [*good, "error nvmlDeviceGetTotalEnergyConsumption 15"],
    }
    for what, lines in changes.items():
        control(*good, "offset 0 5000000000")
        counter = NvmlCounter("cuda:0")
        counter.period = 0.01  # the stub ticks faster than a card, so that the test is fast too
        ledger = EnergyLedger(Meter({"cuda:0": counter}, {"cuda:0": ("cuda:0",)}))
        calls = []
        with ledger.window():
            for number in range(3):
                with ledger.call("m", ["r"], ["cuda:0"]) as call:
                    time.sleep(0.25)
                    call.generations = TEN_TOKENS
                    if number == 1:
                        millijoules = str(counter._last_mj)
                        control(*(line.replace("{now}", millijoules) for line in lines))
                calls.append(call)
        found[what] = {
            "joules": [call.joules for call in calls],
            "true": [200 * call.seconds for call in calls],
            "warnings": ledger.take_warnings(),
            "next": message_of(lambda window=ledger.window: window().__enter__()),
            "overhead": list(ledger.take_overhead()),
        }
        counter.close()

    # the sampling thread meets the fault, the next reading tells it
    refused = [*good, "error nvmlDeviceGetTotalEnergyConsumption 3"]
    control(*refused)
    counter = NvmlCounter("cuda:0", sample_seconds=0.002)
    control(*refused, "error nvmlDeviceGetFieldValues 15")
    time.sleep(0.1)
    control(*refused)
    found["sampling"] = message_of(counter.read)

    control(*good, "mig 0 1", "pid 0 1")
    meter = open_meter("auto", ["cuda:0"])
    found["mig"] = (meter.warnings(), message_of(meter.require_whole_devices))
    stranger = 4_194_305  # above the kernel's limit: no process here
    control(*good)
    meter = open_meter("auto", ["cuda:0"])
    pids = {"none": [], "own": [os.getpid()], "own and 1": [os.getpid(), 1], "namespace": [stranger]}
    pids["two of a namespace"] = [stranger, stranger + 1]
    for what, listed in pids.items():
        control(*good, *(f"pid 0 {pid}" for pid in listed))
        found[what] = meter.warnings()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    control(*good, f"pid 0 {child.pid}")
    found["child"] = meter.warnings()
    child.communicate(b"\n")
    control(*good, "error nvmlDeviceGetComputeRunningProcesses_v3 4")
    found["no permission"] = meter.warnings()
    found["whole"] = message_of(meter.require_whole_devices)
    return found


@pytest.fixture(scope="session")
def nvml(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Runs a scenario in a process where NVML is the stub; each once, however many tests look at it."""
    folder = nvml_stub.build(tmp_path_factory.mktemp("nvml"))

    @cache
    def run(scenario: str) -> Any:
        code = f"import test_energy as t; print(t.json.dumps(t.scenario_{scenario}()))"
        return nvml_stub.run(folder, f"{scenario}.control", code)

    return run


def test_nvml_conformance(nvml: Callable[[str], Any]) -> None:
    assert nvml("conformance") == "passed"


def test_nvml_known_watts_give_joules_within_one_percent(nvml: Callable[[str], Any]) -> None:
    found = nvml("known_watts")
    assert len(found) == 8
    for joules, least, most, kind, line in found:
        # the reading lies between two clocks' truths, which a busy machine moves apart
        assert 0.99 * least <= joules <= 1.01 * most, line
        assert kind == "nvml"
    lines = [line for *_, line in found]
    assert lines[0] == f"energy: cuda:0: nvml: NVML total energy counter of {uuid_of(0)} (Stub)"
    assert f"cuda:1: nvml: NVML total energy counter of {uuid_of(1)}" in lines[1]
    assert "NVML instantaneous power of" in lines[2]
    assert "sampled every 20 ms (energy counter: Not Supported)" in lines[2]
    for line in (lines[4], lines[6]):
        assert "NVML power (on recent cards an average over a second)" in line


@pytest.mark.slow
def test_nvml_calls_shorter_than_the_counters_period_are_grouped(nvml: Callable[[str], Any]) -> None:
    joules, truth = nvml("short_calls")
    assert sum(joules) == pytest.approx(truth, rel=0.2)  # within the 100 ms that the counter can't tell


def test_nvml_cards_are_found_by_uuid(nvml: Callable[[str], Any]) -> None:
    found, messages = nvml("visible")
    for value, cards in found:
        if value is None:
            assert cards == [0, 1, 2]
        else:
            assert cards == [int(entry.removeprefix("GPU-")[0]) for entry in value.split(",")], value
    assert "cuda:1 isn't there: 0 of 3 NVIDIA cards are visible under CUDA_VISIBLE_DEVICES=." in messages[""]
    assert "0 of 3" in messages["-1"]
    assert "MIG slice" in messages["MIG-1"]
    assert "1 of 3 NVIDIA cards are visible under CUDA_VISIBLE_DEVICES=0." in messages["0"]
    assert 'device "auto" is metered on cpu' in messages["auto"]
    assert "no visible NVIDIA card" in messages["nvml"]
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in messages["differ"]
    assert f"{uuid_of(1)} (Other)" in messages["by pci"]
    assert uuid_of(2) in messages["torch first"]
    assert messages["torch agrees"] == "no error"
    assert f"{uuid_of(2)} to torch, but {uuid_of(1)} was metered" in messages["torch differs"]
    assert "NVML lists no such card" in messages["torch unknown"]


@pytest.mark.parametrize(("name", "code"), error_codes())
def test_every_nvml_error_is_one_line_with_its_cure(nvml: Callable[[str], Any], name: str, code: int) -> None:
    messages = nvml("errors")[name]
    # no counter, no MIG: not faults but cards of another kind; and a card kept from us is not visible
    harmless = (
        {"nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetMigMode"} if code in (3, 13, 26) else set()
    )
    for function, message in messages.items():
        if function in harmless:
            assert message == "no error", function
            continue
        assert "\n" not in message
        if function == "nvmlDeviceGetHandleByIndex_v2" and code == 4:
            assert "0 of 0 NVIDIA cards are visible" in message
            continue
        assert f"({name}, {code})" in message, function
        assert "--meter estimate" in message or "run the same command again" in message


@pytest.mark.parametrize(("what", "told"), [("backwards", "went backwards"), ("leap", "leapt")])
@pytest.mark.slow
def test_nvml_counter_that_falls_or_leaps(nvml: Callable[[str], Any], what: str, told: str) -> None:
    found = nvml("faults")[what]
    before, during, after = found["joules"]
    assert during is None
    assert before == pytest.approx(found["true"][0], rel=0.1)
    assert after == pytest.approx(found["true"][2], rel=0.1)
    assert told in found["warnings"][0]
    assert found["next"] == "no error"


@pytest.mark.slow
def test_nvml_counter_that_is_stuck(nvml: Callable[[str], Any]) -> None:
    found = nvml("faults")["stuck"]
    before, _, after = found["joules"]
    assert before == pytest.approx(found["true"][0], rel=0.1)
    assert after is None
    assert "stood still" in found["next"]


def test_nvml_card_lost(nvml: Callable[[str], Any]) -> None:
    found = nvml("faults")["lost"]
    assert found["joules"][0] == pytest.approx(found["true"][0], rel=0.1)
    assert found["joules"][1:] == [None, None]
    assert "NVML_ERROR_GPU_IS_LOST, 15" in found["next"]
    assert "what is finished stays" in found["next"]
    assert "NVML_ERROR_GPU_IS_LOST" in nvml("faults")["sampling"]


def test_nvml_shared_cards_are_flagged(nvml: Callable[[str], Any]) -> None:
    found = nvml("faults")
    warnings, refusal = found["mig"]
    assert "MIG is on" in warnings[0]
    assert "pid 1)" in warnings[1]
    assert "Turn MIG off" in refusal
    assert found["whole"] == "no error"
    for what in ("none", "own", "namespace", "child", "no permission"):
        assert found[what] == [], what
    assert "pid 1)" in found["own and 1"][0]
    assert "pid 4194306)" in found["two of a namespace"][0]


def test_without_a_driver_nvml_is_one_line(tmp_path: Path) -> None:
    code = "from messcli.energy import open_meter; open_meter('nvml', ['cuda:0'])"
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(HERE.parent)}
    (tmp_path / "libnvidia-ml.so.1").write_text("no library")  # also where the machine has a driver
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "NVML_ERROR_LIBRARY_NOT_FOUND" in done.stderr.splitlines()[-1]
    assert "install the NVIDIA driver" in done.stderr

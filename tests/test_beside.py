"""`beside = true`: models that share a device run at the same time, and each is billed what its steps cost."""

from __future__ import annotations

import json
import math
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_models import FakeBackend, requests, write_joules, write_zoo
from test_adapters import Shared
from test_backends import Fake, Ticking, ask, live

from messcli.cli import main
from messcli.energy import EnergyLedger, open_meter
from messcli.energy.meter import Meter
from messcli.metrics import load_metric
from messcli.models.backend import share_weights
from messcli.models.live import Live
from messcli.models.transformers import TransformersBackend
from messcli.records import Request
from messcli.zoo import BUNDLED_ZOO, load_zoo

ROWS = Path(__file__).parent.parent / "samples" / "requests.jsonl"
REQUESTS = [Request(row["id"], row["prompt"]) for row in map(json.loads, ROWS.read_text().splitlines()[:120])]
JOULES = {
    "a": lambda p, o: 1.0 * o,
    "b": lambda p, o: 3.0 * o,
    "c": lambda p, o: 1.0,
    "a1": lambda p, o: 1.0 * o,
}


class Steady(Ticking):
    """A counter of 100 W, whatever runs."""

    def __init__(self) -> None:
        super().__init__()
        self.began = time.perf_counter()

    def read(self) -> float:
        self.joules = 100.0 * (time.perf_counter() - self.began)
        return self.joules


class Room:
    """How many models are in `generate`, by name, and the most at a time."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.lock = threading.Lock()
        self.inside = Counter[str]()
        self.together: set[frozenset[str]] = set()

    def entered(self, name: str) -> Any:
        def wait() -> None:
            with self.lock:
                self.inside[name] += 1
                self.together.add(frozenset(self.inside))
            time.sleep(0.03)
            with self.lock:
                del self.inside[name]

        return wait


def zoo_of(room: Room, names: str, beside: str, kind: type[Fake] = Fake, **waits: Any) -> list[Fake]:
    made = [
        kind(name, room.log, device="cuda:0", wait=waits.get(name, room.entered(name)))
        for name in names.split()
    ]
    for one in made:
        one.spec = replace(one.spec, beside=one.spec.name in beside.split())
    return made


def test_models_that_are_to_run_beside_each_other_do_and_others_take_turns() -> None:
    room = Room()
    source = live(zoo_of(room, "a b c", "a b"), weights=JOULES)
    assert ask(source, *([0, 1, 2] * 4)) == [f"{name} r{n}" for n, name in enumerate("abc" * 4)]
    assert frozenset("ab") in room.together
    assert frozenset("c") in room.together
    assert not any("c" in names and len(names) > 1 for names in room.together)
    assert source.take_warnings() == []


def test_without_a_calibration_they_take_turns_and_say_so() -> None:
    room = Room()
    source = live(zoo_of(room, "a b", "a b"))
    ask(source, *([0, 1] * 4))
    assert room.together == {frozenset("a"), frozenset("b")}
    (told,) = source.take_warnings()
    assert told.startswith("beside = true: the models aren't calibrated")
    assert told.endswith("Run `messcli calibrate`")


def test_models_on_the_same_weights_are_never_beside_each_other() -> None:
    room = Room()
    source = live(
        zoo_of(room, "a1 a2 b", "a1 a2 b", Shared), weights=dict.fromkeys(("a1", "a2", "b"), JOULES["a"])
    )
    ask(source, *([0, 1, 2] * 6))
    assert not any({"a1", "a2"} <= names for names in room.together)
    assert frozenset({"a1", "b"}) in room.together or frozenset({"a2", "b"}) in room.together


def test_one_that_fails_stops_the_other_and_is_told() -> None:
    def fail() -> None:
        raise RuntimeError("b broke")

    room = Room()
    with pytest.raises(RuntimeError, match="b broke"):
        ask(live(zoo_of(room, "a b", "a b", b=fail), weights=JOULES), *([0, 1] * 50))
    assert room.log.count("a") < 40


def test_after_a_failure_no_further_model_of_the_lane_is_asked() -> None:
    def fail() -> None:
        raise RuntimeError("a broke")

    room = Room()
    for beside in ("", "a b"):
        with pytest.raises(RuntimeError, match="a broke"):
            ask(live(zoo_of(room, "a b c", beside, a=fail), weights=JOULES), 0, 1, 2)
        assert "c" not in room.log
        assert beside or "b" not in room.log


@pytest.mark.parametrize("beside", [True, False])
def test_real_models_beside_each_other_answer_as_in_turns_and_all_joules_are_somebodys(
    beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, float, float]] = []
    run = TransformersBackend.run

    def seen(self: TransformersBackend, prompts: Any, first: Any, config: Any = None) -> Any:
        started = time.monotonic()
        try:
            return run(self, prompts, first, config)
        finally:
            ran.append((self.spec.name, started, time.monotonic()))

    monkeypatch.setattr(TransformersBackend, "run", seen)
    specs = [replace(spec, beside=beside) for spec in load_zoo(BUNDLED_ZOO).models[:2]]
    backends = [TransformersBackend(spec, batch_size=8) for spec in specs]
    share_weights(backends)
    meter = open_meter("estimate", ["cpu"])
    weights = {"small": lambda p, o: 0.001 * o, "medium": lambda p, o: 0.003 * o}
    ledger = EnergyLedger(meter)
    source = Live(backends, ledger, load_metric("exact"), weights=weights)
    source.load()
    ran.clear()
    found = {
        (position, m): outcome
        for group in source.answers([(request, (0, 1)) for request in REQUESTS])
        for position, m, outcome in group
    }
    assert len(found) == 2 * len(REQUESTS)
    for m, backend in enumerate(backends):
        expected = TransformersBackend(backend.spec, batch_size=None).generate(REQUESTS)
        assert [found[n, m].output for n in range(len(REQUESTS))] == [one.output for one in expected]
    overlap = sum(
        min(end, other_end) > max(start, other_start)
        for name, start, end in ran
        for other, other_start, other_end in ran
        if name < other
    )
    assert (overlap > 0) is beside
    billed = math.fsum(outcome.joules for outcome in found.values())
    overhead = math.fsum(source.take_overhead().values())
    assert math.isclose(billed + overhead, ledger.total, rel_tol=1e-9)
    totals = [math.fsum(found[n, m].joules for n in range(len(REQUESTS))) for m in (0, 1)]
    assert min(totals) > 0


def test_joules_are_split_by_the_calibrated_cost_of_steps() -> None:
    counter, room = Steady(), Room()
    source = Live(
        zoo_of(room, "a b", "a b"),
        EnergyLedger(Meter({"cuda:0": counter}, {"cuda:0": ("cuda:0",)})),
        load_metric("exact"),
        weights=JOULES,
    )
    asked = [(Request(id=f"r{n}", prompt="p"), (0, 1)) for n in range(20)]
    found = {(n, m): outcome.joules for group in source.answers(asked) for n, m, outcome in group}
    billed = math.fsum(found.values())
    overhead = math.fsum(source.take_overhead().values())
    assert math.isclose(billed + overhead, counter.joules, rel_tol=1e-9)
    a, b = (math.fsum(found[n, m] for n in range(20)) for m in (0, 1))
    assert b / a == pytest.approx(
        3.0, rel=0.35
    )  # their batches take the same 30 ms, and b's steps thrice the joules


@pytest.mark.slow
def test_two_models_and_ten_thousand_requests_swap_a_handful_of_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo = write_zoo(tmp_path, monkeypatch)
    text = zoo.read_text()
    zoo.write_text(
        text.replace('[[models]]\nname = "medium"\npath = "./medium"\nbackend = "fake"\ndevice = "cpu"\n', "")
    )
    loads: list[str] = []
    monkeypatch.setattr(
        FakeBackend,
        "load",
        lambda own: own.loaded or loads.append(own.spec.name) or own.__dict__.update(loaded=True),
    )
    rows = requests(10_000)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["route", "in.jsonl", "-o", "out.jsonl", "--zoo", "zoo.toml", "--max-loaded", "1", "-q"]
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--meter", write_joules(tmp_path, rows)], standalone_mode=False) == 0
    served = Counter(json.loads(line)["model"] for line in (tmp_path / "out.jsonl").read_text().splitlines())
    print(f"loads {len(loads)}, served {dict(served)}")
    assert min(served.values()) > 500
    assert len(loads) <= 30

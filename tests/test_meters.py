"""Meters that few have: AMD cards over a stub of their library, Apple's chip over a double, a command of the user's."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import amd_stub
import pytest
from fake_models import requests, write_zoo

from messcli.energy import CounterReset, open_meter
from messcli.energy.apple import APPLE, AppleCounter
from messcli.energy.command import CommandCounter
from messcli.errors import MeterError, ZooError
from messcli.jobs.route import RouteConfig, route
from messcli.zoo import load_zoo

# ---- AMD ------------------------------------------------------------------------------------------

READ = """
import json, os
from messcli.energy.amd import AmdCounter
from messcli.errors import MeterError
def world(*cards): open(os.environ["AMD_STUB"], "w").write("".join(card + "\\n" for card in cards))
def told(call):
    try: return call()
    except MeterError as error: return str(error)
"""
TWO = ("uuid-a 1 1000 15.259 0", "uuid-b 0 5000 15.259 0")  # amd-smi lists them in another order than HIP


@pytest.fixture(scope="module")
def amd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return amd_stub.build(tmp_path_factory.mktemp("amd"))


def test_amds_accumulator_is_read_in_its_own_steps(amd: Path) -> None:
    code = READ + (
        "counter = AmdCounter('cuda:0')\n"
        "world('uuid-a 1 1000 15.259 0', 'uuid-b 0 1005000 15.259 0')\n"
        "print(json.dumps([counter.read(), counter.read(), counter.kind, counter.provenance]))\n"
        "counter.close(); counter.close()\n"
    )
    joules, again, kind, provenance = amd_stub.run(amd, code, *TWO)
    assert (
        joules == again == pytest.approx(15.259)
    )  # a million steps of 15.259 µJ, of the card that HIP counts first
    assert kind == "amd"
    assert "uuid-b" in provenance
    assert "15.3 µJ" in provenance


@pytest.mark.parametrize(
    ("variables", "device", "card"),
    [
        ({}, "cuda:1", "uuid-a"),
        ({"HIP_VISIBLE_DEVICES": "1"}, "cuda:0", "uuid-a"),
        ({"CUDA_VISIBLE_DEVICES": "1,0"}, "cuda:1", "uuid-b"),
        ({"ROCR_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "0"}, "cuda:0", "uuid-a"),
        ({"HIP_VISIBLE_DEVICES": "0"}, "cuda:1", "amd-smi sees 1 cards that this process may use, and no cuda:1"),
    ],
)  # fmt: skip
def test_which_amd_card_stands_behind_a_device(
    amd: Path, variables: dict[str, str], device: str, card: str
) -> None:
    code = READ + f"print(json.dumps(told(lambda: AmdCounter({device!r}).provenance)))"
    assert card in amd_stub.run(amd, code, *TWO, **variables)


def test_amds_faults_are_told_with_their_cure(amd: Path) -> None:
    code = READ + (
        "found = [told(lambda: AmdCounter('cuda:0'))]\n"
        "world('uuid-a 0 1000 15.259 0')\n"
        "counter = AmdCounter('cuda:0')\n"
        "world('uuid-a 0 10 15.259 0'); found.append(told(counter.read))\n"
        "world('uuid-a 0 1010 15.259 0'); found.append(counter.read())\n"
        "world('uuid-a 0 1010 15.259 2'); found.append(told(counter.read))\n"
        "print(json.dumps(found))\n"
    )
    refused, fell, afterwards, gone = amd_stub.run(amd, code, "uuid-a 0 0 15.259 2")
    assert "amd-smi: amdsmi_get_energy_count" in refused
    assert "or take --meter estimate" in refused
    assert "was the driver reloaded?" in fell
    assert afterwards == pytest.approx(1000 * 15.259e-6)
    assert "check `amd-smi monitor`" in gone


def test_without_its_library_amdsmi_is_told_in_one_line(tmp_path: Path, amd: Path) -> None:
    code = READ + "print(json.dumps(told(lambda: AmdCounter('cuda:0'))))"
    assert "amdsmi finds no libamd_smi.so" in amd_stub.run(tmp_path, code)


# ---- Apple ----------------------------------------------------------------------------------------


class Chip:
    """What zeus_apple_silicon's monitor is to us: cumulative mJ by part, None where a chip has none."""

    mj = types.SimpleNamespace(cpu_total_mj=1000, dram_mj=500, gpu_mj=200, gpu_sram_mj=None, ane_mj=0)

    def get_cumulative_energy(self) -> types.SimpleNamespace:
        return self.mj


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch) -> type[Chip]:
    module = types.ModuleType("zeus_apple_silicon")
    module.AppleEnergyMonitor = Chip  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "zeus_apple_silicon", module)
    return Chip


def test_apples_parts_are_counted_once(chip: type[Chip], monkeypatch: pytest.MonkeyPatch) -> None:
    meter = open_meter("apple", ["cpu", "mps"])
    later = types.SimpleNamespace(cpu_total_mj=3000, dram_mj=600, gpu_mj=5200, gpu_sram_mj=None, ane_mj=100)
    monkeypatch.setattr(chip, "mj", later)
    assert meter.read() == {"cpu": 2.1, "mps": 5.1}
    assert "IOReport energy of gpu, ane" in meter.describe()[1]


def test_apples_faults_are_told(chip: type[Chip], monkeypatch: pytest.MonkeyPatch) -> None:
    empty = types.SimpleNamespace(gpu_mj=None, gpu_sram_mj=None, ane_mj=None)
    monkeypatch.setattr(chip, "mj", empty)
    with pytest.raises(MeterError, match=r"this chip tells no energy of mps\. Take --meter estimate"):
        AppleCounter("mps")
    monkeypatch.delitem(sys.modules, "zeus_apple_silicon")
    with pytest.raises(MeterError, match=r"pip install 'messcli\[apple\]'"):
        AppleCounter("cpu")
    assert APPLE.there() == (sys.platform == "darwin")


# ---- a command ------------------------------------------------------------------------------------


def plug(folder: Path, *joules: str) -> list[str]:
    """A command that prints these, one after another, and the last one ever after."""
    (folder / "readings").write_text("\n".join(joules), encoding="utf-8")
    script = folder / "plug.py"
    script.write_text(
        "import pathlib, sys\n"
        f"file = pathlib.Path({str(folder / 'readings')!r})\n"
        "lines = file.read_text().splitlines()\n"
        "file.write_text('\\n'.join(lines[1:] or lines))\n"
        "print(lines[0])\n",
        encoding="utf-8",
    )
    return [sys.executable, str(script)]


def test_a_command_prints_cumulative_joules(tmp_path: Path) -> None:
    counter = CommandCounter(plug(tmp_path, "1e6", "1000012.5", "1000013", "5", "7"), 1.0)
    assert [counter.read(), counter.read()] == [12.5, 13.0]
    with pytest.raises(CounterReset, match="printed 5 after 1000013: joules"):
        counter.read()
    assert counter.read() == 15.0
    assert counter.period == 1.0


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["no-such-program-here"], "No such file or directory. Give program and arguments"),
        ([sys.executable, "-c", "import sys; sys.exit('plug 3 is off')"], "exit 1: 'plug 3 is off'. Run it by hand"),
        ([sys.executable, "-c", "print('12 J')"], "printed '12 J\\n': print cumulative joules, one number"),
        ([sys.executable, "-c", "print('nan')"], "print cumulative joules, one number"),
        ([sys.executable, "-c", ""], "printed '': print cumulative joules"),
    ],
)  # fmt: skip
def test_a_command_that_tells_nothing_is_told(command: list[str], told: str) -> None:
    with pytest.raises(MeterError) as caught:
        CommandCounter(command, 1.0)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_command_stands_for_all_devices(tmp_path: Path) -> None:
    meter = open_meter("command", ["cuda:0", "cpu"], command=plug(tmp_path, "0", "60"))
    assert meter.read() == {"cpu": 60.0}
    assert meter.sources(["cuda:0"]) == meter.sources(["cpu"]) == ("cpu",)
    assert len(meter.describe()) == 1
    with pytest.raises(MeterError, match=r"set command under \[energy\] in zoo.toml"):
        open_meter("command", ["cpu"])


@pytest.mark.slow
def test_a_run_by_a_command_of_the_zoo_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo = write_zoo(tmp_path, monkeypatch)
    readings = [str(100 * number) for number in range(200)]
    command = json.dumps(plug(tmp_path, *readings))
    text = zoo.read_text() + f'\n[energy]\nmeter = "command"\ncommand = {command}\ncommand_seconds = 0.001\n'
    zoo.write_text(text)
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in requests(9)))
    said: list[str] = []
    config = RouteConfig.of(str(tmp_path / "in.jsonl"), str(tmp_path / "o.jsonl"), zoo=str(zoo))
    summary = route(config, tell=said.append)
    assert list(summary.energy.meters) == ["command"]
    read = 100 * (199 - len((tmp_path / "readings").read_text().splitlines()))
    assert summary.energy.billed_joules + summary.energy.overhead_joules == pytest.approx(read, abs=100)
    assert "whole host, by" in "\n".join(said)


def test_a_found_zoo_file_runs_no_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo = write_zoo(tmp_path, monkeypatch).rename(tmp_path / "zoo.toml")
    zoo.write_text(zoo.read_text() + '\n[energy]\nmeter = "command"\ncommand = "rm -r ~"\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZooError, match=r"would run a program. If you trust it, name it: --zoo zoo.toml"):
        load_zoo().metering("auto")
    assert load_zoo().metering("estimate")["choice"] == "estimate"
    assert load_zoo("zoo.toml").metering("auto")["command"] == ("rm", "-r", "~")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("command = 3", "must be a command"),
        ("command = []", "must be a command"),
        ("command = 'a \"b'", "is no command: No closing quotation"),
        ("command_seconds = 0", "must be a number of seconds above 0"),
    ],
)
def test_energy_fields_are_checked(tmp_path: Path, line: str, told: str) -> None:
    file = tmp_path / "zoo.toml"
    file.write_text(f'[[models]]\nname = "a"\npath = "b"\n[energy]\n{line}\n')
    with pytest.raises(ZooError) as caught:
        load_zoo(file)
    assert told in str(caught.value)

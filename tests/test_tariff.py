"""Money and carbon: what the zoo file states, what a run adds up, what summary, report and JSON say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from fake_models import FakeBackend, requests, write_joules, write_zoo

from messcli.cli import main
from messcli.errors import StateError, ZooError
from messcli.jobs.route import RouteConfig, route
from messcli.registry import BACKENDS
from messcli.report import make_report
from messcli.report.page import page
from messcli.tariff import JOULES_PER_KWH, Spent, Tariff
from messcli.zoo import Zoo, load_zoo

SPEND = {"frugal": (1.0, 0.9), "cheap": (5.0, 0.1), "large": (9.0, 2.0)}  # joules and money of a request
MODEL = '[[models]]\nname = "a"\npath = "b"\n'
STATED = "\n[energy]\nprice_per_kwh = 0.30\ngrams_per_kwh = 400\ncurrency = 'EUR'\nas_of = 2026-11-01\n"


def test_a_kilowatt_hour_costs_what_is_stated() -> None:
    spent = Spent()
    tariff = Tariff(price_per_kwh=(0.3,), grams_per_kwh=(400.0,), currency="EUR", as_of="2026-11-01")
    spent.add(tariff, 2 * JOULES_PER_KWH, hour=3, model="a")
    spent.add(tariff, JOULES_PER_KWH, hour=15)
    assert (spent.joules, spent.money, spent.grams) == (3 * JOULES_PER_KWH, pytest.approx(0.9), 1200.0)
    assert spent.words("EUR") == "0.9 EUR, 1.2 kg CO2e"
    assert tariff.basis == "0.3 EUR per kWh, 400 g per kWh, as of 2026-11-01"
    assert not Tariff()


def test_24_numbers_are_the_hours_of_the_day() -> None:
    tariff = Tariff(price_per_kwh=tuple(float(hour) for hour in range(24)))
    spent = Spent()
    for hour in (0, 7, 23):
        spent.add(tariff, JOULES_PER_KWH, hour)
    assert (spent.money, spent.grams) == (30.0, None)
    assert "0 to 23, by hour," in tariff.basis
    assert "undated" in tariff.basis


def test_a_hosted_model_costs_its_tokens_and_not_its_electricity() -> None:
    price = {"request": 0.001, "prompt_token": 1e-6, "output_token": 4e-6}
    tariff = Tariff(price_per_kwh=(0.3,), grams_per_kwh=(400.0,), per_token={"hosted": price})
    spent = Spent()
    spent.add(tariff, JOULES_PER_KWH, 0, model="hosted", prompt_tokens=1000, output_tokens=500)
    assert spent.money == pytest.approx(0.001 + 1e-3 + 2e-3)
    assert spent.grams == 400.0
    spent.add(tariff, JOULES_PER_KWH, 0, model="own", prompt_tokens=1000, output_tokens=500)
    assert spent.money == pytest.approx(0.304)


def test_sums_go_on_over_runs() -> None:
    assert Spent(1.0, None, 2.0).plus(Spent(2.0, 3.0, None)) == Spent(3.0, 3.0, 2.0)
    assert Spent(1.0, None, None).plus(Spent()) == Spent(1.0)
    assert Spent(**Spent(1.0, 2.0, 3.0).as_json()) == Spent(1.0, 2.0, 3.0)


def test_the_zoo_file_states_prices(tmp_path: Path) -> None:
    file = tmp_path / "zoo.toml"
    served = (
        'backend = "openai"\nbase_url = "http://x/v1"\nprice = { prompt_token = 1e-6, output_token = 4e-6 }\n'
    )
    file.write_text(MODEL + served + STATED)
    tariff = load_zoo(file).tariff
    assert (tariff.price_per_kwh, tariff.grams_per_kwh) == ((0.3,), (400.0,))
    assert (tariff.currency, tariff.as_of) == ("EUR", "2026-11-01")
    assert tariff.per_token == {"a": {"prompt_token": 1e-6, "output_token": 4e-6}}
    file.write_text(MODEL)
    assert not load_zoo(file).tariff


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[energy]\nprice_per_kwh = -1", "price_per_kwh: holds -1: must be a number of at least 0"),
        ("[energy]\nprice_per_kwh = 'dear'", "holds 'dear'"),
        ("[energy]\ngrams_per_kwh = [1, 2]", "has 2 numbers: give one, or 24"),
        ("[energy]\ngrams_per_kwh = inf", "holds inf"),
        ("[energy]\nas_of = 3", "as_of: must be a string in quotes"),
        ("price = { output_token = 1 }", 'only a model with backend = "openai" has one'),
    ],
)
def test_prices_that_can_not_be_meant(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "zoo.toml"
    file.write_text(MODEL + text)
    with pytest.raises(ZooError) as caught:
        load_zoo(file)
    assert told in str(caught.value)


def test_worth_is_the_joules_that_a_hosted_models_price_would_buy() -> None:
    price = {"large": {"output_token": 3e-6}}
    saves = Tariff(price_per_kwh=(0.3,), per_token=price, minimize="money")
    assert saves.worth("large", 10, 100) == pytest.approx(3e-4 / 0.3 * JOULES_PER_KWH)
    assert saves.worth("small", 10, 100) is None  # electricity is what is paid for: joules are money
    assert Tariff(price_per_kwh=(0.3,), per_token=price).worth("large", 10, 100) is None
    by_hour = Tariff(price_per_kwh=(0.1,) * 12 + (0.5,) * 12, per_token=price, minimize="money")
    assert by_hour.worth("large", 10, 100) == pytest.approx(saves.worth("large", 10, 100))


@pytest.mark.parametrize(
    ("stated", "told"),
    [
        ('minimize = "cost"', "minimize: must be one of joules, money, grams, not 'cost'"),
        (
            'minimize = "money"',
            'minimize = "money": state price_per_kwh, above 0, which model "a" is paid by',
        ),
        ('minimize = "money"\nprice_per_kwh = 0', "state price_per_kwh, above 0"),
        ('minimize = "grams"', 'minimize = "grams": state grams_per_kwh'),
    ],
)
def test_what_is_to_be_saved_has_to_be_stated(tmp_path: Path, stated: str, told: str) -> None:
    file = tmp_path / "zoo.toml"
    file.write_text(f"{MODEL}[energy]\n{stated}\n")
    with pytest.raises(ZooError) as caught:
        load_zoo(file)
    assert told in str(caught.value)


@pytest.mark.parametrize("minimize", ["joules", "money"])
def test_decisions_save_what_they_are_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minimize: str
) -> None:
    """Two models that are right about everything: one takes few joules and is dear, the other the reverse."""
    monkeypatch.setitem(BACKENDS, "fake", FakeBackend)
    monkeypatch.setattr("fake_models.SKILLS", {"frugal": 99, "cheap": 99, "large": 99})
    zoo = tmp_path / "z.toml"
    models = "".join(f'[[models]]\nname = "{name}"\npath = "x"\nbackend = "fake"\n' for name in SPEND)
    zoo.write_text(
        f"{models}[sla]\nalpha = 0.9\nmetric = 'exact'\n[energy]\nprice_per_kwh = 0.36\nminimize = '{minimize}'\n"
    )
    prices = {name: {"request": money} for name, (_, money) in SPEND.items()}
    monkeypatch.setattr(
        Zoo, "tariff", property(lambda self: Tariff((0.36,), minimize=minimize, per_token=prices))
    )
    rows = requests(200)
    table = tmp_path / "joules.jsonl"
    outcomes = {name: {"joules": joules, "accuracy": 1.0} for name, (joules, _) in SPEND.items()}
    table.write_text("".join(f"{json.dumps({**row, 'models': outcomes})}\n" for row in rows))
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    paths = [str(tmp_path / name) for name in ("in.jsonl", "o.jsonl")]
    config = RouteConfig.of(*paths, zoo=str(zoo), meter=f"replay:{table}", window=8)
    summary = route(config)
    wanted = "frugal" if minimize == "joules" else "cheap"
    assert summary.requests.served[wanted] > 150, summary.requests.served
    last = json.loads((tmp_path / "o.jsonl").read_text().splitlines()[-1])
    assert last["joules"] == SPEND[wanted][0]  # rows have joules, whatever is saved
    if minimize == "money":  # what was learnt in one unit isn't continued in another
        zoo.write_text(zoo.read_text().replace("minimize = 'money'", ""))
        monkeypatch.setattr(Zoo, "tariff", property(lambda self: Tariff((0.36,), per_token=prices)))
        with pytest.raises(
            StateError, match="was made with minimize money, and this run has minimize joules"
        ):
            route(config)


def test_summary_report_json_and_page_say_what_a_run_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo = write_zoo(tmp_path, monkeypatch)
    zoo.write_text(zoo.read_text() + STATED)
    rows = requests(40)
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    state = tmp_path / "o.jsonl.state"

    def run(limit: int | None) -> tuple[float, float | None]:
        config = RouteConfig.of(
            str(tmp_path / "in.jsonl"),
            str(tmp_path / "o.jsonl"),
            zoo=str(zoo),
            meter=write_joules(tmp_path, rows),
            limit=limit,
        )
        summary = route(config)
        assert summary.energy.spent.joules == pytest.approx(summary.energy.total_joules)
        [line] = [line for line in summary.text() if line.startswith("cost ")]
        assert "(0.3 EUR per kWh, 400 g per kWh, as of 2026-11-01)" in line
        return summary.energy.total_joules, summary.energy.spent.money

    first, second = run(25), run(None)
    report = make_report(str(state))
    total = first[0] + second[0]
    assert report.cost is not None
    assert report.cost.joules == pytest.approx(total) == pytest.approx(report.total_joules)
    assert report.cost.money == pytest.approx(total / JOULES_PER_KWH * 0.3)
    assert report.cost.money == pytest.approx((first[1] or 0) + (second[1] or 0))
    assert report.cost.grams == pytest.approx(total / JOULES_PER_KWH * 400)
    plain = json.loads(CliRunner().invoke(main, ["report", str(state), "--json"]).stdout)
    assert plain["cost"]["money"] == report.cost.money
    text = CliRunner().invoke(main, ["report", str(state)]).stdout
    assert f"cost: {report.cost.words(total)} (0.3 EUR per kWh" in text
    assert f"{report.cost.money:.4g} EUR" in page(report)


def test_runs_without_prices_are_said_to_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo = write_zoo(tmp_path, monkeypatch)
    rows = requests(40)
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    paths = [str(tmp_path / name) for name in ("in.jsonl", "o.jsonl")]
    meter = write_joules(tmp_path, rows)
    assert "cost" not in "\n".join(route(RouteConfig.of(*paths, zoo=str(zoo), meter=meter, limit=20)).text())
    zoo.write_text(zoo.read_text() + STATED)
    route(RouteConfig.of(*paths, zoo=str(zoo), meter=meter))
    report = make_report(f"{paths[1]}.state")
    assert report.cost is not None
    share = report.cost.joules / report.total_joules
    assert 0.1 < share < 0.9
    assert f"for {share:.1%} of the total, the runs with prices" in report.cost.words(report.total_joules)

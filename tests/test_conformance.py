"""Every name of the registry passes its kind's suite, and each suite refuses what it says that it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_models import FakeBackend
from marks import slow
from test_dialects import EXAMPLES
from tiny_models import save_llama

from messcli import conformance
from messcli.energy import MeterOptions
from messcli.files.dialects import load_dialect
from messcli.metrics import Metric, load_metric
from messcli.models.backend import create
from messcli.predict.mean import MeanPredictor
from messcli.records import Generation
from messcli.registry import DIALECTS, METERS, METRICS, POLICIES, PREDICTORS
from messcli.routing.policy import Largest
from messcli.zoo import ModelSpec, model_spec


@pytest.mark.parametrize("claim", conformance.METRIC)
@pytest.mark.parametrize("name", METRICS)
def test_metrics(name: str, claim: Callable[..., None]) -> None:
    claim(load_metric(name))


@pytest.mark.parametrize("claim", conformance.PREDICTOR)
@pytest.mark.parametrize("name", [slow(name) if name == "fasttext" else name for name in PREDICTORS])
def test_predictors(name: str, claim: Callable[..., None]) -> None:
    claim(PREDICTORS.load(name))


@pytest.mark.parametrize("claim", conformance.POLICY)
@pytest.mark.parametrize("name", POLICIES)
def test_policies(name: str, claim: Callable[..., None]) -> None:
    claim(POLICIES.load(name))


@pytest.mark.parametrize("claim", conformance.DIALECT)
@pytest.mark.parametrize("name", DIALECTS)
def test_dialects(name: str, claim: Callable[..., None]) -> None:
    claim(load_dialect(name), EXAMPLES[name])


def test_the_estimate() -> None:  # RAPL and NVML run over sysfs and a stub: test_energy.py
    conformance.check(
        conformance.METER, METERS.load("estimate").open("cpu", MeterOptions()), conformance.burn
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.mark.parametrize("claim", conformance.BACKEND)
def test_transformers(tiny: Path, claim: Callable[..., None]) -> None:
    spec = model_spec(name="tiny", path=str(tiny), device="cpu", dtype="float32", max_new_tokens=6)
    claim(create(spec, batch_size=2))


@pytest.mark.parametrize("claim", conformance.BACKEND)
def test_the_fake_backend_of_our_tests(claim: Callable[..., None]) -> None:
    claim(FakeBackend(ModelSpec("large", "nowhere", backend="fake"), batch_size=2))


# ---- suites refuse what is wrong ------------------------------------------------------------------


class Sharing(FakeBackend):
    """Two models on the same weights; the first that goes takes them away."""

    def __init__(self, spec: ModelSpec, *, batch_size: int | None) -> None:
        super().__init__(spec, batch_size=batch_size)
        self.others: list[Sharing] = [self]

    weights = "one"

    def share(self, other: Sharing) -> None:
        self.others = other.others
        self.others.append(self)

    def unload(self) -> None:
        for one in self.others:
            one.loaded = False

    def generate(self, batch: Any) -> list[Generation]:
        self.loaded = True
        return [Generation(one.prompt, self.prompt_tokens(one), self.prompt_tokens(one)) for one in batch]


class _Backend(FakeBackend):
    def __init__(self) -> None:
        super().__init__(ModelSpec("large", "nowhere", backend="fake"), batch_size=2)


def _subclass(base: type, **methods: Any) -> Any:
    return type("Wrong", (base,), methods)


def _nan(self: Any, features: Any) -> Any:
    return np.full(3, math.nan)


EXACT = load_metric("exact")
WRONG: dict[str, tuple[Any, ...]] = {
    "a metric that is never 1": (conformance.METRIC, Metric("m", "m|", lambda output, references: 0.5)),
    "a metric of another name": (conformance.METRIC, replace(EXACT, name="other")),
    "a metric that is always 1": (conformance.METRIC, Metric("m", "m|", lambda output, references: 1.0)),
    "a predictor that knows before it learns": (
        conformance.PREDICTOR,
        _subclass(MeanPredictor, predict_one=lambda self, features: np.full(3, 0.5)),
    ),
    "a predictor of NaN": (conformance.PREDICTOR, _subclass(MeanPredictor, predict_one=_nan)),
    "a predictor that forgets": (
        conformance.PREDICTOR,
        _subclass(MeanPredictor, load=lambda self, state: None),
    ),
    "a policy that takes what it may not": (
        conformance.POLICY,
        lambda setup: _subclass(Largest, choose=lambda self, view: 0)(),
    ),
    "a policy without windows": (
        conformance.POLICY,
        lambda setup: _subclass(Largest, window=lambda self, t, left: 0)(),
    ),
    "a backend that mixes answers up": (
        conformance.BACKEND,
        _subclass(_Backend, generate=lambda self, batch: [Generation("x", 1, 1)] * (len(batch) + 1))(),
    ),
    "a backend that leaves requests out": (
        conformance.BACKEND,
        _subclass(_Backend, plan=lambda self, requests: [[0]])(),
    ),
    "a backend whose weights are no probabilities": (
        conformance.BACKEND,
        _subclass(
            _Backend,
            _generation=lambda self, request: Generation(
                request.prompt,
                self.prompt_tokens(request),
                1,
                weights=(2.0, 0.0) if request.options else None,
            ),
        )(),
    ),
    "a backend that stays loaded": (conformance.BACKEND, _subclass(_Backend, unload=lambda self: None)()),
    "a dialect that reads nothing": (
        conformance.DIALECT,
        replace(load_dialect("jsonl"), read=lambda line: {}),
        {"prompt": "a"},
    ),
    "a dialect that doesn't know itself": (
        conformance.DIALECT,
        replace(load_dialect("jsonl"), looks_like=lambda line: False),
        {"prompt": "a"},
    ),
}


def test_the_claim_of_shared_weights_is_what_refuses_one() -> None:
    subject = Sharing(ModelSpec("large", "nowhere", backend="fake"), batch_size=2)
    with pytest.raises(AssertionError, match="takes the other's weights away"):
        conformance.check(conformance.BACKEND, subject)


@pytest.mark.parametrize("what", WRONG)
def test_suites_refuse(what: str) -> None:
    suite, *subject = WRONG[what]
    with pytest.raises(AssertionError):
        conformance.check(suite, *subject)


class Falling:
    kind, provenance, period, partitioned = "falling", "falls", 0.1, False

    def __init__(self) -> None:
        self.joules = 10.0

    def read(self) -> float:
        self.joules -= 1.0
        return self.joules

    def warnings(self) -> list[str]:
        return []

    def close(self) -> None:
        pass


def test_a_falling_meter_is_refused() -> None:
    with pytest.raises(AssertionError, match="readings fall"):
        conformance.check(conformance.METER, Falling(), conformance.burn)

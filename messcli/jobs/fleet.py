"""Puts a zoo's models, their meter and a metric together: where requests of `route` and `record` are answered.

Knows which model runs where and who meters it; nothing of how a model is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from messcli.energy import AUTO, CPU, EnergyLedger, Weight, open_meter
from messcli.errors import UsageError, ZooError
from messcli.metrics import Metric
from messcli.models.backend import Backend, OtherProcesses, SelfMetered, create
from messcli.models.live import Live
from messcli.zoo import ModelSpec, Zoo

LOCAL, RAY = "local", "ray"


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How and where models run; nothing here changes what they answer."""

    meter: str = "auto"
    batch_size: int | None = None
    max_loaded: int | None = None  # models in memory at a time; None: as many as there is memory for
    engine: str = LOCAL
    address: str | None = None  # of the Ray cluster; None: $RAY_ADDRESS, else a cluster of this machine alone
    weights: Mapping[str, Weight] = field(default_factory=dict)  # how a batch's joules are split, by model


def open_live(config: EngineConfig, zoo: Zoo, metric: Metric, tell: Callable[[str], None]) -> Live:
    """The zoo's models as a source of outcomes; nothing is loaded yet. `tell` takes lines for the user.

    Raises:
        MeterError: a device that nothing meters.
        ZooError: a model elsewhere whose joules nobody knows.
        UsageError: options that contradict each other.
    """
    backends = _backends(config, zoo, tell)
    own = [backend for backend in backends if not isinstance(backend, SelfMetered)]
    devices = dict.fromkeys(device for backend in own for device in backend.devices)
    if own and config.meter == AUTO:
        devices.setdefault(CPU)  # loading, learning and feeding the cards is overhead, and the CPU's
    others = [backend.cpu_seconds for backend in own if isinstance(backend, OtherProcesses)]
    meter = open_meter(config.meter, tuple(devices), zoo.energy.get("cpu_watts"), others)
    for line in meter.describe():
        tell(line)
    return Live(backends, EnergyLedger(meter), metric, max_loaded=config.max_loaded, weights=config.weights)


def _backends(config: EngineConfig, zoo: Zoo, tell: Callable[[str], None]) -> Sequence[Backend]:
    if config.engine == RAY:
        from messcli.models.ray import connect

        return connect(config.address, tell).backends(zoo, config.meter, config.batch_size)
    if config.address is not None:
        raise UsageError("--address is where a Ray cluster is. Add --engine ray, or leave it out")
    return [_backend(spec, zoo, config) for spec in zoo.models]


def _backend(spec: ModelSpec, zoo: Zoo, config: EngineConfig) -> Backend:
    backend = create(spec, batch_size=config.batch_size)
    if spec.backend != "openai" or config.meter.startswith("replay:"):
        return backend
    from messcli.models.openai import OpenAIBackend
    from messcli.models.priced import CALIBRATION, STATED, Priced, stated_price

    if spec.joules:
        return Priced(backend, stated_price(spec.joules), STATED)
    if spec.calibration is None and isinstance(backend, OpenAIBackend) and backend.local:
        return backend
    return Priced(backend, _calibrated(spec, zoo), CALIBRATION)


def _calibrated(spec: ModelSpec, zoo: Zoo) -> Callable[[int, int], float]:
    """What the calibration of the server's own machine says. That it is another machine than ours is the point."""
    from messcli.calibration.file import load_calibration, places

    where = [Path(spec.calibration)] if spec.calibration else [file for file in places(zoo) if file.is_file()]
    for file in where:
        for model in load_calibration(file).models:
            if model.name == spec.name:
                return model.gross.coefficients.joules
    raise ZooError(
        f'model "{spec.name}": its server ({spec.base_url}) runs elsewhere, and nothing says what its tokens '
        "cost. Calibrate it on its own machine and set calibration = FILE, or give prices in [models.joules]"
    )

"""Puts a zoo's models, their meter and a metric together: where requests of `route` and `record` are answered.

Knows which model runs where and who meters it; nothing of how a model is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from messcli.energy import AUTO, CPU, EnergyLedger, Weight, open_meter
from messcli.errors import UsageError, ZooError
from messcli.jobs.config import RAY, Running
from messcli.metrics import Metric
from messcli.models.backend import Backend, OtherProcesses, SelfMetered, create
from messcli.models.live import Live
from messcli.zoo import ModelSpec, ServerOptions, Zoo


def open_live(
    running: Running,
    zoo: Zoo,
    metric: Metric,
    tell: Callable[[str], None],
    weights: Mapping[str, Weight] | None = None,
) -> Live:
    """The zoo's models as a source of outcomes; nothing is loaded yet.

    Args:
        tell: takes lines for the user.
        weights: how a batch's joules are split, by model.

    Raises:
        MeterError: a device that nothing meters.
        ZooError: a model elsewhere whose joules nobody knows.
        UsageError: options that contradict each other.
    """
    backends = _backends(running, zoo, tell)
    own = [backend for backend in backends if not isinstance(backend, SelfMetered)]
    devices = dict.fromkeys(device for backend in own for device in backend.devices)
    if own and running.meter == AUTO:
        devices.setdefault(CPU)  # loading, learning and feeding the cards is overhead, and the CPU's
    others = [backend.cpu_seconds for backend in own if isinstance(backend, OtherProcesses)]
    meter = open_meter(devices=tuple(devices), others=others, **zoo.metering(running.meter))
    for line in meter.describe():
        tell(line)
    return Live(backends, EnergyLedger(meter), metric, max_loaded=running.max_loaded, weights=weights)


def _backends(running: Running, zoo: Zoo, tell: Callable[[str], None]) -> Sequence[Backend]:
    if running.engine == RAY:
        from messcli.models.ray import connect

        return connect(running.address, tell).backends(zoo, running.meter, running.batch_size)
    if running.address is not None:
        raise UsageError("--address is where a Ray cluster is. Add --engine ray, or leave it out")
    return [_backend(spec, zoo, running) for spec in zoo.models]


def _backend(spec: ModelSpec, zoo: Zoo, running: Running) -> Backend:
    backend = create(spec, batch_size=running.batch_size)
    if spec.backend != "openai" or running.meter.startswith("replay:"):
        return backend
    from messcli.models.openai import OpenAIBackend
    from messcli.models.priced import CALIBRATION, STATED, Priced, stated_price

    own = spec.own(ServerOptions)
    if own.joules:
        return Priced(backend, stated_price(own.joules), STATED)
    if own.calibration is None and isinstance(backend, OpenAIBackend) and backend.local:
        return backend
    return Priced(backend, _calibrated(spec, zoo), CALIBRATION)


def _calibrated(spec: ModelSpec, zoo: Zoo) -> Callable[[int, int], float]:
    """What the calibration of the server's own machine says. That it is another machine than ours is the point."""
    from messcli.calibration.file import load_calibration, places

    own = spec.own(ServerOptions)
    where = [Path(own.calibration)] if own.calibration else [file for file in places(zoo) if file.is_file()]
    for file in where:
        for model in load_calibration(file).models:
            if model.name == spec.name:
                return model.gross.coefficients.joules
    raise ZooError(
        f'model "{spec.name}": its server ({own.base_url}) runs elsewhere, and nothing says what its tokens '
        "cost. Calibrate it on its own machine and set calibration = FILE, or give prices in [models.joules]"
    )

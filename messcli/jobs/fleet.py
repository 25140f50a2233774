"""Puts a zoo's models, their meter and a metric together: where requests of `route` and `record` are answered.

Knows which model runs where and who meters it; nothing of how a model is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from messcli.calibration.file import Calibration
from messcli.energy import AUTO, CPU, EnergyLedger, Weight, open_meter
from messcli.errors import MeterError, UsageError, ZooError
from messcli.jobs.config import RAY, Running
from messcli.metrics import Metric
from messcli.models.backend import Backend, OtherProcesses, SelfMetered, create, share_weights
from messcli.models.billing import Loads
from messcli.models.live import Live
from messcli.records import Answer, Asked, Request
from messcli.signals import Stop
from messcli.zoo import JudgeSpec, ModelSpec, ServerOptions, Zoo


def open_live(
    running: Running,
    zoo: Zoo,
    metric: Metric,
    tell: Callable[[str], None],
    weights: Mapping[str, Weight] | None = None,
    stop: Stop | None = None,
    judge: JudgeSpec | None = None,
) -> Live:
    """The zoo's models as a source of outcomes; nothing is loaded yet.

    Args:
        tell: takes lines for the user.
        weights: how joules are split over the requests that ran together, by model.
        stop: says whether the run was told to stop.
        judge: one more model, after those of the zoo.

    Raises:
        MeterError: a device that nothing meters.
        ZooError: a model elsewhere whose joules nobody knows.
        UsageError: options that contradict each other.
    """
    backends = list(_backends(running, zoo, tell))
    if judge is not None:
        backends.append(_backend(judge.model, zoo, running))
    share_weights(backends)
    own = [backend for backend in backends if not isinstance(backend, SelfMetered)]
    devices = dict.fromkeys(device for backend in own for device in backend.devices)
    if own and running.meter == AUTO:
        devices.setdefault(CPU)  # loading, learning and feeding the cards is overhead, and the CPU's
    others = [backend.cpu_seconds for backend in own if isinstance(backend, OtherProcesses)]
    meter = open_meter(devices=tuple(devices), others=others, **zoo.metering(running.meter))
    for line in meter.describe():
        tell(line)
    return Live(
        backends,
        EnergyLedger(meter),
        metric,
        max_loaded=running.max_loaded,
        weights=weights,
        stopping=lambda: stop is not None and stop.is_set,
        loading=nullcontext if stop is None else stop.loading,
        tariff=zoo.tariff,
        checkers=zoo.checkers if meter.reads_checks else {},
    )


class LazyLive:
    """The zoo's models, opened with their meter when the first request asks for them: a finished job loads nothing."""

    def __init__(
        self,
        running: Running,
        zoo: Zoo,
        metric: Metric,
        calibration: Calibration | None,
        tell: Callable[[str], None],
        stop: Stop,
        judge: JudgeSpec | None = None,
    ) -> None:
        self.names = zoo.names
        self._stop = stop
        self._judge = judge
        self._running = running
        self._calibration = calibration
        self._zoo = zoo
        self._metric = metric
        self._tell = tell
        self._live: Live | None = None

    def open(self) -> Live:
        """Open them now. Raises as `open_live` does."""
        if self._live is None:
            calibration = self._calibration
            weights = {} if calibration is None else calibration.weights()
            self._live = open_live(
                self._running, self._zoo, self._metric, self._tell, weights, self._stop, self._judge
            )
            self._tell(
                "energy: not calibrated: E_m(t) is learnt from what is read (`messcli calibrate` gives it a start)"
                if calibration is None
                else f"energy: calibrated by {calibration.path}, made {calibration.made}"
                f"{'' if calibration.converged else '; not all of its cells converged'}"
            )
        return self._live

    @property
    def checkers(self) -> Mapping[int, int]:
        """None before they are open: nothing was decided then."""
        return self._live.checkers if self._live else {}

    def allowed(self, requests: Sequence[Request]) -> list[tuple[int, ...]]:
        if not requests:
            return []
        zoo = range(len(self.names))  # a judge is none of it
        return [tuple(m for m in models if m in zoo) for models in self.open().allowed(requests)]

    def answers(self, asked: Asked) -> Iterator[Sequence[Answer]]:
        return self.open().answers(asked)

    def take_overhead(self) -> Mapping[str, float]:
        return self._live.take_overhead() if self._live else {}

    @property
    def named_overhead(self) -> Mapping[str, float]:
        """Parts of the overhead so far by what it was for."""
        return self._live.named_overhead if self._live else {}

    @property
    def loads(self) -> Loads:
        """What was read so far, by how many requests a model ran at a time."""
        return self._live.loads if self._live else {}

    def running_joules(self) -> Mapping[str, float]:
        return self._live.running_joules() if self._live else {}

    def take_warnings(self) -> list[str]:
        return self._live.take_warnings() if self._live else []

    @property
    def fault(self) -> MeterError | None:
        """Why a counter can't be read any more."""
        return self._live.fault if self._live else None

    def close(self) -> None:
        if self._live:
            self._live.close()

    def __enter__(self) -> LazyLive:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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

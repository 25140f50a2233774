"""Models as actors of a Ray cluster: many machines answer, and the controller here decides alone.

Every actor runs one model by its ordinary backend and meters the devices of its own node, so that joules come
back with the answers. Knows Ray; nothing of routing.

What is shared and what isn't:

- A hardware counter (RAPL, a card's) sees everything on its device. Actors of one node that draw on the same
  counter take turns, by a lock file on that node; what no call was billed for is overhead, once per counter.
- The estimate counts an actor's own CPU seconds, which nobody shares.

An actor that dies, with its node or alone, loses nothing but time: the batch it had goes to another replica
of its model. A new actor is asked for at once, and takes work when the cluster has found room for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import signal
import socket
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from messcli.energy import Call, EnergyLedger, Meter, open_meter
from messcli.errors import MessError, ModelUnavailable, UsageError, first_line
from messcli.models.backend import Backend, Billed, Group, InBatches, create, fitting, group_of
from messcli.records import Generation, Request
from messcli.zoo import CheckpointOptions, ModelSpec, Zoo

INSTALL = "pip install 'messcli[ray]'"
START_SECONDS = 600.0  # within which a model's first actor has started and loaded
RESTART_SECONDS = 60.0  # how long a model that has lost its last actor waits for another one
_AGAIN = "Look after the cluster, and run the same command again to go on"
_CONNECT_SECONDS = 10.0
_REPLAY = "replay:"


@dataclass(frozen=True, slots=True)
class _Reading:
    """One counter as an actor sees it. Joules are since the actor opened it."""

    node: str
    source: str  # what tells the counter from others of the node
    kind: str
    joules: float  # in all
    attributed: float  # to this actor's calls


@dataclass(frozen=True, slots=True)
class _Answer:
    """A batch, answered and metered."""

    billed: list[Billed]
    readings: list[_Reading]
    warnings: list[str]


class Worker:
    """One model on one node. Runs inside of an actor, and so one call at a time."""

    def __init__(self, spec: ModelSpec, batch_size: int | None, metering: Mapping[str, Any]) -> None:
        if spec.device.startswith("cuda"):
            # Ray shows an actor the cards that it was given, and no others
            spec = replace(spec, device="cuda:0")
        self._backend: Backend = create(spec, batch_size=batch_size)
        # a replay is looked up by whoever has the file
        self._meter = None
        if not metering["choice"].startswith(_REPLAY):
            self._meter = _NodeMeter(open_meter(devices=self._backend.devices, **metering))

    def load(self) -> list[str]:
        """Load the model. Returns what meters it, for the user."""
        self._backend.load()
        return [] if self._meter is None else self._meter.describe()

    def fitting(self, requests: Sequence[Request]) -> list[bool]:
        return fitting(self._backend, requests)

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        return self._backend.plan(requests)

    def answer(self, batch: Sequence[Request]) -> _Answer:
        """Answer a batch and bill it; waits while other actors use the same counters."""
        if self._meter is None:
            unbilled = [Billed(g, None, None, "none") for g in self._backend.generate(batch)]
            return _Answer(unbilled, [], [])
        ids = [str(request.id) for request in batch]
        with self._meter.call(self._backend.spec.name, ids, self._backend.devices) as call:
            call.generations = self._backend.generate(batch)
        billed = [
            Billed(generation, bill.joules, bill.seconds, call.kind)
            for generation, bill in zip(call.generations, call.bills(), strict=True)
        ]
        return _Answer(billed, self._meter.read(), self._meter.take_warnings())

    def read(self) -> list[_Reading]:
        """The counters now."""
        return [] if self._meter is None else self._meter.read()


class _NodeMeter:
    """An actor's meter, whose counters other actors of its node may use too."""

    def __init__(self, meter: Meter) -> None:
        import ray

        self._node = ray.get_runtime_context().get_node_id()
        self._actor = ray.get_runtime_context().get_actor_id()
        self._meter = meter
        self._ledger = EnergyLedger(meter)
        self.describe = meter.describe
        self.take_warnings = self._ledger.take_warnings

    @contextmanager
    def call(self, model: str, ids: Sequence[str], devices: Sequence[str]) -> Iterator[Call]:
        """A call of `model` as the ledger bills it, while no other actor of this node uses its counters."""
        with self._turn(devices), self._ledger.window():  # noqa: SIM117  # the call ends within the window
            with self._ledger.call(model, ids, devices) as call:
                yield call

    def read(self) -> list[_Reading]:
        """The counters now."""
        return [
            _Reading(self._node, self._identity(source), self._meter.counters[source].kind, total, attributed)
            for source, (total, attributed) in self._ledger.accounts().items()
        ]

    def _identity(self, source: str) -> str:
        """The hardware behind a counter, or this actor where it counts nothing but its own work."""
        counter = self._meter.counters[source]
        return str(self._actor) if counter.kind == "estimate" else counter.provenance

    @contextmanager
    def _turn(self, devices: Sequence[str]) -> Iterator[None]:
        """Wait until no other actor of this node uses a counter of `devices`. The lock of a dead actor is free."""
        counters = [self._meter.counters[source] for source in self._meter.sources(devices)]
        shared = sorted(counter.provenance for counter in counters if counter.kind != "estimate")
        with ExitStack() as stack:
            for provenance in shared:  # in one order, so that no two wait for each other
                name = hashlib.blake2b(provenance.encode(), digest_size=8).hexdigest()
                path = Path(tempfile.gettempdir()) / f"messcli-{os.getuid()}-{name}.lock"
                handle = stack.enter_context(path.open("a"))
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield


class RayBackend(InBatches):
    """One model of the zoo and its actors. See `messcli.models.backend.Backend` and `SelfMetered`."""

    occupies_memory = False  # of this machine

    def __init__(
        self,
        ray: Any,
        spec: ModelSpec,
        batch_size: int | None,
        metering: Mapping[str, Any],  # as `open_meter` takes it
        shared: _Shared,
    ) -> None:
        self.spec = spec
        self._replicas = spec.own(CheckpointOptions).replicas
        self._ray = ray
        self._arguments = (spec, batch_size, metering)
        self._shared = shared
        self._actors: list[Any] = []  # that answer
        self._starting: dict[Any, Any] = {}  # ref of load() -> actor
        self._started = False  # actors were asked for
        self._served = False  # one has been there
        self._wait_until = 0.0  # since the last one was lost; on the monotonic clock
        self._warnings: list[str] = []
        self._draining = False

    # --- actors ---

    @property
    def devices(self) -> tuple[str, ...]:
        return (f"{self.spec.name} on Ray",)

    @property
    def loaded(self) -> bool:
        return self._started

    def load(self) -> None:
        """Start the replicas and wait for the first one. Raises ModelUnavailable with the cure."""
        self.start()
        if not self._served:
            self._await_actor(time.monotonic() + START_SECONDS)
            if not self._actors:
                raise self._unavailable(
                    f"no actor could start within {START_SECONDS:.0f} s (one asks for {_needs(self.spec)})",
                    "Give the cluster more room, or lower resources in zoo.toml",
                )
            self._served = True

    def start(self) -> None:
        """Ask for the replicas, and wait for none."""
        if not self._started:
            self._started = True
            for _ in range(self._replicas):
                self._start_actor()

    def unload(self) -> None:
        """End the actors."""
        for actor in (*self._actors, *self._starting.values()):
            self._ray.kill(actor)
        self._actors, self._starting, self._started, self._served = [], {}, False, False
        self._shared.close(self)

    def _start_actor(self) -> None:
        needs = _needs(self.spec)
        actor = (
            self._ray.remote(Worker)
            .options(
                num_cpus=needs.pop("CPU"),
                num_gpus=needs.pop("GPU", 0.0),
                memory=int(needs.pop("memory", 0)) or None,
                resources=needs or None,
                scheduling_strategy="SPREAD",
                max_restarts=0,  # a restarted actor would have lost its counters unseen
            )
            .remote(*self._arguments)
        )
        self._starting[actor.load.remote()] = actor

    def _await_actor(self, until: float) -> None:
        """Wait until a time of the monotonic clock for one actor that can answer, as long as one may still come."""
        while not self._actors and self._starting and (left := until - time.monotonic()) > 0:
            self._take_started(left)

    def _take_started(self, seconds: float) -> None:
        """Let actors that have started take work; wait for the first of them."""
        if not self._starting:
            return
        self._ray.wait(list(self._starting), num_returns=1, timeout=seconds)
        ready, _ = self._ray.wait(list(self._starting), num_returns=len(self._starting), timeout=0)
        for ref in ready:
            actor = self._starting.pop(ref)
            try:
                self._shared.describe(self._ray.get(ref))
            except self._ray.exceptions.RayTaskError as error:
                raise _told(error) from error  # what is wrong with a model or its meter is wrong everywhere
            except self._ray.exceptions.RayActorError as error:
                self._warnings.append(f'model "{self.spec.name}": an actor died at its start: {_line(error)}')
                if self._served:
                    self._start_actor()
            else:
                self._actors.append(actor)

    def _lost(self, actor: Any, why: str) -> None:
        """An actor has died: another one is asked for, and takes work when it runs."""
        self._actors.remove(actor)
        self._shared.forget(actor)
        left = len(self._actors)
        if not left:  # a replica that is still starting, or the new one, may take over
            self._wait_until = time.monotonic() + RESTART_SECONDS
        self._warnings.append(
            f'model "{self.spec.name}": lost an actor ({why}); '
            + (f"{left} of {self._replicas} replicas go on" if left else "no replica is left that answers")
        )
        self._start_actor()

    # --- prompts: asked of an actor, for only it has the tokenizer ---

    @property
    def context_length(self) -> int | None:
        """The user's own limit; the model's is known to its actors, which `fitting` asks."""
        return self.spec.max_prompt_tokens

    def prompt_tokens(self, request: Request) -> int:
        """A guess at 4 characters per token; `fitting` asks an actor, which knows."""
        return -(-len(self.spec.fill_template(request.prompt)) // 4)

    def fitting(self, requests: Sequence[Request]) -> list[bool]:
        """Which of `requests` the model can take; all, where no actor is left to tell: they will find it away."""
        self.load()
        self._take_started(0.0)
        fits: list[bool] | None = self._ask_any("fitting", requests)
        if fits is None:
            self._shared.refuse_if_all_lost()
        return [True] * len(requests) if fits is None else fits

    def _ask_any(self, method: str, requests: Sequence[Request]) -> Any:
        """What an actor says of `requests`; None where none is left, and none came in time."""
        while True:
            self._await_actor(self._wait_until)
            if not self._actors:
                return None
            actor = self._actors[0]
            try:
                return self._ray.get(getattr(actor, method).remote(list(requests)))
            except self._ray.exceptions.RayActorError as error:
                self._lost(actor, _line(error))
            except self._ray.exceptions.RayTaskError as error:
                raise _told(error) from error

    @property
    def alive(self) -> bool:
        """Whether it may answer: before the first actor has started, nothing is lost."""
        return bool(self._actors) or not self._served

    def actors(self) -> list[Any]:
        return list(self._actors)

    # --- answering ---

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        """All at once; `answer` shares them out."""
        return [list(range(len(requests)))] if requests else []

    def generate(self, batch: Sequence[Request]) -> list[Generation]:
        return [billed.generation for billed in self.answer(batch)]

    def answer(self, requests: Sequence[Request]) -> list[Billed]:
        """Answer `requests`, in order, as `stream_billed` does."""
        answers = {index: billed for group in self.stream_billed(requests) for index, billed in group}
        return [answers[index] for index in range(len(requests))]

    def stream(self, requests: Sequence[Request]) -> Iterator[Group]:
        for group in self.stream_billed(requests):
            yield group_of({index: billed.generation for index, billed in group})

    def stream_billed(self, requests: Sequence[Request]) -> Iterator[Sequence[tuple[int, Billed]]]:
        """Answers as they come: batches go to whichever replica is free.

        A batch whose actor died goes to another one; when none is left, its requests have `error`. Raises
        ModelError where the model itself fails.
        """
        if not requests:
            return
        self.load()
        self._draining = False
        waiting = self._batches(requests)
        busy: dict[Any, tuple[Any, list[int]]] = {}
        while waiting or busy:
            if self._draining:
                waiting = []
            idle = [actor for actor in self._actors if all(actor is not other for other, _ in busy.values())]
            for actor in idle[: len(waiting)]:
                batch = waiting.pop(0)
                busy[actor.answer.remote([requests[index] for index in batch])] = (actor, batch)
            if not waiting and not busy:
                return
            if not busy:
                self._await_actor(self._wait_until)
                if not self._actors:
                    break
                continue
            done, _ = self._ray.wait(list(busy), num_returns=1)
            actor, batch = busy.pop(done[0])
            try:
                answer: _Answer = self._ray.get(done[0])
            except self._ray.exceptions.RayActorError as error:
                self._lost(actor, _line(error))
                waiting.insert(0, batch)
            except self._ray.exceptions.RayTaskError as error:
                raise _told(error) from error
            else:
                self._shared.take(actor, answer.readings)
                self._warnings.extend(answer.warnings)
                yield list(zip(batch, answer.billed, strict=True))
        if waiting:
            why = f'model "{self.spec.name}": the last actor that ran it was lost, and no other could start'
            lost = Billed(Generation(None, 0, 0, error=why, fault="away"), 0.0, None, "")
            yield [(index, lost) for batch in waiting for index in batch]

    def drain(self) -> None:
        """See `messcli.models.backend.Draining`."""
        self._draining = True

    def _batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """Batches as an actor plans them, small enough that every replica gets one."""
        batches: list[list[int]] | None = self._ask_any("plan", requests)
        if batches is None:
            return [list(range(len(requests)))]
        most = -(-len(requests) // len(self._actors))
        return [batch[at : at + most] for batch in batches for at in range(0, len(batch), most)]

    # --- energy ---

    def take_overhead(self) -> Mapping[str, float]:
        """The whole cluster's, told by its first model; nothing by the others."""
        return self._shared.take_overhead(self)

    def take_warnings(self) -> list[str]:
        taken, self._warnings = self._warnings, []
        return taken

    def _unavailable(self, what: str, cure: str) -> ModelUnavailable:
        return ModelUnavailable(f'model "{self.spec.name}" ({self.spec.path}): {what}. {cure}')


class _Shared:
    """What the models of one zoo share: the cluster, and the counters of its nodes."""

    def __init__(self, ray: Any, tell: Callable[[str], None], *, connected: bool) -> None:
        self._ray = ray
        self._connected = connected  # by us, so that we end it
        self._lock = threading.Lock()  # models answer in threads
        self._tell = tell
        self._told: set[str] = set()
        self._counters: dict[tuple[str, str], _Counted] = {}
        self._backends: list[RayBackend] = []

    def backends(self, zoo: Zoo, meter: str, batch_size: int | None) -> list[RayBackend]:
        """A backend per model, whose actors start at once, side by side.

        Raises UsageError where the cluster has no room for one actor of each.
        """
        metering = zoo.metering(meter)
        for spec in zoo.models:
            if spec.backend == "openai":
                raise UsageError(
                    f'model "{spec.name}" is served already: --engine ray runs models itself. Leave --engine out'
                )
        self._check_room(zoo)
        self._backends = [RayBackend(self._ray, spec, batch_size, metering, self) for spec in zoo.models]
        for backend in self._backends:
            backend.start()
        return self._backends

    def _check_room(self, zoo: Zoo) -> None:
        has = self._ray.cluster_resources()
        one, every = defaultdict[str, float](float), defaultdict[str, float](float)
        for spec in zoo.models:
            for name, amount in _needs(spec).items():
                one[name] += amount
                every[name] += amount * spec.own(CheckpointOptions).replicas
        for name, amount in one.items():
            if amount > has.get(name, 0.0):
                raise UsageError(
                    f"the zoo asks for {amount:g} {name}, one actor of each model, and the cluster has "
                    f"{has.get(name, 0.0):g}. Add a node, or lower resources in zoo.toml (0.5 is allowed)"
                )
        for name, amount in every.items():
            if amount > has.get(name, 0.0):
                self._tell(
                    f"warning: all replicas together ask for {amount:g} {name}, and the cluster has {has[name]:g}: "
                    "some wait until there is room"
                )

    def refuse_if_all_lost(self) -> None:
        if not any(backend.alive for backend in self._backends):
            raise ModelUnavailable(f"every model of the zoo has lost its actors. {_AGAIN}")

    def close(self, backend: RayBackend) -> None:
        """Leave the cluster when the last model has."""
        if backend in self._backends:
            self._backends.remove(backend)
        if not self._backends and self._connected:
            self._ray.shutdown()

    def describe(self, lines: Sequence[str]) -> None:
        """Tell what meters the actors, each kind once."""
        with self._lock:
            fresh = [line for line in lines if line not in self._told]
            self._told.update(fresh)
        for line in fresh:
            self._tell(line)

    # --- energy ---

    def take(self, actor: Any, readings: Sequence[_Reading]) -> None:
        with self._lock:
            for reading in readings:
                counted = self._counters.setdefault((reading.node, reading.source), _Counted(reading.kind))
                counted.take(actor, reading)

    def forget(self, actor: Any) -> None:
        with self._lock:
            for counted in self._counters.values():
                counted.forget(actor)

    def take_overhead(self, backend: RayBackend) -> Mapping[str, float]:
        if not self._backends or backend is not self._backends[0]:
            return {}
        refs = {actor.read.remote(): actor for other in self._backends for actor in other.actors()}
        for ref, actor in refs.items():
            try:
                self.take(actor, self._ray.get(ref))
            except self._ray.exceptions.RayActorError:  # noqa: PERF203  # one dead actor isn't all
                continue  # the next window will find it dead
        overhead = defaultdict[str, float](float)
        for counted in self._counters.values():
            overhead[counted.kind] += counted.take_overhead()
        return overhead


class _Counted:
    """One counter of one node. One actor's view of it counts, and the calls of all."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._viewer: Any = None
        self._last = 0.0  # what the viewer read last
        self._total = 0.0
        self._attributed: dict[Any, float] = {}  # actor -> joules of its calls
        self._taken = 0.0

    def take(self, actor: Any, reading: _Reading) -> None:
        if self._viewer is None:
            # what an actor read before, its predecessor as the viewer has told
            first = not self._attributed
            self._viewer, self._last = actor, 0.0 if first else reading.joules
        if actor is self._viewer:
            self._total += reading.joules - self._last
            self._last = reading.joules
        self._attributed[actor] = reading.attributed

    def forget(self, actor: Any) -> None:
        if actor is self._viewer:
            self._viewer = None

    def take_overhead(self) -> float:
        """Joules since last taken that no call was billed for."""
        fresh = max(0.0, self._total - sum(self._attributed.values()) - self._taken)
        self._taken += fresh
        return fresh


def connect(address: str | None, tell: Callable[[str], None]) -> _Shared:
    """Join the Ray cluster at `address`; None: $RAY_ADDRESS, else a cluster of this machine alone.

    Raises UsageError naming the cure: Ray isn't installed, no cluster there, a token that it refuses.
    """
    try:
        import ray
    except ImportError as error:
        raise UsageError(f"--engine ray needs Ray ({error}). {INSTALL}") from error
    except Exception as error:  # Ray asks amdsmi for cards, which fails in its own way without ROCm's library
        raise UsageError(
            f"--engine ray: Ray can't be imported ({first_line(error)}). If amdsmi is installed on a machine"
            " without ROCm: pip uninstall amdsmi"
        ) from error
    if ray.is_initialized():
        return _Shared(ray, tell, connected=False)
    _check_port(address or os.environ.get("RAY_ADDRESS"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        ray.init(
            address=address,
            namespace="messcli",
            logging_level=logging.ERROR,
            log_to_driver=False,
            include_dashboard=False if address is None and "RAY_ADDRESS" not in os.environ else None,
        )
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        where = address or os.environ.get("RAY_ADDRESS") or "this machine"
        if "token" in str(error).lower() or "authentic" in str(error).lower():
            raise UsageError(
                f"the Ray cluster at {where} asks for its token. Set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to the "
                "file that holds it; every node has the same one"
            ) from error
        raise UsageError(
            f"no Ray cluster could be reached at {where} ({_line(error)}). Start one by `ray start --head`, or "
            "correct --address"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)  # Ray takes SIGTERM for itself
    return _Shared(ray, tell, connected=True)


def _check_port(address: str | None) -> None:
    """Raises UsageError where nothing answers at HOST:PORT: Ray itself would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "auto", or this machine
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise UsageError(
            f"no Ray cluster could be reached at {address} ({error.strerror or error}). Start one by "
            "`ray start --head`, or correct --address"
        ) from error


def _needs(spec: ModelSpec) -> dict[str, float]:
    """Ray's resources of one actor: zoo.toml's, else one CPU, and one GPU for a model on a card."""
    gpus = {"GPU": 1.0} if spec.device.startswith("cuda") else {}
    return {"CPU": 1.0, **gpus, **spec.own(CheckpointOptions).resources}


def _told(error: Any) -> BaseException:
    """What a backend raised in its actor: our errors as they are, bugs with the actor's traceback."""
    cause = error.cause
    return cause if isinstance(cause, MessError) else error


def _line(error: BaseException) -> str:
    """An error of Ray's in one line."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line.rstrip(".:")

"""The Meter: one counter per source of energy, and how it is opened.

Knows devices by their torch names ("cuda:0", "cpu"); which hardware stands behind a name is each
counter's own business. Attribution to requests is `ledger.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from messcli.energy.counter import Counter, MeterKind, MeterOptions
from messcli.energy.replay import Replay
from messcli.errors import MeterError, UsageError
from messcli.registry import METERS

AUTO = "auto"  # a choice of meter, and also accelerate's device: a model over every card that is visible
CPU = "cpu"


class Meter:
    """The counters of every device a zoo uses. `sources` maps a device's name to its counter's."""

    def __init__(
        self,
        counters: Mapping[str, Counter],
        sources: Mapping[str, tuple[str, ...]],
        *,
        choice: str = AUTO,
        notes: Sequence[str] = (),
        replay: Replay | None = None,
    ) -> None:
        self.counters = dict(counters)
        self.choice = choice
        self._sources = dict(sources)
        self._notes = tuple(notes)
        self._replay = replay

    @property
    def replays(self) -> bool:
        """Whether joules come from a recorded table."""
        return self._replay is not None

    @property
    def reads_checks(self) -> bool:
        """Whether it knows what a model takes to read another's answer: a recorded table may not."""
        return self._replay is None or self._replay.has_checks

    def read(self) -> dict[str, float]:
        """Joules of each source since opening. Raises as `Counter.read` does."""
        return {source: counter.read() for source, counter in self.counters.items()}

    def sources(self, devices: Sequence[str]) -> tuple[str, ...]:
        """The names of the counters that `devices` draw on, each once.

        Raises MeterError for a device that has none: energy is never left out unsaid.
        """
        if self._replay is not None:
            return ()
        found: dict[str, None] = {}
        for device in devices:
            name = _normal(device)
            if name not in self._sources:
                raise MeterError(
                    f"nothing meters device {device}, which a model runs on: --meter {self.choice} covers "
                    f"{', '.join(sorted(self._sources)) or 'nothing'}. Name the device in zoo.toml, or take "
                    "--meter auto or --meter estimate"
                )
            found.update(dict.fromkeys(self._sources[name]))
        return tuple(found)

    def kind(self, devices: Sequence[str]) -> str:
        """What a row served by `devices` says in `meter`: where they differ, the least direct."""
        if self._replay is not None:
            return self._replay.kind
        kinds = {self.counters[source].kind for source in self.sources(devices)}
        known = [name for name in _preferred() if name in kinds]
        return known[-1] if known else "+".join(sorted(kinds))

    def replayed(
        self, model: str, request_ids: Sequence[str]
    ) -> list[tuple[float | None, float | None]] | None:
        """(joules, seconds) of each request as recorded; None where this meter reads counters.

        Raises MeterError naming id, model and file where the file has no such outcome.
        """
        return None if self._replay is None else [self._replay.lookup(id_, model) for id_ in request_ids]

    def describe(self) -> list[str]:
        """Lines for stderr: what each device is metered by, and why not by something better."""
        if self._replay is not None:
            return [f"energy: {self._replay.provenance}"]
        lines = [f"energy: {name}: {c.kind}: {c.provenance}" for name, c in self.counters.items()]
        return lines + [f"energy: {note}" for note in self._notes]

    def warnings(self) -> list[str]:
        """What makes readings mean more than this run's energy, as of now."""
        return [line for counter in self.counters.values() for line in counter.warnings()]

    def require_whole_devices(self) -> None:
        """Raises MeterError where a device is only a slice of what its counter covers (calibration)."""
        for source, counter in self.counters.items():
            if counter.partitioned:
                raise MeterError(
                    f"MIG is on for {source}, whose counter covers the whole card ({counter.provenance}): "
                    "a calibration would bill other slices' work. Turn MIG off (nvidia-smi -mig 0), or "
                    "calibrate on another card"
                )

    def close(self) -> None:
        """Give all counters back."""
        for counter in self.counters.values():
            counter.close()


def check_choice(choice: str) -> None:
    """Raise UsageError for a `--meter` that names none."""
    if choice != AUTO and choice not in METERS and not choice.startswith("replay:"):
        raise UsageError(f"--meter: {METERS.unknown(choice, AUTO, 'replay:FILE')}")


def open_meter(
    choice: str,
    devices: Sequence[str],
    cpu_watts: float | None = None,
    others: Sequence[Callable[[], float]] = (),
    command: Sequence[str] = (),
    command_seconds: float | None = None,
) -> Meter:
    """A meter over `devices`, as `--meter` chose: auto, a name of METERS, or replay:FILE.

    `cpu_watts` is watts per busy core for the estimate (`[energy] cpu_watts`; None: the default), and
    `others` tell it CPU seconds of other processes that run models; `command` (`[energy] command`) is the
    program behind the meter of that name, updated every `command_seconds`. A
    named meter that can't serve every device is refused; `auto` takes the best per device and
    `Meter.describe` says which. Raises MeterError with the cure, UsageError for an unknown choice.
    """
    if choice.startswith("replay:"):
        return Meter({}, {}, choice=choice, replay=Replay(choice.removeprefix("replay:")))
    check_choice(choice)

    options = MeterOptions(cpu_watts, others, command, command_seconds)
    counters: dict[str, Counter] = {}
    sources: dict[str, tuple[str, ...]] = {}
    notes: list[str] = []
    try:
        for device in _expand(choice, devices, notes):
            source = CPU if choice != AUTO and _kind(choice).host else device
            if source not in counters:
                counters[source] = _open(choice, device, options, notes)
            sources[device] = (source,)
            if source != device and not _kind(choice).measures:
                notes.append(f"{device}: the estimate counts CPU seconds, and not what {device} itself draws")
    except MeterError:
        for counter in counters.values():
            counter.close()
        raise
    sources.setdefault(AUTO, tuple(counters))
    return Meter(counters, sources, choice=choice, notes=notes)


def _kind(name: str) -> MeterKind:
    kind: MeterKind = METERS.load(name)
    return kind


def _preferred(notes: list[str] | None = None) -> list[str]:
    """The names of METERS as `auto` tries them: what reads before what reckons.

    Why a package's can't be had goes to `notes`; the others go on.
    """
    kinds: dict[str, MeterKind] = {}
    for name in METERS:
        try:
            kinds[name] = _kind(name)
        except MeterError as error:  # noqa: PERF203  # each name is loaded on its own
            if notes is not None:
                notes.append(str(error))
    return sorted(kinds, key=lambda name: not kinds[name].measures)


def _open(choice: str, device: str, options: MeterOptions, notes: list[str]) -> Counter:
    family = device.partition(":")[0]
    if choice != AUTO:
        kind = _kind(choice)
        if not kind.host and family not in kind.devices:
            raise MeterError(
                f"--meter {choice} can't read device {device} of the zoo (it reads "
                f"{', '.join(kind.devices)}). Take --meter auto, which finds a meter per device"
            )
        return kind.open(device, options)
    candidates = [name for name in _preferred(notes) if family in _kind(name).devices and _kind(name).there()]
    if not candidates:
        raise MeterError(f"no meter reads device {device}. Take --meter estimate: CPU seconds, marked so")
    return _first(candidates, device, options, notes)


def _first(candidates: Sequence[str], device: str, options: MeterOptions, notes: list[str]) -> Counter:
    """The first candidate that opens. Why one did not goes to `notes`; the last one's error is raised."""
    try:
        return _kind(candidates[0]).open(device, options)
    except MeterError as error:
        if len(candidates) == 1:
            raise
        why, _, _ = str(error).partition(". ")  # the cure after it is what happens next anyway
        notes.append(f"{device}: not {candidates[0]}: {why}")
    return _first(candidates[1:], device, options, notes)


def _expand(choice: str, devices: Sequence[str], notes: list[str]) -> list[str]:
    """`devices` by normal name, each once; accelerate's "auto" is every visible card and the CPU."""
    expanded: dict[str, None] = {}
    for device in map(_normal, devices):
        if device != AUTO:
            expanded[device] = None
        elif choice in (AUTO, "nvml"):
            from messcli.energy.nvml import visible_devices  # loads the NVIDIA driver's library

            try:
                cards = visible_devices()
            except MeterError as error:
                if choice != AUTO:
                    raise
                cards = []
                notes.append(f'device "auto": no NVIDIA card is metered: {error}')
            # layers that don't fit on the cards are put on the CPU
            covered = cards if choice == "nvml" else [*cards, CPU]
            if not covered:
                raise MeterError('--meter nvml: device "auto" has no visible NVIDIA card. Take --meter auto')
            expanded.update(dict.fromkeys(covered))
            notes.append(f'device "auto" is metered on {", ".join(covered)}')
        else:
            expanded[CPU] = None
    return list(expanded)


def _normal(device: str) -> str:
    """torch's names: "cuda" is its first card, "cpu:0" is the CPU."""
    if device == "cuda":
        return "cuda:0"
    return CPU if device.partition(":")[0] == CPU else device

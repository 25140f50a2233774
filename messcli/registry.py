"""What is chosen by name: metrics, predictors, policies, meters, backends and input dialects, ours and packages'.

A name of ours is one line below. An installed package adds names by entry points of the group `messcli.metrics`,
`messcli.predictors`, and so on. Nothing is imported before `load`: the command line lists names at once.
Knows names and where things lie; what a thing has to be is said by its own room (docs/extending.md).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, MutableMapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from messcli.errors import MessError, MeterError, MetricError, UsageError, ZooError, first_line


class Registry(MutableMapping[str, Any]):
    """Name -> where the thing lies, as "module:object", or the thing itself.

    Names of ours come first, in the order of the table; those of packages follow, sorted. A name of ours always
    means ours: a package that has it too is not heard (`shadowed`).
    """

    def __init__(
        self, kind: str, group: str, entries: Mapping[str, Any], error: type[MessError] = UsageError
    ) -> None:
        self.kind = kind  # as messages say it
        self.group = group  # of the entry points
        self._entries = dict(entries)
        self._error = error

    def load(self, name: str) -> Any:
        """The thing itself, imported now.

        Raises the kind's MessError: nothing has that name, or the package that has it can't be imported.
        """
        if name not in self:
            raise self._error(self.unknown(name))
        target = self[name]
        if not isinstance(target, str):
            return target
        module, _, attribute = target.partition(":")
        if name in self._entries:
            return getattr(import_module(module), attribute)
        try:
            found: Any = import_module(module)
            for part in attribute.split(".") if attribute else []:
                found = getattr(found, part)
        except Exception as error:  # a package of somebody else's may raise anything
            raise self._error(
                f'{self.kind} "{name}": {self.package(name)} has it, and importing it failed: '
                f"{first_line(error)}. Mend or uninstall that package"
            ) from error
        return found

    def unknown(self, name: str, *others: str) -> str:
        """What to say of a name that nothing has. `others` are further choices that are no names."""
        close = difflib.get_close_matches(name.lower(), [known.lower() for known in self], n=1)
        meant = next((known for known in self if [known.lower()] == close), None)
        hint = "" if meant is None else f'did you mean "{meant}"? '
        return f'unknown {self.kind} "{name}": {hint}Known are {", ".join([*self, *others])}'

    def package(self, name: str) -> str | None:
        """The installed package that a name comes from, with its version; None: messcli itself."""
        if name in self._entries:
            return None
        made_by = self._installed()[name].dist
        return "an installed package" if made_by is None else f"{made_by.name} {made_by.version}"

    def shadowed(self) -> tuple[str, ...]:
        """Names of packages that aren't heard, for messcli has them itself."""
        return tuple(name for name in self._installed() if name in self._entries)

    def _installed(self) -> dict[str, EntryPoint]:
        return _entry_points(self.group)

    def __getitem__(self, name: str) -> Any:
        return self._entries[name] if name in self._entries else self._installed()[name].value

    def __setitem__(self, name: str, target: Any) -> None:
        """For a program of one's own, and for tests: a package takes an entry point."""
        self._entries[name] = target

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._entries
        yield from (name for name in self._installed() if name not in self._entries)

    def __len__(self) -> int:
        return sum(1 for _ in self)


@cache
def _entry_points(group: str) -> dict[str, EntryPoint]:
    """Of all installed packages, sorted by name. Reading their lists takes milliseconds: once is enough."""
    return {point.name: point for point in sorted(entry_points(group=group), key=lambda point: point.name)}


# Dialect (messcli/files/dialects/dialect.py); the first that takes a file's first line is guessed
DIALECTS = Registry(
    "dialect",
    "messcli.dialects",
    {
        "jsonl": "messcli.files.dialects.dialect:JSONL",
        "openai-batch": "messcli.files.dialects.openai_batch:OPENAI_BATCH",
        "sharegpt": "messcli.files.dialects.sharegpt:SHAREGPT",
        "alpaca": "messcli.files.dialects.alpaca:ALPACA",
        "lm-eval": "messcli.files.dialects.lm_eval:LM_EVAL",
    },
)

# () -> Metric (messcli/metrics/base.py); a function with a parameter `tokenizer` gets that of [sla]
METRICS = Registry(
    "metric",
    "messcli.metrics",
    {
        "bleu1": "messcli.metrics.overlap:bleu1",
        "rouge1": "messcli.metrics.overlap:rouge1",
        "rougeL": "messcli.metrics.overlap:rouge_l",
        "chrf": "messcli.metrics.overlap:chrf",
        "exact": "messcli.metrics.answers:exact",
        "normalized": "messcli.metrics.answers:normalized",
        "contains": "messcli.metrics.answers:contains",
        "number": "messcli.metrics.answers:number",
        "choice": "messcli.metrics.choice:choice",
    },
    MetricError,
)

# (number of models) -> Predictor (messcli/predict/base.py)
PREDICTORS = Registry(
    "predictor",
    "messcli.predictors",
    {
        "ridge": "messcli.predict.ridge:RidgePredictor",
        "linear": "messcli.predict.linear:LinearPredictor",
        "fasttext": "messcli.predict.fasttext:FastTextPredictor",
        "mean": "messcli.predict.mean:MeanPredictor",
    },
)

# (Setup) -> Policy (messcli/routing/policy.py)
POLICIES = Registry(
    "policy",
    "messcli.policies",
    {
        "mess+": "messcli.routing.setup:mess_plus",
        "smallest": "messcli.routing.setup:smallest",
        "largest": "messcli.routing.setup:largest",
        "random": "messcli.routing.setup:random_constrained",
    },
)

# MeterKind (messcli/energy/counter.py); `auto` tries what serves a device in this order
METERS = Registry(
    "meter",
    "messcli.meters",
    {
        "nvml": "messcli.energy.nvml:NVML",
        "amd": "messcli.energy.amd:AMD",
        "rapl": "messcli.energy.cpu:RAPL",
        "apple": "messcli.energy.apple:APPLE",
        "command": "messcli.energy.command:COMMAND",
        "estimate": "messcli.energy.cpu:ESTIMATE",
    },
    MeterError,
)

# (ModelSpec, *, batch_size) -> Backend (messcli/models/backend.py)
BACKENDS = Registry(
    "backend",
    "messcli.backends",
    {
        "openai": "messcli.models.openai:OpenAIBackend",
        "transformers": "messcli.models.transformers:TransformersBackend",
        "vllm": "messcli.models.vllm:VllmBackend",
    },
    ZooError,
)

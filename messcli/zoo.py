"""The zoo file: which models there are, smallest first, and what is promised.

Knows the format of zoo.toml; loads no model, reads no weights and asks no hub.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any, TypeVar

from messcli import adapter
from messcli import zoo_values as values
from messcli.errors import ZooError, shown
from messcli.tariff import GRAMS, HOURS, JOULES, MONEY, Tariff

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENV_ZOO = "MESSCLI_ZOO"
BUNDLED_ZOO = Path(__file__).parent / "bundled" / "zoo.toml"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

# options that have a place of their own: naming them twice would let one silently win
_LOAD_OWN_FIELD = {
    "dtype": "dtype",
    "torch_dtype": "dtype",
    "revision": "revision",
    "trust_remote_code": "trust_remote_code",
    "use_safetensors": "allow_pickle",
    "weights_only": "allow_pickle",
}
_GENERATION_OWN_FIELD = {"max_new_tokens": "max_new_tokens", "max_length": "max_new_tokens"}
_TARIFF = ("price_per_kwh", "grams_per_kwh", "currency", "as_of", "minimize")
_ENGINES_SHARE = 0.9  # of a device's memory for all vLLM engines on it
# what people write beside `path` and transformers takes elsewhere
_BELONGS_IN = {
    **dict.fromkeys(
        ("temperature", "do_sample", "top_p", "top_k", "num_beams", "repetition_penalty", "length_penalty",
         "no_repeat_ngram_size", "min_new_tokens", "stop_strings", "eos_token_id", "forced_bos_token_id"),
        "generation",
    ),
    **dict.fromkeys(
        ("attn_implementation", "quantization_config", "gguf_file", "device_map", "max_memory", "variant"),
        "load",
    ),
    **dict.fromkeys(("max_completion_tokens", "logprobs", "extra_body"), "request"),
    **dict.fromkeys(("src_lang", "tgt_lang", "use_fast"), "tokenizer"),
    "enable_thinking": "chat_options",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class CheckpointOptions:
    """Of a model whose checkpoint is read here, whatever runs it.

    The tables pass through: `load` to `from_pretrained` of the model, or to vllm.LLM (quantization_config,
    attn_implementation, gguf_file, tensor_parallel_size, ...), `tokenizer` to `from_pretrained` of the
    tokenizer (src_lang, ...).
    """

    dtype: str = "auto"  # "auto": the dtype that the checkpoint states
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False  # False: safetensors only
    adapter: str | None = None  # the folder of a LoRA that runs on top of the checkpoint
    load: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    # with --engine ray
    replicas: int = 1  # actors that run this model
    resources: Mapping[str, float] = field(default_factory=dict)  # of one actor: CPU, GPU, ...


@dataclass(frozen=True, slots=True)
class TransformersOptions(CheckpointOptions):
    """Of `backend = "transformers"`."""

    threads: int | None = None  # on the CPU; None: as torch likes. For tiny models 1: more only spin


@dataclass(frozen=True, slots=True)
class VllmOptions(CheckpointOptions):
    """Of `backend = "vllm"`."""

    memory_share: float | None = None  # of its device's memory, key-value cache included


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Of `backend = "openai"`: a model of a server."""

    base_url: str = ""
    api_key_env: str | None = None  # the environment variable that holds the key
    concurrency: int | None = None  # requests under way at a time; None: found by doubling
    timeout: float = 600.0  # seconds for a whole answer
    request: Mapping[str, Any] = field(default_factory=dict)  # passes through in each request's body
    joules: Mapping[str, float] = field(default_factory=dict)  # prices: request, prompt_token, output_token
    price: Mapping[str, float] = field(default_factory=dict)  # as `joules`, in [energy] currency
    calibration: str | None = None  # a calibration.json made where the server runs


@dataclass(frozen=True, slots=True)
class PackageOptions:
    """Of a backend that an installed package adds."""

    options: Mapping[str, Any] = field(default_factory=dict)  # the package's own


Options = CheckpointOptions | ServerOptions | PackageOptions
Own = TypeVar("Own", CheckpointOptions, TransformersOptions, VllmOptions, ServerOptions, PackageOptions)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model of the zoo, as zoo.toml states it: what every backend has, and `options`, its backend's own."""

    name: str
    path: str  # a folder (absolute when it exists or is written as a path) or a hub id
    backend: str = "transformers"
    device: str = "auto"  # "cuda:N", "cpu", or "auto": accelerate places it, over several cards if need be
    max_new_tokens: int = 128
    max_prompt_tokens: int | None = None  # the user's own limit, in tokens of this model
    prompt_template: str | None = None  # contains {prompt}
    system_prompt: str | None = None
    chat_template: bool | None = None  # None: when the tokenizer has one and no prompt_template is set
    batch_size: int | None = None  # None: what the command line says, else chosen by memory
    beside: bool = False  # in memory together with the other models of its device, not in turns with them
    generation: Mapping[str, Any] = field(default_factory=dict)  # do_sample, num_beams, ...
    chat_options: Mapping[str, Any] = field(
        default_factory=dict
    )  # for the chat template: enable_thinking, ...
    options: Options | None = None  # None: the backend's defaults
    path_written: str = ""  # `path` before it was resolved against the zoo file; "" means as it is

    def own(self, kind: type[Own]) -> Own:
        """The backend's own options; the defaults where there are none of that kind."""
        return self.options if isinstance(self.options, kind) else kind()

    def fill_template(self, prompt: str) -> str:
        """The prompt in its template. Plain replacement: nothing in the prompt is interpreted."""
        return self.prompt_template.replace("{prompt}", prompt) if self.prompt_template else prompt

    def signature(self) -> dict[str, Any]:
        """What decides this model's answers, JSON-able: not where it runs, nor in which batches."""
        checkpoint, server = self.own(CheckpointOptions), self.own(ServerOptions)
        package = self.own(PackageOptions)
        return {
            "name": self.name,
            "path": self.path_written or self.path,
            "backend": self.backend,
            "revision": checkpoint.revision,
            "dtype": checkpoint.dtype,
            "adapter": None
            if checkpoint.adapter is None
            else adapter.digest(Path(checkpoint.adapter), self.name),
            "max_new_tokens": self.max_new_tokens,
            "max_prompt_tokens": self.max_prompt_tokens,
            "prompt_template": self.prompt_template,
            "system_prompt": self.system_prompt,
            "chat_template": self.chat_template,
            "load": dict(checkpoint.load),
            "tokenizer": dict(checkpoint.tokenizer),
            "generation": dict(self.generation),
            "chat_options": dict(self.chat_options),
            **({"request": dict(server.request)} if server.request else {}),
            **({"options": dict(package.options)} if package.options else {}),
        }

    @property
    def weights(self) -> Hashable:
        """What decides which weights are in memory, and where: models with equal ones run on the same.

        Their adapters, templates and limits may differ.
        """
        own = self.own(CheckpointOptions)
        stated = [
            getattr(own, name) for name in ("dtype", "revision", "trust_remote_code", "allow_pickle", "load")
        ]
        share = self.own(VllmOptions).memory_share
        return json.dumps([self.backend, self.path, self.device, share, *stated], sort_keys=True)


def signature_of_older(signature: Mapping[str, Any]) -> dict[str, Any]:
    """A model's signature as an older messcli kept it, with what that one didn't have."""
    return {"adapter": None, **signature}


def model_spec(**fields: Any) -> ModelSpec:
    """A model from fields as a [[models]] table has them, unchecked: those of its backend go to `options`."""
    kind = _OPTIONS.get(fields.get("backend", "transformers"), PackageOptions)
    own = {name: fields.pop(name) for name in [one.name for one in dataclass_fields(kind)] if name in fields}
    return ModelSpec(**fields, options=kind(**own))


_OPTIONS: dict[str, type[TransformersOptions | VllmOptions | ServerOptions | PackageOptions]] = {
    "transformers": TransformersOptions,
    "vllm": VllmOptions,
    "openai": ServerOptions,
}


@dataclass(frozen=True, slots=True)
class JudgeSpec:
    """A model that scores answers: `[judge]`."""

    model: ModelSpec
    template: str | None = None  # None: that of `messcli.models.judge`
    scale: tuple[int, int] = (1, 5)  # the worst and the best score
    twice: float = (
        0.05  # the part of its judgements that is asked for again, to see whether it agrees with itself
    )


@dataclass(frozen=True, slots=True)
class LookSpec:
    """How a larger model reads the answers of smaller ones: `[look]`."""

    check: str | None = None  # the template; None: that of `messcli.models.check`
    by: str | None = None  # the model that reads; None: the largest
    checks: bool = True  # False: answers are looked at without


@dataclass(frozen=True, slots=True)
class Zoo:
    """The models, smallest to largest, and what the zoo file promises."""

    models: tuple[ModelSpec, ...]
    alpha: float | None = None  # target mean accuracy, in [0, 1]
    metric: str | None = None
    tokenizer: str | None = None  # how a metric of words splits text; None: by script
    against: str | None = None  # what answers are compared with: "references" (None) or "largest"
    plans: Mapping[str, float] = field(default_factory=dict)  # plan name -> its own alpha
    energy: Mapping[str, Any] = field(default_factory=dict)  # what [energy] says of meters
    judge: JudgeSpec | None = None  # of `metric = "judge"`
    look: LookSpec = field(default_factory=LookSpec)
    description: str | None = None
    path: Path | None = None  # the file it was read from
    found: bool = False  # it lay in the working folder, and nobody named it: it may be a stranger's

    @property
    def names(self) -> tuple[str, ...]:
        """The models', smallest first."""
        return tuple(model.name for model in self.models)

    @property
    def largest(self) -> ModelSpec:
        """The last one listed: declared, never inferred from parameter counts."""
        return self.models[-1]

    @property
    def checkers(self) -> dict[int, int]:
        """Model -> the larger one that can read its answers."""
        if not self.look.checks:
            return {}
        reader = len(self.models) - 1 if self.look.by is None else self.names.index(self.look.by)
        return dict.fromkeys(range(reader), reader)

    @property
    def tariff(self) -> Tariff:
        """What joules and tokens cost, as the file states it."""
        stated = {name: self.energy[name] for name in _TARIFF if name in self.energy}
        prices = {m.name: m.own(ServerOptions).price for m in self.models if m.own(ServerOptions).price}
        return Tariff(**stated, per_token=prices)

    def metering(self, choice: str) -> dict[str, Any]:
        """What `open_meter` is to be told: `choice` of `--meter`, and [energy].

        Raises ZooError where a program would run that a found file names.
        """
        choice = self.energy.get("meter", choice) if choice == "auto" else choice
        command = self.energy.get("command", ())
        if command and choice == "command" and self.found:
            raise ZooError(
                f"{self.path}: was found in the working folder, and its [energy] command would run a program. If you "
                f"trust it, name it: --zoo {self.path}"
            )
        return {
            "choice": choice,
            "cpu_watts": self.energy.get("cpu_watts"),
            "command": command,
            "command_seconds": self.energy.get("command_seconds"),
        }

    def signature(self) -> dict[str, Any]:
        """What defines the members, JSON-able; two zoos with equal signatures give the same answers."""
        return {"models": [model.signature() for model in self.models]}


def find_zoo(path: str | os.PathLike[str] | None = None) -> Path:
    """The zoo file: `path`, else ./zoo.toml, else $MESSCLI_ZOO, else the bundled one.

    Raises ZooError when a file that was named does not exist.
    """
    named = os.fspath(path) if path is not None else None
    by = "--zoo"
    if named is None:
        local = Path("zoo.toml")
        if local.is_file():
            return local
        named, by = os.environ.get(ENV_ZOO) or None, ENV_ZOO
    if named is None:
        return BUNDLED_ZOO
    file = Path(named).expanduser()
    if file.is_dir():
        file = file / "zoo.toml"
    if not file.is_file():
        raise ZooError(f"{file}: no such zoo file. Correct {by}, or leave it out for the bundled zoo")
    return file


def load_zoo(path: str | os.PathLike[str] | None = None) -> Zoo:
    """Read and check a zoo file, found by `find_zoo`.

    Raises ZooError: one line that names file, table, field and cure.
    """
    file = find_zoo(path)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ZooError(f"{file}: can't be read: {error.strerror}") from error
    try:
        text = data.decode("utf-8-sig")  # -sig: some editors write a byte order mark
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ZooError(f"{file}:{line}: not UTF-8. Save the file as UTF-8") from None
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ZooError(_toml_message(file, text, str(error))) from None
    except RecursionError:
        raise ZooError(f"{file}: not valid TOML: nested too deeply") from None
    zoo = _parse(document, file)
    _check_minimize(zoo, file)
    return replace(zoo, found=path is None and file == Path("zoo.toml"))


def _toml_message(file: Path, text: str, message: str) -> str:
    where = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", message)
    if where is None:
        return f"{file}: not valid TOML: {message}"
    line = where[1] or text.rstrip().count("\n") + 1
    return f"{file}:{line}: not valid TOML: {message[: where.start()]}"


_MODEL_FIELDS: dict[str, Callable[[object], Any]] = {
    "name": values.name,
    "path": values.string,
    "backend": values.string,
    "device": values.device,
    "dtype": values.dtype,
    "max_new_tokens": values.count,
    "max_prompt_tokens": values.count,
    "prompt_template": values.template,
    "system_prompt": values.string,
    "chat_template": values.boolean,
    "revision": values.string,
    "trust_remote_code": values.boolean,
    "allow_pickle": values.boolean,
    "adapter": values.string,
    "batch_size": values.count,
    "beside": values.boolean,
    "options": values.table,
    "threads": values.count,
    "memory_share": values.positive("a share of the device's memory, above 0 and at most 1", most=1.0),
    "base_url": values.url,
    "api_key_env": values.variable,
    "concurrency": values.count,
    "timeout": values.positive("a number of seconds above 0"),
    "request": values.request,
    "joules": values.numbers("request", "prompt_token", "output_token"),
    "price": values.numbers("request", "prompt_token", "output_token"),
    "calibration": values.string,
    "replicas": values.count,
    "resources": values.numbers(),
    "load": values.without(_LOAD_OWN_FIELD),
    "tokenizer": values.without(_LOAD_OWN_FIELD),
    "generation": values.without(_GENERATION_OWN_FIELD),
    "chat_options": values.table,
}
_SLA_FIELDS: dict[str, Callable[[object], Any]] = {
    "alpha": values.alpha,
    "metric": values.string,
    "tokenizer": values.string,
    "against": values.against,
}
_ENERGY_FIELDS: dict[str, Callable[[object], Any]] = {
    "meter": values.string,
    "cpu_watts": values.positive("a number of watts above 0"),
    "price_per_kwh": values.hourly(HOURS),
    "grams_per_kwh": values.hourly(HOURS),
    "currency": values.string,
    "as_of": values.date,
    "minimize": values.one_of(JOULES, MONEY, GRAMS),
    "command": values.command,
    "command_seconds": values.positive("a number of seconds above 0"),
}
_JUDGE_FIELDS: dict[str, Callable[[object], Any]] = {
    "model": values.table,
    "template": values.string,
    "scale": values.scale,
    "twice": values.alpha,
}
_LOOK_FIELDS: dict[str, Callable[[object], Any]] = {
    "check": values.string,
    "by": values.name,
    "checks": values.boolean,
}
_TOP_LEVEL = ("sla", "models", "plans", "energy", "judge", "look", "description")


def _parse(document: Mapping[str, Any], file: Path) -> Zoo:
    for key in document:
        if key not in _TOP_LEVEL:
            # alpha and metric at the top are the commonest slip
            cure = f"put it under [sla] as `{key} = ...`" if key in _SLA_FIELDS else _suggest(key, _TOP_LEVEL)
            raise ZooError(f"{file}: unknown `{key}`: {cure}")
    tables = document.get("models", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ZooError(f"{file}: models must be tables, each headed [[models]] with two brackets")
    if not tables:
        raise ZooError(
            f"{file}: no models. Add a [[models]] table with name and path for each, smallest first"
        )

    models: list[ModelSpec] = []
    seen: set[str] = set()
    for number, table in enumerate(tables, 1):
        model = _model(table, number, file)
        if model.name in seen:
            raise ZooError(f'{file}: model "{model.name}": name: used twice. Give each model its own')
        seen.add(model.name)
        models.append(model)

    models = _with_memory_shares(models)
    sla = _fields(document.get("sla", {}), _SLA_FIELDS, f"{file}: [sla]")
    plans = _sub_table(document.get("plans", {}), f"{file}: [plans]")
    description = document.get("description")
    if description is not None and not isinstance(description, str):
        raise ZooError(f"{file}: description: must be a string in quotes, not {shown(description)}")
    return Zoo(
        models=tuple(models),
        alpha=sla.get("alpha"),
        metric=sla.get("metric"),
        tokenizer=sla.get("tokenizer"),
        against=sla.get("against"),
        plans={
            name: _checked(values.alpha, alpha, f"{file}: [plans]: {name}") for name, alpha in plans.items()
        },
        energy=_fields(document.get("energy", {}), _ENERGY_FIELDS, f"{file}: [energy]"),
        judge=_judge(document["judge"], file) if "judge" in document else None,
        look=_look(document.get("look", {}), [model.name for model in models], file),
        description=description,
        path=file,
    )


def _check_minimize(zoo: Zoo, file: Path) -> None:
    """What is to be saved has to be stated."""
    tariff = zoo.tariff
    if tariff.minimize == GRAMS and not tariff.grams_per_kwh:
        raise ZooError(f'{file}: [energy]: minimize = "grams": state grams_per_kwh')
    unpaid = [name for name in zoo.names if name not in tariff.per_token]
    if tariff.minimize == MONEY and unpaid and not sum(tariff.price_per_kwh):
        raise ZooError(
            f'{file}: [energy]: minimize = "money": state price_per_kwh, above 0, which model "{unpaid[0]}" is paid by'
        )


def _with_memory_shares(models: list[ModelSpec]) -> list[ModelSpec]:
    """How much of its device's memory an engine takes up front, where zoo.toml doesn't say.

    Engines that take turns get nearly all of it; those beside each other, equal parts of what the others leave.
    """
    engines = [model for model in models if model.backend == "vllm"]
    taken, unsaid = defaultdict[str, float](float), defaultdict[str, int](int)
    for model in {
        model.weights: model for model in engines
    }.values():  # models on the same weights have one engine
        share = model.own(VllmOptions).memory_share
        if model.beside:
            taken[model.device] += share or 0.0
            unsaid[model.device] += share is None

    def shared(model: ModelSpec) -> ModelSpec:
        own = model.own(VllmOptions)
        if model not in engines or own.memory_share is not None:
            return model
        left = _ENGINES_SHARE
        if model.beside:
            left = max(0.01, (_ENGINES_SHARE - taken[model.device]) / unsaid[model.device])
        return replace(model, options=replace(own, memory_share=left))

    return [shared(model) for model in models]


def _judge(table: object, file: Path) -> JudgeSpec:
    fields = _fields(table, _JUDGE_FIELDS, f"{file}: [judge]")
    if "model" not in fields:
        raise ZooError(f"{file}: [judge]: no model. Add a table [judge.model] with name and path")
    return JudgeSpec(**{**fields, "model": _model({"max_new_tokens": 8, **fields["model"]}, 0, file)})


def _look(table: object, names: Sequence[str], file: Path) -> LookSpec:
    look = LookSpec(**_fields(table, _LOOK_FIELDS, f"{file}: [look]"))
    if look.by is not None and look.by not in names:
        raise ZooError(f"{file}: [look]: by: no model {shown(look.by)}. Models are {', '.join(names)}")
    for field_name in ("{request}", "{answer}"):
        if look.check is not None and field_name not in look.check:
            raise ZooError(f"{file}: [look]: check: must contain {field_name}, which is put there")
    return look


def _model(table: Mapping[str, Any], number: int, file: Path) -> ModelSpec:
    name = table.get("name")
    where = f'{file}: model "{name}"' if values.is_name(name) else f"{file}: model {number}"
    fields = _fields(table, _MODEL_FIELDS, where)
    for required in ("name", "path"):
        if required not in fields:
            raise ZooError(f"{where}: {required}: missing. Every [[models]] table needs name and path")
    written = fields.pop("path")
    backend = fields.get("backend", "transformers")
    _refuse_options_of_others(fields, backend, where)
    served = backend == "openai"
    if served and "base_url" not in fields:
        raise ZooError(
            f"{where}: base_url: missing. Say where the server is, such as http://localhost:8000/v1"
        )
    for name in ("calibration", "adapter"):  # a file's, a folder's
        if name in fields:
            fields[name] = os.fspath(file.parent / Path(fields[name]).expanduser())
    path = written if served else _resolve(written, file)  # a server's name for a model is no path of ours
    return model_spec(**fields, path=path, path_written=written)


def _refuse_options_of_others(fields: Mapping[str, Any], backend: str, where: str) -> None:
    """An option that a model's backend doesn't have would do nothing, unsaid."""
    kinds = {**_OPTIONS, backend: _OPTIONS.get(backend, PackageOptions)}
    known = {name: {one.name for one in dataclass_fields(kind)} for name, kind in kinds.items()}
    common = {one.name for one in dataclass_fields(ModelSpec)} - {"options"}
    for name in fields:
        if name in common or name in known[backend]:
            continue
        owners = [f'"{other}"' for other, names in known.items() if name in names]
        if not owners:  # `options` itself
            raise ZooError(f"{where}: {name}: only a backend of an installed package has one. Remove it")
        raise ZooError(
            f"{where}: {name}: only a model with backend = {' or '.join(owners)} has one. Remove it"
        )


def _resolve(written: str, file: Path) -> str:
    """A folder's path, absolute, or the hub id as it is.

    What can't be a hub id is a folder even when it does not exist: a typo is told as a missing folder.
    """
    path = Path(written).expanduser()
    beside = file.parent / path  # an absolute path stays itself
    is_path = written.startswith(("./", "../", "~", "/")) or path.is_absolute() or written in (".", "..")
    if is_path or beside.exists() or _HUB_ID.fullmatch(written) is None:
        return os.path.abspath(beside)  # noqa: PTH100  # resolve() follows links
    return written


def _fields(table: object, known: Mapping[str, Callable[[object], Any]], where: str) -> dict[str, Any]:
    read: dict[str, Any] = {}
    for key, value in _sub_table(table, where).items():
        if key not in known:
            home = _BELONGS_IN.get(key) if known is _MODEL_FIELDS else None
            cure = f"put it under [models.{home}]" if home else _suggest(key, known)
            raise ZooError(f"{where}: unknown field `{key}`: {cure}")
        read[key] = _checked(known[key], value, f"{where}: {key}")
    return read


def _sub_table(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ZooError(f"{where}: must be a table, not {shown(value)}")
    return value


def _checked(check: Callable[[object], Any], value: object, where: str) -> Any:
    try:
        return check(value)
    except values.BadValue as bad:
        raise ZooError(f"{where}: {bad}") from None


def _suggest(word: str, known: Mapping[str, object] | tuple[str, ...]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean `{close[0]}`?" if close else f"known are {', '.join(known)}"

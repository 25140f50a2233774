"""The zoo file: which models there are, smallest first, and what is promised.

Knows the format of zoo.toml; loads no model, reads no weights and asks no hub.
"""

from __future__ import annotations

import datetime
import difflib
import math
import os
import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from messcli.errors import ZooError, shown
from messcli.tariff import HOURS, Tariff

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENV_ZOO = "MESSCLI_ZOO"
BUNDLED_ZOO = Path(__file__).parent / "bundled" / "zoo.toml"

DTYPES = ("auto", "float32", "float16", "bfloat16", "float64")
_DTYPE_NICKNAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "half": "float16"}
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
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
_TARIFF = ("price_per_kwh", "grams_per_kwh", "currency", "as_of")
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
class ModelSpec:
    """One model of the zoo, as zoo.toml states it.

    The tables pass through to transformers: `load` to `from_pretrained` of the model (quantization_config,
    attn_implementation, gguf_file, ...), `tokenizer` to `from_pretrained` of the tokenizer (src_lang, ...),
    `generation` to `generate` (do_sample, num_beams, ...), `chat_options` to the chat template
    (enable_thinking, ...).
    """

    name: str
    path: str  # a folder (absolute when it exists or is written as a path) or a hub id
    backend: str = "transformers"
    device: str = "auto"  # "cuda:N", "cpu", or "auto": accelerate places it, over several cards if need be
    dtype: str = "auto"  # "auto": the dtype that the checkpoint states
    max_new_tokens: int = 128
    max_prompt_tokens: int | None = None  # the user's own limit, in tokens of this model
    prompt_template: str | None = None  # contains {prompt}
    system_prompt: str | None = None
    chat_template: bool | None = None  # None: when the tokenizer has one and no prompt_template is set
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False  # False: safetensors only
    batch_size: int | None = None  # None: what the command line says, else chosen by memory
    threads: int | None = None  # on the CPU; None: as torch likes. For tiny models 1: more only spin
    memory_share: float | None = None  # vllm: of its device's memory, key-value cache included
    base_url: str | None = None  # openai: where the server is; `path` is the model's name there
    api_key_env: str | None = None  # openai: the environment variable that holds the key
    concurrency: int | None = None  # openai: requests under way at a time; None: found by doubling
    timeout: float = 600.0  # openai: seconds for a whole answer
    request: Mapping[str, Any] = field(default_factory=dict)  # openai: passed through in each request's body
    joules: Mapping[str, float] = field(default_factory=dict)  # openai: request, prompt_token, output_token
    price: Mapping[str, float] = field(default_factory=dict)  # openai: as `joules`, in [energy] currency
    calibration: str | None = None  # openai: a calibration.json made where the server runs
    replicas: int = 1  # --engine ray: actors that run this model
    resources: Mapping[str, float] = field(default_factory=dict)  # --engine ray: of one actor: CPU, GPU, ...
    load: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    chat_options: Mapping[str, Any] = field(default_factory=dict)
    path_written: str = ""  # `path` before it was resolved against the zoo file; "" means as it is

    def fill_template(self, prompt: str) -> str:
        """The prompt in its template. Plain replacement: nothing in the prompt is interpreted."""
        return self.prompt_template.replace("{prompt}", prompt) if self.prompt_template else prompt

    def signature(self) -> dict[str, Any]:
        """What decides this model's answers, JSON-able: not where it runs, nor in which batches."""
        return {
            "name": self.name,
            "path": self.path_written or self.path,
            "backend": self.backend,
            "revision": self.revision,
            "dtype": self.dtype,
            "max_new_tokens": self.max_new_tokens,
            "max_prompt_tokens": self.max_prompt_tokens,
            "prompt_template": self.prompt_template,
            "system_prompt": self.system_prompt,
            "chat_template": self.chat_template,
            "load": dict(self.load),
            "tokenizer": dict(self.tokenizer),
            "generation": dict(self.generation),
            "chat_options": dict(self.chat_options),
            **({"request": dict(self.request)} if self.request else {}),
        }


@dataclass(frozen=True, slots=True)
class Zoo:
    """The models, smallest to largest, and what the zoo file promises."""

    models: tuple[ModelSpec, ...]
    alpha: float | None = None  # target mean accuracy, in [0, 1]
    metric: str | None = None
    tokenizer: str | None = None  # how a metric of words splits text; None: by script
    plans: Mapping[str, float] = field(default_factory=dict)  # plan name -> its own alpha
    energy: Mapping[str, Any] = field(default_factory=dict)  # what [energy] says of meters
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
    def tariff(self) -> Tariff:
        """What joules and tokens cost, as the file states it."""
        stated = {name: self.energy[name] for name in _TARIFF if name in self.energy}
        return Tariff(**stated, per_token={model.name: model.price for model in self.models if model.price})

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
    zoo = _parse(document, file)
    return replace(zoo, found=path is None and file == Path("zoo.toml"))


def _toml_message(file: Path, text: str, message: str) -> str:
    where = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", message)
    if where is None:
        return f"{file}: not valid TOML: {message}"
    line = where[1] or text.rstrip().count("\n") + 1
    return f"{file}:{line}: not valid TOML: {message[: where.start()]}"


# --- checks of single values: each returns the value or raises _Bad, whose text ends the message ---


class _BadValue(Exception):
    """What is wrong with a value, for the end of a message that names its place."""


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise _BadValue(f"must be a string in quotes, not {shown(value)}")
    if not value.strip():
        raise _BadValue("must not be empty")
    return value


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value) and value.isprintable() and value == value.strip()


def _name(value: object) -> str:
    text = _string(value)
    if not _is_name(text):
        raise _BadValue(f"must be printable, without spaces around it, not {shown(text)}")
    return text


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise _BadValue(f"must be true or false, not {shown(value)}")
    return value


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _BadValue(f"must be a whole number of at least 1, not {shown(value)}")
    return value


def _alpha(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _BadValue(f"must be a number from 0 to 1, not {shown(value)}")
    if not 0 <= value <= 1:  # false for NaN too
        hint = f"; did you mean {value / 100:g}?" if 1 < value <= 100 else ""
        raise _BadValue(f"must be from 0 to 1, not {value:g}{hint}")
    return float(value)


def _positive(what: str, most: float = sys.float_info.max) -> Callable[[object], float]:
    """A number above 0 and up to `most`, which is `what`."""

    def check(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most:
            raise _BadValue(f"must be {what}, not {shown(value)}")
        return float(value)

    return check


def _url(value: object) -> str:
    text = _string(value)
    if re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", text) is None:
        raise _BadValue(
            f"must be a URL such as http://localhost:8000/v1, without key or password, not {shown(text)}"
        )
    return text


def _variable(value: object) -> str:
    text = _string(value)
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text) is None:
        raise _BadValue("must be the name of an environment variable. The key itself has no place in a file")
    return text


def _numbers(*known: str) -> Callable[[object], dict[str, float]]:
    """A table of numbers of at least 0, not all of them 0; of any names where none are given."""

    def check(value: object) -> dict[str, float]:
        table = _table(value)
        for key, number in table.items():
            if known and key not in known:
                raise _BadValue(f"holds {key}: known are {', '.join(known)}")
            if isinstance(number, bool) or not isinstance(number, (int, float)) or number < 0:
                raise _BadValue(f"holds {key} = {shown(number)}: must be a number of at least 0")
        if known and not any(table.values()):
            raise _BadValue("must have a number above 0")
        return {key: float(number) for key, number in table.items()}

    return check


def _command(value: object) -> tuple[str, ...]:
    try:
        words = shlex.split(value) if isinstance(value, str) else value
    except ValueError as error:  # a quote that isn't closed
        raise _BadValue(f"is no command: {error}, in {shown(value)}") from None
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise _BadValue(f'must be a command, such as "read-joules --plug 3", not {shown(value)}')
    return tuple(words)


def _hourly(value: object) -> tuple[float, ...]:
    values: list[Any] = value if isinstance(value, list) else [value]
    for one in values:
        if isinstance(one, bool) or not isinstance(one, (int, float)) or not 0 <= one < math.inf:
            raise _BadValue(f"holds {shown(one)}: must be a number of at least 0, or 24 of them, one an hour")
    if len(values) not in (1, HOURS):
        raise _BadValue(f"has {len(values)} numbers: give one, or 24, for the hours of the day")
    return tuple(float(one) for one in values)


def _date(value: object) -> str:
    if isinstance(value, datetime.date):
        return value.isoformat()
    return _string(value)


def _device(value: object) -> str:
    text = _string(value)
    if _DEVICE.fullmatch(text) is None:
        raise _BadValue(f'must be "cpu", "cuda:N" or "auto", not {shown(text)}')
    return "cuda:0" if text == "cuda" else text


def _dtype(value: object) -> str:
    text = _string(value).removeprefix("torch.")
    if text not in DTYPES:
        cure = _DTYPE_NICKNAMES.get(text)
        hint = f'; write "{cure}"' if cure else ""
        raise _BadValue(f'must be one of {", ".join(DTYPES)}, not "{text}"{hint}')
    return text


def _template(value: object) -> str:
    text = _string(value)
    if "{prompt}" not in text:
        raise _BadValue("must contain {prompt}, where the request's prompt goes")
    return text


def _table(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _BadValue(f"must be a table, not {shown(value)}")
    _check_plain(value)
    return value


def _check_plain(value: object) -> None:
    """Dates and NaN are TOML but not JSON, and no option takes them."""
    if isinstance(value, dict):
        for item in value.values():
            _check_plain(item)
    elif isinstance(value, list):
        for item in value:
            _check_plain(item)
    elif not isinstance(value, (str, int, float)) or (isinstance(value, float) and not math.isfinite(value)):
        raise _BadValue(
            f"holds {shown(value)}: options are text, finite numbers, true, false, lists and tables"
        )


def _request(value: object) -> dict[str, Any]:
    table = _table(value)
    for key in ("model", "messages", "prompt", "stream", "n"):
        if key in table:
            raise _BadValue(f"must not hold {key}: messcli sets it itself")
    omitted = table.get("omit", [])
    if not isinstance(omitted, list) or not all(isinstance(name, str) for name in omitted):
        raise _BadValue(
            'holds omit: must be a list of the options that aren\'t sent, such as ["temperature"]'
        )
    return table


def _without(own_fields: Mapping[str, str]) -> Callable[[object], dict[str, Any]]:
    def check(value: object) -> dict[str, Any]:
        table = _table(value)
        for key in table:
            if key in own_fields:
                raise _BadValue(f"must not hold {key}: set `{own_fields[key]}` on the model itself")
        return table

    return check


_MODEL_FIELDS: dict[str, Callable[[object], Any]] = {
    "name": _name,
    "path": _string,
    "backend": _string,
    "device": _device,
    "dtype": _dtype,
    "max_new_tokens": _count,
    "max_prompt_tokens": _count,
    "prompt_template": _template,
    "system_prompt": _string,
    "chat_template": _boolean,
    "revision": _string,
    "trust_remote_code": _boolean,
    "allow_pickle": _boolean,
    "batch_size": _count,
    "threads": _count,
    "memory_share": _positive("a share of the device's memory, above 0 and at most 1", most=1.0),
    "base_url": _url,
    "api_key_env": _variable,
    "concurrency": _count,
    "timeout": _positive("a number of seconds above 0"),
    "request": _request,
    "joules": _numbers("request", "prompt_token", "output_token"),
    "price": _numbers("request", "prompt_token", "output_token"),
    "calibration": _string,
    "replicas": _count,
    "resources": _numbers(),
    "load": _without(_LOAD_OWN_FIELD),
    "tokenizer": _without(_LOAD_OWN_FIELD),
    "generation": _without(_GENERATION_OWN_FIELD),
    "chat_options": _table,
}
_SERVED_FIELDS = {
    "base_url",
    "api_key_env",
    "concurrency",
    "timeout",
    "request",
    "joules",
    "price",
    "calibration",
}
_SLA_FIELDS: dict[str, Callable[[object], Any]] = {"alpha": _alpha, "metric": _string, "tokenizer": _string}
_ENERGY_FIELDS: dict[str, Callable[[object], Any]] = {
    "meter": _string,
    "cpu_watts": _positive("a number of watts above 0"),
    "price_per_kwh": _hourly,
    "grams_per_kwh": _hourly,
    "currency": _string,
    "as_of": _date,
    "command": _command,
    "command_seconds": _positive("a number of seconds above 0"),
}
_TOP_LEVEL = ("sla", "models", "plans", "energy", "description")


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
        plans={name: _checked(_alpha, alpha, f"{file}: [plans]: {name}") for name, alpha in plans.items()},
        energy=_fields(document.get("energy", {}), _ENERGY_FIELDS, f"{file}: [energy]"),
        description=description,
        path=file,
    )


def _with_memory_shares(models: list[ModelSpec]) -> list[ModelSpec]:
    """Engines that take their memory up front get equal parts of what the others on their device leave."""
    engines = [model for model in models if model.backend == "vllm"]
    taken, unsaid = defaultdict[str, float](float), defaultdict[str, int](int)
    for model in engines:
        taken[model.device] += model.memory_share or 0.0
        unsaid[model.device] += model.memory_share is None
    return [
        replace(model, memory_share=max(0.01, (_ENGINES_SHARE - taken[model.device]) / unsaid[model.device]))
        if model in engines and model.memory_share is None
        else model
        for model in models
    ]


def _model(table: Mapping[str, Any], number: int, file: Path) -> ModelSpec:
    name = table.get("name")
    where = f'{file}: model "{name}"' if _is_name(name) else f"{file}: model {number}"
    fields = _fields(table, _MODEL_FIELDS, where)
    for required in ("name", "path"):
        if required not in fields:
            raise ZooError(f"{where}: {required}: missing. Every [[models]] table needs name and path")
    written = fields.pop("path")
    served = fields.get("backend") == "openai"
    if served and "base_url" not in fields:
        raise ZooError(
            f"{where}: base_url: missing. Say where the server is, such as http://localhost:8000/v1"
        )
    if not served and (needless := sorted(_SERVED_FIELDS & fields.keys())):
        raise ZooError(f'{where}: {needless[0]}: only a model with backend = "openai" has one. Remove it')
    if "calibration" in fields:
        fields["calibration"] = os.fspath(file.parent / Path(fields["calibration"]).expanduser())
    path = written if served else _resolve(written, file)  # a server's name for a model is no path of ours
    return ModelSpec(**fields, path=path, path_written=written)


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
    values: dict[str, Any] = {}
    for key, value in _sub_table(table, where).items():
        if key not in known:
            home = _BELONGS_IN.get(key) if known is _MODEL_FIELDS else None
            cure = f"put it under [models.{home}]" if home else _suggest(key, known)
            raise ZooError(f"{where}: unknown field `{key}`: {cure}")
        values[key] = _checked(known[key], value, f"{where}: {key}")
    return values


def _sub_table(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ZooError(f"{where}: must be a table, not {shown(value)}")
    return value


def _checked(check: Callable[[object], Any], value: object, where: str) -> Any:
    try:
        return check(value)
    except _BadValue as bad:
        raise ZooError(f"{where}: {bad}") from None


def _suggest(word: str, known: Mapping[str, object] | tuple[str, ...]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean `{close[0]}`?" if close else f"known are {', '.join(known)}"

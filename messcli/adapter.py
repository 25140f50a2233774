"""LoRA adapters: a folder as PEFT writes it, read without PEFT and without weights in memory.

Only what is LoRA over a checkpoint's own layers is taken, out of safetensors: no pickle, no module of another package
that a settings file names, nothing of the hub. Knows the folder; what runs it is a backend's.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from messcli.amounts import is_amount
from messcli.errors import ZooError, shown

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MERGE = "Merge it into a checkpoint of its own (PEFT's merge_and_unload), and give that as path"
_PARTS = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\."
    r"(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.weight)?"
)
# settings of PEFT's LoraConfig that decide what the weights mean
_MEANING = ("r", "lora_alpha", "use_rslora", "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern")
# those that training or PEFT's own bookkeeping needs, and an answer doesn't; which layers are adapted, the weights say
_NO_MATTER = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "init_lora_weights", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config", "megatron_core",
    "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
# starts that leave the base's weights as they were; PiSSA, OLoRA, CorDA and LoftQ train on others
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Adapter:
    """What an adapter's two files say. `layers`: module of the base -> part of LoRA -> shape."""

    folder: Path
    base: str | None  # what it was trained on, as its maker called it
    meaning: Mapping[str, Any]  # arguments of PEFT's LoraConfig
    layers: Mapping[str, Mapping[str, Shape]]
    where: str  # of messages: the model and the field of zoo.toml

    @property
    def rank(self) -> int:
        """The highest of its layers'."""
        parts = (
            shapes.get("lora_A", shapes.get("lora_embedding_A", (0,))) for shapes in self.layers.values()
        )
        return max(shape[0] for shape in parts)

    def error(self, what: str, cure: str) -> ZooError:
        return ZooError(f"{self.where}: {self.folder}: {what}. {cure}")

    def check(self, shape_of: Callable[[str], Shape | None]) -> None:
        """Raises ZooError where it isn't one for a base. `shape_of` a layer: (out, in), or None: there is no such."""
        trained = f' (it was trained on "{self.base}")' if self.base else ""
        cure = f"Give the adapter's own base as path{trained}, or another adapter"
        for module, parts in self.layers.items():
            base = shape_of(module)
            if base is None:
                raise self.error(f"is for another base: this one has no {module}", cure)
            for part, (across, along) in _WIDTHS.items():
                shape = parts.get(part)
                if shape is not None and len(base) == 2 and (found := shape[along]) != base[across]:
                    what = f"{module}.{part} is made for {found} numbers, and the layer has {base[across]}"
                    raise self.error(f"is for another base: {what}", cure)

    def check_files(self, base: Path) -> None:
        """`check` against a checkpoint's folder, as far as the headers of its files tell. Raises ZooError."""
        shapes = tensor_shapes(sorted(base.glob("*.safetensors")))
        transposed = bool(self.meaning.get("fan_in_fan_out"))  # GPT-2's weights are (in, out)
        known = {module: shapes[name] for module in self.layers if (name := f"{module}.weight") in shapes}
        if not known or _is_quantized(
            base
        ):  # files may name layers otherwise, and a quantized one packs its numbers
            return
        self.check(lambda module: known[module][:: -1 if transposed else 1] if module in known else None)


# part -> (dimension of the layer's weight, dimension of the part's) that are equal
_WIDTHS = {"lora_A": (1, 1), "lora_B": (0, 0), "lora_embedding_A": (0, 1), "lora_embedding_B": (1, 0)}


def read_adapter(folder: Path, model: str) -> Adapter:
    """The adapter in `folder`, of the zoo's `model`.

    Raises ZooError naming the field and the cure: a file that is missing or broken, pickled weights, another method
    than LoRA, parts that aren't LoRA.
    """
    where = f'model "{model}": adapter'

    def error(what: str, cure: str) -> ZooError:
        return ZooError(f"{where}: {folder}: {what}. {cure}")

    if not folder.is_dir():
        raise error(
            "there is no such folder", "Correct adapter in the zoo file: a folder, written by save_pretrained"
        )
    if not (folder / SETTINGS).is_file():
        raise error(f"the folder has no {SETTINGS}", "Give a folder that PEFT's save_pretrained wrote")
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").exists()
        why = " (adapter_model.bin is a pickle: loading it can run code)" if pickled else ""
        raise error(f"the folder has no {WEIGHTS}{why}", "Save the adapter as safetensors")
    try:
        settings = json.loads((folder / SETTINGS).read_bytes())
        if not isinstance(settings, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError, RecursionError) as bad:
        raise error(f"{SETTINGS} can't be read: {bad}", "Save the adapter anew") from bad
    if settings.get("peft_type") != "LORA":
        raise error(f"is {shown(settings.get('peft_type'))}, and messcli runs LORA", _MERGE)
    _check_settings(settings, error)
    base = settings.get("base_model_name_or_path")
    return Adapter(
        folder,
        base if isinstance(base, str) and base else None,
        {name: settings[name] for name in _MEANING if settings.get(name) is not None},
        _layers(folder / WEIGHTS, error),
        where,
    )


def _check_settings(settings: Mapping[str, Any], error: Callable[[str, str], ZooError]) -> None:
    if settings.get("init_lora_weights") not in _PLAIN_STARTS:
        start = shown(settings["init_lora_weights"])
        raise error(f"was trained on changed weights of its base (init_lora_weights = {start})", _MERGE)
    for name, value in settings.items():
        if name not in _NO_MATTER and name not in _MEANING and value and value != "none":
            raise error(f"has {name}, which isn't LoRA over a checkpoint's own layers", _MERGE)
    for name in ("r", "lora_alpha"):
        value = settings.get(name)
        if not is_amount(value) or not value:
            raise error(f"{SETTINGS} has {name} = {shown(value)}", "Save the adapter anew")


def _layers(file: Path, error: Callable[[str, str], ZooError]) -> dict[str, dict[str, Shape]]:
    layers: dict[str, dict[str, Shape]] = {}
    shapes = tensor_shapes([file])
    if not shapes:
        raise error(f"{WEIGHTS} is no safetensors file, or is empty", "Save the adapter anew")
    for name, shape in shapes.items():
        found = _PARTS.fullmatch(name)
        if found is None:
            raise error(f"{WEIGHTS} holds {name}, which isn't LoRA over a checkpoint's own layers", _MERGE)
        layers.setdefault(found["module"], {})[found["part"]] = shape
    return layers


def _is_quantized(base: Path) -> bool:
    try:
        return b'"quantization_config"' in (base / "config.json").read_bytes()
    except OSError:
        return False


def tensor_shapes(files: Sequence[Path]) -> dict[str, Shape]:
    """Name -> shape of what safetensors files hold, by their headers; {} where one can't be read."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, Shape] = {}
    try:
        for file in files:
            with safe_open(file, framework="numpy") as held:
                shapes.update((name, tuple(held.get_slice(name).get_shape())) for name in held.keys())  # noqa: SIM118  # it is no mapping
    except (OSError, SafetensorError):
        return {}
    return shapes


def digest(folder: Path, model: str) -> str:
    """Of the adapter's two files: another digest is another adapter. Raises as `read_adapter`."""
    files = [folder / SETTINGS, folder / WEIGHTS]
    try:
        stats = [file.stat() for file in files]
    except OSError:
        read_adapter(folder, model)  # which says what is missing
        raise
    return _digest(tuple(files), tuple((stat.st_mtime_ns, stat.st_size) for stat in stats))


@lru_cache(maxsize=64)
def _digest(files: Sequence[Path], _: object) -> str:
    made = hashlib.blake2b(digest_size=16)
    for file in files:
        with file.open("rb") as handle:
            while part := handle.read(2**22):
                made.update(part)
        made.update(b"\0")
    return made.hexdigest()

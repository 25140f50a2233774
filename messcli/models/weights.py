"""A checkpoint's weights in memory, once for all models of a zoo that run on them: settings differ, LoRAs differ.

Knows transformers' model and PEFT; nothing of prompts and answers.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil  # type: ignore[import-untyped]  # carries no types
import torch

from messcli.adapter import WEIGHTS, Adapter
from messcli.errors import ModelError, first_line

INSTALL = "pip install 'messcli[lora]'"


_UNKNOWN = ""  # which adapter is active, after one was put on or taken off


class Weights:
    """Transformers' model, and the LoRAs on top of it. Who holds it last lets it go.

    Models that run on it take turns: which LoRA is active is a state of the whole model.
    """

    def __init__(self) -> None:
        self.model: Any = None  # None: not loaded, or parked
        self.defaults: Any = None  # the checkpoint's own generation options
        self.parked: tuple[Any, str] | None = None  # the model in this host's memory, and its card
        self._holders: set[str] = set()
        self._tuner: Any = None  # PEFT's, over all adapters of the model
        self._attached: dict[str, str] = {}  # model -> its adapter's name in PEFT; several may have the same
        self._active: str | None = None  # adapter
        self._lock = threading.RLock()

    def put(self, model: Any) -> None:
        """Take what was loaded."""
        self.model, self.defaults = model, copy.deepcopy(model.generation_config)

    def hold(self, name: str) -> None:
        """The model `name` runs on this from now on."""
        self._holders.add(name)

    def release(self, name: str) -> bool:
        """The model `name` doesn't any more. True: nobody does, and the weights are gone."""
        self._holders.discard(name)
        if self._holders:
            if name in self._attached:
                self._detach(name)
            return False
        self.drop()
        return True

    def drop(self) -> None:
        self.model = self.parked = self.defaults = None
        self._tuner, self._attached, self._active = None, {}, None

    def has(self, name: str) -> bool:
        """Whether the adapter of the model `name` lies on top."""
        return name in self._attached

    def attach(self, name: str, adapter: Adapter) -> None:
        """Put the model `name`'s adapter on top. Raises ModelError and ZooError naming the field and the cure."""
        own = _name_of(adapter)
        if own not in self._attached.values():
            self._put_on_top(own, adapter)
        self._attached[name] = own

    def _put_on_top(self, own: str, adapter: Adapter) -> None:
        adapter.check(self._shape_of)
        try:
            from peft import LoraConfig, LoraModel, set_peft_model_state_dict
            from safetensors.torch import load_file
        except ImportError as error:
            raise ModelError(
                f"{adapter.where}: needs PEFT, which isn't installed ({error}). {INSTALL}"
            ) from error
        settings = LoraConfig(
            **adapter.meaning,
            target_modules=sorted(adapter.layers),
            init_lora_weights=False,
            inference_mode=True,
        )
        self._active = _UNKNOWN
        try:
            if self._tuner is None:
                self._tuner = LoraModel(self.model, settings, own)  # in place
            else:
                self._tuner.peft_config[own] = settings
                self._tuner.inject_adapter(self.model, own)
            found: Any = set_peft_model_state_dict(
                self.model, load_file(adapter.folder / WEIGHTS), adapter_name=own
            )
            self.model.eval()
        except Exception as error:  # a rank that its settings contradict, a layer that PEFT can't adapt
            self._take_off(own)
            raise adapter.error(
                f"can't be put on top of its base: {first_line(error)}", "Check it, or merge it into its base"
            ) from error
        lost = [*found.unexpected_keys, *(key for key in found.missing_keys if own in key.split("."))]
        if lost:
            self._take_off(own)
            raise adapter.error(f"doesn't match its own settings ({lost[0]})", "Save the adapter anew")

    def _detach(self, name: str) -> None:
        own = self._attached.pop(name)
        if own not in self._attached.values():
            self._take_off(own)

    def _take_off(self, own: str) -> None:
        if self._tuner is None:
            self.drop()  # PEFT has changed some of its layers; they are read anew
        elif own in self._tuner.peft_config:
            self._tuner.delete_adapter(own)
        self._active = _UNKNOWN  # PEFT activates another one

    def _shape_of(self, module: str) -> tuple[int, ...] | None:
        """(out, in) of a layer; as its own attributes say, for a quantized one packs its numbers."""
        try:
            layer = self.model.get_submodule(module)
        except AttributeError:
            return None
        layer = getattr(layer, "base_layer", layer)  # another adapter's
        if hasattr(layer, "in_features"):
            return int(layer.out_features), int(layer.in_features)
        weight = getattr(layer, "weight", None)
        if weight is None:
            return None
        shape = tuple(weight.shape)
        return shape[::-1] if type(layer).__name__ == "Conv1D" else shape  # GPT-2's are (in, out)

    @contextmanager
    def use(self, name: str, options: Any) -> Iterator[Any]:
        """The model with the adapter of `name`, where it has one, and none else; for one thread at a time.

        `options`: generate() fills what is None in a call's from the model's own, sampling temperature included.
        """
        with self._lock:
            self._activate(self._attached.get(name))
            self.model.generation_config = options
            yield self.model

    def _activate(self, own: str | None) -> None:
        if self._tuner is None or own == self._active:
            return
        if own is None:
            self._tuner.disable_adapter_layers()
        else:
            self._tuner.enable_adapter_layers()
            self._tuner.set_adapter(own)
        self._active = own

    # --- suspending ---

    def suspend(self, devices: tuple[str, ...]) -> bool:
        """Move the weights from one card into this host's memory. False: they can't be, or there is no room."""
        if self.model is None:
            return self.parked is not None
        model = self.model
        cards = [device for device in devices if device != "cpu"]
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        movable = len(cards) == 1 and len(devices) == 1 and not getattr(model, "is_quantized", False)
        if not movable or size > psutil.virtual_memory().available:
            return False
        self.parked, self.model = (model.to("cpu"), cards[0]), None
        free_memory()
        return True

    def unpark(self) -> None:
        """Back to the card. Whatever torch raises leaves them parked."""
        assert self.parked is not None  # noqa: S101  # the caller has looked
        model, card = self.parked
        try:
            self.model, self.parked = model.to(card), None
        except Exception:
            model.to("cpu")
            raise


def _name_of(adapter: Adapter) -> str:
    """An adapter's in PEFT, which takes no dots in a name."""
    return "lora" + hashlib.blake2b(str(adapter.folder).encode(), digest_size=8).hexdigest()


def free_memory(*, collect: bool = True) -> None:
    """Give torch's free blocks back to the device; `collect`: models that are held by a cycle first."""
    if collect:
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

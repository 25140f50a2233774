"""Three models without weights behind the real Backend protocol, and a zoo file of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from messcli.errors import ModelError
from messcli.models.backend import InBatches
from messcli.records import Generation, Request
from messcli.registry import BACKENDS
from messcli.zoo import ModelSpec

SKILLS = {"small": 3, "medium": 6, "large": 9}  # the longest prompt, in words, that a model gets right
WORDS = ("apple", "bird", "cloud", "door", "egg", "fire", "glass", "hill", "ink")


class FakeBackend(InBatches):
    """Repeats a prompt that isn't too long for it, and says "?" to others."""

    fail_after: ClassVar[int | None] = None  # calls until every model breaks
    calls: ClassVar[int] = 0

    def __init__(self, spec: ModelSpec, *, batch_size: int | None) -> None:
        self.spec = spec
        self.devices = ("cpu",)
        self.loaded = False
        self.occupies_memory = True
        self.context_length = 40 if spec.name != "small" else 20
        self._batch_size = batch_size or 4

    def load(self) -> None:
        self.loaded = True

    def unload(self) -> None:
        self.loaded = False

    def prompt_tokens(self, request: Request) -> int:
        return len(request.prompt.split())

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        indices = range(len(requests))
        return [list(indices[k : k + self._batch_size]) for k in indices[:: self._batch_size]]

    def generate(self, batch: Sequence[Request]) -> list[Generation]:
        cls = type(self)
        cls.calls += 1
        if cls.fail_after is not None and cls.calls > cls.fail_after:
            raise ModelError(f'model "{self.spec.name}": broke. Mend it')
        return [self._generation(request) for request in batch]

    def _generation(self, request: Request) -> Generation:
        words = request.prompt.split()
        if words[0] == "poison" and self.spec.name == "medium":
            return Generation(None, len(words), 0, error="the model choked")
        right = len(words) <= SKILLS[self.spec.name]
        return Generation(request.prompt if right else "?", len(words), len(words))


def write_zoo(folder: Path, monkeypatch, alpha: float = 0.7) -> Path:
    """A zoo.toml of the three, whose backend is registered for the test."""
    monkeypatch.setitem(BACKENDS, "fake", "fake_models:FakeBackend")
    monkeypatch.setattr(FakeBackend, "fail_after", None)
    monkeypatch.setattr(FakeBackend, "calls", 0)
    models = "".join(
        f'[[models]]\nname = "{name}"\npath = "./{name}"\nbackend = "fake"\ndevice = "cpu"\n'
        for name in SKILLS
    )
    file = folder / "zoo.toml"
    file.write_text(f'[sla]\nalpha = {alpha}\nmetric = "exact"\n{models}')
    return file


def requests(count: int, without_reference: Sequence[int] = ()) -> list[dict]:
    """Requests of 1 to 9 words; each model gets a third more of them right than the one before."""
    rows = []
    for n in range(count):
        prompt = " ".join(WORDS[(n + k) % len(WORDS)] for k in range(n * 5 % 9 + 1))
        row = {"id": f"r{n}", "prompt": prompt}
        if n not in without_reference:
            row["reference"] = prompt
        rows.append(row)
    return rows


def write_joules(folder: Path, rows: Sequence[dict]) -> str:
    """A recorded table of `rows` for `--meter replay:FILE`: 1, 3 and 9 joules per word. Returns the option."""
    file = folder / "joules.jsonl"
    with file.open("w") as handle:
        for row in rows:
            words = len(row.get("prompt", "").split())
            models = {
                name: {"joules": cost * words, "seconds": 0.1}
                for name, cost in zip(SKILLS, (1, 3, 9), strict=True)
            }
            handle.write(json.dumps({"id": row["id"], "models": models}) + "\n")
    return f"replay:{file}"

"""One checkpoint in several uses: the sample LoRA on the bundled medium model with real PEFT, weights loaded once."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_backends import Fake, ask, live
from transformers import AutoModelForCausalLM

from messcli.adapter import SETTINGS, WEIGHTS, digest, read_adapter
from messcli.cli import main
from messcli.errors import MessError, ModelTooLarge
from messcli.jobs.doctor import DoctorConfig, examine
from messcli.models.backend import create, share_weights
from messcli.models.transformers import TransformersBackend
from messcli.records import Request
from messcli.zoo import CheckpointOptions, ModelSpec, VllmOptions, load_zoo, model_spec

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "samples" / "zoos" / "one-checkpoint.toml"
LORA = ROOT / "samples" / "zoos" / "lora-long"
MEDIUM, LONG, BEAMS, LARGE = load_zoo(SAMPLE).models
ROWS = [json.loads(line) for line in (ROOT / "samples" / "requests.jsonl").read_text().splitlines()[:60]]
REQUESTS = [Request(row["id"], row["prompt"]) for row in ROWS]


def backends(*specs: ModelSpec) -> list[TransformersBackend]:
    made = [TransformersBackend(spec, batch_size=None) for spec in specs]
    share_weights(made)
    return made


def answers(backend: TransformersBackend) -> list[str | None]:
    return [answer.output for answer in backend.generate(REQUESTS)]


def with_adapter(spec: ModelSpec, folder: Path) -> ModelSpec:
    return replace(spec, options=replace(spec.own(CheckpointOptions), adapter=str(folder)))


def test_an_adapter_answers_as_the_merged_model_does(tmp_path: Path) -> None:
    """The reference is LoRA's own equation, W + alpha / r * B A (Hu et al. 2021, section 4.1), in the files."""
    settings, parts = json.loads((LORA / SETTINGS).read_text()), load_file(LORA / WEIGHTS)
    shutil.copytree(MEDIUM.path, tmp_path / "merged")
    weights = load_file(Path(MEDIUM.path) / "model.safetensors")
    for name in [name for name in parts if ".lora_A." in name]:
        layer = name.removeprefix("base_model.model.").replace(".lora_A", "")
        change = parts[name.replace("lora_A", "lora_B")] @ parts[name]
        weights[layer] += settings["lora_alpha"] / settings["r"] * change
    save_file(weights, tmp_path / "merged" / "model.safetensors", {"format": "pt"})
    plain, own = (answers(one) for one in backends(MEDIUM, LONG))
    assert own == answers(*backends(replace(MEDIUM, path=str(tmp_path / "merged"))))
    assert sum(a != b for a, b in zip(plain, own, strict=True)) > 5


def test_models_on_one_checkpoint_share_its_weights_and_not_their_answers(monkeypatch) -> None:
    alone = {one.spec.name: answers(one) for spec in (MEDIUM, LONG, BEAMS, LARGE) for one in backends(spec)}
    read: list[str] = []
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda path, **options: read.append(path) or load(path, **options),
    )
    medium, long, beams, large = backends(MEDIUM, LONG, BEAMS, LARGE)
    for one in (medium, long, beams, large, medium, beams, long, medium):
        assert answers(one) == alone[one.spec.name], one.spec.name
    assert read == [MEDIUM.path, LARGE.path]
    assert medium.model is long.model is beams.model is not large.model
    long.unload()  # the others stay, and so does the adapter that one of them uses
    assert (medium.loaded, long.loaded, beams.loaded) == (True, False, True)
    assert answers(beams) == alone["medium-long-beams"]
    beams.unload()
    assert answers(medium) == alone["medium"]
    assert answers(long) == alone["medium-long"]  # and comes back
    medium.unload()
    long.unload()
    assert medium.model is None
    assert len(read) == 2


def test_a_suspended_checkpoint_is_suspended_for_all() -> None:
    medium, long = backends(MEDIUM, LONG)
    was = answers(long)
    medium.load()
    long.suspend()  # on the CPU there is nothing to move: the weights go
    assert not medium.loaded
    assert not long.loaded
    assert answers(long) == was
    medium.resume()
    assert medium.model is long.model


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "bfloat16"},
        {"device": "auto"},
        {"load": {"attn_implementation": "eager"}},
        {"path": LARGE.path},
    ],
)
def test_other_weights_are_not_shared(fields: dict[str, Any]) -> None:
    plain = {"name": "a", "path": MEDIUM.path, "device": "cpu", "dtype": "float32"}
    assert model_spec(**plain).weights == model_spec(**{**plain, "name": "b", "max_new_tokens": 7}).weights
    assert model_spec(**plain).weights != model_spec(**{**plain, **fields}).weights


class Shared(Fake):
    """A fake whose name's first letter is its checkpoint."""

    @property
    def weights(self) -> str:
        return self.spec.name[0]

    def share(self, other: Any) -> None:
        pass


def test_max_loaded_counts_checkpoints_and_not_models() -> None:
    log: list[str] = []
    source = live([Shared(name, log) for name in ("a1", "a2", "b")], max_loaded=1)
    assert ask(source, 0, 1, 2, 0) == ["a1 r0", "a2 r1", "b r2", "a1 r3"]
    assert log == ["+a1", "+a2", "a1", "a1", "a2", "-a1", "-a2", "+b", "b"]


def test_memory_for_one_checkpoint_holds_its_models() -> None:
    log: list[str] = []
    fakes = [Shared(name, log) for name in ("a1", "a2", "b")]
    for fake in fakes:
        fake._room = lambda own=fake: not any(one.loaded and one.weights != own.weights for one in fakes)
    source = live(fakes)
    assert ask(source, 0, 1, 2) == ["a1 r0", "a2 r1", "b r2"]
    assert log == ["+a1", "+a2", "a1", "a2", "-a1", "-a2", "+b", "b"]
    with pytest.raises(ModelTooLarge):
        ask(live([Shared("a1", log, room=lambda: False)]), 0)


# --- what can't be ---


def changed(folder: Path, settings: dict[str, Any] | None = None, tensors: Any = None) -> Path:
    """A copy of the sample LoRA with other settings, or with other tensors."""
    shutil.copytree(LORA, folder)
    written = json.loads((folder / SETTINGS).read_text())
    (folder / SETTINGS).write_text(json.dumps(written | (settings or {})))
    if tensors is not None:
        save_file(tensors(load_file(LORA / WEIGHTS)), folder / WEIGHTS)
    return folder


def gone(folder: Path) -> Path:
    return folder


def without(*names: str, **others: str) -> Any:
    def make(folder: Path) -> Path:
        changed(folder)
        for name in names:
            (folder / name).unlink()
        for name, text in others.items():
            (folder / f"{name}").write_text(text)
        return folder

    return make


def pickled(folder: Path) -> Path:
    torch.save(load_file(LORA / WEIGHTS), without(WEIGHTS)(folder) / "adapter_model.bin")
    return folder


def garbled(folder: Path) -> Path:
    changed(folder)
    (folder / WEIGHTS).write_bytes(b"no safetensors")
    (folder / SETTINGS).write_text((folder / SETTINGS).read_text())
    return folder


def first(name: str, change: Any) -> Any:
    """Every tensor whose name ends so, changed."""
    return lambda held: {key: change(one) if key.endswith(name) else one for key, one in held.items()}


BAD = {
    "no folder": (gone, "there is no such folder. Correct adapter in the zoo file"),
    "no settings": (without(SETTINGS), "the folder has no adapter_config.json. Give a folder"),
    "no weights": (
        without(WEIGHTS),
        "the folder has no adapter_model.safetensors. Save the adapter as safetensors",
    ),
    "a pickle": (pickled, "(adapter_model.bin is a pickle: loading it can run code)"),
    "broken": (garbled, "adapter_model.safetensors is no safetensors file, or is empty"),
    "no JSON": (
        lambda folder: [changed(folder), (folder / SETTINGS).write_text("{")][0],
        "adapter_config.json can't be read",
    ),
    "another method": (
        lambda f: changed(f, {"peft_type": "IA3"}),
        "is 'IA3', and messcli runs LORA. Merge it",
    ),
    "whole modules": (
        lambda f: changed(f, {"modules_to_save": ["lm_head"]}),
        "has modules_to_save, which isn't LoRA",
    ),
    "code": (
        lambda f: changed(f, {"megatron_config": {"a": 1}, "megatron_core": "os"}),
        "has megatron_config",
    ),
    "changed base": (lambda f: changed(f, {"init_lora_weights": "pissa"}), "init_lora_weights = 'pissa'"),
    "no rank": (lambda f: changed(f, {"r": None}), "adapter_config.json has r = None"),
    "another rank": (lambda f: changed(f, {"r": 4}), "can't be put on top of its base: "),
    "bias": (
        lambda f: changed(f, tensors=lambda held: held | {"base_model.model.lm_head.bias": torch.zeros(3)}),
        "holds base_model.model.lm_head.bias, which isn't LoRA",
    ),
    "half": (
        lambda f: changed(
            f, tensors=lambda held: {k: v for k, v in held.items() if "o_proj.lora_B" not in k}
        ),
        "doesn't match its own settings",
    ),
    "another width": (
        lambda f: changed(f, tensors=first("q_proj.lora_A.weight", lambda one: torch.zeros(8, 64))),
        "is for another base: model.layers.0.self_attn.q_proj.lora_A is made for 64 numbers, and the layer has 40. "
        "Give the adapter's own base as path (it was trained on \"messcli's bundled medium model\")",
    ),
    "another depth": (
        lambda f: changed(
            f, tensors=lambda held: {k.replace("layers.2", "layers.20"): v for k, v in held.items()}
        ),
        "is for another base: this one has no model.layers.20.",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_an_adapter_that_cannot_be_is_told_in_one_line(case: str, tmp_path: Path) -> None:
    make, told = BAD[case]
    spec = with_adapter(LONG, make(tmp_path / "adapter"))
    medium, bad = backends(MEDIUM, spec)
    plain = answers(medium)
    with pytest.raises(MessError) as caught:
        bad.load()
    assert str(caught.value).startswith(f'model "medium-long": adapter: {tmp_path / "adapter"}: ')
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not bad.loaded
    assert answers(medium) == plain


def test_an_adapter_for_another_base_is_told() -> None:
    with pytest.raises(MessError, match=r"is for another base: model\.layers\.0\..* is made for 80 numbers"):
        create(with_adapter(LARGE, LORA), batch_size=None).load()


def test_the_digest_is_of_what_the_files_hold(tmp_path: Path) -> None:
    same, other = changed(tmp_path / "a"), changed(tmp_path / "b", {"lora_alpha": 17})
    shutil.copyfile(LORA / SETTINGS, same / SETTINGS)
    assert digest(same, "m") == digest(LORA, "m") != digest(other, "m")
    assert read_adapter(LORA, "m").rank == 8
    kept = MEDIUM.signature()
    assert (kept["adapter"], LONG.signature()["adapter"]) == (None, digest(LORA, "m"))


def run(*arguments: str, capsys: Any) -> tuple[int, str]:
    code = main(list(arguments), standalone_mode=False)
    return code, capsys.readouterr().err


def test_a_state_knows_its_adapters(tmp_path: Path, capsys: Any) -> None:
    changed(tmp_path / "lora")
    zoo, rows, out = tmp_path / "zoo.toml", tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    one = f'path = "{MEDIUM.path}"\ndevice = "cpu"\nprompt_template = "{{prompt}} =>"\nmax_new_tokens = 24\n'
    zoo.write_text(
        f'[sla]\nalpha = 0.9\n[[models]]\nname = "plain"\n{one}[[models]]\nname = "long"\nadapter = "lora"\n{one}'
    )
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = ["route", str(rows), "-o", str(out), "--zoo", str(zoo), "-q"]
    assert run(*command, capsys=capsys)[0] == 0
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["model"] for row in written} == {"plain", "long"}
    rows.write_text(rows.read_text() + json.dumps({"id": "more", "prompt": "the dog"}) + "\n")
    changed(tmp_path / "new", {"lora_alpha": 1})
    shutil.copyfile(tmp_path / "new" / SETTINGS, tmp_path / "lora" / SETTINGS)
    code, told = run(*command, capsys=capsys)
    assert code == 1
    assert 'was made with adapter of model "long" = ' in told


def test_doctor_looks_at_adapters_and_shared_checkpoints(tmp_path: Path) -> None:
    found = {
        finding.name: finding for finding in examine(DoctorConfig(zoo=str(SAMPLE))) if finding.topic == "zoo"
    }
    assert found["medium-long"].status == "ok"
    assert "LoRA of rank 8" in found["medium-long"].text
    assert found["weights"].text.startswith(
        "medium, medium-long, medium-long-beams run on one checkpoint, loaded once"
    )
    bad = tmp_path / "zoo.toml"
    text = SAMPLE.read_text().replace("./lora-long", "gone").replace("../../", f"{ROOT}/")
    bad.write_text(text)
    found = {finding.name: finding for finding in examine(DoctorConfig(zoo=str(bad)))}
    assert found["medium-long"].status == "!!"
    assert found["medium-long"].text.startswith('model "medium-long": adapter: ')
    for_large = tmp_path / "large.toml"
    for_large.write_text(
        text.replace('adapter = "gone"\n', "").replace(
            'bundled/large"', f'bundled/large"\nadapter = "{LORA}"'
        )
    )
    found = {finding.name: finding for finding in examine(DoctorConfig(zoo=str(for_large)))}
    assert "is for another base" in found["large"].text


def test_engines_beside_each_other_share_the_card_by_checkpoint(tmp_path: Path) -> None:
    one = 'backend = "vllm"\ndevice = "cuda:0"\nbeside = true\n'
    tables = [
        f'[[models]]\nname = "plain"\npath = "acme/a"\n{one}',
        f'[[models]]\nname = "thinking"\npath = "acme/a"\nmax_new_tokens = 4096\n{one}',
        f'[[models]]\nname = "large"\npath = "acme/b"\n{one}',
    ]
    (tmp_path / "zoo.toml").write_text("\n".join(tables))
    plain, thinking, large = load_zoo(tmp_path).models
    assert plain.weights == thinking.weights != large.weights
    assert [model.own(VllmOptions).memory_share for model in (plain, thinking, large)] == [0.45, 0.45, 0.45]

"""zoo.toml: what it may say, and how each slip is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import messcli.zoo
from messcli.errors import ZooError
from messcli.zoo import ModelSpec, TransformersOptions, find_zoo, load_zoo

FULL = """
description = "a zoo"
[sla]
alpha = 0.5
metric = "bleu1"
[plans]
silver = 0.49
gold = 1
[energy]
cpu_watts = 65
[[models]]
name = "small"
path = "./models/small"
device = "cuda"
dtype = "bfloat16"
max_new_tokens = 32
prompt_template = "Translate {x}: {prompt} {0}"
batch_size = 4
[models.generation]
num_beams = 4
[models.load]
attn_implementation = "sdpa"
quantization_config = { quant_method = "gguf", dequantize = true }
[[models]]
name = "large"
path = "org/large-7b.v2"
revision = "v1"
chat_options = { enable_thinking = false }
tokenizer = { src_lang = "deu_Latn" }
"""
MODEL = '[[models]]\nname = "m"\npath = "a/b"\n'


def write(folder: Path, text: str) -> Path:
    file = folder / "zoo.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_everything_that_a_zoo_may_say(tmp_path):
    zoo = load_zoo(write(tmp_path, FULL))
    assert zoo.names == ("small", "large")
    assert zoo.largest.name == "large"
    assert (zoo.alpha, zoo.metric, zoo.description) == (0.5, "bleu1", "a zoo")
    assert zoo.plans == {"silver": 0.49, "gold": 1.0}
    assert zoo.energy == {"cpu_watts": 65.0}
    assert zoo.path == tmp_path / "zoo.toml"
    small, large = zoo.models
    assert small.path == str(tmp_path / "models" / "small")
    assert small.device == "cuda:0"
    assert small.generation == {"num_beams": 4}
    assert small.own(TransformersOptions).load["quantization_config"] == {
        "quant_method": "gguf",
        "dequantize": True,
    }
    assert small.fill_template("{0} {prompt}") == "Translate {x}: {0} {prompt} {0}"
    assert large.path == "org/large-7b.v2"
    assert large.own(TransformersOptions).revision == "v1"
    assert (large.device, large.own(TransformersOptions).dtype, large.max_new_tokens, large.backend) == (
        "auto",
        "auto",
        128,
        "transformers",
    )
    assert large.fill_template("{0}") == "{0}"


def test_the_signature_is_json_and_says_what_decides_answers(tmp_path):
    zoo = load_zoo(write(tmp_path, FULL))
    signature = zoo.signature()
    assert json.loads(json.dumps(signature)) == signature
    assert signature["models"][0]["path"] == "./models/small"  # as written: a moved folder is the same zoo

    def changed(old: str, new: str) -> bool:
        assert old in FULL
        return load_zoo(write(tmp_path, FULL.replace(old, new))).signature() != signature

    assert changed("max_new_tokens = 32", "max_new_tokens = 33")
    assert changed("num_beams = 4", "num_beams = 5")
    assert changed("Translate {x}", "Translate {y}")
    assert changed('revision = "v1"', 'revision = "v2"')
    assert not changed('device = "cuda"', 'device = "cpu"')
    assert not changed("batch_size = 4", "batch_size = 8")
    assert not changed("alpha = 0.5", "alpha = 0.6")


@pytest.mark.parametrize(
    ("written", "resolved"),
    [
        ("org/name", "org/name"),
        ("name", "name"),
        ("./name", "{zoo}/name"),
        ("../name", "{above}/name"),
        (".", "{zoo}"),
        ("beside", "{zoo}/beside"),
        ("some/deeper/folder", "{zoo}/some/deeper/folder"),  # no hub id has two slashes
        ("/abs/olute", "/abs/olute"),
        ("~/m", "{home}/m"),
    ],
)
def test_paths_resolve_against_the_zoo_file(tmp_path, monkeypatch, written, resolved):
    folder = tmp_path / "zoo"
    (folder / "beside").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)  # the working directory does not matter
    write(folder, MODEL.replace("a/b", written))
    expected = resolved.format(zoo=folder, above=tmp_path, home=tmp_path / "home")
    assert load_zoo(Path("zoo/zoo.toml")).models[0].path == expected


def test_a_zoo_is_found_by_option_then_folder_then_environment_then_bundled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MESSCLI_ZOO", raising=False)
    assert find_zoo() == messcli.zoo.BUNDLED_ZOO
    other = tmp_path / "other"
    other.mkdir()
    named = write(other, MODEL)
    monkeypatch.setenv("MESSCLI_ZOO", str(named))
    assert find_zoo() == named
    local = write(tmp_path, MODEL)
    assert find_zoo().resolve() == local
    assert find_zoo(other) == named  # a folder stands for its zoo.toml
    assert find_zoo(named) == named
    local.unlink()
    monkeypatch.setenv("MESSCLI_ZOO", "gone.toml")
    with pytest.raises(
        ZooError, match=r"gone\.toml: no such zoo file\. Correct MESSCLI_ZOO, or leave it out"
    ):
        load_zoo()
    with pytest.raises(ZooError, match=r"nowhere\.toml: no such zoo file\. Correct --zoo, or leave it out"):
        load_zoo("nowhere.toml")


SLIPS = [
    ("", "no models. Add a [[models]] table with name and path for each, smallest first"),
    ("models = []", "no models."),
    ("[models]\nname = 'm'", "models must be tables, each headed [[models]] with two brackets"),
    ("modells = 1\n" + MODEL, "unknown `modells`: did you mean `models`?"),
    ("alpha = 0.5\n" + MODEL, "unknown `alpha`: put it under [sla] as `alpha = ...`"),
    ("description = 1\n" + MODEL, "description: must be a string in quotes, not 1"),
    (MODEL + "max_tokens = 3", 'model "m": unknown field `max_tokens`: did you mean `max_new_tokens`?'),
    (MODEL + "zzz = 3", 'model "m": unknown field `zzz`: known are name, path, backend'),
    (MODEL + "temperature = 0.7", 'model "m": unknown field `temperature`: put it under [models.generation]'),
    (MODEL + "gguf_file = 'x'", 'model "m": unknown field `gguf_file`: put it under [models.load]'),
    (MODEL + "load = { revision = 'x' }", "load: must not hold revision: set `revision` on the model itself"),
    (MODEL + "load = { weights_only = false }", "load: must not hold weights_only: set `allow_pickle`"),
    (MODEL + "tokenizer = { trust_remote_code = true }", "tokenizer: must not hold trust_remote_code"),
    (MODEL + "generation = { max_new_tokens = 3 }", "generation: must not hold max_new_tokens: set"),
    (MODEL + "load = 3", 'model "m": load: must be a table, not 3'),
    (MODEL + "load = { when = 1979-05-27 }", "load: holds datetime.date(1979, 5, 27): options are text"),
    (MODEL + "generation = { top_p = nan }", "generation: holds nan"),
    (MODEL + "generation = { a = [[inf]] }", "generation: holds inf"),
    (MODEL + MODEL, 'model "m": name: used twice. Give each model its own'),
    ("[[models]]\npath = 'a/b'", "model 1: name: missing. Every [[models]] table needs name and path"),
    ("[[models]]\nname = 'm'", 'model "m": path: missing.'),
    ("[[models]]\nname = 3\npath = 'a'", "model 1: name: must be a string in quotes, not 3"),
    ("[[models]]\nname = ''\npath = 'a'", "model 1: name: must not be empty"),
    ('[[models]]\nname = "a\\nb"\npath = "a"', "name: must be printable, without spaces around it"),
    (MODEL + "device = 'gpu'", 'device: must be "cpu", "cuda:N" or "auto", not \'gpu\''),
    (MODEL + "dtype = 'bf16'", 'not "bf16"; write "bfloat16"'),
    (MODEL + "dtype = 'int3'", 'dtype: must be one of auto, float32, float16, bfloat16, float64, not "int3"'),
    (MODEL + "max_new_tokens = 0", "max_new_tokens: must be a whole number of at least 1, not 0"),
    (MODEL + "max_new_tokens = true", "max_new_tokens: must be a whole number of at least 1, not True"),
    (MODEL + "max_new_tokens = '8'", "max_new_tokens: must be a whole number of at least 1, not '8'"),
    (MODEL + "prompt_template = 'Translate:'", "prompt_template: must contain {prompt}"),
    (MODEL + "trust_remote_code = 'yes'", "trust_remote_code: must be true or false, not 'yes'"),
    (MODEL + "allow_pickle = 1", "allow_pickle: must be true or false, not 1"),
    (MODEL + "[sla]\nalpha = 52", "[sla]: alpha: must be from 0 to 1, not 52; did you mean 0.52?"),
    (MODEL + "[sla]\nalpha = 152", "[sla]: alpha: must be from 0 to 1, not 152"),
    (MODEL + "[sla]\nalpha = -0.1", "[sla]: alpha: must be from 0 to 1, not -0.1"),
    (MODEL + "[sla]\nalpha = nan", "[sla]: alpha: must be from 0 to 1, not nan"),
    (MODEL + "[sla]\nalpha = 'half'", "[sla]: alpha: must be a number from 0 to 1, not 'half'"),
    (MODEL + "[sla]\nalpha = true", "[sla]: alpha: must be a number from 0 to 1, not True"),
    (MODEL + "[sla]\nmetrics = 'bleu1'", "[sla]: unknown field `metrics`: did you mean `metric`?"),
    ("sla = 3\n" + MODEL, "[sla]: must be a table, not 3"),
    (MODEL + "[plans]\nsilver = 49", "[plans]: silver: must be from 0 to 1, not 49; did you mean 0.49?"),
    (MODEL + "[energy]\ncpu_watts = 0", "[energy]: cpu_watts: must be a number of watts above 0, not 0"),
    (MODEL + "[energy]\ncpu_watts = inf", "[energy]: cpu_watts: must be a number of watts above 0, not inf"),
    (MODEL + "[energy]\ncpu_watt = 5", "[energy]: unknown field `cpu_watt`: did you mean `cpu_watts`?"),
]


@pytest.mark.parametrize(("text", "told"), SLIPS, ids=[str(number) for number in range(len(SLIPS))])
def test_each_slip_is_told_in_one_line_with_its_place_and_cure(tmp_path, text, told):
    file = write(tmp_path, text)
    with pytest.raises(ZooError) as caught:
        load_zoo(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    assert told in message
    assert "\n" not in message


def test_files_that_are_no_toml_are_told_with_their_line(tmp_path):
    file = write(tmp_path, MODEL + "device = cpu\n")
    with pytest.raises(ZooError, match=r"zoo\.toml:4: not valid TOML: "):
        load_zoo(file)
    write(tmp_path, MODEL + "device = 'cpu\n")
    with pytest.raises(ZooError, match=r"zoo\.toml:4: not valid TOML: "):
        load_zoo(file)
    write(tmp_path, "a = [\n1,\n")
    with pytest.raises(ZooError, match=r"zoo\.toml:2: not valid TOML: "):
        load_zoo(file)
    file.write_bytes(b"[sla]\nalpha = 0.5\nmetric = '\xff'\n")
    with pytest.raises(ZooError, match=r"zoo\.toml:3: not UTF-8\. Save the file as UTF-8"):
        load_zoo(file)
    file.write_bytes(b"\xef\xbb\xbf" + MODEL.encode())
    assert load_zoo(file).names == ("m",)


def test_a_spec_made_in_code_needs_only_a_name_and_a_path():
    spec = ModelSpec(name="x", path="y")
    assert spec.signature()["path"] == "y"

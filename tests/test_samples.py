"""The samples: every zoo file is one, every file is in the table, and the tour runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import GenerationConfig
from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES

from messcli.models.backend import create
from messcli.simulation.table import read_table
from messcli.zoo import CheckpointOptions, VllmOptions, load_zoo

ROOT = Path(__file__).parent.parent
SAMPLES = ROOT / "samples"
ZOOS = sorted(SAMPLES.glob("zoos/*.toml"))


@pytest.mark.parametrize("path", ZOOS, ids=lambda path: path.stem)
def test_a_zoo_file_is_one(path: Path) -> None:
    zoo = load_zoo(path)
    assert len(zoo.models) >= 2
    assert zoo.alpha is not None
    assert zoo.metric is not None
    assert zoo.description is not None


@pytest.mark.parametrize("path", ZOOS, ids=lambda path: path.stem)
def test_the_backends_take_the_options(path: Path) -> None:
    """As far as that can be told without the models: their names, and none without effect."""
    for model in load_zoo(path).models:
        create(model, batch_size=None)
        options = dict(model.generation)
        if model.backend == "transformers":
            if (language := options.pop("forced_bos_token", None)) is not None:
                assert {language, model.own(CheckpointOptions).tokenizer["src_lang"]} <= set(
                    FAIRSEQ_LANGUAGE_CODES
                )
            assert set(options) <= set(GenerationConfig().to_dict())
        if not options.get("do_sample"):
            assert not {"temperature", "top_p", "top_k", "min_p"} & set(options)


def test_vllm_engines_fit_on_their_card() -> None:
    shares: dict[str, float] = {}
    for path in ZOOS:
        for model in load_zoo(path).models:
            if model.backend == "vllm":
                # those that take turns have the card to themselves
                key = f"{path.stem} {model.device} {'' if model.beside else model.name}"
                shares[key] = shares.get(key, 0.0) + (model.own(VllmOptions).memory_share or 0.0)
    assert shares
    assert all(0 < share <= 0.95 for share in shares.values())


def test_every_sample_is_in_the_table() -> None:
    text = (SAMPLES / "README.md").read_text(encoding="utf-8")
    files = {path.relative_to(SAMPLES).as_posix() for path in SAMPLES.rglob("*") if path.is_file()}
    assert [name for name in sorted(files - {"README.md"}) if f"`{name}`" not in text] == []


def test_the_recorded_table_is_of_the_sample_requests_and_the_bundled_zoo() -> None:
    table = read_table(str(SAMPLES / "outcomes.jsonl"), complete_only=True)
    rows = (SAMPLES / "requests.jsonl").read_text(encoding="utf-8").splitlines()
    scored = [row["id"] for row in map(json.loads, rows) if "reference" in row]
    assert table.names == ("small", "medium", "large")
    assert [request.id for request in table.requests] == scored
    means = table.accuracies.mean(axis=0)
    assert list(means) == sorted(means)


def test_the_cron_line_escapes_percent() -> None:
    jobs = [
        line
        for line in (SAMPLES / "messcli.cron").read_text(encoding="utf-8").splitlines()
        if line[0].isdigit()
    ]
    assert jobs
    assert all("%" not in line.replace(r"\%", "") for line in jobs)


@pytest.mark.slow
def test_the_tour(tmp_path: Path) -> None:
    program = f"{sys.executable} -m messcli"
    done = subprocess.run(
        ["bash", SAMPLES / "tour.sh", tmp_path / "tour"],
        env={**os.environ, "MESSCLI": program},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "tour" / "report.html").stat().st_size > 1000
    assert "exit status 143" in done.stdout

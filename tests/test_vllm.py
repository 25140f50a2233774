"""vLLM for real: its CPU build, in an environment of its own (`.ci/vllm`). Without vLLM, only what needs none."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from messcli.errors import ModelError, ModelTooLarge, ModelUnavailable
from messcli.models.backend import create, share_weights
from messcli.models.transformers import TransformersBackend
from messcli.records import Request
from messcli.zoo import BUNDLED_ZOO, ModelSpec, load_zoo, model_spec

SAMPLES = Path(__file__).parent.parent / "samples" / "requests.jsonl"
PROMPTS = [json.loads(line)["prompt"] for line in SAMPLES.read_text().splitlines()[:12]]
REQUESTS = [Request(id=f"r{number}", prompt=prompt) for number, prompt in enumerate(PROMPTS)]
MEDIUM, LARGE = load_zoo(BUNDLED_ZOO).models[1:]  # heads of 20, which vLLM's CPU attention lacks, and of 32

here = importlib.util.find_spec("vllm") is not None
with_vllm = [
    pytest.mark.vllm,
    pytest.mark.skipif(not here, reason="vLLM isn't installed: .ci/vllm runs this"),
    pytest.mark.filterwarnings("ignore"),
]


def spec(of: ModelSpec = LARGE, **fields: Any) -> ModelSpec:
    own = {"memory_share": 0.1, "load": {"enforce_eager": True}, "dtype": "float32", "device": of.device}
    common = {"max_new_tokens": of.max_new_tokens, "prompt_template": of.prompt_template, "name": of.name}
    return model_spec(**{"path": of.path, "backend": "vllm", **common, **own, **fields})


@pytest.mark.skipif(here, reason="vLLM is installed")
def test_without_vllm_the_cure_is_told():
    with pytest.raises(ModelError) as caught:
        create(spec(), batch_size=None).load()
    assert str(caught.value).startswith(f'model "large" ({LARGE.path}): vLLM isn\'t installed (')
    assert str(caught.value).endswith("). pip install 'messcli[vllm]'")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (
            {"device": "cuda:1"},
            "cuda:1: vLLM takes the first visible card. Choose it by CUDA_VISIBLE_DEVICES",
        ),
        (
            {"generation": {"num_beams": 2}},
            "generation.num_beams: vLLM has no such option. Known are do_sample",
        ),
        (
            {"generation": {"temperature": 0.5}},
            "generation.temperature has no effect without sampling. Add do_s",
        ),
        (
            {"generation": {"thinking_token_budgets": 9}},
            "Known are do_sample, eos_token_id, min_new_tokens, min_p",
        ),
        ({"load": {"seed": 1}}, "load.seed: messcli sets this itself. Remove it from zoo.toml"),
        (
            {"load": {"gpu_memory_utilization": 0.5}},
            "messcli sets this itself. Set memory_share on the model",
        ),
        ({"path": "/gone"}, "there is no such folder. Correct path in zoo.toml"),
    ],
)
def test_what_cannot_be_is_told_before_an_engine_starts(fields, told):
    with pytest.raises(ModelError) as caught:
        create(spec(**fields), batch_size=None).load()
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def engine():
    made = create(spec(), batch_size=None)
    made.load()
    yield made
    made.unload()


class TestEngine:
    pytestmark = with_vllm

    def test_it_answers_as_transformers_does_token_for_token(self, engine):
        reference = TransformersBackend(LARGE, batch_size=None).generate(REQUESTS)
        assert engine.generate(REQUESTS) == reference
        assert [engine.generate([request])[0] for request in REQUESTS[:3]] == reference[:3]

    def test_its_processes_cpu_seconds_are_seen(self, engine):
        before = engine.cpu_seconds()
        assert before > 0
        engine.generate(REQUESTS)
        assert engine.cpu_seconds() > before
        assert engine.devices == ("cpu",)

    def test_an_over_long_prompt_is_that_requests_error_only(self, engine):
        long = Request(id="long", prompt="the dog " * 50)
        answers = engine.generate([long, REQUESTS[0]])
        assert "tokens, and the model takes 40" in answers[0].error
        assert answers[1].error is None

    def test_exact_lengths_for_calibration(self, engine):
        assert [g.output_tokens for g in engine.generate_exactly(9, 7, 3)] == [7, 7, 7]

    def test_sampling_depends_on_the_request_alone(self, engine):
        engine.generation_config.update(do_sample=True, temperature=2.0)
        try:
            answers = engine.generate(REQUESTS)
            assert engine.generate(REQUESTS[::-1])[::-1] == answers
        finally:
            engine.generation_config.update(do_sample=False, temperature=None)
        assert engine.generate(REQUESTS) != answers

    def test_stop_strings_leave_no_trace(self, engine):
        reference = TransformersBackend(
            replace(LARGE, generation={"stop_strings": ["e"]}), batch_size=None
        ).generate(REQUESTS)
        engine.generation_config.update(stop_strings=["e"])
        try:
            answers = engine.generate(REQUESTS)
        finally:
            engine.generation_config.update(stop_strings=None)
        assert not any("e" in answer.output for answer in answers)
        assert [answer.output for answer in answers] == [answer.output for answer in reference]
        assert {answer.finish for answer in answers} == {"stop"}

    def test_answers_stream_out_of_one_loop_and_their_work_adds_up(self, engine):
        many = [replace(request, id=f"{n} {request.id}") for n in range(20) for request in REQUESTS]
        answers, work, groups = {}, {}, 0
        for group in engine.stream(many):
            groups += 1
            answers.update(group.finished)
            for index, (read, written) in group.work.items():
                before = work.get(index, (0, 0))
                work[index] = (before[0] + read, before[1] + written)
        assert groups > 2  # 240 answers, at most 64 a group
        assert [answers[n].output for n in range(len(many))] == 20 * [
            answer.output for answer in engine.generate(REQUESTS)
        ]
        assert {n: work[n][1] for n in work} == {n: answer.output_tokens for n, answer in answers.items()}
        # what its cache held of a prompt was not read again
        assert all(0 <= work[n][0] <= answers[n].prompt_tokens for n in work)

    def test_a_closed_stream_stops_the_engine(self, engine):
        many = [replace(request, id=f"{n} {request.id}") for n in range(50) for request in REQUESTS]
        groups = engine.stream(many)
        next(groups)
        groups.close()
        started = time.monotonic()
        assert engine.generate(REQUESTS[:1])[0].output
        assert time.monotonic() - started < 5

    def test_confidence_is_what_transformers_computes(self, engine):
        reference = TransformersBackend(LARGE, batch_size=None).generate(REQUESTS)
        for ours, theirs in zip(engine.generate(REQUESTS), reference, strict=True):
            assert ours.confidence == pytest.approx(theirs.confidence, abs=5e-3)

    def test_options_are_weighed_as_transformers_weighs_them_among_the_likeliest_tokens(self, engine):
        reference = TransformersBackend(LARGE, batch_size=None)
        options = tuple(dict.fromkeys(answer.output.split()[0] for answer in engine.generate(REQUESTS)))
        assert len(options) > 1
        assert not isinstance(engine.checkpoint.option_ids(options), str)
        asked = [replace(request, options=options) for request in REQUESTS]
        for ours, theirs in zip(engine.generate(asked), reference.generate(asked), strict=True):
            assert (ours.output, ours.prompt_tokens, ours.output_tokens) == (
                theirs.output, theirs.prompt_tokens, 1
            )  # fmt: skip
            for weight, exact in zip(ours.weights, theirs.weights, strict=True):
                # one that isn't among the 20 likeliest tokens counts 0
                assert weight == pytest.approx(exact, rel=0.02, abs=1e-4) or (weight == 0.0 and exact < 0.05)
        (unknown,) = engine.generate([replace(REQUESTS[0], options=("yes", "zebra crossing"))])
        assert "no token of its own says that" in unknown.error
        mixed = [asked[0], REQUESTS[0]]
        assert [answer.weights is None for answer in engine.generate(mixed)] == [False, True]

    def test_where_there_is_no_sleep_mode_the_engine_ends_between_turns(self):
        made = create(spec(), batch_size=None)
        before = made.generate(REQUESTS[:2])
        made.suspend()
        assert not made.loaded
        made.resume()
        assert made.generate(REQUESTS[:2]) == before
        made.unload()


class TestOneCheckpoint:
    pytestmark = with_vllm

    @pytest.mark.parametrize(
        ("budget", "told"), [(64, "reasoning"), ("many", "must be a non-negative integer")]
    )
    def test_a_thinking_budget_reaches_the_engine(self, budget, told):
        """These models don't think, and vLLM says so: without a reasoning parser a budget means nothing."""
        made = create(spec(generation={"thinking_token_budget": budget}), batch_size=None)
        try:
            with pytest.raises(ModelError, match=told):
                made.generate(REQUESTS[:1])
        finally:
            made.unload()

    def test_models_on_one_engine_answer_as_merged_ones_do(self, tmp_path):
        from safetensors.torch import load_file, save_file

        torch = pytest.importorskip("torch")
        weights, parts = load_file(Path(LARGE.path) / "model.safetensors"), {}
        for number in range(16):
            name = f"model.layers.{number}.self_attn.q_proj"
            a, b = torch.randn(4, 64) * 0.3, torch.randn(64, 4) * 0.3
            parts |= {
                f"base_model.model.{name}.lora_A.weight": a,
                f"base_model.model.{name}.lora_B.weight": b,
            }
            weights[f"{name}.weight"] += 2 * b @ a  # alpha / r = 2
        (tmp_path / "lora").mkdir()
        save_file(parts, tmp_path / "lora" / "adapter_model.safetensors")
        settings = {
            "peft_type": "LORA",
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj"],
            "bias": "none",
        }
        (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(settings))
        shutil.copytree(LARGE.path, tmp_path / "merged")
        save_file(weights, tmp_path / "merged" / "model.safetensors", {"format": "pt"})
        merged = replace(LARGE, path=str(tmp_path / "merged"))
        own = {"max_new_tokens": 12, "adapter": str(tmp_path / "lora"), "name": "tuned"}
        made = [create(one, batch_size=None) for one in (spec(), spec(**own))]
        share_weights(made)
        plain, tuned = (
            [answer.output for answer in TransformersBackend(one, batch_size=None).generate(REQUESTS)]
            for one in (LARGE, replace(merged, max_new_tokens=12))
        )
        assert plain != tuned
        try:
            for _ in range(2):
                assert [answer.output for answer in made[1].generate(REQUESTS)] == tuned
                assert [answer.output for answer in made[0].generate(REQUESTS)] == plain
            made[0].unload()
            assert (made[0].loaded, made[1].loaded) == (False, True)
            assert [answer.output for answer in made[1].generate(REQUESTS)] == tuned
        finally:
            for backend in made:
                backend.unload()
        assert not made[1].loaded


class TestFailures:
    pytestmark = with_vllm

    def test_an_engine_that_fails_is_told_with_its_own_words_and_nothing_on_stdout(self, capfd):
        with pytest.raises(ModelError) as caught:
            create(spec(MEDIUM), batch_size=None).generate(REQUESTS)
        assert f'model "medium" ({MEDIUM.path}): ' in str(caught.value)
        assert "head_dim=20" in str(caught.value)
        assert capfd.readouterr().out == ""

    def test_an_engine_whose_processes_die_is_away_and_comes_back(self):
        others = set(psutil.Process().children(recursive=True))
        backend = create(spec(), batch_size=None)
        try:
            backend.load()
            processes = set(psutil.Process().children(recursive=True)) - others
            assert processes
            stream = backend.stream(REQUESTS)
            for process in processes:
                process.kill()
            with pytest.raises(ModelUnavailable, match="failed while answering"):
                list(stream)
            assert not backend.loaded
            assert [answer.error for answer in backend.generate(REQUESTS[:2])] == [None, None]
        finally:
            backend.unload()

    def test_too_small_a_share_of_the_memory(self):
        with pytest.raises(ModelTooLarge, match=r"does not fit into its share of the memory .*memory_share"):
            create(spec(memory_share=0.001), batch_size=None).load()


class TestRoute:
    pytestmark = with_vllm

    def test_a_zoo_of_both_backends_is_routed_and_billed(self, tmp_path):
        small = load_zoo(BUNDLED_ZOO).models[0]
        common = 'device = "cpu"\ndtype = "float32"\nmax_new_tokens = 24\nprompt_template = "{prompt} =>"\n'
        (tmp_path / "zoo.toml").write_text(
            f'[sla]\nalpha = 0.9\n[[models]]\nname = "small"\npath = "{small.path}"\n{common}'
            f'[[models]]\nname = "large"\npath = "{LARGE.path}"\n{common}backend = "vllm"\nmemory_share = 0.1\n'
            "[models.load]\nenforce_eager = true\n"
        )
        started = time.monotonic()
        code = "from messcli.cli import main; main(prog_name='messcli')"
        done = subprocess.run(
            [sys.executable, "-c", code, "route", SAMPLES, "-o", tmp_path / "out.jsonl",
             "--zoo", tmp_path / "zoo.toml", "--limit", "96"],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
        rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert len(rows) == 96
        assert all(row["joules"] > 0 for row in rows)
        assert "large" in {row["model"] for row in rows}
        print(f"\n{time.monotonic() - started:.0f} s\n{done.stderr}")

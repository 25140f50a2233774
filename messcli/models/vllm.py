"""A model run by vLLM's offline engine: continuous batching and paged attention, on GPUs or a CPU.

Prompts are rendered and tokenized as for `transformers` (untrusted text stays text), and vLLM gets token
ids; so the two backends answer alike, as far as their arithmetic does. Each engine works in processes of its
own, which end when the model is unloaded: their memory comes back whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import transformers

from messcli.errors import ModelError, ModelTooLarge
from messcli.models.processes import child_pids, live_seconds
from messcli.models.transformers import TransformersBackend
from messcli.records import Generation, Request
from messcli.zoo import ModelSpec

INSTALL = "pip install 'messcli[vllm]'"
# name in [models.generation] -> SamplingParams' name
_OPTIONS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
}
# What transformers' checks want to see in [models.generation] and vLLM has under another name, or needn't be told
_UNDERSTOOD = {*_OPTIONS, "do_sample", "eos_token_id", "pad_token_id"}
# options of the engine that have a field of their own
_OWN_FIELD = {
    "model": "path",
    "tokenizer": "path",
    "gpu_memory_utilization": "memory_share",
    "seed": "",
    "generation_config": "generation",
    "skip_tokenizer_init": "",
}


class VllmBackend(TransformersBackend):
    """One model of the zoo, run by vLLM. See `messcli.models.backend.Backend` for the protocol.

    `load` of zoo.toml passes through to vllm.LLM: tensor_parallel_size, max_model_len, quantization, ...
    """

    def __init__(self, spec: ModelSpec, *, batch_size: int | None) -> None:
        super().__init__(spec, batch_size=batch_size)
        self._engine: Any = None
        self._log: _EngineLog | None = None
        self._pids: set[int] = set()

    @property
    def loaded(self) -> bool:
        return self._engine is not None

    @property
    def devices(self) -> tuple[str, ...]:
        """The cards that the engine spreads over: as many as its parallel sizes, from the first visible one."""
        import torch

        if self.spec.device == "cpu" or not torch.cuda.is_available():
            return ("cpu",)
        sizes = (self.spec.load.get(name, 1) for name in ("tensor_parallel_size", "pipeline_parallel_size"))
        cards = 1
        for size in sizes:
            cards *= int(size)
        return tuple(f"cuda:{index}" for index in range(cards))

    def cpu_seconds(self) -> float:
        return live_seconds(self._pids)

    # --- loading ---

    def load(self) -> None:
        """Start the engine; does nothing when it runs. Raises ModelError as `transformers` does."""
        if self._engine is not None:
            return
        self._check_place()
        config = self._config
        self._check_limits(config)
        self._generation_config = self._generation_options(self._defaults(config))
        options = self._engine_options()
        before = child_pids()
        with self._logging():
            try:
                from vllm import LLM
            except ImportError as error:
                self._close_log()
                raise self._error(f"vLLM isn't installed ({error})", INSTALL) from error
            try:
                self._sampling(Request("", ""))
            except ValueError as error:
                self._close_log()
                raise self._error(f"generation: {' '.join(str(error).split())}", "Correct it") from error
            try:
                self._engine = LLM(**options)
            except Exception as error:
                told = self._engine_error(error)
                self._close_log()
                raise told from error
        self._pids = child_pids() - before

    def unload(self) -> None:
        """End the engine's processes, and with them what they hold."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.llm_engine.engine_core.shutdown()
            del engine
        self._pids = set()
        self._close_log()
        super().unload()

    def _close_log(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    @contextlib.contextmanager
    def _logging(self) -> Iterator[None]:
        if self._log is None:
            self._log = _EngineLog()
        with self._log.kept():
            yield

    def _check_place(self) -> None:
        if self.spec.device.partition(":")[2] not in ("", "0"):
            raise self._error(
                f"{self.spec.device}: vLLM takes the first visible card",
                'Choose it by CUDA_VISIBLE_DEVICES, or serve the model and set backend = "openai"',
            )
        for name, field in _OWN_FIELD.items():
            if name in self.spec.load:
                cure = f"Set {field} on the model itself" if field else "Remove it from zoo.toml"
                raise self._error(f"load.{name}: messcli sets this itself", cure)
        unknown = next((name for name in self.spec.generation if name not in _UNDERSTOOD), None)
        if unknown is not None:
            raise self._error(
                f"generation.{unknown}: vLLM has no such option",
                f"Known are {', '.join(sorted(_UNDERSTOOD))}",
            )

    def _defaults(self, config: Any) -> Any:
        """The checkpoint's own generation options."""
        try:
            return transformers.GenerationConfig.from_pretrained(self.spec.path, **self._file_options())
        except OSError:  # it has none
            return transformers.GenerationConfig.from_model_config(config)

    def _engine_options(self) -> dict[str, Any]:
        spec = self.spec
        # room for the longest prompt that we send and its answer: vLLM refuses to start where its cache can't
        # hold one request of the model's whole context
        limit = self.context_length
        options: dict[str, Any] = {
            "model": spec.path,
            "dtype": spec.dtype,
            "trust_remote_code": spec.trust_remote_code,
            "revision": spec.revision,
            "generation_config": "vllm",
            "disable_log_stats": True,
        }
        if spec.memory_share is not None:
            options["gpu_memory_utilization"] = spec.memory_share
        if limit is not None:
            options["max_model_len"] = limit + spec.max_new_tokens
        if self._batch_size is not None:
            options["max_num_seqs"] = self._batch_size
        if not spec.allow_pickle:
            options["load_format"] = "safetensors"
        return {**options, **spec.load}

    def _sampling(self, request: Request) -> Any:
        """vLLM's options for one request: the checkpoint's and zoo.toml's; greedy unless sampling was asked for."""
        from vllm import SamplingParams

        config = self._generation_config
        stops = config.eos_token_id
        options: dict[str, Any] = {
            "max_tokens": self.spec.max_new_tokens,
            "stop_token_ids": stops if isinstance(stops, list) else [stops],
            "skip_special_tokens": True,
            "detokenize": bool(config.stop_strings),
        }
        if stops is None:
            del options["stop_token_ids"]
        for name, theirs in _OPTIONS.items():
            value = getattr(config, name, None)
            if value is not None:
                options[theirs] = value
        if config.do_sample:
            digest = hashlib.blake2b(request.key or str(request.id).encode("utf-8", "replace"), digest_size=4)
            options["seed"] = int.from_bytes(digest.digest(), "big")
        else:
            options["temperature"] = 0.0
        return SamplingParams(**options)

    # --- answering ---

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        """All at once: vLLM makes its own batches, of at most `batch_size`."""
        return [list(range(len(requests)))] if requests else []

    def generate(self, batch: Sequence[Request]) -> list[Generation]:
        """Answer `batch`, in order. Output tokens are those generated, the end token included.

        A prompt that is too long or that the chat template refuses is that request's error. Raises
        ModelError when the engine can't be started or fails.
        """
        self.load()
        answers, prompts = self._prompts(batch)
        if prompts:
            parameters = [self._sampling(batch[index]) for index in prompts]
            outputs = self._answers([list(ids) for ids in prompts.values()], parameters)
            for (index, ids), output in zip(prompts.items(), outputs, strict=True):
                row = list(output.outputs[0].token_ids)
                text = self._tokenizer.decode(row, skip_special_tokens=True)
                if output.outputs[0].finish_reason == "stop" and self._generation_config.stop_strings:
                    text = output.outputs[0].text
                answers[index] = Generation(text.strip(), len(ids), len(row))
        return [answers[index] for index in range(len(batch))]

    def generate_exactly(
        self, prompt_tokens: int, output_tokens: int, batch_size: int
    ) -> Sequence[Generation]:
        """See `messcli.models.backend.Exact`. Prompts are random tokens, the same ones for the same lengths."""
        self.load()
        from vllm import SamplingParams

        parameters = SamplingParams(
            temperature=0.0,
            min_tokens=output_tokens,
            max_tokens=output_tokens,
            ignore_eos=True,
            detokenize=False,
        )
        prompts = self._random_prompts(prompt_tokens, batch_size)
        self._answers([list(ids) for ids in prompts], [parameters] * batch_size)
        return [Generation("", prompt_tokens, output_tokens)] * batch_size

    @property
    def _vocabulary(self) -> int:
        return int(self._config.get_text_config().vocab_size)

    def _answers(self, prompts: Sequence[list[int]], parameters: Sequence[Any]) -> list[Any]:
        with self._logging():
            try:
                outputs: list[Any] = self._engine.generate(
                    [{"prompt_token_ids": ids} for ids in prompts], list(parameters), use_tqdm=False
                )
            except Exception as error:
                told = self._engine_error(error, "failed while answering")
                self.unload()  # an engine that has failed answers nothing any more
                raise told from error
        return outputs

    # --- errors ---

    def _engine_error(self, error: Exception, what: str = "can't be loaded") -> ModelError:
        """An engine's processes tell their parent little more than that they failed; their log has the cause."""
        text = (self._log and self._log.cause()) or f"{type(error).__name__}: {' '.join(str(error).split())}"
        if "memory" in text and any(word in text for word in ("less than", "No available", "out of memory")):
            return self._error(
                f"does not fit into its share of the memory ({text})",
                "Raise or lower memory_share, lower max_prompt_tokens, or give it a larger device",
                ModelTooLarge,
            )
        return self._error(f"{what}: {text}", "Check [models.load] and the model's files")


class _EngineLog:
    """Where vLLM logs while it works for us. Its own place is stdout, which is for data.

    The engine's processes inherit the environment, and so the file.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="messcli-vllm-")
        self._file = Path(self._folder.name) / "log"
        self._config = Path(self._folder.name) / "logging.json"
        handler = {"class": "logging.FileHandler", "filename": str(self._file), "level": "ERROR"}
        loggers = {"vllm": {"handlers": ["file"], "level": "ERROR", "propagate": False}}
        settings = {"version": 1, "disable_existing_loggers": False, "handlers": {"file": handler}}
        self._config.write_text(json.dumps({**settings, "loggers": loggers}), encoding="utf-8")

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Errors go to the file, unless the user has set VLLM_LOGGING_LEVEL: then all goes to stderr."""
        wanted = {"VLLM_NO_USAGE_STATS": "1"}
        if "VLLM_LOGGING_LEVEL" in os.environ:
            wanted["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"
        else:
            wanted["VLLM_LOGGING_CONFIG_PATH"] = str(self._config)
        added = {name: value for name, value in wanted.items() if name not in os.environ}
        os.environ.update(added)
        try:
            yield
        finally:
            for name in added:
                del os.environ[name]

    def cause(self) -> str | None:
        """The first error that the engine logged, in one line: what follows is its echo in other processes."""
        try:
            text = self._file.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        found = re.search(r"^(?:\([^)]*\) )?([A-Za-z_.]*(?:Error|Exception)): (.+)$", text, re.MULTILINE)
        return f"{found[1]}: {found[2]}"[:300].rstrip(".") if found else None

    def close(self) -> None:
        self._folder.cleanup()

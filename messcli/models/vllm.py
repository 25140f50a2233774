"""A model run by vLLM's offline engine: continuous batching and paged attention, on GPUs or a CPU.

Prompts are rendered and tokenized as for `transformers` (untrusted text stays text), and vLLM gets token
ids; so the two backends answer alike, as far as their arithmetic does. Each engine works in processes of its
own, which end when the model is unloaded: their memory comes back whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # carries no types
import transformers

from messcli.errors import ModelError, ModelTooLarge
from messcli.models.backend import Group, confidence_of, group_of, seed_of
from messcli.models.checkpoint import Checkpoint
from messcli.models.processes import child_pids, live_seconds
from messcli.records import Generation, Request
from messcli.zoo import ModelSpec, VllmOptions

INSTALL = "pip install 'messcli[vllm]'"
_GROUP_SECONDS = 1.0  # a group of answers lasts so long,
_GROUP_ANSWERS = 64  # or until so many are done
_STREAM_INTERVAL = 16  # tokens of a request that the engine tells at a time; more is less work for Python
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


@dataclass(slots=True)
class _Running:
    """A request that the engine has, and what it has told of it."""

    index: int
    prompt_tokens: int
    row: list[int] = field(default_factory=list)
    text: str = ""
    log_probabilities: list[float] = field(default_factory=list)
    begun: bool = False

    def take(self, output: Any) -> tuple[int, int]:
        """Fold in what is new; prompt tokens read and output tokens written since the last time."""
        read = 0
        if not self.begun:
            self.begun, read = True, self.prompt_tokens - (output.num_cached_tokens or 0)
        part = output.outputs[0]
        fresh = list(part.token_ids)
        self.row += fresh
        self.text += part.text
        for token, known in zip(fresh, part.logprobs or (), strict=False):
            self.log_probabilities.append(known[token].logprob)
        return max(0, read), len(fresh)


class VllmBackend:
    """One model of the zoo, run by vLLM. See `messcli.models.backend.Backend` for the protocol.

    `load` of zoo.toml passes through to vllm.LLM: tensor_parallel_size, max_model_len, quantization, ...
    """

    def __init__(self, spec: ModelSpec, *, batch_size: int | None) -> None:
        self.spec = spec
        self._own = spec.own(VllmOptions)
        self.checkpoint = Checkpoint(spec, positions=self._own.load.get("max_model_len"))
        self._batch_size = batch_size if batch_size is not None else spec.batch_size
        self.generation_config: Any = None  # of transformers, once it is loaded
        self._engine: Any = None
        self._can_sleep = False
        self._asleep: int | None = None  # vLLM's sleep level
        self._streams = 0
        self._draining = False
        self._log: _EngineLog | None = None
        self._pids: set[int] = set()

    @property
    def occupies_memory(self) -> bool:
        return True

    @property
    def loaded(self) -> bool:
        return self._engine is not None and self._asleep is None

    @property
    def devices(self) -> tuple[str, ...]:
        """The cards that the engine spreads over: as many as its parallel sizes, from the first visible one."""
        import torch

        if self.spec.device == "cpu" or not torch.cuda.is_available():
            return ("cpu",)
        sizes = (self._own.load.get(name, 1) for name in ("tensor_parallel_size", "pipeline_parallel_size"))
        cards = 1
        for size in sizes:
            cards *= int(size)
        return tuple(f"cuda:{index}" for index in range(cards))

    def cpu_seconds(self) -> float:
        return live_seconds(self._pids)

    # --- loading ---

    def load(self) -> None:
        """Start the engine, or wake it; does nothing when it runs. Raises ModelError as `transformers` does."""
        if self._engine is not None:
            self._wake()
            return
        self._check_place()
        config = self.checkpoint.config
        self.checkpoint.check_limits()
        self.generation_config = self.checkpoint.generation_options(self._defaults(config))
        before = child_pids()
        with self._logging():
            try:
                from vllm import LLM
            except ImportError as error:
                self._close_log()
                raise self.checkpoint.error(f"vLLM isn't installed ({error})", INSTALL) from error
            try:
                self._sampling(Request("", ""))
            except ValueError as error:
                self._close_log()
                raise self.checkpoint.error(
                    f"generation: {' '.join(str(error).split())}", "Correct it"
                ) from error
            options = self._engine_options()
            try:
                self._engine = LLM(**options)
                self._can_sleep = bool(options.get("enable_sleep_mode"))
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
        self._asleep = None
        self.generation_config = None
        self._pids = set()
        self._close_log()
        self.checkpoint.forget_prompts()

    def suspend(self) -> None:
        """On a card vLLM's sleep mode; elsewhere the engine ends.

        Level 1 keeps the weights in this host's memory, where there is room for them; level 2 drops them, and
        waking reads them again.
        """
        if self._engine is None or self._asleep is not None:
            return
        if not self._can_sleep:
            self.unload()
            return
        weights = self._weight_bytes()
        level = 1 if weights is not None and weights < psutil.virtual_memory().available else 2
        with self._failing("can't be put to sleep"):
            self._engine.sleep(level=level)
        self._asleep = level

    def resume(self) -> None:
        self.load()

    def _wake(self) -> None:
        if self._asleep is None:
            return
        with self._failing("can't be woken"):
            if self._asleep == 1:
                self._engine.wake_up()
            else:
                self._engine.wake_up(tags=["weights"])
                self._engine.collective_rpc("reload_weights")
                self._engine.wake_up(tags=["kv_cache"])
        self._asleep = None

    def _weight_bytes(self) -> int | None:
        """Of the checkpoint's files; None where they can't be found."""
        folder = Path(self.spec.path)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            try:
                found = snapshot_download(
                    self.spec.path,
                    revision=self._own.revision,
                    allow_patterns=["*.safetensors"],
                    local_files_only=True,
                )
            except Exception:  # whatever the hub's library raises, the size isn't known
                return None
            folder = Path(found)
        sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
        return sum(sizes) or None

    @contextlib.contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        """An engine that fails is ended: it answers nothing any more. Raises ModelError with its own words."""
        with self._logging():
            try:
                yield
            except Exception as error:
                told = self._engine_error(error, what)
                self.unload()
                raise told from error

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
            raise self.checkpoint.error(
                f"{self.spec.device}: vLLM takes the first visible card",
                'Choose it by CUDA_VISIBLE_DEVICES, or serve the model and set backend = "openai"',
            )
        for name, own in _OWN_FIELD.items():
            if name in self._own.load:
                cure = f"Set {own} on the model itself" if own else "Remove it from zoo.toml"
                raise self.checkpoint.error(f"load.{name}: messcli sets this itself", cure)
        unknown = next((name for name in self.spec.generation if name not in _UNDERSTOOD), None)
        if unknown is not None:
            raise self.checkpoint.error(
                f"generation.{unknown}: vLLM has no such option",
                f"Known are {', '.join(sorted(_UNDERSTOOD))}",
            )

    def _defaults(self, config: Any) -> Any:
        """The checkpoint's own generation options."""
        try:
            return transformers.GenerationConfig.from_pretrained(
                self.spec.path, **self.checkpoint.file_options()
            )
        except OSError:  # it has none
            return transformers.GenerationConfig.from_model_config(config)

    def _engine_options(self) -> dict[str, Any]:
        spec = self.spec
        # room for the longest prompt that we send and its answer: vLLM refuses to start where its cache can't
        # hold one request of the model's whole context
        limit = self.context_length
        options: dict[str, Any] = {
            "model": spec.path,
            "dtype": self._own.dtype,
            "trust_remote_code": self._own.trust_remote_code,
            "revision": self._own.revision,
            "generation_config": "vllm",
            "disable_log_stats": True,
        }
        if self._own.memory_share is not None:
            options["gpu_memory_utilization"] = self._own.memory_share
        if limit is not None:
            options["max_model_len"] = limit + spec.max_new_tokens
        if self._batch_size is not None:
            options["max_num_seqs"] = self._batch_size
        if not self._own.allow_pickle:
            options["load_format"] = "safetensors"
        if self.devices[0] != "cpu":
            options["enable_sleep_mode"] = True
        if "stream_interval" in _engine_argument_names():
            options["stream_interval"] = _STREAM_INTERVAL
        return {**options, **self._own.load}

    def _sampling(self, request: Request) -> Any:
        """vLLM's options for one request: the checkpoint's and zoo.toml's; greedy unless sampling was asked for."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        config = self.generation_config
        stops = config.eos_token_id
        options: dict[str, Any] = {
            "max_tokens": self.spec.max_new_tokens,
            "stop_token_ids": stops if isinstance(stops, list) else [stops],
            "skip_special_tokens": True,
            "detokenize": bool(config.stop_strings),
            "logprobs": 0,  # of the chosen token alone
            "output_kind": RequestOutputKind.DELTA,
        }
        if stops is None:
            del options["stop_token_ids"]
        for name, theirs in _OPTIONS.items():
            value = getattr(config, name, None)
            if value is not None:
                options[theirs] = value
        if config.do_sample:
            options["seed"] = seed_of(request)
        else:
            options["temperature"] = 0.0
        return SamplingParams(**options)

    # --- prompts ---

    @property
    def context_length(self) -> int | None:
        return self.checkpoint.context_length

    def prompt_tokens(self, request: Request) -> int:
        """Tokens of the rendered prompt, special tokens included. Loads the tokenizer, never the weights."""
        return self.checkpoint.encoder.length(request)

    # --- answering ---

    def stream(self, requests: Sequence[Request]) -> Iterator[Group]:
        """The engine gets the whole share at once, and batches it by itself. See `messcli.models.backend.Backend`.

        Requests are given in the order of their prompts' tokens, so that shared beginnings meet in its cache.
        """
        if not requests:
            return
        self.load()
        refused, prompts = self.checkpoint.prompts(requests)
        if refused:
            yield group_of(refused)
        self._streams += 1
        self._draining = False
        names = {index: f"{self._streams}-{index}" for index in sorted(prompts, key=prompts.__getitem__)}
        running: dict[str, _Running] = {}
        engine = self._engine.llm_engine
        try:
            with self._failing("failed while answering"):
                for index, name in names.items():
                    ids = list(prompts[index])
                    engine.add_request(name, {"prompt_token_ids": ids}, self._sampling(requests[index]))
                    running[name] = _Running(index, len(ids))
            while running:
                with self._failing("failed while answering"):
                    if self._draining:
                        self._drop(
                            engine, [name for name, request in running.items() if not request.begun], running
                        )
                    group = self._group(engine, running)
                yield group
        finally:
            if running and self._engine is not None:
                self._drop(engine, list(running), running)

    def drain(self) -> None:
        """See `messcli.models.backend.Draining`."""
        self._draining = True

    @staticmethod
    def _drop(engine: Any, names: Sequence[str], running: dict[str, _Running]) -> None:
        if names:
            engine.abort_request(list(names))
        for name in names:
            del running[name]

    def _group(self, engine: Any, running: dict[str, _Running]) -> Group:
        """Step until a group is full; what has finished leaves `running`."""
        until = time.monotonic() + _GROUP_SECONDS
        finished: list[tuple[int, Generation]] = []
        work: dict[int, tuple[int, int]] = {}
        while running and len(finished) < _GROUP_ANSWERS and (not work or time.monotonic() < until):
            for output in engine.step():
                request = running.get(output.request_id)
                if request is None:
                    continue  # of a stream that was closed
                read, written = request.take(output)
                before = work.get(request.index, (0, 0))
                work[request.index] = (before[0] + read, before[1] + written)
                if output.finished:
                    del running[output.request_id]
                    finished.append((request.index, self._answer(request, output.outputs[0].finish_reason)))
        return Group(finished, work)

    def _answer(self, request: _Running, finish: str | None) -> Generation:
        text = request.text
        if not self.generation_config.stop_strings:  # vLLM cuts at them; without them it needn't make text
            text = str(self.checkpoint.tokenizer.decode(request.row, skip_special_tokens=True))
        return Generation(
            text.strip(),
            request.prompt_tokens,
            len(request.row),
            finish=finish,
            confidence=confidence_of(request.log_probabilities),
        )

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        """All at once: vLLM makes its own batches."""
        return [list(range(len(requests)))] if requests else []

    def generate(self, batch: Sequence[Request]) -> list[Generation]:
        """Answer `batch`, in order. Output tokens are those generated, the end token included.

        A prompt that is too long or that the chat template refuses is that request's error. Raises
        ModelError when the engine can't be started or fails.
        """
        answers = {index: answer for group in self.stream(batch) for index, answer in group.finished}
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
        vocabulary = int(self.checkpoint.config.get_text_config().vocab_size)
        prompts = self.checkpoint.random_prompts(vocabulary, prompt_tokens, batch_size)
        with self._failing("failed while answering"):
            self._engine.generate(
                [{"prompt_token_ids": list(ids)} for ids in prompts],
                [parameters] * batch_size,
                use_tqdm=False,
            )
        return [Generation("", prompt_tokens, output_tokens)] * batch_size

    # --- errors ---

    def _engine_error(self, error: Exception, what: str = "can't be loaded") -> ModelError:
        """An engine's processes tell their parent little more than that they failed; their log has the cause."""
        text = (self._log and self._log.cause()) or f"{type(error).__name__}: {' '.join(str(error).split())}"
        if "memory" in text and any(word in text for word in ("less than", "No available", "out of memory")):
            return self.checkpoint.error(
                f"does not fit into its share of the memory ({text})",
                "Raise or lower memory_share, lower max_prompt_tokens, or give it a larger device",
                ModelTooLarge,
            )
        return self.checkpoint.error(f"{what}: {text}", "Check [models.load] and the model's files")


def _engine_argument_names() -> set[str]:
    from vllm import EngineArgs

    return {option.name for option in fields(EngineArgs)}


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

"""A model run by vLLM's offline engine: continuous batching and paged attention, on GPUs or a CPU.

Prompts are rendered and tokenized as for `transformers` (untrusted text stays text), and vLLM gets token
ids; so the two backends answer alike, as far as their arithmetic does. Each engine works in processes of its
own, which end when the model is unloaded: their memory comes back whole.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import tempfile
import threading
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # carries no types
import transformers

from messcli.adapter import Adapter, read_adapter
from messcli.errors import ModelError, ModelTooLarge, ModelUnavailable, ZooError
from messcli.models.backend import Group, confidence_of, group_of, seed_of
from messcli.models.checkpoint import Checkpoint
from messcli.models.processes import all_alive, child_pids, live_seconds
from messcli.records import Generation, Request
from messcli.zoo import ModelSpec, VllmOptions

INSTALL = "pip install 'messcli[vllm]'"
_GROUP_SECONDS = 1.0  # a group of answers lasts so long,
_GROUP_ANSWERS = 64  # or until so many are done
_LIVENESS_SECONDS = 0.5  # between two looks whether an engine's processes are there; a look takes 0.1 ms
_MOST_LOGPROBS = 20  # of the likeliest tokens: vLLM's own limit, unless load.max_logprobs says another
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
# What SamplingParams has and transformers doesn't: how many tokens a model may think
_ALONE = ("thinking_token_budget",)
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
    options: Sequence[str] = ()  # wanted in place of a text
    likely: dict[int, float] = field(
        default_factory=dict
    )  # log-probabilities of the first token, where options are
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
            if self.options and not self.likely:
                self.likely = {other: one.logprob for other, one in known.items()}
        return max(0, read), len(fresh)


# ranks that vLLM keeps room for; it refuses others
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class _Engine:
    """vLLM's engine and its processes, for all models of the zoo that run on its weights."""

    def __init__(self, first: VllmBackend) -> None:
        self.members = [first]
        self.llm: Any = None
        self.can_sleep = False
        self.asleep: int | None = None  # vLLM's sleep level
        self.streams = 0
        self.pids: set[int] = set()
        self.log: _EngineLog | None = None
        self._holders: set[str] = set()

    def hold(self, name: str) -> None:
        self._holders.add(name)

    def release(self, name: str) -> None:
        """The model `name` doesn't run on it any more; when nobody does, its processes end."""
        self._holders.discard(name)
        if not self._holders:
            self.stop()

    def stop(self) -> None:
        """End the processes, and with them what they hold."""
        llm, self.llm = self.llm, None
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
            del llm
        self.asleep, self.pids = None, set()
        self.close_log()

    def close_log(self) -> None:
        if self.log is not None:
            self.log.close()
            self.log = None

    @contextlib.contextmanager
    def logging(self) -> Iterator[None]:
        if self.log is None:
            self.log = _EngineLog()
        with self.log.kept():
            yield

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Within it, waiting for answers raises once a process of the engine has ended.

        vLLM's own client (0.32) waits for good then: it notices, and wakes nobody who waits.
        """
        answers = getattr(self.llm.llm_engine.engine_core, "outputs_queue", None)
        if answers is None or not self.pids:  # it runs in this process
            yield
            return
        over = threading.Event()

        def watch(wakes: Any = answers) -> None:
            while not over.wait(_LIVENESS_SECONDS):
                if not all_alive(self.pids):
                    wakes.put_nowait(RuntimeError("a process of the engine has ended"))
                    return

        watcher = threading.Thread(target=watch, name="messcli-vllm", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()

    def adapters(self) -> list[str]:
        """The folders of its models' adapters, each once. Their places, from 1, are their numbers in vLLM."""
        folders = [member.spec.own(VllmOptions).adapter for member in self.members]
        return list(dict.fromkeys(folder for folder in folders if folder is not None))


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
        self._engine = _Engine(self)
        self._draining = False

    @property
    def occupies_memory(self) -> bool:
        return True

    @property
    def weights(self) -> Hashable:
        """See `messcli.models.backend.SharesWeights`."""
        return self.spec.weights

    def share(self, other: Any) -> None:
        """See `messcli.models.backend.SharesWeights`."""
        self._engine = other._engine
        self._engine.members.append(self)

    @property
    def loaded(self) -> bool:
        engine = self._engine
        return engine.llm is not None and engine.asleep is None and self.generation_config is not None

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
        engine = self._engine
        return live_seconds(engine.pids) if engine.members[0] is self else 0.0  # once for all

    # --- loading ---

    def load(self) -> None:
        """Start the engine, or wake it; does nothing when it runs. Raises ModelError as `transformers` does."""
        engine = self._engine
        if engine.llm is not None:
            self._wake()
        if self.loaded:
            return
        self._check_place()
        config = self.checkpoint.config
        self.checkpoint.check_limits()
        adapter = self._adapter()
        if adapter is not None and (base := Path(self.spec.path)).is_dir():
            adapter.check_files(base)
        options = self.checkpoint.generation_options(self._defaults(config), without=_ALONE)
        if engine.llm is None:
            self.generation_config = options
            self._start()
        self.generation_config = options
        engine.hold(self.spec.name)

    def _start(self) -> None:
        engine = self._engine
        before = child_pids()
        with engine.logging():
            try:
                from vllm import LLM
            except ImportError as error:
                self._give_up()
                raise self.checkpoint.error(f"vLLM isn't installed ({error})", INSTALL) from error
            try:
                self._sampling(Request("", ""))
            except Exception as error:  # ValueError, one of its own, or TypeError: this vLLM lacks the option
                self._give_up()
                raise self.checkpoint.error(
                    f"generation: {' '.join(str(error).split())}", "Correct it"
                ) from error
            try:
                options = self._engine_options()
                engine.llm = LLM(**options)
                engine.can_sleep = bool(options.get("enable_sleep_mode"))
            except ZooError:  # another model's adapter
                self._give_up()
                raise
            except Exception as error:
                told = self._engine_error(error)
                self._give_up()
                raise told from error
        engine.pids = child_pids() - before

    def _give_up(self) -> None:
        self.generation_config = None
        self._engine.close_log()

    def _adapter(self) -> Adapter | None:
        folder = self._own.adapter
        return None if folder is None else read_adapter(Path(folder), self.spec.name)

    def _lora(self) -> Any:
        """What vLLM is told of a request's adapter; None: it has none."""
        folder = self._own.adapter
        if folder is None:
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest(folder, 1 + self._engine.adapters().index(folder), folder)

    def unload(self) -> None:
        """End the engine's processes, and with them what they hold, where no other model runs on it."""
        self.generation_config = None
        self.checkpoint.forget_prompts()
        self._engine.release(self.spec.name)

    def suspend(self) -> None:
        """On a card vLLM's sleep mode; elsewhere the engine ends.

        Level 1 keeps the weights in this host's memory, where there is room for them; level 2 drops them, and
        waking reads them again.
        """
        engine = self._engine
        if engine.llm is None or engine.asleep is not None:
            return
        weights = self._weight_bytes()
        level = 1 if weights is not None and weights < psutil.virtual_memory().available else 2
        if not engine.can_sleep or (
            level == 2 and engine.adapters()
        ):  # level 2 reads only the checkpoint again
            engine.stop()
            return
        with self._failing("can't be put to sleep"):
            engine.llm.sleep(level=level)
        engine.asleep = level

    def resume(self) -> None:
        self.load()

    def _wake(self) -> None:
        engine = self._engine
        if engine.asleep is None:
            return
        with self._failing("can't be woken"):
            if engine.asleep == 1:
                engine.llm.wake_up()
            else:
                engine.llm.wake_up(tags=["weights"])
                engine.llm.collective_rpc("reload_weights")
                engine.llm.wake_up(tags=["kv_cache"])
        engine.asleep = None

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
    def _failing(self, what: str, kind: type[ModelError] = ModelError) -> Iterator[None]:
        """An engine that fails is ended: it answers nothing any more. Raises an error of `kind` with its own words."""
        with self._engine.logging():
            try:
                yield
            except Exception as error:
                told = self._engine_error(error, what, kind)
                self._engine.stop()
                raise told from error

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
        unknown = next((name for name in self.spec.generation if name not in (*_UNDERSTOOD, *_ALONE)), None)
        if unknown is not None:
            raise self.checkpoint.error(
                f"generation.{unknown}: vLLM has no such option",
                f"Known are {', '.join(sorted((*_UNDERSTOOD, *_ALONE)))}",
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
        members = self._engine.members
        limits = [(one.context_length, one.spec.max_new_tokens) for one in members]
        rows = [one._batch_size for one in members]
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
        whole = [limit + most for limit, most in limits if limit is not None]
        if len(whole) == len(members):
            options["max_model_len"] = max(whole)
        stated = [most for most in rows if most is not None]
        if len(stated) == len(members):
            options["max_num_seqs"] = max(stated)
        if adapters := [adapter for one in members if (adapter := one._adapter()) is not None]:
            rank = max(adapter.rank for adapter in adapters)
            options["enable_lora"] = True
            options["max_loras"] = len(self._engine.adapters())
            options["max_lora_rank"] = next((room for room in _RANKS if room >= rank), rank)
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

        if request.options:
            return self._weighing(request.options)
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
        options.update((name, self.spec.generation[name]) for name in _ALONE if name in self.spec.generation)
        if config.do_sample:
            options["seed"] = seed_of(request)
        else:
            options["temperature"] = 0.0
        return SamplingParams(**options)

    def _weighing(self, options: Sequence[str]) -> Any:
        """vLLM's options for one token that is one of `options`, with the likeliest tokens' log-probabilities.

        An option that is neither the one written nor among these is less likely than all of them: it counts 0.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        ids = self.checkpoint.option_ids(options)
        allowed = [token for own in ids for token in own if isinstance(token, int)]
        most = int(self._own.load.get("max_logprobs", _MOST_LOGPROBS))
        return SamplingParams(
            temperature=0.0,
            max_tokens=1,
            allowed_token_ids=allowed,
            logprobs=_MOST_LOGPROBS if most < 0 else min(most, _MOST_LOGPROBS),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    # --- prompts ---

    @property
    def context_length(self) -> int | None:
        return self.checkpoint.context_length

    def take_warnings(self) -> list[str]:
        """See `messcli.models.backend.Warns`."""
        return self.checkpoint.take_warnings()

    def prompt_tokens(self, request: Request) -> int:
        """Tokens of the rendered prompt, special tokens included. Loads the tokenizer, never the weights."""
        return self.checkpoint.encoder.length(request)

    def cannot_weigh(self, options: Sequence[str]) -> str | None:
        """See `messcli.models.backend.Weighs`."""
        ids = self.checkpoint.option_ids(options)
        return ids if isinstance(ids, str) else None

    # --- answering ---

    def stream(self, requests: Sequence[Request]) -> Iterator[Group]:
        """The engine gets the whole share at once, and batches it by itself. See `messcli.models.backend.Backend`.

        Requests are given in the order of their prompts' tokens, so that shared beginnings meet in its cache.
        Raises ModelUnavailable when the engine dies: the next stream starts it anew.
        """
        if not requests:
            return
        self.load()
        refused, prompts = self.checkpoint.prompts(requests)
        for options in {request.options for request in requests if request.options}:
            if isinstance(why := self.checkpoint.option_ids(options), str):
                for index in [index for index in prompts if requests[index].options == options]:
                    tokens = len(prompts.pop(index))
                    refused[index] = Generation(None, tokens, 0, error=why, fault="request")
        if refused:
            yield group_of(refused)
        self._engine.streams += 1
        self._draining = False
        names = {
            index: f"{self._engine.streams}-{index}" for index in sorted(prompts, key=prompts.__getitem__)
        }
        running: dict[str, _Running] = {}
        engine, lora = self._engine.llm.llm_engine, self._lora()
        try:
            with self._failing("failed while answering", ModelUnavailable):
                for index, name in names.items():
                    ids = list(prompts[index])
                    sampling = self._sampling(requests[index])
                    engine.add_request(name, {"prompt_token_ids": ids}, sampling, lora_request=lora)
                    running[name] = _Running(index, len(ids), options=requests[index].options)
            while running:
                with self._failing("failed while answering", ModelUnavailable), self._engine.watched():
                    if self._draining:
                        self._drop(
                            engine, [name for name, request in running.items() if not request.begun], running
                        )
                    group = self._group(engine, running)
                yield group
        finally:
            if running and self._engine.llm is not None:
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
        if request.options:
            ids = self.checkpoint.option_ids(request.options)
            weights = [
                math.fsum(math.exp(request.likely[token]) for token in own if token in request.likely)
                for own in ids
                if not isinstance(own, str)
            ]
            return self.checkpoint.weighed(request.prompt_tokens, request.options, weights)
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
            self._engine.llm.generate(
                [{"prompt_token_ids": list(ids)} for ids in prompts],
                [parameters] * batch_size,
                use_tqdm=False,
                lora_request=self._lora(),
            )
        return [Generation("", prompt_tokens, output_tokens)] * batch_size

    # --- errors ---

    def _engine_error(
        self, error: Exception, what: str = "can't be loaded", kind: type[ModelError] = ModelError
    ) -> ModelError:
        """An engine's processes tell their parent little more than that they failed; their log has the cause."""
        text = (
            self._engine.log and self._engine.log.cause()
        ) or f"{type(error).__name__}: {' '.join(str(error).split())}"
        if "memory" in text and any(word in text for word in ("less than", "No available", "out of memory")):
            return self.checkpoint.error(
                f"does not fit into its share of the memory ({text})",
                "Raise or lower memory_share, lower max_prompt_tokens, or give it a larger device",
                ModelTooLarge,
            )
        return self.checkpoint.error(f"{what}: {text}", "Check [models.load] and the model's files", kind)


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

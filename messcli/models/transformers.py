"""A model run by Hugging Face transformers: causal or seq2seq, on a CPU, one card or several.

Greedy decoding is the rule: sampling happens only where zoo.toml asks for it, seeded by the request, so
an answer never depends on what else was in its batch. In float32 a batch equals single requests token for
token; in half precision the order of sums may turn near ties.

How a request becomes tokens is `prompts.py`'s.
"""

from __future__ import annotations

import copy
import difflib
import gc
import hashlib
import os
import random
import threading
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging as transformers_logging

from messcli.errors import ModelError, ModelTooLarge, first_line
from messcli.models.backend import Group, InBatches, collector_paused, group_of
from messcli.models.prompts import PromptEncoder, key_of
from messcli.records import Generation, Request
from messcli.zoo import ModelSpec

_LARGEST_BATCH = {"cuda": 64, "cpu": 32}  # beyond these, throughput is flat and latency is not
_BATCH_WITHOUT_SIZES = 8  # where the config does not say how large its key-value cache is
_MEMORY_SHARE = 0.5  # of the free memory for the cache; the rest is for activations
_SAMPLING_OPTIONS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
# options of from_pretrained that say where files lie, and so hold for config and tokenizer too
_WHERE_FILES_ARE = ("gguf_file", "subfolder", "cache_dir", "token", "local_files_only", "code_revision")
_OWN_OPTIONS = ("num_return_sequences", "return_dict_in_generate", "output_scores", "output_logits")

# torch keeps one generator per device in the process, and manual_seed sets them all
_SAMPLING_LOCK = threading.Lock()


class TransformersBackend(InBatches):
    """One model of the zoo, loaded by transformers. See `messcli.models.backend.Backend` for the protocol."""

    def __init__(self, spec: ModelSpec, *, batch_size: int | None) -> None:
        """`batch_size` None: spec.batch_size, else chosen by memory. Nothing is read before it is needed."""
        self.spec = spec
        self._batch_size = batch_size if batch_size is not None else spec.batch_size
        self._cached_config: Any = None
        self._cached_tokenizer: Any = None
        self._model: Any = None
        self._generation_config: Any = None
        self._cached_encoder: PromptEncoder | None = None
        self._token_budget: int | None = None  # rows x tokens that a batch may take, learnt from running out

    # --- loading ---

    @property
    def occupies_memory(self) -> bool:
        return True

    @property
    def loaded(self) -> bool:
        return self._model is not None

    @property
    def devices(self) -> tuple[str, ...]:
        """Where the weights are; before loading, where `device` says that they will be."""
        if self._model is not None:
            return _devices_of(self._model)
        if self.spec.device != "auto":
            return (self.spec.device,)
        cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return tuple(f"cuda:{index}" for index in range(cards)) or ("cpu",)

    def load(self) -> None:
        """Load config, tokenizer and weights; does nothing when they are loaded.

        Raises ModelError naming model, path and cure: missing or pickled weights, a hub that can't be
        reached, gated models, code that would have to be trusted, a missing card, too little memory.
        """
        if self._model is not None:
            return
        self._check_device()
        config = self._config
        self._check_limits(config)
        _ = self._tokenizer
        kind = (
            transformers.AutoModelForSeq2SeqLM
            if config.is_encoder_decoder
            else transformers.AutoModelForCausalLM
        )
        options = self._load_options()
        try:
            with collector_paused():
                model, report = kind.from_pretrained(self.spec.path, **options, output_loading_info=True)
        except Exception as error:
            _free_memory()
            raise self._explained(error) from error
        # transformers fills what a checkpoint lacks with random numbers and goes on
        if missing := sorted(report.get("missing_keys", ())):
            raise self._error(
                f"the checkpoint lacks {len(missing)} of the model's weights ({missing[0]} is one)",
                "Get a complete checkpoint",
            )
        model.eval()
        self._generation_config = self._generation_options(model.generation_config)
        self._model = model
        try:
            self._warm_up()
        except ModelError:
            self.unload()
            raise
        # generate() fills what is None in ours from the model's own, sampling temperature included
        model.generation_config = self._generation_config

    def _warm_up(self) -> None:
        """One token, so that what happens once (lazy imports, kernels) is billed to loading, not to a request."""
        config = copy.deepcopy(self._generation_config)
        config.update(min_new_tokens=1, max_new_tokens=1, stop_strings=None)
        self._model.generation_config = config
        self._run([array("l", [0])], Request("warm-up", ""), config)
        self._synchronize()

    def unload(self) -> None:
        """Drop the weights and give their memory back; the tokenizer stays."""
        self._model = None
        self._generation_config = None
        self._cached_encoder = None
        _free_memory()

    @property
    def _config(self) -> Any:
        if self._cached_config is None:
            _quiet()
            self._check_folder()
            try:
                with collector_paused():  # the first one imports a quarter of transformers
                    self._cached_config = transformers.AutoConfig.from_pretrained(
                        self.spec.path, **self._file_options()
                    )
            except Exception as error:
                raise self._explained(error) from error
        return self._cached_config

    @property
    def _tokenizer(self) -> Any:
        if self._cached_tokenizer is None:
            _ = self._config  # the same files, told about in its words first
            options = {**self._file_options(), **self.spec.tokenizer}
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(self.spec.path, **options)
            except Exception as error:
                raise self._explained(error) from error
            if self.spec.chat_template and not tokenizer.chat_template:
                raise self._error(
                    "chat_template = true, but the tokenizer has no chat template",
                    "Remove chat_template from zoo.toml, or use the instruction-tuned model",
                )
            self._cached_tokenizer = tokenizer
        return self._cached_tokenizer

    def _file_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "trust_remote_code": self.spec.trust_remote_code
        }  # None would ask on stdin
        if self.spec.revision is not None:
            options["revision"] = self.spec.revision
        if Path(self.spec.path).is_dir():
            options["local_files_only"] = True
        options.update((key, self.spec.load[key]) for key in _WHERE_FILES_ARE if key in self.spec.load)
        return options

    def _load_options(self) -> dict[str, Any]:
        # renamed in transformers 4.56; the old name warns in 5
        version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
        dtype = "dtype" if version >= (4, 56) else "torch_dtype"
        options = {dtype: self.spec.dtype, "device_map": self.spec.device, **self.spec.load}
        options.update(self._file_options())
        # None still prefers safetensors, and falls back to pickle with torch's weights_only unpickler
        options["use_safetensors"] = None if self.spec.allow_pickle else True
        if isinstance(options.get("max_memory"), Mapping):  # TOML has no integer keys, accelerate wants them
            options["max_memory"] = {
                int(key) if key.isdigit() else key: value for key, value in options["max_memory"].items()
            }
        if isinstance(options.get("quantization_config"), Mapping):
            options["quantization_config"] = self._quantization(options["quantization_config"])
        return options

    def _quantization(self, table: Mapping[str, Any]) -> Any:
        from transformers.quantizers.auto import AutoQuantizationConfig

        try:
            return AutoQuantizationConfig.from_dict(dict(table))
        except Exception as error:
            raise self._error(
                f"load.quantization_config: {first_line(error)}",
                "Give quant_method and its options as transformers documents them",
            ) from error

    def _generation_options(self, defaults: Any) -> Any:
        """The checkpoint's own options under zoo.toml's; greedy unless zoo.toml says do_sample."""
        options = dict(self.spec.generation)
        tokenizer = self._tokenizer
        for own in _OWN_OPTIONS:
            if own in options:
                raise self._error(f"generation.{own}: messcli sets this itself", "Remove it from zoo.toml")
        config = copy.deepcopy(defaults)
        if not options.get("do_sample"):
            useless = [key for key in _SAMPLING_OPTIONS if options.pop(key, 0)]
            if useless:
                raise self._error(
                    f"generation.{useless[0]} has no effect without sampling",
                    "Add do_sample = true to [models.generation], or remove it",
                )
            options["do_sample"] = False
            options.update((key, None) for key in _SAMPLING_OPTIONS if hasattr(config, key))
        language = options.pop("forced_bos_token", None)  # NLLB, M2M100: the target language's token, by name
        if language is not None:
            options["forced_bos_token_id"] = self._token_id("generation.forced_bos_token", language)
        if "eos_token_id" not in options:
            stops = config.eos_token_id
            stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
            # chat models often end a turn with a token that only their tokenizer calls the end
            known = [stop for stop in (*stops, tokenizer.eos_token_id) if stop is not None]
            options["eos_token_id"] = list(dict.fromkeys(known)) or None
        if "pad_token_id" not in options:
            stops = options["eos_token_id"]
            first_stop = stops[0] if isinstance(stops, list) else stops
            pads = (config.pad_token_id, tokenizer.pad_token_id, first_stop, 0)
            options["pad_token_id"] = next(pad for pad in pads if pad is not None)
        options.update(
            max_new_tokens=self.spec.max_new_tokens,
            max_length=None,  # the checkpoint's own limit would contradict ours
            num_return_sequences=1,
            return_dict_in_generate=False,
        )
        try:
            unknown = config.update(**options)
        except (ValueError, TypeError) as error:
            raise self._error(f"generation: {first_line(error)}", "Correct it in zoo.toml") from error
        if unknown:
            name = next(iter(unknown))
            close = difflib.get_close_matches(name, config.to_dict(), n=1)
            cure = f"Did you mean {close[0]}?" if close else "Its options are those of GenerationConfig"
            raise self._error(f"generation.{name}: transformers knows no such option", cure)
        return config

    def _token_id(self, field: str, token: object) -> int:
        tokenizer = self._tokenizer
        index = tokenizer.convert_tokens_to_ids(token) if isinstance(token, str) else None
        if index is None or index == tokenizer.unk_token_id:
            raise self._error(f"{field}: the tokenizer has no token {token!r}", "Correct it in zoo.toml")
        return int(index)

    # --- limits ---

    @property
    def context_length(self) -> int | None:
        """The most prompt tokens that leave room for max_new_tokens; None where the model states no limit.

        The config's number of positions; for seq2seq the encoder's. Models with relative positions (T5)
        state none. zoo.toml's max_prompt_tokens lowers it.
        """
        limits = [self.spec.max_prompt_tokens, self._model_limit()]
        return min((limit for limit in limits if limit is not None), default=None)

    def _model_limit(self) -> int | None:
        config = self._config
        text = config.get_text_config()
        positions = _first_attribute(
            config if config.is_encoder_decoder else text,
            ("max_encoder_position_embeddings", "max_position_embeddings", "max_source_positions"),
        )
        if positions is None and not hasattr(config, "relative_attention_num_buckets"):
            stated = self._tokenizer.model_max_length
            positions = stated if stated < 10**9 else None  # transformers writes 1e30 for "not stated"
        if positions is None or config.is_encoder_decoder:
            return positions
        return max(0, positions - self.spec.max_new_tokens)

    def _check_limits(self, config: Any) -> None:
        wanted = self.spec.max_new_tokens
        positions = _first_attribute(
            config if config.is_encoder_decoder else config.get_text_config(),
            ("max_decoder_position_embeddings", "max_position_embeddings", "max_target_positions"),
        )
        if positions is not None and wanted >= positions:
            raise self._error(
                f"max_new_tokens = {wanted}, but the model has {positions} positions in all",
                "Lower max_new_tokens in zoo.toml",
            )

    def _check_device(self) -> None:
        if not self.spec.device.startswith("cuda"):
            return
        cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if cards == 0:
            raise self._error(
                f"{self.spec.device} asked but torch sees no GPU",
                'Set device = "cpu" or "auto" in zoo.toml, or install a CUDA build of torch',
            )
        index = int(self.spec.device.partition(":")[2] or 0)
        if index >= cards:
            raise self._error(
                f"{self.spec.device} asked but torch sees {cards} GPU(s), cuda:0 to cuda:{cards - 1}",
                "Correct device in zoo.toml",
            )

    def _check_folder(self) -> None:
        """What can be told about a folder without transformers, in better words than its."""
        root = Path(self.spec.path)
        if not root.is_dir():
            if root.is_absolute():
                raise self._error(
                    "there is no such folder", "Correct path in zoo.toml, or download the model"
                )
            return
        folder = root / str(self.spec.load.get("subfolder", ""))
        if "gguf_file" in self.spec.load:
            return
        if not (folder / "config.json").is_file():
            raise self._error(
                "the folder has no config.json",
                "Point path at a folder written by save_pretrained, or name a gguf_file in [models.load]",
            )
        if self.spec.allow_pickle or any(folder.glob("*.safetensors")):
            return
        if any(file for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(kind)):
            raise self._error(
                "the weights are pickled and there are no safetensors; loading a pickle can run code in it",
                "Convert them to safetensors, or set allow_pickle = true if you trust their author",
            )
        raise self._error("the folder has no *.safetensors", "Download the model's weights into it")

    # --- prompts ---

    @property
    def _encoder(self) -> PromptEncoder:
        if self._cached_encoder is None:
            self._cached_encoder = PromptEncoder(self.spec, self._tokenizer)
        return self._cached_encoder

    def prompt_tokens(self, request: Request) -> int:
        """Tokens of the rendered prompt, special tokens included. Loads the tokenizer, never the weights.

        A chat that the model's template refuses counts as plain text here; `generate` says what is wrong.
        """
        return self._encoder.length(request)

    # --- answering ---

    def stream(self, requests: Sequence[Request]) -> Iterator[Group]:
        """Batches over the whole share, longest first; each is a group. See `messcli.models.backend.Backend`.

        A batch is as large as memory allows when its turn comes, so that what ran out of memory once is
        not tried again.
        """
        if not requests:
            return
        self.load()
        refused, prompts = self._prompts(requests)
        if refused:
            yield group_of(refused)
        waiting = sorted(prompts, key=lambda index: -len(prompts[index]))  # sorted() is stable
        while waiting:
            size = self._rows(len(prompts[waiting[0]]))
            batch, waiting = waiting[:size], waiting[size:]
            yield group_of(self._answered({index: prompts[index] for index in batch}, requests))

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        """Batches of indices, longest prompts first, so that what runs out of memory does so at once.

        Batches hold prompts of similar length. Their size is the one asked for, or as many as half of the
        device's free memory can cache, at most 64 on a GPU and 32 on a CPU.
        """
        lengths = [self.prompt_tokens(request) for request in requests]
        order = sorted(range(len(requests)), key=lambda index: -lengths[index])  # sorted() is stable
        batches: list[list[int]] = []
        while order:
            size = self._rows(lengths[order[0]])
            batches.append(order[:size])
            order = order[size:]
        return batches

    def _rows(self, prompt_tokens: int) -> int:
        """How many prompts of at most `prompt_tokens` make a batch."""
        most, budget = self._batch_limits()
        if budget is None:
            return most
        return max(1, min(most, budget // (prompt_tokens + self.spec.max_new_tokens)))

    def _batch_limits(self) -> tuple[int, int | None]:
        """The most rows of a batch, and the most rows x tokens (None: any), by memory and by what ran out."""
        if self._batch_size is not None:
            return self._batch_size, self._token_budget
        on_gpu = self.devices[0].startswith("cuda")
        most = _LARGEST_BATCH["cuda" if on_gpu else "cpu"]
        per_token = _cache_bytes_per_token(self._config, self._model_dtype())
        if per_token is None:
            return _BATCH_WITHOUT_SIZES, self._token_budget
        # a checkpoint may search by itself: Marian's do with 4 to 6 beams
        stated = getattr(self._generation_config, "num_beams", None)
        beams = int(stated or self.spec.generation.get("num_beams", 1))
        budget = int(_free_bytes(self.devices) * _MEMORY_SHARE / (per_token * beams))
        return most, budget if self._token_budget is None else min(budget, self._token_budget)

    def _model_dtype(self) -> torch.dtype:
        if self._model is not None:
            dtype = self._model.dtype
        else:
            dtype = self.spec.dtype if self.spec.dtype != "auto" else getattr(self._config, "dtype", None)
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype, None)
        return dtype if isinstance(dtype, torch.dtype) else torch.float32

    def generate(self, batch: Sequence[Request]) -> list[Generation]:
        """Answer `batch`, in order, and return when the devices have finished.

        Running out of memory halves the batch, down to one request; that one's Generation then has `error`,
        as have prompts longer than the context or refused by the chat template. Output tokens are those
        generated, the end token included. With do_sample each request runs alone, seeded by its key.
        Raises ModelError when the model can't be loaded or fails.
        """
        self.load()
        answers, prompts = self._prompts(batch)
        answers.update(self._answered(prompts, batch))
        return [answers[index] for index in range(len(batch))]

    def _answered(
        self, prompts: Mapping[int, array[int]], requests: Sequence[Request]
    ) -> dict[int, Generation]:
        """Answers to `prompts`, by index into `requests`, as one batch as long as memory allows."""
        answers: dict[int, Generation] = {}
        if self._generation_config.do_sample:
            chunks = [[index] for index in prompts]
        else:
            chunks = [list(prompts)] if prompts else []
        while chunks:
            chunk = chunks.pop(0)
            rows = self._run([prompts[index] for index in chunk], requests[chunk[0]])
            if rows is not None:
                for index, row in zip(chunk, rows, strict=True):
                    answers[index] = self._answer(prompts[index], row)
                continue
            _free_memory()
            longest = max(len(prompts[index]) for index in chunk) + self.spec.max_new_tokens
            if len(chunk) == 1:
                answers[chunk[0]] = Generation(
                    None, len(prompts[chunk[0]]), 0, error=self._too_large(longest), fault="request"
                )
                continue
            half = len(chunk) // 2
            self._token_budget = min(self._token_budget or longest * half, longest * half)
            chunks[:0] = [chunk[:half], chunk[half:]]
        self._synchronize()
        return answers

    def _prompts(self, batch: Sequence[Request]) -> tuple[dict[int, Generation], dict[int, array[int]]]:
        """By index: answers of requests that can't be put to the model, and token ids of those that can."""
        answers: dict[int, Generation] = {}
        prompts: dict[int, array[int]] = {}
        limit = self.context_length
        for index, request in enumerate(batch):
            encoded = self._encoder.encode(request)
            if isinstance(encoded, str):
                answers[index] = Generation(None, 0, 0, error=encoded, fault="request")
            elif error := self._unanswerable(encoded, limit):
                answers[index] = Generation(None, len(encoded), 0, error=error, fault="request")
            else:
                prompts[index] = encoded
        return answers, prompts

    def _unanswerable(self, ids: array[int], limit: int | None) -> str | None:
        if not ids:
            return f'model "{self.spec.name}": the prompt has no tokens'
        if limit is not None and len(ids) > limit:
            return f'model "{self.spec.name}": the prompt has {len(ids)} tokens, and the model takes {limit}'
        return None

    def _too_large(self, tokens: int) -> str:
        return (
            f'model "{self.spec.name}": out of memory with one request of {tokens} tokens, answer included. '
            "Lower max_new_tokens, quantize the model or give it a larger device"
        )

    def generate_exactly(
        self, prompt_tokens: int, output_tokens: int, batch_size: int
    ) -> Sequence[Generation]:
        """See `messcli.models.backend.Exact`. Prompts are random tokens, the same ones for the same lengths.

        Raises ModelError also when the batch doesn't fit into memory, or the model ends its answers earlier.
        """
        self.load()
        prompts = self._random_prompts(prompt_tokens, batch_size)
        config = copy.deepcopy(self._generation_config)
        # no end token counts before the last position
        config.update(min_new_tokens=output_tokens, max_new_tokens=output_tokens, stop_strings=None)
        size = 1 if config.do_sample else batch_size
        for start in range(0, batch_size, size):
            request = Request(f"calibration {start}", "")
            rows = self._run(prompts[start : start + size], request, config)
            if rows is None:
                _free_memory()
                raise self._error(
                    f"{size} prompts of {prompt_tokens} tokens with answers of {output_tokens} don't fit into memory",
                    "Lower --batch-size, or --prompt-tokens",
                )
            if lengths := {len(row) for row in rows} - {output_tokens}:
                raise self._error(
                    f"answered with {lengths.pop()} tokens when it was to answer with {output_tokens}",
                    "Choose other --output-tokens",
                )
        self._synchronize()
        return [Generation("", prompt_tokens, output_tokens)] * batch_size

    @property
    def _vocabulary(self) -> int:
        """How many token ids the loaded model takes."""
        return int(self._model.get_input_embeddings().num_embeddings)

    def _random_prompts(self, prompt_tokens: int, count: int) -> list[array[int]]:
        tokenizer = self._tokenizer
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        known = min(len(tokenizer), self._vocabulary)
        ordinary = [index for index in range(known) if index not in special]
        rng = random.Random(prompt_tokens)  # noqa: S311  # drawn to be repeatable, not secret
        return [array("l", rng.choices(ordinary, k=prompt_tokens)) for _ in range(count)]

    def _synchronize(self) -> None:
        for device in self.devices:
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)

    def _run(
        self, prompts: Sequence[array[int]], first: Request, config: Any = None
    ) -> list[list[int]] | None:
        """Generated token ids per prompt, padding included; None when memory ran out.

        `config` None: the model's generation options.
        """
        model, config = self._model, config or self._generation_config
        width = max(len(ids) for ids in prompts)
        tokens = torch.full((len(prompts), width), config.pad_token_id, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, ids in enumerate(prompts):
            # a decoder goes on where the prompt ends, so it is padded in front; an encoder counts positions
            # from its first token, so it is padded behind
            span = slice(0, len(ids)) if self._config.is_encoder_decoder else slice(width - len(ids), width)
            tokens[row, span] = torch.tensor(ids, dtype=torch.long)
            mask[row, span] = 1
        extra = {"tokenizer": self._tokenizer} if self._generation_config.stop_strings else {}
        if self.spec.threads is not None:
            torch.set_num_threads(self.spec.threads)  # for the whole process; models take turns
        try:
            with torch.inference_mode(), self._seeded(first):
                output = model.generate(
                    input_ids=tokens.to(model.device),
                    attention_mask=mask.to(model.device),
                    generation_config=config,
                    **extra,
                )
                start = 1 if self._config.is_encoder_decoder else width
                rows: list[list[int]] = output[:, start:].tolist()
        except Exception as error:
            if _is_out_of_memory(error):
                return None  # not retried here: the traceback holds the tensors that filled the memory
            raise self._error(f"failed while answering: {first_line(error)}", _cure_for(error)) from error
        return rows

    @contextmanager
    def _seeded(self, request: Request) -> Iterator[None]:
        """Sampling's random numbers, a function of the request alone; torch's own generators are put back."""
        if not self._generation_config.do_sample:
            yield
            return
        cards = [int(device.partition(":")[2]) for device in self.devices if device.startswith("cuda")]
        digest = hashlib.blake2b(key_of(request), digest_size=7)
        with _SAMPLING_LOCK, torch.random.fork_rng(devices=cards):
            torch.manual_seed(int.from_bytes(digest.digest(), "big"))
            yield

    def _answer(self, prompt: array[int], row: list[int]) -> Generation:
        """One row of `generate`, cut after its end token; what follows is padding."""
        stops = self._generation_config.eos_token_id
        stops = set(stops) if isinstance(stops, list) else {stops}
        end = next((place + 1 for place, token in enumerate(row) if token in stops), None)
        if end is None:
            end = len(row)
            # without an end token a row is full, unless a stop string ended it before its batch
            while (
                self._generation_config.stop_strings
                and end
                and row[end - 1] == self._generation_config.pad_token_id
            ):
                end -= 1
        text = self._tokenizer.decode(row[:end], skip_special_tokens=True)
        return Generation(text.strip(), len(prompt), end)

    # --- errors ---

    def _error(self, what: str, cure: str, kind: type[ModelError] = ModelError) -> ModelError:
        return kind(f'model "{self.spec.name}" ({self.spec.path}): {what}. {cure}')

    def _explained(self, error: Exception) -> ModelError:
        """What transformers or the hub raised while loading, in one line with a cure."""
        named = {type(cause).__name__ for cause in _causes(error)}
        text = str(error)
        if _is_out_of_memory(error):
            return self._error("does not fit into memory", _cure_for(error), ModelTooLarge)
        if "GatedRepoError" in named:
            return self._error(
                "the hub asks for its licence to be accepted",
                f"Accept it at https://huggingface.co/{self.spec.path}, "
                "then run `hf auth login` or set HF_TOKEN",
            )
        if "RevisionNotFoundError" in named:
            return self._error(
                f"the hub has no revision {self.spec.revision!r}", "Correct revision in zoo.toml"
            )
        if "RepositoryNotFoundError" in named:
            return self._error(
                "no such folder, and no such model on the hub",
                "Correct path in zoo.toml; for a private model run `hf auth login` or set HF_TOKEN",
            )
        if named & _UNREACHABLE or "couldn't connect" in text:
            return self._error(
                "not in the local cache, and the hub can't be reached",
                "Go online once, or point path at a folder that holds the model",
            )
        if "trust_remote_code" in text:
            return self._error(
                "needs Python code that comes with the checkpoint",
                "Set trust_remote_code = true in zoo.toml if you have read that code and trust it",
            )
        if "safetensors" in text and isinstance(error, OSError):
            return self._error(
                "has no safetensors; loading a pickle can run code in it",
                "Choose another revision, or set allow_pickle = true if you trust its author",
            )
        return self._error(f"can't be loaded: {first_line(error)}", _cure_for(error))


# names, because huggingface_hub, httpx and requests each have their own and none is always installed
_UNREACHABLE = frozenset(
    {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "ConnectionError", "ConnectTimeout"}
    | {"ReadTimeout", "ProxyError", "NameResolutionError", "gaierror"}
)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _cure_for(error: Exception) -> str:
    if _is_out_of_memory(error):
        return "Choose a smaller dtype, quantize it, or give it a larger device"
    if isinstance(error, ImportError):
        return "Install the package that it names"
    if isinstance(error, IndexError):
        return "Check that the tokenizer belongs to this model"
    return "Check the model's files and its table in zoo.toml"


def _is_out_of_memory(error: Exception) -> bool:
    # torch.cuda's name is the one that torch 2.4 has too; the CPU's allocator raises a bare RuntimeError
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "not enough memory" in text or "can't allocate memory" in text
    )


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _free_bytes(devices: Sequence[str]) -> int:
    """Bytes that the cache may grow into; over several cards, that of the fullest times their number."""
    cards = [device for device in devices if device.startswith("cuda")]
    if not cards:
        import psutil  # type: ignore[import-untyped]  # comes with accelerate

        return int(psutil.virtual_memory().available)
    free = []
    for card in cards:
        available, _ = torch.cuda.mem_get_info(card)
        # torch keeps freed memory; the driver counts it as taken
        free.append(available + torch.cuda.memory_reserved(card) - torch.cuda.memory_allocated(card))
    return min(free) * len(free)


def _cache_bytes_per_token(config: Any, dtype: torch.dtype) -> int | None:
    """Bytes of keys and values that one token of one row takes; None where the config does not say."""
    text = config.get_text_config(decoder=True)
    layers = _first_attribute(text, ("decoder_layers", "num_decoder_layers", "num_hidden_layers"))
    heads = _first_attribute(text, ("decoder_attention_heads", "num_attention_heads"))
    hidden = _first_attribute(text, ("hidden_size",))
    size = _first_attribute(text, ("head_dim", "d_kv"))
    if layers is None or heads is None or (size is None and hidden is None):
        return None
    if size is None and hidden is not None:
        size = hidden // heads
    kept = _first_attribute(text, ("num_key_value_heads",)) or heads
    return 2 * layers * kept * int(size or 0) * dtype.itemsize  # an encoder's tokens are kept once as well


def _first_attribute(config: Any, names: Sequence[str]) -> int | None:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _devices_of(model: Any) -> tuple[str, ...]:
    names = {str(parameter.device) for parameter in model.parameters() if parameter.device.type != "meta"}
    # offloaded weights are "meta" until used; the map says where they run
    for device in (getattr(model, "hf_device_map", None) or {}).values():
        if device != "disk":
            names.add(f"cuda:{device}" if isinstance(device, int) else str(torch.device(device)))
    names = {"cuda:0" if name == "cuda" else name for name in names}
    return tuple(sorted(names, key=lambda name: (not name.startswith("cuda"), name)))


def _quiet() -> None:
    """Errors only, through logging, and no progress bars: the terminal is the command line's.

    TRANSFORMERS_VERBOSITY overrules it.
    """
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

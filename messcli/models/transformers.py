"""A model run by Hugging Face transformers: causal or seq2seq, on a CPU, one card or several.

Greedy decoding is the rule: sampling happens only where zoo.toml asks for it, seeded by the request, so
an answer never depends on what else was in its batch. In float32 a batch equals single requests token for
token; in half precision the order of sums may turn near ties.

Prompts, limits and decoding options are `checkpoint.py`'s.
"""

from __future__ import annotations

import copy
import threading
import weakref
from array import array
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # carries no types
import torch
import transformers

from messcli.adapter import read_adapter
from messcli.errors import MessError, ModelError, ModelUnavailable, first_line
from messcli.models.backend import Group, InBatches, collector_paused, group_of, seed_of
from messcli.models.checkpoint import Checkpoint, cure_for, first_attribute, is_out_of_memory
from messcli.models.weights import Weights, free_memory
from messcli.records import Generation, Request
from messcli.zoo import ModelSpec, TransformersOptions

# Beyond these, throughput doesn't grow. H200, a billion parameters: 64 rows 2,382 tokens/s, 256 12,499, 1,024 8,781
# (tools/bench/serving.py card).
_LARGEST_BATCH = {"cuda": 256, "cpu": 32}
_WARM_UP = {"cuda": ((1, 1), (8, 32), (64, 64)), "cpu": ((1, 1),)}  # rows and prompt tokens of batches
_BATCH_WITHOUT_SIZES = 8  # where the config does not say how large its key-value cache is
_FEW_ANSWERS = 64  # before so many are known, every answer may be as long as it is allowed to be
_MEMORY_SHARE = 0.5  # of the free memory for the cache; the rest is for activations

# torch keeps one generator per device in the process, and manual_seed sets them all
_SAMPLING_LOCK = threading.Lock()


class TransformersBackend(InBatches):
    """One model of the zoo, loaded by transformers. See `messcli.models.backend.Backend` for the protocol."""

    def __init__(self, spec: ModelSpec, *, batch_size: int | None) -> None:
        """`batch_size` None: spec.batch_size, else chosen by memory. Nothing is read before it is needed."""
        self.spec = spec
        self._own = spec.own(TransformersOptions)
        self._batch_size = batch_size if batch_size is not None else spec.batch_size
        self.checkpoint = Checkpoint(spec)
        self._weights = Weights()
        self._generation_config: Any = None  # None: this model isn't loaded
        self._stops: _StopStrings | None = None
        self._cancelled = threading.Event()
        self._longest: int | None = None  # tokens of an answer, of those so far
        self._answers = 0
        self._token_budget: int | None = None  # rows x tokens that a batch may take, learnt from running out

    # --- loading ---

    @property
    def occupies_memory(self) -> bool:
        return True

    @property
    def weights(self) -> Hashable:
        """See `messcli.models.backend.SharesWeights`."""
        return self.spec.weights

    def share(self, other: Any) -> None:
        """See `messcli.models.backend.SharesWeights`."""
        self._weights = other._weights

    @property
    def model(self) -> Any:
        """transformers' own model; None while it isn't loaded."""
        return self._weights.model

    @property
    def loaded(self) -> bool:
        has_own = self._own.adapter is None or self._weights.has(self.spec.name)
        return self.model is not None and self._generation_config is not None and has_own

    @property
    def devices(self) -> tuple[str, ...]:
        """Where the weights are; before loading, where `device` says that they will be."""
        if self.model is not None:
            return _devices_of(self.model)
        if self.spec.device != "auto":
            return (self.spec.device,)
        cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return tuple(f"cuda:{index}" for index in range(cards)) or ("cpu",)

    def load(self) -> None:
        """Load config, tokenizer and weights; does nothing when they are loaded.

        Raises ModelError naming model, path and cure: missing or pickled weights, a hub that can't be
        reached, gated models, code that would have to be trusted, a missing card, too little memory.
        """
        weights = self._weights
        if weights.parked is not None:
            self._unpark()
        if self.loaded:
            return
        path = self._own.adapter
        adapter = None if path is None else read_adapter(Path(path), self.spec.name)
        if weights.model is None:
            weights.put(self._read_weights())
        weights.hold(self.spec.name)
        try:
            if adapter is not None:
                weights.attach(self.spec.name, adapter)
            options = self.checkpoint.generation_options(weights.defaults)
            if options.stop_strings:
                self._stops = _StopStrings(options.stop_strings, self.checkpoint.tokenizer)
            options.stop_strings = None  # transformers' own criterion can't read every tokenizer
            self._generation_config = options
            self._warm_up()
        except MessError:
            self.unload()
            raise

    def _read_weights(self) -> Any:
        self._check_device()
        config = self.checkpoint.config
        self.checkpoint.check_limits()
        _ = self.checkpoint.tokenizer
        kind = (
            transformers.AutoModelForSeq2SeqLM
            if config.is_encoder_decoder
            else transformers.AutoModelForCausalLM
        )
        options = self.load_options()
        try:
            with collector_paused():
                model, report = kind.from_pretrained(self.spec.path, **options, output_loading_info=True)
        except Exception as error:
            free_memory()
            raise self.checkpoint.explained(error) from error
        # transformers fills what a checkpoint lacks with random numbers and goes on
        if missing := sorted(report.get("missing_keys", ())):
            raise self.checkpoint.error(
                f"the checkpoint lacks {len(missing)} of the model's weights ({missing[0]} is one)",
                "Get a complete checkpoint",
            )
        return model.eval()

    def _warm_up(self) -> None:
        """Two tokens, so that what happens once (lazy imports, kernels) is billed to loading, not to a request.

        On a card for batches of several sizes: kernels are chosen by size, and each is loaded when it first runs.
        """
        config = copy.deepcopy(self._generation_config)
        config.update(min_new_tokens=2, max_new_tokens=2)
        kind = "cuda" if self.devices[0].startswith("cuda") else "cpu"
        for rows, tokens in _WARM_UP[kind]:
            self.run([array("i", [0] * tokens)] * rows, Request("warm-up", ""), config)
        self._synchronize()

    def unload(self) -> None:
        """Give the memory back that no other model uses; the tokenizer stays."""
        model = None if self.model is None else weakref.ref(self.model)
        self._generation_config = self._stops = None
        self.checkpoint.forget_prompts()
        if self._weights.release(self.spec.name):
            # most are gone by now; the collector, which walks all libraries (0.1 CPU s), is for those in a cycle
            free_memory(collect=model is not None and model() is not None)

    def suspend(self) -> None:
        """Move the weights from one card into this host's memory, where there is room; else drop them.

        Other models on the same weights are suspended with it.
        """
        if not self._weights.suspend(self.devices):
            self._weights.drop()
            self.unload()

    def resume(self) -> None:
        self.load()

    def _unpark(self) -> None:
        try:
            self._weights.unpark()
        except Exception as error:
            free_memory()
            raise self.checkpoint.explained(error) from error
        self._synchronize()

    def load_options(self) -> dict[str, Any]:
        """What `from_pretrained` of the model is given, beside the path."""
        # renamed in transformers 4.56; the old name warns in 5
        version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
        dtype = "dtype" if version >= (4, 56) else "torch_dtype"
        options = {dtype: self._own.dtype, "device_map": self.spec.device, **self._own.load}
        options.update(self.checkpoint.file_options())
        # None still prefers safetensors, and falls back to pickle with torch's weights_only unpickler
        options["use_safetensors"] = None if self._own.allow_pickle else True
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
            raise self.checkpoint.error(
                f"load.quantization_config: {first_line(error)}",
                "Give quant_method and its options as transformers documents them",
            ) from error

    def _check_device(self) -> None:
        if not self.spec.device.startswith("cuda"):
            return
        cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if cards == 0:
            raise self.checkpoint.error(
                f"{self.spec.device} asked but torch sees no GPU",
                'Set device = "cpu" or "auto" in zoo.toml, or install a CUDA build of torch',
            )
        index = int(self.spec.device.partition(":")[2] or 0)
        if index >= cards:
            raise self.checkpoint.error(
                f"{self.spec.device} asked but torch sees {cards} GPU(s), cuda:0 to cuda:{cards - 1}",
                "Correct device in zoo.toml",
            )

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
        """Batches over the whole share, longest first; each is a group. See `messcli.models.backend.Backend`.

        A batch is as large as memory allows when its turn comes, for its longest prompt and the longest answer
        that is to be expected. Raises ModelUnavailable when one can't be answered.
        """
        if not requests:
            return
        self._cancelled.clear()
        self.load()
        refused, prompts = self.checkpoint.prompts(requests)
        if refused:
            yield group_of(refused)
        # sorted() is stable
        waiting = sorted(prompts, key=lambda index: (requests[index].options, -len(prompts[index])))
        while waiting:
            size = self._rows(len(prompts[waiting[0]]), requests[waiting[0]].options)
            batch, waiting = waiting[:size], waiting[size:]
            try:
                answers = self._answered({index: prompts[index] for index in batch}, requests)
            except ModelError as error:  # it was loaded, and has broken: others go on with its requests
                raise ModelUnavailable(str(error)) from error
            if self._cancelled.is_set():  # its answers were cut
                return
            yield group_of(answers)

    def cancel(self) -> None:
        """End the stream that runs, from any thread: its batch at the next token, unanswered."""
        self._cancelled.set()

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

    def _rows(self, prompt_tokens: int, options: Sequence[str] = ()) -> int:
        """How many prompts of at most `prompt_tokens` make a batch."""
        most, budget = self._batch_limits()
        if budget is None:
            return most
        return max(1, min(most, budget // (prompt_tokens + (1 if options else self._expected_answer()))))

    def _expected_answer(self) -> int:
        """Tokens of the longest answer that a batch is planned for: the longest so far and a half more.

        Half of the free memory isn't planned with, and a batch that still runs out of it is halved.
        """
        if self._longest is None or self._answers < _FEW_ANSWERS:
            return self.spec.max_new_tokens
        return min(self.spec.max_new_tokens, self._longest * 3 // 2 + 1)

    def _batch_limits(self) -> tuple[int, int | None]:
        """The most rows of a batch, and the most rows x tokens (None: any), by memory and by what ran out."""
        if self._batch_size is not None:
            return self._batch_size, self._token_budget
        on_gpu = self.devices[0].startswith("cuda")
        most = _LARGEST_BATCH["cuda" if on_gpu else "cpu"]
        per_token = _cache_bytes_per_token(self.checkpoint.config, self._model_dtype())
        if per_token is None:
            return _BATCH_WITHOUT_SIZES, self._token_budget
        # a checkpoint may search by itself: Marian's do with 4 to 6 beams
        stated = getattr(self._generation_config, "num_beams", None)
        beams = int(stated or self.spec.generation.get("num_beams", 1))
        budget = int(free_bytes(self.devices) * _MEMORY_SHARE / (per_token * beams))
        return most, budget if self._token_budget is None else min(budget, self._token_budget)

    def _model_dtype(self) -> torch.dtype:
        if self.model is not None:
            dtype = self.model.dtype
        else:
            dtype = (
                self._own.dtype
                if self._own.dtype != "auto"
                else getattr(self.checkpoint.config, "dtype", None)
            )
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
        self._cancelled.clear()
        self.load()
        answers, prompts = self.checkpoint.prompts(batch)
        answers.update(self._answered(prompts, batch))
        if self._cancelled.is_set():
            raise self.checkpoint.error("was told to stop while it answered", "Run the same command again")
        return [answers[index] for index in range(len(batch))]

    def _answered(
        self, prompts: Mapping[int, array[int]], requests: Sequence[Request]
    ) -> dict[int, Generation]:
        """Answers to `prompts`, by index into `requests`, as one batch as long as memory allows; one more for each
        set of options."""
        answers: dict[int, Generation] = {}
        alike: dict[Sequence[str], list[int]] = {}
        for index in prompts:
            alike.setdefault(requests[index].options, []).append(index)
        chunks: list[list[int]] = []
        for options, same in alike.items():
            alone = self._generation_config.do_sample and not options
            chunks += [[index] for index in same] if alone else [same]
        while chunks:
            chunk = chunks.pop(0)
            options = requests[chunk[0]].options
            made = (
                self._weighed(chunk, prompts, options) if options else self._written(chunk, prompts, requests)
            )
            if self._cancelled.is_set():
                return answers
            if made is not None:
                answers.update(zip(chunk, made, strict=True))
                continue
            free_memory()
            longest = max(len(prompts[index]) for index in chunk) + (
                1 if options else self.spec.max_new_tokens
            )
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

    def _written(
        self, chunk: Sequence[int], prompts: Mapping[int, array[int]], requests: Sequence[Request]
    ) -> list[Generation] | None:
        """Answers to one batch, in order; None: memory ran out."""
        rows = self.run([prompts[index] for index in chunk], requests[chunk[0]])
        if rows is None:
            return None
        answers = [
            self.checkpoint.answer(
                prompts[index],
                row,
                self._generation_config.eos_token_id,
                () if self._stops is None else self._stops.strings,
                log_probabilities,
            )
            for index, (row, log_probabilities) in zip(chunk, rows, strict=True)
        ]
        self._longest = max(self._longest or 0, *(answer.output_tokens for answer in answers))
        self._answers += len(answers)
        return answers

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
        vocabulary = int(self.model.get_input_embeddings().num_embeddings)
        prompts = self.checkpoint.random_prompts(vocabulary, prompt_tokens, batch_size)
        config = copy.deepcopy(self._generation_config)
        # no end token counts before the last position
        config.update(min_new_tokens=output_tokens, max_new_tokens=output_tokens)
        size = 1 if config.do_sample else batch_size
        for start in range(0, batch_size, size):
            request = Request(f"calibration {start}", "")
            rows = self.run(prompts[start : start + size], request, config)
            if rows is None:
                free_memory()
                raise self.checkpoint.error(
                    f"{size} prompts of {prompt_tokens} tokens with answers of {output_tokens} don't fit into memory",
                    "Lower --batch-size, or --prompt-tokens",
                )
            if lengths := {len(row) for row, _ in rows} - {output_tokens}:
                raise self.checkpoint.error(
                    f"answered with {lengths.pop()} tokens when it was to answer with {output_tokens}",
                    "Choose other --output-tokens",
                )
        self._synchronize()
        return [Generation("", prompt_tokens, output_tokens)] * batch_size

    def _synchronize(self) -> None:
        for device in self.devices:
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)

    def run(
        self, prompts: Sequence[array[int]], first: Request, config: Any = None
    ) -> list[tuple[list[int], list[float]]] | None:
        """Generated token ids and their log-probabilities per prompt, padding included; None: memory ran out.

        `config` None: the model's generation options.
        """
        config = config or self._generation_config
        tokens, mask = self._padded(prompts)
        start = 1 if self.checkpoint.config.is_encoder_decoder else tokens.shape[1]
        stops = transformers.StoppingCriteriaList([_Cancelled(self._cancelled)])
        if self._stops is not None and config.min_new_tokens != config.max_new_tokens:
            stops.append(self._stops.after(start))
        # a beam changes its row from step to step
        watch = _TokenLogProbabilities() if (config.num_beams or 1) == 1 else None
        watched = {} if watch is None else {"logits_processor": transformers.LogitsProcessorList([watch])}
        if self._own.threads is not None:
            torch.set_num_threads(self._own.threads)  # for the whole process; models take turns
        try:
            with (
                self._weights.use(self.spec.name, self._generation_config) as model,
                torch.inference_mode(),
                self._seeded(first),
            ):
                output = model.generate(
                    input_ids=tokens.to(model.device),
                    attention_mask=mask.to(model.device),
                    generation_config=config,
                    stopping_criteria=stops,
                    **watched,
                )
                rows: list[list[int]] = output[:, start:].tolist()
                known = [[]] * len(rows) if watch is None else watch.of(output)
        except Exception as error:
            if is_out_of_memory(error):
                return None  # not retried here: the traceback holds the tensors that filled the memory
            raise self.checkpoint.error(
                f"failed while answering: {first_line(error)}", cure_for(error)
            ) from error
        return list(zip(rows, known, strict=True))

    def _padded(self, prompts: Sequence[array[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts as one tensor of token ids, and its mask."""
        width = max(len(ids) for ids in prompts)
        tokens = torch.full((len(prompts), width), self._generation_config.pad_token_id, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, ids in enumerate(prompts):
            # a decoder goes on where the prompt ends, so it is padded in front; an encoder counts positions
            # from its first token, so it is padded behind
            span = (
                slice(0, len(ids))
                if self.checkpoint.config.is_encoder_decoder
                else slice(width - len(ids), width)
            )
            tokens[row, span] = torch.tensor(ids, dtype=torch.long)
            mask[row, span] = 1
        return tokens, mask

    def _weighed(
        self, chunk: Sequence[int], prompts: Mapping[int, array[int]], options: Sequence[str]
    ) -> list[Generation] | None:
        """How likely each option is as the next token, for one batch, in order: one forward pass.

        None: memory ran out.
        """
        ids = self.checkpoint.option_ids(options)
        if isinstance(ids, str):
            return [Generation(None, len(prompts[index]), 0, error=ids, fault="request") for index in chunk]
        config = copy.deepcopy(self._generation_config)
        config.update(max_new_tokens=1, min_new_tokens=None, do_sample=False, num_beams=1)
        tokens, mask = self._padded([prompts[index] for index in chunk])
        if self._own.threads is not None:
            torch.set_num_threads(self._own.threads)
        try:
            with (
                self._weights.use(self.spec.name, self._generation_config) as model,
                torch.inference_mode(),
            ):
                output = model.generate(
                    input_ids=tokens.to(model.device),
                    attention_mask=mask.to(model.device),
                    generation_config=config,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            likely = torch.softmax(output.logits[0].float(), dim=-1)
            rows = torch.stack([likely[:, own].sum(1) for own in ids], dim=1).tolist()
        except Exception as error:
            if is_out_of_memory(error):
                return None
            raise self.checkpoint.error(
                f"failed while it read an answer: {first_line(error)}", cure_for(error)
            ) from error
        return [
            self.checkpoint.weighed(len(prompts[index]), options, row)
            for index, row in zip(chunk, rows, strict=True)
        ]

    @contextmanager
    def _seeded(self, request: Request) -> Iterator[None]:
        """Sampling's random numbers, a function of the request alone; torch's own generators are put back."""
        if not self._generation_config.do_sample:
            yield
            return
        cards = [int(device.partition(":")[2]) for device in self.devices if device.startswith("cuda")]
        with _SAMPLING_LOCK, torch.random.fork_rng(devices=cards):
            torch.manual_seed(seed_of(request))
            yield


class _TokenLogProbabilities(transformers.LogitsProcessor):  # type: ignore[misc]  # carries no types
    """Sees each step's scores, after all other processors, and the token that was chosen at the next step.

    transformers' own `output_scores` keeps rows x vocabulary numbers for every step; this keeps them for one.
    """

    def __init__(self) -> None:
        self._scores: Any = None
        self._chosen: list[Any] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self._choose(input_ids[:, -1])
        self._scores = scores
        return scores

    def _choose(self, tokens: Any) -> None:
        if self._scores is not None:
            chosen = self._scores.gather(1, tokens[:, None].to(self._scores.device))[:, 0]
            self._chosen.append(chosen - self._scores.logsumexp(1))

    def of(self, output: Any) -> list[list[float]]:
        """Per row of what was generated in the end; padding's numbers mean nothing."""
        self._choose(output[:, -1])
        self._scores = None
        if not self._chosen:
            return [[]] * len(output)
        rows: list[list[float]] = torch.stack(self._chosen, dim=1).float().tolist()
        return rows


class _Cancelled(transformers.StoppingCriteria):  # type: ignore[misc]  # carries no types
    """Ends every row of a batch when its stream is cancelled."""

    def __init__(self, cancelled: threading.Event) -> None:
        self._cancelled = cancelled

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return torch.full(
            (len(input_ids),), self._cancelled.is_set(), dtype=torch.bool, device=input_ids.device
        )


class _StopStrings(transformers.StoppingCriteria):  # type: ignore[misc]  # carries no types
    """Ends a row where its answer holds a stop string, wherever tokens begin and end.

    Only rows whose last token could end a stop string are decoded: at most a few at a time.
    """

    def __init__(self, strings: str | Sequence[str], tokenizer: Any, start: int = 0) -> None:
        self.strings = (strings,) if isinstance(strings, str) else tuple(strings)
        self._tokenizer = tokenizer
        self._start = start  # where the answers begin
        self._ending = self._tokens_that_end_one()
        self._tail = max(map(len, self.strings)) + 4  # tokens; one may stand for no character

    def _tokens_that_end_one(self) -> Any:
        """By token: whether its text holds the last character of a stop string."""
        ends = {string[-1] for string in self.strings}
        count = len(self._tokenizer)
        if any(end.isspace() or not end.isascii() for end in ends):  # written between tokens, or by several
            return torch.ones(count, dtype=torch.bool)
        texts = self._tokenizer.batch_decode([[token] for token in range(count)])
        return torch.tensor([not ends.isdisjoint(text) for text in texts])

    def after(self, start: int) -> _StopStrings:
        """For answers that begin at position `start`."""
        other = copy.copy(self)
        other._start = start
        return other

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        ended = torch.zeros(len(input_ids), dtype=torch.bool)
        last = input_ids[:, -1].cpu().clamp(max=len(self._ending) - 1)
        tails = input_ids[:, max(self._start, input_ids.shape[1] - self._tail) :]
        for row in self._ending[last].nonzero()[:, 0].tolist():
            text = self._tokenizer.decode(tails[row])
            ended[row] = any(string in text for string in self.strings)
        return ended.to(input_ids.device)


def free_bytes(devices: Sequence[str]) -> int:
    """Bytes that the cache may grow into; over several cards, that of the fullest times their number."""
    cards = [device for device in devices if device.startswith("cuda")]
    if not cards:
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
    layers = first_attribute(text, ("decoder_layers", "num_decoder_layers", "num_hidden_layers"))
    heads = first_attribute(text, ("decoder_attention_heads", "num_attention_heads"))
    hidden = first_attribute(text, ("hidden_size",))
    size = first_attribute(text, ("head_dim", "d_kv"))
    if layers is None or heads is None or (size is None and hidden is None):
        return None
    if size is None and hidden is not None:
        size = hidden // heads
    kept = first_attribute(text, ("num_key_value_heads",)) or heads
    return 2 * layers * kept * int(size or 0) * dtype.itemsize  # an encoder's tokens are kept once as well


def _devices_of(model: Any) -> tuple[str, ...]:
    names = {str(parameter.device) for parameter in model.parameters() if parameter.device.type != "meta"}
    # offloaded weights are "meta" until used; the map says where they run
    for device in (getattr(model, "hf_device_map", None) or {}).values():
        if device != "disk":
            names.add(f"cuda:{device}" if isinstance(device, int) else str(torch.device(device)))
    names = {"cuda:0" if name == "cuda" else name for name in names}
    return tuple(sorted(names, key=lambda name: (not name.startswith("cuda"), name)))

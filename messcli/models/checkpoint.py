"""A checkpoint as transformers reads it: config, tokenizer, prompts, limits, decoding options. No weights.

Whatever runs a checkpoint's weights has one of these, so that prompts, limits, seeds and messages are the same
everywhere. How a request becomes tokens is `prompts.py`'s.
"""

from __future__ import annotations

import copy
import difflib
import functools
import logging
import os
import random
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging as transformers_logging

from messcli.errors import ModelError, ModelTooLarge, ZooError, first_line
from messcli.models.backend import collector_paused, confidence_of
from messcli.models.prompts import PromptEncoder
from messcli.records import Generation, Request
from messcli.zoo import CheckpointOptions, ModelSpec

_SAMPLING_OPTIONS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
# options of from_pretrained that say where files lie, and so hold for config and tokenizer too
_WHERE_FILES_ARE = ("gguf_file", "subfolder", "cache_dir", "token", "local_files_only", "code_revision")
_OWN_OPTIONS = ("num_return_sequences", "return_dict_in_generate", "output_scores", "output_logits")


class Checkpoint:
    """One model's files. Nothing is read before it is needed, and what was read is kept.

    Args:
        spec: the model.
        positions: the most tokens that prompt and answer may have together, where whatever runs the weights
            sets a limit of its own.
    """

    def __init__(self, spec: ModelSpec, positions: int | None = None) -> None:
        self._spec = spec
        self._own = spec.own(CheckpointOptions)
        self._positions = positions
        self._read_config: Any = None
        self._read_tokenizer: Any = None
        self._made_encoder: PromptEncoder | None = None
        self._option_ids: dict[tuple[str, ...], list[list[int]] | str] = {}

    # --- files ---

    @property
    def config(self) -> Any:
        """Of transformers. Raises ModelError naming model, path and cure."""
        if self._read_config is None:
            _quiet(gguf="gguf_file" in self._own.load)
            self._check_folder()
            try:
                with collector_paused():  # the first one imports a quarter of transformers
                    self._read_config = transformers.AutoConfig.from_pretrained(
                        self._spec.path, **self.file_options()
                    )
            except Exception as error:
                raise self.explained(error) from error
        return self._read_config

    @property
    def tokenizer(self) -> Any:
        """Of transformers. Raises as `config` does."""
        if self._read_tokenizer is None:
            _ = self.config  # the same files, told about in its words first
            options = {**self.file_options(), **self._own.tokenizer}
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(self._spec.path, **options)
            except Exception as error:
                raise self.explained(error) from error
            if self._spec.chat_template and not tokenizer.chat_template:
                raise self.error(
                    "chat_template = true, but the tokenizer has no chat template",
                    "Remove chat_template from zoo.toml, or use the instruction-tuned model",
                )
            self._read_tokenizer = tokenizer
        return self._read_tokenizer

    def take_warnings(self) -> list[str]:
        """What came up of prompts that the user should know of."""
        return [] if self._made_encoder is None else self._made_encoder.take_warnings()

    @property
    def encoder(self) -> PromptEncoder:
        if self._made_encoder is None:
            self._made_encoder = PromptEncoder(self._spec, self.tokenizer)
        return self._made_encoder

    def forget_prompts(self) -> None:
        """Give back the memory of prompts that were encoded."""
        self._made_encoder = None

    def file_options(self) -> dict[str, Any]:
        """What every `from_pretrained` of this checkpoint is told."""
        # None would ask on stdin
        options: dict[str, Any] = {"trust_remote_code": self._own.trust_remote_code}
        if self._own.revision is not None:
            options["revision"] = self._own.revision
        if Path(self._spec.path).is_dir():
            options["local_files_only"] = True
        options.update((key, self._own.load[key]) for key in _WHERE_FILES_ARE if key in self._own.load)
        return options

    def generation_options(self, defaults: Any, without: Sequence[str] = ()) -> Any:
        """The checkpoint's own options under zoo.toml's; greedy unless zoo.toml says do_sample.

        `without`: options that whatever runs the weights takes by itself.
        """
        options = {name: value for name, value in self._spec.generation.items() if name not in without}
        tokenizer = self.tokenizer
        for own in _OWN_OPTIONS:
            if own in options:
                raise self.error(f"generation.{own}: messcli sets this itself", "Remove it from zoo.toml")
        strings = options.get("stop_strings") or []
        if not all(isinstance(s, str) and s for s in ([strings] if isinstance(strings, str) else strings)):
            raise self.error("generation.stop_strings: must be strings that aren't empty", "Correct it")
        config = copy.deepcopy(defaults)
        if not options.get("do_sample"):
            useless = [key for key in _SAMPLING_OPTIONS if options.pop(key, 0)]
            if useless:
                raise self.error(
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
            max_new_tokens=self._spec.max_new_tokens,
            max_length=None,  # the checkpoint's own limit would contradict ours
            num_return_sequences=1,
            return_dict_in_generate=False,
        )
        try:
            unknown = config.update(**options)
        except (ValueError, TypeError) as error:
            raise self.error(f"generation: {first_line(error)}", "Correct it in zoo.toml") from error
        if unknown:
            name = next(iter(unknown))
            close = difflib.get_close_matches(name, config.to_dict(), n=1)
            cure = f"Did you mean {close[0]}?" if close else "Its options are those of GenerationConfig"
            raise self.error(f"generation.{name}: transformers knows no such option", cure)
        return config

    def _token_id(self, field: str, token: object) -> int:
        tokenizer = self.tokenizer
        index = tokenizer.convert_tokens_to_ids(token) if isinstance(token, str) else None
        if index is None or index == tokenizer.unk_token_id:
            raise self.error(f"{field}: the tokenizer has no token {token!r}", "Correct it in zoo.toml")
        return int(index)

    # --- limits ---

    @property
    def context_length(self) -> int | None:
        """The most prompt tokens that leave room for max_new_tokens; None where the model states no limit.

        The config's number of positions; for seq2seq the encoder's. Models with relative positions (T5)
        state none. zoo.toml's max_prompt_tokens lowers it. Raises ZooError where no prompt could fit.
        """
        self.check_limits()
        limits = [self._spec.max_prompt_tokens, self._model_limit()]
        return min((limit for limit in limits if limit is not None), default=None)

    def _model_limit(self) -> int | None:
        config = self.config
        text = config.get_text_config()
        positions = first_attribute(
            config if config.is_encoder_decoder else text,
            ("max_encoder_position_embeddings", "max_position_embeddings", "max_source_positions"),
        )
        if positions is None and not hasattr(config, "relative_attention_num_buckets"):
            stated = self.tokenizer.model_max_length
            positions = stated if stated < 10**9 else None  # transformers writes 1e30 for "not stated"
        if self._positions is not None:
            positions = min(positions or self._positions, self._positions)
        if positions is None or config.is_encoder_decoder:
            return positions
        return positions - self._spec.max_new_tokens

    def check_limits(self) -> None:
        """Raises ZooError where max_new_tokens leaves no room for a prompt."""
        wanted, config = self._spec.max_new_tokens, self.config
        positions = first_attribute(
            config if config.is_encoder_decoder else config.get_text_config(),
            ("max_decoder_position_embeddings", "max_position_embeddings", "max_target_positions"),
        )
        limits = [limit for limit in (positions, self._positions) if limit is not None]
        if limits and wanted >= min(limits):
            raise ZooError(
                f'model "{self._spec.name}" ({self._spec.path}): max_new_tokens = {wanted}, but the model has '
                f"{min(limits)} positions in all. Lower max_new_tokens in zoo.toml"
            )

    def _check_folder(self) -> None:
        """What can be told about a folder without transformers, in better words than its."""
        root = Path(self._spec.path)
        if not root.is_dir():
            if root.is_absolute():
                raise self.error("there is no such folder", "Correct path in zoo.toml, or download the model")
            return
        folder = root / str(self._own.load.get("subfolder", ""))
        if "gguf_file" in self._own.load:
            return
        if not (folder / "config.json").is_file():
            raise self.error(
                "the folder has no config.json",
                "Point path at a folder written by save_pretrained, or name a gguf_file in [models.load]",
            )
        if self._own.allow_pickle or any(folder.glob("*.safetensors")):
            return
        if any(file for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(kind)):
            raise self.error(
                "the weights are pickled and there are no safetensors; loading a pickle can run code in it",
                "Convert them to safetensors, or set allow_pickle = true if you trust their author",
            )
        raise self.error("the folder has no *.safetensors", "Download the model's weights into it")

    # --- prompts and answers ---

    def prompts(self, requests: Sequence[Request]) -> tuple[dict[int, Generation], dict[int, array[int]]]:
        """By index: answers of requests that can't be put to the model, and token ids of those that can."""
        answers: dict[int, Generation] = {}
        prompts: dict[int, array[int]] = {}
        limit = self.context_length
        for index, request in enumerate(requests):
            encoded = self.encoder.encode(request)
            if isinstance(encoded, str):
                answers[index] = Generation(None, 0, 0, error=encoded, fault="request")
            elif error := self._unanswerable(encoded, limit):
                answers[index] = Generation(None, len(encoded), 0, error=error, fault="request")
            else:
                prompts[index] = encoded
        return answers, prompts

    def _unanswerable(self, ids: array[int], limit: int | None) -> str | None:
        if not ids:
            return f'model "{self._spec.name}": the prompt has no tokens'
        if limit is not None and len(ids) > limit:
            return f'model "{self._spec.name}": the prompt has {len(ids)} tokens, and the model takes {limit}'
        return None

    def answer(
        self,
        prompt: array[int],
        row: Sequence[int],
        end_tokens: int | Sequence[int] | None,
        stop_strings: Sequence[str],
        log_probabilities: Sequence[float] = (),
    ) -> Generation:
        """What a row of generated tokens says, cut after its end; what follows is padding.

        `log_probabilities` are of the row's tokens; () where they aren't known.
        """
        ends = set(end_tokens) if isinstance(end_tokens, Sequence) else {end_tokens}
        end = next((place + 1 for place, token in enumerate(row) if token in ends), None)
        finish = "length" if end is None else "stop"
        text = self._decoded(row[:end])
        if stop_strings and (cut := self._stopped(row[:end], stop_strings)):
            end, found = cut
            finish, text = "stop", self._decoded(row[:end])
            if found in text:
                text = text[: text.index(found)]
        if end is None:
            end = len(row)
        return Generation(
            text.strip(), len(prompt), end, finish=finish, confidence=confidence_of(log_probabilities[:end])
        )

    def option_ids(self, options: Sequence[str]) -> list[list[int]] | str:
        """The tokens that begin a reply with each of `options`, however it is spelled; or why they can't be told apart.

        A model writes "Yes", "yes" or " yes", and each may be a token of its own.
        """
        key = tuple(options)
        if key not in self._option_ids:
            self._option_ids[key] = self._find_option_ids(options)
        return self._option_ids[key]

    def _find_option_ids(self, options: Sequence[str]) -> list[list[int]] | str:
        found: list[list[int]] = []
        for option in options:
            spelled = (option, f" {option}", option.capitalize(), f" {option.capitalize()}")
            encoded = [self.tokenizer.encode(text, add_special_tokens=False) for text in spelled]
            ids = {
                own[-1]
                for own in encoded
                if own and self._decoded(own[-1:]).strip().lower() == option.lower()
            }
            found.append(sorted(ids))
        if not all(found):
            lacking = ", ".join(option for option, ids in zip(options, found, strict=True) if not ids)
            return f'model "{self._spec.name}": {lacking}: no token of its own says that'
        return found

    @staticmethod
    def weighed(prompt_tokens: int, options: Sequence[str], weights: Sequence[float]) -> Generation:
        """What came of asking how likely `options` are: the likeliest, as if it had been written, and their weights."""
        likeliest = max(range(len(options)), key=lambda n: weights[n])
        return Generation(options[likeliest], prompt_tokens, 1, finish="stop", weights=tuple(weights))

    def _decoded(self, row: Sequence[int], *, without_special: bool = True) -> str:
        return str(self.tokenizer.decode(row, skip_special_tokens=without_special))

    def _stopped(self, row: Sequence[int], strings: Sequence[str]) -> tuple[int, str] | None:
        """After how many tokens a row holds a stop string, and which comes first; None: it holds none."""

        def first_in(count: int) -> str | None:
            text = self._decoded(row[:count], without_special=False)
            found = [string for string in strings if string in text]
            return min(found, key=text.index, default=None)

        if first_in(len(row)) is None:
            return None
        low, high = 1, len(row)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if first_in(middle) else (middle + 1, high)
        found = first_in(low)
        return None if found is None else (low, found)

    def random_prompts(self, vocabulary: int, prompt_tokens: int, count: int) -> list[array[int]]:
        """Prompts of ordinary tokens below `vocabulary`, the same ones for the same length."""
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        known = min(len(self.tokenizer), vocabulary)
        ordinary = [index for index in range(known) if index not in special]
        rng = random.Random(prompt_tokens)  # noqa: S311  # drawn to be repeatable, not secret
        return [array("i", rng.choices(ordinary, k=prompt_tokens)) for _ in range(count)]

    # --- errors ---

    def error(self, what: str, cure: str, kind: type[ModelError] = ModelError) -> ModelError:
        return kind(f'model "{self._spec.name}" ({self._spec.path}): {what}. {cure}')

    def explained(self, error: Exception) -> ModelError:
        """What transformers or the hub raised while loading, in one line with a cure."""
        named = {type(cause).__name__ for cause in _causes(error)}
        text = str(error)
        if is_out_of_memory(error):
            return self.error("does not fit into memory", cure_for(error), ModelTooLarge)
        if "GatedRepoError" in named:
            return self.error(
                "the hub asks for its licence to be accepted",
                f"Accept it at https://huggingface.co/{self._spec.path}, "
                "then run `hf auth login` or set HF_TOKEN",
            )
        if "RevisionNotFoundError" in named:
            return self.error(
                f"the hub has no revision {self._own.revision!r}", "Correct revision in zoo.toml"
            )
        if "RepositoryNotFoundError" in named:
            return self.error(
                "no such folder, and no such model on the hub",
                "Correct path in zoo.toml; for a private model run `hf auth login` or set HF_TOKEN",
            )
        if named & _UNREACHABLE or "couldn't connect" in text:
            return self.error(
                "not in the local cache, and the hub can't be reached",
                "Go online once, or point path at a folder that holds the model",
            )
        if "trust_remote_code" in text:
            return self.error(
                "needs Python code that comes with the checkpoint",
                "Set trust_remote_code = true in zoo.toml if you have read that code and trust it",
            )
        if "safetensors" in text and isinstance(error, OSError):
            return self.error(
                "has no safetensors; loading a pickle can run code in it",
                "Choose another revision, or set allow_pickle = true if you trust its author",
            )
        return self.error(f"can't be loaded: {first_line(error)}", cure_for(error))


# names, because huggingface_hub, httpx and requests each have their own and none is always installed
_UNREACHABLE = frozenset(
    {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "ConnectionError", "ConnectTimeout"}
    | {"ReadTimeout", "ProxyError", "NameResolutionError", "gaierror"}
)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def cure_for(error: Exception) -> str:
    if is_out_of_memory(error):
        return "Choose a smaller dtype, quantize it, or give it a larger device"
    if isinstance(error, ImportError):
        return "Install the package that it names"
    if isinstance(error, IndexError):
        return "Check that the tokenizer belongs to this model"
    return "Check the model's files and its table in zoo.toml"


def is_out_of_memory(error: Exception) -> bool:
    # torch.cuda's name is the one that torch 2.4 has too; the CPU's allocator raises a bare RuntimeError
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "not enough memory" in text or "can't allocate memory" in text
    )


def first_attribute(config: Any, names: Sequence[str]) -> int | None:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _quiet(*, gguf: bool) -> None:
    """Errors only, through logging, and no progress bars: the terminal is the command line's.

    TRANSFORMERS_VERBOSITY and HF_HUB_VERBOSITY overrule it.
    """
    if "HF_HUB_VERBOSITY" not in os.environ:  # a line for each of its retries
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if gguf:  # it makes a bar of its own, without asking
        from transformers import modeling_gguf_pytorch_utils as reading

        if hasattr(reading, "tqdm") and not isinstance(reading.tqdm, functools.partial):
            reading.tqdm = functools.partial(reading.tqdm, disable=True)
